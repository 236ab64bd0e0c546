"""Triton kernels behind ``adapters.fused``: images channels last in memory, one thread block per run of numbers.

Channel counts and sides are compile-time constants, so that dividing by them costs nothing; each shape is compiled once
and then found in Triton's cache on disk. Not to be imported where Triton is not installed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

NOWHERE = tl.constexpr(255)
"""In ``places``: a window whose rectified maximum is 0 passes no gradient on."""


@triton.jit
def _place(at, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    """Return channel, column, row and image of the number ``at`` of images (H, W, C)."""
    return at % C, (at // C) % W, (at // (C * W)) % H, at // (C * W * H)


@triton.jit
def _window_above(c, w, h, image, a, b, OH, OW, C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Return row and column of a window, ``a`` and ``b`` before the last that may hold a pixel, its number, the pixel's
    place in it, and whether there is such a window that holds it."""
    row, column = h // STRIDE - a, w // STRIDE - b
    i, j = h - row * STRIDE, w - column * STRIDE
    holds = (row >= 0) & (row < OH) & (column >= 0) & (column < OW) & (i < KERNEL) & (j < KERNEL)
    return row, column, ((image * OH + row) * OW + column) * C + c, i * KERNEL + j, holds


@triton.jit
def _pixels(row, column, H: tl.constexpr, W: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Return how many real pixels a window holds."""
    height = tl.minimum(row * STRIDE + KERNEL, H) - row * STRIDE
    return height * (tl.minimum(column * STRIDE + KERNEL, W) - column * STRIDE)


@triton.jit
def max_forward(
    x_ptr,
    y_ptr,
    places_ptr,
    total,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the maximum of each window, and where in it the first of equal maxima lies (uint8, in reading order)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c, column, row, image = _place(at, C, OW, OH)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            h, w = row * STRIDE + i, column * STRIDE + j
            valid = inside & (h < H) & (w < W)
            value = tl.load(x_ptr + ((image * H + h) * W + w) * C + c, mask=valid, other=float("-inf")).to(tl.float32)
            better = (value > best) | (value != value)  # a NaN wins, and stays
            place = tl.where(better, i * KERNEL + j, place)
            best = tl.where(better, value, best)
    if RECTIFY:
        place = tl.where(best <= 0, NOWHERE, place)
        best = tl.where(best <= 0, 0.0, best)
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(places_ptr + at, place.to(tl.uint8), mask=inside)


@triton.jit
def max_backward(
    dy_ptr,
    places_ptr,
    dx_ptr,
    total,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give each input the gradients of the windows that took their maximum from it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c, w, h, image = _place(at, C, W, H)
    dx = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for b in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            _row, _column, window, within, holds = _window_above(c, w, h, image, a, b, OH, OW, C, KERNEL, STRIDE)
            valid = inside & holds
            place = tl.load(places_ptr + window, mask=valid, other=255).to(tl.int32)
            dy = tl.load(dy_ptr + window, mask=valid, other=0.0).to(tl.float32)
            dx += tl.where(place == within, dy, 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def average_forward(
    x_ptr,
    y_ptr,
    total,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the mean of each window's real pixels, rectified first if ``RECTIFY``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c, column, row, image = _place(at, C, OW, OH)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            h, w = row * STRIDE + i, column * STRIDE + j
            valid = inside & (h < H) & (w < W)
            value = tl.load(x_ptr + ((image * H + h) * W + w) * C + c, mask=valid, other=0.0).to(tl.float32)
            sums += tl.where(value <= 0, 0.0, value) if RECTIFY else value
    mean = sums / _pixels(row, column, H, W, KERNEL, STRIDE)
    tl.store(y_ptr + at, mean.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def average_backward(
    dy_ptr,
    x_ptr,
    dx_ptr,
    total,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give each input its share of the gradients of the windows that it lies in; ``x_ptr`` is read if ``RECTIFY``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c, w, h, image = _place(at, C, W, H)
    dx = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for b in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            row, column, window, _within, holds = _window_above(c, w, h, image, a, b, OH, OW, C, KERNEL, STRIDE)
            valid = inside & holds
            dy = tl.load(dy_ptr + window, mask=valid, other=0.0).to(tl.float32)
            dx += tl.where(valid, dy / _pixels(row, column, H, W, KERNEL, STRIDE), 0.0)
    if RECTIFY:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        dx = tl.where(x <= 0, 0.0, dx)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward(
    x_ptr,
    y_ptr,
    divisor_ptr,
    total,
    bias,
    alpha,
    C: tl.constexpr,
    RADIUS: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ``x * divisor ** -0.75``, and the divisor: bias + alpha * sum of squares over the near channels."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c = at % C
    squares = tl.zeros((BLOCK,), tl.float32)
    for offset in tl.static_range(-RADIUS, RADIUS + 1):
        valid = inside & (c + offset >= 0) & (c + offset < C)
        value = tl.load(x_ptr + at + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.where(value <= 0, 0.0, value) if RECTIFY else value
        squares += value * value
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x <= 0, 0.0, x) if RECTIFY else x
    divisor = bias + alpha * squares
    root = tl.sqrt(divisor)
    tl.store(y_ptr + at, (x / (root * tl.sqrt(root))).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(divisor_ptr + at, divisor, mask=inside)


@triton.jit
def norm_backward(
    dy_ptr,
    x_ptr,
    divisor_ptr,
    dx_ptr,
    total,
    alpha,
    C: tl.constexpr,
    RADIUS: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = dy * factor - 1.5 * alpha * x * (sum over the near channels of dy * x * factor / divisor)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    c = at % C
    shared = tl.zeros((BLOCK,), tl.float32)
    for offset in tl.static_range(-RADIUS, RADIUS + 1):
        valid = inside & (c + offset >= 0) & (c + offset < C)
        value = tl.load(x_ptr + at + offset, mask=valid, other=0.0).to(tl.float32)
        value = tl.where(value <= 0, 0.0, value) if RECTIFY else value
        dy = tl.load(dy_ptr + at + offset, mask=valid, other=0.0).to(tl.float32)
        divisor = tl.load(divisor_ptr + at + offset, mask=valid, other=1.0)
        root = tl.sqrt(divisor)
        shared += dy * value / (root * tl.sqrt(root) * divisor)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.load(divisor_ptr + at, mask=inside, other=1.0))
    dx = dy / (root * tl.sqrt(root)) - 1.5 * alpha * x * shared
    if RECTIFY:
        dx = tl.where(x <= 0, 0.0, dx)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convolution_forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    FILTERS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the convolution of ``BLOCK`` pixels: their windows, gathered into rows of ``K``, times the filters.

    ``K`` and ``N`` are C * KERNEL * KERNEL and FILTERS, filled up to powers of two.
    """
    pixel, k, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K), tl.arange(0, N)
    column, row, image = (pixel % OW)[:, None], ((pixel // OW) % OH)[:, None], (pixel // (OW * OH))[:, None]
    c, w, h = (
        (k % C)[None, :],
        column + ((k // C) % KERNEL)[None, :] - PADDING,
        row + (k // (C * KERNEL))[None, :] - PADDING,
    )
    valid = (pixel < total)[:, None] & (k < C * KERNEL * KERNEL)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    windows = tl.load(x_ptr + ((image * H + h) * W + w) * C + c, mask=valid, other=0.0)
    known = (k < C * KERNEL * KERNEL)[:, None] & (n < FILTERS)[None, :]
    filters = tl.load(weight_ptr + n[None, :] * (C * KERNEL * KERNEL) + k[:, None], mask=known, other=0.0)
    element = y_ptr.dtype.element_ty
    y = tl.dot(windows.to(element), filters.to(element), input_precision="tf32")
    y += tl.load(bias_ptr + n, mask=n < FILTERS, other=0.0)[None, :]
    inside = (pixel < total)[:, None] & (n < FILTERS)[None, :]
    tl.store(y_ptr + pixel[:, None] * FILTERS + n[None, :], y.to(element), mask=inside)


def hash_ahead(names: dict[str, Any]) -> None:
    """Compute what Triton computes once a process, 0.3 to 0.6 s of hashing itself: workers forked later inherit it.

    ``names`` are a module's globals, with its kernels among them.
    """
    try:
        from triton.runtime.cache import triton_key
        from triton.runtime.jit import JITFunction
    except ImportError:  # other versions keep them elsewhere, and hash when a kernel is first run
        return
    triton_key()
    kernels: list[Any] = [one for one in names.values() if isinstance(one, JITFunction)]
    for kernel in kernels:
        _ = kernel.cache_key


hash_ahead(globals())

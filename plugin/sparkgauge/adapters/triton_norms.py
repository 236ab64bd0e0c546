"""Triton kernels of batch normalisation, with the sum and the ReLU that follow it: images channels last in memory.

Images (b, c, h, w) are a matrix of ``rows`` = b * h * w pixels and C channels. A pass adds up numbers per channel in
one kernel that leaves a row of sums for each thread block, and one that adds these rows, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from sparkgauge.adapters.triton_kernels import hash_ahead


@triton.jit
def _tile(first, rows, C: tl.constexpr, ROWS: tl.constexpr):
    """Return the places of ``ROWS`` pixels from ``first`` on (ROWS, C), and which of them there are (ROWS, 1)."""
    row = first + tl.arange(0, ROWS)
    return row[:, None].to(tl.int64) * C + tl.arange(0, C)[None, :], (row < rows)[:, None]


@triton.jit
def _scale_and_shift(mean, inverse, weight_ptr, bias_ptr, C: tl.constexpr):
    """Return what each channel is multiplied by and what is added (C,)."""
    c = tl.arange(0, C)
    scale = tl.load(weight_ptr + c) * inverse
    return scale, tl.load(bias_ptr + c) - mean * scale


@triton.jit
def moments(x_ptr, parts_ptr, rows, TILES: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """Write the sums of a block's numbers and of their squares: a row (2 C,) of ``parts``."""
    block = tl.program_id(0)
    first = tl.zeros((ROWS, C), tl.float32)
    second = tl.zeros((ROWS, C), tl.float32)
    for tile in range(TILES):
        at, inside = _tile((block * TILES + tile) * ROWS, rows, C, ROWS)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        first += x
        second += x * x
    c = tl.arange(0, C)
    tl.store(parts_ptr + block * 2 * C + c, tl.sum(first, 0))
    tl.store(parts_ptr + block * 2 * C + C + c, tl.sum(second, 0))


@triton.jit
def add_up(parts_ptr, sums_ptr, blocks, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the sums of ``COLUMNS`` columns of ``parts`` (blocks, WIDTH)."""
    row, column = tl.arange(0, BLOCKS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(sums_ptr + column, tl.sum(tl.load(parts_ptr + at, mask=(row < blocks)[:, None], other=0.0), 0))


@triton.jit
def apply(
    x_ptr,
    beside_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_variance_ptr,
    mean_ptr,
    inverse_ptr,
    y_ptr,
    rows,
    count,
    momentum,
    epsilon,
    C: tl.constexpr,
    RECTIFY: tl.constexpr,
    BESIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the normalised images, plus ``beside`` and rectified where asked for; the first block keeps statistics."""
    c = tl.arange(0, C)
    mean = tl.load(sums_ptr + c) / count
    variance = tl.maximum(tl.load(sums_ptr + C + c) / count - mean * mean, 0.0)
    inverse = 1.0 / tl.sqrt(variance + epsilon)
    scale, shift = _scale_and_shift(mean, inverse, weight_ptr, bias_ptr, C)
    at, inside = _tile(tl.program_id(0) * ROWS, rows, C, ROWS)
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if BESIDE:
        y += tl.load(beside_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        y = tl.where(y <= 0, 0.0, y)  # a NaN stays
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(mean_ptr + c, mean)
        tl.store(inverse_ptr + c, inverse)
        old = tl.load(running_mean_ptr + c)
        tl.store(running_mean_ptr + c, old + momentum * (mean - old))
        old = tl.load(running_variance_ptr + c)
        tl.store(running_variance_ptr + c, old + momentum * (variance * (count / (count - 1)) - old))


@triton.jit
def gradient_sums(
    dy_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    inverse_ptr,
    parts_ptr,
    passed_ptr,
    rows,
    TILES: tl.constexpr,
    C: tl.constexpr,
    RECTIFY: tl.constexpr,
    BESIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the sums of a block's gradients behind the ReLU, and of these times the normalised numbers.

    With ``BESIDE`` the gradients behind the ReLU are kept: they are those of what was added.
    """
    block, c = tl.program_id(0), tl.arange(0, C)
    mean, inverse = tl.load(mean_ptr + c), tl.load(inverse_ptr + c)
    scale, shift = _scale_and_shift(mean, inverse, weight_ptr, bias_ptr, C)
    first = tl.zeros((ROWS, C), tl.float32)
    second = tl.zeros((ROWS, C), tl.float32)
    for tile in range(TILES):
        at, inside = _tile((block * TILES + tile) * ROWS, rows, C, ROWS)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if RECTIFY:
            if BESIDE:
                y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            else:
                y = x * scale[None, :] + shift[None, :]
            dy = tl.where(y <= 0, 0.0, dy)
            if BESIDE:
                tl.store(passed_ptr + at, dy.to(passed_ptr.dtype.element_ty), mask=inside)
        first += dy
        second += tl.where(inside, dy * (x - mean[None, :]) * inverse[None, :], 0.0)
    tl.store(parts_ptr + block * 2 * C + c, tl.sum(first, 0))
    tl.store(parts_ptr + block * 2 * C + C + c, tl.sum(second, 0))


@triton.jit
def gradient(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    inverse_ptr,
    sums_ptr,
    dx_ptr,
    rows,
    count,
    C: tl.constexpr,
    RECTIFY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the gradient of the images; ``RECTIFY`` where ``dy`` has not passed the ReLU yet."""
    c = tl.arange(0, C)
    mean, inverse = tl.load(mean_ptr + c), tl.load(inverse_ptr + c)
    scale, shift = _scale_and_shift(mean, inverse, weight_ptr, bias_ptr, C)
    slope = inverse * tl.load(sums_ptr + C + c) / count
    at, inside = _tile(tl.program_id(0) * ROWS, rows, C, ROWS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        dy = tl.where(x * scale[None, :] + shift[None, :] <= 0, 0.0, dy)
    dx = scale[None, :] * (dy - (tl.load(sums_ptr + c) / count)[None, :] - (x - mean[None, :]) * slope[None, :])
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


hash_ahead(globals())

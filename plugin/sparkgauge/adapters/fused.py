"""Pools, ReLUs and response normalisation on a GPU, each pass one kernel.

PyTorch's own kernels for pools channels last took 110 of 550 microseconds of a training step of cifar10_quick (batch
100, H100, PyTorch 2.11), its response normalisation a dozen kernels. Where Triton is not installed, or the numbers are
not float32 or bfloat16 on a GPU, the same functions are composed of PyTorch's.

Pools have no padding and round up their sides (Caffe's rule) unless told not to. Images (b, c, h, w) lie channels last
in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

Tensor = Any
aten: Any = torch.ops.aten

BLOCK = 1024
"""Numbers per thread block: eight for each of its threads."""
OLDEST = (8, 0)
"""Compute capability of the first GPUs with TF32 and bfloat16 (Ampere)."""
PIXELS = 64
"""Pixels whose windows a thread block multiplies with the filters at a time."""
LONGEST_WINDOW = 128
"""Numbers of a window that a thread block holds."""
NORM_NUMBERS = 4096
"""Numbers of a norm's channels that a thread block holds at a time."""
NORM_BLOCKS = 512
"""Most thread blocks that add up: four for each multiprocessor of a large GPU."""
NORM_COLUMNS = 16
"""Channels whose sums one thread block adds up."""


def max_pool(x: Tensor, kernel: int, stride: int, *, rectify: bool = False, round_up: bool = True) -> Tensor:
    """Return the maxima of the windows of ``x``; ``rectify`` applies a ReLU, before or after is the same."""
    if fits(x):
        return _MaxPool.apply(x, kernel, stride, rectify, round_up)
    y = functional.max_pool2d(x, kernel, stride, ceil_mode=round_up)
    return functional.relu(y) if rectify else y


def average_pool(x: Tensor, kernel: int, stride: int, *, rectify: bool = False) -> Tensor:
    """Return the means of the windows of ``x`` over real pixels; ``rectify`` applies a ReLU first."""
    if fits(x):
        return _AveragePool.apply(x, kernel, stride, rectify)
    x = functional.relu(x) if rectify else x
    return functional.avg_pool2d(x, kernel, stride, ceil_mode=True, count_include_pad=False)


def norm_over_channels(x: Tensor, radius: int, bias: float, alpha: float, *, rectify: bool) -> Tensor:
    """Return ``x / (bias + alpha * sum of squares over 2 * radius + 1 channels) ** 0.75`` of an ``x`` that ``fits``."""
    return _NormOverChannels.apply(x, radius, bias, alpha, rectify)


def fits(x: Tensor) -> bool:
    """Return whether the kernels can take ``x``."""
    return bool(x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and x.numel()) and kernels() is not None


@functools.cache
def kernels() -> Any:
    """Return the module of kernels; None where Triton is not installed, or the GPU older than it supports well."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        return None
    try:
        from sparkgauge.adapters import triton_kernels
    except ImportError:
        return None
    return triton_kernels


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, rectify: bool, round_up: bool) -> Tensor:
        y, places = max_pool_forward(x, kernel, stride, rectify=rectify, round_up=round_up)
        ctx.save_for_backward(places)
        ctx.geometry = x.shape, kernel, stride
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return max_pool_backward(dy, *ctx.saved_tensors, *ctx.geometry), None, None, None, None


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, rectify: bool) -> Tensor:
        x = _channels_last(x)
        y = _like(x, _pooled_shape(x.shape, kernel, stride))
        _run("average_forward", y, (x, y), (*x.shape[1:], *y.shape[2:], kernel, stride, rectify))
        ctx.save_for_backward(x if rectify else x.new_empty(0))
        ctx.geometry = x.shape, kernel, stride
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return average_pool_backward(dy, *ctx.geometry, rectified=x if x.numel() else None), None, None, None


class _NormOverChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, radius: int, bias: float, alpha: float, rectify: bool) -> Tensor:
        x = _channels_last(x)
        y, divisor = norm_forward(x, radius, bias, alpha, rectify=rectify)
        ctx.save_for_backward(x, divisor)
        ctx.settings = radius, alpha, rectify
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, divisor = ctx.saved_tensors
        radius, alpha, rectify = ctx.settings
        return norm_backward(dy, x, divisor, radius, alpha, rectify=rectify), None, None, None, None


def max_pool_forward(
    x: Tensor, kernel: int, stride: int, *, rectify: bool = False, round_up: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the maxima (b, c, oh, ow) and where in its window each lies (uint8), which the gradient needs."""
    x = _channels_last(x)
    y = _like(x, _pooled_shape(x.shape, kernel, stride, round_up=round_up))
    places = torch.empty_like(y, dtype=torch.uint8)
    _run("max_forward", y, (x, y, places), (*x.shape[1:], *y.shape[2:], kernel, stride, rectify))
    return y, places


def max_pool_backward(dy: Tensor, places: Tensor, shape: Any, kernel: int, stride: int) -> Tensor:
    """Return the gradient of the input of ``shape``, given that of the maxima."""
    dy = _channels_last(dy)
    dx = _like(dy, shape)
    _run("max_backward", dx, (dy, places, dx), (*shape[1:], *dy.shape[2:], kernel, stride))
    return dx


def average_pool_backward(dy: Tensor, shape: Any, kernel: int, stride: int, *, rectified: Tensor = None) -> Tensor:
    """Return the gradient of the input of ``shape``; ``rectified`` is the input that went through a ReLU first."""
    dy = _channels_last(dy)
    dx = _like(dy, shape)
    x = dy if rectified is None else rectified
    _run("average_backward", dx, (dy, x, dx), (*shape[1:], *dy.shape[2:], kernel, stride, rectified is not None))
    return dx


def norm_forward(x: Tensor, radius: int, bias: float, alpha: float, *, rectify: bool) -> tuple[Tensor, Tensor]:
    """Return ``x * divisor ** -0.75`` and the divisor, bias + alpha * sum of squares over 2 * radius + 1 channels."""
    y, divisor = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    _run("norm_forward", x, (x, y, divisor), (x.shape[1], radius, rectify), (bias, alpha))
    return y, divisor


def norm_backward(dy: Tensor, x: Tensor, divisor: Tensor, radius: int, alpha: float, *, rectify: bool) -> Tensor:
    """Return the gradient of :func:`norm_forward`'s input."""
    dy, dx = _channels_last(dy), torch.empty_like(x)
    _run("norm_backward", x, (dy, x, divisor, dx), (x.shape[1], radius, rectify), (alpha,))
    return dx


def first_convolution(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    """Return the convolution of images that need no gradient, whose channels are few."""
    if not x.requires_grad and fits_convolution(x, weight):
        return _FirstConvolution.apply(x, weight, bias, padding)
    return functional.conv2d(x, weight, bias, padding=padding)


def fits_convolution(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel for few channels can take both; the convolution has stride 1 and one group.

    Three channels fill no tensor core: cuDNN took 40 of the 550 microseconds of cifar10_quick's step for the layer and
    its bias, this kernel 20.
    """
    filters, channels, *kernel = weight.shape
    small = channels <= 4 and kernel[0] == kernel[1] and filters <= 64 and weight[0].numel() <= LONGEST_WINDOW
    return bool(small and fits(x))


def convolution_forward(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Return the convolution (b, filters, rows, columns) in the autocast's type where there is one."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    x, weight = _channels_last(x), _channels_last(weight)
    filters, _, kernel, _ = weight.shape
    y = _like(x, (len(x), filters, *(side + 2 * padding - kernel + 1 for side in x.shape[2:])), dtype)
    pixels = y.numel() // filters
    filled = (max(16, 1 << (count - 1).bit_length()) for count in (weight[0].numel(), filters))
    constants = (*x.shape[1:], *y.shape[2:], kernel, padding, filters, *filled, PIXELS)
    kernels().convolution_forward[(-(-pixels // PIXELS),)](x, weight, bias, y, pixels, *constants)
    return y


class _FirstConvolution(torch.autograd.Function):
    """Only forwards by a kernel of ours: the filters' gradients cuDNN sums faster than one that was tried."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return convolution_forward(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = (one.to(dy.dtype) for one in ctx.saved_tensors)
        geometry = ((1, 1), (ctx.padding, ctx.padding), (1, 1), False, (0, 0), 1)
        wanted = [False, *ctx.needs_input_grad[1:3]]
        found = aten.convolution_backward(_channels_last(dy), x, weight, [len(weight)], *geometry, wanted)
        return None, *(None if one is None else one.float() for one in found[1:]), None


def fits_norm(x: Tensor) -> bool:
    """Return whether the kernels of batch normalisation can take ``x`` (b, c, h, w)."""
    channels = x.shape[1]
    return 8 <= channels <= 1024 and channels & (channels - 1) == 0 and fits(x)


def moments(x: Tensor) -> Tensor:
    """Return per channel the sums of ``x`` and of its squares (2 c,), float32."""
    rows, channels, height = _matrix(x)
    blocks, tiles = _norm_grid(rows, height)
    parts = x.new_empty((blocks, 2 * channels), dtype=torch.float32)
    _norms().moments[(blocks,)](x, parts, rows, tiles, channels, height)
    return _added_up(parts)


def apply_norm(
    x: Tensor,
    beside: Tensor | None,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
    count: int,
    *,
    rectify: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` normalised by ``sums`` over ``count`` numbers, scaled, shifted, plus ``beside``, and rectified.

    And mean and 1 / deviation (c,). The running statistics change in place.
    """
    rows, channels, height = _matrix(x)
    y, (mean, inverse) = torch.empty_like(x), x.new_empty((2, channels), dtype=torch.float32)
    tensors = (x, x if beside is None else beside, sums, weight, bias, running_mean, running_variance, mean, inverse, y)
    numbers = (rows, float(count), momentum, epsilon)
    _norms().apply[(-(-rows // height),)](*tensors, *numbers, channels, rectify, beside is not None, height)
    return y, mean, inverse


def norm_gradient_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    *,
    rectify: bool,
    beside: bool,
) -> tuple[Tensor, Tensor, bool]:
    """Return per channel the sums (2 c,) of the gradients behind the ReLU and of these times the normalised ``x``.

    And the gradients, with whether they have passed the ReLU: where something was added, whose gradients they are.
    ``y`` is the result, which is needed then.
    """
    rows, channels, height = _matrix(x)
    blocks, tiles = _norm_grid(rows, height)
    passes = rectify and beside
    parts, passed = x.new_empty((blocks, 2 * channels), dtype=torch.float32), torch.empty_like(dy) if passes else dy
    tensors = (dy, x, y if passes else x, weight, bias, mean, inverse, parts, passed)
    _norms().gradient_sums[(blocks,)](*tensors, rows, tiles, channels, rectify, beside, height)
    return _added_up(parts), passed, passes


def norm_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    sums: Tensor,
    count: int,
    *,
    rectify: bool,
) -> Tensor:
    """Return the gradient of ``x`` by :func:`norm_gradient_sums`' sums over ``count`` numbers of all executors.

    ``rectify`` where ``dy`` has not passed the ReLU yet.
    """
    rows, channels, height = _matrix(x)
    dx = torch.empty_like(x)
    tensors = (dy, x, weight, bias, mean, inverse, sums, dx)
    _norms().gradient[(-(-rows // height),)](*tensors, rows, float(count), channels, rectify, height)
    return dx


def _matrix(x: Tensor) -> tuple[int, int, int]:
    """Return rows and columns of ``x`` (b, c, h, w) as pixels by channels, and how many rows a thread block holds."""
    channels = x.shape[1]
    return x.numel() // channels, channels, NORM_NUMBERS // channels


def _norm_grid(rows: int, height: int) -> tuple[int, int]:
    """Return how many thread blocks add up ``rows``, and how many times ``height`` rows each takes.

    A power of two, since each number of times is compiled by itself.
    """
    tiles = -(-rows // height)
    each = 1 << (-(-tiles // NORM_BLOCKS) - 1).bit_length()
    return -(-tiles // each), each


def _added_up(parts: Tensor) -> Tensor:
    """Return the sums of the columns of ``parts`` (blocks, 2 c)."""
    blocks, width = parts.shape
    sums, height = parts.new_empty(width), 1 << (blocks - 1).bit_length()
    _norms().add_up[(width // NORM_COLUMNS,)](parts, sums, blocks, width, height, NORM_COLUMNS)
    return sums


def _norms() -> Any:
    from sparkgauge.adapters import triton_norms

    return triton_norms


def _pooled_shape(shape: Any, kernel: int, stride: int, *, round_up: bool = True) -> tuple[int, int, int, int]:
    """Return the shape of a pool's output; a last window that would begin outside is none."""
    images, channels, *sides = shape
    rows, columns = (_pooled_side(side, kernel, stride, round_up) for side in sides)
    return images, channels, rows, columns


def _pooled_side(side: int, kernel: int, stride: int, round_up: bool) -> int:
    beyond = max(side - kernel, 0)
    size = (-(-beyond // stride) if round_up else beyond // stride) + 1
    return size if (size - 1) * stride < side else size - 1


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, shape: Any, dtype: Any = None) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _run(name: str, over: Tensor, tensors: tuple[Tensor, ...], constants: Any, numbers: tuple[float, ...] = ()) -> None:
    """Run the kernel ``name`` once for every number of ``over``."""
    total = over.numel()
    getattr(kernels(), name)[(-(-total // BLOCK),)](*tensors, total, *numbers, *constants, BLOCK)

"""The suite's CIFAR-10 networks in PyTorch. Channels last in memory; initial weights depend on the seed alone."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparkgauge.adapters import fused
from sparkgauge.adapters.collective import Exchange
from sparkgauge.adapters.fused import average_pool, first_convolution, max_pool
from sparkgauge.adapters.layout import blocked, dense
from sparkgauge.adapters.torch.norms import BatchNorm, parameter
from sparkgauge.models.cifar10 import CIFAR10_FULL, CIFAR10_QUICK, CIFAR10_TUTORIAL, RESNET20, SPEEDRUN, Recipe
from sparkgauge.models.flops import speedrun_widths

Tensor = Any
"""A ``torch.Tensor``: the type check treats torch as untyped, installed or not."""

WHITENING_IMAGES = 5000
"""Training images whose patches decide the whitening filters: 4.8 million 2 x 2 patches."""


def build(recipe: Recipe, seed: int, exchange: Exchange, width: float = 1.0) -> nn.Module:
    """Return the network of ``recipe`` with weights drawn from ``seed``; KeyError for a model it does not know.

    ``width`` scales the channels of ``speedrun``; the others have theirs.

    Each parameter's ``rate_factor`` and ``decay_factor`` multiply learning rate and weight decay (1 where missing).
    Batch normalisation takes its statistics over the whole global batch, through ``exchange``.
    """
    draws = Draws(seed)
    network: nn.Module = {
        CIFAR10_QUICK.name: lambda: Quick(draws),
        CIFAR10_FULL.name: lambda: Full(draws),
        CIFAR10_TUTORIAL.name: lambda: Tutorial(draws),
        RESNET20.name: lambda: ResNet20(draws, exchange),
        SPEEDRUN.name: lambda: Speedrun(draws, exchange, speedrun_widths(width)),
    }[recipe.name]()
    return network.to(memory_format=torch.channels_last)


class Draws:
    """Initial values, a stream of their own for every array, whatever the state of torch's global generator."""

    def __init__(self, seed: int) -> None:
        self._seed, self._arrays = seed, 0

    def normal(self, shape: tuple[int, ...], deviation: float, *, cut: bool = False) -> Tensor:
        """Return normal values; ``cut`` redraws beyond two deviations as TensorFlow's truncated normal does."""
        self._arrays += 1
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._arrays) % 2**63)
        values = torch.randn(shape, generator=generator)
        while cut and (far := values.abs() > 2).any():
            values[far] = torch.randn(int(far.sum()), generator=generator)
        return values * deviation


class Quick(nn.Module):
    """Caffe's quick CIFAR-10 net: pools in ceil mode, averages over real pixels, first pool before its ReLU."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.conv1 = _caffe(draws, (32, 3, 5, 5), 1e-4)
        self.conv2 = _caffe(draws, (32, 32, 5, 5), 1e-2)
        self.conv3 = _caffe(draws, (64, 32, 5, 5), 1e-2)
        self.ip1 = _caffe(draws, (64, 1024), 1e-1)
        self.ip2 = _caffe(draws, (10, 64), 1e-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10) of images minus the mean image (b, 3, 32, 32)."""
        x = max_pool(first_convolution(blocked(x), *_of(self.conv1)), 3, 2, rectify=True)  # (b, 32, 16, 16)
        x = average_pool(self.conv2(x), 3, 2, rectify=True)  # (b, 32, 8, 8)
        x = average_pool(dense(self.conv3(x)), 3, 2, rectify=True)  # (b, 64, 4, 4)
        return self.ip2(self.ip1(x.flatten(1)))


class Full(nn.Module):
    """Caffe's full CIFAR-10 net: response normalisation within channels, decay on the last weights only 250-fold."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.conv1 = _caffe(draws, (32, 3, 5, 5), 1e-4)
        self.conv2 = _caffe(draws, (32, 32, 5, 5), 1e-2)
        self.conv3 = _caffe(draws, (64, 32, 5, 5), 1e-2, bias_rate=1.0)  # its prototxt leaves the factors at 1
        self.ip1 = _caffe(draws, (10, 1024), 1e-2, decay=250.0, bias_decay=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10) of images minus the mean image (b, 3, 32, 32)."""
        x = max_pool(first_convolution(blocked(x), *_of(self.conv1)), 3, 2, rectify=True)  # (b, 32, 16, 16)
        x = average_pool(self.conv2(norm_within_channels(dense(x))), 3, 2, rectify=True)  # (b, 32, 8, 8)
        x = average_pool(self.conv3(norm_within_channels(x)), 3, 2, rectify=True)  # (b, 64, 4, 4)
        return self.ip1(x.flatten(1))


class Tutorial(nn.Module):
    """TensorFlow's tutorial net: two convolutions with local response normalisation, three dense layers."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.conv1 = _tutorial(draws, (64, 3, 5, 5), 5e-2, bias=0.0, decay=0.0)
        self.conv2 = _tutorial(draws, (64, 64, 5, 5), 5e-2, bias=0.1, decay=0.0)
        self.dense1 = _tutorial(draws, (384, 2304), 4e-2, bias=0.1, decay=1.0)
        self.dense2 = _tutorial(draws, (192, 384), 4e-2, bias=0.1, decay=1.0)
        self.dense3 = _tutorial(draws, (10, 192), 1 / 192, bias=0.0, decay=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10) of standardised images (b, 3, 24, 24)."""
        # TensorFlow's SAME padding of even sides is one row and column at the far edge: what rounding up comes to
        x = max_pool(first_convolution(x, *_of(self.conv1)), 3, 2, rectify=True)  # (b, 64, 12, 12)
        x = norm_over_channels(self.conv2(norm_over_channels(x)), rectify=True)
        x = max_pool(x, 3, 2).flatten(1)  # (b, 64 * 6 * 6)
        x = functional.relu(self.dense1(x))
        return self.dense3(functional.relu(self.dense2(x)))


class ResNet20(nn.Module):
    """The 20-layer CIFAR network of He et al. with shortcuts that have no parameters (option A)."""

    def __init__(self, draws: Draws, exchange: Exchange) -> None:
        super().__init__()
        self.conv = _he(draws, exchange, 3, 16)
        self.norm = BatchNorm(16, exchange)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.blocks = nn.Sequential(*(Block(draws, exchange, *pair) for pair in itertools.pairwise(widths)))
        self.dense = nn.Linear(64, 10)
        self.dense.weight = parameter(draws.normal((10, 64), math.sqrt(1 / 64)))
        self.dense.bias = parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10) of normalised images (b, 3, 32, 32)."""
        x = self.blocks(self.norm(self.conv(x), rectify=True))  # (b, 64, 8, 8)
        return self.dense(x.mean((2, 3)))


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; a change of width halves the image."""

    def __init__(self, draws: Draws, exchange: Exchange, before: int, after: int) -> None:
        super().__init__()
        self._grows = after - before
        self.conv1 = _he(draws, exchange, before, after, stride=2 if self._grows else 1)
        self.norm1 = BatchNorm(after, exchange)
        self.conv2 = _he(draws, exchange, after, after)
        self.norm2 = BatchNorm(after, exchange)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; missing channels of the shortcut are zero."""
        y = self.conv2(self.norm1(self.conv1(x), rectify=True))
        if self._grows:
            half = self._grows // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self._grows - half))
        return self.norm2(y, beside=x, rectify=True)


class Speedrun(nn.Module):
    """This project's fast net: fixed whitening of 2 x 2 patches, three pairs of convolutions, scaled logits.

    Convolutions begin as identities where they have inputs to pass on, norms have no scale, and their biases learn
    fast: what lets a high rate start at once (Jordan 2024, section 3).
    """

    def __init__(self, draws: Draws, exchange: Exchange, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("whitening", draws.normal((24, 3, 2, 2), math.sqrt(1 / 12)))
        self.shift = parameter(torch.zeros(24))
        self.blocks = nn.ModuleList(WideBlock(draws, exchange, *pair) for pair in itertools.pairwise(widths))
        width = widths[-1]
        self.dense = nn.Linear(width, 10, bias=False)
        self.dense.weight = parameter(draws.normal((10, width), math.sqrt(1 / (3 * width))))

    def prepare(self, images: Tensor) -> None:
        """Set the whitening filters from normalised training images (n, 3, 32, 32)."""
        patches = images[:WHITENING_IMAGES].unfold(2, 2, 1).unfold(3, 2, 1)  # (n, 3, 31, 31, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + 5e-4)).T.reshape(12, 3, 2, 2)
        self.whitening.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10) of normalised images (b, 3, 32, 32)."""
        x = functional.gelu(first_convolution(x, self.whitening, self.shift))  # (b, 24, 31, 31)
        for block in self.blocks:
            x = block(x)  # 15, 7, 3 pixels a side
        return self.dense(x.amax((2, 3))) / 9


class WideBlock(nn.Module):
    """Convolution, pool, norm, GELU, convolution, norm, GELU."""

    def __init__(self, draws: Draws, exchange: Exchange, before: int, after: int) -> None:
        super().__init__()
        norm = functools.partial(BatchNorm, scaled=False, momentum=0.4, epsilon=1e-12, bias_rate=64.0)
        self.conv1, self.norm1 = _dirac(draws, exchange, before, after), norm(after, exchange)
        self.conv2, self.norm2 = _dirac(draws, exchange, after, after), norm(after, exchange)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, after, side // 2, side // 2)."""
        x = functional.gelu(self.norm1(max_pool(self.conv1(x), 2, 2, round_up=False)))
        return functional.gelu(self.norm2(self.conv2(x)))


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution without bias; CPUs compute its filters' gradients while sums over executors travel."""

    def __init__(self, exchange: Exchange, before: int, after: int, stride: int = 1) -> None:
        super().__init__(before, after, 3, stride=stride, padding=1, bias=False)
        self._exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution (b, after, h, w) of ``x`` (b, before, h, w), each side divided by the stride."""
        if self._exchange.alone or x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.stride[0], self._exchange)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, exchange: Exchange) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.exchange = weight, exchange
        ctx.geometry = None, (stride, stride), (1, 1), (1, 1), False, (0, 0), 1  # no bias, stride, padding, dilation
        return functional.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        backward = torch.ops.aten.convolution_backward
        operands = dy.contiguous(memory_format=torch.channels_last), x.to(dy.dtype), ctx.weight.detach().to(dy.dtype)
        geometry = ctx.geometry
        dx = backward(*operands, *geometry, (True, False, False))[0] if ctx.needs_input_grad[0] else None
        ctx.exchange.put_off(lambda: backward(*operands, *geometry, (False, True, False))[1], ctx.weight)
        return dx, None, None, None


def norm_over_channels(
    x: Tensor, radius: int = 4, bias: float = 1.0, alpha: float = 0.001 / 9, *, rectify: bool = False
) -> Tensor:
    """Return ``x / (bias + alpha * sum of squares over 2 * radius + 1 channels) ** 0.75``, as tf.nn.lrn does.

    ``rectify`` applies a ReLU first.
    """
    if fused.fits(x):
        return fused.norm_over_channels(x, radius, bias, alpha, rectify=rectify)
    return _NormOverChannels.apply(functional.relu(x) if rectify else x, radius, bias, alpha)


class _NormOverChannels(torch.autograd.Function):
    """The formula and its gradient by hand: a third of the passes over memory that recorded operations take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, radius: int, bias: float, alpha: float) -> Tensor:
        offsets = torch.arange(x.shape[1], device=x.device)
        band = ((offsets[:, None] - offsets[None, :]).abs() <= radius).to(x.dtype)
        rows = x.permute(0, 2, 3, 1)  # channels last in memory: sums over channels are a plain matrix product
        divisor = ((rows * rows) @ (alpha * band)).add_(bias).permute(0, 3, 1, 2)
        inverse_root = torch.rsqrt(divisor)
        factor = torch.sqrt(inverse_root).mul_(inverse_root)  # divisor ** -0.75
        y = x * factor
        ctx.save_for_backward(x, y, divisor, factor, band)
        ctx.alpha = alpha
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, y, divisor, factor, band = ctx.saved_tensors
        # dx = dy * factor - 1.5 * alpha * x * (sum over the neighbouring channels of dy * y / divisor)
        shared = ((dy * y).div_(divisor).permute(0, 2, 3, 1) @ band).permute(0, 3, 1, 2)
        return (dy * factor).addcmul_(x, shared, value=-1.5 * ctx.alpha), None, None, None


def norm_within_channels(x: Tensor, size: int = 3, alpha: float = 5e-5) -> Tensor:
    """Return Caffe's WITHIN_CHANNEL normalisation: the mean of squares over a window, zeros counted at the edge."""
    squares = functional.avg_pool2d(x * x, size, 1, padding=size // 2)
    inverse_root = torch.rsqrt(1 + alpha * squares)
    return x * inverse_root * torch.sqrt(inverse_root)


def _of(convolution: Any) -> tuple[Tensor, Tensor, int]:
    return convolution.weight, convolution.bias, convolution.padding[0]


def _caffe(
    draws: Draws,
    shape: tuple[int, ...],
    deviation: float,
    *,
    bias_rate: float = 2.0,
    decay: float = 1.0,
    bias_decay: float = 1.0,
) -> nn.Module:
    layer = _layer(shape)
    layer.weight = parameter(draws.normal(shape, deviation), decay=decay)
    layer.bias = parameter(torch.zeros(shape[0]), rate=bias_rate, decay=bias_decay)
    return layer


def _tutorial(draws: Draws, shape: tuple[int, ...], deviation: float, *, bias: float, decay: float) -> nn.Module:
    layer = _layer(shape)
    layer.weight = parameter(draws.normal(shape, deviation, cut=True), decay=decay)
    layer.bias = parameter(torch.full((shape[0],), bias), decay=0.0)
    return layer


def _layer(shape: tuple[int, ...]) -> Any:
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0])
    return nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)


def _he(draws: Draws, exchange: Exchange, before: int, after: int, stride: int = 1) -> nn.Module:
    layer = Convolution(exchange, before, after, stride=stride)
    layer.weight = parameter(draws.normal((after, before, 3, 3), math.sqrt(2 / (9 * after))))
    return layer


def _dirac(draws: Draws, exchange: Exchange, before: int, after: int) -> nn.Module:
    """Return a convolution whose first ``before`` outputs are its inputs; the others begin as PyTorch's own do."""
    layer = Convolution(exchange, before, after)
    weight = draws.normal((after, before, 3, 3), math.sqrt(1 / (3 * 9 * before)))
    passed = min(before, after)
    weight[:passed] = 0
    weight[range(passed), range(passed), 1, 1] = 1
    layer.weight = parameter(weight)
    return layer

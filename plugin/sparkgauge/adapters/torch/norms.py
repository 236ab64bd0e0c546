"""Batch normalisation over the global batch, with the sum and the ReLU that follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparkgauge.adapters import fused
from sparkgauge.adapters.collective import Exchange

Tensor = Any

CACHED_NUMBERS = 128 * 1024
"""float32 numbers that stay in a core's second-level cache, with their squares."""


def parameter(values: Tensor, *, rate: float = 1.0, decay: float = 1.0) -> nn.Parameter:
    """Return ``values`` as a trainable parameter with its own factors of rate and decay."""
    made = nn.Parameter(values)
    made.rate_factor, made.decay_factor = rate, decay
    return made


class BatchNorm(nn.Module):
    """Batch normalisation over the global batch: N executors normalise as one does.

    With statistics of their own, executors with half the images each would train another network than one does with
    all of them. A step costs two small all-reduces per layer, 38 in resnet20.
    """

    def __init__(
        self,
        channels: int,
        exchange: Exchange,
        *,
        scaled: bool = True,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        bias_rate: float = 1.0,
    ) -> None:
        """``momentum`` is the weight of a step's statistics in the running ones; ``scaled`` learns a factor."""
        super().__init__()
        if scaled:
            self.weight = parameter(torch.ones(channels))
        else:
            self.register_buffer("weight", torch.ones(channels))
        self.bias = parameter(torch.zeros(channels), rate=bias_rate, decay=1 / bias_rate)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.exchange, self.momentum, self.epsilon = exchange, momentum, epsilon

    def forward(self, x: Tensor, *, beside: Tensor | None = None, rectify: bool = False) -> Tensor:
        """Return ``x`` (b, c, h, w) normalised, scaled and shifted per channel; plus ``beside``, and rectified."""
        if self.training and fused.fits_norm(x) and all(self.exchange.shares):
            return _FusedNorm.apply(x, self.weight, self.bias, beside, self, rectify)
        y = self._normalised(x)
        # in place, since a norm keeps its input alone: a fifth of the traffic of the passes between convolutions
        y = y if beside is None else y.add_(beside)
        return y.relu_() if rectify else y

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.training or (self.exchange.alone and x.is_cuda):
            state = (self.running_mean, self.running_var, self.weight, self.bias)
            return functional.batch_norm(x, *state, self.training, self.momentum, self.epsilon)
        y, mean, variance, count = _GlobalNorm.apply(x, self.weight, self.bias, self.exchange, self.epsilon)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return y


class _FusedNorm(torch.autograd.Function):
    """By kernels of this package, where every executor has images: three passes' kernels each way, and a collective.

    A training step of resnet20 at batch 1024 spent 3.0 ms in the norms' kernels of torch.nn.SyncBatchNorm, 2.1 in
    cuDNN's, 0.8 in ReLUs; all of it takes these 1.9 (one H200, PyTorch 2.11, profiles of 3 steps).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, beside: Tensor | None, norm: BatchNorm, rectify: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        beside = None if beside is None else beside.contiguous(memory_format=torch.channels_last)
        count = norm.exchange.total(x)
        sums = norm.exchange.sum_(fused.moments(x))
        running = norm.running_mean, norm.running_var, norm.momentum, norm.epsilon
        y, mean, inverse = fused.apply_norm(x, beside, sums, weight, bias, *running, count, rectify=rectify)
        kept = y if rectify and beside is not None else y.new_empty(0)
        ctx.save_for_backward(x, kept, weight, bias, mean, inverse)
        ctx.exchange, ctx.count, ctx.rectify, ctx.beside = norm.exchange, count, rectify, beside is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, y, weight, bias, mean, inverse = ctx.saved_tensors
        dy, channels = dy.contiguous(memory_format=torch.channels_last), x.shape[1]
        own, dy, passed = fused.norm_gradient_sums(
            dy, x, y, weight, bias, mean, inverse, rectify=ctx.rectify, beside=ctx.beside
        )
        sums = own if ctx.exchange.alone else ctx.exchange.sum_(own.clone())
        rectify = ctx.rectify and not passed
        dx = fused.norm_gradient(dy, x, weight, bias, mean, inverse, sums, ctx.count, rectify=rectify)
        return dx, own[channels:], own[:channels], dy if ctx.beside else None, None, None


class _GlobalNorm(torch.autograd.Function):
    """Normalisation by sums over all executors; an executor without images takes part with zeros.

    As few passes over the images as the fused kernel of one process needs, all in the layout of ``x``. One executor
    takes its sums here too: the fused kernel adds up 65,000 numbers one by one where images are channels last, and its
    gradients of ResNet-20 were wrong by 0.3 %, these are by 0.0002 % (float64 as the measure, batch 64, PyTorch 2.13).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, exchange: Exchange, epsilon: float) -> Any:
        x = x if x.dtype == torch.float64 else x.float()  # sums in half precision would not do
        channels = x.shape[1]
        count = x.new_full((1,), x.numel() // channels)
        mean, variance, inverse, total = _shared_moments(exchange, *_moments(x), count, epsilon)
        scale = weight * inverse
        y = torch.addcmul(_wide(bias - mean * scale), x, _wide(scale))
        ctx.save_for_backward(x, weight, mean, variance, inverse, total)
        ctx.exchange, ctx.epsilon = exchange, epsilon
        ctx.mark_non_differentiable(mean, variance, total)
        return y, mean, variance, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, mean, variance, inverse, total = ctx.saved_tensors
        channels = x.shape[1]
        own_product, own_dy = _norm_sums(dy, x, weight, mean, variance, ctx.epsilon)
        sums = ctx.exchange.sum_(torch.cat([own_dy, own_product]))
        mean_dy, mean_product = sums[:channels] / total, sums[channels:] / total
        # dx = scale * (dy - mean(dy) - normalised x * mean(dy * normalised x)), in terms of x itself
        scale = weight * inverse
        slope = -scale * inverse * mean_product
        dx = torch.addcmul(_wide(-scale * mean_dy - mean * slope), x, _wide(slope))
        dx.addcmul_(dy, _wide(scale))
        return dx, own_product, own_dy, None, None


def _shared_moments(
    exchange: Exchange, first: Tensor, second: Tensor, count: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, variance, 1 / deviation and count over all executors, of this one's sums per channel and count."""
    sums = exchange.sum_(torch.cat([first, second, count]))
    total, channels = sums[-1], len(first)
    mean = sums[:channels] / total
    variance = (sums[channels:-1] / total - mean * mean).clamp_min(0)
    return mean, variance, torch.rsqrt(variance + epsilon), total


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return per channel this executor's sums of ``x`` and of its squares, in parts that stay in a core's cache."""
    axes = (0, 2, 3)
    parts = [(part.sum(axes), (part * part).sum(axes)) for part in x.split(_images_at_a_time(x))]
    first, second = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return first, second


def _norm_sums(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return per channel this executor's sums of dy * normalised x and of dy, in one pass over both.

    In parts, since the kernel adds a channel's numbers one by one.
    """
    if not len(x):
        return torch.zeros_like(mean), torch.zeros_like(mean)
    state = (mean, variance, mean, torch.rsqrt(variance + epsilon))
    images = _images_at_a_time(x)
    wanted = [False, True, True]
    backward = torch.ops.aten.native_batch_norm_backward
    pairs = zip(dy.split(images), x.split(images), strict=True)
    parts = [backward(*pair, weight, *state, False, epsilon, wanted)[1:] for pair in pairs]
    product, total = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return product, total


def _images_at_a_time(x: Tensor) -> int:
    """Return how many images' numbers a core's cache keeps; all of them on a GPU."""
    return max(1, len(x)) if x.is_cuda or not len(x) else max(1, CACHED_NUMBERS // x[0].numel())


def _wide(values: Tensor) -> Tensor:
    return values[None, :, None, None]

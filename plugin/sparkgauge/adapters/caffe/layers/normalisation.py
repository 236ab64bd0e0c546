"""Local response normalisation and batch normalisation by Caffe's formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkgauge.adapters.caffe.layers.base import Constant, Layer, Pass, Shape, Weight, channels_last, per_channel

aten: Any = torch.ops.aten
ACROSS_CHANNELS = 0


def negative_power(values: Tensor, exponent: float) -> Tensor:
    """Return values ** -exponent; two roots replace the slow pow for 0.75, the exponent everybody uses."""
    if exponent == 0.75:
        root = values.rsqrt()
        return root.sqrt().mul_(root)
    return values.pow(-exponent)


class LRN(Layer):
    """x (k + alpha / n sum x^2) ** -beta over n channels, or x (1 + alpha mean x^2) ** -beta over n x n pixels.

    Caffe takes no ``k`` within a channel, and counts the zeros beyond the border in the mean.
    """

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.lrn_param
        self.size, self.beta = p.local_size, p.beta
        self.across = p.norm_region == ACROSS_CHANNELS
        self.alpha = p.alpha / p.local_size if self.across else p.alpha
        self.k = p.k if self.across else 1.0
        if p.local_size % 2 == 0 or len(self.bottoms[0]) != 3:
            raise self.error("unsupported LRN", expected="odd local_size, 3-d input", actual=f"size {p.local_size}")
        self._band: Tensor | None = None
        return super().setup()

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the normalised values."""
        x = channels_last(bottoms[0])
        scale = self._window(x * x).mul_(self.alpha).add_(self.k)
        factor = negative_power(scale, self.beta)
        self.saved = (x, scale, factor) if run.training else None
        return [x * factor]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        if not needed:
            return []
        (x, scale, factor), self.saved = self.saved, None
        dy = channels_last(gradients[0])
        # d(scale) spreads over the same symmetric window that summed the squares.
        spread = self._window((dy * x).mul_(factor).div_(scale))
        return [(dy * factor).addcmul_(x, spread, value=-2 * self.alpha * self.beta)]

    def _window(self, values: Tensor) -> Tensor:
        """Return the sum over the channels of the window, or the mean over its pixels."""
        if not self.across:
            return torch.nn.functional.avg_pool2d(values, self.size, 1, self.size // 2, False, True)
        batch, channels, height, width = values.shape
        rows = values.permute(0, 2, 3, 1).reshape(-1, channels) @ self._banded(values)
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _banded(self, like: Tensor) -> Tensor:
        """Return the 0-1 matrix whose product sums each channel's window: much faster than a pool over channels."""
        if self._band is None or self._band.device != like.device:
            offsets = torch.arange(like.shape[1], device=like.device)
            self._band = ((offsets[:, None] - offsets[None, :]).abs() <= self.size // 2).to(like.dtype)
        return self._band


class BatchNorm(Layer):
    """(x - mean) / sqrt(var + eps) per channel; blobs: summed means, summed variances, their weight.

    Each training pass multiplies the sums by ``moving_average_fraction`` and adds the batch's mean and its unbiased
    variance; the TEST phase (or ``use_global_stats``) divides by the weight.
    """

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.batch_norm_param
        self.fraction, self.eps = p.moving_average_fraction, p.eps
        self.fixed: bool | None = p.use_global_stats if p.HasField("use_global_stats") else None
        channels = self.bottoms[0][0]
        self.weights = [Weight((size,), Constant(0.0), learned=False) for size in (channels, channels, 1)]
        return super().setup()

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the normalised values and, in training, move the averages."""
        x = channels_last(bottoms[0])
        if (not run.training) if self.fixed is None else self.fixed:
            return [self._by_averages(x)]
        # zeros: the kernel multiplies what is there by 1 - momentum, and 0 times a NaN is one
        mean, variance = torch.zeros_like(self.blobs[0]), torch.zeros_like(self.blobs[1])
        count = x.numel() // x.shape[1]
        if count < 2:
            raise self.error("needs more than one value per channel", actual=f"a batch of {tuple(x.shape)}")
        # momentum 1: the kernel stores this batch's mean and unbiased variance in the two buffers.
        top, center, inverse = aten.native_batch_norm(x, None, None, mean, variance, True, 1.0, self.eps)
        self.saved = x, center, inverse
        self._move(mean, variance)
        return [top]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        if not needed:
            return []
        saved, self.saved = self.saved, None
        dy = channels_last(gradients[0])
        if isinstance(saved, Tensor):
            return [dy * saved]
        x, center, inverse = saved
        mask = [True, False, False]
        return [aten.native_batch_norm_backward(dy, x, None, None, None, center, inverse, True, self.eps, mask)[0]]

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        for total, value in zip(self.blobs, (mean, variance, 1.0), strict=True):
            total.mul_(self.fraction).add_(value)

    def _by_averages(self, x: Tensor) -> Tensor:
        weight = self.blobs[2]
        share = torch.where(weight == 0, torch.zeros_like(weight), 1 / weight)
        mean, factor = self.blobs[0] * share, (self.blobs[1] * share + self.eps).rsqrt()
        self.saved = per_channel(factor, x)
        return (x - per_channel(mean, x)) * self.saved

"""Layers that treat every value, or every channel, alike: ReLU, Sigmoid, Dropout, Scale, Bias, Softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkgauge.adapters.caffe.layers.base import Constant, Layer, Pass, Shape, Weight, per_channel

aten: Any = torch.ops.aten


class ReLU(Layer):
    """max(x, 0) + negative_slope min(x, 0); its gradient at 0 is that of the negative side."""

    keeps_output = True
    overwrite = False
    """Set by the net where the input may be overwritten."""
    fused = False
    """Set by the net where the layer below has applied it already."""

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        self.slope = self.message.relu_param.negative_slope
        return super().setup()

    def takes_blocks(self, readers: list[Layer]) -> bool:
        """Return True without a slope."""
        return not self.slope

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the rectified values."""
        x = bottoms[0]
        if self.slope:
            self.saved = x
            return [torch.nn.functional.leaky_relu(x, self.slope)]
        self.saved = x if self.fused else torch.relu_(x) if self.overwrite else torch.relu(x)
        return [self.saved]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        if not needed:
            return []
        saved, self.saved = self.saved, None
        if self.slope:
            return [aten.leaky_relu_backward(gradients[0], saved, self.slope, False)]
        return [aten.threshold_backward(gradients[0], saved, 0)]


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    keeps_output = True

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the sigmoid."""
        self.saved = torch.sigmoid(bottoms[0])
        return [self.saved]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        return [aten.sigmoid_backward(gradients[0], self.saved)] if needed else []


class TanH(Layer):
    """Hyperbolic tangent."""

    keeps_output = True

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return tanh(x)."""
        return [torch.tanh(bottoms[0])]


class Flatten(Layer):
    """All values of an image as one vector, in (c, h, w) order."""

    keeps_output = True  # it may be the input itself

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        self.require(self.message.flatten_param, axis=1, end_axis=-1)
        return [(int(torch.Size(self.bottoms[0]).numel()),)]

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return the vectors."""
        return [bottoms[0].reshape(len(bottoms[0]), -1)]


class Dropout(Layer):
    """Zeroes a share of the values and scales the others up in training; nothing in the TEST phase."""

    keeps_output = True  # in the TEST phase it is the input itself

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        self.ratio = self.message.dropout_param.dropout_ratio
        if not 0 < self.ratio < 1:
            raise self.error("unsupported dropout_ratio", expected="between 0 and 1", actual=str(self.ratio))
        return super().setup()

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the values that stay, times 1 / (1 - ratio)."""
        if not run.training:
            return [bottoms[0]]
        kept = torch.empty_like(bottoms[0]).bernoulli_(1 - self.ratio, generator=run.generator)
        self.saved = kept.mul_(1 / (1 - self.ratio))
        return [bottoms[0] * self.saved]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        return [gradients[0] * self.saved] if needed else []


class Scale(Layer):
    """One factor per channel, and one term if ``bias_term``."""

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.scale_param
        self.require(p, axis=1, num_axes=1)
        channels = self.bottoms[0][0]
        self.weights = [Weight((channels,), p.filler if p.HasField("filler") else Constant(1.0))]
        if p.bias_term:
            self.weights.append(Weight((channels,), p.bias_filler))
        return super().setup()

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return factor x + term."""
        factor, *term = (per_channel(w, bottoms[0]) for w in weights or self.blobs)
        return [torch.addcmul(term[0], bottoms[0], factor) if term else bottoms[0] * factor]


class Bias(Layer):
    """One term per channel."""

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.bias_param
        self.require(p, axis=1, num_axes=1)
        self.weights = [Weight((self.bottoms[0][0],), p.filler)]
        return super().setup()

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return x + term."""
        return [bottoms[0] + per_channel((weights or self.blobs)[0], bottoms[0])]


class Softmax(Layer):
    """Softmax over the channels."""

    keeps_output = True

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        self.require(self.message.softmax_param, axis=1)
        return super().setup()

    def compute(self, bottoms: list[Tensor], run: Pass, *weights: Tensor) -> list[Tensor]:
        """Return the probabilities."""
        return [torch.softmax(bottoms[0], 1)]

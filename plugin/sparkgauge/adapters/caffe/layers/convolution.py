"""Convolution and InnerProduct: what costs the time of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkgauge.adapters import fused
from sparkgauge.adapters.caffe.layers.base import Layer, Pass, Shape, Weight, channels_last

aten: Any = torch.ops.aten


class Convolution(Layer):
    """2-d convolution with groups, stride, padding and dilation; output sizes are rounded down, as Caffe's are."""

    makes_blocks = True
    fused_relu = False
    """Set by the net when an in-place ReLU follows, which then runs in the convolution's own loop (CPU only)."""

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.convolution_param
        self.require(p, axis=1, force_nd_im2col=False)
        if len(self.bottoms[0]) != 3:
            raise self.error("unsupported input", expected="(channels, height, width)", actual=str(self.bottoms[0]))
        channels, *sides = self.bottoms[0]
        self.kernel = self._pair(p, "kernel", p.kernel_size, None)
        self.stride = self._pair(p, "stride", p.stride, 1)
        self.padding = self._pair(p, "pad", p.pad, 0)
        self.dilation = self._spread(list(p.dilation), "dilation", 1)
        self.groups = p.group
        if min(*self.stride, *self.dilation, self.groups) < 1:
            actual = f"stride {self.stride}, dilation {self.dilation}, group {self.groups}"
            raise self.error("the geometry does not fit", expected="numbers from 1", actual=actual)
        simple = self.groups == 1 and self.stride == self.dilation == (1, 1)
        self._is_plain = simple and self.padding[0] == self.padding[1]
        if not p.num_output or p.num_output % self.groups or channels % self.groups:
            actual = f"{channels} channels, num_output {p.num_output}, group {self.groups}"
            raise self.error("channels do not divide into groups", actual=actual)
        self.weights = [Weight((p.num_output, channels // self.groups, *self.kernel), p.weight_filler)]
        if p.bias_term:
            self.weights.append(Weight((p.num_output,), p.bias_filler))
        return [(p.num_output, *(self._side(side, axis) for axis, side in enumerate(sides)))]

    def _pair(self, p: Any, name: str, repeated: Any, default: int | None) -> tuple[int, int]:
        """Return (height, width) of a field that is given once, twice, or as ``name_h`` and ``name_w``."""
        if p.HasField(f"{name}_h") or p.HasField(f"{name}_w"):
            if len(repeated):
                raise self.error(f"{name} is given twice", expected=f"either {name} or {name}_h and {name}_w")
            return getattr(p, f"{name}_h"), getattr(p, f"{name}_w")
        return self._spread(list(repeated), name, default)

    def _spread(self, values: list[int], name: str, default: int | None) -> tuple[int, int]:
        values = values or ([] if default is None else [default])
        if len(values) not in (1, 2):
            raise self.error(f"unsupported {name}", expected="one or two values", actual=str(values))
        return values[0], values[-1]

    def _side(self, side: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        size = (side + 2 * self.padding[axis] - reach) // self.stride[axis] + 1
        if size < 1 or self.kernel[axis] < 1:
            raise self.error("the kernel does not fit", actual=f"input {self.bottoms[0]}, kernel {self.kernel}")
        return size

    def takes_blocks(self, readers: list[Layer]) -> bool:
        """Return True without groups."""
        return bool(self.groups == 1)

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the convolution plus bias."""
        x = channels_last(bottoms[0])
        self.saved = x if run.training else None
        weight, bias = self.blobs[0], self.blobs[1] if len(self.blobs) > 1 else None
        if self._is_plain and bias is not None and fused.fits_convolution(x, weight):
            return [fused.convolution_forward(x, weight, bias, self.padding[0])]
        if self.fused_relu:
            both = torch.ops.mkldnn._convolution_pointwise
            return [both(x, weight, bias, self.padding, self.stride, self.dilation, self.groups, "relu", [], "")]
        return [torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input, if needed, and add those of weights and bias."""
        x, self.saved = self.saved, None
        wants = [*self.wants, False][:2]
        bias_shape = list(self.blobs[1].shape) if len(self.blobs) > 1 else None
        geometry = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        found = aten.convolution_backward(
            channels_last(gradients[0]), x, self.blobs[0], bias_shape, *geometry, [needed, *wants]
        )
        for target, gradient in zip(self.gradients, found[1:], strict=False):
            if gradient is not None:
                target.add_(gradient)
        return [found[0]] if needed else []


class InnerProduct(Layer):
    """Dense layer over the whole blob in (c, h, w) order, whatever its layout in memory."""

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.inner_product_param
        self.require(p, axis=1)
        self.transposed = p.transpose
        count = int(torch.Size(self.bottoms[0]).numel())
        if not p.num_output:
            raise self.error("num_output is missing")
        shape = (count, p.num_output) if self.transposed else (p.num_output, count)
        self.weights = [Weight(shape, p.weight_filler)]
        if p.bias_term:
            self.weights.append(Weight((p.num_output,), p.bias_filler))
        return [(p.num_output,)]

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return x W' + b (x W + b when transposed)."""
        x = bottoms[0].reshape(bottoms[0].shape[0], -1)
        self.saved = (x, bottoms[0].dim()) if run.training else None
        weight = self.blobs[0] if self.transposed else self.blobs[0].t()
        return [torch.addmm(self.blobs[1], x, weight) if len(self.blobs) > 1 else x @ weight]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input, if needed, and add those of weights and bias."""
        (x, dimensions), self.saved = self.saved, None
        dy = gradients[0]
        if self.wants[0]:
            self.gradients[0].addmm_(*((x.t(), dy) if self.transposed else (dy.t(), x)))
        if len(self.wants) > 1 and self.wants[1]:
            self.gradients[1].add_(dy.sum(0))
        if not needed:
            return []
        dx = dy @ (self.blobs[0].t() if self.transposed else self.blobs[0])
        return [channels_last(dx.view(-1, *self.bottoms[0])) if dimensions == 4 else dx]

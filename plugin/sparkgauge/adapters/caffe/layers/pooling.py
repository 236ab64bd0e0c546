"""Pooling with Caffe's window rules: sizes rounded up, averages over the window clipped to the padded input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparkgauge.adapters import fused
from sparkgauge.adapters.caffe.layers.base import Layer, Pass, Shape, channels_last

aten: Any = torch.ops.aten
MAXIMUM, AVERAGE = 0, 1
ROUND_DOWN = 1


def pooled_side(side: int, kernel: int, stride: int, pad: int, *, round_up: bool = True) -> int:
    """Return the output size along one side; with padding, a last window that starts beyond the input is dropped."""
    steps = (side + 2 * pad - kernel) / stride
    size = (math.ceil(steps) if round_up else math.floor(steps)) + 1
    return size - 1 if pad and (size - 1) * stride >= side + pad else size


class Pooling(Layer):
    """MAX or AVE pool; of equal values the first in reading order takes the gradient."""

    keeps_blocks = True  # autograd has its gradient

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.pooling_param
        if p.pool not in (MAXIMUM, AVERAGE):
            raise self.error("unsupported pool", expected="MAX or AVE", actual=str(p.pool))
        self.average = p.pool == AVERAGE
        self.round_up = getattr(p, "round_mode", 0) != ROUND_DOWN
        channels, *sides = self._sides()
        self.kernel = (sides[0], sides[1]) if p.global_pooling else self._pair(p, "kernel", "kernel_size")
        self.stride, self.padding = self._pair(p, "stride", "stride"), self._pair(p, "pad", "pad")
        self._is_plain = self.padding == (0, 0) and len({*self.kernel}) == len({*self.stride}) == 1
        return [(channels, *(self._side(side, axis) for axis, side in enumerate(sides)))]

    def _sides(self) -> Shape:
        if len(self.bottoms[0]) != 3:
            raise self.error("unsupported input", expected="(channels, height, width)", actual=str(self.bottoms[0]))
        return self.bottoms[0]

    def _pair(self, p: Any, name: str, both: str) -> tuple[int, int]:
        if p.HasField(f"{name}_h") or p.HasField(f"{name}_w"):
            return getattr(p, f"{name}_h"), getattr(p, f"{name}_w")
        return getattr(p, both), getattr(p, both)

    def _side(self, side: int, axis: int) -> int:
        kernel, stride, pad = self.kernel[axis], self.stride[axis], self.padding[axis]
        if not kernel or kernel > side + 2 * pad or 2 * pad > kernel or not stride:
            actual = f"side {side}, kernel {kernel}, stride {stride}, pad {pad}"
            raise self.error("the window does not fit", expected="kernel in 2 pad ... side + 2 pad", actual=actual)
        size = pooled_side(side, kernel, stride, pad, round_up=self.round_up)
        if (size - 1) * stride >= side + pad:
            raise self.error("the last window starts outside the input", actual=f"side {side}, stride {stride}")
        return size

    def takes_blocks(self, readers: list[Layer]) -> bool:
        """Return whether all gradients come in blocks, too: in any other order oneDNN's pools are slow."""
        return self.padding == (0, 0) and bool(readers) and all(reader.blocked for reader in readers)

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the pooled values."""
        if self.blocked:
            return self._pool_blocks(bottoms[0], run)
        x = channels_last(bottoms[0])
        self._is_fused = self._is_plain and fused.fits(x)
        if self.average:
            self.saved = x.shape, x
            return [torch.nn.functional.avg_pool2d(x, self.kernel, self.stride, self.padding, self.round_up, True)]
        if self._is_fused:
            geometry = self.kernel[0], self.stride[0]
            top, places = fused.max_pool_forward(x, *geometry, round_up=self.round_up)
            self.saved = x, places
            return [top]
        top, places = aten.max_pool2d_with_indices(x, self.kernel, self.stride, self.padding, (1, 1), self.round_up)
        self.saved = x, places
        return [top]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return the gradient of the input."""
        if not needed:
            return []
        saved, self.saved = self.saved, None
        if self.blocked:
            return list(torch.autograd.grad(saved[1], saved[0], gradients))
        dy = channels_last(gradients[0])
        if self._is_fused:
            return [self._fused_backward(dy, *saved)]
        if self.average:
            geometry = (self.kernel, self.stride, self.padding, self.round_up, True, None)
            return [aten.avg_pool2d_backward(dy, saved[1], *geometry)]
        x, places = saved
        windows = (self.kernel, self.stride, self.padding, (1, 1), self.round_up)
        return [aten.max_pool2d_with_indices_backward(dy, x, *windows, places)]

    def _fused_backward(self, dy: Tensor, x: Any, places: Tensor) -> Tensor:
        if self.average:
            return fused.average_pool_backward(dy, x, self.kernel[0], self.stride[0])
        return fused.max_pool_backward(dy, places, x.shape, self.kernel[0], self.stride[0])

    def _pool_blocks(self, x: Tensor, run: Pass) -> list[Tensor]:
        """Return the pooled values of a blocked tensor, without padding; autograd has its gradient only."""
        windows = (self.kernel, self.stride, 0)
        with torch.set_grad_enabled(run.training):
            leaf = x.detach().requires_grad_(run.training)
            if self.average:
                top = torch.nn.functional.avg_pool2d(leaf, *windows, self.round_up, count_include_pad=False)
            else:
                top = torch.nn.functional.max_pool2d(leaf, *windows, ceil_mode=self.round_up)
        self.saved = leaf, top
        return [top.detach()]

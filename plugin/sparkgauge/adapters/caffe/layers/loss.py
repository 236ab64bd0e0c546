"""Where labels come in: SoftmaxWithLoss and Accuracy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkgauge.adapters.caffe.layers.base import Layer, Pass, Shape

aten: Any = torch.ops.aten
FULL, VALID, BATCH_SIZE, NONE = 0, 1, 2, 3
LOWEST_LOG = math.log(np.finfo(np.float32).tiny)
"""Caffe takes the log of no probability below FLT_MIN."""


class SoftmaxWithLoss(Layer):
    """Mean of -log p(label) over the global batch; of no label equal to ``ignore_label``."""

    inputs = 2
    outputs = (1, 2)
    loss_weight = 1.0

    def setup(self) -> list[Shape]:
        """Return the tops' shapes: the loss, and the probabilities if the net names them."""
        p = self.message.loss_param
        self.require(self.message.softmax_param, axis=1)
        if len(self.bottoms[0]) != 1:
            raise self.error("unsupported input", expected="one vector per image", actual=str(self.bottoms[0]))
        self.ignored = p.ignore_label if p.HasField("ignore_label") else None
        self.normalization = p.normalization
        if p.HasField("normalize") and not p.HasField("normalization"):
            self.normalization = VALID if p.normalize else BATCH_SIZE
        self.loss_weight = self.message.loss_weight[0] if len(self.message.loss_weight) else 1.0
        return [(), self.bottoms[0]][: len(self.message.top)]

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return this executor's part of the loss."""
        scores, labels = bottoms
        logs = torch.log_softmax(scores, 1)
        picked = logs.gather(1, labels[:, None]) if self.ignored is None else self._picked(logs, labels)
        divisor = self._divisor(labels, run)
        loss = picked.clamp_(min=LOWEST_LOG).sum().neg_().div_(divisor)
        self.saved = (logs, labels, divisor) if run.training else None
        return [loss, logs.exp()][: len(self.tops)]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return (p - one-hot label) / divisor, times the loss weight that comes as the loss's gradient."""
        if not needed:
            return []
        (logs, labels, divisor), self.saved = self.saved, None
        difference = logs.exp_()
        if self.ignored is None:
            difference.scatter_add_(1, labels[:, None], difference.new_full((len(labels), 1), -1.0))
        else:
            kept = labels != self.ignored
            difference[kept, labels[kept]] -= 1
            difference *= kept[:, None]
        return [difference.mul_(self.loss_weight / divisor)]

    def _picked(self, logs: Tensor, labels: Tensor) -> Tensor:
        kept = labels != self.ignored
        return logs[kept].gather(1, labels[kept][:, None])

    def _divisor(self, labels: Tensor, run: Pass) -> float:
        if self.normalization == NONE:
            return 1.0
        if self.normalization != VALID or self.ignored is None:
            return run.loss_images
        if not run.whole_batch:
            raise self.error("ignore_label with VALID normalization needs the whole batch on one executor")
        return max(1.0, float((labels != self.ignored).sum()))


class Accuracy(Layer):
    """Share of images with fewer than ``top_k`` other classes at or above the label's: a tie is a wrong answer."""

    inputs = 2

    def setup(self) -> list[Shape]:
        """Return the top's shape."""
        p = self.message.accuracy_param
        self.require(p, axis=1)
        self.top_k, self.ignored = p.top_k, p.ignore_label if p.HasField("ignore_label") else None
        if len(self.bottoms[0]) != 1 or not 0 < self.top_k <= self.bottoms[0][0]:
            raise self.error("top_k does not fit", actual=f"top_k {self.top_k}, scores {self.bottoms[0]}")
        self.correct = self.counted = torch.zeros(())
        return [()]

    def forward(self, bottoms: list[Tensor], run: Pass) -> list[Tensor]:
        """Return the share; the exact counts stay in ``correct`` and ``counted``."""
        scores, labels = bottoms
        kept = torch.ones_like(labels, dtype=torch.bool) if self.ignored is None else labels != self.ignored
        own = scores.gather(1, torch.where(kept, labels, 0)[:, None])
        right = ((scores >= own).sum(1) <= self.top_k) & kept
        self.correct, self.counted = right.sum(), kept.sum()
        return [self.correct / self.counted.clamp(min=1)]

    def backward(self, gradients: list[Tensor], needed: bool, run: Pass) -> list[Tensor]:
        """Return nothing: a count has no gradient."""
        return []

"""Caffe's layers on PyTorch; a new one is a subclass of ``Layer`` and a line in ``LAYERS``."""

from __future__ import annotations

from sparkgauge.adapters.caffe.layers.base import Layer, Pass, Shape, Weight
from sparkgauge.adapters.caffe.layers.convolution import Convolution, InnerProduct
from sparkgauge.adapters.caffe.layers.elementwise import (
    Bias,
    Dropout,
    Flatten,
    ReLU,
    Scale,
    Sigmoid,
    Softmax,
    TanH,
)
from sparkgauge.adapters.caffe.layers.loss import Accuracy, SoftmaxWithLoss
from sparkgauge.adapters.caffe.layers.normalisation import LRN, BatchNorm
from sparkgauge.adapters.caffe.layers.pooling import Pooling

__all__ = ["DATA_LAYERS", "LAYERS", "Layer", "Pass", "Shape", "Weight"]

DATA_LAYERS = frozenset({"Data", "MemoryData", "Input"})
"""Layers whose tops the engine feeds."""
LAYERS: dict[str, type[Layer]] = {
    kind.__name__: kind
    for kind in (
        Accuracy,
        BatchNorm,
        Bias,
        Convolution,
        Dropout,
        Flatten,
        InnerProduct,
        LRN,
        Pooling,
        ReLU,
        Scale,
        Sigmoid,
        Softmax,
        SoftmaxWithLoss,
        TanH,
    )
}

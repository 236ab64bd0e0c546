"""What every Caffe engine offers: steps, tests, weights and states of one net on one executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from sparkgauge.caffe.net import data_layer
from sparkgauge.errors import ConfigurationError, DataError, TrainingError

Images = NDArray[Any]
"""Raw pixels, uint8 or float32, logical shape (b, c, h, w); an NHWC array transposed is the cheapest."""
Labels = NDArray[Any]
"""Integer class of each image, shape (b,)."""
Arrays = dict[str, list[NDArray[Any]]]
"""Layer name -> float32 arrays in Caffe's shapes and order."""
Reduce = Callable[[Any], None]
"""Sums one flat float32 buffer over all executors, in place, and returns when it is done."""


def check_mean_values(net: Any, channels: int, where: Callable[[str], str]) -> None:
    """Raise ConfigurationError where a data layer's mean_value is given neither once nor for every channel."""
    layer = data_layer(net)
    count = len(layer.transform_param.mean_value) if layer is not None else 0
    if count not in (0, 1, channels):
        expected, actual = f"1 or {channels}", str(count)
        raise ConfigurationError("mean_value does not fit", expected=expected, actual=actual, where=where(layer.name))


def check_labels(labels: Any, classes: int, where: str) -> None:
    """Raise DataError for labels (array or tensor) that a net of so many classes has no output for; 0: any will do."""
    if len(labels) and classes and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        actual = f"{int(labels.min())} to {int(labels.max())}"
        hint = "Give the layer below the loss as many outputs as there are classes, or correct the labels."
        expected = f"0 to {classes - 1}"
        raise DataError("labels do not fit the net", expected=expected, actual=actual, where=where, hint=hint)


def finite(loss: float, iteration: int) -> float:
    """Return ``loss``; TrainingError where it is not finite."""
    if not math.isfinite(loss):
        hint = "Lower base_lr, or check the images' scale and the mean."
        where = f"iteration {iteration}"
        raise TrainingError("the loss is not finite", expected="a number", actual=str(loss), where=where, hint=hint)
    return loss


@dataclass(frozen=True)
class TestCount:
    """What one executor's share of the test set gave."""

    __test__ = False  # pytest would take it for a test class
    correct: int
    """Images whose label is among the ``top_k`` answers of the net's first Accuracy layer."""
    tested: int
    """Images tested."""
    loss_sum: float
    """Mean loss times ``tested``; 0.0 when the TEST net has no loss layer."""


@dataclass(frozen=True)
class Blobs:
    """Every intermediate result of one forward and backward pass, under the names that pycaffe gives them."""

    data: dict[str, NDArray[Any]]
    """Outputs; for in-place layers what the last of them wrote."""
    diff: dict[str, NDArray[Any]]
    """Gradients; for in-place layers the gradient at the input of the first of them."""
    parameters: Arrays
    """Gradients of the weights by layer name."""


class Engine(Protocol):
    """One net with its solver on one executor; both engines give the same numbers within float32 error."""

    iteration: int
    """Updates done so far: Caffe's ``iter_``."""

    def parameters(self) -> Arrays:
        """Return copies of all weights."""
        ...

    def set_parameters(self, values: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Overwrite the weights of the named layers."""
        ...

    def step(
        self,
        images: Images,
        labels: Labels,
        *,
        global_batch: int,
        reduce: Reduce | None = None,
        parts: Sequence[int] | None = None,
    ) -> float:
        """Update once and return this executor's part of the loss; the parts add up to the global batch's mean.

        ``parts`` are the images of each pass, whose gradients are added in this order; ``iter_size`` even ones by
        default.
        """
        ...

    def test(self, images: Images, labels: Labels) -> TestCount:
        """Return the exact count of right answers of the TEST net on any number of images."""
        ...

    def blobs(self, images: Images, labels: Labels, *, phase: str = "TRAIN") -> Blobs:
        """Return every output and gradient of one pass; neither weights nor history change."""
        ...

    def load_weights(self, path: Path) -> None:
        """Copy the weights of a ``.caffemodel`` by layer name."""
        ...

    def save_weights(self, path: Path) -> None:
        """Write a ``.caffemodel``."""
        ...

    def load_state(self, path: Path) -> None:
        """Take iteration and history from a ``.solverstate``; the caller loads the weights it names."""
        ...

    def save_state(self, path: Path, learned_net: str) -> None:
        """Write a ``.solverstate`` that names ``learned_net`` as its weights."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...

"""Initial weights as Caffe's fillers draw them, from NumPy's generator: equal on every executor and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkgauge.errors import ConfigurationError

Array = NDArray[np.float32]
Filler = Callable[[Any, tuple[int, ...], np.random.Generator], NDArray[Any]]


def fill(filler: Any, shape: tuple[int, ...], generator: np.random.Generator, where: str) -> Array:
    """Return float32 values of ``shape`` as ``filler`` (FillerParameter) draws them; ConfigurationError if unknown."""
    draw = FILLERS.get(filler.type)
    if draw is None:
        raise ConfigurationError(
            "unsupported filler", expected=" or ".join(sorted(FILLERS)), actual=repr(filler.type), where=where
        )
    return np.ascontiguousarray(draw(filler, shape, generator), dtype=np.float32)


def _constant(filler: Any, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    return np.full(shape, filler.value)


def _uniform(filler: Any, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    return generator.uniform(filler.min, filler.max, shape)


def _gaussian(filler: Any, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    """With ``sparse: n``, a weight stays with probability n / outputs, so that an input feeds n outputs on average."""
    values = generator.normal(filler.mean, filler.std, shape)
    if filler.sparse >= 0:
        values *= generator.random(shape) < filler.sparse / shape[0]
    return values


def _xavier(filler: Any, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    limit = np.sqrt(3 / _fan(filler, shape))
    return generator.uniform(-limit, limit, shape)


def _msra(filler: Any, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    return generator.normal(0, np.sqrt(2 / _fan(filler, shape)), shape)


def _fan(filler: Any, shape: tuple[int, ...]) -> float:
    """Return Caffe's n: weights per output (FAN_IN, 0), per input (FAN_OUT, 1) or their mean (AVERAGE, 2)."""
    count = int(np.prod(shape))
    fan_in, fan_out = count / shape[0], count / shape[1]
    return (fan_in, fan_out, (fan_in + fan_out) / 2)[filler.variance_norm]


FILLERS: dict[str, Filler] = {
    "constant": _constant,
    "uniform": _uniform,
    "gaussian": _gaussian,
    "xavier": _xavier,
    "msra": _msra,
}

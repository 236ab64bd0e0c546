"""Caffe's binary files: weights (``.caffemodel``), solver states (``.solverstate``), mean images (``.binaryproto``)."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from sparkgauge.caffe import schema
from sparkgauge.errors import DataError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class State:
    """What a solver needs to go on where it stopped, beside the weights."""

    iteration: int
    """Updates done."""
    current_step: int
    """Times that a stepped learning rate was lowered."""
    learned_net: str
    """The file of the weights; empty where the state does not say."""
    history: list[Array] = field(default_factory=list)
    """The solver's accumulators, in Caffe's order: one per weight blob, or two or three such rows after another."""


def read_weights(path: Path | str) -> dict[str, list[Array]]:
    """Return the weight blobs by layer name, in Caffe's shapes; DataError where the file is damaged or too old."""
    message = _read(path, schema.NetParameter, "a .caffemodel")
    if message.layers:
        raise DataError(
            "Weights in the old format", expected="layer", actual="V1 layers", where=str(path),
            hint="Convert the file with Caffe's upgrade_net_proto_binary.",
        )  # fmt: skip
    if not message.layer:
        raise DataError("No layers", expected="a .caffemodel", where=str(path))
    found: dict[str, list[Array]] = {}
    for layer in message.layer:
        if not layer.blobs:
            continue
        if layer.name in found:
            raise DataError(f"Two layers called {layer.name!r} have weights", where=str(path))
        found[layer.name] = [
            _array(blob, f"{path}, layer {layer.name!r}, blob {index}") for index, blob in enumerate(layer.blobs)
        ]
    return found


def write_weights(
    path: Path | str,
    net_name: str,
    weights: Mapping[str, Sequence[NDArray[Any]]],
    *,
    types: Mapping[str, str] | None = None,
) -> None:
    """Write the blobs by layer name as a ``.caffemodel``, whole or not at all; ``types`` gives the layers' types."""
    message = schema.NetParameter(name=net_name)
    for name, blobs in weights.items():
        layer = message.layer.add(name=name, type=(types or {}).get(name, ""))
        for blob in blobs:
            _fill(layer.blobs.add(), blob)
    _write(path, message)


def check_fits(
    found: Mapping[str, Sequence[Array]], wanted: Mapping[str, Sequence[Sequence[int]]], where: str
) -> dict[str, list[Array]]:
    """Return the blobs of ``found`` in the ``wanted`` shapes by layer name; DataError names what is missing or differs.

    A layer that only the file has is left out, as Caffe does with nets that were cut.
    """
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        expected, actual = f"blobs of {', '.join(wanted)}", f"none of {', '.join(missing)}"
        raise DataError("Weights are missing", expected=expected, actual=actual, where=where)
    fitted: dict[str, list[Array]] = {}
    for name, shapes in wanted.items():
        place = f"{where}, layer {name!r}"
        if len(found[name]) != len(shapes):
            raise DataError(
                "Wrong number of blobs", expected=str(len(shapes)), actual=str(len(found[name])), where=place
            )
        pairs = enumerate(zip(found[name], shapes, strict=True))
        fitted[name] = [_fit(blob, tuple(shape), f"{place}, blob {index}") for index, (blob, shape) in pairs]
    return fitted


def read_state(path: Path | str) -> State:
    """Return the content of a ``.solverstate``; DataError where it is damaged."""
    message = _read(path, schema.SolverState, "a .solverstate")
    if not message.HasField("iter"):
        raise DataError("No iteration", expected="a .solverstate", where=str(path))
    history = [_array(blob, f"{path}, history {index}") for index, blob in enumerate(message.history)]
    return State(message.iter, message.current_step, message.learned_net, history)


def write_state(path: Path | str, state: State) -> None:
    """Write a ``.solverstate``, whole or not at all."""
    message = schema.SolverState(iter=state.iteration, current_step=state.current_step, learned_net=state.learned_net)
    for blob in state.history:
        _fill(message.history.add(), blob)
    _write(path, message)


def read_mean(path: Path | str, shape: Sequence[int] | None = None) -> Array:
    """Return the mean image (c, h, w) of a ``mean.binaryproto``; DataError where it is damaged or not ``shape``."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError("Unreadable mean image", actual=error.strerror, where=str(path)) from None
    mean = decode_mean(content, str(path))
    wanted = tuple(shape) if shape is not None else None
    if mean.ndim != 3 or (wanted is not None and mean.shape != wanted):
        expected = "x".join(map(str, wanted)) if wanted else "one image (channels, height, width)"
        raise DataError("Mean image of another shape", expected=expected, actual=_shown(mean.shape), where=str(path))
    return mean


def decode_mean(content: bytes, where: str) -> Array:
    """Return the mean image (c, h, w) that the bytes of a ``mean.binaryproto`` hold; DataError names ``where``."""
    mean = _array(_decoded(content, schema.BlobProto, "a mean image", where), where)
    while mean.ndim > 3 and mean.shape[0] == 1:
        mean = mean[0]
    return mean


def write_mean(path: Path | str, mean: NDArray[Any]) -> None:
    """Write a mean image (c, h, w) as Caffe's compute_image_mean does, whole or not at all."""
    message = schema.BlobProto(num=1, channels=mean.shape[0], height=mean.shape[1], width=mean.shape[2])
    message.data.extend(np.ascontiguousarray(mean, np.float32).ravel().tolist())
    _write(path, message)


def _fit(blob: Array, shape: tuple[int, ...], where: str) -> Array:
    """Return ``blob`` in ``shape``, from which it may differ by leading ones: the old format always has four axes."""
    own = blob.shape
    while len(own) > len(shape) and own[0] == 1:
        own = own[1:]
    if own != shape:
        raise DataError("Weights of another shape", expected=_shown(shape), actual=_shown(blob.shape), where=where)
    return blob.reshape(shape)


def _array(blob: Any, where: str) -> Array:
    """Return the data of a BlobProto as float32."""
    legacy = any(blob.HasField(name) for name in ("num", "channels", "height", "width"))
    shape = (blob.num, blob.channels, blob.height, blob.width) if legacy else tuple(blob.shape.dim)
    data = blob.double_data or blob.data
    if min(shape, default=0) < 0 or math.prod(shape) != len(data):
        expected, actual = f"{math.prod(shape)} numbers for shape {_shown(shape)}", str(len(data))
        raise DataError("A blob's size and shape disagree", expected=expected, actual=actual, where=where)
    # asarray over a repeated field goes through its buffer-like iterator; float32 keeps Caffe's own precision
    array = np.fromiter(data, np.float32, len(data)).reshape(shape)
    if not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise DataError("Numbers that are not finite", expected="finite", actual=f"{count} of them", where=where)
    return array


def _fill(blob: Any, array: NDArray[Any]) -> None:
    blob.shape.dim.extend(array.shape)
    blob.data.extend(np.ascontiguousarray(array, np.float32).ravel().tolist())


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _read(path: Path | str, kind: Any, what: str) -> Any:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Unreadable {what[2:]}", actual=error.strerror, where=str(path)) from None
    return _decoded(content, kind, what, str(path))


def _decoded(content: bytes, kind: Any, what: str, where: str) -> Any:
    message = kind()
    try:
        message.ParseFromString(content)
    except DecodeError:
        actual = f"{len(content)} bytes that do not decode"
        raise DataError("Truncated or damaged file", expected=what, actual=actual, where=where) from None
    if not content:
        raise DataError("Empty file", expected=what, actual="0 bytes", where=where)
    return message


def _write(path: Path | str, message: Any) -> None:
    """Write the message beside its place and move it there: a reader never sees half a file."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.write_bytes(message.SerializeToString())
        os.replace(draft, target)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise DataError("Cannot write", actual=error.strerror, where=str(path)) from None

"""Nets: read from prototxt, checked, and reduced to one phase by Caffe's include and exclude rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge.caffe import schema, text
from sparkgauge.errors import ConfigurationError

DATA_TYPES = frozenset({"Data", "MemoryData", "Input"})
"""Layers that bring images and labels into the net."""

_BOTTOMS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(DATA_TYPES, (0, 0)),
    **dict.fromkeys(("SoftmaxWithLoss", "Accuracy"), (2, 2)),
    **dict.fromkeys(("Scale", "Bias"), (1, 2)),
}
"""Least and most bottoms by type; one elsewhere."""

_TOPS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("Data", "MemoryData"), (1, 2)),
    "Input": (1, 2),
    "SoftmaxWithLoss": (0, 2),
    "Accuracy": (1, 1),
}
"""Least and most tops by type; one elsewhere. A loss without a top gets an automatic one in Caffe."""

_IN_PLACE = frozenset({"ReLU", "Sigmoid", "TanH", "Dropout", "BatchNorm", "Scale", "Bias", "Softmax"})
"""Types whose top may be their bottom."""

_REFUSED_TRANSFORMS = ("mirror", "crop_size", "force_color", "force_gray")
"""Random distortions would need Caffe's own random numbers; decoding needs encoded images."""


@dataclass(frozen=True)
class Net:
    """A net file with all its phases."""

    message: Any
    """``NetParameter``, as in the file."""
    source: text.Prototxt
    prefix: tuple[str | int, ...] = ()
    """Where in the source the net begins: ``("net_param", 0)`` for one inside a solver file."""

    @property
    def file(self) -> str:
        """Return the file's name."""
        return self.source.file

    def where(self, layer: str | int, *place: str | int) -> str:
        """Return ``file:line (layer 'conv1')`` of a layer, given by name or number, or of a ``place`` inside it."""
        names = [one.name for one in self.message.layer]
        number = layer if isinstance(layer, int) else names.index(layer) if layer in names else -1
        line = self.source.where(*self.prefix, "layer", number, *place)
        return f"{line} (layer {names[number] if isinstance(layer, int) else layer!r})"


def read_net(path: Path | str) -> Net:
    """Return the checked net of the file; ConfigurationError names file, line and what is wrong."""
    return checked(Net(*_parsed(path, schema.NetParameter)))


def parse_net(source: str, *, file: str = "<text>") -> Net:
    """Return the checked net that the text ``source`` describes."""
    parsed = text.parse(source, file=file)
    return checked(Net(parsed.message, parsed))


def read_text(path: Path | str) -> str:
    """Return the text of a prototxt file; ConfigurationError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ConfigurationError("Unreadable prototxt", actual=reason, where=str(path)) from None


def _parsed(path: Path | str, kind: Any) -> tuple[Any, text.Prototxt]:
    parsed = text.parse(read_text(path), kind, file=str(path))
    return parsed.message, parsed


def checked(net: Net) -> Net:
    """Return ``net`` if both its phases can be trained or tested as they are written; ConfigurationError otherwise."""
    if not net.message.layer:
        raise ConfigurationError("A net without layers", expected="layer { ... }", where=net.file)
    for number, layer in enumerate(net.message.layer):
        _check_layer(net, number, layer)
    for phase in ("TRAIN", "TEST"):
        check_connections(net, layer_numbers(net.message, _state(net.message, phase, (), None)))
    return net


def for_phase(net: Net | Any, phase: str, *, stages: Sequence[str] = (), level: int | None = None) -> Any:
    """Return a ``NetParameter`` of the layers that belong to ``phase`` ("TRAIN" or "TEST"), ``stages`` and ``level``.

    Rules as in ``Net::FilterNet`` of BVLC Caffe; the net's own ``state`` adds its stages and, where ``level`` is None,
    gives the level.
    """
    message = net.message if isinstance(net, Net) else net
    state = _state(message, phase, stages, level)
    found = schema.NetParameter(name=message.name, state=state)
    for number in layer_numbers(message, state):
        layer = found.layer.add()
        layer.CopyFrom(message.layer[number])
        layer.ClearField("include")
        layer.ClearField("exclude")
        layer.phase = state.phase
    return found


def data_layer(phase_net: Any) -> Any:
    """Return the layer that brings in images and labels, None where the net has none."""
    return next((layer for layer in phase_net.layer if layer.type in DATA_TYPES), None)


def batch_size(phase_net: Any) -> int:
    """Return the images of a batch, 0 where no data layer says it."""
    layer = data_layer(phase_net)
    if layer is None:
        return 0
    if layer.type == "Input":
        dims = layer.input_param.shape[0].dim if layer.input_param.shape else ()
        return int(dims[0]) if dims else 0
    part = layer.data_param if layer.type == "Data" else layer.memory_data_param
    return int(part.batch_size)


def with_batch(phase_net: Any, size: int) -> Any:
    """Return a copy of the net whose data layer brings ``size`` images at a time."""
    copy = schema.NetParameter()
    copy.CopyFrom(phase_net)
    layer = data_layer(copy)
    if layer is None:
        raise ConfigurationError("A net without a data layer has no batch", where=f"net {phase_net.name!r}")
    if layer.type == "Input":
        for shape in layer.input_param.shape:
            shape.dim[0] = size
    else:
        (layer.data_param if layer.type == "Data" else layer.memory_data_param).batch_size = size
    return copy


def check_connections(net: Net, numbers: Iterable[int]) -> None:
    """Return when, of the layers ``numbers`` in order, every bottom is an earlier top and no top comes twice."""
    tops: dict[str, int] = {}
    names: dict[str, int] = {}
    for number in numbers:
        layer = net.message.layer[number]
        if layer.name in names:
            raise ConfigurationError(
                f"Two layers of one phase are called {layer.name!r}",
                expected="names that differ: weights are kept by name",
                actual=f"another at {net.where(names[layer.name])}",
                where=net.where(number),
            )
        names[layer.name] = number
        _check_bottoms(net, number, layer, tops)
        for index, top in enumerate(layer.top):
            _check_top(net, number, index, tops)
            tops[top] = number


def _check_bottoms(net: Net, number: int, layer: Any, tops: dict[str, int]) -> None:
    for index, bottom in enumerate(layer.bottom):
        if bottom not in tops:
            raise ConfigurationError(
                f"Unknown bottom {bottom!r}{text.suggestion(bottom, tops)}",
                expected=f"a top of an earlier layer of the same phase ({', '.join(tops) or 'there is none'})",
                where=net.where(number, "bottom", index),
            )


def _check_top(net: Net, number: int, index: int, tops: dict[str, int]) -> None:
    layer = net.message.layer[number]
    top = layer.top[index]
    in_place = index == 0 and layer.type in _IN_PLACE and top in layer.bottom
    if top in tops and not in_place:
        raise ConfigurationError(
            f"Top {top!r} comes from two layers",
            expected=f"names that differ, or a layer that works in place ({', '.join(sorted(_IN_PLACE))})",
            actual=f"also from {net.where(tops[top])}",
            where=net.where(number, "top", index),
        )


def _check_layer(net: Net, number: int, layer: Any) -> None:
    if layer.type not in schema.LAYER_TYPES:
        raise ConfigurationError(
            f"Unknown or unsupported layer type {layer.type!r}{text.suggestion(layer.type, schema.LAYER_TYPES)}",
            expected=f"one of {', '.join(sorted(schema.LAYER_TYPES))}",
            where=net.where(number, "type", 0),
            hint="docs/caffe.md says how a layer is added.",
        )
    if not layer.name:
        raise ConfigurationError("A layer without a name", expected="name: ...", where=net.where(number))
    _check_count(net, number, "bottom", len(layer.bottom), _BOTTOMS.get(layer.type, (1, 1)))
    _check_count(net, number, "top", len(layer.top), _TOPS.get(layer.type, (1, 1)))
    _check_parts(net, number, layer)
    _check_rules(net, number, layer)
    _check_data(net, number, layer)
    _check_numbers(net, number, layer, ())


def _check_count(net: Net, number: int, what: str, count: int, allowed: tuple[int, int]) -> None:
    least, most = allowed
    if not least <= count <= most:
        expected = f"{least} {what}s" if least == most else f"{least} to {most} {what}s"
        raise ConfigurationError(
            f"Wrong number of {what}s of {net.message.layer[number].type}",
            expected=expected,
            actual=str(count),
            where=net.where(number),
        )


def _check_parts(net: Net, number: int, layer: Any) -> None:
    """Refuse parameters of another type of layer, which Caffe passes over in silence."""
    for field, _ in layer.ListFields():
        if field.name.endswith("_param") and field.name not in schema.LAYER_PARAMETERS[layer.type]:
            raise ConfigurationError(
                f"{field.name} has no effect in a layer of type {layer.type}",
                expected=" or ".join(schema.LAYER_PARAMETERS[layer.type]),
                where=net.where(number, field.name, 0),
            )


def _check_rules(net: Net, number: int, layer: Any) -> None:
    if layer.include and layer.exclude:
        raise ConfigurationError("A layer with include and exclude rules", expected="one kind", where=net.where(number))


def _check_data(net: Net, number: int, layer: Any) -> None:
    if layer.type not in DATA_TYPES:
        return
    for name in _REFUSED_TRANSFORMS:
        if getattr(layer.transform_param, name):
            where = net.where(number, "transform_param", 0, name, 0)
            expected = "mean_file, mean_value and scale at most"
            raise ConfigurationError(f"Unsupported transformation {name!r}", expected=expected, where=where)
    if layer.transform_param.HasField("mean_file") and layer.transform_param.mean_value:
        where = net.where(number, "transform_param", 0, "mean_value", 0)
        raise ConfigurationError("Two means", expected="mean_file or mean_value", actual="both", where=where)
    if layer.type == "Data":
        _check_source(net, number, layer)
    if layer.type != "Input" and batch_size(schema.NetParameter(layer=[layer])) < 1:
        raise ConfigurationError("No batch_size", expected="at least 1 image", where=net.where(number))


def _check_source(net: Net, number: int, layer: Any) -> None:
    part = layer.data_param
    if not part.source:
        raise ConfigurationError("A Data layer without a source", expected="source: ...", where=net.where(number))
    own = part.source.startswith("sparkgauge:")
    if not own and schema.enum_name(part, "backend") != "LMDB":
        raise ConfigurationError(
            "Unsupported database", expected="backend: LMDB", actual="LEVELDB (Caffe's default)",
            where=net.where(number, "data_param", 0, "backend", 0),
        )  # fmt: skip


def _check_numbers(net: Net, number: int, message: Any, place: tuple[str | int, ...]) -> None:
    """Refuse floats that are not finite."""
    for field, value in message.ListFields():
        for index, one in enumerate(_each(value)):
            if field.message_type is not None and field.name != "blobs":
                _check_numbers(net, number, one, (*place, field.name, index))
            elif isinstance(one, float) and not math.isfinite(one):
                where = net.where(number, *place, field.name, index)
                raise ConfigurationError(f"Bad {field.name}", expected="a finite number", actual=str(one), where=where)


def _each(value: Any) -> Iterator[Any]:
    """Yield the elements of a repeated field, or the one value of another."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        yield value
    else:
        yield from value


def _state(message: Any, phase: str, stages: Sequence[str], level: int | None) -> Any:
    if phase not in ("TRAIN", "TEST"):
        raise ConfigurationError("Unknown phase", expected="TRAIN or TEST", actual=repr(phase))
    return schema.NetState(
        phase=schema.TRAIN if phase == "TRAIN" else schema.TEST,
        level=message.state.level if level is None else level,
        stage=[*message.state.stage, *stages],
    )


def layer_numbers(message: Any, state: Any) -> list[int]:
    """Return the numbers of the layers that belong to ``state``."""
    return [number for number, layer in enumerate(message.layer) if _belongs(layer, state)]


def _belongs(layer: Any, state: Any) -> bool:
    if layer.include:
        return any(_meets(rule, state) for rule in layer.include)
    return not any(_meets(rule, state) for rule in layer.exclude)


def _meets(rule: Any, state: Any) -> bool:
    return bool(
        (not rule.HasField("phase") or rule.phase == state.phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and set(rule.stage) <= set(state.stage)
        and not set(rule.not_stage) & set(state.stage)
    )

"""A Caffe net of one phase as a list of operations on tensors, its weights in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparkgauge.adapters.caffe.engine import Arrays
from sparkgauge.adapters.caffe.fillers import fill
from sparkgauge.adapters.caffe.layers import DATA_LAYERS, LAYERS, Layer, Pass, Shape
from sparkgauge.adapters.caffe.layers.convolution import Convolution
from sparkgauge.adapters.caffe.layers.elementwise import ReLU
from sparkgauge.adapters.caffe.layers.loss import SoftmaxWithLoss
from sparkgauge.adapters.layout import blocked, dense
from sparkgauge.errors import ConfigurationError, DataError

Where = Callable[[str], str]
"""Layer name -> the file and line for an error message."""
Record = Callable[[int, Tensor], None]
"""Takes a slot's number and the value just written there."""


@dataclass(frozen=True)
class Operation:
    """One layer with the slots it reads and writes; an in-place layer writes a slot of its own."""

    layer: Layer
    bottoms: tuple[int, ...]
    tops: tuple[int, ...]
    needed: bool
    """Whether something below learns, so that the gradient must go on."""
    released: tuple[int, ...] = ()
    """Slots that no later operation reads: their memory is free after the forward pass came here."""


class Parameters:
    """All weights of the TRAIN net: flat buffers of values and gradients, and views of them in Caffe's shapes.

    4-d weights lie in (out, h, w, in) order, so that no convolution has to reorder them; arrays that go in and come
    out are in Caffe's (out, in, h, w).
    """

    def __init__(self, net: Net, seed: int, device: str) -> None:
        self.layers = [op.layer for op in net.operations if op.layer.weights]
        shapes = [weight.shape for layer in self.layers for weight in layer.weights]
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
        self.count = int(ends[-1])
        self.shapes = shapes
        self.spans = [slice(int(a), int(b)) for a, b in pairwise(ends)]
        self.values = torch.zeros(self.count, device=device)
        self.gradients = torch.zeros(self.count, device=device)
        self.rate_factors, self.decay_factors = (torch.ones(self.count, device=device) for _ in range(2))
        self._bind(seed)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat buffer, one per weight, in Caffe's shapes."""
        return [_view(flat[span], shape) for span, shape in zip(self.spans, self.shapes, strict=True)]

    def by_layer(self, flat: Tensor) -> Arrays:
        """Return copies of a flat buffer's parts by layer name."""
        copies = iter([_copy(view) for view in self.views(flat)])
        return {layer.name: [next(copies) for _ in layer.weights] for layer in self.layers}

    def set(self, found: Mapping[str, Sequence[NDArray[Any]]], where: str) -> None:
        """Overwrite the named layers' weights; names that the net lacks are left out, as Caffe does."""
        targets = {layer.name: layer for layer in self.layers}
        for name, arrays in found.items():
            if name in targets:
                fill_views(targets[name].blobs, arrays, f"{where}, layer {name!r}")

    def _bind(self, seed: int) -> None:
        """Give every layer its views, rates and first values."""
        values, gradients = iter(self.views(self.values)), iter(self.views(self.gradients))
        spans = iter(self.spans)
        for number, layer in enumerate(self.layers):
            specs = _specs(layer)
            for index, (weight, spec) in enumerate(zip(layer.weights, specs, strict=True)):
                view, span = next(values), next(spans)
                generator = np.random.default_rng([seed, number, index])
                view.copy_(torch.from_numpy(fill(weight.filler, weight.shape, generator, layer.where)))
                layer.blobs.append(view)
                layer.gradients.append(next(gradients))
                self.rate_factors[span], self.decay_factors[span] = spec
                layer.wants.append(spec[0] != 0)


class Net:
    """The operations of one phase; ``forward`` and ``backward`` run them."""

    def __init__(self, message: Any, input_shape: Shape, where: Where) -> None:
        self.message, self._where = message, where
        self.names: list[str] = []
        """Name of every slot's blob."""
        self._shapes: list[Shape] = []
        self._current: dict[str, int] = {}
        self.operations: list[Operation] = []
        self._learns: set[int] = set()
        self._inputs = 0
        for layer in message.layer:
            if layer.type in DATA_LAYERS:
                self._feed(layer, input_shape)
            else:
                self._add(layer)
        if not self._inputs:
            raise ConfigurationError("the net has no data layer", expected=" or ".join(sorted(DATA_LAYERS)))
        self.operations = list(_with_releases(self.operations))
        self.losses = [op for op in self.operations if isinstance(op.layer, SoftmaxWithLoss)]

    def classes(self) -> tuple[int, str]:
        """Return how many classes the labels can name and the layer that says so; the fewest of several, 0 of none."""
        sizes = [(op.layer.bottoms[0][0], op.layer.name) for op in self.operations if op.layer.inputs == 2]
        return min(sizes, default=(0, ""))

    def share(self, other: Net) -> None:
        """Take the weights of the equally named layers of ``other``; a layer with weights that it lacks is an error."""
        found = {op.layer.name: op.layer for op in other.operations}
        for layer in (op.layer for op in self.operations if op.layer.weights):
            shapes = [w.shape for w in layer.weights]
            theirs = [w.shape for w in found[layer.name].weights] if layer.name in found else None
            if theirs != shapes:
                raise layer.error("differs between the phases", expected=f"TRAIN {theirs}", actual=f"TEST {shapes}")
            layer.blobs, layer.wants = found[layer.name].blobs, [False] * len(shapes)

    def fuse(self, *, convolutions: bool) -> None:
        """Let in-place ReLUs write over their input, or run inside the convolution below where ``convolutions``."""
        producers = self._producers()
        for op in self.operations:
            below = producers.get(op.bottoms[0])
            in_place = self.names[op.bottoms[0]] == self.names[op.tops[0]]
            if not isinstance(op.layer, ReLU) or below is None or not in_place or op.layer.slope:
                continue
            if convolutions and isinstance(below, Convolution):
                below.fused_relu = op.layer.fused = True
            else:
                op.layer.overwrite = not (below.keeps_output or (below.blocked and below.keeps_blocks))

    def block(self) -> None:
        """Keep images in oneDNN's blocked order from convolution to convolution, through the layers between."""
        readers: dict[int, list[Layer]] = {}
        for op in reversed(self.operations):
            op.layer.blocked = op.layer.takes_blocks(readers.get(op.tops[0], []))
            for slot in op.bottoms:
                readers.setdefault(slot, []).append(op.layer)
        producers = self._producers()
        for op in self.operations:
            if not op.layer.makes_blocks:
                below = producers.get(op.bottoms[0])
                op.layer.blocked = op.layer.blocked and below is not None and below.blocked

    def _producers(self) -> dict[int, Layer]:
        return {slot: op.layer for op in self.operations for slot in op.tops}

    def forward(self, images: Tensor, labels: Tensor, run: Pass, record: Record | None = None) -> Tensor:
        """Return the weighted loss of ``images`` (b, c, h, w) and ``labels`` (b,), a scalar; 0 without a loss layer."""
        slots: list[Any] = [images, labels, *[None] * (len(self.names) - 2)]
        loss: Tensor = images.new_zeros(())
        for op in self.operations:
            tops = op.layer.forward([_laid_out(slots[slot], op.layer) for slot in op.bottoms], run)
            for slot, top in zip(op.tops, tops, strict=True):
                slots[slot] = top
                if record is not None:
                    record(slot, top)
            if isinstance(op.layer, SoftmaxWithLoss) and op.layer.loss_weight:
                loss = loss + op.layer.loss_weight * tops[0]
            for slot in op.released:
                slots[slot] = None
        return loss

    def backward(self, run: Pass, record: Record | None = None) -> None:
        """Add the weights' gradients of the last training pass to their buffers."""
        found: list[Any] = [None] * len(self.names)
        for op in reversed(self.operations):
            tops = [None if found[slot] is None else _laid_out(found[slot], op.layer) for slot in op.tops]
            is_loss = isinstance(op.layer, SoftmaxWithLoss) and op.layer.loss_weight
            if not is_loss and (tops[0] is None or not (op.needed or any(op.layer.wants))):
                continue
            for slot, gradient in zip(op.bottoms, op.layer.backward(tops, op.needed, run), strict=False):
                found[slot] = gradient if found[slot] is None else dense(found[slot]) + dense(gradient)
                if record is not None:
                    record(slot, found[slot])
            for slot in op.tops:
                found[slot] = None

    def _feed(self, layer: Any, input_shape: Shape) -> None:
        """Take the tops of a data layer: the first blob of the net is the images, the second their labels."""
        for name in layer.top:
            if self._inputs == 2:
                raise self._error(layer.name, "too many inputs", expected="images and labels", actual=name)
            self._slot(name, input_shape if self._inputs == 0 else ())
            self._inputs += 1

    def _add(self, message: Any) -> None:
        kind = LAYERS.get(message.type)
        where = self._where(message.name)
        if kind is None:
            raise self._error(
                message.name, "unsupported layer", expected=", ".join(sorted(LAYERS)), actual=message.type
            )
        if len(message.bottom) != kind.inputs or len(message.top) not in kind.outputs:
            actual = f"{len(message.bottom)} bottoms, {len(message.top)} tops"
            raise self._error(message.name, "wrong number of blobs", expected=f"{kind.inputs} bottoms", actual=actual)
        if any(message.loss_weight) and kind is not SoftmaxWithLoss:
            raise self._error(message.name, "unsupported loss_weight", expected="one on SoftmaxWithLoss only")
        bottoms = tuple(self._bottom(message.name, name) for name in message.bottom)
        layer = kind(message, [self._shapes[slot] for slot in bottoms], where)
        needed = bottoms[0] in self._learns
        tops = tuple(self._slot(name, shape) for name, shape in zip(message.top, layer.tops, strict=True))
        if needed or any(rate for rate, _ in _specs(layer)):
            self._learns.update(tops)
        self.operations.append(Operation(layer, bottoms, tops, needed))

    def _bottom(self, layer: str, name: str) -> int:
        if name not in self._current:
            raise self._error(layer, "unknown bottom", expected=" or ".join(self._current), actual=name)
        return self._current[name]

    def _slot(self, name: str, shape: Shape) -> int:
        self.names.append(name)
        self._shapes.append(shape)
        self._current[name] = len(self.names) - 1
        return self._current[name]

    def _error(self, layer: str, what: str, *, expected: str, actual: str | None = None) -> ConfigurationError:
        return ConfigurationError(
            f"layer {layer!r}: {what}", expected=expected, actual=actual, where=self._where(layer)
        )


@dataclass
class Recorder:
    """Keeps copies of what a net's slots were given, by blob name; the last write stays."""

    names: list[str]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __call__(self, slot: int, value: Tensor) -> None:
        """Copy ``value``."""
        self.arrays[self.names[slot]] = _copy(value)


def fill_views(views: Sequence[Tensor], arrays: Sequence[NDArray[Any]], where: str) -> None:
    """Copy arrays into tensors of the same shapes; leading axes of length 1, as old files have, do not count."""
    if len(views) != len(arrays):
        raise DataError("wrong number of blobs", expected=str(len(views)), actual=str(len(arrays)), where=where)
    for index, (view, array) in enumerate(zip(views, arrays, strict=True)):
        if _significant(array.shape) != _significant(tuple(view.shape)):
            parts = {"expected": str(tuple(view.shape)), "actual": str(array.shape)}
            raise DataError(f"blob {index} has another shape", where=where, **parts)
        view.copy_(torch.from_numpy(np.array(array, np.float32).reshape(tuple(view.shape))))


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((axis for axis, side in enumerate(shape) if side != 1), len(shape))
    return shape[first:]


def _specs(layer: Layer) -> list[tuple[float, float]]:
    """Return (lr_mult, decay_mult) of each weight; Caffe's default is 1, and never learns BatchNorm's statistics."""
    given = list(layer.message.param)
    if len(given) > len(layer.weights):
        raise layer.error("too many param", expected=str(len(layer.weights)), actual=str(len(given)))
    if shared := [spec.name for spec in given if spec.name]:
        raise layer.error("sharing weights by name is not supported", actual=shared[0])
    pairs = [(float(spec.lr_mult), float(spec.decay_mult)) for spec in given]
    pairs += [(1.0, 1.0)] * (len(layer.weights) - len(pairs))
    return [(pair[0] if w.learned else 0.0, pair[1]) for w, pair in zip(layer.weights, pairs, strict=True)]


def _with_releases(operations: list[Operation]) -> list[Operation]:
    last = {slot: index for index, op in enumerate(operations) for slot in (*op.tops, *op.bottoms)}
    released: list[list[int]] = [[] for _ in operations]
    for slot, index in last.items():
        released[index].append(slot)
    return [
        Operation(op.layer, op.bottoms, op.tops, op.needed, tuple(slots))
        for op, slots in zip(operations, released, strict=True)
    ]


def _view(flat: Tensor, shape: Shape) -> Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    out, within, height, width = shape
    return flat.view(out, height, width, within).permute(0, 3, 1, 2)


def _laid_out(value: Tensor, layer: Layer) -> Tensor:
    return blocked(value) if layer.blocked else dense(value)


def _copy(value: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = np.array(dense(value).detach().cpu().numpy(), dtype=np.float32, order="C")
    return array

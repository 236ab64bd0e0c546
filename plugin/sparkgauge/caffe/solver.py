"""Solvers: read from prototxt with their nets, and their learning rates as pure functions of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge.caffe import schema, text
from sparkgauge.caffe.net import (
    DATA_TYPES,
    Net,
    batch_size,
    check_connections,
    checked,
    data_layer,
    for_phase,
    layer_numbers,
    read_net,
    read_text,
)
from sparkgauge.errors import ConfigurationError

LR_NEEDS: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "step": ("gamma", "stepsize"),
    "exp": ("gamma",),
    "inv": ("gamma", "power"),
    "multistep": ("gamma", "stepvalue"),
    "poly": ("power", "max_iter"),
    "sigmoid": ("gamma", "stepsize"),
}
"""The fields that each lr_policy reads besides base_lr; Caffe takes a missing one for 0."""

_FOREIGN: dict[str, tuple[str, ...]] = {
    "momentum": ("SGD", "Nesterov", "AdaDelta", "Adam"),
    "momentum2": ("Adam",),
    "rms_decay": ("RMSProp",),
    "delta": ("AdaGrad", "RMSProp", "AdaDelta", "Adam"),
}
"""The solvers that read a field; elsewhere it has no effect, or Caffe refuses it."""

REGULARISATIONS = ("L2", "L1")


@dataclass(frozen=True)
class Solver:
    """A solver file with its net."""

    message: Any
    """``SolverParameter``; ``type`` is always set."""
    source: text.Prototxt
    net: Net
    """The training net with all its phases."""
    test: Net
    """The net that is tested: the same, unless ``test_net`` names another."""

    @property
    def file(self) -> str:
        """Return the file's name."""
        return self.source.file

    @property
    def batch(self) -> int:
        """Return the images of one update as the file says: the train batch times ``iter_size``."""
        return batch_size(self.train_net()) * int(self.message.iter_size)

    def train_net(self) -> Any:
        """Return the ``NetParameter`` of the TRAIN phase."""
        return _phase_net(self.net, "TRAIN", self.message.train_state)

    def test_net(self) -> Any:
        """Return the ``NetParameter`` of the TEST phase."""
        states = self.message.test_state
        return _phase_net(self.test, "TEST", states[0] if states else schema.NetState())

    def where_data(self, phase: str) -> str:
        """Return where the data layer of ``phase`` stands."""
        net, message = (self.net, self.train_net()) if phase == "TRAIN" else (self.test, self.test_net())
        state = message.state
        numbers = layer_numbers(net.message, state)
        return net.where(next(number for number in numbers if net.message.layer[number].type in DATA_TYPES))


def read_solver(path: Path | str) -> Solver:
    """Return the checked solver of the file and its net.

    The net's path may be relative to the solver's folder or to any folder above it: Caffe's own files are written to be
    used from the root of its source tree. ConfigurationError names file, line and what is wrong.
    """
    source = text.parse(read_text(path), schema.SolverParameter, file=str(path))
    message = source.message
    if not message.HasField("type"):
        message.type = "SGD"
    _check_solver(source)
    train, tested = _nets(source, Path(path))
    solver = Solver(message, source, train, tested)
    _check_nets(solver)
    return solver


def learning_rate(message: Any, iteration: int) -> float:
    """Return the rate of the update number ``iteration`` (from 0), as ``SGDSolver::GetLearningRate`` of BVLC Caffe."""
    return _POLICIES[message.lr_policy or "fixed"](message, iteration)


def current_step(message: Any, iteration: int) -> int:
    """Return how many times the rate was lowered before update ``iteration``: ``current_step_`` of a solver state."""
    if message.lr_policy == "step":
        return int(iteration // message.stepsize)
    if message.lr_policy == "multistep":
        # Caffe moves on by one step an iteration at most: two equal values take two iterations
        step = 0
        for now in sorted(set(range(min(iteration + 1, 1))) | set(_visits(message, iteration))):
            if step < len(message.stepvalue) and now >= message.stepvalue[step]:
                step += 1
        return step
    return 0


def _visits(message: Any, iteration: int) -> set[int]:
    """Return the iterations up to ``iteration`` at which the current step may change."""
    near = {value + offset for value in message.stepvalue for offset in range(len(message.stepvalue))}
    return {one for one in near if one <= iteration}


def _fixed(message: Any, iteration: int) -> float:
    return float(message.base_lr)


def _stepped(message: Any, iteration: int) -> float:
    return float(message.base_lr * message.gamma ** current_step(message, iteration))


def _exp(message: Any, iteration: int) -> float:
    return float(message.base_lr * message.gamma**iteration)


def _inv(message: Any, iteration: int) -> float:
    return float(message.base_lr * (1 + message.gamma * iteration) ** -message.power)


def _poly(message: Any, iteration: int) -> float:
    return float(message.base_lr * (1 - iteration / message.max_iter) ** message.power)


def _sigmoid(message: Any, iteration: int) -> float:
    exponent = -message.gamma * (iteration - message.stepsize)
    # exp overflows beyond 709; the rate is 0 to the last digit well before
    return 0.0 if exponent > 700 else float(message.base_lr / (1 + math.exp(exponent)))


_POLICIES: dict[str, Callable[[Any, int], float]] = {
    "fixed": _fixed,
    "step": _stepped,
    "exp": _exp,
    "inv": _inv,
    "multistep": _stepped,
    "poly": _poly,
    "sigmoid": _sigmoid,
}


def _phase_net(net: Net, phase: str, state: Any) -> Any:
    return for_phase(net, phase, stages=list(state.stage), level=state.level if state.HasField("level") else None)


def _nets(source: text.Prototxt, path: Path) -> tuple[Net, Net]:
    """Return the net that is trained and the one that is tested."""
    message = source.message
    given = [name for name in ("net", "net_param", "train_net") if message.HasField(name)]
    if len(given) != 1:
        actual = " and ".join(given) or "none"
        raise ConfigurationError("A solver needs one train net", expected="net:", actual=actual, where=source.file)
    if len(message.test_net) > 1 or len(message.test_state) > 1 or len(message.test_iter) > 1:
        raise ConfigurationError("Several test nets", expected="one", where=source.file)
    if given == ["net_param"]:
        train = checked(Net(message.net_param, source, ("net_param", 0)))
    else:
        train = read_net(_found(source, given[0], path))
    return train, read_net(_found(source, "test_net", path)) if message.test_net else train


def _found(source: text.Prototxt, field: str, path: Path) -> Path:
    value = getattr(source.message, field)
    return find_file(value if isinstance(value, str) else value[0], path, where=source.where(field, 0))


def find_file(name: str, solver_file: Path, *, where: str) -> Path:
    """Return the file or folder ``name`` as seen from the solver's folder or one above it; ConfigurationError if none.

    ``where`` is the place that names it.
    """
    folder = solver_file.resolve().parent
    for base in (folder, *folder.parents):
        if (base / name).exists():
            return base / name
    raise ConfigurationError(
        "File not found", expected=f"{name} in {folder} or a folder above it", actual="no such file", where=where
    )


def _check_solver(source: text.Prototxt) -> None:
    message = source.message
    _one_of(source, "type", schema.SOLVER_TYPES)
    _one_of(source, "regularization_type", REGULARISATIONS)
    _one_of(source, "lr_policy", tuple(LR_NEEDS))
    _check_numbers(source)
    for name in ("base_lr", "max_iter", *LR_NEEDS[message.lr_policy]):
        value = getattr(message, name)
        if not (len(value) if name == "stepvalue" else message.HasField(name)):
            needed_by = f" for lr_policy {message.lr_policy!r}" if name not in ("base_lr", "max_iter") else ""
            raise ConfigurationError(f"No {name}", expected=f"{name}:{needed_by}", where=source.file)
    for name, at_least in (("max_iter", 1), ("iter_size", 1), ("stepsize", 1), ("base_lr", 0), ("weight_decay", 0)):
        if message.HasField(name) and getattr(message, name) < at_least:
            _bad(source, name, f"at least {at_least}")
    if list(message.stepvalue) != sorted(message.stepvalue):
        raise ConfigurationError(
            "Bad stepvalue", expected="ascending iterations", actual=str(list(message.stepvalue)),
            where=source.where("stepvalue", 0),
        )  # fmt: skip
    for name, solvers in _FOREIGN.items():
        zero_momentum = name == "momentum" and message.momentum == 0
        if message.HasField(name) and message.type not in solvers and not zero_momentum:
            _bad(source, name, f"{name} with {', '.join(solvers)} only, type is {message.type}")


def _check_numbers(source: text.Prototxt) -> None:
    for field, value in source.message.ListFields():
        if isinstance(value, float) and not math.isfinite(value):
            _bad(source, field.name, "a finite number")


def _bad(source: text.Prototxt, name: str, expected: str) -> None:
    value = getattr(source.message, name)
    raise ConfigurationError(f"Bad {name}", expected=expected, actual=f"{value:g}", where=source.where(name, 0))


def _one_of(source: text.Prototxt, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(source.message, name)
    if value not in allowed:
        raise ConfigurationError(
            f"Unknown or unsupported {'solver ' if name == 'type' else ''}{name} {value!r}"
            f"{text.suggestion(value, allowed)}",
            expected=f"one of {', '.join(allowed)}",
            where=source.where(name, 0),
        )


def _check_nets(solver: Solver) -> None:
    """Check what training needs of the nets in their actual states: data with labels, a loss, an accuracy."""
    for net, phase, message in ((solver.net, "TRAIN", solver.train_net()), (solver.test, "TEST", solver.test_net())):
        names = [layer.name for layer in message.layer]
        check_connections(net, layer_numbers(net.message, message.state))
        data = data_layer(message)
        if data is None or len(data.top) != 2:
            actual = "no data layer" if data is None else f"{data.name!r} with {len(data.top)} top"
            expected = "a data layer with two tops, images and labels"
            raise ConfigurationError(f"The {phase} net has no images", expected=expected, actual=actual, where=net.file)
        wanted = "SoftmaxWithLoss" if phase == "TRAIN" else "Accuracy"
        if not any(layer.type == wanted for layer in message.layer):
            actual = f"layers {', '.join(names)}"
            expected = f"a layer of type {wanted}"
            raise ConfigurationError(
                f"The {phase} net has no {wanted}", expected=expected, actual=actual, where=net.file
            )

"""What a training of a Caffe net needs on every executor: texts and bytes instead of paths, so that it can travel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge.caffe import lmdb_data, schema, text, weights
from sparkgauge.caffe.net import Net, data_layer
from sparkgauge.caffe.solver import Solver, find_file, read_solver
from sparkgauge.caffe.sources import SESSION
from sparkgauge.errors import ConfigurationError, DataError

ENGINES = ("torch", "caffe")
"""The usual one first."""
SUPERSEDED = (
    *("test_iter", "test_initialization", "display", "average_loss", "solver_mode", "device_id", "random_seed"),
    *("snapshot", "snapshot_prefix", "snapshot_format", "snapshot_after_train"),
)
"""Fields of a solver that have no effect here: tests cover the whole test set, and the other things are keywords."""


@dataclass(frozen=True)
class Plan:
    """One solver with its nets and the engine that runs them."""

    engine: str
    model: str
    """Name of the shipped model, or of the user's solver file."""
    name: str
    """The solver's file, for messages."""
    solver: str
    """``SolverParameter`` as prototxt, without its nets."""
    train_net: str
    """``NetParameter`` of the TRAIN phase as prototxt."""
    test_net: str
    lines: Mapping[str, str]
    """Where each layer stands, by its name: ``file:line (layer 'conv1')``."""
    batch: int
    """Images of one update as the files say: the train batch times ``iter_size``."""
    max_iter: int
    test_interval: int | None
    lmdb: lmdb_data.Pair | None = None
    """The databases to train and test on; None for the session's data set."""
    mean: bytes | None = None
    """Content of the nets' ``mean_file``; None where there is none, or where it is the session's mean."""
    mean_name: str = ""
    """What the nets call it."""
    weights: bytes | None = None
    """A ``.caffemodel`` to start from."""
    state: bytes | None = None
    """A ``.solverstate`` to go on from."""
    first_iteration: int = 0
    """Updates that were done before, by ``state``."""
    start_name: str = ""
    """The file of ``weights``, for messages."""
    state_name: str = ""
    """The file of ``state``, for messages."""
    passes: int = 1
    """Passes in which a global batch is computed, over all executors; their gradients are added."""
    superseded: tuple[str, ...] = ()
    """Those of :data:`SUPERSEDED` that a user's file sets."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigurationError("Unknown engine", expected=" or ".join(ENGINES), actual=repr(self.engine))
        if self.passes > 1 and self.solver_message().iter_size > 1:
            raise ConfigurationError(
                "Two numbers of passes", expected="iter_size in the solver or passes=", actual="both"
            )

    @property
    def digest(self) -> str:
        """Return 12 hexadecimal digits that differ where the training would: the nets, the solver, where it starts."""
        found = hashlib.sha256()
        parts = (self.solver, self.train_net, self.test_net, self.mean, self.weights, self.state)
        for part in parts:
            content = part.encode() if isinstance(part, str) else part or b""
            found.update(f"{len(content)}:".encode() + content)
        if self.passes > 1:
            found.update(f"passes {self.passes}".encode())
        return found.hexdigest()[:12]

    @property
    def uses_session_mean(self) -> bool:
        """Return whether the nets subtract the mean of the session's training images."""
        return self.mean_name == SESSION

    @property
    def remaining(self) -> int:
        """Return the updates up to ``max_iter``."""
        return self.max_iter - self.first_iteration

    def solver_message(self) -> Any:
        """Return the ``SolverParameter``."""
        return text.parse(self.solver, schema.SolverParameter, file=self.name).message

    def net_messages(self) -> tuple[Any, Any]:
        """Return the ``NetParameter`` of the TRAIN and of the TEST phase."""
        train, test = (text.parse(one, schema.NetParameter, file=self.name) for one in (self.train_net, self.test_net))
        return train.message, test.message

    def where(self, layer: str) -> str:
        """Return where a layer stands in the user's files."""
        return self.lines.get(layer, f"{self.name}, layer {layer!r}")


def check_mean(plan: Plan, shape: tuple[int, int, int]) -> None:
    """Raise DataError where the nets' mean image is not of the images' shape (c, h, w)."""
    if plan.mean is None:
        return
    actual = weights.decode_mean(plan.mean, plan.mean_name).shape
    if actual != shape:
        expected, found = ("x".join(map(str, one)) for one in (shape, actual))
        layer = data_layer(plan.net_messages()[0])
        where = f"{plan.mean_name}, the mean_file of {plan.where(layer.name)}"
        raise DataError("Mean image of another shape", expected=expected, actual=found, where=where)


def read_plan(
    path: Path,
    *,
    engine: str = ENGINES[0],
    folders: Sequence[Path] = (),
    weights_file: Path | None = None,
    state_file: Path | None = None,
    model: str | None = None,
    passes: int = 1,
) -> Plan:
    """Return the plan of a solver file; a database or mean is looked for near its file, then below ``folders``.

    ConfigurationError or DataError names file, line and what is wrong, before anything is started.
    """
    solver = read_solver(path)
    train, test = solver.train_net(), solver.test_net()
    state = None if state_file is None else weights.read_state(state_file)
    learned = None if state is None or state_file is None else _learned(state.learned_net, state_file, weights_file)
    start = weights_file or learned
    if start is not None:
        weights.read_weights(start)  # a damaged file is an error of this call, not of every executor
    return Plan(
        engine=engine,
        model=model or path.stem,
        name=str(path),
        solver=text.print_message(_without_nets(solver.message)),
        train_net=text.print_message(train),
        test_net=text.print_message(test),
        lines=_lines(solver),
        batch=solver.batch,
        max_iter=int(solver.message.max_iter),
        test_interval=int(solver.message.test_interval) or None,
        lmdb=_databases(solver, train, test, folders),
        mean=_mean(solver, train, test, folders),
        mean_name=data_layer(train).transform_param.mean_file,
        weights=None if start is None else start.read_bytes(),
        state=None if state_file is None else state_file.read_bytes(),
        start_name="" if start is None else str(start),
        state_name="" if state_file is None else str(state_file),
        first_iteration=0 if state is None else state.iteration,
        passes=passes,
        superseded=tuple(name for name in SUPERSEDED if model is None and _is_set(solver.message, name)),
    )


def _is_set(message: Any, name: str) -> bool:
    return any(field.name == name for field, _ in message.ListFields())


def _without_nets(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    for name in ("net", "net_param", "train_net", "test_net", "train_state", "test_state", *SUPERSEDED):
        copy.ClearField(name)
    return copy


def _lines(solver: Solver) -> dict[str, str]:
    nets: tuple[Net, ...] = (solver.test, solver.net)
    return {layer.name: net.where(number) for net in nets for number, layer in enumerate(net.message.layer)}


def _learned(name: str, state_file: Path, weights_file: Path | None) -> Path | None:
    """Return the weights that a state names, beside it or where it says; those that are given win."""
    if weights_file is not None:
        return None
    beside = state_file.with_name(Path(name).name)
    if not name or not (beside.is_file() or Path(name).is_file()):
        raise ConfigurationError(
            "The weights of a solver state are missing",
            expected=str(beside) if name else "a state that names its weights",
            actual="no such file" if name else "none named",
            where=str(state_file),
            hint="Give them with weights=.",
        )
    return beside if beside.is_file() else Path(name)


def _databases(solver: Solver, train: Any, test: Any, folders: Sequence[Path]) -> lmdb_data.Pair | None:
    layers = data_layer(train), data_layer(test)
    sources = [layer.data_param.source if layer.type == "Data" else SESSION for layer in layers]
    if sources == [SESSION, SESSION]:
        return None
    if SESSION in sources:
        raise ConfigurationError(
            "The phases train and test on different kinds of data",
            expected=f"two databases, or {SESSION} in both",
            actual=" and ".join(sources),
            where=solver.where_data("TRAIN"),
        )
    places = solver.where_data("TRAIN"), solver.where_data("TEST")
    found = [_find(one, solver, folders, place) for one, place in zip(sources, places, strict=True)]
    return lmdb_data.pair(found[0], found[1])


def _mean(solver: Solver, train: Any, test: Any, folders: Sequence[Path]) -> bytes | None:
    names = [data_layer(one).transform_param.mean_file for one in (train, test)]
    where = solver.where_data("TRAIN")
    if names[0] != names[1]:
        expected, actual = "the same mean_file in both phases", " and ".join(map(repr, names))
        raise ConfigurationError("Two mean images", expected=expected, actual=actual, where=where)
    if not names[0]:
        return None
    if names[0] == SESSION:
        if data_layer(train).type == "Data" and data_layer(train).data_param.source != SESSION:
            expected = "a mean.binaryproto beside the database"
            raise ConfigurationError("Another data set's mean", expected=expected, actual=SESSION, where=where)
        return None
    path = _find(names[0], solver, folders, where)
    weights.read_mean(path)
    return path.read_bytes()


def _find(name: str, solver: Solver, folders: Sequence[Path], where: str) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return (folder / name).resolve()
    return find_file(name, Path(solver.file), where=where).resolve()

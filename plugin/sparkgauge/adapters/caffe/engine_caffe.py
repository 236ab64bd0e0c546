"""Engine ``caffe``: the real Caffe, through pycaffe in a process of its own, behind the interface of both engines.

Caffe holds the interpreter's lock during a step and aborts its process on a failed CHECK, hence the process. Images
and gradients go through shared memory; everything else are short messages (see :mod:`.pycaffe_worker`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkgauge.adapters.caffe.engine import (
    Arrays,
    Blobs,
    Images,
    Labels,
    Reduce,
    TestCount,
    check_labels,
    check_mean_values,
    finite,
)
from sparkgauge.caffe import text, weights
from sparkgauge.caffe.net import DATA_TYPES, data_layer
from sparkgauge.errors import ConfigurationError, DataError, MachineError, TrainingError

TEST_BATCH = 100
"""Images per pass when testing."""
MESSAGE_LINES = 12
"""Lines of Caffe's own messages that an error repeats."""


def require() -> None:
    """Return where ``import caffe`` would find pycaffe; MachineError says how to get it otherwise."""
    # find_spec("caffe._caffe") would import caffe, whose libraries crash a process that has PyTorch's loaded
    found = importlib.util.find_spec("caffe")
    folders = [] if found is None else [Path(one) for one in found.submodule_search_locations or ()]
    if not any(file for folder in folders for file in folder.glob("_caffe*")):  # PyPI's caffe is an empty placeholder
        raise MachineError(
            "Engine caffe needs the real Caffe, which is not installed",
            expected="`import caffe` (pycaffe) to work",
            where=sys.executable,
            hint="Run `sparkgauge install-caffe`, or use engine torch.",
        )


class CaffeEngine:
    """One net with its solver on one executor, computed by the real Caffe on the CPU."""

    def __init__(
        self,
        solver: Any,
        train_net: Any,
        test_net: Any,
        *,
        input_shape: tuple[int, int, int],
        batch: int,
        mean: NDArray[Any] | None,
        seed: int,
        device: str = "cpu",
        threads: int = 1,
        rank: int = 0,
        where: Callable[[str], str] = str,
    ) -> None:
        """Start Caffe's process; ``batch`` is this executor's images of one pass."""
        require()
        if device != "cpu":
            raise ConfigurationError("Engine caffe", expected="device cpu", actual=device, hint="Use engine torch.")
        self.iteration = 0
        self._shape, self._batch, self._mean, self._where = input_shape, batch, mean, where
        self._iter_size = max(int(solver.iter_size), 1)
        self._transforms = {"TRAIN": _transform(train_net), "TEST": _transform(test_net)}
        for transform, net in zip(self._transforms.values(), (train_net, test_net), strict=True):
            _check_mean(transform, mean, input_shape)
            if net is not None:
                check_mean_values(net, input_shape[0], where)
        self._folder = Path(tempfile.mkdtemp(prefix="sparkgauge-caffe-"))
        try:
            self._process = _Process(self._folder, threads)
            self._start(solver, {"TRAIN": train_net, "TEST": test_net}, seed, rank)
        except BaseException:
            self.close()
            raise

    def _start(self, solver: Any, nets: Mapping[str, Any], seed: int, rank: int) -> None:
        files, tops = {}, {}
        for phase, net in nets.items():
            if net is None:
                continue
            rewritten, tops[phase] = with_inputs(net, (self._batch, *self._shape))
            files[phase] = str(self._folder / f"{phase.lower()}.prototxt")
            Path(files[phase]).write_text(text.print_message(rewritten), encoding="utf-8")
        order = _own_solver(solver, files["TRAIN"], self._folder, seed)
        path = self._folder / "solver.prototxt"
        path.write_text(text.print_message(order), encoding="utf-8")
        answer = self._process.ask(
            "start",
            solver=str(path),
            test=files.get("TEST"),
            folder=str(self._folder),
            tops=tops,
            seed=seed,
            rank=rank,
        )
        self._shapes: list[tuple[str, list[list[int]]]] = answer["shapes"]
        self._classes: dict[str, tuple[int, str]] = answer["classes"]
        self._flat = self._process.flat()

    def parameters(self) -> Arrays:
        """Return copies of all weights."""
        self._process.ask("get")
        return {name: [view.copy() for view in views] for name, views in self._views().items()}

    def set_parameters(self, values: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Overwrite the weights of the named layers."""
        self._process.ask("get")
        views = self._views()
        for name, arrays in values.items():
            shapes = [view.shape for view in views.get(name, [])]
            if [np.shape(array) for array in arrays] != shapes:
                actual = str([np.shape(array) for array in arrays])
                raise ConfigurationError("Weights do not fit", expected=str(shapes), actual=actual, where=name)
            for view, array in zip(views[name], arrays, strict=True):
                view[...] = array
        self._process.ask("put")

    def step(
        self,
        images: Images,
        labels: Labels,
        *,
        global_batch: int,
        reduce: Reduce | None = None,
        parts: Sequence[int] | None = None,
    ) -> float:
        """Update once and return this executor's part of the loss."""
        self._process.put(self._rows(images, labels, "TRAIN"))
        sizes = self._parts(len(images)) if parts is None else list(parts)
        loss = float(self._process.ask("step", parts=sizes, global_batch=global_batch)["loss"])
        if reduce is not None:
            reduce(self._flat)
        self.iteration = self._process.ask("go")["done"]
        return finite(loss, self.iteration)

    def test(self, images: Images, labels: Labels) -> TestCount:
        """Return the exact count of right answers of the TEST net on any number of images."""
        correct, loss_sum = 0, 0.0
        for first in range(0, len(images), TEST_BATCH):
            part = slice(first, first + TEST_BATCH)
            self._process.put(self._rows(images[part], labels[part], "TEST"))
            count = len(images[part])
            answer = self._process.ask("count", count=count)
            if answer["accuracy"] is None:
                raise ConfigurationError("The TEST net has no Accuracy layer", hint="Add one: its answers are counted.")
            finite(float(answer["loss"]), self.iteration)
            correct += round(answer["accuracy"] * count)  # a float32 share of at most TEST_BATCH images: exact
            loss_sum += answer["loss"] * count
        return TestCount(correct, len(images), loss_sum)

    def blobs(self, images: Images, labels: Labels, *, phase: str = "TRAIN") -> Blobs:
        """Return every output and gradient of one pass; neither weights nor history change."""
        self._process.put(self._rows(images, labels, phase))
        path = Path(self._process.ask("record", count=len(images), phase=phase)["file"])
        data: dict[str, Any] = {}
        diff: dict[str, Any] = {}
        parameters: Arrays = {name: [] for name, _ in self._shapes}
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                kind, _, name = key.partition("/")
                if kind == "parameters":
                    parameters[name.rpartition("/")[0]].append(file[key])
                else:
                    {"data": data, "diff": diff}[kind][name] = file[key]
        path.unlink()
        return Blobs(data, diff, parameters)

    def load_weights(self, path: Path) -> None:
        """Copy the weights of a ``.caffemodel`` by layer name."""
        found = weights.read_weights(path)  # reports a truncated file or another shape before Caffe aborts on it
        own = {name for name, _ in self._shapes}
        self.set_parameters({name: blobs for name, blobs in found.items() if name in own})

    def save_weights(self, path: Path) -> None:
        """Write a ``.caffemodel``."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._process.ask("save", file=str(temporary.resolve()))
        os.replace(temporary, path)

    def load_state(self, path: Path) -> None:
        """Take iteration and history from a ``.solverstate``; DataError if it is of another net: Caffe reads past its
        end. The caller loads the weights it names."""
        model, state = self._folder / "own.caffemodel", self._folder / "own.solverstate"
        given = weights.read_state(path)
        self._check_history(given.history, str(path))
        self._process.ask("save", file=str(model))  # Caffe loads the weights that a state names: these
        weights.write_state(state, replace(given, learned_net=str(model)))
        self.iteration = self._process.ask("restore", file=str(state))["iteration"]

    def _check_history(self, history: Sequence[NDArray[Any]], where: str) -> None:
        own = [math.prod(shape) for _, shapes in self._shapes for shape in shapes]
        found = [array.size for array in history]
        rows, rest = divmod(len(found), max(1, len(own)))
        if rest or not rows or found != own * rows:
            raise DataError(
                "A .solverstate of another net",
                expected=f"blobs of {', '.join(map(str, own))} values, once or several times",
                actual=", ".join(map(str, found)) or "none",
                where=where,
            )

    def save_state(self, path: Path, learned_net: str) -> None:
        """Write a ``.solverstate`` that names ``learned_net`` as its weights."""
        iteration = self._process.ask("snapshot")["iteration"]
        written = self._folder / f"snapshot_iter_{iteration}.solverstate"
        weights.write_state(path, replace(weights.read_state(written), learned_net=learned_net))

    def close(self) -> None:
        """End Caffe's process and remove its files."""
        if hasattr(self, "_process"):
            self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parts(self, count: int) -> list[int]:
        """Return the sizes of the micro-batches: ``iter_size`` even ones of a full update."""
        size = math.ceil(count / self._iter_size) if count > self._batch else self._batch
        return [min(size, count - first) for first in range(0, count, size)] if count else []

    def _rows(self, images: Images, labels: Labels, phase: str) -> NDArray[np.float32]:
        """Return one row per image, transformed as the net's data layer would, its label last: (b, c * h * w + 1)."""
        classes, layer = self._classes[phase]
        check_labels(labels, classes, self._where(layer))  # Caffe would read beyond its memory
        scale, values, subtracts = self._transforms[phase]
        pixels = np.ascontiguousarray(images, np.float32).reshape(len(images), *self._shape)
        if subtracts and self._mean is not None:
            pixels = pixels - self._mean
        elif values:
            pixels = pixels - np.array(values, np.float32).reshape(-1, 1, 1)
        rows = np.empty((len(images), math.prod(self._shape) + 1), np.float32)
        rows[:, :-1] = pixels.reshape(len(images), math.prod(self._shape)) * np.float32(scale)
        rows[:, -1] = labels
        return rows

    def _views(self) -> Arrays:
        """Return the shared memory as arrays of the parameters' shapes."""
        views: Arrays = {}
        place = 0
        for name, shapes in self._shapes:
            views[name] = []
            for shape in shapes:
                count = math.prod(shape)
                views[name].append(self._flat[place : place + count].reshape(shape))
                place += count
        return views


def with_inputs(net: Any, shape: tuple[int, ...]) -> tuple[Any, list[str]]:
    """Return a copy of ``net`` whose data layer is an Input layer of ``shape`` (b, c, h, w), and its tops."""
    copy = type(net)()
    copy.CopyFrom(net)
    tops: list[str] = []
    for layer in copy.layer:
        if layer.type in DATA_TYPES:
            tops += list(layer.top)
            name, own = layer.name, list(layer.top)
            layer.Clear()
            layer.name, layer.type = name, "Input"
            layer.top.extend(own)
            for top in own:
                layer.input_param.shape.add().dim.extend(shape if top == tops[0] else shape[:1])
    return copy, tops


def _own_solver(solver: Any, net_file: str, folder: Path, seed: int) -> Any:
    """Return a copy of ``solver`` that trains the net of ``net_file`` and neither tests, prints nor saves by itself."""
    copy = type(solver)()
    copy.CopyFrom(solver)
    # iter_size: the micro-batches are passed here one by one, since each needs its own images
    dropped = ("net", "net_param", "train_net", "train_net_param", "test_net", "test_net_param", "test_iter")
    for name in (*dropped, "test_interval", "test_state", "train_state", "test_initialization", "display", "snapshot"):
        if name in copy.DESCRIPTOR.fields_by_name:
            copy.ClearField(name)
    copy.iter_size = 1
    copy.train_net, copy.snapshot_prefix, copy.random_seed = net_file, str(folder / "snapshot"), seed
    for name in ("solver_mode", "snapshot_format"):
        if name in copy.DESCRIPTOR.fields_by_name:
            field = copy.DESCRIPTOR.fields_by_name[name]
            setattr(copy, name, field.enum_type.values_by_name[{"solver_mode": "CPU"}.get(name, "BINARYPROTO")].number)
    return copy


def _transform(net: Any) -> tuple[float, list[float], bool]:
    """Return scale and mean values of the net's data layer, and whether it subtracts a mean image."""
    layer = None if net is None else data_layer(net)
    if layer is None:
        return 1.0, [], False
    p = layer.transform_param
    return float(p.scale), list(p.mean_value), bool(p.HasField("mean_file"))


def _check_mean(transform: tuple[float, list[float], bool], mean: Any, shape: tuple[int, int, int]) -> None:
    if mean is not None and tuple(np.shape(mean)) != tuple(shape):
        raise DataError("the mean does not fit the images", expected=str(shape), actual=str(np.shape(mean)))
    if transform[2] and mean is None:
        raise ConfigurationError("the net needs a mean image", expected="mean=", actual="none")


class _Process:
    """Caffe's process and the two pieces of memory shared with it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._images_fd, self._flat_fd = os.memfd_create("images"), os.memfd_create("flat")
        self._log = folder / "caffe.log"
        self._images: mmap.mmap | None = None
        here, there = socket.socketpair()
        script = Path(__file__).with_name("pycaffe_worker.py")
        descriptors = (there.fileno(), self._images_fd, self._flat_fd)
        environment = {
            **os.environ,
            **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads)),
            "GLOG_minloglevel": "2",
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
        }
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, str(script), *map(str, descriptors)],
                pass_fds=descriptors,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        there.close()
        self._socket = here
        self._lines = here.makefile("rw", encoding="utf-8", newline="\n")

    def ask(self, order: str, **details: Any) -> dict[str, Any]:
        """Return the answer to an order; TrainingError with Caffe's own message when its process died of it."""
        try:
            self._lines.write(json.dumps({"order": order, **details}) + "\n")
            self._lines.flush()
            line = self._lines.readline()
        except OSError:
            line = ""
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def put(self, rows: NDArray[np.float32]) -> None:
        """Copy ``rows`` to the start of the shared memory, grown to whole rows where it is too small."""
        if self._images is None or len(self._images) < rows.nbytes or len(self._images) % (4 * rows.shape[1]):
            os.ftruncate(self._images_fd, max(rows.nbytes, 4 * rows.shape[1]))
            self._images = mmap.mmap(self._images_fd, max(rows.nbytes, 4 * rows.shape[1]))
        np.frombuffer(self._images, np.float32)[: rows.size] = rows.ravel()

    def flat(self) -> NDArray[np.float32]:
        """Return the shared memory of weights and gradients, sized by the worker."""
        return np.frombuffer(mmap.mmap(self._flat_fd, 0), np.float32)

    def close(self) -> None:
        """End the process: it leaves when its orders end, and is killed if a step takes too long for that."""
        with contextlib.suppress(OSError):
            self._lines.close()
        self._socket.close()
        try:
            self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for descriptor in (self._images_fd, self._flat_fd):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _died(self) -> TrainingError:
        status = self._child.wait()
        said = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in said.splitlines() if not line.startswith("    @ ")]
        fatal = next((line for line in lines if re.match(r"F\d{4,8} ", line)), None)
        message = fatal.partition("] ")[2] if fatal else (lines[-1] if lines else "no message")
        return TrainingError(
            "The real Caffe ended its process",
            actual=f"exit status {status}: {message}",
            traceback_text="\n".join(lines[-MESSAGE_LINES:]),
        )

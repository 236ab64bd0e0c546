"""Engine ``torch``: a Caffe net on PyTorch, on CPU or GPU, with Caffe's semantics and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparkgauge.adapters import layout
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
from sparkgauge.adapters.caffe.layers import Pass, Shape
from sparkgauge.adapters.caffe.layers.loss import Accuracy
from sparkgauge.adapters.caffe.net import Net, Parameters, Recorder, fill_views
from sparkgauge.adapters.caffe.solvers import build_solver
from sparkgauge.adapters.memory import keep_freed_memory
from sparkgauge.adapters.replay import Replayed
from sparkgauge.caffe import weights
from sparkgauge.caffe.net import data_layer
from sparkgauge.caffe.solver import current_step, learning_rate
from sparkgauge.errors import ConfigurationError, DataError

TEST_BATCH = {"cpu": 250, "cuda": 2000}
"""Images per pass when testing: large enough to fill the device, small enough for 1 GiB of executor memory."""


class TorchEngine:
    """One net, its solver and its weights on one device; see ``engine.Engine``."""

    def __init__(
        self,
        solver: Any,
        train_net: Any,
        test_net: Any | None,
        *,
        input_shape: Shape,
        batch: int,
        mean: NDArray[Any] | None = None,
        seed: int = 0,
        device: str = "cpu",
        threads: int = 1,
        rank: int = 0,
        where: Callable[[str], str] = str,
    ) -> None:
        self.iteration = 0
        self._message, self._device, self._where = solver, device, where
        self._input_shape, self._batch = input_shape, batch
        _set_up(device, threads)
        self._net = Net(train_net, input_shape, where)
        self._parameters = Parameters(self._net, seed, device)
        self._test_net = None if test_net is None else Net(test_net, input_shape, where)
        blocks = device == "cpu" and layout.prefers_blocks()
        for net in self._nets():
            if blocks:
                net.block()
            net.fuse(convolutions=device == "cpu" and not blocks and torch.backends.mkldnn.is_available())
        if self._test_net:
            self._test_net.share(self._net)
        self._solver = build_solver(solver, self._parameters)
        self._rate = torch.zeros((), device=device)
        self._generator = torch.Generator(device).manual_seed(seed * 1_000_003 + rank)
        self._inputs = {net: _Transform(net.message, mean, input_shape, device, where) for net in self._nets()}
        self._data: tuple[Any, Any] | None = None
        self._graphs: dict[tuple[int, bool], Replayed] = {}

    def parameters(self) -> Arrays:
        """Return copies of all weights."""
        return self._parameters.by_layer(self._parameters.values)

    def set_parameters(self, values: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Overwrite the weights of the named layers."""
        self._parameters.set(values, "the given weights")

    def step(
        self,
        images: Images,
        labels: Labels,
        *,
        global_batch: int,
        reduce: Reduce | None = None,
        parts: Sequence[int] | None = None,
    ) -> float:
        """Update once on images (b, c, h, w) and labels (b,); TrainingError if the loss is not finite."""
        self._check(images, labels)
        loss = self._gradients(self._tensor(images), self._labels(labels), global_batch, parts)
        self._apply(reduce)
        return self._finish(loss)

    def attach(self, images: Images, labels: Labels) -> None:
        """Keep the data set where ``step_at`` takes its images from: on the GPU, or in this process's memory."""
        self._check(images, labels)
        self._graphs.clear()
        if self._device == "cpu":
            self._data = images, labels
        else:
            self._data = self.resident(images, labels)

    def step_at(self, indices: NDArray[Any], *, global_batch: int, reduce: Reduce | None = None) -> float:
        """Update once on the attached images at ``indices`` (b,); on a GPU as one captured graph."""
        loss = self.start_step_at(indices, global_batch=global_batch, reduce=reduce)
        return finite(float(loss), self.iteration)

    def start_step_at(self, indices: NDArray[Any], *, global_batch: int, reduce: Reduce | None = None) -> Tensor:
        """As ``step_at``, but return the loss as a tensor that the GPU may still be computing."""
        if self._data is None:
            raise ConfigurationError("no data set is attached", hint="Call attach(images, labels) first.")
        if self._device == "cpu":
            images, labels = self._data[0][indices], self._data[1][indices]
            loss = self._gradients(self._tensor(images), self._labels(labels), global_batch)
            self._apply(reduce)
        else:
            loss = self._replay(torch.from_numpy(np.asarray(indices, np.int64)), global_batch, reduce)
        self.iteration += 1
        return loss

    def test(self, images: Images, labels: Labels) -> TestCount:
        """Return the exact count of right answers of the TEST net."""
        net = self._test_net
        if net is None:
            raise ConfigurationError("the solver has no TEST net", hint="Add a test net or a TEST phase to the net.")
        counters = [op.layer for op in net.operations if isinstance(op.layer, Accuracy)]
        if not counters:
            raise ConfigurationError("the TEST net has no Accuracy layer", hint="Add one with include { phase: TEST }.")
        self._check(images, labels)
        correct = loss_sum = torch.zeros((), device=self._device, dtype=torch.float64)
        size = TEST_BATCH["cpu" if self._device == "cpu" else "cuda"]
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            x, y = self._tensor(images[part]), self._labels(labels[part])
            loss = self._forward(net, x, y, Pass(False, len(y)))
            correct, loss_sum = correct + counters[0].correct, loss_sum + loss.double() * len(y)
        return TestCount(int(correct), len(labels), finite(float(loss_sum), self.iteration))

    def blobs(self, images: Images, labels: Labels, *, phase: str = "TRAIN") -> Blobs:
        """Return every output and, for TRAIN, every gradient; nothing that the engine keeps changes."""
        self._check(images, labels)
        net = self._net if phase == "TRAIN" else self._test_net
        if net is None:
            raise ConfigurationError("the solver has no TEST net")
        kept, state = self._parameters.values.clone(), self._generator.get_state()
        run = Pass(phase == "TRAIN", len(labels), self._generator)
        data, diff = Recorder(net.names), Recorder(net.names)
        self._parameters.gradients.zero_()
        with torch.no_grad():
            x, y = self._inputs[net](self._tensor(images)), self._labels(labels)
            data(0, x)
            data(1, y)
            net.forward(x, y, run, data)
            if phase == "TRAIN":
                net.backward(run, diff)
            self._parameters.values.copy_(kept)
        self._generator.set_state(state)
        return Blobs(data.arrays, diff.arrays, self._parameters.by_layer(self._parameters.gradients))

    def load_weights(self, path: Path) -> None:
        """Copy the weights of a ``.caffemodel`` by layer name; DataError where a shape differs."""
        self._parameters.set(weights.read_weights(path), str(path))

    def save_weights(self, path: Path) -> None:
        """Write a ``.caffemodel``."""
        types = {layer.name: layer.message.type for layer in self._parameters.layers}
        weights.write_weights(path, self._net.message.name, self.parameters(), types=types)

    def load_state(self, path: Path) -> None:
        """Take iteration and history from a ``.solverstate``; DataError if it is of another net or solver."""
        state = weights.read_state(path)
        views = [view for flat in self._solver.history for view in self._parameters.views(flat)]
        fill_views(views, state.history, str(path))
        self.iteration = state.iteration

    def save_state(self, path: Path, learned_net: str) -> None:
        """Write a ``.solverstate`` that names ``learned_net`` as its weights."""
        by_layer = [self._parameters.by_layer(flat) for flat in self._solver.history]
        history = [array for arrays in by_layer for blobs in arrays.values() for array in blobs]
        step = current_step(self._message, self.iteration)
        weights.write_state(path, weights.State(self.iteration, step, learned_net, history))

    def close(self) -> None:
        """Free the data set and the captured graphs."""
        self._data = None
        self._graphs.clear()

    def _nets(self) -> list[Net]:
        return [self._net, *([self._test_net] if self._test_net else [])]

    def _forward(self, net: Net, x: Tensor, labels: Tensor, run: Pass) -> Tensor:
        with torch.no_grad():
            return net.forward(self._inputs[net](x), labels, run)

    def _gradients(self, x: Tensor, labels: Tensor, global_batch: int, parts: Sequence[int] | None = None) -> Tensor:
        """Fill the gradient buffer by this executor's images and return its part of the loss, a scalar."""
        self._parameters.gradients.zero_()
        loss = torch.zeros((), device=self._device)
        run = Pass(True, global_batch, self._generator, whole_batch=len(labels) == global_batch)
        passes = (x.tensor_split(self._solver.iter_size), labels.tensor_split(self._solver.iter_size))
        if parts is not None:
            passes = (x.split(list(parts)), labels.split(list(parts)))
        for part_x, part_labels in zip(*passes, strict=True):
            if len(part_labels):
                loss = loss + self._forward(self._net, part_x, part_labels, run)
                with torch.no_grad():
                    self._net.backward(run)
        # a fused ReLU turns NaN into 0, so that the loss alone may look well; 0 times a NaN or infinity is NaN
        return loss + 0.0 * self._parameters.gradients.sum()

    def _apply(self, reduce: Reduce | None) -> None:
        """Sum the gradients over the executors and update the weights by them."""
        if reduce is not None:
            self._reduce(reduce)
        self._set_rate()
        with torch.no_grad():
            self._solver.update(self._rate)

    def _reduce(self, reduce: Reduce) -> None:
        gradients = self._parameters.gradients
        if self._device == "cpu":
            reduce(gradients.numpy())
        elif getattr(reduce, "on_device", False):
            reduce(gradients)
        else:
            array = gradients.cpu().numpy()
            reduce(array)
            gradients.copy_(torch.from_numpy(array))

    def _set_rate(self) -> None:
        self._rate.fill_(learning_rate(self._message, self.iteration) * self._solver.scale(self.iteration))

    def _finish(self, loss: Tensor) -> float:
        self.iteration += 1
        return finite(float(loss), self.iteration)

    def _replay(self, indices: Tensor, global_batch: int, reduce: Reduce | None) -> Tensor:
        key = global_batch, reduce is None
        if key not in self._graphs:
            step = self._captured(global_batch, whole=reduce is None)
            self._graphs[key] = Replayed(step, self._keep, self._generator)
        if reduce is None:
            self._set_rate()
        # ordinary memory is read before the call returns; without non_blocking it would wait for the GPU
        loss: Tensor = self._graphs[key](indices.to(self._device, non_blocking=True))
        if reduce is not None:
            self._apply(reduce)
        return loss

    def _captured(self, global_batch: int, *, whole: bool) -> Callable[[Tensor], Tensor]:
        """Return the step to capture: gradients at given indices and, if ``whole``, the update."""
        assert self._data is not None
        images, labels = self._data

        def run(indices: Tensor) -> Tensor:
            loss = self._gradients(images[indices], labels[indices], global_batch)
            if whole:
                with torch.no_grad():
                    self._solver.update(self._rate)
            return loss

        return run

    def _keep(self) -> list[Tensor]:
        """Return what the passes before a capture must not change."""
        return [self._parameters.values, *self._solver.history]

    def resident(self, images: Images, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return both on the device, in channels_last order where they come so: ``test`` takes them from there."""
        return self._tensor(images), self._labels(labels)

    def _tensor(self, images: Any) -> Tensor:
        if isinstance(images, Tensor):
            return images
        array = images if images.flags.writeable else images.copy("K")
        return torch.from_numpy(array).to(self._device)

    def _labels(self, labels: Any) -> Tensor:
        if isinstance(labels, Tensor):
            return labels
        return torch.from_numpy(np.asarray(labels).astype(np.int64)).to(self._device)

    def _check(self, images: Any, labels: Any) -> None:
        """Raise DataError for images of another shape or labels that the net has no output for."""
        if tuple(images.shape) != (len(labels), *self._input_shape):
            expected = f"{len(labels)} x {self._input_shape}"
            raise DataError("images do not fit the net", expected=expected, actual=str(images.shape))
        classes, layer = self._net.classes()
        check_labels(labels, classes, self._where(layer))


class _Transform:
    """The data layer's ``transform_param``: (pixel - mean) * scale."""

    def __init__(
        self, message: Any, mean: NDArray[Any] | None, shape: Shape, device: str, where: Callable[[str], str]
    ) -> None:
        layer = data_layer(message)
        p = layer.transform_param if layer is not None else None
        self._scale = float(p.scale) if p is not None else 1.0
        values = list(p.mean_value) if p is not None else []
        check_mean_values(message, shape[0], where)
        if mean is not None and tuple(mean.shape) != tuple(shape):
            raise DataError("the mean does not fit the images", expected=str(shape), actual=str(mean.shape))
        self._mean: Tensor | None = None
        if p is not None and p.HasField("mean_file"):
            if mean is None:
                raise ConfigurationError("the net needs a mean image", expected="mean=", where=p.mean_file)
            laid_out = torch.from_numpy(np.array(mean, np.float32))[None].to(device)
            self._mean = laid_out.contiguous(memory_format=torch.channels_last)
        elif values:
            self._mean = torch.tensor(values, device=device).view(1, -1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return float32 images in channels_last order."""
        x = x.to(torch.float32, copy=True, memory_format=torch.channels_last)
        if self._mean is not None:
            x.sub_(self._mean)
        return x if self._scale == 1 else x.mul_(self._scale)


def _set_up(device: str, threads: int) -> None:
    """Set what holds for the whole process: threads, precision, and a malloc that keeps its memory."""
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
        return
    # as cuDNN does by default, and so Caffe's own convolutions on such a GPU
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

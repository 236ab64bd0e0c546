"""The process that holds the real Caffe: takes orders as JSON lines on a socket, arrays through shared memory.

Run as a script, so that a failed CHECK of Caffe, which aborts the process, leaves the executor alive to tell of it.
It ends with its parent: an order that cannot be read any more is the last one.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Worker:
    """A solver with its two nets; every public method carries out the order of the same name."""

    def __init__(self, control: socket.socket, images_fd: int, flat_fd: int) -> None:
        self._lines = control.makefile("rw", encoding="utf-8", newline="\n")
        self._images_fd, self._flat_fd = images_fd, flat_fd
        self._images_map: mmap.mmap | None = None

    def serve(self) -> None:
        """Carry out orders until the parent closes its end."""
        while order := self._receive():
            self._send(getattr(self, order.pop("order"))(**order))

    def start(
        self, solver: str, test: str | None, folder: str, tops: dict[str, list[str]], seed: int, rank: int
    ) -> dict[str, Any]:
        """Return the parameters' layers and shapes after making the nets from the named files."""
        import caffe

        caffe.set_mode_cpu()
        self._folder, self._tops = folder, tops
        self._solver = caffe.get_solver(solver)
        self._solver.add_callback(lambda: None, self._gradients_ready)
        self._nets = {"TRAIN": self._solver.net}
        if test is not None:
            self._nets["TEST"] = caffe.Net(test, caffe.TEST)
            self._nets["TEST"].share_with(self._solver.net)
        caffe.set_random_seed(seed + rank)  # equal weights everywhere, Dropout's masks of each its own
        blobs = [blob for blobs in self._solver.net.params.values() for blob in blobs]
        os.ftruncate(self._flat_fd, max(4 * sum(blob.count for blob in blobs), 4))
        self._flat = np.frombuffer(mmap.mmap(self._flat_fd, 0), np.float32)
        self._blobs = blobs
        shapes = {name: [list(blob.data.shape) for blob in found] for name, found in self._solver.net.params.items()}
        return {"shapes": list(shapes.items()), "classes": {phase: self._classes(phase) for phase in self._nets}}

    def _classes(self, phase: str) -> tuple[int, str]:
        """Return how many classes labels can name, the fewest outputs of a blob that goes into a layer beside them, and
        the layer's name."""
        net, labels = self._nets[phase], set(self._tops[phase][1:])
        found = []
        for index, layer in enumerate(net.layers):
            bottoms = [net._blob_names[blob] for blob in net._bottom_ids(index)]
            if layer.type == "Split" and bottoms[0] in labels:
                labels.update(net._blob_names[blob] for blob in net._top_ids(index))
            elif labels.intersection(bottoms):
                layer_name = net._layer_names[index]
                found += [(net.blobs[name].channels, layer_name) for name in bottoms if name not in labels]
        return min(found, default=(0, ""))

    def step(self, parts: list[int], global_batch: int) -> dict[str, Any]:
        """Return the loss after one update with micro-batches of ``parts`` images; none is a zero gradient."""
        self._parts, self._global_batch = parts, global_batch
        self._feed("TRAIN", 0, parts[0] if parts else 0)
        self._kept = self._statistics()
        self._solver.step(1)
        return {"done": int(self._solver.iter)}

    def _gradients_ready(self) -> None:
        """Hand the gradient to the parent, wait for the reduced one, and let Caffe update with it."""
        try:
            loss = self._accumulate()
            self._send({"loss": loss})
            if not self._receive():
                os._exit(0)
            self._scatter("diff")
        except BaseException:
            # Caffe's C++ frames below must not be unwound by a Python exception
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    def _accumulate(self) -> float:
        net, loss, first = self._nets["TRAIN"], 0.0, 0
        self._flat[:] = 0
        for index, count in enumerate(self._parts):
            if index:
                self._feed("TRAIN", first, count)
                net.clear_param_diffs()
                self._pass(net)
            first += count
            self._gather(count / self._global_batch)
            loss += self._loss(net) * count / self._global_batch
        if not self._parts:
            self._restore(self._kept)
        return loss

    def count(self, count: int) -> dict[str, Any]:
        """Return mean loss and accuracy of the TEST net on the first ``count`` images of the shared memory."""
        net = self._nets["TEST"]
        self._feed("TEST", 0, count)
        self._forward(net)
        accuracies = [index for index, layer in enumerate(net.layers) if layer.type == "Accuracy"]
        tops = net._top_ids(accuracies[0]) if accuracies else []
        accuracy = float(net._blobs[tops[0]].data) if accuracies else None
        return {"accuracy": accuracy, "loss": self._loss(net)}

    def record(self, count: int, phase: str) -> dict[str, Any]:
        """Return the file with all blobs and gradients of one pass."""
        net, kept = self._nets[phase], self._statistics()
        self._feed(phase, 0, count)
        net.clear_param_diffs()
        self._pass(net)
        arrays = {f"data/{name}": blob.data for name, blob in net.blobs.items()}
        arrays |= {f"diff/{name}": blob.diff for name, blob in net.blobs.items() if name not in self._tops[phase]}
        for name, blobs in net.params.items():
            arrays |= {f"parameters/{name}/{index}": blob.diff for index, blob in enumerate(blobs)}
        path = os.path.join(self._folder, "record.npz")
        np.savez(path, **arrays)
        self._restore(kept)
        return {"file": path}

    def get(self) -> dict[str, Any]:
        """Write all weights to the shared memory."""
        place = 0
        for blob in self._blobs:
            self._flat[place : place + blob.count] = blob.data.ravel()
            place += blob.count
        return {}

    def put(self) -> dict[str, Any]:
        """Take all weights from the shared memory."""
        self._scatter("data")
        return {}

    def load(self, file: str) -> dict[str, Any]:
        """Copy the weights of a caffemodel by layer name."""
        self._solver.net.copy_from(file)
        return {}

    def save(self, file: str) -> dict[str, Any]:
        """Write a caffemodel."""
        self._solver.net.save(file)
        return {}

    def snapshot(self) -> dict[str, Any]:
        """Write a caffemodel and a solverstate under the solver's prefix."""
        self._solver.snapshot()
        return {"iteration": int(self._solver.iter)}

    def restore(self, file: str) -> dict[str, Any]:
        """Take iteration, history and the weights it names from a solverstate."""
        self._solver.restore(file)
        return {"iteration": int(self._solver.iter)}

    def _feed(self, phase: str, first: int, count: int) -> None:
        """Put images ``first`` to ``first + count`` and their labels into the net; one blank image for none."""
        net, tops = self._nets[phase], self._tops[phase]
        data = net.blobs[tops[0]]
        shape = (max(count, 1), *data.data.shape[1:])
        if data.data.shape != shape:
            data.reshape(*shape)
            for label in tops[1:]:
                net.blobs[label].reshape(shape[0])
            net.reshape()
        pixels = self._shared().reshape(-1, int(np.prod(shape[1:])) + 1)[first : first + count]
        data.data[...] = pixels[:, :-1].reshape(-1, *shape[1:]) if count else 0
        for label in tops[1:]:
            net.blobs[label].data[...] = pixels[:, -1] if count else 0

    def _shared(self) -> Array:
        size = os.fstat(self._images_fd).st_size
        if self._images_map is None or len(self._images_map) != size:
            self._images_map = mmap.mmap(self._images_fd, size)
        return np.frombuffer(self._images_map, np.float32)

    def _forward(self, net: Any) -> None:
        net._forward(0, len(net.layers) - 1)

    def _pass(self, net: Any) -> None:
        self._forward(net)
        net._backward(len(net.layers) - 1, 0)

    def _loss(self, net: Any) -> float:
        weights = net.blob_loss_weights
        return float(sum(weight * net.blobs[name].data.sum() for name, weight in weights.items() if weight))

    def _gather(self, scale: float) -> None:
        place = 0
        for blob in self._blobs:
            self._flat[place : place + blob.count] += np.float32(scale) * blob.diff.ravel()
            place += blob.count

    def _scatter(self, what: str) -> None:
        place = 0
        for blob in self._blobs:
            target = getattr(blob, what)
            target[...] = self._flat[place : place + blob.count].reshape(target.shape)
            place += blob.count

    def _statistics(self) -> list[tuple[Any, Array]]:
        """Return BatchNorm's running statistics, which a forward pass changes."""
        layers = (layer for layer in self._solver.net.layers if layer.type == "BatchNorm")
        return [(blob, blob.data.copy()) for layer in layers for blob in layer.blobs]

    def _restore(self, statistics: list[tuple[Any, Array]]) -> None:
        for blob, values in statistics:
            blob.data[...] = values

    def _receive(self) -> dict[str, Any] | None:
        line = self._lines.readline()
        return json.loads(line) if line else None

    def _send(self, answer: dict[str, Any]) -> None:
        self._lines.write(json.dumps(answer) + "\n")
        self._lines.flush()


def main() -> None:
    """Serve the parent that started this process with three file descriptors as arguments."""
    sys.path.pop(0)  # the folder of this script: its modules are not top-level ones
    control, images, flat = map(int, sys.argv[1:4])
    Worker(socket.socket(fileno=control), images, flat).serve()


if __name__ == "__main__":
    main()

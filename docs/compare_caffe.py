"""Prints how far engine torch is from the real Caffe on cifar10_quick: each layer, 200 losses, the speed of Caffe.

Run where `sparkgauge install-caffe` has been run, on a prepared data set:
``python docs/compare_caffe.py FOLDER [--iterations 200]``. Speed is of this process alone; measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import sparkgauge
from sparkgauge.adapters.caffe.engine_caffe import CaffeEngine
from sparkgauge.adapters.caffe.engine_torch import TorchEngine
from sparkgauge.caffe.solver import read_solver
from sparkgauge.data.shards import Shard

BATCH, SHAPE = 100, (3, 32, 32)
SOLVER = Path(sparkgauge.__file__).parent / "models" / "caffe" / "cifar10_quick_solver.prototxt"


def main() -> None:
    """Print the three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a prepared data set's folder, as the cache keeps it")
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    shard = Shard.open(options.data, executors=1, rank=0, global_batch=BATCH, seed=1)
    real, ours = made(CaffeEngine, shard), made(TorchEngine, shard)
    try:
        ours.set_parameters(real.parameters())
        print_layers(real.blobs(*batch(shard, 0)), ours.blobs(*batch(shard, 0)))
        print_losses(real, ours, shard, options.iterations)
    finally:
        real.close()
        ours.close()


def made(kind: Any, shard: Shard) -> Any:
    """Return an engine with cifar10_quick."""
    solver = read_solver(SOLVER)
    mean = np.ascontiguousarray(shard.mean_image.transpose(2, 0, 1))
    nets = solver.train_net(), solver.test_net()
    return kind(solver.message, *nets, input_shape=SHAPE, batch=BATCH, mean=mean, seed=1)


def batch(shard: Shard, index: int) -> tuple[Any, Any]:
    """Return images (b, c, h, w) and labels of a step."""
    images, labels = shard.batch(index)
    return images.transpose(0, 3, 1, 2), labels


def difference(ours: Any, real: Any) -> float:
    """Return the largest difference as a fraction of the largest value."""
    return float(np.abs(ours - real).max() / max(np.abs(real).max(), 1e-30))


def print_layers(real: Any, ours: Any) -> None:
    """Print one row per blob and per weight gradient."""
    print("| blob | output | gradient |\n| --- | --- | --- |")
    for name in (name for name in real.data if name in ours.data):
        both = name in real.diff and name in ours.diff
        gradient = f"{difference(ours.diff[name], real.diff[name]):.1e}" if both else ""
        print(f"| {name} | {difference(ours.data[name], real.data[name]):.1e} | {gradient} |")
    for layer, blobs in real.parameters.items():
        for kind, blob, own in zip(("weights", "bias"), blobs, ours.parameters[layer], strict=False):
            print(f"| {layer} {kind} | | {difference(own, blob):.1e} |")


def print_losses(real: Any, ours: Any, shard: Shard, iterations: int) -> None:
    """Print the largest difference of the losses of ``iterations`` updates, and Caffe's images per second."""
    worst, seconds = 0.0, 0.0
    for index in range(iterations):
        images, labels = batch(shard, index)
        began = time.monotonic()
        loss = real.step(images, labels, global_batch=BATCH)
        seconds += time.monotonic() - began
        worst = max(worst, abs(loss - ours.step(images, labels, global_batch=BATCH)))
    print(f"\nloss, {iterations} iterations: largest difference {worst:.1e}")
    print(f"engine caffe: {iterations * BATCH / seconds:.0f} images/s")


if __name__ == "__main__":
    main()

"""Prints the training speed of the Caffe engines on this machine, in interleaved rounds on the same cores.

OMP_NUM_THREADS=1 taskset -c 0 python docs/measure_caffe.py
OMP_NUM_THREADS=2 taskset -c 0,1 python docs/measure_caffe.py --threads 2
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparkgauge.adapters.caffe.engine import Engine
from sparkgauge.caffe.solver import read_solver
from sparkgauge.models import caffe as models

SHAPE, BATCH = (3, 32, 32), 100


def main() -> None:
    """Print images/s of each installed engine: the median of the rounds, and their range."""
    options = _options()
    engines = dict(_engines(options))
    images, labels = _data()
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(options.rounds + 1):  # the first round warms up
        for name, engine in engines.items():
            rate = _round(engine, images, labels, options.steps)
            if index:
                rates[name].append(rate)
    for name, found in rates.items():
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"{name:6s} {middle:7.0f} images/s (median of {len(found)}, {low:.0f} to {high:.0f})")
    if len(rates) == 2:
        ratios = [a / b for a, b in zip(rates["torch"], rates["caffe"], strict=True)]
        print(f"torch : caffe {statistics.median(ratios):.2f} x (median of paired rounds)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="cifar10_quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30)
    return parser.parse_args()


def _engines(options: argparse.Namespace) -> Iterator[tuple[str, Engine]]:
    solver = read_solver(models.path(options.model))
    nets = solver.message, solver.train_net(), solver.test_net()
    mean = np.full(SHAPE, 120, np.float32)
    shape: dict[str, Any] = {"input_shape": SHAPE, "batch": BATCH, "mean": mean, "seed": 1, "threads": options.threads}
    from sparkgauge.adapters.caffe.engine_torch import TorchEngine

    yield "torch", TorchEngine(*nets, **shape)
    if importlib.util.find_spec("caffe") is not None:
        from sparkgauge.adapters.caffe.engine_caffe import CaffeEngine

        yield "caffe", CaffeEngine(*nets, **shape)


def _data() -> tuple[Any, Any]:
    """Return images and labels whose values do not change the speed: no figure here depends on what is learned."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (BATCH * 20, 32, 32, 3), dtype=np.uint8)
    return pixels.transpose(0, 3, 1, 2), generator.integers(0, 10, BATCH * 20)


def _round(engine: Engine, images: Any, labels: Any, steps: int) -> float:
    started = time.perf_counter()
    for index in range(steps):
        part = slice(index % 20 * BATCH, index % 20 * BATCH + BATCH)
        engine.step(images[part], labels[part], global_batch=BATCH)
    return steps * BATCH / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

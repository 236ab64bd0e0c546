"""Measures framework caffe on a Spark cluster of this machine, side by side in interleaved rounds; prints Markdown.

    sparkgauge install-caffe --apt
    SPARKGAUGE_DATA=/path/to/cifar-10 python docs/measure_caffe_spark.py executors equal
    SPARKGAUGE_DATA=/path/to/cifar-10 python docs/measure_caffe_spark.py full --engine caffe

``executors``: two executors of one core against one, for each engine. ``equal``: their weights after 50 iterations.
``full``: all iterations and tests of cifar10_quick on two executors. Nothing else may run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from sparkgauge import stats
from sparkgauge.adapters.caffe import launch
from sparkgauge.caffe.plan import read_plan
from sparkgauge.caffe.weights import read_weights
from sparkgauge.channel import Address
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data import resolve
from sparkgauge.job import Job
from sparkgauge.models.caffe import path as shipped
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS

EXECUTORS = 2
TIMEOUT_SECONDS = 3600.0

Run = Callable[..., Round]


def main() -> None:
    """Measure the sections named on the command line."""
    sections = {"executors": executors, "equal": equal, "full": full}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--engine", choices=("torch", "caffe"), help="default: both, where Caffe is installed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=5000, help="of full; the rest can follow from --snapshot")
    parser.add_argument("--snapshot", type=Path, help="a .solverstate that --save-to of an earlier part wrote")
    parser.add_argument("--save-to", default="", help="what the names of weights and state after full begin with")
    options = parser.parse_args()
    both = ["torch", "caffe"] if importlib.util.find_spec("caffe") else ["torch"]
    with cluster() as run:
        for name in options.sections:
            for engine in [options.engine] if options.engine else both:
                sections[name](run, engine, options)


def executors(run: Run, engine: str, options: argparse.Namespace) -> None:
    """Print the throughput of two executors over that of one, at the same global batch."""
    found: dict[int, list[float]] = {1: [], 2: []}
    run(engine, executors=EXECUTORS, iterations=10)
    for turn in range(options.pairs):
        for count in (1, 2) if turn % 2 == 0 else (2, 1):
            done = run(engine, executors=count, iterations=options.steps)
            found[count].append(done.images_per_second)
    ratio = stats.ratio_interval(found[1], found[2], confidence=0.95, paired=True)
    for count, rates in found.items():
        low, high = min(rates), max(rates)
        print(f"engine {engine}, {count} x 1 core: {np.median(rates):,.0f} images/s ({low:,.0f} to {high:,.0f})")
    print(
        f"engine {engine}, two executors / one: {ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], "
        f"{options.pairs} pairs of {options.steps} steps\n",
        flush=True,
    )


def equal(run: Run, engine: str, options: argparse.Namespace) -> None:
    """Print how far the weights of one and two executors are apart after 50 iterations, by number of passes."""
    for passes in (1, 2):
        weights = []
        with tempfile.TemporaryDirectory() as folder:
            for count in (1, 2):
                run(engine, executors=count, iterations=50, passes=passes, save_to=f"{folder}/{count}")
                weights.append(read_weights(f"{folder}/{count}_seed1_iter_50.caffemodel"))
        one, two = ([blob for blobs in found.values() for blob in blobs] for found in weights)
        apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, two, strict=True))
        print(f"engine {engine}, passes={passes}: weights after 50 iterations differ by {apart:.1e}\n", flush=True)


def full(run: Run, engine: str, options: argparse.Namespace) -> None:
    """Print runtime and accuracies of the whole training."""
    part = {"iterations": options.iterations, "save_to": options.save_to, "snapshot": options.snapshot}
    done = run(engine, executors=EXECUTORS, test_every=500, **part)
    tests = " ".join(f"{100 * p.accuracy_fraction:.1f}" for p in done.curve if p.accuracy_fraction is not None)
    print(f"engine {engine}: {done.runtime_seconds:.1f} s, accuracy {done.accuracy_fraction:.4f}")
    print(f"every 500 iterations: {tests} %\n", flush=True)


@contextmanager
def cluster() -> Iterator[Run]:
    """Give a function that runs one round on a cluster of two executors of one core."""
    dataset = resolve(os.environ.get("SPARKGAUGE_DATA") or None, cache_dir=Path(pooch.os_cache("sparkgauge")))
    print(f"data: {dataset.identity.name} ({dataset.identity.kind})", file=sys.stderr)
    launch.prepare()
    spark = SparkCluster.start(ClusterSpec(EXECUTORS, 1, 1024, sys.executable, preimport=PREIMPORTS))

    def run(engine: str, *, passes: int = 1, snapshot: Path | None = None, **changes: Any) -> Round:
        model = "cifar10_quick"
        plan = read_plan(shipped(model), engine=engine, model=model, passes=passes, state_file=snapshot)
        fields: dict[str, Any] = {
            "address": Address("", 0, ""),
            "model": plan.model,
            "device": "cpu",
            "epochs": None,
            "global_batch": plan.batch,
            "test_every": None,
            "seed": 1,
            "dataset_folder": str(dataset.folder),
            "train_count": dataset.train_count,
            "threads": 1,
            "loopback": True,
            "plan": plan,
        }
        job = Job(**{**fields, **changes})
        return run_round(spark.spark.sparkContext, job, launch.launch, timeout_seconds=TIMEOUT_SECONDS)

    try:
        spark.warm(EXECUTORS)
        yield run
    finally:
        spark.stop()


if __name__ == "__main__":
    main()

"""Measures framework caffe on a Spark cluster of this machine, side by side in interleaved rounds; prints Markdown.

    sparkgauge install-caffe --apt
    SPARKGAUGE_DATA=/path/to/cifar-10 python docs/measure_caffe_spark.py executors equal
    SPARKGAUGE_DATA=/path/to/cifar-10 python docs/measure_caffe_spark.py full --engine caffe

``executors``: two executors of one core against one, for each engine. ``equal``: their weights after 50 iterations.
``full``: all iterations and tests of cifar10_quick on two executors. Nothing else may run.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measuring import EXECUTORS, cluster, dataset, make_job, ratio

from sparkgauge.adapters.caffe import entry, launch
from sparkgauge.adapters.torch import launch as torch_launch
from sparkgauge.caffe.plan import read_plan
from sparkgauge.caffe.weights import read_weights
from sparkgauge.data import Dataset
from sparkgauge.data.cache import write_prepared
from sparkgauge.data.layouts import Content
from sparkgauge.models.caffe import path as shipped
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS

TIMEOUT_SECONDS = 3600.0

Run = Callable[..., Round]


def main() -> None:
    """Measure the sections named on the command line."""
    sections = {"executors": executors, "equal": equal, "full": full}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=sections)
    parser.add_argument("--engine", choices=("torch", "caffe"), help="default: both, where Caffe is installed")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=5000, help="of full; the rest can follow from --snapshot")
    parser.add_argument("--snapshot", type=Path, help="a .solverstate that --save-to of an earlier part wrote")
    parser.add_argument("--save-to", default="", help="what the names of weights and state after full begin with")
    options = parser.parse_args()
    both = ["torch", "caffe"] if importlib.util.find_spec("caffe") else ["torch"]
    with _rounds(whole="full" in options.sections) as run:
        for name in options.sections:
            for engine in [options.engine] if options.engine else both:
                sections[name](run, engine, options)


def executors(run: Run, engine: str, options: argparse.Namespace) -> None:
    """Print the throughput of two executors over that of one, at the same global batch, and what limits it.

    Two executors that exchange nothing show what the machine's two cores give at most.
    """
    arms: dict[str, dict[str, Any]] = {
        "one": {"executors": 1},
        "two": {"executors": EXECUTORS},
        "apart": {"executors": EXECUTORS, "train": train_apart},
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    waited: list[float] = []
    run(engine, executors=EXECUTORS, iterations=10)
    for turn in range(options.pairs):
        for name in arms if turn % 2 == 0 else reversed(arms):
            done = run(engine, iterations=options.steps, **arms[name])
            found[name].append(done.images_per_second)
            if name == "two":
                waited += [one.phases.sync / (one.phases.compute + one.phases.sync) for one in done.executors]
    titles = {"one": "one executor", "two": "two executors", "apart": "two executors that exchange nothing"}
    for name, rates in found.items():
        middle, low, high = np.median(rates), min(rates), max(rates)
        print(f"engine {engine}, {titles[name]}: {middle:,.0f} images/s ({low:,.0f} to {high:,.0f})")
    for above, below in (("two", "one"), ("apart", "one"), ("two", "apart")):
        print(f"{titles[above]} / {titles[below]}: {ratio(found[below], found[above], 2)}")
    print(
        f"{options.pairs} rounds of {options.steps} steps; the all-reduce is {np.mean(waited):.1%} of a step\n",
        flush=True,
    )


def train_apart(context: Any, shard: Any) -> dict[str, float]:
    """Train on this executor's part of each batch as if there were no other."""
    from sparkgauge.adapters.caffe.training import make_engine

    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(context.plan, context, shard, Path(folder))
        for step in context.steps(shard):
            loss = engine.step(step.images, step.labels, global_batch=step.global_batch)
            context.record_loss(loss * step.global_batch)
        engine.close()
    return {"accuracy_fraction": 0.0}


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


def part_of(dataset: Dataset, folder: Path) -> Dataset:
    """Return the first 5,000 training and 500 test images as a data set: no figure here needs more but that of full."""
    arrays = dataset.open()
    train, test = slice(0, 5000), slice(0, 500)
    content = Content(
        np.ascontiguousarray(arrays.train_images[train]),
        np.ascontiguousarray(arrays.train_labels[train]),
        np.ascontiguousarray(arrays.test_images[test]),
        np.ascontiguousarray(arrays.test_labels[test]),
    )
    write_prepared(content, folder, kind=dataset.identity.kind, source="docs/measure_caffe_spark.py")
    return Dataset.load(folder)


@contextmanager
def _rounds(*, whole: bool) -> Iterator[Run]:
    """Give a function that runs one round on a cluster of two executors of one core."""
    data = dataset()
    launch.prepare()
    with tempfile.TemporaryDirectory() as scratch, cluster(PREIMPORTS["caffe"]) as running:
        if not whole:
            data = part_of(data, Path(scratch) / "part")

        def run(
            engine: str,
            *,
            iterations: int,
            passes: int = 1,
            snapshot: Path | None = None,
            train: Any = None,
            **changes: Any,
        ) -> Round:
            model = "cifar10_quick"
            plan = read_plan(shipped(model), engine=engine, model=model, passes=passes, state_file=snapshot)
            wanted = make_job(data, plan.model, iterations, global_batch=plan.batch, plan=plan, **changes)
            start = launch.launch
            if train is not None:
                start = functools.partial(torch_launch.launch, train=train, open_shard=entry.open_shard)
            context = running.spark.sparkContext
            return run_round(context, wanted, start, timeout_seconds=TIMEOUT_SECONDS)

        yield run


if __name__ == "__main__":
    main()

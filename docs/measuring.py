"""What the scripts ``measure_*.py`` share: the data, two executors of one core, interleaved pairs, ratios as text."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pooch

from sparkgauge import environment, stats
from sparkgauge.channel import Address
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.java import find_java
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data import resolve
from sparkgauge.data.dataset import Dataset
from sparkgauge.job import Job
from sparkgauge.models.cifar10 import RECIPES

EXECUTORS = 2


def print_machine(*, spark: bool = True) -> None:
    """Print what the figures below it were measured on."""
    java = str(find_java(os.environ).version) if spark else ""
    machine = environment.describe(environment.capture(os.environ, java_version=java))
    print(f"{machine}; load {environment.load_average():.2f} at the start\n", flush=True)


@functools.cache
def dataset() -> Dataset:
    """Return CIFAR-10 from ``SPARKGAUGE_DATA`` or wherever a session finds it."""
    found = resolve(os.environ.get("SPARKGAUGE_DATA") or None, cache_dir=Path(pooch.os_cache("sparkgauge")))
    print(f"data: {found.identity.name} ({found.identity.kind}) {found.identity.digest[:12]}", file=sys.stderr)
    return found


@contextlib.contextmanager
def cluster(preimport: tuple[str, ...], **changes: Any) -> Iterator[SparkCluster]:
    """Yield a warm cluster of two executors of one core; ``changes`` are fields of ClusterSpec."""
    running = SparkCluster.start(ClusterSpec(EXECUTORS, 1, 1024, sys.executable, preimport=preimport, **changes))
    try:
        running.warm(EXECUTORS)
        yield running
    finally:
        running.stop()


def make_job(data: Dataset, model: str, steps: int, **changes: Any) -> Job:
    """Return a job of ``steps`` steps at the model's own batch, cifar10_quick's where it has none."""
    recipe = RECIPES.get(model, RECIPES["cifar10_quick"])
    plain = Job(
        address=Address("", 0, ""),
        executors=EXECUTORS,
        model=model,
        device="cpu",
        iterations=steps,
        epochs=None,
        global_batch=recipe.global_batch,
        test_every=None,
        seed=1,
        dataset_folder=str(data.folder),
        train_count=data.train_count,
        threads=1,
        loopback=True,
    )
    return dataclasses.replace(plain, **changes)


def interleave(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> tuple[list[Any], list[Any]]:
    """Return the results of both in pairs, the order turned round in every second pair (A B, B A, ...)."""
    results: tuple[list[Any], list[Any]] = ([], [])
    for turn in range(pairs):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            results[side].append((a, b)[side]())
    return results


def ratio(before: list[float], after: list[float], digits: int = 3) -> str:
    """Return the paired ratio after / before with its 95 % interval."""
    found = stats.ratio_interval(before, after, confidence=0.95, paired=True)
    return f"{found.estimate:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"

"""One Spark cluster with TensorFlow, a tiny data set, and short trainings on both, shared by the modules that train."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from plugin.tests.plugin_runs import make_job
from sparkgauge.adapters.tensorflow import launch
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.config import GaugeConfig
from sparkgauge.data import Dataset
from sparkgauge.job import Job
from sparkgauge.records import Round
from sparkgauge.report.progress import Progress
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS, GaugeSession, _portable
from sparkgauge.workload import Workload

# property tests fail for what they find, not for a busy machine that is slow to make examples
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

SPEC = ClusterSpec(
    executors=2,
    cores_per_executor=1,
    executor_memory_mebibytes=512,
    python=sys.executable,
    preimport=(*PREIMPORTS["tensorflow"], *PREIMPORTS["torch"]),
)

TRAIN_COUNT, TEST_COUNT = 1001, 203
"""Odd, so that neither batches nor executors divide them."""

CONTRAST = 0.15
"""Faint images make small gradients. On full contrast cifar10_quick multiplies a difference by e every five steps:
rounding errors of 1e-7 are 1e-3 of the loss after 50, in one process too (CIFAR-10, batch 100, three seeds)."""


class SharedCluster:
    """The cluster that modules share; a process can have only one, so it makes way for modules with their own."""

    def __init__(self) -> None:
        self._running: SparkCluster | None = None

    def running(self) -> SparkCluster:
        if self._running is None or self._running.spark is None:
            self._running = SparkCluster.start(SPEC)
            self._running.warm(SPEC.executors)
            launch.prepare()
        return self._running

    def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what shares the cluster first and together: modules with clusters of their own make it start anew."""
    modules = {item.getparent(pytest.Module) for item in items if "shared_cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.getparent(pytest.Module) not in modules)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    shared = SharedCluster()
    yield shared
    shared.stop()


@pytest.fixture(scope="module", autouse=True)
def _one_cluster_at_a_time(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    uses_shared = any("shared_cluster" in getattr(item, "fixturenames", ()) for item in items)
    if hasattr(request.module, "SparkCluster") and not uses_shared:
        request.getfixturevalue("shared_cluster").stop()


@pytest.fixture(scope="session")
def faint_images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return a tiny data set that can be learnt, on which rounding errors stay small."""
    import numpy as np

    from sparkgauge.data.cache import write_prepared
    from sparkgauge.data.layouts import Content
    from sparkgauge.data.synthetic import synthetic_content

    def faint(images: Any) -> Any:
        return (128 + (images.astype(np.float32) - 128) * CONTRAST).astype(np.uint8)

    content = synthetic_content(TRAIN_COUNT, TEST_COUNT)
    pale = Content(faint(content.train_images), content.train_labels, faint(content.test_images), content.test_labels)
    folder = tmp_path_factory.mktemp("faint") / "data"
    write_prepared(pale, folder, kind="user", source="the tests")
    return Dataset.load(folder)


@dataclass(frozen=True)
class Trainings:
    """Runs short trainings on the shared cluster."""

    cluster: SparkCluster
    dataset: Dataset
    session: GaugeSession
    """On the same cluster and data: cleans up after failures as the plugin does."""

    def job(self, fn: Callable[..., Any] | None = None, **changes: Any) -> Job:
        defaults = {"model": "cifar10_quick" if fn is None else "custom", "fn": _portable(fn)}
        return make_job(self.dataset, **{**defaults, **changes})

    def run(self, fn: Callable[..., Any] | None = None, *, timeout_seconds: float = 120, **changes: Any) -> Round:
        """Return a round that is expected to end well."""
        context = self.cluster.spark.sparkContext
        return run_round(context, self.job(fn, **changes), launch.launch, timeout_seconds=timeout_seconds)

    def run_in_session(self, fn: Callable[..., Any], **keywords: Any) -> Round:
        """Return a round of the user's function, run and cleaned up after as in a test of a user."""
        keywords = {"iterations": 3, **keywords, "fn": fn}
        workload = Workload.from_keywords(keywords, self.session.config)
        return self.session.run_round(workload, seed=1, index=0, planned=1)


@pytest.fixture
def trainings(shared_cluster: SharedCluster, faint_images: Dataset, tmp_path: Path) -> Trainings:
    cluster = shared_cluster.running()
    cluster.ensure_alive()
    config = GaugeConfig.build(lambda name: None, lambda name: None, {}, rootdir=tmp_path)
    config = replace(config, executors=SPEC.executors, cores_per_executor=SPEC.cores_per_executor)
    session = GaugeSession(config, tmp_path, Progress(io.StringIO(), enabled=False))
    session._cluster, session._datasets = cluster, {None: faint_images}
    return Trainings(cluster, faint_images, session)

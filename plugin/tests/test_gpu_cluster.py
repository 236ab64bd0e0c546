"""One real cluster whose two workers offer played GPUs: who is given which, what is watched, what is seen of it."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from plugin.tests.plugin_runs import make_job
from sparkgauge import executor, nvml
from sparkgauge.adapters import barrier
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data import Dataset
from sparkgauge.job import Job
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import _portable

pytestmark = pytest.mark.slow

PLAYED = [
    {"name": "A card", "uuid": "GPU-left", "power_watts": 100.0, "utilisation_fraction": 0.5, "driver": "580"},
    {"name": "A card", "uuid": "GPU-right", "power_watts": 200.0, "throttle_bits": 64, "xids": [31]},
]
SPEC = ClusterSpec(
    executors=2,
    cores_per_executor=1,
    executor_memory_mebibytes=512,
    python=sys.executable,
    gpus=(("GPU-left",), ("GPU-right",)),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    listing = tmp_path_factory.mktemp("gpus") / "gpus.json"
    listing.write_text(json.dumps(PLAYED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(nvml.PLAYED_VARIABLE, str(listing))  # workers inherit it, and their executors
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        running = SparkCluster.start(SPEC)
        yield running
        running.stop()


def look(context: Any, shard: Any) -> dict[str, float]:
    """Report what the training process sees, as the adapters' functions would."""
    from sparkgauge import gpu

    visible = gpu.detect()
    for step in context.steps(shard):
        context.record_loss(float(len(step.labels)))
    context.record_test(1, 1)
    told = {"GPU-left": 1.0, "GPU-right": 2.0, "-1": -1.0}
    return {"sees": told[os.environ["CUDA_VISIBLE_DEVICES"]], "count": float(len(visible))}


def enter(job: Job, rank: int, peers: barrier.Peers) -> None:
    """Train as the tasks of an adapter do."""
    executor.run(job, rank, look)


def train(cluster: SparkCluster, dataset: Dataset, **changes: Any) -> Round:
    job = make_job(dataset, **{"device": "gpu", "fn": look, **changes})
    launch: Any = functools.partial(barrier.launch, entry=_portable(enter))
    return run_round(cluster.spark.sparkContext, job, launch, timeout_seconds=60)


def seen(cluster: SparkCluster) -> list[tuple[str, list[str]]]:
    """Return what the two executors' tasks were given."""

    def task(rows: Any) -> Iterator[tuple[str, list[str]]]:
        from pyspark import TaskContext

        context: Any = TaskContext.get()
        yield os.environ.get("CUDA_VISIBLE_DEVICES", "unset"), list(context.resources()["gpu"].addresses)

    return sorted(cluster.spark.sparkContext.parallelize(range(2), 2).barrier().mapPartitions(task).collect())


def test_spark_gives_each_executor_a_gpu_of_its_own(cluster: SparkCluster) -> None:
    settings = dict(cluster.spark.sparkContext.getConf().getAll())
    assert settings["spark.executor.resource.gpu.amount"] == settings["spark.task.resource.gpu.amount"] == "1"
    assert [addresses for _, addresses in seen(cluster)] == [["GPU-left"], ["GPU-right"]]


def test_each_training_sees_its_own_gpu_and_has_it_watched(cluster: SparkCluster, faint_images: Dataset) -> None:
    done = train(cluster, faint_images)
    assert done.metrics["count"] == 1.0
    states = {state.uuid: state for one in done.executors for state in one.gpus}
    assert [len(one.gpus) for one in done.executors] == [1, 1] and set(states) == {"GPU-left", "GPU-right"}
    assert done.executors[0].gpus[0].uuid == {1.0: "GPU-left", 2.0: "GPU-right"}[done.metrics["sees"]]
    left, right = states["GPU-left"], states["GPU-right"]
    assert (left.power_watts, left.utilisation_fraction, left.driver, left.errors) == (100.0, 0.5, "580", ())
    assert left.energy_joules is not None and left.energy_joules > 0
    assert (right.throttled_fraction, right.throttle_reasons, right.errors) == (1.0, ("heat (hardware)",), ("XID 31",))


def test_a_training_on_the_cpu_sees_none(cluster: SparkCluster, faint_images: Dataset) -> None:
    done = train(cluster, faint_images, device="cpu")
    assert (done.metrics["sees"], done.metrics["count"]) == (-1.0, 0.0)
    assert all(one.gpus == () for one in done.executors)


def test_one_of_two_executors_has_one_gpu(cluster: SparkCluster, faint_images: Dataset) -> None:
    done = train(cluster, faint_images, executors=1)
    assert done.metrics["count"] == 1.0 and len(done.executors[0].gpus) == 1

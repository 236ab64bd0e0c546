"""Rounds that lose an executor: they go on from their checkpoint, end with the same weights, and are no samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from sparkgauge.adapters.torch import launch
from sparkgauge.adapters.torch.modules import torch_module
from sparkgauge.cluster import conf, standalone, watchdog
from sparkgauge.errors import TrainingError
from sparkgauge.job import Recovery
from sparkgauge.records import Round
from sparkgauge.rounds import run_round

pytestmark = pytest.mark.slow

ROOT = str(Path(conf.__file__).parents[2])


@pytest.fixture
def train(trainings: Any, tmp_path: Path) -> Callable[..., Round]:
    """Return ``(fn=None, retries=1, **fields of Job) -> Round``, with a checkpoint every 10 steps."""

    def train(fn: Any = None, *, retries: int = 1, every: int | None = 10, folder: str = "", **changes: Any) -> Round:
        place = folder or str(tmp_path / "checkpoints")
        job = trainings.job(fn, recovery=Recovery(retries, every, place if every else ""), **changes)
        context = trainings.cluster.spark.sparkContext
        return run_round(context, job, launch.launch, timeout_seconds=120)

    return train


def make_net() -> Any:
    from torch import nn

    # dropout draws from a generator that each executor advances by its own share of the batch
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(392, 10)
    )


NET = torch_module(make_net)


def _loses_rank_1(context: Any, shard: Any) -> Any:
    """Train the module; executor 1's process is killed once, after step 15."""
    from sparkgauge.adapters.torch.training import train_module

    steps, marker = context.steps, Path(context.options["killed"])

    def watched(shard: Any) -> Any:
        for step in steps(shard):
            yield step
            if step.index == 14 and context.rank == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    context.steps = watched
    return train_module(make_net, {"learning_rate": 0.02, "momentum": 0.9}, context, shard)


def _fit_in_numpy(context: Any, shard: Any) -> dict[str, float]:
    """Add up labels; the executor's JVM is killed once by executor 0, after step 15."""
    import numpy as np

    from sparkgauge.machine import jvm_above

    marker = Path(context.options["killed"])
    state = context.restore()
    total, first = (state["total"], state["step"]) if state else (np.zeros(2), 0)
    for step in context.steps(shard):
        total = total + np.array([len(step.labels), step.index])
        context.record_loss(0.0)
        if context.checkpoint_due:
            context.checkpoint({"total": total, "step": step.index + 1})
        if step.index == 14 and context.rank == 0 and not marker.exists():
            marker.touch()
            os.kill(jvm_above(), signal.SIGKILL)
            time.sleep(60)  # this process dies with its parent, in a moment
    context.record_test(1, 1)
    return {"images": total[0], "indices": total[1], "first_step": first}


def _killed_again_and_again(context: Any, shard: Any) -> None:
    for step in context.steps(shard):
        if step.index == 1 and context.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _raises(context: Any, shard: Any) -> None:
    raise ValueError(f"a bug, met by attempt {context.options}")


def test_a_killed_process_costs_the_steps_since_the_checkpoint_and_nothing_else(train: Any, tmp_path: Path) -> None:
    options = {"killed": str(tmp_path / "killed")}
    lossless = train(_loses_rank_1, iterations=60, options={"killed": str(tmp_path)})
    resumed = train(_loses_rank_1, iterations=60, options=options)
    assert lossless.invalid == ""
    assert resumed.invalid.startswith("retried: executor 1 was lost; went on from the checkpoint after step 10")
    assert "Spark retried stage" in resumed.invalid
    assert [len(record.step_seconds) for record in resumed.executors] == [49, 49]
    # the same weights: every bit of the last losses and of the test is the same
    last, same = lossless.curve[-1], resumed.curve[-1]
    assert (same.step, same.train_loss, same.accuracy_fraction) == (60, last.train_loss, last.accuracy_fraction)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_a_killed_executor_is_replaced_and_a_function_of_the_user_goes_on(
    train: Any, trainings: Any, tmp_path: Path
) -> None:
    options = {"killed": str(tmp_path / "killed")}
    folder = (tmp_path / "through-the-JVM").as_uri()  # a scheme: Hadoop's file systems, by way of the driver
    done = train(_fit_in_numpy, iterations=40, options=options, folder=folder)
    # executor 0's share: 50 of every 100 images, and 500 of 1001 in an epoch
    assert done.metrics == {"images": 500 * 3 + 350, "indices": sum(range(40)), "first_step": 10}
    assert "went on from the checkpoint after step 10" in done.invalid
    trainings.cluster.ensure_alive()


def test_without_checkpoints_a_retried_round_starts_again(train: Any, tmp_path: Path) -> None:
    done = train(_loses_rank_1, every=None, iterations=20, options={"killed": str(tmp_path / "killed")})
    assert "went on from the first step" in done.invalid
    assert [len(record.step_seconds) for record in done.executors] == [19, 19]


def test_when_the_retries_are_used_up_one_error_says_so(train: Any) -> None:
    with pytest.raises(TrainingError, match="Executor 1 .* was lost .*the 1 retries of --gauge-retries are used up"):
        train(_killed_again_and_again, iterations=20)
    assert train(NET, iterations=2).curve[-1].step == 2  # the session goes on


def test_an_exception_is_not_retried(train: Any) -> None:
    with pytest.raises(TrainingError, match="ValueError: a bug"):
        train(_raises, retries=3)


LOSES_ITS_DRIVER = """
import dataclasses, json, os, signal, sys, threading, time
from pathlib import Path
from sparkgauge.adapters.torch import launch
from sparkgauge.channel import Address
from sparkgauge.cluster import watchdog
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data import Dataset
from sparkgauge.job import Job, Recovery
from sparkgauge.rounds import run_round

answer, folder = sys.argv[1:]

def fit(context, shard):
    import os, signal, time
    answer, again = context.options["answer"], context.restore() is not None
    for step in context.steps(shard):
        if context.checkpoint_due:
            context.checkpoint({"step": step.index})
        if context.rank == 1 and not again and os.path.exists(answer + ".checkpoints"):
            time.sleep(0.3)  # the driver hears of the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)
        if context.rank == 0 and again:
            open(answer + ".again", "w").close()
        time.sleep(0.1)

cluster = SparkCluster.start(ClusterSpec(2, 1, 512, sys.executable))
data = Dataset.load(folder)
job = Job(Address("", 0, ""), 2, "custom", "cpu", 5000, None, 100, None, 1, folder, data.train_count, 1, True, fn=fit,
          options={"answer": answer}, recovery=Recovery(1, 2, answer + ".checkpoints"))
threading.Thread(
    target=lambda: run_round(cluster.spark.sparkContext, job, launch.launch, timeout_seconds=100), daemon=True
).start()
while not os.path.exists(answer + ".again"):
    time.sleep(0.02)
time.sleep(0.3)
seen = [dataclasses.asdict(process) for process in watchdog.marked_processes(cluster.mark)]
Path(answer).write_text(json.dumps({"seen": seen, "mark": cluster.mark, "folder": str(cluster.folder)}))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lost_driver_leaves_nothing_although_its_stage_had_been_run_again(faint_images: Any, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    command = [sys.executable, "-c", LOSES_ITS_DRIVER, str(answer), str(faint_images.folder)]
    environment = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(tmp_path)}
    with open(tmp_path / "output", "wb") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=120)
    assert done.returncode == -signal.SIGKILL, (tmp_path / "output").read_text()
    left = json.loads(answer.read_text())
    seen = [watchdog.Process(**fields) for fields in left["seen"]]
    assert sum(conf.DAEMON_MODULE in process.command for process in seen) >= 4  # two daemons and their workers
    assert standalone.wait_until(lambda: not any(map(watchdog.is_running, seen)), 15)
    assert watchdog.marked_processes(left["mark"]) == []
    assert standalone.wait_until(lambda: not Path(left["folder"]).exists(), 15)

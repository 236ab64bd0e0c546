"""Barrier stages on real executors: who runs where, how failures come back, what stays behind."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from sparkgauge import executor
from sparkgauge.adapters import barrier, collective
from sparkgauge.errors import ClusterError, MachineError, TrainingError
from sparkgauge.job import Job
from sparkgauge.rounds import run_round


def report(context: Any, shard: Any) -> dict[str, float]:
    for step in context.steps(shard):
        context.record_loss(float(len(step.labels)))
    context.record_test(1, 1)
    return {"rank": context.rank, "pid": os.getpid()}


def trains(job: Job, rank: int, peers: barrier.Peers) -> None:
    assert peers.rank == rank and peers.host == "127.0.0.1" and len(peers.hosts) == job.executors
    executor.run(job, rank, report)


def breaks_before_it_reports(job: Job, rank: int, peers: barrier.Peers) -> None:
    raise OSError(f"no room on executor {rank}")


def breaks_one(context: Any, shard: Any) -> None:
    if context.rank == 1:
        raise ValueError("nothing to learn here")


def trains_one_broken(job: Job, rank: int, peers: barrier.Peers) -> None:
    executor.run(job, rank, breaks_one)


def _run(trainings: Any, entry: Any, *, retryable: bool = False, close: Any = lambda: None, **changes: Any) -> Any:
    from sparkgauge.session import _portable

    def launch(spark_context: Any, job: Job, *, job_group: str, check: Any) -> Any:
        settings = {"job_group": job_group, "check": check, "retryable": retryable, "close": close}
        return barrier.launch(spark_context, job, entry=_portable(entry), **settings)

    context = trainings.cluster.spark.sparkContext
    return run_round(context, trainings.job(report, **changes), launch, timeout_seconds=60)


@pytest.mark.parametrize("retryable", [False, True], ids=["result", "shuffle"])
def test_every_executor_trains_in_a_process_of_its_own(trainings: Any, retryable: bool) -> None:
    closed: list[bool] = []
    done = _run(trainings, trains, retryable=retryable, close=lambda: closed.append(True))
    assert [record.rank for record in done.executors] == [0, 1]
    assert done.metrics["rank"] == 0 and done.metrics["pid"] != os.getpid()
    assert closed == [True]


def test_an_executors_exception_comes_back_with_its_rank(trainings: Any) -> None:
    closed: list[bool] = []
    with pytest.raises(TrainingError, match="ValueError: nothing to learn here") as caught:
        _run(trainings, trains_one_broken, close=lambda: closed.append(True))
    assert caught.value.executor == 1
    assert closed == [True]


def test_what_fails_before_the_executor_can_speak_comes_back_through_spark(trainings: Any) -> None:
    with pytest.raises(TrainingError, match="no room on executor"):
        _run(trainings, breaks_before_it_reports)


def test_the_callers_own_jobs_keep_their_group(trainings: Any) -> None:
    context = trainings.cluster.spark.sparkContext
    _run(trainings, trains)
    assert context.getLocalProperty("spark.jobGroup.id") is None


class _Settings:
    def __init__(self, value: str | None) -> None:
        self._value = value

    def getConf(self) -> _Settings:
        return self

    def get(self, name: str, default: str) -> str:
        assert name == "spark.dynamicAllocation.enabled"
        return default if self._value is None else self._value


@pytest.mark.parametrize("value", [None, "false", "FALSE"])
def test_fixed_executors_are_accepted(value: str | None) -> None:
    barrier.refuse_dynamic_allocation(_Settings(value))


@pytest.mark.parametrize("value", ["true", " True "])
def test_dynamic_allocation_is_refused(value: str) -> None:
    with pytest.raises(ClusterError, match=r"spark\.dynamicAllocation\.enabled=false"):
        barrier.refuse_dynamic_allocation(_Settings(value))


def test_a_gpu_training_without_gpus_is_refused(trainings: Any) -> None:
    with pytest.raises(TrainingError, match="device='gpu' was asked for, but Spark gave this executor no GPU"):
        _run(trainings, trains, device="gpu")


def test_a_port_that_is_taken_is_named_with_who_wanted_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=rf"expected port {port} to be free.*on the driver"):
            collective._listener("127.0.0.1", port)

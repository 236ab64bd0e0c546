"""Runs a round without Spark, with the executors' own code: what the cost of Spark is measured against."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

from sparkgauge.adapters import collective
from sparkgauge.adapters.barrier import Peers
from sparkgauge.adapters.torch import worker
from sparkgauge.job import Job, Launched
from sparkgauge.records import Round
from sparkgauge.rounds import run_round

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What the executors' environment limits too."""


def run_by_hand(job: Job, *, timeout_seconds: float) -> Round:
    """Return the record of ``job`` trained by plain child processes of this one, which have ended on return.

    Raises what a round on Spark does.
    """
    processes: list[Any] = []

    def start(spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
        import torch

        store = collective.open_store(job)
        meeting = worker.Meeting(store.address if store else None, str(torch.__version__))
        context = multiprocessing.get_context("spawn")
        for rank in range(job.executors):
            processes.append(context.Process(target=_train, args=(meeting, job, rank), daemon=True))
            processes[-1].start()

        def close() -> None:
            for one in processes:
                one.join(timeout_seconds)
            if store is not None:
                store.close()

        return Launched(failure=lambda: None, close=close)

    try:
        with thread_limits(job.threads):
            return run_round(NoSpark(), job, start, timeout_seconds=timeout_seconds)
    finally:
        for one in processes:
            one.kill()
            one.join()


@contextlib.contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """Let children that are started meanwhile compute on ``threads`` threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _train(meeting: worker.Meeting, job: Job, rank: int) -> None:
    worker.main(meeting, job, rank, Peers(hosts=("127.0.0.1",) * job.executors, rank=rank))


class NoSpark:
    """Stands where a round expects a SparkContext: there is no job to watch or to cancel."""

    def statusTracker(self) -> NoSpark:
        """Return this object, which knows of no jobs."""
        return self

    def getJobIdsForGroup(self, group: str) -> list[int]:
        """Return no job."""
        return []

    def cancelJobGroup(self, group: str) -> None:
        """Do nothing: the processes are ended by who started them."""

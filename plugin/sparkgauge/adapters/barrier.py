"""Launches one round as a Spark barrier stage whose tasks train in the executors' own Python processes.

Framework-neutral. All tasks start together (that is what a barrier stage gives), but nothing waits on Spark's
``barrier()``, which polls once a second: frameworks meet over a store of their own.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sparkgauge import device, executor, gpu
from sparkgauge.errors import ClusterError
from sparkgauge.job import Job, Launched

JOIN_SECONDS = 2.0
"""Given to the submitting thread to notice that its job has ended, which it does within milliseconds."""

SLOT_SECONDS = 4.0
"""Given to slots to become free: tasks of an earlier job that was cancelled take 2 s to go."""

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Peers:
    """Who trains together, as one task of the stage sees it."""

    hosts: tuple[str, ...]
    """Host of every executor, by rank."""
    rank: int
    gpus: tuple[str, ...] = ()
    """Addresses of the GPUs that Spark gave this task, the only ones that its process sees; none on the CPU."""

    @property
    def host(self) -> str:
        """Return this executor's own host."""
        return self.hosts[self.rank]


Entry = Callable[[Job, int, Peers], None]
"""``(job, rank, peers)``: what each task runs; a function of an importable module, or a partial of one."""


def launch(
    spark_context: Any,
    job: Job,
    *,
    job_group: str,
    check: Callable[[], None],
    entry: Entry,
    retryable: bool = False,
    close: Callable[[], None] = lambda: None,
) -> Launched:
    """Start ``entry`` on ``job.executors`` executors at once and return; ``close`` is called when the round is over.

    A ``retryable`` stage ends in a shuffle: Spark runs such a barrier stage again, as a whole, when a task is lost
    (``spark.stage.maxConsecutiveAttempts``). Otherwise it is a result stage, which Spark never runs twice. ClusterError
    where executors may come and go.
    """
    refuse_dynamic_allocation(spark_context)
    await_slots(spark_context, job.executors, check)

    def submit() -> None:
        spark_context.setJobGroup(job_group, "sparkgauge: training round", interruptOnCancel=True)
        rows = spark_context.parallelize(range(job.executors), job.executors)
        stage = rows.barrier().mapPartitions(functools.partial(_task, job, entry))
        (stage.repartition(1) if retryable else stage).collect()

    return in_background(submit, close)


def in_background(submit: Callable[[], None], close: Callable[[], None] = lambda: None) -> Launched:
    """Return at once while ``submit`` (a blocking Spark action) runs in a thread with a JVM thread of its own."""
    from pyspark import InheritableThread

    failures: list[str] = []

    def run() -> None:
        try:
            submit()
        except Exception as error:  # whatever Spark raises is the reason that Launched.failure hands on
            failures.append(f"{type(error).__name__}: {error}")

    def end() -> None:
        try:
            thread.join(JOIN_SECONDS)
        finally:
            close()

    # job groups belong to threads: a group set in the caller's would stick to its later jobs
    thread: threading.Thread = InheritableThread(target=run, name="sparkgauge-stage", daemon=True)
    thread.start()
    return Launched(failure=lambda: failures[0] if failures else None, close=end)


def await_slots(spark_context: Any, executors: int, check: Callable[[], None] = lambda: None) -> None:
    """Return when ``executors`` tasks can start at once; ClusterError after SLOT_SECONDS.

    Spark itself would try to start a stage of more tasks for minutes, and one whose slots are taken without an end.
    """
    until = time.monotonic() + SLOT_SECONDS
    while True:
        check()
        total, taken = _slots(spark_context)
        if total - taken >= executors:
            return
        if time.monotonic() > until or executors > total > 0 == taken:
            raise ClusterError(
                "Too few free task slots for a stage whose tasks must all start at once",
                expected=f"{executors}, one for each executor",
                actual=f"{total - taken} free of {total}" + (f", {taken} running other tasks" if taken else ""),
                hint="Ask for fewer executors, give Spark more cores, or end what else runs in this session",
            )
        time.sleep(POLL_SECONDS)


def _slots(spark_context: Any) -> tuple[int, int]:
    """Return how many tasks can run at once, and how many do: by the scheduler's books, which lag behind nothing."""
    scala = spark_context._jsc.sc()
    total = int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().defaultResourceProfile()))
    running = scala.taskScheduler().runningTasksByExecutors().valuesIterator()
    taken = 0
    while running.hasNext():
        taken += int(running.next())
    return total, taken


def refuse_dynamic_allocation(spark_context: Any) -> None:
    """Raise ClusterError where Spark may add and remove executors: it refuses barrier stages then (SPARK-24942)."""
    name = "spark.dynamicAllocation.enabled"
    actual = str(spark_context.getConf().get(name, "false"))
    if actual.strip().lower() == "true":
        raise ClusterError(
            "A barrier stage cannot run while executors come and go",
            expected=f"{name}=false",
            actual=f"{name}={actual}",
            hint="Switch dynamic allocation off for this session",
        )


def _task(job: Job, entry: Entry, rows: Iterator[int]) -> Iterator[int]:
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    peers = _peers(context, job)
    if job.device == "gpu" and not peers.gpus:
        executor.run(job, peers.rank, _no_training, prepare=lambda: device.refuse_without_gpu(peers.gpus, job))
    gpu.expose(peers.gpus)
    entry(job, peers.rank, peers)
    return iter(())


def _no_training(context: Any, shard: Any) -> None:
    raise AssertionError("unreachable: the preparation raises")


def _peers(context: Any, job: Job) -> Peers:
    hosts = tuple(str(info.address).rpartition(":")[0] for info in context.getTaskInfos())
    given = context.resources().get("gpu") if job.device == "gpu" else None
    return Peers(
        hosts=("127.0.0.1",) * len(hosts) if job.loopback else hosts,
        rank=int(context.partitionId()),
        gpus=tuple(given.addresses) if given is not None else (),
    )

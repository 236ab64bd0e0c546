"""Runs one round on the driver: launch on Spark, listen to the executors, end it cleanly however it ends."""

from __future__ import annotations

import base64
import contextlib
import datetime
import itertools
import math
import queue
import re
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sparkgauge import agreement
from sparkgauge.channel import DriverChannel
from sparkgauge.environment import load_average
from sparkgauge.errors import ConfigurationError, DataError, GaugeError, TrainingError, TrainingTimeout
from sparkgauge.job import Job, Launched
from sparkgauge.kernel import reference_seconds
from sparkgauge.machine import process_cpu_seconds
from sparkgauge.records import CurvePoint, ExecutorRecord, GpuState, MachineState, PhaseSeconds, Round, from_json
from sparkgauge.recovery import Attempts

POLL_SECONDS = 0.05
"""Longest wait for a message where something is expected any moment."""

WATCH_SECONDS = 0.5
"""Between two looks at the Spark job: each costs milliseconds of the cores that train. What executors say arrives at
once; only what they cannot say any more is seen here."""

CANCEL_SECONDS = 8.0
"""Given to a cancelled job to end (Spark kills a busy Python worker 2 s after the task's interruption)."""

PEER_SECONDS = 1.0
"""After an error that looks like an echo the others' are awaited so long: one of them may be the cause."""

ECHOES = ("UnavailableError", "CancelledError", "AbortedError", "DeadlineExceeded", "ConnectionReset", "EOFError")
"""How an executor's error begins that may have its cause in another executor."""

Message = dict[str, Any]


class Launch(Protocol):
    """An adapter's launcher; see :func:`sparkgauge.adapters.tensorflow.launch.launch`."""

    def __call__(self, spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
        """Start the job on the executors; ``check`` raises while waiting when the round has failed."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far the training is, as executor 0 sees it."""

    step: int
    total_steps: int
    images_per_second: float
    loss: float | None


def run_round(
    spark_context: Any,
    job: Job,
    launch: Launch,
    *,
    timeout_seconds: float,
    advertised_host: str = "127.0.0.1",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Round:
    """Return the record of one training + test, timed from this call to the last executor's leave.

    The pieces of the reference kernel between the steps are left out.

    ``job.address`` is filled in here. Raises TrainingError with the failing executor's traceback within seconds of the
    failure, TrainingTimeout after ``timeout_seconds``; either way the Spark job has been cancelled on return.
    ConfigurationError where the user's function cannot travel.
    """
    _check_portable(job)
    started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    load = load_average()
    cpu = _DriverCpu(spark_context)
    with DriverChannel("127.0.0.1" if job.loopback else "0.0.0.0", advertised_host) as channel:
        attempts = Attempts(job, channel, spark_context) if job.recovery is not None else None
        conversation = _Conversation(channel, job, timeout_seconds, on_progress, attempts)
        spark_job = _SparkJob(spark_context)
        launched = None
        try:
            launched = launch(
                spark_context,
                replace(job, address=channel.address),
                job_group=spark_job.group,
                check=conversation.pump,
            )
            conversation.await_results(spark_job.failed, launched.failure)
            channel.broadcast({"kind": "release"})
            if not spark_job.await_end(conversation.deadline, conversation.came_back):
                raise conversation.timeout("the executors' tasks did not end")
        except BaseException:
            spark_job.cancel()
            raise
        finally:
            if launched is not None:
                launched.close()
        finished = conversation.round(channel.elapsed(), started_at, load)
        conversation.write_files()
    if attempts is not None:
        attempts.finish()
    invalid = "; ".join(filter(None, [finished.invalid, spark_job.retries()]))
    return replace(finished, driver_cpu_seconds=cpu.seconds(), invalid=invalid)


def time_reference(spark_context: Any, executors: int) -> tuple[float, ...]:
    """Return the reference kernel's wall seconds on each executor, all at once, as a round would keep them busy.

    A task takes all cores of an executor, so that each gets one. TrainingError where Spark cannot run the job.
    """
    numbers = spark_context.parallelize(range(executors), executors)
    try:
        return tuple(numbers.map(lambda _: reference_seconds()).collect())
    except Exception as error:
        raise TrainingError("The reference kernel did not run", actual=_first_cause(str(error))) from error


class _Conversation:
    """What the executors have said in this round."""

    def __init__(
        self,
        channel: DriverChannel,
        job: Job,
        timeout_seconds: float,
        on_progress: Callable[[Progress], None],
        attempts: Attempts | None = None,
    ) -> None:
        self._attempts = attempts
        self._channel, self._job, self._on_progress = channel, job, on_progress
        self._timeout_seconds = timeout_seconds
        self.deadline = time.monotonic() + timeout_seconds
        self._hosts: dict[int, str] = {}
        self._results: dict[int, Message] = {}
        self._errors: list[Message] = []
        self._gone: dict[int, str] = {}
        self._files: dict[str, bytearray] = {}

    def pump(self, wait_seconds: float = 0.0) -> None:
        """Handle what has arrived; raises the executors' error or the timeout."""
        self._receive(wait_seconds)
        if self._errors:
            self._await_cause()
        if self._errors and not self._may_recover():
            raise self._executor_error()
        if self._attempts is not None and self._gone:
            self._await_next(self._attempts)
        if time.monotonic() > self.deadline:
            raise self.timeout(f"no result from executor {self._missing()} by then")

    def timeout(self, actual: str) -> TrainingTimeout:
        """Return the error of a round that took too long."""
        return TrainingTimeout(
            "A training round was cancelled",
            expected=f"at most {self._timeout_seconds:g} s",
            actual=actual,
            hint="Raise --gauge-timeout if it is only slow",
        )

    def await_results(self, failed: Callable[[], bool], reason: Callable[[], str | None]) -> None:
        """Return when every executor has sent its result; raises when the Spark job has ``failed`` before."""
        look_at = 0.0
        while len(self._results) < self._job.executors:
            self.pump(POLL_SECONDS if self._gone else WATCH_SECONDS)
            now = time.monotonic()
            due = now >= look_at or bool(self._gone)
            look_at = now + WATCH_SECONDS if due else look_at
            if (due and failed()) or reason() is not None:  # what could not even be submitted is no job that fails
                self._collect_late_errors()
                raise self._spark_error(reason() or "Spark reports the job as failed")

    def round(self, elapsed_seconds: float, started_at: str, load: float) -> Round:
        """Return the record of the finished round; the reference kernel's pieces are no part of its runtime."""
        results = [self._results[rank] for rank in range(self._job.executors)]
        pieces = statistics.fmean(math.fsum(result.get("reference_seconds", ())) for result in results)
        runtime_seconds = elapsed_seconds - pieces
        executors = tuple(self._executor(rank, runtime_seconds) for rank in range(self._job.executors))
        metrics = results[0]["metrics"]
        parts = [result["curve"] for result in results]
        _check_whole_test(parts, self._job)
        agreement.check([result.get("weights", {}) for result in results], self._job.model)
        curve = _curve(parts, self._job)
        return Round(
            seed=self._job.seed,
            runtime_seconds=runtime_seconds,
            accuracy_fraction=_final_accuracy(curve, metrics, self._job.model),
            images_per_second=_throughput(self._job, executors),
            executors=executors,
            curve=curve,
            load_average=load,
            started_at=started_at,
            metrics=metrics,
            invalid=_retried_tasks(results, self._attempts),
        )

    def write_files(self) -> None:
        """Write the files that executor 0 handed over, each whole or not at all."""
        for ending, content in self._files.items() if self._job.save_to else ():
            write_whole(Path(self._job.save_to + ending), bytes(content))

    def came_back(self) -> bool:
        """Return whether an executor has come back after the results were in, to do the work again for nobody."""
        with contextlib.suppress(queue.Empty):
            while True:
                if self._channel.inbox.get_nowait()["kind"] == "hello":
                    return True
        return False

    def _executor(self, rank: int, runtime_seconds: float) -> ExecutorRecord:
        result = self._results[rank]
        phases = PhaseSeconds(**result["phases"])
        by_cpu, machine = result.get("phase_cpu_seconds"), result.get("machine")
        # the executor's clock stops at its last word; what follows until the driver has all is collecting
        phases = replace(phases, collect=phases.collect + max(0.0, runtime_seconds - phases.total))
        return ExecutorRecord(
            rank=rank,
            host=self._hosts[rank],
            phases=phases,
            step_seconds=tuple(result["step_seconds"]),
            reference_seconds=tuple(result.get("reference_seconds", ())),
            train_images=result["train_images"],
            test_images=result["test_images"],
            cpu_seconds=result["cpu_seconds"],
            phase_cpu_seconds=None if by_cpu is None else from_json(PhaseSeconds, by_cpu, "an executor's CPU seconds"),
            waited_seconds=result.get("waited_seconds"),
            jvm_cpu_seconds=result.get("jvm_cpu_seconds"),
            machine=None if machine is None else from_json(MachineState, machine, "an executor's machine"),
            gpus=tuple(from_json(GpuState, one, "an executor's GPU") for one in result.get("gpus", ())),
        )

    def _receive(self, wait_seconds: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._handle(self._channel.inbox.get(block=wait_seconds > 0, timeout=wait_seconds or None))
            while True:
                self._handle(self._channel.inbox.get_nowait())

    def _handle(self, message: Message) -> None:
        kind, rank = message["kind"], int(message["rank"])
        if self._attempts is not None and not self._admit(message, self._attempts):
            return
        if kind == "hello":
            self._hosts[rank] = str(message["host"])
        elif kind == "progress":
            self._on_progress(
                Progress(message["step"], message["total"], message["images_per_second"], message["loss"])
            )
        elif kind == "result":
            self._results[rank] = message
        elif kind == "error":
            self._errors.append(message)
        elif kind == "file" and re.fullmatch(r"[\w.-]+", str(message["ending"])):  # a name, not a path
            self._files.setdefault(str(message["ending"]), bytearray()).extend(base64.b64decode(message["content"]))
        elif kind == "gone" and rank not in self._results:
            self._gone[rank] = str(message["why"])

    def _admit(self, message: Message, attempts: Attempts) -> bool:
        """Return whether ``message`` counts: what processes of an earlier attempt say does not."""
        if message["kind"] != "hello":
            if belongs := attempts.belongs(message):
                attempts.handle(message)
            return belongs
        if attempts.begins_another(message, bool(self._errors or self._gone)):
            if attempts.left <= 0:
                raise self._spark_error("")
            lost = self._lost()[:1]
            attempts.begin(f"executor {lost[0]} was lost" if lost else "an executor was lost")
            self._results, self._errors, self._gone = {}, [], {}
        attempts.enter(message)
        return True

    def _may_recover(self) -> bool:
        """Return whether the errors may be echoes of a loss after which Spark runs the stage again."""
        return self._attempts is not None and self._attempts.left > 0 and all(map(_is_echo, self._errors))

    def _await_next(self, attempts: Attempts) -> None:
        """Raise where no further attempt is coming."""
        if attempts.used_up:
            self._await_cause()
            raise self._spark_error("")
        if attempts.overdue(bool(self._gone)):
            raise self._spark_error("No replacement for the executor has come")

    def _await_cause(self) -> None:
        """Listen a moment longer while all that was said may come from survivors of what went wrong elsewhere."""
        until = time.monotonic() + PEER_SECONDS
        while self._job.executors > 1 and all(map(_is_echo, self._errors)) and time.monotonic() < until:
            self._receive(POLL_SECONDS)

    def _lost(self) -> list[int]:
        """Return the executors that left without a result and without an error of their own, the first to leave first:
        Spark ends the others' tasks soon after."""
        told = {int(error["rank"]) for error in self._errors}
        return [rank for rank in self._gone if rank not in told]

    def _collect_late_errors(self) -> None:
        until = time.monotonic() + PEER_SECONDS
        while time.monotonic() < until:
            self.pump(POLL_SECONDS)

    def _executor_error(self) -> GaugeError:
        cause = next((error for error in self._errors if not _is_echo(error)), self._errors[0])
        if _is_echo(cause) and self._lost():
            return self._spark_error(f"Executor {cause['rank']} noticed it:\n{cause['traceback']}")
        rank = int(cause["rank"])
        return TrainingError(
            f"Training failed on executor {rank} ({self._hosts.get(rank, 'unknown host')}): {cause['summary']}",
            executor=rank,
            traceback_text=str(cause["traceback"]),
        )

    def _spark_error(self, failure: str) -> GaugeError:
        if lost := self._lost():
            return TrainingError(
                f"Executor {lost[0]} ({self._hosts.get(lost[0], 'unknown host')}) was lost during training",
                executor=lost[0],
                actual="its process ended without a word (killed, out of memory, or a crash in native code)"
                + self._after_retries(),
                hint="Look at the machine's kernel log for the out-of-memory killer; smaller batches need less memory",
                traceback_text=_without_java_frames(failure),
            )
        return TrainingError(
            "Spark ended the training job", actual=_first_cause(failure), traceback_text=_without_java_frames(failure)
        )

    def _after_retries(self) -> str:
        if self._attempts is None or not self._attempts.used_up:
            return ""
        return f", and the {self._attempts.number} retries of --gauge-retries are used up"

    def _missing(self) -> str:
        return ", ".join(str(rank) for rank in range(self._job.executors) if rank not in self._results)


class _SparkJob:
    """The Spark job behind a round, found by its group."""

    def __init__(self, spark_context: Any) -> None:
        self.group = f"sparkgauge-{uuid.uuid4().hex[:12]}"
        self._context = spark_context
        self._tracker = spark_context.statusTracker()

    def failed(self) -> bool:
        """Return whether a job of the group has failed."""
        return "FAILED" in self._statuses()

    def await_end(self, deadline: float, again: Callable[[], bool] = lambda: False) -> bool:
        """Return whether no job of the group is running any more by ``deadline``, so that the next finds free slots.

        Where Spark runs the stage ``again``, although all results are in, the job is cancelled.
        """
        while running := "RUNNING" in self._statuses():
            if time.monotonic() > deadline:
                break
            if again():
                self._context.cancelJobGroup(self.group)
            time.sleep(POLL_SECONDS / 5)
        return not running

    def retries(self) -> str:
        """Return which stages Spark tried again, or lost tasks of; empty where everything ran once."""
        jobs = [self._tracker.getJobInfo(job) for job in self._tracker.getJobIdsForGroup(self.group)]
        stages = [self._tracker.getStageInfo(stage) for job in jobs if job is not None for stage in job.stageIds]
        tried = [one for one in stages if one is not None and (one.currentAttemptId > 0 or one.numFailedTasks > 0)]
        return "; ".join(
            f"Spark retried stage {one.stageId} (attempt {one.currentAttemptId}, {one.numFailedTasks} failed tasks)"
            for one in tried
        )

    def cancel(self) -> None:
        """Cancel the job and wait for its tasks to end."""
        self._context.cancelJobGroup(self.group)
        self.await_end(time.monotonic() + CANCEL_SECONDS)

    def _statuses(self) -> list[str]:
        jobs = self._tracker.getJobIdsForGroup(self.group)
        infos = [self._tracker.getJobInfo(job) for job in jobs]
        return [str(info.status) for info in infos if info is not None]


class _DriverCpu:
    """The CPU time of the driver, its Python and its JVM, since it was made."""

    def __init__(self, spark_context: Any) -> None:
        gateway = getattr(getattr(spark_context, "_gateway", None), "proc", None)
        self._jvm = getattr(gateway, "pid", None)  # None where somebody else started the JVM
        self._before = self._now()

    def seconds(self) -> float | None:
        """Return the seconds; None where the JVM's cannot be read."""
        now = self._now()
        return None if now is None or self._before is None else max(0.0, now - self._before)

    def _now(self) -> float | None:
        jvm = None if self._jvm is None else process_cpu_seconds(self._jvm)
        return None if jvm is None else jvm + time.process_time()


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path`` and move it there; DataError where that is impossible."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise DataError("Cannot write", actual=error.strerror or str(error), where=str(path)) from None


def _retried_tasks(results: list[Message], attempts: Attempts | None) -> str:
    if attempts is not None and attempts.notes:
        return f"retried: {'; '.join(attempts.notes)}"
    tried = [rank for rank, result in enumerate(results) if result.get("attempt", 0) > 0]
    return f"Spark retried the task of executor {', '.join(map(str, tried))}" if tried else ""


def _check_portable(job: Job) -> None:
    """Raise ConfigurationError where the user's function cannot be pickled: TensorFlowOnSpark would hide the reason."""
    if job.fn is None:
        return
    from pyspark import cloudpickle

    try:
        cloudpickle.dumps(job.fn)
    except Exception as error:
        raise ConfigurationError(
            "The training function cannot be sent to the executors",
            expected="a function that pickles, with all it refers to",
            actual=f"{type(error).__name__}: {error}",
            where=f"fn={getattr(job.fn, '__qualname__', job.fn)}",
            hint="Make sessions, locks, open files and models inside the function",
        ) from None


def _is_echo(error: Message) -> bool:
    """Return whether ``error`` may come from an executor whose peer went away: collectives break in the survivors."""
    return str(error["summary"]).startswith(ECHOES)


def _without_java_frames(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("at ", "... "))]
    return "\n".join(lines)


def _first_cause(failure: str) -> str:
    lines = [line.strip() for line in failure.splitlines() if line.strip()]
    caused = [line for line in lines if "Error" in line or "Exception" in line]
    return (caused or lines or ["no reason given"])[0][:300]


def _throughput(job: Job, executors: tuple[ExecutorRecord, ...]) -> float:
    """Return training images per second after the first step, by the slowest executor's steps."""
    slowest = max(sum(record.step_seconds) for record in executors)
    steps = max(len(record.step_seconds) for record in executors)
    images = sum(record.train_images for record in executors)
    return images * steps / (steps + 1) / slowest if slowest > 0 else 0.0


def _final_accuracy(curve: tuple[CurvePoint, ...], metrics: Mapping[str, float], model: str) -> float:
    tested = [point.accuracy_fraction for point in curve if point.accuracy_fraction is not None]
    accuracy = tested[-1] if tested else metrics.get("accuracy_fraction")
    if accuracy is None:
        raise TrainingError(
            f"The training function of {model!r} reported no accuracy",
            expected="context.record_test(correct, tested) on every executor, or a metric named accuracy_fraction",
            actual=f"metrics {sorted(metrics) or 'none'}",
        )
    if not 0.0 <= accuracy <= 1.0:
        raise TrainingError(
            f"The training function of {model!r} reported an impossible accuracy",
            expected="a fraction from 0 to 1",
            actual=f"{accuracy:g}",
        )
    return accuracy


def _check_whole_test(parts: list[list[Message]], job: Job) -> None:
    """Raise TrainingError where the last test did not count every test image once: its accuracy is no test's."""
    steps = [point["step"] for point in itertools.chain.from_iterable(parts) if point.get("tested")]
    if job.test_count is None or not steps:
        return
    last = max(steps)
    counts = [sum(point.get("tested", 0) for point in part if point["step"] == last) for part in parts]
    if sum(counts) != job.test_count:
        by_executor = ", ".join(f"{count:,} on executor {rank}" for rank, count in enumerate(counts))
        raise TrainingError(
            f"The last test of {job.model!r} was not one of the whole test set",
            expected=f"{job.test_count:,} images, each counted by one executor",
            actual=f"{sum(counts):,}: {by_executor}, after step {last}",
            hint="Call context.record_test on every executor for all of shard.test_batches(); what is measured on "
            "other images is a metric: return it by name",
        )


def _curve(parts: list[list[Message]], job: Job) -> tuple[CurvePoint, ...]:
    """Return one point for every step at which an executor kept one; counts and losses are summed over executors."""
    by_step: dict[int, list[Message]] = {}
    for point in itertools.chain.from_iterable(parts):
        by_step.setdefault(point["step"], []).append(point)
    points: list[CurvePoint] = []
    for step, group in sorted(by_step.items()):
        images, tested = sum(p["images"] for p in group), sum(p.get("tested", 0) for p in group)
        if not images and not tested:
            continue
        previous = points[-1].train_loss if points else 0.0
        points.append(
            CurvePoint(
                step=step,
                epoch=_epochs(step, job),
                train_loss=sum(p["loss_sum"] for p in group) / images if images else previous,
                accuracy_fraction=sum(p.get("correct", 0) for p in group) / tested if tested else None,
                elapsed_seconds=max(p["elapsed_seconds"] for p in group),
            )
        )
    return tuple(points)


def _epochs(step: int, job: Job) -> float:
    """Return the epochs after ``step`` steps; the last batch of an epoch may be smaller than the others."""
    whole, rest = divmod(step, -(-job.train_count // job.global_batch))
    return whole + rest * job.global_batch / job.train_count

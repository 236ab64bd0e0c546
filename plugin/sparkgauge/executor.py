"""Runs a training function on an executor: connect to the driver, train, report, leave together.

Framework-neutral; each adapter calls :func:`run` from inside its own Spark task.
"""

from __future__ import annotations

import base64
import contextlib
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge import device
from sparkgauge.channel import ExecutorChannel
from sparkgauge.context import Context
from sparkgauge.errors import DataError, GaugeError
from sparkgauge.gpu_watch import GpuWatch
from sparkgauge.job import Job
from sparkgauge.machine import counters, grown, jvm_above, process_cpu_seconds, state_between, waited_seconds
from sparkgauge.phases import PhaseClock
from sparkgauge.records import to_json

if TYPE_CHECKING:
    from sparkgauge.checkpoints import Checkpoints
    from sparkgauge.data.shards import Shard

PART_BYTES = 8 * 1024 * 1024
"""A checkpoint travels to the driver and back in parts of this size, well below the channel's largest message."""

Train = Callable[[Context, Any], "Mapping[str, float] | None"]
"""``(context, shard)``."""
OpenShard = Callable[[Job, int], Any]
"""``(job, rank)``: returns what ``train`` gets as its shard."""


def run(
    job: Job,
    rank: int,
    train: Train,
    *,
    prepare: Callable[[], Any] = lambda: None,
    prepare_attempt: Callable[[int], Any] | None = None,
    open_shard: OpenShard | None = None,
) -> None:
    """Train on this executor and report to the driver; an exception is reported there first, then raised.

    ``prepare`` makes the framework's handle (rendezvous, devices), timed as launch. ``prepare_attempt`` takes its place
    where the stage may be run again: it is given how often that has happened, and whatever executors meet under must
    be new each time. ``open_shard`` opens another data set than the session's CIFAR-10.
    """
    channel = ExecutorChannel(job.address, rank)
    clock = PhaseClock(channel.driver_start)
    watch = _Watch(job, clock)
    try:
        meeting = _meet(channel) if job.recovery is not None else {"attempt": 0}
        handle = prepare() if prepare_attempt is None else prepare_attempt(int(meeting["attempt"]))
        clock.synchronise = device.synchroniser(job.device, handle)
        context = Context(job, rank, channel, clock, handle, _checkpoints(job, rank, channel, meeting))
        metrics = _checked(train(context, (open_shard or _open_shard)(job, rank)))
        clock.switch("collect")
        channel.send("result", **_summary(context, clock, metrics), **watch.seen(), attempt=attempt())
        _await_release(channel)
    except BaseException as error:
        told = device.explained(error, job)
        with contextlib.suppress(OSError):  # the driver may have gone; Spark reports the exception as well
            channel.send("error", summary=f"{type(told).__name__}: {told}", traceback=_traceback(error))
        raise
    finally:
        watch.stop()
        channel.close()


def _traceback(error: BaseException) -> str:
    """Return where ``error`` came from; nothing for this package's own where only its own code was on the way."""
    files = (Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__))
    own = Path(__file__).parent
    if isinstance(error, GaugeError) and all(file.is_relative_to(own) for file in files):
        return ""
    return "".join(traceback.format_exception(error))


class _Watch:
    """What this process, its JVM and its machine did since it was made."""

    def __init__(self, job: Job, clock: PhaseClock) -> None:
        self._gpus = GpuWatch(lambda: clock.phase).start() if job.device == "gpu" else None
        self._cpu_seconds, self._waited_seconds = time.process_time(), waited_seconds()
        self._jvm = jvm_above()
        self._jvm_seconds = self._jvm_now()
        self._counters = counters()

    def seen(self) -> dict[str, Any]:
        """Return it JSON-ready, as parts of the result message."""
        return {
            "cpu_seconds": time.process_time() - self._cpu_seconds,
            "waited_seconds": grown(self._waited_seconds, waited_seconds()),
            "jvm_cpu_seconds": grown(self._jvm_seconds, self._jvm_now()),
            "machine": to_json(state_between(self._counters, counters())),
            "gpus": [to_json(one) for one in self._gpus.stop()] if self._gpus else [],
        }

    def stop(self) -> None:
        """End what runs beside the training."""
        if self._gpus is not None:
            self._gpus.stop()

    def _jvm_now(self) -> float | None:
        return None if self._jvm is None else process_cpu_seconds(self._jvm)


def attempt() -> int:
    """Return how often Spark had tried this task before; 0 in a training process beside the task."""
    try:
        from pyspark import TaskContext
    except ImportError:
        return 0
    task = TaskContext.get()
    return 0 if task is None else int(task.attemptNumber())


def _meet(channel: ExecutorChannel) -> dict[str, Any]:
    """Return the driver's word that all executors of this attempt are there, with its number and where to go on."""
    while (message := channel.receive()).get("kind") != "meet":
        pass
    return message


def _checkpoints(job: Job, rank: int, channel: ExecutorChannel, meeting: Mapping[str, Any]) -> Checkpoints | None:
    if job.recovery is None or not job.recovery.folder:
        return None
    from sparkgauge.checkpoints import Checkpoints, Folder, is_uri

    folder = job.recovery.folder
    storage = _DriversStorage(channel) if is_uri(folder) else Folder(Path(folder))
    return Checkpoints(
        job,
        storage,
        latest=str(meeting.get("checkpoint", "")),
        writes=rank == 0,
        announce=lambda name, step: channel.send("checkpoint", name=name, step=step),
    )


class _DriversStorage:
    """Checkpoints that the driver keeps, since only a JVM reaches Hadoop's file systems."""

    def __init__(self, channel: ExecutorChannel) -> None:
        self._channel = channel

    def write(self, name: str, content: bytes) -> None:
        """Send ``content`` to the driver in parts."""
        for start in range(0, len(content), PART_BYTES):
            part = base64.b64encode(content[start : start + PART_BYTES]).decode()
            self._channel.send("part", name=name, data=part)

    def read(self, name: str) -> bytes:
        """Return what the driver has kept under ``name``; DataError with its reason where it cannot read it."""
        self._channel.send("fetch", name=name)
        parts: list[bytes] = []
        while (message := self._channel.receive()).get("kind") == "part":
            parts.append(base64.b64decode(message["data"]))
        if message.get("kind") != "fetched":
            raise DataError("The driver cannot read a checkpoint", actual=str(message.get("why")), where=name)
        return b"".join(parts)


def _open_shard(job: Job, rank: int) -> Shard:
    from sparkgauge.data.shards import Shard

    folder = data_folder(job)
    return Shard.open(folder, executors=job.executors, rank=rank, global_batch=job.global_batch, seed=job.seed)


def data_folder(job: Job) -> Path:
    """Return the folder of the prepared data on this executor."""
    if job.dataset_folder:
        return Path(job.dataset_folder)
    from pyspark import SparkFiles

    return Path(SparkFiles.getRootDirectory())


def _summary(context: Context, clock: PhaseClock, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "phases": to_json(clock.seconds()),
        "phase_cpu_seconds": to_json(clock.cpu_seconds()),
        "step_seconds": context.step_seconds,
        "reference_seconds": context.reference_seconds,
        "curve": context.curve,
        "train_images": context.train_images,
        "test_images": context.test_images,
        "metrics": metrics,
        "weights": context.weights,
    }


def _checked(metrics: object) -> dict[str, float]:
    """Return the user's metrics as finite floats by name; TypeError or FloatingPointError says which one is not."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"fit must return a mapping of metric names to numbers or None, got {type(metrics).__name__}")
    return {str(name): _finite(name, value) for name, value in metrics.items()}


def _finite(name: object, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("a text, even where float() could read it")
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {name!r} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise FloatingPointError(f"metric {name!r} is {number}, not a finite number")
    return number


def _await_release(channel: ExecutorChannel) -> None:
    """Block until the driver has every executor's result: leaving earlier breaks the peers' last collectives."""
    while channel.receive().get("kind") != "release":
        pass

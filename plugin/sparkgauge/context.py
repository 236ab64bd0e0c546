"""What a training function sees on its executor: who it is, its batches, and where to report."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparkgauge.agreement import fingerprint
from sparkgauge.channel import ExecutorChannel
from sparkgauge.job import Job
from sparkgauge.kernel import BetweenSteps
from sparkgauge.phases import PhaseClock

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparkgauge.checkpoints import Checkpoints

PROGRESS_SECONDS = 0.5
"""Least time between two progress messages: a terminal shows no more, and the wire stays idle."""

CURVE_STEPS = 50
"""A point of the learning curve is kept every so many steps, and at each test."""

FILE_PART_BYTES = 4 * 1024 * 1024
"""Of a file in one message."""


@dataclass(frozen=True)
class Step:
    """One training step of this executor."""

    index: int
    """0-based, over all epochs."""
    images: NDArray[np.uint8]
    """This executor's part of the global batch, shape (b, 32, 32, 3); b may be 0 in a small last batch."""
    labels: NDArray[np.uint8]
    """Shape (b,)."""
    global_batch: int
    """Images of this step over all executors: divide summed losses by it."""


class Batches(Protocol):
    """What :meth:`Context.steps` needs of a shard."""

    @property
    def sampler(self) -> Any:
        """Return the order of the images."""

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return this executor's images, or what stands for them, and labels of the global step."""


class Context:
    """Passed to ``fit(context, shard)`` on each executor.

    A ``fit`` that takes its batches from :meth:`steps` gets feed, warm-up and compute timed without further work;
    :meth:`phase` marks other phases, :meth:`record_loss` and :meth:`record_test` fill the learning curve.
    """

    def __init__(
        self,
        job: Job,
        rank: int,
        channel: ExecutorChannel,
        clock: PhaseClock,
        handle: Any = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Made by the executor's runner, not by users."""
        self.rank = rank
        """This executor's index, 0 to ``executors`` - 1."""
        self.executors = job.executors
        self.device = job.device
        self.seed = job.seed
        """Seed of this round: initial weights, order of the images, augmentation."""
        self.global_batch = job.global_batch
        self.iterations = job.iterations
        self.epochs = job.epochs
        self.test_every = job.test_every
        self.threads = job.threads
        self.options: Mapping[str, Any] = job.options
        self.plan = job.plan
        self.save_to = job.save_to
        self.handle = handle
        """The framework's own handle: with TensorFlow the ``MultiWorkerMirroredStrategy``."""
        self.step_seconds: list[float] = []
        self.reference_seconds: list[float] = []
        """Wall seconds of the reference kernel's pieces between the steps; none on GPUs, whose pace it cannot tell."""
        self.curve: list[dict[str, float]] = []
        self.train_images = 0
        self.test_images = 0
        self.weights: dict[str, list[float]] = {}
        """What :meth:`record_weights` has made of this executor's weights."""
        self._injections = job.injections
        self._channel, self._clock = channel, clock
        self._step_images = 0
        self._loss_sum, self._loss_images, self._last_loss = 0.0, 0, math.nan
        self._checkpoints = checkpoints
        self._step_number = self._first_step = 0
        self._tested_step = -1
        self._next_progress = 0.0

    def total_steps(self, shard: Batches) -> int:
        """Return the number of training steps of this round."""
        if self.iterations is not None:
            return self.iterations
        return math.ceil((self.epochs or 1) * int(shard.sampler.steps_per_epoch))

    def steps(self, shard: Batches) -> Iterator[Step]:
        """Yield every training step of the round, timing how long the batch and the body take.

        After :meth:`restore` has found a checkpoint the first one is the step that follows it.
        """
        total = self.total_steps(shard)
        kernel = BetweenSteps(total) if self.device == "cpu" else None
        for index in range(self._first_step, total):
            began, excluded = time.monotonic(), self._excluded_seconds()
            self._clock.switch("feed")
            images, labels = shard.batch(index)
            self._inject("feed", time.monotonic() - began)
            self._step_images = len(labels)
            self._step_number = index + 1
            self._clock.switch("compute" if index > self._first_step else "warmup")
            body = time.monotonic()
            yield Step(index, images, labels, shard.sampler.global_batch_size(index))
            if index + 1 == total:
                self._clock.synchronise()  # the last steps may still be queued on the device
            tested = self._excluded_seconds() - excluded
            self._inject("compute", time.monotonic() - body - tested)
            self.train_images += len(labels)
            if index > self._first_step:
                self.step_seconds.append(time.monotonic() - began - tested)
            self._after_step(index, total)
            if kernel is not None and kernel.is_due(index):
                self._time(kernel)
        self._clock.switch("collect")

    @property
    def checkpoint_due(self) -> bool:
        """Return whether to call :meth:`checkpoint` after this step; the same on every executor."""
        return self._checkpoints is not None and self._checkpoints.due(self._step_number)

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Keep ``state`` (arrays, tensors, plain values, and mappings and lists of them) as it is after this step.

        Executor 0's state is kept, the others' are ignored: what they need must be in it. TypeError names a value that
        cannot be kept. Nothing happens without ``checkpoint_every``.
        """
        if self._checkpoints is not None:
            with self.phase("collect"):
                self._checkpoints.write(self._step_number, state)

    def restore(self) -> dict[str, Any] | None:
        """Return the state to go on from, None in a round that starts from scratch; call it before :meth:`steps`.

        That is executor 0's last :meth:`checkpoint` in an earlier attempt of this round. DataError where the file is
        damaged or of another training.
        """
        found = self._checkpoints.read() if self._checkpoints is not None else None
        if found is None:
            return None
        self._first_step, state = found
        self._step_number = self._first_step
        return state

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager whose block is timed as phase ``name`` (see records.PHASES)."""
        return self._clock.during(name)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Reattribute ``seconds`` of phase ``source`` to ``target``, known only after a compiled step returned."""
        self._clock.move(source, target, seconds)

    def record_loss(self, loss_sum: float, images: int | None = None) -> None:
        """Add this step's loss, summed over this executor's ``images`` (the step's own by default).

        Raises FloatingPointError when it is not finite: training on is pointless, and a test must not pass on it.
        """
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"the training loss is {loss_sum} at step {self._step_number}")
        self._loss_sum += loss_sum
        self._loss_images += self._step_images if images is None else images

    def record_test(self, correct: int, tested: int) -> None:
        """Report that this executor classified ``correct`` of ``tested`` images of the test set right.

        Calls after the same step add up to one test, so a test may be reported batch by batch.
        """
        if not 0 <= correct <= tested:
            raise ValueError(f"record_test: expected 0 <= correct <= tested, got {correct} and {tested}")
        earlier = self.test_images if self._tested_step == self._step_number else 0
        self.test_images, self._tested_step = earlier + int(tested), self._step_number
        self._point(correct=int(correct), tested=int(tested))

    def record_weights(self, weights: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> None:
        """Report this executor's weights (arrays by name) at the end: a round whose executors' differ is an error.

        A few numbers of each travel to the driver. Nothing happens on a single executor: a function that returns the
        weights, in place of them, is not called there.
        """
        if self.executors > 1:
            self.weights = fingerprint(weights() if callable(weights) else weights)

    def send_file(self, ending: str, content: bytes) -> None:
        """Hand a file to the driver, which writes it as ``save_to`` + ``ending`` once the round has ended well."""
        for start in range(0, max(len(content), 1), FILE_PART_BYTES):
            part = base64.b64encode(content[start : start + FILE_PART_BYTES]).decode()
            self._channel.send("file", ending=ending, content=part)

    def _time(self, kernel: BetweenSteps) -> None:
        with self._clock.paused():
            kernel.time()
        self.reference_seconds = kernel.seconds

    def _after_step(self, index: int, total: int) -> None:
        if (index + 1) % CURVE_STEPS == 0 or index + 1 == total:
            self._point()
        now = time.monotonic()
        if self.rank == 0 and now >= self._next_progress and self.step_seconds:
            self._next_progress = now + PROGRESS_SECONDS
            recent = self.step_seconds[-CURVE_STEPS:]
            rate = self.global_batch * len(recent) / max(sum(recent), 1e-9)  # a coarse clock may see no time pass
            self._channel.send(
                "progress", step=index + 1, total=total, images_per_second=rate, loss=_or_none(self._last_loss)
            )

    def _point(self, **test: int) -> None:
        if self._loss_images:
            self._last_loss = self._loss_sum / self._loss_images
        elapsed = time.monotonic() - self._channel.driver_start - self._clock.paused_seconds
        point = {"step": self._step_number, "loss_sum": self._loss_sum, "images": self._loss_images}
        self.curve.append({**point, "elapsed_seconds": elapsed, **test})
        self._loss_sum, self._loss_images = 0.0, 0

    def _excluded_seconds(self) -> float:
        return self._clock.spent("evaluate")

    def _inject(self, phase: str, seconds: float) -> None:
        if fraction := self._injections.get(phase):
            time.sleep(fraction * max(seconds, 0.0))


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

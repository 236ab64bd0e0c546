"""One ``train(...)`` call of a test: its rounds, taken when somebody looks, and the quantities that can be gated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.gate import Measurement, Policy, Samples, samples_of
from sparkgauge.records import Round, RunRecord, Verdict
from sparkgauge.stats import Better
from sparkgauge.workload import Workload

RunRound = Callable[[Workload, int, int, int], Round]
"""``(workload, seed, round index, rounds planned) -> Round``."""


@dataclass
class Budget:
    """Time a test may spend on rounds beyond the planned ones, shared by all its trainings."""

    seconds: float

    def spend(self, seconds: float) -> None:
        """Take ``seconds`` off."""
        self.seconds -= seconds

    def allows(self, seconds: float) -> bool:
        """Return whether another ``seconds`` fit."""
        return seconds <= self.seconds


@dataclass(repr=False)
class Training:
    """What ``train(...)`` returns: the rounds are run when a result is first asked for, or when the test ends.

    Trainings of one test that nobody has looked at yet are then run together, their rounds interleaved, so that a
    machine that slows down or speeds up does so for all of them.
    """

    label: str
    workload: Workload
    policy: Policy
    max_rounds: int
    budget: Budget
    settle: Callable[[], None] = field(repr=False)
    """Runs the planned rounds of all pending trainings of the test."""
    run_round: RunRound = field(repr=False)
    describe: Callable[[Training], RunRecord] = field(repr=False)
    observer: Callable[[Verdict, Samples], None] = field(repr=False)
    rounds: list[Round] = field(default_factory=list)
    timed: bool = False
    """Whether pytest-benchmark timed the rounds (it does not under --benchmark-disable and under xdist)."""
    can_be_timed: bool = True
    """False where that is known before a round is run."""
    rounds_at_once: int = 1
    """Rounds that one more sample costs: 2 where each has its counterpart on the other side (``--gauge-against``)."""
    on_extra_round: Callable[[Round], None] = field(default=lambda extra: None, repr=False)

    def __repr__(self) -> str:
        workload = self.workload
        what = f"{workload.framework} {workload.model} on {workload.executors} x {workload.device}"
        return f"<training {self.label!r}: {what}, {len(self.rounds)} rounds, {workload.rounds} planned>"

    @property
    def runtime(self) -> Measurement:
        """Return the wall seconds of training + test on a warm session; less is better."""
        return self._measurement("runtime_seconds")

    @property
    def accuracy(self) -> Measurement:
        """Return the share of the whole test set classified right, one sample per round and seed; more is better."""
        return self._measurement("accuracy_fraction")

    @property
    def images_per_second(self) -> Measurement:
        """Return the training throughput over all executors after the first step; more is better."""
        return self._measurement("images_per_second")

    @property
    def record(self) -> RunRecord:
        """Return everything measured so far, running the planned rounds first where that has not been done."""
        if not self.rounds:
            self.settle()
        return self.describe(self)

    def metric(self, name: str, *, better: Better | None = None, unit: str | None = None) -> Measurement:
        """Return a quantity by name: a phase (``sync_seconds``), ``cpu_seconds``, or a metric of the user's ``fit``.

        ``better`` ("lower" or "higher") is needed where the name does not say it. NotMeasuredError for unknown names.
        """
        return self._measurement(name, better=better, unit=unit)

    def next_seed(self) -> int:
        """Return the seed of the next round: seeds differ between rounds and are the same in every run."""
        return self.workload.seed + len(self.rounds)

    def _measurement(self, metric: str, *, better: Better | None = None, unit: str | None = None) -> Measurement:
        __tracebackhide__ = True
        record = self.record if self.can_be_timed else None
        if record is None or not self.timed:
            raise NotMeasuredError(
                f"{metric} of {self.label!r} was not measured",
                expected="rounds timed by pytest-benchmark, one test at a time",
                actual="benchmarks are disabled (--benchmark-disable, or workers of pytest-xdist)",
                hint="Run without them: a gated assert cannot pass on what was not measured.",
            )

        def samples() -> Samples:
            return samples_of(self.describe(self), metric, unit=unit, better=better)

        def more() -> Samples | None:
            return samples() if self._take_one_more() else None

        own = samples_of(record, metric, unit=unit, better=better)
        return Measurement(own, more=more, policy=self.policy, observer=self.observer)

    def _take_one_more(self) -> bool:
        """Return whether one more valid round was taken; what Spark retried is kept and does not count."""
        while self._allows_one_more():
            began = time.monotonic()
            extra = self.run_round(self.workload, self.next_seed(), len(self.rounds), len(self.rounds) + 1)
            self.budget.spend(time.monotonic() - began)
            self.rounds.append(extra)
            self.on_extra_round(extra)
            if not extra.invalid:
                return True
        return False

    def _allows_one_more(self) -> bool:
        expected = self.rounds_at_once * max(one.runtime_seconds for one in self.rounds)
        return len(self.rounds) < self.max_rounds and self.budget.allows(expected)


class BaselineView:
    """The ``baseline`` fixture: the stored side of a test's quantities.

    ``baseline.runtime`` belongs to the fixture ``trained`` and to a test's first ``train()`` call;
    ``baseline["label"].runtime`` to the call with that label.
    """

    def __init__(self, quantity: Callable[[str, str], Any], label: str) -> None:
        """``quantity(metric, label)`` returns a :class:`~sparkgauge.gate.BaselineQuantity`."""
        self._quantity, self._label = quantity, label

    def __repr__(self) -> str:
        return f"<baseline of {self._label!r}>"

    def __getitem__(self, label: str) -> BaselineView:
        return BaselineView(self._quantity, label)

    @property
    def runtime(self) -> Any:
        """Return the stored runtimes."""
        return self._quantity("runtime_seconds", self._label)

    @property
    def accuracy(self) -> Any:
        """Return the stored accuracies."""
        return self._quantity("accuracy_fraction", self._label)

    @property
    def images_per_second(self) -> Any:
        """Return the stored throughputs."""
        return self._quantity("images_per_second", self._label)

    @property
    def speedup(self) -> Any:
        """Return the stored speed-ups of the test."""
        return self._quantity("speedup_ratio", self._label)

    @property
    def efficiency(self) -> Any:
        """Return the stored efficiencies of the test."""
        return self._quantity("efficiency_ratio", self._label)

    def metric(self, name: str) -> Any:
        """Return the stored samples of any other metric."""
        return self._quantity(name, self._label)


def pick_label(wanted: str | None, taken: list[str]) -> str:
    """Return the label of a ``train()`` call: the one wanted, ``trained`` for the first, then ``trained-2``, ..."""
    label = wanted or ("trained" if not taken else f"trained-{len(taken) + 1}")
    if label in taken:
        raise ConfigurationError(
            "Two trainings of one test have the same label", actual=repr(label), hint="Give label="
        )
    if not label.replace("-", "").replace("_", "").isalnum():
        raise ConfigurationError("Bad label", expected="letters, digits, '-' and '_'", actual=repr(label))
    return label

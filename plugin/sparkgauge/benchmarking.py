"""Hands every round to pytest-benchmark, so that its tables, JSON files and comparisons show what was measured."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparkgauge.records import PHASES, Round, RunRecord
from sparkgauge.store import DEFAULT_LABEL
from sparkgauge.workload import Workload


class BenchmarkTimer:
    """Times rounds with a test's ``benchmark`` fixture: one entry per training of the test."""

    def __init__(self, benchmark: Any) -> None:
        """Use ``benchmark`` (pytest-benchmark's fixture) for the first training and copies of it for the others."""
        self._benchmark = benchmark
        self._entries: dict[str, Any] = {}
        self._left_out = 0.0

    @property
    def is_enabled(self) -> bool:
        """Return whether rounds will be timed: not under ``--benchmark-disable`` and not by workers of xdist."""
        return not self._benchmark.disabled

    def __call__(
        self,
        label: str,
        workload: Workload,
        take: Callable[[], Round],
        rounds: int,
        warmup_rounds: int,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Take the rounds under the clock; return whether they were timed (not under ``--benchmark-disable``).

        ``before`` runs before each of them, outside the clock.
        """
        __tracebackhide__ = True
        entry = self._entry(label)

        def timed() -> Round:
            __tracebackhide__ = True
            taken = take()
            self._left_out += taken.pieces_seconds
            return taken

        if entry.stats is not None:
            for _ in range(rounds):
                before()
                began = self._training_clock()
                timed()
                entry.stats.update(self._training_clock() - began)
        else:
            entry.pedantic(timed, setup=before, rounds=rounds, warmup_rounds=warmup_rounds, iterations=1)
        return entry.stats is not None

    def leave_out(self, label: str, rounds: Sequence[Round]) -> None:
        """Take rounds that measured nothing out of the statistics, unless nothing would be left of them."""
        stats = self._entry(label).stats
        seconds: list[float] = [] if stats is None else stats.stats.data
        if len(seconds) == len(rounds):  # else it was done already
            seconds[:] = [one for one, taken in zip(seconds, rounds, strict=True) if not taken.invalid] or seconds

    def add(self, label: str, extra: Round) -> None:
        """Count a round that the gate asked for beyond the planned ones."""
        stats = self._entry(label).stats
        if stats is not None:
            stats.update(extra.runtime_seconds)

    def describe(self, run: RunRecord, status: str) -> None:
        """Put the run's scalars where ``pytest-benchmark compare`` and ``--benchmark-json`` show them."""
        self._entry(run.label).extra_info.update(scalars(run), status=status)

    def _training_clock(self) -> float:
        """Return the time of a clock that stood still while the reference kernel ran between steps."""
        return time.perf_counter() - self._left_out

    def _entry(self, label: str) -> Any:
        if label not in self._entries:
            entry = self._benchmark if not self._entries else self._branch(label)
            entry._timer = self._training_clock
            self._entries[label] = entry
        return self._entries[label]

    def _branch(self, label: str) -> Any:
        """Return a fixture of its own for a further training: pytest-benchmark allows one use per fixture."""
        branch = copy.copy(self._benchmark)
        branch.name, branch.fullname = f"{branch.name}:{label}", f"{branch.fullname}:{label}"
        branch.extra_info, branch.stats, branch._mode = {}, None, None
        return branch


def scalars(run: RunRecord) -> dict[str, Any]:
    """Return a run's single values: what was trained, and the means over its rounds."""
    rounds = run.valid_rounds or run.rounds
    phases = {
        f"{phase}_seconds": statistics.fmean(getattr(e.phases, phase) for one in rounds for e in one.executors)
        for phase in PHASES
    }
    return {
        **{name: run.workload[name] for name in ("framework", "model", "device", "executors", "batch_size")},
        "data": f"{run.data.name} ({run.data.kind})",
        "profile": run.profile,
        "hardware_class": run.environment.hardware_class,
        "images_per_second": statistics.fmean(one.images_per_second for one in rounds),
        "accuracy_fraction": statistics.fmean(one.accuracy_fraction for one in rounds),
        **phases,
        **({"label": run.label} if run.label != DEFAULT_LABEL else {}),
    }

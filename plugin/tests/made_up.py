"""Made-up records: the one place that knows which fields a round, a run and a baseline have."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparkgauge.records import (
    Approval,
    Baseline,
    DataIdentity,
    Environment,
    ExecutorRecord,
    MachineState,
    PhaseSeconds,
    Round,
    RunRecord,
)
from sparkgauge.store import baseline_of

DATA = DataIdentity("cifar10", "real", "ab" * 32, 50_000, 10_000)
MACHINE = Environment("linux-2c", "CPU", 2, 8 << 30, (), "Linux", {"python": "3.11", "spark": "4.0"})
APPROVAL = Approval("me", "2026-06-30T00:00:00+00:00", "first")
TEST_ID = "perf/test_a.py::test_quick"


def make_executor(rank: int = 0, *, cpu_seconds: float = 4.0, **fields: Any) -> ExecutorRecord:
    """Return an executor's part of a round; ``fields`` that are phases are its seconds in them."""
    seconds = {name: fields.pop(name) for name in list(fields) if name in PhaseSeconds.__dataclass_fields__}
    phases = PhaseSeconds(**(seconds or {"launch": 1.0, "compute": 8.0, "evaluate": 1.0}))
    return dataclasses.replace(ExecutorRecord(rank, "localhost", phases, (0.1,), 500, 50, cpu_seconds), **fields)


def make_round(
    seed: int = 1, runtime_seconds: float = 10.0, executors: int | tuple[ExecutorRecord, ...] = 1, **fields: Any
) -> Round:
    """Return a round; ``fields`` that are a round's are set, the others go to each of so many executors."""
    own = {name: fields.pop(name) for name in list(fields) if name in Round.__dataclass_fields__}
    if isinstance(executors, int):
        executors = tuple(make_executor(rank, **fields) for rank in range(executors))
    one = Round(seed, runtime_seconds, 0.7, 1000.0, executors, (), 0.5, "2026-06-30T00:00:00Z")
    return dataclasses.replace(one, **own)


def make_run(*rounds: Round, **fields: Any) -> RunRecord:
    """Return a run of ``rounds``, by default four of about 10 s that learn a little better each."""
    taken = rounds or tuple(
        make_round(seed, 10.0 + seed / 10, accuracy_fraction=0.70 + seed / 1000) for seed in range(1, 5)
    )
    run = RunRecord(TEST_ID, "trained", {"model": "quick"}, "ci", DATA, MACHINE, "abc", taken)
    return dataclasses.replace(run, **fields)


def make_baseline(*runs: RunRecord, approved: Approval = APPROVAL) -> Baseline:
    """Return the baseline that ``runs``, by default one of :func:`make_run`, become."""
    return baseline_of(runs or [make_run()], approved)


def make_state(**fields: Any) -> MachineState:
    """Return what a quiet machine did in ten seconds."""
    return dataclasses.replace(MachineState(10.0, 0.5, 0.0, 0.0, 0, 0), **fields)

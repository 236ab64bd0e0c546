"""Straggling, exposed communication and ceilings of made-up rounds, and the lines that say so."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from plugin.tests.plugin_runs import make_round, make_run
from sparkgauge import ceiling, ranks
from sparkgauge.records import Ceiling, PhaseSeconds, Round, RunRecord, from_json, to_json
from sparkgauge.report.limit_lines import limit_lines, rank_lines
from sparkgauge.store import run_samples

LIMIT = Ceiling(gemm_gflops=207.63, memory_gigabytes_per_second=20.0, precision="float32")


def _round() -> Round:
    """Return a round whose second executor works 3 s of 4 s while the first works 1 s and waits."""
    one = make_round()
    phases = (PhaseSeconds(feed=0.25, compute=0.75, sync=2.0), PhaseSeconds(feed=1.0, compute=2.0))
    shares = tuple(replace(share, phases=own) for share, own in zip(one.executors, phases, strict=True))
    return replace(one, executors=shares, metrics={"reduced_bytes": 3.0 * 2**20})


def test_the_busiest_executor_and_the_waiting_are_quantified() -> None:
    assert ranks.straggler_ratio(_round()) == 1.5
    assert ranks.exposed(_round()) == pytest.approx(2 / 6)
    samples = run_samples(make_run(rounds=(_round(), _round())))
    assert samples["straggler_ratio"] == (1.5, 1.5) and samples["exposed_fraction"] == pytest.approx((1 / 3, 1 / 3))


def test_one_executor_neither_straggles_nor_waits() -> None:
    alone = replace(_round(), executors=_round().executors[:1])
    run = make_run(rounds=(alone,))
    assert ranks.straggler_ratio(alone) == 1.0
    assert "straggler_ratio" not in run_samples(run) and rank_lines(run) == []


def test_an_executor_that_did_nothing_is_no_division_by_zero() -> None:
    idle = replace(_round(), executors=tuple(replace(e, phases=PhaseSeconds()) for e in _round().executors))
    assert ranks.straggler_ratio(idle) == 1.0 and ranks.exposed(idle) == 0.0


def test_the_lines_name_work_ceiling_ranks_and_bytes() -> None:
    run = replace(make_run(rounds=(_round(),)), ceiling=LIMIT)  # 1500 images/s of cifar10_quick: 103.8 GFLOP/s
    assert ceiling.ceiling_fraction(run) == pytest.approx(0.5, rel=1e-3)
    (line,) = limit_lines(run)
    assert "103.8 GFLOP/s, 50% of 208 GFLOP/s (float32 GEMM), memory 20.0 GB/s" in line
    head, first, second = rank_lines(run)
    assert head == "straggler ratio 1.500, exposed communication 33.3%, 3.0 MiB reduced a round and executor"
    assert "executor 0 (host): own work 1.00 s, sync 2.00 s, steps 100.0 ms, slowest 100.0 ms" in first
    assert "executor 1 (host): own work 3.00 s, sync 0.00 s" in second


def test_without_a_ceiling_or_counted_work_less_is_said() -> None:
    run = make_run(rounds=(_round(),))
    assert limit_lines(run) == ["test_file.py::test_a: 103.8 GFLOP/s"] and ceiling.ceiling_fraction(run) is None
    assert limit_lines(replace(run, workload={**run.workload, "model": "custom"})) == []


def test_a_broken_library_has_no_ceiling_and_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training that follows says what is wrong, on which executor."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert ceiling._on_executor(1, "cpu", 0) is None


def test_the_ceiling_survives_the_record() -> None:
    run = replace(make_run(), ceiling=LIMIT)
    assert from_json(RunRecord, to_json(run)) == run

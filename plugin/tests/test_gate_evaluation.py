"""The script behind the published error rates: its rules of other tools, its resampling, its verdict on targets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT, TRACES = DOCS / "gate_evaluation.py", sorted((DOCS / "traces").glob("*.npz"))

if not SCRIPT.is_file():
    pytest.skip("docs/gate_evaluation.py is not in this copy of the package", allow_module_level=True)


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("gate_evaluation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


evaluation = _load()


def sides(before: list[float], after: list[float]) -> tuple[Any, Any]:
    return np.array([before]), np.array([after])


@pytest.mark.parametrize(("factor", "called"), [(1.0499, False), (1.0501, True)])
def test_mean_5_percent_fails_beyond_5_percent(factor: float, called: bool) -> None:
    assert evaluation.mean_5_percent(*sides([1.0, 1.0], [factor, factor]))[0] == called


def test_asv_can_call_nothing_at_six_against_six() -> None:
    before, after = sides([1.0] * 6, [100.0] * 6)
    before = before + np.arange(6) / 1000
    assert not evaluation.asv_rule(before, after)[0]


@pytest.mark.parametrize(("factor", "called"), [(1.09, False), (1.11, True)])
def test_asv_needs_its_factor_between_the_medians(factor: float, called: bool) -> None:
    before = np.linspace(0.999, 1.001, 9)[None, :]
    assert evaluation.asv_rule(before, before * factor)[0] == called


@pytest.mark.parametrize(("factor", "called"), [(1.049, False), (1.051, True)])
def test_welch_needs_5_percent_and_significance(factor: float, called: bool) -> None:
    before = np.linspace(0.999, 1.001, 9)[None, :]
    assert evaluation.welch_5_percent(before, before * factor)[0] == called
    noisy = np.linspace(0.1, 1.9, 9)[None, :]
    assert not evaluation.welch_5_percent(noisy, noisy * factor)[0]


def test_blocks_are_runs_of_neighbours() -> None:
    indices = evaluation.blocks(100, 10, 35, 20, np.random.default_rng(0))
    assert indices.shape == (20, 35) and indices.min() >= 0 and indices.max() < 100
    steps = np.diff(indices, axis=1)
    assert all((steps[:, number] == 1).all() for number in range(34) if number % 10 != 9)


def test_interleaved_sides_are_neighbours_and_either_is_first() -> None:
    before, after = evaluation.interleaved(np.arange(200.0), 30, 50, np.random.default_rng(0))
    assert set(np.unique(after - before)) == {-1.0, 1.0}


def test_the_kernel_around_a_step_is_before_and_after_it() -> None:
    assert list(evaluation.around(np.array([1.0, 2.0, 5.0]))) == [3.0, 7.0, 10.0]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_trace_loads_without_pickle_and_is_whole(path: Path) -> None:
    trace = evaluation.read(path)
    wall = trace.columns["wall_seconds"]
    for name in ("wall_seconds", "cpu_seconds", "reference_seconds", "load_average"):
        column = trace.columns[name]
        assert len(column) == len(wall) and np.isfinite(column).all(), name
    assert wall.min() > 0.0 and trace.columns["reference_seconds"].min() > 0.0
    assert trace.about["steps"] == len(wall)
    if trace.is_spark:
        phases = sum(trace.columns[f"{name}_seconds"] for name in evaluation.records.PHASES)
        assert len(wall) >= 50 and phases == pytest.approx(wall, rel=0.01)


def test_a_large_step_in_a_quiet_history_is_found_by_every_rule() -> None:
    series = np.exp(np.random.default_rng(0).normal(0.0, 0.01, evaluation.HISTORY))
    stepped = series * np.where(np.arange(evaluation.HISTORY) >= evaluation.STEP_AT, 1.2, 1.0)
    for rule, find in evaluation.history_rules().items():
        assert list(find(stepped)) == [evaluation.STEP_AT], rule


@pytest.mark.parametrize(("rate", "held"), [(0.8499, False), (0.85, True), (0.8501, True)])
def test_a_target_is_judged_on_the_worst_trace_that_was_not_tuned_on(rate: float, held: bool) -> None:
    def row(trace: str, power: float) -> Any:
        return evaluation.Row(trace, "wall, 80 pairs", "sparkgauge, sequential", 0.0, power, 1.0, 1.0, 10.0, 20.0)

    rows = [row("tuned", 0.1), row("easy", 1.0), row("hard", rate)]
    found = evaluation.targets(rows, {}, [], ["tuned"])
    power = next(one for one in found if "+5 % in 80 pairs" in one.wanted)
    assert (power.held, power.where) == (held, "hard")


def test_a_target_without_a_figure_is_not_reached() -> None:
    assert not any(one.held for one in evaluation.targets([], {}, [], []))


def test_a_figure_is_judged_by_its_worst_value() -> None:
    figures = {"a, coverage, 10 pairs, interval of interleaved runs": 0.95}
    wanted = next(one for one in evaluation.FIGURE_TARGETS if "coverage" in one[0])
    assert evaluation._figure_target(*wanted, figures, []).held
    figures["b, coverage, 10 pairs, interval of interleaved runs"] = 0.9299
    assert not evaluation._figure_target(*wanted, figures, []).held
    assert evaluation._figure_target(*wanted, figures, ["b"]).held

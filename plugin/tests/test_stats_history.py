"""Change points and drift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import change_points, drift


def history(*levels: tuple[float, int], sd: float = 0.02, seed: int = 1) -> list[float]:
    """Return values at each level in turn, with noise."""
    generator = np.random.default_rng(seed)
    return [float(level * np.exp(generator.normal(0.0, sd))) for level, count in levels for _ in range(count)]


def test_steps_are_found_where_they_are() -> None:
    found = change_points(history((10.0, 20), (11.0, 20), (10.0, 20)))
    assert [point.index for point in found] == [20, 40]
    assert [point.ratio for point in found] == pytest.approx([1.1, 1 / 1.1], rel=0.02)
    assert all(point.p_value <= 0.01 for point in found)


def test_an_outlier_is_no_step() -> None:
    values = history((10.0, 30))
    values[15] = 1000.0
    assert change_points(values) == []


def test_false_alarms_stay_at_alpha() -> None:
    alarms = sum(bool(change_points(history((10.0, 40), sd=0.1, seed=seed))) for seed in range(500))
    assert alarms <= 12  # 1 % of 500 is 5; three standard deviations above


def test_short_histories_have_no_change_points() -> None:
    assert change_points([1.0]) == [] and change_points([1.0, 1.0, 1.0, 2.0, 2.0]) == []
    assert change_points([1.0] * 30) == []


def test_slow_drift_is_found_although_each_step_is_within_the_margin() -> None:
    generator = np.random.default_rng(2)
    values = np.exp(0.004 * np.arange(40) + generator.normal(0.0, 0.02, 40))
    found = drift(values)
    assert found.p_value < 0.001 and found.total == pytest.approx(np.expm1(0.004 * 39), rel=0.3)
    assert drift(generator.permutation(values)).p_value > 0.01
    assert drift([1.0, 2.0, 3.0]).p_value == 1.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(min_value=0.1, max_value=10.0), min_size=6, max_size=40), st.sampled_from([1e-3, 60.0]))
def test_units_and_a_second_run_do_not_matter(values: list[float], unit: float) -> None:
    found = change_points(values)
    assert change_points(values) == found
    if len({round(np.log(value), 9) for value in values}) == len(values):
        assert [p.index for p in change_points([v * unit for v in values])] == [p.index for p in found]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        change_points([1.0] * 10, alpha=0.0001)
    with pytest.raises(NotMeasuredError):
        change_points([1.0, float("nan")])

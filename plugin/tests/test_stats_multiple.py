"""Adjusted p-values and pooling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import benjamini_hochberg, compare, holm, pool

P_VALUES = st.lists(st.floats(min_value=0.0, max_value=1.0), max_size=12)


def test_textbook_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([]) == benjamini_hochberg([]) == []


@given(P_VALUES)
def test_benjamini_hochberg_agrees_with_scipy(p_values: list[float]) -> None:
    from scipy import stats as scipy_stats

    if p_values:
        assert benjamini_hochberg(p_values) == pytest.approx(list(scipy_stats.false_discovery_control(p_values)))


@given(P_VALUES)
def test_adjusting_never_lowers_and_keeps_the_order(p_values: list[float]) -> None:
    for adjusted in (holm(p_values), benjamini_hochberg(p_values)):
        assert all(p <= a + 1e-15 and a <= 1.0 for p, a in zip(p_values, adjusted, strict=True))
        ranked = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
        assert ranked == sorted(ranked)
    assert all(b <= h + 1e-15 for b, h in zip(benjamini_hochberg(p_values), holm(p_values), strict=True))


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_bad_p_values_are_refused(bad: float) -> None:
    with pytest.raises(ConfigurationError):
        holm([0.5, bad])


def test_pooling_finds_what_single_parametrisations_cannot() -> None:
    generator = np.random.default_rng(1)
    sides = np.exp(generator.normal(0.0, 0.05, size=(12, 2, 6)))
    single = [compare(before, after * 1.06, margin=0.02) for before, after in sides]
    together = pool(single)
    assert sum(one.status == "regressed" for one in single) <= 3
    assert 1.0 < together.interval.low < 1.06 < together.interval.high and together.n == 12
    assert together.interval.high - together.interval.low < min(one.ci_high - one.ci_low for one in single)


def test_parametrisations_that_differ_widen_the_pooled_interval() -> None:
    noise = np.array([0.99, 1.0, 1.01, 1.0])
    alike = pool([compare(noise, noise * 1.1, margin=0.05) for _ in range(4)])
    apart = pool([compare(noise, noise * ratio, margin=0.05) for ratio in (0.9, 1.0, 1.2, 1.3)])
    assert alike.heterogeneity == alike.inconsistency == 0.0
    assert apart.heterogeneity > 0.1 and apart.inconsistency > 0.9
    assert apart.interval.high / apart.interval.low > alike.interval.high / alike.interval.low


@settings(deadline=None)
@given(st.permutations(range(4)))
def test_order_does_not_matter_to_pooling(order: list[int]) -> None:
    noise = np.array([0.98, 1.0, 1.03, 1.0])
    single = [compare(noise, noise * ratio, margin=0.05) for ratio in (1.0, 1.05, 1.1, 1.3)]
    assert pool([single[i] for i in order]).interval.low == pytest.approx(pool(single).interval.low)


def test_what_has_no_standard_error_is_not_pooled() -> None:
    good = compare([1.0, 1.1], [1.0, 1.2], margin=0.1)
    for comparisons in ([good], [good, compare([1.0], [1.0], margin=0.1)]):
        with pytest.raises(NotMeasuredError):
            pool(comparisons)

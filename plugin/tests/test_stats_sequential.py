"""Pair by pair: levels that add up, early stopping, error rates on independent, heavy-tailed and dependent noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import Margin, Plan, SequentialComparison, settle_many
from sparkgauge.stats.sequential import FIRST_LOOK_PAIRS, spending_levels

PLAN = Plan(Margin(0.05), 0.01, 6, 80)
MIRROR = {"regressed": "improved", "improved": "regressed"}


def settle(before: Any, after: Any, **settings_: Any) -> SequentialComparison:
    """Return a comparison after feeding it all pairs."""
    comparison = SequentialComparison(**({"margin": 0.05, "max_pairs": len(before)} | settings_))
    for one, two in zip(before, after, strict=True):
        comparison.add(one, two)
    return comparison


def test_levels_of_the_looks_add_up_to_alpha() -> None:
    generator = np.random.default_rng(0)
    from scipy import special

    counts = PLAN.looks
    steps = np.diff([0, *counts])
    walks = np.cumsum(generator.normal(size=(200_000, len(counts))) * np.sqrt(steps), axis=1)
    bounds = -special.ndtri(np.array(spending_levels(0.05, tuple(n / 80 for n in counts))))
    crossed = (walks / np.sqrt(counts) > bounds).any(axis=1).mean()
    assert crossed == pytest.approx(0.05, abs=0.003)


def test_one_look_has_the_whole_level() -> None:
    assert spending_levels(0.005, (1.0,)) == pytest.approx((0.005,))
    assert Plan(Margin(0.05), 0.01, 40, 40).looks == (40,)


def test_looks_start_at_the_least_and_end_at_the_most_pairs() -> None:
    assert PLAN.looks[0] == 6 and PLAN.looks[-1] == 80
    assert list(PLAN.looks) == sorted(set(PLAN.looks))
    assert sum(PLAN.levels) > 0.005  # spent, not split by Bonferroni


@pytest.mark.parametrize(("first", "last"), [(1, 5), (6, 5), (2, 2001)])
def test_bad_numbers_of_pairs_are_refused(first: int, last: int) -> None:
    with pytest.raises(ConfigurationError):
        SequentialComparison(0.05, 0.01, first, last)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_unusable_values_are_refused_and_not_kept(bad: float) -> None:
    comparison = SequentialComparison(0.05)
    with pytest.raises(NotMeasuredError):
        comparison.add(1.0, bad)
    with pytest.raises(NotMeasuredError):
        comparison.add(bad, 1.0)
    assert comparison.pairs == 0


@pytest.mark.parametrize(("ratio", "expected"), [(1.3, "regressed"), (0.7, "improved"), (1.0, "match")])
def test_a_clear_case_is_decided_early(ratio: float, expected: str) -> None:
    generator = np.random.default_rng(2)
    before, after = np.exp(generator.normal(0.0, 0.01, size=(2, 80)))
    comparison = settle(before, after * ratio)
    assert (comparison.status, comparison.pairs) == (expected, FIRST_LOOK_PAIRS)
    assert comparison.interval.low < ratio < comparison.interval.high
    assert comparison.min_detectable < 0.1


def test_it_is_open_between_looks_and_inconclusive_at_the_end() -> None:
    generator = np.random.default_rng(4)
    comparison = SequentialComparison(0.01, min_pairs=4, max_pairs=12)
    found = [comparison.add(*np.exp(generator.normal(0.0, 0.5, size=2))) for _ in range(12)]
    assert found[:-1] == ["open"] * 11 and found[-1] == "inconclusive"
    assert comparison.add(1.0, 100.0) == "inconclusive" and comparison.pairs == 12


def test_identical_pairs_match_at_the_first_look() -> None:
    assert settle([2.0] * 20, [2.0] * 20).pairs == FIRST_LOOK_PAIRS
    comparison = settle([2.0] * 10, [2.0] * 10)  # fewer pairs than that have one look
    assert (comparison.status, comparison.pairs) == ("match", 10)
    assert settle([2.0] * 10, [2.0] * 10, min_pairs=6).pairs == 6


def test_an_absolute_margin_holds_where_it_is_more() -> None:
    before, after = [0.010, 0.0101, 0.0099] * 5, [0.011, 0.0111, 0.0109] * 5
    assert settle(before, after).status == "regressed"
    assert settle(before, after, margin=Margin(0.05, absolute=0.005)).status == "match"


def test_many_at_once_agree_with_one_by_one() -> None:
    generator = np.random.default_rng(6)
    differences = generator.normal(0.02, 0.08, size=(40, 80))
    outcomes = settle_many(differences, PLAN)
    for row, status, pairs in zip(differences, outcomes.status, outcomes.pairs, strict=True):
        one = settle(np.ones(80), np.exp(row))
        assert (one.status, one.pairs) == (status, pairs)


NOISE = {
    "normal": lambda g, shape: g.normal(0.0, 0.1, shape),
    "heavy tails": lambda g, shape: 0.05 * g.standard_t(2, shape),
    "contaminated": lambda g, shape: g.normal(0.0, 0.03, shape) + (g.random(shape) < 0.3) * g.normal(0.0, 0.7, shape),
}


@pytest.mark.parametrize("noise", list(NOISE))
def test_error_rates_hold_over_all_looks(noise: str) -> None:
    differences = NOISE[noise](np.random.default_rng(8), (2000, 80))
    same = settle_many(differences, PLAN)
    at_margin = settle_many(differences + math.log(1.05), PLAN)
    assert same.share("regressed") <= 0.01 and same.share("improved") <= 0.01
    assert at_margin.share("match") + at_margin.share("improved") <= 0.015
    assert settle_many(differences + math.log(1.10), PLAN).share("regressed") >= 0.97


def test_a_wandering_machine_does_not_cause_false_alarms_in_random_order() -> None:
    generator = np.random.default_rng(10)
    steps = generator.normal(0.0, 1.0, size=(2000, 160))
    for step in range(1, 160):
        steps[:, step] = 0.9 * steps[:, step - 1] + math.sqrt(1 - 0.81) * steps[:, step]
    pairs = (0.3 * steps).reshape(2000, 80, 2)
    differences = np.where(generator.random((2000, 80)) < 0.5, 1.0, -1.0) * (pairs[..., 1] - pairs[..., 0])
    assert settle_many(differences, PLAN).share("regressed") <= 0.01


PAIRS = st.lists(
    st.tuples(st.floats(min_value=0.01, max_value=100.0), st.floats(min_value=0.01, max_value=100.0)),
    min_size=12,
    max_size=12,
)


@settings(deadline=None, max_examples=40)
@given(PAIRS)
def test_swapping_the_sides_mirrors_the_verdict(pairs: list[tuple[float, float]]) -> None:
    forward = settle([a for a, _ in pairs], [b for _, b in pairs])
    backward = settle([b for _, b in pairs], [a for a, _ in pairs])
    if forward.status in MIRROR and backward.status != "match":
        assert backward.status == MIRROR[forward.status]
    assert not (forward.status == "regressed" and backward.status == "regressed")


@settings(deadline=None, max_examples=40)
@given(PAIRS, st.floats(min_value=1.0, max_value=20.0))
def test_a_larger_slowdown_never_turns_regressed_into_match(pairs: list[tuple[float, float]], slowdown: float) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    if settle(before, after).status == "regressed":
        assert settle(before, [x * slowdown for x in after]).status == "regressed"


@settings(deadline=None, max_examples=40)
@given(PAIRS, st.sampled_from([1e-3, 60.0, 1024.0]))
def test_units_do_not_matter(pairs: list[tuple[float, float]], unit: float) -> None:
    before, after = np.array(pairs).T
    one, two = settle(before, after), settle(before * unit, after * unit)
    assert (one.status, one.pairs) == (two.status, two.pairs)

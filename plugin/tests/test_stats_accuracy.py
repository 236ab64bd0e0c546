"""Accuracy over seeds and convergence: floors, sizes, censored runs, learning too fast."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import accuracy_noninferiority, convergence_check, kaplan_meier, sd_upper, seeds_needed

IMAGES = 10_000
ACCURACIES = st.lists(st.floats(min_value=0.0, max_value=1.0), min_size=2, max_size=8)


def test_agreeing_seeds_are_never_surer_than_the_test_set() -> None:
    result = accuracy_noninferiority([0.75, 0.75, 0.75], [0.745, 0.745, 0.745], test_count=IMAGES)
    assert result.status == "inconclusive" and result.standard_error == result.floor_se > 0.003
    assert accuracy_noninferiority([0.75] * 3, [0.745] * 3).status == "match"
    assert accuracy_noninferiority([0.75] * 30, [0.7499] * 30, test_count=IMAGES).status == "match"


def test_the_same_training_bit_by_bit_has_no_noise() -> None:
    values = [0.70, 0.75, 0.72]
    result = accuracy_noninferiority(values, values, test_count=IMAGES, paired=True)
    assert (result.status, result.change.low, result.change.high) == ("match", 0.0, 0.0)


def test_one_seed_decides_nothing() -> None:
    result = accuracy_noninferiority([0.75], [0.10], test_count=IMAGES)
    assert result.status == "inconclusive" and result.change.low == -math.inf


def test_a_seed_that_learned_nothing_is_not_trimmed_away() -> None:
    before = [0.75, 0.751, 0.749, 0.75, 0.752, 0.748, 0.75, 0.751]
    assert accuracy_noninferiority(before, [*before[:-1], 0.10]).status == "inconclusive"


@pytest.mark.parametrize("sd", [0.004, 0.008])
@pytest.mark.parametrize("paired", [False, True])
def test_the_seeds_asked_for_catch_one_lost_point(sd: float, paired: bool) -> None:
    generator, count = np.random.default_rng(5), seeds_needed(sd, 0.01, 0.9, paired=paired)
    each = sd / math.sqrt(2.0) if paired else sd
    caught = alarms = 0
    for before, after in generator.normal(0.75, each, size=(400, 2, count)):
        caught += accuracy_noninferiority(before, after - 0.01, paired=paired).status == "regressed"
        alarms += accuracy_noninferiority(before, after, paired=paired).status == "regressed"
    assert caught >= 0.86 * 400 and alarms <= 0.02 * 400


def test_more_noise_and_smaller_margins_need_more_seeds() -> None:
    assert seeds_needed(0.0, 0.01) == 2
    assert seeds_needed(0.002, 0.01) < seeds_needed(0.005, 0.01) < seeds_needed(0.005, 0.005)
    assert seeds_needed(0.005, 0.01, 0.8) < seeds_needed(0.005, 0.01, 0.95)
    with pytest.raises(ConfigurationError, match="more than 1000"):
        seeds_needed(0.05, 0.001)
    with pytest.raises(ConfigurationError):
        seeds_needed(0.01, 0.0)


def test_upper_limit_of_the_standard_deviation() -> None:
    generator = np.random.default_rng(3)
    samples = generator.normal(0.0, 1.0, size=(1000, 5))
    assert np.mean([sd_upper(row) >= 1.0 for row in samples]) == pytest.approx(0.8, abs=0.04)
    with pytest.raises(NotMeasuredError):
        sd_upper([0.5])


@settings(deadline=None)
@given(ACCURACIES, ACCURACIES)
def test_swapping_the_sides_mirrors_the_verdict(before: list[float], after: list[float]) -> None:
    forward, backward = accuracy_noninferiority(before, after), accuracy_noninferiority(after, before)
    assert (forward.status == "regressed") == (backward.status == "improved")
    assert forward.change.low <= forward.change.estimate <= forward.change.high


def test_kaplan_meier_counts_runs_that_did_not_arrive() -> None:
    curve = kaplan_meier([1, 2, 2, 3, 3], [True, True, True, False, False])
    assert [moment for moment, _ in curve] == [1, 2]
    assert [share for _, share in curve] == pytest.approx([0.8, 0.4])


def test_slower_faster_and_the_same() -> None:
    before = [900.0, 950.0, 1000.0, 1010.0, 990.0, 960.0]
    assert convergence_check(before, [1.5 * x for x in before], budget_steps=5000).finding == "slower"
    assert convergence_check(before, [0.6 * x for x in before], budget_steps=5000).finding == "faster"
    assert convergence_check(before, before, budget_steps=5000).finding == "same"


def test_runs_that_do_not_converge_are_evidence() -> None:
    before = [900.0, 950.0, 1000.0, 1010.0, 990.0, 960.0]
    result = convergence_check(before, [None, None, 980.0, None, None, None], budget_steps=1500)
    assert result.finding == "slower" and result.converged_candidate == 1
    assert result.median_baseline == 960.0 and result.median_candidate is None
    # Dropping them would have compared 980 with the rest and found nothing.
    assert convergence_check(before, [980.0], budget_steps=1500).finding == "undecided"
    assert convergence_check([None] * 6, [None] * 6, budget_steps=1500).finding == "same"


def test_three_runs_a_side_cannot_show_anything_at_this_level() -> None:
    assert convergence_check([1.0, 2.0, 3.0], [7.0, 8.0, 9.0], budget_steps=10).finding == "undecided"
    assert convergence_check([1.0, 2.0, 3.0], [7.0, 8.0, 9.0], budget_steps=10, alpha=0.1).finding == "slower"


def test_large_sides_are_permuted_at_random_but_reproducibly() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.gamma(20.0, 50.0, size=(2, 25))
    first = convergence_check(before, after, budget_steps=5000)
    assert first == convergence_check(before, after, budget_steps=5000) and first.finding == "same"
    assert convergence_check(before, after * 1.5, budget_steps=5000).finding == "slower"


def test_unusable_steps_are_refused() -> None:
    for bad in ([], [math.nan], [-1.0]):
        with pytest.raises(NotMeasuredError):
            convergence_check([1.0], bad, budget_steps=10)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=2, max_size=5))
def test_swapping_the_sides_of_a_convergence_check_mirrors_it(steps: list[float | None]) -> None:
    other = [5.0, 10.0, 15.0, 20.0]
    forward = convergence_check(other, steps, budget_steps=25, alpha=0.2)
    backward = convergence_check(steps, other, budget_steps=25, alpha=0.2)
    assert (forward.p_slower, forward.p_faster) == pytest.approx((backward.p_faster, backward.p_slower))

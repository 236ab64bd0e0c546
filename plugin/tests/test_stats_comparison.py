"""Two sides at once: properties over generated samples, small samples, margins, speed-ups."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import Interval, Margin, compare, decide_logs, interleaved_interval, scaling_efficiency

SECONDS = st.floats(min_value=0.01, max_value=1e4)
ROUNDS = st.lists(SECONDS, min_size=2, max_size=12)
PAIRS = st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=20)
MIRROR = {"regressed": "improved", "improved": "regressed"}


def test_compare_says_everything_at_once() -> None:
    result = compare([10.0, 10.2, 9.9, 10.1], [12.6, 12.4, 12.5, 12.7], margin=0.1)
    assert (result.status, result.n, result.alpha, result.margin_fraction) == ("regressed", 4, 0.01, 0.1)
    assert result.ci_low < result.ratio < result.ci_high and result.ratio == pytest.approx(1.249, abs=0.01)
    assert result.p_worse < 0.001 and 0.1 < result.min_detectable < 0.2
    assert result.interval == Interval(result.ratio, result.ci_low, result.ci_high, 0.99)


def test_welch_is_what_remains_of_yuen_below_five_samples() -> None:
    from scipy import stats as scipy_stats

    before, after = [1.0, 1.1, 0.95, 1.02], [1.2, 1.3, 1.25]
    expected = scipy_stats.ttest_ind(np.log(after), np.log(before), equal_var=False).confidence_interval(0.99)
    result = compare(before, after, margin=0.1)
    assert (math.log(result.ci_low), math.log(result.ci_high)) == pytest.approx((expected.low, expected.high))


def test_yuen_agrees_with_scipy() -> None:
    from scipy import stats as scipy_stats

    generator = np.random.default_rng(3)
    before, after = np.exp(generator.normal(size=(2, 15)))
    expected = scipy_stats.ttest_ind(np.log(after), np.log(before), equal_var=False, trim=0.2, alternative="greater")
    assert compare(before, after, margin=0.1).p_worse == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_noisy_rounds_are_inconclusive_and_say_what_they_could_have_found(count: int) -> None:
    before, after = [10.0, 11.0, 9.0][:count], [11.5, 12.5, 10.5][:count]
    result = compare(before, after, margin=0.1)
    assert result.status == "inconclusive" and result.min_detectable > 0.3
    assert (result.min_detectable == math.inf) == (count == 1)


def test_half_as_much_again_is_found_in_four_rounds_a_side_and_never_passes() -> None:
    generator = np.random.default_rng(1)
    found = [
        compare(before, after * 1.5, margin=0.1).status
        for before, after in np.exp(generator.normal(0.0, 0.03, size=(300, 2, 4)))
    ]
    assert found.count("regressed") >= 0.95 * len(found)
    assert not {"match", "improved"} & set(found)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 30])
def test_nothing_changed_is_called_regressed_at_most_at_half_of_alpha(count: int) -> None:
    generator = np.random.default_rng(count)
    found = [
        compare(before, after, margin=0.0, alpha=0.05).status
        for before, after in np.exp(generator.normal(0.0, 0.1, size=(1000, 2, count)))
    ]
    # 2.5 % of 1,000 is 25; 40 is three standard deviations above. The seed is fixed.
    assert found.count("regressed") <= 40 and found.count("improved") <= 40


def test_one_disturbed_round_does_not_decide() -> None:
    calm = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0]
    disturbed = [*calm[:-1], 30.0]
    assert compare(calm, disturbed, margin=0.05).status == "match"
    assert compare(calm, [1.2 * x for x in calm[:-1]] + [0.01], margin=0.05).status == "regressed"


def test_an_absolute_margin_holds_where_it_is_more() -> None:
    before, after = [0.010, 0.0101, 0.0099, 0.010], [0.012, 0.0121, 0.0119, 0.012]
    assert compare(before, after, margin=0.05).status == "regressed"
    lenient = compare(before, after, margin=Margin(0.05, absolute=0.005))
    assert lenient.status == "match" and lenient.margin_fraction == pytest.approx(0.5, rel=0.01)
    assert compare([10.0] * 3, [10.2] * 3, margin=Margin(0.05, absolute=0.005)).margin_fraction == 0.05


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_bad_settings_are_refused(bad: float) -> None:
    with pytest.raises(ConfigurationError):
        compare([1.0, 2.0], [1.0, 2.0], margin=bad)
    with pytest.raises(ConfigurationError):
        compare([1.0, 2.0], [1.0, 2.0], margin=0.1, alpha=bad)
    with pytest.raises(ConfigurationError):
        compare([1.0, 2.0], [1.0], margin=0.1, paired=True)


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [0.0, 1.0], [math.inf, 1.0]])
def test_unusable_samples_are_refused(bad: list[float]) -> None:
    with pytest.raises(NotMeasuredError):
        compare(bad, [1.0, 1.1], margin=0.1)
    with pytest.raises(NotMeasuredError):
        compare([1.0, 1.1], bad, margin=0.1)


@pytest.mark.parametrize(
    ("estimate", "low", "high", "beyond", "expected"),
    [
        (0.11, 0.01, 0.2, 1.0, "regressed"),
        (0.10, 0.01, 0.2, 1.0, "inconclusive"),
        (0.11, 0.0, 0.2, 1.0, "inconclusive"),
        (0.06, 0.01, 0.12, 0.5, "regressed"),
        (0.05, 0.01, 0.12, 0.5, "inconclusive"),
        (0.06, 0.01, 0.1, 0.5, "match"),
        (-0.06, -0.12, -0.01, 0.5, "improved"),
        (-0.06, -0.10, -0.01, 0.5, "match"),
        (-0.06, -0.12, 0.0, 0.5, "match"),
        (0.0, -0.1, 0.1, 1.0, "match"),
        (0.0, -0.1, 0.11, 1.0, "inconclusive"),
    ],
)
def test_boundaries(estimate: float, low: float, high: float, beyond: float, expected: str) -> None:
    assert decide_logs(estimate, low, high, margin=0.1, beyond=beyond) == expected


@settings(deadline=None)
@given(ROUNDS, ROUNDS, st.floats(min_value=1e-3, max_value=1e3))
def test_units_do_not_matter(before: list[float], after: list[float], unit: float) -> None:
    one = compare(before, after, margin=0.1)
    two = compare([x * unit for x in before], [x * unit for x in after], margin=Margin(0.1, absolute=1e-12 * unit))
    assert two.log_ratio == pytest.approx(one.log_ratio, abs=1e-9)
    edges = (one.ratio, one.ci_low, one.ci_high)
    assume(all(abs(edge - limit) > 1e-6 for edge in edges for limit in (1 / 1.1, 1.0, 1.1)))
    assert two.status == one.status


@settings(deadline=None)
@given(ROUNDS, ROUNDS, st.randoms(use_true_random=False))
def test_order_and_a_second_run_of_the_tool_do_not_matter(
    before: list[float], after: list[float], generator: random.Random
) -> None:
    expected = compare(before, after, margin=0.1)
    assert compare(list(before), list(after), margin=0.1) == expected
    one, two = list(before), list(after)
    generator.shuffle(one)
    generator.shuffle(two)
    assert compare(one, two, margin=0.1) == expected


@settings(deadline=None)
@given(ROUNDS, ROUNDS, st.floats(min_value=1.0, max_value=50.0), st.floats(min_value=0.0, max_value=1.0))
def test_a_larger_slowdown_is_never_judged_better(
    before: list[float], after: list[float], slowdown: float, absolute: float
) -> None:
    rank = {"improved": 0, "match": 1, "inconclusive": 2, "regressed": 3}
    margin = Margin(0.1, absolute)
    one = compare(before, after, margin=margin)
    two = compare(before, [x * slowdown for x in after], margin=margin)
    assert not (one.status == "regressed" and two.status in ("match", "improved"))
    assume(abs(math.log(one.ratio)) > 1e-9 and slowdown > 1.0 + 1e-9)
    assert rank[two.status] >= min(rank[one.status], 2)


@settings(deadline=None)
@given(PAIRS, st.booleans(), st.floats(min_value=0.0, max_value=1.0))
def test_swapping_the_sides_mirrors_the_verdict(
    pairs: list[tuple[float, float]], paired: bool, absolute: float
) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    margin = Margin(0.1, absolute)
    forward = compare(before, after, margin=margin, paired=paired)
    backward = compare(after, before, margin=margin, paired=paired)
    mirrored = compare(after, before, margin=margin, paired=paired, better="higher")
    for name in ("regressed", "improved"):
        assert (forward.status == name) == (backward.status == MIRROR[name])
    assert mirrored.status == forward.status


@settings(deadline=None)
@given(PAIRS)
def test_the_interval_holds_its_estimate_and_a_run_never_regresses_against_itself(
    pairs: list[tuple[float, float]],
) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    result = compare(before, after, margin=0.1, paired=True)
    assert result.ci_low <= result.ratio <= result.ci_high
    assert compare(before, before, margin=0.1).status in ("match", "inconclusive")


def test_speed_up_of_interleaved_runs_covers_its_truth() -> None:
    generator = np.random.default_rng(9)
    covered = 0
    for _ in range(400):
        shared = np.cumsum(generator.normal(0.0, 0.1, 20))  # a machine whose speed wanders
        slow, fast = np.exp(shared + generator.normal(0.0, 0.05, (2, 20)))
        interval = interleaved_interval(2.0 * slow, fast)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.93 * 400 <= covered <= 0.985 * 400


def test_autocorrelation_of_pairs_widens_the_interval() -> None:
    pattern = [1.3] * 10 + [0.8] * 10
    drifting = compare([1.0] * 20, pattern, margin=0.1, paired=True)
    mixed = compare([1.0] * 20, pattern[::2] + pattern[1::2], margin=0.1)
    assert drifting.standard_error > 1.5 * mixed.standard_error


def test_scaling_efficiency_is_a_share_of_the_ideal() -> None:
    assert scaling_efficiency(Interval(3.0, 2.8, 3.2, 0.95), 4) == Interval(0.75, 0.7, 0.8, 0.95)
    with pytest.raises(ConfigurationError):
        scaling_efficiency(Interval(3.0, 2.8, 3.2, 0.95), 0)


def test_one_pair_has_no_interval() -> None:
    assert interleaved_interval([2.0], [1.0]) == Interval(2.0, 0.0, math.inf, 0.95)

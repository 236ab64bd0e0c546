"""Intervals and decisions over raw samples. Pure: no I/O, no state; SciPy is imported when an interval is computed.

Ratios are compared on the logarithm of the samples, because run times are positive and skewed to the right: the mean of
the logs is the log of the geometric mean, and an interval of the difference of two mean logs is an interval of the
ratio of two geometric means. Unequal variances are allowed for (B. L. Welch, "The generalization of 'Student's' problem
when several different population variances are involved", Biometrika 34, 1947), as ``scipy.stats.ttest_ind`` with
``equal_var=False`` computes it.

What is assumed: samples of one side are independent and their logs are roughly normal. Rounds on one shared machine are
*not* quite independent (a busy neighbour spans several), so the true error rates are somewhat above the nominal ones
stated in :func:`decide`; ``docs/gate.md`` says what follows from it.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sparkgauge.errors import ConfigurationError, NotMeasuredError

Better = Literal["lower", "higher"]
Scale = Literal["ratio", "difference"]
Decision = Literal["match", "regressed", "improved", "inconclusive"]

FEWEST_SAMPLES = 2
"""Samples a side below which no variance, so no interval, exists."""

FLAT_SPREAD = 1e-12
"""Spread (of logs, or of fractions) below which samples count as identical: rounding, not noise."""

ROUNDING = 1e-12
"""Relative slack of comparisons with a limit, so that a change of exactly the margin passes: 0.75 - 0.74 is not quite
0.01 in binary."""

FIRST_LOOK_SHARE = 0.75
"""Share of the error probability spent at the first look. Most comparisons are decided there with few rounds, where a
smaller share widens Student's t most; the rest is kept for the looks that follow."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval; a bound is infinite where the samples cannot give one."""

    estimate: float
    low: float
    high: float
    confidence: float
    """Nominal coverage, e.g. 0.95."""

    @property
    def is_bounded(self) -> bool:
        """Return whether the samples sufficed for both bounds."""
        return self.low > -math.inf and self.high < math.inf


def ratio_interval(
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float, paired: bool = False
) -> Interval:
    """Return the interval of candidate / baseline, a ratio of geometric means.

    Samples are positive, in any one unit. With one sample on a side the interval is (0, inf): nothing can be decided,
    and borrowing the other side's variance would hide it. Identical samples give an interval without width.
    ``paired=True`` takes sample i of both sides as one pair (interleaved rounds) and removes what they share.
    Raises NotMeasuredError for samples that are missing, not finite or not positive.
    """
    logs = _difference(_logs(baseline), _logs(candidate), confidence, paired)
    return _exponential(logs)


def speedup_interval(
    slow: Sequence[float], fast: Sequence[float], *, confidence: float, paired: bool = False
) -> Interval:
    """Return the interval of slow / fast in run times: how many times faster ``fast`` is."""
    return ratio_interval(fast, slow, confidence=confidence, paired=paired)


def difference_interval(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    confidence: float,
    floor_sd: float = 0.0,
    paired: bool = False,
) -> Interval:
    """Return the interval of candidate - baseline, a difference of arithmetic means in the samples' unit.

    ``floor_sd`` is noise that every sample is known to carry (for accuracies :func:`binomial_sd`): a few seeds may by
    chance agree better than that, and the interval is never narrower than this noise alone would make it.
    ``paired=True`` takes sample i of both sides as one pair (the same seed). Pairs that are all equal were the same
    training, bit by bit, and share the test set's noise too, so the floor then does not apply.
    Raises NotMeasuredError for samples that are missing or not finite.
    """
    before, after = _finite(baseline), _finite(candidate)
    interval = _difference(before, after, confidence, paired)
    if paired:
        same = all(a == b for a, b in zip(before, after, strict=True))
        return _widened(interval, 0.0 if same else floor_sd / math.sqrt(len(before)))
    return _widened(interval, floor_sd * math.sqrt(1 / len(before) + 1 / len(after)))


def mean_interval(
    samples: Sequence[float], *, confidence: float, scale: Scale = "ratio", floor_sd: float = 0.0
) -> Interval:
    """Return the mean with its interval: geometric on the ``ratio`` scale, arithmetic on the ``difference`` scale.

    Raises NotMeasuredError for samples that are missing, not finite or (on the ratio scale) not positive.
    """
    if scale == "ratio":
        return _exponential(_mean(_logs(samples), confidence))
    values = _finite(samples)
    return _widened(_mean(values, confidence), floor_sd / math.sqrt(len(values)))


def mean(samples: Sequence[float], *, scale: Scale = "ratio") -> float:
    """Return the estimate of :func:`mean_interval` alone."""
    return math.exp(statistics.fmean(_logs(samples))) if scale == "ratio" else statistics.fmean(_finite(samples))


def binomial_sd(accuracy_fraction: float, test_count: int) -> float:
    """Return the standard error of an accuracy on ``test_count`` images, sqrt(p (1 - p) / n), as a fraction."""
    probability = min(max(accuracy_fraction, 0.0), 1.0)
    return math.sqrt(probability * (1.0 - probability) / test_count)


def margin_limit(margin: float, *, better: Better, scale: Scale) -> float:
    """Return the worst change that still passes: the edge of ``margin`` on the bad side of no change.

    A ratio that should be low may grow to ``1 + margin``; one that should be high may fall to ``1 / (1 + margin)``, the
    same step downwards, so that a verdict on runtimes and one on their reciprocals agree.
    """
    if not (math.isfinite(margin) and margin >= 0.0):
        raise ConfigurationError("Bad margin", expected="a finite number of at least 0", actual=str(margin))
    if scale == "ratio":
        return 1.0 + margin if better == "lower" else 1.0 / (1.0 + margin)
    return margin if better == "lower" else -margin


def decide(interval: Interval, *, limit: float, better: Better, no_change: float) -> Decision:
    """Return what ``interval`` of a change says about ``limit``, the worst change that still passes.

    ``no_change`` is 1 for ratios and 0 for differences. For ``better="lower"`` (mirrored for "higher"):

    - ``regressed``: the interval lies above no change and the estimate is beyond the limit (which covers the case of
      a whole interval beyond the limit);
    - ``match``: the whole interval is at or inside the limit, so that non-inferiority is shown;
    - ``improved``: a match whose interval lies below no change and whose estimate is beyond the limit's mirror image;
    - ``inconclusive``: none of these; more rounds are needed.

    Error rates at confidence c, for independent samples and one look: with no true change, ``regressed`` is said with
    probability at most (1 - c) / 2 (2.5 % at 0.95; less in practice, as the estimate must be beyond the limit as
    well). With a true change beyond the limit, ``match`` or ``improved`` is said with probability at most (1 - c) / 2.
    Swapping the sides turns ``regressed`` into ``improved`` and back, exactly.
    """
    if better == "higher":
        mirrored = Interval(-interval.estimate, -interval.high, -interval.low, interval.confidence)
        return _decide_lower(mirrored, -limit, -no_change, -_opposite(limit, no_change))
    return _decide_lower(interval, limit, no_change, _opposite(limit, no_change))


def confidence_at_look(confidence: float, look: int) -> float:
    """Return the confidence to use at look 1, 2, ... of a comparison that may take more rounds while undecided.

    Looking again and again at a fixed confidence raises the chance that one look errs. The error probability is split
    over the looks instead: ``FIRST_LOOK_SHARE`` of it at the first, the rest in parts of 1 / (k (k - 1)) at look k,
    which add up to 1 over endless looks; by Bonferroni's inequality the total stays at ``1 - confidence``.
    """
    share = FIRST_LOOK_SHARE if look == 1 else (1.0 - FIRST_LOOK_SHARE) / (look * (look - 1))
    return 1.0 - (1.0 - confidence) * share


LOOK_SHARE = 0.6
"""Of the error probability that is left, what a look spends that may be followed by others."""


def next_look(count: int) -> int:
    """Return at how many rounds an undecided comparison of ``count`` rounds is looked at again: 5, 8, 13, 21, ...

    A look after every single round would spend error probability on samples that are nearly the same.
    """
    return math.ceil(1.6 * count)


def _decide_lower(interval: Interval, limit: float, no_change: float, opposite: float) -> Decision:
    slack = ROUNDING * max(1.0, abs(limit))
    if interval.low > no_change and interval.estimate > limit + slack:
        return "regressed"
    if interval.high > limit + slack:
        return "inconclusive"
    return "improved" if interval.high < no_change and interval.estimate < opposite - slack else "match"


def _opposite(limit: float, no_change: float) -> float:
    """Return the limit's mirror image on the good side: the reciprocal for ratios, the negative for differences."""
    return no_change * no_change / limit if no_change > 0.0 and limit > 0.0 else 2.0 * no_change - limit


def _difference(before: list[float], after: list[float], confidence: float, paired: bool) -> Interval:
    if not paired:
        return _welch(before, after, confidence)
    if len(before) != len(after):
        counts = f"{len(before)} and {len(after)}"
        raise ConfigurationError("Pairs need as many samples on both sides", expected="equal counts", actual=counts)
    return _mean([b - a for a, b in zip(before, after, strict=True)], confidence)


def _welch(before: list[float], after: list[float], confidence: float) -> Interval:
    estimate = statistics.fmean(after) - statistics.fmean(before)
    if min(len(before), len(after)) < FEWEST_SAMPLES:
        return Interval(estimate, -math.inf, math.inf, confidence)
    if _is_flat(before) and _is_flat(after):
        return Interval(estimate, estimate, estimate, confidence)
    from scipy import stats as scipy_stats

    with _numeric_warnings_ignored():
        # Sorted, so that the last bit of the sums does not depend on the order of the samples.
        test = scipy_stats.ttest_ind(sorted(after), sorted(before), equal_var=False)
        bounds = test.confidence_interval(confidence)
    return _around(estimate, float(bounds.low), float(bounds.high), confidence)


def _mean(values: list[float], confidence: float) -> Interval:
    estimate = statistics.fmean(values)
    if len(values) < FEWEST_SAMPLES:
        return Interval(estimate, -math.inf, math.inf, confidence)
    if _is_flat(values):
        return Interval(estimate, estimate, estimate, confidence)
    from scipy import stats as scipy_stats

    with _numeric_warnings_ignored():
        bounds = scipy_stats.ttest_1samp(sorted(values), 0.0).confidence_interval(confidence)
    return _around(estimate, float(bounds.low), float(bounds.high), confidence)


def _around(estimate: float, low: float, high: float, confidence: float) -> Interval:
    """Return the interval with unusable bounds opened, and rounding kept from pushing the estimate outside."""
    low = -math.inf if math.isnan(low) else min(low, estimate)
    high = math.inf if math.isnan(high) else max(high, estimate)
    return Interval(estimate, low, high, confidence)


def _widened(interval: Interval, standard_error: float) -> Interval:
    half = standard_error * statistics.NormalDist().inv_cdf(0.5 + interval.confidence / 2)
    low, high = interval.estimate - half, interval.estimate + half
    return Interval(interval.estimate, min(interval.low, low), max(interval.high, high), interval.confidence)


def _exponential(logs: Interval) -> Interval:
    return Interval(_exp(logs.estimate), _exp(logs.low), _exp(logs.high), logs.confidence)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(samples: Sequence[float]) -> list[float]:
    values = [float(sample) for sample in samples]
    bad = next((value for value in values if not math.isfinite(value)), None)
    if not values or bad is not None:
        actual = "no samples" if bad is None else str(bad)
        raise NotMeasuredError("Nothing to compare", expected="finite samples", actual=actual)
    return values


def _logs(samples: Sequence[float]) -> list[float]:
    values = _finite(samples)
    if min(values) <= 0.0:
        raise NotMeasuredError("A ratio needs positive samples", expected="more than 0", actual=f"{min(values):g}")
    return [math.log(value) for value in values]


def _is_flat(values: list[float]) -> bool:
    return max(values) - min(values) <= FLAT_SPREAD


@contextmanager
def _numeric_warnings_ignored() -> Iterator[None]:
    """Ignore SciPy's remark that one side's samples are nearly identical: the other side carries the variance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield

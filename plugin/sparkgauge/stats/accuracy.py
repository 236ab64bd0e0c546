"""Accuracy over seeds, and whether training converges as it did: too slowly is a finding, and so is too fast.

MLPerf Training compares the epochs a submission needed with those of reference runs, its reference convergence points,
and refuses one that learned suspiciously fast: fewer steps than the reference are more often a changed task (leaked
test images, another batch size, a shorter data set) than better training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats import robust
from sparkgauge.stats.comparison import decide_logs
from sparkgauge.stats.intervals import Decision, Interval, _finite, _is_flat, binomial_sd

MOST_SEEDS = 1000
EXACT_ARRANGEMENTS = 20_000
"""Assignments of runs to sides up to which all are tried; above, as many random ones."""


@dataclass(frozen=True)
class AccuracyComparison:
    """What two sides' accuracies, one a seed, say; fractions throughout."""

    status: Decision
    change: Interval
    """candidate - baseline, a difference of means."""
    standard_error: float
    floor_se: float
    """What the binomial noise of the test set alone would make of it."""
    n: int
    """Seeds of the smaller side, or pairs."""


def accuracy_noninferiority(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    margin: float = 0.01,
    alpha: float = 0.02,
    test_count: int | None = None,
    paired: bool = False,
) -> AccuracyComparison:
    """Return whether the candidate's accuracy is not worse than the baseline's by ``margin``, the loss to be found.

    ``match`` when a loss of the margin is excluded, ``regressed`` when no loss is excluded, the loss may reach the
    margin and is estimated at more than half of it; each errs with probability alpha / 2. A few seeds can agree by
    luck: the standard error is never below the binomial noise of ``test_count`` test images. ``paired=True`` takes seed
    i of both sides as one pair; pairs that are all equal were the same training bit by bit and carry no noise.
    """
    before, after = _finite(baseline), _finite(candidate)
    change, error, freedom = _mean_change(before, after, paired)
    identical = paired and before == after
    floor = 0.0 if identical else _floor(before, after, test_count, paired)
    if floor > error:  # the binomial noise is known, not estimated
        error, freedom = floor, math.inf if freedom > 0.0 else 0.0
    half = (error * float(robust.critical(alpha / 2.0, freedom)) if error > 0.0 else 0.0) if freedom > 0.0 else math.inf
    status = decide_logs(-change, -change - half, -change + half, margin=margin, beyond=0.5)
    interval = Interval(change, change - half, change + half, 1.0 - alpha)
    return AccuracyComparison(status, interval, error, floor, min(len(before), len(after)))


def seeds_needed(sd: float, margin: float, power: float = 0.9, *, alpha: float = 0.02, paired: bool = False) -> int:
    """Return the seeds a side for which :func:`accuracy_noninferiority` finds a loss of ``margin`` with ``power``.

    ``sd`` is the standard deviation of one run's accuracy over seeds (of a pair's difference where ``paired``); use at
    least :func:`sparkgauge.stats.binomial_sd`. Two seeds are the least. A standard deviation estimated from few runs
    is itself uncertain: size with its upper confidence limit, :func:`sd_upper`. More than 1,000 seeds are refused:
    such a margin cannot be gated.
    """
    if not (sd >= 0.0 and math.isfinite(sd) and margin > 0.0 and 0.0 < power < 1.0):
        raise ConfigurationError("Bad sizes", expected="sd >= 0, margin > 0, 0 < power < 1", actual=f"{sd}, {margin}")
    for count in range(2, MOST_SEEDS + 1):
        freedom = count - 1 if paired else 2 * (count - 1)
        error = sd * math.sqrt((1.0 if paired else 2.0) / count)
        if error == 0.0 or _power(margin, error, freedom, alpha) >= power:
            return count
    raise ConfigurationError(f"A loss of {margin:g} needs more than {MOST_SEEDS} seeds at an sd of {sd:g}")


def sd_upper(samples: Sequence[float], *, confidence: float = 0.8) -> float:
    """Return the upper confidence limit of the standard deviation of normal samples."""
    import numpy as np
    from scipy import special

    values = _finite(samples)
    if len(values) < 2:
        raise NotMeasuredError("No standard deviation from one run", expected="2 runs or more")
    freedom = len(values) - 1
    return float(np.std(values, ddof=1) * math.sqrt(freedom / special.chdtri(freedom, confidence)))


@dataclass(frozen=True)
class ConvergenceCheck:
    """How many steps two sides needed to reach the target."""

    finding: Literal["same", "slower", "faster", "undecided"]
    """``faster`` is a finding too; ``undecided`` where so few runs could not have shown either."""
    p_slower: float
    p_faster: float
    median_baseline: float | None
    median_candidate: float | None
    """Kaplan-Meier medians; None where fewer than half of the runs reached the target."""
    converged_baseline: int
    converged_candidate: int


def convergence_check(
    baseline: Sequence[float | None],
    candidate: Sequence[float | None],
    *,
    budget_steps: float,
    alpha: float = 0.02,
) -> ConvergenceCheck:
    """Return whether steps-to-target changed; None stands for a run that did not reach it within ``budget_steps``.

    Such runs are censored, not dropped: they took longer than the budget. Gehan's generalised Wilcoxon score
    (Biometrika 52, 1965) counts who was certainly faster over all pairs of runs; its permutation distribution is exact
    up to 20,000 arrangements, and random with a fixed seed above. Each direction errs with probability at most
    alpha / 2.
    """
    times, reached = _censored([*baseline, *candidate], budget_steps)
    if len(baseline) == 0 or len(candidate) == 0:
        raise NotMeasuredError("Nothing to compare", expected="runs on both sides", actual="none")
    scores = _gehan(times, reached)
    p_slower, p_faster, least = _permutation_tails(scores, len(candidate))
    split, level = len(baseline), alpha / 2.0
    finding: Literal["same", "slower", "faster", "undecided"] = "same" if least <= level else "undecided"
    if min(p_slower, p_faster) <= level:
        finding = "slower" if p_slower < p_faster else "faster"
    return ConvergenceCheck(
        finding,
        p_slower,
        p_faster,
        _median(kaplan_meier(times[:split], reached[:split])),
        _median(kaplan_meier(times[split:], reached[split:])),
        sum(reached[:split]),
        sum(reached[split:]),
    )


def kaplan_meier(times: Sequence[float], reached: Sequence[bool]) -> list[tuple[float, float]]:
    """Return (time, share of runs not there yet after it), after Kaplan and Meier (JASA 53, 1958)."""
    curve, share = [], 1.0
    for moment in sorted({time for time, there in zip(times, reached, strict=True) if there}):
        at_risk = sum(time >= moment for time in times)
        arrived = sum(time == moment and there for time, there in zip(times, reached, strict=True))
        share *= 1.0 - arrived / at_risk
        curve.append((moment, share))
    return curve


def _mean_change(before: list[float], after: list[float], paired: bool) -> tuple[float, float, float]:
    """Return difference of means, standard error and degrees of freedom; none of the latter with one seed.

    Means, not trimmed ones: a seed that learns nothing is what an accuracy gate exists for.
    """
    import numpy as np

    if paired and len(before) != len(after):
        counts = f"{len(before)} and {len(after)}"
        raise ConfigurationError("Pairs need as many seeds on both sides", expected="equal counts", actual=counts)
    sides = np.array(before), np.array(after)
    differences = sides[1] - sides[0] if paired else None
    unpaired = robust.trimmed_difference
    estimate = unpaired(*sides, trim=0.0) if differences is None else robust.trimmed(differences, trim=0.0)
    flat = not paired and _is_flat(before) and _is_flat(after)
    freedom = float(estimate.freedom)
    return float(estimate.mean), 0.0 if flat and freedom > 0.0 else float(estimate.standard_error), freedom


def _floor(before: list[float], after: list[float], test_count: int | None, paired: bool) -> float:
    if not test_count:
        return 0.0
    sd = binomial_sd(math.fsum([*before, *after]) / (len(before) + len(after)), test_count)
    return sd * math.sqrt(1.0 / len(before) if paired else 1.0 / len(before) + 1.0 / len(after))


def _power(margin: float, error: float, freedom: float, alpha: float) -> float:
    """Return the probability that the estimate of a true loss of ``margin`` passes both of regressed's thresholds."""
    from scipy import stats as scipy_stats

    quantile = float(robust.critical(alpha / 2.0, freedom))
    significant = float(scipy_stats.nct.sf(quantile, freedom, margin / error))
    beyond_half = float(scipy_stats.norm.cdf(0.5 * margin / error))
    return min(significant, beyond_half)


def _censored(steps: Sequence[float | None], budget: float) -> tuple[list[float], list[bool]]:
    times = [budget if value is None else float(value) for value in steps]
    bad = next((time for time in times if not (math.isfinite(time) and time >= 0.0)), None)
    if bad is not None:
        raise NotMeasuredError("Unusable steps to target", expected="finite, not negative", actual=str(bad))
    # What took longer than the budget is censored at it on both sides, however long that run went on.
    return [min(time, budget) for time in times], [
        value is not None and time <= budget for value, time in zip(steps, times, strict=True)
    ]


def _gehan(times: list[float], reached: list[bool]) -> Any:
    """Return for each run how many others it was certainly slower than, less how many it was certainly faster than."""
    import numpy as np

    moment, there = np.array(times), np.array(reached)
    later = (moment[:, None] > moment[None, :]) & there[None, :]
    later |= (moment[:, None] == moment[None, :]) & there[None, :] & ~there[:, None]
    return (later.astype(int) - later.T.astype(int)).sum(axis=1)


def _permutation_tails(scores: Any, candidates: int) -> tuple[float, float, float]:
    """Return p for slower, p for faster, and the least p that any outcome of so many runs could have."""
    import numpy as np

    total, observed = len(scores), int(scores[-candidates:].sum())
    if math.comb(total, candidates) <= EXACT_ARRANGEMENTS:
        chosen = np.array(list(itertools.combinations(range(total), candidates)))
        sums = scores[chosen].sum(axis=1)
        return float((sums >= observed).mean()), float((sums <= observed).mean()), 1.0 / len(sums)
    generator = np.random.default_rng(0)
    sums = generator.permuted(np.tile(scores, (EXACT_ARRANGEMENTS, 1)), axis=1)[:, :candidates].sum(axis=1)
    count = EXACT_ARRANGEMENTS + 1
    return (1 + int((sums >= observed).sum())) / count, (1 + int((sums <= observed).sum())) / count, 1.0 / count


def _median(curve: list[tuple[float, float]]) -> float | None:
    return next((moment for moment, share in curve if share <= 0.5 + 1e-12), None)

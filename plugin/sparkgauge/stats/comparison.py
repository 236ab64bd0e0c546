"""Two sides' raw samples compared at once: the interval of their ratio, and what it says about the margin.

Ratios of trimmed means of logarithms (see :mod:`sparkgauge.stats.robust`). The error rate ``alpha`` belongs to the
verdict: the interval covers the true ratio with probability 1 - alpha, so with nothing changed ``regressed`` or
``improved`` is said with probability at most alpha, and with a change beyond the margin ``match`` at most alpha / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import robust
from sparkgauge.stats.intervals import ROUNDING, Better, Decision, Interval, _exp, _logs
from sparkgauge.stats.robust import Trimmed

if TYPE_CHECKING:
    from numpy.typing import NDArray

DETECTION_POWER = 0.8
"""Power at which ``min_detectable`` is stated."""


@dataclass(frozen=True)
class Margin:
    """How much worse still passes: a share of the baseline, or an absolute amount where that is more."""

    fraction: float = 0.0
    absolute: float = 0.0
    """In the samples' unit; for short times, where a share is below what a clock or a scheduler resolves."""

    def __post_init__(self) -> None:
        for name in ("fraction", "absolute"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigurationError("Bad margin", expected=f"a finite {name} of at least 0", actual=str(value))

    def of(self, before: float, after: float) -> float:
        """Return the margin as a share of the smaller side.

        Being worse by the absolute amount is a ratio of 1 + amount / smaller side whichever direction is good, so that
        swapping the sides mirrors a verdict exactly.
        """
        smaller = min(before, after)
        return max(self.fraction, self.absolute / smaller if smaller > 0.0 else math.inf)


@dataclass(frozen=True)
class Comparison:
    """What the samples of two sides say."""

    status: Decision
    ratio: float
    """candidate / baseline, of trimmed geometric means."""
    ci_low: float
    ci_high: float
    """Interval of the ratio at 1 - alpha; 0 and infinity where the samples cannot give one."""
    min_detectable: float
    """Share by which the candidate would have to be worse to be called regressed with a probability of 80 %, given
    this noise and count; infinite with one sample."""
    n: int
    """Samples of the smaller side, or pairs."""
    alpha: float
    margin_fraction: float
    """The margin that held, as a share."""
    p_worse: float
    """One-sided probability of a change at least this bad if nothing changed; 1 where the samples cannot tell."""
    log_ratio: float
    standard_error: float
    """Of ``log_ratio``; infinite with one sample."""

    @property
    def interval(self) -> Interval:
        """Return the ratio with its interval."""
        return Interval(self.ratio, self.ci_low, self.ci_high, 1.0 - self.alpha)


def compare(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    paired: bool = False,
    margin: float | Margin,
    alpha: float = 0.01,
    better: Better = "lower",
    beyond: float = 1.0,
) -> Comparison:
    """Return the comparison of two sides' positive samples, in any one unit.

    ``paired=True`` takes sample i of both sides as one pair, in time order: interleaved rounds, whose pairs share most
    of a disturbance, and whose remaining autocorrelation widens the interval. Unpaired samples may be in any order.
    With 2 to 4 samples a side nothing is trimmed and Student's t pays for the few degrees of freedom: the status is
    ``inconclusive``, with the minimum detectable change, unless the change is far outside the noise.
    ``beyond`` is the share of the margin that the estimate must exceed for ``regressed``; see :func:`decide_logs`.
    Raises NotMeasuredError for samples that are missing, not finite or not positive.
    """
    before, after = _arrays(baseline, candidate, paired)
    estimate = robust.in_time_order(after - before) if paired else robust.trimmed_difference(before, after)
    return compared(
        estimate, _centres(before, after), min(len(before), len(after)), _margin(margin), alpha, better, beyond
    )


def compared(
    estimate: Trimmed,
    centres: tuple[float, float],
    count: int,
    margin: Margin,
    alpha: float,
    better: Better = "lower",
    beyond: float = 1.0,
) -> Comparison:
    """Return the comparison that an estimated log ratio with its standard error amounts to."""
    _check_alpha(alpha)
    share = margin.of(*centres)
    limit = math.log1p(share)
    log_ratio, error, freedom = float(estimate.mean), float(estimate.standard_error), float(estimate.freedom)
    quantile = float(robust.critical(alpha / 2.0, freedom))
    half = quantile * error if error > 0.0 else (0.0 if freedom > 0.0 else math.inf)
    worse = log_ratio if better == "lower" else -log_ratio
    status = decide_logs(worse, worse - half, worse + half, margin=limit, beyond=beyond)
    return Comparison(
        status=status,
        ratio=_exp(log_ratio),
        ci_low=_exp(log_ratio - half),
        ci_high=_exp(log_ratio + half),
        min_detectable=detectable(half, error, freedom, limit * beyond),
        n=count,
        alpha=alpha,
        margin_fraction=share,
        p_worse=_p_worse(worse, error, freedom),
        log_ratio=log_ratio,
        standard_error=error,
    )


def decide_logs(estimate: float, low: float, high: float, *, margin: float, beyond: float = 1.0) -> Decision:
    """Return what an interval of a log ratio, positive when worse, says about a log margin.

    - ``regressed``: the interval excludes no change and reaches beyond the margin, and the estimate is beyond
      ``beyond`` times the margin. 1 means that a change of less than the margin passes; 0.5 that a change of the margin
      itself must be found, and the verdict on half of it may fall either way.
    - ``improved``: the mirror image of ``regressed``.
    - ``match``: the interval's bad end is within the margin (non-inferiority).
    - ``inconclusive``: none of these.
    """
    slack = ROUNDING * max(1.0, margin)
    if low > 0.0 and high > margin + slack and estimate > beyond * margin + slack:
        return "regressed"
    if high < 0.0 and low < -margin - slack and estimate < -beyond * margin - slack:
        return "improved"
    return "match" if high <= margin + slack else "inconclusive"


def detectable(half: float, error: float, freedom: float, threshold: float) -> float:
    """Return the change, as a share, that is called regressed with 80 % probability at this standard error."""
    if freedom <= 0.0 or not math.isfinite(half):
        return math.inf
    power = float(robust.critical(1.0 - DETECTION_POWER, freedom)) * error if error > 0.0 else 0.0
    change = max(half, threshold) + power
    return math.expm1(change) if change < 700.0 else math.inf


def interleaved_interval(
    slow: Sequence[float], fast: Sequence[float], *, confidence: float = 0.95, random_order: bool = True
) -> Interval:
    """Return slow / fast with its interval from interleaved runs: how many times faster ``fast`` is.

    Pair i of both sides ran next to each other. In random order within each pair, noise is symmetric and uncorrelated
    from pair to pair however the machine wanders, and Student's t on the log ratios covers as often as it says. In a
    fixed order it does not: ``random_order=False`` trims, and widens the interval for autocorrelation.
    """
    before, after = _arrays(fast, slow, paired=True)
    differences = after - before
    estimate = robust.trimmed(differences, trim=0.0) if random_order else robust.in_time_order(differences)
    half = float(robust.critical((1.0 - confidence) / 2.0, estimate.freedom)) * float(estimate.standard_error)
    half = math.inf if math.isnan(half) else half
    centre = float(estimate.mean)
    return Interval(_exp(centre), _exp(centre - half), _exp(centre + half), confidence)


def scaling_efficiency(speedup: Interval, workers: int) -> Interval:
    """Return a speed-up over one worker as a share of the ideal one, ``workers`` times."""
    if workers < 1:
        raise ConfigurationError("No scaling without workers", expected="at least 1", actual=str(workers))
    return Interval(speedup.estimate / workers, speedup.low / workers, speedup.high / workers, speedup.confidence)


def _p_worse(worse: float, error: float, freedom: float) -> float:
    if freedom <= 0.0 or not math.isfinite(error):
        return 1.0
    if error == 0.0:
        return 1.0 if worse <= 0.0 else 0.0
    return float(robust.tail_probability(worse / error, freedom))


def _arrays(baseline: Sequence[float], candidate: Sequence[float], paired: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    before, after = np.array(_logs(baseline)), np.array(_logs(candidate))
    if paired and len(before) != len(after):
        counts = f"{len(before)} and {len(after)}"
        raise ConfigurationError("Pairs need as many samples on both sides", expected="equal counts", actual=counts)
    return before, after


def _centres(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
    return _exp(float(robust.trimmed(before).mean)), _exp(float(robust.trimmed(after).mean))


def _margin(margin: float | Margin) -> Margin:
    return margin if isinstance(margin, Margin) else Margin(fraction=float(margin))


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ConfigurationError("Bad alpha", expected="between 0 and 1", actual=str(alpha))

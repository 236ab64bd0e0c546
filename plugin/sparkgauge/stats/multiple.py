"""Many tests in one session: adjusted p-values, and pooling of related parametrisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.stats.comparison import Comparison
from sparkgauge.stats.intervals import Interval, _exp


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the given order.

    Calling those at most alpha keeps the probability of even one false call at alpha, however the tests depend on each
    other (S. Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(_order(p_values)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return Benjamini and Hochberg's adjusted p-values, in the given order.

    Calling those at most q keeps the expected share of false calls among the calls at q, for independent or positively
    dependent tests (JRSS B 57, 1995). More powerful than :func:`holm`, and weaker in what it promises.
    """
    adjusted, best = [0.0] * len(p_values), 1.0
    for rank, index in reversed(list(enumerate(_order(p_values), start=1))):
        best = min(best, p_values[index] * len(p_values) / rank)
        adjusted[index] = best
    return adjusted


@dataclass(frozen=True)
class Pooled:
    """What several comparisons say together."""

    interval: Interval
    """Of the common ratio."""
    heterogeneity: float
    """Standard deviation of the true log ratios between the comparisons; 0 where noise alone explains their spread."""
    inconsistency: float
    """I squared: the share of the spread that is not noise."""
    n: int


def pool(comparisons: Sequence[Comparison], *, confidence: float = 0.99) -> Pooled:
    """Return the ratio that related comparisons (parametrisations of one test) have in common.

    Random effects after DerSimonian and Laird (Controlled Clinical Trials 7, 1986): each comparison may have a true
    ratio of its own. The interval is Hartung and Knapp's (Statistics in Medicine 20, 2001), never narrower than the
    normal one of the weights; a single comparison, or one without noise, needs no pooling and is refused.
    """
    import numpy as np

    from sparkgauge.stats import robust

    effects = np.array([one.log_ratio for one in comparisons])
    variances = np.array([one.standard_error**2 for one in comparisons])
    if len(effects) < 2 or not np.isfinite(variances).all() or not (variances > 0.0).all():
        raise NotMeasuredError("Nothing to pool", expected="two comparisons or more, each with a standard error")
    freedom = len(effects) - 1
    fixed = 1.0 / variances
    spread = float((fixed * (effects - (fixed * effects).sum() / fixed.sum()) ** 2).sum())
    between = max(0.0, (spread - freedom) / float(fixed.sum() - (fixed**2).sum() / fixed.sum()))
    weights = 1.0 / (variances + between)
    centre = float((weights * effects).sum() / weights.sum())
    scale = max(1.0, float((weights * (effects - centre) ** 2).sum()) / freedom)
    half = float(robust.critical((1.0 - confidence) / 2.0, freedom)) * math.sqrt(scale / float(weights.sum()))
    interval = Interval(_exp(centre), _exp(centre - half), _exp(centre + half), confidence)
    inconsistency = max(0.0, 1.0 - freedom / spread) if spread > 0.0 else 0.0
    return Pooled(interval, math.sqrt(between), inconsistency, len(effects))


def _order(p_values: Sequence[float]) -> list[int]:
    bad = next((p for p in p_values if not 0.0 <= p <= 1.0), None)
    if bad is not None:
        raise ConfigurationError("Bad p-value", expected="between 0 and 1", actual=str(bad))
    return sorted(range(len(p_values)), key=lambda index: p_values[index])

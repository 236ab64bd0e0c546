"""Trimmed means with winsorised standard errors, and what autocorrelation adds to them. NumPy arrays in and out.

One disturbed round must not decide a comparison, so the tails are trimmed. The standard error of a trimmed mean comes
from the winsorised sum of squares (J. W. Tukey and D. H. McLaughlin, Sankhya A 25, 1963); two sides with unequal
variances are compared after K. K. Yuen, "The two-sample trimmed t for unequal population variances", Biometrika 61,
1974. Below five samples nothing is trimmed, and both reduce to Student's and Welch's t.

Every function works along the last axis, so that thousands of resamplings are one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIM = 0.2
"""Share trimmed from each tail, R. R. Wilcox's advice for heavy tails (Introduction to Robust Estimation, 2012)."""

TRIMS = (0.1, 0.25, 0.4)
"""Shares that :func:`narrowest` chooses from."""

SELECTION = 2.0
"""What the level is divided by for that choice; three independent ones would need 3, but these share their samples."""

FEWEST_FOR_AUTOCORRELATION = 8
"""Samples below which an estimated autocorrelation says nothing."""

NOISE_LIMIT = 1.0
"""Standard errors up to which an estimated autocorrelation counts as noise."""

FLAT = 1e-24
"""Sum of squares of logs at or below which samples count as identical: rounding, not noise."""


@dataclass(frozen=True)
class Trimmed:
    """Trimmed mean(s) with standard error and degrees of freedom."""

    mean: Any
    standard_error: Any
    freedom: Any


def trimmed(values: NDArray[Any], *, trim: float = TRIM) -> Trimmed:
    """Return the trimmed mean along the last axis with its winsorised standard error."""
    import numpy as np

    count = values.shape[-1]
    cut = int(trim * count)
    kept = count - 2 * cut
    ordered = np.sort(values, axis=-1)  # also makes the last bit independent of the order of the samples
    middle = ordered[..., cut : count - cut]
    mean = middle.mean(axis=-1)
    if kept < 2:
        return Trimmed(mean, np.full_like(mean, math.inf), 0)
    low, high = middle[..., 0], middle[..., -1]
    centre = (middle.sum(axis=-1) + cut * (low + high)) / count
    squares = ((middle - centre[..., None]) ** 2).sum(axis=-1) + cut * ((low - centre) ** 2 + (high - centre) ** 2)
    squares = np.where(squares <= FLAT, 0.0, squares)
    return Trimmed(mean, np.sqrt(squares / (kept * (kept - 1))), kept - 1)


def trimmed_difference(before: NDArray[Any], after: NDArray[Any], *, trim: float = TRIM) -> Trimmed:
    """Return Yuen's difference of trimmed means, after - before, with Welch's degrees of freedom."""
    import numpy as np

    one, two = trimmed(before, trim=trim), trimmed(after, trim=trim)
    if one.freedom == 0 or two.freedom == 0:
        return Trimmed(two.mean - one.mean, np.full_like(one.mean, math.inf), 0)
    return combined(one, two)


def combined(one: Trimmed, two: Trimmed) -> Trimmed:
    """Return two - one of independent estimates, with the Welch-Satterthwaite degrees of freedom."""
    import numpy as np

    a, b = one.standard_error**2, two.standard_error**2
    total = a + b
    # Scaled before squaring, so that tiny variances do not underflow; nothing varies: the smaller side's freedom.
    share = np.divide(a, total, out=np.full_like(total, 0.5), where=total > 0.0)
    freedom = 1.0 / (share**2 / one.freedom + (1.0 - share) ** 2 / two.freedom)
    return Trimmed(two.mean - one.mean, np.sqrt(total), freedom)


def variance_inflation(values: NDArray[Any], *, trim: float = TRIM) -> Any:
    """Return how much autocorrelation raises the variance of the mean of ``values``, in time order; at least 1.

    1 + 2 (r1 + r2 + ...) of the winsorised values, up to the first lag whose autocorrelation is within
    ``NOISE_LIMIT`` of its own noise, 1 / sqrt(n); a truncation rule after D. N. Politis, "Adaptive bandwidth choice"
    (J. Nonparametric Statistics 15, 2003). Never below 1: an apparent negative autocorrelation of a few rounds must not
    buy certainty.
    """
    import numpy as np

    count = values.shape[-1]
    if count < FEWEST_FOR_AUTOCORRELATION:
        return np.ones(values.shape[:-1])
    ordered, cut = np.sort(values, axis=-1), int(trim * count)
    clipped = np.clip(values, ordered[..., cut, None], ordered[..., count - 1 - cut, None])
    clipped = clipped - clipped.mean(axis=-1, keepdims=True)
    variance = (clipped**2).sum(axis=-1)
    variance = np.where(variance <= FLAT, math.inf, variance)
    total, open_ = np.zeros(values.shape[:-1]), np.ones(values.shape[:-1], dtype=bool)
    for lag in range(1, count // 4 + 1):
        # The subtracted mean makes every autocorrelation about 1 / n too small.
        correlation = (clipped[..., lag:] * clipped[..., :-lag]).sum(axis=-1) / variance + 1.0 / count
        open_ = open_ & (correlation > NOISE_LIMIT / math.sqrt(count))
        total = total + np.where(open_, correlation, 0.0)
        if not open_.any():
            break
    return 1.0 + 2.0 * total


def inflated(estimate: Trimmed, factor: Any) -> Trimmed:
    """Return ``estimate`` with its variance multiplied by ``factor`` and its degrees of freedom divided by it."""
    import numpy as np

    freedom = np.maximum(1.0, np.asarray(estimate.freedom, dtype=float) / factor)
    return Trimmed(estimate.mean, estimate.standard_error * np.sqrt(factor), freedom)


def in_time_order(values: NDArray[Any], *, trim: float = TRIM) -> Trimmed:
    """Return the trimmed mean of values in time order, its standard error widened for their autocorrelation."""
    return inflated(trimmed(values, trim=trim), variance_inflation(values, trim=trim))


def narrowest(values: NDArray[Any], tail: float, *, trims: tuple[float, ...] = TRIMS) -> tuple[Trimmed, Any]:
    """Return the estimate of values in time order whose interval is narrowest over ``trims``, and its half-width.

    How heavy the tails are differs between a quiet machine, where trimming much wastes samples, and a crowded one,
    where the middle fifth of the pairs says more than all of them. Choosing after seeing the data favours samples that
    agree by luck: each candidate is taken at ``tail / SELECTION``, which held the level on normal, heavy-tailed and
    contaminated samples (docs/gate.md).
    """
    import numpy as np

    chosen: list[Any] = []
    for trim in trims:
        one = in_time_order(values, trim=trim)
        quantile = critical(tail / (SELECTION if len(trims) > 1 else 1.0), one.freedom)
        half = np.where(one.standard_error > 0.0, quantile * one.standard_error, 0.0)
        new = [one.mean, one.standard_error, one.freedom * np.ones_like(half), half]
        chosen = [np.where(half < chosen[3], a, b) for a, b in zip(new, chosen, strict=True)] if chosen else new
    return Trimmed(*chosen[:3]), chosen[3]


def critical(tail: float, freedom: Any) -> Any:
    """Return Student's t with probability ``tail`` above it; infinite without degrees of freedom."""
    import numpy as np
    from scipy import special

    freedom = np.asarray(freedom, dtype=float)
    return np.where(freedom > 0.0, -special.stdtrit(np.maximum(freedom, 1e-9), tail), math.inf)


def tail_probability(score: Any, freedom: Any) -> Any:
    """Return the probability that Student's t exceeds ``score``."""
    from scipy import special

    return special.stdtr(freedom, -score)

"""Change points over a baseline's history: steps that each stayed within the margin, and slow drift.

Segments are found top-down, as E-divisive does (D. S. Matteson and N. A. James, JASA 109, 2014) and as performance
suites have used it (D. Daly et al., "The use of change point detection to identify software performance regressions",
ICPE 2020): the split with the largest statistic is tested by permutation, and both halves are searched in turn. The
statistic is the standardised rank sum of A. N. Pettitt (Applied Statistics 28, 1979) instead of the energy distance:
ranks do not care for outliers, their permutation distribution depends on the length alone, and both reduce to "where
does the level change", which is the question here. Drift without a step is Mann's trend test (Econometrica 13, 1945)
with the slope of Sen (JASA 63, 1968).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats.intervals import _logs

if TYPE_CHECKING:
    from numpy.typing import NDArray

PERMUTATIONS = 999
SHORTEST_SEGMENT = 3


@dataclass(frozen=True)
class ChangePoint:
    """A place in a history where the level changed."""

    index: int
    """The first value of the new level."""
    ratio: float
    """Median of the new level over the median of the old one."""
    p_value: float
    """By permutation; at least 1 / 1,000."""


@dataclass(frozen=True)
class Drift:
    """A steady change over a history."""

    per_entry: float
    """Change from one entry to the next, as a share."""
    total: float
    """Change over the whole history, as a share."""
    p_value: float


def change_points(
    values: Sequence[float], *, alpha: float = 0.01, shortest: int = SHORTEST_SEGMENT
) -> list[ChangePoint]:
    """Return where the level of positive ``values``, oldest first, changed; in order.

    Each split errs with probability at most ``alpha`` on exchangeable values. Two segments of ``shortest`` are the
    least; a step in 10 entries or fewer can hardly be told from noise at 0.01, and no change is then reported.
    """
    import numpy as np

    if shortest < 2 or not 1.0 / (PERMUTATIONS + 1) < alpha < 1.0:
        actual = f"{shortest}, {alpha}"
        raise ConfigurationError(
            "Bad change point settings", expected="shortest >= 2, 0.001 < alpha < 1", actual=actual
        )
    series = np.array(_logs(values))
    splits = sorted(_search(series, 0, alpha, shortest))
    edges = [0, *(index for index, _ in splits), len(series)]
    levels = [float(np.median(series[a:b])) for a, b in itertools.pairwise(edges)]
    return [ChangePoint(index, math.exp(levels[k + 1] - levels[k]), p) for k, (index, p) in enumerate(splits)]


def drift(values: Sequence[float]) -> Drift:
    """Return the steady trend of positive ``values``, oldest first, with its two-sided p-value.

    Ties are few among measured times and only make the test more cautious. Fewer than four values have no trend.
    """
    import numpy as np
    from scipy import special

    series = np.array(_logs(values))
    count = len(series)
    if count < 4:
        return Drift(0.0, 0.0, 1.0)
    first, second = np.triu_indices(count, 1)
    steps = series[second] - series[first]
    score = float(np.sign(steps).sum())
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18.0)
    standard = max(0.0, abs(score) - 1.0) / deviation
    slope = float(np.median(steps / (second - first)))
    return Drift(math.expm1(slope), math.expm1(slope * (count - 1)), min(1.0, 2.0 * float(special.ndtr(-standard))))


def _search(series: NDArray[Any], offset: int, alpha: float, shortest: int) -> list[tuple[int, float]]:
    if len(series) < 2 * shortest:
        return []
    ranks = _ranks(series)
    statistics = _statistics(ranks[None, :], shortest)[0]
    best = int(statistics.argmax())
    null = _null(len(series), shortest)
    p_value = (1 + int((null >= statistics[best] - 1e-9).sum())) / (len(null) + 1)
    if p_value > alpha or statistics[best] <= 0.0:
        return []
    split = best + shortest
    left = _search(series[:split], offset, alpha, shortest)
    right = _search(series[split:], offset + split, alpha, shortest)
    return [*left, (offset + split, p_value), *right]


def _statistics(ranks: NDArray[Any], shortest: int) -> NDArray[Any]:
    """Return the standardised rank sum before each split, for each row of ranks."""
    import numpy as np

    count = ranks.shape[-1]
    sizes = np.arange(shortest, count - shortest + 1)
    sums = ranks.cumsum(axis=-1)[..., sizes - 1]
    deviation = np.sqrt(sizes * (count - sizes) * (count + 1) / 12.0)
    standardised: NDArray[Any] = np.abs(sums - sizes * (count + 1) / 2.0) / deviation
    return standardised


@lru_cache(maxsize=256)
def _null(count: int, shortest: int) -> NDArray[Any]:
    """Return the permutation distribution of the largest statistic; the same for every history of this length."""
    import numpy as np

    generator = np.random.default_rng(count)
    ranks = generator.permuted(np.tile(np.arange(1.0, count + 1.0), (PERMUTATIONS, 1)), axis=1)
    return np.sort(_statistics(ranks, shortest).max(axis=-1))


def _ranks(series: NDArray[Any]) -> NDArray[Any]:
    """Return ranks from 1, the mean rank for ties."""
    import numpy as np

    _, inverse, counts = np.unique(series, return_inverse=True, return_counts=True)
    middle: NDArray[Any] = (counts.cumsum() - (counts - 1) / 2.0)[inverse]
    return middle

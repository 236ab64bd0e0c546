"""Pairs freed of what the machine did to them, as far as a covariate tells. NumPy arrays in and out.

A reference kernel timed around each round of a pair felt some of the same neighbours. Its log ratio within the pair has
mean zero by the random order and knows nothing of the code, so subtracting a multiple of it leaves the true change
where it is and removes variance: analysis of covariance (R. A. Fisher, Statistical Methods for Research Workers, 4th
edition, 1932), known for online experiments as CUPED (A. Deng et al., WSDM 2013). CPU seconds of the round itself
cannot serve: slower code raises them, and the adjustment would remove the very regression that is looked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparkgauge.stats.robust import FLAT, TRIM

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST_FOR_SLOPE = 12
"""Pairs below which an estimated slope adds more noise than it removes."""

LEAST_CORRELATION = 2.0
"""In units of 1 / sqrt(pairs), its own noise: a weaker correlation is not used."""


def adjusted(differences: NDArray[Any], covariates: NDArray[Any], *, trim: float = TRIM) -> NDArray[Any]:
    """Return log ratios (last axis: pairs) less what ``covariates``, log ratios of the same pairs, explain of them.

    The slope is the least-squares one of winsorised values, so that one disturbed pair does not set it; where the
    correlation may be luck, or is negative, nothing is subtracted.
    """
    import numpy as np

    count = differences.shape[-1]
    if count < FEWEST_FOR_SLOPE:
        return differences
    clipped = _winsorised(covariates, trim)
    values, beside = (side - side.mean(axis=-1, keepdims=True) for side in (_winsorised(differences, trim), clipped))
    squares, both = (beside**2).sum(axis=-1), (values * beside).sum(axis=-1)
    scale = np.sqrt(squares * (values**2).sum(axis=-1))
    used = (squares > FLAT) & (both > LEAST_CORRELATION / math.sqrt(count) * scale)
    slope = np.divide(both, squares, out=np.zeros_like(both), where=used)
    result: NDArray[Any] = differences - slope[..., None] * clipped
    return result


def _winsorised(values: NDArray[Any], trim: float) -> NDArray[Any]:
    import numpy as np

    ordered, cut = np.sort(values, axis=-1), int(trim * values.shape[-1])
    clipped: NDArray[Any] = np.clip(values, ordered[..., cut, None], ordered[..., values.shape[-1] - 1 - cut, None])
    return clipped

"""Whether all executors of a round ended with the same model, told by two numbers of each array."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparkgauge.errors import TrainingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOLERANCE = 1e-4
"""Of an array's norm. Executors that apply the same sums differ by rounding at most, and not at all on equal
processors; one that left out a single step of a thousand is beyond it."""

PERIOD = 997
"""Numbers after which the fixed factors of a row repeat; a prime, so that no layer's rows lie in step with them."""

Fingerprint = Mapping[str, Sequence[float]]
"""(norm, projection) by the array's name; empty where it holds a number that is not finite."""


def fingerprint(weights: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return norm and projection on fixed random numbers of each of ``weights`` (arrays of any shape)."""
    import numpy as np

    drawn = np.random.default_rng(1)
    across, down = drawn.standard_normal(PERIOD), drawn.standard_normal(PERIOD)
    return {name: _of(np.asarray(values, np.float64).ravel(), across, down) for name, values in weights.items()}


def _of(values: NDArray[np.float64], across: NDArray[np.float64], down: NDArray[np.float64]) -> list[float]:
    import numpy as np

    norm = float(np.linalg.norm(values))
    if not math.isfinite(norm):
        return []
    rows = np.zeros(-(-len(values) // PERIOD) * PERIOD)
    rows[: len(values)] = values
    sums = rows.reshape(-1, PERIOD) @ across
    return [norm, float(sums @ np.resize(down, len(sums)))]


def check(found: Sequence[Fingerprint], model: str) -> None:
    """Raise TrainingError where an executor's arrays are not executor 0's; ``found`` is by executor, empty for none."""
    first = found[0]
    for executor, other in enumerate(found[1:], 1):
        if alone := sorted(first.keys() ^ other.keys()):
            teller = executor if alone[0] in other else 0
            raise _differ(model, f"of executors 0 and {executor} only {teller} has reported {alone[0]}")
        apart = {name: _distance(first[name], other[name]) for name in first}
        worst = max(apart, key=apart.__getitem__, default="")
        if worst and apart[worst] > TOLERANCE:
            size = "no finite numbers on one of them" if math.isinf(apart[worst]) else f"{apart[worst]:.2g} of its size"
            raise _differ(model, f"{worst} of executor {executor} and of executor 0 differ: {size}")


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return an estimate of how far two arrays are apart, as a share of their norm; inf where one is not finite."""
    if one == other:
        return 0.0
    if not (one and other):
        return math.inf
    (norm, projection), (other_norm, other_projection) = one, other
    return max(abs(norm - other_norm), abs(projection - other_projection)) / max(norm, other_norm)


def _differ(model: str, actual: str) -> TrainingError:
    return TrainingError(
        f"The executors did not train the same {model!r}",
        expected="equal weights on all of them at the end, as synchronous training leaves them",
        actual=actual,
        hint="Begin with equal weights, and update them on every executor by gradients summed over all",
    )

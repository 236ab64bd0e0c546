"""Pairs of rounds taken until the verdict is clear, with the error probability spent over the looks.

Looking again after every few pairs at a fixed level would err far more often than that level says. The level of each
look comes from a spending function (K. K. G. Lan and D. L. DeMets, "Discrete sequential boundaries for clinical
trials", Biometrika 70, 1983) of the power family alpha * t ** rho (K. Kim and D. L. DeMets, Biometrika 74, 1987), where
t is the share of ``max_pairs`` seen. The looks' statistics are strongly dependent, so the levels are found by Armitage,
McPherson and Rowe's recursion over Brownian motion (JRSS A 132, 1969) rather than by Bonferroni, which would waste
power. Student's t takes a level's place at few pairs (Jennison and Turnbull, Group Sequential Methods, 2000, section
3.8). What decides is the repeated confidence interval of the look (Jennison and Turnbull, JRSS B 51, 1989), so that the
interval shown with a verdict is the one that decided it.

A pair is one round of each side, next to each other, **in random order**: drift and disturbances then hit either side
equally often, and the log ratio of a pair is symmetric about the true change however noisy the machine is. How much is
trimmed is chosen from the samples (:func:`sparkgauge.stats.robust.narrowest`), paid for in the level. What
autocorrelation is left widens the standard error (:func:`sparkgauge.stats.robust.variance_inflation`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import robust
from sparkgauge.stats.comparison import Margin, _check_alpha, _margin, _p_worse, decide_logs, detectable
from sparkgauge.stats.covariate import adjusted
from sparkgauge.stats.intervals import Interval, _exp, _logs
from sparkgauge.stats.robust import Trimmed

if TYPE_CHECKING:
    from numpy.typing import NDArray

SequentialStatus = Literal["open", "match", "regressed", "improved", "inconclusive"]
"""``open`` until decided; ``inconclusive`` once ``max_pairs`` did not decide it."""

SPENDING_POWER = 2.0
"""rho of the spending function: 1 spends evenly over the pairs, 3 is close to O'Brien and Fleming's reluctance."""

FIRST_LOOK_PAIRS = 12
"""Fewer show no autocorrelation that is there: on real rounds under load (autocorrelation 0.64) a first look at 6 pairs
raised 1.5 % false alarms at alpha 0.01, at 12 pairs 0.5 % (docs/gate.md)."""

LOOK_GROWTH = 1.15
"""Pairs at a look over pairs at the look before."""

MOST_PAIRS = 2000
"""The recursion's grid resolves no finer steps of information."""

_GRID = 801
_REACH = 8.0


@dataclass(frozen=True)
class Plan:
    """When to look and at which level: everything about a sequential comparison that is fixed in advance."""

    margin: Margin
    alpha: float
    min_pairs: int
    max_pairs: int
    beyond: float = 0.5
    trims: tuple[float, ...] = robust.TRIMS
    rho: float = SPENDING_POWER

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        if not 2 <= self.min_pairs <= self.max_pairs <= MOST_PAIRS:
            actual, expected = f"{self.min_pairs} and {self.max_pairs}", f"2 <= min_pairs <= max_pairs <= {MOST_PAIRS}"
            raise ConfigurationError("Bad numbers of pairs", expected=expected, actual=actual)

    @property
    def looks(self) -> tuple[int, ...]:
        """Return the numbers of pairs at which a decision is tried."""
        return _looks(self.min_pairs, self.max_pairs)

    @property
    def levels(self) -> tuple[float, ...]:
        """Return the one-sided level of each look."""
        return spending_levels(self.alpha / 2.0, tuple(n / self.max_pairs for n in self.looks), self.rho)

    def look(self, differences: NDArray[Any], level: float) -> tuple[Trimmed, Any]:
        """Return the estimate of log ratios (last axis: pairs in time order) and its half-width at ``level``."""
        return robust.narrowest(differences, level, trims=self.trims)


class SequentialComparison:
    """A comparison that grows pair by pair and says when it is decided.

    At most ``alpha`` is the probability of ``regressed`` or ``improved`` with nothing changed (half of it each), and
    half of it that of ``match`` when the change is at the margin or beyond, over all looks together.
    """

    def __init__(
        self,
        margin: float | Margin,
        alpha: float = 0.01,
        min_pairs: int | None = None,
        max_pairs: int = 80,
        *,
        beyond: float = 0.5,
        trims: tuple[float, ...] = robust.TRIMS,
    ) -> None:
        """Look first at ``min_pairs``: :data:`FIRST_LOOK_PAIRS` by default, or ``max_pairs`` where that is less."""
        first = min(FIRST_LOOK_PAIRS, max_pairs) if min_pairs is None else min_pairs
        self.plan = Plan(_margin(margin), alpha, first, max_pairs, beyond, trims)
        self.status: SequentialStatus = "open"
        self.interval = Interval(math.nan, 0.0, math.inf, 1.0 - alpha)
        """Ratio candidate / baseline and its repeated confidence interval at the last look."""
        self.min_detectable = math.inf
        """Share by which the candidate would have to be worse to be found at this look with a probability of 80 %."""
        self.p_worse = 1.0
        """One-sided probability of such pairs with nothing changed, over all looks, at the last one: its own p-value
        divided by the look's share of alpha / 2."""
        self._before: list[float] = []
        self._after: list[float] = []

    @property
    def pairs(self) -> int:
        """Return the number of pairs so far."""
        return len(self._before)

    @property
    def decided(self) -> bool:
        """Return whether further pairs would change nothing."""
        return self.status != "open"

    def add(self, baseline_value: float, candidate_value: float) -> SequentialStatus:
        """Return the status after one more pair of positive values of which less is better.

        A metric of which more is better goes in with its sides swapped and ``regressed`` means what it says. Pairs
        after the decision are ignored: looking once more at a settled question is how sequential tests are broken.
        """
        (before,), (after,) = _logs([baseline_value]), _logs([candidate_value])
        if self.decided:
            return self.status
        self._before.append(before)
        self._after.append(after)
        if self.pairs in self.plan.looks:
            self._look()
        return self.status

    def _look(self) -> None:
        import numpy as np

        before, after = np.array(self._before), np.array(self._after)
        level = self.plan.levels[self.plan.looks.index(self.pairs)]
        estimate, half_width = self.plan.look(after - before, level)
        centre, half = float(estimate.mean), float(half_width)
        sides = (_exp(float(robust.trimmed(side).mean)) for side in (before, after))
        margin = math.log1p(self.plan.margin.of(*sides))
        decision = decide_logs(centre, centre - half, centre + half, margin=margin, beyond=self.plan.beyond)
        if decision != "inconclusive" or self.pairs >= self.plan.max_pairs:
            self.status = decision
        self.interval = Interval(_exp(centre), _exp(centre - half), _exp(centre + half), 1.0 - self.plan.alpha)
        error, freedom = float(estimate.standard_error), float(estimate.freedom)
        self.min_detectable = detectable(half, error, freedom, margin * self.plan.beyond)
        chosen = robust.SELECTION if len(self.plan.trims) > 1 else 1.0
        self.p_worse = min(1.0, chosen * _p_worse(centre, error, freedom) * self.plan.alpha / 2.0 / level)


@dataclass(frozen=True)
class Outcomes:
    """What many sequential comparisons came to: NumPy arrays, one item each."""

    status: Any
    """Strings, as in :data:`SequentialStatus`, never ``open``."""
    pairs: Any
    """Pairs until the decision."""

    def share(self, status: str) -> float:
        """Return the share that ended with ``status``."""
        return float((self.status == status).mean())


def settle_many(differences: NDArray[Any], plan: Plan, covariates: NDArray[Any] | None = None) -> Outcomes:
    """Return the outcomes over the rows of ``differences``: log ratios, ``plan.max_pairs`` pairs in time order.

    The same looks and the same rule as :class:`SequentialComparison`, all rows at once, for calibration. The margin is
    its fraction; an absolute one would need both sides' values. ``covariates``, in the shape of ``differences``, are
    log ratios of what the machine did to either side: see :func:`sparkgauge.stats.covariate.adjusted`.
    """
    import numpy as np

    rows = len(differences)
    status, pairs = np.full(rows, "inconclusive", dtype="<U12"), np.full(rows, plan.max_pairs)
    margin, open_ = math.log1p(plan.margin.fraction), np.ones(rows, dtype=bool)
    for count, level in zip(plan.looks, plan.levels, strict=True):
        seen = differences[open_, :count]
        if covariates is not None:
            seen = adjusted(seen, covariates[open_, :count])
        estimate, half = plan.look(seen, level)
        decided = _decide_many(estimate.mean, half, margin, plan.beyond)
        where = np.flatnonzero(open_)[decided != "inconclusive"]
        status[where], pairs[where] = decided[decided != "inconclusive"], count
        open_[where] = False
        if not open_.any():
            break
    return Outcomes(status, pairs)


def _decide_many(estimate: NDArray[Any], half: NDArray[Any], margin: float, beyond: float) -> NDArray[Any]:
    import numpy as np

    low, high = estimate - half, estimate + half
    regressed = (low > 0.0) & (high > margin) & (estimate > beyond * margin)
    improved = (high < 0.0) & (low < -margin) & (estimate < -beyond * margin)
    return np.select([regressed, improved, high <= margin], ["regressed", "improved", "match"], "inconclusive")


@lru_cache(maxsize=64)
def _looks(first: int, last: int) -> tuple[int, ...]:
    looks = [first]
    while looks[-1] < last:
        looks.append(min(last, max(looks[-1] + 1, round(looks[-1] * LOOK_GROWTH))))
    return tuple(looks)


@lru_cache(maxsize=64)
def spending_levels(alpha: float, times: tuple[float, ...], rho: float = SPENDING_POWER) -> tuple[float, ...]:
    """Return the one-sided level of each look, so that the looks together err with probability ``alpha``.

    ``times`` are the shares of the information at the looks, rising to 1. At most alpha * t ** rho is spent by time t.
    """
    import numpy as np
    from scipy import special

    levels: list[float] = []
    grid = np.linspace(-_REACH, _REACH, _GRID)
    width, density, spent = grid[1] - grid[0], None, 0.0
    for before, time in zip((0.0, *times), times, strict=False):
        share = alpha * time**rho - spent
        spent += share
        sd = math.sqrt(time - before)
        if density is None:
            density = np.exp(-0.5 * (grid / sd) ** 2) / (sd * math.sqrt(2.0 * math.pi))
            bound = -float(special.ndtri(share)) * sd
        else:
            mass = density * width
            density = np.exp(-0.5 * ((grid[:, None] - grid[None, :]) / sd) ** 2) @ mass / (sd * math.sqrt(2 * math.pi))
            bound = _bound(grid, mass, sd, share)
        levels.append(float(special.ndtr(-bound / math.sqrt(time))))
        density = np.where(grid < bound, density, 0.0)
    return tuple(levels)


def _bound(grid: NDArray[Any], mass: NDArray[Any], sd: float, share: float) -> float:
    """Return the value that the next look exceeds with probability ``share``, by bisection."""
    from scipy import special

    low, high = 0.0, _REACH
    for _ in range(50):
        middle = (low + high) / 2.0
        exceeded = float(special.ndtr((grid - middle) / sd) @ mass)
        low, high = (middle, high) if exceeded > share else (low, middle)
    return high

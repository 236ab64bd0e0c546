"""Where a change went: which phase explains it, which executor lags, and whether it is work or waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import robust
from sparkgauge.stats.comparison import Comparison
from sparkgauge.stats.intervals import Interval, _finite
from sparkgauge.stats.multiple import holm
from sparkgauge.stats.robust import Trimmed

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PhaseChange:
    """One phase's part in a change of the runtime."""

    name: str
    change_seconds: Interval
    """candidate - baseline, of trimmed means."""
    share: Interval
    """Of the whole change; unbounded where the whole change may be none. Above 1 where other phases got faster."""
    p_adjusted: float
    """One-sided, slower, Holm over the phases."""


@dataclass(frozen=True)
class Localisation:
    """Which part explains a slowdown."""

    parts: tuple[PhaseChange, ...]
    """The largest change first."""
    named: str | None
    """The part that is shown to be slower and explains most of the change; None where none is shown."""


def localise(
    phases_baseline: Mapping[str, Sequence[float]],
    phases_candidate: Mapping[str, Sequence[float]],
    *,
    alpha: float = 0.01,
    paired: bool = False,
) -> Localisation:
    """Return which phase explains a slowdown; seconds of each phase by name, one value a round.

    A phase is tested on its ratio against its own noise, so a small one is not lost in a large noisy one; give CPU
    seconds where they were measured. All phases are tested and the p-values adjusted (Holm). Of the phases shown to be
    slower the one with the largest change is named. A share's interval is Fieller's (E. C. Fieller, JRSS B 16, 1954),
    with the phase and the rest taken as independent.
    Phases that one side lacks count as 0 s there.
    """
    names = sorted({*phases_baseline, *phases_candidate})
    sides = [_columns(phases, names) for phases in (phases_baseline, phases_candidate)]
    estimates = {name: _change(sides[0][name], sides[1][name], paired) for name in names}
    p_values = [_p_of(*_relative(sides[0][name], sides[1][name]), paired) for name in names]
    adjusted = dict(zip(names, holm(p_values), strict=True))
    parts = [_part(name, estimates, adjusted[name], alpha) for name in names]
    parts.sort(key=lambda part: -part.change_seconds.estimate)
    named = next((part.name for part in parts if part.p_adjusted <= alpha), None)
    return Localisation(tuple(parts), named)


def find_straggler(
    executors_baseline: Mapping[int, Sequence[float]],
    executors_candidate: Mapping[int, Sequence[float]],
    *,
    alpha: float = 0.01,
) -> int | None:
    """Return the rank whose own work (compute seconds, one value a round) fell behind the others'; None for none.

    Each executor's time is taken relative to the median of the others in the same round, so that what slows all of
    them is no straggling. Use work, not waiting: in synchronous training the others wait for the straggler, and their
    sync phase grows, not its own. Ranks must be the same on both sides.
    """
    ranks = sorted(executors_baseline)
    if ranks != sorted(executors_candidate):
        raise ConfigurationError("Different executors", expected=str(ranks), actual=str(sorted(executors_candidate)))
    if len(ranks) < 2:
        return None
    before, after = _relative_to_others(executors_baseline, ranks), _relative_to_others(executors_candidate, ranks)
    estimates = [robust.trimmed_difference(one, two) for one, two in zip(before, after, strict=True)]
    adjusted = holm([_p_slower(estimate) for estimate in estimates])
    slower = [(float(e.mean), rank) for e, p, rank in zip(estimates, adjusted, ranks, strict=True) if p <= alpha]
    return max(slower)[1] if slower else None


def work_or_waiting(wall: Comparison, cpu: Comparison) -> Literal["work", "waiting", "undecided"]:
    """Return what a regression of wall time is: more work, or waiting for a machine that others use.

    ``waiting`` when CPU time's whole interval stays below half of the wall time's change, ``work`` when it lies above
    it. CPU seconds do not see the disk, the network or a sleeping peer: waiting points at the environment, not at
    nothing.
    """
    half = wall.log_ratio / 2.0
    low, high = (math.log(bound) if bound > 0.0 else -math.inf for bound in (cpu.ci_low, cpu.ci_high))
    if wall.status != "regressed" or math.isnan(half):
        return "undecided"
    return "waiting" if high < half else "work" if low > half else "undecided"


def _columns(phases: Mapping[str, Sequence[float]], names: list[str]) -> dict[str, NDArray[Any]]:
    import numpy as np

    columns = {name: np.array(_finite(values)) for name, values in phases.items()}
    counts = {len(column) for column in columns.values()}
    if len(counts) != 1:
        actual = ", ".join(f"{name} {len(column)}" for name, column in columns.items()) or "no phases"
        raise ConfigurationError("Each round has every phase", expected="equal counts", actual=actual)
    (count,) = counts
    return {name: columns.get(name, np.zeros(count)) for name in names}


def _change(before: NDArray[Any], after: NDArray[Any], paired: bool) -> Trimmed:
    if paired and len(before) != len(after):
        counts = f"{len(before)} and {len(after)}"
        raise ConfigurationError("Pairs need as many rounds on both sides", expected="equal counts", actual=counts)
    return robust.in_time_order(after - before) if paired else robust.trimmed_difference(before, after)


def _relative(before: NDArray[Any], after: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return logs where there are any: a busy machine stretches a phase, it does not add seconds to it."""
    import numpy as np

    positive = bool((before > 0.0).all() and (after > 0.0).all())
    return (np.log(before), np.log(after)) if positive else (before, after)


def _p_of(before: NDArray[Any], after: NDArray[Any], paired: bool) -> float:
    """Return the one-sided p-value; for pairs the best of several trimmings, paid for as in the sequential test."""
    if not paired:
        return _p_slower(_change(before, after, paired))
    each = (_p_slower(robust.in_time_order(after - before, trim=trim)) for trim in robust.TRIMS)
    return min(1.0, robust.SELECTION * min(each))


def _p_slower(estimate: Trimmed) -> float:
    error, freedom, mean = float(estimate.standard_error), float(estimate.freedom), float(estimate.mean)
    if freedom <= 0.0 or not math.isfinite(error):
        return 1.0
    if error == 0.0:
        return 0.0 if mean > 0.0 else 1.0
    return float(robust.tail_probability(mean / error, freedom))


def _part(name: str, estimates: Mapping[str, Trimmed], p_adjusted: float, alpha: float) -> PhaseChange:
    own, confidence = estimates[name], 1.0 - alpha
    rest = [estimate for other, estimate in estimates.items() if other != name]
    freedom = min(float(estimate.freedom) for estimate in estimates.values())
    quantile = float(robust.critical(alpha / 2.0, freedom))
    mean, error = float(own.mean), float(own.standard_error)
    half = quantile * error if error > 0.0 else (0.0 if freedom > 0.0 else math.inf)
    change = Interval(mean, mean - half, mean + half, confidence)
    rest_mean = math.fsum(float(estimate.mean) for estimate in rest)
    rest_variance = math.fsum(float(estimate.standard_error) ** 2 for estimate in rest)
    share = _share(mean, error**2, rest_mean, rest_variance, quantile, confidence)
    return PhaseChange(name, change, share, p_adjusted)


def _share(
    own: float, own_variance: float, rest: float, rest_variance: float, quantile: float, confidence: float
) -> Interval:
    """Return own / (own + rest) with Fieller's interval."""
    total, total_variance = own + rest, own_variance + rest_variance
    estimate = own / total if total != 0.0 else math.nan
    square = quantile**2
    a = total**2 - square * total_variance
    b = own * total - square * own_variance  # own and total share own's noise
    c = own**2 - square * own_variance
    root = b * b - a * c
    if not (math.isfinite(root) and a > 0.0 and root >= 0.0):
        return Interval(estimate, -math.inf, math.inf, confidence)
    return Interval(estimate, (b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a, confidence)


def _relative_to_others(executors: Mapping[int, Sequence[float]], ranks: list[int]) -> list[NDArray[Any]]:
    import numpy as np

    table = np.array([_finite(executors[rank]) for rank in ranks])
    if not (table > 0.0).all():
        raise ConfigurationError("Executors without work", expected="compute seconds above 0")
    others = [np.median(np.delete(table, index, axis=0), axis=0) for index in range(len(ranks))]
    return [np.log(row / other) for row, other in zip(table, others, strict=True)]

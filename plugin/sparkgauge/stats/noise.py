"""What a machine's noise is made of, and comparisons with a baseline that was measured at another time.

A reference kernel timed beside each round tells how fast the machine was then. Dividing by it removes what both felt
and adds the reference's own noise: on this kind of machine it can lower the spread tenfold for rounds of seconds and
raise it for rounds of 0.2 s. So it is used only where the variance is measurably lower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import robust
from sparkgauge.stats.comparison import Comparison, Margin, _centres, _margin, compared
from sparkgauge.stats.intervals import Better, _logs
from sparkgauge.stats.robust import Trimmed

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST_FOR_A_CHOICE = 6
"""Rounds below which a lower variance cannot be told from luck, and nothing is normalised."""

CHOICE_ALPHA = 0.05


@dataclass(frozen=True)
class Normalisation:
    """Whether wall times are divided by the reference kernel's, and what was measured to say so."""

    kind: Literal["none", "reference"]
    sd_wall: float
    """Standard deviation of the log of wall time: for small values the coefficient of variation."""
    sd_normalised: float
    sd_cpu: float | None
    """Of the log of CPU time; None where it was not measured."""
    p_lower: float
    """One-sided probability of so much lower a variance by luck."""
    said: str
    """One sentence for the report."""


def normalise(wall: Sequence[float], reference: Sequence[float], *, at: float | None = None) -> list[float]:
    """Return wall times as if the reference kernel had always taken ``at`` seconds, by default its median.

    Give both sides of a comparison the same ``at``.
    """
    import numpy as np

    logs, beside = _pair_logs(wall, reference)
    level = float(np.median(beside)) if at is None else _logs([at])[0]
    return [float(value) for value in np.exp(logs - beside + level)]


def choose_normalisation(
    wall: Sequence[float], reference: Sequence[float], cpu: Sequence[float] | None = None
) -> Normalisation:
    """Return whether dividing by the reference lowers the variance of log wall time, tested at 0.05.

    Variances of paired samples are equal exactly when their sum and their difference are uncorrelated (E. J. G.
    Pitman, Biometrika 31, 1939; W. A. Morgan, same volume). Winsorised, so that one disturbed round does not choose.
    """
    import numpy as np

    logs, beside = _pair_logs(wall, reference)
    before, after = _winsorised(logs), _winsorised(logs - beside)
    sd_cpu = float(_winsorised(np.array(_logs(cpu))).std(ddof=1)) if cpu is not None and len(cpu) > 1 else None
    if len(logs) < FEWEST_FOR_A_CHOICE:
        said = f"not normalised: {len(logs)} rounds cannot tell whether the reference kernel lowers the noise"
        return Normalisation("none", *_sds(before, after), sd_cpu, 1.0, said)
    p_lower = _pitman_morgan(before, after)
    kind: Literal["none", "reference"] = "reference" if p_lower <= CHOICE_ALPHA else "none"
    sd_wall, sd_normalised = _sds(before, after)
    verb = "normalised" if kind == "reference" else "not normalised"
    said = f"{verb}: the noise of wall time is {sd_wall:.1%}, divided by the reference kernel {sd_normalised:.1%}"
    return Normalisation(kind, sd_wall, sd_normalised, sd_cpu, p_lower, said)


@dataclass(frozen=True)
class StoredComparison:
    """A comparison with samples from another time, and how far the machines' states differ."""

    comparison: Comparison
    normalisation: Normalisation | None
    """None without reference times."""
    reference_ratio: float | None
    """How much slower the reference kernel was than at the baseline's time."""
    said: str


def compare_stored(
    baseline: Sequence[float],
    candidate: Sequence[float],
    baseline_reference: Sequence[float] | None = None,
    candidate_reference: Sequence[float] | None = None,
    *,
    margin: float | Margin,
    alpha: float = 0.01,
    better: Better = "lower",
    beyond: float = 1.0,
    between_sd: float = 0.0,
    between_steps: bool = False,
    waiting: tuple[Sequence[float], Sequence[float]] | None = None,
) -> StoredComparison:
    """Return the comparison of samples, each side in time order, that were not interleaved.

    Below 8 rounds a side this is Welch's t on logarithms; from 8 on the tails are trimmed and autocorrelation widens
    each side's standard error. With reference times, and where dividing by them measurably lowers the noise, the
    divided times are compared. Either way the interval is widened where the machine was in another state: raw and
    divided times then disagree, and how much of that the right answer is cannot be known; less where the reference ran
    ``between_steps`` of the samples, and felt what they felt, than where it ran before them.

    ``waiting`` is how many times longer each sample of either side took for want of free cores. No kernel between the
    steps tells that: on two cores with two to three other processes, training took 1.4 times as long as the kernel
    said (docs/gate.md). It could be divided by, but code that asks for more cores than there are waits too; so a
    difference between the sides is an error of the comparison, which makes it wide, and not a correction.

    ``between_sd`` is the standard deviation of the log level between sessions with nothing changed, where a history or
    a self-check knows it; without it and without reference times the false-positive rate is far above ``alpha`` on a
    busy machine (docs/gate.md).
    """
    before, after = _logs_array(baseline), _logs_array(candidate)
    raw, crowding = _both(before, after), _shift_of(waiting)
    centres, count, limits = _centres(before, after), min(len(before), len(after)), _margin(margin)
    if baseline_reference is None or candidate_reference is None:
        said = f"not normalised: no reference kernel was timed on both sides{_said_of(waiting)}"
        raw = _with_known_error(_with_error(raw, between_sd), crowding)
        return StoredComparison(compared(raw, centres, count, limits, alpha, better, beyond), None, None, said)
    _, ref_before = _pair_logs(baseline, baseline_reference)
    _, ref_after = _pair_logs(candidate, candidate_reference)
    choice = choose_normalisation(
        [*_relative(before), *_relative(after)], [*_relative(ref_before), *_relative(ref_after)]
    )
    shift = float(robust.trimmed_difference(ref_before, ref_after).mean)
    if between_steps:
        adjusted, share = _adjusted((before, after), (ref_before, ref_after), shift)
        choice, widened = _least_error(choice, raw, adjusted, share, shift)
    else:
        divided = _both(before - ref_before, after - ref_after)
        chosen, other = (divided, raw) if choice.kind == "reference" else (raw, divided)
        widened = _spanning(chosen, shift, other)
    widened = _with_known_error(_with_error(widened, between_sd), crowding)
    result = compared(widened, centres, count, limits, alpha, better, beyond)
    said = f"{choice.said}; the reference kernel took {math.exp(shift):.2f} times as long as at the baseline"
    said += _said_of(waiting)
    return StoredComparison(result, choice, math.exp(shift), said)


UNCERTAIN_SHARE = 0.5
"""Standard deviation of the share of the machine's shift that a correction by the reference kernel leaves or overdoes.
A kernel feels a busy neighbour more or less than training does. Chosen on one trace, scored on others: docs/gate.md."""


SAID_WAITING = 0.05
"""Difference of the shares of time spent waiting for a core that is put into words."""


def _shift_of(waiting: tuple[Sequence[float], Sequence[float]] | None) -> float:
    if waiting is None:
        return 0.0
    before, after = (_logs_array(side) for side in waiting)
    return float(robust.trimmed_difference(before, after).mean)


def _said_of(waiting: tuple[Sequence[float], Sequence[float]] | None) -> str:
    if waiting is None:
        return ""
    before, after = (1.0 - math.exp(-float(robust.trimmed(_logs_array(side)).mean)) for side in waiting)
    if abs(after - before) < SAID_WAITING:
        return ""
    return (
        f"; the processes waited for a core {after:.0%} of the time they could have run, {before:.0%} at the baseline, "
        "which widens the interval (other work on these cores, or more threads than cores)"
    )


FELT, FELT_SD = 0.9, 0.25
"""What share of the change that the reference kernel feels between its steps a training feels too, before this one's
rounds are looked at: mean and standard deviation over models, machines and days (docs/gate.md)."""

FELT_ALIKE_SD = 0.15
"""By how much that share differs between what changed from round to round and what changed between the two sides."""


def _spanning(chosen: Trimmed, shift: float, other: Trimmed) -> Trimmed:
    """Return ``chosen`` with the machine's shift, as far as its correction is uncertain, as a further error."""
    disagreement = max(abs(shift), abs(float(chosen.mean) - float(other.mean)))
    return _with_error(chosen, UNCERTAIN_SHARE * disagreement)


FEWEST_ADJUSTED_IN_ORDER = 14
"""Samples from which the autocorrelation of adjusted ones is estimated. Little of it is left in them, and what 8 or 13
seem to have is mostly luck that made intervals of more rounds the wider ones (docs/gate.md)."""


def _adjusted(
    sides: tuple[NDArray[Any], NDArray[Any]], references: tuple[NDArray[Any], NDArray[Any]], shift: float
) -> tuple[Trimmed, float]:
    """Return after - before as if the machine had been equally fast, an analysis of covariance on logarithms, and the
    share of the reference's change that was taken out for it.

    That share, the slope, is the mean of what these rounds say and what is known beforehand, each by its precision (a
    normal prior, with the rounds' own residual variance plugged in). What stays uncertain of it is an error of the
    machine's ``shift``, of a known size.
    """
    import numpy as np

    y, x = (np.concatenate([side - side.mean() for side in both]) for both in (sides, references))
    freedom, squares, share = max(1, len(y) - 3), float(x @ x), FELT
    for _ in range(3):  # the residual variance depends on the slope, and hardly
        variance = max(float(((y - share * x) ** 2).sum()) / freedom, robust.FLAT)
        precision = 1.0 / FELT_SD**2 + squares / variance
        share = (FELT / FELT_SD**2 + float(x @ y) / variance) / precision
    first, second = (side - share * reference for side, reference in zip(sides, references, strict=True))
    error = shift * math.hypot(FELT_ALIKE_SD, precision**-0.5)
    return _with_known_error(_both(first, second, FEWEST_ADJUSTED_IN_ORDER), error), share


def _with_known_error(estimate: Trimmed, sd: float) -> Trimmed:
    """Return ``estimate`` with a further error whose size was not estimated from the samples: it has no uncertainty of
    its own, which the degrees of freedom say (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    own = float(estimate.standard_error)
    total, grows = math.hypot(own, sd), 0.0 < own < math.inf
    growth = min(total / own, 1e3) if grows else 1.0  # beyond, Student's t is the normal distribution anyway
    return Trimmed(estimate.mean, total, estimate.freedom * growth**4)


def _least_error(
    choice: Normalisation, raw: Trimmed, adjusted: Trimmed, share: float, shift: float
) -> tuple[Normalisation, Trimmed]:
    """Return the estimate with the smaller error; that of the one without adjustment holds all of the shift."""
    sides = _with_known_error(raw, shift), adjusted
    errors = [float(side.standard_error) for side in sides]
    divides = errors[1] < errors[0]
    noise = (
        f"the noise of wall time is {choice.sd_wall:.1%}, divided by the reference kernel {choice.sd_normalised:.1%}"
    )
    felt = f", {share:.0%} of its change taken out" if divides else ""
    said = f"{'normalised' if divides else 'not normalised'}: {noise}{felt}"
    kind: Literal["none", "reference"] = "reference" if divides else "none"
    return dataclasses.replace(choice, kind=kind, said=said), sides[divides]


def _with_error(estimate: Trimmed, sd: float) -> Trimmed:
    import numpy as np

    return Trimmed(estimate.mean, np.hypot(estimate.standard_error, sd), estimate.freedom)


def _both(before: NDArray[Any], after: NDArray[Any], fewest_in_order: int = 0) -> Trimmed:
    """Return after - before; autocorrelation widens the error of sides of at least ``fewest_in_order`` samples."""
    one, two = (
        robust.in_time_order(side, trim=_trim(len(side)))
        if len(side) >= fewest_in_order
        else robust.trimmed(side, trim=_trim(len(side)))
        for side in (before, after)
    )
    if min(len(before), len(after)) < 2:
        return robust.trimmed_difference(before, after)
    return robust.combined(one, two)


def _trim(count: int) -> float:
    """Return the share to trim: none of a few rounds, whose extremes are most of what is known of the noise."""
    return robust.TRIM if count >= robust.FEWEST_FOR_AUTOCORRELATION else 0.0


def _relative(logs: NDArray[Any]) -> list[float]:
    """Return values around 1: each side's noise about its own level, so that a real change is no noise."""
    import numpy as np

    return [float(value) for value in np.exp(logs - robust.trimmed(logs).mean)]


def _pitman_morgan(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Return the one-sided p-value of var(after) < var(before)."""
    import numpy as np

    total, difference = before + after, before - after
    scale = float(total.std() * difference.std())
    if scale == 0.0:
        return 1.0
    centred = (total - total.mean()) * (difference - difference.mean())
    correlation = min(1.0 - 1e-15, max(-1.0 + 1e-15, float(np.mean(centred)) / scale))
    freedom = len(before) - 2
    score = correlation * math.sqrt(freedom / (1.0 - correlation**2))
    return float(robust.tail_probability(score, freedom))


def _winsorised(values: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    ordered, cut = np.sort(values), int(0.1 * len(values))
    clipped: NDArray[Any] = np.clip(values, ordered[cut], ordered[len(values) - 1 - cut])
    return clipped


def _sds(before: NDArray[Any], after: NDArray[Any]) -> tuple[float, float]:
    if len(before) < 2:
        return 0.0, 0.0
    return float(before.std(ddof=1)), float(after.std(ddof=1))


def _logs_array(values: Sequence[float]) -> NDArray[Any]:
    import numpy as np

    return np.array(_logs(values))


def _pair_logs(wall: Sequence[float], reference: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(wall) != len(reference):
        counts = f"{len(wall)} and {len(reference)}"
        raise ConfigurationError("Each round needs its reference time", expected="equal counts", actual=counts)
    return _logs_array(wall), _logs_array(reference)

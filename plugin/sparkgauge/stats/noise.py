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
) -> StoredComparison:
    """Return the comparison of samples, each side in time order, that were not interleaved.

    Below 8 rounds a side this is Welch's t on logarithms; from 8 on the tails are trimmed and autocorrelation widens
    each side's standard error. With reference times, and where dividing by them measurably lowers the noise, the
    divided times are compared. Either way the interval is widened where the machine was in another state: raw and
    divided times then disagree, and how much of that the right answer is cannot be known; less where the reference ran
    ``between_steps`` of the samples, and felt what they felt, than where it ran before them.

    ``between_sd`` is the standard deviation of the log level between sessions with nothing changed, where a history or
    a self-check knows it; without it and without reference times the false-positive rate is far above ``alpha`` on a
    busy machine (docs/gate.md).
    """
    before, after = _logs_array(baseline), _logs_array(candidate)
    raw = _both(before, after)
    centres, count, limits = _centres(before, after), min(len(before), len(after)), _margin(margin)
    if baseline_reference is None or candidate_reference is None:
        said = "not normalised: no reference kernel was timed on both sides"
        raw = _with_error(raw, between_sd)
        return StoredComparison(compared(raw, centres, count, limits, alpha, better, beyond), None, None, said)
    _, ref_before = _pair_logs(baseline, baseline_reference)
    _, ref_after = _pair_logs(candidate, candidate_reference)
    divided = _both(before - ref_before, after - ref_after)
    choice = choose_normalisation(
        [*_relative(before), *_relative(after)], [*_relative(ref_before), *_relative(ref_after)]
    )
    shift = float(robust.trimmed_difference(ref_before, ref_after).mean)
    if between_steps:
        choice, widened = _least_error(choice, raw, divided, shift)
    else:
        chosen, other = (divided, raw) if choice.kind == "reference" else (raw, divided)
        widened = _spanning(chosen, shift, other)
    result = compared(_with_error(widened, between_sd), centres, count, limits, alpha, better, beyond)
    said = f"{choice.said}; the reference kernel took {math.exp(shift):.2f} times as long as at the baseline"
    return StoredComparison(result, choice, math.exp(shift), said)


UNCERTAIN_SHARE = 0.5
"""Standard deviation of the share of the machine's shift that a correction by the reference kernel leaves or overdoes.
A kernel feels a busy neighbour more or less than training does. Chosen on one trace, scored on others: docs/gate.md."""


UNCERTAIN_SHARE_WITHIN = 0.25
"""The same for a kernel that ran between the steps of the samples: training felt 0.8 to 1.1 times what it felt."""


def _spanning(chosen: Trimmed, shift: float, other: Trimmed) -> Trimmed:
    """Return ``chosen`` with the machine's shift, as far as its correction is uncertain, as a further error."""
    disagreement = max(abs(shift), abs(float(chosen.mean) - float(other.mean)))
    return _with_error(chosen, UNCERTAIN_SHARE * disagreement)


def _least_error(choice: Normalisation, raw: Trimmed, divided: Trimmed, shift: float) -> tuple[Normalisation, Trimmed]:
    """Return the estimate with the smaller error, its noise and what it leaves of the machine's shift: all of it where
    nothing is divided, the uncertain share where it is."""
    sides = _with_error(raw, shift), _with_error(divided, UNCERTAIN_SHARE_WITHIN * shift)
    errors = [float(side.standard_error) for side in sides]
    divides = errors[1] < errors[0]
    noise = (
        f"the noise of wall time is {choice.sd_wall:.1%}, divided by the reference kernel {choice.sd_normalised:.1%}"
    )
    said = f"{'normalised' if divides else 'not normalised'}: {noise}"
    kind: Literal["none", "reference"] = "reference" if divides else "none"
    return dataclasses.replace(choice, kind=kind, said=said), sides[divides]


def _with_error(estimate: Trimmed, sd: float) -> Trimmed:
    import numpy as np

    return Trimmed(estimate.mean, np.hypot(estimate.standard_error, sd), estimate.freedom)


def _both(before: NDArray[Any], after: NDArray[Any]) -> Trimmed:
    one, two = (robust.in_time_order(side, trim=_trim(len(side))) for side in (before, after))
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

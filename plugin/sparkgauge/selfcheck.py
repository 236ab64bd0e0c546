"""How often the gate errs on this machine: a recorded A/A trace, resampled in blocks through the gate's own rules.

Pure but for the one small file that keeps the result; :mod:`sparkgauge.selfcheck_rounds` takes the rounds on Spark.
Nothing changed within a trace, so every ``regressed`` is a false alarm; with the candidate's times multiplied by 1.1 a
missing one is a miss. Blocks are runs of neighbouring rounds: a disturbance that spans several keeps its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge import stats
from sparkgauge.errors import BaselineError, NotMeasuredError
from sparkgauge.gate import BaselineQuantity, Measurement, Policy, Samples, against_baseline, look_until_decided
from sparkgauge.records import from_json, to_json
from sparkgauge.store import SAFE_NAME, parse_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION = 1
"""Version of the stored file; a reader refuses another one."""

LARGEST_BYTES = 1_000_000
"""A result holds some hundred rounds, 20 kB."""

RESAMPLINGS = 2000
"""At a rate of 1 %, a Wilson interval from 0.65 to 1.5 %."""

EFFECTS = (0.05, 0.10, 0.20)
"""Slowdowns whose detection is reported."""

FEWEST_ROUNDS = 16
"""One more than a stored comparison's two sides have, 5 and up to 10: they must have no round in common."""

BLOCK_PAIRS = 5
"""Pairs that stay together, 10 rounds: half a minute of short ones, longer than what disturbs them mostly lasts."""

FEWEST_PAIRS, MOST_PAIRS = 6, 40
"""When a paired comparison looks first and ends."""

DETECTION_POWER = 0.8
"""Probability with which the minimum detectable change is found."""

LARGEST_CHANGE = 2.0
"""Up to which a detectable change is looked for: three times as slow."""

_Z95 = 1.959963984540054
_HINT = "Remove the file or run: sparkgauge selfcheck"


@dataclass(frozen=True)
class Rate:
    """A share of resamplings."""

    count: int
    of: int

    @property
    def fraction(self) -> float:
        """Return the share."""
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval (E. B. Wilson, JASA 22, 1927): the resampling's own error.

        What a longer trace would show beyond this one is not in it.
        """
        share, extra = self.fraction, _Z95**2 / self.of
        centre = (share + extra / 2.0) / (1.0 + extra)
        half = _Z95 / (1.0 + extra) * math.sqrt(share * (1.0 - share) / self.of + extra / (4.0 * self.of))
        return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.fraction * 100:.1f} % [{low * 100:.1f}, {high * 100:.1f}]"


@dataclass(frozen=True)
class Rates:
    """How one way of comparing behaves on the trace."""

    false_positives: Rate
    """Nothing changed, and ``regressed``."""
    undecided: Rate
    """Nothing changed, and ``inconclusive`` at the end."""
    found: dict[str, Rate]
    """Slowdown as a share (``0.1``) -> ``regressed``."""
    rounds_unchanged: float
    """Mean rounds a side until the verdict with nothing changed; pairs where paired."""
    rounds_slower: dict[str, float]
    """The same by slowdown."""
    most_rounds: int
    """Rounds a side at most."""
    min_detectable_fraction: float | None
    """The least slowdown found with a probability of 80 %; None above 200 %."""


@dataclass(frozen=True)
class Injection:
    """Real rounds, slowed down on purpose, next to real rounds that were not."""

    phase: str
    phase_fraction: float
    """By how much of its own time the phase was slowed down."""
    intended_fraction: float
    """What that was meant to add to the whole round."""
    plain_seconds: tuple[float, ...]
    slowed_seconds: tuple[float, ...]
    """Runtimes; item i of both is one pair."""
    paired: str
    """The verdict on the pairs."""
    stored: str
    """The verdict on the slowed rounds against the first A/A rounds as a baseline."""
    named_phase: str | None
    """The phase that the comparison of phases blames; None for none."""
    ratio: float
    ratio_low: float | None
    ratio_high: float | None
    """slowed / plain with its 95 % interval; None where the pairs give no bounds."""


@dataclass(frozen=True)
class SelfCheck:
    """One self-check: what was run, and how often the gate erred."""

    when: str
    """ISO 8601, UTC."""
    hardware_class: str
    workload: dict[str, Any]
    data: str
    """Kind of the data: real, synthetic, user."""
    software: dict[str, str]
    margin_fraction: float
    confidence: float
    resamplings: int
    runtime_seconds: tuple[float, ...]
    """The A/A trace, in time order."""
    cpu_seconds: tuple[float, ...]
    """Of the training processes together, round by round."""
    load_average: tuple[float, ...]
    stored: Rates
    paired: Rates
    injection: Injection | None = None
    """None where no time was left for it."""
    schema: int = field(default=SCHEMA_VERSION)

    @property
    def is_trustworthy(self) -> bool:
        """Return whether nothing found speaks against the gate's verdicts on this machine."""
        return not self.concerns()

    def concerns(self) -> list[str]:
        """Return what speaks against trusting the gate here, a sentence each."""
        nominal, found = (1.0 - self.confidence) / 2.0, []
        for name, rates in (("stored", self.stored), ("paired", self.paired)):
            if rates.false_positives.interval[0] > nominal:
                found.append(
                    f"{name} comparisons raise more false alarms ({rates.false_positives}) than the {nominal:.1%} "
                    "they should: use a quieter machine, a higher --gauge-confidence, or --gauge-against"
                )
        injected = self.injection
        if injected is not None and "match" in (injected.paired, injected.stored):
            found.append(f"a real slowdown meant to be {injected.intended_fraction:.0%} passed as a match")
        return found


# -------------------------------------------------------------------------------------------------- calibration


def calibrate_stored(
    trace: Sequence[float],
    policy: Policy,
    *,
    rounds: int,
    most_rounds: int,
    resamplings: int = RESAMPLINGS,
    references: Sequence[float] = (),
) -> Rates:
    """Return how the gate decides between two runs of neighbouring rounds of ``trace``.

    ``rounds`` are planned on either side; the candidate may take up to ``most_rounds``. ``references`` are the
    reference kernel's times between each round's steps, which a session's comparisons use; empty for none.
    NotMeasuredError for a trace shorter than two sides.
    """
    import numpy as np

    values, generator = _usable(trace, rounds + most_rounds), np.random.default_rng(0)
    beside = tuple(float(one) for one in references)
    starts = [_two_starts(len(values), rounds, most_rounds, generator) for _ in range(resamplings)]

    def outcomes(effect: float, count: int) -> list[tuple[str, int]]:
        slower = values * (1.0 + effect)
        found = []
        for one, two in starts[:count]:
            first, second = slice(one, one + rounds), slice(two, two + most_rounds)
            before = _runtimes(values[first].tolist(), beside[first])
            found.append(_judged(before, _runtimes(slower[second].tolist(), beside[second]), rounds, policy))
        return found

    return _rates(outcomes, resamplings, most_rounds, few=resamplings // 5)


def calibrate_paired(
    trace: Sequence[float], policy: Policy, *, most_pairs: int = MOST_PAIRS, resamplings: int = RESAMPLINGS
) -> Rates:
    """Return how the sequential comparison decides between neighbouring rounds of ``trace``, in random order.

    NotMeasuredError for a trace of fewer than ``FEWEST_ROUNDS``.
    """
    import numpy as np

    values, generator = _usable(trace, FEWEST_ROUNDS), np.random.default_rng(1)
    differences = paired_differences(np.log(values), most_pairs, resamplings, generator)
    margin = stats.Margin(policy.runtime_margin_fraction)
    plan = stats.Plan(margin, 1.0 - policy.confidence, min(FEWEST_PAIRS, most_pairs), most_pairs)

    def outcomes(effect: float, count: int) -> list[tuple[str, int]]:
        settled = stats.settle_many(differences[:count] + math.log1p(effect), plan)
        return list(zip(map(str, settled.status), map(int, settled.pairs), strict=True))

    return _rates(outcomes, resamplings, most_pairs, few=resamplings)


def paired_differences(
    logs: NDArray[Any], pairs: int, rows: int, generator: np.random.Generator, *, block_pairs: int = BLOCK_PAIRS
) -> NDArray[Any]:
    """Return log ratios (rows, pairs) of neighbours in ``logs``, whole blocks of neighbours at a time, either first."""
    import numpy as np

    length = min(2 * min(block_pairs, pairs), len(logs) // 2 * 2)
    starts = generator.integers(0, len(logs) - length + 1, size=(rows, -(-2 * pairs // length)))
    steps = logs[(starts[..., None] + np.arange(length)).reshape(rows, -1)[:, : 2 * pairs]]
    neighbours = steps.reshape(rows, pairs, 2)
    signs = np.where(generator.random((rows, pairs)) < 0.5, 1.0, -1.0)
    differences: NDArray[Any] = signs * (neighbours[..., 1] - neighbours[..., 0])
    return differences


def judged_stored(
    baseline: Sequence[float],
    candidate: Sequence[float],
    policy: Policy,
    *,
    references: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> str:
    """Return the gate's status on all of ``candidate`` (seconds) against a stored ``baseline``, in one look.

    ``references`` are the reference kernel's times between the steps of either; empty for none.
    """
    before, after = (_runtimes(*side) for side in zip((baseline, candidate), references, strict=True))
    return _judged(before, after, len(candidate), policy)[0]


Outcomes = Callable[[float, int], "list[tuple[str, int]]"]
"""``(slowdown as a share, resamplings) -> (status, rounds a side)`` of each, the same resamplings each time."""


def _rates(outcomes: Outcomes, resamplings: int, most_rounds: int, few: int) -> Rates:
    same = outcomes(0.0, resamplings)
    slower = {effect: outcomes(effect, resamplings) for effect in EFFECTS}
    return Rates(
        false_positives=_rate(same, "regressed"),
        undecided=_rate(same, "inconclusive"),
        found={f"{effect:g}": _rate(each, "regressed") for effect, each in slower.items()},
        rounds_unchanged=_mean_rounds(same),
        rounds_slower={f"{effect:g}": _mean_rounds(each) for effect, each in slower.items()},
        most_rounds=most_rounds,
        min_detectable_fraction=_min_detectable(outcomes, max(1, few)),
    )


def _rate(outcomes: list[tuple[str, int]], status: str) -> Rate:
    return Rate(sum(one == status for one, _ in outcomes), len(outcomes))


def _mean_rounds(outcomes: list[tuple[str, int]]) -> float:
    return math.fsum(count for _, count in outcomes) / len(outcomes)


def _min_detectable(outcomes: Outcomes, count: int, steps: int = 8) -> float | None:
    """Return the least slowdown found with a probability of 80 %, by bisection of its logarithm."""

    def finds(change: float) -> bool:
        return _rate(outcomes(math.expm1(change), count), "regressed").fraction >= DETECTION_POWER

    low, high = 0.0, math.log1p(LARGEST_CHANGE)
    if not finds(high):
        return None
    for _ in range(steps):
        middle = (low + high) / 2.0
        low, high = (low, middle) if finds(middle) else (middle, high)
    return math.expm1(high)


def _usable(trace: Sequence[float], fewest: int) -> NDArray[Any]:
    import numpy as np

    values = np.array([float(value) for value in trace])
    if len(values) < fewest or not (np.isfinite(values).all() and (values > 0.0).all()):
        actual = f"{len(values)} rounds" if len(values) < fewest else "some that are not"
        raise NotMeasuredError(
            "No self-check from these rounds", expected=f"{fewest} rounds or more, all above 0 s", actual=actual
        )
    return values


def _two_starts(count: int, first: int, second: int, generator: np.random.Generator) -> tuple[int, int]:
    """Return where two runs of ``first`` and ``second`` rounds without a common round begin, either one earlier."""
    gap = count - first - second
    before = int(generator.integers(0, gap + 1))
    between = int(generator.integers(0, gap - before + 1))
    if generator.random() < 0.5:
        return before, before + first + between
    return before + second + between, before


def _judged(before: Samples, after: Samples, rounds: int, policy: Policy) -> tuple[str, int]:
    """Return the gate's status and the candidate's rounds at it; further rounds are taken while it is open.

    The looks are those of the gate while it is undecided; what it adds to a verdict for people is left out.
    """
    quantity = BaselineQuantity("runtime_seconds", before, policy=policy)

    def more() -> Samples | None:
        count = len(measurement.samples.values) + 1
        return _first(after, count) if count <= len(after.values) else None

    measurement = Measurement(_first(after, rounds), more=more, policy=policy)
    verdict, _ = look_until_decided(measurement, policy, partial(against_baseline, measurement, quantity))
    return verdict.status, len(measurement.samples.values)


def _first(samples: Samples, count: int) -> Samples:
    return _runtimes(samples.values[:count], samples.step_reference_seconds[:count])


def _runtimes(values: Sequence[float], references: Sequence[float] = ()) -> Samples:
    times = tuple(float(value) for value in values)
    return Samples(times, "runtime_seconds", "s", "lower", step_reference_seconds=tuple(references))


# ------------------------------------------------------------------------------------------------------ storage


def path_for(hardware_class: str, cache_folder: Path | None = None) -> Path:
    """Return where the self-check of a hardware class is kept: beside the prepared data, in the user's cache."""
    if cache_folder is None:
        import pooch

        cache_folder = Path(pooch.os_cache("sparkgauge"))
    name = hardware_class if SAFE_NAME.fullmatch(hardware_class) else "unknown"
    return cache_folder / "selfcheck" / f"{name}.json"


def write(path: Path, check: SelfCheck) -> None:
    """Write ``check`` whole or not at all; BaselineError says why not."""
    write_json(path, to_json(check), what="self-check")


def read(path: Path) -> SelfCheck | None:
    """Return the stored self-check, None where there is none; BaselineError for any file that is no such thing."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BaselineError("Unreadable self-check", actual=reason, where=str(path), hint=_HINT) from error
    return parse(content, where=str(path))


def parse(content: bytes, *, where: str) -> SelfCheck:
    """Return the self-check in ``content``; BaselineError names ``where`` and the field for bytes that are none."""
    value = parse_json(content, where=where, what="self-check", most_bytes=LARGEST_BYTES, hint=_HINT)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA_VERSION:
        raise _refused(where, f"schema {SCHEMA_VERSION}", repr(schema)[:40])
    try:
        check = from_json(SelfCheck, value, "self-check")
    except BaselineError as error:
        raise _refused(f"{where}, field {error.where}", error.expected or "", error.actual or "") from error
    except OverflowError as error:
        raise _refused(where, "finite numbers", str(error)) from error
    for rates in (check.stored, check.paired):
        _check_rates(rates, where)
    return check


def _check_rates(rates: Rates, where: str) -> None:
    every = [rates.false_positives, rates.undecided, *rates.found.values()]
    if any(not 0 <= one.count <= one.of or one.of < 1 for one in every):
        raise _refused(where, "rates from 0 to 1", "another one")
    if not {f"{effect:g}" for effect in EFFECTS} <= rates.found.keys() & rates.rounds_slower.keys():
        raise _refused(where, f"rates for {EFFECTS}", ", ".join(rates.found))


def _refused(where: str, expected: str, actual: str) -> BaselineError:
    return BaselineError("Unreadable self-check", expected=expected, actual=actual, where=where, hint=_HINT)


# ------------------------------------------------------------------------------------------------------- report

NO_CHECK = "no self-check on this machine yet: sparkgauge selfcheck"

Way = Literal["stored", "paired"]


def quote(check: SelfCheck | None, way: Way = "stored") -> str:
    """Return the one line that a report says of the machine's self-check."""
    if check is None:
        return NO_CHECK
    rates = check.stored if way == "stored" else check.paired
    return (
        f"self-check of {check.when[:10]} on this machine ({way}, margin {check.margin_fraction:.0%}): "
        f"false positives {rates.false_positives}, finds +10 % in {rates.found['0.1']}; "
        f"minimum detectable change {shown_change(rates.min_detectable_fraction)}"
    )


def quote_stored(hardware_class: str, way: Way = "stored", cache_folder: Path | None = None) -> str:
    """Return :func:`quote` of what is stored for a hardware class; an unreadable file is said, never raised."""
    try:
        return quote(read(path_for(hardware_class, cache_folder)), way)
    except BaselineError as error:
        return str(error)


def report_field(hardware_class: str, cache_folder: Path | None = None) -> dict[str, Any]:
    """Return what a run report keeps of the machine's self-check: both ways' rates, or why there are none."""
    try:
        check = read(path_for(hardware_class, cache_folder))
    except BaselineError as error:
        return {"error": str(error)}
    if check is None:
        return {"error": NO_CHECK}
    ways = {"stored": to_json(check.stored), "paired": to_json(check.paired)}
    return {"when": check.when, "margin_fraction": check.margin_fraction, "confidence": check.confidence, **ways}


def shown_change(fraction: float | None) -> str:
    """Return a minimum detectable change as printed."""
    return f"above {LARGEST_CHANGE:.0%}" if fraction is None else f"{fraction * 100:.1f} %"


def to_text(check: SelfCheck) -> list[str]:
    """Return the result as lines."""
    values, count = check.runtime_seconds, len(check.runtime_seconds)
    lines = [
        f"A/A: {count} rounds of {sum(values) / count:.2f} s (CV {_variation(values):.1%} wall, "
        f"{_variation(check.cpu_seconds):.1%} CPU) at a load of {sum(check.load_average) / count:.1f}, "
        f"{check.data} data, {check.hardware_class}",
        f"margin {check.margin_fraction:.0%}, confidence {check.confidence:g}, {check.resamplings} resamplings in "
        "blocks; [Wilson's 95 % interval of the resampling]",
        "",
    ]
    header = ("", "stored", "paired (--gauge-against)")
    lines += [f"{a:32} {b:24} {c}".rstrip() for a, b, c in [header, *_text_rows(check.stored, check.paired)]]
    if check.injection is not None:
        lines += ["", *_injection_lines(check.injection)]
    concerns = check.concerns()
    return [*lines, "", *([f"attention: {one}" for one in concerns] or ["nothing found against the gate here"])]


def _text_rows(stored: Rates, paired: Rates) -> list[tuple[str, str, str]]:
    both = (stored, paired)

    def row(name: str, cell: Callable[[Rates], str]) -> tuple[str, str, str]:
        return name, *(cell(one) for one in both)  # type: ignore[return-value]

    rows = [row("false positives", lambda one: str(one.false_positives))]
    for effect in EFFECTS:
        rows.append(row(f"finds +{effect:.0%}", lambda one, key=f"{effect:g}": str(one.found[key])))  # type: ignore[misc]
    rows.append(row("undecided, nothing changed", lambda one: str(one.undecided)))
    rows.append(row("rounds a side, nothing changed", lambda one: f"{one.rounds_unchanged:.1f} of {one.most_rounds}"))
    rows.append(row("rounds a side at +10%", lambda one: f"{one.rounds_slower['0.1']:.1f} of {one.most_rounds}"))
    rows.append(row("minimum detectable change", lambda one: shown_change(one.min_detectable_fraction)))
    return rows


def _injection_lines(one: Injection) -> list[str]:
    bounds = "" if one.ratio_low is None or one.ratio_high is None else f" [{one.ratio_low:.3f}, {one.ratio_high:.3f}]"
    return [
        f"injected: {one.phase} slowed down by {one.phase_fraction:.0%}, meant to add {one.intended_fraction:.0%}",
        f"  measured: {one.ratio:.3f} times as long{bounds}, {len(one.plain_seconds)} pairs",
        f"  verdicts: {one.paired} in pairs, {one.stored} against the first rounds; "
        f"phase named: {one.named_phase or 'none'}",
    ]


def _variation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or mean <= 0.0:
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) / mean

"""The gate: measurements that compare themselves with baselines, and the verdicts that come of it.

``trained.runtime <= baseline.runtime`` compares samples, not two numbers. It returns a
:class:`~sparkgauge.records.Verdict`, which is true only where the session's policy lets the test pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

from sparkgauge import stats
from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.records import Baseline, RunRecord, Status, Verdict
from sparkgauge.stats import Better, Interval, Scale
from sparkgauge.store import (
    DEFAULT_LABEL,
    QUOTIENT_COMPANIONS,
    REFERENCES,
    WAITING,
    run_samples,
    sample_key,
)

METRICS: dict[str, tuple[str, Better]] = {
    "runtime_seconds": ("s", "lower"),
    "accuracy_fraction": ("fraction", "higher"),
    "speedup_ratio": ("x", "higher"),
    "efficiency_ratio": ("x", "higher"),
    "images_per_second": ("images/s", "higher"),
}
"""Unit and good direction of the metrics the suite gates; a user's metric brings its own."""

UNIT_SUFFIXES = {"_seconds": "s", "_fraction": "fraction", "_ratio": "x", "_bytes": "bytes"}
"""Unit as printed by the end of a metric's name."""

SHORT_NAMES = {
    "runtime_seconds": "runtime",
    "accuracy_fraction": "accuracy",
    "speedup_ratio": "speedup",
    "efficiency_ratio": "efficiency",
}
"""The attribute under which a run and a baseline offer a metric, where it is not the metric's name."""

QUOTIENTS = tuple(QUOTIENT_COMPANIONS)
"""Metrics of two runs, which belong to their test and not to one of its trainings."""


@dataclass(frozen=True)
class Policy:
    """How strictly a session gates; ConfigurationError for values that make no sense."""

    runtime_margin_fraction: float = 0.10
    """How much slower still passes. Also the margin of images/s and of metrics that have none of their own."""
    accuracy_margin_fraction: float = 0.01
    """How much accuracy may be lost: 0.01 is one percentage point."""
    speedup_margin_fraction: float = 0.10
    confidence: float = 0.95
    """Nominal coverage of the two-sided interval of the change."""
    require_baseline: bool = True
    """Whether a test without a stored baseline fails."""
    update: Literal["new", "all"] | None = None
    """Which baselines this session writes: missing ones, all, or none."""
    inconclusive: Literal["fail", "skip"] = "fail"
    """What becomes of a test that more rounds would be needed for. It never passes."""
    serving: bool = False
    """Whether this session only takes rounds for another one, which judges them: comparisons hold, as ``generated``."""

    def __post_init__(self) -> None:
        for name in ("runtime_margin_fraction", "accuracy_margin_fraction", "speedup_margin_fraction"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigurationError(f"Bad {name}", expected="a finite number of at least 0", actual=str(value))
        if not 0.0 < self.confidence < 1.0:
            raise ConfigurationError("Bad confidence", expected="between 0 and 1", actual=str(self.confidence))
        if self.update not in (None, "new", "all"):
            raise ConfigurationError("Bad update", expected="new, all or None", actual=repr(self.update))
        if self.inconclusive not in ("fail", "skip"):
            raise ConfigurationError("Bad inconclusive", expected="fail or skip", actual=repr(self.inconclusive))

    def margin_for(self, metric: str) -> float:
        """Return a metric's margin: a share of the ratio, or for fractions the difference itself."""
        if unit_of(metric) == "fraction":
            return self.accuracy_margin_fraction
        return self.speedup_margin_fraction if metric in QUOTIENTS else self.runtime_margin_fraction


@dataclass(frozen=True)
class Samples:
    """The raw samples of one metric, one per round."""

    values: tuple[float, ...]
    metric: str
    """Name with its unit, e.g. ``runtime_seconds``."""
    unit: str
    """As printed: ``s``, ``images/s``, ``x``; ``fraction`` is compared as a difference, others as a ratio. The name
    says so too: metrics end in ``_fraction`` exactly when they are one."""
    better: Better
    seeds: tuple[int, ...] = ()
    """Seed of each round, in the order of the values; empty when unknown."""
    test_count: int | None = None
    """Images behind each accuracy, whose binomial noise is the least noise assumed."""
    reference_seconds: tuple[float, ...] = ()
    """The reference kernel's time before each value's round, where it was timed for all of them; empty otherwise."""
    step_reference_seconds: tuple[float, ...] = ()
    """The usual time of its pieces between the steps of each round; empty likewise. Of a quotient the quotient, which
    is no time."""
    waiting_ratios: tuple[float, ...] = ()
    """How many times longer each round took for want of free cores; empty likewise, a quotient likewise."""

    def __post_init__(self) -> None:
        if (self.unit == "fraction") != (unit_of(self.metric) == "fraction"):
            raise ConfigurationError(
                f"The metric {self.metric} has the unit {self.unit!r}",
                expected="names that end in _fraction for fractions, and only for them",
            )

    @property
    def scale(self) -> Scale:
        """Return how changes of this metric are measured."""
        return "difference" if self.unit == "fraction" else "ratio"


Observer = Callable[[Verdict, Samples], None]
"""What is told of a verdict, and of the run's samples that it rests on."""


class Measurement:
    """One measured quantity of the run under test, which compares itself with a baseline or with a plain number.

    ``<=`` and ``<`` mean "not worse than" for metrics of which less is better, ``>=`` and ``>`` for the others; the
    wrong direction raises ConfigurationError. A comparison returns a Verdict and keeps it in :attr:`verdict`.

    Against a plain number the limit is that number and the whole one-sample interval must be on its good side;
    ``float(measurement)`` is the mean, for a comparison without statistics.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        more: Callable[[], Samples | None] | None = None,
        policy: Policy | None = None,
        observer: Observer | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        self.samples = samples
        """Grows when ``more`` is asked for rounds."""
        self.more = more
        """Takes one more round and returns *all* samples so far; None once no more can be taken."""
        self.policy = policy or Policy()
        """Used against plain numbers; a baseline brings its own."""
        self.observer = observer
        """Told of verdicts against plain numbers, with the samples behind them; a baseline brings its own."""
        self.labels = labels
        """The trainings behind a speed-up, the fast one first; empty for a quantity of one training."""
        self.verdict: Verdict | None = None
        """The last comparison's verdict."""

    @property
    def metric(self) -> str:
        """Return the metric's name with its unit."""
        return self.samples.metric

    @property
    def unit(self) -> str:
        """Return the unit as printed."""
        return self.samples.unit

    @property
    def better(self) -> Better:
        """Return which direction is good."""
        return self.samples.better

    @property
    def interval(self) -> Interval:
        """Return the mean and its interval at the policy's confidence; NotMeasuredError without usable samples."""
        return _own_interval(_measured(self.samples), self.policy.confidence)

    @property
    def mean(self) -> float:
        """Return the mean of the samples: arithmetic for fractions, geometric for the rest."""
        return stats.mean(_measured(self.samples).values, scale=self.samples.scale)

    def __float__(self) -> float:
        return self.mean

    def __repr__(self) -> str:
        name, count = SHORT_NAMES.get(self.metric, self.metric), len(self.samples.values)
        try:
            interval = self.interval
        except NotMeasuredError:
            return f"<{name} not measured>"
        return f"<{name} {format_interval(interval, self.unit)} at {interval.confidence:g}, n = {count}>"

    def __le__(self, other: BaselineQuantity | float) -> Verdict:
        return self._compare(other, "lower", "<=")

    def __lt__(self, other: BaselineQuantity | float) -> Verdict:
        return self._compare(other, "lower", "<")

    def __ge__(self, other: BaselineQuantity | float) -> Verdict:
        return self._compare(other, "higher", ">=")

    def __gt__(self, other: BaselineQuantity | float) -> Verdict:
        return self._compare(other, "higher", ">")

    def _compare(self, other: object, better: Better, sign: str) -> Verdict:
        if isinstance(other, bool) or not isinstance(other, (BaselineQuantity, int, float)):
            return cast(Verdict, NotImplemented)
        if better != self.better:
            raise ConfigurationError(
                f"`{self.metric} {sign} ...` asks for the worse side to pass: {self.better} is better here",
                expected=f"`measured {'<=' if self.better == 'lower' else '>='} limit`",
                actual=f"`measured {sign} limit`",
            )
        if self.policy.serving:
            return _announce(self, _unjudged(self.samples), self.observer)
        if isinstance(other, BaselineQuantity):
            return judge(self, other)
        return judge_number(self, float(other))


Judge = Callable[[Measurement], Verdict]
Where = Callable[[], str]
"""Says where a regression went: see :func:`sparkgauge.attribution.attribute`."""


@dataclass(frozen=True)
class BaselineQuantity:
    """One quantity's stored side: the samples, or the reason why there are none."""

    metric: str
    samples: Samples | None
    status: Literal["missing", "not_comparable"] | None = None
    """Why there are no samples; None with samples."""
    reason: str = ""
    """One sentence on the status."""
    hint: str = ""
    """The next command; a default one when empty."""
    margin: float | None = None
    """In the unit of :meth:`Policy.margin_for`, which holds when None."""
    policy: Policy = Policy()
    file: str = ""
    """The baseline's path, as shown."""
    observer: Observer | None = None
    """Told of every verdict, with the run's samples behind it."""
    where: Where | None = None
    """Asked after a regression, for the verdict's text."""
    judge: Judge | None = None
    """Judges in place of this module where the other side is measured in turn with this one (``--gauge-against``)."""

    def __post_init__(self) -> None:
        if self.judge is None and (self.samples is None) == (self.status is None):
            raise ConfigurationError("A baseline has either samples or a status", where=self.file or self.metric)

    def __repr__(self) -> str:
        name = SHORT_NAMES.get(self.metric, self.metric)
        if self.samples is None:
            return f"<baseline {name} {self.status or 'measured in turn'}>"
        interval = _own_interval(self.samples, self.policy.confidence)
        return f"<baseline {name} {format_interval(interval, self.samples.unit)}, n = {len(self.samples.values)}>"


class HasRuntime(Protocol):
    """What :func:`speedup` asks of a run."""

    @property
    def runtime(self) -> Measurement:
        """Return the run's training + test time."""


class HasThroughput(Protocol):
    """What :func:`efficiency` asks of a training."""

    @property
    def images_per_second(self) -> Measurement:
        """Return the training throughput over all executors."""

    @property
    def workload(self) -> Any:
        """Return the workload, of which only ``executors`` counts."""


def samples_of(run: RunRecord, metric: str, *, unit: str | None = None, better: Better | None = None) -> Samples:
    """Return a run's samples of ``metric``; ``better`` is needed for metrics of a user's own that are no seconds.

    NotMeasuredError where the run has no such metric.
    """
    available = run_samples(run)
    if metric not in available:
        raise NotMeasuredError(f"The run measured no {metric}", expected=f"one of {', '.join(sorted(available))}")
    check_valid(run)
    seeds = tuple(one.seed for one in run.valid_rounds)
    samples = _samples(metric, available[metric], seeds, run.data.test_count, unit=unit, better=better)
    return _with_references(samples, available)


def check_valid(run: RunRecord) -> None:
    """Raise NotMeasuredError where Spark retried tasks in every round: none of them is a sample."""
    if run.rounds and not run.valid_rounds:
        raise NotMeasuredError(
            f"{run.label!r} was not measured",
            expected="at least one valid round",
            actual=f"none of {len(run.rounds)}: {run.rounds[-1].invalid}",
            hint="A round with a retry is no sample: run the test again.",
        )


def baseline_quantity(
    baseline: Baseline | None,
    metric: str,
    *,
    label: str = DEFAULT_LABEL,
    file: str,
    policy: Policy,
    margin: float | None = None,
    why_not: str | None = None,
    observer: Observer | None = None,
    where: Where | None = None,
    unit: str | None = None,
    better: Better | None = None,
) -> BaselineQuantity:
    """Return the stored side of ``metric``; ``why_not`` is the answer of :func:`sparkgauge.store.comparable`."""
    key = sample_key(label, metric)
    if baseline is not None and why_not is None and key in baseline.samples:
        values = baseline.samples[key]
        seeds = baseline.seeds if len(baseline.seeds) == len(values) else ()
        # The run's own direction decides; a user's metric needs some direction here only to be stored samples at all.
        side = better or (None if metric in METRICS else "lower")
        samples = _samples(metric, values, seeds, baseline.data.test_count, unit=unit, better=side)
        samples = _with_references(samples, baseline.samples, label)
        return BaselineQuantity(
            metric, samples, margin=margin, policy=policy, file=file, observer=observer, where=where
        )
    status: Literal["missing", "not_comparable"] = "missing"
    reason = "there is no baseline file" if baseline is None else f"the baseline file has no {key}"
    if baseline is not None and why_not is not None:
        status, reason = "not_comparable", why_not
    return BaselineQuantity(metric, None, status, reason, margin=margin, policy=policy, file=file, observer=observer)


def speedup(fast: HasRuntime, *, over: HasRuntime) -> Measurement:
    """Return how many times faster ``fast`` is than ``over``, as a measurement of ``speedup_ratio``.

    Round i of one is divided by round i of the other. For interleaved rounds that removes what both shared; for rounds
    taken one run after the other any pairing is as valid as another, at the price of a slightly wider interval. Rounds
    beyond the shorter run's are left out.
    """
    labels = (str(getattr(fast, "label", "")), str(getattr(over, "label", "")))
    return _quotient(fast.runtime, over.runtime, _ratios, labels)


def efficiency(many: HasThroughput, *, over: HasThroughput) -> Measurement:
    """Return what share of its executors ``many`` makes use of, as a measurement of ``efficiency_ratio``.

    That is the quotient of both runs' images per second over the quotient of their executors, round by round as in
    :func:`speedup`: 1 where twice the executors train twice as fast. It holds for equal global batches (strong
    scaling) and for batches that grow with the executors (weak scaling).
    """
    times = many.workload.executors / over.workload.executors
    labels = (str(getattr(many, "label", "")), str(getattr(over, "label", "")))
    return _quotient(many.images_per_second, over.images_per_second, partial(_efficiencies, times), labels)


def _quotient(
    one: Measurement,
    other: Measurement,
    divide: Callable[[Measurement, Measurement], Samples],
    labels: tuple[str, ...],
) -> Measurement:
    """Return the measurement of ``divide(one, other)``, which takes another round of both where it needs more."""

    def more() -> Samples | None:
        if one.more is None or other.more is None:
            return None
        grown = [_grown(side) for side in (other, one)]
        return None if any(samples is None for samples in grown) else divide(one, other)

    return Measurement(
        divide(one, other),
        more=more if one.more is not None and other.more is not None else None,
        policy=one.policy,
        observer=one.observer,
        labels=labels,
    )


def judge(measurement: Measurement, quantity: BaselineQuantity) -> Verdict:
    """Return the verdict on ``measurement`` against a baseline, and tell the baseline's observer.

    While it is inconclusive and the measurement can take more rounds, more are taken; the error probability is split
    over these looks. Raises NotMeasuredError without usable samples and ConfigurationError for different metrics.
    """
    candidate = _measured(measurement.samples)
    if candidate.metric != quantity.metric:
        expected, actual = quantity.metric, candidate.metric
        raise ConfigurationError("Different metrics cannot be compared", expected=expected, actual=actual)
    if quantity.judge is not None:
        verdict = quantity.judge(measurement)
    elif quantity.samples is None or quantity.policy.update == "all":
        verdict = _without_comparison(candidate, quantity)
    else:
        verdict = _settle(measurement, quantity.policy, partial(against_baseline, measurement, quantity))
    if verdict.status == "regressed" and quantity.where is not None and _is_of_time(verdict.metric):
        verdict = dataclasses.replace(verdict, where=quantity.where())
    return _announce(measurement, verdict, quantity.observer)


def judge_number(measurement: Measurement, number: float) -> Verdict:
    """Return the verdict on ``measurement`` against a fixed number, and tell the measurement's observer.

    There is no margin: ``match`` when the whole interval of the mean is at the number or on its good side,
    ``regressed`` when it is on the other side, otherwise ``inconclusive``.
    """
    _measured(measurement.samples)
    if not math.isfinite(number):
        raise ConfigurationError("A limit must be finite", actual=str(number), where=measurement.metric)
    verdict = _settle(measurement, measurement.policy, partial(_against_number, measurement, number))
    return _announce(measurement, verdict, measurement.observer)


def explain(verdict: Verdict) -> list[str]:
    """Return the lines shown under a failing assert; the first alone says what happened."""
    unit = unit_of(verdict.metric)
    lines = [summary(verdict)]
    if verdict.expected is not None:
        lines.append(f"expected: {format_value(verdict.expected, unit)}{_mean_of(verdict.baseline_count)}")
    lines.append(f"actual:   {format_value(verdict.actual, unit)}{_mean_of(verdict.candidate_count)}")
    if verdict.change is not None and verdict.limit is not None:
        sense = "at most" if verdict.better == "lower" else "at least"
        lines.append(f"{_change_name(verdict) + ':':9} {_change_text(verdict)} at confidence {verdict.confidence:.4g}")
        lines.append(f"limit:    {sense} {_format_change(verdict, verdict.limit)}")
    if verdict.baseline_file:
        lines.append(f"baseline: {verdict.baseline_file}")
    if verdict.note:
        lines.append(f"machine:  {verdict.note}")
    lines.append(f"reason:   {verdict.reason}")
    lines += [f"where:    {verdict.where}"] if verdict.where else []
    return [*lines, f"next:     {verdict.hint}"] if verdict.hint else lines


def explain_comparison(left: object, right: object) -> list[str] | None:
    """Return :func:`explain` for the operands of a failed assert; None when neither is a compared measurement."""
    for side in (left, right):
        if isinstance(side, Measurement) and side.verdict is not None:
            # pytest cuts an explanation at eight lines and 640 characters: the next command must not be what is cut
            return [line for line in explain(side.verdict) if not line.startswith(("machine:", "where:", "reason:"))]
    return None


def summary(verdict: Verdict) -> str:
    """Return one line with status, both sides, the change with its interval and the limit."""
    unit, name = unit_of(verdict.metric), SHORT_NAMES.get(verdict.metric, verdict.metric)
    head = f"{verdict.status}: {name} {format_value(verdict.actual, unit)}"
    if verdict.expected is None or verdict.change is None or verdict.limit is None:
        return f"{head}, {verdict.reason}"
    if not verdict.baseline_count:
        return f"{head} {_bounds_text(verdict)}, limit {format_value(verdict.limit, unit)}"
    change = f"{_change_name(verdict)} {_change_text(verdict)}, limit {_format_change(verdict, verdict.limit)}"
    counts = f"n = {verdict.candidate_count} against {verdict.baseline_count}"
    explained, _, _ = verdict.where.partition(";")
    where = f"; {explained}" if "explains it" in explained else ""
    return f"{head} against {format_value(verdict.expected, unit)}, {change} ({counts}){where}"


def unit_of(metric: str) -> str:
    """Return the unit that a metric's name ends in, as printed; empty for a name without one."""
    if metric in METRICS:
        return METRICS[metric][0]
    return next((unit for suffix, unit in UNIT_SUFFIXES.items() if metric.endswith(suffix)), "")


def format_value(value: float, unit: str) -> str:
    """Return a value as people read it: ``12.34 s``, ``75.3 %``, ``2.31x``, ``3,900 images/s``."""
    if unit == "fraction":
        return f"{value * 100:.2f} %"
    if unit == "x":
        return f"{value:.3g}x"
    number = f"{value:,.0f}" if 999.95 <= abs(value) < 1e9 else f"{value:#.4g}"
    return f"{number} {unit}".strip()


def format_interval(interval: Interval, unit: str) -> str:
    """Return ``mean [low, high]``, or the mean alone where the samples give no bounds."""
    if not interval.is_bounded or (unit != "fraction" and interval.low <= 0.0):
        return format_value(interval.estimate, unit)
    low, high = format_value(interval.low, unit), format_value(interval.high, unit)
    return f"{format_value(interval.estimate, unit)} [{low}, {high}]"


def _settle(measurement: Measurement, policy: Policy, look: Callable[[float], Verdict]) -> Verdict:
    """Return the verdict, taking more rounds while it is open."""
    verdict, confidence = look_until_decided(measurement, policy, look)
    if verdict.status == "regressed":
        share = (1.0 - confidence) / (1.0 - policy.confidence)
        return dataclasses.replace(
            verdict, p_value=min(1.0, p_by_inversion(lambda level: _excludes_no_change(look(level))) / share)
        )
    if verdict.status == "inconclusive" and policy.inconclusive == "skip":
        # the assert holds so that the test's other asserts are reached; the plugin then reports the test as skipped
        return dataclasses.replace(verdict, passed=True)
    return verdict


def look_until_decided(
    measurement: Measurement, policy: Policy, look: Callable[[float], Verdict]
) -> tuple[Verdict, float]:
    """Return the first verdict that is not open, or the last one, and the confidence of its look.

    While it is open more rounds are taken, as far as the measurement can; the error probability is spent over the
    looks. A look at rounds that turn out to be the last spends all that is left: deciding twice on the same rounds errs
    no more often than the laxer of both decisions.
    """
    left = 1.0 - policy.confidence
    spent = left * stats.LOOK_SHARE if measurement.more else left
    verdict = look(confidence := 1.0 - spent)
    while verdict.status == "inconclusive" and measurement.more:
        if _grown_to(measurement, stats.next_look(len(measurement.samples.values))):
            left -= spent
            spent = left * stats.LOOK_SHARE
            verdict = look(confidence := 1.0 - spent)
        else:
            verdict = look(confidence := 1.0 - left)
            break
    return verdict, confidence


LEAST_P = 1e-12
"""Smaller p-values are not told apart: nothing rests on them."""


def p_by_inversion(excluded: Callable[[float], bool]) -> float:
    """Return the one-sided p-value that a regression's intervals amount to.

    ``excluded`` tells whether the interval at a confidence excludes no change on the bad side; the p-value is half of
    the error probability at which it begins to.
    """
    low, high = math.log(2.0 * LEAST_P), 0.0
    for _ in range(30):
        middle = (low + high) / 2.0
        low, high = (low, middle) if excluded(1.0 - math.exp(middle)) else (middle, high)
    return math.exp(high) / 2.0


def _excludes_no_change(verdict: Verdict) -> bool:
    none = verdict.limit if not verdict.baseline_count else 0.0 if unit_of(verdict.metric) == "fraction" else 1.0
    bound = verdict.change_low if verdict.better == "lower" else verdict.change_high
    if bound is None or none is None:
        return False
    return bound > none if verdict.better == "lower" else bound < none


def _grown_to(measurement: Measurement, count: int) -> bool:
    """Return whether the measurement took any more rounds on the way to ``count``."""
    before = len(measurement.samples.values)
    while len(measurement.samples.values) < count and _grown(measurement) is not None:
        pass
    return len(measurement.samples.values) > before


def _grown(measurement: Measurement) -> Samples | None:
    """Return all samples after one more round, which the measurement keeps; None when no more can be taken."""
    samples = measurement.more() if measurement.more is not None else None
    if samples is None:
        return None
    before = len(measurement.samples.values)
    if len(samples.values) <= before:
        actual = f"{len(samples.values)} samples after {before}"
        raise ConfigurationError("One more round must return all samples", expected="a longer list", actual=actual)
    measurement.samples = _measured(samples)
    return samples


def against_baseline(measurement: Measurement, quantity: BaselineQuantity, confidence: float) -> Verdict:
    """Return the verdict of one look at ``measurement`` against a usable baseline."""
    candidate, stored, policy = measurement.samples, quantity.samples, quantity.policy
    assert stored is not None
    margin = policy.margin_for(candidate.metric) if quantity.margin is None else quantity.margin
    limit = stats.margin_limit(margin, better=candidate.better, scale=candidate.scale)
    status, change, note = _decision(stored, candidate, margin, limit, confidence)
    verdict = _verdict(candidate, status, change, limit, expected=stats.mean(stored.values, scale=stored.scale))
    reason, hint = _reason(status, len(stored.values), len(candidate.values)), _HINTS[status]
    return dataclasses.replace(
        verdict, baseline_count=len(stored.values), baseline_file=quantity.file, reason=reason, hint=hint, note=note
    )


def _against_number(measurement: Measurement, number: float, confidence: float) -> Verdict:
    samples = measurement.samples
    interval = _own_interval(samples, confidence)
    status = stats.decide(interval, limit=number, better=samples.better, no_change=number)
    verdict = _verdict(samples, "match" if status == "improved" else status, interval, number, expected=number)
    reason = {
        "regressed": "the whole interval of the mean is on the bad side of the limit",
        "inconclusive": "the interval of the mean contains the limit",
    }.get(verdict.status, "the whole interval of the mean is on the good side of the limit")
    if len(samples.values) < stats.FEWEST_SAMPLES:
        reason = "one round has no interval"
    return dataclasses.replace(verdict, reason=reason, hint=_HINTS["inconclusive"] if status == "inconclusive" else "")


def _decision(
    stored: Samples, candidate: Samples, margin: float, limit: float, confidence: float
) -> tuple[Status, Interval, str]:
    """Return status, change and what was done about the machine's state."""
    if candidate.scale == "ratio":
        *references, between_steps = _references(stored, candidate)
        found = stats.compare_stored(
            stored.values,
            candidate.values,
            *references,
            between_steps=between_steps,
            waiting=_waiting(stored, candidate),
            margin=margin,
            alpha=1.0 - confidence,
            better=candidate.better,
        )
        note = found.said if _feels_machine(candidate.metric) else ""
        return found.comparison.status, found.comparison.interval, note
    before, after, paired = _by_seed(stored, candidate)
    floor_sd = _floor_sd(stored, candidate)
    change = stats.difference_interval(before, after, confidence=confidence, floor_sd=floor_sd, paired=paired)
    return stats.decide(change, limit=limit, better=candidate.better, no_change=0.0), change, ""


def _references(stored: Samples, candidate: Samples) -> tuple[Sequence[float] | None, Sequence[float] | None, bool]:
    """Return the reference kernel's times beside both sides, those between the steps where both have them, and whether
    they are these. Rates get their reciprocals, so that dividing removes the machine's speed from them too; a quantity
    that is no time and no rate gets nothing."""
    between_steps = bool(stored.step_reference_seconds and candidate.step_reference_seconds)
    sides = (
        (stored.step_reference_seconds, candidate.step_reference_seconds)
        if between_steps
        else (stored.reference_seconds, candidate.reference_seconds)
    )
    if not all(sides) or not _feels_machine(candidate.metric):
        return None, None, False
    if candidate.better == "lower" or candidate.metric in QUOTIENTS:
        return *sides, between_steps
    return [1.0 / one for one in sides[0]], [1.0 / one for one in sides[1]], between_steps


def _waiting(stored: Samples, candidate: Samples) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return how much longer both sides took for want of free cores; None where that is not known of both."""
    sides = stored.waiting_ratios, candidate.waiting_ratios
    return sides if all(sides) and _feels_machine(candidate.metric) else None


def _is_of_time(metric: str) -> bool:
    """Return whether a slower machine alone would change the metric: a time, or a rate of images."""
    return metric.endswith("_seconds") or metric == "images_per_second"


def _feels_machine(metric: str) -> bool:
    """Return whether the reference kernel's time can take a part of the metric's noise out."""
    return _is_of_time(metric) or metric in QUOTIENTS


def _with_references(
    samples: Samples, available: Mapping[str, tuple[float, ...]], label: str = DEFAULT_LABEL
) -> Samples:
    """Return ``samples`` with the reference kernel's times of the same rounds, as far as there are any."""
    if not _feels_machine(samples.metric):
        return samples
    metric = samples.metric
    names = (*REFERENCES, WAITING)
    if metric in QUOTIENTS:
        reference, waited = QUOTIENT_COMPANIONS[metric]
        names = (reference, "", waited)
    found = (available.get(sample_key(label, name), ()) for name in names)
    between, before, waiting = (values if len(values) == len(samples.values) else () for values in found)
    return dataclasses.replace(
        samples, step_reference_seconds=between, reference_seconds=before, waiting_ratios=waiting
    )


def _by_seed(stored: Samples, candidate: Samples) -> tuple[Sequence[float], Sequence[float], bool]:
    """Return both sides' values as pairs of equal seeds; unpaired where one side's seeds are not among the other's.

    A side that took more rounds than the other is compared on the seeds that both have: a pair shares the order of
    the images and the initial weights, which is most of what makes accuracies differ.
    """
    before, after = (dict(zip(side.seeds, side.values, strict=False)) for side in (stored, candidate))
    common = sorted(before.keys() & after.keys())
    whole = len(before) == len(stored.values) and len(after) == len(candidate.values)
    if not whole or len(common) < max(stats.FEWEST_SAMPLES, min(len(before), len(after))):
        return stored.values, candidate.values, False
    return [before[seed] for seed in common], [after[seed] for seed in common], True


def _floor_sd(*sides: Samples) -> float:
    """Return the least noise of one accuracy: the binomial one of the smaller test set; 0 where it is unknown."""
    counts = [side.test_count for side in sides if side.test_count]
    values = [value for side in sides for value in side.values]
    return stats.binomial_sd(math.fsum(values) / len(values), min(counts)) if counts else 0.0


def _own_interval(samples: Samples, confidence: float) -> Interval:
    floor_sd = _floor_sd(samples) if samples.scale == "difference" else 0.0
    return stats.mean_interval(samples.values, confidence=confidence, scale=samples.scale, floor_sd=floor_sd)


def _measured(samples: Samples) -> Samples:
    """Return ``samples`` if a verdict may rest on them; NotMeasuredError otherwise: nothing measured is no pass."""
    bad = next((value for value in samples.values if not math.isfinite(value)), None)
    if not samples.values or bad is not None:
        raise NotMeasuredError(
            f"{samples.metric} was not measured",
            expected="at least one finite sample",
            actual="none" if bad is None else str(bad),
            hint="Without a measurement a gated assert cannot pass: look at the test's output for what stopped it.",
        )
    return samples


def _ratios(quick: Measurement, slow: Measurement) -> Samples:
    slow_values, quick_values = _measured(slow.samples).values, _measured(quick.samples).values
    if min(quick_values) <= 0.0 or min(slow_values) <= 0.0:
        raise NotMeasuredError("A speed-up needs run times above 0", actual=f"{min(*quick_values, *slow_values):g} s")
    ratios = tuple(a / b for a, b in zip(slow_values, quick_values, strict=False))
    return _with_quotients(_samples("speedup_ratio", ratios, quick.samples.seeds[: len(ratios)], None), quick, slow)


def _efficiencies(times: float, many: Measurement, one: Measurement) -> Samples:
    fast, slow = _measured(many.samples).values, _measured(one.samples).values
    if min(*fast, *slow) <= 0.0:
        raise NotMeasuredError("An efficiency needs throughputs above 0", actual=f"{min(*fast, *slow):g} images/s")
    ratios = tuple(a / b / times for a, b in zip(fast, slow, strict=False))
    return _with_quotients(_samples("efficiency_ratio", ratios, many.samples.seeds[: len(ratios)], None), many, one)


def _with_quotients(samples: Samples, fast: Measurement, slow: Measurement) -> Samples:
    """Return ``samples``, quotients of rounds, with those of the reference kernel's time beside the same rounds.

    Dividing by them takes out what the machine's speed did to one of a pair and not to the other. What two executors
    slow each other down by stays in the comparison: both sides of it trained as many.
    """
    count = len(samples.values)

    def quotients(of: Callable[[Samples], tuple[float, ...]]) -> tuple[float, ...]:
        found = tuple(a / b for a, b in zip(of(slow.samples), of(fast.samples), strict=False))
        return found[:count] if len(found) >= count else ()

    return dataclasses.replace(
        samples,
        step_reference_seconds=quotients(lambda one: one.step_reference_seconds),
        waiting_ratios=quotients(lambda one: one.waiting_ratios),
    )


def _samples(
    metric: str,
    values: tuple[float, ...],
    seeds: tuple[int, ...],
    test_count: int | None,
    *,
    unit: str | None = None,
    better: Better | None = None,
) -> Samples:
    known = METRICS.get(metric, ("s", "lower") if metric.endswith("_seconds") else (unit_of(metric), None))
    direction = better or known[1]
    if direction is None:
        raise ConfigurationError(f"Nobody said whether {metric} is better lower or higher", expected="better=")
    # Only the accuracy is known to be a share of the test images; another fraction has no such floor.
    return Samples(
        values, metric, unit or known[0], direction, seeds, test_count if metric == "accuracy_fraction" else None
    )


def _without_comparison(candidate: Samples, quantity: BaselineQuantity) -> Verdict:
    """Return the verdict where no baseline can be used, or where this session replaces it."""
    policy, status = quantity.policy, quantity.status
    verdict = _verdict(candidate, status or "generated", None, None, expected=None)
    if policy.update == "all" or (policy.update == "new" and status == "missing"):
        reason = "this run becomes the baseline (--gauge-update)"
        verdict = dataclasses.replace(verdict, status="generated", passed=True, reason=reason)
    else:
        # Another machine or other data is never waved through; only a baseline that is not there yet can be.
        passed = status == "missing" and not policy.require_baseline
        hint = quantity.hint or _HINTS[verdict.status]
        verdict = dataclasses.replace(verdict, passed=passed, reason=quantity.reason, hint=hint)
    return dataclasses.replace(verdict, baseline_file=quantity.file, confidence=policy.confidence)


def _unjudged(candidate: Samples) -> Verdict:
    """Return the verdict of the side that only takes rounds: the other one judges."""
    verdict = _verdict(_measured(candidate), "generated", None, None, expected=None)
    return dataclasses.replace(verdict, passed=True, reason="measured for the other side of --gauge-against")


def _verdict(
    candidate: Samples, status: Status, change: Interval | None, limit: float | None, *, expected: float | None
) -> Verdict:
    return Verdict(
        status=status,
        metric=candidate.metric,
        better=candidate.better,
        actual=stats.mean(candidate.values, scale=candidate.scale),
        expected=expected,
        change=_finite_or_none(change.estimate) if change else None,
        change_low=_finite_or_none(change.low) if change and change.is_bounded else None,
        change_high=_finite_or_none(change.high) if change and change.is_bounded else None,
        limit=limit,
        confidence=change.confidence if change else 0.95,
        candidate_count=len(candidate.values),
        baseline_count=0,
        baseline_file="",
        reason="",
        hint="",
        passed=status in ("match", "improved"),
    )


def _announce(measurement: Measurement, verdict: Verdict, observer: Observer | None) -> Verdict:
    measurement.verdict = verdict
    if observer is not None:
        observer(verdict, measurement.samples)
    return verdict


_HINTS: dict[str, str] = {
    "match": "",
    "improved": "--gauge-update all stores the improvement, so that losing it again is noticed",
    "regressed": "--gauge-update all accepts the change, if it is intended",
    "inconclusive": (
        "take more rounds (--gauge-rounds, --gauge-max-rounds), use a quieter machine, widen the margin, or compare "
        "interleaved with a commit: --gauge-against REF"
    ),
    "missing": "--gauge-update new stores this run as the baseline",
    "not_comparable": "run with the baseline's data, profile and machine, or --gauge-update all replaces it",
    "generated": "",
}


def _reason(status: str, baseline_count: int, candidate_count: int) -> str:
    fewest = min(baseline_count, candidate_count)
    if status == "inconclusive" and fewest < stats.FEWEST_SAMPLES:
        side = "the baseline" if baseline_count < stats.FEWEST_SAMPLES else "this run"
        return f"{side} has one round, which has no interval; {stats.FEWEST_SAMPLES} are the least, 5 are advised"
    return {
        "regressed": "the change is real (its interval excludes no change) and beyond the limit",
        "match": "the whole interval of the change is within the limit",
        "improved": "better by more than the margin, and the interval excludes no change",
    }.get(status, "the interval of the change reaches beyond the limit, so neither side of it is shown")


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _is_difference(verdict: Verdict) -> bool:
    return bool(verdict.baseline_count) and unit_of(verdict.metric) == "fraction"


def _change_name(verdict: Verdict) -> str:
    if not verdict.baseline_count:
        return "mean"
    return "change" if _is_difference(verdict) else "ratio"


def _format_change(verdict: Verdict, value: float) -> str:
    if not verdict.baseline_count:
        return format_value(value, unit_of(verdict.metric))
    return f"{value * 100:+.2f} points" if _is_difference(verdict) else f"{value:.3f}"


def _change_text(verdict: Verdict) -> str:
    assert verdict.change is not None
    return f"{_format_change(verdict, verdict.change)} {_bounds_text(verdict)}"


def _bounds_text(verdict: Verdict) -> str:
    if verdict.change_low is None or verdict.change_high is None:
        return "[no interval]"
    return f"[{_format_change(verdict, verdict.change_low)}, {_format_change(verdict, verdict.change_high)}]"


def _mean_of(count: int) -> str:
    return f" (mean of {count} round{'s' if count > 1 else ''})" if count else ""

"""The pairs of one test: which side goes first, the other side's rounds, and the verdict on both."""

from __future__ import annotations

import dataclasses
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge import stats
from sparkgauge.errors import ConfigurationError, NotMeasuredError
from sparkgauge.gate import BaselineQuantity, Measurement, Observer, Policy, Samples, p_by_inversion, samples_of
from sparkgauge.records import Approval, Round, RunRecord, Status, Verdict, from_json
from sparkgauge.stats import Better, Interval, Scale, robust
from sparkgauge.store import baseline_of, comparable
from sparkgauge.workload import Workload

if TYPE_CHECKING:
    from sparkgauge.against.opponent import Opponent
    from sparkgauge.training import Training

HINTS: dict[str, str] = {
    "regressed": "git diff {name} shows what changed; the lines below the table have the phases",
    "inconclusive": "take more pairs (--gauge-rounds, --gauge-max-rounds, --gauge-budget), use a quieter machine, or "
    "widen the margin",
    "missing": "compare with a commit that has it, or with a stored baseline",
    "not_comparable": "the test asks for other work than it did at {name}: compare with a commit where it is the same",
}


class Order:
    """Which side goes first in each pair: ABBA or BAAB, tossed for every two pairs, so that drift hits both alike."""

    def __init__(self, seed: int, name: str) -> None:
        """``name`` gives every training its own order; the same seed and name give the same one again."""
        self._random = random.Random(f"{seed}:{zlib.crc32(name.encode('utf-8', 'surrogatepass'))}")
        self._planned: list[bool] = []
        self.taken: list[str] = []
        """``AB`` (A: the commit) or ``BA`` for each pair so far."""

    def other_first(self) -> bool:
        """Return whether the other side goes first in the next pair."""
        if not self._planned:
            first = self._random.random() < 0.5
            self._planned = [first, not first]
        first = self._planned.pop(0)
        self.taken.append("AB" if first else "BA")
        return first


@dataclass
class OtherSide:
    """The other side of one training: its rounds, or why there are none."""

    run: RunRecord | None = None
    """What it is, without rounds."""
    status: Literal["missing", "not_comparable"] | None = None
    reason: str = ""
    rounds: list[Round] = field(default_factory=list)
    order: Order = field(default_factory=lambda: Order(0, ""))

    @property
    def record(self) -> RunRecord | None:
        """Return its record with the rounds so far; None without any."""
        return dataclasses.replace(self.run, rounds=tuple(self.rounds)) if self.run and self.rounds else None


FEWEST_FOR_TRIMMING = 10
"""Most pairs of a plan below which nothing is trimmed: choosing among trimmings costs half the level, and a few pairs
have no tails to speak of."""


@dataclass(frozen=True)
class PairPlan:
    """When pairs are looked at: fixed before the first look, so that the looks together err as often as promised."""

    first: int
    """Pairs at the first look."""
    last: int
    """Pairs at the last one: what the limits on rounds and time allow."""

    def __post_init__(self) -> None:
        if not stats.FEWEST_SAMPLES <= self.first <= self.last:
            raise ConfigurationError(
                "Bad plan of pairs", expected="2 <= first <= last", actual=f"{self.first} and {self.last}"
            )


@dataclass(frozen=True)
class PairedDecision:
    """What the pairs so far say."""

    status: Status
    change: Interval
    """At the look that decided, or the last one: for ratios its repeated interval."""
    limit: float
    pairs: int
    """Pairs that it rests on; those after a decision are not looked at."""
    p_value: float | None = None
    """Of a regression: one-sided, over all looks."""


def paired_decision(
    before: Sequence[float],
    after: Sequence[float],
    *,
    better: Better,
    scale: Scale,
    margin: float,
    confidence: float,
    floor_sd: float = 0.0,
    plan: PairPlan | None = None,
) -> PairedDecision:
    """Return what sample i of ``before`` and of ``after``, taken next to each other, say together.

    The one place where pairs are decided. ``confidence`` is that of the whole comparison; its error probability is
    spent over the looks of ``plan``, by default one look at all pairs. Ratios are decided by
    :class:`~sparkgauge.stats.SequentialComparison`, differences by their interval at each look. NotMeasuredError where
    the sides have different numbers of samples.
    """
    if len(before) != len(after):
        raise NotMeasuredError("No pairs", expected=f"{len(after)} rounds there", actual=str(len(before)))
    plan = plan or PairPlan(max(stats.FEWEST_SAMPLES, len(after)), max(stats.FEWEST_SAMPLES, len(after)))
    limit = stats.margin_limit(margin, better=better, scale=scale)
    if scale == "difference":
        return _decide_differences(before, after, better, limit, confidence, floor_sd, plan)
    return _decide_ratios(before, after, better, margin, limit, confidence, plan)


def _decide_ratios(
    before: Sequence[float],
    after: Sequence[float],
    better: Better,
    margin: float,
    limit: float,
    confidence: float,
    plan: PairPlan,
) -> PairedDecision:
    trims = robust.TRIMS if plan.last >= FEWEST_FOR_TRIMMING else (0.0,)
    test = stats.SequentialComparison(margin, 1.0 - confidence, plan.first, plan.last, beyond=1.0, trims=trims)
    for one, two in zip(before, after, strict=True):
        # less is better to the test: a metric of which more is better goes in with its sides swapped
        test.add(*((one, two) if better == "lower" else (two, one)))
    change = test.interval
    if not change.is_bounded:  # no look yet
        change = stats.ratio_interval(before, after, confidence=confidence, paired=True)
        change = Interval(change.estimate, 0.0, math.inf, confidence)
    elif better == "higher":
        change = Interval(1.0 / change.estimate, 1.0 / change.high, 1.0 / change.low, confidence)
    if test.status == "open" or test.status == "inconclusive":
        return PairedDecision("inconclusive", change, limit, len(after))
    status: Status = test.status
    return PairedDecision(status, change, limit, test.pairs, test.p_worse if status == "regressed" else None)


def _decide_differences(
    before: Sequence[float],
    after: Sequence[float],
    better: Better,
    limit: float,
    confidence: float,
    floor_sd: float,
    plan: PairPlan,
) -> PairedDecision:
    def interval(count: int, level: float) -> Interval:
        sides = before[:count], after[:count]
        return stats.difference_interval(*sides, confidence=level, floor_sd=floor_sd, paired=True)

    # fewer pairs than the plan's first look are shown, and decide nothing
    counts = list(range(plan.first, len(after) + 1)) or [len(after)]
    for look, count in enumerate(counts, 1):
        level = stats.confidence_at_look(confidence, look) if plan.last > plan.first else confidence
        change = interval(count, level)
        status = stats.decide(change, limit=limit, better=better, no_change=0.0)
        if status != "inconclusive" and count >= plan.first:
            break
    p_value = _p_of_difference(lambda level: interval(count, level), better) if status == "regressed" else None
    share = (1.0 - level) / (1.0 - confidence)
    decided: Status = status if count >= plan.first else "inconclusive"
    return PairedDecision(decided, change, limit, count, None if p_value is None else min(1.0, p_value / share))


def _p_of_difference(interval: Callable[[float], Interval], better: Better) -> float:
    def excluded(level: float) -> bool:
        found = interval(level)
        return found.low > 0.0 if better == "lower" else found.high < 0.0

    return p_by_inversion(excluded)


class Duel:
    """One test's trainings on both sides."""

    def __init__(self, opponent: Opponent, test_id: str, seed: int) -> None:
        self.test_id = test_id
        self._opponent, self._seed = opponent, seed
        self._sides: dict[str, OtherSide] = {}
        self._asked: dict[str, int] = {}
        self._limits: dict[str, float] = {}
        self._trainings: dict[str, Training] = {}
        self._plans: dict[tuple[str, ...], PairPlan] = {}

    @property
    def orders(self) -> dict[str, list[str]]:
        """Return who went first in each pair, by label: ``AB`` is the commit first."""
        return {label: side.order.taken for label, side in self._sides.items()}

    def runs(self) -> list[RunRecord]:
        """Return the other side's records that have rounds."""
        return [run for side in self._sides.values() if (run := side.record) is not None]

    def run(self, label: str) -> RunRecord | None:
        """Return the other side's record of one training; None without rounds."""
        side = self._sides.get(label)
        return side.record if side is not None else None

    def notes(self) -> list[str]:
        """Return a line for every training that was not compared."""
        found = [(label, side) for label, side in self._sides.items() if side.status is not None]
        return [f"not compared: {self.test_id} {label}: {side.reason}" for label, side in found]

    def attach(self, training: Training) -> None:
        """Make further rounds of ``training`` come in pairs."""
        alone = training.run_round
        self._limits[training.label] = training.workload.timeout_seconds
        self._trainings[training.label] = training

        def paired(workload: Workload, seed: int, index: int, planned: int) -> Round:
            taken: list[Round] = []
            self.pair(
                training.label, seed, lambda: taken.append(alone(workload, seed, index, planned)), own_rounds=taken
            )
            return taken[0]

        training.run_round = paired
        training.rounds_at_once = 2

    def announce(self, trainings: Sequence[Training]) -> None:
        """Let the other side prepare these trainings while this one prepares its own."""
        if self._opponent.has(self.test_id):
            for training in trainings:
                self._asked[training.label] = self._request("prepare", training.label)

    def meet(self, label: str, own: RunRecord) -> None:
        """Wait until the other side is ready to train ``label``, and find out whether it can be compared with."""
        from sparkgauge.against.opponent import PREPARATION_SECONDS

        side = self._sides[label] = OtherSide(order=Order(self._seed, f"{self.test_id} {label}"))
        if label not in self._asked:
            side.status, side.reason = "missing", self._opponent.not_there
            return
        answer = self._opponent.answer(self._asked.pop(label), PREPARATION_SECONDS)
        if answer["kind"] == "prepare":
            run = dataclasses.replace(from_json(RunRecord, answer["run"]), commit=self._opponent.reference.commit)
            side.run = run
            if why_not := comparable(baseline_of([run], Approval("", "", "")), own, label=label):
                side.status, side.reason = "not_comparable", why_not
        else:
            self._give_up(side, answer)

    def pair(
        self,
        label: str,
        seed: int,
        own: Callable[[], Any],
        *,
        warmups: int = 0,
        own_rounds: list[Round] | None = None,
    ) -> None:
        """Take a round of either side next to each other; only the own one where there is no other side.

        ``own`` appends its round to ``own_rounds``, by default the training's. A pair with an invalid round is none:
        the other one is marked invalid too.
        """
        side = self._sides[label]
        if side.status is not None:
            own()
            return
        for _ in range(warmups):
            self._round(side, label, seed)
        other_first = side.order.other_first()
        if not other_first:
            own()
        taken = self._round(side, label, seed)
        if taken is not None:
            side.rounds.append(taken)
        if other_first:
            own()
        _invalidate_together(side.rounds, self._own_rounds(label) if own_rounds is None else own_rounds)

    def _own_rounds(self, label: str) -> list[Round]:
        training = self._trainings.get(label)
        return training.rounds if training is not None else []

    def quantity(self, metric: str, label: str, policy: Policy, observer: Observer) -> BaselineQuantity:
        """Return the other side of ``metric``, which judges in pairs."""
        where = f"{self._opponent.reference.name} ({self._opponent.reference.short})"
        judge = partial(self._judge, label=label, policy=policy, where=where)
        return BaselineQuantity(metric, None, policy=policy, file=where, observer=observer, judge=judge)

    def _judge(self, measurement: Measurement, *, label: str, policy: Policy, where: str) -> Verdict:
        """Return the verdict on ``measurement``, with more pairs while it is open."""
        labels = measurement.labels or (label,)
        for name in labels:
            side = self._sides.get(name)
            if side is not None and side.status is not None:
                return self._unpaired(measurement.samples, side.status, side.reason, where)
        plan = self._plan(measurement, labels)
        while True:
            other = self._other_samples(measurement.samples, labels)
            decision = self._decide(other, measurement.samples, policy, plan)
            if decision.status != "inconclusive" or not _grow(measurement):
                break
        verdict = self._verdict(decision, other, measurement.samples, where)
        passed = verdict.passed or (verdict.status == "inconclusive" and policy.inconclusive == "skip")
        return dataclasses.replace(verdict, passed=passed)

    def _plan(self, measurement: Measurement, labels: tuple[str, ...]) -> PairPlan:
        """Return when to look, the same for all comparisons of these trainings: fixed at the first one.

        From the planned rounds up to what ``--gauge-max-rounds`` and ``--gauge-budget`` allow at that time.
        """
        taken = max(stats.FEWEST_SAMPLES, len(measurement.samples.values))
        if measurement.more is None:
            return PairPlan(taken, taken)
        if labels not in self._plans:
            trainings = [self._trainings[label] for label in labels if label in self._trainings]
            most = min((_most_pairs(one) for one in trainings), default=taken)
            self._plans[labels] = PairPlan(taken, max(taken, most))
        return self._plans[labels]

    def _decide(self, other: Samples, own: Samples, policy: Policy, plan: PairPlan) -> PairedDecision:
        if len(other.values) != len(own.values):
            raise NotMeasuredError(
                f"{own.metric} has no pairs", expected=f"{len(own.values)} rounds there", actual=str(len(other.values))
            )
        return paired_decision(
            other.values,
            own.values,
            better=own.better,
            scale=own.scale,
            margin=policy.margin_for(own.metric),
            confidence=policy.confidence,
            floor_sd=_floor_sd(other, own),
            plan=plan,
        )

    def _other_samples(self, own: Samples, labels: Sequence[str]) -> Samples:
        """Return the other side's samples of the same quantity, pair by pair."""
        runs = [run for label in labels if (run := self.run(label)) is not None]
        if len(runs) != len(labels):
            raise NotMeasuredError(f"{own.metric} was not measured on the other side", actual=", ".join(labels))
        if len(runs) == 1:
            return samples_of(runs[0], own.metric, unit=own.unit, better=own.better)
        fast, slow = (samples_of(run, "runtime_seconds").values for run in runs)
        ratios = tuple(b / a for a, b in zip(fast, slow, strict=False))
        return dataclasses.replace(own, values=ratios)

    def _unpaired(self, own: Samples, status: Literal["missing", "not_comparable"], reason: str, where: str) -> Verdict:
        """Return the verdict where there is nothing to compare with: no failure and no pass if it exists here only."""
        return Verdict(
            status=status,
            metric=own.metric,
            better=own.better,
            actual=stats.mean(own.values, scale=own.scale),
            expected=None,
            change=None,
            change_low=None,
            change_high=None,
            limit=None,
            confidence=0.0,
            candidate_count=len(own.values),
            baseline_count=0,
            baseline_file=where,
            reason=reason,
            hint=self._hint(status),
            passed=status == "missing",  # the plugin turns it into a skip, which is no pass
        )

    def _verdict(self, decision: PairedDecision, other: Samples, own: Samples, where: str) -> Verdict:
        status, change = decision.status, decision.change
        bounded = change.is_bounded
        ours, theirs = own.values[: decision.pairs], other.values[: decision.pairs]
        return Verdict(
            status=status,
            metric=own.metric,
            better=own.better,
            actual=stats.mean(ours, scale=own.scale),
            expected=stats.mean(theirs, scale=own.scale),
            change=change.estimate if math.isfinite(change.estimate) else None,
            change_low=change.low if bounded else None,
            change_high=change.high if bounded else None,
            limit=decision.limit,
            confidence=change.confidence,
            candidate_count=len(ours),
            baseline_count=len(theirs),
            baseline_file=where,
            reason=_reason(status, len(ours)),
            hint=self._hint(status),
            passed=status in ("match", "improved"),
            p_value=decision.p_value,
        )

    def _hint(self, status: str) -> str:
        return HINTS.get(status, "").format(name=self._opponent.reference.name)

    def _round(self, side: OtherSide, label: str, seed: int) -> Round | None:
        """Return a round of the other side; None, with the reason kept, where it has none after all."""
        from sparkgauge.against.opponent import ANSWER_SLACK_SECONDS

        number = self._request("round", label, seed=seed, index=len(side.rounds))
        answer = self._opponent.answer(number, self._limits[label] + ANSWER_SLACK_SECONDS)
        if answer["kind"] == "round":
            return from_json(Round, answer["round"])
        self._give_up(side, answer)
        return None

    def _give_up(self, side: OtherSide, answer: dict[str, Any]) -> None:
        if answer["kind"] == "failed":
            raise self._opponent.failure(f"{self.test_id} does not run", str(answer["reason"]))
        side.status, side.reason = "missing", f"{self._opponent.not_there}: {answer['reason']}"

    def _request(self, kind: str, label: str, **content: Any) -> int:
        return self._opponent.ask(kind, test_id=self.test_id, label=label, **content)


def _most_pairs(training: Training) -> int:
    """Return the pairs that the limits on rounds and time allow, as they stand now."""
    seconds = training.rounds_at_once * max((one.runtime_seconds for one in training.rounds), default=math.inf)
    affordable = int(training.budget.seconds / seconds) if 0.0 < seconds < math.inf else 0
    return min(training.max_rounds, len(training.rounds) + max(0, affordable))


def _invalidate_together(others: list[Round], own: list[Round]) -> None:
    """Mark the last round of a side invalid where its counterpart is."""
    for rounds, counterpart in ((others, own), (own, others)):
        if rounds and counterpart and counterpart[-1].invalid and not rounds[-1].invalid:
            why = f"its counterpart is no sample: {counterpart[-1].invalid}"
            rounds[-1] = dataclasses.replace(rounds[-1], invalid=why)


def _grow(measurement: Measurement) -> bool:
    """Return whether one more pair was taken."""
    samples = measurement.more() if measurement.more is not None else None
    if samples is None or len(samples.values) <= len(measurement.samples.values):
        return False
    measurement.samples = samples
    return True


def _floor_sd(*sides: Samples) -> float:
    """Return the least noise of one accuracy: the binomial one of the test set; 0 where it is unknown."""
    counts = [side.test_count for side in sides if side.test_count]
    values = [value for side in sides for value in side.values]
    return stats.binomial_sd(math.fsum(values) / len(values), min(counts)) if counts else 0.0


def _reason(status: str, pairs: int) -> str:
    if status == "inconclusive" and pairs < stats.FEWEST_SAMPLES:
        return f"one pair has no interval; {stats.FEWEST_SAMPLES} are the least, 5 are advised"
    return {
        "regressed": "the change is real (the pairs' interval excludes no change) and beyond the limit",
        "match": "the whole interval of the pairs' change is within the limit",
        "improved": "better by more than the margin, and the pairs' interval excludes no change",
    }.get(status, "the interval of the pairs' change reaches beyond the limit, so neither side of it is shown")

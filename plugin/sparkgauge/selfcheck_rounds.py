"""Takes the real rounds of a self-check: short Spark trainings, first all alike, then some slowed down on purpose."""

from __future__ import annotations

import datetime
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparkgauge import selfcheck, stats
from sparkgauge.config import SYNTHETIC, GaugeConfig
from sparkgauge.environment import installed_version
from sparkgauge.errors import ConfigurationError, MachineError
from sparkgauge.gate import Policy
from sparkgauge.records import PHASES, Round
from sparkgauge.report.progress import Progress, Stream
from sparkgauge.session import GaugeSession
from sparkgauge.store import cpu_seconds, piece_seconds
from sparkgauge.workload import FRAMEWORKS, PROFILE_SPECS, Workload

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorflow": ("tensorflowonspark",),
    "torch": ("torch",),
    "caffe": ("caffe",),
}
"""Distributions of which one must be installed for a framework; tried in this order."""

MODEL = "cifar10_quick"
ITERATIONS = 30
"""Three thousand images: with launch and test a round of a few seconds, so that some dozens fit into minutes."""

DEFAULT_MINUTES = 3.0
LEAST_MINUTES, MOST_MINUTES = 0.5, 24 * 60.0
ALIKE_SHARE = 0.75
"""Of the time for rounds: the rest goes to the slowed ones."""
INTENDED_FRACTION = 0.20
"""What the injection adds to a whole round."""
MOST_INJECTED_PAIRS = 20
WARMUP_ROUNDS = 2
"""Not kept: the first trainings on a new cluster are slower."""
SEED = 1
"""The same in every round: nothing but the machine may differ."""


@dataclass(frozen=True)
class Settings:
    """How a self-check is run."""

    minutes: float = DEFAULT_MINUTES
    """About how long the rounds may take; the cluster's start and the resampling come on top."""
    executors: int | None = None
    """None: as a pytest session would choose."""
    data: str | None = None
    """As for ``--gauge-data``; without it $SPARKGAUGE_DATA, real data in the cache, else the look-alike."""
    cache_folder: Path | None = None

    def __post_init__(self) -> None:
        if not LEAST_MINUTES <= self.minutes <= MOST_MINUTES:
            expected = f"{LEAST_MINUTES:g} to {MOST_MINUTES:g}"
            raise ConfigurationError("Bad number of minutes", expected=expected, actual=f"{self.minutes:g}")
        if self.executors is not None and self.executors < 1:
            raise ConfigurationError("Bad number of executors", expected="at least 1", actual=str(self.executors))


def run(settings: Settings, stream: Stream) -> selfcheck.SelfCheck:
    """Return the self-check of this machine, stored for later reports; progress goes to ``stream``.

    The cluster has ended on return, however that comes. GaugeError says what stopped it.
    """
    progress = Progress(stream)
    with rounds_on_spark(settings, progress) as taker:
        deadline = time.monotonic() + settings.minutes * 60.0
        alike = taker.alike(until=time.monotonic() + ALIKE_SHARE * settings.minutes * 60.0)
        injection = _inject(taker, alike, deadline)
        machine, data = taker.session.environment, taker.session.dataset().identity.kind
        workload = taker.workload.to_dict()
    progress.message(f"sparkgauge: resampling {len(alike)} rounds {selfcheck.RESAMPLINGS} times")
    policy, runtimes, references = Policy(), tuple(one.runtime_seconds for one in alike), _references(alike)
    check = selfcheck.SelfCheck(
        when=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        hardware_class=machine.hardware_class,
        workload=workload,
        data=data,
        software=machine.software,
        margin_fraction=policy.runtime_margin_fraction,
        confidence=policy.confidence,
        resamplings=selfcheck.RESAMPLINGS,
        runtime_seconds=runtimes,
        cpu_seconds=tuple(cpu_seconds(one) for one in alike),
        load_average=tuple(one.load_average for one in alike),
        stored=selfcheck.calibrate_stored(
            runtimes, policy, **_planned(), resamplings=selfcheck.RESAMPLINGS, references=references
        ),
        paired=selfcheck.calibrate_paired(runtimes, policy, resamplings=selfcheck.RESAMPLINGS),
        injection=injection,
    )
    selfcheck.write(selfcheck.path_for(check.hardware_class, settings.cache_folder), check)
    return check


@contextmanager
def rounds_on_spark(
    settings: Settings, progress: Progress, *, iterations: int | None = None, framework: str | None = None
) -> Iterator[Taker]:
    """Give what takes rounds on a new cluster, warmed up; the cluster ends with the block."""
    framework = framework or installed_framework()
    config = _config(settings)
    session = GaugeSession(config, Path.cwd(), progress)
    try:
        keywords = {"framework": framework, "model": MODEL, "iterations": iterations or ITERATIONS}
        taker = Taker(session, Workload.from_keywords(keywords, config, where="sparkgauge selfcheck"))
        session.prepare(taker.workload)
        progress.start("selfcheck", WARMUP_ROUNDS)
        for _ in range(WARMUP_ROUNDS):
            taker.take()
        yield taker
    finally:
        progress.finish()
        session.stop()


@dataclass
class Taker:
    """Takes rounds of one workload."""

    session: GaugeSession
    workload: Workload
    taken: int = 0

    def take(self, injections: Mapping[str, float] | None = None) -> Round:
        """Return one round, slowed down by ``injections``."""
        self.session.config = replace(self.session.config, injections=dict(injections or {}))
        self.taken += 1
        return self.session.run_referenced_round(self.workload, SEED, self.taken - 1, self.taken)

    def alike(self, *, until: float) -> list[Round]:
        """Return rounds in which nothing changes, taken until the time (monotonic) is over; enough for resampling."""
        rounds: list[Round] = []
        while len(rounds) < selfcheck.FEWEST_ROUNDS or time.monotonic() < until:
            rounds.append(self.take())
            seconds = rounds[-1].runtime_seconds
            self.session.progress.message(f"sparkgauge: A/A round {len(rounds)}: {seconds:.2f} s")
        return rounds


def installed_framework() -> str:
    """Return the first framework that has an adapter and is installed here; MachineError without any."""
    known = [name for name in PACKAGES if (spec := FRAMEWORKS.get(name)) is not None and spec.module is not None]
    for name in known:
        if all(map(installed_version, PACKAGES[name])):
            return name
    raise MachineError(
        "A self-check trains, and no framework is installed",
        expected=f"one of {', '.join(known)}",
        hint="pip install 'pytest-sparkgauge[tensorflow-cpu]'",
    )


def phase_samples(rounds: list[Round]) -> dict[str, list[float]]:
    """Return each phase's seconds round by round, means over the executors; phases without time are left out."""

    def mean(one: Round, phase: str) -> float:
        return math.fsum(getattr(each.phases, phase) for each in one.executors) / len(one.executors)

    samples = {phase: [mean(one, phase) for one in rounds] for phase in PHASES}
    return {phase: values for phase, values in samples.items() if min(values) > 0.0}


def _inject(taker: Taker, alike: list[Round], deadline: float) -> selfcheck.Injection:
    """Return what became of pairs of plain and slowed rounds, taken until decided or until the time is over."""
    fraction = _phase_fraction(alike)
    order, policy = random.Random(SEED), Policy()
    plan = stats.SequentialComparison(
        policy.runtime_margin_fraction, 1.0 - policy.confidence, selfcheck.FEWEST_PAIRS, MOST_INJECTED_PAIRS
    )
    plain: list[Round] = []
    slowed: list[Round] = []
    while not plan.decided and (len(plain) < selfcheck.FEWEST_PAIRS or time.monotonic() < deadline):
        pair = [({}, plain), ({"compute": fraction}, slowed)]
        for injections, rounds in pair if order.random() < 0.5 else reversed(pair):
            rounds.append(taker.take(injections))
        plan.add(plain[-1].runtime_seconds, slowed[-1].runtime_seconds)
        seconds = f"{plain[-1].runtime_seconds:.2f} s and, slowed down, {slowed[-1].runtime_seconds:.2f} s"
        taker.session.progress.message(f"sparkgauge: pair {len(plain)}: {seconds}: {plan.status}")
    return _injection(alike, plain, slowed, fraction, plan.status)


def _injection(
    alike: list[Round], plain: list[Round], slowed: list[Round], fraction: float, status: str
) -> selfcheck.Injection:
    before, after = ([one.runtime_seconds for one in side] for side in (plain, slowed))
    ratio = stats.ratio_interval(before, after, confidence=0.95, paired=True)
    first, policy = alike[: _planned()["rounds"]], Policy()
    sides = phase_samples(plain), phase_samples(slowed)
    return selfcheck.Injection(
        phase="compute",
        phase_fraction=fraction,
        intended_fraction=INTENDED_FRACTION,
        plain_seconds=tuple(before),
        slowed_seconds=tuple(after),
        paired="inconclusive" if status == "open" else status,
        stored=selfcheck.judged_stored(
            [one.runtime_seconds for one in first], after, policy, references=(_references(first), _references(slowed))
        ),
        named_phase=stats.localise(*sides, paired=True).named if sides[0].keys() == sides[1].keys() else None,
        ratio=ratio.estimate,
        ratio_low=ratio.low if ratio.is_bounded else None,
        ratio_high=ratio.high if ratio.is_bounded else None,
    )


def _references(rounds: list[Round]) -> list[float]:
    """Return the reference kernel's time between the steps of each round; empty where one has none."""
    found = [piece_seconds(one) for one in rounds]
    return [one for one in found if one is not None] if None not in found else []


def _phase_fraction(alike: list[Round]) -> float:
    """Return by how much to slow compute down so that a round takes ``INTENDED_FRACTION`` longer, in whole per cent.

    The injection lengthens what happens between two batches: compute, synchronisation, and the first step.
    """
    phases = phase_samples(alike)
    slowed = math.fsum(math.fsum(phases.get(name, ())) for name in ("compute", "sync", "warmup"))
    whole = math.fsum(one.runtime_seconds for one in alike)
    return math.ceil(100.0 * INTENDED_FRACTION * whole / slowed) / 100.0


def _planned() -> dict[str, int]:
    """Return the rounds of a session that says nothing: the profile's, and the most while undecided."""
    config = GaugeConfig.build(lambda name: None, lambda name: None, {}, rootdir=Path.cwd())
    rounds = PROFILE_SPECS[config.profile].rounds
    return {"rounds": rounds, "most_rounds": max(rounds, config.max_rounds)}


def _config(settings: Settings) -> GaugeConfig:
    given: dict[str, Any] = {"gauge_executors": settings.executors, "gauge_data": settings.data or _data(settings)}
    return GaugeConfig.build(given.get, lambda name: None, os.environ, rootdir=Path.cwd())


def _data(settings: Settings) -> str | None:
    """Return the data to train on where none is named: nothing is downloaded for a self-check."""
    if os.environ.get("SPARKGAUGE_DATA"):
        return None
    import pooch

    from sparkgauge.data.cache import Cache

    found, _ = Cache(settings.cache_folder or Path(pooch.os_cache("sparkgauge"))).real_datasets()
    return None if found else SYNTHETIC

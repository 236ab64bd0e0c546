"""Where a regression went: the phase and the executor that explain it, and whether it is work or waiting.

Asked only after a regression: with nothing slower, one phase of seven is soon called slower by luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparkgauge import stats
from sparkgauge.errors import ConfigurationError
from sparkgauge.records import PHASES, ExecutorShare, RunRecord
from sparkgauge.stats import Comparison, Localisation, PhaseChange
from sparkgauge.store import executor_shares, run_samples

ALPHA = 0.05
"""A name beside figures that are all shown; the verdict does not rest on it."""

FEWEST_ROUNDS = 2

CPU_KINDS = ("cpu_seconds", "jvm_cpu_seconds", "driver_cpu_seconds")
"""Samples that add up to the CPU time of a round; the second and third where both sides have them."""

Shares = Sequence[Sequence[ExecutorShare]]
"""For each round, each executor's phases in order of rank."""
BySample = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: raw samples by metric without label, and each executor's phases."""

    samples: BySample
    shares: Shares


def side_of(run: RunRecord) -> Side:
    """Return a run's valid rounds as one side."""
    return Side(run_samples(run), executor_shares(run))


def attribute(before: Side, after: Side, *, paired: bool = False) -> str:
    """Return one line on where a regression of the runtime went, its clauses separated by semicolons.

    Empty where no phase took longer, and where a side has no phases: baselines written before they were kept by
    executor have none.
    """
    if min(len(before.shares), len(after.shares)) < FEWEST_ROUNDS:
        return ""
    located, of_what = _located(before.shares, after.shares, paired)
    if located.parts[0].change_seconds.estimate <= 0.0:
        return ""  # nothing got slower
    parts = [_phase_text(located, of_what), _straggler_text(before.shares, after.shares)]
    return "; ".join(part for part in (*parts, _work_text(before.samples, after.samples, paired)) if part)


def phase_means(shares: Shares, *, cpu: bool = False) -> dict[str, list[float]]:
    """Return the mean over executors of each phase, one value a round; with ``cpu`` its CPU seconds, empty without."""
    found: dict[str, list[float]] = {}
    for phase in PHASES:
        for executors in shares:
            parts = [one.phase_cpu_seconds if cpu else one.phases for one in executors]
            known = [getattr(part, phase) for part in parts if part is not None]
            if not known or len(known) < len(parts):
                return {}
            found.setdefault(phase, []).append(math.fsum(known) / len(known))
    return found


def _located(before: Shares, after: Shares, paired: bool) -> tuple[Localisation, str]:
    """Return which phase explains it by wall seconds, or by CPU seconds where those alone name one.

    Wall seconds come first because their shares are of what the person waits for; CPU seconds are the quieter ones.
    """
    wall = stats.localise(phase_means(before), phase_means(after), alpha=ALPHA, paired=paired)
    cpu = phase_means(before, cpu=True), phase_means(after, cpu=True)
    if wall.named is not None or not all(cpu):
        return wall, "of the change"
    by_cpu = stats.localise(*cpu, alpha=ALPHA, paired=paired)
    return (wall, "of the change") if by_cpu.named is None else (by_cpu, "of the change of CPU time")


def _phase_text(located: Localisation, of_what: str) -> str:
    named = next((part for part in located.parts if part.name == located.named), None)
    if named is not None:
        return f"{named.name} explains it: {_change_text(named, of_what)}"
    return f"no phase alone is shown to explain it, most is in {located.parts[0].name}: " + _change_text(
        located.parts[0], of_what
    )


def _change_text(part: PhaseChange, of_what: str) -> str:
    change, share = part.change_seconds, part.share
    text = f"{change.estimate:+.2f} s"
    if change.is_bounded:
        text += f" [{change.low:+.2f}, {change.high:+.2f}]"
    if not math.isfinite(share.estimate):
        return text
    bounds = f" [{share.low:.0%}, {share.high:.0%}]" if share.is_bounded else ""
    return f"{text}, {share.estimate:.0%}{bounds} {of_what}"


def _straggler_text(before: Shares, after: Shares) -> str:
    rank = _straggler(_compute(before), _compute(after))
    return "" if rank is None else f"executor {rank} fell behind the others in compute"


def _straggler(before: dict[int, list[float]], after: dict[int, list[float]]) -> int | None:
    if before.keys() != after.keys() or not _is_work(before) or not _is_work(after):
        return None
    try:
        return stats.find_straggler(before, after, alpha=ALPHA)
    except ConfigurationError:  # a round with fewer executors than another
        return None


def _compute(shares: Shares) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for executors in shares:
        for rank, one in enumerate(executors):
            found.setdefault(rank, []).append(one.phases.compute)
    return found


def _is_work(by_rank: dict[int, list[float]]) -> bool:
    counts = {len(values) for values in by_rank.values()}
    return len(counts) == 1 and all(value > 0.0 for values in by_rank.values() for value in values)


def _work_text(before: BySample, after: BySample, paired: bool) -> str:
    """Return whether the change is more work or waiting, by CPU time; empty where CPU time is not known."""
    wall, cpu = _compared("runtime_seconds", before, after, paired), _cpu_compared(before, after, paired)
    if wall is None or cpu is None:
        return ""
    cpu_text = f"CPU time {_percent(cpu.ratio)} [{_percent(cpu.ci_low)}, {_percent(cpu.ci_high)}]"
    kind = stats.work_or_waiting(wall, cpu)
    if kind == "waiting":
        return f"waiting or environment, not work: {cpu_text}"
    return f"work: {cpu_text}" if kind == "work" else f"work or waiting cannot be told: {cpu_text}"


def _compared(metric: str, before: BySample, after: BySample, paired: bool) -> Comparison | None:
    sides = before.get(metric, ()), after.get(metric, ())
    if min(map(len, sides)) < FEWEST_ROUNDS or min(map(min, sides)) <= 0.0:
        return None
    return stats.compare(*sides, paired=paired, margin=0.0, alpha=ALPHA)


def _cpu_compared(before: BySample, after: BySample, paired: bool) -> Comparison | None:
    kinds = [kind for kind in CPU_KINDS if kind in before and kind in after]
    if "cpu_seconds" not in kinds:
        return None
    sums = [[math.fsum(values) for values in zip(*(side[k] for k in kinds), strict=True)] for side in (before, after)]
    return _compared("cpu_seconds", {"cpu_seconds": sums[0]}, {"cpu_seconds": sums[1]}, paired)


def _percent(ratio: float) -> str:
    return f"{ratio - 1.0:+.1%}".replace("%", " %") if math.isfinite(ratio) else "unknown"

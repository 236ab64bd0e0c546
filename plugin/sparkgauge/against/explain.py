"""Where a slowdown between the two sides went: the phase and the executor that explain it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparkgauge import stats
from sparkgauge.records import PHASES, RunRecord

ALPHA = 0.05
"""A name beside figures that are all shown; the verdict does not rest on it."""

FEWEST_PAIRS = 2


def explanation(other: RunRecord, own: RunRecord, name: str) -> list[str]:
    """Return the lines that compare the phases of the pairs: the commit's mean, this side's, and what explains it."""
    before, after = _phases(other), _phases(own)
    pairs = min(len(other.rounds), len(own.rounds))
    if not pairs:
        return []
    shown = [phase for phase in PHASES if sum(before[phase]) > 0.0 or sum(after[phase]) > 0.0]
    changes = ", ".join(f"{phase} {_mean(before[phase]):.2f} -> {_mean(after[phase]):.2f} s" for phase in shown)
    return [f"  {name} -> working tree: {changes}", *(f"  {line}" for line in _named(before, after, other, own))]


def _named(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], other: RunRecord, own: RunRecord
) -> list[str]:
    """Return what the statistics name; nothing where they name nothing."""
    localise = getattr(stats, "localise", None)
    if localise is None or min(len(other.rounds), len(own.rounds)) < FEWEST_PAIRS:
        return []
    located: Any = localise(before, after, alpha=ALPHA, paired=True)
    lines = []
    part = next((one for one in located.parts if one.name == located.named), None)
    if part is not None:
        change = part.change_seconds
        text = f"{part.name} explains it: {change.estimate:+.2f} s"
        if change.is_bounded:
            text += f" [{change.low:+.2f}, {change.high:+.2f}]"
        lines.append(f"{text}, {part.share.estimate:.0%} of the change")
    straggler = _straggler(other, own)
    return lines if straggler is None else [*lines, f"executor {straggler} fell behind the others in compute"]


def _straggler(other: RunRecord, own: RunRecord) -> int | None:
    find = getattr(stats, "find_straggler", None)
    sides = [_compute_by_rank(run) for run in (other, own)]
    if find is None or sides[0].keys() != sides[1].keys():
        return None
    rank: int | None = find(*sides, alpha=ALPHA)
    return rank


def _phases(run: RunRecord) -> dict[str, list[float]]:
    """Return the mean over executors of each phase, one value a round."""
    return {
        phase: [_mean([getattr(one.phases, phase) for one in taken.executors]) for taken in run.rounds]
        for phase in PHASES
    }


def _compute_by_rank(run: RunRecord) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for taken in run.rounds:
        for executor in taken.executors:
            found.setdefault(executor.rank, []).append(executor.phases.compute)
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0

"""What the phases took on either side of ``--gauge-against``, and what explains a slowdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparkgauge.attribution import attribute, phase_means, side_of
from sparkgauge.records import PHASES, RunRecord


def explanation(other: RunRecord, own: RunRecord, name: str) -> list[str]:
    """Return the lines that compare the phases of the pairs: the commit's mean, this side's, and what explains it."""
    sides = side_of(other), side_of(own)
    before, after = (phase_means(side.shares) for side in sides)
    if not before or not after:
        return []
    shown = [phase for phase in PHASES if sum(before[phase]) > 0.0 or sum(after[phase]) > 0.0]
    changes = ", ".join(f"{phase} {_mean(before[phase]):.2f} -> {_mean(after[phase]):.2f} s" for phase in shown)
    found = attribute(*sides, paired=len(sides[0].shares) == len(sides[1].shares))
    return [f"  {name} -> working tree: {changes}", *([f"    {found}"] if found else [])]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

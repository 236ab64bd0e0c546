"""Stored baselines as text: lists, one of them in full, the difference of two, what replaced what."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparkgauge import stats
from sparkgauge.baselines import (
    STALE_DAYS,
    Change,
    Replacement,
    Stored,
    age_days,
    changes,
    differences,
    headline_keys,
    interval_of,
    is_stale,
    metric_of,
)
from sparkgauge.errors import NotMeasuredError
from sparkgauge.gate import SHORT_NAMES, format_interval, format_value, unit_of
from sparkgauge.records import PHASES, Baseline, to_json
from sparkgauge.stats import Interval
from sparkgauge.store import generations

FEWEST_GENERATIONS = 10
"""With fewer, not even a clear step passes the permutation test of :func:`sparkgauge.stats.change_points`."""
MOST_VALUES = 12
"""Raw samples printed of one metric; all are in the file and in ``--json``."""


def list_lines(stored: Sequence[Stored], now: datetime.datetime, stale_days: float = STALE_DAYS) -> list[str]:
    """Return the baselines by hardware class: test, profile, who, when, age, and below each its main quantities."""
    lines: list[str] = []
    for one in stored:
        baseline = one.baseline
        if f"{baseline.environment.hardware_class}:" not in lines:
            lines.append(f"{baseline.environment.hardware_class}:")
        lines.append(f"  {baseline.test_id} ({baseline.profile}){_origin(baseline, now, stale_days)}")
        keys = headline_keys(baseline)
        width = max(map(len, map(short_key, keys)))
        lines += [f"    {short_key(key):{width}}  {_summary(baseline, key)}" for key in keys]
    return lines


def list_json(stored: Sequence[Stored], now: datetime.datetime, stale_days: float = STALE_DAYS) -> list[dict[str, Any]]:
    """Return the same for programs."""
    return [
        {
            "file": str(one.path),
            "test_id": one.baseline.test_id,
            "profile": one.baseline.profile,
            "hardware_class": one.baseline.environment.hardware_class,
            "approved": to_json(one.baseline.approved),
            "age_days": age_days(one.baseline.approved, now),
            "stale": is_stale(one.baseline.approved, now, stale_days),
            "generations": len(one.baseline.history) + 1,
            "quantities": {
                key: {"count": len(one.baseline.samples[key]), **_interval_json(interval_of(one.baseline, key))}
                for key in headline_keys(one.baseline)
            },
        }
        for one in stored
    ]


def show_lines(one: Stored, now: datetime.datetime, stale_days: float = STALE_DAYS) -> list[str]:
    """Return everything about a baseline: approval, workload, machine, samples, phases, history."""
    baseline = one.baseline
    environment, data = baseline.environment, baseline.data
    lines = [
        f"{baseline.test_id} ({baseline.profile}), {shown_path(one.path)}",
        f"  approved: {_origin(baseline, now, stale_days).lstrip(', ')}: {baseline.approved.why}",
        f"  commit: {baseline.commit or 'none'}",
        f"  data: {data.kind} {data.name}, {data.train_count} + {data.test_count} images, digest {data.digest[:12]}",
        f"  machine: {environment.hardware_class}; {environment.cpu_model}, {environment.cores} cores, "
        f"{environment.memory_bytes / 2**30:.1f} GiB, {', '.join(environment.gpus) or 'no GPU'}; "
        f"{environment.operating_system}",
        f"  software: {', '.join(f'{name} {version}' for name, version in sorted(environment.software.items()))}",
        f"  workload: {', '.join(f'{name}={value}' for name, value in sorted(baseline.workload.items()))}",
        f"  seeds: {', '.join(map(str, baseline.seeds)) or 'unknown'}",
        "  samples (mean with its 95 % interval):",
    ]
    width = max(len(short_key(key)) for key in baseline.samples)
    for key in dict.fromkeys([*headline_keys(baseline), *sorted(baseline.samples)]):
        lines.append(f"    {short_key(key):{width}}  {_summary(baseline, key)}; {_values_text(baseline, key)}")
    return [*lines, *_phase_lines(baseline), *history_lines(baseline)]


def history_lines(baseline: Baseline) -> list[str]:
    """Return one line for each generation and metric of note, oldest first, and the change points of each metric."""
    past = generations(baseline)
    if len(past) == 1:
        return ["  history: none, this is the first generation"]
    lines = [f"  history: {len(past)} generations, oldest first"]
    for key in headline_keys(baseline):
        lines.append(f"    {short_key(key)}")
        for older, one in zip([None, *past], past, strict=False):
            text = _summary(one, key) if key in one.samples else "not measured"
            step = f", {_step_text(older, one, key)}" if older is not None else ""
            lines.append(f"      {one.approved.when[:10]} {one.approved.who}: {text}{step}; {one.approved.why}")
        lines += [f"      {line}" for line in trend_lines(baseline, key)]
    return lines


def trend_lines(baseline: Baseline, key: str) -> list[str]:
    """Return where the level of ``key`` changed over the generations of the same work; a reason where none is sought.

    Generations before a change of data or workload are left out: their figures are another quantity's.
    """
    series = [one for one in generations(baseline) if (one.data, one.workload) == (baseline.data, baseline.workload)]
    means = [(one, interval.estimate) for one in series if (interval := interval_of(one, key)) is not None]
    find = getattr(stats, "change_points", None)
    if find is None:
        return ["change points: not sought, this version of sparkgauge.stats finds none"]
    try:
        points = find([mean for _, mean in means])
    except NotMeasuredError as error:
        return [f"change points: not sought, {error}"]
    if not points:
        few = " (too few to tell)" if len(means) < FEWEST_GENERATIONS else ""
        return [f"change points: none in {len(means)} generations{few}"]
    return [
        f"change point: {means[point.index][0].approved.when[:10]}, level {_percent(point.ratio)} "
        f"(p = {point.p_value:.3g})"
        for point in points
    ]


def diff_lines(old: Baseline, new: Baseline, names: tuple[str, str]) -> list[str]:
    """Return every metric's change with its interval, then what else differs; ``names`` say which sides these are."""
    lines = [f"old: {names[0]}", f"new: {names[1]}"]
    found = changes(old, new)
    width = max(len(short_key(one.key)) for one in found)
    lines += [f"  {short_key(one.key):{width}}  {change_text(one)}" for one in found]
    others = differences(old, new)
    lines.append("differs otherwise:" if others else "nothing else differs")
    return lines + [f"  {name}: {before} -> {after}" for name, before, after in others]


def diff_json(old: Baseline, new: Baseline) -> dict[str, Any]:
    """Return the same for programs."""
    metrics = {
        one.key: {
            "before": _interval_json(one.before),
            "after": _interval_json(one.after),
            "change": _interval_json(one.change),
            "changed": one.is_shown,
            "note": one.note,
        }
        for one in changes(old, new)
    }
    others = {name: [before, after] for name, before, after in differences(old, new)}
    return {"metrics": metrics, "differences": others}


def replacement_lines(one: Replacement) -> list[str]:
    """Return what a new baseline changed: old -> new interval of its main quantities."""
    head = f"baseline {'replaced' if one.old else 'new'}: {one.new.test_id} ({one.new.profile})"
    lines = [f"{head}; {one.note}" if one.note else head]
    for key in headline_keys(one.new):
        if one.old is None or one.old.samples.get(key) != one.new.samples[key]:
            before = _interval_text(one.old, key) if one.old and key in one.old.samples else "nothing"
            step = f", {_step_text(one.old, one.new, key)}" if one.old and key in one.old.samples else ""
            lines.append(f"  {short_key(key)}: {before} -> {_interval_text(one.new, key)}{step}")
    return lines


def change_text(one: Change) -> str:
    """Return old -> new with the change and its interval, or why there is none."""
    unit = unit_of(metric_of(one.key))
    before, after = (format_interval(side, unit) if side else "-" for side in (one.before, one.after))
    sides = f"{before} -> {after}"
    if one.change is None:
        return f"{sides}, {one.note}"
    return f"{sides}, {_amount(one)}{'' if one.is_shown else ' (no change shown)'}"


def short_key(key: str) -> str:
    """Return a sample key as people say it: ``gpu.runtime`` for ``gpu.runtime_seconds``."""
    label, dot, metric = key.rpartition(".")
    return f"{label}{dot}{SHORT_NAMES.get(metric, metric)}"


def age_text(days: float | None) -> str:
    """Return an age in words: ``today``, ``1 day ago``, ``91 days ago``."""
    if days is None:
        return "at an unknown time"
    whole = math.floor(days)
    return "today" if whole < 1 else f"{whole} day{'' if whole == 1 else 's'} ago"


def shown_path(path: Path) -> str:
    """Return ``path`` relative to the current folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _origin(baseline: Baseline, now: datetime.datetime, stale_days: float) -> str:
    approved = baseline.approved
    stale = ", STALE" if is_stale(approved, now, stale_days) else ""
    count = len(baseline.history)
    earlier = f", {count} earlier generation{'' if count == 1 else 's'}" if count else ""
    return f", {approved.when[:10]} ({age_text(age_days(approved, now))}) by {approved.who}{earlier}{stale}"


def _summary(baseline: Baseline, key: str) -> str:
    return f"{_interval_text(baseline, key)}  n = {len(baseline.samples[key])}"


def _interval_text(baseline: Baseline, key: str) -> str:
    interval, unit = interval_of(baseline, key), unit_of(metric_of(key))
    if interval is not None:
        return format_interval(interval, unit)
    values = baseline.samples[key]
    return format_value(math.fsum(values) / len(values), unit)


def _values_text(baseline: Baseline, key: str) -> str:
    values = baseline.samples[key]
    shown = ", ".join(f"{value:.4g}" for value in values[:MOST_VALUES])
    return f"{shown}, ... ({len(values) - MOST_VALUES} more)" if len(values) > MOST_VALUES else shown


def _phase_lines(baseline: Baseline) -> list[str]:
    """Return each training's mean seconds by phase with their shares."""
    prefixes = sorted({key[: -len(metric_of(key))] for key in baseline.samples})
    lines = []
    for prefix in prefixes:
        found = {phase: baseline.samples.get(f"{prefix}{phase}_seconds", ()) for phase in PHASES}
        means = {phase: math.fsum(values) / len(values) for phase, values in found.items() if values}
        total = math.fsum(means.values())
        parts = [f"{name} {value:.2f} s ({value / total:.0%})" for name, value in means.items() if value > 0.0]
        if parts:
            lines.append(f"  phases{f' of {prefix[:-1]}' if prefix else ''}: {', '.join(parts)}")
    return lines


def _step_text(older: Baseline, newer: Baseline, key: str) -> str:
    if (older.data, older.workload) != (newer.data, newer.workload):
        return "other data or workload"
    change = next((one for one in changes(older, newer) if one.key == key), None)
    return _amount(change) if change and change.change else "no ratio"


def _amount(one: Change) -> str:
    assert one.change is not None
    if unit_of(metric_of(one.key)) == "fraction":
        low, high = f"{one.change.low * 100:+.2f}", f"{one.change.high * 100:+.2f}"
        return f"{one.change.estimate * 100:+.2f} points [{low}, {high}]{f' {one.note}' if one.note else ''}"
    bounds = f"[{_percent(one.change.low)}, {_percent(one.change.high)}]" if one.change.is_bounded else "[no interval]"
    return f"{_percent(one.change.estimate)} {bounds}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"


def _interval_json(interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {"estimate": None, "low": None, "high": None}
    bounds = (interval.estimate, interval.low, interval.high)
    estimate, low, high = (value if math.isfinite(value) else None for value in bounds)
    return {"estimate": estimate, "low": low, "high": high}

"""The table after a session: one entry per run, with its runtime, its change against the baseline, and its status.

Where the terminal is wide enough an entry is one line; otherwise the test's name has a line of its own above its
figures, because a truncated name or figure helps nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sparkgauge import stats
from sparkgauge.errors import NotMeasuredError
from sparkgauge.gate import SHORT_NAMES, format_value, unit_of
from sparkgauge.records import PHASES, RunRecord, Status, Verdict
from sparkgauge.store import DEFAULT_LABEL, run_samples

HEADERS = ("test", "device", "executors", "runtime", "vs baseline", "images/s", "accuracy", "status")

SEVERITY: tuple[Status, ...] = (
    "regressed",
    "not_comparable",
    "missing",
    "inconclusive",
    "generated",
    "improved",
    "match",
)
"""Statuses from worst to best; a run with several verdicts shows its worst."""

COLOURS: dict[str, str] = {"regressed": "31", "not_comparable": "31", "missing": "31", "inconclusive": "33"}
"""ANSI colour of a status; the others are green."""

DROPPABLE = ("images/s", "interval", "device", "executors")
"""Columns, and the interval beside the change, in the order in which they are left out where room is short: the phases
and the report have the first, and a figure that is cut is worse than one that is not there."""

GAP = "  "
INDENT = "  "
SYNTHETIC_NOTE = " (synthetic data)"


@dataclass(frozen=True)
class Row:
    """One entry of the table, as text; ``-`` stands for what was not measured."""

    test: str
    note: str
    """Said behind the test's name and never cut: that the data is synthetic."""
    device: str
    executors: str
    runtime: str
    """Mean with its interval's half-width, e.g. ``12.3 s ±0.4``."""
    change: str
    """Change against the baseline without its interval, e.g. ``+24.0 %``."""
    change_interval: str
    """The interval, e.g. ``[+18.0, +30.0]``; left out first where room is short."""
    images_per_second: str
    accuracy: str
    status: str


def row_from(run: RunRecord, verdicts: Sequence[Verdict]) -> Row:
    """Return the entry of ``run``, whose gated comparisons gave ``verdicts``."""
    label = "" if run.label == DEFAULT_LABEL else f" {run.label}"
    shown = _shown(verdicts)
    samples = run_samples(run)
    return Row(
        test=f"{run.test_id}{label}",
        note=SYNTHETIC_NOTE if run.data.kind == "synthetic" else "",
        device=str(run.workload.get("device", "-")),
        executors=str(run.workload.get("executors", "-")),
        runtime=_runtime_text(samples["runtime_seconds"], shown.confidence if shown else 0.95),
        change=_change_text(shown),
        change_interval=_interval_text(shown),
        images_per_second=_mean_text(samples["images_per_second"], "{:,.0f}"),
        accuracy=_mean_text(samples["accuracy_fraction"], "{:.2%}").replace("%", " %"),
        status=worst_status(verdicts) or "-",
    )


def worst_status(verdicts: Sequence[Verdict]) -> Status | None:
    """Return the status that needs attention most; None without verdicts."""
    return min((verdict.status for verdict in verdicts), key=SEVERITY.index, default=None)


def render_table(rows: Sequence[Row], width: int, *, colour: bool = False, encoding: str = "utf-8") -> list[str]:
    """Return the table's lines, each at most ``width`` columns wide (for widths from 80); nothing without rows."""
    if not rows:
        return []
    if not _can_encode("±", encoding):
        rows = [_in_ascii(row) for row in rows]
    for dropped in range(len(DROPPABLE) + 1):
        columns = _columns(set(DROPPABLE[:dropped]))
        figures = [_figures(row, columns) for row in rows]
        if not dropped and (lines := _one_line_each(rows, figures, columns, width, colour)):
            return lines
        if lines := _two_lines_each(rows, figures, columns, width, colour):
            return lines
    return _two_lines_each(rows, figures, columns, width, colour, cut=True)


def phase_lines(run: RunRecord) -> list[str]:
    """Return one line saying where a run's time went: mean seconds of each phase and its share, zero phases left out.

    Means are over rounds and executors. Without rounds there is no line.
    """
    samples = run_samples(run)
    if not run.valid_rounds or any(f"{phase}_seconds" not in samples for phase in PHASES):
        return []
    means = {phase: sum(samples[f"{phase}_seconds"]) / len(run.valid_rounds) for phase in PHASES}
    total = sum(means.values())
    parts = [f"{name} {value:.1f} s ({value / total:.0%})" for name, value in means.items() if value > 0.0]
    label = "" if run.label == DEFAULT_LABEL else f" {run.label}"
    note = SYNTHETIC_NOTE if run.data.kind == "synthetic" else ""
    return [f"{run.test_id}{label}{note}: {', '.join(parts)}"] if parts else []


def _columns(dropped: set[str]) -> list[str]:
    """Return the columns behind the test's name; ``interval`` stands for the change together with its interval."""
    kept = [name for name in HEADERS[1:] if name not in dropped]
    return ["interval" if name == "vs baseline" and "interval" not in dropped else name for name in kept]


def _headers(columns: Sequence[str]) -> list[str]:
    return ["vs baseline" if name == "interval" else name for name in columns]


def _one_line_each(
    rows: Sequence[Row], figures: list[list[str]], columns: Sequence[str], width: int, colour: bool
) -> list[str]:
    """Return the header and one line per row; nothing when that needs more than ``width``."""
    table = [[row.test + row.note, *cells] for row, cells in zip(rows, figures, strict=True)]
    headers = [HEADERS[0], *_headers(columns)]
    widths = _widths([headers, *table])
    if _total(widths) > width:
        return []
    header = _line(headers, widths, left_count=2)
    return [header, "-" * len(header), *(_line(cells, widths, left_count=2, colour=colour) for cells in table)]


def _two_lines_each(
    rows: Sequence[Row],
    figures: list[list[str]],
    columns: Sequence[str],
    width: int,
    colour: bool,
    cut: bool = False,
) -> list[str]:
    """Return the header, then each test's name above its figures; nothing when these do not fit and may not be cut."""
    room = width - len(INDENT)
    headers = _headers(columns)
    widths = _widths([headers, *figures])
    while cut and _total(widths) > room:
        widths[widths.index(max(widths[:-1]))] -= 1  # No measured row is so wide; whatever is, keeps its status.
    if _total(widths) > room:
        return []
    left_count = int(columns[0] == "device")
    header = INDENT + _line(headers, widths, left_count=left_count)
    lines = [HEADERS[0], header, "-" * len(header)]
    for row, cells in zip(rows, figures, strict=True):
        lines.append(_cut(row.test, width - len(row.note)) + row.note)
        lines.append(INDENT + _line(cells, widths, left_count=left_count, colour=colour))
    return lines


def _line(cells: Sequence[str], widths: Sequence[int], *, left_count: int, colour: bool = False) -> str:
    """Return the cells padded: the first ``left_count`` and the status to the left, figures to the right."""
    *shown, status = (_cut(cell, width) for cell, width in zip(cells, widths, strict=True))
    padded = [
        cell.ljust(width) if index < left_count else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(shown, widths, strict=False))
    ]
    if colour and status in SEVERITY:
        status = f"\x1b[{COLOURS.get(status, '32')}m{status}\x1b[0m"
    return GAP.join([*padded, status])


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _figures(row: Row, columns: Sequence[str]) -> list[str]:
    cells = {
        "device": row.device,
        "executors": row.executors,
        "runtime": row.runtime,
        "vs baseline": row.change,
        "interval": f"{row.change} {row.change_interval}".rstrip(),
        "images/s": row.images_per_second,
        "accuracy": row.accuracy,
        "status": row.status,
    }
    return [cells[name] for name in columns]


def _widths(table: list[list[str]]) -> list[int]:
    return [max(len(line[column]) for line in table) for column in range(len(table[0]))]


def _cut(text: str, width: int) -> str:
    """Return ``text``, its beginning replaced by dots where it is too long: a test's own name stands at the end."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _in_ascii(row: Row) -> Row:
    """Return the row for a terminal that has no more than ASCII."""
    cells = {name: str(value).replace("±", "+-") for name, value in dataclasses.asdict(row).items()}
    return Row(**{name: cell.encode("ascii", "backslashreplace").decode("ascii") for name, cell in cells.items()})


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _shown(verdicts: Sequence[Verdict]) -> Verdict | None:
    """Return the verdict whose change is shown: the runtime's if there is one, else the first with a baseline."""
    compared = [verdict for verdict in verdicts if verdict.change is not None and verdict.baseline_count]
    return next((v for v in compared if v.metric == "runtime_seconds"), compared[0] if compared else None)


def _change_text(verdict: Verdict | None) -> str:
    if verdict is None or verdict.change is None:
        return "-"
    name = "" if verdict.metric == "runtime_seconds" else f" {SHORT_NAMES.get(verdict.metric, verdict.metric)}"
    unit = "pt" if unit_of(verdict.metric) == "fraction" else "%"
    return f"{_percent(verdict, verdict.change):+.1f} {unit}{name}"


def _interval_text(verdict: Verdict | None) -> str:
    if verdict is None or verdict.change_low is None or verdict.change_high is None:
        return ""
    return f"[{_percent(verdict, verdict.change_low):+.1f}, {_percent(verdict, verdict.change_high):+.1f}]"


def _percent(verdict: Verdict, change: float) -> float:
    return (change if unit_of(verdict.metric) == "fraction" else change - 1.0) * 100.0


def _runtime_text(values: Sequence[float], confidence: float) -> str:
    try:
        interval = stats.mean_interval(values, confidence=confidence)
    except NotMeasuredError:
        return "-"
    text = format_value(interval.estimate, "s")
    # The interval is of a geometric mean, so not symmetric; the larger half is the one to show.
    half = max(interval.high - interval.estimate, interval.estimate - interval.low)
    return f"{text} ±{half:.2g}" if interval.is_bounded else text


def _mean_text(values: Sequence[float], template: str) -> str:
    try:
        return template.format(stats.mean(values, scale="difference"))
    except NotMeasuredError:
        return "-"

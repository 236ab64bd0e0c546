"""What a session says about its stored baselines: replaced, stale, unused, vanished, and those it was better than."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sparkgauge.baselines import STALE_DAYS, Replacement, Stored, age_days, is_stale, stored_in
from sparkgauge.errors import BaselineError, ConfigurationError
from sparkgauge.gate import SHORT_NAMES
from sparkgauge.records import Verdict
from sparkgauge.report.baseline_text import age_text, replacement_lines, shown_path

if TYPE_CHECKING:
    from sparkgauge.session import GaugeSession

MOST_NOTES = 10
"""Lines of one kind; who needs more asks ``sparkgauge baselines list``."""

_SELECTING_OPTIONS = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "pyargs")
"""pytest's options that leave tests out, or name them otherwise than by path."""


@dataclass(frozen=True)
class Collected:
    """What a session collected; by default nothing is known of it, and nothing is called unused or vanished."""

    test_ids: frozenset[str] = frozenset()
    ours: frozenset[str] = frozenset()
    """Those that ask for a fixture of the plugin."""
    whole: tuple[str, ...] = ()
    """Files and folders, relative to the root, whose tests were all collected; ``.`` stands for the root itself."""

    def covers(self, test_id: str) -> bool:
        """Return whether the test would have been collected if it existed."""
        file = PurePosixPath(test_id.partition("::")[0])
        return any(PurePosixPath(one) in (file, *file.parents) for one in self.whole)


def collected_by(
    config: Any, test_ids: Sequence[str], ours: Sequence[str], stats: Mapping[str, Sequence[Any]]
) -> Collected:
    """Return what a pytest session collected; ``stats`` are its terminal reporter's.

    Nothing counts as collected whole where tests were deselected, left out by an option, or failed to import.
    """
    is_selection = any(getattr(config.option, name, None) for name in _SELECTING_OPTIONS)
    is_broken = any(getattr(report, "when", "collect") == "collect" for report in stats.get("error", ()))
    whole: list[str] = []
    if not (is_selection or is_broken or stats.get("deselected")):
        whole = [name for name in (_below_root(config, argument) for argument in config.args) if name]
    return Collected(frozenset(test_ids), frozenset(ours), tuple(whole))


def session_notes(session: GaugeSession, collected: Collected) -> list[str]:
    """Return the lines on the baselines of this session's hardware class and profile.

    A session that compares with another commit uses no stored baseline, and says nothing of them.
    """
    stored, broken = _stored(session)
    report = session.config.report_file
    notes = baseline_notes(
        stored=stored,
        verdicts=session.verdicts,
        outcomes=session.outcomes,
        replacements=session.replacements,
        collected=collected,
        now=datetime.datetime.now(datetime.timezone.utc),
        report_file=shown_path(report) if report else None,
    )
    return notes + [f"baseline unreadable: {error}" for error in broken]


def vanished_tests(session: GaugeSession, collected: Collected) -> list[str]:
    """Return the lines on baselines whose tests should have been collected and were not.

    What is not measured is no pass: the session fails, unless it records baselines or requires none.
    """
    config = session.config
    if not config.require_baseline or config.update is not None:
        return []
    used = {test_id for test_id, _, verdict in session.verdicts if verdict.baseline_file}
    return _limited("vanished", [_vanished_text(one) for one in _stored(session)[0] if _vanished(one, used, collected)])


def _stored(session: GaugeSession) -> tuple[list[Stored], list[BaselineError]]:
    """Return this machine's baselines of the session's profile, and what is wrong with others; none in comparisons
    with a commit, or where nothing was ever stored."""
    if session.opponent is not None or session.server is not None:
        return [], []
    try:
        stored, broken = stored_in(session.store.folder, hardware_class=session.environment.hardware_class)
    except ConfigurationError:  # no baseline was ever stored
        return [], []
    return [one for one in stored if one.baseline.profile == session.config.profile], broken


def baseline_notes(
    *,
    stored: Sequence[Stored],
    verdicts: Sequence[tuple[str, str, Verdict]],
    outcomes: Mapping[str, str],
    replacements: Sequence[Replacement],
    collected: Collected,
    now: datetime.datetime,
    report_file: str | None = None,
    stale_days: float = STALE_DAYS,
) -> list[str]:
    """Return the lines: what was replaced, and which baselines are stale, unused, vanished or worse than this run.

    A baseline is stale by its age, and only named where this session compared with it. It is unused when its test ran
    and compared nothing with it, and vanished when its test should have been collected and was not.
    """
    used = {test_id for test_id, _, verdict in verdicts if verdict.baseline_file}
    written = {one.path for one in replacements}
    lines = [line for one in replacements for line in replacement_lines(one)]
    rest = [one for one in stored if one.path not in written]
    lines += _limited("stale", [_stale_text(one, now) for one in rest if _stale(one, used, now, stale_days)])
    lines += _limited("unused", [_unused_text(one) for one in rest if _unused(one, used, outcomes, collected)])
    lines += _limited("vanished", [_vanished_text(one) for one in rest if _vanished(one, used, collected)])
    return lines + _limited("improved", _improved_texts(verdicts, report_file))


def _stale(one: Stored, used: set[str], now: datetime.datetime, stale_days: float) -> bool:
    return one.baseline.test_id in used and is_stale(one.baseline.approved, now, stale_days)


def _unused(one: Stored, used: set[str], outcomes: Mapping[str, str], collected: Collected) -> bool:
    test_id = one.baseline.test_id
    if test_id in used or test_id not in collected.test_ids:
        return False
    return test_id not in collected.ours or outcomes.get(test_id) == "passed"


def _vanished(one: Stored, used: set[str], collected: Collected) -> bool:
    test_id = one.baseline.test_id
    return test_id not in used and test_id not in collected.test_ids and collected.covers(test_id)


def _stale_text(one: Stored, now: datetime.datetime) -> str:
    approved = one.baseline.approved
    return f"{one.baseline.test_id}: approved {age_text(age_days(approved, now))} by {approved.who}; measure it again"


def _unused_text(one: Stored) -> str:
    return f"{one.baseline.test_id}: compares nothing with {shown_path(one.path)}; remove the file, or gate the test"


def _vanished_text(one: Stored) -> str:
    prune = "pytest --collect-only -q | sparkgauge baselines prune"
    return f"{one.baseline.test_id}: no such test any more, but {shown_path(one.path)}; {prune}"


def _improved_texts(verdicts: Sequence[tuple[str, str, Verdict]], report_file: str | None) -> list[str]:
    improved: dict[str, list[str]] = {}
    for test_id, _, verdict in verdicts:
        if verdict.status == "improved":
            improved.setdefault(test_id, []).append(SHORT_NAMES.get(verdict.metric, verdict.metric))
    source = shlex.quote(report_file) if report_file else "REPORT (written by --gauge-report REPORT)"
    return [
        f"{test_id}: {', '.join(dict.fromkeys(metrics))} better than the baseline; keep it: "
        f"sparkgauge baselines approve {shlex.quote(test_id)} --why REASON --from {source}"
        for test_id, metrics in improved.items()
    ]


def _limited(kind: str, texts: Sequence[str]) -> list[str]:
    lines = [f"baseline {kind}: {text}" for text in texts[:MOST_NOTES]]
    more = len(texts) - MOST_NOTES
    return [*lines, f"baseline {kind}: and {more} more"] if more > 0 else lines


def _below_root(config: Any, argument: str) -> str | None:
    """Return a command-line argument's path relative to the root; None for single tests and for other places."""
    if "::" in argument:
        return None
    path = Path(config.invocation_params.dir, argument).resolve()
    root = Path(config.rootpath).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

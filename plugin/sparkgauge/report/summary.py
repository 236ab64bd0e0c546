"""The section that ends a session's output: the table, where the time went, and what was stored."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparkgauge import selfcheck
from sparkgauge.records import RunRecord
from sparkgauge.report.baseline_notes import Collected, session_notes
from sparkgauge.report.gpu_lines import gpu_lines, price_lines
from sparkgauge.report.limit_lines import limit_lines, rank_lines
from sparkgauge.report.reference import has_both_devices, reference_table, text_lines
from sparkgauge.report.session_notes import family_lines, family_of, round_lines
from sparkgauge.report.table import Row, phase_lines, render_table, row_from
from sparkgauge.session import GaugeSession


def write_summary(reporter: Any, session: GaugeSession, *, verbose: bool, collected: Collected | None = None) -> None:
    """Write the section to ``reporter`` (pytest's terminal reporter); with ``verbose`` the phases of every run.

    ``collected`` tells which baselines this session could have used; without it none is called unused.
    """
    writer = reporter._tw
    rows = [row for run in session.runs for row in _rows(session, run)]
    encoding = getattr(writer._file, "encoding", None) or "utf-8"
    reporter.section("sparkgauge")
    for line in render_table(rows, writer.fullwidth, colour=writer.hasmarkup, encoding=encoding):
        reporter.write_line(line)
    regressed = {test for test, _, verdict in session.verdicts if verdict.status == "regressed"}
    explained = [run for run in session.runs if verbose or run.test_id in regressed]
    if explained:
        reporter.write_line("")
        reporter.write_line("where the time went (mean of rounds and executors):")
    for run in explained:
        ranks = [f"  {line}" for line in rank_lines(run)]
        for line in [*phase_lines(run), *ranks, *_other_side(session, run), *_where(session, run)]:
            reporter.write_line(f"  {line}")
    if limits := [line for run in session.runs for line in limit_lines(run)]:
        reporter.write_line("against the machine's ceilings:")
    for line in limits:
        reporter.write_line(f"  {line}")
    for line in [*family_lines(family_of(session.verdicts)), *round_lines(session.runs)]:
        reporter.write_line(line)
    for line in _gpu_section(session):
        reporter.write_line(line)
    for line in session.opponent.notes() if session.opponent is not None else ():
        reporter.write_line(line)
    for path in session.written:
        reporter.write_line(f"baseline written: {path}")
    for line in session_notes(session, collected or Collected()):
        reporter.write_line(line)
    if reporter.verbosity >= 0:
        reporter.write_line(selfcheck_line(session))


def _gpu_section(session: GaugeSession) -> list[str]:
    """Return what is said of GPUs, and of their price where both devices were measured or prices were given."""
    lines = [*gpu_lines(session.runs), *price_lines(session.runs, session.config.prices)]
    return [*lines, *text_lines(reference_table(session.runs))] if has_both_devices(session.runs) else lines


def selfcheck_line(session: GaugeSession) -> str:
    """Return what this machine's self-check says of the comparisons that this session made."""
    way: selfcheck.Way = "stored" if session.opponent is None else "paired"
    return selfcheck.quote_stored(session.environment.hardware_class, way)


def _rows(session: GaugeSession, run: RunRecord) -> list[Row]:
    """Return the table's entry of ``run`` and, with ``--gauge-against``, that of its other side."""
    own = row_from(run, _verdicts(session, run.test_id, run.label))
    opponent = session.opponent
    other = opponent.run_of(run) if opponent is not None else None
    if opponent is None or other is None:
        return [own]
    row = row_from(other, [])
    return [own, dataclasses.replace(row, test=f"{row.test} at {opponent.reference.name}")]


def _other_side(session: GaugeSession, run: RunRecord) -> list[str]:
    """Return where the time went compared with the other side of ``--gauge-against``."""
    if session.opponent is None or (other := session.opponent.run_of(run)) is None:
        return []
    from sparkgauge.against.explain import explanation

    return explanation(other, run, session.opponent.reference.name)


def _where(session: GaugeSession, run: RunRecord) -> list[str]:
    """Return where a regression against a stored baseline went; against a commit the other side's lines say it."""
    if session.opponent is not None:
        return []
    verdicts = _verdicts(session, run.test_id, run.label)
    return list(dict.fromkeys(f"  {verdict.where}" for verdict in verdicts if verdict.where))


def _verdicts(session: GaugeSession, test_id: str, label: str) -> list[Any]:
    """Return the verdicts of one training."""
    return [verdict for test, owner, verdict in session.verdicts if test == test_id and owner == label]

"""The section that ends a session's output: the table, where the time went, and what was stored."""

from __future__ import annotations

from typing import Any

from sparkgauge.report.table import phase_lines, render_table, row_from
from sparkgauge.session import GaugeSession


def write_summary(reporter: Any, session: GaugeSession, *, verbose: bool) -> None:
    """Write the section to ``reporter`` (pytest's terminal reporter); with ``verbose`` the phases of every run."""
    writer = reporter._tw
    rows = [row_from(run, _verdicts(session, run.test_id, run.label)) for run in session.runs]
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
        for line in phase_lines(run):
            reporter.write_line(f"  {line}")
    for path in session.written:
        reporter.write_line(f"baseline written: {path}")


def _verdicts(session: GaugeSession, test_id: str, label: str) -> list[Any]:
    """Return the verdicts of one training."""
    return [verdict for test, owner, verdict in session.verdicts if test == test_id and owner == label]

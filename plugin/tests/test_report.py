"""The table, the phase lines and the JSON report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge.errors import BaselineError
from sparkgauge.gate import Measurement, Policy, baseline_quantity, samples_of
from sparkgauge.records import (
    Approval,
    DataIdentity,
    Environment,
    ExecutorRecord,
    PhaseSeconds,
    Round,
    RunRecord,
    Status,
    Verdict,
)
from sparkgauge.report.run_json import REPORT_SCHEMA_VERSION, write_run_report
from sparkgauge.report.table import SEVERITY, Row, phase_lines, render_table, row_from, worst_status
from sparkgauge.store import baseline_of

PHASES = PhaseSeconds(launch=5.1, feed=0.2, compute=14.6, evaluate=0.1)


def make_run(factor: float = 1.0, kind: Any = "real", **fields: Any) -> RunRecord:
    """Return a run of three rounds of about 20 s times ``factor``."""
    executors = tuple(ExecutorRecord(rank, "localhost", PHASES, (0.1,), 10, 10, 3.0) for rank in (0, 1))
    rounds = tuple(
        Round(seed, (20.0 + seed / 10) * factor, 0.7412, 3912.0, executors, (), 0.1, "2026-11-22T00:00:00Z")
        for seed in (1, 2, 3)
    )
    data = DataIdentity("cifar10", kind, "ab", 50_000, 10_000)
    environment = Environment("linux-2c", "CPU", 2, 1, (), "Linux", {})
    workload = {"device": "cpu", "executors": 2}
    run = RunRecord("perf/test_tensorflow.py::test_quick", "trained", workload, "ci", data, environment, "abc", rounds)
    return dataclasses.replace(run, **fields)


def verdict_of(run: RunRecord, metric: str = "runtime_seconds") -> Verdict:
    """Return the verdict of ``run`` against the baseline made of an unchanged run."""
    baseline = baseline_of([make_run()], Approval("me", "now", "why"))
    quantity = baseline_quantity(baseline, metric, file="f", policy=Policy())
    measurement = Measurement(samples_of(run, metric))
    return measurement <= quantity if metric == "runtime_seconds" else measurement >= quantity


def test_a_wide_table_has_one_line_per_run() -> None:
    slow = make_run(1.25)
    rows = [row_from(make_run(), [verdict_of(make_run())]), row_from(slow, [verdict_of(slow)])]
    lines = render_table(rows, 200)
    assert len(lines) == 4
    assert lines[0].split() == [
        "test",
        "device",
        "executors",
        "runtime",
        "vs",
        "baseline",
        "images/s",
        "accuracy",
        "status",
    ]
    assert re.search(
        r"test_quick +cpu +2 +20\.20 s ±0\.25 +\+0\.0 % \[-1\.\d, \+1\.\d\] +3,912 +74\.12 %  match$", lines[2]
    )
    assert re.search(r"25\.25 s ±0\.31 +\+25\.0 % \[\+2\d\.\d, \+2\d\.\d\] +3,912 +74\.12 %  regressed$", lines[3])


def test_at_80_columns_the_name_has_its_own_line() -> None:
    lines = render_table([row_from(make_run(), [verdict_of(make_run())])], 80)
    assert lines[0] == "test"
    assert lines[3] == "perf/test_tensorflow.py::test_quick"
    assert lines[4].split()[:3] == ["cpu", "2", "20.20"]
    assert lines[4].endswith("match")


def test_columns_are_left_out_before_a_figure_is_cut() -> None:
    slow = make_run(123.456)
    row = dataclasses.replace(row_from(slow, [verdict_of(slow)]), runtime="1,234.5 s ±123.4", change="+12,345.6 %")
    for width, kept in ((80, True), (60, False), (52, False)):
        header, _, _, line = render_table([dataclasses.replace(row, test="test_a")], width)[1:]
        assert "1,234.5 s ±123.4" in line and "+12,345.6 %" in line and line.endswith("regressed")
        assert "..." not in line and len(line) <= width
        assert ("executors" in header) == kept
    wide = render_table([row_from(slow, [verdict_of(slow)])], 200)
    assert "images/s" in wide[0]


def test_synthetic_data_is_said_in_every_row_at_every_width() -> None:
    run = make_run(kind="synthetic", test_id="test_" + "x" * 300, label="gpu")
    for width in (80, 120, 200):
        lines = render_table([row_from(run, [])] * 3, width)
        named = [line for line in lines if line.endswith("x gpu (synthetic data)")]
        assert len(named) == 3
        assert all(line.startswith("...") for line in named)
    assert "(synthetic data)" in phase_lines(run)[0]


def test_other_labels_are_named_and_the_fixture_is_not() -> None:
    assert row_from(make_run(label="gpu"), []).test.endswith("test_quick gpu")
    assert row_from(make_run(), []).test.endswith("test_quick")


def test_what_was_not_measured_is_a_dash() -> None:
    row = row_from(make_run(rounds=(), workload={}), [])
    assert (row.device, row.executors, row.runtime, row.change, row.images_per_second) == ("-",) * 5
    assert (row.accuracy, row.status, row.change_interval) == ("-", "-", "")
    one = make_run()
    row = row_from(dataclasses.replace(one, rounds=one.rounds[:1]), [])
    assert row.runtime == "20.10 s"
    broken = dataclasses.replace(one.rounds[0], accuracy_fraction=math.nan, runtime_seconds=math.nan)
    row = row_from(dataclasses.replace(one, rounds=(broken,)), [])
    assert (row.runtime, row.accuracy) == ("-", "-")


def test_accuracy_changes_are_in_points_and_named() -> None:
    row = row_from(make_run(), [verdict_of(make_run(), "accuracy_fraction")])
    assert row.change == "+0.0 pt accuracy"
    both = [verdict_of(make_run(), "accuracy_fraction"), verdict_of(make_run(1.25))]
    row = row_from(make_run(1.25), both)
    assert (row.change, row.status) == ("+25.0 %", "regressed")


@pytest.mark.parametrize("worst", range(len(SEVERITY)))
def test_the_worst_status_is_shown(worst: int) -> None:
    verdicts = [dataclasses.replace(verdict_of(make_run()), status=status) for status in SEVERITY[worst:]]
    assert worst_status(verdicts[::-1]) == SEVERITY[worst]
    assert worst_status([]) is None


def test_every_status_has_a_severity() -> None:
    assert set(SEVERITY) == set(Status.__args__)  # type: ignore[attr-defined]


def test_plain_ascii_where_the_terminal_cannot_do_more() -> None:
    rows = [row_from(make_run(test_id="test_ü"), [verdict_of(make_run())])]
    for encoding in ("ascii", "no such encoding"):
        text = "\n".join(render_table(rows, 120, encoding=encoding))
        assert text.isascii()
        assert "+-0.25" in text
        assert "test_\\xfc" in text
    assert "±0.25" in "\n".join(render_table(rows, 120, encoding="latin-1"))


def test_colour_changes_nothing_but_the_status() -> None:
    slow = make_run(1.25)
    rows = [row_from(make_run(), [verdict_of(make_run())]), row_from(slow, [verdict_of(slow)]), row_from(slow, [])]
    for width in (80, 200):
        coloured = render_table(rows, width, colour=True)
        assert "\x1b[32mmatch\x1b[0m" in "".join(coloured)
        assert "\x1b[31mregressed\x1b[0m" in "".join(coloured)
        assert [re.sub(r"\x1b\[\d*m", "", line) for line in coloured] == render_table(rows, width)


def test_no_rows_no_table() -> None:
    assert render_table([], 100) == []


CELL = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
ROWS = st.lists(
    st.builds(Row, CELL, st.sampled_from(["", " (synthetic data)"]), *([CELL] * 7), st.sampled_from(SEVERITY)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(ROWS, st.integers(min_value=80, max_value=200), st.sampled_from(["utf-8", "ascii"]))
def test_every_line_fits(rows: list[Row], width: int, encoding: str) -> None:
    lines = render_table(rows, width, encoding=encoding)
    assert all(len(line) <= width for line in lines)
    text, statuses = "\n".join(lines), [row.status for row in rows]
    assert text.count("(synthetic data)") >= sum(bool(row.note) for row in rows)
    assert all(sum(line.endswith(status) for line in lines) >= statuses.count(status) for status in statuses)


def test_phases_are_mean_seconds_with_shares() -> None:
    expected = (
        "perf/test_tensorflow.py::test_quick: launch 5.1 s (26%), feed 0.2 s (1%), compute 14.6 s (73%), evaluate 0.1 s"
    )
    assert phase_lines(make_run())[0].startswith(expected)
    assert phase_lines(make_run(rounds=())) == []
    one = make_run().rounds[0]
    assert phase_lines(make_run(rounds=(dataclasses.replace(one, executors=()),))) == []
    still = dataclasses.replace(one.executors[0], phases=PhaseSeconds())
    assert phase_lines(make_run(rounds=(dataclasses.replace(one, executors=(still,)),))) == []


def test_report_holds_raw_rounds_and_verdicts(tmp_path: Path) -> None:
    run, path = make_run(), tmp_path / "out" / "report.json"
    write_run_report(path, [run], [(run.test_id, "trained", verdict_of(run))], {"version": "1", "folder": tmp_path})
    report = json.loads(path.read_text())
    assert report["schema"] == REPORT_SCHEMA_VERSION
    assert report["header"] == {"version": "1", "folder": str(tmp_path)}
    assert [one["runtime_seconds"] for one in report["runs"][0]["rounds"]] == [20.1, 20.2, 20.3]
    assert (report["verdicts"][0]["test_id"], report["verdicts"][0]["label"]) == (run.test_id, "trained")
    assert report["verdicts"][0]["status"] == "match"


def test_report_of_a_broken_run_is_still_written(tmp_path: Path) -> None:
    run = make_run()
    broken = dataclasses.replace(run, rounds=(dataclasses.replace(run.rounds[0], accuracy_fraction=math.nan),))
    write_run_report(tmp_path / "report.json", [broken], [], {})
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["rounds"][0]["accuracy_fraction"] is None


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match="Cannot write the run report"):
        write_run_report(tmp_path / "file" / "report.json", [], [], {})

"""Baselines over time: generations, approvals out of a report, differences, age, vanished tests, session notes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin.tests import made_up
from plugin.tests.made_up import DATA, make_round
from plugin.tests.made_up import MACHINE as ENVIRONMENT
from sparkgauge import baselines
from sparkgauge.baselines import Report, Stored
from sparkgauge.errors import BaselineError, ConfigurationError
from sparkgauge.gate import Measurement, Policy, baseline_quantity, judge_number, samples_of
from sparkgauge.records import (
    Approval,
    Baseline,
    RunRecord,
    Verdict,
    from_json,
    to_json,
)
from sparkgauge.report import baseline_text
from sparkgauge.report.baseline_notes import Collected, baseline_notes, collected_by
from sparkgauge.report.run_json import write_run_report
from sparkgauge.store import LONGEST_HISTORY, BaselineStore, baseline_of, generations, parse, superseding, with_missing

TEST_ID = "perf/test_a.py::test_quick"
NOW = datetime.datetime(2026, 7, 1, tzinfo=datetime.timezone.utc)
RECENT = Approval("me", "2026-06-30T00:00:00+00:00", "first")


def make_run(factor: float = 1.0, rounds: int = 4, **fields: Any) -> RunRecord:
    """Return a run whose rounds take about 10 s times ``factor``."""
    taken = [
        make_round(
            seed,
            (10.0 + seed / 10) * factor,
            accuracy_fraction=0.70 + seed / 1000,
            launch=1.0,
            compute=8.0 * factor,
            evaluate=1.0,
        )
        for seed in range(1, rounds + 1)
    ]
    return made_up.make_run(*taken, **{"rounds": tuple(taken), **fields})


def make_baseline(factor: float = 1.0, approved: Approval = RECENT, **fields: Any) -> Baseline:
    return baseline_of([make_run(factor, **fields)], approved)


def aged(days: float) -> Approval:
    return Approval("me", (NOW - datetime.timedelta(days=days)).isoformat(), "why")


def with_generations(*factors: float) -> Baseline:
    """Return a baseline whose generations have these factors, oldest first."""
    baseline = None
    for number, factor in enumerate(factors, 1):
        fresh = make_baseline(
            factor, Approval("me", f"2026-01-{number % 28 + 1:02}T00:00:00+00:00", f"number {number}")
        )
        baseline = superseding(baseline, fresh)
    assert baseline is not None
    return baseline


def store_with(tmp_path: Path, *baselines: Baseline) -> BaselineStore:
    store = BaselineStore(tmp_path / "baselines")
    for one in baselines:
        store.write(path_of(store, one), one)
    return store


def path_of(store: BaselineStore, one: Baseline | RunRecord) -> Path:
    return store.path_for(one.test_id, hardware_class=one.environment.hardware_class, profile=one.profile)


def verdict_of(run: RunRecord, baseline: Baseline | None, file: str = "f.json", **policy: Any) -> Verdict:
    quantity = baseline_quantity(baseline, "runtime_seconds", file=file, policy=Policy(**policy))
    return Measurement(samples_of(run, "runtime_seconds")) <= quantity


def report_of(*runs: RunRecord, outcome: str | None = "passed", verdicts: tuple[Verdict, ...] = ()) -> Report:
    listed = tuple({"test_id": TEST_ID, **to_json(verdict)} for verdict in verdicts)
    return Report("report.json", runs, listed, {TEST_ID: outcome} if outcome else {})


# generations


def test_an_update_keeps_the_old_generation() -> None:
    old, new = make_baseline(1.0), make_baseline(0.9)
    both = superseding(old, new)
    assert (both.samples, both.approved) == (new.samples, new.approved)
    (past,) = both.history
    assert (past.approved, past.commit, past.seeds) == (old.approved, old.commit, old.seeds)
    assert (past.samples, past.software) == (old.samples, ENVIRONMENT.software)
    assert generations(both) == [
        dataclasses.replace(old, samples=dict(sorted(old.samples.items())), executors={}),
        dataclasses.replace(new, history=()),
    ]
    assert superseding(None, new) is new


@pytest.mark.parametrize("count", [LONGEST_HISTORY, LONGEST_HISTORY + 1, LONGEST_HISTORY + 2])
def test_the_history_is_bounded(count: int) -> None:
    baseline = with_generations(*[1.0] * count)
    assert len(baseline.history) == min(count - 1, LONGEST_HISTORY)
    assert baseline.history[-1].approved.why == f"number {count - 1}"
    assert baseline.history[0].approved.why == f"number {max(1, count - LONGEST_HISTORY)}"


def test_history_survives_the_file(tmp_path: Path) -> None:
    baseline = with_generations(1.0, 1.1, 0.9)
    store = store_with(tmp_path, baseline)
    assert store.read(path_of(store, baseline)) == dataclasses.replace(
        baseline, samples=dict(sorted(baseline.samples.items()))
    )


def test_files_without_a_history_are_read() -> None:
    content = to_json(make_baseline())
    del content["history"]
    assert parse(json.dumps(content).encode(), where="f").history == ()


def test_new_samples_do_not_touch_the_history() -> None:
    stored = with_generations(1.0, 1.1)
    assert with_missing(stored, make_baseline()).history == stored.history


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("samples", {}, r"history\[0\].samples"),
        ("samples", {"runtime_seconds": []}, r"history\[0\].samples.runtime_seconds"),
        ("samples", {"runtime_seconds": [0]}, "above 0"),
        ("samples", {"accuracy_fraction": [1.1]}, "from 0 to 1"),
        ("approved", {"who": "me"}, r"history\[0\].approved.when"),
        ("seeds", "1", "a list"),
        ("other", 1, "only the fields"),
    ],
)
def test_a_bad_past_is_refused_by_its_field(field: str, value: Any, match: str) -> None:
    content = to_json(with_generations(1.0, 1.1))
    content["history"][0][field] = value
    with pytest.raises(BaselineError, match=match):
        parse(json.dumps(content).encode(), where="f")


def test_a_history_too_large_for_the_file_loses_its_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = with_generations(*[1.0] * 10)
    monkeypatch.setattr("sparkgauge.store.LARGEST_BYTES", 8000)
    store = store_with(tmp_path, baseline)
    read = store.read(path_of(store, baseline))
    assert read is not None and 0 < len(read.history) < 9
    assert read.history == baseline.history[-len(read.history) :]
    monkeypatch.setattr("sparkgauge.store.LARGEST_BYTES", 500)
    with pytest.raises(BaselineError, match="at most 500 bytes"):
        store.write(tmp_path / "other.json", baseline)
    assert not (tmp_path / "other.json").exists()


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(BaselineError, match="levels of nesting"):
        BaselineStore(tmp_path).write(tmp_path / "f.json", make_baseline(workload={"options": deep}))


# names and ages


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("a.py::test_x[1]", ["a.py::test_x[1]"]),
        ("test_x", ["a.py::test_x[1]", "a.py::test_x[2]", "b.py::test_x"]),
        ("test_x[2]", ["a.py::test_x[2]"]),
        ("b.py::*", ["b.py::test_x"]),
        ("*", ["a.py::test_x[1]", "a.py::test_x[2]", "b.py::test_x"]),
        ("test_", []),
        ("", []),
    ],
)
def test_names(wanted: str, expected: list[str]) -> None:
    assert baselines.matching(["b.py::test_x", "a.py::test_x[1]", "a.py::test_x[2]"], wanted) == expected


@given(st.text(min_size=1, max_size=30))
def test_every_id_names_itself(test_id: str) -> None:
    assert baselines.matching([test_id, "other::x"], test_id) == [test_id]


@pytest.mark.parametrize(("days", "stale"), [(89.9, False), (90.0, False), (90.1, True)])
def test_staleness(days: float, stale: bool) -> None:
    assert baselines.is_stale(aged(days), NOW) is stale
    assert baselines.age_days(aged(days), NOW) == pytest.approx(days)


def test_ages_in_other_spellings() -> None:
    assert baselines.age_days(Approval("a", "2026-06-30T00:00:00Z", ""), NOW) == 1.0
    assert baselines.age_days(Approval("a", "2026-06-30T00:00:00", ""), NOW) == 1.0
    unknown = Approval("a", "last week", "")
    assert baselines.age_days(unknown, NOW) is None and baselines.is_stale(unknown, NOW)
    assert [baseline_text.age_text(days) for days in (None, -1.0, 0.5, 1.0, 2.9)] == [
        "at an unknown time",
        "today",
        "today",
        "1 day ago",
        "2 days ago",
    ]


@pytest.mark.parametrize("why", ["", "   ", "\n"])
def test_an_approval_needs_a_reason(why: str) -> None:
    with pytest.raises(ConfigurationError, match="needs a reason"):
        baselines.approval(why)


def test_an_approval_says_who_and_when() -> None:
    approved = baselines.approval("  faster\n input ")
    assert approved.why == "faster input" and approved.who
    assert datetime.datetime.fromisoformat(approved.when).tzinfo is not None


# approving


def test_approve_writes_the_next_generation(tmp_path: Path) -> None:
    store = store_with(tmp_path, make_baseline(1.0))
    run = make_run(1.3)
    report = report_of(run, outcome="failed", verdicts=(verdict_of(run, make_baseline(1.0)),))
    (one,) = baselines.approve(store, report, [TEST_ID, TEST_ID], baselines.approval("intended"))
    read = store.read(one.path)
    assert read is not None
    assert read.samples["runtime_seconds"] == tuple(r.runtime_seconds for r in run.rounds)
    assert read.approved.why == "intended" and [past.approved for past in read.history] == [RECENT]
    lines = baseline_text.replacement_lines(one)
    assert lines[0] == f"baseline replaced: {TEST_ID} (ci)"
    assert lines[1].startswith("  runtime: 10.25 s [10.05 s, 10.46 s] -> 13.32 s [") and "+30.0 % [" in lines[1]
    assert len(lines) == 2  # the accuracy is the same


def test_approve_stores_a_first_baseline_with_its_speedups(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path)
    report = dataclasses.replace(report_of(make_run()), speedups={TEST_ID: {"speedup_ratio": (1.5, 1.6)}})
    (one,) = baselines.approve(store, report, [TEST_ID], baselines.approval("first"))
    assert one.old is None and one.new.samples["speedup_ratio"] == (1.5, 1.6) and one.new.history == ()
    assert baseline_text.replacement_lines(one)[0].startswith("baseline new")


FIXED = judge_number(Measurement(samples_of(make_run(), "runtime_seconds")), 5.0)


@pytest.mark.parametrize(
    ("report", "match", "can_be_forced"),
    [
        (report_of(make_run(injections={"compute": 0.3})), "slowed down on purpose", False),
        (report_of(make_run(rounds=0)), "without a finished round", False),
        (report_of(make_run(), outcome="error"), "error that is no failed comparison", True),
        (report_of(make_run(), outcome=None), "did not finish", True),
        (report_of(make_run(), outcome="failed"), "not by a comparison", True),
        (report_of(make_run(), outcome="failed", verdicts=(FIXED,)), "fixed limit of runtime_seconds", True),
        (report_of(make_run(rounds=1)), "has 1 round", True),
        (report_of(make_run(workload={"model": "other"})), "other workload .model.", True),
        (report_of(make_run(data=dataclasses.replace(DATA, kind="synthetic"))), "other data", True),
    ],
)
def test_refusals(tmp_path: Path, report: Report, match: str, can_be_forced: bool) -> None:

    store = store_with(tmp_path, make_baseline())
    path = path_of(store, report.runs[0])
    before = path.read_bytes()
    with pytest.raises(BaselineError, match=match) as caught:
        baselines.approve(store, report, [TEST_ID], RECENT)
    assert "Nothing was written" in str(caught.value)
    assert path.read_bytes() == before
    if can_be_forced:
        assert "--force approves" in str(caught.value)
        baselines.approve(store, report, [TEST_ID], RECENT, force=True)
        assert path.read_bytes() != before
    else:
        with pytest.raises(BaselineError, match="--force cannot help"):
            baselines.approve(store, report, [TEST_ID], RECENT, force=True)
        assert path.read_bytes() == before


def test_one_refused_test_stops_all(tmp_path: Path) -> None:
    other = make_run(test_id="perf/test_a.py::test_other")
    report = dataclasses.replace(report_of(make_run(), other), outcomes={TEST_ID: "passed"})
    with pytest.raises(BaselineError, match="test_other did not finish"):
        baselines.approve(BaselineStore(tmp_path), report, [TEST_ID, other.test_id], RECENT)
    assert not list(tmp_path.iterdir())


def test_an_unreadable_old_file(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path)
    path = path_of(store, make_run())
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(BaselineError, match="history is lost"):
        baselines.approve(store, report_of(make_run()), [TEST_ID], RECENT)
    (one,) = baselines.approve(store, report_of(make_run()), [TEST_ID], RECENT, force=True)
    assert store.read(path) is not None
    assert "history is lost" in baseline_text.replacement_lines(one)[0]


def test_a_test_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no run of this test"):
        baselines.approve(BaselineStore(tmp_path), report_of(make_run()), ["x.py::y"], RECENT)


# reports


def test_a_written_report_is_read(tmp_path: Path) -> None:
    run = make_run()
    verdict = verdict_of(run, make_baseline())
    write_run_report(
        tmp_path / "r.json",
        [run],
        [(TEST_ID, "trained", verdict)],
        {},
        outcomes={TEST_ID: "passed"},
        speedups={TEST_ID: {"speedup_ratio": (1.5,)}},
    )
    report = baselines.read_report(tmp_path / "r.json")
    assert report.runs == (run,)
    assert (report.outcomes, report.speedups) == ({TEST_ID: "passed"}, {TEST_ID: {"speedup_ratio": (1.5,)}})
    assert report.verdicts[0]["status"] == "match"
    assert baselines.refusals(report, TEST_ID, None) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "JSON in UTF-8"),
        ("[]", "an object with runs"),
        ('{"runs": 1}', "an object with runs"),
        ('{"runs": [], "schema": 99}', "schema 1"),
        ('{"runs": [{}], "schema": 1}', r"report.runs\[0\].test_id"),
        ('{"runs": [], "schema": 1, "outcomes": []}', "report.outcomes"),
        ('{"runs": [], "schema": 1, "verdicts": [1]}', r"report.verdicts\[0\]"),
        ('{"runs": [], "schema": 1, "speedups": {"a": {"b": [null]}}}', r"report.speedups.a.b\[0\]"),
        ('{"runs": [], "runs": [], "schema": 1}', "twice"),
        ('{"runs": [NaN], "schema": 1}', "NaN"),
    ],
)
def test_bad_reports(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(BaselineError, match=match) as caught:
        baselines.read_report(tmp_path / "r.json")
    assert str(caught.value).startswith("Unreadable report")
    assert "r.json" in str(caught.value) and "--gauge-report" in str(caught.value)


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="No such file"):
        baselines.read_report(tmp_path / "r.json")


def test_a_round_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    run = make_run()
    broken = dataclasses.replace(run.rounds[0], runtime_seconds=float("nan"))
    write_run_report(tmp_path / "r.json", [dataclasses.replace(run, rounds=(broken,))], [], {})
    with pytest.raises(BaselineError, match="runtime_seconds"):
        baselines.read_report(tmp_path / "r.json")


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_report_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    with pytest.raises(BaselineError):
        baselines.read_report(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    where=st.sampled_from(["history", "approved", "commit", "workload", "data", "software", "seeds", "samples"]),
    value=json_values,
)
@settings(max_examples=150, deadline=None)
def test_any_history_is_valid_or_one_error(where: str, value: Any) -> None:
    content = to_json(with_generations(1.0, 1.1))
    if where == "history":
        content["history"] = value
    else:
        content["history"][0][where] = value
    try:
        read = parse(json.dumps(content).encode(), where="f")
    except BaselineError as error:
        assert str(error)
    else:
        assert from_json(Baseline, to_json(read)) == read
        assert baseline_text.show_lines(Stored(Path("f"), read), NOW)


# differences


def test_changes_have_intervals_and_a_direction() -> None:
    found = {one.key: one for one in baselines.changes(make_baseline(1.0), make_baseline(1.2))}
    runtime = found["runtime_seconds"]
    assert runtime.change is not None and runtime.is_shown
    assert runtime.change.low < 1.2 < runtime.change.high
    accuracy = found["accuracy_fraction"]
    assert accuracy.change is not None and accuracy.change.estimate == 0.0 and not accuracy.is_shown
    assert found["feed_seconds"].change is None and "samples of 0" in found["feed_seconds"].note


def test_metrics_on_one_side_only() -> None:
    old = make_baseline()
    more = dataclasses.replace(old, samples={**old.samples, "speedup_ratio": (1.5, 1.6)})
    assert {c.note for c in baselines.changes(old, more) if c.key == "speedup_ratio"} == {"only in the new one"}
    assert {c.note for c in baselines.changes(more, old) if c.key == "speedup_ratio"} == {"only in the old one"}


def test_accuracies_of_other_seeds_too_are_compared_on_the_common_ones() -> None:
    fewer = dataclasses.replace(make_baseline(rounds=2), seeds=(1, 2))
    found = {one.key: one for one in baselines.changes(fewer, make_baseline(rounds=4))}
    assert found["accuracy_fraction"].note == "on the 2 seeds of both"
    assert "points [+0.00, +0.00] on the 2 seeds of both" in baseline_text.change_text(found["accuracy_fraction"])
    assert found["runtime_seconds"].note == ""
    same = {one.key: one for one in baselines.changes(make_baseline(), make_baseline())}
    assert same["accuracy_fraction"].note == ""


def test_one_round_has_a_change_without_interval() -> None:
    (change,) = [
        c for c in baselines.changes(make_baseline(rounds=1), make_baseline(1.2)) if c.key == "runtime_seconds"
    ]
    assert change.change is not None and not change.change.is_bounded and not change.is_shown
    assert "[no interval]" in baseline_text.change_text(change)


@given(st.floats(0.5, 2.0))
@settings(max_examples=30, deadline=None)
def test_swapped_sides_mirror_the_change(factor: float) -> None:
    there, back = make_baseline(1.0), make_baseline(factor)
    pairs = zip(baselines.changes(there, back), baselines.changes(back, there), strict=True)
    for forward, backward in pairs:
        assert forward.is_shown == backward.is_shown
        if forward.change and backward.change and forward.key == "runtime_seconds":
            assert forward.change.estimate * backward.change.estimate == pytest.approx(1.0)


def test_what_else_differs() -> None:
    old = make_baseline()
    environment = dataclasses.replace(ENVIRONMENT, software={"python": "3.12", "keras": "3"}, cores=4)
    new = dataclasses.replace(old, environment=environment, workload={"model": "big"}, commit="")
    assert baselines.differences(old, new) == [
        ("commit", "abc", "none"),
        ("cores", "2", "4"),
        ("python", "3.11", "3.12"),
        ("spark", "4.0", "nothing"),
        ("workload model", '"quick"', '"big"'),
        ("keras", "nothing", "3"),
    ]
    assert baselines.differences(old, old) == []


def test_diff_as_text_and_json() -> None:
    old, new = make_baseline(1.0), make_baseline(1.2)
    lines = baseline_text.diff_lines(old, new, ("a.json", "b.json"))
    assert lines[:2] == ["old: a.json", "new: b.json"] and lines[-1] == "nothing else differs"
    assert any("runtime" in line and "+20.0 % [" in line for line in lines)
    assert any("accuracy" in line and "(no change shown)" in line for line in lines)
    value = json.loads(json.dumps(baseline_text.diff_json(old, new)))
    assert value["metrics"]["runtime_seconds"]["changed"] is True
    assert value["metrics"]["feed_seconds"]["change"]["estimate"] is None
    assert value["differences"] == {}


# listing and pruning


def test_stored_in_finds_all_and_names_the_broken(tmp_path: Path) -> None:
    other = make_baseline(environment=dataclasses.replace(ENVIRONMENT, hardware_class="mac"))
    store = store_with(tmp_path, make_baseline(), other)
    (store.folder / "mac" / "broken.json").write_text("{")
    (store.folder / "mac" / "notes.txt").write_text("")
    found, broken = baselines.stored_in(store.folder)
    assert [one.baseline.environment.hardware_class for one in found] == ["linux-2c", "mac"]
    assert len(broken) == 1 and "broken.json" in str(broken[0])
    assert len(baselines.stored_in(store.folder, hardware_class="mac")[0]) == 1
    with pytest.raises(ConfigurationError, match="No baselines folder"):
        baselines.stored_in(tmp_path / "nowhere")


LISTING = "perf/test_a.py::test_quick\nperf/test_a.py::test_b[x y]\n\n2 tests collected in 0.01s\n"


def test_a_listing() -> None:
    expected = {"perf/test_a.py::test_quick", "perf/test_a.py::test_b[x y]"}
    assert baselines.parse_listing(LISTING) == expected
    assert baselines.parse_listing("\n".join(expected)) == expected  # a plain list of ids
    assert baselines.parse_listing("a.py::b\n\n========= 1 test collected in 0.1s =========\n") == {"a.py::b"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no tests"),
        ("perf/test_a.py: 3\n", "no tests"),
        ("no tests collected in 0.01s\n", "not complete"),
        ("a.py::b\n\n1/2 tests collected (1 deselected) in 0.01s\n", "deselected"),
        ("a.py::b\nERROR b.py - ImportError: c::d\n\n1 test collected, 1 error in 0.1s", "ERROR b.py"),
        ("a.py::b\n1 test collected, 1 error in 0.1s", "1 error"),
        ("a.py::b\n3 tests collected in 0.1s", "is cut"),
    ],
)
def test_a_listing_that_would_remove_too_much(text: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        baselines.parse_listing(text)


def test_vanished_tests(tmp_path: Path) -> None:
    (tmp_path / "perf").mkdir()
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / "perf" / name).write_text("")
    ids = [
        "perf/test_a.py::test_quick",
        "perf/test_a.py::test_gone",
        "perf/test_b.py::test_b",
        "perf/test_c.py::test_c",
    ]
    stored = [Stored(Path(test_id), make_baseline(test_id=test_id)) for test_id in ids]
    gone, unknown = baselines.vanished(stored, {ids[0]}, tmp_path)
    assert [one.baseline.test_id for one in gone] == [ids[1], ids[3]]
    assert [one.baseline.test_id for one in unknown] == [ids[2]]
    gone, unknown = baselines.vanished(stored, {ids[0]}, tmp_path, complete=True)
    assert (len(gone), unknown) == (3, [])


def test_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path, make_baseline(), make_baseline(profile="full"))
    found, _ = baselines.stored_in(store.folder)
    baselines.remove(found[:1])
    assert not found[0].path.exists() and found[1].path.exists()
    baselines.remove(found)  # gone already, or not
    assert not found[1].path.parent.exists()

    def refuse(self: Path, **keywords: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(BaselineError, match="Permission denied"):
        baselines.remove(found)


# text


def test_list_lines_and_json() -> None:
    old = dataclasses.replace(with_generations(1.0, 1.1), approved=aged(200))
    stored = [Stored(Path("a.json"), make_baseline(approved=aged(1))), Stored(Path("b.json"), old)]
    lines = baseline_text.list_lines(stored, NOW)
    assert lines[0] == "linux-2c:"
    assert lines[1] == f"  {TEST_ID} (ci), 2026-06-30 (1 day ago) by me"
    assert lines[2] == "    runtime   10.25 s [10.05 s, 10.46 s]  n = 4"
    assert lines[4].endswith("(200 days ago) by me, 1 earlier generation, STALE")
    rows = json.loads(json.dumps(baseline_text.list_json(stored, NOW)))
    assert [row["stale"] for row in rows] == [False, True]
    assert (rows[1]["generations"], rows[0]["quantities"]["runtime_seconds"]["count"]) == (2, 4)


def test_show_lines() -> None:
    baseline = make_baseline()
    labelled = dataclasses.replace(
        baseline, samples={"gpu.runtime_seconds": tuple(float(i) for i in range(1, 15)), "gpu.compute_seconds": (1.0,)}
    )
    text = "\n".join(baseline_text.show_lines(Stored(Path("a.json"), baseline), NOW))
    for part in (
        "approved: 2026-06-30",
        ": first",
        "commit: abc",
        "real cifar10",
        "python 3.11",
        "model=quick",
        "1, 2, 3",
    ):
        assert part in text
    assert "phases: launch 1.00 s (10%), compute 8.00 s (80%), evaluate 1.00 s (10%)" in text
    assert "history: none" in text
    text = "\n".join(baseline_text.show_lines(Stored(Path("a.json"), labelled), NOW))
    assert "gpu.runtime" in text and "(2 more)" in text and "phases of gpu: compute" in text
    own = dataclasses.replace(baseline, samples={"loss": (0.0, 1.0)})
    assert sum("loss" in line for line in baseline_text.show_lines(Stored(Path("a.json"), own), NOW)) == 1


def test_history_names_the_change_point() -> None:
    level = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01)
    lines = baseline_text.history_lines(with_generations(*level, *(1.2 * factor for factor in level)))
    assert lines[0] == "  history: 16 generations, oldest first"
    assert sum("number" in line for line in lines) == 2 * 16  # runtime and accuracy
    (point,) = [line for line in lines if "change point:" in line]
    assert "2026-01-10" in point and "+20.0 %" in point
    assert any("change points: none in 16 generations" in line for line in lines)


@pytest.mark.parametrize(("count", "told"), [(9, False), (10, True), (11, True)])
def test_fewest_generations_are_those_that_can_tell(count: int, told: bool) -> None:
    factors = [(1.0 if i < count // 2 else 1.5) * (1 + i / 1000) for i in range(count)]
    text = "\n".join(baseline_text.trend_lines(with_generations(*factors), "runtime_seconds"))
    assert ("change point:" in text) is told and ("too few to tell" in text) is not told


def test_no_change_point_is_sought_without_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("sparkgauge.stats.change_points")
    assert any("not sought" in line for line in baseline_text.history_lines(with_generations(1.0, 1.1)))


def test_generations_of_other_work_are_no_step() -> None:
    baseline = superseding(make_baseline(workload={"model": "other"}), make_baseline(1.1))
    text = "\n".join(baseline_text.history_lines(baseline))
    assert "other data or workload" in text and "none in 1 generations (too few to tell)" in text


# a session's notes


def notes(**parts: Any) -> list[str]:
    defaults: dict[str, Any] = {
        "stored": [],
        "verdicts": [],
        "outcomes": {},
        "replacements": [],
        "collected": Collected(),
        "now": NOW,
    }
    return baseline_notes(**{**defaults, **parts})


def stored(test_id: str = TEST_ID, days: float = 1.0) -> Stored:
    return Stored(Path("baselines/f.json"), make_baseline(approved=aged(days), test_id=test_id))


COMPARED = [(TEST_ID, "trained", verdict_of(make_run(), make_baseline()))]


def test_nothing_to_say() -> None:
    assert notes(stored=[stored()], verdicts=COMPARED, outcomes={TEST_ID: "passed"}) == []


@pytest.mark.parametrize(("days", "said"), [(90.0, False), (91.0, True)])
def test_stale_is_said_of_what_was_used(days: float, said: bool) -> None:
    lines = notes(stored=[stored(days=days)], verdicts=COMPARED)
    assert lines == ([f"baseline stale: {TEST_ID}: approved 91 days ago by me; measure it again"] if said else [])
    assert notes(stored=[stored(days=days)]) == []


def test_unused() -> None:
    whole = Collected(frozenset({TEST_ID}), frozenset({TEST_ID}), (".",))
    assert "baseline unused" in notes(stored=[stored()], outcomes={TEST_ID: "passed"}, collected=whole)[0]
    for outcome in ("failed", "skipped", "error"):  # it may not have come as far as its comparison
        assert notes(stored=[stored()], outcomes={TEST_ID: outcome}, collected=whole) == []
    assert notes(stored=[stored()], collected=whole) == []  # it did not run
    not_ours = dataclasses.replace(whole, ours=frozenset())
    assert "baseline unused" in notes(stored=[stored()], collected=not_ours)[0]
    assert notes(stored=[stored()], verdicts=COMPARED, outcomes={TEST_ID: "passed"}, collected=whole) == []


@pytest.mark.parametrize(
    ("whole", "said"),
    [((".",), True), (("perf",), True), (("perf/test_a.py",), True), (("perf/test_b.py", "other"), False), ((), False)],
)
def test_vanished_is_said_where_it_would_have_been_collected(whole: tuple[str, ...], said: bool) -> None:
    collected = Collected(frozenset({"perf/test_b.py::test_b"}), frozenset(), whole)
    lines = notes(stored=[stored()], collected=collected)
    assert [line.split(":")[0] for line in lines] == (["baseline vanished"] if said else [])


def test_improved_suggests_the_command() -> None:
    run = make_run(0.5)
    verdicts = [(TEST_ID, "trained", verdict_of(run, make_baseline()))] * 2
    (line,) = notes(verdicts=verdicts, report_file="out/r.json")
    assert line == (
        f"baseline improved: {TEST_ID}: runtime better than the baseline; keep it: "
        f"sparkgauge baselines approve {TEST_ID} --why REASON --from out/r.json"
    )
    (line,) = notes(verdicts=verdicts)
    assert "--gauge-report REPORT" in line


def test_replaced_is_shown_and_not_called_stale(tmp_path: Path) -> None:
    one = stored(days=200)
    replacement = baselines.Replacement(one.path, one.baseline, make_baseline(0.8))
    lines = notes(stored=[one], verdicts=COMPARED, replacements=[replacement])
    assert lines[0] == f"baseline replaced: {TEST_ID} (ci)"
    assert "-> 8.200 s [" in lines[1] and "-20.0 % [" in lines[1] and len(lines) == 2


def test_long_lists_are_cut() -> None:
    many = [stored(f"perf/test_a.py::test_{i:02}") for i in range(12)]
    lines = notes(stored=many, collected=Collected(whole=(".",)))
    assert len(lines) == 11 and lines[-1] == "baseline vanished: and 2 more"


def collection(tmp_path: Path, *arguments: str, stats: dict[str, Any] | None = None, **option: Any) -> Collected:
    config = SimpleNamespace(
        option=SimpleNamespace(**option),
        args=list(arguments),
        rootpath=tmp_path,
        invocation_params=SimpleNamespace(dir=tmp_path),
    )
    return collected_by(config, ["a.py::b"], [], stats or {})


def test_what_counts_as_collected_whole(tmp_path: Path) -> None:
    assert collection(tmp_path, str(tmp_path)).whole == (".",)
    assert collection(tmp_path, "perf", "x/test_a.py").whole == ("perf", "x/test_a.py")
    assert collection(tmp_path, "perf/test_a.py::test_b", "/elsewhere").whole == ()
    for name in ("keyword", "markexpr", "deselect", "ignore", "lf"):
        assert collection(tmp_path, "perf", **{name: "something"}).whole == ()
        assert collection(tmp_path, "perf", **{name: ""}).whole == ("perf",)
    assert collection(tmp_path, "perf", stats={"deselected": ["one"]}).whole == ()
    assert collection(tmp_path, "perf", stats={"error": [SimpleNamespace(when="collect")]}).whole == ()
    assert collection(tmp_path, "perf", stats={"error": [SimpleNamespace(when="setup")]}).whole == ("perf",)


PLAYED = """
from pathlib import Path
from sparkgauge.records import DataIdentity, Environment, ExecutorRecord, PhaseSeconds, Round
from sparkgauge.session import GaugeSession, TestGauge

ENVIRONMENT = Environment("linux-2c", "CPU", 2, 8 << 30, (), "Linux", {})
DATA = DataIdentity("cifar10", "real", "ab" * 32, 50_000, 10_000)
FACTOR = float(Path("factor").read_text())

def run_round(self, workload, seed, index, planned):
    phases = PhaseSeconds(launch=1.0, compute=9.0)
    executors = (ExecutorRecord(0, "localhost", phases, (0.1,), 500, 50, 4.0),)
    return Round(seed, (10 + seed / 10) * FACTOR, 0.7, 1000.0, executors, (), 0.5, "2026-06-30T00:00:00Z")

class Data:
    identity, notice = DATA, ""

GaugeSession.run_round = run_round
GaugeSession.prepare = lambda self, workload: None
GaugeSession.time_reference = lambda self, workload: (0.1,)
GaugeSession.environment = ENVIRONMENT
GaugeSession.dataset = lambda self, source=None: Data()
TestGauge._check_installed = lambda self, workload: None
"""

TESTS = """
import pytest

@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", executors=1)
def test_gated(trained, baseline):
    assert trained.runtime <= baseline.runtime

@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", executors=1)
def test_limited(trained):
    assert trained.runtime <= 5.0
"""


def run_session(folder: Path, factor: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "factor").write_text(str(factor))
    is_installed = any(one.name == "sparkgauge" for one in metadata.entry_points(group="pytest11"))
    plugin = [] if is_installed else ["-p", "sparkgauge.plugin"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *plugin,
        "-p",
        "no:cacheprovider",
        "--gauge-report",
        "r.json",
        *arguments,
    ]
    environ = {key: value for key, value in os.environ.items() if key != "CI"}
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path if part)
    return subprocess.run(
        command, cwd=folder, env={**environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )


def test_a_baselines_life_from_session_to_session(tmp_path: Path) -> None:
    """The plugin's part: outcomes and speed-ups in the report, generations in the file, notes on the terminal."""
    (tmp_path / "conftest.py").write_text(PLAYED)
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    first = run_session(tmp_path, 1.0, "--gauge-update", "new")
    assert "baseline new: test_a.py::test_gated (ci)" in first.stdout, first.stdout + first.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["outcomes"] == {"test_a.py::test_gated": "passed", "test_a.py::test_limited": "failed"}

    again = run_session(tmp_path, 1.2, "--gauge-update", "all")
    assert "baseline replaced: test_a.py::test_gated (ci)" in again.stdout, again.stdout
    assert "+20.0 % [" in again.stdout
    file = tmp_path / "baselines/linux-2c/test_a__test_gated.ci.json"
    assert len(json.loads(file.read_text())["history"]) == 1

    better = run_session(tmp_path, 0.8, "test_a.py")
    assert "baseline improved: test_a.py::test_gated: runtime better" in better.stdout, better.stdout
    loaded = baselines.read_report(tmp_path / "r.json")
    store = BaselineStore(tmp_path / "baselines")
    with pytest.raises(BaselineError, match="test_limited failed a fixed limit"):
        baselines.approve(store, loaded, ["test_a.py::test_limited"], RECENT)
    baselines.approve(store, loaded, ["test_a.py::test_gated"], RECENT)
    assert len(json.loads(file.read_text())["history"]) == 2

    (tmp_path / "test_a.py").write_text(TESTS.replace("test_gated", "test_renamed"))
    renamed = run_session(tmp_path, 0.8)
    assert "baseline vanished: test_a.py::test_gated: no such test any more" in renamed.stdout, renamed.stdout
    selected = run_session(tmp_path, 0.8, "-k", "renamed")
    assert "vanished" not in selected.stdout

    file.write_text("{")
    lost = run_session(tmp_path, 0.8, "--gauge-update", "all")
    assert "baseline unreadable" in lost.stdout and "test_a__test_gated.ci.json" in lost.stdout

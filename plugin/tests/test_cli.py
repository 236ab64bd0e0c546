"""The command ``sparkgauge``: every command's output, exit status, and one line for each kind of bad input."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparkgauge
from plugin.tests import made_up
from plugin.tests.made_up import APPROVAL, make_round
from sparkgauge import cli, doctor
from sparkgauge.records import (
    Baseline,
    RunRecord,
)
from sparkgauge.report.run_json import write_run_report
from sparkgauge.store import BaselineStore, baseline_of, superseding

QUICK, BIG = "perf/test_a.py::test_quick", "perf/test_a.py::test_big[2]"


def make_run(test_id: str, factor: float = 1.0, profile: str = "ci") -> RunRecord:
    rounds = [make_round(seed, (10.0 + seed / 10) * factor, launch=1.0, compute=9.0 * factor) for seed in (1, 2, 3, 4)]
    return made_up.make_run(*rounds, test_id=test_id, profile=profile)


def make_baseline(test_id: str, factor: float = 1.0, profile: str = "ci") -> Baseline:
    return baseline_of([make_run(test_id, factor, profile)], APPROVAL)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaselineStore:
    """Return the store ``baselines`` of the current folder, which holds three baselines of two tests."""
    monkeypatch.chdir(tmp_path)
    store = BaselineStore(Path("baselines"))
    past = superseding(make_baseline(QUICK), make_baseline(QUICK, 1.2))
    for one in (past, make_baseline(BIG), make_baseline(BIG, 3.0, "full")):
        store.write(path_of(store, one), one)
    return store


def path_of(store: BaselineStore, one: Baseline | RunRecord) -> Path:
    return store.path_for(one.test_id, hardware_class="linux-2c", profile=one.profile)


def report(path: Path, *runs: RunRecord) -> Path:
    write_run_report(path, runs, [], {}, outcomes={run.test_id: "passed" for run in runs})
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on standard error of a command that must end with status 2 and print nothing else."""
    assert cli.main(arguments) == cli.REFUSED
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sparkgauge: error: ") and err.count("\n") == 1
    return err


def lines(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = cli.DONE) -> list[str]:
    assert cli.main(arguments) == status
    return capsys.readouterr().out.splitlines()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"sparkgauge {sparkgauge.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["baselines"],
        ["baselines", "nothing"],
        ["doctor", "--what"],
        ["baselines", "show"],
        ["baselines", "approve", "t"],
        ["baselines", "approve", "t", "--why", "x"],
        ["baselines", "approve", "--why", "x", "--from", "r.json"],
        ["baselines", "list", "--stale-days", "soon"],
        ["baselines", "list", "--stale-days", "-1"],
        ["baselines", "list", "--stale-days", "nan"],
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "error:" in err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["doctor", "--help"], *(["baselines", name, "--help"] for name in cli.BASELINE_COMMANDS)]
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0 and "usage: sparkgauge" in capsys.readouterr().out


def test_a_further_command_is_one_entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def declare(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--times", type=int)

    monkeypatch.setitem(cli.COMMANDS, "again", cli.Command("say it", declare, lambda options: int(options.times)))
    assert cli.main(["again", "--times", "5"]) == 5


def test_imports_stay_light() -> None:
    code = (
        "import sys; from sparkgauge import cli\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'scipy', 'pyspark', 'tensorflow', 'pytest', 'pooch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(part) for part in sys.path if part)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("worst", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], worst: doctor.CheckStatus, status: int
) -> None:
    asked: list[doctor.Machine] = []

    def examine(machine: doctor.Machine) -> list[doctor.Check]:
        asked.append(machine)
        return [doctor.Check("java", worst, "17", "why", "do")]

    monkeypatch.setattr(doctor, "examine", examine)
    assert lines(capsys, "doctor", "--data", "folder", status=status)[0] == f"{worst:4}  java  17"
    assert asked[0].data == "folder"
    assert json.loads("\n".join(lines(capsys, "doctor", "--json", status=status)))["status"] == worst


def test_list(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, "baselines", "list")
    assert found[0] == "linux-2c:"
    assert sum(line.startswith("  perf/") for line in found) == 3
    assert sum("1 earlier generation" in line for line in found) == 1
    assert sum("STALE" in line for line in lines(capsys, "baselines", "list", "--stale-days", "1e9")) == 0
    only = lines(capsys, "baselines", "list", "test_big", "--profile", "full")
    assert only[1].startswith(f"  {BIG} (full)") and len(only) == 4
    rows = json.loads("\n".join(lines(capsys, "baselines", "list", "--json")))
    assert {row["test_id"] for row in rows} == {QUICK, BIG}
    assert lines(capsys, "baselines", "list", "--hardware-class", "mac") == ["no baselines in baselines"]


def test_list_names_what_cannot_be_read_and_goes_on(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    (store.folder / "linux-2c" / "broken.json").write_text("{")
    assert cli.main(["baselines", "list"]) == cli.ATTENTION
    out, err = capsys.readouterr()
    assert QUICK in out and "broken.json" in err


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "nowhere")
    assert "No baselines folder" in refused(capsys, "baselines", "list", "--baselines", missing)
    (tmp_path / "nowhere").mkdir()
    assert lines(capsys, "baselines", "list", "--baselines", missing) == [f"no baselines in {missing}"]


def test_show(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = lines(capsys, "baselines", "show", "test_quick")
    by_file = lines(capsys, "baselines", "show", str(path_of(store, make_run(QUICK))))
    assert by_name == by_file
    assert any("history: 2 generations" in line for line in by_name)
    assert sum(line.startswith("perf/") for line in lines(capsys, "baselines", "show", "*")) == 3
    (value,) = json.loads("\n".join(lines(capsys, "baselines", "show", QUICK, "--json")))
    assert len(value["history"]) == 1 and len(value["samples"]["runtime_seconds"]) == 4


def test_show_of_nothing(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "baselines", "show", "test_other")
    assert "No such test" in error and QUICK in error
    assert "No such baseline file" in refused(capsys, "baselines", "show", "other.json")
    Path("bad.json").write_text("[]")
    assert "bad.json" in refused(capsys, "baselines", "show", "bad.json")


def test_diff_with_the_generation_before(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(capsys, "baselines", "diff", "test_quick")
    assert found[0].startswith("old: baselines/") and "approved 2026-06-30" in found[0]
    assert any("runtime" in line and "+20.0 % [" in line for line in found)
    value = json.loads("\n".join(lines(capsys, "baselines", "diff", "test_quick", "--json")))
    assert value["metrics"]["runtime_seconds"]["change"]["estimate"] == pytest.approx(1.2)
    assert "no earlier generation" in refused(capsys, "baselines", "diff", "test_big", "--profile", "ci")


def test_diff_of_two(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path_of(store, make_run(BIG, profile=profile))) for profile in ("ci", "full")]
    found = lines(capsys, "baselines", "diff", *files)
    assert any("runtime" in line and "+200.0 % [" in line for line in found)
    assert "  profile: ci -> full" in found
    assert "More than one baseline fits" in refused(capsys, "baselines", "diff", "test_big", "test_quick")


def test_approve(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(report(Path("r.json"), make_run(QUICK, 0.9), make_run(BIG, 0.9)))
    found = lines(capsys, "baselines", "approve", "test_quick", "--why", "new input pipeline", "--from", source)
    path = path_of(store, make_run(QUICK))
    assert found[0] == f"baseline replaced: {QUICK} (ci)" and found[-1] == f"  written: {path}"
    assert any("-> " in line and "-25.0 % [" in line for line in found)
    read = store.read(path)
    assert read is not None and read.approved.why == "new input pipeline" and len(read.history) == 2
    both = lines(capsys, "baselines", "approve", "*", "--why", "all", "--from", source)
    assert sum("written:" in line for line in both) == 2


@pytest.mark.parametrize("why", ["", "  "])
def test_approve_without_a_reason(store: BaselineStore, capsys: pytest.CaptureFixture[str], why: str) -> None:
    source = str(report(Path("r.json"), make_run(QUICK)))
    assert "needs a reason" in refused(capsys, "baselines", "approve", QUICK, "--why", why, "--from", source)


def test_approve_refuses(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("baselines", "approve", "test_quick", "--why", "x", "--from")
    assert "No such file" in refused(capsys, *arguments, "nowhere.json")
    Path("bad.json").write_text("{}")
    assert "Unreadable report" in refused(capsys, *arguments, "bad.json")
    assert "No such test" in refused(capsys, *arguments, str(report(Path("other.json"), make_run(BIG))))
    assert "No such test" in refused(capsys, *arguments, str(report(Path("empty.json"))))
    slowed = dataclasses.replace(make_run(QUICK), injections={"compute": 0.3})
    source = str(report(Path("slowed.json"), slowed))
    assert "slowed down on purpose" in refused(capsys, *arguments, source, "--force")
    once = dataclasses.replace(make_run(QUICK), rounds=make_run(QUICK).rounds[:1])
    source = str(report(Path("once.json"), once))
    assert "--force approves" in refused(capsys, *arguments, source)
    assert lines(capsys, *arguments, source, "--force")[-1].startswith("  written:")


def test_prune(store: BaselineStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    listing = f"{QUICK}\n\n1 test collected in 0.01s\n"
    Path("ids.txt").write_text(listing)
    before = sorted(store.folder.rglob("*.json"))
    found = lines(capsys, "baselines", "prune", "ids.txt")
    assert sum(line.startswith("would remove") for line in found) == 2
    assert found[-1] == "3 baselines, 2 without a test; nothing was removed; --yes removes them"
    assert sorted(store.folder.rglob("*.json")) == before
    monkeypatch.setattr(sys, "stdin", io.StringIO(listing))
    found = lines(capsys, "baselines", "prune", "--yes")
    assert sum(line.startswith("removed") for line in found) == 2 and found[-1].endswith("; done")
    assert [path.name for path in store.folder.rglob("*.json")] == [path_of(store, make_run(QUICK)).name]
    assert lines(capsys, "baselines", "prune", "ids.txt") == ["1 baseline, 0 without a test; done"]


def test_prune_keeps_what_the_listing_does_not_cover(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    Path("perf").mkdir()
    Path("perf/test_a.py").write_text("")
    Path("ids.txt").write_text("perf/test_b.py::test_other\n")
    found = lines(capsys, "baselines", "prune", "ids.txt", "--yes")
    assert sum(line.startswith("kept") for line in found) == 3
    found = lines(capsys, "baselines", "prune", "ids.txt", "--complete")
    assert sum(line.startswith("would remove") for line in found) == 3


def test_prune_refuses(store: BaselineStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Cannot read the listing" in refused(capsys, "baselines", "prune", "nowhere.txt")
    Path("ids.txt").write_bytes(b"\xff\xfe")
    assert "Cannot read the listing" in refused(capsys, "baselines", "prune", "ids.txt")
    Path("ids.txt").write_text("")
    assert "no tests" in refused(capsys, "baselines", "prune", "ids.txt", "--yes")
    assert len(list(store.folder.rglob("*.json"))) == 3


def test_a_reader_that_has_seen_enough(store: BaselineStore) -> None:
    path = os.pathsep.join(os.path.abspath(part) for part in sys.path if part)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "sparkgauge.cli", "baselines", "list"]
    with os.fdopen(write_end, "wb") as out:
        ended = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, timeout=60
        )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.Command("x", lambda parser: None, interrupt))
    assert cli.main(["doctor"]) == cli.INTERRUPTED
    assert capsys.readouterr() == ("", "")

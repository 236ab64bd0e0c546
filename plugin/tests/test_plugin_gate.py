"""The gate from the user's side: record, compare, slow down on purpose. Three sessions on real Spark, in this order.

They run the test and the commands of docs/getting-started.md, shortened by profile, beside tests of their own.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from plugin.tests.plugin_runs import Finished, Project

GATED = """
import time

import pytest
from sparkgauge import speedup


def fit(context, shard):
    for step in context.steps(shard):
        time.sleep(context.options.get("step_seconds", 0.03))
        context.record_loss(2.0 * len(step.labels))
    with context.phase("evaluate"):
        tested = shard.test_range.stop - shard.test_range.start
        context.record_test(tested // 2, tested)
    return {"answer": 42.0}


@pytest.mark.gauge(framework="torch", fn=fit, iterations=3, rounds=3)
def test_gated(trained, baseline):
    assert trained.runtime <= baseline.runtime
    assert trained.accuracy >= baseline.accuracy
    assert trained.metric("answer", better="higher") >= baseline.metric("answer")


def test_two(train, baseline):
    slow = train("torch", fn=fit, iterations=3, options={"step_seconds": 0.3}, label="slow", rounds=3)
    quick = train("torch", fn=fit, iterations=3, label="quick", rounds=3)
    assert quick.rounds == slow.rounds == []
    assert speedup(quick, over=slow) >= baseline.speedup
    started = sorted((one.started_at, run.label) for run in (slow, quick) for one in run.rounds[:3])
    assert [label for _, label in started] == ["slow", "quick", "quick", "slow", "slow", "quick"]
    assert quick.accuracy >= baseline["quick"].accuracy


@pytest.mark.gauge(framework="torch", fn=fit, iterations=2, rounds=1)
def test_not_gated(trained):
    assert float(trained.accuracy) == 0.5
    assert trained.record.rounds[0].metrics == {"answer": 42.0}
"""

VERDICTS = """
import pytest
from test_gated import fit


def gated(**changes):
    return pytest.mark.gauge(**{"framework": "torch", "fn": fit, "iterations": 3, "rounds": 2, **changes})


@gated(rounds=1)
def test_missing(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated()
def test_much_slower(trained, baseline):
    assert trained.accuracy >= baseline.accuracy
    assert trained.runtime <= baseline.runtime


@gated()
def test_much_faster(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated(rounds=1)
def test_other_data(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated(rounds=1)
def test_other_hardware(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated(rounds=1)
def test_other_profile(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated(rounds=1, iterations=2)
def test_other_length(trained, baseline):
    assert trained.runtime <= baseline.runtime


@gated()
def test_against_a_number(trained):
    assert trained.accuracy >= 0.4
    assert trained.runtime <= 1e-6


@gated(rounds=1)
def test_wrong_direction(trained, baseline):
    assert trained.accuracy <= baseline.accuracy
"""

FRESH = """
import pytest
from test_gated import fit


@pytest.mark.gauge(framework="torch", fn=fit, iterations=2, rounds=1)
def test_fresh(trained, baseline):
    assert trained.runtime <= baseline.runtime
"""

DOCUMENT = Path(__file__).parents[2] / "docs" / "getting-started.md"
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

COMMON = ["--gauge-profile", "smoke", "--gauge-data", "synthetic", "--gauge-executors", "2", "-o", "gauge_rounds=3"]
GENEROUS = {"runtime": "900", "speedup": "900", "accuracy": "50"}
"""Margins in which the launch of a busy machine fits: what is tested is the mechanics."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("gate")
    return Project(folder / "project", folder / "cache").write(test_gated=GATED, test_training=_documented_test())


@pytest.fixture(scope="module")
def recorded(project: Project) -> Finished:
    """Return the session that stored the first baselines."""
    finished = _run(project, "recorded", *_documented("pytest --gauge-update new"), "--benchmark-save", "first")
    assert finished.status == 0, finished.output
    return finished


@pytest.fixture(scope="module")
def compared(project: Project, recorded: Finished) -> Finished:
    """Return the session that met those baselines, and others that it must not, or can only just, compare with."""
    project.write(test_verdicts=VERDICTS)
    _store(project, "test_much_slower", runtime=[1.0e-6, 1.1e-6])  # no noise bridges a factor of a million
    _store(project, "test_much_faster", runtime=[1.0e6, 1.1e6])
    _store(project, "test_other_data", data={"kind": "real", "digest": "0" * 64})
    _store(project, "test_other_hardware", environment={"hardware_class": "another-machine-64c"})
    _store(project, "test_other_profile", profile="ci")
    _store(project, "test_other_length")
    _store(project, "test_wrong_direction")
    margins = [f"--gauge-{kind}-margin={margin}" for kind, margin in GENEROUS.items()]
    columns = ["--benchmark-compare", "0001", "--benchmark-columns", "min,mean,rounds"]
    return _run(project, "compared", *_documented("pytest"), *margins, *columns, "-k", "not not_gated")


@pytest.fixture(scope="module")
def slowed(project: Project, recorded: Finished) -> Finished:
    """Return the session that was slowed down on purpose."""
    project.write(test_fresh=FRESH)
    (slowdown,) = _documented("pytest --gauge-inject compute=50%")[1:]
    assert slowdown == "compute=50%"  # more here: three short steps have to stand out from the launch
    selected = ["test_gated.py::test_gated", "test_fresh.py"]
    return _run(project, "slowed", "--gauge-inject", "compute=6000%", "--gauge-update", "new", *selected)


def test_recording_writes_every_baseline_with_its_raw_samples(project: Project, recorded: Finished) -> None:
    assert recorded.passed("test_gated", "test_two", "test_not_gated", "test_cifar10_quick")
    tests = ("test_gated__test_gated", "test_gated__test_two", "test_training__test_cifar10_quick")
    assert set(project.baselines) == {f"{test}.smoke.json" for test in tests}
    for path in project.baselines.values():
        assert f"baseline written: {path}" in recorded.output
        assert set(path.parent.iterdir()) == set(project.baselines.values())  # no temporary file
    stored = _stored(project, "test_gated")
    assert stored["schema"] == 1
    assert stored["profile"] == "smoke"
    assert stored["data"]["kind"] == "synthetic"
    assert stored["seeds"] == [1, 2, 3]
    assert stored["approved"]["why"] == "recorded with --gauge-update new"
    assert stored["workload"]["function"] == "test_gated:fit"
    assert {len(values) for values in stored["samples"].values()} == {3}
    assert stored["samples"]["accuracy_fraction"] == [0.5] * 3
    assert stored["samples"]["answer"] == [42.0] * 3
    assert set(stored["environment"]["software"]) >= {"python", "java", "spark", "tensorflow", "numpy"}


def test_recording_two_trainings_keeps_both_and_their_speedup(project: Project, recorded: Finished) -> None:
    stored = _stored(project, "test_two")
    assert set(stored["workload"]["labels"]) == {"slow", "quick"}
    samples = stored["samples"]
    ratios = [a / b for a, b in zip(samples["slow.runtime_seconds"], samples["quick.runtime_seconds"], strict=True)]
    assert samples["speedup_ratio"] == pytest.approx(ratios)


def test_statuses_are_in_the_table_and_synthetic_data_is_announced(recorded: Finished) -> None:
    output = recorded.output
    assert "data cifar10 (synthetic), 10000 + 2000 images" in output
    assert "not real images" in output
    table = output.partition("= sparkgauge =")[2]
    for test in ("test_gated", "test_two slow", "test_two quick", "test_not_gated", "test_cifar10_quick"):
        line = next(line for line in table.splitlines() if f"::{test} " in line)
        assert "(synthetic data)" in line
    figures = [line.split()[-1] for line in table.splitlines() if line.startswith("  cpu ")]
    assert figures == ["generated", "-", "generated", "-", "generated"]  # a speed-up stands with the last training


def test_the_report_holds_records_and_verdicts(recorded: Finished) -> None:
    report = recorded.json("gauge.json")
    assert report["schema"] == 1
    assert report["header"]["profile"] == "smoke"
    runs = {(run["test_id"], run["label"]): run for run in report["runs"]}
    run = runs["test_gated.py::test_gated", "trained"]
    assert len(run["rounds"]) == 3
    for one in run["rounds"]:
        for executor in one["executors"]:
            assert sum(executor["phases"].values()) == pytest.approx(one["runtime_seconds"], rel=0.02)
            assert len(executor["step_seconds"]) == 2
        assert sum(executor["train_images"] for executor in one["executors"]) == 300
        assert sum(executor["test_images"] for executor in one["executors"]) == 2000
        assert one["curve"][0]["train_loss"] == 2.0
    assert {(v["metric"], v["status"]) for v in report["verdicts"] if v["label"] == "trained"} == {
        ("runtime_seconds", "generated"),
        ("accuracy_fraction", "generated"),
        ("answer", "generated"),
    }


def test_pytest_benchmark_has_raw_data_and_scalars(recorded: Finished) -> None:
    entries = {one["name"]: one for one in recorded.json("benchmark.json")["benchmarks"]}
    assert {name: len(one["stats"]["data"]) for name, one in entries.items()} == {
        "test_gated": 3,
        "test_two": 3,
        "test_two:quick": 3,
        "test_not_gated": 1,
        "test_cifar10_quick": 3,
    }
    runs = {(run["test_id"], run["label"]): run for run in recorded.json("gauge.json")["runs"]}
    measured = [one["runtime_seconds"] for one in runs["test_gated.py::test_gated", "trained"]["rounds"]]
    assert entries["test_gated"]["stats"]["data"] == pytest.approx(measured, abs=0.5)
    info = entries["test_gated"]["extra_info"]
    assert info["accuracy_fraction"] == 0.5
    assert info["images_per_second"] > 0
    assert info["compute_seconds"] > 0
    assert {f"{name}_seconds" for name in ("launch", "feed", "warmup", "sync", "evaluate", "collect")} <= set(info)
    assert info["status"] == "generated"
    assert entries["test_two:quick"]["extra_info"]["label"] == "quick"
    assert entries["test_not_gated"]["extra_info"]["status"] == "not gated"


def test_a_second_run_passes_against_its_baseline(compared: Finished) -> None:
    assert compared.status == 1  # other tests of the session fail
    assert compared.passed("test_gated", "test_two", "test_much_faster", "test_cifar10_quick"), compared.output
    assert (
        "match: accuracy 50.00 % against 50.00 %" in compared.report("test_gated").properties["gauge_accuracy_fraction"]
    )
    assert compared.report("test_much_faster").properties["gauge_runtime_seconds"].startswith("improved: runtime ")


def test_comparing_writes_nothing(project: Project, compared: Finished) -> None:
    assert "baseline written" not in compared.output
    assert "test_verdicts__test_missing.smoke.json" not in project.baselines


def test_a_missing_baseline_fails_with_the_next_command(compared: Finished) -> None:
    text = compared.text("test_missing")
    assert "assert missing: runtime " in text
    assert "there is no baseline file" in text
    assert "baseline: baselines/" in text and "test_verdicts__test_missing.smoke.json" in text
    assert "next:     --gauge-update new stores this run as the baseline" in text


def test_a_regression_shows_its_numbers(compared: Finished) -> None:
    text = compared.text("test_much_slower")
    for part in (
        "assert regressed: runtime ",
        "expected: 1.049e-06 s (mean of 2 rounds)",
        "actual:   ",
        "ratio:    ",
        "limit:    at most 10.000",
        "test_verdicts__test_much_slower.smoke.json",
        "next:     --gauge-update all accepts the change, if it is intended",
    ):
        assert part in text, text
    assert "where the time went" in compared.output
    assert "test_much_slower (synthetic data): launch " in compared.output


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_other_data", "other data: the baseline has real cifar10 of 10000 + 2000 images, digest 000000000000"),
        ("test_other_hardware", "other hardware class: the baseline has another-machine-64c, this run "),
        ("test_other_profile", "other profile: the baseline has ci, this run smoke"),
        ("test_other_length", "other workload (iterations): the baseline has 3, this run 2"),
    ],
)
def test_what_is_not_comparable_is_not_compared(name: str, reason: str, compared: Finished) -> None:
    text = compared.text(name)
    assert "assert not_comparable: runtime " in text
    assert reason in text
    assert compared.report(name).properties["gauge_runtime_seconds"].startswith("not_comparable: ")


def test_a_plain_number_is_a_limit_too(compared: Finished) -> None:
    text = compared.text("test_against_a_number")
    assert "assert regressed: runtime " in text
    assert "limit 1.000e-06 s" in text
    assert compared.report("test_against_a_number").properties["gauge_accuracy_fraction"].startswith("match: ")


def test_asking_for_the_worse_side_is_an_error(compared: Finished) -> None:
    assert "asks for the worse side to pass" in compared.text("test_wrong_direction")


def test_junit_carries_failures_and_verdicts(compared: Finished) -> None:
    case = compared.junit["test_much_slower"]
    failure = case.find("failure")
    assert failure is not None and "regressed: runtime " in failure.attrib["message"]
    properties = {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
    assert properties["gauge_runtime_seconds"].startswith("regressed: runtime ")
    assert compared.junit["test_gated"].find("failure") is None


def test_pytest_benchmark_compares_with_what_was_saved(project: Project, compared: Finished) -> None:
    assert list((project.folder / ".benchmarks").glob("*/0001_first.json"))
    assert "Comparing against benchmarks from: " in compared.output
    heading = next(line for line in compared.output.splitlines() if line.startswith("Name (time in"))
    assert heading.split()[-3:] == ["Min", "Mean", "Rounds"]
    assert "test_two:quick (0001_first)" in compared.output


def test_an_injected_slowdown_is_found(slowed: Finished) -> None:
    assert slowed.status == 1
    assert "SLOWED DOWN ON PURPOSE: compute by 6000%" in slowed.output
    text = slowed.text("test_gated")
    assert "assert regressed: runtime " in text
    assert "limit:    at most 1.100" in text
    report = slowed.json("gauge.json")
    (verdict,) = [one for one in report["verdicts"] if one["test_id"].endswith("::test_gated")]
    assert verdict["change_low"] > 1.1
    assert "compute explains it: +" in verdict["where"]
    assert "compute explains it: +" in text
    # the slowdown sleeps, which is never called work; three rounds of so little CPU time may leave it open
    assert re.search("waiting or environment, not work|work or waiting cannot be told", verdict["where"])
    assert report["header"]["injections"] == {"compute": 60.0}
    # 3 steps of 30 ms each, times 60; the run itself says where the time went
    (run,) = [one for one in report["runs"] if one["test_id"].endswith("::test_gated")]
    slowest = max(one["executors"][0]["phases"]["compute"] for one in run["rounds"])
    assert slowest > 1.8


def test_a_slowed_run_never_becomes_a_baseline(project: Project, slowed: Finished) -> None:
    text = slowed.text("test_fresh")
    assert "Refusing to store a baseline of a run that was slowed down on purpose" in text
    assert "--gauge-inject" in text
    assert "test_fresh__test_fresh.smoke.json" not in project.baselines


def test_no_process_and_no_folder_outlives_success_and_failure(
    recorded: Finished, compared: Finished, slowed: Finished
) -> None:
    for finished in (recorded, compared, slowed):
        assert len(finished.marks) == 1  # one cluster served all tests of the session
        assert finished.leftovers() == []
        assert not list((finished.folder / "tmp").iterdir())


def test_the_document_shows_what_pytest_prints(compared: Finished, slowed: Finished) -> None:
    shown = "\n".join(text for language, text in _blocks() if language == "console")
    for status, text in (("missing", compared.text("test_missing")), ("regressed", slowed.text("test_gated"))):
        assert _explanation(shown, status) == _explanation(text, status) != []


def test_every_pytest_command_of_the_document_is_accepted(project: Project, recorded: Finished) -> None:
    commands = {tuple(command) for command in _commands() if command[0] == "pytest"}
    assert len(commands) == 4
    arguments = [argument for command in commands for argument in command[1:]]
    # all at once: what one of them alone says is tested by the sessions above
    finished = project.run("--collect-only", "-q", *arguments, name="accepted")
    assert finished.status == 0, finished.output


def _blocks() -> list[tuple[str, str]]:
    return CODE.findall(DOCUMENT.read_text(encoding="utf-8"))


def _documented_test() -> str:
    """Return the document's only test file."""
    (text,) = [text for language, text in _blocks() if language == "python"]
    assert text.startswith("# test_training.py\n")
    return text


def _commands() -> list[list[str]]:
    """Return the commands of the document's console sessions and of its CI recipe, split."""
    prompts = re.compile(r"^\$ (.*)|^ *- run: (.*)", re.MULTILINE)
    texts = [text for language, text in _blocks() if language in ("console", "yaml")]
    return [shlex.split(a or b) for text in texts for a, b in prompts.findall(text)]


def _documented(command: str) -> list[str]:
    """Return the arguments of a pytest command that the document shows."""
    assert shlex.split(command) in _commands()
    return shlex.split(command)[1:]


def _explanation(text: str, status: str) -> list[str]:
    """Return the names at the beginning of the lines below ``assert STATUS: runtime ...``."""
    lines = text[text.index(f"assert {status}: runtime ") :].splitlines()[1:]
    matches = [re.match(r"E {9}(\w+): ", line) for line in lines]
    return [match[1] for match in matches[: next(i for i, match in enumerate(matches) if match is None)] if match]


def _run(project: Project, name: str, *arguments: str) -> Finished:
    out = project.folder.parent / f"{project.folder.name}-{name}"
    files = ["--junitxml", str(out / "junit.xml"), "--gauge-report", str(out / "gauge.json")]
    return project.run(*COMMON, *files, "--benchmark-json", str(out / "benchmark.json"), *arguments, name=name)


def _stored(project: Project, test: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(project.baselines[f"test_gated__{test}.smoke.json"].read_text())
    return value


def _store(project: Project, test: str, *, runtime: list[float] | None = None, **changes: Any) -> Path:
    """Return the file of a baseline for ``test``, made from the one of ``test_gated`` with ``changes``."""
    stored = {**_stored(project, "test_gated"), "test_id": f"test_verdicts.py::{test}"}
    for name, change in changes.items():
        stored[name] = {**stored[name], **change} if isinstance(change, dict) else change
    if runtime is not None:
        stored["samples"]["runtime_seconds"] = runtime
    path = project.baselines["test_gated__test_gated.smoke.json"].with_name(f"test_verdicts__{test}.smoke.json")
    path.write_text(json.dumps(stored))
    return path

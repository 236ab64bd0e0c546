"""What must fail loudly, and what must be gone afterwards: four sessions on real Spark, others never reach it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from plugin.tests.plugin_runs import Finished, Project, hardware_class
from sparkgauge.cluster import standalone

FITS = '''
import os
import signal
import time
from pathlib import Path


def fit(context, shard):
    for step in context.steps(shard):
        context.record_loss(1.0 * len(step.labels))
    return {"accuracy_fraction": 0.5}


def fit_nothing_reported(context, shard):
    for step in context.steps(shard):
        pass


def fit_nan_loss(context, shard):
    for step in context.steps(shard):
        context.record_loss(float("nan"))


def fit_nan_accuracy(context, shard):
    return {"accuracy_fraction": float("nan")}


def fit_broken(context, shard):
    for step in context.steps(shard):
        if context.rank == 1 and step.index == 1:
            Path(context.options["raised"]).touch()
            raise ValueError("broken on purpose")
        time.sleep(0.05)
    return {"accuracy_fraction": 0.5}


def fit_killed(context, shard):
    for step in context.steps(shard):
        if context.rank == 0 and step.index == 1:
            os.kill(_executor(), signal.SIGKILL)
        time.sleep(0.05)
    return {"accuracy_fraction": 0.5}


def fit_endless(context, shard):
    for step in context.steps(shard):
        Path(context.options["training"]).touch()
        time.sleep(0.1)


def _executor():
    """Return the PID of the JVM above this process."""
    pid = os.getpid()
    while "java" not in Path(f"/proc/{pid}/comm").read_text():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert pid > 1
    return pid
'''

FAILURES = """
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import fits
from sparkgauge import store

HERE = Path(__file__).parent


def training(fn, iterations=3, **changes):
    return pytest.mark.gauge(**{"fn": fn, "iterations": iterations, "rounds": 1, **changes})


@training(fits.fit)
def test_before(trained):
    assert float(trained.accuracy) == 0.5


@training(fits.fit_broken, iterations=400, options={"raised": str(HERE / "raised")})
def test_exception(trained):
    assert trained.accuracy >= 0.1


@training(fits.fit)
def test_after_exception(trained):
    assert float(trained.accuracy) == 0.5


@training(fits.fit_killed, iterations=400)
def test_killed(trained, baseline):
    assert trained.runtime <= baseline.runtime


@training(fits.fit)
def test_after_killed(trained):
    assert float(trained.accuracy) == 0.5


@training(fits.fit_nan_accuracy)
def test_nan_accuracy(trained, baseline):
    assert trained.accuracy >= baseline.accuracy


@training(fits.fit_nan_loss)
def test_nan_loss(trained, baseline):
    assert trained.accuracy >= baseline.accuracy


@training(fits.fit_nothing_reported)
def test_no_accuracy(trained, baseline):
    assert trained.accuracy >= baseline.accuracy


@pytest.mark.parametrize("damage", ["newer", "nan", "empty", "none", "folder"])
@training(fits.fit)
def test_baseline(trained, baseline, damage):
    assert trained.runtime <= baseline.runtime


@training(fits.fit)
def test_full_disk(trained, baseline, monkeypatch):
    replace = store._replace

    def replace_on_a_full_disk(path, content):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, before[1]))
        try:
            replace(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(store, "_replace", replace_on_a_full_disk)
    assert trained.accuracy >= baseline.accuracy


@training(fits.fit)
def test_folder_that_cannot_be_made(trained, baseline, pytestconfig, monkeypatch):
    from sparkgauge.plugin import SESSION

    monkeypatch.setattr(pytestconfig.stash[SESSION], "store", store.BaselineStore(HERE / "dangling"))
    assert trained.accuracy >= baseline.accuracy


@training(fits.fit_endless, iterations=100_000, options={"training": str(HERE / "training")})
def test_interrupted(trained):
    def interrupt():
        while not (HERE / "training").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert trained.accuracy >= 0.1
"""

KILLED = """
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import fits

HERE = Path(__file__).parent


@pytest.mark.gauge(fn=fits.fit, iterations=2, rounds=1)
def test_without_baseline(trained, baseline):
    assert trained.runtime <= baseline.runtime
    (HERE / "reached").touch()


@pytest.mark.gauge(fn=fits.fit_endless, iterations=100_000, options={"training": str(HERE / "training")})
def test_killed(trained):
    def kill():
        while not (HERE / "training").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert trained.accuracy >= 0.1
"""

GATED = """
import pytest
import fits


@pytest.mark.gauge(fn=fits.fit, iterations=2, rounds=1)
def test_gated(trained, baseline):
    assert trained.runtime <= baseline.runtime


def test_plain():
    pass
"""

NO_TENSORFLOW = '''
"""Stands for a Python without TensorFlow: its packages cannot be found, in this process only."""

import importlib.util

_find_spec = importlib.util.find_spec


def find_spec(name, package=None):
    return None if name.partition(".")[0] == "tensorflow" else _find_spec(name, package)


importlib.util.find_spec = find_spec
'''

OLD_JAVA = """#!/bin/sh
echo 'openjdk version "11.0.21" 2023-10-17' >&2
"""

COMMON = ["--gauge-profile", "smoke", "--gauge-data", "synthetic"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def failing(cache: Path) -> Finished:
    """Return a session in which nearly everything goes wrong, until it is interrupted."""
    project = Project(cache / "failing", cache).write(test_failures=FAILURES, fits=FITS)
    _damage(project)
    (project.folder / "dangling").symlink_to(cache / "nowhere" / "at-all")
    junit = ["--junitxml", str(cache / "failing-run" / "junit.xml")]
    finished = project.run(*COMMON, *junit, "--gauge-executors", "2", "--gauge-update", "new", name="run")
    assert finished.status == 2, finished.output  # pytest's own for an interrupted session
    return finished


def test_tests_before_and_after_failures_pass(failing: Finished) -> None:
    assert failing.passed("test_before", "test_after_exception", "test_after_killed"), failing.output
    assert len(failing.marks) == 1  # on one and the same cluster


def test_an_exception_fails_the_test_with_the_executors_traceback(failing: Finished) -> None:
    text = failing.text("test_exception")
    assert "Training failed on executor 1" in text
    assert "ValueError: broken on purpose" in text
    assert "in fit_broken" in text
    raised = (failing.folder.parent / "failing" / "raised").stat().st_mtime
    assert failing.report("test_exception").time - raised <= 10.0


def test_a_killed_executor_fails_its_test_only(failing: Finished) -> None:
    text = failing.text("test_killed")
    assert "was lost during training" in text
    assert "killed, out of memory, or a crash" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_nan_accuracy", "metric 'accuracy_fraction' is nan, not a finite number"),
        ("test_nan_loss", "the training loss is nan at step 1"),
        ("test_no_accuracy", "The training function of 'custom' reported no accuracy"),
        ("test_full_disk", "Cannot write the baseline: got File too large"),
        ("test_folder_that_cannot_be_made", "Cannot write the baseline: got File exists"),
    ],
)
def test_what_cannot_be_measured_or_stored_fails(name: str, said: str, failing: Finished) -> None:
    assert said in failing.text(name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("newer", "The baseline was written by a newer sparkgauge: expected schema 1 or older, got schema 2"),
        ("nan", "got NaN, in "),
        ("empty", "got an empty list, in "),
        ("none", "expected JSON in UTF-8"),
        ("folder", "expected a regular file"),
    ],
)
def test_an_unreadable_baseline_is_an_error_before_anything_is_trained(
    damage: str, said: str, failing: Finished
) -> None:
    report = failing.report(f"test_baseline[{damage}]", "setup")
    assert report.outcome == "failed" and said in report.text
    table = failing.output.partition("= sparkgauge =")[2].partition("baseline unreadable")[0]
    assert "test_baseline[" not in table  # no round was taken
    assert "Benchmark fixture was not used" not in failing.output


def test_junit_tells_a_crash_from_a_failure(failing: Finished) -> None:
    lost, raised = failing.junit["test_killed"], failing.junit["test_exception"]
    assert lost.find("failure") is None
    error = lost.find("error")
    assert error is not None and "was lost during training" in error.attrib["message"]
    assert raised.find("error") is None and raised.find("failure") is not None


def test_nothing_is_left_half_written(failing: Finished) -> None:
    folder = failing.folder.parent / "failing"
    names = {path.name for path in (folder / "baselines").glob("*/*")}
    assert all(name.startswith("test_failures__test_baseline") for name in names)
    assert not (folder.parent / "nowhere").exists()


def test_nothing_outlives_an_interrupted_session(failing: Finished) -> None:
    assert "KeyboardInterrupt" in failing.output
    assert not [one for one in failing.reports if one.test.endswith("test_interrupted") and one.when == "call"]
    assert "test_failures.py::test_before" in failing.output.partition("= sparkgauge =")[2]  # the table is printed
    assert failing.leftovers() == []
    assert not list((failing.folder / "tmp").iterdir())


def test_no_required_baseline_is_a_skip_and_nothing_outlives_a_killed_session(cache: Path) -> None:
    project = Project(cache / "killed", cache).write(test_killed=KILLED, fits=FITS)
    finished = project.run(*COMMON, "--gauge-executors", "1", "--gauge-no-require-baseline", name="run")
    assert finished.status == -signal.SIGKILL, finished.output
    skipped = finished.report("test_without_baseline")
    assert skipped.outcome == "skipped"
    assert "not a pass: runtime_seconds missing: there is no baseline file" in skipped.text
    assert (project.folder / "reached").exists()  # the assert itself held
    assert len(finished.marks) == 1
    assert standalone.wait_until(lambda: finished.leftovers() == [], 15.0)
    assert standalone.wait_until(lambda: not list((finished.folder / "tmp").glob("sparkgauge-*")), 15.0)


WRONG = """
import pytest


@pytest.mark.gauge(framework="tensorflwo", model="cifar10_quick")
def test_marker(trained, baseline):
    assert trained.runtime <= baseline.runtime


def test_call(train):
    train("tensorflow", "cifar10_quick", executors=0)
"""


def test_an_error_stands_below_the_tests_own_lines_only(cache: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", cache).write(test_wrong=WRONG)
    finished = project.run(*COMMON, name="run")
    assert finished.status == 1, finished.output
    assert "Unknown framework, did you mean 'tensorflow'?" in finished.output
    assert ">   " in finished.output and "executors=0" in finished.output
    for name in ("workload.py", "plugin.py", "session.py", "fixture.py"):
        assert name not in finished.output
    whole = project.run(*COMMON, "--full-trace", name="whole")
    assert "workload.py" in whole.output


@pytest.mark.parametrize("arguments", [["--benchmark-disable"], ["-n", "2"]], ids=["disabled", "xdist"])
def test_what_was_not_timed_cannot_pass(arguments: list[str], cache: Path) -> None:
    name = f"untimed{arguments[0]}"
    project = Project(cache / name, cache).write(test_gated=GATED, fits=FITS)
    finished = project.run(*COMMON, "--gauge-executors", "1", "--gauge-no-require-baseline", *arguments, name="run")
    assert finished.status == 1, finished.output
    text = finished.text("test_gated")
    assert "NotMeasuredError: runtime_seconds of 'trained' was not measured" in text
    assert "--benchmark-disable, or workers of pytest-xdist" in text
    assert finished.passed("test_plain")
    assert finished.leftovers() == []


@pytest.mark.parametrize(
    ("version", "said"), [(None, "no java in JAVA_HOME or on PATH"), (OLD_JAVA, "Java 11 (PATH: ")], ids=["none", "old"]
)
def test_without_a_usable_java_there_is_one_clear_error(
    version: str | None, said: str, cache: Path, tmp_path: Path
) -> None:
    if version:
        (tmp_path / "java").write_text(version)
        (tmp_path / "java").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), *_folders_without_java()])
    project = Project(tmp_path / "project", cache).write(test_gated=GATED, fits=FITS)
    finished = project.run(*COMMON, name="run", environ={"PATH": path, "JAVA_HOME": None})
    assert finished.status == 4, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith("ERROR: ")]
    assert line.startswith("ERROR: No usable Java for Spark: expected Java 17 or newer")
    assert said in line
    assert line.endswith("; or set JAVA_HOME to a Java 17 or newer")
    assert "Traceback" not in finished.output


def test_without_tensorflow_the_test_fails_with_the_command_that_installs_it(cache: Path, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", cache).write(test_gated=GATED, fits=FITS, conftest=NO_TENSORFLOW)
    finished = project.run(*COMMON, name="run")
    assert finished.status == 1, finished.output
    text = finished.report("test_gated", "setup").text
    assert "framework='tensorflow' needs packages that are not installed" in text
    assert "got no tensorflow. Install them with: pip install 'pytest-sparkgauge[tensorflow]'" in text
    assert finished.passed("test_plain")
    assert "pyspark" not in finished.modules


def _damage(project: Project) -> None:
    """Put a damaged baseline where each parameter of ``test_baseline`` looks for one."""
    folder = project.folder / "baselines" / hardware_class()
    folder.mkdir(parents=True)
    contents = {
        "newer": json.dumps({"schema": 2}),
        "nan": '{"schema": 1, "samples": {"runtime_seconds": [NaN]}}',
        "empty": json.dumps(_baseline({"runtime_seconds": []})),
        "none": "{",
    }
    for name, content in contents.items():
        (folder / f"test_failures__test_baseline__{name}.smoke.json").write_text(content)
    (folder / "test_failures__test_baseline__folder.smoke.json").mkdir()


def _baseline(samples: dict[str, list[float]]) -> dict[str, object]:
    text = dict.fromkeys(("test_id", "profile", "commit"), "")
    data = {"name": "cifar10", "kind": "synthetic", "digest": "", "train_count": 1, "test_count": 1}
    machine = {"hardware_class": "", "cpu_model": "", "cores": 1, "memory_bytes": 1, "gpus": []}
    environment = {**machine, "operating_system": "", "software": {}}
    approved = {"who": "", "when": "", "why": ""}
    parts = {"workload": {}, "data": data, "environment": environment, "approved": approved, "seeds": []}
    return {**text, **parts, "samples": samples, "schema": 1}


def _folders_without_java() -> list[str]:
    folders = os.environ["PATH"].split(os.pathsep)
    return [folder for folder in folders if folder and not (Path(folder) / "java").exists()]

"""What loading the plugin costs, what it selects, and what it says before anything is trained. No Spark is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugin.tests import made_up
from plugin.tests.plugin_runs import HEAVY, PACKAGE_ROOT, Finished, Project
from sparkgauge import environment, gpu
from sparkgauge.store import BaselineStore

FOREIGN = """
def test_nothing_of_ours():
    assert True
"""

SELECTED = """
import pytest


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick")
def test_on_cpu(trained):
    assert trained.accuracy >= 0.1


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", device="gpu")
def test_on_gpu(trained):
    assert trained.accuracy >= 0.1


@pytest.mark.gpu
def test_marked_gpu(gpus):
    assert gpus


@pytest.mark.cpu
def test_marked_cpu():
    pass


def test_unmarked(cifar10):
    assert cifar10.train_count == 10_000
"""

STOPPING = """
import pytest


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", device="gpu")
def test_gpu(trained):
    assert trained.accuracy >= 0.1


@pytest.mark.gauge(framework="tensorflow", model="cifar10_slow")
def test_bad(trained):
    assert trained.accuracy >= 0.1


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick")
def test_never_reached(trained):
    assert trained.accuracy >= 0.1
"""

OTHER_SPARK_PLUGIN = """
import pytest


class Fixtures:
    @pytest.fixture(scope="session")
    def spark_session(self):
        return "theirs"


def pytest_configure(config):
    # pytest names a plugin by its entry point, which pytest-spark calls `spark`
    config.pluginmanager.register(Fixtures(), "spark")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("loading")
    return Project(folder / "selected", folder / "cache").write(test_selected=SELECTED)


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    code = f"import sys, sparkgauge.plugin; print([name for name in {HEAVY!r} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [["--collect-only"], []])
def test_a_folder_without_our_tests_pays_nothing(arguments: list[str], tmp_path: Path) -> None:
    project = Project(tmp_path / "foreign", tmp_path / "cache").write(test_foreign=FOREIGN)
    finished = project.run(*arguments, name="run")
    assert finished.status == 0
    assert finished.heavy_modules == []
    assert "sparkgauge:" not in finished.output
    assert not project.cache.exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 1),
        (["."], 1),
        (["--gauge-no-require-baseline"], 0),
        (["-k", "nothing_of_ours"], 0),
        (["test_foreign.py"], 0),
        (["--collect-only"], 0),
        (["--gauge-profile", "full"], 0),
    ],
)
def test_a_session_fails_where_a_test_with_a_baseline_has_vanished(
    arguments: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    project = Project(tmp_path / "foreign", tmp_path / "cache").write(test_foreign=FOREIGN)
    machine = environment.capture(os.environ)
    store = BaselineStore(project.folder / "baselines")
    test_id = "test_gone.py::test_quick"
    path = store.path_for(test_id, hardware_class=machine.hardware_class, profile="ci")
    store.write(path, made_up.make_baseline(made_up.make_run(test_id=test_id, environment=machine, profile="ci")))
    finished = project.run(*arguments, name="run", environ={"CUDA_VISIBLE_DEVICES": ""})
    assert finished.status == status, finished.output
    assert (f"baseline vanished: {test_id}: no such test any more" in finished.output) == bool(status)
    assert ("the session fails" in finished.output) == bool(status)


def test_a_broken_option_of_an_unused_environment_variable_is_still_reported(project: Project) -> None:
    finished = project.run("--collect-only", name="variable", environ={"SPARKGAUGE_DATA": " "})
    assert finished.status == 4
    assert "SPARKGAUGE_DATA" in finished.output


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("all", [], ["on_cpu", "on_gpu", "marked_gpu", "marked_cpu", "unmarked"]),
        ("gpu", ["-m", "gpu"], ["on_gpu", "marked_gpu"]),
        ("no-gpu", ["-m", "not gpu"], ["on_cpu", "marked_cpu", "unmarked"]),
        ("cpu", ["-m", "cpu"], ["on_cpu", "marked_cpu"]),
        ("k", ["-k", "marked and not un"], ["marked_gpu", "marked_cpu"]),
    ],
)
def test_collecting_and_selecting_start_no_spark(
    name: str, arguments: list[str], expected: list[str], project: Project
) -> None:
    finished = project.run("--collect-only", "-q", "--strict-markers", *arguments, name=name)
    assert finished.status == 0
    collected = [line for line in finished.output.splitlines() if "::" in line]
    assert collected == [f"test_selected.py::test_{test}" for test in expected]
    _check_no_spark(finished)
    assert "sparkgauge:" not in finished.output


def test_gpu_tests_skip_with_the_reason_and_x_stops_before_spark_starts(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stopping = Project(tmp_path / "stopping", project.cache).write(test_stopping=STOPPING)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    finished = stopping.run("-x", "-rs", "--gauge-data", "synthetic", name="run", environ=hidden)
    assert finished.status == 1
    skipped = finished.report("test_gpu", "setup")
    assert skipped.outcome == "skipped"
    assert skipped.text.endswith(f"Skipped: needs a GPU: {gpu.why_none()}')")
    assert "Unknown model, did you mean" in finished.report("test_bad", "setup").text
    assert not [one for one in finished.reports if one.test.endswith("test_never_reached")]
    _check_no_spark(finished)


def test_the_header_says_cluster_machine_and_data_before_anything_runs(project: Project) -> None:
    finished = project.run("-k", "unmarked", "--gauge-data", "synthetic", "--gauge-inject", "feed=5%", name="header")
    assert finished.status == 0, finished.output
    lines = [line for line in finished.output.splitlines() if line.startswith("sparkgauge: ")]
    assert "profile ci, embedded cluster" in lines[0] and lines[0].endswith(f"{project.folder / 'baselines'}")
    assert "hardware class" in lines[1]
    assert lines[2].startswith("sparkgauge: data cifar10 (synthetic), 10000 + 2000 images")
    assert "not real images" in lines[3]
    assert "SLOWED DOWN ON PURPOSE: feed by 5%" in lines[4]
    _check_no_spark(finished)


def test_another_plugin_named_spark_is_detected_and_said(project: Project, tmp_path: Path) -> None:
    clashing = Project(tmp_path / "clash", project.cache).write(test_selected=SELECTED, conftest=OTHER_SPARK_PLUGIN)
    arguments = ["-k", "unmarked", "--gauge-data", "synthetic"]
    finished = clashing.run(*arguments, name="with")
    assert finished.status == 0, finished.output
    assert "pytest-spark is installed too" in finished.output
    assert "-p no:spark or -p no:sparkgauge" in finished.output
    assert "pytest-spark" not in project.run(*arguments, name="without").output


def _check_no_spark(finished: Finished) -> None:
    # nothing can start a JVM without these
    assert finished.modules.isdisjoint({"pyspark", "sparkgauge.cluster.spark", "tensorflow"})
    assert finished.marks == set()
    assert not list((finished.folder / "tmp").glob("sparkgauge-*"))

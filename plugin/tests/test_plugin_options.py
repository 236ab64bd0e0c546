"""Options, ini twins and keywords as pytest hands them over. No Spark is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from plugin.tests.plugin_runs import Finished, Project
from sparkgauge.config import OPTIONS

PLAIN = """
def test_data(cifar10):
    assert cifar10.train_count == 10_000
"""

KEYWORDS = """
import pytest

BAD = {
    "unknown_keyword": dict(framework="tensorflow", model="cifar10_quick", batchsize=100),
    "unknown_framework": dict(framework="tensorfow", model="cifar10_quick"),
    "foreign_keyword": dict(framework="torch", model="cifar10_quick", solver="solver.prototxt"),
    "unknown_model": dict(framework="tensorflow", model="cifar10_quik"),
    "no_model": dict(framework="tensorflow"),
    "unknown_device": dict(model="cifar10_quick", device="tpu"),
    "no_executors": dict(model="cifar10_quick", executors=0),
    "too_many_executors": dict(model="cifar10_quick", executors=3),
    "bad_rounds": dict(model="cifar10_quick", rounds="two"),
    "bad_margin": dict(model="cifar10_quick", runtime_margin=-1),
    "two_lengths": dict(model="cifar10_quick", epochs=1, iterations=5),
    "bad_fn": dict(fn="my_module.fit"),
    "bad_options": dict(fn=len, options={"rate": float("nan")}),
    "too_many_gpus": dict(model="cifar10_quick", device="gpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_call(train, name):
    train(**BAD[name])


@pytest.mark.gauge(framework="tensorflow", model="cifar10_quick", epoch=2)
def test_marker_keyword(trained):
    pass


@pytest.mark.gauge("tensorflow", "cifar10_quick")
def test_marker_positional(trained):
    pass


def test_no_marker(trained):
    pass


def test_same_label(train):
    train("tensorflow", "cifar10_quick", label="a")
    train("tensorflow", "cifar10_quick", label="a")


def test_bad_label(train):
    train("tensorflow", "cifar10_quick", label="a b")


def test_no_training_has_this_label(train, baseline):
    train("tensorflow", "cifar10_quick", label="a")
    assert baseline["b"].runtime
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("options")
    return Project(folder / "project", folder / "cache").write(test_plain=PLAIN)


def test_help_shows_every_option_in_one_group(project: Project) -> None:
    finished = project.run("--help", name="help")
    assert finished.status == 0
    group = finished.output.partition("\ndistributed training benchmarks (sparkgauge):\n")[2].partition("\n\n")[0]
    for option in OPTIONS:
        listed = re.compile(rf"^  {re.escape(option.flag)}[= \n]", re.MULTILINE)  # its own line, not a longer name's
        assert len(listed.findall(group)) == len(listed.findall(finished.output)) == 1
        if option.ini:
            assert f"\n  {option.ini} (string)" in finished.output
    assert "--gauge-no-require-baseline" in group


def test_markers_are_listed(project: Project) -> None:
    output = project.run("--markers", name="markers").output
    assert "@pytest.mark.gauge(framework, model, device, executors" in output
    assert "@pytest.mark.gpu: needs a GPU" in output
    assert "@pytest.mark.cpu: trains on the CPU" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gauge-profile", "quick"], ["--gauge-profile", "one of smoke, ci, full", "'quick'"]),
        (["--gauge-executors", "0"], ["--gauge-executors", "at least 1", "'0'"]),
        (["--gauge-master", "local[*]"], ["--gauge-master", "spark://HOST:PORT", "'local[*]'", "one process"]),
        (["--gauge-update", "some"], ["--gauge-update", "one of new, all", "'some'"]),
        (["--gauge-inject", "sync=10%"], ["--gauge-inject", "feed, compute", "'sync=10%'"]),
        (["-o", "gauge_memory=1g2"], ["gauge_memory", "e.g. 2g", "'1g2'"]),
    ],
)
def test_a_bad_option_ends_pytest_with_one_line(
    arguments: list[str], said: list[str], project: Project, tmp_path: Path
) -> None:
    _check_refused(Project(tmp_path, project.cache).run(*arguments, name="run"), said)


def test_updating_baselines_in_ci_has_to_be_forced(project: Project) -> None:
    ci = {"CI": "true"}
    refused = project.run("--gauge-update", "new", name="refused", environ=ci)
    _check_refused(refused, ["Refusing to write baselines in CI", "--gauge-update new", "--gauge-force-update"])
    forced = ["--gauge-update", "new", "--gauge-force-update", "--gauge-data", "synthetic"]
    assert project.run(*forced, name="forced", environ=ci).status == 0


def test_truncated_data_ends_pytest_before_anything_is_trained(project: Project, tmp_path: Path) -> None:
    layout = ("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin")
    for name in (*layout, "test_batch.bin"):
        (tmp_path / name).write_bytes(b"\0" * 3073)
    finished = project.run("--gauge-data", str(tmp_path), name="truncated")
    _check_refused(finished, [f"{tmp_path}/data_batch_1.bin", "30,730,000 bytes", "3,073 bytes"])
    assert "pyspark" not in finished.modules


def test_ini_twins_hold_where_the_command_line_is_silent(project: Project, tmp_path: Path) -> None:
    own = Project(tmp_path / "ini", project.cache).write(test_plain=PLAIN)
    settings = ["gauge_data = synthetic", "gauge_profile = smoke", "gauge_executors = 3", "gauge_baselines = stored"]
    (own.folder / "pytest.ini").write_text("\n".join(["[pytest]", *settings]))
    from_ini = own.run(name="ini").output
    assert "profile smoke, embedded cluster, 3 executors" in from_ini
    assert f"baselines in {own.folder / 'stored'}" in from_ini
    mixed = own.run("--gauge-executors", "1", "--gauge-profile", "full", name="mixed").output
    assert "profile full, embedded cluster, 1 executor x" in mixed


def test_bad_keywords_are_named(project: Project, tmp_path: Path) -> None:
    own = Project(tmp_path / "keywords", project.cache).write(test_keywords=KEYWORDS)
    arguments = ["--gauge-data", "synthetic", "--gauge-executors", "2"]
    finished = own.run(*arguments, name="run", environ={"CUDA_VISIBLE_DEVICES": ""})
    expected = {
        "unknown_keyword": ["Unknown keyword 'batchsize', did you mean 'batch_size'?"],
        "unknown_framework": ["Unknown framework, did you mean 'tensorflow'?", "one of tensorflow, caffe, torch"],
        "foreign_keyword": ["solver belongs to framework 'caffe'"],
        "unknown_model": ["Unknown model, did you mean 'cifar10_quick'?", "cifar10_tutorial"],
        "no_model": ["No model given", "or fn= with a function"],
        "unknown_device": ["Unknown device", "one of cpu, gpu", "got tpu"],
        "no_executors": ["Bad value for executors", "at least 1", "got 0"],
        "too_many_executors": ["at most the cluster's 2, got 3", "--gauge-executors 3"],
        "bad_rounds": ["Bad value for rounds", "'two'"],
        "bad_margin": ["Bad value for runtime_margin", "at least 0"],
        "two_lengths": ["either iterations or epochs", "iterations=5 and epochs=1"],
        "bad_fn": ["Bad value for fn", "a function fit(context, shard)", "my_module.fit"],
        "bad_options": ["Bad value for options", "a dict of JSON values"],
        "too_many_gpus": ["needs a GPU for every executor", "2 GPUs", "got none"],
    }
    for name, parts in expected.items():
        text = finished.text(f"test_call[{name}]")
        for part in parts:
            assert part in text, text
        assert f"in train(...) of test_keywords.py::test_call[{name}]" in text or name == "too_many_gpus"
    for name, part in [
        ("test_marker_keyword", "Unknown keyword 'epoch', did you mean 'epochs'?"),
        ("test_marker_positional", "positional arguments ('tensorflow', 'cifar10_quick')"),
        ("test_no_marker", "got no marker, in @pytest.mark.gauge(...) of test_keywords.py::test_no_marker"),
    ]:
        assert part in finished.report(name, "setup").text
    for name, part in [
        ("test_same_label", "the same label: got 'a'"),
        ("test_bad_label", "Bad label"),
        ("test_no_training_has_this_label", "one of 'a', got 'b'"),
    ]:
        assert part in finished.text(name)
    assert "pyspark" not in finished.modules


def _check_refused(finished: Finished, said: list[str]) -> None:
    assert finished.status == 4, finished.output
    line = next(line for line in finished.output.splitlines() if line.startswith("ERROR: "))
    for part in said:
        assert part in line
    assert "Traceback" not in finished.output
    assert finished.reports == []

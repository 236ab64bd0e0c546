"""Tests marked gpu in sessions of their own: skipped with the reason, failed on demand, given the GPUs there are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from plugin.tests.plugin_runs import plugin_arguments
from sparkgauge import gpu, nvml

TESTS = """
import pytest


@pytest.mark.gpu
def test_on_a_gpu(gpus):
    assert [one.name for one in gpus] == ["A card"]


def test_elsewhere(gpus):
    assert isinstance(gpus, tuple)
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs the tests with the given arguments."""
    monkeypatch.setenv("SPARKGAUGE_DATA", "synthetic")
    for name in ("CI", nvml.PLAYED_VARIABLE, "CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(TESTS)
    return lambda *arguments: pytester.runpytest_subprocess("-rs", *plugin_arguments(), *arguments)


@pytest.mark.skipif(bool(gpu.detect()), reason="there is a GPU here")
def test_without_a_gpu_the_reason_is_given(run) -> None:
    result = run()
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*needs a GPU: {gpu.why_none()}"])
    required = run("--gauge-require", "gpu")
    required.assert_outcomes(passed=1, failed=0, errors=1)
    required.stdout.fnmatch_lines([f"*needs a GPU: {gpu.why_none()} (--gauge-require gpu)"])


def test_with_one_the_test_runs(run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = pytester.path / "gpus.json"
    listing.write_text(json.dumps([{"name": "A card"}]))
    monkeypatch.setenv(nvml.PLAYED_VARIABLE, str(listing))
    run("-m", "gpu", "--gauge-require", "gpu").assert_outcomes(passed=1, deselected=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    result = run("-m", "gpu")
    result.assert_outcomes(skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["*CUDA_VISIBLE_DEVICES='-1' hides all GPUs"])


def test_a_session_has_as_many_executors_as_its_gpus_serve(
    run: Any, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = pytester.path / "gpus.json"
    listing.write_text(json.dumps([{"name": "A card", "uuid": "GPU-0"}]))
    monkeypatch.setenv(nvml.PLAYED_VARIABLE, str(listing))
    pytester.makepyfile(
        test_trained="""
        import pytest

        @pytest.mark.gauge(framework="torch", model="cifar10_quick", device="gpu")
        def test_on_gpu(trained):
            assert trained.workload.executors == 1  # nothing is trained until somebody looks
        """
    )
    result = run("test_trained.py", "--setup-only")
    result.stdout.fnmatch_lines(["sparkgauge: profile ci, embedded cluster, 1 executor x *"])

"""What pytest-benchmark is told, with its own statistics and a stand-in for its fixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.stats import Stats

from plugin.tests.plugin_runs import make_round, make_run, make_workload
from sparkgauge.benchmarking import BenchmarkTimer, scalars
from sparkgauge.records import Round


class Fixture:
    """As much of pytest-benchmark's fixture as the timer uses."""

    def __init__(self, disabled: bool = False) -> None:
        self.name, self.fullname = "test_a", "test_file.py::test_a"
        self.stats: Stats | None = None
        self.extra_info: dict[str, Any] = {}
        self.disabled = disabled
        self._mode: str | None = None

    def pedantic(
        self,
        target: Callable[[], Round],
        *,
        setup: Callable[[], None],
        rounds: int,
        warmup_rounds: int,
        iterations: int,
    ) -> Round:
        assert iterations == 1 and self._mode is None  # once per fixture
        self._mode = "pedantic"
        if not self.disabled:
            self.stats = Stats()
            for _ in range(warmup_rounds):
                setup()
                target()
            for _ in range(rounds - 1):
                setup()
                self.stats.update(target().runtime_seconds)
            self.stats.update(1.0)
        setup()
        return target()


@pytest.fixture
def taken() -> list[Round]:
    return []


@pytest.fixture
def take(taken: list[Round]) -> Callable[[], Round]:
    def take() -> Round:
        taken.append(make_round(seed=len(taken) + 1))
        return taken[-1]

    return take


def test_rounds_and_warm_ups_are_taken_once(take: Callable[[], Round], taken: list[Round]) -> None:
    fixture = Fixture()
    timer = BenchmarkTimer(fixture)
    assert timer("trained", make_workload(), take, 3, 1) is True
    assert len(taken) == 4
    assert len(fixture.stats.data) == 3


def test_further_rounds_of_a_training_join_its_entry(take: Callable[[], Round], taken: list[Round]) -> None:
    fixture = Fixture()
    timer = BenchmarkTimer(fixture)
    timer("trained", make_workload(), take, 1, 0)
    assert timer("trained", make_workload(), take, 2, 0) is True
    timer.add("trained", make_round(runtime_seconds=7.0))
    assert len(taken) == 3
    assert len(fixture.stats.data) == 4
    assert fixture.stats.data[-1] == 7.0


def test_every_training_of_a_test_has_an_entry_of_its_own(take: Callable[[], Round]) -> None:
    fixture = Fixture()
    timer = BenchmarkTimer(fixture)
    timer("cpu", make_workload(), take, 2, 0)
    timer("gpu", make_workload(), take, 3, 0)
    timer.describe(make_run(label="gpu"), "match")
    branch = timer._entries["gpu"]
    assert (branch.name, branch.fullname) == ("test_a:gpu", "test_file.py::test_a:gpu")
    assert (len(fixture.stats.data), len(branch.stats.data)) == (2, 3)
    assert fixture.extra_info == {}
    assert branch.extra_info["label"] == "gpu" and branch.extra_info["status"] == "match"


def test_the_clock_stands_still_for_the_kernel_between_steps(benchmark: Any) -> None:
    def take() -> Round:
        time.sleep(0.2)
        one = make_round()
        timed = tuple(replace(executor, reference_seconds=(0.05, 0.05)) for executor in one.executors)
        return replace(one, executors=timed)

    timer = BenchmarkTimer(benchmark)
    timer("trained", make_workload(), take, 1, 0)
    timer("trained", make_workload(), take, 1, 0)
    assert benchmark.stats.stats.data == pytest.approx([0.1, 0.1], abs=0.05)


def test_disabled_benchmarks_are_not_timed(take: Callable[[], Round], taken: list[Round]) -> None:
    timer = BenchmarkTimer(Fixture(disabled=True))
    assert timer("trained", make_workload(), take, 3, 1) is False
    timer.add("trained", make_round())
    assert len(taken) == 1


def test_scalars_are_means_over_rounds_and_executors(tmp_path: Path) -> None:
    rounds = (
        make_round(accuracy_fraction=0.5, launch_seconds=1.0),
        make_round(accuracy_fraction=0.7, launch_seconds=2.0),
    )
    found = scalars(make_run(rounds=rounds))
    assert found["accuracy_fraction"] == pytest.approx(0.6)
    assert found["launch_seconds"] == pytest.approx(1.5)
    assert found["data"] == "cifar10 (synthetic)"
    assert found["executors"] == 2
    assert "label" not in found
    assert all(isinstance(value, (str, int, float)) for value in found.values())


def test_invalid_rounds_leave_the_statistics(benchmark: Any, take: Callable[[], Round]) -> None:
    if benchmark.disabled:
        pytest.skip("pytest-benchmark itself is switched off")
    timer = BenchmarkTimer(benchmark)
    timer("trained", make_workload(), take, 3, 0)
    seconds = benchmark.stats.stats.data
    seconds[:] = [1.0, 9.0, 2.0]
    lost = replace(make_round(), invalid="retried: executor 1 was lost")
    rounds = [make_round(), lost, make_round()]
    timer.leave_out("trained", rounds)
    timer.leave_out("trained", rounds)  # a session may finish a test twice
    assert seconds == [1.0, 2.0]
    timer.leave_out("trained", [lost, lost])
    assert seconds == [1.0, 2.0]  # pytest-benchmark needs one

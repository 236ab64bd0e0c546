"""Where a regression went: phases, executors, work or waiting; and the same through the gate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from plugin.tests.made_up import make_baseline, make_executor, make_round, make_run
from sparkgauge.attribution import attribute, phase_means, side_of
from sparkgauge.gate import Measurement, Policy, baseline_quantity, explain, samples_of, summary
from sparkgauge.records import PhaseSeconds, RunRecord, Verdict, from_json, to_json

NOISE = (1.0, 1.02, 0.99, 1.01, 1.0, 0.98)


def trained(compute: float = 4.0, *, cpu: float | None = None, slow_rank: int | None = None) -> RunRecord:
    """Return six rounds on two executors; ``cpu`` seconds of compute, as many as wall seconds by default."""
    rounds = []
    for seed, noise in enumerate(NOISE, 1):
        executors = []
        for rank in (0, 1):
            own = compute * noise * (1.5 if rank == slow_rank else 1.0) * (1.0 + 0.003 * rank * (-1) ** seed)
            worked = own if cpu is None else cpu * noise
            by_cpu = PhaseSeconds(compute=worked, launch=0.5 * noise)
            executors.append(
                make_executor(
                    rank, launch=2.0 * noise, compute=own, cpu_seconds=worked + 0.5 * noise, phase_cpu_seconds=by_cpu
                )
            )
        runtime = 2.0 * noise + max(one.phases.compute for one in executors)
        rounds.append(make_round(seed, runtime, executors=tuple(executors)))
    return make_run(*rounds)


@pytest.mark.parametrize("paired", [True, False])
def test_the_slower_phase_is_named_with_its_share_and_work(paired: bool) -> None:
    text = attribute(side_of(trained()), side_of(trained(6.0)), paired=paired)
    assert text.startswith("compute explains it: +2.0")
    assert "100% [" in text and "of the change" in text
    assert "; work: CPU time +4" in text
    assert "executor" not in text


def test_wall_time_without_cpu_time_is_waiting() -> None:
    text = attribute(side_of(trained()), side_of(trained(6.0, cpu=4.0)), paired=True)
    assert text.startswith("compute explains it: ")
    assert "waiting or environment, not work: CPU time +0.0 %" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_the_straggler_is_named(rank: int) -> None:
    text = attribute(side_of(trained()), side_of(trained(slow_rank=rank)), paired=True)
    assert f"executor {rank} fell behind the others in compute" in text


def test_cpu_seconds_name_a_phase_that_wall_time_hides() -> None:
    generator = np.random.default_rng(1)

    def noisy(factor: float) -> RunRecord:
        rounds = []
        for seed in range(1, 7):
            wall = {name: float(4.0 * np.exp(generator.normal(0, 0.6))) for name in ("launch", "compute")}
            by_cpu = PhaseSeconds(compute=2.0 * factor + 0.001 * seed, launch=1.0 + 0.001 * (seed % 3))
            rounds.append(make_round(seed, sum(wall.values()), **wall, phase_cpu_seconds=by_cpu))
        return make_run(*rounds)

    text = attribute(side_of(noisy(1.0)), side_of(noisy(1.3)))
    assert "compute explains it: +0.60 s" in text and "of the change of CPU time" in text


def test_nothing_slower_and_nothing_known_say_nothing() -> None:
    run = trained()
    assert attribute(side_of(run), side_of(run)) == ""
    assert attribute(side_of(make_run(*run.rounds[:1])), side_of(run)) == ""
    assert phase_means(side_of(make_run()).shares, cpu=True) == {}


def test_a_regression_against_a_baseline_names_the_phase_everywhere() -> None:
    baseline, slow = make_baseline(trained()), trained(6.0)
    quantity = baseline_quantity(
        baseline,
        "runtime_seconds",
        file="f.json",
        policy=Policy(),
        where=lambda: attribute(side_of(trained()), side_of(slow)),
    )
    verdict = Measurement(samples_of(slow, "runtime_seconds")) <= quantity
    assert verdict.status == "regressed"
    assert "; compute explains it: +2." in summary(verdict)
    (line,) = [line for line in explain(verdict) if line.startswith("where:    ")]
    assert "compute explains it" in line and "; work: " in line
    assert from_json(Verdict, json.loads(json.dumps(to_json(verdict)))) == verdict
    assert verdict.p_value is not None and 0.0 < verdict.p_value < 0.025


def test_only_a_regression_is_asked_where_it_went() -> None:
    def never() -> str:
        raise AssertionError

    quantity = baseline_quantity(make_baseline(trained()), "runtime_seconds", file="f", policy=Policy(), where=never)
    assert (Measurement(samples_of(trained(), "runtime_seconds")) <= quantity).status == "match"


def test_baselines_keep_each_executors_phases() -> None:
    baseline = make_baseline(trained())
    assert {len(executors) for executors in baseline.executors["trained"]} == {2}
    again = from_json(type(baseline), json.loads(json.dumps(to_json(baseline))))
    assert again == baseline
    assert side_of(trained()).shares == baseline.executors["trained"]

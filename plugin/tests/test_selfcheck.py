"""The self-check: rates on traces whose answer is known, the stored file, the quoted line, and a real one on Spark."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkgauge import cli, selfcheck, selfcheck_rounds
from sparkgauge.environment import installed_version
from sparkgauge.errors import BaselineError, ConfigurationError, MachineError, NotMeasuredError
from sparkgauge.gate import Policy
from sparkgauge.report.run_json import report_of
from sparkgauge.selfcheck import Rate, Rates, SelfCheck
from sparkgauge.stats import covariate

POLICY = Policy()


def noise(sd: float, count: int = 60, seed: int = 3) -> Any:
    return np.exp(np.random.default_rng(seed).normal(1.0, sd, count))


def a_check(**changes: Any) -> SelfCheck:
    found = {"0.05": Rate(600, 2000), "0.1": Rate(1860, 2000), "0.2": Rate(2000, 2000)}
    rates = Rates(Rate(8, 2000), Rate(40, 2000), found, 5.2, {"0.05": 6.0, "0.1": 5.5, "0.2": 5.0}, 8, 0.06)
    check = SelfCheck(
        when="2026-11-24T10:00:00+00:00",
        hardware_class="linux-2c",
        workload={"model": "cifar10_quick"},
        data="real",
        software={"python": "3.11"},
        margin_fraction=0.1,
        confidence=0.95,
        resamplings=2000,
        runtime_seconds=(4.0, 4.1),
        cpu_seconds=(3.0, 3.1),
        load_average=(0.1, 0.2),
        stored=rates,
        paired=dataclasses.replace(rates, most_rounds=40, min_detectable_fraction=None),
    )
    return dataclasses.replace(check, **changes)


# ------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (20, 2000, 0.00648, 0.01539)],
)
def test_wilson_interval(count: int, of: int, low: float, high: float) -> None:
    assert Rate(count, of).interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_wilson_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    count, of = counts
    low, high = Rate(count, of).interval
    assert 0.0 <= low <= count / of <= high <= 1.0
    assert Rate(of - count, of).interval == pytest.approx((1.0 - high, 1.0 - low))


def test_a_quiet_machine_is_found_quiet() -> None:
    stored = selfcheck.calibrate_stored(noise(0.005), POLICY, rounds=5, most_rounds=8, resamplings=60)
    assert stored.false_positives.count == 0 and stored.undecided.count == 0
    assert stored.found["0.2"].fraction == 1.0 and stored.found["0.05"].count == 0  # half the margin is a match
    assert stored.rounds_unchanged == 5.0
    assert stored.min_detectable_fraction == pytest.approx(0.10, abs=0.02)  # the margin itself


def test_pairs_on_a_quiet_machine_find_what_stored_samples_find_and_more() -> None:
    paired = selfcheck.calibrate_paired(noise(0.005), POLICY, resamplings=200)
    assert paired.false_positives.count == 0 and paired.found["0.1"].fraction >= 0.98  # beyond half the margin
    assert paired.rounds_unchanged == selfcheck.FEWEST_PAIRS


def test_a_noisy_machine_decides_little_and_detects_only_large_changes() -> None:
    stored = selfcheck.calibrate_stored(noise(0.4), POLICY, rounds=5, most_rounds=8, resamplings=60)
    assert stored.undecided.fraction > 0.5
    assert stored.min_detectable_fraction is None or stored.min_detectable_fraction > 0.5


def test_a_machine_that_drifts_raises_false_alarms_stored_and_not_in_pairs() -> None:
    # levels that last longer than a comparison: stored rounds see another level, neighbours share theirs
    levels = np.repeat(np.array([1.0, 1.5, 1.0, 1.5]), 16)
    trace = levels * noise(0.01, 64)
    stored = selfcheck.calibrate_stored(trace, POLICY, rounds=5, most_rounds=8, resamplings=100)
    paired = selfcheck.calibrate_paired(trace, POLICY, resamplings=200)
    assert stored.false_positives.fraction > 0.1
    assert paired.false_positives.interval[0] <= 0.025
    assert not a_check(stored=stored).is_trustworthy
    assert "stored comparisons raise more false alarms" in a_check(stored=stored).concerns()[0]


def test_the_reference_kernel_tells_a_drift_from_a_regression() -> None:
    levels = np.repeat(np.array([1.0, 1.5, 1.0, 1.5]), 16)
    trace, beside = levels * noise(0.01, 64), 0.15 * levels * noise(0.01, 64)[::-1]
    settings = {"rounds": 5, "most_rounds": 8, "resamplings": 100}
    assert selfcheck.calibrate_stored(trace, POLICY, **settings).false_positives.fraction > 0.1
    assert selfcheck.calibrate_stored(trace, POLICY, **settings, references=beside).false_positives.fraction <= 0.025
    assert selfcheck.judged_stored(trace[:8], trace[16:24], POLICY) == "regressed"
    sides = beside[:8], beside[16:24]
    assert selfcheck.judged_stored(trace[:8], trace[16:24], POLICY, references=sides) != "regressed"


def test_sides_of_a_stored_comparison_share_no_round() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        one, two = selfcheck._two_starts(16, 5, 8, generator)
        assert 0 <= one <= 11 and 0 <= two <= 8
        assert two >= one + 5 or one >= two + 8


@pytest.mark.parametrize(("count", "enough"), [(12, False), (13, True)])
def test_a_trace_must_hold_both_sides(count: int, enough: bool) -> None:
    if enough:
        selfcheck.calibrate_stored(noise(0.01, count), POLICY, rounds=5, most_rounds=8, resamplings=5)
        return
    with pytest.raises(NotMeasuredError, match="13 rounds or more, all above 0 s, got 12"):
        selfcheck.calibrate_stored(noise(0.01, count), POLICY, rounds=5, most_rounds=8, resamplings=5)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_rounds_are_refused(bad: float) -> None:
    with pytest.raises(NotMeasuredError):
        selfcheck.calibrate_paired([*noise(0.01, 20), bad], POLICY, resamplings=5)


def test_pairs_are_neighbours_in_either_order_and_blocks_stay_together() -> None:
    logs = np.arange(40.0) ** 2  # the difference of neighbours tells where they are
    differences = selfcheck.paired_differences(logs, 10, 50, np.random.default_rng(0), block_pairs=5)
    assert differences.shape == (50, 10)
    where = (np.abs(differences) - 1) / 2
    assert np.array_equal(where, where.round()) and where.min() >= 0 and where.max() <= 38
    assert np.all(np.diff(where.reshape(50, 2, 5), axis=-1) == 2)
    assert 0.3 < (differences > 0).mean() < 0.7


# ---------------------------------------------------------------------------------------------------- covariate


def shared_noise(rows: int, pairs: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    machine = generator.normal(0.0, 0.2, (rows, pairs))
    return machine + generator.normal(0.0, 0.05, (rows, pairs)), machine + generator.normal(0.0, 0.05, (rows, pairs))


def test_a_covariate_that_explains_the_noise_removes_it_and_leaves_the_change() -> None:
    differences, beside = shared_noise(400, 40)
    freed = covariate.adjusted(differences + 0.05, beside)
    assert freed.mean(axis=1).std() < 0.5 * differences.mean(axis=1).std()
    assert freed.mean() == pytest.approx(0.05, abs=0.002)


def test_a_covariate_that_explains_nothing_changes_little() -> None:
    generator = np.random.default_rng(1)
    differences, beside = generator.normal(size=(2, 400, 40))
    freed = covariate.adjusted(differences, beside)
    untouched = (freed == differences).all(axis=1).mean()
    assert untouched > 0.9  # the correlation exceeds twice its noise by luck in 2.5 %


@pytest.mark.parametrize(("pairs", "used"), [(11, False), (12, True)])
def test_a_slope_needs_twelve_pairs(pairs: int, used: bool) -> None:
    differences, beside = shared_noise(1, pairs)
    assert (covariate.adjusted(differences, beside) != differences).any() == used


def test_swapping_sides_mirrors_the_adjusted_pairs() -> None:
    differences, beside = shared_noise(20, 20)
    assert covariate.adjusted(-differences, -beside) == pytest.approx(-covariate.adjusted(differences, beside))


def test_a_kernel_that_stands_still_changes_nothing() -> None:
    differences, _ = shared_noise(5, 20)
    assert np.array_equal(covariate.adjusted(differences, np.zeros_like(differences)), differences)


# ------------------------------------------------------------------------------------------------------ storage


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = selfcheck.path_for("linux-2c", tmp_path)
    assert selfcheck.read(path) is None
    selfcheck.write(path, a_check())
    assert selfcheck.read(path) == a_check()
    assert [one.name for one in path.parent.iterdir()] == ["linux-2c.json"]


def test_a_hardware_class_that_is_no_file_name_stays_in_the_folder(tmp_path: Path) -> None:
    assert selfcheck.path_for("../../etc/passwd", tmp_path).parent == tmp_path / "selfcheck"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"schema": None}, "expected schema 1"),
        ({"more": 1}, "only the fields"),
        ({"confidence": "high"}, "confidence"),
        ({"stored": None}, "stored"),
    ],
)
def test_another_file_is_refused_with_its_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = selfcheck.path_for("linux-2c", tmp_path)
    selfcheck.write(path, a_check())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BaselineError) as caught:
        selfcheck.read(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "sparkgauge selfcheck" in str(caught.value) and "\n" not in str(caught.value)


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    path = selfcheck.path_for("linux-2c", tmp_path)
    for bad in (Rate(3, 2), Rate(-1, 2), Rate(0, 0)):
        selfcheck.write(path, a_check(stored=dataclasses.replace(a_check().stored, false_positives=bad)))
        with pytest.raises(BaselineError, match="rates from 0 to 1"):
            selfcheck.read(path)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_self_check_or_one_clear_error(content: bytes) -> None:
    with pytest.raises(BaselineError) as caught:
        selfcheck.parse(content, where="file.json")
    assert "file.json" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- report


def test_the_quoted_line() -> None:
    assert selfcheck.quote(a_check()) == (
        "self-check of 2026-11-24 on this machine (stored, margin 10%): false positives 0.4 % [0.2, 0.8], "
        "finds +10 % in 93.0 % [91.8, 94.0]; minimum detectable change 6.0 %"
    )
    assert "(paired, margin 10%)" in selfcheck.quote(a_check(), "paired")
    assert selfcheck.quote(a_check(), "paired").endswith("minimum detectable change above 200%")


def test_without_a_self_check_the_command_is_named(tmp_path: Path) -> None:
    line = selfcheck.quote_stored("linux-2c", cache_folder=tmp_path)
    assert line == "no self-check on this machine yet: sparkgauge selfcheck"
    assert selfcheck.report_field("linux-2c", tmp_path) == {"error": line}


def test_a_corrupt_file_is_one_line_and_no_exception(tmp_path: Path) -> None:
    path = selfcheck.path_for("linux-2c", tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"\xff{")
    line = selfcheck.quote_stored("linux-2c", cache_folder=tmp_path)
    assert line.startswith("Unreadable self-check") and str(path) in line and "\n" not in line
    assert selfcheck.report_field("linux-2c", tmp_path) == {"error": line}


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    selfcheck.path_for("linux-2c", tmp_path).mkdir(parents=True)
    assert selfcheck.quote_stored("linux-2c", cache_folder=tmp_path).startswith("Unreadable self-check")


def test_the_run_report_holds_the_rates(tmp_path: Path) -> None:
    selfcheck.write(selfcheck.path_for("linux-2c", tmp_path), a_check())
    field = selfcheck.report_field("linux-2c", tmp_path)
    report = json.loads(json.dumps(report_of([], [], {}, self_check=field)))
    assert report["self_check"]["stored"]["false_positives"] == {"count": 8, "of": 2000}
    assert report["self_check"]["when"].startswith("2026-11-24")


def test_the_text_names_what_was_injected_and_what_to_mind() -> None:
    injected = selfcheck.Injection(
        "compute", 0.6, 0.2, (4.0, 4.1), (4.8, 4.9), "match", "regressed", "compute", 1.19, 1.1, 1.3
    )
    text = "\n".join(selfcheck.to_text(a_check(injection=injected)))
    assert "compute slowed down by 60%" in text and "1.190 times as long [1.100, 1.300]" in text
    assert "attention: a real slowdown meant to be 20% passed as a match" in text
    assert "nothing found against the gate here" in "\n".join(selfcheck.to_text(a_check()))


# ------------------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--minutes", "0.49"], "0.5 to 1440, got 0.49"), (["--minutes", "nan"], "nan"), (["--executors", "0"], "got 0")],
)
def test_bad_arguments_are_refused_before_anything_starts(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["selfcheck", *arguments]) == cli.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("sparkgauge: error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("minutes", [0.5, 1440.0])
def test_the_limits_of_minutes_are_allowed(minutes: float) -> None:
    assert selfcheck_rounds.Settings(minutes=minutes).minutes == minutes
    with pytest.raises(ConfigurationError):
        selfcheck_rounds.Settings(minutes=1440.1)


def test_without_a_framework_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck_rounds, "PACKAGES", {"tensorflow": ("no-such-distribution-4711",)})
    with pytest.raises(MachineError, match="pip install"):
        selfcheck_rounds.installed_framework()


@pytest.mark.slow
@pytest.mark.skipif(
    not installed_version("tensorflowonspark"), reason="needs tensorflowonspark, which is not installed"
)
def test_a_real_self_check_is_stored_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared_cluster: Any
) -> None:
    import psutil

    shared_cluster.stop()  # a process has one Spark
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck_rounds, "ITERATIONS", 4)
    monkeypatch.setattr(selfcheck_rounds, "WARMUP_ROUNDS", 1)
    monkeypatch.setattr(selfcheck_rounds, "MOST_INJECTED_PAIRS", 2)
    monkeypatch.setattr(selfcheck_rounds, "LEAST_MINUTES", 0.05)
    monkeypatch.setattr(selfcheck, "FEWEST_PAIRS", 2)
    monkeypatch.setattr(selfcheck, "FEWEST_ROUNDS", 15)  # 5 stored against up to 10
    monkeypatch.setattr(selfcheck, "RESAMPLINGS", 50)
    status = cli.main(["selfcheck", "--json", "--minutes", "0.05", "--data", "synthetic"])
    output = capsys.readouterr()
    check = selfcheck.parse(output.out.encode(), where="standard output")
    assert status == (cli.DONE if check.is_trustworthy else cli.ATTENTION)
    assert "A/A round 1:" in output.err and "pair 1:" in output.err
    assert len(check.runtime_seconds) >= selfcheck.FEWEST_ROUNDS
    assert check.injection is not None and len(check.injection.slowed_seconds) == 2
    assert selfcheck.read(selfcheck.path_for(check.hardware_class, tmp_path / "sparkgauge")) == check
    assert not [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]

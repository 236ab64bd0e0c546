"""What a report says of GPUs and their price, and the table with the rows of 2017."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from plugin.tests.made_up import MACHINE, make_executor, make_round, make_run
from sparkgauge import cli
from sparkgauge.errors import ConfigurationError
from sparkgauge.machine import disturbances
from sparkgauge.records import GpuState, RunRecord, from_json, to_json
from sparkgauge.report import gpu_lines, reference
from sparkgauge.report.run_json import write_run_report

H100 = "NVIDIA H100 80GB HBM3"
WORK = {"framework": "caffe", "model": "cifar10_quick", "executors": 1, "iterations": 5000, "batch_size": 100}
STATE = GpuState(
    name=H100,
    uuid="GPU-1",
    driver="580.159.04",
    samples=40,
    utilisation_fraction=0.63,
    sm_clock_mhz=1900.0,
    sm_clock_least_mhz=1755.0,
    memory_clock_mhz=2619.0,
    power_watts=312.0,
    temperature_celsius=54.0,
    memory_peak_bytes=2 * 2**30,
    memory_bytes=80 * 2**30,
    energy_joules=1200.0,
    throttled_fraction=0.0,
)
MACHINE_WITH_GPU = dataclasses.replace(MACHINE, gpus=(H100,), hardware_class="linux-2c-1x-h100")


def run_on(device: str, runtime_seconds: float, **changes: Any) -> RunRecord:
    """Return a run of two rounds on one executor of the machine with a GPU."""
    states = (STATE,) if device == "gpu" else ()
    executor = make_executor(gpus=changes.pop("gpus", states))
    rounds = [make_round(seed, runtime_seconds, (executor,), accuracy_fraction=0.75) for seed in (1, 2)]
    workload = {**WORK, "device": device, **changes.pop("workload", {})}
    fields = {"environment": MACHINE_WITH_GPU, "profile": "full", "label": device, **changes}
    return make_run(*rounds, workload=workload, **fields)


def test_one_line_says_how_the_gpu_did() -> None:
    assert gpu_lines.gpu_lines([run_on("cpu", 20.0)]) == []
    _, line = gpu_lines.gpu_lines([run_on("cpu", 20.0), run_on("gpu", 4.0)])
    assert line == (
        f"  perf/test_a.py::test_quick gpu: 1 x {H100} (driver 580.159.04), utilisation 63 %, SM 1,900 MHz, 1,755 at "
        "least, memory 2,619 MHz, 312 W, at most 54 °C, 2.00 GiB at most, 1,200 J per run, 2.4 J per image"
    )
    silent = GpuState(name="A card", uuid="GPU-1", driver="", samples=0)
    assert gpu_lines.gpu_lines([run_on("gpu", 4.0, gpus=(silent,))])[1].endswith(": 1 x A card")


def test_energy_is_of_all_gpus_or_of_none() -> None:
    assert gpu_lines.energy_joules(run_on("gpu", 4.0, gpus=(STATE, STATE))) == 2400.0
    silent = dataclasses.replace(STATE, energy_joules=None)
    assert gpu_lines.energy_joules(run_on("gpu", 4.0, gpus=(STATE, silent))) is None
    assert gpu_lines.energy_joules(run_on("cpu", 4.0)) is None


def test_costs_come_from_given_prices_alone() -> None:
    runs = [run_on("cpu", 36.0), run_on("gpu", 3.6)]
    assert gpu_lines.costs(runs, {}) == []
    by_device = gpu_lines.costs(runs, {"cpu": 1.0, "gpu": 5.0})
    assert [(one.device, one.cost) for one in by_device] == [
        ("cpu", pytest.approx(0.01)),
        ("gpu", pytest.approx(0.005)),
    ]
    (by_name,) = gpu_lines.costs(runs, {"H100": 2.0})
    assert (by_name.device, by_name.price_per_hour) == ("gpu", 2.0)


@pytest.mark.parametrize(("gpu_price", "word"), [(9.99, "pays"), (10.01, "does not pay")])
def test_the_break_even_is_the_speed_up(gpu_price: float, word: str) -> None:
    runs = [run_on("cpu", 36.0), run_on("gpu", 3.6)]
    text = "\n".join(gpu_lines.price_lines(runs, {"cpu": 1.0, "gpu": gpu_price}))
    assert "10.00x as fast" in text and "less than 10.00 hours of the CPU's" in text
    assert f"({gpu_price:.2f}x an hour) it {word}: a training costs 1.00 of the CPU's" in text
    without = gpu_lines.price_lines(runs, {})
    assert "no price given" in without[0] and len(without) == 2 and "10.00x" in without[1]


def test_only_the_same_work_on_the_same_machine_is_compared() -> None:
    gpu = run_on("gpu", 4.0)
    shorter, elsewhere = run_on("cpu", 36.0, workload={"iterations": 30}), run_on("cpu", 36.0, environment=MACHINE)
    assert gpu_lines.pairs([gpu, shorter, elsewhere]) == []
    own, other = run_on("cpu", 40.0), run_on("cpu", 36.0, test_id="perf/test_b.py::test_quick")
    (pair,) = gpu_lines.pairs([other, own, gpu])
    assert pair.cpu is own and pair.ratio == pytest.approx(10.0)


def test_the_rows_of_2017_stand_above_today_s() -> None:
    torch = run_on("gpu", 2.0, workload={"framework": "torch", "model": "resnet20"}, label="trained")
    rows = reference.reference_table([torch, run_on("gpu", 4.0), run_on("cpu", 36.0)])
    assert [row[0].strip() for row in rows[1:]] == [
        "CaffeOnSpark cifar10_quick_solver, 2017",
        "caffe cifar10_quick",
        "CaffeOnSpark cifar10_quick_solver, 2017",
        "caffe cifar10_quick",
        'TensorFlowOnSpark "ImageNet", 2017',
        'TensorFlowOnSpark "ImageNet", 2017',
        "torch resnet20",
    ]
    assert rows[3][4:7] == ("580 s", "7.8x", "82 %")
    assert rows[4][1:] == (
        *("gpu", "1", "5000 x 100 (full)", "4.000 s, 1,200 J", "9.00x", "75.00 %", "2"),
        f"1 x {H100}, 2 cores CPU",
    )
    lines = reference.markdown_lines(rows)
    assert len(lines) == 9 and all(line.count("|") == len(reference.HEADERS) + 1 for line in lines)
    assert reference.has_both_devices([run_on("gpu", 4.0), run_on("cpu", 36.0)])
    assert not reference.has_both_devices([torch, run_on("gpu", 4.0)])


def test_the_command_reads_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "x.json"
    write_run_report(report, [run_on("cpu", 36.0), run_on("gpu", 4.0)], [], {}, outcomes={}, speedups={})
    assert cli.main(["table", str(report), "--price", "cpu=1/h,gpu=4.5/h"]) == 0
    text = capsys.readouterr().out
    assert "4,561 s" in text and "9.00x" in text and "a training costs 0.50 of the CPU's" in text
    assert "linux-2c-1x-h100: python 3.11, spark 4.0, driver 580.159.04; commit abc" in text
    assert cli.main(["table", "--markdown", str(report)]) == 0
    assert capsys.readouterr().out.startswith("| training | device |")
    assert cli.main(["table"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    (tmp_path / "bad.json").write_text("{}")
    assert cli.main(["table", str(tmp_path / "bad.json")]) == 2
    assert cli.main(["table", "--price", "cpu=free"]) == 2


@pytest.mark.parametrize(("fraction", "unstable"), [(0.019, False), (0.021, True), (None, False)])
def test_throttled_rounds_are_marked(fraction: float | None, unstable: bool) -> None:
    state = dataclasses.replace(STATE, throttled_fraction=fraction, throttle_reasons=("heat (hardware)",))
    found = disturbances(make_round(executors=(make_executor(gpus=(state,)),)))
    assert found == (
        [f"{H100} throttled 2% of the time (heat (hardware)), so its clock is not stable"] if unstable else []
    )


def test_errors_of_a_gpu_are_said() -> None:
    state = dataclasses.replace(STATE, errors=("XID 79",))
    assert disturbances(make_round(executors=(make_executor(gpus=(state,)),))) == [f"{H100}: XID 79"]


def test_records_with_and_without_gpus_are_read() -> None:
    run = run_on("gpu", 4.0)
    assert from_json(RunRecord, to_json(run)) == run
    older = to_json(run)
    for taken in older["rounds"]:
        for executor in taken["executors"]:
            del executor["gpus"]
    assert from_json(RunRecord, older).rounds[0].executors[0].gpus == ()


@pytest.mark.parametrize(
    "bad", ["", "cpu", "cpu=1", "cpu=0/h", "cpu=-1/h", "cpu=1/h,cpu=2/h", "=1/h", "cpu=x/h", "cpu=nan/h"]
)
def test_bad_prices(bad: str) -> None:
    from sparkgauge.config import prices

    with pytest.raises(ConfigurationError, match="DEVICE=PRICE/h"):
        prices(bad, "--gauge-price")

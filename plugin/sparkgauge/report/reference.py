"""The four rows of a 2017 report beside today's runs of the same models: runtime, GPU against CPU, accuracy, hardware.

The report measured CaffeOnSpark and TensorFlowOnSpark on CIFAR-10 (Spark 2.1 on YARN and HDFS, 4 worker machines of 8
virtual CPUs, 2 Tesla M60 cards, which are 4 GPUs). Its accuracies are quoted, and were probably not of the whole test
set: cifar10_quick reaches about 75 % there, and 82 % fits its best batch of 100 images. Today's are of the whole set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge import stats
from sparkgauge.gate import format_value
from sparkgauge.records import RunRecord
from sparkgauge.report.gpu_lines import energy_joules, pairs
from sparkgauge.store import DEFAULT_LABEL

HEADERS = ("training", "device", "executors", "work", "training + test", "GPU:CPU", "accuracy", "n", "hardware")
HARDWARE_2017 = "4 x 8 vCPU"
HARDWARE_2017_GPU = "4 x 8 vCPU, 2 x Tesla M60"


@dataclass(frozen=True)
class Reference:
    """One row of the 2017 report."""

    title: str
    framework: str
    """Today's framework and model, the same net and solver."""
    model: str
    device: str
    runtime_seconds: float
    speedup_ratio: float | None
    accuracy_text: str


REFERENCES = (
    Reference("CaffeOnSpark cifar10_quick_solver, 2017", "caffe", "cifar10_quick", "cpu", 4561, None, "-"),
    Reference("CaffeOnSpark cifar10_quick_solver, 2017", "caffe", "cifar10_quick", "gpu", 580, 7.8, "82 %"),
    Reference('TensorFlowOnSpark "ImageNet", 2017', "tensorflow", "cifar10_tutorial", "cpu", 343, None, "-"),
    Reference('TensorFlowOnSpark "ImageNet", 2017', "tensorflow", "cifar10_tutorial", "gpu", 145, 2.3, "86 %"),
)


def read_reports(paths: Sequence[Path]) -> list[RunRecord]:
    """Return the runs of ``--gauge-report`` files, in order; BaselineError names a file that is none."""
    from sparkgauge.baselines import read_report

    return [run for path in paths for run in read_report(path).runs]


def reference_table(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the table's rows, headers first: each row of 2017 with today's runs of the same training below it.

    Runs of other trainings follow. Runs without a valid round are left out.
    """
    measured = [run for run in runs if run.valid_rounds]
    ratios = {id(pair.gpu): pair.ratio for pair in pairs(measured)}
    rows: list[tuple[str, ...]] = [HEADERS]
    shown: set[int] = set()
    for reference in REFERENCES:
        rows.append(_reference_row(reference))
        for run in measured:
            if _is_of(run, reference):
                rows.append(_row(run, ratios.get(id(run))))
                shown.add(id(run))
    return [*rows, *(_row(run, ratios.get(id(run))) for run in measured if id(run) not in shown)]


def text_lines(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the table aligned, for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADERS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def markdown_lines(table: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return [lines[0], "|" + " --- |" * len(HEADERS), *lines[1:]]


def software_lines(runs: Sequence[RunRecord]) -> list[str]:
    """Return what the runs were measured with, one line for each different environment."""
    told = dict.fromkeys(_software(run) for run in runs if run.valid_rounds)
    return list(told)


def has_both_devices(runs: Sequence[RunRecord]) -> bool:
    """Return whether a training of 2017 was run on the CPU and on the GPU."""
    found = {(one.framework, one.model, one.device) for run in runs for one in REFERENCES if _is_of(run, one)}
    return any((framework, model, "cpu") in found and device == "gpu" for framework, model, device in found)


def _is_of(run: RunRecord, reference: Reference) -> bool:
    wanted = (reference.framework, reference.model, reference.device)
    return tuple(run.workload.get(name) for name in ("framework", "model", "device")) == wanted


def _reference_row(one: Reference) -> tuple[str, ...]:
    ratio = "" if one.speedup_ratio is None else f"{one.speedup_ratio:g}x"
    hardware = HARDWARE_2017_GPU if one.device == "gpu" else HARDWARE_2017
    return (one.title, one.device, "4", "", f"{one.runtime_seconds:,.0f} s", ratio, one.accuracy_text, "1", hardware)


def _row(run: RunRecord, ratio: float | None) -> tuple[str, ...]:
    workload, taken = run.workload, run.valid_rounds
    runtime = stats.mean([one.runtime_seconds for one in taken])
    accuracy = stats.mean([one.accuracy_fraction for one in taken], scale="difference")
    label = "" if run.label in (DEFAULT_LABEL, "cpu", "gpu") else f" ({run.label})"
    note = " (synthetic data)" if run.data.kind == "synthetic" else ""
    joules = energy_joules(run)
    energy = "" if joules is None else f", {joules:,.0f} J"
    return (
        f"  {workload.get('framework')} {workload.get('model')}{label}{note}",
        str(workload.get("device")),
        str(workload.get("executors")),
        _work(run),
        f"{format_value(runtime, 's')}{energy}",
        "" if ratio is None else f"{ratio:.2f}x",
        f"{accuracy:.2%}".replace("%", " %"),
        str(len(taken)),
        _hardware(run),
    )


def _work(run: RunRecord) -> str:
    """Return how long the training is: steps or epochs, and images a step."""
    workload = run.workload
    steps, epochs = workload.get("iterations"), workload.get("epochs")
    length = f"{steps} x" if steps is not None else f"{epochs:g} epochs x" if epochs is not None else "own length x"
    return f"{length} {workload.get('batch_size')} ({run.profile})"


def _hardware(run: RunRecord) -> str:
    environment: Any = run.environment
    own = [state.name for taken in run.valid_rounds[:1] for executor in taken.executors for state in executor.gpus]
    names = own if run.workload.get("device") == "gpu" and own else []
    if run.workload.get("device") == "gpu" and not names:
        names = list(environment.gpus)
    gpus = [f"{count} x {name}" for name, count in sorted(Counter(names).items())]
    return ", ".join([*gpus, f"{environment.cores} cores {environment.cpu_model}"])


def _software(run: RunRecord) -> str:
    software = run.environment.software
    kept = ("python", "java", "spark", "tensorflow", "tensorflowonspark", "torch")
    drivers = {one.driver for taken in run.valid_rounds for ex in taken.executors for one in ex.gpus if one.driver}
    versions = [f"{name} {software[name]}" for name in kept if name in software]
    versions += [f"driver {one}" for one in sorted(drivers)]
    return f"{run.environment.hardware_class}: {', '.join(versions)}; commit {run.commit[:12] or 'unknown'}"

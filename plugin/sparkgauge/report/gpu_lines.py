"""What a session says of its GPUs: how busy, how fast, how hot, what they used, and what a training costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparkgauge import stats
from sparkgauge.records import GpuState, RunRecord
from sparkgauge.store import DEFAULT_LABEL

SECONDS_PER_HOUR = 3600.0

SAME_WORK = ("framework", "model", "iterations", "epochs", "batch_size", "test_every", "options")
"""Fields of a workload in which two trainings must agree for their runtimes to be a ratio of devices."""


@dataclass(frozen=True)
class Cost:
    """What one training + test costs."""

    test_id: str
    label: str
    device: str
    price_per_hour: float
    """Of the whole machine, as it was given."""
    cost: float
    """Of one round, in the price's currency."""


@dataclass(frozen=True)
class Pair:
    """The same work on the CPU and on the GPU of one machine."""

    cpu: RunRecord
    gpu: RunRecord

    @property
    def ratio(self) -> float:
        """Return how many times as fast the GPU is: also how many times the price of an hour at which it pays."""
        return _runtime_seconds(self.cpu) / _runtime_seconds(self.gpu)


def gpu_lines(runs: Sequence[RunRecord]) -> list[str]:
    """Return one line for each run whose GPUs were watched."""
    found = [(run, [one for taken in run.valid_rounds for one in _states_of(taken)]) for run in runs]
    lines = [f"  {_name(run)}: {_described(run, states)}" for run, states in found if states]
    return ["GPUs while training (mean of rounds and executors):", *lines] if lines else []


def energy_joules(run: RunRecord) -> float | None:
    """Return the mean energy of a round over all its GPUs; None where a GPU did not tell."""
    totals = [_total(one.energy_joules for one in _states_of(taken)) for taken in run.valid_rounds]
    known = [total for total in totals if total is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(totals) else None


def energy_per_image_joules(run: RunRecord) -> float | None:
    """Return the mean energy of a round over the training images it went through."""
    joules = energy_joules(run)
    images = [sum(one.train_images for one in taken.executors) for taken in run.valid_rounds]
    return None if joules is None or not sum(images) else joules / (sum(images) / len(images))


def costs(runs: Sequence[RunRecord], prices: Mapping[str, float]) -> list[Cost]:
    """Return what each run's training costs, where its machine has a price."""
    priced = [(run, _price(run, prices)) for run in runs if run.valid_rounds]
    return [
        Cost(run.test_id, run.label, _device(run), price, _runtime_seconds(run) / SECONDS_PER_HOUR * price)
        for run, price in priced
        if price is not None
    ]


def pairs(runs: Sequence[RunRecord]) -> list[Pair]:
    """Return every GPU run with the CPU run of the same work, on the same machine, preferring one of its own test."""
    measured = [run for run in runs if run.valid_rounds]
    found = []
    for run in measured:
        alike = [one for one in measured if _device(run) == "gpu" and _device(one) == "cpu" and _same(one, run)]
        alike.sort(key=lambda one: (one.test_id != run.test_id, one.workload.get("executors") != _executors(run)))
        found += [Pair(alike[0], run)] if alike else []
    return found


def price_lines(runs: Sequence[RunRecord], prices: Mapping[str, float]) -> list[str]:
    """Return costs and break-even ratios; without ``prices`` the ratios alone, without pairs nothing."""
    lines = [
        f"  {one.test_id}{_label(one.label)}: {one.cost:.3g} per training, at {one.price_per_hour:g}/h"
        for one in costs(runs, prices)
    ]
    lines += [f"  {line}" for pair in pairs(runs) for line in _worth(pair, prices)]
    if not lines:
        return []
    given = ", ".join(f"{device} {price:g}/h" for device, price in prices.items())
    return [f"is the GPU worth its price ({given or 'no price given: --gauge-price cpu=…/h,gpu=…/h'}):", *lines]


def _worth(pair: Pair, prices: Mapping[str, float]) -> Iterator[str]:
    yield (
        f"{_name(pair.gpu)}: {pair.ratio:.2f}x as fast as {_label(pair.cpu.label).strip() or 'the CPU'}; it pays while "
        f"an hour of its machine costs less than {pair.ratio:.2f} hours of the CPU's"
    )
    cpu, gpu = _price(pair.cpu, prices), _price(pair.gpu, prices)
    if cpu is not None and gpu is not None:
        share = gpu / cpu / pair.ratio
        verdict = "pays" if share < 1 else "does not pay"
        yield f"  at these prices ({gpu / cpu:.2f}x an hour) it {verdict}: a training costs {share:.2f} of the CPU's"


def _described(run: RunRecord, states: Sequence[GpuState]) -> str:
    first = states[0]
    count = len({one.uuid for one in states})
    parts = [f"{count} x {first.name}" + (f" (driver {first.driver})" if first.driver else "")]
    parts += _figure("utilisation {:.0%}", _mean(states, lambda one: one.utilisation_fraction))
    parts += _figure("SM {:,.0f} MHz", _mean(states, lambda one: one.sm_clock_mhz))
    parts += _figure("{:,.0f} at least", _extreme(min, states, lambda one: one.sm_clock_least_mhz))
    parts += _figure("memory {:,.0f} MHz", _mean(states, lambda one: one.memory_clock_mhz))
    parts += _figure("{:.0f} W", _mean(states, lambda one: one.power_watts))
    parts += _figure("at most {:.0f} °C", _extreme(max, states, lambda one: one.temperature_celsius))
    peak_bytes = _extreme(max, states, lambda one: one.memory_peak_bytes)
    parts += _figure("{:.2f} GiB at most", None if peak_bytes is None else peak_bytes / 2**30)
    parts += _figure("{:,.0f} J per run", energy_joules(run))
    parts += _figure("{:.3g} J per image", energy_per_image_joules(run))
    return ", ".join(parts).replace("%", " %")


def _figure(template: str, value: float | None) -> list[str]:
    return [] if value is None else [template.format(value)]


Of = Callable[[GpuState], "float | None"]


def _mean(states: Sequence[GpuState], of: Of) -> float | None:
    known = [value for one in states if (value := of(one)) is not None]
    return math.fsum(known) / len(known) if known else None


def _extreme(choose: Callable[..., Any], states: Sequence[GpuState], of: Of) -> float | None:
    known = [value for one in states if (value := of(one)) is not None]
    return float(choose(known)) if known else None


def _total(values: Iterator[float | None]) -> float | None:
    listed = list(values)
    return None if not listed or None in listed else math.fsum(value for value in listed if value is not None)


def _states_of(taken: Any) -> list[GpuState]:
    return [state for executor in taken.executors for state in executor.gpus]


def _price(run: RunRecord, prices: Mapping[str, float]) -> float | None:
    """Return the price of an hour of the run's machine: by the name of its GPUs, or by its device."""
    device = _device(run)
    named = [price for name, price in prices.items() if device == "gpu" and any(name in one for one in _gpu_names(run))]
    return named[0] if named else prices.get(device)


def _gpu_names(run: RunRecord) -> tuple[str, ...]:
    return run.environment.gpus


def _same(one: RunRecord, other: RunRecord) -> bool:
    work = all(one.workload.get(name) == other.workload.get(name) for name in SAME_WORK)
    return work and one.environment.hardware_class == other.environment.hardware_class and one.data == other.data


def _runtime_seconds(run: RunRecord) -> float:
    return stats.mean([one.runtime_seconds for one in run.valid_rounds])


def _device(run: RunRecord) -> str:
    return str(run.workload.get("device", ""))


def _executors(run: RunRecord) -> Any:
    return run.workload.get("executors")


def _label(label: str) -> str:
    return "" if label == DEFAULT_LABEL else f" {label}"


def _name(run: RunRecord) -> str:
    return f"{run.test_id}{_label(run.label)}"

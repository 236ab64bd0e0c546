"""Watches the GPUs of an executor while it trains: clocks, power, heat, memory, energy, errors, ten times a second."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sparkgauge import gpu, nvml
from sparkgauge.nvml import Device, Probe, Reading
from sparkgauge.phases import WITHIN_STEPS
from sparkgauge.records import GpuState

INTERVAL_SECONDS = 0.1
"""NVML's own figures for power and utilisation are renewed every 20 to 100 ms."""


@dataclass
class _Watched:
    device: Device
    probe: Probe
    readings: list[tuple[str, Reading]] = field(default_factory=list)
    """With the phase that the training was in."""


class GpuWatch:
    """Samples the GPUs that this process may use, in a thread, from :meth:`start` to :meth:`stop`."""

    def __init__(self, phase: Callable[[], str], interval_seconds: float = INTERVAL_SECONDS) -> None:
        """``phase()`` tells what the training is doing."""
        self._phase, self._interval_seconds = phase, interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sparkgauge-gpus", daemon=True)
        self._began = time.monotonic()
        self._watched: list[_Watched] = []

    def start(self) -> GpuWatch:
        """Begin, at once: loading NVML, 0.1 s, is the thread's. Without a GPU that can be asked nothing is sampled."""
        self._thread.start()
        return self

    def stop(self) -> tuple[GpuState, ...]:
        """Look for the last time and return what was seen; nothing when called again."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._look()
        watched, self._watched = self._watched, []
        for one in watched:
            one.probe.close()
        return tuple(state_of(one.device, one.readings, time.monotonic() - self._began) for one in watched)

    def _sample(self) -> None:
        with contextlib.suppress(nvml.NvmlError):
            wanted = gpu.visible_uuids()
            self._watched = [_Watched(one, nvml.probe(one.uuid)) for one in nvml.devices() if one.uuid in wanted]
        self._look()
        while self._watched and not self._ended.wait(self._interval_seconds):
            self._look()

    def _look(self) -> None:
        for one in self._watched:
            one.readings.append((self._phase(), one.probe.read()))


def state_of(device: Device, readings: Sequence[tuple[str, Reading]], seconds: float) -> GpuState:
    """Return what ``readings`` (phase, reading) of ``seconds`` say of a GPU, the first and last of them included."""
    everything = [reading for _, reading in readings]
    shown = [reading for phase, reading in readings if phase in WITHIN_STEPS] or everything
    bits = [reading.throttle_bits for reading in everything]
    clocks = [one.sm_clock_mhz for one in shown if one.sm_clock_mhz is not None]
    return GpuState(
        name=device.name,
        uuid=device.uuid,
        driver=device.driver,
        samples=len(shown),
        utilisation_fraction=_mean(one.utilisation_fraction for one in shown),
        sm_clock_mhz=_mean(clocks),
        sm_clock_least_mhz=min(clocks, default=None),
        memory_clock_mhz=_mean(one.memory_clock_mhz for one in shown),
        power_watts=_mean(one.power_watts for one in shown),
        temperature_celsius=_most(one.temperature_celsius for one in everything),
        memory_peak_bytes=_whole(_most(one.used_bytes for one in everything)),
        memory_bytes=device.memory_bytes,
        energy_joules=_energy_joules(everything, seconds),
        throttled_fraction=sum(any(bit & one for bit in nvml.THROTTLES) for one in bits) / len(bits) if bits else None,
        throttle_reasons=tuple(_reasons(bits)),
        errors=tuple(_errors(everything)),
    )


def _energy_joules(readings: Sequence[Reading], seconds: float) -> float | None:
    counted = [one.energy_joules for one in readings if one.energy_joules is not None]
    if len(counted) > 1 and counted[-1] >= counted[0]:
        return counted[-1] - counted[0]
    power = _mean(one.power_watts for one in readings)
    return None if power is None else power * seconds


def _reasons(bits: Sequence[int]) -> list[str]:
    found = [name for bit, name in nvml.THROTTLES.items() if any(bit & one for one in bits)]
    return [*found, "power cap"] if any(nvml.POWER_CAP & one for one in bits) else found


def _errors(readings: Sequence[Reading]) -> list[str]:
    counted = [one.ecc_errors for one in readings if one.ecc_errors is not None]
    grown = counted[-1] - counted[0] if counted else 0
    found = [f"{grown} uncorrected memory error{'s' if grown > 1 else ''} (ECC)"] if grown > 0 else []
    return [*found, *(f"XID {number}" for number in dict.fromkeys(x for one in readings for x in one.xids))]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)

"""What is sampled of a GPU during a round, and what an executor says when its GPU fails it."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from plugin.tests.played_nvml import Card, PlayedNvml
from plugin.tests.plugin_runs import make_job
from sparkgauge import device, executor, nvml
from sparkgauge.channel import DriverChannel
from sparkgauge.errors import MachineError
from sparkgauge.gpu_watch import GpuWatch, state_of
from sparkgauge.nvml import Device, Reading
from sparkgauge.phases import PhaseClock

ON_GPU = make_job(executors=1, device="gpu", iterations=1)
DEVICE = Device(0, "A card", "GPU-0", memory_bytes=1000, driver="580")


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """Put two cards into the machine, of which this process sees the second."""
    cards = [Card(), Card(uuid="GPU-bbbb-2", used=2**30, xids=[79])]
    monkeypatch.setitem(sys.modules, "pynvml", PlayedNvml(*cards))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb-2")
    return cards


def test_only_the_process_s_own_gpu_is_watched(cards: list[Card]) -> None:
    phase = ["launch"]
    watch = GpuWatch(lambda: phase[0], interval_seconds=0.001).start()
    phase[0] = "compute"
    deadline = time.monotonic() + 20
    while len(watch._watched[0].readings) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    cards[1].ecc = 2
    (state,) = watch.stop()
    assert watch.stop() == ()
    assert (state.uuid, state.name, state.driver) == ("GPU-bbbb-2", "NVIDIA H100 80GB HBM3", "580.159.04")
    assert state.samples >= 3
    assert (state.utilisation_fraction, state.power_watts, state.temperature_celsius) == (0.9, 300.0, 54)
    assert (state.sm_clock_mhz, state.sm_clock_least_mhz, state.memory_clock_mhz) == (1980, 1980, 2619)
    assert (state.memory_peak_bytes, state.memory_bytes) == (2**30, 80 * 2**30)
    assert state.energy_joules is not None and state.energy_joules >= 4  # one at each of at least five looks
    assert state.errors == ("2 uncorrected memory errors (ECC)", "XID 79")
    assert not any(thread.name == "sparkgauge-gpus" for thread in threading.enumerate())


def test_what_a_gpu_does_not_tell_is_none(cards: list[Card]) -> None:
    hidden = cards[1]
    hidden.power = hidden.energy = hidden.ecc = hidden.clock = None
    state = GpuWatch(lambda: "compute").start().stop()[0]
    assert (state.power_watts, state.energy_joules, state.sm_clock_mhz, state.sm_clock_least_mhz) == (None,) * 4
    assert state.errors == ("XID 79",)


def test_without_the_library_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", PlayedNvml(init_error=9))
    assert GpuWatch(lambda: "compute").start().stop() == ()


def test_figures_are_of_the_training_but_energy_and_heat_of_the_whole_round() -> None:
    readings = [
        ("launch", Reading(utilisation_fraction=0.0, temperature_celsius=40, energy_joules=10.0)),
        ("compute", Reading(utilisation_fraction=0.8, temperature_celsius=80, throttle_bits=0x40)),
        ("feed", Reading(utilisation_fraction=0.6, temperature_celsius=70, throttle_bits=0x4)),
        ("collect", Reading(utilisation_fraction=0.1, temperature_celsius=60, energy_joules=110.0)),
    ]
    state = state_of(DEVICE, readings, seconds=2.0)
    assert (state.samples, state.energy_joules, state.temperature_celsius) == (2, 100.0, 80)
    assert state.utilisation_fraction == pytest.approx(0.7)
    assert (state.throttled_fraction, state.throttle_reasons) == (0.25, ("heat (hardware)", "power cap"))
    without_counter = [("compute", Reading(power_watts=100.0)), ("compute", Reading(power_watts=200.0))]
    assert state_of(DEVICE, without_counter, seconds=2.0).energy_joules == pytest.approx(300.0)
    assert state_of(DEVICE, [], seconds=0.0).throttled_fraction is None


def test_the_device_is_waited_for_where_training_begins_and_ends_not_within_steps() -> None:
    clock, waits = PhaseClock(), []
    clock.synchronise = lambda: waits.append(clock.phase)
    for phase in ("feed", "warmup", "feed", "compute", "sync", "feed", "compute", "evaluate", "evaluate", "collect"):
        clock.switch(phase)
    clock.seconds()
    assert waits == ["launch", "feed", "warmup", "compute", "evaluate"]


def test_who_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    handle = SimpleNamespace(synchronise=lambda: waited.append("handle"))
    device.synchroniser("gpu", handle)()
    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: waited.append("torch"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    device.synchroniser("gpu")()
    device.synchroniser("cpu")()
    cuda.is_initialized = lambda: False
    device.synchroniser("gpu")()
    assert waited == ["handle", "torch"]


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 40.00 GiB. GPU 0 has a total capacity of 79.18 GiB."


def test_out_of_memory_says_which_batch_fits(cards: list[Card]) -> None:
    cards[1].used = 60 * 2**30
    job = replace(ON_GPU, global_batch=4096, executors=2)
    told = device.explained(RuntimeError(OUT_OF_MEMORY), job)
    assert isinstance(told, MachineError) and "\n" not in str(told)
    assert str(told).startswith("Out of GPU memory: expected a global batch that fits into 80.0 GiB per GPU, got ")
    assert "batch_size=4096 on 2 executors, 60.0 GiB in use, 40960 MiB more asked for" in str(told)
    assert "batch_size=2048 fits" in str(told)


@pytest.mark.parametrize(
    ("images", "total", "needed", "batch"),
    [(64, 100, 101, 32), (64, 100, 200, 32), (64, 100, 201, 16), (64, 100, 6401, 1), (1, 100, 200, 1), (64, 0, 0, 32)],
)
def test_the_batch_that_fits(images: int, total: int, needed: int, batch: int) -> None:
    assert device.fitting_batch(images, total, needed) == batch


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "The framework is built for another"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "The framework is built for another"),
        ("CUDA error: uncorrectable ECC error encountered", "The GPU failed"),
    ],
)
def test_cuda_s_errors_in_plain_words(text: str, summary: str, cards: list[Card]) -> None:
    told = device.explained(RuntimeError(f"{text}\nmore"), ON_GPU)
    assert isinstance(told, MachineError) and str(told).startswith(summary) and "more" not in str(told)
    if "built" in summary:
        assert "driver 580.159.04 supports CUDA up to 13.0" in str(told)
    error = RuntimeError(text)
    assert device.explained(error, replace(ON_GPU, device="cpu")) is error
    assert device.explained(other := ValueError("no such column"), ON_GPU) is other


def test_the_executor_reports_the_plain_words(cards: list[Card]) -> None:
    def train(context: Any, shard: Any) -> None:
        raise AssertionError("unreachable")

    def prepare() -> None:
        raise RuntimeError(OUT_OF_MEMORY)

    with DriverChannel() as channel:
        with pytest.raises(RuntimeError, match="out of memory"):
            executor.run(replace(ON_GPU, address=channel.address), 0, train, prepare=prepare)
        assert channel.inbox.get(timeout=5)["kind"] == "hello"
        error = channel.inbox.get(timeout=5)
    assert error["kind"] == "error" and error["summary"].startswith("MachineError: Out of GPU memory")
    assert not any(thread.name == "sparkgauge-gpus" for thread in threading.enumerate())


@pytest.mark.parametrize(("addresses", "on"), [((), "gpu"), (("GPU-0",), "gpu"), ((), "cpu")])
def test_an_executor_without_a_gpu_is_refused(addresses: tuple[str, ...], on: str) -> None:
    job = replace(ON_GPU, device=on)
    if addresses or on == "cpu":
        device.refuse_without_gpu(addresses, job)
    else:
        with pytest.raises(MachineError, match="Spark gave this executor no GPU"):
            device.refuse_without_gpu(addresses, job)


def test_an_unknown_gpu_cannot_be_watched(cards: list[Card]) -> None:
    with pytest.raises(nvml.NvmlError, match="no GPU GPU-zzzz"):
        nvml.probe("GPU-zzzz")
    assert sys.modules["pynvml"].opened == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("loopback", "shares_gpus"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_collectives_read_from_the_environment(
    loopback: bool, shares_gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_HOSTID"):
        monkeypatch.setenv(name, "the user's")
    device.set_up_collectives(replace(ON_GPU, loopback=loopback, shares_gpus=shares_gpus))
    interface = "lo" if loopback else "the user's"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == interface
    host = os.environ["NCCL_HOSTID"]
    assert host.endswith(f"-{os.getpid()}") if shares_gpus else host == "the user's"  # two processes must differ

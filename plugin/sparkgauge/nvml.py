"""What NVIDIA's management library says: which GPUs there are, and how one of them is doing now.

The package nvidia-ml-py (module ``pynvml``) is imported inside functions; it loads ``libnvidia-ml.so`` of the driver.
:data:`PLAYED_VARIABLE` replaces the library by a file, so that scheduling and reports can be tried without a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sparkgauge.errors import ConfigurationError

PLAYED_VARIABLE = "SPARKGAUGE_FAKE_GPUS"
"""Environment variable: a JSON file with the list of GPUs to play, each an object with fields of :class:`Device` and
:class:`Reading`. The real library is not asked then."""

THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Reasons (nvml.h: nvmlClocksEventReason*) for lower clocks that no workload asks for: such rounds are unstable."""
POWER_CAP = 0x4
"""The card's own power limit: usual under full load on cards that can draw more than they may."""


class NvmlError(Exception):
    """The library cannot be asked; the text is the reason, in one clause."""


@dataclass(frozen=True)
class Device:
    """A GPU, or a MIG instance of one, as CUDA can be told to use it."""

    index: int
    """Of the whole card, in the order of the PCI bus."""
    name: str
    uuid: str
    bus_id: str = ""
    memory_bytes: int | None = None
    used_bytes: int | None = None
    """By anybody, now."""
    process_count: int | None = None
    """Processes computing on it that this one can see; a container sees only its own."""
    mig: bool | None = None
    """Whether the card is cut into MIG instances; None where it cannot be."""
    driver: str = ""
    cuda: str = ""
    """The newest CUDA that the driver supports, e.g. ``13.0``."""


@dataclass(frozen=True)
class Reading:
    """One look at a GPU; None for what this GPU does not tell."""

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    utilisation_fraction: float | None = None
    """Share of the last sampling period (a sixth of a second to a second) in which a kernel ran."""
    used_bytes: int | None = None
    throttle_bits: int = 0
    """Of nvml.h: nvmlClocksEventReason*."""
    energy_joules: float | None = None
    """Since the driver was loaded."""
    ecc_errors: int | None = None
    """Uncorrected memory errors since the driver was loaded."""
    xids: tuple[int, ...] = ()
    """Critical errors that the driver has logged since the last look."""


class Probe(Protocol):
    """Watches one GPU."""

    def read(self) -> Reading:
        """Return how it is doing now."""
        ...

    def close(self) -> None:
        """Let go of the library."""
        ...


def devices() -> tuple[Device, ...]:
    """Return every GPU (and MIG instance) in the order of the PCI bus, hidden ones too; NvmlError says why not."""
    if played := played_devices():
        return tuple(device for device, _ in played)
    with _opened() as nvml:
        cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        found = [one for index, card in enumerate(cards) for one in _of_card(nvml, index, card)]
    return tuple(found)


def probe(uuid: str) -> Probe:
    """Return a watch on the GPU with this UUID; NvmlError where there is none."""
    for device, reading in played_devices():
        if device.uuid == uuid:
            return _Played(reading)
    return _Watched(uuid)


def played_devices() -> tuple[tuple[Device, Reading], ...]:
    """Return the GPUs of :data:`PLAYED_VARIABLE`'s file; empty where the variable is not set."""
    name = os.environ.get(PLAYED_VARIABLE)
    if not name:
        return ()
    try:
        listed = json.loads(Path(name).read_text(encoding="utf-8"))
        return tuple(_played(index, fields) for index, fields in enumerate(listed))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"Bad file in {PLAYED_VARIABLE}",
            expected="a JSON list of objects with fields such as name, uuid, memory_bytes",
            actual=f"{type(error).__name__}: {error}",
            where=name,
        ) from None


def _played(index: int, fields: dict[str, Any]) -> tuple[Device, Reading]:
    of_device = {name: value for name, value in fields.items() if name in Device.__dataclass_fields__}
    of_reading = {name: value for name, value in fields.items() if name not in of_device or name == "used_bytes"}
    device = Device(**{"index": index, "name": "played GPU", "uuid": f"GPU-played-{index}", **of_device})
    return device, replace(Reading(**of_reading), xids=tuple(of_reading.get("xids", ())))


class _Played:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def read(self) -> Reading:
        return self._reading

    def close(self) -> None:
        return None


class _Watched:
    """A real GPU."""

    def __init__(self, uuid: str) -> None:
        self._stack = contextlib.ExitStack()
        self._nvml = self._stack.enter_context(_opened())
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            self.close()
            raise NvmlError(f"no GPU {uuid}: {error}") from None
        self._events = self._register()

    def read(self) -> Reading:
        nvml, handle, ask = self._nvml, self._handle, self._ask
        energy, power = ask(nvml.nvmlDeviceGetTotalEnergyConsumption), ask(nvml.nvmlDeviceGetPowerUsage)
        memory, rates = ask(nvml.nvmlDeviceGetMemoryInfo), ask(nvml.nvmlDeviceGetUtilizationRates)
        return Reading(
            sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            power_watts=None if power is None else power / 1e3,
            temperature_celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            utilisation_fraction=None if rates is None else rates.gpu / 100,
            used_bytes=None if memory is None else int(memory.used),
            throttle_bits=int(self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0),
            energy_joules=None if energy is None else energy / 1e3,
            ecc_errors=ask(
                nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
            xids=self._xids(handle),
        )

    def close(self) -> None:
        self._stack.close()

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the GPU answers, None where it does not know (a MIG instance has no clock of its own)."""
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def _register(self) -> Any:
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError:
            return None
        self._stack.callback(self._quietly, nvml.nvmlEventSetFree, events)
        self._quietly(nvml.nvmlDeviceRegisterEvents, self._handle, nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _quietly(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            function(*arguments)

    def _xids(self, handle: Any) -> tuple[int, ...]:
        """Return the critical errors that have come up since the last look; at most a hundred of them."""
        found: list[int] = []
        with contextlib.suppress(self._nvml.NVMLError):  # a time-out says that there is none
            while self._events is not None and len(found) < 100:
                found.append(int(self._nvml.nvmlEventSetWait_v2(self._events, 0).eventData))
        return tuple(found)


@contextlib.contextmanager
def _opened() -> Iterator[Any]:
    """Yield ``pynvml``, initialised; NvmlError says why it cannot be."""
    try:
        import pynvml as nvml
    except ImportError:
        raise NvmlError("the package nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NvmlError(_reason(nvml, error)) from None
    try:
        yield nvml
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _reason(nvml: Any, error: Any) -> str:
    known = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "the driver's library libnvidia-ml.so is not installed",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
        nvml.NVML_ERROR_NO_PERMISSION: "this user may not talk to the NVIDIA driver",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated, its old module is still loaded",
    }
    return known.get(getattr(error, "value", None), f"NVIDIA's management library says: {error}")


def _of_card(nvml: Any, index: int, card: Any) -> Iterator[Device]:
    """Yield the card, or its MIG instances: of a card that is cut up CUDA can use these alone."""
    mode = _or_none(nvml, nvml.nvmlDeviceGetMigMode, card)
    is_cut = None if mode is None else mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
    whole = replace(_described(nvml, index, card), mig=is_cut)
    if not is_cut:
        yield whole
        return
    for number in range(_or_none(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0):
        part = _or_none(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, number)
        if part is not None:
            yield replace(_described(nvml, index, part), mig=True, bus_id=whole.bus_id)


def _described(nvml: Any, index: int, handle: Any) -> Device:
    memory = _or_none(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    processes = _or_none(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    bus = _or_none(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    version = _or_none(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2) or 0
    return Device(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        bus_id="" if bus is None else _text(bus.busId).lower(),
        memory_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        process_count=None if processes is None else len(processes),
        driver=_text(_or_none(nvml, nvml.nvmlSystemGetDriverVersion) or ""),
        cuda=f"{version // 1000}.{version % 1000 // 10}" if version else "",
    )


def _or_none(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

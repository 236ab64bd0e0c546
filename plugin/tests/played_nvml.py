"""NVIDIA's management library as nvidia-ml-py presents it, played: its functions, its errors, its odd corners."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As in nvidia-ml-py: the number is in ``value``."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class Card:
    """A card; None where the real one would answer "not supported"."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-aaaa-1"
    bus: bytes = b"00000000:3B:00.0"
    total: int = 80 * 2**30
    used: int = 2**29
    processes: int = 0
    mig: list[Card] | None = None
    """Instances; an empty list is a card that could be cut up and is not."""
    power: int | None = 300_000
    energy: int | None = 5_000_000
    """Millijoules; grows by one joule at every look."""
    throttle: int = 0
    ecc: int | None = 0
    clock: int | None = 1980
    xids: list[int] = field(default_factory=list)


class PlayedNvml:
    """Stands for the module ``pynvml``."""

    NVMLError = NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_DRIVER_NOT_LOADED = 12, 9
    NVML_ERROR_NO_PERMISSION, NVML_ERROR_LIB_RM_VERSION_MISMATCH = 4, 18
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlEventTypeXidCriticalError = 8

    def __init__(self, *cards: Card, init_error: int = 0) -> None:
        self.cards, self.init_error, self.opened = cards, init_error, 0

    def nvmlInit(self) -> None:
        if self.init_error:
            raise NVMLError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        every = [part for card in self.cards for part in (card, *(card.mig or ()))]
        return _known(next((card for card in every if card.uuid == uuid), None))

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        return [int(bool(_known(card.mig)))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        parts = card.mig or []
        return _known(parts[index] if index < len(parts) else None)

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        return SimpleNamespace(total=card.total, used=card.used)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[int]:
        return list(range(card.processes))

    def nvmlDeviceGetPciInfo(self, card: Card) -> Any:
        return SimpleNamespace(busId=card.bus)

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13000

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetName(self, card: Card) -> bytes:
        return card.name.encode()  # older versions of the package answer in bytes

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, card: Card) -> int:
        card.energy = _known(card.energy) + 1000
        return card.energy

    def nvmlDeviceGetPowerUsage(self, card: Card) -> int:
        return _known(card.power)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:
        return SimpleNamespace(gpu=90, memory=40)

    def nvmlDeviceGetClockInfo(self, card: Card, kind: int) -> int:
        return _known(card.clock) if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetTemperature(self, card: Card, kind: int) -> int:
        return 54

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: Card) -> int:
        return card.throttle

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, counter: int) -> int:
        return _known(card.ecc)

    def nvmlEventSetCreate(self) -> list[Card]:
        return []

    def nvmlDeviceRegisterEvents(self, card: Card, kinds: int, events: list[Card]) -> None:
        events.append(card)

    def nvmlEventSetFree(self, events: list[Card]) -> None:
        events.clear()

    def nvmlEventSetWait_v2(self, events: list[Card], timeout_ms: int) -> Any:
        assert timeout_ms == 0
        waiting = next((card.xids for card in events if card.xids), None)
        return SimpleNamespace(eventData=_known(waiting).pop(0))


def _known(value: Any) -> Any:
    if value is None:
        raise NVMLError(3)
    return value

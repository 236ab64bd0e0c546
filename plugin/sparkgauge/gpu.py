"""NVIDIA GPUs of this machine as the driver lists them, found without importing a framework or starting a tool."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparkgauge.errors import MachineError

DRIVER_FOLDER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    uuid: str
    bus_id: str


def detect(folder: Path = DRIVER_FOLDER) -> tuple[Gpu, ...]:
    """Return the GPUs that the NVIDIA driver knows and CUDA_VISIBLE_DEVICES does not hide; empty without any."""
    entries = sorted((folder / "gpus").glob("*/information"))
    gpus = [_read(index, entry) for index, entry in enumerate(entries)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    chosen = set(_chosen(visible, gpus))
    return tuple(one for one in gpus if one.index in chosen)


def why_none(folder: Path = DRIVER_FOLDER) -> str:
    """Return why :func:`detect` finds nothing, in one clause."""
    if not folder.exists():
        return "no NVIDIA driver is loaded (/proc/driver/nvidia is missing)"
    if not list((folder / "gpus").glob("*")):
        return "the NVIDIA driver lists no GPU"
    return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r} hides all GPUs"


def require(count: int) -> None:
    """Raise MachineError when fewer than ``count`` GPUs are there."""
    found = detect()
    if len(found) < count:
        raise MachineError(
            "device='gpu' needs a GPU for every executor",
            expected=f"{count} GPU{'s' if count > 1 else ''}",
            actual=f"{len(found)}" if found else f"none: {why_none()}",
            hint="Run with -m 'not gpu', or on a machine with an NVIDIA driver.",
        )


def _chosen(visible: str, gpus: list[Gpu]) -> Iterator[int]:
    """Yield the indices that CUDA_VISIBLE_DEVICES names; CUDA ignores all that follows a name that it does not know."""
    for item in visible.split(","):
        name = item.strip()
        index = next(
            (one.index for one in gpus if name and (str(one.index) == name or one.uuid.startswith(name))), None
        )
        if index is None:
            return
        yield index


def _read(index: int, information: Path) -> Gpu:
    text = information.read_text(encoding="utf-8", errors="replace")
    fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", text, flags=re.MULTILINE))
    return Gpu(index, fields.get("Model", "unknown"), fields.get("GPU UUID", ""), information.parent.name)

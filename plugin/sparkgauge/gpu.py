"""GPUs of this machine: found through NVIDIA's management library, or the driver's files where that is missing.

No framework is imported and no tool is started. What CUDA_VISIBLE_DEVICES hides is not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparkgauge import nvml
from sparkgauge.errors import MachineError
from sparkgauge.nvml import Device

Gpu = Device
"""One GPU, or one MIG instance."""

DRIVER_FOLDER = Path("/proc/driver/nvidia")
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
NONE_VISIBLE = "-1"
"""Hides all GPUs from CUDA; so does an empty value, but some libraries take that for unset."""

BUSY_FRACTION = 0.1
"""Of a GPU's memory in use before anything of ours runs: a display server takes a hundredth of a card's, a training
more than a tenth."""

_ROOT = Path("/")
_VENDORS = {"0x1002": "AMD", "0x8086": "Intel", "0x10de": "NVIDIA"}
_NVIDIA = "0x10de"


def detect(folder: Path = DRIVER_FOLDER) -> tuple[Gpu, ...]:
    """Return the GPUs that the NVIDIA driver knows and CUDA_VISIBLE_DEVICES does not hide; empty without any."""
    gpus = _all(folder)
    visible = os.environ.get(VISIBLE_VARIABLE)
    if visible is None:
        return gpus
    chosen = set(_chosen(visible, gpus))
    return tuple(one for one in gpus if one.uuid in chosen or (not one.uuid and str(one.index) in chosen))


def why_none(folder: Path = DRIVER_FOLDER, root: Path = _ROOT) -> str:
    """Return why :func:`detect` finds nothing, in one clause."""
    if _all(folder):
        return f"{VISIBLE_VARIABLE}={os.environ.get(VISIBLE_VARIABLE, '')!r} hides all GPUs"
    if not folder.exists():
        return _why_no_driver(root)
    if list((folder / "gpus").glob("*")):
        return "the NVIDIA driver has GPUs, but this container has no /dev/nvidia0: start it with --gpus all"
    return "the NVIDIA driver lists no GPU"


def require(count: int, per_executor: float = 1.0) -> None:
    """Raise MachineError when fewer GPUs than ``count`` executors need are there."""
    found = detect()
    wanted = needed(count, per_executor)
    if len(found) < wanted:
        raise MachineError(
            "device='gpu' needs a GPU for every executor",
            expected=f"{wanted} GPU{'s' if wanted > 1 else ''}",
            actual=f"{len(found)}" if found else f"none: {why_none()}",
            hint="Run with -m 'not gpu', or on a machine with an NVIDIA driver."
            if not found
            else f"Train on {len(found)}: executors={len(found)}, or share GPUs with --gauge-gpus-per-executor 0.5.",
        )


def needed(executors: int, per_executor: float) -> int:
    """Return how many GPUs ``executors`` of ``per_executor`` GPUs each take; a fraction is shared by several."""
    if per_executor >= 1:
        return executors * int(per_executor)
    return -(-executors // _sharers(per_executor))


def fitting(executors: int, gpus: int, per_executor: float) -> int:
    """Return how many of ``executors`` the GPUs there are can serve, at least 1."""
    room = gpus // int(per_executor) if per_executor >= 1 else gpus * _sharers(per_executor)
    return max(1, min(executors, room))


def plan(addresses: Sequence[str], executors: int, per_executor: float) -> tuple[tuple[str, ...], ...]:
    """Return the addresses of each executor's GPUs.

    With more executors than the GPUs serve, several name the same ones: trainings on fewer executors than that are
    still alone on theirs, and :func:`require` refuses the others.
    """
    if per_executor < 1:
        sharers = _sharers(per_executor)
        return tuple((addresses[index // sharers % len(addresses)],) for index in range(executors))
    size = int(per_executor)
    groups = [tuple(addresses[at * size : (at + 1) * size]) for at in range(len(addresses) // size)]
    return tuple(groups[index % len(groups)] for index in range(executors))


def address(one: Gpu) -> str:
    """Return what CUDA_VISIBLE_DEVICES calls a GPU: its UUID, since CUDA's own order of indices is another."""
    return one.uuid or str(one.index)


def expose(addresses: Sequence[str]) -> None:
    """Let this process, and those it starts, see these GPUs only; none when empty. Call it before CUDA is used."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ[VISIBLE_VARIABLE] = ",".join(addresses) or NONE_VISIBLE


def of_task() -> tuple[str, ...]:
    """Return the addresses of the GPUs that Spark gave the task that runs here; outside of one, the visible ones."""
    from pyspark import TaskContext

    task = TaskContext.get()
    given = task.resources().get("gpu") if task is not None else None
    if given is not None:
        return tuple(given.addresses)
    visible = os.environ.get(VISIBLE_VARIABLE, "")
    return () if visible in ("", NONE_VISIBLE) else tuple(visible.split(","))


def visible_uuids() -> tuple[str, ...]:
    """Return the UUIDs of the GPUs that this process may use, in CUDA's order."""
    gpus = _all(DRIVER_FOLDER)
    visible = os.environ.get(VISIBLE_VARIABLE)
    return tuple(one.uuid for one in gpus) if visible is None else tuple(_chosen(visible, gpus))


def busy(one: Gpu) -> str:
    """Return who is using a GPU, in words; empty for one that is idle or does not tell."""
    share = (one.used_bytes or 0) / one.memory_bytes if one.memory_bytes else 0.0
    if not one.process_count and share <= BUSY_FRACTION:
        return ""
    used = f"{(one.used_bytes or 0) / 2**30:.1f} of {(one.memory_bytes or 0) / 2**30:.1f} GiB in use"
    processes = f" by {one.process_count} processes" if one.process_count else ""
    return f"{one.index}: {one.name}, {used}{processes}"


def describe(one: Gpu) -> str:
    """Return a GPU in one phrase, for people."""
    memory = f"{one.memory_bytes / 2**30:.0f} GiB" if one.memory_bytes else ""
    parts = [f"{one.index}: {one.name}", memory, f"driver {one.driver}" if one.driver else ""]
    return ", ".join(part for part in [*parts, "MIG" if one.mig else ""] if part)


def _all(folder: Path) -> tuple[Gpu, ...]:
    """Return all GPUs, hidden ones too."""
    if folder == DRIVER_FOLDER:
        try:
            return nvml.devices()
        except nvml.NvmlError:
            pass  # the driver's files tell names and UUIDs as well
    entries = sorted((folder / "gpus").glob("*/information"))
    read = [_read(index, entry) for index, entry in enumerate(entries)]
    return tuple(one for one, minor in read if folder != DRIVER_FOLDER or _has_node(minor))


def _has_node(minor: str) -> bool:
    """Return whether a GPU's device file is here: a container is shown the whole driver, but given some GPUs only."""
    return not minor or Path(f"/dev/nvidia{minor}").exists()


def _why_no_driver(root: Path) -> str:
    cards = _display_vendors(root)
    if _NVIDIA in cards:
        return "an NVIDIA GPU is on the PCI bus, but no NVIDIA driver is loaded (/proc/driver/nvidia is missing)"
    others = [_VENDORS[vendor] for vendor in ("0x1002", "0x8086") if vendor in cards]
    if (root / "dev/kfd").exists() or "AMD" in others:
        return "an AMD GPU is here, and only NVIDIA's are supported; no NVIDIA driver is loaded"
    note = f"; the {others[0]} GPU is not supported" if others else ""
    return f"no NVIDIA driver is loaded (/proc/driver/nvidia is missing){note}"


def _display_vendors(root: Path) -> set[str]:
    """Return the vendors of display controllers and accelerators: from the PCI bus, which lists them without driver."""
    found = set()
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        if _word(folder / "class").startswith(("0x03", "0x12")):
            found.add(_word(folder / "vendor"))
    return found | {_word(file) for file in (root / "sys/class/drm").glob("card*/device/vendor")}


def _word(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _chosen(visible: str, gpus: Sequence[Gpu]) -> Iterator[str]:
    """Yield what CUDA_VISIBLE_DEVICES names (UUIDs, or indices without); CUDA ignores all behind an unknown name."""
    for name in map(str.strip, visible.split(",")):
        # of a card that is cut up its index means the first instance
        named = (one for one in gpus if name and (str(one.index) == name or one.uuid.startswith(name)))
        found = next(named, None)
        if found is None:
            return
        yield address(found)


def _sharers(fraction: float) -> int:
    return max(1, int(1 / fraction + 1e-9))


def _read(index: int, information: Path) -> tuple[Gpu, str]:
    text = information.read_text(encoding="utf-8", errors="replace")
    fields = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", text, flags=re.MULTILINE))
    one = Gpu(index, fields.get("Model", "unknown"), fields.get("GPU UUID", ""), information.parent.name)
    return one, fields.get("Device Minor", "")

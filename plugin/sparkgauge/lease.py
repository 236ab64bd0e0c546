"""Which process has which GPU: exclusive locks on files that the kernel gives back however their owner ends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparkgauge import gpu
from sparkgauge.errors import MachineError
from sparkgauge.gpu import Gpu

WAIT_SECONDS = 60.0
"""For another session, such as another worker of pytest-xdist, to give a GPU back; a suite's tests take longer, so a
worker that finds none by then will find none."""
POLL_SECONDS = 0.5


@dataclass
class Lease:
    """GPUs that no other session of this user trains on until :meth:`release`, or this process's end."""

    gpus: tuple[Gpu, ...]
    _files: list[int] = field(repr=False, default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """Return what CUDA calls them."""
        return [gpu.address(one) for one in self.gpus]

    def release(self) -> None:
        """Give them back; harmless when repeated."""
        while self._files:
            os.close(self._files.pop())


def lease(
    count: int,
    *,
    shared: bool = False,
    folder: Path | None = None,
    wait_seconds: float = WAIT_SECONDS,
    say: Callable[[str], None] = lambda line: None,
) -> Lease:
    """Return ``count`` GPUs, idle ones of those that are visible; MachineError says who has them.

    ``shared`` asks for them even where others use them, as a fraction of a GPU per executor does.
    """
    place = folder or Path(tempfile.gettempdir()) / f"sparkgauge-gpus-{os.getuid()}"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline, told = time.monotonic() + wait_seconds, False
    while True:
        found, taken = _try(gpu.detect(), count, place, shared)
        if found is not None:
            return found
        if time.monotonic() >= deadline:
            raise _too_few(count, taken, wait_seconds)
        if not told:
            say(f"waiting for a GPU: {'; '.join(taken)}")
            told = True
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _try(visible: Sequence[Gpu], count: int, folder: Path, shared: bool) -> tuple[Lease | None, list[str]]:
    """Return a lease, or None and who has the others."""
    chosen: list[Gpu] = []
    files: list[int] = []
    taken: list[str] = []
    for one in visible:
        if len(chosen) == count:
            break
        file, owner = _lock(folder / f"{_slug(gpu.address(one))}.lock", shared)
        if file is None:
            taken.append(f"{one.index}: {one.name}, {owner}")
            continue
        # asked for only under the lock: a session that is leaving has given back the lock last
        if (using := gpu.busy(one)) and not shared:
            taken.append(using)
            os.close(file)
            continue
        chosen.append(one)
        files.append(file)
    if len(chosen) == count:
        return Lease(tuple(chosen), files), []
    for file in files:
        os.close(file)
    return None, taken


def _lock(path: Path, shared: bool) -> tuple[int | None, str]:
    """Return the open, locked file; None and who holds it where it is locked."""
    import fcntl

    # without O_EXCL and never removed: a lock on a removed file locks nobody out
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(file, 64, 0).decode("ascii", "replace").strip()
        os.close(file)
        return None, f"leased by process {owner}" if owner else "leased by another session"
    with contextlib.suppress(OSError):  # a full disk: the message will not name the owner
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file, ""


def _too_few(count: int, taken: Sequence[str], waited_seconds: float) -> MachineError:
    there = len(gpu.detect())
    return MachineError(
        "All GPUs are busy" if taken and len(taken) >= there else "Too few idle GPUs",
        expected=f"{count} idle GPU{'s' if count > 1 else ''}",
        actual="; ".join(taken) if taken else f"{there}",
        where=f"{waited_seconds:g} s of waiting" if waited_seconds else None,
        hint=f"Wait for them, choose others with {gpu.VISIBLE_VARIABLE}, or share with --gauge-gpus-per-executor 0.5",
    )


def _slug(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

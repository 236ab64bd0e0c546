"""Guards against leftovers: a small process that outlives pytest just long enough to kill what pytest started.

Every process of a cluster inherits one environment variable with a value unique to the session (the mark). A process
is ours when it bears the mark or descends from one that does; a stranger never does, whatever its PID. The guard holds
the read end of a pipe whose only write end is in pytest's process: end of file without the word ``stop`` means that
pytest is gone, however it went.

This file runs alone (``python -I -S watchdog.py``), so it imports the standard library only, and nothing of sparkgauge.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STOP = b"stop\n"
SWEEP_TIMEOUT_SECONDS = 10.0
SWEEP_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Process:
    """A running process, as far as telling it apart needs."""

    pid: int
    parent_pid: int
    group: int
    birth: str
    """When it started, in the system's own words: with the PID it names one process for good."""
    command: str
    """Arguments joined by blanks."""


class Watchdog:
    """A guard started for this process; use :meth:`dismiss` after a clean stop."""

    def __init__(self, mark: str, folder: Path) -> None:
        command = [sys.executable, "-I", "-S", __file__, mark, str(folder), str(os.getpid())]
        # Its own session: Ctrl-C and a closed terminal reach pytest, not the guard.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    @property
    def pid(self) -> int:
        """Return the guard's PID."""
        return self._process.pid

    def dismiss(self) -> None:
        """End the guard: everything has been stopped, nothing is to be killed."""
        assert self._process.stdin
        try:
            self._process.stdin.write(STOP)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone already, which is what was wanted
        self._process.wait(SWEEP_TIMEOUT_SECONDS)


def marked_processes(mark: str) -> list[Process]:
    """Return the running processes that bear ``mark`` (``NAME=value``) in their environment, or descend from one.

    The caller is not among them.
    """
    table = _processes_from_proc(mark) if _has_proc() else _processes_from_ps(mark)
    own = os.getpid()
    ours = {pid for pid, (_, bears_mark) in table.items() if bears_mark and pid != own}
    grown = True
    while grown:
        children = {pid for pid, (process, _) in table.items() if process.parent_pid in ours and pid != own}
        grown = not children <= ours
        ours |= children
    return [table[pid][0] for pid in sorted(ours)]


def sweep(mark: str, also: Iterable[Process] = (), timeout_seconds: float = SWEEP_TIMEOUT_SECONDS) -> list[Process]:
    """Kill every marked process, those born meanwhile, and ``also``; return what still runs after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = list({*marked_processes(mark), *filter(is_running, also)})
        for process in left:
            kill(process)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(SWEEP_PAUSE_SECONDS)


def kill(process: Process) -> None:
    """Send SIGKILL to ``process`` if it is still the one that was seen (its PID may have a new owner)."""
    try:
        handle = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return
    try:
        # The handle pins the PID, so what is checked now is what is killed.
        if _birth(process.pid) == process.birth:
            _send_kill(process.pid, handle)
    finally:
        if handle is not None:
            os.close(handle)


def is_running(process: Process) -> bool:
    """Return whether ``process`` itself still runs (its PID may have a new owner)."""
    return _birth(process.pid) == process.birth


def _send_kill(pid: int, handle: int | None) -> None:
    try:
        if handle is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(handle, signal.SIGKILL)  # type: ignore[attr-defined,unused-ignore]
    except ProcessLookupError:
        pass  # it ended by itself


def _has_proc() -> bool:
    return os.path.isdir("/proc/self")


def _birth(pid: int) -> str | None:
    if not _has_proc():
        return " ".join(_ps("-p", str(pid), "-o", "lstart=").split()) or None
    try:
        fields = _stat(str(pid))
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _stat(name: str) -> list[str]:
    """Return the fields of /proc/PID/stat from the third, ``state``, on (proc(5))."""
    with open(f"/proc/{name}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


def _processes_from_proc(mark: str) -> dict[int, tuple[Process, bool]]:
    table = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = _stat(name)
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if fields[0] not in "ZX":
            process = Process(int(name), int(fields[1]), int(fields[2]), fields[19], command)
            table[process.pid] = (process, _bears(name, mark))
    return table


def _bears(name: str, mark: str) -> bool:
    try:
        with open(f"/proc/{name}/environ", "rb") as file:
            return mark.encode() in file.read().split(b"\0")
    except OSError:  # another user's, or gone
        return False


def _processes_from_ps(mark: str) -> dict[int, tuple[Process, bool]]:
    table = {}
    for line in _ps("-axEww", "-o", "pid=,ppid=,pgid=,stat=,lstart=,command=").splitlines():
        # lstart is five words: Sun Nov 22 20:16:56 2026
        words = line.split(None, 9)
        if len(words) == 10 and "Z" not in words[3]:
            process = Process(int(words[0]), int(words[1]), int(words[2]), " ".join(words[4:9]), words[9])
            table[process.pid] = (process, mark in words[9].split())
    return table


def _ps(*arguments: str) -> str:
    return subprocess.run(["ps", *arguments], capture_output=True).stdout.decode(errors="replace")


def main(mark: str, folder: str, parent: int) -> None:
    """Wait for ``parent`` to say stop or to die; in the second case kill what bears ``mark``, remove ``folder``."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if _wait_for_end(parent):
        return
    sweep(mark)
    for _ in range(5):  # a dying process may still create a file
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.1)


def _wait_for_end(parent: int) -> bool:
    """Return True after the word stop, False when the parent died.

    A child that pytest forked without exec holds the pipe open, so the parent itself is watched as well.
    """
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    # Without pidfd (old kernels, macOS) the pipe alone tells.
    with contextlib.suppress(OSError, AttributeError):
        poller.register(os.pidfd_open(parent), select.POLLIN)
    if os.getppid() != parent:
        return False
    poller.poll()
    # A word written just before death is still in the pipe.
    ready, _, _ = select.select([0], [], [], 0)
    return bool(ready) and os.read(0, len(STOP)) == STOP


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Sums over the executors of one machine, through memory that they share.

Gloo's sums go through a TCP socket and a thread of each process that has to be woken: 130 bytes take 230 microseconds
and every tenth time 4 milliseconds, an interval of the scheduler, on two virtual cores. Here each process writes its
numbers where the others read them, and whoever waits looks again until they are there.

Each executor has a segment of its own, a file in ``/dev/shm`` that only it writes and that is unlinked once the others
have it open. Two slots take turns, so that one can be filled while the other is still read. Everyone adds the slots in
the order of the ranks, so that all get the same bits. The order of the writes is what tells a reader that a slot is
full: that holds on x86-64, which keeps it, and is not used elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import platform
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path("/dev/shm")
"""Files here are memory; Linux has it, and a container its own."""

SLOT_NUMBERS = 256 * 1024
"""float32 numbers of a slot: a whole gradient of the small nets. Larger arrays go in pieces."""

HEADER_BYTES = 4096
SLOTS = 2
PUBLISHED, READ = 0, 8
"""Where in the header (of int64) a process counts the pieces it has published, and those it has added up: a cache line
of their own each."""

LOOK_SECONDS = 20e-6
"""How long a wait looks without giving way: what the others are late by on cores of their own."""
SPIN_SECONDS = 0.005
"""How long a wait for the other executors keeps the processor, yielding it to whoever has work, before it sleeps.

A virtual processor that went to sleep is slow to wake: with the sums of resnet20's norms, 38 a step, two executors of
one core trained 316 images/s so, and 270 when every wait slept at once (through gloo, medians of 6 interleaved turns,
AMD EPYC)."""
SLEEP_SECONDS = 0.0005
ALIVE_SECONDS = 0.1
"""How often a wait asks whether the others are still there."""

_NAME = re.compile(r"sparkgauge-[0-9a-f]{32}-\d+")
let_others_run = getattr(os, "sched_yield", functools.partial(time.sleep, 0))  # macOS has none


class SharedSums:
    """The sums of one executor with those of the same machine; make it by :meth:`meet`."""

    def __init__(self, segments: Sequence[_Segment], rank: int) -> None:
        """``segments`` are those of all ranks, this one's writable."""
        self._segments, self._own = list(segments), segments[rank]
        self._peers = [one for number, one in enumerate(segments) if number != rank]
        self._pieces = 0
        self._pending: Sum | None = None

    @classmethod
    def meet(cls, store: Any, rank: int, executors: int) -> SharedSums | None:
        """Return the sums over ``executors`` processes that find each other through torch's ``store``.

        None, for all of them, where one is on another machine, or cannot share memory. All must call it together.
        """
        with contextlib.ExitStack() as opened:
            own = _create(opened)
            store.set(f"segment-{rank}", own.name if own else "")
            names = [store.get(f"segment-{number}").decode() for number in range(executors)]
            segments = [own if number == rank else _open(name, opened) for number, name in enumerate(names)]
            store.set(f"opened-{rank}", "" if None in segments else "all")
            everyone = all(store.get(f"opened-{number}") == b"all" for number in range(executors))
            if own is not None:
                (FOLDER / own.name).unlink()  # it lives on while somebody has it open
            if not everyone:
                return None
            opened.pop_all()
        return cls([one for one in segments if one is not None], rank)

    def start(self, values: NDArray[np.float32]) -> Sum:
        """Publish ``values``, contiguous, of one dimension; they become the sums once the result was waited for.

        All executors start the same sums in the same order. One that is still pending is finished first.
        """
        if self._pending is not None:
            self._pending.wait()
        self._pending = Sum(self, values)
        return self._pending

    def close(self) -> None:
        """Tell the others that this executor takes part no longer; harmless when repeated."""
        for segment in self._segments:
            segment.close()
        self._segments, self._peers = [], []

    def publish(self, piece: NDArray[np.float32]) -> int:
        """Write a piece into the next slot and return its number, from 1."""
        number = self._pieces + 1
        self._await(READ, number - SLOTS)
        self._own.slots[number % SLOTS][: len(piece)] = piece
        self._pieces = number
        self._own.counters[PUBLISHED] = number
        return number

    def add_up(self, number: int, piece: NDArray[np.float32]) -> None:
        """Wait for all executors' piece ``number`` and write the sum into ``piece``."""
        self._await(PUBLISHED, number)
        parts = [segment.slots[number % SLOTS][: len(piece)] for segment in self._segments]
        np.add(parts[0], parts[1], out=piece)
        for part in parts[2:]:
            piece += part
        self._own.counters[READ] = number

    def finished(self, done: Sum) -> None:
        """Note that a sum is pending no longer."""
        if self._pending is done:
            self._pending = None

    def _await(self, counter: int, number: int) -> None:
        """Return when every other executor's counter has come to ``number``; ConnectionResetError where one left."""
        for segment in self._peers:
            counters = segment.counters
            if counters[counter] < number:
                _look(segment, counter, number)


class Sum:
    """A sum that has begun."""

    def __init__(self, sums: SharedSums, values: NDArray[np.float32]) -> None:
        self._sums = sums
        self._rest = [values[start : start + SLOT_NUMBERS] for start in range(0, len(values), SLOT_NUMBERS)]
        self._published: list[tuple[int, NDArray[np.float32]]] = []
        self._publish()

    def wait(self) -> None:
        """Return when the values are the sums; at once when repeated."""
        while self._published:
            self._sums.add_up(*self._published.pop(0))
            self._publish()
        self._sums.finished(self)

    def _publish(self) -> None:
        if self._rest:
            piece = self._rest.pop(0)
            self._published.append((self._sums.publish(piece), piece))


@dataclass
class _Segment:
    name: str
    descriptor: int
    memory: mmap.mmap
    counters: NDArray[np.int64]
    slots: NDArray[np.float32]
    """Shape (slots, numbers)."""

    def close(self) -> None:
        """Give up the memory and, if it is one's own, the lock by which the others see that one is there."""
        if self.descriptor >= 0:
            self.counters = np.zeros(0, np.int64)
            self.slots = np.zeros((0, 0), np.float32)
            with contextlib.suppress(BufferError):  # a piece that somebody still holds keeps it until then
                self.memory.close()
            os.close(self.descriptor)
            self.descriptor = -1

    def owner_has_left(self) -> bool:
        """Return whether the process that made the segment has ended or closed it: the kernel then drops its lock."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return True


def keeps_order_of_writes() -> bool:
    """Return whether others see this processor's writes in the order in which they were made."""
    return platform.machine().lower() in ("x86_64", "amd64")


def _size() -> int:
    return HEADER_BYTES + SLOTS * SLOT_NUMBERS * 4


def _create(opened: contextlib.ExitStack) -> _Segment | None:
    """Return a new segment of this process, which ``opened`` closes and unlinks; None where that cannot be."""
    if not keeps_order_of_writes():
        return None
    name = f"sparkgauge-{secrets.token_hex(16)}-{os.getpid()}"
    path = FOLDER / name
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, _size())  # now, as an error: a full folder would later be a SIGBUS
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        segment = _mapped(name, descriptor, writable=True)
    except OSError:
        path.unlink()
        os.close(descriptor)
        return None
    opened.callback(segment.close)
    opened.callback(path.unlink, missing_ok=True)
    return segment


def _open(name: str, opened: contextlib.ExitStack) -> _Segment | None:
    """Return another process's segment, which ``opened`` closes; None where it is not on this machine."""
    if not _NAME.fullmatch(name):
        return None
    try:
        descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        segment = _mapped(name, descriptor, writable=False)
    except (OSError, ValueError):
        os.close(descriptor)
        return None
    opened.callback(segment.close)
    return segment


def _mapped(name: str, descriptor: int, *, writable: bool) -> _Segment:
    memory = mmap.mmap(descriptor, _size(), access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    counters = np.frombuffer(memory, np.int64, HEADER_BYTES // 8)
    slots = np.frombuffer(memory, np.float32, SLOTS * SLOT_NUMBERS, HEADER_BYTES).reshape(SLOTS, SLOT_NUMBERS)
    return _Segment(name, descriptor, memory, counters, slots)


def _look(segment: _Segment, counter: int, number: int) -> None:
    """Return when the counter has come to ``number``; first looking, then giving way, then sleeping."""
    counters = segment.counters
    began = asked = time.perf_counter()
    while counters[counter] < number:
        now = time.perf_counter()
        if now - began > LOOK_SECONDS:
            _give_way(now - began)
        if now - asked > ALIVE_SECONDS:
            asked = now
            # it may have published before it left
            if segment.owner_has_left() and counters[counter] < number:
                raise ConnectionResetError("an executor left the sums over this machine's executors")


def _give_way(waited: float) -> None:
    if waited < SPIN_SECONDS:
        let_others_run()
    else:
        time.sleep(SLEEP_SECONDS)

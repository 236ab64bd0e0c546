"""A clock that is in exactly one phase at a time, so that the phases add up to the time that passed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time

from sparkgauge.records import PHASES, PhaseSeconds

WITHIN_STEPS = frozenset({"feed", "compute", "sync"})
"""Phases that follow each other in every step. Waiting for the device between them would take away the overlap that is
measured; their sum is right, since the device is waited for where training begins and ends."""


class PhaseClock:
    """Attributes every moment from ``started`` on to one phase; starts in ``launch``."""

    def __init__(self, started: float | None = None) -> None:
        """Start in phase ``launch`` at ``started`` (``time.monotonic()``; now by default)."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._cpu_seconds = dict.fromkeys(PHASES, 0.0)
        self.paused_seconds = 0.0
        """Spent in :meth:`paused`, so in no phase."""
        self._phase = "launch"
        self._since = time.monotonic() if started is None else started
        self._cpu_since = process_time()
        self.synchronise: Callable[[], None] = lambda: None
        """Waits for the device: called before a phase ends, so that what it has queued there is charged to it."""

    @property
    def phase(self) -> str:
        """Return the current phase."""
        return self._phase

    def switch(self, phase: str) -> float:
        """Enter ``phase``; return the seconds spent in the one that ends. KeyError for a name not in PHASES."""
        if phase != self._phase and not {phase, self._phase} <= WITHIN_STEPS:
            self.synchronise()
        now = time.monotonic()
        spent = now - self._since
        self._seconds[self._phase] += spent
        self._seconds[phase] += 0.0  # an unknown name must not wait until the next switch to be noticed
        cpu_now = process_time()  # of all threads: what a framework's pool computes counts too
        self._cpu_seconds[self._phase] += cpu_now - self._cpu_since
        self._phase, self._since, self._cpu_since = phase, now, cpu_now
        return spent

    def move(self, source: str, target: str, seconds: float) -> None:
        """Reattribute ``seconds`` (known only afterwards, e.g. from timestamps in a compiled step)."""
        self.switch(self._phase)  # what was spent in the current phase counts too
        seconds = min(max(seconds, 0.0), self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in ``phase`` for the duration of the block, then back in the phase before."""
        before = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the time of the block belong to no phase: what is done there is no part of the training."""
        self.switch(self._phase)
        began = self._since
        try:
            yield
        finally:
            self._since, self._cpu_since = time.monotonic(), process_time()
            self.paused_seconds += self._since - began

    def spent(self, phase: str) -> float:
        """Return the seconds attributed to ``phase`` by the switches so far."""
        return self._seconds[phase]

    def seconds(self) -> PhaseSeconds:
        """Return the seconds per phase up to now."""
        self.switch(self._phase)
        return PhaseSeconds(**self._seconds)

    def cpu_seconds(self) -> PhaseSeconds:
        """Return this process's CPU seconds per phase up to now; :meth:`move` leaves them where they were spent."""
        self.switch(self._phase)
        return PhaseSeconds(**self._cpu_seconds)

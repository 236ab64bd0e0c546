"""Processes that tests start and watch."""

from __future__ import annotations

import signal

import psutil


def lives(process: psutil.Process) -> bool:
    """Return whether the process computes on: neither gone, nor a zombie that nobody has collected yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # between the two questions
        return False


def heed_interrupts() -> None:
    """Let Ctrl-C end this process even where the tests run in the background, which ignores it: a ``preexec_fn``."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

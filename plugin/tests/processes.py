"""Whether a process that a test watches has ended."""

from __future__ import annotations

import psutil


def lives(process: psutil.Process) -> bool:
    """Return whether the process computes on: neither gone, nor a zombie that nobody has collected yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # between the two questions
        return False

"""The process that forks Spark's Python workers: PySpark's daemon with modules imported ahead and no orphans.

Spark runs it as ``python -m sparkgauge.cluster.daemon pyspark.worker``. Standard output carries PySpark's port
handshake, so nothing may be printed before :func:`pyspark.daemon.manager` has run.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""From Linux's <sys/prctl.h>."""


def main() -> None:
    """Import the modules wanted, tie workers to this process and serve until Spark closes standard input."""
    quicken_tensorflow()
    preimport(os.environ.get("SPARKGAUGE_PREIMPORT", ""))
    if later := os.environ.get("SPARKGAUGE_PREIMPORT_FILE"):
        os.register_at_fork(before=Later(later).import_new)
    if sys.platform == "linux":
        prctl = _prctl()
        if prctl:
            # What a task started and left stays this process's descendant, so a clean-up finds it.
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            os.register_at_fork(after_in_child=_Leash(os.getpid(), prctl).put_on)
    from pyspark.daemon import manager

    manager()


def quicken_tensorflow() -> None:
    """Let TensorFlow, which must not be imported yet, use oneDNN on every CPU unless the user has decided that.

    Its builds do so by themselves only where the CPU has AVX-512. With AVX2 alone a training step of cifar10_quick at
    batch 100 took 2.2 times as long without it (one core of an AMD EPYC, TensorFlow 2.21).
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def preimport(names: str) -> list[str]:
    """Return which of the comma-separated modules could be imported; what they print goes to standard error.

    A failure is swallowed here on purpose: the task that needs the module raises it where the user sees it.
    """
    imported = []
    # The C level too: libraries write to descriptor 1 without asking Python.
    handshake = os.dup(1)
    os.dup2(2, 1)
    try:
        for name in filter(None, (part.strip() for part in names.split(","))):
            try:
                importlib.import_module(name)
                imported.append(name)
            except Exception as error:
                print(f"sparkgauge: could not import {name} ahead: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os.dup2(handshake, 1)
        os.close(handshake)
    return imported


class Later:
    """Imports what is appended to a file, one module a line, before the next worker is forked."""

    def __init__(self, path: str) -> None:
        self._path, self._daemon = path, os.getpid()
        self._seen = 0

    def import_new(self) -> None:
        """Import the modules that are new in the file, in the daemon only: its workers inherit them."""
        if os.getpid() != self._daemon:
            return
        try:
            with open(self._path, encoding="utf-8") as file:
                names = file.read().split()
        except FileNotFoundError:
            return
        new, self._seen = names[self._seen :], len(names)
        preimport(",".join(new))


class _Leash:
    """Kills a worker when the daemon dies.

    Only direct children wear it: the signal is tied to the parent's forking *thread*, and a grandchild that a
    worker's thread started would die with that thread. For the same reason the daemon itself wears none (a pooled
    JVM thread starts it); it ends when its standard input closes.
    """

    def __init__(self, daemon: int, prctl: Callable[..., object]) -> None:
        self.daemon = daemon
        self.prctl = prctl

    def put_on(self) -> None:
        if os.getppid() == self.daemon:
            self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.daemon:  # it died before the leash was on
                os._exit(1)


def _prctl() -> Callable[..., object] | None:
    import ctypes

    try:
        function: Callable[..., object] = ctypes.CDLL(None).prctl
        return function
    except (OSError, AttributeError):  # a C library without it: the closed standard input still ends the workers
        return None


if __name__ == "__main__":
    main()

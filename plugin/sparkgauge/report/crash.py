"""Failures of the tool itself: told apart from failed tests in JUnit and in the exit status."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from sparkgauge.errors import ClusterError, GaugeError, TrainingError, TrainingTimeout

EXIT_CRASHED = 10
"""Exit status of a session in which nothing failed but the tool: pytest's own end at 5, and plugins use the next."""

TESTS_FAILED = 1

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_crash(error: BaseException | None) -> bool:
    """Return whether ``error`` says nothing of the code under test: the cluster, a lost or hung executor, this package.

    An exception that a training function raised on an executor is the test's own failure, as are failed asserts and
    what a user can set right: options, baselines, what the machine lacks, what was not measured.
    """
    if isinstance(error, TrainingError):
        # an executor that was lost, or a job that Spark ended, has what Spark printed beside what was seen
        return isinstance(error, TrainingTimeout) or bool(error.actual and error.traceback_text)
    if isinstance(error, GaugeError):
        return isinstance(error, ClusterError) or type(error).__name__ == "OpponentError"
    return isinstance(error, Exception) and not isinstance(error, AssertionError) and _is_own(error)


def mark_as_error(config: Any, report: Any) -> None:
    """Turn JUnit's ``failure`` of a crashed test into ``error``: pytest calls whatever happens in a test's call a
    failure. Without a JUnit file there is nothing to do."""
    try:
        from _pytest.junitxml import xml_key
    except ImportError:  # no public way to it; a pytest that moved it keeps the failure
        return
    xml = config.stash.get(xml_key, None)
    if xml is None:
        return
    for node in xml.node_reporter(report).nodes:
        if node.tag == "failure":
            node.tag = "error"
            xml.stats["failure"] -= 1
            xml.stats["error"] += 1


def exit_status(status: int, crashed: int, failed: int) -> int:
    """Return the session's exit status: its own where every failed test was a crash, else ``status``."""
    return EXIT_CRASHED if status == TESTS_FAILED and crashed == failed > 0 else status


def _is_own(error: BaseException) -> bool:
    """Return whether the innermost frame that is neither Python's nor a library's is in this package: what a library
    raises when this package calls it is this package's error, when a test calls it the test's."""
    trace, own = error.__traceback__, False
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            own = True
        elif not any(map(path.is_relative_to, _LIBRARIES)) and not str(path).startswith("<"):
            own = False
        trace = trace.tb_next
    return own

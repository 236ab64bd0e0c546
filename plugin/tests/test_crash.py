"""Which errors are the tool's own fault, and the exit status that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparkgauge import machine
from sparkgauge.cluster import standalone
from sparkgauge.errors import (
    BaselineError,
    ClusterError,
    ConfigurationError,
    MachineError,
    NotMeasuredError,
    TrainingError,
    TrainingTimeout,
)
from sparkgauge.report.crash import EXIT_CRASHED, exit_status, is_crash


def raised_by(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError


OWN_BUG = raised_by(lambda: machine.state_between(None, None))  # type: ignore[arg-type]
IN_A_LIBRARY_THAT_WE_CALL = raised_by(lambda: standalone.prepare_folder(Path("/proc/nowhere")))
IN_A_LIBRARY_THAT_THE_TEST_CALLS = raised_by(lambda: json.loads("{"))


@pytest.mark.parametrize(
    ("error", "crashed"),
    [
        (ClusterError("no cluster"), True),
        (TrainingTimeout("too long", actual="nothing"), True),
        (TrainingError("lost", executor=1, actual="its process ended", traceback_text="Spark's"), True),
        (TrainingError("failed on executor 1: ValueError", executor=1, traceback_text="the user's"), False),
        (TrainingError("reported no accuracy", actual="metrics none"), False),
        (NotMeasuredError("nothing"), False),
        (BaselineError("bad"), False),
        (ConfigurationError("bad"), False),
        (MachineError("no GPU"), False),
        (AssertionError("regressed"), False),
        (ValueError("the test's own"), False),
        (OWN_BUG, True),
        (IN_A_LIBRARY_THAT_WE_CALL, True),
        (IN_A_LIBRARY_THAT_THE_TEST_CALLS, False),
        (None, False),
    ],
)
def test_what_counts_as_a_crash(error: Exception | None, crashed: bool) -> None:
    assert is_crash(error) is crashed


@pytest.mark.parametrize(
    ("status", "crashed", "failed", "expected"),
    [(1, 1, 1, EXIT_CRASHED), (1, 1, 2, 1), (1, 0, 1, 1), (0, 0, 0, 0), (2, 1, 1, 2), (1, 2, 2, EXIT_CRASHED)],
)
def test_only_crashes_alone_have_a_status_of_their_own(status: int, crashed: int, failed: int, expected: int) -> None:
    assert exit_status(status, crashed, failed) == expected

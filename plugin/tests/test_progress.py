"""The progress line: what it shows, how often, and that it never breaks a run."""

from __future__ import annotations

import io
import threading

import pytest

from sparkgauge.report.progress import PLAIN_SECONDS, REDRAW_SECONDS, Progress

CLEAR = "\r\x1b[K"


class Stream(io.StringIO):
    """A text stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def make(stream: io.StringIO, clock: Clock, enabled: bool = True, columns: int = 80) -> Progress:
    """Return a progress on ``stream``."""
    return Progress(stream, enabled, clock=clock, columns=lambda: columns)


def test_line_on_a_terminal_overwrites_itself() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("test_quick", 4)
    clock.seconds += 1
    progress.update(1, 120, 300, 2481.4, 1.9034)
    progress.finish()
    drawn = stream.getvalue().split(CLEAR)
    assert drawn == ["", "test_quick: starting", "test_quick: round 2/4, step 120/300, 2,481 images/s, loss 1.903", ""]
    assert "\n" not in stream.getvalue()


@pytest.mark.parametrize(
    ("wait_seconds", "lines"), [(REDRAW_SECONDS - 0.01, 1), (REDRAW_SECONDS, 2), (REDRAW_SECONDS + 0.01, 2)]
)
def test_redraws_are_limited(wait_seconds: float, lines: int) -> None:
    stream, clock = Stream(terminal=True), Clock()
    clock.seconds = 0.0  # exact sums
    progress = make(stream, clock)
    progress.start("t", 1)
    clock.seconds += wait_seconds
    progress.update(0, 1, 2)
    assert stream.getvalue().count(CLEAR) == lines


def test_a_new_test_is_shown_at_once() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("first", 1)
    progress.start("second", 1)
    assert stream.getvalue().endswith("second: starting")


def test_unknown_figures_are_left_out() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("t", 1)
    clock.seconds += 1
    progress.update(0, 1, 30, float("nan"), None)
    assert stream.getvalue().endswith("t: round 1/1, step 1/30")


def test_added_rounds_raise_the_total() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("t", 4)
    clock.seconds += 1
    progress.update(4, 1, 30)
    assert "round 5/5" in stream.getvalue()


@pytest.mark.parametrize("columns", [0, 1, 10, 40])
def test_line_never_wraps(columns: int) -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock, columns=columns)
    progress.start("a long title " * 9, 4)
    assert len(stream.getvalue().removeprefix(CLEAR)) == max(1, columns - 1)


def test_message_leaves_the_line_below_it() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("t", 1)
    progress.message("executor 1 was lost")
    assert stream.getvalue().endswith(f"{CLEAR}executor 1 was lost\nt: starting")


def test_finish_twice_clears_once() -> None:
    stream, clock = Stream(terminal=True), Clock()
    progress = make(stream, clock)
    progress.start("t", 1)
    progress.finish()
    progress.finish()
    assert stream.getvalue().count(CLEAR) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_written_when_not_enabled(terminal: bool) -> None:
    stream, clock = Stream(terminal), Clock()
    progress = make(stream, clock, enabled=False)
    progress.start("t", 1)
    clock.seconds += 100
    progress.update(0, 1, 2, 3.0, 4.0)
    progress.message("text")
    progress.finish()
    assert stream.getvalue() == ""


def test_a_log_gets_sparse_plain_lines() -> None:
    stream, clock = Stream(terminal=False), Clock()
    progress = make(stream, clock)
    progress.start("t", 1)
    for step in range(1, 61):
        clock.seconds += 1
        progress.update(0, step, 60)
    progress.message("done")
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines == ["t: round 1/1, step 30/60", "t: round 1/1, step 60/60", "done"]
    assert PLAIN_SECONDS == 30.0


class BrokenStream(Stream):
    """A terminal that went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_broken_stream_ends_the_progress_only() -> None:
    progress = make(BrokenStream(terminal=True), Clock())
    progress.start("t", 1)
    progress.message("text")
    progress.finish()


def test_a_closed_stream_ends_the_progress_only() -> None:
    stream = Stream(terminal=True)
    progress = make(stream, Clock())
    stream.close()
    progress.start("t", 1)


def test_threads_do_not_mix_their_lines() -> None:
    stream = Stream(terminal=True)
    ticks = iter(range(100_000))
    progress = Progress(stream, clock=lambda: float(next(ticks)), columns=lambda: 80)
    progress.start("t", 8)
    threads = [threading.Thread(target=lambda i=i: [progress.update(i, i, i) for _ in range(50)]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().split(CLEAR)[2:]
    assert len(lines) == 400
    assert set(lines) == {f"t: round {i + 1}/8, step {i}/{i}" for i in range(8)}

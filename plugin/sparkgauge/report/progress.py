"""One line that says how far training is, on the terminal of whoever waits."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from typing import Protocol

REDRAW_SECONDS = 0.2
"""Five times a second looks alive; more only costs the terminal."""
PLAIN_SECONDS = 30.0
"""Between two lines where the output is no terminal: a log wants signs of life, not a film."""


class Stream(Protocol):
    """What the progress is written to; any text file will do."""

    def write(self, text: str, /) -> object:
        """Write ``text``."""
        ...

    def flush(self) -> object:
        """Send what was written."""
        ...

    def isatty(self) -> bool:
        """Return whether a line can be overwritten."""
        ...


_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """A progress line that overwrites itself on a terminal, sparse plain lines elsewhere, nothing when not ``enabled``.

    Safe to call from several threads. A stream that breaks ends the progress, never the run.
    """

    def __init__(
        self,
        stream: Stream,
        enabled: bool = True,
        *,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] | None = None,
    ) -> None:
        """Write to ``stream``; ``enabled`` is False under CI and ``-q``. ``clock`` and ``columns`` are for tests."""
        self._stream, self._enabled = stream, enabled
        self._clock = clock
        self._columns = columns or _terminal_columns
        self._live = enabled and stream.isatty()
        self._lock = threading.Lock()
        self._title, self._rounds, self._line = "", 0, ""
        self._drawn_at = -math.inf

    def start(self, title: str, rounds: int) -> None:
        """Begin a test: ``title`` names it, ``rounds`` is how many are planned."""
        with self._lock:
            self._title, self._rounds = title, rounds
            if self._live:
                self._drawn_at = -math.inf
                self._draw(f"{title}: starting")
            else:
                self._drawn_at = self._clock()  # a log needs no line for rounds that are over soon

    def update(
        self,
        round_index: int,
        step: int,
        total_steps: int,
        images_per_second: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Show round ``round_index`` (0-based) at ``step`` of ``total_steps``; dropped when it comes too soon."""
        with self._lock:
            # rounds may be added while the gate is undecided
            self._rounds = max(self._rounds, round_index + 1)
            parts = [f"round {round_index + 1}/{self._rounds}", f"step {step}/{total_steps}"]
            if images_per_second is not None and math.isfinite(images_per_second):
                parts.append(f"{images_per_second:,.0f} images/s")
            if loss is not None:
                parts.append(f"loss {loss:.3f}")
            self._draw(f"{self._title}: {', '.join(parts)}")

    def message(self, text: str) -> None:
        """Leave ``text`` as a line of its own, above the progress line."""
        with self._lock:
            if self._live:
                self._write(f"{_CLEAR_LINE}{text}\n{self._line}")
            else:
                self._write(f"{text}\n")

    def finish(self) -> None:
        """Take the progress line off the terminal."""
        with self._lock:
            if self._live and self._line:
                self._write(_CLEAR_LINE)
            self._line = ""

    def _draw(self, text: str) -> None:
        now = self._clock()
        if not self._enabled or now - self._drawn_at < (REDRAW_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._drawn_at = now
        if not self._live:
            self._write(f"{text}\n")
            return
        # a full last column makes some terminals wrap, and a wrapped line cannot be overwritten
        self._line = text[: max(1, self._columns() - 1)]
        self._write(f"{_CLEAR_LINE}{self._line}")

    def _write(self, text: str) -> None:
        if not self._enabled:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError, UnicodeError):  # closed, a broken pipe, or a title the terminal cannot spell
            self._enabled = False


def _terminal_columns() -> int:
    return shutil.get_terminal_size().columns

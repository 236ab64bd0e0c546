"""Writing to the terminal while a test runs, past pytest's capture of the test's own output."""

from __future__ import annotations

import contextlib
from typing import Any


class UncapturedStream:
    """The file behind pytest's terminal reporter, with capturing suspended for every write."""

    def __init__(self, config: Any) -> None:
        """Write where ``config`` (a ``pytest.Config``) writes its report."""
        self._writer = config.get_terminal_writer()
        self._file = self._writer._file
        self._left_at = 0
        """Columns of pytest's own unfinished line when it was left for a line of ours."""
        self._capture = config.pluginmanager.getplugin("capturemanager")

    def write(self, text: str) -> None:
        """Write ``text`` to the terminal."""
        with self._uncaptured():
            if not self.isatty() and self._writer.width_of_current_line not in (0, self._left_at):
                self._left_at = self._writer.width_of_current_line
                self._file.write("\n")
            self._file.write(text)
            self._file.flush()

    def flush(self) -> None:
        """Do nothing: every write is flushed."""

    def isatty(self) -> bool:
        """Return whether the terminal can overwrite a line."""
        return bool(self._file.isatty())

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        if self._capture is None:
            return contextlib.nullcontext()
        manager: contextlib.AbstractContextManager[None] = self._capture.global_and_fixture_disabled()
        return manager

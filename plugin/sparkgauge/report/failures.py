"""How an error of ours is printed: its message says all, so only the test's own lines stand above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

_PACKAGE = Path(__file__).parents[1]
_TOOLS = frozenset({"_pytest", "pluggy", "pytest_benchmark"})
"""Packages between a test and the fixture or hook that raised."""


def told(excinfo: pytest.ExceptionInfo[BaseException], style: str) -> Any:
    """Return pytest's representation of the error without this package's frames and without what caused it.

    ``style`` is the option ``--tb``; ``--full-trace`` is for those who want to see the frames.
    """
    theirs = [entry for entry in excinfo.traceback if not _is_of_tools(Path(entry.path))]
    if not theirs:  # raised while a fixture was set up: no line of the test had run
        return excinfo.getrepr(style="value", chain=False)
    excinfo.traceback = type(excinfo.traceback)(theirs)
    chosen: Any = style
    if style == "auto":
        chosen = "long" if len(theirs) == 1 else "short"
    return excinfo.getrepr(style=chosen, chain=False)


def _is_of_tools(path: Path) -> bool:
    return path.is_relative_to(_PACKAGE) or not _TOOLS.isdisjoint(path.parts)

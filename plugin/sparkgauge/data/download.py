"""Download of the official archive, with a quick answer where there is no network."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import threading
from pathlib import Path
from typing import Any

from sparkgauge.errors import DataError, MachineError

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
"""Silence of the server after which a download is given up."""
PROBE_SECONDS = 8.0
"""Time for name look-up, connection and first answer together; a name server that never answers would take longer."""


class Unreachable(Exception):
    """The server could not be reached, or broke off; the text says why."""


def download(url: str, path: Path, *, md5: str, progress: bool) -> None:
    """Return after writing ``url`` to ``path``; Unreachable without a network, DataError when the MD5 differs."""
    _probe(url)
    _fetch(url, path, progress)
    actual = _md5_of(path)
    if actual != md5:
        raise DataError(
            "Downloaded archive is not the official one",
            expected=f"MD5 {md5}",
            actual=f"{actual} ({path.stat().st_size:,} bytes)",
            where=url,
            hint="Run again, or fetch the archive by hand and name it with --gauge-data or SPARKGAUGE_DATA.",
        )


def _probe(url: str) -> None:
    """Return when the server answers within PROBE_SECONDS; Unreachable otherwise."""
    _require("requests")
    outcome: list[str] = []
    # Name look-up has no timeout of its own, so it waits in a thread that is left behind if need be.
    thread = threading.Thread(target=lambda: outcome.append(_probe_failure(url)), daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    failure = outcome[0] if outcome else f"no answer within {PROBE_SECONDS:g} s"
    if failure:
        raise Unreachable(failure)


def _probe_failure(url: str) -> str:
    import requests  # pooch depends on it

    try:
        response = requests.head(url, timeout=CONNECT_SECONDS, allow_redirects=True)
        response.raise_for_status()
    except (requests.RequestException, OSError) as error:
        return _reason(error)
    return ""


def _fetch(url: str, path: Path, progress: bool) -> None:
    import requests

    pooch = _require("pooch")
    bar = progress and importlib.util.find_spec("tqdm") is not None
    timeouts = (CONNECT_SECONDS, READ_SECONDS)
    fetch = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 18, timeout=timeouts)
    try:
        fetch(url, str(path), None)
    except requests.RequestException as error:
        raise Unreachable(_reason(error)) from error


def _require(name: str) -> Any:
    """Return the imported module; MachineError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MachineError(f"{name} is not installed", hint="pip install pooch tqdm") from error


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one short line."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"[:200]


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()

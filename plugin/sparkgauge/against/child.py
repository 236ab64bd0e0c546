"""The pytest process on the other side: where it imports from, what it is told, and what it said when it died."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge.cluster.conf import MARKER_VARIABLE
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import ConfigurationError

SECRET_VARIABLE = "SPARKGAUGE_SERVE_SECRET"
"""Where the child finds the connection's secret: the environment, unlike arguments, is not shown to other users."""

KEPT_WITH_VALUE = ("-p", "-W", "-o", "--pythonwarnings", "--override-ini", "--import-mode")
"""pytest's own options that both sides need; those that write files, select or stop belong to one side."""

SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})

TAIL_LINES = 25
GOODBYE_SECONDS = 15.0
"""Given to the child to stop its cluster and leave."""


@dataclass(frozen=True)
class Mirror:
    """Turns paths of the working tree into those of the checkout."""

    root: Path
    """Top folder of the repository."""
    tree: Path
    """Where the other commit is checked out."""

    def inside(self, path: str | Path) -> Path | None:
        """Return the checkout's path for one inside the repository; None for one elsewhere."""
        # not resolved at its end: a link in the repository is the checkout's own link
        real = Path(os.path.abspath(path))
        for candidate in (real, real.resolve()):
            if candidate.is_relative_to(self.root):
                return self.tree / candidate.relative_to(self.root)
        return None

    def existing(self, path: str | Path) -> Path | None:
        """Return :meth:`inside` where the commit has that path: a virtual environment in the repository has none."""
        mirrored = self.inside(path)
        return mirrored if mirrored is not None and mirrored.exists() else None


def mirrored_paths(mirror: Mirror, search_path: Iterable[str], sources: Iterable[Path]) -> list[str]:
    """Return the folders that come first on the other side's import path: ``sources``, then ``search_path``'s own.

    Each is one of the repository's, as the checkout has it. ConfigurationError for a source outside the repository.
    """
    found: dict[str, None] = {}
    for source in sources:
        mirrored = mirror.inside(source)
        if mirrored is None:
            raise ConfigurationError(
                "Bad value for the ini option gauge_source",
                expected=f"folders inside the repository {mirror.root}",
                actual=str(source),
            )
        found[str(mirrored)] = None
    for entry in search_path:
        existing = mirror.existing(entry or os.curdir)
        if existing is not None and existing.is_dir():
            found[str(existing)] = None
    return list(found)


def environment_of(mirror: Mirror, environ: Mapping[str, str], first: Sequence[str], secret_hex: str) -> dict[str, str]:
    """Return the child's environment: ``first`` on PYTHONPATH, nothing of this session's own."""
    kept = {name: value for name, value in environ.items() if not _belongs_to_this_side(name)}
    inherited = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    outside = [os.path.abspath(entry) for entry in inherited if mirror.existing(entry) is None]
    path = os.pathsep.join(dict.fromkeys([*first, *outside]))
    return {**kept, "PYTHONPATH": path, SECRET_VARIABLE: secret_hex, "PYTHONUNBUFFERED": "1"}


def forwarded(arguments: Sequence[str]) -> list[str]:
    """Return those of pytest's ``arguments`` that the other side needs too: plugins, warnings, ini values."""
    kept: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument in KEPT_WITH_VALUE:
            kept += [argument, *remaining[:1]]
            del remaining[:1]
        elif _has_attached_value(argument):
            kept.append(argument)
    return kept


def gauge_arguments(config: GaugeConfig) -> list[str]:
    """Return the options that make both sides train alike.

    The sizes are said even where they are defaults, since the commit may have other ones. What would win over markers
    is said only where the user said it. Injected slowdowns stay on the candidate's side: they are there to be found.
    """
    said: dict[str, Any] = {
        "executors": config.executors,
        "cores": config.cores_per_executor,
        "memory": f"{config.executor_memory_mib}m",
        "master": config.master or "embedded",
        "profile": config.profile,
        "data": config.data,
        "timeout": config.timeout_seconds if "timeout" in config.given else None,
    }
    return [part for name, value in said.items() if value is not None for part in (f"--gauge-{name}", str(value))]


def collected_paths(mirror: Mirror, arguments: Iterable[str], node_files: Iterable[Path]) -> list[str]:
    """Return the paths that the other side collects: this side's ``arguments`` and files, where the commit has them."""
    named = [Path(argument.partition("::")[0]) for argument in arguments if "::" not in argument]
    found = {str(path): None for one in [*named, *node_files] if (path := mirror.existing(one)) is not None}
    # a folder covers its files, and pytest would list them twice where both are named
    return [path for path in found if not any(Path(other) in Path(path).parents for other in found)]


def write_job(path: Path, **content: Any) -> Path:
    """Return ``path``, in which the child now finds whom to talk to and what to run."""
    path.write_text(json.dumps(content))
    return path


def has_own_code(root: Path, modules: Iterable[Any], tests: Collection[Path]) -> bool:
    """Return whether any of ``modules`` is the repository's own, beyond ``tests``, conftests and what is installed."""
    for module in modules:
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            continue
        path = Path(file).resolve()
        is_test = path in tests or path.name in ("conftest.py", "__init__.py")
        if path.is_relative_to(root) and not is_test and not is_installed(path):
            return True
    return False


def is_installed(path: Path) -> bool:
    """Return whether ``path`` belongs to the interpreter's own packages, wherever its environment lies."""
    return not SITE_FOLDERS.isdisjoint(path.parts) or path.is_relative_to(sys.base_prefix)


class Child:
    """A started pytest process, its output in a file."""

    def __init__(self, command: Sequence[str], *, folder: Path, environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.command = shlex.join(command)
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is this side's to handle
                )
        except OSError as error:
            raise ConfigurationError(
                "The other side's interpreter does not start",
                expected="a Python with pytest-sparkgauge",
                actual=f"{command[0]}: {error.strerror}",
                where="--gauge-against-python" if command[0] != sys.executable else None,
            ) from None

    @property
    def pid(self) -> int:
        """Return the process's PID."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Return the exit status; None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """Return the last lines of what it printed."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])

    def stop(self, patience_seconds: float) -> None:
        """Wait for the end that it was asked for, then end it; its cluster's guard takes the cluster down."""
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _belongs_to_this_side(name: str) -> bool:
    return name in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", MARKER_VARIABLE) or name.startswith(
        ("PYTEST_XDIST_", "COV_CORE_", "COVERAGE_PROCESS_")
    )


def _has_attached_value(argument: str) -> bool:
    name, separator, _ = argument.partition("=")
    if argument.startswith("--"):
        return bool(separator) and name in KEPT_WITH_VALUE
    return argument[:2] in KEPT_WITH_VALUE and len(argument) > 2

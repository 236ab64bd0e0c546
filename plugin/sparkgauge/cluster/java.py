"""The Java that Spark runs on: found, checked once, or refused with the command that installs one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparkgauge.errors import MachineError

MINIMUM_VERSION = 17
"""Spark 4 is compiled for Java 17."""
VECTOR_MODULE = "jdk.incubator.vector"
"""Spark 4 starts every JVM with --add-modules for it; a runtime without it dies at boot."""
PROBE_TIMEOUT_SECONDS = 20.0
"""A healthy `java -version` takes 0.1 s; a loaded machine gets plenty of room."""

_PROBED: dict[tuple[str, int], Java | str] = {}


@dataclass(frozen=True)
class Java:
    """A Java runtime that Spark accepts."""

    home: Path
    """What JAVA_HOME must be."""
    version: int
    """Feature version, e.g. 17."""
    executable: Path


def find_java(environ: Mapping[str, str], *, timeout_seconds: float = PROBE_TIMEOUT_SECONDS) -> Java:
    """Return the first usable Java of JAVA_HOME and PATH; MachineError says what is wrong with each and what to do."""
    refused = []
    for origin, executable in _candidates(environ):
        found = _probe_once(executable, timeout_seconds)
        if isinstance(found, Java):
            return found
        refused.append(f"{found} ({origin}: {executable})")
    raise MachineError(
        "No usable Java for Spark",
        expected=f"Java {MINIMUM_VERSION} or newer with the module {VECTOR_MODULE}, from JAVA_HOME or PATH",
        actual="; ".join(refused) or "no java in JAVA_HOME or on PATH",
        hint=install_hint(sys.platform),
    )


def install_hint(platform: str) -> str:
    """Return the command that installs a suitable Java on ``platform`` (a ``sys.platform``)."""
    command = "brew install openjdk@17" if platform == "darwin" else "apt-get install openjdk-17-jre-headless"
    family = "macOS" if platform == "darwin" else "Debian/Ubuntu"
    return f"{family}: {command}; or set JAVA_HOME to a Java {MINIMUM_VERSION} or newer"


def _candidates(environ: Mapping[str, str]) -> list[tuple[str, Path]]:
    found = []
    home = environ.get("JAVA_HOME")
    if home:
        found.append(("JAVA_HOME", Path(home) / "bin" / "java"))
    on_path = shutil.which("java", path=environ.get("PATH", ""))
    if on_path:
        found.append(("PATH", Path(on_path)))
    return found


def _probe_once(executable: Path, timeout_seconds: float) -> Java | str:
    try:
        key = (str(executable), executable.stat().st_mtime_ns)
    except OSError:
        return "no such file"
    if key not in _PROBED:
        _PROBED[key] = _probe(executable, timeout_seconds)
    return _PROBED[key]


def _probe(executable: Path, timeout_seconds: float) -> Java | str:
    settings = _ask(executable, ["-XshowSettings:properties", "-version"], timeout_seconds)
    if isinstance(settings, str):
        return settings
    version = parse_version(settings[0])
    if version is None:
        return "a java that does not say its version"
    if version < MINIMUM_VERSION:
        return f"Java {version}"
    modules = _ask(executable, ["--list-modules"], timeout_seconds)
    if isinstance(modules, str):
        return modules
    if VECTOR_MODULE not in modules[0]:
        return f"Java {version} without the module {VECTOR_MODULE}"
    return Java(_home(settings[0], executable), version, executable)


def _ask(executable: Path, arguments: list[str], timeout_seconds: float) -> tuple[str] | str:
    """Return the output as a 1-tuple, or what went wrong as plain text."""
    # JAVA_TOOL_OPTIONS stays: Spark's own JVMs get it too, so a value that breaks java must show here.
    try:
        done = subprocess.run(
            [str(executable), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return f"a java that did not answer within {timeout_seconds:g} s"
    except OSError as error:
        return f"a java that cannot be run: {error.strerror or error}"
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        last = output.strip().splitlines()[-1:] or ["no output"]
        return f"a java that ended with status {done.returncode}: {last[0][:200]}"
    return (output,)


def parse_version(output: str) -> int | None:
    """Return the feature version that ``java -version`` names (8 for "1.8.0_292"), None where it names none."""
    match = re.search(r"^\s*java\.specification\.version = (\S+)", output, re.MULTILINE)
    match = match or re.search(r'version "([^"]+)"', output) or re.search(r"^(?:openjdk|java) (\d\S*)", output, re.M)
    numbers = re.findall(r"\d+", match.group(1)) if match else []
    if not numbers:
        return None
    return int(numbers[1]) if numbers[0] == "1" and len(numbers) > 1 else int(numbers[0])


def _home(settings: str, executable: Path) -> Path:
    # /usr/bin/java is a stub on macOS, so Java's own word comes first.
    match = re.search(r"^\s*java\.home = (.+)$", settings, re.MULTILINE)
    home = Path(match.group(1).strip()) if match else Path(os.path.realpath(executable)).parent.parent
    return home

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparkgauge.cluster import java
from sparkgauge.errors import MachineError

MODULES = "java.base@17.0.1\\njdk.incubator.vector@17.0.1"


def fake_java(folder: Path, body: str) -> Path:
    executable = folder / "bin" / "java"
    executable.parent.mkdir(parents=True)
    executable.write_text(f"#!/bin/sh\n{body}\n")
    executable.chmod(0o755)
    return executable


def healthy(folder: Path, version: str = "17.0.1", modules: str = MODULES) -> Path:
    body = f"""case "$*" in
*--list-modules*) printf '{modules}\\n' ;;
*) printf '    java.home = {folder}\\n    java.specification.version = {version.split(".")[0]}\\n' >&2
   printf 'openjdk version "{version}" 2021-10-19\\n' >&2 ;;
esac"""
    return fake_java(folder, body)


def refusal(environ: dict[str, str], timeout_seconds: float = 20.0) -> str:
    with pytest.raises(MachineError) as caught:
        java.find_java(environ, timeout_seconds=timeout_seconds)
    assert "Java 17 or newer" in str(caught.value.expected)
    return str(caught.value)


@pytest.mark.parametrize(("version", "accepted"), [("16.0.2", False), ("17.0.1", True), ("25", True)])
def test_version_limit(tmp_path: Path, version: str, accepted: bool) -> None:
    executable = healthy(tmp_path / "jdk", version)
    environ = {"JAVA_HOME": str(tmp_path / "jdk"), "PATH": ""}
    if not accepted:
        assert "Java 16 (JAVA_HOME:" in refusal(environ)
        return
    found = java.find_java(environ)
    assert found == java.Java(tmp_path / "jdk", int(version.split(".")[0]), executable)


def test_wrong_java_says_version_and_command(tmp_path: Path) -> None:
    fake_java(tmp_path, "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2")
    message = refusal({"PATH": str(tmp_path / "bin") + os.pathsep + "/bin"})
    assert "Java 11 (PATH:" in message
    assert "openjdk@17" in message or "apt-get install openjdk-17-jre-headless" in message


def test_no_java() -> None:
    message = refusal({"PATH": ""})
    assert "no java in JAVA_HOME or on PATH" in message
    assert "or set JAVA_HOME" in message


def test_java_home_without_java(tmp_path: Path) -> None:
    assert "no such file (JAVA_HOME:" in refusal({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_a_wrong_java_home_gives_way_to_path(tmp_path: Path) -> None:
    fake_java(tmp_path / "old", "echo 'java version \"1.8.0_292\"' >&2")
    healthy(tmp_path / "new")
    environ = {
        "JAVA_HOME": str(tmp_path / "old"),
        "PATH": str(tmp_path / "new" / "bin") + os.pathsep + os.environ["PATH"],
    }
    assert java.find_java(environ).home == tmp_path / "new"


def test_java_without_the_vector_module(tmp_path: Path) -> None:
    healthy(tmp_path, modules="java.base@17.0.1")
    assert "Java 17 without the module jdk.incubator.vector" in refusal({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_a_java_that_hangs(tmp_path: Path) -> None:
    fake_java(tmp_path, "exec sleep 600")
    environ = {"JAVA_HOME": str(tmp_path), "PATH": ""}
    assert "did not answer within 0.2 s" in refusal(environ, timeout_seconds=0.2)


def test_a_java_that_crashes(tmp_path: Path) -> None:
    fake_java(tmp_path, "echo 'Error: could not find libjava.so' >&2; exit 3")
    assert "ended with status 3: Error: could not find libjava.so" in refusal({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_a_java_that_is_not_a_program(tmp_path: Path) -> None:
    fake_java(tmp_path, "").write_bytes(b"\0not a program")
    assert "cannot be run" in refusal({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_a_java_that_says_nothing(tmp_path: Path) -> None:
    fake_java(tmp_path, "exit 0")
    assert "does not say its version" in refusal({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_each_java_is_asked_once_until_it_changes(tmp_path: Path) -> None:
    executable = healthy(tmp_path / "jdk")
    log = tmp_path / "calls"
    executable.write_text(executable.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\necho x >> {log}\n"))
    environ = {"JAVA_HOME": str(tmp_path / "jdk"), "PATH": ""}
    java.find_java(environ)
    asked = log.read_text()
    java.find_java(environ)
    assert log.read_text() == asked
    os.utime(executable, ns=(1, 1))
    java.find_java(environ)
    assert log.read_text() == asked * 2


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ('java version "1.8.0_292"', 8),
        ('openjdk version "17" 2021-09-14', 17),
        ('openjdk version "21-ea" 2023', 21),
        ("openjdk 17.0.15 2025-04-15", 17),
        ("    java.specification.version = 1.8\n", 8),
        ("hello", None),
        ("", None),
    ],
)
def test_versions_are_read(output: str, version: int | None) -> None:
    assert java.parse_version(output) == version


def test_the_hint_fits_the_platform() -> None:
    assert "brew install openjdk@17" in java.install_hint("darwin")
    assert "apt-get install openjdk-17-jre-headless" in java.install_hint("linux")

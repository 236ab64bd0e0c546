"""The record of the machine: its limits, its class, its software, and the commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge import environment
from sparkgauge.records import Environment, from_json, to_json

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    """Return ``root`` with ``files`` (path -> content) in it."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process be allowed on eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_capture_is_a_record_of_this_machine() -> None:
    captured = environment.capture(os.environ, java_version="17.0.1", gpus=("Fake GPU",))
    assert captured.cores >= 1
    assert captured.memory_bytes > 64 * MIB
    assert captured.software["java"] == "17.0.1"
    assert captured.software["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert captured.hardware_class.endswith("-1x-fake-gpu")
    assert from_json(Environment, to_json(captured)) == captured


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("AMD EPYC", "linux-x86_64-amd-epyc-2c"),
        ("AMD EPYC 7763 64-Core Processor", "linux-x86_64-amd-epyc-7763-2c"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "linux-x86_64-intel-xeon-2.20ghz-2c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "linux-x86_64-intel-xeon-platinum-8481c-2c"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "linux-x86_64-intel-core-i7-8650u-2c"),
        ("AMD Ryzen 7 PRO 4750U with Radeon Graphics", "linux-x86_64-amd-ryzen-7-pro-4750u-2c"),
        ("", "linux-x86_64-unknown-2c"),
    ],
)
def test_hardware_class(cpu: str, expected: str) -> None:
    assert environment.hardware_class("Linux", "x86_64", cpu, 2) == expected


def test_hardware_class_counts_gpus_whatever_their_order() -> None:
    first = environment.hardware_class("Linux", "x86_64", "AMD EPYC", 16, ["NVIDIA H100 80GB HBM3", "Tesla M60"])
    second = environment.hardware_class("Linux", "x86_64", "AMD EPYC", 16, ["Tesla M60", "NVIDIA H100 80GB HBM3"])
    assert first == second == "linux-x86_64-amd-epyc-16c-1x-nvidia-h100-80gb-hbm3-1x-tesla-m60"


@given(st.text(), st.text(), st.text(), st.integers(1, 999), st.lists(st.text(), max_size=3))
def test_hardware_class_is_always_a_folder_name(
    system: str, machine: str, cpu: str, cores: int, gpus: list[str]
) -> None:
    name = environment.hardware_class(system, machine, cpu, cores, gpus)
    assert re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*", name)
    assert ".." not in name.split("/")
    assert f"{cores}c" in name


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        ("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n", "AMD EPYC family 25 model 1"),
        ("cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Intel(R) Xeon(R) Gold 6230\n", "Intel(R) Xeon(R) Gold 6230"),
        ("processor\t: 0\nmodel\t\t: 2\nmodel name\t: AMD   EPYC \n", "AMD EPYC model 2"),
        ("processor : 0\ncpu : POWER9, altivec supported\n", "POWER9, altivec supported"),
        ("processor : 0\nHardware : BCM2835\n", "BCM2835"),
    ],
)
def test_cpu_model(tmp_path: Path, cpuinfo: str, model: str) -> None:
    assert environment.cpu_model(write(tmp_path, {"proc/cpuinfo": cpuinfo})) == model


def test_cpu_model_without_proc_is_something(tmp_path: Path) -> None:
    assert environment.cpu_model(tmp_path)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("199999 100000", 1),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
    ],
)
def test_cores_of_a_version_2_group(tmp_path: Path, limit: str, cores: int) -> None:
    files = {"proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/cpu.max": limit}
    assert environment.usable_cores(write(tmp_path, files)) == cores


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_cores_of_a_version_1_group_seen_from_a_container(tmp_path: Path, quota: str, cores: int) -> None:
    files = {
        # the path is the host's, the mount shows only the container's own group
        "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert environment.usable_cores(write(tmp_path, files)) == cores


def test_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert environment.usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 2048 * MIB), (str(512 * MIB), 512 * MIB), (str(4096 * MIB), 2048 * MIB)]
)
def test_memory_of_a_version_2_group(tmp_path: Path, limit: str, expected: int) -> None:
    files = {
        "proc/meminfo": f"MemTotal:       {2048 * 1024} kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": limit,
        "sys/fs/cgroup/a/b/memory.max": "max",
    }
    assert environment.memory_bytes(write(tmp_path, files)) == expected


@pytest.mark.parametrize(("limit", "expected"), [(256 * MIB, 256 * MIB), (9223372036854771712, 2048 * MIB)])
def test_memory_of_a_version_1_group(tmp_path: Path, limit: int, expected: int) -> None:
    files = {
        "proc/meminfo": f"MemTotal: {2048 * 1024} kB\n",
        "proc/self/cgroup": "4:memory:/g\n",
        "sys/fs/cgroup/memory/g/memory.limit_in_bytes": str(limit),
    }
    assert environment.memory_bytes(write(tmp_path, files)) == expected


def test_software_versions_need_no_import() -> None:
    code = (
        "import sys; from sparkgauge import environment; v = environment.software_versions({}); "
        "heavy = {'numpy', 'scipy', 'pyspark', 'tensorflow', 'keras', 'torch', 'pytest'} & set(sys.modules); "
        "assert not heavy, heavy; print(v['numpy'], '|', v['blas'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, blas = done.stdout.split(" | ")
    assert re.match(r"\d+\.\d+", version)
    assert blas.strip()


def test_what_is_not_installed_or_not_set_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise environment.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "metadata", nothing)
    monkeypatch.setattr(environment.metadata, "distribution", nothing)
    found = environment.software_versions({"OMP_NUM_THREADS": "1", "HOME": "/x"})
    assert set(found) == {"python", "OMP_NUM_THREADS"}


def test_tensorflow_cpu_counts_as_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cpu(name: str) -> str:
        return "2.99" if name == "tensorflow-cpu" else ""

    monkeypatch.setattr(environment, "installed_version", only_cpu)
    assert environment.software_versions({})["tensorflow"] == "2.99"


@pytest.mark.parametrize(("text", "version"), [(None, ""), ("Name: half-gone\n", ""), ("Version: 1.2\n", "1.2")])
def test_remains_of_an_installation_have_no_version(
    text: str | None, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "half_gone-1.2.dist-info"
    folder.mkdir()
    if text is not None:
        (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert environment.installed_version("half-gone") == version
    assert environment.installed_version("never-there") == ""


def test_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.load_average() >= 0.0

    def refuse() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", refuse)
    assert environment.load_average() == 0.0


def git(folder: Path, *words: str) -> str:
    """Return what ``git words`` prints in ``folder``, away from the user's configuration."""
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a new repository without commits."""
    git(tmp_path, "init", "-q")
    return tmp_path


def test_commit_of_a_clean_and_a_changed_tree(repository: Path) -> None:
    file = repository / "file"
    file.write_text("one")
    git(repository, "add", "file")
    git(repository, "commit", "-q", "-m", "first")
    sha = git(repository, "rev-parse", "HEAD")
    assert environment.git_commit(repository) == sha
    file.write_text("two")
    assert environment.git_commit(repository) == f"{sha}+dirty"
    file.write_text("one")
    (repository / "new").write_text("untracked")
    assert environment.git_commit(repository) == f"{sha}+dirty"


def test_commit_is_empty_before_the_first(repository: Path) -> None:
    assert environment.git_commit(repository) == ""


def test_commit_is_empty_outside_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit(tmp_path) == ""
    assert environment.git_commit(tmp_path / "absent") == ""


def test_commit_is_empty_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert environment.git_commit(repository) == ""


def test_a_hung_git_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "git"
    sleeper.write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "TOOL_TIMEOUT_SECONDS", 0.1)
    assert environment.git_commit(tmp_path) == ""


def test_an_unanswered_status_is_not_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "git"
    fake.write_text('#!/bin/sh\n[ "$1" = rev-parse ] && echo abc123\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_commit(tmp_path) == "abc123+dirty"


def test_describe() -> None:
    described = Environment(
        hardware_class="linux-x86_64-amd-epyc-2c",
        cpu_model="AMD EPYC",
        cores=2,
        memory_bytes=24 * 2**30,
        gpus=("Tesla M60", "Tesla M60"),
        operating_system="Debian",
        software={"python": "3.11.7", "java": "17.0.1", "spark": "4.3.0", "keras": "3"},
    )
    assert environment.describe(described) == (
        "AMD EPYC, 2 cores, 24.0 GiB, 2 x Tesla M60; Python 3.11.7, Java 17.0.1, Spark 4.3.0; "
        "hardware class linux-x86_64-amd-epyc-2c"
    )

"""The doctor on machines that are played: each check's good and bad cases, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkgauge import doctor
from sparkgauge.doctor import Check, Machine

GOOD_VERSIONS = {
    "pyspark": "4.0.1",
    "tensorflow-cpu": "2.21.0",
    "tensorflowonspark": "2.2.5",
    "keras": "3.15.1",
    "setuptools": "65.5.0",
}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a machine without any file in its /proc and /sys, and with everything installed."""
    return Machine(
        root=tmp_path / "root",
        environ={"PATH": ""},
        versions=dict(GOOD_VERSIONS),
        python=(3, 11),
        cores=2,
        cache_folder=tmp_path / "cache",
        temporary_folder=tmp_path,
        has_module=lambda name: True,
        sleep=lambda seconds: None,
        hostname=lambda: "ci-7",
        lookup=lambda name: "127.0.1.1",
    )


def put(machine: Machine, path: str, text: str) -> None:
    file = machine.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def changed(machine: Machine, **fields: Any) -> Machine:
    return dataclasses.replace(machine, **fields)


def assert_complete(check: Check) -> None:
    """A finding that is not ok must say why it matters and what to do."""
    assert check.found
    assert check.status == "ok" or (check.why and check.action), check


@pytest.mark.parametrize(
    ("python", "status"), [((3, 9), "fail"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "fail"), ((4, 0), "fail")]
)
def test_python(machine: Machine, python: tuple[int, int], status: str) -> None:
    check = doctor.check_python(changed(machine, python=python))
    assert check.status == status
    assert_complete(check)


def java(folder: Path, version: str, modules: str) -> str:
    """Return a JAVA_HOME whose java says what is wanted."""
    binary = folder / "bin" / "java"
    binary.parent.mkdir(parents=True)
    answer = (
        f'case "$1" in --list-modules) echo "{modules}";; *) echo "    java.specification.version = {version}";; esac'
    )
    binary.write_text(f"#!/bin/sh\n{answer}\n")
    binary.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("version", "modules", "status"),
    [("17", "jdk.incubator.vector@17", "ok"), ("17", "java.base@17", "fail"), ("11", "jdk.incubator.vector", "fail")],
)
def test_java(machine: Machine, tmp_path: Path, version: str, modules: str, status: str) -> None:
    environ = {"JAVA_HOME": java(tmp_path / "java", version, modules), "PATH": ""}
    check = doctor.check_java(changed(machine, environ=environ))
    assert check.status == status
    assert version in check.found
    assert_complete(check)


def test_no_java(machine: Machine) -> None:
    check = doctor.check_java(machine)
    assert check.status == "fail" and "no java" in check.found
    assert_complete(check)


@pytest.mark.parametrize("version", ["3.5.1", "5.0.0", None])
def test_wrong_spark(machine: Machine, version: str | None) -> None:
    versions = {"pyspark": version} if version else {}
    check = doctor.check_spark(changed(machine, versions=versions))
    assert check.status == "fail" and "pyspark>=4.0,<5" in check.action


def test_spark_home(machine: Machine, tmp_path: Path) -> None:
    assert doctor.check_spark(machine).status == "ok"
    machine = changed(machine, environ={"SPARK_HOME": str(tmp_path / "spark")})
    assert "is no Spark" in doctor.check_spark(machine).found
    jars = tmp_path / "spark" / "jars"
    jars.mkdir(parents=True)
    (jars / "spark-core_2.13-4.0.1.jar").write_text("")
    assert doctor.check_spark(machine).status == "ok"
    (jars / "spark-core_2.13-4.0.1.jar").rename(jars / "spark-core_2.13-3.5.0.jar")
    check = doctor.check_spark(machine)
    assert check.status == "warn" and "Spark 3.5.0" in check.found and "pyspark==3.5.0" in check.action


@pytest.mark.parametrize(
    ("versions", "action"),
    [
        ({"tensorflow-cpu": None}, "pytest-sparkgauge"),
        ({"tensorflowonspark": None}, "pytest-sparkgauge"),
        ({"tensorflow": "2.21.0"}, "pip uninstall"),
        ({"tensorflow-cpu": "2.15.1"}, ">=2.16"),
        ({"tensorflow-cpu": "3.0"}, "<3"),
        ({"tensorflowonspark": "2.2.4"}, "2.2.5"),
        ({"keras": "2.15.0"}, "keras>=3"),
        ({"keras": None}, "keras>=3"),
        ({"setuptools": "81.0.0"}, "setuptools<81"),
    ],
)
def test_frameworks_that_do_not_fit(machine: Machine, versions: dict[str, str | None], action: str) -> None:
    merged = {name: value for name, value in {**GOOD_VERSIONS, **versions}.items() if value}
    check = doctor.check_tensorflow(changed(machine, versions=merged))
    assert check.status == "fail"
    assert action in check.action
    assert_complete(check)


@pytest.mark.parametrize(
    "versions", [{}, {"setuptools": "80.9.0"}, {"tensorflow-cpu": "2.16"}, {"setuptools": None}, {"keras": "3.0.0rc1"}]
)
def test_frameworks_that_fit(machine: Machine, versions: dict[str, str | None]) -> None:
    merged = {name: value for name, value in {**GOOD_VERSIONS, **versions}.items() if value}
    assert doctor.check_tensorflow(changed(machine, versions=merged)).status == "ok"


def test_pkg_resources(machine: Machine) -> None:
    assert doctor.check_pkg_resources(machine).status == "ok"
    without = changed(machine, has_module=lambda name: False)
    assert doctor.check_pkg_resources(without).status == "fail"
    assert doctor.check_pkg_resources(changed(without, versions={})).found == "not needed"


def test_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor.check_gpu(machine).status == "ok"
    put(machine, "proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t NVIDIA H100\nGPU UUID: \t GPU-1\n")
    check = doctor.check_gpu(machine)
    assert check.status == "warn" and "tensorflow-cpu cannot" in check.why
    found = doctor.check_gpu(changed(machine, versions={"tensorflow": "2.21"}))
    assert found.status == "ok" and "NVIDIA H100" in found.found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = doctor.check_gpu(machine)
    assert hidden.status == "warn" and "CUDA_VISIBLE_DEVICES" in hidden.found


def test_governor(machine: Machine) -> None:
    assert doctor.check_governor(machine).found.startswith("not exposed")
    put(machine, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    assert doctor.check_governor(machine).status == "ok"
    put(machine, "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n")
    check = doctor.check_governor(machine)
    assert check.status == "warn" and check.found == "performance, powersave"


@pytest.mark.parametrize(
    ("file", "text", "status"),
    [
        ("intel_pstate/no_turbo", "1", "ok"),
        ("intel_pstate/no_turbo", "0", "warn"),
        ("cpufreq/boost", "0", "ok"),
        ("cpufreq/boost", "1", "warn"),
    ],
)
def test_turbo(machine: Machine, file: str, text: str, status: str) -> None:
    assert doctor.check_turbo(machine).found == "not exposed"
    put(machine, f"sys/devices/system/cpu/{file}", f"{text}\n")
    check = doctor.check_turbo(machine)
    assert check.status == status
    assert_complete(check)


@pytest.mark.parametrize(("load", "status"), [("0.49", "ok"), ("0.50", "ok"), ("0.51", "warn"), ("12", "warn")])
def test_load(machine: Machine, load: str, status: str) -> None:
    put(machine, "proc/loadavg", f"{load} 1.0 1.0 1/100 1000\n")
    check = doctor.check_load(machine)
    assert check.status == status and "on 2 cores" in check.found


def counting(machine: Machine, before: dict[str, str], after: dict[str, str]) -> list[Check]:
    """Return the counters' checks while the machine's files turn from ``before`` into ``after``."""
    for path, text in before.items():
        put(machine, path, text)

    def sleep(seconds: float) -> None:
        for path, text in after.items():
            put(machine, path, text)

    return doctor.check_counters(changed(machine, sleep=sleep))


def stat(idle: int, steal: int) -> dict[str, str]:
    return {"proc/stat": f"cpu  100 0 100 {idle} 0 0 0 {steal} 50 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"}


def test_counters_that_are_not_exposed(machine: Machine) -> None:
    steal, throttling, swap = counting(machine, {}, {})
    assert [steal.status, throttling.status, swap.status] == ["ok", "ok", "ok"]
    assert (steal.found, throttling.found, swap.found) == ("not exposed", "no processor quota", "0 MiB in use")


def test_steal(machine: Machine) -> None:
    assert counting(machine, stat(10_000, 0), stat(10_100, 0))[0].status == "ok"
    assert counting(machine, stat(10_000, 0), stat(10_100, 1))[0].status == "ok"  # 1 of 101 ticks
    now = counting(machine, stat(10_000, 0), stat(10_098, 2))[0]
    assert now.status == "warn" and now.found.startswith("2.0% in 0.5 s")
    ever = counting(machine, stat(10_000, 500), stat(10_100, 500))[0]
    assert ever.status == "warn" and ever.found.startswith("0.0%")
    assert_complete(now)


@pytest.mark.parametrize(
    ("cgroup", "file"), [("0::/", "sys/fs/cgroup/cpu.stat"), ("2:cpu,cpuacct:/", "sys/fs/cgroup/cpu/cpu.stat")]
)
def test_throttling(machine: Machine, cgroup: str, file: str) -> None:
    files = {"proc/self/cgroup": f"{cgroup}\n", file: "nr_periods 10\nnr_throttled 0\nthrottled_usec 0\n"}
    assert counting(machine, files, {})[1].found == "never throttled"
    check = counting(machine, files, {file: "nr_periods 20\nnr_throttled 3\n"})[1]
    assert check.status == "warn" and check.found == "3 times so far, 3 in the last 0.5 s"
    assert_complete(check)


def test_swap(machine: Machine) -> None:
    full = {"proc/meminfo": f"SwapTotal: {200 * 1024} kB\nSwapFree: {99 * 1024} kB\n"}
    some = {"proc/meminfo": f"SwapTotal: {200 * 1024} kB\nSwapFree: {100 * 1024} kB\n"}
    assert counting(machine, some, {})[2].status == "ok"
    check = counting(machine, full, {})[2]
    assert check.status == "warn" and check.found == "101 MiB in use"
    moving = counting(
        machine, {**some, "proc/vmstat": "pswpin 5\npswpout 7\n"}, {"proc/vmstat": "pswpin 6\npswpout 9\n"}
    )[2]
    assert moving.status == "warn" and "3 pages moved" in moving.found


@pytest.mark.parametrize(
    ("available_mib", "status"), [(4096, "ok"), (4095, "warn"), (2048, "warn"), (2047, "fail"), (1, "fail")]
)
def test_memory(machine: Machine, available_mib: int, status: str) -> None:
    put(machine, "proc/meminfo", f"MemTotal: {8 * 2**20} kB\nMemAvailable: {available_mib * 1024} kB\n")
    check = doctor.check_memory(machine)
    assert check.status == status
    assert_complete(check)


def test_memory_of_a_container(machine: Machine) -> None:
    put(machine, "proc/meminfo", f"MemTotal: {8 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
    put(machine, "proc/self/cgroup", "0::/\n")
    put(machine, "sys/fs/cgroup/memory.max", str(2**30))
    assert doctor.check_memory(machine).status == "fail"


@pytest.mark.parametrize(
    ("free_mib", "status"), [(2048, "ok"), (2047, "warn"), (500, "warn"), (499, "fail"), (0, "fail")]
)
def test_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch, free_mib: int, status: str) -> None:
    usage = shutil._ntuple_diskusage(0, 0, free_mib * 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    temporary, cache = doctor.check_disk(machine)
    assert (temporary.status, cache.status) == (status, status)
    assert_complete(cache)


def test_a_disk_that_cannot_be_written(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = doctor.check_disk(machine)[1]
    assert check.status == "fail" and "cannot be written" in check.found and "XDG_CACHE_HOME" in check.action


@pytest.mark.parametrize(("free_mib", "status"), [(0, "warn"), (64, "warn"), (65, "ok")])
def test_shared_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch, free_mib: int, status: str) -> None:
    assert doctor.check_shared_memory(machine).status == "warn"  # there is none
    (machine.root / "dev/shm").mkdir(parents=True)
    usage = shutil._ntuple_diskusage(0, 0, free_mib * 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor.check_shared_memory(machine).status == status


def test_loopback(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_loopback(machine).status == "ok"

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    check = doctor.check_loopback(machine)
    assert check.status == "fail" and "Connection refused" in check.found
    assert_complete(check)


def test_ports(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_ports(machine).status == "ok"
    put(machine, "proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
    assert "32768-60999" in doctor.check_ports(machine).found
    put(machine, "proc/sys/net/ipv4/ip_local_port_range", "32768\t32800\n")
    assert doctor.check_ports(machine).status == "warn"

    def none_left(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", none_left)
    assert doctor.check_ports(machine).status == "fail"


def test_hostname(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_hostname(machine).found == "ci-7 is 127.0.1.1"

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    check = doctor.check_hostname(changed(machine, lookup=unknown))
    assert check.status == "warn" and "/etc/hosts" in check.action
    monkeypatch.setattr(doctor, "SLOW_LOOKUP_SECONDS", 0.01)

    def slow(name: str) -> str:
        time.sleep(0.1)
        return "10.0.0.1"

    assert doctor.check_hostname(changed(machine, lookup=slow)).status == "warn"
    monkeypatch.setattr(doctor, "LOOKUP_TIMEOUT_SECONDS", 0.01)
    assert "does not resolve" in doctor.check_hostname(changed(machine, lookup=slow)).found


def test_data(machine: Machine, tmp_path: Path) -> None:
    missing = doctor.check_data(machine)
    assert missing.status == "warn" and missing.found == "none in the cache"
    assert doctor.check_data(changed(machine, data="synthetic")).status == "warn"
    assert doctor.check_data(changed(machine, environ={"SPARKGAUGE_DATA": "synthetic"})).status == "warn"
    nowhere = doctor.check_data(changed(machine, data=str(tmp_path / "nowhere")))
    assert nowhere.status == "fail" and "nowhere" in nowhere.found
    (tmp_path / "empty").mkdir()
    assert doctor.check_data(changed(machine, data=str(tmp_path / "empty"))).status == "fail"
    (tmp_path / "cifar.tar.gz").write_bytes(b"")
    assert "not opened" in doctor.check_data(changed(machine, data=str(tmp_path / "cifar.tar.gz"))).found


def test_data_in_a_layout(machine: Machine, tmp_path: Path) -> None:
    record = bytes(3073)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name in names:
        (tmp_path / name).write_bytes(record)
    check = doctor.check_data(changed(machine, data=str(tmp_path)))
    assert (check.status, check.found) == ("ok", f"CIFAR-10 in {tmp_path}")


def test_everything_at_once_on_a_played_machine(machine: Machine) -> None:
    checks = doctor.examine(machine)
    names = [check.name for check in checks]
    assert len(names) == len(set(names)) == 20
    for check in checks:
        assert_complete(check)
    assert doctor.worst(checks) == "fail"  # there is no Java on it


def test_a_check_that_breaks_is_a_finding(machine: Machine) -> None:
    def lookup(name: str) -> str:
        raise AssertionError("never called")

    def hostname() -> str:
        raise RuntimeError("no name")

    checks = {check.name: check for check in doctor.examine(changed(machine, hostname=hostname, lookup=lookup))}
    assert checks["hostname"].status == "warn" and "RuntimeError: no name" in checks["hostname"].found
    assert "loopback" in checks and "data" in checks


def test_this_machine() -> None:
    checks = doctor.examine(Machine(sleep=lambda seconds: None))
    assert len(checks) == 20
    for check in checks:
        assert_complete(check)


def test_text_and_json() -> None:
    checks = [Check("java", "ok", "17"), Check("load", "warn", "9", "it matters", "stop it")]
    assert doctor.to_text(checks) == [
        "ok    java  17",
        "warn  load  9",
        "            why: it matters",
        "            do:  stop it",
        "2 checks: 1 ok, 1 warn, 0 fail",
    ]
    report = json.loads(doctor.to_json_text(checks))
    assert (report["schema"], report["status"]) == (1, "warn")
    assert report["checks"][1] == {
        "name": "load",
        "status": "warn",
        "found": "9",
        "why": "it matters",
        "action": "stop it",
    }
    assert doctor.worst([]) == "ok"
    assert doctor.worst([Check("a", "warn", ""), Check("b", "fail", ""), Check("c", "ok", "")]) == "fail"


@given(content=st.text(max_size=60), name=st.sampled_from(["proc/stat", "proc/loadavg", "proc/meminfo", "proc/vmstat"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_kernel_file_breaks_a_check(machine: Machine, content: str, name: str) -> None:
    put(machine, name, content.encode("utf-8", "replace").decode())
    for check in (*doctor.check_counters(machine), doctor.check_load(machine), doctor.check_memory(machine)):
        assert_complete(check)

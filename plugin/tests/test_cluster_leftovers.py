"""Nothing outlives the process that started a cluster, however that process ends. Each ending on real Spark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin.tests.processes import heed_interrupts
from sparkgauge.cluster import conf, standalone, watchdog

ROOT = str(Path(conf.__file__).parents[2])

SCRIPT = """
import json, os, subprocess, sys, threading, time
from sparkgauge.cluster import watchdog
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.spark import SparkCluster

ending, answer = sys.argv[1:]
cluster = SparkCluster.start(ClusterSpec(1, 1, 512, sys.executable, start_timeout_seconds=240))

def train(rows):
    # What frameworks do: a helper process of its own session; this one even drops our environment.
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True, env={})
    open(answer + ".up", "w").close()
    time.sleep(600)
    yield 1

def job():
    try:
        cluster.spark.sparkContext.parallelize([1], 1).mapPartitions(train).collect()
    except Exception:
        pass

threading.Thread(target=job, daemon=True).start()
while not os.path.exists(answer + ".up"):
    time.sleep(0.02)
stranger = os.fork() if ending == "kill" else 0
if ending == "kill" and stranger == 0:
    os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(answer + ".part", "w") as file:
    seen = [vars(process) for process in watchdog.marked_processes(cluster.mark)]
    parts = {"seen": seen, "mark": cluster.mark, "folder": str(cluster.folder)}
    json.dump(parts | {"guard": cluster._guard.pid, "stranger": stranger}, file)
os.rename(answer + ".part", answer)
if ending == "exception":
    raise RuntimeError("a test went wrong")
if ending in ("interrupt", "terminate", "kill"):
    time.sleep(600)
"""

START_SECONDS = 240
"""Far above what five clusters that start at once take."""

SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}
STATUS = {
    "normal": 0,
    "exception": 1,
    "interrupt": -signal.SIGINT,
    "terminate": -signal.SIGTERM,
    "kill": -signal.SIGKILL,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """Return a process with a cluster of its own, and where it answers, for every ending: all at once, to save time."""
    answers = {ending: tmp_path_factory.mktemp(ending) / "answer.json" for ending in STATUS}
    processes = {ending: (_start(ending, answer), answer) for ending, answer in answers.items()}
    yield processes
    for process, _ in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("ending", list(STATUS))
def test_nothing_outlives_the_process(ending: str, started: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, answer = started[ending]
    assert standalone.wait_until(lambda: answer.exists() or process.poll() is not None, START_SECONDS)
    assert answer.exists(), (answer.parent / "output").read_text()
    if ending in SIGNALS:
        process.send_signal(SIGNALS[ending])
    assert process.wait(60) == STATUS[ending]
    _check(json.loads(answer.read_text()), at_once=ending in ("normal", "exception", "interrupt"))


def _start(ending: str, answer: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(answer.parent)}
    with open(answer.parent / "output", "wb") as output:
        command = [sys.executable, "-c", SCRIPT, ending, str(answer)]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that a signal reaches it alone
            preexec_fn=heed_interrupts,
        )


def _check(answer: dict[str, Any], at_once: bool) -> None:
    seen = [watchdog.Process(**fields) for fields in answer["seen"]]
    commands = [process.command for process in seen]
    for part in ("Master", "worker.Worker", "SparkSubmit", "CoarseGrainedExecutorBackend", conf.DAEMON_MODULE):
        assert any(part in command for command in commands), part
    assert sum(conf.DAEMON_MODULE in command for command in commands) >= 2  # the daemon and its worker
    assert any("time.sleep" in command for command in commands)  # the helper without our mark
    limit_seconds = 0.0 if at_once else 15.0
    assert standalone.wait_until(lambda: not any(map(watchdog.is_running, seen)), limit_seconds)
    assert watchdog.marked_processes(answer["mark"]) == []
    assert standalone.wait_until(lambda: not Path(answer["folder"]).exists(), limit_seconds)
    assert standalone.wait_until(lambda: _is_gone(answer["guard"]), limit_seconds)
    if answer["stranger"]:
        os.kill(answer["stranger"], signal.SIGKILL)  # ProcessLookupError if the guard took it for one of ours


def _is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_sweep_kills_marked_processes_and_their_descendants_only(tmp_path: Path) -> None:
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    parent = (
        "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], env={}, start_new_session=True); time.sleep(600)"
    )
    ours = subprocess.Popen([sys.executable, "-c", parent, *sleep], env={**os.environ, "SPARKGAUGE_TEST": "a1"})
    other = subprocess.Popen(sleep, env={**os.environ, "SPARKGAUGE_TEST": "a12"})
    try:
        assert standalone.wait_until(lambda: len(watchdog.marked_processes("SPARKGAUGE_TEST=a1")) == 2, 10)
        assert watchdog.sweep("SPARKGAUGE_TEST=a1") == []
        assert ours.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        ours.kill()
        ours.wait()


def test_a_pid_with_a_new_owner_is_left_alone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], env={"SPARKGAUGE_TEST": "b"})
    try:
        assert standalone.wait_until(lambda: bool(watchdog.marked_processes("SPARKGAUGE_TEST=b")), 10)
        (seen,) = watchdog.marked_processes("SPARKGAUGE_TEST=b")
        former = watchdog.Process(seen.pid, seen.parent_pid, seen.group, "1", seen.command)
        watchdog.kill(former)
        assert not watchdog.is_running(former) and watchdog.is_running(seen)
        watchdog.kill(seen)
        assert child.wait(10) == -signal.SIGKILL
        watchdog.kill(seen)
    finally:
        child.kill()
        child.wait()


def test_a_dismissed_guard_touches_nothing(tmp_path: Path) -> None:
    guard = watchdog.Watchdog("SPARKGAUGE_TEST=none", tmp_path)
    guard.dismiss()
    assert tmp_path.exists() and _is_gone(guard.pid)


def test_the_guard_imports_the_standard_library_only() -> None:
    check = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='guard'); "
        "print([name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names"
        " and name != '__main__'])"
    )
    command = [sys.executable, "-I", "-S", "-c", check, str(watchdog.__file__)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"

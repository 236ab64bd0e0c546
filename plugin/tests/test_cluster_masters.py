"""Masters other than the embedded one, and the daemon that forks Python workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkgauge.cluster import conf, daemon, standalone, watchdog
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.java import find_java
from sparkgauge.cluster.spark import SparkCluster, find_spark_home
from sparkgauge.errors import ClusterError, MachineError

ROOT = str(Path(conf.__file__).parents[2])


def test_local_cluster_writes_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    master = "local-cluster[1,1,512]"
    spec = ClusterSpec(1, 1, 512, sys.executable, master=master)
    installed = find_spark_home(os.environ, spec)
    before = sorted(path.name for path in installed.iterdir())
    cluster = SparkCluster.start(spec)
    try:
        assert cluster.warm(1) > 0
        assert (cluster.folder / "spark-home" / "work").is_dir()
        cluster.ensure_alive()
    finally:
        cluster.stop()
    assert sorted(path.name for path in installed.iterdir()) == before
    assert list(tmp_path.iterdir()) == []
    assert watchdog.marked_processes(cluster.mark) == [] and not cluster.folder.exists()


@contextlib.contextmanager
def existing_master(folder: Path) -> Iterator[str]:
    """Run somebody else's authenticated master with one worker."""
    folder.mkdir()
    standalone.prepare_folder(folder)
    spec = ClusterSpec(1, 1, 512, sys.executable)
    other = standalone.StandaloneCluster(
        spec,
        folder,
        java=find_java(os.environ),
        spark_home=find_spark_home({}, spec),
        secret="theirs",
        marker="somebody-else",
    )
    try:
        yield other.start()
        other.ensure_running()  # the end of our session must not have touched it
    finally:
        other.stop()


def test_an_existing_master_is_used_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"spark.authenticate": "true", "spark.authenticate.secret": "theirs", "spark.driver.host": "127.0.0.1"}
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    with existing_master(tmp_path / "theirs") as url:
        extra = {**theirs, "spark.executorEnv.PYTHONPATH": ROOT}
        spec = ClusterSpec(1, 1, 512, sys.executable, master=url, extra=extra)
        cluster = SparkCluster.start(spec)
        try:
            assert cluster.warm(1) > 0
            marked = [process.command for process in watchdog.marked_processes(cluster.mark)]
            assert len(marked) == 1 and "SparkSubmit" in marked[0]  # the driver is all that we started
            cluster.ensure_alive()
            cluster.kill_leftover_jobs()
        finally:
            cluster.stop()
        assert os.environ["SPARK_LOCAL_IP"] == "127.0.0.1"
        _refuse_dynamic_allocation(url, extra)


def _refuse_dynamic_allocation(url: str, extra: dict[str, str]) -> None:
    # The user's own word outside of our options: a submit argument.
    os.environ["PYSPARK_SUBMIT_ARGS"] = "--conf spark.dynamicAllocation.enabled=true pyspark-shell"
    try:
        with pytest.raises(ClusterError, match="got spark.dynamicAllocation.enabled=true. Remove it"):
            SparkCluster.start(ClusterSpec(1, 1, 512, sys.executable, master=url, extra=extra))
    finally:
        del os.environ["PYSPARK_SUBMIT_ARGS"]


OWN_HOST = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}


def elsewhere(port: int, **extra: str) -> ClusterSpec:
    return ClusterSpec(
        1,
        1,
        512,
        sys.executable,
        master=f"spark://127.0.0.1:{port}",
        extra={**OWN_HOST, **extra},
        start_timeout_seconds=8,
        stop_timeout_seconds=2,
    )


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def children() -> str:
    return subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout


def test_a_master_that_is_not_there_is_said_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"No Spark master answers: .*127.0.0.1:9: Connection refused") as caught:
        SparkCluster.start(elsewhere(9))
    assert "spark://127.0.0.1:9" in str(caught.value) and "correct --gauge-master" in str(caught.value)
    assert time.monotonic() - began < 5


def test_a_master_that_does_not_answer_is_an_error_that_leaves_nothing(silent_port: int) -> None:
    with pytest.raises(ClusterError, match=f"(?s)got no answer within 8 s, in spark://127.0.0.1:{silent_port}"):
        SparkCluster.start(elsewhere(silent_port))
    assert "SparkSubmit" not in children()


def test_a_port_that_is_taken_is_one_line(silent_port: int) -> None:
    taken = {"spark.driver.port": str(silent_port), "spark.port.maxRetries": "0"}
    with pytest.raises(ClusterError, match="cannot have the port.*Address already in use") as caught:
        SparkCluster.start(elsewhere(silent_port, **taken))
    assert "\n" not in str(caught.value)
    assert "SparkSubmit" not in children()


def test_pyspark_without_jars_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyspark").mkdir()
    (tmp_path / "pyspark" / "__init__.py").touch()
    spec = ClusterSpec(1, 1, 512, sys.executable)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: _Spec([str(tmp_path / "pyspark")]))
        with pytest.raises(MachineError, match="without jars.*pip install pyspark"):
            find_spark_home({}, spec)
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MachineError, match="no package pyspark"):
            find_spark_home({}, spec)
    external = ClusterSpec(1, 1, 512, sys.executable, master="yarn")
    assert find_spark_home({"SPARK_HOME": "/opt/spark"}, external) == Path("/opt/spark")


class _Spec:
    def __init__(self, submodule_search_locations: list[str]) -> None:
        self.submodule_search_locations = submodule_search_locations


def test_early_imports_survive_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gauge_broken.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert daemon.preimport(" colorsys ,no_such_module,gauge_broken,") == ["colorsys"]
    assert daemon.preimport("") == []


def test_later_imports_happen_once_and_in_the_daemon_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("gauge_one", "gauge_two"):
        (tmp_path / f"{name}.py").write_text("")
    wanted = tmp_path / "wanted"
    later = daemon.Later(str(wanted))
    later.import_new()  # no file yet
    wanted.write_text("gauge_one\n")
    later.import_new()
    assert "gauge_one" in sys.modules and "gauge_two" not in sys.modules
    del sys.modules["gauge_one"]
    wanted.write_text("gauge_one\ngauge_two\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        later.import_new()
    assert "gauge_two" not in sys.modules
    later.import_new()
    assert "gauge_two" in sys.modules and "gauge_one" not in sys.modules


def test_early_imports_cannot_disturb_the_handshake(tmp_path: Path) -> None:
    (tmp_path / "gauge_noisy.py").write_text("import os\nprint('python')\nos.write(1, b'descriptor')\n")
    script = "from sparkgauge.cluster import daemon; daemon.preimport('gauge_noisy'); print('port')"
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "port\n"
    assert "python" in done.stderr and "descriptor" in done.stderr


def test_importing_the_daemon_is_light() -> None:
    script = "import sys, sparkgauge.cluster.daemon; print('pyspark' in sys.modules, 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"

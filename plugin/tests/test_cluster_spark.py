"""One real cluster for the module: a Spark master, two workers, two executors."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from plugin.tests.processes import lives
from sparkgauge.cluster import conf, standalone, watchdog
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.java import find_java
from sparkgauge.cluster.spark import SparkCluster, refuse_existing_session
from sparkgauge.errors import ClusterError

SPEC = ClusterSpec(
    executors=2,
    cores_per_executor=1,
    executor_memory_mebibytes=512,
    python=sys.executable,
    preimport=("colorsys", "no_such_module"),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    before = {name: os.environ.get(name) for name in ("SPARK_HOME", "PYSPARK_PYTHON", "JAVA_HOME", "SPARK_LOCAL_IP")}
    interrupt = signal.getsignal(signal.SIGINT)
    folder = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    try:
        said: list[str] = []
        running = SparkCluster.start(SPEC, said.append)
        assert len(said) == 3
        assert os.listdir(".") == []
        assert {name: os.environ.get(name) for name in before} == before
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        os.chdir(folder)
    yield running
    running.stop()
    assert watchdog.marked_processes(running.mark) == []
    assert not running.folder.exists()
    running.stop()


def run(cluster: SparkCluster, function: Any, tasks: int = 2) -> list[Any]:
    return list(cluster.spark.sparkContext.parallelize(range(tasks), tasks).mapPartitions(function).collect())


def test_executors_are_registered_before_the_first_job(cluster: SparkCluster) -> None:
    assert [executor.host for executor in cluster.executors] == ["127.0.0.1"] * 2
    assert len({executor.id for executor in cluster.executors}) == 2


def test_tasks_run_one_per_executor_in_fresh_processes_with_modules_imported_ahead(cluster: SparkCluster) -> None:
    def look(_: Any) -> Iterator[tuple[Any, ...]]:
        import os
        import sys
        import time

        time.sleep(0.3)
        folder = os.environ["TMPDIR"]
        yield (
            os.getpid(),
            os.getppid(),
            "colorsys" in sys.modules,
            os.environ["OMP_NUM_THREADS"],
            sys.executable,
            folder,
            "rlcompleter" in sys.modules,
        )

    assert cluster.warm(2) > 0
    first, second = run(cluster, look), run(cluster, look)
    assert len({row[1] for row in first}) == 2
    assert {row[1] for row in first} == {row[1] for row in second}
    assert len({row[0] for row in first + second}) == 4
    assert {row[2:] for row in first} == {(True, "1", sys.executable, str(cluster.folder / "tmp"), False)}
    assert cluster.preimport(["colorsys", "rlcompleter"])  # one is new
    assert not cluster.preimport(["colorsys", "rlcompleter"])
    assert {row[6] for row in run(cluster, look)} == {True}


def test_more_executors_than_there_are_is_said_at_once(cluster: SparkCluster) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="expected 3 executors, got 2 that the cluster has.*gauge-executors 3"):
        cluster.wait_for_executors(3)
    assert time.monotonic() - started < 5
    assert len(cluster.wait_for_executors(2)) == 2
    assert len(cluster.wait_for_executors(1)) == 2


def test_everything_listens_on_loopback_only(cluster: SparkCluster) -> None:
    listening = 0
    for process in watchdog.marked_processes(cluster.mark):
        for connection in psutil.Process(process.pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address: Any = ipaddress.ip_address(connection.laddr.ip)
                assert (getattr(address, "ipv4_mapped", None) or address).is_loopback, process
                listening += 1
    assert listening >= 5  # master, 2 workers, driver, gateway


def test_the_daemons_pages_are_locked(cluster: SparkCluster) -> None:
    text = (cluster.folder / "logs" / "master.log").read_text()
    page = text.partition("MasterWebUI to 127.0.0.1, and started at ")[2].split()[0]
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(page, timeout=10)
    with caught.value:
        assert caught.value.code == 403


def test_the_secret_is_on_no_command_line_and_in_no_readable_file(cluster: SparkCluster) -> None:
    secret = cluster.spark.sparkContext.getConf().get("spark.authenticate.secret")
    assert secret and len(secret) == 64
    commands = [process.command for process in watchdog.marked_processes(cluster.mark)]
    assert len(commands) >= 6 and not any(secret in command for command in commands)
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    holders = [path for path in (cluster.folder / "conf").iterdir() if secret in path.read_text()]
    assert [path.stat().st_mode & 0o777 for path in holders] == [0o600]


def test_a_worker_with_a_wrong_secret_is_refused(cluster: SparkCluster, tmp_path: Path) -> None:
    home = Path(str(cluster._standalone and cluster._standalone._spark_class)).parent.parent
    standalone.prepare_folder(tmp_path)
    intruder = standalone.StandaloneCluster(
        SPEC,
        tmp_path,
        java=find_java(os.environ),
        spark_home=home,
        secret="wrong",
        marker=cluster.mark.partition("=")[2],
    )
    assert cluster._standalone
    intruder.url = cluster._standalone.url
    process = intruder._spawn("worker-0", intruder._worker(0, intruder._write_properties()))
    try:
        log = intruder.log("worker-0")
        assert standalone.wait_until(lambda: "Failed to connect to master" in log.read_text(), 30)
        assert "Successfully registered" not in log.read_text()
        assert "SaslException" in cluster._standalone.log("master").read_text()
    finally:
        intruder.stop()
    assert process.poll() is not None
    assert len(cluster.executors) == 2


def test_tensorflow_is_told_to_use_onednn(cluster: SparkCluster) -> None:
    def told(_: Any) -> list[str | None]:
        import os

        return [os.environ.get("TF_ENABLE_ONEDNN_OPTS")]

    expected = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")  # the user's own word stands
    assert run(cluster, told) == [expected] * 2


def test_a_second_session_in_the_process_is_refused(cluster: SparkCluster) -> None:
    with pytest.raises(ClusterError, match="has a Spark session already.*pytest -p no:spark"):
        SparkCluster.start(SPEC)
    with pytest.raises(ClusterError):
        refuse_existing_session()


def test_leftover_jobs_and_their_processes_are_killed(cluster: SparkCluster, tmp_path: Path) -> None:
    marker = str(tmp_path)

    def hang(numbers: Any) -> Iterator[int]:
        import subprocess
        import sys
        import time
        from pathlib import Path

        # Detached and without our environment: only its descent gives it away.
        script = "import time; time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True, env={})
        Path(marker, str(next(iter(numbers)))).write_text(str(child.pid))
        time.sleep(600)
        yield 1

    outcomes: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: outcomes.append(_failure_of(lambda: run(cluster, hang))))
    thread.start()
    written = [tmp_path / name for name in "01"]
    assert standalone.wait_until(lambda: all(path.exists() and path.read_text() for path in written), 30)
    children = [psutil.Process(int(path.read_text())) for path in written]
    cluster.kill_leftover_jobs()
    thread.join(30)
    assert "cancelled" in str(outcomes[0])
    assert standalone.wait_until(lambda: not any(lives(child) for child in children), 10)
    assert run(cluster, lambda numbers: [sum(numbers)]) == [0, 1]


def _failure_of(call: Any) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_a_killed_executor_comes_back(cluster: SparkCluster) -> None:
    executors = standalone.executor_processes(cluster.mark)
    victim = sorted(executors)[0]
    family = psutil.Process(executors[victim].pid).children(recursive=True)
    os.kill(executors[victim].pid, signal.SIGKILL)
    cluster.ensure_alive()
    names = [executor.id for executor in cluster.executors]
    assert len(names) == 2 and victim not in names
    assert cluster.warm(2) > 0
    assert standalone.wait_until(lambda: not any(lives(child) for child in family), 10)


def test_a_task_that_ends_its_process_fails_the_job_and_nothing_else(cluster: SparkCluster) -> None:
    def die(_: Any) -> Iterator[int]:
        import os

        os._exit(3)
        yield 1

    assert _failure_of(lambda: run(cluster, die)) is not None
    cluster.ensure_alive()
    assert run(cluster, lambda numbers: [sum(numbers)]) == [0, 1]


def test_a_worker_that_ends_is_said_with_its_log(cluster: SparkCluster) -> None:
    """The last test of the module: the cluster is broken afterwards."""
    assert cluster._standalone
    worker = cluster._standalone.processes[2]
    worker.kill()
    worker.wait(10)
    with pytest.raises(ClusterError, match="Spark's worker-1 has ended: got exit status -9.*end of its log:\n.*INFO"):
        cluster.ensure_alive()


def test_a_start_that_fails_quotes_the_log_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    standalone.prepare_folder(tmp_path / "cluster")
    broken = standalone.StandaloneCluster(
        SPEC, tmp_path / "cluster", java=find_java(os.environ), spark_home=_fake_spark(tmp_path), secret="s", marker="m"
    )
    with pytest.raises(ClusterError, match="Spark's master did not start: got exit status 7.*\n.*no heap today"):
        broken.start()
    broken.stop()


def _fake_spark(folder: Path) -> Path:
    script = folder / "spark" / "bin" / "spark-class"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\necho no heap today\nexit 7\n")
    script.chmod(0o755)
    return folder / "spark"


def test_properties_of_the_daemons_are_private(tmp_path: Path) -> None:
    standalone.write_private(tmp_path / "secret", conf.properties_text({"a": "b"}))
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        standalone.write_private(tmp_path / "secret", "again")


def test_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert standalone.tail(log) == "(no log)"
    log.write_text("\n")
    assert standalone.tail(log) == "(empty)"
    log.write_text("\n".join(map(str, range(40))) + "\n\tat java.lang.Thread.run(Thread.java:840)\n\t... 1 more\n")
    assert standalone.tail(log, 2) == "38\n39"

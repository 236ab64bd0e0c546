"""What TensorFlowOnSpark does wrong must not reach the user: exits, alarms, logged keys, open ports, leftovers."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from plugin.tests.processes import lives
from sparkgauge.adapters.tensorflow import launch, repairs, worker
from sparkgauge.cluster import conf, standalone, watchdog
from sparkgauge.errors import TrainingError
from sparkgauge.rounds import run_round

# ---- trainings on executors


def fit(context: Any, shard: Any) -> Any:
    """Train for a while, and tell what TensorFlowOnSpark's names are by now and which key its manager has."""
    from tensorflowonspark import gpu_info, util
    from tensorflowonspark.TFSparkNode import TFSparkNode

    Path(context.options["folder"], f"key-{context.rank}").write_bytes(TFSparkNode.mgr._authkey)
    print("this is a line of the executor's log", file=sys.stderr, flush=True)
    for _ in context.steps(shard):
        time.sleep(0.02)
    members = [address for job in context.handle.cluster_resolver.cluster_spec().as_dict().values() for address in job]
    return {
        "accuracy_fraction": 0.5,
        "probes_gpu": gpu_info.is_gpu_available(),
        "loopback_address": util.get_ip_address() == "127.0.0.1",
        "loopback_members": sum(address.startswith("127.0.0.1:") for address in members),
        "gpus_shown": float(os.environ.get("CUDA_VISIBLE_DEVICES", "unset") != "-1"),
    }


def fail(context: Any, shard: Any) -> None:
    from tensorflowonspark.TFSparkNode import TFSparkNode

    Path(context.options["folder"], f"key-{context.rank}").write_bytes(TFSparkNode.mgr._authkey)
    if context.rank == 1:
        raise RuntimeError("a bug in fit")
    time.sleep(600)


def _run(trainings: Any, function: Any, folder: Path, **named: Any) -> Any:
    job = trainings.job(function, iterations=50, options={"folder": str(folder)})
    return run_round(trainings.cluster.spark.sparkContext, job, launch.launch, timeout_seconds=60, **named)


def _run_failing(trainings: Any, folder: Path) -> None:
    with pytest.raises(TrainingError, match="a bug in fit"):
        _run(trainings, fail, folder)


def _process_state() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "alarm": (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)),
        "interrupt": signal.getsignal(signal.SIGINT),
        "root logger": (root.level, list(root.handlers)),
        "folder": (os.getcwd(), sorted(os.listdir())),
        "listening": sorted(_listening(os.getpid())),
        "variables": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    }


def _own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sparkgauge-")]


def test_rounds_leave_the_test_process_as_it_was(trainings: Any, tmp_path: Path) -> None:
    before = _process_state()
    for _ in range(2):
        assert _run(trainings, fit, tmp_path).accuracy_fraction == 0.5
        assert _process_state() == before
        _run_failing(trainings, tmp_path)
        assert _process_state() == before
    assert standalone.wait_until(lambda: not _own_threads(), 5), _own_threads()


def test_a_failure_does_not_poison_the_next_cluster(
    trainings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflowonspark import TFCluster

    _run_failing(trainings, tmp_path)
    assert TFCluster.tf_status == {}
    monkeypatch.setitem(TFCluster.tf_status, "error", "left by somebody else's cluster")
    assert _run(trainings, fit, tmp_path).accuracy_fraction == 0.5


def test_executors_find_tensorflowonspark_repaired(trainings: Any, tmp_path: Path) -> None:
    metrics = _run(trainings, fit, tmp_path).metrics
    assert metrics["loopback_address"] == 1.0
    assert metrics["loopback_members"] == 2.0
    assert (metrics["probes_gpu"], metrics["gpus_shown"]) == (0.0, 0.0)


def test_no_manager_outlives_its_round(trainings: Any, tmp_path: Path) -> None:
    """Without the session's clean-up, which would kill them too."""
    seen: list[int] = []
    _run(trainings, fit, tmp_path, on_progress=lambda _: seen.append(len(trainings.cluster._task_processes())))
    assert max(seen) == 4  # two training processes, two managers
    assert standalone.wait_until(lambda: not trainings.cluster._task_processes(), 5)
    _run_failing(trainings, tmp_path)
    assert standalone.wait_until(lambda: not trainings.cluster._task_processes(), 5)


def test_no_log_holds_a_managers_key(trainings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _run(trainings, fit, tmp_path)
    _run_failing(trainings, tmp_path)
    keys = [(tmp_path / f"key-{rank}").read_bytes() for rank in (0, 1)]
    assert all(len(key) == 16 for key in keys)
    texts = [caplog.text, *_logs(trainings.cluster.folder)]
    assert sum("this is a line of the executor's log" in text for text in texts) == 2  # they were found
    for text in texts:
        assert "authkey" not in text
        assert not any(repr(key)[2:-1] in text or key.hex() in text for key in keys)


def _logs(folder: Path) -> list[str]:
    """Executors delete folders of theirs meanwhile: os.walk passes over one that is gone, Path.rglob raises."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return [path.read_text(errors="replace") for path in paths if _is_log(path)]


def _is_log(path: Path) -> bool:
    return path.is_file() and (path.name in ("stderr", "stdout") or path.suffix == ".log")


def test_nothing_listens_off_loopback_but_tensorflows_own_servers(trainings: Any, tmp_path: Path) -> None:
    """TensorFlow's gRPC server binds all interfaces and cannot be told not to: one port per training process.

    It serves whoever reaches that port for the length of a round; everything else is on loopback.
    """
    seen: list[dict[tuple[str, str], int]] = []
    _run(trainings, fit, tmp_path, on_progress=lambda _: seen.append(_open_ports(trainings.cluster)))
    open_ports = {key: count for key, count in seen[-1].items() if key[1] == "open"}
    assert open_ports == {("training", "open"): 2}
    assert seen[-1]["driver", "loopback"] >= 2  # the channel and the reservations
    assert standalone.wait_until(lambda: ("training", "open") not in _open_ports(trainings.cluster), 5)


def _open_ports(cluster: Any) -> dict[tuple[str, str], int]:
    """Return how many ports each kind of process listens on, on loopback or open to others."""
    kinds = {os.getpid(): "driver"}
    tasks = {process.pid: process.parent_pid for process in cluster._task_processes()}
    for process in watchdog.marked_processes(cluster.mark):
        kinds[process.pid] = "spark"
    for pid, parent in tasks.items():
        kinds[pid] = "manager" if parent in tasks else "training"
    counts: dict[tuple[str, str], int] = {}
    for pid, kind in kinds.items():
        for host, _ in _listening(pid):
            key = (kind, "loopback" if _is_loopback(host) else "open")
            counts[key] = counts.get(key, 0) + 1
    return counts


def _listening(pid: int) -> list[tuple[str, int]]:
    with contextlib.suppress(psutil.NoSuchProcess):
        connections = psutil.Process(pid).net_connections("inet")
        return [(one.laddr.ip, one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN]
    return []


def _is_loopback(host: str) -> bool:
    address: Any = ipaddress.ip_address(host)
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def test_a_killed_training_process_takes_its_manager_along(trainings: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one(_: Any) -> None:
        tasks = {process.pid: process for process in trainings.cluster._task_processes()}
        victim = next(process for process in tasks.values() if process.parent_pid not in tasks)
        killed.extend(process.pid for process in tasks.values() if victim.pid in (process.pid, process.parent_pid))
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(map(psutil.pid_exists, killed)) and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt  # before Spark and the driver do anything about it

    with pytest.raises(KeyboardInterrupt):
        _run(trainings, fit, tmp_path, on_progress=kill_one)
    assert len(killed) == 2 and not any(map(psutil.pid_exists, killed))


# ---- the driver's side, in this process


def test_preparing_keeps_the_root_logger_and_the_signals() -> None:
    """In a process of its own: the import can be watched only once."""
    script = (
        "import logging, signal\n"
        "from sparkgauge.adapters.tensorflow import launch\n"
        "launch.prepare()\n"
        "root = logging.getLogger()\n"
        "assert (root.level, root.handlers) == (logging.WARNING, []), (root.level, root.handlers)\n"
        "assert not logging.getLogger('tensorflowonspark.TFCluster').isEnabledFor(logging.ERROR)\n"
        "assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def reservation_server() -> Iterator[Any]:
    """Return a started reservation server for two nodes, as the driver has it; stopped at the end."""
    with _substituted() as server:
        yield server


@contextlib.contextmanager
def _substituted(check: Any = lambda: None, loopback: bool = True) -> Iterator[Any]:
    from tensorflowonspark import TFCluster

    with repairs.on_driver(check, "group", loopback):
        server = TFCluster.reservation.Server(2)
    server.address = server.start()
    try:
        yield server
    finally:
        server.stop()


def _node(number: int) -> dict[str, Any]:
    return {"executor_id": number, "host": "127.0.0.1", "port": 1000 + number}


def test_reservations_are_taken_on_loopback_and_handed_out(reservation_server: Any) -> None:
    from tensorflowonspark import reservation

    assert reservation_server._listener.getsockname()[0] == "127.0.0.1"
    clients = [reservation.Client(reservation_server.address) for _ in range(2)]
    for number, client in enumerate(clients):
        assert client.register(_node(number)) == "OK"
    began = time.monotonic()
    assert repairs._await_reservations(clients[0]) == [_node(0), _node(1)]
    assert reservation_server.await_reservations(None, {}) == [_node(0), _node(1)]
    assert time.monotonic() - began < 0.9  # the package sleeps a second between looks
    for client in clients:
        client.close()


def test_the_servers_address_is_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFOS_SERVER_HOST", "somewhere.else.example")
    with _substituted() as server:
        assert server.address == server._listener.getsockname()


def test_a_client_that_leaves_or_talks_nonsense_does_not_end_the_server(reservation_server: Any) -> None:
    from tensorflowonspark import reservation

    for garbage in (b"", b"\0\0", b"\0\0\0\4abcd", b"GET / HTTP/1.0\r\n\r\n"):
        with socket.create_connection(reservation_server.address) as stranger:
            stranger.sendall(garbage)
    client = reservation.Client(reservation_server.address)
    assert client.register(_node(0)) == "OK"
    assert reservation_server.reservations.remaining() == 1
    client.close()


def test_a_stopped_server_is_gone_at_once() -> None:
    with _substituted() as server:
        pass
    assert standalone.wait_until(lambda: not _accepts(server.address), 2)
    assert standalone.wait_until(lambda: "sparkgauge-reservations" not in _own_threads(), 2)
    server.stop()  # again


def _accepts(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
        return True
    return False


def test_waiting_for_reservations_ends_with_the_rounds_error_and_stops_the_server() -> None:
    def check() -> None:
        raise TrainingError("out of time")

    with _substituted(check) as server:
        with pytest.raises(TrainingError, match="out of time"):
            server.await_reservations(None, {})
        assert standalone.wait_until(lambda: not _accepts(server.address), 2)


def test_a_failed_job_ends_the_waiting_without_leaving_the_process() -> None:
    with _substituted() as server:
        with pytest.raises(TrainingError, match="before TensorFlow's cluster was formed\njava.lang.Oops"):
            server.await_reservations(None, {"error": "java.lang.Oops"})
        assert standalone.wait_until(lambda: not _accepts(server.address), 2)


@pytest.mark.parametrize("loopback", [True, False])
def test_the_package_is_put_back_whatever_happens(loopback: bool) -> None:
    from tensorflowonspark import TFCluster, reservation, util

    def names() -> list[Any]:
        return [TFCluster.reservation, TFCluster.TFSparkNode, TFCluster.tf_status, util.get_ip_address]

    before = names()
    with contextlib.suppress(RuntimeError), repairs.on_driver(lambda: None, "group", loopback) as status:
        assert TFCluster.tf_status is status and status == {}
        assert issubclass(TFCluster.reservation.Server, reservation.Server)
        assert TFCluster.reservation.Client is reservation.Client
        assert (util.get_ip_address() == "127.0.0.1") or not loopback
        raise RuntimeError("a launch that fails")
    assert all(now is then for now, then in zip(names(), before, strict=True))


def test_a_process_that_asked_for_it_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; from sparkgauge.adapters.tensorflow.repairs import die_with_parent; "
        "die_with_parent(); open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    )
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(600)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pid_file = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(pid_file)], env=environment)
    try:
        assert standalone.wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()), 30)
        left = psutil.Process(int(pid_file.read_text()))
    finally:
        process.kill()
        process.wait()
    assert standalone.wait_until(lambda: not lives(left), 5)


def test_the_mark_of_our_processes_is_inherited(trainings: Any) -> None:
    """All of the above finds processes by it."""
    assert trainings.cluster.mark.startswith(f"{conf.MARKER_VARIABLE}=")
    assert len(watchdog.marked_processes(trainings.cluster.mark)) >= 7


def test_a_worker_waits_for_the_chiefs_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    servers: list[socket.socket] = []
    later = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    later.start()
    began = time.monotonic()
    worker.await_listener(f"127.0.0.1:{port}", seconds=20)
    assert 0.2 < time.monotonic() - began < 10
    later.join()
    servers[0].close()
    began = time.monotonic()
    worker.await_listener(f"127.0.0.1:{port}", seconds=0.2)  # nobody comes: TensorFlow is left to say so
    assert 0.15 < time.monotonic() - began < 10

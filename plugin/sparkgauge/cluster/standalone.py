"""A Spark standalone cluster of this host: one master and N workers as processes of their own."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from sparkgauge.cluster import conf, watchdog
from sparkgauge.cluster.java import Java
from sparkgauge.errors import ClusterError

POLL_SECONDS = 0.02
TAIL_LINES = 15
MASTER_READY = re.compile(r"Starting Spark master at (spark://\S+)")
WORKER_READY = re.compile(r"Successfully registered with master")
# The exceptions are what an authentication failure looks like from the worker's side.
WORKER_REFUSED = re.compile(r"All masters are unresponsive|Worker registration failed: .*")


class StandaloneCluster:
    """Master and workers, started by :meth:`start` and ended by :meth:`stop`; they write into ``folder`` only."""

    def __init__(
        self, spec: conf.ClusterSpec, folder: Path, *, java: Java, spark_home: Path, secret: str, marker: str
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.url = ""
        """``spark://host:port`` once started."""
        self.processes: list[subprocess.Popen[bytes]] = []
        """Master first, then workers in order."""
        self._secret = secret
        self._deadline = 0.0
        self._spark_class = spark_home / "bin" / "spark-class"
        self._environment = conf.worker_environment(
            spec, os.environ, java_home=java.home, spark_home=spark_home, folder=folder, marker=marker
        )

    def start(self) -> str:
        """Return the master's URL once every worker has registered; ClusterError quotes the log of what failed."""
        self._deadline = time.monotonic() + self.spec.start_timeout_seconds
        properties = self._write_properties()
        self.url = self._start_master(properties)
        workers = [(self._spawn(f"worker-{i}", self._worker(i, properties)), f"worker-{i}") for i in self._indices()]
        for process, name in workers:
            self._wait(process, name, WORKER_READY)
        return self.url

    def _indices(self) -> range:
        return range(self.spec.executors + self.spec.spares)

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """End master and workers, whatever state they are in; a second call does nothing."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait(timeout_seconds)
        self.processes.clear()

    def ensure_running(self) -> None:
        """Raise ClusterError, with the log's tail, when master or a worker has ended."""
        for index, process in enumerate(self.processes):
            if process.poll() is not None:
                name = "master" if index == 0 else f"worker-{index - 1}"
                raise self._failure(f"Spark's {name} has ended", name, f"exit status {process.returncode}")

    def log(self, name: str) -> Path:
        """Return the log file of ``master`` or ``worker-N``."""
        return self.folder / "logs" / f"{name}.log"

    def _start_master(self, properties: Path) -> str:
        host = self.spec.host
        address = ["--host", host, "--port", "0", "--webui-port", "0"]
        master = ["org.apache.spark.deploy.master.Master", *address, "--properties-file", str(properties)]
        return self._wait(self._spawn("master", master), "master", MASTER_READY)[1]

    def _worker(self, index: int, properties: Path) -> list[str]:
        spec = self.spec
        memory_mebibytes = spec.executor_memory_mebibytes + conf.WORKER_OVERHEAD_MEBIBYTES
        size = ["--cores", str(spec.cores_per_executor), "--memory", f"{memory_mebibytes}m"]
        address = ["--host", spec.host, "--webui-port", "0", "--work-dir", str(self.folder / f"worker-{index}")]
        return [
            "org.apache.spark.deploy.worker.Worker",
            *size,
            *address,
            "--properties-file",
            str(properties),
            self.url,
        ]

    def _write_properties(self) -> Path:
        path = self.folder / "conf" / "daemons.properties"
        settings = conf.daemon_conf(self._secret, secrets.token_urlsafe(48)) | conf.gpu_offer(self.spec, self.folder)
        write_private(path, conf.properties_text(settings))
        return path

    def _spawn(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with open(self.log(name), "wb") as log:
            process = subprocess.Popen(
                [str(self._spark_class), *arguments],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is pytest's alone
            )
        self.processes.append(process)
        return process

    def _wait(self, process: subprocess.Popen[bytes], name: str, ready: re.Pattern[str]) -> re.Match[str]:
        while True:
            ended = process.poll() is not None
            text = self.log(name).read_text(errors="replace")
            found = ready.search(text)
            if found:
                return found
            if ended:
                raise self._failure(f"Spark's {name} did not start", name, f"exit status {process.returncode}")
            if refused := WORKER_REFUSED.search(text):
                raise self._failure(f"Spark's {name} did not start", name, refused[0])
            if time.monotonic() > self._deadline:
                limit = f"nothing within {self.spec.start_timeout_seconds:g} s"
                raise self._failure(f"Spark's {name} did not start", name, limit)
            time.sleep(POLL_SECONDS)

    def _failure(self, summary: str, name: str, actual: str) -> ClusterError:
        return ClusterError(
            summary,
            actual=actual,
            where=str(self.log(name)),
            hint=f"The end of its log:\n{tail(self.log(name))}",
        )


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log without Java's stack frames, or a word on why there are none."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return "(no log)"
    told = [line for line in text.splitlines() if not line.startswith(("\tat ", "\t... "))]
    return "\n".join(told[-lines:]) or "(empty)"


def write_private(path: Path, text: str) -> None:
    """Write ``text`` to a new file that only its owner can read, from the first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def prepare_folder(folder: Path) -> None:
    """Create what the cluster's processes write into, and their logging configuration."""
    for name in ("conf", "logs", "local", "tmp", "warehouse"):
        (folder / name).mkdir(mode=0o700)
    (folder / "conf" / "log4j2.properties").write_text(conf.log4j_text("info", None))
    driver_log = conf.log4j_text("warn", folder / "logs" / "driver.log")
    (folder / "conf" / "log4j2.driver.properties").write_text(driver_log)


def link_spark_home(original: Path, link: Path) -> Path:
    """Return a folder that stands for ``original`` but takes writes itself.

    The workers of ``local-cluster`` create ``work`` below SPARK_HOME, which is PySpark's installation.
    """
    link.mkdir(mode=0o700)
    for entry in original.iterdir():
        if entry.name != "work":
            (link / entry.name).symlink_to(entry)
    return link


def wait_until(holds: Callable[[], bool], timeout_seconds: float, poll_seconds: float = POLL_SECONDS) -> bool:
    """Return True as soon as ``holds()`` does, False when it still does not after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_seconds)
    return True


def executor_processes(mark: str) -> dict[str, watchdog.Process]:
    """Return this host's running executor JVMs of the cluster by executor id."""
    found = {}
    for process in watchdog.marked_processes(mark):
        match = re.search(r" --executor-id (\S+)", process.command)
        # The driver's JVM and shells may quote the option; only the backend's main class takes it.
        if match and "CoarseGrainedExecutorBackend" in process.command:
            found[match[1]] = process
    return found

"""Spark's configuration as pure functions: a specification goes in, plain dictionaries of strings come out."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparkgauge.errors import ClusterError, ConfigurationError

MARKER_VARIABLE = "SPARKGAUGE_PROCESS"
"""Environment variable that every process of an embedded cluster inherits; its value is unique to the session."""
PREIMPORT_VARIABLE = "SPARKGAUGE_PREIMPORT"
"""Comma-separated modules that the Python daemon imports before it forks workers."""
PREIMPORT_FILE_VARIABLE = "SPARKGAUGE_PREIMPORT_FILE"
"""File of modules, one a line, that the daemon imports before it forks its next worker; it grows while it serves."""

DAEMON_MODULE = "sparkgauge.cluster.daemon"

REQUIRED: Mapping[str, tuple[str, str]] = {
    "spark.python.worker.reuse": ("false", "a framework's process-wide state must not reach the next round"),
    "spark.task.maxFailures": ("1", "a failed training task would be retried against peers that are gone"),
    "spark.dynamicAllocation.enabled": ("false", "executors must neither come nor go while a round is timed"),
}
"""Settings that no measured run can do without, each with the value and the reason; on external masters too."""

QUICK_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
"""JVM flags of processes that only coordinate: start-up in half the CPU time, no compiler threads during rounds, no
file in /tmp/hsperfdata. Master: 3.0 -> 1.6 CPU seconds, 1.9 -> 1.4 s (2-core AMD EPYC, Java 17, Spark 4.3, n = 2)."""

SPARKS_STAGE_ATTEMPTS = 4
"""Spark's own default of spark.stage.maxConsecutiveAttempts."""

WORKER_OVERHEAD_MEBIBYTES = 64
MASTER_FORMS = "spark://HOST:PORT, yarn, k8s://URL or local-cluster[N,CORES,MEBIBYTES]"

MasterKind = Literal["embedded", "local-cluster", "external"]


@dataclass(frozen=True)
class ClusterSpec:
    """What cluster is wanted."""

    executors: int
    """One per worker process."""
    cores_per_executor: int
    executor_memory_mebibytes: int
    """JVM heap of one executor; Python and its framework live outside it."""
    python: str
    """Interpreter of the Python workers; the driver's own ``sys.executable`` unless the hosts differ."""
    master: str | None = None
    """None: a standalone cluster is started on this host. Otherwise the URL of an existing master."""
    host: str = "127.0.0.1"
    """Address that everything of an embedded cluster binds to."""
    start_timeout_seconds: float = 90.0
    """Limit for master, workers and executors to register."""
    stop_timeout_seconds: float = 5.0
    """Limit for Spark's own orderly stop; what is left is killed then."""
    extra: dict[str, str] = field(default_factory=dict)
    """The user's own Spark settings; they win, except against :data:`REQUIRED`."""
    preimport: tuple[str, ...] = ()
    """Modules that a Python task finds already imported."""
    gpus: tuple[tuple[str, ...], ...] = ()
    """Addresses of each executor's GPUs on this host, or, with an external master, as many empty names: only their
    number counts there. Empty without GPUs."""
    retries: int = 0
    """Times that a barrier stage may be run again after it lost a task."""
    spares: int = 0
    """Further executors of an embedded cluster that stand by, warm, for one that is lost: a new one takes seconds."""

    def __post_init__(self) -> None:
        for name in ("executors", "cores_per_executor", "executor_memory_mebibytes"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigurationError(f"Bad {name}", expected="a whole number from 1", actual=str(value))
        if self.gpus and (len(self.gpus) != self.executors or len({len(share) for share in self.gpus}) != 1):
            raise ConfigurationError(
                "Bad gpus", expected=f"the same number for each of {self.executors} executors", actual=str(self.gpus)
            )
        size = local_cluster_size(self.master)
        if master_kind(self.master) == "local-cluster" and size and size[0] != self.executors:
            raise ConfigurationError(
                "The master and the number of executors disagree",
                expected=f"{self.executors} executors",
                actual=str(self.master),
                hint=f"Say --gauge-executors {size[0]} or local-cluster[{self.executors},...]",
            )


def master_kind(master: str | None) -> MasterKind:
    """Return how ``master`` is run; ConfigurationError for what is not a cluster, such as ``local[*]``."""
    if master is None:
        return "embedded"
    if local_cluster_size(master):
        return "local-cluster"
    if re.fullmatch(r"spark://[^\s:/,]+:\d+(,[^\s:/,]+:\d+)*|yarn|k8s://\S+", master):
        return "external"
    raise ConfigurationError("Unknown Spark master", expected=MASTER_FORMS, actual=repr(master))


def local_cluster_size(master: str | None) -> tuple[int, int, int] | None:
    """Return (executors, cores, mebibytes) of a ``local-cluster[...]`` master, None for any other."""
    match = re.fullmatch(r"local-cluster\[\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*\]", master or "")
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def spark_conf(
    spec: ClusterSpec,
    *,
    secret: str,
    folder: Path,
    master_url: str,
    python_path: str | None,
) -> dict[str, str]:
    """Return the driver's settings for the embedded cluster or ``local-cluster``.

    The result holds the secret: it belongs into a file of mode 0600 or the JVM's memory, never on a command line.
    ``python_path`` becomes the executors' PYTHONPATH unless None. ConfigurationError when ``extra`` contradicts
    a required setting.
    """
    size = local_cluster_size(spec.master)
    cores = size[1] if size else spec.cores_per_executor
    memory = size[2] if size else spec.executor_memory_mebibytes
    settings = {
        "spark.master": master_url,
        **_training(spec, cores),
        **_addresses(spec.host),
        **_secrecy(secret),
        **_folders(folder),
        **_executors(spec.executors + spec.spares, cores, memory),
        **_failure_detection(),
        **executor_environment(cores, spec.preimport, python_path),
        f"spark.executorEnv.{PREIMPORT_FILE_VARIABLE}": str(preimport_file(folder)),
        # TensorFlow leaves generated sources in the temporary folder when its process is killed.
        "spark.executorEnv.TMPDIR": str(folder / "tmp"),
        **gpu_requests(spec),
        # read by the workers of local-cluster, which have no configuration of their own
        **(gpu_offer(spec, folder) if size else {}),
        **spec.extra,
    }
    check_required(settings)
    return settings


def preimport_file(folder: Path) -> Path:
    """Return the file of :data:`PREIMPORT_FILE_VARIABLE` of a cluster that writes into ``folder``."""
    return folder / "conf" / "preimport"


def external_conf(spec: ClusterSpec) -> dict[str, str]:
    """Return the settings for an existing master; each applies only where the user's own configuration is silent."""
    cores = spec.cores_per_executor
    sizes = _executors(spec.executors, cores, spec.executor_memory_mebibytes)
    environment = executor_environment(cores, spec.preimport, None)
    return {
        "spark.master": str(spec.master),
        **_training(spec, cores),
        **sizes,
        **environment,
        **gpu_requests(spec),
        **_gpu_discovery(spec),
        **spec.extra,
    }


def gpu_requests(spec: ClusterSpec) -> dict[str, str]:
    """Return what the driver asks for: GPUs for every executor, all of them for its one task; nothing without."""
    if not spec.gpus:
        return {}
    amount = str(len(spec.gpus[0]))
    return {"spark.executor.resource.gpu.amount": amount, "spark.task.resource.gpu.amount": amount}


def gpu_offer(spec: ClusterSpec, folder: Path) -> dict[str, str]:
    """Return what a worker of this host offers: its share of the plan that the discovery script hands out."""
    if not spec.gpus:
        return {}
    return {
        "spark.worker.resource.gpu.amount": str(len(spec.gpus[0])),
        "spark.worker.resource.gpu.discoveryScript": str(discovery_script(folder)),
    }


def discovery_script(folder: Path) -> Path:
    """Return where a cluster of this host keeps its discovery script."""
    return folder / "gpus" / "discover-gpus"


def _gpu_discovery(spec: ClusterSpec) -> dict[str, str]:
    """Return how executors elsewhere find their GPUs: by the command beside their Python, which YARN needs."""
    if not spec.gpus:
        return {}
    command = Path(spec.python).parent / "sparkgauge-gpus"
    return {
        "spark.executor.resource.gpu.discoveryScript": str(command),
        "spark.executor.resource.gpu.vendor": "nvidia.com",
    }


def check_required(settings: Mapping[str, str]) -> None:
    """Raise ClusterError when ``settings`` contradict a setting that measured runs cannot do without."""
    for name, (value, reason) in REQUIRED.items():
        actual = settings.get(name, value)
        if actual.strip().lower() != value:
            raise ClusterError(
                "A Spark setting makes measured runs impossible",
                expected=f"{name}={value} ({reason})",
                actual=f"{name}={actual}",
                hint=f"Remove it, or set {name}={value}",
            )


def _training(spec: ClusterSpec, cores: int) -> dict[str, str]:
    return {
        **{name: value for name, (value, _) in REQUIRED.items()},
        "spark.app.name": "sparkgauge",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.eventLog.enabled": "false",
        "spark.speculation": "false",
        # A failed barrier task fails its stage's attempt, whatever spark.task.maxFailures says; this counts attempts.
        "spark.stage.maxConsecutiveAttempts": str(max(SPARKS_STAGE_ATTEMPTS, spec.retries + 1)),
        # One task fills an executor, so that a job of N tasks lands on N executors.
        "spark.task.cpus": str(cores),
        "spark.locality.wait": "0",
        # Who waits for executors, and says how many have come, is SparkCluster; Spark would wait in its constructor.
        "spark.scheduler.minRegisteredResourcesRatio": "1.0",
        "spark.scheduler.maxRegisteredResourcesWaitingTime": "0s",
        # 15 s is the default; a barrier job sent while executors register waits one interval.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "1s",
        "spark.python.daemon.module": DAEMON_MODULE,
        # A task that hangs in native code is killed this long after it was cancelled, and executors that wait for a
        # lost one hang in a collective. With 1 s a killed process cost 6.2 s, with this 4.0 s (medians of 10 kills).
        "spark.python.task.killTimeout": "200ms",
    }


def _addresses(host: str) -> dict[str, str]:
    return {"spark.driver.host": host, "spark.driver.bindAddress": host}


def _secrecy(secret: str) -> dict[str, str]:
    # No encryption: nothing leaves loopback.
    return {"spark.authenticate": "true", "spark.authenticate.secret": secret, "spark.network.crypto.enabled": "false"}


def _folders(folder: Path) -> dict[str, str]:
    flags = f"-XX:-UsePerfData {_temporary(folder)}"
    return {
        "spark.local.dir": str(folder / "local"),
        "spark.sql.warehouse.dir": (folder / "warehouse").as_uri(),
        "spark.executor.extraJavaOptions": flags,
    }


def _temporary(folder: Path) -> str:
    # Spark splits option strings as a shell does.
    return shlex.quote(f"-Djava.io.tmpdir={folder / 'tmp'}")


def _executors(executors: int, cores: int, memory_mebibytes: int) -> dict[str, str]:
    return {
        "spark.executor.instances": str(executors),
        "spark.executor.cores": str(cores),
        "spark.cores.max": str(executors * cores),
        "spark.executor.memory": f"{memory_mebibytes}m",
    }


def _failure_detection() -> dict[str, str]:
    # A killed executor closes its connection and is seen at once; these bound the frozen one.
    return {"spark.executor.heartbeatInterval": "5s", "spark.network.timeout": "60s"}


def executor_environment(cores: int, preimport: Iterable[str], python_path: str | None) -> dict[str, str]:
    """Return the ``spark.executorEnv.*`` settings: thread counts, quiet frameworks, modules to import early."""
    variables = {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(cores)),
        "PYTHONHASHSEED": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        PREIMPORT_VARIABLE: ",".join(preimport),
        "PYTHONPATH": python_path or "",
    }
    return {f"spark.executorEnv.{name}": value for name, value in variables.items() if value}


def daemon_conf(secret: str, ui_key: str) -> dict[str, str]:
    """Return the settings of master and workers: authenticated, nothing served but Spark's own RPC.

    Standalone daemons cannot switch their web page off; ``ui_key`` (base64url, never handed out) locks it.
    """
    return {
        **_secrecy(secret),
        "spark.master.rest.enabled": "false",
        "spark.ui.killEnabled": "false",
        "spark.ui.filters": "org.apache.spark.ui.JWSFilter",
        "spark.org.apache.spark.ui.JWSFilter.param.secretKey": ui_key,
    }


def worker_environment(
    spec: ClusterSpec, environ: Mapping[str, str], *, java_home: Path, spark_home: Path, folder: Path, marker: str
) -> dict[str, str]:
    """Return the environment of master, workers and, by inheritance, executors and their Python processes.

    The user's SPARK_* and PYSPARK_* variables are dropped: they were meant for another cluster.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(("SPARK_", "PYSPARK_"))}
    flags = " ".join(QUICK_JVM)
    return {
        **kept,
        MARKER_VARIABLE: marker,
        "JAVA_HOME": str(java_home),
        "SPARK_HOME": str(spark_home),
        "SPARK_CONF_DIR": str(folder / "conf"),
        "SPARK_LOCAL_IP": spec.host,
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": f"{flags} {_temporary(folder)}",
        "SPARK_LAUNCHER_OPTS": flags,
    }


def driver_environment(
    spec: ClusterSpec, environ: Mapping[str, str], *, java_home: Path, spark_home: Path, folder: Path, marker: str
) -> dict[str, str | None]:
    """Return the variables to set (None: to unset) in this process while the driver's JVM starts.

    With an external master the user's own SPARK_CONF_DIR, SPARK_LOCAL_IP and options stay in force.
    """
    logging = f"-Dlog4j2.configurationFile={(folder / 'conf' / 'log4j2.driver.properties').as_uri()}"
    flags = [*QUICK_JVM, _temporary(folder), logging]
    variables: dict[str, str | None] = {
        MARKER_VARIABLE: marker,
        "JAVA_HOME": str(java_home),
        "SPARK_HOME": str(spark_home),
        "PYSPARK_PYTHON": spec.python,
        "PYSPARK_DRIVER_PYTHON": spec.python,
        # The JVM takes the last of two values, so the user's own options win.
        "SPARK_SUBMIT_OPTS": " ".join([*flags, environ.get("SPARK_SUBMIT_OPTS", "")]).strip(),
        "SPARK_LAUNCHER_OPTS": " ".join(QUICK_JVM),
        # These would hand us another process's gateway, or Spark Connect.
        "PYSPARK_GATEWAY_PORT": None,
        "PYSPARK_GATEWAY_SECRET": None,
        "SPARK_REMOTE": None,
    }
    if master_kind(spec.master) == "external":
        # spark-submit itself prepares for YARN and Kubernetes, so it has to know.
        arguments = environ.get("PYSPARK_SUBMIT_ARGS", "pyspark-shell")
        variables["PYSPARK_SUBMIT_ARGS"] = f"--master {spec.master} {arguments}"
    else:
        variables |= {
            "SPARK_CONF_DIR": str(folder / "conf"),
            "SPARK_LOCAL_IP": spec.host,
            "SPARK_LOCAL_DIRS": None,
            "PYSPARK_SUBMIT_ARGS": None,
        }
    return variables


def properties_text(settings: Mapping[str, str]) -> str:
    """Return ``settings`` as a Java properties file; ConfigurationError for what one line cannot hold."""
    lines = []
    for name, value in settings.items():
        if any(character in name + value for character in "\r\n\0"):
            raise ConfigurationError("Bad Spark setting", expected="no line break", actual=f"{name}={value!r}")
        lines.append(f"{name}={value.replace(chr(92), chr(92) * 2)}\n")
    return "".join(lines)


def log4j_text(level: str, log_file: Path | None) -> str:
    """Return a log4j2 configuration that writes ``level`` and above to ``log_file``, or to stderr where it is None."""
    if log_file:
        target = f"appender.main.type = File\nappender.main.fileName = {log_file}\n"
    else:
        target = "appender.main.type = Console\nappender.main.target = SYSTEM_ERR\n"
    return (
        f"rootLogger.level = {level}\nrootLogger.appenderRef.main.ref = main\n{target}"
        "appender.main.name = main\nappender.main.layout.type = PatternLayout\n"
        "appender.main.layout.pattern = %d{HH:mm:ss.SSS} %p %c{1}: %m%n%ex\n"
    )


def python_path(package_folder: str | None, inherited: str) -> str | None:
    """Return the executors' PYTHONPATH: ``package_folder`` before what the driver ``inherited``.

    None for no folder: executors then inherit what there is, as any process does.
    """
    if package_folder is None:
        return None
    own = [os.path.abspath(entry) for entry in inherited.split(os.pathsep) if entry]
    return os.pathsep.join(dict.fromkeys([package_folder, *own]))


def package_folder(package_file: str, site_folders: Iterable[str]) -> str | None:
    """Return the folder to add to PYTHONPATH for ``package_file`` (``.../sparkgauge/__init__.py``).

    None when the package lies in one of ``site_folders``: executors find it there, and a site folder at the front
    of PYTHONPATH would shadow the standard library.
    """
    root = os.path.realpath(os.path.dirname(os.path.dirname(package_file)))
    return None if root in {os.path.realpath(folder) for folder in site_folders} else root

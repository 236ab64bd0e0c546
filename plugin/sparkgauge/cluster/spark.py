"""The Spark cluster of a pytest session: started once, shared by all tests, gone with the process whatever happens."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import secrets
import shutil
import site
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sparkgauge
from sparkgauge import discovery
from sparkgauge.cluster import conf, standalone, watchdog
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.cluster.java import Java, find_java
from sparkgauge.errors import ClusterError, GaugeError, MachineError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

POLL_SECONDS = 0.05
EXTERNAL_GRACE_SECONDS = 5.0
"""How long more executors than are registered may take to show up once the session runs."""
PROMPT_REGISTRATION_SECONDS = 30.0
"""Where executors come at once or never: a standalone master starts them in seconds on workers that have room, and
lets an application wait forever for cores and GPUs that nobody has."""
MASTER_ANSWER_SECONDS = 5.0
"""A master that takes longer to accept a connection is as good as none."""
RELAUNCH_TIMEOUT_SECONDS = 30.0
"""A killed executor is back in 3-4 s on a quiet machine."""


@dataclass(frozen=True)
class Executor:
    """A registered executor."""

    id: str
    """Spark's own name of it; a relaunched executor has a new one."""
    host: str


class SparkCluster:
    """A running cluster with its session; make one with :meth:`start`."""

    def __init__(self, spec: ClusterSpec, progress: Callable[[str], None]) -> None:
        self.spec = spec
        self.kind = conf.master_kind(spec.master)
        self.spark: SparkSession = cast("SparkSession", None)
        """The session; None before :meth:`start` has returned and once stopped."""
        self.folder = Path(tempfile.mkdtemp(prefix="sparkgauge-"))
        """Everything that the cluster writes; removed with it."""
        self._progress = progress
        self._marker = secrets.token_hex(16)
        self._guard: watchdog.Watchdog | None = watchdog.Watchdog(self.mark, self.folder)
        self._standalone: standalone.StandaloneCluster | None = None
        self._launch: Future[Any] | None = None
        self._opening: Future[Any] | None = None
        self._preimported = set(spec.preimport)
        self._owner_pid = os.getpid()
        atexit.register(self.stop)

    @classmethod
    def start(cls, spec: ClusterSpec, progress: Callable[[str], None] = lambda line: None) -> SparkCluster:
        """Return a cluster whose executors have all registered; GaugeError says what is missing, and leaves nothing."""
        refuse_existing_session()
        if conf.master_kind(spec.master) == "external" and str(spec.master).startswith("spark://"):
            require_master(str(spec.master))
        java, spark_home = find_java(os.environ), find_spark_home(os.environ, spec)
        cluster = cls(spec, progress)
        try:
            cluster._start(java, spark_home)
        except GaugeError:
            cluster.stop()
            raise
        except Exception as error:
            failure = cluster._start_failure(error)
            cluster.stop()
            raise failure from None
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @property
    def mark(self) -> str:
        """Return the entry that the environment of every process of this cluster holds."""
        return f"{conf.MARKER_VARIABLE}={self._marker}"

    @property
    def executors(self) -> list[Executor]:
        """Return the registered executors in order of their ids."""
        names = self._registered()
        # Spark's list of hosts trails its list of ids by a few milliseconds.
        standalone.wait_until(lambda: set(names) <= self._hosts().keys(), 2.0, POLL_SECONDS)
        hosts = self._hosts()
        return [Executor(name, hosts.get(name, "")) for name in sorted(names, key=_numerically)]

    def wait_for_executors(self, count: int, timeout_seconds: float = EXTERNAL_GRACE_SECONDS) -> list[Executor]:
        """Return the executors once ``count`` have registered.

        ClusterError names wanted and available slots: at once when ``count`` exceeds what the cluster was started
        with, otherwise after the timeout.
        """
        if count > self._size:
            hint = f"Start it with --gauge-executors {count} or ask for fewer"
            raise self._too_few(count, self.spec.executors, "has", hint)
        if not standalone.wait_until(lambda: len(self._registered()) >= count, timeout_seconds, POLL_SECONDS):
            hint = "Give the cluster more cores or memory, ask for fewer executors, or look at its logs"
            raise self._too_few(count, len(self._registered()), f"registered within {timeout_seconds:g} s", hint)
        return self.executors

    def ensure_alive(self, timeout_seconds: float = RELAUNCH_TIMEOUT_SECONDS) -> None:
        """Return when every executor is there, waiting for lost ones to be relaunched; ClusterError when one is not."""
        if not standalone.wait_until(self._is_complete, timeout_seconds, POLL_SECONDS):
            count = len(self._registered())
            raise self._too_few(self._size, count, f"were back within {timeout_seconds:g} s", self._log_hint())

    def kill_leftover_jobs(self, timeout_seconds: float = 15.0) -> None:
        """Cancel all jobs, wait until no task runs, and kill what tasks left behind; ClusterError when one stays."""
        self._ensure_processes()
        self.spark.sparkContext.cancelAllJobs()
        if not standalone.wait_until(lambda: self._running_tasks() == 0, timeout_seconds, POLL_SECONDS):
            raise ClusterError(
                "Cancelled Spark tasks keep running",
                expected=f"none after {timeout_seconds:g} s",
                actual=str(self._running_tasks()),
                hint=self._log_hint(),
            )
        for process in self._task_processes():
            watchdog.kill(process)

    def preimport(self, modules: Iterable[str]) -> bool:
        """Let Python tasks find ``modules`` imported from now on; return whether any is new.

        The next task on each executor pays for it: call :meth:`warm`. With an external master only what the cluster
        was started with is imported ahead.
        """
        new = [name for name in modules if name not in self._preimported]
        if not new or self.kind == "external":
            return False
        with open(conf.preimport_file(self.folder), "a", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in new))
        self._preimported.update(new)
        return True

    def warm(self, count: int) -> float:
        """Return the seconds of a trivial job on ``count`` executors at once; Python daemons are up afterwards.

        ClusterError within seconds where other work holds their slots.

        Executors that stand by take part: any of them may get a round's task.
        """
        from sparkgauge.adapters.barrier import await_slots

        started = time.perf_counter()
        count += self.spec.spares
        self.wait_for_executors(count)
        await_slots(self.spark.sparkContext, count)
        numbers = self.spark.sparkContext.parallelize(range(count), count)
        try:
            numbers.barrier().mapPartitions(_echo).collect()
        except Exception as error:
            raise ClusterError(
                "The executors cannot run a Python task",
                actual=_first_lines(_describe(error)),
                hint=f"Every host needs {self.spec.python} with pytest-sparkgauge. {self._log_hint()}",
            ) from error
        return time.perf_counter() - started

    def stop(self) -> None:
        """Stop everything and remove the folder; further calls do nothing."""
        if os.getpid() != self._owner_pid:
            return  # a forked child's end is not the session's
        guard, self._guard = self._guard, None
        if guard is None:
            return
        atexit.unregister(self.stop)
        # Once the executors have gone in order, what a task had detached could not be told from a stranger.
        seen = watchdog.marked_processes(self.mark)
        self._stop_session()
        watchdog.sweep(self.mark, seen)
        for thread in filter(None, (self._launch, self._opening)):
            # The launching thread may have been about to start the JVM, so sweep again when it has ended.
            wait([thread], self.spec.stop_timeout_seconds)
            watchdog.sweep(self.mark)
        if self._launch and self._launch.done() and not self._launch.exception():
            _reap(self._launch.result())
        _forget_session()
        if self._standalone:
            self._standalone.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        guard.dismiss()

    @property
    def _size(self) -> int:
        """Return the executors that the cluster was started with, those that stand by included."""
        return self.spec.executors + self.spec.spares

    @property
    def _where(self) -> str:
        """Return the master's URL, for messages."""
        return self._standalone.url if self._standalone else str(self.spec.master)

    @property
    def _context(self) -> Any:
        return self.spark.sparkContext._jsc.sc()

    def _start(self, java: Java, spark_home: Path) -> None:
        secret = secrets.token_hex(32)
        standalone.prepare_folder(self.folder)
        if self.spec.gpus and self.kind != "external":
            discovery.write_script(conf.discovery_script(self.folder).parent, self.spec.gpus, sys.executable)
        if self.kind != "external":
            text = conf.properties_text(self.spec.extra)
            standalone.write_private(self.folder / "conf" / "spark-defaults.conf", text)
        if self.kind == "local-cluster":
            spark_home = standalone.link_spark_home(spark_home, self.folder / "spark-home")
        if self.kind == "embedded":
            self._standalone = standalone.StandaloneCluster(
                self.spec, self.folder, java=java, spark_home=spark_home, secret=secret, marker=self._marker
            )
        with _environment(self._driver_environment(java, spark_home)), _undisturbed():
            gateway, master_url = self._start_processes()
            self._progress("opening the Spark session")
            settings = self._settings(gateway, secret, master_url)
            self.spark = self._open_session(gateway, settings)
        self._progress(f"waiting for {self._size} executors")
        self.wait_for_executors(self._size, self._registration_seconds())

    def _registration_seconds(self) -> float:
        """Return how long executors may take; YARN and Kubernetes queue them, and fetch images for them."""
        limit = self.spec.start_timeout_seconds
        is_prompt = self.kind == "external" and (str(self.spec.master).startswith("spark://") or bool(self.spec.gpus))
        return min(limit, PROMPT_REGISTRATION_SECONDS) if is_prompt else limit

    def _driver_environment(self, java: Java, spark_home: Path) -> dict[str, str | None]:
        return conf.driver_environment(
            self.spec, os.environ, java_home=java.home, spark_home=spark_home, folder=self.folder, marker=self._marker
        )

    def _start_processes(self) -> tuple[Any, str]:
        """Return the driver's gateway and the master's URL; both start at the same time."""
        with open(self.folder / "logs" / "driver-console.log", "wb") as console:
            self._launch = _in_thread(_launch_gateway, console)
            if self._standalone:
                self._progress(f"starting a Spark master and {self._size} workers")
                master_url = self._standalone.start()
            else:
                master_url = str(self.spec.master)
            return self._launch.result(self.spec.start_timeout_seconds), master_url

    def _settings(self, gateway: Any, secret: str, master_url: str) -> Any:
        """Return the ``SparkConf`` of the session."""
        from pyspark import SparkConf

        settings = SparkConf(loadDefaults=True, _jvm=gateway.jvm)
        if self.kind == "external":
            return _merge_external(settings, self.spec)
        package = conf.package_folder(sparkgauge.__file__, _site_folders())
        path = conf.python_path(package, os.environ.get("PYTHONPATH", ""))
        wanted = conf.spark_conf(self.spec, secret=secret, folder=self.folder, master_url=master_url, python_path=path)
        return settings.setAll(list(wanted.items()))

    def _hosts(self) -> dict[str, str]:
        listed = self._context.statusStore().executorList(True)
        items = [listed.apply(index) for index in range(listed.size())]
        # an executor's port is known a moment after its host
        return {item.id(): item.hostPort().rpartition(":")[0] or item.hostPort() for item in items}

    def _open_session(self, gateway: Any, settings: Any) -> SparkSession:
        from pyspark import SparkContext
        from pyspark.sql import SparkSession

        _forget_session()  # a gateway that an earlier, stopped session left would be used instead
        # Off the main thread PySpark installs no SIGINT handler (its own talks to the JVM in the middle of other calls;
        # Ctrl-C is pytest's), and a master that does not answer can be given up before Spark's own 60 s.
        self._opening = _in_thread(SparkContext, conf=settings, gateway=gateway)
        return SparkSession(self._opening.result(self.spec.start_timeout_seconds))

    def _ids(self) -> list[str]:
        names = self._context.getExecutorIds().mkString(",")
        return names.split(",") if names else []

    def _registered(self) -> list[str]:
        """Return the ids of registered executors; ClusterError when anything they need has ended."""
        self._ensure_processes()
        return self._ids()

    def _is_complete(self) -> bool:
        registered = set(self._registered())
        if self.kind != "external" and sys.platform == "linux":
            # Spark hears of a killed executor a moment after the kernel does.
            registered &= standalone.executor_processes(self.mark).keys()
        return len(registered) >= self._size

    def _ensure_processes(self) -> None:
        if self.spark is None:
            raise ClusterError("The Spark cluster has been stopped", hint="Start a new one")
        if self._standalone:
            self._standalone.ensure_running()
        proc = self._launch.result().proc if self._launch else None
        if proc is not None and proc.poll() is not None:
            actual = f"exit status {proc.returncode}"
            raise ClusterError("Spark's driver has ended", actual=actual, hint=self._log_hint())
        if self.spark.sparkContext._jsc is None or self._context.isStopped():
            hint = f"A test must not stop it. {self._log_hint()}"
            raise ClusterError("The Spark session has been stopped", hint=hint)

    def _running_tasks(self) -> int:
        return sum(item.numRunningTasks() for item in self._context.statusTracker().getExecutorInfos())

    def _task_processes(self) -> list[watchdog.Process]:
        """Return the processes that tasks left on this host: neither JVMs nor the Python daemons (group leaders)."""
        if self.kind == "external":
            return []
        marked = watchdog.marked_processes(self.mark)
        return [process for process in marked if not _belongs_to_spark(process)]

    def _too_few(self, wanted: int, available: int, how: str, hint: str) -> ClusterError:
        if self.spec.gpus:
            each = len(self.spec.gpus[0])
            hint = f"{hint}. Each needs a worker that offers {each} GPU{'s' if each > 1 else ''} (docs/gpu.md)"
        return ClusterError(
            "Too few Spark executors",
            expected=f"{wanted} executors",
            actual=f"{available} that the cluster {how}" if how == "has" else f"{available} that {how}",
            where=self._where,
            hint=hint,
        )

    def _start_failure(self, error: Exception) -> ClusterError:
        reason = _java_reason(_describe(error))
        if "BindException" in reason:
            return ClusterError(
                "Spark's driver cannot have the port it was told to use",
                actual=reason,
                where=self._where,
                hint="See what listens there (ss -ltnp), or choose other ports: spark.driver.port, "
                "spark.driver.blockManager.port, spark.ui.port",
            )
        limit = f"no answer within {self.spec.start_timeout_seconds:g} s"
        console = standalone.tail(self.folder / "logs" / "driver-console.log")
        return ClusterError(
            "Spark's driver did not start",
            actual=limit if isinstance(error, FutureTimeoutError) else reason,
            where=self._where,
            hint=f"{self._log_hint()}\n{console}",
        )

    def _log_hint(self) -> str:
        return f"The end of the driver's log:\n{standalone.tail(self.folder / 'logs' / 'driver.log')}"

    def _stop_session(self) -> None:
        """Stop the session in order, for at most ``stop_timeout_seconds``."""
        if self.spark is not None:
            # A thread of its own has a connection of its own: the main thread's may hold an interrupted answer.
            thread = threading.Thread(target=_stop_quietly, args=(self.spark,), daemon=True)
            thread.start()
            thread.join(self.spec.stop_timeout_seconds)
            self.spark = cast("SparkSession", None)


def require_master(master: str, timeout_seconds: float = MASTER_ANSWER_SECONDS) -> None:
    """Raise ClusterError where no standalone master of ``spark://HOST:PORT[,HOST:PORT...]`` takes connections.

    Spark itself would try for a minute and then speak of a stopped session.
    """
    refusals = []
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout_seconds):
                return
        except (OSError, OverflowError) as error:  # OverflowError: no port has such a number
            refusals.append(f"{address}: {getattr(error, 'strerror', None) or error}")
    raise ClusterError(
        "No Spark master answers",
        expected="a running standalone master",
        actual="; ".join(refusals),
        where=master,
        hint="Start it (sbin/start-master.sh), or correct --gauge-master",
    )


def refuse_existing_session() -> None:
    """Raise ClusterError when this process has a Spark session already: it cannot have two."""
    module = sys.modules.get("pyspark.core.context")
    active = module.SparkContext._active_spark_context if module else None
    if active is not None:
        raise ClusterError(
            "This process has a Spark session already",
            expected="none before sparkgauge starts its own",
            actual=f"{active.appName!r} on {active.master}",
            hint="Use the spark_session fixture instead of building one, or stop it first; "
            "with pytest-spark installed, switch that off: pytest -p no:spark",
        )


def find_spark_home(environ: Mapping[str, str], spec: ClusterSpec) -> Path:
    """Return PySpark's folder (for an external master SPARK_HOME comes first); MachineError when there is none."""
    if conf.master_kind(spec.master) == "external" and environ.get("SPARK_HOME"):
        return Path(environ["SPARK_HOME"])
    found = importlib.util.find_spec("pyspark")
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders or not (Path(folders[0]) / "jars").is_dir():
        raise MachineError(
            "No Spark",
            expected="the package pyspark with its jars",
            actual=f"{folders[0]} without jars" if folders else "no package pyspark",
            hint=f"{sys.executable} -m pip install pyspark",
        )
    return Path(folders[0])


def _launch_gateway(console: Any) -> Any:
    from pyspark.java_gateway import launch_gateway

    return launch_gateway(popen_kwargs={"stdout": console, "stderr": console, "start_new_session": True})


def _in_thread(function: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
    """Return the future result of a call in a thread that does not hold up the end of this process."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name=f"sparkgauge-{function.__name__}", daemon=True).start()
    return future


def _merge_external(settings: Any, spec: ClusterSpec) -> Any:
    """Return ``settings`` (the user's spark-defaults and submit arguments) with ours where they are silent."""
    for name, value in conf.external_conf(spec).items():
        settings.setIfMissing(name, value)
    # spark-submit fills these two in when nobody asked, and the option --gauge-master is the user's word.
    settings.setAll([("spark.master", str(spec.master)), ("spark.app.name", "sparkgauge"), *spec.extra.items()])
    conf.check_required(dict(settings.getAll()))
    return settings


def _stop_quietly(session: SparkSession) -> None:
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # a dead JVM is as stopped as it gets
        warnings.simplefilter("ignore")
        session.stop()


def _forget_session() -> None:
    """Make PySpark believe that this process never had a session, so that a later one gets a JVM of its own."""
    core = sys.modules.get("pyspark.core.context")
    sql = sys.modules.get("pyspark.sql.session")
    if core:
        core.SparkContext._active_spark_context = None
        core.SparkContext._gateway = core.SparkContext._jvm = None
    if sql:
        sql.SparkSession._instantiatedSession = sql.SparkSession._activeSession = None


def _reap(gateway: Any) -> None:
    if gateway.proc is not None:
        gateway.proc.stdin.close()
        gateway.proc.wait(watchdog.SWEEP_TIMEOUT_SECONDS)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set (None: unset) environment variables for the length of a ``with`` block."""
    before = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep warnings of PySpark's own imports and its fork off the user's ``-W error``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _site_folders() -> list[str]:
    paths = sysconfig.get_paths()
    return [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]


def _belongs_to_spark(process: watchdog.Process) -> bool:
    is_daemon = conf.DAEMON_MODULE in process.command and process.pid == process.group
    return is_daemon or Path(process.command.partition(" ")[0]).name == "java"


def _echo(numbers: Iterator[int]) -> Iterator[int]:
    return numbers


def _numerically(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (sys.maxsize, name)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # py4j asks the JVM for the text, which may be gone
        return type(error).__name__


def _java_reason(text: str) -> str:
    """Return what a Java exception says, in one line, out of py4j's report of it; otherwise the first lines."""
    said = next((line[2:] for line in text.splitlines() if line.startswith(": ")), "")
    return said.partition("! Consider")[0][:300] or _first_lines(text)


def _first_lines(text: str, lines: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[:lines])

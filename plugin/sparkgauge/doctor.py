"""What is wrong with this machine for a measured run, found before hours are spent: each finding with what to do.

Every check is a function of files below a root folder, of an environment and of installed versions, so that other
machines can be played. Nothing is started but ``java -version``, and nothing imports a framework.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import util
from pathlib import Path
from typing import Literal

from sparkgauge import environment, gpu
from sparkgauge.errors import DataError, MachineError

CheckStatus = Literal["ok", "warn", "fail"]

REPORT_SCHEMA_VERSION = 1

INTERVAL_SECONDS = 0.5
"""Between two looks at the counters: 50 ticks a core, so that one per cent of steal is seen."""
MOST_LOAD_PER_CORE = 0.25
"""A quarter of the cores busy before anything started: the executors want all of them."""
MOST_STEAL_FRACTION = 0.01
"""A tenth of the default margin."""
MOST_SWAP_BYTES = 100 * 2**20
"""Some pages of sleeping programs are always out; more means that memory has been short."""
LEAST_MEMORY_BYTES, ENOUGH_MEMORY_BYTES = 2 * 2**30, 4 * 2**30
"""Two executors' JVM heaps of 1 GiB each (``--gauge-memory``), and a Python process with TensorFlow beside each; the
least is half of that, for one."""
LEAST_DISK_BYTES, ENOUGH_DISK_BYTES = 500 * 2**20, 2 * 2**30
"""Preparing the data set takes about 400 MB."""
LEAST_SHARED_BYTES = 64 * 2**20
"""What a container gets by default."""
PORTS = 24
"""Free ports that a session of two executors takes at once, generously counted."""
LEAST_PORT_RANGE = 1000
SLOW_LOOKUP_SECONDS = 1.0
LOOKUP_TIMEOUT_SECONDS = 5.0

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: CheckStatus
    found: str
    why: str = ""
    """Why it matters; empty for an ``ok`` without more to say."""
    action: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Machine:
    """What is examined: this machine, unless a test says otherwise."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    versions: Mapping[str, str] = field(default_factory=lambda: installed_versions())
    """Versions of installed distributions by name."""
    python: tuple[int, int] = sys.version_info[:2]
    cores: int = 0
    """0 means: those this process may use."""
    data: str | None = None
    """As for ``--gauge-data``."""
    cache_folder: Path | None = None
    """None means: the user cache."""
    temporary_folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    has_module: Callable[[str], bool] = field(default=lambda name: util.find_spec(name) is not None)
    sleep: Callable[[float], None] = time.sleep
    hostname: Callable[[], str] = socket.gethostname
    lookup: Callable[[str], str] = socket.gethostbyname

    def read(self, path: str) -> str:
        """Return the text of a file below the root, empty where there is none."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


DISTRIBUTIONS = (
    "pyspark",
    "tensorflow",
    "tensorflow-cpu",
    "tensorflowonspark",
    "keras",
    "setuptools",
    "pytest",
    "pytest-benchmark",
    "numpy",
)


def installed_versions() -> dict[str, str]:
    """Return the versions of the distributions that a run needs; those not installed are left out."""
    found = {name: environment.installed_version(name) for name in DISTRIBUTIONS}
    return {name: version for name, version in found.items() if version}


def examine(machine: Machine | None = None) -> list[Check]:
    """Return every check's finding, in the order of :data:`CHECKS`; a check that breaks is a finding itself."""
    machine = machine or Machine()
    return [found for check in CHECKS for found in _guarded(check, machine)]


def worst(checks: Iterable[Check]) -> CheckStatus:
    """Return the worst status."""
    found = {check.status for check in checks}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"


def to_text(checks: list[Check]) -> list[str]:
    """Return the findings as lines; below each that is not ``ok`` why it matters and what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4}  {check.name:{width}}  {check.found}")
        if check.status != "ok":
            indent = " " * (width + 8)
            lines += [f"{indent}why: {check.why}", f"{indent}do:  {check.action}"]
    counts = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    return [*lines, f"{len(checks)} checks: {counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail"]


def to_json_text(checks: list[Check]) -> str:
    """Return the findings as JSON."""
    value = {
        "schema": REPORT_SCHEMA_VERSION,
        "status": worst(checks),
        "checks": [asdict(check) for check in checks],
    }
    return json.dumps(value, indent=2)


def check_python(machine: Machine) -> Check:
    """Return whether this Python is one that the package runs on."""
    found = ".".join(map(str, machine.python))
    if OLDEST_PYTHON <= machine.python <= NEWEST_PYTHON:
        return Check("python", "ok", found)
    why = "Spark or the frameworks have no release for it, or sparkgauge was never tried on it"
    return Check("python", "fail", found, why, "use Python 3.10 to 3.13")


def check_java(machine: Machine) -> Check:
    """Return whether Spark finds a Java that it starts on, with the incubator module."""
    from sparkgauge.cluster.java import VECTOR_MODULE, find_java

    try:
        java = find_java(machine.environ)
    except MachineError as error:
        why = f"Spark 4 runs on Java 17 or newer and loads {VECTOR_MODULE} into every JVM"
        return Check("java", "fail", error.actual or "none", why, error.hint or "")
    return Check("java", "ok", f"Java {java.version} with {VECTOR_MODULE}, {java.home}")


def check_spark(machine: Machine) -> Check:
    """Return whether pyspark is one of the supported versions and SPARK_HOME names no other Spark."""
    version, home = machine.versions.get("pyspark"), machine.environ.get("SPARK_HOME", "")
    if version is None or _numbers(version)[:1] != (4,):
        why = "the cluster is started from the pip package pyspark"
        return Check("spark", "fail", version or "pyspark is not installed", why, "pip install 'pyspark>=4.0,<5'")
    if not home:
        return Check("spark", "ok", f"pyspark {version}")
    other = _spark_version(Path(home))
    if other == version:
        return Check("spark", "ok", f"pyspark {version}, SPARK_HOME is the same version")
    found = f"pyspark {version}, but SPARK_HOME={home} is {f'Spark {other}' if other else 'no Spark'}"
    why = "with an external master that Spark is used, and its JVM and Python sides must be one version"
    return Check("spark", "warn", found, why, f"unset SPARK_HOME, or pip install pyspark=={other or version}")


def check_tensorflow(machine: Machine) -> Check:
    """Return whether TensorFlow and TensorFlowOnSpark are installed in versions that fit together."""
    versions = machine.versions
    names = ("tensorflow", "tensorflow-cpu", "tensorflowonspark", "keras", "setuptools")
    found = ", ".join(f"{name} {versions[name]}" for name in names if name in versions) or "nothing"
    install = "pip install 'pytest-sparkgauge[tensorflow-cpu]' (or [tensorflow], with GPU support)"
    problem = _tensorflow_problem(versions)
    if problem is None:
        return Check("tensorflow", "ok", found)
    why, action = problem
    return Check("tensorflow", "fail", found, why, action or install)


def check_pkg_resources(machine: Machine) -> Check:
    """Return whether ``pkg_resources``, which tensorflowonspark imports, is there."""
    if machine.has_module("pkg_resources"):
        return Check("pkg_resources", "ok", "present")
    if "tensorflowonspark" not in machine.versions:
        return Check("pkg_resources", "ok", "not needed")
    why = "tensorflowonspark imports pkg_resources, which setuptools 82 no longer has"
    return Check("pkg_resources", "fail", "missing", why, "pip install 'setuptools<81'")


def check_gpu(machine: Machine) -> Check:
    """Return which GPUs tests marked ``gpu`` would run on."""
    folder = machine.root / "proc/driver/nvidia"
    gpus = gpu.detect(folder)
    if not gpus:
        reason = gpu.why_none(folder, machine.root)
        if not folder.exists():
            return Check("gpu", "ok", f"none: {reason}; tests marked gpu are skipped")
        action = "look at nvidia-smi, or set CUDA_VISIBLE_DEVICES"
        return Check("gpu", "warn", f"none: {reason}", "tests marked gpu are skipped", action)
    found = "; ".join(gpu.describe(one) for one in gpus)
    if using := [text for one in gpus if (text := gpu.busy(one))]:
        why = f"in use before anything of ours runs: {'; '.join(using)}"
        return Check("gpu", "warn", found, why, f"wait for them, or choose others with {gpu.VISIBLE_VARIABLE}")
    if "tensorflow-cpu" in machine.versions:
        why = "tensorflow-cpu cannot use a GPU"
        return Check("gpu", "warn", found, why, "pip uninstall tensorflow-cpu; pip install 'tensorflow[and-cuda]'")
    return Check("gpu", "ok", found)


def check_governor(machine: Machine) -> Check:
    """Return whether the processor's clock is asked to stay up."""
    files = sorted(machine.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))
    governors = sorted({text for file in files if (text := machine.read(str(file)).strip())})
    if not governors:
        return Check("governor", "ok", "not exposed (a virtual machine, a container, or no Linux)")
    if governors == ["performance"]:
        return Check("governor", "ok", "performance")
    why = "the clock follows the load, so that the first rounds run slower than later ones"
    action = "sudo cpupower frequency-set --governor performance"
    return Check("governor", "warn", ", ".join(governors), why, action)


def check_turbo(machine: Machine) -> Check:
    """Return whether the processor may exceed its nominal clock for as long as it stays cool."""
    off = machine.read("sys/devices/system/cpu/intel_pstate/no_turbo").strip()
    boost = machine.read("sys/devices/system/cpu/cpufreq/boost").strip()
    if not off and not boost:
        return Check("turbo", "ok", "not exposed")
    if off == "1" or (not off and boost == "0"):
        return Check("turbo", "ok", "off")
    file, value = ("intel_pstate/no_turbo", "1") if off else ("cpufreq/boost", "0")
    why = "the clock falls as the processor heats up and more cores work: run times depend on what ran before"
    action = f"echo {value} | sudo tee /sys/devices/system/cpu/{file}"
    return Check("turbo", "warn", "on", why, action)


def check_load(machine: Machine) -> Check:
    """Return whether other programs are using the processors."""
    words = machine.read("proc/loadavg").split()
    load = float(words[0]) if words and _is_number(words[0]) else environment.load_average()
    cores = machine.cores or environment.usable_cores(machine.root)
    found = f"{load:.2f} on {cores} core{'' if cores == 1 else 's'} (1 minute)"
    if load <= MOST_LOAD_PER_CORE * cores:
        return Check("load", "ok", found)
    why = "other programs take processor time from the rounds; intervals widen and verdicts stay inconclusive"
    return Check("load", "warn", found, why, "find them with top, stop them or wait, then measure")


def check_counters(machine: Machine) -> list[Check]:
    """Return what a short look at the kernel's counters tells: steal, throttling and swapping."""
    before = _counters(machine)
    machine.sleep(INTERVAL_SECONDS)
    after = _counters(machine)
    return [_steal(before, after), _throttling(before, after), _swap(machine, before, after)]


def check_memory(machine: Machine) -> Check:
    """Return whether executors fit into the memory that is free."""
    free = _kib(machine, "MemAvailable") or environment.memory_bytes(machine.root)
    limit = environment.memory_bytes(machine.root)
    free = min(free, limit) if limit else free
    if not free:
        return Check("memory", "ok", "not exposed")
    found = f"{free / 2**30:.1f} GiB available of {limit / 2**30:.1f} GiB"
    if free >= ENOUGH_MEMORY_BYTES:
        return Check("memory", "ok", found)
    why = "every executor is a JVM of up to 1 GiB and a Python process with TensorFlow; what does not fit is killed"
    status: CheckStatus = "fail" if free < LEAST_MEMORY_BYTES else "warn"
    return Check("memory", status, found, why, "stop other programs, or use fewer executors (--gauge-executors 1)")


def check_disk(machine: Machine) -> list[Check]:
    """Return whether the temporary folder and the user cache can be written and have room."""
    folders = (
        ("temporary disk", machine.temporary_folder, "TMPDIR"),
        ("cache disk", _cache(machine), "XDG_CACHE_HOME"),
    )
    return [_disk(*one) for one in folders]


def check_shared_memory(machine: Machine) -> Check:
    """Return whether ``/dev/shm`` is there and larger than a container's default."""
    folder = machine.root / "dev/shm"
    if machine.root == Path("/") and platform.system() != "Linux":
        return Check("shared memory", "ok", "not used on this system")
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    found = f"{free / 2**20:.0f} MiB free in /dev/shm" if free else "no room in /dev/shm"
    if free > LEAST_SHARED_BYTES:
        return Check("shared memory", "ok", found)
    why = "JVMs keep their counters there, and GPU libraries exchange gradients through it"
    return Check("shared memory", "warn", found, why, "start the container with --shm-size=1g")


def check_loopback(machine: Machine) -> Check:
    """Return whether a connection over 127.0.0.1 carries data."""
    why = "driver, executors and the progress channel talk over 127.0.0.1"
    action = "bring the interface up (ip link set lo up), and let no firewall or proxy catch 127.0.0.1"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(LOOKUP_TIMEOUT_SECONDS)
            with socket.create_connection(server.getsockname(), timeout=LOOKUP_TIMEOUT_SECONDS) as client:
                peer, _ = server.accept()
                with peer:
                    peer.sendall(b"x")
                    client.settimeout(LOOKUP_TIMEOUT_SECONDS)
                    received = client.recv(1)
    except OSError as error:
        return Check("loopback", "fail", f"127.0.0.1 does not answer: {error.strerror or error}", why, action)
    if received != b"x":
        return Check("loopback", "fail", "127.0.0.1 carries no data", why, action)
    return Check("loopback", "ok", "127.0.0.1 answers")


def check_ports(machine: Machine) -> Check:
    """Return whether enough ports are free for a cluster, which takes whichever the system gives."""
    words = machine.read("proc/sys/net/ipv4/ip_local_port_range").split()
    size = int(words[1]) - int(words[0]) + 1 if len(words) == 2 and all(map(str.isdecimal, words)) else None
    known = "" if size is None else f", range {words[0]}-{words[1]}"
    why = "master, workers, driver and every executor listen on ports of their own"
    action = "end what holds the ports (ss -lntp), or widen net.ipv4.ip_local_port_range"
    try:
        with ExitStack() as open_sockets:
            for _ in range(PORTS):
                open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
    except OSError as error:
        return Check("ports", "fail", f"{error.strerror or error}{known}", why, action)
    if size is not None and size < LEAST_PORT_RANGE:
        return Check("ports", "warn", f"only {size} ports{known}", why, action)
    return Check("ports", "ok", f"{PORTS} free ports taken at once{known}")


def check_hostname(machine: Machine) -> Check:
    """Return whether the machine's own name resolves, and quickly."""
    name = machine.hostname()
    address, seconds = _resolved(machine, name)
    why = "Spark and TensorFlowOnSpark look the machine's own name up when they start, and wait for the answer"
    action = f"add {name} to /etc/hosts (127.0.1.1 {name}), or set SPARK_LOCAL_IP=127.0.0.1"
    if address is None:
        return Check("hostname", "warn", f"{name} does not resolve", why, action)
    if seconds > SLOW_LOOKUP_SECONDS:
        return Check("hostname", "warn", f"{name} is {address}, found in {seconds:.1f} s", why, action)
    return Check("hostname", "ok", f"{name} is {address}")


def check_data(machine: Machine) -> Check:
    """Return which data a session would train on, without a download and without preparing it."""
    source = machine.data or machine.environ.get("SPARKGAUGE_DATA")
    if source == "synthetic":
        why = "runs on the look-alike are compared with runs on it only, and say nothing about learning real images"
        return Check(
            "data", "warn", "the synthetic look-alike, as asked for", why, "name CIFAR-10 with SPARKGAUGE_DATA"
        )
    if source:
        return _named_data(source)
    from sparkgauge.data.cache import Cache

    found, problems = Cache(_cache(machine)).real_datasets()
    if found:
        identity = found[0].identity
        return Check(
            "data", "ok", f"{identity.name}, {identity.train_count} + {identity.test_count} images, in the cache"
        )
    why = "the first session downloads CIFAR-10 (170 MB), or trains on a synthetic look-alike where it cannot"
    damaged = f" ({problems[0]})" if problems else ""
    return Check(
        "data", "warn", f"none in the cache{damaged}", why, "name CIFAR-10 with --gauge-data or SPARKGAUGE_DATA"
    )


CHECKS: tuple[Callable[[Machine], Check | list[Check]], ...] = (
    check_python,
    check_java,
    check_spark,
    check_tensorflow,
    check_pkg_resources,
    check_gpu,
    check_governor,
    check_turbo,
    check_load,
    check_counters,
    check_memory,
    check_disk,
    check_shared_memory,
    check_loopback,
    check_ports,
    check_hostname,
    check_data,
)
"""Every check, in the order of the output."""


@dataclass(frozen=True)
class _Counters:
    """The kernel's counters at one moment; None where they are not exposed."""

    steal_ticks: int | None
    all_ticks: int
    throttled: int | None
    """Periods in which a cgroup of this process had used up its share of the processors."""
    swapped_pages: int


def _guarded(check: Callable[[Machine], Check | list[Check]], machine: Machine) -> list[Check]:
    try:
        found = check(machine)
    except Exception as error:  # a check that breaks must not hide what the others found
        name = check.__name__.removeprefix("check_")
        why = "this could not be examined, which says nothing about the machine"
        return [Check(name, "warn", f"{type(error).__name__}: {error}", why, "report this as a bug of sparkgauge")]
    return found if isinstance(found, list) else [found]


def _tensorflow_problem(versions: Mapping[str, str]) -> tuple[str, str] | None:
    """Return why the installed versions do not work together, and what to do (empty: install them)."""
    both = [name for name in ("tensorflow", "tensorflow-cpu") if name in versions]
    if not both or "tensorflowonspark" not in versions:
        return "without TensorFlow and TensorFlowOnSpark no test of framework tensorflow can run", ""
    if len(both) == 2:
        why = "tensorflow and tensorflow-cpu write the same files over each other"
        return why, "pip uninstall tensorflow tensorflow-cpu, then install one of them"
    if not (2, 16) <= _numbers(versions[both[0]])[:2] < (3,):
        return f"{both[0]} must be 2.16 or newer, below 3", f"pip install '{both[0]}>=2.16,<3'"
    if not (2, 2, 5) <= _numbers(versions["tensorflowonspark"]) < (3,):
        return "tensorflowonspark must be 2.2.5 or newer, below 3", "pip install 'tensorflowonspark>=2.2.5,<3'"
    if _numbers(versions.get("keras", "")) < (3,):
        return "TensorFlow 2.16 and newer is used with Keras 3", "pip install 'keras>=3'"
    if _numbers(versions.get("setuptools", "0")) >= (81,):
        return (
            "tensorflowonspark imports pkg_resources, which newer setuptools do not have",
            "pip install 'setuptools<81'",
        )
    return None


def _spark_version(home: Path) -> str | None:
    """Return the version of the Spark in ``home`` by its core jar, None where there is none."""
    jars = sorted((home / "jars").glob("spark-core_*.jar"))
    found = re.search(r"spark-core_[\d.]+-(.+)\.jar", jars[0].name) if jars else None
    return found[1] if found else None


def _counters(machine: Machine) -> _Counters:
    cpu = re.search(r"^cpu\s+([\d ]+)$", machine.read("proc/stat"), re.MULTILINE)
    ticks = [int(word) for word in cpu[1].split()] if cpu else []
    pages = re.findall(r"^pswp(?:in|out) (\d+)$", machine.read("proc/vmstat"), re.MULTILINE)
    return _Counters(
        steal_ticks=ticks[7] if len(ticks) > 7 else None,
        all_ticks=sum(ticks[:8]),  # guest time, behind, is counted in user time already
        throttled=_throttled(machine),
        swapped_pages=sum(map(int, pages)),
    )


def _throttled(machine: Machine) -> int | None:
    counts = []
    for folder in environment.cgroup_folders("cpu", machine.root):
        text = machine.read(str(folder / "cpu.stat"))
        counts += [int(number) for number in re.findall(r"^nr_throttled (\d+)$", text, re.MULTILINE)]
    return max(counts, default=None)


def _steal(before: _Counters, after: _Counters) -> Check:
    if before.steal_ticks is None or after.steal_ticks is None:
        return Check("steal", "ok", "not exposed")
    now = _share(after.steal_ticks - before.steal_ticks, after.all_ticks - before.all_ticks)
    ever = _share(after.steal_ticks, after.all_ticks)
    found = f"{now:.1%} in {INTERVAL_SECONDS:g} s, {ever:.1%} since the machine started"
    if max(now, ever) <= MOST_STEAL_FRACTION:
        return Check("steal", "ok", found)
    why = "the host gives this machine's processors to others, in moments that no program here sees coming"
    action = "use a machine with processors of its own, compare interleaved (--gauge-against), or take more rounds"
    return Check("steal", "warn", found, why, action)


def _throttling(before: _Counters, after: _Counters) -> Check:
    if before.throttled is None or after.throttled is None:
        return Check("throttling", "ok", "no processor quota")
    if not after.throttled:
        return Check("throttling", "ok", "never throttled")
    recent = after.throttled - before.throttled
    found = f"{after.throttled} times so far, {recent} in the last {INTERVAL_SECONDS:g} s"
    why = "this container stops whenever its processor quota is used up, so that run times come in steps"
    return Check(
        "throttling", "warn", found, why, "give it whole processors (--cpuset-cpus) in place of a quota (--cpus)"
    )


def _swap(machine: Machine, before: _Counters, after: _Counters) -> Check:
    used = _kib(machine, "SwapTotal") - _kib(machine, "SwapFree")
    moved = after.swapped_pages - before.swapped_pages
    found = f"{used / 2**20:.0f} MiB in use" + (f", {moved} pages moved in {INTERVAL_SECONDS:g} s" if moved else "")
    if used <= MOST_SWAP_BYTES and not moved:
        return Check("swap", "ok", found)
    why = "a page that comes back from disk stops its program for as long as the disk takes"
    return Check("swap", "warn", found, why, "free memory, then: sudo swapoff -a && sudo swapon -a")


def _disk(name: str, folder: Path, variable: str) -> Check:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    action = f"free space, or point {variable} elsewhere"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} cannot be written", "data and logs of a session go there", action)
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.1f} GiB free for {folder}"
    if free >= ENOUGH_DISK_BYTES:
        return Check(name, "ok", found)
    status: CheckStatus = "fail" if free < LEAST_DISK_BYTES else "warn"
    return Check(name, status, found, "preparing the data set takes about 400 MB, Spark's files more", action)


def _resolved(machine: Machine, name: str) -> tuple[str | None, float]:
    """Return the address of ``name`` and the seconds it took; no address after a timeout, as DNS can hang."""
    answer: list[str] = []

    def ask() -> None:
        try:
            answer.append(machine.lookup(name))
        except (OSError, UnicodeError):  # not found, or a name that is none
            return

    started = time.monotonic()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LOOKUP_TIMEOUT_SECONDS)
    return answer[0] if answer else None, time.monotonic() - started


def _named_data(source: str) -> Check:
    from sparkgauge.data import archives, layouts

    path = Path(source).expanduser()
    why, action = "the session ends before it trains", "correct --gauge-data or SPARKGAUGE_DATA"
    if path.is_file() and archives.is_archive(path):
        return Check("data", "ok", f"the archive {path}, not opened")
    if not path.is_dir():
        return Check("data", "fail", f"{path} is no folder and no archive", why, action)
    try:
        layout = layouts.find_layout(path)
    except DataError as error:
        return Check("data", "fail", str(error), why, action)
    return Check("data", "ok", f"CIFAR-10 in {layout.folder}")


def _cache(machine: Machine) -> Path:
    if machine.cache_folder is not None:
        return machine.cache_folder
    import pooch

    return Path(pooch.os_cache("sparkgauge"))


def _kib(machine: Machine, name: str) -> int:
    """Return an entry of /proc/meminfo in bytes, 0 where it is missing."""
    found = re.search(rf"^{name}:\s*(\d+) kB", machine.read("proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, () for none: 2.21.0rc1 is (2, 21, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _share(part: int, whole: int) -> float:
    return part / whole if whole > 0 else 0.0


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(?:\.\d+)?", text) is not None

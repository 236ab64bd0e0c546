"""What a run is measured on: the machine, its limits, and the versions of the software that does the work.

Nothing is imported to find a version: frameworks take seconds to load and may start threads or reserve a GPU.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from sparkgauge.records import Environment

TOOL_TIMEOUT_SECONDS = 5.0
"""git and sysctl answer in milliseconds; a hung network disk must not hang the session."""

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "pytest-sparkgauge": ("pytest-sparkgauge",),
    "pytest-benchmark": ("pytest-benchmark",),
    "spark": ("pyspark",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "tensorflowonspark": ("tensorflowonspark",),
    "keras": ("keras",),
    "torch": ("torch",),
    "caffe": ("sparkgauge-caffe",),
    "numpy": ("numpy",),
}
"""Name in the record -> distributions that provide it, the first installed one counts."""

TUNING_VARIABLES = (
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
"""Environment variables that change the speed of the same software; recorded where they are set."""

_ROOT = Path("/")
_UNLIMITED_BYTES = 2**60
"""cgroup v1 says "no limit" with a number near 2**63."""
_CPU_NOISE = re.compile(r"\((?:r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|\bwith .* graphics\b", re.IGNORECASE)


def capture(
    environ: Mapping[str, str],
    *,
    java_version: str = "",
    gpus: Sequence[str] = (),
    root: Path = _ROOT,
) -> Environment:
    """Return what this process runs on; ``java_version`` and ``gpus`` come from those who looked for them.

    ``root`` is where ``/proc`` and ``/sys`` are looked for.
    """
    cores, model = usable_cores(root), cpu_model(root)
    return Environment(
        hardware_class=hardware_class(platform.system(), platform.machine(), model, cores, gpus),
        cpu_model=model,
        cores=cores,
        memory_bytes=memory_bytes(root),
        gpus=tuple(gpus),
        operating_system=operating_system(root),
        software=software_versions(environ, java_version=java_version),
    )


def hardware_class(system: str, machine: str, cpu: str, cores: int, gpus: Sequence[str] = ()) -> str:
    """Return the slug of what must match for runtimes to be comparable, usable as a folder name everywhere.

    E.g. ``linux-x86_64-amd-epyc-2c`` or ``linux-x86_64-amd-epyc-16c-1x-nvidia-h100-80gb-hbm3``.
    """
    parts = [system or "unknown", machine or "unknown", _short_cpu(cpu) or "unknown", f"{cores}c"]
    parts += [f"{number}x-{name}" for name, number in sorted(Counter(gpus).items())]
    return "-".join(slug for slug in map(_slug, parts) if slug)


def _short_cpu(model: str) -> str:
    """Return ``model`` without legal marks and filler; the clock stays only where no model number tells CPUs apart."""
    name, _, clock = model.partition("@")
    short = " ".join(_CPU_NOISE.sub(" ", name).split())
    return short if re.search(r"\d", short) else f"{short} {clock.strip()}".strip()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")


_GENERATION = (("family", "cpu family"), ("model", "model"))


def _field(text: str, key: str) -> str:
    """Return the value of a line of /proc/cpuinfo, empty without one."""
    match = re.search(rf"^{key}\s*:\s*(.*\S)", text, re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def cpu_model(root: Path = _ROOT) -> str:
    """Return the processor's marketing name, ``unknown`` where nothing tells it.

    Virtual machines may hide its number ("AMD EPYC" is any of five generations): then family and model follow.
    """
    text = _read(root / "proc/cpuinfo")
    # x86 says "model name", POWER "cpu", older ARM kernels "Hardware" or "Processor"; s390 numbers its processors
    for key in ("model name", "cpu model", "cpu", "Hardware", "Processor"):
        if name := _field(text, key):
            numbers = [f"{label} {value}" for label, line in _GENERATION if (value := _field(text, line))]
            return name if re.search(r"\d", name) else " ".join([name, *numbers])
    found = _tool(["sysctl", "-n", "machdep.cpu.brand_string"]) if sys.platform == "darwin" else None
    return found or platform.processor() or platform.machine() or "unknown"


def usable_cores(root: Path = _ROOT) -> int:
    """Return the logical processors this process may use: affinity and cgroup quota counted, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for folder in cgroup_folders("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, math.floor(min([cores, *quotas])))


def _cpu_quota(folder: Path) -> float | None:
    """Return the cores a cgroup folder grants, None without a limit."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us").strip(),
        _read(folder / "cpu.cfs_period_us").strip(),
    ]
    quota, period = (int(word) if word.isdecimal() else 0 for word in (*words, "", "")[:2])
    return quota / period if quota and period else None


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the memory this process may use: the machine's or its cgroup's limit; 0 where nothing tells it."""
    limits = [_machine_memory_bytes(root)]
    for folder in cgroup_folders("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdecimal() and 0 < int(text) < _UNLIMITED_BYTES:
                limits.append(int(text))
    return min((limit for limit in limits if limit), default=0)


def _machine_memory_bytes(root: Path) -> int:
    if match := re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE):
        return int(match[1]) * 1024
    text = _tool(["sysctl", "-n", "hw.memsize"]) if sys.platform == "darwin" else None
    return int(text) if text and text.isdecimal() else 0


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield this process's cgroup folders and their ancestors, of version 2 and of ``controller`` in version 1.

    The limit in force is the least of them all. In a container the group's own folder is often not mounted;
    walking up then ends at the mount point, which is the container's group.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def operating_system(root: Path = _ROOT) -> str:
    """Return the operating system with its release, e.g. ``Debian GNU/Linux 12 (bookworm), kernel 6.1.0``."""
    if match := re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release"), re.MULTILINE):
        return f"{match[1]}, kernel {platform.release()}"
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}".strip()


def software_versions(environ: Mapping[str, str], *, java_version: str = "") -> dict[str, str]:
    """Return versions by name, and the tuning variables that are set; what is not installed is left out."""
    found = {"python": platform.python_version(), "java": java_version, "blas": _blas()}
    for name, distributions in DISTRIBUTIONS.items():
        found[name] = next(filter(None, map(installed_version, distributions)), "")
    found.update({name: environ.get(name, "") for name in TUNING_VARIABLES})
    return {name: version for name, version in found.items() if version}


def installed_version(distribution: str) -> str:
    """Return the version of an installed distribution; empty where it is not, or only its remains."""
    try:
        # not metadata.version: it warns, and will raise, for the folder that a broken installation leaves behind
        found = metadata.metadata(distribution)
    except (metadata.PackageNotFoundError, FileNotFoundError):
        return ""
    return str(found.json.get("version", ""))


def _blas() -> str:
    """Return name and version of numpy's BLAS, read from its build record as text."""
    try:
        record = Path(str(metadata.distribution("numpy").locate_file("numpy/__config__.py")))
    except metadata.PackageNotFoundError:
        return ""
    block = re.search(r'"blas":\s*\{(.*?)\}', _read(record), re.DOTALL)
    found = dict(re.findall(r'"(name|version)":\s*r?"([^"]*)"', block[1])) if block else {}
    return f"{found.get('name', '')} {found.get('version', '')}".strip()


def load_average() -> float:
    """Return the 1-minute load average, 0.0 where the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows, and systems that refuse to tell
        return 0.0


def git_commit(folder: Path) -> str:
    """Return the commit of the working tree at ``folder``, ``+dirty`` appended when it has changes.

    Empty outside git, without git, or before the first commit; never raises.
    """
    sha = _tool(["git", "rev-parse", "--verify", "HEAD"], folder)
    if not sha:
        return ""
    changes = _tool(["git", "status", "--porcelain"], folder)
    # an unanswered status is not a clean one
    return f"{sha}+dirty" if changes is None or changes else sha


def describe(environment: Environment) -> str:
    """Return the line of the session's header."""
    gpus = ", ".join(f"{number} x {name}" for name, number in sorted(Counter(environment.gpus).items()))
    cores = f"{environment.cores} core{'' if environment.cores == 1 else 's'}"
    memory = f"{environment.memory_bytes / 2**30:.1f} GiB" if environment.memory_bytes else "unknown memory"
    titles = {"python": "Python", "java": "Java", "spark": "Spark", "tensorflow": "TensorFlow", "torch": "PyTorch"}
    software = environment.software
    versions = [f"{title} {software[name]}" for name, title in titles.items() if name in software]
    machine = ", ".join([environment.cpu_model, cores, memory, gpus or "no GPU"])
    return f"{machine}; {', '.join(versions)}; hardware class {environment.hardware_class}"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # absent on this system, or not ours to read: the callers have a fallback
        return ""


def _tool(command: list[str], folder: Path | None = None) -> str | None:
    """Return what ``command`` prints, None when it is absent, fails or hangs."""
    # a status that refreshes the index would take the lock from a commit going on beside it
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None

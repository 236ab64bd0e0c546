"""Builds pycaffe from a source distribution on PyPI into a wheel that is kept, and installs it.

The source is ``brocolli-caffe``, a fork of BVLC Caffe with its Python interface. Its own ``setup.py`` wants conda; its
cmake files need changes to build with Debian's libraries instead (:data:`_CHANGES`). Built once per Python version:
about 5 minutes on two cores (AMD EPYC, g++ 12).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparkgauge.errors import DataError, MachineError

COMMAND = "sparkgauge install-caffe"
PROJECT, VERSION = "brocolli-caffe", "9.0.2"
SHA256 = "c6410cc60bdd6db685d441b66be7df05410f8850ac88d6b75d48ef9b2315c08a"
REVISION = 1
"""Counts changes of how the wheel is built, so that an older one in the cache is not taken."""
PACKAGES = (
    "cmake",
    "g++",
    "libboost-filesystem-dev",
    "libboost-python-dev",
    "libboost-system-dev",
    "libboost-thread-dev",
    "libgflags-dev",
    "libgoogle-glog-dev",
    "libhdf5-dev",
    "libopenblas-dev",
    "libprotobuf-dev",
    "make",
    "protobuf-compiler",
)
"""Debian 12's names; the built module loads their shared libraries, so they stay installed."""
LOG_LINES = 25
"""Lines of a failed command's output that an error repeats."""


@dataclass(frozen=True)
class _Change:
    file: str
    old: str
    new: str


_PYTHON = f"{sys.version_info.major}{sys.version_info.minor}"

_CHANGES = (
    # a header of the test program, with a main() of its own, that the library has no use for
    _Change("src/caffe/net.cpp", '#include "caffe/test/test_caffe_main.hpp"', ""),
    # Debian names Boost.Python after its Python; boost_regex is not used by these sources
    _Change("python/CMakeLists.txt", "-lboost_regex -lboost_python ", f"-lboost_python{_PYTHON} "),
    # imported for reading image files only, which nothing here does: `import caffe` must not need it
    _Change(
        "python/caffe/io.py",
        "import skimage.io\n",
        "try:\n    import skimage.io\nexcept ImportError:\n    skimage = None\n",
    ),
)


def install(*, apt: bool = False, source: Path | None = None, rebuild: bool = False, quiet: bool = False) -> Path:
    """Return the wheel of pycaffe after installing it into this Python, built now unless it is in the user's cache.

    ``apt`` installs missing Debian packages (root only), ``source`` names a downloaded source distribution.
    Raises MachineError for what the machine lacks and for a failed build, DataError for another source.
    """
    say = _silent if quiet else _say
    _require_libraries(apt)
    folder = cache_folder()
    with _locked(folder):
        wheel = folder / wheel_name()
        if rebuild or not wheel.is_file():
            say(f"building {PROJECT} {VERSION} for this Python: 5 to 10 minutes on two cores")
            _build(wheel, source)
        say(f"installing {wheel}")
        _run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)], "install"
        )
        _run([sys.executable, "-m", "pip", "install", "--quiet", "protobuf>=3.20", "scipy", "six"], "install")
    _run([sys.executable, "-c", "import caffe._caffe"], "first import", cwd=folder)
    return wheel


def cache_folder() -> Path:
    """Return the folder in the user's cache that keeps the wheels; made when absent."""
    import pooch

    folder = Path(pooch.os_cache("sparkgauge")) / "caffe"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel_name() -> str:
    """Return the file name of the wheel for this Python and machine."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"sparkgauge_caffe-{VERSION}.{REVISION}-cp{_PYTHON}-cp{_PYTHON}-{platform}.whl"


def missing_packages() -> list[str]:
    """Return the Debian packages of :data:`PACKAGES` that are not installed; MachineError where there is no dpkg."""
    try:
        command = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MachineError(
            "Caffe is built with Debian's libraries only",
            expected="a Debian or Ubuntu system",
            actual="no dpkg-query",
            hint="Elsewhere build Caffe yourself: any `import caffe` on the executors' Python is used.",
        ) from error
    installed = {line.split()[0] for line in answer.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in PACKAGES if name not in installed]


def _require_libraries(apt: bool) -> None:
    missing = missing_packages()
    if missing and apt:
        _apt_install(missing)
        missing = missing_packages()
    if missing:
        command = "apt-get install --no-install-recommends " + " ".join(missing)
        raise MachineError(
            "Caffe needs Debian packages that are not installed",
            actual=", ".join(missing),
            hint=f"As root: {command}; or `{COMMAND} --apt`.",
        )
    _require_boost_python()
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise MachineError("This Python's header files are missing", where=str(header), hint="Debian: python3-dev.")


def _apt_install(names: Sequence[str]) -> None:
    if os.geteuid() != 0:
        raise MachineError("--apt installs Debian packages", expected="root", actual=f"user id {os.geteuid()}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-qq"], "apt-get update", env=environment)
    _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names], "apt-get install", env=environment)


def _require_boost_python() -> None:
    found = sorted({path.name for path in Path("/usr/lib").glob("*/libboost_python3*.so")})
    if f"libboost_python{_PYTHON}.so" not in found:
        raise MachineError(
            "Engine caffe is not supported on this Python: the system's Boost.Python is built for another version",
            expected=f"libboost_python{_PYTHON}.so",
            actual=", ".join(found) or "none",
            where="/usr/lib",
            hint="Use the system's Python version (Debian 12: 3.11), or engine torch, which needs no Caffe.",
        )


def _build(wheel: Path, source: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=wheel.parent) as name:
        work = Path(name)
        log = work / "build.log"
        tree = unpack(_checked(source or _download(work)), work / "source")
        for change in _CHANGES:
            _apply(change, tree)
        try:
            _compile(tree, work / "build", log)
        except MachineError:
            shutil.copy(log, wheel.parent / "build.log")
            raise
        packed = work / wheel.name
        pack(tree, work / "build", packed)
        os.replace(packed, wheel)


def _download(work: Path) -> Path:
    """Return the source distribution, fetched by pip, which checks the hash before it runs anything of it."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--dest", str(work), "-r", str(requirement)]
    _run([sys.executable, "-m", "pip", "download", "--quiet", *options], "download")
    return next(work.glob("*.tar.gz"))


def _checked(archive: Path) -> Path:
    try:
        actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError("Cannot read the source distribution", actual=str(error), where=str(archive)) from error
    if actual != SHA256:
        raise DataError(
            f"Not the source distribution of {PROJECT} {VERSION}",
            expected=f"SHA-256 {SHA256}",
            actual=actual,
            where=str(archive),
        )
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Return the one top folder of ``archive``, unpacked without the version-control folder that it ships."""
    with tarfile.open(archive) as file:
        members = [one for one in file.getmembers() if ".git" not in Path(one.name).parts]
        file.extractall(folder, members=members, filter="data")
    return next(folder.iterdir())


def _apply(change: _Change, tree: Path) -> None:
    path = tree / change.file
    text = path.read_text(encoding="utf-8")
    if change.old not in text:
        raise DataError("Caffe's source is not as expected", expected=repr(change.old), where=change.file)
    path.write_text(text.replace(change.old, change.new), encoding="utf-8")


def _compile(tree: Path, build: Path, log: Path) -> None:
    import numpy

    multiarch = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    includes = (sysconfig.get_path("include"), numpy.get_include(), "/usr/include/hdf5/serial")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "ANACONDA_HOME": "/nonexistent",  # the default would take headers of any conda there
        "CMAKE_CXX_FLAGS": " ".join(f"-I{shlex.quote(path)}" for path in includes),
        "CMAKE_SHARED_LINKER_FLAGS": f"-L/usr/lib/{multiarch}/hdf5/serial",
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    _run(["cmake", "-S", str(tree), "-B", str(build), *defined], "cmake", log=log)
    cores = len(os.sched_getaffinity(0))
    _run(["make", "-C", str(build), f"-j{cores}", "pycaffe"], "make", log=log)


def pack(tree: Path, build: Path, wheel: Path) -> None:
    """Write ``wheel`` from the built module and its Python files; the format is that of PEP 427."""
    files: dict[str, bytes] = {}
    package = tree / "python" / "caffe"
    for path in sorted(package.rglob("*.py")):
        if "test" not in path.relative_to(package).parts:
            files[f"caffe/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    files["caffe/_caffe.so"] = _stripped(next(build.rglob("_caffe.so")))
    info = f"sparkgauge_caffe-{VERSION}.{REVISION}.dist-info"
    files[f"{info}/licenses/LICENSE"] = (tree / "LICENSE").read_bytes()
    files[f"{info}/METADATA"] = _metadata().encode()
    tag = "-".join(wheel.stem.split("-")[-3:])
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: sparkgauge\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)


def _metadata() -> str:
    return (
        "Metadata-Version: 2.1\nName: sparkgauge-caffe\n"
        f"Version: {VERSION}.{REVISION}\nSummary: {PROJECT} {VERSION}, built on this machine by `{COMMAND}`\n"
        "Requires-Dist: numpy\nRequires-Dist: protobuf>=3.20\nRequires-Dist: scipy\nRequires-Dist: six\n"
    )


def _stripped(module: Path) -> bytes:
    _run(["strip", "--strip-unneeded", str(module)], "strip")
    return module.read_bytes()


def _digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _run(
    command: Sequence[str],
    what: str,
    *,
    log: Path | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Return when ``command`` has succeeded; MachineError with the end of its output otherwise."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, env=env, cwd=cwd
    )
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(done.stdout)
    if done.returncode != 0:
        end = "\n".join(done.stdout.splitlines()[-LOG_LINES:])
        kept = f"The whole log: {cache_folder() / 'build.log'}. Its end:\n" if log is not None else ""
        raise MachineError(
            f"Installing Caffe failed in its step {what!r}",
            actual=f"exit status {done.returncode}",
            where=shlex.join(command[:3]),
            hint=f"{kept}{end}",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process from building the same wheel meanwhile; the lock ends with the process."""
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    del text

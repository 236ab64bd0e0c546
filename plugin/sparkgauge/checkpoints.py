"""Checkpoints of a round: what a training needs to go on where another attempt of the stage had got to.

A checkpoint is one ``.npz`` file (numpy's own format, read without pickle): arrays, and a JSON tree that says where
they belong. So the same file serves every framework, holds no code, is checked by the archive's CRC, and is refused
where it comes from another training. It appears under its name by one rename.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparkgauge.errors import DataError
from sparkgauge.job import Job

FORMAT = 1
"""Version of the tree's layout; another version is refused."""

WRITE_BYTES = 8 * 1024 * 1024
"""Handed to the JVM at a time: what crosses over is encoded as text."""

KEPT = 2
"""Files that stay: the last one may be known to its writer alone when that is killed."""

_TREE = "tree"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""What begins a URI: at least two letters, so that a drive letter is none."""


def is_uri(folder: str) -> bool:
    """Return whether ``folder`` has a scheme and is reached through Hadoop's file systems on the driver."""
    return _SCHEME.match(folder) is not None


def identity_of(job: Job) -> dict[str, Any]:
    """Return what a checkpoint must have been made by to be of use to ``job``."""
    function = getattr(job.fn, "__wrapped__", job.fn)
    return {
        "model": job.model,
        "function": "" if function is None else str(getattr(function, "__qualname__", type(function).__qualname__)),
        "seed": job.seed,
        "executors": job.executors,
        "global_batch": job.global_batch,
        "train_count": job.train_count,
    }


def pack(identity: Mapping[str, Any], step: int, state: Mapping[str, Any]) -> bytes:
    """Return a checkpoint after ``step`` steps as bytes; TypeError names the value that cannot be kept."""
    import numpy as np

    arrays: dict[str, Any] = {}
    tree = {"format": FORMAT, "identity": dict(identity), "step": step, "state": _encode(state, "state", arrays)}
    packed = io.BytesIO()
    text = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
    np.savez(packed, **{_TREE: text, **arrays})
    return packed.getvalue()


def unpack(content: bytes, identity: Mapping[str, Any], where: str) -> tuple[int, dict[str, Any]]:
    """Return steps and state of a checkpoint; DataError where it is damaged or of another training."""
    import numpy as np

    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            tree = json.loads(archive[_TREE].tobytes())
            _check(tree, identity, where)
            return int(tree["step"]), _decode(tree["state"], archive)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            "Damaged checkpoint",
            expected="a file that this training has written",
            actual=f"{type(error).__name__}: {error}",
            where=where,
            hint="Delete it; the round then starts from its first step.",
        ) from None


def check_shapes(expected: Mapping[str, Any], state: Mapping[str, Any], where: str) -> None:
    """Raise DataError where ``state`` lacks an array of ``expected`` or has one of another shape (of another model)."""
    for name, value in expected.items():
        wanted = tuple(getattr(value, "shape", ()))
        found = tuple(getattr(state[name], "shape", ())) if name in state else None
        if found != wanted:
            raise DataError(
                "A checkpoint of another model",
                expected=f"{name!r} of shape {wanted}",
                actual="none" if found is None else f"shape {found}",
                where=where,
                hint="Give every model a checkpoint folder of its own, or delete this checkpoint.",
            )


class Storage(Protocol):
    """Where an executor's checkpoints go."""

    def write(self, name: str, content: bytes) -> None:
        """Keep ``content`` under ``name``; it appears whole or not at all."""
        ...

    def read(self, name: str) -> bytes:
        """Return what was kept under ``name``."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder that all executors see."""

    path: Path

    def write(self, name: str, content: bytes) -> None:
        """Write ``content`` to the file ``name`` atomically, and remove all but the last few."""
        part = self.path / f".{name}.{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise DataError(
                "Cannot write a checkpoint",
                expected="a folder that can be made and written where the executors run",
                actual=error.strerror or str(error),
                where=str(self.path / name),
                hint="Choose another checkpoint_folder, or free space there",
            ) from None
        for old in sorted(self.path.glob("step-*.npz"))[:-KEPT]:
            old.unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``; DataError where this machine does not see it."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(
                "Cannot read a checkpoint",
                expected="the file that executor 0 has written",
                actual=error.strerror or str(error),
                where=str(self.path / name),
                hint="checkpoint_folder must be a folder that all machines share, or a URI such as hdfs://...",
            ) from None


class HadoopFolder:
    """A folder of any file system that Spark's Hadoop knows, reached through the driver's JVM."""

    def __init__(self, spark_context: Any, uri: str) -> None:
        """Find the file system of ``uri``; DataError says what Hadoop said."""
        self._jvm, self._uri = spark_context._jvm, uri
        self._path = self._jvm.org.apache.hadoop.fs.Path
        with self._translated(uri):
            self._system = self._path(uri).getFileSystem(spark_context._jsc.hadoopConfiguration())

    def write(self, name: str, content: bytes) -> None:
        """Write ``content`` to the file ``name``: first under another name, then renamed."""
        part, final = self._path(self._uri, f".{name}.part"), self._path(self._uri, name)
        with self._translated(name):
            stream = self._system.create(part, True)
            try:
                for start in range(0, len(content), WRITE_BYTES):
                    stream.write(content[start : start + WRITE_BYTES])
            finally:
                stream.close()
            self._system.delete(final, False)  # rename replaces nothing; only an earlier attempt's file can be there
            if not self._system.rename(part, final):
                raise OSError("the file system refused to rename it")
            self._remove_old()

    def read(self, name: str) -> bytes:
        """Return the content of the file ``name``."""
        with self._translated(name):
            stream = self._system.open(self._path(self._uri, name))
            try:
                return bytes(self._jvm.org.apache.commons.io.IOUtils.toByteArray(stream))
            finally:
                stream.close()

    def remove(self) -> None:
        """Remove the folder; what cannot be removed stays."""
        with contextlib.suppress(DataError), self._translated(self._uri):
            self._system.delete(self._path(self._uri), True)

    def _remove_old(self) -> None:
        names = [str(one.getPath().getName()) for one in self._system.listStatus(self._path(self._uri))]
        for old in sorted(name for name in names if name.startswith("step-"))[:-KEPT]:
            self._system.delete(self._path(self._uri, old), False)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Any:
        from py4j.protocol import Py4JError

        try:
            yield
        except (OSError, Py4JError) as error:
            cause = getattr(error, "java_exception", None)
            raise DataError(
                "Cannot reach the checkpoint folder",
                actual=str(cause if cause is not None else error).splitlines()[0],
                where=f"{self._uri} ({name})",
                hint="Check the URI, and that Spark's Hadoop configuration knows this file system",
            ) from None


class Checkpoints:
    """One executor's end of a round's checkpoints."""

    def __init__(
        self,
        job: Job,
        storage: Storage,
        *,
        latest: str = "",
        writes: bool = True,
        announce: Callable[[str, int], None] = lambda name, step: None,
    ) -> None:
        """``latest`` is the checkpoint to go on from, empty for none; ``announce`` hears of every one written."""
        self._identity, self._storage, self._latest = identity_of(job), storage, latest
        self._folder = "" if job.recovery is None else job.recovery.folder.rstrip("/")
        self._every = job.recovery.every_steps if job.recovery is not None else None
        self._writes, self._announce = writes, announce

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be made after ``step`` steps."""
        return self._every is not None and step > 0 and step % self._every == 0

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep ``state`` after ``step`` steps; only executor 0 does."""
        if self._writes:
            name = f"step-{step:09d}.npz"
            self._storage.write(name, pack(self._identity, step, state))
            self._announce(name, step)

    def read(self) -> tuple[int, dict[str, Any]] | None:
        """Return steps and state of the last checkpoint; None where there is none."""
        if not self._latest:
            return None
        return unpack(self._storage.read(self._latest), self._identity, f"{self._folder}/{self._latest}")


def _check(tree: Mapping[str, Any], identity: Mapping[str, Any], where: str) -> None:
    if tree["format"] != FORMAT:
        raise DataError(
            "A checkpoint of another version", expected=f"format {FORMAT}", actual=f"{tree['format']}", where=where
        )
    for name, wanted in identity.items():
        found = tree["identity"].get(name)
        if found != wanted:
            raise DataError(
                "A checkpoint of another training",
                expected=f"{name} {wanted!r}",
                actual=f"{name} {found!r}",
                where=where,
                hint="Give every training a checkpoint folder of its own, or delete this checkpoint.",
            )


def _encode(value: Any, where: str, arrays: dict[str, Any]) -> Any:
    """Return ``value`` as a JSON tree whose arrays have been moved to ``arrays``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        # pairs, because keys need not be texts: optimisers count their parameters
        items = [[_key(key, where), _encode(item, f"{where}[{key!r}]", arrays)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}[{index}]", arrays) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    name = f"array{len(arrays)}"
    arrays[name], kind = _array(value, where)
    return {kind: name}


def _key(key: Any, where: str) -> Any:
    if isinstance(key, (str, int)):
        return key
    raise TypeError(f"a checkpoint's keys must be texts or whole numbers, got {key!r} in {where}")


def _array(value: Any, where: str) -> tuple[Any, str]:
    import numpy as np

    kind = "array"
    if hasattr(value, "detach"):  # a torch tensor, told without importing torch
        value, kind = value.detach().cpu(), "tensor"
    try:
        array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    except TypeError as error:  # bfloat16, which numpy lacks
        raise TypeError(f"a checkpoint cannot keep {where}: {error}") from None
    if array.dtype.hasobject or not isinstance(array, np.ndarray):
        raise TypeError(f"a checkpoint keeps arrays, tensors and plain values, got {type(value).__name__} in {where}")
    return array, kind


def _decode(tree: Any, archive: Mapping[str, Any]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "dict":
        return {key: _decode(item, archive) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_decode(item, archive) for item in content]
        return tuple(items) if kind == "tuple" else items
    array = archive[content]
    if kind == "tensor":
        import torch

        return torch.from_numpy(array)
    return array

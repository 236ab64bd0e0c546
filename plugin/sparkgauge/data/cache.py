"""The user's cache of prepared data sets: each is prepared once, atomically, however many processes want it.

``cifar10-<digest>/`` holds a prepared data set, ``sources/`` remembers which source it came from, ``locks/`` keeps
processes from doing the same work twice. Correctness does not rest on the locks: a data set is prepared in a work
folder and appears under its name by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparkgauge import records
from sparkgauge.data.dataset import FILE_NAMES, MANIFEST_NAME, Dataset, FileEntry, Manifest
from sparkgauge.errors import BaselineError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparkgauge.data.layouts import Content

_NAME = "cifar10"
_WORK_PREFIX = ".preparing-"
_ABANDONED_SECONDS = 24 * 3600
"""Work folders older than this were left by a killed process; no preparation takes nearly as long."""


@dataclass(frozen=True)
class Source:
    """Where data comes from and how to tell that it has not changed since it was prepared."""

    key: str
    """Stable name: the absolute path, ``official`` or ``synthetic``."""
    fingerprint: str
    """Differs when the source's content may differ, e.g. sizes and modification times."""
    kind: Literal["real", "synthetic", "user"]
    description: str
    """For people; stored in ``dataset.json``."""
    read: Callable[[Path], Content]
    """Returns the content; may use the (empty) folder it is given, which is removed afterwards."""


@dataclass(frozen=True)
class _Entry:
    key: str
    fingerprint: str
    folder: str


class Cache:
    """The prepared data sets below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, source: Source) -> Dataset | None:
        """Return the intact data set prepared from ``source``; None when there is none or the source changed."""
        entry = self._read_entry(source.key)
        if entry is None or entry.fingerprint != source.fingerprint:
            return None
        try:
            return _intact(self.folder / Path(entry.folder).name)
        except DataError:
            return None  # prepared again from its source

    def add(self, source: Source) -> Dataset:
        """Return the data set of ``source``, prepared now unless another process was faster."""
        try:
            with self._lock(source.key):
                found = self.find(source)
                if found is not None:
                    return found
                folder = self._prepare(source)
                self._remember(source, folder.name)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return Dataset.load(folder)

    def real_datasets(self) -> tuple[list[Dataset], list[str]]:
        """Return the intact data sets of real images, newest first, and what is wrong with damaged ones."""
        datasets, problems = [], []
        for manifest in sorted(self.folder.glob(f"{_NAME}-*/{MANIFEST_NAME}"), key=_modified, reverse=True):
            try:
                datasets.append(_intact(manifest.parent))
            except DataError as error:
                problems.append(str(error))
        return [dataset for dataset in datasets if dataset.identity.kind == "real"], problems

    def _prepare(self, source: Source) -> Path:
        with self._work_folder() as work:
            (work / "source").mkdir()
            content = source.read(work / "source")
            prepared = work / "prepared"
            manifest = write_prepared(content, prepared, kind=source.kind, source=source.description)
            target = self.folder / f"{_NAME}-{manifest.identity.digest[:16]}"
            with self._lock("publish"):
                _publish(prepared, target, aside=work / "damaged")
            return target

    @contextlib.contextmanager
    def _work_folder(self) -> Iterator[Path]:
        """Give a private folder on the cache's own file system, where renames are atomic."""
        self._remove_abandoned()
        work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=self.folder))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        for folder in self.folder.glob(f"{_WORK_PREFIX}*"):
            if time.time() - _modified(folder) > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)

    def _entry_path(self, key: str) -> Path:
        return self.folder / "sources" / f"{_slug(key)}.json"

    def _read_entry(self, key: str) -> _Entry | None:
        try:
            value = json.loads(self._entry_path(key).read_text(encoding="utf-8"))
            entry = records.from_json(_Entry, value)
        except (OSError, ValueError, BaselineError):
            return None  # an entry only saves time: without one the source is read again
        return entry if entry.key == key else None

    def _remember(self, source: Source, folder_name: str) -> None:
        path = self._entry_path(source.key)
        path.parent.mkdir(exist_ok=True)
        entry = json.dumps(asdict(_Entry(source.key, source.fingerprint, folder_name)), indent=1)
        temporary = path.with_suffix(f".new-{os.getpid()}")
        temporary.write_text(entry, encoding="utf-8")
        temporary.replace(path)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the lock named ``key`` where the system has file locks; it ends with the process."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        path = self.folder / "locks" / f"{_slug(key)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            # Some network file systems have no locks: then work may be done twice, with the same result.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def writable_cache(folder: Path) -> tuple[Cache, str]:
    """Return a cache that can be written, and a notice when it is a temporary one because ``folder`` cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=folder))
        return Cache(folder), ""
    except OSError as error:
        temporary = _temporary_folder()
        reason = error.strerror or str(error)
        return Cache(temporary), (
            f"The cache folder {folder} cannot be written ({reason}): "
            f"data is prepared in {temporary} for this session only."
        )


def write_prepared(
    content: Content, folder: Path, *, kind: Literal["real", "synthetic", "user"], source: str
) -> Manifest:
    """Return the manifest of ``content`` after writing it as flat files into the new ``folder``, manifest last."""
    folder.mkdir()
    arrays = dict(zip(FILE_NAMES, _flat_arrays(content), strict=True))
    files = {name: _write_array(array, folder / name) for name, array in arrays.items()}
    identity = records.DataIdentity(
        _NAME, kind, content_digest(content), len(content.train_labels), len(content.test_labels)
    )
    manifest = Manifest(identity, files, "NHWC, channels last, RGB, uint8", source)
    text = json.dumps(records.to_json(manifest), indent=1)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return manifest


def content_digest(content: Content) -> str:
    """Return the SHA-256 over train labels, train images, test labels, test images (channels last) as hex digits.

    It depends on the images alone, not on the layout or archive they came in.
    """
    digest = hashlib.sha256()
    for array in (content.train_labels, content.train_images, content.test_labels, content.test_images):
        digest.update(array.data)
    return digest.hexdigest()


def mean_image(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean (32, 32, 3) of ``images`` (N, 32, 32, 3), summed exactly in integers, 0-255."""
    import numpy as np

    mean: NDArray[np.float32] = (images.sum(axis=0, dtype=np.uint64) / len(images)).astype("<f4")
    return mean


def _flat_arrays(content: Content) -> tuple[NDArray[np.uint8 | np.float32], ...]:
    """Return the arrays in the order of FILE_NAMES."""
    train = (content.train_images, content.train_labels)
    return (*train, content.test_images, content.test_labels, mean_image(content.train_images))


def _write_array(array: NDArray[np.uint8 | np.float32], path: Path) -> FileEntry:
    with path.open("xb") as file:
        file.write(array.data)
    dtype: Literal["uint8", "float32"] = "float32" if array.itemsize == 4 else "uint8"
    return FileEntry(dtype, tuple(array.shape), array.nbytes, hashlib.sha256(array.data).hexdigest())


def _publish(prepared: Path, target: Path, *, aside: Path) -> None:
    """Return when ``target`` is an intact data set: another process's, or ``prepared`` renamed to it."""
    if _is_intact(target):
        return
    if target.exists():
        target.rename(aside)
    try:
        prepared.rename(target)
    except OSError as error:
        # Without locks another process may have published the same data a moment ago.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _is_intact(target):
            raise


def _intact(folder: Path) -> Dataset:
    dataset = Dataset.load(folder)
    dataset.verify()
    return dataset


def _is_intact(folder: Path) -> bool:
    try:
        _intact(folder)
    except DataError:
        return False
    return True


@functools.cache
def _temporary_folder() -> Path:
    """Return this process's temporary cache, removed when the process exits."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="sparkgauge-data-"))
    atexit.register(_remove_own, folder, os.getpid())
    return folder


def _remove_own(folder: Path, owner: int) -> None:
    # A forked child that exits normally runs this too and must leave its parent's folder alone.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        "Cannot write prepared data",
        actual=str(error),
        where=str(folder),
        hint="Free disk space (about 400 MB while preparing) or choose another cache folder.",
    )


def _slug(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()  # another process removed it: not abandoned

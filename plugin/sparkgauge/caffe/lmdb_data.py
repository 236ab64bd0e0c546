"""LMDBs of Datum as arrays that executors memory-map: decoded once by the driver, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkgauge.data.dataset import Dataset
from sparkgauge.errors import DataError
from sparkgauge.records import DataIdentity

NAMES = ("train_images", "train_labels", "test_images", "test_labels")
DESCRIPTION = "about.json"
"""Ends the name of the file that is written last: a folder without it was never finished.

All names begin with the key: Spark ships files of several databases into one folder.
"""


@dataclass(frozen=True)
class Pair:
    """A database to train on and one to test on."""

    train: str
    """Its folder."""
    test: str
    key: str
    """Differs where the content may differ: of paths, sizes and times of change."""


def pair(train: Path, test: Path) -> Pair:
    """Return the two databases; DataError where one is none."""
    found = hashlib.sha256()
    for folder in (train, test):
        file = folder / "data.mdb"
        try:
            state = file.stat()
        except OSError as error:
            actual = error.strerror or str(error)
            raise DataError(
                "No LMDB here", expected="a folder with data.mdb", actual=actual, where=str(folder)
            ) from None
        found.update(f"{folder} {state.st_size} {state.st_mtime_ns};".encode())
    return Pair(str(train), str(test), found.hexdigest()[:16])


def prepare(databases: Pair, cache: Path) -> Dataset:
    """Return the databases' content below ``cache``, decoded now unless that was done; DataError for a damaged one."""
    folder = cache / f"lmdb-{databases.key}"
    if _description(folder, databases.key).is_file():
        return _loaded(folder, databases.key)
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".preparing-", dir=cache))
    try:
        _write(databases, work)
        try:
            os.rename(work, folder)
        except OSError:
            if not _description(folder, databases.key).is_file():  # another process was faster otherwise
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _loaded(folder, databases.key)


def open_arrays(folder: Path, key: str) -> tuple[Any, ...]:
    """Return images (N, h, w, c) and labels (N,) to train and to test on, memory-mapped; DataError if one is gone."""
    import numpy as np

    try:
        return tuple(np.load(folder / f"{key}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES)
    except (OSError, ValueError) as error:
        hint = "Delete the folder to have it prepared again."
        raise DataError("Unreadable prepared data", actual=str(error), where=str(folder), hint=hint) from None


def image_shape(data: Dataset) -> tuple[int, int, int]:
    """Return channels, height and width of the prepared images."""
    images = open_arrays(data.folder, data.folder.name.partition("-")[2])[0]
    return images.shape[3], images.shape[1], images.shape[2]


def _write(databases: Pair, folder: Path) -> None:
    import numpy as np

    from sparkgauge.caffe.sources import read_lmdb

    digest = hashlib.sha256()
    arrays: list[Any] = []
    for source in (databases.train, databases.test):
        images, labels = read_lmdb(source)
        # channels last: what convolutions and pools are fastest on, and a batch is gathered from whole images
        arrays += [np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        expected, actual = str(arrays[0].shape[1:]), str(arrays[2].shape[1:])
        raise DataError("Images to train and to test on differ", expected=expected, actual=actual, where=databases.test)
    for name, array in zip(NAMES, arrays, strict=True):
        np.save(folder / f"{databases.key}-{name}.npy", array)
        digest.update(array.data)
    counts = len(arrays[1]), len(arrays[3])
    content = {"name": Path(databases.train).name, "digest": digest.hexdigest(), "counts": counts}
    _description(folder, databases.key).write_text(json.dumps(content) + "\n", encoding="utf-8")


def _description(folder: Path, key: str) -> Path:
    return folder / f"{key}-{DESCRIPTION}"


def _loaded(folder: Path, key: str) -> Dataset:
    content = json.loads(_description(folder, key).read_text(encoding="utf-8"))
    train, test = content["counts"]
    identity = DataIdentity(content["name"], "user", content["digest"], train, test)
    return Dataset(folder, identity, "", train, test)

"""A prepared data set: a folder of flat files that every executor memory-maps, and the record that describes them.

All images are channels last (N, 32, 32, 3), uint8, RGB: the order TensorFlow takes as it is and PyTorch and Caffe take
after one transposition of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparkgauge import records
from sparkgauge.errors import BaselineError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST_NAME = "dataset.json"
MANIFEST_SCHEMA = 1
"""Version of ``dataset.json`` and of the files beside it; another version is prepared again."""
CLASS_COUNT = 10
IMAGE_SHAPE = (32, 32, 3)
"""Rows, columns, channels (RGB)."""
FILE_NAMES = ("train_images.bin", "train_labels.bin", "test_images.bin", "test_labels.bin", "mean_image.bin")


@dataclass(frozen=True)
class FileEntry:
    """What one flat file must look like."""

    dtype: Literal["uint8", "float32"]
    """Stored little-endian."""
    shape: tuple[int, ...]
    byte_count: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``dataset.json``; it is written last, so a folder without it was never finished."""

    identity: records.DataIdentity
    files: dict[str, FileEntry]
    image_layout: str
    """Meaning of the axes of the image files."""
    source: str
    """Where the data came from, for people."""
    schema: int = MANIFEST_SCHEMA
    class_count: int = CLASS_COUNT
    """Labels are below this."""


@dataclass(frozen=True)
class Arrays:
    """The data set's memory-mapped, read-only arrays."""

    train_images: NDArray[np.uint8]
    """(N, 32, 32, 3), channels last, RGB, 0-255."""
    train_labels: NDArray[np.uint8]
    """(N,), 0-9."""
    test_images: NDArray[np.uint8]
    """(M, 32, 32, 3), channels last, RGB, 0-255."""
    test_labels: NDArray[np.uint8]
    """(M,), 0-9."""
    mean_image: NDArray[np.float32]
    """(32, 32, 3), channels last: the training images' mean, 0-255."""


@dataclass(frozen=True)
class Dataset:
    """A checked, prepared data set; executors open it again by its folder with :meth:`load`."""

    folder: Path
    identity: records.DataIdentity
    notice: str
    """What the session's header must announce; empty when there is nothing to say."""
    train_count: int
    test_count: int
    class_count: int = CLASS_COUNT

    @classmethod
    def load(cls, folder: Path | str, *, notice: str = "") -> Dataset:
        """Return the data set prepared in ``folder``; DataError where it is unfinished or a file has the wrong size."""
        manifest = read_manifest(Path(folder))
        identity = manifest.identity
        return cls(Path(folder), identity, notice, identity.train_count, identity.test_count, manifest.class_count)

    def open(self) -> Arrays:
        """Return the arrays, memory-mapped read-only; DataError where a size is wrong or a label is above 9."""
        manifest = read_manifest(self.folder)
        files, classes = manifest.files, manifest.class_count
        train_images, train_labels, test_images, test_labels, mean_image = (
            _map_file(self.folder / name, files[name]) for name in FILE_NAMES
        )
        check_labels(train_labels, self.folder / FILE_NAMES[1], classes)
        check_labels(test_labels, self.folder / FILE_NAMES[3], classes)
        return Arrays(train_images, train_labels, test_images, test_labels, mean_image)

    def verify(self) -> None:
        """Return when every file still has the SHA-256 it was written with (0.1 to 0.5 s); DataError otherwise."""
        for name, entry in read_manifest(self.folder).files.items():
            actual = sha256_of(self.folder / name)
            if actual != entry.sha256:
                raise DataError(
                    "Prepared data was changed",
                    expected=f"SHA-256 {entry.sha256}",
                    actual=actual,
                    where=str(self.folder / name),
                    hint="Delete the folder; the next run prepares it again.",
                )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder`` after comparing every file's size with it."""
    path = folder / MANIFEST_NAME
    manifest = _parse_manifest(path)
    for name in FILE_NAMES:
        _check_entry(manifest.files, name, path)
        check_size(folder / name, manifest.files[name].byte_count, hint="Delete the folder to have it prepared again.")
    return manifest


def check_size(path: Path, expected_bytes: int, *, hint: str, detail: str = "") -> None:
    """Return when ``path`` is a file of ``expected_bytes``; DataError names file, expected and actual size."""
    try:
        actual_bytes = path.stat().st_size
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError("Unreadable data file", actual=reason, where=str(path), hint=hint) from error
    if actual_bytes != expected_bytes:
        raise DataError(
            "Data file of the wrong size",
            expected=f"{expected_bytes:,} bytes{detail}",
            actual=f"{actual_bytes:,} bytes",
            where=str(path),
            hint=hint,
        )


def check_labels(labels: NDArray[np.uint8], path: Path, class_count: int = CLASS_COUNT) -> None:
    """Return when all labels are below ``class_count``; DataError names the first record (from 0) that is not."""
    if labels.size and int(labels.max()) >= class_count:
        record = int((labels >= class_count).argmax())
        raise DataError(
            "Mislabelled record",
            expected=f"a label from 0 to {class_count - 1}",
            actual=f"{int(labels[record])} at record {record:,} (the first is 0)",
            where=str(path),
            hint="This is not CIFAR-10, or the file is damaged.",
        )


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _parse_manifest(path: Path) -> Manifest:
    hint = "Delete the folder to have it prepared again."
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_schema(value, path)
        return records.from_json(Manifest, value, where=str(path))
    except (OSError, ValueError) as error:
        summary = "Unfinished or unreadable prepared data"
        raise DataError(summary, actual=str(error), where=str(path), hint=hint) from error
    except BaselineError as error:
        summary = "Unreadable description of prepared data"
        raise DataError(summary, expected=error.expected, actual=error.actual, where=error.where, hint=hint) from error


def _check_schema(value: Any, path: Path) -> None:
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != MANIFEST_SCHEMA:
        raise DataError(
            "Prepared data of another version",
            expected=f"schema {MANIFEST_SCHEMA}",
            actual=f"schema {schema}",
            where=str(path),
            hint="Delete the folder to have it prepared again.",
        )


def _check_entry(files: dict[str, FileEntry], name: str, path: Path) -> None:
    entry = files.get(name)
    item_bytes = 4 if entry and entry.dtype == "float32" else 1
    if entry is None or math.prod(entry.shape) * item_bytes != entry.byte_count:
        raise DataError(
            "Unreadable description of prepared data",
            expected=f"an entry for {name} whose shape and size agree",
            actual="none" if entry is None else f"shape {entry.shape}, {entry.byte_count} bytes",
            where=str(path),
            hint="Delete the folder to have it prepared again.",
        )


def _map_file(path: Path, entry: FileEntry) -> Any:
    import numpy as np

    return np.memmap(path, dtype=np.dtype(entry.dtype).newbyteorder("<"), mode="r", shape=entry.shape)

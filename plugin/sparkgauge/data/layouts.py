"""The published layouts of CIFAR-10 on disk: the binary one (``*.bin``) and the python one (pickles).

Source of both: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and its download page.
A binary record is one label byte and 3,072 pixel bytes: 1,024 red, 1,024 green, 1,024 blue, each row by row.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge.data.dataset import IMAGE_SHAPE, check_labels, check_size
from sparkgauge.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECORDS_PER_FILE = 10_000
PIXEL_BYTES = 3072
RECORD_BYTES = 1 + PIXEL_BYTES
BINARY_FILE_BYTES = RECORDS_PER_FILE * RECORD_BYTES
PICKLE_LIMIT_BYTES = 64 * 1024 * 1024
"""Twice the size of the published pickles (31 MB); anything larger is not one of them and is not read."""
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_BATCH_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
BINARY_FILES = tuple(f"{name}.bin" for name in _BATCH_NAMES)
PYTHON_FILES = _BATCH_NAMES
BINARY_META = "batches.meta.txt"
PYTHON_META = "batches.meta"
WANTED_FILES = frozenset({*BINARY_FILES, *PYTHON_FILES, BINARY_META, PYTHON_META})
"""Every file name that either layout knows."""
OFFICIAL_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")

_EXTRACT_HINT = "Download or extract CIFAR-10 again."


@dataclass(frozen=True)
class Layout:
    """A folder with the files of one layout, all of them present."""

    folder: Path
    files: tuple[str, ...]
    """Names of the five training files and the test file, in order."""
    meta: str
    """Name of the file with the class names; it may be absent."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the paths of the data files, training first."""
        return tuple(self.folder / name for name in self.files)


@dataclass(frozen=True)
class Content:
    """A data set in memory: images (N, 32, 32, 3) uint8 RGB channels last, labels (N,) uint8 0-9."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def find_layout(folder: Path) -> Layout:
    """Return the layout in ``folder`` or in one sub-folder of it; DataError lists what is missing."""
    place = _place(folder)
    binary = [name for name in BINARY_FILES if (place / name).is_file()]
    python = [name for name in PYTHON_FILES if (place / name).is_file()]
    if len(binary) >= len(python):
        return _complete(Layout(place, BINARY_FILES, BINARY_META), binary)
    return _complete(Layout(place, PYTHON_FILES, PYTHON_META), python)


def read_layout(layout: Layout) -> Content:
    """Return the 50,000 training and 10,000 test images of ``layout``; DataError names the file that does not fit."""
    import numpy as np

    _check_class_names(layout)
    for path in layout.paths if layout.files is BINARY_FILES else ():
        _check_binary_size(path)
    read_file = read_binary_file if layout.files is BINARY_FILES else read_python_file
    train_count = RECORDS_PER_FILE * (len(layout.files) - 1)
    content = Content(
        np.empty((train_count, *IMAGE_SHAPE), np.uint8),
        np.empty(train_count, np.uint8),
        np.empty((RECORDS_PER_FILE, *IMAGE_SHAPE), np.uint8),
        np.empty(RECORDS_PER_FILE, np.uint8),
    )
    for number, path in enumerate(layout.paths[:-1]):
        part = slice(number * RECORDS_PER_FILE, (number + 1) * RECORDS_PER_FILE)
        read_file(path, content.train_images[part], content.train_labels[part])
    read_file(layout.paths[-1], content.test_images, content.test_labels)
    return content


def read_binary_file(path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Return after filling ``images`` and ``labels`` (10,000 each) from one file of the binary layout."""
    import numpy as np

    _check_binary_size(path)
    try:
        content = np.fromfile(path, dtype=np.uint8).reshape(RECORDS_PER_FILE, RECORD_BYTES)
    except OSError as error:
        raise DataError("Unreadable data file", actual=str(error), where=str(path)) from error
    check_labels(content[:, 0], path)
    labels[:] = content[:, 0]
    _to_channels_last(content[:, 1:], images)


def read_python_file(path: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Return after filling ``images`` and ``labels`` (10,000 each) from one file of the python layout."""
    import numpy as np

    batch = read_pickle(path)
    pixels, numbers = _entry(batch, "data", path), _entry(batch, "labels", path)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), PIXEL_BYTES)):
        _refuse_batch(path, f"uint8 data of shape ({len(labels)}, {PIXEL_BYTES})", _described(pixels))
    if not (isinstance(numbers, list) and len(numbers) == len(labels) and all(type(n) is int for n in numbers)):
        _refuse_batch(path, f"a list of {len(labels)} whole numbers as labels", _described(numbers))
    # Clipping keeps labels out of the range 0-255 out of the range 0-9 too, so that the check below sees them.
    clipped = np.array([n if 0 <= n <= 255 else 255 for n in numbers], dtype=np.uint8)
    check_labels(clipped, path)
    labels[:] = clipped
    _to_channels_last(pixels, images)


def read_pickle(path: Path) -> dict[Any, Any]:
    """Return the dictionary pickled in ``path``, built from plain values and numpy arrays only; else DataError.

    A pickle can name any function to call. Here only the few that rebuild numpy arrays and byte strings can be named.
    """
    if path.stat().st_size > PICKLE_LIMIT_BYTES:
        _refuse_batch(path, f"at most {PICKLE_LIMIT_BYTES:,} bytes", f"{path.stat().st_size:,} bytes")
    try:
        value = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except DataError as error:
        raise DataError(
            error.summary, expected=error.expected, actual=error.actual, where=str(path), hint=error.hint
        ) from error
    except Exception as error:  # a damaged pickle can raise anything; what it raised is told
        actual = f"{type(error).__name__}: {error}"
        raise DataError("Damaged pickle", actual=actual, where=str(path), hint=_EXTRACT_HINT) from error
    if not isinstance(value, dict):
        _refuse_batch(path, "a dictionary", _described(value))
    return dict(value)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that finds only what numpy arrays and byte strings are rebuilt with."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed function or class; DataError for every other name."""
        import numpy as np

        allowed: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct_function(),
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct_function(),
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): self._encode_latin1,
        }
        if (module, name) not in allowed:
            raise DataError(
                "Refused pickle",
                expected="only numpy arrays and plain values",
                actual=f"{module}.{name}",
                hint="This file is not CIFAR-10's, and loading it could run any code; nothing of it was run.",
            )
        return allowed[module, name]

    def _encode_latin1(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise DataError("Refused pickle", expected="byte strings as latin1", actual=repr(encoding)[:80])
        return text.encode("latin1")


def _reconstruct_function() -> Callable[..., Any]:
    # numpy 2 moved it and warns about the old place; asking an array how it is rebuilt works with every version.
    import numpy as np

    function: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]
    return function


def _place(folder: Path) -> Path:
    """Return the folder that holds the files: ``folder`` or a sub-folder; DataError when none or several do."""
    if _holds_any(folder):
        return folder
    try:
        found = sorted(child for child in folder.iterdir() if child.is_dir() and _holds_any(child))
    except OSError as error:
        raise DataError("Unreadable folder", actual=str(error), where=str(folder)) from error
    official = [folder / name for name in OFFICIAL_FOLDERS if folder / name in found]
    if official or len(found) == 1:
        return (official or found)[0]
    raise DataError(
        "No CIFAR-10 found" if not found else "Several data sets found",
        expected=f"{BINARY_FILES[0]} ... {BINARY_FILES[-1]} or {PYTHON_FILES[0]} ... {PYTHON_FILES[-1]}",
        actual=", ".join(child.name for child in found) or "neither, nor a sub-folder with them",
        where=str(folder),
        hint="Name the folder that holds these files." if found else None,
    )


def _holds_any(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*BINARY_FILES, *PYTHON_FILES))


def _complete(layout: Layout, present: list[str]) -> Layout:
    missing = [name for name in layout.files if name not in present]
    if missing:
        raise DataError(
            "Incomplete CIFAR-10",
            expected=f"{len(layout.files)} data files",
            actual=f"{len(present)}; missing: {', '.join(missing)}",
            where=str(layout.folder),
            hint=_EXTRACT_HINT,
        )
    return layout


def _check_binary_size(path: Path) -> None:
    detail = f" ({RECORDS_PER_FILE:,} records of {RECORD_BYTES:,})"
    check_size(path, BINARY_FILE_BYTES, hint=_EXTRACT_HINT, detail=detail)


def _check_class_names(layout: Layout) -> None:
    """Return when the class names beside the data, if any, are CIFAR-10's in their order."""
    path = layout.folder / layout.meta
    if not path.is_file():
        return
    names = _pickled_names(path) if layout.meta == PYTHON_META else path.read_bytes().decode("latin1").split()
    if tuple(names) != CLASS_NAMES:
        raise DataError(
            "Class names of another data set",
            expected=", ".join(CLASS_NAMES),
            actual=", ".join(names)[:200],
            where=str(path),
            hint="Labels would mean something else; give CIFAR-10.",
        )


def _pickled_names(path: Path) -> list[str]:
    names = _entry(read_pickle(path), "label_names", path)
    if not isinstance(names, list):
        _refuse_batch(path, "a list of class names", _described(names))
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _entry(batch: dict[Any, Any], name: str, path: Path) -> Any:
    """Return the entry by its name, which Python 2 pickled as bytes and Python 3 as text."""
    for key in (name.encode(), name):
        if key in batch:
            return batch[key]
    return _refuse_batch(path, f"an entry {name!r}", f"entries {', '.join(map(repr, batch))[:120]}")


def _refuse_batch(path: Path, expected: str, actual: str) -> None:
    raise DataError("Not a CIFAR-10 batch", expected=expected, actual=actual, where=str(path), hint=_EXTRACT_HINT)


def _described(value: Any) -> str:
    shape = f" of shape {value.shape}, {value.dtype}" if hasattr(value, "dtype") else ""
    length = f" of {len(value):,}" if isinstance(value, (list, bytes, str)) else ""
    return f"{type(value).__name__}{shape}{length}"


def _to_channels_last(pixels: NDArray[np.uint8], images: NDArray[np.uint8]) -> None:
    """Return after copying planes (n, 3072) into ``images`` (n, 32, 32, 3)."""
    interleaved = images.reshape(len(images), PIXEL_BYTES // 3, 3)
    # One plane at a time: 3 times as fast as one transposed copy.
    for channel, start in enumerate(range(0, PIXEL_BYTES, PIXEL_BYTES // 3)):
        interleaved[:, :, channel] = pixels[:, start : start + PIXEL_BYTES // 3]

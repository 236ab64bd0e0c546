"""Takes checked rows out of Arrow columns as uint8 arrays, on the executors. Arrow's own memory is read in place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparkgauge.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LABEL_LIMIT = 256
"""Labels are kept as one byte each."""

BATCH_ROWS = 1000
"""Rows that a Parquet file is decoded in: 3 MB of CIFAR-10, which stay in a core's cache.

One core of a Xeon decoded and wrote 444,000 to 722,000 rows/s so, and 336,000 to 626,000 with 2,500 rows at a time
(three turns)."""

PACKED_ROWS = 1000
"""Rows per message of :func:`pack`, for executors without a disk in common with the driver."""


@dataclass(frozen=True)
class Layout:
    """Which columns hold what."""

    image_column: str
    label_column: str
    image_shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Return the bytes of an image."""
        return math.prod(self.image_shape)


@dataclass(frozen=True)
class Problem:
    """The first row that cannot be used."""

    column: str
    row: int
    """Counted from 0 within ``place``."""
    expected: str
    actual: str
    place: str = ""
    """Partition or file."""

    def error(self) -> DataError:
        """Return it as an error for the user."""
        where = f"row {self.row:,} of {self.place} (the first is 0)"
        return DataError(
            f"Bad value in column {self.column!r}", expected=self.expected, actual=self.actual, where=where
        )

    def to_json(self) -> str:
        """Return it as text, for a column of a result."""
        return json.dumps(asdict(self))


class BadValueError(Exception):
    """A value that cannot be used, by its index in the column."""

    def __init__(self, index: int, expected: str, actual: str) -> None:
        super().__init__(index, expected, actual)
        self.index, self.expected, self.actual = index, expected, actual


def images_of(column: pa.Array, width: int) -> NDArray[np.uint8]:
    """Return the images (n, ``width``) of a binary or list column, a view where it is binary; BadValueError."""
    import pyarrow as pa

    expected = f"{width:,} bytes"
    _check_present(column, expected)
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        _check_lengths(np.full(len(column), kind.byte_width), width, expected)
        data = np.frombuffer(column.buffers()[1] or b"", np.uint8)
        return data[column.offset * width :][: len(column) * width].reshape(-1, width)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        offsets = _offsets(column, np.int64 if pa.types.is_large_binary(kind) else np.int32)
        _check_lengths(np.diff(offsets), width, expected)
        data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
        return data[offsets[0] : offsets[-1]].reshape(-1, width)
    _check_lengths(column.value_lengths().to_numpy(zero_copy_only=False), width, f"{width:,} values")
    return _pixels(column.flatten(), width).reshape(-1, width)


def labels_of(column: pa.Array) -> NDArray[np.uint8]:
    """Return the labels (n,) of an integer column; BadValueError for a null or a number that is not 0 to 255."""
    expected = f"a whole number from 0 to {LABEL_LIMIT - 1}"
    _check_present(column, expected)
    numbers = column.to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= LABEL_LIMIT))
    if wrong.size:
        raise BadValueError(int(wrong[0]), expected, str(numbers[wrong[0]]))
    labels: NDArray[np.uint8] = numbers.astype(np.uint8, copy=False)
    return labels


def rows_of(batch: pa.RecordBatch, layout: Layout, done: int, place: str) -> tuple[Any, Any] | Problem:
    """Return images and labels of a batch whose first column is the image, or what is wrong with it."""
    readers: tuple[tuple[str, Callable[[Any], NDArray[np.uint8]]], ...] = (
        (layout.image_column, lambda column: images_of(column, layout.width)),
        (layout.label_column, labels_of),
    )
    found = []
    for index, (name, read) in enumerate(readers):
        try:
            found.append(read(batch.column(index)))
        except BadValueError as error:
            return Problem(name, done + error.index, error.expected, error.actual, place)
    return found[0], found[1]


def spill(folder: str, layout: Layout, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Write a partition's rows to files of its own below ``folder``; yield one row that describes them."""
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    # an attempt that was lost leaves files that nobody asks for
    name = f"part-{task.partitionId():06d}-{task.taskAttemptId()}"
    place, rows, problem = f"partition {task.partitionId()}", 0, ""
    with open(Path(folder, f"{name}.images"), "xb") as images, open(Path(folder, f"{name}.labels"), "xb") as labels:
        for batch in batches:
            if problem:
                continue  # Spark wants to be rid of its rows
            found = rows_of(batch, layout, rows, place)
            if isinstance(found, Problem):
                problem = found.to_json()
                continue
            images.write(np.ascontiguousarray(found[0]).data)
            labels.write(np.ascontiguousarray(found[1]).data)
            rows += len(found[1])
    yield _described(task.partitionId(), rows, name, problem)


def pack(layout: Layout, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield a partition's rows as blocks of bytes, for a driver that shares no disk with the executors."""
    import pyarrow as pa
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    place, rows, problem = f"partition {task.partitionId()}", 0, ""
    for batch in batches:
        for start in range(0, batch.num_rows, PACKED_ROWS):
            found = None if problem else rows_of(batch.slice(start, PACKED_ROWS), layout, rows, place)
            if found is None:
                continue
            blocks: tuple[bytes, bytes] = (b"", b"")
            if isinstance(found, Problem):
                problem = found.to_json()
            else:
                blocks = (found[0].tobytes(), found[1].tobytes())
                rows += len(found[1])
            columns = {"images": pa.array([blocks[0]], pa.binary()), "labels": pa.array([blocks[1]], pa.binary())}
            yield pa.RecordBatch.from_pydict({**columns, "problem": pa.array([problem], pa.string())})


@dataclass(frozen=True)
class Group:
    """A row group of a Parquet file, and where its rows belong."""

    path: str
    index: int
    first_row_in_file: int
    first_row: int
    """In the data set."""
    rows: int


def copy_groups(images: str, labels: str, layout: Layout, groups: Iterable[Group]) -> Iterator[str]:
    """Copy row groups to their places in two files; yield a :class:`Problem` as JSON where there is one."""
    image_file, label_file = os.open(images, os.O_WRONLY), os.open(labels, os.O_WRONLY)
    try:
        for group in groups:
            if problem := _copy_group(image_file, label_file, layout, group):
                yield problem.to_json()
                return
    finally:
        os.close(image_file)
        os.close(label_file)


def _copy_group(image_file: int, label_file: int, layout: Layout, group: Group) -> Problem | None:
    import pyarrow.parquet as pq

    columns, done = [layout.image_column, layout.label_column], 0
    with pq.ParquetFile(group.path, memory_map=True) as file:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group.index], columns=columns, use_threads=False):
            found = rows_of(batch.select(columns), layout, group.first_row_in_file + done, group.path)
            if isinstance(found, Problem):
                return found
            _write_at(image_file, found[0], (group.first_row + done) * layout.width)
            _write_at(label_file, found[1], group.first_row + done)
            done += len(found[1])
    if done != group.rows:
        expected = f"{group.rows:,} rows in row group {group.index}"
        return Problem(layout.image_column, group.first_row_in_file, expected, f"{done:,}", group.path)
    return None


def _write_at(file: int, array: NDArray[np.uint8], offset: int) -> None:
    # pwrite, not a memory map: filling fresh pages of a map costs a fault for each
    rest = np.ascontiguousarray(array).reshape(-1).data
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _described(partition: int, rows: int, name: str, problem: str) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_pydict(
        {
            "partition": pa.array([partition], pa.int32()),
            "rows": pa.array([rows], pa.int64()),
            "name": pa.array([name], pa.string()),
            "problem": pa.array([problem], pa.string()),
        }
    )


def _offsets(column: pa.Array, kind: type) -> NDArray[Any]:
    buffer = column.buffers()[1]
    if buffer is None or not len(column):
        return np.zeros(1, kind)
    return np.frombuffer(buffer, kind)[column.offset : column.offset + len(column) + 1]


def _pixels(values: pa.Array, width: int) -> NDArray[np.uint8]:
    """Return the bytes of a list column's elements: 8-bit ones as they are, wider ones where they fit."""
    if values.null_count:
        index = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise BadValueError(index // width, "no null among the values", f"null at value {index % width:,}")
    numbers = values.to_numpy(zero_copy_only=False)
    if numbers.dtype.itemsize == 1:
        pixels: NDArray[np.uint8] = numbers.view(np.uint8)  # Spark's only 8-bit type has a sign: -1 is 255
        return pixels
    wrong = np.flatnonzero((numbers < 0) | (numbers > 255))
    if wrong.size:
        index = int(wrong[0])
        raise BadValueError(index // width, "values from 0 to 255", f"{numbers[index]} at value {index % width:,}")
    narrow: NDArray[np.uint8] = numbers.astype(np.uint8)
    return narrow


def _check_present(column: pa.Array, expected: str) -> None:
    if column.null_count:
        raise BadValueError(int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]), expected, "null")


def _check_lengths(lengths: NDArray[Any], width: int, expected: str) -> None:
    wrong = np.flatnonzero(lengths != width)
    if wrong.size:
        raise BadValueError(int(wrong[0]), expected, f"{int(lengths[wrong[0]]):,}")

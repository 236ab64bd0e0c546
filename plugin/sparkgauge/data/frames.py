"""Spark DataFrames as data sets: their rows cross into flat files once, which executors map as they map CIFAR-10.

Three roads lead there, the first that is open is taken:

1. A bare scan of Parquet files on this machine: executors decode row groups themselves and write each to its place.
2. Any other DataFrame, executors on this machine: Arrow batches of ``mapInArrow`` go to one file per partition, which
   the driver joins in order of the partitions.
3. Executors on other machines: the same batches come to the driver in blocks.

Each partition's rows come from the one attempt whose result Spark hands over, so every row is there exactly once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge import records
from sparkgauge.data.dataset import FILE_NAMES, IMAGE_SHAPE, MANIFEST_NAME, Dataset, FileEntry, Manifest, sha256_of
from sparkgauge.errors import DataError, GaugeError, MachineError

if TYPE_CHECKING:
    from sparkgauge.data.rows import Group, Layout

NAME = "dataframe"
"""Name of the data set in records."""

PACKAGES = ("pyarrow", "pandas")

SPLIT_SEED = 0
"""``test_fraction`` takes the same rows in every run."""

SPLIT_ROWS = 8192
"""Rows held in memory while they are divided."""

INTEGERS = ("tinyint", "smallint", "int", "bigint")

_LIGHT = {"SPARKGAUGE_PREIMPORT": "pyarrow,sparkgauge.data.rows", "SPARKGAUGE_PREIMPORT_FILE": ""}
"""What tells the Python daemon behind Arrow functions to import no framework."""


@dataclass(frozen=True, eq=False)
class Frames:
    """A training and a test set in DataFrames, as ``train(data=..., test_data=...)`` was given them."""

    train: Any
    test: Any | None
    """None where ``test_fraction`` says which part of ``train`` it is."""
    test_fraction: float | None = None
    image_column: str = "image"
    label_column: str = "label"
    image_shape: tuple[int, ...] = IMAGE_SHAPE

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what tells data sets apart; it holds as long as the DataFrames live."""
        columns = (self.image_column, self.label_column, self.image_shape)
        return (id(self.train), id(self.test), self.test_fraction, *columns)


def is_frame(value: object) -> bool:
    """Return whether ``value`` looks like a DataFrame of Spark; imports nothing."""
    return all(hasattr(value, name) for name in ("mapInArrow", "schema", "sparkSession"))


def check_installed() -> None:
    """Raise MachineError where pyarrow, or pandas, without which PySpark hands out no Arrow batches, is missing."""
    from importlib.util import find_spec

    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise MachineError(
            "A DataFrame as data needs packages that are not installed",
            expected=f"{' and '.join(PACKAGES)}, here and where the executors run",
            actual=f"no {' and no '.join(missing)}",
            hint="Install them with: pip install 'pytest-sparkgauge[dataframes]'",
        )


def materialise(frames: Frames, folder: Path, *, shared: bool) -> Dataset:
    """Return the data set of ``frames`` after bringing its rows into the new ``folder``.

    ``shared`` says that the executors write to this machine's disk. DataError names column, partition or file, and row
    of what cannot be used.
    """
    check_installed()
    from sparkgauge.data.rows import Layout

    layout = Layout(frames.image_column, frames.label_column, frames.image_shape)
    wanted = {"data": frames.train, **({} if frames.test is None else {"test_data": frames.test})}
    for name, frame in wanted.items():
        check_columns(frame, layout, name)
    folder.mkdir(parents=True)
    try:
        counts = _bring(frames, layout, folder, shared=shared)
        _finish(frames, folder, counts)
        return Dataset.load(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_columns(frame: Any, layout: Layout, name: str) -> None:
    """Raise DataError where ``frame`` lacks a column, or one has a type that holds no images or labels."""
    types = {field.name: field.dataType.simpleString() for field in frame.schema.fields}
    arrays = tuple(f"array<{kind}>" for kind in INTEGERS)
    for column, allowed in ((layout.image_column, ("binary", *arrays)), (layout.label_column, INTEGERS)):
        if types.get(column) not in allowed:
            found = f"type {types[column]}" if column in types else f"only the columns {', '.join(types) or 'none'}"
            raise DataError(
                f"{name}= has no usable column {column!r}",
                expected=f"type {', '.join(allowed)}",
                actual=found,
                hint="Name the columns with image_column= and label_column=, or cast them.",
            )


def test_rows(count: int, fraction: float) -> Any:
    """Return the row numbers of a test set that is ``fraction`` of ``count`` rows, ascending: the same in every run."""
    import numpy as np

    from sparkgauge.data.shards import global_order

    return np.sort(global_order(count, 0, SPLIT_SEED)[: round(count * fraction)])


def local_parquet_files(frame: Any) -> list[str]:
    """Return the files of a DataFrame that is nothing but some columns of Parquet files on this machine; else none."""
    try:
        plan = frame._jdf.queryExecution().optimizedPlan()
        if plan.nodeName() == "Project":
            expressions = plan.projectList()
            kinds = {expressions.apply(i).getClass().getSimpleName() for i in range(expressions.size())}
            if kinds != {"AttributeReference"}:
                return []
            plan = plan.child()
        if plan.getClass().getSimpleName() != "LogicalRelation":
            return []
        relation = plan.relation()
        if relation.getClass().getSimpleName() != "HadoopFsRelation":
            return []
        kind = str(relation.fileFormat().getClass().getName())
        # table formats derive from it, and hide rows of the files
        if kind != "org.apache.spark.sql.execution.datasources.parquet.ParquetFileFormat":
            return []
        files = [str(name) for name in frame.inputFiles()]
    except Exception:  # a plan of another kind or version: the general road is open
        return []
    paths = [_local_path(name) for name in files]
    return sorted(path for path in paths if path) if all(paths) else []


def _local_path(uri: str) -> str:
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(uri)
    path = unquote(parts.path)
    return path if parts.scheme == "file" and not parts.netloc and os.path.isfile(path) else ""


def _bring(frames: Frames, layout: Layout, folder: Path, *, shared: bool) -> dict[str, int]:
    """Return the rows of each part, ``train`` and ``test``, after writing their files."""
    counts = {"train": _bring_one(frames.train, layout, folder, "train", "data", shared)}
    if frames.test is not None:
        counts["test"] = _bring_one(frames.test, layout, folder, "test", "test_data", shared)
    else:
        counts = _split(folder, layout, counts["train"], frames.test_fraction or 0.0)
    for part, count in counts.items():
        if not count:
            name = "test_data" if part == "test" and frames.test is not None else "data"
            raise DataError(f"{name}= has no rows for the {part} set", expected="at least one row", actual="none")
    return counts


def _bring_one(frame: Any, layout: Layout, folder: Path, part: str, name: str, shared: bool) -> int:
    images, labels = folder / f"{part}_images.bin", folder / f"{part}_labels.bin"
    try:
        if shared and (files := local_parquet_files(frame)) and (groups := _groups(files, layout)) is not None:
            return _copy_parquet(frame, layout, images, labels, groups)
        return (_join_spills if shared else _receive)(frame, layout, images, labels)
    except GaugeError:
        raise
    except Exception as error:
        raise DataError(f"{name}= could not be read", actual=_first_cause(error), where="Spark") from error


def _groups(files: Sequence[str], layout: Layout) -> list[Group] | None:
    """Return every row group of ``files`` with its place; None where a column is missing, or its name has dots."""
    import pyarrow.parquet as pq

    from sparkgauge.data.rows import Group

    columns = {layout.image_column, layout.label_column}
    groups: list[Group] = []
    first_row = 0
    for path in files:
        metadata = pq.read_metadata(path)
        if any("." in name for name in columns) or not columns <= set(metadata.schema.to_arrow_schema().names):
            return None
        row = 0
        for index in range(metadata.num_row_groups):
            rows = int(metadata.row_group(index).num_rows)
            groups.append(Group(path, index, row, first_row + row, rows))
            row += rows
        first_row += row
    return groups


def _copy_parquet(frame: Any, layout: Layout, images: Path, labels: Path, groups: Sequence[Group]) -> int:
    count = sum(group.rows for group in groups)
    _reserve(images, count * layout.width)
    _reserve(labels, count)
    context = frame.sparkSession.sparkContext
    tasks = _shares(groups, int(context.defaultParallelism))
    copy = functools.partial(_copy_share, str(images), str(labels), layout)
    problems = context.parallelize(tasks, len(tasks)).mapPartitions(copy).collect() if tasks else []
    _raise_first(problems)
    return count


def _reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes and keep the disk's room for it where the system can: a full disk shows now."""
    with path.open("xb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def _copy_share(images: str, labels: str, layout: Layout, shares: Iterator[list[Group]]) -> Iterator[str]:
    from sparkgauge.data.rows import copy_groups

    for share in shares:
        yield from copy_groups(images, labels, layout, share)


def _shares(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """Return ``groups`` in runs of about the same number of rows, one for each of at most ``parts`` tasks."""
    total = sum(group.rows for group in groups)
    shares: list[list[Group]] = [[] for _ in range(parts)]
    done = 0
    for group in groups:
        middle = done + group.rows / 2
        shares[min(parts - 1, int(middle * parts / max(1, total)))].append(group)
        done += group.rows
    return [share for share in shares if share]


def _join_spills(frame: Any, layout: Layout, images: Path, labels: Path) -> int:
    from sparkgauge.data.rows import spill

    folder = images.with_suffix(".parts")
    folder.mkdir()
    schema = "partition int, rows bigint, name string, problem string"
    mapped = _map_in_arrow(frame, layout, functools.partial(spill, str(folder), layout), schema)
    parts = sorted(mapped.collect(), key=lambda row: int(row.partition))
    _raise_first([row.problem for row in parts])
    for path, suffix in ((images, "images"), (labels, "labels")):
        with path.open("xb") as target:
            for row in parts:
                _append(folder / f"{row.name}.{suffix}", target)
    shutil.rmtree(folder)
    return sum(int(row.rows) for row in parts)


def _receive(frame: Any, layout: Layout, images: Path, labels: Path) -> int:
    from sparkgauge.data.rows import pack

    schema = "images binary, labels binary, problem string"
    mapped, count = _map_in_arrow(frame, layout, functools.partial(pack, layout), schema), 0
    with images.open("xb") as image_file, labels.open("xb") as label_file:
        for row in mapped.toLocalIterator():  # in order of the partitions, one at a time
            _raise_first([row.problem])
            image_file.write(row.images)
            label_file.write(row.labels)
            count += len(row.labels)
    return count


def _map_in_arrow(frame: Any, layout: Layout, function: Any, schema: str) -> Any:
    from pyspark.sql import functions

    names = {"image": layout.image_column, "label": layout.label_column}
    columns = [functions.col(f"`{name}`").alias(kind) for kind, name in names.items()]
    with _light_workers(frame.sparkSession.sparkContext), warnings.catch_warnings():
        # PySpark warns of pandas 3, of which nothing is used here
        warnings.simplefilter("ignore", FutureWarning)
        return frame.select(*columns).mapInArrow(function, schema)


@contextlib.contextmanager
def _light_workers(context: Any) -> Iterator[None]:
    """Let the Python process behind Arrow functions start without the frameworks, which are not needed there."""
    before = dict(context.environment)
    context.environment.update(_LIGHT)
    try:
        yield
    finally:
        context.environment.clear()
        context.environment.update(before)


def _append(source: Path, target: Any) -> None:
    """Append a file's content to the open file ``target``, inside the kernel where it can, and remove the file."""
    with source.open("rb") as file:
        target.flush()
        rest = os.fstat(file.fileno()).st_size
        with contextlib.suppress(OSError, AttributeError):  # not on every system, nor between all file systems
            while rest and (moved := os.copy_file_range(file.fileno(), target.fileno(), rest)):
                rest -= moved
        if rest:
            file.seek(-rest, os.SEEK_END)
            target.seek(0, os.SEEK_END)
            shutil.copyfileobj(file, target, 1 << 22)
    source.unlink()


def _split(folder: Path, layout: Layout, count: int, fraction: float) -> dict[str, int]:
    """Move ``fraction`` of the training rows to the test set; return the rows of both."""
    import numpy as np

    chosen = np.zeros(count, bool)
    chosen[test_rows(count, fraction)] = True
    for kind, width in (("images", layout.width), ("labels", 1)):
        source, kept = folder / f"train_{kind}.bin", folder / f"kept_{kind}.bin"
        with source.open("rb") as whole, kept.open("xb") as train, (folder / f"test_{kind}.bin").open("xb") as test:
            for start in range(0, count, SPLIT_ROWS):
                own = chosen[start : start + SPLIT_ROWS]
                block = np.fromfile(whole, np.uint8, len(own) * width).reshape(-1, width)
                test.write(block[own].data)
                train.write(block[~own].data)
        kept.replace(source)
    tested = int(chosen.sum())
    return {"train": count - tested, "test": tested}


def _finish(frames: Frames, folder: Path, counts: dict[str, int]) -> None:
    """Write the mean image and, last, the description of the files."""
    import numpy as np

    from sparkgauge.data.cache import mean_image

    shape = frames.image_shape
    shapes = {f"{part}_images.bin": (count, *shape) for part, count in counts.items()}
    shapes |= {f"{part}_labels.bin": (count,) for part, count in counts.items()}
    arrays = {name: np.memmap(folder / name, np.uint8, "r", shape=size) for name, size in shapes.items()}
    mean = np.asarray(mean_image(arrays["train_images.bin"]))
    mean.tofile(folder / "mean_image.bin")
    with ThreadPoolExecutor(len(FILE_NAMES)) as pool:  # hashing leaves the interpreter's lock
        digest = pool.submit(_content_digest, arrays)
        sums = dict(zip(FILE_NAMES, pool.map(lambda name: sha256_of(folder / name), FILE_NAMES), strict=True))
    files = {name: FileEntry("uint8", size, arrays[name].nbytes, sums[name]) for name, size in shapes.items()}
    files["mean_image.bin"] = FileEntry("float32", shape, mean.nbytes, sums["mean_image.bin"])
    identity = records.DataIdentity(NAME, "user", digest.result(), counts["train"], counts["test"])
    classes = 1 + max(int(arrays[f"{part}_labels.bin"].max()) for part in counts)
    layout = "NHWC, channels last, RGB, uint8" if shape == IMAGE_SHAPE else f"uint8 of shape {shape}"
    manifest = Manifest(identity, files, layout, "a Spark DataFrame", class_count=classes)
    text = json.dumps(records.to_json(manifest), indent=1)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def _content_digest(arrays: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in ("train_labels.bin", "train_images.bin", "test_labels.bin", "test_images.bin"):
        digest.update(arrays[name].reshape(-1).data)
    return digest.hexdigest()


def _raise_first(problems: Sequence[str]) -> None:
    from sparkgauge.data.rows import Problem

    for text in problems:
        if text:
            raise Problem(**json.loads(text)).error()


def _first_cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    caused = [line for line in lines if "Error" in line or "Exception" in line]
    return (caused or lines or [type(error).__name__])[0][:300]

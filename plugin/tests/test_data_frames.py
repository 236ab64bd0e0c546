"""Rows out of Arrow columns and Parquet files: each exactly once, in its place, or named with what is wrong with it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from sparkgauge.data import frames  # noqa: E402
from sparkgauge.data.frames import Frames  # noqa: E402
from sparkgauge.data.rows import BadValueError, Layout, Problem, copy_groups, images_of, labels_of, rows_of  # noqa: E402
from sparkgauge.data.shards import Shard  # noqa: E402
from sparkgauge.errors import DataError  # noqa: E402

LAYOUT = Layout("image", "label", (2, 1, 3))
WIDTH = LAYOUT.width


def _pixels(count: int, first: int = 0) -> Any:
    """Return images that are all different: each begins with its own number."""
    pixels = np.zeros((count, WIDTH), np.uint8)
    pixels[:, :4] = np.arange(first, first + count, dtype="<u4")[:, None].view(np.uint8)
    return pixels


def _lists(pixels: Any, kind: Any) -> Any:
    return pa.array([list(map(int, row)) for row in pixels], pa.list_(kind))


COLUMNS = {
    "binary": lambda pixels: pa.array([row.tobytes() for row in pixels], pa.binary()),
    "large_binary": lambda pixels: pa.array([row.tobytes() for row in pixels], pa.large_binary()),
    "fixed_size_binary": lambda pixels: pa.array([row.tobytes() for row in pixels], pa.binary(WIDTH)),
    "int8": lambda pixels: _lists(pixels.view(np.int8), pa.int8()),
    "uint8": lambda pixels: _lists(pixels, pa.uint8()),
    "int32": lambda pixels: _lists(pixels, pa.int32()),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("part", [slice(0, 9), slice(3, 7), slice(0, 0)], ids=str)
def test_every_kind_of_column_gives_the_same_bytes(kind: str, part: slice) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, WIDTH)).astype(np.uint8)
    column = COLUMNS[kind](pixels)
    np.testing.assert_array_equal(images_of(column[part], WIDTH), pixels[part])


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64"])
def test_labels_of_any_width_become_bytes(kind: str) -> None:
    labels = labels_of(pa.array([0, 9, 100], getattr(pa, kind)())[1:])
    assert labels.dtype == np.uint8 and labels.tolist() == [9, 100]


@pytest.mark.parametrize(
    ("read", "column", "found"),
    [
        ("image", pa.array([b"123456", None]), (1, "6 bytes", "null")),
        ("image", pa.array([b"123456", b"12345", b""]), (1, "6 bytes", "5")),
        ("image", pa.array([b"1234567"], pa.binary(7)), (0, "6 bytes", "7")),
        ("image", pa.array([[1] * 6, [1] * 7], pa.list_(pa.int8())), (1, "6 values", "7")),
        ("image", pa.array([None], pa.list_(pa.int8())), (0, "6 bytes", "null")),
        (
            "image",
            pa.array([[1] * 6, [1, 2, None, 4, 5, 6]], pa.list_(pa.int8())),
            (1, "no null among the values", "null at value 2"),
        ),
        ("image", pa.array([[1] * 5 + [256]], pa.list_(pa.int32())), (0, "values from 0 to 255", "256 at value 5")),
        ("label", pa.array([1, None], pa.int32()), (1, "a whole number from 0 to 255", "null")),
        ("label", pa.array([1, 2, 256], pa.int32()), (2, "a whole number from 0 to 255", "256")),
        ("label", pa.array([-1], pa.int8()), (0, "a whole number from 0 to 255", "-1")),
    ],
)
def test_a_value_that_cannot_be_used_is_named(read: str, column: Any, found: Any) -> None:
    with pytest.raises(BadValueError) as caught:
        images_of(column, WIDTH) if read == "image" else labels_of(column)
    assert (caught.value.index, caught.value.expected, caught.value.actual) == found


def test_a_bad_row_is_counted_over_the_batches_of_its_partition() -> None:
    batch = pa.record_batch({"image": pa.array([b"123456", b"1"]), "label": pa.array([1, 1], pa.int32())})
    problem = rows_of(batch, LAYOUT, 1000, "partition 3")
    assert isinstance(problem, Problem)
    message = "Bad value in column 'image': expected 6 bytes, got 1, in row 1,001 of partition 3 (the first is 0)"
    assert str(problem.error()) == message


sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 50))
def test_every_row_of_every_file_is_trained_on_exactly_once_an_epoch(
    sizes: list[int], group_rows: int, tasks: int, executors: int, batch: int
) -> None:
    """Uneven and empty files, row groups of any size, any number of tasks, executors and images a batch."""
    count = sum(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_files(folder, sizes, group_rows)
        groups = frames._groups(sorted(map(str, folder.glob("*.parquet"))), LAYOUT)
        images, labels = folder / "train_images.bin", folder / "train_labels.bin"
        images.write_bytes(bytes(count * WIDTH))
        labels.write_bytes(bytes([255]) * count)
        shares = frames._shares(groups, tasks)
        assert len(shares) <= tasks
        problems = [one for share in shares for one in copy_groups(str(images), str(labels), LAYOUT, share)]
        assert problems == []
        np.testing.assert_array_equal(np.fromfile(images, np.uint8).reshape(-1, WIDTH), _pixels(count))
        if count:
            _check_one_epoch(folder, count, executors, batch)


def _write_files(folder: Path, sizes: list[int], group_rows: int) -> None:
    first = 0
    for number, size in enumerate(sizes):
        columns = {"label": np.arange(first, first + size) % 10, "image": COLUMNS["binary"](_pixels(size, first))}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=group_rows)
        first += size


def _check_one_epoch(folder: Path, count: int, executors: int, batch: int) -> None:
    counts = frames._split(folder, LAYOUT, count, 0.2)
    assert counts["train"] + counts["test"] == count
    if not counts["train"] or not counts["test"]:
        return
    frames._finish(Frames(None, None, 0.2, image_shape=LAYOUT.image_shape), folder, counts)
    opened = [
        Shard.open(folder, executors=executors, rank=rank, global_batch=batch, seed=1) for rank in range(executors)
    ]
    seen = [shard.batch(step) for step in range(opened[0].steps_per_epoch) for shard in opened]
    tested = [part for shard in opened for part in shard.test_batches(7)]
    numbers = np.concatenate([_numbers(images) for images, _ in seen + tested])
    np.testing.assert_array_equal(np.sort(numbers), np.arange(count))
    labels = np.concatenate([labels for _, labels in seen + tested])
    np.testing.assert_array_equal(labels, numbers % 10)


def _numbers(images: Any) -> Any:
    return np.ascontiguousarray(images.reshape(-1, WIDTH)[:, :4]).view("<u4")[:, 0]


def test_shares_are_contiguous_and_near_equal() -> None:
    groups: Any = [SimpleNamespace(rows=100, index=index) for index in range(10)]
    shares = frames._shares(groups, 2)
    assert [[group.index for group in share] for share in shares] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("count", [1, 9, 1000])
def test_a_fraction_takes_the_same_rows_every_time(count: int) -> None:
    chosen = frames.test_rows(count, 0.25)
    assert len(set(chosen.tolist())) == len(chosen) == round(count * 0.25)
    np.testing.assert_array_equal(chosen, frames.test_rows(count, 0.25))


def test_a_file_that_has_lost_rows_since_it_was_counted_is_named(tmp_path: Path) -> None:
    _write_files(tmp_path, [5], 5)
    (group,) = frames._groups([str(tmp_path / "0.parquet")], LAYOUT) or ()
    for name in ("images", "labels"):
        (tmp_path / name).touch()
    wrong = [type(group)(group.path, 0, 0, 0, 6)]
    (text,) = copy_groups(str(tmp_path / "images"), str(tmp_path / "labels"), LAYOUT, wrong)
    assert "6 rows in row group 0" in text


def _frame(**types: str) -> Any:
    fields = [SimpleNamespace(name=n, dataType=SimpleNamespace(simpleString=lambda t=t: t)) for n, t in types.items()]
    return SimpleNamespace(schema=SimpleNamespace(fields=fields))


@pytest.mark.parametrize("image", ["binary", "array<tinyint>", "array<int>"])
def test_usable_columns_are_accepted(image: str) -> None:
    frames.check_columns(_frame(image=image, label="bigint", more="string"), LAYOUT, "data")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"label": "int"}, "data= has no usable column 'image'.* got only the columns label"),
        ({}, "got only the columns none"),
        ({"image": "string", "label": "int"}, "'image': expected type binary, array<tinyint>.* got type string"),
        ({"image": "array<float>", "label": "int"}, "got type array<float>"),
        ({"image": "binary", "label": "double"}, "'label': expected type tinyint.* got type double"),
        ({"image": "binary", "label": "string"}, "got type string.*cast them"),
    ],
)
def test_columns_that_hold_no_images_or_labels_are_refused(types: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        frames.check_columns(_frame(**types), LAYOUT, "data")

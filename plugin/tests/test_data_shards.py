"""Every image exactly once per epoch, at any number of executors and any batch size."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge.data.cache import write_prepared
from sparkgauge.data.layouts import Content
from sparkgauge.data.shards import Sampler, Shard, evaluation_range, global_order
from sparkgauge.errors import ConfigurationError, DataError

counts = st.integers(1, 300)
batches = st.integers(1, 350)
executor_counts = st.integers(1, 12)
seeds = st.integers(0, 2**64 - 1)


def _samplers(count: int, batch: int, executors: int, seed: int, shuffle: bool = True) -> list[Sampler]:
    return [Sampler(count, batch, executors, rank, seed, shuffle) for rank in range(executors)]


@given(counts, batches, executor_counts, seeds, st.integers(0, 3), st.booleans())
def test_each_epoch_covers_every_index_exactly_once(
    count: int, batch: int, executors: int, seed: int, epoch: int, shuffle: bool
) -> None:
    samplers = _samplers(count, batch, executors, seed, shuffle)
    steps = samplers[0].steps_per_epoch
    used = [s.batch(step) for step in range(epoch * steps, (epoch + 1) * steps) for s in samplers]
    np.testing.assert_array_equal(np.sort(np.concatenate(used)), np.arange(count))


@given(counts, batches, executor_counts, seeds, st.integers(0, 1000))
def test_global_batches_do_not_depend_on_executors(
    count: int, batch: int, executors: int, seed: int, step: int
) -> None:
    parts = [sampler.batch(step) for sampler in _samplers(count, batch, executors, seed)]
    alone = Sampler(count, batch, 1, 0, seed)
    np.testing.assert_array_equal(np.concatenate(parts), alone.batch(step))
    assert sum(map(len, parts)) == alone.global_batch_size(step)


@given(counts, batches, executor_counts, seeds, st.integers(0, 1000))
def test_parts_are_near_equal(count: int, batch: int, executors: int, seed: int, step: int) -> None:
    sizes = [len(sampler.batch(step)) for sampler in _samplers(count, batch, executors, seed)]
    assert max(sizes) - min(sizes) <= 1
    shares = [sampler.share(step) for sampler in _samplers(count, batch, executors, seed)]
    assert [share.stop - share.start for share in shares] == sizes


@given(st.integers(0, 300), executor_counts)
def test_evaluation_covers_each_test_image_exactly_once(test_count: int, executors: int) -> None:
    ranges = [evaluation_range(test_count, executors, rank) for rank in range(executors)]
    covered = [index for part in ranges for index in range(test_count)[part]]
    assert covered == list(range(test_count))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(global_order(50, epoch, seed)) for epoch in range(4) for seed in range(4)]
    assert len(set(orders)) == 16


def test_order_is_the_same_everywhere() -> None:
    # Golden: printed by `python -c "from sparkgauge.data import global_order; print(global_order(10, 3, 42))"`.
    assert global_order(10, 3, 42).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [1, 6, 8, 7, 2, 0, 3, 5, 4, 9]


def test_last_batch_is_the_rest() -> None:
    sampler = Sampler(10, 4, 1, 0, seed=1)
    assert sampler.steps_per_epoch == 3
    assert [sampler.global_batch_size(step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [sampler.epoch(step) for step in (0, 2, 3)] == [0, 0, 1]


def test_going_back_gives_the_same_batch() -> None:
    sampler = Sampler(10, 4, 2, 1, seed=1)
    first = sampler.batch(1).copy()
    sampler.batch(7)
    np.testing.assert_array_equal(sampler.batch(1), first)


def test_indices_cannot_be_changed_by_their_user() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Sampler(10, 4, 1, 0, seed=1).batch(0)[0] = 3


def test_without_shuffling_the_order_is_the_stored_one() -> None:
    assert Sampler(10, 4, 2, 1, seed=1, shuffle=False).batch(1).tolist() == [6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1, 0, 1), "Bad count"),
        ((10, 0, 1, 0, 1), "Bad global_batch"),
        ((10, 4, 0, 0, 1), "Bad executors"),
        ((10, 4, 2, 2, 1), "Bad rank: expected 0 to 1, got 2"),
        ((10, 4, 2, -1, 1), "Bad rank"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Sampler(*arguments)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(ConfigurationError, match="Bad seed"):
        Sampler(10, 4, 1, 0, seed).batch(0)


def test_bad_step() -> None:
    with pytest.raises(ConfigurationError, match="Bad step"):
        Sampler(10, 4, 1, 0, 1).batch(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 23 training and 7 test images whose first pixel tells its number."""
    folder = tmp_path_factory.mktemp("small") / "data"
    write_prepared(Content(*_numbered(23), *_numbered(7)), folder, kind="user", source="a test")
    return folder


def _numbered(count: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images, (np.arange(count) % 10).astype(np.uint8)


def _open(folder: Path, executors: int = 2, rank: int = 1, global_batch: int = 8, seed: int = 5) -> Shard:
    return Shard.open(folder, executors=executors, rank=rank, global_batch=global_batch, seed=seed)


def test_batch_gathers_images_with_their_labels(folder: Path) -> None:
    shard = _open(folder)
    images, labels = shard.batch(1)
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(images[:, 0, 0, 0], shard.sampler.batch(1))
    np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 10)
    assert type(images) is np.ndarray
    images[:] = 0  # a copy: the user may work on it in place


@pytest.mark.parametrize("executors", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_test_batches_cover_the_test_set_once(folder: Path, executors: int, size: int) -> None:
    seen = []
    for rank in range(executors):
        for images, labels in _open(folder, executors, rank).test_batches(size):
            assert 1 <= len(images) == len(labels) <= size
            seen.extend(images[:, 0, 0, 0].tolist())
    assert seen == list(range(7))


def test_empty_part_of_a_tiny_batch(folder: Path) -> None:
    images, labels = _open(folder, executors=4, rank=0, global_batch=2).batch(0)
    assert images.shape == (0, 32, 32, 3)
    assert labels.shape == (0,)


def test_bad_test_batch_size(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="Bad size"):
        next(_open(folder).test_batches(0))


def test_pickled_shard_is_small_and_maps_the_same_files(folder: Path) -> None:
    shard = _open(folder)
    text = pickle.dumps(shard)
    assert len(text) < 1000
    again = pickle.loads(text)
    np.testing.assert_array_equal(again.batch(3)[0], shard.batch(3)[0])
    assert again.test_range == shard.test_range
    assert again.steps_per_epoch == 3


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json"):
        _open(tmp_path)

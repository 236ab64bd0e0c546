"""Which images an executor trains and tests on, and in which order.

The order of an epoch is one permutation of the whole training set, made from the seed and the epoch alone. It is cut
into global batches first and each global batch into executors second, so any number of executors trains on the same
global batches, and every image is used exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkgauge.data.dataset import Dataset
from sparkgauge.data.streams import Purpose, random_words
from sparkgauge.errors import ConfigurationError


def global_order(count: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation of 0 .. ``count`` - 1, the same on every machine for the same epoch and seed."""
    words = random_words(Purpose.ORDER, seed, epoch, count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def evaluation_range(test_count: int, executors: int, rank: int) -> slice:
    """Return this rank's part of the test set; over all ranks each test image is covered exactly once."""
    _check_rank(executors, rank)
    return _share(test_count, executors, rank)


class Sampler:
    """The training images of one executor, step by step through any number of epochs."""

    def __init__(
        self, count: int, global_batch: int, executors: int, rank: int, seed: int, shuffle: bool = True
    ) -> None:
        _check_positive("count", count)
        _check_positive("global_batch", global_batch)
        _check_rank(executors, rank)
        self.count = count
        self.global_batch = global_batch
        self.executors = executors
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in an epoch, the last one possibly smaller."""
        return -(-self.count // self.global_batch)

    def epoch(self, step: int) -> int:
        """Return the epoch (0-based) of the global step."""
        return step // self.steps_per_epoch

    def global_batch_size(self, step: int) -> int:
        """Return how many images all executors together train on in the global step."""
        start = (step % self.steps_per_epoch) * self.global_batch
        return min(self.global_batch, self.count - start)

    def share(self, step: int) -> slice:
        """Return this rank's part of the global batch; parts differ by at most one image and may be empty."""
        return _share(self.global_batch_size(step), self.executors, self.rank)

    def shares(self, step: int) -> tuple[int, ...]:
        """Return how many images each executor has in the global step, by rank."""
        size = self.global_batch_size(step)
        parts = (_share(size, self.executors, rank) for rank in range(self.executors))
        return tuple(part.stop - part.start for part in parts)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the indices (read-only) of this rank's training images in the global step (0-based)."""
        if step < 0:
            raise ConfigurationError("Bad step", expected="0 or more", actual=str(step))
        start = (step % self.steps_per_epoch) * self.global_batch
        part = self.share(step)
        return self._order(self.epoch(step))[start + part.start : start + part.stop]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            order = global_order(self.count, epoch, self.seed) if self.shuffle else np.arange(self.count)
            order.flags.writeable = False
            # two of them: who prepares batches ahead is in the next epoch while the steps are still in this one
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return self._orders[epoch]


@dataclass(frozen=True)
class Shard:
    """One executor's view of the data set: its training batches and its part of the test set."""

    images: NDArray[np.uint8]
    """Training images (N, 32, 32, 3), channels last; memory-mapped, read-only."""
    labels: NDArray[np.uint8]
    """Training labels (N,), 0-9."""
    test_images: NDArray[np.uint8]
    """The whole test set (M, 32, 32, 3); ``test_batches`` gives this executor's part."""
    test_labels: NDArray[np.uint8]
    """Labels of the whole test set (M,)."""
    mean_image: NDArray[np.float32]
    """Mean of the training images (32, 32, 3)."""
    sampler: Sampler
    folder: Path
    """The prepared data set, readable on the executor."""

    @classmethod
    def open(
        cls,
        dataset_folder: Path | str,
        *,
        executors: int,
        rank: int,
        global_batch: int,
        seed: int,
        shuffle: bool = True,
    ) -> Shard:
        """Return the shard of executor ``rank``; DataError where the folder does not hold a whole data set."""
        dataset = Dataset.load(dataset_folder)
        arrays = dataset.open()
        sampler = Sampler(dataset.train_count, global_batch, executors, rank, seed, shuffle)
        # Plain views: indexing numpy's memmap class costs several microseconds more for every batch.
        return cls(
            np.asarray(arrays.train_images),
            np.asarray(arrays.train_labels),
            np.asarray(arrays.test_images),
            np.asarray(arrays.test_labels),
            np.asarray(arrays.mean_image),
            sampler,
            dataset.folder,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global steps in an epoch."""
        return self.sampler.steps_per_epoch

    @property
    def test_range(self) -> slice:
        """Return this executor's part of the test set."""
        return evaluation_range(len(self.test_labels), self.sampler.executors, self.sampler.rank)

    def batch(self, step: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return copies of this executor's images (b, 32, 32, 3) and labels (b,) of the global step."""
        indices = self.sampler.batch(step)
        return np.take(self.images, indices, axis=0), np.take(self.labels, indices)

    def test_batches(self, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Yield this executor's test images and labels as read-only views of at most ``size`` images, in order."""
        _check_positive("size", size)
        part = self.test_range
        for start in range(part.start, part.stop, size):
            view = slice(start, min(start + size, part.stop))
            yield self.test_images[view], self.test_labels[view]

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled shard is a few hundred bytes: the other side maps the same files.
        sampler = self.sampler
        settings = (sampler.executors, sampler.rank, sampler.global_batch, sampler.seed, sampler.shuffle)
        return _reopen, (str(self.folder), *settings)


def _reopen(folder: str, executors: int, rank: int, global_batch: int, seed: int, shuffle: bool) -> Shard:
    return Shard.open(folder, executors=executors, rank=rank, global_batch=global_batch, seed=seed, shuffle=shuffle)


def _share(count: int, parts: int, number: int) -> slice:
    return slice(count * number // parts, count * (number + 1) // parts)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"Bad {name}", expected="1 or more", actual=str(value))


def _check_rank(executors: int, rank: int) -> None:
    _check_positive("executors", executors)
    if not 0 <= rank < executors:
        raise ConfigurationError("Bad rank", expected=f"0 to {executors - 1}", actual=str(rank))

"""What steps need of training images that stay on a device: row numbers and distortions, drawn for many at once.

No framework is imported here: each adapter sends the numbers to its device in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparkgauge.data.augment import Augmentation, augmentation_parameters, first_flips, shift_flip_parameters
from sparkgauge.data.shards import Sampler, Shard
from sparkgauge.models.cifar10 import Recipe

BLOCK_STEPS = 50
"""Steps whose row numbers and distortions travel to a GPU together."""

Made = TypeVar("Made")


def numbered(shard: Shard) -> Shard:
    """Return ``shard`` with row numbers in place of its training images: a batch of it says which images it has."""
    rows: Any = np.arange(len(shard.labels))
    return dataclasses.replace(shard, images=rows)


class Distortions:
    """How this executor's images are distorted in each step, the same at any number of executors."""

    def __init__(self, recipe: Recipe, seed: int, sampler: Sampler) -> None:
        self._recipe, self._seed, self._sampler = recipe, seed, sampler
        if recipe.alternating_flip:
            self._first_flips = first_flips(seed, sampler.count)

    def of(self, index: int) -> Augmentation | None:
        """Return the distortions of step ``index`` (0-based); None for none at all."""
        recipe, sampler = self._recipe, self._sampler
        share, global_batch = sampler.share(index), sampler.global_batch_size(index)
        if recipe.augment:
            return augmentation_parameters(self._seed, index, global_batch, recipe.input_size).part(share)
        if not recipe.shift:
            return None
        own = shift_flip_parameters(self._seed, index, global_batch, recipe.shift).part(share)
        if not recipe.alternating_flip:
            return own
        odd = bool(sampler.epoch(index) % 2)
        return dataclasses.replace(own, flips=self._first_flips[sampler.batch(index)] ^ odd)


@dataclass(frozen=True)
class Block:
    """The images of ``BLOCK_STEPS`` steps one after the other, n in all."""

    sizes: list[int]
    """Images of each step."""
    rows: NDArray[np.int64]
    """(n,): where they lie in the training set."""
    distortions: Augmentation | None
    """Of all n; None for none at all."""


def drawn(sampler: Sampler, distortions: Distortions, number: int) -> Block:
    """Return block ``number`` (0-based): what the steps from ``number * BLOCK_STEPS`` on do to which images."""
    steps = range(number * BLOCK_STEPS, (number + 1) * BLOCK_STEPS)
    rows = [sampler.batch(index) for index in steps]
    own = [each for each in map(distortions.of, steps) if each is not None]
    return Block([len(part) for part in rows], np.concatenate(rows), _joined(own) if own else None)


def _joined(parts: list[Augmentation]) -> Augmentation:
    names = [field.name for field in dataclasses.fields(Augmentation)]
    return Augmentation(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class Ahead(Generic[Made]):
    """Keeps what was made of the current block, and makes the next one before it is asked for."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        """``make`` is given the number of a block."""
        self._make = make
        self._made: dict[int, Made] = {}

    def of(self, index: int) -> tuple[Made, int]:
        """Return what was made of the block of step ``index``, and the step's place in it.

        The last step of a block makes the next one, while the device is still busy with the steps before.
        """
        number, place = divmod(index, BLOCK_STEPS)
        if number not in self._made:
            self._made = {number: self._make(number)}
        if place == BLOCK_STEPS - 1:
            self._made[number + 1] = self._make(number + 1)
        self._made.pop(number - 1, None)
        return self._made[number], place

"""Random distortions of training images, drawn for the whole global batch so that they do not depend on executors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkgauge.data.dataset import IMAGE_SHAPE
from sparkgauge.data.streams import Purpose, random_below, random_fractions, random_words
from sparkgauge.errors import ConfigurationError


@dataclass(frozen=True)
class Augmentation:
    """What happens to each image of a batch."""

    offsets: NDArray[np.int64]
    """(b, 2): first row and column of the crop."""
    flips: NDArray[np.bool_]
    """(b,): whether the image is mirrored left to right."""
    brightness: NDArray[np.float32]
    """(b,): added to every pixel (0-255)."""
    contrast: NDArray[np.float32]
    """(b,): factor on the difference from the image's mean."""

    def part(self, share: slice) -> Augmentation:
        """Return one executor's part; ``share`` is ``Sampler.share(step)``."""
        return Augmentation(self.offsets[share], self.flips[share], self.brightness[share], self.contrast[share])


def augmentation_parameters(
    seed: int,
    step: int,
    global_batch: int,
    size: int,
    brightness_delta: float = 63,
    contrast: tuple[float, float] = (0.2, 1.8),
) -> Augmentation:
    """Return the distortions of all ``global_batch`` images of the global step, for crops of ``size`` x ``size``.

    Brightness is uniform between -brightness_delta and brightness_delta, contrast between its two limits; the defaults
    are those of TensorFlow's CIFAR-10 tutorial. Drawing does not depend on how many executors share the batch.
    """
    side = IMAGE_SHAPE[0]
    _check_crop(size, side)
    corners = random_words(Purpose.CROP, seed, step, 2 * global_batch).reshape(global_batch, 2)
    coins = random_words(Purpose.FLIP, seed, step, global_batch)
    shifts = random_fractions(random_words(Purpose.BRIGHTNESS, seed, step, global_batch))
    factors = random_fractions(random_words(Purpose.CONTRAST, seed, step, global_batch))
    low, high = contrast
    return Augmentation(
        random_below(corners, side - size + 1),
        (coins >> np.uint64(63)).astype(np.bool_),
        ((2 * shifts - 1) * brightness_delta).astype(np.float32),
        (low + (high - low) * factors).astype(np.float32),
    )


def shift_flip_parameters(seed: int, step: int, global_batch: int, shift: int) -> Augmentation:
    """Return crops and flips of all images of the global step for images padded by ``shift`` on every side."""
    corners = random_words(Purpose.CROP, seed, step, 2 * global_batch).reshape(global_batch, 2)
    coins = random_words(Purpose.FLIP, seed, step, global_batch)
    return Augmentation(
        random_below(corners, 2 * shift + 1),
        (coins >> np.uint64(63)).astype(np.bool_),
        np.zeros(global_batch, np.float32),
        np.ones(global_batch, np.float32),
    )


def first_flips(seed: int, count: int) -> NDArray[np.bool_]:
    """Return whether each of ``count`` images is mirrored in the first epoch, where epochs take turns at it."""
    return (random_words(Purpose.FLIP, seed, 0, count) >> np.uint64(63)).astype(np.bool_)


def reflected(images: NDArray[np.uint8], shift: int) -> NDArray[np.uint8]:
    """Return ``images`` (b, rows, columns, channels) with a border of ``shift`` pixels that mirrors them."""
    rows, columns = (mirrored(side, shift) for side in images.shape[1:3])
    framed: NDArray[np.uint8] = images[:, rows[:, None], columns[None, :]]
    return framed


def mirrored(side: int, shift: int) -> NDArray[np.int64]:
    """Return which row (or column) of ``side`` each of the ``side + 2 * shift`` of a mirrored border repeats."""
    positions = np.abs(np.arange(-shift, side + shift))
    return np.where(positions < side, positions, 2 * (side - 1) - positions)


def padded(images: NDArray[np.uint8], shift: int, colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return ``images`` (b, rows, columns, channels) with a border of ``shift`` pixels of ``colour`` (channels,)."""
    count, rows, columns, channels = images.shape
    framed = np.empty((count, rows + 2 * shift, columns + 2 * shift, channels), np.uint8)
    framed[:] = colour
    framed[:, shift : shift + rows, shift : shift + columns] = images
    return framed


def crop_flip(
    images: NDArray[np.uint8], *, size: int, offsets: NDArray[np.int64], flips: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return crops (b, size, size, channels) of ``images`` (b, rows, columns, channels), mirrored where ``flips`` says.

    ``offsets`` (b, 2) are the first row and column of each crop; ConfigurationError where a crop leaves the image.
    0.16 ms for 128 crops of 24 x 24 (one core of a 2-core server, numpy 2.4, best of 20).
    """
    count, rows, columns, channels = images.shape
    _check_crop(size, min(rows, columns))
    if count and (offsets.min() < 0 or offsets[:, 0].max() > rows - size or offsets[:, 1].max() > columns - size):
        raise ConfigurationError("Bad crop offsets", expected=f"0 to {rows - size}, {columns - size}")
    steps = np.arange(size)
    crop_rows = offsets[:, :1] + steps  # (b, size)
    crop_columns = offsets[:, 1:] + np.where(flips[:, None], steps[::-1], steps)  # (b, size)
    first_pixels = (np.arange(count)[:, None] * rows + crop_rows) * columns  # (b, size)
    pixels = first_pixels[:, :, None] + crop_columns[:, None, :]  # (b, size, size)
    crops: NDArray[np.uint8] = np.take(images.reshape(-1, channels), pixels, axis=0)
    return crops


def _check_crop(size: int, side: int) -> None:
    if not 1 <= size <= side:
        raise ConfigurationError("Bad crop size", expected=f"1 to {side}", actual=str(size))

"""The images on a GPU: training images are gathered, cropped, flipped and scaled there, test images lie there too."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from sparkgauge.adapters.blocks import BLOCK_STEPS, Ahead, Block, Distortions, drawn, numbered
from sparkgauge.context import Context, Step
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import Recipe

Tensor = Any

TEST_BATCH = 2000
"""Test images per call: large enough to fill a GPU."""

CORNER, FLIP, LABEL, BRIGHTNESS, CONTRAST, ROWS = range(6)
"""Rows of what a step is told about its images, and their number. All are float64, which holds every row number
exactly: TensorFlow splits no integers on a GPU."""
WEIGHT, BATCH, RATE, INDEX, SCALARS = range(5)
"""Rows of what a step is told about itself, and their number."""


class ResidentInputs:
    """The training set stays on the device as uint8; a step brings where its crops begin, and gathers there.

    What it brings is drawn and sent for ``BLOCK_STEPS`` steps at once: a transfer waits for the device. Integers are
    int64, since TensorFlow computes int32 on the host even on a GPU.
    """

    signature = (tf.TensorSpec((ROWS, None), tf.float64), tf.TensorSpec((SCALARS, 1), tf.float32))
    """Of :meth:`arguments`."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard) -> None:
        """To be called in the scope of the device."""
        self._recipe, self._shard = recipe, shard
        self.feed = numbered(shard)
        """What ``context.steps`` takes this executor's batches from."""
        _, self._side, _, channels = shard.images.shape  # (N, 32, 32, 3)
        # a variable: from a tensor TensorFlow gathers no uint8 on a GPU
        self._pixels = tf.Variable(np.asarray(shard.images).reshape(-1, channels), trainable=False)
        self._mean = tf.constant(shard.mean_image)
        self._within = tf.constant(_within(recipe.input_size, self._side))  # (2, size, size)
        self._distortions = Distortions(recipe, context.seed, shard.sampler)
        self._blocks = Ahead(self._drawn)
        self._sent: tuple[int, list[Any], list[Any]] = (-1, [], [])

    def arguments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the images (ROWS, b) and scalars (SCALARS, 1) of ``step``, on the device.

        An executor without images gets the first one with weight 0, see :meth:`_drawn`.
        """
        (images, sizes, scalars), place = self._blocks.of(step.index)
        number = step.index // BLOCK_STEPS
        if self._sent[0] != number:  # the losses have just been read, so that the device has nothing left to do
            self._sent = number, tf.split(tf.constant(images), sizes, 1), tf.split(tf.constant(scalars), BLOCK_STEPS, 1)
        return self._sent[1][place], self._sent[2][place]

    def batch(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input (b, size, size, 3) and the labels (b,)."""
        numbers = tf.cast(images[:BRIGHTNESS], tf.int64)
        places = tf.gather(self._within, numbers[FLIP]) + numbers[CORNER][:, None, None]  # (b, size, size)
        pixels = tf.cast(tf.gather(self._pixels, places), tf.float32)  # (b, size, size, 3)
        if not self._recipe.augment:
            return pixels - self._mean, numbers[LABEL]
        brightness, contrast = (tf.cast(images[row], tf.float32)[:, None, None, None] for row in (BRIGHTNESS, CONTRAST))
        pixels += brightness
        channel_mean = tf.reduce_mean(pixels, (1, 2), keepdims=True)
        return standardised((pixels - channel_mean) * contrast + channel_mean), numbers[LABEL]

    def testing(self) -> list[tuple[Tensor, Tensor]]:
        """Return this executor's test images, cropped to their centre, and labels in batches, moved to the device."""
        edge = (self._side - self._recipe.input_size) // 2
        centre = slice(edge, self._side - edge)
        batches = self._shard.test_batches(TEST_BATCH)
        return [(tf.constant(images[:, centre, centre]), tf.constant(labels)) for images, labels in batches]

    def tested(self, images: Tensor) -> Tensor:
        """Return the network's input of test images."""
        pixels = tf.cast(images, tf.float32)
        return standardised(pixels) if self._recipe.augment else pixels - self._mean

    def _drawn(self, number: int) -> tuple[NDArray[np.float64], list[int], NDArray[np.float32]]:
        """Return images (ROWS, n), the sizes of the steps' batches, and scalars (SCALARS, BLOCK_STEPS) of a block.

        A step without images is given one of weight 0: that happens in a last batch smaller than the number of
        executors, whose peers wait in the all-reduce.
        """
        block = drawn(self._shard.sampler, self._distortions, number)
        images = self._described(block)
        starts = np.cumsum([0, *block.sizes[:-1]])
        empty = [start for start, size in zip(starts, block.sizes, strict=True) if not size]
        images = np.insert(images, empty, 0, axis=1)
        return images, [max(1, size) for size in block.sizes], self._scalars(number, block.sizes)

    def _described(self, block: Block) -> NDArray[np.float64]:
        images = np.zeros((ROWS, len(block.rows)))
        images[CORNER] = block.rows * self._side**2
        images[LABEL] = self._shard.labels[block.rows]
        if (own := block.distortions) is not None:
            images[CORNER] += own.offsets[:, 0] * self._side + own.offsets[:, 1]
            images[FLIP], images[BRIGHTNESS], images[CONTRAST] = own.flips, own.brightness, own.contrast
        return images

    def _scalars(self, number: int, sizes: list[int]) -> NDArray[np.float32]:
        steps = range(number * BLOCK_STEPS, (number + 1) * BLOCK_STEPS)
        scalars = np.empty((SCALARS, BLOCK_STEPS), np.float32)
        scalars[WEIGHT] = np.minimum(sizes, 1)
        scalars[BATCH] = [self._shard.sampler.global_batch_size(index) for index in steps]
        scalars[RATE] = [self._recipe.learning_rate(index) for index in steps]
        scalars[INDEX] = steps
        return scalars


def standardised(images: Tensor) -> Tensor:
    """Return images (b, s, s, 3), each with mean 0 and deviation 1, as tf.image.per_image_standardization does.

    In a third of its operations: on a GPU each of them costs the host more than the device.
    """
    centred = images - tf.reduce_mean(images, (1, 2, 3), keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), (1, 2, 3), keepdims=True)
    return centred * tf.math.rsqrt(tf.maximum(variance, 1 / int(np.prod(images.shape[1:]))))


def _within(size: int, side: int) -> NDArray[np.int64]:
    """Return the places of a crop's pixels from its first one on, as they are and mirrored (2, size, size)."""
    places = np.arange(size)[:, None] * side + np.arange(size)
    return np.stack([places, places[:, ::-1]]).astype(np.int64)

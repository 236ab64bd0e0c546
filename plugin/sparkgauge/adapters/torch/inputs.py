"""Turns uint8 images into a network's input as its recipe wants: from host memory, or from the GPU's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparkgauge.adapters.blocks import Ahead, Distortions, drawn, numbered
from sparkgauge.context import Context, Step
from sparkgauge.data.augment import Augmentation, crop_flip, mirrored, padded, reflected
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import Recipe

Tensor = Any


def inputs_of(recipe: Recipe, context: Context, shard: Shard, device: Any) -> Inputs:
    """Return what prepares batches on ``device``."""
    return (Inputs if device.type == "cpu" else ResidentInputs)(recipe, context, shard, device)


class Inputs:
    """Batches are gathered and cropped by numpy, and become floats on the CPU."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard, device: Any) -> None:
        self.recipe, self.shard, self.device = recipe, shard, device
        self.feed = shard
        """What ``context.steps`` takes this executor's batches from."""
        self._distortions = Distortions(recipe, context.seed, shard.sampler)
        self._mean = torch.from_numpy(np.array(shard.mean_image)).permute(2, 0, 1)[None].to(device)
        if recipe.channel_scaled:
            # like the mean image, of the whole training set, so the same on every executor
            channel_mean = shard.mean_image.mean((0, 1))
            self._colour = np.rint(channel_mean).astype(np.uint8)
            self._mean = torch.from_numpy(channel_mean)[None, :, None, None].to(device)
            self._scale = 1 / torch.from_numpy(_deviations(shard.images))[None, :, None, None].to(device)

    def arguments(self, step: Step) -> tuple[Tensor, ...]:
        """Return what :meth:`batch` makes this executor's part of the global batch of, on the device."""
        images, own = step.images, self._distortions.of(step.index)
        if own is not None:
            size = self.recipe.input_size
            images = crop_flip(self.framed(images), size=size, offsets=own.offsets, flips=own.flips)
        labels = torch.from_numpy(step.labels.astype(np.int64))
        return torch.from_numpy(images), labels, self._factors(own)

    def batch(self, images: Tensor, labels: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input (b, 3, size, size), channels last in memory, and the labels (b,)."""
        pixels = images.permute(0, 3, 1, 2).float()
        if not self.recipe.augment:
            return self._scaled(pixels), labels
        brightness, contrast = factors[:, :, None, None, None]
        pixels = pixels + brightness
        channel_mean = pixels.mean((2, 3), keepdim=True)
        return standardised((pixels - channel_mean) * contrast + channel_mean), labels

    def testing(self, images: NDArray[np.uint8]) -> Tensor:
        """Return test images, cropped to their centre where the network is smaller."""
        edge = (images.shape[1] - self.recipe.input_size) // 2
        centre = images[:, edge : images.shape[1] - edge, edge : images.shape[2] - edge]
        return standardised(self._pixels(centre)) if self.recipe.augment else self.normalised(centre)

    def normalised(self, images: NDArray[np.uint8]) -> Tensor:
        """Return ``images`` minus the mean, scaled per channel where the recipe says so."""
        return self._scaled(self._pixels(images))

    def framed(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return ``images`` with the border that the recipe's shifts need."""
        if not self.recipe.shift:
            return images
        if self.recipe.reflected:
            return reflected(images, self.recipe.shift)
        return padded(images, self.recipe.shift, self._colour)

    def _factors(self, own: Augmentation | None) -> Tensor:
        """Return brightness and contrast (2, b), or nothing (2, 0)."""
        if own is None or not self.recipe.augment:
            return torch.empty(2, 0)
        return torch.from_numpy(np.stack([own.brightness, own.contrast]))

    def _scaled(self, pixels: Tensor) -> Tensor:
        pixels = pixels.sub_(self._mean)
        return pixels.mul_(self._scale) if self.recipe.channel_scaled else pixels

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        # a copy: torch refuses read-only arrays without a warning
        owned = torch.from_numpy(np.array(images, order="C"))
        return owned.to(self.device).permute(0, 3, 1, 2).float()  # channels last in memory


class ResidentInputs(Inputs):
    """The training set stays on the GPU as uint8; a step brings row numbers, crops and flips, and gathers there.

    They are drawn and sent for ``BLOCK_STEPS`` steps at once: for every step on its own the host would be slower than
    a GPU is with a small net.
    """

    def __init__(self, recipe: Recipe, context: Context, shard: Shard, device: Any) -> None:
        super().__init__(recipe, context, shard, device)
        self._images = self._framed_there(torch.from_numpy(np.array(shard.images)).to(device))  # (N, rows, columns, 3)
        self._labels = torch.from_numpy(shard.labels.astype(np.int64)).to(device)
        self.feed = numbered(shard)
        self._across = torch.arange(recipe.input_size, device=device)
        self._blocks = Ahead(self._sent)

    def arguments(self, step: Step) -> tuple[Tensor, ...]:
        """Return row numbers, crops and flips (4, b), and brightness and contrast, on their way to the GPU."""
        block, place = self._blocks.of(step.index)
        return block[place]

    def batch(self, numbers: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the network's input, gathered on the GPU, and the labels."""
        rows, top, left, flips = numbers
        down = top[:, None] + self._across
        across = left[:, None] + torch.where(flips[:, None] > 0, self._across.flip(0), self._across)
        images = self._images[rows[:, None, None], down[:, :, None], across[:, None, :]]  # (b, size, size, 3)
        return super().batch(images, self._labels[rows], factors)

    def _sent(self, number: int) -> list[tuple[Tensor, ...]]:
        """Return the arguments of each step of block ``number``, in one transfer."""
        block = drawn(self.shard.sampler, self._distortions, number)
        sizes, own = block.sizes, block.distortions
        numbers = np.zeros((4, len(block.rows)), np.int64)
        numbers[0] = block.rows
        if own is not None:
            numbers[1:3] = own.offsets.T
            numbers[3] = own.flips
        factors = self._factors(own)
        parts = self._moved(torch.from_numpy(numbers)).split(sizes, 1)
        jitter = self._moved(factors).split(sizes, 1) if factors.numel() else [factors.to(self.device)] * len(sizes)
        return list(zip(parts, jitter, strict=True))

    def _moved(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda" and values.numel():
            values = values.pin_memory()  # from pageable memory the host would wait
        return values.to(self.device, non_blocking=True)

    def _framed_there(self, images: Tensor) -> Tensor:
        """Return what ``framed`` does, made on the device: a second less than on the host."""
        shift = self.recipe.shift
        if not shift:
            return images
        if self.recipe.reflected:
            rows, columns = (torch.from_numpy(mirrored(side, shift)).to(self.device) for side in images.shape[1:3])
            return images[:, rows][:, :, columns]
        count, rows, columns, channels = images.shape
        shape = count, rows + 2 * shift, columns + 2 * shift, channels
        framed = torch.from_numpy(self._colour).to(self.device).expand(shape).contiguous()
        framed[:, shift : shift + rows, shift : shift + columns] = images
        return framed


def standardised(images: Tensor) -> Tensor:
    """Return each image with mean 0 and deviation 1, as tf.image.per_image_standardization does."""
    count = images[0].numel() if len(images) else 1
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), keepdim=True, unbiased=False).clamp_min(count**-0.5)
    return (images - mean) / deviation


def _deviations(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the deviation of each channel over every tenth image: 150 MB need not be read to know three numbers."""
    sample = images[:: max(1, len(images) // 5000)].reshape(-1, images.shape[3])
    return sample.std(0, dtype=np.float64).astype(np.float32)

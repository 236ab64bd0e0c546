"""A deterministic look-alike of CIFAR-10 for machines that have neither the data nor a network.

Ten classes of smooth coloured textures, each moved around the image's edges by a random distance and shown at a random
strength, with a distracting texture, a random tint and noise. Single pixels say little (a linear classifier reaches
0.29 on the test set); cifar10_quick at its official settings reaches 0.93 after 200 steps of 100 images (Keras 3.15,
one run). Only integer arithmetic on Philox's raw words is used, so every machine makes the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkgauge.data.dataset import CLASS_COUNT, IMAGE_SHAPE
from sparkgauge.data.layouts import Content

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Raised whenever the bytes change."""
TRAIN_COUNT = 10_000
"""A fifth of CIFAR-10: made in 0.3 s on one server core, and enough for a small network to learn the classes from."""
TEST_COUNT = 2_000
SEED = 20_171

_GRID = 4
"""Random values per side of a texture; they are blended over the 32 pixels between them, around the edges too."""
_DISTRACTORS = 64
_CHUNK = 1_000
"""Images made at a time, which bounds memory to some 30 MB."""


def synthetic_content(train_count: int = TRAIN_COUNT, test_count: int = TEST_COUNT) -> Content:
    """Return the look-alike: images (N, 32, 32, 3) uint8 channels last and labels (N,), classes equally frequent."""
    train_images, train_labels = _examples(train_count, stream=0)
    test_images, test_labels = _examples(test_count, stream=1)
    return Content(train_images, train_labels, test_images, test_labels)


def _examples(count: int, stream: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    import numpy as np

    textures = _textures(CLASS_COUNT + _DISTRACTORS)
    images = np.empty((count, *IMAGE_SHAPE), np.uint8)
    labels = _labels(count, stream)
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        part = slice(start, min(start + _CHUNK, count))
        images[part] = _render(textures, labels[part], index=1_000 * (stream + 1) + chunk)
    return images, labels


def _labels(count: int, stream: int) -> NDArray[np.uint8]:
    import numpy as np

    from sparkgauge.data.streams import Purpose, random_words

    order = np.argsort(random_words(Purpose.SYNTHETIC, SEED, 100 + stream, count), kind="stable")
    return (order % CLASS_COUNT).astype(np.uint8)


def _textures(count: int) -> NDArray[np.int16]:
    """Return ``count`` smooth textures (count, 32, 32, 3), values -128 to 127, that continue around their edges."""
    import numpy as np

    from sparkgauge.data.streams import Purpose, random_bytes

    grid = random_bytes(Purpose.SYNTHETIC, SEED, 0, count * _GRID * _GRID * 3).astype(np.int64) - 128
    grid = grid.reshape(count, _GRID, _GRID, 3)
    period = IMAGE_SHAPE[0] // _GRID
    for axis in (1, 2):
        # Linear blend of neighbours, scaled by the period.
        after = np.roll(grid, -1, axis)
        blends = [grid * (period - step) + after * step for step in range(period)]
        shape = list(grid.shape)
        shape[axis] *= period
        grid = np.stack(blends, axis=axis + 1).reshape(shape)
    return (grid // period**2).astype(np.int16)


def _render(textures: NDArray[np.int16], labels: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    """Return images (b, 32, 32, 3): class texture + distractor + tint + noise around mid-grey."""
    import numpy as np

    from sparkgauge.data.streams import Purpose, random_below, random_bytes, random_words

    count = len(labels)
    words = random_words(Purpose.SYNTHETIC, SEED, 2 * index, 9 * count).reshape(9, count)
    image_bytes = int(np.prod(IMAGE_SHAPE))
    noise = random_bytes(Purpose.SYNTHETIC, SEED, 2 * index + 1, count * image_bytes)
    tint = np.stack([random_below(words[6 + channel], 61) - 30 for channel in range(3)], axis=1).astype(np.int16)
    strength = (random_below(words[4], 40) + 40).astype(np.int16)  # of 64
    down, right, clutter_down, clutter_right = (random_below(words[number], IMAGE_SHAPE[0]) for number in range(4))
    signal = _moved(textures, labels.astype(np.int64), down, right)
    clutter = _moved(textures, CLASS_COUNT + random_below(words[5], _DISTRACTORS), clutter_down, clutter_right)
    grain = noise.reshape(count, *IMAGE_SHAPE).astype(np.int16) - 128
    pixels = 128 + (signal * strength[:, None, None, None] >> 6) + (clutter >> 1) + (grain >> 2)
    images: NDArray[np.uint8] = np.clip(pixels + tint[:, None, None, :], 0, 255).astype(np.uint8)
    return images


def _moved(
    textures: NDArray[np.int16], numbers: NDArray[np.int64], down: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.int16]:
    """Return the numbered textures (b, 32, 32, 3), each moved around its edges."""
    import numpy as np

    side = IMAGE_SHAPE[0]
    rows = (np.arange(side) + down[:, None]) % side
    columns = (np.arange(side) + right[:, None]) % side
    first_pixels = (numbers[:, None] * side + rows) * side
    pixels = first_pixels[:, :, None] + columns[:, None, :]
    moved: NDArray[np.int16] = np.take(textures.reshape(-1, 3), pixels, axis=0)
    return moved

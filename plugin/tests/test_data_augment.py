"""Random crops and flips: the right pixels, the same for every number of executors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge.data.augment import augmentation_parameters, crop_flip, first_flips, reflected
from sparkgauge.data.shards import Sampler
from sparkgauge.data.streams import random_below
from sparkgauge.errors import ConfigurationError


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _one_by_one(images: np.ndarray, size: int, offsets: np.ndarray, flips: np.ndarray) -> np.ndarray:
    crops = [
        image[row : row + size, column : column + size][:, :: -1 if flip else 1]
        for image, (row, column), flip in zip(images, offsets, flips, strict=True)
    ]
    return np.array(crops, np.uint8).reshape(-1, size, size, images.shape[-1])


@given(st.integers(0, 20), st.integers(1, 32), st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_crop_flip_equals_slicing_one_by_one(count: int, size: int, seed: int, step: int) -> None:
    images, drawn = _images(count), augmentation_parameters(seed, step, count, size)
    crops = crop_flip(images, size=size, offsets=drawn.offsets, flips=drawn.flips)
    np.testing.assert_array_equal(crops, _one_by_one(images, size, drawn.offsets, drawn.flips))
    assert crops.dtype == np.uint8


@pytest.mark.parametrize("executors", [1, 2, 3, 7])
def test_parts_make_up_the_whole_batch(executors: int) -> None:
    whole = augmentation_parameters(3, 17, 100, 24)
    parts = [whole.part(Sampler(1000, 100, executors, rank, seed=3).share(17)) for rank in range(executors)]
    for name in ("offsets", "flips", "brightness", "contrast"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_ranges_are_used_to_their_ends() -> None:
    drawn = augmentation_parameters(1, 0, 20_000, 24)
    assert set(drawn.offsets.ravel()) == set(range(9))
    assert 0.48 < drawn.flips.mean() < 0.52
    assert -63 <= drawn.brightness.min() < -62.9
    assert 62.9 < drawn.brightness.max() <= 63
    assert 0.2 - 1e-6 <= drawn.contrast.min() < 0.201
    assert 1.799 < drawn.contrast.max() <= 1.8 + 1e-6


def test_steps_and_seeds_differ() -> None:
    drawn = [augmentation_parameters(seed, step, 50, 24).offsets.tobytes() for seed in (0, 1) for step in (0, 1)]
    assert len(set(drawn)) == 4


def test_full_size_leaves_no_choice() -> None:
    assert not augmentation_parameters(1, 0, 10, 32).offsets.any()


@pytest.mark.parametrize("size", [0, 33])
def test_bad_size(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"expected 1 to 32, got {size}"):
        augmentation_parameters(1, 0, 10, size)


@pytest.mark.parametrize(
    ("row", "column", "fits"), [(0, 0, True), (8, 8, True), (9, 0, False), (0, 9, False), (-1, 0, False)]
)
def test_crop_must_stay_inside(row: int, column: int, fits: bool) -> None:
    offsets, flips = np.array([[row, column]]), np.array([False])
    if fits:
        assert crop_flip(_images(1), size=24, offsets=offsets, flips=flips).shape == (1, 24, 24, 3)
        return
    with pytest.raises(ConfigurationError, match="Bad crop offsets"):
        crop_flip(_images(1), size=24, offsets=offsets, flips=flips)


def test_random_below_covers_its_limits() -> None:
    words = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert random_below(words, 9).tolist() == [0, 8]


def test_a_reflected_border_continues_as_numpys_does() -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    expected = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(reflected(images, 2), expected)


def test_first_flips_are_half_of_the_images_and_the_seeds_own() -> None:
    coins = first_flips(1, 10_000)
    assert 0.47 < coins.mean() < 0.53
    assert (coins == first_flips(1, 10_000)).all() and (coins != first_flips(2, 10_000)).any()

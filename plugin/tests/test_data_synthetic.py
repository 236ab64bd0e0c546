"""The synthetic look-alike: the same bytes everywhere, learnable, not trivial."""

from __future__ import annotations

import numpy as np
import pytest

from sparkgauge.data.cache import content_digest
from sparkgauge.data.layouts import Content
from sparkgauge.data.synthetic import CLASS_COUNT, _textures, synthetic_content

GOLDEN_DIGEST = "df649cde0b3f1d3972c09ac4d612caa5259bb6813506d4564baacd7f1e77a951"
"""Regenerate with ``content_digest(synthetic_content())``, raise synthetic.VERSION, and say so in the changelog."""


@pytest.fixture(scope="module")
def content() -> Content:
    return synthetic_content()


def test_bytes_are_the_same_on_every_machine(content: Content) -> None:
    assert content_digest(content) == GOLDEN_DIGEST


def test_sizes_and_class_frequencies(content: Content) -> None:
    assert content.train_images.shape == (10_000, 32, 32, 3)
    assert content.test_images.shape == (2_000, 32, 32, 3)
    assert np.bincount(content.train_labels).tolist() == [1_000] * 10
    assert np.bincount(content.test_labels).tolist() == [200] * 10


def test_training_and_test_images_differ(content: Content) -> None:
    train = {image.tobytes() for image in content.train_images}
    assert len(train) == 10_000
    assert not train & {image.tobytes() for image in content.test_images}


def test_part_is_a_prefix_whatever_the_chunk(content: Content) -> None:
    assert synthetic_content(30, 10).train_images.shape == (30, 32, 32, 3)


def test_shape_of_the_texture_tells_the_class(content: Content) -> None:
    # Matched filter: what a convolution followed by global max pooling can do at best.
    templates = np.fft.rfft2(_textures(CLASS_COUNT).astype(np.float32), axes=(1, 2))
    images = np.fft.rfft2(content.test_images[:500].astype(np.float32) - 128, axes=(1, 2))
    energy = np.sqrt((np.abs(templates) ** 2).sum(axis=(1, 2, 3)))
    matches = [np.fft.irfft2((images * t.conj()).sum(axis=3), axes=(1, 2)).max(axis=(1, 2)) for t in templates]
    guesses = np.argmax(np.array(matches) / energy[:, None], axis=0)
    assert (guesses == content.test_labels[:500]).mean() > 0.9


def test_single_pixels_say_little(content: Content) -> None:
    # Nearest class mean, a linear classifier.
    train = content.train_images.reshape(len(content.train_images), -1).astype(np.float32)
    test = content.test_images.reshape(len(content.test_images), -1).astype(np.float32)
    means = np.array([train[content.train_labels == number].mean(axis=0) for number in range(CLASS_COUNT)])
    distances = (means**2).sum(axis=1) - 2 * test @ means.T
    assert (np.argmin(distances, axis=1) == content.test_labels).mean() < 0.5

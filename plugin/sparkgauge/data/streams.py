"""Random numbers that are the same on every machine, in every process and with every version of numpy.

numpy keeps the raw words of its bit generators stable over versions, but not what its samplers make of them, so
only raw words of Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) are used.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from sparkgauge.errors import ConfigurationError

SEED_LIMIT = 2**64
"""Seeds are below this: one word of Philox's key."""


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never overlap."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    BRIGHTNESS = 4
    CONTRAST = 5
    SYNTHETIC = 6


def random_words(purpose: Purpose, seed: int, index: int, count: int) -> NDArray[np.uint64]:
    """Return ``count`` random 64-bit words of the stream (purpose, seed, index)."""
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigurationError("Bad seed", expected=f"a whole number from 0 to {SEED_LIMIT - 1}", actual=str(seed))
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, int(purpose)], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words


def random_bytes(purpose: Purpose, seed: int, index: int, count: int) -> NDArray[np.uint8]:
    """Return ``count`` random bytes of the stream (purpose, seed, index)."""
    words = random_words(purpose, seed, index, -(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def random_below(words: NDArray[np.uint64], limit: int) -> NDArray[np.int64]:
    """Return whole numbers from 0 to ``limit`` - 1; their bias is below ``limit`` / 2**32."""
    high_halves = words >> np.uint64(32)
    numbers: NDArray[np.int64] = ((high_halves * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)
    return numbers


def random_fractions(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return numbers in [0, 1), multiples of 2**-53."""
    fractions: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions

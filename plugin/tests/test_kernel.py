"""The reference kernel: the same work in every run, a whole one before a round and pieces of it between the steps."""

from __future__ import annotations

import numpy as np
import pytest

from sparkgauge import kernel
from sparkgauge.kernel import PIECES, BetweenSteps, reference_seconds


def test_a_whole_kernel_takes_time() -> None:
    assert 0.0 < reference_seconds() < 30.0


@pytest.mark.parametrize("steps", [1, 7, PIECES - 1, PIECES, PIECES + 1, 5 * PIECES, 5000])
def test_a_round_has_about_as_many_pieces_however_long_it_is(steps: int) -> None:
    pieces = BetweenSteps(steps)
    due = [index for index in range(steps) if pieces.is_due(index)]
    pieces.time()
    assert PIECES / 2 < len(due) * len(pieces.seconds) < 2 * PIECES
    assert due[0] == 0 and due == [index for index in range(steps) if BetweenSteps(steps).is_due(index)]


def test_every_piece_is_the_same_work() -> None:
    """Numbers that grew, vanished or became denormal would take another time."""
    pieces = BetweenSteps(1)
    before = pieces._product.copy()
    for _ in range(5):
        pieces.time()
    assert np.allclose(pieces._product, before, rtol=1e-3)
    assert len(pieces.seconds) == 5 * PIECES and min(pieces.seconds) > 0.0


def test_no_steps_are_no_error() -> None:
    assert BetweenSteps(0).is_due(0)
    assert kernel.PIECE_PRODUCTS > 0

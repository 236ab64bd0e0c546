"""The reference kernel, and comparisons with samples from another time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import choose_normalisation, compare, compare_stored, normalise


def session(state: float, *, felt: float = 1.0, seed: int = 1, count: int = 12) -> tuple[Any, Any]:
    """Return (wall, reference) of rounds on a machine whose slowness wanders around ``state``."""
    generator = np.random.default_rng(seed)
    slowness = np.log(state) + 0.1 * generator.normal(size=count)
    own = generator.normal(0.0, 0.01, size=(2, count))
    return 10.0 * np.exp(felt * slowness + own[0]), 0.1 * np.exp(slowness + own[1])


def test_normalising_keeps_the_unit() -> None:
    assert normalise([10.0, 20.0, 10.0], [0.1, 0.2, 0.1]) == pytest.approx([10.0] * 3)
    assert normalise([10.0, 20.0], [0.1, 0.2], at=0.2) == pytest.approx([20.0] * 2)
    with pytest.raises(ConfigurationError):
        normalise([1.0, 2.0], [1.0])


def test_it_is_chosen_only_where_it_lowers_the_noise() -> None:
    wall, reference = session(1.0)
    chosen = choose_normalisation(wall, reference, wall / 2)
    assert chosen.kind == "reference" and chosen.sd_normalised < chosen.sd_wall / 3
    assert chosen.said.startswith("normalised") and chosen.sd_cpu == pytest.approx(chosen.sd_wall)
    unrelated = choose_normalisation(wall, session(1.0, seed=2)[1])
    assert unrelated.kind == "none" and unrelated.said.startswith("not normalised")
    assert choose_normalisation(wall[:5], reference[:5]).kind == "none"


def test_luck_rarely_chooses() -> None:
    generator = np.random.default_rng(7)
    trials = np.exp(0.1 * generator.normal(size=(500, 2, 10)))
    # An unrelated reference of the same noise doubles the variance.
    assert sum(choose_normalisation(wall, other).kind == "reference" for wall, other in trials) <= 10


def test_a_slower_machine_is_no_regression() -> None:
    wall, reference = session(1.0)
    later, later_reference = session(1.4, seed=3)
    assert compare(wall, later, margin=0.1).status == "regressed"
    stored = compare_stored(wall, later, reference, later_reference, margin=0.1)
    assert stored.comparison.status != "regressed"
    assert stored.reference_ratio == pytest.approx(1.4, rel=0.1)


def test_a_regression_on_the_same_machine_is_found() -> None:
    wall, reference = session(1.0)
    later, later_reference = session(1.0, seed=3)
    stored = compare_stored(wall, 1.3 * later, reference, later_reference, margin=0.1)
    assert stored.comparison.status == "regressed" and stored.normalisation is not None
    assert stored.normalisation.kind == "reference" and "reference kernel" in stored.said


def test_a_half_corrected_shift_is_not_trusted() -> None:
    wall, reference = session(1.0)
    later, later_reference = session(2.0, felt=1.2, seed=3)
    assert compare_stored(wall, later, reference, later_reference, margin=0.1).comparison.status == "inconclusive"


def test_without_a_reference_it_says_so_and_takes_what_is_known_between_sessions() -> None:
    wall, later = session(1.0)[0], session(1.0, seed=4)[0]
    stored = compare_stored(wall, 1.4 * later, margin=0.1)
    assert stored.normalisation is None and stored.said.startswith("not normalised")
    assert stored.comparison.status == "regressed"
    assert compare_stored(wall, 1.4 * later, margin=0.1, between_sd=0.2).comparison.status == "inconclusive"


def test_one_round_is_inconclusive() -> None:
    assert compare_stored([1.0], [2.0], [1.0], [1.0], margin=0.1).comparison.status == "inconclusive"


@pytest.mark.parametrize("felt", [0.65, 0.9, 1.15])
def test_what_training_feels_of_the_kernels_change_is_learnt_from_the_rounds(felt: float) -> None:
    """With nothing known but the prior, half of the kernel's change would be left or overdone."""
    (wall, reference), (later, slower) = session(1.0, felt=felt), session(1.3, felt=felt, seed=3)
    stored = compare_stored(wall, later, reference, slower, margin=0.15, between_steps=True)
    assert stored.comparison.status in ("match", "inconclusive")
    assert stored.comparison.ratio == pytest.approx(1.0, abs=0.06)
    assert "of its change taken out" in stored.said
    found = compare_stored(wall, 1.6 * later, reference, slower, margin=0.15, between_steps=True)
    assert found.comparison.status == "regressed"


def test_rounds_that_hardly_vary_on_a_machine_in_another_state_stay_comparable() -> None:
    before, after = [1.0, 1.0, 1.0 + 1e-15], [1.0, 1.0 + 1e-15, 1.0]
    stored = compare_stored(before, after, [0.1] * 3, [0.2] * 3, margin=0.1, between_steps=True)
    assert stored.comparison.status in ("inconclusive", "regressed", "improved")


def test_a_crowded_machine_is_neither_a_regression_nor_an_improvement() -> None:
    """The kernel between the steps does not see what a busy run queue does to a training."""
    wall, reference = session(1.0)
    later, beside = session(1.0, seed=3)
    free, crowded = [1.08] * len(wall), [1.5] * len(later)
    for kernel in ({}, {"baseline_reference": reference, "candidate_reference": beside, "between_steps": True}):
        assert compare_stored(wall, 1.4 * later, **kernel, margin=0.15).comparison.status == "regressed"
        for first, second, factor in ((free, crowded, 1.4), (crowded, free, 1 / 1.4)):
            stored = compare_stored(wall, factor * later, **kernel, margin=0.15, waiting=(first, second))
            assert stored.comparison.status == "inconclusive"
            assert "waited for a core" in stored.said
        same = compare_stored(wall, 1.4 * later, **kernel, margin=0.15, waiting=(free, free))
        assert same.comparison.status == "regressed" and "waited" not in same.said

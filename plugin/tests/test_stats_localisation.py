"""Phases, executors, work or waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparkgauge.errors import ConfigurationError
from sparkgauge.stats import compare, find_straggler, localise, work_or_waiting

SIZES = {"launch": 0.8, "feed": 0.5, "compute": 5.5, "sync": 2.2, "evaluate": 1.0}


def rounds(generator: np.random.Generator, count: int = 20, sd: float = 0.03, **slower: float) -> dict[str, Any]:
    """Return seconds of each phase, with noise that a round's phases share and noise of their own."""
    shared = generator.normal(0.0, sd, count)
    return {
        name: size * slower.get(name, 1.0) * np.exp(shared + generator.normal(0.0, sd, count))
        for name, size in SIZES.items()
    }


@pytest.mark.parametrize("paired", [False, True])
def test_the_phase_that_got_slower_is_named(paired: bool) -> None:
    generator, named = np.random.default_rng(1), []
    for number in range(100):
        target = list(SIZES)[number % len(SIZES)]
        found = localise(rounds(generator), rounds(generator, **{target: 1.2}), paired=paired).named
        named.append("right" if found == target else "none" if found is None else "wrong")
    assert named.count("right") >= 95 and named.count("wrong") <= 2


def test_nothing_changed_names_nothing() -> None:
    generator = np.random.default_rng(2)
    named = [localise(rounds(generator), rounds(generator), paired=number % 2 == 0).named for number in range(200)]
    assert sum(name is not None for name in named) <= 6


def test_share_and_interval() -> None:
    generator = np.random.default_rng(3)
    result = localise(rounds(generator, 30, 0.01), rounds(generator, 30, 0.01, compute=1.2, sync=1.2))
    compute, sync = result.parts[:2]
    assert (result.named, compute.name, sync.name) == ("compute", "compute", "sync")
    assert compute.change_seconds.low < 1.1 < compute.change_seconds.high
    assert compute.share.low < 5.5 / 7.7 < compute.share.high
    assert sum(part.share.estimate for part in result.parts) == pytest.approx(1.0)


def test_without_a_total_change_the_shares_are_unbounded() -> None:
    generator = np.random.default_rng(4)
    result = localise(rounds(generator), rounds(generator))
    assert not result.parts[0].share.is_bounded


def test_a_new_phase_is_found_and_one_round_names_nothing() -> None:
    before = {"compute": [1.0, 1.1, 1.0, 0.9]}
    after = {"compute": [1.0, 1.0, 1.1, 0.9], "sync": [0.5, 0.6, 0.5, 0.55]}
    assert localise(before, after).named == "sync"
    assert localise({"compute": [1.0]}, {"compute": [9.0]}).named is None
    with pytest.raises(ConfigurationError):
        localise({"compute": [1.0], "sync": [1.0, 2.0]}, after)


def test_the_straggler_is_named_and_a_common_slowdown_is_none() -> None:
    generator = np.random.default_rng(5)

    def executors(*factors: float) -> dict[int, Any]:
        shared = generator.normal(0.0, 0.2, 10)
        return {k: f * np.exp(shared + generator.normal(0.0, 0.02, 10)) for k, f in enumerate(factors)}

    assert find_straggler(executors(1, 1, 1, 1), executors(1, 1, 1.3, 1)) == 2
    assert find_straggler(executors(1, 1), executors(1.3, 1)) == 0
    assert find_straggler(executors(1, 1, 1), executors(1.5, 1.5, 1.5)) is None
    assert find_straggler(executors(1), executors(2)) is None
    with pytest.raises(ConfigurationError):
        find_straggler(executors(1, 1), executors(1, 1, 1))


def test_wall_without_cpu_is_waiting() -> None:
    generator = np.random.default_rng(6)
    noise = np.exp(generator.normal(0.0, 0.01, size=(4, 8)))
    wall = compare(noise[0], 1.3 * noise[1], margin=0.1)
    assert work_or_waiting(wall, compare(noise[2], noise[3], margin=0.1)) == "waiting"
    assert work_or_waiting(wall, compare(noise[2], 1.3 * noise[3], margin=0.1)) == "work"
    assert work_or_waiting(wall, compare([1.0], [1.1], margin=0.1)) == "undecided"
    assert work_or_waiting(compare(noise[0], noise[1], margin=0.1), wall) == "undecided"

"""The phase clock: every moment belongs to one phase, so the phases add up."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge.phases import PhaseClock
from sparkgauge.records import PHASES


def test_phases_add_up_to_the_time_since_the_start():
    started = time.monotonic() - 5.0
    clock = PhaseClock(started)
    clock.switch("feed")
    clock.switch("compute")

    total = clock.seconds().total

    assert total == pytest.approx(time.monotonic() - started, abs=0.05)
    assert clock.seconds().launch >= 5.0


@given(st.lists(st.sampled_from(PHASES), max_size=30))
def test_any_order_of_switches_adds_up(phases):
    clock = PhaseClock()
    began = clock._since
    for phase in phases:
        clock.switch(phase)
    total = clock.seconds().total

    assert total == pytest.approx(clock._since - began, abs=1e-9)


def test_a_block_is_timed_and_the_phase_before_goes_on():
    clock = PhaseClock()
    clock.switch("compute")
    with clock.during("evaluate"):
        time.sleep(0.02)
        assert clock.phase == "evaluate"

    assert clock.phase == "compute"
    assert clock.seconds().evaluate >= 0.02


def test_a_pause_belongs_to_no_phase():
    began = time.monotonic()
    clock = PhaseClock(began)
    clock.switch("compute")
    with clock.paused():
        time.sleep(0.05)
        sum(range(100_000))
    clock.switch("collect")
    passed = time.monotonic() - began

    assert clock.phase == "collect" and clock.paused_seconds >= 0.05
    assert clock.seconds().total == pytest.approx(passed - clock.paused_seconds, abs=0.02)
    assert clock.cpu_seconds().compute < 0.05


def test_a_block_that_raises_gives_the_phase_back():
    clock = PhaseClock()
    with pytest.raises(ValueError, match="inside"), clock.during("sync"):
        raise ValueError("inside")

    assert clock.phase == "launch"


def test_an_unknown_phase_is_refused_at_once():
    with pytest.raises(KeyError, match="trian"):
        PhaseClock().switch("trian")


@given(st.floats(-1, 10))
def test_moved_seconds_are_neither_lost_nor_made(seconds):
    clock = PhaseClock(time.monotonic() - 2.0)
    clock.switch("feed")
    before = clock.seconds()
    clock.move("launch", "sync", seconds)
    after = clock.seconds()

    assert after.launch + after.sync == pytest.approx(before.launch, abs=1e-9)
    assert 0.0 <= after.sync <= before.launch + 1e-9

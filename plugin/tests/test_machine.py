"""What a machine did during a round: counters of made-up and real `/proc` trees, and when a round is disturbed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plugin.tests.made_up import make_round, make_run, make_state
from sparkgauge import machine
from sparkgauge.machine import Counters, counters, disturbances, process_cpu_seconds, state_between, waited_seconds
from sparkgauge.report.session_notes import round_lines

PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: Path, **files: str) -> Path:
    """Return ``root`` with files; ``__`` in a name stands for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_counters_of_a_virtual_machine_with_a_quota(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__stat="cpu  100 0 50 800 10 0 0 40 7 0\ncpu0 1 1 1 1 1 1 1 1\n",
        proc__vmstat="nr_free_pages 1\npswpin 3\npswpout 4\n",
        proc__self__cgroup="0::/box\n",
        sys__fs__cgroup__box__cpu=" ",
    )
    (root / "sys/fs/cgroup/box/cpu").unlink()
    (root / "sys/fs/cgroup/box/cpu.stat").write_text("nr_periods 9\nnr_throttled 5\nthrottled_usec 2500000\n")
    heat = root / "sys/devices/system/cpu/cpu0/thermal_throttle"
    heat.mkdir(parents=True)
    (heat / "core_throttle_count").write_text("2\n")
    found = counters(root)
    assert (found.all_ticks, found.steal_ticks) == (1000, 40)  # the guests' ticks are in the user's already
    assert (found.throttled_seconds, found.throttled_count, found.swapped_bytes) == (2.5, 7, 7 * PAGE)


def test_what_is_not_exposed_is_none_and_not_zero(tmp_path: Path) -> None:
    found = counters(tmp_path)
    assert (found.all_ticks, found.steal_ticks, found.throttled_seconds) == (None, None, None)
    assert (found.throttled_count, found.swapped_bytes) == (None, None)
    state = state_between(found, found)
    assert (state.steal_fraction, state.throttled_seconds, state.throttled_count, state.swapped_bytes) == (None,) * 4


def test_waiting_is_summed_over_the_threads(tmp_path: Path) -> None:
    assert waited_seconds(tmp_path) is None
    for thread, text in ((7, "900 1500000000 3"), (8, "900 500000000 3")):
        folder = tmp_path / f"proc/self/task/{thread}"
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(text)
    assert waited_seconds(tmp_path) == 2.0


def test_a_state_is_what_happened_in_between() -> None:
    before = Counters(10.0, 1000, 40, 1.0, 5, 100)
    state = state_between(before, Counters(14.0, 1200, 60, 1.5, 7, 300))
    assert state.seconds == 4.0
    assert state.steal_fraction == pytest.approx(0.1)
    assert (state.throttled_seconds, state.throttled_count, state.swapped_bytes) == (0.5, 2, 200)


def test_this_machine_can_be_read() -> None:
    if not Path("/proc/stat").exists():
        pytest.skip("no /proc here")
    before = counters()
    own = process_cpu_seconds(os.getpid())
    assert before.all_ticks and own is not None and own > 0.0
    assert process_cpu_seconds(2**30) is None
    assert state_between(before, counters()).seconds >= 0.0
    assert machine.jvm_above() is None


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"steal_fraction": 0.05}, []),
        ({"steal_fraction": 0.0501}, ["steal 5%"]),
        ({"throttled_seconds": 0.2}, []),
        ({"throttled_seconds": 0.3}, ["throttled 3% of the time"]),
        ({"swapped_bytes": 32 * 2**20}, []),
        ({"swapped_bytes": 33 * 2**20}, ["33 MiB swapped"]),
        ({"steal_fraction": None, "throttled_seconds": None, "swapped_bytes": None}, []),
    ],
)
def test_limits_of_a_disturbance(state: dict[str, float | None], found: list[str]) -> None:
    assert disturbances(make_round(machine=make_state(**state))) == found


def test_disturbed_and_invalid_rounds_are_said_by_number() -> None:
    stolen = make_round(2, machine=make_state(steal_fraction=0.12))
    retried = make_round(3, invalid="Spark retried the task of executor 1")
    run = make_run(make_round(1), stolen, retried, label="gpu")
    assert round_lines([run]) == [
        f"not a sample: {run.test_id} gpu round 3: Spark retried the task of executor 1",
        f"disturbed: {run.test_id} gpu round 2: steal 12%",
    ]
    assert len(round_lines([make_run(*[stolen] * 30)])) == 11

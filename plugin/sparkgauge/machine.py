"""What the machine was doing during a round: load, steal, throttling, swapping and CPU seconds.

Read from ``/proc`` and ``/sys``; what a system does not expose is None, never 0. Runs on executors and on the driver.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparkgauge.environment import cgroup_folders, load_average
from sparkgauge.records import MachineState, Round

MOST_STEAL_FRACTION = 0.05
"""Above it a round counts as disturbed: half of the default margin of 10 %, taken by other guests of the same host."""

MOST_THROTTLED_FRACTION = 0.02
"""Share of the round's wall time that a processor quota may stop the group before the round counts as disturbed."""

MOST_GPU_THROTTLED_FRACTION = 0.02
"""Share of a round's samples with clocks that heat or the power supply held down."""

MOST_SWAPPED_BYTES = 32 * 2**20
"""Swapping beyond it takes a good part of a second on a disk."""

_ROOT = Path("/")


@dataclass(frozen=True)
class Counters:
    """The kernel's counters at one moment; None where they are not exposed."""

    moment: float
    all_ticks: int | None
    steal_ticks: int | None
    throttled_seconds: float | None
    throttled_count: int | None
    """By the cgroup's quota, and by the processor's own heat where that is counted."""
    swapped_bytes: int | None


def counters(root: Path = _ROOT) -> Counters:
    """Return the counters now; ``root`` is where ``/proc`` and ``/sys`` are looked for."""
    ticks = [int(word) for word in _first_line(root / "proc/stat").split()[1:9]]
    quota = "\n".join(_read(folder / "cpu.stat") for folder in dict.fromkeys(cgroup_folders("cpu", root)))
    swapped = _numbers(r"^pswp(?:in|out) (\d+)$", _read(root / "proc/vmstat"))
    heat = [int(text) for path in _heat_files(root) if (text := _read(path).strip()).isdecimal()]
    periods = _numbers(r"^nr_throttled (\d+)$", quota)
    seconds = [n / 1e6 for n in _numbers(r"^throttled_usec (\d+)$", quota)]  # version 2
    seconds += [n / 1e9 for n in _numbers(r"^throttled_time (\d+)$", quota)]  # version 1
    return Counters(
        moment=time.monotonic(),
        all_ticks=sum(ticks) or None,
        steal_ticks=ticks[7] if len(ticks) > 7 else None,
        throttled_seconds=max(seconds, default=None),
        throttled_count=max(periods, default=0) + sum(heat) if periods or heat else None,
        swapped_bytes=sum(swapped) * os.sysconf("SC_PAGE_SIZE") if swapped else None,
    )


def state_between(before: Counters, after: Counters) -> MachineState:
    """Return what happened between two looks, with the load average of now."""
    stolen, ticks = grown(before.steal_ticks, after.steal_ticks), grown(before.all_ticks, after.all_ticks)
    throttled, count = (
        grown(before.throttled_seconds, after.throttled_seconds),
        grown(before.throttled_count, after.throttled_count),
    )
    swapped = grown(before.swapped_bytes, after.swapped_bytes)
    return MachineState(
        seconds=max(0.0, after.moment - before.moment),
        load_average=load_average(),
        steal_fraction=None if stolen is None or not ticks else stolen / ticks,
        throttled_seconds=throttled,
        throttled_count=None if count is None else int(count),
        swapped_bytes=None if swapped is None else int(swapped),
    )


def disturbances(one: Round) -> list[str]:
    """Return what disturbed a round, in words with figures; the worst executor's of each kind."""
    states = [executor.machine for executor in one.executors if executor.machine is not None]
    steal = max((state.steal_fraction or 0.0 for state in states), default=0.0)
    throttled = max(((s.throttled_seconds or 0.0) / s.seconds for s in states if s.seconds > 0.0), default=0.0)
    swapped = max((state.swapped_bytes or 0 for state in states), default=0)
    found = [f"steal {steal:.0%}"] if steal > MOST_STEAL_FRACTION else []
    found += [f"throttled {throttled:.0%} of the time"] if throttled > MOST_THROTTLED_FRACTION else []
    found += [f"{swapped / 2**20:.0f} MiB swapped"] if swapped > MOST_SWAPPED_BYTES else []
    return [*found, *_gpu_disturbances(one)]


def _gpu_disturbances(one: Round) -> list[str]:
    """Return what a round's GPUs suffered: clocks held down by heat or a failing supply, and errors."""
    found: list[str] = []
    for state in (state for executor in one.executors for state in executor.gpus):
        if (throttled := state.throttled_fraction or 0.0) > MOST_GPU_THROTTLED_FRACTION:
            reasons = ", ".join(state.throttle_reasons)
            found.append(f"{state.name} throttled {throttled:.0%} of the time ({reasons}), so its clock is not stable")
        found += [f"{state.name}: {error}" for error in state.errors]
    return found


def process_cpu_seconds(pid: int, root: Path = _ROOT) -> float | None:
    """Return user + system CPU seconds of another process, its threads included; None where it cannot be read."""
    words = _read(root / "proc" / str(pid) / "stat").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") if len(words) > 12 else None


def waited_seconds(root: Path = _ROOT) -> float | None:
    """Return how long this process's threads together were ready to run and had no core; None where it is not counted.

    The kernel's run-queue delay of the threads that are alive: what other processes of this machine took. Time that
    the machine itself did not get (steal) is not in it.
    """
    found = [_read(path).split() for path in (root / "proc/self/task").glob("*/schedstat")]
    delays = [int(words[1]) for words in found if len(words) > 1]
    return sum(delays) / 1e9 if delays else None


def jvm_above(root: Path = _ROOT) -> int | None:
    """Return the PID of the Java process that this one descends from; None without one."""
    for pid in _ancestors(root):
        if _read(root / "proc" / str(pid) / "comm").strip() == "java":
            return pid
    return None


def _ancestors(root: Path) -> Iterator[int]:
    pid = os.getpid()
    for _ in range(64):
        words = _read(root / "proc" / str(pid) / "stat").rpartition(")")[2].split()
        pid = int(words[1]) if len(words) > 1 else 0
        if pid <= 1:
            return
        yield pid


def _heat_files(root: Path) -> Iterator[Path]:
    return (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")


def grown(before: float | None, after: float | None) -> float | None:
    """Return how much a counter grew between two looks; None where one of them did not see it."""
    return None if before is None or after is None else max(0.0, after - before)


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text, re.MULTILINE)]


def _first_line(path: Path) -> str:
    return (_read(path).splitlines() or [""])[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # absent on this system, or not ours to read: the callers say None
        return ""

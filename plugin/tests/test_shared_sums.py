"""Sums through shared memory, between real processes."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparkgauge.adapters import shared_sums
from sparkgauge.adapters.shared_sums import SLOT_NUMBERS, SharedSums

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    not (shared_sums.FOLDER.is_dir() and shared_sums.keeps_order_of_writes()),
    reason="sums go through gloo where there is no /dev/shm, or the processor is no x86-64",
)

SPAWN = multiprocessing.get_context("spawn")
TIMEOUT_SECONDS = 60
ROUNDS = 40


@pytest.fixture
def store() -> Any:
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _run(store: Any, executors: int, function: Callable[..., None], *arguments: Any) -> list[Any]:
    """Return what ``function`` puts for each of ``executors`` processes, by rank."""
    answers = SPAWN.SimpleQueue()
    parts = (store.port, executors, function, answers, *arguments)
    processes = [SPAWN.Process(target=_process, args=(rank, *parts)) for rank in range(executors)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(TIMEOUT_SECONDS)
        assert one.exitcode is not None
    return [answer for _, answer in sorted((answers.get() for _ in _until_empty(answers)), key=lambda pair: pair[0])]


def _until_empty(answers: Any) -> Iterator[None]:
    while not answers.empty():
        yield


def _process(rank: int, port: int, executors: int, function: Any, answers: Any, *arguments: Any) -> None:
    from torch.distributed import TCPStore

    sums = SharedSums.meet(TCPStore("127.0.0.1", port, is_master=False), rank, executors)
    answers.put((rank, function(sums, rank, *arguments)))


def _sum_many(sums: SharedSums, rank: int, executors: int, sizes: tuple[int, ...]) -> bool:
    """Return whether many sums of changing sizes are right to the last bit, some of them begun before another."""
    for number in range(ROUNDS):
        size = sizes[number % len(sizes)]
        parts = [np.random.default_rng([number, one]).normal(size=size).astype(np.float32) for one in range(executors)]
        expected = parts[0] + parts[1]
        for part in parts[2:]:
            expected = expected + part
        small = np.full(3, rank + 1.0, np.float32)
        begun = sums.start(parts[rank])
        after = sums.start(small) if number % 3 == 0 else None
        if number % 5 == rank:
            time.sleep(0.01)  # the others wait beyond their yields
        begun.wait()
        begun.wait()
        if not np.array_equal(parts[rank], expected):
            return False
        if after is not None:
            after.wait()
            if small.tolist() != [executors * (executors + 1) / 2] * 3:
                return False
    sums.close()
    sums.close()
    return True


@pytest.mark.parametrize("executors", [2, 3])
def test_sums_are_the_same_bits_for_everyone(store: Any, executors: int) -> None:
    sizes = (1, 33, SLOT_NUMBERS - 1, SLOT_NUMBERS, SLOT_NUMBERS + 1, 5 * SLOT_NUMBERS + 7, 0)
    assert _run(store, executors, _sum_many, executors, sizes) == [True] * executors


def test_nothing_is_left_in_the_folder(store: Any) -> None:
    before = _segments()
    assert _run(store, 2, _files_of_this_process) == [[], []]
    assert _segments() <= before


def _segments() -> set[Path]:
    return set(shared_sums.FOLDER.glob("sparkgauge-*"))


def _files_of_this_process(sums: SharedSums, rank: int) -> list[str]:
    values = np.ones(1, np.float32)
    sums.start(values).wait()
    return [path.name for path in shared_sums.FOLDER.glob(f"sparkgauge-*-{os.getpid()}")]


def _outlive(sums: SharedSums, rank: int, leave: str) -> str:
    values = np.ones(5, np.float32)
    sums.start(values).wait()
    if rank == 0:
        if leave == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sums.close()
        return "left"
    began = time.monotonic()
    try:
        sums.start(values).wait()
    except ConnectionResetError:
        return "noticed" if time.monotonic() - began < 5 else "late"
    return "not noticed"


@pytest.mark.parametrize(("leave", "answers"), [("killed", ["noticed"]), ("closed", ["left", "noticed"])])
def test_an_executor_that_left_is_noticed(store: Any, leave: str, answers: list[str]) -> None:
    assert _run(store, 2, _outlive, leave) == answers


def _meets(sums: SharedSums | None, rank: int) -> bool:
    return sums is not None


def test_everyone_goes_without_where_one_cannot(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    process = SPAWN.Process(target=_process, args=(1, store.port, 2, _meets, answers := SPAWN.SimpleQueue()))
    process.start()
    monkeypatch.setattr(shared_sums.platform, "machine", lambda: "aarch64")  # keeps no order of writes
    before = _segments()
    assert SharedSums.meet(store, 0, 2) is None
    process.join(TIMEOUT_SECONDS)
    assert answers.get() == (1, False)
    assert _segments() <= before


def test_a_full_or_missing_folder_is_gone_without(store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_sums, "FOLDER", tmp_path / "missing")
    assert SharedSums.meet(store, 0, 1) is None

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_sums, "FOLDER", tmp_path)
    monkeypatch.setattr(shared_sums.os, "posix_fallocate", full)
    assert SharedSums.meet(store, 0, 1) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../etc/passwd", "sparkgauge-0-1", "/etc/passwd"])
def test_names_of_others_are_not_trusted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_sums.os, "open", lambda *_: pytest.fail("opened"))
    assert shared_sums._open(name, contextlib.ExitStack()) is None


def test_a_segment_is_its_owners_alone(store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_sums, "FOLDER", tmp_path)
    with contextlib.ExitStack() as opened:
        own = shared_sums._create(opened)
        assert own is not None
        assert (tmp_path / own.name).stat().st_mode & 0o777 == 0o600
        other = shared_sums._open(own.name, opened)
        assert other is not None
        assert not other.owner_has_left()
        with pytest.raises(ValueError, match="read-only"):
            other.slots[0, 0] = 1
        fcntl.flock(own.descriptor, fcntl.LOCK_UN)
        assert other.owner_has_left()
    assert not list(tmp_path.iterdir())

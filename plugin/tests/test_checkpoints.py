"""Checkpoints: what goes in comes out, whole or not at all, and never into another training."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge import rounds
from sparkgauge.channel import DriverChannel, ExecutorChannel
from sparkgauge.checkpoints import Checkpoints, Folder, check_shapes, identity_of, is_uri, pack, unpack
from sparkgauge.errors import DataError, TrainingError
from sparkgauge.job import Recovery
from sparkgauge.recovery import Attempts
from sparkgauge.rounds import _Conversation

WHO = {"model": "cifar10_quick", "seed": 1}

plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
states = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), states, max_size=4), st.integers(1, 10**8))
def test_plain_values_come_back_as_they_went_in(state: dict[str, Any], step: int) -> None:
    assert unpack(pack(WHO, step, state), WHO, "a file") == (step, state)


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_arrays_keep_every_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 255, shape).astype(dtype)
    _, state = unpack(pack(WHO, 1, {"a": [array]}), WHO, "a file")
    assert state["a"][0].dtype == array.dtype
    np.testing.assert_array_equal(state["a"][0], array)


def test_tensors_and_an_optimisers_state_come_back_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    sgd.step()
    _, state = unpack(pack(WHO, 1, {"net": OrderedDict(net.state_dict()), "sgd": sgd.state_dict()}), WHO, "a file")
    torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).load_state_dict(state["sgd"])
    assert torch.equal(state["net"]["weight"], net.weight)
    assert torch.equal(state["sgd"]["state"][0]["momentum_buffer"], sgd.state_dict()["state"][0]["momentum_buffer"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"keeps arrays, tensors and plain values, got object in state\['a'\]\[0\]"),
        (np.array([object()]), "keeps arrays, tensors and plain values"),
        ({(1, 2): 3}, "keys must be texts or whole numbers"),
    ],
)
def test_what_cannot_be_kept_is_named(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pack(WHO, 1, {"a": [value]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Damaged checkpoint"),
        (b"PK\x03\x04 nothing", "Damaged checkpoint"),
        (pack(WHO, 1, {"a": np.arange(1000)})[:-100], "Damaged checkpoint"),
        (pack(WHO, 1, {"a": np.arange(1000)}).replace(bytes([7, 0, 0, 0]), bytes([9, 0, 0, 0]), 1), "Damaged"),
        (pack({**WHO, "model": "resnet20"}, 1, {}), "another training: expected model 'cifar10_quick', got model 're"),
        (pack({**WHO, "seed": 2}, 1, {}), "another training: expected seed 1, got seed 2, in a file"),
    ],
)
def test_damage_and_strange_checkpoints_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        unpack(content, WHO, "a file")


def test_a_checkpoint_of_another_shape_is_named() -> None:
    own = {"values": np.zeros(5)}
    check_shapes(own, {"values": np.ones(5)}, "a file")
    with pytest.raises(DataError, match=r"another model: expected 'values' of shape \(5,\), got shape \(4,\)"):
        check_shapes(own, {"values": np.ones(4)}, "a file")
    with pytest.raises(DataError, match=r"expected 'values' of shape \(5,\), got none"):
        check_shapes(own, {}, "a file")


def test_a_folder_keeps_the_last_two_and_nothing_half_written(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "new")
    for step in (10, 20, 30):
        folder.write(f"step-{step:09d}.npz", bytes([step]))
    assert sorted(os.listdir(tmp_path / "new")) == ["step-000000020.npz", "step-000000030.npz"]
    assert folder.read("step-000000030.npz") == bytes([30])
    with pytest.raises(DataError, match=r"Cannot read a checkpoint.*No such file.*checkpoint_folder must be a folder"):
        folder.read("step-000000010.npz")


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "step-000000001.npz").mkdir()
    with pytest.raises(
        DataError, match="Cannot write a checkpoint: expected a folder that .* executors run, got Is a directory"
    ):
        Folder(tmp_path).write("step-000000001.npz", b"1")
    assert os.listdir(tmp_path) == ["step-000000001.npz"]


@pytest.mark.parametrize(
    ("folder", "uri"),
    [("hdfs://a/b", True), ("file:///a", True), ("s3a://a", True), ("/a/b", False), ("a:b", False), ("a/b:c", False)],
)
def test_uris_are_told_from_folders(folder: str, uri: bool) -> None:
    assert is_uri(folder) is uri


def _job(retries: int = 1, **changes: Any) -> Any:
    fields = {"executors": 2, "model": "m", "fn": None, "seed": 1, "global_batch": 8, "train_count": 9, **changes}
    return SimpleNamespace(recovery=Recovery(retries, 5, ""), **fields)


def test_checkpoints_are_due_every_so_many_steps_and_written_by_one(tmp_path: Path) -> None:
    said: list[tuple[str, int]] = []
    first, second = (
        Checkpoints(_job(), Folder(tmp_path), writes=writes, announce=lambda *what: said.append(what))
        for writes in (True, False)
    )
    assert [step for step in range(12) if first.due(step)] == [5, 10]
    for one in (second, first):
        one.write(5, {"a": 1})
    assert said == [("step-000000005.npz", 5)] and first.read() is None
    assert Checkpoints(_job(), Folder(tmp_path), latest=said[0][0]).read() == (5, {"a": 1})
    other = Checkpoints(_job(model="another"), Folder(tmp_path), latest=said[0][0])
    with pytest.raises(DataError, match="another training: expected model 'another', got model 'm'"):
        other.read()
    assert identity_of(_job())["executors"] == 2


# ---- the driver's count of attempts; the executors are threads of this process


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return ``(conversation, attempts, connect)`` of a round of two executors that may be run again once."""
    monkeypatch.setattr(rounds, "PEER_SECONDS", 0.1)
    with DriverChannel() as channel:
        attempts = Attempts(_job(), channel, None)
        conversation = _Conversation(channel, _job(), 30.0, lambda progress: None, attempts)

        def connect(rank: int) -> ExecutorChannel:
            executor = ExecutorChannel(channel.address, rank)
            _hear(conversation)
            return executor

        yield conversation, attempts, connect


def _hear(conversation: Any) -> None:
    for _ in range(3):
        conversation._receive(0.03)


def test_executors_meet_when_all_are_there(driver: Any) -> None:
    _, _, connect = driver
    executors = [connect(0), connect(1)]
    assert [one.receive() for one in executors] == [{"kind": "meet", "attempt": 0, "checkpoint": ""}] * 2


@pytest.mark.parametrize("gone", [0, 1])
def test_those_who_come_back_meet_anew_at_the_last_checkpoint(driver: Any, gone: int) -> None:
    conversation, attempts, connect = driver
    executors = [connect(0), connect(1)]
    executors[0].send("checkpoint", name="step-000000005.npz", step=5)
    executors[1 - gone].send("error", summary="ConnectionResetError: an executor left", traceback="")
    executors[gone].close()
    _hear(conversation)
    conversation.pump()  # not an error: another attempt may come
    again = [connect(0), connect(1)]
    executors[1 - gone].send("result", metrics={})  # a late word of the first attempt counts for nothing
    _hear(conversation)
    assert conversation._results == {}
    assert {one.receive()["kind"] for one in executors if one is not executors[gone]} == {"meet"}
    assert [one.receive() for one in again] == [{"kind": "meet", "attempt": 1, "checkpoint": "step-000000005.npz"}] * 2
    assert attempts.notes == [f"executor {gone} was lost; went on from the checkpoint after step 5"]


def test_one_who_comes_back_although_nobody_was_missed_begins_another_attempt(driver: Any) -> None:
    _, attempts, connect = driver
    stale = connect(1)  # its peer was killed before it said a word
    again = [connect(1), connect(0)]
    assert attempts.number == 1
    assert [one.receive()["attempt"] for one in again] == [1, 1]
    stale.close()


def test_a_loss_too_many_is_the_rounds_error(driver: Any) -> None:
    conversation, _, connect = driver
    for _ in range(2):
        executors = [connect(0), connect(1)]
        executors[1].close()
        _hear(conversation)
    with pytest.raises(TrainingError, match="Executor 1 .* was lost .*the 1 retries of --gauge-retries are used up"):
        conversation.pump()


def test_an_exception_ends_the_round_although_a_retry_is_left(driver: Any) -> None:
    conversation, _, connect = driver
    executors = [connect(0), connect(1)]
    executors[0].send("error", summary="ValueError: a bug", traceback="the bug")
    _hear(conversation)
    with pytest.raises(TrainingError, match="ValueError: a bug"):
        conversation.pump()

"""The wire between driver and executors: authenticated, JSON only, and deaf to strangers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import queue
import socket
import struct
from multiprocessing import AuthenticationError

import pytest

from sparkgauge.channel import DriverChannel, ExecutorChannel


@pytest.fixture
def channel():
    with DriverChannel() as opened:
        yield opened


def test_messages_arrive_in_order_with_their_rank(channel):
    executor = ExecutorChannel(channel.address, rank=3)
    executor.send("progress", step=1)
    executor.send("progress", step=2)

    hello, first, second = (channel.inbox.get(timeout=5) for _ in range(3))

    assert (hello["kind"], hello["rank"]) == ("hello", 3)
    assert [(message["step"], message["rank"]) for message in (first, second)] == [(1, 3), (2, 3)]


def test_a_rank_in_a_message_cannot_pose_as_another_executor(channel):
    executor = ExecutorChannel(channel.address, rank=0)
    executor.send("result", rank=1)

    channel.inbox.get(timeout=5)
    assert channel.inbox.get(timeout=5)["rank"] == 0


def test_the_executors_clock_starts_when_the_round_began(channel):
    executor = ExecutorChannel(channel.address, rank=0)

    assert abs(executor.driver_start - channel._started) < 0.5


def test_a_broadcast_reaches_every_executor(channel):
    executors = [ExecutorChannel(channel.address, rank) for rank in range(3)]
    for _ in executors:
        channel.inbox.get(timeout=5)

    channel.broadcast({"kind": "release"})

    assert [executor.receive()["kind"] for executor in executors] == ["release"] * 3


def test_a_closed_connection_is_reported_once_as_gone(channel):
    executor = ExecutorChannel(channel.address, rank=1)
    channel.inbox.get(timeout=5)
    executor.close()

    gone = channel.inbox.get(timeout=5)

    assert (gone["kind"], gone["rank"]) == ("gone", 1)
    with pytest.raises(queue.Empty):
        channel.inbox.get(timeout=0.1)


def test_a_wrong_secret_is_refused_and_leaves_the_channel_working(channel):
    stranger = dataclasses.replace(channel.address, secret_hex="00" * 32)

    with pytest.raises(AuthenticationError):
        ExecutorChannel(stranger, rank=0)

    ExecutorChannel(channel.address, rank=0)
    assert channel.inbox.get(timeout=5)["kind"] == "hello"


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.0\r\n\r\n", struct.pack("!i", -5), struct.pack("!i", 2**31 - 1), b""]
)
def test_garbage_on_the_port_leaves_the_channel_working(channel, garbage):
    with socket.create_connection((channel.address.host, channel.address.port)) as stranger:
        stranger.sendall(garbage)

    ExecutorChannel(channel.address, rank=0)
    assert channel.inbox.get(timeout=5)["kind"] == "hello"


@pytest.mark.parametrize("frame", [b"[]", b"{", b"\xff", pickle.dumps({"kind": "result"})])
def test_a_frame_that_is_no_json_object_ends_that_executor_only(channel, frame):
    executor = ExecutorChannel(channel.address, rank=0)
    channel.inbox.get(timeout=5)
    executor._connection.send_bytes(frame)

    assert channel.inbox.get(timeout=5)["kind"] == "gone"
    ExecutorChannel(channel.address, rank=1)
    assert channel.inbox.get(timeout=5)["kind"] == "hello"


def test_the_secret_is_kept_out_of_the_address_s_text(channel):
    assert channel.address.secret_hex not in repr(channel.address)


def test_the_channel_listens_on_loopback_by_default(channel):
    assert channel._server.getsockname()[0] == "127.0.0.1"


def test_closing_twice_is_harmless_and_ends_the_executors_wait():
    channel = DriverChannel()
    executor = ExecutorChannel(channel.address, rank=0)
    channel.inbox.get(timeout=5)

    channel.close()
    channel.close()

    with pytest.raises((EOFError, OSError)):
        executor.receive()


def test_a_million_step_times_fit_into_one_message(channel):
    executor = ExecutorChannel(channel.address, rank=0)
    channel.inbox.get(timeout=5)
    executor.send("result", step_seconds=[0.0123456789] * 1_000_000)

    message = channel.inbox.get(timeout=30)

    assert len(message["step_seconds"]) == 1_000_000
    with contextlib.suppress(OSError):
        executor.close()
    assert json.dumps(message["kind"]) == '"result"'

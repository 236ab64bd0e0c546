"""The wire between the driver and the training processes: authenticated, JSON only, one connection per executor.

Spark returns a task's result only when the whole job ends, and a training process that raised leaves its peers waiting
in a collective. So every executor also talks to the driver directly: it reports progress, results and its own
traceback within milliseconds, and the driver answers with the clock and with the word to leave.

The handshake is the standard library's mutual HMAC challenge (multiprocessing.connection); the messages are JSON in
``send_bytes`` frames, so nothing received is ever unpickled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest accepted frame: a million step times are about 20 MB of JSON."""

HANDSHAKE_SECONDS = 10.0
"""A peer that has not proved the secret by then is dropped (a port scanner must not hold a thread for ever)."""


@dataclass(frozen=True)
class Address:
    """Where and how an executor reaches the driver; travels inside Spark's own authenticated closure."""

    host: str
    port: int
    secret_hex: str = field(repr=False)


class DriverChannel:
    """The driver's end: accepts executors in the background and queues what they say."""

    def __init__(self, host: str = "127.0.0.1", advertised_host: str | None = None) -> None:
        """Listen on ``host`` (loopback unless the executors are on other machines), on a port the system picks."""
        self._secret = secrets.token_bytes(32)
        self._server = socket.create_server((host, 0), backlog=64)
        self.address = Address(advertised_host or host, self._server.getsockname()[1], self._secret.hex())
        self.inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._started = time.monotonic()
        self._connections: dict[int, Connection] = {}
        self._links = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="sparkgauge-channel", daemon=True).start()

    def elapsed(self) -> float:
        """Return the seconds since this channel was opened, which is when the round began."""
        return time.monotonic() - self._started

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send ``message`` to every connected executor; one that has gone is passed over (its loss shows elsewhere)."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(_encode(message))

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Send ``message`` to executor ``rank`` alone; nothing happens where it has gone."""
        with self._lock:
            connection = self._connections.get(rank)
        with contextlib.suppress(OSError):
            if connection is not None:
                connection.send_bytes(_encode(message))

    def close(self) -> None:
        """Stop listening and drop all connections; harmless when repeated."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for connection in self._connections.values():
                _hang_up(connection)  # its reader thread wakes, and closes it
            self._connections.clear()

    def __enter__(self) -> DriverChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                peer, _ = self._server.accept()
            except OSError:  # closed: by close() above, or with the process
                return
            threading.Thread(target=self._serve, args=(peer,), name="sparkgauge-executor", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        _receive_timeout(peer.fileno(), HANDSHAKE_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(peer.detach())
        try:
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            hello = _decode(connection.recv_bytes(MAX_MESSAGE_BYTES))
            rank = int(hello["rank"])
        except (AuthenticationError, OSError, EOFError, ValueError, KeyError, TypeError):
            connection.close()  # not one of ours: a stranger on the port is no reason to end the round
            return
        self._listen(connection, rank, hello)

    def _listen(self, connection: Connection, rank: int, hello: dict[str, Any]) -> None:
        with self._lock:
            self._connections[rank] = connection
            # a rank can come back: what its earlier process said must not be taken for the new one's
            sender = {"rank": rank, "link": next(self._links)}
        _receive_timeout(connection.fileno(), 0)
        try:
            connection.send_bytes(_encode({"kind": "clock", "elapsed_seconds": self.elapsed()}))
            self.inbox.put({**hello, **sender})
            while True:
                self.inbox.put({**_decode(connection.recv_bytes(MAX_MESSAGE_BYTES)), **sender})
        except (OSError, EOFError, ValueError) as error:
            if not self._closed:
                self.inbox.put({"kind": "gone", "why": f"{type(error).__name__}: {error}", **sender})
        finally:
            with self._lock:
                if self._connections.get(rank) is connection:
                    del self._connections[rank]
            connection.close()


class ExecutorChannel:
    """An executor's end: says things to the driver and waits for its word."""

    def __init__(self, address: Address, rank: int) -> None:
        """Connect as ``rank``; raises OSError or AuthenticationError when the driver cannot be reached or trusted."""
        peer = socket.create_connection((address.host, address.port), timeout=HANDSHAKE_SECONDS)
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secret = bytes.fromhex(address.secret_hex)
        self._connection = Connection(peer.detach())
        answer_challenge(self._connection, secret)
        deliver_challenge(self._connection, secret)
        self._lock = threading.Lock()
        self.send("hello", rank=rank, host=socket.gethostname())
        clock = self.receive()
        self.driver_start = time.monotonic() - float(clock["elapsed_seconds"])
        """The moment the round began, on this machine's monotonic clock (off by half a round trip at most)."""

    def send(self, kind: str, **content: Any) -> None:
        """Send one message; safe from several threads."""
        with self._lock:
            self._connection.send_bytes(_encode({"kind": kind, **content}))

    def receive(self) -> dict[str, Any]:
        """Return the driver's next message; EOFError when the driver has gone."""
        return _decode(self._connection.recv_bytes(MAX_MESSAGE_BYTES))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def _decode(frame: bytes) -> dict[str, Any]:
    message = json.loads(frame)
    if not isinstance(message, dict):
        raise ValueError("a message must be an object")
    return message


def _receive_timeout(descriptor: int, seconds: float) -> None:
    # on the descriptor, not by settimeout: multiprocessing's Connection reads the bare descriptor, which must block
    with _duplicate(descriptor) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def _hang_up(connection: Connection) -> None:
    # closing alone would neither wake the thread that reads nor tell the peer while it does
    with contextlib.suppress(OSError), _duplicate(connection.fileno()) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def _duplicate(descriptor: int) -> socket.socket:
    return socket.socket(fileno=os.dup(descriptor))

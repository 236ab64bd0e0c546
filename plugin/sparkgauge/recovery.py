"""The driver's part in a stage that Spark may run again: who belongs to the current attempt, and where it goes on.

Spark runs a barrier stage that lost a task again as a whole. Its tasks are not told that they are a second attempt, so
the driver counts: an attempt begins with the first executor that comes back, or that comes after another one has gone.
When all are there they are told the attempt's number, under which they meet, and the checkpoint to go on from.
"""

from __future__ import annotations

import base64
import shutil
import time
from pathlib import Path
from typing import Any

from sparkgauge.channel import DriverChannel
from sparkgauge.checkpoints import HadoopFolder, is_uri
from sparkgauge.errors import DataError
from sparkgauge.executor import PART_BYTES
from sparkgauge.job import Job

REJOIN_SECONDS = 60.0
"""Given to Spark to run the stage again: a killed executor is back in 3-4 s on a quiet machine."""

Message = dict[str, Any]


class Attempts:
    """The attempts of one round's stage."""

    def __init__(self, job: Job, channel: DriverChannel, spark_context: Any) -> None:
        """Begin with attempt 0; DataError where the checkpoints' file system cannot be reached."""
        assert job.recovery is not None
        self.number = 0
        """How often the stage has been run again."""
        self.notes: list[str] = []
        """What happened, for the round's record."""
        self._recovery, self._executors, self._channel = job.recovery, job.executors, channel
        self._links: dict[int, int] = {}
        self._met = False
        self._broken_since: float | None = None
        self._latest, self._latest_step = "", 0
        self._parts: dict[str, list[bytes]] = {}
        folder = job.recovery.folder
        self._hadoop = HadoopFolder(spark_context, folder) if is_uri(folder) else None

    @property
    def left(self) -> int:
        """Return how often the stage may still be run again."""
        return self._recovery.retries - self.number

    @property
    def used_up(self) -> bool:
        """Return whether retries were allowed, and none is left."""
        return self._recovery.retries > 0 and self.left <= 0

    def overdue(self, broken: bool) -> bool:
        """Return whether a ``broken`` attempt has waited too long for the next one to begin."""
        if not broken:
            self._broken_since = None
            return False
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        return now - self._broken_since > REJOIN_SECONDS

    def belongs(self, message: Message) -> bool:
        """Return whether ``message`` comes from a process of the current attempt."""
        return bool(self._links.get(int(message["rank"])) == message["link"])

    def begins_another(self, hello: Message, broken: bool) -> bool:
        """Return whether ``hello`` is the first of a further attempt; ``broken``: the current one has lost somebody."""
        return broken or self._met or int(hello["rank"]) in self._links

    def begin(self, why: str) -> None:
        """Begin the next attempt, because of ``why``."""
        self.number += 1
        step = f"the checkpoint after step {self._latest_step}" if self._latest else "the first step"
        self.notes.append(f"{why}; went on from {step}")
        self._links, self._parts, self._met, self._broken_since = {}, {}, False, None

    def enter(self, hello: Message) -> None:
        """Take an executor into the current attempt; the last one to come lets all of them begin."""
        self._links[int(hello["rank"])] = int(hello["link"])
        if len(self._links) == self._executors:
            self._met = True
            for rank in self._links:
                self._channel.send(rank, {"kind": "meet", "attempt": self.number, "checkpoint": self._latest})

    def handle(self, message: Message) -> None:
        """Keep, hand out, or take note of a checkpoint; other messages are none of this class's."""
        kind, name = message["kind"], str(message.get("name", ""))
        if kind == "part":
            self._parts.setdefault(name, []).append(base64.b64decode(message["data"]))
        elif kind == "fetch":
            self._hand_out(int(message["rank"]), name)
        elif kind == "checkpoint":
            if self._hadoop is not None:
                self._hadoop.write(name, b"".join(self._parts.pop(name, [])))
            self._latest, self._latest_step = name, int(message["step"])

    def finish(self) -> None:
        """Remove the checkpoints of a round that has ended well."""
        if self._hadoop is not None:
            self._hadoop.remove()
        elif self._recovery.folder:
            shutil.rmtree(Path(self._recovery.folder), ignore_errors=True)

    def _hand_out(self, rank: int, name: str) -> None:
        try:
            content = self._hadoop.read(name) if self._hadoop is not None else b""
        except DataError as error:
            self._channel.send(rank, {"kind": "failed", "why": str(error)})
            return
        for start in range(0, len(content), PART_BYTES):
            part = base64.b64encode(content[start : start + PART_BYTES]).decode()
            self._channel.send(rank, {"kind": "part", "data": part})
        self._channel.send(rank, {"kind": "fetched"})

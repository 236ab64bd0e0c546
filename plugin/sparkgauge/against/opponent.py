"""This side's end of the conversation with the other side: it asks for rounds and gets them, or the reason why not.

Requests carry a number that their answer repeats. The connection is the one executors use (mutual HMAC challenge, JSON
messages, loopback), so nothing received is ever unpickled.
"""

from __future__ import annotations

import itertools
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkgauge.against.child import (
    GOODBYE_SECONDS,
    Child,
    Mirror,
    collected_paths,
    environment_of,
    forwarded,
    gauge_arguments,
    mirrored_paths,
    write_job,
)
from sparkgauge.against.duel import Duel
from sparkgauge.against.worktree import Checkout, Reference
from sparkgauge.channel import DriverChannel
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import ConfigurationError, GaugeError
from sparkgauge.records import RunRecord

Message = dict[str, Any]

COLLECTION_SECONDS = 180.0
"""Given to the other side to import its tests and say which it has."""
PREPARATION_SECONDS = 600.0
"""Given to it to start its cluster, prepare data and reach the training that is asked for."""
ANSWER_SLACK_SECONDS = 60.0
"""Added to a round's own time limit, which the other side keeps itself."""
POLL_SECONDS = 0.2


class OpponentError(GaugeError):
    """The other side did not start, ended, or fell silent: a fault of the tool or of the commit, no regression."""


class Opponent:
    """The other side of a session: a checkout, a pytest process in it, and what it has answered."""

    def __init__(self, reference: Reference, config: GaugeConfig) -> None:
        self.reference = reference
        self.only_there: list[str] = []
        """Tests that the commit has and the working tree has not."""
        self._config = config
        self._checkout: Checkout | None = None
        self._channel: DriverChannel | None = None
        self._child: Child | None = None
        self._missing: list[str] = []
        self._broken: dict[str, str] = {}
        self._duels: dict[str, Duel] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[int, Message] = {}
        self._first: list[str] = []
        self._has_spoken = False

    def start(self, invocation: Invocation, tests: Sequence[str], known: Sequence[str]) -> None:
        """Check the commit out, start pytest there, and wait until it has collected ``tests``.

        ``known`` are all tests of this side, selected or not; what the commit has beyond them is :attr:`only_there`.
        Raises GaugeError, and leaves nothing behind, where the commit cannot be compared with at all.
        """
        self._checkout = Checkout(self.reference)
        try:
            self._launch(invocation, tests)
            collected = self._await_collected()
        except BaseException:
            self.stop()
            raise
        there = set(collected["tests"])
        self._broken = collected["failed"]
        self._missing = sorted(set(tests) - there)
        if invocation.is_whole:
            self.only_there = sorted(there - set(known))
        if tests and len(self._missing) == len(tests):
            why = "; ".join(f"{name}: {text}" for name, text in self._broken.items()) or f"{len(there)} other tests"
            self.stop()
            raise OpponentError(
                f"None of the selected tests exists at {self.reference.name}",
                actual=why,
                hint="Select tests that both sides have, or name a commit that has them (git log --oneline -- FILE)",
            )

    @property
    def not_there(self) -> str:
        """Return why something that only the working tree has is not compared."""
        return f"not at {self.reference.name} ({self.reference.short})"

    def duel(self, test_id: str) -> Duel:
        """Return the pairs of one test."""
        if test_id not in self._duels:
            self._duels[test_id] = Duel(self, test_id, self._config.seed)
        return self._duels[test_id]

    def has(self, test_id: str) -> bool:
        """Return whether the other side has this test; OpponentError where its file cannot be imported there."""
        if test_id not in self._missing:
            return True
        file = test_id.partition("::")[0]
        if file in self._broken:
            raise self.failure(f"{file} cannot be collected", self._broken[file])
        return False

    def failure(self, summary: str, reason: str) -> OpponentError:
        """Return the error of something that exists on the other side and does not work there."""
        return OpponentError(f"At {self.reference.name} ({self.reference.short}) {summary}", actual=reason)

    def run_of(self, own: RunRecord) -> RunRecord | None:
        """Return the other side's run of the same training; None without rounds."""
        duel = self._duels.get(own.test_id)
        return duel.run(own.label) if duel is not None else None

    def ask(self, kind: str, **content: Any) -> int:
        """Send a request and return its number, for :meth:`answer`."""
        number = next(self._numbers)
        if self._channel is None:
            raise self._error("The other side has been stopped", "no connection")
        self._channel.broadcast({"kind": kind, "number": number, **content})
        return number

    def answer(self, number: int, timeout_seconds: float) -> Message:
        """Return the answer to a request; OpponentError when the other side ends or falls silent first."""
        self._pump(lambda: number in self._answers, timeout_seconds)
        return self._answers.pop(number)

    def header(self, *, own_code: bool) -> list[str]:
        """Return what is said before the tests: the commit, and where either side's code comes from.

        ``own_code`` is whether this side has imported code of the repository beyond its tests.
        """
        reference = self.reference
        lines = [f"sparkgauge: against {reference.name}: {reference.short} {reference.subject}"]
        if self._config.against_python is not None:
            lines.append(f"sparkgauge: {reference.name} runs with {self._config.against_python}")
        if self._first and self._checkout is not None:
            shown = self._sources_shown()
            lines.append(f"sparkgauge: {reference.name} imports first from its own: {', '.join(shown)}")
        if not own_code and self._config.against_python is None:
            lines.append(
                "sparkgauge: the tests have imported no code of this repository but their own files: installed "
                "packages are the same on both sides. Is the code under test among them, name its folder in the ini "
                "option gauge_source, or give the other side its own --gauge-against-python"
            )
        return lines

    def notes(self) -> list[str]:
        """Return what is said after the tests."""
        gone = [f"only at {self.reference.name}, not compared: {test}" for test in self.only_there]
        return [*gone, *(note for duel in self._duels.values() for note in duel.notes())]

    def report(self) -> Mapping[str, Any]:
        """Return this side's knowledge of the other one for the JSON report."""
        return {
            "reference": self.reference.name,
            "commit": self.reference.commit,
            "python": str(self._config.against_python or sys.executable),
            "imports_first": self._sources_shown(),
            "only_there": self.only_there,
            "missing": self._missing,
            "orders": {test: duel.orders for test, duel in self._duels.items()},
            "runs": [run for duel in self._duels.values() for run in duel.runs()],
        }

    def stop(self) -> None:
        """End the other side and remove its checkout; further calls do nothing."""
        if self._channel is not None:
            self._channel.broadcast({"kind": "bye"})
        if self._child is not None:
            self._child.stop(GOODBYE_SECONDS if self._has_spoken else 0.0)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._checkout is not None:
            self._checkout.remove()

    def _launch(self, invocation: Invocation, tests: Sequence[str]) -> None:
        assert self._checkout is not None
        mirror = Mirror(self.reference.root, self._checkout.tree)
        self._first = mirrored_paths(mirror, invocation.search_path, invocation.sources)
        self._channel = channel = DriverChannel()
        job = write_job(
            self._checkout.folder / "serve.json",
            host=channel.address.host,
            port=channel.address.port,
            tests=list(tests),
            root=str(self.reference.root),
            folder=str(self._checkout.folder),
        )
        python = str(self._config.against_python or sys.executable)
        self._child = Child(
            [python, "-m", "pytest", *invocation.command_line(mirror, self._config, tests), "--gauge-serve", str(job)],
            folder=mirror.existing(invocation.folder) or self._checkout.tree,
            environ=environment_of(mirror, invocation.environ, self._first, channel.address.secret_hex),
            log=self._checkout.folder / "output.log",
        )

    def _await_collected(self) -> Message:
        self._pump(lambda: 0 in self._answers, COLLECTION_SECONDS)
        return self._answers.pop(0)

    def _pump(self, done: Any, timeout_seconds: float) -> None:
        """Take in what arrives until ``done``."""
        deadline = time.monotonic() + timeout_seconds
        while not done():
            ended = self._child is None or self._child.status is not None  # before the look at what it said last
            try:
                message = self._channel.inbox.get(timeout=POLL_SECONDS) if self._channel is not None else None
            except queue.Empty:
                message = None
            if message is not None and "answers" in message:
                self._has_spoken = True
                self._answers[int(message["answers"])] = message
            elif ended and message is None:
                raise self._error(f"pytest at {self.reference.name} has ended", self._ending())
            elif time.monotonic() > deadline:
                raise self._error(f"pytest at {self.reference.name} is silent", f"no answer in {timeout_seconds:g} s")

    def _ending(self) -> str:
        status = self._child.status if self._child is not None else None
        return "stopped" if status is None else f"exit status {status}" if status >= 0 else f"signal {-status}"

    def _error(self, summary: str, actual: str) -> OpponentError:
        tail = self._child.tail() if self._child is not None else ""
        hint = f"The end of its output:\n{tail}" if tail else None
        return OpponentError(summary, actual=actual, hint=hint)

    def _sources_shown(self) -> list[str]:
        tree = self._checkout.tree if self._checkout is not None else Path()
        return [str(Path(one).relative_to(tree)) for one in self._first]


class Invocation:
    """How this side's pytest was started, as far as the other side's start depends on it."""

    def __init__(
        self,
        *,
        folder: Path,
        rootdir: Path,
        ini_file: Path | None,
        arguments: Sequence[str],
        paths: Sequence[str],
        search_path: Sequence[str],
        sources: Sequence[Path],
        environ: Mapping[str, str],
    ) -> None:
        self.folder = folder
        """Where pytest was started."""
        self.rootdir = rootdir
        self.ini_file = ini_file
        self.arguments = arguments
        """The command line, with PYTEST_ADDOPTS before it."""
        self.paths = paths
        """What is collected: files, folders, node ids."""
        self.search_path = search_path
        self.sources = sources
        self.environ = environ

    @property
    def is_whole(self) -> bool:
        """Return whether everything in the given paths was collected, so that what is absent does not exist."""
        return not any("::" in path for path in self.paths)

    def command_line(self, mirror: Mirror, config: GaugeConfig, tests: Sequence[str]) -> list[str]:
        """Return the other side's arguments; GaugeError where the commit has none of the test files."""
        rootdir = mirror.existing(self.rootdir) or mirror.tree
        files = [self.rootdir / test.partition("::")[0] for test in tests]
        paths = collected_paths(mirror, [str(self.folder / path) for path in self.paths], files)
        if not paths:
            name = config.against
            raise ConfigurationError(
                f"{name} has none of the test files",
                expected=", ".join(sorted({test.partition("::")[0] for test in tests})),
                actual="no such file there",
                where=f"--gauge-against {name}",
            )
        return [
            *forwarded(self.arguments),
            f"--rootdir={rootdir}",
            *self._ini_arguments(mirror),
            "--maxfail=0",
            "--continue-on-collection-errors",
            "--color=no",
            *gauge_arguments(config),
            *paths,
        ]

    def _ini_arguments(self, mirror: Mirror) -> list[str]:
        if self.ini_file is None:
            return []
        inside = mirror.inside(self.ini_file)
        if inside is None:
            return ["-c", str(self.ini_file)]
        return ["-c", str(inside)] if inside.exists() else []

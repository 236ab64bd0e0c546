"""The other side's end: runs each test as far as it is asked, takes the rounds asked for, and judges nothing."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge.against.child import is_installed
from sparkgauge.against.worktree import remove_checkout
from sparkgauge.channel import ExecutorChannel
from sparkgauge.errors import GaugeError
from sparkgauge.records import Round, to_json

if TYPE_CHECKING:
    from sparkgauge.session import TestGauge
    from sparkgauge.training import Training

Message = dict[str, Any]

ORPHAN_STATUS = 3
"""Exit status when the asking side has gone; nobody reads it but a curious eye on a process list."""


class Abandoned(BaseException):
    """Ends a test that is no longer asked about; no Exception, so that a test's own ``except`` lets it through."""


class Server:
    """Answers the asking side's requests, one after the other, from inside the tests they are about."""

    def __init__(self, channel: ExecutorChannel, *, root: Path, folder: Path) -> None:
        """``root`` is the repository whose checkout lies in ``folder``."""
        self._channel, self._root, self._folder = channel, root, folder
        self._requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._next: Message | None = None
        threading.Thread(target=self._listen, name="sparkgauge-serve", daemon=True).start()

    def collected(self, tests: Collection[str], failed: dict[str, str]) -> None:
        """Say which tests there are, and which files could not be collected and why."""
        self._channel.send("collected", answers=0, tests=sorted(tests), failed=failed)

    def is_asked_for(self, test_id: str, later: Collection[str]) -> bool | None:
        """Return whether the next request is about ``test_id`` rather than a later test; None when all is done."""
        while True:
            request = self._peek()
            if request["kind"] == "bye":
                return None
            if request["test_id"] == test_id:
                return True
            if request["test_id"] in later:
                return False
            self._refuse("the other side has left this test, or never had it")

    def settle(self, test: TestGauge) -> None:
        """Serve the trainings of ``test`` made so far, until another is asked for; Abandoned when the test is over.

        Every training has a round afterwards, so that what the test does next finds a measurement.
        """
        for training in test.trainings:
            if not training.rounds:
                test.session.prepare(training.workload)
        while (asked := self._training_asked_for(test)) is not None:
            self._serve(test, asked)
        for training in test.trainings:
            if not training.rounds:
                self._take(test, training, training.next_seed(), 0)

    def finish(self, test_id: str, test: TestGauge | None, *, reason: str, failed: bool) -> None:
        """Serve what a test has measured after its code has run; ``reason`` says why it made no more trainings."""
        while self._is_about(test_id):
            training = test.training(str(self._peek()["label"])) if test is not None else None
            if test is not None and training is not None and training.rounds:
                self._serve(test, training)
            else:
                self._refuse(reason, failed=failed)

    def _training_asked_for(self, test: TestGauge) -> Training | None:
        if not self._is_about(test.test_id):
            raise Abandoned
        return test.training(str(self._peek()["label"]))

    def _is_about(self, test_id: str) -> bool:
        request = self._peek()
        return bool(request["kind"] != "bye" and request["test_id"] == test_id)

    def _serve(self, test: TestGauge, training: Training) -> None:
        request = self._peek()
        try:
            content = self._answer_to(request, test, training)
        except GaugeError as error:
            self._refuse(str(error), failed=True)
            return
        self._next = None
        self._channel.send(request["kind"], answers=request["number"], **content)

    def _answer_to(self, request: Message, test: TestGauge, training: Training) -> Message:
        if request["kind"] == "prepare":
            self._check_imports()
            return {"run": to_json(replace(test.describe(training), rounds=()))}
        return {"round": to_json(self._take(test, training, int(request["seed"]), int(request["index"])))}

    def _take(self, test: TestGauge, training: Training, seed: int, index: int) -> Round:
        taken: list[Round] = []

        def take() -> Round:
            taken.append(test.session.run_round(training.workload, seed, index, index + 1))
            return taken[-1]

        test.timer(training.label, training.workload, take, 1, 0)
        training.rounds.append(taken[-1])
        training.timed = True
        return taken[-1]

    def _check_imports(self) -> None:
        """Raise GaugeError where this side runs code of the working tree: it would be compared with itself."""
        stray = sorted(name for name, module in list(sys.modules.items()) if self._is_stray(module))
        if stray:
            raise GaugeError(
                "the checkout's tests import the working tree's code",
                actual=", ".join(stray[:5]),
                hint="Name the folders of that code in the ini option gauge_source.",
            )

    def _is_stray(self, module: Any) -> bool:
        file = getattr(module, "__file__", None)
        if not isinstance(file, str):
            return False
        path = Path(file)
        return not is_installed(path) and path.is_relative_to(self._root) and not path.is_relative_to(self._folder)

    def _refuse(self, reason: str, *, failed: bool = False) -> None:
        request, self._next = self._peek(), None
        self._channel.send("failed" if failed else "absent", answers=request["number"], reason=reason)

    def _peek(self) -> Message:
        if self._next is None:
            self._next = self._requests.get()
        return self._next

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._requests.put(message)
                if message["kind"] == "bye":
                    return
        except (OSError, EOFError, ValueError):
            # The asking side died without a word: so do we, wherever the tests are. The guard ends our cluster.
            remove_checkout(self._root, self._folder)
            os._exit(ORPHAN_STATUS)

"""What pytest calls on either side of ``--gauge-against``; registered only where the option is given."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sparkgauge.against.child import SECRET_VARIABLE, has_own_code
from sparkgauge.against.worktree import Reference, find_reference
from sparkgauge.errors import ConfigurationError, GaugeError

if TYPE_CHECKING:
    from sparkgauge.against.opponent import Opponent
    from sparkgauge.against.server import Server
    from sparkgauge.session import GaugeSession, TestGauge

SessionOf = Callable[[pytest.Config], "GaugeSession"]
IsOurs = Callable[[pytest.Item], bool]


def register(config: pytest.Config, session_of: SessionOf, is_ours: IsOurs) -> None:
    """Register the asking side (``--gauge-against``) or the one that serves it; ConfigurationError for a bad commit."""
    plugin: AskingSide | ServingSide
    if config.option.gauge_serve:
        plugin = ServingSide(config.option.gauge_serve, session_of)
    else:
        if hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None):
            raise ConfigurationError(
                "--gauge-against takes rounds of both sides in turn", expected="one process", actual="pytest-xdist"
            )
        reference = find_reference(str(config.option.gauge_against), config.rootpath)
        plugin = AskingSide(reference, session_of, is_ours)
    config.pluginmanager.register(plugin, "sparkgauge-against")


class AskingSide:
    """The session that the user started."""

    def __init__(self, reference: Reference, session_of: SessionOf, is_ours: IsOurs) -> None:
        self._reference, self._session_of, self._is_ours = reference, session_of, is_ours
        self._opponent: Opponent | None = None
        self._known: list[str] = []
        self._has_own_code = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the names of all tests, before any is deselected."""
        self._known = [item.nodeid for item in items]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Check the commit out and start pytest in it, before anything is trained here."""
        config = session.config
        tests = [item.nodeid for item in session.items if self._is_ours(item)]
        if config.option.collectonly or not tests:
            return
        files = {item.path.resolve() for item in session.items}
        self._has_own_code = has_own_code(self._reference.root, list(sys.modules.values()), files)
        try:
            self._start(config, tests)
        except GaugeError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(tryfirst=True)  # pytest prints the last answer first
    def pytest_report_collectionfinish(self) -> list[str]:
        """Say what is compared with."""
        return self._opponent.header(own_code=self._has_own_code) if self._opponent is not None else []

    def pytest_sessionfinish(self) -> None:
        """End the other side and remove its checkout."""
        self._stop()

    def pytest_unconfigure(self) -> None:
        """Do the same where pytest ends without finishing its session."""
        self._stop()

    def _start(self, config: pytest.Config, tests: list[str]) -> None:
        from sparkgauge.against.opponent import Invocation, Opponent

        gauge = self._session_of(config)
        opponent = Opponent(self._reference, gauge.config)
        invocation = Invocation(
            folder=config.invocation_params.dir,
            rootdir=config.rootpath,
            ini_file=config.inipath,
            arguments=[*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *map(str, config.invocation_params.args)],
            paths=config.args,
            search_path=sys.path,
            sources=[config.rootpath / source for source in config.getini("gauge_source")],
            environ=os.environ,
        )
        opponent.start(invocation, tests, self._known)
        self._opponent = gauge.opponent = opponent

    def _stop(self) -> None:
        if self._opponent is not None:
            self._opponent.stop()


class ServingSide:
    """The session in the checkout, which the other one started."""

    def __init__(self, job_file: str, session_of: SessionOf) -> None:
        self._job = json.loads(Path(job_file).read_text())
        self._session_of = session_of
        self._failed: dict[str, str] = {}
        self._later: list[str] = []
        self._current: str | None = None
        self._server = self._connect()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep why a file could not be imported."""
        if report.failed:
            self._failed[report.nodeid] = (str(report.longrepr).strip().splitlines() or ["no reason"])[-1]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Say which tests there are, and keep those of the asking side in its order."""
        session = self._session_of(config)
        session.server = self._server
        by_name = {item.nodeid: item for item in items}
        wanted = [name for name in self._job["tests"] if name in by_name]
        items[:] = [by_name[name] for name in wanted]
        self._later = list(wanted)
        self._server.collected(by_name.keys(), self._failed)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Run a test only when it is asked for."""
        self._later = [name for name in self._later if name != item.nodeid]
        asked = self._server.is_asked_for(item.nodeid, self._later)
        if asked is None:
            item.session.shouldstop = "the other side is done"
        if not asked:
            pytest.skip("not asked for")
        self._current = item.nodeid

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Once a test's code has run, serve what it has measured until a later one is asked for."""
        report = yield
        over = call.when == "call" or (call.when == "setup" and call.excinfo is not None)
        if over and self._current == item.nodeid:
            self._current = None
            self._server.finish(item.nodeid, _gauge_of(item), **_ending(report, call))
        return report

    def _connect(self) -> Server:
        from sparkgauge.against.server import Server
        from sparkgauge.channel import Address, ExecutorChannel

        secret = os.environ.pop(SECRET_VARIABLE, "")
        channel = ExecutorChannel(Address(self._job["host"], self._job["port"], secret), rank=0)
        return Server(channel, root=Path(self._job["root"]), folder=Path(self._job["folder"]))


def _gauge_of(item: pytest.Item) -> TestGauge | None:
    from sparkgauge.plugin import TEST

    return item.stash.get(TEST, None)


def _ending(report: pytest.TestReport, call: pytest.CallInfo[None]) -> dict[str, Any]:
    """Return why a test makes no more trainings, and whether that is a failure."""
    if call.excinfo is None:
        return {"reason": "the test there has no such training", "failed": False}
    text = call.excinfo.exconly()
    return {"reason": text, "failed": report.outcome != "skipped"}

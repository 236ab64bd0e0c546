"""The pytest plugin: hooks and fixtures, nothing else. What they do lives in the modules they call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from sparkgauge import config as options
from sparkgauge.errors import ConfigurationError, GaugeError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sparkgauge.cluster.spark import SparkCluster
    from sparkgauge.data.dataset import Dataset
    from sparkgauge.gpu import Gpu
    from sparkgauge.report.baseline_notes import Collected
    from sparkgauge.session import GaugeSession, TestGauge
    from sparkgauge.training import BaselineView, Training

SESSION = pytest.StashKey["GaugeSession"]()
TEST = pytest.StashKey["TestGauge"]()
ITEMS = pytest.StashKey[list[pytest.Item]]()
VANISHED = pytest.StashKey[list[str]]()

VANISHED_FAIL = "the session fails: what has a baseline was not measured (--gauge-no-require-baseline lets it pass)"

FIXTURES = frozenset({"train", "trained", "baseline", "spark_session", "spark_cluster", "cifar10"})
"""A test that asks for one of these is ours: only then is data looked for and something printed."""

MARKERS = (
    "gauge(framework, model, device, executors, epochs|iterations, batch_size, rounds, ...): the training that the "
    "fixture `trained` runs on Spark executors and times; keywords as for `train(...)`",
    "gpu: needs a GPU; added by gauge(device='gpu')",
    "cpu: trains on the CPU; added by gauge(device='cpu')",
)

UNUSED_BENCHMARK = "ignore:Benchmark fixture was not used at all:pytest.PytestWarning"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the ``--gauge-...`` options and their ini twins."""
    options.add_options(parser)
    parser.getgroup("sparkgauge").addoption("--gauge-serve", help=argparse.SUPPRESS)
    parser.addini("gauge_source", "Folders whose code the tests measure, for --gauge-against.", type="args")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and check the options, so that a bad one ends the run before collection."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    config.pluginmanager.register(_CrashesInJunit(config), "sparkgauge-crashes")
    try:
        options.check(config.getoption, config.getini, os.environ)
        if config.option.gauge_against or config.option.gauge_serve:
            from sparkgauge.against import hooks

            hooks.register(config, _session, _is_ours)
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Add the marker ``gpu`` or ``cpu`` to a test by the device it trains on, so that ``-m gpu`` selects it.

    A test of ours that fails before it trains has its own error: pytest-benchmark need not warn that nothing was timed.
    """
    if _is_ours(item):
        item.add_marker(pytest.mark.filterwarnings(UNUSED_BENCHMARK))
    marker = item.get_closest_marker("gauge")
    if marker is not None:
        device = marker.kwargs.get("device", "cpu")
        if device in ("gpu", "cpu"):
            item.add_marker(device)


@pytest.hookimpl(tryfirst=True)  # before the terminal's, which asks for the header
def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what is going to run: a stored baseline whose test is not among it may be nobody's any more."""
    session.config.stash[ITEMS] = list(session.items)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say what the tests of this session are measured with; nothing where none of them is ours."""
    if config.option.collectonly or not any(_is_ours(item) for item in items):
        return []
    from sparkgauge.report.header import header_lines

    try:
        return header_lines(_session(config), has_other_spark_fixtures=config.pluginmanager.hasplugin("spark"))
    except GaugeError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where there is none, with the reason; fail with ``--gauge-require gpu``."""
    if item.get_closest_marker("gpu") is not None:
        _check_gpu(item.config)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """After the test's own code: run trainings nobody looked at, store baselines, turn open verdicts into a skip."""
    __tracebackhide__ = True
    result = yield
    if (gauge := pyfuncitem.stash.get(TEST, None)) is not None:
        gauge.settle()
        gauge.finish(passed=True)
        if open_verdicts := gauge.open_verdicts():
            pytest.skip(f"not a pass: {open_verdicts}")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the verdicts into the item's properties: JUnit XML takes those that the teardown's report still has."""
    gauge = item.stash.get(TEST, None) if call.when == "call" else None
    told = None if call.excinfo is None else _told(call.excinfo, item.config)
    if gauge is not None:
        item.user_properties.extend(gauge.properties())
    report = yield
    if told is not None:
        report.longrepr = told
    if gauge is not None:
        is_error = report.failed and not (call.excinfo and call.excinfo.errisinstance(AssertionError))
        gauge.session.outcomes[item.nodeid] = "error" if is_error else report.outcome
        if is_error and call.excinfo is not None:
            _note_crash(gauge.session, report, call.excinfo.value)
    return report


def pytest_assertrepr_compare(left: object, right: object) -> list[str] | None:
    """Explain a failed gate with its numbers: expected, actual, interval, limit, baseline file, next command."""
    from sparkgauge.gate import explain_comparison

    return explain_comparison(left, right)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of everything that was measured."""
    session = config.stash.get(SESSION, None)
    vanished = config.stash.get(VANISHED, [])
    if session is not None and session.runs:
        from sparkgauge.report.summary import write_summary

        verbose = config.get_verbosity() > 0
        write_summary(terminalreporter, session, verbose=verbose, collected=_collected(config, terminalreporter))
    elif vanished:
        terminalreporter.section("sparkgauge")
        for line in vanished:
            terminalreporter.write_line(line)
    if vanished:
        terminalreporter.write_line(VANISHED_FAIL, red=True)


@pytest.hookimpl(trylast=True)  # after the tear-down of a test that was interrupted: its rounds belong in the report
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the cluster, fail where tests with baselines have vanished, and write the JSON report."""
    config = session.config
    if _may_have_vanished(config):
        _fail_on_vanished(session)
    gauge = config.stash.get(SESSION, None)
    if gauge is None:
        return
    gauge.stop()
    if gauge.crashed:
        from sparkgauge.report.crash import exit_status

        session.exitstatus = exit_status(int(session.exitstatus), len(gauge.crashed), session.testsfailed)
    if gauge.config.report_file is not None:
        from sparkgauge.report.run_json import write_session_report

        write_session_report(gauge.config.report_file, gauge)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the cluster where pytest ends without finishing its session."""
    if (gauge := config.stash.get(SESSION, None)) is not None:
        gauge.stop()


@pytest.fixture
def train(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Training]:
    """Return ``train(framework, model, *, label=None, **keywords) -> Training``; keywords as in marker ``gauge``."""
    gauge = _test_gauge(request, benchmark)

    def train(
        framework: str | None = None, model: str | None = None, *, label: str | None = None, **keywords: Any
    ) -> Training:
        __tracebackhide__ = True
        given = {"framework": framework, "model": model, **keywords}
        return gauge.train(given, label=label, where=f"train(...) of {request.node.nodeid}")

    return train


@pytest.fixture
def trained(request: pytest.FixtureRequest, benchmark: Any) -> Training:
    """Return the training of the test's ``gauge`` marker; its rounds run when a result is first asked for."""
    marker = request.node.get_closest_marker("gauge")
    where = f"@pytest.mark.gauge(...) of {request.node.nodeid}"
    if marker is None or marker.args:
        actual = "no marker" if marker is None else f"positional arguments {marker.args!r}"
        raise ConfigurationError(
            "The fixture `trained` needs a training", expected="keywords in the marker", actual=actual, where=where
        )
    return _test_gauge(request, benchmark).train(marker.kwargs, where=where)


@pytest.fixture
def baseline(request: pytest.FixtureRequest, benchmark: Any) -> BaselineView:
    """Return the stored quantities of this test: ``.runtime``, ``.accuracy``, ``.speedup``, ``["label"]``."""
    return _test_gauge(request, benchmark).baseline


@pytest.fixture(scope="session")
def spark_cluster(pytestconfig: pytest.Config) -> SparkCluster:
    """Return the session's Spark cluster, its executors registered."""
    return _session(pytestconfig).cluster()


@pytest.fixture
def spark_session(spark_cluster: SparkCluster) -> SparkSession:
    """Return the ``SparkSession`` on the session's cluster; do not stop it."""
    spark_cluster.ensure_alive()
    return spark_cluster.spark


@pytest.fixture(scope="session")
def cifar10(pytestconfig: pytest.Config) -> Dataset:
    """Return CIFAR-10 prepared for executors (see ``--gauge-data``)."""
    return _session(pytestconfig).dataset()


@pytest.fixture(scope="session")
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine, in index order; empty without any."""
    from sparkgauge import gpu

    return gpu.detect()


class _CrashesInJunit:
    """Makes JUnit call a crash of the tool an error: pytest calls whatever happens in a test's code a failure."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)  # after the JUnit file's own plugin
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Change the entry of a report that :func:`_note_crash` has marked."""
        # of set-up and teardown pytest says error itself, and closes the entry
        if report.when == "call" and getattr(report, "sparkgauge_crashed", False):
            from sparkgauge.report.crash import mark_as_error

            mark_as_error(self._config, report)


def _told(excinfo: pytest.ExceptionInfo[BaseException], config: pytest.Config) -> Any:
    """Return how an error of ours is printed, None for pytest's own way."""
    if not isinstance(excinfo.value, GaugeError) or config.getoption("fulltrace"):
        return None
    from sparkgauge.report.failures import told

    return told(excinfo, config.getoption("tbstyle"))


def _note_crash(session: GaugeSession, report: pytest.TestReport, error: BaseException) -> None:
    from sparkgauge.report.crash import is_crash

    if is_crash(error):
        session.crashed.append(report.nodeid)
        report.sparkgauge_crashed = True  # type: ignore[attr-defined]


def _check_gpu(config: pytest.Config) -> None:
    from sparkgauge import gpu

    gauge = _session(config).config
    if gauge.trains_here and not gpu.detect():
        why = f"needs a GPU: {gpu.why_none()}"
        if "gpu" in gauge.required:
            pytest.fail(f"{why} (--gauge-require gpu)", pytrace=False)
        pytest.skip(why)


def _may_have_vanished(config: pytest.Config) -> bool:
    """Return whether this session collected tests, and baselines lie where they are looked for."""
    if config.option.collectonly or hasattr(config, "workerinput") or ITEMS not in config.stash:
        return False
    named = config.getoption("gauge_baselines") or config.getini("gauge_baselines")
    return bool(named) or config.rootpath.joinpath(options.BASELINES_FOLDER).is_dir()


def _fail_on_vanished(session: pytest.Session) -> None:
    """Keep the lines on vanished tests for the summary, and turn a session that would pass into one that fails."""
    from sparkgauge.report.baseline_notes import vanished_tests

    config = session.config
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return
    try:
        gauge = _session(config)
        if gauge.runs or gauge.config.trains_here:  # the class of somebody else's machines is asked of its executors
            config.stash[VANISHED] = vanished_tests(gauge, _collected(config, reporter))
    except GaugeError:
        return  # no Java, a bad folder: nothing is known of this machine's baselines, and nothing was trained
    if config.stash.get(VANISHED, []):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _collected(config: pytest.Config, reporter: pytest.TerminalReporter) -> Collected:
    from sparkgauge.report.baseline_notes import collected_by

    items = config.stash.get(ITEMS, [])
    ours = [item.nodeid for item in items if _is_ours(item)]
    return collected_by(config, [item.nodeid for item in items], ours, reporter.stats)


def _is_ours(item: pytest.Item) -> bool:
    return not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def _session(config: pytest.Config) -> GaugeSession:
    """Return the session's state, made at first use."""
    if SESSION not in config.stash:
        from sparkgauge.report.progress import Progress
        from sparkgauge.report.terminal import UncapturedStream
        from sparkgauge.session import GaugeSession

        gauge_config = options.GaugeConfig.build(
            config.getoption,
            config.getini,
            os.environ,
            rootdir=config.rootpath,
            invocation_folder=config.invocation_params.dir,
        )
        quiet = gauge_config.ci or config.get_verbosity() < 0
        progress = Progress(UncapturedStream(config), enabled=not quiet)
        wants_gpus = any(item.get_closest_marker("gpu") for item in config.stash.get(ITEMS, []))
        config.stash[SESSION] = GaugeSession(gauge_config, config.rootpath, progress, wants_gpus=wants_gpus)
    return config.stash[SESSION]


def _test_gauge(request: pytest.FixtureRequest, benchmark: Any) -> TestGauge:
    """Return what the requesting test measures with, one for all its fixtures."""
    node = request.node
    if TEST not in node.stash:
        from sparkgauge.benchmarking import BenchmarkTimer

        gauge = _session(request.config).test(node.nodeid, BenchmarkTimer(benchmark))
        node.stash[TEST] = gauge
        node.addfinalizer(lambda: gauge.finish(passed=False))
    found: TestGauge = node.stash[TEST]
    return found

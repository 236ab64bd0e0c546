"""Whole pytest sessions in processes of their own, as a user starts them, and what they left; made-up records.

pytester's subprocess mode lives as long as one test; these sessions start a Spark cluster, so one serves many tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import sparkgauge
from plugin.tests.processes import heed_interrupts
from sparkgauge import environment, gpu
from sparkgauge.channel import Address
from sparkgauge.cluster import watchdog
from sparkgauge.config import GaugeConfig
from sparkgauge.data.dataset import Dataset
from sparkgauge.job import Job
from sparkgauge.records import DataIdentity, Environment, ExecutorRecord, PhaseSeconds, Round, RunRecord
from sparkgauge.workload import Workload

PACKAGE_ROOT = Path(sparkgauge.__file__).parents[1]
LIMIT_SECONDS = 240.0
"""Far above what a session takes: a hang must fail here, not at the CI's own limit."""

HEAVY = ("torch", "tensorflow", "pyspark", "scipy", "matplotlib", "numpy")
"""What loading the plugin must not import."""

RECORDER = '''
"""Writes every test report as a line of JSON, and at the end what was imported and which cluster there was."""

import json
import os
import sys
import time

import pytest

FOLDER = os.environ["RECORDER_FOLDER"]
IN_WORKER = False


def _append(name, value):
    with open(os.path.join(FOLDER, name), "a") as file:
        file.write(json.dumps(value) + "\\n")


def pytest_configure(config):
    global IN_WORKER
    IN_WORKER = hasattr(config, "workerinput")  # xdist's workers send their reports to the main process


def pytest_runtest_logreport(report):
    if IN_WORKER:
        return
    _append("reports.jsonl", {
        "test": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "text": report.longreprtext or str(report.longrepr or ""),
        "properties": dict(report.user_properties),
        "time": time.time(),
    })


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    from sparkgauge.plugin import SESSION

    session = item.config.stash.get(SESSION, None)
    if session is not None and session._cluster is not None:
        _append("marks.jsonl", session._cluster.mark)


def pytest_unconfigure():
    if not IN_WORKER:
        _append("modules.jsonl", sorted(sys.modules))
'''


@dataclass(frozen=True)
class Report:
    """One phase of one test of an inner session."""

    test: str
    when: str
    outcome: str
    text: str
    properties: dict[str, str]
    time: float


@dataclass(frozen=True)
class Finished:
    """What an inner session printed and left."""

    status: int
    output: str
    """Standard output and error together."""
    folder: Path
    """Where it wrote: reports, ``junit.xml``, ``gauge.json``, ``benchmark.json``."""

    @cached_property
    def reports(self) -> list[Report]:
        """Return every report in order."""
        return [Report(**value) for value in self._lines("reports.jsonl")]

    @cached_property
    def modules(self) -> set[str]:
        """Return the modules that the session's process had imported at its end."""
        return set(self._lines("modules.jsonl")[-1])

    @property
    def heavy_modules(self) -> list[str]:
        """Return those of :data:`HEAVY` that were imported."""
        return [name for name in HEAVY if name in self.modules]

    @property
    def marks(self) -> set[str]:
        """Return the marks of the clusters that ran."""
        return set(self._lines("marks.jsonl"))

    def report(self, name: str, when: str = "call") -> Report:
        """Return one phase of the test with the id or the name ``name``."""
        found = [one for one in self.reports if one.when == when and name in (one.test, one.test.rpartition("::")[2])]
        assert len(found) == 1, f"{len(found)} reports of {name}:\n{self.output}"
        return found[0]

    def text(self, name: str) -> str:
        """Return what a failed test said, which must not be an error of set-up or teardown."""
        report = self.report(name)
        assert report.outcome == "failed", f"{name} {report.outcome}\n{self.output}"
        return report.text

    def passed(self, *names: str) -> bool:
        """Return whether all the named tests passed."""
        return [self.report(name).outcome for name in names] == ["passed"] * len(names)

    def json(self, name: str) -> Any:
        """Return a JSON file that the session wrote."""
        return json.loads((self.folder / name).read_text())

    @cached_property
    def junit(self) -> dict[str, ElementTree.Element]:
        """Return JUnit's elements by the test's name; pytest gives none to a test that was interrupted."""
        tree = ElementTree.parse(self.folder / "junit.xml")
        return {case.attrib["name"]: case for case in tree.iter("testcase") if "name" in case.attrib}

    def leftovers(self) -> list[watchdog.Process]:
        """Return the processes of the session's clusters that still run."""
        return [process for mark in self.marks for process in watchdog.marked_processes(mark)]

    def _lines(self, name: str) -> list[Any]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Project:
    """A user's repository, in which sessions are started."""

    folder: Path
    cache: Path
    """Prepared data, shared by sessions."""

    def write(self, **files: str) -> Project:
        """Write ``NAME.py`` for every keyword and return the project."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.folder / f"{name}.py").write_text(text)
        return self

    @property
    def baselines(self) -> dict[str, Path]:
        """Return the stored baselines by file name."""
        return {path.name: path for path in (self.folder / "baselines").glob("*/*.json")}

    def run(self, *arguments: str, name: str, environ: Mapping[str, str | None] | None = None) -> Finished:
        """Return the finished session ``pytest ARGUMENTS``; ``environ`` sets variables, None removes one."""
        process = self.start(*arguments, name=name, environ=environ)
        try:
            status = process.wait(LIMIT_SECONDS)
        finally:
            process.kill()  # the guard takes the cluster down where it still ran
            process.wait()
        return self.finished(name, status)

    def start(
        self, *arguments: str, name: str, environ: Mapping[str, str | None] | None = None
    ) -> subprocess.Popen[bytes]:
        """Return the running session; its output goes to a file, for :meth:`finished`."""
        out = self._out(name)
        (out / "tmp").mkdir(parents=True)
        (out / "recorder.py").write_text(RECORDER)
        with open(out / "output", "wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", *plugin_arguments(), "-p", "recorder", *arguments],
                cwd=self.folder,
                env=self._environment(out, environ or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # SIGINT reaches it alone
                preexec_fn=heed_interrupts,
            )

    def finished(self, name: str, status: int) -> Finished:
        """Return what the session ``name``, which ended with ``status``, left."""
        out = self._out(name)
        return Finished(status, (out / "output").read_text(errors="replace"), out)

    def _out(self, name: str) -> Path:
        return self.folder.parent / f"{self.folder.name}-{name}"

    def _environment(self, out: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
        # Variables that steer pytest or the plugin are the tests' own to set.
        foreign = ("CI", "SPARKGAUGE_", "PYTEST_", "CUDA_VISIBLE_DEVICES")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = [str(out), *map(os.path.abspath, inherited)]
        wanted: dict[str, str | None] = {
            **kept,
            "COLUMNS": "120",
            "PYTHONPATH": os.pathsep.join(path),
            "RECORDER_FOLDER": str(out),
            "TMPDIR": str(out / "tmp"),
            "XDG_CACHE_HOME": str(self.cache),
            **changes,
        }
        return {name: value for name, value in wanted.items() if value is not None}


def plugin_arguments() -> list[str]:
    """Return how to load the plugin: nothing where it is installed, by name in a checkout."""
    names = {point.name for point in metadata.entry_points(group="pytest11")}
    return ["-p", "no:cacheprovider", *([] if "sparkgauge" in names else ["-p", "sparkgauge.plugin"])]


def hardware_class() -> str:
    """Return the folder in which a session on this machine looks for baselines."""
    return environment.capture(os.environ, gpus=[one.name for one in gpu.detect()]).hardware_class


def make_job(dataset: Dataset | None = None, **changes: Any) -> Job:
    """Return a job of a few steps on two executors of this host, without data where ``dataset`` is None."""
    job = Job(
        address=Address("", 0, ""),
        executors=2,
        model="custom",
        device="cpu",
        iterations=3,
        epochs=None,
        global_batch=100,
        test_every=None,
        seed=1,
        dataset_folder="" if dataset is None else str(dataset.folder),
        train_count=100 if dataset is None else dataset.train_count,
        threads=1,
        loopback=True,
    )
    return replace(job, **changes)


def make_round(
    *, seed: int = 1, runtime_seconds: float = 2.0, accuracy_fraction: float = 0.5, launch_seconds: float = 1.0
) -> Round:
    """Return a made-up round of two executors."""
    phases = PhaseSeconds(launch=launch_seconds, compute=max(0.0, runtime_seconds - launch_seconds))
    executors = tuple(ExecutorRecord(rank, "host", phases, (0.1, 0.1), 150, 1000, 0.5) for rank in range(2))
    return Round(seed, runtime_seconds, accuracy_fraction, 1500.0, executors, (), 0.5, "2026-01-01T00:00:00+00:00")


def make_workload(**keywords: Any) -> Workload:
    """Return a workload of a built-in model in profile smoke."""
    return Workload.from_keywords({"model": "cifar10_quick", "executors": 2, **keywords}, make_config())


def make_config(**changes: Any) -> GaugeConfig:
    """Return the configuration of a session with two executors in profile smoke."""
    given = {"gauge_profile": "smoke", "gauge_executors": "2"}
    return replace(GaugeConfig.build(given.get, lambda name: None, {}), **changes)


def make_run(*, label: str = "trained", rounds: tuple[Round, ...] | None = None) -> RunRecord:
    """Return a made-up run on synthetic data."""
    return RunRecord(
        test_id="test_file.py::test_a",
        label=label,
        workload=make_workload().to_dict(),
        profile="smoke",
        data=DATA,
        environment=MACHINE,
        commit="",
        rounds=rounds or (make_round(),),
    )


DATA = DataIdentity("cifar10", "synthetic", "0" * 64, 10_000, 2_000)
MACHINE = Environment("a-machine", "A CPU", 2, 2**33, (), "an OS", {"python": "3.11"})

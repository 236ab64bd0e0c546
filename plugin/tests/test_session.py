"""What a test measures with, on made-up rounds: labels, order, baselines, and which functions travel. No Spark."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pyspark import cloudpickle

from plugin.tests.caffe_nets import write_project
from plugin.tests.plugin_runs import DATA, MACHINE, make_config, make_round
from sparkgauge import efficiency, speedup
from sparkgauge import session as sessions
from sparkgauge.config import GaugeConfig
from sparkgauge.data import Dataset
from sparkgauge.errors import BaselineError, ClusterError, ConfigurationError, MachineError, NotMeasuredError
from sparkgauge.records import Round, RunRecord
from sparkgauge.report.progress import Progress
from sparkgauge.session import GaugeSession, TestGauge
from sparkgauge.training import pick_label
from sparkgauge.workload import Workload

TEST_ID = "test_file.py::test_a"
RUNTIMES = (2.00, 2.02, 1.98, 2.01, 1.99, 2.00, 2.02, 1.98)


class Session(GaugeSession):
    """A session whose rounds are made up: model ``cifar10_tutorial`` takes twice as long."""

    environment = MACHINE  # type: ignore[assignment]
    commit = "abc"  # type: ignore[assignment]

    def __init__(self, config: GaugeConfig) -> None:
        super().__init__(config, Path(), Progress(io.StringIO(), enabled=False))
        self.taken: list[tuple[str, int]] = []
        self.prepared: list[int] = []
        """How many rounds had been taken at each preparation."""

    def dataset(self, source: str | None = None) -> Dataset:
        return Dataset(Path(), DATA, "", DATA.train_count, DATA.test_count)

    def prepare(self, workload: Workload) -> None:
        self.prepared.append(len(self.taken))

    def time_reference(self, workload: Workload) -> tuple[float, ...]:
        return (0.1, 0.1)

    def run_round(self, workload: Workload, seed: int, index: int, planned: int) -> Round:
        self.taken.append((workload.model, seed))
        factor = 2.0 if workload.model == "cifar10_tutorial" else 1.0
        return make_round(seed=seed, runtime_seconds=factor * RUNTIMES[index])


class Timer:
    """A timer that only takes the rounds."""

    is_enabled = True

    def __init__(self) -> None:
        self.extra: list[str] = []
        self.described: list[tuple[str, str]] = []

    def __call__(
        self,
        label: str,
        workload: Workload,
        take: Callable[[], Round],
        rounds: int,
        warmup_rounds: int,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        for _ in range(rounds + warmup_rounds):
            before()
            take()
        return True

    def add(self, label: str, extra: Round) -> None:
        self.extra.append(label)

    def leave_out(self, label: str, rounds: Sequence[Round]) -> None:
        pass

    def describe(self, run: RunRecord, status: str) -> None:
        self.described.append((run.label, status))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TestGauge]:
    def make(**changes: Any) -> TestGauge:
        return Session(make_config(baselines_folder=tmp_path, **changes)).test(TEST_ID, Timer())

    return make


def quick(gauge: TestGauge, **keywords: Any) -> Any:
    label = keywords.pop("label", None)
    return gauge.train({"model": "cifar10_quick", "rounds": 3, **keywords}, label=label)


# ---- labels


@pytest.mark.parametrize(
    ("wanted", "taken", "label"),
    [
        (None, [], "trained"),
        (None, ["trained"], "trained-2"),
        (None, ["cpu"], "trained-2"),
        (None, ["trained", "trained-2"], "trained-3"),
        ("gpu_2-x", ["trained"], "gpu_2-x"),
    ],
)
def test_labels(wanted: str | None, taken: list[str], label: str) -> None:
    assert pick_label(wanted, taken) == label


@pytest.mark.parametrize(
    ("wanted", "taken"), [("cpu", ["cpu"]), ("a b", []), ("a.b", []), ("-", []), ("labels/", []), (None, ["trained-2"])]
)
def test_labels_that_are_taken_or_bad(wanted: str | None, taken: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        pick_label(wanted, taken)


# ---- rounds


def test_nothing_is_trained_before_somebody_looks(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    training = quick(gauge)
    assert gauge.session.taken == [] and training.rounds == []
    assert float(training.runtime) == pytest.approx(2.0, rel=0.01)
    assert gauge.session.taken == [("cifar10_quick", 1), ("cifar10_quick", 2), ("cifar10_quick", 3)]
    gauge.settle()
    assert len(gauge.session.taken) == 3


def test_trainings_of_one_test_are_interleaved_and_share_seeds(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    quick(gauge)
    quick(gauge, model="cifar10_tutorial")
    gauge.settle()
    models = [model.removeprefix("cifar10_") for model, _ in gauge.session.taken]
    assert models == ["quick", "tutorial", "tutorial", "quick", "quick", "tutorial"]
    assert [seed for _, seed in gauge.session.taken] == [1, 1, 2, 2, 3, 3]
    assert [run.label for run in gauge.session.runs] == ["trained", "trained-2"]
    assert gauge.session.prepared == [0, 0]  # before any clock runs


def test_warm_ups_are_not_kept(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    training = quick(gauge, warmup_rounds=2)
    assert len(training.record.rounds) == 3
    assert len(gauge.session.taken) == 5


def test_rounds_beyond_the_planned_ones_stop_at_the_budget(make: Callable[..., TestGauge]) -> None:
    gauge = make(budget_seconds=0.0)
    training = quick(gauge, rounds=2)
    assert (training.runtime <= 1.99).status == "inconclusive"
    assert gauge.timer.extra == []


def test_rounds_beyond_the_planned_ones_stop_at_the_maximum(make: Callable[..., TestGauge]) -> None:
    gauge = make(max_rounds=5)
    training = quick(gauge)
    assert (training.runtime <= 1.999).status == "inconclusive"
    assert gauge.timer.extra == ["trained", "trained"]
    assert len(training.rounds) == 5


# ---- baselines


def test_a_baseline_is_missing_stored_and_met(make: Callable[..., TestGauge], tmp_path: Path) -> None:
    missing = make()
    verdict = quick(missing).runtime <= missing.baseline.runtime
    assert (verdict.status, verdict.passed) == ("missing", False)

    recording = make(update="new")
    training = quick(recording)
    assert (training.runtime <= recording.baseline.runtime).status == "generated"
    recording.finish(passed=True)
    path = tmp_path / "a-machine" / "test_file__test_a.smoke.json"
    assert recording.session.written == [path]

    later = make()
    training = quick(later)
    verdict = training.runtime <= later.baseline.runtime
    assert (verdict.status, verdict.baseline_file) == ("match", str(path))
    assert later.properties()[0][0] == "gauge_runtime_seconds"
    assert later.timer.described == []
    later.finish(passed=True)
    assert later.timer.described == [("trained", "match")]
    assert later.session.written == []


def test_a_failed_test_stores_nothing(make: Callable[..., TestGauge], tmp_path: Path) -> None:
    gauge = make(update="new")
    assert quick(gauge).runtime <= gauge.baseline.runtime
    gauge.finish(passed=False)
    assert list(tmp_path.iterdir()) == []


def test_new_adds_what_is_missing_and_keeps_what_is_there(make: Callable[..., TestGauge], tmp_path: Path) -> None:
    first = make(update="new")
    assert quick(first).runtime <= first.baseline.runtime
    first.finish(passed=True)
    second = make(update="new")
    training = quick(second, rounds=4)
    assert (training.runtime <= second.baseline.runtime).status == "match"
    other = quick(second, label="other")
    assert (other.runtime <= second.baseline["other"].runtime).status == "generated"
    second.finish(passed=True)
    samples = json.loads(second.session.written[0].read_text())["samples"]
    assert len(samples["runtime_seconds"]) == len(samples["other.runtime_seconds"]) == 3


def test_all_replaces_what_is_there(make: Callable[..., TestGauge]) -> None:
    for rounds in (3, 4):
        gauge = make(update="all")
        assert quick(gauge, rounds=rounds).runtime <= gauge.baseline.runtime
        gauge.finish(passed=True)
        samples = json.loads(gauge.session.written[0].read_text())["samples"]
        assert len(samples["runtime_seconds"]) == rounds


def stored_file(make: Callable[..., TestGauge]) -> Path:
    gauge = make(update="new")
    assert quick(gauge).runtime <= gauge.baseline.runtime
    gauge.finish(passed=True)
    return gauge.session.written[0]


def test_a_newer_baseline_is_never_replaced(make: Callable[..., TestGauge]) -> None:
    path = stored_file(make)
    newer = json.dumps({**json.loads(path.read_text()), "schema": 99})
    path.write_text(newer)
    with pytest.raises(BaselineError, match="newer sparkgauge"):
        _ = make(update="all").baseline  # before anything is trained
    assert path.read_text() == newer


def test_a_baseline_of_another_test_is_not_compared_with(make: Callable[..., TestGauge]) -> None:
    path = stored_file(make)
    path.write_text(path.read_text().replace('"test_id": "', '"test_id": "other_'))
    with pytest.raises(BaselineError, match="another test's.*other_"):
        _ = make().baseline


def test_what_could_not_be_written_was_not_generated(
    make: Callable[..., TestGauge], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = make(update="new")
    assert quick(gauge).runtime <= gauge.baseline.runtime

    def refuse(path: Path, baseline: Any) -> None:
        raise BaselineError("Cannot write the baseline", actual="No space left on device", where=str(path))

    monkeypatch.setattr(gauge.session.store, "write", refuse)
    with pytest.raises(BaselineError, match="No space left"):
        gauge.finish(passed=True)
    ((_, _, verdict),) = gauge.session.verdicts
    assert verdict.status == "missing" and "No space left" in verdict.reason


def test_a_slowed_run_is_not_stored(make: Callable[..., TestGauge], tmp_path: Path) -> None:
    gauge = make(update="new", injections={"compute": 0.3})
    assert quick(gauge).runtime <= gauge.baseline.runtime
    with pytest.raises(BaselineError, match="slowed down on purpose"):
        gauge.finish(passed=True)
    assert list(tmp_path.iterdir()) == []


def test_a_speedup_is_stored_and_met(make: Callable[..., TestGauge]) -> None:
    for update, status in (("new", "generated"), (None, "match")):
        gauge = make(update=update)
        fast = quick(gauge, label="fast")
        slow = quick(gauge, model="cifar10_tutorial", label="slow")
        verdict = speedup(fast, over=slow) >= gauge.baseline.speedup
        assert verdict.status == status
        assert gauge.session.verdicts[-1][1] == "slow"  # shown with the training asked for last
        gauge.finish(passed=True)


def test_an_efficiency_is_stored_beside_a_speedup_and_met(make: Callable[..., TestGauge]) -> None:
    for update, status in (("new", "generated"), (None, "match")):
        gauge = make(update=update)
        one, two = quick(gauge, executors=1, label="one"), quick(gauge, label="two")
        assert (speedup(two, over=one) >= gauge.baseline.speedup).status == status
        assert (efficiency(two, over=one) >= gauge.baseline.efficiency).status == status
        gauge.finish(passed=True)


def test_a_test_has_one_speedup(make: Callable[..., TestGauge]) -> None:
    gauge = make(update="new")
    fast, slow = quick(gauge, label="fast"), quick(gauge, model="cifar10_tutorial", label="slow")
    assert speedup(fast, over=slow) >= gauge.baseline.speedup
    assert speedup(fast, over=slow) >= gauge.baseline.speedup
    with pytest.raises(ConfigurationError, match="Two different speed-ups"):
        assert speedup(slow, over=fast) >= gauge.baseline.speedup


def test_other_work_is_not_compared(make: Callable[..., TestGauge]) -> None:
    gauge = make(update="new")
    assert quick(gauge).runtime <= gauge.baseline.runtime
    gauge.finish(passed=True)
    other = make()
    verdict = quick(other, iterations=31).runtime <= other.baseline.runtime
    assert (verdict.status, verdict.passed) == ("not_comparable", False)
    assert "iterations" in verdict.reason


def test_open_verdicts_are_told(make: Callable[..., TestGauge]) -> None:
    gauge = make(require_baseline=False)
    assert quick(gauge).runtime <= gauge.baseline.runtime
    assert gauge.open_verdicts() == "runtime_seconds missing: there is no baseline file"
    assert make().open_verdicts() == ""


def test_a_baseline_of_an_unknown_label(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    with pytest.raises(ConfigurationError, match="one of none, got 'trained'"):
        _ = gauge.baseline.runtime
    quick(gauge, label="cpu")
    with pytest.raises(ConfigurationError, match="one of 'cpu', got 'gpu'"):
        _ = gauge.baseline["gpu"].runtime


# ---- the cluster


@dataclass
class Executor:
    id: str


class Cluster:
    """As much of a cluster as the session asks of it between rounds."""

    def __init__(self) -> None:
        self.executors = [Executor("0"), Executor("1")]
        self.warmed: list[int] = []
        self.imported: set[str] = set()
        self.stopped = False
        self.broken = False

    def ensure_alive(self) -> None:
        pass

    def preimport(self, modules: Iterable[str]) -> bool:
        new = set(modules) - self.imported
        self.imported |= new
        return bool(new)

    def warm(self, count: int) -> float:
        self.warmed.append(count)
        return 0.0

    def kill_leftover_jobs(self) -> None:
        if self.broken:
            raise ClusterError("Cancelled Spark tasks keep running")

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def session_on_cluster() -> tuple[GaugeSession, Cluster]:
    session, cluster = Session(make_config()), Cluster()
    session._cluster = cluster  # type: ignore[assignment]
    return session, cluster


def test_new_executors_are_warmed_before_the_next_round(session_on_cluster: tuple[GaugeSession, Cluster]) -> None:
    session, cluster = session_on_cluster
    session.cluster()
    session.cluster()
    assert cluster.warmed == [2]
    cluster.executors[1] = Executor("2")  # lost, and relaunched under a new name
    session.cluster()
    session.cluster()
    assert cluster.warmed == [2, 2]


def test_a_cluster_that_cannot_be_cleaned_is_given_up(session_on_cluster: tuple[GaugeSession, Cluster]) -> None:
    session, cluster = session_on_cluster
    session._clean_up(cluster)  # type: ignore[arg-type]
    assert not cluster.stopped
    cluster.broken = True
    session._clean_up(cluster)  # type: ignore[arg-type]
    assert cluster.stopped and session._cluster is None


def test_stopping_twice_or_without_a_cluster_does_nothing() -> None:
    session = Session(make_config())
    session.stop()
    session.stop()
    assert replace(session.config, executors=1).executors == 1


# ---- functions that travel


@pytest.fixture
def own_modules(tmp_path: Path) -> Iterator[Callable[[str, str], ModuleType]]:
    """Return a function that makes and imports a module of a user's own."""
    made: list[ModuleType] = []

    def make(name: str, text: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        made.append(module)
        return module

    yield make
    for module in made:
        sys.modules.pop(module.__name__, None)
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(module)


def _elsewhere(value: Any, *modules: ModuleType) -> Any:
    """Return ``value`` pickled and loaded where none of ``modules`` can be imported."""
    pickled = cloudpickle.dumps(value)
    for module in modules:
        del sys.modules[module.__name__]
    return cloudpickle.loads(pickled)


def test_a_function_travels_with_the_helpers_of_its_module(own_modules: Callable[[str, str], ModuleType]) -> None:
    deep = own_modules("own_deep", "def depth(): return 3\n")
    helper = own_modules("own_helper", "import own_deep\nLIMIT = 4\ndef double(x): return 2 * x\n")
    text = "import own_helper\nfrom own_helper import double\n"
    text += "def fit(context, shard): return double(own_helper.LIMIT) + own_helper.own_deep.depth()\n"
    test = own_modules("own_test", text)
    assert _elsewhere(sessions._portable(test.fit), deep, helper, test)(None, None) == 11


@pytest.mark.parametrize("way", ["partial", "instance", "method"])
def test_other_callables_travel_too(way: str, own_modules: Callable[[str, str], ModuleType]) -> None:
    text = (
        "class Fit:\n    def __call__(self, context, shard=None): return 1\n    def method(self, context): return 1\n"
    )
    test = own_modules("own_callables", text + "def fit(context, rate=0): return rate\n")
    fn = {"partial": functools.partial(test.fit, rate=1), "instance": test.Fit(), "method": test.Fit().method}[way]
    assert _elsewhere(sessions._portable(fn), test)(None) == 1


def test_installed_functions_travel_by_name(own_modules: Callable[[str, str], ModuleType]) -> None:
    before = set(cloudpickle.list_registry_pickle_by_value())
    for fn in (None, len, json.dumps, pytest.importorskip("numpy").linalg.norm, sessions._portable):
        assert sessions._portable(fn) is fn
    text = "import json, os, sys, pytest, numpy, sparkgauge\nthing = object()\ndef fit(context, shard): pass\n"
    sessions._portable(own_modules("own_imports", text).fit)
    assert set(cloudpickle.list_registry_pickle_by_value()) - before == {"own_imports"}


def test_modules_that_import_each_other_end(own_modules: Callable[[str, str], ModuleType]) -> None:
    first = own_modules("own_first", "def fit(context, shard): return other.VALUE\n")
    second = own_modules("own_second", "import own_first\nVALUE = 5\n")
    first.other = second  # type: ignore[attr-defined]
    sessions._portable(first.fit)
    assert {"own_first", "own_second"} <= set(cloudpickle.list_registry_pickle_by_value())


# ---- small things


def test_executors_of_the_users_cluster_take_the_users_python() -> None:
    environ = {"PYSPARK_PYTHON": "/opt/env/bin/python"}
    assert sessions._executors_python(make_config(master="yarn"), environ) == "/opt/env/bin/python"
    assert sessions._executors_python(make_config(master="yarn"), {}) == sys.executable
    for own in (None, "local-cluster[2,1,1024]"):  # this host's, whose environment is known
        assert sessions._executors_python(make_config(master=own), environ) == sys.executable


def test_paths_are_shown_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sessions._shown(tmp_path / "baselines" / "a.json") == "baselines/a.json"
    assert sessions._shown(tmp_path.parent / "a.json") == str(tmp_path.parent / "a.json")


# ---- rounds that are no samples, baselines that cannot be read, and what a failing assert prints


def test_a_retried_round_is_no_sample(make: Callable[..., TestGauge], monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = make()
    honest = gauge.session.run_round

    def run_round(workload: Workload, seed: int, index: int, planned: int) -> Round:
        return replace(honest(workload, seed, index, planned), invalid="Spark retried stage 3" if seed == 2 else "")

    monkeypatch.setattr(gauge.session, "run_round", run_round)
    training = quick(gauge)
    assert training.runtime.samples.values == (2.00, 1.98)
    assert training.runtime.samples.seeds == (1, 3)
    assert training.runtime.samples.reference_seconds == (0.1, 0.1)
    assert len(training.rounds) == 3  # kept, for the report


def test_without_a_valid_round_the_test_fails(make: Callable[..., TestGauge], monkeypatch: pytest.MonkeyPatch) -> None:
    gauge = make()
    honest = gauge.session.run_round
    monkeypatch.setattr(
        gauge.session, "run_round", lambda *arguments: replace(honest(*arguments), invalid="Spark retried stage 3")
    )
    quick(gauge)
    with pytest.raises(NotMeasuredError, match="at least one valid round, got none of 3: Spark retried stage 3"):
        gauge.settle()  # also where nobody looks at a result


def test_an_unreadable_baseline_is_told_before_anything_is_trained(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    path = gauge._path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(BaselineError, match="Unreadable baseline"):
        _ = gauge.baseline
    assert gauge.session.taken == []
    assert make(update="all").baseline is not None  # about to be replaced


def test_reprs_are_one_short_line(make: Callable[..., TestGauge]) -> None:
    gauge = make()
    training = quick(gauge)
    assert repr(training) == "<training 'trained': tensorflow cifar10_quick on 2 x cpu, 0 rounds, 3 planned>"
    assert repr(gauge.baseline) == "<baseline of 'trained'>"
    assert repr(gauge.baseline["gpu"]) == "<baseline of 'gpu'>"


def caffe_gauge(root: Path, test_id: str) -> TestGauge:
    session = Session(make_config(baselines_folder=root))
    session.root = root
    return session.test(test_id, Timer())


def test_a_caffe_solver_is_found_beside_the_test_or_in_the_root_folder(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")
    pytest.importorskip("torch", reason="framework caffe needs PyTorch")
    solver = write_project(tmp_path / "perf" / "nets")
    gauge = caffe_gauge(tmp_path, "perf/test_x.py::test_a")
    for path in ("nets/small_solver.prototxt", "perf/nets/small_solver.prototxt"):
        plan = gauge.train({"framework": "caffe", "solver": path}).workload.plan
        assert plan is not None
        assert plan.name == str(solver)
    saving = gauge.train({"framework": "caffe", "solver": "nets/small_solver.prototxt", "save_to": "out/w"})
    assert saving.workload.save_to == str(tmp_path / "out" / "w")


def test_the_real_caffe_is_asked_for_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")
    pytest.importorskip("torch", reason="framework caffe needs PyTorch")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "caffe" else found(name, *rest)
    )
    gauge = caffe_gauge(tmp_path, "test_x.py::test_a")
    with pytest.raises(MachineError, match="real Caffe, which is not installed.*sparkgauge install-caffe"):
        gauge.train({"framework": "caffe", "model": "cifar10_quick", "engine": "caffe"})

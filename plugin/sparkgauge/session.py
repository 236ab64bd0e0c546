"""What one pytest session measures with, without pytest: cluster, data, trainings, verdicts, baselines."""

from __future__ import annotations

import importlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from sparkgauge import baselines, environment, gpu, nvml
from sparkgauge.attribution import Side, attribute, side_of
from sparkgauge.channel import Address
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import BaselineError, ConfigurationError, DataError, MachineError, NewerBaselineError
from sparkgauge.gate import QUOTIENTS, BaselineQuantity, Policy, Samples, baseline_quantity, check_valid, summary
from sparkgauge.job import Job, Recovery
from sparkgauge.records import (
    Approval,
    Baseline,
    Ceiling,
    Environment,
    Round,
    RunRecord,
    Verdict,
    from_json,
    to_json,
)
from sparkgauge.report.progress import Progress
from sparkgauge.store import (
    DEFAULT_LABEL,
    QUOTIENT_COMPANIONS,
    BaselineStore,
    baseline_of,
    comparable,
    run_samples,
    sample_key,
    superseding,
    with_missing,
)
from sparkgauge.training import BaselineView, Budget, Training, pick_label
from sparkgauge.workload import FRAMEWORKS, Workload

if TYPE_CHECKING:
    from sparkgauge.against.duel import Duel
    from sparkgauge.against.opponent import Opponent
    from sparkgauge.against.server import Server
    from sparkgauge.cluster.spark import SparkCluster
    from sparkgauge.data.dataset import Dataset
    from sparkgauge.data.frames import Frames
    from sparkgauge.lease import Lease


class Timer(Protocol):
    """Who times the rounds and keeps their statistics: pytest-benchmark, behind ``benchmarking.BenchmarkTimer``."""

    @property
    def is_enabled(self) -> bool:
        """Return whether rounds will be timed."""

    def __call__(
        self,
        label: str,
        workload: Workload,
        take: Callable[[], Round],
        rounds: int,
        warmup_rounds: int,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Take the rounds, ``before`` each of them calling it outside the clock; return whether they were timed."""
        ...

    def add(self, label: str, extra: Round) -> None:
        """Count a further round."""
        ...

    def leave_out(self, label: str, rounds: Sequence[Round]) -> None:
        """Forget those of a training's rounds that are invalid."""
        ...

    def describe(self, run: RunRecord, status: str) -> None:
        """Keep the run's scalars with its statistics."""
        ...


PREIMPORTS: Mapping[str, tuple[str, ...]] = {
    "tensorflow": ("tensorflow", "tensorflowonspark.TFSparkNode", "sparkgauge.adapters.tensorflow.training"),
    "torch": ("torch", "torch.distributed", "sparkgauge.adapters.torch.training"),
    "caffe": (
        "torch",
        "torch.distributed",
        "sparkgauge.adapters.caffe.engine_torch",
        "sparkgauge.adapters.caffe.training",
    ),
}
"""What a Python task of an executor finds imported already, by framework; what is not installed is passed over."""
GPU_PREIMPORTS: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("torch", "caffe"), ("sparkgauge.adapters.triton_kernels",)
)
"""What joins them where the session trains on GPUs."""
GPU_WARM_STEPS = 2
"""Steps of a model before its first round on a GPU."""


class GaugeSession:
    """What all tests of a pytest session share; cluster and data are made when first needed."""

    def __init__(self, config: GaugeConfig, root: Path, progress: Progress, *, wants_gpus: bool = False) -> None:
        """``wants_gpus``: some test trains on GPUs, so that the cluster offers them from the start."""
        self.config = config.for_gpus(len(gpu.detect()), environment.usable_cores()) if wants_gpus else config
        self.progress = progress
        self.store = BaselineStore(config.baselines_folder)
        self.runs: list[RunRecord] = []
        self.verdicts: list[tuple[str, str, Verdict]] = []
        """Test id, label and verdict, in the order of the comparisons."""
        self.written: list[Path] = []
        """Baseline files that this session wrote."""
        self.replacements: list[baselines.Replacement] = []
        """The same with what they replaced."""
        self.outcomes: dict[str, str] = {}
        """How each test with trainings ended: ``passed``, ``failed`` (an assert), ``error``, ``skipped``."""
        self.crashed: list[str] = []
        """Tests that failed by the tool's or the cluster's fault."""
        self.speedups: dict[str, dict[str, tuple[float, ...]]] = {}
        """Raw speed-ups by test and metric: which runs were divided is known to the test alone."""
        self.opponent: Opponent | None = None
        """The other side of ``--gauge-against``."""
        self.server: Server | None = None
        """Where this session takes rounds for another one, which asks and judges."""
        self.root = root
        self._cluster: SparkCluster | None = None
        self._datasets: dict[Any, Dataset] = {}
        self._frames: list[Frames] = []
        """DataFrames that are data sets already: they must live as long as what is known of them."""
        self._told: set[str] = set()
        self._shipped: set[Path] = set()
        self._warm_executors: set[str] = set()
        self._warm_models: set[tuple[Any, ...]] = set()
        self._frameworks: set[str] = set()
        self._wants_gpus = wants_gpus and (bool(gpu.detect()) or not config.embedded)
        self._lease: Lease | None = None
        self._ceilings: dict[tuple[int, str], Ceiling | None] = {}

    @cached_property
    def environment(self) -> Environment:
        """Return what trainings run on: this machine, or the executors' where an existing cluster trains."""
        if self.config.trains_here:
            return self.driver_environment
        return self._executors_environment()

    @cached_property
    def driver_environment(self) -> Environment:
        """Return what this process runs on."""
        from sparkgauge.cluster.java import find_java

        java = find_java(os.environ)
        return environment.capture(os.environ, java_version=str(java.version), gpus=[one.name for one in gpu.detect()])

    @cached_property
    def commit(self) -> str:
        """Return the git commit of the tests' folder."""
        return environment.git_commit(self.root)

    def dataset(self, source: str | Frames | None = None) -> Dataset:
        """Return the data set of ``source`` (the session's own by default), prepared for executors."""
        if source is not None and not isinstance(source, str):
            return self._from_frames(source)
        import pooch

        from sparkgauge.data import resolve

        wanted = source or self.config.data
        if wanted not in self._datasets:
            cache = Path(pooch.os_cache("sparkgauge"))
            self._datasets[wanted] = resolve(wanted, cache_dir=cache, progress=not self.config.ci)
        return self._datasets[wanted]

    def data_of(self, workload: Workload) -> Dataset:
        """Return the data set that ``workload`` trains on, prepared: the session's, or that of a Caffe net."""
        if workload.plan is None:
            return self.dataset(workload.data)
        from sparkgauge.caffe import lmdb_data
        from sparkgauge.caffe.plan import check_mean

        if workload.plan.lmdb is None:
            check_mean(workload.plan, (3, 32, 32))
            return self.dataset(workload.data)
        import pooch

        dataset = lmdb_data.prepare(workload.plan.lmdb, Path(pooch.os_cache("sparkgauge")))
        check_mean(workload.plan, lmdb_data.image_shape(dataset))
        return dataset

    def _from_frames(self, frames: Frames) -> Dataset:
        """Return the data set of DataFrames, whose rows cross over at the first call."""
        from sparkgauge.data.frames import materialise

        if frames.key not in self._datasets:
            cluster = self.cluster()
            self.progress.message("sparkgauge: reading a DataFrame")
            folder = cluster.folder / "frames" / uuid.uuid4().hex[:12]
            self._datasets[frames.key] = materialise(frames, folder, shared=cluster.kind != "external")
            self._frames.append(frames)
        return self._datasets[frames.key]

    @property
    def resolved(self) -> list[Dataset]:
        """Return the data sets that were used."""
        return list(self._datasets.values())

    def cluster(self, *, device: str = "cpu") -> SparkCluster:
        """Return the running cluster, started by the first call; lost executors are waited for.

        A cluster without GPUs is replaced by one with them when ``device`` is ``gpu``.
        """
        if device == "gpu" and self._cluster is not None and not self._cluster.spec.gpus:
            self.progress.message("sparkgauge: restarting the cluster, with GPUs")
            self.stop()
        self._wants_gpus = self._wants_gpus or device == "gpu"
        if self._cluster is None:
            self._cluster = self._start_cluster(device)
        self._cluster.ensure_alive()
        self._warm(self._cluster)
        return self._cluster

    def stop(self) -> None:
        """Stop the cluster if one was started."""
        if self._cluster is not None:
            self._cluster.stop()
            self._cluster, self._warm_executors = None, set()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def prepare(self, workload: Workload) -> None:
        """Start the cluster, prepare the data and load the adapter, where that has not been done."""
        self._frameworks.add(workload.framework)
        self.cluster(device=workload.device)
        self.data_of(workload)
        _adapter(workload).prepare()
        self._tell_superseded(workload)
        if workload.device == "gpu" and workload.fn is None:
            self._warm_gpus(workload)

    def _warm_gpus(self, workload: Workload) -> None:
        """Run two steps and a test of each model once: what is compiled and loaded for seconds belongs to no round."""
        trained = (workload.framework, workload.model, workload.batch_size, workload.executors)
        if trained in self._warm_models:
            return
        self.progress.message(f"warming up {workload.framework} {workload.model} on the GPU")
        short = replace(
            workload, iterations=GPU_WARM_STEPS, epochs=None, test_every=None, save_to="", checkpoint_every=None
        )
        self._run_round(short, workload.seed, lambda _: None)
        self._warm_models.add(trained)

    def _tell_superseded(self, workload: Workload) -> None:
        """Say once which fields of a Caffe solver have no effect here."""
        plan = workload.plan
        if plan is not None and plan.superseded and plan.name not in self._told:
            self._told.add(plan.name)
            fields = ", ".join(plan.superseded)
            self.progress.message(f"sparkgauge: {plan.name}: no effect here (docs/caffe.md): {fields}")

    def run_round(self, workload: Workload, seed: int, index: int, planned: int) -> Round:
        """Return one round of ``workload``; afterwards no task of it is left, however it ended."""
        tell = self.progress.update
        return self._run_round(
            workload, seed, lambda p: tell(index, p.step, p.total_steps, p.images_per_second, p.loss)
        )

    def _run_round(self, workload: Workload, seed: int, on_progress: Callable[[Any], None]) -> Round:
        from sparkgauge.rounds import run_round

        cluster = self.cluster(device=workload.device)
        cluster.wait_for_executors(workload.executors)
        job = self._job(cluster, workload, seed)
        try:
            return run_round(
                cluster.spark.sparkContext,
                job,
                _launcher(workload),
                timeout_seconds=workload.timeout_seconds,
                advertised_host=self._advertised_host(cluster),
                on_progress=on_progress,
            )
        except BaseException:
            self._clean_up(cluster)
            raise

    def run_referenced_round(self, workload: Workload, seed: int, index: int, planned: int) -> Round:
        """Return one round of ``workload`` with the reference kernel's time just before it."""
        reference = self.time_reference(workload)
        return replace(self.run_round(workload, seed, index, planned), reference_seconds=reference)

    def time_reference(self, workload: Workload) -> tuple[float, ...]:
        """Return the reference kernel's seconds on each executor; empty where another side is measured in turn.

        Pairs need none: what the machine does then, it does to both sides. Built-in trainings on CPUs time their own
        between the steps.
        """
        from sparkgauge.adapters.barrier import await_slots
        from sparkgauge.rounds import time_reference

        if self.opponent is not None or self.server is not None:
            return ()
        cluster = self.cluster(device=workload.device)
        cluster.wait_for_executors(workload.executors)
        await_slots(cluster.spark.sparkContext, workload.executors)
        self._measure_ceiling(cluster.spark.sparkContext, workload)
        if workload.fn is None and workload.device == "cpu":
            return ()
        return time_reference(cluster.spark.sparkContext, workload.executors)

    def _measure_ceiling(self, spark_context: Any, workload: Workload) -> None:
        """Measure what the executors can do at most, once a session for each number and device of executors."""
        from sparkgauge import ceiling

        key, threads = (workload.executors, workload.device), workload.cores_per_executor
        if key not in self._ceilings:
            self._ceilings[key] = ceiling.of_executors(spark_context, workload.executors, threads, workload.device)

    def ceiling(self, workload: Workload) -> Ceiling | None:
        """Return what the executors can do at most; None where it was not measured."""
        return self._ceilings.get((workload.executors, workload.device))

    def test(self, test_id: str, timer: Timer) -> TestGauge:
        """Return what one test measures with."""
        return TestGauge(self, test_id, timer)

    def policy(self, workload: Workload) -> Policy:
        """Return how strictly ``workload`` is gated."""
        config = self.config
        return Policy(
            runtime_margin_fraction=workload.runtime_margin_fraction,
            accuracy_margin_fraction=workload.accuracy_margin_fraction,
            speedup_margin_fraction=workload.speedup_margin_fraction,
            confidence=config.confidence,
            require_baseline=config.require_baseline,
            update=config.update,
            inconclusive=config.inconclusive,
            serving=self.server is not None,
        )

    def approval(self) -> Approval:
        """Return who is recording baselines, and how."""
        return baselines.approval(f"recorded with --gauge-update {self.config.update}")

    def _executors_environment(self) -> Environment:
        """Return what the executors run on; different machines make one class of their own."""
        cluster, count = self.cluster(), self.config.executors
        captured = cluster.spark.sparkContext.parallelize(range(count), count).map(_capture_there).collect()
        found = [from_json(Environment, one, "an executor's environment") for one in captured]
        classes = sorted({one.hardware_class for one in found})
        scheme = str(self.config.master).partition(":")[0]
        java = self.driver_environment.software.get("java", "")
        return replace(
            found[0], hardware_class="-and-".join([*classes, scheme]), software={**found[0].software, "java": java}
        )

    def _start_cluster(self, device: str) -> SparkCluster:
        from sparkgauge.cluster.conf import ClusterSpec
        from sparkgauge.cluster.spark import SparkCluster

        config = self.config
        spec = ClusterSpec(
            executors=config.executors,
            cores_per_executor=config.cores_per_executor,
            executor_memory_mebibytes=config.executor_memory_mib,
            python=_executors_python(config, os.environ),
            master=None if config.embedded else config.master,
            preimport=self._preimports(),
            gpus=self._gpu_shares(device) if self._wants_gpus else (),
            retries=config.retries,
            # one that stands by has no GPU: those are shared out among the others
            spares=int(config.retries > 0 and config.embedded and not self._wants_gpus),
        )
        cluster = SparkCluster.start(spec, self.progress.message)
        try:
            self._warm(cluster)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _preimports(self) -> tuple[str, ...]:
        """Return what executors import ahead: of the frameworks used so far; of all where the master is not ours, since
        its executors cannot be told later."""
        external = not self.config.trains_here
        wanted = PREIMPORTS if external else sorted(self._frameworks & PREIMPORTS.keys())
        on_gpu = GPU_PREIMPORTS if self._wants_gpus else {}
        return tuple(name for framework in wanted for name in (*PREIMPORTS[framework], *on_gpu.get(framework, ())))

    def _gpu_shares(self, device: str) -> tuple[tuple[str, ...], ...]:
        """Return the GPUs of each executor, leased for this session; none where a CPU test need not wait for them.

        Of an existing cluster only their number counts, which Spark finds.
        """
        config, each = self.config, self.config.gpus_per_executor
        if not config.trains_here:
            if each < 1:
                raise ConfigurationError(
                    "A GPU of an existing cluster cannot be shared",
                    expected="--gauge-gpus-per-executor of at least 1",
                    actual=f"{each:g}",
                )
            return (("",) * int(each),) * config.executors
        try:
            self._lease = self._lease or self._leased(gpu.needed(self._served(), each), waits=device == "gpu")
        except MachineError as error:
            if device == "gpu":
                raise
            self.progress.message(f"sparkgauge: starting without GPUs: {error.summary}")
            return ()
        return gpu.plan(self._lease.addresses, config.executors, each)

    def _leased(self, count: int, *, waits: bool) -> Lease:
        from sparkgauge import lease

        # two sides of a comparison take turns on the same GPUs
        shared = self.config.gpus_per_executor < 1 or self.opponent is not None or self.server is not None
        seconds = lease.WAIT_SECONDS if waits else 0.0
        return lease.lease(count, shared=shared, wait_seconds=seconds, say=self.progress.message)

    def _served(self) -> int:
        """Return how many of the executors have GPUs of their own."""
        config = self.config
        return gpu.fitting(config.executors, len(gpu.detect()), config.gpus_per_executor)

    def _warm(self, cluster: SparkCluster) -> None:
        """Let executors that are new import their frameworks now: no round is to be charged with it."""
        present = {executor.id for executor in cluster.executors}
        if cluster.preimport(self._preimports()) or present != self._warm_executors:
            cluster.warm(self.config.executors)
            self._warm_executors = present

    def _job(self, cluster: SparkCluster, workload: Workload, seed: int) -> Job:
        dataset = self.data_of(workload)
        check_fits(workload, dataset)
        local = cluster.kind != "external"
        if not local:
            self._ship(cluster, dataset)
        return Job(
            address=Address("", 0, ""),  # filled in by the round, which opens the channel
            executors=workload.executors,
            model=workload.model,
            device=workload.device,
            iterations=workload.iterations,
            epochs=workload.epochs,
            global_batch=workload.batch_size,
            test_every=workload.test_every,
            seed=seed,
            dataset_folder=str(dataset.folder) if local else "",
            train_count=dataset.train_count,
            test_count=dataset.test_count,
            threads=workload.cores_per_executor,
            loopback=local,
            fn=_portable(workload.fn),
            options=dict(workload.options),
            plan=workload.plan,
            save_to=workload.save_to,
            shares_gpus=workload.device == "gpu" and workload.executors > 1 and self._gpus_are_shared(cluster),
            injections=self.config.injections,
            recovery=_recovery(workload, cluster),
        )

    def _gpus_are_shared(self, cluster: SparkCluster) -> bool:
        """Return whether two executors, or two tasks of one, may be given the same GPU."""
        amount = cluster.spark.sparkContext.getConf().get("spark.task.resource.gpu.amount", "1")
        return self.config.gpus_per_executor < 1 or float(amount) < 1

    def _ship(self, cluster: SparkCluster, dataset: Dataset) -> None:
        """Send the prepared files to executors on other machines, once a session."""
        if dataset.folder not in self._shipped:
            for file in sorted(dataset.folder.iterdir()):
                cluster.spark.sparkContext.addFile(str(file))
            self._shipped.add(dataset.folder)

    def _advertised_host(self, cluster: SparkCluster) -> str:
        if cluster.kind != "external":
            return "127.0.0.1"
        return str(cluster.spark.sparkContext.getConf().get("spark.driver.host"))

    def _clean_up(self, cluster: SparkCluster) -> None:
        """Rid the cluster of what a failed round left; one that cannot be cleaned is replaced at the next round."""
        try:
            cluster.kill_leftover_jobs()
        except Exception as error:
            self.progress.message(f"sparkgauge: restarting the cluster, it could not be cleaned: {error}")
            self.stop()


@dataclass
class TestGauge:
    """What one test measures with: its trainings, its baseline file, its verdicts."""

    __test__ = False  # not a test class, whatever its name begins with

    session: GaugeSession
    test_id: str
    timer: Timer
    trainings: list[Training] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    _speedups: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _margins: dict[str, float] = field(default_factory=dict)

    @cached_property
    def duel(self) -> Duel | None:
        """Return this test's rounds in turn with the other side; None where baselines are compared with."""
        opponent = self.session.opponent
        return opponent.duel(self.test_id) if opponent is not None else None

    def train(self, keywords: Mapping[str, Any], *, label: str | None = None, where: str = "train(...)") -> Training:
        """Return a training of the workload that ``keywords`` describe; its rounds are run when first looked at."""
        __tracebackhide__ = True
        session = self.session
        folders = (session.root / Path(self.test_id.partition("::")[0]).parent, session.root)
        workload = Workload.from_keywords(keywords, session.config, where=where, folders=folders)
        self._check_installed(workload)
        training = Training(
            label=pick_label(label, [one.label for one in self.trainings]),
            workload=workload,
            policy=session.policy(workload),
            max_rounds=max(session.config.max_rounds, workload.rounds),
            budget=self.trainings[0].budget if self.trainings else Budget(session.config.budget_seconds),
            settle=self.settle,
            run_round=session.run_referenced_round,
            describe=self._describe,
            observer=lambda verdict, samples: self._observe(training.label, verdict, samples),
            can_be_timed=self.timer.is_enabled,
        )
        training.on_extra_round = lambda extra: self.timer.add(training.label, extra)
        if self.duel is not None:
            self.duel.attach(training)
        if session.server is not None:
            training.max_rounds = 0  # only the other side asks for rounds
        self.trainings.append(training)
        return training

    def settle(self) -> None:
        """Run the planned rounds of every training that has none yet, interleaved where there are several."""
        __tracebackhide__ = True
        pending = [one for one in self.trainings if not one.rounds]
        if not pending:
            return
        if self.session.server is not None:
            self.session.server.settle(self)
            return
        if self.duel is not None:
            self.duel.announce(pending)
        for training in pending:  # before the clock runs: runtimes are those of a warm session
            self.session.prepare(training.workload)
        try:
            if self.duel is not None:
                self._run_pairs(pending, self.duel)
            elif len(pending) == 1:
                self._run(pending[0], pending[0].workload.rounds, pending[0].workload.warmup_rounds)
            else:
                self._interleave(pending)
        finally:
            self.session.progress.finish()
        runs = [self._describe(one) for one in pending]
        self.session.runs.extend(runs)
        for run in runs:
            check_valid(run)

    @property
    def baseline(self) -> BaselineView:
        """Return the stored side of this test's quantities; BaselineError, before anything trains, for a bad file."""
        if self.session.opponent is None and self.session.server is None:
            self._read(self._path())
        return BaselineView(self._quantity, DEFAULT_LABEL)

    def training(self, label: str) -> Training | None:
        """Return the training with this label."""
        return next((one for one in self.trainings if one.label == label), None)

    def open_verdicts(self) -> str:
        """Return what was compared without a result (policy ``skip``, or no baseline required); empty without any."""
        unsettled = [verdict for verdict in self.verdicts if verdict.status in ("missing", "inconclusive")]
        return "; ".join(f"{verdict.metric} {verdict.status}: {verdict.reason}" for verdict in unsettled)

    def properties(self) -> list[tuple[str, str]]:
        """Return the verdicts as name and value, for JUnit XML."""
        return [(f"gauge_{verdict.metric}", summary(verdict)) for verdict in self.verdicts]

    def finish(self, passed: bool) -> None:
        """Refresh the session's records of this test and, if it passed and was asked to, store its baseline."""
        runs = [self._describe(one) for one in self.trainings if one.rounds]
        self.session.runs = [run for run in self.session.runs if run.test_id != self.test_id] + runs
        for run in runs:
            self.timer.leave_out(run.label, run.rounds)
            self.timer.describe(run, " ".join(sorted({verdict.status for verdict in self.verdicts})) or "not gated")
        keeps = passed and self.session.server is None
        if keeps and runs and any(verdict.status == "generated" for verdict in self.verdicts):
            self._store(runs)

    def _check_installed(self, workload: Workload) -> None:
        _adapter(workload).check_installed()
        if workload.plan is not None and self.session.config.embedded:  # executors elsewhere have packages of their own
            _adapter(workload).check_engine(workload.plan.engine)
        if workload.device == "gpu":
            self._check_gpus(workload)

    def _check_gpus(self, workload: Workload) -> None:
        config = self.session.config
        if not config.trains_here:
            return  # the GPUs are elsewhere: Spark's resources tell
        gpu.require(workload.executors, config.gpus_per_executor)
        served = self.session._served()
        if 1 < workload.executors <= served < config.executors:
            raise ConfigurationError(
                "Some executors of this session share their GPU",
                expected=f"--gauge-executors {served}, one for each share of the GPUs",
                actual=f"--gauge-executors {config.executors}, and a test that trains on {workload.executors}",
            )

    def _run(self, training: Training, rounds: int, warmups: int) -> None:
        __tracebackhide__ = True
        self.session.progress.start(f"{self.test_id.rpartition('::')[2]} {training.label}", rounds)
        remaining = warmups
        reference: tuple[float, ...] = ()

        def before() -> None:
            nonlocal reference
            reference = self.session.time_reference(training.workload)

        def take() -> Round:
            nonlocal remaining
            __tracebackhide__ = True
            index = len(training.rounds)
            taken = self.session.run_round(training.workload, training.next_seed(), index, rounds)
            taken = replace(taken, reference_seconds=reference)
            if remaining:
                remaining -= 1
            else:
                training.rounds.append(taken)
            return taken

        training.timed = self.timer(training.label, training.workload, take, rounds, warmups, before)

    def _interleave(self, pending: list[Training]) -> None:
        """Take the rounds in turn, every second turn in the opposite order (A B, B A, ...), against drift."""
        __tracebackhide__ = True
        turns = max(one.workload.rounds for one in pending)
        for turn in range(turns):
            for training in pending if turn % 2 == 0 else reversed(pending):
                self._run(training, 1, training.workload.warmup_rounds if turn == 0 else 0)

    def _run_pairs(self, pending: list[Training], duel: Duel) -> None:
        """Take every round next to its counterpart on the other side, several trainings interleaved as usual."""
        __tracebackhide__ = True
        for training in pending:
            duel.meet(training.label, self.describe(training))
        for turn in range(max(one.workload.rounds for one in pending)):
            for training in pending if turn % 2 == 0 else reversed(pending):
                warmups = training.workload.warmup_rounds if turn == 0 else 0
                own = partial(self._run, training, 1, warmups)
                duel.pair(training.label, training.next_seed(), own, warmups=warmups)

    def describe(self, training: Training) -> RunRecord:
        """Return the record of what ``training`` has measured so far."""
        return self._describe(training)

    def _describe(self, training: Training) -> RunRecord:
        session, workload = self.session, training.workload
        return RunRecord(
            test_id=self.test_id,
            label=training.label,
            workload=workload.to_dict(),
            profile=session.config.profile,
            data=session.data_of(workload).identity,
            environment=session.environment,
            commit=session.commit,
            rounds=tuple(training.rounds),
            injections=dict(session.config.injections),
            ceiling=session.ceiling(workload),
        )

    def _quantity(self, metric: str, label: str) -> BaselineQuantity:
        __tracebackhide__ = True
        training = self.training(label)
        if training is None and metric not in QUOTIENTS:
            labels = ", ".join(repr(one.label) for one in self.trainings) or "none"
            raise ConfigurationError("No training with this label", expected=f"one of {labels}", actual=repr(label))
        if self.duel is not None:
            policy = (training or self.trainings[0]).policy if self.trainings else Policy()
            observer = partial(self._observe, label)
            quantity = self.duel.quantity(metric, label, policy, observer)
            return replace(quantity, where=partial(self._where_in_pairs, self.duel, label))
        if self.session.server is not None:
            return BaselineQuantity(metric, None, "missing", "the other side judges")
        path = self._path()
        stored = self._read(path)
        why_not = self._why_not(stored)
        return baseline_quantity(
            stored,
            metric,
            label=DEFAULT_LABEL if metric in QUOTIENTS else label,
            file=_shown(path),
            policy=(training or self.trainings[0]).policy if self.trainings else Policy(),
            why_not=why_not,
            observer=lambda verdict, samples: self._observe(label, verdict, samples),
            where=partial(self._where, stored, label),
        )

    def _where(self, stored: Baseline | None, label: str) -> str:
        """Return where a regression of one training against its baseline went; empty where the baseline cannot tell."""
        training = self.training(label)
        if stored is None or training is None:
            return ""
        own = {sample_key(label, name): name for name in run_samples(self._describe(training))}
        before = {name: stored.samples[key] for key, name in own.items() if key in stored.samples}
        return attribute(Side(before, stored.executors.get(label, ())), side_of(self._describe(training)))

    def _where_in_pairs(self, duel: Duel, label: str) -> str:
        training, other = self.training(label), duel.run(label)
        if training is None or other is None:
            return ""
        before, after = side_of(other), side_of(self._describe(training))
        return attribute(before, after, paired=len(before.shares) == len(after.shares))

    def _path(self) -> Path:
        config, session = self.session.config, self.session
        return session.store.path_for(
            self.test_id, hardware_class=session.environment.hardware_class, profile=config.profile
        )

    def _read(self, path: Path) -> Baseline | None:
        try:
            stored = self.session.store.read(path)
        except BaselineError as error:
            if self._replaces(error):
                return None  # about to be replaced, readable or not
            raise
        if stored is not None and stored.test_id != self.test_id:
            raise BaselineError(
                "The baseline is another test's",
                expected=f"the field test_id to be {self.test_id!r}",
                actual=repr(stored.test_id),
                where=_shown(path),
                hint="Was the test renamed? Write its new id into the file, or measure it: --gauge-update new",
            )
        return None if self.session.config.update == "all" else stored

    def _why_not(self, stored: Baseline | None) -> str | None:
        if stored is None:
            return None
        runs = [self._describe(one) for one in self.trainings]
        return next((why for run in runs if (why := comparable(stored, run, label=run.label))), None)

    def _observe(self, label: str, verdict: Verdict, samples: Samples) -> None:
        self.verdicts.append(verdict)
        # a speed-up belongs to the whole test: it is shown with the training that was asked for last
        owner = self.trainings[-1].label if verdict.metric in QUOTIENTS and self.trainings else label
        self.session.verdicts.append((self.test_id, owner, verdict))
        if verdict.metric in QUOTIENTS:
            self._keep_speedup(samples)

    def _keep_speedup(self, samples: Samples) -> None:
        if self._speedups.setdefault(samples.metric, samples.values)[0] != samples.values[0]:
            raise ConfigurationError(
                "Two different speed-ups or efficiencies are gated in one test",
                expected="one, since a test has one baseline.speedup and one baseline.efficiency",
                where=self.test_id,
            )
        self._speedups[samples.metric] = samples.values  # more rounds of the same
        beside = samples.step_reference_seconds, samples.waiting_ratios
        self._speedups |= {
            name: values for name, values in zip(QUOTIENT_COMPANIONS[samples.metric], beside, strict=True) if values
        }
        self.session.speedups[self.test_id] = dict(self._speedups)

    def _store(self, runs: list[RunRecord]) -> None:
        if self.session.config.injections:
            raise BaselineError(
                "Refusing to store a baseline of a run that was slowed down on purpose",
                actual=f"--gauge-inject {dict(self.session.config.injections)}",
                hint="Run without --gauge-inject.",
            )
        if nvml.played_devices():
            raise BaselineError(
                "Refusing to store a baseline of GPUs that are played",
                actual=f"{nvml.PLAYED_VARIABLE}={os.environ.get(nvml.PLAYED_VARIABLE)}",
                hint=f"Run without {nvml.PLAYED_VARIABLE}.",
            )
        path = self._path()
        fresh = baseline_of(runs, self.session.approval(), more_samples=self._speedups)
        replacement = self._replacement(path, fresh)
        try:
            self.session.store.write(path, replacement.new)
        except BaselineError as error:
            self._not_written(error)
            raise
        self.session.written.append(path)
        self.session.replacements.append(replacement)

    def _replaces(self, error: BaselineError) -> bool:
        """Return whether this session writes over a file that cannot be read for this reason."""
        return self.session.config.update == "all" and not isinstance(error, NewerBaselineError)

    def _not_written(self, error: BaselineError) -> None:
        """Take back what the verdicts say: nothing was generated."""
        told = {
            id(one): replace(one, status="missing", reason=str(error))
            for one in self.verdicts
            if one.status == "generated"
        }
        self.verdicts = [told.get(id(one), one) for one in self.verdicts]
        self.session.verdicts = [(test, label, told.get(id(one), one)) for test, label, one in self.session.verdicts]

    def _replacement(self, path: Path, fresh: Baseline) -> baselines.Replacement:
        """Return what to write: with ``new`` what the stored one lacks, with ``all`` the next generation of it."""
        try:
            stored = self.session.store.read(path)
        except BaselineError as error:
            if not self._replaces(error):
                raise
            return baselines.Replacement(path, None, fresh, f"the old file's history is lost: {error}")
        if stored is None or self.session.config.update == "all":
            return baselines.Replacement(path, stored, superseding(stored, fresh))
        return baselines.Replacement(path, stored, with_missing(stored, fresh))


def check_fits(workload: Workload, dataset: Dataset) -> None:
    """Raise DataError where a built-in model cannot be trained on ``dataset``, or it went with its cluster."""
    from sparkgauge.data.dataset import CLASS_COUNT, IMAGE_SHAPE

    if workload.data is None or isinstance(workload.data, str):
        return
    if not dataset.folder.exists():
        raise DataError(
            "The rows of a DataFrame went with the cluster that held them",
            expected="the Spark session that the DataFrame was made with",
            actual="another one, started after a failure",
            hint="Make the DataFrame anew from the fixture spark_session.",
        )
    if workload.fn is None and (workload.data.image_shape != IMAGE_SHAPE or dataset.class_count > CLASS_COUNT):
        raise DataError(
            f"Model {workload.model!r} does not fit the DataFrame",
            expected=f"images of shape {IMAGE_SHAPE} and labels below {CLASS_COUNT}",
            actual=f"shape {workload.data.image_shape} and labels up to {dataset.class_count - 1}",
            hint="Train a function of your own with fn=.",
        )


def _recovery(workload: Workload, cluster: SparkCluster) -> Recovery | None:
    """Return how a round outlives a lost executor; its checkpoints get a folder of their own."""
    if not workload.retries and workload.checkpoint_every is None:
        return None
    if workload.checkpoint_every is None:
        return Recovery(workload.retries, None, "")
    if workload.checkpoint_folder is None and cluster.kind == "external":
        raise ConfigurationError(
            "Checkpoints of executors on other machines need a place",
            expected="checkpoint_folder= with a folder that all machines share, or a URI such as hdfs://...",
            actual="nothing",
        )
    parent = workload.checkpoint_folder or str(cluster.folder / "checkpoints")
    if "://" not in parent:
        parent = os.path.abspath(parent)
    return Recovery(workload.retries, workload.checkpoint_every, f"{parent.rstrip('/')}/round-{uuid.uuid4().hex[:12]}")


def _capture_there(index: int) -> Any:
    """Return the environment of the executor that runs this, JSON-ready."""
    return to_json(environment.capture(os.environ, gpus=[one.name for one in gpu.detect()]))


def _adapter(workload: Workload) -> Any:
    """Return the launcher module of the workload's framework; importing it imports no framework."""
    return importlib.import_module(f"{FRAMEWORKS[workload.framework].module}.launch")


def _launcher(workload: Workload) -> Any:
    """Return the function that launches a round of ``workload``."""
    usual = workload.launcher == FRAMEWORKS[workload.framework].launchers[0]
    return getattr(_adapter(workload), "launch" if usual else f"launch_{workload.launcher}")


def _executors_python(config: GaugeConfig, environ: Mapping[str, str]) -> str:
    """Return the interpreter of the Python workers: on a cluster of the user's PYSPARK_PYTHON, where that is set."""
    from sparkgauge.cluster.conf import master_kind

    own = environ.get("PYSPARK_PYTHON") if master_kind(config.master) == "external" else None
    return own or sys.executable


def _portable(fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return ``fn`` so that executors can load it although they cannot import the module of a test.

    Functions of installed packages travel by name; the user's own files, and those that they import, travel whole.
    """
    found: dict[str, ModuleType] = {}
    waiting = [_home(fn), _home(getattr(fn, "__wrapped__", None))]
    while waiting:
        module = waiting.pop()
        if module is not None and module.__name__ not in found and _travels(module):
            found[module.__name__] = module
            waiting += [_home(value) for value in vars(module).values()]
    if found:
        from pyspark import cloudpickle

        for module in found.values():
            cloudpickle.register_pickle_by_value(module)
    return fn


def _home(value: object) -> ModuleType | None:
    """Return the module that ``value``, a module or something that can be called, is or comes from; None otherwise."""
    if isinstance(value, ModuleType):
        return value
    if isinstance(value, partial):
        return _home(value.func)
    if isinstance(value, MethodType):
        return _home(type(value.__self__))
    if not isinstance(value, (FunctionType, type)) and callable(value):
        value = type(value)
    return sys.modules.get(value.__module__ or "") if isinstance(value, (FunctionType, type)) else None


def _travels(module: ModuleType) -> bool:
    """Return whether ``module`` is a file of the user's own, which executors may be unable to import."""
    file = getattr(module, "__file__", None)
    if file is None or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts):
        return False
    known = module.__name__ in sys.modules  # cloudpickle's condition
    return known and module.__name__.partition(".")[0] not in ("__main__", "sparkgauge", *sys.stdlib_module_names)


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

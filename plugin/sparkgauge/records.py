"""The records of a run: what was measured, on what, with which data. Plain frozen data, standard library only.

Every record turns into JSON with :func:`to_json` and back with :func:`from_json`, which refuses what does not fit
(unknown or missing fields, wrong types) with one :class:`~sparkgauge.errors.BaselineError` naming the field.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sparkgauge.errors import BaselineError

SCHEMA_VERSION = 1
"""Version of the JSON layout of run records and baselines; a reader refuses a newer one."""

Status = Literal["match", "regressed", "improved", "inconclusive", "missing", "not_comparable", "generated"]
"""The one status vocabulary of verdicts."""

PHASES = ("launch", "feed", "warmup", "compute", "sync", "evaluate", "collect")
"""Phases of a round in order of first appearance; their seconds add up to the round's runtime."""


@dataclass(frozen=True)
class DataIdentity:
    """Which data a run was trained on; runs on different data are never compared."""

    name: str
    """Data set, e.g. ``cifar10``."""
    kind: Literal["real", "synthetic", "user"]
    """``synthetic`` is announced wherever the run is shown."""
    digest: str
    """SHA-256 (hex) of labels and pixels, training then test set."""
    train_count: int
    test_count: int


@dataclass(frozen=True)
class Environment:
    """What a run was measured on."""

    hardware_class: str
    """Slug of what must match for runtimes to be comparable, e.g. ``linux-x86_64-amd-epyc-2c``; a folder name."""
    cpu_model: str
    cores: int
    """Logical processors this process may use."""
    memory_bytes: int
    gpus: tuple[str, ...]
    """Names of the GPUs, in index order; empty without any."""
    operating_system: str
    software: dict[str, str]
    """Versions by name: python, java, spark, tensorflow, keras, numpy, blas, ..."""


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds one executor spent in each phase of a round, as the person waiting sees them."""

    launch: float = 0.0
    """From the test's call to the first training step, on the way there: Spark job, rendezvous, model."""
    feed: float = 0.0
    """Getting batches out of the shard."""
    warmup: float = 0.0
    """The first training step: tracing and compiling."""
    compute: float = 0.0
    """Forward, backward and update."""
    sync: float = 0.0
    """Waiting for other executors and reducing gradients."""
    evaluate: float = 0.0
    """Testing on this executor's share of the whole test set."""
    collect: float = 0.0
    """From this executor's last word to the driver having everything."""

    @property
    def total(self) -> float:
        """Return the sum over the phases, in seconds."""
        return math.fsum(getattr(self, name) for name in PHASES)


@dataclass(frozen=True)
class MachineState:
    """What an executor's machine did during a round; None stands for what the system does not expose."""

    seconds: float
    """Wall seconds that this covers: from the executor's first word to its last."""
    load_average: float
    """1-minute load average at the end."""
    steal_fraction: float | None = None
    """Share of the processors' time that the hypervisor gave to others."""
    throttled_seconds: float | None = None
    """Time for which a processor quota stopped the executor's cgroup."""
    throttled_count: int | None = None
    """Periods cut short by the quota, and throttlings by the processor's heat."""
    swapped_bytes: int | None = None
    """Swapped in and out, by the whole machine."""


@dataclass(frozen=True)
class GpuState:
    """What one GPU of an executor did during a round, sampled ten times a second; None stands for what it hides."""

    name: str
    uuid: str
    driver: str
    samples: int
    """Of the training phases (feed, compute, sync) where there were any; of the whole round otherwise."""
    utilisation_fraction: float | None = None
    """Mean share of the time in which a kernel ran."""
    sm_clock_mhz: float | None = None
    sm_clock_least_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None
    """The highest."""
    memory_peak_bytes: int | None = None
    """The most in use by anybody."""
    memory_bytes: int | None = None
    energy_joules: float | None = None
    """Over the whole round: from the GPU's own counter, or its mean power times the seconds where it has none."""
    throttled_fraction: float | None = None
    """Share of all samples with lower clocks for a reason that no workload asks for, such as heat."""
    throttle_reasons: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    """Uncorrected memory errors (ECC) and critical errors (XID) that came up meanwhile."""


@dataclass(frozen=True)
class ExecutorRecord:
    """One executor's share of a round."""

    rank: int
    host: str
    phases: PhaseSeconds
    step_seconds: tuple[float, ...]
    """Wall seconds of every training step after the first (feed + compute + sync)."""
    train_images: int
    test_images: int
    cpu_seconds: float
    """User + system CPU time of the training process."""
    phase_cpu_seconds: PhaseSeconds | None = None
    """The same by phase; what a compiled step does while it waits for others counts as compute."""
    waited_seconds: float | None = None
    """How long the training process's threads together were ready to run and had no core; None where the kernel does
    not count it."""
    jvm_cpu_seconds: float | None = None
    """User + system CPU time of the Spark executor's JVM meanwhile; None where ``/proc`` does not tell."""
    reference_seconds: tuple[float, ...] = ()
    """Wall seconds of the reference kernel's pieces between the steps, which belong to no phase; none on GPUs."""
    machine: MachineState | None = None
    """None in records that were made before this was recorded."""
    gpus: tuple[GpuState, ...] = ()
    """Of a training on GPUs, where NVIDIA's management library could be asked."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of the learning curve."""

    step: int
    epoch: float
    train_loss: float
    """Mean loss over the images since the last point."""
    accuracy_fraction: float | None
    """Share of the whole test set classified right, where it was evaluated at this step."""
    elapsed_seconds: float


@dataclass(frozen=True)
class Round:
    """One timed training + test, start to end."""

    seed: int
    runtime_seconds: float
    """Without the reference kernel's pieces between the steps."""
    accuracy_fraction: float
    """On the whole test set, each image counted once."""
    images_per_second: float
    """Training images over the seconds from the end of the first step to the end of the last, evaluation left out."""
    executors: tuple[ExecutorRecord, ...]
    curve: tuple[CurvePoint, ...]
    load_average: float
    """1-minute load average when the round began."""
    started_at: str
    """ISO 8601, UTC."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further scalars that the user's own ``fit`` returned."""
    reference_seconds: tuple[float, ...] = ()
    """The reference kernel's wall seconds on each executor just before the round; empty where it was not timed."""
    driver_cpu_seconds: float | None = None
    """User + system CPU time of the driver, Python and JVM, during the round; None where ``/proc`` does not tell."""
    invalid: str = ""
    """Why this round is no sample, such as a task that Spark retried; empty for a valid one."""

    @property
    def pieces_seconds(self) -> float:
        """Return how long the reference kernel's pieces between the steps took in all, the mean over the executors."""
        each = [math.fsum(one.reference_seconds) for one in self.executors]
        return math.fsum(each) / len(each) if each else 0.0


@dataclass(frozen=True)
class Ceiling:
    """What a run's executors together can do at most, measured once a session while all of them were busy."""

    gemm_gflops: float
    """The fastest of several large matrix products."""
    memory_gigabytes_per_second: float
    """Reading and writing one large array."""
    precision: str
    """Of the matrix product: ``float32``, ``bfloat16``."""


@dataclass(frozen=True)
class RunRecord:
    """Everything one ``train(...)`` call measured."""

    test_id: str
    """The test's pytest node id without its folder's absolute path."""
    label: str
    """Tells several ``train()`` calls of one test apart; ``trained`` for the fixture."""
    workload: dict[str, Any]
    """The workload's fields (framework, model, device, executors, ...)."""
    profile: str
    data: DataIdentity
    environment: Environment
    commit: str
    """Git commit of the working tree, ``+dirty`` appended when it has changes; empty outside git."""
    rounds: tuple[Round, ...]
    injections: dict[str, float] = field(default_factory=dict)
    """Deliberate slowdown by phase (``--gauge-inject``), as a fraction; such a run never becomes a baseline."""
    ceiling: Ceiling | None = None
    """None where it was not measured, as in records that are older than it."""
    schema: int = SCHEMA_VERSION

    @property
    def valid_rounds(self) -> tuple[Round, ...]:
        """Return the rounds that are samples."""
        return tuple(one for one in self.rounds if not one.invalid)


@dataclass(frozen=True)
class ExecutorShare:
    """What a baseline keeps of one executor's share of a round."""

    phases: PhaseSeconds
    phase_cpu_seconds: PhaseSeconds | None = None


@dataclass(frozen=True)
class Approval:
    """Who wrote a baseline, when and why."""

    who: str
    when: str
    """ISO 8601, UTC."""
    why: str


@dataclass(frozen=True)
class PastBaseline:
    """An earlier generation of a baseline of the same test, profile and hardware class."""

    approved: Approval
    commit: str
    workload: dict[str, Any]
    """Generations of other work or other data are no part of one history."""
    data: DataIdentity
    software: dict[str, str]
    """Versions by name, as in :class:`Environment`."""
    seeds: tuple[int, ...]
    samples: dict[str, tuple[float, ...]]
    """Raw samples, under the keys of :attr:`Baseline.samples`."""


@dataclass(frozen=True)
class Baseline:
    """The stored raw samples that later runs of one test are compared with."""

    test_id: str
    workload: dict[str, Any]
    profile: str
    data: DataIdentity
    environment: Environment
    commit: str
    approved: Approval
    seeds: tuple[int, ...]
    """Seed of each round, in the order of the samples."""
    samples: dict[str, tuple[float, ...]]
    """Raw samples by metric name with its unit: ``runtime_seconds``, ``accuracy_fraction``, ``speedup_ratio``,
    ``launch_seconds``, ..."""
    history: tuple[PastBaseline, ...] = ()
    """What this one replaced, oldest first."""
    executors: dict[str, tuple[tuple[ExecutorShare, ...], ...]] = field(default_factory=dict)
    """By label, for each round, each executor's phases in order of rank; empty in files written before it was kept."""
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Verdict:
    """What a gated comparison found; true only when the gate passes."""

    status: Status
    metric: str
    better: Literal["lower", "higher"]
    actual: float
    """Mean of the candidate's samples, in the metric's unit."""
    expected: float | None
    """Mean of the baseline's samples."""
    change: float | None
    """Ratio candidate / baseline for runtimes and speed-ups, difference candidate - baseline for accuracies."""
    change_low: float | None
    change_high: float | None
    """Confidence interval of ``change``."""
    limit: float | None
    """The worst ``change`` that still passes."""
    confidence: float
    candidate_count: int
    baseline_count: int
    baseline_file: str
    reason: str
    """One sentence: why this status."""
    hint: str
    """The next command."""
    passed: bool
    """Whether the assert holds under the session's policy."""
    note: str = ""
    """What was done about the machine's state: whether times were normalised, and what was measured to say so."""
    where: str = ""
    """Of a regression: the phase and executor that explain it, their share, and whether it is work or waiting."""
    p_value: float | None = None
    """Of a regression: one-sided probability of such samples if nothing had changed, over all looks; else None."""

    def __bool__(self) -> bool:
        return self.passed


T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Return ``record`` as JSON-ready dicts, lists and scalars; non-finite numbers raise BaselineError."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [to_json(value) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        raise BaselineError("Refusing to store a number that is not finite", actual=str(record))
    return record


def from_json(kind: type[T], value: Any, where: str = "record") -> T:
    """Return ``value`` (from ``json.loads``) as ``kind``; BaselineError names the first field that does not fit."""
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return _expect(value in arguments, value, where, f"one of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if origin is tuple:
        _expect(isinstance(value, list), value, where, "a list")
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), value, where, "an object")
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(number and math.isfinite(value), value, where, "a finite number")
        return float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return _expect(fits, value, where, kind.__name__)


def _read_record(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), value, where, "an object")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        _expect(name in known, name, where, f"only the fields {', '.join(known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        _expect(name in value or not required, "nothing", f"{where}.{name}", "a value")
    return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _expect(holds: bool, value: Any, where: str, expected: str) -> Any:
    if not holds:
        raise BaselineError("Unreadable record", expected=expected, actual=repr(value)[:80], where=where)
    return value

"""The plugin's options as one table, and the frozen configuration read from it once per session.

The command line wins over the option's environment variable, then its ini twin, then the default. Nothing here imports
pytest: :func:`add_options` and :meth:`GaugeConfig.build` take what they need as arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from sparkgauge.errors import ConfigurationError

ValueKind = Literal[
    "count",
    "retries",
    "seed",
    "seconds",
    "percent",
    "points",
    "confidence",
    "memory",
    "master",
    "injections",
    "path",
    "text",
    "gpu_share",
    "prices",
    "requirements",
]
Kind = Literal[ValueKind, "choice", "flag", "switch"]
Profile = Literal["smoke", "ci", "full"]

PROFILES: tuple[Profile, ...] = ("smoke", "ci", "full")
BatchRule = Literal["global", "per-executor"]
BATCH_RULES: tuple[BatchRule, ...] = ("global", "per-executor")
SYNTHETIC = "synthetic"
"""The value of ``--gauge-data`` that asks for the look-alike data."""
BASELINES_FOLDER = "baselines"
"""Where baselines lie below the root folder unless told otherwise."""
EMBEDDED = "embedded"
"""The value of ``--gauge-master`` for the cluster that the plugin starts itself."""

DEFAULT_EXECUTORS = 2
"""The smallest number that makes training distributed."""
DEFAULT_EXECUTOR_MEMORY_MIB = 1024
"""JVM heap per executor: it only carries tasks and results, training lives in the Python process beside it."""
LEAST_EXECUTOR_MEMORY_MIB = 512
"""Spark refuses less than 450 MiB (1.5 times its 300 MiB reserve)."""
ROUND_TIMEOUT_SECONDS: Mapping[str, float] = {"smoke": 600.0, "ci": 600.0, "full": 7200.0}
"""Far above a slow machine's round, so that only a hang reaches it."""
BUDGET_SECONDS: Mapping[str, float] = {"smoke": 20.0, "ci": 45.0, "full": 1800.0}
"""Time per test for rounds beyond the planned ones; the profiles' time limits (90 s, 6 min) leave room for it."""
DEFAULT_MAX_ROUNDS = 10
DEFAULT_MARGIN_PERCENT = 10.0
DEFAULT_ACCURACY_MARGIN_POINTS = 1.0
DEFAULT_CONFIDENCE = 0.95
DEFAULT_SEED = 1
RETRY_LIMIT = 100
"""Nobody waits for so many; a mistyped number must not let a round fail for hours."""

INJECTABLE_PHASES = ("feed", "compute")
"""The phases that a training step can be slowed down in."""

REQUIREMENTS = ("gpu",)
"""What ``--gauge-require`` can ask of a machine."""

_GROUP = "sparkgauge"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_MEMORY_UNITS_MIB = {"m": 1, "g": 1024, "t": 1024 * 1024}
_LOCAL_CLUSTER = re.compile(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
_SEED_LIMIT = 2**32
"""The frameworks' seeds are unsigned 32-bit numbers."""


@dataclass(frozen=True)
class Option:
    """One option: how it is spelled, read and explained."""

    name: str
    """Destination on the command line, and the key of messages."""
    flag: str
    ini: str | None
    """Name of the ini twin; None where a stored answer would be dangerous (updating baselines)."""
    kind: Kind
    help: str
    default: Any = None
    """Value when nothing is said; None where it depends on the machine or the profile."""
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    off_flag: str | None = None
    """The flag that says no, for switches."""
    variable: str | None = None
    """Environment variable read between command line and ini."""

    def convert(self, value: Any, where: str) -> Any:
        """Return ``value`` as this option's kind; ConfigurationError names ``where``, the value and what is allowed."""
        if self.kind == "choice":
            return _one_of(value, self.choices, where)
        if self.kind in ("flag", "switch"):
            return _boolean(value, where)
        return _CONVERTERS[self.kind](value, where)


def _twin(name: str, kind: Kind, text: str, **parts: Any) -> Option:
    return Option(f"gauge_{name}", f"--gauge-{name.replace('_', '-')}", f"gauge_{name}", kind, text, **parts)


def _line_only(name: str, kind: Kind, text: str, **parts: Any) -> Option:
    return Option(f"gauge_{name}", f"--gauge-{name.replace('_', '-')}", None, kind, text, **parts)


OPTIONS: tuple[Option, ...] = (
    _twin(
        "executors", "count", "Spark executors to start or ask for (default: 2, or 1 on a single core).", metavar="N"
    ),
    _twin("cores", "count", "Cores per executor (default: the machine's cores shared out evenly).", metavar="N"),
    _twin("memory", "memory", "JVM memory per executor, e.g. 2g (default: 1g).", metavar="SIZE"),
    _twin(
        "master",
        "master",
        "Spark master: embedded (a standalone cluster on 127.0.0.1), spark://HOST:PORT, yarn, k8s://URL or "
        "local-cluster[N,CORES,MIB] (default: embedded).",
        default=EMBEDDED,
        metavar="URL",
    ),
    _twin(
        "data",
        "text",
        "CIFAR-10: a folder or archive with the binary or python layout, or 'synthetic' "
        "(default: $SPARKGAUGE_DATA, the user cache, a download).",
        metavar="PATH",
        variable="SPARKGAUGE_DATA",
    ),
    _twin(
        "profile",
        "choice",
        "Length of training: smoke (mechanics), ci, full (the reference workload) (default: ci).",
        default="ci",
        choices=PROFILES,
    ),
    _twin("rounds", "count", "Timed rounds per train() (default: by profile).", metavar="N"),
    _twin(
        "baselines",
        "path",
        "Folder of the stored baselines (default: baselines, under the root folder).",
        metavar="DIR",
    ),
    _line_only(
        "update",
        "choice",
        "Store this run as baseline: where there is none (new), or everywhere (all).",
        choices=("new", "all"),
    ),
    _line_only("force_update", "flag", "Let --gauge-update write although CI is set.", default=False),
    _twin(
        "require_baseline",
        "switch",
        "Fail gated asserts that have no baseline (default), or let them pass with status missing.",
        default=True,
        off_flag="--gauge-no-require-baseline",
    ),
    _twin("report", "path", "Write the run's records and verdicts as JSON to this file.", metavar="PATH"),
    _twin(
        "timeout", "seconds", "Seconds after which a hung round is cancelled (default: 600; full: 7200).", metavar="S"
    ),
    _twin(
        "max_rounds",
        "count",
        "Most rounds per train() while the gate is undecided (default: 10).",
        default=DEFAULT_MAX_ROUNDS,
        metavar="N",
    ),
    _twin(
        "budget", "seconds", "Seconds per test for rounds beyond the planned ones (default: by profile).", metavar="S"
    ),
    _twin(
        "runtime_margin",
        "percent",
        "Runtime may exceed the baseline by this much (default: 10%%).",
        default=DEFAULT_MARGIN_PERCENT / 100,
        metavar="PERCENT",
    ),
    _twin(
        "speedup_margin",
        "percent",
        "Speed-ups may fall short of the baseline by this much (default: 10%%).",
        default=DEFAULT_MARGIN_PERCENT / 100,
        metavar="PERCENT",
    ),
    _twin(
        "accuracy_margin",
        "points",
        "Accuracy may fall short of the baseline by this many percentage points (default: 1).",
        default=DEFAULT_ACCURACY_MARGIN_POINTS / 100,
        metavar="POINTS",
    ),
    _twin(
        "confidence",
        "confidence",
        "Confidence of the gate's intervals, between 0 and 1 (default: 0.95).",
        default=DEFAULT_CONFIDENCE,
        metavar="SHARE",
    ),
    _twin(
        "inconclusive",
        "choice",
        "What a comparison does that stays undecided (default: fail).",
        default="fail",
        choices=("fail", "skip"),
    ),
    _twin(
        "seed", "seed", "Seed of the first round; each round adds one (default: 1).", default=DEFAULT_SEED, metavar="N"
    ),
    _twin(
        "batch",
        "choice",
        "What a model's batch counts: the images of all executors together, or of each, so that more executors "
        "train on more images per step (default: global).",
        default="global",
        choices=BATCH_RULES,
    ),
    _twin(
        "retries",
        "retries",
        "Times that a round may go on after an executor was lost, where the framework can; such a round is no timing "
        "sample (default: 0).",
        default=0,
        metavar="N",
    ),
    _line_only(
        "against",
        "text",
        "Compare with this commit of the repository instead of stored baselines: it is checked out and trained in "
        "turn with the working tree.",
        metavar="REF",
    ),
    _line_only(
        "against_python",
        "path",
        "Python interpreter for the other side of --gauge-against, with its own packages (default: this one).",
        metavar="PATH",
    ),
    _line_only(
        "inject",
        "injections",
        "Slow phases down on purpose, e.g. compute=30%%, to see the gate at work (phases: feed, compute).",
        default={},
        metavar="PHASE=PERCENT,...",
    ),
    _twin(
        "gpus_per_executor",
        "gpu_share",
        "GPUs of each executor in sessions with tests on GPUs: a whole number, or a fraction such as 0.5 for two "
        "executors that share one (default: 1).",
        default=1.0,
        metavar="N",
    ),
    _twin(
        "require",
        "requirements",
        "What this machine must have: gpu makes tests that would be skipped for want of one fail.",
        default=frozenset(),
        metavar="gpu",
    ),
    _twin(
        "price",
        "prices",
        "What an hour of a machine costs, by device or by a GPU's name: cpu=0.80/h,gpu=3.20/h adds cost per training "
        "and the break-even price to the report.",
        default={},
        metavar="DEVICE=PRICE/h,...",
    ),
)
"""Every option, in the order of ``pytest --help``."""


class _Group(Protocol):
    def addoption(self, *names: str, **attributes: Any) -> None: ...


class _Parser(Protocol):
    def getgroup(self, name: str, description: str = "") -> Any: ...
    def addini(self, name: str, help: str, type: Any = None, default: Any = None) -> None: ...


def add_options(parser: _Parser) -> None:
    """Register every option and ini twin with pytest's ``parser``; values are checked by :meth:`GaugeConfig.build`."""
    group: _Group = parser.getgroup(_GROUP, "distributed training benchmarks (sparkgauge)")
    for option in OPTIONS:
        _add_flags(group, option)
        if option.ini:
            parser.addini(option.ini, f"Twin of {option.flag}. {option.help}".replace("%%", "%"), type="string")


def _add_flags(group: _Group, option: Option) -> None:
    common: dict[str, Any] = {"dest": option.name, "default": None}
    if option.kind in ("flag", "switch"):
        group.addoption(option.flag, action="store_const", const=True, help=option.help, **common)
    else:
        metavar = option.metavar or "|".join(option.choices)
        group.addoption(option.flag, metavar=metavar, help=option.help, **common)
    if option.off_flag:
        group.addoption(option.off_flag, action="store_const", const=False, help=f"Not {option.flag}.", **common)


@dataclass(frozen=True)
class GaugeConfig:
    """What the session was asked to do; read once, never changed."""

    executors: int
    cores_per_executor: int
    executor_memory_mib: int
    master: str | None
    """A Spark master URL; None for the cluster that the plugin starts itself."""
    data: str | None
    """``synthetic``, an absolute path, or None for the user cache or a download."""
    profile: Profile
    rounds: int | None
    """None when marker or profile decide."""
    baselines_folder: Path
    update: Literal["new", "all"] | None
    require_baseline: bool
    report_file: Path | None
    timeout_seconds: float
    max_rounds: int
    budget_seconds: float
    runtime_margin_fraction: float
    speedup_margin_fraction: float
    accuracy_margin_fraction: float
    confidence: float
    inconclusive: Literal["fail", "skip"]
    seed: int
    injections: Mapping[str, float]
    """Deliberate slowdown by phase, as a fraction of the phase's own time; empty for an honest run."""
    ci: bool
    """Whether the environment variable CI says that nobody is watching."""
    given: frozenset[str]
    """Names, without ``gauge_``, of the options on the command line: these win over markers."""
    against: str | None = None
    """The commit that this session compares with, in the user's words; None for stored baselines."""
    against_python: Path | None = None
    batch: BatchRule = "global"
    gpus_per_executor: float = 1.0
    required: frozenset[str] = frozenset()
    """What the machine must have: tests that want it fail rather than skip."""
    prices: Mapping[str, float] = field(default_factory=dict)
    """Price of an hour of the whole machine, by device (``cpu``, ``gpu``) or by a GPU's name."""
    chosen: frozenset[str] = frozenset()
    """Which of ``executors`` and ``cores`` somebody chose; the others follow from the machine."""
    retries: int = 0
    """Times that a round may go on after an executor was lost."""

    @property
    def embedded(self) -> bool:
        """Return whether the plugin starts the cluster itself."""
        return self.master is None

    @property
    def trains_here(self) -> bool:
        """Return whether the executors run on this machine, not on a cluster of the user's own."""
        return self.embedded or str(self.master).startswith("local-cluster")

    @classmethod
    def build(
        cls,
        get_option: Callable[[str], Any],
        get_ini: Callable[[str], Any],
        environ: Mapping[str, str],
        *,
        rootdir: Path | None = None,
        invocation_folder: Path | None = None,
        cores: int | None = None,
        memory_bytes: int | None = None,
    ) -> GaugeConfig:
        """Return the checked configuration; ConfigurationError names a bad option, its value and what is allowed.

        Relative paths of the command line and the environment start at ``invocation_folder``, those of the ini file at
        ``rootdir`` (both default to the current folder). ``cores`` and ``memory_bytes`` default to this machine's.
        """
        from sparkgauge import environment  # not at the top: loading the plugin stays cheap

        here = (invocation_folder or Path.cwd()).resolve()
        root = (rootdir or here).resolve()
        values, given = _read_all(get_option, get_ini, environ, here, root)
        _check_update(values, ci=is_ci(environ))
        machine_bytes = environment.memory_bytes() if memory_bytes is None else memory_bytes
        size = _cluster_size(values, cores or environment.usable_cores(), machine_bytes)
        profile = values["profile"]
        return cls(
            **size,
            **{name: values[name] for name in _COPIED},
            master=None if values["master"] == EMBEDDED else values["master"],
            baselines_folder=values["baselines"] or root / BASELINES_FOLDER,
            report_file=values["report"],
            timeout_seconds=values["timeout"] or ROUND_TIMEOUT_SECONDS[profile],
            max_rounds=_max_rounds(values, given),
            budget_seconds=BUDGET_SECONDS[profile] if values["budget"] is None else values["budget"],
            runtime_margin_fraction=values["runtime_margin"],
            speedup_margin_fraction=values["speedup_margin"],
            accuracy_margin_fraction=values["accuracy_margin"],
            injections=values["inject"],
            ci=is_ci(environ),
            given=given,
            against=values["against"],
            against_python=values["against_python"],
            gpus_per_executor=values["gpus_per_executor"],
            required=values["require"],
            prices=values["price"],
            chosen=frozenset(name for name in ("executors", "cores") if values[name]),
        )

    def for_gpus(self, gpus: int, cores: int) -> GaugeConfig:
        """Return this for a session with tests on GPUs: as many executors as ``gpus`` serve, where nobody chose.

        An embedded cluster then shares the machine's ``cores`` out anew, so that CPU tests use them all.
        """
        from sparkgauge.gpu import fitting

        if not self.embedded or "executors" in self.chosen or not gpus:
            return self
        executors = fitting(self.executors, gpus, self.gpus_per_executor)
        cores_each = self.cores_per_executor if "cores" in self.chosen else max(1, cores // executors)
        return replace(self, executors=executors, cores_per_executor=cores_each)


def check(get_option: Callable[[str], Any], get_ini: Callable[[str], Any], environ: Mapping[str, str]) -> None:
    """Raise what :meth:`GaugeConfig.build` would raise for a bad option, without a look at the machine."""
    values, given = _read_all(get_option, get_ini, environ, Path(), Path())
    _check_update(values, ci=is_ci(environ))
    _cluster_size(values, cores=1, memory_bytes=0)
    _max_rounds(values, given)


_COPIED = (
    *("data", "profile", "rounds", "update", "require_baseline", "confidence", "inconclusive"),
    *("seed", "batch", "retries"),
)


def is_ci(environ: Mapping[str, str]) -> bool:
    """Return whether the environment variable CI is set to something other than a no."""
    return environ.get("CI", "").strip().lower() not in ("", *_FALSE)


def _read_all(
    get_option: Callable[[str], Any], get_ini: Callable[[str], Any], environ: Mapping[str, str], here: Path, root: Path
) -> tuple[dict[str, Any], frozenset[str]]:
    values: dict[str, Any] = {}
    given = set()
    for option in OPTIONS:
        name = option.name.removeprefix("gauge_")
        raw, where, folder = _find(option, get_option, get_ini, environ, here, root)
        value = option.default if raw is None else option.convert(raw, where)
        values[name] = _anchor(value, option, folder)
        if where == option.flag:
            given.add(name)
    return values, frozenset(given)


def _find(
    option: Option,
    get_option: Callable[[str], Any],
    get_ini: Callable[[str], Any],
    environ: Mapping[str, str],
    here: Path,
    root: Path,
) -> tuple[Any, str, Path]:
    """Return the raw value (None: nobody said), where it was found, and the folder its relative paths start at."""
    if (value := get_option(option.name)) is not None:
        return value, option.flag, here
    if option.variable and (value := environ.get(option.variable)):
        return value, f"the environment variable {option.variable}", here
    if option.ini and (value := get_ini(option.ini)) not in (None, ""):
        return value, f"the ini option {option.ini}", root
    return None, "", root


def _anchor(value: Any, option: Option, folder: Path) -> Any:
    if value is None or value == SYNTHETIC:
        return value
    if option.kind == "path":
        return folder / Path(value).expanduser()
    return str(folder / Path(value).expanduser()) if option.name == "gauge_data" else value


def _check_update(values: Mapping[str, Any], ci: bool) -> None:
    if values["update"] and values["against"]:
        raise ConfigurationError(
            "--gauge-against compares with a commit, not with baselines",
            expected="either --gauge-against or --gauge-update",
            actual=f"--gauge-against {values['against']} --gauge-update {values['update']}",
        )
    if values["against_python"] and not values["against"]:
        raise ConfigurationError(
            "--gauge-against-python belongs to --gauge-against", expected="--gauge-against REF", actual="nothing"
        )
    if values["update"] and ci and not values["force_update"]:
        raise ConfigurationError(
            "Refusing to write baselines in CI",
            expected="no --gauge-update while the environment variable CI is set",
            actual=f"--gauge-update {values['update']}",
            hint="Add --gauge-force-update if this job's task is to record baselines.",
        )


def _max_rounds(values: Mapping[str, Any], given: frozenset[str]) -> int:
    rounds, most = values["rounds"] or 1, int(values["max_rounds"])
    if rounds > most and "max_rounds" in given:
        raise ConfigurationError(
            "More rounds planned than allowed",
            expected=f"--gauge-rounds of at most --gauge-max-rounds ({most})",
            actual=str(rounds),
        )
    return max(rounds, most)


def _cluster_size(values: Mapping[str, Any], cores: int, memory_bytes: int) -> dict[str, Any]:
    """Return executors, cores per executor and executor memory from the options and the machine."""
    if match := _LOCAL_CLUSTER.fullmatch(values["master"]):
        return _local_cluster_size(values, [int(number) for number in match.groups()])
    embedded = values["master"] == EMBEDDED
    executors = values["executors"] or (min(DEFAULT_EXECUTORS, cores) if embedded else DEFAULT_EXECUTORS)
    # an existing cluster's machines are unknown here: one core each is what every cluster grants
    cores_each = values["cores"] or (max(1, cores // executors) if embedded else 1)
    memory = values["memory"] or (_fitting_memory_mib(executors, memory_bytes) if embedded else None)
    return {
        "executors": executors,
        "cores_per_executor": cores_each,
        "executor_memory_mib": memory or DEFAULT_EXECUTOR_MEMORY_MIB,
    }


def _fitting_memory_mib(executors: int, memory_bytes: int) -> int:
    """Return 1 GiB, or less where the executors' JVMs together would take more than half of the memory."""
    share = memory_bytes // 2 // executors // 2**20
    return max(LEAST_EXECUTOR_MEMORY_MIB, min(DEFAULT_EXECUTOR_MEMORY_MIB, share))


def _local_cluster_size(values: Mapping[str, Any], numbers: list[int]) -> dict[str, int]:
    names = ("executors", "cores", "memory")
    for name, number in zip(names, numbers, strict=True):
        if number == 0 or values[name] not in (None, number):
            raise ConfigurationError(
                "The master URL and an option disagree",
                expected=f"{name} of at least 1, the same in {values['master']} and --gauge-{name}",
                actual=str(number if number == 0 else values[name]),
            )
    return dict(zip(("executors", "cores_per_executor", "executor_memory_mib"), numbers, strict=True))


def _bad(where: str, expected: str, value: Any) -> ConfigurationError:
    return ConfigurationError(f"Bad value for {where}", expected=expected, actual=repr(value))


def _one_of(value: Any, choices: tuple[str, ...], where: str) -> str:
    text = str(value).strip()
    if text not in choices:
        raise _bad(where, f"one of {', '.join(choices)}", value)
    return text


def _boolean(value: Any, where: str) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise _bad(where, "true or false", value)
    return text in _TRUE


def _whole(value: Any, where: str, least: int, limit: int | None, expected: str) -> int:
    text = str(value).strip()
    # isdecimal alone also takes digits of other scripts, and int() takes "1_0"
    if not (text.isascii() and text.isdecimal()):
        raise _bad(where, expected, value)
    number = int(text)
    if number < least or (limit is not None and number >= limit):
        raise _bad(where, expected, value)
    return number


def count(value: Any, where: str) -> int:
    """Return ``value`` as a whole number of at least 1."""
    return _whole(value, where, 1, None, "a whole number of at least 1")


def retries(value: Any, where: str) -> int:
    """Return ``value`` as a number of retries, 0 to 100."""
    return _whole(value, where, 0, RETRY_LIMIT + 1, f"a whole number from 0 to {RETRY_LIMIT}")


def seed(value: Any, where: str) -> int:
    """Return ``value`` as a seed, 0 to 2**32 - 1."""
    return _whole(value, where, 0, _SEED_LIMIT, f"a whole number from 0 to {_SEED_LIMIT - 1}")


def number(value: Any, where: str, expected: str, *, unit: str = "") -> float:
    """Return ``value``, a number or a text with an optional ``unit`` behind it, as a finite float."""
    try:
        result = float(str(value).strip().removesuffix(unit))  # str(True) is no number, float(True) would be one
    except ValueError:
        raise _bad(where, expected, value) from None
    if not math.isfinite(result):
        raise _bad(where, expected, value)
    return result


def seconds(value: Any, where: str) -> float:
    """Return ``value`` as a positive number of seconds."""
    expected = "a number of seconds above 0, e.g. 600"
    result = number(value, where, expected, unit="s")
    if result <= 0:
        raise _bad(where, expected, value)
    return result


def percent(value: Any, where: str) -> float:
    """Return ``value``, e.g. 7.5 or "7.5%", as a fraction of at least 0."""
    expected = "a percentage of at least 0, e.g. 7.5 or 7.5%"
    result = number(value, where, expected, unit="%") / 100
    if result < 0:
        raise _bad(where, expected, value)
    return result


def points(value: Any, where: str) -> float:
    """Return ``value`` in percentage points, 0 to 100, as a fraction."""
    expected = "percentage points from 0 to 100, e.g. 1.5"
    result = number(value, where, expected) / 100
    if not 0 <= result <= 1:
        raise _bad(where, expected, value)
    return result


def _confidence(value: Any, where: str) -> float:
    expected = "a share between 0 and 1, e.g. 0.95 or 95%"
    result = number(value, where, expected, unit="%")
    result = result / 100 if str(value).strip().endswith("%") else result
    if not 0 < result < 1:
        raise _bad(where, expected, value)
    return result


def _memory_mib(value: Any, where: str) -> int:
    expected = f"a size with its unit of at least {LEAST_EXECUTOR_MEMORY_MIB}m, e.g. 2g or 1536m"
    match = re.fullmatch(r"([0-9]+)\s*([mgt])(?:i?b)?", str(value).strip().lower())
    mib = int(match[1]) * _MEMORY_UNITS_MIB[match[2]] if match else 0
    if mib < LEAST_EXECUTOR_MEMORY_MIB:
        raise _bad(where, expected, value)
    return mib


def _master(value: Any, where: str) -> str:
    text = str(value).strip()
    known = text in (EMBEDDED, "yarn") or re.match(r"(spark|k8s)://.", text) or _LOCAL_CLUSTER.fullmatch(text)
    if known:
        return text
    expected = f"{EMBEDDED}, spark://HOST:PORT, yarn, k8s://URL or local-cluster[N,CORES,MIB]"
    if text == "local" or text.startswith("local["):
        expected += " (local[N] runs everything in one process, which measures something else)"
    raise _bad(where, expected, value)


def _injections(value: Any, where: str) -> dict[str, float]:
    """Return the fraction by phase of ``PHASE=PERCENT,...``."""
    expected = f"PHASE=PERCENT with percent at least 0, each phase once, of {', '.join(INJECTABLE_PHASES)}"
    found: dict[str, float] = {}
    for part in str(value).split(","):
        phase, _, amount = (word.strip() for word in part.partition("="))
        if phase not in INJECTABLE_PHASES or phase in found:
            raise _bad(where, expected, value)
        try:
            found[phase] = percent(amount, where)
        except ConfigurationError:
            raise _bad(where, expected, value) from None
    return found


def _gpu_share(value: Any, where: str) -> float:
    expected = "a whole number of GPUs, or a fraction between 0 and 1, e.g. 0.5"
    result = number(value, where, expected)
    if result <= 0 or (result > 1 and result != int(result)):
        raise _bad(where, expected, value)
    return result


def _requirements(value: Any, where: str) -> frozenset[str]:
    return frozenset(_one_of(part, REQUIREMENTS, where) for part in str(value).split(","))


def prices(value: Any, where: str) -> dict[str, float]:
    """Return the price of an hour by device of ``DEVICE=PRICE/h,...``."""
    expected = (
        "DEVICE=PRICE/h with a price above 0, each device once: cpu, gpu or a GPU's name, e.g. cpu=0.8/h,gpu=3.2/h"
    )
    found: dict[str, float] = {}
    for part in str(value).split(","):
        device, _, price = (word.strip() for word in part.rpartition("="))
        if not device or device in found or not price.endswith("/h"):
            raise _bad(where, expected, value)
        found[device] = number(price, where, expected, unit="/h")
        if found[device] <= 0:
            raise _bad(where, expected, value)
    return found


def _text(value: Any, where: str) -> str:
    if not str(value).strip():
        raise _bad(where, "a text that is not empty", value)
    return str(value).strip()


_CONVERTERS: Mapping[str, Callable[[Any, str], Any]] = {
    "count": count,
    "retries": retries,
    "seed": seed,
    "seconds": seconds,
    "percent": percent,
    "points": points,
    "confidence": _confidence,
    "memory": _memory_mib,
    "master": _master,
    "injections": _injections,
    "path": _text,
    "text": _text,
    "gpu_share": _gpu_share,
    "requirements": _requirements,
    "prices": prices,
}

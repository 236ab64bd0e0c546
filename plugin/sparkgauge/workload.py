"""What to train: a marker's or a call's keywords, checked and completed into one frozen workload."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge import config as values
from sparkgauge.config import GaugeConfig
from sparkgauge.data.dataset import IMAGE_SHAPE
from sparkgauge.data.frames import Frames, is_frame
from sparkgauge.errors import ConfigurationError
from sparkgauge.models.caffe import SOLVERS as CAFFE_SOLVERS
from sparkgauge.models.caffe import path as caffe_solver
from sparkgauge.models.cifar10 import RECIPES

if TYPE_CHECKING:
    from sparkgauge.caffe.plan import Plan

ENTRY_POINT_GROUP = "sparkgauge.models"
"""Users register their own ``fit(context, shard)`` under a name here."""
CUSTOM_MODEL = "custom"
"""Model name of a function passed as ``fn=``."""
DEFAULT_FRAMEWORK = "tensorflow"
DEFAULT_CUSTOM_BATCH = 100
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class FrameworkSpec:
    """A framework this package knows by name."""

    models: tuple[str, ...]
    module: str
    """Its adapter."""
    launchers: tuple[str, ...] = ("default",)
    """Ways to start it on Spark, the usual one first."""


FRAMEWORKS: dict[str, FrameworkSpec] = {
    "tensorflow": FrameworkSpec(models=("cifar10_quick", "cifar10_tutorial"), module="sparkgauge.adapters.tensorflow"),
    "caffe": FrameworkSpec(models=tuple(CAFFE_SOLVERS), module="sparkgauge.adapters.caffe"),
    "torch": FrameworkSpec(
        models=("cifar10_quick", "cifar10_full", "cifar10_tutorial", "resnet20", "speedrun"),
        module="sparkgauge.adapters.torch",
        launchers=("barrier", "torchdistributor"),
    ),
}


RECOVERABLE = (("torch", "barrier"),)
"""Framework and launcher whose stage Spark can run again, and whose trainings write checkpoints."""


@dataclass(frozen=True)
class ProfileSpec:
    """How long a profile trains and how often, where marker and options say nothing."""

    iterations: int | None
    """None for the model's own length."""
    rounds: int
    warmup_rounds: int = 0
    """None by default: cluster, data, Python daemons and frameworks are warmed before the first round is timed."""


PROFILE_SPECS: dict[str, ProfileSpec] = {
    "smoke": ProfileSpec(iterations=30, rounds=2),
    "ci": ProfileSpec(iterations=100, rounds=5),
    "full": ProfileSpec(iterations=None, rounds=2),
}

CI_ITERATIONS: dict[str, int] = {"cifar10_tutorial": 30, "resnet20": 25, "speedrun": 10}
"""Length in profile ci where it is not the profile's: a tutorial step takes twice as long as a quick one."""

FULL_ITERATIONS: dict[str, int] = {"cifar10_tutorial": 10_000}
"""Full length where it is not the recipe's: 100,000 steps of the tutorial take most of a day on two cores."""

Fit = Callable[..., Any]


@dataclass(frozen=True)
class Workload:
    """One training + test to measure; everything a round needs to know, and what the gate allows."""

    framework: str
    model: str
    """A built-in name, a name registered under ``sparkgauge.models``, or ``custom``."""
    device: str
    executors: int
    cores_per_executor: int
    epochs: float | None
    iterations: int | None
    """Training steps; None together with ``epochs`` None leaves the length to the user's function."""
    batch_size: int
    """Images per step over all executors."""
    test_every: int | None
    """Steps between tests on the whole test set; None tests once, at the end."""
    rounds: int
    warmup_rounds: int
    seed: int
    runtime_margin_fraction: float
    speedup_margin_fraction: float
    accuracy_margin_fraction: float
    timeout_seconds: float
    data: str | Frames | None = None
    """Overrides the session's data (same values as ``--gauge-data``), or DataFrames to train and test on."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the user's function as ``context.options``."""
    fn: Fit | None = None
    """The user's ``fit(context, shard)``; None trains a built-in model."""
    launcher: str = "default"
    """How the framework is started on Spark; see ``FrameworkSpec.launchers``."""
    plan: Plan | None = None
    """With framework caffe: the solver, its nets and the engine."""
    save_to: str = ""
    """With framework caffe: what the names of the saved weights and states begin with; empty for none."""
    retries: int = 0
    """Times that a round may go on after an executor was lost; 0 where the framework's launcher cannot."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None writes none."""
    checkpoint_folder: str | None = None
    """Where checkpoints go: a folder that all executors see, or a URI such as ``hdfs://...``; None for the cluster's
    own folder."""

    @classmethod
    def from_keywords(
        cls,
        keywords: Mapping[str, Any],
        config: GaugeConfig,
        *,
        where: str = "gauge(...)",
        folders: Sequence[Path] = (),
    ) -> Workload:
        """Return the workload of ``keywords``, completed from ``config`` and its profile.

        A keyword wins over ini file and profile, an option on the command line over the keyword. Relative paths are
        looked for in ``folders``. ConfigurationError names an unknown keyword or a bad value, what is allowed, and
        ``where`` it stands.
        """
        reader = _Reader(keywords, config, where)
        profile = PROFILE_SPECS[config.profile]
        framework, model, fn = reader.training()
        executors = reader.executors()
        plan = reader.plan(framework, model, executors, [Path(folder) for folder in folders] or [Path.cwd()])
        batch_size = reader.batch_size(model, executors, plan)
        iterations, epochs = reader.length(model, profile, plan)
        return cls(
            framework=framework,
            model=model,
            fn=fn,
            device=reader.choice("device", DEVICES, "cpu"),
            executors=executors,
            cores_per_executor=config.cores_per_executor,
            epochs=epochs,
            iterations=iterations,
            batch_size=batch_size,
            test_every=reader.test_every(model, plan),
            rounds=reader.setting("rounds", _count, config.rounds or profile.rounds),
            warmup_rounds=reader.value("warmup_rounds", _count_from_zero, profile.warmup_rounds),
            seed=reader.setting("seed", _seed, config.seed),
            runtime_margin_fraction=reader.setting("runtime_margin", values.percent, config.runtime_margin_fraction),
            speedup_margin_fraction=reader.setting("speedup_margin", values.percent, config.speedup_margin_fraction),
            accuracy_margin_fraction=reader.setting("accuracy_margin", values.points, config.accuracy_margin_fraction),
            timeout_seconds=reader.setting("timeout", values.seconds, config.timeout_seconds),
            data=reader.data(),
            options=reader.value("options", _options, {}),
            launcher=reader.launcher(framework),
            plan=plan,
            save_to=reader.save_to(folders),
            **reader.recovery(framework),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return, JSON-ready, what makes two runs the same workload.

        How often it is measured, with which seed and against which margins is left out: that may differ between
        a run and the baseline it is compared with. Data has its own identity in the records.
        """
        usual = self.launcher == FRAMEWORKS[self.framework].launchers[0]
        return {
            **{name: getattr(self, name) for name in _IDENTITY},
            "options": dict(self.options),
            "function": _function_name(self.fn),
            **({} if usual else {"launcher": self.launcher}),
            **({} if self.plan is None else {"engine": self.plan.engine, "solver": self.plan.digest}),
            # writing them takes time; how often a lost executor is made up for does not
            **({} if self.checkpoint_every is None else {"checkpoint_every": self.checkpoint_every}),
        }


_IDENTITY = (
    *("framework", "model", "device", "executors", "cores_per_executor"),
    *("epochs", "iterations", "batch_size", "test_every"),
)


CAFFE_KEYWORDS = ("engine", "solver", "weights", "snapshot", "save_to", "passes")
"""Those that only framework caffe takes."""

KEYWORDS = (
    "framework",
    "model",
    "fn",
    "device",
    "executors",
    "epochs",
    "iterations",
    "batch_size",
    "test_every",
    "rounds",
    "warmup_rounds",
    "seed",
    "runtime_margin",
    "speedup_margin",
    "accuracy_margin",
    "timeout",
    "data",
    "test_data",
    "test_fraction",
    "image_column",
    "label_column",
    "image_shape",
    "options",
    "launcher",
    *CAFFE_KEYWORDS,
    "checkpoint_every",
    "checkpoint_folder",
)
"""Every keyword of the ``gauge`` marker and of ``train(...)``."""


class _Reader:
    """Reads one set of keywords; every error says where they stand."""

    def __init__(self, keywords: Mapping[str, Any], config: GaugeConfig, where: str) -> None:
        # None is how a caller hands on "not said"
        self._keywords = {name: value for name, value in keywords.items() if value is not None}
        self._config, self._where = config, where
        for name in keywords:
            if name not in KEYWORDS:
                raise self._error(f"Unknown keyword {name!r}{_suggestion(name, KEYWORDS)}", ", ".join(KEYWORDS), name)

    def _error(self, summary: str, expected: str, actual: Any, hint: str | None = None) -> ConfigurationError:
        shown = actual if isinstance(actual, str) else repr(actual)
        return ConfigurationError(summary, expected=expected, actual=shown, where=self._where, hint=hint)

    def value(self, name: str, convert: Callable[[Any, str], Any], default: Any) -> Any:
        """Return keyword ``name`` converted, or ``default``."""
        if name not in self._keywords:
            return default
        try:
            return convert(self._keywords[name], name)
        except ConfigurationError as error:
            raise self._error(error.summary, error.expected or "", error.actual) from None

    def setting(self, name: str, convert: Callable[[Any, str], Any], configured: Any) -> Any:
        """Return ``configured`` if it came from the command line, else the keyword, else ``configured``."""
        value = self.value(name, convert, configured)  # checked even where the command line wins
        return configured if name in self._config.given else value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """Return keyword ``name`` as one of ``choices``."""
        value = self._keywords.get(name, default)
        if value not in choices:
            raise self._error(f"Unknown {name}{_suggestion(value, choices)}", f"one of {', '.join(choices)}", value)
        return str(value)

    def training(self) -> tuple[str, str, Fit | None]:
        """Return framework, model name and the user's function, if any."""
        framework = self.choice("framework", tuple(FRAMEWORKS), DEFAULT_FRAMEWORK)
        if framework == "caffe":
            return framework, self._caffe_model(), None
        for name in CAFFE_KEYWORDS:
            if name in self._keywords:
                raise self._error(f"{name} belongs to framework 'caffe'", "framework='caffe'", framework)
        if "fn" in self._keywords:
            return framework, CUSTOM_MODEL, self._callable("fn", self._keywords["fn"])
        built_in = FRAMEWORKS[framework].models
        if self._keywords.get("model") in built_in:
            return framework, self._keywords["model"], None
        return self._registered(framework, built_in)

    def _caffe_model(self) -> str:
        given = [name for name in ("model", "solver") if name in self._keywords]
        if "fn" in self._keywords or len(given) != 1:
            actual = " and ".join([*given, *(["fn"] if "fn" in self._keywords else [])]) or "neither"
            expected = f"solver= with a file, or model= one of {', '.join(CAFFE_SOLVERS)}"
            raise self._error("Framework 'caffe' trains a solver file", expected, actual)
        if given == ["solver"]:
            return Path(self.value("solver", _path, "")).stem
        return self.choice("model", tuple(CAFFE_SOLVERS), "")

    def plan(self, framework: str, model: str, executors: int, folders: Sequence[Path]) -> Plan | None:
        """Return what a training of a Caffe net needs, read from its files; None for another framework."""
        if framework != "caffe":
            return None
        from sparkgauge.caffe import require_protobuf

        require_protobuf()
        from sparkgauge.caffe.plan import ENGINES, read_plan

        engine = self.choice("engine", ENGINES, ENGINES[0])
        if engine == "caffe" and self.choice("device", DEVICES, "cpu") == "gpu":
            raise self._error("Engine 'caffe' trains on the CPU only", "device='cpu', or engine='torch'", "gpu")
        own = "solver" in self._keywords
        files = {name: self._file(name, folders) for name in ("weights", "snapshot")}
        plan = read_plan(
            self._file("solver", folders) or caffe_solver(model),
            engine=engine,
            folders=folders,
            weights_file=files["weights"],
            state_file=files["snapshot"],
            model=None if own else model,
            passes=self._passes(executors),
        )
        if plan.lmdb is not None and "data" in self._keywords:
            raise self._error("The net names its own data", f"no data=: it reads {plan.lmdb.train}", "data=")
        return plan

    def _passes(self, executors: int) -> int:
        passes = int(self.value("passes", _count, 1))
        if passes > 1 and (passes % executors or self._keywords.get("device") == "gpu"):
            expected = f"a multiple of {executors}, the executors, on the CPU"
            raise self._error("Bad value for passes", expected, passes)
        return passes

    def _file(self, name: str, folders: Sequence[Path]) -> Path | None:
        """Return the file that keyword ``name`` gives, in the first of ``folders`` that has it; None without it."""
        value = self.value(name, _path, None)
        if value is None:
            return None
        candidates = [folder / Path(value).expanduser() for folder in folders]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise self._error(f"{name} names no file", " or ".join(map(str, dict.fromkeys(candidates))), value)
        return found

    def save_to(self, folders: Sequence[Path]) -> str:
        """Return the absolute path that the names of saved files begin with; empty where none are saved."""
        value = self.value("save_to", _path, "")
        return str((Path(folders[-1]) if folders else Path.cwd()) / Path(value).expanduser()) if value else ""

    def _registered(self, framework: str, built_in: tuple[str, ...]) -> tuple[str, str, Fit]:
        name = self._keywords.get("model")
        registered = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
        if name is None or not isinstance(name, str) or name not in registered:
            allowed = (*built_in, *sorted(registered))
            summary = "No model given" if name is None else f"Unknown model{_suggestion(name, allowed)}"
            expected = f"model= one of {', '.join(allowed)}, or fn= with a function"
            raise self._error(summary, expected, "nothing" if name is None else name)
        try:
            loaded = registered[name].load()
        except Exception as error:
            source = f"entry point {registered[name].value!r} of group {ENTRY_POINT_GROUP}"
            raise self._error(f"Model {name!r} does not load", source, f"{type(error).__name__}: {error}") from error
        return framework, name, self._callable("model", loaded)

    def _callable(self, name: str, value: Any) -> Fit:
        if not callable(value):
            raise self._error(f"Bad value for {name}", "a function fit(context, shard)", value)
        return value  # type: ignore[no-any-return]

    def launcher(self, framework: str) -> str:
        """Return how the framework is started; only some frameworks have a choice."""
        launchers = FRAMEWORKS[framework].launchers
        if "launcher" in self._keywords and len(launchers) == 1:
            expected = "no launcher: only framework 'torch' has a choice"
            raise self._error(f"Framework {framework!r} has one launcher", expected, self._keywords["launcher"])
        return self.choice("launcher", launchers, launchers[0])

    def data(self) -> str | Frames | None:
        """Return the data's name, or the DataFrames with how they are to be read."""
        frame = self._keywords.get("data")
        if not is_frame(frame):
            for name in ("test_data", "test_fraction", "image_column", "label_column", "image_shape"):
                if name in self._keywords:
                    expected = "data= with a DataFrame as well"
                    raise self._error(f"{name}= belongs to a DataFrame", expected, self._keywords[name])
            return self.value("data", _text, None)  # type: ignore[no-any-return]
        test, fraction = self.value("test_data", _frame, None), self.value("test_fraction", _fraction, None)
        if (test is None) == (fraction is None):
            actual = "neither" if test is None else "both"
            raise self._error("A DataFrame needs a test set", "test_data= with another, or test_fraction=", actual)
        columns = (self.value("image_column", _text, "image"), self.value("label_column", _text, "label"))
        return Frames(frame, test, fraction, *columns, self.value("image_shape", _shape, IMAGE_SHAPE))

    def recovery(self, framework: str) -> dict[str, Any]:
        """Return retries and checkpoints; only stages that Spark may run again have any."""
        able = (framework, self.launcher(framework)) in RECOVERABLE
        every = self.value("checkpoint_every", _count, None)
        folder = self.value("checkpoint_folder", _text, None)
        if (every is not None or folder is not None) and not able:
            expected = " or ".join(f"framework {name!r} with launcher {launcher!r}" for name, launcher in RECOVERABLE)
            raise self._error("Checkpoints are not written here", expected, f"framework {framework!r}")
        if folder is not None and every is None:
            raise self._error("A checkpoint folder without checkpoints", "checkpoint_every= as well", folder)
        retries = self._config.retries if able else 0
        return {"retries": retries, "checkpoint_every": every, "checkpoint_folder": folder}

    def executors(self) -> int:
        """Return the executors to train on, no more than the cluster has."""
        available = self._config.executors
        executors = int(self.value("executors", _count, available))
        if executors > available:
            hint = f"Start more with --gauge-executors {executors}."
            raise self._error("Bad value for executors", f"at most the cluster's {available}", executors, hint)
        return executors

    def batch_size(self, model: str, executors: int, plan: Plan | None) -> int:
        """Return the global batch, at least one image per executor."""
        default = RECIPES[model].global_batch if model in RECIPES else DEFAULT_CUSTOM_BATCH
        default = max(default, executors) if plan is None else plan.batch
        size = int(self.value("batch_size", _count, default))
        if self._config.batch == "per-executor":
            return size * executors
        if size < executors:
            expected = f"at least one image for each of {executors} executors"
            raise self._error("Bad value for batch_size", expected, size)
        return size

    def length(self, model: str, profile: ProfileSpec, plan: Plan | None) -> tuple[int | None, float | None]:
        """Return iterations and epochs, of which at most one is set."""
        iterations, epochs = self.value("iterations", _count, None), self.value("epochs", _epochs, None)
        if iterations is not None and epochs is not None:
            actual = f"iterations={iterations} and epochs={epochs}"
            raise self._error("Two lengths of training", "either iterations or epochs", actual)
        if plan is not None:
            return self._caffe_length(iterations, epochs, profile, plan)
        if iterations is None and epochs is None:
            iterations = profile.iterations or full_iterations(model)
            if self._config.profile == "ci":
                iterations = CI_ITERATIONS.get(model, iterations)
        return iterations, epochs

    def _caffe_length(
        self, iterations: int | None, epochs: float | None, profile: ProfileSpec, plan: Plan
    ) -> tuple[int | None, float | None]:
        """Return the solver's own length in profile full, else the profile's, never beyond the solver's."""
        if plan.remaining < 1:
            actual = f"a snapshot of iteration {plan.first_iteration}, max_iter {plan.max_iter}"
            raise self._error("Nothing is left to train", "a snapshot from before max_iter", actual)
        if iterations is not None and iterations > plan.remaining:
            hint = "Raise max_iter: what the learning rate would be beyond it, the solver does not say."
            raise self._error("Bad value for iterations", f"at most {plan.remaining}, the solver's", iterations, hint)
        if iterations is None and epochs is None:
            iterations = min(profile.iterations or plan.remaining, plan.remaining)
        return iterations, epochs

    def test_every(self, model: str, plan: Plan | None) -> int | None:
        """Return the steps between tests: the recipe's in profile full, else only the one at the end."""
        own = plan.test_interval if plan is not None else RECIPES[model].test_every if model in RECIPES else None
        reference = own if self._config.profile == "full" else None
        found: int | None = self.value("test_every", _count, reference)
        return found


def full_iterations(model: str) -> int | None:
    """Return the training steps of profile ``full``; None for a user's model, which knows its own."""
    recipe = RECIPES.get(model)
    return FULL_ITERATIONS.get(model, recipe.iterations if recipe else None)


def _suggestion(name: Any, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _integer(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = f"a whole number of at least {least}"
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=repr(value))
    return value


def _count(value: Any, name: str) -> int:
    return _integer(value, name, least=1)


def _count_from_zero(value: Any, name: str) -> int:
    return _integer(value, name, least=0)


def _seed(value: Any, name: str) -> int:
    return values.seed(_integer(value, name, least=0), name)


def _epochs(value: Any, name: str) -> float:
    expected = "a number above 0"
    if isinstance(value, str) or (result := values.number(value, name, expected)) <= 0:
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=repr(value))
    return result


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"Bad value for {name}", expected="a text that is not empty", actual=repr(value))
    return value


def _path(value: Any, name: str) -> str:
    return _text(str(value) if isinstance(value, Path) else value, name)


def _frame(value: Any, name: str) -> Any:
    if not is_frame(value):
        raise ConfigurationError(f"Bad value for {name}", expected="a Spark DataFrame", actual=repr(value))
    return value


def _fraction(value: Any, name: str) -> float:
    expected = "a share of the rows between 0 and 1, e.g. 0.2"
    if isinstance(value, str) or not 0 < (result := values.number(value, name, expected)) < 1:
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=repr(value))
    return result


def _shape(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 3:
        expected = "one to three whole numbers, e.g. (28, 28, 1)"
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=repr(value))
    return tuple(_count(number, name) for number in value)


def _options(value: Any, name: str) -> dict[str, Any]:
    """Return ``value`` as it will be read back from a record: options are part of the workload's identity."""
    expected = "a dict of JSON values with text keys"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=repr(value))
    try:
        return dict(json.loads(json.dumps(dict(value), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"Bad value for {name}", expected=expected, actual=str(error)) from None


def _function_name(fn: Fit | None) -> str:
    """Return ``module:name`` of ``fn``; an object without a name is known by its class."""
    if fn is None:
        return ""
    inner = getattr(fn, "__wrapped__", fn)  # a wrapper's identity is what it wraps
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}:{named.__qualname__}"

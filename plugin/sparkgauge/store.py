"""Baselines on disk: one JSON file per test and profile, in one folder per hardware class.

A file is either read whole and valid or refused with a :class:`~sparkgauge.errors.BaselineError` that names the file
and the field; it is written atomically, in a stable order, so that a diff shows what changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sparkgauge import ranks
from sparkgauge.errors import BaselineError, ConfigurationError, NewerBaselineError
from sparkgauge.records import (
    PHASES,
    SCHEMA_VERSION,
    Approval,
    Baseline,
    DataIdentity,
    Environment,
    ExecutorShare,
    PastBaseline,
    Round,
    RunRecord,
    from_json,
    to_json,
)

LARGEST_BYTES = 10_000_000
"""A baseline holds tens of rounds, a few kB; something larger is not one, and is not parsed."""

DEEPEST_NESTING = 32
"""Levels of lists and objects; a baseline has four, its workload a few more."""

LONGEST_HISTORY = 50
"""Generations kept beside the current one: years of approvals, some ten kB each."""

LONGEST_SLUG = 100
"""Characters of a test's name kept in its file name; file systems allow 255 bytes with everything added."""

DEFAULT_LABEL = "trained"
"""Label of the ``trained`` fixture, whose samples carry no prefix."""

LABELS_FIELD = "labels"
"""Field of a baseline's workload under which the workloads of other labels than ``trained`` are kept."""

REFERENCES = ("step_reference_seconds", "reference_seconds")
"""The reference kernel's time between the steps of a round and before it; the first tells more."""

WAITING = "waiting_ratio"
"""How many times longer a round's processes took to get their CPU seconds than if a core had always been free."""

QUOTIENT_COMPANIONS = {
    "speedup_ratio": ("speedup_reference_ratio", "speedup_waiting_ratio"),
    "efficiency_ratio": ("efficiency_reference_ratio", "efficiency_waiting_ratio"),
}
"""Metrics that are quotients of rounds, and the samples that hold the quotients of what stands beside the same rounds:
the reference kernel's time between their steps, and their waiting ratios."""

POSITIVE_METRICS = (
    "runtime_seconds",
    *QUOTIENT_COMPANIONS,
    *(name for names in QUOTIENT_COMPANIONS.values() for name in names),
    *REFERENCES,
    WAITING,
)
"""Metrics of which a sample at or below zero was never measured."""

COMPANIONS = (*REFERENCES, WAITING, "cpu_seconds", "jvm_cpu_seconds", "driver_cpu_seconds")
"""Samples that say something of the rounds beside them, and nothing of others."""

PLAIN_TEST = re.compile(r"([a-z0-9_]+(?:/[a-z0-9_]+)*)\.py::([a-z0-9_]+)(?:\[([a-z0-9_-]+)\])?")
"""Test ids that turn into a file name reversibly; others get a digest in theirs."""

_RESTORE = "Restore the file from version control, or measure it again with --gauge-update all."

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Measured(Protocol):
    """What :func:`comparable` asks of a run; :class:`~sparkgauge.records.RunRecord` has it."""

    @property
    def workload(self) -> dict[str, Any]:
        """Return what makes two runs the same work."""

    @property
    def profile(self) -> str:
        """Return the session's profile."""

    @property
    def data(self) -> DataIdentity:
        """Return which data it ran on."""

    @property
    def environment(self) -> Environment:
        """Return what it ran on."""


class BaselineStore:
    """The baselines below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_for(self, test_id: str, *, hardware_class: str, profile: str) -> Path:
        """Return ``folder/<hardware class>/<test>.<profile>.json``; different tests get different files.

        All quantities of a test live in its one file, those of several ``train()`` calls side by side: see
        :func:`sample_key`. Profiles are apart because a smoke run is another workload than a full one.
        """
        for name, value in (("hardware class", hardware_class), ("profile", profile)):
            if not SAFE_NAME.fullmatch(value):
                raise ConfigurationError(
                    f"Bad {name}", expected="letters, digits, '_', '.' and '-'", actual=repr(value)
                )
        return self.folder / hardware_class / f"{slug(test_id)}.{profile}.json"

    def read(self, path: Path) -> Baseline | None:
        """Return the baseline in ``path``, None where there is no file; BaselineError for anything else."""
        content = _read_bytes(path)
        return None if content is None else parse(content, where=str(path))

    def write(self, path: Path, baseline: Baseline) -> None:
        """Write ``baseline`` to ``path`` whole or not at all; BaselineError says why not.

        What could not be read again is refused; a history that is too large for that loses its oldest generations.
        """
        _check_samples(baseline, str(path))
        baseline = dataclasses.replace(baseline, samples=dict(sorted(baseline.samples.items())))
        content = _encoded(path, to_json(baseline), what="baseline")
        while baseline.history and len(content) > LARGEST_BYTES:
            baseline = dataclasses.replace(baseline, history=baseline.history[1 + len(baseline.history) // 2 :])
            content = _encoded(path, to_json(baseline), what="baseline")
        if len(content) > LARGEST_BYTES or not _nested_at_most(to_json(baseline), DEEPEST_NESTING):
            expected = f"at most {LARGEST_BYTES} bytes and {DEEPEST_NESTING} levels of nesting"
            raise BaselineError("Cannot write the baseline", expected=expected, actual="more", where=str(path))
        _write_bytes(path, content, what="baseline")


def sample_key(label: str, metric: str) -> str:
    """Return the key of a metric's samples: ``runtime_seconds``, or ``cpu.runtime_seconds`` for the label ``cpu``."""
    return metric if label == DEFAULT_LABEL else f"{label}.{metric}"


def run_samples(run: RunRecord) -> dict[str, tuple[float, ...]]:
    """Return a run's raw samples by metric, one a valid round: the gated metrics, what explains them, the user's own.

    Phases and the reference kernel are means over the executors; CPU seconds are sums over them. A metric that not
    every round has counts only where all have it.
    """
    rounds = run.valid_rounds
    own = set.intersection(*(set(one.metrics) for one in rounds)) if rounds else set()
    samples = {name: tuple(one.metrics[name] for one in rounds) for name in sorted(own)}
    for phase in PHASES if all(one.executors for one in rounds) else ():
        samples[f"{phase}_seconds"] = tuple(_phase_mean(one, phase) for one in rounds)
    samples["cpu_seconds"] = tuple(cpu_seconds(one) for one in rounds)
    samples.update(_where_all_have_it("jvm_cpu_seconds", [_jvm_cpu_seconds(one) for one in rounds]))
    samples.update(_where_all_have_it("driver_cpu_seconds", [one.driver_cpu_seconds for one in rounds]))
    samples.update(_where_all_have_it("reference_seconds", [_mean(one.reference_seconds) for one in rounds]))
    samples.update(_where_all_have_it("step_reference_seconds", [piece_seconds(one) for one in rounds]))
    samples.update(_where_all_have_it(WAITING, [_waiting_ratio(one) for one in rounds]))
    if rounds and all(len(one.executors) > 1 for one in rounds):
        samples["straggler_ratio"] = tuple(ranks.straggler_ratio(one) for one in rounds)
        samples["exposed_fraction"] = tuple(ranks.exposed(one) for one in rounds)
    for name in ("runtime_seconds", "accuracy_fraction", "images_per_second"):
        samples[name] = tuple(getattr(one, name) for one in rounds)
    return samples


def piece_seconds(one: Round) -> float | None:
    """Return the usual time of the reference kernel's pieces between a round's steps, the mean over its executors.

    A tenth of the pieces is left out at either end: one that the scheduler interrupted takes ten times as long. So on
    a quiet machine; on a crowded one, where interruptions are what slows training down, it costs little (docs/gate.md).
    """
    means = [_mean(_trimmed(executor.reference_seconds)) for executor in one.executors]
    known = [mean for mean in means if mean is not None]
    return _mean(known) if len(known) == len(means) else None


def _trimmed(values: Sequence[float]) -> Sequence[float]:
    out = len(values) // 10
    return sorted(values)[out : len(values) - out]


def baseline_of(
    runs: Sequence[RunRecord], approved: Approval, *, more_samples: Mapping[str, tuple[float, ...]] | None = None
) -> Baseline:
    """Return one test's runs as the baseline of later ones; ``more_samples`` holds speed-ups, by sample key.

    The seeds are kept only where all runs share them: accuracies are paired by seed, and a wrong seed would pair wrong.
    """
    first = runs[0]
    own = next((run.workload for run in runs if run.label == DEFAULT_LABEL), {})
    labels = {run.label: run.workload for run in runs if run.label != DEFAULT_LABEL}
    seeds = {tuple(one.seed for one in run.valid_rounds) for run in runs}
    samples = {sample_key(run.label, name): values for run in runs for name, values in run_samples(run).items()}
    return Baseline(
        test_id=first.test_id,
        workload={**own, LABELS_FIELD: labels} if labels else dict(own),
        profile=first.profile,
        data=first.data,
        environment=first.environment,
        commit=first.commit,
        approved=approved,
        seeds=seeds.pop() if len(seeds) == 1 else (),
        samples={**samples, **(more_samples or {})},
        executors={run.label: executor_shares(run) for run in runs},
    )


def executor_shares(run: RunRecord) -> tuple[tuple[ExecutorShare, ...], ...]:
    """Return, for each valid round, what a baseline keeps of each executor, in order of rank."""
    return tuple(
        tuple(ExecutorShare(e.phases, e.phase_cpu_seconds) for e in sorted(one.executors, key=lambda e: e.rank))
        for one in run.valid_rounds
    )


def with_missing(stored: Baseline, fresh: Baseline) -> Baseline:
    """Return ``stored`` with those samples and labels of ``fresh`` that it lacks: what ``--gauge-update new`` writes.

    Samples that are there were approved and stay. Seeds stay where both share them: they belong to all samples.
    """
    labels = {**_labels_of(fresh), **_labels_of(stored)}
    fresh = _without_companions(fresh, of=stored)
    return dataclasses.replace(
        stored,
        workload={**stored.workload, LABELS_FIELD: labels} if labels else stored.workload,
        samples={**fresh.samples, **stored.samples},
        executors={**fresh.executors, **stored.executors},
        seeds=stored.seeds if stored.seeds == fresh.seeds else (),
    )


def _without_companions(fresh: Baseline, *, of: Baseline) -> Baseline:
    """Return ``fresh`` without what belongs to its own rounds where those of ``of`` stay: another day's machine."""
    kept = {label for label in fresh.executors if sample_key(label, "runtime_seconds") in of.samples}
    companions = {sample_key(label, name) for label in kept for name in COMPANIONS}
    companions |= {name for metric, names in QUOTIENT_COMPANIONS.items() if metric in of.samples for name in names}
    return dataclasses.replace(
        fresh,
        samples={key: values for key, values in fresh.samples.items() if key not in companions},
        executors={label: shares for label, shares in fresh.executors.items() if label not in kept},
    )


def superseding(stored: Baseline | None, fresh: Baseline) -> Baseline:
    """Return ``fresh`` as the next generation of ``stored``, which becomes the last entry of its history."""
    if stored is None:
        return fresh
    past = PastBaseline(
        approved=stored.approved,
        commit=stored.commit,
        workload=stored.workload,
        data=stored.data,
        software=stored.environment.software,
        seeds=stored.seeds,
        samples=dict(sorted(stored.samples.items())),
    )
    return dataclasses.replace(fresh, history=(*stored.history, past)[-LONGEST_HISTORY:])


def generations(baseline: Baseline) -> list[Baseline]:
    """Return the baseline as it was at each approval, oldest first, without their histories; the last is current.

    Of an earlier generation's machine only the software is known to have been different.
    """
    past = [
        dataclasses.replace(
            baseline,
            approved=one.approved,
            commit=one.commit,
            workload=one.workload,
            data=one.data,
            environment=dataclasses.replace(baseline.environment, software=one.software),
            seeds=one.seeds,
            samples=one.samples,
            executors={},
            history=(),
        )
        for one in baseline.history
    ]
    return [*past, dataclasses.replace(baseline, history=())]


def slug(test_id: str) -> str:
    """Return a file name's stem for a test: readable, safe on every file system, different for different tests.

    ``perf/test_tf.py::test_quick[a-b]`` gives ``perf-test_tf__test_quick__a-b``. Where that could collide (classes,
    capitals, double underscores, characters that are not safe) ten digits of the id's SHA-256 follow a dot.
    """
    plain = PLAIN_TEST.fullmatch(test_id)
    if plain and len(test_id) <= LONGEST_SLUG:
        parts = [part for part in plain.groups() if part is not None]
        if not any("__" in part or part.startswith("_") or part.endswith("_") for part in parts):
            return "__".join([parts[0].replace("/", "-"), *parts[1:]])
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", test_id.replace(".py::", "__").replace("::", "__")).strip("_-")
    digest = hashlib.sha256(test_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable[:LONGEST_SLUG] or 'test'}.{digest[:10]}"


def parse(content: bytes, *, where: str) -> Baseline:
    """Return the baseline in ``content``; BaselineError names ``where`` and the field for any bytes that are none."""
    value = parse_json(content, where=where)
    _check_schema(value, where)
    try:
        baseline = from_json(Baseline, value, "baseline")
    except BaselineError as error:
        raise _unreadable(where, expected=error.expected, actual=error.actual, field=error.where) from None
    except OverflowError as error:  # An integer too large for a field of floats.
        raise _unreadable(where, expected="finite numbers", actual=str(error)) from None
    _check_samples(baseline, where)
    return baseline


def comparable(baseline: Baseline, run: Measured, *, label: str = DEFAULT_LABEL) -> str | None:
    """Return why ``run`` must not be compared with ``baseline``, with both values; None when it may be.

    Versions of software are left out on purpose: whether an upgrade made training slower is what is asked.
    """
    for name, expected, actual in _must_match(baseline, run, label):
        if expected != actual:
            return f"other {name}: the baseline has {expected}, this run {actual}"
    return None


def write_json(path: Path, value: Any, *, what: str = "baseline") -> None:
    """Write ``value`` as indented JSON to ``path``: whole or not at all, the old file intact until then.

    Raises BaselineError where the folder or the disk does not take it.
    """
    _write_bytes(path, _encoded(path, value, what=what), what=what)


def _encoded(path: Path, value: Any, *, what: str) -> bytes:
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")
    except (ValueError, TypeError, RecursionError) as error:
        raise _unwritable(path, what, error) from None


def _write_bytes(path: Path, content: bytes, *, what: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
    except (OSError, ValueError) as error:
        raise _unwritable(path, what, error) from None


def _unwritable(path: Path, what: str, error: Exception) -> BaselineError:
    hint = "Free space or choose a folder that can be written; the old file, if any, is unchanged."
    reason = getattr(error, "strerror", None) or str(error)
    return BaselineError(f"Cannot write the {what}", actual=reason, where=str(path), hint=hint)


def _replace(path: Path, content: bytes) -> None:
    """Write beside ``path``, force it to the disk, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _read_bytes(path: Path) -> bytes | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _unreadable(str(path), expected="a regular file", actual=_kind_of(status.st_mode))
        if status.st_size > LARGEST_BYTES:
            raise _unreadable(str(path), expected=f"at most {LARGEST_BYTES} bytes", actual=f"{status.st_size} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), actual=getattr(error, "strerror", None) or str(error)) from None


def _kind_of(mode: int) -> str:
    return "a folder: move it away" if stat.S_ISDIR(mode) else "a device, socket or pipe"


def parse_json(
    content: bytes, *, where: str, what: str = "baseline", most_bytes: int = LARGEST_BYTES, hint: str | None = None
) -> Any:
    """Return the JSON in ``content``; BaselineError for what is none, ambiguous, not finite, too large or too deep."""

    def refuse(expected: str, actual: str) -> BaselineError:
        where_to_get_it = _RESTORE if hint is None else hint
        return BaselineError(f"Unreadable {what}", expected=expected, actual=actual, where=where, hint=where_to_get_it)

    if len(content) > most_bytes:
        raise refuse(f"at most {most_bytes} bytes", f"{len(content)} bytes")
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_NotFinite,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise refuse(f"a {what}", "JSON nested too deeply") from None
    except ValueError as error:
        raise refuse("JSON in UTF-8", str(error)[:120]) from None
    if not _nested_at_most(value, DEEPEST_NESTING):
        raise refuse(f"a {what}", "JSON nested too deeply")
    if (found := _not_finite(value, what)) is not None:
        field, number = found
        raise BaselineError(
            f"Unreadable {what}",
            expected="finite numbers",
            actual=number.text[:40],
            where=f"{where}, field {field}",
            hint=_RESTORE if hint is None else hint,
        )
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:40]!r} twice in one object")
        result[key] = value
    return result


@dataclasses.dataclass(frozen=True)
class _NotFinite:
    """What stands in parsed JSON where the text had NaN, Infinity or a number too large for a float."""

    text: str


def _finite_float(text: str) -> float | _NotFinite:
    value = float(text)
    return value if math.isfinite(value) else _NotFinite(text)


def _not_finite(value: Any, field: str) -> tuple[str, _NotFinite] | None:
    """Return the first number in ``value`` that is not finite, and its field below ``field``; None without any."""
    if isinstance(value, _NotFinite):
        return field, value
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((f"{field}.{key}"[:200], one) for key, one in value.items())
    elif isinstance(value, list):
        items = ((f"{field}[{index}]", one) for index, one in enumerate(value))
    return next((found for name, one in items if (found := _not_finite(one, name)) is not None), None)


def _nested_at_most(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nested_at_most(item, levels - 1) for item in items)


def _check_schema(value: Any, where: str) -> None:
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        actual = f"schema {schema!r}"[:80] if isinstance(value, dict) else type(value).__name__
        raise _unreadable(where, expected="an object with its schema version", actual=actual, field="baseline.schema")
    if schema > SCHEMA_VERSION:
        raise NewerBaselineError(
            "The baseline was written by a newer sparkgauge",
            expected=f"schema {SCHEMA_VERSION} or older",
            actual=f"schema {str(schema)[:20]}" if schema < 10**20 else "a huge schema number",
            where=where,
            hint="Upgrade: pip install --upgrade pytest-sparkgauge.",
        )


def _check_samples(baseline: Baseline, where: str) -> None:
    """Refuse samples that no verdict may rest on; field types were checked by ``from_json``."""
    generation_samples = [(f"baseline.history[{i}].samples", past.samples) for i, past in enumerate(baseline.history)]
    for field, samples in (("baseline.samples", baseline.samples), *generation_samples):
        if not samples:
            raise _unreadable(where, expected="samples", actual="none", field=field)
        for key, values in samples.items():
            _check_values(key, values, where, f"{field}.{key}")


def _check_values(key: str, values: tuple[float, ...], where: str, field: str) -> None:
    if not values:
        raise _unreadable(where, expected="samples", actual="an empty list", field=field)
    low, high, expected = _allowed(key.rpartition(".")[2])
    bad = next((value for value in values if not (math.isfinite(value) and low <= value <= high)), None)
    if bad is not None:
        raise _unreadable(where, expected=expected, actual=str(bad), field=field)


def _allowed(metric: str) -> tuple[float, float, str]:
    """Return the least and the largest value of a metric's samples, and both in words."""
    if metric == "accuracy_fraction":
        return 0.0, 1.0, "fractions from 0 to 1"
    if metric in POSITIVE_METRICS:
        return math.ulp(0.0), math.inf, "finite numbers above 0"
    return -math.inf, math.inf, "finite numbers"


def _unreadable(
    path: str, *, expected: str | None = None, actual: str | None, field: str | None = None
) -> BaselineError:
    return BaselineError(
        "Unreadable baseline",
        expected=expected,
        actual=actual,
        where=f"{path}, field {field}" if field else path,
        hint=_RESTORE,
    )


def _must_match(baseline: Baseline, run: Measured, label: str) -> list[tuple[str, str, str]]:
    """Return name, expected and actual of everything that makes two runs comparable."""
    pairs = [
        ("data", _data_text(baseline.data), _data_text(run.data)),
        ("hardware class", baseline.environment.hardware_class, run.environment.hardware_class),
        ("profile", baseline.profile, run.profile),
    ]
    if label != DEFAULT_LABEL and not isinstance(_labels_of(baseline).get(label), dict):
        return pairs  # The baseline holds no samples of this label either: that is "missing", not another workload.
    expected, actual = _workload_of(baseline, label), to_json(run.workload)
    for name in sorted({*expected, *actual}):
        pairs.append((f"workload ({name})", _workload_text(expected, name), _workload_text(actual, name)))
    return pairs


def _workload_of(baseline: Baseline, label: str) -> dict[str, Any]:
    if label == DEFAULT_LABEL:
        return {name: value for name, value in baseline.workload.items() if name != LABELS_FIELD}
    return dict(_labels_of(baseline)[label])


def _labels_of(baseline: Baseline) -> dict[str, Any]:
    labels = baseline.workload.get(LABELS_FIELD)
    return labels if isinstance(labels, dict) else {}


def cpu_seconds(one: Round) -> float:
    """Return the CPU seconds of all training processes of a round."""
    return math.fsum(executor.cpu_seconds for executor in one.executors)


def _phase_mean(one: Round, phase: str) -> float:
    return math.fsum(getattr(executor.phases, phase) for executor in one.executors) / len(one.executors)


def _jvm_cpu_seconds(one: Round) -> float | None:
    known = [executor.jvm_cpu_seconds for executor in one.executors if executor.jvm_cpu_seconds is not None]
    return math.fsum(known) if known and len(known) == len(one.executors) else None


def _waiting_ratio(one: Round) -> float | None:
    """Return (CPU + waited) / CPU seconds, the mean over the executors; None where an executor did not count them."""
    ratios = [
        1.0 + executor.waited_seconds / executor.cpu_seconds
        for executor in one.executors
        if executor.waited_seconds is not None and executor.cpu_seconds > 0.0
    ]
    return _mean(ratios) if len(ratios) == len(one.executors) else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _where_all_have_it(name: str, values: Sequence[float | None]) -> dict[str, tuple[float, ...]]:
    known = tuple(value for value in values if value is not None)
    return {name: known} if known and len(known) == len(values) else {}


def _data_text(data: DataIdentity) -> str:
    return f"{data.kind} {data.name} of {data.train_count} + {data.test_count} images, digest {data.digest[:12]}"


def _workload_text(workload: dict[str, Any], name: str) -> str:
    return json.dumps(workload[name], sort_keys=True) if name in workload else "nothing"

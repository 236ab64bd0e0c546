"""The life of stored baselines: which there are, what changed between two, who approves a new one, which nobody needs.

Pure but for reading and writing the files themselves; what is printed is laid out in
:mod:`sparkgauge.report.baseline_text`.
"""

from __future__ import annotations

import datetime
import fnmatch
import getpass
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkgauge.errors import BaselineError, ConfigurationError, NotMeasuredError
from sparkgauge.gate import METRICS, BaselineQuantity, Measurement, Policy, Samples, judge, unit_of
from sparkgauge.records import Approval, Baseline, RunRecord, from_json
from sparkgauge.stats import FEWEST_SAMPLES, Interval
from sparkgauge.store import BaselineStore, baseline_of, comparable, parse_json, superseding

STALE_DAYS = 90
"""Age from which a baseline is called stale: a quarter, in which a machine's software and neighbours have changed."""

LARGEST_REPORT_BYTES = 1_000_000_000
"""A report holds the seconds of every training step; the longest runs' take some 100 MB."""

HEADLINES = ("runtime_seconds", "speedup_ratio", "efficiency_ratio", "accuracy_fraction")
"""The metrics that lists and replacements show, in this order."""

_COLLECTED = re.compile(r"(?:^|\s)(?:(\d+)/)?(\d+) tests? collected")


@dataclass(frozen=True)
class Stored:
    """A baseline and its file."""

    path: Path
    baseline: Baseline


@dataclass(frozen=True)
class Replacement:
    """A baseline that was written, and what it replaced."""

    path: Path
    old: Baseline | None
    """None where there was none, or none that could be read."""
    new: Baseline
    note: str = ""
    """What was lost, if anything."""


@dataclass(frozen=True)
class Change:
    """One metric of two baselines."""

    key: str
    """As in :attr:`~sparkgauge.records.Baseline.samples`."""
    before: Interval | None
    """Mean and its interval; None where this side has no usable samples."""
    after: Interval | None
    change: Interval | None
    """Ratio after / before, for fractions the difference; None where there is none, see ``note``."""
    note: str = ""
    """Why there is no change, or which samples it is of."""

    @property
    def is_shown(self) -> bool:
        """Return whether the interval of the change excludes no change."""
        no_change = 0.0 if unit_of(metric_of(self.key)) == "fraction" else 1.0
        return self.change is not None and not self.change.low <= no_change <= self.change.high


@dataclass(frozen=True)
class Report:
    """What ``baselines approve`` needs of a file that ``--gauge-report`` wrote."""

    path: str
    runs: tuple[RunRecord, ...]
    verdicts: tuple[dict[str, Any], ...] = ()
    outcomes: dict[str, str] = field(default_factory=dict)
    """How each test ended: ``passed``, ``failed`` (an assert), ``error`` (anything else), ``skipped``."""
    speedups: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """Raw speed-ups by test and metric, which the runs alone do not give."""

    def runs_of(self, test_id: str) -> list[RunRecord]:
        """Return the runs of one test."""
        return [run for run in self.runs if run.test_id == test_id]


@dataclass(frozen=True)
class Refusal:
    """Why a test's runs do not become its baseline."""

    test_id: str
    reason: str
    can_be_forced: bool = True


def approval(why: str) -> Approval:
    """Return who approves now, and why; ConfigurationError without a reason."""
    if not why.strip():
        raise ConfigurationError("A baseline needs a reason", expected="--why with a text", actual=repr(why))
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Approval(who=_user_name(), when=now, why=" ".join(why.split()))


def stored_in(folder: Path, *, hardware_class: str = "*") -> tuple[list[Stored], list[BaselineError]]:
    """Return the baselines below ``folder``, by hardware class and file name, and what is wrong with the others."""
    if not folder.is_dir():
        raise ConfigurationError(
            "No baselines folder",
            expected="a folder that --gauge-update wrote",
            actual=str(folder),
            hint="Name it with --baselines DIR.",
        )
    store, found, broken = BaselineStore(folder), [], []
    for path in sorted(folder.glob(f"{hardware_class}/*.json")):
        try:
            baseline = store.read(path)
        except BaselineError as error:
            broken.append(error)
        else:
            found += [Stored(path, baseline)] if baseline is not None else []
    return found, broken


def matching(test_ids: Iterable[str], wanted: str) -> list[str]:
    """Return the ids that ``wanted`` names: that id itself, else that function's tests, else those a pattern fits."""
    ids = sorted(set(test_ids))
    if wanted in ids:
        return [wanted]
    by_name = [one for one in ids if _names_function(wanted, one)]
    return by_name or [one for one in ids if fnmatch.fnmatchcase(one, wanted)]


def age_days(approved: Approval, now: datetime.datetime) -> float | None:
    """Return how long ago the approval was, in days; None where its time cannot be read."""
    try:
        when = datetime.datetime.fromisoformat(approved.when.replace("Z", "+00:00"))
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)
    return (now - when).total_seconds() / 86400


def is_stale(approved: Approval, now: datetime.datetime, stale_days: float = STALE_DAYS) -> bool:
    """Return whether the approval is older than ``stale_days``, or does not say how old it is."""
    age = age_days(approved, now)
    return age is None or age > stale_days


def metric_of(key: str) -> str:
    """Return the metric of a sample key: ``runtime_seconds`` of ``gpu.runtime_seconds``."""
    return key.rpartition(".")[2]


def headline_keys(baseline: Baseline) -> list[str]:
    """Return the sample keys that say most about a baseline, or all where it has none of them."""
    keys = [key for metric in HEADLINES for key in sorted(baseline.samples) if metric_of(key) == metric]
    return keys or sorted(baseline.samples)


def samples_under(baseline: Baseline, key: str) -> Samples:
    """Return a baseline's samples under ``key``, ready for the gate; KeyError where it has none."""
    metric, values = metric_of(key), baseline.samples[key]
    unit, better = METRICS.get(metric, (unit_of(metric), "lower"))
    seeds = baseline.seeds if len(baseline.seeds) == len(values) else ()
    count = baseline.data.test_count if metric == "accuracy_fraction" else None
    return Samples(values, metric, unit, better, seeds, count)


def interval_of(baseline: Baseline, key: str) -> Interval | None:
    """Return mean and interval of the samples under ``key``; None where there are none a mean can be taken of."""
    try:
        return Measurement(samples_under(baseline, key)).interval if key in baseline.samples else None
    except NotMeasuredError:
        return None  # a ratio's mean is geometric: a phase of zero seconds has none


def changes(old: Baseline, new: Baseline) -> list[Change]:
    """Return what changed in every metric that either side has, by key."""
    return [_change(old, new, key) for key in sorted({*old.samples, *new.samples})]


def differences(old: Baseline, new: Baseline) -> list[tuple[str, str, str]]:
    """Return name, old and new value of everything but the samples that differs: machine, software, data, workload."""
    before, after = _facts(old), _facts(new)
    names = dict.fromkeys([*before, *after])
    pairs = [(name, before.get(name, "nothing"), after.get(name, "nothing")) for name in names]
    return [one for one in pairs if one[1] != one[2]]


def read_report(path: Path) -> Report:
    """Return the runs in a ``--gauge-report`` file; BaselineError says what is wrong with it."""
    hint = "Write one with pytest --gauge-report PATH."
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BaselineError("Unreadable report", actual=reason, where=str(path), hint=hint) from error
    value = parse_json(content, where=str(path), what="report", most_bytes=LARGEST_REPORT_BYTES, hint=hint)
    try:
        return _report(value, str(path))
    except BaselineError as error:
        where = f"{path}, field {error.where}"
        parts = {"expected": error.expected, "actual": error.actual, "where": where, "hint": error.hint or hint}
        raise BaselineError("Unreadable report", **parts) from error


def refusals(report: Report, test_id: str, stored: Baseline | None) -> list[Refusal]:
    """Return every reason why the runs of ``test_id`` should not become its baseline; empty when they may."""
    runs = report.runs_of(test_id)
    slowed = next((run.injections for run in runs if run.injections), None)
    if slowed:
        return [Refusal(test_id, f"was slowed down on purpose (--gauge-inject {json.dumps(slowed)})", False)]
    if any(not run.valid_rounds for run in runs):
        return [Refusal(test_id, "has a training without a finished round", False)]
    reasons = [*_failures(report, test_id)]
    fewest = min(len(run.valid_rounds) for run in runs)
    if fewest < FEWEST_SAMPLES:
        reasons.append(f"has {fewest} round, which has no interval; {FEWEST_SAMPLES} are the least, 5 are advised")
    if stored is not None:
        other = next((why for run in runs if (why := comparable(stored, run, label=run.label))), None)
        reasons += [f"is not comparable with its baseline: {other}"] if other else []
    return [Refusal(test_id, reason) for reason in reasons]


def approve(
    store: BaselineStore, report: Report, test_ids: Sequence[str], approved: Approval, *, force: bool = False
) -> list[Replacement]:
    """Return what was written: the runs of ``test_ids`` as baselines, the old generations in their histories.

    Nothing is written where one test is refused; BaselineError names all reasons.
    """
    files = {test_id: _file(store, report, test_id) for test_id in dict.fromkeys(test_ids)}
    before = {test_id: _stored_or_note(store, path) for test_id, path in files.items()}
    found = [one for test_id, (stored, _) in before.items() for one in refusals(report, test_id, stored)]
    found += [Refusal(test_id, note) for test_id, (_, note) in before.items() if note]
    refused = [one for one in found if not (force and one.can_be_forced)]
    if refused:
        can_be_forced = all(one.can_be_forced for one in refused)
        raise BaselineError(
            f"Not approved: {'; '.join(f'{one.test_id} {one.reason}' for one in refused)}",
            where=report.path,
            hint=f"Nothing was written; --force {'approves it all the same' if can_be_forced else 'cannot help'}.",
        )
    written = []
    for test_id, path in files.items():
        old, note = before[test_id]
        fresh = baseline_of(report.runs_of(test_id), approved, more_samples=report.speedups.get(test_id))
        written.append(Replacement(path, old, superseding(old, fresh), note))
        store.write(path, written[-1].new)
    return written


def parse_listing(text: str) -> frozenset[str]:
    """Return the test ids in the output of ``pytest --collect-only -q``, or in a list of ids, one a line.

    ConfigurationError for a listing that is empty or says that it is incomplete: what it lacks would be removed.
    """
    hint = "Use the output of: pytest --collect-only -q"
    lines = [line.rstrip() for line in text.splitlines()]
    ids = frozenset(line for line in lines if "::" in line and not line[0].isspace() and not line.startswith("ERROR"))
    if wrong := next((line for line in lines if _says_incomplete(line)), None):
        raise ConfigurationError(
            "The listing is not complete", expected="every test collected", actual=wrong, hint=hint
        )
    if not ids:
        raise ConfigurationError("The listing has no tests", expected="test ids, one a line", actual="none", hint=hint)
    for line in lines:
        if (summary := _COLLECTED.search(line)) and int(summary[2]) != len(ids):
            actual = f"{len(ids)} ids under {line.strip('= ')!r}"
            raise ConfigurationError("The listing is cut", expected="as many ids as collected", actual=actual)
    return ids


def vanished(
    stored: Sequence[Stored], collected: Collection[str], root: Path, *, complete: bool = False
) -> tuple[list[Stored], list[Stored]]:
    """Return the baselines whose tests are gone, and those of which the listing does not tell.

    A test is gone when it is not in ``collected`` although others of its file are, or when its file is not below
    ``root`` any more. Of a file that is there and was not listed nothing is known, unless the listing is ``complete``.
    """
    files = {_file_of(test_id) for test_id in collected}
    missing = [one for one in stored if one.baseline.test_id not in collected]
    gone = [one for one in missing if complete or _file_of(one.baseline.test_id) in files or not _exists(one, root)]
    return gone, [one for one in missing if one not in gone]


def remove(stored: Iterable[Stored]) -> None:
    """Delete the files, and folders that are empty then; BaselineError names one that cannot be deleted."""
    for one in stored:
        try:
            one.path.unlink(missing_ok=True)
            if not any(one.path.parent.iterdir()):
                one.path.parent.rmdir()
        except OSError as error:
            actual = error.strerror or str(error)
            raise BaselineError("Cannot remove the baseline", actual=actual, where=str(one.path)) from error


def _change(old: Baseline, new: Baseline, key: str) -> Change:
    before, after = interval_of(old, key), interval_of(new, key)
    if key not in old.samples or key not in new.samples:
        return Change(key, before, after, None, "only in the new one" if key in new.samples else "only in the old one")
    quantity = BaselineQuantity(metric_of(key), samples_under(old, key), policy=Policy(confidence=0.95))
    try:
        verdict = judge(Measurement(samples_under(new, key)), quantity)
    except NotMeasuredError:
        return Change(key, before, after, None, "no ratio: a side has samples of 0")
    if verdict.change is None:
        return Change(key, before, after, None, "no ratio")
    low = -float("inf") if verdict.change_low is None else verdict.change_low
    high = float("inf") if verdict.change_high is None else verdict.change_high
    return Change(key, before, after, Interval(verdict.change, low, high, verdict.confidence), _pairing(old, new, key))


def _pairing(old: Baseline, new: Baseline, key: str) -> str:
    """Return which samples the gate compares where these are not all: fractions by the seeds that both sides have."""
    before, after = (samples_under(one, key).seeds for one in (old, new))
    common = set(before) & set(after)
    is_paired = unit_of(metric_of(key)) == "fraction" and len(common) >= max(
        FEWEST_SAMPLES, min(len(before), len(after))
    )
    return f"on the {len(common)} seeds of both" if is_paired and set(before) != set(after) else ""


def _facts(baseline: Baseline) -> dict[str, str]:
    environment, data = baseline.environment, baseline.data
    machine = {
        "hardware class": environment.hardware_class,
        "processor": environment.cpu_model,
        "cores": str(environment.cores),
        "memory": f"{environment.memory_bytes / 2**30:.1f} GiB",
        "GPUs": ", ".join(environment.gpus) or "none",
        "operating system": environment.operating_system,
    }
    workload = {f"workload {name}": _compact(value) for name, value in sorted(baseline.workload.items())}
    return {
        "test": baseline.test_id,
        "profile": baseline.profile,
        "commit": baseline.commit or "none",
        "data": f"{data.kind} {data.name}, {data.train_count} + {data.test_count} images, {data.digest[:12]}",
        **machine,
        **dict(sorted(environment.software.items())),
        **workload,
    }


def _names_function(wanted: str, test_id: str) -> bool:
    """Return whether ``wanted`` is the test's function, with its parameters or without."""
    function, bracket, parameters = test_id.partition("[")
    name = function.rpartition("::")[2]
    return wanted in (name, f"{name}{bracket}{parameters}")


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _report(value: Any, path: str) -> Report:
    from sparkgauge.report.run_json import REPORT_SCHEMA_VERSION

    if not isinstance(value, dict) or not isinstance(value.get("runs"), list):
        raise BaselineError("", expected="an object with runs", actual=repr(value)[:40], where="report")
    if value.get("schema") != REPORT_SCHEMA_VERSION:
        actual = f"schema {value.get('schema')!r}"[:40]
        raise BaselineError("", expected=f"schema {REPORT_SCHEMA_VERSION}", actual=actual, where="report.schema")
    return Report(
        path,
        runs=tuple(from_json(RunRecord, run, f"report.runs[{i}]") for i, run in enumerate(value["runs"])),
        verdicts=from_json(tuple[dict[str, Any], ...], value.get("verdicts", []), "report.verdicts"),
        outcomes=from_json(dict[str, str], value.get("outcomes", {}), "report.outcomes"),
        speedups=from_json(dict[str, dict[str, tuple[float, ...]]], value.get("speedups", {}), "report.speedups"),
    )


def _failures(report: Report, test_id: str) -> list[str]:
    """Return why the test failed, where that is anything but a comparison with its baseline."""
    outcome = report.outcomes.get(test_id)
    if outcome is None:
        return ["did not finish in this report"]
    if outcome == "error":
        return ["ended with an error that is no failed comparison"]
    verdicts = [verdict for verdict in report.verdicts if verdict.get("test_id") == test_id]
    failed = [verdict for verdict in verdicts if verdict.get("passed") is not True]
    # a baseline moves, a fixed limit does not: what breaks it was not meant to be accepted
    fixed = [
        str(one.get("metric")) for one in failed if one.get("expected") is not None and not one.get("baseline_count")
    ]
    if fixed:
        return [f"failed a fixed limit of {', '.join(fixed)}"]
    return ["failed, and not by a comparison"] if outcome == "failed" and not failed else []


def _file(store: BaselineStore, report: Report, test_id: str) -> Path:
    runs = report.runs_of(test_id)
    if not runs:
        raise ConfigurationError("The report has no run of this test", actual=repr(test_id), where=report.path)
    return store.path_for(test_id, hardware_class=runs[0].environment.hardware_class, profile=runs[0].profile)


def _stored_or_note(store: BaselineStore, path: Path) -> tuple[Baseline | None, str]:
    """Return the stored baseline, or what to say of a file that holds none."""
    try:
        return store.read(path), ""
    except BaselineError as error:
        return None, f"had a baseline that cannot be read, whose history is lost ({error})"


def _says_incomplete(line: str) -> bool:
    if line.startswith("ERROR ") or "no tests collected" in line:
        return True
    if not (summary := _COLLECTED.search(line)):
        return False
    return bool(summary[1]) or "deselected" in line or "error" in line


def _file_of(test_id: str) -> str:
    return test_id.partition("::")[0]


def _exists(one: Stored, root: Path) -> bool:
    return (root / _file_of(one.baseline.test_id)).exists()


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no entry for this uid, as in many containers
        return f"uid {os.getuid()}"

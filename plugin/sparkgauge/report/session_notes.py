"""What a session says beside its verdicts: many tests at once, rounds that were disturbed, rounds that do not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkgauge import stats
from sparkgauge.machine import disturbances
from sparkgauge.records import RunRecord, Verdict
from sparkgauge.store import DEFAULT_LABEL

FAMILY_LEVEL = 0.01
"""Probability of even one false regression among all tests of a session, for those that Holm's correction keeps."""

MOST_NOTES = 10

COMPARED = ("match", "improved", "inconclusive", "regressed")
"""Statuses of verdicts that rest on samples of two sides, or on samples and a number."""


@dataclass(frozen=True)
class Family:
    """The gated tests of one session, and which regressions stand when all are looked at together."""

    tests: int
    regressed: tuple[str, ...]
    kept: tuple[str, ...]
    """Those of ``regressed`` whose p-value, adjusted after Holm, is at most :data:`FAMILY_LEVEL`."""
    adjusted: tuple[float, ...]
    """The adjusted p-values of ``regressed``, in its order."""


def family_of(verdicts: Sequence[tuple[str, str, Verdict]]) -> Family:
    """Return the family of a session's verdicts (test id, label, verdict).

    A test with several comparisons counts once, with its smallest p-value times their number (Bonferroni). What did not
    regress counts as a p-value of 1.
    """
    by_test: dict[str, list[Verdict]] = {}
    for test_id, _, verdict in verdicts:
        if verdict.status in COMPARED:
            by_test.setdefault(test_id, []).append(verdict)
    tests = list(by_test)
    adjusted = dict(zip(tests, stats.holm([_p_of(by_test[test]) for test in tests]), strict=True))
    regressed = tuple(test for test in tests if any(one.status == "regressed" for one in by_test[test]))
    kept = tuple(test for test in regressed if adjusted[test] <= FAMILY_LEVEL)
    return Family(len(tests), regressed, kept, tuple(adjusted[test] for test in regressed))


def family_lines(family: Family) -> list[str]:
    """Return what is said of the family; nothing of fewer than two tests, or without a regression."""
    if family.tests < 2 or not family.regressed:
        return []
    head = (
        f"{len(family.regressed)} of {family.tests} tests regressed; after Holm's correction {len(family.kept)} at "
        f"family level {FAMILY_LEVEL:.0%}"
    ).replace("%", " %")
    rest = [
        f"  not after the correction: {test} (adjusted p = {p:.2g})"
        for test, p in zip(family.regressed, family.adjusted, strict=True)
        if test not in family.kept
    ]
    return [head, *_limited(rest)]


def round_lines(runs: Sequence[RunRecord]) -> list[str]:
    """Return a line for every round that does not count, and for every one that the machine disturbed."""
    invalid = [
        f"not a sample: {_name(run)} round {number}: {one.invalid}"
        for run in runs
        for number, one in enumerate(run.rounds, 1)
        if one.invalid
    ]
    disturbed = [
        f"disturbed: {_name(run)} round {number}: {', '.join(found)}"
        for run in runs
        for number, one in enumerate(run.rounds, 1)
        if (found := disturbances(one))
    ]
    return [*_limited(invalid), *_limited(disturbed)]


def _p_of(verdicts: Sequence[Verdict]) -> float:
    known = [one.p_value for one in verdicts if one.status == "regressed" and one.p_value is not None]
    return min(1.0, min(known, default=1.0) * len(verdicts))


def _name(run: RunRecord) -> str:
    return run.test_id if run.label == DEFAULT_LABEL else f"{run.test_id} {run.label}"


def _limited(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_NOTES
    return [*lines[:MOST_NOTES], f"  and {more} more"] if more > 0 else list(lines)

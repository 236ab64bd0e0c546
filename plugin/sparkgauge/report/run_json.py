"""The JSON file of ``--gauge-report``: every run with its raw rounds, and every verdict, for other programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge import selfcheck
from sparkgauge.records import RunRecord, Verdict
from sparkgauge.report.gpu_lines import costs
from sparkgauge.report.session_notes import FAMILY_LEVEL, family_of
from sparkgauge.store import write_json

if TYPE_CHECKING:
    from sparkgauge.session import GaugeSession

REPORT_SCHEMA_VERSION = 1
"""Version of this file's layout; readers should refuse a newer one."""


def write_run_report(
    path: Path,
    runs: Sequence[RunRecord],
    verdicts: Sequence[tuple[str, str, Verdict]],
    header: Mapping[str, Any],
    **more: Mapping[str, Any],
) -> None:
    """Write ``runs``, ``verdicts`` (test id, label, verdict), ``header`` and ``more``, or raise BaselineError.

    The file is written whole or not at all. Numbers that are not finite become null, because JSON has none and a
    report of a failed run must still be written.
    """
    write_json(path, report_of(runs, verdicts, header, **more), what="run report")


def write_session_report(path: Path, session: GaugeSession) -> None:
    """Write everything that ``session`` measured to ``path``; BaselineError where it cannot be written."""
    config = session.config
    header = {
        "profile": config.profile,
        "master": config.master,
        "executors": config.executors,
        "commit": session.commit,
        "environment": session.environment,
        "injections": dict(config.injections),
    }
    more: dict[str, Mapping[str, Any]] = {
        "outcomes": session.outcomes,
        "speedups": session.speedups,
        "self_check": selfcheck.report_field(session.environment.hardware_class),
        "family": {"level": FAMILY_LEVEL, **dataclasses.asdict(family_of(session.verdicts))},
    }
    if config.prices:
        more["costs"] = {"prices": dict(config.prices), "trainings": costs(session.runs, config.prices)}
    if session.opponent is not None:
        more["against"] = session.opponent.report()
    write_run_report(path, session.runs, session.verdicts, header, **more)


def report_of(
    runs: Sequence[RunRecord],
    verdicts: Sequence[tuple[str, str, Verdict]],
    header: Mapping[str, Any],
    **more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report as JSON-ready data with the fields schema, header, runs, verdicts and those of ``more``.

    ``sparkgauge baselines approve`` needs ``outcomes`` (test -> how it ended) and ``speedups`` (test -> metric ->
    samples); without them it refuses, and a test's speed-ups are lost.
    """
    flat = [{"test_id": test, "label": label, **_plain(verdict)} for test, label, verdict in verdicts]
    return {
        "schema": REPORT_SCHEMA_VERSION,
        "header": _plain(header),
        "runs": _plain(runs),
        "verdicts": flat,
        **_plain(more),
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)

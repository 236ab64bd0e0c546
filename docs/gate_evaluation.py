"""Print how often the gate errs on recorded traces, beside other tools' rules on the same samples.

    python docs/gate_evaluation.py docs/traces --tuned-on loaded_a shared

Every trace in the folder (see ``record_traces.py``) is resampled in blocks of consecutive steps, so that disturbances
keep their length. Nothing changed within a trace: a "regressed" is a false alarm, and with the candidate's times
multiplied by 1.05 a missing one is a miss. The gate's settings were chosen on the traces named by ``--tuned-on``; the
others score them. ``--json`` prints the same figures for machines, ``--plots FOLDER`` draws them (Matplotlib). Where
Apache Otava is installed (``pip install apache-otava``) it is given the same histories as ``stats.change_points``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from sparkgauge import records, selfcheck, stats
from sparkgauge.gate import Policy
from sparkgauge.stats import robust

MARGIN, ALPHA = 0.05, 0.01
WALL_PAIRS, CPU_PAIRS = 80, 40
FIRST_LOOK = {"wall": stats.sequential.FIRST_LOOK_PAIRS, "cpu": 6}
"""Pairs at the first look: CPU time has little autocorrelation to be shown."""
BLOCK_PAIRS = 20
"""Pairs in a block: 40 steps, some 15 to 20 s on a loaded machine, longer than its disturbances last."""
ROUND_STEPS = 5
"""Steps in a stored round: a round of seconds."""
STORED_ROUNDS = 8
SESSION_ROUNDS, SESSION_MOST_ROUNDS, SESSION_MARGINS = 5, 10, (0.10, 0.15)
"""Of profile ci: planned rounds, rounds while undecided, the default margin and the suite's own."""
PHASES = {"launch": 0.08, "feed": 0.05, "compute": 0.55, "sync": 0.22, "evaluate": 0.10}
EFFECTS = (0.0, 0.05, 0.10, 0.20)
SPARK_BLOCK_PAIRS = 5
"""Of real rounds, of which a trace holds some hundred: 10 rounds, half a minute."""
HISTORY, STEP_AT, NEAR = 60, 30, 3
"""Entries of a history, where the step is, and how far off a change point may be to count as found."""
HISTORY_BLOCK = 3
"""Entries that are neighbours: approvals of one day."""
LEAST_PHASE_SHARE = 0.05
"""Of a round: 20 % of a smaller phase is less than 1 % of the round."""
SLOW_SHARE = 10
"""Otava, and ours beside it, get every tenth resampling: 0.1 s a series."""

Array = Any
Rule = Callable[[Array, Array], Array]
"""Takes both sides' times, (resamplings, samples), and returns which rows are called slower."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    trace: str
    what: str
    rule: str
    false_positives: float | None
    power_5: float | None
    power_10: float | None
    power_20: float | None
    pairs_unchanged: float | None = None
    pairs_at_5: float | None = None
    spread: tuple[int, ...] = field(default=(), compare=False)
    """Pairs until the verdict with nothing changed, of every resampling; for the histogram."""

    def cells(self) -> list[str]:
        """Return the printed cells."""
        rates = (self.false_positives, self.power_5, self.power_10, self.power_20)
        pairs = (self.pairs_unchanged, self.pairs_at_5)
        return [
            self.trace,
            self.what,
            self.rule,
            *("" if rate is None else f"{rate:.1%}" for rate in rates),
            *("" if count is None else f"{count:.1f}" for count in pairs),
        ]


HEAD = ["trace", "samples", "rule", "FPR", "+5 %", "+10 %", "+20 %", "pairs, same", "pairs, +5 %"]


# ---------------------------------------------------------------------------------------------------- resampling


def blocks(count: int, length: int, wanted: int, rows: int, generator: np.random.Generator) -> Array:
    """Return indices (rows, wanted) of consecutive runs of ``length`` out of ``count``, wherever they start."""
    length = min(length, wanted, count)
    starts = generator.integers(0, count - length + 1, size=(rows, -(-wanted // length)))
    return (starts[..., None] + np.arange(length)).reshape(rows, -1)[:, :wanted]


def interleaved(
    values: Array, pairs: int, rows: int, generator: np.random.Generator, *, block_pairs: int = BLOCK_PAIRS
) -> tuple[Array, Array]:
    """Return (baseline, candidate), each (rows, pairs): neighbouring steps in random order."""
    steps = values[blocks(len(values), 2 * block_pairs, 2 * pairs, rows, generator)].reshape(rows, pairs, 2)
    swapped = generator.random((rows, pairs)) < 0.5
    return np.where(swapped, steps[..., 1], steps[..., 0]), np.where(swapped, steps[..., 0], steps[..., 1])


def around(reference: Array) -> Array:
    """Return the reference kernel's time around each step: before it and after it."""
    return reference + np.append(reference[1:], reference[-1])


def rounds_of_seconds(values: Array, steps: int = ROUND_STEPS) -> Array:
    """Return sums over ``steps`` neighbouring steps."""
    whole = len(values) // steps * steps
    return values[:whole].reshape(-1, steps).sum(axis=1)


# ------------------------------------------------------------------------------------------------- other tools' rules


def mean_5_percent(before: Array, after: Array) -> Array:
    """Return pytest-benchmark's ``--benchmark-compare-fail=mean:5%``."""
    return after.mean(axis=1) > 1.05 * before.mean(axis=1)


def asv_rule(before: Array, after: Array, *, factor: float = 1.1, threshold: float = 0.002) -> Array:
    """Return airspeed velocity's rule: medians apart by the factor, and different at p < 0.002.

    Different by Mann-Whitney where so many samples can reach that p at all; otherwise where the 99 % intervals of the
    medians (from order statistics) do not overlap.
    """
    apart = np.median(after, axis=1) > factor * np.median(before, axis=1)
    count = before.shape[1]
    if 1.0 / special.binom(2 * count, count) < threshold:
        return apart & (scipy_stats.mannwhitneyu(after, before, axis=1).pvalue < threshold)
    low, high = _median_bounds(after)[0], _median_bounds(before)[1]
    return apart & (low > high)


def _median_bounds(values: Array, confidence: float = 0.99) -> tuple[Array, Array]:
    ordered, count = np.sort(values, axis=1), values.shape[1]
    rank = int(scipy_stats.binom.ppf((1.0 - confidence) / 2.0, count, 0.5))
    if rank < 1:
        return np.full(len(values), -np.inf), np.full(len(values), np.inf)
    return ordered[:, rank - 1], ordered[:, count - rank]


def welch_5_percent(before: Array, after: Array) -> Array:
    """Return Welch's test at 0.05, two-sided, and means apart by 5 %."""
    test = scipy_stats.ttest_ind(after, before, axis=1, equal_var=False)
    return (after.mean(axis=1) > 1.05 * before.mean(axis=1)) & (test.pvalue < 0.05)


COMPETITORS: dict[str, Rule] = {
    "pytest-benchmark mean:5%": mean_5_percent,
    "asv, factor 1.1": asv_rule,
    "asv, factor 1.05": lambda before, after: asv_rule(before, after, factor=1.05),
    "Welch + 5 %": welch_5_percent,
}


# --------------------------------------------------------------------------------------------------- the figures


def interleaved_rows(trace: Trace, column: str, pairs: int, rows: int, seed: int) -> Iterator[Row]:
    """Yield the sequential gate, the same rule at the fixed maximum, and the other tools, on interleaved pairs."""
    draw = partial(interleaved, pairs=pairs, rows=rows, block_pairs=trace.block_pairs)
    before, after = draw(trace.columns[f"{column}_seconds"], generator=np.random.default_rng(seed))
    same = draw(around(trace.columns["reference_seconds"]), generator=np.random.default_rng(seed))
    differences, beside = np.log(after) - np.log(before), np.log(same[1]) - np.log(same[0])
    what = f"{'CPU' if column == 'cpu' else column}, {pairs} pairs"
    plan, whole = (stats.Plan(stats.Margin(MARGIN), ALPHA, first, pairs) for first in (FIRST_LOOK[column], pairs))
    settled: dict[str, Callable[[float], stats.Outcomes]] = {
        "sparkgauge, sequential": lambda effect: stats.settle_many(differences + np.log1p(effect), plan),
        "sparkgauge, with kernel": lambda effect: stats.settle_many(differences + np.log1p(effect), plan, beside),
        "sparkgauge, fixed maximum": lambda effect: stats.settle_many(differences + np.log1p(effect), whole),
    }
    if column == "cpu":
        del settled["sparkgauge, with kernel"]
    for rule, settle in settled.items():
        outcomes = [settle(effect) for effect in EFFECTS]
        shares = [outcome.share("regressed") for outcome in outcomes]
        counts = [float(outcome.pairs.mean()) for outcome in outcomes]
        spread = tuple(int(count) for count in outcomes[0].pairs)
        yield Row(trace.name, what, rule, *shares, counts[0], counts[1], spread)
    for rule, called in COMPETITORS.items():
        powers = (float(called(before, after * (1 + effect)).mean()) for effect in EFFECTS)
        yield Row(trace.name, what, rule, *powers, pairs)


def stored_rows(name: str, before: Trace, after: Trace, rows: int, seed: int) -> Iterator[Row]:
    """Yield rates for runs of rounds against others of the same or another trace, not overlapping."""
    generator = np.random.default_rng(seed)
    what = f"stored, {STORED_ROUNDS} rounds" + ("" if before.is_spark else f" of {ROUND_STEPS} steps")
    one, two = (_stored_pieces(trace) for trace in (before, after))
    first, second = _starts(len(one[0]), len(two[0]), before is after, rows, generator)
    at = [piece[first[:, None] + np.arange(STORED_ROUNDS)] for piece in one]
    to = [piece[second[:, None] + np.arange(STORED_ROUNDS)] for piece in two]
    few = rows // 8  # these are compared one by one
    for rule, references in (("sparkgauge, stored", True), ("sparkgauge, stored, no reference", False)):
        shares = []
        for effect in EFFECTS:
            called = [_stored(at, to, row, effect, references) == "regressed" for row in range(few)]
            shares.append(float(np.mean(called)))
        yield Row(name, what, rule, *shares)
    for rule, called_by in COMPETITORS.items():
        yield Row(name, what, rule, *(float(called_by(at[0], to[0] * (1 + effect)).mean()) for effect in EFFECTS))


def _stored(at: list[Array], to: list[Array], row: int, effect: float, references: bool) -> str:
    sides = (at[1][row], to[1][row]) if references else (None, None)
    compared = stats.compare_stored(
        at[0][row], to[0][row] * (1 + effect), *sides, margin=MARGIN, alpha=ALPHA, beyond=0.5
    )
    return compared.comparison.status


def _stored_pieces(trace: Trace) -> tuple[Array, Array]:
    wall, reference = (trace.columns[f"{name}_seconds"] for name in ("wall", "reference"))
    return rounds_of_seconds(wall, trace.round_steps), rounds_of_seconds(reference, trace.round_steps)


def _starts(one: int, two: int, same: bool, rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    first = generator.integers(0, one - STORED_ROUNDS + 1, size=8 * rows)
    second = generator.integers(0, two - STORED_ROUNDS + 1, size=8 * rows)
    apart = np.abs(first - second) >= STORED_ROUNDS if same else np.ones(8 * rows, dtype=bool)
    return first[apart][:rows], second[apart][:rows]


def session_rows(trace: Trace, rows: int) -> Iterator[tuple[Row, dict[str, float]]]:
    """Yield rates of a session's own rule, with its looks, and the share that stays undecided with nothing changed."""
    beside = trace.columns["step_reference_seconds"]
    for margin in SESSION_MARGINS:
        for rule, references in (("with the kernel between the steps", beside), ("without a kernel", ())):
            found = selfcheck.calibrate_stored(
                trace.columns["wall_seconds"],
                Policy(runtime_margin_fraction=margin),
                rounds=SESSION_ROUNDS,
                most_rounds=SESSION_MOST_ROUNDS,
                resamplings=rows,
                references=references,
            )
            what = f"a session's rounds, margin {margin:.0%}"
            powers = [found.found[f"{effect:g}"].fraction for effect in EFFECTS[1:]]
            rounds = (found.rounds_unchanged, found.rounds_slower["0.05"])
            yield (
                Row(trace.name, what, rule, found.false_positives.fraction, *powers, *rounds),
                {f"{trace.name}, {what}, {rule}: undecided with nothing changed": found.undecided.fraction},
            )


def few_rounds(rows: int) -> dict[str, float]:
    """Return what 4 rounds a side at a CV of 3 % come to with +50 %, and with nothing changed."""
    generator, figures = np.random.default_rng(7), {}
    for effect in (0.5, 0.0):
        found = []
        for _ in range(rows):
            before, after = np.exp(generator.normal(0.0, 0.03, size=(2, 4)))
            found.append(stats.compare(before, after * (1 + effect), margin=0.10, alpha=ALPHA).status)
        for status in ("regressed", "match", "improved", "inconclusive"):
            figures[f"4 rounds, CV 3 %, +{effect:.0%}: {status}"] = found.count(status) / rows
    return figures


def history_series(trace: Trace, rows: int, seed: int) -> Array:
    """Return histories (rows, entries) of rounds of seconds with nothing changed, few neighbours at a time."""
    values = rounds_of_seconds(trace.columns["wall_seconds"], trace.round_steps)
    return values[blocks(len(values), HISTORY_BLOCK, HISTORY, rows, np.random.default_rng(seed))]


def history_rules() -> dict[str, Callable[[Array], Sequence[int]]]:
    """Return what finds change points in a series; Otava's, at its defaults, where it is installed."""
    rules: dict[str, Callable[[Array], Sequence[int]]] = {
        "sparkgauge, change_points": lambda series: [one.index for one in stats.change_points(list(series))]
    }
    try:
        from otava.analysis import compute_change_points
    except ImportError:
        return rules

    def otava(series: Array, least: float) -> list[int]:
        return [one.index for one in compute_change_points([float(value) for value in series], min_magnitude=least)[0]]

    rules["Otava, defaults"] = partial(otava, least=0.0)
    rules["Otava, magnitude 5 %"] = partial(otava, least=0.05)
    return rules


def history_rows(trace: Trace, rows: int, seed: int) -> Iterator[Row]:
    """Yield how often a step halfway through a history is found, and in how many without one something is."""
    series = history_series(trace, max(20, rows // SLOW_SHARE), seed)
    for rule, find in history_rules().items():
        rates = []
        for effect in EFFECTS:
            stepped = series * np.where(np.arange(HISTORY) >= STEP_AT, 1.0 + effect, 1.0)
            found = [find(one) for one in stepped]
            near = [any(abs(index - STEP_AT) <= NEAR for index in each) for each in found]
            rates.append(float(np.mean(near if effect else [bool(each) for each in found])))
        yield Row(trace.name, f"history of {HISTORY}, step at {STEP_AT}", rule, *rates)


def real_phase_naming(trace: Trace, pairs: int, rows: int) -> dict[str, float]:
    """Return how often 20 % more in one real phase is named, and a wrong one; neighbouring rounds of the trace.

    By wall seconds alone, and as a session does it: by CPU seconds where wall seconds name none.
    """
    names = [name for name in records.PHASES if f"{name}_seconds" in trace.columns]
    whole = trace.columns["wall_seconds"].mean()
    large = [name for name in names if trace.columns[f"{name}_seconds"].mean() > LEAST_PHASE_SHARE * whole]
    kinds = ["", "_cpu"] if f"{names[0]}_cpu_seconds" in trace.columns else [""]
    tables = [np.stack([trace.columns[f"{name}{kind}_seconds"] for name in names], axis=-1) for kind in kinds]
    generator, figures = np.random.default_rng(11), {}
    for target in large:
        found: list[list[str | None]] = []
        for _ in range(rows):
            picked = blocks(len(tables[0]), 2 * SPARK_BLOCK_PAIRS, 2 * pairs, 1, generator)[0].reshape(pairs, 2)
            swapped = generator.random(pairs) < 0.5
            picked[swapped] = picked[swapped][:, ::-1]
            found.append([_named(table[picked], names, target) for table in tables])
        called = {"wall": [by[0] for by in found]}
        if len(kinds) > 1:
            called["wall, else CPU"] = [by[0] or by[1] for by in found]
        for how, blamed in called.items():
            what = f"{trace.name}, +20 % in {target}, {pairs} pairs, {how}"
            figures[f"{what}: right"] = float(np.mean([one == target for one in blamed]))
            figures[f"{what}: wrong"] = float(np.mean([one not in (target, None) for one in blamed]))
    return figures


def _named(sides: Array, names: Sequence[str], target: str) -> str | None:
    """Return the phase named for pairs of rounds (pairs, 2, phases) whose second one has 20 % more in ``target``."""
    before, after = (dict(zip(names, sides[:, side].T, strict=True)) for side in (0, 1))
    return stats.localise(before, {**after, target: after[target] * 1.2}, paired=True).named


def coverage(trace: Trace, rows: int) -> dict[str, float]:
    """Return the coverage of the speed-up interval at nominal 95 %: whether it holds the truth."""
    figures, name, values = {}, trace.name, trace.columns["wall_seconds"]
    for pairs in (10, 20, 40, 80):
        generator = np.random.default_rng(pairs)
        before, after = interleaved(values, pairs, rows, generator, block_pairs=trace.block_pairs)
        differences = np.log(after) - np.log(before)
        for rule, estimate in (
            ("interval of interleaved runs", robust.trimmed(differences, trim=0.0)),
            ("the same, order not random", robust.in_time_order(differences)),
        ):
            half = robust.critical(0.025, estimate.freedom) * estimate.standard_error
            figures[f"{name}, coverage, {pairs} pairs, {rule}"] = float((np.abs(estimate.mean) <= half).mean())
    return figures


def phase_naming(name: str, column: str, values: Array, pairs: int, rows: int) -> dict[str, float]:
    """Return how often 20 % more in one phase is named, and a wrong one; phases are neighbouring steps, scaled."""
    generator, counts = np.random.default_rng(11), {"right": 0, "wrong": 0, "none": 0, "unchanged": 0}
    names, sizes = list(PHASES), np.array(list(PHASES.values()))
    for row in range(rows):
        steps = blocks(len(values), 2 * ROUND_STEPS * 4, 2 * pairs * ROUND_STEPS, 1, generator)[0]
        table = values[steps].reshape(pairs, 2, ROUND_STEPS)
        swapped = generator.random(pairs) < 0.5
        table[swapped] = table[swapped][:, ::-1]
        before, after = table[:, 0] * sizes, table[:, 1] * sizes
        target = row % len(names)
        slower = after.copy()
        slower[:, target] *= 1.2
        sides = [{phase: side[:, k] for k, phase in enumerate(names)} for side in (before, slower, after)]
        found = stats.localise(sides[0], sides[1], paired=True).named
        counts["none" if found is None else "right" if found == names[target] else "wrong"] += 1
        counts["unchanged"] += stats.localise(sides[0], sides[2], paired=True).named is not None
    what = f"{name}, {column}, +20 % in one phase, {pairs} pairs"
    return {f"{what}: {key}": count / rows for key, count in counts.items()}


def accuracy(rows: int) -> dict[str, float]:
    """Return how often one lost point is caught with the seeds that a pilot of 5 asks for, by seed-to-seed sd."""
    generator, figures, images = np.random.default_rng(13), {}, 10_000
    for sd in (0.002, 0.005, 0.008):
        caught = alarms = total = 0

        def side(mean: float, count: int, sd: float = sd) -> Array:
            return generator.binomial(images, np.clip(generator.normal(mean, sd, count), 0.0, 1.0)) / images

        for _ in range(rows):
            pilot = side(0.75, 5)
            asked = max(stats.sd_upper(pilot), stats.binomial_sd(0.75, images))
            count = stats.seeds_needed(round(asked, 4), 0.01, 0.9)
            before, same, worse = side(0.75, count), side(0.75, count), side(0.74, count)
            caught += stats.accuracy_noninferiority(before, worse, test_count=images).status == "regressed"
            alarms += stats.accuracy_noninferiority(before, same, test_count=images).status == "regressed"
            total += count
        what = f"accuracy, sd over seeds {sd * 100:.1f} points"
        figures |= {
            f"{what}: 1 point lost is caught": caught / rows,
            f"{what}: false alarms": alarms / rows,
            f"{what}: seeds asked for, mean": total / rows,
        }
    return figures


def session_seconds() -> float:
    """Return the seconds that all statistics of 200 tests with 50 samples a side take."""
    generator = np.random.default_rng(17)
    stats.change_points(np.exp(generator.normal(0, 0.05, 50)))  # SciPy's import is not the statistics
    data = np.exp(generator.normal(0.0, 0.05, size=(200, 2, 5, 50)))
    start, p_values = time.perf_counter(), []
    for before, after in data:
        p_values.append(stats.compare(before[0], after[0], margin=0.1).p_worse)
        phases = [dict(zip(PHASES, side, strict=True)) for side in (before, after)]
        stats.localise(phases[0], phases[1])
        stats.compare_stored(before[0], after[0], before[1], after[1], margin=0.1)
        stats.change_points(before[0])
        stats.drift(before[0])
    stats.holm(p_values)
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------ output


@dataclass(frozen=True)
class Trace:
    """One recorded trace."""

    name: str
    columns: dict[str, Array]
    about: dict[str, Any]

    @property
    def is_spark(self) -> bool:
        """Return whether its steps are real training rounds."""
        return self.about.get("kind") == "spark rounds"

    @property
    def round_steps(self) -> int:
        """Return the steps that make a round of seconds."""
        return 1 if self.is_spark else ROUND_STEPS

    @property
    def block_pairs(self) -> int:
        """Return the pairs that stay together."""
        return SPARK_BLOCK_PAIRS if self.is_spark else BLOCK_PAIRS


def read(path: Path) -> Trace:
    """Return the trace in a file."""
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files if name != "about"}
        return Trace(path.stem, columns, json.loads(str(file["about"])))


def describe(trace: Trace) -> str:
    """Return a trace's size and noise in one line."""
    wall, cpu, load = (trace.columns[key] for key in ("wall_seconds", "cpu_seconds", "load_average"))
    logs = np.log(wall) - np.log(wall).mean()
    lag = float((logs[1:] * logs[:-1]).sum() / (logs**2).sum())
    variation = f"CV {wall.std() / wall.mean():.0%} wall, {cpu.std() / cpu.mean():.1%} CPU"
    return f"{trace.name}: {len(wall)} steps, load {load.mean():.1f}, {variation}, wall lag-1 autocorrelation {lag:.2f}"


def evaluate(traces: list[Trace], rows: int) -> tuple[list[Row], dict[str, float]]:
    """Return the table's rows and the single figures."""
    table, figures = [], few_rounds(rows)
    for number, trace in enumerate(traces):
        wall, cpu = trace.columns["wall_seconds"], trace.columns["cpu_seconds"]
        table += interleaved_rows(trace, "wall", WALL_PAIRS, rows, number)
        table += interleaved_rows(trace, "cpu", CPU_PAIRS, rows, 100 + number)
        table += stored_rows(trace.name, trace, trace, rows, 200 + number)
        table += history_rows(trace, rows, 400 + number)
        figures |= coverage(trace, rows)
        if "step_reference_seconds" in trace.columns:
            for row, undecided in session_rows(trace, max(200, rows // 2)):
                table.append(row)
                figures |= undecided
        if trace.is_spark:
            figures |= real_phase_naming(trace, 20, max(200, rows // 8))
            continue
        figures |= phase_naming(trace.name, "CPU", cpu, 20, max(200, rows // 8))
        figures |= phase_naming(trace.name, "wall", wall, 40, max(200, rows // 8))
    table += between_traces([trace for trace in traces if not trace.is_spark], rows // 4)
    figures |= accuracy(max(200, rows // 4))
    figures["statistics of a session of 200 tests, seconds"] = session_seconds()
    return table, figures


def between_traces(traces: list[Trace], rows: int) -> Iterator[Row]:
    """Yield the mean rates over all ordered pairs of traces: the baseline was stored under another load."""
    apart = [(one, two) for one in traces for two in traces if one is not two]
    if not apart:
        return
    each = [list(stored_rows("", one, two, rows, 300 + number)) for number, (one, two) in enumerate(apart)]
    for same_rule in zip(*each, strict=True):
        rates = np.mean([(r.false_positives, r.power_5, r.power_10, r.power_20) for r in same_rule], axis=0)
        yield Row("one against another", same_rule[0].what, same_rule[0].rule, *(float(rate) for rate in rates))


# ----------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A figure to reach, and what was reached: the worst of the scoring traces."""

    wanted: str
    reached: str
    held: bool
    where: str

    def cells(self) -> list[str]:
        """Return the printed cells."""
        return [self.wanted, self.reached, "yes" if self.held else "no", self.where]


def worst(rows: list[Row], rule: str, what: str, column: str, *, highest: bool) -> tuple[float, str]:
    """Return the worst rate of ``rule`` over the rows, and the trace that has it; nan without any."""
    found = [(getattr(row, column), row.trace) for row in rows if row.rule == rule and row.what.startswith(what)]
    values = [(float(value), trace) for value, trace in found if value is not None]
    return (max(values) if highest else min(values)) if values else (float("nan"), "no trace")


def targets(table: list[Row], figures: dict[str, float], traces: list[Trace], tuned: Sequence[str]) -> list[Target]:
    """Return the figures to reach with what the scoring traces, those not tuned on, came to."""
    scoring = [row for row in table if row.trace not in tuned]
    loads = {trace.name: float(trace.columns["load_average"].mean()) for trace in traces}
    busy = [row for row in scoring if loads.get(row.trace, 0.0) >= 4.0]
    ours, cpu = "sparkgauge, sequential", f"CPU, {CPU_PAIRS}"
    lines = [
        ("interleaved wall FPR at load >= 4: at most 1 %", busy, ours, "wall", "false_positives", 0.01, True),
        ("stored FPR, rounds of seconds: at most 2 %", scoring, "sparkgauge, stored", "stored", *FPR_2),
        ("interleaved wall +5 % in 80 pairs: at least 85 %", scoring, ours, "wall", "power_5", 0.85, False),
        ("the same with the kernel as covariate", scoring, "sparkgauge, with kernel", "wall", "power_5", 0.85, False),
        ("interleaved wall +10 %: at least 99 %", scoring, ours, "wall", "power_10", 0.99, False),
        ("CPU time +5 % in 40 pairs: at least 99 %", scoring, ours, cpu, "power_5", 0.99, False),
        ("CPU time, pairs on average at +5 %: at most 15", scoring, ours, cpu, "pairs_at_5", 15.0, True),
    ]
    found = [_rate_target(*line) for line in lines]
    found += [_saved_target(scoring, "wall", WALL_PAIRS), _saved_target(scoring, "CPU", CPU_PAIRS)]
    return found + [_figure_target(*line, figures, tuned) for line in FIGURE_TARGETS]


ANY = float("inf")
FPR_2 = ("false_positives", 0.02, True)
FIGURE_TARGETS: tuple[tuple[str, tuple[str, ...], float, float], ...] = (
    ("4 rounds a side, CV 3 %, +50 %: flagged at least 95 %", ("+50%: regressed",), 0.95, ANY),
    ("the same: never a silent pass", ("+50%: match",), -ANY, 0.0),
    ("20 % in one phase named, CPU: at least 95 %", ("CPU", "in one phase", ": right"), 0.95, ANY),
    ("a wrong phase, CPU: at most 2 %", ("CPU", "in one phase", ": wrong"), -ANY, 0.02),
    ("20 % in one phase named, wall: at least 95 %", ("wall", "in one phase", ": right"), 0.95, ANY),
    ("a wrong phase, wall: at most 2 %", ("wall", "in one phase", ": wrong"), -ANY, 0.02),
    ("20 % in one phase of a real round named: at least 95 %", ("+20 % in", "wall, else CPU: right"), 0.95, ANY),
    ("a wrong phase of a real round: at most 2 %", ("+20 % in", "wall, else CPU: wrong"), -ANY, 0.02),
    ("speed-up interval coverage: 93 to 97 %", ("coverage", "interval of interleaved"), 0.93, 0.97),
    ("1 point of accuracy lost, caught: at least 90 %", ("1 point lost is caught",), 0.9, ANY),
    ("the same, false alarms: at most 2 %", ("accuracy", "false alarms"), -ANY, 0.02),
    ("statistics of a 200-test session: under 2 s", ("statistics of a session",), -ANY, 2.0),
)
"""What is wanted, the parts of the figures' names, and the least and most that hold."""


def _rate_target(
    wanted: str, rows: list[Row], rule: str, what: str, column: str, limit: float, at_most: bool
) -> Target:
    value, trace = worst(rows, rule, what, column, highest=at_most)
    held = value <= limit if at_most else value >= limit
    return Target(wanted, f"{value:.1f}" if limit > 1.0 else f"{value:.1%}", held, trace)


def _saved_target(rows: list[Row], what: str, pairs: int) -> Target:
    """Return the pairs saved with nothing changed, and the power that costs at +5 %, on the worst trace."""
    by_rule = {
        rule: {row.trace: row for row in rows if row.what.startswith(what) and row.rule == f"sparkgauge, {rule}"}
        for rule in ("sequential", "fixed maximum")
    }
    both = []
    for trace, row in by_rule["sequential"].items():
        if trace not in by_rule["fixed maximum"]:
            continue
        lost = (by_rule["fixed maximum"][trace].power_5 or 0.0) - (row.power_5 or 0.0)
        both.append((1.0 - (row.pairs_unchanged or pairs) / pairs, lost, trace))
    saved, _, trace = min(both, default=(float("nan"), float("nan"), "no trace"))
    lost = max((one[1] for one in both), default=float("nan"))
    reached = f"{saved:.0%}, at most {lost * 100:.1f} points lost"
    return Target(
        f"{what}: at least 50 % of pairs saved, within 2 points", reached, saved >= 0.5 and lost <= 0.02, trace
    )


def _figure_target(
    wanted: str, parts: tuple[str, ...], least: float, most: float, figures: dict[str, float], tuned: Sequence[str]
) -> Target:
    """Return the figure that misses the range furthest, or the one closest to leaving it."""
    found = [
        (min(value - least, most - value), value, name)
        for name, value in figures.items()
        if all(part in name for part in parts) and name.split(",")[0] not in tuned
    ]
    slack, value, name = min(found, default=(float("nan"), float("nan"), "nothing"))
    return Target(wanted, f"{value:.2f} s" if most == 2.0 else f"{value:.1%}", slack >= 0.0, name.split(":")[0])


# ------------------------------------------------------------------------------------------------------- plots


def draw(table: list[Row], folder: Path) -> None:
    """Write false positives per tool, power over effect and pairs needed as SVG files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "sparkgauge", "font.size": 9, "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    wall = [row for row in table if row.what.startswith("wall")]
    traces = list(dict.fromkeys(row.trace for row in wall))
    _draw_false_positives(wall, traces, folder / "false_positives.svg")
    _draw_power(wall, traces, folder / "power.svg")
    _draw_pairs(wall, traces, folder / "pairs.svg")


def _draw_false_positives(rows: list[Row], traces: list[str], path: Path) -> None:
    from matplotlib import pyplot

    rules = [rule for rule in dict.fromkeys(row.rule for row in rows) if rule != "sparkgauge, fixed maximum"]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for number, rule in enumerate(rules):
        rates = [100 * next(r.false_positives or 0 for r in rows if (r.trace, r.rule) == (t, rule)) for t in traces]
        axes.bar(np.arange(len(traces)) + number / (len(rules) + 1), rates, 0.9 / (len(rules) + 1), label=rule)
    axes.axhline(1.0, color="black", linewidth=0.6, linestyle="--")
    axes.set_xticks(np.arange(len(traces)) + 0.4, traces)
    axes.set_ylabel("false alarms, %")
    axes.set_title(f"Nothing changed, {WALL_PAIRS} interleaved wall pairs", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _draw_power(rows: list[Row], traces: list[str], path: Path) -> None:
    from matplotlib import pyplot

    chosen = {"sparkgauge, sequential": "-", "Welch + 5 %": "--", "asv, factor 1.05": ":"}
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for number, trace in enumerate(traces):
        for rule, style in chosen.items():
            row = next(one for one in rows if (one.trace, one.rule) == (trace, rule))
            rates = [100 * (rate or 0.0) for rate in (row.false_positives, row.power_5, row.power_10, row.power_20)]
            label = trace if style == "-" else None
            axes.plot([100 * effect for effect in EFFECTS], rates, style, color=f"C{number}", label=label)
    axes.set_xlabel("slowdown, %")
    axes.set_ylabel("called slower, %")
    axes.set_title(f"{WALL_PAIRS} wall pairs: solid sparkgauge, dashed Welch + 5 %, dotted asv 1.05", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _draw_pairs(rows: list[Row], traces: list[str], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    edges = np.linspace(0, WALL_PAIRS, 17)
    spreads = [next(r.spread for r in rows if (r.trace, r.rule) == (t, "sparkgauge, sequential")) for t in traces]
    axes.hist([np.minimum(one, WALL_PAIRS - 0.1) for one in spreads], bins=list(edges), label=traces)
    axes.set_xlabel("wall pairs until the verdict, nothing changed")
    axes.set_ylabel("resamplings")
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Evaluate every trace of the folder and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuned-on", nargs="*", default=[])
    parser.add_argument("--resamplings", type=int, default=2000)
    parser.add_argument("--only", nargs="*", help="names of the traces to evaluate; all by default")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    paths = sorted(options.folder.glob("*.npz"))
    traces = [read(path) for path in paths if not options.only or path.stem in options.only]
    table, figures = evaluate(traces, options.resamplings)
    found = targets(table, figures, traces, options.tuned_on)
    if options.plots:
        draw(table, options.plots)
    if options.json:
        plain = [{**vars(row), "spread": None} for row in table]
        print(json.dumps({"rows": plain, "figures": figures, "targets": [vars(one) for one in found]}, indent=1))
        return
    for trace in traces:
        print(f"- {describe(trace)}{' (the settings were chosen on it)' if trace.name in options.tuned_on else ''}")
    print(f"\nMargin {MARGIN:.0%}, alpha {ALPHA:g}, {options.resamplings} resamplings.\n")
    for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in table)):
        print("| " + " | ".join(cells) + " |")
    print()
    for what, value in figures.items():
        print(f"- {what}: {value:.3f}")
    print()
    for cells in (["wanted", "reached", "held", "worst on"], ["---"] * 4, *(one.cells() for one in found)):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

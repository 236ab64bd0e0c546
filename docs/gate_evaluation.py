"""Print how often the gate errs on recorded traces, beside other tools' rules on the same samples.

    python docs/gate_evaluation.py docs/traces --tuned-on loaded_a shared

Every trace in the folder (see ``record_traces.py``) is resampled in blocks of consecutive steps, so that disturbances
keep their length. Nothing changed within a trace: a "regressed" is a false alarm, and with the candidate's times
multiplied by 1.05 a missing one is a miss. The gate's settings were chosen on the traces named by ``--tuned-on``; the
others score them. ``--json`` prints the same figures for machines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from sparkgauge import stats
from sparkgauge.stats import robust

MARGIN, ALPHA = 0.05, 0.01
WALL_PAIRS, CPU_PAIRS, FEWEST_PAIRS = 80, 40, 6
BLOCK_PAIRS = 20
"""Pairs in a block: 40 steps, some 15 to 20 s on a loaded machine, longer than its disturbances last."""
ROUND_STEPS = 5
"""Steps in a stored round: a round of seconds."""
STORED_ROUNDS = 8
PHASES = {"launch": 0.08, "feed": 0.05, "compute": 0.55, "sync": 0.22, "evaluate": 0.10}
EFFECTS = (0.0, 0.05, 0.10, 0.20)

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


def interleaved(values: Array, pairs: int, rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Return (baseline, candidate), each (rows, pairs): neighbouring steps in random order."""
    steps = values[blocks(len(values), 2 * BLOCK_PAIRS, 2 * pairs, rows, generator)].reshape(rows, pairs, 2)
    swapped = generator.random((rows, pairs)) < 0.5
    return np.where(swapped, steps[..., 1], steps[..., 0]), np.where(swapped, steps[..., 0], steps[..., 1])


def rounds_of_seconds(values: Array) -> Array:
    """Return sums over ``ROUND_STEPS`` neighbouring steps."""
    whole = len(values) // ROUND_STEPS * ROUND_STEPS
    return values[:whole].reshape(-1, ROUND_STEPS).sum(axis=1)


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


def interleaved_rows(name: str, what: str, values: Array, pairs: int, rows: int, seed: int) -> Iterator[Row]:
    """Yield the sequential gate, the same rule at the fixed maximum, and the other tools, on interleaved pairs."""
    generator = np.random.default_rng(seed)
    before, after = interleaved(values, pairs, rows, generator)
    plans = {
        "sparkgauge, sequential": stats.Plan(stats.Margin(MARGIN), ALPHA, FEWEST_PAIRS, pairs),
        "sparkgauge, fixed maximum": stats.Plan(stats.Margin(MARGIN), ALPHA, pairs, pairs),
    }
    differences = np.log(after) - np.log(before)
    for rule, plan in plans.items():
        outcomes = [stats.settle_many(differences + np.log1p(effect), plan) for effect in EFFECTS]
        shares = [outcome.share("regressed") for outcome in outcomes]
        counts = [float(outcome.pairs.mean()) for outcome in outcomes]
        yield Row(name, what, rule, *shares, counts[0], counts[1])
    for rule, called in COMPETITORS.items():
        yield Row(name, what, rule, *(float(called(before, after * (1 + effect)).mean()) for effect in EFFECTS), pairs)


def stored_rows(name: str, before: Trace, after: Trace, rows: int, seed: int) -> Iterator[Row]:
    """Yield rates for runs of rounds against others of the same or another trace, not overlapping."""
    generator, what = np.random.default_rng(seed), f"stored, {STORED_ROUNDS} rounds of {ROUND_STEPS} steps"
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
    return rounds_of_seconds(trace.columns["wall_seconds"]), rounds_of_seconds(trace.columns["reference_seconds"])


def _starts(one: int, two: int, same: bool, rows: int, generator: np.random.Generator) -> tuple[Array, Array]:
    first = generator.integers(0, one - STORED_ROUNDS + 1, size=8 * rows)
    second = generator.integers(0, two - STORED_ROUNDS + 1, size=8 * rows)
    apart = np.abs(first - second) >= STORED_ROUNDS if same else np.ones(8 * rows, dtype=bool)
    return first[apart][:rows], second[apart][:rows]


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


def coverage(name: str, values: Array, rows: int) -> dict[str, float]:
    """Return the coverage of the speed-up interval at nominal 95 %: whether it holds the truth."""
    figures = {}
    for pairs in (10, 20, 40, 80):
        before, after = interleaved(values, pairs, rows, np.random.default_rng(pairs))
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


def read(path: Path) -> Trace:
    """Return the trace in a file."""
    with np.load(path) as file:
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
        table += interleaved_rows(trace.name, f"wall, {WALL_PAIRS} pairs", wall, WALL_PAIRS, rows, number)
        table += interleaved_rows(trace.name, f"CPU, {CPU_PAIRS} pairs", cpu, CPU_PAIRS, rows, 100 + number)
        table += stored_rows(trace.name, trace, trace, rows, 200 + number)
        figures |= coverage(trace.name, wall, rows)
        figures |= phase_naming(trace.name, "CPU", cpu, 20, max(200, rows // 8))
        figures |= phase_naming(trace.name, "wall", wall, 40, max(200, rows // 8))
    table += between_traces(traces, rows // 4)
    figures |= accuracy(max(200, rows // 4))
    figures["statistics of a session of 200 tests, seconds"] = session_seconds()
    return table, figures


def between_traces(traces: list[Trace], rows: int) -> Iterator[Row]:
    """Yield the mean rates over all ordered pairs of traces: the baseline was stored under another load."""
    apart = [(one, two) for one in traces for two in traces if one is not two]
    each = [list(stored_rows("", one, two, rows, 300 + number)) for number, (one, two) in enumerate(apart)]
    for same_rule in zip(*each, strict=True):
        rates = np.mean([(r.false_positives, r.power_5, r.power_10, r.power_20) for r in same_rule], axis=0)
        yield Row("one against another", same_rule[0].what, same_rule[0].rule, *(float(rate) for rate in rates))


def main() -> None:
    """Evaluate every trace of the folder and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuned-on", nargs="*", default=[])
    parser.add_argument("--resamplings", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    traces = [read(path) for path in sorted(options.folder.glob("*.npz"))]
    table, figures = evaluate(traces, options.resamplings)
    if options.json:
        print(json.dumps({"rows": [vars(row) for row in table], "figures": figures}, indent=1))
        return
    for trace in traces:
        print(f"- {describe(trace)}{' (the settings were chosen on it)' if trace.name in options.tuned_on else ''}")
    print(f"\nMargin {MARGIN:.0%}, alpha {ALPHA:g}, {options.resamplings} resamplings.\n")
    for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in table)):
        print("| " + " | ".join(cells) + " |")
    print()
    for what, value in figures.items():
        print(f"- {what}: {value:.3f}")


if __name__ == "__main__":
    main()

"""Kills executors at random steps and prints what each kill cost: the recovery figures of docs/performance.md.

    SPARKGAUGE_DATA=... python docs/measure_recovery.py                # 20 kills, about 6 minutes on two cores
    python docs/measure_recovery.py --kills 10 --first 10              # kills 10 to 19 of the same sequence

Every second kill takes the executor's JVM, the others its Python process, both by SIGKILL at a random moment of a
random step on a random executor. cifar10_quick at global batch 100 on two executors of one core; each run's weights
are compared, bit by bit, with those of undisturbed runs in between. Needs the package with its PyTorch extra, Java 17,
and a machine on which nothing else runs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import cluster, dataset, make_job, print_machine

from sparkgauge.adapters.torch import launch
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.job import Recovery
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS

STEPS, EVERY = 60, 15
LIMIT_SECONDS = 5.0
"""Allowed beyond one checkpoint interval."""
TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    what: str
    rank: int
    step: int
    part: float
    """Moment within the step, as a fraction of its length."""


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill in the sequence")
    parser.add_argument("--spares", type=int, default=1, help="executors that stand by, as in a session (default: 1)")
    wanted = parser.parse_args()
    print_machine()
    kills = sequence(wanted.first + wanted.kills)[wanted.first :]
    launch.prepare()
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(PREIMPORTS["torch"], retries=1, spares=wanted.spares) as running,
    ):
        measure(running, Path(folder), kills, wanted.first)


def sequence(count: int) -> list[Kill]:
    """Return the first ``count`` kills of a sequence that is the same in every run."""
    dice = random.Random(1)
    return [
        Kill(("process", "JVM")[number % 2], dice.randrange(2), dice.randrange(1, STEPS), dice.random())
        for number in range(count)
    ]


def measure(running: SparkCluster, folder: Path, kills: list[Kill], first: int) -> None:
    """Run every kill, undisturbed runs around and between them, and print a row for each."""
    run(running, folder, None)  # the first round of a session is slower
    calm = [run(running, folder, None) for _ in range(2)]
    step_seconds = statistics.median(calm[0].executors[0].step_seconds)
    print("| kill | of | executor | after step | went on from | runtime, s | same weights |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rounds = []
    for number, kill in enumerate(kills, first):
        if number > first and number % 5 == 0:
            calm.append(run(running, folder, None))
        done = run(running, folder, kill)
        running.ensure_alive()
        rounds.append(done)
        same = done.metrics["weights_crc"] == calm[0].metrics["weights_crc"]
        resumed = done.invalid.partition("went on from ")[2].partition(";")[0] or "NOT RETRIED"
        cells = (
            number,
            kill.what,
            kill.rank,
            kill.step,
            resumed,
            f"{done.runtime_seconds:.2f}",
            "yes" if same else "NO",
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    report(kills, rounds, calm, step_seconds)


def report(kills: list[Kill], rounds: list[Round], calm: list[Round], step_seconds: float) -> None:
    """Print what the kills cost, beside what is allowed."""
    usual = statistics.median(one.runtime_seconds for one in calm)
    allowed = EVERY * step_seconds + LIMIT_SECONDS
    lost = {what: [] for what in ("process", "JVM")}
    for kill, done in zip(kills, rounds, strict=True):
        lost[kill.what].append(done.runtime_seconds - usual)
    identical = {one.metrics["weights_crc"] for one in [*calm, *rounds]}
    print(
        f"\n{len(rounds)} of {len(kills)} runs complete; {len(identical)} distinct sets of final weights among them and"
    )
    shortest, longest = min(one.runtime_seconds for one in calm), max(one.runtime_seconds for one in calm)
    print(f"{len(calm)} undisturbed runs ({usual:.2f} s, {shortest:.2f} - {longest:.2f}); a step takes ", end="")
    print(f"{step_seconds * 1000:.0f} ms, a checkpoint was written every {EVERY} steps.\n")
    print(f"| lost by a kill, s (allowed: {allowed:.2f}) | median | min - max | n | within |")
    print("| --- | --- | --- | --- | --- |")
    for what, seconds in lost.items():
        if seconds:
            within = sum(one <= allowed for one in seconds)
            span = f"{min(seconds):.2f} - {max(seconds):.2f}"
            print(f"| {what} | {statistics.median(seconds):.2f} | {span} | {len(seconds)} | {within} |")


def run(running: SparkCluster, folder: Path, kill: Kill | None) -> Round:
    """Return a round that ``kill`` happens to."""
    marker = folder / f"killed-{time.monotonic_ns()}"
    options = {} if kill is None else {**vars(kill), "marker": str(marker)}
    recovery = Recovery(1, EVERY, str(folder / f"checkpoints-{marker.name}"))
    wanted = make_job(dataset(), "custom", STEPS, fn=fit, options=options, recovery=recovery)
    return run_round(running.spark.sparkContext, wanted, launch.launch, timeout_seconds=TIMEOUT_SECONDS)


def fit(context: Any, shard: Any) -> dict[str, float]:
    """Train cifar10_quick as the built-in model does, and return a checksum of its final weights."""
    import torch

    from sparkgauge.adapters.torch.training import Trainer
    from sparkgauge.models.cifar10 import RECIPES

    recipe = RECIPES["cifar10_quick"]
    torch.manual_seed(context.seed)
    trainer = Trainer(recipe, context, shard)
    if (state := context.restore()) is not None:
        trainer.restore(state)
    for step in context.steps(trainer.feed):
        if step.index == context.options.get("step"):
            _kill_soon(context)
        trainer.step(step, recipe.learning_rate(step.index, STEPS))
        if context.checkpoint_due:
            context.checkpoint(trainer.state())
    trainer.test()
    return {"weights_crc": float(zlib.crc32(trainer.state()["tensors"]["values"].numpy().tobytes()))}


def _kill_soon(context: Any) -> None:
    """Kill this executor, or its JVM, within the step, unless that has been done."""
    from sparkgauge.machine import jvm_above

    options = context.options
    if context.rank != options["rank"] or Path(options["marker"]).exists():
        return
    Path(options["marker"]).touch()
    victim = os.getpid() if options["what"] == "process" else jvm_above()
    steps = context.step_seconds[-5:] or [0.1]
    threading.Timer(options["part"] * sum(steps) / len(steps), os.kill, (victim, signal.SIGKILL)).start()


if __name__ == "__main__":
    main()

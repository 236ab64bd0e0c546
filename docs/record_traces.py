"""Record an A/A trace: identical steps of about 0.2 s CPU time, one after another, with a reference kernel in between.

Nothing changes from step to step, so every "regression" that a gate finds between two of them is a false alarm.
``gate_evaluation.py`` resamples such traces in blocks. A trace is an ``.npz`` with one value a step in
``wall_seconds``, ``cpu_seconds``, ``reference_seconds``, ``reference_cpu_seconds`` and ``load_average``, and ``about``
as JSON text.

    python docs/record_traces.py docs/traces/shared.npz --seconds 180
    python docs/record_traces.py docs/traces/loaded.npz --seconds 240 --competitors 6
    SPARKGAUGE_DATA=... python docs/record_traces.py docs/traces/spark_quiet.npz --spark --seconds 400

``--competitors N`` starts N processes that work and rest in random bursts, as other jobs of a shared machine do.
``--spark`` records real trainings instead: short rounds of cifar10_quick on the embedded cluster, all with one seed,
with ``step_reference_seconds`` (the session's own kernel between the steps), ``<phase>_seconds`` and
``<phase>_cpu_seconds`` (means over the executors) beside the columns above; ``cpu_seconds`` are then those of the
training processes together. ``--label`` says in the file what the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy is imported: the step is the work of one core

import numpy as np  # noqa: E402

STEP_CPU_SECONDS = 0.2
REFERENCE_CPU_SECONDS = 0.02
BUSY_SECONDS, REST_SECONDS = 4.0, 1.0
"""Means of a competitor's bursts and rests; both exponential."""


class Kernel:
    """Fixed work: matrix products (compute) and a copy of a large array (memory), repeated for a given CPU time."""

    def __init__(self, cpu_seconds: float) -> None:
        generator = np.random.default_rng(0)
        self.left, self.right = generator.random((2, 192, 192), dtype=np.float32)
        self.images = generator.random(1 << 20, dtype=np.float32)
        self.repetitions = 1
        spent = min(self._spent(8) for _ in range(20)) / 8
        self.repetitions = max(1, round(cpu_seconds / spent))

    def _spent(self, repetitions: int) -> float:
        self.repetitions = repetitions
        before = time.process_time()
        self()
        return time.process_time() - before

    def __call__(self) -> None:
        """Do the work once."""
        for _ in range(self.repetitions):
            np.matmul(self.left, self.right)
            self.images.copy()


def timed(kernel: Kernel) -> tuple[float, float]:
    """Return wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    kernel()
    return time.perf_counter() - wall, time.process_time() - cpu


def compete(seed: int, rest_seconds: float) -> None:
    """Work and rest in random bursts until terminated."""
    generator, kernel = random.Random(seed), Kernel(0.01)
    while True:
        until = time.monotonic() + generator.expovariate(1.0 / BUSY_SECONDS)
        while time.monotonic() < until:
            kernel()
        time.sleep(generator.expovariate(1.0) * rest_seconds)


def record(seconds: float) -> dict[str, np.ndarray]:
    """Return the columns of a trace of about ``seconds``."""
    step, reference = Kernel(STEP_CPU_SECONDS), Kernel(REFERENCE_CPU_SECONDS)
    rows, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        rows.append((*timed(reference), *timed(step), os.getloadavg()[0]))
    names = ("reference_seconds", "reference_cpu_seconds", "wall_seconds", "cpu_seconds", "load_average")
    return {name: np.asarray(column, dtype=np.float64) for name, column in zip(names, np.array(rows).T, strict=True)}


def record_spark(
    seconds: float, iterations: int, framework: str | None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return the columns of a trace of real rounds, taken for about ``seconds``, and what was run."""
    import sys

    from sparkgauge import attribution, selfcheck_rounds, store
    from sparkgauge.report.progress import Progress

    reference, beside = Kernel(REFERENCE_CPU_SECONDS), []
    settings = selfcheck_rounds.Settings()
    keywords = {"iterations": iterations, "framework": framework}
    with selfcheck_rounds.rounds_on_spark(settings, Progress(sys.stderr), **keywords) as taker:
        rounds, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            beside.append((*timed(reference), os.getloadavg()[0]))
            rounds.append(taker.take())
        data, environment = taker.session.dataset().identity, taker.session.environment
        about: dict[str, object] = {
            "kind": "spark rounds",
            "workload": taker.workload.to_dict(),
            "data": f"{data.name} ({data.kind}), {data.train_count} + {data.test_count} images",
            "cpu": environment.cpu_model,
            "software": environment.software,
        }
    columns = dict(zip(("reference_seconds", "reference_cpu_seconds", "load_average"), np.array(beside).T, strict=True))
    columns["wall_seconds"] = np.array([one.runtime_seconds for one in rounds])
    columns["step_reference_seconds"] = np.array([store.piece_seconds(one) for one in rounds])
    columns["cpu_seconds"] = np.array([store.cpu_seconds(one) for one in rounds])
    for phase, values in selfcheck_rounds.phase_samples(rounds).items():
        columns[f"{phase}_seconds"] = np.array(values)
    for phase, values in attribution.phase_means([one.executors for one in rounds], cpu=True).items():
        columns[f"{phase}_cpu_seconds"] = np.array(values)
    return columns, about


def appended(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of the trace in ``path`` with ``columns`` behind them; both must have the same ones."""
    with np.load(path, allow_pickle=False) as file:
        if set(file.files) - {"about"} != columns.keys():
            raise SystemExit(f"{path} has other columns: {', '.join(file.files)}")
        return {name: np.concatenate([file[name], values]) for name, values in columns.items()}


def main() -> None:
    """Record a trace and print what it is like."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--competitors", type=int, default=0)
    parser.add_argument(
        "--rest-seconds", type=float, default=REST_SECONDS, help="mean rest of a competitor; 0 for none"
    )
    parser.add_argument("--spark", action="store_true", help="record real training rounds on a Spark cluster")
    parser.add_argument("--iterations", type=int, default=30, help="training steps of such a round")
    parser.add_argument("--framework", help="what such a round trains with (default: the first one installed)")
    parser.add_argument("--append", action="store_true", help="add to the file a further piece of the same kind")
    parser.add_argument("--label", default="", help="what the machine was doing, kept in the file")
    options = parser.parse_args()
    jobs = [(number, options.rest_seconds) for number in range(options.competitors)]
    processes = [multiprocessing.Process(target=compete, args=job, daemon=True) for job in jobs]
    for process in processes:
        process.start()
    extra: dict[str, object] = {"kind": "steps"}
    try:
        if options.spark:
            columns, extra = record_spark(options.seconds, options.iterations, options.framework)
        else:
            columns = record(options.seconds)
    finally:
        for process in processes:
            process.terminate()
    about = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "competitors": options.competitors,
        "rest_seconds": options.rest_seconds,
        "steps": len(columns["wall_seconds"]),
        "label": options.label,
        "mean_load": round(float(columns["load_average"].mean()), 2),
        **extra,
    }
    if options.append:
        columns = appended(options.output, columns)
        about |= {"steps": len(columns["wall_seconds"]), "mean_load": round(float(columns["load_average"].mean()), 2)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.output, about=np.array(json.dumps(about)), **columns)
    for name in ("wall_seconds", "cpu_seconds", "reference_seconds", "load_average"):
        values = columns[name]
        print(f"{name}: n {len(values)}, mean {values.mean():.3f}, CV {values.std() / max(values.mean(), 1e-9):.1%}")


if __name__ == "__main__":
    main()

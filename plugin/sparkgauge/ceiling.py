"""What the executors' cores, or GPUs, can do at most: matrix products and memory, measured while all are busy."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from sparkgauge import gpu
from sparkgauge.errors import TrainingError
from sparkgauge.records import Ceiling, RunRecord

SECONDS = 0.2
"""For each of the two measurements: several passes on any machine."""

GEMM_SIDE = {"cpu": 1024, "gpu": 8192}
"""Of the square matrices: large enough to reach the peak, 2 or 1,100 billion operations a product."""

MEMORY_BYTES = {"cpu": 96 * 2**20, "gpu": 2**30}
"""Of the array that is read and written: beyond a core's share of any cache."""


def of_executors(spark_context: Any, executors: int, threads: int, device: str) -> Ceiling | None:
    """Return the sum over ``executors``, all measured at once with ``threads`` threads each.

    None where one of them cannot be measured for want of a library that works there. TrainingError where Spark cannot
    run the job.
    """
    numbers = spark_context.parallelize(range(executors), executors)
    try:
        measured = numbers.map(functools.partial(_on_executor, threads, device)).collect()
    except Exception as error:
        cause = next((line.strip() for line in str(error).splitlines() if "Error" in line), str(error))
        raise TrainingError("The machine's ceilings could not be measured", actual=cause) from error
    if None in measured:
        return None
    return Ceiling(
        gemm_gflops=sum(gemm for gemm, _ in measured),
        memory_gigabytes_per_second=sum(memory for _, memory in measured),
        precision="bfloat16" if device == "gpu" else "float32",
    )


def ceiling_fraction(run: RunRecord) -> float | None:
    """Return a run's achieved GFLOP/s over the executors' ceiling; None where either is not known."""
    achieved = achieved_gflops(run)
    return None if achieved is None or run.ceiling is None else achieved / run.ceiling.gemm_gflops


def achieved_gflops(run: RunRecord) -> float | None:
    """Return the mean over a run's rounds of what all executors did together; None where work is not counted."""
    from sparkgauge.models import flops

    rounds = run.valid_rounds
    if not rounds:
        return None
    mean = sum(one.images_per_second for one in rounds) / len(rounds)
    return flops.achieved_gflops(str(run.workload["model"]), mean, run.workload.get("options", {}))


def _on_executor(threads: int, device: str, _: int) -> tuple[float, float] | None:
    """Return GFLOP/s and GB/s of this executor; None where they cannot be measured."""
    try:
        return _on_gpu() if device == "gpu" else _on_cpu(threads)
    except Exception:  # a library that is broken or another than the driver's: the training names it, and its executor
        return None


def _on_cpu(threads: int) -> tuple[float, float]:
    """Return both with PyTorch's libraries where the executor has imported it anyway, else with numpy's."""
    side, count = GEMM_SIDE["cpu"], MEMORY_BYTES["cpu"] // 4
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)
        left, memory = torch.ones(side, side), torch.ones(count)
        product = torch.empty_like(left)
        gemm = _best_seconds(lambda: torch.mm(left, left, out=product))
        passed = _best_seconds(lambda: memory.add_(1))
    else:
        import numpy as np

        rows, numbers = np.ones((side, side), np.float32), np.ones(count, np.float32)
        result = np.empty_like(rows)
        gemm = _best_seconds(lambda: np.matmul(rows, rows, out=result))
        passed = _best_seconds(lambda: np.add(numbers, 1, out=numbers))
    return 2 * side**3 / gemm / 1e9, 2 * MEMORY_BYTES["cpu"] / passed / 1e9


def _on_gpu() -> tuple[float, float] | None:
    gpu.expose(gpu.of_task())
    import torch

    if not torch.cuda.is_available():
        return None

    side = GEMM_SIDE["gpu"]
    left = torch.ones(side, side, device="cuda", dtype=torch.bfloat16)
    product, memory = torch.empty_like(left), torch.ones(MEMORY_BYTES["gpu"] // 4, device="cuda")
    gemm = _best_seconds(lambda: torch.mm(left, left, out=product), torch.cuda.synchronize)
    passed = _best_seconds(lambda: memory.add_(1), torch.cuda.synchronize)
    return 2 * side**3 / gemm / 1e9, 2 * MEMORY_BYTES["gpu"] / passed / 1e9


def _best_seconds(once: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Return the seconds of the fastest call within SECONDS, after one that warms up."""
    once()
    wait()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < until or best == float("inf"):
        once()
        wait()
        best = min(best, time.perf_counter() - began)
    return best

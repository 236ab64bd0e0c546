"""How near a run came to what its machine can do, and what distributing it cost: lines for the report."""

from __future__ import annotations

import statistics

from sparkgauge import ceiling, ranks
from sparkgauge.records import RunRecord
from sparkgauge.store import DEFAULT_LABEL


def limit_lines(run: RunRecord) -> list[str]:
    """Return the line of achieved GFLOP/s over the measured ceiling; nothing where work is not counted."""
    achieved, limit = ceiling.achieved_gflops(run), run.ceiling
    if achieved is None:
        return []
    parts = [f"{achieved:,.1f} GFLOP/s"]
    if limit is not None:
        parts.append(f"{achieved / limit.gemm_gflops:.0%} of {limit.gemm_gflops:,.0f} GFLOP/s ({limit.precision} GEMM)")
        parts.append(f"memory {limit.memory_gigabytes_per_second:,.1f} GB/s")
    return [f"{_name(run)}: {', '.join(parts)}"]


def rank_lines(run: RunRecord) -> list[str]:
    """Return a line about straggling, communication and bytes, and one for each executor; nothing for one executor."""
    rounds = [one for one in run.valid_rounds if len(one.executors) > 1]
    if not rounds:
        return []
    straggling, exposed = (statistics.fmean(f(one) for one in rounds) for f in (ranks.straggler_ratio, ranks.exposed))
    reduced = [one.metrics["reduced_bytes"] for one in rounds if "reduced_bytes" in one.metrics]
    moved = f", {statistics.fmean(reduced) / 2**20:,.1f} MiB reduced a round and executor" if reduced else ""
    head = f"straggler ratio {straggling:.3f}, exposed communication {exposed:.1%}{moved}"
    return [head, *(_rank_line(run, rank) for rank in range(len(rounds[0].executors)))]


def _rank_line(run: RunRecord, rank: int) -> str:
    shares = [one.executors[rank] for one in run.valid_rounds if len(one.executors) > rank]
    steps = sorted(seconds * 1000 for share in shares for seconds in share.step_seconds)
    own, sync = (
        statistics.fmean(f(share) for share in shares) for f in (ranks.own_seconds, lambda share: share.phases.sync)
    )
    middle = f"{statistics.median(steps):.1f} ms, slowest {steps[-1]:.1f} ms" if steps else "none timed"
    return f"  executor {rank} ({shares[0].host}): own work {own:.2f} s, sync {sync:.2f} s, steps {middle} (median)"


def _name(run: RunRecord) -> str:
    return run.test_id if run.label == DEFAULT_LABEL else f"{run.test_id} {run.label}"

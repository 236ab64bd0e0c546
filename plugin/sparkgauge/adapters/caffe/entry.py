"""What every executor runs; importing it imports neither PyTorch nor protobuf, which a driver may lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkgauge.job import Job


def train(context: Any, shard: Any) -> dict[str, float]:
    """Train the net of ``context.plan`` on this executor."""
    from sparkgauge.adapters.caffe import training

    return training.train(context, shard)


def open_shard(job: Job, rank: int, folder: Path) -> Any:
    """Return this executor's images, in Caffe's order, of the session's data set or of the plan's databases."""
    from sparkgauge.caffe import sources
    from sparkgauge.executor import cifar10_shard

    if job.plan.lmdb is None:
        shard = cifar10_shard(job, rank, folder)
        return sources.of_session(shard, sources.Later(shard.sampler, job.plan.first_iteration))
    return sources.of_databases(job, rank, folder)

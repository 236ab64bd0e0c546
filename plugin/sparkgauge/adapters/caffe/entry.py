"""What every executor runs; importing it imports neither PyTorch nor protobuf, which a driver may lack."""

from __future__ import annotations

from typing import Any

from sparkgauge.executor import data_folder
from sparkgauge.job import Job


def train(context: Any, shard: Any) -> dict[str, float]:
    """Train the net of ``context.plan`` on this executor."""
    from sparkgauge.adapters.caffe import training

    return training.train(context, shard)


def open_shard(job: Job, rank: int) -> Any:
    """Return this executor's images, in Caffe's order, of the session's data set or of the plan's databases."""
    from sparkgauge.caffe import sources

    open_it = sources.of_session if job.plan.lmdb is None else sources.of_databases
    return open_it(job, rank, data_folder(job))

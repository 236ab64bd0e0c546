"""Launches one round on the executors as a Spark barrier stage, or through pyspark's TorchDistributor."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from sparkgauge.adapters import barrier, collective
from sparkgauge.adapters.torch import worker
from sparkgauge.errors import MachineError
from sparkgauge.executor import OpenShard, Train
from sparkgauge.job import Job, Launched

INSTALL_HINT = "Install it with: pip install 'pytest-sparkgauge[torch]'"


def check_installed() -> None:
    """Raise MachineError when PyTorch is not installed here; does not import it."""
    _require(("torch",), "framework='torch' needs a package that is not installed", INSTALL_HINT)


def prepare() -> None:
    """Import on the driver what a launch needs: seconds that belong to no round."""
    importlib.import_module("torch.distributed")


def launch(
    spark_context: Any,
    job: Job,
    *,
    job_group: str,
    check: Callable[[], None],
    train: Train | None = None,
    open_shard: OpenShard | None = None,
) -> Launched:
    """Start the job on all executors and return; they meet at a store that this process serves until the round ends.

    ``train`` and ``open_shard`` are what each executor runs in place of this adapter's own.
    """
    store, meeting = _open(job)
    entry = functools.partial(worker.main, meeting, train=train, open_shard=open_shard)
    retryable = job.recovery is not None and job.recovery.retries > 0
    settings: dict[str, Any] = {"job_group": job_group, "check": check, "entry": entry, "retryable": retryable}
    try:
        return barrier.launch(spark_context, job, close=_closing(store), **settings)
    except BaseException:
        _closing(store)()
        raise


def launch_torchdistributor(spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
    """Do the same through ``pyspark.ml.torch.distributor.TorchDistributor``, to compare both."""
    why = "launcher='torchdistributor' needs packages that are not installed"
    _require(("pandas", "pyarrow"), why, "Install them with: pip install 'pytest-sparkgauge[torchdistributor]'")
    barrier.refuse_dynamic_allocation(spark_context)
    barrier.await_slots(spark_context, job.executors, check)
    store, meeting = _open(job)

    def submit() -> None:
        from pyspark.ml.torch.distributor import TorchDistributor

        spark_context.setJobGroup(job_group, "sparkgauge: training round", interruptOnCancel=True)
        distributor = TorchDistributor(num_processes=job.executors, local_mode=False, use_gpu=job.device == "gpu")
        distributor.run(_under_torchrun, meeting, job)

    return barrier.in_background(submit, _closing(store))


def _under_torchrun(meeting: worker.Meeting, job: Job) -> None:
    rank = int(os.environ["RANK"])
    worker.main(meeting, job, rank, barrier.Peers(hosts=("",) * job.executors, rank=rank))


def _open(job: Job) -> tuple[collective.Store | None, worker.Meeting]:
    import torch

    store = collective.open_store(job)
    return store, worker.Meeting(store.address if store else None, str(torch.__version__))


def _closing(store: collective.Store | None) -> Callable[[], None]:
    return store.close if store is not None else lambda: None


def _require(names: tuple[str, ...], summary: str, hint: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in names if find_spec(name) is None]:
        raise MachineError(summary, expected=" and ".join(names), actual=f"no {' and no '.join(missing)}", hint=hint)

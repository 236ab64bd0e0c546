"""What every executor runs: join the process group, then train."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparkgauge import executor
from sparkgauge.adapters import collective
from sparkgauge.adapters.barrier import Peers
from sparkgauge.adapters.collective import StoreAddress, Team
from sparkgauge.errors import MachineError
from sparkgauge.job import Job


@dataclass(frozen=True)
class Meeting:
    """What the driver tells every executor beside the job."""

    store: StoreAddress | None
    torch_version: str
    """The driver's own: the store's protocol is not promised between versions."""


@dataclass(frozen=True)
class Handle:
    """``context.handle`` of the PyTorch adapter."""

    device: Any
    """The ``torch.device`` to train on."""
    team: Team
    """The other executors, and the shorter way to those on this machine."""

    @property
    def group(self) -> Any:
        """Return the process group of all executors; None for one."""
        return self.team.group


def main(
    meeting: Meeting,
    job: Job,
    rank: int,
    peers: Peers,
    train: executor.Train | None = None,
    open_shard: executor.OpenShard | None = None,
) -> None:
    """Train ``job`` as executor ``rank``, by ``train`` and ``open_shard`` where another adapter gives them.

    The stage has let this process see the GPUs of ``peers`` and no others.
    """
    with contextlib.ExitStack() as stack:
        guarded = _guarded(train or _training_function(job))

        def prepare(attempt: int) -> Handle:
            return _handle(meeting, job, rank, stack, attempt)

        executor.run(job, rank, guarded, prepare_attempt=prepare, open_shard=open_shard)


def _training_function(job: Job) -> executor.Train:
    return job.fn if job.fn is not None else functools.partial(_train_built_in, job.model)


def _train_built_in(model: str, context: Any, shard: Any) -> dict[str, float]:
    from sparkgauge.adapters.torch.training import train

    return train(model, context, shard)


def _guarded(train: Callable[[Any, Any], Any]) -> executor.Train:
    def guarded(context: Any, shard: Any) -> Any:
        with collective.peer_errors():
            return train(context, shard)

    return guarded


def _handle(meeting: Meeting, job: Job, rank: int, stack: contextlib.ExitStack, attempt: int) -> Handle:
    torch = _torch(meeting)
    device = _device(torch, job)
    team = stack.enter_context(collective.open_team(job, rank, meeting.store, job.device, attempt))
    return Handle(device, team)


def _torch(meeting: Meeting) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MachineError(
            "PyTorch cannot be imported on an executor",
            expected=f"torch {meeting.torch_version}",
            actual=str(error),
            hint="Install it where the executors run: pip install 'pytest-sparkgauge[torch]'",
        ) from error
    check_version(str(torch.__version__), meeting.torch_version)
    return torch


def check_version(own: str, drivers: str) -> None:
    """Raise MachineError where an executor's torch is not the driver's (builds such as +cpu may differ)."""
    if own.partition("+")[0] != drivers.partition("+")[0]:
        raise MachineError(
            "An executor has another PyTorch than the driver",
            expected=f"torch {drivers}",
            actual=f"torch {own}",
            hint="Install the same version on every machine",
        )


def _device(torch: Any, job: Job) -> Any:
    if job.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise MachineError(
            "device='gpu' was asked for, but PyTorch sees no GPU on this executor",
            expected="at least one GPU given by Spark and usable by this PyTorch",
            actual=f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}, CUDA {torch.version.cuda}",
            hint="Use device='cpu', or install a PyTorch with CUDA and give Spark GPU resources",
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)

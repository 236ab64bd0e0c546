"""Launches one round of a Caffe net on the executors as a Spark barrier stage, whichever engine computes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from sparkgauge.adapters.caffe import entry
from sparkgauge.adapters.torch import launch as torch_launch
from sparkgauge.caffe import INSTALL_HINT, require_protobuf
from sparkgauge.errors import MachineError
from sparkgauge.job import Job, Launched


def check_installed() -> None:
    """Raise MachineError when a package is missing here that both engines need; imports none of them."""
    require_protobuf()
    if find_spec("torch") is None:
        raise MachineError(
            "framework='caffe' needs a package that is not installed",
            expected="torch: the default engine, and the collectives of both",
            actual="no torch",
            hint=INSTALL_HINT,
        )


def check_engine(engine: str) -> None:
    """Raise MachineError, which says how to get it, when ``engine`` is the real Caffe and it is not installed here."""
    if engine == "caffe":
        from sparkgauge.adapters.caffe.engine_caffe import require

        require()


def prepare() -> None:
    """Import on the driver what a launch needs: seconds that belong to no round."""
    importlib.import_module("torch.distributed")


def launch(spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
    """Start the job on all executors and return; they meet at a store that this process serves until the round ends."""
    settings: dict[str, Any] = {"job_group": job_group, "check": check}
    return torch_launch.launch(spark_context, job, **settings, train=entry.train, open_shard=entry.open_shard)

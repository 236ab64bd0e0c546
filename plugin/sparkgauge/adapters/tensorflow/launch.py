"""Launches one round on the executors through TensorFlowOnSpark's TFCluster, in InputMode.TENSORFLOW."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

from sparkgauge.adapters.tensorflow import repairs, worker
from sparkgauge.errors import MachineError
from sparkgauge.job import Job, Launched

INSTALL_HINT = "Install them with: pip install 'pytest-sparkgauge[tensorflow]'"


def check_installed() -> None:
    """Raise MachineError when TensorFlow or TensorFlowOnSpark is not installed here; imports neither."""
    from importlib.util import find_spec

    missing = [name for name in ("tensorflow", "tensorflowonspark") if find_spec(name) is None]
    if missing:
        raise MachineError(
            "framework='tensorflow' needs packages that are not installed",
            expected="tensorflow and tensorflowonspark",
            actual=f"no {' and no '.join(missing)}",
            hint=INSTALL_HINT,
        )


def prepare() -> None:
    """Import on the driver what a launch needs: two seconds that belong to no round."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _root_logger_kept():
        importlib.import_module("tensorflowonspark.TFCluster")


def launch(spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
    """Form a TensorFlow cluster of ``job.executors`` nodes, each running the job, and return when all have reserved.

    ``check`` is called while waiting and raises when the round has failed or timed out; the caller owns waiting for
    results and cancelling (by ``job_group``).
    """
    with _root_logger_kept(), repairs.on_driver(check, job_group, job.loopback) as status:
        from tensorflowonspark import TFCluster

        cluster = TFCluster.run(
            spark_context,
            worker.main,
            {"job": job},  # a mapping: TensorFlowOnSpark looks for 'num_gpus' in it
            num_executors=job.executors,
            num_ps=0,
            input_mode=TFCluster.InputMode.TENSORFLOW,
            master_node="chief",
        )
    # nodes may still be asking for the list of their peers, so the server stays until they have trained
    return Launched(failure=lambda: status.get("error"), close=cluster.server.stop)


class _root_logger_kept:
    """Silences TensorFlowOnSpark and undoes what importing it does to the root logger (basicConfig at INFO)."""

    def __enter__(self) -> None:
        # at INFO it logs the managers' keys, and what it logs as errors is reported by the caller
        logging.getLogger("tensorflowonspark").setLevel(logging.CRITICAL)
        root = logging.getLogger()
        self._level, self._handlers = root.level, list(root.handlers)

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.setLevel(self._level)
        root.handlers[:] = self._handlers

"""The function that TensorFlowOnSpark runs on every executor."""

from __future__ import annotations

import functools
import os
from typing import Any

from sparkgauge import executor
from sparkgauge.errors import MachineError
from sparkgauge.job import Job


def main(arguments: dict[str, Job], node: Any) -> None:
    """Train ``arguments["job"]`` as ``node`` (a TFNodeContext) of the cluster that TensorFlowOnSpark has formed."""
    job = arguments["job"]
    try:
        executor.run(job, node.executor_id, _training_function(job), prepare=lambda: _strategy(job, node))
    finally:
        node.mgr.shutdown()  # TensorFlowOnSpark leaves its manager to an exit handler that Spark's workers skip


def _training_function(job: Job) -> executor.Train:
    if job.fn is not None:
        return job.fn
    return functools.partial(_train_built_in, job.model)


def _train_built_in(model: str, context: Any, shard: Any) -> None:
    from sparkgauge.adapters.tensorflow.training import train

    train(model, context, shard)


def _strategy(job: Job, node: Any) -> Any:
    """Return a MultiWorkerMirroredStrategy over all executors, on ``job.threads`` threads."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise MachineError(
            "TensorFlow cannot be imported on an executor",
            expected="tensorflow 2.16 or newer",
            actual=str(error),
            hint="Install it where the executors run: pip install 'pytest-sparkgauge[tensorflow]'",
        ) from error
    tf.config.threading.set_intra_op_parallelism_threads(job.threads)
    tf.config.threading.set_inter_op_parallelism_threads(max(1, job.threads // 4))
    _check_device(tf, job)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(node.cluster_spec), task_type=node.job_name, task_id=node.task_index, rpc_layer="grpc"
    )
    return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)


def _check_device(tf: Any, job: Job) -> None:
    gpus = tf.config.list_physical_devices("GPU")
    if job.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    elif not gpus:
        raise MachineError(
            "device='gpu' was asked for, but TensorFlow sees no GPU on this executor",
            expected="at least one GPU given by Spark and usable by this TensorFlow",
            actual=f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}, "
            f"built with CUDA: {tf.test.is_built_with_cuda()}",
            hint="Use device='cpu', or install a TensorFlow with CUDA and give Spark GPU resources",
        )

"""The function that TensorFlowOnSpark runs on every executor."""

from __future__ import annotations

import functools
import os
import socket
import time
from typing import Any

from sparkgauge import device, executor, gpu
from sparkgauge.errors import MachineError
from sparkgauge.job import Job

CHIEF = "chief"
"""Executor 0's job name: its server is where the others register."""
CHIEF_SECONDS = 30.0
"""Given to the chief's server to start, which takes it tenths of a second."""
POLL_SECONDS = 0.01


def main(arguments: dict[str, Job], node: Any) -> None:
    """Train ``arguments["job"]`` as ``node`` (a TFNodeContext) of the cluster that TensorFlowOnSpark has formed."""
    job = arguments["job"]
    addresses = gpu.of_task() if job.device == "gpu" else ()
    gpu.expose(addresses)  # TensorFlowOnSpark has set the variable to Spark's GPUs, on the CPU too
    try:
        executor.run(job, node.executor_id, _training_function(job), prepare=lambda: _strategy(job, node, addresses))
    finally:
        node.mgr.shutdown()  # TensorFlowOnSpark leaves its manager to an exit handler that Spark's workers skip


def _training_function(job: Job) -> executor.Train:
    if job.fn is not None:
        return job.fn
    return functools.partial(_train_built_in, job.model)


def _train_built_in(model: str, context: Any, shard: Any) -> None:
    from sparkgauge.adapters.tensorflow.training import train

    train(model, context, shard)


def _strategy(job: Job, node: Any, addresses: tuple[str, ...]) -> Any:
    """Return a MultiWorkerMirroredStrategy over all executors, on ``job.threads`` threads; NCCL sums between GPUs."""
    device.refuse_without_gpu(addresses, job)
    device.set_up_collectives(job)
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
    resolver = _resolver(tf, node, _gpu_count(tf, job))
    if node.job_name != CHIEF:
        await_listener(node.cluster_spec[CHIEF][0])
    means = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=means.NCCL if job.device == "gpu" and job.executors > 1 else means.AUTO
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver, communication_options=options)
    _check_placement(strategy, job)
    return strategy


def await_listener(address: str, seconds: float = CHIEF_SECONDS) -> None:
    """Return when something listens at ``address`` (HOST:PORT), or after ``seconds``: TensorFlow then says why not.

    A worker that is refused tries again after a whole second.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            socket.create_connection((host, int(port)), seconds).close()
            return
        except OSError:
            time.sleep(POLL_SECONDS)


def _resolver(tf: Any, node: Any, gpus: int) -> Any:
    """Return who this executor is; the strategy uses as many GPUs as it says, whatever TensorFlow sees."""
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(node.cluster_spec),
        task_type=node.job_name,
        task_id=node.task_index,
        rpc_layer="grpc",
        num_accelerators={"GPU": gpus} if gpus else {},
    )


def _check_placement(strategy: Any, job: Job) -> None:
    """Raise MachineError where the strategy computes on another device than the job's: that must never be silent."""
    devices = tuple(strategy.extended.worker_devices)
    if not all(f"DEVICE:{job.device.upper()}:" in device.upper() for device in devices):
        raise MachineError(
            "TensorFlow's strategy computes on another device than was asked for",
            expected=f"device={job.device!r}",
            actual=", ".join(devices),
            hint="TF_CPP_MIN_LOG_LEVEL=0 shows what TensorFlow finds",
        )


def _gpu_count(tf: Any, job: Job) -> int:
    """Return the GPUs to compute on, none on the CPU; MachineError where the job wants them and there are none."""
    gpus = tf.config.list_physical_devices("GPU")
    if job.device == "cpu":
        tf.config.set_visible_devices([], "GPU")
        return 0
    if not gpus:
        built = tf.sysconfig.get_build_info()
        version = built.get("cuda_version") if built.get("is_cuda_build") else None
        raise MachineError(
            "device='gpu' was asked for, but TensorFlow cannot use the GPU that Spark gave this executor",
            expected="a TensorFlow built for this GPU's CUDA, with the CUDA libraries it loads",
            actual=f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}, "
            + (f"TensorFlow built for CUDA {version}" if version else "a TensorFlow built without CUDA"),
            hint="Install tensorflow[and-cuda]; TF_CPP_MIN_LOG_LEVEL=0 names a library that is missing",
        )
    if job.fn is None:  # a built-in model trains on one; who asks for more trains something of their own
        gpus = gpus[:1]
        tf.config.set_visible_devices(gpus, "GPU")
    for one in gpus:  # its default is to take all of the memory at once, whatever a batch needs
        tf.config.experimental.set_memory_growth(one, True)
    return len(gpus)

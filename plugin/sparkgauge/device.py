"""The device that a training process uses, without a framework: wait for it, and say why it cannot be used."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from typing import Any

from sparkgauge import gpu, nvml
from sparkgauge.errors import MachineError
from sparkgauge.job import Job

_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|OOM when allocating|ResourceExhaustedError|RESOURCE_EXHAUSTED", re.I
)
_OTHER_CUDA = re.compile(
    r"no kernel image is available|CUDA driver version is insufficient|driver .* is too old|"
    r"CUDA_ERROR_NO_BINARY_FOR_GPU|provided PTX was compiled with an unsupported toolchain|CUDA_ERROR_INVALID_PTX",
    re.I,
)
_LOST = re.compile(r"uncorrectable ECC|CUDA_ERROR_ECC|GPU is lost|device has been (?:lost|reset)|Xid", re.I)
_ASKED = re.compile(r"Tried to allocate ([\d.]+) (MiB|GiB|KiB|bytes)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def synchroniser(device: str, handle: Any = None) -> Callable[[], None]:
    """Return what waits for all work queued on the device: the handle's own ``synchronise``, or PyTorch's.

    TensorFlow's eager results are values: reading a loss, as its adapter does where a phase ends, has waited already.
    """
    own = getattr(handle, "synchronise", None)
    if callable(own):
        return own  # type: ignore[no-any-return]
    return _synchronise_torch if device == "gpu" else lambda: None


def explained(error: BaseException, job: Job) -> BaseException:
    """Return ``error``, or where it says that the GPU cannot do this a MachineError with the reason in one line."""
    text = f"{type(error).__name__}: {error}"
    if job.device != "gpu" or isinstance(error, MachineError):
        return error
    if _OUT_OF_MEMORY.search(text):
        return _out_of_memory(text, job)
    if _OTHER_CUDA.search(text):
        return _other_cuda(text)
    if _LOST.search(text):
        return MachineError(
            "The GPU failed",
            actual=_first_line(text),
            hint="Look for XID messages in the kernel's log; replace the card",
        )
    return error


def refuse_without_gpu(addresses: tuple[str, ...], job: Job) -> None:
    """Raise MachineError where Spark gave this task no GPU although ``job`` trains on one."""
    if job.device == "gpu" and not addresses:
        raise MachineError(
            "device='gpu' was asked for, but Spark gave this executor no GPU",
            expected="spark.executor.resource.gpu.amount of at least 1, and a worker that has one",
            actual="no GPU among the task's resources",
            hint="See docs/gpu.md on how a cluster offers GPUs to Spark",
        )


def set_up_collectives(job: Job) -> None:
    """Set what gloo and NCCL, PyTorch's and TensorFlow's alike, read from the environment when they first connect.

    NCCL refuses two processes on one GPU of a host. Where executors share one, each claims a host of its own: sums then
    go through sockets and the GPU takes turns, which is slow but right.
    """
    if job.loopback:
        names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[variable] = names[0] if names else "lo"
    if job.shares_gpus:
        os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{os.getpid()}"


def _synchronise_torch() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _out_of_memory(text: str, job: Job) -> MachineError:
    devices = [one for one in _visible() if one.memory_bytes]
    total = devices[0].memory_bytes or 0 if devices else 0
    used = devices[0].used_bytes or 0 if devices else 0
    asked = sum(float(size) * _UNITS[unit] for size, unit in _ASKED.findall(text)[:1])
    own = -(-job.global_batch // job.executors)
    most = fitting_batch(own, total, used + int(asked)) * job.executors
    return MachineError(
        "Out of GPU memory",
        expected=f"a global batch that fits into {total / 2**30:.1f} GiB per GPU" if total else "a batch that fits",
        actual=f"batch_size={job.global_batch} on {job.executors} executor{'s' if job.executors > 1 else ''}, "
        f"{used / 2**30:.1f} GiB in use, {asked / 2**20:.0f} MiB more asked for",
        hint=f"batch_size={most} fits, if memory grows with the batch alone; nothing else may use the GPU",
    )


def fitting_batch(images: int, total_bytes: int, needed_bytes: int) -> int:
    """Return a batch per GPU that should fit: the largest halving of ``images`` whose share of what was needed does.

    ``needed_bytes`` (in use and asked for when it failed) is a lower bound of the real need, so at least half it.
    """
    batch = max(1, images // 2)
    while batch > 1 and total_bytes and needed_bytes * batch / images > total_bytes:
        batch //= 2
    return batch


def _other_cuda(text: str) -> MachineError:
    devices = _visible()
    torch = sys.modules.get("torch")
    built = f"PyTorch is built for CUDA {torch.version.cuda}; " if torch is not None and torch.version.cuda else ""
    driver = f"driver {devices[0].driver} supports CUDA up to {devices[0].cuda}; " if devices else ""
    return MachineError(
        "The framework is built for another CUDA than this GPU and its driver can run",
        actual=f"{built}{driver}{_first_line(text)}",
        hint="Install a build for this CUDA version, or a newer driver",
    )


def _visible() -> list[nvml.Device]:
    try:
        wanted = gpu.visible_uuids()
        return [one for one in nvml.devices() if one.uuid in wanted]
    except nvml.NvmlError:
        return []


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]

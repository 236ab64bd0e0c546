"""The order of a convolution's numbers in memory: what oneDNN computes fastest in on this CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch

Tensor = Any


@functools.cache
def prefers_blocks() -> bool:
    """Return whether convolutions run faster on blocks of eight channels than channels last, as with AVX2 alone.

    A training step of cifar10_quick at batch 100 took 0.85 of the time on one core (AMD EPYC without AVX-512, PyTorch
    2.13, 12 pairs): the first layer's three channels fill no vector when they lie last. With AVX-512 it has not been
    measured. The answer depends on the CPU alone, so that two runs on one machine round alike.
    """
    return bool(torch.backends.mkldnn.is_available()) and torch.backends.cpu.get_cpu_capability() == "AVX2"


def blocked(x: Tensor) -> Tensor:
    """Return float32 images (b, c, h, w) as oneDNN's own tensor, which keeps the order each operation chooses.

    Anything else, and on a CPU that does not prefer it, comes back as it is. :func:`dense` leads back.
    """
    plain_on_cpu = x.layout is torch.strided and x.device.type == "cpu" and x.dtype == torch.float32
    if not plain_on_cpu or not x.numel() or not prefers_blocks():
        return x
    return x.to_mkldnn()


def dense(x: Tensor) -> Tensor:
    """Return ``x`` (b, c, h, w) as an ordinary tensor, channels last if it was blocked."""
    return x if x.layout is torch.strided else x.to_dense().contiguous(memory_format=torch.channels_last)

"""Whether TensorFlow's XLA compiles on this GPU, and when that is worth its seconds."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import tensorflow as tf

FROM_STEPS = 20_000
"""Steps of a training from which on a step is compiled: that takes 17 s in every round, half of it for the smaller
batch at an epoch's end, and saves 1.2 ms a step (cifar10_tutorial, one H200)."""


def works() -> bool:
    """Return whether a small convolution and its gradient can be compiled on the current device."""
    if not _assembler_found():
        return False
    try:
        _probe(tf.ones((1, 8, 8, 3)), tf.ones((3, 3, 3, 8)))
    except (tf.errors.OpError, ValueError):  # ValueError: the device is not one that XLA knows
        return False
    return True


def _probe(images: object, filters: object) -> object:
    def gradient(images: object, filters: object) -> object:
        with tf.GradientTape() as tape:
            tape.watch(filters)
            total = tf.reduce_sum(tf.exp(-tf.nn.conv2d(images, filters, 1, "SAME")))  # exp is in CUDA's libdevice
        return tape.gradient(total, filters)

    return tf.function(gradient, jit_compile=True, autograph=False)(images, filters)


def _assembler_found() -> bool:
    """Return whether XLA will find ptxas: several versions end the process where they do not.

    The one of NVIDIA's Python package joins the PATH, since not every version looks for it there.
    """
    named = re.search(r"--xla_gpu_cuda_data_dir=(\S+)", os.environ.get("XLA_FLAGS", ""))
    if shutil.which("ptxas") or (named and _is_assembler(Path(named[1]) / "bin")):
        return True
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if _is_assembler(binaries := Path(folder) / "cuda_nvcc" / "bin"):
            os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
            return True
    return False


def _is_assembler(folder: Path) -> bool:
    return os.access(folder / "ptxas", os.X_OK)

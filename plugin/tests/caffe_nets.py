"""A small Caffe project on disk, for tests: a net, a solver, databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NET = """\
name: "small"
layer {
  name: "data"
  type: "Data"
  top: "data"
  top: "label"
  transform_param { scale: 0.01 mean_value: 120 }
  data_param { source: "sparkgauge:cifar10" batch_size: 20 backend: LMDB }
}
layer {
  name: "conv"
  type: "Convolution"
  bottom: "data"
  top: "conv"
  convolution_param { num_output: 6 kernel_size: 5 stride: 3 weight_filler { type: "xavier" } }
}
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer {
  name: "ip"
  type: "InnerProduct"
  bottom: "conv"
  top: "ip"
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } }
}
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SOLVER = """\
net: "net.prototxt"
test_interval: 20
base_lr: 0.05
lr_policy: "step"
gamma: 0.5
stepsize: 8
momentum: 0.9
weight_decay: 0.001
max_iter: 40
"""


def write_project(folder: Path, *, net: str = NET, solver: str = SOLVER) -> Path:
    """Return the solver file of a new project in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.prototxt").write_text(net)
    path = folder / "small_solver.prototxt"
    path.write_text(solver)
    return path


def of_database(net: str = NET) -> str:
    """Return ``net`` with LMDBs as its sources, one per phase."""
    start, stop = net.index("layer {"), net.index('layer {\n  name: "conv"')
    data = net[start:stop].replace('"sparkgauge:cifar10"', '"{}"')
    phases = (
        data.replace("{}", f"{name}_lmdb").replace('top: "label"', f'top: "label" include {{ phase: {name.upper()} }}')
        for name in ("train", "test")
    )
    return net[:start] + "".join(phases) + net[stop:]


def write_databases(folder: Path, *, train: int = 61, test: int = 23) -> None:
    """Write ``train_lmdb`` and ``test_lmdb``: images of one channel whose brightness is their class."""
    import numpy as np

    from sparkgauge.caffe.sources import write_lmdb

    random: Any = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        noise = random.integers(0, 20, (count, 1, 12, 12))
        write_lmdb(folder / f"{name}_lmdb", (labels.reshape(-1, 1, 1, 1) * 23 + noise).astype(np.uint8), labels)

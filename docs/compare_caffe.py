"""Compares engine torch with the real Caffe on the same weights and images; prints Markdown.

    sparkgauge install-caffe --apt
    SPARKGAUGE_DATA=/path/to/cifar-10 python docs/compare_caffe.py [--iterations 200]

Every layer by itself, every blob of the shipped nets, the losses of a training, and the answers to the test set after
each engine has read what the other wrote. A difference is the largest one as a fraction of the largest value.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from sparkgauge.adapters.caffe.engine_caffe import CaffeEngine
from sparkgauge.adapters.caffe.engine_torch import TorchEngine
from sparkgauge.caffe.net import for_phase, parse_net
from sparkgauge.caffe.solver import read_solver
from sparkgauge.data import resolve
from sparkgauge.data.shards import Shard
from sparkgauge.models.caffe import path as shipped

BATCH, SHAPE = 100, (3, 32, 32)
SMALL_BATCH, SMALL_SHAPE = 10, (3, 13, 11)
SMALL = """
layer {{ name: "data" type: "Input" top: "data" top: "label" input_param {{
  shape {{ dim: 10 dim: 3 dim: 13 dim: 11 }} shape {{ dim: 10 }} }} }}
layer {{ name: "first" type: "Convolution" bottom: "data" top: "x"
  convolution_param {{ num_output: 6 kernel_size: 1 weight_filler {{ type: "gaussian" std: 0.01 }} }} }}
layer {{ name: "layer" bottom: "x" top: "y" {layer} }}
layer {{ name: "ip" type: "InnerProduct" bottom: "y" top: "ip"
  inner_product_param {{ num_output: 10 weight_filler {{ type: "xavier" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }}
"""
FILLER = 'weight_filler { type: "xavier" } bias_filler { type: "gaussian" std: 0.1 }'
LAYERS = {
    "Convolution, 5 x 5, pad 2": f'"Convolution" convolution_param {{ num_output: 8 kernel_size: 5 pad: 2 {FILLER} }}',
    "Convolution, stride 2, 3 groups": '"Convolution" convolution_param '
    f"{{ num_output: 6 kernel_size: 3 stride: 2 group: 3 {FILLER} }}",
    "Convolution, dilation 2": '"Convolution" convolution_param '
    f"{{ num_output: 8 kernel_size: 3 dilation: 2 {FILLER} }}",
    "InnerProduct": f'"InnerProduct" inner_product_param {{ num_output: 20 {FILLER} }}',
    "InnerProduct, transposed": f'"InnerProduct" inner_product_param {{ num_output: 20 transpose: true {FILLER} }}',
    "Pooling, MAX": '"Pooling" pooling_param { pool: MAX kernel_size: 3 stride: 2 }',
    "Pooling, MAX, pad 1": '"Pooling" pooling_param { pool: MAX kernel_size: 3 stride: 2 pad: 1 }',
    "Pooling, AVE": '"Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 }',
    "Pooling, AVE, pad 1": '"Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }',
    "Pooling, global": '"Pooling" pooling_param { pool: AVE global_pooling: true }',
    "LRN, across channels": '"LRN" lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 }',
    "LRN, within a channel": '"LRN" lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 norm_region: WITHIN_CHANNEL }',
    "BatchNorm": '"BatchNorm"',
    "Scale, with bias": '"Scale" scale_param { bias_term: true filler { type: "gaussian" mean: 1 std: 0.2 } }',
    "Bias": '"Bias" bias_param { filler { type: "gaussian" std: 0.2 } }',
    "ReLU": '"ReLU"',
    "ReLU, negative_slope": '"ReLU" relu_param { negative_slope: 0.1 }',
    "Sigmoid": '"Sigmoid"',
    "TanH": '"TanH"',
    "Softmax": '"Softmax"',
    "Flatten": '"Flatten"',
}
MODELS = ("cifar10_quick", "cifar10_full", "cifar10_full_sigmoid", "cifar10_full_sigmoid_bn")


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    dataset = resolve(os.environ.get("SPARKGAUGE_DATA") or None, cache_dir=Path(pooch.os_cache("sparkgauge")))
    shard = Shard.open(dataset.folder, executors=1, rank=0, global_batch=BATCH, seed=1)
    print_layers()
    print_models(shard)
    with pair("cifar10_quick", shard) as (real, ours):
        print_losses(real, ours, shard, options.iterations)
        print_answers(real, ours, shard)


def print_layers() -> None:
    """Print one row per layer: its output, the gradient of its input, and those of its weights."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SMALL_BATCH, *SMALL_SHAPE), np.uint8)
    labels = generator.integers(0, 10, SMALL_BATCH)
    print("| layer | output | gradient of the input | gradients of the weights |\n| --- | --- | --- | --- |")
    solver = read_solver(shipped("cifar10_quick")).message
    settings: dict[str, Any] = {"input_shape": SMALL_SHAPE, "batch": SMALL_BATCH, "mean": None, "seed": 1}
    for name, layer in LAYERS.items():
        net = for_phase(parse_net(SMALL.format(layer=f"type: {layer}")), "TRAIN")
        with engines(solver, net, None, settings) as (real, ours):
            theirs, own = real.blobs(images, labels), ours.blobs(images, labels)
        blobs = zip(own.parameters.get("layer", []), theirs.parameters.get("layer", []), strict=True)
        # BatchNorm's blobs are statistics, which have no gradient
        weights = [difference(a, b) for a, b in blobs if np.abs(b).max() > 0]
        cells = difference(own.data["y"], theirs.data["y"]), difference(own.diff["x"], theirs.diff["x"])
        print(f"| {name} | {cells[0]:.0e} | {cells[1]:.0e} | {f'{max(weights):.0e}' if weights else ''} |", flush=True)


def print_models(shard: Shard) -> None:
    """Print one row per shipped net: the largest differences over all its blobs."""
    print("\n| net | outputs | gradients of blobs | gradients of weights |\n| --- | --- | --- | --- |")
    for model in MODELS:
        with pair(model, shard) as (real, ours):
            theirs, own = real.blobs(*batch(shard, 0)), ours.blobs(*batch(shard, 0))
        data = max(difference(own.data[name], theirs.data[name]) for name in own.data.keys() & theirs.data.keys())
        diff = max(difference(own.diff[name], theirs.diff[name]) for name in own.diff.keys() & theirs.diff.keys())
        pairs = [zip(own.parameters[name], blobs, strict=True) for name, blobs in theirs.parameters.items()]
        weights = max(difference(a, b) for both in pairs for a, b in both if np.abs(b).max() > 0)
        print(f"| {model} | {data:.0e} | {diff:.0e} | {weights:.0e} |", flush=True)


def print_losses(real: Any, ours: Any, shard: Shard, iterations: int) -> None:
    """Print how far the losses of ``iterations`` updates are apart."""
    apart: list[float] = []
    values: list[float] = []
    for index in range(iterations):
        images, labels = batch(shard, index)
        values.append(real.step(images, labels, global_batch=BATCH))
        apart.append(abs(values[-1] - ours.step(images, labels, global_batch=BATCH)))
    print(f"\n| loss of cifar10_quick, {iterations} iterations | |\n| --- | --- |")
    for stop in (10, 50, 100, iterations):
        print(f"| largest difference up to iteration {stop} | {max(apart[:stop]):.1e} |")
    means = np.mean(values), abs(np.mean(apart))
    print(f"| mean loss, mean difference | {means[0]:.4f}, {means[1]:.1e} |", flush=True)


def print_answers(real: Any, ours: Any, shard: Shard) -> None:
    """Print the right answers of both engines on the whole test set, with either one's weights."""
    images, labels = shard.test_images.transpose(0, 3, 1, 2), shard.test_labels
    print("\n| weights written by | right by torch | right by caffe | of |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, writer, reader in (("caffe", real, ours), ("torch", ours, real)):
            writer.save_weights(Path(folder) / f"{name}.caffemodel")
            reader.load_weights(Path(folder) / f"{name}.caffemodel")
            right = ours.test(images, labels).correct, real.test(images, labels).correct
            print(f"| {name} | {right[0]:,} | {right[1]:,} | {len(labels):,} |", flush=True)
            writer.step(*batch(shard, 0), global_batch=BATCH)  # other weights for the second row


@contextmanager
def pair(model: str, shard: Shard) -> Iterator[tuple[Any, Any]]:
    """Give both engines with a shipped net and equal weights."""
    solver = read_solver(shipped(model))
    mean = np.ascontiguousarray(shard.mean_image.transpose(2, 0, 1))
    settings: dict[str, Any] = {"input_shape": SHAPE, "batch": BATCH, "mean": mean, "seed": 1}
    with engines(solver.message, solver.train_net(), solver.test_net(), settings) as both:
        yield both


@contextmanager
def engines(solver: Any, train: Any, test: Any, settings: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Give the real Caffe and engine torch with its weights."""
    real, ours = CaffeEngine(solver, train, test, **settings), TorchEngine(solver, train, test, **settings)
    try:
        ours.set_parameters(real.parameters())
        yield real, ours
    finally:
        real.close()
        ours.close()


def batch(shard: Shard, index: int) -> tuple[Any, Any]:
    """Return images (b, c, h, w) and labels of a step."""
    images, labels = shard.batch(index)
    return images.transpose(0, 3, 1, 2), labels


def difference(ours: Any, real: Any) -> float:
    """Return the largest difference as a fraction of the largest value."""
    return float(np.abs(ours - real).max() / max(np.abs(real).max(), 1e-30))


if __name__ == "__main__":
    main()

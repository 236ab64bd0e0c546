"""The suite's CIFAR-10 networks in TensorFlow. NHWC throughout; initial weights depend on the seed alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from sparkgauge.models.cifar10 import CIFAR10_QUICK, CIFAR10_TUTORIAL, Recipe

Tensor = Any
"""A ``tf.Tensor``: TensorFlow ships no types that mypy could check."""


@dataclass(frozen=True)
class Parameter:
    """One trainable array with its own rate and decay."""

    variable: Any
    rate_factor: float = 1.0
    """Multiplies the learning rate (Caffe's ``lr_mult``)."""
    decay_factor: float = 1.0
    """Multiplies the weight decay (Caffe's ``decay_mult``)."""


@dataclass(frozen=True)
class Network:
    """A network's parameters and its function from images to logits."""

    parameters: tuple[Parameter, ...]
    logits: Callable[[Tensor, list[Tensor]], Tensor]
    """``(images float32 (b, s, s, 3), weights in the order of parameters) -> (b, 10)``."""

    def weights(self) -> list[Any]:
        """Return the variables in the order that ``logits`` expects."""
        return [parameter.variable for parameter in self.parameters]


def build(recipe: Recipe, seed: int, *, on_gpu: bool = False) -> Network:
    """Return the network of ``recipe``, its weights drawn from ``seed``; KeyError for a model TensorFlow lacks."""
    tutorial = functools.partial(_cifar10_tutorial, norm=response_norm_on_gpu if on_gpu else _local_response_norm)
    builders: dict[str, Callable[[int], Network]] = {
        CIFAR10_QUICK.name: _cifar10_quick,
        CIFAR10_TUTORIAL.name: tutorial,
    }
    return builders[recipe.name](seed)


def _cifar10_quick(seed: int) -> Network:
    """Caffe's quick CIFAR-10 net: its ceil-mode pools are SAME pools here, and both average over real pixels only."""
    shapes = ((5, 5, 3, 32), (5, 5, 32, 32), (5, 5, 32, 64), (1024, 64), (64, 10))
    deviations = (1e-4, 1e-2, 1e-2, 1e-1, 1e-1)
    parameters: list[Parameter] = []
    for index, (shape, deviation) in enumerate(zip(shapes, deviations, strict=True)):
        weight = tf.random.stateless_normal(shape, seed=(seed, index), stddev=deviation)
        parameters += [Parameter(tf.Variable(weight)), Parameter(tf.Variable(tf.zeros(shape[-1])), rate_factor=2.0)]

    def logits(images: Tensor, w: list[Tensor]) -> Tensor:
        x = tf.nn.bias_add(tf.nn.conv2d(images, w[0], 1, "SAME"), w[1])  # (b, 32, 32, 32)
        x = tf.nn.relu(tf.nn.max_pool2d(x, 3, 2, "SAME"))  # (b, 16, 16, 32), pooled before the ReLU
        x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w[2], 1, "SAME"), w[3]))
        x = tf.nn.avg_pool2d(x, 3, 2, "SAME")  # (b, 8, 8, 32)
        x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w[4], 1, "SAME"), w[5]))
        x = tf.nn.avg_pool2d(x, 3, 2, "SAME")  # (b, 4, 4, 64)
        x = tf.reshape(x, (-1, 1024)) @ w[6] + w[7]
        return x @ w[8] + w[9]

    return Network(tuple(parameters), logits)


def _cifar10_tutorial(seed: int, norm: Callable[[Tensor], Tensor]) -> Network:
    """TensorFlow's tutorial net: two convolutions with local response normalisation, three dense layers."""
    shapes = ((5, 5, 3, 64), (5, 5, 64, 64), (2304, 384), (384, 192), (192, 10))
    deviations = (5e-2, 5e-2, 4e-2, 4e-2, 1 / 192)
    biases = (0.0, 0.1, 0.1, 0.1, 0.0)
    decays = (0.0, 0.0, 1.0, 1.0, 0.0)
    parameters: list[Parameter] = []
    for index, shape in enumerate(shapes):
        weight = tf.random.stateless_truncated_normal(shape, seed=(seed, index), stddev=deviations[index])
        bias = tf.fill((shape[-1],), biases[index])
        parameters += [
            Parameter(tf.Variable(weight), decay_factor=decays[index]),
            Parameter(tf.Variable(bias), decay_factor=0.0),
        ]

    def logits(images: Tensor, w: list[Tensor]) -> Tensor:
        x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(images, w[0], 1, "SAME"), w[1]))  # (b, 24, 24, 64)
        x = norm(tf.nn.max_pool2d(x, 3, 2, "SAME"))  # (b, 12, 12, 64)
        x = norm(tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w[2], 1, "SAME"), w[3])))
        x = tf.reshape(tf.nn.max_pool2d(x, 3, 2, "SAME"), (-1, 2304))  # (b, 6, 6, 64) flattened
        x = tf.nn.relu(x @ w[4] + w[5])
        x = tf.nn.relu(x @ w[6] + w[7])
        return x @ w[8] + w[9]

    return Network(tuple(parameters), logits)


def _local_response_norm(x: Tensor, radius: int = 4, bias: float = 1.0, alpha: float = 0.001 / 9) -> Tensor:
    """Return ``x / (bias + alpha * sum of squares over 2 * radius + 1 channels) ** 0.75``, as tf.nn.lrn does.

    Written as a product with a banded matrix: on one core (AVX-512, batch 128) the whole tutorial step ran at 1,700
    images/s with it against 1,380 with tf.nn.lrn, whose gradient is a scalar loop (TensorFlow 2.21, 3 runs each).
    """
    channels = x.shape[-1]
    band = _band(channels, radius)
    squares = tf.reshape(tf.reshape(tf.square(x), (-1, channels)) @ band, tf.shape(x))
    inverse_root = tf.math.rsqrt(bias + alpha * squares)
    return x * inverse_root * tf.sqrt(inverse_root)  # y ** -1/2 * y ** -1/4


def response_norm_on_gpu(x: Tensor, radius: int = 4, bias: float = 1.0, alpha: float = 0.001 / 9) -> Tensor:
    """Return what ``_local_response_norm`` does, with its gradient written out: half as many operations to launch."""
    channels = x.shape[-1]
    band = alpha * _band(channels, radius)

    def normalised(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        base = tf.square(x) @ band + bias
        factor = base**-0.75
        y = x * factor

        def gradient(of_y: Tensor) -> Tensor:
            return of_y * factor - x * ((of_y * y / base) @ (1.5 * band))  # the band is its own transpose

        return y, gradient

    return tf.reshape(tf.custom_gradient(normalised)(tf.reshape(x, (-1, channels))), tf.shape(x))


def _band(channels: int, radius: int) -> NDArray[np.float32]:
    """Return (channels, channels): 1 where two channels are at most ``radius`` apart."""
    offsets = np.arange(channels)
    band: NDArray[np.float32] = (np.abs(offsets[:, None] - offsets[None, :]) <= radius).astype(np.float32)
    return band

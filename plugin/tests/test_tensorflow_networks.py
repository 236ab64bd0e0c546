"""The networks and their update rules against formulas written out in numpy, and against TensorFlow's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from sparkgauge.adapters.tensorflow import networks, training, worker
from sparkgauge.errors import MachineError
from sparkgauge.models.cifar10 import CIFAR10_QUICK, CIFAR10_TUTORIAL, RECIPES, Recipe

BATCH = 4


@pytest.mark.parametrize(("name", "count"), [("cifar10_quick", 145_578), ("cifar10_tutorial", 1_068_298)])
def test_parameter_count(name: str, count: int) -> None:
    weights = networks.build(RECIPES[name], seed=1).weights()
    assert sum(int(np.prod(weight.shape)) for weight in weights) == count


@pytest.mark.parametrize("recipe", [CIFAR10_QUICK, CIFAR10_TUTORIAL], ids=lambda recipe: recipe.name)
def test_initial_weights_depend_on_the_seed_alone(recipe: Recipe) -> None:
    first = _values(recipe, seed=1)
    tf.random.set_seed(99)
    tf.random.normal((3,))  # another state of TensorFlow's global generator
    again, other = _values(recipe, seed=1), _values(recipe, seed=2)
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        if one.ndim > 1:
            assert not np.any(one == different)


def test_weights_of_different_layers_are_not_alike() -> None:
    (second, third) = (_values(CIFAR10_TUTORIAL, seed=1)[index].ravel()[:100] for index in (4, 6))
    assert abs(np.corrcoef(second, third)[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("recipe", "deviations", "biases"),
    [
        (CIFAR10_QUICK, (1e-4, 1e-2, 1e-2, 1e-1, 1e-1), (0, 0, 0, 0, 0)),
        (CIFAR10_TUTORIAL, (5e-2, 5e-2, 4e-2, 4e-2, 1 / 192), (0, 0.1, 0.1, 0.1, 0)),
    ],
    ids=("cifar10_quick", "cifar10_tutorial"),
)
def test_initial_distributions(recipe: Recipe, deviations: tuple[float, ...], biases: tuple[float, ...]) -> None:
    values = _values(recipe, seed=3)
    truncation = 0.8796 if recipe is CIFAR10_TUTORIAL else 1.0  # of a normal cut at two deviations
    for weight, deviation in zip(values[::2], deviations, strict=True):
        assert weight.std() == pytest.approx(deviation * truncation, rel=0.12)  # the smallest has 640 values
        assert abs(weight.mean()) < 5 * deviation / np.sqrt(weight.size)
        if recipe is CIFAR10_TUTORIAL:
            assert np.abs(weight).max() <= 2 * deviation * (1 + 1e-6)
    for array, bias in zip(values[1::2], biases, strict=True):
        np.testing.assert_allclose(array, bias)


def _values(recipe: Recipe, seed: int) -> list[np.ndarray]:
    return [weight.numpy() for weight in networks.build(recipe, seed).weights()]


@pytest.mark.parametrize("side", [8, 16, 32])  # even, as in the network: from odd sides TensorFlow starts earlier
@pytest.mark.parametrize("kind", ["max", "average"])
def test_same_pools_are_caffes_pools_in_ceil_mode(kind: str, side: int) -> None:
    images = _noise((2, side, side, 3))
    pool = {"max": tf.nn.max_pool2d, "average": tf.nn.avg_pool2d}[kind]
    np.testing.assert_allclose(pool(images, 3, 2, "SAME").numpy(), _caffe_pool(images, kind), rtol=1e-6, atol=1e-6)


def _caffe_pool(images: np.ndarray, kind: str) -> np.ndarray:
    """Return a 3/2 pool as Caffe defines it without padding: as many windows as touch the image, cut at its edge."""
    side = images.shape[1]
    windows = -(-(side - 3) // 2) + 1  # ceil
    pooled = np.empty((len(images), windows, windows, images.shape[3]))
    for row in range(windows):
        for column in range(windows):
            window = images[:, 2 * row : min(2 * row + 3, side), 2 * column : min(2 * column + 3, side)]
            count = window.shape[1] * window.shape[2]  # Caffe's count without padding: real pixels
            pooled[:, row, column] = window.max((1, 2)) if kind == "max" else window.sum((1, 2)) / count
    return pooled


@pytest.mark.parametrize("channels", [3, 9, 64])
@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("norm", [networks._local_response_norm, networks.response_norm_on_gpu])
def test_local_response_norm_is_tensorflows_in_value_and_gradient(
    norm: Callable[[Any], Any], channels: int, scale: float
) -> None:
    x, weight = tf.constant(_noise((2, 3, 3, channels)) * scale), tf.constant(_noise((2, 3, 3, channels)))

    def reference(values: Any) -> Any:
        return tf.nn.lrn(values, depth_radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)

    ours, theirs = (_with_gradient(one, x, weight) for one in (norm, reference))
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6 * scale)


def _with_gradient(function: Callable[[Any], Any], x: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
        total = tf.reduce_sum(value * weight)
    return value.numpy(), tape.gradient(total, x).numpy()


def test_quick_is_caffes_network() -> None:
    images = _noise((BATCH, 32, 32, 3)) * 60
    network = networks.build(CIFAR10_QUICK, seed=1)
    weights = [weight.numpy() + 0.01 for weight in network.weights()]  # visible biases
    np.testing.assert_allclose(
        network.logits(tf.constant(images), [tf.constant(weight) for weight in weights]).numpy(),
        _caffe_quick(images.astype(np.float64), weights),
        rtol=1e-3,
        atol=1e-3,
    )


def _caffe_quick(images: np.ndarray, w: list[np.ndarray]) -> np.ndarray:
    x = np.maximum(_caffe_pool(_convolve(images, w[0]) + w[1], "max"), 0)
    x = _caffe_pool(np.maximum(_convolve(x, w[2]) + w[3], 0), "average")
    x = _caffe_pool(np.maximum(_convolve(x, w[4]) + w[5], 0), "average")
    return (x.reshape(len(x), -1) @ w[6] + w[7]) @ w[8] + w[9]


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return the cross-correlation of x (b, s, s, i) with kernel (5, 5, i, o), padded by two zeros."""
    side = x.shape[1]
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    shifted = [(padded[:, r : r + side, c : c + side], kernel[r, c]) for r in range(5) for c in range(5)]
    return sum(part @ weight for part, weight in shifted)


def test_the_tutorial_s_logits_have_the_input_it_is_trained_on() -> None:
    network = networks.build(CIFAR10_TUTORIAL, seed=1)
    logits = network.logits(tf.constant(_noise((BATCH, 24, 24, 3))), network.weights())
    assert logits.shape == (BATCH, 10)


def test_what_decays_and_what_learns_faster() -> None:
    quick = networks.build(CIFAR10_QUICK, seed=1).parameters
    assert [parameter.rate_factor for parameter in quick] == [1, 2] * 5
    assert [parameter.decay_factor for parameter in quick] == [1] * 10
    tutorial = networks.build(CIFAR10_TUTORIAL, seed=1).parameters
    assert [parameter.rate_factor for parameter in tutorial] == [1] * 10
    decaying = [parameter.variable.shape for parameter in tutorial if parameter.decay_factor]
    assert decaying == [(2304, 384), (384, 192)]
    assert {parameter.decay_factor for parameter in tutorial} == {0.0, 1.0}


def test_momentum_is_caffes() -> None:
    network, start = _tiny_network(CIFAR10_QUICK)
    optimiser = training._Momentum(CIFAR10_QUICK, network)
    weights, histories = [value.astype(np.float64) for value in start], [0.0 * value for value in start]
    for step, rate in enumerate((0.1, 0.1, 0.01)):  # the rate changes: Caffe keeps it in the history
        gradients = [_noise(value.shape, seed=step) for value in start]
        optimiser.apply([tf.constant(gradient) for gradient in gradients], np.float32(rate))
        for index, (gradient, factor) in enumerate(zip(gradients, (1, 2), strict=True)):
            regularised = gradient + 0.004 * weights[index]
            histories[index] = 0.9 * histories[index] + rate * factor * regularised
            weights[index] -= histories[index]
        for parameter, expected in zip(network.parameters, weights, strict=True):
            np.testing.assert_allclose(parameter.variable.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_without_momentum_it_is_plain_descent_and_only_what_should_decays() -> None:
    network, start = _tiny_network(CIFAR10_TUTORIAL, decay_factors=(1.0, 0.0), rate_factors=(1.0, 1.0))
    optimiser = training._Momentum(CIFAR10_TUTORIAL, network)
    gradients = [_noise(value.shape) for value in start]
    optimiser.apply([tf.constant(gradient) for gradient in gradients], np.float32(0.1))
    decayed, plain = (parameter.variable.numpy() for parameter in network.parameters)
    np.testing.assert_allclose(decayed, start[0] - 0.1 * (gradients[0] + 0.004 * start[0]), rtol=1e-5)
    np.testing.assert_allclose(plain, start[1] - 0.1 * gradients[1], rtol=1e-5)


def _tiny_network(
    recipe: Recipe, decay_factors: tuple[float, float] = (1.0, 1.0), rate_factors: tuple[float, float] = (1.0, 2.0)
) -> tuple[networks.Network, list[np.ndarray]]:
    start = [_noise((3, 2), seed=8), _noise((2,), seed=9)]
    parameters = tuple(
        networks.Parameter(tf.Variable(value), rate_factor, decay_factor)
        for value, rate_factor, decay_factor in zip(start, rate_factors, decay_factors, strict=True)
    )
    return networks.Network(parameters, lambda images, weights: images), start


@pytest.mark.parametrize(
    ("recipe", "step", "rate"),
    [
        (CIFAR10_QUICK, 0, 1e-3),
        (CIFAR10_QUICK, 3999, 1e-3),
        (CIFAR10_QUICK, 4000, 1e-4),
        (CIFAR10_QUICK, 4999, 1e-4),
        (CIFAR10_TUTORIAL, 0, 0.1),
        (CIFAR10_TUTORIAL, 136_717, 0.1),
        (CIFAR10_TUTORIAL, 136_718, 0.01),
    ],
)
def test_learning_rate_at_its_boundaries(recipe: Recipe, step: int, rate: float) -> None:
    assert recipe.learning_rate(step) == rate


def test_averages_are_tensorflows_own() -> None:
    network, _ = _tiny_network(CIFAR10_TUTORIAL)
    averages = training._Averages(network)
    references = [tf.Variable(weight) for weight in network.weights()]
    updates = tf.Variable(0)
    reference = tf.train.ExponentialMovingAverage(0.9999, num_updates=updates)
    reference.apply(references)  # makes the averages, equal to the weights
    for index in range(3):
        for number, (weight, copy) in enumerate(zip(network.weights(), references, strict=True)):
            weight.assign_add(_noise(weight.shape, seed=10 * index + number))
            copy.assign(weight)
        averages.update(np.float32(index))
        updates.assign(index + 1)  # as the optimiser leaves it in the tutorial
        reference.apply(references)
        for shadow, copy in zip(averages.shadows, references, strict=True):
            np.testing.assert_allclose(shadow.numpy(), reference.average(copy).numpy(), rtol=1e-6)


@pytest.mark.parametrize(("index", "decay"), [(0, 2 / 11), (9, 11 / 20), (89_979, 0.9999), (10**6, 0.9999)])
def test_the_averages_decay_is_short_at_first_and_bounded(index: int, decay: float) -> None:
    network, start = _tiny_network(CIFAR10_TUTORIAL)
    averages = training._Averages(network)
    network.weights()[0].assign(start[0] + 1)
    averages.update(np.float32(index))
    np.testing.assert_allclose(averages.shadows[0].numpy() - start[0], 1 - decay, rtol=2e-3)


def _noise(shape: tuple[int, ...], seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)


def test_the_strategy_is_told_of_its_gpus_and_held_to_the_device() -> None:
    node = SimpleNamespace(cluster_spec={"chief": ["127.0.0.1:1"]}, job_name="chief", task_index=0)
    assert worker._resolver(tf, node, 2).num_accelerators() == {"GPU": 2}
    assert worker._resolver(tf, node, 0).num_accelerators() == {}
    place = "/job:chief/replica:0/task:0/device:{}:0"
    for asked, used in (("cpu", "CPU"), ("gpu", "GPU")):
        strategy = SimpleNamespace(extended=SimpleNamespace(worker_devices=(place.format(used),)))
        worker._check_placement(strategy, SimpleNamespace(device=asked))  # type: ignore[arg-type]
        other = "gpu" if asked == "cpu" else "cpu"
        with pytest.raises(MachineError, match=f"expected device='{other}', got .*{used}:0"):
            worker._check_placement(strategy, SimpleNamespace(device=other))  # type: ignore[arg-type]

"""Training recipes of the suite's CIFAR-10 models, the same for every framework.

Sources of the numbers (facts, restated):

- ``cifar10_quick``: ``examples/cifar10/cifar10_quick_{train_test,solver,solver_lr1}.prototxt`` of BVLC Caffe.
- ``cifar10_tutorial``: the "Advanced Convolutional Neural Networks" tutorial of TensorFlow 1.x
  (``tutorials/image/cifar10``), which the 2017 report calls the ImageNet example.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How one model is trained and tested; the network itself is built by each framework's adapter."""

    name: str
    global_batch: int
    """Images per step over all executors."""
    iterations: int
    """Steps of the reference training."""
    learning_rates: tuple[tuple[int, float], ...]
    """``(first step, rate)`` in ascending order."""
    momentum: float
    weight_decay: float
    test_every: int
    """Steps between tests on the whole test set in the reference training."""
    input_size: int
    """Height and width of the network's input, in pixels."""
    augment: bool
    """Random crop, flip, brightness and contrast; per-image standardisation instead of the mean image."""
    averaged: bool
    """Tested on exponential moving averages of the weights."""
    train_flops_per_image: int
    """Forward + both backward products, without the first layer's input gradient."""

    def learning_rate(self, step: int) -> float:
        """Return the rate of ``step`` (0-based)."""
        return [rate for first, rate in self.learning_rates if step >= first][-1]


CIFAR10_QUICK = Recipe(
    name="cifar10_quick",
    global_batch=100,
    iterations=5000,
    learning_rates=((0, 1e-3), (4000, 1e-4)),
    momentum=0.9,
    weight_decay=0.004,
    test_every=500,
    input_size=32,
    augment=False,
    averaged=False,
    train_flops_per_image=69_210_000,
)

CIFAR10_TUTORIAL = Recipe(
    name="cifar10_tutorial",
    global_batch=128,
    iterations=100_000,
    learning_rates=((0, 0.1), (136_718, 0.01)),
    momentum=0.0,
    weight_decay=0.004,
    test_every=1000,
    input_size=24,
    augment=True,
    averaged=True,
    train_flops_per_image=105_300_000,
)

RECIPES = {recipe.name: recipe for recipe in (CIFAR10_QUICK, CIFAR10_TUTORIAL)}

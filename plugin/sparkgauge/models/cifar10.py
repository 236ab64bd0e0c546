"""Training recipes of the suite's CIFAR-10 models, the same for every framework.

Sources of the numbers (facts, restated):

- ``cifar10_quick``: ``examples/cifar10/cifar10_quick_{train_test,solver,solver_lr1}.prototxt`` of BVLC Caffe.
- ``cifar10_tutorial``: the "Advanced Convolutional Neural Networks" tutorial of TensorFlow 1.x
  (``tutorials/image/cifar10``), which the 2017 report calls the ImageNet example. Its flag ``use_fp16`` trains in half
  precision; on a GPU, PyTorch's ``cifar10_tutorial`` computes in bfloat16.
- ``cifar10_full``: ``examples/cifar10/cifar10_full_{train_test,solver,solver_lr1,solver_lr2}.prototxt`` of BVLC Caffe.
- ``resnet20``: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition" (2015), section 4.2.
- ``speedrun``: this project's own, with ideas of Keller Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"
  (2024): whitening first layer, identity initialisation, GELU, label smoothing, Nesterov momentum, fast biases,
  triangular rate, lookahead, alternating flip, flip at test time. 15 epochs. What a CPU can be given is less of the
  same: ``options={"width": 0.5}`` halves its channels, ``batch_size=`` scales the rate, and a shorter ``iterations=``
  keeps the rate's shape.
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
    shift: int = 0
    """Pixels by which training images are shifted at most, and mirrored half of the time; 0 does neither."""
    channel_scaled: bool = False
    """Pixels minus the channel's mean, divided by its deviation, instead of minus the mean image."""
    nesterov: bool = False
    label_smoothing: float = 0.0
    peak_fraction: float = 0.0
    """Above 0: the rate rises linearly to ``learning_rates`` at this share of the training, then falls again."""
    start_fraction: float = 0.0
    """Of the peak's rate, before the first step."""
    end_fraction: float = 0.0
    """Of the peak's rate, after the last step."""
    rate_grows_with_batch: bool = False
    """The rates are for ``global_batch`` images and in proportion for others."""
    test_flip: bool = False
    """Tested on each image and its mirror image together."""
    reflected: bool = False
    """Shifted images continue as their mirror image, not in the mean colour."""
    alternating_flip: bool = False
    """Each image is mirrored in every second epoch instead of half of the time."""
    lookahead: bool = False
    """Every five steps the weights go part of the way back to a slow average of themselves."""
    bfloat16_on_gpu: bool = False
    """Convolutions and dense layers in bfloat16 on a GPU; weights, sums and the CPU stay in float32."""

    def learning_rate(self, step: int, total: int | None = None, global_batch: int | None = None) -> float:
        """Return the rate of ``step`` (0-based) of ``total`` steps with ``global_batch`` (by default the recipe's)."""
        rate = [rate for first, rate in self.learning_rates if step >= first][-1]
        if self.rate_grows_with_batch and global_batch is not None:
            rate *= global_batch / self.global_batch
        if not self.peak_fraction:
            return rate
        done = (step + 0.5) / (total or self.iterations)
        if done < self.peak_fraction:
            return rate * (self.start_fraction + (1 - self.start_fraction) * done / self.peak_fraction)
        return rate * (self.end_fraction + (1 - self.end_fraction) * (1 - done) / (1 - self.peak_fraction))


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
    bfloat16_on_gpu=True,
)

CIFAR10_FULL = Recipe(
    name="cifar10_full",
    global_batch=100,
    iterations=70_000,
    learning_rates=((0, 1e-3), (60_000, 1e-4), (65_000, 1e-5)),
    momentum=0.9,
    weight_decay=0.004,
    test_every=1000,
    input_size=32,
    augment=False,
    averaged=False,
    train_flops_per_image=68_870_000,
)

RESNET20 = Recipe(
    name="resnet20",
    global_batch=128,
    iterations=64_000,
    learning_rates=((0, 0.1), (32_000, 0.01), (48_000, 0.001)),
    momentum=0.9,
    weight_decay=1e-4,
    test_every=1000,
    input_size=32,
    augment=False,
    averaged=False,
    train_flops_per_image=242_420_000,
    shift=4,
    channel_scaled=True,
)

SPEEDRUN = Recipe(
    name="speedrun",
    global_batch=1000,
    iterations=750,
    learning_rates=((0, 1.465),),
    momentum=0.85,
    weight_decay=0.00136,
    test_every=150,
    input_size=32,
    augment=False,
    averaged=False,
    train_flops_per_image=707_780_000,
    shift=2,
    channel_scaled=True,
    nesterov=True,
    label_smoothing=0.2,
    peak_fraction=0.23,
    start_fraction=0.2,
    end_fraction=0.07,
    rate_grows_with_batch=True,
    test_flip=True,
    reflected=True,
    alternating_flip=True,
    lookahead=True,
    bfloat16_on_gpu=True,
)

RECIPES = {recipe.name: recipe for recipe in (CIFAR10_QUICK, CIFAR10_FULL, CIFAR10_TUTORIAL, RESNET20, SPEEDRUN)}

"""Trains networks on one executor: one flat buffer of gradients summed over all executors, distributed tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sparkgauge.adapters.collective import Exchange, FlatGradients
from sparkgauge.adapters.torch.checkpoint import (
    module_state,
    random_states,
    restore_module,
    restore_random_state,
    restore_tensors,
)
from sparkgauge.adapters.torch.networks import WHITENING_IMAGES, Speedrun, build
from sparkgauge.context import Context, Step
from sparkgauge.data.augment import augmentation_parameters, crop_flip, padded, shift_flip_parameters
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import RECIPES, Recipe
from sparkgauge.models.flops import achieved_gflops

TEST_BATCH = 500
"""Images per call when testing: large enough to fill a core, small enough for 1 GiB of executor memory."""

AVERAGE_DECAY = 0.9999
"""Upper bound of the moving average's decay (cifar10_tutorial)."""

Tensor = Any


def train(model: str, context: Context, shard: Shard) -> dict[str, float]:
    """Train ``model`` for the context's steps and test on the whole test set, at the end and every ``test_every``.

    Returns this executor's ``reduced_bytes`` and, where the model's work is counted, ``achieved_gflops``.
    """
    torch.manual_seed(context.seed)
    recipe = RECIPES[model]
    trainer = Trainer(recipe, context, shard)
    total = context.total_steps(shard)
    if (state := context.restore()) is not None:
        trainer.restore(state)
    for step in context.steps(shard):
        trainer.step(step, recipe.learning_rate(step.index, total))
        if context.checkpoint_due:
            context.checkpoint(trainer.state())
        if step.index + 1 < total and context.test_every and (step.index + 1) % context.test_every == 0:
            trainer.test()
    trainer.test()
    return _results(model, context, trainer.reduced_bytes)


def _results(model: str, context: Context, reduced_bytes: int) -> dict[str, float]:
    results = {"reduced_bytes": float(reduced_bytes)}
    seconds, steps = sum(context.step_seconds), len(context.step_seconds)
    if seconds > 0:
        images = context.train_images * steps / (steps + 1)  # the first step is not in step_seconds
        gflops = achieved_gflops(model, images / seconds)
        results |= {} if gflops is None else {"achieved_gflops": gflops}
    return results


class Trainer:
    """A built-in model, its optimiser state and its data on the device."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard) -> None:
        self._recipe, self._context, self._shard = recipe, context, shard
        self._device = device_of(context)
        self._exchange = Exchange(context.handle.group)
        self._inputs = _Inputs(recipe, context, shard, self._device)
        self._network = build(recipe, context.seed, self._exchange).to(self._device)
        if isinstance(self._network, Speedrun):
            self._network.prepare(self._inputs.normalised(shard.images[:WHITENING_IMAGES]))
        self._optimiser = Momentum(self._network, recipe, context.handle.group)
        self._averages = _Averages(self._optimiser.values) if recipe.averaged else None

    @property
    def reduced_bytes(self) -> int:
        """Return the payload this executor has handed to all-reduces."""
        return self._optimiser.gradients.bytes_reduced + self._exchange.bytes_reduced

    def step(self, step: Step, rate: float) -> None:
        """Run one training step on this executor's part of the global batch, which may be empty."""
        waited = self._waited()
        self._network.train()
        self._optimiser.gradients.clear()
        logits = self._network(self._inputs.training(step))
        labels = torch.from_numpy(step.labels).to(self._device, torch.int64)
        smoothing = self._recipe.label_smoothing
        loss_sum = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        loss_sum.backward()
        self._optimiser.step(rate, step.global_batch)
        if self._averages is not None:
            self._averages.update(step.index)
        self._context.record_loss(float(loss_sum.detach()))  # reading it waits for the device
        if step.index:
            self._context.move("compute", "sync", self._waited() - waited)

    def test(self) -> None:
        """Count the right answers on this executor's share of the test set."""
        with self._context.phase("evaluate"), torch.no_grad():
            self._network.eval()
            if self._averages is not None:
                self._averages.swap()
            correct = tested = 0
            for images, labels in self._shard.test_batches(TEST_BATCH):
                answers = self._logits(self._inputs.testing(images)).argmax(1).cpu().numpy()
                correct += int((answers == labels).sum())
                tested += len(labels)
            if self._averages is not None:
                self._averages.swap()
            self._context.record_test(correct, tested)

    def state(self) -> dict[str, Any]:
        """Return all that the next steps depend on; every executor must call it."""
        return {"tensors": self._tensors(), "random": random_states(self._context.handle)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; DataError where it is of another model."""
        restore_tensors(self._tensors(), state["tensors"])
        restore_random_state(self._context, state["random"])

    def _tensors(self) -> dict[str, Tensor]:
        averages = {} if self._averages is None else {"averages": self._averages.shadows}
        buffers = {f"buffer {name}": buffer for name, buffer in self._network.named_buffers()}
        return {"values": self._optimiser.values, "history": self._optimiser.history, **averages, **buffers}

    def _logits(self, inputs: Tensor) -> Tensor:
        logits = self._network(inputs)
        return logits + self._network(inputs.flip(3)) if self._recipe.test_flip else logits

    def _waited(self) -> float:
        return self._optimiser.gradients.exposed_seconds + self._exchange.seconds


class _Inputs:
    """Turns uint8 images into a network's input, as its recipe wants."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard, device: Any) -> None:
        self._recipe, self._context, self._shard, self._device = recipe, context, shard, device
        self._mean = torch.from_numpy(shard.mean_image).permute(2, 0, 1)[None].to(device)
        if recipe.channel_scaled:
            # like the mean image, of the whole training set, so the same on every executor
            channel_mean = shard.mean_image.mean((0, 1))
            self._colour = np.rint(channel_mean).astype(np.uint8)
            self._mean = torch.from_numpy(channel_mean)[None, :, None, None].to(device)
            self._scale = 1 / torch.from_numpy(_deviations(shard.images))[None, :, None, None].to(device)

    def training(self, step: Step) -> Tensor:
        """Return this executor's part of the global batch, distorted the same at any number of executors."""
        share = self._shard.sampler.share(step.index)
        if self._recipe.shift:
            shifts = shift_flip_parameters(self._context.seed, step.index, step.global_batch, self._recipe.shift)
            own, framed = shifts.part(share), padded(step.images, self._recipe.shift, self._colour)
            return self.normalised(crop_flip(framed, size=32, offsets=own.offsets, flips=own.flips))
        if not self._recipe.augment:
            return self.normalised(step.images)
        size = self._recipe.input_size
        own = augmentation_parameters(self._context.seed, step.index, step.global_batch, size).part(share)
        images = self._pixels(crop_flip(step.images, size=size, offsets=own.offsets, flips=own.flips))
        brightness, contrast = (
            torch.from_numpy(values).to(self._device)[:, None, None, None] for values in (own.brightness, own.contrast)
        )
        images = images + brightness
        channel_mean = images.mean((2, 3), keepdim=True)
        return standardised((images - channel_mean) * contrast + channel_mean)

    def testing(self, images: NDArray[np.uint8]) -> Tensor:
        """Return test images, cropped to their centre where the network is smaller."""
        edge = (images.shape[1] - self._recipe.input_size) // 2
        centre = images[:, edge : images.shape[1] - edge, edge : images.shape[2] - edge]
        return standardised(self._pixels(centre)) if self._recipe.augment else self.normalised(centre)

    def normalised(self, images: NDArray[np.uint8]) -> Tensor:
        """Return ``images`` minus the mean, scaled per channel where the recipe says so."""
        pixels = self._pixels(images).sub_(self._mean)
        return pixels.mul_(self._scale) if self._recipe.channel_scaled else pixels

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        # a copy: torch refuses read-only arrays without a warning, and it is a sixtieth of a step
        owned = torch.from_numpy(np.array(images, order="C"))
        return owned.to(self._device).permute(0, 3, 1, 2).float()  # channels last in memory


class Momentum:
    """SGD as Caffe does it, on flat arrays: the rate goes into the history, decay counts as gradient."""

    def __init__(self, network: nn.Module, recipe: Recipe, group: Any) -> None:
        """Move the network's parameters into one buffer, of which they become views."""
        parameters = list(network.parameters())
        self.values = _flatten(parameters)
        self.gradients = FlatGradients(parameters, group)
        self._momentum, self._nesterov = recipe.momentum, recipe.nesterov
        self._rates = _spread(parameters, "rate_factor")
        self._decays = recipe.weight_decay * _spread(parameters, "decay_factor")
        self.history = torch.zeros_like(self.values)

    @torch.no_grad()
    def step(self, rate: float, global_batch: int) -> None:
        """Sum the gradients over all executors and update every parameter by their mean."""
        self.gradients.reduce()
        change = torch.addcmul(self.gradients.flat / global_batch, self._decays, self.values)
        change.mul_(self._rates).mul_(rate)
        self.history.mul_(self._momentum).add_(change)
        if self._nesterov:
            self.values.sub_(change).sub_(self.history, alpha=self._momentum)
        else:
            self.values.sub_(self.history)


class _Averages:
    """Exponential moving averages of the weights, as tf.train.ExponentialMovingAverage with num_updates."""

    def __init__(self, values: Tensor) -> None:
        self._values, self.shadows = values, values.clone()

    def update(self, index: int) -> None:
        """Move every average towards its weight after step ``index`` (0-based)."""
        updates = index + 1.0
        self.shadows.lerp_(self._values, 1 - min(AVERAGE_DECAY, (1 + updates) / (10 + updates)))

    def swap(self) -> None:
        """Exchange weights and averages, in place: before a test, and again after it."""
        weights = self._values.clone()
        self._values.copy_(self.shadows)
        self.shadows.copy_(weights)


def device_of(context: Context) -> Any:
    """Return the torch device of this executor."""
    return torch.device("cuda", 0) if context.device == "gpu" else torch.device("cpu")


def standardised(images: Tensor) -> Tensor:
    """Return each image with mean 0 and deviation 1, as tf.image.per_image_standardization does."""
    count = images[0].numel() if len(images) else 1
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), keepdim=True, unbiased=False).clamp_min(count**-0.5)
    return (images - mean) / deviation


def _deviations(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the deviation of each channel over every tenth image: 150 MB need not be read to know three numbers."""
    sample = images[:: max(1, len(images) // 5000)].reshape(-1, images.shape[3])
    return sample.std(0, dtype=np.float64).astype(np.float32)


def _flatten(parameters: list[Any]) -> Tensor:
    flat = torch.empty(sum(p.numel() for p in parameters), device=parameters[0].device)
    start = 0
    for parameter in parameters:
        view = flat.as_strided(parameter.shape, parameter.stride(), start)
        view.copy_(parameter.data)
        parameter.data = view
        start += parameter.numel()
    return flat


def _spread(parameters: list[Any], factor: str) -> Tensor:
    parts = [torch.full((p.numel(),), float(getattr(p, factor, 1.0)), device=p.device) for p in parameters]
    return torch.cat(parts)


Factory = Callable[[], nn.Module]


def train_module(make: Factory, options: dict[str, float], context: Context, shard: Shard) -> dict[str, float]:
    """Train the module that ``make`` returns by SGD with momentum on standardised images; return what it did."""
    torch.manual_seed(context.seed)  # the same initial weights on every executor
    device = device_of(context)
    network = make().to(device, memory_format=torch.channels_last)
    trainable = [p for p in network.parameters() if p.requires_grad]
    gradients = FlatGradients(trainable, context.handle.group)
    sgd = torch.optim.SGD(trainable, lr=options["learning_rate"], momentum=options["momentum"])
    restore_module(context, network, sgd)
    for step in context.steps(shard):
        before = gradients.exposed_seconds
        gradients.clear()
        network.train()
        labels = torch.from_numpy(step.labels).to(device, torch.int64)
        loss_sum = functional.cross_entropy(network(_scaled(step.images, device)), labels, reduction="sum")
        loss_sum.backward()
        gradients.reduce()
        gradients.flat.div_(step.global_batch)
        sgd.step()
        context.record_loss(float(loss_sum.detach()))
        if step.index:
            context.move("compute", "sync", gradients.exposed_seconds - before)
        if context.checkpoint_due:
            context.checkpoint(module_state(context, network, sgd))
    with context.phase("evaluate"), torch.no_grad():
        network.eval()
        for images, truth in shard.test_batches(TEST_BATCH):
            answers = network(_scaled(images, device)).argmax(1).cpu().numpy()
            context.record_test(int((answers == truth).sum()), len(truth))
    return {"reduced_bytes": float(gradients.bytes_reduced)}


def _scaled(images: NDArray[np.uint8], device: Any) -> Tensor:
    """Return images (b, 3, h, w), channels last in memory, from -1 to 1."""
    pixels = torch.from_numpy(np.array(images, order="C")).to(device).permute(0, 3, 1, 2).float()
    return pixels.div_(127.5).sub_(1)

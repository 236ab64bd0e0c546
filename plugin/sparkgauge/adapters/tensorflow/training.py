"""Trains a built-in model on one executor: a compiled step, gradients summed over all executors, distributed tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from sparkgauge.adapters.tensorflow.networks import Network, build
from sparkgauge.context import Context, Step
from sparkgauge.data.augment import augmentation_parameters, crop_flip
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import RECIPES, Recipe

TEST_BATCH = 500
"""Images per call when testing: large enough to fill a core, small enough for 1 GiB of executor memory."""

AVERAGE_DECAY = 0.9999
"""Upper bound of the moving average's decay (cifar10_tutorial)."""


def train(model: str, context: Context, shard: Shard) -> None:
    """Train ``model`` for the context's steps and test on the whole test set, at the end and every ``test_every``."""
    recipe = RECIPES[model]
    trainer = _trainer(recipe, context, shard)
    total = context.total_steps(shard)
    for step in context.steps(trainer.feed):
        trainer.step(step)
        if step.index + 1 < total and context.test_every and (step.index + 1) % context.test_every == 0:
            trainer.test()
    trainer.test()
    context.record_weights(lambda: {f"weight {index}": one.numpy() for index, one in enumerate(trainer.weights())})


def _trainer(recipe: Recipe, context: Context, shard: Shard) -> Any:
    if context.device == "cpu":
        return _Trainer(recipe, context, shard)
    from sparkgauge.adapters.tensorflow.resident import ResidentTrainer

    return ResidentTrainer(recipe, context, shard, AVERAGE_DECAY)


class _Trainer:
    """The model, its optimiser state and its compiled functions on a CPU; images are prepared by numpy."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard) -> None:
        self.feed = shard
        """What the steps take their batches from."""
        self._recipe, self._context, self._shard = recipe, context, shard
        self._network = build(recipe, context.seed)
        self._optimiser = _Momentum(recipe, self._network)
        self._averages = _Averages(self._network) if recipe.averaged else None
        self._mean = tf.constant(shard.mean_image)
        self._step = tf.function(self._distributed_step, input_signature=self._signature())
        size = recipe.input_size
        self._count = tf.function(
            self._count_correct,
            input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8), tf.TensorSpec((None,), tf.uint8)],
        )

    def step(self, step: Step) -> None:
        """Run one training step on this executor's part of the global batch."""
        images, labels, jitter, weight = self._inputs(step)
        rate = np.float32(self._recipe.learning_rate(step.index))
        batch = np.float32(step.global_batch)
        loss_sum, sync_seconds = self._step(images, labels, jitter, weight, batch, rate, np.float32(step.index))
        self._context.record_loss(float(loss_sum))
        if step.index:
            self._context.move("compute", "sync", float(sync_seconds))

    def test(self) -> None:
        """Count the right answers on this executor's share of the test set."""
        with self._context.phase("evaluate"):
            correct = tested = 0
            for images, labels in self._shard.test_batches(TEST_BATCH):
                correct += int(self._count(_centre(images, self._recipe.input_size), labels))
                tested += len(labels)
            self._context.record_test(correct, tested)

    def weights(self) -> list[Any]:
        """Return the weights, which are the same on every executor."""
        return self._network.weights()

    def _signature(self) -> list[Any]:
        size = self._recipe.input_size
        scalar = tf.TensorSpec((), tf.float32)
        return [
            tf.TensorSpec((None, size, size, 3), tf.uint8),
            tf.TensorSpec((None,), tf.uint8),
            tf.TensorSpec((None, 2), tf.float32),  # brightness delta, contrast factor
            scalar,  # weight of these images in the loss
            scalar,  # images of the global batch
            scalar,  # learning rate
            scalar,  # index of the step
        ]

    def _inputs(self, step: Step) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32], np.float32]:
        """Return images, labels, jitter and weight: one black image of weight 0 where this executor has none.

        That happens in a last batch smaller than the number of executors: the peers wait in the all-reduce, and
        oneDNN's fused convolution refuses an empty batch.
        """
        images, jitter = self._augmented(step)
        if len(images):
            return images, step.labels, jitter, np.float32(1)
        return (
            np.zeros((1, *images.shape[1:]), np.uint8),
            np.zeros(1, np.uint8),
            np.zeros((1, 2), np.float32),
            np.float32(0),
        )

    def _augmented(self, step: Step) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return the network's input images and their brightness and contrast, the same at any executor count."""
        if not self._recipe.augment:
            return step.images, np.zeros((len(step.labels), 2), np.float32)
        size = self._recipe.input_size
        whole = augmentation_parameters(self._context.seed, step.index, step.global_batch, size)
        own = whole.part(self._shard.sampler.share(step.index))
        images = crop_flip(step.images, size=size, offsets=own.offsets, flips=own.flips)
        return images, np.stack([own.brightness, own.contrast], axis=1)

    def _distributed_step(self, *inputs: Any) -> Any:
        return self._context.handle.run(self._replica_step, inputs)

    def _replica_step(
        self, images: Any, labels: Any, jitter: Any, weight: Any, batch: Any, rate: Any, index: Any
    ) -> Any:
        weights = self._network.weights()
        with tf.GradientTape() as tape:
            logits = self._network.logits(self._input(images, jitter), weights)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(labels, tf.int32), logits)
            loss_sum = weight * tf.reduce_sum(losses)
        gradients = tape.gradient(loss_sum, weights)
        with tf.control_dependencies(gradients):
            computed_at = tf.timestamp()
        if self._context.executors > 1:
            with tf.control_dependencies([computed_at]):
                gradients = [tf.identity(gradient) for gradient in gradients]
            gradients = _all_reduce(gradients)
        with tf.control_dependencies(gradients):
            reduced_at = tf.timestamp()
        self._optimiser.apply([gradient / batch for gradient in gradients], rate)
        if self._averages is not None:
            self._averages.update(index)
        return loss_sum, reduced_at - computed_at

    def _input(self, images: Any, jitter: Any) -> Any:
        pixels = tf.cast(images, tf.float32)
        if not self._recipe.augment:
            return pixels - self._mean
        brightness, contrast = jitter[:, 0, None, None, None], jitter[:, 1, None, None, None]
        pixels += brightness
        channel_mean = tf.reduce_mean(pixels, axis=(1, 2), keepdims=True)
        return tf.image.per_image_standardization((pixels - channel_mean) * contrast + channel_mean)

    def _count_correct(self, images: Any, labels: Any) -> Any:
        weights = self._network.weights() if self._averages is None else self._averages.shadows
        pixels = tf.cast(images, tf.float32)
        inputs = tf.image.per_image_standardization(pixels) if self._recipe.augment else pixels - self._mean
        answers = tf.argmax(self._network.logits(inputs, weights), axis=1, output_type=tf.int32)
        return tf.math.count_nonzero(answers == tf.cast(labels, tf.int32))


class _Momentum:
    """SGD as Caffe does it: the rate goes into the history, decay counts as gradient."""

    def __init__(self, recipe: Recipe, network: Network) -> None:
        self._recipe, self._parameters = recipe, network.parameters
        self._history = [tf.Variable(tf.zeros_like(p.variable)) for p in self._parameters] if recipe.momentum else []

    def apply(self, gradients: list[Any], rate: Any) -> None:
        """Update every parameter by its mean gradient."""
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if decay := self._recipe.weight_decay * parameter.decay_factor:
                gradient += decay * parameter.variable
            change = rate * parameter.rate_factor * gradient
            if self._history:
                change = self._history[index].assign(self._recipe.momentum * self._history[index] + change)
            parameter.variable.assign_sub(change)


class _Averages:
    """Exponential moving averages of the weights, as tf.train.ExponentialMovingAverage with num_updates."""

    def __init__(self, network: Network) -> None:
        self._weights = network.weights()
        self.shadows = [tf.Variable(tf.identity(weight)) for weight in self._weights]

    def update(self, index: Any) -> None:
        """Move every average towards its weight after step ``index`` (0-based)."""
        updates = index + 1.0
        decay = tf.minimum(AVERAGE_DECAY, (1.0 + updates) / (10.0 + updates))
        for shadow, weight in zip(self.shadows, self._weights, strict=True):
            shadow.assign_sub((1.0 - decay) * (shadow - weight))


def _all_reduce(gradients: list[Any]) -> list[Any]:
    """Return the gradients summed over all executors, in one packed collective."""
    flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(total, [int(np.prod(gradient.shape)) for gradient in gradients])
    return [tf.reshape(part, gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]


def _centre(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    edge = (images.shape[1] - size) // 2
    return images[:, edge : edge + size, edge : edge + size]

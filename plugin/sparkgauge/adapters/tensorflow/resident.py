"""Trains a built-in model on a GPU from images that lie there: the host launches, and reads losses now and then."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from sparkgauge.adapters.tensorflow import xla
from sparkgauge.adapters.tensorflow.inputs import BATCH, INDEX, RATE, WEIGHT, ResidentInputs
from sparkgauge.adapters.tensorflow.networks import Network, build
from sparkgauge.context import CURVE_STEPS, Context, Step
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import Recipe

Tensor = Any


class ResidentTrainer:
    """The model, its optimiser state and its data on the device, and the compiled step."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard, average_decay: float) -> None:
        """``average_decay`` bounds the moving average's decay."""
        self._context = context
        self._device = context.handle.extended.worker_devices[0]
        self._total = context.total_steps(shard)
        with tf.device(self._device):
            self._inputs = ResidentInputs(recipe, context, shard)
            self._network = build(recipe, context.seed, on_gpu=True)
            self._weights = _FlatWeights(self._network, recipe)
            self._averages = _FlatAverages(self._weights.values, average_decay) if recipe.averaged else None
            self._loss_sum = tf.Variable(0.0, trainable=False)
        self._images = 0
        self._waits: list[Tensor] = []
        self._tests: list[tuple[Tensor, Tensor]] = []
        compiled = self._maybe_compiled()
        self._gradient, self._update = compiled(self._gradient_of), compiled(self._updated)
        self._step = tf.function(self._on_device, input_signature=ResidentInputs.signature, autograph=False)
        size = recipe.input_size
        self._count = tf.function(
            self._count_correct,
            input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8), tf.TensorSpec((None,), tf.uint8)],
            autograph=False,
        )

    @property
    def feed(self) -> Shard:
        """Return what the steps take their batches from: the numbers of the images on the device."""
        return self._inputs.feed

    def step(self, step: Step) -> None:
        """Launch one training step on this executor's part of the global batch."""
        with tf.device(self._device):
            waited = self._step(*self._inputs.arguments(step))
        if waited is not None:
            self._waits.append(waited[0])
        self._images += len(step.labels)
        done = step.index + 1
        if done % CURVE_STEPS == 0 or done in (1, self._total):  # the first one too: the warm-up ends with it
            self._report(moving=step.index > 0)

    def test(self) -> None:
        """Count the right answers on this executor's share of the test set."""
        if self._images:
            self._report(moving=True)
        with self._context.phase("evaluate"), tf.device(self._device):
            self._tests = self._tests or self._inputs.testing()
            counts = [self._count(images, labels) for images, labels in self._tests]
            correct = int(tf.add_n(counts)) if counts else 0
            self._context.record_test(correct, sum(len(labels) for _, labels in self._tests))

    def weights(self) -> list[Tensor]:
        """Return the weights, which are the same on every executor."""
        return self._weights.parts(self._weights.values)

    def _report(self, *, moving: bool) -> None:
        """Tell the context the losses and the waiting since the last report, waiting for the device."""
        loss_sum, images, waits = float(self._loss_sum), self._images, self._waits
        self._loss_sum.assign(0.0)
        self._images, self._waits = 0, []
        self._context.record_loss(loss_sum, images)
        if moving:
            self._context.move("compute", "sync", sum(float(wait) for wait in waits))

    def _maybe_compiled(self) -> Callable[[Any], Any]:
        """Return what makes a part of the step faster where that pays off."""
        if self._total < xla.FROM_STEPS:
            return lambda function: function
        with tf.device(self._device):
            if not xla.works():
                return lambda function: function
        return lambda function: tf.function(function, jit_compile=True, autograph=False)

    def _on_device(self, images: Tensor, scalars: Tensor) -> Any:
        if self._context.executors > 1:
            return self._context.handle.run(self._shared_step, (images, scalars))
        with tf.device(self._device):
            self._update(self._gradient(images, scalars), scalars)
        return None

    def _shared_step(self, images: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
        """Run a step of all executors; return how long the sum was waited for, in seconds, and a by-product."""
        gradient = self._gradient(images, scalars)
        with tf.device("CPU:0"):  # a copy is done when the GPU has come to it, an operation once it is launched
            known = tf.identity(gradient[:1])
        with tf.control_dependencies([known]):
            computed_at = tf.timestamp()
        with tf.control_dependencies([computed_at]):
            gradient = tf.identity(gradient)
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradient)
        with tf.control_dependencies([total]):
            reduced_at = tf.timestamp()
        self._update(total, scalars)
        return reduced_at - computed_at, known  # an output: what is none may be left out

    def _gradient_of(self, images: Tensor, scalars: Tensor) -> Tensor:
        """Return the gradient of these images' part of the mean loss (N,); add their loss to the sum."""
        inputs, labels = self._inputs.batch(images)
        weights = self._weights.parts(self._weights.values)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            logits = self._network.logits(inputs, weights)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss_sum = scalars[WEIGHT, 0] * tf.reduce_sum(losses)
            part = loss_sum / scalars[BATCH, 0]
        self._loss_sum.assign_add(loss_sum)
        return tf.concat([tf.reshape(one, [-1]) for one in tape.gradient(part, weights)], 0)

    def _updated(self, gradient: Tensor, scalars: Tensor) -> None:
        self._weights.descend(gradient, scalars[RATE, 0])
        if self._averages is not None:
            self._averages.update(scalars[INDEX, 0])

    def _count_correct(self, images: Tensor, labels: Tensor) -> Tensor:
        values = self._weights.values if self._averages is None else self._averages.shadows
        logits = self._network.logits(self._inputs.tested(images), self._weights.parts(values))
        answers = tf.argmax(logits, axis=1, output_type=tf.int64)
        return tf.math.count_nonzero(answers == tf.cast(labels, tf.int64))


class _FlatWeights:
    """All weights in one variable, updated as Caffe does it: the rate goes into the history, decay counts as gradient.

    One update of all costs as many launches as one of each of ten.
    """

    def __init__(self, network: Network, recipe: Recipe) -> None:
        parameters = network.parameters
        self._shapes = [tuple(parameter.variable.shape) for parameter in parameters]
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        self._edges = [0, *itertools.accumulate(sizes)]
        self.values = tf.Variable(tf.concat([tf.reshape(weight, [-1]) for weight in network.weights()], 0))
        self._rates = _spread([parameter.rate_factor for parameter in parameters], sizes)
        self._decays = _spread([recipe.weight_decay * parameter.decay_factor for parameter in parameters], sizes)
        self._momentum = recipe.momentum
        self._history = tf.Variable(tf.zeros_like(self.values), trainable=False) if recipe.momentum else None

    def parts(self, values: Any) -> list[Tensor]:
        """Return ``values`` (N,) as the network's weights; slices that share its memory."""
        flat = tf.convert_to_tensor(values)
        edges = itertools.pairwise(self._edges)
        return [tf.reshape(flat[a:b], shape) for (a, b), shape in zip(edges, self._shapes, strict=True)]

    def descend(self, gradient: Tensor, rate: Tensor) -> None:
        """Update all weights by the gradient (N,) of the mean loss."""
        change = gradient + self._decays * self.values
        if self._rates is not None:
            change *= self._rates
        if self._history is None:
            tf.raw_ops.ResourceApplyGradientDescent(var=self.values.handle, alpha=rate, delta=change)
        else:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=self.values.handle, accum=self._history.handle, lr=rate, grad=change, momentum=self._momentum
            )


class _FlatAverages:
    """Exponential moving averages of the weights, as tf.train.ExponentialMovingAverage with num_updates."""

    def __init__(self, values: Any, bound: float) -> None:
        self._values, self._bound = values, bound
        self.shadows = tf.Variable(tf.identity(values), trainable=False)

    def update(self, index: Tensor) -> None:
        """Move every average towards its weight after step ``index`` (0-based)."""
        updates = index + 1.0
        decay = tf.minimum(self._bound, (1.0 + updates) / (10.0 + updates))
        tf.raw_ops.ResourceApplyGradientDescent(
            var=self.shadows.handle, alpha=1.0 - decay, delta=self.shadows - self._values
        )


def _spread(factors: list[float], sizes: list[int]) -> Tensor:
    """Return each factor for each number of its parameter (N,), or one number where all are alike; None for ones."""
    if set(factors) == {1.0}:
        return None
    if len(set(factors)) == 1:
        return tf.constant(factors[0], tf.float32)
    return tf.constant(np.repeat(np.asarray(factors, np.float32), sizes))

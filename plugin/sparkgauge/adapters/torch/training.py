"""Trains networks on one executor: one flat buffer of gradients summed over all executors, distributed tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sparkgauge.adapters.collective import Exchange, FlatGradients, Team
from sparkgauge.adapters.memory import keep_freed_memory
from sparkgauge.adapters.replay import Replayed
from sparkgauge.adapters.torch.checkpoint import (
    module_state,
    random_states,
    restore_module,
    restore_random_state,
    restore_tensors,
)
from sparkgauge.adapters.torch.inputs import inputs_of
from sparkgauge.adapters.torch.networks import WHITENING_IMAGES, Speedrun, build
from sparkgauge.context import CURVE_STEPS, Context, Step
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import RECIPES, Recipe
from sparkgauge.models.flops import achieved_gflops, width_of

TEST_BATCH = {"cpu": 500, "gpu": 2000}
"""Images per call when testing: large enough to fill the device, small enough for 1 GiB of executor memory."""

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
    try:
        if (state := context.restore()) is not None:
            trainer.restore(state)
        for step in context.steps(trainer.feed):
            trainer.step(step, recipe.learning_rate(step.index, total, context.global_batch))
            if context.checkpoint_due:
                context.checkpoint(trainer.state())
            if step.index + 1 < total and context.test_every and (step.index + 1) % context.test_every == 0:
                trainer.test()
        trainer.test()
        context.record_weights(trainer.weights)
        return _results(model, context, trainer.reduced_bytes)
    finally:
        trainer.close()


def _results(model: str, context: Context, reduced_bytes: int) -> dict[str, float]:
    results = {"reduced_bytes": float(reduced_bytes)}
    seconds, steps = sum(context.step_seconds), len(context.step_seconds)
    if seconds > 0:
        images = context.train_images * steps / (steps + 1)  # the first step is not in step_seconds
        gflops = achieved_gflops(model, images / seconds, context.options)
        results |= {} if gflops is None else {"achieved_gflops": gflops}
    return results


class Trainer:
    """A built-in model, its optimiser state and its data on the device."""

    def __init__(self, recipe: Recipe, context: Context, shard: Shard) -> None:
        self._recipe, self._context, self._shard = recipe, context, shard
        self._device = device_of(context)
        self._on_gpu = context.device == "gpu"
        _set_up(self._on_gpu)
        self._exchange = Exchange(context.handle.team, on_gpu=self._on_gpu)
        self._inputs = inputs_of(recipe, context, shard, self._device)
        self._network = build(recipe, context.seed, self._exchange, width_of(context.options)).to(self._device)
        if isinstance(self._network, Speedrun):
            self._network.prepare(self._inputs.normalised(shard.images[:WHITENING_IMAGES]))
            # an eigenvector's sign is its solver's choice, and two executors' solvers need not agree
            context.handle.team.copy_first_(self._network.whitening)
        self._optimiser = Momentum(self._network, recipe, context.handle.team)
        self._exchange.added = self._optimiser.gradients.added
        self._averages = _Averages(self._optimiser.values) if recipe.averaged else None
        self._lookahead = _Lookahead(self._state()) if recipe.lookahead else None
        self._total = context.total_steps(shard)
        self._kept: tuple[Any, int] = (0.0, 0)
        self._known: tuple[Any, Any] = (None, None)
        self._moved_seconds = 0.0
        self._replayed = Replayed(self._updated, self._state) if self._on_gpu else None
        self._reported_calls = 0

    @property
    def feed(self) -> Shard:
        """Return what the steps take their batches from: the shard, or row numbers of what is on the GPU."""
        return self._inputs.feed

    @property
    def reduced_bytes(self) -> int:
        """Return the payload this executor has handed to all-reduces; every step hands over as much."""
        counted = self._optimiser.gradients.bytes_reduced + self._exchange.bytes_reduced
        replayed = self._replayed
        return counted if replayed is None else counted * replayed.calls // max(1, replayed.passes)

    def step(self, step: Step, rate: float) -> None:
        """Run one training step on this executor's part of the global batch, which may be empty."""
        if not self._network.training:
            self._network.train()
        self._exchange.shares = self._shard.sampler.shares(step.index)
        arguments = self._inputs.arguments(step)
        scalars = self._scalars(rate, step.global_batch)
        if self._replayed is None:
            loss_sum = self._updated(scalars, *arguments)
        else:  # all executors see the same global batches, so that they capture their collectives together
            loss_sum = self._replayed(scalars, *arguments, key=step.global_batch)
        if self._averages is not None:
            self._averages.update(step.index)
        if self._lookahead is not None:
            self._lookahead.update(step.index + 1, self._total)
        self._kept = (self._kept[0] + loss_sum, self._kept[1] + len(step.labels))
        done = step.index + 1
        if not self._on_gpu or done % CURVE_STEPS == 0 or done == self._total:
            self._report(moving=step.index > 0)

    def _scalars(self, rate: float, global_batch: int) -> Any:
        """Return both as the optimiser takes them: on a GPU from its memory, sent where they are new."""
        if self._known[0] != (rate, global_batch):
            values = torch.tensor([rate, global_batch])
            sent = values.pin_memory().to(self._device, non_blocking=True) if self._on_gpu else values.tolist()
            self._known = (rate, global_batch), sent
        return self._known[1]

    def _updated(self, scalars: Any, *arguments: Tensor) -> Tensor:
        """Update the weights by one step; return this executor's loss, which a GPU may still be computing."""
        self._optimiser.gradients.clear()
        inputs, labels = self._inputs.batch(*arguments)
        with self._precision():
            logits = self._network(inputs)
        smoothing = self._recipe.label_smoothing
        loss_sum = functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        loss_sum.backward()
        self._exchange.work_off()
        self._optimiser.step(scalars[0], scalars[1])
        return loss_sum.detach()

    def _report(self, *, moving: bool) -> None:
        """Tell the context the losses and the waiting since the last report, waiting for the device."""
        loss_sum, images = self._kept
        self._kept = (0.0, 0)
        self._context.record_loss(float(loss_sum), images)
        waited = self._waited()
        if moving:
            self._context.move("compute", "sync", waited - self._moved_seconds)
        self._moved_seconds = waited

    def _precision(self) -> Any:
        if not (self._on_gpu and self._recipe.bfloat16_on_gpu):
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)  # a graph must not keep casts of old weights

    def _state(self) -> list[Tensor]:
        """Return what a step changes: weights, momentum, and running statistics."""
        buffers = [one for one in self._network.buffers() if one.is_floating_point()]
        return [self._optimiser.values, self._optimiser.history, *buffers]

    def test(self) -> None:
        """Count the right answers on this executor's share of the test set."""
        if self._kept[1]:
            self._report(moving=True)
        with self._context.phase("evaluate"), torch.no_grad(), self._precision():
            self._network.eval()
            if self._averages is not None:
                self._averages.swap()
            correct = tested = 0
            for images, labels in self._shard.test_batches(TEST_BATCH[self._context.device]):
                answers = self._logits(self._inputs.testing(images)).argmax(1).cpu().numpy()
                correct += int((answers == labels).sum())
                tested += len(labels)
            if self._averages is not None:
                self._averages.swap()
            self._context.record_test(correct, tested)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Return weights and running statistics by name, which are the same on every executor."""
        return _arrays(self._network.state_dict().items())

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
        slow = {} if self._lookahead is None else {f"slow {i}": one for i, one in enumerate(self._lookahead.slow)}
        return {"values": self._optimiser.values, "history": self._optimiser.history, **averages, **slow, **buffers}

    def _logits(self, inputs: Tensor) -> Tensor:
        logits = self._network(inputs)
        return logits + self._network(inputs.flip(3)) if self._recipe.test_flip else logits

    def _waited(self) -> float:
        """Return how long collectives were waited for so far, in seconds.

        Of captured steps the latest one stands for all since the last call.
        """
        collectives = self._optimiser.gradients, self._exchange
        replayed = self._replayed
        if replayed is None:
            return collectives[0].exposed_seconds + collectives[1].seconds
        steps, self._reported_calls = replayed.calls - self._reported_calls, replayed.calls
        each = sum(one.captured_seconds for one in collectives) / max(1, replayed.graphs)
        return self._moved_seconds + each * steps

    def close(self) -> None:
        """Free what is captured."""
        if self._replayed is not None:
            self._replayed.close()


class Momentum:
    """SGD as Caffe does it, on flat arrays: the rate goes into the history, decay counts as gradient."""

    def __init__(self, network: nn.Module, recipe: Recipe, team: Team) -> None:
        """Move the network's parameters into one buffer, of which they become views."""
        parameters = list(network.parameters())
        self.values = _flatten(parameters)
        self.gradients = FlatGradients(parameters, team)
        self._momentum, self._nesterov = recipe.momentum, recipe.nesterov
        self._rates = _spread(parameters, "rate_factor")
        self._decays = recipe.weight_decay * _spread(parameters, "decay_factor")
        self.history = torch.zeros_like(self.values)
        self._known: tuple[Any, Any] = (None, None)

    @torch.no_grad()
    def step(self, rate: Any, global_batch: Any) -> None:
        """Sum the gradients over all executors and update every parameter by their mean.

        ``rate`` and ``global_batch`` are numbers, or on a GPU tensors that a captured graph reads anew each time.
        """
        self.gradients.reduce()
        of_gradient, of_value = self._factors(rate, global_batch)
        if self._nesterov:
            change = (self.gradients.flat * of_gradient).addcmul_(self.values, of_value)
            self.history.mul_(self._momentum).add_(change)
            self.values.sub_(change).sub_(self.history, alpha=self._momentum)
        else:
            self.history.mul_(self._momentum).addcmul_(self.gradients.flat, of_gradient)
            self.history.addcmul_(self.values, of_value)
            self.values.sub_(self.history)

    def _factors(self, rate: Any, global_batch: Any) -> tuple[Tensor, Tensor]:
        """Return what multiplies each summed gradient and each value; rates change seldom in most recipes."""
        if isinstance(rate, torch.Tensor):
            rates = self._rates * rate
            return rates / global_batch, rates * self._decays
        if self._known[0] != (rate, global_batch):
            rates = self._rates * rate
            self._known = (rate, global_batch), (rates / global_batch, rates * self._decays)
        factors: tuple[Tensor, Tensor] = self._known[1]
        return factors


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


class _Lookahead:
    """Slow weights that the fast ones go back to, ever closer towards the end (Zhang et al. 2019, Jordan 2024)."""

    EVERY = 5
    STAY = 0.95**EVERY
    """Share of the slow weights that an update leaves at the end of the training; before, with the cube of progress."""

    def __init__(self, fast: list[Tensor]) -> None:
        """Pull on weights and running statistics, not on the momentum that comes second."""
        self._fast = [fast[0], *fast[2:]]
        self.slow = [one.clone() for one in self._fast]

    def update(self, done: int, total: int) -> None:
        """Bring both together after ``done`` of ``total`` steps where it is time; the last word is the slow ones'."""
        if done % self.EVERY == 0:
            self._meet(self.STAY * (done / total) ** 3)
        elif done == total:
            self._meet(1.0)

    def _meet(self, stay: float) -> None:
        for slow, fast in zip(self.slow, self._fast, strict=True):
            slow.lerp_(fast, 1 - stay)
            fast.copy_(slow)


def device_of(context: Context) -> Any:
    """Return the torch device of this executor."""
    return torch.device("cuda", 0) if context.device == "gpu" else torch.device("cpu")


def _set_up(on_gpu: bool) -> None:
    """Set what holds for the whole process."""
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True  # as for convolutions, where it is PyTorch's default
    else:
        keep_freed_memory()


def _arrays(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, NDArray[Any]]:
    return {name: values.detach().cpu().numpy() for name, values in tensors}


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
    _set_up(context.device == "gpu")
    network = make().to(device, memory_format=torch.channels_last)
    trainable = [p for p in network.parameters() if p.requires_grad]
    gradients = FlatGradients(trainable, context.handle.team)
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
        for images, truth in shard.test_batches(TEST_BATCH[context.device]):
            answers = network(_scaled(images, device)).argmax(1).cpu().numpy()
            context.record_test(int((answers == truth).sum()), len(truth))
    context.record_weights(lambda: _arrays(network.named_parameters()))  # running statistics are each executor's own
    return {"reduced_bytes": float(gradients.bytes_reduced)}


def _scaled(images: NDArray[np.uint8], device: Any) -> Tensor:
    """Return images (b, 3, h, w), channels last in memory, from -1 to 1."""
    pixels = torch.from_numpy(np.array(images, order="C")).to(device).permute(0, 3, 1, 2).float()
    return pixels.div_(127.5).sub_(1)

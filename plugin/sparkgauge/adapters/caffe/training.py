"""Trains a Caffe net on one executor with either engine: summed gradients, distributed tests, equal weights."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sparkgauge.adapters.caffe.engine import Engine
from sparkgauge.adapters.collective import Team, all_reduce_
from sparkgauge.caffe import weights
from sparkgauge.caffe.plan import Plan
from sparkgauge.caffe.sources import ImageShard, IndexShard
from sparkgauge.context import CURVE_STEPS, Context, Step
from sparkgauge.errors import ConfigurationError, DataError, GaugeError, TrainingError
from sparkgauge.models.flops import achieved_gflops


def train(context: Context, shard: ImageShard) -> dict[str, float]:
    """Train ``context.plan`` for the context's steps; test on the whole test set every ``test_every`` and at the end.

    Returns this executor's ``reduced_bytes`` and, where a shipped net's work is counted, ``achieved_gflops``.
    """
    plan: Plan = context.plan
    _check_length(plan, context.total_steps(shard))
    with tempfile.TemporaryDirectory(prefix="sparkgauge-caffe-") as name:
        folder = Path(name)
        engine = make_engine(plan, context, shard, folder)
        try:
            load_start(engine, plan, folder)
            trainer = (_GpuTrainer if context.device == "gpu" else Trainer)(engine, plan, context, shard)
            trainer.run()
            if context.rank == 0 and context.save_to:
                _save(engine, context, folder)
        finally:
            engine.close()
    return _results(plan, context, trainer.summed.reduced_bytes)


def _check_length(plan: Plan, total: int) -> None:
    if total > plan.remaining:
        expected, actual = f"at most {plan.remaining} iterations, the solver's", str(total)
        hint = "Raise max_iter, or train for fewer epochs."
        raise ConfigurationError("Too long a training", expected=expected, actual=actual, where=plan.name, hint=hint)


def make_engine(plan: Plan, context: Context, shard: ImageShard, folder: Path) -> Engine:
    """Return the plan's engine with weights that are the same on every executor."""
    net_messages = plan.net_messages()
    iter_size = int(plan.solver_message().iter_size)
    passes = max(iter_size, plan.passes // context.executors)
    share = math.ceil(context.global_batch / context.executors)
    settings: dict[str, Any] = {
        "input_shape": shard.image_shape,
        "batch": max(1, math.ceil(share / passes)),
        "mean": _mean(plan, shard, folder),
        "seed": context.seed,
        "threads": context.threads,
        "rank": context.rank,
    }
    if plan.engine == "caffe":
        from sparkgauge.adapters.caffe.engine_caffe import CaffeEngine

        try:
            return CaffeEngine(plan.solver_message(), *net_messages, **settings, where=plan.where)
        except TrainingError as error:
            raise _explained(error, plan, net_messages, shard.image_shape) from None
    from sparkgauge.adapters.caffe.engine_torch import TorchEngine

    device = "cuda" if context.device == "gpu" else "cpu"
    return TorchEngine(plan.solver_message(), *net_messages, **settings, device=device, where=plan.where)


def _explained(error: TrainingError, plan: Plan, nets: Iterable[Any], shape: tuple[int, ...]) -> TrainingError:
    """Return ``error`` of the real Caffe, whose CHECKs name no layer, with what engine torch says of the same nets."""
    from sparkgauge.adapters.caffe.net import Net

    for message in nets:
        try:
            if message is not None:
                Net(message, shape, plan.where)
        except GaugeError as known:
            return TrainingError(
                error.summary,
                actual=f"{error.actual} ({known.summary})",
                where=known.where,
                hint=known.hint,
                traceback_text=error.traceback_text,
            )
    return error


def _mean(plan: Plan, shard: ImageShard, folder: Path) -> Any:
    if plan.mean is None:
        return shard.mean_image if plan.uses_session_mean else None
    path = folder / "mean.binaryproto"
    path.write_bytes(plan.mean)
    return weights.read_mean(path, shard.image_shape)


def load_start(engine: Engine, plan: Plan, folder: Path) -> None:
    """Give the engine the weights and the state that the plan starts from; DataError where they do not fit the net."""
    if plan.weights is not None:
        path = folder / "start.caffemodel"
        path.write_bytes(plan.weights)
        wanted = {name: [blob.shape for blob in blobs] for name, blobs in engine.parameters().items()}
        fitted = weights.check_fits(weights.read_weights(path), wanted, plan.start_name)
        engine.set_parameters(fitted)
    if plan.state is not None:
        path = folder / "start.solverstate"
        path.write_bytes(plan.state)
        try:
            engine.load_state(path)
        except DataError as error:  # of a file that only this process knows
            parts = {"expected": error.expected, "actual": error.actual, "hint": error.hint}
            raise DataError(error.summary, **parts, where=plan.state_name or error.where) from None


def parts(global_batch: int, passes: int, executors: int, rank: int) -> list[int]:
    """Return the images of each pass of executor ``rank``: the global batch is cut the same for any number of them."""
    each = passes // executors
    bounds = [global_batch * number // passes for number in range(rank * each, (rank + 1) * each + 1)]
    return [end - start for start, end in pairwise(bounds)]


class Summed:
    """Sums one flat buffer over all executors, on the CPU or on its GPU, and counts bytes and waiting."""

    def __init__(self, team: Team, *, on_device: bool) -> None:
        self.team, self.on_device = team, on_device
        self.reduced_bytes = 0
        self.seconds = 0.0
        self._marks: list[tuple[Any, Any]] = []

    def __call__(self, flat: Any) -> None:
        """Return when ``flat`` holds the sums; on a GPU when that is queued, which no host waits for."""
        self.reduced_bytes += flat.nbytes
        if not self.on_device:
            self.seconds += all_reduce_(flat, self.team)
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.distributed.all_reduce(flat, group=self.team.group)
        after.record()
        self._marks.append((before, after))

    def waited(self) -> float:
        """Return the seconds since the last call; the GPU must have come this far."""
        self.seconds += sum(before.elapsed_time(after) for before, after in self._marks) / 1000
        seconds, self.seconds, self._marks = self.seconds, 0.0, []
        return seconds


class Trainer:
    """Runs the steps and the tests of one round on this executor."""

    def __init__(self, engine: Engine, plan: Plan, context: Context, shard: ImageShard) -> None:
        self._engine, self._context, self._shard = engine, context, shard
        self.summed = Summed(context.handle.team, on_device=context.device == "gpu")
        self._passes = plan.passes
        self._reduce = self.summed if context.executors > 1 else None
        part = shard.test_range
        self._test_part: tuple[Any, Any] = shard.test_images[part], shard.test_labels[part]
        self._statistics = [layer.name for layer in plan.net_messages()[0].layer if layer.type == "BatchNorm"]

    def run(self) -> None:
        """Train, test, and tell the driver what became of the weights."""
        total = self._context.total_steps(self._shard)
        for step in self._context.steps(self._source()):
            due = self._is_test_due(step.index + 1, total)
            self._step(step, last=due or step.index + 1 == total)
            if due:
                self._test()
        self._test()
        self._context.record_weights(self.weights)

    def _source(self) -> Any:
        return self._shard

    def _is_test_due(self, steps: int, total: int) -> bool:
        every = self._context.test_every
        return bool(every) and steps < total and steps % (every or 1) == 0

    def _step(self, step: Step, *, last: bool) -> None:
        """Update once by the mean gradient of the global batch, of which this executor's part may be empty."""
        own = None
        if self._passes > 1:
            own = parts(step.global_batch, self._passes, self._context.executors, self._context.rank)
        share = step.images, step.labels
        loss = self._engine.step(*share, global_batch=step.global_batch, reduce=self._reduce, parts=own)
        self._context.record_loss(loss * step.global_batch)
        if step.index:
            self._context.move("compute", "sync", self.summed.waited())
        else:
            self.summed.waited()  # the first step is warm-up as a whole

    def _test(self) -> None:
        """Count the right answers on this executor's share of the test set."""
        with self._context.phase("evaluate"):
            self._average_statistics()
            found = self._engine.test(*self._test_part)
            self._context.record_test(found.correct, found.tested)

    def _average_statistics(self) -> None:
        """Give all executors the mean of their BatchNorm statistics: each normalises its own part of a batch."""
        if not self._statistics or self._reduce is None:
            return
        own = self._engine.parameters()
        for name in self._statistics:
            for blob in own[name]:
                self._sum(blob)
                blob /= self._context.executors
        self._engine.set_parameters({name: own[name] for name in self._statistics})

    def weights(self) -> dict[str, Any]:
        """Return the blobs by layer and place, which are the same on every executor."""
        blobs = self._engine.parameters().items()
        return {f"{layer} {place}": blob for layer, found in blobs for place, blob in enumerate(found)}

    def _sum(self, array: Any) -> None:
        """Sum a small array over all executors in place."""
        if self.summed.on_device:
            moved = torch.from_numpy(array).cuda()
            torch.distributed.all_reduce(moved, group=self.summed.team.group)
            array[...] = moved.cpu().numpy()
        else:
            all_reduce_(array, self.summed.team)


class _GpuTrainer(Trainer):
    """Keeps the images on the GPU and lets it work ahead: losses and times are read every ``CURVE_STEPS`` steps."""

    def __init__(self, engine: Any, plan: Plan, context: Context, shard: ImageShard) -> None:
        super().__init__(engine, plan, context, shard)
        self._ahead = engine
        engine.attach(shard.images, shard.labels)
        self._test_part = engine.resident(*self._test_part)
        self._loss = torch.zeros((), device="cuda")
        self._images = 0

    def _source(self) -> Any:
        return IndexShard(self._shard)

    def _step(self, step: Step, *, last: bool) -> None:
        loss = self._ahead.start_step_at(step.images, global_batch=step.global_batch, reduce=self._reduce)
        self._loss.add_(loss, alpha=step.global_batch)
        self._images += len(step.labels)
        if step.index == 0 or last or (step.index + 1) % CURVE_STEPS == 0:
            self._read(step.index)

    def _read(self, index: int) -> None:
        """Wait for the GPU and record what it has done since the last time."""
        self._context.record_loss(float(self._loss), self._images)
        self._loss.zero_()
        self._images = 0
        waited = self.summed.waited()
        if index:
            self._context.move("compute", "sync", waited)


def _save(engine: Engine, context: Context, folder: Path) -> None:
    """Hand weights and state to the driver."""
    ending = f"_seed{context.seed}_iter_{engine.iteration}"
    model, state = folder / "end.caffemodel", folder / "end.solverstate"
    engine.save_weights(model)
    engine.save_state(state, f"{context.save_to}{ending}.caffemodel")
    for path in (model, state):
        context.send_file(f"{ending}{path.suffix}", path.read_bytes())


def _results(plan: Plan, context: Context, reduced_bytes: int) -> dict[str, float]:
    results = {"reduced_bytes": float(reduced_bytes)}
    seconds, steps = sum(context.step_seconds), len(context.step_seconds)
    if seconds > 0:
        images = context.train_images * steps / (steps + 1)  # the first step is not in step_seconds
        gflops = achieved_gflops(plan.model, images / seconds)
        results |= {} if gflops is None else {"achieved_gflops": gflops}
    return results

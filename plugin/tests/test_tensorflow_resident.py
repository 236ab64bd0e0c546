"""The way a GPU is trained on, rehearsed on the CPU: it must learn what the CPU's way learns."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from plugin.tests.plugin_runs import make_job
from sparkgauge.adapters import blocks
from sparkgauge.adapters.tensorflow import inputs, resident, training, xla
from sparkgauge.context import CURVE_STEPS, Context, Step
from sparkgauge.data.augment import augmentation_parameters, crop_flip
from sparkgauge.data.shards import Shard
from sparkgauge.models.cifar10 import CIFAR10_QUICK, CIFAR10_TUTORIAL, RECIPES, Recipe
from sparkgauge.phases import PhaseClock

BOTH = pytest.mark.parametrize("recipe", [CIFAR10_QUICK, CIFAR10_TUTORIAL], ids=lambda recipe: recipe.name)
TEST_COUNT = 203
ROUNDING = 0.02
"""What a dozen steps make of rounding: a bias that is still near 0 differs by up to 0.3 % of its layer's largest."""
CPU = "/job:localhost/replica:0/task:0/device:CPU:0"
ALONE = SimpleNamespace(
    extended=SimpleNamespace(worker_devices=(CPU,)), run=lambda function, arguments: function(*arguments)
)
"""A strategy whose other executors add nothing to a sum."""


def _context(device: str, shard: Shard, **changes: Any) -> Context:
    sampler = shard.sampler
    defaults = {"device": device, "executors": sampler.executors, "global_batch": sampler.global_batch}
    channel: Any = SimpleNamespace(send=lambda *_, **__: None, driver_start=0.0)
    return Context(make_job(**{**defaults, "seed": 7, **changes}), sampler.rank, channel, PhaseClock(), ALONE)


def _shard(dataset: Any, global_batch: int = 100, executors: int = 1, rank: int = 0) -> Shard:
    return Shard.open(dataset.folder, executors=executors, rank=rank, global_batch=global_batch, seed=7)


def _trained(recipe: Recipe, device: str, shard: Shard, steps: int, **changes: Any) -> tuple[Any, Context]:
    """Return the trainer after ``steps`` steps and a test, and its context."""
    context = _context(device, shard, iterations=steps, **changes)
    trainer = training._trainer(recipe, context, shard)
    for step in context.steps(trainer.feed):
        trainer.step(step)
    trainer.test()
    return trainer, context


@BOTH
def test_batches_made_on_the_device_are_those_of_the_host(recipe: Recipe, faint_images: Any) -> None:
    shard = _shard(faint_images, executors=2, rank=1)
    resident_inputs = inputs.ResidentInputs(recipe, _context("gpu", shard), shard)
    on_host = training._Trainer(recipe, _context("cpu", shard), shard)
    for index in (0, 3, 49, 50, 51, 12):  # two blocks and two epochs, and back again
        images, labels, jitter, _ = on_host._inputs(Step(index, *shard.batch(index), global_batch=100))
        rows = resident_inputs.feed.batch(index)
        described, scalars = resident_inputs.arguments(Step(index, *rows, global_batch=100))
        ours, told = resident_inputs.batch(described)
        np.testing.assert_array_equal(told, labels)
        np.testing.assert_allclose(ours, on_host._input(images, jitter), rtol=1e-4, atol=1e-4)
        rate = np.float32(recipe.learning_rate(index))
        np.testing.assert_array_equal(scalars[:, 0], [1, shard.sampler.global_batch_size(index), rate, index])


def test_crops_are_those_of_the_host_to_the_pixel(faint_images: Any) -> None:
    shard = _shard(faint_images)
    resident_inputs = inputs.ResidentInputs(CIFAR10_TUTORIAL, _context("gpu", shard), shard)
    own = augmentation_parameters(7, 0, 100, 24)
    images, _ = shard.batch(0)
    expected = crop_flip(images, size=24, offsets=own.offsets, flips=own.flips)
    described, _ = resident_inputs.arguments(Step(0, *resident_inputs.feed.batch(0), global_batch=100))
    numbers = described.numpy().astype(np.int64)
    places = resident_inputs._within.numpy()[numbers[inputs.FLIP]] + numbers[inputs.CORNER][:, None, None]
    np.testing.assert_array_equal(resident_inputs._pixels.numpy()[places], expected)


@BOTH
def test_two_steps_are_the_cpus_two_steps(recipe: Recipe, faint_images: Any) -> None:
    shard = _shard(faint_images)
    (ours, told), (theirs, expected) = (_trained(recipe, device, shard, 2) for device in ("gpu", "cpu"))
    assert told.curve[0]["loss_sum"] == pytest.approx(expected.curve[0]["loss_sum"], rel=1e-6)
    _assert_alike(ours, theirs, 1e-4)


@BOTH
def test_it_learns_what_the_cpus_way_learns(recipe: Recipe, faint_images: Any) -> None:
    """Twelve steps: a whole epoch with its last batch of one image, and one more step."""
    shard = _shard(faint_images)
    (ours, told), (theirs, expected) = (_trained(recipe, device, shard, 12) for device in ("gpu", "cpu"))
    assert told.curve[0]["loss_sum"] == pytest.approx(expected.curve[0]["loss_sum"], rel=2e-4)
    assert told.curve[0]["images"] == expected.curve[0]["images"] == 1101
    assert told.curve[-1]["tested"] == expected.curve[-1]["tested"] == TEST_COUNT
    assert abs(told.curve[-1]["correct"] - expected.curve[-1]["correct"]) <= 2
    _assert_alike(ours, theirs, ROUNDING)


def _assert_alike(ours: resident.ResidentTrainer, theirs: Any, fraction: float) -> None:
    """Assert that weights and averages differ by at most ``fraction`` of the largest of their layer."""
    _assert_close(ours._weights.parts(ours._weights.values), theirs._network.weights(), fraction)
    if theirs._averages is not None:
        assert ours._averages is not None
        _assert_close(ours._weights.parts(ours._averages.shadows), theirs._averages.shadows, fraction)


def _assert_close(ours: list[Any], theirs: list[Any], fraction: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=fraction * np.abs(other.numpy()).max())


@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_an_executor_without_images_waits_in_the_sum_and_adds_nothing(
    recipe: Recipe, rank: int, faint_images: Any
) -> None:
    """One image is left for two executors in the eleventh step."""
    shard = _shard(faint_images, executors=2, rank=rank)
    (ours, told), (theirs, expected) = (_trained(recipe, device, shard, 11) for device in ("gpu", "cpu"))
    assert told.curve[0]["images"] == expected.curve[0]["images"] == 500 + rank
    assert told.curve[0]["loss_sum"] == pytest.approx(expected.curve[0]["loss_sum"], rel=2e-4)
    _assert_alike(ours, theirs, ROUNDING)


def test_losses_are_read_now_and_then_and_none_is_lost(faint_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    record = Context.record_loss

    def listening(context: Context, loss_sum: float, images: int | None = None) -> None:
        read.append(images)
        record(context, loss_sum, images)

    monkeypatch.setattr(Context, "record_loss", listening)
    shard = _shard(faint_images, global_batch=10)
    context = _context("gpu", shard, iterations=CURVE_STEPS + 3, test_every=20)
    training.train(CIFAR10_QUICK.name, context, shard)
    assert read == [10, 190, 200, 100, 30]  # after the first step, at tests, every CURVE_STEPS steps, at the end
    points = [(point["step"], point["images"]) for point in context.curve]
    assert points == [(20, 200), (40, 200), (50, 100), (53, 30), (53, 0)]


def test_a_loss_that_is_no_number_ends_the_training(faint_images: Any) -> None:
    shard = _shard(faint_images)
    context = _context("gpu", shard, iterations=3)
    trainer = resident.ResidentTrainer(CIFAR10_QUICK, context, shard, training.AVERAGE_DECAY)
    trainer._weights.values.assign_add(tf.fill(trainer._weights.values.shape, np.float32("nan")))
    step = next(context.steps(trainer.feed))
    with pytest.raises(FloatingPointError, match="at step 1"):
        trainer.step(step)


def test_a_step_is_traced_once_and_given_tensors(faint_images: Any) -> None:
    shard = _shard(faint_images, global_batch=64)  # 16 steps an epoch, the last of 41 images
    trainer, _ = _trained(CIFAR10_QUICK, "gpu", shard, 20)
    trainer.test()
    assert trainer._step.experimental_get_tracing_count() == 1
    assert trainer._count.experimental_get_tracing_count() == 1
    step = Step(20, *trainer.feed.batch(20), global_batch=64)
    assert all(tf.is_tensor(argument) for argument in trainer._inputs.arguments(step))


@pytest.mark.parametrize("batch", [1, 100, 202, 203, 204])
def test_every_test_image_is_counted_once_whatever_the_batch(
    batch: int, faint_images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "TEST_BATCH", batch)
    shard = _shard(faint_images)
    context = _context("gpu", shard)
    resident.ResidentTrainer(CIFAR10_TUTORIAL, context, shard, training.AVERAGE_DECAY).test()
    (ours,) = context.curve
    other = _context("cpu", shard)
    training._Trainer(CIFAR10_TUTORIAL, other, shard).test()
    assert ours["tested"] == TEST_COUNT
    assert ours["correct"] == other.curve[0]["correct"]


def fit_as_on_a_gpu(context: Any, shard: Any) -> None:
    """Train on the CPU by the GPU's way: the strategy, its executors and their sums are the real ones."""
    from sparkgauge.adapters.tensorflow.training import train

    context.device = "gpu"
    train(str(context.options["model"]), context, shard)


@BOTH
def test_two_executors_learn_what_one_learns(recipe: Recipe, trainings: Any) -> None:
    settings = {"iterations": 12, "options": {"model": recipe.name}}
    one, two = (trainings.run(fit_as_on_a_gpu, executors=executors, **settings) for executors in (1, 2))
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=2e-3)
    assert [record.train_images for record in two.executors] == [550, 551]
    assert sum(record.test_images for record in two.executors) == TEST_COUNT
    assert all(record.phases.sync > 0 for record in two.executors)
    usual = trainings.run(model=recipe.name, executors=1, iterations=12)
    assert one.curve[-1].train_loss == pytest.approx(usual.curve[-1].train_loss, rel=2e-3)


def test_a_compiled_step_is_the_same_step(faint_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = _shard(faint_images, global_batch=10)
    plain, told = _trained(CIFAR10_TUTORIAL, "gpu", shard, 3)
    monkeypatch.setattr(xla, "FROM_STEPS", 3)
    monkeypatch.setattr(xla, "_assembler_found", lambda: True)
    compiled, again = _trained(CIFAR10_TUTORIAL, "gpu", shard, 3)
    assert not hasattr(plain._gradient, "experimental_get_tracing_count")
    assert compiled._gradient.experimental_get_tracing_count() == 1
    assert again.curve[0]["loss_sum"] == pytest.approx(told.curve[0]["loss_sum"], rel=1e-4)


def test_what_cannot_be_compiled_is_run_as_it_is(faint_images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla, "FROM_STEPS", 1)
    monkeypatch.setattr(xla, "_assembler_found", lambda: False)
    shard = _shard(faint_images, global_batch=10)
    trainer, _ = _trained(CIFAR10_QUICK, "gpu", shard, 1)
    assert trainer._gradient == trainer._gradient_of
    monkeypatch.setattr(xla, "_assembler_found", lambda: True)

    def fails(*_: Any) -> None:
        raise tf.errors.InternalError(None, None, "libdevice not found at ./libdevice.10.bc")

    monkeypatch.setattr(xla, "_probe", fails)
    assert not xla.works()


@pytest.mark.parametrize("place", ["PATH", "XLA_FLAGS", "package", "nowhere"])
def test_the_assembler_is_looked_for_where_xla_looks(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ptxas = tmp_path / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.write_text("#!/bin/sh")
    ptxas.chmod(0o755)
    monkeypatch.setenv("PATH", str(ptxas.parent if place == "PATH" else tmp_path))
    monkeypatch.setenv("XLA_FLAGS", f"--a=1 --xla_gpu_cuda_data_dir={tmp_path / 'cuda_nvcc'}" * (place == "XLA_FLAGS"))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if place == "package" else None
    monkeypatch.setattr(xla, "find_spec", lambda name: found)
    assert xla._assembler_found() == (place != "nowhere")
    if place == "package":
        assert os.environ["PATH"].split(os.pathsep)[0] == str(ptxas.parent)


def test_a_block_is_made_before_its_first_step_and_forgotten_after_its_last() -> None:
    made: list[int] = []

    def make(number: int) -> str:
        made.append(number)
        return f"block {number}"

    ahead = blocks.Ahead(make)
    assert ahead.of(0) == ("block 0", 0) and ahead.of(blocks.BLOCK_STEPS - 2) == ("block 0", blocks.BLOCK_STEPS - 2)
    assert made == [0]
    assert ahead.of(blocks.BLOCK_STEPS - 1) == ("block 0", blocks.BLOCK_STEPS - 1)
    assert made == [0, 1]
    assert ahead.of(blocks.BLOCK_STEPS) == ("block 1", 0)
    assert made == [0, 1] and list(ahead._made) == [1]
    assert ahead.of(3) == ("block 0", 3)  # a training that goes on elsewhere


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_holds_what_its_steps_would_draw(name: str, faint_images: Any) -> None:
    shard = _shard(faint_images, executors=2, rank=1)
    distortions = blocks.Distortions(RECIPES[name], 7, shard.sampler)
    block = blocks.drawn(shard.sampler, distortions, 1)
    assert len(block.sizes) == blocks.BLOCK_STEPS
    start = sum(block.sizes[:3])
    step, share = blocks.BLOCK_STEPS + 3, slice(start, start + block.sizes[3])
    np.testing.assert_array_equal(block.rows[share], shard.sampler.batch(step))
    own = distortions.of(step)
    assert (own is None) == (block.distortions is None)
    if own is not None and block.distortions is not None:
        for field in ("offsets", "flips", "brightness", "contrast"):
            np.testing.assert_array_equal(getattr(block.distortions, field)[share], getattr(own, field))

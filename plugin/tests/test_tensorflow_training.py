"""Trainings of the built-in models on real executors: what is learnt, counted and timed."""

from __future__ import annotations

from typing import Any

import pytest

from sparkgauge.records import PHASES, Round

TRAIN_COUNT, TEST_COUNT = 1001, 203
"""Of the fixture ``faint_images``: 11 batches of 100 an epoch, the last with one image."""

_ROUNDS: dict[Any, Round] = {}


@pytest.fixture
def quick(trainings: Any) -> Any:
    """Return ``(executors) -> Round`` of 50 steps of cifar10_quick, each run once for all tests."""

    def run(executors: int) -> Round:
        if executors not in _ROUNDS:
            _ROUNDS[executors] = trainings.run(executors=executors, iterations=50, test_every=20)
        return _ROUNDS[executors]

    return run


def test_two_executors_learn_what_one_learns(quick: Any) -> None:
    one, two = quick(1), quick(2)
    for alone, together in zip(one.curve, two.curve, strict=True):
        assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-4)
        assert abs(together.accuracy_fraction - alone.accuracy_fraction) <= 3 / TEST_COUNT


def test_it_learns(quick: Any) -> None:
    losses = [point.train_loss for point in quick(2).curve]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(2.30, abs=0.05)  # ln 10: nothing is known at first
    assert losses[-1] < 2.23
    assert quick(2).accuracy_fraction > 0.13


def test_the_curve_has_a_point_at_every_test_and_at_the_end(quick: Any) -> None:
    for executors in (1, 2):
        curve = quick(executors).curve
        assert [point.step for point in curve] == [20, 40, 50]
        # an epoch has 11 steps: 10 full batches and one image
        assert [point.epoch for point in curve] == pytest.approx(
            [1 + 900 / TRAIN_COUNT, 3 + 700 / TRAIN_COUNT, 4 + 600 / TRAIN_COUNT]
        )
        seconds = [point.elapsed_seconds for point in curve]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert seconds[-1] <= quick(executors).runtime_seconds


def test_every_test_image_is_counted_once(quick: Any) -> None:
    for executors in (1, 2):
        done = quick(executors)
        assert sum(record.test_images for record in done.executors) == TEST_COUNT
        for point in done.curve:
            right = point.accuracy_fraction * TEST_COUNT
            assert right == pytest.approx(round(right), abs=1e-9)
        assert done.accuracy_fraction == done.curve[-1].accuracy_fraction
    assert [record.test_images for record in quick(2).executors] == [101, 102]


def test_phases_add_up_to_the_runtime_on_every_executor(quick: Any) -> None:
    for executors in (1, 2):
        done = quick(executors)
        assert [record.rank for record in done.executors] == list(range(executors))
        for record in done.executors:
            assert record.phases.total == pytest.approx(done.runtime_seconds, rel=0.02)
            spent = {phase: getattr(record.phases, phase) for phase in PHASES}
            assert min(spent.values()) >= 0, spent
            assert all(spent[phase] > 0 for phase in PHASES), spent
            assert record.phases.sync < record.phases.compute or executors > 1
            steps = record.phases.feed + record.phases.compute + record.phases.sync
            assert sum(record.step_seconds) == pytest.approx(steps, rel=0.1)
            assert 0 < record.cpu_seconds < 2 * done.runtime_seconds


def test_steps_and_images(quick: Any) -> None:
    for executors in (1, 2):
        done = quick(executors)
        assert [len(record.step_seconds) for record in done.executors] == [49] * executors
        # 4 epochs of 1001 images and 6 full batches
        assert sum(record.train_images for record in done.executors) == 4 * TRAIN_COUNT + 600
        slowest = max(sum(record.step_seconds) for record in done.executors)
        assert done.images_per_second == pytest.approx((4 * TRAIN_COUNT + 600) * 49 / 50 / slowest)


def test_the_seed_decides(trainings: Any, quick: Any) -> None:
    again = trainings.run(iterations=20)
    assert [point.step for point in again.curve] == [20]
    assert again.curve[0].train_loss == pytest.approx(quick(2).curve[0].train_loss, rel=1e-6)
    other = trainings.run(iterations=20, seed=2)
    assert (again.seed, other.seed) == (1, 2)
    assert abs(other.curve[0].train_loss / again.curve[0].train_loss - 1) > 1e-5


def test_an_epoch_with_a_last_batch_smaller_than_the_number_of_executors(trainings: Any) -> None:
    """One image is left for two executors: one of them trains on nothing, and must not hold up or distort the other."""
    one, two = (trainings.run(executors=executors, iterations=None, epochs=1) for executors in (1, 2))
    assert [record.train_images for record in two.executors] == [500, 501]
    assert [len(record.step_seconds) for record in two.executors] == [10, 10]
    (end,) = two.curve
    assert (end.step, end.epoch) == (11, 1.0)
    assert end.train_loss == pytest.approx(one.curve[0].train_loss, rel=1e-5)


def test_part_of_an_epoch_is_rounded_up_to_a_step(trainings: Any) -> None:
    done = trainings.run(iterations=None, epochs=0.01, global_batch=2)
    (end,) = done.curve
    assert end.step == 6  # 0.01 of 501 steps
    assert [record.train_images for record in done.executors] == [6, 6]


def test_augmented_images_do_not_depend_on_the_number_of_executors(trainings: Any) -> None:
    settings = {"model": "cifar10_tutorial", "global_batch": 128, "iterations": 5}
    one, two = (trainings.run(executors=executors, **settings) for executors in (1, 2))
    assert two.curve[-1].step == 5
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=2e-3)
    assert two.curve[-1].train_loss == pytest.approx(2.3, abs=0.3)
    assert sum(record.test_images for record in two.executors) == TEST_COUNT


def fit_with_the_context(context: Any, shard: Any) -> dict[str, float]:
    """What a user may write: batches, phases, losses and tests of the context, and nothing of TensorFlow."""
    import time

    import numpy as np

    seen = 0
    for step in context.steps(shard):
        assert len(step.images) == len(step.labels)
        seen += len(step.labels)
        with context.phase("compute"):
            time.sleep(0.01)
        context.record_loss(loss_sum=float(len(step.labels)) / (step.index + 1))
    with context.phase("evaluate"):
        for images, labels in shard.test_batches(50):
            context.record_test(correct=int(np.sum(labels < 3)), tested=len(images))
    return {"seen": np.float32(seen), "rank": context.rank, "seed": context.seed, "wanted": context.options["wanted"]}


def test_a_function_of_the_user(trainings: Any) -> None:
    told: list[Any] = []
    from sparkgauge.adapters.tensorflow import launch
    from sparkgauge.rounds import run_round

    job = trainings.job(fit_with_the_context, iterations=25, seed=7, options={"wanted": 3})
    context = trainings.cluster.spark.sparkContext
    done = run_round(context, job, launch.launch, timeout_seconds=60, on_progress=told.append)
    labels = trainings.dataset.open().test_labels
    assert done.accuracy_fraction == pytest.approx(float((labels < 3).mean()))
    assert sum(record.test_images for record in done.executors) == TEST_COUNT
    assert done.metrics == {"seen": 1150.0, "rank": 0.0, "seed": 7.0, "wanted": 3.0}
    (end,) = done.curve
    images = [100] * 10 + [1] + [100] * 10 + [1] + [100] * 3
    assert end.train_loss == pytest.approx(sum(n / (i + 1) for i, n in enumerate(images)) / sum(images))
    for record in done.executors:
        assert record.phases.total == pytest.approx(done.runtime_seconds, rel=0.02)
        assert record.phases.compute >= 0.24
    assert told and (told[0].total_steps, told[0].step) == (25, 2)
    assert told[0].images_per_second > 0


def test_a_deliberate_slowdown_shows_in_its_phase(trainings: Any) -> None:
    slow = trainings.run(fit_with_the_context, iterations=25, options={"wanted": 3}, injections={"compute": 2.0})
    for record in slow.executors:
        assert record.phases.compute >= 0.24 * 3
        assert min(record.step_seconds) >= 0.03

"""The training function's view: which second belongs to which phase, what the curve keeps, what is refused.

Time is a number that the tests move, and the channel only listens; batches, clock and context are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plugin.tests.plugin_runs import make_job
from sparkgauge import context as context_module
from sparkgauge import executor, phases, rounds
from sparkgauge.context import CURVE_STEPS, Context
from sparkgauge.data import Dataset
from sparkgauge.data.shards import Sampler, Shard
from sparkgauge.errors import ConfigurationError, TrainingError
from sparkgauge.job import Job
from sparkgauge.kernel import BetweenSteps
from sparkgauge.phases import PhaseClock


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Listener:
    """The executor's end of a channel without a driver."""

    def __init__(self, driver_start: float) -> None:
        self.driver_start = driver_start
        self.said: list[dict[str, Any]] = []

    def send(self, kind: str, **content: Any) -> None:
        self.said.append({"kind": kind, **content})


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    for module in (context_module, phases):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=hands.monotonic, sleep=hands.sleep))
    return hands


@pytest.fixture
def make(hands: Hands, faint_images: Dataset) -> Callable[..., tuple[Context, Shard]]:
    """Return ``(rank=0, **fields of Job) -> (Context, Shard)`` of a training that began 5 s ago."""

    def make(rank: int = 0, **changes: Any) -> tuple[Context, Shard]:
        job = replace(_job(faint_images), **changes)
        channel: Any = Listener(hands.now - 5.0)
        context = Context(job, rank, channel, PhaseClock(channel.driver_start))
        return context, executor._open_shard(job, rank)

    return make


def _job(dataset: Dataset) -> Job:
    return make_job(dataset, iterations=4)


def _slow_batches(monkeypatch: pytest.MonkeyPatch, hands: Hands, seconds: float) -> None:
    original = Shard.batch

    def batch(shard: Shard, step: int) -> Any:
        hands.now += seconds
        return original(shard, step)

    monkeypatch.setattr(Shard, "batch", batch)


def test_every_second_belongs_to_the_phase_it_was_spent_in(
    make: Any, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_batches(monkeypatch, hands, 0.5)
    context, shard = make()
    hands.now += 2.0  # a model is built
    for step in context.steps(shard):
        hands.now += 10.0 if step.index == 0 else 1.0
        if step.index == 1:
            with context.phase("evaluate"):
                hands.now += 7.0
        if step.index > 1:
            context.move("compute", "sync", 0.25)
    hands.now += 3.0
    spent = context._clock.seconds()
    assert (spent.launch, spent.feed, spent.warmup) == (7.0, 2.0, 10.0)
    assert (spent.compute, spent.sync, spent.evaluate, spent.collect) == (2.5, 0.5, 7.0, 3.0)
    assert context.step_seconds == [1.5, 1.5, 1.5]  # without the first, and without the test


def test_the_kernel_between_steps_is_in_no_phase_and_in_no_step(
    make: Any, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time(pieces: BetweenSteps) -> None:
        hands.now += 0.125
        pieces.seconds.append(0.125)

    monkeypatch.setattr(BetweenSteps, "time", time)
    context, shard = make()
    for _ in context.steps(shard):
        hands.now += 1.0
        context.record_loss(1.0)
    spent = context._clock.seconds()
    assert (spent.launch, spent.warmup, spent.compute, spent.total) == (5.0, 1.0, 3.0, 9.0)
    assert context.step_seconds == [1.0, 1.0, 1.0]
    assert context.reference_seconds == [0.125] * 4
    assert [point["elapsed_seconds"] for point in context.curve] == [9.0]


def test_a_gpu_waits_for_no_kernel(make: Any) -> None:
    context, shard = make(device="gpu")
    list(context.steps(shard))
    assert context.reference_seconds == []


def test_waiting_in_the_very_step_can_be_moved(make: Any, hands: Hands) -> None:
    """The compiled step tells the seconds of its all-reduce before the clock has left the phase."""
    context, shard = make(iterations=2)
    for step in context.steps(shard):
        hands.now += 1.0
        if step.index == 1:
            context.move("compute", "sync", 0.9)
    spent = context._clock.seconds()
    assert (spent.compute, spent.sync) == (pytest.approx(0.1), pytest.approx(0.9))


def test_a_deliberate_slowdown_is_a_share_of_its_phase_without_tests(
    make: Any, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow_batches(monkeypatch, hands, 0.5)
    context, shard = make(iterations=3, injections={"feed": 2.0, "compute": 0.5})
    for _ in context.steps(shard):
        hands.now += 2.0
        with context.phase("evaluate"):
            hands.now += 40.0
    assert hands.slept == [1.0, 1.0] * 3
    spent = context._clock.seconds()
    assert (spent.feed, spent.warmup, spent.compute, spent.evaluate) == (4.5, 3.0, 6.0, 120.0)
    assert context.step_seconds == [4.5, 4.5]


def test_an_honest_run_never_sleeps(make: Any, hands: Hands) -> None:
    context, shard = make()
    for _ in context.steps(shard):
        hands.now += 1.0
    assert hands.slept == []


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"iterations": 7}, 7),
        ({"iterations": None}, 11),
        ({"iterations": None, "epochs": 1.0}, 11),
        ({"iterations": None, "epochs": 2.0}, 22),
        ({"iterations": None, "epochs": 0.5}, 6),
        ({"iterations": None, "epochs": 1.0, "global_batch": 1001}, 1),
        ({"iterations": None, "epochs": 1.0, "global_batch": 1000}, 2),
        ({"iterations": None, "epochs": 1.0, "global_batch": 5000}, 1),
    ],
)
def test_number_of_steps(make: Any, changes: dict[str, Any], steps: int) -> None:
    context, shard = make(**changes)
    assert context.total_steps(shard) == steps
    assert sum(1 for _ in context.steps(shard)) == steps


def test_steps_carry_this_executors_images_and_the_global_batch(make: Any) -> None:
    parts = []
    for rank in (0, 1):
        context, shard = make(rank=rank, iterations=11)
        steps = list(context.steps(shard))
        assert [step.index for step in steps] == list(range(11))
        assert [step.global_batch for step in steps] == [100] * 10 + [1]
        assert context.train_images == sum(len(step.labels) for step in steps)
        parts.append(context.train_images)
    assert sum(parts) == 1001


def test_a_test_inside_a_step_counts_after_it(make: Any) -> None:
    context, shard = make(iterations=4)
    for step in context.steps(shard):
        context.record_loss(100.0, images=50)
        if step.index == 1:
            context.record_test(correct=3, tested=10)
    assert [(point["step"], point["loss_sum"], point["images"]) for point in context.curve] == [
        (2, 200.0, 100),
        (4, 200.0, 100),
    ]
    assert (context.curve[0]["correct"], context.curve[0]["tested"]) == (3, 10)


def test_the_curve_has_a_point_every_so_many_steps_and_at_the_end(make: Any, hands: Hands) -> None:
    context, shard = make(iterations=2 * CURVE_STEPS + 1)
    for _ in context.steps(shard):
        hands.now += 1.0
        context.record_loss(1.0)
    assert [point["step"] for point in context.curve] == [CURVE_STEPS, 2 * CURVE_STEPS, 2 * CURVE_STEPS + 1]
    assert context.curve[0]["elapsed_seconds"] == 5.0 + CURVE_STEPS


def test_a_test_reported_batch_by_batch_is_one_test(make: Any) -> None:
    context, shard = make(iterations=2)
    for _ in context.steps(shard):
        for _ in range(3):
            context.record_test(correct=2, tested=10)
    assert context.test_images == 30
    assert sum(point.get("tested", 0) for point in context.curve) == 60


@pytest.mark.parametrize(("correct", "tested"), [(-1, 10), (11, 10), (math.nan, 10), (1, math.nan)])
def test_an_impossible_test_is_refused(make: Any, correct: float, tested: float) -> None:
    context, _ = make()
    with pytest.raises(ValueError, match="expected 0 <= correct <= tested"):
        context.record_test(correct, tested)


@pytest.mark.parametrize(("correct", "tested"), [(0, 0), (0, 10), (10, 10)])
def test_a_possible_test_is_taken(make: Any, correct: int, tested: int) -> None:
    context, _ = make()
    context.record_test(correct, tested)
    assert context.test_images == tested


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(make: Any, loss: float) -> None:
    context, shard = make()
    steps = context.steps(shard)
    next(steps)
    context.record_loss(1.0)
    next(steps)
    with pytest.raises(FloatingPointError, match=f"the training loss is {loss} at step 2"):
        context.record_loss(loss)


def test_progress_comes_from_the_first_executor_and_not_at_every_step(make: Any, hands: Hands) -> None:
    said = []
    for rank in (0, 1):
        context, shard = make(rank=rank, iterations=12)
        for _ in context.steps(shard):
            hands.now += 0.125
            context.record_loss(150.0)
        said.append(context._channel.said)
    assert [(message["step"], message["total"]) for message in said[0]] == [(2, 12), (6, 12), (10, 12)]
    assert {message["images_per_second"] for message in said[0]} == {800.0}
    assert said[0][-1]["loss"] is None  # no point of the curve yet
    assert said[1] == []


def test_what_the_function_is_told(make: Any) -> None:
    context, _ = make(rank=1, seed=9, device="gpu", test_every=3, epochs=2.0, threads=4, options={"width": 3})
    assert (context.rank, context.executors, context.seed, context.device) == (1, 2, 9, "gpu")
    assert (context.test_every, context.epochs, context.threads) == (3, 2.0, 4)
    assert (context.iterations, context.global_batch, context.options) == (4, 100, {"width": 3})


def test_weights_are_made_only_where_there_are_others_to_compare_them_with(make: Any) -> None:
    asked = []

    def weights() -> dict[str, Any]:
        asked.append(True)
        return {"layer": np.ones(2)}

    alone, one_of_two = (make(executors=executors)[0] for executors in (1, 2))
    for context in (alone, one_of_two):
        context.record_weights(weights)
    assert alone.weights == {} and len(asked) == 1
    reported = dict(one_of_two.weights)
    one_of_two.record_weights({"layer": np.ones(2)})
    assert reported == one_of_two.weights and list(reported) == ["layer"]


def test_metrics_become_floats() -> None:
    import numpy as np

    metrics = executor._checked({"a": 1, "b": np.float32(0.5), "c": np.int64(3), "d": True, 5: np.array(2.0)})
    assert metrics == {"a": 1.0, "b": 0.5, "c": 3.0, "d": 1.0, "5": 2.0}
    assert {type(value) for value in metrics.values()} == {float}
    assert executor._checked(None) == {}


@pytest.mark.parametrize("value", ["0.5", b"1", "high", None, [1.0], object(), 1j])
def test_a_metric_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(TypeError, match="metric 'f1' must be a number, got"):
        executor._checked({"f1": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(FloatingPointError, match="metric 'f1' is .*, not a finite number"):
        executor._checked({"f1": value})


@pytest.mark.parametrize("returned", [[0.5], 0.5, "fine", ("accuracy", 1.0)])
def test_what_is_no_mapping_is_refused(returned: object) -> None:
    with pytest.raises(TypeError, match=f"mapping of metric names.*got {type(returned).__name__}"):
        executor._checked(returned)


def _point(step: int, loss_sum: float, images: int, **test: int) -> dict[str, Any]:
    return {"step": step, "loss_sum": loss_sum, "images": images, "elapsed_seconds": float(step), **test}


def test_curves_are_merged_by_step(faint_images: Dataset) -> None:
    first = [_point(10, 20.0, 10, correct=3, tested=20), _point(50, 40.0, 40), _point(50, 0, 0, correct=9, tested=20)]
    second = [_point(50, 100.0, 50), _point(50, 0, 0, correct=11, tested=20)]
    curve = rounds._curve([first, second], _job(faint_images))
    assert [(point.step, point.train_loss, point.accuracy_fraction) for point in curve] == [
        (10, 2.0, 0.15),
        (50, 140 / 90, 0.5),
    ]
    assert [point.elapsed_seconds for point in curve] == [10.0, 50.0]


def test_points_without_content_are_dropped_and_a_test_alone_keeps_the_loss(faint_images: Dataset) -> None:
    part = [
        _point(5, 10.0, 5),
        _point(6, 0, 0),
        _point(7, 0, 0, correct=1, tested=4),
        _point(8, 0, 0, correct=0, tested=0),
    ]
    curve = rounds._curve([part], _job(faint_images))
    assert [(point.step, point.train_loss, point.accuracy_fraction) for point in curve] == [
        (5, 2.0, None),
        (7, 2.0, 0.25),
    ]


@pytest.mark.parametrize(
    ("step", "batch", "epochs"),
    [(0, 100, 0.0), (10, 100, 1000 / 1001), (11, 100, 1.0), (12, 100, 1 + 100 / 1001), (1, 5000, 1.0), (1, 1001, 1.0)],
)
def test_epochs_of_a_step(faint_images: Dataset, step: int, batch: int, epochs: float) -> None:
    assert rounds._epochs(step, replace(_job(faint_images), global_batch=batch)) == pytest.approx(epochs)


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_an_accuracy_may_come_as_a_metric(accuracy: float) -> None:
    assert rounds._final_accuracy((), {"accuracy_fraction": accuracy}, "custom") == accuracy


@pytest.mark.parametrize("accuracy", [-0.01, 1.01, 75.0])
def test_an_impossible_accuracy_is_refused(accuracy: float) -> None:
    with pytest.raises(TrainingError, match="impossible accuracy: expected a fraction from 0 to 1, got"):
        rounds._final_accuracy((), {"accuracy_fraction": accuracy}, "custom")


def test_a_function_without_accuracy_is_told_how_to_report_it() -> None:
    with pytest.raises(TrainingError, match=r"'custom' reported no accuracy.*record_test.*got metrics \['f1'\]"):
        rounds._final_accuracy((), {"f1": 0.5}, "custom")


def test_a_function_that_cannot_travel_is_refused_before_anything_starts(faint_images: Dataset) -> None:
    import threading

    lock = threading.Lock()

    def fit(context: Any, shard: Any) -> None:
        lock.acquire()

    with pytest.raises(
        ConfigurationError, match=r"cannot be sent to the executors.*lock.*fn=.*fit.*inside the function"
    ):
        rounds.run_round(None, replace(_job(faint_images), fn=fit), None, timeout_seconds=1)  # type: ignore[arg-type]


def _without_the_test(error: BaseException) -> BaseException:
    assert error.__traceback__ is not None
    return error.with_traceback(error.__traceback__.tb_next)


def test_an_error_of_this_package_alone_is_told_without_a_traceback() -> None:
    with pytest.raises(ConfigurationError) as found:
        Sampler(0, 10, 1, 0, 1)
    assert "test_context.py" in executor._traceback(found.value), "the user's line stays"
    assert executor._traceback(_without_the_test(found.value)) == ""
    with pytest.raises(TypeError) as bug:
        Sampler("many", 10, 1, 0, 1)  # type: ignore[arg-type]
    assert "shards.py" in executor._traceback(_without_the_test(bug.value))

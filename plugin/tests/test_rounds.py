"""Rounds that go wrong on real executors: what the driver says, how soon, and that the session goes on.

Every failure is followed by a round on the same cluster.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sparkgauge import rounds
from sparkgauge.adapters.tensorflow import launch
from sparkgauge.channel import DriverChannel, ExecutorChannel
from sparkgauge.cluster import standalone
from sparkgauge.errors import ClusterError, ConfigurationError, TrainingError, TrainingTimeout
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.workload import Workload

LIMIT_SECONDS = 10.0
"""From an exception on an executor to the error in the test."""


def fit(context: Any, shard: Any) -> None:
    for step in context.steps(shard):
        context.record_loss(float(len(step.labels)))
    for images, _ in shard.test_batches(100):
        context.record_test(len(images), len(images))


def goes_on(trainings: Any) -> None:
    """The next round on the same cluster is a good one, and finds nothing of the failed one."""
    done = trainings.run_in_session(fit)
    assert done.accuracy_fraction == 1.0
    assert [record.rank for record in done.executors] == [0, 1]
    assert trainings.session._cluster is trainings.cluster  # cleaned, not replaced


def failure(trainings: Any, function: Any, **keywords: Any) -> TrainingError:
    with pytest.raises(TrainingError) as caught:
        trainings.run_in_session(function, **keywords)
    assert standalone.wait_until(lambda: not trainings.cluster._task_processes(), 5)  # killed ones take a moment to go
    assert standalone.wait_until(lambda: not _reservation_threads(), 5)  # a closed socket wakes its thread, later
    return caught.value


def _reservation_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "sparkgauge-reservations"]


def raise_beside_a_sleeper(context: Any, shard: Any) -> None:
    if context.rank == 1:
        raise RuntimeError(f"a bug in fit at {time.time()}")
    time.sleep(600)


def raise_beside_a_collective(context: Any, shard: Any) -> None:
    import tensorflow as tf

    if context.rank == 1:
        time.sleep(1.5)  # the other is waiting by then
        raise RuntimeError(f"a bug in fit at {time.time()}")
    _reduce_once(context, tf)


def _reduce_once(context: Any, tf: Any) -> None:
    def replica() -> Any:
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))

    tf.function(lambda: context.handle.run(replica))()


@pytest.mark.parametrize("function", [raise_beside_a_sleeper, raise_beside_a_collective])
def test_an_exception_on_one_executor_is_the_tests_error_within_seconds(trainings: Any, function: Any) -> None:
    error = failure(trainings, function)
    seconds = time.time() - float(re.search(r"a bug in fit at ([\d.]+)", str(error))[1])
    assert seconds < LIMIT_SECONDS
    assert error.executor == 1
    assert str(error).startswith("Training failed on executor 1 (")
    assert "RuntimeError: a bug in fit" in error.summary
    assert function.__name__ in error.traceback_text and "test_rounds.py" in error.traceback_text
    goes_on(trainings)


def return_a_list(context: Any, shard: Any) -> Any:
    return [0.5]


def return_a_text_as_metric(context: Any, shard: Any) -> Any:
    return {"accuracy_fraction": "0.5"}


def return_nan(context: Any, shard: Any) -> Any:
    return {"accuracy_fraction": float("nan")}


def return_percent(context: Any, shard: Any) -> Any:
    return {"accuracy_fraction": 75.3}


def lose_the_loss(context: Any, shard: Any) -> None:
    for step in context.steps(shard):
        context.record_loss(1.0 if step.index < 2 else float("nan"))


def exit_quietly(context: Any, shard: Any) -> None:
    sys.exit(0)


def forget_to_test(context: Any, shard: Any) -> Any:
    for _ in context.steps(shard):
        pass
    return {"f1": 0.5}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (return_a_list, "TypeError: fit must return a mapping of metric names to numbers or None, got list"),
        (return_a_text_as_metric, "TypeError: metric 'accuracy_fraction' must be a number, got '0.5'"),
        (return_nan, "FloatingPointError: metric 'accuracy_fraction' is nan, not a finite number"),
        (return_percent, "'custom' reported an impossible accuracy: expected a fraction from 0 to 1, got 75.3"),
        (lose_the_loss, "FloatingPointError: the training loss is nan at step 3"),
        (exit_quietly, "SystemExit: 0"),
        (forget_to_test, "'custom' reported no accuracy: expected context.record_test"),
    ],
)
def test_nonsense_is_an_error_and_never_a_result(trainings: Any, function: Any, message: str) -> None:
    assert message in str(failure(trainings, function, executors=1))
    if function is forget_to_test:  # the last
        goes_on(trainings)


def hang(context: Any, shard: Any) -> None:
    time.sleep(600)


def test_a_round_that_hangs_is_cancelled(trainings: Any) -> None:
    began = time.monotonic()
    error = failure(trainings, hang, timeout=5)
    assert isinstance(error, TrainingTimeout)
    assert 5 <= time.monotonic() - began < 5 + LIMIT_SECONDS
    assert "expected at most 5 s, got no result from executor 0, 1 by then. Raise --gauge-timeout" in str(error)
    goes_on(trainings)


def never_leave(context: Any, shard: Any) -> Any:
    from tensorflowonspark.TFSparkNode import TFSparkNode

    TFSparkNode.mgr.shutdown = lambda: time.sleep(600)  # called when the driver has the result
    return {"accuracy_fraction": 1.0}


def test_a_task_that_does_not_end_after_its_result_is_no_result(trainings: Any) -> None:
    error = failure(trainings, never_leave, timeout=4, executors=1)
    assert isinstance(error, TrainingTimeout)
    assert "expected at most 4 s, got the executors' tasks did not end" in str(error)


def lose_the_python_worker(context: Any, shard: Any) -> None:
    import os
    import signal

    if context.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def lose_the_python_worker_of_a_collective(context: Any, shard: Any) -> None:
    import os
    import signal

    import tensorflow as tf

    if context.rank == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    _reduce_once(context, tf)


def lose_the_executor(context: Any, shard: Any) -> None:
    import psutil

    if context.rank == 1:
        time.sleep(0.5)
        psutil.Process().parent().parent().kill()  # the daemon that forked us belongs to the executor's JVM
    time.sleep(600)


@pytest.mark.parametrize(
    "function", [lose_the_python_worker, lose_the_python_worker_of_a_collective, lose_the_executor]
)
def test_a_lost_executor_is_called_lost(trainings: Any, function: Any) -> None:
    began = time.monotonic()
    error = failure(trainings, function)
    assert time.monotonic() - began < 30
    assert str(error).startswith("Executor 1 (")
    assert "was lost during training: got its process ended without a word" in str(error)
    assert error.executor == 1
    goes_on(trainings)


def test_a_function_that_cannot_be_pickled_is_one_clear_error(trainings: Any) -> None:
    lock = threading.Lock()

    def locked(context: Any, shard: Any) -> None:
        with lock:
            pass

    context = trainings.cluster.spark.sparkContext

    def nested(context_: Any, shard: Any) -> None:
        context.parallelize([1]).count()

    for function, reason in ((locked, "cannot pickle '_thread.lock' object"), (nested, "CONTEXT_ONLY_VALID_ON_DRIVER")):
        with pytest.raises(ConfigurationError) as caught:
            trainings.run_in_session(function)
        assert str(caught.value).startswith("The training function cannot be sent to the executors: expected")
        assert reason in str(caught.value) and f".{function.__name__}. Make sessions, locks" in str(caught.value)
        assert caught.value.__suppress_context__
    goes_on(trainings)


def import_what_is_not_there(context: Any, shard: Any) -> None:
    import gauge_users_library  # noqa: F401


def test_a_module_that_executors_lack_is_named(trainings: Any) -> None:
    error = failure(trainings, import_what_is_not_there, executors=1)
    assert "ModuleNotFoundError: No module named 'gauge_users_library'" in error.summary


class LoadsHereOnly:
    """Pickles, and cannot be unpickled."""

    def __call__(self, context: Any, shard: Any) -> None:
        """Never called."""

    def __reduce__(self) -> Any:
        return _refuse_to_load, ()


def _refuse_to_load() -> Any:
    raise RuntimeError("the model's file is on the driver")


def test_a_function_that_executors_cannot_load_is_an_error_before_any_training(trainings: Any) -> None:
    error = failure(trainings, LoadsHereOnly())
    assert error.summary == "An executor failed before TensorFlow's cluster was formed"
    assert "RuntimeError: the model's file is on the driver" in str(error)
    goes_on(trainings)


def test_more_executors_than_the_cluster_has_are_refused_at_once(trainings: Any) -> None:
    session = trainings.session
    with pytest.raises(ConfigurationError, match="Bad value for executors: expected at most the cluster's 2, got 3"):
        trainings.run_in_session(fit, executors=3)
    too_many = replace(Workload.from_keywords({"fn": fit}, session.config), executors=3)
    began = time.monotonic()
    with pytest.raises(ClusterError, match="Too few Spark executors: expected 3 executors, got 2 that the cluster has"):
        session.run_round(too_many, seed=1, index=0, planned=1)
    assert time.monotonic() - began < 5


def step_slowly(context: Any, shard: Any) -> None:
    for _ in context.steps(shard):
        time.sleep(0.1)


def test_an_interrupt_by_the_user_cancels_the_round(trainings: Any) -> None:
    def interrupt(progress: Any) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_round(
            trainings.cluster.spark.sparkContext,
            trainings.job(step_slowly, iterations=600),
            launch.launch,
            timeout_seconds=60,
            on_progress=interrupt,
        )
    assert time.monotonic() - began < 30
    assert trainings.cluster.spark.sparkContext.statusTracker().getActiveJobsIds() == []
    goes_on(trainings)


def test_only_one_executor_tests(trainings: Any) -> None:
    """Curves need not have the same points on every executor."""

    def fit(context: Any, shard: Any) -> None:
        for step in context.steps(shard):
            context.record_loss(float(len(step.labels)))
            if context.rank == 0 and step.index == 1:
                context.record_test(3, len(shard.test_labels))
        if context.rank == 0:
            context.record_test(101, len(shard.test_labels))

    done: Round = trainings.run_in_session(fit)
    assert [(point.step, point.accuracy_fraction) for point in done.curve] == [(2, 3 / 203), (3, 101 / 203)]
    assert done.accuracy_fraction == 101 / 203


# ---- what the driver makes of what it hears; the executors are threads of this process


@pytest.fixture
def heard() -> Iterator[tuple[Any, list[ExecutorChannel]]]:
    """Return the driver's side of a round and the channels of its two executors."""
    job: Any = SimpleNamespace(executors=2)
    with DriverChannel() as channel:
        conversation = rounds._Conversation(channel, job, 30.0, lambda progress: None)
        executors = [ExecutorChannel(channel.address, rank) for rank in range(2)]
        yield conversation, executors
        for executor in executors:
            executor.close()


def _error(conversation: Any) -> Any:
    with pytest.raises(TrainingError) as caught:
        conversation.await_results(lambda: False, lambda: None)
    return caught.value


ECHO = {"summary": "UnavailableError: Collective ops is aborted", "traceback": "Traceback: all_reduce"}


def test_the_cause_is_told_although_its_echo_came_first(heard: Any) -> None:
    conversation, executors = heard
    executors[0].send("error", **ECHO)
    threading.Timer(0.3, executors[1].send, ["error"], {"summary": "ValueError: a bug", "traceback": "the bug"}).start()
    error = _error(conversation)
    assert (error.executor, error.traceback_text) == (1, "the bug")


def test_the_peers_of_a_real_cause_are_not_awaited(heard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PEER_SECONDS", 600.0)
    conversation, executors = heard
    executors[1].send("error", summary="ValueError: a bug", traceback="the bug")
    assert _error(conversation).executor == 1


def test_an_echo_of_an_executor_that_left_without_a_word_is_a_loss(heard: Any) -> None:
    conversation, executors = heard
    executors[0].send("error", **ECHO)
    threading.Timer(0.3, executors[1].close).start()
    error = _error(conversation)
    assert error.executor == 1 and "was lost during training" in error.summary
    assert "Executor 0 noticed it:\nTraceback: all_reduce" in error.traceback_text


def test_an_echo_without_a_cause_is_told_as_it_is(heard: Any) -> None:
    conversation, executors = heard
    executors[0].send("error", **ECHO)
    executors[0].close()  # as an executor does that has raised
    error = _error(conversation)
    assert error.executor == 0 and "UnavailableError: Collective ops is aborted" in error.summary


def test_an_executor_that_has_sent_its_result_may_go(heard: Any) -> None:
    conversation, executors = heard
    executors[1].send("result", metrics={})
    executors[1].close()
    executors[0].send("result", metrics={})
    conversation.await_results(lambda: False, lambda: None)
    assert conversation._lost() == []


def test_a_job_that_spark_ended_for_its_own_reasons_quotes_spark(heard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PEER_SECONDS", 0.1)
    conversation, _ = heard
    with pytest.raises(TrainingError, match="Spark ended the training job: got java.io.IOException: disk full"):
        conversation.await_results(lambda: True, lambda: "trouble\njava.io.IOException: disk full\n  at x.y(z.java)")


def points(*tested: int, step: int = 5) -> list[dict[str, Any]]:
    return [{"step": step, "tested": count, "correct": 0} for count in tested]


def test_a_test_of_a_part_of_the_images_is_no_test() -> None:
    job: Any = SimpleNamespace(model="custom", test_count=100)
    rounds._check_whole_test([points(30, 20), points(50)], job)
    rounds._check_whole_test([points(7, step=2) + points(50), points(50)], job)  # the last one counts
    rounds._check_whole_test([[], []], job)  # reported as a metric
    rounds._check_whole_test([points(1), []], SimpleNamespace(model="custom", test_count=None))  # type: ignore[arg-type]
    with pytest.raises(
        TrainingError, match="expected 100 images.*got 50: 50 on executor 0, 0 on executor 1, after step 5"
    ):
        rounds._check_whole_test([points(50), []], job)
    with pytest.raises(TrainingError, match="got 200: 100 on executor 0, 100 on executor 1"):
        rounds._check_whole_test([points(100), points(100)], job)

"""Trainings with PyTorch on real executors: what is learnt, counted and timed."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from sparkgauge import ceiling, ranks
from sparkgauge.adapters import barrier
from sparkgauge.adapters.torch import by_hand, launch, worker
from sparkgauge.adapters.torch.modules import torch_module
from sparkgauge.errors import ClusterError, TrainingError, TrainingTimeout
from sparkgauge.job import Job
from sparkgauge.records import PHASES, Round
from sparkgauge.rounds import run_round
from sparkgauge.session import _portable

TEST_COUNT = 203
_ROUNDS: dict[Any, Round] = {}


def _run(trainings: Any, fn: Any = None, *, timeout_seconds: float = 120, **changes: Any) -> Round:
    context = trainings.cluster.spark.sparkContext
    return run_round(context, trainings.job(fn, **changes), launch.launch, timeout_seconds=timeout_seconds)


@pytest.fixture
def quick(trainings: Any) -> Any:
    def run(executors: int) -> Round:
        if executors not in _ROUNDS:
            _ROUNDS[executors] = _run(trainings, executors=executors, iterations=50, test_every=20)
        return _ROUNDS[executors]

    return run


def test_two_executors_learn_what_one_learns(quick: Any) -> None:
    one, two = quick(1), quick(2)
    assert [point.step for point in two.curve] == [20, 40, 50]
    for alone, together in zip(one.curve, two.curve, strict=True):
        assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-4)
        assert abs(together.accuracy_fraction - alone.accuracy_fraction) <= 3 / TEST_COUNT
    assert two.curve[-1].train_loss < two.curve[0].train_loss


def test_phases_and_counts(quick: Any) -> None:
    for executors in (1, 2):
        done = quick(executors)
        assert sum(record.test_images for record in done.executors) == TEST_COUNT
        assert done.metrics["achieved_gflops"] > 0
        assert done.metrics["reduced_bytes"] == (0 if executors == 1 else 50 * 145_578 * 4)
        for record in done.executors:
            assert record.phases.total == pytest.approx(done.runtime_seconds, rel=0.02)
            assert all(getattr(record.phases, phase) >= 0 for phase in PHASES)
            assert (record.phases.sync > 0) == (executors > 1)
    assert ranks.straggler_ratio(quick(1)) == 1.0 and ranks.exposed(quick(1)) == 0.0
    assert 1.0 <= ranks.straggler_ratio(quick(2)) <= 2.0 and 0.0 < ranks.exposed(quick(2)) < 1.0


def test_bare_processes_train_the_same(quick: Any, trainings: Any) -> None:
    bare = by_hand.run_by_hand(trainings.job(iterations=50, test_every=20), timeout_seconds=120)
    assert [(p.step, p.train_loss, p.accuracy_fraction) for p in bare.curve] == [
        (p.step, p.train_loss, p.accuracy_fraction) for p in quick(2).curve
    ]


def test_ceilings_are_measured_on_the_executors(trainings: Any) -> None:
    context = trainings.cluster.spark.sparkContext
    one, two = (ceiling.of_executors(context, executors, 1, "cpu") for executors in (1, 2))
    for measured in (one, two):
        assert measured is not None and measured.precision == "float32"
        assert 1 < measured.gemm_gflops < 100_000 and 0.1 < measured.memory_gigabytes_per_second < 10_000


@pytest.mark.parametrize("model", ["resnet20", "cifar10_full", "cifar10_tutorial", "speedrun"])
def test_models_do_not_depend_on_the_number_of_executors(trainings: Any, model: str) -> None:
    one, two = (_run(trainings, model=model, executors=n, iterations=4, global_batch=64) for n in (1, 2))
    # twenty norms one behind the other multiply what rounding does to each
    tolerance = 1e-3 if model == "resnet20" else 1e-4
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=tolerance)


def test_an_epoch_with_a_last_batch_smaller_than_the_number_of_executors(trainings: Any) -> None:
    one, two = (_run(trainings, executors=n, iterations=None, epochs=1) for n in (1, 2))
    assert [record.train_images for record in two.executors] == [500, 501]
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=1e-5)


def make_net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))


def test_a_plain_module_is_trained_by_all_executors_together(trainings: Any) -> None:
    one, two = (_run(trainings, torch_module(make_net), executors=n, iterations=20) for n in (1, 2))
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=1e-4)


def with_an_eigenvector_of_the_other_sign(context: Any, shard: Any) -> dict[str, float]:
    """Train speedrun where the solver of executor 1 prefers other signs, as that of another machine may."""
    import torch

    from sparkgauge.adapters.torch.training import train

    eigh = torch.linalg.eigh

    def other_signs(matrix: Any) -> Any:
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.arange(12) < 11, 1.0, -1.0)

    if context.rank == 1:
        torch.linalg.eigh = other_signs
    try:
        return train("speedrun", context, shard)
    finally:
        torch.linalg.eigh = eigh


def test_executors_whiten_images_alike_whatever_signs_their_solvers_choose(trainings: Any) -> None:
    one, two = (
        _run(trainings, with_an_eigenvector_of_the_other_sign, executors=n, iterations=4, global_batch=64)
        for n in (1, 2)
    )
    assert two.curve[-1].train_loss == pytest.approx(one.curve[-1].train_loss, rel=1e-4)


def with_weights_of_its_own(context: Any, shard: Any) -> dict[str, float]:
    for _ in context.steps(shard):
        pass
    context.record_weights({"layer1": np.full(3, 1.0), "layer2": np.full(3, 1.0 + context.rank)})
    return {"accuracy_fraction": 0.5}


def test_executors_that_trained_different_models_are_an_error(trainings: Any) -> None:
    assert _run(trainings, with_weights_of_its_own, executors=1, iterations=3).accuracy_fraction == 0.5
    with pytest.raises(TrainingError, match=r"did not train the same 'custom'.*layer2 of executor 1 and of executor 0"):
        _run(trainings, with_weights_of_its_own, executors=2, iterations=3)


def uses_the_group(context: Any, shard: Any) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    for step in context.steps(shard):
        total = torch.tensor(float(len(step.labels)), device=context.handle.device)
        dist.all_reduce(total, group=context.handle.group)
        assert total == step.global_batch
        context.record_loss(0.0)
    context.record_test(1, 1)
    return {"threads": torch.get_num_threads()}


def test_a_function_of_the_user_has_the_process_group(trainings: Any) -> None:
    assert _run(trainings, uses_the_group).metrics == {"threads": 1.0}


def leaves_its_peer(context: Any, shard: Any) -> None:
    import torch
    import torch.distributed as dist

    if context.rank == 1:
        raise KeyError("lost my notes")
    dist.all_reduce(torch.ones(1), group=context.handle.group)


def never_ends(context: Any, shard: Any) -> None:
    import time

    time.sleep(600)


def returns_nonsense(context: Any, shard: Any) -> Any:
    return 3


def learns_nothing(context: Any, shard: Any) -> None:
    for _ in context.steps(shard):
        context.record_loss(float("nan"))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (leaves_its_peer, r"executor 1 .*KeyError: 'lost my notes'"),
        (returns_nonsense, "fit must return a mapping"),
        (learns_nothing, "the training loss is nan at step 1"),
    ],
)
def test_a_failing_function_is_named_with_its_executor(trainings: Any, fit: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        _run(trainings, fit)


def test_more_executors_than_slots_are_refused_at_once(trainings: Any) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"expected 3, one for each executor, got 2 free of 2"):
        _run(trainings, executors=3)
    assert time.monotonic() - began < 5  # where Spark would wait without an end
    assert _run(trainings, iterations=2).curve[-1].step == 2


def test_slots_that_others_use_are_said(trainings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "SLOT_SECONDS", 0.5)
    context, reached = trainings.cluster.spark.sparkContext, tmp_path / "reached"
    job = context.parallelize([0], 1).mapPartitions(_portable(functools.partial(occupies, str(reached))))
    other = barrier.in_background(job.collect)
    while not reached.exists():
        time.sleep(0.02)
    with pytest.raises(ClusterError, match="got 1 free of 2, 1 running other tasks"):
        _run(trainings)
    reached.unlink()
    other.close()
    assert _run(trainings, iterations=2).curve[-1].step == 2


def occupies(path: str, rows: Any) -> Any:
    import pathlib
    import time

    pathlib.Path(path).touch()
    while pathlib.Path(path).exists():
        time.sleep(0.02)
    return rows


def meets_another_version(job: Job, rank: int, peers: barrier.Peers) -> None:
    worker.main(worker.Meeting(None, "1.0.0"), job, rank, peers)


def has_no_torch(job: Job, rank: int, peers: barrier.Peers) -> None:
    import sys

    sys.modules["torch"] = None  # type: ignore[assignment]  # what import finds where it is not installed
    worker.main(worker.Meeting(None, "2.13.0"), job, rank, peers)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (meets_another_version, "another PyTorch than the driver: expected torch 1.0.0, got torch "),
        (has_no_torch, "PyTorch cannot be imported on an executor: expected torch 2.13.0"),
    ],
)
def test_an_executor_with_another_torch_or_none_is_named(trainings: Any, entry: Any, said: str) -> None:
    def launch_it(spark_context: Any, job: Job, *, job_group: str, check: Any) -> Any:
        return barrier.launch(spark_context, job, job_group=job_group, check=check, entry=_portable(entry))

    with pytest.raises(TrainingError, match=rf"Training failed on executor \d .*{re.escape(said)}"):
        run_round(trainings.cluster.spark.sparkContext, trainings.job(), launch_it, timeout_seconds=60)


def test_a_function_that_hangs_is_cancelled(trainings: Any) -> None:
    with pytest.raises(TrainingTimeout):
        _run(trainings, never_ends, timeout_seconds=6)
    assert _run(trainings, iterations=2).curve[-1].step == 2  # the next round finds free executors

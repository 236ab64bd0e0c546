"""Caffe nets on real executors: what is learnt, counted and saved, with both engines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="framework caffe needs PyTorch")
pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

import numpy as np

from plugin.tests.caffe_nets import NET, SOLVER, of_database, write_databases, write_project
from sparkgauge.adapters.caffe import engine_caffe, launch
from sparkgauge.adapters.caffe.training import parts
from sparkgauge.caffe.plan import read_plan
from sparkgauge.caffe.weights import read_state, read_weights
from sparkgauge.data.shards import Sampler
from sparkgauge.errors import MachineError, TrainingError
from sparkgauge.models.caffe import path as shipped
from sparkgauge.records import PHASES, Round
from sparkgauge.rounds import run_round
from sparkgauge.workload import Workload

TRAIN_COUNT, TEST_COUNT = 1001, 203
ENGINES = ("torch", "caffe")
BIG_KERNEL, HIGH_RATE = (
    NET.replace("kernel_size: 5", "kernel_size: 50"),
    SOLVER.replace("base_lr: 0.05", "base_lr: 1e30"),
)
_ROUNDS: dict[Any, tuple[Round, Any]] = {}


def need(engine: str) -> str:
    """Skip without pycaffe; SPARKGAUGE_CAFFE=1 says that it must be there."""
    if engine == "caffe":
        try:
            engine_caffe.require()
        except MachineError as error:
            if os.environ.get("SPARKGAUGE_CAFFE") == "1":
                raise
            pytest.skip(str(error))
    return engine


@pytest.fixture
def run(trainings: Any) -> Any:
    def run(plan: Any, **changes: Any) -> Round:
        changes = {"iterations": 20, "global_batch": plan.batch, "plan": plan, "model": plan.model, **changes}
        context = trainings.cluster.spark.sparkContext
        return run_round(context, trainings.job(**changes), launch.launch, timeout_seconds=120)

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def quick(run: Any, saved: Path) -> Any:
    """Return a round of cifar10_quick in two passes, and its weights."""

    def quick(engine: str, executors: int) -> tuple[Round, Any]:
        key = need(engine), executors
        if key not in _ROUNDS:
            plan = read_plan(shipped("cifar10_quick"), engine=engine, model="cifar10_quick", passes=2)
            prefix = saved / f"{engine}-{executors}"
            done = run(plan, executors=executors, test_every=15, save_to=str(prefix))
            _ROUNDS[key] = done, read_weights(f"{prefix}_seed1_iter_20.caffemodel")
        return _ROUNDS[key]

    return quick


@pytest.mark.parametrize("engine", ENGINES)
def test_two_executors_have_the_weights_of_one(quick: Any, engine: str) -> None:
    (one, alone), (two, together) = quick(engine, 1), quick(engine, 2)
    assert [point.step for point in two.curve] == [15, 20]
    assert [point.accuracy_fraction for point in one.curve] == [point.accuracy_fraction for point in two.curve]
    for name, blobs in alone.items():
        for blob, other in zip(blobs, together[name], strict=True):
            np.testing.assert_array_equal(blob, other, name)


@pytest.mark.parametrize("engine", ENGINES)
def test_phases_and_counts(quick: Any, engine: str) -> None:
    for executors in (1, 2):
        done = quick(engine, executors)[0]
        assert sum(record.test_images for record in done.executors) == TEST_COUNT
        assert done.metrics["achieved_gflops"] > 0
        assert done.metrics["reduced_bytes"] == (0 if executors == 1 else 20 * 145_578 * 4)
        for record in done.executors:
            assert len(record.step_seconds) == 19
            assert record.phases.total == pytest.approx(done.runtime_seconds, rel=0.02)
            assert all(getattr(record.phases, phase) >= 0 for phase in PHASES)
            assert record.phases.evaluate > 0
            assert (record.phases.sync > 0) == (executors > 1)


def test_both_engines_take_each_others_weights(run: Any, saved: Path, quick: Any) -> None:
    net = shipped("cifar10_quick").with_name("cifar10_quick_train_test.prototxt").read_text()
    standing_still = 'net: "net.prototxt"\nbase_lr: 0\nlr_policy: "fixed"\nmax_iter: 1\n'
    for first, second in (ENGINES, ENGINES[::-1]):
        tested = quick(first, 2)[0].accuracy_fraction
        solver = write_project(saved / f"by-{second}", net=net, solver=standing_still)
        plan = read_plan(solver, engine=second, weights_file=saved / f"{first}-2_seed1_iter_20.caffemodel")
        assert run(plan, iterations=1).accuracy_fraction == tested


def test_an_epoch_trains_on_every_image_once(run: Any, tmp_path: Path) -> None:
    plan = read_plan(write_project(tmp_path, solver=SOLVER.replace("max_iter: 40", "max_iter: 60")))
    done = run(plan, iterations=None, epochs=1)  # 51 batches, the last of one image: executor 1 trains on it
    assert [record.train_images for record in done.executors] == [500, 501]


def test_training_resumes_where_it_stopped(run: Any, tmp_path: Path) -> None:
    solver = write_project(tmp_path, solver=SOLVER.replace('"step"', '"step"\ntype: "Adam"'))
    run(read_plan(solver), iterations=12, save_to=str(tmp_path / "half"))
    state = tmp_path / "half_seed1_iter_12.solverstate"
    assert read_state(state).iteration == 12
    plan = read_plan(solver, state_file=state)
    run(plan, iterations=8, save_to=str(tmp_path / "resumed"))
    run(read_plan(solver), iterations=20, save_to=str(tmp_path / "whole"))
    ours, whole = (read_weights(tmp_path / f"{name}_seed1_iter_20.caffemodel") for name in ("resumed", "whole"))
    assert all(np.array_equal(a, b) for name in whole for a, b in zip(ours[name], whole[name], strict=True))


def test_a_batch_norm_net_has_the_same_statistics_everywhere(run: Any) -> None:
    done = run(read_plan(shipped("cifar10_full_sigmoid_bn")), iterations=3)
    assert sum(record.test_images for record in done.executors) == TEST_COUNT


def test_the_users_own_net_and_databases(trainings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_project(tmp_path / "nets", net=of_database())
    write_databases(tmp_path / "nets")
    keywords = {"framework": "caffe", "solver": "nets/small_solver.prototxt", "iterations": 40}
    workload = Workload.from_keywords(keywords, trainings.session.config, folders=[tmp_path])
    trainings.session.prepare(workload)
    data = trainings.session.data_of(workload).identity
    done = trainings.session.run_round(workload, seed=1, index=0, planned=1)
    assert (workload.model, data.name, data.train_count, data.test_count) == ("small_solver", "train_lmdb", 61, 23)
    assert done.curve[-1].train_loss < 2.3  # ln 10 is what guessing gives
    assert sum(record.test_images for record in done.executors) == 23


@pytest.mark.parametrize(
    ("net", "solver", "engine", "message"),
    [
        (NET, HIGH_RATE, "torch", "executor . .*loss is not finite"),
        (NET, HIGH_RATE, "caffe", "executor . .*loss is not finite"),
        (BIG_KERNEL, SOLVER, "torch", "kernel does not fit.*net.prototxt:10"),
        (
            BIG_KERNEL,
            SOLVER,
            "caffe",
            "(?s)real Caffe ended.*Check failed.*kernel does not fit.*net.prototxt:10",
        ),
    ],
)
def test_what_goes_wrong_on_an_executor_is_one_error(
    run: Any, tmp_path: Path, net: str, solver: str, engine: str, message: str
) -> None:
    plan = read_plan(write_project(tmp_path, net=net, solver=solver), engine=need(engine))
    with pytest.raises(TrainingError, match=message) as caught:
        run(plan, save_to=str(tmp_path / "none"))
    assert caught.value.executor is not None
    assert not list(tmp_path.glob("none*"))


def test_weights_of_another_net_are_named(run: Any, saved: Path, quick: Any, tmp_path: Path) -> None:
    quick("torch", 2)
    plan = read_plan(write_project(tmp_path), weights_file=saved / "torch-2_seed1_iter_20.caffemodel")
    with pytest.raises(TrainingError, match="Weights are missing.*none of conv, ip.*torch-2_seed1_iter_20"):
        run(plan)


@pytest.mark.parametrize("batch", [0, 1, 7, 100, 101])
@pytest.mark.parametrize(("executors", "passes"), [(1, 2), (2, 2), (2, 4), (3, 3), (4, 12)])
def test_passes_are_cut_the_same_for_any_number_of_executors(batch: int, executors: int, passes: int) -> None:
    dealt = [parts(batch, passes, executors, rank) for rank in range(executors)]
    assert [size for own in dealt for size in own] == parts(batch, passes, 1, 0)
    for rank, own in enumerate(dealt):
        share = Sampler(max(batch, 1), max(batch, 1), executors, rank, seed=1).share(0)
        assert batch == 0 or sum(own) == share.stop - share.start


def test_a_plan_travels(tmp_path: Path) -> None:
    import pickle

    plan = read_plan(write_project(tmp_path))
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert replace(plan, passes=2).digest != plan.digest

"""How a session shares the GPUs out: executors, cores, leases, and what it refuses."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plugin.tests.plugin_runs import make_config, make_workload
from sparkgauge import config as options
from sparkgauge import environment, lease, nvml
from sparkgauge.cluster import conf
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import BaselineError, ConfigurationError, MachineError
from sparkgauge.report.progress import Progress
from sparkgauge.session import GaugeSession

Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return a function that gives this machine so many played GPUs, and 8 cores."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)

    def play(count: int, **fields: Any) -> None:
        listing = tmp_path / "gpus.json"
        listing.write_text(json.dumps([{"name": "A card", "uuid": f"GPU-{n}", **fields} for n in range(count)]))
        monkeypatch.setenv(nvml.PLAYED_VARIABLE, str(listing))

    return play


def session(tmp_path: Path, *, wants_gpus: bool = True, **changes: Any) -> GaugeSession:
    gauge = replace(GaugeConfig.build(lambda name: None, lambda name: None, {}, cores=8), **changes)
    return GaugeSession(gauge, tmp_path, Progress(io.StringIO(), enabled=False), wants_gpus=wants_gpus)


@pytest.mark.parametrize(
    ("gpus", "changes", "executors", "cores", "shares"),
    [
        (1, {}, 1, 8, (("GPU-0",),)),
        (2, {}, 2, 4, (("GPU-0",), ("GPU-1",))),
        (4, {}, 2, 4, (("GPU-0",), ("GPU-1",))),
        (4, {"gpus_per_executor": 2.0}, 2, 4, (("GPU-0", "GPU-1"), ("GPU-2", "GPU-3"))),
        (1, {"gpus_per_executor": 0.5}, 2, 4, (("GPU-0",), ("GPU-0",))),
        (1, {"chosen": frozenset({"executors"})}, 2, 4, (("GPU-0",), ("GPU-0",))),
        (1, {"chosen": frozenset({"cores"}), "cores_per_executor": 3}, 1, 3, (("GPU-0",),)),
        (2, {"master": "spark://host:7077"}, 2, 4, (("",), ("",))),
    ],
)
def test_gpus_decide_on_executors_and_cores(
    gpus: int, changes: dict[str, Any], executors: int, cores: int, shares: Any, play: Play, tmp_path: Path
) -> None:
    play(gpus)
    made = session(tmp_path, **changes)
    assert (made.config.executors, made.config.cores_per_executor) == (executors, cores)
    assert made._gpu_shares("gpu") == shares
    assert made._gpu_shares("gpu") == shares  # of the same lease
    made.stop()


def test_two_sessions_get_different_gpus(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(2)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.0)
    one, other, third = (session(tmp_path, executors=1, chosen=frozenset({"executors"})) for _ in range(3))
    assert (one._gpu_shares("gpu"), other._gpu_shares("gpu")) == ((("GPU-0",),), (("GPU-1",),))
    with pytest.raises(MachineError, match=f"All GPUs are busy.*leased by process {os.getpid()}"):
        third._gpu_shares("gpu")
    assert third._gpu_shares("cpu") == ()  # a CPU test does without
    one.stop()
    assert third._gpu_shares("gpu") == (("GPU-0",),)
    for made in (other, third):
        made.stop()


def test_sessions_without_gpu_tests_take_none(play: Play, tmp_path: Path) -> None:
    play(1)
    made = session(tmp_path, wants_gpus=False)
    assert (made.config.executors, made._wants_gpus) == (2, False)


def test_too_few_gpus_are_said_before_anything_starts(play: Play, tmp_path: Path) -> None:
    play(1)
    made = session(tmp_path, chosen=frozenset({"executors"}))
    gauge = made.test("test_a.py::test_a", timer=lambda *arguments: True)  # type: ignore[arg-type]
    gauge._check_gpus(make_workload(executors=1, device="gpu"))
    with pytest.raises(MachineError, match=r"expected 2 GPUs, got 1\. Train on 1: executors=1, or share"):
        gauge._check_gpus(make_workload(executors=2, device="gpu"))
    play(2)
    crowded = session(tmp_path, executors=3, chosen=frozenset({"executors"}))
    gauge = crowded.test("test_a.py::test_a", timer=lambda *arguments: True)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Some executors of this session share their GPU"):
        gauge._check_gpus(make_workload(executors=2, device="gpu"))


def test_each_model_runs_once_before_its_first_round_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = session(tmp_path, wants_gpus=False)
    taken: list[Any] = []
    monkeypatch.setattr(made, "_run_round", lambda workload, seed, on_progress: taken.append(workload))
    monkeypatch.setattr(made, "cluster", lambda device: None)
    monkeypatch.setattr(made, "data_of", lambda workload: None)
    on_gpu = make_workload(framework="torch", executors=1, device="gpu", iterations=500, test_every=100)
    for workload in (
        on_gpu,
        replace(on_gpu, iterations=300),
        replace(on_gpu, batch_size=64),
        replace(on_gpu, device="cpu"),
        replace(on_gpu, fn=print),
    ):
        made.prepare(workload)
    assert [(one.batch_size, one.iterations, one.test_every) for one in taken] == [(100, 2, None), (64, 2, None)]


def test_no_baseline_of_played_gpus(play: Play, tmp_path: Path) -> None:
    play(1)
    gauge = session(tmp_path).test("test_a.py::test_a", timer=lambda *arguments: True)  # type: ignore[arg-type]
    with pytest.raises(BaselineError, match="GPUs that are played"):
        gauge._store([])


def test_spark_is_asked_for_what_the_executors_get(tmp_path: Path) -> None:
    spec = ClusterSpec(2, 4, 1024, "/env/bin/python", gpus=(("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")))
    asked = {"spark.executor.resource.gpu.amount": "2", "spark.task.resource.gpu.amount": "2"}
    made = conf.spark_conf(spec, secret="s", folder=tmp_path, master_url="spark://h:1", python_path=None)
    assert asked.items() <= made.items() and "spark.worker.resource.gpu.amount" not in made
    offer = conf.gpu_offer(spec, tmp_path)
    assert offer == {
        "spark.worker.resource.gpu.amount": "2",
        "spark.worker.resource.gpu.discoveryScript": str(tmp_path / "gpus" / "discover-gpus"),
    }
    local = replace(spec, master="local-cluster[2,4,1024]")
    inside = conf.spark_conf(local, secret="s", folder=tmp_path, master_url="local", python_path=None)
    assert offer.items() <= inside.items()
    outside = conf.external_conf(replace(spec, master="yarn"))
    assert asked.items() <= outside.items()
    assert outside["spark.executor.resource.gpu.discoveryScript"] == "/env/bin/sparkgauge-gpus"
    without = conf.external_conf(replace(spec, master="yarn", gpus=()))
    assert not any("gpu" in name for name in without) and conf.gpu_offer(replace(spec, gpus=()), tmp_path) == {}
    for bad in ((("GPU-0",),), (("GPU-0",), ())):
        with pytest.raises(ConfigurationError, match="Bad gpus"):
            replace(spec, gpus=bad)


def test_a_fraction_of_an_existing_clusters_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be shared"):
        session(tmp_path, master="yarn", gpus_per_executor=0.5)._gpu_shares("gpu")


@pytest.mark.parametrize(("value", "share"), [("1", 1.0), ("4", 4.0), ("0.5", 0.5), ("1.0", 1.0)])
def test_gpus_per_executor(value: str, share: float) -> None:
    assert options._gpu_share(value, "--gauge-gpus-per-executor") == share


@pytest.mark.parametrize("bad", ["0", "-1", "1.5", "one", "nan", "inf"])
def test_bad_gpus_per_executor(bad: str) -> None:
    with pytest.raises(ConfigurationError, match="a whole number of GPUs, or a fraction"):
        options._gpu_share(bad, "--gauge-gpus-per-executor")


def test_requirements_are_named() -> None:
    assert options._requirements("gpu", "--gauge-require") == {"gpu"}
    with pytest.raises(ConfigurationError, match="one of gpu, got 'tpu'"):
        options._requirements("tpu", "--gauge-require")
    assert make_config().required == frozenset()


@pytest.mark.parametrize(
    ("per_executor", "per_task", "shared"),
    [(1.0, None, False), (0.5, None, True), (1.0, "0.25", True), (2.0, "2", False)],
)
def test_whether_two_executors_may_be_given_the_same_gpu(
    per_executor: float, per_task: str | None, shared: bool, tmp_path: Path
) -> None:
    settings = {} if per_task is None else {"spark.task.resource.gpu.amount": per_task}
    context: Any = SimpleNamespace(getConf=lambda: settings)
    cluster: Any = SimpleNamespace(spark=SimpleNamespace(sparkContext=context))
    assert session(tmp_path, gpus_per_executor=per_executor)._gpus_are_shared(cluster) == shared

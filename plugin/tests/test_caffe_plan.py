"""What is read from a user's Caffe files before anything starts, and every way in which that can fail."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="reading prototxt needs protobuf")

import numpy as np

from plugin.tests.caffe_nets import NET, SOLVER, of_database, write_databases, write_project
from sparkgauge.caffe import lmdb_data, plan, sources, weights
from sparkgauge.caffe.plan import Plan, read_plan
from sparkgauge.caffe.sources import Later
from sparkgauge.config import GaugeConfig
from sparkgauge.data.shards import Sampler
from sparkgauge.errors import ConfigurationError, DataError, GaugeError
from sparkgauge.models.caffe import SOLVERS
from sparkgauge.models.caffe import path as shipped
from sparkgauge.workload import Workload


def configured(**changes: Any) -> GaugeConfig:
    config = GaugeConfig.build(lambda name: None, lambda name: None, {}, cores=4, memory_bytes=8 << 30)
    return replace(config, **{"executors": 2, **changes})


def workload(folder: Path, config: GaugeConfig | None = None, **keywords: Any) -> Workload:
    given = {"framework": "caffe", "solver": "small_solver.prototxt", **keywords}
    return Workload.from_keywords(given, config or configured(), where="test_x.py::test_y", folders=[folder])


def test_a_workload_takes_batch_length_and_tests_from_the_solver(tmp_path: Path) -> None:
    write_project(tmp_path)
    found = workload(tmp_path, configured(profile="full"))
    assert (found.model, found.batch_size, found.iterations, found.test_every) == ("small_solver", 20, 40, 20)
    assert found.plan is not None
    assert found.plan.engine == "torch"
    short = workload(tmp_path)
    assert (short.iterations, short.test_every) == (40, None)  # profile ci has 300, the solver 40
    assert workload(tmp_path, batch_size=8, iterations=5).batch_size == 8


def test_the_batch_may_count_for_each_executor(tmp_path: Path) -> None:
    write_project(tmp_path)
    assert workload(tmp_path, configured(batch="per-executor")).batch_size == 40
    assert workload(tmp_path, configured(batch="per-executor"), executors=1, batch_size=3).batch_size == 3


def test_the_identity_tells_nets_engines_and_starts_apart(tmp_path: Path) -> None:
    write_project(tmp_path)
    first = workload(tmp_path).to_dict()
    assert first["engine"] == "torch"
    assert workload(tmp_path, engine="caffe").to_dict() == {**first, "engine": "caffe"}
    write_project(tmp_path, net=NET.replace("num_output: 6", "num_output: 7"))
    assert workload(tmp_path).to_dict()["solver"] != first["solver"]
    write_project(tmp_path, net="# a comment\n" + NET)
    assert workload(tmp_path).to_dict() == first


@pytest.mark.parametrize("model", SOLVERS)
def test_every_shipped_solver_is_read(model: str, tmp_path: Path) -> None:
    for name in ("mnist_train_lmdb", "mnist_test_lmdb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(b"")
    found = read_plan(shipped(model), model=model, folders=[tmp_path])
    assert found.batch >= 1
    assert (found.lmdb is None) == model.startswith("cifar10")


def test_a_plan_keeps_lines_but_no_paths(tmp_path: Path) -> None:
    found = read_plan(write_project(tmp_path, solver=SOLVER + "display: 10\nsnapshot: 5\nsolver_mode: GPU\n"))
    assert found.where("ip").endswith("net.prototxt:18 (layer 'ip')")
    assert found.superseded == ("display", "solver_mode", "snapshot")
    assert "net.prototxt" not in found.solver
    assert [layer.name for layer in found.net_messages()[0].layer] == ["data", "conv", "relu", "ip", "loss"]


def test_resuming_looks_at_what_would_have_come_next() -> None:
    whole = Sampler(61, 20, 2, 0, seed=1)
    rest = Later(whole, 5)
    assert np.array_equal(rest.batch(2), whole.batch(7))
    assert rest.global_batch_size(2) == whole.global_batch_size(7) == 1


def state(folder: Path, iteration: int, learned: str = "w.caffemodel") -> Path:
    path = folder / "s.solverstate"
    weights.write_state(path, weights.State(iteration, 0, learned, []))
    return path


def test_a_snapshot_shortens_the_training(tmp_path: Path) -> None:
    write_project(tmp_path)
    state(tmp_path, 30)
    weights.write_weights(tmp_path / "w.caffemodel", "small", {"ip": [np.zeros((1, 1))]})
    found = workload(tmp_path, snapshot="s.solverstate")
    assert found.iterations == 10
    assert found.plan is not None
    assert found.plan.weights == (tmp_path / "w.caffemodel").read_bytes()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"solver": "other.prototxt"}, "solver names no file.*other.prototxt.*test_x.py::test_y"),
        ({"solver": None}, "'caffe' trains a solver file.*cifar10_quick.*neither"),
        ({"model": "cifar10_quick"}, "got model and solver"),
        ({"solver": None, "model": "cifar10_quik"}, "Unknown model, did you mean 'cifar10_quick'"),
        ({"fn": print}, "'caffe' trains a solver file.*solver and fn"),
        ({"engine": "theano"}, "Unknown engine.*one of torch, caffe"),
        ({"engine": "caffe", "device": "gpu"}, "'caffe' trains on the CPU only"),
        ({"batch_size": 1}, "at least one image for each of 2 executors"),
        ({"iterations": 41}, "iterations.*at most 40, the solver's.*got 41"),
        ({"passes": 3}, "passes.*a multiple of 2.*got 3"),
        ({"passes": 2, "device": "gpu"}, "passes.*on the CPU"),
        ({"snapshot": "none.solverstate"}, "snapshot names no file"),
        ({"framework": "torch", "model": "cifar10_quick", "solver": "x"}, "solver belongs to framework 'caffe'"),
        ({"save_to": ""}, "Bad value for save_to"),
        ({"options": 5}, "Bad value for options"),
    ],
)
def test_a_bad_keyword_is_refused(tmp_path: Path, keywords: dict[str, Any], message: str) -> None:
    write_project(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        workload(tmp_path, **keywords)


def test_a_batch_smaller_than_the_executors_is_refused(tmp_path: Path) -> None:
    write_project(tmp_path, net=NET.replace("batch_size: 20", "batch_size: 1"))
    with pytest.raises(ConfigurationError, match="batch_size.*each of 2 executors.*got 1"):
        workload(tmp_path)


@pytest.mark.parametrize(
    ("net", "solver", "message"),
    [
        (NET, SOLVER.replace("max_iter: 40", "max_iter 40"), r"Malformed prototxt.*small_solver.prototxt:9"),
        (
            NET.replace("stride: 3", "stride: three"),
            SOLVER,
            r"Malformed prototxt: expected a value of type integer, got three, in .*net.prototxt:15",
        ),
        (NET.rstrip().removesuffix("}"), SOLVER, r"Malformed prototxt.*end of the file.*net.prototxt"),
        (
            NET.replace('"ReLU"', '"Relu"'),
            SOLVER,
            r"'Relu', did you mean 'ReLU'.*net.prototxt:17.*docs/caffe",
        ),
        (NET.replace("stride: 3", "strid: 3"), SOLVER, r"field 'strid'.*did you mean 'stride'.*net.prototxt:15"),
        (NET.replace('bottom: "conv"\n', 'bottom: "cnov"\n'), SOLVER, r"Unknown bottom 'cnov'.*net.prototxt:2"),
        (NET, SOLVER + 'type: "Adm"', r"solver type 'Adm', did you mean 'Adam'.*small_solver.prototxt:10"),
        (NET, SOLVER.replace('"step"', '"steps"'), r"lr_policy 'steps'.*did you mean 'step'"),
        (NET, SOLVER.replace("net.prototxt", "gone.prototxt"), r"File not found.*gone.prototxt"),
        (NET, SOLVER.replace("base_lr: 0.05\n", ""), "No base_lr"),
        (NET.replace("mean_value: 120", "mean_file: 'gone.binaryproto'"), SOLVER, "File not found.*gone.binaryproto"),
        (NET.replace("mean_value: 120", "mirror: true"), SOLVER, "Unsupported transformation 'mirror'"),
        (NET.replace("sparkgauge:cifar10", "gone_lmdb"), SOLVER, "File not found.*gone_lmdb.*net.prototxt:2"),
        (of_database().replace("test_lmdb", "sparkgauge:cifar10"), SOLVER, "different kinds of data"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, net: str, solver: str, message: str) -> None:
    write_project(tmp_path, net=net, solver=solver)
    with pytest.raises(ConfigurationError, match=message):
        workload(tmp_path)


def test_binary_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_project(tmp_path)
    weights.write_weights(tmp_path / "w.caffemodel", "small", {"ip": [np.zeros((3, 4))]})
    content = (tmp_path / "w.caffemodel").read_bytes()
    (tmp_path / "cut.caffemodel").write_bytes(content[:-5])
    with pytest.raises(DataError, match="Truncated or damaged.*cut.caffemodel"):
        workload(tmp_path, weights="cut.caffemodel")
    state(tmp_path, 40)
    with pytest.raises(ConfigurationError, match="Nothing is left to train.*iteration 40, max_iter 40"):
        workload(tmp_path, snapshot="s.solverstate")
    state(tmp_path, 3, learned="gone.caffemodel")
    with pytest.raises(ConfigurationError, match="weights of a solver state are missing.*gone.caffemodel.*weights="):
        workload(tmp_path, snapshot="s.solverstate")
    assert workload(tmp_path, snapshot="s.solverstate", weights="w.caffemodel").iterations == 37


def test_a_mean_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights.write_mean(tmp_path / "mean.binaryproto", np.zeros((3, 32, 31), np.float32))
    write_project(tmp_path, net=NET.replace("mean_value: 120", 'mean_file: "mean.binaryproto"'))
    found = workload(tmp_path).plan
    assert found is not None
    plan.check_mean(found, (3, 32, 31))
    with pytest.raises(
        DataError, match="Mean image of another shape: expected 3x32x32, got 3x32x31.*mean.binaryproto.*prototxt:"
    ):
        plan.check_mean(found, (3, 32, 32))


def test_both_phases_have_one_mean(tmp_path: Path) -> None:
    net = of_database().replace("mean_value: 120", 'mean_file: "a"', 1)
    write_databases(tmp_path)
    write_project(tmp_path, net=net)
    with pytest.raises(ConfigurationError, match="Two mean images.*'a' and ''"):
        workload(tmp_path)


def database_plan(folder: Path) -> Plan:
    write_databases(folder)
    return read_plan(write_project(folder, net=of_database()))


def test_databases_are_decoded_once_and_again_when_they_change(tmp_path: Path) -> None:
    found = database_plan(tmp_path).lmdb
    assert found is not None
    first = lmdb_data.prepare(found, tmp_path / "cache")
    assert (first.train_count, first.test_count, lmdb_data.image_shape(first)) == (61, 23, (1, 12, 12))
    assert lmdb_data.prepare(found, tmp_path / "cache") == first
    images, labels, *_ = lmdb_data.open_arrays(first.folder, found.key)
    assert images.shape == (61, 12, 12, 1) and labels[:3].tolist() == [0, 1, 2]
    (tmp_path / "train_lmdb" / "data.mdb").touch()
    assert lmdb_data.pair(Path(found.train), Path(found.test)).key != found.key


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (5000, "Truncated or damaged LMDB.*train_lmdb"),
        (0, "Empty file: expected Caffe's records, got 0 bytes, in .*train_lmdb"),
    ],
)
def test_a_truncated_database_is_refused_and_nothing_is_left(tmp_path: Path, size: int, said: str) -> None:
    database_plan(tmp_path)
    file = tmp_path / "train_lmdb" / "data.mdb"
    file.write_bytes(file.read_bytes()[:size])
    found = read_plan(tmp_path / "small_solver.prototxt").lmdb
    assert found is not None
    with pytest.raises(GaugeError, match=said):
        lmdb_data.prepare(found, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_no_damaged_page_ends_this_process(tmp_path: Path) -> None:
    """On some liblmdb aborts: in a process that only reads."""
    sources.write_lmdb(tmp_path / "whole", np.zeros((61, 1, 12, 12), np.uint8), np.zeros(61, np.int64))
    file = tmp_path / "whole" / "data.mdb"
    content, page = file.read_bytes(), 4096
    reasons = []
    for start in range(0, len(content), page):
        file.write_bytes(content[:start] + bytes(page) + content[start + page :])
        with pytest.raises(DataError, match="Truncated or damaged LMDB") as caught:
            sources.read_lmdb(tmp_path / "whole")
        reasons.append(str(caught.value))
    assert any("liblmdb ended the process that read it (SIGABRT)" in reason for reason in reasons)


DOCUMENT = Path(__file__).parents[2] / "docs" / "caffe.md"
CODE = re.compile(r"^```(\w+)\n# (\S+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def documented(tmp_path: Path) -> Path:
    """Return a folder with the named code blocks of docs/caffe.md as files."""
    if not DOCUMENT.exists():
        pytest.skip("docs/caffe.md is not in this copy of the package")
    for _, name, content in CODE.findall(DOCUMENT.read_text()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_the_documented_net_is_read(documented: Path) -> None:
    asked: dict[str, Any] = {}
    exec(compile((documented / "test_own_net.py").read_text(), "test_own_net.py", "exec"), asked)
    keywords = asked["test_own_net"].pytestmark[0].kwargs
    found = Workload.from_keywords(keywords, configured(profile="full"), folders=[documented])
    assert (found.model, found.batch_size, found.iterations, found.test_every) == ("own_solver", 100, 2000, 500)
    exec(compile((documented / "test_shipped.py").read_text(), "test_shipped.py", "exec"), asked)
    keywords = asked["test_quick"].pytestmark[0].kwargs
    assert Workload.from_keywords(keywords, configured()).batch_size == 100


def test_the_documented_layer_works(documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="layers need PyTorch")
    from sparkgauge.adapters.caffe import layers
    from sparkgauge.adapters.caffe.engine_torch import TorchEngine
    from sparkgauge.caffe import schema

    added: dict[str, Any] = {"Layer": layers.Layer}
    exec((documented / "plugin/sparkgauge/adapters/caffe/layers/elementwise.py,").read_text(), added)
    monkeypatch.setitem(layers.LAYERS, "AbsVal", added["AbsVal"])
    monkeypatch.setitem(schema.LAYER_PARAMETERS, "AbsVal", ())
    monkeypatch.setattr(schema, "LAYER_TYPES", frozenset(schema.LAYER_PARAMETERS))
    net = NET.replace('type: "ReLU" bottom: "conv" top: "conv"', 'type: "AbsVal" bottom: "conv" top: "abs"')
    net = net.replace('bottom: "conv"\n  top: "ip"', 'bottom: "abs"\n  top: "ip"')
    found = read_plan(write_project(tmp_path / "net", net=net))
    engine = TorchEngine(found.solver_message(), *found.net_messages(), input_shape=(3, 32, 32), batch=4)
    blobs = engine.blobs(np.zeros((4, 3, 32, 32), np.uint8), np.zeros(4, np.int64))
    assert np.array_equal(blobs.data["abs"], np.abs(blobs.data["conv"]))
    assert torch.isfinite(torch.from_numpy(blobs.diff["conv"])).all()


def test_a_net_with_databases_takes_no_other_data(tmp_path: Path) -> None:
    database_plan(tmp_path)
    assert workload(tmp_path).plan is not None
    with pytest.raises(ConfigurationError, match="names its own data.*train_lmdb"):
        workload(tmp_path, data="synthetic")

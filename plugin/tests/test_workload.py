"""Workloads: completing keywords, refusing wrong ones by name, and what makes two of them the same."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge import workload
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import ConfigurationError
from sparkgauge.workload import FRAMEWORKS, KEYWORDS, Workload

COUNTS = ("executors", "iterations", "batch_size", "rounds")
QUICK: dict[str, Any] = {"framework": "tensorflow", "model": "cifar10_quick"}


def configured(ini: dict[str, str] | None = None, **options: Any) -> GaugeConfig:
    """Return a session's configuration on a machine of four cores, with 4 executors unless said otherwise."""
    line = {f"gauge_{name}": value for name, value in {"executors": "4", **options}.items()}
    file = {f"gauge_{name}": value for name, value in (ini or {}).items()}
    return GaugeConfig.build(line.get, file.get, {}, rootdir=Path("/r"), cores=4, memory_bytes=2**34)


def read(keywords: dict[str, Any], config: GaugeConfig | None = None) -> Workload:
    """Return the workload of ``keywords``."""
    return Workload.from_keywords(keywords, config or configured(), where="test_x.py::test_y")


def fit(context: object, shard: object) -> dict[str, float]:
    """Stand in for a user's training function."""
    return {}


def test_defaults_come_from_session_and_profile() -> None:
    found = read(QUICK)
    assert (found.device, found.executors, found.cores_per_executor, found.batch_size) == ("cpu", 4, 1, 100)
    assert (found.iterations, found.epochs, found.rounds, found.warmup_rounds) == (100, None, 5, 0)
    assert (found.runtime_margin_fraction, found.accuracy_margin_fraction) == (0.10, 0.01)
    assert (found.timeout_seconds, found.seed, found.fn, found.data, found.test_every) == (600.0, 1, None, None, None)


@pytest.mark.parametrize(
    ("profile", "model", "iterations", "rounds", "test_every"),
    [
        ("smoke", "cifar10_quick", 30, 2, None),
        ("ci", "cifar10_tutorial", 30, 5, None),
        ("full", "cifar10_quick", 5000, 2, 500),
        ("full", "cifar10_tutorial", 10_000, 2, 1000),
    ],
)
def test_profiles(profile: str, model: str, iterations: int, rounds: int, test_every: int | None) -> None:
    found = read({"model": model}, configured(profile=profile))
    assert (found.iterations, found.rounds, found.test_every) == (iterations, rounds, test_every)


def test_the_tutorial_has_its_own_batch() -> None:
    assert read({"model": "cifar10_tutorial"}).batch_size == 128


def test_keywords_are_taken() -> None:
    found = read(
        {
            **QUICK,
            "device": "gpu",
            "executors": 2,
            "epochs": 1.5,
            "batch_size": 64,
            "rounds": 3,
            "warmup_rounds": 0,
            "seed": 7,
            "runtime_margin": 7.5,
            "speedup_margin": "5%",
            "accuracy_margin": 0.5,
            "timeout": 30,
            "data": "synthetic",
            "test_every": 10,
        }
    )
    assert (found.device, found.executors, found.batch_size, found.rounds) == ("gpu", 2, 64, 3)
    assert (found.epochs, found.iterations, found.warmup_rounds, found.seed) == (1.5, None, 0, 7)
    assert found.runtime_margin_fraction == pytest.approx(0.075)
    assert found.speedup_margin_fraction == pytest.approx(0.05)
    assert found.accuracy_margin_fraction == pytest.approx(0.005)
    assert (found.timeout_seconds, found.data, found.test_every) == (30.0, "synthetic", 10)


def test_command_line_beats_keyword_beats_ini() -> None:
    keywords = {**QUICK, "rounds": 3, "runtime_margin": 5, "seed": 9}
    ini = {"rounds": "6", "runtime_margin": "20", "seed": "2"}
    by_ini = read(QUICK, configured(ini))
    assert (by_ini.rounds, by_ini.runtime_margin_fraction, by_ini.seed) == (6, 0.2, 2)
    by_keyword = read(keywords, configured(ini))
    assert (by_keyword.rounds, by_keyword.runtime_margin_fraction, by_keyword.seed) == (3, 0.05, 9)
    by_line = read(keywords, configured(ini, rounds="1", runtime_margin="400", seed="5"))
    assert (by_line.rounds, by_line.runtime_margin_fraction, by_line.seed) == (1, 4.0, 5)


def test_a_bad_keyword_is_refused_even_where_the_command_line_wins() -> None:
    with pytest.raises(ConfigurationError, match="rounds"):
        read({**QUICK, "rounds": 0}, configured(rounds="2"))


def test_none_means_not_said() -> None:
    assert read({**QUICK, **dict.fromkeys(set(KEYWORDS) - set(QUICK))}) == read(QUICK)


@pytest.mark.parametrize(
    ("keyword", "suggestion"), [("modle", "'model'"), ("batchsize", "'batch_size'"), ("executer", "'executors'")]
)
def test_unknown_keyword_is_named_with_the_closest(keyword: str, suggestion: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({**QUICK, keyword: 1})
    assert repr(keyword) in str(caught.value)
    assert f"did you mean {suggestion}" in str(caught.value)
    assert "test_x.py::test_y" in str(caught.value)


def test_unknown_keyword_without_a_close_one_lists_all() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({**QUICK, "zzz": None})
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in KEYWORDS)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[(name, bad) for name in COUNTS for bad in (0, -1, True, "2", 1.5)],
        *[("warmup_rounds", bad) for bad in (-1, True, "1")],
        *[("epochs", bad) for bad in (0, -1, True, "1", float("nan"), float("inf"))],
        *[("test_every", bad) for bad in (0, False)],
        *[("seed", bad) for bad in (-1, 2**32, "x", 1.5, True)],
        *[("runtime_margin", bad) for bad in (-1, "x", True, float("nan"))],
        *[("accuracy_margin", bad) for bad in (-1, 101, "x")],
        *[("timeout", bad) for bad in (0, -1, "x", float("inf"))],
        *[("data", bad) for bad in ("", 5)],
        *[("options", bad) for bad in (5, {1: 2}, {"a": object()}, {"a": float("nan")})],
        ("fn", 5),
    ],
)
def test_bad_value_is_refused_by_name(keyword: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({**QUICK, keyword: value})
    assert f"Bad value for {keyword}" in str(caught.value)
    assert "expected" in str(caught.value)
    assert "test_x.py::test_y" in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"framework": "tensorflo"}, "Unknown framework, did you mean 'tensorflow'.*one of tensorflow, caffe, torch"),
        ({"framework": ["tensorflow"]}, "Unknown framework"),
        ({"model": "cifar10_quik"}, "Unknown model, did you mean 'cifar10_quick'.*cifar10_quick, cifar10_tutorial"),
        ({"model": ["cifar10_quick"]}, "Unknown model"),
        ({"device": "tpu"}, "Unknown device.*one of cpu, gpu"),
        ({"framework": "torch", "model": "resnet20", "launcher": "torchrun"}, "one of barrier, torchdistributor"),
        ({"model": "cifar10_quick", "launcher": "barrier"}, "'tensorflow' has one launcher"),
        ({"solver": "x.prototxt"}, "solver belongs to framework 'caffe'"),
        ({"iterations": 5, "epochs": 1}, "either iterations or epochs.*iterations=5 and epochs=1"),
    ],
)
def test_unknown_names_list_what_is_known(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read({**QUICK, **keywords})


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="No model given.*fn="):
        read({"framework": "tensorflow"})


@pytest.mark.parametrize("executors", [3, 4])
def test_executors_up_to_the_clusters(executors: int) -> None:
    assert read({**QUICK, "executors": executors}).executors == executors


def test_more_executors_than_the_cluster_has() -> None:
    with pytest.raises(ConfigurationError, match="at most the cluster's 4, got 5.*--gauge-executors 5"):
        read({**QUICK, "executors": 5})


def test_every_executor_gets_an_image() -> None:
    assert read({**QUICK, "executors": 3, "batch_size": 3}).batch_size == 3
    with pytest.raises(ConfigurationError, match="batch_size.*3 executors"):
        read({**QUICK, "executors": 3, "batch_size": 2})


def test_function_takes_the_models_place() -> None:
    found = read({**QUICK, "fn": fit, "options": {"width": 8, "sizes": (1, 2)}})
    assert (found.model, found.fn, found.iterations, found.batch_size) == ("custom", fit, 100, 100)
    assert found.options == {"width": 8, "sizes": [1, 2]}
    assert found.to_dict()["function"] == f"{__name__}:fit"


def test_function_without_a_name_is_known_by_its_class() -> None:
    assert read({"fn": functools.partial(fit, 1)}).to_dict()["function"] == "functools:partial"


def test_full_length_of_a_users_function_is_its_own() -> None:
    found = read({"fn": fit}, configured(profile="full"))
    assert (found.iterations, found.epochs, found.test_every) == (None, None, None)


class Point:
    """An installed entry point that loads to ``value``."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self._loaded = name, "some.module:fit", value

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register three models as an installed package would."""
    points = [Point("mine", fit), Point("broken", ImportError("no such thing")), Point("number", 5)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == workload.ENTRY_POINT_GROUP else [])


@pytest.mark.usefixtures("registered")
def test_registered_model() -> None:
    found = read({"model": "mine"})
    assert (found.framework, found.model, found.fn) == ("tensorflow", "mine", fit)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("broken", "'broken' does not load.*some.module:fit.*ImportError: no such thing"),
        ("number", "Bad value for model.*fit\\(context, shard\\).*5"),
        ("nine", "did you mean 'mine'"),
    ],
)
def test_registered_model_that_does_not_work(model: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read({"model": model})


def test_built_in_models_have_recipes() -> None:
    for name, spec in FRAMEWORKS.items():
        assert name == "caffe" or set(spec.models) <= set(workload.RECIPES)  # a solver file is a recipe of its own


def test_identity_is_json_and_leaves_out_how_it_is_measured() -> None:
    found = read({**QUICK, "options": {"a": 1}})
    identity = found.to_dict()
    assert json.loads(json.dumps(identity)) == identity
    for name, value in {"rounds": 9, "seed": 9, "runtime_margin_fraction": 9.0, "timeout_seconds": 9.0}.items():
        assert dataclasses.replace(found, **{name: value}).to_dict() == identity
    for name in ("executors", "cores_per_executor", "iterations", "batch_size"):
        assert dataclasses.replace(found, **{name: 99}).to_dict() != identity


VALUES = st.one_of(st.none(), st.integers(), st.text(), st.floats())


@given(st.dictionaries(st.sampled_from([*KEYWORDS, "other"]), VALUES))
def test_any_keywords_are_read_or_refused_as_configuration(keywords: dict[str, Any]) -> None:
    try:
        found = read({**QUICK, **keywords})
    except ConfigurationError:
        return
    assert found.executors >= 1
    assert found.batch_size >= found.executors
    assert (found.iterations is None) != (found.epochs is None)


class Table:
    """What tells a DataFrame from other things."""

    schema = sparkSession = mapInArrow = None


def test_dataframes_are_read_with_their_columns() -> None:
    rows, fresh = Table(), Table()
    found = read({**QUICK, "data": rows, "test_data": fresh, "image_column": "pixels", "image_shape": [28, 28, 1]})
    data: Any = found.data
    assert (data.train, data.test, data.test_fraction) == (rows, fresh, None)
    assert (data.image_column, data.label_column, data.image_shape) == ("pixels", "label", (28, 28, 1))
    parts: list[Any] = [read({**QUICK, "data": rows, "test_fraction": 0.2}).data for _ in range(2)]
    assert parts[0].key == parts[1].key != data.key
    assert found.to_dict() == read(QUICK).to_dict()  # data has an identity of its own


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"data": Table()},
            "A DataFrame needs a test set: expected test_data= with another, or test_fraction=, got neit",
        ),
        ({"data": Table(), "test_data": Table(), "test_fraction": 0.1}, "got both"),
        ({"data": Table(), "test_data": 3}, "Bad value for test_data: expected a Spark DataFrame, got 3"),
        *[
            ({"data": Table(), "test_fraction": bad}, "Bad value for test_fraction")
            for bad in (0, 1, -0.1, "0.2", True)
        ],
        *[
            ({"data": Table(), "test_fraction": 0.1, "image_shape": bad}, "image_shape")
            for bad in ((), (0, 1), 3, "32", (1, 2, 3, 4))
        ],
        ({"test_data": Table()}, "test_data= belongs to a DataFrame: expected data= with a DataFrame as well"),
        ({"data": "synthetic", "image_column": "x"}, "image_column= belongs to a DataFrame"),
    ],
)
def test_dataframes_without_a_test_set_or_with_bad_columns_are_refused(keywords: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read({**QUICK, **keywords})


def test_checkpoints_belong_to_frameworks_that_can_go_on() -> None:
    assert read(QUICK).retries == 0 and "checkpoint_every" not in read(QUICK).to_dict()
    found = read({**QUICK, "framework": "torch", "checkpoint_every": 10, "checkpoint_folder": "hdfs://x/y"})
    assert (found.checkpoint_every, found.checkpoint_folder) == (10, "hdfs://x/y")
    assert found.to_dict()["checkpoint_every"] == 10 and "checkpoint_folder" not in found.to_dict()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"checkpoint_every": 10},
            "Checkpoints are not written here: expected framework 'torch' with launcher 'barrier'",
        ),
        ({"framework": "torch", "launcher": "torchdistributor", "checkpoint_every": 10}, "not written here"),
        ({"framework": "torch", "checkpoint_every": 0}, "Bad value for checkpoint_every"),
        ({"framework": "torch", "checkpoint_folder": "/x"}, "A checkpoint folder without checkpoints"),
    ],
)
def test_checkpoints_that_nobody_would_write_are_refused(keywords: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read({**QUICK, **keywords})

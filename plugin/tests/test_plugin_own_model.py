"""A user's own model, from docs/own-model.md: every code block is extracted and executed, in one session."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from plugin.tests.plugin_runs import Finished, Project, hardware_class

DOCUMENT = Path(__file__).parents[2] / "docs" / "own-model.md"
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TRAVELS = """
import functools

import helper
import pytest
from helper import halve

LIMIT = helper.LIMIT


class Fit:
    def __init__(self, share):
        self.share = share

    def __call__(self, context, shard):
        return fit(context, shard)

    def method(self, context, shard):
        return fit(context, shard)


def fit(context, shard, extra=0.0):
    for step in context.steps(shard):
        context.record_loss(helper.loss_of(step.labels))
    tested = len(shard.test_labels[shard.test_range])
    context.record_test(tested * halve(LIMIT) // LIMIT, tested)
    return {"module_count": float(__name__ == "test_travels"), "extra": extra, "deep": helper.deeper.depth()}


@pytest.mark.parametrize("way", ["function", "partial", "callable", "method"])
def test_travels(train, way):
    ways = {
        "function": fit,
        "partial": functools.partial(fit, extra=0.0),
        "callable": Fit(0.5),
        "method": Fit(0.5).method,
    }
    run = train(fn=ways[way], iterations=2, rounds=1)
    assert run.record.rounds[0].accuracy_fraction == 0.5
    assert run.record.rounds[0].metrics == {"module_count": 1.0, "extra": 0.0, "deep": 3.0}
"""

HELPER = """
import deeper

LIMIT = 10


def loss_of(labels):
    return float(len(labels))


def halve(number):
    return number // 2
"""

DEEPER = """
def depth():
    return 3.0
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Return the session over everything that the document shows, which replaces an unreadable baseline."""
    folder = tmp_path_factory.mktemp("own-model")
    project = Project(folder / "project", folder / "cache").write(
        **{name: text for name, text in _files().items() if name != "sketch"},
        test_travels=TRAVELS,
        helper=HELPER,
        deeper=DEEPER,
    )
    _register(folder / "installed")
    _damage(project)
    return project.run(
        *("--gauge-profile", "smoke", "--gauge-data", "synthetic", "--gauge-executors", "2"),
        *("--gauge-update", "all", "-o", f"pythonpath={folder / 'installed'}"),
        name="run",
    )


def test_every_code_block_is_a_file_or_an_entry_point() -> None:
    assert sorted(_files()) == [
        *("my_checkpointed", "my_linear", "my_module", "my_training", "sketch"),
        *("test_my_checkpointed", "test_my_linear", "test_my_module", "test_my_training"),
    ]
    for name, text in _files().items():
        compile(text, name, "exec")
    assert _entry_points() == {"linear": "my_linear:fit"}


def test_the_documented_models_train_and_are_gated(finished: Finished) -> None:
    models = ("test_my_network", "test_my_network_on_one_executor", "test_linear", "test_my_module")
    assert finished.passed(*models, "test_my_checkpointed"), finished.output
    assert finished.report("test_my_network").properties["gauge_parameters"].startswith("match: parameters 17,386")


def test_updating_all_replaces_even_an_unreadable_baseline(finished: Finished) -> None:
    (path,) = (finished.folder.parent / "project" / "baselines").glob("*/test_my_training__test_my_network.smoke.json")
    stored = json.loads(path.read_text())
    assert stored["approved"]["why"] == "recorded with --gauge-update all"
    assert stored["workload"]["function"] == "my_training:fit"
    assert stored["workload"]["options"] == {"learning_rate": 0.02}
    rounds = len(stored["samples"]["runtime_seconds"])  # two planned, and those that a noisy machine asks for
    assert rounds >= 2 and stored["samples"]["parameters"] == [17386.0] * rounds


@pytest.mark.parametrize("way", ["function", "partial", "callable", "method"])
def test_functions_travel_with_the_modules_they_refer_to(way: str, finished: Finished) -> None:
    assert finished.passed(f"test_travels[{way}]"), finished.output


def _files() -> dict[str, str]:
    """Return the document's Python blocks by the name in their first line, without ``.py``."""
    blocks = [text for language, text in CODE.findall(DOCUMENT.read_text(encoding="utf-8")) if language == "python"]
    return {text.splitlines()[0].removeprefix("# ").removesuffix(".py"): text for text in blocks}


def _entry_points() -> dict[str, str]:
    (block,) = [text for language, text in CODE.findall(DOCUMENT.read_text(encoding="utf-8")) if language == "toml"]
    heading, *lines = block.splitlines()
    assert heading == '[project.entry-points."sparkgauge.models"]'
    return {name: value.strip('"') for name, _, value in (line.partition(" = ") for line in lines)}


def _register(site: Path) -> None:
    """Write what installing a project with the document's entry points would leave in site-packages."""
    folder = site / "my_project-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-project\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in _entry_points().items()]
    (folder / "entry_points.txt").write_text("\n".join(["[sparkgauge.models]", *lines]) + "\n")


def _damage(project: Project) -> None:
    """Put garbage where the session is going to store a baseline."""
    path = project.folder / "baselines" / hardware_class() / "test_my_training__test_my_network.smoke.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")

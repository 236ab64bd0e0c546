"""``--gauge-against``: the checkout, what the other side imports, the conversation, the pairs, and whole sessions."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkgauge
from sparkgauge import speedup
from sparkgauge.against.child import (
    Mirror,
    collected_paths,
    environment_of,
    forwarded,
    gauge_arguments,
    has_own_code,
    mirrored_paths,
)
from sparkgauge.against.duel import Duel, Order, PairedDecision, PairPlan, paired_decision
from sparkgauge.against.explain import explanation
from sparkgauge.against.opponent import Invocation, Opponent, OpponentError
from sparkgauge.against.server import Abandoned, Server
from sparkgauge.against.worktree import Checkout, Reference, find_reference
from sparkgauge.channel import DriverChannel, ExecutorChannel
from sparkgauge.cluster import watchdog
from sparkgauge.config import GaugeConfig
from sparkgauge.errors import ConfigurationError, GaugeError, NotMeasuredError
from sparkgauge.gate import Measurement, Policy, samples_of
from sparkgauge.records import DataIdentity, Environment, ExecutorRecord, PhaseSeconds, Round, RunRecord, to_json
from sparkgauge.training import Budget

TEST_ID = "bench/test_own.py::test_gated"
ANSWER_SECONDS = 20.0
SESSION_SECONDS = 300.0
"""Far above what a session takes: a hang must fail here."""

BENCH = """
import time

import pytest

PAUSE_SECONDS = 0.02


def fit(context, shard):
    for step in context.steps(shard):
        time.sleep(PAUSE_SECONDS)
        context.record_loss(2.0 * len(step.labels))
    with context.phase("evaluate"):
        tested = shard.test_range.stop - shard.test_range.start
        context.record_test(tested // 2, tested)


@pytest.mark.gauge(framework="torch", fn=fit, iterations=3)
def test_gated(trained, baseline):
    assert trained.accuracy >= baseline.accuracy
    assert trained.runtime <= baseline.runtime
"""

ONLY_THERE = """

@pytest.mark.gauge(framework="torch", fn=fit, iterations=3)
def test_gone(trained, baseline):
    assert trained.runtime <= baseline.runtime
"""

ONLY_HERE = """

@pytest.mark.gauge(framework="torch", fn=fit, iterations=2, rounds=1)
def test_new(trained, baseline):
    assert trained.runtime <= baseline.runtime
"""


# --- the checkout


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run([*command, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def make_repository(folder: Path, **files: str) -> Path:
    """Return a repository with one commit of ``files``; ``a__b`` names ``a/b.py``."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet")
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "First")
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return make_repository(tmp_path / "repo", bench__test_own=BENCH, src__engine="SPEED = 1\n")


def leftovers(repository: Path) -> list[str]:
    """Return what is left of checkouts: folders, and git's notes."""
    folders = [str(path) for path in repository.parent.glob("tmp/sparkgauge-against-*")]
    return folders + git(repository, "worktree", "list").splitlines()[1:]


def test_the_commit_is_checked_out_without_uncommitted_changes(repository: Path) -> None:
    (repository / "src/engine.py").write_text("SPEED = 2\n")
    reference = find_reference("HEAD", repository / "src")
    assert (reference.root, reference.subject) == (repository.resolve(), "First")
    assert reference.commit == git(repository, "rev-parse", "HEAD")
    checkout = Checkout(reference)
    assert (checkout.tree / "src/engine.py").read_text() == "SPEED = 1\n"
    (checkout.tree / "left.txt").write_text("by a test")
    checkout.remove()
    checkout.remove()
    assert leftovers(repository) == []
    assert (repository / "src/engine.py").read_text() == "SPEED = 2\n"


def test_hooks_of_the_working_tree_do_not_run(repository: Path) -> None:
    hook = repository / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
    hook.chmod(0o755)
    Checkout(find_reference("HEAD", repository)).remove()
    assert not (repository / "ran").exists()


def test_variables_of_a_git_hook_do_not_mislead(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    Checkout(find_reference("HEAD", repository)).remove()


@pytest.mark.parametrize("name", ["nothing", "HEAD~1", "--all", "", "HEAD:src"])
def test_a_bad_commit_is_named(repository: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="--gauge-against") as caught:
        find_reference(name, repository)
    assert repr(name) in str(caught.value)


def test_outside_git_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs a git repository.*not a git repository"):
        find_reference("HEAD", tmp_path)


def test_without_git_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    with pytest.raises(ConfigurationError, match="git on the PATH"):
        find_reference("HEAD", repository)


def test_a_shallow_clone_is_explained(repository: Path) -> None:
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "Second")
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "--quiet", "--depth", "1", f"file://{repository}", str(clone))
    with pytest.raises(ConfigurationError, match="shallow.*unshallow"):
        find_reference("HEAD~1", clone)


def test_a_failed_checkout_leaves_nothing(repository: Path) -> None:
    reference = dataclasses.replace(find_reference("HEAD", repository), commit="0" * 40)
    with pytest.raises(GaugeError, match="git cannot check HEAD out"):
        Checkout(reference)
    assert leftovers(repository) == []


# --- where the other side imports from


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    for name in ("repo/src", "repo/.venv/lib", "repo/new", "tree/src", "tree/bench", "repo/bench", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    return Mirror(tmp_path / "repo", tmp_path / "tree")


def test_the_repositorys_import_paths_are_mirrored(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    root, tree = mirror.root, mirror.tree
    monkeypatch.chdir(root)
    paths = ["", str(root / "src"), str(root / ".venv/lib"), str(root / "new"), "/usr/lib", str(root / "src")]
    assert mirrored_paths(mirror, paths, []) == [str(tree), str(tree / "src")]
    assert mirrored_paths(mirror, paths, [root / "bench"]) == [str(tree / "bench"), str(tree), str(tree / "src")]


def test_a_source_outside_the_repository_is_refused(mirror: Mirror) -> None:
    with pytest.raises(ConfigurationError, match="gauge_source.*elsewhere"):
        mirrored_paths(mirror, [], [mirror.root.parent / "elsewhere"])


def test_a_link_into_the_repository_is_followed(mirror: Mirror) -> None:
    link = mirror.root.parent / "link"
    link.symlink_to(mirror.root)
    assert mirror.inside(link / "src") == mirror.tree / "src"
    assert mirror.inside(mirror.root.parent / "repository") is None


def test_the_other_sides_environment(mirror: Mirror) -> None:
    root = mirror.root
    given = {"PYTHONPATH": f"{root}/src:{root.parent}/elsewhere", "HOME": "/h", "PYTEST_ADDOPTS": "--junitxml=x"}
    made = environment_of(mirror, given, [str(mirror.tree / "src")], "5ec7e7")
    assert made["PYTHONPATH"].split(os.pathsep) == [str(mirror.tree / "src"), str(root.parent / "elsewhere")]
    assert (made["HOME"], made["SPARKGAUGE_SERVE_SECRET"]) == ("/h", "5ec7e7")
    assert "PYTEST_ADDOPTS" not in made


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("-p one -q --junitxml=out.xml perf", "-p one"),
        ("-pone -Werror -o a=b --import-mode=importlib", "-pone -Werror -o a=b --import-mode=importlib"),
        ("--import-mode append --gauge-update new -k fast -x -n 4", "--import-mode append"),
        ("-p", "-p"),
    ],
)
def test_arguments_that_both_sides_need(line: str, kept: str) -> None:
    assert forwarded(line.split()) == kept.split()


def make_config(**options: str) -> GaugeConfig:
    values = {f"gauge_{name}": value for name, value in options.items()}
    return GaugeConfig.build(values.get, lambda name: "", {}, cores=4, memory_bytes=2**34)


def test_both_sides_train_alike() -> None:
    plain = gauge_arguments(make_config(against="HEAD", rounds="3", inject="feed=10", baselines="b"))
    assert plain == [
        *("--gauge-executors", "2", "--gauge-cores", "2", "--gauge-memory", "1024m"),
        *("--gauge-master", "embedded", "--gauge-profile", "ci"),
    ]
    said = gauge_arguments(make_config(data="synthetic", timeout="30"))
    assert said[-4:] == ["--gauge-data", "synthetic", "--gauge-timeout", "30.0"]


def test_paths_that_the_commit_has(mirror: Mirror) -> None:
    root, tree = mirror.root, mirror.tree
    (tree / "bench/test_a.py").touch()
    given = [str(root / "bench"), str(root / "new"), f"{root}/src/x.py::test"]
    assert collected_paths(mirror, given, [root / "bench/test_a.py", root / "bench/test_new.py"]) == [
        str(tree / "bench")
    ]
    assert collected_paths(mirror, [], [root / "bench/test_a.py"]) == [str(tree / "bench/test_a.py")]


def test_whether_code_of_the_repository_is_tested(tmp_path: Path) -> None:
    def module(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(__file__=str(tmp_path / name))

    tests = {tmp_path / "perf/test_a.py"}
    others = [module("perf/test_a.py"), module("conftest.py"), module(".venv/site-packages/engine.py"), object()]
    assert not has_own_code(tmp_path, others, tests)
    assert has_own_code(tmp_path, [*others, module("src/engine.py")], tests)


# --- the conversation


PHASES = PhaseSeconds(launch=0.5, compute=1.0, sync=0.1)


def make_round(seed: int, seconds: float = 2.0, compute: float = 1.0, accuracy: float = 0.5) -> Round:
    phases = dataclasses.replace(PHASES, compute=compute)
    executors = tuple(ExecutorRecord(rank, "here", phases, (0.1,), 10, 10, 1.0) for rank in (0, 1))
    return Round(seed, seconds, accuracy, 100.0, executors, (), 0.1, "2026-11-22T00:00:00Z")


def make_run(label: str = "trained", *rounds: Round, **workload: Any) -> RunRecord:
    data = DataIdentity("cifar10", "synthetic", "ab", 100, 50)
    environment = Environment("linux-2c", "CPU", 2, 1, (), "Linux", {})
    return RunRecord(TEST_ID, label, {"iterations": 3, **workload}, "smoke", data, environment, "abc+dirty", rounds)


@dataclasses.dataclass
class FakeTraining:
    """What a server and a duel need of a training."""

    label: str
    workload: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(timeout_seconds=5.0))
    rounds: list[Round] = dataclasses.field(default_factory=list)
    timed: bool = False
    rounds_at_once: int = 1
    max_rounds: int = 3
    budget: Budget = dataclasses.field(default_factory=lambda: Budget(100.0))
    run_round: Callable[..., Round] = lambda workload, seed, index, planned: make_round(seed)

    def next_seed(self) -> int:
        return 1 + len(self.rounds)


class FakeTest:
    """A test on the serving side, without Spark."""

    test_id = TEST_ID

    def __init__(self, *labels: str, error: Exception | None = None) -> None:
        self.trainings = [FakeTraining(label) for label in labels]
        self.session = self
        self.prepared = 0
        self._error = error

    def prepare(self, workload: Any) -> None:
        self.prepared += 1

    def run_round(self, workload: Any, seed: int, index: int, planned: int) -> Round:
        if self._error is not None:
            raise self._error
        return make_round(seed)

    def timer(self, label: str, workload: Any, take: Callable[[], Round], rounds: int, warmups: int) -> bool:
        take()
        return False

    def training(self, label: str) -> FakeTraining | None:
        return next((one for one in self.trainings if one.label == label), None)

    def describe(self, training: FakeTraining) -> RunRecord:
        return make_run(training.label, *training.rounds)


class Conversation:
    """A server on a real socket, and the asking side's end of it."""

    def __init__(self, folder: Path) -> None:
        self.channel = DriverChannel()
        self.server = Server(ExecutorChannel(self.channel.address, 0), root=folder, folder=folder / "none")
        assert self.hear()["kind"] == "hello"

    def ask(self, number: int, kind: str, test_id: str = TEST_ID, label: str = "trained", **content: Any) -> None:
        message = {"kind": kind, "number": number, "test_id": test_id, "label": label, **content}
        self.channel.broadcast(message)

    def hear(self) -> dict[str, Any]:
        return self.channel.inbox.get(timeout=ANSWER_SECONDS)


@pytest.fixture
def conversation(tmp_path: Path) -> Iterator[Conversation]:
    made = Conversation(tmp_path)
    yield made
    made.channel.broadcast({"kind": "bye"})
    made.channel.close()


def test_rounds_are_served_until_another_test_is_asked_for(conversation: Conversation) -> None:
    test = FakeTest("trained")
    conversation.ask(1, "prepare")
    conversation.ask(2, "round", seed=7, index=0)
    conversation.ask(3, "round", test_id="later")
    with pytest.raises(Abandoned):
        conversation.server.settle(test)  # type: ignore[arg-type]
    ready, taken = conversation.hear(), conversation.hear()
    assert (ready["kind"], ready["answers"], ready["run"]["rounds"]) == ("prepare", 1, [])
    assert (taken["kind"], taken["answers"], taken["round"]["seed"]) == ("round", 2, 7)
    assert taken["round"] == to_json(make_round(7))
    assert test.trainings[0].timed
    assert conversation.server.is_asked_for("later", []) is True


def test_a_training_not_made_yet_lets_the_test_go_on(conversation: Conversation) -> None:
    test = FakeTest("one")
    conversation.ask(1, "prepare", label="one")
    conversation.ask(2, "prepare", label="two")
    conversation.server.settle(test)  # type: ignore[arg-type]
    assert len(test.trainings[0].rounds) == 1, "what the test does next finds a measurement"
    test.trainings.append(FakeTraining("two"))
    conversation.ask(3, "round", label="three", seed=1, index=0)
    conversation.server.settle(test)  # type: ignore[arg-type]
    conversation.ask(4, "round", label="two", seed=3, index=1)
    conversation.ask(5, "round", test_id="later")
    conversation.server.finish(TEST_ID, test, reason="no such training", failed=False)  # type: ignore[arg-type]
    answers = [conversation.hear() for _ in range(4)]
    assert [(one["kind"], one["answers"]) for one in answers] == [
        ("prepare", 1),
        ("prepare", 2),
        ("absent", 3),
        ("round", 4),
    ]
    assert answers[2]["reason"] == "no such training"


def test_a_failed_round_is_told_and_not_the_end(conversation: Conversation) -> None:
    test = FakeTest("trained", error=GaugeError("No luck"))
    conversation.ask(1, "round", seed=1, index=0)
    conversation.ask(2, "prepare")
    conversation.ask(3, "round", test_id="later")
    with pytest.raises(Abandoned):
        conversation.server.settle(test)  # type: ignore[arg-type]
    failed, ready = conversation.hear(), conversation.hear()
    assert (failed["kind"], failed["reason"], ready["kind"]) == ("failed", "No luck", "prepare")


def test_tests_run_only_when_asked_for(conversation: Conversation) -> None:
    conversation.ask(1, "prepare", test_id="gone")
    conversation.ask(2, "prepare", test_id="second")
    assert conversation.server.is_asked_for("first", ["second"]) is False
    assert conversation.hear()["kind"] == "absent"
    assert conversation.server.is_asked_for("second", []) is True
    conversation.channel.broadcast({"kind": "bye"})
    conversation.server.finish("second", None, reason="it broke", failed=True)
    answer = conversation.hear()
    assert (answer["kind"], answer["reason"]) == ("failed", "it broke")
    assert conversation.server.is_asked_for("third", []) is None


def test_the_working_trees_code_in_the_checkout_is_refused(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = types.ModuleType("engine")
    stray.__file__ = str(tmp_path / "src/engine.py")
    monkeypatch.setitem(sys.modules, "engine", stray)
    conversation.ask(1, "prepare")
    conversation.ask(2, "round", test_id="later")
    with pytest.raises(Abandoned):
        conversation.server.settle(FakeTest("trained"))  # type: ignore[arg-type]
    answer = conversation.hear()
    assert answer["kind"] == "failed"
    assert "import the working tree's code" in answer["reason"] and "engine" in answer["reason"]


# --- the pairs


@given(st.integers(0, 2**32), st.text(max_size=8))
def test_sides_take_turns_in_going_first(seed: int, name: str) -> None:
    first, again = Order(seed, name), Order(seed, name)
    turns = [first.other_first() for _ in range(8)]
    assert [again.other_first() for _ in range(8)] == turns
    assert all(turns[i] != turns[i + 1] for i in range(0, 8, 2)), "ABBA or BAAB in every two pairs"
    assert first.taken == ["AB" if turn else "BA" for turn in turns]


def test_orders_differ_between_trainings() -> None:
    orders = [Order(1, str(name)) for name in range(40)]
    assert {order.other_first() for order in orders} == {True, False}


@pytest.mark.parametrize(
    ("after", "better", "status"),
    [
        ((2.0, 2.02, 4.0), "lower", "match"),
        ((2.6, 2.65, 5.2), "lower", "regressed"),
        ((2.6, 2.65, 5.2), "higher", "improved"),
        ((1.5, 1.55, 3.0), "lower", "improved"),
        ((2.0, 3.0, 4.0), "lower", "inconclusive"),
        ((2.0,), "lower", "inconclusive"),
    ],
)
def test_pairs_remove_what_both_sides_share(after: tuple[float, ...], better: Any, status: str) -> None:
    before = (2.0, 2.03, 4.0)[: len(after)]  # the machine was half as fast in the last pair
    decision = paired_decision(before, after, better=better, scale="ratio", margin=0.1, confidence=0.95)
    assert decision.status == status


PAIRS = st.lists(
    st.tuples(st.floats(min_value=0.1, max_value=1e3), st.floats(min_value=0.1, max_value=1e3)), min_size=2, max_size=9
)
LOOKS: dict[str, Any] = {"margin": 0.1, "confidence": 0.95, "plan": PairPlan(2, 9)}
MIRRORED = {"regressed": "improved", "improved": "regressed"}


def decide_pairs(pairs: list[tuple[float, float]], better: Any = "lower", **parts: Any) -> PairedDecision:
    before, after = zip(*pairs, strict=True)
    return paired_decision(before, after, better=better, scale="ratio", **{**LOOKS, **parts})


@settings(deadline=None)
@given(PAIRS)
def test_swapping_the_sides_of_pairs_mirrors_the_verdict(pairs: list[tuple[float, float]]) -> None:
    one, other = decide_pairs(pairs), decide_pairs([(b, a) for a, b in pairs])
    # what is not worse may also be better: "match" is the one-sided verdict and has no mirror image of its own
    if one.status in MIRRORED:
        assert other.status == MIRRORED[one.status] or other.pairs < one.pairs
    rates = decide_pairs([(1.0 / a, 1.0 / b) for a, b in pairs], better="higher")
    assert (rates.status, rates.pairs) == (one.status, one.pairs)


@settings(deadline=None)
@given(PAIRS, st.floats(min_value=1e-3, max_value=1e3))
def test_verdicts_on_pairs_do_not_depend_on_the_unit(pairs: list[tuple[float, float]], unit: float) -> None:
    assert decide_pairs([(a * unit, b * unit) for a, b in pairs]).status == decide_pairs(pairs).status


@settings(deadline=None)
@given(PAIRS, st.floats(min_value=1.0, max_value=20.0))
def test_a_larger_slowdown_of_pairs_never_turns_regressed_into_match(
    pairs: list[tuple[float, float]], slowdown: float
) -> None:
    if decide_pairs(pairs).status == "regressed":
        assert decide_pairs([(a, b * slowdown) for a, b in pairs]).status == "regressed"


def test_the_looks_at_pairs_are_planned_and_spend_the_error_probability() -> None:
    steady = [(2.0, 2.0 * factor) for factor in (1.3, 1.31, 1.29, 1.3, 1.31, 1.3, 1.29, 1.3)]
    early = decide_pairs(steady, plan=PairPlan(3, 8))
    assert (early.status, early.pairs) == ("regressed", 3), "later pairs are not looked at once it is decided"
    assert early.p_value is not None and early.p_value < 0.025
    whole = decide_pairs(steady, plan=PairPlan(8, 8))
    assert (whole.status, whole.pairs) == ("regressed", 8)
    assert early.change.confidence == whole.change.confidence == 0.95
    # a look that is followed by others has a wider interval than the same pairs have as the only look
    alone = decide_pairs(steady[:3], plan=PairPlan(3, 3)).change
    assert early.change.low < alone.low < alone.high < early.change.high
    waiting = decide_pairs(steady[:2], plan=PairPlan(3, 8))
    assert (waiting.status, waiting.change.is_bounded, waiting.p_value) == ("inconclusive", False, None)
    assert waiting.change.estimate == pytest.approx(1.305, rel=1e-3)


@pytest.mark.parametrize(("first", "last"), [(1, 5), (5, 4), (0, 0)])
def test_plans_that_make_no_sense_are_refused(first: int, last: int) -> None:
    with pytest.raises(ConfigurationError, match="Bad plan of pairs"):
        PairPlan(first, last)


def test_false_alarms_stay_rare_over_all_looks_at_pairs() -> None:
    generator = random.Random(7)
    alarms = 0
    for _ in range(200):
        pairs = [(math.exp(generator.gauss(0, 0.1)), math.exp(generator.gauss(0, 0.1))) for _ in range(9)]
        alarms += decide_pairs(pairs, margin=0.0).status == "regressed"
    assert alarms <= 10  # 2.5 % of 200 is 5; the seed is fixed


def test_accuracies_are_no_surer_than_the_test_set() -> None:
    parts: Any = {"better": "higher", "scale": "difference", "margin": 0.01, "confidence": 0.95}
    before, after = (0.70, 0.71, 0.72), (0.701, 0.711, 0.7212)
    assert paired_decision(before, after, **parts).status == "match"
    assert paired_decision(before, after, **parts, floor_sd=0.02).status == "inconclusive"
    assert paired_decision(before, before, **parts, floor_sd=0.02).status == "match", "the same training, bit by bit"


class FakeOpponent:
    """Answers a duel's requests from a script."""

    reference = Reference("HEAD", "c0ffee" * 6, "First", Path("/repo"))
    not_there = "not at HEAD (c0ffeec0ff)"

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]], has: bool = True) -> None:
        self._answer, self._has = answer, has
        self.requests: list[dict[str, Any]] = []

    def has(self, test_id: str) -> bool:
        return self._has

    def ask(self, kind: str, **content: Any) -> int:
        self.requests.append({"kind": kind, **content})
        return len(self.requests) - 1

    def answer(self, number: int, timeout_seconds: float) -> dict[str, Any]:
        return self._answer(self.requests[number])

    def failure(self, summary: str, reason: str) -> OpponentError:
        return OpponentError(summary, actual=reason)


def willing(seconds: float = 2.0, **workload: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the answers of a side that has every training."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["kind"] == "prepare":
            return {"kind": "prepare", "run": to_json(make_run(request["label"], **workload))}
        slow = 1.0 if request["label"] != "slow" else 4.0
        return {"kind": "round", "round": to_json(make_round(request["seed"], seconds * slow))}

    return answer


def fight(opponent: FakeOpponent, label: str = "trained", rounds: int = 3) -> Duel:
    """Return a duel over ``rounds`` pairs of one training."""
    duel = Duel(opponent, TEST_ID, seed=1)  # type: ignore[arg-type]
    add_pairs(duel, label, rounds)
    return duel


def add_pairs(duel: Duel, label: str, rounds: int) -> None:
    training = FakeTraining(label)
    duel.attach(training)  # type: ignore[arg-type]
    duel.announce([training])  # type: ignore[list-item]
    duel.meet(label, make_run(label))
    for seed in range(1, rounds + 1):
        duel.pair(label, seed, lambda: None)


def measure(*seconds: float, more: Any = None, **parts: Any) -> Measurement:
    run = make_run("trained", *(make_round(1 + i, one) for i, one in enumerate(seconds)))
    return Measurement(samples_of(run, "runtime_seconds"), more=more, **parts)


def test_the_other_sides_rounds_are_kept_and_compared() -> None:
    duel = fight(FakeOpponent(willing()))
    seen: list[str] = []
    quantity = duel.quantity("runtime_seconds", "trained", Policy(), lambda verdict, _: seen.append(verdict.status))
    verdict = measure(3.0, 3.1, 3.05) <= quantity
    assert (verdict.status, bool(verdict), verdict.baseline_count) == ("regressed", False, 3)
    assert verdict.baseline_file == "HEAD (c0ffeec0ff)" and verdict.change == pytest.approx(1.525, rel=0.01)
    assert (measure(2.0, 2.01, 2.0) <= quantity).status == "match"
    assert seen == ["regressed", "match"]
    run = duel.run("trained")
    assert run is not None and [one.seed for one in run.rounds] == [1, 2, 3]
    assert run.commit == FakeOpponent.reference.commit
    assert sorted(duel.orders["trained"][:2]) == ["AB", "BA"]


def test_own_rounds_come_before_or_after_as_planned() -> None:
    opponent = FakeOpponent(willing())
    duel = fight(opponent, rounds=0)
    events: list[str] = []
    original = opponent.ask
    opponent.ask = lambda kind, **parts: (events.append("A"), original(kind, **parts))[1]  # type: ignore[method-assign]
    for seed in (1, 2, 3, 4):
        duel.pair("trained", seed, lambda: events.append("B"))
    pairs = ["".join(events[i : i + 2]) for i in range(0, 8, 2)]
    assert pairs == duel.orders["trained"]


def test_more_pairs_are_taken_while_undecided() -> None:
    opponent = FakeOpponent(willing())
    duel = fight(opponent, rounds=1)
    training = FakeTraining("trained", rounds=[make_round(1)])
    duel.attach(training)  # type: ignore[arg-type]
    assert training.rounds_at_once == 2

    def more() -> Any:
        if len(training.rounds) == 3:
            return None
        training.rounds.append(training.run_round(training.workload, training.next_seed(), 0, 0))
        return samples_of(make_run("trained", *training.rounds), "runtime_seconds")

    quantity = duel.quantity("runtime_seconds", "trained", Policy(), lambda *_: None)
    verdict = measure(2.0, more=more) <= quantity
    assert (verdict.status, verdict.candidate_count, verdict.baseline_count) == ("match", 2, 2)
    assert [one["seed"] for one in opponent.requests if one["kind"] == "round"] == [1, 2]


@pytest.mark.parametrize(("policy", "passed"), [("fail", False), ("skip", True)])
def test_undecided_pairs_never_just_pass(policy: Any, passed: bool) -> None:
    quantity = fight(FakeOpponent(willing())).quantity(
        "runtime_seconds", "trained", Policy(inconclusive=policy), lambda *_: None
    )
    verdict = measure(1.0, 2.0, 4.0) <= quantity
    assert (verdict.status, verdict.passed) == ("inconclusive", passed)


def test_a_pair_with_a_retried_round_is_no_pair() -> None:
    opponent = FakeOpponent(willing())
    duel = fight(opponent, rounds=0)
    training = FakeTraining("trained")
    duel.attach(training)  # type: ignore[arg-type]
    duel.pair("trained", 1, lambda: training.rounds.append(make_round(1)))
    duel.pair("trained", 2, lambda: training.rounds.append(dataclasses.replace(make_round(2), invalid="retried")))
    own, other = make_run("trained", *training.rounds), duel.run("trained")
    assert other is not None
    assert [one.seed for one in own.valid_rounds] == [one.seed for one in other.valid_rounds] == [1]
    assert other.rounds[1].invalid == "its counterpart is no sample: retried"


def test_speedups_are_compared_pair_by_pair() -> None:
    duel = fight(FakeOpponent(willing()), "fast")
    add_pairs(duel, "slow", 3)
    sides = [types.SimpleNamespace(label="fast", runtime=measure(2.0, 2.02, 2.01))]
    sides.append(types.SimpleNamespace(label="slow", runtime=measure(4.0, 4.02, 4.01)))
    verdict = speedup(sides[0], over=sides[1]) >= duel.quantity("speedup_ratio", "trained", Policy(), lambda *_: None)
    assert (verdict.status, verdict.expected, verdict.actual) == ("regressed", 4.0, pytest.approx(2.0, rel=0.01))


def test_a_test_that_exists_here_only_is_neither_failed_nor_passed() -> None:
    duel = fight(FakeOpponent(willing(), has=False))
    verdict = measure(2.0, 2.0) <= duel.quantity("runtime_seconds", "trained", Policy(), lambda *_: None)
    assert (verdict.status, verdict.passed, verdict.reason) == ("missing", True, "not at HEAD (c0ffeec0ff)")
    assert duel.notes() == [f"not compared: {TEST_ID} trained: not at HEAD (c0ffeec0ff)"]
    assert duel.run("trained") is None


def test_a_training_that_exists_here_only_is_said() -> None:
    duel = fight(FakeOpponent(lambda request: {"kind": "absent", "reason": "no such training"}))
    verdict = measure(2.0, 2.0) <= duel.quantity("runtime_seconds", "trained", Policy(), lambda *_: None)
    assert (verdict.status, verdict.reason) == ("missing", "not at HEAD (c0ffeec0ff): no such training")


def test_other_work_is_not_compared() -> None:
    duel = fight(FakeOpponent(willing(iterations=9)))
    verdict = measure(2.0, 2.0) <= duel.quantity("runtime_seconds", "trained", Policy(), lambda *_: None)
    assert (verdict.status, verdict.passed) == ("not_comparable", False)
    assert "iterations" in verdict.reason and "HEAD" in verdict.hint


def test_what_fails_on_the_other_side_is_an_error() -> None:
    with pytest.raises(OpponentError, match="does not run.*ImportError"):
        fight(FakeOpponent(lambda request: {"kind": "failed", "reason": "ImportError: no engine"}))


def test_unpaired_rounds_are_not_measured() -> None:
    quantity = fight(FakeOpponent(willing()), rounds=2).quantity(
        "runtime_seconds", "trained", Policy(), lambda *_: None
    )
    with pytest.raises(NotMeasuredError, match="no pairs"):
        bool(measure(2.0, 2.0, 2.0) <= quantity)


def test_the_serving_side_judges_nothing() -> None:
    slow = measure(9.0, policy=Policy(serving=True))
    for verdict in (slow <= 1.0, slow < 2.0):
        assert (verdict.status, bool(verdict)) == ("generated", True)


def test_phases_of_both_sides_are_shown_and_the_slower_one_named() -> None:
    seconds = [1.0, 1.02, 0.99, 1.01, 1.0, 0.98]
    before = make_run("trained", *(make_round(i, 2.0 + s, s) for i, s in enumerate(seconds)))
    after = make_run("trained", *(make_round(i, 3.0 + s, s + 1.0) for i, s in enumerate(seconds)))
    lines = explanation(before, after, "HEAD")
    assert "HEAD -> working tree" in lines[0] and "compute 1.00 -> 2.00 s" in lines[0]
    assert "compute explains it: +1.00 s" in lines[1]
    assert len(explanation(before, before, "HEAD")) == 1
    assert explanation(make_run(), after, "HEAD") == []


# --- the process on the other side, without Spark


def plugin_arguments() -> list[str]:
    names = {point.name for point in metadata.entry_points(group="pytest11")}
    return [] if "sparkgauge" in names else ["-p", "sparkgauge.plugin"]


def child_environment(**more: str) -> dict[str, str]:
    foreign = ("CI", "PYTEST_", "SPARKGAUGE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    inherited = map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    return {**kept, "PYTHONPATH": os.pathsep.join([*inherited, str(Path(sparkgauge.__file__).parents[1])]), **more}


def start(repository: Path, tests: list[str], paths: list[str] | None = None, **config: str) -> Opponent:
    """Return the started other side of ``repository``'s last commit."""
    opponent = Opponent(
        find_reference("HEAD", repository), make_config(against="HEAD", data="synthetic", executors="1", **config)
    )
    invocation = Invocation(
        folder=repository,
        rootdir=repository,
        ini_file=None,
        arguments=plugin_arguments(),
        paths=paths or ["bench"],
        search_path=[str(repository)],
        sources=[],
        environ=child_environment(),
    )
    opponent.start(invocation, tests, tests)
    return opponent


def test_the_other_side_says_which_tests_it_has_and_leaves(repository: Path) -> None:
    text = (repository / "bench/test_own.py").read_text()
    (repository / "bench/test_own.py").write_text(text + ONLY_THERE)
    git(repository, "commit", "--quiet", "--all", "--message", "Second")
    opponent = start(repository, [TEST_ID, "bench/test_own.py::test_new"])
    try:
        assert opponent.has(TEST_ID) and not opponent.has("bench/test_own.py::test_new")
        assert opponent.only_there == ["bench/test_own.py::test_gone"]
        assert "only at HEAD, not compared: bench/test_own.py::test_gone" in opponent.notes()
        assert any("Second" in line for line in opponent.header(own_code=True))
        assert any("gauge_source" in line for line in opponent.header(own_code=False))
        answer = opponent.answer(opponent.ask("prepare", test_id="unknown", label="trained"), ANSWER_SECONDS)
        assert answer["kind"] == "absent"
    finally:
        opponent.stop()
    opponent.stop()
    assert leftovers(repository) == []


def test_the_other_side_ends_with_this_one(repository: Path) -> None:
    opponent = start(repository, [TEST_ID])
    child: Any = opponent._child
    assert opponent._channel is not None
    opponent._channel.close()  # as the end of this process would, without a word
    assert child._process.wait(ANSWER_SECONDS) != 0
    assert leftovers(repository) == []


def test_a_crash_is_quoted(repository: Path) -> None:
    opponent = start(repository, [TEST_ID])
    child: Any = opponent._child
    child._process.kill()
    with pytest.raises(OpponentError, match="pytest at HEAD has ended.*signal 9"):
        opponent.answer(opponent.ask("prepare", test_id=TEST_ID, label="trained"), ANSWER_SECONDS)
    opponent.stop()
    assert leftovers(repository) == []


@pytest.mark.parametrize(
    ("files", "tests", "message"),
    [
        ({"conftest": "raise RuntimeError('broken there')"}, [TEST_ID], "has ended.*exit status 4(.|\n)*broken there"),
        ({"bench__test_own": "import missing_engine"}, [TEST_ID], "None of the selected(.|\n)*missing_engine"),
        ({}, ["bench/test_own.py::test_new"], "None of the selected tests exists at HEAD"),
        ({}, ["perf/test_other.py::test_new"], "none of the test files"),
    ],
)
def test_a_side_that_cannot_be_compared_with_is_explained(
    repository: Path, files: dict[str, str], tests: list[str], message: str
) -> None:
    for name, text in files.items():
        (repository / f"{name.replace('__', '/')}.py").write_text(text)
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "Broken")
    with pytest.raises(GaugeError, match=message):
        start(repository, tests, paths=[tests[0]])
    assert leftovers(repository) == []


def test_an_interpreter_that_is_none_is_named(repository: Path) -> None:
    with pytest.raises(ConfigurationError, match="--gauge-against-python"):
        start(repository, [TEST_ID], against_python=str(repository / "no-python"))
    assert leftovers(repository) == []


# --- whole sessions


@dataclasses.dataclass
class Finished:
    """What a session printed and left."""

    status: int
    output: str
    report: dict[str, Any]
    mark: str
    seconds: float

    def verdicts(self, test: str) -> dict[str, str]:
        found = [one for one in self.report["verdicts"] if one["test_id"].endswith(f"::{test}")]
        return {one["metric"]: one["status"] for one in found}


def run_pytest(repository: Path, *arguments: str) -> Finished:
    """Return the finished session ``pytest ARGUMENTS`` in ``repository``."""
    mark, report = uuid.uuid4().hex, repository.parent / "report.json"
    report.unlink(missing_ok=True)
    environ = child_environment(
        TMPDIR=str(repository.parent / "tmp"),
        XDG_CACHE_HOME=str(repository.parent / "cache"),
        SESSION_MARK=mark,
        COLUMNS="140",
        PYTHONDONTWRITEBYTECODE="1",  # the repository must stay as it is
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", *plugin_arguments(), *arguments, "--gauge-report", str(report)]
    with open(repository.parent / "output", "w+") as output:
        process = subprocess.Popen(command, cwd=repository, env=environ, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(SESSION_SECONDS)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read()
    content = json.loads(report.read_text()) if report.exists() else {}
    return Finished(status, text, content, f"SESSION_MARK={mark}", time.monotonic() - began)


SESSION = (
    *("bench", "-p", "no:cacheprovider", "--gauge-against", "HEAD", "--gauge-data", "synthetic"),
    *("--gauge-profile", "smoke", "--gauge-executors", "1", "--gauge-rounds", "3", "--gauge-max-rounds", "5"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("against")
    (folder / "tmp").mkdir()
    return make_repository(folder / "repo", bench__test_own=BENCH + ONLY_THERE)


def assert_nothing_left(project: Path, finished: Finished) -> None:
    assert watchdog.marked_processes(finished.mark) == []
    assert leftovers(project) == []
    assert git(project, "status", "--porcelain") in ("", "M bench/test_own.py"), "nothing was written there"


def test_unchanged_code_is_not_found_slower(project: Path) -> None:
    (project / "bench/test_own.py").write_text(BENCH + ONLY_HERE)
    finished = run_pytest(project, *SESSION, "-rs")
    output = finished.output
    assert finished.verdicts("test_gated")["accuracy_fraction"] == "match", output
    assert finished.verdicts("test_gated")["runtime_seconds"] in ("match", "inconclusive"), output
    assert finished.verdicts("test_new") == {"runtime_seconds": "missing"}, output
    assert "not a pass: runtime_seconds missing: not at HEAD" in output
    assert "only at HEAD, not compared: bench/test_own.py::test_gone" in output
    assert "1 skipped" in output
    assert "test_gated at HEAD" in output
    against = finished.report["against"]
    (other,) = against["runs"]
    own = next(run for run in finished.report["runs"] if run["test_id"] == TEST_ID)
    assert other["commit"] == git(project, "rev-parse", "HEAD") == own["commit"].removesuffix("+dirty")
    assert [one["seed"] for one in other["rounds"]] == [one["seed"] for one in own["rounds"]]
    assert len(against["orders"][TEST_ID]["trained"]) == len(own["rounds"]) >= 3
    assert_nothing_left(project, finished)


def test_an_uncommitted_slowdown_is_a_regression(project: Path) -> None:
    (project / "bench/test_own.py").write_text(BENCH.replace("PAUSE_SECONDS = 0.02", "PAUSE_SECONDS = 1.0"))
    finished = run_pytest(project, *SESSION)
    assert finished.status == 1, finished.output
    assert finished.verdicts("test_gated") == {
        "accuracy_fraction": "match",
        "runtime_seconds": "regressed",
    }, finished.output
    assert "HEAD -> working tree" in finished.output
    assert_nothing_left(project, finished)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gauge-against", "nothing"), "No such commit"),
        (("--gauge-against", "HEAD", "--gauge-update", "new"), "either --gauge-against or --gauge-update"),
    ],
)
def test_a_bad_option_ends_the_run_before_collection(project: Path, arguments: tuple[str, ...], message: str) -> None:
    finished = run_pytest(project, *arguments)
    assert finished.status == 4, finished.output
    assert message in finished.output

"""Baselines on disk: names, round trips, refusals of every kind of bad file, and writes that fail half-way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugin.tests import made_up
from plugin.tests.made_up import DATA, make_round
from plugin.tests.made_up import MACHINE as ENVIRONMENT
from sparkgauge.errors import BaselineError, ConfigurationError
from sparkgauge.records import (
    SCHEMA_VERSION,
    Approval,
    Baseline,
    RunRecord,
    to_json,
)
from sparkgauge.store import (
    LARGEST_BYTES,
    BaselineStore,
    baseline_of,
    comparable,
    parse,
    run_samples,
    sample_key,
    slug,
    with_missing,
)

WORKLOAD: dict[str, Any] = {"framework": "tensorflow", "model": "cifar10_quick", "executors": 2}
APPROVAL = Approval("me", "2026-11-22T00:00:00Z", "first")
TEST_ID = "perf/test_tensorflow.py::test_quick"


def make_run(label: str = "trained", seeds: tuple[int, ...] = (1, 2, 3), **fields: Any) -> RunRecord:
    """Return a run of two executors whose rounds take 10.0, 10.1, ... seconds."""
    rounds = [
        make_round(seed, 10.0 + i / 10, 2, accuracy_fraction=0.7 + i / 100, metrics={"loss": 1.5})
        for i, seed in enumerate(seeds)
    ]
    rounds = [dataclasses.replace(one, images_per_second=1000.0 + i) for i, one in enumerate(rounds)]
    return made_up.make_run(*rounds, **{"test_id": TEST_ID, "label": label, "workload": WORKLOAD, **fields})


BASELINE = baseline_of([make_run()], APPROVAL)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def changed(**fields: Any) -> str:
    """Return the baseline's JSON with fields replaced."""
    return json.dumps({**to_json(BASELINE), **fields})


def test_round_trip_is_exact_and_stable(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path / "baselines")
    path = store.path_for(TEST_ID, hardware_class="linux-2c", profile="ci")
    store.write(path, BASELINE)
    assert path == tmp_path / "baselines/linux-2c/perf-test_tensorflow__test_quick.ci.json"
    read = store.read(path)
    assert read == BASELINE
    first = path.read_bytes()
    assert first.endswith(b"}\n") and b"\n  " in first
    assert read is not None
    store.write(path, dataclasses.replace(read, samples=dict(reversed(read.samples.items()))))
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_missing_file_is_none(tmp_path: Path) -> None:
    assert BaselineStore(tmp_path).read(tmp_path / "nothing.json") is None


@pytest.mark.parametrize(
    ("test_id", "expected"),
    [
        ("test_tensorflow.py::test_quick", "test_tensorflow__test_quick"),
        ("test_tensorflow.py::test_quick[a-b]", "test_tensorflow__test_quick__a-b"),
        ("perf/gpu/test_x.py::test_y", "perf-gpu-test_x__test_y"),
    ],
)
def test_plain_tests_get_plain_names(test_id: str, expected: str) -> None:
    assert slug(test_id) == expected


def test_names_that_could_collide_get_a_digest() -> None:
    ids = [
        "test_a.py::test_b[c]",
        "test_a.py::test_b__c",
        "test_a.py::test_b::c",
        "test_a.py::Test_b::c",
        "test_a__test_b.py::c",
        "test_a.py::test_B[c]",
        "test_a.py::test_b[C]",
        "test_a.py::test_b[c/d]",
        "test_a.py::test_b[c.d]",
        "test/a.py::test_b[c]",
        "test-a.py::test_b[c]",
        "test_a.py::test_b_[c]",
        "test_a.py::test_b[_c]",
        "test_a.py::test_b[" + "x" * 300 + "]",
        "test_a.py::test_b[" + "x" * 301 + "]",
        "äöü",
        "\ud800",
        "",
    ]
    names = [slug(test_id).lower() for test_id in ids]
    assert len(set(names)) == len(ids)


@given(st.lists(st.text(max_size=40), min_size=2, max_size=6, unique=True))
def test_slugs_are_safe_and_distinct(parts: list[str]) -> None:
    ids = [f"test_a.py::test_b[{part}]" for part in parts]
    names = [slug(test_id) for test_id in ids]
    assert len({name.lower() for name in names}) == len(ids)
    for name in names:
        assert len(name) < 150 and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


@pytest.mark.parametrize("bad", ["", "..", "a/b", ".hidden", "a b", "a\\b"])
def test_folder_names_cannot_leave_the_store(tmp_path: Path, bad: str) -> None:
    store = BaselineStore(tmp_path)
    with pytest.raises(ConfigurationError, match="Bad hardware class"):
        store.path_for(TEST_ID, hardware_class=bad, profile="ci")
    with pytest.raises(ConfigurationError, match="Bad profile"):
        store.path_for(TEST_ID, hardware_class="x", profile=bad)


def test_profiles_and_labels_live_apart(tmp_path: Path) -> None:
    store = BaselineStore(tmp_path)
    names = {store.path_for(TEST_ID, hardware_class="x", profile=profile).name for profile in ("ci", "full", "smoke")}
    assert len(names) == 3
    assert sample_key("trained", "runtime_seconds") == "runtime_seconds"
    assert sample_key("cpu", "runtime_seconds") == "cpu.runtime_seconds"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "JSON in UTF-8"),
        ("{", "JSON in UTF-8"),
        ("[]", "got list"),
        ("null", "got NoneType"),
        ("{}", "schema None"),
        (changed(schema=True), "schema True"),
        (changed(schema="1"), "schema '1'"),
        (changed(schema=0), "schema 0"),
        (changed(seeds=[1.5]), "baseline.seeds[0]"),
        (changed(samples={}), "baseline.samples"),
        (changed(samples={"runtime_seconds": []}), "an empty list"),
        (changed(samples={"runtime_seconds": [1.0, 0.0]}), "finite numbers above 0"),
        (changed(samples={"runtime_seconds": [1.0, -1.0]}), "finite numbers above 0"),
        (changed(samples={"cpu.runtime_seconds": [0]}), "baseline.samples.cpu.runtime_seconds"),
        (changed(samples={"accuracy_fraction": [0.5, 1.0001]}), "fractions from 0 to 1"),
        (changed(samples={"runtime_seconds": ["1"]}), "a finite number"),
        (changed(samples={"runtime_seconds": [True]}), "a finite number"),
        (changed(samples={"runtime_seconds": [10**400]}), "too large"),
        (changed(samples={"runtime_seconds": [float("nan")]}), "NaN"),
        (changed(samples={"runtime_seconds": [float("inf")]}), "Infinity"),
        (changed(workload={"x": float("-inf")}), "-Infinity"),
        (changed(workload={"x": 0.5}).replace("0.5", "1e999"), "got 1e999"),
        (changed(workload=[]), "baseline.workload"),
        (changed(extra=1), "extra"),
        (changed(data=None), "baseline.data"),
        (changed(commit=1), "baseline.commit"),
        ('{"schema": 1, "schema": 1}', "twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (changed(workload={"a": json.loads("[" * 40 + "]" * 40)}), "nested too deeply"),
        ("9" * 5000, ""),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, expected: str) -> None:
    path = write_text(tmp_path / "b.json", text)
    with pytest.raises(BaselineError) as caught:
        BaselineStore(tmp_path).read(path)
    assert expected in str(caught.value) and str(path) in str(caught.value) and caught.value.hint


def test_newer_schema_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = write_text(tmp_path / "b.json", changed(schema=SCHEMA_VERSION + 1, future=[]))
    with pytest.raises(BaselineError, match="newer sparkgauge") as caught:
        BaselineStore(tmp_path).read(path)
    assert "pip install --upgrade" in str(caught.value) and f"schema {SCHEMA_VERSION} or older" in str(caught.value)


def test_missing_field_is_named(tmp_path: Path) -> None:
    value = to_json(BASELINE)
    del value["commit"]
    with pytest.raises(BaselineError, match=r"field baseline\.commit"):
        BaselineStore(tmp_path).read(write_text(tmp_path / "b.json", json.dumps(value)))


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    write_text(tmp_path / "file", "")
    for name in ("fifo.json", "folder.json", "file/below.json", "nul\0byte"):
        with pytest.raises(BaselineError, match="Unreadable baseline"):
            BaselineStore(tmp_path).read(tmp_path / name)


@pytest.mark.parametrize(("extra", "refused"), [(-1, False), (0, False), (1, True)])
def test_size_limit(tmp_path: Path, extra: int, refused: bool) -> None:
    text = changed()
    path = write_text(tmp_path / "b.json", text + " " * (LARGEST_BYTES + extra - len(text)))
    if refused:
        with pytest.raises(BaselineError, match=f"{LARGEST_BYTES + 1} bytes"):
            BaselineStore(tmp_path).read(path)
    else:
        assert BaselineStore(tmp_path).read(path) == BASELINE


def read_or_refuse(content: bytes) -> None:
    """Assert that ``content`` is a baseline or a clear error."""
    try:
        assert isinstance(parse(content, where="FILE"), Baseline)
    except BaselineError as error:
        assert "FILE" in str(error) and error.hint


@given(st.binary(max_size=300))
def test_any_bytes_give_an_error_or_a_baseline(content: bytes) -> None:
    read_or_refuse(content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.sampled_from([f.name for f in dataclasses.fields(Baseline)]), JSON_VALUES)
def test_any_value_in_any_field_gives_an_error_or_a_baseline(name: str, value: Any) -> None:
    read_or_refuse(changed(**{name: value}).encode())


@given(st.integers(min_value=0, max_value=len(changed()) - 1), st.binary(max_size=3))
def test_any_damage_gives_an_error_or_a_baseline(position: int, damage: bytes) -> None:
    content = changed().encode()
    read_or_refuse(content[:position])
    read_or_refuse(content[:position] + damage + content[position + len(damage) :])


@given(
    st.dictionaries(
        st.sampled_from(["runtime_seconds", "cpu.speedup_ratio", "launch_seconds"]),
        st.lists(st.floats(min_value=1e-300, max_value=1e300), min_size=1, max_size=5).map(tuple),
        min_size=1,
    )
)
def test_samples_survive_bit_by_bit(samples: dict[str, tuple[float, ...]]) -> None:
    baseline = dataclasses.replace(BASELINE, samples=samples)
    assert parse(json.dumps(to_json(baseline)).encode(), where="x").samples == samples


@pytest.mark.parametrize("samples", [{}, {"runtime_seconds": ()}, {"runtime_seconds": (1.0, float("nan"))}])
def test_bad_samples_are_not_written(tmp_path: Path, samples: dict[str, tuple[float, ...]]) -> None:
    store = BaselineStore(tmp_path)
    with pytest.raises(BaselineError):
        store.write(tmp_path / "b.json", dataclasses.replace(BASELINE, samples=samples))
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_workload_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BaselineError):
        BaselineStore(tmp_path).write(tmp_path / "b.json", dataclasses.replace(BASELINE, workload={"x": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_exist_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(BaselineError, match="Cannot write the baseline") as caught:
        BaselineStore(tmp_path).write(tmp_path / "file" / "x" / "b.json", BASELINE)
    assert "Not a directory" in str(caught.value)


def test_a_folder_that_takes_no_files_is_refused() -> None:
    """A read-only folder by permissions does not stop root, so the kernel's own one stands in for it."""
    with pytest.raises(BaselineError, match="Cannot write the baseline"):
        BaselineStore(Path("/proc")).write(Path("/proc/self/b.json"), BASELINE)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from sparkgauge.errors import BaselineError
from sparkgauge.store import BaselineStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
store = BaselineStore(path.parent)
baseline = store.read(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    store.write(path, baseline)
except BaselineError as error:
    print(error)
"""


@pytest.mark.parametrize(("missing_bytes", "fails"), [(0, False), (1, True), (500, True)])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, missing_bytes: int, fails: bool) -> None:
    path = tmp_path / "b.json"
    BaselineStore(tmp_path).write(path, BASELINE)
    before = path.read_bytes()
    arguments = [sys.executable, "-c", FULL_DISK, str(path), str(len(before) - missing_bytes)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True, env=environ)
    assert ("Cannot write the baseline" in result.stdout) == fails
    assert ("File too large" in result.stdout) == fails
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.json"]


def test_comparable_runs() -> None:
    newer = dataclasses.replace(ENVIRONMENT, software={"python": "3.13"}, memory_bytes=1)
    assert comparable(BASELINE, make_run(environment=newer)) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data": dataclasses.replace(DATA, kind="synthetic")}, "other data: the baseline has real cifar10"),
        ({"data": dataclasses.replace(DATA, digest="cd" * 32)}, "digest cdcdcdcdcdcd"),
        ({"data": dataclasses.replace(DATA, test_count=9_999)}, "50000 + 9999"),
        ({"profile": "full"}, "other profile: the baseline has ci, this run full"),
        ({"environment": dataclasses.replace(ENVIRONMENT, hardware_class="mac")}, "other hardware class: the baseline"),
        ({"workload": {**WORKLOAD, "executors": 3}}, "other workload (executors): the baseline has 2, this run 3"),
        ({"workload": {**WORKLOAD, "extra": 1}}, "other workload (extra): the baseline has nothing, this run 1"),
    ],
)
def test_what_must_not_be_compared(fields: dict[str, Any], expected: str) -> None:
    reason = comparable(BASELINE, make_run(**fields))
    assert reason is not None and expected in reason


def test_workload_is_compared_as_it_is_stored() -> None:
    run = make_run(workload={**WORKLOAD, "sizes": (1, 2)})
    stored = parse(json.dumps(to_json(baseline_of([run], APPROVAL))).encode(), where="x")
    assert comparable(stored, run) is None


def test_several_runs_of_one_test_share_a_file() -> None:
    cpu, gpu = (make_run(label, workload={**WORKLOAD, "device": label}) for label in ("cpu", "gpu"))
    baseline = baseline_of([make_run(), cpu, gpu], APPROVAL, more_samples={"gpu.speedup_ratio": (2.0, 2.1)})
    assert baseline.samples["gpu.speedup_ratio"] == (2.0, 2.1)
    assert baseline.samples["cpu.runtime_seconds"] == baseline.samples["runtime_seconds"]
    assert comparable(baseline, make_run()) is None
    assert comparable(baseline, cpu, label="cpu") is None
    assert "device" in str(comparable(baseline, cpu, label="gpu"))
    assert comparable(baseline, cpu, label="unknown") is None
    assert parse(json.dumps(to_json(baseline)).encode(), where="x") == baseline


def test_seeds_are_kept_only_where_all_runs_share_them() -> None:
    assert baseline_of([make_run(), make_run("cpu")], APPROVAL).seeds == (1, 2, 3)
    assert baseline_of([make_run(), make_run("cpu", seeds=(4, 5, 6))], APPROVAL).seeds == ()


def test_update_new_keeps_what_was_approved() -> None:
    old = baseline_of([make_run()], APPROVAL)
    run, gpu = make_run(commit="new"), make_run("gpu")
    slower = dataclasses.replace(run, rounds=tuple(dataclasses.replace(r, runtime_seconds=99.0) for r in run.rounds))
    fresh = baseline_of([slower, gpu], Approval("you", "now", "why"), more_samples={"speedup_ratio": (2.0,)})
    merged = with_missing(old, fresh)
    assert merged.samples["runtime_seconds"] == old.samples["runtime_seconds"]
    assert merged.samples["speedup_ratio"] == (2.0,)
    assert merged.samples["gpu.runtime_seconds"] == old.samples["runtime_seconds"]
    assert (merged.approved, merged.commit, merged.seeds) == (APPROVAL, "abc", (1, 2, 3))
    assert comparable(merged, gpu, label="gpu") is None
    assert with_missing(old, old) == old
    assert with_missing(old, baseline_of([make_run(seeds=(7, 8, 9))], APPROVAL)).seeds == ()


def test_samples_of_a_run() -> None:
    samples = run_samples(make_run())
    assert samples["runtime_seconds"] == (10.0, 10.1, 10.2)
    assert samples["compute_seconds"] == (8.0,) * 3 and samples["cpu_seconds"] == (8.0,) * 3
    assert samples["loss"] == (1.5,) * 3
    assert run_samples(make_run(rounds=()))["runtime_seconds"] == ()
    assert "waiting_ratio" not in samples


def test_waiting_for_cores_is_a_sample_where_every_executor_counted_it() -> None:
    rounds = make_run().rounds
    waited = [dataclasses.replace(one, cpu_seconds=8.0, waited_seconds=4.0) for one in rounds[0].executors]
    crowded = tuple(dataclasses.replace(one, executors=tuple(waited)) for one in rounds)
    assert run_samples(make_run(rounds=crowded))["waiting_ratio"] == (1.5,) * 3
    assert "waiting_ratio" not in run_samples(make_run(rounds=(crowded[0], rounds[1], crowded[2])))

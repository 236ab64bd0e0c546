"""Options: where a value comes from, which values are taken, and what a refusal says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge import config
from sparkgauge.config import OPTIONS, GaugeConfig
from sparkgauge.errors import ConfigurationError

GIB = 2**30


def build(
    options: dict[str, Any] | None = None,
    ini: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    **parts: Any,
) -> GaugeConfig:
    """Return the configuration of options and ini values named without their ``gauge_``, on a 4-core machine."""
    line = {f"gauge_{name}": value for name, value in (options or {}).items()}
    file = {f"gauge_{name}": value for name, value in (ini or {}).items()}
    folders = {"rootdir": Path("/project"), "invocation_folder": Path("/here")}
    machine = {"cores": 4, "memory_bytes": 16 * GIB, **folders}
    return GaugeConfig.build(line.get, lambda name: file.get(name, ""), environ or {}, **{**machine, **parts})


def test_defaults() -> None:
    built = build()
    assert (built.executors, built.cores_per_executor, built.executor_memory_mib) == (2, 2, 1024)
    assert built.master is None
    assert built.embedded
    assert built.profile == "ci"
    assert built.baselines_folder == Path("/project/baselines")
    assert built.require_baseline
    assert built.runtime_margin_fraction == pytest.approx(0.10)
    assert built.accuracy_margin_fraction == pytest.approx(0.01)
    assert (built.update, built.report_file, built.data, built.rounds) == (None, None, None, None)
    assert (built.timeout_seconds, built.max_rounds, built.confidence) == (600.0, 10, 0.95)
    assert built.given == frozenset()


@pytest.mark.parametrize(
    ("cores", "executors", "cores_each"),
    [(1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 2), (64, 2, 32)],
)
def test_embedded_cluster_is_sized_from_the_machine(cores: int, executors: int, cores_each: int) -> None:
    built = build(cores=cores)
    assert (built.executors, built.cores_per_executor) == (executors, cores_each)


def test_more_executors_than_cores_still_get_a_core_each() -> None:
    built = build({"executors": "8"})
    assert (built.executors, built.cores_per_executor) == (8, 1)


@pytest.mark.parametrize(("memory_gib", "memory_mib"), [(4, 1024), (3, 768), (1, 512), (0, 512)])
def test_executor_memory_fits_the_machine(memory_gib: int, memory_mib: int) -> None:
    assert build(memory_bytes=memory_gib * GIB).executor_memory_mib == memory_mib


def test_an_existing_cluster_is_not_sized_from_this_machine() -> None:
    built = build({"master": "yarn"}, cores=1, memory_bytes=GIB)
    assert (built.executors, built.cores_per_executor, built.executor_memory_mib) == (2, 1, 1024)


def test_command_line_beats_ini_beats_default() -> None:
    assert build(ini={"profile": "smoke"}).profile == "smoke"
    assert build({"profile": "full"}, ini={"profile": "smoke"}).profile == "full"


def test_given_names_only_the_command_line() -> None:
    built = build({"rounds": "3"}, ini={"seed": "5"}, environ={"SPARKGAUGE_DATA": "synthetic"})
    assert built.given == {"rounds"}
    assert (built.rounds, built.seed, built.data) == (3, 5, "synthetic")


def test_data_variable_stands_between_command_line_and_ini() -> None:
    environ = {"SPARKGAUGE_DATA": "from-variable"}
    assert build(ini={"data": "from-ini"}).data == "/project/from-ini"
    assert build(ini={"data": "from-ini"}, environ=environ).data == "/here/from-variable"
    assert build({"data": "from-line"}, environ=environ).data == "/here/from-line"


def test_paths_start_where_they_were_written() -> None:
    built = build({"report": "run.json"}, ini={"baselines": "perf/stored"})
    assert built.report_file == Path("/here/run.json")
    assert built.baselines_folder == Path("/project/perf/stored")
    assert build({"baselines": "/elsewhere"}).baselines_folder == Path("/elsewhere")


def test_synthetic_is_no_path() -> None:
    assert build({"data": "synthetic"}).data == "synthetic"


@pytest.mark.parametrize(
    ("master", "expected"),
    [
        ("embedded", (2, 2, 1024)),
        ("spark://host:7077", (2, 1, 1024)),
        ("k8s://https://host:6443", (2, 1, 1024)),
        ("local-cluster[3,2,1536]", (3, 2, 1536)),
        ("local-cluster[ 3, 2, 1536 ]", (3, 2, 1536)),
    ],
)
def test_masters(master: str, expected: tuple[int, int, int]) -> None:
    built = build({"master": master})
    assert built.master == (None if master == "embedded" else master)
    assert built.embedded == (master == "embedded")
    assert (built.executors, built.cores_per_executor, built.executor_memory_mib) == expected


@pytest.mark.parametrize("master", ["local", "local[*]", "local[2]", "spark://", "mesos://x", "", "local-cluster[2,1]"])
def test_refused_masters(master: str) -> None:
    with pytest.raises(ConfigurationError, match="local-cluster") as caught:
        build({"master": master})
    assert ("one process" in str(caught.value)) == master.startswith("local") & (not master.startswith("local-"))


@pytest.mark.parametrize(
    "options",
    [
        {"master": "local-cluster[0,1,1024]"},
        {"master": "local-cluster[2,1,1024]", "executors": "3"},
        {"master": "local-cluster[2,1,1024]", "cores": "2"},
        {"master": "local-cluster[2,1,1024]", "memory": "2g"},
    ],
)
def test_local_cluster_and_options_must_agree(options: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="disagree"):
        build(options)


def test_local_cluster_and_equal_options_agree() -> None:
    built = build({"master": "local-cluster[2,1,2048]", "executors": "2", "cores": "1", "memory": "2g"})
    assert built.executor_memory_mib == 2048


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("executors", "0", "at least 1"),
        ("executors", "-1", "at least 1"),
        ("executors", "two", "at least 1"),
        ("executors", "1.5", "at least 1"),
        ("executors", "", "at least 1"),
        ("executors", "\u0662", "at least 1"),
        ("cores", "0", "at least 1"),
        ("memory", "2", "e.g. 2g"),
        ("memory", "511m", "e.g. 2g"),
        ("memory", "1.5g", "e.g. 2g"),
        ("profile", "CI", "one of smoke, ci, full"),
        ("rounds", "0", "at least 1"),
        ("update", "yes", "one of new, all"),
        ("timeout", "0", "above 0"),
        ("timeout", "nan", "above 0"),
        ("timeout", "inf", "above 0"),
        ("budget", "-1", "above 0"),
        ("max_rounds", "0", "at least 1"),
        ("runtime_margin", "-0.1", "at least 0"),
        ("runtime_margin", "ten", "at least 0"),
        ("runtime_margin", "nan", "at least 0"),
        ("accuracy_margin", "100.1", "0 to 100"),
        ("accuracy_margin", "-1", "0 to 100"),
        ("confidence", "0", "between 0 and 1"),
        ("confidence", "1", "between 0 and 1"),
        ("confidence", "100%", "between 0 and 1"),
        ("confidence", "95", "between 0 and 1"),
        ("inconclusive", "pass", "one of fail, skip"),
        ("seed", "-1", "from 0 to 4294967295"),
        ("seed", "4294967296", "from 0 to 4294967295"),
        ("inject", "compute", "at least 0"),
        ("inject", "launch=5", "of feed, compute"),
        ("inject", "feed=1,feed=2", "each phase once"),
        ("inject", "feed=-1", "at least 0"),
        ("data", " ", "not empty"),
        ("report", "", "not empty"),
    ],
)
def test_bad_value_names_option_value_and_allowed_set(name: str, value: str, allowed: str) -> None:
    flag = "--gauge-" + name.replace("_", "-")
    with pytest.raises(ConfigurationError) as caught:
        build({name: value})
    assert f"{flag}:" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("name", [option.name for option in OPTIONS if option.ini and option.kind != "text"])
def test_bad_ini_value_names_the_ini_option(name: str) -> None:
    short = name.removeprefix("gauge_")
    if short in ("baselines", "report"):
        assert build(ini={short: "?!"}) is not None  # any text is a path
        return
    with pytest.raises(ConfigurationError, match=f"the ini option {name}: .*got '\\?!'"):
        build(ini={short: "?!"})


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("memory", "512m", "executor_memory_mib", 512),
        ("memory", "2g", "executor_memory_mib", 2048),
        ("memory", "2 GiB", "executor_memory_mib", 2048),
        ("memory", "1T", "executor_memory_mib", 2**20),
        ("timeout", "0.5", "timeout_seconds", 0.5),
        ("timeout", "90s", "timeout_seconds", 90.0),
        ("budget", "30", "budget_seconds", 30.0),
        ("runtime_margin", "7.5", "runtime_margin_fraction", 0.075),
        ("runtime_margin", "7.5%", "runtime_margin_fraction", 0.075),
        ("runtime_margin", "0", "runtime_margin_fraction", 0.0),
        ("runtime_margin", "400", "runtime_margin_fraction", 4.0),
        ("speedup_margin", "5", "speedup_margin_fraction", 0.05),
        ("accuracy_margin", "0", "accuracy_margin_fraction", 0.0),
        ("accuracy_margin", "0.5", "accuracy_margin_fraction", 0.005),
        ("accuracy_margin", "100", "accuracy_margin_fraction", 1.0),
        ("confidence", "0.99", "confidence", 0.99),
        ("confidence", "99%", "confidence", 0.99),
        ("seed", "0", "seed", 0),
        ("seed", "4294967295", "seed", 2**32 - 1),
        ("inconclusive", "skip", "inconclusive", "skip"),
        ("inject", "compute=30%, feed = 7.5", "injections", {"compute": 0.3, "feed": 0.075}),
    ],
)
def test_good_values(name: str, value: str, field: str, expected: Any) -> None:
    close = expected if isinstance(expected, str) else pytest.approx(expected)
    assert getattr(build({name: value}), field) == close


@pytest.mark.parametrize(("profile", "timeout", "budget"), [("smoke", 600, 20), ("ci", 600, 45), ("full", 7200, 1800)])
def test_profile_decides_timeout_and_budget(profile: str, timeout: float, budget: float) -> None:
    built = build({"profile": profile})
    assert (built.timeout_seconds, built.budget_seconds) == (timeout, budget)


@given(st.floats(min_value=0, max_value=1000), st.sampled_from(["", "%"]))
def test_percent_reads_what_it_is_given(margin: float, unit: str) -> None:
    assert build({"runtime_margin": f"{margin!r}{unit}"}).runtime_margin_fraction == pytest.approx(margin / 100)


@given(st.text())
def test_any_text_is_taken_or_refused_by_name(text: str) -> None:
    for option in OPTIONS:
        try:
            option.convert(text, option.flag)
        except ConfigurationError as error:
            assert option.flag in str(error)


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("1", True), ("No", False), ("off", False)])
def test_ini_switch(value: str, expected: bool) -> None:
    assert build(ini={"require_baseline": value}).require_baseline is expected


def test_switch_on_the_command_line_beats_ini() -> None:
    assert build({"require_baseline": True}, ini={"require_baseline": "false"}).require_baseline
    assert not build({"require_baseline": False}, ini={"require_baseline": "true"}).require_baseline


@pytest.mark.parametrize("ci", ["1", "true", "TRUE", "yes", "woodpecker"])
def test_update_is_refused_in_ci(ci: str) -> None:
    with pytest.raises(ConfigurationError, match="--gauge-force-update") as caught:
        build({"update": "all"}, environ={"CI": ci})
    assert "--gauge-update all" in str(caught.value)
    assert build({"update": "all", "force_update": True}, environ={"CI": ci}).update == "all"


@pytest.mark.parametrize("ci", ["", "0", "false", "no"])
def test_update_is_taken_outside_ci(ci: str) -> None:
    built = build({"update": "new"}, environ={"CI": ci})
    assert (built.update, built.ci) == ("new", False)


def test_no_ini_file_updates_baselines_or_slows_a_run() -> None:
    assert {option.name for option in OPTIONS if option.ini is None} == {
        "gauge_update",
        "gauge_force_update",
        "gauge_against",
        "gauge_against_python",
        "gauge_inject",
    }


@pytest.mark.parametrize(("rounds", "most"), [("9", 10), ("10", 10), ("11", 11)])
def test_more_planned_rounds_raise_the_default_limit(rounds: str, most: int) -> None:
    assert build({"rounds": rounds}).max_rounds == most


def test_more_planned_rounds_than_an_explicit_limit_are_refused() -> None:
    assert build({"rounds": "4", "max_rounds": "4"}).max_rounds == 4
    with pytest.raises(ConfigurationError, match="--gauge-max-rounds"):
        build({"rounds": "5", "max_rounds": "4"})


def test_a_commit_is_compared_with_instead_of_updating() -> None:
    assert build({"against": "HEAD", "against_python": "py"}).against_python == Path("/here/py")
    for name, value in (("update", "new"), ("update", "all")):
        with pytest.raises(ConfigurationError, match="either --gauge-against or --gauge-update"):
            build({"against": "HEAD", name: value})
    with pytest.raises(ConfigurationError, match="belongs to --gauge-against"):
        build({"against_python": "py"})


class Parser:
    """Stands in for pytest's parser, with argparse behind it as there."""

    def __init__(self) -> None:
        self.argparse = argparse.ArgumentParser()
        self.ini: dict[str, str] = {}

    def getgroup(self, name: str, description: str = "") -> Parser:
        return self

    def addoption(self, *names: str, **attributes: Any) -> None:
        self.argparse.add_argument(*names, **attributes)

    def addini(self, name: str, help: str, type: Any = None, default: Any = None) -> None:
        self.ini[name] = help


def test_every_option_is_registered_with_its_twin() -> None:
    parser = Parser()
    config.add_options(parser)
    assert set(parser.ini) == {option.ini for option in OPTIONS if option.ini}
    assert vars(parser.argparse.parse_args([])) == {option.name: None for option in OPTIONS}
    text = parser.argparse.format_help()
    assert all(option.flag in text for option in OPTIONS)
    assert not any("%%" in line for line in parser.ini.values())


def test_registered_flags_build_a_configuration() -> None:
    parser = Parser()
    config.add_options(parser)
    words = ["--gauge-no-require-baseline", "--gauge-executors", "3", "--gauge-force-update"]
    line = vars(parser.argparse.parse_args(words))
    built = GaugeConfig.build(line.__getitem__, lambda name: None, {}, cores=4, memory_bytes=GIB)
    assert not built.require_baseline
    assert built.executors == 3
    assert built.given == {"require_baseline", "executors", "force_update"}


@pytest.mark.parametrize(
    "options",
    [
        {"executors": "0"},
        {"update": "new"},
        {"rounds": "5", "max_rounds": "4"},
        {"master": "local-cluster[2,1,1024]", "cores": "2"},
    ],
)
def test_check_refuses_what_build_refuses(options: dict[str, str]) -> None:
    line = {f"gauge_{name}": value for name, value in options.items()}
    with pytest.raises(ConfigurationError) as built:
        build(options, environ={"CI": "1"})
    with pytest.raises(ConfigurationError) as checked:
        config.check(line.get, lambda name: "", {"CI": "1"})
    assert str(checked.value) == str(built.value)


def test_check_takes_what_build_takes() -> None:
    config.check({"gauge_executors": "3"}.get, lambda name: "", {"CI": "1"})


def test_this_machine_is_measured_when_nothing_is_given() -> None:
    built = GaugeConfig.build(lambda name: None, lambda name: "", {})
    assert built.executors in (1, 2)
    assert built.baselines_folder == Path.cwd() / "baselines"


def test_retries_are_none_by_default_and_may_stand_in_the_ini_file() -> None:
    assert build().retries == 0
    assert build({"retries": "0"}, ini={"retries": "2"}).retries == 0
    assert build(ini={"retries": "100"}).retries == 100


@pytest.mark.parametrize("retries", ["-1", "101", "1.5", "two", ""])
def test_bad_retries_are_refused(retries: str) -> None:
    with pytest.raises(ConfigurationError, match="--gauge-retries: expected a whole number from 0 to 100"):
        build({"retries": retries})

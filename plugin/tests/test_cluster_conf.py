from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkgauge.cluster import conf
from sparkgauge.cluster.conf import ClusterSpec
from sparkgauge.errors import ClusterError, ConfigurationError

SPEC = ClusterSpec(
    executors=3, cores_per_executor=2, executor_memory_mebibytes=700, python="/py", preimport=("tensorflow", "numpy")
)
FOLDER = Path("/tmp/a folder")


def build(spec: ClusterSpec = SPEC, python_path: str | None = "/package") -> dict[str, str]:
    return conf.spark_conf(spec, secret="s3cret", folder=FOLDER, master_url="spark://m:1", python_path=python_path)


def daemon_environment(environ: dict[str, str]) -> dict[str, str]:
    return conf.worker_environment(
        SPEC, environ, java_home=Path("/java"), spark_home=Path("/spark"), folder=FOLDER, marker="m"
    )


def driver_environment(spec: ClusterSpec, environ: dict[str, str]) -> dict[str, str | None]:
    return conf.driver_environment(
        spec, environ, java_home=Path("/java"), spark_home=Path("/spark"), folder=FOLDER, marker="m"
    )


def test_one_executor_fills_a_worker_and_one_task_an_executor() -> None:
    settings = build()
    assert settings["spark.executor.cores"] == settings["spark.task.cpus"] == "2"
    assert settings["spark.cores.max"] == "6"
    assert settings["spark.executor.memory"] == "700m"
    assert settings["spark.scheduler.minRegisteredResourcesRatio"] == "1.0"


def test_the_session_is_authenticated_on_loopback_and_serves_no_page() -> None:
    settings = build()
    assert settings["spark.authenticate"] == "true" and settings["spark.authenticate.secret"] == "s3cret"
    assert settings["spark.driver.host"] == settings["spark.driver.bindAddress"] == "127.0.0.1"
    assert settings["spark.ui.enabled"] == "false"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (value, _) in conf.REQUIRED.items()])
def test_required_settings_are_there_and_cannot_be_contradicted(name: str, value: str) -> None:
    assert build()[name] == value
    opposite = {"true": "false", "false": "true", "1": "4"}[value]
    with pytest.raises(ClusterError, match=f"{name}={opposite}"):
        build(dataclasses.replace(SPEC, extra={name: opposite}))
    assert build(dataclasses.replace(SPEC, extra={name: value.upper()}))[name] == value.upper()


def test_the_users_settings_win() -> None:
    assert build(dataclasses.replace(SPEC, extra={"spark.executor.memory": "2g"}))["spark.executor.memory"] == "2g"


def test_executor_environment_limits_threads_and_names_early_imports() -> None:
    settings = build()
    assert settings["spark.executorEnv.OMP_NUM_THREADS"] == "2"
    assert settings["spark.executorEnv.SPARKGAUGE_PREIMPORT"] == "tensorflow,numpy"
    assert settings["spark.executorEnv.PYTHONPATH"] == "/package"
    assert settings["spark.executorEnv.PYTHONHASHSEED"] == "0"
    assert "spark.executorEnv.PYTHONPATH" not in build(python_path=None)
    assert "spark.executorEnv.SPARKGAUGE_PREIMPORT" not in build(dataclasses.replace(SPEC, preimport=()))


def test_everything_is_written_below_the_folder() -> None:
    settings = build()
    assert settings["spark.local.dir"].startswith(str(FOLDER))
    assert settings["spark.sql.warehouse.dir"] == "file:///tmp/a%20folder/warehouse"
    assert f"-Djava.io.tmpdir={FOLDER}/tmp" in shlex.split(settings["spark.executor.extraJavaOptions"])


def test_local_cluster_takes_its_size_from_the_master() -> None:
    spec = dataclasses.replace(SPEC, master="local-cluster[3,1,900]")
    settings = conf.spark_conf(spec, secret="s", folder=FOLDER, master_url="local-cluster[3,1,900]", python_path=None)
    assert settings["spark.executor.cores"] == "1" and settings["spark.executor.memory"] == "900m"
    with pytest.raises(ConfigurationError, match="gauge-executors 2"):
        dataclasses.replace(SPEC, master="local-cluster[2,1,900]")


def test_an_external_master_gets_no_secret_no_addresses_and_no_folders_of_this_host() -> None:
    settings = conf.external_conf(dataclasses.replace(SPEC, master="yarn", extra={"spark.executor.memory": "4g"}))
    assert settings["spark.master"] == "yarn"
    assert settings["spark.executor.memory"] == "4g"
    assert not {"spark.authenticate", "spark.authenticate.secret", "spark.driver.host", "spark.local.dir"} & set(
        settings
    )
    assert "spark.executorEnv.PYTHONPATH" not in settings
    for name, (value, _) in conf.REQUIRED.items():
        assert settings[name] == value


@pytest.mark.parametrize(
    ("master", "kind"),
    [
        (None, "embedded"),
        ("local-cluster[2,1,1024]", "local-cluster"),
        ("local-cluster[ 2 , 1 , 1024 ]", "local-cluster"),
        ("spark://h:7077", "external"),
        ("spark://h1:7077,h2:7077", "external"),
        ("yarn", "external"),
        ("k8s://https://h:443", "external"),
    ],
)
def test_kinds_of_master(master: str | None, kind: str) -> None:
    assert conf.master_kind(master) == kind


@pytest.mark.parametrize(
    "master",
    ["", "local", "local[*]", "local[2]", "spark://h", "mesos://h:1", "k8s://", "local-cluster[0,1,1]", "yarn2"],
)
def test_a_master_that_is_no_cluster_is_refused_by_name(master: str) -> None:
    with pytest.raises(ConfigurationError, match="Unknown Spark master: expected spark://HOST:PORT.*") as caught:
        conf.master_kind(master)
    assert repr(master) in str(caught.value)


@pytest.mark.parametrize("name", ["executors", "cores_per_executor", "executor_memory_mebibytes"])
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_sizes_start_at_one(name: str, value: int) -> None:
    if value >= 1:
        assert getattr(dataclasses.replace(SPEC, **{name: value}), name) == 1
        return
    with pytest.raises(ConfigurationError, match=name):
        dataclasses.replace(SPEC, **{name: value})


def test_daemons_are_authenticated_and_their_pages_locked() -> None:
    settings = conf.daemon_conf("s3cret", "key")
    assert settings["spark.authenticate"] == "true" and settings["spark.authenticate.secret"] == "s3cret"
    assert settings["spark.master.rest.enabled"] == "false"
    assert settings["spark.ui.filters"].endswith("JWSFilter")


def test_daemons_do_not_see_the_users_spark_variables() -> None:
    environment = daemon_environment({"PATH": "/bin", "SPARK_WORKER_OPTS": "x", "PYSPARK_PYTHON": "y", "HOME": "/h"})
    assert environment["PATH"] == "/bin" and environment["HOME"] == "/h"
    assert "SPARK_WORKER_OPTS" not in environment and "PYSPARK_PYTHON" not in environment
    assert environment[conf.MARKER_VARIABLE] == "m"
    assert environment["SPARK_LOCAL_IP"] == "127.0.0.1"
    assert "s3cret" not in " ".join(environment.values())


def test_the_drivers_environment_drops_another_gateway() -> None:
    variables = driver_environment(SPEC, {})
    assert variables["PYSPARK_PYTHON"] == variables["PYSPARK_DRIVER_PYTHON"] == "/py"
    assert variables["PYSPARK_GATEWAY_PORT"] is None and variables["PYSPARK_SUBMIT_ARGS"] is None
    assert variables["SPARK_CONF_DIR"] == str(FOLDER / "conf")


def test_an_external_master_keeps_the_users_environment() -> None:
    environ = {"SPARK_SUBMIT_OPTS": "-Dmine=1", "PYSPARK_SUBMIT_ARGS": "--conf a=b pyspark-shell"}
    variables = driver_environment(dataclasses.replace(SPEC, master="yarn"), environ)
    assert not {"SPARK_CONF_DIR", "SPARK_LOCAL_IP"} & set(variables)
    assert str(variables["SPARK_SUBMIT_OPTS"]).endswith(" -Dmine=1")
    assert variables["PYSPARK_SUBMIT_ARGS"] == "--master yarn --conf a=b pyspark-shell"
    bare = driver_environment(dataclasses.replace(SPEC, master="k8s://https://h:1"), {})
    assert bare["PYSPARK_SUBMIT_ARGS"] == "--master k8s://https://h:1 pyspark-shell"


@given(st.dictionaries(st.from_regex(r"spark\.[a-zA-Z.]{1,20}", fullmatch=True), st.text(max_size=30)))
def test_a_properties_file_holds_each_setting_on_one_line(settings: dict[str, str]) -> None:
    if any(set("\r\n\0") & set(value) for value in settings.values()):
        with pytest.raises(ConfigurationError):
            conf.properties_text(settings)
        return
    lines = conf.properties_text(settings).split("\n")[:-1]
    assert [line.partition("=")[0] for line in lines] == list(settings)
    assert [line.partition("=")[2].replace("\\\\", "\\") for line in lines] == list(settings.values())


def test_package_folder_is_named_only_outside_site_packages(tmp_path: Path) -> None:
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    for root in (site, checkout):
        (root / "sparkgauge").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(site)
    assert conf.package_folder(str(site / "sparkgauge" / "__init__.py"), [str(link)]) is None
    found = conf.package_folder(str(checkout / "sparkgauge" / "__init__.py"), [str(site)])
    assert found == os.path.realpath(checkout)


@pytest.mark.parametrize(
    ("package", "inherited", "path"),
    [
        (None, "/mine", None),
        ("/package", "", "/package"),
        ("/package", "/mine::/package:/other", "/package:/mine:/other"),
        ("/package", "here", f"/package:{os.getcwd()}/here"),
    ],
)
def test_executors_find_what_the_driver_finds(package: str | None, inherited: str, path: str | None) -> None:
    assert conf.python_path(package, inherited) == path


def test_logging_goes_to_the_file_or_to_stderr() -> None:
    assert "appender.main.fileName = /x/y.log" in conf.log4j_text("warn", Path("/x/y.log"))
    assert "SYSTEM_ERR" in conf.log4j_text("info", None)


@pytest.mark.parametrize(("retries", "attempts"), [(0, "4"), (3, "4"), (4, "5")])
def test_retries_are_attempts_of_a_stage_and_a_spare_is_one_more_executor(retries: int, attempts: str) -> None:
    spec = conf.ClusterSpec(2, 3, 512, "python", retries=retries, spares=1)
    made = conf.spark_conf(spec, secret="s", folder=Path("/f"), master_url="spark://h:1", python_path=None)
    assert made["spark.stage.maxConsecutiveAttempts"] == attempts
    assert (made["spark.executor.instances"], made["spark.cores.max"], made["spark.task.cpus"]) == ("3", "9", "3")

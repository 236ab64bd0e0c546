"""The code of docs/own-cluster.md and docs/reports.md: Spark's own launcher and Python take it as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from plugin.tests.plugin_runs import make_run
from sparkgauge.cluster.conf import ClusterSpec, master_kind
from sparkgauge.cluster.java import find_java
from sparkgauge.cluster.spark import find_spark_home
from sparkgauge.config import GaugeConfig
from sparkgauge.records import Ceiling
from sparkgauge.report.run_json import write_run_report

DOCS = Path(__file__).parents[2] / "docs"
CODE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHER = "org.apache.spark.launcher.Main"
SUBMIT = "org.apache.spark.deploy.SparkSubmit"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not in this copy of the package")


def _blocks(name: str, language: str) -> list[str]:
    return [text for kind, text in CODE.findall((DOCS / name).read_text(encoding="utf-8")) if kind == language]


def _runs() -> list[tuple[dict[str, str], list[str]]]:
    """Return exported variables and pytest's arguments of each block that runs the suite."""
    found = []
    for block in _blocks("own-cluster.md", "sh") if DOCS.is_dir() else []:
        words = shlex.split(block.replace("\\\n", " "), comments=True)
        if "pytest" in words:
            variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
            found.append((variables, words[words.index("pytest") + 1 :]))
    return found


@pytest.mark.parametrize(("variables", "arguments"), _runs())
def test_a_cluster_of_the_docs_is_taken_by_spark_and_by_the_plugin(
    variables: dict[str, str], arguments: list[str], tmp_path: Path
) -> None:
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    given = {name[2:].replace("-", "_"): value for name, value in options.items()}
    config = GaugeConfig.build(given.get, lambda name: None, {})
    assert config.executors == 4 and master_kind(config.master) == "external"
    spec = ClusterSpec(4, 1, 512, sys.executable)
    home, java = find_spark_home(os.environ, spec), find_java(os.environ)
    words = ["--master", str(config.master), *shlex.split(variables["PYSPARK_SUBMIT_ARGS"])]
    command = [str(java.home / "bin" / "java"), "-Xmx128m", "-cp", f"{home}/jars/*", LAUNCHER, SUBMIT, *words]
    environ = {**os.environ, **variables, "SPARK_HOME": str(home), "SPARK_SCALA_VERSION": "2.13"}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    built = done.stdout.decode().split("\0")  # the command line that spark-submit would execute
    assert done.returncode == 0, done.stderr.decode()
    assert str(config.master) in built and "pyspark-shell" in built


def test_the_example_reads_a_report(tmp_path: Path) -> None:
    (block,) = _blocks("reports.md", "python")
    run = replace(make_run(), ceiling=Ceiling(184.2, 21.3, "float32"))
    write_run_report(tmp_path / "report.json", [run], [], {"profile": "smoke"})
    (tmp_path / "straggling.py").write_text(block)
    (command,) = [line[2:] for text in _blocks("reports.md", "console") for line in text.splitlines()]
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "test_file.py::test_a trained round 0: 1.000",
        "test_file.py::test_a trained ceiling: 184 GFLOP/s",
    ], done.stderr

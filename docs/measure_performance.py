"""Measures the figures of docs/performance.md: every ratio side by side in one run, in interleaved rounds.

    python docs/measure_performance.py                       # everything, about 15 minutes on two cores
    python docs/measure_performance.py overhead launch       # some of: overhead, launch, agreement, collect
    SPARKGAUGE_DATA=... python docs/measure_performance.py   # real CIFAR-10 from a folder or archive

Needs the package with its TensorFlow extra, Java 17, and a machine on which nothing else runs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
from measuring import EXECUTORS, dataset, interleave, print_machine, ratio

from sparkgauge import store
from sparkgauge.adapters.tensorflow import launch as tensorflow
from sparkgauge.adapters.torch.by_hand import NoSpark
from sparkgauge.cluster.daemon import quicken_tensorflow
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data.dataset import Dataset
from sparkgauge.job import Job, Launched
from sparkgauge.records import Round
from sparkgauge.rounds import run_round
from sparkgauge.session import PREIMPORTS

OVERHEAD_PAIRS, OVERHEAD_STEPS = 8, 300
LAUNCH_PAIRS = 6
COLLECT_PAIRS = 30
TIMEOUT_SECONDS = 600.0


def main() -> None:
    """Measure the sections named on the command line and print them."""
    sections = {"overhead": overhead, "launch": launch, "agreement": agreement, "collect": collect}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*sections, []], help="default: all")
    wanted = parser.parse_args().sections or list(sections)
    print_machine()
    for name in wanted:
        sections[name]()


def overhead() -> None:
    """Print the training throughput inside Spark over that of the same two processes started by hand."""
    data = dataset()
    with _cluster() as cluster:
        inside = lambda: _on_spark(cluster, _job(data, OVERHEAD_STEPS))  # noqa: E731
        by_hand = lambda: _by_hand(_job(data, OVERHEAD_STEPS))  # noqa: E731
        inside()
        pairs = interleave(inside, by_hand, OVERHEAD_PAIRS)
    spark, bare = ([one.images_per_second for one in side] for side in pairs)
    print("| training throughput, cifar10_quick, 2 x 1 core | images/s (median) | n |\n| --- | --- | --- |")
    print(f"| executors of Spark | {statistics.median(spark):,.0f} | {len(spark)} |")
    print(f"| the same two processes started by hand | {statistics.median(bare):,.0f} | {len(bare)} |")
    print(f"| Spark / by hand | {ratio(bare, spark)} | {len(bare)} pairs |")
    # the same ratio without what the machine's other guests take: CPU seconds vary less than wall seconds
    spent = [[store.cpu_seconds(one) for one in side] for side in pairs]
    cpu = ratio(spent[0], spent[1])
    print(f"| CPU seconds of the training processes, by hand / Spark | {cpu} | {len(bare)} pairs |\n", flush=True)


def launch() -> None:
    """Print our launch phase beside TensorFlowOnSpark's own run + shutdown of an empty function."""
    data = dataset()
    with _cluster() as cluster, _plain_tensorflowonspark() as plain:
        _on_spark(cluster, _job(data, 2))
        plain()
        ours: list[float] = []
        whole: list[float] = []
        theirs: list[float] = []
        for _ in range(LAUNCH_PAIRS):
            one = _on_spark(cluster, _job(data, 2))
            ours.append(max(executor.phases.launch for executor in one.executors))
            whole.append(ours[-1] + max(executor.phases.collect for executor in one.executors))
            theirs.append(plain())
    print("| launch on a warm session, 2 executors | seconds (median) | min - max | n |\n| --- | --- | --- | --- |")
    for name, values in (
        ("launch phase: test call to first training step", ours),
        ("launch + collect: everything that is not training or testing", whole),
        ("plain TFCluster.run + shutdown, empty function", theirs),
    ):
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} - {max(values):.2f} | {len(values)} |")
    print(f"| (launch + collect) / plain | {ratio(theirs, whole)} | | {len(theirs)} pairs |\n", flush=True)


def agreement() -> None:
    """Print how far the losses of one and two executors are apart after 50 steps on the same order of images."""
    data = dataset()
    with _cluster() as cluster:
        one, two = (_on_spark(cluster, _job(data, 50, executors=count)) for count in (1, 2))
    first, second = one.curve[0].train_loss, two.curve[0].train_loss
    apart = abs(first - second) / first
    print("| mean loss of steps 1-50 | 1 executor | 2 executors | relative difference |\n| --- | --- | --- | --- |")
    print(f"| cifar10_quick, batch 100 | {first:.6f} | {second:.6f} | {apart:.1e} |\n", flush=True)


def collect() -> None:
    """Print what the plugin adds to ``pytest --collect-only`` in a folder that does not use it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nothing.py").write_text("def test_nothing(): pass\n")
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", folder]
        loaded = lambda: _seconds([*command, *_load_plugin()], folder)  # noqa: E731
        without = lambda: _seconds([*command, "-p", "no:sparkgauge"], folder)  # noqa: E731
        loaded(), without()
        with_plugin, bare = interleave(loaded, without, COLLECT_PAIRS)
    added = [a - b for a, b in zip(with_plugin, bare, strict=True)]
    print("| pytest --collect-only, whole process | milliseconds (median) | n |\n| --- | --- | --- |")
    print(f"| without the plugin | {statistics.median(bare) * 1000:.0f} | {len(bare)} |")
    print(f"| with it | {statistics.median(with_plugin) * 1000:.0f} | {len(with_plugin)} |")
    print(f"| added (median of the pairs) | {statistics.median(added) * 1000:.0f} | {len(added)} pairs |\n", flush=True)


def _load_plugin() -> list[str]:
    from importlib.metadata import entry_points

    return [] if "sparkgauge" in entry_points(group="pytest11").names else ["-p", "sparkgauge.plugin"]


def _seconds(command: list[str], folder: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - began


def _cluster() -> AbstractContextManager[SparkCluster]:
    tensorflow.prepare()
    return measuring.cluster(PREIMPORTS["tensorflow"])


def _job(data: Dataset, steps: int, executors: int = EXECUTORS) -> Job:
    return measuring.make_job(data, "cifar10_quick", steps, executors=executors)


def _on_spark(cluster: SparkCluster, job: Job) -> Round:
    return run_round(cluster.spark.sparkContext, job, tensorflow.launch, timeout_seconds=TIMEOUT_SECONDS)


def _by_hand(job: Job) -> Round:
    """Run the round's training processes as plain children of this one, on the same channel and code."""
    processes: list[Any] = []

    def start(spark_context: Any, job: Job, *, job_group: str, check: Callable[[], None]) -> Launched:
        context = multiprocessing.get_context("spawn")
        ports = [_free_port() for _ in range(job.executors)]
        for rank in range(job.executors):
            processes.append(context.Process(target=_train_by_hand, args=(job, rank, ports)))
            processes[-1].start()
        return Launched(failure=lambda: None, close=lambda: [one.join() for one in processes] and None)

    return run_round(NoSpark(), job, start, timeout_seconds=TIMEOUT_SECONDS)


def _train_by_hand(job: Job, rank: int, ports: list[int]) -> None:
    # the same limits that the executors' environment has
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2")
    quicken_tensorflow()
    from sparkgauge.adapters.tensorflow import worker

    addresses = [f"127.0.0.1:{port}" for port in ports]
    spec = {"chief": addresses[:1], **({"worker": addresses[1:]} if addresses[1:] else {})}
    node = SimpleNamespace(
        executor_id=rank,
        job_name="chief" if rank == 0 else "worker",
        task_index=max(0, rank - 1),
        cluster_spec=spec,
        mgr=SimpleNamespace(shutdown=lambda: None),
    )
    worker.main({"job": dataclasses.replace(job)}, node)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _plain_tensorflowonspark() -> Iterator[Callable[[], float]]:
    """Yield a function that forms and ends one plain TensorFlowOnSpark cluster and returns the seconds.

    In a process of its own, on a second Spark cluster of the same kind: TensorFlowOnSpark arms signals and may exit.
    """
    command = [sys.executable, __file__, "--plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        orders, answers = child.stdin, child.stdout
        assert orders
        assert answers

        def once() -> float:
            orders.write("go\n")
            orders.flush()
            for line in answers:
                if line.startswith("seconds "):
                    return float(line.split()[1])
            raise SystemExit("the plain TensorFlowOnSpark process ended early")

        yield once
        orders.close()  # the child stops its cluster and ends


def _serve_plain() -> None:
    """Form and end one plain TensorFlowOnSpark cluster per line of standard input."""
    with measuring.cluster((), extra={"spark.python.daemon.module": "pyspark.daemon"}) as cluster:
        from tensorflowonspark import TFCluster

        for _ in sys.stdin:
            began = time.perf_counter()
            nodes = TFCluster.run(
                cluster.spark.sparkContext, _nothing, {}, EXECUTORS, 0, input_mode=TFCluster.InputMode.TENSORFLOW
            )
            nodes.shutdown()
            print(f"seconds {time.perf_counter() - began}", flush=True)


def _nothing(arguments: Any, context: Any) -> None:
    """Train nothing: the least that a TensorFlowOnSpark application does."""


if __name__ == "__main__":
    if sys.argv[1:] == ["--plain"]:
        _serve_plain()
    else:
        main()

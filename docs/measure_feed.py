"""Measures how fast the rows of a DataFrame reach two executors, beside TensorFlowOnSpark's DataFeed in the same run.

    SPARKGAUGE_DATA=... python docs/measure_feed.py          # about 5 minutes on two cores

CIFAR-10's training set, four times over (200,000 rows of 3,072 image bytes and a label), as Parquet files that Spark
has written. Needs the package with its TensorFlow and DataFrame extras, Java 17, and a machine on which nothing else
runs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import cluster, dataset, print_machine

from sparkgauge import stats
from sparkgauge.cluster.spark import SparkCluster
from sparkgauge.data import frames
from sparkgauge.data.rows import Layout
from sparkgauge.data.shards import Shard

ROUNDS = 4
COPIES = 4
ROWS = 50_000 * COPIES
FEED_ROWS = 20_000
"""Rows through TensorFlowOnSpark's feed each time: enough for its rate, in seconds."""
LAYOUT = Layout("image", "label", (32, 32, 3))


def main() -> None:
    """Measure and print the table."""
    if sys.argv[1:2] == ["--feed"]:
        _serve_feed(sys.argv[2])
        return
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parquet(folder / "rows")
        preimport = ("numpy", "pyarrow.parquet", "sparkgauge.data.rows")
        with cluster(preimport) as running, _datafeed(folder / "rows") as feed:
            measure(running, folder, feed)


def write_parquet(folder: Path) -> None:
    """Write the rows as four Parquet files of five row groups, compressed by snappy as Spark does by default."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = dataset().open()
    images = np.asarray(arrays.train_images).reshape(-1)
    offsets = np.arange(0, len(images) + 1, LAYOUT.width, dtype=np.int32)
    column = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(images)])
    table = pa.table({"image": column, "label": np.asarray(arrays.train_labels).astype(np.int32)})
    folder.mkdir()
    for number in range(COPIES):
        pq.write_table(table, folder / f"{number}.parquet", compression="snappy", row_group_size=10_000)


def measure(running: SparkCluster, folder: Path, feed: Callable[[], float]) -> None:
    """Take every road in turn and print its rate, net of the start of a job that does nothing."""
    scan = running.spark.read.parquet((folder / "rows").as_uri())
    derived = scan.where("label >= 0")  # not a bare scan: its rows go through the JVM
    assert frames.local_parquet_files(scan)
    assert not frames.local_parquet_files(derived)
    roads = {"Parquet, decoded by the executors": scan, "any DataFrame, by Arrow batches": derived}
    net: dict[str, list[float]] = {name: [] for name in roads}
    gross: dict[str, list[float]] = {name: [] for name in roads}
    theirs: list[float] = []
    for frame in roads.values():
        bring(frame, folder, empty=False)
    for turn in range(ROUNDS):
        for name, frame in roads.items() if turn % 2 == 0 else reversed(roads.items()):
            start = bring(frame, folder, empty=True)
            seconds = bring(frame, folder, empty=False)
            gross[name].append(ROWS / seconds)
            net[name].append(ROWS / max(seconds - start, 1e-9))
        if turn < 3:
            theirs.append(feed())
    print(f"| {ROWS:,} CIFAR-10 rows into two executors of one core | rows/s (median) | min - max | n |")
    print("| --- | --- | --- | --- |")
    for name in roads:
        _row(f"{name}, net of job start", net[name])
        _row(f"{name}, with job start", gross[name])
    _row(f"TensorFlowOnSpark's DataFeed, next_batch(100), {FEED_ROWS:,} rows", theirs)
    _row("batches of 100 out of the memory map, shuffled, one process", [batches(scan, folder) for _ in range(3)])
    for name in roads:
        ratio = stats.ratio_interval(theirs, net[name][: len(theirs)], confidence=0.95, paired=True)
        print(
            f"| {name} / DataFeed | {ratio.estimate:.0f} x | {ratio.low:.0f} - {ratio.high:.0f} | {len(theirs)} pairs |"
        )


def bring(frame: Any, folder: Path, *, empty: bool) -> float:
    """Return the seconds from the call to all rows lying in the files; ``empty`` takes the same road without rows."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.perf_counter()
    if empty:
        _nothing(frame)
    else:
        count = frames._bring_one(frame, LAYOUT, target, "train", "data", shared=True)
        assert count == ROWS
    return time.perf_counter() - began


def _nothing(frame: Any) -> None:
    """Run the same kind of job over no rows."""
    if frames.local_parquet_files(frame):
        context = frame.sparkSession.sparkContext
        context.parallelize([[], []], 2).mapPartitions(_copy_nothing).collect()
    else:
        empty = (
            frame.sparkSession.range(0, 2, numPartitions=2)
            .selectExpr("binary('') image", "int(id) label")
            .where("label < 0")
        )
        frames._map_in_arrow(empty, LAYOUT, _count, "rows bigint").collect()


def _copy_nothing(shares: Iterator[Any]) -> Iterator[str]:
    import pyarrow.parquet  # noqa: F401

    return iter(())


def _count(batches: Iterator[Any]) -> Iterator[Any]:
    import pyarrow as pa

    yield pa.RecordBatch.from_pydict({"rows": [sum(batch.num_rows for batch in batches)]})


def batches(frame: Any, folder: Path) -> float:
    """Return the rows/s of one epoch of shuffled batches out of the finished data set, in one process."""
    target = folder / f"set-{time.monotonic_ns()}"
    frames.materialise(frames.Frames(frame, None, 0.1), target, shared=True)
    shard = Shard.open(target, executors=1, rank=0, global_batch=100, seed=1)
    began = time.perf_counter()
    rows = sum(len(shard.batch(step)[1]) for step in range(shard.steps_per_epoch))
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return rows / seconds


def _row(name: str, rates: list[float]) -> None:
    print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} - {max(rates):,.0f} | {len(rates)} |")


@contextlib.contextmanager
def _datafeed(rows: Path) -> Iterator[Callable[[], float]]:
    """Yield a function that feeds rows through TensorFlowOnSpark once, and returns the rows/s net of job start.

    In a process of its own, on a second Spark cluster of the same kind: its feed needs other settings than ours.
    """
    command = [sys.executable, __file__, "--feed", str(rows)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        orders, answers = child.stdin, child.stdout
        assert orders
        assert answers

        def answer(kind: str) -> str:
            for line in answers:
                if line.startswith(kind):
                    return line.removeprefix(kind)
            raise SystemExit("the TensorFlowOnSpark process ended early")

        def once() -> float:
            orders.write("go\n")
            orders.flush()
            return float(answer("rate "))

        answer("ready")  # nothing is measured while it starts
        yield once
        orders.close()  # the child stops its cluster and ends


def _serve_feed(rows: str) -> None:
    """Feed rows through one TensorFlowOnSpark cluster for every line of standard input."""
    from sparkgauge.cluster import conf

    # the feed's tasks look for the manager that an earlier task of the same worker process has started
    conf.REQUIRED = {name: item for name, item in conf.REQUIRED.items() if name != "spark.python.worker.reuse"}
    settings = {"spark.python.daemon.module": "pyspark.daemon", "spark.python.worker.reuse": "true"}
    with cluster((), extra=settings) as running:
        from tensorflowonspark import TFCluster

        context = running.spark.sparkContext
        frame = running.spark.read.parquet(Path(rows).as_uri()).limit(FEED_ROWS).repartition(2)
        data = frame.rdd.map(lambda row: (bytes(row.image), row.label)).cache()
        data.count()  # reading Parquet is not what is measured
        nodes = TFCluster.run(context, _drain, {}, 2, 0, input_mode=TFCluster.InputMode.SPARK)
        print("ready", flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            context.parallelize(range(2), 2).foreachPartition(list)
            start = time.perf_counter() - began
            nodes.train(data, num_epochs=1)  # returns when the last row has been taken out of the queue
            print(f"rate {FEED_ROWS / (time.perf_counter() - began - 2 * start)}", flush=True)
        nodes.shutdown()


def _drain(arguments: Any, context: Any) -> None:
    """Take every row from the feed and put the images of a batch together, as a training would."""
    import numpy as np

    feed = context.get_data_feed()
    while not feed.should_stop():
        batch = feed.next_batch(100)
        np.frombuffer(b"".join(row[0] for row in batch), np.uint8).reshape(-1, LAYOUT.width)


if __name__ == "__main__":
    main()

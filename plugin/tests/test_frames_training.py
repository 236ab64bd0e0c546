"""DataFrames on real executors: every road brings the same rows, every framework trains on them, bad ones are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("pandas")
pytest.importorskip("torch")

from sparkgauge.data import frames
from sparkgauge.data.frames import Frames, materialise
from sparkgauge.errors import DataError
from sparkgauge.workload import Workload

pytestmark = pytest.mark.slow

COUNT = 300


@pytest.fixture(scope="module")
def rows(faint_images: Any) -> list[tuple[bytearray, int]]:
    """Return the first rows of the tests' data set."""
    arrays = faint_images.open()
    pairs = zip(arrays.train_images[:COUNT], arrays.train_labels[:COUNT], strict=True)
    return [(bytearray(image.tobytes()), int(label)) for image, label in pairs]


@pytest.fixture
def frame(trainings: Any, rows: Any) -> Any:
    """Return them as a DataFrame of five partitions, of which one is empty and one holds most rows."""
    context = trainings.cluster.spark.sparkContext
    parts = [rows[:10], [], rows[10:250], rows[250:299], rows[299:]]
    spread = context.parallelize(range(5), 5).flatMap(lambda index: parts[index])
    return trainings.cluster.spark.createDataFrame(spread, "image binary, label int")


def _arrays(dataset: Any) -> Any:
    arrays = dataset.open()
    return [
        np.asarray(getattr(arrays, name)) for name in ("train_images", "train_labels", "test_images", "test_labels")
    ]


def test_all_roads_bring_the_same_rows_in_the_same_order(frame: Any, rows: Any, tmp_path: Path) -> None:
    frame.write.parquet(str(tmp_path / "rows"))
    # Spark named the files by partition, which is the order that both keep
    scan = frame.sparkSession.read.parquet(str(tmp_path / "rows"))
    assert len(frames.local_parquet_files(scan)) >= 4
    assert frames.local_parquet_files(scan.select("label", "image"))
    assert not frames.local_parquet_files(scan.where("label > 3")) and not frames.local_parquet_files(frame)
    found = {
        "parquet": materialise(Frames(scan, None, 0.1), tmp_path / "a", shared=True),
        "spilled": materialise(Frames(frame, None, 0.1), tmp_path / "b", shared=True),
        "received": materialise(Frames(frame, None, 0.1), tmp_path / "c", shared=False),
    }
    assert len({dataset.identity for dataset in found.values()}) == 1
    for dataset in found.values():
        dataset.verify()
        assert sorted(path.name for path in dataset.folder.iterdir()) == sorted([*frames.FILE_NAMES, "dataset.json"])
    train_images, train_labels, test_images, test_labels = _arrays(found["spilled"])
    assert (len(train_labels), len(test_labels)) == (270, 30)
    chosen = frames.test_rows(COUNT, 0.1)
    assert [image.tobytes() for image in test_images] == [bytes(rows[index][0]) for index in chosen]
    rest = np.setdiff1d(np.arange(COUNT), chosen)
    assert [image.tobytes() for image in train_images] == [bytes(rows[index][0]) for index in rest]
    assert train_labels.tolist() == [rows[index][1] for index in rest]


def test_arrays_of_numbers_are_the_same_images_as_bytes(trainings: Any, rows: Any, tmp_path: Path) -> None:
    few = [(np.frombuffer(bytes(image), np.uint8), label) for image, label in rows[:20]]
    tables = {
        "image binary, label int": [(bytearray(image.tobytes()), label) for image, label in few],
        "image array<tinyint>, label bigint": [(image.view(np.int8).tolist(), label) for image, label in few],
        "image array<int>, label tinyint": [(image.tolist(), label) for image, label in few],
    }
    digests = set()
    for number, (schema, values) in enumerate(tables.items()):
        table = trainings.cluster.spark.createDataFrame(values, schema).coalesce(1)
        digests.add(materialise(Frames(table, None, 0.5), tmp_path / str(number), shared=True).identity.digest)
    assert len(digests) == 1


@pytest.fixture
def counting(trainings: Any, frame: Any) -> Iterator[Any]:
    """Return ``(framework) -> Round`` of a training on the DataFrame that says which images it saw."""

    def run(framework: str, **keywords: Any) -> Any:
        given = {"framework": framework, "fn": _sees, "data": frame, "test_data": frame, **keywords}
        workload = Workload.from_keywords({"batch_size": 70, "epochs": 1, **given}, trainings.session.config)
        return trainings.session.run_round(workload, seed=1, index=0, planned=1)

    yield run
    trainings.session._datasets = {key: one for key, one in trainings.session._datasets.items() if key is None}


def _sees(context: Any, shard: Any) -> dict[str, float]:
    """Add up what went through: as a checksum it counts every row, however they are shared out."""
    seen = 0
    for step in context.steps(shard):
        seen += int(step.images.sum(dtype="int64"))
        context.record_loss(0.0)
    for _, labels in shard.test_batches(16):
        context.record_test(int((labels < 5).sum()), len(labels))
    return {"seen": seen}


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_every_framework_sees_every_row_once(counting: Any, rows: Any, framework: str) -> None:
    one, two = counting(framework, executors=1), counting(framework, executors=2)
    total = sum(int(np.frombuffer(bytes(image), np.uint8).sum()) for image, _ in rows)
    assert one.metrics["seen"] == total > two.metrics["seen"] > 0
    for done in (one, two):
        assert sum(record.train_images for record in done.executors) == COUNT
        assert sum(record.test_images for record in done.executors) == COUNT
        assert done.accuracy_fraction == sum(label < 5 for _, label in rows) / COUNT


def test_a_built_in_model_trains_on_a_dataframe_and_refuses_one_that_does_not_fit(trainings: Any, frame: Any) -> None:
    def run(data: Any) -> Any:
        given = {"framework": "torch", "model": "cifar10_quick", "data": data, "test_fraction": 0.2, "iterations": 2}
        workload = Workload.from_keywords(given, trainings.session.config)
        return trainings.session.run_round(workload, seed=1, index=0, planned=1)

    done = run(frame)
    assert sum(record.test_images for record in done.executors) == COUNT * 0.2
    with pytest.raises(
        DataError, match="Model 'cifar10_quick' does not fit.*labels below 10, got .* labels up to 1[0-9]"
    ):
        run(frame.selectExpr("image", "label + 10 as label"))
    frame_gone = replace(trainings.session.dataset(None), folder=Path("/nowhere"))
    trainings.session._datasets = dict.fromkeys(trainings.session._datasets, frame_gone)
    with pytest.raises(DataError, match="The rows of a DataFrame went with the cluster"):
        run(frame)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (
            "if(label = 3, null, image)",
            "label",
            r"'image': expected 3,072 bytes, got null, in row [\d,]+ of partition \d",
        ),
        ("if(label = 3, binary('x'), image)", "label", "'image': expected 3,072 bytes, got 1, in row"),
        ("image", "if(label = 3, null, label)", "'label': expected a whole number from 0 to 255, got null"),
        ("image", "if(label = 3, -1, label)", "'label': expected a whole number from 0 to 255, got -1"),
        ("image", "cast(label as double)", "has no usable column 'label': expected type tinyint.* got type double"),
        ("image", "if(label = 3, raise_error('no such class'), label)", "data= could not be read.*no such class"),
    ],
)
def test_rows_that_cannot_be_used_are_one_error(
    frame: Any, tmp_path: Path, image: str, label: str, message: str
) -> None:
    changed = frame.selectExpr(f"{image} as image", f"{label} as label")
    with pytest.raises(DataError, match=message):
        materialise(Frames(changed, None, 0.1), tmp_path / "set", shared="null" not in label)  # that one is received
    assert not (tmp_path / "set").exists()


def test_no_rows_are_no_data(frame: Any, tmp_path: Path) -> None:
    nothing = frame.where("label > 100")
    for given, name in ((Frames(nothing, frame), "data"), (Frames(frame, nothing), "test_data")):
        with pytest.raises(DataError, match=f"^{name}= has no rows"):
            materialise(given, tmp_path / "set", shared=True)

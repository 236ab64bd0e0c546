"""Where a net's images come from: the session's CIFAR-10, or an LMDB of Datum messages as Caffe's tools make them."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from sparkgauge.caffe import INSTALL_HINT, lmdb_data, schema
from sparkgauge.data.shards import Sampler, Shard, evaluation_range
from sparkgauge.errors import DataError, MachineError
from sparkgauge.job import Job

SESSION = "sparkgauge:cifar10"
"""As ``source`` or ``mean_file`` of a Data layer: the session's data set, and the mean of its training images."""


@dataclass(frozen=True)
class Later:
    """A sampler from its step ``first`` on: training that resumes sees the images that would have come next."""

    sampler: Sampler
    first: int

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in an epoch."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the indices of this rank's training images in the global step (0-based, from ``first``)."""
        return self.sampler.batch(step + self.first)

    def global_batch_size(self, step: int) -> int:
        """Return how many images all executors together train on in the global step."""
        return self.sampler.global_batch_size(step + self.first)


@dataclass(frozen=True)
class ImageShard:
    """One executor's view of images in Caffe's order; the same methods as :class:`sparkgauge.data.shards.Shard`."""

    images: NDArray[Any]
    """Training images (N, c, h, w), uint8 or float32; a view of channels-last memory."""
    labels: NDArray[np.int64]
    """(N,)."""
    test_images: NDArray[Any]
    """The whole test set (M, c, h, w)."""
    test_labels: NDArray[np.int64]
    """(M,)."""
    mean_image: NDArray[np.float32] | None
    """(c, h, w) of the session's training images; None for another data set."""
    sampler: Later

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def test_range(self) -> slice:
        """Return this executor's part of the test set."""
        inner = self.sampler.sampler
        return evaluation_range(len(self.test_labels), inner.executors, inner.rank)

    def batch(self, step: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return copies of this executor's images (b, c, h, w) and labels (b,) of the global step."""
        indices = self.sampler.batch(step)
        # np.take copies an array that is not contiguous as a whole first: the axes are turned round afterwards
        pixels = np.take(self.images.transpose(0, 2, 3, 1), indices, axis=0)
        return in_caffe_order(pixels), np.take(self.labels, indices)


@dataclass(frozen=True)
class IndexShard:
    """The same batches as indices, for an engine that holds all images."""

    shard: ImageShard

    @property
    def sampler(self) -> Later:
        """Return the order of the images."""
        return self.shard.sampler

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices (b,) of this executor's images of the global step, and their labels."""
        indices = self.sampler.batch(step)
        return indices, np.take(self.shard.labels, indices)


def in_caffe_order(images: NDArray[Any]) -> NDArray[Any]:
    """Return a view (n, channels, rows, columns) of channels-last images; Caffe's CIFAR-10 has planes R, G, B too."""
    return images.transpose(0, 3, 1, 2)


def read_lmdb(folder: Path | str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return images (N, c, h, w) and labels (N,) of all records, in the order of their keys.

    uint8 where the records hold bytes, float32 where they hold ``float_data``. DataError names a damaged database, or
    the record that does not decode or has another shape than the first; encoded images are refused.
    """
    lmdb, path = _lmdb(), Path(folder)
    if not path.is_dir() or not (path / "data.mdb").is_file():
        raise DataError("No LMDB here", expected="a folder with data.mdb", where=str(path))
    if not (path / "data.mdb").stat().st_size:
        expected, hint = "Caffe's records", "Make it again from its images."
        raise DataError("Empty file", expected=expected, actual="0 bytes", where=str(path / "data.mdb"), hint=hint)
    images: list[Any] = []
    labels: list[int] = []
    _check_readable(path)
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as transaction:
            _check_whole(database, path)
            for key, value in transaction.cursor():
                image, label = _record(value, f"{path}, record {key.decode(errors='replace')!r}")
                if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
                    where = f"{path}, record {key.decode(errors='replace')!r}"
                    expected, actual = f"{images[0].shape} {images[0].dtype}", f"{image.shape} {image.dtype}"
                    raise DataError("Images of different shapes", expected=expected, actual=actual, where=where)
                images.append(image)
                labels.append(label)
    except lmdb.Error as error:
        raise DataError("Truncated or damaged LMDB", actual=str(error), where=str(path)) from None
    if not images:
        raise DataError("Empty LMDB", expected="at least one record", where=str(path))
    return np.stack(images), np.asarray(labels, np.int64)


_WALK = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, lock=False) as database, database.begin() as transaction:
    for key, value in transaction.cursor(): pass
"""


def _check_readable(folder: Path) -> None:
    """Raise DataError where reading ends the reading process: liblmdb aborts on a damaged page. Python's errors come up
    again, with their reasons, in this process."""
    done = subprocess.run([sys.executable, "-c", _WALK, str(folder)], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode < 0:
        actual = f"liblmdb ended the process that read it ({signal.Signals(-done.returncode).name})"
        hint = "Make it again from its images."
        raise DataError(
            "Truncated or damaged LMDB", expected="whole pages", actual=actual, where=str(folder), hint=hint
        )


def _check_whole(database: Any, folder: Path) -> None:
    """Raise DataError where the file ends before its last page: reading beyond would end this process by a signal."""
    expected = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    actual = (folder / "data.mdb").stat().st_size
    if actual < expected:
        sizes = {"expected": f"at least {expected:,} bytes", "actual": f"{actual:,} bytes"}
        raise DataError("Truncated or damaged LMDB", **sizes, where=str(folder))


def write_lmdb(folder: Path | str, images: NDArray[Any], labels: NDArray[Any]) -> None:
    """Write images (N, c, h, w), uint8 or float, and labels (N,) as Caffe's tools would; the folder must be new."""
    lmdb, path = _lmdb(), Path(folder)
    if path.exists():
        raise DataError("The folder exists", expected="a new one", where=str(path))
    # the map is address space, not disk: twice the data and a page for every record
    size = 2 * images.nbytes + 8192 * (len(labels) + 16)
    with lmdb.open(str(path), map_size=size) as database, database.begin(write=True) as transaction:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            transaction.put(f"{number:08d}".encode(), _datum(image, int(label)).SerializeToString())


def _datum(image: NDArray[Any], label: int) -> Any:
    channels, height, width = image.shape
    datum = schema.Datum(channels=channels, height=height, width=width, label=label)
    if image.dtype == np.uint8:
        datum.data = image.tobytes()
    else:
        datum.float_data.extend(image.astype(np.float32).ravel().tolist())
    return datum


def _record(value: bytes, where: str) -> tuple[NDArray[Any], int]:
    datum = schema.Datum()
    try:
        datum.ParseFromString(value)
    except DecodeError:
        raise DataError("Damaged record", expected="a Datum", actual=f"{len(value)} bytes", where=where) from None
    if datum.encoded:
        raise DataError("Encoded images are not supported", expected="raw pixels", actual="encoded: true", where=where)
    shape = (datum.channels, datum.height, datum.width)
    pixels: NDArray[Any] = np.frombuffer(datum.data, np.uint8)
    if not datum.data:
        pixels = np.asarray(datum.float_data, np.float32)
    if pixels.size != np.prod(shape, dtype=np.int64) or pixels.size == 0:
        expected = f"{'x'.join(map(str, shape))} pixels"
        raise DataError("A record's size and shape disagree", expected=expected, actual=str(pixels.size), where=where)
    return pixels.reshape(shape), datum.label


def of_session(job: Job, rank: int, folder: Path) -> ImageShard:
    """Return executor ``rank``'s view of the session's data set as Caffe sees it, without copying it."""
    shard = Shard.open(folder, executors=job.executors, rank=rank, global_batch=job.global_batch, seed=job.seed)
    return ImageShard(
        in_caffe_order(shard.images),
        shard.labels.astype(np.int64),
        in_caffe_order(shard.test_images),
        shard.test_labels.astype(np.int64),
        np.ascontiguousarray(np.asarray(shard.mean_image, np.float32).transpose(2, 0, 1)),
        Later(shard.sampler, job.plan.first_iteration),
    )


def of_databases(job: Job, rank: int, folder: Path) -> ImageShard:
    """Return executor ``rank``'s view of the plan's databases, prepared in ``folder``."""
    plan = job.plan
    images, labels, test_images, test_labels = map(np.asarray, lmdb_data.open_arrays(folder, plan.lmdb.key))
    sampler = Sampler(len(labels), job.global_batch, job.executors, rank, job.seed)
    return ImageShard(
        in_caffe_order(images),
        labels,
        in_caffe_order(test_images),
        test_labels,
        None,
        Later(sampler, plan.first_iteration),
    )


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise MachineError("Reading LMDB needs the package lmdb", actual=str(error), hint=INSTALL_HINT) from None
    return lmdb

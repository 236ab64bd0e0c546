"""Sources of CIFAR-10: layouts, archives, the cache, the download, and every way in which they can be damaged."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import pickletools
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import sparkgauge
from sparkgauge.data import Dataset, archives, cache, download, layouts, resolve, sources, synthetic
from sparkgauge.errors import DataError, MachineError

PACKAGE_ROOT = str(Path(sparkgauge.__file__).parents[1])
FILE_BYTES = 30_730_000


def _record_bytes(number: int) -> np.ndarray:
    """One file of 10,000 records that compresses well: the same 20,011 random bytes over and over, labels 0-9."""
    pattern = np.random.default_rng(number).integers(0, 256, 20_011, dtype=np.uint8)
    content = np.resize(pattern, (10_000, 3073))
    content[:, 0] = np.random.default_rng(100 + number).integers(0, 10, 10_000)
    return content


def _pickled_like_python_2(content: np.ndarray) -> bytes:
    """The pickle of a batch, opcode by opcode as Python 2 and its numpy wrote the published files.

    Text is in opcodes for Python 2 strings (U, T), numpy's functions are named by their old place.
    """
    pixels, labels = content[:, 1:].tobytes(), content[:, 0].tolist()
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + (10_000).to_bytes(2, "little") + b"M" + (3_072).to_bytes(2, "little") + b"\x86"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array = empty + b"(K\x01" + shape + dtype + b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x0bbatch_labelU\x07a batchU\x06labels" + numbers + b"U\x04data" + array + b"u."


@pytest.fixture(scope="module")
def binary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("binary") / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(layouts.BINARY_FILES):
        _record_bytes(number).tofile(folder / name)
    (folder / "batches.meta.txt").write_text("\n".join(layouts.CLASS_NAMES) + "\n\n")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def python_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("python") / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(layouts.PYTHON_FILES):
        (folder / name).write_bytes(_pickled_like_python_2(_record_bytes(number)))
    names = [name.encode() for name in layouts.CLASS_NAMES]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prepared(binary_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """The binary folder's data set in a cache that tests must not change."""
    dataset = resolve(str(binary_folder), cache_dir=tmp_path_factory.mktemp("prepared"))
    yield dataset
    shutil.rmtree(dataset.folder)


@pytest.fixture(scope="module")
def archive(binary_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(binary_folder, binary_folder.name)
    return path


@pytest.fixture(autouse=True)
def _give_disk_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what a test prepared (up to 180 MB), which pytest would keep for three sessions."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def linked(binary_folder: Path, tmp_path: Path) -> Path:
    """A folder with hard links to the binary files, for tests that replace one of them."""
    return _link_all(binary_folder, tmp_path / "linked")


def _link_all(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)
    return target


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _no_leftovers(cache_dir: Path) -> bool:
    return not list(cache_dir.glob(".preparing-*"))


class TestBinaryLayout:
    def test_pixels_arrive_channels_last_and_in_order(self, prepared: Dataset) -> None:
        arrays = prepared.open()
        assert arrays.train_images.shape == (50_000, 32, 32, 3)
        record = _record_bytes(0)[7]
        assert arrays.train_labels[7] == record[0]
        np.testing.assert_array_equal(arrays.train_images[7, :, :, 0].ravel(), record[1:1025])
        np.testing.assert_array_equal(arrays.train_images[7, :, :, 2].ravel(), record[2049:])
        last = _record_bytes(4)[-1]
        np.testing.assert_array_equal(arrays.train_images[-1].transpose(2, 0, 1).ravel(), last[1:])
        np.testing.assert_array_equal(arrays.test_labels, _record_bytes(5)[:, 0])

    def test_mean_image_is_the_training_mean(self, prepared: Dataset) -> None:
        arrays = prepared.open()
        expected = arrays.train_images[:, 3, 5].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(arrays.mean_image[3, 5], expected, rtol=1e-6)
        assert arrays.mean_image.dtype == np.float32

    def test_arrays_are_read_only(self, prepared: Dataset) -> None:
        with pytest.raises(ValueError, match="read-only"):
            prepared.open().train_images[0, 0, 0, 0] = 1

    def test_counts_and_identity(self, prepared: Dataset) -> None:
        assert (prepared.train_count, prepared.test_count, prepared.class_count) == (50_000, 10_000, 10)
        assert prepared.identity.kind == "real"
        assert prepared.folder.name == f"cifar10-{prepared.identity.digest[:16]}"
        assert prepared.notice == ""

    @pytest.mark.parametrize("depth", ["parent", "renamed"])
    def test_sub_folder_is_found(self, linked: Path, tmp_path: Path, depth: str) -> None:
        name = "cifar-10-batches-bin" if depth == "parent" else "cifar10"
        outer = tmp_path / "outer"
        outer.mkdir()
        linked.rename(outer / name)
        (outer / "unrelated").mkdir()
        assert layouts.find_layout(outer).folder == outer / name

    @pytest.mark.parametrize("size", [0, FILE_BYTES - 1, FILE_BYTES + 1, FILE_BYTES - 3073])
    def test_wrong_size_names_file_and_sizes(self, linked: Path, tmp_path: Path, size: int) -> None:
        path = linked / "data_batch_3.bin"
        _replace(path, b"")
        os.truncate(path, size)
        with pytest.raises(DataError) as caught:
            resolve(str(linked), cache_dir=tmp_path / "cache")
        assert "30,730,000 bytes" in str(caught.value)
        assert f"got {size:,} bytes" in str(caught.value)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("record", [0, 4321, 9999])
    def test_label_10_names_record_and_file(self, linked: Path, tmp_path: Path, record: int) -> None:
        content = _record_bytes(5)
        content[record, 0] = 10
        _replace(linked / "test_batch.bin", content.tobytes())
        with pytest.raises(DataError, match=f"10 at record {record:,} ") as caught:
            resolve(str(linked), cache_dir=tmp_path / "cache")
        assert caught.value.where == str(linked / "test_batch.bin")
        assert _no_leftovers(tmp_path / "cache")

    def test_missing_files_are_listed(self, linked: Path, tmp_path: Path) -> None:
        (linked / "data_batch_2.bin").unlink()
        (linked / "test_batch.bin").unlink()
        with pytest.raises(DataError, match=r"missing: data_batch_2\.bin, test_batch\.bin"):
            resolve(str(linked), cache_dir=tmp_path / "cache")

    def test_class_names_of_another_data_set(self, linked: Path, tmp_path: Path) -> None:
        _replace(linked / "batches.meta.txt", b"automobile\nairplane\n")
        with pytest.raises(DataError, match="Class names of another data set"):
            resolve(str(linked), cache_dir=tmp_path / "cache")

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="No CIFAR-10 found"):
            resolve(str(tmp_path), cache_dir=tmp_path / "cache")

    def test_two_candidate_folders_are_not_guessed_between(self, linked: Path, tmp_path: Path) -> None:
        _link_all(linked, tmp_path / "second")
        with pytest.raises(DataError, match="linked, second"):
            layouts.find_layout(tmp_path)


class TestPythonLayout:
    def test_same_digest_as_the_binary_layout(self, python_folder: Path, prepared: Dataset, tmp_path: Path) -> None:
        assert resolve(str(python_folder), cache_dir=tmp_path).identity == prepared.identity

    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_pickles_of_today_are_read(self, tmp_path: Path, protocol: int) -> None:
        content = _record_bytes(1)
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({"data": content[:, 1:].copy(), "labels": content[:, 0].tolist()}, protocol))
        images, labels = np.empty((10_000, 32, 32, 3), np.uint8), np.empty(10_000, np.uint8)
        layouts.read_python_file(path, images, labels)
        np.testing.assert_array_equal(labels, content[:, 0])
        np.testing.assert_array_equal(images[42].transpose(2, 0, 1).ravel(), content[42, 1:])

    def test_code_in_a_pickle_is_refused_and_not_run(self, tmp_path: Path) -> None:
        path, witness = tmp_path / "data_batch_1", tmp_path / "witness"
        path.write_bytes(b"cos\nsystem\n(V" + f"touch {witness}".encode() + b"\ntR.")
        assert any(operation.name == "REDUCE" for operation, *_ in pickletools.genops(path.read_bytes()))
        with pytest.raises(DataError, match=r"got os\.system, in .*data_batch_1"):
            layouts.read_pickle(path)
        assert not witness.exists()

    @pytest.mark.parametrize(
        "name", ["builtins eval", "numpy load", "numpy.core.multiarray frombuffer", "codecs encode"]
    )
    def test_only_listed_names_are_found(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "data_batch_1"
        path.write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
        with pytest.raises(DataError, match="Refused pickle"):
            layouts.read_pickle(path)

    def test_only_latin1_strings_are_encoded(self, tmp_path: Path) -> None:
        path = tmp_path / "data_batch_1"
        path.write_bytes(b"c_codecs\nencode\n(Vabc\nVzlib\ntR.")
        with pytest.raises(DataError, match="byte strings as latin1"):
            layouts.read_pickle(path)

    @pytest.mark.parametrize("content", [b"", b"\x80\x02", b"not a pickle at all", b"\x80\x02]q\x01."])
    def test_damaged_or_foreign_pickle(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "data_batch_1"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            layouts.read_pickle(path)
        assert caught.value.where == str(path)

    def test_truncated_batch(self, python_folder: Path, tmp_path: Path) -> None:
        folder = _link_all(python_folder, tmp_path / "linked")
        content = (python_folder / "data_batch_4").read_bytes()
        _replace(folder / "data_batch_4", content[:20_000_000])
        with pytest.raises(DataError, match=r"Damaged pickle.*data_batch_4"):
            resolve(str(folder), cache_dir=tmp_path / "cache")

    def test_huge_file_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "data_batch_1"
        path.touch()
        os.truncate(path, layouts.PICKLE_LIMIT_BYTES + 1)
        with pytest.raises(DataError, match="at most 67,108,864 bytes"):
            layouts.read_pickle(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"data": None}, "uint8 data"),
            ({"data": np.zeros((9_999, 3072), np.uint8)}, r"shape \(9999, 3072\)"),
            ({"data": np.zeros((10_000, 3072), np.int8)}, "int8"),
            ({"labels": [0] * 9_999}, "list of 9,999"),
            ({"labels": [0.5] * 10_000}, "whole numbers"),
            ({"labels": [0] * 9_999 + [10]}, "10 at record 9,999"),
            ({"labels": [-1] + [0] * 9_999}, "at record 0"),
        ],
    )
    def test_batch_of_the_wrong_form(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        batch = {"data": np.zeros((10_000, 3072), np.uint8), "labels": [0] * 10_000} | change
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps(batch, protocol=4))
        with pytest.raises(DataError, match=message):
            layouts.read_python_file(path, np.empty((10_000, 32, 32, 3), np.uint8), np.empty(10_000, np.uint8))

    def test_batch_without_labels(self, tmp_path: Path) -> None:
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps({"data": 1, "fine_labels": []}))
        with pytest.raises(DataError, match="an entry 'labels', got entries 'data', 'fine_labels'"):
            layouts.read_python_file(path, np.empty((10_000, 32, 32, 3), np.uint8), np.empty(10_000, np.uint8))


class TestArchive:
    @pytest.mark.parametrize("mode", ["gz", "xz", ""])
    def test_archive_gives_the_same_data(
        self, archive: Path, binary_folder: Path, prepared: Dataset, tmp_path: Path, mode: str
    ) -> None:
        path = archive
        if mode != "gz":
            path = tmp_path / ("data.tar.xz" if mode else "data.tar")
            options = {"preset": 0} if mode else {}
            with tarfile.open(path, f"w:{mode}", **options) as tar:
                tar.add(binary_folder, "cifar10")
        dataset = resolve(str(path), cache_dir=tmp_path / "cache")
        assert dataset.identity == prepared.identity
        assert json.loads((dataset.folder / "dataset.json").read_text())["source"] == str(path)
        assert _no_leftovers(tmp_path / "cache")

    def test_second_run_does_not_unpack_but_a_changed_archive_is_noticed(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "data.tgz"
        os.link(archive, path)
        first = resolve(str(path), cache_dir=tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(archives, "unpack", lambda *_: pytest.fail("unpacked again"))
            assert resolve(str(path), cache_dir=tmp_path / "cache") == first
        _replace(path, archive.read_bytes()[:-1])
        with pytest.raises(DataError, match="Truncated or corrupt archive"):
            resolve(str(path), cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_truncated_archive(self, archive: Path, tmp_path: Path, share: float) -> None:
        content = archive.read_bytes()
        path = tmp_path / "cut.tar.gz"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=r"Truncated or corrupt archive.*bytes.*cut\.tar\.gz"):
            resolve(str(path), cache_dir=tmp_path / "cache")
        assert _no_leftovers(tmp_path / "cache")

    def test_flipped_checksum_is_noticed(self, archive: Path, tmp_path: Path) -> None:
        content = bytearray(archive.read_bytes())
        content[-8] ^= 1  # gzip ends with CRC-32 and size
        path = tmp_path / "flipped.tar.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match="Truncated or corrupt archive"):
            archives.unpack(path, tmp_path)

    def test_text_with_the_name_of_an_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "page.tar.gz"
        path.write_text("<html>Please log in</html>")
        with pytest.raises(DataError, match="Truncated or corrupt archive"):
            resolve(str(path), cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("/data_batch_1.bin", tarfile.REGTYPE),
            ("../data_batch_1.bin", tarfile.REGTYPE),
            ("a/../../data_batch_1.bin", tarfile.REGTYPE),
            ("C:\\data_batch_1.bin", tarfile.REGTYPE),
            ("data_batch_1.bin", tarfile.SYMTYPE),
            ("data_batch_1.bin", tarfile.LNKTYPE),
            ("data_batch_1.bin", tarfile.CHRTYPE),
            ("unrelated.fifo", tarfile.FIFOTYPE),
        ],
    )
    def test_unsafe_member_is_refused(self, tmp_path: Path, name: str, kind: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        path = tmp_path / "unsafe.tar"
        with tarfile.open(path, "w") as tar:
            tar.addfile(member)
        (tmp_path / "out").mkdir()
        with pytest.raises(DataError, match="Refused archive"):
            archives.unpack(path, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    def test_size_of_a_member_is_checked_before_it_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "small.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("x/data_batch_1.bin")
            member.size = 3073
            tar.addfile(member, io.BytesIO(bytes(3073)))
        with pytest.raises(DataError, match=r"30,730,000 bytes, got 3,073 bytes.*small\.tar: x/data_batch_1\.bin"):
            resolve(str(path), cache_dir=tmp_path / "cache")

    def test_missing_members_name_the_archive(self, binary_folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "part.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(binary_folder / "test_batch.bin", "cifar10/test_batch.bin")
        with pytest.raises(DataError, match=r"missing: data_batch_1\.bin.*part\.tar: cifar10\.") as caught:
            resolve(str(path), cache_dir=tmp_path / "cache")
        assert "preparing" not in str(caught.value)

    def test_works_where_tarfile_has_no_filters(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def extract(self: tarfile.TarFile, member: tarfile.TarInfo, path: Path, set_attrs: bool) -> None:
            calls.append(member.name)

        monkeypatch.delattr(tarfile, "data_filter")
        monkeypatch.setattr(tarfile.TarFile, "extract", extract)
        archives.unpack(archive, tmp_path)
        assert len(calls) == 7


class TestGivenSource:
    @pytest.mark.parametrize("source", ["", "  ", "/nonexistent/cifar", "cifar.tar.gz"])
    def test_missing_source_is_an_error_never_a_fallback(self, tmp_path: Path, source: str) -> None:
        with pytest.raises(DataError, match="--gauge-data"):
            resolve(source, cache_dir=tmp_path)

    def test_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "notes.zip").touch()
        with pytest.raises(DataError, match=r"Not a data source.*\.tar\.gz"):
            resolve(str(tmp_path / "notes.zip"), cache_dir=tmp_path)

    def test_home_is_expanded(self, linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert sources._given_source("~/linked").key == str(linked.resolve())

    def test_changed_folder_is_read_again(self, linked: Path, tmp_path: Path, prepared: Dataset) -> None:
        first = resolve(str(linked), cache_dir=tmp_path / "cache")
        content = _record_bytes(0)
        content[3, 500] ^= 1
        _replace(linked / "data_batch_1.bin", content.tobytes())
        second = resolve(str(linked), cache_dir=tmp_path / "cache")
        assert first.identity == prepared.identity
        assert second.identity.digest != first.identity.digest


class TestSyntheticSource:
    def test_asked_for(self, tmp_path: Path) -> None:
        dataset = resolve("synthetic", cache_dir=tmp_path)
        assert dataset.identity.kind == "synthetic"
        assert "as asked for" in dataset.notice
        assert (dataset.train_count, dataset.test_count) == (10_000, 2_000)

    def test_second_run_does_not_make_it_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = resolve("synthetic", cache_dir=tmp_path)
        monkeypatch.setattr(synthetic, "synthetic_content", lambda: pytest.fail("made again"))
        assert resolve("synthetic", cache_dir=tmp_path) == first


class TestCacheDamage:
    """Damage done to prepared files from outside: reported on opening, repaired on resolving."""

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        return resolve("synthetic", cache_dir=tmp_path)

    @pytest.mark.parametrize("name", ["train_images.bin", "test_labels.bin", "mean_image.bin"])
    @pytest.mark.parametrize("change", [-1, 1])
    def test_wrong_size(self, dataset: Dataset, name: str, change: int) -> None:
        path = dataset.folder / name
        size = path.stat().st_size
        os.truncate(path, size + change)
        with pytest.raises(DataError, match=f"expected {size:,} bytes, got {size + change:,} bytes, in {path}"):
            dataset.open()

    def test_missing_file(self, dataset: Dataset) -> None:
        (dataset.folder / "train_labels.bin").unlink()
        with pytest.raises(DataError, match=r"No such file.*train_labels\.bin"):
            Dataset.load(dataset.folder)

    def test_label_above_9(self, dataset: Dataset) -> None:
        with (dataset.folder / "train_labels.bin").open("r+b") as file:
            file.seek(77)
            file.write(b"\x0a")
        with pytest.raises(DataError, match=r"10 at record 77 .*train_labels\.bin"):
            dataset.open()

    def test_changed_pixel_fails_verification(self, dataset: Dataset) -> None:
        _flip_byte(dataset.folder / "train_images.bin")
        with pytest.raises(DataError, match=r"expected SHA-256 \w{64}, got \w{64}, in .*train_images\.bin"):
            dataset.verify()

    @pytest.mark.parametrize("damage", ["manifest", "size", "pixel", "all"])
    def test_resolving_prepares_it_again(self, dataset: Dataset, tmp_path: Path, damage: str) -> None:
        damages: dict[str, Callable[[], object]] = {
            "manifest": (dataset.folder / "dataset.json").unlink,
            "size": functools.partial(os.truncate, dataset.folder / "train_images.bin", 5),
            "pixel": functools.partial(_flip_byte, dataset.folder / "train_images.bin"),
            "all": functools.partial(shutil.rmtree, dataset.folder),
        }
        damages[damage]()
        repaired = resolve("synthetic", cache_dir=tmp_path)
        repaired.verify()
        assert repaired == dataset
        assert _no_leftovers(tmp_path)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("schema", 2, "expected schema 1, got schema 2"),
            ("identity", 5, "an object"),
            ("files", {}, r"an entry for train_images\.bin"),
        ],
    )
    def test_manifest_that_does_not_fit(self, dataset: Dataset, field: str, value: object, message: str) -> None:
        path = dataset.folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        with pytest.raises(DataError, match=message):
            Dataset.load(dataset.folder)

    def test_half_written_manifest(self, dataset: Dataset) -> None:
        os.truncate(dataset.folder / "dataset.json", 100)
        with pytest.raises(DataError, match=r"Unfinished or unreadable.*dataset\.json"):
            Dataset.load(dataset.folder)

    @pytest.mark.parametrize("content", ["", "{}", "[1]"])
    def test_damaged_source_entry_only_costs_time(self, dataset: Dataset, tmp_path: Path, content: str) -> None:
        for entry in (tmp_path / "sources").iterdir():
            entry.write_text(content)
        assert resolve("synthetic", cache_dir=tmp_path) == dataset


def _flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1_000)
        byte = file.read(1)[0]
        file.seek(1_000)
        file.write(bytes([byte ^ 1]))


CHILD_HEAD = f"""
import sys
sys.path.insert(0, {PACKAGE_ROOT!r})
from pathlib import Path
from sparkgauge.data import resolve, synthetic
"""


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD_HEAD + code, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestSeveralProcesses:
    CODE = """
made = synthetic.synthetic_content
def counted():
    print("made", flush=True)
    return made()
synthetic.synthetic_content = counted
if sys.argv[2] == "no locks":
    sys.modules["fcntl"] = None
print("ready", flush=True)
sys.stdin.readline()
dataset = resolve("synthetic", cache_dir=Path(sys.argv[1]))
dataset.verify()
print(dataset.identity.digest, flush=True)
"""

    @pytest.mark.parametrize("locks", ["locks", "no locks"])
    def test_one_data_set_comes_out(self, tmp_path: Path, locks: str) -> None:
        children = [_child(self.CODE, str(tmp_path), locks) for _ in range(4)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        outputs = [_release(child) for child in children]
        words = [line for output in outputs for line in output.split()]
        assert len({word for word in words if word != "made"}) == 1
        assert 1 <= words.count("made") <= (1 if locks == "locks" else 4)
        assert len(list(tmp_path.glob("cifar10-*"))) == 1
        assert _no_leftovers(tmp_path)

    def test_killed_preparation_does_not_disturb_the_next(self, tmp_path: Path) -> None:
        code = """
import time
synthetic.synthetic_content = lambda: (print("inside", flush=True), time.sleep(60))
resolve("synthetic", cache_dir=Path(sys.argv[1]))
"""
        child = _child(code, str(tmp_path))
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        (abandoned,) = tmp_path.glob(".preparing-*")
        dataset = resolve("synthetic", cache_dir=tmp_path)
        assert abandoned.exists()
        two_days_ago = time.time() - 2 * 24 * 3600
        os.utime(abandoned, (two_days_ago, two_days_ago))
        shutil.rmtree(dataset.folder)
        resolve("synthetic", cache_dir=tmp_path)
        assert not abandoned.exists()

    def test_full_disk_is_an_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        code = """
import resource
from sparkgauge.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    resolve("synthetic", cache_dir=Path(sys.argv[1]))
except DataError as error:
    print(error)
"""
        output, errors = _child(code, str(tmp_path)).communicate(timeout=60)
        assert output.startswith("Cannot write prepared data"), errors
        assert str(tmp_path) in output
        assert _no_leftovers(tmp_path)
        assert not list(tmp_path.glob("cifar10-*"))

    def test_unwritable_cache_uses_a_temporary_folder_until_exit(self, tmp_path: Path) -> None:
        blocker = tmp_path / "file"
        blocker.touch()
        code = """
first = resolve("synthetic", cache_dir=Path(sys.argv[1]))
second = resolve("synthetic", cache_dir=Path(sys.argv[1]))
first.verify()
print(first == second, first.folder, first.notice, sep="|")
"""
        output, errors = _child(code, str(blocker / "cache")).communicate(timeout=60)
        same, folder, notice = output.split("|")
        assert same == "True", errors
        assert "cannot be written" in notice
        assert "as asked for" in notice
        assert not Path(folder).exists()
        assert not Path(folder).parent.exists()


def _release(child: subprocess.Popen[str]) -> str:
    output, errors = child.communicate("go\n", timeout=120)
    assert child.returncode == 0, errors
    return output


def test_forked_child_leaves_the_temporary_folder_alone(tmp_path: Path) -> None:
    cache._remove_own(tmp_path, os.getpid() + 1)
    assert tmp_path.exists()
    cache._remove_own(tmp_path, os.getpid())
    assert not tmp_path.exists()


class _Handler(http.server.SimpleHTTPRequestHandler):
    claimed_extra_bytes = 0

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length":
            value = str(int(value) + self.claimed_extra_bytes)
        super().send_header(keyword, value)


@contextlib.contextmanager
def _server(folder: Path, claimed_extra_bytes: int = 0) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"claimed_extra_bytes": claimed_extra_bytes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put another address and MD5 in the place of the official ones."""
    monkeypatch.setenv("NO_PROXY", "*")

    def put(url: str, md5: str = "0" * 32) -> None:
        monkeypatch.setattr(sources, "OFFICIAL_URL", url)
        monkeypatch.setattr(sources, "OFFICIAL_MD5", md5)

    return put


class TestDefaultSource:
    def test_download_is_checked_prepared_and_remembered(
        self,
        archive: Path,
        prepared: Dataset,
        tmp_path: Path,
        official: Callable[..., None],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        with _server(archive.parent) as url:
            official(f"{url}/{archive.name}", hashlib.md5(archive.read_bytes()).hexdigest())
            dataset = resolve(None, cache_dir=tmp_path)
        assert "100%" in capfd.readouterr().err
        assert dataset.identity == prepared.identity
        assert dataset.notice == ""
        assert _no_leftovers(tmp_path)
        assert resolve(None, cache_dir=tmp_path) == dataset

    def test_wrong_md5_is_an_error_not_a_fallback(
        self, tmp_path: Path, official: Callable[..., None], capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x.tar.gz").write_text("a login page")
        with _server(tmp_path) as url:
            official(f"{url}/x.tar.gz")
            actual = hashlib.md5(b"a login page").hexdigest()
            with pytest.raises(DataError, match=f"expected MD5 0{{32}}, got {actual}"):
                resolve(None, cache_dir=tmp_path / "cache", progress=False)
        assert "%" not in capfd.readouterr().err
        assert _no_leftovers(tmp_path / "cache")

    def test_missing_page_falls_back(self, tmp_path: Path, official: Callable[..., None]) -> None:
        with _server(tmp_path) as url:
            official(f"{url}/gone.tar.gz")
            dataset = resolve(None, cache_dir=tmp_path / "cache")
        assert dataset.identity.kind == "synthetic"
        assert "404" in dataset.notice

    def test_broken_off_download_falls_back(self, tmp_path: Path, official: Callable[..., None]) -> None:
        (tmp_path / "x.tar.gz").write_bytes(bytes(1000))
        with _server(tmp_path, claimed_extra_bytes=500) as url:
            official(f"{url}/x.tar.gz")
            dataset = resolve(None, cache_dir=tmp_path / "cache", progress=False)
        assert dataset.identity.kind == "synthetic"
        assert "IncompleteRead" in dataset.notice

    def test_refused_connection_falls_back_and_says_so(self, tmp_path: Path, official: Callable[..., None]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            official(f"http://127.0.0.1:{free.getsockname()[1]}/x.tar.gz")
            dataset = resolve(None, cache_dir=tmp_path)
        assert dataset.identity.kind == "synthetic"
        assert "not real images" in dataset.notice
        assert "refused" in dataset.notice
        assert "--gauge-data" in dataset.notice

    def test_silent_server_is_given_up(
        self, tmp_path: Path, official: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "PROBE_SECONDS", 0.1)
        monkeypatch.setattr(download, "CONNECT_SECONDS", 0.5)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            official(f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz")
            dataset = resolve(None, cache_dir=tmp_path)
        assert "no answer within 0.1 s" in dataset.notice

    def test_without_permission_nothing_is_downloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "download", lambda *_, **__: pytest.fail("downloaded"))
        dataset = resolve(None, cache_dir=tmp_path, allow_download=False)
        assert dataset.identity.kind == "synthetic"
        assert "downloads are switched off" in dataset.notice

    def test_missing_pooch_is_named(
        self, tmp_path: Path, official: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x.tar.gz").touch()
        monkeypatch.setitem(sys.modules, "pooch", None)
        with _server(tmp_path) as url:
            official(f"{url}/x.tar.gz")
            with pytest.raises(MachineError, match="pooch is not installed"):
                resolve(None, cache_dir=tmp_path / "cache")

    def test_real_data_in_the_cache_is_used_and_announced(self, prepared: Dataset) -> None:
        dataset = resolve(None, cache_dir=prepared.folder.parent, allow_download=False)
        assert dataset.identity == prepared.identity
        assert str(prepared.folder) in dataset.notice

    def test_damaged_real_data_in_the_cache_is_mentioned(self, prepared: Dataset, tmp_path: Path) -> None:
        folder = _link_all(prepared.folder, tmp_path / prepared.folder.name)
        _replace(folder / "test_images.bin", b"short")
        dataset = resolve(None, cache_dir=tmp_path, allow_download=False)
        assert dataset.identity.kind == "synthetic"
        assert str(folder / "test_images.bin") in dataset.notice


def test_importing_the_package_loads_no_numpy() -> None:
    code = "print(sorted({'numpy', 'pooch', 'tqdm', 'requests'} & set(sys.modules)))"
    output, errors = _child(code).communicate(timeout=60)
    assert output == "[]\n", errors

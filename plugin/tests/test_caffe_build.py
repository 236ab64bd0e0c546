"""Installing the real Caffe: what is checked before the long build."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from sparkgauge.caffe import build
from sparkgauge.cli import REFUSED, main
from sparkgauge.errors import DataError, MachineError


def test_another_archive_is_refused_by_its_hash(tmp_path: Path) -> None:
    other = tmp_path / "brocolli-caffe-9.0.2.tar.gz"
    other.write_bytes(b"other")
    with pytest.raises(DataError, match=f"expected SHA-256 {build.SHA256}"):
        build._checked(other)


def test_the_archives_version_control_folder_is_not_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in ("top/.git/config", "top/src/net.cpp"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            file.addfile(entry, io.BytesIO(b"x"))
    tree = build.unpack(archive, tmp_path / "unpacked")
    assert [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()] == ["src/net.cpp"]


def test_a_member_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        build.unpack(archive, tmp_path / "unpacked")


def test_all_missing_packages_are_named_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_packages", lambda: ["cmake", "libhdf5-dev"])
    with pytest.raises(MachineError, match="apt-get install --no-install-recommends cmake libhdf5-dev"):
        build._require_libraries(apt=False)


def test_without_dpkg_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["install-caffe"]) == REFUSED
    assert "no dpkg-query" in capsys.readouterr().err


def test_a_changed_source_is_not_patched_blindly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("new", encoding="utf-8")
    with pytest.raises(DataError, match="'old'"):
        build._apply(build._Change("file", "old", "x"), tmp_path)


def test_a_failed_step_shows_the_end_of_its_output() -> None:
    with pytest.raises(MachineError, match=r"(?s)step 'make'.*exit status 3.*the reason"):
        build._run(["sh", "-c", "echo the reason; exit 3"], "make")

"""Unpacking of CIFAR-10 archives: only the known data files, only as plain files, into a folder of our own."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sparkgauge.data.layouts import BINARY_FILE_BYTES, BINARY_FILES, PICKLE_LIMIT_BYTES, WANTED_FILES
from sparkgauge.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
"""Endings of the archives that can be given as data."""

_DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError)
"""What the standard library raises on truncated or corrupt archives (gzip's and bzip2's are OSErrors)."""


def is_archive(path: Path) -> bool:
    """Return whether the file's name ends like an archive that can be unpacked."""
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, folder: Path) -> None:
    """Return after writing the data files of ``archive`` below ``folder``; DataError when it is damaged or unsafe.

    It is read once from start to end, to its last checksum.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in _data_members(tar, archive):
                _extract(tar, member, folder)
            _read_to_end(tar)
    except _DAMAGE as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        # Disk errors carry an errno, failed checksums of gzip and bzip2 do not.
        if error.errno is None:
            raise _damaged(archive, error) from error
        raise DataError("Cannot unpack the archive", actual=str(error), where=str(archive)) from error


def check_member(member: tarfile.TarInfo, archive: Path) -> None:
    """Return when ``member`` is a plain file or folder inside the archive's own tree; DataError otherwise."""
    path, windows_path = PurePosixPath(member.name), PureWindowsPath(member.name)
    if path.is_absolute() or windows_path.drive or windows_path.root or ".." in (*path.parts, *windows_path.parts):
        _refuse(member, archive, "a path that leaves the archive")
    if not (member.isreg() or member.isdir()):
        _refuse(member, archive, "a link or device" if not member.issym() else "a symbolic link")


def _data_members(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members worth unpacking; every member is checked, wanted or not."""
    for member in tar:
        check_member(member, archive)
        if member.isreg() and PurePosixPath(member.name).name in WANTED_FILES:
            _check_member_size(member, archive)
            yield member


def _check_member_size(member: tarfile.TarInfo, archive: Path) -> None:
    binary = PurePosixPath(member.name).name in BINARY_FILES
    if member.size != BINARY_FILE_BYTES if binary else member.size > PICKLE_LIMIT_BYTES:
        raise DataError(
            "Archived file of the wrong size",
            expected=f"{BINARY_FILE_BYTES:,} bytes" if binary else f"at most {PICKLE_LIMIT_BYTES:,} bytes",
            actual=f"{member.size:,} bytes",
            where=f"{archive}: {member.name}",
            hint="Download CIFAR-10 again.",
        )


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    # Early patch releases of Python 3.10 and 3.11 lack the filter; check_member has refused what it would refuse.
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    tar.extract(member, folder, set_attrs=False, **options)


def _read_to_end(tar: tarfile.TarFile) -> None:
    # Checksums of gzip and xz stand at the end and are compared only when a reader gets there.
    while tar.fileobj is not None and tar.fileobj.read(1 << 20):
        pass


def _refuse(member: tarfile.TarInfo, archive: Path, actual: str) -> None:
    raise DataError(
        "Refused archive",
        expected="only plain files and folders",
        actual=actual,
        where=f"{archive}: {member.name[:200]}",
        hint="This is not an archive of CIFAR-10; nothing outside the cache was written.",
    )


def _damaged(archive: Path, error: BaseException) -> DataError:
    reason = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each compression it tried
    return DataError(
        "Truncated or corrupt archive",
        expected="a complete tar archive",
        actual=f"{archive.stat().st_size:,} bytes ({type(error).__name__}: {reason})",
        where=str(archive),
        hint="Download it again.",
    )

"""From what the user names, or does not name, to a prepared data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from sparkgauge.data import archives, layouts, synthetic
from sparkgauge.data.cache import Cache, Source, writable_cache
from sparkgauge.data.dataset import Dataset
from sparkgauge.data.download import Unreachable, download
from sparkgauge.errors import DataError

if TYPE_CHECKING:
    from sparkgauge.data.layouts import Content

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
OFFICIAL_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
SYNTHETIC = "synthetic"
"""The source that asks for the look-alike."""

_GIVE_DATA = "Name CIFAR-10 with --gauge-data or SPARKGAUGE_DATA to train on real images."


def resolve(source: str | None, *, cache_dir: Path, allow_download: bool = True, progress: bool = True) -> Dataset:
    """Return the data set that ``source`` names, checked and prepared in ``cache_dir``.

    ``source`` is a folder or archive with CIFAR-10 in the binary or python layout, or ``synthetic``; DataError when it
    is missing, damaged or something else, never another data set in its place. None takes the cache's real data, else
    the official download, else the synthetic look-alike with a ``notice`` that says why.
    """
    if source is None:
        return _default(cache_dir, allow_download, progress)
    if source == SYNTHETIC:
        return _prepared(
            _synthetic_source(), cache_dir, "Synthetic look-alike of CIFAR-10, as asked for: not real images."
        )
    return _prepared(_given_source(source), cache_dir)


def _default(cache_dir: Path, allow_download: bool, progress: bool) -> Dataset:
    official = _official_source(progress)
    cache = Cache(cache_dir)
    found = cache.find(official)
    if found is not None:
        return found
    datasets, problems = cache.real_datasets()
    if datasets:
        notice = f"CIFAR-10 from the cache folder {datasets[0].folder}, prepared earlier from a source of your own."
        return dataclasses.replace(datasets[0], notice=notice)
    reason = "downloads are switched off"
    if allow_download:
        try:
            return _prepared(official, cache_dir)
        except Unreachable as error:
            reason = f"{OFFICIAL_URL} cannot be reached: {error}"
    return _prepared(_synthetic_source(), cache_dir, _fallback_notice(reason, problems))


def _fallback_notice(reason: str, problems: list[str]) -> str:
    damage = "".join(f" Ignored in the cache: {problem}" for problem in problems)
    return f"Synthetic look-alike of CIFAR-10, not real images ({reason}).{damage} {_GIVE_DATA}"


def _prepared(source: Source, cache_dir: Path, notice: str = "") -> Dataset:
    """Return the data set of ``source`` from the cache, or from a temporary one where that cannot be written."""
    found = Cache(cache_dir).find(source)
    if found is None:
        cache, cache_notice = writable_cache(cache_dir)
        found = cache.find(source) or cache.add(source)
        notice = " ".join(part for part in (notice, cache_notice) if part)
    return dataclasses.replace(found, notice=notice)


def _given_source(text: str) -> Source:
    path = Path(text).expanduser()
    if text.strip() and path.is_dir():
        return _folder_source(path.resolve())
    if text.strip() and path.is_file() and archives.is_archive(path):
        return _archive_source(path.resolve())
    raise DataError(
        "No such data" if not path.exists() else "Not a data source",
        expected=f"a folder with CIFAR-10, an archive of it ({', '.join(archives.SUFFIXES)}) or {SYNTHETIC!r}",
        actual=repr(text),
        where=str(path.absolute()),
        hint="Correct --gauge-data or SPARKGAUGE_DATA.",
    )


def _folder_source(folder: Path) -> Source:
    layout = layouts.find_layout(folder)
    paths = [path for path in (*layout.paths, layout.folder / layout.meta) if path.exists()]
    return Source(
        key=str(folder),
        fingerprint=" ".join(_file_fingerprint(path) for path in paths),
        kind="real",
        description=str(layout.folder),
        read=lambda _work: layouts.read_layout(layout),
    )


def _archive_source(archive: Path) -> Source:
    return Source(
        key=str(archive),
        fingerprint=_file_fingerprint(archive),
        kind="real",
        description=str(archive),
        read=lambda work: _read_archive(archive, work),
    )


def _official_source(progress: bool) -> Source:
    def read(work: Path) -> Content:
        archive = work / OFFICIAL_URL.rpartition("/")[2]
        download(OFFICIAL_URL, archive, md5=OFFICIAL_MD5, progress=progress)
        return _read_archive(archive, work)

    return Source(key="official", fingerprint=OFFICIAL_MD5, kind="real", description=OFFICIAL_URL, read=read)


def _synthetic_source() -> Source:
    return Source(
        key=SYNTHETIC,
        fingerprint=f"version {synthetic.VERSION}",
        kind="synthetic",
        description="synthetic look-alike of CIFAR-10",
        read=lambda _work: synthetic.synthetic_content(),
    )


def _read_archive(archive: Path, work: Path) -> Content:
    """Return the content of ``archive``, unpacked below ``work``; errors name the archive, not the work folder."""
    unpacked = work / "unpacked"
    unpacked.mkdir()
    archives.unpack(archive, unpacked)
    try:
        return layouts.read_layout(layouts.find_layout(unpacked))
    except DataError as error:
        inside = (error.where or "").replace(str(unpacked), "").lstrip("/")
        where = f"{archive}: {inside}" if inside else str(archive)
        raise DataError(
            error.summary, expected=error.expected, actual=error.actual, where=where, hint=error.hint
        ) from error


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    return f"{path.name}:{status.st_size}:{status.st_mtime_ns}"

"""Folders of TIFF files as one image: every file a plane, or a stack that belongs to one time point or channel."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.tiff.files import TiffSeries, file_facts, opened, series_of
from chunkrestore.ome_zarr.tiff.image import StackReader, by_hand, handle, image_of, letters_of, open_tiff
from chunkrestore.ome_zarr.tiff.metadata import TiffFacts, facts_of
from chunkrestore.ome_zarr.tiff.pages import Box, Layout, Pages, Stack
from chunkrestore.ome_zarr.tiff.plane_names import Names, are_words, find_files, read_names

_N_THREADS = 8
"""That look into files at the same time: on file systems in a network each of them waits."""


@dataclass(frozen=True)
class PlaneFiles:
    """Pages of many files, all of one layout; no more than one of them is open at a time."""

    files: tuple[str, ...]
    facts: tuple[tuple[str, int, int], ...]
    """Name, size and time of change of each."""
    n_pages: int
    """Of each file."""
    layout: Layout
    """Of every page."""

    def read(self, page: int, box: Box) -> np.ndarray:
        """Return a box of a page; raises as `chunkrestore.ome_zarr.tiff.pages.Pages.read`."""
        number, inside = divmod(page, self.n_pages)
        path = self.files[number]
        if tuple(file_facts([path])[0]) != self.facts[number]:
            raise ValueError(f"{path} has changed since it was opened; open its folder again")
        return _pages(path, self.facts[number]).read(inside, box)


@dataclass(frozen=True)
class PlanesReader(StackReader):
    """A folder of TIFF files."""

    letters: str | None = None
    """Axes as given by hand."""

    def stack(self) -> Stack:
        """Return the pages, found once per process; raises as `StackReader.stack`."""
        return _read_planes(self.store, self.letters, self.digest)


def open_planes(
    pattern: str | os.PathLike[str],
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
) -> OmeZarrImage:
    """Open a folder of TIFF files, or those that a pattern names, as one image, from their metadata alone.

    All files must have the same shape, dtype and way of storing. What is no TIFF file is not looked at, nor are
    folders inside. Where the files are one OME-TIFF, that is opened.

    Parameters
    ----------
    pattern
        Folder, or pattern of paths as in a shell, with the fields ``{t}``, ``{c}`` and ``{z}`` for what counts time
        points, channels and planes: ``"planes/*_C{c}_Z{z}.tif"``. Time points and planes are whole numbers at equal
        distances, channels may be words.
    axes
        One letter of ``tczyx`` per axis: first what the names count, in the order of the names, then the axes of a
        file. By default from the names and the files.
    voxel_size, channels
        As for `chunkrestore.ome_zarr.open_source`. Channels that are words in the names are called so.

    Raises
    ------
    FileNotFoundError
        If there are no such files.
    ValueError
        If names are ambiguous, files are missing, there are two for one place, they differ, or as for
        `chunkrestore.ome_zarr.tiff.image.open_tiff`.
    """
    where = stores.location(pattern)
    found = find_files(where)
    with opened(found[0]) as file:
        first, facts = series_of(file, found[0], None), facts_of(file)
    if len(found) == 1 or len(first.files) > 1:
        if not {*found} <= {*first.files}:
            raise ValueError(
                f"{where}: {Path(found[0]).name} is one image with {len(first.files)} of the {len(found)} files; give "
                "the path of one file of each image"
            )
        return open_tiff(found[0], axes=axes, voxel_size=voxel_size, channels=channels)
    names = read_names(where, axes, found)
    _check_alike(names.files, first)
    letters, stack = _stack(names, first, axes, where)
    digest = _digest(names, file_facts(names.files))
    reader = PlanesReader(**handle(where, "0", stack, letters, digest), letters=axes)
    given = by_hand(axes=axes, voxel_size=voxel_size, channels=channels)
    return image_of([reader], letters, _with_names(facts, names), given)


def _check_alike(files: Sequence[str], first: TiffSeries) -> None:
    """Raise unless all files hold one image like that of the first one; nothing is decoded."""

    def difference(path: str) -> str:
        with opened(path) as file:
            other = series_of(file, path, None)
        mine, others = (x.levels[0] for x in (first, other))
        for what, a, b in (
            ("shape", mine.shape, others.shape),
            ("dtype", mine.pages.layout.dtype, others.pages.layout.dtype),
            ("axes", first.letters, other.letters),
        ):
            if a != b:
                return f"has {what} {b}, but {Path(files[0]).name} {a}"
        alike = mine.pages.layout.same_as(others.pages.layout)
        return "" if alike else f"is stored unlike {Path(files[0]).name} (strips, tiles or compression)"

    with ThreadPoolExecutor(_N_THREADS) as threads:
        for path, text in zip(files, threads.map(difference, files), strict=True):
            if text:
                threads.shutdown(cancel_futures=True)
                raise ValueError(f"{path} {text}; all files of an image must be alike")


def _stack(names: Names, first: TiffSeries, axes: str | None, where: str) -> tuple[str, Stack]:
    """Return the letters of all axes and the array that the files make."""
    one = first.levels[0]
    shape = (*names.shape, *one.shape)
    letters = letters_of(names.letters + first.letters, axes, shape, where)
    if axes is not None and not axes.startswith(names.letters):
        raise ValueError(f"{where}: `axes` {axes!r} must begin with what the names count, {names.letters!r}")
    n_pages = math.prod(one.shape[: one.n_lead])
    pages = PlaneFiles(names.files, tuple(file_facts(names.files)), n_pages, one.pages.layout)
    return letters, Stack(pages, shape, one.inner)


@lru_cache(maxsize=16)
def _read_planes(where: str, axes: str | None, digest: str) -> Stack:
    """Find the files again, once per process."""
    names = read_names(where, axes, find_files(where))
    if _digest(names, file_facts(names.files)) != digest:
        raise ValueError(f"{where} has changed since it was opened; open it again")
    with opened(names.files[0]) as file:
        first = series_of(file, names.files[0], None)
    return _stack(names, first, axes, where)[1]


@lru_cache(maxsize=256)
def _pages(path: str, facts: tuple[str, int, int]) -> Pages:
    """Return where the pages of a file lie."""
    with opened(path) as file:
        pages = series_of(file, path, None).levels[0].pages
    assert isinstance(pages, Pages)
    return pages


def _digest(names: Names, facts: Sequence[tuple[str, int, int]]) -> str:
    return hashlib.sha256(json.dumps([names.letters, names.values, facts]).encode()).hexdigest()


def _with_names(facts: TiffFacts, names: Names) -> TiffFacts:
    """Return what the first file says, with what the names say."""
    files = {"n_files": len(names.files)} | {
        key: Path(names.files[i]).name for key, i in (("first", 0), ("last", -1))
    }
    words = names.values[names.letters.index("c")] if "c" in names.letters else ()
    channels = [{"label": word} for word in words] if are_words(words) else facts.channels
    return replace(facts, channels=channels, kept=facts.kept | files)

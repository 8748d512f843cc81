"""TIFF files as stacks of pages: which images a file holds, in which resolutions, and whether all of it is there.

tifffile reads the directories of a file and knows the formats that microscopes write; what it makes of them is checked
here against the file before anything is decoded. Where a file is incomplete tifffile logs a line and goes on with
fewer pages, or with zeros; here that is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.ome_zarr.limits import MAX_CHUNK_NBYTES, MAX_LEVELS, MAX_VOXELS, short
from chunkrestore.ome_zarr.tiff.claims import AGAIN, MAX_PAGES, check_ome, no_errors
from chunkrestore.ome_zarr.tiff.pages import Layout, Pages, Stack

if TYPE_CHECKING:
    import tifffile

_THUMBNAIL = 16
"""Images that are so many times smaller than the first one, all together, are its previews."""


@dataclass(frozen=True)
class TiffSeries:
    """One image of a file in all its resolutions."""

    index: int
    """Which image of the file."""
    letters: str
    """tifffile's letter of every axis that is not one long: ``tzcyxs``, or others where it knows no meaning."""
    levels: tuple[Stack, ...]
    """Finest first."""
    digest: str
    """SHA-256 of size, time and structure of the files."""
    files: tuple[str, ...]
    """Paths of the files that hold its pages."""


@contextmanager
def opened(path: str) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF file for its metadata.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is none, is damaged, or claims what no image has.
    """
    import tifffile

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file; check the path of the TIFF")
    try:
        with no_errors(path), tifffile.TiffFile(path) as file:
            if len(file.pages) == 0:
                raise ValueError(f"{path} holds no page; {AGAIN}")
            check_ome(file.ome_metadata if file.is_ome else None, path)
            yield file
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        if path in str(error):  # one of ours, which says what is wrong
            raise
        raise ValueError(f"{path} is not a TIFF file, or is damaged: {short(str(error))}; {AGAIN}") from error


def series_of(file: tifffile.TiffFile, path: str, index: int | None) -> TiffSeries:
    """Return image `index` of a file; by default the only one, or the first if the others are its previews.

    Raises
    ------
    ValueError
        If there is no such image or several, or pages are missing, cut off, or in a format that cannot be decoded.
    """
    index, found = _chosen(file, path, index)
    levels = list(found.levels)
    if len(levels) > MAX_LEVELS:
        raise ValueError(f"{path} has {len(levels)} resolutions; no pyramid has")
    stacks = tuple(_stack(level, path) for level in levels if level.axes == found.axes)
    files = tuple(dict.fromkeys(name for stack in stacks for name in _pages(stack).files))
    letters = found.axes.lower()
    return TiffSeries(
        index=index, letters=letters, levels=stacks, files=files, digest=_digest(letters, stacks, files)
    )


@lru_cache(maxsize=64)
def read_series(path: str, index: int, digest: str) -> TiffSeries:
    """Return image `index` of a file, read once per process.

    Raises
    ------
    ValueError
        If the file has changed since it had that digest.
    """
    with opened(path) as file:
        series = series_of(file, path, index)
    if series.digest != digest:
        raise ValueError(f"{path} has changed since it was opened; open it again")
    return series


def file_facts(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of files, which identify them without reading them."""
    stats = [(Path(path).name, os.stat(path)) for path in paths]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def _chosen(file: tifffile.TiffFile, path: str, index: int | None) -> tuple[int, tifffile.TiffPageSeries]:
    several = file.series
    if index is not None:
        if not 0 <= index < len(several):
            raise ValueError(f"`series` {index} does not exist in {path}; it has {len(several)}, 0 the first")
        return index, several[index]
    if not several:
        raise ValueError(f"{path} holds no image; {AGAIN}")
    if several[0].size < _THUMBNAIL * sum(s.size for s in several[1:]):
        listed = ", ".join(f"{i} {s.name[:40]!r} {s.axes} {s.shape}" for i, s in enumerate(several[:8]))
        raise ValueError(
            f"{path} holds {len(several)} images ({listed}); choose one with `series` (--series) and convert the "
            "others to stores of their own"
        )
    return 0, several[0]


def _stack(series: tifffile.TiffPageSeries, path: str) -> Stack:
    """Return the pages of one resolution as an array."""
    keyframe, shape = series.keyframe, tuple(int(n) for n in series.shape)
    what = f"{path}: axes {series.axes!r} (shape {shape})"
    if math.prod(shape) > MAX_VOXELS or math.prod(shape) == 0:
        raise ValueError(f"{what} are empty, or beyond {MAX_VOXELS} voxels; no image is")
    try:
        layout = Layout.of(keyframe)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        hint = "; run: pip install imagecodecs" if "imagecodecs" in reason else ""
        raise ValueError(f"{path}: page {keyframe.index} cannot be decoded: {reason}{hint}") from None
    if layout.dtype.kind not in "biuf" or layout.dtype.itemsize > 8:
        raise ValueError(
            f"{path}: `dtype` {layout.dtype} is not supported, only integers and floats of up to 64 bits; convert it "
            "first"
        )
    if math.prod(layout.segment) * layout.dtype.itemsize > MAX_CHUNK_NBYTES:
        raise ValueError(
            f"{path}: a strip or tile of {layout.segment} is beyond {MAX_CHUNK_NBYTES} bytes; write it anew"
        )
    # The last axes are those of a page. What a page has only one of is no axis of the image.
    inner = tuple(i for i, n in enumerate(layout.shape) if n > 1 or i in (2, 3))
    lengths = tuple(layout.shape[i] for i in inner)
    n_lead = len(shape) - len(inner)
    if n_lead < 0 or shape[n_lead:] != lengths:
        raise ValueError(f"{what} are not made of pages {lengths}; write it anew, one plane per page")
    n_pages = math.prod(shape[:n_lead])
    if n_pages > MAX_PAGES:
        raise ValueError(f"{what} have {n_pages} pages, more than {MAX_PAGES}; no image has")
    return Stack(_table(series, layout, n_pages, path), shape, inner)


def _table(series: tifffile.TiffPageSeries, layout: Layout, n_pages: int, path: str) -> Pages:
    """Return where the pages of one resolution lie, checked against the sizes of their files."""
    if layout.plain and not series.is_multifile and series.dataoffset is not None:
        # Also where a file has one directory for all of them: what ImageJ writes beyond 4 GB.
        offsets = series.dataoffset + np.arange(n_pages, dtype=np.int64)[:, None] * layout.page_nbytes
        pages = Pages(
            layout,
            (path,),
            np.zeros(n_pages, np.int32),
            offsets,
            np.full((n_pages, 1), layout.page_nbytes, np.int64),
        )
    else:
        pages = _listed(series, layout, n_pages, path)
    _check_ends(pages, n_pages)
    return pages


def _listed(series: tifffile.TiffPageSeries, layout: Layout, n_pages: int, path: str) -> Pages:
    """Return pages that have a directory each."""
    frames: list[Any] = list(series)
    missing = [i for i, frame in enumerate(frames) if frame is None]
    if missing or len(frames) != n_pages:
        n = len(missing) or n_pages - len(frames)
        first = missing[0] if missing else len(frames)
        raise ValueError(
            f"{path}: {n} of {n_pages} pages are missing, the first is page {first}; the acquisition or a copy was cut "
            f"short, or files that it names are not beside it; {AGAIN}"
        )
    files: dict[str, int] = {}
    file_of = [files.setdefault(str(f.parent.filehandle.path), len(files)) for f in frames]
    _check_folder(path, files)
    _check_frames(frames, layout, path)
    starts: list[tuple[int, ...]] = [f.dataoffsets[:1] if layout.plain else f.dataoffsets for f in frames]
    sizes = [(layout.page_nbytes,) if layout.plain else f.databytecounts for f in frames]
    tables = tuple(f.jpegtables for f in frames)
    return Pages(
        layout,
        tuple(files),
        np.asarray(file_of, np.int32),
        np.asarray(starts, np.int64),
        np.asarray(sizes, np.int64),
        tables if any(table is not None for table in tables) else (),
    )


def _check_frames(frames: Sequence[Any], layout: Layout, path: str) -> None:
    """Raise unless all pages are stored as `layout` says."""
    n_segments = math.prod(layout.n_segments)
    for keyframe in {id(f.keyframe): f.keyframe for f in frames}.values():  # one per file
        if not Layout.of(keyframe).same_as(layout):
            raise ValueError(
                f"{path}: pages of {keyframe.parent.filename} are stored unlike others; write it anew"
            )
    for i, frame in enumerate(frames):
        starts, sizes = frame.dataoffsets, frame.databytecounts
        if layout.plain and any(a + n != b for a, n, b in zip(starts, sizes, starts[1:], strict=False)):
            raise ValueError(
                f"{path}: the strips of page {i} do not lie in a row, as those of page 0; write it anew"
            )
        if not layout.plain and not len(starts) == len(sizes) == n_segments:
            raise ValueError(
                f"{path}: page {i} has {min(len(starts), len(sizes))} strips or tiles instead of {n_segments}; {AGAIN}"
            )


def _check_folder(path: str, files: Iterable[str]) -> None:
    """Raise if a file names others that are not beside it."""
    for name in files:
        if Path(name).parent != Path(path).parent:
            raise ValueError(f"{path} names the file {short(name)}, which is not beside it; move it there")


def _check_ends(pages: Pages, n_pages: int) -> None:
    sizes = np.asarray([os.path.getsize(name) for name in pages.files], np.int64)
    # Unsigned, so that no claim of a file overflows to something that looks harmless.
    ends = pages.offsets.astype(np.uint64) + pages.nbytes.astype(np.uint64)
    too_far = (ends > sizes[pages.file_of, None].astype(np.uint64)).any(axis=1)
    if too_far.any():
        first = int(np.argmax(too_far))
        raise ValueError(
            f"{pages.where(first)} ends after the file's {sizes[pages.file_of[first]]} bytes, as do "
            f"{int(too_far.sum()) - 1} others of {n_pages}; the file is truncated, {AGAIN}"
        )


def _digest(letters: str, levels: Sequence[Stack], files: Sequence[str]) -> str:
    made = hashlib.sha256(json.dumps([letters, file_facts(files)]).encode())
    for stack in levels:
        pages, layout = _pages(stack), stack.pages.layout
        facts = stack.shape, layout.segment, layout.stored.str, layout.compression, layout.predictor
        made.update(json.dumps(facts).encode())
        for table in (pages.file_of, pages.offsets, pages.nbytes):
            made.update(np.ascontiguousarray(table).data)
    return made.hexdigest()


def _pages(stack: Stack) -> Pages:
    assert isinstance(stack.pages, Pages)
    return stack.pages

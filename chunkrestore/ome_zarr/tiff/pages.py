"""Pages of TIFF files: where their strips and tiles lie, and regions of them, decoded no further than touched.

A page is seen with five axes, whatever it has: separate samples, depth, length, width, interleaved samples. Every
read opens its file and closes it again, which costs some ten microseconds: no handles are kept, threads share none,
and folders may hold any number of files.
"""

from __future__ import annotations

import itertools
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from chunkrestore.ome_zarr.damage import CorruptChunkError

if TYPE_CHECKING:
    import tifffile

Shape = tuple[int, ...]
Box = tuple[slice, slice, slice, slice, slice]
"""Start and stop on the five axes of a page."""

_INFLATERS: dict[int, Callable[[], Any]] = {
    8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor,
}  # fmt: skip
"""Codecs that tifffile runs without any limit if the package imagecodecs is missing, by TIFF's numbers for them."""

_WIDE, _LONG_ROW_NBYTES = 8, 2**16
"""Rows of more bytes than the second, of which less than a part in so many is wanted, are not read in whole."""


@dataclass(frozen=True)
class Layout:
    """How the pages of an image are stored: the same for all of them."""

    shape: Shape
    """Of a page, five axes."""
    segment: Shape
    """Of a strip or tile, five axes; of a row where pages are stored as they are."""
    stored: np.dtype[Any]
    """In the byte order of the file."""
    plain: bool
    """Whether a page lies in its file as it is, from its first byte to its last."""
    compression: int
    """TIFF's number of the codec; 1 for none."""
    predictor: int
    """TIFF's number; 1 for none."""
    decode: Callable[..., Any]
    """tifffile's decoder of a strip or tile."""

    @classmethod
    def of(cls, page: tifffile.TiffPage) -> Layout:
        """Return the layout of `page`.

        Raises
        ------
        ValueError
            If its strips and tiles cannot be decoded, with tifffile's reason.
        """
        decode = page.decode
        decode(None, 0)  # of nothing is nothing, unless the codec or the kind of numbers is not known
        separate, depth, length, width, interleaved = page.shaped
        if page.is_final:
            lengths = 1, 1, width
        elif page.is_tiled:
            lengths = page.tiledepth, page.tilelength, page.tilewidth
        else:
            lengths = 1, min(page.rowsperstrip, length), width
        kind = np.dtype(page.dtype)
        return cls(
            shape=(separate, depth, length, width, interleaved),
            segment=(1, *lengths, interleaved),
            stored=kind.newbyteorder(page.parent.byteorder),
            plain=bool(page.is_final),
            compression=int(page.compression),
            predictor=int(page.predictor),
            decode=_bounded(page) or decode,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Native byte order."""
        return self.stored.newbyteorder("=")

    @property
    def page_nbytes(self) -> int:
        """Bytes of a decoded page."""
        return math.prod(self.shape) * self.stored.itemsize

    @cached_property
    def n_segments(self) -> Shape:
        """Strips or tiles per axis."""
        return tuple(-(-n // s) for n, s in zip(self.shape, self.segment, strict=True))

    def same_as(self, other: Layout) -> bool:
        """Return whether pages of the two are stored alike."""
        mine, others = (
            (x.shape, x.segment, x.stored, x.plain, x.compression, x.predictor) for x in (self, other)
        )
        return mine == others


@dataclass(frozen=True)
class Pages:
    """Pages of one layout, in one file or in several."""

    layout: Layout
    files: tuple[str, ...]
    """Paths."""
    file_of: np.ndarray
    """Per page, index of its file."""
    offsets: np.ndarray
    """Per page and strip or tile, its first byte; one per page where pages are stored as they are."""
    nbytes: np.ndarray
    """Likewise, how many bytes it has; 0 for one that was never written."""
    tables: tuple[bytes | None, ...] = ()
    """Per page, JPEG tables, if there are any."""

    def __len__(self) -> int:
        return len(self.file_of)

    def where(self, page: int) -> str:
        """Return the name of a page for messages."""
        return f"page {page} of {self.files[self.file_of[page]]}"

    def read(self, page: int, box: Box) -> np.ndarray:
        """Return a box of a page, five axes in native byte order.

        Raises
        ------
        CorruptChunkError
            If a strip or tile ends too early or cannot be decoded.
        OSError
            If the file cannot be read.
        """
        with open(self.files[self.file_of[page]], "rb", buffering=0) as file:
            try:
                return self._plain(file, page, box) if self.layout.plain else self._decoded(file, page, box)
            except (OSError, MemoryError):
                raise
            except Exception as error:
                reason = " ".join(str(error).split())
                raise CorruptChunkError(
                    f"{self.where(page)} cannot be decoded: {reason}; the file is truncated or damaged, restore it "
                    "from a copy"
                ) from error

    def _plain(self, file: BinaryIO, page: int, box: Box) -> np.ndarray:
        """Read a box of a page that is stored as it is."""
        samples, depths, *_, interleaved = box
        planes = [
            self._rows(file, int(self.offsets[page, 0]), s * self.layout.shape[1] + d, box)
            for s in range(samples.start, samples.stop)
            for d in range(depths.start, depths.stop)
        ]
        several = planes[0][None] if len(planes) == 1 else np.stack(planes)
        return several.reshape(*_lengths(box)[:-1], -1)[..., interleaved]

    def _rows(self, file: BinaryIO, offset: int, plane: int, box: Box) -> np.ndarray:
        """Read rows of a plane of a page that begins at `offset`; three axes, all interleaved samples."""
        _, _, rows, columns, _ = box
        _, _, length, width, interleaved = self.layout.shape
        kind = self.layout.stored
        pixel_nbytes = interleaved * kind.itemsize
        first = offset + (plane * length + rows.start) * width * pixel_nbytes
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        if n_columns * _WIDE > width or width * pixel_nbytes <= _LONG_ROW_NBYTES:
            data = _read_exactly(file, first, n_rows * width * pixel_nbytes)
            array = data.view(kind).reshape(n_rows, width, interleaved)[:, columns]
        else:
            array = np.empty((n_rows, n_columns, interleaved), kind)
            for y, row in enumerate(array):
                start = first + (y * width + columns.start) * pixel_nbytes
                row[:] = _read_exactly(file, start, row.nbytes).view(kind).reshape(row.shape)
        return array.astype(self.layout.dtype, copy=False)

    def _decoded(self, file: BinaryIO, page: int, box: Box) -> np.ndarray:
        """Read and decode the strips or tiles that a box touches."""
        layout = self.layout
        out = np.empty(_lengths(box), layout.dtype)
        tables = {"jpegtables": self.tables[page]} if self.tables else {}
        for index, first in _touched(layout, box):
            n = int(self.nbytes[page, index])
            data = _read_exactly(file, int(self.offsets[page, index]), n) if n else None
            # What is decoded has the axes of a strip or tile: depth, length, width, interleaved samples.
            decoded, _, lengths = layout.decode(data, index, **tables)
            stops = [a + k for a, k in zip(first, (1, *lengths[:3], layout.shape[-1]), strict=True)]
            common = [
                slice(max(a, b.start), min(z, b.stop)) for a, z, b in zip(first, stops, box, strict=True)
            ]
            target = tuple(
                slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True)
            )
            inside = tuple(slice(c.start - a, c.stop - a) for c, a in zip(common, first, strict=True))
            out[target] = 0 if decoded is None else decoded[None][inside]
        return out


class Indexed(Protocol):
    """Anything that reads boxes of numbered pages."""

    @property
    def layout(self) -> Layout:
        """Of every page."""

    def read(self, page: int, box: Box) -> np.ndarray:
        """Return a box of a page."""


@dataclass(frozen=True)
class Stack:
    """Pages as an array: leading axes count pages, the others lie within a page."""

    pages: Indexed
    shape: Shape
    """Of the array."""
    inner: tuple[int, ...]
    """For each axis within a page, which of a page's five axes it is."""

    @property
    def n_lead(self) -> int:
        """Axes that count pages."""
        return len(self.shape) - len(self.inner)

    @property
    def chunks(self) -> Shape:
        """Shape of what is decoded at once."""
        layout = self.pages.layout
        return (1,) * self.n_lead + tuple(min(layout.segment[i], layout.shape[i]) for i in self.inner)

    def read(self, selection: Sequence[Any]) -> np.ndarray:
        """Return the part at `selection`: per axis a slice, or an array of indices."""
        wanted = [
            range(n)[s] if isinstance(s, slice) else [int(i) for i in s]
            for s, n in zip(selection, self.shape, strict=True)
        ]
        lead, inner = wanted[: self.n_lead], wanted[self.n_lead :]
        out = np.empty([len(w) for w in wanted], self.pages.layout.dtype)
        box = [slice(0, 1)] * 5
        for i, indices in zip(self.inner, inner, strict=True):
            box[i] = slice(min(indices), max(indices) + 1)
        # Within the box, what was asked for: neighbours in their order as a view, anything else by index.
        picks = [np.asarray(w, int) - min(w) for w in inner]
        in_order = all(np.array_equal(p, np.arange(len(p))) for p in picks)
        for place in np.ndindex(out.shape[: self.n_lead]):
            at = [indices[i] for indices, i in zip(lead, place, strict=True)]
            number = int(np.ravel_multi_index(at, self.shape[: self.n_lead])) if at else 0
            page = self.pages.read(number, tuple(box))  # type: ignore[arg-type]
            view = page.reshape([page.shape[i] for i in self.inner])
            out[place] = view if in_order else view[np.ix_(*picks)]
        return out


def _touched(layout: Layout, box: Box) -> Iterator[tuple[int, Shape]]:
    """Yield the number and the first corner of every strip or tile that a box touches."""
    ranges = [
        range(b.start // s, -(-b.stop // s)) for b, s in zip(box[:-1], layout.segment[:-1], strict=True)
    ]
    for index in itertools.product(*ranges):
        number = 0
        for i, n in zip(index, layout.n_segments, strict=False):
            number = number * n + i
        yield number, (*(i * s for i, s in zip(index, layout.segment, strict=False)), 0)


def _bounded(page: tifffile.TiffPage) -> Callable[..., Any] | None:
    """Return a decoder that makes no more bytes than a strip or tile has; None where tifffile's own does not."""
    if int(page.compression) not in _INFLATERS or find_spec("imagecodecs") is not None:
        return None
    if page.bitspersample not in (8, 16, 32, 64) or page.fillorder != 1 or page.predictor not in (1, 2):
        raise ValueError(
            f"{page.bitspersample} bits per sample under predictor {int(page.predictor)} need the package imagecodecs"
        )
    inflater = _INFLATERS[int(page.compression)]
    kind = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    _, _, length, width, interleaved = page.shaped
    whole = (
        (page.tiledepth, page.tilelength, page.tilewidth) if page.is_tiled else (1, page.rowsperstrip, width)
    )
    rows, is_tiled = whole[1], bool(page.is_tiled)
    n_strips, predicted = -(-length // rows), int(page.predictor) == 2

    def decode(data: bytes | None, index: int) -> tuple[np.ndarray | None, None, Shape]:
        n_rows = rows if is_tiled else min(rows, length - index % n_strips * rows)
        shape = (whole[0], n_rows, whole[2], interleaved)
        if data is None:
            return None, None, shape
        nbytes, most = (math.prod(s) * kind.itemsize for s in (shape, (*whole, interleaved)))
        inflated = inflater().decompress(data, most + 1)
        if not nbytes <= len(inflated) <= most:
            raise ValueError(f"it decodes to {len(inflated)} bytes or more, not to {nbytes}")
        array = np.frombuffer(inflated, kind, nbytes // kind.itemsize).reshape(shape)
        native = array.astype(kind.newbyteorder("="), copy=False)
        if predicted:
            whole_numbers = native.view(f"u{kind.itemsize}")
            native = np.cumsum(whole_numbers, axis=-2, dtype=whole_numbers.dtype).view(native.dtype)
        return native, None, shape

    return decode


def _read_exactly(file: BinaryIO, offset: int, nbytes: int) -> np.ndarray:
    """Return `nbytes` bytes from `offset` on; one call may give fewer, and gives no more than 2 GiB."""
    data = np.empty(nbytes, np.uint8)  # not filled with zeros first
    view, done = data.data, 0
    file.seek(offset)
    while done < nbytes:
        n = file.readinto(view[done : done + min(nbytes - done, 2**30)])  # type: ignore[attr-defined]
        if not n:
            raise ValueError(f"it ends {nbytes - done} bytes too early")
        done += n
    return data


def _lengths(box: Box) -> Shape:
    return tuple(b.stop - b.start for b in box)

"""Small picklable handles on one array of a store, for tasks that read a region of it.

A handle is made on the driver from metadata; a worker opens the array when it first reads, once per
process. Axes come in the order ``tczyx`` whatever their order in the store, numbers in native byte order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from chunkrestore.grid import Slices
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.damage import CorruptChunkError, diagnosis, region_text
from chunkrestore.ome_zarr.limits import check_array, check_lengths, check_names
from chunkrestore.ome_zarr.metadata import canonical_order, spatial

if TYPE_CHECKING:
    import zarr

    from chunkrestore.ome_zarr.direct import DirectArray

IMAGE_DTYPES = ("uint8", "uint16", "int16", "float32")
"""What operators accept."""


def check_dtype(dtype: Any, what: str = "image") -> np.dtype[Any]:
    """Return `dtype` in native byte order if operators accept it.

    Raises
    ------
    ValueError
        If it is not unsigned 8 or 16 bit, signed 16 bit or float 32 bit.
    """
    native: np.dtype[Any] = np.dtype(dtype).newbyteorder("=")
    if native.name not in IMAGE_DTYPES:
        raise ValueError(
            f"`dtype` {native.name} of {what} is not supported, only {', '.join(IMAGE_DTYPES)}; "
            "convert it first, for example with .astype('float32')"
        )
    return native


@dataclass(frozen=True)
class RegionReader:
    """An array of a store, or a selection of it, seen as one volume per time point and channel."""

    store: str
    """Path of the group that the array belongs to."""
    array_path: str
    """Path of the array inside the group; empty if `store` is the array."""
    axes: str
    """Letters of ``tczyx``, one per axis."""
    dtype: np.dtype[Any]
    """Native byte order."""
    chunks: tuple[int, ...]
    """Shape of what is decoded at once."""
    write_unit: tuple[int, ...]
    """Shape of what is stored as one file: the shard, or the chunk where there are no shards."""
    picks: tuple[Sequence[int], ...]
    """Stored indices per axis, a range unless channels or time points were picked one by one."""
    order: tuple[int, ...]
    """Position in the stored array of each axis."""
    zarr_format: int
    """2 or 3."""
    digest: str
    """SHA-256 of the array's metadata; a worker refuses an array that has changed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length per axis."""
        return tuple(len(p) for p in self.picks)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)

    @property
    def n_t(self) -> int:
        """Number of time points; 1 without a ``t`` axis."""
        return self._length("t")

    @property
    def n_c(self) -> int:
        """Number of channels; 1 without a ``c`` axis."""
        return self._length("c")

    @property
    def spatial_axes(self) -> str:
        """``zyx`` or ``yx``."""
        return spatial(self.axes)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Shape of one volume."""
        return self.shape[-len(self.spatial_axes) :]

    @property
    def spatial_chunks(self) -> tuple[int, ...]:
        """`chunks` on the spatial axes."""
        return self.chunks[-len(self.spatial_axes) :]

    @property
    def spatial_write_unit(self) -> tuple[int, ...]:
        """`write_unit` on the spatial axes."""
        return self.write_unit[-len(self.spatial_axes) :]

    @property
    def name(self) -> str:
        """Path of the array, for messages."""
        return stores.join(self.store, self.array_path)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the array and the selection, as JSON-compatible values.

        The digest covers the array's metadata (shape, dtype, chunks, codecs), not its values.
        """
        full = [list(p) if not isinstance(p, range) else [p.start, p.stop] for p in self.picks]
        return {
            "store": self.store,
            "array": self.array_path,
            "axes": self.axes,
            "dtype": self.dtype.name,
            "picks": full,
            "metadata_sha256": self.digest,
        }

    def read(self, t: int, c: int, slices: Slices) -> np.ndarray:
        """Return the region `slices` (one per spatial axis) of one time point and channel.

        Parameters
        ----------
        t, c
            Index of the time point and channel; 0 where the array has no such axis.
        slices
            With start and stop inside the volume, step 1.

        Raises
        ------
        CorruptChunkError
            If a chunk cannot be decoded.
        """
        region = self._region(t, c, slices)
        return self[region].reshape(tuple(s.stop - s.start for s in region[-len(slices) :]))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the part at `index`, made of slices and integers, one per axis."""
        index = self._expand(index)
        selection: list[Any] = [slice(0)] * self.ndim
        for position, stored, i in zip(self.order, self.picks, index, strict=True):
            pick = stored[i : i + 1 or None] if isinstance(i, int) else stored[i]
            if len(pick) == 1:
                selection[position] = slice(pick[0], pick[0] + 1)
            elif isinstance(pick, range) and pick.step > 0:
                selection[position] = slice(pick.start, pick.stop, pick.step)
            else:
                selection[position] = np.asarray(pick, int)
        block = np.transpose(self._fetch(tuple(selection)), self.order)
        native: np.ndarray = block.astype(self.dtype, copy=False)
        return native[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    @classmethod
    def at(cls, store: str, array_path: str, letters: str, *, names: Sequence[str] = ()) -> Self:
        """Return a handle on the array at `array_path` in `store`, from its metadata.

        Parameters
        ----------
        store, array_path
            Group and path of the array inside it.
        letters
            Letter of each axis in the order of the stored array.
        names
            What the group calls the axes, in lower case, which the array then must not contradict.

        Raises
        ------
        FileNotFoundError
            If there is no array.
        ValueError
            If it leaves its group, cannot be opened, is beyond `chunkrestore.ome_zarr.limits`, is empty, or has
            another number of axes.
        """
        if array_path:
            stores.check_place(store, array_path, own=cls._mode != "r")
        name = stores.join(store, array_path)
        node = stores.read_node(name)
        if node is None or node.kind != "array":
            instead = "" if node is None else " (a group lies there)"
            raise FileNotFoundError(
                f"array {name}, named by its group, is missing{instead}; copy the store again"
            )
        array = _open(store, array_path, node.zarr_format, node.digest, cls._mode).array
        if array.ndim != len(letters):
            raise ValueError(
                f"array {name} has {array.ndim} axes but its group names {len(letters)}: {letters!r}"
            )
        if 0 in array.shape:
            raise ValueError(f"array {name} of shape {array.shape} is empty; there is nothing to process")
        check_names(node.metadata, names, name)
        check_lengths(array.shape, letters, name)
        order = canonical_order(letters)
        return cls(
            store=store,
            array_path=array_path,
            axes="".join(letters[i] for i in order),
            dtype=np.dtype(array.dtype).newbyteorder("="),
            chunks=tuple(int(array.chunks[i]) for i in order),
            write_unit=tuple(int((array.shards or array.chunks)[i]) for i in order),
            picks=tuple(range(int(array.shape[i])) for i in order),
            order=order,
            zarr_format=node.zarr_format,
            digest=node.digest,
        )

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        # An array that was written anew under the same path must not be mistaken for the old one.
        return type(self).__name__, self.name, self.digest, stores.stamp(self.name), str(self.picks)

    _mode: ClassVar[str] = "r"

    def open(self) -> zarr.Array[Any]:
        """Return the zarr array, opened once per process.

        Raises
        ------
        FileNotFoundError
            If it is gone.
        ValueError
            If its metadata has changed since this handle was made.
        """
        return self._opened().array

    def _opened(self) -> _Opened:
        return _open(self.store, self.array_path, self.zarr_format, self.digest, self._mode)

    def _expand(self, index: Any) -> tuple[int | slice, ...]:
        """Return one integer or slice per axis."""
        parts = index if isinstance(index, tuple) else (index,)
        missing = (slice(None),) * (self.ndim - len(parts) + (Ellipsis in parts))
        position = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
        parts = (*parts[:position], *missing, *parts[position + 1 :])
        return tuple(i if isinstance(i, slice) else operator.index(i) for i in parts)

    def _length(self, axis: str) -> int:
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def _region(self, t: int, c: int, slices: Slices) -> Slices:
        """Return one slice per axis, checked to lie inside the array."""
        if len(slices) != len(self.spatial_axes):
            raise ValueError(
                f"`slices` must have one entry per axis {self.spatial_axes!r}, got {len(slices)}"
            )
        for what, i, n in (("t", t, self.n_t), ("c", c, self.n_c)):
            if not 0 <= i < n:
                raise ValueError(f"`{what}` {i} does not exist in {self.name}, which has {n}: 0 to {n - 1}")
        for s, n in zip(slices, self.spatial_shape, strict=True):
            if s.step not in (None, 1) or not 0 <= s.start < s.stop <= n:
                raise ValueError(
                    f"`slices` {region_text(slices)} is empty or leaves {self.name} of {self.spatial_shape}"
                )
        lead = tuple(slice(i, i + 1) for axis, i in (("t", t), ("c", c)) if axis in self.axes)
        return (*lead, *slices)

    def _fetch(self, selection: tuple[Any, ...]) -> np.ndarray:
        opened = self._opened()
        try:
            if opened.direct is not None and all(_is_plain(s) for s in selection):
                return opened.direct.read(selection)
            is_basic = all(isinstance(s, slice) for s in selection)
            part = opened.array[selection] if is_basic else opened.array.oindex[selection]
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise CorruptChunkError(diagnosis(opened.array, self.name, selection, error)) from error
        return np.asarray(part)


@dataclass(frozen=True, eq=False)
class _Opened:
    """An array as this process sees it."""

    array: zarr.Array[Any]
    direct: DirectArray | None
    """The faster way to its chunks, where it is of the kind that has one."""


@lru_cache(maxsize=256)
def _open(store: str, array_path: str, zarr_format: int, digest: str, mode: str) -> _Opened:
    """Open an array once per process; an array with another digest is another array."""
    name = stores.join(store, array_path)
    node = stores.read_node(name)
    if node is None:
        raise FileNotFoundError(f"array {name} does not exist any more")
    if node.digest != digest:
        raise ValueError(f"array {name} has changed since it was opened; open the store again")
    check_array(node.metadata, zarr_format, name)
    from chunkrestore.ome_zarr.bounded import open_array
    from chunkrestore.ome_zarr.direct import direct

    try:
        array = open_array(node.metadata, stores.array_store(name), writable=mode != "r")
        return _Opened(array, direct(node.metadata, array, writable=mode != "r"))
    except (ConnectionError, TimeoutError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"array {name} cannot be opened: {' '.join(str(error).split())}") from error


def _is_plain(selection: Any) -> bool:
    return isinstance(selection, slice) and selection.step in (None, 1) and selection.start < selection.stop

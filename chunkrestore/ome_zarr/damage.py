"""Say which chunk or shard of an array it is that cannot be decoded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import zarr


class CorruptChunkError(ValueError):
    """A chunk or shard cannot be decoded: trying again will not help."""


class DamagedUnitError(ValueError):
    """A chunk or shard cannot be decoded, by the name of its index alone."""

    def __init__(self, unit: tuple[int, ...], reason: object) -> None:
        super().__init__(str(reason))
        self.unit = unit
        """Index among the chunks, or shards, of the array."""


def diagnosis(array: zarr.Array[Any], name: str, selection: tuple[Any, ...], error: Exception) -> str:
    """Return a sentence that names the first chunk or shard of `selection` that cannot be decoded.

    Parameters
    ----------
    array, name
        What was read, and its path.
    selection
        Slices or indices per stored axis.
    error
        What reading raised.
    """
    found = error if isinstance(error, DamagedUnitError) else _first_damaged(array, selection)
    if found is None:
        return f"region {region_text(selection)} of array {name} cannot be read: {error}"
    key, region = array.metadata.encode_chunk_key(found.unit), _region(array, found.unit)
    return (
        f"chunk {key} of array {name} (region {region_text(region)}) cannot be decoded: "
        f"{' '.join(str(found).split())}; the file is truncated or damaged, restore it from a copy"
    )


def region_text(region: Sequence[Any]) -> str:
    """Return slices as in ``0:64, 64:128``."""
    return ", ".join(f"{s.start}:{s.stop}" if isinstance(s, slice) else str(list(s)) for s in region)


def _first_damaged(array: zarr.Array[Any], selection: tuple[Any, ...]) -> DamagedUnitError | None:
    """Read one chunk or shard after the other; return the first error, None if none fails alone."""
    touched = (
        sorted({i // u for i in (range(n)[s] if isinstance(s, slice) else s.tolist())})
        for s, n, u in zip(selection, array.shape, array.shards or array.chunks, strict=True)
    )
    for index in itertools.product(*touched):
        # Of a shard, no more than was asked for: all of it may be far larger
        touching = (
            slice(max(r.start, _first(s)), min(r.stop, _last(s) + 1))
            for r, s in zip(_region(array, index), selection, strict=True)
        )
        try:
            array[tuple(touching)]
        except OSError:
            raise
        except Exception as cause:
            return DamagedUnitError(index, cause)
    return None


def _region(array: zarr.Array[Any], unit: tuple[int, ...]) -> tuple[slice, ...]:
    lengths = array.shards or array.chunks
    return tuple(
        slice(i * u, min((i + 1) * u, n)) for i, u, n in zip(unit, lengths, array.shape, strict=True)
    )


def _first(selection: Any) -> int:
    return int(selection.start if isinstance(selection, slice) else selection.min())


def _last(selection: Any) -> int:
    return int(selection.stop - 1 if isinstance(selection, slice) else selection.max())

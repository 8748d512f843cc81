"""Plain stored arrays, such as a mask, by their place: what can be written down instead of the array."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from chunkrestore.ome_zarr.limits import check_array
from chunkrestore.ome_zarr.store import check_place, join, read_node

if TYPE_CHECKING:
    import zarr


def place_of_array(array: Any) -> tuple[str, str] | None:
    """Return folder of the store and path inside it of a zarr array on the local file system, else None."""
    if "zarr" not in sys.modules:
        return None
    import zarr
    from zarr.storage import LocalStore

    if not isinstance(array, zarr.Array) or not isinstance(array.store, LocalStore):
        return None
    return str(array.store.root.absolute()), array.path


def open_array(folder: str, path: str) -> zarr.Array[Any]:
    """Return the array at a place that `place_of_array` gave, for reading.

    Raises
    ------
    FileNotFoundError
        If there is no array.
    ValueError
        If `folder` is no absolute path, `path` leaves it, or the array is beyond `chunkrestore.ome_zarr.limits`.
    """
    if not os.path.isabs(folder):
        raise ValueError(f"store {folder!r} of an array must be an absolute path")
    place = join(folder, check_place(folder, path)) if path else folder
    node = read_node(place)
    if node is None or node.kind != "array":
        raise FileNotFoundError(f"array {place} does not exist")
    check_array(node.metadata, node.zarr_format, place)
    import zarr

    array = zarr.open_array(folder, path=path, mode="r", zarr_format=node.zarr_format)
    return array

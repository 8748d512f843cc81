"""What an earlier table of the same objects tells of where they came from, for a table that replaces it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.jobs.object_columns import Plane
from chunkrestore.jobs.object_table import TABLE_NAME, read_description, table_path
from chunkrestore.ome_zarr import remote
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.remote_errors import named

_PREDICTED = re.compile(r"probability|point_[zyx]|class_id|class_probability_\d{1,4}|distances")
_MOST_COLUMNS = 10_000
_MOST_ROWS = 2**20
"""Of a row group, which is read at once. Ours have 2**16."""


class Predictions:
    """Columns of a table that measuring its labels again does not give: probability, class, shape.

    Parameters
    ----------
    path
        Path of the table.

    Raises
    ------
    ValueError
        If the file is no table of this package.
    ImportError
        If pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from pyarrow import parquet

        self.path = Path(path)
        self.description = read_description(path)
        metadata = parquet.read_metadata(path)
        self.n_objects = metadata.num_rows
        rows = max((metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)), default=0)
        if rows > _MOST_ROWS or metadata.num_columns > _MOST_COLUMNS:
            raise ValueError(
                f"{path} has row groups of {rows} rows and {metadata.num_columns} columns; the limits are {_MOST_ROWS} "
                f"and {_MOST_COLUMNS}. Measure into another `output`"
            )
        schema = parquet.read_schema(path)
        self.names = [name for name in schema.names if _PREDICTED.fullmatch(name)]
        self._nothing = arrays_of(schema.empty_table().select(self.names))

    def none(self) -> dict[str, np.ndarray]:
        """Return the columns without rows."""
        return dict(self._nothing)

    def shapes(self) -> dict[str, Any]:
        """Return what the description of a table with these columns must say of shapes."""
        return {key: self.description[key] for key in ("rays", "lattice") if key in self.description}

    def of(
        self, plane: Plane, labels: npt.NDArray[np.int64], n_voxels: npt.NDArray[np.int64]
    ) -> dict[str, np.ndarray]:
        """Return the columns of some objects.

        Parameters
        ----------
        plane
            Where they lie.
        labels
            Ascending: all that there are between the first and the last of them.
        n_voxels
            Their voxels as measured.

        Raises
        ------
        ValueError
            If the table tells of other objects, or of other sizes.
        """
        from pyarrow import parquet

        t, c = plane
        wanted = [
            ("t", "==", t),
            ("c", "==", c),
            ("label", ">=", int(labels[0])),
            ("label", "<=", int(labels[-1])),
        ]
        table = parquet.read_table(self.path, columns=["label", "n_voxels", *self.names], filters=wanted)
        known, sizes = table["label"].to_numpy(), table["n_voxels"].to_numpy()
        if not np.array_equal(known, labels) or not np.array_equal(sizes, n_voxels):
            raise self._outdated(_difference(known, sizes, labels, n_voxels))
        return arrays_of(table.select(self.names))

    def check_count(self, n_objects: int) -> None:
        """Raise `ValueError` unless there are as many objects: some may be gone that lay between others."""
        if n_objects != self.n_objects:
            raise self._outdated(f"{self.n_objects} there and {n_objects} here")

    def _outdated(self, difference: str) -> ValueError:
        return ValueError(
            f"{self.path} tells of other objects than the labels show, {difference}: they were changed since. Remove "
            "the table, whose predictions do not hold any more, and measure again"
        )


def earlier_predictions(labels: str, scratch: Path) -> Predictions | None:
    """Return the predictions in the table of the label group at `labels`, or None if there are none.

    Parameters
    ----------
    labels
        Path or URL of the group.
    scratch
        Existing folder, which a table at a URL is copied into.

    Raises
    ------
    ValueError
        As for `Predictions`, or if the table lies elsewhere, behind a link.
    """
    path = table_path(labels)
    if not stores.is_file(path):
        return None
    stores.check_place(labels, TABLE_NAME)
    if stores.is_url(path):
        copied = scratch / TABLE_NAME
        with named(path) as obstore, copied.open("wb") as file:
            for chunk in obstore.get(remote.client(stores.parent(path)), TABLE_NAME).stream():
                file.write(chunk)
        path = str(copied)
    found = Predictions(path)
    return found if found.names else None


def arrays_of(table: Any) -> dict[str, np.ndarray]:
    """Return the columns of a table as arrays; lists of fixed length as a second axis."""
    arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if hasattr(column.type, "list_size"):
            values = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name] = values.reshape(len(column), column.type.list_size)
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return arrays


def _difference(
    known: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    n_voxels: npt.NDArray[np.int64],
) -> str:
    """Return in words the first object in which two tables differ."""
    before: Mapping[int, int] = dict(zip(known.tolist(), sizes.tolist(), strict=True))
    now: Mapping[int, int] = dict(zip(labels.tolist(), n_voxels.tolist(), strict=True))
    label = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
    return f"such as {label} with {before.get(label, 0)} voxels there and {now.get(label, 0)} here"

"""The table of a label image's objects: one row each, in a Parquet file beside the labels.

Rows are sorted by ``t``, ``c`` and ``label``; `chunkrestore.jobs.object_columns` says what the columns are. The
footer holds JSON under the key ``chunkrestore`` (`read_description`): axes, shape, voxel size, unit, translation, how
the labels came about, and rays and lattice (1 if absent), so that shapes are rebuilt without the model
(`read_shapes`)::

    vertices[i, k] = point[i] + lattice * distances[i, k] * rays.vertices[k]

Rows are written as they come, in groups of a fixed length: memory depends neither on their number nor on how they
come in parts, and neither does a byte of the file.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkrestore.jobs.object_columns import FORMAT, ObjectColumns, Part, Plane
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.ome_zarr import remote
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.remote_errors import named

if TYPE_CHECKING:
    from chunkrestore.jobs.predictions import Predictions

TABLE_NAME = "objects.parquet"
"""Name of the table in the group of its labels."""

_KEY = b"chunkrestore"
_ROWS = 2**16
"""Rows that are compressed together: 10 MiB, or 34 MiB with the distances of 96 rays."""


def check_available() -> None:
    """Raise unless tables can be written.

    Raises
    ------
    ImportError
        If pyarrow is not installed.
    """
    _library()


def table_path(labels: str) -> str:
    """Return where the table of the label group at `labels` lies, a path or URL."""
    return stores.join(labels, TABLE_NAME)


def write_objects(
    path: str | os.PathLike[str],
    parts: Iterable[tuple[Plane, Part]],
    columns: ObjectColumns,
    *,
    provenance: Mapping[str, Any],
    scratch: str | os.PathLike[str] | None = None,
    earlier: Predictions | None = None,
) -> int:
    """Write the table of all objects, whole or not at all, and bring it to the disk.

    Parameters
    ----------
    path
        Path or ``s3://`` URL of the file; one that is there is replaced.
    parts
        Planes with some of their objects, as `ObjectColumns.empty` describes them: planes in ascending order, ids
        of a plane ascending, without gaps unless they are measured.
    columns
        What the table tells.
    provenance
        JSON-compatible values that say how the labels came about.
    scratch
        Existing folder for the file until it is sent to a URL, which takes place in parts.
    earlier
        Predictions of the same objects, which are kept.

    Returns
    -------
    int
        Number of objects.

    Raises
    ------
    ValueError
        If a part does not fit to `columns` or to `earlier`, planes or ids are not in order, or a URL comes without
        `scratch`.
    ImportError
        If pyarrow is not installed.

    Notes
    -----
    What grows with the number of objects is the footer, by 2 to 4 kB per 65536. A million objects take 65 MB (with 96
    random distances, which compress badly, 370 MB) and about a second.
    """
    pyarrow, parquet = _library()
    n_objects = 0
    schema, batches = record_batches(parts, columns, provenance, earlier)
    # Numbers hardly repeat, so dictionaries of them would only cost time; planes and classes do.
    repeated = [name for name in ("t", "c", "class_id") if name in schema.names]
    with (
        placed(stores.location(path), scratch) as partial,
        partial.open("wb") as file,
        parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeated) as writer,
    ):
        for group in _row_groups(batches):
            writer.write_table(pyarrow.Table.from_batches(group), row_group_size=_ROWS)
            n_objects += sum(batch.num_rows for batch in group)
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    return n_objects


def record_batches(
    parts: Iterable[tuple[Plane, Part]],
    columns: ObjectColumns,
    provenance: Mapping[str, Any],
    earlier: Predictions | None = None,
) -> tuple[Any, Iterator[Any]]:
    """Return pyarrow's schema of a table, with its description, and its rows as record batches, part by part.

    Parameters are those of `write_objects`, which says what can be wrong with them.
    """
    pyarrow, _ = _library()
    nothing = columns.arrays((0, 0), columns.empty())
    description = {**columns.described(), "provenance": dict(provenance)}
    if earlier is not None:
        nothing |= earlier.none()
        description = {**earlier.shapes(), **description}
    schema = _batch(pyarrow, nothing).schema.with_metadata({_KEY: json.dumps(description)})

    def found() -> Iterator[Any]:
        n_objects = 0
        for plane, of_part in _in_order(parts, columns):
            n_objects += len(of_part["label"])
            if earlier is not None:
                of_part |= earlier.of(plane, of_part["label"], of_part["n_voxels"])
            yield _batch(pyarrow, of_part)
        if earlier is not None:
            earlier.check_count(n_objects)

    return schema, found()


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return axes, shape, voxel size, unit, translation, rays and provenance of a table.

    Raises
    ------
    ValueError
        If the file is no table of this package.
    FileNotFoundError, ImportError
        If there is none, or pyarrow is not installed.
    """
    _, parquet = _library()
    content = (parquet.read_schema(path).metadata or {}).get(_KEY)
    description = {} if content is None else json.loads(content)
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} is no table of objects that this version of chunkrestore has written")
    return dict(description)


@dataclass(frozen=True, eq=False)
class Shapes:
    """Star-convex shapes of objects: what `chunkrestore.kernels.star_painting.paint` makes labels from."""

    rows: dict[str, np.ndarray]
    """``ids`` int64 and ``prob`` float32 (n,), ``dist`` float32 (n, n_rays), ``points`` int64 (n, ndim)."""
    rays: Rays
    """Directions of the distances, and the triangles between them (3-D)."""
    lattice: tuple[float, ...] | None
    """Voxels of the label image per voxel of the lattice that points and distances count in; None for 1."""

    @property
    def vertices(self) -> npt.NDArray[np.float32]:
        """Corners of every shape in voxels of the label image, float32 (n, n_rays, ndim)."""
        around = self.rays.outlines(self.rows["dist"], np.zeros_like(self.rows["points"]))
        voxels = self.lattice or (1.0,) * around.shape[-1]
        return np.asarray(around * voxels + (self.rows["points"] * voxels)[:, np.newaxis], np.float32)


def read_shapes(
    path: str | os.PathLike[str], *, t: int = 0, c: int = 0, labels: range | None = None
) -> Shapes:
    """Return the shapes of a plane's objects, which need no model to be painted or drawn.

    Parameters
    ----------
    path
        Path of a table with distances.
    t, c
        Plane.
    labels
        Ids of the wanted objects, with step 1; all by default. Only what holds them is read.

    Raises
    ------
    ValueError
        If the table holds no shapes, or is none of this package.
    FileNotFoundError, ImportError
        If there is none, or pyarrow is not installed.
    """
    description = read_description(path)
    if "rays" not in description:
        raise ValueError(f"{path} holds no shapes; ask for them when the labels are made")
    _, parquet = _library()
    filters = [("t", "==", t), ("c", "==", c)]
    if labels is not None:
        filters += [("label", ">=", labels.start), ("label", "<", labels.stop)]
    points = [f"point_{axis}" for axis in description["axes"]]
    table = parquet.read_table(path, columns=["label", "probability", *points, "distances"], filters=filters)
    rays = _rays(description["rays"])
    lattice = tuple(description["lattice"]) if "lattice" in description else None
    where = np.stack([table[name].to_numpy() for name in points], axis=-1)
    dist = table["distances"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = {
        "ids": table["label"].to_numpy(),
        "prob": table["probability"].to_numpy(),
        "dist": dist.reshape(len(where), len(rays)),
        "points": where if lattice is None else np.rint(where / lattice).astype(np.int64),
    }
    return Shapes(rows, rays, lattice)


def _rays(described: Mapping[str, Any]) -> Rays:
    faces = np.array(described["faces"], np.int32).reshape(-1, 3)
    return Rays(np.array(described["vertices"], described["dtype"]), faces)


def _library() -> tuple[Any, Any]:
    """Import pyarrow and its Parquet module, and return them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            'tables of objects are written by pyarrow: pip install "chunkrestore[tables]"'
        ) from None
    return pyarrow, pyarrow.parquet


def _in_order(
    parts: Iterable[tuple[Plane, Part]], columns: ObjectColumns
) -> Iterator[tuple[Plane, dict[str, np.ndarray]]]:
    """Yield the columns of `parts`, raising where planes or ids do not ascend, or ids leave a gap they must not."""
    before: tuple[Plane, int] | None = None
    for plane, part in parts:
        found = columns.arrays(plane, part)
        ids = found["label"]
        if not len(ids):
            continue
        goes_on = before is None or plane > before[0] or (plane == before[0] and ids[0] > before[1])
        if not columns.measured and before is not None and plane == before[0]:
            goes_on = ids[0] == before[1] + 1
        if (
            not goes_on
            or not (ids[1:] > ids[:-1]).all()
            or not (columns.measured or (np.diff(ids) == 1).all())
        ):
            raise ValueError(
                f"`parts` have ids {ids[0]} to {ids[-1]} of (t, c) {plane} out of order or with gaps, after {before}"
            )
        before = plane, int(ids[-1])
        yield plane, found


def _batch(pyarrow: Any, columns: Mapping[str, np.ndarray]) -> Any:
    """Return columns as one batch of pyarrow; those with two axes become lists of fixed length."""
    arrays = [
        pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(column.ravel()), column.shape[1])
        if column.ndim == 2
        else pyarrow.array(np.ascontiguousarray(column))
        for column in columns.values()
    ]
    return pyarrow.RecordBatch.from_arrays(arrays, names=list(columns))


def _row_groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield batches of `_ROWS` rows together, the last ones with what is left, whatever the batches' lengths."""
    group: list[Any] = []
    n_rows = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            taken = batch.slice(start, _ROWS - n_rows)
            group.append(taken)
            start, n_rows = start + taken.num_rows, n_rows + taken.num_rows
            if n_rows == _ROWS:
                yield group
                group, n_rows = [], 0
    if group:
        yield group


@contextmanager
def placed(path: str, scratch: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Lend a partial file that takes its place at `path`, a path or URL, if nothing is raised."""
    if stores.is_url(path):
        stores.writable(path)
        if scratch is None:
            raise ValueError(f"`scratch` is needed: the table is made there before it is sent to {path}")
        folder = Path(scratch)
    else:
        folder = Path(path).parent
    partial = folder / f"{stores.name_of(path)}.{uuid.uuid4().hex}.partial"
    try:
        yield partial
        if stores.is_url(path):
            with named(path) as obstore:
                obstore.put(remote.client(stores.parent(path)), stores.name_of(path), partial)
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

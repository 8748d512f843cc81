"""The files that a table of objects can be: Parquet, CSV, and AnnData beside the labels.

Parquet and CSV are written as rows come. AnnData holds all of them in memory, since its library does. It lies in the
group ``tables`` of the image, in zarr of the image's format, as readers look for it:

=========================================  ========================================================================
``X``, ``var_names``                       what is measured or predicted, as float64
``obs``                                    what an object is: its plane, ``label``, voxels, box, class and point; and
                                           ``region``, the name of the labels
``obsm["spatial"]``                        centroids in the order x, y, z, as squidpy draws them; micrometres if known
``obsm["distances"]``                      shapes, if the labels have any
``uns["spatialdata_attrs"]``               ``region``, ``region_key``, ``instance_key``, as SpatialData reads them
attributes of the group                    the same, and those of a ``feature_table`` of version 1, as ngio and Fractal
                                           read them: ``region = {"path": "../labels/NAME"}``, ``index_key``
attribute ``tables`` of the group around   names of all tables
=========================================  ========================================================================

References
----------
.. [1] AnnData's format on disk, https://anndata.readthedocs.io/en/stable/fileformat-prose.html
.. [2] SpatialData's tables, https://spatialdata.scverse.org
.. [3] ngio's and Fractal's feature tables, https://biovisioncenter.github.io/ngio/stable/table_specs/overview
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore.jobs.object_columns import ObjectColumns, Part, Plane
from chunkrestore.jobs.object_table import placed, record_batches, write_objects
from chunkrestore.jobs.predictions import Predictions, arrays_of
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.writer import refresh_consolidated

_OBJECT = re.compile(r"t|c|label|n_voxels|bbox_[zyx]_(start|stop)|touches_border|class_id|point_[zyx]")
"""Columns that tell which object it is, and not what was measured."""

FORMATS = ("parquet", "csv", "anndata")
MOST_ANNDATA_OBJECTS = 20_000_000
"""Rows that are held in memory at once, with 50 columns 8 GB of them, and twice that while they are put together."""


@dataclass(frozen=True)
class Target:
    """Where a table goes, and as what."""

    kind: str
    """One of `FORMATS`."""
    path: str
    """Path or URL of the file; of AnnData, path of the group."""
    region: str
    """Name of the labels."""
    zarr_format: int = 3
    """Of AnnData: that of the image."""


def check_format(kind: str) -> None:
    """Raise unless tables can be written as `kind`.

    Raises
    ------
    ValueError
        If the format is unknown.
    ImportError
        If a library for it is not installed.
    """
    if kind not in FORMATS:
        raise ValueError(f"`format` {kind!r} is unknown; use one of {', '.join(FORMATS)}")
    try:
        if kind == "anndata":
            import anndata  # noqa: F401
    except ImportError:
        raise ImportError('AnnData is written by anndata: pip install "chunkrestore[tables]"') from None


def write_objects_to(
    target: Target,
    parts: Iterable[tuple[Plane, Part]],
    columns: ObjectColumns,
    *,
    provenance: Mapping[str, Any],
    scratch: Path,
    earlier: Predictions | None,
) -> int:
    """Write a table in its format, whole or not at all; return the number of objects.

    Parameters are those of `chunkrestore.jobs.object_table.write_objects`, which says what can be wrong with them.
    """
    if target.kind == "parquet":
        return write_objects(
            target.path, parts, columns, provenance=provenance, scratch=scratch, earlier=earlier
        )
    schema, batches = record_batches(parts, columns, provenance, earlier)
    if target.kind == "csv":
        return _write_csv(target.path, schema, batches, scratch)
    description = json.loads(schema.metadata[b"chunkrestore"])
    return _write_anndata(target, [schema.empty_table(), *batches], description)


def clean_beside(target: Target) -> None:
    """Remove what writers of a table that were killed have left beside it. Call it only while nobody writes there."""
    if stores.is_url(target.path):
        return  # nothing shows up there before it is whole
    path = Path(target.path)
    for left in path.parent.iterdir():
        if left.name.startswith(f"{path.name}.") and re.search(r"\.[0-9a-f]{32}\.partial$", left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _write_csv(path: str, schema: Any, batches: Iterator[Any], scratch: Path) -> int:
    """Write rows as text: a line of names, then one line per object; lists become numbered columns."""
    import pyarrow
    from pyarrow import csv

    n_objects = 0
    flat = _flat(schema.empty_table()).schema
    with placed(path, scratch) as partial, csv.CSVWriter(partial, flat) as writer:
        for batch in batches:
            writer.write_table(_flat(pyarrow.Table.from_batches([batch])))
            n_objects += batch.num_rows
        writer.close()
    return n_objects


def _flat(table: Any) -> Any:
    """Return a table with one column per place of lists of fixed length."""
    import pyarrow

    columns: dict[str, Any] = {}
    for name, column in arrays_of(table).items():
        split = (
            {f"{name}_{k}": column[:, k] for k in range(column.shape[1])}
            if column.ndim == 2
            else {name: column}
        )
        columns |= {key: pyarrow.array(np.ascontiguousarray(values)) for key, values in split.items()}
    return pyarrow.table(columns)


def _write_anndata(target: Target, tables: list[Any], description: Mapping[str, Any]) -> int:
    """Write all rows as AnnData, and list it among the tables of the group around."""
    import anndata
    import pandas
    from pyarrow import Table

    parts = [arrays_of(t if hasattr(t, "combine_chunks") else Table.from_batches([t])) for t in tables]
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    n_objects = len(columns["label"])
    numbers = [name for name, column in columns.items() if column.ndim == 1 and not _OBJECT.fullmatch(name)]
    obs = pandas.DataFrame({k: v for k, v in columns.items() if _OBJECT.fullmatch(k)}, index=_names(columns))
    obs["region"] = pandas.Categorical.from_codes(np.zeros(n_objects, np.int8), [target.region])
    axes, unit = description["axes"], "_um" if "unit" in description else ""
    spatial = np.stack([columns[f"centroid_{axis}{unit}"] for axis in reversed(axes)], axis=-1)
    table = anndata.AnnData(
        X=np.stack([columns[name] for name in numbers], axis=-1, dtype=np.float64),
        obs=obs,
        var=pandas.DataFrame(index=numbers),
        obsm={"spatial": spatial} | {name: c for name, c in columns.items() if c.ndim == 2},
        uns={
            "spatialdata_attrs": {"region": target.region, "region_key": "region", "instance_key": "label"},
            "chunkrestore": json.dumps(description),
        },
    )
    _store(table, target)
    return n_objects


def _names(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Return a name per object: its label, and where there are several planes those before it."""
    labels = columns["label"].astype(str).tolist()
    if not (columns["t"].any() or columns["c"].any()):
        return labels
    planes = zip(columns["t"].tolist(), columns["c"].tolist(), labels, strict=True)
    return [f"{t}-{c}-{label}" for t, c, label in planes]


def _store(table: Any, target: Target) -> None:
    """Put a table in its place, which what is there leaves first, and list it."""
    import anndata

    partial = Path(f"{target.path}.{uuid.uuid4().hex}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=target.zarr_format):
            warnings.simplefilter("ignore")  # of zarr, about what anndata does with it
            table.write_zarr(partial)
        node = stores.read_node(str(partial))
        assert node is not None, f"anndata has left no group at {partial}"
        stores.write_group(str(partial), node.zarr_format, node.attributes | _attributes(target))
        shutil.rmtree(target.path, ignore_errors=True)
        partial.replace(target.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    group, name = stores.parent(target.path), stores.name_of(target.path)
    if stores.name_of(group) == "tables":
        around = stores.read_node(group)
        attributes = {} if around is None else around.attributes
        listed = attributes.get("tables")
        known = [other for other in listed if other != name] if isinstance(listed, list) else []
        stores.write_group(group, target.zarr_format, {**attributes, "tables": [*known, name]})
        refresh_consolidated(group)


def _attributes(target: Target) -> dict[str, Any]:
    """Return what readers know a table of regions by."""
    return {
        "spatialdata-encoding-type": "ngff:regions_table",
        "version": "0.1",
        "region": {"path": f"../labels/{target.region}"},
        "region_key": "region",
        "instance_key": "label",
        "type": "feature_table",
        "table_version": "1",
        "backend": "anndata",
        "index_key": "label",
        "index_type": "int",
    }

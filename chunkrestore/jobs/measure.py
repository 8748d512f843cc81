"""Measure the objects of stored labels, block by block, into a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chunkrestore.cluster import Cluster
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.begin import begun
from chunkrestore.jobs.cutting import check_count, check_shape
from chunkrestore.jobs.intensities import Images, Source, Store, own_image, places_of, sources_of
from chunkrestore.jobs.job import versions
from chunkrestore.jobs.ledger import digest, work_folder_of
from chunkrestore.jobs.measuring import Measuring
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import TABLE_NAME, check_available, read_description
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.table_formats import MOST_ANNDATA_OBJECTS, Target, check_format
from chunkrestore.ome_zarr import OmeZarrImage, RegionReader
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.amplification import amplification
from chunkrestore.ome_zarr.read import label_names, open_label

_MOST_VOXELS = 2**24
"""Of a default block: 64 MB of int32 labels, as much of one channel, and their runs."""
_LONGEST = 2**14
"""Voxels along an axis of a default block, unless a chunk is longer."""


def measure(
    store: Store,
    name: str,
    *,
    images: Images | None = None,
    channels: str | int | Sequence[str | int] | None = None,
    output: Store | None = None,
    format: str = "parquet",
    level: int = 0,
    block_shape: Sequence[int] | None = None,
    overwrite: bool = False,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    quiet: bool = False,
) -> Report:
    """Measure every object of the labels called `name`, and write a table with one row each.

    Labels may come from anywhere: ids may have gaps, and objects may lie in any number of blocks. What the columns
    are is said in `chunkrestore.jobs.object_columns`. Sums are exact integers and every quotient is rounded once, so no
    block shape, cluster or interruption changes a bit of the table. Called again after an interruption, it goes on.

    Parameters
    ----------
    store
        Path or URL of the OME-Zarr that holds the labels.
    name
        Labels in its group ``labels``. Time points are measured one by one, and so are channels that labels have.
    images
        What intensities are read from: by default all channels of the image in `store`, if there is one. Or other
        images of the same shape (anything that `chunkrestore.ome_zarr.open_source` opens), one or several, or a mapping
        that names them (``{"raw": ..., "restored": ...}``); none for ``()``. With several images, columns are called by
        image and channel, ``raw_DAPI_mean``.
    channels
        Names or indices of the channels to measure, in every image; all by default.
    output
        File to write; of AnnData, a group. By default ``labels/NAME/objects.parquet`` (which is replaced if it is
        there), ``labels/NAME/objects.csv``, or the group ``tables/NAME``, in `store`.
    format
        ``"parquet"``, ``"csv"`` or ``"anndata"`` (`chunkrestore.jobs.table_formats`).
    level
        Resolution to measure at, of labels and images; other than 0 it needs an `output`.
    block_shape
        Voxels per spatial axis that one task measures; whole chunks of about 16 million voxels by default.
    overwrite
        Replace what is at `output`, or start an unfinished job anew.
    cluster, n_workers, profile, work_folder, quiet
        As for `chunkrestore.run`.

    Returns
    -------
    Report
        What was done.

    Raises
    ------
    FileExistsError
        If something else is at `output`, and `overwrite` is not set.
    ValueError
        If labels and images do not fit together, are of types that cannot be measured, or an earlier table of the
        same labels, whose predictions would be kept, tells of other objects.
    chunkrestore.jobs.runner.BlockError
        If blocks failed, for example because an intensity within an object is NaN; the message names them.
    ImportError
        If pyarrow, numba or anndata is not installed.

    Notes
    -----
    Memory of a task: labels and one channel of a block, and 0.3 to 1.5 kB per object in it.
    """
    check_format(format)
    _check_libraries()
    path = stores.location(store)
    labels = _labels(path, name, level)
    target = _target(path, name, labels, format, output, level)
    measured = sources_of(path, labels, images, channels, level)
    grid = _grid(labels, [source.reader for source in measured], block_shape)
    planes = tuple((t, c) for t in range(labels.n_t) for c in range(labels.n_c))
    columns = _columns(path, labels, measured, level)
    content = {
        "labels": labels.source(0).identity(),
        "images": [source.describe() for source in measured],
        "versions": versions(),
    }
    request = {
        "store": path,
        "name": name,
        "images": places_of(images),
        "channels": channels if isinstance(channels, str | int | None) else list(channels),
        "output": None if output is None else target.path,
        "format": format,
        "level": level,
        "block_shape": None if block_shape is None else [int(n) for n in block_shape],
    }
    report = Report([], _plan(labels, grid, measured), [], versions=versions())
    begin = begun(
        work_folder_of(path, work_folder) / f"measure-{name.replace('/', '-')}",
        _manifest(content, grid, target, columns) | {"kind": "measure", "request": request},
        report,
        lambda: _check_target(target, target.path == stores.join(labels.path, TABLE_NAME), overwrite),
        cluster=cluster,
        n_workers=n_workers,
        profile=profile,
        overwrite=overwrite,
        quiet=quiet,
    )
    with begin as stages:
        sources = tuple((source.reader, source.channel) for source in measured)
        measuring = Measuring(stages, grid, planes, labels.source(0), sources)
        counts = measuring.measure()
        report.n_objects = sum(counts.values())
        if format == "anndata" and report.n_objects > MOST_ANNDATA_OBJECTS:
            raise ValueError(
                f"{report.n_objects} objects do not fit into AnnData, which is held in memory; the limit is "
                f"{MOST_ANNDATA_OBJECTS}. Measure with format='parquet' and overwrite=True"
            )
        measuring.write(counts, target, columns, {"measured": content}, labels.path if level == 0 else None)
        report.outputs.append(target.path)
    return report


def _check_libraries() -> None:
    check_available()
    try:
        import numba  # noqa: F401
    except ImportError:
        raise ImportError('objects are measured by numba: pip install "chunkrestore[tables]"') from None


def _labels(path: str, name: str, level: int) -> OmeZarrImage:
    """Open the labels at one of their resolutions."""
    names = label_names(path)
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"`name` {name!r}: {path} has no such labels; it has {known}")
    labels = open_label(path, name)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels {labels.path} are {labels.dtype}, not integers; store them as integers")
    return labels.select(level=level)


def _columns(path: str, labels: OmeZarrImage, measured: Sequence[Source], level: int) -> ObjectColumns:
    """Return what the table tells, in micrometres by the labels, or by their image where they have no unit."""
    geometry, image = labels, own_image(path)
    if not labels.calibrated and image is not None and level < len(image.levels):
        same = image.select(level=level)
        geometry = same if same.spatial_shape == labels.spatial_shape else labels
    return ObjectColumns(
        labels.spatial_shape,
        geometry.voxel_size if geometry.calibrated else None,
        geometry.translation if geometry.calibrated else None,
        measured=True,
        channels=tuple(source.column for source in measured),
    )


def _target(
    path: str, name: str, labels: OmeZarrImage, kind: str, output: Store | None, level: int
) -> Target:
    """Return where the table goes."""
    if output is None and level:
        raise ValueError(f"`level` {level} needs an `output`: the table beside the labels is of level 0")
    defaults = {
        "parquet": stores.join(labels.path, TABLE_NAME),
        "csv": stores.join(labels.path, "objects.csv"),
        "anndata": stores.join(path, "tables", name),
    }
    place = defaults[kind] if output is None else stores.location(output)
    stores.writable(place)
    if kind == "anndata" and stores.is_url(place):
        raise ValueError(
            f"`output` {place} is a URL; AnnData can be written to a path only, or use format='parquet'"
        )
    if output is None:
        # Nothing may be written behind a link of a store that came from anybody.
        stores.check_place(path, place[len(path) :].strip("/"), own=True)
    return Target(kind, place, name, labels.source(0).zarr_format)


def _check_target(target: Target, is_own: bool, overwrite: bool) -> None:
    """Raise if the table cannot be written where it should go; nothing is touched."""
    if target.kind != "anndata" and not (
        stores.is_url(target.path) or stores.exists(stores.parent(target.path))
    ):
        raise FileNotFoundError(f"`output` {target.path}: its folder does not exist; create it first")
    if not stores.exists(target.path) or overwrite:
        return
    if is_own:
        if not stores.is_url(target.path):
            read_description(target.path)  # raises if something else has this name
        return
    raise FileExistsError(
        f"`output` {target.path} exists; give another one or pass overwrite=True (--overwrite)"
    )


def _grid(
    labels: OmeZarrImage, readers: Sequence[RegionReader], block_shape: Sequence[int] | None
) -> BlockGrid:
    """Return the blocks."""
    shape = labels.spatial_shape
    check_shape(shape)
    if block_shape is None:
        units = zip(*(r.spatial_chunks for r in (labels.source(0), *readers)), strict=True)
        block_shape = default_block(shape, tuple(map(max, units)))
    cut = tuple(min(int(b), n) for b, n in zip(block_shape, shape, strict=False))
    grid = BlockGrid.regular(shape, tuple(block_shape) if len(block_shape) != len(shape) else cut)
    check_count(shape, cut, labels.n_t * labels.n_c)
    if math.prod(cut) * max(cut) ** 2 >= 2**63:
        raise ValueError(f"`block_shape` {cut} is too large for sums in 64 bits; use shorter blocks")
    return grid


def default_block(shape: Sequence[int], unit: Sequence[int]) -> tuple[int, ...]:
    """Return the block of about `_MOST_VOXELS` voxels, as cubic as may be, in whole `unit`."""
    block = [min(u, n) for u, n in zip(unit, shape, strict=True)]
    while True:
        longer = [
            (length, axis, min(length + unit[axis], shape[axis]))
            for axis, length in enumerate(block)
            if length < shape[axis] and length + unit[axis] <= _LONGEST
        ]
        fitting = [
            (length, axis, grown)
            for length, axis, grown in longer
            if math.prod(block) // length * grown <= _MOST_VOXELS
        ]
        if not fitting:
            return tuple(block)
        _, axis, grown = min(fitting)
        block[axis] = grown


def _manifest(
    content: Mapping[str, Any], grid: BlockGrid, target: Target, columns: ObjectColumns
) -> dict[str, Any]:
    """Return what identifies the result."""
    return {
        "schema": 1,
        "input": content["labels"],
        "images": content["images"],
        "output": {"labels": None, "table": target.path, "format": target.kind},
        "columns": digest(columns.described()),
        "block_shape": [edges[1] for edges in grid.edges],
        "passes": [],
        "versions": content["versions"],
    }


def _plan(labels: OmeZarrImage, grid: BlockGrid, measured: Sequence[Source]) -> dict[str, Any]:
    """Return what the report and the events tell of what is to be done."""
    operator = {"operator": "measure", "channels": [source.column.name for source in measured]}
    n_voxels = labels.n_t * labels.n_c * math.prod(labels.spatial_shape)
    readers = [labels.source(0), *(source.reader for source in measured)]
    itemsize = sum(reader.dtype.itemsize for reader in readers)
    decoded = sum(amplification(reader, grid, []) for reader in readers) / len(readers)
    return {
        "shape": list(labels.spatial_shape),
        "n_timepoints": labels.n_t,
        "n_channels": labels.n_c,
        "read_nbytes": n_voxels * itemsize,
        "passes": [
            {
                "operators": [operator],
                "depth": [[0] * len(grid.edges)],
                "block_shape": [edges[1] for edges in grid.edges],
                "n_blocks": list(grid.n_blocks),
                "halo_overhead": 1.0,
                "read_amplification": round(decoded, 3),
            }
        ],
    }

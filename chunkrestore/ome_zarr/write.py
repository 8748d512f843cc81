"""Create and write OME-Zarr images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import check_dtype
from chunkrestore.ome_zarr.carry import (
    carry_arrays,
    carry_channels,
    carry_unknown,
    check_shape,
    choose_axes,
    derive_multiscale,
    with_levels,
    with_time_step,
)
from chunkrestore.ome_zarr.fill import fill
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.layout import LevelPlan, default_pyramid
from chunkrestore.ome_zarr.limits import MAX_LEVELS
from chunkrestore.ome_zarr.pyramid import build_pyramid
from chunkrestore.ome_zarr.read import label_names, open_image, open_label
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.store import Json
from chunkrestore.ome_zarr.writer import Document, ImageWriter, mark_unfinished, unfinished_state

StorePath = str | os.PathLike[str]


def create_image(
    store: StorePath,
    *,
    shape: Sequence[int],
    dtype: Any,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    time_step: float | None = None,
    like: OmeZarrImage | StorePath | None = None,
    channels: Sequence[str] | None = None,
    chunks: Sequence[int] | None = None,
    shards: Sequence[int] | Literal["auto"] | None = "auto",
    levels: int | None = None,
    version: str = "0.5",
    compression: str = "zstd",
    checksums: bool = False,
    overwrite: bool = False,
) -> ImageWriter:
    """Create the arrays of an image and return the writer that fills and publishes them.

    Parameters
    ----------
    store
        Path or ``s3://`` URL of the new group. It must not exist, be empty, or, with `overwrite`, be an OME-Zarr
        image.
    shape, dtype
        Of level 0, all axes; dtype one of uint8, uint16, int16, float32.
    axes
        Letters of ``tczyx`` in this order, one per axis. By default those of `like`, without ``c`` (then
        without ``t``) if `shape` has fewer.
    voxel_size
        Micrometres per spatial axis; by default that of `like`. Without either, no unit is recorded.
    time_step
        Seconds between time points; by default that of `like`. Without either, no unit is recorded.
    like
        Image whose axes, scale, translation, channels and unknown attributes are carried over. For a part
        of an image, give `OmeZarrImage.select` of it.
    channels
        Names. One that `like` has keeps its colour; by default all channels of `like`.
    chunks, shards
        Voxels per spatial axis; chunks of 64 each (512 in two dimensions) by default, one long on the other axes.
        Shards gather chunks in one file; None: every chunk is a file. By default there are shards if the image has
        more than 4096 chunks, version is 0.5 and no `chunks` are given (`chunkrestore.ome_zarr.layout`).
    levels
        Number of levels; by default until one fits into 64 voxels per axis (512 in two dimensions).
    version
        ``"0.5"`` (zarr v3) or ``"0.4"`` (zarr v2, without shards and checksums).
    compression
        ``"zstd"``, ``"lz4"`` (faster and about a tenth larger), ``"gzip"`` or ``"none"`` (for readers without Blosc),
        with a level from 1 to 9 after a colon if wanted: ``"zstd:9"``.
    checksums
        Whether every chunk carries a CRC-32C, so that a flipped bit is an error and not another value.
    overwrite
        Remove an existing image first; labels beside it stay, and must fit.

    Raises
    ------
    FileExistsError
        If `store` exists and `overwrite` is not set.
    ValueError
        If parameters do not fit together, or `store` is something else than an OME-Zarr image. Nothing is
        touched then.
    """
    path, lengths = stores.writable(stores.location(store)), check_shape(shape)
    kind = check_dtype(dtype, f"the image for {path}")
    storage = Storage(version, chunks, shards, compression, checksums)
    source = None if like is None else open_image(like)
    if source is not None and stores.same(source.path, path):
        raise ValueError(f"{path} is the image that `like` was opened from; write to another store")
    letters = choose_axes(axes, lengths, source)
    free = "" if channels is None else "c"
    multiscale = derive_multiscale(
        letters, lengths, like=source, voxel_size=voxel_size, name=stores.name_of(path), ignore=free
    )
    if time_step is not None:
        multiscale = with_time_step(multiscale, letters, time_step)
    plans = plan_levels(multiscale, letters, lengths, levels)
    storage = storage.settled(lengths, plans[0].shape, kind, path)
    ome, others = carry_unknown(source)
    keep_windows = source is not None and source.dtype == kind
    ome["omero"] = carry_channels(letters, lengths, source, channels, windows=keep_windows)
    ome["multiscales"] = [with_levels(multiscale, plans, letters, "mean")]
    _claim(path, storage, plans, overwrite=overwrite)
    document = Document(ome, others, carry_arrays(source))
    return ImageWriter.create(path, lengths, kind, plans, document, storage)


def write_image(
    data: Any,
    store: StorePath,
    *,
    like: OmeZarrImage | StorePath | None = None,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> OmeZarrImage:
    """Write a whole array as an OME-Zarr image with pyramid and metadata, and open it.

    Parameters
    ----------
    data
        NumPy array (or anything that can be sliced), or a dask array of any chunking, which is computed on
        the current scheduler. Of dtype uint8, uint16, int16 or float32.
    store, like, axes, voxel_size
        As for `create_image`.
    provenance
        JSON-compatible values that say how the voxels came about.
    **options
        `time_step`, `channels`, `chunks`, `shards`, `levels`, `version`, `compression`, `checksums` and
        `overwrite`, as for `create_image`.

    Raises
    ------
    FileExistsError, ValueError
        As for `create_image`.
    """
    writer = create_image(
        store, shape=data.shape, dtype=data.dtype, like=like, axes=axes, voxel_size=voxel_size, **options
    )
    fill(writer.target(0), data)
    build_pyramid(writer)
    writer.publish(provenance)
    return open_image(writer.path)


def plan_levels(multiscale: Json, letters: str, shape: Sequence[int], levels: int | None) -> list[LevelPlan]:
    """Return the default pyramid of an image, from its voxel size."""
    voxel_size, _ = metadata.geometry(multiscale, letters, 0, "`like`")
    return default_pyramid(shape[-len(voxel_size) :], voxel_size, levels)


def _claim(path: str, storage: Storage, plans: Sequence[LevelPlan], *, overwrite: bool) -> None:
    """Make `path` free for a new image, or raise before anything is touched."""
    names = stores.contents(path)
    node = stores.read_node(path)
    if names and (node is None or node.kind == "array"):
        raise ValueError(f"{path} exists and is no OME-Zarr image; choose another store, it is not removed")
    if node is None:
        return
    _, ome, _ = metadata.split(node, path)
    state = unfinished_state(path)
    has_labels = bool(label_names(path)) or "labels" in (names or [])
    if "multiscales" not in ome and state is None and not (has_labels and set(ome) <= {"labels"}):
        raise ValueError(f"{path} is a zarr group without an image; choose another store, it is not removed")
    if not overwrite and ("multiscales" in ome or state is not None):
        what = "an image; choose another store" if "multiscales" in ome else "an unfinished image; resume it"
        raise FileExistsError(f"{path} already holds {what}, or pass overwrite=True (--overwrite)")
    if has_labels:
        _check_labels_fit(path, node.zarr_format, storage, plans)
    levels = _levels_to_remove(path, ome, state)
    for level in {str(k) for k in range(len(plans))} - set(levels):
        stores.check_place(path, level, own=True)
    # Until they are gone, the group is marked as unfinished.
    mark_unfinished(path, node.zarr_format, {"state": "creating", "levels": levels})
    for level in levels:
        stores.remove_member(path, level)
    if node.zarr_format != storage.zarr_format:
        stores.forget_group(path)


def _levels_to_remove(path: str, ome: Json, state: Any) -> list[str]:
    """Return the paths of the arrays of an image.

    Raises
    ------
    ValueError
        If one of them is no array or lies behind a link, or there are too many.
    """
    multiscales = metadata.as_dicts(ome.get("multiscales"))
    datasets = [d.get("path") for m in multiscales for d in metadata.as_dicts(m.get("datasets"))]
    planned = state.get("levels") if isinstance(state, dict) else None
    levels = datasets or (planned if isinstance(planned, list) else [])
    if len(levels) > MAX_LEVELS:
        raise ValueError(f"{path} lists {len(levels)} levels, which is no image; choose another store")
    return [_check_level(member, path) for member in levels]


def _check_level(member: object, path: str) -> str:
    """Return the path of an array that an image may remove; its labels and what jobs keep are not among them."""
    level = stores.check_removable(member, path)
    node = stores.read_node(stores.join(path, level))
    if level.split("/")[0] in ("labels", stores.PRIVATE_FOLDER) or (
        node is not None and node.kind != "array"
    ):
        raise ValueError(
            f"{path} lists {level!r} as a level, which is no array of the image; it is not removed"
        )
    return level


def _check_labels_fit(path: str, old_format: int, storage: Storage, plans: Sequence[LevelPlan]) -> None:
    """Raise if labels beside the image would not belong to the new one."""
    shape = plans[0].shape
    for name in label_names(path):
        labels = open_label(path, name)
        fits = labels.spatial_shape == shape and len(labels.levels) == len(plans)
        if not fits or old_format != storage.zarr_format:
            raise ValueError(
                f"{path} has labels {name!r} (shape {labels.spatial_shape}, {len(labels.levels)} levels, zarr"
                f" v{old_format}) that do not fit the new image (shape {shape}, {len(plans)} levels, zarr"
                f" v{storage.zarr_format}); choose another store, or remove the labels"
            )

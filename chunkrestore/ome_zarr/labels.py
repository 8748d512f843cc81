"""Create and write NGFF labels: instance maps in the ``labels`` group of an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.carry import (
    carry_arrays,
    carry_channels,
    carry_unknown,
    check_shape,
    choose_axes,
    derive_multiscale,
    with_levels,
)
from chunkrestore.ome_zarr.fill import fill
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.label_attributes import (
    MAX_ENTRIES,
    Colors,
    Properties,
    distinct_colors,
    image_label,
    source_image,
)
from chunkrestore.ome_zarr.label_ids import as_dtype, used_ids
from chunkrestore.ome_zarr.layout import LevelPlan, pyramid_like
from chunkrestore.ome_zarr.pyramid import build_pyramid
from chunkrestore.ome_zarr.read import label_names, open_image
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.store import Json
from chunkrestore.ome_zarr.write import StorePath, plan_levels
from chunkrestore.ome_zarr.writer import Document, ImageWriter, refresh_consolidated, unfinished_state

_NAME = re.compile(r"(?!__)[A-Za-z0-9_-][A-Za-z0-9_. -]*")


@dataclass(frozen=True)
class LabelsWriter(ImageWriter):
    """Labels under construction; `publish` also lists them in the ``labels`` group, as the last act."""

    def publish(self, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the label metadata, then list the labels. Call it when all levels are complete."""
        super().publish(provenance)
        _list_label(self.path, metadata.VERSIONS[self.version], listed=True)


def create_labels(
    store: StorePath,
    name: str,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = "int32",
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    like: OmeZarrImage | StorePath | None = None,
    chunks: Sequence[int] | None = None,
    shards: Sequence[int] | Literal["auto"] | None = "auto",
    version: str | None = None,
    compression: str = "zstd",
    checksums: bool = False,
    method: str = "nearest",
    colors: Colors | None = None,
    properties: Properties | None = None,
    overwrite: bool = False,
) -> LabelsWriter:
    """Create the arrays of labels and return the writer that fills and publishes them.

    Labels get as many levels as the image in `store` (or `like`), as the specification demands.

    Parameters
    ----------
    store
        Path or ``s3://`` URL of the image that gets the labels. Without an image there, a group that holds only
        labels.
    name
        Letters, digits, ``_``, ``-``, ``.`` and spaces.
    shape
        Of level 0, all axes; by default that of `like` on `axes`.
    dtype
        Any integer.
    axes
        By default those of `like` that fit `shape`, or all but ``c`` without `shape`.
    voxel_size, like
        As for `create_image`; `like` is the image in `store` by default. Labels that are given as `like` are copied
        in what they say of their objects, too.
    chunks, shards, compression, checksums
        As for `create_image`.
    version
        That of the image in `store` by default, else ``"0.5"``.
    method
        ``"nearest"`` keeps small objects in the pyramid, ``"mode"`` gives smoother borders.
    colors
        Red, green, blue and opacity from 0 to 255 by label id (`distinct_colors`, `class_colors`), of all objects or of
        none: viewers may hide those that have none.
    properties
        JSON-compatible values by name, by label id. For more than 10000 objects, there are their tables.
    overwrite
        Replace labels of this name; other labels and the image are never touched.

    Raises
    ------
    FileExistsError
        If there are labels of this name and `overwrite` is not set.
    ValueError
        If parameters do not fit together or to the image in `store`. Nothing is touched then.
    """
    root = stores.writable(stores.location(store))
    path = stores.join(root, stores.check_place(root, f"labels/{_check_name(name)}", own=True))
    image, own_version, n_levels = _surroundings(root)
    storage = Storage(_agreed_version(root, own_version, version), chunks, shards, compression, checksums)
    source = image if like is None else open_image(like)
    kind = np.dtype(dtype).newbyteorder("=")
    if kind.kind not in "iu":
        raise ValueError(
            f"`dtype` {kind} of labels {name!r} is no integer; convert them with .astype('int32')"
        )
    if method not in ("nearest", "mode"):
        raise ValueError(f"`method` {method!r} cannot reduce labels; use 'nearest' or 'mode'")
    letters, lengths = _extent(shape, axes, source)
    multiscale = derive_multiscale(
        letters, lengths, like=source, voxel_size=voxel_size, name=name, ignore="c"
    )
    plans = _plan(multiscale, letters, lengths, [image, source], n_levels)
    storage = storage.settled(lengths, plans[0].shape, kind, path)
    multiscale = {**with_levels(multiscale, plans, letters, method), "name": name}
    copied = source if source is not None and source.is_labels else None
    about = image_label(kind, colors=colors, properties=properties, like=copied)
    image_path = source_image(path, root, None if n_levels is not None else source)
    if image_path is not None:
        about["source"] = {"image": image_path}
    ome, others = carry_unknown(copied)
    if copied is not None and "omero" in copied.ome:
        ome["omero"] = carry_channels(letters, lengths, copied, None, windows=copied.dtype == kind)
    ome |= {"multiscales": [multiscale], "image-label": about}
    document = Document(ome, others, carry_arrays(copied))
    _claim(root, path, storage, overwrite=overwrite)
    return LabelsWriter.create(path, lengths, kind, plans, document, storage)


def write_labels(
    labels: Any,
    store: StorePath,
    name: str = "labels",
    *,
    like: OmeZarrImage | StorePath | None = None,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    dtype: Any = None,
    colors: Colors | Literal["auto"] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **options: Any,
) -> OmeZarrImage:
    """Write a whole array of instance labels (0 = background) with pyramid and metadata, and open it.

    Parameters
    ----------
    labels
        NumPy array (or anything that can be sliced), or a dask array of any chunking, of an integer dtype.
    store, name, like, axes, voxel_size
        As for `create_labels`.
    dtype
        Of what is stored, any integer that holds all ids; by default that of `labels`.
    colors
        As for `create_labels`, or ``"auto"``: `distinct_colors` of the ids, for which `labels` are read once more.
    provenance
        JSON-compatible values that say how the labels came about.
    **options
        `chunks`, `shards`, `version`, `compression`, `checksums`, `method`, `properties` and `overwrite`, as for
        `create_labels`.

    Raises
    ------
    FileExistsError, ValueError
        As for `create_labels`; also if `dtype` does not hold an id.
    """
    if dtype is not None:
        labels = as_dtype(labels, dtype, name)
    if isinstance(colors, str):
        if colors != "auto":
            raise ValueError(f"`colors` {colors!r} must be colours by label id, 'auto' or None")
        colors = distinct_colors(used_ids(labels, MAX_ENTRIES))
    writer = create_labels(
        store,
        name,
        shape=labels.shape,
        dtype=labels.dtype,
        like=like,
        axes=axes,
        voxel_size=voxel_size,
        colors=colors,
        **options,
    )
    fill(writer.target(0), labels)
    build_pyramid(writer)
    writer.publish(provenance)
    return open_image(writer.path)


def open_writer(store: StorePath) -> ImageWriter:
    """Return the writer of an unfinished image or label group, to go on with it in another process.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing at `store`, or nothing unfinished.
    """
    path = stores.location(store)
    is_label = stores.name_of(stores.parent(path)) == "labels"
    if is_label:
        stores.check_place(stores.parent(stores.parent(path)), f"labels/{stores.name_of(path)}", own=True)
    return (LabelsWriter if is_label else ImageWriter).reopen(path)


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"label name {name!r} must be made of letters, digits, '_', '-', '.' and spaces")
    return name


def _surroundings(root: str) -> tuple[OmeZarrImage | None, str | None, int | None]:
    """Return the image at `root`, the version of the group, and the number of levels labels must have."""
    names, node = stores.contents(root), stores.read_node(root)
    if node is None and not names:
        return None, None, None
    if node is None or node.kind == "array":
        raise ValueError(f"{root} exists and is not an OME-Zarr image; labels go into the group of an image")
    _, ome, _ = metadata.split(node, root)
    if "multiscales" in ome:
        image = open_image(root)
        return image, image.version, len(image.levels)
    version = next(v for v, zarr_format in metadata.VERSIONS.items() if zarr_format == node.zarr_format)
    state = unfinished_state(root)
    if state is None and not stores.exists(stores.join(root, "labels")):
        raise ValueError(f"{root} is a zarr group without an image; labels go into the group of an image")
    return None, version, len(state["levels"]) if state is not None else None


def _agreed_version(root: str, own: str | None, wanted: str | None) -> str:
    if own is not None and own not in metadata.VERSIONS:
        raise ValueError(
            f"{root} is OME-Zarr {own}, and labels are added to {' and '.join(metadata.VERSIONS)} only; write it anew "
            "with `chunkrestore convert`"
        )
    if own is not None and wanted is not None and own != wanted:
        raise ValueError(f"`version` {wanted!r} differs from {own!r} of {root}, which the labels must share")
    return own or wanted or "0.5"


def _extent(
    shape: Sequence[int] | None, axes: str | None, like: OmeZarrImage | None
) -> tuple[str, tuple[int, ...]]:
    """Return axes and shape of the labels."""
    if shape is None:
        if like is None:
            raise ValueError(
                "`shape` is needed because there is no image to take it from; pass `shape` or `like`"
            )
        letters = axes or like.axes.replace("c", "")
        lengths = dict(zip(like.axes, like.shape, strict=True))
        shape = [lengths.get(letter, 1) for letter in letters]
    lengths_given = check_shape(shape)
    return choose_axes(axes, lengths_given, like), lengths_given


def _plan(
    multiscale: Json,
    letters: str,
    shape: Sequence[int],
    models: Sequence[OmeZarrImage | None],
    n_levels: int | None,
) -> list[LevelPlan]:
    """Return levels like those of the first of `models` of this shape, in the number that the image beside has."""
    for like in models:
        if like is None or like.spatial_shape != tuple(shape[-len(like.spatial_shape) :]):
            continue
        if n_levels in (None, len(like.levels)):
            voxel_size, _ = metadata.geometry(multiscale, letters, 0, like.path)
            return pyramid_like([level.reader.spatial_shape for level in like.levels], voxel_size)
    return plan_levels(multiscale, letters, shape, n_levels)


def _claim(root: str, path: str, storage: Storage, *, overwrite: bool) -> None:
    """Make `path` free for new labels, or raise before anything is touched."""
    node = stores.read_node(path)
    if stores.contents(path):
        if node is None or node.kind == "array":
            raise ValueError(f"{path} exists and is no label group; nothing is removed, choose another name")
        if not overwrite:
            what = (
                "unfinished labels; resume them" if unfinished_state(path) else "labels; choose another name"
            )
            raise FileExistsError(f"{path} already holds {what}, or pass overwrite=True (--overwrite)")
        _list_label(path, storage.zarr_format, listed=False)
        stores.remove_member(root, f"labels/{stores.name_of(path)}")
    if stores.read_node(root) is None:
        stores.write_group(root, storage.zarr_format, {})


def _list_label(path: str, zarr_format: int, *, listed: bool) -> None:
    """Add labels to the list in the ``labels`` group around them, or take them off it."""
    group, name = stores.parent(path), stores.name_of(path)
    node = stores.read_node(group)
    version = next(v for v, f in metadata.VERSIONS.items() if f == zarr_format)
    _, ome, others = metadata.split(node, group) if node is not None else (version, {}, {})
    names = [n for n in label_names(stores.parent(group)) if n != name]
    ome["labels"] = [*names, name] if listed else names
    stores.write_group(group, zarr_format, metadata.unite(ome, others, version))
    refresh_consolidated(group)

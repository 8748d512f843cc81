"""Open OME-Zarr images and labels, lazily and with their metadata."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from chunkrestore.ome_zarr import metadata, newer, older, zipped
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.channels import channel_names
from chunkrestore.ome_zarr.conform import validate
from chunkrestore.ome_zarr.image import Level, OmeZarrImage
from chunkrestore.ome_zarr.members import UNFINISHED
from chunkrestore.ome_zarr.store import Json, Node


def open_image(
    store: str | os.PathLike[str] | OmeZarrImage,
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
) -> OmeZarrImage:
    """Open an OME-Zarr image or label group, version 0.1 to 0.6, from its metadata alone.

    Parameters
    ----------
    store
        Path of the group, also inside a zip file (``image.ozx``, ``plate.zarr.zip/A/1/0``), or its URL (``s3://``,
        ``https://``, ``http://``; `chunkrestore.ome_zarr.remote`). An image that is open already is returned as
        it is.
    axes
        One letter of ``tczyx`` per array axis, in the order of the array; needed for a plain zarr array,
        otherwise taken from the metadata.
    voxel_size
        Micrometres per spatial axis (z, y, x), instead of what the metadata says.

    Raises
    ------
    FileNotFoundError
        If `store`, or an array that its metadata names, does not exist.
    ValueError
        If it is no OME-Zarr image, or does not conform to its version; the message names the key.
    PermissionError, ConnectionError, TimeoutError
        If a server refuses access, or cannot be reached.
    """
    if isinstance(store, OmeZarrImage):
        return store
    path = stores.location(store)
    node = stores.read_node(path)
    if node is None or (node.kind == "array" and axes is None):
        raise _not_an_image(path, node)
    version, ome, others = _described(node, axes, path)
    multiscale = ome["multiscales"][0]
    letters = _letters(multiscale, axes, path)
    readers = _readers(path, multiscale, letters, named=axes is None)
    if "image-label" in ome and readers[0].dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {readers[0].dtype}, but must be integers; write them again")
    if version in metadata.OLDER:
        multiscale = older.with_scales(multiscale, letters, [_stored_shape(reader) for reader in readers])
    if voxel_size is not None:
        multiscale = metadata.with_voxel_size(multiscale, letters, check_voxel_size(voxel_size, letters))
    ome["multiscales"][0] = multiscale
    geometries = (metadata.geometry(multiscale, letters, k, path) for k in range(len(readers)))
    levels = tuple(Level(reader, *geometry) for reader, geometry in zip(readers, geometries, strict=True))
    reader = levels[0].reader
    units = [a.get("unit") for a in multiscale["axes"] if a.get("type") == "space"]
    return OmeZarrImage(
        path=path,
        version=version,
        axes=reader.axes,
        levels=levels,
        channels=channel_names(ome, reader.n_c),
        labels=label_names(path),
        calibrated=all(u is not None for u in units),
        is_labels="image-label" in ome,
        ome=ome,
        others=others,
        opened_with=_by_hand(axes, voxel_size),
    )


def label_names(path: str) -> tuple[str, ...]:
    """Return the names that the ``labels`` group inside the group `path` lists.

    Raises
    ------
    ValueError
        If the group or one of the names leads out of `path`.
    """
    stores.check_place(path, "labels")
    try:
        node = stores.read_node(stores.join(path, "labels"))
    except PermissionError:
        if stores.is_url(path):
            return ()  # so a bucket that must not be listed answers for what is absent
        raise
    if node is None or node.kind != "group":
        return ()
    _, ome, _ = metadata.split(node, stores.join(path, "labels"))
    names = ome.get("labels")
    where = f"{path}: attribute `labels`"
    return tuple(stores.check_member(n, where) for n in names) if isinstance(names, list) else ()


def open_label(path: str, name: str) -> OmeZarrImage:
    """Open the labels called `name` of the image at `path`.

    Raises
    ------
    FileNotFoundError, ValueError
        As for `open_image`, or if they lie elsewhere.
    """
    return open_image(stores.join(path, stores.check_place(path, f"labels/{name}")))


def check_voxel_size(voxel_size: Sequence[float], letters: str) -> tuple[float, ...]:
    """Return `voxel_size` as floats if there is one positive, finite number per spatial axis.

    Raises
    ------
    ValueError
        Otherwise.
    """
    sizes = tuple(float(v) for v in voxel_size)
    if len(sizes) != len(metadata.spatial(letters)) or not all(0 < v < float("inf") for v in sizes):
        raise ValueError(
            f"`voxel_size` {sizes} must hold one length above 0, in micrometres, "
            f"for each of the axes {metadata.spatial(letters)!r}"
        )
    return sizes


def _by_hand(axes: str | None, voxel_size: Sequence[float] | None) -> Json:
    """Return the arguments of `open_image` that were given."""
    size = None if voxel_size is None else [float(v) for v in voxel_size]
    return {key: value for key, value in (("axes", axes), ("voxel_size", size)) if value is not None}


def _letters(multiscale: Json, axes: str | None, path: str) -> str:
    """Return one letter per array axis; axes given by hand also replace those of the metadata."""
    if axes is None:
        return metadata.axis_letters(multiscale, path)
    metadata.check_letters(axes, f"{path}: `axes` {axes!r}", ndim=len(multiscale["axes"]))
    multiscale["axes"] = [
        {**axis, "name": letter, "type": metadata.AXIS_TYPES[letter]}
        for axis, letter in zip(multiscale["axes"], axes, strict=True)
    ]
    return axes


def _described(node: Node, axes: str | None, path: str) -> tuple[str, Json, Json]:
    """Return version, OME attributes as 0.4 or 0.5 would have them, and the other attributes."""
    if node.kind == "array":
        letters = metadata.check_letters(axes or "", f"{path}: `axes` {axes!r}")
        return "", {"multiscales": [metadata.new_multiscale(letters, None, "", path="")]}, {}
    version, ome, others = metadata.split(node, path)
    if "multiscales" not in ome:
        raise _no_multiscales(path, ome, others)
    if version in metadata.OLDER:
        multiscale = older.as_current(ome, version, axes, path)
    elif version in metadata.NEWER:
        multiscale = newer.as_current(ome, version, path)
    else:
        multiscale = validate(ome, version, path)
    ome["multiscales"][0] = multiscale
    return version, ome, others


def _readers(path: str, multiscale: Json, letters: str, *, named: bool) -> list[RegionReader]:
    """Return handles on the levels, whose axes are `named` by the metadata or by hand."""
    names = [str(axis.get("name")).lower() for axis in multiscale["axes"]]
    readers = []
    for entry in multiscale["datasets"]:
        readers.append(RegionReader.at(path, entry["path"], letters, names=names if named else ()))
        older.check_separator(readers[-1])
    if len({reader.dtype for reader in readers}) > 1:
        kinds = ", ".join(f"{reader.array_path!r} {reader.dtype}" for reader in readers)
        raise ValueError(f"{path}: levels differ in dtype ({kinds}); write the pyramid again")
    for finer, coarser in itertools.pairwise(readers):
        for axis, n, m in zip(finer.axes, finer.shape, coarser.shape, strict=True):
            if m > n or (axis in "tc" and m != n):
                wrong = "grow" if m > n else "differ"
                raise ValueError(
                    f"{path}: `multiscales[0].datasets` {wrong} on axis {axis!r}: level {coarser.array_path!r} has "
                    f"{m}, {finer.array_path!r} before it {n}; list the finest first, with all time points and channels"
                )
    return readers


def _stored_shape(reader: RegionReader) -> tuple[int, ...]:
    """Return the shape of an array in the order of its own axes."""
    return tuple(reader.shape[reader.order.index(i)] for i in range(reader.ndim))


def _not_an_image(path: str, node: Node | None) -> Exception:
    """Return the error for a path that is no zarr group."""
    if node is not None:
        return ValueError(
            f"{path} is a plain zarr array, not an OME-Zarr image; open the group around it, "
            "or pass `axes` with one letter of 'tczyx' per array axis (--axes)"
        )
    if stores.is_url(path):
        fix = "download zip files, which are read from disk" if zipped.is_named(path) else "check the URL"
        return FileNotFoundError(f"{path} holds no zarr metadata; {fix}")
    if not stores.exists(path):
        return FileNotFoundError(f"{path} does not exist; check the path of the store")
    if stores.is_zipped(path):
        return ValueError(
            f"{path} holds no zarr metadata; give the path of the image inside the zip file, as in image.zip/folder"
        )
    if stores.is_file(path):
        return ValueError(f"{path} is a file, not an OME-Zarr; convert it with `chunkrestore convert` first")
    return ValueError(f"{path} is a folder without zarr metadata, not an OME-Zarr; convert its files first")


def _no_multiscales(path: str, ome: Json, others: Json) -> ValueError:
    """Return the error for a zarr group that holds no image itself."""
    own = others.get(metadata.OWN_KEY)
    if isinstance(own, dict) and {"state", UNFINISHED} & set(own):
        return ValueError(
            f"{path} is unfinished: its writer has not published it; finish it with `chunkrestore resume` "
            "or write it again with overwrite"
        )
    plate, well, labels = ome.get("plate"), ome.get("well"), ome.get("labels")
    if isinstance(plate, dict) and (wells := metadata.as_dicts(plate.get("wells"))):
        first = stores.check_member(wells[0].get("path"), f"{path}: `plate.wells[0].path`")
        return ValueError(f"{path} is a plate; open a field, such as {path}/{first}/0")
    if isinstance(well, dict) and (images := metadata.as_dicts(well.get("images"))):
        field = stores.check_member(images[0].get("path"), f"{path}: `well.images[0].path`")
        return ValueError(f"{path} is a well; open a field, such as {path}/{field}")
    if "scene" in ome:
        return ValueError(f"{path} is a scene; open one of the images inside it")
    if "bioformats2raw.layout" in ome:
        return ValueError(f"{path} is a collection of images; open one of them, such as {path}/0")
    if isinstance(labels, list):
        named = ", ".join(str(name)[:80] for name in labels[:8])
        return ValueError(f"{path} is a labels group; open one of its members: {named}")
    if names := label_names(path):
        return ValueError(f"{path} holds labels but no image; open one of {path}/labels/: {', '.join(names)}")
    return ValueError(f"{path} is a plain zarr group, not an OME-Zarr image; convert it first")

"""What a new image takes over from the one it was made like: axes, scale, channels, unknown attributes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chunkrestore
from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.channels import named_channels, with_view, without_windows
from chunkrestore.ome_zarr.layout import LevelPlan
from chunkrestore.ome_zarr.read import check_voxel_size
from chunkrestore.ome_zarr.store import Json

if TYPE_CHECKING:
    from chunkrestore.ome_zarr.image import OmeZarrImage

# Attributes that say what kind of group this is, or that are rebuilt; everything else is carried over.
_REBUILT = metadata.OME_KEYS
_OF_ARRAYS = ("_ARRAY_DIMENSIONS",)


def choose_axes(axes: str | None, shape: Sequence[int], like: OmeZarrImage | None) -> str:
    """Return the axes of an image of `shape`: those given, else those of `like` that fit.

    Raises
    ------
    ValueError
        If neither gives one letter per axis, or they are not in the order ``tczyx``.
    """
    if axes is None and like is None:
        raise ValueError("`axes` is needed without `like`: one letter of 'tczyx' per axis of the data")
    if axes is None and like is not None:
        candidates = (like.axes, like.axes.replace("c", ""), like.spatial_axes)
        fitting = [a for a in candidates if len(a) == len(shape)]
        if not fitting:
            raise ValueError(
                f"shape {tuple(shape)} does not fit axes {like.axes!r} of {like.path}; pass `axes`"
            )
        axes = fitting[0]
    letters = metadata.check_letters(axes or "", f"`axes` {axes!r}", ndim=len(shape))
    if list(letters) != sorted(letters, key="tczyx".index):
        raise ValueError(f"`axes` {letters!r} must be in the order 'tczyx'; transpose the data")
    return letters


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as integers.

    Raises
    ------
    ValueError
        If a length is unknown or less than 1.
    """
    if any(math.isnan(n) for n in shape):
        raise ValueError(
            "the shape of the data is unknown; call .compute_chunk_sizes() of the dask array first"
        )
    lengths = tuple(int(n) for n in shape)
    if min(lengths) < 1:
        raise ValueError(f"`shape` {lengths} must be at least 1 on every axis")
    return lengths


def derive_multiscale(
    letters: str,
    shape: Sequence[int],
    *,
    like: OmeZarrImage | None,
    voxel_size: Sequence[float] | None,
    name: str,
    ignore: str = "",
) -> Json:
    """Return axes and level 0 of a new image of `shape`; the other levels follow from `with_levels`.

    Axes in `ignore` may differ in length from those of `like`.

    Raises
    ------
    ValueError
        If `like` does not have the axes or the shape.
    """
    size = None if voxel_size is None else check_voxel_size(voxel_size, letters)
    if like is None:
        return metadata.new_multiscale(letters, size, name)
    if missing := set(letters) - set(like.axes):
        raise ValueError(
            f"`like` {like.path} has axes {like.axes!r}, without {''.join(sorted(missing))!r}; "
            "pass `axes` and `voxel_size` instead of `like`"
        )
    lengths = dict(zip(like.axes, like.shape, strict=True))
    for letter, n in zip(letters, shape, strict=True):
        if letter not in ignore and lengths[letter] != n:
            raise ValueError(
                f"axis {letter!r} is {n} long but {lengths[letter]} in `like` {like.path}; "
                "for a part of an image use like=image.select(...)"
            )
    order = like.source().order
    multiscale = metadata.take_axes(like.ome["multiscales"][0], [order[like.axes.index(a)] for a in letters])
    multiscale.setdefault("name", name)
    return multiscale if size is None else metadata.with_voxel_size(multiscale, letters, size)


def with_time_step(multiscale: Json, letters: str, seconds: float) -> Json:
    """Return the multiscale with `seconds` between time points; only level 0 is kept right.

    Raises
    ------
    ValueError
        If there is no time axis, or `seconds` is not above 0.
    """
    if "t" not in letters or not 0 < seconds < math.inf:
        raise ValueError(
            f"`time_step` {seconds} must be above 0, in seconds, for axes with 't', not {letters!r}"
        )
    result, i = copy.deepcopy(multiscale), letters.index("t")
    factor = float(seconds) / metadata.transform(multiscale, 0)[0][i]
    scale, translation = metadata.transform(multiscale, 0, whole=False)
    scale[i], translation[i] = scale[i] * factor, translation[i] * factor
    base = result["datasets"][0]
    result["datasets"][0] = metadata.dataset(base["path"], scale, translation, base)
    result["axes"][i]["unit"] = "second"
    return result


def with_levels(multiscale: Json, plans: Sequence[LevelPlan], letters: str, method: str) -> Json:
    """Return the multiscale with one entry per planned level, arrays named ``0``, ``1``, ...

    Level ``l`` has scale ``F * scale_0`` and translation ``translation_0 + (F - 1) / 2 * scale_0`` for the
    cumulative factor ``F``: the centre of its first voxel is the centre of what that voxel covers.
    """
    result = copy.deepcopy(multiscale)
    scale, translation = metadata.transform(multiscale, 0, whole=False)
    n_lead = len(letters) - len(metadata.spatial(letters))
    known, factors = result["datasets"], [1] * len(letters)
    result["datasets"] = []
    for level, plan in enumerate(plans):
        factors = [f * g for f, g in zip(factors, (1,) * n_lead + plan.factors, strict=True)]
        moved = [t + (f - 1) / 2 * s for t, f, s in zip(translation, factors, scale, strict=True)]
        scaled = [f * s for f, s in zip(factors, scale, strict=True)]
        base = known[level] if level < len(known) else None
        result["datasets"].append(metadata.dataset(str(level), scaled, moved, base=base))
    return result | described(method)


def described(method: str) -> Json:
    """Return the keys of a multiscale that say how its levels derive from each other."""
    made = {
        "method": "chunkrestore.ome_zarr.pyramid",
        "version": chunkrestore.__version__,
        "description": _DESCRIPTIONS[method],
    }
    return {"type": method, "metadata": made}


_DESCRIPTIONS = {
    "mean": "mean over the voxels of the level below",
    "nearest": "central voxel of the level below",
    "mode": "most frequent label of the level below",
}


def carry_channels(
    letters: str,
    shape: Sequence[int],
    like: OmeZarrImage | None,
    names: Sequence[str] | None,
    *,
    windows: bool,
) -> Json:
    """Return the ``omero`` metadata of a new image, with the display windows of `like` or without any.

    Raises
    ------
    ValueError
        If there is not one name per channel.
    """
    n_c = shape[letters.index("c")] if "c" in letters else 1
    if names is not None and (len(names) != n_c or len(set(names)) != n_c):
        raise ValueError(f"`channels` {tuple(names)} must hold one unique name for each of {n_c} channels")
    ome, own_names = ({}, ()) if like is None else (like.ome, like.channels)
    sizes = dict(zip(letters, shape, strict=True))
    omero = with_view(named_channels(ome, own_names, names, n_c), sizes.get("t", 1), sizes.get("z", 1))
    return omero if windows else without_windows(omero)


def carry_unknown(like: OmeZarrImage | None) -> tuple[Json, Json]:
    """Return the OME attributes and other attributes that are passed on without being understood."""
    if like is None:
        return {}, {}
    others = copy.deepcopy(like.others)
    previous = others.pop(metadata.OWN_KEY, None)
    if previous is not None:
        others[metadata.OWN_KEY] = {"source": previous}
    return {k: copy.deepcopy(v) for k, v in like.ome.items() if k not in _REBUILT}, others


def carry_arrays(like: OmeZarrImage | None) -> tuple[Json, ...]:
    """Return the attributes of the arrays of `like`, level by level; a file that is no zarr has none."""
    readers = [] if like is None else [level.reader for level in like.levels]
    nodes = [stores.read_node(r.name) if type(r) is RegionReader else None for r in readers]
    return tuple({k: v for k, v in n.attributes.items() if k not in _OF_ARRAYS} if n else {} for n in nodes)

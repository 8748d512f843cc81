"""Draw patches from stored volumes of any size.

Every array is read in blocks of whole chunks, one at a time: images for their percentiles (floats twice), targets for
what shows in them, and both where patches were chosen. Nothing depends on the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Slices
from chunkrestore.train import places as placing
from chunkrestore.train.pairs import OpenedPair, Pair, check_patch_shape, kind_of, open_pair
from chunkrestore.train.patches import Patches, allocated, normalize
from chunkrestore.train.places import Ground, Spots
from chunkrestore.train.walking import gather, look, survey

PERCENTILES = {"image": (2.0, 99.8), "labels": (1.0, 99.8)}
"""What networks see as 0 and 1 by default: as `chunkrestore.restore` and `chunkrestore.segment` have it."""
CONTENT = {"image": 0.4, "labels": 0.8}
"""Default of `content`: CSBDeep's fraction of the brightness; the share of patches that hold an object."""


def draw_patches(
    pairs: Sequence[Pair],
    patch_shape: Sequence[int],
    n_patches: int,
    *,
    seed: int,
    validation: float = 0.1,
    percentiles: tuple[float, float] | None = None,
    content: float | None = None,
    block_shape: Sequence[int] | None = None,
    described: Mapping[str, Any] | None = None,
) -> Patches:
    """Draw patches from stored volumes of any size, normalised by percentiles of the whole volumes.

    Patches are laid at random around spots, which have then to be in their central half (in validation patches,
    anywhere). Spots are drawn at random from all volumes together (`chunkrestore.train.places`), so a volume gives
    patches in proportion to the content that it has, and more of them where that is dense:

    - of images, bins of 4 x 4 x 4 voxels (less for thin patches) whose mean is above
      ``low + content * (high - low)``, where low and high are the percentiles of the whole target. It is CSBDeep's
      rule [1]_, above the background and not above zero.
    - of labels, voxels of objects. They are in a share `content` of the patches; the others come from anywhere.

    The same arguments give the same patches, whatever the chunks and blocks.

    Parameters
    ----------
    pairs
        Images and what is to be learnt from them: all images, or all labels.
    patch_shape
        Voxels per spatial axis; may be larger than what is trained on, which is then cropped at random.
    n_patches
        Patches to draw, validation among them.
    seed
        Seed of the places.
    validation
        Share of the patches, and of the volumes, that are held back. There may be fewer validation patches, where
        small volumes have not as many places. 0: none.
    percentiles
        Of every whole volume and channel: what a network sees as 0 and 1. By default (2, 99.8) for images and
        (1, 99.8) for labels.
    content
        As above, 0 to 1; by default 0.4 for images and 0.8 for labels. 0 takes all places.
    block_shape
        Voxels per axis that are read at once; whole chunks of about four million voxels by default.
    described
        What the model card is to say besides where the patches come from.

    Returns
    -------
    Patches
        In memory, or in a temporary file that is mapped if larger than 256 MiB.

    Raises
    ------
    FileNotFoundError
        If a store does not exist.
    ValueError
        If image and target do not fit together, a channel or labels are missing, a volume is smaller than a patch,
        a volume is constant, or there is not enough content: the message tells how much there is.
    chunkrestore.statistics.NonFiniteError
        If a voxel is NaN or infinite; the message tells where.

    References
    ----------
    .. [1] M. Weigert et al., "Content-aware image restoration", Nature Methods 15, 1090 (2018); CSBDeep,
       ``csbdeep.data.no_background_patches``.
    """
    opened = [open_pair(pair, i) for i, pair in enumerate(pairs)]
    kind = kind_of(opened)
    shape = check_patch_shape(opened, patch_shape)
    low_high = _checked_percentiles(PERCENTILES[kind] if percentiles is None else percentiles)
    least = CONTENT[kind] if content is None else content
    wanted = _wanted(n_patches, validation, least if kind == "labels" else 1.0, least)
    if block_shape is not None and len(block_shape) != len(shape):
        raise ValueError(f"`block_shape` {tuple(block_shape)} must have one length per axis, as {shape} has")
    grounds = _grounds(opened, shape)
    surveyed = [_survey(one, low_high, block_shape) for one in opened]
    scale = (1,) * len(shape) if kind == "labels" else placing.bin_shape(shape)
    spots = []
    for i, (one, found) in enumerate(zip(opened, surveyed, strict=True)):
        lattice = [n // b for n, b in zip(one.shape, scale, strict=True)]
        empty = Spots(lattice, n_patches, (seed, 3, i))
        spots.append(_look(one, found, least, empty, scale, block_shape))
    sides = placing.choose(grounds, spots, scale, wanted, seed)
    cut = [_cut(opened, surveyed, side, shape, block_shape) for side in sides]
    said: dict[str, Any] = {
        "strategy": "noise-only" if opened[0].is_own_target else "pairs",
        "patch_shape": list(shape),
        "n_training": len(sides[0]),
        "n_validation": len(sides[1]),
        "seed": seed,
        "percentiles": list(low_high),
        "content": least,
        "volumes": [
            _described(one, found, own.n, [int(np.count_nonzero(side[:, 0] == i)) for side in sides])
            for i, (one, found, own) in enumerate(zip(opened, surveyed, spots, strict=True))
        ],
    }
    return Patches(
        x=cut[0]["x"],
        y=cut[0]["y"],
        x_validation=cut[1]["x"],
        y_validation=cut[1]["y"],
        classes=cut[0].get("classes"),
        classes_validation=cut[1].get("classes"),
        places=sides[0],
        places_validation=sides[1],
        described=said | dict(described or {}),
    )


@dataclass(frozen=True)
class _Surveyed:
    """What was found in the volumes of a pair."""

    image: list[tuple[float, float]]
    """Intensities that become 0 and 1, per channel."""
    target: tuple[float, float] | None
    """Percentiles of a target image."""


def _checked_percentiles(percentiles: tuple[float, float]) -> tuple[float, float]:
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise ValueError(f"`percentiles` {percentiles} must rise from 0 at least to 100 at most")
    return low, high


def _wanted(n_patches: int, validation: float, share: float, content: float) -> placing.Wanted:
    if not 0 <= content <= 1:
        raise ValueError(f"`content` {content} must be between 0 and 1")
    if not 0 <= validation < 1:
        raise ValueError(f"`validation` {validation} must be at least 0 and below 1")
    n_held = math.ceil(validation * n_patches)
    if n_patches - n_held < 1:
        raise ValueError(f"`n_patches` {n_patches} leave none to train on beside {n_held} for `validation`")
    return placing.Wanted(n_patches - n_held, n_held, share, validation)


def _grounds(opened: Sequence[OpenedPair], shape: tuple[int, ...]) -> list[Ground]:
    """Return the volumes with their cells, which are numbered through all samples."""
    first: dict[str, Ground] = {}
    n_cells, grounds = 0, []
    for i, one in enumerate(opened):
        new = Ground.of(one.shape, shape, n_cells)
        known = first.setdefault(one.sample, new)
        if known.cells.shape != one.shape:
            raise ValueError(
                f"pair {i}: its volume {one.shape} differs from another {known.cells.shape} of the same `sample`"
            )
        n_cells += len(new.cells) if known is new else 0
        grounds.append(known)
    return grounds


def _survey(
    one: OpenedPair, percentiles: tuple[float, float], block_shape: Sequence[int] | None
) -> _Surveyed:
    """Walk through the images of a pair for their percentiles."""
    planes = dict.fromkeys(one.image if one.is_labels else (*one.image, one.target))
    numbers = {}
    for plane in planes:
        found = survey(plane, percentiles, block_shape)
        low, high = (found[p] for p in percentiles)
        if not low < high:
            raise ValueError(
                f"percentiles {percentiles} of {plane.name} are both {low:g}: it is constant between them; use others"
            )
        numbers[plane] = low, high
    return _Surveyed([numbers[plane] for plane in one.image], numbers.get(one.target))


def _look(
    one: OpenedPair, found: _Surveyed, content: float, spots: Spots, scale: tuple[int, ...], block_shape: Any
) -> Spots:
    """Walk through the target of a pair for what shows in it."""

    def see(region: Slices, voxels: npt.NDArray[Any]) -> None:
        first = [r.start // b for r, b in zip(region, scale, strict=True)]
        spots.add(first, voxels > 0 if found.target is None else placing.bin_means(voxels, scale) > threshold)

    low, high = found.target or (0.0, 0.0)
    threshold = low + content * (high - low) if content else -np.inf
    look(one.target, see, scale, block_shape)
    return spots


def _cut(
    opened: Sequence[OpenedPair],
    surveyed: Sequence[_Surveyed],
    side: npt.NDArray[np.int64],
    shape: tuple[int, ...],
    block_shape: Sequence[int] | None,
) -> dict[str, npt.NDArray[Any]]:
    """Return the patches at the places of one side, in their order: by volume."""
    n_channels, is_labels = len(opened[0].image), opened[0].is_labels
    x = allocated((len(side), *shape, n_channels), np.float32)
    y = allocated((len(side), *shape), np.int32) if is_labels else x[..., 0]
    if not is_labels and not opened[0].is_own_target:
        y = allocated((len(side), *shape), np.float32)
    classes = allocated((len(side), *shape), np.int32) if opened[0].pair.classes is not None else None
    for i, (one, found) in enumerate(zip(opened, surveyed, strict=True)):
        own = slice(*np.searchsorted(side[:, 0], [i, i + 1]).tolist())
        start = side[own, 1:]
        for c, (plane, (low, high)) in enumerate(zip(one.image, found.image, strict=True)):
            gather(plane, start, x[own, ..., c], partial(normalize, low=low, high=high), block_shape)
        if is_labels:
            gather(one.target, start, y[own], partial(_as_ids, name=one.target.name), block_shape)
        elif (numbers := _target_numbers(one, found)) and not one.is_own_target:
            low, high = numbers
            gather(one.target, start, y[own], partial(normalize, low=low, high=high), block_shape)
        if classes is not None and one.classes is not None:
            gather(one.classes, start, classes[own], partial(_as_ids, name=one.classes.name), block_shape)
        elif classes is not None:
            classes[own] = _classes_of(y[own], one.pair.classes)
    arrays = {"x": x if n_channels > 1 else x[..., 0], "y": y}
    return arrays if classes is None else arrays | {"classes": classes}


def _as_ids(labels: npt.NDArray[Any], name: str) -> npt.NDArray[np.int32]:
    """Return labels as int32."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: labels must be integers, got {labels.dtype}")
    if int(labels.max()) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name}: label id {int(labels.max())} does not fit int32; number the objects from 1"
        )
    return labels.astype(np.int32)


def _classes_of(labels: npt.NDArray[np.int32], classes: Any) -> npt.NDArray[np.int32]:
    """Return the class of every voxel, -1 where its object has none."""
    ids = np.array(sorted(classes), np.int32)
    of_id = np.array([classes[i] for i in sorted(classes)], np.int32)
    nearest = np.minimum(np.searchsorted(ids, labels), len(ids) - 1)
    known = np.where(ids[nearest] == labels, of_id[nearest], np.int32(-1))
    return np.where(labels > 0, known, np.int32(0))


def _target_numbers(one: OpenedPair, found: _Surveyed) -> tuple[float, float] | None:
    """Return what a target image is normalised by, None for labels."""
    return found.target if found.target is None or one.pair.own_numbers else found.image[0]


def _described(one: OpenedPair, found: _Surveyed, n_spots: int, n_patches: Sequence[int]) -> dict[str, Any]:
    """Return what the model card says of a pair."""
    by = _target_numbers(one, found)
    return {
        "image": [plane.describe() for plane in one.image],
        "target": None if one.is_own_target else one.target.describe(),
        "level": one.pair.level,
        "shape": list(one.shape),
        "normalization": [list(pair) for pair in found.image],
        "target_normalization": None if by is None else list(by),
        "n_spots_with_content": n_spots,
        "n_training": n_patches[0],
        "n_validation": n_patches[1],
    }

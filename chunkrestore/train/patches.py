"""Patches that networks are trained on, and how arrays in memory become some.

`chunkrestore.train.drawing.draw_patches` draws them from stores of any size.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]
Volumes: TypeAlias = Sequence[npt.ArrayLike]

_MOST_IN_MEMORY = 2**28
"""Bytes of patches; more lie in a file that is mapped into memory."""
_ARRAYS = (
    "x",
    "y",
    "x_validation",
    "y_validation",
    "classes",
    "classes_validation",
    "places",
    "places_validation",
)


@dataclass(frozen=True, repr=False)
class Patches:
    """Inputs of a network and what it should make of them, cut to one shape.

    Patches may be larger than what a network is trained on at once: training then crops them at random
    (`chunkrestore.train.augment.crop`). No voxel of a validation patch is in a training patch.
    """

    x: FloatArray
    """float32 (n, z, y, x) or (n, y, x), with channels last if there are several; normalised."""
    y: npt.NDArray[Any]
    """(n, z, y, x) or (n, y, x): float32, normalised, or int32 labels (0 is background)."""
    x_validation: FloatArray
    """As `x`, from other places."""
    y_validation: npt.NDArray[Any]
    """As `y`, from other places."""
    described: dict[str, Any] = field(default_factory=dict)
    """Where they come from, for the model card: JSON. ``described["strategy"]`` is ``"noise-only"`` where `y` is the
    noisy input itself, to be learnt with blind spots (`chunkrestore.train.blind_spots`)."""
    classes: npt.NDArray[np.int32] | None = None
    """Class of every voxel of `y` if objects have classes: 0 is background, -1 an object without a known class."""
    classes_validation: npt.NDArray[np.int32] | None = None
    """As `classes`, for `y_validation`."""
    places: npt.NDArray[np.int64] | None = None
    """(n, 1 + n_axes): volume that each patch is from, and its first voxel there."""
    places_validation: npt.NDArray[np.int64] | None = None
    """As `places`, for the validation patches."""

    def __post_init__(self) -> None:
        for part in ("", "_validation"):
            x, y, classes = (getattr(self, name + part) for name in ("x", "y", "classes"))
            others = [y.shape] if classes is None else [y.shape, classes.shape]
            if any(x.shape[: y.ndim] != shape for shape in others):
                raise ValueError(f"`x{part}` {x.shape} and what belongs to it {others} are not paired")
        if self.x.shape[1:] != self.x_validation.shape[1:]:
            raise ValueError(
                f"`x` {self.x.shape} and `x_validation` {self.x_validation.shape} differ in shape"
            )

    def __repr__(self) -> str:
        what = "labels" if self.is_labels else "images"
        return f"<Patches {len(self)} + {len(self.x_validation)} of {self.patch_shape}, {what}>"

    def __len__(self) -> int:
        """Return the number of training patches."""
        return len(self.x)

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Voxels per spatial axis."""
        return self.y.shape[1:]

    @property
    def n_channels(self) -> int:
        """Number of input channels."""
        return int(self.x.shape[-1]) if self.x.ndim > self.y.ndim else 1

    @property
    def is_labels(self) -> bool:
        """Whether `y` holds labels."""
        return self.y.dtype.kind in "iu"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the arrays (``x.npy``, ...) and ``patches.json`` into a new folder.

        Raises
        ------
        FileExistsError
            If `folder` exists.
        """
        folder = Path(folder)
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "patches.json").write_text(json.dumps(self.described, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Return the patches that `save` wrote, mapped into memory.

        Raises
        ------
        FileNotFoundError
            If they are not in `folder`.
        """
        folder = Path(folder)
        described = json.loads((folder / "patches.json").read_text())
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in _ARRAYS
            if not name.startswith(("classes", "places")) or (folder / f"{name}.npy").exists()
        }
        return cls(**arrays, described=described)


def normalize(image: npt.ArrayLike, low: float, high: float) -> FloatArray:
    """Return ``(image - low) / (high - low)`` as float32.

    Raises
    ------
    ValueError
        If `low` and `high` do not rise.
    """
    if not low < high:
        raise ValueError(f"`low` {low} must lie below `high` {high}: the image is constant between them")
    return (np.asarray(image, dtype=np.float32) - np.float32(low)) / np.float32(high - low)


def patches_of(
    inputs: Volumes,
    targets: Volumes | None = None,
    patch_shape: Sequence[int] | None = None,
    *,
    validation: float | tuple[Volumes, Volumes | None] = 0.1,
    seed: int = 0,
    described: dict[str, Any] | None = None,
) -> Patches:
    """Return the patches of normalised volumes in memory: the volumes themselves, or what they are cut into.

    Parameters
    ----------
    inputs
        Normalised images (`normalize`) with axes ``zyx`` or ``yx``.
    targets
        For every input, a normalised image (float) or labels (integers) of its shape. None: the inputs are to
        be learnt from their noise alone.
    patch_shape
        Voxels per axis. Volumes are cut into as many patches as fit without overlap, evenly spread. By
        default patches are whole volumes, which must have one shape: training crops them at random.
    validation
        Share of the patches that are held back, chosen at random, or inputs and targets to validate on. Inputs with
        the same target array show the same sample, and the same place of them stays on one side.
    seed
        Seed of that choice.
    described
        What the model card says of the volumes.

    Returns
    -------
    Patches
        In memory, or in a temporary file that is mapped if larger than 256 MiB.

    Raises
    ------
    ValueError
        If volumes are missing, not paired, not finite or smaller than a patch, or no patch is left for one side.
    """
    said = {"strategy": "noise-only"} if targets is None else {}
    pairs = _pairs_of(inputs, targets)
    shape = _patch_shape(pairs, patch_shape)
    cuts = [(i, place) for i, pair in enumerate(pairs) for place in _places(pair[0].shape, shape, i)]
    if isinstance(validation, tuple):
        held = _pairs_of(*validation)
        held_cuts = [(i, place) for i, pair in enumerate(held) for place in _places(pair[0].shape, shape, i)]
    else:
        held = pairs
        cuts, held_cuts = _split(cuts, [id(y) for _, y in pairs], validation, seed)
    return Patches(
        *_cut(pairs, cuts, shape),
        *_cut(held, held_cuts, shape),
        places=_rows(cuts, len(shape)),
        places_validation=_rows(held_cuts, len(shape)),
        described=said
        | {"patch_shape": list(shape), "n_training": len(cuts), "n_validation": len(held_cuts), "seed": seed}
        | (described or {}),
    )


def allocated(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a new array of zeros: in memory, or in a mapped temporary file that goes with it if it is large."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes <= _MOST_IN_MEMORY:
        return np.zeros(tuple(shape), dtype)
    # The file has no name and ends with the last reference to it, however the process ends.
    with tempfile.TemporaryFile(prefix="chunkrestore-patches-") as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=tuple(shape))


Pair: TypeAlias = tuple[FloatArray, npt.NDArray[Any]]
Cut: TypeAlias = tuple[int, tuple[int, ...]]


def _pairs_of(inputs: Volumes, targets: Volumes | None) -> list[Pair]:
    """Return the volumes as arrays (float32; int32 if they are labels), or say what is wrong with them."""
    seconds = inputs if targets is None else targets
    if len(inputs) != len(seconds):
        raise ValueError(f"there must be as many `targets` as `inputs`; got {len(seconds)} for {len(inputs)}")
    pairs = []
    for i, (x, y) in enumerate(zip(inputs, seconds, strict=True)):
        x, y = np.asarray(x, dtype=np.float32), np.asarray(y)
        y = y.astype(np.int32 if y.dtype.kind in "iu" else np.float32, copy=False)
        if x.shape != y.shape or x.ndim not in (2, 3):
            raise ValueError(f"pair {i}: input {x.shape} and target {y.shape} must have one shape, zyx or yx")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"pair {i}: volumes must be finite; replace NaN and infinite voxels first")
        pairs.append((x, y))
    return pairs


def _patch_shape(pairs: Sequence[Pair], given: Sequence[int] | None) -> tuple[int, ...]:
    if not pairs:
        raise ValueError("`inputs` are empty; training needs at least one volume")
    shapes = {x.shape for x, _ in pairs}
    if given is None and len(shapes) > 1:
        raise ValueError(f"volumes have shapes {sorted(shapes)}; give a `patch_shape` to cut them into")
    shape = tuple(int(n) for n in given) if given is not None else next(iter(shapes))
    if min(shape) < 1:
        raise ValueError(f"`patch_shape` {shape} must be at least 1 on every axis")
    return shape


def _places(volume: Sequence[int], patch: Sequence[int], i: int) -> list[tuple[int, ...]]:
    """Return the first voxels of as many patches as fit side by side, evenly spread."""
    if len(volume) != len(patch) or any(n < p for n, p in zip(volume, patch, strict=True)):
        raise ValueError(
            f"pair {i}: volume {tuple(volume)} does not hold a patch of `patch_shape` {tuple(patch)}"
        )
    starts = []
    for n, p in zip(volume, patch, strict=True):
        spare, count = n % p, n // p
        starts.append([k * p + spare * (2 * k + 1) // (2 * count) for k in range(count)])
    return list(itertools.product(*starts))


def _split(
    cuts: Sequence[Cut], samples: Sequence[int], share: float, seed: int
) -> tuple[list[Cut], list[Cut]]:
    """Return the cuts for training and for validation; the same place of one sample stays on one side."""
    if not 0 <= share < 1:
        raise ValueError(f"`validation` {share} must be at least 0 and below 1")
    keys = [(samples[i], place) for i, place in cuts]
    kinds = list(dict.fromkeys(keys))
    n_held = math.ceil(share * len(kinds))
    if n_held >= len(kinds):
        raise ValueError(
            f"`validation` {share} of {len(kinds)} places leaves none to train on; give more volumes, a smaller "
            "`patch_shape`, or volumes to validate on"
        )
    chosen = np.random.default_rng([seed, 2]).permutation(len(kinds))[:n_held]
    held = {kinds[k] for k in chosen}
    sides = [key in held for key in keys]
    return (
        [cut for cut, is_held in zip(cuts, sides, strict=True) if not is_held],
        [cut for cut, is_held in zip(cuts, sides, strict=True) if is_held],
    )


def _cut(pairs: Sequence[Pair], cuts: Sequence[Cut], shape: tuple[int, ...]) -> Pair:
    """Return the patches at `cuts`, stacked."""
    dtype = pairs[0][1].dtype if pairs else np.dtype(np.float32)
    if any(y.dtype != dtype for _, y in pairs):
        raise ValueError("`targets` must all be images (float) or all be labels (integers)")
    x, y = allocated((len(cuts), *shape), np.float32), allocated((len(cuts), *shape), dtype)
    for k, (i, place) in enumerate(cuts):
        region = tuple(slice(a, a + p) for a, p in zip(place, shape, strict=True))
        x[k], y[k] = pairs[i][0][region], pairs[i][1][region]
    return x, y


def _rows(cuts: Sequence[Cut], n_axes: int) -> npt.NDArray[np.int64]:
    return np.array([(i, *place) for i, place in cuts], np.int64).reshape(-1, 1 + n_axes)

"""How far a trained network looks: measured by changing one voxel, beside what its layers allow.

One voxel of an input is changed and the output compared with what it was before. Networks that pool treat a
voxel according to its place in their pooling grid, so this is done for every place (phase) along each axis.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore import models
from chunkrestore.kernels.network import NetworkGeometry, care_geometry, run_network, stardist_geometry

FloatArray = npt.NDArray[np.float32]

SHARE = 0.99
"""Share of the influence that the effective receptive field holds."""


@dataclass(frozen=True)
class ReceptiveField:
    """Which input voxels an output voxel depends on, and how much."""

    influence: npt.NDArray[np.float64]
    """Mean absolute change of the output by the offset of the input voxel from the output voxel; sums to 1. The
    middle is offset 0. For networks with several outputs, the mean over outputs, each scaled to sum 1."""
    measured_halo: tuple[int, ...]
    """Voxels beyond whole cells of the pooling grid that were seen to matter, rounded up to that grid."""
    needs: NetworkGeometry
    """The halo that the layers of the network allow for, and its pooling grid."""
    output_step: tuple[int, ...]
    """Voxels from one output element to the next (StarDist's grid)."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres per axis, if known."""

    @property
    def reach(self) -> tuple[tuple[int, int], ...]:
        """Farthest input voxels (before, after) that changed an output voxel, per axis, in voxels."""
        return tuple(
            (int(-offsets.min()), int(offsets.max()))
            for offsets in (self.offsets(axis)[self.profile(axis) > 0] for axis in range(self.influence.ndim))
        )

    @property
    def theoretical(self) -> tuple[int, ...]:
        """The halo in voxels per axis that tiles need by the layers alone (`kernels.network`)."""
        return self.needs.depth

    @property
    def effective(self) -> tuple[int, ...]:
        """Distance per axis, in voxels, within which 99 % of the influence lies (Luo et al. 2016)."""
        return tuple(
            int(np.argmax(self._within(axis) >= SHARE - 1e-12)) for axis in range(self.influence.ndim)
        )

    def offsets(self, axis: int) -> npt.NDArray[np.intp]:
        """Return the offsets that `profile` belongs to, in voxels."""
        return np.arange(self.influence.shape[axis]) - self.influence.shape[axis] // 2

    def profile(self, axis: int) -> npt.NDArray[np.float64]:
        """Return the influence by the offset along one axis, summed over the others."""
        others = tuple(a for a in range(self.influence.ndim) if a != axis % self.influence.ndim)
        total: npt.NDArray[np.float64] = self.influence.sum(axis=others)
        return total

    def _within(self, axis: int) -> npt.NDArray[np.float64]:
        """Return the share of the influence within every distance."""
        distance = np.abs(self.offsets(axis))
        return np.cumsum(np.bincount(distance, weights=self.profile(axis)))

    def describe(self) -> dict[str, Any]:
        """Return the numbers, as JSON."""
        size = self.voxel_size
        lengths = (
            None if size is None else [round(r * v, 3) for r, v in zip(self.effective, size, strict=True)]
        )
        return {
            "reach_voxels": [list(ends) for ends in self.reach],
            "effective_radius_voxels": list(self.effective),
            "effective_radius_um": lengths,
            "effective_share": SHARE,
            "measured_halo_voxels": list(self.measured_halo),
            "theoretical_halo_voxels": list(self.theoretical),
            "pooling_grid_voxels": list(self.needs.align),
        }

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the influence as maps and profiles, with measured, effective and theoretical extents.

        Raises
        ------
        ImportError
            If Matplotlib is missing.
        """
        from chunkrestore.train.pictures import new_figure, receptive_field_on

        figure = new_figure((11, 3.6))
        receptive_field_on(figure, self)
        figure.savefig(Path(path), dpi=110)


def receptive_field(
    model: Any,
    *,
    voxel_size: Sequence[float] | None = None,
    seed: int = 0,
    image: npt.ArrayLike | None = None,
) -> ReceptiveField:
    """Measure the receptive field of a trained network.

    Parameters
    ----------
    model
        CARE or StarDist model (folder, shipped name or object), or a Keras model with one output element per
        voxel.
    voxel_size
        Micrometres per axis, to be noted and drawn.
    seed
        Of the input, uniform noise from 0 to 1, and of the order of phases.
    image
        Input instead of noise, normalised, ``(*spatial[, channels])``, such as a validation patch: its middle, or
        all of it and its mirror images around it. What a network makes of zeros would tell little, since
        rectified units that are off hide what is behind them.

    Returns
    -------
    ReceptiveField
        Measured over one cell of the pooling grid.

    Raises
    ------
    ValueError
        If the model's layers are not known or `image` has other axes.

    Notes
    -----
    Influence depends on the input, as every rectified network is a different linear map on different inputs.
    Along an axis, all phases are visited; across axes they are paired at random, since the extent along one axis
    does not depend on the phase along another.

    References
    ----------
    Luo, Li, Urtasun, Zemel, "Understanding the effective receptive field in deep convolutional neural networks",
    NeurIPS (2016).
    """
    network, needs = _network_of(model)
    rng = np.random.default_rng(seed)
    # One cell of the grid, what the layers can see on both sides, and a cell more, so that a reach beyond
    # that would be seen.
    margin = [d + a for d, a in zip(needs.depth, needs.align, strict=True)]
    shape = tuple(2 * m + a for m, a in zip(margin, needs.align, strict=True))
    n_channels = int(network.inputs[0].shape[-1])
    start = _background(shape, n_channels, rng, image)
    before = run_network(network, start)
    step = tuple(n // m for n, m in zip(shape, before[0].shape, strict=False))
    influence = np.zeros(tuple(2 * n - 1 for n in shape))
    halo = np.zeros(len(shape), np.intp)
    for phases in _phases(needs.align, rng):
        place = tuple(m + p for m, p in zip(margin, phases, strict=True))
        changed = start.copy()
        changed[place] += 1
        change = _change(before, run_network(network, changed))
        _add(influence, change, place, step)
        halo = np.maximum(halo, _beyond(change, place, step, needs.align))
    total = influence.sum()
    if total == 0:
        raise ValueError("the network's output does not depend on its input; its weights may be zero")
    rounded = tuple(int(-(-h // a) * a) for h, a in zip(halo, needs.align, strict=True))
    size = None if voxel_size is None else tuple(float(v) for v in voxel_size)
    return ReceptiveField(influence / total, rounded, needs, step, size)


def middle_of(source: Any, *, longest: int = 160) -> FloatArray:
    """Return the middle of a stored image's first channel, normalised by its own percentiles 2 and 99.8.

    Raises
    ------
    FileNotFoundError, ValueError
        If it cannot be opened, or the part is constant.
    """
    from chunkrestore.ome_zarr import open_source
    from chunkrestore.train.patches import normalize

    image = open_source(source)
    region = tuple(
        slice((n - min(n, longest)) // 2, (n - min(n, longest)) // 2 + min(n, longest))
        for n in image.spatial_shape
    )
    part = image.source(0).read(0, 0, region)
    return normalize(part, *np.percentile(part, (2, 99.8)).tolist())


def _network_of(model: Any) -> tuple[Any, NetworkGeometry]:
    """Return the Keras model and what its layers allow it to see."""
    if hasattr(model, "get_config") and hasattr(model, "inputs"):
        from chunkrestore.kernels.keras_geometry import keras_geometry

        description = {"class_name": type(model).__name__, "config": model.get_config()}
        shape = tuple(model.inputs[0].shape)
        return model, keras_geometry(description, len(shape) - 2, int(shape[-1])).needs
    geometry = care_geometry if models.kind(model) == "care" else stardist_geometry
    return models.load(model).keras_model, geometry(models.config(model))


def _background(
    shape: tuple[int, ...], n_channels: int, rng: np.random.Generator, image: npt.ArrayLike | None
) -> FloatArray:
    if image is None:
        return rng.random((*shape, n_channels), dtype=np.float32)
    array = np.asarray(image, dtype=np.float32)
    if array.ndim == len(shape):
        array = np.repeat(array[..., np.newaxis], n_channels, axis=-1)
    if array.ndim != len(shape) + 1 or array.shape[-1] != n_channels:
        raise ValueError(
            f"`image` {np.shape(image)} must have {len(shape)} spatial axes, and {n_channels} channel(s)"
        )
    widths, middle = [], []
    for n, m in zip(shape, array.shape, strict=False):
        before = max(0, n - m) // 2
        widths.append((before, max(0, n - m) - before))
        middle.append(slice(max(0, m - n) // 2, max(0, m - n) // 2 + n))
    return np.pad(array, [*widths, (0, 0)], mode="symmetric")[tuple(middle)].copy()


def _phases(align: Sequence[int], rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """Yield places in a cell of the grid such that each axis meets every one of its phases."""
    n = max(align)
    orders = [rng.permutation(n) % a for a in align]
    return (tuple(int(order[k]) for order in orders) for k in range(n))


def _change(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> npt.NDArray[np.float64]:
    """Return the absolute change of all outputs, each scaled to sum 1, summed over channels."""
    total = np.zeros(before[0].shape[:-1])
    for old, new in zip(before, after, strict=True):
        change = np.abs(new.astype(np.float64) - old).sum(axis=-1)
        total += change / (change.sum() or 1.0)
    return total / len(before)


def _add(
    influence: npt.NDArray[np.float64],
    change: npt.NDArray[np.float64],
    place: tuple[int, ...],
    step: tuple[int, ...],
) -> None:
    """Add the change of output elements at the offsets of the changed input voxel from them."""
    where = []
    for p, n, s, length in zip(place, change.shape, step, influence.shape, strict=True):
        last = p + length // 2
        where.append(slice(last - (n - 1) * s, last + 1, s))
    influence[tuple(where)] += np.flip(change)


def _beyond(
    change: npt.NDArray[np.float64], place: tuple[int, ...], step: tuple[int, ...], align: Sequence[int]
) -> npt.NDArray[np.intp]:
    """Return how far the changed voxel lies, per axis, outside the cells of the grid whose output it changed."""
    far = []
    for axis, (found, p, s, a) in enumerate(zip(np.nonzero(change), place, step, align, strict=True)):
        assert change.shape[axis] * s % a == 0
        first = found * s // a * a
        far.append(int(np.maximum(first - p, p - (first + a - 1)).max(initial=0)))
    return np.array(far, np.intp)

"""Phantoms of filaments: smooth random curves of a given thickness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.simulate.hashing import Floats, Purpose, uniform
from chunkrestore.simulate.lattice import Region, checked_region
from chunkrestore.simulate.microscope import check_seed
from chunkrestore.simulate.painting import FloatArray, Labels
from chunkrestore.simulate.placement import Candidates, Everywhere, Placement, scattered
from chunkrestore.simulate.protocol import Range, between, checked_range, checked_shape, described

_SPANS = 12
"""Pieces of a curve's spline, each with a direction of its own."""
_N_DRAWS = 2 + 4 * (_SPANS + 2)
"""Random numbers for a filament: radius, photons, and four for each edge of the control polygon."""


@dataclass(frozen=True)
class Filaments:
    """Smooth curves that wander through the volume, cross, and leave it at its border.

    A filament is a cubic B-spline whose control polygon is a random walk that remembers its direction. No point
    of it is farther than half its length from its middle, so a region knows all filaments that meet it.
    """

    shape: tuple[int, ...]
    """Voxels per axis (z, y, x), each at least 8."""
    seed: int
    """Seed, not negative. Equal phantoms have equal voxels, whatever regions they are rendered in."""
    density: float = 20.0
    """Filaments per million voxels."""
    length: float = 120.0
    """Length in voxels; a bent one is a little shorter."""
    radius: Range = (1.0, 2.0)
    """Ends of the range of radii in voxels, at least 1."""
    photons: Range = (5.0, 20.0)
    """Ends of the range of photons per voxel."""
    bending: float = 0.3
    """Change of direction per twelfth of the length: standard deviation, in radians while it is small."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        check_seed(self.seed)
        object.__setattr__(self, "radius", checked_range("radius", self.radius, 1.0))
        object.__setattr__(self, "photons", checked_range("photons", self.photons))
        if not 0 < self.density <= 1e5 or not 0 <= self.bending < math.inf:
            raise ValueError(
                f"`density` must lie in (0, 1e5] and `bending` not be negative, got {self.density}, {self.bending}"
            )
        if not 4 <= self.length <= 10_000:
            raise ValueError(f"`length` must lie in [4, 10000] voxels, got {self.length}")
        _ = self._candidates

    @cached_property
    def _candidates(self) -> Candidates:
        edge = max(8.0, (1e6 / self.density) ** (1 / 3))
        n = self.density * edge**3 / 1e6
        return Candidates(self.shape, (edge,) * 3, math.ceil(n), Everywhere(n / math.ceil(n)), self.seed)

    def placement(self, region: Sequence[slice]) -> Placement:
        """Return ids and middles of all filaments that show in `region`, with some around it that do not."""
        reach = self.length / 2 + self.radius[1] + 1
        return scattered(self._candidates, checked_region(region, self.shape), reach)

    def curve(self, key: int, middle: Floats) -> Floats:
        """Return points along a filament, at most a voxel apart: (n, 3), in voxels."""
        # One filament at a time: arrays of equal shape round the same, whatever region asks.
        draws = uniform(self.seed, Purpose.CURVES, np.array(key), _N_DRAWS)[2:].reshape(-1, 4)
        steps = _normals(draws)
        # The first edge has any direction, each other one nearly that of the edge before.
        steps[1:] *= self.bending
        directions = np.empty_like(steps)
        direction = np.zeros(3)
        for joint, change in enumerate(steps):
            direction = direction + change
            direction /= math.sqrt(float(direction @ direction))
            directions[joint] = direction
        corners = np.concatenate([np.zeros((1, 3)), np.cumsum(directions, axis=0)]) * self.length / _SPANS
        n = math.ceil(self.length / _SPANS)
        t = (np.arange(n) / n)[:, None]
        basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        spans = np.zeros((_SPANS, n, 3))
        for i, share in enumerate(basis):
            spans += corners[i : i + _SPANS, None] * share / 6
        points = spans.reshape(-1, 3)
        return np.asarray(points - points[len(points) // 2] + middle)

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume: labels (int32) and photons (float32); see `Phantom.render`.

        Where filaments cross, a voxel belongs to the one in which it lies deeper.
        """
        region = checked_region(region, self.shape)
        shape = tuple(part.stop - part.start for part in region)
        labels, photons = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        level = np.full(shape, np.inf)
        placement = self.placement(region)
        looks = uniform(self.seed, Purpose.CURVES, placement.keys, _N_DRAWS)[:, :2]
        for id_, middle, look in zip(placement.ids, placement.centres, looks, strict=True):
            points = self.curve(int(id_) - 1, middle)
            radius, light = between(self.radius, look[0]), between(self.photons, look[1])
            voxels, distances = _distances(region, points, radius + 0.5)
            deeper = distances / radius < level[voxels]
            voxels, distances = tuple(v[deeper] for v in voxels), distances[deeper]
            level[voxels] = distances / radius
            photons[voxels] = light * np.clip(radius + 0.5 - distances, 0, 1)
            inside = distances < radius
            labels[tuple(v[inside] for v in voxels)] = id_
        return labels, photons

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, to be kept as JSON."""
        return described(self)


def _normals(draws: Floats) -> Floats:
    """Return three normal numbers from four uniform ones, by row (Box and Muller)."""
    size, angle = np.sqrt(-2 * np.log1p(-draws[:, :2])), 2 * np.pi * draws[:, 2:]
    return np.concatenate([size * np.cos(angle), size[:, :1] * np.sin(angle[:, :1])], axis=1)


def _distances(
    region: Region, points: Floats, reach: float
) -> tuple[tuple[npt.NDArray[np.intp], ...], Floats]:
    """Return the voxels of `region` (by index in it) closer than `reach` to a curve, and how far they are."""
    low = np.array([part.start for part in region])
    high = np.array([part.stop for part in region])
    starts, ends = points[:-1], points[1:]
    # Pieces are at most a voxel long.
    near = ((starts >= low - reach - 1) & (starts <= high + reach)).all(axis=1)
    starts, ends = starts[near], ends[near]
    half = math.floor(reach + 1)
    ball = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = np.rint((starts + ends) / 2).astype(np.int64)[:, None] + ball
    distances = _to_pieces(voxels, starts[:, None], ends[:, None])
    inside = (distances < reach) & ((voxels >= low) & (voxels < high)).all(axis=2)
    shape = tuple(int(n) for n in high - low)
    indices = np.ravel_multi_index(tuple((voxels[inside] - low).T), shape)
    distances = distances[inside]
    # Of each voxel, the distance to the piece that is nearest.
    order = np.lexsort((distances, indices))
    first = order[np.flatnonzero(np.diff(indices[order], prepend=-1))]
    return np.unravel_index(indices[first], shape), distances[first]


def _to_pieces(voxels: npt.NDArray[np.int64], starts: Floats, ends: Floats) -> Floats:
    """Return the distance of voxels to straight pieces, by broadcasting; operations that round the same anywhere."""
    along, beyond = ends - starts, voxels - starts

    def dot(a: Floats, b: Floats) -> Floats:
        return np.asarray(a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2])

    share = np.clip(dot(beyond, along) / np.maximum(dot(along, along), 1e-12), 0, 1)
    rest = beyond - share[..., None] * along
    return np.asarray(np.sqrt(dot(rest, rest)))

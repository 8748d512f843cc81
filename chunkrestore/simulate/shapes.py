"""Phantoms of simple bodies: spheres of several sizes, and beads below the resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from chunkrestore.simulate.hashing import Floats, Keys, Purpose, uniform
from chunkrestore.simulate.lattice import Region, checked_region
from chunkrestore.simulate.microscope import check_seed
from chunkrestore.simulate.painting import Drawn, FloatArray, Labels, offsets, overlap, paint
from chunkrestore.simulate.placement import Bools, Candidates, Everywhere, Placement, Spacing, packed
from chunkrestore.simulate.protocol import Range, between, checked_range, checked_shape, described

_ISOTROPIC = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Spheres:
    """Spheres of several sizes and brightnesses."""

    shape: tuple[int, ...]
    """Voxels per axis (z, y, x), each at least 8."""
    seed: int
    """Seed, not negative. Equal phantoms have equal voxels, whatever regions they are rendered in."""
    radius: Range = (3.0, 10.0)
    """Ends of the range of radii in voxels, at least 1."""
    photons: Range = (5.0, 40.0)
    """Ends of the range of photons per voxel."""
    spacing: float = 1.0
    """Least distance of two centres in sums of their radii: at 1 they touch, below they cut into each other."""
    crowding: float = 2.0
    """Volume of the spheres that are tried, relative to the space: 0.1 is sparse, 12 leaves no gaps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        check_seed(self.seed)
        object.__setattr__(self, "radius", checked_range("radius", self.radius, 1.0))
        object.__setattr__(self, "photons", checked_range("photons", self.photons))
        if self.spacing < 0.5 or not 0 < self.crowding <= 100:
            raise ValueError(
                f"`spacing` must be at least 0.5 and `crowding` lie in (0, 100], got {self.spacing}, {self.crowding}"
            )
        _ = self._candidates

    @cached_property
    def _candidates(self) -> Candidates:
        low, high = self.radius
        mean_cube = (low**3 + low**2 * high + low * high**2 + high**3) / 4
        edge = Spacing.edge(high, self.spacing, _ISOTROPIC)
        n = self.crowding * math.prod(edge) / (4 / 3 * math.pi * mean_cube)
        return Candidates(self.shape, edge, math.ceil(n), Everywhere(n / math.ceil(n)), self.seed)

    def radius_of(self, keys: Keys) -> Floats:
        """Return the radius of each sphere in voxels."""
        low, high = self.radius
        return np.asarray(low + (high - low) * uniform(self.seed, Purpose.SHAPES, keys, 2)[:, 0])

    def placement(self, region: Sequence[slice]) -> Placement:
        """Return ids and centres of all spheres that show in `region`, with some around it that do not."""
        region = checked_region(region, self.shape)
        spacing = Spacing(self.radius_of, self.spacing)
        return packed(self._candidates, region, self.radius[1] + 1, spacing)

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume: labels (int32) and photons (float32); see `Phantom.render`."""
        region = checked_region(region, self.shape)
        return paint(region, self._draw(region))

    def _draw(self, region: Region) -> Iterator[Drawn]:
        placement = self.placement(region)
        radii = self.radius_of(placement.keys).tolist()
        lights = uniform(self.seed, Purpose.SHAPES, placement.keys, 2)[:, 1].tolist()
        for id_, centre, radius, light in zip(
            placement.ids.tolist(), placement.centres.tolist(), radii, lights, strict=True
        ):
            origin = tuple(math.floor(c - radius - 0.5) for c in centre)
            extent = tuple(math.ceil(c + radius + 0.5) - o + 1 for c, o in zip(centre, origin, strict=True))
            if overlap(region, origin, extent) is None:
                continue
            dz, dy, dx = offsets(origin, extent, centre)
            distance = np.sqrt(dz * dz + (dy * dy + dx * dx))
            covered = np.clip(np.float32(radius + 0.5) - distance, 0, 1)
            photons = covered * np.float32(between(self.photons, light))
            yield Drawn(id_, origin, distance / np.float32(radius), photons)

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, to be kept as JSON."""
        return described(self)


@dataclass(frozen=True)
class Beads:
    """Beads below the resolution, sparse and wholly inside: what a point spread function is measured from.

    Centres lie between voxels. A bead's light has its centroid exactly at the centre, so that it tells a shift
    of a fraction of a voxel. Light of beads that overlap adds up.
    """

    shape: tuple[int, ...]
    """Voxels per axis (z, y, x), each at least 8."""
    seed: int
    """Seed, not negative. Equal phantoms have equal voxels, whatever regions they are rendered in."""
    density: float = 20.0
    """Beads per million voxels, before those too close to another are left out."""
    radius: float = 0.0
    """Radius in voxels, at most 4; 0 is a point."""
    photons: Range = (4000.0, 8000.0)
    """Ends of the range of photons of a whole bead."""
    spacing: float = 16.0
    """Least distance of two centres in voxels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        check_seed(self.seed)
        object.__setattr__(self, "photons", checked_range("photons", self.photons))
        if not 0 <= self.radius <= 4:
            raise ValueError(f"`radius` must lie in [0, 4] voxels (use Spheres beyond), got {self.radius}")
        if not 0 < self.density <= 1e6 or not 0 <= self.spacing < math.inf:
            raise ValueError(
                f"`density` must lie in (0, 1e6] and `spacing` not be negative, got {self.density}, {self.spacing}"
            )
        if min(self.shape) <= 2 * self.radius + 3:
            raise ValueError(f"`shape` {self.shape} has no room for beads of radius {self.radius}")
        _ = self._candidates

    @cached_property
    def _candidates(self) -> Candidates:
        edge = max(self.spacing * (1 + 1e-9), (1e6 / self.density) ** (1 / 3))
        n = self.density * edge**3 / 1e6
        inside = _Inside(self.shape, self.radius + 1, n / math.ceil(n))
        return Candidates(self.shape, (edge,) * 3, math.ceil(n), inside, self.seed)

    def placement(self, region: Sequence[slice]) -> Placement:
        """Return ids and centres of all beads that show in `region`, with some around it that do not."""
        spacing = Spacing(lambda keys: np.full(len(keys), self.spacing / 2), 1.0)
        return packed(self._candidates, checked_region(region, self.shape), self.radius + 1, spacing)

    def photons_of(self, keys: Keys) -> Floats:
        """Return the photons of each bead."""
        low, high = self.photons
        return np.asarray(low + (high - low) * uniform(self.seed, Purpose.SHAPES, keys, 1)[:, 0])

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume: labels (int32) and photons (float32); see `Phantom.render`.

        A bead's id marks the voxels that hold at least half as much of its light as the brightest.
        """
        region = checked_region(region, self.shape)
        labels = np.zeros([part.stop - part.start for part in region], dtype=np.int32)
        photons = np.zeros(labels.shape, dtype=np.float32)
        placement = self.placement(region)
        extent = (2 * math.ceil(self.radius) + 2,) * 3
        for id_, centre, light in zip(
            placement.ids, placement.centres, self.photons_of(placement.keys), strict=True
        ):
            origin = tuple(math.floor(c) - math.ceil(self.radius) for c in centre)
            common = overlap(region, origin, extent)
            if common is None:
                continue
            here, there = common
            shares = _shares(centre - origin, self.radius, extent)
            photons[here] += (light * shares[there]).astype(np.float32)
            own = (shares[there] >= shares.max() / 2) & (labels[here] == 0)
            np.copyto(labels[here], id_, where=own)
        return labels, photons

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, to be kept as JSON."""
        return described(self)


@dataclass(frozen=True)
class _Inside:
    """The same chance everywhere but near the volume's border."""

    shape: tuple[int, ...]
    margin: float
    value: float

    def chance(self, points: Floats) -> Floats:
        """Return `value` where a bead lies wholly inside."""
        inside = (points >= self.margin) & (points <= np.array(self.shape) - 1 - self.margin)
        return np.where(inside.all(axis=1), self.value, 0.0)

    def possible(self, low: Floats, high: Floats) -> Bools:
        """Return True for every box."""
        return np.full(len(low), True)


@lru_cache(maxsize=2)
def _ball() -> Floats:
    """Return points that fill the unit ball evenly and symmetrically, (n, 3)."""
    # Nine planes: no more than a voxel apart at the largest radius.
    axis = np.linspace(-1, 1, 9)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.asarray(points[(points**2).sum(axis=1) <= 1])


def _shares(centre: Floats, radius: float, extent: tuple[int, ...]) -> Floats:
    """Return how a ball's light falls on the voxels of a box: sum 1, centroid at `centre`."""
    points = centre + (radius * _ball() if radius else np.zeros((1, 3)))
    low = np.floor(points).astype(np.intp)
    part = points - low
    shares = np.zeros(extent)
    # The light of a point goes to the eight voxels around it so that its centroid stays (linear interpolation).
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, part, 1 - part).prod(axis=1)
        np.add.at(shares, tuple((low + corner).T), weight / len(points))
    return shares

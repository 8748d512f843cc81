"""What a nucleus looks like: a dented ellipsoid with a bright rim and chromatin texture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from chunkrestore.simulate.hashing import Floats, Keys, Purpose, uniform
from chunkrestore.simulate.lattice import Region
from chunkrestore.simulate.painting import Drawn, FloatArray, offsets, overlap
from chunkrestore.simulate.placement import Bools, Candidates, Density, Everywhere, Placement, Spacing, packed
from chunkrestore.simulate.protocol import Range, between, checked_range

Rows: TypeAlias = tuple[tuple[float, ...], ...]

INTERPHASE, MITOTIC = 1, 2
"""Classes of nuclei; 0 is background."""

_ATTEMPTS = 8.0
"""Centres tried per mean nucleus volume of space: few gaps remain that another nucleus would fit."""
_CONDENSED = 0.8
"""Radius of a mitotic nucleus relative to the one it had."""
_TILE = 64
"""Edge of the periodic block of texture that every nucleus takes its own from, shifted and mirrored."""


@dataclass(frozen=True)
class Nuclei:
    """What the nuclei look like. Pairs are the ends of a range from which each nucleus draws."""

    radius: Range = (5.0, 9.0)
    """Mean lateral radius in voxels."""
    elongation: Range = (1.0, 1.5)
    """Longest over shortest axis of the ellipsoid before `flattening`."""
    flattening: Range = (0.8, 1.0)
    """Extent along z relative to that of the same nucleus in isotropic space."""
    spacing: float = 0.88
    """Least distance of two centres in sums of their radii; below 1 neighbours touch and dent each other."""
    photons: Range = (4.0, 14.0)
    """Photons per voxel in the interior of an interphase nucleus."""
    texture: float = 0.2
    """Standard deviation of the chromatin texture relative to the mean intensity."""
    mitotic: float = 0.03
    """Share of the nuclei tried that are condensed: 0.8 times the radius, twice as bright. Where it is crowded, more of
    them fit than of larger ones: half as many again."""
    grain: float = 1.3
    """Size of the grains of the texture: standard deviation, in voxels, of the Gaussian that smooths it."""
    dents: float = 0.05
    """Amplitude, relative to the radius, of each of the two waves that dent the surface."""

    def __post_init__(self) -> None:
        for name, least in (("radius", 1.0), ("elongation", 1.0), ("flattening", 0.0), ("photons", 0.0)):
            object.__setattr__(self, name, checked_range(name, getattr(self, name), least))
        if self.spacing < 0.5:
            raise ValueError(
                f"`spacing` must be at least 0.5 (closer nuclei swallow each other), got {self.spacing}"
            )
        if self.texture < 0 or not 0 <= self.mitotic <= 1:
            raise ValueError(
                f"`texture` must not be negative and `mitotic` must lie in [0, 1], got {self.texture}, {self.mitotic}"
            )
        if not 0 < self.grain <= _TILE / 8:
            raise ValueError(f"`grain` must lie in (0, {_TILE // 8}] voxels, got {self.grain}")
        if not 0 <= self.dents <= 0.15:
            raise ValueError(f"`dents` must lie in [0, 0.15], got {self.dents}")

    @property
    def limit(self) -> float:
        """How far a nucleus reaches at most, relative to its ellipsoid."""
        # Where it is dented least, to where half a voxel is not covered any more.
        return (1 + 0.5 / (_CONDENSED * self.radius[0])) / (1 - 2 * self.dents)

    @property
    def reach(self) -> float:
        """Voxels from a centre beyond which the nucleus is nowhere."""
        longest = self.elongation[1] ** (2 / 3) * self.radius[1]
        return longest * self.limit * max(1.0, self.flattening[1]) + 1

    @property
    def _scale(self) -> tuple[float, float, float]:
        # Flattened nuclei pack more tightly along z.
        return (sum(self.flattening) / 2, 1.0, 1.0)

    def candidates(self, shape: tuple[int, ...], seed: int, density: Density | None = None) -> Candidates:
        """Return the candidates for the nuclei of a volume."""
        edge = Spacing.edge(self.radius[1], self.spacing, self._scale)
        mean_volume = 4 / 3 * math.pi * (sum(self.radius) / 2) ** 3 * self._scale[0]
        per_cell = math.ceil(_ATTEMPTS * math.prod(edge) / mean_volume)
        return Candidates(shape, edge, per_cell, density or Everywhere(), seed)

    def placement(self, candidates: Candidates, region: Region) -> Placement:
        """Return the nuclei that may show in `region`."""
        spacing = Spacing(lambda keys: self.radii(candidates.seed, keys), self.spacing, self._scale)
        return packed(candidates, region, self.reach, spacing)

    def radii(self, seed: int, keys: Keys) -> Floats:
        """Return the mean radius of each nucleus, in voxels."""
        low, high = self.radius
        radii = low + (high - low) * uniform(seed, Purpose.SIZES, keys, 2)[:, 0]
        return np.where(self.condensed(seed, keys), _CONDENSED * radii, radii)

    def condensed(self, seed: int, keys: Keys) -> Bools:
        """Return which nuclei are mitotic."""
        return np.asarray(uniform(seed, Purpose.SIZES, keys, 2)[..., 1] < self.mitotic)

    def draw(self, seed: int, placement: Placement, region: Region) -> Iterator[Drawn]:
        """Yield the nuclei that show in `region`, by rising id."""
        texture = _texture(seed, self.texture, self.grain)
        radii, condensed = self.radii(seed, placement.keys), self.condensed(seed, placement.keys)
        looks = uniform(seed, Purpose.LOOKS, placement.keys, _N_LOOKS)
        for row, id_ in enumerate(placement.ids):
            centre, radius = placement.centres[row].tolist(), float(radii[row])
            inverse, halves = self._ellipsoid(radius, looks[row, :6].tolist())
            origin = tuple(math.floor(c - h) for c, h in zip(centre, halves, strict=True))
            extent = tuple(math.ceil(c + h) - o + 1 for c, h, o in zip(centre, halves, origin, strict=True))
            if overlap(region, origin, extent) is None:
                continue
            look = looks[row].tolist()
            level = self._level(inverse, offsets(origin, extent, centre), look)
            # Part of a voxel at the surface lies inside; a thin bright rim (heterochromatin) lines the envelope.
            photons = between(self.photons, look[6]) * (2.0 if condensed[row] else 1.0)
            shine = np.clip((1 - level) * np.float32(radius) + np.float32(0.5), 0, 1)
            shine *= np.where(level > 0.8, np.float32(1.15 * photons), np.float32(photons))
            shine *= texture[np.ix_(*(_taken(*part) for part in zip(extent, look[7:10], strict=True)))]
            yield Drawn(int(id_), origin, level, shine)

    def _ellipsoid(self, radius: float, look: list[float]) -> tuple[Rows, tuple[float, ...]]:
        """Return the matrix from offsets to the unit ball, and half the edges of the box that holds the nucleus."""
        elongation = between(self.elongation, look[0])
        stretch = [elongation**0.5, elongation**-0.5, elongation ** (look[1] - 0.5)]
        size = radius / math.prod(stretch) ** (1 / 3)
        axes = [size * s for s in stretch]
        rotation = _rotation(*look[2:5])
        flattening = (between(self.flattening, look[5]), 1.0, 1.0)
        inverse = tuple(tuple(rotation[i][k] / axes[k] / flattening[i] for i in range(3)) for k in range(3))
        halves = tuple(
            self.limit * flattening[i] * math.hypot(*(rotation[i][k] * axes[k] for k in range(3)))
            for i in range(3)
        )
        return inverse, halves

    def _level(self, inverse: Rows, offset: list[FloatArray], look: list[float]) -> FloatArray:
        """Return the level function: the norm in the unit ball, times two weak waves on the surface."""
        squared = np.zeros((), dtype=np.float32)
        for row in inverse:
            unit = _plane(offset, row)
            squared = squared + unit * unit
        dent = np.ones((), dtype=np.float32)
        for wave in (look[10:15], look[15:20]):
            vector = (*_normal(wave[0], wave[1]), _normal(wave[2], wave[3])[0])
            slope = tuple(
                1.2 * sum(v * row[i] for v, row in zip(vector, inverse, strict=True)) for i in range(3)
            )
            phase = 2 * math.pi * wave[4]
            dent = dent + np.float32(self.dents) * np.cos(_plane(offset, slope) + np.float32(phase))
        return np.asarray(np.sqrt(squared) * dent, dtype=np.float32)


_N_LOOKS = 20
"""Random numbers for a nucleus: axes 2, orientation 3, flattening, photons, texture 3, two waves of 5."""


def _plane(offset: list[FloatArray], slope: tuple[float, ...]) -> FloatArray:
    """Return ``slope . offset`` on the box, by broadcasting."""
    z, y, x = (np.float32(s) * o for s, o in zip(slope, offset, strict=True))
    return np.asarray(z + (y + x), dtype=np.float32)


def _normal(first: float, second: float) -> tuple[float, float]:
    """Return two independent normal numbers from two uniform ones in [0, 1) (Box and Muller)."""
    size = math.sqrt(-2 * math.log1p(-first))
    return size * math.cos(2 * math.pi * second), size * math.sin(2 * math.pi * second)


def _rotation(u: float, v: float, w: float) -> Rows:
    """Return a rotation, all equally likely, from three numbers in [0, 1) (Shoemake, Graphics Gems III, 1992)."""
    r, s = math.sqrt(1 - u), math.sqrt(u)
    a, b = r * math.sin(2 * math.pi * v), r * math.cos(2 * math.pi * v)
    c, d = s * math.sin(2 * math.pi * w), s * math.cos(2 * math.pi * w)
    return (
        (1 - 2 * (b * b + c * c), 2 * (a * b - c * d), 2 * (a * c + b * d)),
        (2 * (a * b + c * d), 1 - 2 * (a * a + c * c), 2 * (b * c - a * d)),
        (2 * (a * c - b * d), 2 * (b * c + a * d), 1 - 2 * (a * a + b * b)),
    )


def _taken(n: int, chance: float) -> npt.NDArray[np.intp]:
    """Return which `n` planes of the texture tile a nucleus takes: any start, forwards or backwards."""
    start = int(chance * 2 * _TILE)
    steps = np.arange(n) if start < _TILE else -np.arange(n)
    return np.asarray((start + steps) % _TILE, dtype=np.intp)


@lru_cache(maxsize=4)
def _texture(seed: int, strength: float, grain: float) -> FloatArray:
    """Return a periodic block of texture factors: mean 1, standard deviation `strength`, clipped."""
    rng = np.random.default_rng([seed, Purpose.TEXTURE])
    noise = rng.normal(size=(_TILE,) * 3).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, grain, mode="wrap")
    texture = np.clip(1 + strength * smooth / smooth.std(), 0.3, 2.5).astype(np.float32)
    texture.setflags(write=False)
    return texture

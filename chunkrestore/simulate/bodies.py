"""Phantoms made of nuclei: an embryo with a crowded shell, and tissue that is crowded everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.simulate.hashing import Floats, Purpose
from chunkrestore.simulate.lattice import Region, cells_of, checked_region, common, within
from chunkrestore.simulate.microscope import check_seed
from chunkrestore.simulate.nuclei import INTERPHASE, MITOTIC, Nuclei
from chunkrestore.simulate.painting import FloatArray, Labels, paint
from chunkrestore.simulate.placement import Bools, Candidates, Density, Placement
from chunkrestore.simulate.protocol import checked_shape, described

_FADE = 4.0
"""Voxels below and above the body's surface over which the cytoplasm's glow fades."""


@dataclass(frozen=True)
class Tissue:
    """Nuclei with texture, touching each other, equally crowded everywhere."""

    shape: tuple[int, ...]
    """Voxels per axis (z, y, x), each at least 8."""
    seed: int
    """Seed, not negative. Equal phantoms have equal voxels, whatever regions they are rendered in."""
    nuclei: Nuclei = field(default_factory=Nuclei)
    """Sizes, shapes and brightness of the nuclei."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", checked_shape(self.shape))
        check_seed(self.seed)
        _ = self._candidates

    @cached_property
    def _candidates(self) -> Candidates:
        return self.nuclei.candidates(self.shape, self.seed, self._density())

    def _density(self) -> Density | None:
        return None

    def placement(self, region: Sequence[slice]) -> Placement:
        """Return ids and centres of the nuclei that may show in `region`, with some that do not."""
        return self.nuclei.placement(self._candidates, checked_region(region, self.shape))

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume.

        Parameters
        ----------
        region
            Part of the volume, one slice per axis.

        Returns
        -------
        labels : ndarray
            int32: the nucleus at each voxel, 0 for none. Ids are unique in the volume, with gaps.
        photons : ndarray
            float32: photons that each voxel emits.

        Raises
        ------
        ValueError
            If `region` does not lie in the volume.
        """
        region = checked_region(region, self.shape)
        return paint(region, self.nuclei.draw(self.seed, self.placement(region), region))

    def class_of(self, ids: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Return the class of each id: 0 background, 1 interphase, 2 mitotic; the shape of `ids`."""
        ids = np.asarray(ids, dtype=np.int64)
        classes = np.zeros(ids.shape, dtype=np.uint8)
        nuclei = ids > 0
        condensed = self.nuclei.condensed(self.seed, ids[nuclei] - 1)
        classes[nuclei] = np.where(condensed, MITOTIC, INTERPHASE)
        return classes

    def render_classes(self, region: Sequence[slice]) -> npt.NDArray[np.uint8]:
        """Return the class of each voxel of `region`: 0 background, 1 interphase, 2 mitotic."""
        return self.class_of(self.render(region)[0])

    def describe(self) -> dict[str, Any]:
        """Return kind and parameters, to be kept as JSON."""
        return described(self)


@dataclass(frozen=True)
class Embryo(Tissue):
    """An ellipsoidal body of nuclei: a crowded shell of touching ones, crowded clusters, few elsewhere inside.

    The body fills nine tenths of each axis. It glows faintly (cytoplasm), and emits nothing outside.
    """

    clusters: int = 5
    """Number of crowded clusters inside, each three tenths of the body across."""
    shell: float = 1.6
    """Thickness of the shell in largest radii of nuclei."""
    sparse: float = 0.04
    """Share of the candidates that are tried outside shell and clusters; 1 crowds the whole body."""
    cytoplasm: float = 0.08
    """Photons per voxel of the body relative to the dimmest nuclei."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 0 or self.shell < 0 or self.cytoplasm < 0 or not 0 <= self.sparse <= 1:
            raise ValueError(
                "`clusters`, `shell` and `cytoplasm` must not be negative and `sparse` must lie in [0, 1], got "
                f"{self.clusters}, {self.shell}, {self.cytoplasm}, {self.sparse}"
            )

    def _density(self) -> Density:
        return _Body(self.shape, self.seed, self.clusters, self.shell * self.nuclei.radius[1], self.sparse)

    def render(self, region: Sequence[slice]) -> tuple[Labels, FloatArray]:
        """Draw a part of the volume; see `Tissue.render`. Nuclei outshine the cytoplasm that they lie in."""
        region = checked_region(region, self.shape)
        labels, photons = super().render(region)
        self._glow(region, photons)
        return labels, photons

    def _glow(self, region: Region, photons: FloatArray) -> None:
        """Raise `photons` to the glow of the body, which fades at its surface; changes `photons`."""
        body = _Body(self.shape, self.seed, 0, 0, 0)
        full = np.float32(self.cytoplasm * self.nuclei.photons[0])
        # Most cells lie wholly inside or outside: only the others are worth a look at each voxel.
        for _, cell in cells_of(region, self.shape):
            part = common(cell, region)
            here = photons[within(part, region)]
            shallow, deep = body.depths(part)
            # A voxel more, so that how a part was cut never decides where float32 rounds.
            if deep <= -_FADE - 1:
                continue
            if shallow >= _FADE + 1:
                np.maximum(here, full, out=here)
            else:
                share = np.clip(body.depth_of_voxels(part) / np.float32(2 * _FADE) + np.float32(0.5), 0, 1)
                np.maximum(here, full * (share * share * (3 - 2 * share)), out=here)


@dataclass(frozen=True)
class _Body:
    """The ellipsoid that an embryo fills, and where in it nuclei are likely."""

    shape: tuple[int, ...]
    seed: int
    n_clusters: int
    shell: float
    """Thickness in voxels."""
    sparse: float

    @cached_property
    def _semi_axes(self) -> Floats:
        return 0.45 * np.array(self.shape, dtype=np.float64)

    @cached_property
    def _centre(self) -> Floats:
        return (np.array(self.shape, dtype=np.float64) - 1) / 2

    def _depth(self, rho: Any) -> Any:
        """Return about how many voxels a point lies below the surface, from its distance in semi-axes."""
        return (1 - rho) * min(self._semi_axes)

    def chance(self, points: Floats) -> Floats:
        """Return 1 in shell and clusters, less elsewhere inside, 0 outside."""
        depth = self._depth(_norm((points - self._centre) / self._semi_axes))
        crowded = (depth > 0) & (depth < self.shell)
        for cluster in _cluster_centres(self.seed, self.n_clusters):
            nearest = (points - (self._centre + cluster * self._semi_axes)) / (0.3 * self._semi_axes)
            crowded |= _norm(nearest) < 1
        return np.where(depth > 0, np.where(crowded, 1.0, self.sparse), 0.0)

    def possible(self, low: Floats, high: Floats) -> Bools:
        """Return which boxes meet the body."""
        low, high = (low - self._centre) / self._semi_axes, (high - self._centre) / self._semi_axes
        return np.asarray(_norm(np.maximum(np.maximum(low, -high), 0)) < 1)

    def depths(self, region: Region) -> tuple[float, float]:
        """Return the least and the largest depth of the voxels of a region."""
        low = (np.array([part.start for part in region]) - self._centre) / self._semi_axes
        high = (np.array([part.stop - 1 for part in region]) - self._centre) / self._semi_axes
        far, near = np.maximum(-low, high), np.maximum(np.maximum(low, -high), 0)
        return float(self._depth(_norm(far))), float(self._depth(_norm(near)))

    def depth_of_voxels(self, region: Region) -> FloatArray:
        """Return the depth of each voxel of a region (float32)."""
        z, y, x = (
            (((np.arange(p.start, p.stop) - c) / a) ** 2).astype(np.float32)
            for p, c, a in zip(region, self._centre, self._semi_axes, strict=True)
        )
        rho = np.sqrt(z[:, None, None] + (y[:, None] + x))
        return np.asarray((1 - rho) * np.float32(min(self._semi_axes)), dtype=np.float32)


def _norm(points: Floats) -> Floats:
    # Not np.linalg.norm: the order of its sums, and so the last bit, may follow from the number of points.
    return np.asarray(np.sqrt(points[..., 0] ** 2 + points[..., 1] ** 2 + points[..., 2] ** 2))


@lru_cache(maxsize=16)
def _cluster_centres(seed: int, n: int) -> tuple[Floats, ...]:
    """Return the centres of the clusters relative to the body's, in its semi-axes."""
    rng = np.random.default_rng([seed, Purpose.CLUSTERS])
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return tuple(directions * rng.uniform(0.2, 0.6, (n, 1)))

"""Simulated light-sheet volumes with known truth: nuclei of an embryo, and the microscope that images them.

Two independent parts. `embryo` draws what is there: instance labels and the photons that each voxel
emits. `forward` draws what a camera records of any such truth. Sizes are in voxels, intensities in
photons or camera counts, as named.

Everything a nucleus looks like (axes, texture) comes from a random stream of its own, keyed by the seed and
the nucleus, and a voxel claimed by two nuclei goes to the one in which it lies deeper. So a nucleus does not
depend on which others are drawn, or in which order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage, signal, spatial

from chunkrestore.psf.model import gaussian

FloatArray: TypeAlias = npt.NDArray[np.float32]
Range: TypeAlias = tuple[float, float]
Arrangement: TypeAlias = Literal["embryo", "tissue"]

VOXEL_SIZE = (0.4, 0.4, 0.4)
"""Voxel size (z, y, x) in micrometres: a radius of 5 to 9 voxels is a nucleus 4 to 7 micrometres across."""

_ATTEMPTS = 12.0
"""Centres tried per mean nucleus volume of space: few gaps remain that another nucleus would fit."""


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
    """Share of nuclei that are condensed: 0.8 times the radius, twice as bright."""

    def __post_init__(self) -> None:
        for name in ("radius", "elongation", "flattening", "photons"):
            low, high = getattr(self, name)
            if not (0 < low <= high < math.inf):
                raise ValueError(f"`{name}` must be a rising pair of positive numbers, got ({low}, {high})")
        if self.radius[0] < 1:
            raise ValueError(f"`radius` must be at least 1 voxel, got {self.radius}")
        if self.elongation[0] < 1:
            raise ValueError(f"`elongation` must be at least 1, got {self.elongation}")
        if self.spacing < 0.5:
            raise ValueError(
                f"`spacing` must be at least 0.5 (closer nuclei swallow each other), got {self.spacing}"
            )
        if self.texture < 0 or not 0 <= self.mitotic <= 1:
            raise ValueError(
                f"`texture` must not be negative and `mitotic` must lie in [0, 1], got {self.texture}, {self.mitotic}"
            )


@dataclass(frozen=True)
class Camera:
    """How photons become counts: ``Poisson(photons + background) * gain + offset + N(0, read_noise)``."""

    background: float = 2.0
    """Photons per voxel that reach the camera from everywhere alike (stray light, dark current)."""
    gain: float = 4.0
    """Counts per photon."""
    offset: float = 100.0
    """Counts without light."""
    read_noise: float = 4.0
    """Standard deviation of the read noise in counts."""

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"`gain` must be positive, got {self.gain}")
        for name in ("background", "offset", "read_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be finite and not negative, got {getattr(self, name)}")

    @property
    def pedestal(self) -> float:
        """Mean counts where the object emits nothing: the `background` to give to a deconvolution."""
        return self.gain * self.background + self.offset


@dataclass(frozen=True)
class SimulatedVolume:
    """A volume whose truth is known; every array is ``zyx``."""

    labels: npt.NDArray[np.int32]
    """Nucleus at each voxel: 1 to `n_nuclei` without gaps, 0 for none."""
    truth: FloatArray
    """Photons that each voxel emits; sharp, free of noise and without the camera's background."""
    image: npt.NDArray[np.uint16]
    """Counts recorded by `camera` through `psf`."""
    psf: FloatArray
    """Point spread function, odd shape, sum 1."""
    camera: Camera = field(default_factory=Camera)
    """The camera that recorded `image`."""
    voxel_size: tuple[float, float, float] = VOXEL_SIZE
    """Voxel size (z, y, x) in micrometres."""

    @property
    def n_nuclei(self) -> int:
        """Number of nuclei."""
        return int(self.labels.max(initial=0))

    @property
    def reference(self) -> FloatArray:
        """The truth in counts, pedestal included: what `image` would be without blur and noise."""
        return np.asarray(self.truth * self.camera.gain + self.camera.pedestal, dtype=np.float32)


def light_sheet_psf() -> FloatArray:
    """Return the point spread function of the simulated microscope (float32, 25x15x15, sum 1).

    A core of standard deviation (2.0, 1.1, 1.1) voxels and, holding 15 % of the light, a tail twice as
    wide: what remains of the sheet's side lobes and of scattering.
    """
    return gaussian((2.0, 1.1, 1.1), tail=0.15, tail_sigma=(4.0, 2.2, 2.2), truncate=3.0)


def embryo(
    shape: Sequence[int],
    *,
    seed: int,
    nuclei: Nuclei | None = None,
    camera: Camera | None = None,
    psf: FloatArray | None = None,
    arrangement: Arrangement = "embryo",
) -> SimulatedVolume:
    """Simulate the nuclei of an embryo and their low-light light-sheet image.

    Parameters
    ----------
    shape
        Voxels per axis (z, y, x), each at least 8.
    seed
        Seed, not negative. The same arguments give the same arrays.
    nuclei
        Sizes, shapes and brightness of the nuclei.
    camera
        Background, gain, offset and read noise of the camera.
    psf
        Point spread function; `light_sheet_psf` by default.
    arrangement
        ``"embryo"``: an ellipsoidal body that fills nine tenths of each axis, with a crowded shell of
        touching nuclei, crowded clusters and few nuclei elsewhere inside, none outside. ``"tissue"``:
        equally crowded everywhere.

    Returns
    -------
    SimulatedVolume
        Labels, truth, image and what made them.

    Raises
    ------
    ValueError
        If `shape` has not three axes of at least 8 voxels, the seed is negative, the arrangement is
        unknown, or the PSF cannot be used (see `forward`).

    Examples
    --------
    >>> volume = embryo((32, 48, 48), seed=1)
    >>> volume.image.dtype, volume.labels.shape, volume.n_nuclei > 5
    (dtype('uint16'), (32, 48, 48), True)
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"`shape` must be three lengths (z, y, x) of at least 8 voxels, got {shape}")
    _check_seed(seed)
    if arrangement not in ("embryo", "tissue"):
        raise ValueError(f"`arrangement` must be 'embryo' or 'tissue', got {arrangement!r}")
    nuclei, camera = nuclei or Nuclei(), camera or Camera()
    psf = light_sheet_psf() if psf is None else _checked_psf(psf)
    labels, truth = _paint(shape, nuclei, seed, _place(shape, nuclei, seed, arrangement))
    if arrangement == "embryo":
        truth = np.maximum(truth, _cytoplasm(shape, np.float32(0.08 * nuclei.photons[0])))
    image = forward(truth, psf, seed=seed, camera=camera)
    return SimulatedVolume(labels, truth, image, psf, camera)


def forward(
    truth: npt.ArrayLike, psf: FloatArray, *, seed: int, camera: Camera | None = None
) -> npt.NDArray[np.uint16]:
    r"""Record `truth` through a microscope.

    .. math:: i = \mathrm{gain} \cdot \mathrm{Poisson}(h * o + \mathrm{background})
              + \mathrm{offset} + N(0, \mathrm{read\_noise}^2)

    rounded to whole counts and clipped to 0 to 65535.

    Parameters
    ----------
    truth
        Photons :math:`o` that each voxel emits, 2-D or 3-D, finite, not negative. Beyond its border it is
        taken to be mirrored.
    psf
        Point spread function :math:`h`, of odd shape, centred. Used as it is: sum 1 keeps the photons.
    seed
        Seed of the noise, not negative.
    camera
        Background, gain, offset and read noise.

    Returns
    -------
    ndarray
        uint16, the shape of `truth`.

    Raises
    ------
    ValueError
        If `truth` or `psf` is negative or not finite, the PSF's dimension differs or a length is even, or
        the seed is negative.
    """
    _check_seed(seed)
    truth = np.asarray(truth, dtype=np.float32)
    psf = _checked_psf(psf)
    if truth.ndim != psf.ndim:
        raise ValueError(f"`psf` has {psf.ndim} axes but `truth` has {truth.ndim}")
    if not np.isfinite(truth).all() or truth.min(initial=0) < 0:
        raise ValueError("`truth` must be finite and not negative: it counts photons")
    camera = camera or Camera()
    # A stream of its own, so that the noise does not change with the number of draws made for the truth.
    rng = np.random.default_rng([seed, 2])
    photons = rng.poisson(blur(truth, psf) + np.float32(camera.background))
    counts = photons * camera.gain + camera.offset + rng.normal(0, camera.read_noise, truth.shape)
    return np.clip(np.rint(counts), 0, np.iinfo(np.uint16).max).astype(np.uint16)


def blur(truth: FloatArray, psf: FloatArray) -> FloatArray:
    """Convolve `truth` with `psf`, mirrored at the border; float32, same shape, not negative."""
    padded = np.pad(truth, [(n // 2, n // 2) for n in psf.shape], mode="symmetric")
    with fft.set_workers(-1):
        blurred = signal.fftconvolve(padded, psf.astype(np.float32), mode="valid")
    return np.asarray(np.maximum(blurred, 0), dtype=np.float32)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}")


def _checked_psf(psf: FloatArray) -> FloatArray:
    psf = np.asarray(psf, dtype=np.float32)
    if any(n % 2 == 0 for n in psf.shape):
        raise ValueError(f"`psf` must have odd lengths, so that it has a middle voxel; got {psf.shape}")
    if not np.isfinite(psf).all() or psf.min() < 0:
        raise ValueError("`psf` must be finite and not negative")
    return psf


@dataclass(frozen=True)
class _Placement:
    """Where the nuclei are: arrays with one row per nucleus."""

    keys: npt.NDArray[np.intp]
    """Position among the candidates; the key of the nucleus' random stream."""
    centres: npt.NDArray[np.float64]
    radii: npt.NDArray[np.float64]
    condensed: npt.NDArray[np.bool_]


def _place(shape: tuple[int, ...], nuclei: Nuclei, seed: int, arrangement: Arrangement) -> _Placement:
    """Place nuclei by random sequential packing: candidates in fixed order, each kept if it still fits."""
    rng = np.random.default_rng([seed, 1])
    mean_volume = 4 / 3 * math.pi * np.mean(nuclei.radius) ** 3 * np.mean(nuclei.flattening)
    n_candidates = max(1, round(_ATTEMPTS * math.prod(shape) / mean_volume))
    centres = rng.uniform(-0.5, np.array(shape) - 0.5, (n_candidates, 3))
    radii = rng.uniform(*nuclei.radius, n_candidates)
    wanted = rng.uniform(size=n_candidates)
    condensed = rng.uniform(size=n_candidates) < nuclei.mitotic
    radii[condensed] *= 0.8
    density = _embryo_density(centres, shape, nuclei, rng) if arrangement == "embryo" else 1.0
    keys = np.flatnonzero(wanted < density)
    keys = keys[_greedy_packing(centres[keys], radii[keys], nuclei)]
    return _Placement(keys, centres[keys], radii[keys], condensed[keys])


def _greedy_packing(
    centres: npt.NDArray[np.float64], radii: npt.NDArray[np.float64], nuclei: Nuclei
) -> npt.NDArray[np.bool_]:
    """Keep a candidate unless one kept before it is closer than `spacing` sums of radii."""
    # Flattened nuclei pack more tightly along z: distances are taken where the mean nucleus is round.
    scaled = centres / np.array([np.mean(nuclei.flattening), 1.0, 1.0])
    kept = np.zeros(len(scaled), dtype=np.bool_)
    if len(scaled) == 0:
        return kept
    neighbours = spatial.cKDTree(scaled).query_ball_point(scaled, 2 * nuclei.spacing * nuclei.radius[1])
    for i, around in enumerate(neighbours):
        earlier = np.asarray([j for j in around if j < i and kept[j]], dtype=np.intp)
        distance = np.linalg.norm(scaled[earlier] - scaled[i], axis=1)
        kept[i] = not (distance < nuclei.spacing * (radii[earlier] + radii[i])).any()
    return kept


def _body_depth(points: npt.NDArray[np.floating], shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    """Return about how many voxels `points` lie below the surface of the body; negative outside."""
    semi_axes = 0.45 * np.array(shape, dtype=points.dtype)
    centred = (points - (np.array(shape, dtype=points.dtype) - 1) / 2) / semi_axes
    return np.asarray((1 - np.linalg.norm(centred, axis=-1)) * semi_axes.min())


def _embryo_density(
    centres: npt.NDArray[np.float64], shape: tuple[int, ...], nuclei: Nuclei, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return the probability that a candidate at each centre is tried: shell, clusters, sparse yolk."""
    depth = _body_depth(centres, shape)
    shell = (depth > 0) & (depth < 1.6 * nuclei.radius[1])
    semi_axes = 0.45 * np.array(shape)
    directions = rng.normal(size=(5, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    clusters = (np.array(shape) - 1) / 2 + directions * rng.uniform(0.2, 0.6, (5, 1)) * semi_axes
    nearest = np.linalg.norm((centres[:, None] - clusters) / (0.3 * semi_axes), axis=-1).min(axis=1)
    density = np.where(shell | (nearest < 1), 1.0, 0.04)
    return np.where(depth > 0, density, 0.0)


def _paint(
    shape: tuple[int, ...], nuclei: Nuclei, seed: int, placement: _Placement
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Return labels and photons; a contested voxel goes to the nucleus in which it lies deeper."""
    labels = np.zeros(shape, dtype=np.int32)
    photons = np.zeros(shape, dtype=np.float32)
    level = np.full(shape, np.inf, dtype=np.float32)
    for row, key in enumerate(placement.keys):
        region, own_level, own_photons = _nucleus(
            shape,
            nuclei,
            np.random.default_rng([seed, 3, int(key)]),
            placement.centres[row],
            placement.radii[row],
            condensed=bool(placement.condensed[row]),
        )
        deeper = own_level < level[region]
        labels[region][deeper & (own_level < 1)] = row + 1
        photons[region][deeper] = own_photons[deeper]
        level[region][deeper] = own_level[deeper]
    # A nucleus may lose every voxel to its neighbours; ids stay gapless all the same.
    present = np.zeros(len(placement.keys) + 1, dtype=np.int32)
    present[np.unique(labels)] = 1
    present[0] = 0
    return (np.cumsum(present, dtype=np.int32) * present)[labels], photons


def _nucleus(
    shape: tuple[int, ...],
    nuclei: Nuclei,
    rng: np.random.Generator,
    centre: npt.NDArray[np.float64],
    radius: float,
    *,
    condensed: bool,
) -> tuple[tuple[slice, ...], FloatArray, FloatArray]:
    """Return a nucleus' region, its level function (below 1 inside) and the photons of its voxels."""
    stretch = rng.uniform(*nuclei.elongation) ** np.array([0.5, -0.5, rng.uniform(-0.5, 0.5)])
    axes = radius * stretch / stretch.prod() ** (1 / 3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    flattening = np.array([rng.uniform(*nuclei.flattening), 1.0, 1.0])
    waves, phases = rng.normal(0, 1.2, (2, 3)), rng.uniform(0, 2 * np.pi, 2)
    photons = rng.uniform(*nuclei.photons) * (2.0 if condensed else 1.0)
    # The texture is drawn on a box that does not depend on where the volume ends.
    extent = math.ceil(1.12 * axes.max()) + 1
    texture = ndimage.gaussian_filter(rng.normal(size=(2 * extent + 1,) * 3).astype(np.float32), 1.3)
    texture = 1 + nuclei.texture * texture / texture.std()

    origin = np.rint(centre).astype(int) - extent
    low, high = np.maximum(origin, 0), np.minimum(origin + 2 * extent + 1, shape)
    region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    inside_box = tuple(slice(a, b) for a, b in zip(low - origin, high - origin, strict=True))
    grid = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in region), indexing="ij"), axis=-1)
    unit = ((grid - centre) / flattening) @ (rotation / axes)
    # Two weak waves on the surface dent the ellipsoid by at most 10 %.
    dent = 1 + 0.05 * np.cos(unit @ waves.T + phases).sum(axis=-1)
    level = np.linalg.norm(unit, axis=-1) * dent
    # Part of a voxel at the surface lies inside; a thin bright rim (heterochromatin) lines the envelope.
    covered = np.clip((1 - level) * radius + 0.5, 0, 1)
    profile = covered * np.where(level > 0.8, 1.15, 1.0) * np.clip(texture[inside_box], 0.3, 2.5)
    return region, level.astype(np.float32), (photons * profile).astype(np.float32)


def _cytoplasm(shape: tuple[int, ...], photons: np.float32) -> FloatArray:
    """Return the faint glow of the body, fading over about two voxels at its surface."""
    axes = [
        (((np.arange(n, dtype=np.float32) - (n - 1) / 2) / (0.45 * n)) ** 2).astype(np.float32) for n in shape
    ]
    rho = np.sqrt(axes[0][:, None, None] + axes[1][:, None] + axes[2])
    depth = (1 - rho) * np.float32(0.45 * min(shape))
    return np.asarray(photons / (1 + np.exp(-np.clip(depth, -30, 30))), dtype=np.float32)

"""The microscope that images a phantom: attenuation, point spread function, and a camera that counts photons.

An image is computed on the cells of `chunkrestore.simulate.lattice`, each from the truth of the cell and of what
the point spread function reaches around it, by transforms whose lengths are fixed by the cell, and with random
numbers from streams of its own. So an image has the same bits however it is cut into regions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import fft

from chunkrestore.grid import BlockGrid, Halo, Slices, fast_length
from chunkrestore.psf.model import gaussian
from chunkrestore.psf.varying import PsfField
from chunkrestore.simulate.attenuation import Attenuation
from chunkrestore.simulate.lattice import CELL, Cell, assemble, cell_rng

if TYPE_CHECKING:
    import dask.array as da

FloatArray: TypeAlias = npt.NDArray[np.float32]
Image: TypeAlias = npt.NDArray[np.uint16]

_SHOT, _READ = 201, 202
"""Purposes of the streams of random numbers: their own, so that neither noise changes with the other's draws."""
_MOST_PHOTONS = 1e9
"""Of a voxel: sixteen bits are full long before, and random counts need numbers that 64 bits hold."""


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

    def reference(self, photons: FloatArray) -> FloatArray:
        """Return what an image would be without blur and noise: ``photons * gain + pedestal``, float32."""
        return photons * np.float32(self.gain) + np.float32(self.pedestal)

    def record(self, light: FloatArray, seed: int, cell: Cell) -> Image:
        """Return the counts of a cell that `light` (photons per voxel) falls on: whole numbers, 0 to 65535."""
        photons = cell_rng(seed, _SHOT, cell).poisson(light + np.float32(self.background))
        counts = photons * float(self.gain) + float(self.offset)
        if self.read_noise:
            noise = cell_rng(seed, _READ, cell).standard_normal(light.shape, dtype=np.float32)
            counts += noise * np.float32(self.read_noise)
        return np.clip(np.rint(counts, out=counts), 0, np.iinfo(np.uint16).max).astype(np.uint16)


@dataclass(frozen=True)
class CellHalo(Halo):
    """Reads the whole cells that a core meets, and `depth` around them."""

    def read_axis(self, start: int, stop: int, n: int, axis: int) -> tuple[int, int]:
        """Return the start and stop of what is read for a core from `start` to `stop` on an axis of length `n`."""
        depth = self.depth[axis]
        return max(start // CELL * CELL - depth, 0), min(-(-stop // CELL) * CELL + depth, n)


@dataclass(frozen=True, eq=False)
class Microscope:
    r"""What lies between a phantom and its image.

    .. math:: i = \mathrm{gain} \cdot \mathrm{Poisson}(H (T o) + \mathrm{background})
              + \mathrm{offset} + N(0, \mathrm{read\_noise}^2)

    rounded to whole counts and clipped to 0 to 65535, where :math:`o` are the photons that each voxel emits,
    :math:`T` the `attenuation` and :math:`H x = \sum_k h_k * (w_k x)` the blur: by one point spread function, or
    by several that are blended by position as `chunkrestore.psf.PsfField` says. Beyond the volume's border its
    mirror image goes on.
    """

    psf: FloatArray | PsfField = field(repr=False)
    """Point spread function, of odd shape, centred; used as it is: sum 1 keeps the photons. Or a field of them."""
    camera: Camera = field(default_factory=Camera)
    """Background, gain, offset and read noise."""
    attenuation: Attenuation | None = None
    """What light loses on its way; nothing by default."""

    def __post_init__(self) -> None:
        if not isinstance(self.psf, PsfField):
            object.__setattr__(self, "psf", checked_psf(self.psf))
        if self.attenuation is not None:
            self.attenuation.check(self.psf.ndim)

    @property
    def ndim(self) -> int:
        """Number of axes of the volumes that it images."""
        return self.psf.ndim

    @property
    def radius(self) -> tuple[int, ...]:
        """Voxels per axis that light is spread at most."""
        return tuple(n // 2 for n in self.psf.shape)

    @property
    def halo(self) -> CellHalo:
        """What must be known of the truth around a region that is imaged."""
        return CellHalo(self.radius)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the point spread function, or of all with their positions."""
        if isinstance(self.psf, PsfField):
            return self.psf.digest
        return hashlib.sha256(repr(self.psf.shape).encode() + self.psf.tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what decides the images, as JSON-compatible values; of the point spread function its digest."""
        return {
            "psf_shape": list(self.psf.shape),
            "psf_sha256": self.digest,
            "camera": asdict(self.camera),
            "attenuation": None if self.attenuation is None else self.attenuation.describe(),
        }

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return type(self).__name__, str(self.describe())

    def record(
        self, truth: FloatArray, known: Slices, region: Slices, shape: Sequence[int], seed: int
    ) -> Image:
        """Return the image of a region of a volume.

        Parameters
        ----------
        truth
            Photons that each voxel emits, float32, finite, not negative.
        known
            The region that `truth` covers: at least ``halo.read(region, shape)``.
        region
            What is imaged.
        shape
            Voxels of the volume per axis.
        seed
            Seed of the noise.

        Returns
        -------
        ndarray
            uint16, of the shape of `region`; the same bits as that part of the image of the whole volume.
        """
        blur = _Blur(self, truth, known, tuple(shape))
        return np.asarray(
            assemble(region, shape, lambda cell, own: self.camera.record(blur(own), seed, cell)), np.uint16
        )

    def light(self, truth: FloatArray, known: Slices, region: Slices, shape: Sequence[int]) -> FloatArray:
        """Return the photons that reach the camera, on average, without background; as `record`, but float32."""
        blur = _Blur(self, truth, known, tuple(shape))
        return np.asarray(assemble(region, shape, lambda _, own: blur(own)), np.float32)


def light_sheet_psf() -> FloatArray:
    """Return the point spread function of the simulated microscope (float32, 25x15x15, sum 1).

    A core of standard deviation (2.0, 1.1, 1.1) voxels and, holding 15 % of the light, a tail twice as
    wide: what remains of the sheet's side lobes and of scattering.
    """
    return gaussian((2.0, 1.1, 1.1), tail=0.15, tail_sigma=(4.0, 2.2, 2.2), truncate=3.0)


def forward(
    truth: Any,
    psf: FloatArray | PsfField,
    *,
    seed: int,
    camera: Camera | None = None,
    attenuation: Attenuation | None = None,
) -> Any:
    """Record `truth` through a microscope, as `Microscope` says.

    Parameters
    ----------
    truth
        Photons that each voxel emits, 2-D or 3-D, finite, not negative; an array, or a dask array of any chunking.
    psf
        Point spread function, of odd shape, centred; used as it is: sum 1 keeps the photons. Or a
        `chunkrestore.psf.PsfField`.
    seed
        Seed of the noise, not negative.
    camera
        Background, gain, offset and read noise.
    attenuation
        What light loses on its way; nothing by default.

    Returns
    -------
    ndarray or dask array
        uint16, the shape of `truth`; of a dask array a lazy one with its chunks, which has the same bits. Chunks
        that are whole cells of 64 voxels are computed without waste.

    Raises
    ------
    ValueError
        If `truth` or `psf` is negative or not finite, the PSF's dimension differs or a length is even, or
        the seed is negative. Values of a dask array are checked when they are computed.
    """
    check_seed(seed)
    microscope = Microscope(psf, camera or Camera(), attenuation)
    if _is_lazy(truth):
        _check_ndim(microscope, truth.ndim)
        return _lazily(microscope, truth, seed)
    truth = np.asarray(truth, dtype=np.float32)
    _check_ndim(microscope, truth.ndim)
    _check_photons(truth)
    everything = tuple(slice(0, n) for n in truth.shape)
    return microscope.record(truth, everything, everything, truth.shape, seed)


def blur(truth: FloatArray, psf: FloatArray | PsfField) -> FloatArray:
    """Convolve `truth` with `psf`, mirrored at the border; float32, same shape, not negative."""
    truth, microscope = np.asarray(truth, np.float32), Microscope(psf)
    _check_ndim(microscope, truth.ndim)
    everything = tuple(slice(0, n) for n in truth.shape)
    return microscope.light(truth, everything, everything, truth.shape)


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` can seed a stream of random numbers."""
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}")


def checked_psf(psf: npt.ArrayLike) -> FloatArray:
    """Return `psf` as float32; raise ValueError if it cannot be one."""
    array = np.asarray(psf, dtype=np.float32)
    if array.ndim not in (2, 3):
        raise ValueError(f"`psf` must have 2 or 3 dimensions (yx or zyx), got shape {array.shape}")
    if any(n % 2 == 0 for n in array.shape):
        raise ValueError(f"`psf` must have odd lengths, so that it has a middle voxel; got {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError("`psf` must be finite and not negative")
    return array


class _Blur:
    """H T of the truth of a part of a volume, one cell at a time; transfer functions are kept between cells."""

    def __init__(
        self, microscope: Microscope, truth: FloatArray, known: Slices, shape: tuple[int, ...]
    ) -> None:
        self._microscope, self._truth, self._known, self._shape = microscope, truth, known, shape
        self._otfs: dict[tuple[int, ...], npt.NDArray[np.complex64]] = {}

    def __call__(self, cell: Slices) -> FloatArray:
        """Return the photons of a cell that reach the camera, float32, not negative."""
        radius, spread = self._microscope.radius, [c.stop - c.start for c in cell]
        reach = [range(c.start - r, c.stop + r) for c, r in zip(cell, radius, strict=True)]
        around = self._emission(reach)
        if not around.any():
            return np.zeros(spread, np.float32)
        lattice = tuple(fast_length(len(r)) for r in reach)
        total: Any = 0
        for k, part in self._weighted(around, reach):
            total = total + fft.rfftn(part, lattice, workers=1) * self._otf(k, lattice)
        # Light of a voxel lies between it and twice the radius after it: nothing of the cell has wrapped around.
        found = fft.irfftn(total, lattice, workers=1, overwrite_x=True)
        own = found[tuple(slice(2 * r, 2 * r + n) for r, n in zip(radius, spread, strict=True))]
        return np.maximum(own, np.float32(0))

    def _emission(self, reach: Sequence[range]) -> FloatArray:
        """Return the light that leaves a region in the direction of the objective, which may be a mirrored one."""
        inside = [_mirrored(r, n) for r, n in zip(reach, self._shape, strict=True)]
        part = self._truth
        for axis, (index, known) in enumerate(zip(inside, self._known, strict=True)):
            local = index - known.start
            is_run = local[-1] - local[0] == len(local) - 1
            chosen = part[(slice(None),) * axis + (slice(local[0], local[-1] + 1),)] if is_run else None
            part = part.take(local, axis) if chosen is None else chosen
        _check_photons(part)
        attenuation = self._microscope.attenuation
        if attenuation is None:
            return part
        return part * attenuation.transmission(np.ix_(*(i.astype(np.float64) for i in inside)), self._shape)

    def _weighted(self, around: FloatArray, reach: Sequence[range]) -> Iterator[tuple[int, FloatArray]]:
        """Yield the shares of the point spread functions in a region, each with its number."""
        psf = self._microscope.psf
        if not isinstance(psf, PsfField):
            yield 0, around
            return
        origin = [r.start for r in reach]
        for k, factors in psf.weights(origin, around.shape, around.shape).items():
            share = around
            for factor in factors:
                share = share * factor
            yield k, share

    def _otf(self, k: int, lattice: tuple[int, ...]) -> npt.NDArray[np.complex64]:
        key = (k, *lattice)
        if key not in self._otfs:
            psf = self._microscope.psf
            self._otfs[key] = fft.rfftn(psf.psfs[k] if isinstance(psf, PsfField) else psf, lattice, workers=1)
        return self._otfs[key]


def _mirrored(reach: range, n: int) -> npt.NDArray[np.intp]:
    """Return the voxels of an axis of length `n` that lie at positions inside and outside of it."""
    index = np.arange(reach.start, reach.stop) % (2 * n)
    return np.where(index < n, index, 2 * n - 1 - index)


def _check_photons(truth: FloatArray) -> None:
    if not (truth.min(initial=0) >= 0 and truth.max(initial=0) <= _MOST_PHOTONS):
        raise ValueError(
            f"`truth` must be finite, not negative and at most {_MOST_PHOTONS:g}: it counts photons"
        )


def _check_ndim(microscope: Microscope, ndim: int) -> None:
    if microscope.ndim != ndim:
        raise ValueError(f"`psf` has {microscope.ndim} axes but `truth` has {ndim}")


def _is_lazy(array: Any) -> bool:
    from dask.base import is_dask_collection

    return bool(is_dask_collection(array))


def _lazily(microscope: Microscope, truth: da.Array, seed: int) -> da.Array:
    """Return the lazy image of a dask array, chunk by chunk."""
    from chunkrestore.gathering import map_blocks

    if any(math.isnan(n) for n in truth.shape):
        raise ValueError("`truth` has unknown chunk sizes; call `compute_chunk_sizes()` on it first")
    grid = BlockGrid.from_chunks(truth.chunks, microscope.halo)
    return map_blocks(_record_block, grid, truth, microscope, seed, name="forward", dtype=np.uint16)


def _record_block(block: Any, truth: Any, microscope: Microscope, seed: int) -> Image:
    known = np.asarray(truth, np.float32)
    return microscope.record(known, block.read, block.core, block.volume_shape, seed)

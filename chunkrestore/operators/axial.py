"""CARE networks that make planes between those of a volume, block by block as if in one piece.

CSBDeep has two: `UpsamplingCARE` interpolates planes and restores the volume with a network in three dimensions;
`IsotropicCARE` interpolates planes and restores sections along z with a network in two dimensions, which was trained on
planes that were made to look like sections. Both are stored as any CARE model is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from chunkrestore.backend import asarray_like
from chunkrestore.grid import Block, Slices
from chunkrestore.kernels.network import NetworkGeometry, care_geometry, network_nbytes, run_batch
from chunkrestore.kernels.resample import checked_resampling, steps
from chunkrestore.operators.base import Array, check_image
from chunkrestore.operators.care import Care
from chunkrestore.operators.sampling import Sampling, checked_factor
from chunkrestore.statistics import of_array

_BATCH_PIXELS = 2**18
"""Pixels of sections that the network takes at once, or one section that is larger: enough to keep it busy."""


@dataclass(frozen=True)
class UpsamplingCare(Care):
    """Interpolate planes and restore the result with a CARE network in three dimensions.

    ``result = Care(model)(zoom(image, (factor, 1, 1)))``, with SciPy's linear interpolation in the dtype of the image
    and percentiles of the interpolated volume: what CSBDeep's ``UpsamplingCARE.predict`` returns for the whole volume,
    to float rounding, for every block grid.

    Preserves: y and x, intensities in input units. The result has ``round(n * factor)`` planes and is float32;
    `chunkrestore.run` records where they lie.

    Parameters
    ----------
    model, normalization, percentiles, depth, digest, precision, output
        As for `chunkrestore.operators.care.Care`, of a model with axes ZYX; objects may be of class UpsamplingCARE.
    factor
        Planes of the result per plane of the image, at least 1: the subsampling that the model was trained with.

    Raises
    ------
    ValueError
        As for `Care`, or if the factor is below 1.

    References
    ----------
    Weigert et al., Nat. Methods 15:1090 (2018).
    """

    _: KW_ONLY
    factor: float

    name = "upsampling-care"

    _classes: ClassVar[tuple[str, ...]] = ("UpsamplingCARE",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", checked_factor(self.factor))
        super().__post_init__()

    @property
    def sampling(self) -> Sampling:
        """What the operator sees: the volume with more planes, in its own dtype."""
        return Sampling(self.factor)

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype`, resampled or not, cannot be processed."""
        if len(shape) != 3:
            raise ValueError(f"{self.name} takes volumes (z, y, x), but the image has shape {tuple(shape)}")
        super().check(shape, dtype)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {**super().describe(), "factor": self.factor}

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Restore one block of the resampled volume, or a whole volume that is not resampled yet.

        Parameters
        ----------
        image
            Array that covers ``block.read`` of the volume resampled as `sampling` says. Without `block`, the whole
            volume as it was recorded.
        block
            Where it lies on the resampled lattice.

        Returns
        -------
        array
            float32, in input intensities, valid on the block's core; or the whole volume, with
            ``round(n * factor)`` planes.

        Raises
        ------
        ValueError, NonFiniteError
            As for `Care`.
        """
        if block is not None:
            return super().__call__(image, block)
        self.check(image.shape, image.dtype)
        seen = self.sampling.of_array(image)
        measured = image if self.sampling.measures_original else seen
        ready = self.resolve(of_array(measured, self.needs)) if self.needs else self
        return asarray_like(ready(seen, Block.whole(seen.shape)), image)


@dataclass(frozen=True)
class IsotropicCare(UpsamplingCare):
    """Make a volume isotropic with a CARE network in two dimensions.

    Planes are interpolated, the network restores all sections yz and all sections xz of the result, and both are
    combined. With u and v the two restored volumes, in normalised intensities::

        mean  =  sqrt(max(u, 0) * max(v, 0))        scale  =  max(scale_u, scale_v)

    This is what CSBDeep's ``IsotropicCARE.predict`` returns for the whole volume, for every block grid. It is to float
    rounding where both are above 0; a voxel where one is 0 to rounding, e, and the other v, can differ by
    ``sqrt(e * v)``, because a root is steep there.

    Preserves: y and x, intensities in input units. The result has ``round(n * factor)`` planes and is float32;
    `chunkrestore.run` records where they lie.

    Parameters
    ----------
    model, normalization, percentiles, depth, digest, precision, output
        As for `chunkrestore.operators.care.Care`, of a model with axes YX; objects may be of class IsotropicCARE.
        Percentiles are of the volume before planes are interpolated, and `depth` has three numbers.
    factor
        Planes of the result per plane of the image, at least 1: the subsampling that the model was trained with,
        the ratio of the voxel's lengths along z and y.

    Raises
    ------
    ValueError
        As for `Care`, or if the factor is below 1.

    Notes
    -----
    CSBDeep interpolates normalised intensities and this operator normalises interpolated ones, which differs by the
    rounding of a float32 intensity: of a range of 1000 at intensities of 10000, by 1e-6 of the range.

    References
    ----------
    Weigert et al., MICCAI 2017, 126; Weigert et al., Nat. Methods 15:1090 (2018).
    """

    name = "isotropic-care"

    _classes: ClassVar[tuple[str, ...]] = ("IsotropicCARE",)

    @property
    def sampling(self) -> Sampling:
        """What the operator sees: the volume with more planes, not rounded, and percentiles of it as it was."""
        return Sampling(self.factor, "float32", measures_original=True)

    @property
    def _geometry(self) -> NetworkGeometry:
        plane = care_geometry(self._config)
        return NetworkGeometry(plane.depth[:1] + plane.depth, plane.align[:1] + plane.align)

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype`, resampled or not, cannot be processed."""
        config: SimpleNamespace = self._config
        if config.axes.replace("C", "") != "YX":
            raise ValueError(
                f"`model` {self.model} has axes {config.axes}; isotropic restoration takes a model of sections, "
                "with axes YX"
            )
        check_image(shape, dtype, ndim=(3,))
        self._check_channels(config)

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """The network's feature maps for some sections, and five float32 per voxel."""
        z, y, x = (n + sum(p) for n, p in zip(read_shape, self._padding(read_shape), strict=True))
        n_pixels = max(_BATCH_PIXELS, z * max(y, x))
        return network_nbytes(self._config, (min(n_pixels, z * y * x),)) + 4 * 5 * z * y * x

    def _normalized(self, image: Array, block: Block) -> np.ndarray:
        normalized = super()._normalized(image, block)
        if block.at_border[0][1] and _ends_dark(self.factor, block.volume_shape[0]):
            normalized[-1] = 0
        return normalized

    def _predicted(self, padded: np.ndarray, core: Slices) -> np.ndarray:
        """Return what both networks make of a padded and normalised block; computed on `core` alone."""
        z, y, x = core
        # Axes as CSBDeep turns them: sections (y, reversed z) along x, sections (x, z) along y.
        along_x = padded[::-1, :, x].transpose(2, 1, 0)
        along_y = padded[:, y, :].transpose(1, 2, 0)
        n = len(padded)
        u = self._sections(along_x, (y, slice(n - z.stop, n - z.start)))[:, :, ::-1].transpose(2, 1, 0)
        v = self._sections(along_y, (x, z)).transpose(2, 0, 1)
        result = np.zeros(padded.shape, np.float32)
        if self.output == "scale":
            result[core] = np.maximum(u, v)
        else:
            result[core] = np.sqrt(np.maximum(u, 0) * np.maximum(v, 0))
        return result

    def _sections(self, sections: np.ndarray, inner: Slices) -> np.ndarray:
        """Return what the network makes of sections along the first axis, cut to `inner`."""
        parts = [
            run_batch(self._network(), np.ascontiguousarray(some)[..., np.newaxis], precision=self.precision)[
                0
            ]
            for some in _batches(sections)
        ]
        rows, columns = inner
        return np.concatenate([part[:, rows, columns, int(self.output == "scale")] for part in parts])


def care_of(
    model: Any, *, upsample: float | None = None, isotropic: float | None = None, **parameters: Any
) -> Care:
    """Return the operator that a model and at most one factor stand for.

    Parameters
    ----------
    model
        As for `Care`.
    upsample, isotropic
        Factor of `UpsamplingCare` or `IsotropicCare`; with neither, `Care`.
    **parameters
        Other parameters of `Care`.

    Raises
    ------
    ValueError
        If both factors are given, or as for the operators.
    """
    if upsample is not None and isotropic is not None:
        raise ValueError(
            f"`upsample` {upsample} and `isotropic` {isotropic} exclude each other; give one of them"
        )
    if isotropic is not None:
        return IsotropicCare(model, factor=isotropic, **parameters)
    return (
        Care(model, **parameters)
        if upsample is None
        else UpsamplingCare(model, factor=upsample, **parameters)
    )


def _batches(sections: np.ndarray) -> Iterator[np.ndarray]:
    n = max(1, _BATCH_PIXELS // math.prod(sections.shape[1:]))
    for start in range(0, len(sections), n):
        yield sections[start : start + n]


def _ends_dark(factor: float, n_planes: int) -> bool:
    """Return whether SciPy takes the last of `n_planes` interpolated planes for one beyond the volume.

    Rounding can put it there, for one in 25 lengths; its voxels are then 0, of normalised intensities here.
    """
    near = round(n_planes / factor)
    n = next(n for n in (near, near - 1, near + 1) if round(n * factor) == n_planes)
    (step,) = steps(checked_resampling((n,), factor))
    return (n_planes - 1) * step > n - 1

"""Inverse filters as an operator: the deconvolution that takes one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from chunkrestore.grid import Block
from chunkrestore.kernels.blur import Blur
from chunkrestore.kernels.wiener import (
    PRIORS,
    inverse_filter,
    inverse_filtered,
    inverse_reach,
    mirrored_lattice,
)
from chunkrestore.operators.base import Array, Statistic, numbers_of
from chunkrestore.operators.deconvolution import (
    ELEMENTWISE_NBYTES,
    LAST_BLUR,
    Deconvolution,
    check_brightness,
    dtype_of,
    number,
    place_of,
    voxel_sides,
)
from chunkrestore.operators.pilot import Read, pilot_regions
from chunkrestore.operators.signal_to_noise import signal_to_noise
from chunkrestore.psf.varying import PsfField
from chunkrestore.statistics import of_array

LEAST, LARGEST = 1e-6, 10.0
"""Limits of `regularization`: below, float32 amplifies its own rounding; above, nothing is sharpened."""
LEAST_SNR, LARGEST_SNR = 1.0, 100.0
"""A measured signal-to-noise ratio counts as at least and at most this."""
_MOST_MIRRORED = 128
# Voxels of mirror image beyond a border; thousands of them would be memory without a use.
_PLANNED_SNR = (LEAST_SNR, 10.0, LARGEST_SNR)


@dataclass(frozen=True, eq=False)
class Wiener(Deconvolution):
    r"""Deconvolve with a known point spread function by one multiplication in Fourier space.

    .. math:: X = \frac{H^*}{|H|^2 + \alpha |L|^2} \, (Y - b)

    scaled to keep the mean. The fast preview: two transforms, where an iterative operator takes four per
    iteration. The result is float32, in input intensities above `background`. Preserves shape, position,
    constants and total light. Being linear it does not know that light is not negative: next to bright
    objects and where there is only noise it goes below 0.

    Parameters
    ----------
    psf
        Point spread function, as for `chunkrestore.operators.richardson_lucy.RichardsonLucy`; one for the
        whole volume.
    regularization
        Alpha, 1e-6 to 10: the larger, the smoother. None: from the signal-to-noise ratio that is measured once
        per volume on pilot regions.
    prior
        ``"constant"``: L = 1, the filter of Wiener for noise and signal whose powers have the ratio alpha at
        every frequency. ``"laplacian"``: L is the Laplacian, the constrained least squares filter; slow
        changes of intensity are left alone, and the finest noise is suppressed most. It needs a deeper halo.
    voxel_size
        ``(z, y, x)`` in micrometres, for the Laplacian; equal sides by default.
    non_negative
        Whether negative results become 0. Off by default: it keeps what is unbiased, total light included.
    background
        Intensity that a voxel without any light has (camera offset); subtracted. At least 0.
    depth
        Halo in voxels, one number or one per axis; None: from the filter and `tolerance`.
    tolerance
        Wanted seam error: root mean square difference from the untiled result where cores meet, relative to
        the dynamic range of the result. Rounding of float32 leaves about 1e-6.
    decision
        What the pilots decided; not for users.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of range, or the point spread function cannot be used or varies with position.

    Notes
    -----
    Regularization. With the peak signal-to-noise ratio r as `signal_to_noise` measures it, limited to
    1 to 100, alpha is 0.4 / r (constant) or 1 / r^2 (Laplacian). Measured on nuclei and filaments of 10, 100
    and 1000 photons with three point spread functions: this is within 1 dB of the best alpha's PSNR, in most
    cases within 0.2 dB. The constant ratio goes with 1 / r and not 1 / r^2, because the more photons there
    are, the finer, and the weaker, is the structure that alpha decides about. Isolated beads, all of whose
    energy is fine structure, want a quarter of it or less.

    Depth. `chunkrestore.kernels.wiener.inverse_reach` computes it from the filter's kernel, 7 to 17 standard
    deviations of a Gaussian at 1e-3, deeper for a small alpha and for the Laplacian. At that depth the seam was
    below `tolerance` in all of 996 cases, at most 0.72 and in the median 0.04 of it: alpha 1e-4 to 0.13,
    both priors, tolerances 1e-2 to 1e-4, two axes, nuclei, beads and filaments of 10 and 1000 photons, and
    four point spread functions (Gaussians with and without skirt, one lopsided, one random). Until alpha is
    decided, the deepest of those for signal-to-noise ratios of 1, 10 and 100 counts, so that blocks planned
    before the measurement are deep enough; it stays when alpha is known.

    Border. Beyond the volume's border lies its mirror image, as far as the kernel reaches, but not further than
    128 voxels or twice the point spread function: a filter that rings further (transfer functions with zeros
    and a small alpha) needs blocks that are larger than its depth in any case.

    Memory. The padded block in float32, its half spectrum and the filter: 12 bytes per voxel of the lattice,
    which is the read region plus the reach at both ends that are the volume's border. CuPy adds cuFFT's work
    area.

    References
    ----------
    .. [1] Wiener, N. (1949). Extrapolation, Interpolation, and Smoothing of Stationary Time Series. MIT Press.
    .. [2] Hunt, B. R. (1973). The application of constrained least squares estimation to image restoration by
       digital computer. IEEE Trans. Comput. C-22, 805-812.
    .. [3] Gonzalez, R. C. and Woods, R. E., Digital Image Processing, chapter on image restoration: "Minimum
       mean square error (Wiener) filtering" and "Constrained least squares filtering".

    Examples
    --------
    >>> from chunkrestore.psf import gaussian
    >>> Wiener(gaussian((2.0, 1.0, 1.0)), regularization=0.01).halo((512, 512, 512)).depth
    (21, 10, 10)
    """

    _: KW_ONLY
    regularization: float | None = None
    prior: str = "constant"
    voxel_size: Sequence[float] | None = None
    non_negative: bool = False
    decision: Mapping[str, Any] | None = field(default=None, repr=False)

    name = "wiener"

    def __post_init__(self) -> None:
        if isinstance(self.psf, PsfField):
            raise ValueError(
                "`psf` varies with position, which one multiplication in Fourier space cannot undo; take "
                "`RichardsonLucy`, or the point spread function of one position"
            )
        super().__post_init__()
        if self.prior not in PRIORS:
            raise ValueError(f'`prior` must be "constant" or "laplacian", got {self.prior!r}')
        if not isinstance(self.non_negative, bool):
            raise TypeError(f"`non_negative` must be True or False, got {self.non_negative!r}")
        if self.regularization is not None:
            self._set("regularization", number("regularization", self.regularization))
            if not LEAST <= self.regularization <= LARGEST:
                raise ValueError(
                    f"`regularization` must lie between {LEAST:g} and {LARGEST:g}, got {self.regularization:g}; "
                    "0.01 is a good begin, None measures"
                )
        if self.voxel_size is not None:
            self._set("voxel_size", voxel_sides(self.voxel_size, self.psf.ndim))

    @property
    def needs(self) -> frozenset[Statistic]:
        """Pilots until `regularization` is known."""
        level = {"maximum"} if self.background else set()
        return frozenset({"pilot"} | level if self.regularization is None else ())

    def resolve(self, statistics: Mapping[Statistic, Any]) -> Self:
        """Return this operator with `regularization` decided.

        Raises
        ------
        ValueError
            If nothing is brighter than the background.
        """
        if self.regularization is not None:
            return self
        check_brightness(statistics, self.background)
        decision = statistics["pilot"]
        # The depth stays the one that the blocks were planned with.
        return replace(
            self,
            regularization=decision["regularization"],
            depth=self.depth if self.depth is not None else self._default_depth,
            decision=decision,
        )

    def pilot(self, statistics: Mapping[Statistic, Any], read: Read, shape: Sequence[int]) -> dict[str, Any]:
        """Return the regularization for a volume, and the signal-to-noise ratio that it follows from.

        Parameters
        ----------
        statistics
            Not used.
        read
            Returns the voxels of a region.
        shape
            Of the volume.

        Returns
        -------
        dict
            JSON-compatible; ``"signal_to_noise"`` is None where there is no noise.
        """
        regions = pilot_regions(read, shape)
        ratio = signal_to_noise([read(region) for region in regions], background=self.background)
        return {
            "signal_to_noise": float(f"{ratio:.4g}") if math.isfinite(ratio) else None,
            "regularization": float(f"{regularization_for(ratio, self.prior):.4g}"),
            "regions": [[[s.start, s.stop] for s in region] for region in regions],
        }

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of a call, as if the block touched the volume's border on every axis."""
        lattice = mirrored_lattice(read_shape, self.psf.shape, self._reach, ((True, True),) * len(read_shape))
        spectrum, otf = self._spectrum_nbytes(lattice)
        return 4 * math.prod(lattice) + spectrum + otf + ELEMENTWISE_NBYTES

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Deconvolve one block, or the whole volume.

        Parameters
        ----------
        image
            Array of any array-API namespace that covers ``block.read``; uint8, uint16, int16 or float32.
            Not modified.
        block
            Where it lies; None: `image` is the whole volume, and what depends on the data is decided on it.

        Returns
        -------
        array
            float32, same shape and namespace; valid on the block's core.

        Raises
        ------
        ValueError
            If `image` is not what the block reads, or `regularization` is not decided.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        if block is None:
            self.check(image.shape, dtype_of(image))
            numbers = numbers_of(
                self, lambda needs: of_array(image, needs), lambda region: image[region], image.shape
            )
            return self.resolve(numbers)(image, Block.whole(image.shape))
        if self.needs:
            raise ValueError(
                "`regularization` is not decided; call `resolve` with the pilot, or give a number"
            )
        self._checked(image, block)
        lattice = mirrored_lattice(image.shape, self.psf.shape, self._reach, block.at_border)
        return inverse_filtered(
            image,
            self._inverse(image, lattice),
            before=[reach * first for reach, (first, _) in zip(self._reach, block.at_border, strict=True)],
            background=self.background,
            non_negative=self.non_negative,
        )

    def _inverse(self, image: Array, lattice: tuple[int, ...]) -> Blur:
        key = ("wiener", self._digest, *self._options.values(), lattice, *place_of(image))
        blur: Blur = LAST_BLUR.get(
            key, lambda: inverse_filter(self._only_psf, lattice, image, **self._options)
        )
        return blur

    @property
    def _only_psf(self) -> np.ndarray:
        assert not isinstance(self.psf, PsfField)
        return self.psf

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "regularization": self.regularization,
            "prior": self.prior,
            "voxel_size": None if self.voxel_size is None else tuple(self.voxel_size),
        }

    @cached_property
    def _reach(self) -> tuple[int, ...]:
        """How far the mirror image beyond the border goes: at least as far as is felt, whatever the halo."""
        depth = self.halo(()).depth
        return tuple(
            min(max(d, reach), max(2 * p, _MOST_MIRRORED)) if p > 1 else 0
            for d, reach, p in zip(depth, self._default_depth, self.psf.shape, strict=True)
        )

    def _parameters(self) -> Mapping[str, Any]:
        return {
            "regularization": self.regularization,
            "prior": self.prior,
            "voxel_size": None if self.voxel_size is None else list(self.voxel_size),
            "non_negative": self.non_negative,
            "decision": None if self.decision is None else dict(self.decision),
        }

    def _derived_depth(self, psf: np.ndarray) -> tuple[int, ...]:
        if self.regularization is not None:
            return inverse_reach(psf, self.tolerance, **self._options)
        reaches = [
            inverse_reach(psf, self.tolerance, **self._options | {"regularization": alpha})
            for alpha in (regularization_for(ratio, self.prior) for ratio in _PLANNED_SNR)
        ]
        return tuple(map(max, *reaches))


def regularization_for(signal_to_noise: float, prior: str) -> float:
    """Return alpha for a measured peak signal-to-noise ratio; `Wiener` says how good it is."""
    ratio = min(max(signal_to_noise, LEAST_SNR), LARGEST_SNR)
    return 0.4 / ratio if prior == "constant" else 1 / ratio**2

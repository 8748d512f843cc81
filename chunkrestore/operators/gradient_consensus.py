"""Gradient consensus as an operator: parameters, halo, memory, and one block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.backend import Array
from chunkrestore.kernels.blur import AnyBlur
from chunkrestore.kernels.gradient_consensus import consensus_estimates
from chunkrestore.kernels.photon_splitting import split_photons
from chunkrestore.operators.deconvolution import ELEMENTWISE_NBYTES, core_depth, whole_number
from chunkrestore.operators.iterative import IterativeDeconvolution
from chunkrestore.operators.richardson_lucy import ACCELERATIONS
from chunkrestore.psf.varying import PsfField

_LARGEST_SEED = 2**63


@dataclass(frozen=True, eq=False)
class GradientConsensus(IterativeDeconvolution):
    r"""Deconvolve by Richardson-Lucy steps that are taken only where two halves of the photons agree.

    .. math:: x \leftarrow x \left(1 + a \left(H^T[y / (H x + b)] / H^T 1 - 1\right)\right)

    The photons of the image are split into two independent halves, whose steps differ by noise alone; the
    agreement a, between 0 and 1, is 1 where both point the same way more clearly than noise does
    (`chunkrestore.kernels.gradient_consensus` holds the details). Structure is sharpened and noise is left
    alone, without a parameter for how much of either. Preserves shape, position, constants, and total light
    as Richardson-Lucy does. The result is float32, not negative, in input intensities above `background`.

    Parameters
    ----------
    psf, background, depth, tolerance, start, saturation, missing, mask, decision
        As for `chunkrestore.operators.richardson_lucy.RichardsonLucy`.
    iterations
        The most that are done, or how many with ``stop=None``.
    stop
        ``"i-divergence"`` (default): pilot regions of the volume decide once after how many iterations another
        one improves the fit by less than half a percent. ``"split-data"``: where half of the photons are
        predicted best from the other half. None: `iterations` as given.
    acceleration
        ``"heavy-ball"``: momentum with fixed factors, two to three times fewer iterations. None: plain
        iterations, with half of the halo.
    gain
        Intensity per detected photon: camera counts per photon, from the camera's data sheet or from the slope
        of variance against mean. What happens with a wrong one is below.
    offset
        Intensity of a voxel that no light reaches at all (the camera's offset); None: `background`, as if
        it were all offset. Stray light is photons too: without `offset` its noise is the same in both halves and
        is taken for structure. With read noise, subtract its variance divided by `gain`.
    seed
        Whole number: another one splits the photons otherwise.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of range or the point spread function cannot be used.

    Notes
    -----
    Stopping. PSNR in dB on simulated nuclei (brightest voxels of 2 to 5000 photons) where
    ``"i-divergence"`` stopped, the best of 50 iterations, and the last, beside accelerated Richardson-Lucy:

    =======  =============  ==========  =====  =============  ==========
    photons  stopped        best        50th   RL best        its 50th
    =======  =============  ==========  =====  =============  ==========
    2        26.4 (4)       26.5 (3)    21.4   26.5 (2)       10.3
    10       27.7 (5)       27.7 (4)    26.8   27.8 (4)       15.2
    100      28.5 (8)       28.5 (9)    28.4   28.8 (10)      23.7
    1000     29.2 (16)      29.2 (18)   29.1   29.4 (24)      28.7
    5000     29.5 (24)      29.5 (29)   29.5   30.1 (50)      30.1
    =======  =============  ==========  =====  =============  ==========

    Caution costs bright images 0.2 to 0.6 dB against Richardson-Lucy that is stopped at its best. The
    published rules came too late or never: the divergence of a half rose within 80 iterations only up to 5
    photons, when PSNR had fallen by 4 to 6 dB; less than 1 % of voxels moved only from 20 photons on.

    A wrong `gain`, for nuclei of 4 to 14 photons recorded with 4 counts per photon and stray light: PSNR after
    50 iterations 24.1 dB with the right gain and offset, 23.9 with gain 4 and no offset, 22.5 with gain 1 (the
    halves share noise, which is taken for structure), 24.3 with gain 16 (halves noisier than
    they need be: more cautious). Where the default rule stopped, all four were within 0.08 dB of the best (24.4).

    Depth. In standard deviations of the core of the point spread function (FWHM / 2.355), the depth from
    which on both planes next to a cut were below a seam error, relative to the central 99.8 % of the result's
    values: the worst of four anisotropic 3-D point spread functions (two Gaussian, two with a skirt), one axis
    and four scenes each (60 and 1000 photons, stray light, beads), at faces inside the volume:

    ==============  ====  ====  ====  ====
    iterations         5    10    20    50
    ==============  ====  ====  ====  ====
    plain, 1e-2      < 3   < 3   < 3     3
    plain, 1e-3        4     4     5     8
    plain, 1e-4        6     8    10    12
    heavy, 1e-2      < 3     3     4     5
    heavy, 1e-3        8    10    12    12
    heavy, 1e-4       14  > 14  > 14  > 14
    ==============  ====  ====  ====  ====

    Single voxels, whose halves agree a little more or less, differ by up to 0.01 of the dynamic range at the
    default depth. The default is `_sigmas` below, at least 1.5 times the radius that holds 99.9 % of the light
    and at most ``4 * iterations * radius``, beyond which tiled and untiled are equal but for rounding. With
    acceleration it does not grow beyond 18 iterations, as most voxels rest by then.

    Memory. Estimate, momentum, weights, one half of the photons, two gradients (float32) and two half
    spectra: 32 bytes per voxel of the lattice, 28 without acceleration. Time: 8 transforms per iteration, twice
    those of Richardson-Lucy.

    References
    ----------
    .. [1] Manton, J. D. and York, A. G. (2023). Gradient consensus for Richardson-Lucy deconvolution.
       doi:10.5281/zenodo.10278919

    Examples
    --------
    >>> from chunkrestore.psf import gaussian
    >>> sorted(GradientConsensus(gaussian((2.0, 1.0, 1.0)), gain=2.2).needs)
    ['mean', 'pilot']
    """

    iterations: int = 50
    _: KW_ONLY
    stop: str | None = "i-divergence"
    acceleration: str | None = "heavy-ball"
    seed: int = 0

    name = "gradient-consensus"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("seed", whole_number("seed", self.seed, least=0))
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"`seed` must be at most {_LARGEST_SEED}, got {self.seed}")
        if self.acceleration not in ACCELERATIONS:
            raise ValueError(f'`acceleration` must be "heavy-ball" or None, got {self.acceleration!r}')

    def _estimates(
        self,
        image: Array,
        blur: AnyBlur,
        mask: Array | None,
        origin: Sequence[int],
        share: float = 1.0,
    ) -> Iterator[Array]:
        assert self.start is not None  # resolved
        first, _ = split_photons(
            backend.to_numpy(image),
            origin,
            background=share * self._no_photons,
            gain=self.gain,
            seed=self.seed + 1,  # other coins than those of split-data stopping
        )
        return consensus_estimates(
            image,
            backend.asarray_like(first, image),
            blur,
            iterations=self.iterations,
            start=share * self.start,
            noise=self.gain * max(float(np.square(psf, dtype=np.float64).sum()) for psf in self._psfs),
            background=share * self.background,
            stray=share * (self.background - self._no_photons),
            acceleration=self.acceleration,
            mask=mask,
        )

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of a call, as if the block touched the volume's border on every axis."""
        lattice = self._border_lattice(read_shape)
        n_real = 5 + (self.acceleration is not None)
        spectrum, otf = self._spectrum_nbytes(lattice)
        if isinstance(self.psf, PsfField):
            n_real, spectrum = n_real + 1, 2 * spectrum  # a weighted image and a sum of spectra
        mask = math.prod(read_shape) if self._has_mask else 0
        return 4 * n_real * math.prod(lattice) + spectrum + otf + 2 * mask + ELEMENTWISE_NBYTES

    def _parameters(self) -> Mapping[str, Any]:
        return {**super()._parameters(), "acceleration": self.acceleration, "seed": self.seed}

    def _derived_depth(self, psf: np.ndarray) -> tuple[int, ...]:
        sigmas = _sigmas(self.iterations, self.acceleration, self.tolerance)
        return core_depth(psf, sigmas, most=4 * self.iterations)


def _sigmas(iterations: int, acceleration: str | None, tolerance: float) -> float:
    """Return the depth, in standard deviations of the core, that keeps the seam error below `tolerance`.

    An envelope of the table in `GradientConsensus`, about a tenth above it at 1e-3. With
    acceleration, 1e-4 is extrapolated.
    """
    log = math.log10(iterations)
    at_default = 3.3 + 3.0 * log if acceleration is None else min(5.5 + 6.0 * log, 13.0)
    decades = -math.log10(tolerance)
    return at_default * max(decades / 3, (decades - 1) / 2)

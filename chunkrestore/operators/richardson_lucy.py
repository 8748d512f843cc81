"""Richardson-Lucy deconvolution as an operator: parameters, halo, memory, and one block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from chunkrestore.backend import Array
from chunkrestore.kernels.blur import AnyBlur
from chunkrestore.kernels.richardson_lucy import estimates
from chunkrestore.kernels.sweeps import worth_sweeping
from chunkrestore.kernels.total_variation import LARGEST
from chunkrestore.operators.deconvolution import ELEMENTWISE_NBYTES, core_depth, number, voxel_sides
from chunkrestore.operators.iterative import IterativeDeconvolution
from chunkrestore.psf.varying import PsfField

ACCELERATIONS = ("heavy-ball", None)
_VOXELS_PER_DECADE = 3
# Depth that total variation needs for each factor of 10 in the seam error.


@dataclass(frozen=True, eq=False)
class RichardsonLucy(IterativeDeconvolution):
    r"""Deconvolve with a known point spread function by Richardson-Lucy iterations.

    .. math:: x \leftarrow x \cdot H^T[y / (H x + b)] / H^T 1

    from a flat start; `chunkrestore.kernels.richardson_lucy` holds the details. Preserves shape, position,
    constants, and total light (with a background only once dark regions have converged: there the estimate
    falls by the factor b / (b + x) per iteration). The result is float32, not negative, in input intensities
    above `background`.

    Parameters
    ----------
    psf
        Point spread function, as many axes as the image, sampled like it; odd or even lengths, centre at
        ``n // 2``. Kept as float32 with sum 1; negative or NaN values are errors. Give an axis length 1 to
        leave it alone. A `chunkrestore.psf.varying.PsfField` if it changes with position.
    iterations
        Number of iterations. More sharpens and amplifies noise; 10 to 20 accelerated ones suit most
        fluorescence images.
    background
        Intensity that a voxel without any light has (camera offset), part of the model: it is not in the
        result. At least 0.
    acceleration
        ``"heavy-ball"``: momentum with fixed factors; 10 iterations do the work of about 30 plain ones.
        None: plain iterations.
    total_variation
        Strength of total variation, 0 (none) to 0.1: less noise and flatter objects with sharp edges, at some
        cost of fine texture and of exactly kept light (1 % at 0.01). 0.01 suits dim images, 0.002 bright ones;
        more iterations then do no harm.
    voxel_size
        ``(z, y, x)`` in micrometres, for total variation, so that coarse planes are no edges; equal sides
        by default.
    depth
        Halo in voxels, one number or one per axis; None: from the point spread function, the iterations and
        `tolerance`.
    tolerance
        Wanted seam error: root mean square difference from the untiled result where cores meet, relative to
        the dynamic range of the result. Rounding of float32 leaves about 1e-6.
    start
        Value of the flat start estimate; None: the mean of the whole volume less `background`.
    saturation
        Voxels at or above this intensity are not believed: the estimate there follows from their
        neighbours.
    missing
        Voxels of exactly this intensity were not observed, such as the zeros around a deskewed volume.
    mask
        Boolean array of the volume's shape (NumPy, or a stored array that is read by slices): true where
        a voxel was observed. Where no observed voxel can tell of it, the result is 0.
    stop
        None: `iterations` as given. Otherwise they are the most that are done, and pilot regions of the
        volume decide once how many: ``"i-divergence"`` stops where an iteration improves the fit by less
        than half a percent; ``"split-data"`` where half of the photons are predicted best from the other
        half (needs `gain`).
    gain
        Intensity per detected photon, for ``stop="split-data"``.
    offset
        Intensity of a voxel that no light reaches (the camera's offset), for ``stop="split-data"``; None:
        `background`. Stray light is photons too.
    decision
        What the pilots decided; not for users.

    Raises
    ------
    TypeError, ValueError
        If a parameter is out of range or the point spread function cannot be used.

    Notes
    -----
    Depth. The error that a block's edge leaves falls exponentially, on a scale set by the width of the core
    of the point spread function and, slowly, by the iterations; a weak skirt hardly matters. Depth in
    standard deviations (core FWHM / 2.355) from which on every plane was below a seam error, relative to the
    central 99.8 % of the result's values: the worst of four anisotropic 3-D point spread functions (two
    Gaussian, two with a skirt), two axes and four scenes each (60 and 1000 photons, beads, background), at
    faces inside the volume:

    ==============  ====  ====  ====  ====
    iterations         5    10    20    50
    ==============  ====  ====  ====  ====
    plain, 1e-2      3.2   4.0   5.0   5.2
    plain, 1e-3      5.6   6.6   7.6   8.3
    plain, 1e-4      9.9   9.2  10.0  12.0
    heavy, 1e-2      4.0   5.7   6.6   8.3
    heavy, 1e-3      7.2   8.5  10.0  14.9
    heavy, 1e-4     12.7  12.3  14.9  22.0
    ==============  ====  ====  ====  ====

    Total variation (0.005 to 0.1) needs no more. Along axes that are not blurred it needs 2 voxels for 1e-3 and
    3 to 9 for 1e-4; it gets 3 for each factor of 10.

    The default is `_sigmas` below, at least 1.5 times the radius that holds 99.9 % of the light and at most
    ``2 * iterations * radius``, beyond which tiled and untiled are equal but for rounding.

    Memory. Estimate, momentum, weights (float32) and two half spectra: 20 bytes per voxel of the lattice,
    which is the read region plus the point spread function less one voxel per axis at the volume's border,
    rounded up to a fast length. Each thread beyond the first adds four planes, or 2 MiB where these are smaller.
    What is not swept (`chunkrestore.kernels.sweeps`) holds a blurred estimate too: 24 bytes. CuPy is never
    swept and adds cuFFT's work area.

    Examples
    --------
    >>> from chunkrestore.psf import gaussian
    >>> RichardsonLucy(gaussian((2.0, 1.0, 1.0)), iterations=10).halo((512, 512, 512)).depth
    (20, 10, 10)
    """

    _: KW_ONLY
    acceleration: str | None = "heavy-ball"
    total_variation: float = 0.0
    voxel_size: Sequence[float] | None = None

    name = "richardson-lucy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("total_variation", number("total_variation", self.total_variation))
        if self.acceleration not in ACCELERATIONS:
            raise ValueError(f'`acceleration` must be "heavy-ball" or None, got {self.acceleration!r}')
        if not 0 <= self.total_variation <= LARGEST:
            raise ValueError(
                f"`total_variation` must lie between 0 and {LARGEST}, got {self.total_variation:g}; 0.005 is a "
                "good first choice"
            )
        if self.voxel_size is not None:
            self._set("voxel_size", voxel_sides(self.voxel_size, self.psf.ndim))

    def _estimates(
        self,
        image: Array,
        blur: AnyBlur,
        mask: Array | None,
        origin: Sequence[int],
        share: float = 1.0,
    ) -> Iterator[Array]:
        assert self.start is not None  # resolved
        return estimates(
            image,
            blur,
            iterations=self.iterations,
            start=share * self.start,
            background=share * self.background,
            acceleration=self.acceleration,
            mask=mask,
            total_variation=self.total_variation,
            voxel_size=None if self.voxel_size is None else tuple(self.voxel_size),
        )

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of a call, as if the block touched the volume's border on every axis."""
        lattice = self._border_lattice(read_shape)
        n_real = 3 + (self.acceleration is not None)
        temporaries = ELEMENTWISE_NBYTES
        if self._swept(lattice):
            n_real, temporaries = n_real - 1, temporaries + 4 * 4 * math.prod(lattice[1:])
        spectrum, otf = self._spectrum_nbytes(lattice)
        if isinstance(self.psf, PsfField):
            n_real, spectrum = n_real + 1, 2 * spectrum  # a weighted image and a sum of spectra
        mask = math.prod(read_shape) if self._has_mask else 0
        return 4 * n_real * math.prod(lattice) + spectrum + otf + 2 * mask + temporaries

    def _swept(self, lattice: Sequence[int]) -> bool:
        uniform = not isinstance(self.psf, PsfField) and not self.total_variation
        return uniform and worth_sweeping(lattice, [axis for axis, p in enumerate(self.psf.shape) if p > 1])

    def _parameters(self) -> Mapping[str, Any]:
        return {
            **super()._parameters(),
            "acceleration": self.acceleration,
            "total_variation": self.total_variation,
            "voxel_size": None if self.voxel_size is None else list(self.voxel_size),
        }

    def _derived_depth(self, psf: np.ndarray) -> tuple[int, ...]:
        sigmas = _sigmas(self.iterations, self.acceleration, self.tolerance)
        depth = core_depth(psf, sigmas, most=2 * self.iterations)
        if not self.total_variation:
            return depth
        # Its own reach, which matters along axes that are not blurred.
        reach = min(math.ceil(-_VOXELS_PER_DECADE * math.log10(self.tolerance)), self.iterations)
        return tuple(max(d, reach) for d in depth)


def _sigmas(iterations: int, acceleration: str | None, tolerance: float) -> float:
    """Return the depth, in standard deviations of the core, that keeps the seam error below `tolerance`.

    An envelope of the table in `RichardsonLucy`, about a tenth above it at 1e-3.
    """
    at_default = 4.5 + 2.8 * math.log10(iterations) if acceleration is None else 8.0 + 0.16 * iterations
    decades = -math.log10(tolerance)
    return at_default * max(decades / 3, (decades - 1) / 2)

r"""The point spread function as the average of many beads.

Each bead is cut out, freed from its own background and brought onto the others by the shift :math:`s` that
maximises the correlation with their average :math:`r`,

.. math:: C(s) = \sum_k \operatorname{Re}\bigl[\overline{\hat r(k)}\, \hat x(k)\, e^{2\pi i\, k \cdot s}\bigr]

by Newton's method: under white noise that is the maximum likelihood shift, and it is not tied to a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from chunkrestore.psf.bead_size import denoised, frequencies, noise_power, outer_layers, without_sphere
from chunkrestore.psf.beads import UNLIKE, Beads, clipped_mean, core_centroid
from chunkrestore.psf.prepare import FWHM_PER_SIGMA, prepare
from chunkrestore.psf.sampling import offset

ROUNDS = 5
"""Alignments of all beads against their last average; after three, shifts change by less than 1e-4 voxel."""
REJECT_IN_ROUND = 2
"""The round after which beads unlike the average are dropped: it is sharp by then."""
TRIMMED = 0.1
"""Share of the beads left out at each end in every voxel; takes effect from ten beads on."""
LEAST_CORRELATION = 0.8
"""Below it a bead is no image of the same thing. With 10 % rms noise relative to its own rms it has 0.995."""
CORRELATION_SPREADS = 5.0
"""A bead is dropped if its decorrelation is this many times the usual one."""
SUPPORT_NOISE = 3.0
"""The result is cut where it falls below this many standard deviations of its own smoothed noise."""


@dataclass(frozen=True)
class BeadPsf:
    """A measured point spread function and the beads it comes from."""

    psf: npt.NDArray[np.float32]
    """Not negative, sum 1, peak (as `chunkrestore.psf.sampling.offset` finds it) on voxel ``n // 2``."""
    beads: Beads
    """All spots, with the reason for each one that was not used; positions as aligned."""
    method: str
    """``"average"`` or ``"distill"``."""
    bead_diameter_um: float | None = None
    """Diameter of the beads that was taken out, if any."""

    @property
    def n_beads(self) -> int:
        """Number of beads used."""
        return self.beads.n_used


def average_beads(image: npt.ArrayLike, beads: Beads, *, bead_diameter_um: float | None = None) -> BeadPsf:
    """Average the used ones of `beads` into a point spread function.

    The background is the mean of each box's outermost layer, without outliers. Voxels nearer to another bead
    are left out. Beads are scaled to equal brightness by least squares and averaged without the highest and
    lowest tenth in each voxel; those that correlate worse with the average than the others do are rejected.
    What does not rise above the noise is set to zero outside the connected core, so that clipping negative
    noise does not add a pedestal.

    Parameters
    ----------
    image
        As given to `find_beads`.
    beads
        What it returned.
    bead_diameter_um
        Diameter of the beads in micrometres, to be taken out (`without_sphere`); nothing by default.

    Returns
    -------
    BeadPsf
        The point spread function in a box of ``2 * beads.radius + 1`` voxels.

    Raises
    ------
    ValueError
        If no bead can be used (the message counts the reasons), the bead diameter needs a voxel size that
        `beads` do not have, or the beads are too large to be corrected for.
    """
    array = np.asarray(image)
    check_usable(beads, array.shape, bead_diameter_um)
    stack = Stack.cut(array, beads, np.flatnonzero(beads.used))
    reference, shifts = stack.align(None, stack.residues)
    for k in range(1, ROUNDS):
        reference, shifts = stack.align(reference, shifts)
        if k == REJECT_IN_ROUND:
            like = _like(stack.correlations(reference, shifts))
            beads = _without(beads, stack.rows[~like])
            stack, shifts = stack.only(like), shifts[like]
    psf, peak = finished(without_sphere(reference, bead_diameter_um, beads.voxel_size))
    positions = beads.positions.copy()
    positions[stack.rows] = stack.corners + np.asarray(beads.radius) + shifts + peak
    return BeadPsf(psf, replace(beads, positions=positions), "average", bead_diameter_um)


def check_usable(beads: Beads, shape: Sequence[int], bead_diameter_um: float | None) -> None:
    """Raise ValueError unless there are beads to work with, of this image, and what their size needs."""
    if len(shape) != len(beads.radius):
        raise ValueError(f"`image` of shape {tuple(shape)} is not the one that `beads` were found in")
    if not beads.n_used:
        raise ValueError(
            f"`beads` has none that can be used ({beads}); take a larger field, a smaller `psf_shape`, sparser "
            "or brighter beads, or a shorter exposure, as the reasons say"
        )
    if bead_diameter_um is not None and beads.voxel_size is None:
        raise ValueError("`bead_diameter_um` needs a voxel size; give `voxel_size` to find_beads")


@dataclass(frozen=True)
class Stack:
    """Images of beads in boxes of one shape, background subtracted."""

    images: npt.NDArray[np.float64]
    """Shape (n, *box)."""
    rows: npt.NDArray[np.intp]
    """Rows of the beads in their table."""
    corners: npt.NDArray[np.int64]
    """First voxel of each box in the image."""
    residues: npt.NDArray[np.float64]
    """Position of each bead relative to its box's central voxel, as detected."""
    foreign: npt.NDArray[np.bool_]
    """Voxels nearer to another bead (in widths); shape of `images`."""
    backgrounds: npt.NDArray[np.float64]
    """What was subtracted."""
    noises: npt.NDArray[np.float64]
    """Standard deviation of the noise in each box."""

    @classmethod
    def cut(cls, image: np.ndarray, beads: Beads, rows: npt.NDArray[np.intp]) -> Stack:
        """Cut the boxes of some beads out of `image`; all must lie inside it."""
        radius = np.asarray(beads.radius)
        upper = np.asarray(image.shape) - 2 * radius - 1
        corners = np.clip(np.rint(beads.positions[rows]).astype(np.int64) - radius, 0, upper)
        box = tuple(2 * radius + 1)
        cuts = [tuple(slice(c, c + n) for c, n in zip(corner, box, strict=True)) for corner in corners]
        images = np.stack([image[cut].astype(np.float64) for cut in cuts])
        foreign = np.stack(
            [_nearer_to_another(box, corner, row, beads) for corner, row in zip(corners, rows, strict=True)]
        )
        shell = outer_layers(box, 1)
        levels = [
            clipped_mean(i[shell & ~f] if (shell & ~f).any() else i)
            for i, f in zip(images, foreign, strict=True)
        ]
        backgrounds = np.array([mean for mean, _ in levels])
        images -= backgrounds.reshape(-1, *(1,) * len(box))
        sigma = beads.typical_fwhm / FWHM_PER_SIGMA
        noises = np.array([np.sqrt(noise_power(image, sigma) / image.size) for image in images])
        return cls(
            images, rows, corners, beads.positions[rows] - corners - radius, foreign, backgrounds, noises
        )

    def only(self, keep: npt.NDArray[np.bool_]) -> Stack:
        """Return the part of the stack that `keep` marks."""
        return Stack(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def align(
        self, reference: np.ndarray | None, shifts: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the average of the beads brought onto `reference` and centred, and their positions then.

        Without a reference the `shifts` are taken as they are.
        """
        if reference is not None:
            target = np.fft.fftn(reference)
            shifts = np.array([registered(target, i, s) for i, s in zip(self.images, shifts, strict=True)])
        average = self._average(shifts)
        centre = core_centroid(average) - np.asarray(average.shape) // 2
        return shifted(average, -centre), shifts + centre

    def moved(self, shifts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the images with their beads in the box's centre."""
        return np.stack([shifted(i, -s) for i, s in zip(self.images, shifts, strict=True)])

    def correlations(self, reference: np.ndarray, shifts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the normalised correlation of each bead with `reference`, both smoothed against noise."""
        return np.array(
            [
                np.corrcoef(_smoothed(image)[~mask], _smoothed(reference)[~mask])[0, 1]
                for image, mask in zip(self.moved(shifts), self.foreign, strict=True)
            ]
        )

    def _average(self, shifts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        images = self.moved(shifts)
        weights = images.mean(axis=0)
        flat = images.reshape(len(images), -1)
        brightness = flat @ weights.reshape(-1)
        images = images * (brightness.mean() / brightness).reshape(-1, *(1,) * weights.ndim)
        return trimmed_mean(np.where(self.foreign, np.nan, images))


def trimmed_mean(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over axis 0 without NaN and without the highest and lowest tenth; 0 where all are NaN."""
    ordered = np.sort(images, axis=0)
    count = (~np.isnan(ordered)).sum(axis=0)
    cut = (TRIMMED * count).astype(int)
    place = np.arange(len(images)).reshape(-1, *(1,) * (images.ndim - 1))
    kept = (place >= cut) & (place < count - cut)
    return np.where(kept, ordered, 0).sum(axis=0) / np.maximum(kept.sum(axis=0), 1)


def shifted(image: np.ndarray, shift: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return `image` (odd lengths, periodic) moved by `shift` voxels, exactly if it is band-limited."""
    turn = sum(k * s for k, s in zip(frequencies(image.shape), shift, strict=True))
    return np.fft.ifftn(np.fft.fftn(image) * np.exp(-2j * np.pi * turn)).real


def registered(
    target: np.ndarray, image: np.ndarray, start: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return where in `image` the reference with spectrum `target` lies, relative to its own place.

    Newton's method from `start`; a step is at most half a voxel, and steps stop where the correlation has no
    maximum nearby.
    """
    product = np.conj(target) * np.fft.fftn(image)
    waves = [2 * np.pi * k for k in frequencies(image.shape)]
    shift = np.array(start, dtype=np.float64)
    for _ in range(8):
        turned = product * np.exp(1j * sum(k * s for k, s in zip(waves, shift, strict=True)))
        slope = np.array([-(turned.imag * k).sum() for k in waves])
        bend = np.array([[-(turned.real * k * q).sum() for q in waves] for k in waves])
        if np.linalg.eigvalsh(bend).max() >= 0:
            break
        step = np.clip(-np.linalg.solve(bend, slope), -0.5, 0.5)
        shift += step
        if np.abs(step).max() < 1e-4:
            break
    return shift


def finished(psf: np.ndarray) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Return `psf` with its peak centred, noise outside its connected core set to 0, not negative, sum 1.

    The second result is where the peak was, relative to the centre.
    """
    peak = np.array(offset(np.maximum(denoised(psf), 0)))
    centred = shifted(psf, -peak)
    smooth = _smoothed(centred)
    level, noise = clipped_mean(smooth[outer_layers(psf.shape, 2)])
    parts, _ = ndimage.label(smooth > max(level, 0) + SUPPORT_NOISE * noise)
    support = ndimage.binary_dilation(parts == parts[np.unravel_index(int(smooth.argmax()), psf.shape)])
    return prepare(np.where(support, np.maximum(centred, 0), 0)), peak


def _smoothed(image: np.ndarray) -> npt.NDArray[np.float64]:
    return np.asarray(ndimage.gaussian_filter(image, 1.0), dtype=np.float64)


def _nearer_to_another(
    box: Sequence[int], corner: npt.NDArray[np.int64], row: int, beads: Beads
) -> npt.NDArray[np.bool_]:
    scale = beads.typical_fwhm
    near = np.all(np.abs(beads.positions - beads.positions[row]) < 2 * np.asarray(box), axis=1)
    near[row] = False
    grid = np.stack(
        np.meshgrid(*(c + np.arange(n) for c, n in zip(corner, box, strict=True)), indexing="ij"), -1
    )
    own = (((grid - beads.positions[row]) / scale) ** 2).sum(axis=-1)
    foreign = np.zeros(tuple(box), bool)
    for other in beads.positions[near]:
        foreign |= (((grid - other) / scale) ** 2).sum(axis=-1) < own
    return foreign


def _like(correlations: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which correlations are as good as the others; the best one always is."""
    far = 1 - correlations
    limit = min(1 - LEAST_CORRELATION, max(CORRELATION_SPREADS * float(np.median(far)), 0.02))
    return np.asarray(far <= max(limit, float(far.min())))


def _without(beads: Beads, rows: npt.NDArray[np.intp]) -> Beads:
    reasons = list(beads.reasons)
    for row in rows:
        reasons[row] = UNLIKE
    return replace(beads, reasons=tuple(reasons))

"""Finding the beads of an image from which its point spread function can be measured.

Every bright spot is listed, with the reason if it is no use: a wrong bead spoils the average quietly, a
missing one only costs photons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

from chunkrestore.psf.files import check_voxel_size
from chunkrestore.psf.prepare import FWHM_PER_SIGMA

SATURATED = "saturated"
BORDER = "too near the border"
DIM = "too dim"
NEIGHBOUR = "another bead too near"
WIDE = "width unlike the others"
BRIGHT = "brighter than a single bead"
UNLIKE = "image unlike the others"

LEAST_HEIGHT = 6.0
# Spots below so many standard deviations of the smoothed background are not listed. Photon noise, which is
# skewed, made several of 5 in a million voxels.
RADIUS_PER_FWHM = 2.0
# A Gaussian has 2e-5 of its peak there (4.7 standard deviations); measured ones have a skirt.
FAINTEST_NEIGHBOUR = 0.1
# A weaker spot near a bead is taken for its side lobe or for photon noise of its skirt.
DEEPEST_SADDLE = 0.9
# Two beads are separate if the image between them falls below this share of the weaker one.
FEWEST_TO_COMPARE = 5
# With fewer beads there is no telling which of them is the odd one.
WIDTH_FACTOR = 1.25
BRIGHTNESS_FACTOR = 1.7
# Least deviations from the median that count as odd; two beads in one place are twice as bright as one.
SATURATED_VOXELS = 4
# So many touching voxels that share the image's highest value are a plateau and not a peak.


@dataclass(frozen=True)
class Beads:
    """Spots of an image, one row each, brightest first; the bead at row i is used if ``reasons[i]`` is empty."""

    positions: npt.NDArray[np.float64]
    """Sub-voxel centres, shape (n, ndim), in voxels."""
    heights: npt.NDArray[np.float64]
    """Peak of the smoothed image above its background, in the image's units."""
    snr: npt.NDArray[np.float64]
    """Heights in standard deviations of the smoothed background."""
    fwhm: npt.NDArray[np.float64]
    """Full widths at half maximum per axis, shape (n, ndim), in voxels, the smoothing taken out."""
    reasons: tuple[str, ...]
    """Why a bead is not used; empty if it is."""
    radius: tuple[int, ...]
    """Half-width of the box around a bead that is taken for its image, in voxels."""
    background: float
    """Background of the whole image, in its units."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres per axis, if known."""

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        rejected = Counter(reason for reason in self.reasons if reason)
        why = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
        return f"{len(self)} found, {self.n_used} used" + (f"; rejected: {why}" if why else "")

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Which beads have no reason against them."""
        return np.array([not reason for reason in self.reasons], dtype=bool)

    @property
    def n_used(self) -> int:
        """Number of beads that are used."""
        return int(self.used.sum())

    @property
    def typical_fwhm(self) -> npt.NDArray[np.float64]:
        """Median width per axis of the used beads (of all if none is used), in voxels."""
        rows = self.fwhm[self.used] if self.n_used else self.fwhm
        return np.asarray(np.median(rows, axis=0))


def find_beads(
    image: npt.ArrayLike,
    *,
    voxel_size: Sequence[float] | None = None,
    psf_shape: Sequence[int] | None = None,
    saturation: float | None = None,
    min_snr: float = 20.0,
) -> Beads:
    """List the beads of `image` and say which can be used and why others cannot.

    The image is smoothed by half the beads' own width, and its local maxima are compared with its background,
    found by repeated clipping at 3 standard deviations. In this order a bead is rejected if it is saturated,
    dimmer than `min_snr`, nearer to the border than the box around it reaches, has another bead in or
    touching its box, or differs in width (25 %) or brightness (1.7 times) from the median by more than the
    3-fold spread of the beads. The last two need at least five beads.

    Parameters
    ----------
    image
        Real numbers, axes ``zyx`` or ``yx``, finite, every axis of at least 5 voxels.
    voxel_size
        Micrometres per axis; kept for results in micrometres.
    psf_shape
        Shape of the point spread function to measure, odd lengths; by default it reaches 2 full widths at
        half maximum from its centre (the larger one of y and x for both). Larger ones see more of the skirt
        but need beads further apart.
    saturation
        Value at and above which the camera is saturated. By default the highest value of the data type, or
        the image's highest value if at least 4 touching voxels share it.
    min_snr
        Least height of a bead in standard deviations of the smoothed background.

    Returns
    -------
    Beads
        All spots above 6 standard deviations, brightest first.

    Raises
    ------
    TypeError
        If `image` does not hold real numbers.
    ValueError
        If `image` has NaN or infinite values or a wrong shape, another argument does not fit it, or it shows
        no bead at all.

    Notes
    -----
    Takes 16 bytes per voxel besides the image.
    """
    volume = _checked_image(image)
    fwhm = _width_of_bright_spots(volume)
    radius = _radius(psf_shape, fwhm, volume.shape)
    smoothing = fwhm / FWHM_PER_SIGMA / 2
    smooth = ndimage.gaussian_filter(volume, smoothing)
    background, noise = clipped_mean(smooth)
    smooth -= background
    peaks = _local_maxima(smooth, LEAST_HEIGHT * noise, fwhm)
    reach = np.asarray(radius) + fwhm / 2
    peaks = _separate(smooth, peaks, reach)
    if not len(peaks):
        raise ValueError(_no_beads(smooth, noise))
    heights = smooth[tuple(peaks.T)].astype(np.float64)
    widths = np.array([[_line_width(smooth, peak, axis) for axis in range(volume.ndim)] for peak in peaks])
    widths = np.sqrt(np.maximum(widths**2 - (smoothing * FWHM_PER_SIGMA) ** 2, 1.0))
    positions = np.array([_core_centre(smooth, peak, fwhm) for peak in peaks])
    level = _saturation(np.asarray(image), saturation)
    reasons = _first_reasons(
        {
            SATURATED: np.array([_box(volume, peak, fwhm).max() >= level for peak in peaks]),
            DIM: heights < min_snr * noise,
            BORDER: np.any((peaks < radius) | (peaks >= np.asarray(volume.shape) - radius), axis=1),
            NEIGHBOUR: _has_neighbour(positions, reach),
        }
    )
    reasons = _compare(reasons, widths, heights)
    size = None if voxel_size is None else check_voxel_size("voxel_size", voxel_size, volume.ndim)
    return Beads(positions, heights, heights / noise, widths, tuple(reasons), radius, float(background), size)


def clipped_mean(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of `values` without what lies 3 standard deviations away.

    Clipping is repeated until nothing changes. Unlike the median it is not quantised with integer data. Large
    arrays are sampled on a fixed grid of about a million values.
    """
    kept = values.reshape(-1)[:: max(1, values.size // 1_000_000)].astype(np.float64)
    while True:
        mean, spread = kept.mean(), kept.std()
        inside = np.abs(kept - mean) <= 3 * spread
        if inside.all():
            return float(mean), max(float(spread), float(np.finfo(np.float32).tiny))
        kept = kept[inside]


def core_centroid(image: np.ndarray) -> npt.NDArray[np.float64]:
    """Return the centroid of what rises above half the maximum of `image`, in voxels.

    Unlike the centroid of everything it does not follow skirts and noise, unlike the brightest voxel it moves
    smoothly with the image.
    """
    core = np.maximum(image.astype(np.float64) - image.max() / 2, 0)
    return np.array(ndimage.center_of_mass(core))


def _checked_image(image: npt.ArrayLike) -> npt.NDArray[np.float32]:
    array = np.asarray(image)
    if array.dtype.kind not in "uif":
        raise TypeError(f"`image` must be an array of real numbers, got dtype {array.dtype}")
    if array.ndim not in (2, 3) or min(array.shape) < 5:
        raise ValueError(
            f"`image` must have 2 or 3 axes (yx or zyx) of at least 5 voxels, got shape {array.shape}; "
            "pass a single plane as a two-dimensional array"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"`image` holds {int((~np.isfinite(array)).sum())} NaN or infinite values; crop them away or "
            "replace them by the background"
        )
    return array.astype(np.float32)


def _radius(psf_shape: Sequence[int] | None, fwhm: np.ndarray, shape: Sequence[int]) -> tuple[int, ...]:
    if psf_shape is None:
        # As much as a small image can give, as long as it holds a bead's core.
        reach = np.ceil(RADIUS_PER_FWHM * np.array([*fwhm[:-2], *[fwhm[-2:].max()] * 2])).astype(int)
        return tuple(int(min(r, max(2, n // 3))) for r, n in zip(reach, shape, strict=True))
    lengths = tuple(int(n) for n in psf_shape)
    if len(lengths) != len(shape) or any(n < 3 or n % 2 == 0 for n in lengths):
        raise ValueError(f"`psf_shape` {lengths} must have an odd length of at least 3 for each image axis")
    if any(p > n for p, n in zip(lengths, shape, strict=True)):
        raise ValueError(f"`psf_shape` {lengths} is larger than the image {tuple(shape)}; make it smaller")
    return tuple(n // 2 for n in lengths)


def _width_of_bright_spots(volume: np.ndarray) -> npt.NDArray[np.float64]:
    """Return the median full width at half maximum per axis of the brightest spots, in voxels, at least 1.5."""
    smooth = ndimage.gaussian_filter(volume, 1.0)
    background, noise = clipped_mean(smooth)
    smooth -= background
    rank = smooth.size - max(1, min(20, smooth.size // 1000))
    high = np.partition(smooth, rank, axis=None)[rank]
    peaks = _local_maxima(smooth, max(LEAST_HEIGHT * noise, high / 4), np.full(volume.ndim, 4.0))[:200]
    if not len(peaks):
        raise ValueError(_no_beads(smooth, noise))
    widths = np.array([[_line_width(smooth, peak, axis) for axis in range(volume.ndim)] for peak in peaks])
    return np.asarray(np.sqrt(np.maximum(np.median(widths, axis=0) ** 2 - FWHM_PER_SIGMA**2, 1.5**2)))


def _no_beads(smooth: np.ndarray, noise: float) -> str:
    return (
        f"`image` shows no bead: its brightest spot is {float(smooth.max()):.4g} above the background, less than "
        f"{LEAST_HEIGHT:g} times the noise of {noise:.4g}; check the channel, or average several exposures"
    )


def _local_maxima(smooth: np.ndarray, least: float, fwhm: np.ndarray) -> npt.NDArray[np.int64]:
    """Return voxels that are the highest within half a width around them and above `least`, highest first."""
    size = [2 * max(1, round(width / 4)) + 1 for width in fwhm]
    peaks = np.argwhere((smooth >= ndimage.maximum_filter(smooth, size)) & (smooth > least))
    return np.asarray(peaks[np.argsort(-smooth[tuple(peaks.T)], kind="stable")])


def _separate(smooth: np.ndarray, peaks: np.ndarray, reach: np.ndarray) -> npt.NDArray[np.int64]:
    """Return `peaks` without those that belong to a higher one: side lobes, and noise on its flanks."""
    if not len(peaks):
        return peaks
    heights = smooth[tuple(peaks.T)]
    near = KDTree(peaks / reach).query_ball_point(peaks / reach, 1.0)
    kept: set[int] = set()
    for i, around in enumerate(near):
        higher = [j for j in around if j in kept]
        if not any(
            heights[i] < FAINTEST_NEIGHBOUR * heights[j]
            or _saddle(smooth, peaks[i], peaks[j]) > DEEPEST_SADDLE * heights[i]
            for j in higher
        ):
            kept.add(i)
    return np.asarray(peaks[sorted(kept)])


def _saddle(smooth: np.ndarray, start: np.ndarray, stop: np.ndarray) -> float:
    """Return the lowest value on the straight line between two voxels."""
    steps = np.linspace(0, 1, 2 * int(np.abs(stop - start).max()) + 1)
    line = start[:, None] + (stop - start)[:, None] * steps
    return float(ndimage.map_coordinates(smooth, line, order=1).min())


def _line_width(smooth: np.ndarray, peak: np.ndarray, axis: int) -> float:
    """Return the full width at half maximum of the line through `peak`; mirrored where the image ends first."""
    line = smooth[tuple(slice(None) if a == axis else p for a, p in enumerate(peak))].astype(np.float64)
    half = line[peak[axis]] / 2
    sides = []
    for side in (line[peak[axis] :], line[peak[axis] :: -1]):
        below = np.flatnonzero(side < half)
        if len(below):
            i = below[0]
            sides.append(i - (half - side[i]) / (side[i - 1] - side[i]))
    return float(2 * np.mean(sides)) if sides else float(len(line))


def _box(image: np.ndarray, peak: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return `image` within `reach` / 2 of `peak`, clipped at the border."""
    half = np.maximum(1, np.ceil(reach / 2).astype(int))
    return image[tuple(slice(max(0, p - h), p + h + 1) for p, h in zip(peak, half, strict=True))]


def _core_centre(smooth: np.ndarray, peak: np.ndarray, fwhm: np.ndarray) -> npt.NDArray[np.float64]:
    half = np.maximum(1, np.ceil(fwhm / 2).astype(int))
    return np.maximum(peak - half, 0) + core_centroid(_box(smooth, peak, fwhm))


def _saturation(image: np.ndarray, given: float | None) -> float:
    """Return the value from which on voxels count as saturated; infinity if none does."""
    if given is not None:
        return float(given)
    top = image.max()
    if image.dtype.kind in "ui" and top == np.iinfo(image.dtype).max:
        return float(top)
    touching, n = ndimage.label(image == top, np.ones((3,) * image.ndim))
    largest = np.bincount(touching.reshape(-1))[1:].max() if n else 0
    return float(top) if largest >= SATURATED_VOXELS else np.inf


def _has_neighbour(positions: np.ndarray, reach: np.ndarray) -> npt.NDArray[np.bool_]:
    near = KDTree(positions / reach).query_ball_point(positions / reach, 1.0, return_length=True)
    return np.asarray(near > 1)


def _first_reasons(tests: dict[str, np.ndarray]) -> list[str]:
    return [
        next((reason for reason, hit in tests.items() if hit[i]), "")
        for i in range(len(next(iter(tests.values()))))
    ]


def _compare(reasons: list[str], widths: np.ndarray, heights: np.ndarray) -> list[str]:
    """Return `reasons` with those of beads added that are wider, narrower or brighter than the usual one."""
    good = np.array([not reason for reason in reasons])
    if good.sum() < FEWEST_TO_COMPARE:
        return reasons
    odd_width = np.zeros(len(reasons), bool)
    for axis in range(widths.shape[1]):
        odd_width |= np.abs(_deviation(widths[:, axis], good, WIDTH_FACTOR)) > 1
    odd_height = _deviation(heights, good, BRIGHTNESS_FACTOR) > 1
    later = _first_reasons({WIDE: odd_width, BRIGHT: odd_height})
    return [first or second for first, second in zip(reasons, later, strict=True)]


def _deviation(values: np.ndarray, good: np.ndarray, factor: float) -> npt.NDArray[np.float64]:
    """Return the logarithmic distance from the good ones' median over the larger of 3 spreads and `factor`."""
    logs = np.log(values)
    centre = np.median(logs[good])
    spread = 1.4826 * np.median(np.abs(logs[good] - centre))
    return np.asarray((logs - centre) / max(3 * spread, np.log(factor)))

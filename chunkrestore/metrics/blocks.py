"""Metrics of images of any size: sums over the cells of a volume, added exactly, and what follows from them.

With truth t, image i and means <> over all voxels of the volume,

    bias = <i - t>      mean absolute error = <|i - t|>      RMSE**2 = <(i - t)**2>
    NRMSE**2 = <(i - t)**2> / <t**2>      PSNR = 20 log10(data range) - 20 log10(RMSE)
    correlation = cov(t, i) / sqrt(var(t) var(i))
    scale-invariant PSNR = PSNR of the a i + b closest to t, whose RMSE**2 is var(t) (1 - correlation**2)

A cell's sums are float64; sums of 8 and 16 bit integers are exact. Cells are added without any error
(`chunkrestore.metrics.exact`), so no block grid changes a bit of a result. A variance keeps ``1e-15 * <t**2> / var(t)``
of itself as relative error, which limits the scale-invariant PSNR to some 140 dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from chunkrestore.grid import Slices
from chunkrestore.metrics.cells import Cells, within
from chunkrestore.metrics.exact import Rows, added, totals
from chunkrestore.metrics.shells import ShellCorrelation, Shells, shells_of
from chunkrestore.statistics import NonFiniteError

Image: TypeAlias = npt.NDArray[np.float64]
Sums: TypeAlias = Mapping[str, Rows]
"""What is known of some blocks; `merged` adds several."""

_WINDOW = 7
"""Voxels per axis that a structural similarity is computed from (scikit-image's default)."""
_SHORTEST = 8
"""Voxels per axis that a shell correlation needs."""
FULL_TRUTH = 0.5
"""Correlation with a truth free of noise at which structure counts as resolved."""


@dataclass(frozen=True)
class ImageScore:
    """How close an image is to the truth."""

    n_voxels: int
    """Voxels that were compared."""
    data_range: float
    """Largest minus smallest value of the truth, or what was given."""
    psnr: float
    """Peak signal-to-noise ratio in decibels."""
    psnr_scaled: float
    """The same after the best gain and offset: compares structure."""
    rmse: float
    """Root of the mean square error."""
    nrmse: float
    """The same relative to the root mean square of the truth."""
    mae: float
    """Mean absolute error."""
    bias: float
    """Mean of image minus truth."""
    correlation: float
    """Pearson's; NaN if truth or image is constant."""
    ssim: float | None
    """Mean structural similarity; None if an axis is shorter than 7 voxels."""
    fsc: ShellCorrelation | None
    """Fourier shell correlation with the truth; None without a voxel size, or if an axis is shorter than 8."""

    @property
    def resolution_um(self) -> float | None:
        """Period in micrometres at which the correlation with the truth falls below 1/2."""
        return None if self.fsc is None else self.fsc.resolution_um(FULL_TRUTH)

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        fsc = self.fsc
        curve = fsc and {"frequency": fsc.frequency.tolist(), "correlation": fsc.correlation.tolist()}
        return {**vars(self), "fsc": curve, "resolution_um": self.resolution_um}


def described_score(values: Mapping[str, Any]) -> ImageScore:
    """Return the score that `ImageScore.describe` has described."""
    rest = {name: value for name, value in values.items() if name not in ("fsc", "resolution_um")}
    curve = values["fsc"]
    fsc = curve and ShellCorrelation(*(np.array(curve[name]) for name in ("frequency", "correlation")))
    return ImageScore(**rest, fsc=fsc)


@dataclass(frozen=True)
class ImageComparison:
    """Which volumes are compared, and in which units."""

    shape: tuple[int, ...]
    """Of both."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres per axis; None: no shell correlation."""
    truth_background: float = 0.0
    """Subtracted from the truth."""
    background: float = 0.0
    """Subtracted from the image."""

    @property
    def _cells(self) -> Cells:
        return Cells.partition(self.shape)

    @property
    def _windows(self) -> tuple[Cells, ...]:
        return (Cells.windows(self.shape),) if self.has_shells else ()

    @property
    def _insides(self) -> Cells:
        """Voxels with a whole window around them."""
        return Cells.partition(self.shape, reach=_WINDOW // 2, border=_WINDOW // 2)

    def _shells(self, windows: Cells) -> Shells:
        return shells_of(windows.window_shape, tuple(self.voxel_size or ()))

    @property
    def has_shells(self) -> bool:
        """Whether a shell correlation is computed."""
        return self.voxel_size is not None and min(self.shape) >= _SHORTEST

    @property
    def has_similarity(self) -> bool:
        """Whether a structural similarity is computed."""
        return min(self.shape) >= _WINDOW

    def errors_region(self, core: Slices) -> Slices | None:
        """Return what `errors` needs for `core`; None if nothing begins in it."""
        return _joined(cells.read_for(core) for cells in (self._cells, *self._windows))

    def errors(self, core: Slices, truth: np.ndarray, image: np.ndarray) -> dict[str, Rows]:
        """Return the sums of the cells that begin in `core`, from its `errors_region`: moments, extremes, spectra.

        Raises
        ------
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        pair = _Pair.of(self, self.errors_region(core), truth, image)
        found = {}
        rows = [_moments(*pair.at(cell)) for cell in self._cells.beginning_in(core)]
        if rows:
            moments, least, most = (np.array(column) for column in zip(*rows, strict=True))
            found = {"moments": added(moments), "least": least.min(0)[None], "most": most.max(0)[None]}
        for windows in self._windows:
            shells = self._shells(windows)
            spectra = [shells.sums(*pair.at(cell)) for cell in windows.beginning_in(core)]
            if spectra:
                found["spectra"] = added(spectra)
        return found

    def similarity_region(self, core: Slices) -> Slices | None:
        """Return what `similarity` needs for `core`; None if nothing begins in it."""
        return self._insides.read_for(core)

    def similarity(
        self, core: Slices, truth: np.ndarray, image: np.ndarray, data_range: float
    ) -> dict[str, Rows]:
        """Return the structural similarities of the cells that begin in `core`, from its `similarity_region`."""
        pair, cells = _Pair.of(self, self.similarity_region(core), truth, image), self._insides
        around = (cells.around(cell) for cell in cells.beginning_in(core))
        values = [[float(_similarity(*pair.at(cell), data_range).sum())] for cell in around]
        return {"similarity": added(values)}

    def data_range(self, sums: Sums, given: float | None) -> float:
        """Return the range that ratios refer to: what was given, or that of the truth.

        Raises
        ------
        ValueError
            If it is not positive.
        """
        found = float(sums["most"][0, 0] - sums["least"][0, 0]) if given is None else float(given)
        if not found > 0:
            raise ValueError(f"`data_range` must be positive, got {found} (is `truth` constant?)")
        return found

    def score(self, sums: Sums, data_range: float) -> ImageScore:
        """Return the score from the sums of all blocks."""
        n, t, i, tt, ii, ti, square, absolute = totals(sums["moments"]).tolist()
        covariance = ti / n - t / n * (i / n)
        truth_variance, image_variance = max(tt / n - (t / n) ** 2, 0.0), max(ii / n - (i / n) ** 2, 0.0)
        constant = sums["least"][0] == sums["most"][0]
        correlation = math.nan if constant.any() else covariance / math.sqrt(truth_variance * image_variance)
        explained = 0.0 if math.isnan(correlation) else correlation**2
        return ImageScore(
            n_voxels=int(n),
            data_range=data_range,
            psnr=_decibels(data_range, square / n),
            psnr_scaled=_decibels(data_range, truth_variance * max(1 - explained, 0.0)),
            rmse=math.sqrt(square / n),
            nrmse=math.sqrt(square / tt) if tt else math.inf,
            mae=absolute / n,
            bias=(i - t) / n,
            correlation=correlation,
            ssim=self._mean_similarity(sums),
            fsc=self._curve(sums),
        )

    def _mean_similarity(self, sums: Sums) -> float | None:
        if not self.has_similarity:
            return None
        return float(totals(sums["similarity"])[0] / math.prod(n - _WINDOW + 1 for n in self.shape))

    def _curve(self, sums: Sums) -> ShellCorrelation | None:
        for windows in self._windows:
            return self._shells(windows).curve(sums["spectra"])
        return None


def merged(parts: Iterable[Sums]) -> dict[str, Rows]:
    """Add up what is known of several blocks."""
    several = list(parts)
    names = sorted({name for part in several for name in part})
    found = {name: np.concatenate([part[name] for part in several if name in part]) for name in names}
    reduced = {
        "least": lambda rows: rows.min(0, keepdims=True),
        "most": lambda rows: rows.max(0, keepdims=True),
    }
    return {name: reduced.get(name, added)(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class _Pair:
    """A region of truth and image, as stored."""

    comparison: ImageComparison
    region: Slices
    truth: np.ndarray
    image: np.ndarray

    @classmethod
    def of(
        cls, comparison: ImageComparison, region: Slices | None, truth: np.ndarray, image: np.ndarray
    ) -> _Pair:
        if region is None:
            raise ValueError("nothing is to be compared in this block")
        pair = cls(comparison, region, truth, image)
        for name in ("truth", "image"):
            array = getattr(pair, name)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                where = ", ".join(f"{s.start}:{s.stop}" for s in region)
                raise NonFiniteError(f"`{name}` holds voxels that are NaN or infinite in {where}")
        return pair

    def at(self, cell: Slices) -> tuple[Image, Image]:
        """Return a cell of both, above their backgrounds, contiguous, so that sums take the same steps everywhere."""
        part = within(cell, self.region)
        truth = np.array(self.truth[part], np.float64, order="C")
        image = np.array(self.image[part], np.float64, order="C")
        truth -= self.comparison.truth_background
        image -= self.comparison.background
        return truth, image


def _moments(truth: Image, image: Image) -> tuple[list[float], list[float], list[float]]:
    """Return the sums of a cell, and the least and largest value of truth and image."""
    error = image - truth
    sums = [float(truth.size), truth.sum(), image.sum()]
    sums += [
        float((a * b).sum()) for a, b in ((truth, truth), (image, image), (truth, image), (error, error))
    ]
    return [*sums, np.abs(error).sum()], [truth.min(), image.min()], [truth.max(), image.max()]


def _similarity(truth: Image, image: Image, data_range: float) -> Image:
    """Return the structural similarity around every voxel that has a whole window (Wang et al. 2004, eq. 13).

    Windows of 7 voxels, all alike, and the covariance of a sample, as `skimage.metrics.structural_similarity` has them.
    """
    inner = (slice(_WINDOW // 2, -(_WINDOW // 2)),) * truth.ndim

    def mean(values: Image) -> Image:
        return np.asarray(ndimage.uniform_filter(values, _WINDOW, mode="constant")[inner])

    n = _WINDOW**truth.ndim
    t, i = mean(truth), mean(image)
    covariance, truth_variance, image_variance = (
        n / (n - 1) * (mean(a * b) - c * d)
        for a, b, c, d in ((truth, image, t, i), (truth, truth, t, t), (image, image, i, i))
    )
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return np.asarray(
        (2 * t * i + c1)
        * (2 * covariance + c2)
        / ((t * t + i * i + c1) * (truth_variance + image_variance + c2))
    )


def _decibels(peak: float, mean_square: float) -> float:
    return math.inf if mean_square == 0 else 20 * math.log10(peak) - 10 * math.log10(mean_square)


def _joined(boxes: Iterable[Slices | None]) -> Slices | None:
    """Return the box around boxes."""
    some = [box for box in boxes if box is not None]
    if not some:
        return None
    return tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*some, strict=True)
    )

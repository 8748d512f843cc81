"""Whether objects keep their brightness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class IntensityScore:
    """How the mean intensity of objects, above the background, differs from the true one."""

    n_objects: int
    """True objects whose true mean is above the background."""
    error: float
    """Median of mean over true mean, minus 1; NaN without objects."""
    absolute_error: float
    """Median of its absolute value."""

    def describe(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return dict(vars(self))


def score_intensities(truth: npt.NDArray[np.float64], means: npt.NDArray[np.float64]) -> IntensityScore:
    """Compare the mean intensities of objects, one each, with the true ones of the same objects."""
    bright = truth > 0
    error = means[bright] / truth[bright] - 1
    if not len(error):
        return IntensityScore(0, np.nan, np.nan)
    return IntensityScore(len(error), float(np.median(error)), float(np.median(np.abs(error))))

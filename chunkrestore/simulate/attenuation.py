"""What a light sheet and its emission lose on their way through a body: exponential, by position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]
Grid: TypeAlias = Sequence[npt.NDArray[np.float64]]
"""Per axis, the voxels at which something is wanted, as `numpy.ix_` shapes them: they broadcast to all of them."""
Sides: TypeAlias = Literal["low", "high", "both"]


@dataclass(frozen=True)
class Ellipsoid:
    """A body that light passes through, its axes along those of the volume."""

    centre: tuple[float, ...]
    """Voxel at its centre, per axis."""
    semi_axes: tuple[float, ...]
    """Voxels from the centre to the surface, per axis."""

    def __post_init__(self) -> None:
        if len(self.centre) != len(self.semi_axes) or not all(0 < a < math.inf for a in self.semi_axes):
            raise ValueError(
                f"`semi_axes` {self.semi_axes} must hold one positive number for each of `centre` {self.centre}"
            )

    @classmethod
    def filling(cls, shape: Sequence[int], share: float = 0.9) -> Self:
        """Return the ellipsoid in the middle of a volume that fills `share` of each of its axes."""
        return cls(tuple((n - 1) / 2 for n in shape), tuple(share * n / 2 for n in shape))

    def half_chord(self, axis: int, grid: Grid) -> FloatArray:
        r"""Return half the length of the body along the lines parallel to `axis`; 0 where they miss it.

        .. math:: a_{axis} \sqrt{1 - \sum_{i \ne axis} ((x_i - c_i) / a_i)^2}

        Broadcasts to the grid, with length 1 along `axis`.
        """
        scaled = [((x - c) / a) ** 2 for x, c, a in zip(grid, self.centre, self.semi_axes, strict=True)]
        rest = 1 - sum(square for i, square in enumerate(scaled) if i != axis)
        return np.asarray(self.semi_axes[axis] * np.sqrt(np.maximum(rest, 0)), np.float32)


@dataclass(frozen=True)
class Attenuation:
    r"""Light that is lost before the sheet reaches a voxel and before its emission reaches the objective.

    .. math:: T = e^{-l / L_{illumination}} \, e^{-d / L_{detection}}

    (Beer and Lambert), where :math:`l` is the length of the sheet's path through the body up to the voxel's
    centre, along y or x, and :math:`d` that of the emission out of the body towards the first plane. With sheets
    from both sides, each of them carries half of the light. Lengths are in voxels of the axis that light runs
    along; `in_micrometres` takes them from lengths in space.

    Where light goes straight and no matter scatters it back, this is what is left; haze is not modelled.
    """

    illumination: float = math.inf
    """Voxels after which a sheet has 1/e of its light left."""
    detection: float = math.inf
    """Voxels after which emission has 1/e of its light left; 2-D volumes have no such way."""
    sides: Sides = "low"
    """Where sheets come from: the first voxel of the axis (``"low"``), the last (``"high"``), or both."""
    axis: Literal["y", "x"] = "x"
    """Axis along which sheets run."""
    body: Ellipsoid | None = None
    """What attenuates; the whole volume by default."""

    def __post_init__(self) -> None:
        for name in ("illumination", "detection"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be a positive number of voxels, got {getattr(self, name)}")
        if self.sides not in ("low", "high", "both"):
            raise ValueError(f"`sides` must be 'low', 'high' or 'both', got {self.sides!r}")
        if self.axis not in ("y", "x"):
            raise ValueError(f"`axis` must be 'y' or 'x', the axes across the detection, got {self.axis!r}")

    @classmethod
    def in_micrometres(
        cls,
        illumination: float = math.inf,
        detection: float = math.inf,
        *,
        voxel_size: Sequence[float],
        **options: Any,
    ) -> Self:
        """Return the attenuation over lengths in micrometres, in an image of `voxel_size` (z, y, x).

        `options` are `sides`, `axis` and `body` (whose numbers are voxels).
        """
        along = voxel_size[-2 if options.get("axis", "x") == "y" else -1]
        return cls(illumination / along, detection / voxel_size[0], **options)

    def check(self, ndim: int) -> None:
        """Raise ValueError unless this can be used on volumes of `ndim` axes."""
        if ndim == 2 and math.isfinite(self.detection):
            raise ValueError("`detection` attenuates along z, and a 2-D volume has none; leave it out")
        if self.body is not None and len(self.body.centre) != ndim:
            raise ValueError(f"`body` has {len(self.body.centre)} axes but the volume has {ndim}")

    def transmission(self, grid: Grid, shape: Sequence[int]) -> FloatArray:
        """Return the share of light that is left at voxels of a volume of `shape`; float32, broadcasts to `grid`.

        It depends on the position alone, so no block changes it.
        """
        left: Any = np.float32(1)
        if math.isfinite(self.illumination):
            axis = len(shape) - (2 if self.axis == "y" else 1)
            before, after = self._paths(axis, grid, shape)
            sheets = {"low": (before,), "high": (after,), "both": (before, after)}[self.sides]
            left = sum(_decayed(path, self.illumination) for path in sheets) / np.float32(len(sheets))
        if math.isfinite(self.detection):
            left = left * _decayed(self._paths(0, grid, shape)[0], self.detection)
        return np.asarray(left, np.float32)

    def _paths(self, axis: int, grid: Grid, shape: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Return how deep the centres of voxels lie in the body, seen from the first voxel of an axis and the last."""
        position = grid[axis].astype(np.float32)
        if self.body is None:
            return position + np.float32(0.5), np.float32(shape[axis] - 0.5) - position
        half = self.body.half_chord(axis, grid)
        before = np.clip(position - np.float32(self.body.centre[axis]) + half, 0, 2 * half)
        return before, 2 * half - before

    def describe(self) -> dict[str, Any]:
        """Return the parameters as JSON-compatible values; an infinite length is None."""
        return {
            key: None if isinstance(value, float) and math.isinf(value) else value
            for key, value in asdict(self).items()
        }


def _decayed(path: FloatArray, length: float) -> FloatArray:
    return np.asarray(np.exp(path * np.float32(-1 / length)), np.float32)

"""Touching objects split by a watershed that is the same for every block grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, BlockGrid, Halo, Slices
from chunkrestore.kernels.crossings import crossing_links, crossing_table, steps
from chunkrestore.kernels.gaussian import gaussian, gaussian_radius
from chunkrestore.operators.base import Array, Table, check_image
from chunkrestore.operators.smoothing import checked_lengths
from chunkrestore.operators.threshold import Foreground, LocalThreshold
from chunkrestore.statistics import NonFiniteError, of_array

Rows: TypeAlias = Mapping[str, np.ndarray]
"""A table that is not changed."""

_LANDSCAPES = ("distance", "intensity")

_VOXEL_NBYTES = 60
"""Peak of `detect` per voxel on noise: heights, pointers and labels, and the table while it is made."""


@dataclass(frozen=True)
class Watershed(Foreground):
    """Segment what is above a threshold, and split objects that touch, each at the pass between two summits.

    Foreground is what lies above the threshold, as for `Threshold`. Heights are the distance to the background (or the
    intensity), smoothed. Every foreground voxel points up the steepest slope to one of its neighbours (up to 26); a
    summit points on across the highest pass around it to a higher voxel that is connected to it within
    `min_distance`, if there is one. Voxels whose ways end at the same summit are an object: a watershed by steepest
    ascent with the summits as seeds (topographic distance: Meyer, Signal Processing 38:113, 1994; drops of water:
    Cousty et al., IEEE Trans. Pattern Anal. Mach. Intell. 31:1362, 2009).

    No voxel's pointer depends on anything farther away than the halo, and ties are broken by position, so every block
    finds the pointers of the whole volume, and objects are what they tie together: the same labels, ids included, for
    every block grid. Ids run from 1 in raster order of first voxels. (Flooding a volume from markers in one order, as
    scikit-image does, cannot be cut into blocks. Where objects meet both differ by about a voxel.)

    Parameters
    ----------
    value, percentile, local
        The threshold, as for `Threshold`; Otsu's by default.
    min_distance
        Summits that are connected within this length belong to one object: somewhat less than the radius of the
        smallest objects.
    max_distance
        Where heights end to grow: the radius of the largest objects; None for 3 times `min_distance`. Longer ones are
        not cut in pieces for it as long as they are convex, but necks in them are not seen. Halos grow with it. Not
        used for intensities.
    landscape
        ``"distance"``: objects are split at necks of their form; ``"intensity"``: at dark seams.
    smoothing
        Standard deviation of the Gaussian that heights are smoothed with, 0 for none; None for a third of
        `min_distance`.
    voxel_size
        Micrometres per axis. All lengths are in micrometres then; otherwise in voxels, which are taken as cubes.

    Raises
    ------
    ValueError
        If a parameter is out of its range.

    Notes
    -----
    Halo: twice `min_distance`, the smoothing's 4 standard deviations, `max_distance`, and the local threshold's window.
    Loops are compiled by numba, which the extras ``dl`` and ``tables`` install.

    Examples
    --------
    >>> import numpy as np
    >>> two_discs = np.zeros((1, 9, 20), np.uint8)
    >>> for centre in (5, 13):
    ...     y, x = np.ogrid[:9, :20]
    ...     two_discs[0, (y - 4) ** 2 + (x - centre) ** 2 < 20] = 1
    >>> Watershed(0.5, min_distance=4)(two_discs)[0, 4]
    array([0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0],
          dtype=int32)
    """

    value: float | None = None
    _: KW_ONLY
    min_distance: float = 4.0
    max_distance: float | None = None
    landscape: str = "distance"
    smoothing: float | None = None
    percentile: float | None = None
    local: LocalThreshold | None = None
    voxel_size: tuple[float, ...] | None = None

    name = "watershed"

    def __post_init__(self) -> None:
        self._check_foreground()
        for name in ("min_distance", "max_distance"):
            length = getattr(self, name)
            if length is not None and not 0 < length < math.inf:
                raise ValueError(f"`{name}` must be finite and above 0, got {length}")
        if self.smoothing is not None and not 0 <= self.smoothing < math.inf:
            raise ValueError(f"`smoothing` must be finite and at least 0, got {self.smoothing}")
        if self.landscape not in _LANDSCAPES:
            raise ValueError(f"`landscape` must be 'distance' or 'intensity', got {self.landscape!r}")
        if self.voxel_size is not None:
            object.__setattr__(self, "voxel_size", checked_lengths("voxel_size", tuple(self.voxel_size)))

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed, `ImportError` without numba."""
        check_image(shape, dtype)
        self._spacing(len(shape))
        self._window_radius(len(shape))
        try:
            import numba  # noqa: F401
        except ImportError:
            raise ImportError(
                'a watershed is compiled by numba: pip install "chunkrestore[tables]"'
            ) from None

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return what pointers across the core's border depend on."""
        ndim = len(shape)
        smooth, window = gaussian_radius(self._sigma(ndim)), self._window_radius(ndim)
        if self.landscape == "distance":
            around = [s + d + w for s, d, w in zip(smooth, self._far(ndim), window, strict=True)]
        else:
            around = [max(s, w) for s, w in zip(smooth, window, strict=True)]
        return Halo(tuple(2 * p + a for p, a in zip(self._steps(ndim), around, strict=True)))

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect`."""
        return max(_VOXEL_NBYTES, self._mask_nbytes) * math.prod(read_shape)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {"operator": self.name} | {
            **self._described_foreground(),
            "min_distance": self.min_distance,
            "max_distance": self._limit,
            "landscape": self.landscape,
            "smoothing": self._smoothing,
            "voxel_size": self.voxel_size,
        }

    def detect(self, image: Array, block: Block) -> Table:
        """Follow the pointers of the core; return its labels, and the pointers across its border.

        Raises
        ------
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        from chunkrestore.kernels.basins import follow, pointers

        host = to_numpy(image)
        if host.dtype.kind == "f" and not np.isfinite(host).all():
            raise NonFiniteError(f"{block} holds voxels that are NaN or infinite; replace them first")
        near, height = self._height(host, block)
        # Pointers into the core count as well: the neighbour that they begin in finds the same ones.
        region = _three_dimensional(replace(near, core=_grown(near, self._steps(host.ndim)).read)).trim
        deep = _three_dimensional(near)
        pointer = pointers(
            height.reshape(deep.read_shape),
            region,
            _leading(self._spacing(host.ndim), 1.0),
            self.min_distance,
        )
        return crossing_table(follow(pointer, deep.trim), pointer, deep)

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece."""
        self.check(image.shape, image.dtype)
        operator = self.resolve(of_array(image, self.needs)) if self.needs else self
        block = Block.whole(image.shape)
        table = operator.detect(image, block)
        return operator.paint(block, [table | {"ids": np.argsort(np.argsort(table["key"])) + 1}])

    def show_reach(self, grid: BlockGrid) -> int:
        """Return 0: a core shows its own labels."""
        return 0

    def show(self, own: Rows, others: Sequence[Rows], block: Block) -> dict[str, np.ndarray]:
        """Return `own`."""
        return dict(own)

    def link_reach(self, grid: BlockGrid) -> int:
        """Return how many blocks away a pointer can lead."""
        return BlockGrid(grid.edges, Halo(self._steps(len(grid.shape)))).reach

    def links(self, own: Rows, other: Rows, block: Block, other_block: Block) -> np.ndarray:
        """Link labels that pointers tie together."""
        return crossing_links(own, other)

    @property
    def _limit(self) -> float:
        return 3.0 * self.min_distance if self.max_distance is None else float(self.max_distance)

    @property
    def _smoothing(self) -> float:
        return self.min_distance / 3 if self.smoothing is None else float(self.smoothing)

    def _spacing(self, ndim: int) -> tuple[float, ...]:
        if self.voxel_size is None:
            return (1.0,) * ndim
        if len(self.voxel_size) != ndim:
            raise ValueError(
                f"`voxel_size` {self.voxel_size} must have one number per axis of an image of {ndim} axes"
            )
        return self.voxel_size

    def _sigma(self, ndim: int) -> tuple[float, ...]:
        return tuple(self._smoothing / s for s in self._spacing(ndim))

    def _steps(self, ndim: int) -> tuple[int, ...]:
        """Return how many voxels away a pointer can lead."""
        return steps(self._spacing(ndim), self.min_distance)

    def _far(self, ndim: int) -> tuple[int, ...]:
        """Return how many voxels away background changes a distance."""
        return tuple(math.ceil(self._limit / s) for s in self._spacing(ndim))

    def _height(self, image: np.ndarray, block: Block) -> tuple[Block, np.ndarray]:
        """Return heights, minus infinity in the background, and the part of what `block` reads that they cover.

        Every step needs less around the core than the one before, and what it has made invalid is cut off.
        """
        ndim = image.ndim
        pointed = [2 * p for p in self._steps(ndim)]
        smoothed = [p + g for p, g in zip(pointed, gaussian_radius(self._sigma(ndim)), strict=True)]
        near = _grown(block, smoothed)
        mask = self._mask(image)
        if self.landscape == "intensity":
            height = image[_within(near, block)].astype(np.float32)
        else:
            from chunkrestore.kernels.distance import clipped_distance

            measured = _grown(block, [s + d for s, d in zip(smoothed, self._far(ndim), strict=True)])
            part = mask[_within(measured, block)]
            deep = np.ascontiguousarray(part.reshape(_leading(part.shape, 1)))
            distance = clipped_distance(deep, _leading(self._spacing(ndim), 1.0), self._limit)
            height = distance.reshape(part.shape)[_within(near, measured)]
        height = gaussian(height, self._sigma(ndim)) if self._smoothing else height.copy()
        height[~mask[_within(near, block)]] = -np.inf
        return near, height


def _grown(block: Block, depth: Sequence[int]) -> Block:
    """Return `block` reading no more than `depth` around its core."""
    read = tuple(
        slice(max(c.start - d, r.start), min(c.stop + d, r.stop))
        for c, r, d in zip(block.core, block.read, depth, strict=True)
    )
    return replace(block, read=read)


def _within(inner: Block, outer: Block) -> Slices:
    """Return what `inner` reads in the coordinates of what `outer` reads."""
    return replace(outer, core=inner.read).trim


def _leading(numbers: Sequence[Any], first: Any) -> tuple[Any, ...]:
    """Return three numbers: of an image without z, `first` for it."""
    return (*(first,) * (3 - len(numbers)), *numbers)


def _three_dimensional(block: Block) -> Block:
    """Return a block of one plane for a block of an image without z; its voxels have the same raster indices."""
    return Block(
        _leading(block.core, slice(0, 1)),
        _leading(block.read, slice(0, 1)),
        _leading(block.volume_shape, 1),
        block.index,
    )

"""What a StarDist network sees in a block: which part of the volume, at which scale, and the candidates there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.network import NetworkGeometry, network_nbytes, stardist_geometry
from chunkrestore.kernels.rescale import Rescaling, checked_scale
from chunkrestore.kernels.star_convex import at_points, candidate_table, library, own_points
from chunkrestore.operators.base import Array, Table
from chunkrestore.operators.network import NetworkOperator

_FEW_CANDIDATES = 2**18
"""So many are never refused: three copies of them take some 300 MiB, with 96 rays."""

_LONGEST_AXIS = 2**18
# StarDist computes with float32 coordinates, which resolve 1/64 voxel up to here.


class StarDetection(NetworkOperator):
    """Base of a frozen dataclass with the fields named here."""

    prob_thresh: float | None
    scale: float | Sequence[float] | None
    skip_below: float | None
    candidate_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.candidate_share <= 1:
            raise ValueError(f"`candidate_share` must be above 0 and at most 1, got {self.candidate_share}")
        if self.skip_below is not None:
            if not math.isfinite(self.skip_below):
                raise ValueError(f"`skip_below` must be a finite intensity or None, got {self.skip_below}")
            object.__setattr__(self, "skip_below", float(self.skip_below))
        object.__setattr__(self, "scale", checked_scale(self.scale, self._config.n_dim))

    @property
    def _geometry(self) -> NetworkGeometry:
        return stardist_geometry(self._config)

    @property
    def n_classes(self) -> int:
        """Classes that the model tells apart, without background; 0 if it knows none."""
        return self._config.n_classes or 0

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        super().check(shape, dtype)
        zoomed = self._rescaling(shape).zoomed_shape
        if min(zoomed) < 1:
            raise ValueError(
                f"`scale` {self.scale} leaves {zoomed} points of an image of shape {tuple(shape)}; every axis "
                "needs at least 1"
            )
        if max(*shape, *zoomed) > _LONGEST_AXIS:
            raise ValueError(
                f"`image` has shape {tuple(shape)}, {zoomed} at `scale` {self.scale}; StarDist's coordinates are "
                f"accurate up to {_LONGEST_AXIS} voxels per axis, crop the image"
            )

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return the receptive field: on the pooling grid, or wide enough for that grid in the zoomed volume."""
        halo = super().halo(shape)
        return halo if self.scale is None else self._rescaling(shape).halo(halo)

    def _check_channels(self, config: SimpleNamespace) -> None:
        """Take any number of channels."""

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect`: the prepared image, and then the network or its candidates.

        Three float32 per voxel of the image (converted, padded, handed over), and one of a copy to zoom; the
        feature maps, or the network's outputs and three copies of those of candidates (masked, limited, sorted), of
        which there are at most `candidate_share` of the points. Crowded nuclei give one point in ten.
        """
        config = self._config
        zoomed, n_voxels = tuple(read_shape), 0
        if self.scale is not None:
            zoomed = tuple(math.ceil(n * s) + 1 for n, s in zip(read_shape, self.scale, strict=True))  # type: ignore[arg-type]
            n_voxels = math.prod(read_shape)
        padded = self._padded_shape(zoomed)
        n_points = math.prod(padded) // math.prod(config.grid)
        n_columns = config.n_rays + 1 + (0 if config.n_classes is None else config.n_classes + 1)
        candidates_nbytes = 4 * n_columns * (n_points + 3 * min(n_points, self._n_accepted(n_points)))
        image_nbytes = 4 * config.n_channel_in * (n_voxels + 3 * math.prod(padded))
        return max(network_nbytes(config, padded), candidates_nbytes) + image_nbytes

    def detect(self, image: Array, block: Block) -> Table:
        """Find the candidates in the core.

        Parameters
        ----------
        image
            NumPy or CuPy array that covers ``block.read``, with a last axis of channels if the network takes
            several; uint8, uint16, int16 or float32. Not modified.
        block
            Where it lies.

        Returns
        -------
        dict
            ``prob`` (float32), ``dist`` (float32, n_rays), ``points`` (int64, voxels of the volume, or points of
            the zoomed one with `scale`); ``class_prob`` (float32, n_classes + 1) of a network with classes, of
            which the class is the largest, 0 being background.

        Raises
        ------
        ValueError
            If the block's read region is off the pooling grid or less than the core plus the halo, the
            normalisation is not decided, or there are more candidates than `candidate_share` allows.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        host = self._checked(image, block)
        rescaling = self._rescaling(block.volume_shape)
        # The block as the network sees it: of the zoomed volume, with `scale`.
        seen = block if self.scale is None else rescaling.block(block, super().halo(block.volume_shape))
        points = own_points(seen, self._config.grid, self._padded_shape(seen.volume_shape))
        eligible: np.ndarray = np.broadcast_to(True, tuple(map(len, points)))
        if self.skip_below is not None:
            voxels = zip(rescaling.nearest_voxels(points), block.read, strict=True)
            bright = host[np.ix_(*(v - read.start for v, read in voxels))] > self.skip_below
            eligible = np.any(np.reshape(bright, (*eligible.shape, self.n_channels)), axis=-1)
        library()
        if eligible.any():
            normalized = self._normalize(host)
            zoomed = normalized if self.scale is None else rescaling.zoom(normalized, block.read, seen.read)
            outputs = self._run(self._padded(zoomed, seen))
        else:
            outputs = self._no_outputs(seen)
        origin = [r.start for r in seen.read]
        prob, dist, *classes = (at_points(output, points, origin) for output in outputs)
        mask = (prob[..., 0] > self.prob_thresh) & eligible
        self._check_number(int(np.count_nonzero(mask)), mask.size, block)
        return candidate_table(mask, points, prob[..., 0], dist, *classes)

    def _rescaling(self, shape: Sequence[int]) -> Rescaling:
        return Rescaling(tuple(shape), self.scale or (1.0,) * len(shape))  # type: ignore[arg-type]

    def _no_outputs(self, block: Block) -> tuple[np.ndarray, ...]:
        """Return what a network returns for `block` that sees nothing there; takes no memory."""
        config = self._config
        on_grid = [n // g for n, g in zip(self._padded_shape(block.read_shape), config.grid, strict=True)]
        n_channels = [1, config.n_rays] + ([] if config.n_classes is None else [config.n_classes + 1])
        return tuple(np.broadcast_to(np.float32(0), (*on_grid, n)) for n in n_channels)

    def _n_accepted(self, n_points: int) -> int:
        """Return how many of a block's points may be candidates."""
        return max(_FEW_CANDIDATES, int(self.candidate_share * n_points))

    def _check_number(self, n_candidates: int, n_points: int, block: Block) -> None:
        limit = self._n_accepted(n_points)
        if n_candidates > limit:
            raise ValueError(
                f"{block}: {n_candidates} of {n_points} points ({n_candidates / n_points:.0%}) score more than "
                f"`prob_thresh` {self.prob_thresh:g}, at most {limit} may; a network that finds objects everywhere "
                f"usually sees noise or intensities that it was not trained on: check `normalization` "
                f"{self.normalization}, raise `prob_thresh`, or, for objects that crowded, raise "
                f"`candidate_share` {self.candidate_share:g}"
            )

    def _padded(self, normalized: np.ndarray, block: Block) -> np.ndarray:
        """Reflect at the end of the volume, as StarDist pads the whole volume."""
        padded = self._padded_shape(block.volume_shape)
        missing = [
            (0, (m - n) * last)
            for m, n, (_, last) in zip(padded, block.volume_shape, block.at_border, strict=True)
        ]
        return np.pad(normalized, missing + [(0, 0)] * (normalized.ndim - len(missing)), mode="reflect")

    def _padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // a) * a for n, a in zip(shape, self._geometry.align, strict=True))

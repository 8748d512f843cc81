"""Instance segmentation with a trained StarDist network, block by block as if in one piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from chunkrestore import models
from chunkrestore.grid import Block
from chunkrestore.kernels.network import NetworkGeometry, network_nbytes, run_network, stardist_geometry
from chunkrestore.kernels.star_convex import Rays, candidates, library, ranks, suppress
from chunkrestore.kernels.star_painting import paint
from chunkrestore.kernels.star_settling import SLACK, settle
from chunkrestore.operators.base import Array, Table, labels_dtype
from chunkrestore.operators.network import NetworkOperator
from chunkrestore.statistics import of_array

_LONGEST_AXIS = 2**18
# StarDist computes with float32 coordinates, which resolve 1/64 voxel up to here.


@dataclass(frozen=True)
class StarDist(NetworkOperator):
    """Segment nuclei (or other star-convex objects) with a StarDist network, 2-D or 3-D.

    The same objects, voxel by voxel, as ``predict_instances`` on the whole normalised volume with
    ``n_tiles=None``, for every block grid: no object is cut, merged or lost at a block's border, however
    many blocks it spans. The order of label ids is by position (z, y, x of the point that an object was
    predicted from), from 1.

    Parameters
    ----------
    model
        Folder of a trained StarDist2D or StarDist3D model, name of a shipped model (``"stardist3d-demo"``),
        or a model object that is saved in a folder. One channel in; classes are ignored.
    prob_thresh, nms_thresh
        Thresholds of object probability and of overlap; None takes the model's own.
    normalization
        Input intensities (low, high) that the network sees as 0 and 1; None takes `percentiles`.
    percentiles
        Percentiles of the whole volume and channel that give `normalization`.
    depth
        Halo in voxels, one number or one per axis; None takes the network's receptive field, which is also
        the smallest depth accepted. The size of objects does not matter.
    digest
        Digest that the model must have (`chunkrestore.models.digest`); None takes the one it has now. A
        process that later loads another model from the same place raises.

    Raises
    ------
    ValueError
        If the model is missing or not a StarDist model, or another parameter is out of its range.

    Notes
    -----
    Two things may differ from ``predict_instances``. Ids: it numbers by score, and closes the gap that an
    object without any visible voxel leaves; here such an object keeps its number and labels are distinct,
    not always gap-free. Ties: it decides between overlapping candidates of exactly equal score at random,
    here position decides.

    References
    ----------
    Weigert et al., WACV (2020), doi:10.1109/WACV45572.2020.9093435; Schmidt et al., MICCAI (2018).
    """

    model: Any
    _: KW_ONLY
    prob_thresh: float | None = None
    nms_thresh: float | None = None
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    depth: int | Sequence[int] | None = None
    digest: str | None = None

    name = "stardist"
    paint_reads_image = False

    _kinds: ClassVar[tuple[models.Kind, ...]] = ("stardist2d", "stardist3d")

    def __post_init__(self) -> None:
        super().__post_init__()
        own = models.thresholds(self.model)
        for name, default in zip(("prob_thresh", "nms_thresh"), own, strict=True):
            given = getattr(self, name)
            value = default if given is None else float(given)
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and less than 1, got {given}")
            object.__setattr__(self, name, value)

    @property
    def _geometry(self) -> NetworkGeometry:
        return stardist_geometry(self._config)

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        super().check(shape, dtype)
        if max(shape) > _LONGEST_AXIS:
            raise ValueError(
                f"`image` has shape {tuple(shape)}; StarDist's coordinates are accurate up to {_LONGEST_AXIS} "
                "voxels per axis, crop the image"
            )

    def _check_channels(self, config: SimpleNamespace) -> None:
        if config.n_channel_in != 1:
            raise ValueError(
                f"`model` {self.model} takes {config.n_channel_in} channels; only models with one channel "
                "in can be used"
            )

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect`: the prepared image, and then the network or its candidates.

        Three float32 per voxel of the image (converted, padded, handed over); the feature maps, or the
        distances and three copies of those of candidates (masked, limited, sorted), as long as at most one
        point of the prediction grid in four is a candidate. Crowded nuclei give one in ten.
        """
        config = self._config
        padded = self._padded_shape(read_shape)
        n_points = math.prod(padded) // math.prod(config.grid)
        candidates_nbytes = 7 * n_points * (config.n_rays + 1)
        return max(network_nbytes(config, padded), candidates_nbytes) + 3 * 4 * math.prod(padded)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {
            "operator": self.name,
            "model": models.folder(self.model).name,
            "model_digest": self.digest,
            "prob_thresh": self.prob_thresh,
            "nms_thresh": self.nms_thresh,
            "normalization": None if self.normalization is None else list(self.normalization),
            "percentiles": list(self.percentiles),
            "depth": None if self.depth is None else list(self.depth),  # type: ignore[arg-type]
        }

    def detect(self, image: Array, block: Block) -> Table:
        """Find the candidates in the core, and which of them survive among themselves.

        Parameters
        ----------
        image
            NumPy or CuPy array that covers ``block.read``; uint8, uint16, int16 or float32. Not modified.
        block
            Where it lies.

        Returns
        -------
        dict
            ``prob`` (float32), ``dist`` (float32, n_rays), ``points`` (int64, voxels of the volume);
            ``kept0`` (bool): survives among these; ``kept`` (bool): the present decision, the same here.

        Raises
        ------
        ValueError
            If the block's read region is off the pooling grid or less than the core plus the halo, or the
            normalisation is not decided.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        normalized = self._normalized(image, block)
        library()
        prob, dist = run_network(self._network(), self._padded(normalized, block)[..., np.newaxis])[:2]
        table = candidates(
            prob[..., 0],
            dist,
            self.prob_thresh,  # type: ignore[arg-type]
            grid=self._config.grid,
            origin=[r.start for r in block.read],
            core=block.core,
            padded_shape=self._padded_shape(block.volume_shape),
        )
        kept = suppress(table, self._rays, self.nms_thresh)  # type: ignore[arg-type]
        return table | {"kept0": kept, "kept": kept}

    def reach(self, tables: Sequence[Table]) -> int:
        """Return twice the largest radius of any candidate, within which two candidates may overlap."""
        largest = max((self._rays.radii(t["dist"]).max(initial=0.0) for t in tables), default=0.0)
        return math.ceil(2 * largest) + SLACK if largest else 0

    def settle(self, own: Table, others: Table, block: Block) -> Table:
        """Decide the block's candidates in the light of `others`, what survives around it at present."""
        return own | {"kept": settle(own, others, self._rays, self.nms_thresh)}  # type: ignore[arg-type]

    def survivors(self, table: Table) -> Table:
        """Return the candidates that survive at present: ``prob``, ``dist``, ``points``."""
        kept = table.get("kept", slice(None))
        return {key: table[key][kept] for key in ("prob", "dist", "points")}

    def number(self, tables: Mapping[tuple[int, ...], Table]) -> dict[tuple[int, ...], Table]:
        """Number all survivors by position; a block's table gets ``ids`` and ``rank``, the order of painting."""
        parts = [self.survivors(table) for table in tables.values()]
        whole = {key: np.concatenate([part[key] for part in parts]) for key in ("prob", "points")}
        ids = np.empty(len(whole["prob"]), np.int64)
        ids[np.lexsort(whole["points"].T[::-1])] = np.arange(1, len(ids) + 1)
        borders = np.cumsum([len(part["prob"]) for part in parts])[:-1]
        columns = zip(np.split(ids, borders), np.split(ranks(whole), borders), strict=True)
        return {
            index: part | {"ids": own_ids, "rank": rank}
            for index, part, (own_ids, rank) in zip(tables, parts, columns, strict=True)
        }

    def paint(self, image: Array | None, block: Block, numbered: Table) -> np.ndarray:
        """Return the labels of the core; where objects overlap, the better score shows."""
        ids = numbered["ids"]
        return paint(block.core, numbered | {"ids": ids.astype(labels_dtype(ids))}, self._rays)

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece."""
        self.check(image.shape, image.dtype)
        operator = self.resolve(of_array(image, self.needs)) if self.needs else self
        block = Block.whole(image.shape)
        numbered = operator.number({block.index: operator.detect(image, block)})
        return operator.paint(None, block, numbered[block.index])

    def _padded(self, normalized: np.ndarray, block: Block) -> np.ndarray:
        """Reflect at the end of the volume, as StarDist pads the whole volume."""
        padded = self._padded_shape(block.volume_shape)
        missing = [
            (0, (m - n) * last)
            for m, n, (_, last) in zip(padded, block.volume_shape, block.at_border, strict=True)
        ]
        return np.pad(normalized, missing, mode="reflect")

    def _padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // a) * a for n, a in zip(shape, self._geometry.align, strict=True))

    @property
    def _rays(self) -> Rays:
        return _rays(self.model, str(self.digest))


@lru_cache(maxsize=64)
def _rays(model: str, digest: str) -> Rays:
    """Return a model's rays; one object per model, since tables of directions are kept per object."""
    return Rays.of(models.config(model))

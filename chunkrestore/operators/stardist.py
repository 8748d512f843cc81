"""Instance segmentation with a trained StarDist network, block by block as if in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from chunkrestore import models
from chunkrestore.grid import Block
from chunkrestore.kernels.precision import Precision
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.operators.base import Array, Table, concatenate, labels_dtype
from chunkrestore.operators.intensities import Limits, of_channels
from chunkrestore.operators.star_detection import StarDetection


@dataclass(frozen=True)
class StarDist(StarDetection):
    """Segment nuclei (or other star-convex objects) with a StarDist network, 2-D or 3-D.

    The same objects, voxel by voxel, as ``predict_instances`` on the whole normalised volume with
    ``n_tiles=None``, for every block grid: no object is cut, merged or lost at a block's border, however
    many blocks it spans. The order of label ids is by position (z, y, x of the point that an object was
    predicted from), from 1.

    Parameters
    ----------
    model
        Folder of a trained StarDist2D or StarDist3D model, name of a shipped model (``"stardist3d-demo"``),
        or a model object that is saved in a folder. Channels that it takes together, such as those of an
        RGB image, are the last axis of what it is called on.
    prob_thresh, nms_thresh
        Thresholds of object probability and of overlap; None takes the model's own.
    normalization
        Input intensities (low, high) that the network sees as 0 and 1, or one such pair per channel; None takes
        `percentiles` of each channel.
    percentiles
        Percentiles of the whole volume and channel that give `normalization`.
    scale
        Points of the network's image per voxel, one number or one per axis: the volume is zoomed by it, by linear
        interpolation, before the network sees it, and objects are drawn at its own size, as StarDist's
        ``predict_instances(..., scale=scale)`` does. None leaves it as it is.
    skip_below
        Objects are predicted only from voxels above this input intensity (in any channel; with `scale` the voxel
        nearest to ``point / scale``), and where a core holds none the network is not run. That depends on voxels
        alone, so results are the same for every block grid. None skips nothing, as StarDist, which has no
        such option; a value below the darkest object centre changes no object.
    candidate_share
        Largest share of the points of a block's prediction that may be candidates, which memory is planned for. A
        block of noise with more (and more than 2**18) is refused before memory is taken.
    suppression
        How overlaps are judged: ``"exact"``, as StarDist's own routine judges every pair; ``"fast"``, by the
        share of common voxels throughout, which decides a few pairs near `nms_thresh` otherwise.
    class_names
        Names of the classes that the model tells apart, without background, in the order of ``class_id`` from 1 on.
    depth
        Halo in voxels of what the network sees (zoomed by `scale`), one number or one per axis; None takes the
        network's receptive field, which is also the smallest depth accepted. The size of objects does not matter.
    digest
        Digest that the model must have (`chunkrestore.models.digest`); None takes the one it has now. A
        process that later loads another model from the same place raises.
    precision
        What the network computes in: ``"float32"``, or ``"mixed_float16"`` or ``"mixed_bfloat16"`` as Keras
        means them. Then scores differ by up to 0.007 and distances by up to 0.1 voxel: of 416 nuclei none was
        lost and at most one was new. For GPUs, where it was not run yet; on CPUs bfloat16 helps those with
        instructions for it, and float16 is about ten times slower.

    Raises
    ------
    ValueError
        If the model is missing or not a StarDist model, or another parameter is out of its range.

    Notes
    -----
    Two things may differ from ``predict_instances``. Ids: it numbers by score, here position decides; in both an
    object that others cover wholly has none. Ties: it decides between overlapping candidates of exactly equal
    score at random, here position decides.

    References
    ----------
    Weigert et al., WACV (2020), doi:10.1109/WACV45572.2020.9093435; Schmidt et al., MICCAI (2018).
    """

    model: Any
    _: KW_ONLY
    prob_thresh: float | None = None
    nms_thresh: float | None = None
    scale: float | Sequence[float] | None = None
    skip_below: float | None = None
    candidate_share: float = 0.25
    suppression: str = "exact"
    class_names: Sequence[str] | None = None
    normalization: Limits | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    depth: int | Sequence[int] | None = None
    digest: str | None = None
    precision: Precision = "float32"

    name = "stardist"

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
        if self.suppression not in ("exact", "fast"):
            raise ValueError(f"`suppression` must be 'exact' or 'fast', got {self.suppression!r}")
        object.__setattr__(self, "class_names", checked_names(self.class_names, self.n_classes))

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {
            "operator": self.name,
            "model": models.folder(self.model).name,
            "model_digest": self.digest,
            "prob_thresh": self.prob_thresh,
            "nms_thresh": self.nms_thresh,
            "scale": None if self.scale is None else list(self.scale),  # type: ignore[arg-type]
            "skip_below": self.skip_below,
            "suppression": self.suppression,
            "class_names": None if self.class_names is None else list(self.class_names),
            "normalization": None if self.normalization is None else np.array(self.normalization).tolist(),
            "percentiles": list(self.percentiles),
            "depth": None if self.depth is None else list(self.depth),  # type: ignore[arg-type]
            "precision": self.precision,
        }

    def decide(self, table: Table) -> Table:
        """Return the table with ``kept0`` (bool, survives among these) and ``kept`` (the present decision)."""
        from chunkrestore.kernels.star_suppression import suppress

        kept = suppress(table, self.rays, self.nms_thresh, self.suppression)  # type: ignore[arg-type]
        return table | {"kept0": kept, "kept": kept}

    def radius(self, table: Table) -> float | None:
        """Return how far any row reaches around its point, in voxels, rounding included; None without rows."""
        from chunkrestore.kernels.star_settling import SLACK

        if not len(table["prob"]):
            return None
        # The slack is in points of what the network sees, which are larger than voxels where it is zoomed out.
        voxels = np.array(self.rescale or (1.0,) * self._config.n_dim)
        rays = Rays(self.rays.vertices * voxels, self.rays.faces)
        return float(rays.radii(table["dist"]).max()) + SLACK / 2 * max(1.0, voxels.max())

    def settle(self, own: Table, others: Table, block: Block) -> Table:
        """Decide the block's candidates in the light of `others`, what survives around it at present."""
        from chunkrestore.kernels.star_settling import settle

        kept = settle(own, others, self.rays, self.nms_thresh, self.suppression)  # type: ignore[arg-type]
        return own | {"kept": kept}

    def survivors(self, table: Table) -> Table:
        """Return the candidates that survive at present, without the columns about decisions."""
        return {key: rows[table["kept"]] for key, rows in table.items() if key not in ("kept0", "kept")}

    def within(self, survivors: Table, block: Block, distance: float) -> Table:
        """Return the rows whose points lie within `distance` voxels of the core, on every axis."""
        voxels = survivors["points"] * np.array(self.rescale or (1.0,) * len(block.core))
        first, last = np.array([(c.start, c.stop - 1) for c in block.core]).T
        near = (np.maximum(first - voxels, voxels - last) <= distance).all(axis=-1)
        return {key: rows[near] for key, rows in survivors.items()}

    def measure(self, own: Table, others: Table, block: Block) -> Table:
        """Return the survivors that show in at least one voxel, with what painting will make of them.

        Returns
        -------
        dict
            The columns of `own`; ``key`` (int64): raster index in the volume of the point, the order of ids;
            ``volume`` (int64): voxels; ``sum`` (int64, ndim): of their coordinates; ``first`` and ``last``
            (int64, ndim): corners of the box around them.
        """
        from chunkrestore.kernels.star_measuring import measure

        both = [own, others] if others else [own]
        rows = {key: np.concatenate([part[key] for part in both]) for key in ("prob", "dist", "points")}
        is_own = np.arange(len(rows["prob"])) < len(own["prob"])
        measured = measure(rows, is_own, self.rays, block.volume_shape, self.rescale)
        lattice = self._rescaling(block.volume_shape).zoomed_shape
        key = np.ravel_multi_index(tuple(own["points"].T), lattice).astype(np.int64)
        shows = measured["volume"] > 0
        return {name: column[shows] for name, column in (own | {"key": key} | measured).items()}

    def paint(self, block: Block, numbered: Sequence[Table]) -> np.ndarray:
        """Return the labels of the core; where objects overlap, the better score shows."""
        from chunkrestore.kernels.star_painting import paint

        if not numbered:
            return np.zeros(block.core_shape, np.int32)
        rows = concatenate(numbered)
        rows |= {"ids": rows["ids"].astype(labels_dtype(rows["ids"]))}
        return paint(block.core, rows, self.rays, self.rescale)

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece."""
        shape = image.shape[: self._config.n_dim] if self.n_channels > 1 else image.shape
        self.check(shape, image.dtype)
        operator = self.resolve(of_channels(image, self.needs, self.n_channels)) if self.needs else self
        block = Block.whole(shape)
        decided = operator.decide(operator.detect(image, block))
        objects = operator.measure(operator.survivors(decided), {}, block)
        ids = np.argsort(np.argsort(objects["key"])) + 1
        return operator.paint(block, [objects | {"ids": ids}])

    @property
    def rescale(self) -> tuple[float, ...] | None:
        """Voxels per point of what the network sees, as StarDist computes them; None for one each."""
        return None if self.scale is None else tuple(1 / s for s in self.scale)  # type: ignore[union-attr]

    @property
    def rays(self) -> Rays:
        """The model's rays, in points of what the network sees."""
        return _rays(self.model, str(self.digest))


def checked_names(names: Sequence[str] | None, n_classes: int) -> tuple[str, ...] | None:
    """Return names of classes; raise `ValueError` unless there is one for each."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != n_classes or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"`class_names` {names!r} must be {n_classes} names, without one for the background")
    return tuple(names)


@lru_cache(maxsize=64)
def _rays(model: str, digest: str) -> Rays:
    """Return a model's rays; one object per model, since tables of directions are kept per object."""
    return Rays.of(models.config(model))

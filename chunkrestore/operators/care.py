"""Restoration with a trained CARE network, block by block as if in one piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from chunkrestore import models
from chunkrestore.backend import asarray_like, to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.network import care_geometry, network_nbytes, run_network
from chunkrestore.operators.base import Array, check_image
from chunkrestore.statistics import NonFiniteError, as_percentiles, of_array

_EPS = np.float32(1e-20)
# CSBDeep's guard against division by zero in `normalize_mi_ma`; kept so that results are the same.


@dataclass(frozen=True)
class Care:
    """Restore an image with a CARE network (content-aware image restoration).

    ``result = network((image - low) / (high - low)) * (high - low) + low``, with the network applied to the
    whole volume: what CSBDeep's ``CARE.predict`` returns with ``PercentileNormalizer`` and
    ``PadAndCropResizer``, to float rounding, for every block grid.

    Preserves: shape; intensities stay in input units. The result is float32.

    Parameters
    ----------
    model
        Folder of a trained CSBDeep CARE model, name of a shipped model (``"care3d-demo"``), or a CARE object
        that is saved in a folder. One channel in, one channel out; of a probabilistic model, the mean.
    normalization
        Input intensities (low, high) that the network sees as 0 and 1; None takes `percentiles`.
    percentiles
        Percentiles of the whole volume and channel that give `normalization`.
    depth
        Halo in voxels, one number or one per axis; None takes the network's receptive field, which is also
        the smallest depth accepted.
    digest
        Digest that the model must have (`chunkrestore.models.digest`); None takes the one it has now. A
        process that later loads another model from the same place raises.

    Raises
    ------
    ValueError
        If the model is missing or not a CARE model, or another parameter is out of its range.

    References
    ----------
    Weigert et al., Nat. Methods 15:1090 (2018).
    """

    model: Any
    _: KW_ONLY
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (2.0, 99.8)
    depth: int | Sequence[int] | None = None
    digest: str | None = None

    name = "care"

    def __post_init__(self) -> None:
        models.kind(self.model, "care")
        low, high = (float(p) for p in self.percentiles)
        if not 0 <= low < high <= 100:
            raise ValueError(f"`percentiles` must rise within 0 to 100, got {self.percentiles}")
        object.__setattr__(self, "percentiles", (low, high))
        if self.normalization is not None:
            low, high = (float(v) for v in self.normalization)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"`normalization` must be two finite numbers low < high, got {low, high}")
            object.__setattr__(self, "normalization", (low, high))
        object.__setattr__(self, "model", models.reference(self.model))
        object.__setattr__(self, "digest", models.check_digest(self.model, self.digest))
        if self.depth is not None:
            object.__setattr__(self, "depth", self._checked_depth(self.depth))

    @property
    def needs(self) -> frozenset[float | str]:
        """Both percentiles, until `normalization` is known."""
        return frozenset() if self.normalization is not None else frozenset(self.percentiles)

    def resolve(self, statistics: Mapping[float | str, float]) -> Self:
        """Return this operator with its normalisation decided."""
        if self.normalization is not None:
            return self
        return replace(self, normalization=as_percentiles(statistics, self.percentiles))

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        config = self._config
        axes = config.axes.replace("C", "")
        if axes not in ("YX", "ZYX"):
            raise ValueError(f"`model` {self.model} has axes {axes}; only YX and ZYX can be used")
        if len(shape) != len(axes):
            raise ValueError(
                f"`model` {self.model} works on axes {axes.lower()} but the image has {len(shape)} spatial "
                f"axes; use a model trained on {len(shape)}-D images"
            )
        check_image(shape, dtype)
        if (config.n_channel_in, config.n_channel_out) != (1, 1):
            raise ValueError(
                f"`model` {self.model} maps {config.n_channel_in} to {config.n_channel_out} channels; only "
                "models with one channel in and one channel out can be used"
            )

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return the receptive field on the pooling grid of the whole volume, as CSBDeep pads it."""
        geometry = care_geometry(self._config)
        offset = tuple(before for before, _ in self._padding(shape))
        depth = geometry.depth if self.depth is None else self.depth
        return Halo(tuple(depth), geometry.align, offset)  # type: ignore[arg-type]

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """The network's feature maps, and the image before and after (4 float32 per voxel)."""
        padded = [n + sum(p) for n, p in zip(read_shape, self._padding(read_shape), strict=True)]
        return network_nbytes(self._config, padded) + 4 * 4 * math.prod(padded)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {
            "operator": self.name,
            "model": models.folder(self.model).name,
            "model_digest": self.digest,
            "normalization": None if self.normalization is None else list(self.normalization),
            "percentiles": list(self.percentiles),
            "depth": None if self.depth is None else list(self.depth),  # type: ignore[arg-type]
        }

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Restore one block, or the whole volume.

        Parameters
        ----------
        image
            NumPy or CuPy array that covers ``block.read``; uint8, uint16, int16 or float32. Not modified.
        block
            Where it lies; None: `image` is the whole volume, and percentiles are taken from it if needed.

        Returns
        -------
        array
            float32, same shape and namespace, in input intensities; valid on the block's core.

        Raises
        ------
        ValueError
            If the block's read region is off the pooling grid or less than the core plus the halo, or the
            normalisation is not decided.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        if block is None:
            self.check(image.shape, image.dtype)
            whole = Block.whole(image.shape)
            return (self.resolve(of_array(image, self.needs)) if self.needs else self)(image, whole)
        if self.normalization is None:
            raise ValueError(
                "`normalization` is not decided; call `resolve` with the whole volume's percentiles"
            )
        self._check_block(tuple(image.shape), block)
        host = to_numpy(image)
        if host.dtype.kind == "f" and not np.isfinite(host).all():
            raise NonFiniteError(f"{block} holds voxels that are NaN or infinite; replace them first")
        return asarray_like(self._restored(host, block), image)

    def _restored(self, image: np.ndarray, block: Block) -> np.ndarray:
        """Normalise, pad at the volume's border, run, crop, and undo the normalisation, all in float32."""
        low, high = np.array(self.normalization, np.float32)
        padding = [
            (before * first, after * last)
            for (before, after), (first, last) in zip(
                self._padding(block.volume_shape), block.at_border, strict=True
            )
        ]
        normalized = image.astype(np.float32)
        normalized -= low
        normalized /= high - low + _EPS
        # The same reflection as of the whole volume: the depth exceeds the padding.
        padded = np.pad(normalized, padding, mode="reflect")
        network = models.load(self.model, expected_digest=self.digest).keras_model
        crop = tuple(slice(before, before + n) for (before, _), n in zip(padding, image.shape, strict=True))
        # A probabilistic network's channels are mean and scale.
        result: np.ndarray = run_network(network, padded[..., np.newaxis])[0][..., 0][crop] * (high - low)
        result += low
        return result

    @property
    def _config(self) -> SimpleNamespace:
        return _config(self.model, str(self.digest))

    def _padding(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return how CSBDeep pads a volume to the pooling grid: split, the larger half at the end."""
        align = care_geometry(self._config).align
        missing = [-n % a for n, a in zip(shape, align, strict=True)]
        return [(m // 2, m - m // 2) for m in missing]

    def _checked_depth(self, depth: int | Sequence[int]) -> tuple[int, ...]:
        least = care_geometry(self._config).depth
        given = (depth,) * len(least) if isinstance(depth, int) else tuple(depth)
        if len(given) != len(least) or any(d < n for d, n in zip(given, least, strict=False)):
            raise ValueError(
                f"`depth` {depth} is less than what the network looks at: at least {least} is needed for the "
                "tiled result to equal the untiled one"
            )
        return given

    def _check_block(self, image_shape: tuple[int, ...], block: Block) -> None:
        if image_shape != block.read_shape:
            raise ValueError(f"`image` has shape {image_shape} but {block} reads {block.read_shape}")
        halo = self.halo(block.volume_shape)
        needed = halo.read(block.core, block.volume_shape)
        for axis, (read, least) in enumerate(zip(block.read, needed, strict=True)):
            n, align, offset = block.volume_shape[axis], halo.align[axis], halo.offset[axis]
            if any((edge + offset) % align for edge in (read.start, read.stop) if 0 < edge < n):
                raise ValueError(
                    f"{block} reads {read.start}:{read.stop} on axis {axis}, off the network's pooling grid: "
                    f"borders must be multiples of {align}, less {offset}; use `halo(shape)` of this operator"
                )
            if read.start > least.start or read.stop < least.stop:
                raise ValueError(
                    f"{block} reads {read.start}:{read.stop} on axis {axis}, but its core needs "
                    f"{least.start}:{least.stop}; use `halo(shape)` of this operator"
                )


@lru_cache(maxsize=64)
def _config(model: str, digest: str) -> SimpleNamespace:
    """Return a model's configuration; the digest is part of the cache's key."""
    return models.config(model)

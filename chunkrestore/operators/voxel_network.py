"""Networks that predict numbers for every voxel, such as probabilities of classes: what operators with one share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from chunkrestore import models
from chunkrestore.grid import Block
from chunkrestore.kernels.keras_geometry import KerasGeometry, keras_geometry
from chunkrestore.kernels.network import NetworkGeometry, network_nbytes, stardist_geometry
from chunkrestore.operators.base import Array
from chunkrestore.operators.intensities import of_channels
from chunkrestore.operators.network import NetworkOperator
from chunkrestore.operators.stardist import checked_names

_MOST_CLASSES = 255
"""What an 8-bit label image holds beside the background."""

_GUESSED_NBYTES = 4 * 6 * 64
"""Of a network whose layers cannot be followed, per voxel: a U-Net with 64 channels at full resolution."""


class VoxelNetwork(NetworkOperator):
    """Base of frozen dataclasses with the fields named here: a network with an output per voxel, of Keras or StarDist.

    Volumes are padded at their end by reflection to whole cells of the pooling grid, as StarDist does it. Points of
    StarDist's grid lie on voxels 0, g, 2 g ...; a voxel takes what is predicted for the nearest of them, of two the
    first.
    """

    class_names: Sequence[str] | None
    align: int | Sequence[int] | None

    _kinds: ClassVar[tuple[models.Kind, ...]] = ("keras", "stardist2d", "stardist3d")

    def __post_init__(self) -> None:
        models.kind(self.model, *self._kinds)
        if self.align is not None:
            for name, value in zip(("depth", "align"), self._checked_grid(), strict=True):
                object.__setattr__(self, name, value)
        super().__post_init__()
        check_n_classes(self.n_classes, self.model)
        object.__setattr__(self, "class_names", checked_names(self.class_names, self.n_classes))

    @property
    def n_classes(self) -> int:
        """Classes that the model tells apart, without background."""
        if not self._is_keras:
            return self._config.n_classes or 0
        if self._known is None:
            return len(self.class_names or ())
        return max(self._known.n_channels - 1, 1)

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak: the prepared image and its copies, and the network's tensors (`KerasGeometry`)."""
        padded = self._padded_shape(read_shape)
        images = 4 * (3 * self.n_channels + 2) * math.prod(padded)
        if not self._is_keras:
            return network_nbytes(self._config, padded) + images
        per_voxel = _GUESSED_NBYTES if self._known is None else self._known.voxel_nbytes
        return per_voxel * math.prod(padded) + images

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the model's digest."""
        return {
            "operator": self.name,
            "model": models.folder(self.model).name,
            "model_digest": self.digest,
            "class_names": None if self.class_names is None else list(self.class_names),
            "normalization": None if self.normalization is None else np.array(self.normalization).tolist(),
            "percentiles": list(self.percentiles),
            "depth": None if self.depth is None else list(self.depth),  # type: ignore[arg-type]
            "align": None if self.align is None else list(self.align),  # type: ignore[arg-type]
            "precision": self.precision,
        }

    def __call__(self, image: Array, block: Block | None = None) -> np.ndarray:
        """Process one block, or the whole volume.

        Parameters
        ----------
        image
            NumPy or CuPy array that covers ``block.read``, with a last axis of channels if the network takes several;
            uint8, uint16, int16 or float32. Not modified.
        block
            Where it lies; None: `image` is the whole volume, and percentiles are taken from it if needed.

        Returns
        -------
        numpy.ndarray
            Of the shape that is read; valid on the block's core.

        Raises
        ------
        ValueError
            If the block's read region is off the pooling grid or less than the core plus the halo, the normalisation
            is not decided, or the network's output does not fit.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        if block is None:
            shape = image.shape[: self._config.n_dim]
            self.check(shape, image.dtype)
            operator = self.resolve(of_channels(image, self.needs, self.n_channels)) if self.needs else self
            return operator(image, Block.whole(shape))
        return self._at_voxels(self._chosen(self._scores(image, block)), block)

    def _chosen(self, scores: np.ndarray) -> np.ndarray:
        """Return what the operator makes of predictions, whose last axis are classes."""
        raise NotImplementedError

    def _scores(self, image: Array, block: Block) -> np.ndarray:
        """Return what the network predicts for a block: classes are the last axis, the others those of its grid."""
        normalized = self._normalized(image, block)
        shape = self._padded_shape(block.volume_shape)
        missing = [
            (0, (m - n) * last)
            for m, n, (_, last) in zip(shape, block.volume_shape, block.at_border, strict=True)
        ]
        # The same reflection as of the whole volume: blocks read at least a cell of the grid beside their core.
        padded = np.pad(normalized, missing + [(0, 0)] * (normalized.ndim - len(missing)), mode="reflect")
        scores = self._run(padded)[-1]
        n_expected = 1 if self._is_keras and self.n_classes == 1 else self.n_classes + 1
        on_grid = [n // g for n, g in zip(padded.shape, self._grid, strict=False)]
        if [*scores.shape] not in ([*on_grid, n_expected], [*on_grid, self.n_classes + 1]):
            raise ValueError(
                f"`model` {self.model} predicts {scores.shape} for {padded.shape}; {(*on_grid, n_expected)} is needed, "
                "a probability per voxel and class"
            )
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"{block}: the network's output holds NaN or infinite numbers")
        return scores

    def _at_voxels(self, values: np.ndarray, block: Block) -> np.ndarray:
        """Return values of the grid's points as values of voxels."""
        places = []
        for read, n, g in zip(block.read, block.volume_shape, self._grid, strict=True):
            # Blocks begin on points; what is padded has some that StarDist drops.
            nearest = (np.arange(read.stop - read.start) + (g - 1) // 2) // g
            last = (min(read.stop, n) - 1 - read.start) // g
            places.append(np.minimum(nearest, last))
        return values[np.ix_(*places)]

    @property
    def _is_keras(self) -> bool:
        return hasattr(self._config, "description")

    @property
    def _grid(self) -> tuple[int, ...]:
        """Voxels per element of the output."""
        return (1,) * self._config.n_dim if self._is_keras else tuple(self._config.grid)

    @property
    def _known(self) -> KerasGeometry | None:
        """What is known of a Keras model's layers; None if they cannot be followed and `align` was given."""
        try:
            return _keras_geometry(self.model, str(self.digest))
        except ValueError:
            if self.align is None:
                raise
            return None

    @property
    def _geometry(self) -> NetworkGeometry:
        if self.align is not None:
            return NetworkGeometry(tuple(self.depth), tuple(self.align))  # type: ignore[arg-type]
        if not self._is_keras:
            return stardist_geometry(self._config)
        assert self._known is not None
        return self._known.needs

    def _check_channels(self, config: SimpleNamespace) -> None:
        """Take any number of channels."""

    def _padded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-n // a) * a for n, a in zip(shape, self._geometry.align, strict=True))

    def _checked_grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return `depth` and `align`, one number per axis each."""
        n_dim = models.config(self.model).n_dim
        depth, align = (
            (value,) * n_dim if isinstance(value, int) else tuple(value or ())
            for value in (self.depth, self.align)
        )
        if len(depth) != n_dim or len(align) != n_dim or min(align) < 1:
            raise ValueError(
                f"`align` {self.align} needs `depth`, and both one number per axis ({n_dim}); got `depth` {self.depth}"
            )
        if any(d < a - 1 for d, a in zip(depth, align, strict=True)):
            raise ValueError(f"`depth` {self.depth} must be no less than `align` {self.align}")
        return depth, align


@lru_cache(maxsize=16)
def _keras_geometry(model: str, digest: str) -> KerasGeometry:
    """Return what a Keras model needs; the digest is part of the cache's key."""
    config = models.config(model)
    try:
        return keras_geometry(config.description, config.n_dim, config.n_channel_in)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"`model` {model} is described in a way that is not understood ({type(error).__name__}: {error}); save it "
            "with Keras 3 as .keras"
        ) from error
    except ValueError as error:
        raise ValueError(f"`model` {model} cannot be tiled: {error}") from None


def check_n_classes(n_classes: int, model: Any) -> None:
    """Raise `ValueError` unless a model tells classes apart, and no more than labels can."""
    if n_classes < 1:
        raise ValueError(
            f"`model` {model} knows no classes; use one that was trained with classes, or, for a network whose layers "
            "cannot be followed, give `class_names`"
        )
    if n_classes > _MOST_CLASSES:
        raise ValueError(f"`model` {model} tells {n_classes} classes apart, the limit is {_MOST_CLASSES}")

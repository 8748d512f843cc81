"""What operators with a trained network share: model, normalisation, receptive field, checks of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np

from chunkrestore import models
from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.network import NetworkGeometry, run_network
from chunkrestore.kernels.precision import Precision, check_precision
from chunkrestore.operators.base import Array, Statistic, check_image
from chunkrestore.operators.intensities import (
    Limits,
    checked_limits,
    checked_percentiles,
    limits_from,
    scaled,
)
from chunkrestore.statistics import NonFiniteError


class NetworkOperator:
    """Base of frozen dataclasses with the fields named here."""

    model: Any
    normalization: Limits | None
    percentiles: tuple[float, float]
    depth: int | Sequence[int] | None
    digest: str | None
    precision: Precision = "float32"

    name: ClassVar[str]
    _kinds: ClassVar[tuple[models.Kind, ...]]
    """Kinds of models that the operator runs."""

    @property
    def _geometry(self) -> NetworkGeometry:
        """Receptive field and pooling grid of the model."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        models.kind(self.model, *self._kinds)
        check_precision(self.precision)
        fields: dict[str, Any] = {"percentiles": checked_percentiles(self.percentiles)}
        fields["model"] = models.reference(self.model)
        fields["digest"] = models.check_digest(self.model, self.digest)
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if self.normalization is not None:
            limits = checked_limits(self.normalization, self.n_channels)
            object.__setattr__(self, "normalization", limits)
        if self.depth is not None:
            object.__setattr__(self, "depth", self._checked_depth(self.depth))

    @property
    def n_channels(self) -> int:
        """Channels that the network takes together; with more than one they are the last axis of an image."""
        return int(self._config.n_channel_in)

    @property
    def needs(self) -> frozenset[Statistic]:
        """Both percentiles, until `normalization` is known."""
        return frozenset() if self.normalization is not None else frozenset(self.percentiles)

    def resolve(self, statistics: Mapping[Statistic, Any]) -> Self:
        """Return this operator with its normalisation decided.

        A statistic is a number, or, where the network takes several channels, a sequence of one per channel.
        """
        if self.normalization is not None:
            return self
        limits = limits_from(statistics, self.percentiles, self.n_channels)
        return replace(self, normalization=limits)  # type: ignore[type-var]

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
        self._check_channels(config)

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return the receptive field, on the pooling grid of the whole volume as the library pads it."""
        depth = self._geometry.depth if self.depth is None else self.depth
        return Halo(tuple(depth), self._geometry.align, self._offset(shape))  # type: ignore[arg-type]

    def _check_channels(self, config: SimpleNamespace) -> None:
        """Raise `ValueError` if the model's channels cannot be used."""
        raise NotImplementedError

    def _offset(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return how many voxels the library pads before a volume of `shape`."""
        return (0,) * len(shape)

    @property
    def _config(self) -> SimpleNamespace:
        return model_config(self.model, str(self.digest))

    def _network(self) -> Any:
        """Return the Keras model."""
        return models.load(self.model, expected_digest=self.digest).keras_model

    def _run(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the network's outputs for a padded and normalised block."""
        channels_last = image if self.n_channels > 1 else image[..., np.newaxis]
        return run_network(self._network(), channels_last, precision=self.precision)

    def _checked(self, image: Array, block: Block) -> np.ndarray:
        """Check what a block reads and return it on the host."""
        if self.normalization is None:
            raise ValueError(
                "`normalization` is not decided; call `resolve` with the whole volume's percentiles"
            )
        self._check_block(tuple(image.shape), block)
        host = to_numpy(image)
        if host.dtype.kind == "f" and not np.isfinite(host).all():
            raise NonFiniteError(f"{block} holds voxels that are NaN or infinite; replace them first")
        return host

    def _normalized(self, image: Array, block: Block) -> np.ndarray:
        """Check what a block reads and return it normalised, float32, on the host."""
        return self._normalize(self._checked(image, block))

    def _normalize(self, host: np.ndarray) -> np.ndarray:
        """Return intensities as the network sees them, float32."""
        return scaled(host, self.normalization)  # type: ignore[arg-type]

    def _checked_depth(self, depth: int | Sequence[int]) -> tuple[int, ...]:
        least = self._geometry.depth
        given = (depth,) * len(least) if isinstance(depth, int) else tuple(depth)
        if len(given) != len(least) or any(d < n for d, n in zip(given, least, strict=False)):
            raise ValueError(
                f"`depth` {depth} is less than what the network looks at: at least {least} is needed for the "
                "tiled result to equal the untiled one"
            )
        return given

    def _check_block(self, image_shape: tuple[int, ...], block: Block) -> None:
        channels = (self.n_channels,) if self.n_channels > 1 else ()
        if image_shape != (*block.read_shape, *channels):
            raise ValueError(
                f"`image` has shape {image_shape} but {block} reads {(*block.read_shape, *channels)}"
            )
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
def model_config(model: str, digest: str) -> SimpleNamespace:
    """Return a model's configuration; the digest is part of the cache's key."""
    return models.config(model)

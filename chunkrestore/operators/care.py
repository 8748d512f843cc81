"""Restoration with a trained CARE network, block by block as if in one piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from chunkrestore import models
from chunkrestore.backend import asarray_like
from chunkrestore.grid import Block, Slices
from chunkrestore.kernels.network import NetworkGeometry, care_geometry, network_nbytes
from chunkrestore.kernels.precision import Precision
from chunkrestore.operators.base import Array
from chunkrestore.operators.network import NetworkOperator
from chunkrestore.statistics import of_array

Output: TypeAlias = Literal["mean", "scale"]
"""Parameters of the distribution that a probabilistic network predicts for every voxel."""


@dataclass(frozen=True)
class Care(NetworkOperator):
    """Restore an image with a CARE network (content-aware image restoration).

    ``result = network((image - low) / (high - low)) * (high - low) + low``, with the network applied to the
    whole volume: what CSBDeep's ``CARE.predict`` returns with ``PercentileNormalizer`` and
    ``PadAndCropResizer``, to float rounding, for every block grid.

    Preserves: shape; intensities stay in input units. The result is float32.

    Parameters
    ----------
    model
        Folder of a trained CSBDeep CARE model, name of a shipped model (``"care3d-demo"``), or a CARE object
        that is saved in a folder. One channel in, one channel out.
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
    precision
        What the network computes in: ``"float32"``, or ``"mixed_float16"`` or ``"mixed_bfloat16"`` as Keras
        means them. Activations then have 11 or 8 significant bits, intensities of the image keep all. Of the
        range (high - low) results differ by 0.1 % (rms; largest 1.3 %) in bfloat16 and half of that in
        float16, and where a library sums in another order for another shape, results of two grids may differ
        as much (none did on a CPU). For GPUs, where it was not run yet; on CPUs bfloat16 helps those with
        instructions for it, and float16 is about ten times slower.
    output
        What of a probabilistic model is returned: ``"mean"``, the restored image, or ``"scale"``, the scale b of
        the Laplace distribution ``exp(-|x - mean| / b) / 2b`` of the intensity, in units of the image. The expected
        error is b, the standard deviation b times the square root of 2, as far as the model is calibrated.

    Raises
    ------
    ValueError
        If the model is missing or not a CARE model, is not probabilistic where that is needed, or another parameter
        is out of its range.

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
    precision: Precision = "float32"
    output: Output = "mean"

    name = "care"

    _kinds: ClassVar[tuple[models.Kind, ...]] = ("care",)
    _classes: ClassVar[tuple[str, ...]] = ()
    """CSBDeep's classes of model objects that mean this operator, beside CARE."""

    def __post_init__(self) -> None:
        models.check_class(self.model, "CARE", *self._classes)
        super().__post_init__()
        if self.output not in ("mean", "scale"):
            raise ValueError(f"`output` must be 'mean' or 'scale', got {self.output!r}")
        if self.output == "scale" and not self._config.probabilistic:
            raise ValueError(f"`output` 'scale' needs a probabilistic model, and {self.model} is none")

    @property
    def _geometry(self) -> NetworkGeometry:
        return care_geometry(self._config)

    def _check_channels(self, config: SimpleNamespace) -> None:
        if (config.n_channel_in, config.n_channel_out) != (1, 1):
            raise ValueError(
                f"`model` {self.model} maps {config.n_channel_in} to {config.n_channel_out} channels; only "
                "models with one channel in and one channel out can be used"
            )

    def _offset(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(before for before, _ in self._padding(shape))

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
            "precision": self.precision,
            "output": self.output,
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
        return asarray_like(self._restored(self._normalized(image, block), block), image)

    def _restored(self, normalized: np.ndarray, block: Block) -> np.ndarray:
        """Pad at the volume's border, run, crop, and undo the normalisation, all in float32."""
        low, high = np.array(self.normalization, np.float32)
        padding = [
            (before * first, after * last)
            for (before, after), (first, last) in zip(
                self._padding(block.volume_shape), block.at_border, strict=True
            )
        ]
        # The same reflection as of the whole volume: the depth exceeds the padding.
        padded = np.pad(normalized, padding, mode="reflect")
        crop = tuple(
            slice(before, before + n) for (before, _), n in zip(padding, normalized.shape, strict=True)
        )
        core = tuple(
            slice(before + t.start, before + t.stop)
            for (before, _), t in zip(padding, block.trim, strict=True)
        )
        result: np.ndarray = self._predicted(padded, core)[crop] * (high - low)
        if self.output == "mean":
            result += low
        return result

    def _predicted(self, padded: np.ndarray, core: Slices) -> np.ndarray:
        """Return what the network makes of a padded and normalised block, valid on `core`."""
        # A probabilistic network's channels are mean and scale.
        return self._run(padded)[0][..., int(self.output == "scale")]

    def _padding(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return how CSBDeep pads a volume to the pooling grid: split, the larger half at the end."""
        missing = [-n % a for n, a in zip(shape, self._geometry.align, strict=True)]
        return [(m // 2, m - m // 2) for m in missing]

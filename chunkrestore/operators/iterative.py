"""What iterative deconvolution operators share: start, unobserved voxels, and when to stop."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from chunkrestore import backend
from chunkrestore.grid import Block, Slices
from chunkrestore.kernels.blur import AnyBlur
from chunkrestore.kernels.photon_splitting import split_photons
from chunkrestore.kernels.richardson_lucy import last_of
from chunkrestore.operators.base import Array, Statistic, numbers_of
from chunkrestore.operators.deconvolution import (
    Deconvolution,
    check_brightness,
    dtype_of,
    number,
    whole_number,
)
from chunkrestore.operators.pilot import (
    LEAST_CHANGE,
    Read,
    best_iteration,
    i_divergence,
    pilot_regions,
)
from chunkrestore.statistics import of_array

STOPS = (None, "i-divergence", "split-data")
_DIM = 1e-3
# A volume whose mean is not above the background starts from this share of it: the start only has to be
# positive and of the data's order. (Without background the first plain iteration forgets it.)


@dataclass(frozen=True, eq=False)
class IterativeDeconvolution(Deconvolution):
    """Base of the operators that iterate; subclasses give `_estimates`."""

    iterations: int = 20
    _: KW_ONLY
    start: float | None = None
    saturation: float | None = None
    missing: float | None = None
    mask: Any = field(default=None, repr=False)
    stop: str | None = None
    gain: float = 1.0
    offset: float | None = None
    decision: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("iterations", whole_number("iterations", self.iterations, least=1))
        self._set("gain", number("gain", self.gain))
        for name in ("start", "saturation", "missing", "offset"):
            value = getattr(self, name)
            self._set(name, None if value is None else number(name, value))
        if self.start is not None and self.start <= 0:
            raise ValueError(f"`start` must be above 0, got {self.start:g}")
        if self.saturation is not None and self.saturation <= self.background:
            raise ValueError(
                f"`saturation` {self.saturation:g} must lie above `background` {self.background:g}; give the "
                "largest intensity that the camera can report"
            )
        if self.gain <= 0:
            raise ValueError(f"`gain` must be above 0 (intensity per photon), got {self.gain:g}")
        if self.offset is not None and self.offset > self.background:
            raise ValueError(
                f"`offset` {self.offset:g} must not lie above `background` {self.background:g}: it is what the "
                "camera reports without any light, `background` what it reports without any object"
            )
        if self.stop not in STOPS:
            raise ValueError(f'`stop` must be "i-divergence", "split-data" or None, got {self.stop!r}')
        if self.mask is not None and not (hasattr(self.mask, "shape") and hasattr(self.mask, "__getitem__")):
            raise TypeError(
                f"`mask` must be an array of the volume's shape, got {type(self.mask).__name__}; read it first"
            )
        if hasattr(self.mask, "__dlpack__"):  # an array in memory, as opposed to a stored or a lazy one
            self._set("mask", _unchangeable(backend.to_numpy(self.mask)))

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        super().check(shape, dtype)
        if self.mask is not None and tuple(self.mask.shape) != tuple(shape):
            raise ValueError(
                f"`mask` has shape {tuple(self.mask.shape)} but the image has {tuple(shape)}; give one value "
                "per voxel, true where the voxel was observed"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        """The mean until `start` is known, and pilots until it is decided when to stop.

        With a background the maximum as well, to see whether anything is brighter.
        """
        level = {"mean"} | ({"maximum"} if self.background else set())
        pilot = {"pilot"} if self._needs_pilot else set()
        return frozenset((level if self.start is None else set()) | pilot)

    @property
    def _needs_pilot(self) -> bool:
        return self.stop is not None and self.decision is None

    def resolve(self, statistics: Mapping[Statistic, Any]) -> Self:
        """Return this operator with start value and number of iterations decided.

        Raises
        ------
        ValueError
            If nothing is brighter than the background.
        """
        resolved = self
        check_brightness(statistics, self.background)
        if self.start is None:
            mean = float(statistics["mean"])
            scale = max(abs(mean), self.background) or 1.0
            resolved = replace(resolved, start=max(mean - self.background, _DIM * scale))
        if self._needs_pilot and "pilot" in statistics:
            resolved = resolved._decided(statistics["pilot"])
        return resolved

    def pilot(self, statistics: Mapping[Statistic, Any], read: Read, shape: Sequence[int]) -> dict[str, Any]:
        """Return what pilot regions decide for the whole volume, as JSON-compatible values.

        Parameters
        ----------
        statistics
            The other numbers that the operator `needs`.
        read
            Returns the voxels of a region.
        shape
            Of the volume.
        """
        regions = pilot_regions(read, shape)
        return self.resolve(statistics)._decide([(region, read(region)) for region in regions])

    def _decide(self, pilots: Sequence[tuple[Slices, Array]]) -> dict[str, Any]:
        curve = self._stopping_curve(pilots, self.stop or "i-divergence")
        iterations = best_iteration(curve, least_change=LEAST_CHANGE if self.stop == "i-divergence" else 0.0)
        return {
            "iterations": iterations,
            "curve": [float(f"{value:.6g}") for value in curve],
            "regions": [[[s.start, s.stop] for s in region] for region, _ in pilots],
        }

    def _decided(self, decision: Mapping[str, Any]) -> Self:
        # The depth stays the one that the blocks were planned with.
        return replace(
            self,
            iterations=decision["iterations"],
            depth=self.depth if self.depth is not None else self._default_depth,
            decision=decision,
        )

    def _stopping_curve(self, pilots: Sequence[tuple[Slices, Array]], stop: str) -> list[float]:
        """Return the I-divergence from what should be predicted, after every iteration, all pilots together."""
        total = np.zeros(self.iterations)
        for region, image in pilots:
            origin, share = [s.start for s in region], 1.0
            fitted = predicted = image
            if stop == "split-data":
                share = 0.5
                halves = split_photons(
                    backend.to_numpy(image), origin, background=self._no_photons, gain=self.gain
                )
                fitted, predicted = (backend.asarray_like(half, image) for half in halves)
            blur = self._blur(image, origin, ((True, True),) * image.ndim)
            mask = self._observed(image, region)
            for k, estimate in enumerate(self._estimates(fitted, blur, mask, origin, share)):
                expected = blur.forward(estimate, image.shape) + share * self.background
                total[k] += i_divergence(predicted, expected, mask)
        return list(map(float, total))

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Deconvolve one block, or the whole volume.

        Parameters
        ----------
        image
            Array of any array-API namespace that covers ``block.read``; uint8, uint16, int16 or float32.
            Not modified.
        block
            Where it lies; None: `image` is the whole volume, and what depends on the data is decided on it.

        Returns
        -------
        array
            float32, same shape and namespace, not negative; valid on the block's core.

        Raises
        ------
        ValueError
            If `image` is not what the block reads, or something is not decided.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        if block is None:
            self.check(image.shape, dtype_of(image))
            return self._resolved_on(image)(image, Block.whole(image.shape))
        if self.needs:
            missing = "`start` is not decided; call `resolve` with the mean of the whole volume"
            raise ValueError(
                missing if self.start is None else "`iterations` are not decided; call `resolve` first"
            )
        self._checked(image, block)
        origin = [s.start for s in block.read]
        mask = self._observed(image, block.read)
        blur = self._blur(image, origin, block.at_border)
        return last_of(self._estimates(image, blur, mask, origin), image)

    def _resolved_on(self, image: Array) -> Self:
        read, shape = (lambda region: image[region]), image.shape
        return self.resolve(numbers_of(self, lambda needs: of_array(image, needs), read, shape))

    def _observed(self, image: Array, region: Slices) -> Array | None:
        """Return where a region was observed; None: everywhere."""
        masks = []
        xp = backend.namespace(image)
        if self.saturation is not None:
            masks.append(xp.astype(image, xp.float32, copy=False) < self.saturation)
        if self.missing is not None:
            masks.append(xp.astype(image, xp.float32, copy=False) != self.missing)
        if self.mask is not None:
            masks.append(backend.asarray_like(np.asarray(self.mask[region], dtype=np.bool_), image))
        if not masks:
            return None
        observed, *others = masks
        for other in others:
            observed = observed & other
        return observed

    @abstractmethod
    def _estimates(
        self,
        image: Array,
        blur: AnyBlur,
        mask: Array | None,
        origin: Sequence[int],
        share: float = 1.0,
    ) -> Iterator[Array]:
        """Yield the estimate on the lattice after every iteration.

        `origin` is the position of the image in the volume; `share` the part of the light that it holds, by
        which start and background are scaled.
        """

    @property
    def _no_photons(self) -> float:
        """Intensity above which photons are counted."""
        return self.background if self.offset is None else self.offset

    @property
    def _has_mask(self) -> bool:
        return self.saturation is not None or self.missing is not None or self.mask is not None

    @cached_property
    def _mask_digest(self) -> str | None:
        if self.mask is None:
            return None
        if isinstance(self.mask, np.ndarray):
            content = repr(self.mask.shape).encode() + np.packbits(self.mask.astype(np.bool_)).tobytes()
        else:
            # Of a stored array, its place and shape; of a lazy one, the name that identifies its graph.
            content = f"{self.mask!r} {getattr(self.mask, 'name', '')}".encode()
        return hashlib.sha256(content).hexdigest()

    def _parameters(self) -> Mapping[str, Any]:
        return {
            "iterations": self.iterations,
            "start": self.start,
            "saturation": self.saturation,
            "missing": self.missing,
            "mask_sha256": self._mask_digest,
            "stop": self.stop,
            "gain": self.gain,
            "offset": self.offset,
            "decision": None if self.decision is None else dict(self.decision),
        }


def _unchangeable(mask: np.ndarray) -> np.ndarray:
    """Return a boolean copy that cannot be written to, or `mask` if it is one."""
    if mask.dtype != np.bool_ or mask.flags.writeable:
        mask = mask.astype(np.bool_)
        mask.setflags(write=False)
    return mask

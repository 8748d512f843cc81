"""What is done to an image on its way into a store, and nothing else: copying it, and choosing its dtype."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.operators.base import Array, LabelOperator, ObjectOperator, Operator
from chunkrestore.statistics import ACCEPTED_DTYPES, NonFiniteError


class _Pointwise:
    """What operators have in common that look at one voxel at a time and need to know nothing."""

    needs: frozenset[float | str] = frozenset()

    def resolve(self, statistics: Mapping[float | str, Any]) -> Self:
        """Return this operator: nothing is left open."""
        return self

    def halo(self, shape: Sequence[int]) -> Halo:
        """Nothing is read around a core."""
        return Halo((0,) * len(shape))


@dataclass(frozen=True)
class Copy(_Pointwise):
    """Leave an image as it is: what a job without operators does, to store it in other chunks or another version.

    Preserves shape, dtype and every voxel, NaN included.
    """

    name = "copy"

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` unless voxels are numbers."""
        if len(shape) not in (2, 3) or np.dtype(dtype).kind not in "iuf":
            raise ValueError(
                f"`image` of shape {tuple(shape)} and dtype {dtype} is no 2-D or 3-D image of numbers"
            )

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return what a block of the widest dtype takes."""
        return 8 * math.prod(read_shape)

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return `dtype`."""
        return np.dtype(dtype)

    def describe(self) -> Mapping[str, Any]:
        """Return the name; there are no parameters."""
        return {"operator": self.name}

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Return `image`."""
        return image


@dataclass(frozen=True)
class AsType(_Pointwise):
    """Store an image in another dtype, by a rule that is written down with it.

    Without `intensity_range`, intensities keep their values: integers are rounded to the nearest (halves to even).
    With it, ``low`` becomes the smallest number of an integer dtype and ``high`` the largest::

        stored    = round(smallest + (intensity - low) * (largest - smallest) / (high - low))
        intensity = low + (stored - smallest) * (high - low) / (largest - smallest)

    What lies beyond is clipped, and jobs count how many voxels did. One range holds for all time points and
    channels, so they remain comparable. The rule is among the operators in the provenance of the output.

    Parameters
    ----------
    dtype
        ``"uint8"``, ``"uint16"``, ``"int16"`` or ``"float32"``.
    intensity_range
        (low, high) in intensities of the image; None keeps values.

    Raises
    ------
    ValueError
        If `dtype` is another one, or the range is not finite, empty, or given for floats.
    """

    dtype: str
    intensity_range: tuple[float, float] | None = None

    name = "as-type"

    def __post_init__(self) -> None:
        kind = np.dtype(self.dtype).name
        if kind not in ACCEPTED_DTYPES:
            raise ValueError(f"`dtype` {kind} cannot be stored; use one of {', '.join(ACCEPTED_DTYPES)}")
        object.__setattr__(self, "dtype", kind)
        if self.intensity_range is None:
            return
        low, high = (float(v) for v in self.intensity_range)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"`intensity_range` {self.intensity_range} must be two finite numbers, low < high"
            )
        if kind == "float32":
            raise ValueError(
                "`intensity_range` is for integers; float32 holds intensities as they are, leave it out"
            )
        object.__setattr__(self, "intensity_range", (low, high))

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if an image of `dtype` cannot be converted."""
        if np.dtype(dtype).name not in ACCEPTED_DTYPES:
            raise ValueError(f"`image` has dtype {dtype}; accepted are {', '.join(ACCEPTED_DTYPES)}")

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `convert`: float64 before and after rounding, the result, and a mask."""
        return (8 + 8 + 4 + 1) * math.prod(read_shape)

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype that is stored."""
        return np.dtype(self.dtype)

    def describe(self) -> Mapping[str, Any]:
        """Return the rule."""
        limits = None if self.intensity_range is None else list(self.intensity_range)
        return {"operator": self.name, "dtype": self.dtype, "intensity_range": limits}

    def __call__(self, image: Array, block: Block | None = None) -> np.ndarray:
        """Return `image` (NumPy or CuPy) as a NumPy array of `dtype`."""
        return self.convert(to_numpy(image))[0]

    def convert(self, image: np.ndarray) -> tuple[np.ndarray, int]:
        """Return `image` as it is stored, and how many voxels were clipped.

        Raises
        ------
        chunkrestore.statistics.NonFiniteError
            If a voxel is NaN or infinite, for which integers have no number.
        """
        if self.dtype == "float32":
            return image.astype(np.float32, copy=False), 0
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise NonFiniteError(f"a voxel is NaN or infinite, which {self.dtype} cannot hold")
        smallest, largest = self._limits
        if self.intensity_range is None:
            if np.can_cast(image.dtype, self.dtype):
                return image.astype(self.dtype), 0
            numbers = np.rint(image)
        else:
            low, high = self.intensity_range
            numbers = np.rint(
                (image.astype(np.float64) - low) * ((largest - smallest) / (high - low)) + smallest
            )
        n_clipped = int(np.count_nonzero((numbers < smallest) | (numbers > largest)))
        return np.clip(numbers, smallest, largest).astype(self.dtype), n_clipped

    def intensities(self, stored: np.ndarray) -> np.ndarray:
        """Return the intensities (float64) that stored numbers stand for."""
        numbers = stored.astype(np.float64)
        if self.intensity_range is None:
            return numbers
        (smallest, largest), (low, high) = self._limits, self.intensity_range
        return low + (numbers - smallest) * ((high - low) / (largest - smallest))

    @property
    def _limits(self) -> tuple[int, int]:
        limits = np.iinfo(self.dtype)
        return int(limits.min), int(limits.max)


def completed(operators: Sequence[Operator]) -> list[Operator]:
    """Return the operators of a job, which begin with a copy where nothing else makes an image to be stored.

    Raises
    ------
    ValueError
        If something follows on a choice of dtype that makes another image of it.
    """
    chain: list[Operator] = list(operators)
    if not chain or isinstance(chain[0], AsType):
        chain.insert(0, Copy())
    for operator, following in itertools.pairwise(chain):
        if isinstance(operator, AsType) and not isinstance(following, LabelOperator):
            raise ValueError(
                f"`operators` have {following.name} after {operator.name}, which must be the last that makes an image"
            )
    return chain


def choice_of_dtype(dtype: str | None, intensity_range: tuple[float, float] | None) -> list[AsType]:
    """Return what stores an image in `dtype`, and nothing if None is asked for.

    Raises
    ------
    ValueError
        If there is a range without a dtype, or `AsType` does not take them.
    """
    if dtype is None and intensity_range is not None:
        raise ValueError("`intensity_range` says how integers are scaled; give `dtype` (--dtype) as well")
    return [] if dtype is None else [AsType(dtype, intensity_range)]


def only_copies(operators: Sequence[Operator]) -> bool:
    """Return whether operators leave every voxel as it is."""
    return all(isinstance(operator, Copy) for operator in operators)


def result_dtype(operator: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of an operator's result for an image of `dtype`.

    Unless it says otherwise, float32, or for objects int32 (int64 where there are more than two billion).
    """
    of_result = getattr(operator, "result_dtype", None)
    if of_result is not None:
        return np.dtype(of_result(dtype))
    return np.dtype(np.int32 if isinstance(operator, ObjectOperator) else np.float32)

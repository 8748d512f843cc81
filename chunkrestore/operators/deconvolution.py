"""What all deconvolution operators share: point spread function, background, halo, checks, one block at a time."""

from __future__ import annotations

import hashlib
import math
import operator
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore import backend
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.blur import AnyBlur, BlendedBlur, Blur, Borders, lattice_shape
from chunkrestore.operators.base import Array, check_image
from chunkrestore.psf import effective_sigma, energy_radius, prepare
from chunkrestore.psf.varying import PsfField
from chunkrestore.statistics import NonFiniteError

ELEMENTWISE_NBYTES = 4 * 2**20
"""Temporaries of element-wise steps and transforms, whatever the block."""

Depth = int | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Deconvolution:
    """Base of the operators that deconvolve with a known point spread function.

    Subclasses say how deep their halo is (`_derived_depth`), what they need (`memory_nbytes`), what identifies
    them beyond what is here (`_parameters`) and what they compute (`__call__`).
    """

    psf: npt.NDArray[np.float32] | PsfField = field(repr=False)
    _: KW_ONLY
    background: float = 0.0
    depth: Depth = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.psf, PsfField):
            psf = prepare(self.psf)
            psf.setflags(write=False)
            object.__setattr__(self, "psf", psf)
        self._set("background", number("background", self.background))
        self._set("tolerance", number("tolerance", self.tolerance))
        self._set("depth", None if self.depth is None else _depth(self.depth, self.psf.ndim))
        if self.background < 0:
            raise ValueError(f"`background` must be at least 0, got {self.background:g}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"`tolerance` must lie between 0 and 1, got {self.tolerance:g}")

    def _set(self, name: str, value: Any) -> None:
        """Replace a parameter by its checked value, while the operator is made."""
        object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """Short name."""
        raise NotImplementedError

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        check_image(shape, dtype)
        if len(shape) != self.psf.ndim:
            raise ValueError(
                f"`psf` has {self.psf.ndim} dimensions (shape {self.psf.shape}) but the image has {len(shape)} "
                f"spatial axes; pass a {len(shape)}-dimensional point spread function"
            )

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return `depth`, or the depth that keeps the seam error within `tolerance`."""
        return Halo(self._default_depth if self.depth is None else tuple(self.depth), fast=True)  # type: ignore[arg-type]

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of a call, as if the block touched the volume's border on every axis."""
        raise NotImplementedError

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters and the digest of the point spread function."""
        return {
            "operator": self.name,
            "psf_sha256": self._digest,
            "psf_shape": list(self.psf.shape),
            "background": self.background,
            "depth": None if self.depth is None else list(self.depth),  # type: ignore[arg-type]
            "tolerance": self.tolerance,
            **self._parameters(),
        }

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.describe() == other.describe()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((self.name, self._digest, self.background, self.tolerance))

    def _parameters(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def _derived_depth(self, psf: np.ndarray) -> tuple[int, ...]:
        """Return the depth for one point spread function."""
        raise NotImplementedError

    @cached_property
    def _default_depth(self) -> tuple[int, ...]:
        return tuple(max(axis) for axis in zip(*map(self._derived_depth, self._psfs), strict=True))

    @property
    def _psfs(self) -> Sequence[np.ndarray]:
        return self.psf.psfs if isinstance(self.psf, PsfField) else (self.psf,)

    @cached_property
    def _digest(self) -> str:
        if isinstance(self.psf, PsfField):
            return self.psf.digest
        return hashlib.sha256(repr(self.psf.shape).encode() + self.psf.tobytes()).hexdigest()

    def _checked(self, image: Array, block: Block) -> None:
        """Raise unless `image` is what `block` reads, and finite."""
        if tuple(image.shape) != block.read_shape:
            raise ValueError(f"`image` has shape {tuple(image.shape)} but {block} reads {block.read_shape}")
        xp = backend.namespace(image)
        if xp.isdtype(image.dtype, "real floating") and not bool(xp.all(xp.isfinite(image))):
            raise NonFiniteError(f"{block} holds voxels that are NaN or infinite; replace them first")

    def _blur(self, image: Array, origin: Sequence[int], at_border: Borders) -> AnyBlur:
        """Return the blur of a region that begins at voxel `origin` of the volume."""
        lattice = lattice_shape(image.shape, self._extent, at_border)
        if isinstance(self.psf, PsfField):
            return _blended(self.psf, image, origin, lattice)
        psf, key = self.psf, (self._digest, lattice, *place_of(image))
        return LAST_BLUR.get(key, lambda: Blur.from_psf(psf, lattice, image))

    @property
    def _extent(self) -> tuple[int, ...]:
        """How far light goes, in voxels: the room that a lattice needs at the volume's border."""
        return self.psf.shape

    def _spectrum_nbytes(self, lattice: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of a half spectrum on the lattice, and of all transfer functions and their weights."""
        blurred = [axis for axis, p in enumerate(self.psf.shape) if p > 1] or [self.psf.ndim - 1]
        half = [n // 2 + 1 if axis == blurred[-1] else n for axis, n in enumerate(lattice)]
        otf = math.prod(n if axis in blurred else 1 for axis, n in enumerate(half))
        weights = self.psf.weights_nbytes(lattice) if isinstance(self.psf, PsfField) else 0
        return 8 * math.prod(half), 8 * otf * len(self._psfs) + weights

    def _border_lattice(self, read_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the lattice of a block that touches the volume's border on every axis."""
        return lattice_shape(read_shape, self._extent, ((True, True),) * len(read_shape))


def _blended(psf: PsfField, image: Array, origin: Sequence[int], lattice: tuple[int, ...]) -> BlendedBlur:
    weights = psf.weights(origin, image.shape, lattice)
    return BlendedBlur(
        tuple(Blur.from_psf(psf.psfs[k], lattice, image) for k in weights),
        tuple(
            tuple(backend.asarray_like(factor, image) for factor in factors) for factors in weights.values()
        ),
    )


def core_depth(psf: np.ndarray, sigmas: float, most: float = math.inf) -> tuple[int, ...]:
    """Return a depth of `sigmas` standard deviations of the core of `psf`, with room for its skirt.

    At least 1.5 times the radius that holds 99.9 % of the light; at most `most` times the radius of the
    array, beyond which nothing can be felt.
    """
    widths = zip(effective_sigma(psf), energy_radius(psf), energy_radius(psf, 1.0), strict=True)
    return tuple(
        int(min(math.ceil(max(sigmas * sigma, 1.5 * radius)), most * support))
        for sigma, radius, support in widths
    )


def check_brightness(statistics: Mapping[Any, Any], background: float) -> None:
    """Raise `ValueError` if the maximum of a volume is among `statistics` and not above `background`."""
    if background and statistics.get("maximum", math.inf) <= background:
        raise ValueError(
            f"`background` {background:g} is not below the image, whose maximum is {statistics['maximum']:g}; give "
            "the intensity of a voxel without light"
        )


class Last:
    """Keep what was made last, for one key, per process.

    Most blocks of a grid share one lattice, so that this saves nearly every transfer function; a miss costs
    one transform of the 4 per iteration, less than the memory of a second one is worth.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Hashable = None
        self._value: Any = None

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value for `key`, made by `make` if it is not the one kept."""
        with self._lock:
            if key != self._key:
                self._key = self._value = None  # frees the old one before the new one is made
                self._value = make()
                self._key = key
            return self._value


LAST_BLUR = Last()


def place_of(image: Array) -> tuple[str, str]:
    """Return namespace and device of an array, as part of a key."""
    return backend.namespace(image).__name__, str(backend.device(image))


def dtype_of(image: Array) -> np.dtype[Any]:
    """Return the NumPy dtype of an array of any namespace."""
    return np.dtype(str(image.dtype).rpartition(".")[2])


def number(name: str, value: Any) -> float:
    """Return a parameter as a finite number, or raise naming it."""
    try:
        converted = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number, got {value!r}") from None
    if not math.isfinite(converted):
        raise ValueError(f"`{name}` must be finite, got {converted}")
    return converted


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Return a parameter as a whole number of at least `least`, or raise naming it."""
    try:
        converted = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a whole number, got {value!r}") from None
    if isinstance(value, bool) or converted < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
    return converted


def voxel_sides(voxel_size: Sequence[float], ndim: int) -> tuple[float, ...]:
    """Return a voxel size as one positive number per axis of the point spread function, or raise naming it."""
    sides = tuple(number("voxel_size", side) for side in voxel_size)
    if len(sides) != ndim or min(sides) <= 0:
        raise ValueError(
            f"`voxel_size` {sides} must have one positive number per axis of the {ndim}-dimensional `psf`"
        )
    return sides


def _depth(depth: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    values = tuple(depth) if isinstance(depth, Sequence | np.ndarray) else (depth,) * ndim
    if len(values) != ndim:
        raise ValueError(
            f"`depth` {values} must be one number, or one per axis of the {ndim}-dimensional `psf`"
        )
    return tuple(whole_number("depth", value, least=0) for value in values)

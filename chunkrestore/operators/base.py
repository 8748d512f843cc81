"""What every operator offers, whoever drives it: eager code, the lazy layer or a job.

An *image operator* maps one block to one block; a *label operator* maps a volume to instance labels in
four steps (detect, settle, number, paint), of which all but `number` work on one block. Both are frozen
dataclasses: parameters in, numbers out, no state.

Nothing that depends on the data is decided inside a block. An operator that needs such a number lists it
in ``needs``: a float is a percentile of the whole volume and channel, a string is ``"mean"`` or ``"otsu"``.
`resolve` takes those numbers and returns an operator that needs nothing; only such an operator may be
called on a block. `chunkrestore.statistics` computes them, exactly, whatever the block grid. An operator that
needs ``"pilot"`` computes that one itself, from a few regions of the volume that do not depend on the grid
(`PilotOperator`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

from chunkrestore.statistics import ACCEPTED_DTYPES

if TYPE_CHECKING:
    from chunkrestore.grid import Block, Halo, Slices

Array: TypeAlias = Any
"""An array of NumPy, CuPy or another array-API namespace."""

Statistic: TypeAlias = float | str
"""A percentile (0 to 100), ``"mean"``, ``"otsu"`` or ``"pilot"``."""

Table: TypeAlias = dict[str, np.ndarray]
"""What label steps exchange: a few named arrays, small beside the block, saved as one ``.npz``."""


@runtime_checkable
class Operator(Protocol):
    """What is common to image and label operators."""

    @property
    def name(self) -> str:
        """Short name, as in ``"richardson-lucy"``."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """Numbers of the whole volume that `resolve` must be given first; empty when resolved."""

    def resolve(self, statistics: Mapping[Statistic, Any]) -> Self:
        """Return this operator with every data-dependent number filled in; `statistics` holds `needs`."""

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError`, from metadata alone, if a volume of `shape` and `dtype` cannot be processed."""

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return what must be read around a core of a volume of `shape`."""

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak number of bytes that a call on a block of `read_shape` allocates."""

    def describe(self) -> Mapping[str, Any]:
        """Return parameters and digests as JSON-compatible values: what identifies the result."""


@runtime_checkable
class ImageOperator(Operator, Protocol):
    """An operator whose result is an image: float32, same shape as what it was given."""

    def __call__(self, image: Array, block: Block | None = None) -> Array:
        """Process one block.

        `image` covers ``block.read``; the result has the same shape and is valid on ``block.core``.
        Without `block`, `image` is the whole volume, and an unresolved operator resolves itself on it.
        """


@runtime_checkable
class PilotOperator(Operator, Protocol):
    """An operator that decides something once per volume by trying it on pilot regions."""

    def pilot(
        self, statistics: Mapping[Statistic, Any], read: Callable[[Slices], Array], shape: Sequence[int]
    ) -> dict[str, Any]:
        """Return the decision, JSON-compatible, that `resolve` takes as ``"pilot"``.

        `statistics` holds the other numbers that it `needs`; `read` returns the voxels of one of
        `chunkrestore.operators.pilot.pilot_candidates`.
        """


def numbers_of(
    operator: Operator,
    compute: Callable[[frozenset[Statistic]], Mapping[Statistic, float]],
    read: Callable[[Slices], Array],
    shape: Sequence[int],
) -> dict[Statistic, Any]:
    """Return all that `operator` needs of a volume: what `compute` gives, and its pilot."""
    wanted = operator.needs - {"pilot"}
    numbers: dict[Statistic, Any] = dict(compute(wanted)) if wanted else {}
    if "pilot" in operator.needs and isinstance(operator, PilotOperator):
        numbers["pilot"] = operator.pilot(numbers, read, shape)
    return numbers


@runtime_checkable
class LabelOperator(Operator, Protocol):
    """An operator whose result is instance labels (0 = background), in four steps."""

    @property
    def paint_reads_image(self) -> bool:
        """Whether `paint` needs the image of the block again."""

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece; an unresolved operator resolves itself on it."""

    def detect(self, image: Array, block: Block) -> Table:
        """Step 1, per block: find what the core holds. `image` covers ``block.read``."""

    def reach(self, tables: Sequence[Table]) -> int | None:
        """Return how many voxels around a core another block's table matters; None: no `settle` needed."""

    def settle(self, own: Table, others: Table, block: Block) -> Table:
        """Step 2, per block, repeated until nothing changes: decide `own` in the light of `others`."""

    def survivors(self, table: Table) -> Table:
        """Return the part of a table that other blocks must see; two equal results mean "no change"."""

    def number(self, tables: Mapping[tuple[int, ...], Table]) -> dict[tuple[int, ...], Table]:
        """Step 3, once: give global ids, by position, independent of the grid. Returns a table per block."""

    def paint(self, image: Array | None, block: Block, numbered: Table) -> np.ndarray:
        """Step 4, per block: return the labels of the core (int32, or int64 when ids need it).

        `numbered` is the concatenation of the numbered tables of the block and of every block within reach.
        """


def check_image(shape: Sequence[int], dtype: np.dtype[Any], *, ndim: Sequence[int] = (2, 3)) -> None:
    """Raise `ValueError` unless `shape` and `dtype` are those of an image that operators take.

    Parameters
    ----------
    shape, dtype
        Of the spatial axes of one time point and channel.
    ndim
        Accepted numbers of spatial axes.
    """
    if len(shape) not in ndim:
        wanted = " or ".join({2: "2 (y, x)", 3: "3 (z, y, x)"}[n] for n in ndim)
        raise ValueError(
            f"`image` has {len(shape)} spatial axes {tuple(shape)}; this operator takes {wanted}"
        )
    if np.dtype(dtype).name not in ACCEPTED_DTYPES:
        raise ValueError(f"`image` has dtype {dtype}; accepted are {', '.join(ACCEPTED_DTYPES)}")


def labels_dtype(ids: np.ndarray) -> np.dtype[Any]:
    """Return int32, or int64 where an id of `ids` needs it."""
    largest = int(ids.max(initial=0))
    return np.dtype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)

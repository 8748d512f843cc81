"""What every operator offers, whoever drives it: eager code, the lazy layer or a job.

An *image operator* maps one block to one block; a *label operator* maps a volume to labels: to those of objects in
steps that work on one block each, with tables of its neighbours, or to classes, voxel by voxel. All are frozen
dataclasses: parameters in, numbers out, no state.

Nothing that depends on the data is decided inside a block. An operator that needs such a number lists it
in ``needs``: a float is a percentile of the whole volume and channel, a string is ``"mean"`` or ``"otsu"``.
`resolve` takes those numbers and returns an operator that needs nothing; only such an operator may be
called on a block. `chunkrestore.statistics` computes them, exactly, whatever the block grid. An operator that
needs ``"pilot"`` computes that one itself, from a few regions of the volume that do not depend on the grid
(`PilotOperator`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

from chunkrestore.statistics import ACCEPTED_DTYPES

if TYPE_CHECKING:
    from chunkrestore.grid import Block, BlockGrid, Halo, Slices

Array: TypeAlias = Any
"""An array of NumPy, CuPy or another array-API namespace."""

Statistic: TypeAlias = float | str
"""A percentile (0 to 100), ``"mean"``, ``"otsu"`` or ``"pilot"``."""

Table: TypeAlias = dict[str, np.ndarray]
"""What label steps exchange: a few named arrays, one row per object, saved as one ``.npz``."""


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
class VoxelOperator(Operator, Protocol):
    """An operator that tells what every voxel belongs to, such as its class: labels that no block has to agree upon."""

    @property
    def classes(self) -> Mapping[int, str | None]:
        """Every label but 0, the background, with its name if it has one."""

    def result_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the integer dtype of the labels of an image of `dtype`."""

    def __call__(self, image: Array, block: Block | None = None) -> np.ndarray:
        """Label one block; arguments and shape of the result are those of an `ImageOperator`."""


@runtime_checkable
class ObjectOperator(Operator, Protocol):
    """An operator whose result is instance labels (0 = background).

    It is one of two kinds, which differ in what happens between `detect` and `paint`: objects that compete
    across blocks (`SettlingOperator`), or parts of objects that are joined across blocks (`JoiningOperator`).
    """

    def __call__(self, image: Array) -> np.ndarray:
        """Segment a whole volume in one piece; an unresolved operator resolves itself on it."""

    def detect(self, image: Array, block: Block) -> Table:
        """Find what the core holds. `image` covers ``block.read``."""

    def paint(self, block: Block, numbered: Sequence[Table]) -> np.ndarray:
        """Return the labels of the core (int32, or int64 when ids need it).

        `numbered` are tables with ``ids`` (int64): of this block and those whose objects can show in it, an id for
        every row (settling), or of this block alone, an id for every local label (joining). Blocks without objects have
        none.
        """


@runtime_checkable
class SettlingOperator(ObjectOperator, Protocol):
    """A label operator whose candidates compete, also with those of other blocks."""

    def decide(self, table: Table) -> Table:
        """Decide which of a block's candidates survive among themselves; reads no image and uses no device."""

    def radius(self, table: Table) -> float | None:
        """Return how far any row reaches around its point, in voxels, rounding included; None without rows.

        Two rows can meet, and a row can show in a core, only where less than the sum of their reaches lies between.
        """

    def settle(self, own: Table, others: Table, block: Block) -> Table:
        """Decide `own` again in the light of the survivors of `others`; repeated until nothing changes."""

    def survivors(self, table: Table) -> Table:
        """Return the part of a table that other blocks must see; two equal results mean "no change"."""

    def within(self, survivors: Table, block: Block, distance: float) -> Table:
        """Return those of another block's survivors whose points lie within `distance` voxels of a block's core."""

    def measure(self, own: Table, others: Table, block: Block) -> Table:
        """Return those survivors of `own` that show, with ``key`` (int64, see `chunkrestore.stitch.numbering`)."""


@runtime_checkable
class JoiningOperator(ObjectOperator, Protocol):
    """A label operator whose blocks are labelled each for itself; labels of one object are then joined.

    Its tables, from `show` if that is needed and otherwise from `detect`, have ``key`` (int64): per local label the
    raster index in the volume of its first voxel in the core; and ``runs``, which a block needs to paint itself and no
    other block looks at. Reaches are in blocks: steps of the index, the largest of all axes.
    """

    def show_reach(self, grid: BlockGrid) -> int:
        """How far away blocks are whose tables `show` needs; 0 if there is nothing to show."""

    def show(self, own: Table, others: Sequence[Table], block: Block) -> Table:
        """Return what the core shows, of objects of this block and of `others`, all that have any around it."""

    def link_reach(self, grid: BlockGrid) -> int:
        """How far away blocks can be whose labels are of the same object."""

    def links(self, own: Table, other: Table, block: Block, other_block: Block) -> np.ndarray:
        """Return which labels of two blocks are one object: int64 (n, 2), key of the own and of the other one.

        The other block finds the same pairs. Tables come without ``runs``.
        """


LabelOperator: TypeAlias = ObjectOperator | VoxelOperator
"""An operator whose result is labels, which go into the ``labels`` group of an image."""


def channels_of(operator: Operator) -> int:
    """Return how many channels `operator` takes together; with more than 1 they are the last axis of its image."""
    return int(getattr(operator, "n_channels", 1))


def concatenate(tables: Iterable[Table]) -> Table:
    """Join tables row by row; an empty mapping if there are none."""
    parts = list(tables)
    return {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}


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

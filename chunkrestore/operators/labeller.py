"""Any function that labels an image, block by block, with labels joined across blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Self

import numpy as np

from chunkrestore.backend import to_numpy
from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.components import core_table
from chunkrestore.operators.base import Array, Statistic, Table, check_image
from chunkrestore.operators.functions import called, function_of, name_of, source_digest
from chunkrestore.operators.intensities import (
    Limits,
    checked_limits,
    checked_percentiles,
    limits_from,
    of_channels,
    scaled,
)
from chunkrestore.operators.rules import JoinedByRule, Rule, Touching, rule
from chunkrestore.statistics import NonFiniteError

_TABLE_NBYTES = {"touching": 56, "iou": 56, "centroid": 120}
"""Peak per voxel of what a block reads that its table takes while it is made, where every voxel is another label."""


@dataclass(frozen=True)
class Labeller(JoinedByRule):
    """Segment with any function from image to labels, such as Cellpose or a watershed.

    The function is called once per block, on the block's core and `depth` voxels around it. Then labels of
    different blocks that are one object are joined: the same labels as of the whole volume, for every block grid, if
    the function labels an object alike wherever it sees it, and no object is longer than `depth` on any axis (for
    ``"touching"``: if objects are the connected components of a foreground that it finds alike).

    Parameters
    ----------
    function
        Takes an image, a NumPy array of its own of the shape of what the block reads (with `n_channels` more than 1,
        channels are the last axis), in input intensities, or, with `normalization` or `percentiles`, float32.
        Returns labels: an array of that shape (without channels) of integers, 0 for background and another number
        of at least 1 for each object, the same numbers in other blocks or not. Numbers of the whole volume that it
        needs, such as a threshold, must be part of it: whatever it decides by looking at a block differs between
        blocks.

        Or its name, ``"package.module:name"``. A function that can be imported is kept by name, so that workers import
        it and a job can be resumed; with a lambda, a closure or a function of a script, only the script goes on.
    depth
        Halo in voxels, one number or one per axis: what the function must see around an object's voxels, and for
        ``"iou"`` and ``"centroid"`` the length of the longest object, at least 1.
    by, threshold, connectivity
        When labels of two blocks are one object, as for `chunkrestore.merge_labels`: ``"iou"``, ``"centroid"`` or
        ``"touching"``.
    normalization
        Input intensities (low, high) that the function sees as 0 and 1, or one such pair per channel; what lies beyond
        is not clipped. None takes `percentiles`, if they are given.
    percentiles
        Percentiles of the whole volume and channel that give `normalization`.
    n_channels
        Channels that the function takes together.
    voxel_nbytes
        Bytes that the function takes at its peak per voxel of what it is given, with what it returns. Blocks are sized
        by it; it cannot be known, and the default is a guess.

    Raises
    ------
    ImportError, ValueError
        If the function cannot be found, or a parameter is out of its range.
    """

    function: Callable[[np.ndarray], Any] | str
    _: KW_ONLY
    depth: int | Sequence[int] = 0
    by: str = "iou"
    threshold: float = 0.5
    connectivity: int = 1
    normalization: Limits | None = None
    percentiles: tuple[float, float] | None = None
    n_channels: int = 1
    voxel_nbytes: int = 64

    name = "labeller"

    def __post_init__(self) -> None:
        if isinstance(self.function, str):
            function_of(self.function)
        elif not callable(self.function):
            raise ValueError(f"`function` must be callable or 'package.module:name', got {self.function!r}")
        else:
            object.__setattr__(self, "function", name_of(self.function) or self.function)
        for name, least in (("n_channels", 1), ("voxel_nbytes", 0)):
            if not _is_whole(getattr(self, name), least):
                raise ValueError(
                    f"`{name}` must be a whole number of at least {least}, got {getattr(self, name)!r}"
                )
        if self.normalization is not None:
            object.__setattr__(self, "normalization", checked_limits(self.normalization, self.n_channels))
        if self.percentiles is not None:
            object.__setattr__(self, "percentiles", checked_percentiles(self.percentiles))
        object.__setattr__(self, "depth", _checked_depth(self.depth, self._rule, self.by))

    @property
    def needs(self) -> frozenset[Statistic]:
        """Both percentiles, if they are given and `normalization` is not."""
        return frozenset(self.percentiles or ()) if self.normalization is None else frozenset()

    def resolve(self, statistics: Mapping[Statistic, Any]) -> Self:
        """Return this operator with its normalisation decided."""
        if self.normalization is not None or self.percentiles is None:
            return self
        return replace(self, normalization=limits_from(statistics, self.percentiles, self.n_channels))

    def check(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raise `ValueError` if a volume of `shape` and `dtype` cannot be processed."""
        check_image(shape, dtype)
        if isinstance(self._rule, Touching) and self.connectivity > len(shape):
            raise ValueError(f"`connectivity` {self.connectivity} is more than the image's {len(shape)} axes")
        if isinstance(self.depth, tuple) and len(self.depth) != len(shape):
            raise ValueError(
                f"`depth` {self.depth} must have one number per axis of an image of shape {tuple(shape)}"
            )

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return `depth` on every axis."""
        return Halo(self.depth if isinstance(self.depth, tuple) else (self.depth,) * len(shape))  # type: ignore[arg-type]

    def memory_nbytes(self, read_shape: Sequence[int]) -> int:
        """Return the peak of `detect`: the function and its own copy of the image, or its labels and their table."""
        nbytes = max(4 * self.n_channels + self.voxel_nbytes, 8 + _TABLE_NBYTES[self.by])
        return nbytes * math.prod(read_shape)

    def describe(self) -> Mapping[str, Any]:
        """Return the parameters, and a digest of the function's own source."""
        return {
            "operator": self.name,
            "function": called(self.function),
            "function_digest": source_digest(self.function),
            "depth": list(self.depth) if isinstance(self.depth, tuple) else self.depth,
            "by": self.by,
            "threshold": self.threshold,
            "connectivity": self.connectivity,
            "normalization": None if self.normalization is None else np.array(self.normalization).tolist(),
            "percentiles": None if self.percentiles is None else list(self.percentiles),
            "n_channels": self.n_channels,
        }

    def detect(self, image: Array, block: Block) -> Table:
        """Call the function; return what is kept of its labels.

        Raises
        ------
        ValueError
            If `image` does not cover ``block.read``, or what the function returns is not labels of that shape.
        NonFiniteError
            If a voxel is NaN or infinite.
        """
        return self._rule.table(self._label(image, block), block, self.halo(block.volume_shape).depth)

    def __call__(self, image: Array) -> np.ndarray:
        """Label a whole volume in one call of the function; ids run from 1 in the order of first voxels."""
        shape = image.shape if self.n_channels == 1 else image.shape[:-1]
        self.check(shape, image.dtype)
        operator = self.resolve(of_channels(image, self.needs, self.n_channels)) if self.needs else self
        block = Block.whole(shape)
        table, _ = core_table(operator._label(image, block), block)
        return operator.paint(block, [table | {"ids": np.argsort(np.argsort(table["key"])) + 1}])

    @property
    def _rule(self) -> Rule:
        return rule(self.by, threshold=self.threshold, connectivity=self.connectivity)

    def _label(self, image: Array, block: Block) -> np.ndarray:
        """Return the function's labels of what a block reads."""
        if self.needs:
            raise ValueError(
                "`normalization` is not decided; call `resolve` with the whole volume's percentiles"
            )
        expected = (*block.read_shape, *((self.n_channels,) if self.n_channels > 1 else ()))
        if tuple(image.shape) != expected:
            raise ValueError(f"`image` has shape {tuple(image.shape)} but {block} reads {expected}")
        host = to_numpy(image)
        if host.dtype.kind == "f" and not np.isfinite(host).all():
            raise NonFiniteError(f"{block} holds voxels that are NaN or infinite; replace them first")
        # Its own copy: a function that works in place must not change the image that others read.
        given = np.array(host, order="C") if self.normalization is None else scaled(host, self.normalization)
        function = function_of(self.function) if isinstance(self.function, str) else self.function
        try:
            labels = function(given)
        except Exception as error:
            error.add_note(f"`function` {called(self.function)} failed on {block}")
            raise
        return self._checked(labels, block)

    def _checked(self, labels: Any, block: Block) -> np.ndarray:
        """Return what the function returned, if it is labels of what `block` reads."""
        returned = f"{block}: `function` {called(self.function)} returned"
        if not (hasattr(labels, "shape") and hasattr(labels, "dtype")):
            raise ValueError(f"{returned} {type(labels).__name__}; it must return an array of labels alone")
        host = to_numpy(labels)
        if host.shape != block.read_shape:
            raise ValueError(f"{returned} shape {host.shape}; it must be the image's, {block.read_shape}")
        if host.dtype.kind not in "iu":
            raise ValueError(
                f"{returned} {host.dtype}; labels must be integers, another one for each object (of a mask: "
                "scipy.ndimage.label)"
            )
        if host.min(initial=0) < 0:
            raise ValueError(f"{returned} {host.min()}; labels must be at least 0")
        return host


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= least)


def _checked_depth(depth: int | Sequence[int], a_rule: Rule, by: str) -> int | tuple[int, ...]:
    per_axis = tuple(depth) if isinstance(depth, Sequence) else (depth,)
    least = 1 if a_rule.needs_halo else 0
    if not per_axis or not all(_is_whole(d, least) for d in per_axis):
        why = f" for by={by!r}, which compares what blocks have both seen" if least else ""
        raise ValueError(
            f"`depth` must be a number of voxels of at least {least}, or one per axis{why}; got {depth}"
        )
    whole = tuple(int(d) for d in per_axis)
    return whole if isinstance(depth, Sequence) else whole[0]

"""Ids in an array of labels, however it is held: which there are, and whether a smaller dtype holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def used_ids(labels: Any, most: int) -> list[int]:
    """Return the ids in `labels` other than 0, in order; all of it is read, plane by plane or chunk by chunk.

    Parameters
    ----------
    labels
        NumPy array, dask array, or anything that can be sliced.
    most
        How many may be found.

    Raises
    ------
    ValueError
        If there are more.
    """
    if hasattr(labels, "__dask_graph__"):
        import dask.array as da

        found = da.unique(labels).compute()
    else:
        found = np.empty(0, labels.dtype)
        for part in range(labels.shape[0]):
            found = np.union1d(found, np.asarray(labels[part]))
            if len(found) > most + 1:
                break
    ids = [int(i) for i in found if i]
    if len(ids) > most:
        raise ValueError(
            f"`colors` 'auto' are for at most {most} objects, and there are more; leave it out: viewers colour labels "
            "by id"
        )
    return ids


def as_dtype(labels: Any, dtype: Any, name: str) -> Any:
    """Return `labels` as another integer dtype, checked where they are read.

    Raises
    ------
    ValueError
        Now for a NumPy array, otherwise when the part that holds it is read: if `dtype` does not hold an id.
    """
    kind = np.dtype(dtype).newbyteorder("=")
    if kind == labels.dtype or kind.kind not in "iu" or labels.dtype.kind not in "iu":
        return labels  # what is no integer is refused by name where labels are created
    if isinstance(labels, np.ndarray):
        return _cast(labels, kind, name)
    if hasattr(labels, "__dask_graph__"):
        meta = np.empty((0,) * labels.ndim, kind)
        return labels.map_blocks(_cast, dtype=kind, meta=meta, kind=kind, what=name)
    return _Cast(labels, kind, name)


@dataclass(frozen=True)
class _Cast:
    """Labels that can be sliced, of another dtype."""

    labels: Any
    dtype: np.dtype[Any]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.labels.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return _cast(np.asarray(self.labels[index]), self.dtype, self.name)


def _cast(block: np.ndarray, kind: np.dtype[Any], what: str) -> np.ndarray:
    limits = np.iinfo(kind)
    for i in (int(block.min()), int(block.max())) if block.size else ():
        if not limits.min <= i <= limits.max:
            raise ValueError(
                f"`dtype` {kind.name} of labels {what!r} does not hold id {i}; its largest is {limits.max}, use a "
                "wider one"
            )
    return block.astype(kind)

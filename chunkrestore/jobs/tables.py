"""Tables that the tasks of a label pass leave for each other: one file per kind and block."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Collection
from pathlib import Path

import numpy as np

from chunkrestore.jobs.ledger import Item
from chunkrestore.operators.base import Table

_reading = threading.Lock()
"""NumPy parses the header of every array by `ast`, which fails in CPython 3.11 if a garbage collection that runs Python
code (Dask's diagnosis does) lets another thread do the same meanwhile: "AST constructor recursion depth mismatch"
(https://github.com/python/cpython/issues/106905)."""


def save_table(folder: Path, kind: str, item: Item, table: Table) -> None:
    """Write a table whole or not at all."""
    path = _path(folder, kind, item)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A task may be done twice at once, by a worker that a dead scheduler has left behind, or in two threads of one.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **table)
    os.replace(partial, path)


def load_table(
    folder: Path,
    kind: str,
    item: Item,
    columns: Collection[str] | None = None,
    *,
    without: Collection[str] = (),
) -> Table:
    """Read a table, or some of its columns: only those are read from the disk."""
    with _reading, np.load(_path(folder, kind, item), allow_pickle=False) as stored:
        wanted = stored.files if columns is None else columns
        return {key: stored[key] for key in wanted if key not in without}


def drop_table(folder: Path, kind: str, item: Item) -> None:
    """Remove a table, if it is there."""
    _path(folder, kind, item).unlink(missing_ok=True)


def digest_of(table: Table) -> str:
    """Return the SHA-256 of what a table holds."""
    content = hashlib.sha256()
    for key in sorted(table):
        content.update(key.encode() + np.ascontiguousarray(table[key]).tobytes())
    return content.hexdigest()


def n_rows(table: Table) -> int:
    """Return the number of rows of a table."""
    return len(next(iter(table.values())))


def _path(folder: Path, kind: str, item: Item) -> Path:
    return folder / kind / f"{'.'.join(map(str, item))}.npz"

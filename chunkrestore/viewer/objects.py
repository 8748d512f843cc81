"""One row of the table of objects that lies beside labels, without reading the rest of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chunkrestore.jobs.object_table import table_path

MAX_GROUP_NBYTES = 2**28
"""Of the rows that are decompressed together, without their shapes. Tables of this package have 6 to 20 MB."""

_MAX_COLUMNS = 256


def read_object(labels: str, label: int, *, t: int = 0, c: int = 0) -> dict[str, Any] | None:
    """Return what the table beside labels says of one object.

    Parameters
    ----------
    labels
        Path of the label group.
    label
        Id of the object.
    t, c
        Its time point and channel.

    Returns
    -------
    dict or None
        Values by column, lists left out; None if there is no table, no such row, or no pyarrow.

    Raises
    ------
    ValueError
        If the table cannot be read, or not in bounded memory.
    """
    if not -(2**63) <= label < 2**63:
        return None  # beyond the numbers of a table
    with _opened(labels) as file:
        return None if file is None else _row(file, {"label": label, "t": t, "c": c})


def read_columns(labels: str) -> dict[str, Any] | None:
    """Return the columns of the table beside labels, lists left out; None if there is none, or too much of it."""
    with _opened(labels) as file:
        if file is None:
            return None
        plain = _plain_columns(file)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if "label" not in plain or sum(_nbytes(group, plain) for group in groups) > MAX_GROUP_NBYTES:
            return None
        return {
            name: column.to_numpy()
            for name, column in zip(plain, file.read(columns=plain).columns, strict=True)
        }


@contextmanager
def _opened(labels: str) -> Iterator[Any]:
    """Lend the open table beside labels, None if there is none or no pyarrow; its errors are `ValueError`."""
    path = table_path(labels)
    library = _library() if os.path.isfile(path) else None  # not in archives and at URLs
    if library is None:
        yield None
        return
    try:
        with library.parquet.ParquetFile(path) as file:
            yield file
    except (library.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _library() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    return pyarrow


def _plain_columns(file: Any) -> list[str]:
    return [f.name for f in file.schema_arrow if not hasattr(f.type, "value_type")][:_MAX_COLUMNS]


def _nbytes(group: Any, columns: list[str]) -> int:
    """Return what the columns of a group of rows take when they are unpacked, as the file says."""
    listed = (group.column(k) for k in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in listed if c.path_in_schema in columns)


def _row(file: Any, key: dict[str, int]) -> dict[str, Any] | None:
    """Return the row with the values of `key`, read from the groups of rows that can hold it."""
    plain = _plain_columns(file)
    known = {name: value for name, value in key.items() if name in plain}
    if "label" not in known:
        return None
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        if not _may_hold(group, known):
            continue
        if (nbytes := _nbytes(group, plain)) > MAX_GROUP_NBYTES:
            raise ValueError(f"{nbytes} bytes of the table lie together, more than {MAX_GROUP_NBYTES}")
        rows = _matching(file.read_row_group(i, columns=plain), known)
        if rows.num_rows:
            return {name: _plain(values[0]) for name, values in rows.slice(0, 1).to_pydict().items()}
    return None


def _may_hold(group: Any, key: dict[str, int]) -> bool:
    """Return whether the statistics of a group of rows leave room for `key`."""
    for k in range(group.num_columns):
        column = group.column(k)
        wanted, found = key.get(column.path_in_schema), column.statistics
        if wanted is None or found is None or not found.has_min_max:
            continue
        if not found.min <= wanted <= found.max:
            return False
    return True


def _matching(table: Any, key: dict[str, int]) -> Any:
    import pyarrow.compute as compute

    for name, value in key.items():
        table = table.filter(compute.equal(table[name], value))
    return table


def _plain(value: Any) -> Any:
    """Return a value that JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)

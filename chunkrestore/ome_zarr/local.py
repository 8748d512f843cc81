"""Files and folders on the local file system, for `chunkrestore.ome_zarr.store`."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES
from chunkrestore.ome_zarr.untrusted import read_part

if TYPE_CHECKING:
    from zarr.abc.store import Store


def join(folder: str, *parts: str) -> str:
    """Return the path of a member of `folder`."""
    return str(Path(folder, *(p for p in parts if p)))


def parents(path: str) -> list[str]:
    """Return the folders around `path`, innermost first."""
    return [str(parent) for parent in Path(path).parents]


def same(first: str, second: str) -> bool:
    """Return whether two paths lead to the same place."""
    return Path(first).resolve() == Path(second).resolve()


def read(path: str) -> bytes | None:
    """Return the content of a document, or None if there is none; of a file too large to be one, a part."""
    return read_part(path, 0, MAX_DOCUMENT_NBYTES + 1)


def write(path: str, content: bytes, *more: bytes) -> None:
    """Write a file of one or more parts; a reader sees the old content or the new one, never a part."""
    temporary = f"{path}.{uuid.uuid4().hex}.partial"
    file = _new_file(temporary)
    try:
        try:
            for part in (content, *more):
                rest = memoryview(part)
                while rest:  # one call takes up to 2 GiB, and less where a disk is full
                    rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _new_file(path: str) -> int:
    """Open a file that does not exist, nor perhaps its folder; return its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def remove(paths: Sequence[str]) -> None:
    """Remove files; absent ones are fine."""
    for path in paths:
        Path(path).unlink(missing_ok=True)


def remove_tree(folder: str) -> None:
    """Remove a folder with everything in it; of a link, the link alone."""
    target = Path(folder)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def names(folder: str) -> list[str] | None:
    """Return what is in `folder`, or None if it does not exist.

    Raises
    ------
    FileExistsError
        If `folder` is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; give the path of a new store")
    return sorted(p.name for p in path.iterdir()) if path.exists() else None


def is_free(path: str) -> bool:
    """Return whether nothing lies at `path`, or an empty folder."""
    return not Path(path).is_file() and not names(path)


def is_file(path: str) -> bool:
    """Return whether a plain file lies at `path`."""
    return Path(path).is_file()


def exists(path: str) -> bool:
    """Return whether anything lies at `path`."""
    return Path(path).exists()


def stamp(path: str) -> int | None:
    """Return when the file at `path` was written, in nanoseconds, or None if there is none."""
    return Path(path).stat().st_mtime_ns if Path(path).exists() else None


def free_nbytes(path: str) -> int | None:
    """Return the free space of the file system that holds, or will hold, `path`."""
    nearest = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    return shutil.disk_usage(nearest).free


def clean_partial(folder: str) -> int:
    """Remove what writers that were killed left in `folder` and below, and return how many files."""
    n_removed = 0
    for path in Path(folder).rglob("*.partial"):
        if path.is_file():
            path.unlink(missing_ok=True)
            n_removed += 1
    return n_removed


def array_store(folder: str) -> Store:
    """Return the zarr store whose root is `folder`."""
    from zarr.storage import LocalStore

    return LocalStore(folder)

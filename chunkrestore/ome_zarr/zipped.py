"""Stores in zip files on the local file system, for `chunkrestore.ome_zarr.store`: ``image.ozx``, ``image.zarr.zip``.

A path goes on inside the file: ``plate.zip/A/1/0``. Nothing is written: a zip file cannot be written by several
processes, nor be resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chunkrestore.ome_zarr import local
from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES
from chunkrestore.ome_zarr.zip_index import DOCUMENTS, Archive, open_archive

if TYPE_CHECKING:
    from zarr.abc.store import Store

SUFFIXES = (".zip", ".ozx")

join = local.join
parents = local.parents
same = local.same
free_nbytes = local.free_nbytes


def is_named(path: str) -> bool:
    """Return whether `path` may lead into a zip file, by what its parts are called."""
    return any(suffix in path.lower() for suffix in SUFFIXES)


def split(path: str) -> tuple[str, str] | None:
    """Return the path of a zip file and that inside it, or None if `path` leads into none.

    What is called like a zip file and is a folder is a folder.
    """
    if not is_named(path):
        return None
    parts = Path(path).parts
    for k, part in enumerate(parts, 1):
        if part.lower().endswith(SUFFIXES) and not Path(*parts[:k]).is_dir():
            return str(Path(*parts[:k])), "/".join(parts[k:])
    return None


def location(path: str) -> str:
    """Return `path`, or that of the only zarr node in a zip file whose top is none: the folder that was zipped.

    Raises
    ------
    ValueError
        If the zip file cannot be read.
    """
    archive, inner = _open(path)
    if archive is None or inner or any(name in archive.members for name in DOCUMENTS):
        return path
    folders = {folder for folder, _, name in (m.partition("/") for m in archive.members) if name in DOCUMENTS}
    return join(path, *folders) if len(folders) == 1 else path


def writable(path: str) -> str:
    """Raise: nothing can be written into a zip file."""
    raise _read_only(path)


def read(path: str) -> bytes | None:
    """Return the content of a document, or None if there is none; of a member too large to be one, a part."""
    archive, inner = _open(path)
    return None if archive is None else archive.read(inner, 0, MAX_DOCUMENT_NBYTES + 1)


def read_part(path: str, start: int, nbytes: int) -> bytes | None:
    """Return a part of a member, or None if there is none; as `Archive.read`.

    Raises
    ------
    FileNotFoundError
        If the zip file is gone: an absent chunk stands for zeros.
    """
    archive, inner = _open(path)
    if archive is None:
        raise FileNotFoundError(f"{path} cannot be read: its zip file is gone")
    return archive.read(inner, start, nbytes)


def write(path: str, _content: bytes) -> None:
    """Raise: nothing can be written into a zip file."""
    raise _read_only(path)


def remove(paths: Sequence[str]) -> None:
    """Raise: nothing can be removed from a zip file."""
    for path in paths:
        raise _read_only(path)


def remove_tree(folder: str) -> None:
    """Raise: nothing can be removed from a zip file."""
    raise _read_only(folder)


def names(folder: str) -> list[str] | None:
    """Return what is in a folder, or None if there is nothing."""
    archive, inner = _open(folder)
    within = f"{inner}/" if inner else ""
    members = archive.members if archive is not None else ()
    return sorted({m[len(within) :].partition("/")[0] for m in members if m.startswith(within)}) or None


def is_free(path: str) -> bool:
    """Raise: nothing can be written into a zip file."""
    raise _read_only(path)


def is_file(path: str) -> bool:
    """Return whether a member lies at `path`, or `path` is the zip file."""
    archive, inner = _open(path)
    return archive is not None and (not inner or inner in archive.members)


def exists(path: str) -> bool:
    """Return whether a member lies at `path` or below it."""
    archive, inner = _open(path)
    return archive is not None and (is_file(path) or any(m.startswith(f"{inner}/") for m in archive.members))


def stamp(path: str) -> str | None:
    """Return what changes whenever the member at `path` is another one, or None if there is none."""
    archive, inner = _open(path)
    member = None if archive is None else archive.members.get(inner)
    return None if archive is None or member is None else f"{local.stamp(archive.path)}:{member.crc}"


def clean_partial(_folder: str) -> int:
    """Return 0: nothing is ever written."""
    return 0


def array_store(folder: str) -> Store:
    """Return the zarr store whose root is `folder`."""
    from chunkrestore.ome_zarr.zip_store import ZippedStore

    return ZippedStore(folder)


def _open(path: str) -> tuple[Archive | None, str]:
    """Return the zip file that `path` leads into, None if there is none, and the path inside it."""
    place = split(path)
    return (None, "") if place is None else (open_archive(place[0]), place[1])


def _read_only(path: str) -> ValueError:
    return ValueError(
        f"`output` {path} cannot be written: zip files are read only; write a folder (image.ome.zarr), and zip what is "
        "inside it when it is finished (zip -0 -r)"
    )

"""The files of a store as a web server hands them out: documents and chunks, whole or in part, and nothing else."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

_DOCUMENTS = frozenset(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"))
_CHUNK = re.compile(r"c|(c\.)?\d{1,10}(\.\d{1,10})*")
_PIECE_NBYTES = 2**20
# Windows has one of them alone; a pipe without a writer would be waited for.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


class UnsatisfiableRangeError(ValueError):
    """A range begins behind the end of its file."""


@dataclass(frozen=True)
class RawFile:
    """An open file of a store."""

    file: BinaryIO
    """Open for reading."""
    nbytes: int
    """Its length."""
    modified: float
    """When it was written, in seconds since 1970."""
    is_document: bool
    """Whether it is JSON."""

    @property
    def headers(self) -> dict[str, str]:
        """What identifies its content."""
        return {
            "Content-Type": "application/json" if self.is_document else "application/octet-stream",
            "Last-Modified": formatdate(self.modified, usegmt=True),
            "ETag": f'"{self.nbytes:x}-{self.modified:.6f}"',
            "Accept-Ranges": "bytes",
        }

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`; fewer if the file has become shorter."""
        self.file.seek(start)
        while start < stop:
            piece = self.file.read(min(_PIECE_NBYTES, stop - start))
            if not piece:
                return
            start += len(piece)
            yield piece


def open_raw(root: str, path: str) -> RawFile | None:
    """Open a document or chunk of a store for a request; the caller closes it.

    Parameters
    ----------
    root
        Folder of the store.
    path
        What stands behind the store in a URL, percent-encoded, without a slash in front.

    Returns
    -------
    RawFile or None
        None if there is no such file, and for all that is no document or chunk: other files, folders, names with
        ``..``, what links lead to outside the store.
    """
    key = key_of(path)
    if key is None:
        return None
    folder = os.path.realpath(root)
    target = os.path.realpath(os.path.join(folder, key))
    if not target.startswith(os.path.join(folder, "")) or not _is_served(os.path.relpath(target, folder)):
        return None
    try:
        # Links were followed: one that appears in between is not.
        file = os.fdopen(os.open(target, _FLAGS), "rb")
    except OSError:
        return None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        return None
    return RawFile(file, status.st_size, status.st_mtime, key.rpartition("/")[2] in _DOCUMENTS)


def key_of(path: str) -> str | None:
    """Return the key of a document or chunk that a percent-encoded path names, None for any other."""
    try:
        key = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return None
    is_plain = key.isprintable() and "\\" not in key and ":" not in key and len(key) <= 4096
    return key if is_plain and _is_served(key) else None


def _is_served(key: str) -> bool:
    """Return whether a key names a document or chunk, in folders that are not hidden."""
    *folders, name = key.replace(os.sep, "/").split("/")
    is_known = name in _DOCUMENTS or _CHUNK.fullmatch(name) is not None
    return is_known and not any(not folder or folder.startswith(".") for folder in folders)


def parse_range(header: str | None, nbytes: int) -> tuple[int, int] | None:
    """Return start and stop of the part that a ``Range`` header asks for, None for the whole.

    More than one range, and what cannot be understood, asks for the whole, as RFC 9110 (14.2) allows.

    Raises
    ------
    UnsatisfiableRangeError
        If the file ends before the range begins.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip())
    if found is None or found.group() == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        if not int(last) or not nbytes:
            raise UnsatisfiableRangeError("no bytes are asked for")
        return max(0, nbytes - int(last)), nbytes
    if last and int(last) < int(first):
        return None
    if int(first) >= nbytes:
        raise UnsatisfiableRangeError("the file is shorter")
    return int(first), min(int(last) + 1 if last else nbytes, nbytes)

"""Files and paths that somebody else wrote: reading a bounded part, and telling where links lead.

A store's own path may be a link, and so may what lies inside an array (git-annex keeps every file of a data set
that way): it is read through. The folders of groups and arrays must not lead out of their store, and nothing is
written or removed behind any link inside it: a link to a file is replaced, one to a folder refused.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def read_part(path: str, start: int, nbytes: int) -> bytes | None:
    """Return up to `nbytes` of a file, or None if there is none.

    Parameters
    ----------
    path
        May be anything: what is no regular file is not waited for.
    start
        First byte; a negative number counts from the end, and stops at the beginning.
    nbytes
        A smaller file is read to its end.

    Raises
    ------
    ValueError
        If `path` is a device, a pipe, a socket, or a link to itself.
    """
    file = open_regular(path)
    if file is None:
        return None
    with file:
        size = os.fstat(file.fileno()).st_size
        if start:
            file.seek(max(0, start + size) if start < 0 else start)
        # The size is asked for because a buffer of all of `nbytes` is made before the first byte is read
        return file.read(max(0, min(nbytes, size - file.tell())))


def open_regular(path: str) -> BinaryIO | None:
    """Open a file for reading, or return None if there is none.

    Raises
    ------
    ValueError
        As for `read_part`.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  # the caller closes it
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link to itself, a socket
            raise ValueError(f"{path} cannot be read: {error.strerror}; only files are read") from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is a device, pipe or socket; only files are read")
    return file


def _without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for its writer forever. Windows has no such flag and no such files.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def stays_inside(folder: str, member: str) -> bool:
    """Return whether `member` of `folder` lies in it, all links followed."""
    root = os.path.realpath(folder)
    return os.path.realpath(os.path.join(root, member)).startswith(os.path.join(root, ""))


def is_unlinked(folder: str, member: str) -> bool:
    """Return whether there is no link on the way from `folder` to its `member`, itself included."""
    root = os.path.realpath(folder)
    return os.path.realpath(os.path.join(root, member)) == os.path.normpath(os.path.join(root, member))

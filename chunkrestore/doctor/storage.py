"""Try what a job will do to the file system of its output, with small files that are gone afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chunkrestore.doctor.finding import Finding

_LITTLE_NBYTES = 10 * 2**30
_SKEW_SECONDS = 30.0


@dataclass(frozen=True)
class Probe:
    """What a file system did when it was tried."""

    folder: str
    """Nearest existing folder of the output."""
    free_nbytes: int
    free_files: int | None
    """Files that can still be made; None if the file system does not count them."""
    exclusive: bool
    """Creating a file that exists fails."""
    replaces: bool
    """Renaming over a file replaces its content, whole."""
    links: bool
    """A file can have two names."""
    locks: bool
    """A lock of the operating system (flock) keeps others out."""
    skew_s: float
    """Clock of the file server less that of this machine."""


def probe(store: str | os.PathLike[str]) -> Probe:
    """Try the file system that `store` lies on, or will lie on.

    Raises
    ------
    OSError
        If no file can be made there.
    """
    folder = Path(store).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    space = os.statvfs(folder)
    with tempfile.TemporaryDirectory(prefix=".chunkrestore-doctor-", dir=folder) as name:
        here = Path(name)
        before = time.time()
        (here / "a").write_bytes(b"a")
        skew = (here / "a").stat().st_mtime - (before + time.time()) / 2
        return Probe(
            folder=str(folder),
            free_nbytes=shutil.disk_usage(folder).free,
            free_files=space.f_favail if space.f_files else None,
            exclusive=_refused(lambda: (here / "a").open("xb").close()),
            replaces=_replaces(here),
            links=not _refused(lambda: os.link(here / "a", here / "link")),
            locks=_locks(here / "a"),
            skew_s=skew,
        )


def judge(tried: Probe) -> Iterator[Finding]:
    """Judge what a file system did."""
    found = f"{tried.free_nbytes / 2**30:.1f} GiB free at {tried.folder}"
    if tried.free_files is not None and tried.free_files < 10_000:
        fix = "remove files, or write shards: fewer, larger files"
        yield Finding("disk", "warning", f"{found}, but only {tried.free_files} more files", fix)
    elif tried.free_nbytes < _LITTLE_NBYTES:
        yield Finding("disk", "warning", found, "--dry-run says what a job needs")
    else:
        yield Finding("disk", "ok", found)
    missing = [
        what
        for what, works in (("exclusive creation", tried.exclusive), ("atomic replacement", tried.replaces))
        if not works
    ]
    if missing:
        found = f"no {' and no '.join(missing)} at {tried.folder}; a killed job could not be resumed safely"
        yield Finding("file system", "problem", found, "write to another file system")
    else:
        other = [what for what, works in (("hard links", tried.links), ("flock", tried.locks)) if not works]
        found = "files are created exclusively and replaced whole" + (
            f"; no {', no '.join(other)}" if other else ""
        )
        yield Finding("file system", "ok", found)
    if abs(tried.skew_s) > _SKEW_SECONDS:
        found = (
            f"the file server's is {tried.skew_s:+.0f} s off this machine's; times in reports and TLS suffer"
        )
        yield Finding("clock", "warning", found, "let both follow a time server: timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", "the file server's agrees with this machine's")


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except OSError:
        return True
    return False


def _replaces(here: Path) -> bool:
    (here / "old").write_bytes(b"old")
    (here / "new").write_bytes(b"new")
    try:
        os.replace(here / "new", here / "old")
    except OSError:
        return False
    return (here / "old").read_bytes() == b"new" and not (here / "new").exists()


def _locks(path: Path) -> bool:
    import fcntl

    with path.open("rb") as mine, path.open("rb") as other:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return _refused(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))

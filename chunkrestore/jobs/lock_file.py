"""Files that name a process and change hands in single steps, on local and network file systems.

A file changes in two ways only, each one atomic step of the file system, so that nobody ever reads half of
one and no two processes ever own it:

- There is none: a complete file is linked to the name, which fails if the name is taken.
- There is one, with token S, to be replaced (its owner is dead) or removed (its owner is done): whoever does
  that first links ``lock-S.claim`` in the same way, and then looks whether the file is still that of S. A claim
  is such a file itself: where its owner died, it is claimed and removed by the same rule.

Whether an owner is alive is asked of the operating system where it can know: same boot, same process
namespace, same process number and start. A stopped process is alive, a killed one dead at once. Elsewhere
the heartbeat decides, the file's time of modification. It is compared with that of a file touched just now, so
both times are the file server's and the clocks of machines do not matter.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import secrets
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

STALE_SECONDS = 120.0
"""An owner on another machine is given up when its last heartbeat is older: a file server may hang or fail
over for a minute."""

_MOST_NBYTES = 64 * 2**10
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_OBSERVED = ("age_s", "alive")


@dataclass(frozen=True)
class Holder:
    """The driver that a lock file names."""

    token: str
    """Random, unlike that of any other lock; made from the content where the file is no lock."""
    host: str
    """Name of its machine."""
    pid: int
    """Process number there; 0 where the file is no lock."""
    user: str
    """Who runs it."""
    job: str
    """What it does: ``image`` or ``labels-NAME``."""
    started: float
    """When it took the lock, by its own clock, in unix seconds."""
    slurm_job: str
    """Number of its SLURM job, or nothing."""
    realm: str
    """Boot and process namespace that `pid` belongs to; nothing if not known."""
    birth: str
    """When the process began, which tells it from a later one with the same number."""
    stale_s: float
    """Seconds without heartbeat after which drivers elsewhere may give it up."""
    age_s: float = 0.0
    """Seconds since its last heartbeat when it was looked at."""
    alive: bool | None = None
    """Whether it was alive then; None if that cannot be known."""

    def __str__(self) -> str:
        if not self.pid:
            return f"a file that is no whole lock, changed {self.age_s:.0f} s ago"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        job = f" for job {self.job}" if self.job else ""
        slurm = f" (SLURM job {self.slurm_job})" if self.slurm_job else ""
        beat = f"last heartbeat {self.age_s:.0f} s ago"
        return f"process {self.pid} of {self.user} on {self.host}{slurm}{job}, since {since}, {beat}"


class Draft:
    """A complete file that has no valid name yet."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    def server_time(self) -> float:
        """Return what time it is for the file server, in unix seconds."""
        os.utime(self.path)
        return os.stat(self.path).st_mtime

    def create(self, path: Path) -> bool:
        """Give the draft a second name if nobody has it; False if somebody does."""
        try:
            os.link(self.path, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _create_exclusively(path, self.path.read_bytes())
        # Asked, because a file server may answer a repeated request that it had carried out with "exists".
        found = read(path)
        return found is not None and found.token == self.token

    def change(self, path: Path, found: Holder, *, remove: bool) -> bool:
        """Remove the file at `path`, or put the draft in its place, if it is still what was found."""
        claim = path.with_name(f"lock-{found.token}.claim")
        if not self.create(claim):
            rival = judged(read(claim), self.server_time())
            if rival is not None and not rival.alive:
                self.change(claim, rival, remove=True)
            return False
        try:
            again = read(path)
            if again is None or again.token != found.token:
                return False
            if remove:
                os.unlink(path)
            else:
                os.replace(self.path, path)
            return True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(claim)


@contextmanager
def draft(folder: Path, content: Holder) -> Iterator[Draft]:
    """Write a draft into `folder`; at the end it is gone, unless it replaced another file."""
    path = folder / f"lock-{secrets.token_hex(16)}.draft"
    stored = {key: value for key, value in asdict(content).items() if key not in _OBSERVED}
    try:
        with path.open("xb") as file:
            file.write(json.dumps(stored, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        yield Draft(path, content.token)
    finally:
        path.unlink(missing_ok=True)


def sweep(folder: Path, *, older_than_s: float, server_time: float) -> None:
    """Remove drafts and claims of processes that were killed between two steps."""
    for path in folder.glob("lock-*.*"):
        with suppress(OSError):
            if path.suffix in (".draft", ".claim") and server_time - path.stat().st_mtime > older_than_s:
                path.unlink()


def read(path: Path) -> Holder | None:
    """Return what a file says, with its time of modification for `age_s`; None if there is none.

    It is opened, because a network file system asks the server again when a file is opened, and not when its
    attributes are looked up.
    """
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content, changed = file.read(_MOST_NBYTES), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise
    return replace(_parsed(content), age_s=changed)


def judged(found: Holder | None, server_time: float | None) -> Holder | None:
    """Return what `read` found with its age, and whether it is alive.

    Parameters
    ----------
    found
        As read.
    server_time
        `Draft.server_time`; None where no draft can be written. This machine's clock then has to do for the
        age, and a heartbeat proves nothing.
    """
    if found is None:
        return None
    age = max(0.0, (time.time() if server_time is None else server_time) - found.age_s)
    alive = runs(found)
    if alive is None and server_time is not None:
        alive = age <= found.stale_s
    return replace(found, age_s=age, alive=alive)


def runs(found: Holder) -> bool | None:
    """Return whether the very process runs; None where this process cannot know."""
    if not found.pid or not found.realm or found.realm != _realm():
        return None
    try:
        return _birth(found.pid) == found.birth
    except ProcessLookupError:
        return False
    except OSError:
        return None


def myself(job: str, stale_s: float) -> Holder:
    """Return this process with a new token."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        pid=os.getpid(),
        user=user,
        job=job,
        started=time.time(),
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        realm=_realm(),
        birth=_birth(os.getpid()),
        stale_s=stale_s,
    )


def _create_exclusively(path: Path, content: bytes) -> None:
    """Create a file where the file system has no hard links; for an instant it can be seen empty."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return
    try:
        with file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _parsed(content: bytes) -> Holder:
    numbers: dict[str, Any] = {"pid": int, "started": (int, float), "stale_s": (int, float)}
    names = [field.name for field in fields(Holder) if field.name not in _OBSERVED]
    try:
        entry = json.loads(content)
        values = {name: entry[name] for name in names}
        if any(not isinstance(value, numbers.get(name, str)) for name, value in values.items()):
            raise TypeError
        if not (0 < values["pid"] < 2**31 and values["token"].isalnum()):
            raise ValueError
        return Holder(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        token = hashlib.sha256(content).hexdigest()[:32]
        return Holder(token, "", 0, "", "", 0.0, "", "", "", STALE_SECONDS)


def _birth(pid: int) -> str:
    """Return when a process began, as its machine counts.

    Raises
    ------
    ProcessLookupError
        If there is none, or only its exit status is left.
    PermissionError
        If there is one that cannot be looked at.
    """
    if sys.platform != "linux":
        return _birth_elsewhere(pid)
    # Not psutil's time, which moves whenever the clock of the machine is set.
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except FileNotFoundError:
        # /proc can be mounted such that it hides the processes of others (hidepid); a signal finds them.
        os.kill(pid, 0)
        raise PermissionError(pid) from None
    # Killed, but other threads of it may still be in the middle of a write: then there is more than one left.
    if after_name[0] in (b"Z", b"X") and int(after_name[17]) <= 1:
        raise ProcessLookupError(pid)
    return after_name[19].decode()


def _birth_elsewhere(pid: int) -> str:
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        raise ProcessLookupError(pid) from None
    except psutil.AccessDenied:
        raise PermissionError(pid) from None


@cache
def _realm() -> str:
    """Return where process numbers of this process are valid; nothing if that cannot be told.

    Containers can share host names, hardware addresses and machine ids, but not the boot of a kernel together
    with a process namespace.
    """
    if sys.platform != "linux":
        return f"{socket.gethostname()} {uuid.getnode():x}"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

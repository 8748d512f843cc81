"""One driver at a time per output: ``OUT.chunkrestore/lock.json`` names it."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from chunkrestore.jobs.lock_file import STALE_SECONDS, Holder, draft, judged, myself, read, runs, sweep

BEAT_SECONDS = 10.0
"""Time between heartbeats: twelve in `STALE_SECONDS`."""

_NAME = "lock.json"
_N_TRIES = 100
_TRY_SECONDS = 0.01
# A try that is neither won nor lost means that somebody else is in the middle of a change, which takes
# milliseconds.
_FULL = {errno.ENOSPC, errno.EDQUOT}


class LockedError(ValueError):
    """Another driver writes into the same output."""


class LockLostError(RuntimeError):
    """Another driver took the lock over, or somebody deleted it; this one must write no more."""


class Lock:
    """The right to write into an output; a context manager.

    On one machine the lock is exact. Across machines it is a lease: a driver that is suspended for longer than
    `stale_s` loses it, which `check` finds out before the driver writes again.

    Parameters
    ----------
    folder
        ``OUT.chunkrestore``; made if it does not exist.
    job
        What is done, for the message that another driver gets.
    beat_s
        Seconds between heartbeats.
    stale_s
        Seconds without heartbeat after which a driver on another machine may take over. Longer than any call
        in this process that keeps the interpreter lock, since no heartbeat gets through such a call.

    Attributes
    ----------
    lost
        Set once the lock is found to be somebody else's, or gone.
    earlier
        The dead driver that the lock was taken over from, or None.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        job: str = "",
        *,
        beat_s: float = BEAT_SECONDS,
        stale_s: float = STALE_SECONDS,
    ) -> None:
        if not 0 < beat_s < stale_s:
            raise ValueError(f"`beat_s` must lie between 0 and `stale_s` {stale_s}, got {beat_s}")
        self.path = Path(folder) / _NAME
        self.lost = threading.Event()
        self.earlier: Holder | None = None
        self._job, self._beat_s, self._stale_s = job, beat_s, stale_s
        self._own: Holder | None = None
        self._confirmed = 0.0
        self._released = threading.Event()

    @property
    def took_over(self) -> bool:
        """Whether the driver before this one ended without releasing the lock."""
        return self.earlier is not None

    def acquire(self, *, wait_s: float = 0.0) -> Lock:
        """Take the lock, and keep it alive until `release`.

        Parameters
        ----------
        wait_s
            Seconds to go on trying, such as `STALE_SECONDS` and a little more where a batch system starts a
            killed job again on another machine.

        Raises
        ------
        LockedError
            If another driver is alive; the message says which, and what to do.
        OSError
            If the lock cannot be written: no permission, a read-only file system, a full disk.
        """
        if self._own is not None:
            raise RuntimeError(f"{self.path} is held through this object already")
        self._own = own = myself(self._job, self._stale_s)
        self.lost.clear()
        until = time.monotonic() + wait_s
        try:
            with _explained(self.path.parent):
                while (other := self._try(own)) is not None:
                    if time.monotonic() >= until:
                        raise LockedError(_refusal(self.path, other))
                    time.sleep(min(1.0, self._beat_s))
            self._confirmed, self._released = _uptime(), threading.Event()
            threading.Thread(
                target=self._keep_alive, args=(self._released,), name="lock", daemon=True
            ).start()
        except BaseException:
            # An interrupt may strike just after the lock was taken.
            self.release()
            raise
        return self

    def release(self) -> None:
        """Give the lock back; one that was lost, or that a parent process holds, is left alone."""
        own, self._own = self._own, None
        self._released.set()
        if own is None or own.pid != os.getpid():
            return
        with suppress(OSError):
            try:
                self._remove(own)
            except OSError:
                # On a full disk nothing can be claimed. A lock that is left would only block this process.
                if self._is_of(own):
                    os.unlink(self.path)

    def check(self) -> None:
        """Raise unless the lock is still held; costs nothing while heartbeats get through.

        Raises
        ------
        LockLostError
            If it is not.
        OSError
            If no heartbeat got through for long, and the file cannot be read now either.
        """
        if _uptime() - self._confirmed > self._stale_s / 2:
            self.beat()
        if self.lost.is_set():
            raise LockLostError(
                f"{self.path} is no longer this driver's: another one took it over, or it was deleted. This "
                "driver writes no more; the same command resumes the job"
            )

    def beat(self) -> None:
        """Look whether the lock is still held, and if it is, say that this driver is alive."""
        own, now = self._own, _uptime()
        if own is None:
            return
        if self._is_of(own):
            # Without a time given, the file server takes its own.
            os.utime(self.path)
            self._confirmed = now
        else:
            self.lost.set()

    def __enter__(self) -> Lock:
        return self if self._own is not None else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self, own: Holder) -> Holder | None:
        """Take the lock if it is free or its holder dead; return who is in the way otherwise."""
        for _ in range(_N_TRIES):
            # A driver that is done may have removed the folder just after it was made sure of here.
            with suppress(FileNotFoundError):
                return self._try_once(own)
        return self._try_once(own)

    def _try_once(self, own: Holder) -> Holder | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = None
        with draft(self.path.parent, own) as mine:
            for _ in range(_N_TRIES):
                if mine.create(self.path):
                    self.earlier = None
                    break
                found = judged(read(self.path), mine.server_time())
                if found is not None and found.alive:
                    return found
                if found is not None and mine.change(self.path, found, remove=False):
                    self.earlier = found
                    break
                time.sleep(_TRY_SECONDS)
            else:
                return found or own
        sweep(self.path.parent, older_than_s=self._stale_s, server_time=self.path.stat().st_mtime)
        return None

    def _remove(self, own: Holder) -> None:
        if not self._is_of(own):
            return
        with draft(self.path.parent, myself("", self._stale_s)) as claimant:
            for _ in range(_N_TRIES):
                if claimant.change(self.path, own, remove=True) or not self._is_of(own):
                    return
                time.sleep(_TRY_SECONDS)

    def _is_of(self, own: Holder) -> bool:
        found = read(self.path)
        return found is not None and found.token == own.token

    def _keep_alive(self, released: threading.Event) -> None:
        while not released.wait(self._beat_s) and not self.lost.is_set():
            # A file server that does not answer takes the lock from nobody; `check` asks again.
            with suppress(OSError):
                self.beat()


def holder(folder: str | os.PathLike[str]) -> Holder | None:
    """Return the driver that the lock in ``OUT.chunkrestore`` names, dead or alive; None if there is none.

    Its `alive` is None where the driver is on another machine and `folder` can only be read.
    """
    path = Path(folder) / _NAME
    found = read(path)
    if found is None:
        return None
    try:
        with draft(path.parent, found) as beside:
            return judged(found, beside.server_time())
    except OSError:
        return judged(found, None)


def _uptime() -> float:
    """Return seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def _refusal(path: Path, other: Holder) -> str:
    if not other.alive:
        return f"another driver is just taking over {path}; try again"
    message = f"another driver writes into this output: {path} is held by {other}."
    if runs(other):
        end = "end this very process" if other.pid == os.getpid() else f"end it (kill {other.pid})"
        return f"{message} Wait until it is done, or {end}; the same command then resumes the job"
    if not other.pid:
        end = "delete that file if no driver runs"
    else:
        command = f"scancel {other.slurm_job}" if other.slurm_job else f"kill {other.pid} on {other.host}"
        end = f"end it ({command})"
    left = max(1.0, other.stale_s - other.age_s)
    return (
        f"{message} Wait until it is done, or {end}. If it was killed already, try again in {left:.0f} s: after "
        f"{other.stale_s:.0f} s without a heartbeat the lock is taken over"
    )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say of errors of the file system that it was the lock that could not be written, and what helps."""
    try:
        yield
    except OSError as error:
        fix = "free some space" if error.errno in _FULL else "choose an output where you may write"
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"the lock in {folder} cannot be written ({reason}); {fix}") from error

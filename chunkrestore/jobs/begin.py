"""Begin a job beside a store or go on with it: cluster, lock, ledger and events around its stages."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.cluster.allocation import in_allocation
from chunkrestore.jobs.events import Events
from chunkrestore.jobs.ledger import Ledger
from chunkrestore.jobs.lock import Lock
from chunkrestore.jobs.lock_file import STALE_SECONDS
from chunkrestore.jobs.places import ClusterLostError
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.runner import BlockError, Runner, draining, message_of
from chunkrestore.jobs.stages import Stages

_STALE_IN_PROCESS_SECONDS = 1800.0
_MARGIN_SECONDS = 10.0


@contextmanager
def begun(
    folder: Path,
    manifest: Mapping[str, Any],
    report: Report,
    check: Callable[[], None],
    *,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Iterator[Stages]:
    """Lend the stages of a job whose decisions are all in its manifest; keep the report when they are done.

    Parameters
    ----------
    folder
        Of the job, inside the work folder of its store.
    manifest
        JSON-compatible values that identify the job; an unfinished one with others is refused.
    report
        What will be told.
    check
        Raises unless the job can begin; not called for one that goes on.
    cluster, n_workers, profile, overwrite, quiet
        As for `chunkrestore.run`.

    Raises
    ------
    chunkrestore.jobs.ledger.ManifestMismatchError
        If the unfinished job in `folder` was started with something else.
    chunkrestore.jobs.lock.LockedError
        If another driver works on the same store.
    """

    def ready(ledger: Ledger) -> bool:
        resuming = ledger.unfinished and not overwrite
        if resuming:
            ledger.check(manifest)
        else:
            check()
        return resuming

    # All ranks of an allocation come here and one goes on: the others must not stumble over what that one writes.
    if not (cluster == "auto" and in_allocation()):
        ready(Ledger(folder))
    with (
        connect(cluster, n_workers=n_workers, profile=profile) as client,
        locked(folder.parent, folder.name, in_process=client is None) as lock,
        closing(Ledger(folder, lock.check)) as ledger,
    ):
        resuming = ready(ledger)  # again: another driver may have had the lock in between
        if not resuming:
            ledger.forget()
        ledger.begin(manifest)
        with closing(Events(folder / "events.jsonl")) as events, told(events, report, resuming=resuming):
            yield Stages(Runner(client), ledger, Progress(quiet=quiet), events, report)
            ledger.finish(report.content())


@contextmanager
def told(events: Events, report: Report, *, resuming: bool) -> Iterator[None]:
    """Log the beginning and the end of a job, whichever it is."""
    operators = [operator for work in report.plan["passes"] for operator in work["operators"]]
    events.emit(
        "begin",
        host=socket.gethostname(),
        pid=os.getpid(),
        resumed=resuming,
        operators=operators,
        plan=report.plan,
        versions=report.versions,
    )
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and draining.requested:
            events.emit("drain", reason="asked to stop by a signal")
        stopped = isinstance(error, KeyboardInterrupt | ClusterLostError)
        state = "interrupted" if stopped else "failed" if isinstance(error, BlockError) else "error"
        events.emit("end", state=state, message=message_of(error))
        raise
    events.emit("end", state="done")


@contextmanager
def locked(work: Path, name: str, *, in_process: bool) -> Iterator[Lock]:
    """Hold the lock of an output; leave no empty folder behind."""
    # Blocks in this process may hold the interpreter lock for minutes, and then no heartbeat gets through.
    lock = Lock(work, name, stale_s=_STALE_IN_PROCESS_SECONDS if in_process else STALE_SECONDS)
    # A batch system starts a killed job again on another machine, which cannot ask whether the driver is dead.
    again = "SLURM_RESTART_COUNT" in os.environ
    try:
        with lock.acquire(wait_s=STALE_SECONDS + _MARGIN_SECONDS if again else 0.0):
            yield lock
    finally:
        with suppress(OSError):
            work.rmdir()

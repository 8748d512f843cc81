"""Keep jobs of SLURM running: submit those again that ended, and say what the queue is doing.

dask-jobqueue submits each job once. Its ``adapt`` does not submit those again that ended by the lifetime of their
workers (dask-jobqueue#691) and loses workers between stages (#701).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often workers are counted."""

_ASK_SECONDS = 20.0
"""How often SLURM is asked for the driver's jobs, and only while workers are missing: it serves everyone."""

_ASK_SOON_SECONDS = 5.0
"""How soon SLURM is asked when a job has lost its workers: most likely it has ended."""

_LONGEST_PAUSE_SECONDS = 600.0
"""Jobs that fail at once, one after the other, are submitted no more often than this."""

_ANSWER_SECONDS = 120.0
"""How long SLURM may take to answer."""

_SAY_SECONDS = (10.0, 600.0)
"""When it is said for the first time that jobs wait, and how often after that."""

_LINES_SHOWN = 5
"""Of the output of a job that failed."""


class Keeper:
    """Keeps `n_jobs` jobs of a cluster queued or running; its loop runs beside the scheduler, in the driver."""

    def __init__(self, cluster: Any, n_jobs: int) -> None:
        self._cluster = cluster
        self._n_jobs = n_jobs
        self._brought: set[str] = set()
        """Names of jobs that have brought a worker."""
        self._queue: dict[str, str] | None = None
        """State of the user's jobs by id, as SLURM told it last."""
        self._n_lost = 0
        """Jobs that ended without having brought a worker, in a row."""
        self._last_lost: str | None = None
        self._stopping = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Submit the jobs.

        Raises
        ------
        RuntimeError
            If SLURM refuses them.
        """
        self._cluster.sync(self._start)

    def stop(self) -> None:
        """Submit no more jobs."""
        self._cluster.sync(self._stop)

    def wait_for_first_worker(self) -> None:
        """Return when the first worker has come; say now and then what the queue is doing.

        Raises
        ------
        RuntimeError
            If as many jobs as were asked for ended without having brought a worker.
        """
        say_at = time.monotonic() + _SAY_SECONDS[0]
        while not self._brought:
            if self._n_lost >= self._n_jobs:
                raise RuntimeError(
                    f"{self._n_lost} SLURM jobs ended before they brought a worker; the last one wrote: "
                    f"{self._output(self._last_lost)}"
                )
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + _SAY_SECONDS[1]
                _log.warning("waiting for SLURM to start a worker: %s", self._state())
            time.sleep(_LOOK_SECONDS / 5)

    async def _start(self) -> None:
        try:
            await self._submit()
        except RuntimeError as error:
            raise RuntimeError(f"SLURM refuses the job: {error}") from None
        self._loop = asyncio.create_task(self._keep())

    async def _stop(self) -> None:
        self._stopping.set()
        if self._loop is not None:
            await self._loop

    async def _keep(self) -> None:
        asked = time.monotonic()
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_SECONDS)
            present = self._jobs_with_workers()
            self._brought |= present
            if len(present) < self._n_jobs and time.monotonic() - asked > self._pause(present):
                await self._replace_ended()
                asked = time.monotonic()

    def _pause(self, present: Set[str]) -> float:
        """Return how long to wait before SLURM is asked again, when these jobs have workers."""
        if self._brought - present:
            return _ASK_SOON_SECONDS
        return min(_ASK_SECONDS * 2 ** min(self._n_lost // self._n_jobs, 9), _LONGEST_PAUSE_SECONDS)

    async def _submit(self) -> None:
        """Submit jobs until there are enough; raises what ``sbatch`` says."""
        cluster = self._cluster
        while len(cluster.worker_spec) < self._n_jobs:
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            await cluster
        except RuntimeError as error:
            self._forget([name for name, job in cluster.workers.items() if job.job_id is None])
            raise RuntimeError(_said(error)) from None

    async def _replace_ended(self) -> None:
        jobs = {name: job.job_id for name, job in self._cluster.workers.items()}
        queue = await _queue_of_user()
        if queue is None:
            return  # SLURM itself may be starting again
        self._queue = queue
        ended = [name for name, job_id in jobs.items() if job_id not in queue]
        lost = [name for name in ended if name not in self._brought]
        if lost:
            self._last_lost = jobs[lost[-1]]
            _log.warning("%d SLURM jobs ended before they brought a worker", len(lost))
        elif self._brought:
            self._n_lost = 0
        self._n_lost += len(lost)
        self._forget(ended)
        try:
            await self._submit()
        except RuntimeError as error:
            _log.warning("SLURM refuses jobs for now: %s", error)

    def _forget(self, names: Iterable[str]) -> None:
        """Let Dask know that jobs are over; the next ones may have their names."""
        from distributed.core import Status

        for name in names:
            self._cluster.worker_spec.pop(name, None)
            if name in self._cluster.workers:
                self._cluster.workers.pop(name).status = Status.closed
            self._brought.discard(name)

    def _jobs_with_workers(self) -> set[str]:
        workers = [str(worker.name) for worker in self._cluster.scheduler.workers.values()]
        # Where a job has several workers they are numbered: NAME-0, NAME-1.
        return (set(workers) | {name.rpartition("-")[0] for name in workers}) & set(self._cluster.workers)

    def _state(self) -> str:
        own = {job.job_id for job in list(self._cluster.workers.values())}
        states = Counter(state for job_id, state in (self._queue or {}).items() if job_id in own)
        return ", ".join(f"{n} jobs {state}" for state, n in states.items()) or f"{len(own)} jobs submitted"

    def _output(self, job_id: str | None) -> str:
        folder = Path(self._cluster._dummy_job.log_directory)
        for file in sorted(folder.glob(f"*-{job_id}*.err")):
            lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return " | ".join(lines[-_LINES_SHOWN:])
        return f"nothing (looked for job {job_id} in {folder})"


@contextmanager
def kept_running(cluster: Any, n_jobs: int) -> Iterator[Keeper]:
    """Keep `n_jobs` jobs of a dask-jobqueue cluster queued or running while inside."""
    keeper = Keeper(cluster, n_jobs)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


async def _queue_of_user() -> dict[str, str] | None:
    """Return the state of the user's jobs that have not ended, by id; None if SLURM does not answer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *("squeue", "--me", "--noheader", "--format=%A %T %r"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _ANSWER_SECONDS)
    except TimeoutError:
        process.kill()
        return None
    if process.returncode != 0:
        return None
    jobs = (line.split(maxsplit=2) for line in output.decode().splitlines() if line.strip())
    return {job_id: f"{state.lower()} ({reason})" for job_id, state, reason in jobs if state != "COMPLETING"}


def _said(error: RuntimeError) -> str:
    """Return what ``sbatch`` wrote, out of the report that dask-jobqueue makes of it."""
    return " ".join(str(error).rpartition("stderr:")[2].split())

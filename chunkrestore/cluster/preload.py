"""Loaded by Dask in every worker process, and in the nannies of batch jobs, before tasks arrive."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Nanny, Worker

_OF_THE_DRIVER = ("SIGINT", "SIGUSR1")
"""A terminal sends Ctrl-C to all processes, a batch system its warning to all steps. The driver alone decides what
follows: blocks in flight come to their end, and its workers are ended by it."""


_LONGEST_GRACE_SECONDS = 600.0
"""A worker takes no more tasks this long before the end of its lifetime, or a tenth of it."""

_POLL_SECONDS = 0.2
_FETCH_SECONDS = 10.0
"""How long a worker that leaves waits for the driver to fetch its last results."""


def ignore_signals_of_the_driver() -> None:
    """Ignore what is meant for the driver, in this process and those that it starts."""
    for name in _OF_THE_DRIVER:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def dask_setup(server: Nanny | Worker) -> None:
    """Prepare a worker, or a nanny and the worker that it is about to start."""
    from distributed import Nanny

    ignore_signals_of_the_driver()
    if isinstance(server, Nanny):
        _pin(server)
    elif server.lifetime:
        grace = min(_LONGEST_GRACE_SECONDS, server.lifetime / 10)
        server.loop.call_later(server.lifetime - grace, _leave, server)


def _pin(nanny: Nanny) -> None:
    """Let the worker of a nanny see one CUDA device of its job."""
    from chunkrestore.cluster.gpu import visible_devices

    devices = visible_devices()
    # The workers of a job are numbered: NAME-0, NAME-1.
    number = str(nanny.name).rpartition("-")[2]
    if devices and number.isdecimal():
        nanny.env["CUDA_VISIBLE_DEVICES"] = devices[int(number) % len(devices)]


async def _leave(worker: Worker) -> None:
    """Let a worker finish what it does and go.

    At the end of its lifetime Dask would close it in the middle of its tasks, which then are done again.
    """
    from distributed.core import Status

    worker.status = Status.paused  # takes no more tasks; nobody resumes it where memory pauses no worker
    while worker.state.executing_count:
        await asyncio.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + _FETCH_SECONDS
    while worker.data and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    await worker.close_gracefully(reason="its job ends soon")

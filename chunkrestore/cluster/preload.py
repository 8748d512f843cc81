"""Loaded by Dask in every worker process, and in the nannies of batch jobs, before tasks arrive."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Nanny, Worker

_OF_THE_DRIVER = ("SIGINT", "SIGUSR1")
"""A terminal sends Ctrl-C to all processes, a batch system its warning to all steps. The driver alone decides what
follows: blocks in flight come to their end, and its workers are ended by it."""


def ignore_signals_of_the_driver() -> None:
    """Ignore what is meant for the driver, in this process and those that it starts."""
    for name in _OF_THE_DRIVER:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def dask_setup(server: Nanny | Worker) -> None:
    """Prepare a worker, or a nanny and the worker that it is about to start."""
    from distributed import Nanny

    from chunkrestore.cluster.gpu import visible_devices

    ignore_signals_of_the_driver()
    if isinstance(server, Nanny):
        # The workers of a job are numbered: NAME-0, NAME-1.
        number = re.search(r"\d*$", str(server.name))
        devices = visible_devices()
        if devices and number is not None:
            server.env["CUDA_VISIBLE_DEVICES"] = devices[int(number[0] or 0) % len(devices)]

"""Worker processes on this machine, on loopback alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster.environment import THREADS_PER_WORKER, configured, usable_cores

if TYPE_CHECKING:
    from distributed import Client

    from chunkrestore.cluster.profile import CudaProfile, LocalProfile

LOOPBACK = "127.0.0.1"


def dashboard_address(everywhere: bool) -> str:
    """Return where Dask's dashboard listens; without an address it would be every interface."""
    return ":8787" if everywhere else f"{LOOPBACK}:0"


@contextmanager
def local_processes(n_workers: int | None, profile: LocalProfile | None) -> Iterator[Client]:
    """Yield a client of `n_workers` worker processes; by default those of the profile, or one per usable core."""
    wanted = n_workers or (profile and profile.n_workers) or usable_cores()
    with worker_processes([{}] * wanted, profile) as client:
        yield client


@contextmanager
def worker_processes(
    workers: Sequence[Mapping[str, Any]], profile: LocalProfile | CudaProfile | None = None
) -> Iterator[Client]:
    """Yield a client of one worker process for each of `workers`, its options for Dask's nanny.

    The processes share the cores and the memory of this machine. One that dies is started again.
    """
    from distributed import Client, Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    # What goes wrong is raised. What Dask logs as well, its own shutdown included, only hides it.
    quietly = {"silence_logs": logging.CRITICAL}
    common = {
        "host": LOOPBACK,
        "nthreads": THREADS_PER_WORKER,
        "memory_limit": MEMORY_LIMIT // len(workers),
        "local_directory": profile.local_directory if profile else None,
        **quietly,
    }
    scheduler = {
        "host": LOOPBACK,
        "port": 0,
        "dashboard": True,
        "dashboard_address": dashboard_address(profile is not None and profile.dashboard),
    }
    with (
        configured(max(1, usable_cores() // len(workers))) as restore_environment,
        SpecCluster(
            scheduler={"cls": Scheduler, "options": scheduler},
            workers={i: {"cls": Nanny, "options": {**common, **own}} for i, own in enumerate(workers)},
            name="chunkrestore",
            **quietly,
        ) as cluster,
        # Not the default: other dask work of the calling process stays where it was.
        Client(cluster, set_as_default=False) as client,
    ):
        restore_environment()
        yield client

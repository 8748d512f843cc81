"""Where work runs: the only file that creates clusters or connects to one."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from distributed import Client

Cluster: TypeAlias = "Client | str | None"
"""A `distributed.Client`, the address of a scheduler, ``"local"``, ``"serial"`` or ``"auto"``."""

_TIMEOUT_SECONDS = 10
"""How long a scheduler may take to answer."""

_WORKER_TTL = "60 minutes"
"""StarDist's suppression holds the interpreter lock for minutes, during which a worker sends no heartbeat.
The default of five minutes would restart such a worker, and its block with it, for ever."""

_ALLOWED_FAILURES = 1
"""Worker processes that a block may lose before the job gives it up: one may be bad luck."""

_IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""A terminal sends Ctrl-C to all processes; the driver alone ends the job, and its workers with it."""


@contextmanager
def connect(cluster: Cluster = "auto", *, n_workers: int | None = None) -> Iterator[Client | None]:
    """Yield a client to run a job on, or None to run it in this process.

    Parameters
    ----------
    cluster
        A `distributed.Client` (used and left open); the address of a scheduler (``"tcp://host:8786"``)
        or the path of a scheduler file; ``"local"``, one worker process per core, listening on loopback
        only; ``"serial"`` or None, this process, for debugging; ``"auto"``, the client that is already
        open in this process, otherwise ``"local"``. Workers elsewhere must see stores and models under the
        paths that the driver uses, and have this package installed.
    n_workers
        Worker processes of a local cluster; one per usable core by default.

    Raises
    ------
    ValueError
        If `cluster` names nothing known.
    ConnectionError
        If no scheduler answers at the address.
    """
    if cluster is None or cluster == "serial":
        yield None
        return
    from distributed import Client

    if isinstance(cluster, Client):
        yield cluster
        return
    if cluster == "auto":
        running = _open_client()
        if running is not None:
            yield running
            return
        cluster = "local"
    if cluster == "local":
        with _local(n_workers or usable_cores()) as client:
            yield client
        return
    with _remote(cluster) as client:
        yield client


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(n_threads: int) -> dict[str, str]:
    """Return environment variables that a worker with `n_threads` cores needs before its imports.

    Dask sets ``OMP_NUM_THREADS=1``, which would also serialise StarDist's OpenMP loops, and TensorFlow
    would start as many threads as the machine has cores in every worker.
    """
    return {
        "OMP_NUM_THREADS": str(n_threads),
        "TF_NUM_INTRAOP_THREADS": str(n_threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        # TensorFlow would otherwise take all device memory and leave none to CuPy in the same process.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        # StarDist enters a parallel region per object; threads that spin in between cost far more than they do.
        "OMP_WAIT_POLICY": "passive",
        # Dask asks malloc to return every freed array to the system at once, and then each array of an iteration
        # is page-faulted in again: Richardson-Lucy took 2.3 times as long. 32 MiB is the largest mmap threshold.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    }


@contextmanager
def _local(n_workers: int) -> Iterator[Client]:
    import dask
    from distributed import Client, LocalCluster

    pre_spawn = "distributed.nanny.pre-spawn-environ"
    environment = {**dask.config.get(pre_spawn), **worker_environment(max(1, usable_cores() // n_workers))}
    with (
        _environment_restored(environment) as restore,
        dask.config.set(
            {
                "distributed.scheduler.worker-ttl": _WORKER_TTL,
                "distributed.scheduler.allowed-failures": _ALLOWED_FAILURES,
                # A worker holds the task that it runs and no other, so that no other is blamed for its death.
                "distributed.scheduler.worker-saturation": 1.0,
                "distributed.admin.tick.limit": "1 hour",
                "distributed.worker.preload": [_IGNORE_INTERRUPTS],
                pre_spawn: environment,
            }
        ),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            # Without an address Dask's dashboard listens on every interface.
            dashboard_address="127.0.0.1:0",
            # What goes wrong is raised. What Dask logs as well, its own shutdown included, only hides it.
            silence_logs=logging.CRITICAL,
        ) as local,
        # Not the default: other dask work of the calling process stays where it was.
        Client(local, set_as_default=False) as client,
    ):
        restore()
        yield client


@contextmanager
def _environment_restored(names: Iterable[str]) -> Iterator[Callable[[], None]]:
    """Yield a function that undoes changes of environment variables, which is called at the end as well.

    A nanny sets what its workers need in its own process, this one, and leaves it there. A later cluster of
    another size would take it over, and kernels in this process would run on the threads of a worker.
    """
    before = {name: os.environ.get(name) for name in names}

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    try:
        yield restore
    finally:
        restore()


@contextmanager
def _remote(cluster: str) -> Iterator[Client]:
    from distributed import Client

    try:
        address = _address(cluster)
        _check_listens(address)
        client = Client(address, timeout=_TIMEOUT_SECONDS, set_as_default=False)
    except OSError as error:
        raise ConnectionError(
            f"no Dask scheduler answers at `cluster` {cluster!r}; check the address, or start one with "
            "`dask scheduler`"
        ) from error
    except ValueError as error:
        raise ValueError(f"`cluster` {cluster!r} is no address of a Dask scheduler: {error}") from error
    with client:
        yield client


def _address(cluster: str) -> str:
    """Return the address in a scheduler file, or `cluster` itself if it looks like one."""
    if os.path.isfile(cluster):
        try:
            return str(json.loads(Path(cluster).read_text())["address"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{cluster} is not the file that a Dask scheduler writes") from None
    if ":" not in cluster:
        raise ValueError(
            "known are 'auto', 'local' and 'serial', addresses (tcp://host:port) and scheduler files"
        )
    return cluster


def _check_listens(address: str) -> None:
    """Raise `OSError` or `ValueError` unless something listens at `address`.

    Asked first because a client that fails to connect leaves its event loop behind, and what the garbage
    collector does with that can block the next client for ten seconds.
    """
    from distributed.comm import get_address_host_port

    if address.startswith("ucx"):
        return
    host, port = get_address_host_port(address)
    if not 0 < port < 2**16:
        raise ValueError(f"port {port} is not between 1 and {2**16 - 1}")
    with socket.create_connection((host, port), timeout=_TIMEOUT_SECONDS):
        pass


def _open_client() -> Client | None:
    from distributed import get_client

    try:
        return get_client()
    except ValueError:
        return None

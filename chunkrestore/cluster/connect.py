"""Choose where a job runs, and connect to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from chunkrestore.cluster.allocation import in_allocation
from chunkrestore.cluster.profile import Profile, SchedulerProfile, read_profile

if TYPE_CHECKING:
    from distributed import Client

Cluster: TypeAlias = "Client | str | os.PathLike[str] | None"
"""A `distributed.Client`, the address or the file of a scheduler, a profile's path, ``"local"``, ``"cuda"``,
``"slurm"``, ``"serial"`` or ``"auto"``."""


@contextmanager
def connect(
    cluster: Cluster = "auto",
    *,
    n_workers: int | None = None,
    profile: str | os.PathLike[str] | None = None,
    wants_devices: bool = True,
) -> Iterator[Client | None]:
    """Yield a client to run a job on, or None to run it in this process.

    Workers elsewhere must see stores and models under the paths that the driver uses, and have the driver's
    versions of this package and its dependencies.

    Parameters
    ----------
    cluster
        - ``"serial"`` or None: this process, for debugging.
        - ``"local"``: worker processes on this machine, one per core.
        - ``"cuda"``: worker processes on this machine, one per CUDA device, which sees no other device.
        - ``"slurm"``: workers in jobs that `profile` describes. Returns with the first worker.
        - The address (``"tls://host:8786"``) or the file of a Dask scheduler that runs already.
        - A `distributed.Client`: used, and left open.
        - The path of a profile (``.yaml``): what it describes.
        - ``"auto"``, the first of these that there is: the client that is open in this process; the tasks of the
          SLURM step that this process belongs to (`chunkrestore.cluster.allocation`), if they are three or more;
          `profile`; ``"cuda"``, if there is a device; ``"local"``.
    n_workers
        Worker processes, where they are started here; what the profile says, or one per core or device.
    profile
        YAML file (`chunkrestore.cluster.profile`) of the kind that `cluster` names.
    wants_devices
        Whether ``"auto"`` may choose ``"cuda"``: work that stays on the processor wants a worker per core.

    Raises
    ------
    ValueError
        If `cluster` names nothing known, the profile is wrong or of another kind, or there is no CUDA device.
    FileNotFoundError
        If there is no such profile, or SLURM is not on this machine.
    ImportError
        If an optional package is missing; the message has the line that installs it.
    ConnectionError
        If no scheduler answers at the address.
    RuntimeError
        If SLURM refuses the jobs, or they end before they bring a worker.
    """
    if n_workers is not None and n_workers < 1:
        raise ValueError(f"`n_workers` must be at least 1, not {n_workers}")
    wanted = None if profile is None else read_profile(profile)
    if cluster is None or cluster == "serial":
        yield None
        return
    from distributed import Client

    if isinstance(cluster, Client):
        yield cluster
        return
    name = os.fspath(cluster)
    if name == "auto":
        running = _open_client()
        if running is not None:
            yield running
            return
    if name == "auto" and wanted is None and not wants_devices and not in_allocation():
        name = "local"
    with _place(name, n_workers, wanted) as client:
        yield client


def _place(name: str, n_workers: int | None, profile: Profile | None) -> AbstractContextManager[Client]:
    """Return what connects to the cluster that `name` and `profile` mean together."""
    if name.endswith((".yaml", ".yml")):
        if profile is not None:
            raise ValueError(f"`cluster` {name!r} is a profile itself; give no second `profile`")
        profile = read_profile(name)
        name = profile.kind
    elif name == "auto":
        from chunkrestore.cluster.allocation import allocation
        from chunkrestore.cluster.gpu import has_devices

        if in_allocation():
            return allocation()
        name = profile.kind if profile else "cuda" if has_devices() else "local"
    kind = name if name in ("local", "cuda", "slurm") else "scheduler"
    if profile is not None and profile.kind != kind:
        raise ValueError(f"`cluster` is {name!r}, but `profile` is of the kind {profile.kind!r}")
    if isinstance(profile, SchedulerProfile):
        return _scheduler(profile.address if name == "scheduler" else name, profile)
    return _scheduler(name, None) if kind == "scheduler" else _started(kind, n_workers, profile)


def _scheduler(address: str, profile: SchedulerProfile | None) -> AbstractContextManager[Client]:
    from chunkrestore.cluster.remote import running_scheduler

    return running_scheduler(address, profile)


def _started(kind: str, n_workers: int | None, profile: Any) -> AbstractContextManager[Client]:
    """Return a cluster that is started here; the modules of the others are not loaded."""
    if kind == "local":
        from chunkrestore.cluster.local import local_processes

        return local_processes(n_workers, profile)
    if kind == "cuda":
        from chunkrestore.cluster.gpu import cuda_processes

        return cuda_processes(n_workers, profile)
    from chunkrestore.cluster.slurm import slurm_jobs

    return slurm_jobs(n_workers, profile)


def _open_client() -> Client | None:
    from distributed import get_client

    try:
        return get_client()
    except ValueError:
        return None

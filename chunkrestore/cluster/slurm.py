"""Worker processes in jobs of SLURM, submitted by the driver through dask-jobqueue."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster.credentials import INSTALL, temporary_credentials
from chunkrestore.cluster.environment import (
    PRELOAD,
    THREADS_PER_WORKER,
    configured,
    exported_configuration,
    worker_environment,
)
from chunkrestore.cluster.keeper import kept_running
from chunkrestore.cluster.local import LOOPBACK, dashboard_address
from chunkrestore.cluster.profile import SlurmProfile

if TYPE_CHECKING:
    from distributed import Client

_START_SECONDS = 300
"""How long a worker may take to import everything over a busy network file system. As long, and no longer, does a job
hold its cores that starts after its driver was killed."""

_LONGEST_GRACE_SECONDS = 900.0
"""Workers leave at most this long before their job's limit."""


@contextmanager
def slurm_jobs(n_workers: int | None, profile: SlurmProfile | None) -> Iterator[Client]:
    """Yield a client of workers in SLURM jobs as soon as there is one worker; the others come when they can.

    Jobs are submitted again when they end, by their limit or by an accident, and cancelled at the end.

    Raises
    ------
    ImportError
        If dask-jobqueue or cryptography is not installed.
    FileNotFoundError
        If there is no ``sbatch`` on this machine.
    RuntimeError
        If SLURM refuses the job, or all jobs end before they have brought a worker.
    """
    if profile is None:
        raise ValueError("`cluster` 'slurm' needs a `profile` that says what jobs to submit")
    make = slurm_cluster()
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("`cluster` 'slurm' must be started where sbatch is; this machine has none")
    from distributed import Client

    n_jobs = math.ceil(n_workers / profile.n_workers_per_job) if n_workers else profile.jobs
    folder = Path(profile.log_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        configured(),
        _only_the_profile(),
        temporary_credentials(folder) if profile.tls else nullcontext() as security,
        make(security=security, **_cluster_options(profile), **job_options(profile)) as cluster,
        Client(cluster, set_as_default=False) as client,
        kept_running(cluster, n_jobs) as keeper,
    ):
        keeper.wait_for_first_worker()
        client.wait_for_workers(1)
        yield client


def job_script(profile: SlurmProfile) -> str:
    """Return the script that is submitted for a job of the profile, with placeholders for address and keys."""
    make = slurm_cluster()
    with configured(), _only_the_profile():
        job = make.job_cls("tls://SCHEDULER:PORT", name="NAME", protocol="tls://", **job_options(profile))
        return str(job.job_script())


def job_options(profile: SlurmProfile) -> dict[str, Any]:
    """Return what dask-jobqueue needs to know of one job."""
    n_processes = profile.n_workers_per_job
    lifetime, stagger = _lifetime(_seconds(profile.walltime))
    gres = ":".join(filter(None, ("gpu", profile.gpu_type, str(profile.gpus))))
    directives = {
        "--gres": gres if profile.gpus else None,
        "--qos": profile.qos,
        "--constraint": profile.constraint,
    }
    return {
        "cores": n_processes * THREADS_PER_WORKER,  # Dask's word for the threads of all workers
        "job_cpu": profile.cores,
        "memory": profile.memory,
        "processes": n_processes,
        "walltime": profile.walltime,
        "queue": profile.partition,
        "account": profile.account,
        "job_name": profile.job_name,
        "death_timeout": _START_SECONDS,
        "python": profile.python,
        "interface": profile.interface,
        "local_directory": profile.local_directory,
        "log_directory": profile.log_directory,
        "job_extra_directives": [
            *(f"{name}={value}" for name, value in directives.items() if value is not None),
            *profile.directives,
        ],
        "job_script_prologue": _prologue(profile),
        "worker_extra_args": [
            *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"),
            *("--no-dashboard", "--dashboard-address", f"{LOOPBACK}:0"),
            *("--preload", PRELOAD, "--preload-nanny", PRELOAD),
        ],
    }


def _prologue(profile: SlurmProfile) -> list[str]:
    """Return the lines of a job before its workers start."""
    variables = {
        **worker_environment(max(1, profile.cores // profile.n_workers_per_job)),
        **exported_configuration(),
        **profile.environment,
    }
    return [
        *(f"source {path}" for path in profile.source),
        *(f"module load {name}" for name in profile.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]


def _seconds(walltime: str) -> int:
    """Return the seconds of ``hours:minutes:seconds`` or ``days-hours:minutes:seconds``."""
    days, _, clock = walltime.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds


def _lifetime(walltime: int) -> tuple[int, int]:
    """Return seconds after which a worker leaves, and by how many they vary, so that not all leave at once.

    The latest leaves with half of the grace left, a tenth of the limit: time for the blocks that it still does.
    """
    grace = min(_LONGEST_GRACE_SECONDS, walltime / 10)
    return int(walltime - grace), int(grace / 2)


def _cluster_options(profile: SlurmProfile) -> dict[str, Any]:
    """Return what dask-jobqueue needs to know of the scheduler, which runs in the driver."""
    return {
        "scheduler_options": {"dashboard_address": dashboard_address(profile.dashboard)},
        "name": profile.job_name,
        "silence_logs": logging.CRITICAL,
    }


@contextmanager
def _only_the_profile() -> Iterator[None]:
    """Keep dask-jobqueue's own configuration files out: a job is what its profile says."""
    import dask

    defaults = dask.config.merge(*dask.config.defaults)["jobqueue"]["slurm"]
    with dask.config.set({"jobqueue.slurm": defaults}):
        yield


def slurm_cluster() -> Any:
    """Return dask-jobqueue's class of a cluster of SLURM jobs.

    To import it makes Ctrl-C end the process at once: the signal is given back to whom it belonged.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "`cluster` 'slurm' must be connected to in the main thread, which receives signals"
        )
    handler = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise ImportError(f"`cluster` 'slurm' needs {INSTALL}") from None
    finally:
        signal.signal(signal.SIGINT, handler)
    return SLURMCluster

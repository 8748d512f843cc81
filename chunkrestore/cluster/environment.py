"""What a worker process needs to be told before its libraries are imported, and Dask before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

THREADS_PER_WORKER = 2
"""Tasks that a worker runs at a time. One of them computes, under a lock of the process; the other reads its block
or writes its result meanwhile, so that storage and processor are busy together."""

PRELOAD = "chunkrestore.cluster.preload"
"""Module that every worker process loads first."""

CONFIGURATION: Mapping[str, Any] = {
    # StarDist's suppression holds the interpreter lock for minutes, during which a worker sends no heartbeat. The
    # default of five minutes would restart such a worker, and its block with it, for ever.
    "distributed.scheduler.worker-ttl": "60 minutes",
    # The runner counts the workers that a block has cost, and decides itself whether to try it again.
    "distributed.scheduler.allowed-failures": 0,
    # A worker holds the tasks that it runs and no other, so that no other is blamed for its death. (Not quite: Dask
    # hands out the first tasks of a stage at once; a few of them may be blamed, and are done again.)
    "distributed.scheduler.worker-saturation": 1.0,
    # A process that is started again after its death must import everything over a busy network file system.
    # After the default of fifteen seconds Dask would give up the process, or the batch job, for good.
    "distributed.deploy.lost-worker-timeout": "10 minutes",
    # A worker with the interpreter lock held is no news.
    "distributed.admin.tick.limit": "1 hour",
    # Results of tasks are tiny: there is nothing to spill. A worker paused at 80 % of its memory would stay so where
    # a library keeps what it freed, and the job would stand still. The limit itself, at 95 %, stays.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.preload": [PRELOAD],
}
"""Dask's configuration of every cluster that is started here."""

_PRE_SPAWN = "distributed.nanny.pre-spawn-environ"


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(n_threads: int) -> dict[str, str]:
    """Return environment variables that a worker with `n_threads` cores needs before its imports."""
    return {
        # Dask sets 1, which would also serialise StarDist's OpenMP loops.
        "OMP_NUM_THREADS": str(n_threads),
        # TensorFlow would start as many threads as the machine has cores in every worker.
        "TF_NUM_INTRAOP_THREADS": str(n_threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1"),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        # TensorFlow would otherwise take all device memory and leave none to CuPy in the same process.
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        # Batch systems and nvidia-smi number devices by bus, CUDA by speed: the numbers in CUDA_VISIBLE_DEVICES
        # would mean other devices where a machine has several kinds.
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        # StarDist enters a parallel region per object; threads that spin in between cost far more than they do.
        "OMP_WAIT_POLICY": "passive",
        # Dask asks malloc to return every freed array to the system at once, and then each array of an iteration
        # is page-faulted in again: Richardson-Lucy took 2.3 times as long. 32 MiB is the largest mmap threshold.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    }


def exported_configuration() -> dict[str, str]:
    """Return the part of `CONFIGURATION` that workers read, as environment variables of another machine.

    Workers that the driver starts itself take over its configuration; those of a batch system do not.
    """
    return {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in CONFIGURATION.items()
        if key.startswith(("distributed.worker.memory.", "distributed.admin."))
    }


@contextmanager
def configured(n_threads: int | None = None) -> Iterator[Callable[[], None]]:
    """Set Dask up for a cluster of workers that have `n_threads` cores each; None: workers of other machines.

    Yields a function that undoes changes of environment variables, which is called at the end as well. A nanny
    sets what its workers need in its own process, this one, and leaves it there. A later cluster of another size
    would take it over, and kernels in this process would run on the threads of a worker.
    """
    import dask
    import distributed  # noqa: F401  declares the defaults that are changed here

    environment = (
        {} if n_threads is None else {**dask.config.get(_PRE_SPAWN), **worker_environment(n_threads)}
    )
    own = {_PRE_SPAWN: environment} if environment else {}
    with dask.config.set({**CONFIGURATION, **own}), _restored(environment) as restore:
        yield restore


@contextmanager
def _restored(names: Iterable[str]) -> Iterator[Callable[[], None]]:
    """Yield a function that gives environment variables back the values that they have now."""
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

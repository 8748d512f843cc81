"""Inside an allocation of SLURM: ``srun --ntasks 6 python script.py`` is scheduler, driver and four workers.

Every task of the step starts the same script. Task 0 becomes the scheduler, task 1 the driver, the others workers,
at the moment when they connect; only the driver goes on from there, and the others exit when it does. So what a
script does before it connects, it does once per task, output included; after that the driver alone writes. Like
every script that starts processes, it needs ``if __name__ == "__main__":``. With ``srun --kill-on-bad-exit`` the
step ends at once if the driver is killed, instead of waiting for its limit.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster.credentials import credentials_in, write_credentials
from chunkrestore.cluster.environment import THREADS_PER_WORKER, configured, usable_cores
from chunkrestore.cluster.gpu import visible_devices
from chunkrestore.cluster.local import LOOPBACK
from chunkrestore.cluster.preload import ignore_signals_of_the_driver

if TYPE_CHECKING:
    from distributed import Client, Security

_LEAST_TASKS = 3
_DRIVER = 1
_POLL_SECONDS = 0.2
_LATE_SECONDS = 60.0
"""How long the driver waits at its end for tasks that have not come to the meeting yet."""
_START_SECONDS = 600.0
"""How long the tasks of a step may take to meet: all load Python from the same file system at once."""


def in_allocation() -> bool:
    """Return whether this process is a task of a step with tasks enough; a batch script is no task of a step."""
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 0)) >= _LEAST_TASKS


@contextmanager
def allocation() -> Iterator[Client]:
    """Yield a client in the driver's task; the other tasks leave with `SystemExit` when the driver has exited.

    Raises
    ------
    ImportError
        If dask-jobqueue, or, for several nodes, cryptography is not installed.
    """
    from distributed import Client

    runner, security = _met()
    with Client(runner.scheduler_address, security=security, set_as_default=False) as client:
        client.wait_for_workers(1)
        yield client


@functools.cache
def _met() -> tuple[Any, Security | None]:
    """Take this task's role, once per process: a script that connects again finds the workers where they were."""
    from chunkrestore.cluster.slurm import slurm_cluster

    slurm_cluster()
    rank = int(os.environ["SLURM_PROCID"])
    if rank != _DRIVER:
        ignore_signals_of_the_driver()
        # What goes wrong is raised in the driver. The logs of this task, and of the worker that it starts:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        os.environ["DASK_LOGGING__DISTRIBUTED"] = "critical"
    n_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    meeting = Path(f".chunkrestore-{_step()}.json").absolute()
    security = _shared_credentials(meeting.with_suffix(".pem"), rank) if n_nodes > 1 else None
    with configured(_cores_per_task()) as restore_environment:
        try:
            runner = _runner_class()(security, meeting, n_nodes)
        except Exception:
            if rank == _DRIVER or meeting.exists():
                raise
            sys.exit(0)  # the driver, with little to do, ended while this task was still starting
        restore_environment()
    if rank != _DRIVER:
        sys.exit(0)
    atexit.register(_release, runner, int(os.environ["SLURM_STEP_NUM_TASKS"]) - 2)
    return runner, security


def _release(runner: Any, n_workers: int) -> None:
    """End the other tasks; a worker that came after the scheduler had gone would look for it for minutes."""
    with suppress(OSError, TimeoutError):  # the scheduler may be gone
        runner.sync(_all_met, runner.scheduler_comm, n_workers)
        runner.close()


async def _all_met(scheduler: Any, n_workers: int) -> None:
    deadline = time.monotonic() + _LATE_SECONDS
    while len(await scheduler.ncores()) < n_workers and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


def _runner_class() -> Any:
    """Return dask-jobqueue's runner, which knows nothing of TLS on the driver's side, and reads half-written files."""
    from dask_jobqueue.slurm import SLURMRunner
    from distributed import rpc

    class Runner(SLURMRunner):
        def __init__(self, security: Security | None, meeting: Path, n_nodes: int) -> None:
            self._security = security
            self._meeting = meeting
            place = {"protocol": "tls://", "security": security} if security else {"host": LOOPBACK}
            common = {**place, "dashboard_address": f"{LOOPBACK}:0"}
            super().__init__(
                scheduler_file=str(meeting).replace("{", "{{").replace("}", "}}"),
                scheduler_options={**common},
                # A nanny starts a worker again that died; the task of a bare one would be lost.
                worker_class="distributed.Nanny",
                worker_options={**common, **_worker_options(n_nodes)},
            )

        async def get_scheduler_address(self) -> str:
            deadline = time.monotonic() + _START_SECONDS
            while time.monotonic() < deadline:
                try:
                    return str(json.loads(self._meeting.read_text())["address"])
                except (FileNotFoundError, ValueError):
                    await asyncio.sleep(_POLL_SECONDS)
            raise TimeoutError(f"task 0 of this step wrote no {self._meeting} within {_START_SECONDS} s")

        async def before_client_start(self) -> None:
            arguments = self._security.get_connection_args("client") if self._security else None
            self.scheduler_comm = rpc(self.scheduler_address, connection_args=arguments)

    return Runner


def _worker_options(n_nodes: int) -> dict[str, Any]:
    """Return the options of this task's nanny: its share of the node."""
    devices = visible_devices()
    pin = (
        {"CUDA_VISIBLE_DEVICES": devices[int(os.environ["SLURM_LOCALID"]) % len(devices)]} if devices else {}
    )
    return {
        "nthreads": THREADS_PER_WORKER,
        "memory_limit": _memory_per_task(n_nodes),
        "death_timeout": _START_SECONDS,
        "env": pin,
    }


def _cores_per_task() -> int:
    """Return the cores that SLURM gives a task, which it says only where it was asked for them."""
    return min(int(os.environ.get("SLURM_CPUS_PER_TASK", 1)), usable_cores())


def _memory_per_task(n_nodes: int) -> int:
    """Return the bytes that a task may take of what its step has on a node."""
    from distributed.system import MEMORY_LIMIT

    per_core = int(os.environ.get("SLURM_MEM_PER_CPU", 0)) * 2**20
    if per_core:
        return per_core * _cores_per_task()
    per_node = int(os.environ.get("SLURM_MEM_PER_NODE", 0)) * 2**20 or MEMORY_LIMIT
    return per_node // -(-int(os.environ["SLURM_STEP_NUM_TASKS"]) // n_nodes)


def _step() -> str:
    """Return what tells this step from all others; a job that is started again keeps its id."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return "-".join(os.environ.get(name, "0") for name in names)


def _shared_credentials(path: Path, rank: int) -> Security:
    """Return the credentials of this step, which task 0 makes up."""
    if rank == 0:
        atexit.register(path.unlink, missing_ok=True)
        write_credentials(path)
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"task 0 of this step wrote no {path} within {_START_SECONDS} s")
        time.sleep(_POLL_SECONDS)
    return credentials_in(path)

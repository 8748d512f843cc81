"""Judge the machine: cores, memory, limits, names."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from chunkrestore.doctor.facts import Facts
from chunkrestore.doctor.finding import Finding

_FEW_FILES = 1024
# A scheduler holds two connections per worker, and a worker the files of a few chunks.
_LITTLE_SHARED_NBYTES = 2**24
# What semaphores and queues of Python's processes need, many times over.


def cores(facts: Facts) -> Iterator[Finding]:
    """Judge how many cores there are, and whether threads will use them."""
    found = f"{facts.n_cores} usable"
    if facts.quota is not None and facts.quota < 0.75 * facts.n_cores:
        fix = f"--workers {max(1, int(facts.quota))}"
        yield Finding("cores", "warning", f"{found}, but the container's limit is {facts.quota:.1f}", fix)
    else:
        yield Finding("cores", "ok", found)
    wanted = facts.environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) != facts.n_cores:
        found = f"OMP_NUM_THREADS={wanted} for {facts.n_cores} cores, for work in this process; workers have their own"
        yield Finding("threads", "warning", found, "unset OMP_NUM_THREADS")


def memory(facts: Facts) -> Iterator[Finding]:
    """Judge whether default blocks fit, one per core."""
    from chunkrestore.jobs.plan import MEMORY_NBYTES

    n_fit = facts.memory_nbytes // MEMORY_NBYTES
    found = f"{facts.memory_nbytes / 2**30:.1f} GiB free"
    if n_fit == 0:
        found = f"{found}, less than one block of the default size needs"
        yield Finding("memory", "problem", found, "--memory free, or a smaller --block")
    elif n_fit < facts.n_cores:
        found = f"{found}, enough for {n_fit} blocks at a time on {facts.n_cores} cores"
        yield Finding("memory", "warning", found, f"--workers {n_fit}, or --memory free")
    else:
        yield Finding("memory", "ok", found)


def limits(facts: Facts) -> Iterator[Finding]:
    """Judge open files and shared memory."""
    if facts.n_files < _FEW_FILES:
        found = f"{facts.n_files} per process; Dask needs more than that for many workers"
        yield Finding("open files", "warning", found, "ulimit -n 65536")
    else:
        yield Finding("open files", "ok", f"{facts.n_files} per process")
    if facts.shared_nbytes is None:
        found = "/dev/shm cannot be written; Python's worker processes need it"
        yield Finding(
            "shared memory", "problem", found, "mount -t tmpfs tmpfs /dev/shm (docker: --shm-size 1g)"
        )
    elif facts.shared_nbytes < _LITTLE_SHARED_NBYTES:
        found = f"{facts.shared_nbytes / 2**20:.0f} MiB free in /dev/shm"
        yield Finding("shared memory", "warning", found, "remove old files there (docker: --shm-size 1g)")
    else:
        yield Finding("shared memory", "ok", f"{facts.shared_nbytes / 2**20:.0f} MiB free in /dev/shm")


def host_name(facts: Facts) -> Iterator[Finding]:
    """Judge whether workers on other machines could find this one."""
    several = bool(facts.programs)
    if not facts.address:
        found = f"{facts.host} does not resolve to an address"
        fix = f"add `127.0.0.1 {facts.host}` to /etc/hosts, or name an interface in the cluster profile"
        yield Finding("host name", "problem" if several else "warning", found, fix)
        return
    found = f"{facts.host} is {facts.address}"
    if several and ipaddress.ip_address(facts.address.partition("%")[0]).is_loopback:
        fix = "name the network's interface in the cluster profile, such as `interface: ib0`"
        yield Finding("host name", "warning", f"{found}, which workers on other machines cannot reach", fix)
    else:
        yield Finding("host name", "ok", found)


CHECKS = (cores, memory, limits, host_name)
"""Each takes the facts alone."""

"""One worker process per CUDA device of this machine, each of which sees its device and no other."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster.local import worker_processes

if TYPE_CHECKING:
    from distributed import Client

    from chunkrestore.cluster.profile import CudaProfile

_SMI_SECONDS = 60
"""A driver that nobody used yet may take half a minute to answer on a machine with many devices."""


def visible_devices() -> list[str]:
    """Return the CUDA devices that this process may use, as values for ``CUDA_VISIBLE_DEVICES``.

    Those in the environment, numbers or UUIDs, up to the first that is none, as CUDA reads them; otherwise those
    that ``nvidia-smi`` lists. CUDA itself is not asked: it would take memory on every device, here, for the
    lifetime of the driver.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return _installed_devices()
    devices = []
    for device in (name.strip() for name in listed.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", device):
            break
        devices.append(device)
    return devices


def has_devices() -> bool:
    """Return whether this machine has CUDA devices that this process may use."""
    # A variable that somebody exports on all machines makes no device.
    return shutil.which("nvidia-smi") is not None and bool(visible_devices())


@contextmanager
def cuda_processes(n_workers: int | None, profile: CudaProfile | None) -> Iterator[Client]:
    """Yield a client of one worker process per visible CUDA device, or of the first `n_workers` of them.

    Raises
    ------
    ValueError
        If there are no, or not so many devices.
    """
    devices = visible_devices()
    wanted = n_workers or (profile and profile.n_workers) or len(devices)
    if not devices:
        reason = (
            f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
            if "CUDA_VISIBLE_DEVICES" in os.environ
            else "nvidia-smi lists none"
        )
        raise ValueError(f"`cluster` 'cuda' needs a CUDA device: {reason}; use 'local' to compute without")
    if wanted > len(devices):
        raise ValueError(
            f"`n_workers` is {wanted}, but there are {len(devices)} CUDA devices, one per worker"
        )
    with worker_processes([_options(device) for device in devices[:wanted]], profile) as client:
        yield client


def _options(device: str) -> dict[str, Any]:
    """Return the options of the nanny whose worker owns `device`."""
    return {"env": {"CUDA_VISIBLE_DEVICES": device}, "plugins": _affinity(device)}


def _affinity(device: str) -> list[Any]:
    """Return what keeps a worker on the cores next to its device, where dask-cuda is installed to tell them.

    Of dask-cuda's own cluster nothing else would help: it spills results of tasks from devices, and there are
    none, and it shows every worker all devices, its own first, on each of which TensorFlow would take memory.
    """
    if importlib.util.find_spec("dask_cuda") is None:
        return []
    from dask_cuda.plugins import CPUAffinity
    from dask_cuda.utils import get_cpu_affinity

    return [CPUAffinity(get_cpu_affinity(int(device) if device.isdecimal() else device))]


def _installed_devices() -> list[str]:
    """Return the UUIDs that ``nvidia-smi`` lists; of a device that is divided, those of its parts."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    try:
        listing = subprocess.run(
            [smi, "-L"], capture_output=True, text=True, check=True, timeout=_SMI_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return devices_in(listing.stdout)


def devices_in(listing: str) -> list[str]:
    r"""Return the UUIDs in a listing of ``nvidia-smi -L``.

    >>> devices_in("GPU 0: NVIDIA A100 (UUID: GPU-5d)\n  MIG 1g.5gb Device 0: (UUID: MIG-7f)\n")
    ['MIG-7f']
    """
    devices: list[str] = []
    whole = None
    for uuid in re.findall(r"\(UUID: ((?:GPU|MIG)-[\w/-]+)\)", listing):
        if uuid.startswith("MIG-") and devices and devices[-1] == whole:
            devices.pop()  # a divided device is of no use as a whole
        devices.append(uuid)
        whole = uuid if uuid.startswith("GPU-") else whole
    return devices

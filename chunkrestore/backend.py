"""Where arrays live: array namespaces, real FFTs, transfers and free memory.

The only file that names CuPy. A kernel takes any array of the Python array API standard, asks `namespace`
for its functions and `fft` for its transforms, and stays on the device that its input came from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

Array: TypeAlias = Any
"""An array of NumPy, CuPy or another array-API namespace."""

_HOST_SLAB = 2**16
# 256 KiB of float32: the temporaries of an element-wise step then stay in the second-level cache.
_DEVICE_SLAB = 2**24
# 64 MiB of float32: one launch still fills a large device, and temporaries stay small beside a volume.
_CUPY_MISSING = 'CuPy is not installed; run: pip install "chunkrestore[cupy]"'


def namespace(*arrays: Array) -> Any:
    """Return the array-API namespace (as wrapped by array-api-compat) that all `arrays` belong to."""
    return array_api_compat.array_namespace(*arrays)


def asarray_like(array: np.ndarray, reference: Array) -> Array:
    """Return the host array in the namespace and on the device of `reference`."""
    return namespace(reference).asarray(array, device=device(reference))


def device(array: Array) -> Any:
    """Return the device that `array` lives on."""
    return array_api_compat.device(array)


def full(shape: Sequence[int], value: float, reference: Array) -> Array:
    """Return a float32 array of `shape` filled with `value`, where `reference` lives.

    With an empty shape: a scalar that every namespace accepts beside an array.
    """
    xp = namespace(reference)
    return xp.full(tuple(shape), value, dtype=xp.float32, device=device(reference))


def to_numpy(array: Array) -> np.ndarray:
    """Return `array` on the host; an array that is there already is returned as it is."""
    if array_api_compat.is_cupy_array(array):
        return array.get()
    if array_api_compat.is_torch_array(array):
        return array.detach().cpu().numpy()
    return np.asarray(array)


def to_device(array: Array, device: str) -> Array:
    """Return `array` on `device`: ``"cpu"`` (NumPy), ``"cuda"`` or ``"cuda:1"`` (CuPy).

    Raises
    ------
    ImportError
        If a CUDA device is asked for and CuPy is not installed.
    ValueError
        If `device` is none of these, or there is no such device.
    """
    number = _device_number(device)
    if number is None:
        return to_numpy(array)
    missing = missing_device()
    if missing == _CUPY_MISSING:
        raise ImportError(missing)
    if missing is not None:
        raise ValueError(f'`device` "{device}" cannot be used: {missing}; use "cpu"')
    import cupy

    if number >= cupy.cuda.runtime.getDeviceCount():
        raise ValueError(f'`device` "{device}": there are {cupy.cuda.runtime.getDeviceCount()} CUDA devices')
    with cupy.cuda.Device(number):
        return cupy.asarray(array)


def _device_number(device: str) -> int | None:
    name, _, number = device.partition(":")
    if device == "cpu":
        return None
    if name != "cuda" or not (number or "0").isdigit():
        raise ValueError(f'`device` must be "cpu", "cuda" or "cuda:<number>", got "{device}"')
    return int(number or 0)


def missing_device() -> str | None:
    """Return why no CUDA device can be used from here, or None if one can."""
    try:
        import cupy
    except ImportError:
        return _CUPY_MISSING
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"
    return None if count else "CuPy finds no CUDA device"


def n_threads() -> int:
    """Return how many threads array work on the host may use.

    ``OMP_NUM_THREADS`` where it is set (Dask sets it to 1 in worker processes, so that workers share a
    machine evenly), else the CPUs that this process may run on.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class FFT:
    """Real transforms over some axes that keep float32 (complex64) precision."""

    rfftn: Callable[[Array, Sequence[int]], Array]
    """``rfftn(array, axes)``: half spectrum, halved along the last of `axes`. Keeps `array`."""
    irfftn: Callable[[Array, Sequence[int], Sequence[int]], Array]
    """``irfftn(spectrum, lengths, axes)``: real array with `lengths` along `axes`. Destroys `spectrum`."""


def fft(xp: Any) -> FFT:
    """Return the fastest real transforms for arrays of namespace `xp`.

    SciPy's multithreaded pocketfft for NumPy, ``cupyx.scipy.fft`` for CuPy, ``xp.fft`` otherwise.
    """
    if array_api_compat.is_numpy_namespace(xp):
        threads = n_threads()
        return FFT(partial(_scipy_rfftn, threads), partial(_scipy_irfftn, threads))
    if array_api_compat.is_cupy_namespace(xp):
        from cupyx.scipy import fft as device_fft

        return FFT(
            lambda array, axes: device_fft.rfftn(array, axes=tuple(axes)),
            lambda spectrum, lengths, axes: device_fft.irfftn(
                spectrum, s=tuple(lengths), axes=tuple(axes), overwrite_x=True
            ),
        )
    return FFT(
        lambda array, axes: xp.fft.rfftn(array, axes=tuple(axes)),
        lambda spectrum, lengths, axes: xp.fft.irfftn(spectrum, s=tuple(lengths), axes=tuple(axes)),
    )


def _scipy_rfftn(threads: int, array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    import scipy.fft

    return scipy.fft.rfftn(array, axes=tuple(axes), workers=threads)


def _scipy_irfftn(
    threads: int, spectrum: np.ndarray, lengths: Sequence[int], axes: Sequence[int]
) -> np.ndarray:
    # scipy.fft.irfftn copies the spectrum first; complex transforms in place over all axes but the last and
    # one real transform give the same numbers in two thirds of the time, without that copy.
    import scipy.fft

    *leading, last = axes
    if leading:
        spectrum = scipy.fft.ifftn(spectrum, axes=tuple(leading), overwrite_x=True, workers=threads)
    return scipy.fft.irfft(spectrum, n=lengths[-1], axis=last, workers=threads)


def slabs(xp: Any, shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Yield index tuples that cut an array of `shape` along its first axis, in order.

    Element-wise steps done slab by slab need temporaries of one slab instead of one volume, and on the
    host these stay in the processor's cache (one pass over main memory instead of one per operation).
    """
    elements = _DEVICE_SLAB if array_api_compat.is_cupy_namespace(xp) else _HOST_SLAB
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0])), ...


def free_memory_nbytes(device: str = "cpu") -> int:
    """Return how many bytes this process can still allocate on `device` (as in `to_device`).

    On the host: the memory that the system calls available, or what is left of the control group's limit
    (containers, SLURM jobs) where that is less. On a CUDA device: free memory plus CuPy's idle pool.

    Raises
    ------
    ImportError, ValueError
        As `to_device`.
    """
    number = _device_number(device)
    if number is None:
        return min(_available_nbytes(), _control_group_nbytes())
    to_device(np.zeros(0, np.float32), device)
    import cupy

    with cupy.cuda.Device(number):
        free, _ = cupy.cuda.runtime.memGetInfo()
        return int(free + cupy.get_default_memory_pool().free_bytes())


def _available_nbytes() -> int:
    try:
        import psutil
    except ImportError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return int(psutil.virtual_memory().available)


def _control_group_nbytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the least memory left in this process's control groups (version 1 or 2), or a huge number."""
    left = [2**63]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return left[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            left.append(_group_left(folder, limit_name, usage_name))
    return max(0, min(left))


def _group_left(folder: Path, limit_name: str, usage_name: str) -> int:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), (folder / usage_name).read_text().strip()
        stat = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 2**63
    if not limit.isdigit():
        return 2**63
    # Pages of files that were read count as used, but the kernel gives them back before it refuses memory.
    idle_names = ("inactive_file", "total_inactive_file")
    idle = sum(int(line.split()[1]) for line in stat if line.split()[0] in idle_names)
    return int(limit) - int(usage) + idle

"""Where arrays live: array namespaces, real FFTs, transfers and free memory.

The only file that names CuPy. A kernel takes any array of the Python array API standard, asks `namespace`
for its functions and `fft` for its transforms, and stays on the device that its input came from.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
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
_LEAST_PARALLEL_SLABS = 8
# Below half a million voxels, starting threads costs more than they save.
_MOST_PLANS = 4
# Each CuPy plan holds a work area as large as a spectrum; blocks of one grid share one lattice.
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
    """Real transforms over some axes that keep float32 (complex64) precision.

    Both take the corner of a lattice that holds data, or is wanted, and skip the lines of the other voxels
    where the library allows it: with an image of 64 x 256 x 256 voxels on a lattice of 96 x 288 x 288 a
    quarter of the work.
    """

    rfftn: Callable[[Array, Sequence[int], Sequence[int]], Array]
    """``rfftn(array, lattice, axes)``: half spectrum of `array` with zeros after its last voxels up to
    `lattice`, halved along the last of `axes`. Keeps `array`."""
    irfftn: Callable[[Array, Sequence[int], Sequence[int], Sequence[int]], Array]
    """``irfftn(spectrum, lattice, axes, shape)``: the first `shape` voxels of the real array of shape
    `lattice`. Destroys `spectrum`."""


def fft(xp: Any) -> FFT:
    """Return the fastest real transforms for arrays of namespace `xp`.

    SciPy's multithreaded transforms for NumPy, ``cupyx.scipy.fft`` for CuPy, ``xp.fft`` otherwise.
    """
    if array_api_compat.is_numpy_namespace(xp):
        threads = n_threads()
        return FFT(partial(_scipy_rfftn, threads), partial(_scipy_irfftn, threads))
    if array_api_compat.is_cupy_namespace(xp):
        import cupy
        from cupyx.scipy import fft as module

        cupy.fft.config.get_plan_cache().set_size(_MOST_PLANS)
    else:
        module = xp.fft
    return FFT(partial(_whole_rfftn, module, xp), partial(_whole_irfftn, module))


def _scipy_rfftn(threads: int, array: np.ndarray, lattice: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    import scipy.fft

    *leading, last = axes
    spectrum = scipy.fft.rfft(array, n=lattice[last], axis=last, workers=threads)
    for axis in reversed(leading):
        # Axis by axis, so that lines that hold nothing but zeros are never made.
        spectrum = scipy.fft.fft(spectrum, n=lattice[axis], axis=axis, overwrite_x=True, workers=threads)
    return spectrum


def _scipy_irfftn(
    threads: int, spectrum: np.ndarray, lattice: Sequence[int], axes: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
    # scipy.fft.irfftn would copy the spectrum first.
    import scipy.fft

    *leading, last = axes
    for axis in leading:
        spectrum = scipy.fft.ifft(spectrum, axis=axis, overwrite_x=True, workers=threads)
        spectrum = spectrum[_first(shape[axis], axis)]
    return scipy.fft.irfft(spectrum, n=lattice[last], axis=last, workers=threads)[_first(shape[last], last)]


def _first(n: int, axis: int) -> tuple[slice, ...]:
    """Return the index of the first `n` voxels along `axis`."""
    return (*(slice(None),) * axis, slice(n))


def _whole_rfftn(module: Any, xp: Any, array: Array, lattice: Sequence[int], axes: Sequence[int]) -> Array:
    if tuple(array.shape) != tuple(lattice):
        padded = full(lattice, 0.0, array)
        padded[tuple(slice(n) for n in array.shape)] = array
        array = padded
    return module.rfftn(xp.astype(array, xp.float32, copy=False), axes=tuple(axes))


def _whole_irfftn(
    module: Any, spectrum: Array, lattice: Sequence[int], axes: Sequence[int], shape: Sequence[int]
) -> Array:
    whole = module.irfftn(spectrum, s=tuple(lattice[axis] for axis in axes), axes=tuple(axes))
    return whole[tuple(slice(n) for n in shape)]


def elementwise(function: Callable[..., Array], out: Array, *operands: Array | float) -> Array:
    """Return ``function(xp, *operands)``, computed in one pass over memory; the contents of `out` are lost.

    On the host it is written into `out`, slab by slab along the first axis and on several threads, so that
    temporaries stay in the processor's cache. On a CUDA device it is one fused kernel and a new array.

    Parameters
    ----------
    function
        Takes the namespace and the operands; element-wise functions of the array API alone.
    out
        Array that may be overwritten, of the result's shape and dtype; one of the operands, or none.
    operands
        Arrays that broadcast to the shape of `out`, and float32 numbers.
    """
    xp = namespace(out)
    arrays = [full((), o, out) if isinstance(o, int | float) else o for o in operands]
    if array_api_compat.is_cupy_namespace(xp):
        return xp.astype(_fused(function, xp)(*arrays), out.dtype, copy=False)

    def run(slab: tuple[Any, ...]) -> None:
        out[slab] = function(xp, *(a[slab] if a.ndim and a.shape[0] == out.shape[0] else a for a in arrays))

    each_slab(xp, out.shape, run)
    return out


def each_slab(
    xp: Any, shape: Sequence[int], run: Callable[[tuple[Any, ...]], None], *, least_rows: int = 1
) -> None:
    """Call `run` with every index tuple of `slabs`; on the host on several threads, in no order."""
    parts = list(slabs(xp, shape, least_rows=least_rows))
    if len(parts) < _LEAST_PARALLEL_SLABS or n_threads() == 1 or not array_api_compat.is_numpy_namespace(xp):
        for part in parts:
            run(part)
    else:
        with ThreadPoolExecutor(n_threads()) as pool:
            list(pool.map(run, parts))


@cache
def _fused(function: Callable[..., Array], xp: Any) -> Callable[..., Array]:
    """Return `function` as one CUDA kernel."""
    import cupy

    return cupy.fuse(kernel_name=function.__name__.strip("_"))(partial(function, xp))


def slabs(xp: Any, shape: Sequence[int], *, least_rows: int = 1) -> Iterator[tuple[Any, ...]]:
    """Yield index tuples that cut an array of `shape` along its first axis, in order.

    Element-wise steps done slab by slab need temporaries of one slab instead of one volume, and on the
    host these stay in the processor's cache (one pass over main memory instead of one per operation).
    """
    elements = _DEVICE_SLAB if array_api_compat.is_cupy_namespace(xp) else _HOST_SLAB
    rows = max(least_rows, elements // max(1, math.prod(shape[1:])))
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the host or on a device.

    CuPy's is a `MemoryError`; TensorFlow's has a name of its own.
    """
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def release_memory() -> None:
    """Give idle memory of CuPy's pools back to the device, if CuPy is in use."""
    if "cupy" in sys.modules:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        cupy.fft.config.get_plan_cache().clear()


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

"""How near does Richardson-Lucy on a CUDA device come to what its memory bandwidth allows?

Not yet run on hardware: there was no device when it was written. It needs CuPy and this package's kernels, and
neither dask nor zarr; ``--device cpu`` runs the same code on the host, to see that the script works.

Contenders, on cubes of several lengths, at faces inside a volume (no padding) and at its border:

- chunkrestore, plain and heavy ball;
- a plain CuPy version, written as one would in a notebook: whole-array expressions, nothing fused;
- cuCIM's ``richardson_lucy``, where it is installed;
- the floor: two forward and two inverse real transforms of the same size and nothing else.

Prediction: one iteration moves about 150 bytes per voxel, 96 of them in the transforms, so an H100 (3.35 TB/s)
can do 22 G voxel-iterations per second at most; half of that, 11, is the goal at 512^3. Fused element-wise
steps bring the iteration within 1.4 of the floor, the plain version takes twice as long. Peak 32 bytes per voxel
(36 with momentum), cuFFT's work area included. Uploading the next block on a stream of its own while this
one iterates hides the transfer wholly at 10 iterations.

Reported: G voxel-iterations per second, ratio to the floor, peak bytes of the memory pool per voxel of the
lattice, largest difference from the host's result relative to its maximum, and seconds for a row of blocks
with transfers in line and overlapped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.kernels.blur import Blur, lattice_shape
from chunkrestore.kernels.richardson_lucy import last_estimate
from chunkrestore.psf import gaussian

RESULTS = Path(__file__).parent / "results" / "richardson_lucy_gpu.json"
N_BLOCKS = 6


class Device:
    """The host, or a CUDA device with its clock and its memory pool."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_host = name == "cpu"
        if not self.on_host:
            import cupy

            self.cupy = cupy

    def upload(self, image: np.ndarray) -> Any:
        """Return `image` on the device."""
        return backend.to_device(image, self.name)

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """Return the best wall time, the device idle before and after."""
        best = float("inf")
        for _ in range(repeats + 1):  # one to warm up: plans, compiled kernels, pool
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best

    def wait(self) -> None:
        """Wait until the device has nothing to do."""
        if not self.on_host:
            self.cupy.cuda.Device().synchronize()

    def peak_nbytes(self, function: Callable[[], Any]) -> int | None:
        """Return what the pool grew to during `function`, beyond what it held."""
        if self.on_host:
            return None
        pool = self.cupy.get_default_memory_pool()
        backend.release_memory()
        before = pool.used_bytes()
        function()
        self.wait()
        peak = pool.total_bytes() - before
        backend.release_memory()
        return int(peak)


def plain(image: Any, psf: np.ndarray, iterations: int) -> Any:
    """Return Richardson-Lucy as one would write it in a notebook, periodic."""
    xp = backend.namespace(image)
    otf = Blur.from_psf(psf, image.shape, image).otf
    axes = tuple(range(image.ndim))
    y = xp.astype(image, xp.float32)
    x = xp.ones_like(y) * xp.mean(y)
    for _ in range(iterations):
        blurred = xp.fft.irfftn(xp.fft.rfftn(x, axes=axes) * otf, s=image.shape, axes=axes)
        ratio = y / xp.maximum(blurred, xp.asarray(1e-6, dtype=xp.float32))
        x = x * xp.fft.irfftn(xp.fft.rfftn(ratio, axes=axes) * xp.conj(otf), s=image.shape, axes=axes)
    return x


def measure(device: Device, length: int, iterations: int, repeats: int) -> dict[str, Any]:
    """Time all contenders on a cube."""
    psf = gaussian((3.0, 1.6, 1.6))
    image = np.random.default_rng(1).poisson(50, (length,) * 3).astype(np.uint16)
    here = device.upload(image)
    entries = {}
    for name, at_border in (("inside", ((False, False),) * 3), ("at the border", ((True, True),) * 3)):
        lattice = lattice_shape(image.shape, psf.shape, at_border)
        blur = Blur.from_psf(psf, lattice, here)
        work = backend.full(lattice, 1.0, here)

        def floor(blur: Blur = blur, work: Any = work) -> None:
            for _ in range(2 * iterations):
                blur.synthesise(blur.analyse(work))

        def ours(acceleration: str | None, blur: Blur = blur) -> Callable[[], Any]:
            return lambda: last_estimate(
                here, blur, iterations=iterations, start=50.0, acceleration=acceleration
            )

        contenders: dict[str, Callable[[], Any]] = {
            "floor": floor,
            "chunkrestore, plain": ours(None),
            "chunkrestore, heavy ball": ours("heavy-ball"),
        }
        if name == "inside":
            contenders["plain CuPy"] = lambda: plain(here, psf, iterations)
            contenders |= _cucim(here, psf, iterations)
        times = {label: device.seconds(function, repeats) for label, function in contenders.items()}
        n_lattice = int(np.prod(lattice))
        for label, seconds in times.items():
            peak = device.peak_nbytes(contenders[label])
            entries[f"{label}, {name}"] = {
                "seconds_per_iteration": seconds / iterations,
                "gigavoxel_iterations_per_s": image.size * iterations / seconds / 1e9,
                "ratio_to_floor": seconds / times["floor"],
                "peak_nbytes_per_lattice_voxel": None if peak is None else peak / n_lattice,
            }
        host = last_estimate(image, Blur.from_psf(psf, lattice, image), iterations=2, start=50.0)
        there = backend.to_numpy(last_estimate(here, blur, iterations=2, start=50.0))
        entries[f"chunkrestore, heavy ball, {name}"]["difference_from_host"] = float(
            np.abs(host - there).max() / host.max()
        )
    return {"contenders": entries, "row_of_blocks": _row_of_blocks(device, image, psf, iterations)}


def _cucim(image: Any, psf: np.ndarray, iterations: int) -> dict[str, Callable[[], Any]]:
    try:
        from cucim.skimage.restoration import richardson_lucy
    except ImportError:
        return {}
    xp = backend.namespace(image)
    y, kernel = xp.astype(image, xp.float32), backend.asarray_like(psf, image)
    return {"cuCIM": lambda: richardson_lucy(y, kernel, num_iter=iterations, clip=False)}


def _row_of_blocks(device: Device, image: np.ndarray, psf: np.ndarray, iterations: int) -> dict[str, float]:
    """Return seconds for a row of blocks from host to host, transfers in line, and one block ahead."""
    blur = Blur.from_psf(psf, image.shape, device.upload(image[:1]))

    def compute(block: Any) -> np.ndarray:
        return backend.to_numpy(last_estimate(block, blur, iterations=iterations, start=50.0))

    def upload(_: int) -> Any:
        if device.on_host:
            return device.upload(image)
        with device.cupy.cuda.Stream(non_blocking=True) as stream:
            block = device.upload(image)
            stream.synchronize()
        return block

    def in_line() -> None:
        for k in range(N_BLOCKS):
            compute(upload(k))

    def overlapped() -> None:
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(upload, 0)
            for k in range(N_BLOCKS):
                block = following.result()
                following = pool.submit(upload, k + 1)
                compute(block)

    return {"in_line_s": device.seconds(in_line, 1), "overlapped_s": device.seconds(overlapped, 1)}


def _versions(device: Device) -> dict[str, str]:
    if device.on_host:
        return {"device": "host"}
    properties = device.cupy.cuda.runtime.getDeviceProperties(device.cupy.cuda.Device().id)
    return {
        "device": properties["name"].decode(),
        "cupy": device.cupy.__version__,
        "cuda_runtime": str(device.cupy.cuda.runtime.runtimeGetVersion()),
        "driver": str(device.cupy.cuda.runtime.driverGetVersion()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=(256, 384, 512))
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = Device(options.device)
    results = {str(n): measure(device, n, options.iterations, options.repeats) for n in options.lengths}
    content = describe() | _versions(device) | {"iterations": options.iterations, "lengths": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    for length, result in results.items():
        for label, entry in result["contenders"].items():
            peak = entry["peak_nbytes_per_lattice_voxel"]
            print(
                f"{length:>5} {label:40} {entry['gigavoxel_iterations_per_s']:8.3f} G voxel-it/s"
                f" {entry['ratio_to_floor']:6.2f} x floor" + (f" {peak:6.1f} B/voxel" if peak else "")
            )
        print(f"{length:>5} row of {N_BLOCKS} blocks", result["row_of_blocks"])


if __name__ == "__main__":
    main()

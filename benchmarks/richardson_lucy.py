"""What does one Richardson-Lucy iteration cost, beside the transforms that it cannot do without?

One simulated light-sheet volume (nuclei that run across the field of view, photon noise) is deconvolved in
one run, interleaved and repeated, by

- chunkrestore at the volume's border (lattice n + p - 1, weights), plain and with heavy-ball momentum;
- chunkrestore inside a volume (periodic on what was read, no weights; its rim, which a job trims, is not
  meant to be right, so its PSNR is that of a block with all of its halo);
- scikit-image, which convolves with zero padding and transforms the point spread function anew each time;
- the floor: two forward and two inverse real transforms at the size of chunkrestore's border lattice, by the
  same routines, and nothing else.

Predictions, and what came of them. First: element-wise work done in the cache adds at most 30 % to the floor,
momentum another 5 %, scikit-image (6 transforms, temporaries of the whole volume) takes at least 1.5 times as
long; came true (1.23, 1.35, 1.86). Then: an iteration that sweeps one spectrum plane by plane costs no more than
its four transforms, and 20 bytes per lattice voxel instead of 24; the memory came true, the time went from 1.25
to 1.10 (one thread).

Reported per contender: wall and CPU seconds per iteration, set-up included (medians; the CPU column is the
fair one on a shared machine), voxels of the volume per second, ratio to the floor, peak bytes, and the PSNR
against the truth, whole and in the outermost 8 voxels, after the given iterations.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from chunkrestore import backend
from chunkrestore.kernels.blur import lattice_shape
from chunkrestore.kernels.richardson_lucy import richardson_lucy
from chunkrestore.metrics import psnr
from chunkrestore.psf import gaussian

RESULTS = Path(__file__).parent / "results" / "richardson_lucy.json"
Shape = tuple[int, int, int]
Contender = Callable[[], Any]
FLOOR = "floor: 4 real FFTs"


def scene(shape: Shape, psf: np.ndarray, photons: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the truth (float32) and its noisy image (uint16) in a field of view cut from a larger scene."""
    from scipy.signal import fftconvolve

    rng, margin, reach = np.random.default_rng(7), max(psf.shape), 9
    large = [n + 2 * margin for n in shape]
    truth = np.full(large, 0.02, np.float32)
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * 3])
    for _ in range(int(np.prod(large)) // 6000):
        around = tuple(
            slice(c - reach, c + reach + 1) for c in (rng.integers(reach, n - reach) for n in large)
        )
        truth[around][ball < rng.uniform(3, reach) ** 2] += rng.uniform(0.3, 1)
    blurred = fftconvolve(truth, psf, mode="same").clip(0)
    scale = photons / np.percentile(blurred, 99.9)
    field = tuple(slice(margin, margin + n) for n in shape)
    return truth[field] * np.float32(scale), rng.poisson(blurred[field] * scale).astype(np.uint16)


def contenders(image: np.ndarray, psf: np.ndarray, iterations: int) -> dict[str, Contender]:
    """Return what is timed; each returns its result, or None."""
    from skimage.restoration import richardson_lucy as skimage_richardson_lucy

    start, inside = float(image.mean()), ((False, False),) * 3
    lattice = lattice_shape(image.shape, psf.shape, ((True, True),) * 3)
    work, fft = np.ones(lattice, np.float32), backend.fft(backend.namespace(image))
    as_float = image.astype(np.float32)

    def ours(acceleration: str | None, at_border: Any = None) -> Contender:
        return lambda: richardson_lucy(
            image, psf, iterations=iterations, start=start, acceleration=acceleration, at_border=at_border
        )

    def floor() -> None:
        for _ in range(2 * iterations):
            fft.irfftn(fft.rfftn(work, lattice, (0, 1, 2)), lattice, (0, 1, 2), lattice)

    return {
        FLOOR: floor,
        "chunkrestore, plain": ours(None),
        "chunkrestore, heavy ball": ours("heavy-ball"),
        "chunkrestore, plain, inside": ours(None, inside),
        "chunkrestore, heavy ball, inside": ours("heavy-ball", inside),
        "scikit-image": lambda: skimage_richardson_lucy(as_float, psf, num_iter=iterations, clip=False),
    }


def measure(shape: Shape, iterations: int, repeats: int) -> dict[str, Any]:
    """Time all contenders, interleaved, after one untimed round that also gives quality and memory."""
    # 31^3 voxels as in the comparison of peers: a narrow core, 15 % of the light in a tail.
    psf = gaussian((3.5, 1.8, 1.8), truncate=2.5, tail=0.15, tail_sigma=(6.0, 6.0, 6.0))
    truth, image = scene(shape, psf)
    rivals = contenders(image, psf, iterations)
    figures = {name: _quality(rival, truth) for name, rival in rivals.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, rival in rivals.items():
            wall, cpu = time.perf_counter(), time.process_time()
            rival()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    floor = median(cpu for _, cpu in times[FLOOR])
    for name, measured in times.items():
        wall, cpu = (median(column) / iterations for column in zip(*measured, strict=True))
        figures[name] |= {
            "wall_s_per_iteration": wall,
            "cpu_s_per_iteration": cpu,
            "voxels_per_wall_s": image.size / wall,
            "voxels_per_cpu_s": image.size / cpu,
            "cpu_ratio_to_floor": cpu * iterations / floor,
            "all_wall_and_cpu_s": measured,
        }
    return {
        "question": __doc__.split("\n", 1)[0],
        "shape": shape,
        "psf_shape": psf.shape,
        "lattice": lattice_shape(shape, psf.shape, ((True, True),) * 3),
        "iterations": iterations,
        "repeats": repeats,
        "threads": backend.n_threads(),
        "input_psnr_db": psnr(truth, image),
        "contenders": figures,
    }


def _quality(rival: Contender, truth: np.ndarray) -> dict[str, Any]:
    tracemalloc.start()
    result = rival()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if result is None:
        return {"peak_nbytes": peak}
    shell = np.ones(truth.shape, np.bool_)
    shell[tuple(slice(8, -8) for _ in truth.shape)] = False
    data_range = float(np.ptp(truth))
    return {
        "peak_nbytes": peak,
        "psnr_db": psnr(truth, result),
        "psnr_shell_db": psnr(truth[shell], result[shell], data_range=data_range),
    }


def main() -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 256, 256))
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = measure(tuple(arguments.shape), arguments.iterations, arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1) + "\n")
    print(f"{'':34}  wall s/it   CPU s/it  x floor   peak MB   PSNR dB")
    for name, one in result["contenders"].items():
        print(
            f"{name:34} {one['wall_s_per_iteration']:10.4f} {one['cpu_s_per_iteration']:10.4f}"
            f" {one['cpu_ratio_to_floor']:8.2f} {one['peak_nbytes'] / 1e6:9.0f} {one.get('psnr_db', np.nan):9.2f}"
        )


if __name__ == "__main__":
    main()

"""What does it cost to label the connected components of a volume chunk by chunk instead of in one piece?

A smoothed random mask (Gaussian noise above a threshold, about 10^5 components), the same chunks and two threads of
dask for all, each in a process of its own that drops what it computes:

- ``scipy whole``: `scipy.ndimage.label` of the whole volume in memory, the floor of what is exact;
- ``scipy chunks``: the same routine on every chunk, components left cut: what any stitcher has to pay first;
- ``chunkrestore``: that, and `chunkrestore.merge_labels`;
- ``dask-image``: `dask_image.ndmeasure.label`. (Its 2026.5 offers no function that merges labels of one's own.)

Prediction before the first measurement of ours: per chunk, labels are looked through once for runs and written once
from runs, a few nanoseconds per voxel each beside 20 of labelling; links touch 5 % of the voxels. So 1.5 times
``scipy chunks``. dask-image had taken 41 CPU seconds on 384^3 voxels in chunks of 128^3, against 1.2 for
``scipy chunks``: about 20 times ours there, less with larger chunks, whose faces are fewer. Memory: runs of 3 to 5
voxels at 8 bytes each, about half of the int32 labels at most; dask-image keeps the labels themselves.

Reported: CPU and wall seconds, nanoseconds per voxel, peak memory of the process above what imports take, components,
ratios. Wall seconds say little on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from scipy import ndimage

import chunkrestore as cr

RESULTS = Path(__file__).parent / "results" / "merge_labels.json"
CONTENDERS = ("scipy whole", "scipy chunks", "chunkrestore", "dask-image")


class Sink:
    """Takes chunks of a result and keeps only the largest label of each."""

    def __init__(self) -> None:
        self.largest: list[int] = []

    def __setitem__(self, _: Any, chunk: np.ndarray) -> None:
        self.largest.append(int(chunk.max()))


def write_mask(folder: Path, shape: tuple[int, ...], sigma: float, threshold: float, seed: int) -> float:
    """Write a mask as one file per 64 planes; return the share of foreground."""
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, sigma, mode="wrap")
    mask = noise > threshold * noise.std()
    for z in range(0, shape[0], 64):
        np.save(folder / f"{z}.npy", mask[z : z + 64])
    return float(mask.mean())


def read(folder: Path, region: Any) -> np.ndarray:
    """Return a region of the mask in memory of its own."""
    z, *rest = region
    planes = [
        np.load(folder / f"{start}.npy", mmap_mode="r")[
            (slice(max(z.start - start, 0), min(z.stop - start, 64)), *rest)
        ]
        for start in range(z.start // 64 * 64, z.stop, 64)
    ]
    return np.concatenate(planes)


def chunked(folder: Path, shape: tuple[int, ...], chunk: int) -> da.Array:
    """Return the mask as a dask array whose chunks are read when they are needed."""
    chunks = da.core.normalize_chunks(chunk, shape)

    def load(block_info: Any = None) -> np.ndarray:
        return read(folder, [slice(*span) for span in block_info[None]["array-location"]])

    return da.map_blocks(load, chunks=chunks, dtype=bool, meta=np.empty((0,) * len(shape), bool))


def label(chunk: np.ndarray) -> np.ndarray:
    """Label a chunk."""
    labels: np.ndarray = ndimage.label(chunk)[0]
    return labels


def run(name: str, folder: Path, shape: tuple[int, ...], chunk: int) -> dict[str, float]:
    """Run one contender in this process."""
    contender = _contender(name, folder, shape, chunk)
    before = _memory_nbytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    components = contender()
    return {
        "components": components,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_nbytes": _memory_nbytes("VmHWM") - before,
    }


def _contender(name: str, folder: Path, shape: tuple[int, ...], chunk: int) -> Callable[[], int]:
    def stored(labels: da.Array) -> int:
        sink = Sink()
        with dask.config.set(scheduler="threads", num_workers=2):
            da.store(labels, sink, lock=False)
        return max(sink.largest)

    if name == "scipy whole":
        return lambda: int(label(read(folder, [slice(0, n) for n in shape])).max())
    mask = chunked(folder, shape, chunk)
    if name == "dask-image":
        from dask_image.ndmeasure import label as dask_image_label

        # Its second result is the number of components, a lazy array of no dimensions.
        return lambda: stored(dask_image_label(mask)[0])
    each = mask.map_blocks(label, dtype=np.int32, meta=np.empty((0,) * len(shape), np.int32))
    stored(each[:32, :32, :32])
    if name == "scipy chunks":
        return lambda: stored(each)
    stored(cr.merge_labels(each[:32, :32, :32]))
    return lambda: stored(cr.merge_labels(each))


def _memory_nbytes(name: str) -> int:
    """Return a memory figure of this process; unlike that of getrusage, not the parent's where that was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(shape: tuple[int, ...], chunk: int, folder: Path, contenders: tuple[str, ...]) -> dict[str, Any]:
    """Run the contenders in processes of their own; check that ours is the whole volume's labelling."""
    results: dict[str, Any] = {}
    for name in contenders:
        call = [sys.executable, __file__, "--folder", str(folder), "--run", name, "--chunk", str(chunk)]
        done = subprocess.run(
            [*call, "--shape", *map(str, shape)], capture_output=True, text=True, check=True, env=os.environ
        )
        results[name] = json.loads(done.stdout.splitlines()[-1])
        results[name]["ns_per_voxel"] = results[name]["cpu_s"] / math.prod(shape) * 1e9
        _show(name, chunk, results[name])
    ours = results["chunkrestore"]
    return {
        "chunk": chunk,
        "contenders": results,
        "identical_to_scipy": _identical(folder, shape, chunk),
        "cpu_ratio_of_dask_image": results["dask-image"]["cpu_s"] / ours["cpu_s"],
        "wall_ratio_of_dask_image": results["dask-image"]["wall_s"] / ours["wall_s"],
        "cpu_ratio_to_scipy_chunks": ours["cpu_s"] / results["scipy chunks"]["cpu_s"],
        "cpu_ratio_to_scipy_whole": ours["cpu_s"] / results["scipy whole"]["cpu_s"],
        "peak_share_of_labels": ours["peak_nbytes"] / (4 * math.prod(shape)),
    }


def _identical(folder: Path, shape: tuple[int, ...], chunk: int) -> bool:
    expected = label(read(folder, [slice(0, n) for n in shape]))
    mask = chunked(folder, shape, chunk)
    merged = cr.merge_labels(
        mask.map_blocks(label, dtype=np.int32, meta=np.empty((0,) * len(shape), np.int32))
    )
    with dask.config.set(scheduler="threads", num_workers=2):
        return np.array_equal(merged.compute(), expected)


def _show(name: str, chunk: int, figures: dict[str, float]) -> None:
    print(
        f"{chunk:5d} {name:<14} {figures['cpu_s']:8.1f} CPU s {figures['wall_s']:8.1f} s "
        f"{figures['peak_nbytes'] / 2**20:7.0f} MiB {figures['components']:8d} components",
        flush=True,
    )


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 512))
    parser.add_argument("--chunk", type=int, nargs="+", default=(128, 256))
    parser.add_argument("--sigma", type=float, default=1.7)
    parser.add_argument("--threshold", type=float, default=1.3, help="in standard deviations of the noise")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = tuple(arguments.shape)
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.folder, shape, arguments.chunk[0])))
        return
    from environment import describe

    with tempfile.TemporaryDirectory() as folder:
        share = write_mask(Path(folder), shape, arguments.sigma, arguments.threshold, arguments.seed)
        runs = [measure(shape, chunk, Path(folder), CONTENDERS) for chunk in arguments.chunk]
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "shape": shape,
        "sigma": arguments.sigma,
        "threshold": arguments.threshold,
        "foreground": share,
        "threads": 2,
        "dask_image": version("dask-image"),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()

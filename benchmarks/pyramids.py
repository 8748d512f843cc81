"""What does a pyramid cost, in processor seconds and memory, and does memory stay bounded whatever the volume's size?

Three questions, each case in a process of its own:

- ``kernels``: megabytes of input per processor second of the functions that make one voxel of eight, on one array in
  memory. Labels are balls of radius 9 on nothing, and, as the worst case, noise of four ids.
- ``peers``: a store of 256 x 512 x 512 voxels of 16 bits gets three levels more. *In place*: chunkrestore, against
  one pass per level with ``dask.array.coarsen``. *With a copy of the full resolution*: a job of chunkrestore whose
  blocks write several levels at once, the same job with a pass of its own for every level as it was before, and
  ome-zarr-py and ngff-zarr, whose usual way is this. All read the same store; all write zstd with bitshuffle but
  ngff-zarr, which chooses its codec itself.
- ``large``: a gigavoxel, 1024 x 1024 x 1024, against an eighth of it, in place and with a copy: seconds per
  gigavoxel and the peak of the process's memory should stay where they are.

Voxels are a repeated tile of 128 x 128 x 128 with shot noise: cheap to make, and as hard to compress as a camera's.
Processor seconds are those of the process and all of its threads, without the start of Python and imports.

Prediction before the first measurement: reading 2 GB at 0.5 GB per processor second and writing a seventh of it at 0.15
make 6 s per gigavoxel in place, kernels 0.6 s of it. Fused levels save the reading: a copy with its pyramid should
cost an eighth more than without. Memory: a region of 2^24 voxels of 16 bits is 34 MB, with buffers 0.1 GB above what
Python and its libraries take.

Outcome: 4.2 s per gigavoxel in place, less than predicted since chunks are read faster by now; 164 MB at the peak
for an eighth of a gigavoxel and for a whole one, 42 of them above what was there before. One pass of dask's coarsen
per level takes 3.3 times as long. A copy with its pyramid takes 10 to 13 s per gigavoxel and 422 MB whatever the
size: a block of 512 x 512 x 512. Of 0.78 s for the small store, a pass of its own per level would cost 34 % more;
ome-zarr-py takes 2.4 times and ngff-zarr 5.5 times as long. The mean of eight voxels runs at 3.9 GB/s, 1.7 times
tensorstore's and 15 times NumPy's over windows; the mode at 1.6 GB/s on balls and 0.9 on noise, 1.2 and 2.2 times
tensorstore's. The mean is an eighth of a pyramid in place, so a compiled kernel would hardly show.

Run: ``python benchmarks/pyramids.py`` (``--small`` for a volume that takes seconds).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "pyramids.json"
TILE = 128
N_LEVELS = 4
BOTH = (2, 2, 2)


def tile() -> np.ndarray:
    """Return voxels of one tile: smooth structure with shot noise, in counts."""
    rng = np.random.default_rng(20)
    z, y, x = np.meshgrid(*[np.linspace(0, 2 * np.pi, TILE, endpoint=False)] * 3, indexing="ij")
    mean = 140 + 60 * np.sin(3 * z) * np.sin(2 * y) * np.sin(4 * x)
    return rng.poisson(mean).astype(np.uint16)


def write_source(path: Path, shape: tuple[int, ...]) -> None:
    """Write an image of one level, tile by tile."""
    from chunkrestore.grid import BlockGrid
    from chunkrestore.ome_zarr import create_image

    writer = create_image(path, shape=shape, dtype="uint16", axes="zyx", voxel_size=(1, 1, 1), levels=1)
    unit = writer.target().spatial_write_unit
    block = tuple(-(-max(TILE, u) // TILE) * TILE for u in unit)
    whole = np.tile(tile(), [n // TILE for n in block])
    for core in BlockGrid.regular(shape, block):
        writer.target().write(0, 0, core.core, whole[tuple(slice(n) for n in core.core_shape)])
    writer.publish()


def in_place(source: Path, _: Path) -> None:
    """Add levels with chunkrestore."""
    from chunkrestore.jobs.pyramids import build_pyramid

    build_pyramid(source, levels=N_LEVELS, overwrite=True, cluster="serial", quiet=True)


def coarsen(source: Path, output: Path) -> None:
    """Add levels with one pass of ``dask.array.coarsen`` each."""
    import dask.array as da
    import zarr

    level = zarr.open_array(source / "0", mode="r")
    options = {"compressors": level.compressors, "chunks": (64, 64, 64), "dtype": level.dtype}
    for k in range(1, N_LEVELS):
        below = da.from_array(level, chunks=(128, 128, 128))
        reduced = (
            da.coarsen(np.mean, below, dict(enumerate(BOTH)), trim_excess=True).round().astype(level.dtype)
        )
        level = zarr.create_array(output / str(k), shape=reduced.shape, **options)
        da.store(reduced, level, lock=False, compute=True)


def copy(source: Path, output: Path) -> None:
    """Copy with chunkrestore; blocks write several levels."""
    import chunkrestore as cr

    cr.run([], source, output, cluster="serial", quiet=True)


def copy_level_by_level(source: Path, output: Path) -> None:
    """Copy with chunkrestore, with a pass of its own for every level."""
    import chunkrestore as cr
    from chunkrestore.jobs import stages
    from chunkrestore.ome_zarr import levels

    stages.fused_with = lambda writer, grid: 0  # type: ignore[assignment]
    levels.STEP_VOXELS = 0
    cr.run([], source, output, cluster="serial", quiet=True)


def by_ome_zarr(source: Path, output: Path) -> None:
    """Copy with ome-zarr-py."""
    import dask.array as da
    import zarr
    from ome_zarr.writer import write_image

    level = zarr.open_array(source / "0", mode="r")
    data = da.from_array(level, chunks=(128, 128, 128))
    storage = {"chunks": (64, 64, 64), "compressors": level.compressors}
    factors = [{"z": 2**k, "y": 2**k, "x": 2**k} for k in range(1, N_LEVELS)]
    options = {"scale_factors": factors, "method": "local_mean", "storage_options": storage}
    write_image(data, str(output), axes="zyx", **options)


def by_ngff_zarr(source: Path, output: Path) -> None:
    """Copy with ngff-zarr, reduced with its Gaussian for dask."""
    import dask.array as da
    import ngff_zarr
    import zarr

    data = da.from_array(zarr.open_array(source / "0", mode="r"), chunks=(128, 128, 128))
    image = ngff_zarr.to_ngff_image(data, dims=["z", "y", "x"])
    method = ngff_zarr.Methods.DASK_IMAGE_GAUSSIAN
    several = ngff_zarr.to_multiscales(image, scale_factors=[2, 4, 8], method=method, chunks=64)
    ngff_zarr.to_ngff_zarr(str(output), several, version="0.5")


CASES: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f for f in (coarsen, copy, copy_level_by_level, by_ome_zarr, by_ngff_zarr, in_place)
}


def seconds_of(work: Callable[[], Any]) -> float:
    """Return processor seconds of all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def resident_mb(key: str) -> int:
    """Return what the kernel says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1000


def measure_case(name: str, source: Path, output: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Warm up on a tile, then measure one case in this process."""
    warm = output.parent / "warm"
    write_source(warm / "in.zarr", (TILE,) * 3)
    CASES[name](warm / "in.zarr", warm / "out.zarr")
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    started = time.perf_counter()
    seconds = seconds_of(lambda: CASES[name](source, output))
    return {
        "case": name,
        "shape": list(shape),
        "processor_seconds": round(seconds, 3),
        "processor_seconds_per_gigavoxel": round(seconds / np.prod(shape) * 1e9, 2),
        "wall_seconds": round(time.perf_counter() - started, 2),
        "peak_rss_mb": resident_mb("VmHWM"),
        "rss_mb_before": before,
    }


def apart(name: str, source: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        arguments = [name, str(source), str(Path(scratch) / "out.zarr"), *map(str, shape)]
        done = subprocess.run(
            [sys.executable, __file__, "--case", *arguments], capture_output=True, text=True, check=False
        )
    if done.returncode:
        return {"case": name, "error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def balls(shape: tuple[int, ...], n: int, radius: int) -> np.ndarray:
    """Return labels of balls at random places."""
    rng = np.random.default_rng(21)
    labels = np.zeros(shape, np.int32)
    grid = np.mgrid[(slice(-radius, radius + 1),) * 3]
    ball = (grid**2).sum(0) <= radius**2
    for label in range(1, n + 1):
        corner = [int(rng.integers(0, s - 2 * radius)) for s in shape]
        labels[tuple(slice(a, a + 2 * radius + 1) for a in corner)][ball] = label
    return labels


def kernels(length: int) -> dict[str, Any]:
    """Return megabytes of input per processor second, the best of five."""
    import dask.array as da
    from skimage.transform import downscale_local_mean

    from chunkrestore.ome_zarr.downsampling import downsample

    image = np.tile(tile(), [length // TILE] * 3)
    labels = {"balls": balls((length,) * 3, length**3 // 12000, 9)}
    labels["noise"] = np.random.default_rng(22).integers(0, 4, (length,) * 3).astype(np.int32)

    def rate(array: np.ndarray, work: Callable[[np.ndarray], Any]) -> int:
        return round(array.nbytes / 1e6 / min(seconds_of(lambda: work(array)) for _ in range(5)))

    def reshaped(a: np.ndarray) -> np.ndarray:
        n = length // 2
        return a.reshape(n, 2, n, 2, n, 2).mean((1, 3, 5)).round().astype(a.dtype)

    def coarsened(a: np.ndarray) -> Any:
        return da.coarsen(np.mean, da.from_array(a), {0: 2, 1: 2, 2: 2}).compute(scheduler="synchronous")

    found: dict[str, Any] = {
        f"mean, {kind}": rate(image.astype(kind), lambda a: downsample(a, BOTH, "mean"))
        for kind in ("uint8", "uint16", "float32")
    }
    for name, array in labels.items():
        for method in ("nearest", "mode"):
            found[f"{method}, {name}"] = rate(array, lambda a, m=method: downsample(a, BOTH, m))
    found["numpy reshape and mean, uint16"] = rate(image, reshaped)
    found["dask coarsen, uint16"] = rate(image, coarsened)
    found["scikit-image downscale_local_mean, uint16"] = rate(image, lambda a: downscale_local_mean(a, BOTH))
    try:
        import tensorstore as ts
    except ImportError:
        return found

    def by_tensorstore(a: np.ndarray, method: str) -> Any:
        return ts.downsample(ts.array(a), BOTH, method=method).read().result()

    found["tensorstore mean, uint16"] = rate(image, lambda a: by_tensorstore(a, "mean"))
    for name, array in labels.items():
        found[f"tensorstore mode, {name}"] = rate(array, lambda a: by_tensorstore(a, "mode"))
    return found


def favouring_objects(labels: np.ndarray, least: int) -> np.ndarray:
    """Return the most frequent object of eight voxels where at least so many are not background."""
    corners = [labels[z::2, y::2, x::2] for z in (0, 1) for y in (0, 1) for x in (0, 1)]
    counts = [sum((other == c).astype(np.int8) for other in corners) * (c != 0) for c in corners]
    first = np.argmax(counts, axis=0)[None]
    result: np.ndarray = np.take_along_axis(np.stack(corners), first, 0)[0]
    return np.where(sum((c != 0).astype(np.int8) for c in corners) >= least, result, 0)


def survivors(length: int = 256) -> dict[str, Any]:
    """Return how many of 400 balls of radius 9 are left at levels 0 to 4, and how much of their volume at the last.

    By the two methods there are, and by two more that might be: background only where it has the majority, or
    where there is nothing else.
    """
    from chunkrestore.ome_zarr.downsampling import downsample

    start = balls((length,) * 3, 400, 9)
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "nearest": lambda a: downsample(a, BOTH, "nearest"),
        "mode": lambda a: downsample(a, BOTH, "mode"),
        "background by majority": lambda a: favouring_objects(a, 4),
        "any object": lambda a: favouring_objects(a, 1),
    }
    found = {}
    for name, rule in rules.items():
        labels, counts = start, [len(np.unique(start)) - 1]
        for _ in range(4):
            labels = rule(labels)
            counts.append(len(np.unique(labels)) - 1)
        volume = (labels > 0).mean() / (start > 0).mean()
        found[name] = {"n_objects": counts, "volume": round(float(volume), 2)}
    return found


def main() -> None:
    """Measure what was asked for, and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="volumes that take seconds; nothing is kept")
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="for the stores; a temporary one by default")
    arguments = parser.parse_args()
    if arguments.case:
        name, source, output, *shape = arguments.case
        print(json.dumps(measure_case(name, Path(source), Path(output), tuple(map(int, shape)))))
        return
    from environment import describe

    peers, sizes = ((128, 128, 128), (128, 256)) if arguments.small else ((256, 512, 512), (512, 1024))
    found: dict[str, Any] = {"environment": describe(), "kernels": kernels(128 if arguments.small else 256)}
    found["objects_left"] = survivors()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_source(folder / "peers.zarr", peers)
        found["peers"] = [apart(name, folder / "peers.zarr", peers) for name in CASES]
        found["large"] = []
        for n in sizes:
            source = folder / f"{n}.zarr"
            write_source(source, (n,) * 3)
            found["large"] += [apart(name, source, (n,) * 3) for name in ("copy", "in_place")]
    print(json.dumps(found, indent=1))
    if not arguments.small:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How fast are blocks read and written, next to what the best library reaches on the same bytes?

*Libraries*: a light-sheet-like volume is written in whole chunks or shards, read in aligned blocks, and read in blocks
with a halo: by zarr-python, by zarr-python over its Rust codec pipeline (zarrs), by tensorstore, and by our
`RegionReader` and `RegionWriter`. Arrays have the same layout and codec; contenders take turns in one process.

*Job*: a job without operators, which copies an image, with workers and in one process; next to plain loops over the
same blocks in as many processes that do nothing but read, average levels of the pyramid (by our kernel, in all loops)
and write. Processes are started, and everything is imported, before the clock is.

Reported are megabytes of voxels per second: per processor second, and per second of wall time. Of every block the best
of several turns counts: other work on the machine only ever slows down. All contenders run with the allocator's
settings that the workers of a job have (`chunkrestore.cluster.environment`). zarrs is a reference for speed alone: a
writer that is killed leaves torn files behind (zarrs-python #185).

What was expected of each step and what came of it is in `NOTES`, which goes into the results. Both were written down
afterwards: take the first for reasons, not for a log that was kept beforehand.

Run ``python benchmarks/store_throughput.py``; with ``TMPDIR`` in memory, disks play no part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe
from store_libraries import OPENERS, OURS, Layout, Opened, available, create

from chunkrestore.cluster.environment import worker_environment
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.ome_zarr.amplification import decoded_voxels

RESULTS = Path(__file__).parent / "results" / "store_throughput.json"

SHAPE = (256, 512, 512)
JOB_SHAPE = (512, 1024, 1024)
BLOCK = 256
DEPTH = 16
LAYOUTS = tuple(itertools.product(("lz4", "zstd"), ((64, None), (64, 256), (128, None), (128, 256))))
TASKS_PER_WORKER = 2

NOTES = (
    {
        "step": "chunks by hand, in threads, instead of zarr's event loop (local files, common codecs)",
        "expected": "reading 1.5 times as fast as zarr-python per processor second, since decoding into a buffer that "
        "stays in the cache takes 0.35 ms/MB where zarr needs 1.5 in all; writing 1.7 times; level with tensorstore",
        "found": "reading 0.9 to 1.7 times, with a halo 1 to 2 times, writing 1.4 to 2.6 times as fast as zarr-python; "
        "0.8 to 1.6 times as fast as tensorstore, and each of them the best somewhere",
    },
    {
        "step": "buffers made once per thread and read or write, not once per chunk",
        "expected": "decoding 1.5 times as fast, since pages of new memory are cleared first",
        "found": "2.3 times outside of workers (2.8 against 1.2 GB/s of lz4), 1.1 times with a worker's allocator",
    },
    {
        "step": "two threads per process where it has one core, instead of four",
        "expected": "3 % less processor time",
        "found": "1 to 5 % less; one thread would save 1 to 4 % more but wait for network file systems",
    },
    {
        "step": "files written by system calls instead of Python's file objects, paths joined as strings",
        "expected": "10 microseconds less per chunk, 2 % of one of 64 cubed",
        "found": "11 microseconds less when writing, 6 when reading",
    },
    {
        "step": "CRC-32 of what a task wrote by ISA-L where it is installed, instead of zlib's",
        "expected": "0.2 ms/MB less, a fifteenth of a copy job",
        "found": "30 GB/s instead of 4.2; 0.24 ms/MB less",
    },
    {
        "step": "no profiler in Dask's workers",
        "expected": "a few per cent of a copy job",
        "found": "not done: half of what an idle worker takes, which is nothing that shows in a job",
    },
    {
        "step": "a cache of decoded chunks shared by neighbouring blocks",
        "expected": "halo reads at most 2 times as fast, for 76 MB per process (blocks 256 cubed, chunks 64)",
        "found": "not built: neighbouring blocks mostly run in other processes, and without it halo reads are 0.8 to "
        "1.4 times as fast as the best library's",
    },
)


def light_sheet(shape: Sequence[int]) -> np.ndarray:
    """Return smooth bright structures on a background, with photon noise, as uint16."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(3)
    coarse = gaussian_filter(rng.standard_normal([n // 4 for n in shape]), 2)
    smooth = np.kron(np.clip(coarse / coarse.std(), 0, None) ** 2, np.ones((4, 4, 4)))
    return rng.poisson(120 + 100 * smooth).astype(np.uint16)


def timed(work: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Return processor seconds of this process, and wall seconds."""
    before = time.process_time(), time.perf_counter()
    work(*arguments)
    return np.array([time.process_time() - before[0], time.perf_counter() - before[1]])


def write(array: Opened, block: Block, volume: np.ndarray) -> None:
    """Write the core of a block."""
    array.write(block.core, volume[block.core])


def read(array: Opened, block: Block, volume: np.ndarray) -> None:
    """Read a block and its halo."""
    array.read(block.read)


def compare(
    folder: Path, volume: np.ndarray, layout: Layout, n_turns: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return best processor and wall seconds per operation and contender, on one layout."""
    arrays = {}
    for name in available(folder):
        create(folder / name, layout)
        arrays[name] = OPENERS[name](folder / name, True)
    plain = BlockGrid.regular(volume.shape, (BLOCK,) * 3)
    wide = BlockGrid.regular(volume.shape, (BLOCK,) * 3, Halo((DEPTH,) * 3))
    found = {}
    for operation, work, grid in (
        ("write", write, plain),
        ("read", read, plain),
        ("read with halo", read, wide),
    ):
        seconds = {name: np.full((len(grid), 2), np.inf) for name in arrays}
        for _, (name, array), (k, block) in itertools.product(
            range(n_turns), arrays.items(), enumerate(grid)
        ):
            seconds[name][k] = np.minimum(seconds[name][k], timed(work, array, block, volume))
        found[operation] = {name: best.sum(0) for name, best in seconds.items()}
    for name, array in arrays.items():
        assert all(np.array_equal(array.read(b.read), volume[b.read]) for b in wide), name
        shutil.rmtree(folder / name)
    return found


def libraries(folder: Path, n_turns: int) -> Iterator[dict[str, Any]]:
    """Yield a row per layout and operation."""
    volume = light_sheet(SHAPE)
    grid = BlockGrid.regular(SHAPE, (BLOCK,) * 3, Halo((DEPTH,) * 3))
    for codec, (chunk, shard) in LAYOUTS:
        layout = Layout(codec, chunk, shard, SHAPE)
        decoded = decoded_voxels(grid.edges, [grid.halo], (chunk,) * 3, (0,) * 3) / volume.size
        for operation, seconds in compare(folder, volume, layout, n_turns).items():
            row = {"layout": str(layout), "operation": operation} | rates(seconds, volume.nbytes)
            row["decoded_per_core_voxel"] = round(decoded, 3) if "halo" in operation else 1.0
            show(f"{layout!s:28} {operation:15}", row)
            yield row


def rates(seconds: dict[str, np.ndarray], nbytes: int) -> dict[str, Any]:
    """Return megabytes per processor and per wall second, and ours relative to the best of the others."""
    per_second = {name: nbytes / 1e6 / both for name, both in seconds.items()}
    ours = {name: rate for name, rate in per_second.items() if name.startswith(OURS)}
    best = np.max([rate for name, rate in per_second.items() if name not in ours], 0)
    return {
        "MB_per_processor_s": {name: round(float(rate[0]), 1) for name, rate in per_second.items()},
        "MB_per_wall_s": {name: round(float(rate[1]), 1) for name, rate in per_second.items()},
        "ratio_to_best": {name: [round(float(r), 3) for r in rate / best] for name, rate in ours.items()},
    }


def show(what: str, row: dict[str, Any]) -> None:
    """Print a row."""
    figures = "  ".join(f"{name} {rate:.0f}" for name, rate in row["MB_per_processor_s"].items())
    print(f"{what} MB/processor s: {figures}  ratio {row['ratio_to_best']}", flush=True)


def loop(name: str, source: Path, target: Path, part: tuple[int, int], meet: Any, told: Any) -> None:
    """Copy every so many-th block of an image with its pyramid, as a library's user would; tell the seconds.

    A level is made of the core that was just read where the core holds whole files of it.
    """
    from chunkrestore.ome_zarr import open_writer
    from chunkrestore.ome_zarr.downsampling import downsample_mean

    writer = open_writer(target)
    below = OPENERS[name](source / "0", False)
    levels = [OPENERS[name](target / str(k), True) for k in range(writer.n_levels)]
    grid = BlockGrid.regular(writer.target(0).spatial_shape, (BLOCK,) * 3)

    def copy(block: Block) -> None:
        region, data = block.core, below.read(block.core)
        levels[0].write(region, data)
        for k in range(1, len(levels)):
            level = writer.target(k)
            region = tuple(
                slice(s.start // f, -(-s.stop // f)) for s, f in zip(region, writer.factors[k], strict=True)
            )
            lengths = zip(region, level.spatial_write_unit, level.spatial_shape, strict=True)
            if any(s.start % unit or (s.stop % unit and s.stop != n) for s, unit, n in lengths):
                return
            data = downsample_mean(data, writer.factors[k])
            levels[k].write(region, data)

    blocks = list(grid)[part[0] :: part[1]]
    copy(blocks[0])
    with ThreadPoolExecutor(TASKS_PER_WORKER) as pool:
        list(pool.map(int, range(TASKS_PER_WORKER)))
        meet.wait()
        before = time.process_time()
        list(pool.map(copy, blocks))
        told.put(time.process_time() - before)
        meet.wait()


def time_loop(name: str, source: Path, target: Path, n_processes: int) -> np.ndarray:
    """Return processor and wall seconds of a plain loop in some processes."""
    context = multiprocessing.get_context("spawn")
    meet, told = context.Barrier(n_processes + 1), context.Queue()
    processes = [
        context.Process(target=loop, args=(name, source, target, (k, n_processes), meet, told))
        for k in range(n_processes)
    ]
    for process in processes:
        process.start()
    meet.wait(60)
    began = time.perf_counter()
    meet.wait(120)
    wall = time.perf_counter() - began
    seconds = sum(told.get() for _ in processes)
    for process in processes:
        process.join()
    return np.array([seconds, wall])


def time_job(source: Path, output: Path, client: Any, block_shape: Sequence[int] | None) -> np.ndarray:
    """Return processor and wall seconds of a job without operators, of all its processes."""
    import chunkrestore as cr

    def spent() -> float:
        workers = [] if client is None else client.run(time.process_time).values()
        return time.process_time() + sum(workers)

    for folder in (output, Path(f"{output}.chunkrestore")):
        shutil.rmtree(folder, ignore_errors=True)
    before, began = spent(), time.perf_counter()
    cr.run(
        [], source, output, cluster="serial" if client is None else client, block_shape=block_shape,
        compression="lz4", shards=(BLOCK,) * 3, quiet=True,
    )  # fmt: skip
    return np.array([spent() - before, time.perf_counter() - began])


def jobs(folder: Path, n_turns: int) -> Iterator[dict[str, Any]]:
    """Yield a row per number of processes."""
    from chunkrestore.cluster import connect
    from chunkrestore.ome_zarr import create_image, open_image, write_image

    volume = light_sheet(SHAPE)
    volume = np.tile(volume, [n // m for n, m in zip(JOB_SHAPE, SHAPE, strict=True)])
    source, smallest, output, target = (folder / name for name in ("source", "smallest", "output", "target"))
    options: dict[str, Any] = {
        "axes": "zyx",
        "voxel_size": (1, 1, 1),
        "compression": "lz4",
        "shards": (BLOCK,) * 3,
    }
    write_image(volume, source, **options)
    write_image(volume[:64, :64, :64], smallest, **options)
    create_image(target, shape=volume.shape, dtype="uint16", **options)
    for n_processes in (2, 1):
        seconds: dict[str, np.ndarray] = {}
        with connect("local", n_workers=n_processes) if n_processes > 1 else nullcontext() as client:
            time_job(smallest, output, client, None)
            fixed = np.min([time_job(smallest, output, client, None) for _ in range(n_turns)], 0)
            for name, shape in ((f"{OURS}, job", None), (f"{OURS}, job of the loops' blocks", (BLOCK,) * 3)):
                turns = [time_job(source, output, client, shape) for _ in range(n_turns)]
                seconds[name] = np.min(turns, 0)
        copied = open_image(output).source(0)
        for block in BlockGrid.regular(volume.shape, (BLOCK,) * 3):
            assert np.array_equal(copied.read(0, 0, block.core), volume[block.core])
        for name in available(folder):
            own = f"{OURS}, loop" if name == OURS else name
            seconds[own] = np.min([time_loop(name, source, target, n_processes) for _ in range(n_turns)], 0)
        row = {"processes": n_processes, "megabytes": volume.nbytes / 1e6} | rates(seconds, volume.nbytes)
        row["smallest_job_s"] = [round(float(s), 3) for s in fixed]
        show(f"copy, processes: {n_processes}", row)
        print(f"  smallest job: {row['smallest_job_s']} s", flush=True)
        yield row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4, help="turns of every contender")
    parser.add_argument("--only", choices=("libraries", "jobs"), help="leave the other part out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    wanted = {k: v for k, v in worker_environment(1).items() if k.startswith("MALLOC_")}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    result: dict[str, Any] = describe() | {"shape": SHAPE, "block": BLOCK, "depth": DEPTH, "notes": NOTES}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "jobs":
            result["libraries"] = list(libraries(Path(folder), options.turns))
        if options.only != "libraries":
            result["jobs"] = list(jobs(Path(folder), max(2, options.turns // 2)))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()

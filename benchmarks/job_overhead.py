"""How much time does a job add to its kernels?

The same Richardson-Lucy blocks (same halos, same shapes) are computed three times in one run, interleaved:
in a bare loop on an array in memory (the floor), by a job in this process, and by a job on a local cluster
of one worker. A job reads, decodes, computes statistics, writes, compresses, builds a pyramid, keeps a
ledger and probes seams, all of which the floor does not.

Prediction before the first measurement: 64^3 cores with 20 iterations cost about one second of FFTs each;
reading and writing 1 MB around it costs tens of milliseconds, so at most 1.15 times the floor in process,
and 1.2 times on one worker, where the scheduler adds milliseconds per task.

Reported: wall and CPU seconds, ratio to the floor, halo overhead, voxels per second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import chunkrestore as cr
from chunkrestore.cluster import connect
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.tasks import apply_chain, chain
from chunkrestore.psf import gaussian
from chunkrestore.statistics import of_array

RESULTS = Path(__file__).parent / "results" / "job_overhead.json"


def measure(shape: tuple[int, int, int], block: int, iterations: int, repeats: int) -> dict[str, Any]:
    """Time the three contenders on one volume."""
    rng = np.random.default_rng(11)
    image = rng.poisson(100, shape).astype(np.uint16)
    operator = cr.RichardsonLucy(gaussian((2.0, 1.2, 1.2)), iterations=iterations)
    grid = BlockGrid.regular(shape, (block,) * 3, operator.halo(shape))
    with tempfile.TemporaryDirectory() as folder, connect("local", n_workers=1) as client:
        source = Path(folder) / "in.ome.zarr"
        cr.write_image(image, source, axes="zyx", voxel_size=(1, 1, 1))
        ready = operator.resolve(of_array(image, operator.needs))

        def kernels() -> None:
            for one in grid:
                blocks = chain([ready], one.core, shape)
                apply_chain([ready], blocks, image[blocks[0].read])

        def job(cluster: Any) -> None:
            cr.run(
                operator, source, Path(folder) / "out.ome.zarr", cluster=cluster, block_shape=(block,) * 3,
                overwrite=True, quiet=True,
            )  # fmt: skip

        contenders = {
            "kernels alone": kernels,
            "job, in process": lambda: job("serial"),
            "job, one worker": lambda: job(client),
        }
        for contender in contenders.values():
            contender()
        seconds = {name: [] for name in contenders}  # type: dict[str, list[float]]
        for _ in range(repeats):
            for name, contender in contenders.items():
                seconds[name].append(_wall(contender))
    floor = median(seconds["kernels alone"])
    return {
        "shape": shape,
        "block": block,
        "iterations": iterations,
        "halo_overhead": grid.halo_overhead,
        "contenders": {
            name: {
                "wall_s": median(times),
                "all_wall_s": times,
                "ratio_to_kernels": median(
                    t / k for t, k in zip(times, seconds["kernels alone"], strict=True)
                ),
                "voxels_per_s": np.prod(shape) / median(times),
            }
            for name, times in seconds.items()
        },
        "floor_s": floor,
    }


def _wall(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 128, 128))
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = measure(tuple(arguments.shape), arguments.block, arguments.iterations, arguments.repeats)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1, default=float) + "\n")
    for name, figures in result["contenders"].items():
        print(f"{name:<18} {figures['wall_s']:7.2f} s   {figures['ratio_to_kernels']:.2f}")


if __name__ == "__main__":
    main()

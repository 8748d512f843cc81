"""Do long jobs run through, in how much memory, and what does the driver cost per block?

Three experiments on a local cluster, none of which computes much:

- ``soak``: a real job (store to store, pyramid, ledger, events) of 10,000 blocks over a cheap operator.
  One block in a hundred fails with an I/O error when it is first tried, and five kill their worker. Finished?
  Correct, voxel by voxel? What do blocks cost beyond what workers spend on them, and does the driver grow?
- ``dry_run``: a 10 TB volume (17,200^3 voxels of uint16) is planned and its blocks are scheduled through runner,
  ledger and events with the arguments of a real deconvolution, but a kernel that returns at once. Milliseconds per
  block on 1 and 2 workers, memory of the driver after 10k, 30k, ... blocks, and the seconds of computing per block
  that keep dispatch under 2 %; that block is then run to see whether it does.
- ``resume``: how long 30,000 journalled blocks take to be read, and how long it is from a SIGKILL of the driver until
  ``chunkrestore resume`` has the next block computed.

Prediction before the first measurement. Dask was measured to take 4 to 5 ms per trivial task on this machine, 10 in a
window of few tasks; journal and events add two lines of JSON and two system calls: 10 ms per block, 15 minutes for
the 91,125 blocks of 10 TB. A driver's memory grows by its record of finished blocks, a tuple of five integers and a
dictionary of two: 500 bytes per block, 50 MB for 10 TB, on a base of 200 MB (Dask, zarr, NumPy): well under 1 GB. Each
of n workers must compute for n * 10 ms / 2 % = n * 0.5 s per block: half a million voxels of 10 Richardson-Lucy
iterations. 30,000 lines of JSON are read in 0.2 s. From the kill to the next block: 1.5 s of imports, 2 s for the
cluster, 2 s for imports in its workers, some for reading and planning: 6 s.

Of the 91,125 blocks 30,000 are scheduled by default; memory is extrapolated by its growth from 3,000 on.

Run: ``python benchmarks/soak.py``; ``--n-dry 91125`` for all of 10 TB.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from sampling import every
from scipy.ndimage import maximum_filter

import chunkrestore as cr
from chunkrestore.cluster import connect
from chunkrestore.grid import BlockGrid, Halo
from chunkrestore.jobs.conductor import Conductor
from chunkrestore.jobs.events import Events, read_events
from chunkrestore.jobs.ledger import Item, Ledger
from chunkrestore.jobs.lock import Lock
from chunkrestore.jobs.phases import computing
from chunkrestore.jobs.plan import Plan, make_plan
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.runner import Runner
from chunkrestore.jobs.stages import Items
from chunkrestore.ome_zarr import create_image, open_image
from chunkrestore.psf import gaussian

RESULTS = Path(__file__).parent / "results" / "soak.json"
TEN_TB = (17_200,) * 3
SHARE = 0.02
"""Of the time, that dispatch may take."""
_EVERY = 100
_KILLS = (1_000, 3_000, 5_000, 7_000, 9_000)
"""Blocks, by number, that kill their worker when they are first tried."""
_SAMPLE_SECONDS = 0.5
_WARM = 3_000
"""Blocks after which the driver's memory grows by what it must remember alone."""
_CHECKPOINTS = (1, 1_000, 3_000, 5_000, 10_000, 30_000, 60_000, 90_000)
"""Blocks after which the driver's memory is looked at."""


@dataclass(frozen=True)
class Brightest:
    """The brightest of 27 voxels, tiled without any error, on a bad day."""

    folder: str
    """Where is noted which blocks have failed once."""
    n_blocks: tuple[int, int, int]
    """Blocks per axis."""

    name = "brightest"
    needs: frozenset[float | str] = frozenset()

    def resolve(self, statistics: Any) -> Brightest:
        """Return this operator: it needs nothing."""
        return self

    def check(self, shape: Any, dtype: Any) -> None:
        """Take everything."""

    def halo(self, shape: Any) -> Halo:
        """Return one voxel."""
        return Halo((1, 1, 1))

    def memory_nbytes(self, read_shape: Any) -> int:
        """Return the size of input and result."""
        return 8 * int(np.prod(read_shape))

    def describe(self) -> dict[str, Any]:
        """Return the name."""
        return {"operator": self.name}

    def __call__(self, image: Any, block: Any = None) -> Any:
        """Return the result, unless it is this block's turn to fail."""
        number = int(np.ravel_multi_index(block.index, self.n_blocks))
        kills = number in _KILLS
        if (kills or fails(number)) and self._first_try(number):
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO, "injected")
        return maximum_filter(image, 3, mode="nearest").astype(np.float32)

    def _first_try(self, number: int) -> bool:
        try:
            (Path(self.folder) / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def fails(number: int) -> bool:
    """Whether a block fails when it is first tried: one in a hundred does."""
    return zlib.crc32(str(number).encode()) % _EVERY == 0


class Memory:
    """The resident memory of this process, as it was now and then."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._process = psutil.Process()

    def megabytes(self) -> float:
        """Return what it is now."""
        return self._process.memory_info().rss / 1e6

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Take samples inside."""
        self.samples.append(self.megabytes())
        with every(_SAMPLE_SECONDS, lambda: self.samples.append(self.megabytes())):
            yield

    def describe(self) -> dict[str, float]:
        """Return first third, last third and peak."""
        third = max(len(self.samples) // 3, 1)
        first, last = (float(np.mean(part)) for part in (self.samples[:third], self.samples[-third:]))
        return {"first_third_mb": first, "last_third_mb": last, "peak_mb": max(self.samples)}


def soak(folder: Path, n_workers: int, n_blocks: tuple[int, int, int]) -> dict[str, Any]:
    """Run a real job on which failures are inflicted."""
    block = (8, 16, 16)
    shape = tuple(n * b for n, b in zip(n_blocks, block, strict=True))
    voxels = np.random.default_rng(2).integers(0, 60_000, shape, np.uint16)
    source, target = folder / "in.ome.zarr", folder / "out.ome.zarr"
    cr.write_image(voxels, source, axes="zyx", voxel_size=(1, 1, 1), chunks=(64, 64, 64))
    (folder / "failed").mkdir()
    operator = Brightest(str(folder / "failed"), n_blocks)
    memory = Memory()
    started = time.perf_counter()
    with connect("local", n_workers=n_workers) as client, memory.sampled():
        begun = time.perf_counter()
        report = cr.run(operator, source, target, cluster=client, block_shape=block, quiet=True)
        ended = time.perf_counter()
    events = list(read_events(folder / "out.ome.zarr.chunkrestore" / "image" / "events.jsonl"))
    blocks = [e for e in events if e["event"] == "block" and e["stage"] == "blocks-0"]
    retries = [e["cause"] for e in events if e["event"] == "retry"]
    wall = report.seconds["blocks"]
    in_tasks = sum(e["total"] for e in blocks)
    correct = np.array_equal(
        open_image(target).source(0)[:], maximum_filter(voxels, 3, mode="nearest").astype(np.float32)
    )
    return {
        "n_workers": n_workers,
        "n_blocks": len(blocks),
        "injected": {
            "io_errors": sum(map(fails, range(len(blocks)))),
            "kills": sum(n < len(blocks) for n in _KILLS),
        },
        "retries": {cause: retries.count(cause) for cause in sorted(set(retries))},
        "finished": len({tuple(e["item"]) for e in blocks}) == math.prod(n_blocks),
        "correct": correct,
        "cluster_start_s": begun - started,
        "job_s": ended - begun,
        "wall_ms_per_block": 1e3 * wall / len(blocks),
        "in_tasks_ms_per_block": 1e3 * in_tasks / len(blocks),
        "phases_ms_per_block": {
            phase: 1e3 * sum(e["seconds"].get(phase, 0.0) for e in blocks) / len(blocks)
            for phase in ("read", "compute", "write")
        },
        "driver": memory.describe(),
    }


def nothing(item: Any, *arguments: Any) -> dict[str, int]:
    """Do no work, as a task that processes a block would."""
    return {"crc32": 0, "n_parts": 1}


def busy(item: Any, seconds: float, *arguments: Any) -> dict[str, int]:
    """Compute for so long, as a task that processes a block would."""
    with computing():
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
    return {"crc32": 0, "n_parts": 1}


class Some(Collection[Item]):
    """The first few of many items."""

    def __init__(self, items: Items, n: int) -> None:
        self._items, self._n = items, min(n, len(items))

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Item]:
        return islice(self._items, self._n)

    def __contains__(self, item: object) -> bool:
        return item in self._items


class WatchedLedger(Ledger):
    """A ledger that looks at the driver's memory after some of the blocks."""

    n_recorded = 0

    def record(self, stage: str, item: Item, payload: Any) -> None:
        """Note that a block is finished."""
        super().record(stage, item, payload)
        self.n_recorded += 1
        if self.n_recorded in _CHECKPOINTS:
            seen = psutil.Process().memory_info().rss / 1e6
            self.seen.append({"n_blocks": self.n_recorded, "driver_mb": seen})

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[dict[str, float]] = []


class DryRun:
    """A plan of ten terabytes, and stores that hold their metadata alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        started = time.perf_counter()
        operator = cr.RichardsonLucy(gaussian((4.0, 2.0, 2.0)), iterations=10)
        self.plan: Plan = make_plan([operator], TEN_TB, np.dtype(np.uint16))
        self.plan_s = time.perf_counter() - started
        common: dict[str, Any] = {"shape": TEN_TB, "axes": "zyx", "voxel_size": (1, 1, 1)}
        create_image(folder / "in.ome.zarr", dtype="uint16", **common).publish()
        writer = create_image(folder / "out.ome.zarr", dtype="float32", **common)
        work = self.plan.passes[0]
        source = open_image(folder / "in.ome.zarr").source(0)
        self.items = Items(work.grid, ((0, 0),))
        self.arguments = source, work.grid, work.operators, writer.target(0), "cpu"

    def schedule(
        self, client: Any, n: int, seconds: float | None = None
    ) -> tuple[float, float, WatchedLedger]:
        """Run the first `n` blocks; return wall time, CPU time of this process, and what was seen."""
        folder = self._folder / f"job-{time.monotonic_ns()}"
        report = Report(operators=[], plan=self.plan.describe(), outputs=[])
        function, own = (nothing, ()) if seconds is None else (busy, (seconds,))
        with (
            Lock(folder) as lock,
            closing(WatchedLedger(folder / "image", lock.check)) as ledger,
            closing(Events(folder / "image" / "events.jsonl")) as events,
        ):
            ledger.begin({"n": n})
            conductor = Conductor(Runner(client), ledger, Progress(quiet=True), events, report)
            started, cpu_started = time.perf_counter(), time.process_time()
            conductor.run("blocks-0", Some(self.items, n), function, lambda _: (*own, *self.arguments))
            return time.perf_counter() - started, time.process_time() - cpu_started, ledger


def dry_run(folder: Path, n_blocks: int, n_busy: int) -> dict[str, Any]:
    """Plan 10 TB, schedule blocks that do nothing, then blocks that compute as long as they should."""
    run = DryRun(folder)
    result: dict[str, Any] = {
        "shape": TEN_TB,
        "plan_s": run.plan_s,
        "n_blocks_of_plan": len(run.items),
        "task_nbytes": len(pickle.dumps(run.arguments)),
        "empty": [],
    }
    overheads = {}
    for n_workers, n in ((1, min(n_blocks, 5_000)), (2, n_blocks)):
        with connect("local", n_workers=n_workers) as client:
            run.schedule(client, 100)  # workers have imported what they need
            wall, cpu, ledger = run.schedule(client, n)
            overheads[n_workers] = wall / ledger.n_recorded
            result["empty"].append(
                {
                    "n_workers": n_workers,
                    "n_blocks": ledger.n_recorded,
                    "wall_s": wall,
                    "ms_per_block": 1e3 * wall / ledger.n_recorded,
                    "driver_cpu_ms_per_block": 1e3 * cpu / ledger.n_recorded,
                    "memory": ledger.seen,
                }
            )
            if n_workers == 2:
                result["busy"] = _busy(run, client, n_workers, overheads[2], n_busy)
    grown = [seen for seen in result["empty"][-1]["memory"] if seen["n_blocks"] >= _WARM]
    if len(grown) > 1:
        first, last = grown[0], grown[-1]
        per_block = (last["driver_mb"] - first["driver_mb"]) / (last["n_blocks"] - first["n_blocks"])
        result["driver_bytes_per_block"] = 1e6 * per_block
        result["driver_mb_at_10_tb"] = last["driver_mb"] + per_block * (len(run.items) - last["n_blocks"])
    return result


def _busy(run: DryRun, client: Any, n_workers: int, overhead: float, n_blocks: int) -> dict[str, Any]:
    """Run blocks that compute as long as keeps dispatch below its share, and measure that share."""
    seconds = n_workers * overhead / SHARE
    wall, _, ledger = run.schedule(client, n_blocks, seconds)
    ideal = seconds * -(-ledger.n_recorded // n_workers)
    rate = _voxels_per_second()
    return {
        "seconds_per_block": seconds,
        "n_workers": n_workers,
        "n_blocks": ledger.n_recorded,
        "wall_s": wall,
        "ideal_s": ideal,
        "share_of_dispatch": 1 - ideal / wall,
        "richardson_lucy_voxels_per_s": rate,
        "read_edge": round((rate * seconds) ** (1 / 3)),
    }


def _voxels_per_second() -> float:
    """Return how many voxels per second 10 iterations of Richardson-Lucy take on one thread of this process."""
    operator = cr.RichardsonLucy(gaussian((2.0, 1.2, 1.2)), iterations=10, start=100.0)
    image = np.random.default_rng(0).poisson(100, (64, 96, 96)).astype(np.uint16)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        operator(image)
        started = time.perf_counter()
        operator(image)
        return image.size / (time.perf_counter() - started)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def resume_scan(folder: Path, n_blocks: int) -> dict[str, Any]:
    """Journal many blocks, and read them again as a resumed job does."""
    manifest = {"n": n_blocks}
    items = list(islice(Items(BlockGrid.regular((n_blocks, 1, 1), (1, 1, 1)), ((0, 0),)), n_blocks))
    with closing(Ledger(folder / "scan")) as ledger:
        ledger.begin(manifest)
        ledger.begin_stage("blocks-0", n_blocks)
        started = time.perf_counter()
        for item in items:
            ledger.record("blocks-0", item, {"crc32": 4_000_000_000, "n_parts": 1})
        written = time.perf_counter() - started
    with closing(Ledger(folder / "scan")) as ledger:
        started = time.perf_counter()
        ledger.begin(manifest)
        finished = ledger.finished("blocks-0")
        n_todo = sum(item not in finished for item in items)
        read = time.perf_counter() - started
    assert n_todo == 0
    return {"n_blocks": n_blocks, "write_us_per_block": 1e6 * written / n_blocks, "scan_s": read}


def resume(folder: Path, n_workers: int) -> dict[str, Any]:
    """Kill the driver of a job with SIGKILL, resume it from a shell, and wait for the next block."""
    voxels = np.random.default_rng(4).poisson(100, (96, 128, 128)).astype(np.uint16)
    source, target = folder / "killed.ome.zarr", folder / "resumed.ome.zarr"
    cr.write_image(voxels, source, axes="zyx", voxel_size=(1, 1, 1))
    np.save(folder / "psf.npy", gaussian((1.5, 1.2, 1.2)))
    base = [sys.executable, "-m", "chunkrestore"]
    options = ["--cluster", "local", "--workers", str(n_workers), "-q"]
    begin = ["deconvolve", source, target, "--psf", folder / "psf.npy", "--block", "32,32,32"]
    events = folder / "resumed.ome.zarr.chunkrestore" / "image" / "events.jsonl"

    def blocks() -> list[float]:
        return [e["time"] for e in read_events(events) if e["event"] == "block" and e["stage"] == "blocks-0"]

    driver = subprocess.Popen([*base, *map(str, begin), *options])
    try:
        _until(lambda: len(blocks()) >= 8)
    finally:
        driver.kill()
        killed = time.time()
        driver.wait()
    n_before = len(blocks())
    again = subprocess.Popen([*base, "resume", str(target), *options])
    try:
        _until(lambda: any(at > killed for at in blocks()))
        first = min(at for at in blocks() if at > killed)
    finally:
        status = again.wait()
    n_after = len(blocks()) - n_before
    n_blocks = len(BlockGrid.regular(voxels.shape, (32, 32, 32)))
    return {
        "n_workers": n_workers,
        "kill_to_first_block_s": first - killed,
        "n_blocks": n_blocks,
        "n_before_kill": n_before,
        "n_blocks_after": n_after,
        "n_done_again": n_before + n_after - n_blocks,
        "exit_status": status,
    }


def _until(condition: Callable[[], bool], deadline: float = 180.0) -> None:
    until = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {deadline} s")
        time.sleep(0.02)


def main() -> None:
    """Run the experiments and write their results."""
    # Workers import this module; what is defined in the main module would travel to them with every block.
    import soak as experiments
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="of the soak and of the resumed job")
    parser.add_argument("--n-soak", type=int, nargs=3, default=(25, 20, 20), help="blocks per axis")
    parser.add_argument(
        "--n-dry", type=int, default=30_000, help="blocks of the dry run; 91125 are all of them"
    )
    parser.add_argument("--n-busy", type=int, default=60)
    parser.add_argument("--n-scan", type=int, default=30_000)
    parser.add_argument("--only", choices=("soak", "dry_run", "resume_scan", "resume"), nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    wanted: dict[str, Callable[[Path], dict[str, Any]]] = {
        "soak": lambda folder: experiments.soak(folder, arguments.workers, tuple(arguments.n_soak)),
        "dry_run": lambda folder: experiments.dry_run(folder, arguments.n_dry, arguments.n_busy),
        "resume_scan": lambda folder: experiments.resume_scan(folder, arguments.n_scan),
        "resume": lambda folder: experiments.resume(folder, arguments.workers),
    }
    results = {}
    for name in arguments.only or wanted:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            started = time.perf_counter()
            results[name] = wanted[name](Path(folder)) | {"load": os.getloadavg()[0]}
            results[name]["took_s"] = time.perf_counter() - started
        print(name, json.dumps(results[name], indent=1), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Can ten million objects be settled and numbered on this machine, in bounded memory?

The stages of a job, as they are (`chunkrestore.jobs.labelling`), on candidates that are made up block by block:
nothing else is replaced. Objects stand on a lattice of 6 voxels, each moved by up to 1.5 per axis, with radii of 3
to 4 and one to three candidates each, which lie a voxel apart, differ in score, and are noisy by 5 % per ray.
Neighbours overlap, so one object in five loses against a neighbour, often across a block's border. A candidate
depends on its place in the lattice and the seed alone, not on the block grid. No image is read and nothing is
painted: ids are the end.

Checked, while all tables are still on the disk:

- ids are 1 to the number of objects without gaps, in the order of positions (slab by slab: the check is bounded,
  too);
- around corners where eight blocks meet, the objects are those of one suppression in one piece, blocks or no
  blocks;
- painted there, every object that lies within the region has as many voxels as its row says.

Prediction before the first measurement, for 10^7 objects. A candidate of 32 rays is 156 bytes: 4 GB of candidates,
1.6 GB of survivors for each of four rounds, 10 GB at the peak. Suppression at 20 us per candidate (``fast``): 8 CPU
minutes; each round of settling at a third of that, measuring at 25 us per object: 20 minutes in all. Every task
reads the survivors of up to 26 neighbours whole, 100 MB at 26,000 objects per block: a second. Peak of a worker 0.7
GB, of the driver 0.2 GB with 10 kB for each of 400 blocks. 15 minutes on two free cores; all but the driver's part
grows with the number of objects, so 10^8 take 2.5 hours and 100 GB.

Outcome for 9.9 million objects of 25 million candidates in 343 blocks: all checks hold; four rounds, the last of 39
blocks; 44 CPU minutes, twice the prediction: three rounds touched every block, since in a block of 29,000 objects
one near the border always changes, and each of them looks at all survivors of 26 neighbours before it leaves most
aside. That is a worker's memory as well: 1.5 GB, twice the prediction. The driver took 134 MB, 22 more than for 8
blocks, and 10.3 GB of disk at the peak. 53 minutes on two cores that seven others used, too.

Run: ``python benchmarks/object_tables.py --objects 1e5 1e6 1e7``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from sampling import every

import chunkrestore as cr
from chunkrestore import models
from chunkrestore.cluster import connect
from chunkrestore.grid import Block, BlockGrid, Halo, Slices
from chunkrestore.jobs.events import Events, read_events
from chunkrestore.jobs.labelling import Labelling
from chunkrestore.jobs.ledger import Item, Ledger
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.runner import Runner
from chunkrestore.jobs.stages import Stages
from chunkrestore.jobs.tables import load_table
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.operators.base import Table, concatenate
from chunkrestore.stitch.resolution import Index

RESULTS = Path(__file__).parent / "results" / "object_tables.json"
MODEL = "stardist3d-demo"
"""Whose rays and thresholds are used; the network itself is never loaded."""
PITCH = 6
"""Voxels between the places of objects."""
RADIUS = (3.0, 4.0)
N_CANDIDATES = (1, 3)
"""Of one object."""
NOISE = 0.05
"""Relative, of a distance."""
BLOCK = 200
"""Voxels per axis of a core: not a multiple of the lattice."""
SURVIVE = 0.8
"""Share of the lattice's objects that survive, about; lattices are made larger by its inverse."""
_STENCIL = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)])
"""Where candidates of an object lie around its centre."""
_INNER, _MARGIN = 48, 48
"""Voxels per axis of a region that is compared, and around it: decisions further away hardly matter."""
_SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class MadeUp(cr.StarDist):
    """StarDist whose candidates are made up: no image, no network, no halo."""

    seed: int = 0

    def halo(self, shape: Sequence[int]) -> Halo:
        """Return none."""
        return Halo((0,) * len(shape))

    def detect(self, image: Any, block: Block) -> Table:
        """Return the candidates whose points lie in the core."""
        return made_up(block.core, block.volume_shape, self.seed)


class Nothing:
    """An image that holds no voxel."""

    def read(self, t: int, c: int, region: Slices) -> npt.NDArray[np.uint8]:
        """Return nothing."""
        return np.empty((0, 0, 0), np.uint8)


def made_up(core: Slices, shape: Sequence[int], seed: int) -> Table:
    """Return the candidates of a lattice of objects whose points lie in `core`, whatever other cores there are."""
    cells = [np.arange(c.start // PITCH, -(-c.stop // PITCH)) for c in core]
    per_axis = [-(-n // PITCH) for n in shape]
    cell = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1).reshape(-1, 3)
    number = np.ravel_multi_index(tuple(cell.T), per_axis).astype(np.uint64)
    # One voxel from a cell's faces: candidates stay within it, so no two of them share a voxel.
    centre = cell * PITCH + 1 + np.stack([_below(PITCH - 2, number, seed, a) for a in range(3)], axis=-1)
    low, high = N_CANDIDATES
    n_own = low + _below(high - low + 1, number, seed, 3)
    first, which = np.repeat(np.cumsum(n_own) - n_own, n_own), np.repeat(np.arange(len(cell)), n_own)
    nth = np.arange(len(which)) - first
    shift = _STENCIL[(_below(len(_STENCIL), number, seed, 4)[which] + nth) % len(_STENCIL)]
    points = centre[which] + shift
    inside = np.all([(p >= c.start) & (p < c.stop) for p, c in zip(points.T, core, strict=True)], axis=0)
    which, shift, points, nth = (rows[inside] for rows in (which, shift, points, nth))
    mine = number[which] * np.uint64(high) + nth.astype(np.uint64)
    prob = 0.6 + 0.35 * _draws(number, seed, 5)[which] - 0.05 * _draws(mine, seed, 6)
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * _draws(number, seed, 7)[which]
    vertices = _rays().vertices
    by_ray = mine[:, np.newaxis] * np.uint64(len(vertices)) + np.arange(len(vertices), dtype=np.uint64)
    noise = 1 - NOISE + 2 * NOISE * _draws(by_ray, seed, 8)
    # A sphere's surface as it is seen from a voxel beside its centre, to first order.
    dist = radius[:, np.newaxis] * noise - shift @ vertices.T
    return {
        "prob": prob.astype(np.float32),
        "dist": dist.astype(np.float32),
        "points": points.astype(np.int64),
    }


def _rays() -> Rays:
    return Rays.of(models.config(MODEL))


def _draws(number: npt.NDArray[np.uint64], seed: int, purpose: int) -> npt.NDArray[np.float64]:
    """Return a number from [0, 1) for each of `number`: SplitMix64 of it (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = number * np.uint64(0x9E3779B97F4A7C15) + np.uint64((seed << 8) + purpose + 1) * np.uint64(
            0xD1B54A32D192ED03
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) * 2.0**-64 * (1 - 2.0**-53)


def _below(n: int, number: npt.NDArray[np.uint64], seed: int, purpose: int) -> npt.NDArray[np.int64]:
    return (n * _draws(number, seed, purpose)).astype(np.int64)


class Watch:
    """What processes and a folder have held at most, and how much processor time was spent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._driver = psutil.Process()
        self.peaks: dict[str, float] = defaultdict(float)
        self._before = self.cpu_s()

    def cpu_s(self) -> float:
        """Return the processor time of this process and of those that it started and that still run."""
        total = 0.0
        for process in (self._driver, *self._driver.children(recursive=True)):
            with _gone():
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def sample(self) -> None:
        """Look once."""
        self._note("driver_mb", self._driver.memory_info().rss / 1e6)
        workers = []
        for process in self._driver.children(recursive=True):
            with _gone():
                workers.append(process.memory_info().rss / 1e6)
        self._note("largest_worker_mb", max(workers, default=0.0))
        self._note("all_mb", sum(workers) + self._driver.memory_info().rss / 1e6)
        self._note("disk_gb", disk_nbytes(self._folder) / 1e9)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Look every now and then while inside."""
        self._before = self.cpu_s()
        try:
            with every(_SAMPLE_SECONDS, self.sample):
                yield
        finally:
            self.sample()

    def spent_cpu_s(self) -> float:
        """Return the processor time since sampling began."""
        return self.cpu_s() - self._before

    def _note(self, name: str, value: float) -> None:
        self.peaks[name] = max(self.peaks[name], value)


@contextmanager
def _gone() -> Iterator[None]:
    """Ignore a process that has ended meanwhile."""
    try:
        yield
    except psutil.NoSuchProcess:
        return


def disk_nbytes(folder: Path) -> int:
    """Return the size of all files in a folder that changes meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def measure(
    n_objects: int, n_workers: int, *, suppression: str = "exact", block: int = BLOCK, seed: int = 0
) -> dict[str, Any]:
    """Settle and number about `n_objects`, on a local cluster (or, without workers, in this process)."""
    edge = PITCH * round((n_objects / SURVIVE) ** (1 / 3))
    grid = BlockGrid.regular((edge,) * 3, (min(block, edge),) * 3)
    operator = MadeUp(MODEL, normalization=(0, 1), suppression=suppression, seed=seed)
    with (
        tempfile.TemporaryDirectory(prefix="object-tables-", ignore_cleanup_errors=True) as scratch,
        connect("local", n_workers=n_workers) if n_workers else nullcontext() as client,
        closing(Ledger(Path(scratch) / "job")) as ledger,
    ):
        watch = Watch(ledger.folder)
        ledger.begin({"n_objects": n_objects, "seed": seed})
        with closing(Events(ledger.folder / "events.jsonl")) as events, watch.sampled():
            report = Report(operators=[], plan={}, outputs=[])
            stages = Stages(Runner(client), ledger, Progress(quiet=True), events, report)
            labelling = Labelling(stages, grid, {(0, 0): operator}, Nothing())  # type: ignore[arg-type]
            started = time.perf_counter()
            labelling.find_objects()
            wall = time.perf_counter() - started
            cpu = watch.spent_cpu_s()
        counts = {item: told["n_objects"] for item, told in ledger.finished("measure").items()}
        n_found = sum(counts.values())
        return {
            "n_objects": n_found,
            "n_lattice": (edge // PITCH) ** 3,
            "n_candidates": sum(told["n_rows"] for told in ledger.finished("detect").values()),
            "shape": grid.shape,
            "n_blocks": len(grid),
            "n_workers": n_workers,
            "suppression": suppression,
            "n_rounds": report.n_rounds,
            "wall_s": wall,
            "cpu_s": cpu,
            "cpu_us_per_object": 1e6 * cpu / n_found,
            "peaks": dict(watch.peaks),
            "journal_bytes_per_block": (ledger.folder / "journal.jsonl").stat().st_size / len(grid),
            "stages": by_stage(ledger.folder / "events.jsonl"),
            "ids_are_gap_free_and_by_position": ids_are_in_order(labelling.folder, counts),
            "samples": [
                compared(operator, grid, labelling.folder, counts, corner) for corner in corners(grid, 8)
            ],
        }


def by_stage(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a job's events tell of every stage: tasks, wall time, and seconds per phase over all tasks."""
    stages: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"n_tasks": 0, "task_s": 0.0, "phases_s": defaultdict(float)}
    )
    for event in read_events(path):
        if event["event"] == "block":
            stage = stages[event["stage"]]
            stage["n_tasks"] += 1
            stage["task_s"] += event["total"]
            for name, seconds in event["seconds"].items():
                stage["phases_s"][name] += seconds
        elif event["event"] == "stage_end":
            stages[event["stage"]]["wall_s"] = event["seconds"]
    return dict(stages)


def ids_are_in_order(folder: Path, counts: Mapping[Item, int]) -> bool:
    """Return whether ids are 1 to the number of objects in the order of keys; one slab of blocks at a time."""
    slabs: dict[int, list[Item]] = defaultdict(list)
    for item, n in counts.items():
        if n:
            slabs[item[2]].append(item)
    n_before, last_key = 0, -1
    for slab in sorted(slabs):
        keys = np.concatenate([load_table(folder, "objects", item, ["key"])["key"] for item in slabs[slab]])
        ids = np.concatenate([load_table(folder, "ids", item)["ids"] for item in slabs[slab]])
        order = np.argsort(keys)
        in_order = np.array_equal(ids[order], n_before + np.arange(1, len(ids) + 1))
        if not in_order or keys[order[0]] <= last_key or (np.diff(keys[order]) <= 0).any():
            return False
        n_before, last_key = n_before + len(ids), int(keys[order[-1]])
    return n_before == sum(counts.values())


def corners(grid: BlockGrid, n: int) -> list[tuple[int, ...]]:
    """Return up to `n` voxels where as many blocks meet as possible, spread over the volume."""
    inner = [edges[1:-1] or (edges[-1] // 2,) for edges in grid.edges]
    found = list(itertools.product(*inner))
    return [found[i] for i in np.linspace(0, len(found) - 1, min(n, len(found))).astype(int)]


def compared(
    operator: MadeUp, grid: BlockGrid, folder: Path, counts: Mapping[Item, int], corner: Sequence[int]
) -> dict[str, Any]:
    """Compare the objects around a voxel with those of one suppression in one piece, and with what is painted."""
    inner, outer = (
        tuple(slice(max(0, x - r), min(n, x + r)) for x, n in zip(corner, grid.shape, strict=True))
        for r in (_INNER // 2, _INNER // 2 + _MARGIN)
    )
    block = Block(outer, outer, grid.shape)
    whole = operator.measure(operator.survivors(operator.decide(operator.detect(None, block))), {}, block)
    stored = concatenate(_stored(folder, grid.indices_meeting(outer), counts))
    expected, found = (table["key"][_within(table["points"], inner)] for table in (whole, stored))
    labels = operator.paint(block, [stored])
    complete = _boxed(stored, outer)
    painted = np.bincount(
        np.searchsorted(np.sort(stored["ids"]), labels[labels > 0]), minlength=len(stored["ids"])
    )
    shown = painted[np.searchsorted(np.sort(stored["ids"]), stored["ids"])]
    return {
        "corner": corner,
        "n_objects": len(expected),
        "same_objects": np.array_equal(np.sort(expected), np.sort(found)),
        "n_painted_whole": int(complete.sum()),
        "same_volumes": np.array_equal(shown[complete], stored["volume"][complete]),
    }


def _stored(folder: Path, indices: Iterator[Index], counts: Mapping[Item, int]) -> Iterator[Table]:
    for index in indices:
        item = (0, 0, *index)
        if counts.get(item):
            yield load_table(folder, "objects", item) | load_table(folder, "ids", item)


def _within(points: npt.NDArray[np.int64], region: Slices) -> npt.NDArray[np.bool_]:
    return np.all([(p >= s.start) & (p < s.stop) for p, s in zip(points.T, region, strict=True)], axis=0)


def _boxed(table: Table, region: Slices) -> npt.NDArray[np.bool_]:
    """Return which objects have all of their voxels in `region`."""
    return _within(table["first"], region) & _within(table["last"], region)


def scaled(small: Mapping[str, Any], large: Mapping[str, Any], n_objects: float) -> dict[str, float]:
    """Extrapolate to `n_objects`: per object as in the largest run, the driver by its growth per block."""
    factor = n_objects / large["n_objects"]
    grown = large["peaks"]["driver_mb"] - small["peaks"]["driver_mb"]
    per_block = max(grown, 0.0) / max(large["n_blocks"] - small["n_blocks"], 1)
    return {
        "n_objects": n_objects,
        "wall_h": large["wall_s"] * factor / 3600,
        "cpu_h": large["cpu_s"] * factor / 3600,
        "disk_gb": large["peaks"]["disk_gb"] * factor,
        "driver_mb": large["peaks"]["driver_mb"] + per_block * large["n_blocks"] * (factor - 1),
        "largest_worker_mb": large["peaks"]["largest_worker_mb"],
    }


def main() -> None:
    """Run the sizes that are asked for and write what was measured."""
    # Workers import this module; what is defined in the main module would travel to them with every block.
    import object_tables as experiment
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=float, nargs="+", default=(1e5, 1e6, 1e7), help="sizes, rising")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 computes in this one")
    parser.add_argument("--block", type=int, default=BLOCK, help="voxels per axis of a core")
    parser.add_argument("--suppression", choices=("exact", "fast"), default="exact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    if arguments.output.exists():
        # Sizes may be run one by one.
        runs = json.loads(arguments.output.read_text())["runs"]
    for n_objects in arguments.objects:
        run = experiment.measure(
            int(n_objects),
            arguments.workers,
            suppression=arguments.suppression,
            block=arguments.block,
            seed=arguments.seed,
        )
        name = f"{n_objects:.0e}, {arguments.suppression}"
        runs[name] = run | {"load": os.getloadavg()[0]}
        print(name, json.dumps(runs[name], indent=1, default=float), flush=True)
        result = {"question": (__doc__ or "").splitlines()[0], "pitch": PITCH, "runs": runs}
        by_size = sorted(runs.values(), key=lambda one: one["n_objects"])
        result["extrapolated"] = scaled(by_size[0], by_size[-1], 1e8)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(describe() | result, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()

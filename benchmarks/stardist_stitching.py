"""What do blocks do to nuclei: this package, StarDist's own blocks, and rules that merge labels afterwards?

**stitching.** Contenders on one simulated volume of crowded nuclei, with the network that ships with the package,
the same normalisation and thresholds, and the same cores; each in a fresh process:

- ``predict_instances``: StarDist on the whole volume, the reference;
- ``chunkrestore, exact`` and ``fast``: this package, block by block, one at a time, with both ways to judge
  overlaps;
- ``predict_instances_big``: StarDist's own way for volumes that do not fit, with as many new voxels per block, the
  context that it recommends and an overlap that holds the largest object, as it asks for;
- ``no halo, touching``: StarDist per core; labels that touch across a border become one;
- ``halo 16, touching``: StarDist per core with 16 voxels around it, an object's length, as people choose overlaps;
  cropped; labels that touch across a border become one;
- ``halo 16, IoU``: the same; labels that share more than half of their union in the region that two blocks have
  seen;
- ``halo 48, IoU``: the same with all that the network looks at around each core;
- ``halo 48, centroid``: the same; an object belongs to the block whose core holds its centroid.

Objects against those of the reference: *identical* (every voxel), *split* (objects of the reference in which two or
more objects lie with most of their voxels), *merged* (objects in which two or more of the reference lie so),
*missing* and *extra* (intersection over union below one half with every object of the other side). Wall and CPU
seconds after a small volume that warms up; peak memory of the process, and what it had before it began.

Prediction before the first measurement: ours is zero in every column, in ``fast`` at most one object in 500 differs
(its overlaps are counts of voxels, StarDist's are volumes of hulls where these decide). ``predict_instances_big``
finds the same objects with a few voxels off and costs three times the reference. Touching faces lose and merge 3 to
10 % of the nuclei that lie on faces, with or without halo; IoU gets numbers right and 2 to 5 % of the masks wrong
with 16 voxels of halo, and hardly any with 48, three to four nuclei deep. Those run StarDist on four times the
voxels, so they take four times its time; ours runs only the network on those and suppresses once, with a compiled
routine: less than the reference. Memory: the reference holds the volume's feature maps, blocks half of them.

Outcome (983 nuclei, 8 cores of 48 x 80 x 80): ``exact`` is zero everywhere in a fifth of the reference's CPU time;
``fast`` has one object too many. Touching faces were worse than predicted: 50 merged and 78 missing with 16 voxels
of halo. IoU with 16 voxels gets all numbers right, but two masks in five are not the reference's, more than
predicted: the network does not see all that it looks at. With 48 voxels IoU and centroids find every voxel of this
scene, at 4 to 5 times the reference's time and 25 times ours; nothing guarantees that they do. Memory: little
difference at this size.

**shares.** What suppression, settling, measuring and painting take of the network's CPU time, with a small network
(the shipped one: 74 thousand weights, grid 2 x 2 x 2, 32 rays) and one of StarDist's default size (32 filters, grid
1 x 2 x 2, 96 rays), at two densities of nuclei that are 4 to 7 um across at 0.4 um sampling: *ordinary*, one
nucleus per 30,000 voxels (12 um from one to the next), and *crowded*, ten times that: nuclei touch everywhere.
Candidates of the small network are its own. The large one has random weights, which find nothing of use: its time
is measured, and its candidates are what a network is trained to say (StarDist's own training targets for the
simulated truth: scores and 96 distances per point of the grid, with 3 and 5 % of noise, scores above the default
threshold). The network's time is that of the cores alone; blocks of 256 voxels with the halo that they need take
about twice of that, and shares are then half as large (``share_with_halo``). Cores are small here, which is hard on
settling: it works on surfaces.

Prediction before the first measurement: the large network takes 6 CPU seconds per million voxels, the small one
0.6; a candidate 50 us with 32 rays and 100 us with 96, and there are 40 per object with the large network's grid.
So 2 % of the large network's time at ordinary density and 20 % crowded; 5 % and 50 % of the small one's.

Outcome: the large network is three times faster than predicted (2.1 CPU seconds per million voxels), and there are
55 candidates per object, 40 us each in ``fast`` and 130 in ``exact``. At ordinary density ``fast`` takes 3.7 % of
the large network's time, ``exact`` 12 % (5.4 % with halos); crowded 44 % and 150 % (21 and 70 % with halos). Of the
small network 18 % and 21 %, crowded 109 % and 183 %. So the aim of 5 % at ordinary density is met by ``fast``
alone, unless halos are counted.

Run: ``python benchmarks/stardist_stitching.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import numpy.typing as npt

import chunkrestore as cr
from chunkrestore import models
from chunkrestore.grid import Block, BlockGrid, Slices
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.metrics.instances import same_instances
from chunkrestore.operators.base import Table
from chunkrestore.simulate import SimulatedVolume, embryo, forward
from chunkrestore.statistics import of_array
from chunkrestore.stitch.objects import Objects, number_objects

RESULTS = Path(__file__).parent / "results" / "stardist_stitching.json"
MODEL = "stardist3d-demo"
REFERENCE = "predict_instances"
DENSITIES = {"ordinary": 30_000, "crowded": 3_000}
"""Voxels per nucleus."""
TARGET_NOISE = 0.03, 0.05
"""Standard deviation of a score, and relative of a distance, around what a network is trained to say."""
_LARGE = (4096,) * 3
_WARM = (slice(0, 32), slice(0, 48), slice(0, 48))

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Scene:
    """A volume and how it is segmented."""

    image: npt.NDArray[np.uint16]
    operator: cr.StarDist
    """Resolved."""
    block_shape: tuple[int, ...]

    @classmethod
    def of(cls, image: npt.NDArray[np.uint16], block_shape: Sequence[int]) -> Scene:
        """Return the scene of an image."""
        operator = cr.StarDist(MODEL)
        return cls(image, operator.resolve(of_array(image, operator.needs)), tuple(block_shape))

    def grid(self, halo: int | None = None) -> BlockGrid:
        """Return the blocks with so many voxels around them: by default, what the network looks at."""
        shape = self.image.shape
        full = self.operator.halo(shape)
        given = full if halo is None else replace(full, depth=(halo,) * len(shape))
        return BlockGrid.regular(shape, self.block_shape, given)

    @property
    def model(self) -> Any:
        """StarDist's own object."""
        return models.load(self.operator.model)


# Contenders


def whole(scene: Scene) -> Labels:
    """Segment the whole volume with StarDist."""
    return _predict(scene, scene.image)


def tiled(scene: Scene, suppression: str) -> Labels:
    """Segment the volume with this package, one block at a time."""
    operator = replace(scene.operator, suppression=suppression)
    grid = scene.grid()
    objects = number_objects(operator, grid, {b.index: operator.detect(scene.image[b.read], b) for b in grid})
    return _painted(operator, grid, objects)


def big(scene: Scene) -> Labels:
    """Segment the volume with StarDist's `predict_instances_big`, with parameters that are valid.

    Its blocks include context and overlap. They are no longer than an axis less its alignment, so that there are two;
    an axis that is too short for two needs neither.
    """
    block = next(iter(scene.grid()))
    found = scene.operator.detect(scene.image[block.read], block)
    longest = float(Rays.of(models.config(MODEL)).radii(found["dist"]).max())
    align = scene.operator.halo(scene.image.shape).align
    context = scene.model._axes_tile_overlap("ZYX")
    arguments: dict[str, list[int]] = {"block_size": [], "min_overlap": [], "context": []}
    for n, core, unit, around in zip(scene.image.shape, scene.block_shape, align, context, strict=True):
        overlap, around = _up(2 * longest, unit), _up(around, unit)
        size = min(core + overlap + 2 * around, _up(n, unit) - unit)
        several = size > overlap + 2 * around
        arguments["block_size"].append(size if several else _up(n, unit))
        arguments["min_overlap"].append(overlap if several else 0)
        arguments["context"].append(around if several else 0)
    given = {key: tuple(values) for key, values in arguments.items()}
    return _quietly(
        lambda: scene.model.predict_instances_big(
            _normalized(scene, scene.image), axes="ZYX", show_progress=False, **_thresholds(scene), **given
        )[0]
    )


def merged(scene: Scene, by: str, halo: int | None = None) -> Labels:
    """Segment every block with StarDist, each for itself, and merge the labels by a rule."""
    import dask.array as da

    grid = scene.grid(halo)
    parts: Any = np.empty(grid.n_blocks, object)
    for block in grid:
        labels = _predict(scene, scene.image[block.read])
        # A face rule knows the faces of cores; the others compare what two blocks have seen.
        parts[block.index] = da.from_array(labels[block.trim] if by == "touching" else labels, chunks=-1)
    depth = grid.halo.depth if by != "touching" else (0, 0, 0)
    result = cr.merge_labels(da.block(parts.tolist()), depth=depth, by=by)
    return np.asarray(result.compute(scheduler="synchronous"))


CONTENDERS: dict[str, Callable[[Scene], Labels]] = {
    REFERENCE: whole,
    "chunkrestore, exact": lambda scene: tiled(scene, "exact"),
    "chunkrestore, fast": lambda scene: tiled(scene, "fast"),
    "predict_instances_big": big,
    "no halo, touching": lambda scene: merged(scene, "touching", 0),
    "halo 16, touching": lambda scene: merged(scene, "touching", 16),
    "halo 16, IoU": lambda scene: merged(scene, "iou", 16),
    "halo 48, IoU": lambda scene: merged(scene, "iou"),
    "halo 48, centroid": lambda scene: merged(scene, "centroid"),
}


def _predict(scene: Scene, image: npt.NDArray[np.uint16]) -> Labels:
    return _quietly(lambda: scene.model.predict_instances(_normalized(scene, image), **_thresholds(scene))[0])


def _normalized(scene: Scene, image: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    from csbdeep.utils import normalize_mi_ma

    return normalize_mi_ma(image, *(scene.operator.normalization or ()))


def _thresholds(scene: Scene) -> dict[str, Any]:
    return {
        "prob_thresh": scene.operator.prob_thresh,
        "nms_thresh": scene.operator.nms_thresh,
        "n_tiles": None,
    }


def _quietly(predict: Callable[[], Labels]) -> Labels:
    with contextlib.redirect_stdout(io.StringIO()):
        return predict()


def _painted(operator: cr.StarDist, grid: BlockGrid, objects: Objects) -> npt.NDArray[np.int32]:
    labels = np.zeros(grid.shape, np.int32)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


def _up(length: float, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return int(-(-length // unit)) * unit


# What became of the objects


def judge(labels: Labels, reference: Labels) -> dict[str, int]:
    """Count what became of the objects of `reference` in `labels`."""
    sizes, expected_sizes = (np.bincount(array.ravel()) for array in (labels, reference))
    both = (labels > 0) & (reference > 0)
    pairs, shared = np.unique(
        np.stack([labels[both], reference[both]]).astype(np.int64), axis=1, return_counts=True
    )
    a, b = pairs
    iou = shared / (sizes[a] + expected_sizes[b] - shared)
    matched = iou >= 0.5
    # An object lies in another one with more than half of its voxels; it cannot lie in two.
    lies_in_reference, holds_reference = 2 * shared > sizes[a], 2 * shared > expected_sizes[b]
    n_objects, n_expected = (np.count_nonzero(counts[1:]) for counts in (sizes, expected_sizes))
    difference = same_instances(reference, labels)
    return {
        "objects": int(n_objects),
        "identical": difference.n_identical,
        "split": _n_repeated(b[lies_in_reference]),
        "merged": _n_repeated(a[holds_reference]),
        "missing": int(n_expected) - len(np.unique(b[matched])),
        "extra": int(n_objects) - len(np.unique(a[matched])),
        "voxels_that_differ": difference.n_voxels,
    }


def _n_repeated(ids: npt.NDArray[np.int64]) -> int:
    """Return how many ids occur more than once."""
    return int((np.unique(ids, return_counts=True)[1] > 1).sum())


def crossings(labels: Labels, grid: BlockGrid) -> dict[str, int]:
    """Count the objects that lie on faces, edges and corners of cores: across borders on 1, 2 and 3 axes."""
    n_axes: Counter[int] = Counter()
    for label_id, box in enumerate(_boxes(labels), start=1):
        if box is not None:
            found = sum(
                any(s.start < border < s.stop for border in edges[1:-1])
                and _is_cut(labels[box] == label_id, axis, s, edges)
                for axis, (s, edges) in enumerate(zip(box, grid.edges, strict=True))
            )
            n_axes[found] += 1
    return {"faces": n_axes[1], "edges": n_axes[2], "corners": n_axes[3]}


def _boxes(labels: Labels) -> list[Slices | None]:
    from scipy.ndimage import find_objects

    return find_objects(labels.astype(np.int32, copy=False))


def _is_cut(mask: npt.NDArray[np.bool_], axis: int, extent: slice, edges: Sequence[int]) -> bool:
    """Return whether neighbouring voxels of an object lie on both sides of a border."""
    for border in edges[1:-1]:
        at = border - extent.start
        if 0 < at < mask.shape[axis]:
            below, above = (np.take(mask, i, axis) for i in (at - 1, at))
            if (below & above).any():
                return True
    return False


# Stitching


def stitching(
    shape: Sequence[int], block_shape: Sequence[int], seed: int, names: Sequence[str]
) -> dict[str, Any]:
    """Compare contenders, each in a process of its own."""
    volume = embryo(shape, seed=seed, arrangement="tissue")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "image.npy", volume.image)
        figures: dict[str, dict[str, Any]] = {}
        reference: Labels | None = None
        for name in dict.fromkeys([REFERENCE, *names]):
            figures[name] = _in_own_process(folder, name, block_shape)
            labels = np.load(folder / "labels.npy")
            reference = labels if reference is None else reference
            figures[name] |= judge(labels, reference)
            print(name, json.dumps(figures[name]), flush=True)
    assert reference is not None
    grid = Scene.of(volume.image, block_shape).grid()
    return {
        "shape": shape,
        "block_shape": block_shape,
        "seed": seed,
        "n_blocks": len(grid),
        "halo_overhead": grid.halo_overhead,
        "objects_cut_by_borders": crossings(reference, grid),
        "contenders": figures,
    }


def _in_own_process(folder: Path, name: str, block_shape: Sequence[int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--contender", name, "--folder", folder, "--block", *block_shape]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def alone(name: str, folder: Path, block_shape: Sequence[int]) -> dict[str, float]:
    """Run one contender on the image in `folder` and leave its labels there."""
    image = np.load(folder / "image.npy")
    scene = Scene.of(image, block_shape)
    small = replace(scene, image=image[_WARM], block_shape=(48, 48, 48))
    for warm in (whole, lambda s: tiled(s, "exact")):
        warm(small)
    before = _peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    labels = CONTENDERS[name](scene)
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    figures |= {"peak_mb": _peak_mb(), "before_mb": before}
    np.save(folder / "labels.npy", labels)
    return figures


def _peak_mb() -> float:
    """Return the largest resident memory of this process so far (Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1e-6 if sys.platform == "darwin" else 1.024e-3
    )


# Shares of the network's time


@dataclass(frozen=True)
class Timed(cr.StarDist):
    """StarDist that notes how much processor time its steps take."""

    steps: dict[str, float] = field(default_factory=lambda: defaultdict(float), compare=False)

    def detect(self, image: Any, block: Block) -> Table:
        """Time the network and what finds candidates in its output."""
        with _timed(self.steps, "detect"):
            return super().detect(image, block)

    def decide(self, table: Table) -> Table:
        """Time suppression within blocks."""
        with _timed(self.steps, "suppress"):
            return super().decide(table)

    def settle(self, own: Table, others: Table, block: Block) -> Table:
        """Time suppression across blocks."""
        with _timed(self.steps, "settle"):
            return super().settle(own, others, block)

    def measure(self, own: Table, others: Table, block: Block) -> Table:
        """Time measuring."""
        with _timed(self.steps, "measure"):
            return super().measure(own, others, block)

    def paint(self, block: Block, numbered: Sequence[Table]) -> np.ndarray:
        """Time painting."""
        with _timed(self.steps, "paint"):
            return super().paint(block, numbered)


@contextlib.contextmanager
def _timed(steps: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    steps[name] += time.process_time() - started


def shares(
    shape: Sequence[int], block_shape: Sequence[int], seed: int, network_shape: Sequence[int]
) -> dict[str, Any]:
    """Measure both networks, and what follows them at both densities."""
    result: dict[str, Any] = {"shape": shape, "block_shape": block_shape, "seed": seed, "densities": {}}
    with tempfile.TemporaryDirectory() as scratch:
        networks = {"shipped": models.folder(MODEL), "default size": default_network(Path(scratch))}
        seconds = {name: network_s_per_megavoxel(folder, network_shape) for name, folder in networks.items()}
        result["network_s_per_megavoxel"] = seconds
        for density, voxels_per_nucleus in DENSITIES.items():
            volume = thinned(embryo(shape, seed=seed, arrangement="tissue"), voxels_per_nucleus, seed)
            figures: dict[str, Any] = {"nuclei": volume.n_nuclei}
            result["densities"][density] = figures
            for (name, folder), mode in itertools.product(networks.items(), ("exact", "fast")):
                grid, operator, detected = _found(volume, folder, name == "shipped", block_shape, seed)
                after = after_network(replace(operator, suppression=mode), grid, detected)
                after["network_cpu_s"] = seconds[name]["cpu_s"] * 1e-6 * volume.labels.size
                after["share"] = sum(after["steps_cpu_s"].values()) / after["network_cpu_s"]
                large = BlockGrid.regular(_LARGE, (256,) * 3, operator.halo(_LARGE))
                after["share_with_halo"] = after["share"] / large.halo_overhead
                figures[f"{name}, {mode}"] = after
                print(density, name, mode, json.dumps(after), flush=True)
    return result


def _found(
    volume: SimulatedVolume, folder: Path, by_network: bool, block_shape: Sequence[int], seed: int
) -> tuple[BlockGrid, Timed, dict[tuple[int, ...], Table]]:
    """Return blocks, operator and candidates: those of the network, or those that it would be trained for."""
    shape = volume.image.shape
    operator = Timed(folder)
    operator = operator.resolve(of_array(volume.image, operator.needs))
    grid = BlockGrid.regular(shape, block_shape, operator.halo(shape))
    if by_network:
        return grid, operator, {b.index: operator.detect(volume.image[b.read], b) for b in grid}
    targets = trained_for(volume, folder, seed)
    return grid, operator, {b.index: _part(targets, b) for b in grid}


def thinned(volume: SimulatedVolume, voxels_per_nucleus: float, seed: int) -> SimulatedVolume:
    """Return the volume with some of its nuclei taken out at random, so that so many voxels are left for each."""
    n_kept = min(round(volume.labels.size / voxels_per_nucleus), volume.n_nuclei)
    ids = np.unique(volume.labels[volume.labels > 0])
    kept = np.random.default_rng(seed).choice(ids, n_kept, replace=False)
    new_ids = np.zeros(ids[-1] + 1, np.int32)
    new_ids[kept] = np.arange(1, n_kept + 1)
    labels = new_ids[volume.labels]
    truth = np.where(labels > 0, volume.truth, np.float32(0))
    image = forward(truth, volume.psf, seed=seed, camera=volume.camera)
    return replace(volume, labels=labels, truth=truth, image=image)


def default_network(folder: Path) -> Path:
    """Save a network of StarDist's default size with 96 rays and grid (1, 2, 2); its weights are random."""
    from stardist import Rays_GoldenSpiral
    from stardist.models import Config3D, StarDist3D

    config = Config3D(rays=Rays_GoldenSpiral(96), grid=(1, 2, 2), n_channel_in=1)
    model = _quietly_made(lambda: StarDist3D(config, "default", basedir=str(folder)))
    model.keras_model.save_weights(str(folder / "default" / "weights_best.h5"))
    # What StarDist takes where none are found.
    (folder / "default" / "thresholds.json").write_text(json.dumps({"prob": 0.5, "nms": 0.4}))
    return folder / "default"


def _quietly_made(make: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def network_s_per_megavoxel(folder: Path, shape: Sequence[int], n_times: int = 3) -> dict[str, float]:
    """Return the processor and wall time of a network, without anything around it; the least of a few runs."""
    from chunkrestore.kernels.network import run_network

    keras_model = models.load(str(folder)).keras_model
    image = np.random.default_rng(0).random((*shape, 1), np.float32)
    run_network(keras_model, image)
    taken = []
    for _ in range(n_times):
        wall, cpu = time.perf_counter(), time.process_time()
        run_network(keras_model, image)
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu_s, wall_s = np.min(taken, axis=0) / np.prod(shape) * 1e6
    return {"cpu_s": float(cpu_s), "wall_s": float(wall_s)}


def trained_for(volume: SimulatedVolume, model: Path, seed: int) -> Table:
    """Return the candidates that a network would find which says, but for noise, what it was trained to say."""
    from stardist.geometry import star_dist3D
    from stardist.rays3d import rays_from_json
    from stardist.utils import edt_prob

    config = models.config(str(model))
    every = tuple(slice(0, None, g) for g in config.grid)
    rng = np.random.default_rng(seed)
    score_noise, dist_noise = TARGET_NOISE
    score = edt_prob(volume.labels)[every]
    score = score + rng.normal(0, score_noise, score.shape)
    found = np.nonzero((score > models.thresholds(str(model))[0]) & (volume.labels[every] > 0))
    dist = star_dist3D(volume.labels, rays_from_json(config.rays_json), grid=tuple(config.grid))[found]
    return {
        "prob": score[found].astype(np.float32),
        "dist": (dist * rng.normal(1, dist_noise, dist.shape)).astype(np.float32),
        "points": (np.stack(found, axis=-1) * config.grid).astype(np.int64),
    }


def _part(table: Table, block: Block) -> Table:
    """Return the rows whose points lie in a core."""
    inside = np.all(
        [(p >= s.start) & (p < s.stop) for p, s in zip(table["points"].T, block.core, strict=True)], axis=0
    )
    return {key: rows[inside] for key, rows in table.items()}


def after_network(operator: Timed, grid: BlockGrid, detected: dict[tuple[int, ...], Table]) -> dict[str, Any]:
    """Settle, number and paint what was detected; return what took how long."""
    few = {index: {key: rows[:200] for key, rows in table.items()} for index, table in detected.items()}
    _painted(operator, grid, number_objects(operator, grid, few))  # compiles what is not compiled yet
    operator.steps.clear()
    objects = number_objects(operator, grid, detected)
    _painted(operator, grid, objects)
    n_candidates = sum(len(table["prob"]) for table in detected.values())
    return {
        "candidates": n_candidates,
        "objects": objects.n_objects,
        "rounds": objects.n_rounds,
        "steps_cpu_s": dict(operator.steps),
        "cpu_us_per_candidate": 1e6 * sum(operator.steps.values()) / n_candidates,
    }


def main() -> None:
    """Run the experiments and write their results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 160, 160))
    parser.add_argument("--block", type=int, nargs=3, default=(48, 80, 80))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--only", choices=("stitching", "shares"), nargs="*")
    parser.add_argument("--shares-shape", type=int, nargs=3, default=(96, 192, 192))
    parser.add_argument("--shares-block", type=int, nargs=3, default=(96, 96, 96))
    parser.add_argument(
        "--network", type=int, nargs=3, default=(64, 96, 96), help="voxels that it is timed on"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(alone(arguments.contender, arguments.folder, arguments.block)))
        return
    wanted: dict[str, Callable[[], dict[str, Any]]] = {
        "stitching": lambda: stitching(
            arguments.shape, arguments.block, arguments.seed, arguments.contenders
        ),
        "shares": lambda: shares(
            arguments.shares_shape, arguments.shares_block, arguments.seed, arguments.network
        ),
    }
    result: dict[str, Any] = {"question": (__doc__ or "").splitlines()[0]}
    if arguments.output.exists() and arguments.only:
        result = json.loads(arguments.output.read_text())
    for name in arguments.only or wanted:
        figures = wanted[name]() | {"load": os.getloadavg()[0]}
        if name == "stitching" and name in result:
            # Contenders may be run again one by one.
            figures["contenders"] = result[name]["contenders"] | figures["contenders"]
        result[name] = figures
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result | describe(), indent=1, default=float) + "\n")
    for name, figures in result.get("stitching", {}).get("contenders", {}).items():
        print(f"| {name:<22} |", " | ".join(f"{value:8.0f}" for value in figures.values()), "|")


if __name__ == "__main__":
    main()

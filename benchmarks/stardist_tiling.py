"""What does it cost to segment block by block and still get the instances of the whole volume?

Three contenders on one simulated volume of crowded nuclei, with the network that ships with the package and
the same thresholds and normalisation:

- ``predict_instances``: StarDist on the whole volume, the reference;
- ``chunkrestore``: this package, block by block, one block at a time;
- ``predict_instances_big``: StarDist's own way for volumes that do not fit, with as many new voxels per block,
  the context that it recommends, and an overlap that holds the largest object, as it asks for.

Prediction before the first measurement: suppression is most of the time, about 50 ms per object. Block by
block, each candidate is decided once, and those of objects at block faces again: 1.2 to 1.5 times the CPU
time of the reference at cores of five to ten nuclei per side. Blocks that overlap by object and context
decide candidates several times: 2.5 to 4.5 times. (So it was with StarDist's routine: 1.14 and 3.1 times.)

Prediction before the first measurement with compiled suppression of our own: nine tenths of the reference's time are
suppression; it falls to a tenth, and the network, which computes halos as well, takes twice as long: 0.3 times.
Outcome: 0.08 times.

Reported: wall and CPU seconds, ratio to the reference, time per step, objects, and how many of them have
exactly the voxels of the reference. Suppression enters an OpenMP region per object; on busy cores wall
seconds say little, CPU seconds more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

import chunkrestore as cr
from chunkrestore import models
from chunkrestore.grid import BlockGrid
from chunkrestore.simulate import embryo
from chunkrestore.statistics import of_array
from chunkrestore.stitch.objects import number_objects

RESULTS = Path(__file__).parent / "results" / "stardist.json"
# The script is not named so too: beside a script "stardist.py", StarDist itself could not be imported.


def measure(shape: tuple[int, ...], block_shape: tuple[int, ...], seed: int = 5) -> dict[str, Any]:
    """Time the three contenders on one volume, after a small one that warms them up."""
    image = embryo(shape, seed=seed, arrangement="tissue").image
    operator = cr.StarDist("stardist3d-demo")
    operator = operator.resolve(of_array(image, operator.needs))
    grid = BlockGrid.regular(shape, block_shape, operator.halo(shape))
    first = next(iter(grid))
    largest = math.ceil(operator.radius(operator.detect(image[first.read], first)) or 0)
    contenders: dict[str, Callable[[np.ndarray, dict[str, float]], np.ndarray]] = {
        "predict_instances": lambda x, _: _quietly(_model(operator).predict_instances, operator, x),
        "chunkrestore": lambda x, steps: _tiled(operator, x, block_shape, steps),
        "predict_instances_big": lambda x, _: _quietly(
            _model(operator).predict_instances_big, operator, x, **_big(operator, x, block_shape, largest)
        ),
    }
    results: dict[str, Any] = {}
    for name, contender in contenders.items():
        contender(image[:32, :48, :48], {})
        steps: dict[str, float] = {}
        wall, cpu = time.perf_counter(), time.process_time()
        labels = contender(image, steps)
        results[name] = {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "n_candidates": steps.pop("n_candidates", None),
            "steps_cpu_s": steps,
            "objects": len(np.unique(labels)) - 1,
            "labels": labels,
        }
    reference = results["predict_instances"]
    expected = reference["labels"]
    for figures in results.values():
        labels = figures.pop("labels")
        figures["identical_objects"] = n_identical(labels, expected)
        figures["voxels_that_differ"] = n_voxels_that_differ(labels, expected)
        for kind in ("wall", "cpu"):
            figures[f"{kind}_ratio_to_reference"] = figures[f"{kind}_s"] / reference[f"{kind}_s"]
    return {
        "question": (__doc__ or "").splitlines()[0],
        "shape": shape,
        "block_shape": block_shape,
        "n_blocks": len(grid),
        "halo_overhead": grid.halo_overhead,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "contenders": results,
    }


def n_identical(labels: np.ndarray, expected: np.ndarray) -> int:
    """Return how many objects of `expected` are objects of `labels` with exactly the same voxels."""
    _, pairs, counts = _overlaps(labels, expected)
    sizes, expected_sizes = (np.bincount(array.ravel()) for array in (labels, expected))
    both = (pairs > 0).all(axis=0)
    a, b = pairs[:, both]
    return int(((sizes[a] == counts[both]) & (expected_sizes[b] == counts[both])).sum())


def n_voxels_that_differ(labels: np.ndarray, expected: np.ndarray) -> int:
    """Return how many voxels disagree when every object is matched to the one that it shares most with."""
    inverse, pairs, counts = _overlaps(labels, expected)
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    taken = {0}
    for k in np.argsort(-counts, kind="stable"):
        a, b = map(int, pairs[:, k])
        if a and b and a not in best and b not in taken:
            best[a] = (b, int(k))
            taken.add(b)
    agree = [best.get(int(a), (-1, 0))[0] == b for a, b in pairs.T]
    return int((~np.array(agree)[inverse]).sum())


def _overlaps(labels: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = np.stack([labels.ravel(), expected.ravel()]).astype(np.int64)
    pairs, inverse, counts = np.unique(both, axis=1, return_inverse=True, return_counts=True)
    return inverse.ravel(), pairs, counts


def _tiled(
    operator: cr.StarDist, image: np.ndarray, block_shape: tuple[int, ...], steps: dict[str, float]
) -> np.ndarray:
    grid = BlockGrid.regular(image.shape, block_shape, operator.halo(image.shape))
    labels = np.zeros(image.shape, np.int32)
    with _timed(steps, "detect"):
        tables = {block.index: operator.detect(image[block.read], block) for block in grid}
    steps["n_candidates"] = sum(len(table["prob"]) for table in tables.values())
    with _timed(steps, "settle and number"):
        objects = number_objects(operator, grid, tables)
    with _timed(steps, "paint"):
        for block in grid:
            labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


@contextlib.contextmanager
def _timed(steps: dict[str, float], name: str) -> Any:
    started = time.process_time()
    yield
    steps[name] = time.process_time() - started


def _model(operator: cr.StarDist) -> Any:
    return models.load(operator.model)


def _quietly(
    predict: Callable[..., Any], operator: cr.StarDist, image: np.ndarray, **kwargs: Any
) -> np.ndarray:
    from csbdeep.utils import normalize_mi_ma

    with contextlib.redirect_stdout(io.StringIO()):
        labels: np.ndarray = predict(
            normalize_mi_ma(image, *(operator.normalization or ())),
            prob_thresh=operator.prob_thresh,
            nms_thresh=operator.nms_thresh,
            **kwargs,
        )[0]
    return labels


def _big(
    operator: cr.StarDist, image: np.ndarray, block_shape: tuple[int, ...], largest: int
) -> dict[str, Any]:
    """Return arguments that make `predict_instances_big` advance by about `block_shape` per block.

    Its blocks include context and overlap; an axis that one block covers needs neither.
    """
    align = operator.halo(image.shape).align
    context = _model(operator)._axes_tile_overlap("ZYX")
    arguments: dict[str, list[int]] = {"block_size": [], "min_overlap": [], "context": []}
    for n, core, unit, around in zip(image.shape, block_shape, align, context, strict=True):
        overlap = -(-2 * largest // unit) * unit
        around = -(-around // unit) * unit
        size = core + overlap + 2 * around
        arguments["block_size"].append(size if size < n else -(-n // unit) * unit)
        arguments["min_overlap"].append(overlap if size < n else 0)
        arguments["context"].append(around if size < n else 0)
    return {"axes": "ZYX", "n_tiles": None, "show_progress": False} | {
        key: tuple(values) for key, values in arguments.items()
    }


def main() -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 256, 256))
    parser.add_argument("--block", type=int, nargs=3, default=(64, 128, 128))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = measure(tuple(arguments.shape), tuple(arguments.block), arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1, default=float) + "\n")
    print(f"{'':<22} {'wall s':>8} {'CPU s':>8} {'ratio':>6} {'objects':>8} {'identical':>10}")
    for name, figures in result["contenders"].items():
        print(
            f"{name:<22} {figures['wall_s']:8.1f} {figures['cpu_s']:8.1f} "
            f"{figures['cpu_ratio_to_reference']:6.2f} {figures['objects']:8d} {figures['identical_objects']:10d}"
        )


if __name__ == "__main__":
    main()

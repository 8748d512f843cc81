"""What does the classical pipeline cost when it is the same for every block grid, and what does it find?

Simulated nuclei that touch (`chunkrestore.simulate.embryo`, crowded everywhere), each contender in a process of its own
on one thread, from the same volume in memory:

- ``gaussian``: `scipy.ndimage.gaussian_filter` of the whole; ours in blocks with their halos (the same routine);
- ``local threshold``: scikit-image's `threshold_local` of the whole; ours in blocks (in float64);
- ``watershed``: SciPy's distance transform and Gaussian, scikit-image's `peak_local_max` and `watershed` of the whole;
  ours of the whole, and ours in blocks, with joining, numbering and painting. All begin with the same mask, and the
  landscapes are alike; scikit-image's seeds are peaks of a box that is as long as our ball is wide.

Prediction before the first measurement of blocks: the halo is 2 * 3 + 4 + 9 = 19 voxels, so cores of 96 read
(134 / 96)^3 = 2.7 voxels per voxel, fewer at the volume's border; pointers, half of the time, are sought in the core
and 3 voxels around it alone. So blocks take 1.5 times the time of the whole.

Reported: CPU seconds, megavoxels per second, ratios to the peer, peak memory of the process above its input per voxel,
whether blocks gave the whole volume's result bit by bit, and F1 at IoU 0.5 against the truth and the peer.
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
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from chunkrestore.grid import BlockGrid
from chunkrestore.metrics import match_instances
from chunkrestore.operators.smoothing import Gaussian
from chunkrestore.operators.threshold import LocalThreshold, Threshold
from chunkrestore.operators.watershed import Watershed
from chunkrestore.simulate import embryo
from chunkrestore.stitch.objects import number_objects

RESULTS = Path(__file__).parent / "results" / "classical.json"
SIGMA, WINDOW, MIN_DISTANCE = 1.0, 31, 3
LOCAL = LocalThreshold("gaussian", WINDOW)


def segmenter(value: float) -> Watershed:
    """Return our watershed: above the surroundings, and above a value that only leaves empty surroundings out."""
    return Watershed(value, local=LOCAL, min_distance=MIN_DISTANCE)


def filtered_in_blocks(operator: Gaussian, image: np.ndarray, core: int) -> np.ndarray:
    """Apply an image operator block by block."""
    result = np.empty(image.shape, np.float32)
    for block in BlockGrid.regular(image.shape, (core,) * 3, operator.halo(image.shape)):
        result[block.core] = operator(image[block.read], block)[block.trim]
    return result


def labelled_in_blocks(operator: Watershed | Threshold, image: np.ndarray, core: int) -> np.ndarray:
    """Segment block by block; tables of all blocks are in memory, as in a lazy array."""
    grid = BlockGrid.regular(image.shape, (core,) * 3, operator.halo(image.shape))
    objects = number_objects(operator, grid, {b.index: operator.detect(image[b.read], b) for b in grid})
    labels = np.empty(image.shape, np.int32)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


def flooded(mask: np.ndarray) -> np.ndarray:
    """Split the objects of a mask as is done with scikit-image, on a landscape like ours."""
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed

    height = np.minimum(ndimage.distance_transform_edt(mask), 3 * MIN_DISTANCE)
    height = ndimage.gaussian_filter(height, MIN_DISTANCE / 3)
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    peaks = peak_local_max(height, min_distance=MIN_DISTANCE, labels=parts, exclude_border=False)
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: np.ndarray = watershed(-height, markers, mask=mask)
    return labels.astype(np.int32)


def contenders(folder: Path, value: float, core: int) -> dict[str, Callable[[], np.ndarray]]:
    """Return what is measured, by name: of the raw image, of the smoothed one, and of its mask."""
    from skimage.filters import threshold_local

    smooth, ours = np.load(folder / "smooth.npy"), segmenter(value)
    raw = np.load(folder / "image.npy").astype(np.float32)
    mask = np.load(folder / "mask.npy")
    local = Threshold(local=LOCAL)
    # The mask is the peer's input, so ours is given one too: the threshold is measured by itself.
    masked, bare = mask.astype(np.uint8), Watershed(0.5, min_distance=MIN_DISTANCE)
    return {
        "gaussian, scipy": lambda: ndimage.gaussian_filter(raw, SIGMA),
        "gaussian, blocks": lambda: filtered_in_blocks(Gaussian(SIGMA), raw, core),
        "local threshold, scikit-image": lambda: ndimage.label(smooth > threshold_local(smooth, WINDOW))[0],
        "local threshold, blocks": lambda: labelled_in_blocks(local, smooth, core),
        "watershed, scikit-image": lambda: flooded(mask),
        "watershed, whole": lambda: bare(masked),
        "watershed, blocks": lambda: labelled_in_blocks(bare, masked, core),
        "threshold and watershed, blocks": lambda: labelled_in_blocks(ours, smooth, core),
    }


def run(name: str, folder: Path, value: float, core: int) -> dict[str, float]:
    """Run one contender in this process and keep what it returns."""
    chosen = contenders(folder, value, core)[name]
    # Compiled before the clock runs.
    Watershed(0.5)(np.eye(8, dtype=np.uint8)[:, np.newaxis])
    before = _memory_nbytes("VmRSS")
    start = time.process_time()
    result = chosen()
    cpu = time.process_time() - start
    np.save(folder / f"{name}.npy", result)
    return {
        "cpu_s": cpu,
        "megavoxels_per_s": result.size / cpu / 1e6,
        "peak_nbytes_per_voxel": (_memory_nbytes("VmHWM") - before) / result.size,
    }


def prepare(folder: Path, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, float]:
    """Write the volume in its three states; return the truth and the value."""
    volume = embryo(shape, seed=seed, arrangement="tissue")
    smooth = Gaussian(SIGMA)(volume.image)
    # Some photons above the dark: well below any nucleus.
    value = float(np.percentile(smooth, 1) + 0.25 * np.ptp(np.percentile(smooth, (1, 99))))
    for name, array in (("image", volume.image), ("smooth", smooth)):
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "mask.npy", (smooth > value) & (smooth > LOCAL(smooth)))
    return volume.labels, value


def measure(folder: Path, shape: tuple[int, ...], core: int, seed: int) -> dict[str, Any]:
    """Run all contenders and compare what they found."""
    truth, value = prepare(folder, shape, seed)
    results: dict[str, Any] = {}
    for name in contenders(folder, value, core):
        call = [sys.executable, __file__, "--folder", str(folder), "--run", name, "--value", repr(value)]
        done = subprocess.run(
            [*call, "--core", str(core)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:32s} {results[name]['cpu_s']:7.2f} CPU s", flush=True)

    def found(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy")

    def ratio(ours: str, peer: str) -> float:
        return float(results[peer]["cpu_s"] / results[ours]["cpu_s"])

    whole, peer = found("watershed, whole"), found("watershed, scikit-image")
    alone = Threshold(value, local=LOCAL)(np.load(folder / "smooth.npy"))
    return {
        "contenders": results,
        "times_as_fast_as_peer": {
            "gaussian": ratio("gaussian, blocks", "gaussian, scipy"),
            "local threshold": ratio("local threshold, blocks", "local threshold, scikit-image"),
            "watershed, whole": ratio("watershed, whole", "watershed, scikit-image"),
            "watershed, blocks": ratio("watershed, blocks", "watershed, scikit-image"),
        },
        "blocks_are_bitwise_the_whole": {
            "gaussian": np.array_equal(found("gaussian, blocks"), found("gaussian, scipy")),
            "watershed": np.array_equal(found("watershed, blocks"), whole),
            "threshold and watershed": np.array_equal(found("threshold and watershed, blocks"), whole),
        },
        "n_nuclei": len(np.unique(truth)) - 1,
        "n_objects": {
            "ours": int(whole.max()),
            "scikit-image": int(peer.max()),
            "threshold": int(alone.max()),
        },
        "f1": {
            "ours and truth": match_instances(truth, whole).f1,
            "scikit-image and truth": match_instances(truth, peer).f1,
            "threshold alone and truth": match_instances(truth, alone).f1,
            "ours and scikit-image": match_instances(peer, whole).f1,
        },
    }


def _memory_nbytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 224, 224))
    parser.add_argument("--core", type=int, default=96)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS)
    for hidden, kind in (("--folder", Path), ("--run", str), ("--value", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.folder, arguments.value, arguments.core)))
        return
    from environment import describe

    shape = tuple(arguments.shape)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), shape, arguments.core, arguments.seed)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "shape": shape,
        "megavoxels": math.prod(shape) / 1e6,
        "core": arguments.core,
        "sigma": SIGMA,
        "window": WINDOW,
        "min_distance": MIN_DISTANCE,
        "halo": Watershed(0.5, min_distance=MIN_DISTANCE).halo(shape).depth,
        "seed": arguments.seed,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result | figures, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()

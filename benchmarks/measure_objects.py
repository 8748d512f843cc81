"""What does it cost to measure objects, and does memory stay bounded for millions of them?

Speed: processor seconds per voxel of one block of 256**3 voxels with 2,704 objects that cover 39 % of it, for the label
kernel alone, and with one channel of uint16 or float32 intensities, against libraries that measure a whole array in
memory: scikit-image's ``regionprops_table`` (number of voxels, centroid, box, inertia tensor; mean, least and largest
intensity, standard deviation, weighted centroid), ``scipy.ndimage`` and ``dask_image.ndmeasure`` (mean, standard
deviation, least and largest intensity, centre of mass: no second moments, which they lack). dask-image gets a corner of
64 x 128 x 128 voxels, since it makes tasks for every label. All of them in one process, one thread, checked to agree on
means.

Prediction before the first measurement: 100 Mvoxel/s for the kernels, as reading zarr; scikit-image, which works object
by object, 2 Mvoxel/s; scipy 10 Mvoxel/s, since every measure is a pass of its own.

Memory: of a job in one process on labels of a million objects, 5 x 5 x 5 voxels each, with one channel of float32, and
how it grows from a hundred thousand objects; rows are checked against the formula that the labels were made by.
Prediction: 600 MiB, twice the sums of 2**18 rows above what the libraries take; no growth.

Outcome: 402 Mvoxel/s for labels, 216 with uint16 and 192 with float32, two to four times the prediction; scikit-image
10, scipy 3.2, dask-image 0.12. A million objects in 216 Mvoxel: 16 processor seconds, 585 MiB; a hundred thousand:
480 MiB, since they do not fill one range of labels.

Run: ``python benchmarks/measure_objects.py [--objects 1e5 1e6] [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import environment
import numpy as np

RESULTS = Path(__file__).parent / "results" / "measure_objects.json"


def scene(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of ellipsoids on a lattice, numbered in raster order, and noisy intensities."""
    cell = (16, 20, 20)
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    distance = sum(((x % c - c / 2) / (0.45 * c)) ** 2 for x, c in zip(grid, cell, strict=True))
    n_cells = [-(-n // c) for n, c in zip(shape, cell, strict=True)]
    number = ((grid[0] // cell[0]) * n_cells[1] + grid[1] // cell[1]) * n_cells[2] + grid[2] // cell[2] + 1
    labels = np.where(distance < 1, number, 0)
    present = np.unique(labels)
    labels = np.searchsorted(present, labels).astype(np.int32)
    return labels, np.random.default_rng(3).poisson(200, shape).astype(np.uint16)


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the processor seconds of the best of some calls, and what the last one gave."""
    best = math.inf
    for _ in range(repeats):
        started = time.process_time()
        result = function()
        best = min(best, time.process_time() - started)
    return best, result


def kernel_rates(labels: np.ndarray, image: np.ndarray, repeats: int) -> dict[str, Any]:
    """Return voxels per processor second of the kernels, compiled before."""
    from chunkrestore.kernels.object_measures import merge_intensities, merge_objects, trimmed
    from chunkrestore.kernels.object_sums import intensity_sums, object_sums

    table, pieces = object_sums(labels, (0, 0, 0))
    n = len(table["ids"])
    floats = image.astype(np.float32) * np.float32(0.37)
    intensity_sums(image, pieces, n), intensity_sums(floats, pieces, n)
    alone, _ = seconds(lambda: object_sums(labels, (0, 0, 0)), repeats)
    rates: dict[str, Any] = {"labels": labels.size / alone}
    for name, channel in {"uint16": image, "float32": floats}.items():
        spent, sums = seconds(lambda channel=channel: intensity_sums(channel, pieces, n), repeats)
        rates[f"labels + {name}"] = labels.size / (alone + spent)

        def merge(sums: dict[str, np.ndarray] = sums) -> dict[str, np.ndarray]:
            limbs = {kind: trimmed(sums[kind]) for kind in ("total", "square", "weighted")}
            _, grouping = merge_objects([(table, (0, 0, 0))])
            return merge_intensities([(limbs, sums["least"], sums["most"])], grouping)

        spent, merged = seconds(merge, repeats)
        rates[f"microseconds to merge an object, {name}"] = 1e6 * spent / n
        expected = np.bincount(labels.ravel(), channel.ravel())[1:] / table["volume"]
        np.testing.assert_allclose(merged["mean"], expected, rtol=1e-9)
    return rates


def library_rates(labels: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Return voxels per processor second of libraries, labels and one channel of uint16."""
    import dask
    import dask.array as da
    from dask_image import ndmeasure
    from scipy import ndimage
    from skimage.measure import regionprops_table

    wanted = ("label", "num_pixels", "centroid", "bbox", "inertia_tensor")
    wanted += ("intensity_mean", "intensity_min", "intensity_max", "intensity_std", "centroid_weighted")
    names = ("center_of_mass", "minimum", "maximum", "standard_deviation", "mean")

    def with_skimage(of: np.ndarray, x: np.ndarray, ids: np.ndarray) -> Any:
        return regionprops_table(of, x, properties=wanted)["intensity_mean"]

    def with_scipy(of: np.ndarray, x: np.ndarray, ids: np.ndarray) -> Any:
        return [getattr(ndimage, name)(x, of, ids) for name in names][-1]

    def with_dask(of: np.ndarray, x: np.ndarray, ids: np.ndarray) -> Any:
        lazy, of_lazy = da.from_array(x, chunks=128), da.from_array(of, chunks=128)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [getattr(ndmeasure, name)(lazy, of_lazy, ids) for name in names]
            return dask.compute(*found, scheduler="sync")[-1]

    rates = {}
    corner = (slice(64), slice(128), slice(128))
    for name, function, part in (
        ("scikit-image", with_skimage, ...),
        ("scipy", with_scipy, ...),
        ("dask-image", with_dask, corner),
    ):
        present = np.unique(labels[part])
        of, x = np.searchsorted(present, labels[part]).astype(np.int32), image[part]
        spent, means = seconds(partial(function, of, x, np.arange(1, len(present))), 1)
        expected = np.bincount(of.ravel(), x.ravel())[1:] / np.bincount(of.ravel())[1:]
        np.testing.assert_allclose(means, expected, rtol=1e-9)
        rates[name] = of.size / spent
    return rates


def many_shape(n_objects: int) -> tuple[int, int, int]:
    """Return the shape of a volume for cubes of 5 voxels at every sixth voxel, 50 x 50 of them in a plane."""
    return (6 * -(-n_objects // 2500), 300, 300)


def make_many(path: str, n_objects: int) -> None:
    """Write labels with ids 7, 14, ... and an image of a third of them."""
    from chunkrestore.ome_zarr import create_image, create_labels

    shape = many_shape(n_objects)
    within = np.arange(6) < 5
    pattern = within[:, None, None] & np.tile(within, 50)[:, None] & np.tile(within, 50)
    row = np.arange(2500).reshape(50, 50).repeat(6, axis=0).repeat(6, axis=1)
    chunks = (60, 150, 150)
    image = create_image(path, shape=shape, dtype="float32", axes="zyx", levels=1, chunks=chunks)
    labels = create_labels(path, "cells", shape=shape, dtype="int32", axes="zyx", chunks=chunks)
    for z in range(0, shape[0], 60):
        slabs = np.arange(z // 6, min(z + 60, shape[0]) // 6)
        ids = np.where(pattern, row + 2500 * slabs[:, None, None, None] + 1, 0) * 7
        found = ids.reshape(-1, *shape[1:]).astype(np.int32)
        region = (slice(z, z + len(found)), slice(0, 300), slice(0, 300))
        labels.target(0).write(0, 0, region, found)
        image.target(0).write(0, 0, region, found.astype(np.float32) / 3)
    image.publish()
    labels.publish()


def measure_many(path: str, n_objects: int) -> dict[str, Any]:
    """Measure them, and return time and peak memory of this process."""
    import pyarrow.parquet as parquet

    from chunkrestore.jobs.measure import measure

    shape, started = many_shape(n_objects), time.process_time()
    report = measure(path, "cells", cluster="serial", quiet=True)
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    place = f"{path}/labels/cells/objects.parquet"
    table, n = parquet.read_table(place), shape[0] // 6 * 2500
    assert len(table) == report.n_objects == n
    np.testing.assert_array_equal(table["label"], 7 * np.arange(1, n + 1))
    np.testing.assert_array_equal(table["n_voxels"], np.full(n, 125))
    np.testing.assert_array_equal(table["channel_0_mean"], np.float32(table["label"]) / np.float32(3))
    np.testing.assert_array_equal(table["centroid_x"], np.tile(6 * np.arange(50) + 2, n // 50))
    return {
        "n_objects": n,
        "n_voxels": math.prod(shape),
        "processor_seconds": round(spent, 1),
        "seconds": report.seconds,
        "peak_mebibytes": round(peak / 1024),
        "table_nbytes": Path(place).stat().st_size,
    }


def alone(what: str, path: str, n_objects: int) -> str:
    """Do one step in a process of its own, whose peak is its own; return what it prints."""
    command = [sys.executable, __file__, what, path, "--objects", str(n_objects)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=float, nargs="*", default=[1e5, 1e6])
    parser.add_argument("--quick", action="store_true", help="a small scene, and nothing is kept")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_many(arguments.make, int(arguments.objects[0]))
        return
    if arguments.measure:
        print(json.dumps(measure_many(arguments.measure, int(arguments.objects[0]))))
        return
    many = []
    for n_objects in map(
        int, arguments.objects
    ):  # first, as a process begins with the peak of the one that starts it
        with tempfile.TemporaryDirectory() as folder:
            alone("--make", f"{folder}/in.zarr", n_objects)
            many.append(json.loads(alone("--measure", f"{folder}/in.zarr", n_objects)))
    labels, image = scene((64, 128, 128) if arguments.quick else (256, 256, 256))
    found: dict[str, Any] = {
        "shape": labels.shape,
        "n_objects": int(labels.max()),
        "foreground": float((labels > 0).mean()),
        "kernels": kernel_rates(labels, image, 5),
        "libraries": library_rates(labels, image),
        "many": many,
    }
    print(json.dumps(found, indent=1))
    if not arguments.quick:
        RESULTS.write_text(json.dumps({"environment": environment.describe(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

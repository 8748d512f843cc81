"""Four gigavoxels on a laptop: simulate an embryo, restore it, segment it, score it. How long, and in how much memory?

An embryo of 1024 x 2048 x 2048 voxels (8.6 GB as a camera records it, 43 GB with labels and truth) goes through the
whole pipeline with the networks that are shipped, on two workers: `simulate` with labels and truth, `run` with CARE
into uint16, `run` with StarDist and a table of objects, `score` of all labels, and of a sixty-fourth of the raw and the
restored image in the middle.

Prediction before the first measurement: 800 processor seconds to simulate (5.4 megavoxels per second), 2500 to restore
(0.38 s per megavoxel, and blocks of 256 that are 1.55 times as large with their halo), 2400 to segment (0.5 s per
megavoxel, halo included), 15 to score a part of one image (0.22 s per megavoxel), 130 to match labels. Two workers
keep two cores busy, so wall times are half of that. TensorFlow needs most memory: 1.5 GB per worker, below 4 GB for
driver and workers together, whatever the volume's size.

Outcome: 948, 3285, 2863, 53 and 92 processor seconds, the two networks 1.3 and 1.2 times what was predicted. Memory was
predicted without looking at the plan, which says 6.3 GB per worker for CARE on blocks of this size: 7.5 GB were seen,
15 in all. (The default blocks, of 128 voxels, are planned with 1.2 GB per worker and 2.4 voxels read per voxel written,
not 1.6.) The scores of a small embryo hold: F1 0.994 for 347,445 nuclei.

Reported per stage: wall seconds, processor seconds of driver and workers, peak memory of all processes together and of
the largest one (resident without shared files, sampled twice a second), bytes on disk; then the scores.

Run: ``python benchmarks/gigavoxels.py FOLDER`` (needs 10 GB on disk there). After an interruption ``--only`` names
the stages that are left: the first of them goes on, and is timed from there; what is there of the others stays in the
results. ``--edge 128`` tries it on a small volume.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
from sampling import every

import chunkrestore as cr
from chunkrestore.jobs.simulating import simulate
from chunkrestore.ome_zarr import open_image
from chunkrestore.simulate import Camera, Embryo

RESULTS = Path(__file__).parent / "results" / "gigavoxels.json"
SEED = 2026
BLOCK = (256, 256, 256)
_SAMPLE_SECONDS = 0.5


class Memory:
    """Private memory of this process and of all that it started."""

    def __init__(self) -> None:
        self.total = self.largest = 0
        self._driver = psutil.Process()

    def sample(self) -> None:
        """Look once."""
        sizes = []
        for process in (self._driver, *self._driver.children(recursive=True)):
            try:
                # The unique set size would be exact; asking for it took 0.3 cores with workers of 7 GB.
                memory = process.memory_info()
                sizes.append(memory.rss - memory.shared)
            except psutil.Error:  # it has just ended
                continue
        self.total, self.largest = max(self.total, sum(sizes)), max(self.largest, *sizes)


def processor_seconds() -> float:
    """Return what this process and those that it waited for have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(stage: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run a stage; return its result, and what it took."""
    memory, wall, processor = Memory(), time.perf_counter(), processor_seconds()
    with every(_SAMPLE_SECONDS, memory.sample):
        result = stage()
    return result, {
        "wall_s": round(time.perf_counter() - wall, 1),
        "processor_s": round(processor_seconds() - processor, 1),
        "peak_mb": round(memory.total / 1e6),
        "peak_mb_of_one_process": round(memory.largest / 1e6),
    }


class Pipeline:
    """The stages, which go through stores in a folder."""

    def __init__(self, folder: Path, edge: int, n_workers: int) -> None:
        self.shape = (edge // 2, edge, edge)
        self.embryo, self.truth = folder / "embryo.ome.zarr", folder / "truth.ome.zarr"
        self.restored = folder / "restored.ome.zarr"
        self._shared: dict[str, Any] = {"cluster": "local", "n_workers": n_workers, "block_shape": BLOCK}
        self._models = files("chunkrestore") / "shipped_models"
        self._pedestal = Camera().pedestal

    def simulate(self) -> None:
        """Write image, labels and truth."""
        simulate(Embryo(self.shape, SEED), self.embryo, seed=SEED, truth=self.truth, **self._shared)

    def restore(self) -> None:
        """Restore it with CARE, in the camera's type."""
        care = cr.Care(str(self._models / "care3d-demo"))
        cr.run([care, cr.AsType("uint16")], self.embryo, self.restored, **self._shared)

    def segment(self) -> None:
        """Find the nuclei in the restored image."""
        # Restored, nothing but the embryo is brighter than this, and blocks outside it need no network.
        stardist = cr.StarDist(str(self._models / "stardist3d-demo"), skip_below=self._pedestal + 5)
        cr.run(stardist, self.restored, self.restored, label_name="nuclei", objects="table", **self._shared)

    def score_labels(self) -> dict[str, Any]:
        """Match the nuclei that were found with the true ones."""
        true, found = open_image(self.embryo).label("truth"), open_image(self.restored).label("nuclei")
        [matched] = cr.score(None, None, true_labels=true, labels=found, name="labels", **self._shared)
        return matched.describe()

    def score_restored(self) -> dict[str, Any]:
        """Compare the restored image with the truth."""
        return self._compared(self.restored, "restored")

    def score_raw(self) -> dict[str, Any]:
        """Compare the image as recorded with the truth."""
        return self._compared(self.embryo, "raw")

    def _compared(self, image: Path, name: str) -> dict[str, Any]:
        part = tuple(slice(n // 2 - n // 8, n // 2 + n // 8) for n in self.shape)
        [found] = cr.score(
            open_image(self.truth).select(region=part),
            open_image(image).select(region=part),
            true_labels=open_image(self.embryo).label("truth").select(region=part),
            background=self._pedestal,
            truth_background=self._pedestal,
            name=name,
            **self._shared,
        )
        return found.describe()


def main() -> None:
    """Run the stages and write what they took."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("simulate", "restore", "segment", "score_labels", "score_restored", "score_raw")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--edge", type=int, default=2048, help="voxels along y and x; half as many along z")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=stages, nargs="*")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(arguments.folder, arguments.edge, arguments.workers)
    results: dict[str, Any] = describe() | {
        "shape": pipeline.shape,
        "n_workers": arguments.workers,
        "stages": {},
    }
    if arguments.only and arguments.output.exists():
        results["stages"] = json.loads(arguments.output.read_text())["stages"]
    for name in arguments.only or stages:
        scores, took = measured(getattr(pipeline, name))
        results["stages"][name] = took | ({"scores": scores} if scores else {})
        print(name, json.dumps(results["stages"][name], indent=1), flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    stores = (pipeline.embryo, pipeline.truth, pipeline.restored)
    results["mb_on_disk"] = {
        store.name: round(sum(f.stat().st_size for f in store.rglob("*") if f.is_file()) / 1e6)
        for store in stores
        if store.exists()
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

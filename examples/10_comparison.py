"""Chapter 10, the comparison: classical pipeline against networks, with the truth at hand.

    python examples/10_comparison.py OUT

What ``chunkrestore compare`` does, in Python: every method restores the image, a watershed and StarDist segment
each result, and all of them are scored against the truth, block by block.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from chunkrestore.comparison import compare
from chunkrestore.jobs.simulating import simulate
from chunkrestore.psf import read_psf
from chunkrestore.simulate import Camera, Embryo


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (64, 128, 128),
    care: str | None = "care3d-demo",
    stardist: str | None = "stardist3d-demo",
    methods: tuple[str, ...] | None = None,
    cluster: str = "auto",
) -> dict[str, float]:
    """Write `out`/10_comparison with tables and pictures; return the most important numbers."""
    image, truth, psf = out / "10_embryo.ome.zarr", out / "10_truth.ome.zarr", out / "10_psf.tif"
    simulate(
        Embryo(shape, 900_003), image, seed=900_003, truth=truth, psf_file=psf, cluster=cluster, quiet=True
    )
    comparison = compare(
        image,
        out / "10_comparison",
        truth=truth,
        psf=read_psf(psf),
        background=Camera().pedestal,
        care=care,
        stardist=stardist,
        methods=methods,
        min_distance=1.6,
        smoothing=0.6,
        cluster=cluster,
        quiet=True,
    )
    print(comparison)
    shutil.copy(out / "10_comparison" / "comparison.png", out / "10_comparison.png")
    figures = {}
    for method in comparison.methods:
        if method.score is not None and method.score.image is not None:
            figures[f"{method.title}: PSNR, dB"] = method.score.image.psnr
        for found in method.segmentations:
            figures[f"{method.title}, {found.key}: F1 at IoU 0.5"] = found.at_half.f1
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.3f}")

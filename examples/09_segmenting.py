"""Chapter 9, segmenting: StarDist over blocks, the objects of one call, and a table with one row each.

python examples/09_segmenting.py OUT
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore.metrics import match_instances, same_instances
from chunkrestore.simulate import embryo


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (64, 128, 128),
    model: str = "stardist3d-demo",
    cluster: str = "auto",
) -> dict[str, float]:
    """Write `out`/09_nuclei.ome.zarr with labels and a table, and a picture; return scores and what tiling changed."""
    volume = embryo(shape, seed=13)
    store = out / "09_nuclei.ome.zarr"
    image = cr.write_image(volume.image, store, axes="zyx", voxel_size=volume.voxel_size, overwrite=True)
    block = tuple(n // 2 for n in shape)
    cr.run(
        cr.StarDist(model), store, store, label_name="nuclei", block_shape=block, cluster=cluster, quiet=True
    )
    cr.measure(
        store,
        "nuclei",
        output=out / "09_nuclei.csv",
        format="csv",
        overwrite=True,
        cluster=cluster,
        quiet=True,
    )

    tiled = np.asarray(cr.open_image(store).label("nuclei").data)
    untiled = np.asarray(cr.segment(volume.image, model))
    with open(out / "09_nuclei.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    score = match_instances(volume.labels, tiled)
    panels(
        out / "09_segmenting.png",
        [{"image": floats(middle(image.data)), "true nuclei": middle(volume.labels), "found": middle(tiled)}],
    )
    return {
        "true nuclei": score.n_true,
        "found": score.n_pred,
        "F1 at IoU 0.5": score.f1,
        "F1 at IoU 0.7": match_instances(volume.labels, tiled, iou=0.7).f1,
        "objects identical to one untiled call, voxel by voxel": same_instances(tiled, untiled).n_identical,
        "rows of the table": len(rows),
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

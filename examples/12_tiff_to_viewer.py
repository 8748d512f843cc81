"""Chapter 12, from TIFF to the viewer: convert, try on a part, do all of it, measure, look.

    python examples/12_tiff_to_viewer.py OUT [--view]

The same steps on the command line are in the tutorial.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tifffile
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore.simulate import embryo


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (64, 160, 160),
    model: str = "stardist3d-demo",
    cluster: str = "auto",
) -> dict[str, float]:
    """Write a TIFF file and everything that follows from it into `out`; return what was found."""
    volume = embryo(shape, seed=19)
    tifffile.imwrite(
        out / "12_stack.tif",
        volume.image,
        imagej=True,
        resolution=(1 / volume.voxel_size[2], 1 / volume.voxel_size[1]),
        metadata={"axes": "ZYX", "spacing": volume.voxel_size[0], "unit": "um"},
    )
    where = {"cluster": cluster, "quiet": True, "overwrite": True}
    stack, sharp = out / "12_stack.ome.zarr", out / "12_sharp.ome.zarr"
    cr.convert(out / "12_stack.tif", stack, **where)
    image = cr.open_image(stack)

    background = float(cr.percentiles(image.data, (1,))[0])
    lucy = cr.RichardsonLucy(volume.psf, iterations=20, background=background)
    part = tuple((n // 4, 3 * n // 4) for n in shape)
    cr.run(lucy, stack, out / "12_part.ome.zarr", region=part, **where)
    cr.run([lucy, cr.StarDist(model)], stack, sharp, label_name="nuclei", **where)
    cr.measure(sharp, "nuclei", images={"raw": stack, "sharp": sharp}, output=out / "12_nuclei.csv", format="csv",
               overwrite=True, cluster=cluster, quiet=True)  # fmt: skip

    labels = cr.open_image(sharp).label("nuclei")
    result = cr.open_image(sharp)
    panels(
        out / "12_tiff_to_viewer.png",
        [
            {"TIFF": floats(middle(volume.image)) - background, "deconvolved": floats(middle(result.data))},
            {"nuclei": middle(labels.data), "at half the resolution": middle(labels.level(1))},
        ],
    )
    if "--view" in sys.argv:
        cr.view(sharp, before=stack)
    return {
        "voxel size in y, um": image.voxel_size[1],
        "levels of the pyramid": len(result.levels),
        "nuclei": int(np.asarray(labels.data).max()),
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

"""Chapter 7, the receptive field: how far a network looks, by its layers and as measured.

    python examples/07_receptive_field.py OUT

One voxel of the input is changed, and what changes in the output is mapped, over all positions on the
network's pooling grid. What the layers allow is the halo that blocks need; what matters in practice is much
less.
"""

from __future__ import annotations

import sys
from pathlib import Path

from chunkrestore.train import receptive_field

MODELS = ("care3d-demo", "stardist3d-demo")


def main(out: Path, *, models: tuple[str, ...] = MODELS) -> dict[str, float]:
    """Draw `out`/07_MODEL.png; return the extents along x in voxels."""
    figures = {}
    for model in models:
        field = receptive_field(model, voxel_size=(0.4, 0.4, 0.4))
        field.draw(out / f"07_{Path(model).name}.png")
        name = Path(model).name
        figures[f"{name}: halo that the layers ask for"] = field.theoretical[-1]
        figures[f"{name}: farthest voxel that was seen to matter"] = max(field.reach[-1])
        figures[f"{name}: radius that holds 99 % of the influence"] = field.effective[-1]
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

"""Chapter 8, training StarDist: objects from simulated labels, thresholds on what was held back.

python examples/08_training_stardist.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore import train
from chunkrestore.metrics import match_instances
from chunkrestore.simulate import SimulatedVolume, embryo
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.pairs import Pair


def pair(out: Path, volume: SimulatedVolume, name: str) -> Pair:
    """Store a volume with its labels; return what is learnt from it."""
    store = out / f"{name}.ome.zarr"
    image = cr.write_image(volume.image, store, axes="zyx", voxel_size=volume.voxel_size, overwrite=True)
    cr.write_labels(volume.labels, store, name="truth", like=image, overwrite=True)
    return Pair(store, labels="truth")


def main(
    out: Path, *, shape: tuple[int, int, int] = (64, 160, 160), n_volumes: int = 4, steps: int = 2000
) -> dict[str, float]:
    """Train `out`/08_stardist; return its scores on a volume that it has not seen."""
    pairs = [pair(out, embryo(shape, seed=700 + i), f"08_pair_{i}") for i in range(n_volumes)]
    patches = draw_patches(pairs, (32, 64, 64), 16 * n_volumes, seed=2)
    schedule = train.Schedule(steps=steps, learning_rate=2e-3, patch_shape=(32, 64, 64))
    network = train.StarDistNetwork(n_rays=32, grid=2, n_first=8, n_features=32)
    trained = train.train_stardist(patches, out / "08_stardist", seed=2, schedule=schedule, network=network)
    train.optimize_thresholds(trained.folder, patches.x_validation[:2], patches.y_validation[:2])
    validation, field = train.validate(trained.folder, patches), train.receptive_field(trained.folder)
    card = train.model_card(trained, patches, validation=validation, field=field)
    train.training_report(trained, card, validation=validation, field=field)

    unseen = embryo(shape, seed=800)
    found = np.asarray(cr.segment(unseen.image, trained.folder))
    score = match_instances(unseen.labels, found)
    panels(
        out / "08_training_stardist.png",
        [
            {
                "camera": floats(middle(unseen.image)),
                "true nuclei": middle(unseen.labels),
                "found": middle(found),
            }
        ],
    )
    return {
        "patches": len(patches),
        "seconds of training": trained.history.seconds,
        "true nuclei": score.n_true,
        "found": score.n_pred,
        "F1 at IoU 0.5": score.f1,
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

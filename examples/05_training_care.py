"""Chapter 5, training CARE: pairs drawn from simulated stores, a network, its card and its report.

    python examples/05_training_care.py OUT

Volumes are simulated into OME-Zarr, patches are drawn from them block by block, and a small CARE network
learns to turn the camera's image into the truth. The result is an ordinary CSBDeep model folder with a model
card and a report.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore import train
from chunkrestore.metrics import psnr
from chunkrestore.simulate import SimulatedVolume, embryo
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.pairs import Pair


def pair(out: Path, volume: SimulatedVolume, name: str) -> Pair:
    """Store a volume and its truth in counts; return what is learnt from them."""
    image, truth = out / f"{name}.ome.zarr", out / f"{name}_truth.ome.zarr"
    for store, array in ((image, volume.image), (truth, volume.reference)):
        cr.write_image(array, store, axes="zyx", voxel_size=volume.voxel_size, overwrite=True)
    return Pair(image, truth)


def main(
    out: Path, *, shape: tuple[int, int, int] = (64, 160, 160), n_volumes: int = 3, steps: int = 600
) -> dict[str, float]:
    """Train `out`/05_care; return PSNR before and after on a volume that it has not seen."""
    pairs = [pair(out, embryo(shape, seed=500 + i), f"05_pair_{i}") for i in range(n_volumes)]
    patches = draw_patches(pairs, (32, 48, 48), 40 * n_volumes, seed=1)
    schedule = train.Schedule(steps=steps, learning_rate=1e-3, batch_size=2, patch_shape=(24, 48, 48))
    trained = train.train_care(
        patches, out / "05_care", seed=1, schedule=schedule, network=train.CareNetwork(n_first=8)
    )
    validation, field = train.validate(trained.folder, patches), train.receptive_field(trained.folder)
    card = train.model_card(trained, patches, validation=validation, field=field)
    train.training_report(trained, card, validation=validation, field=field)

    unseen = embryo(shape, seed=600)
    restored = cr.restore(unseen.image, trained.folder)
    images = {"camera": unseen.image, "restored": restored, "truth": unseen.reference}
    panels(
        out / "05_training_care.png",
        [{name: floats(middle(image, axis)) for name, image in images.items()} for axis in (0, 1)],
    )
    return {
        "patches": len(patches),
        "seconds of training": trained.history.seconds,
        "first loss": float(np.mean(trained.loss[: steps // 10])),
        "last loss": float(np.mean(trained.loss[-steps // 10 :])),
        "PSNR of the camera's image, dB": psnr(unseen.reference, unseen.image),
        "PSNR restored, dB": psnr(unseen.reference, restored),
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

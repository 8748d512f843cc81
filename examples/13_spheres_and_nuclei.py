"""Chapter 13, a question: does a network that was trained on spheres restore nuclei?

    python examples/13_spheres_and_nuclei.py OUT

Two CARE networks of the same size see the same number of patches, one of spheres of even brightness, the
other of nuclei with texture; both go through the same microscope. Each then restores both kinds of volumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

from chunkrestore import train
from chunkrestore.api import deconvolve, restore
from chunkrestore.metrics import psnr
from chunkrestore.simulate import Camera, Nuclei, SimulatedVolume, embryo, forward, light_sheet_psf
from chunkrestore.simulate.shapes import Spheres

KINDS = ("spheres", "nuclei")


def volume(kind: str, shape: tuple[int, int, int], seed: int) -> SimulatedVolume:
    """Return a volume of spheres or of nuclei, of the same sizes and brightness."""
    if kind == "nuclei":
        return embryo(shape, seed=seed, nuclei=Nuclei(), arrangement="tissue")
    psf = light_sheet_psf()
    labels, truth = Spheres(shape, seed, radius=(5.0, 9.0), photons=(4.0, 14.0)).render([slice(None)] * 3)
    return SimulatedVolume(labels, truth, forward(truth, psf, seed=seed, camera=Camera()), psf)


def trained_on(kind: str, out: Path, shape: tuple[int, int, int], n_volumes: int, steps: int) -> Path:
    """Train a network on volumes of one kind."""
    volumes = [volume(kind, shape, 900 + i) for i in range(n_volumes)]
    limits = [np.percentile(v.image, (2, 99.8)) for v in volumes]
    patches = train.patches_of(
        [train.normalize(v.image, *lim) for v, lim in zip(volumes, limits, strict=True)],
        [train.normalize(v.reference, *lim) for v, lim in zip(volumes, limits, strict=True)],
        (32, 48, 48),
    )
    schedule = train.Schedule(steps=steps, learning_rate=1e-3, batch_size=2, patch_shape=(24, 48, 48))
    network = train.CareNetwork(n_first=8)
    return train.train_care(
        patches, out / f"13_care_{kind}", seed=3, schedule=schedule, network=network
    ).folder


def main(
    out: Path, *, shape: tuple[int, int, int] = (64, 144, 144), n_volumes: int = 4, steps: int = 800
) -> dict[str, float]:
    """Draw `out`/13_spheres_and_nuclei.png; return the PSNR of either network on either kind."""
    networks = {kind: trained_on(kind, out, shape, n_volumes, steps) for kind in KINDS}
    figures, rows = {}, []
    for kind in KINDS:
        unseen = volume(kind, shape, 990)
        pedestal = unseen.camera.pedestal
        lucy = deconvolve(unseen.image, unseen.psf, background=pedestal, iterations=40, total_variation=0.01)
        images = {
            "camera": unseen.image,
            "40 iterations, total variation": lucy + np.float32(pedestal),
            **{f"trained on {name}": restore(unseen.image, folder) for name, folder in networks.items()},
        }
        figures |= {
            f"{kind}, {name}, PSNR dB": psnr(unseen.reference, image) for name, image in images.items()
        }
        rows.append({f"{kind}: {name}": floats(middle(image)) for name, image in images.items()})
        rows[-1][f"{kind}: truth"] = floats(middle(unseen.reference))
    panels(out / "13_spheres_and_nuclei.png", rows)
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.2f}")

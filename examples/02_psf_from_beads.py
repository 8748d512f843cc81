"""Chapter 2, the point spread function from beads: averaged, distilled, and what an error in it costs.

    python examples/02_psf_from_beads.py OUT

A field of beads is imaged by a light-sheet microscope whose true point spread function we know, since we
compute it from its optics. Beads are found, averaged and distilled; each result deconvolves the same image of
nuclei.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore.metrics import psnr
from chunkrestore.psf import LightSheet, Optics, average_beads, distill_psf, find_beads, gaussian, light_sheet
from chunkrestore.psf.shape import pad_or_crop
from chunkrestore.simulate import Camera, embryo, forward

VOXEL_SIZE = (0.4, 0.16, 0.16)
OPTICS = Optics(numerical_aperture=0.8, emission_um=0.52, immersion_index=1.333, excitation_um=0.488)


def bead_image(shape: tuple[int, int, int], psf: np.ndarray, n_beads: int, camera: Camera) -> np.ndarray:
    """Return counts of point-like beads at random places."""
    rng = np.random.default_rng(3)
    truth = np.zeros(shape, np.float32)
    margin = [n // 2 for n in psf.shape]
    places = tuple(rng.integers(m, n - m, n_beads) for m, n in zip(margin, shape, strict=True))
    truth[places] = rng.uniform(15_000, 20_000, n_beads)
    return forward(truth, psf, seed=4, camera=camera)


def main(out: Path, *, shape: tuple[int, int, int] = (48, 128, 128), n_beads: int = 40) -> dict[str, float]:
    """Draw `out`/02_psf_from_beads.png; return the error of every estimate and the PSNR that it leads to."""
    true = light_sheet(OPTICS, VOXEL_SIZE, LightSheet(waist_um=2.0), shape=(21, 25, 25))
    true, camera = np.asarray(true / true.sum(), np.float32), Camera()
    image = bead_image((64, 192, 192), true, n_beads, camera)
    beads = find_beads(image, voxel_size=VOXEL_SIZE, psf_shape=true.shape)
    estimates = {
        "true": true,
        "averaged": average_beads(image, beads).psf,
        "distilled": distill_psf(image, beads).psf,
        "a Gaussian, too wide": pad_or_crop(gaussian((3.0, 2.5, 2.5)), true.shape),
    }
    volume = embryo(shape, seed=5, psf=true, camera=camera)
    signal = volume.truth * np.float32(camera.gain)
    figures = {"beads found": float(len(beads)), "beads used": float(beads.n_used)}
    rows: list[dict[str, np.ndarray]] = [{}, {}]
    for name, psf in estimates.items():
        psf = np.asarray(psf / psf.sum(), np.float32)
        figures[f"error of the PSF, {name}, %"] = 100 * float(
            np.linalg.norm(psf - true) / np.linalg.norm(true)
        )
        result = cr.deconvolve(volume.image, psf, iterations=20, background=camera.pedestal)
        figures[f"PSNR with the PSF {name}, dB"] = psnr(signal, result)
        rows[0][f"PSF, {name} (square root)"] = np.sqrt(floats(middle(psf, 1)))
        rows[1][f"deconvolved with: {name}"] = floats(middle(result))
    top = float(np.percentile(signal, 99.8))
    panels(out / "02_psf_from_beads.png", rows, limits=[(0.0, float(np.sqrt(true.max()))), (0.0, top)])
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.2f}")

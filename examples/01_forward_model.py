"""Chapter 1, the forward model: what a light-sheet microscope makes of an embryo.

    python examples/01_forward_model.py OUT

The truth is blurred by the point spread function, photons arrive one by one, and a camera turns them into
counts:

    image = gain * Poisson(psf * truth + background) + offset + read noise

Everything belongs to its place in the volume, so that a dask array of any chunking gives the same image, bit
by bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dask.array as da
import numpy as np
from drawing import floats, middle, panels

from chunkrestore.metrics import psnr
from chunkrestore.simulate import Camera, Nuclei, blur, embryo, forward, light_sheet_psf

BRIGHTNESS = {"2 photons": 0.25, "10 photons": 1.0, "100 photons": 10.0}
"""Photons of a voxel of an ordinary nucleus, and the factor on the default that gives it."""


def main(out: Path, *, shape: tuple[int, int, int] = (64, 160, 160)) -> dict[str, float]:
    """Draw `out`/01_forward_model.png; return the PSNR of every image and whether chunks made a difference."""
    psf, camera = light_sheet_psf(), Camera()
    volume = embryo(shape, seed=1, nuclei=Nuclei(), psf=psf, camera=camera)
    figures, images = {}, {}
    for name, factor in BRIGHTNESS.items():
        truth = volume.truth * np.float32(factor)
        image = forward(truth, psf, seed=2, camera=camera)
        signal = (image - np.float32(camera.pedestal)) / np.float32(camera.gain)
        figures[f"PSNR at {name}, dB"] = psnr(truth, signal)
        images[name] = signal / np.float32(factor)

    chunked = forward(da.from_array(volume.truth, chunks=(24, 50, 37)), psf, seed=2, camera=camera)
    whole = forward(volume.truth, psf, seed=2, camera=camera)
    figures["voxels that differ between chunked and whole"] = float((chunked.compute() != whole).sum())

    blurred = blur(volume.truth, psf)
    sharp = {"truth": volume.truth, "blurred": blurred, **images}
    panels(
        out / "01_forward_model.png",
        [{name: floats(middle(image, axis)) for name, image in sharp.items()} for axis in (0, 1)],
        limits=[(0.0, float(np.percentile(volume.truth, 99.8)))] * 2,
    )
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.2f}")

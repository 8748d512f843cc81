"""Chapter 3, Wiener and Richardson-Lucy: what each makes of the same image, and how fast.

python examples/03_deconvolution.py OUT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore.metrics import psnr, ssim
from chunkrestore.simulate import embryo

METHODS = {
    "Wiener": {"method": "wiener"},
    "regularised inverse": {"method": "regularized-inverse"},
    "Richardson-Lucy, plain": {"acceleration": None},
    "Richardson-Lucy, heavy ball": {},
    "with total variation": {"total_variation": 0.01, "iterations": 40},
    "gradient consensus": {"method": "gradient-consensus"},
    "Wiener-Butterworth": {"method": "wiener-butterworth"},
}


def main(out: Path, *, shape: tuple[int, int, int] = (64, 128, 128)) -> dict[str, float]:
    """Draw `out`/03_deconvolution.png; return PSNR, SSIM and seconds of every method."""
    volume = embryo(shape, seed=7)
    signal = volume.truth * np.float32(volume.camera.gain)
    raw = volume.image - np.float32(volume.camera.pedestal)
    results, figures = {"raw": raw}, {}
    for name, parameters in METHODS.items():
        began = time.process_time()
        results[name] = cr.deconvolve(
            volume.image, volume.psf, background=volume.camera.pedestal, **parameters
        )
        figures[f"{name}, processor s"] = time.process_time() - began
    for name, result in results.items():
        figures[f"{name}, PSNR dB"] = psnr(signal, result)
        figures[f"{name}, SSIM"] = ssim(signal, np.maximum(result, 0))
    results["truth"] = signal
    planes = {name: floats(middle(image)) for name, image in results.items()}
    names, top = list(planes), float(np.percentile(signal, 99.8))
    panels(
        out / "03_deconvolution.png",
        [{name: planes[name] for name in some} for some in (names[:5], names[5:])],
        limits=[(0.0, top)] * 2,
    )
    return figures


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.2f}")

"""Chapter 4, design trade-offs: iterations, size of the point spread function, halo, regularisation.

    python examples/04_trade_offs.py OUT

Four questions that everybody has who deconvolves in blocks, each answered by a curve: when to stop; how much
of the point spread function to keep; how deep the halo has to be; how much total variation is good.
"""

from __future__ import annotations

import sys
from pathlib import Path

import dask.array as da
import numpy as np
from drawing import curves

import chunkrestore as cr
from chunkrestore.metrics import psnr, seam_error
from chunkrestore.psf import pad_or_crop
from chunkrestore.simulate import embryo


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (64, 128, 128),
    iterations: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20, 30, 50),
    strengths: tuple[float, ...] = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
) -> dict[str, float]:
    """Draw the four curves `out`/04_*.png; return the best of each."""
    volume = embryo(shape, seed=9)
    background, psf = volume.camera.pedestal, volume.psf
    signal = volume.truth * np.float32(volume.camera.gain)

    def quality(psf: np.ndarray, **parameters: object) -> float:
        return psnr(signal, cr.deconvolve(volume.image, psf, background=background, **parameters))

    plain = [quality(psf, iterations=n, acceleration=None) for n in iterations]
    fast = [quality(psf, iterations=n) for n in iterations]
    curves(
        out / "04_iterations.png",
        {"plain": (iterations, plain), "heavy ball": (iterations, fast)},
        x="iterations",
        y="PSNR, dB",
        log=True,
    )

    kept = [3, 5, 7, 9, 11, 15]
    sizes = [tuple(min(round(n * k / 15) // 2 * 2 + 1, n) for n in psf.shape) for k in kept]
    cropped = [pad_or_crop(psf, size) for size in sizes]
    share = [100 * float(c.sum() / psf.sum()) for c in cropped]
    small = [quality(np.asarray(c / c.sum(), np.float32), iterations=12) for c in cropped]
    curves(
        out / "04_psf_size.png", {"12 iterations": (share, small)}, x="light inside the PSF, %", y="PSNR, dB"
    )

    whole = cr.deconvolve(volume.image, psf, iterations=20, background=background)
    chunks = tuple(n // 2 for n in shape)
    blocks = da.from_array(volume.image, chunks=chunks)
    depths, seams = (0, 2, 4, 8, 12, 16, 24), []
    for depth in depths:
        tiled = cr.deconvolve(blocks, psf, iterations=20, background=background, depth=depth).compute()
        edges = [[0, n // 2, n] for n in shape]
        seams.append(max(seam_error(tiled, whole, edges).relative_rms, 1e-8))
    curves(
        out / "04_halo.png",
        {"seams": (depths, np.log10(seams)), "tolerance": (depths, [-3.0] * len(depths))},
        x="halo, voxels",
        y="log10 of the seam error (rms, of the dynamic range)",
    )

    regularised = [quality(psf, iterations=40, total_variation=strength) for strength in strengths]
    curves(
        out / "04_total_variation.png",
        {"40 iterations": (strengths, regularised)},
        x="strength of total variation",
        y="PSNR, dB",
    )
    return {
        "best number of plain iterations": iterations[int(np.argmax(plain))],
        "best number of heavy-ball iterations": iterations[int(np.argmax(fast))],
        "PSNR lost by keeping a third of the PSF's extent, dB": small[-1] - small[1],
        "seam without a halo, %": 100 * seams[0],
        "seam with a halo of 16, %": 100 * seams[-2],
        "best strength of total variation": strengths[int(np.argmax(regularised))],
        "gain of total variation, dB": max(regularised) - regularised[0],
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

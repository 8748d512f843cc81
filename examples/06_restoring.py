"""Chapter 6, restoring with CARE: on images, in blocks, and against 200 iterations of Richardson-Lucy.

    python examples/06_restoring.py OUT

Is applying CARE faster than 200 iterations of Richardson-Lucy on the same image? Both are timed here, after a
first call that loads what has to be loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from drawing import floats, middle, panels

import chunkrestore as cr
from chunkrestore.metrics import psnr
from chunkrestore.simulate import embryo


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the processor seconds that it took; a first call is not counted."""
    function()
    began = time.process_time()
    return function(), time.process_time() - began


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (64, 128, 128),
    iterations: int = 200,
    model: str = "care3d-demo",
) -> dict[str, float]:
    """Draw `out`/06_restoring.png; return PSNR and processor seconds, and what tiling changed."""
    volume = embryo(shape, seed=11)
    signal, pedestal = volume.truth * np.float32(volume.camera.gain), volume.camera.pedestal
    restored, care_s = timed(lambda: cr.restore(volume.image, model))
    total_variation: dict[str, Any] = {"iterations": 40, "total_variation": 0.01}
    slow, slow_s = timed(
        lambda: cr.deconvolve(
            volume.image, volume.psf, iterations=iterations, acceleration=None, background=pedestal
        )
    )
    best, best_s = timed(
        lambda: cr.deconvolve(volume.image, volume.psf, background=pedestal, **total_variation)
    )
    tiled = cr.restore(da.from_array(volume.image, chunks=tuple(n // 2 for n in shape)), model).compute()
    images = {
        "raw": volume.image - np.float32(pedestal),
        f"Richardson-Lucy, {iterations}": slow,
        "40 and total variation": best,
        "CARE": restored - np.float32(pedestal),
        "truth": signal,
    }
    panels(
        out / "06_restoring.png",
        [{name: floats(middle(image, axis)) for name, image in images.items()} for axis in (0, 1)],
        limits=[(0.0, float(np.percentile(signal, 99.8)))] * 2,
    )
    figures = {f"{name}, PSNR dB": psnr(signal, image) for name, image in images.items() if name != "truth"}
    return figures | {
        "CARE, processor s": care_s,
        f"Richardson-Lucy, {iterations}, processor s": slow_s,
        "40 and total variation, processor s": best_s,
        "largest difference of tiled CARE, counts": float(np.abs(tiled - restored).max()),
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.4g}")

"""Chapter 14, a question: why do neighbours of a big bright object restore worse?

    python examples/14_bright_neighbours.py OUT

Small dim spheres lie at growing distances from a big one, which is given one to a hundred times their
brightness; the relative error of the small ones is measured after Richardson-Lucy and after CARE.
Explanations are told apart by changing one thing at a time: an image with the same mean but without noise
(what is left is blur that was not undone); CARE normalised as for the image in which all spheres are alike
(what is left is not a matter of the range that the network sees).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from drawing import curves, floats, middle, panels

from chunkrestore.api import deconvolve, restore
from chunkrestore.simulate import Camera, blur, forward, light_sheet_psf

RADIUS, SMALL = 16, 4
GAPS = (2, 5, 8, 12, 16, 22, 30)
"""Voxels between the surface of the big sphere and that of each small one."""
PHOTONS = 8.0
"""Of a voxel of a small sphere."""


def scene(shape: tuple[int, int, int], brightness: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return photons per voxel, and where the small spheres are, by distance."""
    grid = np.indices(shape, dtype=np.float32)
    centre = np.array([n // 2 for n in shape])

    def ball(middle: np.ndarray, radius: float) -> np.ndarray:
        return np.sqrt(sum((g - m) ** 2 for g, m in zip(grid, middle, strict=True))) <= radius

    truth = np.float32(brightness * PHOTONS) * ball(centre, RADIUS).astype(np.float32)
    small = []
    for i, gap in enumerate(GAPS):
        angle = 2 * np.pi * i / len(GAPS)
        place = centre + (RADIUS + gap + SMALL) * np.array([0.0, np.sin(angle), np.cos(angle)])
        small.append(ball(place, SMALL))
        truth[small[-1]] = PHOTONS
    return truth, small


def errors(truth: np.ndarray, result: np.ndarray, small: list[np.ndarray]) -> list[float]:
    """Return the rms error within each small sphere, in units of its brightness, in per cent."""
    return [100 * float(np.sqrt(np.mean((result[where] - truth[where]) ** 2))) / PHOTONS for where in small]


def main(
    out: Path,
    *,
    shape: tuple[int, int, int] = (48, 144, 144),
    model: str = "care3d-demo",
    brightness: tuple[float, ...] = (1.0, 10.0, 100.0),
) -> dict[str, float]:
    """Draw `out`/14_*.png; return the errors of the nearest and of the farthest neighbour."""
    psf, camera = light_sheet_psf(), Camera(read_noise=2.0)
    alike = forward(scene(shape, 1.0)[0], psf, seed=1, camera=camera)
    limits = tuple(float(p) for p in np.percentile(alike, (2, 99.8)))
    lines: dict[str, dict[str, tuple[tuple[int, ...], list[float]]]] = {"lucy": {}, "care": {}}
    rows = []
    for factor in brightness:
        truth, small = scene(shape, factor)
        image = forward(truth, psf, seed=1, camera=camera)
        # The same mean, without noise of photons and of the camera.
        quiet = np.float32((blur(truth, psf) + camera.background) * camera.gain + camera.offset)
        lucy = {
            kind: deconvolve(recorded, psf, background=camera.pedestal, iterations=n, acceleration=None)
            for kind, recorded, n in (
                ("", image, 50),
                (", no noise", quiet, 50),
                (", no noise, 200 iterations", quiet, 200),
            )
        }
        care = {
            "": restore(image, model) - camera.pedestal,
            ", range of the small ones": restore(image, model, normalization=limits) - camera.pedestal,
        }
        for method, results in (("lucy", lucy), ("care", care)):
            for kind, result in results.items():
                lines[method][f"{factor:g} times as bright{kind}"] = (
                    GAPS,
                    errors(truth, result / camera.gain, small),
                )
        planes = {
            "camera": (image - camera.pedestal) / camera.gain,
            "Richardson-Lucy": lucy[""] / camera.gain,
            "CARE": care[""] / camera.gain,
            "CARE, range of the small ones": care[", range of the small ones"] / camera.gain,
            "truth": truth,
        }
        rows.append({f"{factor:g} times: {title}": floats(middle(plane)) for title, plane in planes.items()})
    for method, of_method in lines.items():
        title = {"lucy": "50 iterations", "care": "CARE"}[method]
        curves(
            out / f"14_{method}.png",
            of_method,
            x="gap to the big sphere, voxels",
            y=f"error of a small sphere after {title}, %",
        )
    panels(out / "14_bright_neighbours.png", rows, limits=[(0.0, 1.5 * PHOTONS)] * len(rows))
    return {
        f"{method}, {name}: {which}, %": values[i]
        for method, of_method in lines.items()
        for name, (_, values) in of_method.items()
        for which, i in (("nearest", 0), ("farthest", -1))
    }


if __name__ == "__main__":
    for name, figure in main(Path(sys.argv[1])).items():
        print(f"{name}: {figure:.1f}")

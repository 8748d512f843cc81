"""Which deconvolution method gives the best image, after how many iterations, and in how many seconds?

Every method runs with the parameters that its operator chooses by itself; iterative ones run for 1, 2, 3, 5,
8, 12, 20, 30 and 50 iterations without stopping, and once more as they stop by themselves. Two scenes: nuclei
that run across the field of view (simulated here, truth known, three light levels), and, with ``--bars``, the hollow
bars of the EPFL Biomedical Imaging Group (files ``bars_25pct_{data,kernel,actual}.tif``; their intensities
are on different scales, so figures are taken after the closest linear scaling, and its kernel is centred first, as
``psf check`` advises: it lies 0.46, 0.29 and 0.29 voxels off, which costs 3.8 dB after 50 iterations).

Prediction before the first run: per iteration count, matched methods are equal to 0.1 dB but for acceleration;
Wiener-Butterworth and masked Wiener reach 20 plain iterations in 5 and then fall; total variation gains 1 dB
at 20 photons and nothing at 1000; gradient consensus does not fall; one-pass filters end 1 to 3 dB lower.

Reported: PSNR, SSIM, the period at which the Fourier shell correlation with the truth falls to 1/2 (in
voxels), wall and CPU seconds. ``--figures`` draws them against iterations and seconds, and sections.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from richardson_lucy import scene

from chunkrestore.metrics import fsc, psnr, ssim
from chunkrestore.operators.methods import deconvolution
from chunkrestore.psf import centre, gaussian, prepare

RESULTS = Path(__file__).parent / "results" / "deconvolution_methods.json"
COUNTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Richardson-Lucy, plain": ("richardson-lucy", {"acceleration": None}),
    "Richardson-Lucy, heavy ball": ("richardson-lucy", {}),
    "Richardson-Lucy, total variation": ("richardson-lucy", {"total_variation": 0.005}),
    "gradient consensus": ("gradient-consensus", {}),
    "Wiener-Butterworth": ("wiener-butterworth", {}),
    "masked Wiener": ("masked-wiener", {}),
    "Wiener": ("wiener", {}),
    "regularised inverse": ("regularized-inverse", {}),
}
ONE_PASS = ("Wiener", "regularised inverse")


@dataclass(frozen=True)
class Scene:
    """An image whose truth is known."""

    name: str
    truth: np.ndarray
    image: np.ndarray
    psf: np.ndarray

    def figures(self, result: np.ndarray) -> dict[str, float]:
        """Return how close a result is to the truth, after the closest linear scaling."""
        scale = float((self.truth * result).sum(dtype=np.float64) / np.square(result, dtype=np.float64).sum())
        scaled = result * np.float32(scale)
        correlation = fsc(self.truth, scaled, voxel_size=(1.0,) * result.ndim)
        return {
            "psnr_db": psnr(self.truth, scaled),
            "ssim": ssim(self.truth, scaled),
            "fsc_half_period_voxels": correlation.resolution_um(0.5),
            "light": float(result.sum(dtype=np.float64) / self.image.sum(dtype=np.float64)),
        }


def scenes(shape: Sequence[int], bars: Path | None) -> list[Scene]:
    """Return all scenes."""
    psf = gaussian((3.0, 1.6, 1.6), truncate=3.0, tail=0.15, tail_sigma=(5.0, 5.0, 5.0))
    found = []
    for photons in (20, 100, 1000):
        truth, image = scene(tuple(shape), psf, photons=float(photons))  # type: ignore[arg-type]
        found.append(Scene(f"nuclei, {photons} photons", truth, image, psf))
    if bars is not None:
        import tifffile

        data, kernel, truth = (
            tifffile.imread(bars / f"bars_25pct_{name}.tif").astype(np.float32)
            for name in ("data", "kernel", "actual")
        )
        found.append(
            Scene(
                "EPFL bars",
                truth * np.float32(data.sum() / truth.sum()),
                data,
                prepare(centre(prepare(kernel))),
            )
        )
    return found


def measure(one: Scene, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Run every method on a scene."""
    methods: dict[str, Any] = {}
    for label, (method, parameters) in METHODS.items():
        entry: dict[str, Any] = {"own_choice": _run(one, method, parameters), "by_iterations": {}}
        for n in () if label in ONE_PASS else counts:
            fixed = parameters | {"iterations": n, "stop": None}
            decision = entry["own_choice"]["decision"] or {}
            if "regularization" in decision:
                fixed["regularization"] = decision["regularization"]
            entry["by_iterations"][n] = _run(one, method, fixed)
        methods[label] = entry
        best = max(
            (e for e in (entry["own_choice"], *entry["by_iterations"].values())), key=lambda e: e["psnr_db"]
        )
        print(
            f"  {label:34} own {entry['own_choice']['psnr_db']:6.2f} dB, best {best['psnr_db']:6.2f} dB, "
            f"{entry['own_choice']['cpu_s']:6.2f} CPU s",
            flush=True,
        )
    return {
        "shape": one.image.shape,
        "psf_shape": one.psf.shape,
        "input": one.figures(one.image),
        "methods": methods,
    }


def _run(one: Scene, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    operator = deconvolution(method, one.psf, **parameters)
    wall, cpu = time.perf_counter(), time.process_time()
    result = operator(one.image)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    decision = None
    if "pilot" in operator.needs:
        from chunkrestore.operators.base import numbers_of
        from chunkrestore.statistics import of_array

        numbers = numbers_of(
            operator,
            lambda needs: of_array(one.image, needs),
            lambda region: one.image[region],
            one.image.shape,
        )
        decision = {k: v for k, v in numbers["pilot"].items() if k not in ("curve", "regions")}
    return one.figures(np.asarray(result)) | seconds | {"decision": decision}


def draw(results: Mapping[str, Any], found: Sequence[Scene], folder: Path) -> None:
    """Draw quality against iterations and seconds, and sections of what every method makes by itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    colours = {label: f"C{i}" for i, label in enumerate(METHODS)}
    figure, axes = plt.subplots(
        4, len(found), figsize=(4.2 * len(found), 13), squeeze=False, layout="constrained"
    )
    rows = (
        ("iterations", "psnr_db", "PSNR (dB)"),
        ("seconds", "psnr_db", "PSNR (dB)"),
        ("iterations", "ssim", "SSIM"),
        ("iterations", "fsc_half_period_voxels", "FSC 1/2 period (voxels)"),
    )
    for column, one in enumerate(found):
        methods = results[one.name]["methods"]
        for row, (against, key, name) in enumerate(rows):
            ax = axes[row, column]
            for label, entry in methods.items():
                runs, own = entry["by_iterations"], entry["own_choice"]
                x = [int(n) if against == "iterations" else run["cpu_s"] for n, run in runs.items()]
                if x:
                    ax.plot(
                        x, [run[key] for run in runs.values()], "-o", ms=3, color=colours[label], label=label
                    )
                elif against == "seconds":
                    ax.plot(own["cpu_s"], own[key], "s", color=colours[label], label=label)
                else:
                    ax.axhline(own[key], ls="--", color=colours[label], label=label)
            ax.axhline(results[one.name]["input"][key], color="0.7", lw=1)
            ax.set_xscale("log")
            ax.set_xlabel(against if against == "iterations" else "CPU seconds")
            ax.set_ylabel(name)
            if row == 0:
                ax.set_title(one.name)
                floor = results[one.name]["input"]["psnr_db"]
            if key == "psnr_db":
                ax.set_ylim(bottom=floor - 1.5)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(folder / "deconvolution_curves.png", dpi=70)
    plt.close(figure)
    for one in found:
        _draw_sections(plt, one, folder / f"deconvolution_{one.name.replace(',', '').replace(' ', '_')}.png")


def _draw_sections(plt: Any, one: Scene, path: Path) -> None:
    images = {"truth": one.truth, "image": one.image.astype(np.float32)}
    for label, (method, parameters) in METHODS.items():
        images[label] = np.asarray(deconvolution(method, one.psf, **parameters)(one.image))
    figure, axes = plt.subplots(4, 5, figsize=(13, 9.5), layout="constrained")
    for column, (label, image) in enumerate(images.items()):
        top = 2 * (column // 5)
        high = float(np.percentile(image, 99.8))
        middle = [n // 2 for n in image.shape]
        for row, section in ((top, image[middle[0]]), (top + 1, image[:, middle[1]])):
            axes[row, column % 5].imshow(section, vmin=0, vmax=high, cmap="gray")
            axes[row, column % 5].set_axis_off()
        axes[top, column % 5].set_title(label, fontsize=9)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main() -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 128, 128))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="Iterations.")
    parser.add_argument("--bars", type=Path, help="Folder with the EPFL bars.")
    parser.add_argument("--figures", type=Path, help="Folder to draw into.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = scenes(arguments.shape, arguments.bars)
    results = {}
    for one in found:
        print(one.name, flush=True)
        results[one.name] = measure(one, arguments.counts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = describe() | {"question": __doc__.split("\n", 1)[0], "scenes": results}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.figures:
        draw(json.loads(json.dumps(results)), found, arguments.figures)


if __name__ == "__main__":
    main()

"""How long does each package take to the quality that 50 plain Richardson-Lucy iterations give?

One simulated light-sheet volume, cut from a larger blurred scene so that light crosses its border, with a
point spread function that is not symmetric (a tail along +x) and photon noise. Each contender (`peers.py`)
runs in a process of its own and, with ``--python package=path``, in an environment of its own; one that cannot
be imported is listed as not installed.

Reported per contender: PSNR against the truth (whole, interior, shell of 16 voxels at the border) after equal
numbers of iterations; how far the result lies from the truth, in voxels per axis; its flux relative to the
truth; wall and CPU seconds per iteration (set-up included; best of the repeats; CPU is the fair column on a
shared machine); and the seconds (interpolated between the measured numbers of iterations, in their logarithm)
after which it first reaches the PSNR of 50 plain non-circulant iterations (of chunkrestore's kernel), whole
and in the interior, where contenders that ignore the border are not punished for it.

Prediction before the first measurement: nobody else reaches the whole target in less than 5 times the CPU
seconds of chunkrestore with momentum; contenders with a periodic or zero border never reach it. The second came true;
ci-deconvolve takes 2.8 times the CPU seconds, all others 11 times or never.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from peers import CONTENDERS, TIMED, schedule

RESULTS = Path(__file__).parent / "results" / "deconvolution_peers.json"
CHECKPOINTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
REFERENCE = "chunkrestore"
SHELL = 16
SAME_DB = 0.01
"""Implementations of one iteration differ by less than this (rounding, constants that guard divisions)."""
Shape = tuple[int, ...]


def skewed_psf(length: int = 31) -> np.ndarray:
    """Return a point spread function of `length` voxels per axis: 85 % core, 15 % tail towards +x."""
    z, y, x = np.ogrid[(slice(-(length // 2), length // 2 + 1),) * 3]
    core = np.exp(-(z**2 / 3.5**2 + (y**2 + x**2) / 1.8**2) / 2)
    tail = np.exp(-(z**2 / 6.0**2 + y**2 / 4.0**2) / 2) * np.where(x >= 0, np.exp(-x / 5.0), 0)
    psf = 0.85 * core / core.sum() + 0.15 * tail / tail.sum()
    return (psf / psf.sum()).astype(np.float32)


def scene(shape: Shape, psf: np.ndarray, peak: float = 98.0) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and noisy image (float32): textured nuclei of all sizes, cut from a larger scene."""
    from scipy.ndimage import gaussian_filter
    from scipy.signal import fftconvolve

    rng, margin, reach = np.random.default_rng(11), max(psf.shape) // 2, 9
    large = [n + 2 * margin for n in shape]
    texture = gaussian_filter(rng.standard_normal(large, np.float32), (2.0, 1.2, 1.2))
    texture = np.exp(texture / (2 * texture.std()))
    truth = np.full(large, 0.02, np.float32)
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * 3])
    for _ in range(int(np.prod(large)) // 6000):
        at = tuple(slice(c - reach, c + reach + 1) for c in (rng.integers(reach, n - reach) for n in large))
        inside = ball < rng.uniform(1.5, reach) ** 2
        truth[at][inside] = rng.uniform(0.3, 1) * texture[at][inside]
    blurred = fftconvolve(truth, psf, mode="same").clip(0)
    field = tuple(slice(margin, margin + n) for n in shape)
    scale = peak / blurred[field].max()
    return truth[field] * np.float32(scale), rng.poisson(blurred[field] * scale).astype(np.float32)


def judge(truth: np.ndarray, result: np.ndarray) -> dict[str, Any]:
    """Return PSNR (whole, interior, shell; peak = range of the whole truth), displacement and relative flux."""
    from chunkrestore.metrics import psnr

    data_range = float(np.ptp(truth))
    shell = np.ones(truth.shape, np.bool_)
    shell[tuple(slice(SHELL, -SHELL) for _ in truth.shape)] = False
    return {
        "psnr_db": psnr(truth, result),
        "psnr_interior_db": psnr(truth[~shell], result[~shell], data_range=data_range),
        "psnr_shell_db": psnr(truth[shell], result[shell], data_range=data_range),
        "displacement_voxels": displacement(truth, result),
        "relative_flux": float(result.sum(dtype=np.float64) / truth.sum(dtype=np.float64)),
    }


def displacement(truth: np.ndarray, result: np.ndarray) -> list[float]:
    """Return by how many voxels per axis `result` lies ahead of `truth`, to a few hundredths and a tenth of it.

    Both are windowed, so that the border does not count (which makes it slightly too small); the peak of
    their cross-correlation is located on a grid of fiftieths.
    """
    from skimage.registration import phase_cross_correlation

    windowed = []
    for image in (truth, result):
        image = image - image.mean()
        for axis, n in enumerate(image.shape):
            image = image * np.hanning(n).reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        windowed.append(image)
    back, _, _ = phase_cross_correlation(*windowed, upsample_factor=50, normalization=None)
    return [round(-float(one), 3) + 0.0 for one in back]


def seconds_to(points: list[tuple[float, float]], target: float) -> float | None:
    """Return the seconds after which PSNR first reaches `target`, from (seconds, PSNR) by iterations.

    PSNR rises about as the logarithm of the iterations; straight lines over seconds would put the crossing
    too late, most for contenders with few points.
    """
    if points and points[0][1] >= target:
        return points[0][0]
    for (t0, q0), (t1, q1) in pairwise(points):
        if q0 < target <= q1:
            return t0 * (t1 / t0) ** ((target - q0) / (q1 - q0))
    return None


def run(name: str, folder: Path, truth: np.ndarray, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in its environment and judge its results."""
    pythons = dict(one.split("=", 1) for one in arguments.python)
    python = pythons.get(CONTENDERS[name][0], sys.executable)
    own = folder / name.replace(" ", "_")
    own.mkdir()
    plan = schedule(arguments.iterations, arguments.repeats)
    command = [python, str(Path(__file__).parent / "peers.py"), name, str(folder / "scene.npz"), str(own)]
    command += ["--budget", str(arguments.budget), "--plan", *map(str, plan)]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found = json.loads((own / "figures.json").read_text())
    if "not_installed" in found:
        return found
    timed = [one for one in found["runs"] if one["iterations"] == TIMED]
    best = {column: min(one[column] for one in timed) for column in ("wall_s", "cpu_s")}
    figures = {f"{column}_per_iteration": value / TIMED for column, value in best.items()}
    quality = {}
    for one in sorted(found["runs"], key=lambda one: one["iterations"]):
        n = one["iterations"]
        times = best if n == TIMED else {column: one[column] for column in best}
        quality[n] = judge(truth, np.load(own / f"{n}.npy")) | times
    return found | figures | {"by_iterations": quality}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the scene, run all contenders, and add the seconds to the reference's quality."""
    psf = skewed_psf()
    truth, image = scene(tuple(arguments.shape), psf)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.savez(folder / "scene.npz", image=image, psf=psf)
        contenders = {}
        for name in arguments.contenders or CONTENDERS:
            contenders[name] = run(name, folder, truth, arguments)
            print(f"{name}: {_brief(contenders[name])}", file=sys.stderr, flush=True)
    last = max(arguments.iterations)
    reference = contenders.get(REFERENCE, {}).get("by_iterations", {}).get(last)
    if reference:
        for one in contenders.values():
            _add_seconds(one, reference)
    return {
        "question": __doc__.split("\n", 1)[0],
        "shape": image.shape,
        "psf_shape": psf.shape,
        "threads": arguments.threads,
        "reference": {"contender": REFERENCE, "iterations": last},
        "input": judge(truth, image),
        "contenders": contenders,
    }


def _add_seconds(one: dict[str, Any], reference: dict[str, Any]) -> None:
    for region in ("psnr_db", "psnr_interior_db"):
        for column in ("wall_s", "cpu_s"):
            points = [(at[column], at[region]) for at in one.get("by_iterations", {}).values()]
            one[f"{column}_to_{region}"] = seconds_to(points, reference[region] - SAME_DB)


def _brief(one: dict[str, Any]) -> str:
    if "by_iterations" not in one:
        return next(f"{key} ({one[key]})" for key in ("not_installed", "failed") if key in one)
    return f"{one['cpu_s_per_iteration']:.3f} CPU s/iteration, iterations {sorted(one['by_iterations'])}"


def table(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    last = result["reference"]["iterations"]
    rows = [
        f"| contender | CPU s/it | wall s/it | PSNR dB, {TIMED} it: all / in / shell | {last} it: all / in |"
        f" best: all @ it | displacement z, y, x | flux | CPU s to target: all / in | wall s | peak MB |",
        "|---" * 11 + "|",
    ]
    rows += [_row(name, one, last) for name, one in result["contenders"].items()]
    return "\n".join(rows)


def _row(name: str, one: dict[str, Any], last: int) -> str:
    if "by_iterations" not in one:
        return f"| {name} | {_brief(one)} |" + " |" * 9
    by_iterations = one["by_iterations"]
    ten, end = by_iterations[TIMED], by_iterations[last]
    best = max(by_iterations, key=lambda n: by_iterations[n]["psnr_db"])
    to = {key: "never" if one.get(key) is None else f"{one[key]:.2f}" for key in one if "_to_" in key}
    cells = [
        name,
        f"{one['cpu_s_per_iteration']:.3f}",
        f"{one['wall_s_per_iteration']:.3f}",
        " / ".join(f"{ten[key]:.2f}" for key in ("psnr_db", "psnr_interior_db", "psnr_shell_db")),
        " / ".join(f"{end[key]:.2f}" for key in ("psnr_db", "psnr_interior_db")),
        f"{by_iterations[best]['psnr_db']:.2f} @ {best}",
        " ".join(f"{shift:+.2f}" for shift in ten["displacement_voxels"]),
        f"{ten['relative_flux']:.3f}",
        f"{to.get('cpu_s_to_psnr_db', '-')} / {to.get('cpu_s_to_psnr_interior_db', '-')}",
        f"{to.get('wall_s_to_psnr_db', '-')}",
        f"{(one['peak_rss_nbytes'] or np.nan) / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run the comparison, write its results and print the table."""
    from environment import describe

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="PACKAGE=PATH")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 256, 256))
    parser.add_argument("--iterations", type=int, nargs="+", default=list(CHECKPOINTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds per contender, soft")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = compare(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()

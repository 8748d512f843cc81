"""Which library does the four real transforms of a Richardson-Lucy iteration fastest, and what does pruning save?

An iteration on a lattice larger than the image transforms the estimate (full), goes back to the blurred
estimate, of which only the corner that holds the image is wanted (pruned inverse), transforms the ratio,
which is zero outside that corner (pruned forward), and goes back to the correction (full inverse). Pruned:
only the lines of the corner are transformed along x, only its planes along y, everything along z.

Each library runs in its own process and, with ``--python name=path``, in its own environment (``--python
scipy-1.18=...`` times that interpreter's SciPy under this name). A library that cannot be imported is listed
as not installed. Float32, one and two threads, plans and allocations of the first call not timed; times are
the best of the repeats, CPU seconds (all threads) beside wall seconds. Every transform is first compared with
NumPy's in float64.

Prediction before the first measurement: ducc0 and MKL take half the time of SciPy's pocketfft; pruning saves
a fifth of the four transforms on 96 x 288 x 288 with an image of 64 x 256 x 256.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "fft_libraries.json"
Shape = tuple[int, ...]
LATTICES: dict[Shape, Shape] = {
    (96, 288, 288): (64, 256, 256),
    (128, 128, 128): (96, 96, 96),
    (256, 256, 256): (224, 224, 224),
}
LICENCES = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "ducc0": "GPL-2.0-or-later (package; its FFT sources alone also BSD-3-Clause)",
    "mkl_fft": "BSD-3-Clause over MKL (Intel Simplified Software License, closed)",
    "pyfftw": "BSD-3-Clause, wheels contain FFTW (GPL-2.0-or-later)",
    "rocket_fft": "BSD-3-Clause (pocketfft, needs Numba)",
    "torch": "BSD-3-Clause (wheels contain MKL)",
}
Transforms = dict[str, Callable[[np.ndarray], np.ndarray]]
"""`rfftn` (lattice to spectrum), `irfftn` (back; may destroy the spectrum), and where the library can
transform along one axis of a part in place, `pruned_rfftn` (padded corner to spectrum) and `pruned_irfftn`
(spectrum to corner). The padded corner has the corner's z and y, and the lattice's x with zeros."""


def _half(lattice: Shape) -> Shape:
    return (*lattice[:-1], lattice[-1] // 2 + 1)


def with_numpy(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return NumPy's transforms (one thread)."""
    return {
        "rfftn": np.fft.rfftn,
        "irfftn": lambda spectrum: np.fft.irfftn(spectrum, s=lattice, axes=(0, 1, 2)),
    }


def with_scipy(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return scipy.fft's transforms, complex steps in place.

    With ``overwrite_x`` a complex transform is done in place, also on a view (not documented; checked by
    the comparison with NumPy).
    """
    import scipy.fft as fft

    z, y, x = corner

    def irfftn(spectrum: np.ndarray) -> np.ndarray:
        spectrum = fft.ifftn(spectrum, axes=(0, 1), overwrite_x=True, workers=threads)
        return fft.irfft(spectrum, n=lattice[-1], axis=2, workers=threads)

    def pruned_rfftn(padded: np.ndarray) -> np.ndarray:
        spectrum = np.empty(_half(lattice), np.complex64)
        spectrum[:z, :y] = fft.rfft(padded, axis=2, workers=threads)
        spectrum[:z, y:] = 0
        fft.fft(spectrum[:z], axis=1, overwrite_x=True, workers=threads)
        spectrum[z:] = 0
        return fft.fft(spectrum, axis=0, overwrite_x=True, workers=threads)

    def pruned_irfftn(spectrum: np.ndarray) -> np.ndarray:
        part = fft.ifft(spectrum, axis=0, overwrite_x=True, workers=threads)[:z]
        part = fft.ifft(part, axis=1, overwrite_x=True, workers=threads)[:, :y]
        return fft.irfft(part, n=lattice[-1], axis=2, workers=threads)[..., :x]

    return {
        "rfftn": lambda image: fft.rfftn(image, workers=threads),
        "irfftn": irfftn,
        "pruned_rfftn": pruned_rfftn,
        "pruned_irfftn": pruned_irfftn,
    }


def with_ducc0(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return ducc0's transforms."""
    from ducc0 import fft

    z, y, x = corner

    def irfftn(spectrum: np.ndarray) -> np.ndarray:
        return fft.c2r(
            spectrum, axes=(0, 1, 2), lastsize=lattice[-1], forward=False, inorm=2,
            nthreads=threads, allow_overwriting_input=True,
        )  # fmt: skip

    def pruned_rfftn(padded: np.ndarray) -> np.ndarray:
        spectrum = np.empty(_half(lattice), np.complex64)
        fft.r2c(padded, axes=(2,), out=spectrum[:z, :y], nthreads=threads)
        spectrum[:z, y:] = 0
        fft.c2c(spectrum[:z], axes=(1,), out=spectrum[:z], nthreads=threads)
        spectrum[z:] = 0
        return fft.c2c(spectrum, axes=(0,), out=spectrum, nthreads=threads)

    def pruned_irfftn(spectrum: np.ndarray) -> np.ndarray:
        fft.c2c(spectrum, axes=(0,), out=spectrum, forward=False, inorm=2, nthreads=threads)
        part = spectrum[:z]
        fft.c2c(part, axes=(1,), out=part, forward=False, inorm=2, nthreads=threads)
        lines = fft.c2r(
            part[:, :y], axes=(2,), lastsize=lattice[-1], forward=False, inorm=2, nthreads=threads
        )
        return lines[..., :x]

    return {
        "rfftn": lambda image: fft.r2c(image, axes=(0, 1, 2), nthreads=threads),
        "irfftn": irfftn,
        "pruned_rfftn": pruned_rfftn,
        "pruned_irfftn": pruned_irfftn,
    }


def with_mkl_fft(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return MKL's transforms (threads by MKL_NUM_THREADS, set by `main`)."""
    import mkl_fft

    z, y, x = corner

    def irfftn(spectrum: np.ndarray) -> np.ndarray:
        return mkl_fft.irfftn(spectrum, s=lattice, axes=(0, 1, 2))

    def pruned_rfftn(padded: np.ndarray) -> np.ndarray:
        spectrum = np.empty(_half(lattice), np.complex64)
        spectrum[:z, :y] = mkl_fft.rfft(padded, axis=2)
        spectrum[:z, y:] = 0
        spectrum[:z] = mkl_fft.fft(spectrum[:z], axis=1)
        spectrum[z:] = 0
        return mkl_fft.fft(spectrum, axis=0, out=spectrum)

    def pruned_irfftn(spectrum: np.ndarray) -> np.ndarray:
        part = mkl_fft.ifft(spectrum, axis=0, out=spectrum)[:z]
        part = mkl_fft.ifft(part, axis=1, out=part)
        return mkl_fft.irfft(part[:, :y], n=lattice[-1], axis=2)[..., :x]

    return {
        "rfftn": mkl_fft.rfftn,
        "irfftn": irfftn,
        "pruned_rfftn": pruned_rfftn,
        "pruned_irfftn": pruned_irfftn,
    }


def with_pyfftw(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return FFTW's transforms, planned with FFTW_MEASURE on arrays that are used again."""
    import pyfftw

    image = pyfftw.empty_aligned(lattice, np.float32)
    half = pyfftw.empty_aligned(_half(lattice), np.complex64)
    options: dict[str, Any] = {"axes": (0, 1, 2), "threads": threads, "flags": ("FFTW_MEASURE",)}
    forward = pyfftw.FFTW(image, half, **options)
    options["flags"] += ("FFTW_DESTROY_INPUT",)
    backward = pyfftw.FFTW(half, image, direction="FFTW_BACKWARD", **options)

    def rfftn(array: np.ndarray) -> np.ndarray:
        image[...] = array
        return forward()

    def irfftn(spectrum: np.ndarray) -> np.ndarray:
        if spectrum is not half:
            half[...] = spectrum
        return backward(normalise_idft=True)

    return {"rfftn": rfftn, "irfftn": irfftn}


def with_rocket_fft(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return pocketfft's transforms as compiled into Numba functions by Rocket-FFT."""
    import numba
    import rocket_fft  # noqa: F401 (an import that fails is reported)
    import scipy.fft

    length, axes = np.array(lattice), np.array([0, 1, 2])

    @numba.njit
    def rfftn(image: np.ndarray) -> np.ndarray:
        return scipy.fft.rfftn(image, None, axes, None, False, threads)

    @numba.njit
    def irfftn(spectrum: np.ndarray) -> np.ndarray:
        return scipy.fft.irfftn(spectrum, length, axes, None, True, threads)

    return {"rfftn": rfftn, "irfftn": irfftn}


def with_torch(lattice: Shape, corner: Shape, threads: int) -> Transforms:
    """Return PyTorch's transforms on the CPU, without copies from and to NumPy."""
    import torch

    torch.set_num_threads(threads)
    return {
        "rfftn": lambda image: torch.fft.rfftn(torch.from_numpy(image)).numpy(),
        "irfftn": lambda half: torch.fft.irfftn(torch.from_numpy(half), s=lattice).numpy(),
    }


ADAPTERS: dict[str, Callable[[Shape, Shape, int], Transforms]] = {
    "numpy": with_numpy,
    "scipy": with_scipy,
    "ducc0": with_ducc0,
    "mkl_fft": with_mkl_fft,
    "pyfftw": with_pyfftw,
    "rocket_fft": with_rocket_fft,
    "torch": with_torch,
}


def _check(transforms: Transforms, image: np.ndarray, padded: np.ndarray, corner: Shape) -> float:
    """Return the largest error relative to the largest value, of all transforms."""
    cut = tuple(slice(n) for n in corner)
    whole, part = np.fft.rfftn(image.astype(np.float64)), np.zeros(image.shape)
    part[cut] = padded[..., : corner[-1]]
    part_half = np.fft.rfftn(part)
    pairs = [(transforms["rfftn"](image), whole)]
    pairs += [(transforms["irfftn"](whole.astype(np.complex64)), image)]
    if "pruned_rfftn" in transforms:
        pairs += [(transforms["pruned_rfftn"](padded), part_half)]
        pairs += [(transforms["pruned_irfftn"](whole.astype(np.complex64)), image[cut])]
    for result, _ in pairs:
        assert result.dtype in (np.float32, np.complex64), "a transform left single precision"
    return max(float(abs(result - right).max() / abs(right).max()) for result, right in pairs)


def work(name: str, threads: int, repeats: int, lattices: dict[Shape, Shape]) -> dict[str, Any]:
    """Check and time one library in this process."""
    from importlib.metadata import version

    result: dict[str, Any] = {"version": version(name), "numpy": np.__version__, "lattices": {}}
    for lattice, corner in lattices.items():
        rng = np.random.default_rng(3)
        image = rng.random(lattice, np.float32)
        padded = np.zeros((*corner[:-1], lattice[-1]), np.float32)
        padded[..., : corner[-1]] = rng.random(corner, np.float32)
        transforms = ADAPTERS[name](lattice, corner, threads)
        figures: dict[str, Any] = {"largest_relative_error": _check(transforms, image, padded, corner)}
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in transforms}
        for _ in range(repeats):
            half = transforms["rfftn"](image).copy()
            for kind, transform in transforms.items():
                source = padded if kind == "pruned_rfftn" else image if kind == "rfftn" else half.copy()
                wall, cpu = time.perf_counter(), time.process_time()
                transform(source)
                times[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
        for kind, measured in times.items():
            walls, cpus = zip(*measured, strict=True)
            figures[kind] = {"wall_s": min(walls), "cpu_s": min(cpus)}
        result["lattices"]["x".join(map(str, lattice))] = figures | _iteration(figures)
    return result


def _iteration(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of the four transforms of an iteration, whole and with the inner two pruned."""
    sums = {}
    for column in ("wall_s", "cpu_s"):
        full = figures["rfftn"][column] + figures["irfftn"][column]
        sums[f"full_{column}"] = 2 * full
        if "pruned_rfftn" in figures:
            inner = figures["pruned_rfftn"][column] + figures["pruned_irfftn"][column]
            sums[f"pruned_{column}"] = full + inner
    return {"four_transforms": sums}


def run(name: str, python: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `work` in a process of its own; a library that is missing there is reported, not replaced."""
    library = name.split("-", 1)[0]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    command = [python, __file__, "--worker", library, "--threads", str(threads)]
    command += ["--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        missing = "ModuleNotFoundError" in last or "PackageNotFoundError" in last
        return {"not_installed" if missing else "failed": last}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the benchmark and write its results, or (``--worker``) one library's part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=ADAPTERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments.threads[0], arguments.repeats, LATTICES)))
        return
    from environment import describe

    pythons = dict.fromkeys(ADAPTERS, sys.executable) | dict(one.split("=", 1) for one in arguments.python)
    libraries: dict[str, Any] = {}
    for name, python in pythons.items():
        libraries[name] = {"licence": LICENCES[name.split("-", 1)[0]]}
        for threads in arguments.threads:
            libraries[name][f"threads_{threads}"] = run(name, python, threads, arguments)
        _print(name, libraries[name])
    result = {"question": __doc__.split("\n", 1)[0], "repeats": arguments.repeats, "libraries": libraries}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(describe() | result, indent=1) + "\n")


def _print(name: str, found: dict[str, Any]) -> None:
    for setting, one in found.items():
        if setting == "licence":
            continue
        for lattice, figures in one.get("lattices", {}).items():
            times = "  ".join(
                f"{key} {1e3 * value:7.1f}" for key, value in figures["four_transforms"].items()
            )
            print(f"{name:12} {one['version']:8} {setting} {lattice:12} ms: {times}", flush=True)
        if "lattices" not in one:
            print(f"{name:12} {setting} {one}", flush=True)


if __name__ == "__main__":
    main()

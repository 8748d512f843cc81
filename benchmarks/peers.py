"""The contenders of `deconvolution_peers.py`, and the worker that runs one of them in a process of its own.

``python peers.py NAME scene.npz folder`` needs NumPy and the contender alone, so that each can live in its own
environment. The worker times and stores results; `deconvolution_peers.py` judges them.

Every contender gets the same float32 image, the same point spread function (sum 1) and a number of iterations,
and returns an image of the same shape. It is called as its own documentation shows; settings that differ from
its defaults are named in its docstring.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Deconvolve = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
Factory = Callable[[], Deconvolve]
"""Imports a contender and returns its function, so that imports are neither timed nor shared."""

TIMED = 10
"""Iterations of the run that is repeated for its time."""


def chunkrestore(acceleration: str | None) -> Deconvolve:
    """Non-circulant Richardson-Lucy of this package, from a flat start."""
    from chunkrestore.kernels.richardson_lucy import richardson_lucy

    return lambda image, psf, iterations: richardson_lucy(
        image, psf, iterations=iterations, start=float(image.mean()), acceleration=acceleration
    )


def chunkrestore_method(method: str, **parameters: Any) -> Deconvolve:
    """Another method of this package, for as many iterations as asked, its regularisation chosen by itself."""
    from chunkrestore.operators.methods import deconvolution

    return lambda image, psf, n: deconvolution(method, psf, iterations=n, stop=None, **parameters)(image)


def scikit_image() -> Deconvolve:
    """``clip=False``: by default results are cut at 1."""
    from skimage.restoration import richardson_lucy

    return lambda image, psf, iterations: richardson_lucy(image, psf, num_iter=iterations, clip=False)


def redlionfish(padded: bool) -> Deconvolve:
    """On the CPU (periodic, its default), or its variant that pads to image + psf - 1 with zeros."""
    from RedLionfishDeconv import RLDeconv3DScipy, doRLDeconvolutionFromNpArrays

    if padded:
        return lambda image, psf, n: RLDeconv3DScipy.doRLDeconvolution12(image, psf, niter=n)
    return lambda image, psf, n: doRLDeconvolutionFromNpArrays(image, psf, niter=n, method="cpu")


def sdeconv(pad: int) -> Deconvolve:
    """Padding of `pad` voxels on every side, the point spread function embedded at the image's size.

    The package imports torchvision for the augmentation of its network training only; where there is none,
    an empty module stands in for it.
    """
    from types import ModuleType

    try:
        import torchvision  # noqa: F401
    except ImportError:
        transforms = ModuleType("torchvision.transforms")
        transforms.v2 = None  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": ModuleType("torchvision"), "torchvision.transforms": transforms}
    import torch
    from sdeconv.deconv import SRichardsonLucy

    def deconvolve(image: np.ndarray, psf: np.ndarray, iterations: int) -> np.ndarray:
        embedded = np.zeros(image.shape, np.float32)
        first = [n // 2 - p // 2 for n, p in zip(image.shape, psf.shape, strict=True)]
        embedded[tuple(slice(f, f + p) for f, p in zip(first, psf.shape, strict=True))] = psf
        run = SRichardsonLucy(torch.from_numpy(embedded), niter=iterations, pad=pad)
        return run(torch.from_numpy(image)).numpy()

    return deconvolve


def ci_deconvolve(*, defaults: bool) -> Deconvolve:
    """With its defaults (which may stop early), or comparable: flat start, no offset, no automatic stop."""
    from core.deconvolve_ci import ci_rl_deconvolve

    options: dict[str, Any] = {"device": "cpu", "tiling": "none"}
    if not defaults:
        options |= {
            "offset": 0,
            "background": 0,
            "start": "flat",
            "convergence": "fixed",
            "check_every": 1000,
        }
    return lambda image, psf, iterations: ci_rl_deconvolve(image, psf, niter=iterations, **options)["result"]


def tnia(*, non_circulant: bool) -> Deconvolve:
    """Its NumPy function (the CuPy one needs a device)."""
    from tnia.deconvolution.richardson_lucy_np import richardson_lucy_np

    return lambda image, psf, iterations: richardson_lucy_np(image, psf, iterations, noncirc=non_circulant)


def dexp(back_projection: str) -> Deconvolve:
    """On the CPU, with the transposed PSF (``tpsf``) or Wiener-Butterworth (``wb``) as back projector."""
    from dexp.processing.deconvolution import lucy_richardson_deconvolution
    from dexp.utils.backends import NumpyBackend

    def deconvolve(image: np.ndarray, psf: np.ndarray, iterations: int) -> np.ndarray:
        with NumpyBackend():
            return lucy_richardson_deconvolution(
                image, psf, num_iterations=iterations, back_projection=back_projection
            )

    return deconvolve


def clesperanto() -> Deconvolve:
    """On its first OpenCL device, which may be the CPU."""
    import pyclesperanto
    from pyclesperanto import _fft  # its deconvolution is not among the public names yet

    if not getattr(pyclesperanto, "list_available_devices", list)():
        raise ImportError("pyclesperanto finds no OpenCL device")

    def deconvolve(image: np.ndarray, psf: np.ndarray, iterations: int) -> np.ndarray:
        result = _fft.deconvolve(pyclesperanto.push(image), pyclesperanto.push(psf), iteration=iterations)
        return np.asarray(pyclesperanto.pull(result))

    return deconvolve


CONTENDERS: dict[str, tuple[str, Factory]] = {
    "chunkrestore": ("chunkrestore", partial(chunkrestore, None)),
    "chunkrestore, total variation": (
        "chunkrestore",
        partial(chunkrestore_method, "richardson-lucy", total_variation=0.005),
    ),
    "chunkrestore, Wiener-Butterworth": (
        "chunkrestore",
        partial(chunkrestore_method, "wiener-butterworth"),
    ),
    "chunkrestore, heavy ball": ("chunkrestore", partial(chunkrestore, "heavy-ball")),
    "scikit-image": ("scikit-image", scikit_image),
    "RedLionfish": ("RedLionfish", partial(redlionfish, False)),
    "RedLionfish, padded": ("RedLionfish", partial(redlionfish, True)),
    "sdeconv": ("sdeconv", partial(sdeconv, 0)),
    "sdeconv, pad 16": ("sdeconv", partial(sdeconv, 16)),
    "ci-deconvolve": ("ci-deconvolve", partial(ci_deconvolve, defaults=False)),
    "ci-deconvolve, defaults": ("ci-deconvolve", partial(ci_deconvolve, defaults=True)),
    "tnia-python": ("tnia-python", partial(tnia, non_circulant=False)),
    "tnia-python, non-circulant": ("tnia-python", partial(tnia, non_circulant=True)),
    "dexp": ("dexp", partial(dexp, "tpsf")),
    "dexp, Wiener-Butterworth": ("dexp", partial(dexp, "wb")),
    "pyclesperanto": ("pyclesperanto", clesperanto),
}
"""Name, package that it is part of, and how to get it. A further method of ours is one more line here."""


def schedule(checkpoints: list[int], repeats: int) -> list[int]:
    """Return the numbers of iterations to run, most telling first: the timed one, the last, then inwards."""
    last, *others = sorted(set(checkpoints) - {TIMED}, reverse=True)
    return [TIMED, last, *[TIMED] * (repeats - 1), *others]


def work(name: str, scene: Path, folder: Path, plan: list[int], budget: float) -> dict[str, Any]:
    """Run one contender as often as `plan` says; store results as ``<iterations>.npy`` in `folder`.

    The first two entries of the plan always run, the others while `budget` CPU seconds last.
    """
    package, factory = CONTENDERS[name]
    try:
        deconvolve = factory()
    except (ImportError, RuntimeError) as error:
        return {"not_installed": f"{type(error).__name__}: {error}".splitlines()[0]}
    with np.load(scene) as stored:
        image, psf = stored["image"], stored["psf"]
    before, began, runs = _peak_nbytes(), time.process_time(), []
    for position, iterations in enumerate(plan):
        if position >= 2 and time.process_time() - began > budget:
            break
        inputs = image.copy(), psf.copy()  # some contenders write into their inputs
        wall, cpu = time.perf_counter(), time.process_time()
        result = deconvolve(*inputs, iterations)
        used = time.perf_counter() - wall, time.process_time() - cpu
        runs.append({"iterations": iterations, "wall_s": used[0], "cpu_s": used[1]})
        np.save(folder / f"{iterations}.npy", np.asarray(result, np.float32))
    return {"runs": runs, "peak_rss_nbytes": _peak_nbytes(), "rss_before_nbytes": before} | _versions(package)


def _peak_nbytes() -> int | None:
    # Not getrusage's ru_maxrss, which a child process inherits from its parent.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _versions(package: str) -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for name in (package, "numpy", "scipy", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": found}


def main() -> None:
    """Run one contender; what it prints goes to stderr, the figures to ``figures.json`` in the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("scene", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", type=int, nargs="+", required=True)
    parser.add_argument("--budget", type=float, required=True)
    arguments = parser.parse_args()
    os.dup2(2, 1)
    figures = work(arguments.name, arguments.scene, arguments.folder, arguments.plan, arguments.budget)
    (arguments.folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Scenes and block-wise results that several tests of deconvolution share."""

import numpy as np
from scipy import signal

from chunkrestore.psf import prepare


def skewed(shape, seed=5):
    """Return an asymmetric point spread function: random, brightest near the centre."""
    rng = np.random.default_rng(seed)
    fall = [np.exp(-0.5 * ((np.arange(n) - n // 2) / (n / 5 + 0.3)) ** 2) for n in shape]
    envelope = fall[0]
    for one in fall[1:]:
        envelope = np.multiply.outer(envelope, one)
    return prepare(envelope * rng.uniform(0.2, 1, shape))


def blurred(truth, psf):
    """Return `truth` seen through `psf`, with nothing outside (SciPy's linear convolution)."""
    full = signal.fftconvolve(truth.astype(np.float64), psf.astype(np.float64))
    return full[tuple(slice(p // 2, p // 2 + n) for p, n in zip(psf.shape, truth.shape, strict=True))]


def nuclei(shape, psf, *, photons=60.0, background=0.0, seed=1):
    """Return a scene of balls that runs across the field of view, and its noisy image."""
    rng = np.random.default_rng(seed)
    margin = max(psf.shape)
    large = tuple(n + 2 * margin for n in shape)
    truth = np.full(large, 0.02)
    reach = 6
    ball = sum(g**2 for g in np.ogrid[(slice(-reach, reach + 1),) * len(shape)])
    for _ in range(int(np.prod(large)) // 2500):
        centre = [int(rng.integers(reach, n - reach)) for n in large]
        around = tuple(slice(c - reach, c + reach + 1) for c in centre)
        truth[around][ball < rng.uniform(2.5, reach) ** 2] += rng.uniform(0.3, 1)
    image = blurred(truth, psf)
    scale = photons / np.percentile(image, 99.9)
    image = rng.poisson(np.maximum(image, 0) * scale + background)
    field = tuple(slice(margin, margin + n) for n in shape)
    return (truth * scale)[field].astype(np.float32), image[field].astype(np.uint16)


def assemble(operator, image, grid):
    """Return what the blocks of `grid` give, each from what it reads."""
    result = np.full(image.shape, np.nan, np.float32)
    for block in grid:
        result[block.core] = operator(image[block.read], block)[block.trim]
    return result


def seam_rms(tiled, whole, grid):
    """Return the worst rms difference over the planes next to core borders, relative to a robust range."""
    squares = np.square(tiled.astype(np.float64) - whole)
    planes = [
        np.take(squares, border + side, axis=axis).mean()
        for axis, edges in enumerate(grid.edges)
        for border in edges[1:-1]
        for side in (-1, 0)
    ]
    return np.sqrt(max(planes)) / (np.percentile(whole, 99.9) - np.percentile(whole, 0.1))

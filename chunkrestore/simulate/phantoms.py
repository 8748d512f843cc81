"""The kinds of phantoms, and volumes in memory: a phantom and what a camera records of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.simulate.bodies import Embryo, Tissue
from chunkrestore.simulate.filaments import Filaments
from chunkrestore.simulate.microscope import (
    Camera,
    FloatArray,
    check_seed,
    checked_psf,
    forward,
    light_sheet_psf,
)
from chunkrestore.simulate.nuclei import Nuclei
from chunkrestore.simulate.protocol import Phantom, checked_shape
from chunkrestore.simulate.shapes import Beads, Spheres

Arrangement: TypeAlias = Literal["embryo", "tissue"]

VOXEL_SIZE = (0.4, 0.4, 0.4)
"""Voxel size (z, y, x) in micrometres: a radius of 5 to 9 voxels is a nucleus 4 to 7 micrometres across."""


__all__ = [
    "KINDS",
    "VOXEL_SIZE",
    "Beads",
    "Embryo",
    "Filaments",
    "Phantom",
    "SimulatedVolume",
    "Spheres",
    "Tissue",
    "embryo",
    "from_description",
]

KINDS: dict[str, Callable[..., Phantom]] = {
    kind.__name__: kind for kind in (Embryo, Tissue, Spheres, Beads, Filaments)
}
"""The kinds of phantoms by name."""


def from_description(description: Mapping[str, Any]) -> Phantom:
    """Make the phantom that `Phantom.describe` described.

    Raises
    ------
    ValueError
        If its kind or one of its parameters is unknown, or a value impossible.

    Examples
    --------
    >>> phantom = Spheres((64, 64, 64), seed=1)
    >>> from_description(phantom.describe()) == phantom
    True
    """
    parts = _tuples(description)
    kind = parts.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        if "nuclei" in parts:
            parts["nuclei"] = Nuclei(**_tuples(parts["nuclei"]))
        return KINDS[kind](**parts)
    except TypeError as error:
        raise ValueError(f"{kind} cannot be made of {dict(description)}: {error}") from error


def _tuples(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parts.items()}


@dataclass(frozen=True)
class SimulatedVolume:
    """A volume whose truth is known; every array is ``zyx``."""

    labels: npt.NDArray[np.int32]
    """Nucleus at each voxel, 0 for none; ids are unique, with gaps."""
    truth: FloatArray
    """Photons that each voxel emits; sharp, free of noise and without the camera's background."""
    image: npt.NDArray[np.uint16]
    """Counts recorded by `camera` through `psf`."""
    psf: FloatArray
    """Point spread function, odd shape, sum 1."""
    camera: Camera = field(default_factory=Camera)
    """The camera that recorded `image`."""
    voxel_size: tuple[float, float, float] = VOXEL_SIZE
    """Voxel size (z, y, x) in micrometres."""

    @cached_property
    def n_nuclei(self) -> int:
        """Number of nuclei that show."""
        return int(np.count_nonzero(np.bincount(self.labels.ravel())[1:]))

    @property
    def reference(self) -> FloatArray:
        """The truth in counts, pedestal included: what `image` would be without blur and noise."""
        return np.asarray(self.truth * self.camera.gain + self.camera.pedestal, dtype=np.float32)


def embryo(
    shape: Sequence[int],
    *,
    seed: int,
    nuclei: Nuclei | None = None,
    camera: Camera | None = None,
    psf: FloatArray | None = None,
    arrangement: Arrangement = "embryo",
) -> SimulatedVolume:
    """Simulate the nuclei of an embryo and their low-light light-sheet image.

    Parameters
    ----------
    shape
        Voxels per axis (z, y, x), each at least 8.
    seed
        Seed, not negative. The same arguments give the same arrays.
    nuclei
        Sizes, shapes and brightness of the nuclei.
    camera
        Background, gain, offset and read noise of the camera.
    psf
        Point spread function; `light_sheet_psf` by default.
    arrangement
        ``"embryo"``: an ellipsoidal body that fills nine tenths of each axis, with a crowded shell of
        touching nuclei, crowded clusters and few nuclei elsewhere inside, none outside. ``"tissue"``:
        equally crowded everywhere.

    Returns
    -------
    SimulatedVolume
        Labels, truth, image and what made them.

    Raises
    ------
    ValueError
        If `shape` has not three axes of at least 8 voxels, the seed is negative, the arrangement is
        unknown, or the PSF cannot be used (see `forward`).

    Examples
    --------
    >>> volume = embryo((32, 48, 48), seed=1)
    >>> volume.image.dtype, volume.labels.shape, volume.n_nuclei > 5
    (dtype('uint16'), (32, 48, 48), True)
    """
    shape = checked_shape(shape)
    check_seed(seed)
    if arrangement not in ("embryo", "tissue"):
        raise ValueError(f"`arrangement` must be 'embryo' or 'tissue', got {arrangement!r}")
    nuclei, camera = nuclei or Nuclei(), camera or Camera()
    psf = light_sheet_psf() if psf is None else checked_psf(psf)
    phantom = (Embryo if arrangement == "embryo" else Tissue)(shape, seed, nuclei)
    labels, truth = phantom.render([slice(None)] * 3)
    return SimulatedVolume(labels, truth, forward(truth, psf, seed=seed, camera=camera), psf, camera)

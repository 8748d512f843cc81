"""What is simulated, and what one task does of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from chunkrestore.grid import Block, BlockGrid
from chunkrestore.jobs.ledger import Item
from chunkrestore.jobs.phases import computing
from chunkrestore.jobs.tasks import write_levels
from chunkrestore.ome_zarr.pyramid import Cascade
from chunkrestore.simulate.microscope import Microscope, check_seed

IMAGE, LABELS, TRUTH = "image", "labels", "truth"
"""What a simulation gives: the recorded image, the objects, and the image without blur and noise."""

_NBYTES_READ, _NBYTES_CORE = 12, 4
"""Peak of a task per voxel that it draws, and of its core: labels, photons and depths while objects are drawn, which
are more than labels, photons, image and truth afterwards; and what is encoded."""
_OVERHEAD_NBYTES = 2**25
"""Objects while they are drawn, and cells while they are imaged."""


class Source(Protocol):
    """What can be imaged: the phantoms of `chunkrestore.simulate`, `LabelledPhantom`, and others alike."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels per axis."""

    def render(self, region: Sequence[slice]) -> tuple[np.ndarray, np.ndarray]:
        """Return labels (int32) and photons per voxel (float32) of a region; the same bits for every cutting."""

    def describe(self) -> dict[str, Any]:
        """Return what decides every voxel, as JSON-compatible values."""


@dataclass(frozen=True)
class Simulation:
    """A phantom, the microscope that images it, and the seed of the noise; small, so tasks can take it along."""

    phantom: Source
    """What is there."""
    microscope: Microscope
    """What records it."""
    seed: int
    """Seed of the noise."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if len(self.shape) != self.microscope.ndim:
            raise ValueError(
                f"`microscope` has a `psf` of {self.microscope.ndim} axes, but the phantom of shape {self.shape} has "
                f"{len(self.shape)}; give one of as many"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of the volume per axis."""
        return tuple(self.phantom.shape)

    def describe(self) -> dict[str, Any]:
        """Return what decides every voxel, as JSON-compatible values."""
        return {
            "phantom": self.phantom.describe(),
            "microscope": self.microscope.describe(),
            "seed": self.seed,
        }

    def memory_nbytes(self, block_shape: Sequence[int]) -> int:
        """Return the peak memory of a task on a core of `block_shape` inside the volume."""
        core = tuple(slice(0, min(b, n)) for b, n in zip(block_shape, self.shape, strict=True))
        read = self.microscope.halo.read(core, [10**12] * len(core))
        n_read = math.prod(s.stop + r for s, r in zip(read, self.microscope.radius, strict=True))
        return _NBYTES_READ * n_read + _NBYTES_CORE * math.prod(s.stop for s in core) + _OVERHEAD_NBYTES

    def make(self, block: Block) -> dict[str, np.ndarray]:
        """Return what there is to write of the core of a block."""
        labels, photons = self.phantom.render(block.read)
        return {
            IMAGE: self.microscope.record(photons, block.read, block.core, self.shape, self.seed),
            LABELS: labels[block.trim],
            TRUTH: self.microscope.camera.reference(photons[block.trim]),
        }


def simulate_block(
    item: Item, simulation: Simulation, grid: BlockGrid, outputs: Mapping[str, Cascade]
) -> dict[str, Any]:
    """Simulate the core of a block and write it to all `outputs`; return for each what `write_levels` does."""
    block = grid.block(item[2:])
    with computing():
        made = simulation.make(block)
    return {name: write_levels(item, levels, block.core, made.pop(name)) for name, levels in outputs.items()}

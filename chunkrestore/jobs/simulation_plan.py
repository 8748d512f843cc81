"""What a simulation will write, how it is cut and stored: decided before anything is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import cutting
from chunkrestore.jobs.job import check_image_place, versions
from chunkrestore.jobs.passes import format_nbytes, times
from chunkrestore.jobs.simulation import IMAGE, LABELS, TRUTH, Simulation, Source
from chunkrestore.ome_zarr import ImageWriter, create_image, create_labels
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.layout import default_chunks, default_pyramid, default_shards
from chunkrestore.ome_zarr.read import label_names, open_label
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.psf.varying import PsfField
from chunkrestore.simulate.microscope import Microscope, light_sheet_psf
from chunkrestore.simulate.phantoms import VOXEL_SIZE

Store = str | os.PathLike[str]

NAME = "truth"
"""Of the labels."""
_DTYPES: dict[str, np.dtype[Any]] = {
    IMAGE: np.dtype(np.uint16),
    LABELS: np.dtype(np.int32),
    TRUTH: np.dtype(np.float32),
}
_LONGEST_BLOCK = {2: 4096, 3: 256}
"""Longest default block by number of axes: the halo of the point spread function is then a fifth of the voxels."""
_ITEMSIZE = 4
"""Bytes per voxel of the largest of them: all are stored in the same chunks and shards."""


@dataclass(frozen=True)
class SimulationPlan:
    """A simulation, and how it is cut and stored."""

    simulation: Simulation
    """What is simulated."""
    paths: dict[str, str]
    """Where the image goes, and the truth if it is wanted."""
    voxel_size: tuple[float, ...]
    """Micrometres per axis."""
    grid: BlockGrid
    """Blocks, with what is drawn around them."""
    chunks: tuple[int, ...]
    """Voxels that are compressed together."""
    shards: tuple[int, ...] | None
    """Voxels that are stored as one file, if not a chunk."""
    levels: int
    """Number of levels."""
    storage: dict[str, Any]
    """Version, compression and checksums."""
    channel: str
    """Name of the channel."""
    psf_file: str | None
    """File for the point spread function."""

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Core of a block."""
        return tuple(edges[1] for edges in self.grid.edges)

    @property
    def outputs(self) -> dict[str, str]:
        """Path of every group that is written."""
        return {IMAGE: self.paths[IMAGE], LABELS: self.labels_path} | self.paths

    @property
    def labels_path(self) -> str:
        """Group of the labels."""
        return stores.join(self.paths[IMAGE], "labels", NAME)

    @cached_property
    def written_nbytes(self) -> int:
        """Bytes of all levels before compression."""
        shapes = [level.shape for level in default_pyramid(self.grid.shape, self.voxel_size, self.levels)]
        return sum(map(math.prod, shapes)) * sum(_DTYPES[name].itemsize for name in self.outputs)

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the result."""
        return {
            "schema": 1,
            "kind": "simulate",
            "input": self.simulation.describe(),
            "output": {"labels": NAME, "outputs": self.outputs, "psf": self.psf_file} | self.storage,
            "block_shape": list(self.block_shape),
            "chunks": list(self.chunks),
            "shards": self.shards and list(self.shards),
            "levels": self.levels,
            "voxel_size": list(self.voxel_size),
            "channel": self.channel,
            "passes": [],
            "versions": versions(),
        }

    def request(self) -> dict[str, Any]:
        """Return the arguments of `simulate` that give this plan again, but for phantom and microscope."""
        return {
            "seed": self.simulation.seed,
            "truth": self.paths.get(TRUTH),
            "voxel_size": list(self.voxel_size),
            "channel": self.channel,
            "psf_file": self.psf_file,
            "block_shape": list(self.block_shape),
            "levels": self.levels,
            "shards": self.shards and list(self.shards),
            **self.storage,
        }

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible values, as reports and events tell it."""
        operator = {"operator": "simulate", **self.simulation.describe()}
        work = {
            "operators": [operator],
            "depth": [list(self.simulation.microscope.radius)],
            "block_shape": list(self.block_shape),
            "n_blocks": list(self.grid.n_blocks),
            "halo_overhead": round(self.grid.halo_overhead, 3),
            "read_amplification": None,
        }
        return {
            "shape": list(self.grid.shape),
            "dtype": "uint16",
            "n_timepoints": 1,
            "n_channels": 1,
            "passes": [work],
            "n_blocks": len(self.grid),
            "read_nbytes": 0,
            "written_nbytes": self.written_nbytes,
            "disk_nbytes": self.written_nbytes,
            "free_nbytes": stores.free_nbytes(self.paths[IMAGE]),
            "memory_nbytes": self.simulation.memory_nbytes(self.block_shape),
        }

    def __str__(self) -> str:
        described = self.describe()
        free = described["free_nbytes"]
        sides = " x ".join(f"{v:g}" for v in self.voxel_size)
        lines = [
            f"volume     {times(self.grid.shape)} voxels of {sides} um, {self.levels} levels",
            *(f"writes     {path} ({_DTYPES[name].name} {name})" for name, path in self.outputs.items()),
            f"blocks     {len(self.grid)} of {times(self.block_shape)}, chunks {times(self.chunks)}"
            + (f" in shards of {times(self.shards)}" if self.shards else ""),
            f"memory     {format_nbytes(described['memory_nbytes'])} per task",
            f"disk       at most {format_nbytes(self.written_nbytes)} before compression"
            + ("" if free is None else f", {format_nbytes(free)} free"),
        ]
        return "\n".join(lines)

    def check_outputs(self, *, overwrite: bool) -> None:
        """Raise if the outputs cannot be written where they should go; nothing is touched."""
        for path in self.paths.values():
            check_image_place(path, overwrite=overwrite)
        root = self.paths[IMAGE]
        for name in label_names(root):
            if (shape := open_label(root, name).spatial_shape) != self.grid.shape:
                raise ValueError(
                    f"`output` {root} has labels {name!r} of shape {shape}, which do not fit an image of shape "
                    f"{self.grid.shape}; choose another store, or remove it"
                )

    def create(self, name: str) -> ImageWriter:
        """Create the arrays of an output, replacing what is there."""
        common: dict[str, Any] = {
            "shape": self.grid.shape,
            "dtype": _DTYPES[name],
            "axes": "zyx"[-len(self.grid.shape) :],
            "voxel_size": self.voxel_size,
            "chunks": self.chunks,
            "shards": self.shards,
            "overwrite": True,
        } | self.storage
        if name == LABELS:
            return create_labels(self.paths[IMAGE], NAME, **common)
        return create_image(self.paths[name], channels=[self.channel], levels=self.levels, **common)


def plan_simulation(
    source: Source,
    output: Store,
    *,
    seed: int,
    microscope: Microscope | None = None,
    truth: Store | None = None,
    voxel_size: Sequence[float] | None = None,
    channel: str = "nuclei",
    psf_file: Store | None = None,
    block_shape: Sequence[int] | None = None,
    levels: int | None = None,
    version: str = "0.5",
    shards: Sequence[int] | None = None,
    compression: str = "zstd",
    checksums: bool = False,
) -> SimulationPlan:
    """Return what `simulate` would do with the same arguments; nothing is computed and nothing written.

    Raises
    ------
    ValueError
        If parameters do not fit together.
    """
    if microscope is None:
        psf = light_sheet_psf()
        microscope = Microscope(psf if len(source.shape) == 3 else psf.sum(0))
    simulation = Simulation(source, microscope, seed)
    shape = simulation.shape
    cutting.check_shape(shape)
    voxels = tuple(map(float, VOXEL_SIZE[-len(shape) :] if voxel_size is None else voxel_size))
    if len(voxels) != len(shape) or not all(0 < v < math.inf for v in voxels):
        raise ValueError(f"`voxel_size` {voxels} must have one positive length per axis of shape {shape}")
    paths = {IMAGE: stores.writable(stores.location(output))}
    if truth is not None:
        paths[TRUTH] = stores.writable(stores.location(truth))
        if stores.same(*paths.values()):
            raise ValueError(f"`truth` {paths[TRUTH]} is the output; give another store")
    grid, chunks, shards = _cut(simulation, block_shape, shards, version)
    Storage(version, chunks, shards, compression, checksums)  # raises
    return SimulationPlan(
        simulation,
        paths,
        voxels,
        grid,
        chunks,
        shards,
        len(default_pyramid(shape, voxels, levels)),
        {"version": version, "compression": compression, "checksums": checksums},
        channel,
        None if psf_file is None else _checked_psf_file(psf_file, microscope),
    )


def _cut(
    simulation: Simulation, block_shape: Sequence[int] | None, shards: Sequence[int] | None, version: str
) -> tuple[BlockGrid, tuple[int, ...], tuple[int, ...] | None]:
    """Return blocks, chunks and shards."""
    shape = simulation.shape
    for name, lengths in (("block_shape", block_shape), ("shards", shards)):
        if lengths is not None and (len(lengths) != len(shape) or min(lengths) < 1):
            raise ValueError(
                f"`{name}` {tuple(lengths)} must have one length of at least 1 per axis of {shape}"
            )
    chunks = default_chunks(len(shape))
    if shards is not None:
        chunks = cutting.chunks_of_shards(shards)
    elif block_shape is not None:
        chunks = cutting.chunks_of_blocks([min(b, n) for b, n in zip(block_shape, shape, strict=True)], shape)
    unit = tuple(shards or chunks)
    block = block_shape or [max(_LONGEST_BLOCK[len(shape)] // u, 1) * u for u in unit]
    block = [min(int(b), n) for b, n in zip(block, shape, strict=True)]
    cutting.check_count(shape, block, 1)
    if shards is None and version != "0.4":
        shards = default_shards(shape, _ITEMSIZE, chunks=chunks, block_shape=block)
    grid = BlockGrid.regular(shape, block, simulation.microscope.halo, write_unit=shards or chunks)
    return grid, chunks, None if shards is None else tuple(shards)


def _checked_psf_file(path: Store, microscope: Microscope) -> str:
    """Return where the point spread function goes, or raise if it cannot be stored there."""
    file = Path(path).absolute()
    kinds = (".yaml", ".yml") if isinstance(microscope.psf, PsfField) else (".tif", ".tiff")
    if file.suffix.lower() not in kinds:
        raise ValueError(f"`psf_file` {file} must end in {' or '.join(kinds)} for this point spread function")
    if not file.parent.is_dir():
        raise ValueError(f"`psf_file` {file}: its folder does not exist; create it first")
    return str(file)

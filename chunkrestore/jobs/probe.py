"""What a worker does to find out how long blocks take: the work of a few of them, without writing anything."""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from chunkrestore import statistics
from chunkrestore.grid import Block, Slices
from chunkrestore.jobs.passes import Pass
from chunkrestore.jobs.plan import Plan
from chunkrestore.jobs.stages import RANGE
from chunkrestore.jobs.tasks import apply_within_memory
from chunkrestore.ome_zarr.downsampling import downsample_labels, downsample_mean
from chunkrestore.ome_zarr.layout import level_chunks
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.operators.base import ObjectOperator, PilotOperator, Table, VoxelOperator
from chunkrestore.stitch.objects import number_objects

if TYPE_CHECKING:
    from chunkrestore.ome_zarr import RegionReader

Read: TypeAlias = Callable[[Slices], np.ndarray]
"""Returns the voxels of a region."""

_GOLDEN = (0.7548776662466927, 0.5698402909980532, 0.4301597090019468)
"""Powers of the reciprocal plastic number: their multiples, modulo 1, fill a cube evenly (Roberts' R sequence)."""

_SEAM_LENGTH = 16
"""Voxels per axis that are compared around a probed block border."""


@dataclass
class StageProbe:
    """What a few blocks of one stage took."""

    name: str
    """As in the journal."""
    n_items: int
    """Blocks of the whole stage."""
    n_voxels: int
    """Voxels of the whole stage, counted as `voxels` are."""
    seconds: list[float] = field(default_factory=list)
    """Time per probed block."""
    voxels: list[int] = field(default_factory=list)
    """Voxels per probed block: those read where halos matter, else those of the core."""

    def add(self, seconds: float, voxels: int) -> None:
        """Note one block."""
        self.seconds.append(seconds)
        self.voxels.append(voxels)


@dataclass
class PassProbe:
    """What a few blocks of one pass took on one worker."""

    stages: list[StageProbe] = field(default_factory=list)
    """In order."""
    warm_up_seconds: float = 0.0
    """What the first block took more than the same block again, and the first access to the store."""
    stored: list[tuple[int, int]] = field(default_factory=list)
    """Compressed bytes, and bytes of voxels, of every probed core."""
    stored_reduced: list[tuple[int, int]] = field(default_factory=list)
    """The same one level above."""
    table_nbytes: list[int] = field(default_factory=list)
    """Bytes of the tables of every probed core."""


def probe_plan(plan: Plan, source: RegionReader, n_probes: int, device: str) -> list[PassProbe]:
    """Probe every pass of a plan on the first time point and channel of its input."""
    reads: list[Read] = [lambda region: source.read(0, 0, region)] * n_probes
    opened = _seconds(reads[0], plan.passes[0].grid.block((0,) * len(plan.shape)).core)
    probes = []
    for position in range(len(plan.passes)):
        probe = _Probing(plan, position, reads, device)
        results = probe.run()
        # What the next pass reads is not stored anywhere. These results are like it, but for their position.
        reads = [_mirrored(result) for result in results]
        probes.append(probe.found)
    probes[0].warm_up_seconds += opened
    return probes


def probed_indices(n_blocks: Sequence[int], n_probes: int) -> list[tuple[int, ...]]:
    """Return different blocks: the middle one, the first one (in a corner), and others spread in between."""
    found = {tuple(n // 2 for n in n_blocks): None, (0,) * len(n_blocks): None}
    for i in range(1, 20 * n_probes):
        if len(found) >= n_probes:
            break
        spread = (int((0.5 + i * g) % 1.0 * n) for g, n in zip(_GOLDEN, n_blocks, strict=False))
        found.setdefault(tuple(spread))
    return list(found)[:n_probes]


class _Probing:
    """The probes of one pass on this worker."""

    def __init__(self, plan: Plan, position: int, reads: Sequence[Read], device: str) -> None:
        self.work: Pass = plan.passes[position]
        self.found = PassProbe()
        self._plan = plan
        self._position = position
        self._device = device
        indices = probed_indices(self.work.grid.n_blocks, len(reads))
        self._blocks = [self.work.grid.block(index) for index in indices]
        self._reads = reads[: len(indices)]

    def run(self) -> list[np.ndarray]:
        """Go through the stages of the pass; return what it makes of the cores."""
        numbers = self._numbers() if self.work.n_scans else {}
        first, *others = self.work.operators
        if "pilot" in first.needs and isinstance(first, PilotOperator):
            numbers["pilot"] = self._pilot(first, numbers)
        if first.needs:
            n = self.work.n_channels
            first = first.resolve(
                numbers if n == 1 else {name: (value,) * n for name, value in numbers.items()}
            )
        if isinstance(first, ObjectOperator):
            return self._labels(first)
        if isinstance(first, VoxelOperator):
            return self._voxels(first)
        return self._image([first, *others])

    def _stage(self, name: str, *, per_plane: int | None = None, n_voxels: int | None = None) -> StageProbe:
        """Begin a stage of one item per block, over all cores, unless told otherwise."""
        grid, n_planes = self.work.grid, self._plan.n_planes
        n_items = len(grid) if per_plane is None else per_plane
        voxels = math.prod(grid.shape) if n_voxels is None else n_voxels
        stage = StageProbe(name, n_planes * n_items, n_planes * voxels)
        self.found.stages.append(stage)
        return stage

    def _numbers(self) -> dict[float | str, Any]:
        """Return the numbers that the pass needs, of the probed cores alone."""
        needs = (self.work.needs - {"pilot"}) | (set(RANGE) if self.work.has_seams else set())
        cores = list(zip(self._reads, (block.core for block in self._blocks), strict=True))
        scan, summaries = self._stage("statistics"), []
        for read, core in cores:
            started = time.perf_counter()
            summaries.append(statistics.summarize(read(core)))
            scan.add(time.perf_counter() - started, _n_voxels(core))
        summary = statistics.merge(summaries)
        wanted = statistics.refinement(summary, needs)
        if wanted is None:
            return statistics.values(summary, needs)
        scan, refined = self._stage("refinement"), []
        for read, core in cores:
            started = time.perf_counter()
            refined.append(statistics.refine(read(core), wanted))
            scan.add(time.perf_counter() - started, _n_voxels(core))
        return statistics.values(summary, needs, wanted, np.sum(refined, axis=0))

    def _pilot(self, operator: PilotOperator, numbers: dict[float | str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        decision = operator.pilot(numbers, self._reads[0], self.work.grid.shape)
        self._stage("pilots", per_plane=1, n_voxels=1).add(time.perf_counter() - started, 1)
        return decision

    def _image(self, operators: Sequence[Any]) -> list[np.ndarray]:
        grid = self.work.grid

        def compute(block: Block, read: Read) -> np.ndarray:
            result, _ = apply_within_memory(
                operators, block.core, grid.shape, block.index, read, self._device
            )
            return result

        cold = _seconds(compute, self._blocks[0], self._reads[0])
        stage = self._stage(f"blocks-{self._position}", n_voxels=self.work.n_voxels_read)
        seams = self._seams() if self.work.has_seams else None
        pyramid = self._pyramid_stage(f"pyramid-{self._position}")
        results: list[np.ndarray] = []
        for block, read in zip(self._blocks, self._reads, strict=True):
            started = time.perf_counter()
            result = compute(block, read)
            seconds = time.perf_counter() - started
            if not results:
                self.found.warm_up_seconds = max(cold - seconds, 0.0)
            voxels = _n_voxels(self.work.blocks(block)[0].read)
            stage.add(seconds + self._store(result, pyramid), voxels)
            if seams is not None:
                seams.add(seconds, voxels)
            results.append(result)
        return results

    def _seams(self) -> StageProbe:
        """Begin the stage that compares both sides of one border per axis, on one plane, with twice the depth."""
        grid = self.work.grid
        n_seams = sum(n > 1 for n in grid.n_blocks)
        depths = zip(*(operator.halo(grid.shape).depth for operator in self.work.operators), strict=True)
        lengths = (min(_SEAM_LENGTH + 4 * sum(d), n) for d, n in zip(depths, grid.shape, strict=True))
        stage = StageProbe(f"seams-{self._position}", n_seams, n_seams * math.prod(lengths))
        if n_seams:
            self.found.stages.append(stage)
        return stage

    def _labels(self, operator: ObjectOperator) -> list[np.ndarray]:
        cold = _seconds(operator.detect, self._channels(self._reads[0], self._blocks[0]), self._blocks[0])
        detect = self._stage("detect", n_voxels=self.work.n_voxels_read)
        paint = self._stage("paint")
        pyramid = self._pyramid_stage("labels_pyramid")
        results: list[np.ndarray] = []
        for block, read in zip(self._blocks, self._reads, strict=True):
            started = time.perf_counter()
            image = self._channels(read, block)
            read_seconds = time.perf_counter() - started
            table = operator.detect(image, block)
            # Decided, measured and numbered as if the block were alone, which is most of that work.
            objects = number_objects(operator, self.work.grid, {block.index: table})
            seconds = time.perf_counter() - started
            if not results:
                self.found.warm_up_seconds = max(cold - (seconds - read_seconds), 0.0)
            detect.add(seconds, _n_voxels(block.read))
            started = time.perf_counter()
            own = objects.at(block.index)
            labels = operator.paint(block, own)
            seconds = time.perf_counter() - started
            paint.add(seconds + self._store(labels, pyramid), _n_voxels(block.core))
            self.found.table_nbytes.append(sum(map(_table_nbytes, (table, *own))))
            results.append(labels)
        return results

    def _voxels(self, operator: VoxelOperator) -> list[np.ndarray]:
        def compute(block: Block, read: Read) -> np.ndarray:
            return operator(self._channels(read, block), block)[block.trim]

        cold = _seconds(compute, self._blocks[0], self._reads[0])
        paint = self._stage("paint", n_voxels=self.work.n_voxels_read)
        pyramid = self._pyramid_stage("labels_pyramid")
        results: list[np.ndarray] = []
        for block, read in zip(self._blocks, self._reads, strict=True):
            started = time.perf_counter()
            labels = compute(block, read)
            seconds = time.perf_counter() - started
            if not results:
                self.found.warm_up_seconds = max(cold - seconds, 0.0)
            paint.add(seconds + self._store(labels, pyramid), _n_voxels(block.read))
            results.append(labels)
        return results

    def _channels(self, read: Read, block: Block) -> np.ndarray:
        """Return what a label operator gets: for one that takes several channels, the first one for each."""
        n = self.work.n_channels
        return read(block.read) if n == 1 else np.stack([read(block.read)] * n, axis=-1)

    def _pyramid_stage(self, name: str) -> StageProbe | None:
        """Begin the stage that makes levels, counted in voxels of the level below each."""
        levels = self.work.levels
        if len(levels) == 1:
            return None
        return self._stage(name, n_voxels=sum(map(math.prod, levels[:-1])))

    def _chunks(self, level: int) -> tuple[int, ...]:
        """Return the chunk shape of a level, which is clipped to it."""
        return level_chunks(self.work.levels[level], self.work.chunks, self.work.shards)[0]

    def _store(self, result: np.ndarray, pyramid: StageProbe | None) -> float:
        """Compress a result as it would be stored, and the level above it; return the seconds of the former."""
        started = time.perf_counter()
        encoded = _encoded(result, self._chunks(0))
        seconds = time.perf_counter() - started
        self.found.stored.append((sum(map(len, encoded)), result.nbytes))
        if pyramid is not None:
            codec, started = Storage().numcodec(), time.perf_counter()
            for chunk in encoded:
                codec.decode(chunk)
            levels = self.work.levels
            factors = [-(-a // b) for a, b in zip(levels[0], levels[1], strict=True)]
            reduce = downsample_labels if self.work.makes_labels else downsample_mean
            reduced = reduce(result, factors)
            encoded = _encoded(reduced, self._chunks(1))
            pyramid.add(time.perf_counter() - started, result.size)
            self.found.stored_reduced.append((sum(map(len, encoded)), reduced.nbytes))
        return seconds


def _mirrored(array: np.ndarray) -> Read:
    """Return a reader of regions that are filled with an array, mirrored at its borders."""

    def read(region: Slices) -> np.ndarray:
        shape = [s.stop - s.start for s in region]
        part = array[tuple(slice(n) for n in shape)]
        missing = [(0, n - m) for n, m in zip(shape, part.shape, strict=True)]
        return np.pad(part, missing, mode="symmetric")

    return read


def _encoded(array: np.ndarray, chunks: Sequence[int]) -> list[bytes]:
    """Return the chunks of an array, compressed; those at its end are filled up with zeros, as they are stored."""
    codec, encoded = Storage().numcodec(), []
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(array.shape, chunks, strict=True))):
        part = array[tuple(slice(a, a + c) for a, c in zip(corner, chunks, strict=True))]
        if part.any():  # chunks of nothing but the fill value are not stored
            chunk = np.zeros(chunks, array.dtype)
            chunk[tuple(slice(n) for n in part.shape)] = part
            encoded.append(codec.encode(chunk))
    return encoded


def _table_nbytes(table: Table) -> int:
    """Return the size of the file that holds a table."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **table)
    return file.tell()


def _n_voxels(region: Slices) -> int:
    return math.prod(s.stop - s.start for s in region)


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started

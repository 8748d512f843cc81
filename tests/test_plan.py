"""Plans: passes, blocks and figures from metadata alone."""

import itertools
import json
import math
import time
import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chunkrestore as cr
from chunkrestore.grid import Halo
from chunkrestore.jobs.passes import format_nbytes
from chunkrestore.jobs.plan import MEMORY_NBYTES, make_plan
from chunkrestore.ome_zarr import create_image
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.operators.storing import AsType
from chunkrestore.operators.threshold import Threshold
from chunkrestore.psf import gaussian

U16 = np.dtype(np.uint16)


@dataclass(frozen=True)
class Smooth:
    """An image operator of which only the plan matters."""

    depth: int | tuple[int, ...] = 3
    needs: frozenset = frozenset()
    align: int = 1
    nbytes_per_voxel: int = 24

    name = "smooth"

    def resolve(self, statistics):
        return self

    def check(self, shape, dtype):
        if len(shape) != 3:
            raise ValueError("`image` must have three axes")

    def halo(self, shape):
        depth = (self.depth,) * 3 if isinstance(self.depth, int) else self.depth
        return Halo(depth, (self.align,) * 3)

    def memory_nbytes(self, read_shape):
        return self.nbytes_per_voxel * math.prod(read_shape)

    def describe(self):
        return {"operator": self.name}

    def __call__(self, image, block=None):
        raise AssertionError("a plan computes nothing")


def groups(operators, shape=(100, 100, 100), **options):
    return [
        [type(o).__name__ for o in p.operators] for p in make_plan(operators, shape, U16, **options).passes
    ]


def test_operators_share_a_pass():
    assert groups([Smooth(), Smooth(), Smooth()], block_shape=(32, 32, 32)) == [["Smooth"] * 3]


def test_an_operator_that_needs_a_number_of_the_result_before_it_begins_a_pass():
    needy = Smooth(needs=frozenset({99.8}))
    assert groups([needy, Smooth()], block_shape=(32, 32, 32)) == [["Smooth", "Smooth"]]
    assert groups([Smooth(), needy], block_shape=(32, 32, 32)) == [["Smooth"], ["Smooth"]]


def test_labels_have_a_pass_of_their_own():
    assert groups([Smooth(), Threshold(3.0)], block_shape=(32, 32, 32)) == [["Smooth"], ["Threshold"]]


def test_a_halo_deeper_than_a_block_is_split_but_not_along_an_axis_of_one_block():
    twice = [Smooth(depth=(20, 3, 3)), Smooth(depth=(20, 3, 3))]
    assert groups(twice, block_shape=(32, 32, 32)) == [["Smooth"], ["Smooth"]]
    assert groups(twice, block_shape=(40, 32, 32)) == [["Smooth", "Smooth"]]
    assert groups(twice, shape=(16, 100, 100), block_shape=(32, 32, 32)) == [["Smooth", "Smooth"]]


@given(st.integers(1, 60), st.integers(5, 40), st.integers(0, 9), st.integers(0, 9))
def test_voxels_read_are_those_of_all_blocks(n, block, first, second):
    plan = make_plan([Smooth(first), Smooth(second)], (n, 50, 33), U16, block_shape=(block, 20, 33))
    for work in plan.passes:
        reads = [work.blocks(block)[0].read_shape for block in work.grid]
        assert work.n_voxels_read == sum(math.prod(shape) for shape in reads)
        for block in work.grid:
            nested = work.blocks(block)
            assert nested[-1].core == block.core
            for outer, inner in itertools.pairwise(nested):
                assert outer.core == inner.read


@given(st.tuples(*[st.integers(1, 700)] * 3), st.one_of(st.none(), st.tuples(*[st.integers(5, 300)] * 3)))
def test_cores_lie_on_chunk_borders(shape, block_shape):
    work = make_plan([Threshold(1.0)], shape, U16, block_shape=block_shape).passes[0]
    for edges, chunk, n in zip(work.grid.edges, work.chunks, shape, strict=True):
        assert all(edge % chunk == 0 or edge == n for edge in edges)
        assert chunk <= max(64, edges[1])


def test_one_block_along_a_long_axis_does_not_make_one_long_chunk():
    assert make_plan([Threshold(1.0)], (997, 64, 64), U16, block_shape=(1000, 64, 64)).passes[0].chunks == (
        64,
        64,
        64,
    )


SHARDS = st.tuples(*[st.sampled_from([32, 64, 96, 128, 192, 256, 300])] * 3)


@given(st.tuples(*[st.integers(1, 900)] * 3), SHARDS, st.one_of(st.none(), st.integers(300**3, 2**32)))
def test_default_cores_lie_on_shard_borders_and_chunks_divide_shards(shape, shards, memory):
    operator = Smooth(0, nbytes_per_voxel=1)
    work = make_plan([operator], shape, U16, shards=shards, memory_nbytes=memory).passes[0]
    assert work.shards == shards
    for edges, shard, chunk, n in zip(work.grid.edges, shards, work.chunks, shape, strict=True):
        assert all(edge % shard == 0 or edge == n for edge in edges)
        assert shard % chunk == 0


def test_the_output_that_a_plan_describes_can_be_created(tmp_path):
    shape = (40, 200, 500)
    work = make_plan([Smooth()], shape, U16, shards=(64, 128, 128)).passes[0]
    writer = create_image(
        tmp_path / "out.ome.zarr",
        shape=shape,
        dtype="float32",
        axes="zyx",
        chunks=work.chunks,
        shards=work.shards,
    )
    assert tuple(writer.target(level).spatial_shape for level in range(writer.n_levels)) == work.levels
    unit = writer.target(0).spatial_write_unit
    for edges, u, n in zip(work.grid.edges, unit, shape, strict=True):
        assert all(edge % u == 0 or edge == n for edge in edges)


def test_borders_that_cut_a_file_are_a_bug():
    work = make_plan([Smooth()], (96, 96, 96), U16, block_shape=(32, 32, 32)).passes[0]
    with pytest.raises(AssertionError, match="cut files of 48 voxels"):
        replace(work, shards=(48, 48, 48))


def test_default_blocks_fit_the_memory_and_use_it():
    operator = Smooth(10, nbytes_per_voxel=200)
    work = make_plan([operator], (2000, 2000, 2000), U16).passes[0]
    assert work.memory_nbytes <= MEMORY_NBYTES
    larger = [edges[1] + 64 for edges in work.grid.edges]
    assert make_plan([operator], (2000, 2000, 2000), U16, block_shape=larger).memory_nbytes > MEMORY_NBYTES


def test_default_blocks_have_a_largest_size():
    work = make_plan([Smooth(10, nbytes_per_voxel=1)], (2000, 2000, 2000), U16).passes[0]
    assert [edges[1] for edges in work.grid.edges] == [512, 512, 512]


def test_default_blocks_are_a_chunk_at_least():
    work = make_plan([Smooth(nbytes_per_voxel=10**6)], (200, 200, 200), U16).passes[0]
    assert [edges[1] for edges in work.grid.edges] == [64, 64, 64]


def test_given_depth_goes_to_operators_that_take_one():
    plan = make_plan([Smooth(3), Threshold(1.0)], (90, 90, 90), U16, depth=7, block_shape=(30, 30, 30))
    assert [p.describe()["depth"] for p in plan.passes] == [[[7, 7, 7]], [[0, 0, 0]]]
    plan = make_plan([Smooth(3)], (90, 90, 90), U16, depth=(1, 2, 3), block_shape=(30, 30, 30))
    assert plan.passes[0].grid.halo.depth == (1, 2, 3)


@pytest.mark.parametrize(
    ("operators", "options", "message"),
    [
        (
            [AsType("uint8"), Smooth()],
            {},
            "`operators` have smooth after as-type, which must be the last that makes an image",
        ),
        ([Threshold(1.0), Smooth()], {}, "threshold makes labels and must be the last operator"),
        ([Smooth()], {"block_shape": (8, 8)}, r"`block_shape` \(8, 8\) must have one length per axis"),
        ([Smooth()], {"block_shape": (8, 0, 8)}, "must be at least 1 on every axis"),
        ([Smooth()], {"depth": (1, 2)}, r"`depth` \(1, 2\) must be at least 0 and have one number per axis"),
        ([Smooth()], {"depth": -1}, "`depth` -1 must be at least 0"),
        (
            [Smooth(align=16)],
            {"block_shape": (32, 8, 32)},
            "`block_shape` 8 on axis 1 is smaller than the pooling grid of smooth; use at least 16",
        ),
        (
            [Smooth()],
            {"block_shape": (1, 1, 1)},
            "cuts the volume .* into 27000000 blocks, the limit is 10000000",
        ),
        (
            [Smooth()],
            {"block_shape": (100, 64, 64), "shards": (64, 64, 64)},
            "`block_shape` 100 on axis 0 is not a multiple of the output chunk or shard length 64; use 64",
        ),
        ([Smooth()], {"shards": (64, 64)}, r"`shards` \(64, 64\) must have one length per axis"),
        ([Smooth()], {"shards": (64, 64, 0)}, "`shards` .* must be at least 1 on every axis"),
        (
            [Smooth()],
            {"shards": (1009, 1009, 1009)},
            r"`shards` \(1009, 1009, 1009\) can only be stored in chunks .* the limit is 2147483647",
        ),
        ([Smooth()], {"n_timepoints": 0}, "`n_timepoints` 0 and `n_channels` 1 must be at least 1"),
        (
            [Smooth()],
            {"n_timepoints": 10**12, "n_channels": 10**9},
            "of 1000000000000000000000 time points and channels into .* fewer time points and channels",
        ),
        (
            [Smooth(nbytes_per_voxel=1000)],
            {"memory_nbytes": 10**6},
            r"`memory` of 1 MB is too little: a block of \(64, 64, 64\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(operators, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(operators, (300, 300, 300), U16, **options)


def test_figures_count_time_points_channels_and_passes():
    plan = make_plan(
        [Smooth(0), Threshold(1.0)], (32, 32, 32), U16, n_timepoints=3, n_channels=2, block_shape=(16, 32, 32)
    )
    assert plan.n_planes == 6
    assert plan.n_blocks == 6 * 2 * 2
    assert plan.read_nbytes == 6 * 32**3 * (2 + 4)
    assert plan.written_nbytes == 6 * 32**3 * (4 + 4)
    described = plan.describe()
    assert described["passes"][0]["n_blocks"] == [2, 1, 1]
    assert described["passes"][0]["halo_overhead"] == 1.0


F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Tolerant(Smooth):
    """An operator whose seams are probed."""

    tolerance: float = 1e-3


@pytest.mark.parametrize(
    ("operators", "dtype", "n_scans"),
    [
        ([Smooth()], U16, [0]),
        ([Smooth()], F32, [1]),
        ([Smooth(needs=frozenset({"mean"}))], U16, [1]),
        ([Smooth(needs=frozenset({"mean"}))], F32, [1]),
        ([Smooth(needs=frozenset({"pilot"}))], U16, [0]),
        ([Smooth(needs=frozenset({99.8}))], U16, [1]),
        ([Smooth(needs=frozenset({99.8}))], F32, [2]),
        ([Tolerant()], U16, [1]),
        ([Smooth(), Threshold()], U16, [0, 2]),
        ([Smooth(), Threshold(1.0)], F32, [1, 0]),
    ],
)
def test_readings_for_statistics_are_counted(operators, dtype, n_scans):
    plan = make_plan(operators, (32, 32, 32), dtype)
    assert [p.n_scans for p in plan.passes] == n_scans
    unscanned = sum(p.dtype.itemsize * p.n_voxels_read for p in plan.passes)
    scans = sum(n * p.dtype.itemsize * 32**3 for n, p in zip(n_scans, plan.passes, strict=True))
    assert plan.read_nbytes == unscanned + scans


def test_the_pyramid_is_read_written_and_kept():
    plan = make_plan([Smooth(0)], (100, 200, 200), U16, voxel_size=(2, 1, 1), n_channels=3)
    levels = [(100, 200, 200), (100, 100, 100), (50, 50, 50)]
    assert plan.passes[0].levels == tuple(levels)
    sizes = [4 * math.prod(shape) for shape in levels]
    assert plan.written_nbytes == plan.disk_nbytes == 3 * sum(sizes)
    assert plan.read_nbytes == 3 * 2 * math.prod(levels[0])
    # Two levels of the pyramid follow from regions of the first one, where blocks are too short to hold them.
    cut = make_plan([Smooth(0)], (100, 200, 200), U16, voxel_size=(2, 1, 1), block_shape=(100, 64, 64))
    assert cut.passes[0].levels_read == (0,)
    assert cut.read_nbytes == 2 * math.prod(levels[0]) + sizes[0]


def test_disk_holds_scratch_images_only_as_long_as_they_are_read():
    needy = Smooth(0, needs=frozenset({99.8}))
    plan = make_plan([Smooth(0), needy, needy, Threshold()], (64, 64, 128), U16)
    level, pyramid = 4 * 64 * 64 * 128, 4 * (64 * 64 * 128 + 32 * 32 * 64)
    assert [p.written_nbytes for p in plan.passes] == [level, level, pyramid, pyramid]
    assert plan.written_nbytes == 2 * level + 2 * pyramid
    assert plan.disk_nbytes == max(2 * level, level + pyramid, 2 * pyramid)
    assert plan.largest_on_disk([1, 1, 1, 1]) == 2
    assert plan.largest_on_disk([5, 7, 1, 1]) == 12
    assert make_plan([Threshold()], (64, 64, 128), U16).disk_nbytes == pyramid


def test_memory_of_a_worker_holds_the_blocks_before_and_after():
    work = make_plan([Smooth(2, nbytes_per_voxel=24)], (96, 96, 96), U16, block_shape=(32, 32, 32)).passes[0]
    assert work.memory_nbytes == 24 * 36**3
    assert work.worker_nbytes == work.memory_nbytes + 2 * (2 * 36**3 + 4 * 32**3)
    assert work.device_nbytes == 0
    psf = gaussian((1.0, 1.0, 1.0))
    work = make_plan(
        [RichardsonLucy(psf, iterations=2), Smooth(nbytes_per_voxel=10**3)], (96,) * 3, U16
    ).passes[0]
    assert 0 < work.device_nbytes < work.memory_nbytes


def test_peak_is_that_of_a_whole_block_where_the_last_one_is_short():
    work = make_plan([Smooth(0, nbytes_per_voxel=1)], (65, 64, 64), U16, block_shape=(64, 64, 64)).passes[0]
    assert work.memory_nbytes == 64**3


BIG = 2**40


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((BIG, BIG, BIG), {}, f"has {BIG**3} voxels, the limit is {2**62}; use a region"),
        ((np.int64(BIG),) * 3, {"block_shape": (BIG,) * 3}, f"has {BIG**3} voxels"),
        ((BIG, 1, 1), {}, "`block_shape` 512 on axis 0 cuts its 1099511627776 voxels into 2147483648 blocks"),
        ((1, 1, BIG), {"memory_nbytes": 2**22}, "blocks, the limit is 100000 per axis; use longer blocks"),
        ((1, 0, 5), {}, "must be at least 1 on every axis"),
        ((1, -4, 5), {}, "must be at least 1 on every axis"),
    ],
)
def test_hostile_shapes_are_refused_at_once(shape, options, message):
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            make_plan([Smooth(nbytes_per_voxel=1)], shape, U16, **options)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 1


def test_large_shapes_are_planned_without_overflow():
    plan = make_plan([Smooth(0, nbytes_per_voxel=1)], (1, 2**20, BIG), U16, memory_nbytes=2**50)
    assert plan.passes[0].memory_nbytes <= 2**50
    assert plan.written_nbytes > 4 * 2**60
    assert sum(edges[-1] for edges in plan.passes[0].grid.edges) == 1 + 2**20 + BIG
    fft_friendly = RichardsonLucy(gaussian((1.0, 1.0, 1.0)), iterations=2)
    plan = make_plan([fft_friendly], (BIG, 8, 8), U16, block_shape=(2**36 + 64, 8, 8))
    assert plan.memory_nbytes > 20 * 2**36 * 64


def test_a_million_blocks_are_planned_and_walked_in_bounded_memory():
    tracemalloc.start()
    try:
        plan = make_plan([Smooth(8)], (17_200,) * 3, U16, block_shape=(172,) * 3)
        assert plan.n_blocks == 10**6
        assert len(str(plan)) < 2000
        assert len(json.dumps(plan.describe())) < 4000
        for block in itertools.islice(plan.passes[0].grid, 10_000):
            assert all(s.start % 172 == 0 for s in block.core)
        assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    finally:
        tracemalloc.stop()


def test_a_plan_as_json_says_what_it_takes():
    plan = make_plan([Smooth(4)], (64, 64, 100), U16, shards=(64, 64, 64))
    described = json.loads(json.dumps(replace(plan, free_nbytes=12345).describe()))
    assert described["free_nbytes"] == 12345
    assert described["disk_nbytes"] == plan.disk_nbytes
    work = described["passes"][0]
    assert (work["shards"], work["chunks"]) == ([64, 64, 64], [64, 64, 64])
    assert work["levels"] == [[64, 64, 100], [32, 32, 50]]
    assert work["worker_nbytes"] > work["memory_nbytes"] > 0
    assert make_plan([Smooth(4)], (64, 64, 100), U16).describe()["passes"][0]["shards"] is None


def test_a_plan_says_whether_the_disk_is_large_enough():
    plan = make_plan([Smooth(4)], (64, 64, 64), U16, shards=(64, 64, 64))
    assert "in shards 64 x 64 x 64" in str(plan)
    assert str(plan).endswith("disk       at most 1.05 MB before compression")
    assert str(replace(plan, free_nbytes=10**7)).endswith("1.05 MB before compression, 10 MB free")
    assert "1 MB free: only enough if it compresses well" in str(replace(plan, free_nbytes=10**6))


def test_a_plan_reads_well():
    text = str(make_plan([Smooth(4), Threshold(1.0)], (64, 64, 64), U16, block_shape=(32, 32, 32)))
    assert "volume     64 x 64 x 64 uint16, 1 time points, 1 channels" in text
    assert "halo     smooth depth 4 x 4 x 4" in text
    assert "blocks   2 x 2 x 2 of 32 x 32 x 32" in text
    assert "in all     16 blocks" in text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2.5 TB"), (3e15, "3e+03 TB")]
)
def test_bytes_are_written_for_people(n, text):
    assert format_nbytes(n) == text


@given(
    st.tuples(*[st.integers(5, 60)] * 3),
    st.tuples(*[st.integers(1, 20)] * 3),
    st.tuples(*[st.integers(0, 9)] * 3),
    st.integers(0, 6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_read_amplification_counts_every_voxel_of_the_chunks_that_blocks_touch(shape, chunks, first, depth):
    work = replace(
        make_plan([Smooth(depth)], shape, U16, block_shape=(16, 16, 16)).passes[0],
        source_chunks=chunks,
        source_first=first,
    )
    touched = 0
    for block in work.grid:
        stored = [range(r.start + f, r.stop + f) for r, f in zip(block.read, first, strict=True)]
        touched += math.prod(len({i // c for i in along}) for along, c in zip(stored, chunks, strict=True))
    assert work.read_amplification == touched * math.prod(chunks) / math.prod(shape)
    assert f"{work.halo_overhead:.2f} voxels read and {work.read_amplification:.2f} decoded per voxel" in str(
        work
    )


def test_a_plan_knows_the_chunks_of_its_input_and_of_what_it_stores_on_the_way(tmp_path):
    voxels = np.zeros((20, 40, 40), np.uint16)
    image = cr.write_image(voxels, tmp_path / "in.zarr", axes="zyx", chunks=(20, 10, 30))
    part = {"region": [(0, 20), (5, 40), (0, 40)], "block_shape": (10, 16, 16)}
    made = cr.plan([Smooth(1), Threshold(1.0)], image, **part)
    assert [p.source_chunks for p in made.passes] == [(20, 10, 30), (10, 16, 16)]
    assert made.passes[0].source_first == (0, 5, 0)
    assert made.describe()["passes"][0]["read_amplification"] >= 1


def test_many_chunks_are_stored_as_few_files_that_blocks_are_made_of():
    made = make_plan([Smooth()], (2000, 2000, 2000), U16, block_shape=(256, 384, 512)).passes[0]
    assert (made.chunks, made.shards) == ((64, 64, 64), (256, 192, 256))
    assert make_plan([Smooth()], (2000, 2000, 2000), U16, version="0.4").passes[0].shards is None
    assert make_plan([Smooth()], (500, 500, 500), U16).passes[0].shards is None


def test_labels_beside_an_image_of_version_0_4_have_no_shards(tmp_path):
    for version, has_shards in (("0.4", False), ("0.5", True)):
        path = tmp_path / version
        writer = create_image(path, shape=(3000, 3000, 3000), dtype="uint16", axes="zyx", version=version)
        writer.publish()
        made = cr.plan(Threshold(1.0), path, path)
        assert (made.passes[0].shards is not None) is has_shards
        alone = cr.plan(Threshold(1.0), path, version=version)
        assert (alone.passes[0].shards is not None) is has_shards

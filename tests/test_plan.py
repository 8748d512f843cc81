"""Plans: passes, blocks and figures from metadata alone."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore.grid import Halo
from chunkrestore.jobs.plan import MEMORY_NBYTES, format_nbytes, make_plan
from chunkrestore.operators.threshold import Threshold

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
        ([], {}, "`operators` is empty"),
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

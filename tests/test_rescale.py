"""A zoomed volume in parts has the bits of SciPy's zoom of the whole."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.rescale import Rescaling, checked_scale

pytest.importorskip("numba", reason="needs the deep-learning extra")

SCALES = st.one_of(
    st.sampled_from([0.25, 1 / 3, 0.5, 0.7, 1.0, 1.1, 1.5, 2.0, 3.0]),
    st.floats(0.2, 3.5, allow_nan=False),
)


def image_of(shape):
    return np.random.default_rng(5).normal(0, 3, shape).astype(np.float32)


def zoomed_from(rescaling, image, points, extra=0):
    """Zoom from what `source` names, or up to `extra` voxels more on each side."""
    source = rescaling.source(points)
    read = tuple(
        slice(max(s.start - extra, 0), min(s.stop + extra, n))
        for s, n in zip(source, rescaling.shape, strict=True)
    )
    return rescaling.zoom(image[read].copy(), read, points)


@st.composite
def lattices(draw, ndim):
    """A volume whose zoomed lattice has at least one point per axis."""
    axis = st.tuples(st.integers(1, 30), SCALES).filter(lambda pair: round(pair[0] * pair[1]) > 0)
    lengths, scales = zip(*draw(st.lists(axis, min_size=ndim, max_size=ndim)), strict=True)
    return Rescaling(lengths, scales)


def regions(shape):
    ends = [st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)) for n in shape]
    return st.tuples(*ends).map(lambda pairs: tuple(slice(min(p), max(p) + 1) for p in pairs))


@settings(max_examples=150)
@given(data=st.data(), ndim=st.sampled_from([2, 3]), extra=st.integers(0, 3))
def test_any_part_has_the_bits_of_the_whole(data, ndim, extra):
    rescaling = data.draw(lattices(ndim), "lattice")
    image = image_of(rescaling.shape)
    expected = zoom(image, rescaling.scale, order=1)
    assert rescaling.zoomed_shape == expected.shape
    points = data.draw(regions(expected.shape), "points")
    part = zoomed_from(rescaling, image, points, extra)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, expected[points])


# SciPy's position of the last point lies past the last voxel, by rounding, for a few per cent of all lengths.
PAST_THE_END = [(n, m) for n in range(2, 60) for m in range(2, 120) if (m - 1) * ((n - 1) / (m - 1)) > n - 1]


@pytest.mark.parametrize(("n", "m"), PAST_THE_END[:: len(PAST_THE_END) // 12])
def test_a_last_point_past_the_last_voxel_is_blank_as_in_scipy(n, m):
    rescaling = Rescaling((5, n), (1.0, m / n))
    image = image_of(rescaling.shape)
    expected = zoom(image, rescaling.scale, order=1)
    assert not expected[:, -1].any()
    whole = Block.whole(rescaling.zoomed_shape).core
    np.testing.assert_array_equal(zoomed_from(rescaling, image, whole), expected)


def test_channels_are_zoomed_one_by_one_as_by_scipy_together():
    image = image_of((7, 9, 11, 3))
    rescaling = Rescaling((7, 9, 11), (1.5, 0.6, 2))
    points = (slice(2, 9), slice(0, 5), slice(13, 22))
    expected = zoom(image, (1.5, 0.6, 2, 1), order=1)[points]
    np.testing.assert_array_equal(zoomed_from(rescaling, image, points), expected)


@settings(max_examples=100)
@given(data=st.data())
@example(data=None)
def test_every_point_of_the_lattice_has_one_owner(data):
    # 10 * 0.7 is 7 in floating point, but 0.7 is less than 7/10: point 7 lies at more than 10.
    rescaling = Rescaling((30, 23), (0.7, 1.4)) if data is None else data.draw(lattices(2))
    owners = np.zeros(rescaling.zoomed_shape, int)
    edges = ((0, 10, 30), (0, 11, 23)) if data is None else tuple(edges_of(data, n) for n in rescaling.shape)
    for block in BlockGrid(edges, Halo((0, 0))):
        own = rescaling.own_points(block.core)
        owners[own] += 1
        for core, points, scale in zip(block.core, own, rescaling.scale, strict=True):
            positions = [p / Fraction(scale) for p in range(points.start, points.stop)]
            assert all(core.start <= position < core.stop for position in positions)
    assert (owners == 1).all()


def edges_of(data, n):
    cuts = data.draw(st.lists(st.integers(1, n - 1), max_size=4, unique=True)) if n > 1 else []
    return (0, *sorted(cuts), n)


def test_the_nearest_voxel_of_a_point():
    lattice = Rescaling((9, 10, 7), (0.5, 2.0, 1.6))
    assert lattice.zoomed_shape == (4, 20, 11)
    z, y, x = lattice.nearest_voxels([range(4), range(0, 20, 4), range(6, 11)])
    assert (z.tolist(), y.tolist(), x.tolist()) == ([0, 2, 4, 6], [0, 2, 4, 6, 8], [4, 4, 5, 6, 6])
    assert Rescaling((10,), (0.21,)).nearest_voxels([range(1, 2)])[0].tolist() == [5]
    assert Rescaling((5,), (3.0,)).nearest_voxels([range(14, 15)])[0].tolist() == [4]


@settings(max_examples=150)
@given(data=st.data(), depth=st.integers(0, 12), align=st.sampled_from([1, 2, 8]))
def test_a_core_reads_all_that_its_zoomed_block_is_interpolated_from(data, depth, align):
    rescaling = data.draw(lattices(2))
    halo = Halo((depth, depth), (align, align))
    grid = BlockGrid(tuple(edges_of(data, n) for n in rescaling.shape), rescaling.halo(halo))
    for block in grid:
        zoomed = rescaling.block(block, halo)
        assert (zoomed.volume_shape, zoomed.index) == (rescaling.zoomed_shape, block.index)
        if all(c.start < c.stop for c in zoomed.core):
            for have, need in zip(block.read, rescaling.source(zoomed.read), strict=True):
                assert have.start <= need.start
                assert need.stop <= have.stop


def test_the_depth_is_its_formula():
    # 100 * 0.5 = 50 points: positions and voxels differ by |99 / 2 - 49| = 1/2 point.
    assert Rescaling((100, 100), (0.5, 2.0)).halo(Halo((8, 16), (4, 4))).depth == (
        math.ceil((8 + 3 + 0.5) / 0.5) + 2,
        math.ceil((16 + 3 + 1) / 2) + 2,
    )


@pytest.mark.parametrize("scale", [0.4, 0.5, 1.7, 3.0])
def test_the_depth_is_used_but_for_a_few_voxels(scale):
    rescaling = Rescaling((200,), (scale,))
    inner, halo = Halo((16,), (8,)), rescaling.halo(Halo((16,), (8,)))
    used = 0
    for start in range(60, 140):
        core = (slice(start, start + 1),)
        block = rescaling.block(Block.around(core, (200,), halo), inner)
        (source,) = rescaling.source(block.read)
        used = max(used, start - source.start, source.stop - start - 1)
    assert halo.depth[0] - used <= 3 + 2 / scale


def test_a_scale_is_one_number_or_one_per_axis():
    assert checked_scale(0.5, 3) == (0.5, 0.5, 0.5)
    assert checked_scale([1, 2], 2) == checked_scale(np.array([1, 2]), 2) == (1.0, 2.0)
    assert checked_scale(None, 2) is checked_scale(1, 2) is checked_scale((1, 1.0), 2) is None


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), (1, 2, 3), (1, 0)])
def test_another_scale_is_refused(scale):
    with pytest.raises(ValueError, match="`scale` must be one number above 0, or one for each of 2 axes"):
        checked_scale(scale, 2)

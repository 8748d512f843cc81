"""Downsampling, pyramid geometry, and levels that are written together."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.grid import BlockGrid
from chunkrestore.ome_zarr import build_pyramid, create_image, create_labels, pyramid_blocks
from chunkrestore.ome_zarr import downsampling as kernels
from chunkrestore.ome_zarr.carry import with_levels
from chunkrestore.ome_zarr.downsampling import downsample_labels, downsample_mean
from chunkrestore.ome_zarr.layout import (
    LevelPlan,
    aligned_chunks,
    default_pyramid,
    level_chunks,
    pyramid_like,
    region_shape,
    shards_above,
)
from chunkrestore.ome_zarr.levels import STEP_VOXELS, above, fused_levels, pyramid_steps, slabs
from chunkrestore.ome_zarr.metadata import new_multiscale
from chunkrestore.ome_zarr.pyramid import Cascade, build_block, build_region, fused_with
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.writer import Document, ImageWriter

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


def windows(array, factors):
    """Yield (index, window) of every output voxel: the definition, voxel by voxel."""
    counts = [math.ceil(n / f) for n, f in zip(array.shape, factors, strict=True)]
    for index in itertools.product(*(range(n) for n in counts)):
        yield index, array[tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32"])
@settings(max_examples=25)
@given(shape=shapes, data=st.data())
def test_mean_of_integers_is_exact_and_rounds_half_up(dtype, shape, data):
    factors = data.draw(st.tuples(*[st.integers(1, 3)] * len(shape)))
    limits = np.iinfo(dtype)
    block = np.random.default_rng(1).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    reduced = downsample_mean(block, factors)
    assert reduced.dtype == block.dtype
    for index, window in windows(block, factors):
        total = sum(int(v) for v in window.ravel())
        assert int(reduced[index]) == (2 * total + window.size) // (2 * window.size)


def test_mean_of_floats_is_float32_close_to_float64():
    block = np.random.default_rng(2).random((7, 8, 9), np.float32)
    reduced = downsample_mean(block, (2, 2, 2))
    assert reduced.dtype == np.float32
    for index, window in windows(block.astype(float), (2, 2, 2)):
        assert reduced[index] == pytest.approx(window.mean(), rel=8 * 2.0**-23)


def test_mean_keeps_its_input():
    block = np.arange(8, dtype=np.uint16).reshape(2, 4)
    block.flags.writeable = False
    assert np.shares_memory(block, downsample_mean(block, (1, 1))) is False
    downsample_mean(block, (2, 2))


@pytest.mark.parametrize("method", ["nearest", "mode"])
@settings(max_examples=25)
@given(shape=shapes, data=st.data())
def test_labels_never_invent_an_id(method, shape, data):
    factors = data.draw(st.tuples(*[st.integers(1, 3)] * len(shape)))
    labels = np.random.default_rng(3).integers(0, 5, shape).astype(np.int32) * 1000
    reduced = downsample_labels(labels, factors, method)
    assert reduced.dtype == labels.dtype
    for index, window in windows(labels, factors):
        assert reduced[index] in window


def voted(window):
    """Return the most frequent value; objects before background, then the first: the definition."""
    values = window.ravel().tolist()
    return max(values, key=lambda v: (values.count(v), v != 0, -values.index(v)))


@settings(max_examples=25)
@given(shape=shapes, n_ids=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_mode_is_the_most_frequent_label(shape, n_ids, seed, data):
    factors = data.draw(st.tuples(*[st.integers(1, 3)] * len(shape)))
    labels = np.random.default_rng(seed).integers(0, n_ids, shape).astype(np.int32)
    reduced = downsample_labels(labels, factors, "mode")
    padding = [(0, -n % f) for n, f in zip(shape, factors, strict=True)]
    for index, window in windows(np.pad(labels, padding, mode="edge"), factors):
        assert reduced[index] == voted(window)


def test_mode_counts_in_windows_of_more_than_a_byte():
    labels = np.full((16, 16), 7)
    labels[:, 9:] = 2
    assert downsample_labels(labels, (16, 16), "mode").tolist() == [[7]]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "int64"])
@pytest.mark.parametrize("method", ["mean", "nearest", "mode"])
def test_slabs_change_nothing(method, dtype, monkeypatch):
    if (method, dtype) == ("mean", "int64"):
        pytest.skip("sums of 64-bit integers have no place")
    array = (np.random.default_rng(11).random((23, 17, 20)) * 200).astype(dtype)
    whole = kernels.downsample(array, (2, 2, 3), method)
    for n_voxels in (1, 1500, 3000):
        monkeypatch.setattr(kernels, "_CACHED_VOXELS", n_voxels)
        np.testing.assert_array_equal(kernels.downsample(array, (2, 2, 3), method), whole)


def test_mode_takes_the_majority_and_prefers_objects_in_a_tie():
    labels = np.array([[0, 0, 0, 7], [0, 7, 7, 0]])
    np.testing.assert_array_equal(downsample_labels(labels, (2, 2), "mode"), [[0, 7]])


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"`method` 'median' is unknown; use one of mean, nearest, mode"):
        downsample_labels(np.zeros((2, 2), int), (2, 2), "median")


@settings(max_examples=15)
@given(shape=shapes.filter(lambda s: len(s) == 3), chunk=st.integers(3, 6), shard=st.integers(1, 2))
def test_level_equals_downsampling_the_whole_level_below(tmp_path_factory, shape, chunk, shard):
    store = tmp_path_factory.mktemp("pyramid") / "image.zarr"
    volume = np.random.default_rng(4).integers(0, 60000, shape, np.uint16)
    unit = (chunk,) * 3
    writer = create_image(
        store, shape=shape, dtype="uint16", axes="zyx", levels=3, chunks=unit, shards=(chunk * shard,) * 3
    )
    everything = tuple(slice(0, n) for n in shape)
    writer.target(0).write(0, 0, everything, volume)
    for level in (1, 2):
        blocks = list(pyramid_blocks(writer, level))
        for block in reversed(blocks):
            build_block(writer, block)
        volume = downsample_mean(volume, writer.factors[level])
        target = writer.target(level)
        np.testing.assert_array_equal(target.read(0, 0, tuple(slice(0, n) for n in target.shape)), volume)


def test_pyramid_regions_cover_a_level_once():
    plan = region_shape((300, 70, 130), (64, 64, 64))
    assert all(p % 64 == 0 or p == n for p, n in zip(plan, (300, 70, 130), strict=True))
    assert math.prod(plan) <= 2**21


def test_default_pyramid_halves_coarse_axes_late():
    levels = default_pyramid((50, 1000, 1000), (2.0, 0.5, 0.5))
    assert [level.factors for level in levels[:4]] == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)]
    assert [level.shape for level in levels] == [
        (50, 1000, 1000), (50, 500, 500), (50, 250, 250), (25, 125, 125), (13, 63, 63),
    ]  # fmt: skip


def test_default_pyramid_ends_for_any_anisotropy():
    assert default_pyramid((1, 5000, 3), (1e-3, 1.0, 1e3))[-1].shape[1] <= 64
    assert len(default_pyramid((8, 8, 8), (1, 1, 1))) == 1
    assert len(default_pyramid((8, 8, 8), (1, 1, 1), 6)) == 6


def test_default_pyramid_rejects_no_levels():
    with pytest.raises(ValueError, match="`levels` 0 must be at least 1"):
        default_pyramid((8, 8, 8), (1, 1, 1), 0)


def test_pyramid_like_follows_rounding_either_way_and_counts_otherwise():
    assert pyramid_like([(9, 9), (4, 4), (2, 1)], (1, 1)) == [
        LevelPlan((9, 9), (1, 1)), LevelPlan((4, 4), (2, 2)), LevelPlan((2, 1), (2, 4)),
    ]  # fmt: skip
    assert [p.shape for p in pyramid_like([(100, 100), (70, 70)], (1, 1))] == [(100, 100), (50, 50)]


def test_shards_are_whole_chunks_clipped_to_the_level():
    assert level_chunks((100, 30, 200), (16, 16, 16), (64, 64, 64)) == ((16, 16, 16), (64, 32, 64))
    assert level_chunks((10, 10, 10), None, None) == ((10, 10, 10), None)
    with pytest.raises(ValueError, match=r"`shards` \(40, 64, 64\) must be multiples .* use \(32, 64, 64\)"):
        level_chunks((100, 100, 100), (16, 16, 16), (40, 64, 64))
    with pytest.raises(ValueError, match=r"`chunks` \(16, 16\) must hold 3 lengths"):
        level_chunks((100, 100, 100), (16, 16), None)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=12), unit=st.integers(1, 32)
)  # fmt: skip
def test_aligned_chunks_cover_the_axis_on_unit_borders(chunks, unit):
    aligned = aligned_chunks(chunks, unit, sum(chunks))
    borders = list(itertools.accumulate(aligned))
    assert borders[-1] == sum(chunks)
    assert all(n > 0 for n in aligned)
    assert all(b % unit == 0 for b in borders[:-1])
    assert max(aligned) < max(chunks) + 2 * unit


lengths = st.integers(1, 24)


@st.composite
def pyramids(draw):
    """Draw shapes, units and factors of the levels of a volume of 1 to 3 axes, and cores of level 0."""
    ndim, n_levels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    per_axis = st.tuples(*[st.integers(1, 3)] * ndim)
    factors = [(1,) * ndim, *(draw(per_axis) for _ in range(n_levels - 1))]
    shapes = [draw(st.tuples(*[st.integers(1, 60)] * ndim))]
    for of_level in factors[1:]:
        rounded = draw(st.booleans())
        shapes.append(
            tuple(
                max(1, n // f) if rounded else -(-n // f) for n, f in zip(shapes[-1], of_level, strict=True)
            )
        )
    units = [tuple(min(draw(st.integers(1, 6)), n) for n in shape) for shape in shapes]
    blocks = tuple(draw(st.integers(1, 8)) * u for u in units[0])
    return shapes, units, factors, BlockGrid.regular(shapes[0], tuple(map(min, blocks, shapes[0])))


def check_written_once(shape, unit, regions):
    """Check that regions cover a level, no two of them the same file."""
    seen = np.zeros(shape, int)
    owner = {}
    for number, region in enumerate(regions):
        seen[region] += 1
        corners = itertools.product(
            *(range(s.start // u, -(-s.stop // u)) for s, u in zip(region, unit, strict=True))
        )
        for file in corners:
            assert owner.setdefault(file, number) == number
    assert (seen == 1).all()


def regions_of(cores, shapes, factors):
    """Return what each core holds of every level."""
    held = [cores]
    for shape, of_level in zip(shapes[1:], factors[1:], strict=True):
        held.append([above(region, of_level, shape) for region in held[-1]])
    return held


@given(pyramids())
def test_fused_levels_are_written_once_and_the_next_one_would_not_be(pyramid):
    shapes, units, factors, grid = pyramid
    n = fused_levels(grid.edges, units, factors)
    held = regions_of([block.core for block in grid], shapes, factors)
    for level in range(n + 1):
        regions = [r for r in held[level] if all(s.start < s.stop for s in r)]
        check_written_once(shapes[level], units[level], regions)
    if n + 1 < len(shapes):
        total = np.prod(factors[: n + 2], axis=0)
        spans = total * units[n + 1]
        assert any(e % span for edges, span in zip(grid.edges, spans, strict=True) for e in edges[1:-1])


@given(pyramids(), st.integers(0, 4))
def test_steps_write_every_level_once_and_read_none_twice(pyramid, n_done):
    shapes, units, factors, _ = pyramid
    n_done = min(n_done, len(shapes) - 1)
    steps = pyramid_steps(shapes, units, factors, n_done)
    written = [level for step in steps for level in range(step.first, step.last + 1)]
    assert written == list(range(n_done + 1, len(shapes)))
    for step in steps:
        levels = slice(step.first, step.last + 1)
        held = regions_of([block.core for block in step.grid], shapes[levels], factors[levels])
        for shape, unit, regions in zip(shapes[levels], units[levels], held, strict=True):
            check_written_once(shape, unit, [r for r in regions if all(s.start < s.stop for s in r)])


def test_a_terabyte_takes_few_steps_with_regions_of_bounded_size():
    levels = default_pyramid((8000, 8000, 8000), (1, 1, 1))
    shapes, factors = [p.shape for p in levels], [p.factors for p in levels]
    units = [tuple(min(64, n) for n in shape) for shape in shapes]
    steps = pyramid_steps(shapes, units, factors)
    assert [(s.first, s.last) for s in steps] == [(1, 2), (3, 4), (5, 6), (7, 7)]
    assert all(math.prod(s.grid.block((0, 0, 0)).core_shape) <= STEP_VOXELS for s in steps)


def test_default_blocks_write_most_levels():
    levels = default_pyramid((2000, 2000, 2000), (1, 1, 1))
    factors = [p.factors for p in levels]
    chunks = [tuple(min(64, n) for n in p.shape) for p in levels]
    assert fused_levels([range(0, 2001, 512)] * 3, chunks, factors) == 3
    assert fused_levels([range(0, 2001, 384)] * 3, chunks, factors) == 1
    shards = [(256, 256, 256)]
    for of_level in factors[1:]:
        shards.append(shards_above(shards[-1], (64, 64, 64), of_level))
    assert shards[1:4] == [(128, 128, 128), (64, 64, 64), (64, 64, 64)]
    assert fused_levels([range(0, 2001, 256)] * 3, shards, factors) == 2
    assert fused_levels([range(0, 2001, 256)] * 3, [(256, 256, 256)] * len(factors), factors) == 0


def test_shards_stay_whole_chunks_on_the_axes_that_are_reduced():
    assert shards_above((192, 64, 256), (64, 64, 64), (2, 2, 1)) == (128, 64, 256)


@given(start=st.integers(0, 5), n=st.integers(1, 90), chunk=st.integers(1, 9), factor=st.integers(1, 3))
def test_slabs_end_where_windows_and_chunks_end(start, n, chunk, factor):
    region = (slice(start * factor, start * factor + n), slice(3, 13))
    parts = list(slabs(region, (chunk, 5), (factor, 2), 100))
    assert [p[0].start for p in parts[1:]] == [p[0].stop for p in parts[:-1]]
    assert (parts[0][0].start, parts[-1][0].stop) == (region[0].start, region[0].stop)
    assert all(p[0].stop % chunk == 0 and p[0].stop % factor == 0 for p in parts[:-1])
    assert all(p[1] == region[1] for p in parts)


def whole(shape):
    return tuple(slice(0, n) for n in shape)


def level_by_level(writer, volume):
    """Return all levels of a volume, each from the whole level below."""
    levels = [volume]
    for level in range(1, writer.n_levels):
        reduced = kernels.downsample(levels[-1], writer.factors[level], writer.method)
        levels.append(reduced[tuple(map(slice, writer.target(level).shape))])
    return levels


def check_levels(writer, volume):
    for target, expected in zip(writer.targets, level_by_level(writer, volume), strict=True):
        np.testing.assert_array_equal(target.read(0, 0, whole(target.shape)), expected)


@pytest.mark.parametrize("n_voxels", [1, 3000, STEP_VOXELS])
@pytest.mark.parametrize("method", ["mean", "nearest", "mode"])
@settings(max_examples=4)
@given(shape=st.tuples(*[st.integers(5, 40)] * 3), chunk=st.integers(3, 6), shard=st.integers(1, 2))
def test_several_levels_at_once_equal_one_after_the_other(
    tmp_path_factory, method, n_voxels, shape, chunk, shard
):
    volume = np.random.default_rng(4).integers(0, 5, shape).astype(np.uint16)
    options = {"shape": shape, "dtype": "uint16", "axes": "zyx", "voxel_size": (1, 1, 1)}
    options |= {"chunks": (chunk,) * 3, "shards": (chunk * shard,) * 3}
    store = tmp_path_factory.mktemp("pyramid") / "image.zarr"
    if method == "mean":
        writer = create_image(store, levels=4, **options)
    else:
        # Labels follow their image, whose levels may have been rounded down.
        like = create_image(store, levels=4, **options)
        like.publish()
        writer = create_labels(store, "nuclei", method=method, **options)
    writer.target(0).write(0, 0, whole(shape), volume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chunkrestore.ome_zarr.levels.STEP_VOXELS", n_voxels)
        patch.setattr("chunkrestore.ome_zarr.pyramid.STEP_VOXELS", n_voxels)
        build_pyramid(writer)
    check_levels(writer, volume)


def write_by_blocks(writer, volume, regions, last):
    """Write all levels as the tasks of a job do, each from one region of the full resolution."""
    cascade = Cascade.of(writer, 0, last)
    for region in regions:
        array = volume[region]
        for position, (target, part) in enumerate(
            zip(cascade.targets, cascade.regions(region), strict=False)
        ):
            array = cascade.reduce(array, position, part) if position else array
            target.write(0, 0, part, array)


@pytest.mark.parametrize("length", [96, 97, 127])
def test_blocks_write_the_levels_that_they_hold(tmp_path, length):
    shape, chunk = (length, length, 33), (8, 8, 8)
    volume = np.random.default_rng(6).integers(0, 60000, shape, np.uint16)
    writer = create_image(
        tmp_path / "a.zarr", shape=shape, dtype="uint16", axes="zyx", levels=4, chunks=chunk, shards=(32,) * 3
    )
    grid = BlockGrid.regular(shape, (32, 32, 33))
    assert [t.spatial_write_unit[0] for t in writer.targets] == [32, 16, 8, 8]
    assert fused_with(writer, grid) == 2
    regions = [block.core for block in reversed(list(grid))]
    write_by_blocks(writer, volume, regions, 2)
    build_region(Cascade.of(writer, 3, 3), writer.target(2), 0, 0, whole(writer.target(3).shape))
    check_levels(writer, volume)


def test_levels_that_were_rounded_down_leave_out_the_last_voxels(tmp_path):
    """Blocks at the end may hold nothing of the levels above."""
    plans = pyramid_like([(17, 9), (8, 4), (4, 2)], (1, 1))
    multiscale = with_levels(new_multiscale("yx", (1, 1), "rounded"), plans, "yx", "mean")
    writer = ImageWriter.create(
        str(tmp_path / "a.zarr"), (17, 9), np.dtype("u2"), plans,
        Document({"multiscales": [multiscale]}, {}), Storage(chunks=(2, 2)),
    )  # fmt: skip
    volume = np.random.default_rng(7).integers(0, 60000, (17, 9), np.uint16)
    grid = BlockGrid.regular((17, 9), (8, 8))
    assert fused_with(writer, grid) == 2
    write_by_blocks(writer, volume, [block.core for block in grid], 2)
    check_levels(writer, volume)
    for level in (1, 2):
        writer.target(level).write(
            0, 0, whole(writer.target(level).shape), np.zeros_like(volume)[whole(plans[level].shape)]
        )
    build_pyramid(writer)
    check_levels(writer, volume)

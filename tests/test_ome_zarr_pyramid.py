"""Downsampling and pyramid geometry."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.ome_zarr import create_image, pyramid_blocks
from chunkrestore.ome_zarr.layout import (
    LevelPlan,
    aligned_chunks,
    default_pyramid,
    level_chunks,
    pyramid_like,
    region_shape,
)
from chunkrestore.ome_zarr.pyramid import build_block, downsample_labels, downsample_mean

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

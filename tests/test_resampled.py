"""Images at another sampling: every region has the bits of SciPy's zoom of the whole, in arrays, stores and jobs."""

import json
import pickle
from contextlib import suppress
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
import tifffile
from dying import Disk, Killed, bury
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree
from scipy.ndimage import zoom

import chunkrestore as cr
from chunkrestore.grid import Block
from chunkrestore.kernels.resample import checked_resampling, resample, steps
from chunkrestore.lazy_resampled import resample as resample_array
from chunkrestore.ome_zarr import RegionReader, open_image, open_source, write_image, write_labels

SERIAL = {"cluster": "serial", "quiet": True}
DATA = np.random.default_rng(3).integers(0, 60000, (2, 2, 11, 20, 17)).astype(np.uint16)
VOXEL_SIZE = (2.0, 0.5, 0.25)
DARK = (16, 5)
"""A length and a scale for which rounding puts the last point past the last voxel."""


def regions(shape):
    ends = [st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape]
    return st.tuples(*ends).map(lambda pairs: tuple(slice(a, max(b, a + 1)) for a, b in pairs))


@st.composite
def cases(draw):
    shape = draw(st.tuples(st.integers(2, 30), st.integers(2, 6), st.integers(2, 6)))
    scale = (draw(st.floats(1.01 if shape[0] < 4 else 0.6, 6)), 1.0, draw(st.sampled_from([1.0, 1.0, 1.5])))
    dtype = draw(st.sampled_from(["uint8", "uint16", "int16", "float32"]))
    lattice = checked_resampling(shape, scale)
    return shape, scale, dtype, draw(regions(lattice.zoomed_shape)), draw(st.integers(0, 2**32 - 1))


def random_image(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(100, 1e4, shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


@given(cases())
@settings(max_examples=60)
def test_every_region_has_the_bits_of_the_whole(case):
    shape, scale, dtype, points, seed = case
    image, lattice = random_image(shape, dtype, seed), checked_resampling(shape, scale)
    read = lattice.source(points)
    for output in (dtype, "float32"):
        part = resample(image[read], lattice, read, points, output)
        expected = zoom(image, scale, order=1, output=output)[points]
        assert part.dtype == expected.dtype
        np.testing.assert_array_equal(part, expected)


def test_the_last_plane_is_dark_where_scipy_makes_it_so():
    n, factor = DARK
    image = np.full((n, 3, 3), 1000, np.uint16)
    expected = zoom(image, (factor, 1, 1), order=1)
    assert not expected[-1].any(), "choose another pair of numbers"
    np.testing.assert_array_equal(resample_array(image, (factor, 1, 1)), expected)


@given(st.integers(2, 300), st.floats(0.1, 8))
def test_first_and_last_voxel_stay_where_they_are(n, scale):
    if round(n * scale) >= 2:
        lattice = checked_resampling((n,), scale)
        assert (lattice.zoomed_shape[0] - 1) * steps(lattice)[0] == pytest.approx(n - 1, rel=1e-12)


@pytest.mark.parametrize("chunks", [((1, 1), (1, 7, 3), (20,), (9, 8)), ((2,), (11,), (1,) * 20, (17,))])
def test_dask_arrays_of_odd_chunks_are_resampled_lazily(chunks):
    def refuse(*_arguments, **_options):
        raise AssertionError("computed")

    image = da.from_array(DATA[0], chunks=chunks)
    with dask.config.set(scheduler=refuse):
        lazy = resample_array(image, (2.7, 1, 1))
    expected = np.stack([zoom(volume, (2.7, 1, 1), order=1) for volume in DATA[0]])
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    assert lazy.numblocks[1:] == tuple(map(len, chunks[1:]))
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)
    np.testing.assert_array_equal(resample_array(DATA[0], (2.7, 1, 1)), expected)
    exact = resample_array(image, (2.7, 1, 1), dtype="float32")[1].compute(scheduler="sync")
    np.testing.assert_array_equal(exact, zoom(DATA[0, 1], (2.7, 1, 1), order=1, output=np.float32))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    write_image(DATA, path, axes="tczyx", voxel_size=VOXEL_SIZE, chunks=(4, 8, 8), levels=2)
    write_labels(np.ones((11, 20, 17), np.int32), path, "nuclei", axes="zyx")
    return open_image(path)


def test_a_part_of_an_image_is_resampled_as_a_volume_of_its_own(stored):
    part = stored.select(t=1, c=[1, 0], region=(slice(1, 11), slice(2, 20), slice(0, 17)))
    seen = part.resampled((4, 1, 1))
    expected = np.stack([zoom(volume, (4, 1, 1), order=1) for volume in DATA[1, [1, 0], 1:11, 2:20]])
    assert (seen.shape, seen.dtype, seen.labels, seen.n_c) == ((1, 2, 40, 18, 17), np.uint16, (), 2)
    region = slice(3, 31), slice(1, 5), slice(2, 17)
    reader = pickle.loads(pickle.dumps(seen.source(0)))
    np.testing.assert_array_equal(reader.read(0, 1, region), expected[1][region])
    np.testing.assert_array_equal(seen.data[0, ..., ::-2].compute(scheduler="sync"), expected[..., ::-2])
    # The first voxel stays, the last one as well: 9 steps become 39.
    assert seen.voxel_size == pytest.approx((2 * 9 / 39, 0.5, 0.25), rel=1e-15)
    assert seen.translation == part.translation == (2.0, 1.0, 0.0)
    cut = seen.select(region=region)
    assert cut.translation == pytest.approx((2 + 3 * 18 / 39, 1.5, 0.5), rel=1e-15)
    np.testing.assert_array_equal(cut.data[0, 0].compute(scheduler="sync"), expected[0][region])


def test_a_resampled_image_is_opened_again_by_what_was_said_of_it(stored):
    seen = stored.select(level=1, c=1).resampled((3, 1, 1), dtype="float32")
    again = open_source(stored.path, **json.loads(json.dumps(seen.opened_with)))
    assert again == seen
    assert again.source(0).identity() == seen.source(0).identity()
    others = [stored.resampled((f, 1, 1)).source(0) for f in (2, 3)]
    assert others[0].identity() != others[1].identity()
    assert dask.base.tokenize(others[0]) != dask.base.tokenize(others[1])


def test_a_tiff_is_resampled_as_well(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0], metadata={"axes": "ZYX"})
    seen = open_source(tmp_path / "a.tif", voxel_size=VOXEL_SIZE).resampled((2, 1, 1))
    np.testing.assert_array_equal(seen.data.compute(scheduler="sync"), zoom(DATA[0, 0], (2, 1, 1), order=1))
    assert open_source(tmp_path / "a.tif", **seen.opened_with) == seen


def test_jobs_take_a_resampled_image_and_record_where_its_voxels_lie(stored, tmp_path):
    seen = stored.select(t=0).resampled((7, 1, 1))
    expected = np.stack([zoom(volume, (7, 1, 1), order=1) for volume in DATA[0]])
    assert cr.plan(cr.Threshold(30000.0), seen).shape == (77, 20, 17)
    cr.run([], seen, tmp_path / "out.zarr", block_shape=(30, 20, 9), **SERIAL)
    result = open_image(tmp_path / "out.zarr")
    np.testing.assert_array_equal(result.data[0].compute(scheduler="sync"), expected)
    assert result.voxel_size == pytest.approx((2 * 10 / 76, 0.5, 0.25), rel=1e-15)
    assert result.translation == (0, 0, 0)
    assert len(result.levels) == 2
    assert result.levels[1].voxel_size == pytest.approx((4 * 10 / 76, 0.5, 0.5), rel=1e-15)
    assert result.levels[1].translation == pytest.approx((10 / 76, 0, 0.125), rel=1e-15)
    assert result.channels == stored.channels
    cr.run(cr.Threshold(30000.0), seen.select(c=0), tmp_path / "labels.zarr", **SERIAL)
    assert open_image(tmp_path / "labels.zarr" / "labels" / "labels").voxel_size == result.voxel_size


def test_a_killed_job_on_a_resampled_image_is_resumed_from_its_output_alone(stored, tmp_path):
    seen = stored.select(t=1, region=(slice(1, 11), slice(0, 20), slice(0, 17))).resampled((4, 1, 1))
    arguments = {"block_shape": (16, 20, 17), **SERIAL}
    (tmp_path / "whole").mkdir()
    cr.run([], seen, tmp_path / "whole" / "out.zarr", **arguments)
    disk, output = Disk(), tmp_path / "o"
    output.mkdir()
    with disk.dies_after(20, output), suppress(Killed):
        cr.run([], seen, output / "out.zarr", **arguments)
    bury(output / "out.zarr")
    other = stored.select(t=1, region=(slice(1, 11), slice(0, 20), slice(0, 17))).resampled((4.01, 1, 1))
    with pytest.raises(ValueError, match=r"was started with something else: .*scale"):
        cr.run([], other, output / "out.zarr", **arguments)
    cr.resume(output / "out.zarr", **SERIAL)
    assert tree(output / "out.zarr") == tree(tmp_path / "whole" / "out.zarr")


def test_the_page_of_a_job_shows_a_resampled_input(stored, tmp_path):
    from chunkrestore.jobs.html import write_report

    cr.run([], stored.select(t=0, c=0).resampled((2, 1, 1)), tmp_path / "out.zarr", **SERIAL)
    (page,) = write_report(tmp_path / "out.zarr")
    assert "plane 11 of 22" in Path(page).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.label("nuclei").resampled(2), "holds labels, of which no value is a mean"),
        (lambda image: image.resampled(2).resampled(2), "is resampled already"),
        (
            lambda image: image.resampled((2, 2)),
            "`scale` must be one number above 0, or one for each of 3 axes",
        ),
        (lambda image: image.resampled(-1), "`scale` must be one number above 0"),
        (
            lambda image: image.resampled((0.1, 1, 1)),
            "`scale` 0.1 makes 1 of 11 voxels on an axis; both must be at least 2",
        ),
        (lambda image: image.resampled(2, dtype="uint8"), "`dtype` uint8 must be that of"),
    ],
)
def test_what_cannot_be_resampled_is_refused(stored, change, message):
    with pytest.raises(ValueError, match=message):
        change(stored)


def test_what_is_interpolated_is_no_zarr_array(stored):
    assert isinstance(stored.source(0), RegionReader)
    with pytest.raises(TypeError, match="is no zarr array"):
        stored.resampled(2).source(0).open()


def test_a_volume_is_read_no_further_than_it_reaches():
    lattice = checked_resampling((11, 4, 4), (3.0, 1.0, 1.0))
    assert lattice.source(Block.whole(lattice.zoomed_shape).core) == (slice(0, 11), slice(0, 4), slice(0, 4))
    with pytest.raises(ValueError, match="on an axis; both must be at least 2"):
        checked_resampling((1, 4, 4), (3.0, 1.0, 1.0))

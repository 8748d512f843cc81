"""Jobs that copy images and labels, and the choice of a dtype: nothing changes but what was asked for."""

from contextlib import suppress

import numpy as np
import pytest
from dying import Disk, Killed, bury
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree

import chunkrestore as cr
from chunkrestore.ome_zarr import open_image, write_image, write_labels
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.operators.storing import AsType, Copy
from chunkrestore.psf import gaussian
from chunkrestore.statistics import NonFiniteError

SERIAL = {"cluster": "serial", "quiet": True}
SHAPE = (20, 70, 45)


def noise(dtype, shape=SHAPE, seed=5):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(100, 50, shape).astype(dtype)
    return rng.integers(0, 120, shape).astype(dtype)


@pytest.fixture
def source(tmp_path):
    """Write an image with two channels, three time points and labels."""
    voxels = noise("uint16", (3, 2, *SHAPE))
    path = tmp_path / "in.ome.zarr"
    write_image(voxels, path, axes="tczyx", voxel_size=(2, 0.5, 0.5), channels=["nuclei", "membrane"])
    write_labels(voxels[:, 0].astype(np.int32) // 40, path, "nuclei")
    return open_image(path), voxels


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_job_without_operators_copies_every_voxel_in_its_dtype(tmp_path, dtype):
    voxels = noise(dtype)
    write_image(voxels, tmp_path / "in.ome.zarr", axes="zyx", voxel_size=(2, 0.5, 0.5))
    report = cr.run(
        [], tmp_path / "in.ome.zarr", tmp_path / "out.ome.zarr", block_shape=(8, 32, 32), **SERIAL
    )
    copied = open_image(tmp_path / "out.ome.zarr")
    assert copied.dtype == dtype
    np.testing.assert_array_equal(copied.data.compute(), voxels)
    assert (report.n_clipped, report.seams) == (None, [])
    assert copied.others["chunkrestore"]["provenance"]["operators"][0]["operator"] == "copy"


def test_a_copy_in_another_version_chunks_and_codec_keeps_metadata_and_voxels(source, tmp_path):
    image, voxels = source
    cr.run(
        [], image, tmp_path / "old.zarr", version="0.4", compression="lz4", block_shape=(10, 35, 45), **SERIAL
    )
    copied = open_image(tmp_path / "old.zarr")
    assert (copied.version, copied.axes, copied.channels) == ("0.4", "tczyx", ("nuclei", "membrane"))
    assert (copied.voxel_size, copied.translation) == (image.voxel_size, image.translation)
    assert copied.ome["omero"] == image.ome["omero"] | {"version": "0.4"}
    np.testing.assert_array_equal(copied.data.compute(), voxels)


def test_a_part_of_an_image_is_copied_with_its_place(source, tmp_path):
    image, voxels = source
    part = {"timepoint": 1, "channel": "membrane", "region": [(4, 20), (10, 60), (0, 45)]}
    cr.run([], image, tmp_path / "part.zarr", **part, **SERIAL)
    copied = open_image(tmp_path / "part.zarr")
    np.testing.assert_array_equal(copied.data.compute(), voxels[1:2, 1:2, 4:20, 10:60])
    assert copied.translation == (4 * 2, 10 * 0.5, 0)


def test_labels_are_copied_beside_a_copied_image_with_as_many_levels(source, tmp_path):
    image, voxels = source
    out = tmp_path / "out.zarr"
    cr.run([], image, out, **SERIAL)
    report = cr.run([], image.label("nuclei"), out, label_name="nuclei", **SERIAL)
    assert report.outputs == [str(out / "labels" / "nuclei")]
    copied = open_image(out).label("nuclei")
    np.testing.assert_array_equal(copied.data.compute(), voxels[:, 0] // 40)
    assert (copied.dtype, len(copied.levels)) == (np.int32, len(image.levels))
    found = cr.verify(out, cluster="serial", quiet=True)
    assert sorted(job.job for job in found) == ["image", "labels-nuclei"]
    assert all(job.ok and job.n_blocks for job in found)


def test_a_copy_keeps_voxels_that_are_not_a_number_and_a_change_of_dtype_refuses_them(tmp_path):
    voxels = noise("float32")
    voxels[3, 4, 5] = np.nan
    write_image(voxels, tmp_path / "in.zarr", axes="zyx", levels=1)
    cr.run([], tmp_path / "in.zarr", tmp_path / "out.zarr", **SERIAL)
    np.testing.assert_array_equal(open_image(tmp_path / "out.zarr").data.compute(), voxels)
    with pytest.raises(NonFiniteError, match="block"):
        cr.run(AsType("uint16"), tmp_path / "in.zarr", tmp_path / "other.zarr", **SERIAL)
    assert not (tmp_path / "other.zarr").exists()


def test_a_job_that_chooses_a_dtype_declares_the_rule_and_counts_what_it_clips(tmp_path):
    voxels = noise("float32")
    write_image(voxels, tmp_path / "in.zarr", axes="zyx")
    blocks = {"block_shape": (8, 32, 32)}
    report = cr.run(
        AsType("uint16", (0, 200)), tmp_path / "in.zarr", tmp_path / "out.zarr", **blocks, **SERIAL
    )
    stored = open_image(tmp_path / "out.zarr")
    expected = np.clip(np.rint(voxels.astype(float) * 65535 / 200), 0, 65535)
    np.testing.assert_array_equal(stored.data.compute(), expected)
    n_clipped = np.count_nonzero((np.rint(voxels * 65535.0 / 200) < 0) | (voxels > 200))
    assert report.n_clipped == n_clipped > 0
    assert f"clipped    {n_clipped} voxels" in str(report)
    provenance = stored.others["chunkrestore"]["provenance"]
    assert provenance["n_clipped"] == n_clipped
    assert provenance["operators"][-1] == {
        "timepoint": 0, "channel": 0, "operator": "as-type", "dtype": "uint16", "intensity_range": [0.0, 200.0],
    }  # fmt: skip


def test_a_deconvolved_image_is_stored_as_integers_with_seams_in_intensities(tmp_path):
    write_image(noise("uint16"), tmp_path / "in.zarr", axes="zyx")
    lucy = cr.RichardsonLucy(gaussian((1.0, 1.0, 1.0), truncate=2), iterations=3)
    options = {"block_shape": (20, 32, 45), **SERIAL}
    floats = cr.run(lucy, tmp_path / "in.zarr", tmp_path / "floats.zarr", **options)
    scaled = cr.run(
        [lucy, AsType("uint16", (0, 500))], tmp_path / "in.zarr", tmp_path / "ints.zarr", **options
    )
    intensities = AsType("uint16", (0, 500)).intensities(open_image(tmp_path / "ints.zarr").data.compute())
    result = open_image(tmp_path / "floats.zarr").data.compute()
    assert np.abs(intensities - np.clip(result, 0, 500)).max() <= 0.5 * 500 / 65535 * 1.0001
    # One count of rounding is 500 / 65535 of an intensity, and two roundings can fall apart by one.
    assert abs(scaled.seam_rms - floats.seam_rms) < 500 / 65535 / 100


@given(
    st.sampled_from(["uint8", "uint16", "int16"]),
    st.floats(-1e4, 1e4),
    st.floats(1e-2, 1e5),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_stored_numbers_tell_intensities_to_half_a_step(dtype, low, width, seed):
    operator = AsType(dtype, (low, low + width))
    image = np.random.default_rng(seed).uniform(low, low + width, 200)
    stored, n_clipped = operator.convert(image)
    limits = np.iinfo(dtype)
    step = width / (int(limits.max) - int(limits.min))
    assert stored.dtype == dtype
    assert n_clipped == 0
    assert np.abs(operator.intensities(stored) - image).max() <= step / 2 * (1 + 1e-6) + 1e-9 * (
        abs(low) + width
    )


def test_values_are_kept_and_clipped_without_a_range():
    stored, n_clipped = AsType("uint8").convert(
        np.array([-3.0, -0.4, 0.5, 1.5, 254.6, 255.4, 256.0, 1e9], np.float32)
    )
    assert stored.tolist() == [0, 0, 0, 2, 255, 255, 255, 255]
    assert n_clipped == 3
    kept, n_clipped = AsType("int16").convert(np.array([0, 32767, 40000], np.uint16))
    assert (kept.tolist(), n_clipped) == ([0, 32767, 32767], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("uint32",), "`dtype` uint32 cannot be stored; use one of uint8"),
        (("uint8", (5, 5)), r"`intensity_range` \(5, 5\) must be two finite numbers, low < high"),
        (("uint8", (0, float("inf"))), "`intensity_range`"),
        (("float32", (0, 1)), "float32 holds intensities as they are"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AsType(*arguments)


def test_operators_of_storing_are_saved_for_resuming(tmp_path):
    operators = [Copy(), AsType("uint8", (3, 77.5))]
    save_operators(operators, tmp_path)
    assert load_operators(tmp_path) == operators


def test_a_copy_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write_image(noise("uint16", (16, 40, 40)), tmp_path / "in.zarr", axes="zyx")
    options = {"block_shape": (8, 40, 40), **SERIAL}
    cr.run([], tmp_path / "in.zarr", tmp_path / "whole.zarr", **options)
    expected = tree(tmp_path / "whole.zarr")
    disk, n_changes = Disk(), 0
    while True:
        folder = tmp_path / f"{n_changes}"
        folder.mkdir()
        try:
            with disk.dies_after(n_changes, folder):
                cr.run([], tmp_path / "in.zarr", folder / "out.zarr", **options)
            break
        except Killed:
            bury(folder / "out.zarr")
        with suppress(FileExistsError):  # killed after its end
            cr.run([], tmp_path / "in.zarr", folder / "out.zarr", **options)
        assert tree(folder / "out.zarr").keys() == expected.keys()
        voxels = {name: content for name, content in expected.items() if "zarr.json" not in name}
        assert voxels.items() <= tree(folder / "out.zarr").items()
        n_changes += 7
    assert n_changes > 50

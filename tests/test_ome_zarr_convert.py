"""TIFF stacks become OME-Zarr."""

import numpy as np
import pytest
import tifffile
import yaozarrs

from chunkrestore.ome_zarr import convert, convert_tiff

DATA = np.arange(2 * 3 * 5 * 20 * 26, dtype=np.uint16).reshape(2, 3, 5, 20, 26)


def test_ome_tiff_keeps_axes_voxel_size_and_channels(tmp_path):
    metadata = {
        "axes": "TCZYX",
        "PhysicalSizeX": 200, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.2, "PhysicalSizeZ": 1.5,
        "Channel": {"Name": ["DAPI", "GFP", "RFP"]},
    }  # fmt: skip
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata=metadata, tile=(16, 16), compression="zlib")
    image = convert_tiff(
        tmp_path / "a.ome.tif", tmp_path / "a.zarr", chunks=(4, 8, 8), shards=(4, 16, 16), levels=2
    )
    assert (image.axes, image.channels) == ("tczyx", ("DAPI", "GFP", "RFP"))
    assert image.voxel_size == pytest.approx((1.5, 0.2, 0.2))
    np.testing.assert_array_equal(image.data.compute(), DATA)
    yaozarrs.validate_zarr_store(tmp_path / "a.zarr")


def test_imagej_stack_is_brought_into_order(tmp_path):
    metadata = {"axes": "TZCYX", "spacing": 2.0, "unit": "um"}
    stack = DATA.transpose(0, 2, 1, 3, 4)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, resolution=(5, 4), metadata=metadata)
    image = convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr")
    assert image.axes == "tczyx"
    assert image.voxel_size == (2.0, 0.25, 0.2)
    np.testing.assert_array_equal(image.data.compute(), DATA)


def test_plain_stack_needs_axes_and_is_not_calibrated(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0])
    with pytest.raises(ValueError, match=r"a.tif: axes 'QYX' .* Pass `axes` with one letter"):
        convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr")
    image = convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr", axes="zyx")
    assert not image.calibrated
    np.testing.assert_array_equal(image.data.compute(), DATA[0, 0])
    image = convert_tiff(
        tmp_path / "a.tif", tmp_path / "b.zarr", axes="zyx", voxel_size=(3, 1, 1), version="0.4"
    )
    assert (image.version, image.voxel_size) == ("0.4", (3, 1, 1))


def test_slabs_bound_memory_and_cover_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_SLAB_NBYTES", 2 * 26 * 2 * 8)
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0])
    image = convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr", axes="zyx", chunks=(2, 8, 8))
    np.testing.assert_array_equal(image.data.compute(), DATA[0, 0])


def test_colour_plane_becomes_channels(tmp_path):
    rgb = DATA[0, :, 0].transpose(1, 2, 0).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    image = convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr")
    assert image.axes == "cyx"
    np.testing.assert_array_equal(image.data.compute(), rgb.transpose(2, 0, 1))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.tif does not exist or is no file"):
        convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr")
    (tmp_path / "a.tif").write_bytes(b"no tiff at all")
    with pytest.raises(ValueError, match=r"a.tif is not a TIFF file"):
        convert_tiff(tmp_path / "a.tif", tmp_path / "a.zarr")
    tifffile.imwrite(tmp_path / "b.tif", DATA[0, 0].astype(np.float64))
    with pytest.raises(ValueError, match=r"`dtype` float64 of .*b.tif is not supported"):
        convert_tiff(tmp_path / "b.tif", tmp_path / "a.zarr", axes="zyx")
    with pytest.raises(ValueError, match=r"`series` 3 does not exist in .*b.tif; it has 1"):
        convert_tiff(tmp_path / "b.tif", tmp_path / "a.zarr", series=3)
    assert not (tmp_path / "a.zarr").exists()

"""Exported OME-TIFF holds what the image holds, for tifffile and for readers that share no code with it."""

import sys
import tracemalloc

import numpy as np
import ome_types
import pytest
import tifffile
from PIL import Image

from chunkrestore.ome_zarr import export_tiff, open_image, open_source, write_image, write_labels

DATA = np.random.default_rng(5).integers(0, 2**16, (2, 3, 5, 40, 52)).astype(np.uint16)
CHANNELS = ["DAPI", "GFP", "Äther"]


@pytest.fixture
def image(tmp_path):
    options = {"channels": CHANNELS, "chunks": (2, 16, 16), "levels": 2}
    return write_image(DATA, tmp_path / "in.zarr", axes="tczyx", voxel_size=(0.5, 0.2, 0.1), **options)


OPTIONS = [
    {},
    {"compression": "none"},
    {"tile": (16, 32)},
    {"tile": (48, 16), "compression": "none", "bigtiff": True},
    {"pyramid": True},
    {"pyramid": True, "tile": (16, 16), "compression": "none"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tifffile_reads_what_was_exported(tmp_path, image, options):
    path = tmp_path / "out.ome.tif"
    export_tiff(image, path, **options)
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        assert file.is_bigtiff == options.get("bigtiff", False)
        (series,) = file.series
        assert (series.axes, series.shape, series.dtype) == ("TCZYX", DATA.shape, np.uint16)
        np.testing.assert_array_equal(series.asarray(), DATA)
        assert len(series.levels) == (2 if options.get("pyramid") else 1)
        if options.get("pyramid"):
            np.testing.assert_array_equal(series.levels[1].asarray(), image.level(1).compute())
    again = open_source(path)
    assert (again.voxel_size, again.channels, again.axes) == (image.voxel_size, image.channels, image.axes)
    colours = [[c["color"] for c in i.ome["omero"]["channels"]] for i in (again, image)]
    assert colours[0] == colours[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr", "out.ome.tif"]


@pytest.mark.parametrize("options", [{}, {"tile": (16, 32)}], ids=str)
def test_readers_that_share_no_code_read_the_same(tmp_path, image, options):
    """Pillow (libtiff) for voxels; ome-types for the metadata, validated against the schema."""
    path = tmp_path / "out.ome.tif"
    export_tiff(image, path, **options)
    with Image.open(path) as file:
        planes = []
        for i in range(file.n_frames):
            file.seek(i)
            planes.append(np.asarray(file).astype(np.uint16))
    pixels = ome_types.from_tiff(path, validate=True).images[0].pixels
    sizes = pixels.size_t, pixels.size_c, pixels.size_z, pixels.size_y, pixels.size_x
    assert sizes == DATA.shape
    assert pixels.dimension_order.value == "XYZCT"
    np.testing.assert_array_equal(np.stack(planes).reshape(DATA.shape), DATA)
    assert [channel.name for channel in pixels.channels] == CHANNELS
    lengths = [
        (getattr(pixels, f"physical_size_{a}"), getattr(pixels, f"physical_size_{a}_unit").value)
        for a in "zyx"
    ]
    assert lengths == [(0.5, "µm"), (0.2, "µm"), (0.1, "µm")]
    assert [c.color.as_hex(format="long") for c in pixels.channels] == ["#00ff00", "#ff00ff", "#00ffff"]


def test_a_region_keeps_its_place(tmp_path, image):
    part = image.select(t=1, c=["GFP"], region=np.s_[1:4, 3:30, 5:50])
    export_tiff(part, tmp_path / "out.ome.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.ome.tif"), DATA[1, 1, 1:4, 3:30, 5:50])
    planes = ome_types.from_tiff(tmp_path / "out.ome.tif", validate=True).images[0].pixels.planes
    assert [p.position_z for p in planes] == pytest.approx([0.5, 1.0, 1.5])
    assert {(round(p.position_y, 9), round(p.position_x, 9)) for p in planes} == {(0.6, 0.5)}
    assert open_source(tmp_path / "out.ome.tif").channels == ("GFP",)


def test_labels_are_exported_as_they_are(tmp_path, image):
    labels = np.random.default_rng(3).integers(0, 2**31, (5, 40, 52)).astype(np.int32)
    write_labels(labels, image.path, "nuclei", axes="zyx")
    export_tiff(open_image(image.path).label("nuclei"), tmp_path / "labels.ome.tif")
    found = tifffile.imread(tmp_path / "labels.ome.tif")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, labels)
    assert open_source(tmp_path / "labels.ome.tif").voxel_size == image.voxel_size


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_every_dtype_of_images_makes_the_round_trip(tmp_path, dtype):
    data = DATA[0, 0, 0].astype(dtype)
    image = write_image(data, tmp_path / "in.zarr", axes="yx")
    export_tiff(image, tmp_path / "out.tif")
    again = open_source(tmp_path / "out.tif")
    assert (again.dtype, again.axes, again.calibrated) == (np.dtype(dtype), "yx", False)
    np.testing.assert_array_equal(again.data.compute(), data)


def test_what_cannot_be_exported_is_told_before_anything_is_written(tmp_path, image):
    write_labels(np.zeros((5, 40, 52), np.int64), image.path, "many", axes="zyx")
    labels = open_image(image.path).label("many")
    (tmp_path / "there.tif").write_text("mine")
    for chosen, name, options, error, message in (
        (
            labels,
            "o.tif",
            {},
            ValueError,
            r"`dtype` int64 of .*many does not exist in OME-TIFF.*labels to int32",
        ),
        (image, "o.png", {}, ValueError, r"`path` .*o.png must end in .tif or .tiff"),
        (image, "none/o.tif", {}, ValueError, r"folder .*none of `path` does not exist"),
        (image, "there.tif", {}, FileExistsError, r"there.tif exists; .*overwrite=True"),
        (
            image,
            "o.tif",
            {"compression": "rar"},
            ValueError,
            r"`compression` 'rar' is unknown; use one of none, zlib",
        ),
        (
            image,
            "o.tif",
            {"tile": (20, 16)},
            ValueError,
            r"`tile` \(20, 16\) must hold height and width, multiples",
        ),
    ):
        with pytest.raises(error, match=message):
            export_tiff(chosen, tmp_path / name, **options)
    if "imagecodecs" not in sys.modules:
        with pytest.raises(
            ImportError, match=r"`compression` 'lzw' needs imagecodecs; run: pip install imagecodecs"
        ):
            export_tiff(image, tmp_path / "o.tif", compression="lzw")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr", "there.tif"]
    assert (tmp_path / "there.tif").read_text() == "mine"
    export_tiff(image, tmp_path / "there.tif", overwrite=True)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "there.tif"), DATA)


def test_an_export_that_fails_leaves_what_was_there(tmp_path, image):
    (tmp_path / "out.tif").write_text("mine")
    chunk = next(p for p in (tmp_path / "in.zarr" / "0").rglob("*") if p.is_file() and p.name.isdecimal())
    chunk.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be decoded"):
        export_tiff(image, tmp_path / "out.tif", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr", "out.tif"]
    assert (tmp_path / "out.tif").read_text() == "mine"


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"tile": (256, 256)}], ids=str)
def test_memory_is_that_of_a_slab_and_not_of_the_image(tmp_path, monkeypatch, options):
    """25 MB of voxels in slabs of 2 MB."""
    monkeypatch.setattr("chunkrestore.ome_zarr.tiff.export._SLAB_NBYTES", 2**21)
    planes = np.random.default_rng(0).integers(0, 9, (48, 512, 512)).astype(np.uint16)
    image = write_image(planes, tmp_path / "in.zarr", axes="zyx", chunks=(4, 256, 256), levels=1)
    image.source(0).read(0, 0, np.s_[0:1, 0:64, 0:64])
    tracemalloc.start()
    export_tiff(image, tmp_path / "out.tif", **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**21 < planes.nbytes / 2
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), planes)

"""TIFF files and folders of planes are images: the same voxels and metadata as their own reader sees, and no more read
than was asked for."""

import logging
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.ome_zarr import CorruptChunkError, RegionReader, open_source
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.ome_zarr.tiff.image import open_tiff
from chunkrestore.ome_zarr.tiff.metadata import MAX_KEPT_NBYTES

DATA = np.random.default_rng(5).integers(0, 2**16, (2, 3, 5, 40, 52)).astype(np.uint16)
OME = {
    "axes": "TCZYX",
    "PhysicalSizeX": 200, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.2, "PhysicalSizeZ": 1.5,
    "TimeIncrement": 2.0, "TimeIncrementUnit": "min",
    "Channel": {"Name": ["DAPI", "GFP", "RFP"], "Color": [65535, 16711935, -16776961]},
}  # fmt: skip


def whole(image, k=0):
    return image.level(k).compute()


LAYOUTS = [
    {"compression": compression, **shape, "byteorder": byteorder}
    for compression in (None, "zlib", "lzma")
    for shape in ({}, {"rowsperstrip": 7}, {"tile": (16, 32)})
    for byteorder in "<>"
] + [{"compression": "zlib", "predictor": True, "tile": (16, 16)}, {"bigtiff": True}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_voxels_that_tifffile_gives(tmp_path, layout):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, DATA, metadata=OME, **layout)
    image = open_source(path)
    assert (image.axes, image.shape, image.dtype) == ("tczyx", DATA.shape, np.uint16)
    np.testing.assert_array_equal(whole(image), tifffile.imread(path))
    region = (slice(1, 4), slice(9, 33), slice(15, 51))
    np.testing.assert_array_equal(image.source(0).read(1, 2, region), DATA[1, 2][region])


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("uint16", {"compression": "lzw", "predictor": True}),
        ("uint16", {"compression": "zstd", "tile": (16, 16)}),
        ("uint8", {"compression": "packbits"}),
        ("float32", {"compression": "zlib", "predictor": 3}),
        ("uint8", {"compression": "jpeg", "tile": (16, 16)}),
    ],
    ids=str,
)
def test_codecs_of_imagecodecs_are_used_where_it_is_installed(tmp_path, dtype, options):
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, (DATA[0, 0] // 256).astype(dtype), **options)
    np.testing.assert_array_equal(whole(open_source(path, axes="zyx")), tifffile.imread(path))


@settings(max_examples=40)
@given(st.data())
def test_any_selection_of_any_page_layout_is_that_of_the_array(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "pages.tif"
    kind, tile = data.draw(st.sampled_from(["uint8", "int16", "float32"])), data.draw(st.booleans())
    stack = DATA[0].astype(kind)
    tifffile.imwrite(
        path,
        stack,
        compression=data.draw(st.sampled_from([None, "zlib"])),
        tile=(16, 16) if tile else None,
        rowsperstrip=None if tile else data.draw(st.integers(1, 40)),
        metadata=None,
        photometric="minisblack",
    )
    # Fifteen pages in a row, which are read as planes of time points.
    image = open_source(path, axes="tyx").select(
        t=data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=4))
    )
    y, x = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in (40, 52)
    )
    region = slice(*y), slice(*x)
    t = data.draw(st.integers(0, image.n_t - 1))
    stored = image.source(0).picks[0][t]
    np.testing.assert_array_equal(
        image.source(0).read(t, 0, region), stack.reshape(15, 40, 52)[stored][region]
    )


def test_metadata_of_ome_are_understood(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata=OME)
    image = open_source(tmp_path / "a.ome.tif")
    assert image.channels == ("DAPI", "GFP", "RFP")
    assert image.voxel_size == pytest.approx((1.5, 0.2, 0.2))
    assert image.calibrated
    assert [c["color"] for c in image.ome["omero"]["channels"]] == ["0000FF", "00FF00", "FF0000"]
    multiscale = image.ome["multiscales"][0]
    assert multiscale["axes"][0] == {"name": "t", "type": "time", "unit": "second"}
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"][0] == 120.0
    assert image.others[OWN_KEY]["tiff"]["ome_xml"].startswith("<?xml")


def test_imagej_stack_is_brought_into_order(tmp_path):
    metadata = {"axes": "TZCYX", "spacing": 2.0, "unit": "um", "finterval": 3.5, "Info": "objective 40x"}
    stack = DATA.transpose(0, 2, 1, 3, 4)
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, resolution=(5, 4), metadata=metadata)
    image = open_source(tmp_path / "a.tif")
    assert image.axes == "tczyx"
    assert image.voxel_size == (2.0, 0.25, 0.2)
    np.testing.assert_array_equal(whole(image), DATA)
    assert image.ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"][0] == 3.5
    assert image.others[OWN_KEY]["tiff"]["imagej"]["Info"] == "objective 40x"


def test_colours_and_ranges_of_imagej_are_those_of_channels(tmp_path):
    ramp, none = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    metadata = {
        "axes": "CYX", "mode": "composite", "LUTs": [np.stack([ramp, none, none]), np.stack([none, ramp, ramp])],
        "Ranges": (100.0, 900.0, 5.0, 60000.0),
    }  # fmt: skip
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, :2, 0], imagej=True, metadata=metadata)
    first, second = open_source(tmp_path / "a.tif").ome["omero"]["channels"]
    assert (first["color"], second["color"]) == ("FF0000", "00FFFF")
    assert first["window"] == {"min": 0.0, "max": 65535.0, "start": 100.0, "end": 900.0}
    assert second["window"]["end"] == 60000.0


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("nm", 1e-3), ("\\u00B5m", 1.0), ("microns", 1.0), ("inch", 25_400.0), ("pixel", None), ("", None)],
)
def test_units_of_imagej_are_lengths_or_no_calibration(tmp_path, unit, factor):
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": unit}
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0], imagej=True, resolution=(5, 4), metadata=metadata)
    image = open_source(tmp_path / "a.tif")
    assert image.calibrated == (factor is not None)
    expected = (1.0, 1.0, 1.0) if factor is None else (2.0 * factor, factor / 4, factor / 5)
    assert image.voxel_size == pytest.approx(expected)


def test_resolution_tags_count_only_with_a_unit_of_a_microscope(tmp_path):
    for name, resolution, unit in (("real", 50_000, 3), ("screen", 72, 2), ("none", 50_000, 1)):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", DATA[0, 0, 0], resolution=(resolution,) * 2, resolutionunit=unit
        )
    opened = {name: open_source(tmp_path / f"{name}.tif") for name in ("real", "screen", "none")}
    assert opened["real"].voxel_size == pytest.approx((0.2, 0.2))
    assert [image.calibrated for image in opened.values()] == [True, False, False]


def test_a_known_length_is_kept_where_others_are_missing(tmp_path):
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1}
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA[0, 0], metadata=metadata)
    image = open_source(tmp_path / "a.ome.tif")
    assert image.voxel_size == (1.0, 0.1, 0.1)
    assert not image.calibrated
    assert [axis.get("unit") for axis in image.ome["multiscales"][0]["axes"]] == [None, *["micrometer"] * 2]


def test_what_is_said_by_hand_counts_and_is_remembered(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA[0])
    with pytest.raises(ValueError, match=r"a.tif: axes 'qqyx' .* Pass `axes` with one letter"):
        open_source(tmp_path / "a.tif")
    said = {"axes": "czyx", "voxel_size": [3.0, 1.0, 1.0], "channels": ["a", "b", "c"], "series": 0}
    image = open_source(tmp_path / "a.tif", **said)
    assert (image.voxel_size, image.channels, image.calibrated) == ((3, 1, 1), ("a", "b", "c"), True)
    assert image.opened_with == said
    np.testing.assert_array_equal(whole(image), DATA[0])
    np.testing.assert_array_equal(
        whole(open_source(tmp_path / "a.tif", axes="tzyx").select(t=1)), DATA[0, 1:2]
    )


@pytest.mark.parametrize("separate", [False, True])
def test_colour_samples_are_channels(tmp_path, separate):
    colours = DATA[0, :, 0].astype(np.uint8)
    stored = colours if separate else colours.transpose(1, 2, 0)
    options = {"planarconfig": "separate"} if separate else {}
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", compression="zlib", **options)
    image = open_source(tmp_path / "a.tif")
    assert (image.axes, image.channels) == ("cyx", ("red", "green", "blue"))
    np.testing.assert_array_equal(whole(image), colours)
    np.testing.assert_array_equal(whole(image.select(c=["blue", "red"])), colours[[2, 0]])


def test_volumetric_tiles_are_read(tmp_path):
    options = {"tile": (2, 16, 16), "volumetric": True, "photometric": "minisblack", "compression": "zlib"}
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0], **options)
    image = open_source(tmp_path / "a.tif")
    assert image.source(0).chunks == (2, 16, 16)
    np.testing.assert_array_equal(
        whole(image.select(region=np.s_[1:4, 3:30, 20:52])), DATA[0, 0, 1:4, 3:30, 20:52]
    )


def test_reduced_resolutions_are_levels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        file.write(DATA, subifds=2, tile=(16, 16), metadata=OME)
        for k in (2, 4):
            file.write(DATA[..., ::k, ::k], subfiletype=1, tile=(16, 16))
    image = open_source(tmp_path / "a.ome.tif")
    assert [level.shape[-2:] for level in image.levels] == [(40, 52), (20, 26), (10, 13)]
    assert image.levels[2].voxel_size == pytest.approx((1.5, 0.8, 0.8))
    assert image.levels[2].translation == pytest.approx((0.0, 0.3, 0.3))
    np.testing.assert_array_equal(whole(image, 2), DATA[..., ::4, ::4])
    np.testing.assert_array_equal(whole(image.select(level=1, c="GFP")), DATA[:, 1:2, :, ::2, ::2])


def several_files(folder):
    """Write an OME-TIFF of one file per channel; return the paths."""
    names = [f"part_{c}.ome.tif" for c in range(3)]
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{c}" for c in range(3)]
    data = "".join(
        f'<TiffData FirstC="{c}" FirstZ="{z}" FirstT="{t}" IFD="{5 * t + z}" PlaneCount="1">'
        f'<UUID FileName="{names[c]}">{uuids[c]}</UUID></TiffData>'
        for t in range(2) for c in range(3) for z in range(5)
    )  # fmt: skip
    for c, (name, uuid) in enumerate(zip(names, uuids, strict=True)):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYZTC" Type="uint16" SizeX="52" SizeY="40" SizeZ="5" SizeC="3" '
            f'SizeT="2" PhysicalSizeX="0.5" PhysicalSizeY="0.5" PhysicalSizeZ="2">{data}</Pixels></Image></OME>'
        )
        stack = DATA[:, c].reshape(10, 40, 52)
        tifffile.imwrite(folder / name, stack, description=xml, metadata=None, compression="zlib")
    return [folder / name for name in names]


def test_ome_tiff_in_several_files_is_one_image(tmp_path):
    paths = several_files(tmp_path)
    image = open_source(paths[1])
    assert image.voxel_size == (2.0, 0.5, 0.5)
    np.testing.assert_array_equal(whole(image), DATA)
    np.testing.assert_array_equal(whole(open_source(tmp_path)), DATA)
    paths[2].unlink()
    with pytest.raises(
        ValueError, match=r"10 of 30 pages are missing.*files that it names are not beside it"
    ):
        open_source(paths[1])


def test_a_file_beyond_4_gb_with_one_directory_is_read(tmp_path):
    """As ImageJ writes them: one directory, and planes in a row; nothing is allocated but what is written."""
    path, shape = tmp_path / "a.tif", (1100, 2, 1024, 1024)
    metadata = {"axes": "ZCYX", "spacing": 1.0, "unit": "um"}
    with pytest.warns(UserWarning, match="truncating ImageJ file"):
        tifffile.imwrite(path, shape=shape, dtype=np.uint16, imagej=True, metadata=metadata)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
        offset = file.series[0].dataoffset
        byteorder = file.byteorder
    plane = DATA[0, 0, 0]
    with path.open("r+b") as file:
        for y, row in enumerate(plane):
            file.seek(offset + (((1099 * 2 + 1) * 1024 + 900 + y) * 1024 + 70) * 2)
            file.write(row.astype(f"{byteorder}u2").tobytes())
    image = open_source(path)
    assert (image.axes, image.shape) == ("czyx", (2, 1100, 1024, 1024))
    part = image.source(0).read(0, 1, np.s_[1098:1100, 900:940, 70:122])
    np.testing.assert_array_equal(part, np.stack([np.zeros_like(plane), plane]))


def test_handles_are_small_and_threads_share_nothing(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata=OME, compression="zlib", rowsperstrip=3)
    source = open_source(tmp_path / "a.ome.tif").source(0)
    assert isinstance(source, RegionReader)
    assert len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    with ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda i: again.read(i % 2, i % 3, np.s_[0:5, i : i + 5, 0:52]), range(35))
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(part, DATA[i % 2, i % 3, :, i : i + 5])
    assert not [fd for fd in os.listdir("/proc/self/fd") if "a.ome.tif" in link(fd)]


def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.mark.parametrize("shape", [{"rowsperstrip": 10}, {"tile": (16, 16)}])
def test_only_what_is_touched_is_decoded(tmp_path, shape):
    """One strip or tile is damaged: whatever lies beside it can be read, and an error names its page."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0, 0], compression="zlib", **shape)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[3].dataoffsets[1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)
    source = open_source(path, axes="zyx").source(0)
    second = np.s_[10:20, 0:52] if "rowsperstrip" in shape else np.s_[0:16, 16:32]
    below = np.s_[0:5, 20:40, 0:52] if "rowsperstrip" in shape else np.s_[0:5, 16:40, 0:52]
    np.testing.assert_array_equal(source.read(0, 0, below), DATA[0, 0][below])
    np.testing.assert_array_equal(
        source.read(0, 0, (slice(0, 3), *second)), DATA[0, 0, :3][(slice(None), *second)]
    )
    with pytest.raises(
        CorruptChunkError, match=r"page 3 of .*a.tif cannot be decoded: .*restore it from a copy"
    ):
        source.read(0, 0, (slice(3, 4), *second))


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0, 0])
    source = open_source(path, axes="zyx").source(0)
    tifffile.imwrite(path, DATA[0, 0, :, :20])
    with pytest.raises(ValueError, match=r"a.tif has changed since it was opened"):
        source.read(0, 0, np.s_[0:1, 0:40, 0:52])


def write_tiff(path, *, edit=None, **options):
    tifffile.imwrite(path, DATA[0, 0], **options)
    content = path.read_bytes() if edit is None else edit(path.read_bytes())
    path.write_bytes(content)
    return path


def test_a_truncated_file_is_told_before_anything_is_read(tmp_path):
    cut = write_tiff(
        tmp_path / "a.tif", edit=lambda content: content[:-5000], compression="zlib", metadata=None
    )
    with pytest.raises(
        ValueError, match=r"page \d of .*a.tif ends after the file's \d+ bytes|a.tif .* damaged"
    ):
        open_source(cut, axes="zyx")
    for n in (4, 10, 60, 200):
        cut = write_tiff(tmp_path / "b.tif", edit=lambda content, n=n: content[:n])
        with pytest.raises(
            ValueError, match=r"b.tif (is not a TIFF file, or is damaged|is damaged|ends after)"
        ):
            open_source(cut, axes="zyx")


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_pages_that_a_cut_chain_has_lost_are_missed(tmp_path, caplog, level):
    """A chain of directories that ends beyond the file is a file that was cut, not a shorter stack."""
    caplog.set_level(level)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for plane in DATA[0, 0]:
            file.write(plane, metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as file:
        third = file.pages[3].offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(ValueError, match=r"a.tif is damaged: .*invalid page offset"):
        open_source(path, axes="zyx")


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.tif does not exist"):
        open_source(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_text("no tiff at all")
    with pytest.raises(ValueError, match=r"text.tif is not a TIFF file"):
        open_source(tmp_path / "text.tif")
    (tmp_path / "empty.tif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.tif is not a TIFF file"):
        open_source(tmp_path / "empty.tif")
    (tmp_path / "pageless.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 0))
    with pytest.raises(ValueError, match=r"pageless.tif"):
        open_source(tmp_path / "pageless.tif")


def test_wrong_axes_and_series_are_named(tmp_path):
    path = write_tiff(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"`axes` 'czyx' name 4 axes but the array has 3"):
        open_source(path, axes="czyx")
    with pytest.raises(ValueError, match=r"`axes` 'zzz' are not time, channel"):
        open_source(path, axes="zzz")
    with pytest.raises(ValueError, match=r"`series` 3 does not exist in .*a.tif; it has 1"):
        open_source(path, axes="zyx", series=3)
    with pytest.raises(
        ValueError, match=r"`channels` \('a',\) must hold one unique name for each of the 5 channels"
    ):
        open_source(path, axes="cyx", channels=["a"])
    with pytest.raises(ValueError, match=r"`voxel_size` .* for each of the axes 'zyx'"):
        open_source(path, axes="zyx", voxel_size=(1, 1))


def test_several_images_are_not_chosen_from_but_previews_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(DATA[0, 0], metadata={"axes": "ZYX"})
        file.write(DATA[0, 0, :, :20], metadata={"axes": "ZYX"})
        file.write(DATA[0, 0, 0, :4, :4], metadata={"axes": "YX"})
    with pytest.raises(ValueError, match=r"holds 3 images \(0 .* choose one with `series`"):
        open_source(tmp_path / "a.tif")
    np.testing.assert_array_equal(whole(open_source(tmp_path / "a.tif", series=1)), DATA[0, 0, :, :20])
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(DATA[0, 0], metadata={"axes": "ZYX"})
        file.write(DATA[0, 0, 0, :4, :4], metadata={"axes": "YX"})
    np.testing.assert_array_equal(whole(open_source(tmp_path / "b.tif")), DATA[0, 0])


def with_tag(content, code, value):
    """Return a little-endian classic TIFF with a short value of the first page's directory replaced."""
    (offset,) = struct.unpack_from("<I", content, 4)
    (n,) = struct.unpack_from("<H", content, offset)
    for i in range(n):
        at = offset + 2 + 12 * i
        if struct.unpack_from("<H", content, at)[0] == code:
            return content[: at + 8] + struct.pack("<I", value) + content[at + 12 :]
    raise AssertionError(code)


@pytest.mark.skipif(
    "imagecodecs" in sys.modules or bool(__import__("importlib.util").util.find_spec("imagecodecs")),
    reason="imagecodecs is installed, which knows the codec",
)
def test_a_codec_that_is_not_installed_is_named_with_what_installs_it(tmp_path):
    options = {"byteorder": "<", "metadata": None, "contiguous": False}
    path = write_tiff(tmp_path / "a.tif", edit=lambda c: with_tag(c, 259, 5), **options)
    with pytest.raises(ValueError, match=r"page 0 cannot be decoded: .*LZW.*pip install imagecodecs"):
        open_tiff(path, axes="zyx", series=0)


def test_an_unknown_codec_is_named(tmp_path):
    path = write_tiff(
        tmp_path / "a.tif", edit=lambda c: with_tag(c, 259, 12345), byteorder="<", metadata=None
    )
    with pytest.raises(ValueError, match=r"page 0 cannot be decoded: 12345 is not a known COMPRESSION"):
        open_tiff(path, axes="zyx", series=0)


def test_numbers_that_are_no_intensities_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0].astype(np.complex64))
    with pytest.raises(ValueError, match=r"a.tif: `dtype` complex64 is not supported"):
        open_source(tmp_path / "a.tif", axes="zyx")


def test_a_strip_that_expands_beyond_its_size_is_refused(tmp_path):
    """A few kilobytes that inflate to a gigabyte, in a file that says 4 kB."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0, 0, 0], compression="zlib", metadata=None, byteorder="<")
    bomb = zlib.compress(bytes(2**24), 9)
    content = path.read_bytes()
    path.write_bytes(with_tag(with_tag(content, 273, len(content)), 279, len(bomb)) + bomb)
    with pytest.raises(CorruptChunkError, match=r"page 0 of .* cannot be decoded"):
        open_source(path).source(0).read(0, 0, np.s_[0:40, 0:52])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('SizeT="2"', 'SizeT="99999999999"', "counts '99999999999' planes, more than"),
        ('SizeT="2"', 'SizeT="9000000"', "counts 135000000 planes, more than"),
        ('PlaneCount="30"', 'PlaneCount="999999999"', "counts '999999999' planes"),
        ("<OME ", "<!DOCTYPE OME [<!ENTITY a 'a'>]><OME ", "has a document type"),
    ],
)
def test_ome_xml_that_claims_what_no_image_has_is_refused(tmp_path, old, new, message):
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA, metadata=OME)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        xml = file.ome_metadata
    assert old in xml
    edited = xml.replace(old, new)
    tifffile.imwrite(
        tmp_path / "a.ome.tif", DATA.reshape(30, 40, 52), description=edited.encode(), metadata=None
    )
    with pytest.raises(ValueError, match=f"a.ome.tif: its OME-XML {message}"):
        open_source(tmp_path / "a.ome.tif")


def test_ome_xml_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    first, second, *_ = several_files(tmp_path)
    with tifffile.TiffFile(first) as file:
        xml = file.ome_metadata.replace("part_1", "../part_1")
    for path in (first, second):
        tifffile.imwrite(
            tmp_path / "inner" / path.name, DATA[:, 0].reshape(10, 40, 52), description=xml, metadata=None
        )
    tifffile.imwrite(tmp_path / "inner" / "part_2.ome.tif", DATA[:, 2].reshape(10, 40, 52), metadata=None)
    with pytest.raises(ValueError, match=r"names the file .*part_1.*not beside it"):
        open_source(tmp_path / "inner" / first.name)


def test_metadata_that_are_too_long_are_shortened_and_say_so(tmp_path):
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYZCT" Type="uint16" SizeX="52" SizeY="40" SizeZ="5" SizeC="1" SizeT="1" '
        'PhysicalSizeX="0.5"><Channel ID="c" Name="GFP"/><TiffData IFD="0" PlaneCount="5"/>'
        + "".join(f'<Plane TheC="0" TheT="0" TheZ="{z % 5}" DeltaT="{z}"/>' for z in range(30_000))
        + "</Pixels></Image></OME>"
    )
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA[0, 0], description=xml, metadata=None)
    image = open_source(tmp_path / "a.ome.tif")
    kept = image.others[OWN_KEY]["tiff"]
    assert len(kept["ome_xml"]) < MAX_KEPT_NBYTES
    assert 'Name="GFP"' in kept["ome_xml"]
    assert kept["ome_xml_omitted"] == f"elements Plane, TiffData and BinData, of {len(xml)} bytes in all"
    assert image.channels == ("GFP",)


def test_what_tifffile_logs_as_a_warning_is_still_logged(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA[0, 0], metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        xml = file.ome_metadata.replace('SizeZ="5"', 'SizeZ="4"').replace('PlaneCount="5"', 'PlaneCount="5" ')
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA[0, 0], description=xml, metadata=None)
    with caplog.at_level(logging.WARNING, logger="chunkrestore"):
        assert open_source(tmp_path / "a.ome.tif").shape == (4, 40, 52)
    assert any(
        r.name.startswith("chunkrestore") and "expected 4 frames, got 5" in r.message for r in caplog.records
    )


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Small files of several kinds."""
    folder = tmp_path_factory.mktemp("intact")
    tifffile.imwrite(
        folder / "a.ome.tif", DATA[0, 0], metadata={"axes": "ZYX"}, compression="zlib", tile=(16, 16)
    )
    tifffile.imwrite(folder / "b.tif", DATA[0, 0], imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(folder / "c.tif", DATA[0, 0], bigtiff=True, rowsperstrip=9, metadata=None)
    return sorted(folder.iterdir())


@settings(max_examples=100)
@given(st.data())
def test_damaged_headers_are_errors_that_name_the_file_or_images(tmp_path_factory, intact, data):
    """Never another exception, a hang, or more memory than an image needs: what a file says of itself is checked."""
    original = data.draw(st.sampled_from(intact))
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged_{original.name}"
    path.write_bytes(
        content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content
    )
    told = str(path)
    try:
        source = open_source(path, axes="zyx").source(0)
        source.read(0, 0, tuple(slice(0, min(n, 8)) for n in source.spatial_shape))
    except ValueError as error:
        told = str(error)
    assert str(path) in told


def write_planes(folder, name, **options):
    """Write `DATA` as a file per plane, named by a format of t, c and z."""
    folder.mkdir(exist_ok=True)
    for t, c, z in np.ndindex(DATA.shape[:3]):
        tifffile.imwrite(folder / name.format(t=t, c=c, z=z), DATA[t, c, z], **options)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "x40_t{t:03d}_c{c}_z{z:04d}.tif",
        "img_channel{c:03d}_position000_time{t:09d}_z{z:03d}.tif",
        "Z{z}-T{t}-C{c}.TIFF",
        "cells slice_{z} ch-{c} frame={t}.tif",
    ],
)
def test_names_tell_where_planes_belong(tmp_path, name):
    folder = write_planes(tmp_path / "planes", name, compression="zlib")
    (folder / "notes.txt").write_text("no image")
    image = open_source(folder)
    assert (image.axes, image.channels) == ("tczyx", ("0", "1", "2"))
    np.testing.assert_array_equal(whole(image), DATA)
    assert image.others[OWN_KEY]["tiff"]["n_files"] == 30
    picked = image.select(t=1, c=[2, 0], region=np.s_[1:4, 5:20, 7:50])
    np.testing.assert_array_equal(whole(picked), DATA[1:2, [2, 0], 1:4, 5:20, 7:50])


def test_numbers_are_sorted_as_numbers_and_may_be_at_equal_distances(tmp_path):
    for z in range(0, 2200, 200):
        tifffile.imwrite(tmp_path / f"z{z}nm.tif", np.full((4, 4), z, np.uint16))
    np.testing.assert_array_equal(whole(open_source(tmp_path))[:, 0, 0], range(0, 2200, 200))


def test_patterns_say_what_names_count(tmp_path):
    for c, name in enumerate(("GFP", "DAPI", "RFP")):
        for t in range(2):
            tifffile.imwrite(tmp_path / f"{name}_{t}_of_2.tif", DATA[t, c], metadata={"axes": "ZYX"})
    image = open_source(tmp_path / "{c}_{t}_of_*.tif")
    assert (image.axes, image.channels) == ("tczyx", ("DAPI", "GFP", "RFP"))
    np.testing.assert_array_equal(whole(image), DATA[:, [1, 0, 2]])
    np.testing.assert_array_equal(whole(open_source(tmp_path / "RFP_{t}_*.tif")), DATA[:, 2])
    with pytest.raises(ValueError, match=r"'DAPI_0_of_2' and 'GFP_0_of_2' differ in more than numbers"):
        open_source(tmp_path)
    with pytest.raises(
        ValueError, match=r"fields of a pattern are \{t\}, \{c\} and \{z\}, each once; found q"
    ):
        open_source(tmp_path / "{q}_*.tif")


def test_names_that_do_not_say_what_they_count_need_axes(tmp_path):
    write_planes(tmp_path / "planes", "img_{t}_{c}_{z}.tif")
    with pytest.raises(
        ValueError, match=r"3 numbers change, and what they count \('\?\?\?'\) is not sure; pass `axes`"
    ):
        open_source(tmp_path / "planes")
    image = open_source(tmp_path / "planes", axes="tczyx", voxel_size=(2, 1, 1))
    assert image.opened_with == {"axes": "tczyx", "voxel_size": [2.0, 1.0, 1.0]}
    np.testing.assert_array_equal(whole(image), DATA)
    np.testing.assert_array_equal(whole(open_source(tmp_path / "planes", axes="ctzyx")), DATA.swapaxes(0, 1))


def test_gaps_and_doubles_are_named(tmp_path):
    folder = write_planes(tmp_path / "planes", "t{t}_c{c}_z{z}.tif")
    (folder / "t1_c2_z3.tif").rename(tmp_path / "kept.tif")
    with pytest.raises(
        ValueError, match=r"1 of 30 files are missing, the first is the one for t 1, c 2, z 3"
    ):
        open_source(folder)
    for t, c in np.ndindex(2, 3):
        (folder / f"t{t}_c{c}_z3.tif").unlink(missing_ok=True)
    with pytest.raises(
        ValueError, match=r"on axis 'z' the names go from 2 to 4, elsewhere by 1; files are missing"
    ):
        open_source(folder)
    for t, c in np.ndindex(2, 3):
        (folder / f"t{t}_c{c}_z4.tif").unlink()
    assert open_source(folder).shape == (2, 3, 3, 40, 52)
    tifffile.imwrite(folder / "t1_c02_z1.tif", DATA[0, 0, 0])
    with pytest.raises(
        ValueError, match=r"'t1_c2_z1.tif' and 't1_c02_z1.tif' have the same place \(t 1, c 2, z 1\)"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (DATA[0, 0, 0, :39], {}, r"has shape \(39, 52\), but .*z0.tif \(40, 52\)"),
        (DATA[0, 0, 0].astype(np.uint8), {}, "has dtype uint8, but .*z0.tif uint16"),
        (DATA[0, 0, 0], {"compression": "zlib"}, r"is stored unlike .*z0.tif"),
    ],
)
def test_files_that_differ_are_named(tmp_path, other, options, message):
    for z in range(4):
        tifffile.imwrite(tmp_path / f"z{z}.tif", DATA[0, 0, z])
    tifffile.imwrite(tmp_path / "z2.tif", other, **options)
    with pytest.raises(ValueError, match=f"z2.tif {message}"):
        open_source(tmp_path)


def test_a_file_that_changes_after_opening_is_refused(tmp_path):
    for z in range(4):
        tifffile.imwrite(tmp_path / f"z{z}.tif", DATA[0, 0, z])
    source = open_source(tmp_path).source(0)
    np.testing.assert_array_equal(source.read(0, 0, np.s_[0:4, 0:40, 0:52]), DATA[0, 0, :4])
    tifffile.imwrite(tmp_path / "z2.tif", DATA[1, 1, 1, :30])
    with pytest.raises(ValueError, match=r"z2.tif has changed since it was opened"):
        source.read(0, 0, np.s_[0:4, 0:40, 0:52])


def test_folders_without_planes_and_zarr_folders_are_left_to_others(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a folder without zarr metadata"):
        open_source(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"holds no TIFF file"):
        open_source(tmp_path / "none_*.tif")
    with pytest.raises(ValueError, match=r"`series` 1 is for TIFF files"):
        open_source(tmp_path / "empty", series=1)


FEW_HANDLES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from chunkrestore.ome_zarr import open_source
source = open_source(sys.argv[1]).source(0)
print(int(source.read(0, 0, np.s_[0:300, 0:16, 0:16]).sum()))
"""


def test_any_number_of_files_needs_few_handles(tmp_path):
    planes = np.random.default_rng(2).integers(0, 255, (300, 16, 16)).astype(np.uint8)
    for z, plane in enumerate(planes):
        tifffile.imwrite(tmp_path / f"z{z}.tif", plane)
    script = subprocess.run(
        [sys.executable, "-c", FEW_HANDLES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert script.stdout.strip() == str(int(planes.sum(dtype=int))), script.stderr


@pytest.mark.slow
def test_ten_thousand_planes_open_in_seconds_and_little_memory(tmp_path):
    plane = tmp_path / "z0.tif"
    tifffile.imwrite(plane, DATA[0, 0, 0])
    for z in range(1, 10_000):
        os.link(plane, tmp_path / f"z{z}.tif")
    before = resource.getrusage(resource.RUSAGE_SELF)
    image = open_source(tmp_path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert image.shape == (10_000, 40, 52)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert after.ru_maxrss - before.ru_maxrss < 100_000  # kB
    np.testing.assert_array_equal(
        image.source(0).read(0, 0, np.s_[9990:10_000, 0:40, 0:52]), np.stack([DATA[0, 0, 0]] * 10)
    )
    assert re.fullmatch("[0-9a-f]{64}", image.source(0).digest)

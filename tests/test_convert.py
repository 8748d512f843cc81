"""Conversion is a job: every voxel and all metadata arrive, in bounded memory, and after any interruption the same."""

import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import tifffile
import yaozarrs
from dying import Disk, Killed, bury
from observing import tree

import chunkrestore as cr
from chunkrestore.jobs.convert import convert
from chunkrestore.ome_zarr import open_image, open_source, write_image, write_labels
from chunkrestore.ome_zarr.metadata import OWN_KEY

SERIAL = {"cluster": "serial", "quiet": True}
DATA = np.random.default_rng(5).integers(0, 2**16, (2, 3, 5, 40, 52)).astype(np.uint16)
OME = {
    "axes": "TCZYX",
    "PhysicalSizeX": 200, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.2, "PhysicalSizeZ": 1.5,
    "TimeIncrement": 4.0,
    "Channel": {"Name": ["DAPI", "GFP", "RFP"], "Color": [65535, 16711935, -16776961]},
}  # fmt: skip


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_tiff_arrives_whole(tmp_path, version):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, DATA, metadata=OME, tile=(16, 16), compression="zlib")
    report = convert(path, tmp_path / "a.zarr", version=version, **SERIAL)
    assert report.outputs == [str(tmp_path / "a.zarr")]
    yaozarrs.validate_zarr_store(tmp_path / "a.zarr")
    image = open_image(tmp_path / "a.zarr")
    assert (image.version, image.axes, image.dtype) == (version, "tczyx", np.uint16)
    np.testing.assert_array_equal(image.data.compute(), DATA)
    assert image.voxel_size == pytest.approx((1.5, 0.2, 0.2))
    assert image.channels == ("DAPI", "GFP", "RFP")
    assert [c["color"] for c in image.ome["omero"]["channels"]] == ["0000FF", "00FF00", "FF0000"]
    multiscale = image.ome["multiscales"][0]
    assert multiscale["axes"][0]["unit"] == "second"
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"][0] == 4.0
    with tifffile.TiffFile(path) as file:
        assert image.others[OWN_KEY]["source"]["tiff"]["ome_xml"] == file.ome_metadata
    assert image.others[OWN_KEY]["provenance"]["input"]["store"] == str(path)


def test_a_part_of_a_folder_of_planes_is_converted(tmp_path):
    (tmp_path / "planes").mkdir()
    for t, c, z in np.ndindex(DATA.shape[:3]):
        tifffile.imwrite(tmp_path / "planes" / f"t{t}_c{c}_z{z}.tif", DATA[t, c, z], compression="zlib")
    region = ((1, 4), (3, 40), (5, 52))
    convert(
        tmp_path / "planes",
        tmp_path / "a.zarr",
        voxel_size=(2, 0.5, 0.5),
        channels=["a", "b", "c"],
        channel=["c", "a"],
        timepoint=1,
        region=region,
        **SERIAL,
    )
    image = open_image(tmp_path / "a.zarr")
    assert (image.channels, image.voxel_size) == (("c", "a"), (2.0, 0.5, 0.5))
    assert image.translation == pytest.approx((2.0, 1.5, 2.5))
    np.testing.assert_array_equal(image.data.compute(), DATA[1:2, [2, 0], 1:4, 3:40, 5:52])


def test_operators_run_on_tiff_as_they_do_on_ome_zarr(tmp_path):
    metadata = {"axes": "ZYX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.2, "PhysicalSizeZ": 0.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", DATA[0, 0], metadata=metadata)
    write_image(DATA[0, 0], tmp_path / "a.zarr", axes="zyx", voxel_size=(0.5, 0.2, 0.2))
    for source in ("a.ome.tif", "a.zarr"):
        assert cr.plan(cr.Threshold(), tmp_path / source).shape == (5, 40, 52)
        cr.run(cr.Threshold(), tmp_path / source, tmp_path / f"{source}.labels.zarr", **SERIAL)
    first, second = (
        open_image(tmp_path / f"{source}.labels.zarr" / "labels" / "labels")
        for source in ("a.ome.tif", "a.zarr")
    )
    assert first.voxel_size == second.voxel_size == (0.5, 0.2, 0.2)
    np.testing.assert_array_equal(first.data.compute(), second.data.compute())


def test_a_conversion_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path):
    """Also by `resume`, which knows nothing but the output: axes and voxel size were given by hand."""
    tifffile.imwrite(tmp_path / "a.tif", DATA[0], compression="zlib")
    arguments = {"axes": "czyx", "voxel_size": (2, 1, 1), "block_shape": (5, 20, 52), **SERIAL}
    (tmp_path / "whole").mkdir()
    convert(tmp_path / "a.tif", tmp_path / "whole" / "out.zarr", **arguments)
    expected = tree(tmp_path / "whole" / "out.zarr")
    disk, n_changes, n_resumed = Disk(), 1, 0
    while True:
        folder = tmp_path / f"{n_changes}"
        folder.mkdir()
        try:
            with disk.dies_after(n_changes, folder):
                convert(tmp_path / "a.tif", folder / "out.zarr", **arguments)
            break
        except Killed:
            bury(folder / "out.zarr")
        if (folder / "out.zarr.chunkrestore" / "image" / "report.json").exists():
            pass  # killed after its end
        elif (folder / "out.zarr.chunkrestore" / "image" / "manifest.json").exists() and n_changes % 2:
            cr.resume(folder / "out.zarr", cluster="serial", quiet=True)
            n_resumed += 1
        else:
            convert(tmp_path / "a.tif", folder / "out.zarr", **arguments)
        assert tree(folder / "out.zarr") == expected
        n_changes += 6
    assert n_changes > 30
    assert n_resumed > 2


def test_another_file_under_the_same_name_is_not_gone_on_with(tmp_path):
    disk = Disk()
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0], metadata={"axes": "ZYX"})
    (tmp_path / "o").mkdir()
    arguments = {"axes": "zyx", **SERIAL}
    with disk.dies_after(25, tmp_path / "o"), suppress(Killed):
        convert(tmp_path / "a.tif", tmp_path / "o" / "out.zarr", **arguments)
    bury(tmp_path / "o" / "out.zarr")
    assert not (tmp_path / "o" / "out.zarr.chunkrestore" / "image" / "report.json").exists()
    tifffile.imwrite(tmp_path / "a.tif", DATA[1, 0], metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match=r"was started with something else: .*metadata_sha256"):
        convert(tmp_path / "a.tif", tmp_path / "o" / "out.zarr", **arguments)


@pytest.fixture
def with_labels(tmp_path):
    image = write_image(DATA, tmp_path / "in.zarr", axes="tczyx", voxel_size=(0.5, 0.2, 0.2))
    labels = np.random.default_rng(1).integers(0, 9, (2, 5, 40, 52))
    write_labels(labels.astype(np.int32), image.path, "nuclei", axes="tzyx")
    write_labels(labels[1].astype(np.uint64) * 2**40, image.path, "cells", axes="zyx")
    return open_image(image.path), labels


def test_labels_are_converted_with_their_image(tmp_path, with_labels):
    image, labels = with_labels
    report = convert(image.path, tmp_path / "out.zarr", version="0.4", **SERIAL)
    result = open_image(tmp_path / "out.zarr")
    assert {*result.labels} == {"nuclei", "cells"}
    assert report.outputs == [result.path, *(f"{result.path}/labels/{name}" for name in result.labels)]
    np.testing.assert_array_equal(result.label("nuclei").data.compute(), labels)
    np.testing.assert_array_equal(result.label("cells").data.compute(), labels[1].astype(np.uint64) * 2**40)
    assert (result.label("cells").dtype, result.label("cells").version) == (np.uint64, "0.4")
    convert(image.path, tmp_path / "bare.zarr", labels=False, **SERIAL)
    assert open_image(tmp_path / "bare.zarr").labels == ()


def test_a_tiff_of_ids_becomes_labels_of_the_image_and_goes_on_after_a_kill(tmp_path):
    ids = np.random.default_rng(2).integers(0, 2**31, (5, 40, 52)).astype(np.int32)
    tifffile.imwrite(tmp_path / "ids.tif", ids, metadata={"axes": "ZYX"})
    (tmp_path / "o").mkdir()
    output = tmp_path / "o" / "out.zarr"
    write_image(DATA[0, 0], output, axes="zyx", voxel_size=(0.5, 0.2, 0.2))
    with pytest.raises(ValueError, match=r"`dtype` int32 of .*ids.tif is not supported"):
        convert(tmp_path / "ids.tif", output, axes="zyx", label_name="nuclei", **SERIAL)
    arguments = {"axes": "zyx", "voxel_size": (0.5, 0.2, 0.2), "as_labels": True, "label_name": "nuclei"}
    disk = Disk()
    with disk.dies_after(25, tmp_path / "o"), suppress(Killed):
        convert(tmp_path / "ids.tif", output, **arguments, **SERIAL)
    bury(output)
    assert open_image(output).labels == ()
    cr.resume(output, cluster="serial", quiet=True)
    labels = open_image(output).label("nuclei")
    assert labels.is_labels
    assert (labels.dtype, labels.voxel_size) == (np.int32, (0.5, 0.2, 0.2))
    np.testing.assert_array_equal(labels.data.compute(), ids)
    tifffile.imwrite(tmp_path / "f.tif", DATA[0, 0].astype(np.float32), metadata={"axes": "ZYX"})
    with pytest.raises(ValueError, match=r"`as_labels` needs integers, but .*f.tif holds float32"):
        convert(tmp_path / "f.tif", output, axes="zyx", as_labels=True, **SERIAL)


@pytest.mark.slow
def test_a_conversion_on_worker_processes_is_the_same(tmp_path):
    (tmp_path / "planes").mkdir()
    for c, z in np.ndindex(3, 5):
        tifffile.imwrite(tmp_path / "planes" / f"c{c}_z{z}.tif", DATA[0, c, z], compression="zlib")
    options = {"cluster": "local", "n_workers": 2, "quiet": True}
    convert(tmp_path / "planes", tmp_path / "out.zarr", block_shape=(5, 20, 26), **options)
    np.testing.assert_array_equal(open_image(tmp_path / "out.zarr").data.compute(), DATA[0])


def test_labels_are_cut_as_their_image_is(tmp_path, with_labels):
    image, labels = with_labels
    convert(
        image.path, tmp_path / "o.zarr", timepoint=1, channel=0, region=((1, 4), (0, 40), (9, 50)), **SERIAL
    )
    result = open_image(tmp_path / "o.zarr")
    np.testing.assert_array_equal(result.data.compute(), DATA[1:, :1, 1:4, :, 9:50])
    np.testing.assert_array_equal(result.label("nuclei").data.compute(), labels[1:, 1:4, :, 9:50])
    np.testing.assert_array_equal(
        result.label("cells").data.compute(), labels[1, 1:4, :, 9:50].astype(np.uint64) * 2**40
    )


def test_a_conversion_killed_between_image_and_labels_goes_on(tmp_path, with_labels):
    image, labels = with_labels
    (tmp_path / "whole").mkdir()
    convert(image.path, tmp_path / "whole" / "out.zarr", **SERIAL)
    disk, n_changes, n_later = Disk(), 30, 0
    while True:
        output = tmp_path / f"{n_changes}" / "out.zarr"
        output.parent.mkdir()
        try:
            with disk.dies_after(n_changes, output.parent):
                convert(image.path, output, **SERIAL)
            break
        except Killed:
            bury(output)
        n_later += (output.parent / "out.zarr.chunkrestore" / "image" / "report.json").exists()
        with suppress(FileExistsError):  # killed after its end
            assert "wrote" in str(convert(image.path, output, **SERIAL))
        assert open_image(output).labels == image.labels
        np.testing.assert_array_equal(open_image(output).data.compute(), DATA)
        np.testing.assert_array_equal(open_image(output).label("nuclei").data.compute(), labels)
        n_changes += 22
    assert n_later > 2
    with pytest.raises(FileExistsError, match="exists; give another store or pass overwrite=True"):
        convert(image.path, output, **SERIAL)
    convert(image.path, output, overwrite=True, **SERIAL)


def test_what_cannot_be_converted_leaves_nothing_behind(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", DATA[0, 0].astype(np.float64), metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "b.tif", DATA[0, 0])
    tifffile.imwrite(tmp_path / "c.tif", DATA[0, 0] > 9, metadata={"axes": "ZYX"})
    (tmp_path / "d.tif").write_bytes((tmp_path / "b.tif").read_bytes()[:-9000])
    before = tree(tmp_path)
    for name, message in (
        ("a.tif", r"`dtype` float64 of .*a.tif is not supported"),
        ("b.tif", r"Pass `axes` with one letter"),
        ("c.tif", r"`dtype` bool of .*c.tif is not supported"),
        ("d.tif", r"d.tif"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "out.zarr", **SERIAL)
    assert tree(tmp_path) == before


def test_a_damaged_page_fails_the_job_by_name(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0, 0], compression="zlib", metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as file:
        offset = file.pages[3].dataoffsets[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 20)
    with pytest.raises(Exception, match=r"page 3 of .*a.tif cannot be decoded") as raised:
        convert(path, tmp_path / "out.zarr", axes="zyx", **SERIAL)
    assert type(raised.value).__name__ == "BlockError"
    with pytest.raises(ValueError, match="unfinished"):
        open_image(tmp_path / "out.zarr")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_blocks_of_copies_are_as_wide_as_what_is_decoded_at_once(tmp_path, compression):
    planes = np.zeros((130, 300, 700), np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", planes, compression=compression, rowsperstrip=300, metadata={"axes": "ZYX"}
    )
    image = open_source(tmp_path / "a.tif", axes="zyx")
    for memory in (None, "120 MB"):
        work = cr.plan([], image, memory=memory).passes[0]
        assert work.block_shape[2] == 700
        assert compression is None or work.block_shape[1] == 300
        assert work.memory_nbytes <= (120e6 if memory else 2**31)
        assert work.read_amplification == pytest.approx(1.0)
    # Less than a chunk's worth of whole pages does not fit: what is left is as wide as memory allows.
    assert cr.plan([], image, memory="8 MB").passes[0].memory_nbytes <= 8e6
    # An operator that reads beyond its blocks has cubes, for the least halo.
    lucy = cr.RichardsonLucy(np.ones((3, 3, 3)) / 27, iterations=2)
    assert len({*cr.plan(lucy, image, memory="60 MB").passes[0].block_shape}) <= 2


BOUNDED = """
import resource, sys
import numpy as np
from chunkrestore.jobs.convert import convert
options = {"cluster": "serial", "quiet": True, "memory": "140 MB", "axes": "zyx"}
convert(sys.argv[1], sys.argv[3], **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[2], sys.argv[4], **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "compressionargs": {"level": 1}}], ids=str)
def test_memory_does_not_grow_with_the_file(tmp_path, options):
    """Eight times the planes, 270 MB of them, in the memory that the first took, which is that of a block."""
    page = np.random.default_rng(0).integers(0, 50, (512, 512)).astype(np.uint16)
    for name, n in (("small.tif", 64), ("large.tif", 512)):
        with tifffile.TiffWriter(tmp_path / name) as file:
            file.write(
                (page for _ in range(n)),
                shape=(n, *page.shape),
                dtype=page.dtype,
                rowsperstrip=512,
                metadata=None,
                **options,
            )
    names = [str(tmp_path / n) for n in ("small.tif", "large.tif", "small.zarr", "large.zarr")]
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64_000  # kB
    np.testing.assert_array_equal(
        open_image(names[3]).source(0).read(0, 0, np.s_[100:101, 0:512, 0:512])[0], page
    )

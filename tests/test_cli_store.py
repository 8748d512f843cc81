"""The verbs for stores, as a shell sees them: real stores in, files and text out."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tifffile
from observing import tree, wait_for
from plates import write_plate

from chunkrestore.cli import main
from chunkrestore.ome_zarr import open_collection, open_image, write_image, write_labels

VOXELS = np.random.default_rng(2).integers(0, 400, (12, 40, 36)).astype(np.uint16)
SERIAL = ["--cluster", "serial", "-q"]


@pytest.fixture
def command(capsys):
    """Run a command; return its exit status and what it printed."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run


@pytest.fixture
def store(tmp_path):
    """Write an image with labels of two cuboids, without a pyramid."""
    path = tmp_path / "in.zarr"
    write_image(VOXELS, path, axes="zyx", voxel_size=(2, 0.5, 0.5), levels=1)
    labels = np.zeros(VOXELS.shape, np.int32)
    labels[2:6, 5:20, 5:30], labels[8:, 22:, 10:] = 1, 2
    write_labels(labels, path, "cells")
    return path


def test_info_tells_people_and_scripts_the_same(store, command):
    status, text, _ = command("info", store)
    assert status == 0
    assert "12 x 40 x 36 uint16" in text
    status, text, _ = command("info", store, "--json")
    facts = json.loads(text)
    assert (facts["shape"], facts["labels"], facts["voxel_size_um"]) == (
        [12, 40, 36],
        ["cells"],
        [2.0, 0.5, 0.5],
    )


def test_convert_stores_an_image_with_its_labels_in_another_dtype_version_and_codec(store, command, tmp_path):
    options = [
        "--ome-version",
        "0.4",
        "--compression",
        "lz4",
        "--dtype",
        "uint8",
        "--intensity-range",
        "0",
        "510",
    ]
    status, _, err = command("convert", store, tmp_path / "out.zarr", *options, *SERIAL)
    assert (status, err) == (0, "")
    image = open_image(tmp_path / "out.zarr")
    assert (image.version, image.dtype, image.labels) == ("0.4", np.uint8, ("cells",))
    np.testing.assert_array_equal(image.data.compute(), np.rint(VOXELS / 2))
    np.testing.assert_array_equal(
        image.label("cells").data.compute(), open_image(store).label("cells").data.compute()
    )


def test_a_tiff_goes_in_and_a_part_of_it_comes_out(command, tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", VOXELS)
    hand = ["--axes", "zyx", "--voxel-size", "2,0.5,0.5"]
    assert command("convert", tmp_path / "in.tif", tmp_path / "out.zarr", *hand, *SERIAL)[0] == 0
    status, out, _ = command(
        "export", tmp_path / "out.zarr", tmp_path / "part.ome.tif", "--region", "2:8,0:40,4:36"
    )
    assert (status, out) == (0, f"wrote      {tmp_path / 'part.ome.tif'}\n")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "part.ome.tif"), VOXELS[2:8, :, 4:36])


def test_a_plain_array_is_processed_with_axes_given_by_hand(command, tmp_path):
    import zarr

    array = zarr.create_array(
        tmp_path / "plain.zarr", shape=VOXELS.shape, chunks=(12, 20, 20), dtype="uint16"
    )
    array[:] = VOXELS
    hand = ["--axes", "zyx", "--voxel-size", "2,0.5,0.5"]
    assert command("segment", tmp_path / "plain.zarr", tmp_path / "out.zarr", "--method", "threshold", "--value", 200,
                   *hand, *SERIAL)[0] == 0  # fmt: skip
    labels = open_image(tmp_path / "out.zarr" / "labels" / "labels")
    np.testing.assert_array_equal(labels.data.compute() > 0, VOXELS > 200)
    assert labels.voxel_size == (2, 0.5, 0.5)


def test_pyramid_adds_levels_to_an_image_and_its_labels(store, command):
    assert command("pyramid", store, "--levels", 3, *SERIAL)[0] == 0
    image = open_image(store)
    assert [level.shape for level in image.levels] == [(12, 40, 36), (12, 20, 18), (12, 10, 9)]
    assert len(image.label("cells").levels) == 3


def test_measure_writes_a_row_per_object(store, command, tmp_path):
    status, _, err = command(
        "measure", store, "cells", "--format", "csv", "--output", tmp_path / "cells.csv", *SERIAL
    )
    assert (status, err) == (0, "")
    header, *rows = (tmp_path / "cells.csv").read_text().splitlines()
    assert len(rows) == 2
    row = dict(zip(header.replace('"', "").split(","), rows[0].split(","), strict=True))
    assert int(row["n_voxels"]) == 4 * 15 * 25
    assert float(row["volume_um3"]) == 4 * 15 * 25 * 2 * 0.5 * 0.5


def test_fields_of_a_plate_are_chosen_by_well(command, tmp_path):
    write_plate(tmp_path / "plate.zarr")
    out = tmp_path / "out.zarr"
    wells = [field.well for field in open_collection(tmp_path / "plate.zarr").fields]
    status, text, _ = command("convert", tmp_path / "plate.zarr", out, "--well", wells[0], "--dry-run")
    assert (status, text.split()[0]) == (0, "fields")
    assert not out.exists()
    assert command("convert", tmp_path / "plate.zarr", out, "--well", wells[0], *SERIAL)[0] == 0
    assert {field.well for field in open_collection(out).fields} == {wells[0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "absent.zarr"], "absent.zarr does not exist"),
        (["convert", "in.zarr", "out.zarr", "--intensity-range", "0", "1"], "give `dtype` (--dtype) as well"),
        (["convert", "in.zarr", "out.zarr", "--well", "B/03"], "choose images of a collection"),
        (["convert", "in.zarr", "in.zarr"], "is the input"),
        (["export", "in.zarr", "out.tif", "--region", "0:99,0:40,0:36"], "leaves 0:12"),
        (["pyramid", "absent.zarr"], "absent.zarr does not exist"),
        (["measure", "in.zarr", "nuclei"], "nuclei"),
        (["view", "absent.zarr", "--viewer", "web", "--no-browser"], "absent.zarr does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_nothing_is_touched(
    store, command, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    takes_cluster = arguments[0] not in ("info", "export", "view")
    status, _, err = command(*arguments, *(SERIAL if takes_cluster else []))
    assert status == 2
    assert err.startswith("chunkrestore: ")
    assert message in err
    assert err.count("\n") == 1
    assert tree(tmp_path) == before


def test_view_serves_until_it_is_interrupted(store):
    arguments = [sys.executable, "-m", "chunkrestore", "view", str(store), "--viewer", "web", "--no-browser"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        lines = []

        def address():
            lines.append(process.stdout.readline())
            return re.search(r"http://127\.0\.0\.1:\d+\S*", "".join(lines))

        url = wait_for(address, "the page").group()
        assert b"<html" in urllib.request.urlopen(url).read().lower()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 75)


def test_a_plate_is_converted_with_the_labels_of_its_fields(command, tmp_path):
    write_plate(tmp_path / "plate.zarr")
    assert (
        command("segment", tmp_path / "plate.zarr", "--method", "threshold", "--value", 100, *SERIAL)[0] == 0
    )
    assert (
        command("convert", tmp_path / "plate.zarr", tmp_path / "out.zarr", "--dtype", "float32", *SERIAL)[0]
        == 0
    )
    before, after = (open_collection(tmp_path / name).fields for name in ("plate.zarr", "out.zarr"))
    assert [f.member for f in before] == [f.member for f in after]
    for old, new in zip(before, after, strict=True):
        old, new = open_image(old.path), open_image(new.path)
        assert new.dtype == np.float32
        np.testing.assert_array_equal(new.data.compute(), old.data.compute())
        np.testing.assert_array_equal(new.label("labels").data.compute(), old.label("labels").data.compute())
    status, _, err = command(
        "convert", tmp_path / "plate.zarr", tmp_path / "x.zarr", "--axes", "zyx", *SERIAL
    )
    assert (status, "fields of" in err) == (2, True)

"""Stores in napari: real layers in a real viewer model, found through a real plugin manager; no window."""

import json
import os
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
from hostile import edit

from chunkrestore.ome_zarr import open_image, write_image, write_labels

pytest.importorskip("napari", reason="napari is not installed")
pytest.importorskip("npe2", reason="npe2 is not installed")

VOXEL_SIZE = (2.0, 0.5, 0.5)
SHAPE = (8, 300, 280)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two channels and two time points, with labels."""
    path = tmp_path_factory.mktemp("napari") / "image.zarr"
    data = np.random.default_rng(0).integers(0, 1000, (2, 2, *SHAPE)).astype("u2")
    write_image(data, path, axes="tczyx", voxel_size=VOXEL_SIZE, channels=["nuclei", "membrane"])
    write_labels(
        np.arange(2 * np.prod(SHAPE)).reshape(2, *SHAPE).astype("i4") % 50, path, "cells", axes="tzyx"
    )
    return path


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume with labels, a table and a colour."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.mktemp("volume") / "out.zarr"
    write_image(np.ones((4, 20, 20), "f4"), path, axes="zyx", voxel_size=VOXEL_SIZE)
    write_labels(np.arange(1600).reshape(4, 20, 20) % 3, path, "cells")
    columns = {
        "t": [0, 0],
        "c": [0, 0],
        "label": [1, 2],
        "volume_um3": [1.5, 2.5],
        "distances": [[1.0], [2.0]],
    }
    parquet.write_table(pyarrow.table(columns), path / "labels/cells/objects.parquet")
    colors = [{"label-value": 2, "rgba": [255, 0, 0, 255]}]
    edit(path / "labels/cells/zarr.json", "attributes", "ome", "image-label", "colors", to=colors)
    return path


@pytest.fixture(scope="module")
def found(store, volume, tmp_path_factory):
    """What napari makes of the stores; one process for all, as it takes seconds to import and warns of much."""
    folder = tmp_path_factory.mktemp("others")
    write_image(np.zeros((4, 20, 20), "u2"), folder / "raw.zarr", axes="zyx", voxel_size=VOXEL_SIZE)
    write_labels(
        np.ones((4, 20, 20), "i8"), folder / "labels.zarr", "cells", axes="zyx", voxel_size=VOXEL_SIZE
    )
    manifest = files("chunkrestore.viewer").joinpath("napari.yaml")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (store, volume, folder, manifest))],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "NAPARI_CONFIG": "", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SCRIPT = """
import json, sys
import npe2
import numpy as np
from napari.components import ViewerModel
from npe2 import PluginManager, PluginManifest
from chunkrestore.viewer.napari import can_show, open_in_napari

store, volume, folder, manifest = sys.argv[1:]
found = {}

viewer = open_in_napari(store, viewer=ViewerModel())
found["layers"] = [
    {
        "type": type(layer).__name__, "name": layer.name, "shapes": [level.shape for level in layer.data],
        "scale": layer.scale.tolist(), "translate": layer.translate.tolist(), "units": [str(u) for u in layer.units],
        "axes": layer.axis_labels, "window": getattr(layer, "contrast_limits", None), "visible": layer.visible,
        "voxels": np.asarray(layer.data[0][1, 3, 5, :4]).tolist(),
    }
    for layer in viewer.layers
]
found["axes"] = viewer.dims.axis_labels

viewer = open_in_napari(volume, viewer=ViewerModel())
labels = viewer.layers["cells"]
found["features"] = labels.features.to_dict("list")
found["colors"] = [None if color is None else color.tolist() for color in map(labels.get_color, range(3))]
found["scale bar"] = viewer.canvas.overlays.scale_bar.visible

viewer = open_in_napari(volume, f"{folder}/raw.zarr", labels=(), viewer=ViewerModel())
found["before"] = [(layer.name, layer.visible) for layer in viewer.layers]
viewer = open_in_napari(f"{folder}/labels.zarr", viewer=ViewerModel())
found["labels alone"] = [(layer.name, layer.dtype.name) for layer in viewer.layers]

manager = PluginManager.instance()
manager.register(PluginManifest.from_file(manifest))
compatible = [r.command for r in manager.iter_compatible_readers([volume])]
found["compatible"] = "chunkrestore.open" in compatible
read = npe2.read([volume], stack=False, plugin_name="chunkrestore")
found["read"] = [(kind, options["name"]) for _, options, kind in read]
viewer = ViewerModel()
viewer.open(volume, plugin="chunkrestore")
found["opened"] = [layer.name for layer in viewer.layers]

if not can_show():
    try:
        open_in_napari(volume)
    except ImportError as error:
        found["without qt"] = str(error)
print(json.dumps(found))
"""


def test_channels_and_labels_become_layers_in_their_place(found, store):
    image = open_image(store)
    nuclei, membrane, cells = found["layers"]
    names = [("Image", "image.zarr nuclei"), ("Image", "image.zarr membrane"), ("Labels", "cells")]
    assert [(layer["type"], layer["name"]) for layer in found["layers"]] == names
    for layer in found["layers"]:
        assert layer["shapes"] == [[level.shape[i] for i in (0, 2, 3, 4)] for level in image.levels]
        assert layer["scale"] == [1, *VOXEL_SIZE]
        assert layer["translate"] == [0, 0, 0, 0]
        assert layer["units"] == ["pixel", "micrometer", "micrometer", "micrometer"]
        assert layer["axes"] == found["axes"] == list("tzyx")
        assert layer["visible"]
    windows = [c["window"] for c in image.ome["omero"]["channels"]]
    assert [nuclei["window"], membrane["window"]] == [[w["start"], w["end"]] for w in windows]
    assert membrane["voxels"] == image.data[1, 1, 3, 5, :4].compute().tolist()
    assert cells["voxels"] == image.label("cells").data[1, 3, 5, :4].compute().tolist()


def test_labels_carry_colours_and_what_the_table_says(found):
    told = {"t": [0, 0], "c": [0, 0], "label": [1, 2], "volume_um3": [1.5, 2.5]}
    assert found["features"] == {"index": [1, 2], **told}
    assert found["colors"][2] == [1, 0, 0, 1]
    assert found["colors"][1] == pytest.approx([0.6, 0.6, 0.6, 1])
    assert found["scale bar"]


def test_the_image_before_lies_below_and_is_off(found):
    assert found["before"] == [["raw.zarr", False], ["out.zarr", True]]


def test_labels_alone_are_opened(found):
    assert found["labels alone"] == [["cells", "int64"]]


def test_npe2_finds_the_reader_by_the_manifest_and_opens_image_and_labels(found):
    assert found["compatible"]
    assert found["read"] == [["image", "out.zarr"], ["labels", "cells"]]
    assert found["opened"] == ["out.zarr", "cells"]


def test_without_qt_the_way_out_is_named(found):
    if "without qt" not in found:
        pytest.skip("there is Qt here")
    assert found["without qt"].endswith('pip install "napari[all]"; or viewer="web"')


def test_the_reader_leaves_alone_what_it_cannot_open(volume, tmp_path):
    from chunkrestore.viewer.napari import napari_get_reader

    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "file.zarr").write_text("nothing")
    assert napari_get_reader(str(volume)) is not None
    for path in (tmp_path / "empty.zarr", tmp_path / "file.zarr", tmp_path / "nothing.zarr"):
        assert napari_get_reader(str(path)) is None
    assert napari_get_reader([str(volume)]) is None

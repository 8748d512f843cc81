"""Writing labels into the group of an image."""

import json

import dask.array as da
import numpy as np
import pytest
import yaozarrs
import zarr
from observing import tree
from ome_zarr_models import open_ome_zarr

from chunkrestore.ome_zarr import (
    create_image,
    create_labels,
    open_image,
    open_writer,
    write_image,
    write_labels,
)


def labels_of(shape=(10, 20, 22), dtype="int32"):
    return (np.arange(np.prod(shape)).reshape(shape) % 7 * 1000 % 251).astype(dtype)


@pytest.fixture(params=["0.4", "0.5"])
def image(tmp_path, request):
    data = np.ones((2, 10, 20, 22), "uint16")
    return write_image(
        data, tmp_path / "a.zarr", axes="czyx", voxel_size=(2, 0.5, 0.5), levels=3, version=request.param
    )


def test_labels_are_valid_and_lossless(tmp_path, image):
    labels = labels_of()
    written = write_labels(labels, tmp_path / "a.zarr", name="nuclei", provenance={"model": "demo"})
    assert (written.axes, written.dtype, written.voxel_size) == ("zyx", np.int32, (2, 0.5, 0.5))
    assert written.is_labels
    assert len(written.levels) == len(image.levels)
    assert [level.reader.spatial_shape for level in written.levels] == [
        level.reader.spatial_shape for level in image.levels
    ]
    assert [level.voxel_size for level in written.levels] == [level.voxel_size for level in image.levels]
    assert [level.translation for level in written.levels] == [level.translation for level in image.levels]
    np.testing.assert_array_equal(written.data.compute(), labels)
    assert set(np.unique(written.level(2).compute())) <= set(np.unique(labels))
    assert open_image(image.path).labels == ("nuclei",)
    assert open_image(image.path).label("nuclei").path == written.path
    assert written.ome["image-label"]["source"] == {"image": "../../"}
    assert written.others["chunkrestore"]["provenance"] == {"model": "demo"}
    yaozarrs.validate_zarr_store(image.path)
    model = open_ome_zarr(zarr.open_group(image.path, mode="r"))
    listed = model.labels.attributes
    assert getattr(listed, "ome", listed).labels == ["nuclei"]
    label_model = open_ome_zarr(zarr.open_group(written.path, mode="r"))
    label_ome = getattr(label_model, "ome_attributes", None) or label_model.attributes
    assert len(label_ome.multiscales[0].datasets) == len(model.datasets[0]) == 3


def test_label_version_stands_where_its_specification_wants_it(tmp_path, image):
    write_labels(labels_of(), tmp_path / "a.zarr")
    folder = tmp_path / "a.zarr" / "labels" / "labels"
    if image.version == "0.4":
        assert json.loads((folder / ".zattrs").read_text())["image-label"]["version"] == "0.4"
    else:
        ome = json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
        assert ome["version"] == "0.5"
        assert "version" not in ome["image-label"]


def test_other_labels_and_the_image_are_untouched(tmp_path, image):
    path = tmp_path / "a.zarr"
    write_labels(labels_of(), path, "first")
    before = tree(path)
    with pytest.raises(
        FileExistsError, match="already holds labels; choose another name, or pass overwrite=True"
    ):
        write_labels(labels_of(), path, "first")
    assert tree(path) == before
    write_labels(labels_of(dtype="uint8"), path, "second", method="mode")
    write_labels(labels_of(dtype="int64"), path, "second", overwrite=True)
    after = tree(path)
    first = {k: v for k, v in before.items() if k.startswith("labels/first/") or not k.startswith("labels/")}
    assert {k: after[k] for k in first} == first
    assert open_image(path).labels == ("first", "second")
    assert open_image(path).label("second").dtype == np.int64
    yaozarrs.validate_zarr_store(path)


def test_labels_are_listed_only_when_published(tmp_path, image):
    path = tmp_path / "a.zarr"
    write_labels(labels_of(), path, "nuclei")
    writer = create_labels(path, "nuclei", overwrite=True)
    assert open_image(path).labels == ()
    with pytest.raises(ValueError, match="is unfinished"):
        open_image(path / "labels" / "nuclei")
    with pytest.raises(FileExistsError, match="already holds unfinished labels; resume them"):
        create_labels(path, "nuclei")
    again = open_writer(path / "labels" / "nuclei")
    assert again == writer
    assert type(again) is type(writer)
    again.publish()
    assert open_image(path).labels == ("nuclei",)


def test_labels_of_a_dask_array_of_any_chunks(tmp_path, image):
    lazy = da.from_array(labels_of(), chunks=(3, 7, 22))
    written = write_labels(lazy, tmp_path / "a.zarr", "lazy", chunks=(4, 4, 4))
    np.testing.assert_array_equal(written.data.compute(), labels_of())


def test_labels_with_channel_axis(tmp_path, image):
    labels = labels_of((2, 10, 20, 22))
    written = write_labels(labels, tmp_path / "a.zarr", "both")
    assert written.axes == "czyx"
    np.testing.assert_array_equal(written.data.compute(), labels)
    yaozarrs.validate_zarr_store(image.path)


def test_labels_of_a_lower_level_have_as_many_levels_as_the_image(tmp_path, image):
    part = open_image(image.path).select(level=1)
    written = write_labels(labels_of(part.spatial_shape), tmp_path / "a.zarr", "coarse", like=part)
    assert len(written.levels) == 3
    assert (written.voxel_size, written.translation) == (part.voxel_size, part.translation)
    yaozarrs.validate_zarr_store(image.path)
    open_ome_zarr(zarr.open_group(image.path, mode="r"))


def test_labels_follow_the_levels_that_another_tool_made(tmp_path):
    path = tmp_path / "a.zarr"
    write_image(np.ones((9, 21), "uint8"), path, axes="yx", levels=2)
    node = path / "1" / "zarr.json"
    node.write_text(node.read_text().replace("5,", "4,", 1).replace("11\n", "10\n", 1))
    assert open_image(path).levels[1].shape == (4, 10)
    written = write_labels(labels_of((9, 21)), path)
    assert written.levels[1].shape == (4, 10)
    assert set(np.unique(written.level(1).compute())) <= set(np.unique(labels_of((9, 21))))


def test_labels_while_the_image_is_unfinished(tmp_path):
    writer = create_image(tmp_path / "a.zarr", shape=(10, 20, 22), dtype="uint16", axes="zyx", levels=2)
    labels = write_labels(labels_of(), tmp_path / "a.zarr", axes="zyx")
    assert len(labels.levels) == 2
    writer.publish()
    assert open_image(tmp_path / "a.zarr").labels == ("labels",)
    yaozarrs.validate_zarr_store(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float32"},
            r"`dtype` float32 of labels 'n' is no integer; convert them with .astype\('int32'\)",
        ),
        ({"dtype": "bool"}, "`dtype` bool of labels 'n' is no integer"),
        ({"method": "mean"}, "`method` 'mean' cannot reduce labels; use 'nearest' or 'mode'"),
        ({"version": "0.3"}, "`version` '0.3' differs from"),
        ({"shape": (10, 20, 21)}, "axis 'x' is 21 long but 22"),
        ({"name": "../n"}, r"label name '../n' must be made of letters, digits"),
        ({"name": ""}, r"label name '' must be made of letters, digits"),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_touched(tmp_path, image, options, message):
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_labels(tmp_path / "a.zarr", **({"name": "n"} | options))
    assert tree(tmp_path) == before


def test_labels_need_an_image_or_a_shape(tmp_path):
    with pytest.raises(ValueError, match="`shape` is needed because there is no image"):
        create_labels(tmp_path / "a.zarr", "n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an OME-Zarr image; labels go into the group of an image"):
        write_labels(labels_of(), tmp_path / "folder", axes="zyx")
    assert not (tmp_path / "a.zarr").exists()

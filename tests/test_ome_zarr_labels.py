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
from chunkrestore.ome_zarr import label_attributes as about


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


def test_labels_like_others_have_the_levels_of_the_image_beside_them(tmp_path):
    write_image(np.ones((9, 21), "uint8"), tmp_path / "a.zarr", axes="yx", levels=2)
    node = tmp_path / "a.zarr" / "1" / "zarr.json"
    node.write_text(node.read_text().replace("5,", "4,", 1).replace("11\n", "10\n", 1))
    labels = write_labels(labels_of((9, 21)), tmp_path / "a.zarr")
    write_image(np.ones((9, 21), "uint8"), tmp_path / "b.zarr", axes="yx", levels=2)
    copied = write_labels(labels.data, tmp_path / "b.zarr", like=labels)
    assert (labels.levels[1].shape, copied.levels[1].shape) == ((4, 10), (5, 11))


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


COLORS = {1: (255, 0, 0, 255), 3: (0, 128, 255, 64)}
PROPERTIES = {
    1: {"class": "nucleus", "volume": 12.5},
    3: {"class": "debris", "touches": [1, 2], "parent": None},
}


def test_colors_and_properties_are_written_as_given(tmp_path, image):
    written = write_labels(labels_of(), tmp_path / "a.zarr", colors=COLORS, properties=PROPERTIES)
    found = written.ome["image-label"]
    assert found["colors"] == [{"label-value": i, "rgba": list(c)} for i, c in COLORS.items()]
    assert found["properties"] == [{"label-value": i, **p} for i, p in PROPERTIES.items()]
    yaozarrs.validate_zarr_store(image.path)


def test_numbers_of_numpy_become_plain_ones(tmp_path, image):
    colors = {np.uint16(2): np.array([1, 2, 3, 4], np.uint8)}
    written = write_labels(labels_of(), tmp_path / "a.zarr", colors=colors)
    assert written.ome["image-label"]["colors"] == [{"label-value": 2, "rgba": [1, 2, 3, 4]}]


def test_automatic_colors_are_those_of_the_ids_that_there_are(tmp_path, image):
    labels = np.zeros((10, 20, 22), "int32")
    labels[2:4], labels[5, 3] = 7, 90_000
    for name, data in {"a": labels, "b": da.from_array(labels, chunks=(3, 20, 22))}.items():
        written = write_labels(data, tmp_path / "a.zarr", name, colors="auto")
        entries = written.ome["image-label"]["colors"]
        assert [e["label-value"] for e in entries] == [7, 90_000]
        assert [tuple(e["rgba"]) for e in entries] == list(about.distinct_colors([7, 90_000]).values())
    empty = write_labels(np.zeros_like(labels), tmp_path / "a.zarr", "c", colors="auto")
    assert "colors" not in empty.ome["image-label"]


def test_colors_of_ids_are_distinct_and_stay_when_objects_go():
    colors = about.distinct_colors(range(1, 4097))
    assert len(set(colors.values())) > 4090
    assert about.distinct_colors([5, 70])[70] == colors[70]
    neighbours = np.array([colors[i][:3] for i in range(1, 4097)], int)
    assert np.abs(np.diff(neighbours, axis=0)).max(axis=1).min() > 60
    assert neighbours.max(axis=1).min() >= 0.65 * 255 - 1  # none is lost on black
    assert about.distinct_colors([0]) == {0: (0, 0, 0, 0)}
    assert about.distinct_colors([3], opacity=100)[3] == (*colors[3][:3], 100)


def test_objects_of_a_class_have_one_color():
    colors = about.class_colors({1: "nucleus", 2: "debris", 9: "nucleus"})
    assert colors[1] == colors[9] != colors[2]
    numbered = about.class_colors({1: 0, 2: 1, 3: 0})
    assert numbered[1] == numbered[3] != numbered[2]
    assert about.class_colors({8: 1})[8] == numbered[2]  # whatever other classes there are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"colors": {1: (1, 2, 3)}},
            r"`colors` of label 1 are \(1, 2, 3\); give red, green, blue and opacity",
        ),
        ({"colors": {1: (1, 2, 3, 256)}}, r"`colors` of label 1 are \(1, 2, 3, 256\)"),
        ({"colors": {1: (1.0, 0, 0, 1)}}, "`colors` of label 1 are .* as integers from 0 to 255"),
        ({"colors": {1: "red"}}, "`colors` of label 1 are 'red'"),
        ({"colors": {"1": (1, 2, 3, 4)}}, "`colors` name label id '1', which is no uint8: 0 to 255"),
        ({"colors": {True: (1, 2, 3, 4)}}, "`colors` name label id True"),
        ({"colors": {256: (1, 2, 3, 4)}}, "`colors` name label id 256, which is no uint8: 0 to 255"),
        ({"colors": [(1, 2, 3, 4)]}, "`colors` .* must be a mapping of label ids"),
        ({"properties": {-1: {}}}, "`properties` name label id -1"),
        (
            {"properties": {1: {"label-value": 2}}},
            "`properties` of label 1 are .* none of them 'label-value'",
        ),
        ({"properties": {1: {"a": float("nan")}}}, "`properties` of label 1 are no JSON"),
        ({"properties": {1: {"a": np.ones(2)}}}, "`properties` of label 1 are no JSON"),
        ({"properties": {1: 2.0}}, "`properties` of label 1 are 2.0; give values by name"),
        (
            {"colors": {1: (1, 2, 3, 4)}, "properties": {2: {"a": 1}}},
            "`properties` name label 2, which is not among `colors`; give colours of all or none",
        ),
        (
            {"properties": {1: {"a": "b" * 2**24}}},
            "`properties` take .* bytes of JSON, the limit is 16777216",
        ),
        (
            {"dtype": "int32", "colors": dict.fromkeys(range(1, 1_000_001), (1, 2, 3, 4))},
            "`colors` has 1000000 entries, the limit .* is 10000; leave it out .* write the table of the objects",
        ),
        (
            {"dtype": "int32", "properties": {i: {} for i in range(1, 10_002)}},
            "`properties` has 10001 entries, the limit",
        ),
    ],
)
def test_what_is_said_of_objects_is_checked_before_anything_is_written(tmp_path, options, message):
    write_image(np.ones((4, 5), "uint8"), tmp_path / "a.zarr", axes="yx")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_labels(tmp_path / "a.zarr", "n", **({"dtype": "uint8"} | options))
    assert tree(tmp_path) == before


def test_properties_are_completed_for_objects_with_a_color(tmp_path, image):
    written = write_labels(labels_of(), tmp_path / "a.zarr", colors=COLORS, properties={3: {"class": "b"}})
    assert written.ome["image-label"]["properties"] == [{"label-value": 1}, {"label-value": 3, "class": "b"}]


def test_automatic_colors_have_a_limit(tmp_path, image):
    labels = np.arange(10 * 20 * 22, dtype="int32").reshape(10, 20, 22)
    write_labels(labels, tmp_path / "a.zarr", "few", colors="auto")
    many = np.arange(30 * 20 * 22, dtype="int32").reshape(30, 20, 22)
    for data in (many, da.from_array(many, chunks=(8, 20, 22))):
        with pytest.raises(ValueError, match="`colors` 'auto' are for at most 10000 objects"):
            write_labels(data, tmp_path / "b.zarr", axes="zyx", colors="auto")
    with pytest.raises(ValueError, match="`colors` 'red' must be colours by label id, 'auto' or None"):
        write_labels(labels, tmp_path / "b.zarr", axes="zyx", colors="red")
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize("new", ["0.4", "0.5"])
def test_labels_like_labels_keep_what_is_said_of_their_objects(tmp_path, image, new):
    first = write_labels(labels_of(), tmp_path / "a.zarr", "n", colors=COLORS, properties=PROPERTIES)
    document = tmp_path / "a.zarr" / "labels" / "n" / (".zattrs" if image.version == "0.4" else "zarr.json")
    content = json.loads(document.read_text())
    found = content if image.version == "0.4" else content["attributes"]
    found["lab"] = {"curated": True}
    ome = found if image.version == "0.4" else found["ome"]
    ome["image-label"]["vendor"] = {"tool": 1}
    document.write_text(json.dumps(content))
    first = open_image(first.path)
    copied = write_labels(first.data, tmp_path / "b.zarr", "m", like=first, version=new)
    assert about.label_attributes(copied) == about.label_attributes(first)
    assert about.label_attributes(copied)["vendor"] == {"tool": 1}
    assert copied.others["lab"] == {"curated": True}
    assert copied.others["chunkrestore"]["source"] == first.others["chunkrestore"]
    assert copied.ome["multiscales"][0]["name"] == "m"
    other = write_labels(first.data, tmp_path / "b.zarr", "o", like=first, colors={1: (1, 1, 1, 1)})
    assert other.ome["image-label"]["colors"] == [{"label-value": 1, "rgba": [1, 1, 1, 1]}]


@pytest.mark.parametrize("kind", ["numpy", "dask", "sliced"])
def test_labels_are_stored_as_small_as_asked_for(tmp_path, image, kind):
    labels = labels_of(dtype="int64")
    held = {"numpy": labels, "dask": da.from_array(labels, chunks=(4, 20, 22)), "sliced": zarr.array(labels)}[
        kind
    ]
    written = write_labels(held, tmp_path / "a.zarr", "small", dtype="uint8", colors="auto")
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written.data.compute(), labels)
    labels = labels.copy()
    labels[-1, -1, -1] = 256
    held = {"numpy": labels, "dask": da.from_array(labels, chunks=(4, 20, 22)), "sliced": zarr.array(labels)}[
        kind
    ]
    with pytest.raises(
        ValueError, match="`dtype` uint8 of labels 'large' does not hold id 256; its largest is 255"
    ):
        write_labels(held, tmp_path / "a.zarr", "large", dtype="uint8")
    assert "large" not in open_image(image.path).labels
    with pytest.raises(ValueError, match="`dtype` float32 of labels 'n' is no integer"):
        write_labels(labels.astype("f4"), tmp_path / "a.zarr", "n", dtype="uint8")

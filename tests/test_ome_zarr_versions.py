"""Images of every version, and axes of any name: stores made here with zarr and JSON alone, never with our writer."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.ome_zarr import facts, older, open_image, write_image, write_labels
from chunkrestore.ome_zarr.metadata import axis_letters, geometry
from chunkrestore.ome_zarr.newer import as_current
from chunkrestore.ome_zarr.store import read_json

SHAPE = {"t": 2, "c": 3, "z": 6, "y": 11, "x": 14}
MICROMETRE = "micrometer"


def values(axes):
    shape = tuple(SHAPE[a] for a in axes)
    return np.arange(math.prod(shape)).reshape(shape).astype("u2")


def halved(data, axes):
    return data[tuple(slice(None, None, 1 if a in "tc" else 2) for a in axes)]


def make(path, fmt, attributes, levels, *, separator="/", **array):
    """Write a group with arrays, by their paths."""
    zarr.create_group(path, zarr_format=fmt, attributes=attributes)
    for member, data in levels.items():
        options = {"chunks": tuple(min(n, 4) for n in data.shape), "fill_value": 0} | array
        if fmt == 2:
            options["chunk_key_encoding"] = {"name": "v2", "separator": separator}
        zarr.create_array(path / member, shape=data.shape, dtype=data.dtype, zarr_format=fmt, **options)[
            ...
        ] = data
    return path


def old(path, version="0.3", axes="tczyx", listed=None, separator="/", **extra):
    """Write an image of version 0.1 to 0.3 with two levels."""
    multiscale = {"name": "old", "datasets": [{"path": "s0"}, {"path": "s1"}], "type": "gaussian"}
    multiscale |= {"version": version} if version else {}
    if listed is not None or version == "0.3":
        multiscale["axes"] = list(axes) if listed is None else listed
    data = values(axes)
    levels = {"s0": data, "s1": halved(data, axes)}
    make(path, 2, {"multiscales": [multiscale], **extra}, levels, separator=separator)
    return data


WINDOW = {"min": 0, "max": 9, "start": 1, "end": 8}
OMERO = {
    "channels": [{"label": name, "color": "00FF00", "window": WINDOW} for name in "abc"],
    "rdefs": {"model": "color"},
}


# 0.1 to 0.3


@pytest.mark.parametrize(
    ("version", "axes", "separator"),
    [
        ("0.1", "tczyx", "."),
        ("0.2", "tczyx", "/"),
        ("0.3", "tczyx", "/"),
        ("0.3", "zyx", "/"),
        ("0.3", "cyx", "."),
        ("0.3", "yx", "/"),
    ],
)
def test_old_versions_are_read_voxel_by_voxel(version, axes, separator, tmp_path):
    data = old(tmp_path / "a.zarr", version, axes, separator=separator, omero=OMERO)
    image = open_image(tmp_path / "a.zarr")
    assert (image.version, image.axes, image.shape) == (version, axes, data.shape)
    assert not image.calibrated
    assert set(image.voxel_size) == {1.0}
    assert image.channels == (("a", "b", "c") if "c" in axes else ("a",))
    np.testing.assert_array_equal(image.data.compute(), data)
    np.testing.assert_array_equal(image.level(1).compute(), halved(data, axes))
    assert facts(image)["version"] == version


def test_levels_of_old_versions_cover_the_same_extent(tmp_path):
    old(tmp_path / "a.zarr")
    fine, coarse = open_image(tmp_path / "a.zarr").levels
    assert fine.translation == (0, 0, 0)
    assert coarse.voxel_size == (2, 11 / 6, 2)
    assert coarse.translation == pytest.approx((0.5, 5 / 12, 0.5))
    for level in (fine, coarse):
        begin = [t - v / 2 for t, v in zip(level.translation, level.voxel_size, strict=True)]
        lengths = [n * v for n, v in zip(level.reader.spatial_shape, level.voxel_size, strict=True)]
        assert begin == pytest.approx([-0.5] * 3)
        assert lengths == pytest.approx([6, 11, 14])
    sized = open_image(tmp_path / "a.zarr", voxel_size=(3, 1, 1))
    assert sized.calibrated
    assert sized.levels[1].voxel_size == pytest.approx((6, 11 / 6, 2))
    assert sized.levels[1].translation == pytest.approx((1.5, 5 / 12, 0.5))


@pytest.mark.parametrize(
    ("axes", "listed", "version"), [("tczyx", None, "0.2"), ("zyx", ["z", "y", "x"], "0.3")]
)
def test_version_that_is_not_stated_follows_from_the_axes(axes, listed, version, tmp_path):
    data = old(tmp_path / "a.zarr", None, axes, listed)
    image = open_image(tmp_path / "a.zarr")
    assert (image.version, image.axes) == (version, axes)
    np.testing.assert_array_equal(image.data.compute(), data)


def test_image_of_0_4_that_states_no_version_is_not_taken_for_an_older_one(tmp_path):
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2.0, 1.0]}]}]
    axes = [{"name": a, "type": "space", "unit": MICROMETRE} for a in "yx"]
    levels = {"0": values("yx")}
    make(tmp_path / "a.zarr", 2, {"multiscales": [{"axes": axes, "datasets": datasets}]}, levels)
    assert open_image(tmp_path / "a.zarr").version == "0.4"
    make(tmp_path / "b.zarr", 2, {"multiscales": [{"datasets": datasets}]}, levels)
    with pytest.raises(ValueError, match=r"b.zarr: `multiscales\[0\].axes` does not conform to OME-Zarr 0.4"):
        open_image(tmp_path / "b.zarr")


@pytest.mark.parametrize(
    ("version", "axes", "listed", "message"),
    [
        ("0.1", "zyx", None, r"a.zarr/s0 has 3 axes but its group names 5: 'tczyx'"),
        ("0.3", "zyx", ["z", "y", "q"], r"`multiscales\[0\].axes` \['z', 'y', 'q'\] are not time, channel"),
        ("0.3", "zyx", ["z", "y", "y"], r"`multiscales\[0\].axes` \['z', 'y', 'y'\] are not time, channel"),
        ("0.3", "zyx", ["c", "z", "t"], r"needed are y and x"),
        ("0.3", "zyx", "zyx", r"`multiscales\[0\].axes` 'zyx' does not conform to OME-Zarr 0.3: it must list"),
        ("0.3", "zyx", [{"name": "z"}], r"`multiscales\[0\].axes` .*'name': 'z'.* does not conform to OME-Zarr 0.3"),
        ("0.3", "zyx", ["zy", "x"], r"does not conform to OME-Zarr 0.3"),
        ("0.3", "zyx", ["y", "x"], r"has 3 axes but its group names 2"),
    ],
)  # fmt: skip
def test_axes_of_old_versions_that_do_not_conform_are_named(version, axes, listed, message, tmp_path):
    data = old(tmp_path / "a.zarr", version, axes, listed)
    with pytest.raises(ValueError, match=message):
        open_image(tmp_path / "a.zarr")
    image = open_image(tmp_path / "a.zarr", axes=axes)
    assert (image.axes, image.version) == (axes, version)
    np.testing.assert_array_equal(image.data.compute(), data)


@pytest.mark.parametrize("version", ["0.2", "0.3"])
def test_nested_chunks_that_the_array_does_not_mention_are_an_error_and_not_zeros(version, tmp_path):
    path = tmp_path / "a.zarr"
    old(path, version)
    for level in ("s0", "s1"):
        document = json.loads((path / level / ".zarray").read_text())
        del document["dimension_separator"]
        (path / level / ".zarray").write_text(json.dumps(document))
    assert not zarr.open_array(path / "s0", mode="r")[...].any()  # what a reader that trusts it makes of it
    with pytest.raises(
        ValueError, match=r"s0/.zarray names no `dimension_separator`, .* add \"dimension_sep"
    ):
        open_image(path)


def test_flat_chunks_need_no_separator(tmp_path):
    path = tmp_path / "a.zarr"
    data = old(path, "0.1", separator=".")
    document = json.loads((path / "s0/.zarray").read_text())
    del document["dimension_separator"]
    (path / "s0/.zarray").write_text(json.dumps(document))
    np.testing.assert_array_equal(open_image(path).data.compute(), data)


def test_labels_of_old_images_are_read(tmp_path):
    old(tmp_path / "a.zarr")
    zarr.create_group(tmp_path / "a.zarr/labels", zarr_format=2, attributes={"labels": ["cells"]})
    source = {"version": "0.3", "source": {"image": "../../"}}
    data = old(tmp_path / "a.zarr/labels/cells", **{"image-label": source})
    image = open_image(tmp_path / "a.zarr")
    assert image.labels == ("cells",)
    labels = image.label("cells")
    assert (labels.is_labels, labels.version) == (True, "0.3")
    np.testing.assert_array_equal(labels.data.compute(), data)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("made", ["0.1", "0.3"])
def test_copy_of_an_old_image_conforms_and_keeps_what_is_unknown(made, version, tmp_path):
    own = {"microscope": {"name": "x"}}
    data = old(tmp_path / "a.zarr", made, omero=OMERO, acquisition=own)
    image = open_image(tmp_path / "a.zarr", voxel_size=(2, 0.5, 0.5))
    copied = write_image(image.data, tmp_path / "b.zarr", like=image, version=version)
    assert (copied.version, copied.voxel_size, copied.channels) == (version, (2, 0.5, 0.5), ("a", "b", "c"))
    assert copied.others["acquisition"] == own
    assert copied.ome["omero"]["rdefs"] == OMERO["rdefs"]
    np.testing.assert_array_equal(copied.data.compute(), data)
    conforms(copied)


def test_nothing_is_written_into_an_image_of_a_version_that_is_only_read(tmp_path):
    old(tmp_path / "a.zarr")
    labels = np.zeros((2, 1, 6, 11, 14), "u4")
    with pytest.raises(
        ValueError, match=r"a.zarr is OME-Zarr 0.3, and labels are added to 0.4 and 0.5 only; write"
    ):
        write_labels(labels, tmp_path / "a.zarr", "cells")
    assert not (tmp_path / "a.zarr/labels").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("version", "separator"), [("0.1", "."), ("0.2", "/"), ("0.3", "/")])
def test_ome_zarr_py_sees_the_same_in_old_versions(version, separator, tmp_path):
    reader, io = (pytest.importorskip(f"ome_zarr.{name}") for name in ("reader", "io"))
    old(tmp_path / "a.zarr", version, separator=separator, omero=OMERO)
    node = next(iter(reader.Reader(io.parse_url(tmp_path / "a.zarr"))()))
    image = open_image(tmp_path / "a.zarr")
    for k, level in enumerate(node.data):
        np.testing.assert_array_equal(image.level(k).compute(), np.asarray(level))
    assert list(image.channels) == node.metadata["channel_names"]


# 0.6


def scale(*vector):
    return {"type": "scale", "scale": list(vector)}


def translation(*vector):
    return {"type": "translation", "translation": list(vector)}


def sequence(*steps):
    return {"type": "sequence", "transformations": list(steps)}


IDENTITY = {"type": "identity"}
ROTATION = {"type": "rotation", "rotation": [[0.0, -1.0], [1.0, 0.0]]}
AFFINE = {"type": "affine", "affine": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]}


def system(name, axes, unit=MICROMETRE):
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    return {
        "name": name,
        "axes": [a | ({"unit": unit} if a["type"] == "space" and unit else {}) for a in named],
    }


def link(step, source, target):
    return step | {"input": {"name": source}, "output": {"name": target}}


def modern(steps, axes="yx", *, version="0.6", systems=None, further=None, to="intrinsic", **extra):
    """Return the attributes of an image of 0.6 whose levels have the given transformations."""
    datasets = [
        {
            "path": f"s{k}",
            "coordinateTransformations": [s | {"input": {"path": f"s{k}"}, "output": {"name": to}}],
        }
        for k, s in enumerate(steps)
    ]
    multiscale = {
        "name": "new",
        "coordinateSystems": systems or [system(to, axes)],
        "datasets": datasets,
        **extra,
    }
    if further is not None:
        multiscale["coordinateTransformations"] = further
    return {"ome": {"version": version, "multiscales": [multiscale]}}


def build(path, attributes, axes="yx", n_levels=1):
    data = values(axes)
    levels = {"s0": data, "s1": halved(data, axes)}
    return make(path, 3, attributes, dict(list(levels.items())[:n_levels])), data


@pytest.mark.parametrize("version", ["0.6", "0.6rc0", "0.6.dev4", "0.9.dev1"])
def test_0_6_is_read_in_its_intrinsic_coordinate_system(version, tmp_path):
    steps = [
        scale(1.0, 1.0, 2.0, 0.5, 0.5),
        sequence(scale(1.0, 1.0, 4.0, 1.0, 1.0), translation(0, 0, 1.0, 0.25, 0.25)),
    ]
    attributes = modern(steps, "tczyx", version=version, type="gaussian") | {"acquisition": {"x": 1}}
    path, data = build(tmp_path / "a.zarr", attributes, "tczyx", 2)
    image = open_image(path)
    assert (image.version, image.axes, image.calibrated) == (version, "tczyx", True)
    assert image.voxel_size == (2, 0.5, 0.5)
    assert (image.levels[1].voxel_size, image.levels[1].translation) == ((4, 1, 1), (1, 0.25, 0.25))
    np.testing.assert_array_equal(image.data.compute(), data)
    np.testing.assert_array_equal(image.level(1).compute(), halved(data, "tczyx"))


@pytest.mark.parametrize(
    ("step", "size", "origin"),
    [
        (IDENTITY, (1, 1), (0, 0)),
        (scale(2, 3), (2, 3), (0, 0)),
        (sequence(scale(2, 3), translation(5, -7)), (2, 3), (5, -7)),
        (sequence(translation(5, -7), scale(2, 3)), (2, 3), (10, -21)),
        (sequence(IDENTITY, sequence(scale(2, 3)), scale(5, 7)), (10, 21), (0, 0)),
        (sequence(), (1, 1), (0, 0)),
    ],
)  # fmt: skip
def test_transformations_along_the_axes_become_scale_and_translation(step, size, origin, tmp_path):
    path, data = build(tmp_path / "a.zarr", modern([step]))
    image = open_image(path)
    assert (image.voxel_size, image.translation) == (size, origin)
    np.testing.assert_array_equal(image.data.compute(), data)


def test_permuted_axes_are_called_by_the_coordinate_system(tmp_path):
    permuted = sequence(scale(1, 2, 3), {"type": "mapAxis", "mapAxis": [2, 0, 1]}, translation(10, 20, 30))
    path, data = build(tmp_path / "a.zarr", modern([permuted], "zyx"), "yxz")
    image = open_image(path)
    assert (image.axes, image.voxel_size, image.translation) == ("zyx", (3, 1, 2), (10, 20, 30))
    np.testing.assert_array_equal(image.data.compute(), data.transpose(2, 0, 1))


def moved(step, point):
    """Apply a transformation to a point, as the specification words it."""
    match step["type"]:
        case "identity":
            return point
        case "scale":
            return [s * x for s, x in zip(step["scale"], point, strict=True)]
        case "translation":
            return [x + t for t, x in zip(step["translation"], point, strict=True)]
        case "mapAxis":
            return [point[i] for i in step["mapAxis"]]
        case "sequence":
            for part in step["transformations"]:
                point = moved(part, point)
            return point


VECTORS = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), min_size=3, max_size=3)
SIMPLE = st.one_of(
    st.just(IDENTITY),
    VECTORS.map(lambda v: scale(*v)),
    VECTORS.map(lambda v: translation(*v)),
    st.permutations(range(3)).map(lambda p: {"type": "mapAxis", "mapAxis": list(p)}),
)
STEPS = st.recursive(
    SIMPLE, lambda inner: st.lists(inner, max_size=4).map(lambda parts: sequence(*parts)), max_leaves=8
)


@settings(max_examples=100, deadline=None)
@given(step=STEPS, point=st.lists(st.integers(-5, 5), min_size=3, max_size=3))
def test_any_sequence_moves_points_as_its_parts_do(step, point):
    document = as_current(modern([step], "zyx")["ome"], "0.6", "a.zarr")
    (level,) = document["datasets"]
    vectors = {s["type"]: s[s["type"]] for s in level["coordinateTransformations"]}
    names = [axis["name"] for axis in document["axes"]]
    origin = vectors.get("translation", [0, 0, 0])
    found = dict(
        zip(names, (s * i + t for s, i, t in zip(vectors["scale"], point, origin, strict=True)), strict=True)
    )
    assert [found[a] for a in "zyx"] == pytest.approx(moved(step, point))


def test_what_leads_on_from_the_intrinsic_system_is_kept_and_not_applied(tmp_path):
    systems = [system("world", "yx"), system("intrinsic", "yx")]
    further = [link(ROTATION, "intrinsic", "world")]
    attributes = modern([scale(2, 3)], systems=systems, further=further, own="key")
    path, _ = build(tmp_path / "a.zarr", attributes)
    image = open_image(path)
    assert (image.voxel_size, image.translation) == ((2, 3), (0, 0))
    copied = write_image(image.data, tmp_path / "b.zarr", like=image)
    assert (copied.version, copied.voxel_size) == ("0.5", (2, 3))
    multiscale = copied.ome["multiscales"][0]
    assert multiscale["own"] == "key"
    assert multiscale["rfc5"] == {
        "system": "intrinsic",
        "coordinateSystems": systems,
        "coordinateTransformations": further,
    }
    assert "coordinateSystems" not in multiscale
    conforms(copied)
    sized = write_image(image.data, tmp_path / "c.zarr", like=open_image(path, voxel_size=(1, 1)))
    assert "rfc5" not in sized.ome["multiscales"][0]
    alone, _ = build(tmp_path / "d.zarr", modern([scale(2, 3)]))
    assert "rfc5" not in open_image(alone).ome["multiscales"][0]


def arrays(n=2):
    return {"name": "array", "axes": [{"name": f"dim_{i}", "type": "array"} for i in range(n)]}


def test_image_in_voxels_is_read_in_the_first_system_in_space(tmp_path):
    systems = [system("world", "yx"), arrays(), system("physical", "yx", "nanometer")]
    further = [link(AFFINE, "array", "world"), link(scale(236, 472), "array", "physical")]
    attributes = modern([IDENTITY, scale(2, 2)], systems=systems, further=further, to="array")
    path, data = build(tmp_path / "a.zarr", attributes, n_levels=2)
    image = open_image(path)
    assert (image.axes, image.calibrated) == ("yx", True)
    assert image.voxel_size == pytest.approx((0.236, 0.472))
    assert image.levels[1].voxel_size == pytest.approx((0.472, 0.944))
    np.testing.assert_array_equal(image.data.compute(), data)


def test_image_in_voxels_alone_needs_axes_with_names(tmp_path):
    path, data = build(tmp_path / "a.zarr", modern([IDENTITY], systems=[arrays()], to="array"))
    with pytest.raises(
        ValueError, match=r"axes 'dim_0' \('array'\), 'dim_1' \('array'\) are not .* Pass `axes`"
    ):
        open_image(path)
    np.testing.assert_array_equal(open_image(path, axes="yx").data.compute(), data)
    named = {"name": "array", "axes": [{"name": a, "type": "array"} for a in "yx"]}
    path, _ = build(tmp_path / "b.zarr", modern([IDENTITY], systems=[named], to="array"))
    image = open_image(path)
    assert (image.axes, image.calibrated) == ("yx", False)


def test_drafts_of_0_6_name_systems_by_text(tmp_path):
    attributes = modern([scale(2, 3)], version="0.6.dev3")
    step = attributes["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]
    step |= {"input": "s0", "output": "intrinsic"}
    path, _ = build(tmp_path / "a.zarr", attributes)
    assert open_image(path).voxel_size == (2, 3)


def multiscale_of(attributes):
    return attributes["ome"]["multiscales"][0]


def without(key):
    return lambda m: m.pop(key)


def level(**changes):
    return lambda m: m["datasets"][0]["coordinateTransformations"][0].update(changes)


BY_DIMENSION = {"type": "byDimension", "transformations": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (level(**ROTATION), r"level 's0' reaches its coordinate system by transformation 'rotation', .* not supported"),
        (level(**AFFINE), r"by transformation 'affine', .* or open the array of the level itself with `axes`"),
        (level(**BY_DIMENSION), r"by transformation 'byDimension'"),
        (level(type="displacements", path="field"), r"by transformation 'displacements'"),
        (level(type=["scale"]), r"by transformation \['scale'\]"),
        (level(**sequence(scale(1, 1), ROTATION)), r"by transformation 'rotation'"),
        (level(type="sequence", transformations={}), r"by transformation 'sequence'"),
        (level(type="sequence", transformations=[3]), r"by transformation 'sequence'"),
        (level(scale=[1, 1, 1]), r"scale of level 's0' has 3 numbers but there are 2 axes"),
        (level(scale=[1, 0]), r"scale \[1, 0\] of level 's0' must hold finite numbers, a scale above 0"),
        (level(scale=[1, -1]), r"a scale above 0"),
        (level(scale=[1, float("nan")]), r"must hold finite numbers"),
        (level(**sequence(scale(1e90, 1), scale(1e90, 1))), r"none beyond 1e\+100"),
        (level(type="mapAxis", mapAxis=[0, 0]), r"mapAxis \[0, 0\] of level 's0' must hold each of 0 to 1 once"),
        (level(type="mapAxis", mapAxis=None), r"mapAxis None of level 's0'"),
        (level(output={"name": "elsewhere"}), r"`multiscales\[0\].datasets` does not conform .* the `output` of all"),
        (level(output={"name": "intrinsic", "path": "x"}), r"the `output` of all levels must name"),
        (level(output=None), r"the `output` of all levels must name"),
        (without("coordinateSystems"), r"`multiscales\[0\].coordinateSystems` does not conform to OME-Zarr 0.6"),
        (lambda m: m.update(coordinateSystems=[]), r"coordinateSystems` does not conform"),
        (lambda m: m["coordinateSystems"][0].pop("name"), r"coordinateSystems\[0\].name` does not conform"),
        (lambda m: m["coordinateSystems"].append(m["coordinateSystems"][0]), r"'intrinsic' must be a name of its own"),
        (lambda m: m["coordinateSystems"][0].update(axes={}), r"coordinateSystems\[0\].axes` does not conform"),
        (lambda m: m["coordinateSystems"][0]["axes"][0].update(name=1), r"coordinateSystems\[0\].axes` does not"),
        (lambda m: m["coordinateSystems"][0]["axes"][0].update(type=[]), r"coordinateSystems\[0\].axes` does not"),
        (lambda m: m["coordinateSystems"][0]["axes"][0].update(name="x"), r"names must be unique"),
        (lambda m: m["coordinateSystems"][0]["axes"].pop(), r"has 2 numbers but there are 1 axes"),
        (lambda m: m["datasets"][0].pop("coordinateTransformations"), r"datasets\[0\].coordinateTransformations` "),
        (lambda m: m["datasets"][0]["coordinateTransformations"].append(IDENTITY), r"a list of exactly one object"),
        (lambda m: m.update(datasets=[]), r"`multiscales\[0\].datasets` \[\] must be a list of at least one object"),
        (lambda m: m.update(axes=[]) or m.pop("coordinateSystems"), r"coordinateSystems` does not conform"),
    ],
)  # fmt: skip
def test_what_does_not_conform_to_0_6_is_named(change, message, tmp_path):
    attributes = copy.deepcopy(modern([scale(2, 3)]))
    change(multiscale_of(attributes))
    path, data = build(tmp_path / "a.zarr", attributes)
    with pytest.raises(ValueError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    plain = open_image(path / "s0", axes="yx")  # as some of the messages say
    np.testing.assert_array_equal(plain.data.compute(), data)


def test_levels_that_permute_axes_differently_are_refused(tmp_path):
    steps = [IDENTITY, {"type": "mapAxis", "mapAxis": [1, 0]}]
    path, _ = build(tmp_path / "a.zarr", modern(steps), n_levels=2)
    with pytest.raises(ValueError, match="levels have their axes in different orders"):
        open_image(path)


def test_image_in_voxels_that_only_turns_into_space_is_refused(tmp_path):
    systems, further = [system("world", "yx"), arrays()], [link(ROTATION, "array", "world")]
    path, _ = build(tmp_path / "a.zarr", modern([IDENTITY], systems=systems, further=further, to="array"))
    with pytest.raises(
        ValueError, match="the multiscale reaches its coordinate system by transformation 'rotation'"
    ):
        open_image(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.ome.zarr", "a.ozx"])
@pytest.mark.parametrize("version", ["0.5", "0.6"])
def test_image_of_ngff_zarr_is_read_as_it_was_meant(version, name, tmp_path):
    ngff_zarr = pytest.importorskip("ngff_zarr")
    axes = {"dims": ["c", "z", "y", "x"], "axes_units": dict.fromkeys("zyx", MICROMETRE)}
    geometry = {
        "scale": {"c": 1.0, "z": 2.0, "y": 0.5, "x": 0.5},
        "translation": {"c": 0, "z": 5.0, "y": 1.0, "x": 2.0},
    }
    made = ngff_zarr.to_multiscales(
        ngff_zarr.to_ngff_image(values("czyx"), **axes, **geometry), [2], chunks=8
    )
    ngff_zarr.to_ngff_zarr(str(tmp_path / name), made, version=version)
    image = open_image(tmp_path / name)
    assert (image.version, image.axes, image.calibrated) == (version, "czyx", True)
    np.testing.assert_array_equal(image.data.compute(), values("czyx"))
    for level, known in zip(image.levels, made.images, strict=True):
        assert level.voxel_size == pytest.approx([known.scale[a] for a in "zyx"])
        assert level.translation == pytest.approx([known.translation[a] for a in "zyx"])
        np.testing.assert_array_equal(level.reader[...], np.asarray(known.data))


# Fuzzing: one value of a valid document is replaced by another.

ODD_NUMBERS = st.sampled_from([0, -1, 7, 10**400, 0.5, float("nan"), float("inf"), True, None])
ODD = ODD_NUMBERS | st.sampled_from(
    ["", "x", "scale", "array", "sequence", [], [[]], [{}], ["x"] * 3, {}, {"type": []}]
)
WORLD = [system("world", "zyx"), arrays(3), system("other", "zyx")]
DOCUMENTS = {
    "0.6": modern(
        [sequence(scale(2, 3, 4), {"type": "mapAxis", "mapAxis": [1, 0, 2]}), IDENTITY],
        systems=WORLD,
        further=[link(ROTATION, "array", "other"), link(sequence(translation(1, 2, 3)), "array", "world")],
        to="array",
    )["ome"],
    "0.3": {"multiscales": [{"axes": ["z", "y", "x"], "datasets": [{"path": "0"}, {"path": "1"}]}]},
}


def places(value, path=()):
    """List the keys that lead to every value inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("version", DOCUMENTS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_change_of_attributes_is_read_or_refused(version, data):
    document = copy.deepcopy(DOCUMENTS[version])
    for _ in range(data.draw(st.integers(1, 2))):
        *keys, last = data.draw(st.sampled_from([place for place in places(document) if place]))
        holder = document
        for key in keys:
            holder = holder[key]
        holder[last] = copy.deepcopy(data.draw(ODD))
    said = "a.zarr"
    try:
        if version == "0.6":
            multiscale = as_current(document, version, "a.zarr")
        else:
            multiscale = older.as_current(document, version, None, "a.zarr")
        letters = axis_letters(multiscale, "a.zarr")
        for k in range(len(multiscale["datasets"])):
            size, origin = geometry(multiscale, letters, k, "a.zarr")
            assert all(0 < v < math.inf for v in size)
            assert all(map(math.isfinite, origin))
    except ValueError as error:
        said = str(error)
    assert "a.zarr" in said
    assert len(said) < 1000


# Axes


def described(*axes):
    """Describe axes by name and type, with units in space."""
    return [
        {"name": name, "type": kind} | ({"unit": MICROMETRE} if kind == "space" else {})
        for name, kind in axes
    ]


def space(*names):
    return [(name, "space") for name in names]


AXES = [
    ("z-y-x", space("z", "y", "x"), "zyx"),
    ("upper case", [("T", "time"), *space("Z", "Y", "X")], "tzyx"),
    ("x first", space("x", "y", "z"), "xyz"),
    ("words", space("depth", "height", "width"), "zyx"),
    ("words, x first", space("Width", "Height", "Depth"), "xyz"),
    ("one word", space("x", "y", "depth"), "xyz"),
    ("one stranger", space("x", "y", "axial"), "xyz"),
    ("strangers", space("i", "j", "k"), "zyx"),
    ("two strangers", space("ap", "z", "lr"), "yzx"),
    ("plane", space("row", "column"), "yx"),
    ("plane, x first", space("x", "y"), "xy"),
    ("plane of z and x", space("z", "x"), "yx"),
    ("plane of z and y", space("z", "y"), "xy"),
    ("time of any name", [("frame", "time"), ("marker", "channel"), *space("y", "x")], "tcyx"),
    ("custom axis", [("lambda", "wavelength"), *space("y", "x")], "cyx"),
    ("axis without type", [("angle", None), *space("z", "y", "x")], "czyx"),
    ("time without type", [("t", None), *space("z", "y", "x")], "tzyx"),
    ("channels called t", [("t", "channel"), *space("y", "x")], "cyx"),
    ("confusing", [("x", "time"), ("y", "channel"), *space("c", "t")], "tcyx"),
]


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize(("axes", "letters"), [a[1:] for a in AXES], ids=[a[0] for a in AXES])
def test_axes_of_any_name_are_read_and_keep_it_in_a_copy(axes, letters, version, tmp_path):
    data = values(letters)
    vector = [float(2 + k) if kind == "space" else 1.0 for k, (_, kind) in enumerate(axes)]
    names = [name for name, _ in axes]
    if version == "0.6":
        own = {"name": "intrinsic", "axes": described(*axes)}
        make(
            tmp_path / "a.zarr",
            3,
            modern([scale(*vector)], systems=[own]),
            {"s0": data},
            dimension_names=names,
        )
    else:
        datasets = [{"path": "s0", "coordinateTransformations": [scale(*vector)]}]
        multiscale = {"axes": described(*axes), "datasets": datasets}
        if version == "0.4":
            make(tmp_path / "a.zarr", 2, {"multiscales": [multiscale | {"version": "0.4"}]}, {"s0": data})
        else:
            ome = {"version": "0.5", "multiscales": [multiscale]}
            make(tmp_path / "a.zarr", 3, {"ome": ome}, {"s0": data}, dimension_names=names)
    image = open_image(tmp_path / "a.zarr")
    order = [letters.index(a) for a in sorted(letters, key="tczyx".index)]
    assert image.axes == "".join(letters[i] for i in order)
    assert image.voxel_size == tuple(vector[i] for i in order if letters[i] in "zyx")
    np.testing.assert_array_equal(image.data.compute(), data.transpose(order))
    copied = write_image(
        image.data, tmp_path / "b.zarr", like=image, version="0.4" if version == "0.4" else "0.5"
    )
    assert [(a["name"], a["type"]) for a in copied.ome["multiscales"][0]["axes"]] == [axes[i] for i in order]
    assert (copied.axes, copied.voxel_size) == (image.axes, image.voxel_size)
    np.testing.assert_array_equal(copied.data.compute(), image.data.compute())
    conforms(copied)


@pytest.mark.parametrize(
    ("axes", "names", "message"),
    [
        (space("depth", "y", "x"), ["y", "depth", "x"],
         r"calls its axes \['y', 'depth', 'x'\] .* but its group \['depth'"),
        (space("z", "y", "x"), ["z", "x", "y"], r"calls its axes 'zxy' \(`dimension_names`\) but its group 'zyx'"),
        (space("z", "y", "x"), ["c", "y", "x"], r"calls its axes 'cyx' \(`dimension_names`\) but its group 'zyx'"),
        (space("z", "y", "x"), ["Z", "Y", "X"], None),
        (space("z", "y", "x"), ["dim_0", "dim_1", "dim_2"], None),
        (space("z", "y", "x"), [None, None, None], None),
        (space("depth", "y", "x"), ["plane", "row", "column"], None),
        (space("i", "j", "k"), ["z", "y", "x"], None),
    ],
)  # fmt: skip
def test_names_of_dimensions_that_contradict_the_axes_are_refused(axes, names, message, tmp_path):
    datasets = [{"path": "0", "coordinateTransformations": [scale(1.0, 1.0, 1.0)]}]
    ome = {"version": "0.5", "multiscales": [{"axes": described(*axes), "datasets": datasets}]}
    make(tmp_path / "a.zarr", 3, {"ome": ome}, {"0": values("zyx")}, dimension_names=names)
    if message is None:
        np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").data.compute(), values("zyx"))
    else:
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / "a.zarr")
        assert open_image(tmp_path / "a.zarr", axes="zyx").axes == "zyx"


# What others say of the documents here


def conforms(image):
    """Ask two independent models about what was written."""
    from ome_zarr_models import open_ome_zarr
    from yaozarrs import validate_zarr_store

    validate_zarr_store(image.path)
    open_ome_zarr(zarr.open_group(image.path, mode="r"))
    for entry in image.ome["multiscales"][0]["datasets"]:
        document = read_json(f"{image.path}/{entry['path']}", "zarr.json")
        if document is not None:
            assert document["dimension_names"] == [a["name"] for a in image.ome["multiscales"][0]["axes"]]


def official(version):
    """Return the official schema of images, as it comes inside ngff-zarr, without loading that."""
    found = importlib.util.find_spec("ngff_zarr")
    if found is None or found.origin is None:
        pytest.skip("ngff-zarr is not installed")
    jsonschema, referencing = (pytest.importorskip(name) for name in ("jsonschema", "referencing"))
    draft = pytest.importorskip("referencing.jsonschema").DRAFT202012
    folder = Path(found.origin).parent / "spec" / version / "schemas"
    documents = [json.loads(file.read_text()) for file in folder.glob("*.schema")]
    registry = referencing.Registry().with_resources((d["$id"], draft.create_resource(d)) for d in documents)
    image = json.loads((folder / "image.schema").read_text())
    return jsonschema.Draft202012Validator(image, registry=registry)


@pytest.mark.parametrize("version", ["0.1", "0.2", "0.3"])
def test_old_stores_of_these_tests_conform_to_the_official_schema(version, tmp_path):
    old(tmp_path / "a.zarr", version, omero=OMERO)
    official(version).validate(json.loads((tmp_path / "a.zarr/.zattrs").read_text()))


@pytest.mark.parametrize(
    "attributes",
    [
        modern([scale(2, 3), sequence(scale(2, 3), translation(5, -7))]),
        modern([IDENTITY], systems=[system("w", "yx"), arrays()], further=[link(scale(1, 2), "array", "w")],
               to="array"),
        modern([scale(1, 1)], systems=[system("w", "yx"), system("i", "yx")], further=[link(ROTATION, "i", "w")],
               to="i"),
    ],
    ids=["levels", "voxels", "rotated"],
)  # fmt: skip
def test_new_stores_of_these_tests_conform_to_the_official_schema(attributes):
    official("0.6").validate(attributes)

"""What we write, others read, and the other way round: five readers, two writers, the official schemas.

Readers are in `readers`. What one of them does not tell is listed in `BLIND`, with the reason.
"""

import json
import posixpath
import warnings

import dask
import jsonschema
import numpy as np
import pytest
import zarr
from conforming import assert_valid
from readers import READERS, View
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.ome_zarr import open_image, write_image, write_labels
from chunkrestore.psf import gaussian

LENGTHS = {"t": 2, "c": 3, "z": 9, "y": 20, "x": 22}
SCALE = {"t": 2.5, "c": 1.0, "z": 2.0, "y": 0.5, "x": 0.25}
UNITS = {"t": "second", "c": None, "z": "micrometer", "y": "micrometer", "x": "micrometer"}
CHANNELS = [
    ("DAPI", "0000FF", (90.0, 1200.0)),
    ("GFP", "00FF00", (0.5, 300.0)),
    ("RFP", "FF0000", (1.0, 2.0)),
]

STORAGE = {
    "0.4": {"version": "0.4"},
    "0.5": {"version": "0.5"},
    "0.5 sharded": {"version": "0.5", "chunks": 10, "shards": 20},
}

BLIND = {
    "translations": {
        "napari-ome-zarr": "napari-ome-zarr 0.10 applies the first transformation of level 0 only"
    },
    "coarser scales": {"napari-ome-zarr": "napari derives them from the shapes"},
    "whole": {
        "ome-zarr": "ome-zarr-py 0.18 leaves out transformations of the whole multiscale",
        "ngff-zarr": "ngff-zarr 0.50 ends in an AttributeError of its own checks",
        "napari-ome-zarr": "napari-ome-zarr 0.10 applies the first one only",
    },
    "labels": {"ngff-zarr": "ngff-zarr 0.50 knows no labels"},
    "properties": {"yaozarrs": "yaozarrs 0.3 keeps no properties of labels"},
}


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def values(axes, dtype="uint16", seed=0):
    shape = tuple(LENGTHS[a] for a in axes)
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def labels_of(axes, dtype="uint16"):
    shape = tuple(LENGTHS[a] for a in axes)
    return (np.arange(np.prod(shape)).reshape(shape) // 7 % 6).astype(dtype)


def spatial(axes):
    return "".join(a for a in axes if a in "zyx")


def stored(name, axes):
    n = len(spatial(axes))
    return {k: (v,) * n if isinstance(v, int) else v for k, v in STORAGE[name].items()}


def geometry(axes):
    """Voxel size and time step of `SCALE`."""
    step = {"time_step": SCALE["t"]} if "t" in axes else {}
    return {"axes": axes, "voxel_size": tuple(SCALE[a] for a in spatial(axes)), **step}


def write(path, axes="zyx", dtype="uint16", name="0.5", **options):
    """Write an image with named, coloured channels and three levels."""
    names = [n for n, _, _ in CHANNELS] if "c" in axes else None
    return write_image(
        values(axes, dtype),
        path,
        channels=names,
        **({"levels": 3} | geometry(axes) | stored(name, axes) | options),
    )


def read_by(name, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how others treat their dependencies is not our affair
        return READERS[name](path)


def our_view(path):
    """What we say of the same image."""
    image = open_image(path)
    multiscale = image.ome["multiscales"][0]
    axes = [a["name"] for a in multiscale["axes"]]
    units = {a["name"]: a.get("unit") for a in multiscale["axes"]}
    # Time and channels are not in `Level`, as nothing is computed with them.
    lead = {a: SCALE[a] for a in axes if a in "tc"}
    spatial_axes = image.spatial_axes
    omero = image.ome.get("omero", {})
    about = image.ome.get("image-label", {})
    return View(
        axes=image.axes,
        units=units,
        scales=[lead | dict(zip(spatial_axes, level.voxel_size, strict=True)) for level in image.levels],
        translations=[
            dict.fromkeys(lead, 0.0) | dict(zip(spatial_axes, level.translation, strict=True))
            for level in image.levels
        ],
        levels=[image.level(k).compute() for k in range(len(image.levels))],
        channels=[
            (name, c["color"], (c["window"]["start"], c["window"]["end"]))
            for name, c in zip(image.channels, omero.get("channels", []), strict=False)
        ]
        or None,
        labels=list(image.labels),
        colors={c["label-value"]: tuple(c["rgba"]) for c in about.get("colors", [])},
        properties={
            p["label-value"]: {k: v for k, v in p.items() if k != "label-value"}
            for p in about.get("properties", [])
        },
    )


def assert_agree(path, *, whole=False, without=()):
    """All readers see what we see; with `whole`, of a store with transformations of the whole multiscale."""
    expected = our_view(path)
    for name in READERS.keys() - set(without):
        seen = read_by(name, path)
        assert seen.axes == expected.axes, name
        assert seen.units == {a: expected.units[a] for a in seen.units}, name
        if not (whole and name in BLIND["whole"]):
            assert_vectors(seen.scales, expected.scales, name, "coarser scales")
            assert_vectors(seen.translations, expected.translations, name, "translations")
        assert seen.channels == expected.channels, name
        for key in ("labels", "colors", "properties"):
            if getattr(seen, key) is None:
                assert name in BLIND["labels"] or name in BLIND[key], (name, key)
            else:
                assert getattr(seen, key) == getattr(expected, key), (name, key)
        for level, (theirs, ours) in enumerate(zip(seen.voxels(), expected.levels, strict=True)):
            assert theirs.dtype == ours.dtype, (name, level)
            np.testing.assert_array_equal(theirs, ours, err_msg=f"{name}, level {level}")
    return expected


def assert_vectors(seen, expected, name, what):
    if seen is None or len(seen) < len(expected):
        assert name in BLIND[what]
    for theirs, ours in zip(seen or (), expected, strict=False):
        assert theirs == pytest.approx({a: ours[a] for a in theirs}), name


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("axes", ["yx", "zyx", "tyx", "czyx", "tczyx"])
def test_all_readers_see_the_same_image(tmp_path, axes, name):
    path = tmp_path / "a.ome.zarr"
    write(path, axes, name=name)
    view = assert_agree(path)
    assert_valid(path)
    assert view.axes == axes
    assert view.units == {a: UNITS[a] for a in axes}
    assert view.scales[0] == {a: SCALE[a] for a in axes}
    assert [c[:2] for c in view.channels] == (
        [("DAPI", "00FF00"), ("GFP", "FF00FF"), ("RFP", "00FFFF")] if "c" in axes else [("0", "FFFFFF")]
    )
    np.testing.assert_array_equal(view.levels[0], values(axes))
    assert len(view.levels) == 3


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_all_readers_see_every_dtype(tmp_path, dtype):
    for name in ("0.4", "0.5 sharded"):
        path = tmp_path / f"{name}.ome.zarr"
        write(path, "zyx", dtype, name)
        assert_agree(path)
        assert_valid(path)


@pytest.mark.parametrize("compression", ["zstd:9", "lz4", "gzip:6", "none"])
def test_all_readers_decode_every_codec(tmp_path, compression):
    for name, checksums in {"0.4": False, "0.5": True, "0.5 sharded": True}.items():
        path = tmp_path / f"{name}.ome.zarr"
        write(path, name=name, compression=compression, checksums=checksums, levels=1)
        np.testing.assert_array_equal(assert_agree(path).levels[0], values("zyx"))


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize(
    ("axes", "label_axes", "dtype"),
    [("czyx", "zyx", "uint16"), ("tcyx", "tyx", "int32")],
)
def test_all_readers_see_the_same_labels(tmp_path, axes, label_axes, dtype, name):
    path = tmp_path / "a.ome.zarr"
    write(path, axes, name=name)
    labels = labels_of(label_axes, dtype)
    properties = {1: {"class": "nucleus", "volume": 12.5}, 2: {"class": "debris"}}
    options = {k: v for k, v in stored(name, axes).items() if k != "version"}
    write_labels(labels, path, "nuclei", colors="auto", properties=properties, **options)
    write_labels(labels, path, "other", **options)
    assert sorted(assert_agree(path).labels) == ["nuclei", "other"]
    assert_valid(path)
    view = assert_agree(path / "labels" / "nuclei")
    assert view.properties == properties | {3: {}, 4: {}, 5: {}}
    assert sorted(view.colors) == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(view.levels[0], labels)
    assert assert_agree(path / "labels" / "other").colors == {}


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "int64", "uint64"])
def test_all_readers_see_labels_of_every_dtype(tmp_path, dtype):
    for name in ("0.4", "0.5 sharded"):
        path = tmp_path / f"{name}.ome.zarr"
        write(path, name=name)
        write_labels(labels_of("zyx", dtype), path, colors="auto")
        assert_agree(path / "labels" / "labels")
        assert_valid(path)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_all_readers_see_what_a_job_wrote(tmp_path, version):
    """Deconvolution and labels of two channels, written by tasks, sharded where that is possible."""
    noise = np.random.default_rng(5).normal(size=(2, 20, 36, 28))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5))
    data = np.clip(20 + 80 * (smooth > smooth.std()) + noise, 0, 255).astype("uint16")
    image = write_image(
        data, tmp_path / "in.ome.zarr", axes="czyx", voxel_size=(2.0, 0.5, 0.25), channels=["DAPI", "GFP"]
    )
    operators = [cr.RichardsonLucy(gaussian((1.2, 1.0, 0.8), truncate=2), iterations=2), cr.Threshold()]
    shape = {"shards": (10, 12, 28)} if version == "0.5" else {"block_shape": (10, 12, 28)}
    out = tmp_path / "out.ome.zarr"
    cr.run(operators, image, out, version=version, cluster="serial", quiet=True, **shape)
    view = assert_agree(out)
    assert [name for name, *_ in view.channels] == ["DAPI", "GFP"]
    assert view.scales[0] == {"c": 1.0, "z": 2.0, "y": 0.5, "x": 0.25}
    (name,) = view.labels
    labels = assert_agree(out / "labels" / name)
    assert labels.levels[0].max() > 1
    assert_valid(out)


def foreign(path, version="0.5"):
    """Write an image with ome-zarr-py, and give it what few write; return its voxels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own functions
        from ome_zarr.format import FormatV04, FormatV05
        from ome_zarr.scale import Methods
        from ome_zarr.writer import write_image as write_theirs
        from ome_zarr.writer import write_labels as write_their_labels

    data = values("czyx", seed=3)
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    common = {
        "fmt": FormatV04() if version == "0.4" else FormatV05(),
        "scale_factors": [{"z": 1, "y": 2, "x": 2}, {"z": 2, "y": 4, "x": 4}],
        "axes_units": dict.fromkeys("zyx", "micrometer"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_theirs(
            data, group, axes="czyx", scale=pick("czyx"), name="embryo", method=Methods.LOCAL_MEAN, **common
        )
        write_their_labels(
            labels_of("zyx", "int32"),
            group,
            name="cells",
            axes="zyx",
            scale=pick("zyx"),
            label_metadata={
                "colors": [{"label-value": 1, "rgba": [1, 2, 3, 255]}],
                "properties": [{"label-value": 1, "class": "a"}],
            },
            **common,
        )
    omero = {
        "channels": [
            {"label": n, "color": c, "active": True, "window": {"min": 0, "max": 65535, "start": a, "end": b}}
            for n, c, (a, b) in CHANNELS
        ],
        "rdefs": {"model": "color", "defaultZ": 3},
    }
    if version == "0.4":
        group.attrs["omero"] = omero
    else:
        group.attrs["ome"] = {**group.attrs["ome"], "omero": omero}
    group.attrs["lab"] = {"objective": "25x/1.1"}
    group["s0"].attrs["camera"] = {"gain": 2}
    return data


def pick(axes):
    return {a: SCALE[a] for a in axes}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_we_read_what_ome_zarr_py_wrote(tmp_path, version):
    data = foreign(tmp_path / "a.zarr", version)
    # The validators refuse its list of labels in 0.5, which has no version; other readers do not mind, nor do we.
    validators = ["ome-zarr-models", "yaozarrs"] if version == "0.5" else []
    view = assert_agree(tmp_path / "a.zarr", without=validators)
    assert view.channels == CHANNELS
    assert view.scales[0] == pick("czyx")
    assert view.labels == ["cells"]
    np.testing.assert_array_equal(view.levels[0], data)
    labels = assert_agree(tmp_path / "a.zarr" / "labels" / "cells")
    assert (labels.colors, labels.properties) == ({1: (1, 2, 3, 255)}, {1: {"class": "a"}})
    np.testing.assert_array_equal(labels.levels[0], labels_of("zyx"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_we_read_what_ngff_zarr_wrote(tmp_path, version):
    import ngff_zarr

    data, path = values("tczyx", "float32"), tmp_path / "a.zarr"
    image = ngff_zarr.to_ngff_image(
        data,
        dims=tuple("tczyx"),
        scale=dict(SCALE),
        translation={"t": 0.0, "c": 0.0, "z": 10.0, "y": 0.0, "x": -3.0},
        name="embryo",
        axes_units=dict(UNITS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ngff_zarr.to_ngff_zarr(str(path), ngff_zarr.to_multiscales(image, scale_factors=[]), version=version)
    view = assert_agree(path)
    assert (view.units, view.scales) == (UNITS, [SCALE])
    assert view.translations == [{"t": 0.0, "c": 0.0, "z": 10.0, "y": 0.0, "x": -3.0}]
    np.testing.assert_array_equal(view.levels[0], data)


@pytest.mark.parametrize("old", ["0.4", "0.5"])
@pytest.mark.parametrize("new", ["0.4", "0.5"])
def test_what_is_made_like_a_foreign_image_is_read_like_it(tmp_path, old, new):
    foreign(tmp_path / "a.zarr", old)
    path = tmp_path / "b.ome.zarr"
    write_image(values("czyx"), path, like=tmp_path / "a.zarr", version=new, levels=3)
    cells = open_image(tmp_path / "a.zarr").label("cells")
    write_labels(cells.data, path, "cells", like=cells)
    view, before = assert_agree(path), our_view(tmp_path / "a.zarr")
    assert (view.axes, view.units, view.channels) == (before.axes, before.units, before.channels)
    assert (view.scales[0], view.translations[0]) == (before.scales[0], before.translations[0])
    labels = our_view(tmp_path / "a.zarr" / "labels" / "cells")
    copied = assert_agree(path / "labels" / "cells")
    assert (copied.colors, copied.properties) == (labels.colors, labels.properties)
    np.testing.assert_array_equal(copied.levels[0], labels.levels[0])
    assert_valid(path)
    image = open_image(path)
    assert image.others["lab"] == {"objective": "25x/1.1"}
    assert image.ome["omero"]["rdefs"] == {"model": "color", "defaultZ": 3}
    assert dict(zarr.open_array(path / "0", mode="r").attrs).items() >= {"camera": {"gain": 2}}.items()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_readers_that_know_transformations_of_the_whole_agree(tmp_path, version):
    foreign(tmp_path / "a.zarr", version)
    group = zarr.open_group(tmp_path / "a.zarr")
    ome = group.attrs.asdict().get("ome", group.attrs.asdict())
    ome["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0, 2.0, 1.0, 1.0]},
        {"type": "translation", "translation": [0.0, 5.0, 0.0, -1.0]},
    ]
    group.attrs.update({"ome": ome} if version == "0.5" else ome)
    path = tmp_path / "b.ome.zarr"
    write_image(values("czyx"), path, like=tmp_path / "a.zarr", version=version, levels=2)
    view = assert_agree(path, whole=True, without=["ngff-zarr"])
    assert view.scales[0] == {"c": 1.0, "z": 4.0, "y": 0.5, "x": 0.25}
    assert view.translations[0] == {"c": 0.0, "z": 5.0, "y": 0.0, "x": -1.0}
    assert (
        open_image(path).ome["multiscales"][0]["coordinateTransformations"]
        == (ome["multiscales"][0]["coordinateTransformations"])
    )


MUTATIONS = {
    "level dtypes differ": lambda p, m: zarr.create_array(
        p / "1", shape=(9, 10, 11), dtype="u1", overwrite=True
    ),
    "levels grow": lambda p, m: m["datasets"].reverse(),
    "scale does not fit": lambda p, m: m["datasets"][1]["coordinateTransformations"][0].update(
        scale=[9.0] * 3
    ),
    "place does not fit": lambda p, m: m["datasets"][1]["coordinateTransformations"].pop(),
    "axis has no name": lambda p, m: m["axes"][0].pop("name"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_our_checks_find_what_validators_miss(tmp_path, mutation):
    path = tmp_path / "a.ome.zarr"
    write(path)
    assert_valid(path)
    document = json.loads((path / "zarr.json").read_text())
    MUTATIONS[mutation](path, document["attributes"]["ome"]["multiscales"][0])
    (path / "zarr.json").write_text(json.dumps(document))
    # The schema finds the nameless axis; the rest is left to us.
    expected = jsonschema.ValidationError if mutation == "axis has no name" else AssertionError
    with pytest.raises(expected):
        assert_valid(path)


def test_labels_elsewhere_name_the_image_that_they_were_found_in(tmp_path):
    image = write(tmp_path / "data" / "a.ome.zarr")
    labels = write_labels(labels_of("zyx"), tmp_path / "results" / "b.ome.zarr", "cells", like=image)
    source = labels.ome["image-label"]["source"]["image"]
    assert source == "../../../../data/a.ome.zarr"
    assert posixpath.normpath(posixpath.join(labels.path, source)) == image.path
    assert_valid(tmp_path / "results" / "b.ome.zarr" / "labels" / "cells")
    copied = write_labels(labels.data, tmp_path / "c.ome.zarr", "cells", like=labels)
    assert copied.ome["image-label"]["source"]["image"] == "../../../data/a.ome.zarr"
    beside = write_labels(labels.data, image.path, "cells", like=labels)
    assert beside.ome["image-label"]["source"]["image"] == "../../"

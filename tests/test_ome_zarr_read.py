"""Opening stores that other tools wrote: made here with zarr and JSON alone, never with our writer."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import zarr

from chunkrestore.ome_zarr import CorruptChunkError, check_dtype, facts, info, open_image, select_channel

SHAPE = (2, 3, 10, 12, 14)
SCALE = [2.0, 1.0, 1.5, 0.5, 0.25]


def axis(name, unit=None):
    kind = {"t": "time", "c": "channel"}.get(name, "space")
    return {"name": name, "type": kind} | ({"unit": unit} if unit else {})


def multiscale(axes="tczyx", scale=SCALE, n_levels=2, unit="micrometer"):
    datasets = []
    for level in range(n_levels):
        f = [1 if a in "tc" else 2**level for a in axes]
        steps = [{"type": "scale", "scale": [s * g for s, g in zip(scale, f, strict=True)]}]
        if level:
            steps.append(
                {
                    "type": "translation",
                    "translation": [s * (g - 1) / 2 for s, g in zip(scale, f, strict=True)],
                }
            )
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    return {
        "name": "hand-made",
        "axes": [axis(a, unit if a in "zyx" else None) for a in axes],
        "datasets": datasets,
    }


def values(shape=SHAPE, dtype="uint16"):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def make(path, version="0.5", data=None, axes="tczyx", ome=None, others=None, **array):
    """Write a two-level store and return level 0."""
    data = values() if data is None else data
    ome = {"multiscales": [multiscale(axes)]} if ome is None else ome
    fmt = 2 if version == "0.4" else 3
    attributes = (
        {**ome, **(others or {})} if fmt == 2 else {"ome": {"version": version, **ome}, **(others or {})}
    )
    if fmt == 2:
        for m in ome.get("multiscales", []):
            m.setdefault("version", version)
        array.setdefault("chunk_key_encoding", {"name": "v2", "separator": "/"})
    zarr.create_group(path, zarr_format=fmt, attributes=attributes)
    step = tuple(slice(None, None, 1 if a in "tc" else 2) for a in axes)
    for level, part in enumerate((data, data[step])):
        options = {"chunks": tuple(1 if a in "tc" else 4 for a in axes)} | array
        written = zarr.create_array(
            path / str(level), shape=part.shape, dtype=part.dtype, zarr_format=fmt, fill_value=0, **options
        )
        written[...] = part
    return data


def edit(path, change):
    """Change the OME attributes of a 0.5 group in place."""
    file = path / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"]["ome"])
    file.write_text(json.dumps(document))


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "image.zarr"
    make(path)
    return path


@pytest.mark.parametrize(
    ("version", "array"),
    [("0.4", {}), ("0.5", {}), ("0.5", {"chunks": (1, 1, 4, 4, 4), "shards": (1, 1, 8, 8, 8)})],
    ids=["0.4", "0.5", "0.5 sharded"],
)
def test_open_reads_both_versions(tmp_path, version, array):
    data = make(tmp_path / "image.zarr", version, **array)
    image = open_image(tmp_path / "image.zarr")
    assert (image.version, image.axes, image.shape, image.dtype) == (
        version,
        "tczyx",
        SHAPE,
        np.dtype("uint16"),
    )
    assert image.voxel_size == (1.5, 0.5, 0.25)
    assert image.levels[1].voxel_size == (3.0, 1.0, 0.5)
    assert image.levels[1].translation == (0.75, 0.25, 0.125)
    assert (image.n_t, image.n_c, image.spatial_axes, image.spatial_shape) == (2, 3, "zyx", (10, 12, 14))
    assert image.channels == ("0", "1", "2")
    assert image.calibrated
    assert not image.is_labels
    np.testing.assert_array_equal(image.data.compute(), data)
    np.testing.assert_array_equal(image.level(1).compute(), data[:, :, ::2, ::2, ::2])


@pytest.mark.parametrize("axes", ["yx", "zyx", "czyx", "tyx", "cyx", "tczyx"])
def test_open_reads_any_axes(tmp_path, axes):
    data = values(tuple(dict(zip("tczyx", SHAPE, strict=True))[a] for a in axes))
    scale = [dict(zip("tczyx", SCALE, strict=True))[a] for a in axes]
    make(tmp_path / "a.zarr", data=data, axes=axes, ome={"multiscales": [multiscale(axes, scale)]})
    image = open_image(tmp_path / "a.zarr")
    assert image.axes == axes
    assert image.voxel_size == tuple(dict(zip("tczyx", SCALE, strict=True))[a] for a in axes if a in "zyx")
    np.testing.assert_array_equal(image.data.compute(), data)
    region = tuple(slice(2, 7) for _ in image.spatial_axes)
    t, c = image.n_t - 1, image.n_c - 1
    lead = tuple(i for a, i in (("t", t), ("c", c)) if a in axes)
    np.testing.assert_array_equal(image.source().read(t, c, region), data[lead + region])


def test_spatial_axes_in_another_order_are_presented_as_zyx(tmp_path):
    data = values((3, 14, 12, 10))
    make(
        tmp_path / "a.zarr",
        data=data,
        axes="cxyz",
        ome={"multiscales": [multiscale("cxyz", [1, 0.25, 0.5, 1.5])]},
    )
    image = open_image(tmp_path / "a.zarr")
    assert (image.axes, image.shape, image.voxel_size) == ("czyx", (3, 10, 12, 14), (1.5, 0.5, 0.25))
    np.testing.assert_array_equal(image.data.compute(), data.transpose(0, 3, 2, 1))
    region = (slice(1, 5), slice(0, 12), slice(3, 4))
    np.testing.assert_array_equal(image.source().read(0, 2, region), data[2, 3:4, :, 1:5].transpose(2, 1, 0))
    part = image.select(region=(slice(2, 4), slice(0, 12), slice(1, 3)))
    assert part.translation == (3.0, 0.0, 0.25)
    np.testing.assert_array_equal(part.data.compute(), data[:, 1:3, :, 2:4].transpose(0, 3, 2, 1))


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("nanometer", 1e-3), ("millimeter", 1e3), ("angstrom", 1e-4), ("micrometer", 1), (None, 1)],
)
def test_units_become_micrometres(tmp_path, unit, factor):
    make(tmp_path / "a.zarr", ome={"multiscales": [multiscale(unit=unit)]})
    image = open_image(tmp_path / "a.zarr")
    assert image.voxel_size == pytest.approx([s * factor for s in SCALE[2:]])
    assert image.calibrated == (unit is not None)


def test_transformations_of_the_multiscale_apply_after_those_of_the_level(tmp_path):
    m = multiscale()
    m["coordinateTransformations"] = [
        {"type": "scale", "scale": [1, 1, 2.0, 2.0, 2.0]},
        {"type": "translation", "translation": [0, 0, 10.0, 0, 0]},
    ]
    make(tmp_path / "a.zarr", ome={"multiscales": [m]})
    image = open_image(tmp_path / "a.zarr")
    assert image.voxel_size == (3.0, 1.0, 0.5)
    assert image.levels[1].translation == (11.5, 0.5, 0.25)


def test_voxel_size_given_by_hand_replaces_that_of_the_metadata(store):
    image = open_image(store, voxel_size=(3, 1, 1))
    assert image.voxel_size == (3, 1, 1)
    assert image.levels[1].voxel_size == (6, 2, 2)
    assert image.levels[1].translation == (1.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"`voxel_size` \(1.0, 0.0, 1.0\) must hold one length above 0"):
        open_image(store, voxel_size=(1, 0, 1))


def test_channel_names_come_from_omero_where_there_are_any(tmp_path):
    omero = {"channels": [{"label": "DAPI", "color": "0000FF"}, {"color": "FF0000"}]}
    make(tmp_path / "a.zarr", ome={"multiscales": [multiscale()], "omero": omero})
    assert open_image(tmp_path / "a.zarr").channels == ("DAPI", "1", "2")


def test_big_endian_stores_give_native_numbers(tmp_path):
    data = make(tmp_path / "a.zarr", "0.4", data=values(dtype=">u2"))
    image = open_image(tmp_path / "a.zarr")
    assert image.dtype == np.dtype("=u2")
    assert image.data.compute().dtype.isnative
    assert image.source().read(0, 0, (slice(0, 2),) * 3).dtype.isnative
    np.testing.assert_array_equal(image.data.compute(), data)


def test_plain_zarr_array_opens_with_axes_given_by_hand(tmp_path):
    data = values((5, 6, 7))
    zarr.create_array(tmp_path / "a.zarr", shape=data.shape, dtype=data.dtype, chunks=(4, 4, 4))[...] = data
    image = open_image(tmp_path / "a.zarr", axes="zyx", voxel_size=(2, 1, 1))
    assert (image.axes, image.voxel_size, len(image.levels)) == ("zyx", (2, 1, 1), 1)
    np.testing.assert_array_equal(image.data.compute(), data)


def test_opening_reads_no_voxels(store):
    for chunk in [p for p in store.glob("*/c/**/*") if p.is_file()]:
        chunk.write_bytes(b"garbage")
    image = open_image(store)
    assert image.data.shape == SHAPE
    assert facts(image)["dtype"] == "uint16"
    with pytest.raises(CorruptChunkError):
        image.data.compute()


def test_handles_are_small_and_survive_pickling(store):
    image = open_image(store)
    stored = pickle.dumps(image.source(1))
    assert len(stored) < 1500
    reader = pickle.loads(stored)
    assert reader == image.source(1)
    assert reader.shape == (2, 3, 5, 6, 7)
    np.testing.assert_array_equal(
        reader.read(1, 2, (slice(0, 5), slice(0, 6), slice(0, 7))), values()[1, 2, ::2, ::2, ::2]
    )
    assert pickle.loads(pickle.dumps(image)).shape == SHAPE
    assert len(pickle.dumps(image.data)) < 20_000


def test_identity_changes_with_the_array_and_the_selection_only(store):
    image = open_image(store)
    first = image.source().identity()
    assert json.loads(json.dumps(first)) == first
    edit(store, lambda ome: ome["multiscales"][0].update(name="renamed"))
    assert open_image(store).source().identity() == first
    assert image.select(t=1).source().identity() != first
    shutil.rmtree(store)
    make(store, chunks=(1, 1, 5, 5, 5))
    assert open_image(store).source().identity()["metadata_sha256"] != first["metadata_sha256"]


def test_stale_handle_refuses_an_array_that_was_replaced(store):
    reader = open_image(store).select(t=0).source()
    reader = pickle.loads(pickle.dumps(reader))
    shutil.rmtree(store)
    make(store, data=values((2, 3, 11, 12, 14)))
    from chunkrestore.ome_zarr.arrays import _open

    _open.cache_clear()  # what a new worker process starts with
    with pytest.raises(ValueError, match="has changed since it was opened; open the store again"):
        reader.read(0, 0, (slice(0, 2),) * 3)


def test_select_cuts_data_and_metadata(tmp_path):
    omero = {
        "channels": [{"label": n, "color": c} for n, c in (("a", "FF0000"), ("b", "00FF00"), ("c", "0000FF"))]
    }
    data = make(tmp_path / "a.zarr", ome={"multiscales": [multiscale()], "omero": omero})
    image = open_image(tmp_path / "a.zarr")
    part = image.select(t=1, c=["c", 0], region=(slice(2, 8), slice(0, 12), slice(4, 14)))
    assert part.shape == (1, 2, 6, 12, 10)
    assert part.channels == ("c", "a")
    assert part.translation == (3.0, 0.0, 1.0)
    assert part.ome["omero"]["channels"] == [omero["channels"][2], omero["channels"][0]]
    expected = data[1:2][:, [2, 0], 2:8, :, 4:14]
    np.testing.assert_array_equal(part.data.compute(), expected)
    np.testing.assert_array_equal(
        part.source().read(0, 1, (slice(0, 6), slice(1, 3), slice(9, 10))), expected[0, 1, :, 1:3, 9:10]
    )
    again = part.select(c="a", region=(slice(1, 3), slice(0, 1), slice(0, 10)))
    np.testing.assert_array_equal(again.data.compute(), expected[:, 1:, 1:3, :1])
    assert again.translation == (4.5, 0.0, 1.0)


def test_select_level_keeps_the_levels_above(store):
    part = open_image(store).select(level=1)
    assert part.voxel_size == (3.0, 1.0, 0.5)
    assert part.translation == (0.75, 0.25, 0.125)
    assert [d["path"] for d in part.ome["multiscales"][0]["datasets"]] == ["1"]
    np.testing.assert_array_equal(part.data.compute(), values()[:, :, ::2, ::2, ::2])


def test_dask_slicing_fuses_into_the_reader(store):
    data = open_image(store).data
    np.testing.assert_array_equal(data[1, ::2, 3, ..., ::-3].compute(), values()[1, ::2, 3, ..., ::-3])


def test_missing_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.zarr does not exist; check the path"):
        open_image(tmp_path / "nowhere.zarr")


def test_what_is_no_ome_zarr_is_named_with_the_fix(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    with pytest.raises(
        ValueError, match=r"a.tif is a file, not an OME-Zarr; convert it with `chunkrestore convert`"
    ):
        open_image(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="is a folder without zarr metadata"):
        open_image(tmp_path)
    zarr.create_array(tmp_path / "array.zarr", shape=(4, 4), dtype="u2")
    with pytest.raises(ValueError, match="is a plain zarr array, not an OME-Zarr image"):
        open_image(tmp_path / "array.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match="is a plain zarr group, not an OME-Zarr image"):
        open_image(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match="cannot be opened; use a path or a URL that begins with s3://"):
        open_image("gs://bucket/image.zarr")


@pytest.mark.parametrize(
    ("ome", "message"),
    [
        ({"plate": {"wells": [{"path": "A/1"}]}}, "is a plate; open a field, such as .*A/1/0"),
        ({"well": {"images": [{"path": "0"}]}}, "is a well; open a field"),
        ({"bioformats2raw.layout": 3}, "is a collection of images; open one of them, such as .*/0"),
        ({"labels": ["nuclei"]}, "is a labels group; open one of its members: nuclei"),
    ],
)
@pytest.mark.parametrize("fmt", [2, 3])
def test_other_groups_point_to_their_images(tmp_path, fmt, ome, message):
    attributes = ome if fmt == 2 else {"ome": {"version": "0.5", **ome}}
    zarr.create_group(tmp_path / "a.zarr", zarr_format=fmt, attributes=attributes)
    with pytest.raises(ValueError, match=message):
        open_image(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("version", "fmt"), [("0.3", 3), ("0.6", 2), ("0.7", 3), ("0.5", 2), (None, 3), (["0.5"], 3), (0.4, 3)]
)
def test_unsupported_version_is_named(tmp_path, version, fmt):
    m = multiscale() | ({"version": version} if fmt == 2 else {})
    attributes = {"multiscales": [m]} if fmt == 2 else {"ome": {"version": version, "multiscales": [m]}}
    zarr.create_group(tmp_path / "a.zarr", zarr_format=fmt, attributes=attributes)
    with pytest.raises(
        ValueError,
        match=rf"a.zarr: OME-Zarr `version` {re.escape(repr(version))} \(zarr v{fmt}\) is not supported, only 0.1",
    ):
        open_image(tmp_path / "a.zarr")


def bad_scale(vector):
    return lambda m: m["datasets"][1]["coordinateTransformations"][0].update(scale=vector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_scale([1, 1, 1]), r"scale of level '1' has 3 numbers but there are 5 axes"),
        (bad_scale([1, 1, 1, 1, 0]), r"scale \[1, 1, 1, 1, 0\] of level '1' must hold finite numbers"),
        (lambda m: m["datasets"][0].pop("coordinateTransformations"), r"multiscales\[0\].datasets\[0\].coordinateTr"),
        (lambda m: m.pop("axes"), r"`multiscales\[0\].axes` does not conform to OME-Zarr 0.5: Field required"),
        (lambda m: m.pop("datasets"), r"`multiscales\[0\].datasets` None must be a list of at least one object"),
        (lambda m: m["axes"].reverse(), r"`multiscales\[0\].axes` does not conform .*space axes must be at the end"),
        (lambda m: m.update(coordinateTransformations=[{"type": "translation", "translation": [0] * 5}]),
         r"`multiscales\[0\].coordinateTransformations\[0\].type` does not conform .* should be 'scale'"),
        (lambda m: m["axes"][2].update(unit="pixel"), r"unit 'pixel' of a spatial axis is no length; pass `voxel_"),
        (lambda m: m["datasets"][0].update(path="../0"), r"member path '../0' leaves its group"),
        (lambda m: m["datasets"][0].update(path="/etc"), r"member path '/etc' leaves its group"),
    ],
)  # fmt: skip
def test_metadata_that_does_not_conform_is_named(store, change, message):
    edit(store, lambda ome: change(ome["multiscales"][0]))
    with pytest.raises(ValueError, match=message) as caught:
        open_image(store)
    assert str(store) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_level_is_named(store):
    shutil.rmtree(store / "1")
    with pytest.raises(FileNotFoundError, match=r"image.zarr/1, named by its group, is missing"):
        open_image(store)


def test_array_that_does_not_match_the_axes_is_named(store):
    shutil.rmtree(store / "1")
    zarr.create_array(store / "1", shape=(4, 4), dtype="u2")
    with pytest.raises(ValueError, match=r"image.zarr/1 has 2 axes but its group names 5"):
        open_image(store)


def test_levels_of_different_dtype_are_named(store):
    shutil.rmtree(store / "1")
    zarr.create_array(store / "1", shape=(2, 3, 5, 6, 7), dtype="u1")
    with pytest.raises(ValueError, match=r"levels differ in dtype \('0' uint16, '1' uint8\)"):
        open_image(store)


def test_empty_array_is_named(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", shape=(0, 4, 4), chunks=(1, 4, 4), dtype="u2")
    with pytest.raises(ValueError, match=r"of shape \(0, 4, 4\) is empty"):
        open_image(tmp_path / "a.zarr", axes="zyx")


def test_damaged_json_is_named(store):
    (store / "zarr.json").write_text('{"zarr_format": 3, ')
    with pytest.raises(ValueError, match=r"zarr.json is not valid JSON"):
        open_image(store)
    (store / "zarr.json").write_text("[]")
    with pytest.raises(ValueError, match=r"zarr.json holds no JSON object"):
        open_image(store)


def test_unknown_codec_is_named(store):
    file = store / "0" / "zarr.json"
    file.write_text(file.read_text().replace('"zstd"', '"homemade"'))
    with pytest.raises(ValueError, match=r"image.zarr/0 cannot be opened: .*homemade"):
        open_image(store)


def test_huge_shapes_do_not_overflow(tmp_path):
    shape, shards = (2**18, 2**18, 2**16), (2048, 2048, 1024)
    zarr.create_array(tmp_path / "a.zarr", shape=shape, chunks=(512,) * 3, shards=shards, dtype="f4")
    image = open_image(tmp_path / "a.zarr", axes="zyx")
    assert facts(image)["nbytes"] == 2**54
    assert image.data.nbytes == 2**54
    assert "16 PiB" in info(image)
    zarr.create_array(tmp_path / "b.zarr", shape=(10**7,) * 3, chunks=(10**6,) * 3, dtype="f4")
    with pytest.raises(ValueError, match="beyond 5 axes or 9007199254740992 voxels"):
        open_image(tmp_path / "b.zarr", axes="zyx")


@pytest.mark.parametrize("dtype", ["float64", "uint32", "complex64", "bool", "int8"])
def test_unsupported_dtype_is_named(dtype):
    with pytest.raises(
        ValueError, match=rf"`dtype` {dtype} of a.zarr is not supported, only uint8, uint16, int16"
    ):
        check_dtype(dtype, "a.zarr")


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16", "<f4"])
def test_supported_dtype_is_returned_in_native_order(dtype):
    assert check_dtype(dtype).isnative


@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_chunk_is_named(tmp_path, sharded):
    path = tmp_path / "a.zarr"
    make(path, chunks=(1, 1, 4, 4, 4), **({"shards": (1, 1, 4, 4, 8)} if sharded else {}))
    chunk = path / "0" / "c" / "1" / "2" / "0" / "1" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    image = open_image(path)
    everything = tuple(slice(0, n) for n in image.spatial_shape)
    with pytest.raises(
        CorruptChunkError, match=r"chunk c/1/2/0/1/1 of array .*a.zarr/0 \(region 1:2, 2:3, 0:4, 4:8"
    ):
        image.source().read(1, 2, everything)
    with pytest.raises(CorruptChunkError, match="the file is truncated or damaged"):
        image.data.compute()
    np.testing.assert_array_equal(image.source().read(1, 1, everything), values()[1, 1])


def test_absent_chunk_reads_as_fill_value(store):
    (store / "0" / "c" / "0" / "0" / "0" / "0" / "0").unlink()
    assert not open_image(store).source().read(0, 0, (slice(0, 4),) * 3).any()


def test_selectors_list_what_exists(tmp_path):
    omero = {"channels": [{"label": "DAPI"}, {"label": "GFP"}, {"label": "GFP"}]}
    make(tmp_path / "a.zarr", ome={"multiscales": [multiscale()], "omero": omero})
    image = open_image(tmp_path / "a.zarr")
    assert [select_channel(image, c) for c in ("DAPI", 2, "1")] == [0, 2, 1]
    with pytest.raises(
        ValueError, match=r"channel 'RFP' does not exist in .*; it has 0 'DAPI', 1 'GFP', 2 'GFP'"
    ):
        select_channel(image, "RFP")
    with pytest.raises(ValueError, match="channel 3 does not exist"):
        select_channel(image, 3)
    with pytest.raises(ValueError, match=r"channel 'GFP' .* is not unique; give its index"):
        select_channel(image, "GFP")
    with pytest.raises(ValueError, match=r"time point 2 does not exist in .*; it has 2: 0 to 1"):
        image.select(t=2)
    with pytest.raises(ValueError, match=r"level 5 does not exist in .*; it has 2: 0 to 1"):
        image.level(5)
    with pytest.raises(ValueError, match=r"label 'nuclei' does not exist in .*; it has none"):
        image.label("nuclei")
    with pytest.raises(ValueError, match=r"`region` 5:40 on axis 'y' is empty or leaves 0:12"):
        image.select(region=(slice(0, 3), slice(5, 40), slice(0, 3)))
    with pytest.raises(ValueError, match="must not be empty"):
        image.select(c=[])


def test_reader_refuses_what_lies_outside(store):
    reader = open_image(store).source()
    with pytest.raises(ValueError, match=r"`t` 2 does not exist in .* which has 2: 0 to 1"):
        reader.read(2, 0, (slice(0, 2),) * 3)
    with pytest.raises(ValueError, match=r"`slices` 0:2, 0:2, 0:20 is empty or leaves"):
        reader.read(0, 0, (slice(0, 2), slice(0, 2), slice(0, 20)))
    with pytest.raises(ValueError, match=r"`slices` must have one entry per axis 'zyx', got 2"):
        reader.read(0, 0, (slice(0, 2),) * 2)


def test_info_describes_a_store(store):
    text = info(open_image(store))
    for part in ("OME-Zarr 0.5", "tczyx", "2 x 3 x 10 x 12 x 14 uint16", "1.5 x 0.5 x 0.25 um", "level 1"):
        assert part in text
    assert json.loads(json.dumps(facts(open_image(store))))["axes"] == "tczyx"

"""Writing images: what independent readers see, what is carried over, what is never lost."""

import json
import pickle
import threading

import dask.array as da
import numpy as np
import pytest
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models import open_ome_zarr

from chunkrestore.ome_zarr import (
    CorruptChunkError,
    build_pyramid,
    clean_partial,
    create_image,
    create_labels,
    open_image,
    open_writer,
    write_image,
    write_labels,
)
from chunkrestore.ome_zarr.layout import default_shards, level_chunks

LENGTHS = {"t": 2, "c": 3, "z": 9, "y": 12, "x": 10}
VOXEL = {"z": 2.0, "y": 0.5, "x": 0.25}


def values(axes, dtype="uint16", seed=0):
    shape = tuple(LENGTHS[a] for a in axes)
    return np.random.default_rng(seed).integers(1, 250, shape).astype(dtype)


def voxel_size(axes):
    return tuple(VOXEL[a] for a in axes if a in VOXEL)


def whole(target):
    return tuple(slice(0, n) for n in target.spatial_shape)


def attributes(path, version):
    if version == "0.4":
        return json.loads((path / ".zattrs").read_text())
    return json.loads((path / "zarr.json").read_text())["attributes"]


def ome_of(path, version):
    found = attributes(path, version)
    return found["ome"] if version == "0.5" else found


def check_with_independent_readers(path):
    """Validate with two libraries, and check what both of them miss; return the model of the first."""
    yaozarrs.validate_zarr_store(path)
    model = open_ome_zarr(zarr.open_group(path, mode="r"))
    for multiscale in (getattr(model, "ome_attributes", None) or model.attributes).multiscales:
        arrays = [zarr.open_array(path / d.path, mode="r") for d in multiscale.datasets]
        assert len({a.dtype for a in arrays}) == 1
        sizes = [np.prod(a.shape) for a in arrays]
        assert sizes == sorted(sizes, reverse=True)
        base = multiscale.datasets[0].coordinateTransformations[0].scale
        for dataset, array in zip(multiscale.datasets, arrays, strict=True):
            scale = dataset.coordinateTransformations[0].scale
            shapes = [-(-n // round(s / b)) for n, s, b in zip(arrays[0].shape, scale, base, strict=True)]
            assert tuple(shapes) == array.shape
            shift = [(s - b) / 2 for s, b in zip(scale, base, strict=True)]
            steps = dataset.coordinateTransformations[1:]
            np.testing.assert_allclose(
                steps[0].translation if steps else np.zeros(array.ndim), shift, atol=1e-12
            )
    return model


STORAGE = {
    "0.4": {"version": "0.4", "chunks": 8},
    "0.5": {"version": "0.5", "chunks": 8},
    "0.5 sharded": {"version": "0.5", "chunks": 4, "shards": 8},
}


def storage(name, axes):
    n = len(voxel_size(axes))
    return {k: (v,) * n if isinstance(v, int) else v for k, v in STORAGE[name].items()}


@pytest.mark.parametrize("stored", STORAGE)
@pytest.mark.parametrize("axes", ["yx", "zyx", "czyx", "tczyx"])
def test_round_trip_is_valid_and_lossless(tmp_path, axes, stored):
    data, path = values(axes), tmp_path / "image.zarr"
    names = ["red", "green", "blue"] if "c" in axes else None
    image = write_image(
        data, path, axes=axes, voxel_size=voxel_size(axes), channels=names, levels=3, **storage(stored, axes)
    )
    np.testing.assert_array_equal(image.data.compute(), data)
    assert image.axes == axes
    assert image.voxel_size == voxel_size(axes)
    assert image.channels == tuple(names or ("0",))
    assert len(image.levels) == 3
    model = check_with_independent_readers(path)
    ome = getattr(model, "ome_attributes", None) or model.attributes
    multiscale = ome.multiscales[0]
    assert "".join(a.name for a in multiscale.axes) == axes
    assert [a.unit for a in multiscale.axes if a.type == "space"] == ["micrometer"] * len(voxel_size(axes))
    scale = multiscale.datasets[0].coordinateTransformations[0].scale
    assert scale == [VOXEL.get(a, 1.0) for a in axes]
    labels = [c["label"] for c in ome_of(path, image.version)["omero"]["channels"]]
    assert labels == list(image.channels)


def test_arrays_are_stored_as_decided(tmp_path):
    write_image(values("czyx"), tmp_path / "a.zarr", axes="czyx", chunks=(4, 4, 4), shards=(8, 8, 8))
    v3 = json.loads((tmp_path / "a.zarr" / "0" / "zarr.json").read_text())
    sharding = v3["codecs"][0]["configuration"]
    assert v3["dimension_names"] == list("czyx")
    assert v3["chunk_grid"]["configuration"]["chunk_shape"] == [1, 8, 8, 8]
    assert sharding["chunk_shape"] == [1, 4, 4, 4]
    blosc = sharding["codecs"][-1]["configuration"]
    assert (blosc["cname"], blosc["shuffle"], blosc["typesize"]) == ("zstd", "bitshuffle", 2)
    write_image(values("czyx"), tmp_path / "b.zarr", axes="czyx", version="0.4", compression="lz4")
    v2 = json.loads((tmp_path / "b.zarr" / "0" / ".zarray").read_text())
    assert (v2["dimension_separator"], v2["fill_value"], v2["order"]) == ("/", 0, "C")
    assert (v2["compressor"]["cname"], v2["compressor"]["shuffle"]) == ("lz4", 2)
    assert v2["chunks"] == [1, 9, 12, 10]


@pytest.mark.parametrize(
    ("compression", "v2", "v3"),
    [
        ("zstd", ("blosc", {"cname": "zstd", "clevel": 3, "shuffle": 2}), "blosc"),
        ("zstd:9", ("blosc", {"cname": "zstd", "clevel": 9, "shuffle": 2}), "blosc"),
        ("lz4", ("blosc", {"cname": "lz4", "clevel": 5, "shuffle": 2}), "blosc"),
        ("gzip:6", ("gzip", {"level": 6}), "gzip"),
        ("none", None, None),
    ],
)
def test_codecs_are_those_asked_for(tmp_path, compression, v2, v3):
    write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx", version="0.4", compression=compression)
    compressor = json.loads((tmp_path / "a.zarr" / "0" / ".zarray").read_text())["compressor"]
    assert compressor == v2 if v2 is None else compressor["id"] == v2[0]
    assert v2 is None or compressor.items() >= v2[1].items()
    for checksums in (False, True):
        path = tmp_path / f"{checksums}.zarr"
        write_image(values("zyx"), path, axes="zyx", compression=compression, checksums=checksums)
        codecs = json.loads((path / "0" / "zarr.json").read_text())["codecs"]
        expected = ["bytes", *([v3] if v3 else []), *(["crc32c"] if checksums else [])]
        assert [c["name"] for c in codecs] == expected
        if v3 == "blosc":
            level = {k: v for k, v in codecs[1]["configuration"].items() if k in ("cname", "clevel")}
            assert level == {k: v for k, v in v2[1].items() if k != "shuffle"}
        assert (open_image(path).data.compute() == values("zyx")).all()


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_flipped_bit_is_found_with_checksums(tmp_path, compression, shards):
    data = values("zyx")
    options = {"axes": "zyx", "chunks": (4, 4, 4), "shards": shards, "compression": compression, "levels": 1}
    found = {}
    for checksums in (True, False):
        image = write_image(data, tmp_path / f"{checksums}.zarr", checksums=checksums, **options)
        file = tmp_path / f"{checksums}.zarr" / "0" / "c" / "0" / "0" / "0"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        try:
            found[checksums] = np.array_equal(image.source().read(0, 0, whole(image.source())), data)
        except CorruptChunkError as error:
            found[checksums] = str(error)
    assert "cannot be decoded" in found[True]
    assert "c/0/0/0" in found[True]
    if compression == "none":
        assert found[False] is False  # another value, and nobody knows


def test_a_terabyte_is_tens_of_thousands_of_files():
    shape = (8192, 8192, 8192)
    shards = default_shards(shape, 2)
    assert shards == (256, 256, 256)
    assert np.prod([n // 64 for n in shape]) == 2_097_152
    assert np.prod([n // s for n, s in zip(shape, shards, strict=True)]) == 32_768


@pytest.mark.parametrize(
    ("shape", "itemsize", "options", "expected"),
    [
        ((1024, 1024, 1024), 4, {}, None),
        ((1025, 1024, 1024), 4, {}, (256, 256, 256)),
        ((1025, 1024, 1024), 1, {}, (256, 256, 256)),
        ((1025, 1024, 1024), 8, {}, (128, 128, 128)),
        ((30, 20_000, 20_000), 2, {}, (64, 256, 256)),
        ((512, 512, 512), 2, {"n_planes": 8}, None),
        ((512, 512, 512), 2, {"n_planes": 9}, (256, 256, 256)),
        ((512, 512), 2, {"n_planes": 10_000}, None),
        ((40_000, 40_000), 2, {}, (4096, 4096)),
        ((2000, 2000, 2000), 4, {"block_shape": (128, 256, 384)}, (128, 256, 192)),
        ((2000, 2000, 2000), 4, {"block_shape": (512, 320, 2000)}, (256, 64, 256)),
        ((2000, 2000, 2000), 4, {"block_shape": (64, 64, 64)}, None),
        ((2000, 2000, 2000), 4, {"block_shape": (100, 100, 100)}, None),
        ((2000, 2000, 2000), 4, {"chunks": (50, 50, 50), "block_shape": (200, 100, 150)}, (200, 100, 150)),
    ],
)
def test_default_shards_are_few_files_that_tasks_can_hold(shape, itemsize, options, expected):
    shards = default_shards(shape, itemsize, **options)
    assert shards == expected
    if shards is not None:
        assert level_chunks(shape, options.get("chunks"), shards)[1] is not None
        assert np.prod(shards) * itemsize <= 2**26
        for b, s, n in zip(options.get("block_shape", shape), shards, shape, strict=True):
            assert b >= n or b % s == 0


def test_large_images_are_sharded_by_default(tmp_path, monkeypatch):
    from chunkrestore.ome_zarr import layout

    monkeypatch.setattr(layout, "CHUNK_LENGTH", {2: 4, 3: 4})
    monkeypatch.setattr(layout, "MANY_FILES", 12)
    monkeypatch.setattr(layout, "SHARD_NBYTES", 4**3 * 2**3 * 2)
    data, path = values("zyx"), tmp_path / "a.zarr"
    image = write_image(data, path, axes="zyx")
    assert image.source().write_unit == (8, 8, 8)
    assert image.source().chunks == (4, 4, 4)
    np.testing.assert_array_equal(image.data.compute(), data)
    check_with_independent_readers(path)
    assert write_labels(data.astype("int32"), path).source().write_unit == (4, 4, 4)  # of twice the bytes
    for name, options in {"b": {"shards": None}, "c": {"version": "0.4"}, "d": {"chunks": (4, 4, 4)}}.items():
        image = write_image(data, tmp_path / f"{name}.zarr", axes="zyx", **options)
        assert image.source().write_unit == (4, 4, 4)
        np.testing.assert_array_equal(image.data.compute(), data)


def test_time_has_its_unit(tmp_path):
    data = np.zeros((3, 4, 5), "uint8")
    image = write_image(data, tmp_path / "a.zarr", axes="tyx", voxel_size=(1, 1), time_step=2.5)
    multiscale = image.ome["multiscales"][0]
    assert multiscale["axes"][0] == {"name": "t", "type": "time", "unit": "second"}
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [2.5, 1, 1]
    kept = write_image(data, tmp_path / "b.zarr", like=image)
    assert kept.ome["multiscales"][0] | {"name": "a.zarr"} == multiscale
    other = write_image(data, tmp_path / "c.zarr", like=image, time_step=60, levels=2)
    entries = other.ome["multiscales"][0]["datasets"]
    assert [e["coordinateTransformations"][0]["scale"][0] for e in entries] == [60, 60]
    assert other.voxel_size == (1, 1)


def test_viewers_begin_in_the_middle_or_where_they_are_told(tmp_path):
    hand_made(tmp_path / "in.zarr")
    source = open_image(tmp_path / "in.zarr")
    assert write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx").ome["omero"]["rdefs"] == {
        "defaultT": 0,
        "defaultZ": 4,
        "model": "color",
    }
    kept = write_image(source.data, tmp_path / "b.zarr", like=source).ome["omero"]
    assert (kept["rdefs"], kept["id"]) == ({"model": "color", "defaultZ": 4}, 7)
    part = source.select(region=(slice(0, 4), slice(0, 12), slice(0, 10)))
    cut = write_image(part.data, tmp_path / "c.zarr", like=part).ome["omero"]
    assert cut["rdefs"] == {"model": "color"}


@pytest.mark.parametrize("old", ["0.4", "0.5"])
@pytest.mark.parametrize("new", ["0.4", "0.5"])
def test_attributes_of_arrays_are_carried_over(tmp_path, old, new):
    hand_made(tmp_path / "in.zarr", old)
    for level, gain in (("0", 2), ("1", 3)):
        zarr.open_array(tmp_path / "in.zarr" / level).attrs["camera"] = {"gain": gain}
    source = open_image(tmp_path / "in.zarr")
    write_image(source.data, tmp_path / "out.zarr", like=source, version=new, levels=3)
    found = [dict(zarr.open_array(tmp_path / "out.zarr" / k, mode="r").attrs) for k in "012"]
    assert [f.get("camera") for f in found] == [{"gain": 2}, {"gain": 3}, None]
    assert [f.get("_ARRAY_DIMENSIONS") for f in found] == [list("czyx") if new == "0.4" else None] * 3
    coarse = source.select(level=1)
    part = write_image(coarse.data, tmp_path / "part.zarr", like=coarse, version=new)
    assert zarr.open_array(tmp_path / "part.zarr" / "0", mode="r").attrs["camera"] == {"gain": 3}
    assert part.path.endswith("part.zarr")


def test_nothing_is_lost_on_the_way_through_both_versions(tmp_path):
    before = hand_made(tmp_path / "0.zarr", "0.4")
    for k, version in enumerate(["0.5", "0.4", "0.5", "0.4"]):
        source = open_image(tmp_path / f"{k}.zarr")
        write_image(source.data, tmp_path / f"{k + 1}.zarr", like=source, version=version, levels=2)
    after = attributes(tmp_path / "4.zarr", "0.4")
    after.pop("chunkrestore")
    for found in (before, after):
        found["multiscales"][0].pop("metadata")
    before["omero"]["version"] = "0.4"
    assert after == before


def test_windows_of_images_with_nan_are_numbers(tmp_path):
    data = values("zyx", "float32")
    data[0, 0, :3] = [np.nan, np.inf, -np.inf]
    window = write_image(data, tmp_path / "a.zarr", axes="zyx", levels=1).ome["omero"]["channels"][0][
        "window"
    ]
    assert (window["min"], window["max"]) == (1, 249)
    nothing = write_image(np.full((4, 5), np.nan, "f4"), tmp_path / "b.zarr", axes="yx", levels=1)
    assert nothing.ome["omero"]["channels"][0]["window"] == {"min": 0, "max": 1, "start": 0, "end": 1}


def hand_made(path, version="0.5"):
    """Give a written image metadata of another tool's making; return its attributes."""
    write_image(values("czyx"), path, axes="czyx", version=version, voxel_size=(2, 0.5, 0.25), levels=2)
    found = attributes(path, version)
    ome = found["ome"] if version == "0.5" else found
    found.pop("chunkrestore")
    found["lab"] = {"objective": "25x/1.1"}
    multiscale = ome["multiscales"][0]
    multiscale["name"] = "embryo"
    multiscale["vendor"] = {"stage": [1, 2]}
    multiscale["axes"][0]["note"] = "kept"
    multiscale["coordinateTransformations"] = [
        {"type": "scale", "scale": [1, 1, 1, 1.0]},
        {"type": "translation", "translation": [0, 5.0, 0, 0]},
    ]
    multiscale["datasets"][0]["acquired"] = "2026-01-01"
    for axis in multiscale["axes"][1:]:
        axis["unit"] = "millimeter"
    window = {"min": 0, "max": 65535, "start": 90, "end": 1200}
    ome["omero"] = {
        "id": 7,
        "channels": [
            {"label": n, "color": c, "window": window, "emission": e}
            for n, c, e in (("DAPI", "0000FF", 461), ("GFP", "00FF00", 509), ("RFP", "FF0000", 584))
        ],
        "rdefs": {"model": "color", "defaultZ": 4},
    }
    if version == "0.5":
        node = json.loads((path / "zarr.json").read_text())
        (path / "zarr.json").write_text(json.dumps(node | {"attributes": found}))
    else:
        (path / ".zattrs").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("old", ["0.4", "0.5"])
@pytest.mark.parametrize("new", ["0.4", "0.5"])
def test_like_carries_over_everything_that_is_not_ours(tmp_path, old, new):
    before = hand_made(tmp_path / "in.zarr", old)
    source = open_image(tmp_path / "in.zarr")
    image = write_image(values("czyx", seed=1), tmp_path / "out.zarr", like=source, version=new, levels=2)
    after = attributes(tmp_path / "out.zarr", new)
    was, now = (a["ome"] if v == "0.5" else a for a, v in ((before, old), (after, new)))
    assert after["lab"] == before["lab"]
    for key in ("name", "vendor", "axes", "coordinateTransformations"):
        assert now["multiscales"][0][key] == was["multiscales"][0][key]
    assert now["multiscales"][0]["datasets"][0]["acquired"] == "2026-01-01"
    assert {k: v for k, v in now["omero"].items() if k != "version"} == {
        k: v for k, v in was["omero"].items() if k != "version"
    }
    assert (image.voxel_size, image.translation) == (source.voxel_size, source.translation)
    assert image.voxel_size == (2000, 500, 250)
    assert image.translation == (5000, 0, 0)
    assert image.channels == ("DAPI", "GFP", "RFP")
    versions = [p.get("version") for p in (now["multiscales"][0], now["omero"])]
    assert versions == ([None, None] if new == "0.5" else ["0.4", "0.4"])
    check_with_independent_readers(tmp_path / "out.zarr") if new == "0.5" else None


def test_source_attributes_are_not_changed_by_writing_like_it(tmp_path):
    hand_made(tmp_path / "in.zarr")
    before = attributes(tmp_path / "in.zarr", "0.5")
    source = open_image(tmp_path / "in.zarr")
    write_image(values("czyx", "float32"), tmp_path / "out.zarr", like=source)
    assert attributes(tmp_path / "in.zarr", "0.5") == before
    assert source.attributes == before


def test_like_a_selection_carries_its_part(tmp_path):
    hand_made(tmp_path / "in.zarr")
    part = open_image(tmp_path / "in.zarr").select(c="GFP", region=(slice(2, 8), slice(4, 12), slice(0, 10)))
    image = write_image(part.data, tmp_path / "out.zarr", like=part)
    assert image.channels == ("GFP",)
    assert image.translation == (5000 + 2 * 2000, 4 * 500, 0)
    assert image.ome["omero"]["channels"][0]["emission"] == 509
    np.testing.assert_array_equal(image.data.compute(), values("czyx")[1:2, 2:8, 4:12])


def test_data_without_channel_axis_takes_the_spatial_part_of_like(tmp_path):
    hand_made(tmp_path / "in.zarr")
    source = open_image(tmp_path / "in.zarr")
    image = write_image(source.data[1], tmp_path / "out.zarr", like=source)
    assert (image.axes, image.voxel_size, image.channels) == ("zyx", source.voxel_size, ("0",))
    named = write_image(source.data[1], tmp_path / "named.zarr", like=source, channels=["GFP"])
    assert named.ome["omero"]["channels"][0]["color"] == "00FF00"


def test_voxel_size_beside_like_wins(tmp_path):
    hand_made(tmp_path / "in.zarr")
    image = write_image(
        values("czyx"), tmp_path / "out.zarr", like=tmp_path / "in.zarr", voxel_size=(3, 1, 1)
    )
    assert image.voxel_size == (3, 1, 1)


def test_dask_does_not_mistake_a_rewritten_image_for_the_old_one(tmp_path):
    first = write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx")
    assert open_image(first.path).data.name == first.data.name
    name = first.data.name
    second = write_image(values("zyx", seed=1), tmp_path / "a.zarr", axes="zyx", overwrite=True)
    assert second.data.name != name


def test_unknown_voxel_size_is_written_without_unit(tmp_path):
    image = write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx")
    assert image.voxel_size == (1, 1, 1)
    assert not image.calibrated
    assert "unit" not in image.ome["multiscales"][0]["axes"][0]


def test_float_image_gets_windows_of_its_own_data(tmp_path):
    hand_made(tmp_path / "in.zarr")
    data = values("czyx", "float32") / 1000
    image = write_image(data, tmp_path / "out.zarr", like=tmp_path / "in.zarr", levels=1)
    for channel, part in zip(image.ome["omero"]["channels"], data, strict=True):
        window = channel["window"]
        assert window["min"] <= window["start"] < window["end"] <= window["max"]
        assert (window["min"], window["max"]) == pytest.approx((part.min(), part.max()))
        assert channel["color"] in ("0000FF", "00FF00", "FF0000")
    constant = write_image(np.zeros((4, 5), "f4"), tmp_path / "zero.zarr", axes="yx")
    assert constant.ome["omero"]["channels"][0]["window"] == {"min": 0, "max": 1, "start": 0, "end": 1}


def test_provenance_is_kept_with_that_of_the_input(tmp_path):
    first = write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx", provenance={"step": 1})
    second = write_image(values("zyx"), tmp_path / "b.zarr", like=first, provenance={"step": 2})
    assert second.others["chunkrestore"] == {"provenance": {"step": 2}, "source": {"provenance": {"step": 1}}}


@settings(max_examples=25)
@given(data=st.data())
def test_no_voxel_is_lost_for_any_dask_chunks_and_shards(tmp_path_factory, data):
    shape = data.draw(st.tuples(st.integers(1, 3), *[st.integers(1, 17)] * 2))
    chunk = data.draw(st.tuples(*[st.integers(2, 6)] * 2))
    per_shard = data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    shards = data.draw(st.sampled_from([None, tuple(c * k for c, k in zip(chunk, per_shard, strict=True))]))
    dask_chunks = data.draw(st.tuples(*[st.integers(1, 17)] * 3))
    array = np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)
    lazy = da.from_array(array, chunks=dask_chunks)
    path = tmp_path_factory.mktemp("any") / "a.zarr"
    image = write_image(lazy, path, axes="cyx", chunks=chunk, shards=shards, levels=1)
    np.testing.assert_array_equal(image.data.compute(), array)


def test_no_two_dask_tasks_write_one_shard(tmp_path, monkeypatch):
    from chunkrestore.ome_zarr.target import RegionWriter

    calls, lock, write = [], threading.Lock(), RegionWriter.write

    def watched(self, t, c, slices, array):
        with lock:
            calls.append((self.array_path, *(s.start for s in slices), *(s.stop for s in slices)))
        write(self, t, c, slices, array)

    monkeypatch.setattr(RegionWriter, "write", watched)
    array = da.ones((40, 40), chunks=7, dtype="uint8")
    write_image(array, tmp_path / "a.zarr", axes="yx", chunks=(4, 4), shards=(16, 16), levels=1)
    assert all(c[1] % 16 == 0 and c[2] % 16 == 0 for c in calls)
    units = [(y, x) for _, y0, x0, y1, x1 in calls for y in range(y0, y1, 16) for x in range(x0, x1, 16)]
    assert len(units) == len(set(units)) == 9


def test_dask_tasks_are_one_per_aligned_chunk(tmp_path):
    lazy = da.from_array(np.ones((64, 64), "uint8"), chunks=(32, 32))
    image = write_image(lazy, tmp_path / "a.zarr", axes="yx", chunks=(16, 16))
    assert image.data.chunks == ((16,) * 4,) * 2
    assert image.level(0, chunks=(32, 64)).chunks == ((32, 32), (64,))


def test_failing_dask_block_fails_the_write_and_leaves_the_store_unfinished(tmp_path):
    def fail(block):
        raise RuntimeError("no voxels today")

    lazy = da.ones((8, 8), chunks=4, dtype="f4").map_blocks(fail, meta=np.empty((0, 0), "f4"))
    with pytest.raises(RuntimeError, match="no voxels today"):
        write_image(lazy, tmp_path / "a.zarr", axes="yx")
    with pytest.raises(ValueError, match=r"a.zarr is unfinished: .* `chunkrestore resume`"):
        open_image(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="already holds an unfinished image; resume it"):
        write_image(np.ones((8, 8), "f4"), tmp_path / "a.zarr", axes="yx")
    image = write_image(np.ones((8, 8), "f4"), tmp_path / "a.zarr", axes="yx", overwrite=True)
    assert image.data.compute().all()


def test_unfinished_store_is_no_image_for_anyone_until_published(tmp_path):
    path = tmp_path / "a.zarr"
    writer = create_image(path, shape=(9, 12, 10), dtype="float32", axes="zyx", chunks=(8, 8, 8), levels=2)
    with pytest.raises(ValueError, match="Unable to determine OME-Zarr version"):
        yaozarrs.validate_zarr_store(path)
    again = open_writer(path)
    assert again == writer
    for w in (pickle.loads(pickle.dumps(writer)), again):
        w.target(0).write(0, 0, whole(w.target(0)), np.full((9, 12, 10), 3, "f4"))
    build_pyramid(again)
    again.publish({"by": "test"})
    image = open_image(path)
    assert image.others["chunkrestore"]["provenance"] == {"by": "test"}
    assert (image.level(1).compute() == 3).all()
    check_with_independent_readers(path)
    with pytest.raises(ValueError, match="is not unfinished; there is nothing to resume"):
        open_writer(path)
    with pytest.raises(FileNotFoundError, match="does not exist; nothing can be resumed"):
        open_writer(tmp_path / "b.zarr")


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
def test_writes_must_lie_on_write_units(tmp_path, shards):
    writer = create_image(
        tmp_path / "a.zarr",
        shape=(2, 10, 20, 20),
        dtype="uint16",
        axes="czyx",
        chunks=(4, 4, 4),
        shards=shards,
    )
    target, unit = writer.target(0), 8 if shards else 4
    assert target.spatial_write_unit == (unit,) * 3
    target.write(0, 1, (slice(0, 8), slice(8, 16), slice(16, 20)), np.ones((8, 8, 4), "uint16"))
    for bad in ((slice(2, 8), slice(0, 8), slice(0, 8)), (slice(0, 8), slice(0, 8), slice(0, unit + 2))):
        shape = tuple(s.stop - s.start for s in bad)
        with pytest.raises(
            ValueError, match=rf"cuts a chunk or shard of .* must be multiples of {unit} or the end"
        ):
            target.write(0, 0, bad, np.ones(shape, "uint16"))
    with pytest.raises(
        ValueError, match=r"`array` of shape \(8, 8, 7\) does not fill `slices` 0:8, 0:8, 0:8"
    ):
        target.write(0, 0, (slice(0, 8),) * 3, np.ones((8, 8, 7), "uint16"))
    with pytest.raises(ValueError, match=r"`array` of float32 would lose values in .* of uint16; cast it"):
        target.write(0, 0, (slice(0, 8),) * 3, np.ones((8, 8, 8), "float32"))
    with pytest.raises(ValueError, match="`c` 2 does not exist"):
        target.write(0, 2, (slice(0, 8),) * 3, np.ones((8, 8, 8), "uint16"))


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
def test_zeros_replace_what_was_written_before(tmp_path, shards):
    writer = create_image(
        tmp_path / "a.zarr", shape=(10, 12, 12), dtype="uint16", axes="zyx", chunks=(4, 4, 4), shards=shards
    )
    target = writer.target(0)
    target.write(0, 0, whole(target), np.ones((10, 12, 12), "uint16"))
    region = (slice(8, 10), slice(0, 8), slice(8, 12))
    target.write(0, 0, region, np.zeros((2, 8, 4), "uint16"))
    expected = np.ones((10, 12, 12))
    expected[region] = 0
    np.testing.assert_array_equal(target.read(0, 0, whole(target)), expected)


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
def test_damaged_chunk_files_are_replaced_by_a_rewrite(tmp_path, shards):
    writer = create_image(
        tmp_path / "a.zarr", shape=(10, 12, 12), dtype="uint16", axes="zyx", chunks=(4, 4, 4), shards=shards
    )
    target = writer.target(0)
    data = np.random.default_rng(1).integers(1, 9999, (10, 12, 12), np.uint16)
    target.write(0, 0, whole(target), data)
    files = [p for p in (tmp_path / "a.zarr" / "0" / "c").rglob("*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])
    target.write(0, 0, whole(target), data)
    np.testing.assert_array_equal(target.read(0, 0, whole(target)), data)


def test_partial_files_of_killed_writers_are_removed(tmp_path):
    write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx")
    (tmp_path / "a.zarr" / "0" / "c" / "0" / "0" / "0.0123.partial").write_bytes(b"half")
    (tmp_path / "a.zarr" / "zarr.json.0123.partial").write_bytes(b"half")
    assert clean_partial(tmp_path / "a.zarr") == 2
    assert clean_partial(tmp_path / "a.zarr") == 0
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").data.compute(), values("zyx"))


def test_existing_image_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.zarr"
    write_image(values("zyx"), path, axes="zyx", levels=4)
    (path / "notes.txt").write_text("mine")
    (path / ".chunkrestore").mkdir()
    with pytest.raises(
        FileExistsError, match="already holds an image; choose another store, or pass overwrite=True"
    ):
        write_image(values("zyx", seed=1), path, axes="zyx")
    np.testing.assert_array_equal(open_image(path).data.compute(), values("zyx"))
    for version in ("0.5", "0.4", "0.5"):
        image = write_image(values("yx", seed=2), path, axes="yx", overwrite=True, version=version, levels=2)
        assert (image.version, image.axes) == (version, "yx")
        np.testing.assert_array_equal(image.data.compute(), values("yx", seed=2))
        assert sorted(p.name for p in path.iterdir() if p.is_dir()) == [".chunkrestore", "0", "1"]
        check_with_independent_readers(path)
    assert (path / "notes.txt").read_text() == "mine"


def test_only_images_are_ever_replaced(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("do not lose")
    zarr.create_array(tmp_path / "array.zarr", shape=(4, 4), dtype="u2")
    zarr.create_group(tmp_path / "group.zarr", attributes={"mine": 1})
    zarr.create_group(tmp_path / "plate.zarr", attributes={"ome": {"version": "0.5", "plate": {"wells": []}}})
    for name in ("folder", "array.zarr", "group.zarr", "plate.zarr"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="choose another store, it is not removed"):
            write_image(values("yx"), tmp_path / name, axes="yx", overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileExistsError, match="is a file; give the path of a new store"):
        write_image(values("yx"), folder / "thesis.tex", axes="yx", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert write_image(values("yx"), tmp_path / "empty", axes="yx").shape == (12, 10)


def test_input_is_never_overwritten_by_its_own_result(tmp_path):
    image = write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx")
    with pytest.raises(ValueError, match="is the image that `like` was opened from; write to another store"):
        write_image(image.data + 1, tmp_path / "a.zarr", like=image, overwrite=True)


def test_labels_beside_an_overwritten_image_stay_or_it_is_refused(tmp_path):
    path = tmp_path / "a.zarr"
    write_image(values("zyx"), path, axes="zyx", levels=2)
    labels = write_labels(values("zyx", "int32"), path, "nuclei")
    image = write_image(values("zyx", seed=3), path, axes="zyx", levels=2, overwrite=True)
    assert image.labels == ("nuclei",)
    np.testing.assert_array_equal(image.label("nuclei").data.compute(), labels.data.compute())
    check_with_independent_readers(path)
    for change in ({"levels": 3}, {"version": "0.4", "levels": 2}):
        with pytest.raises(ValueError, match=r"has labels 'nuclei' \(shape .* do not fit the new image"):
            write_image(values("zyx"), path, axes="zyx", overwrite=True, **change)
    assert open_image(path).labels == ("nuclei",)


def test_interrupted_creation_can_be_repeated(tmp_path, monkeypatch):
    from chunkrestore.ome_zarr.storage import Storage

    path, create = tmp_path / "a.zarr", Storage.create_array
    write_image(values("zyx"), path, axes="zyx", levels=3)

    def killed(self, member, *args):
        if member.endswith("1"):
            raise KeyboardInterrupt
        create(self, member, *args)

    monkeypatch.setattr(Storage, "create_array", killed)
    with pytest.raises(KeyboardInterrupt):
        create_image(path, shape=(9, 12, 10), dtype="uint16", axes="zyx", levels=2, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was interrupted while it was created"):
        open_writer(path)
    with pytest.raises(ValueError, match="is unfinished"):
        open_image(path)
    image = write_image(values("zyx"), path, axes="zyx", levels=1, overwrite=True)
    assert sorted(p.name for p in path.iterdir()) == ["0", "zarr.json"]
    np.testing.assert_array_equal(image.data.compute(), values("zyx"))


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_consolidated_metadata_is_brought_up_to_date(tmp_path, version):
    path = tmp_path / "a.zarr"
    image = write_image(values("zyx"), path, axes="zyx", version=version)
    zarr.consolidate_metadata(path)
    write_labels(values("zyx", "int32"), path, "nuclei", like=image)
    group = zarr.open_consolidated(path)
    assert group["labels/nuclei/0"].shape == (9, 12, 10)
    write_image(values("yx"), path.parent / "b.zarr", axes="yx", version=version)
    zarr.consolidate_metadata(path.parent / "b.zarr")
    write_image(values("zyx"), path.parent / "b.zarr", axes="zyx", version=version, overwrite=True)
    assert zarr.open_group(path.parent / "b.zarr")["0"].ndim == 3
    plate = tmp_path / "plate.zarr"
    zarr.create_group(plate, zarr_format=2 if version == "0.4" else 3)
    zarr.consolidate_metadata(plate)
    write_image(values("yx"), plate / "field", axes="yx", version=version)
    field = dict(zarr.open_consolidated(plate)["field"].attrs)
    assert "multiscales" in (field["ome"] if version == "0.5" else field)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "`dtype` float64 of the image for .* is not supported"),
        ({"version": "0.6"}, "`version` '0.6' cannot be written; use one of 0.4, 0.5"),
        ({"version": "0.4", "shards": (8, 8, 8)}, "`shards` need OME-Zarr 0.5"),
        ({"version": "0.4", "checksums": True}, "`checksums` need OME-Zarr 0.5"),
        ({"compression": "xz"}, "`compression` 'xz' is unknown; use one of zstd, lz4, gzip, none"),
        ({"compression": "zstd:22"}, "`compression` 'zstd:22' has no such level; use 1 to 9, as in 'zstd:9'"),
        ({"compression": "none:1"}, "`compression` 'none:1' has no such level"),
        ({"compression": "zstd:"}, "`compression` 'zstd:' has no such level"),
        ({"shards": "big"}, "`shards` 'big' must be lengths per spatial axis, 'auto' or None"),
        ({"time_step": 2.0}, "`time_step` 2.0 must be above 0, in seconds, for axes with 't', not 'zyx'"),
        (
            {"shape": (2048,) * 3, "chunks": (1024,) * 3},
            r"`chunks` \[1024, 1024, 1024\] take 2147483648 bytes each, the limit of codecs is 2147483631",
        ),
        (
            {"shape": (2048,) * 3, "chunks": (8,) * 3},
            r"chunks of 512 voxels, more than 65536; write the array in",
        ),
        ({"axes": None}, "`axes` is needed without `like`"),
        ({"axes": "xyz"}, "`axes` 'xyz' must be in the order 'tczyx'; transpose the data"),
        ({"axes": "zz"}, "`axes` 'zz' are not time, channel, z, y and x"),
        ({"axes": "yx"}, "`axes` 'yx' name 2 axes but the array has 3"),
        ({"shape": (9, 0, 10)}, r"`shape` \(9, 0, 10\) must be at least 1"),
        ({"voxel_size": (1, 1)}, r"`voxel_size` \(1.0, 1.0\) must hold one length above 0"),
        ({"chunks": (8, 8)}, r"`chunks` \(8, 8\) must hold 3 lengths"),
        ({"chunks": (8, 8, 8), "shards": (12, 8, 8)}, r"`shards` \(12, 8, 8\) must be multiples of `chunks`"),
        (
            {"channels": ["a", "b"]},
            r"`channels` \('a', 'b'\) must hold one unique name for each of 1 channels",
        ),
        ({"levels": 0}, "`levels` 0 must be at least 1"),
    ],
)
def test_bad_parameters_are_named_and_nothing_is_touched(tmp_path, options, message):
    given_options = {"shape": (9, 12, 10), "dtype": "uint16", "axes": "zyx"} | options
    with pytest.raises(ValueError, match=message) as caught:
        create_image(tmp_path / "a.zarr", **given_options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_like_that_does_not_fit_is_named(tmp_path):
    like = write_image(values("zyx"), tmp_path / "in.zarr", axes="zyx")
    with pytest.raises(ValueError, match=r"axis 'x' is 9 long but 10 in `like` .* use like=image.select"):
        write_image(values("zyx")[..., 1:], tmp_path / "a.zarr", like=like)
    with pytest.raises(ValueError, match="has axes 'zyx', without 'c'; pass `axes` and `voxel_size`"):
        write_image(values("czyx"), tmp_path / "a.zarr", like=like, axes="czyx")
    with pytest.raises(
        ValueError, match=r"shape \(3, 9, 12, 10\) does not fit axes 'zyx' of .*; pass `axes`"
    ):
        write_image(values("czyx"), tmp_path / "a.zarr", like=like)
    assert not (tmp_path / "a.zarr").exists()


def test_dask_arrays_of_unknown_shape_are_named(tmp_path):
    lazy = da.from_array(np.arange(16, dtype="uint16").reshape(4, 4), chunks=2)
    with pytest.raises(ValueError, match=r"the shape of the data is unknown; call .compute_chunk_sizes"):
        write_image(lazy[lazy[:, 0] > 3], tmp_path / "a.zarr", axes="yx")
    assert not (tmp_path / "a.zarr").exists()


def test_level_that_does_not_exist_is_named(tmp_path):
    writer = create_image(tmp_path / "a.zarr", shape=(12, 10), dtype="uint16", axes="yx", levels=2)
    with pytest.raises(ValueError, match=r"level 2 does not exist in .*a.zarr; it has 2"):
        writer.target(2)


def test_labels_need_no_image_of_their_own_before(tmp_path):
    writer = create_labels(tmp_path / "a.zarr", "cells", shape=(9, 12, 10), axes="zyx", voxel_size=(2, 1, 1))
    writer.publish()
    with pytest.raises(ValueError, match=r"holds labels but no image; open one of .*a.zarr/labels/: cells"):
        open_image(tmp_path / "a.zarr")
    image = write_image(values("zyx"), tmp_path / "a.zarr", axes="zyx")
    assert image.labels == ("cells",)
    check_with_independent_readers(tmp_path / "a.zarr")


def test_a_late_task_of_an_earlier_job_writes_nothing(tmp_path):
    """It may still run on a worker when its driver was killed and the output is begun anew, or even finished."""
    path, region, old = tmp_path / "a.zarr", (slice(0, 8),) * 3, np.full((8, 8, 8), 7, np.uint8)
    first = create_image(path, shape=(8, 8, 8), dtype="uint8", axes="zyx", voxel_size=(1, 1, 1))
    late = pickle.loads(pickle.dumps(first.target(0)))
    second = create_image(
        path, shape=(8, 8, 8), dtype="uint8", axes="zyx", voxel_size=(1, 1, 1), overwrite=True
    )
    with pytest.raises(ValueError, match="begun anew by another job; nothing was written"):
        late.write(0, 0, region, old)
    assert open_writer(path).target(0).read(0, 0, region).max() == 0
    second.target(0).write(0, 0, region, old + 1)
    build_pyramid(second)
    second.publish()
    for writer in (late, second.target(0)):
        with pytest.raises(ValueError, match="was finished or begun anew"):
            writer.write(0, 0, region, old)
    assert np.unique(open_image(path).data.compute()).tolist() == [8]

"""The server behind `chunkrestore view`: tiles, raw files, objects, and who may ask for them."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import zarr
from browsing import serving
from hostile import edit, honest

import chunkrestore as cr
from chunkrestore.ome_zarr import open_image, write_image, write_labels
from chunkrestore.viewer import slices, view
from chunkrestore.viewer.links import ORIGINS
from chunkrestore.viewer.objects import read_object
from chunkrestore.viewer.raw import UnsatisfiableRangeError, key_of, open_raw, parse_range
from chunkrestore.viewer.slices import PLANES, Tile, TileReader, readable_levels, tile_nbytes, wire_dtype
from chunkrestore.viewer.sources import open_sources

VOXEL_SIZE = (2.0, 0.5, 0.5)


def numbers(shape, dtype="u2", seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()


def ask(server, path, method="GET", secret=True, **headers):
    """Send a request as it is, without a library that tidies the path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    target = f"/{server.secret}/{path}" if secret else path
    connection.putrequest(method, target, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = Answer(connection.getresponse())
    connection.close()
    return answer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sharded image with labels and a table beside them."""
    path = tmp_path_factory.mktemp("view") / "image.zarr"
    write_image(
        numbers((20, 300, 280)),
        path,
        axes="zyx",
        voxel_size=VOXEL_SIZE,
        chunks=(8, 64, 64),
        shards=(16, 256, 256),
    )
    write_labels(numbers((20, 300, 280), "i4", 1), path, "cells", chunks=(8, 64, 64))
    return path


@pytest.fixture(scope="module")
def server(store):
    with serving(store) as server:
        yield server


# Tiles


def expected(image, tile):
    """Return what a tile holds, from the whole level in memory."""
    data = image.level(tile.level).compute()
    lead = [i for axis, i in (("t", tile.t), ("c", tile.c)) if axis in image.axes]
    volume = data[tuple(lead)]
    volume = volume.reshape((1,) * (3 - volume.ndim) + volume.shape)
    across, down, right = PLANES[tile.plane]
    plane = volume.transpose(across, down, right)[tile.place[0]]
    v, u = (i * slices.TILE for i in tile.place[1:])
    return plane[v : v + slices.TILE, u : u + slices.TILE]


@pytest.mark.parametrize(
    ("axes", "shape", "chunks"),
    [
        ("yx", (70, 300), (64, 64)),
        ("zyx", (11, 300, 270), (4, 50, 64)),
        ("tczyx", (2, 2, 5, 40, 300), (2, 16, 100)),
        ("cyx", (3, 33, 44), (16, 16)),
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
def test_tiles_of_every_plane_and_level_are_the_voxels_of_the_store(tmp_path, axes, shape, chunks, dtype):
    image = write_image(numbers(shape, dtype), tmp_path / "image.zarr", axes=axes, chunks=chunks)
    tiles = TileReader([image])
    for level, plane in ((k, p) for k in range(len(image.levels)) for p in PLANES):
        volume = slices.volume_shape(image.source(level))
        for n in {0, volume[PLANES[plane][0]] - 1}:
            ends = [(volume[axis] - 1) // slices.TILE for axis in PLANES[plane][1:]]
            tile = Tile(0, level, plane, image.n_t - 1, image.n_c - 1, (n, *ends))
            found = tiles.read(tile)
            np.testing.assert_array_equal(found, expected(image, tile))
            assert found.dtype == np.dtype(dtype).newbyteorder("<")
            assert found.flags.c_contiguous


def test_axes_in_any_order_give_the_same_tiles(tmp_path):
    path = honest(tmp_path / "image.zarr", labels=False)
    data = open_image(path).data.compute()
    axes = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]["axes"]
    edit(path / "zarr.json", "attributes", "ome", "multiscales", 0, "axes", to=axes[::-1])
    image = open_image(path, axes="xyz")
    found = TileReader([image]).read(Tile(0, 0, "xy", 0, 0, (3, 0, 0)))
    np.testing.assert_array_equal(found, data.transpose(2, 1, 0)[3])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_ids_of_labels_arrive_whole(tmp_path, dtype):
    labels = np.array([[0, 1], [np.iinfo(dtype).max, np.iinfo(dtype).min]], dtype)
    image = write_labels(labels, tmp_path / "labels.zarr", "cells", axes="yx", voxel_size=(1, 1))
    assert wire_dtype(image) == dtype
    np.testing.assert_array_equal(TileReader([image]).read(Tile(0, 0, "xy", 0, 0, (0, 0, 0))), labels)


def test_planes_through_the_same_chunks_are_decoded_once(store, monkeypatch):
    image, read = open_image(store), []
    original = type(image.source()).read
    monkeypatch.setattr(type(image.source()), "read", lambda self, *a: read.append(a) or original(self, *a))
    tiles = TileReader([image])
    for n in range(8):
        tiles.read(Tile(0, 0, "xy", 0, 0, (n, 0, 0)))
    assert len(read) == 1
    tiles.read(Tile(0, 0, "xy", 0, 0, (8, 0, 0)))
    tiles.read(Tile(0, 0, "xz", 0, 0, (200, 0, 0)))
    assert len(read) == 3
    assert read[2][2][0] == slice(16, 20)


def test_tiles_of_one_chunk_at_a_time_decode_it_once(tmp_path, monkeypatch):
    image = write_image(numbers((4, 600, 600)), tmp_path / "image.zarr", axes="zyx", chunks=(4, 600, 600))
    tiles, read = TileReader([image]), []
    original = type(image.source()).read
    monkeypatch.setattr(type(image.source()), "read", lambda self, *a: read.append(a) or original(self, *a))
    places = [(1, v, u) for v in range(3) for u in range(3)]
    threads = [threading.Thread(target=tiles.read, args=(Tile(0, 0, "xy", 0, 0, place),)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 1


def test_cost_of_a_tile_bounds_what_is_decoded(store):
    image = open_image(store)
    for level, plane in ((k, p) for k in range(len(image.levels)) for p in PLANES):
        reader = image.source(level)
        across, down, right = PLANES[plane]
        shape, chunks = reader.shape, reader.chunks
        worst = 0
        for _ in range(shape[across]):
            for v in range(0, shape[down], slices.TILE):
                for u in range(0, shape[right], slices.TILE):
                    counts = {across: 1}
                    for axis, start in ((down, v), (right, u)):
                        last = min(start + slices.TILE, shape[axis]) - 1
                        counts[axis] = last // chunks[axis] - start // chunks[axis] + 1
                    worst = max(worst, np.prod([counts[a] * chunks[a] for a in range(3)]) * 2)
        assert worst <= tile_nbytes(reader, plane) <= 2 * worst


def huge(path, chunks, shape=(4000, 40000, 40000), n_levels=1):
    """Write metadata of a store that is far larger than this machine; all voxels are absent."""
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    scales = [[1.0, 1.0, 1.0], [8.0, 8.0, 8.0]][:n_levels]
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for k, scale in enumerate(scales)
    ]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    zarr.create_group(path, zarr_format=3, attributes={"ome": ome})
    for k in range(n_levels):
        own = tuple(n // 8**k for n in shape)
        own_chunks = tuple(min(c, n) for c, n in zip(chunks if k == 0 else (64, 64, 64), own, strict=True))
        zarr.create_array(
            path / str(k), shape=own, dtype="u2", zarr_format=3, fill_value=7, chunks=own_chunks
        )
    return path


def test_terabytes_cost_no_more_than_a_tile(tmp_path):
    path = huge(tmp_path / "image.zarr", (64, 64, 64))
    with serving(path) as server:
        tracemalloc.start()
        answer = ask(server, "tile/0/0/yz/0/0/39999/15/156")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert answer.status == 200
    assert (np.frombuffer(answer.body, "<u2") == 7).all()
    assert len(answer.body) == 2 * (4000 - 15 * 256) * (40000 - 156 * 256)
    assert peak < 4 * tile_nbytes(open_image(path).source(), "yz") < 60e6


def test_a_level_of_huge_chunks_is_left_out_and_the_page_is_told(tmp_path):
    path = huge(tmp_path / "image.zarr", (512, 1024, 1024), n_levels=2)
    image = open_image(path)
    assert readable_levels(image, "xy") == [1]
    with serving(path) as server:
        scene = json.loads(ask(server, "scene.json").body)
        refused = ask(server, "tile/0/0/xy/0/0/0/0/0")
        shown = ask(server, "tile/0/1/xy/0/0/0/0/0")
    assert [level["planes"] for level in scene["sources"][0]["levels"]] == [[], ["xy", "xz", "yz"]]
    assert scene["notes"] == [
        "image.zarr, xy, xz, yz: a tile of level 0 decodes 1,074 MB, so level 1 is the finest shown. "
        "Smaller chunks would help."
    ]
    assert refused.status == 422
    assert b"more than is read at once" in refused.body
    assert shown.status == 200


def test_without_a_cheaper_level_the_cheapest_is_shown_up_to_a_limit(tmp_path):
    slow = open_image(huge(tmp_path / "slow.zarr", (250, 512, 512)))
    assert [readable_levels(slow, plane) for plane in PLANES] == [[0], [0], [0]]
    never = open_image(huge(tmp_path / "never.zarr", (1000, 1000, 1000)))
    assert readable_levels(never, "xy") == []


@pytest.mark.parametrize(
    "path",
    [
        "tile/9/0/xy/0/0/0/0/0", "tile/0/9/xy/0/0/0/0/0", "tile/0/0/xy/1/0/0/0/0", "tile/0/0/xy/0/1/0/0/0",
        "tile/0/0/xy/0/0/20/0/0", "tile/0/0/xy/0/0/0/2/0", "tile/0/0/xy/0/0/0/0/-1", "tile/0/0/zy/0/0/0/0/0",
        "tile/0/0/xy/0/0/0/0", "tile/0/0/xy/0/0/0/0/99999999", "tile/", "object/0", "object/7/0/1", "nothing",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_not_found(server, path):
    assert ask(server, path).status == 404


def test_a_damaged_chunk_is_told_and_the_rest_still_shown(tmp_path):
    path = honest(tmp_path / "image.zarr", labels=False)
    (path / "0/c/0/0/0").write_bytes(b"nothing that can be decoded")
    with serving(path) as server:
        answer = ask(server, "tile/0/0/xy/0/0/0/0/0")
        assert answer.status == 422
        assert b"cannot be decoded" in answer.body
        assert ask(server, "tile/0/1/xy/0/0/0/0/0").status == 200


def test_an_error_nobody_thought_of_is_answered_and_the_server_goes_on(tmp_path, monkeypatch):
    path = honest(tmp_path / "image.zarr", labels=False)
    with serving(path) as server:
        monkeypatch.setattr(server.tiles, "read", lambda tile: 1 // 0)
        answer = ask(server, "tile/0/0/xy/0/0/0/0/0")
        assert (answer.status, answer.body) == (500, b"ZeroDivisionError: integer division or modulo by zero")
        assert ask(server, "scene.json").status == 200


def test_tiles_are_packed_for_those_who_unpack(server, store):
    import gzip

    plain = ask(server, "tile/0/0/xy/0/0/3/0/1")
    packed = ask(server, "tile/0/0/xy/0/0/3/0/1", Accept_Encoding="gzip, br")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body
    np.testing.assert_array_equal(
        np.frombuffer(plain.body, "<u2").reshape(256, 24), open_image(store).data[3, :256, 256:].compute()
    )


# What is shown


def test_the_scene_tells_geometry_channels_and_colours(tmp_path):
    path = tmp_path / "image.zarr"
    write_image(
        numbers((2, 8, 20, 30)),
        path,
        axes="czyx",
        voxel_size=VOXEL_SIZE,
        channels=["<b>nuclei</b>", "membrane"],
    )
    write_labels(numbers((8, 20, 30), "u2"), path, "cells")
    own = path / "labels/cells/zarr.json"
    colors = [
        {"label-value": 3, "rgba": [1, 2, 3, 4]}, {"label-value": 4, "rgba": [1, 2, 4]},
        {"label-value": "5", "rgba": [0, 0, 0, 0]}, {"label-value": 10**30, "rgba": [0, 0, 0, 0]}, "none",
    ]  # fmt: skip
    edit(own, "attributes", "ome", "image-label", "colors", to=colors)
    with serving(path) as server:
        scene = json.loads(ask(server, "scene.json").body)
    image, cells = scene["sources"]
    assert (image["kind"], image["dtype"], cells["kind"], cells["dtype"]) == (
        "image",
        "uint16",
        "labels",
        "uint16",
    )
    assert [c["name"] for c in image["channels"]] == ["<b>nuclei</b>", "membrane"]
    assert [c["color"] for c in image["channels"]] == ["00ff00", "ff00ff"]
    assert all(len(c["window"]) == 2 for c in image["channels"])
    assert cells["colors"] == {"3": [1, 2, 3, 4]}
    opened = open_image(path)
    for level, told in zip(opened.levels, image["levels"], strict=True):
        assert tuple(told["scale"]) == level.voxel_size
        assert tuple(told["translation"]) == level.translation
        assert tuple(told["shape"]) == level.reader.spatial_shape


@pytest.mark.parametrize(
    "omero", [None, [], {"channels": 3}, {"channels": [None, {"window": {"start": "a"}, "color": 7}]}]
)
def test_omero_metadata_may_be_missing_or_wrong(tmp_path, omero):
    path = tmp_path / "image.zarr"
    write_image(numbers((2, 20, 30)), path, axes="cyx")
    edit(path / "zarr.json", "attributes", "ome", "omero", to=omero)
    with serving(path) as server:
        channels = json.loads(ask(server, "scene.json").body)["sources"][0]["channels"]
    assert [(c["window"], c["active"]) for c in channels] == [(None, True), (None, True)]


def test_before_is_the_input_that_provenance_names(tmp_path):
    data = numbers((6, 40, 40)).astype("f4")
    write_image(data, tmp_path / "raw.zarr", axes="zyx", voxel_size=VOXEL_SIZE)
    psf = np.ones((1, 3, 3), "f4")
    cr.run(
        [cr.RichardsonLucy(psf=psf, iterations=1)], tmp_path / "raw.zarr", tmp_path / "out.zarr",
        cluster="serial", quiet=True,
    )  # fmt: skip
    found = open_sources(tmp_path / "out.zarr")
    assert [(s.kind, s.name) for s in found] == [("image", "out.zarr"), ("before", "raw.zarr")]
    (tmp_path / "raw.zarr").rename(tmp_path / "moved.zarr")
    assert [s.kind for s in open_sources(tmp_path / "out.zarr")] == ["image"]
    write_image(data[:3], tmp_path / "raw.zarr", axes="zyx")
    assert [s.kind for s in open_sources(tmp_path / "out.zarr")] == ["image"]
    given = open_sources(tmp_path / "out.zarr", before=tmp_path / "moved.zarr")
    assert [s.name for s in given] == ["out.zarr", "moved.zarr"]


@pytest.mark.parametrize("place", ["http://127.0.0.1:1/x.zarr", 7, None, "\0", "/proc/self/mem", {"a": 1}])
def test_provenance_that_leads_nowhere_is_no_input(tmp_path, place):
    path = tmp_path / "image.zarr"
    write_image(numbers((20, 30)), path, axes="yx")
    edit(
        path / "zarr.json",
        "attributes",
        "chunkrestore",
        to={"provenance": {"input": {"store": place, "array": "0"}}},
    )
    assert [s.kind for s in open_sources(path)] == ["image"]


def test_labels_alone_can_be_shown_with_what_they_were_made_from(tmp_path):
    raw, path = tmp_path / "raw.zarr", tmp_path / "labels.zarr"
    write_image(numbers((6, 40, 40)), raw, axes="zyx", voxel_size=VOXEL_SIZE)
    write_labels(numbers((6, 40, 40), "i8"), path, "cells", like=raw)
    for place in (path, path / "labels/cells"):
        assert [(s.kind, s.name) for s in open_sources(place)] == [("labels", "cells")]
    source = open_image(raw).source().identity()
    edit(path / "labels/cells/zarr.json", "attributes", "chunkrestore", to={"provenance": {"input": source}})
    assert [(s.kind, s.name) for s in open_sources(path)] == [("image", "raw.zarr"), ("labels", "cells")]


def test_labels_are_chosen_by_name(store):
    assert [s.kind for s in open_sources(store, labels=())] == ["image"]
    assert [s.name for s in open_sources(store, labels="cells")] == ["image.zarr", "cells"]
    with pytest.raises(ValueError, match=r"`labels` 'nuclei' do not exist in .*; it has 'cells'"):
        open_sources(store, labels=["nuclei"])


def test_what_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_sources(tmp_path / "nothing.zarr")
    zarr.create_group(tmp_path / "group.zarr")
    with pytest.raises(ValueError, match="plain zarr group"):
        open_sources(tmp_path / "group.zarr")


# Objects


def table(path, n=1000, **options):
    import pyarrow
    import pyarrow.parquet as parquet

    rows = pyarrow.table(
        {
            "t": np.zeros(n, "i4"), "c": np.zeros(n, "i4"), "label": np.arange(1, n + 1),
            "volume_um3": np.arange(n) / 8, "touches_border": np.arange(n) % 2 == 0,
            "probability": np.full(n, np.nan, "f4"),
            "distances": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(4 * n, "f4")), 4),
        }
    )  # fmt: skip
    parquet.write_table(rows, path, **options)


def test_a_row_of_the_table_is_found_without_reading_the_others(tmp_path, monkeypatch):
    import pyarrow.parquet as parquet

    table(tmp_path / "objects.parquet", row_group_size=100)
    read = []
    original = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1]) or original(*a, **k)
    )
    row = read_object(str(tmp_path), 555)
    assert row == {
        "t": 0,
        "c": 0,
        "label": 555,
        "volume_um3": 69.25,
        "touches_border": True,
        "probability": None,
    }
    assert read == [5]
    assert read_object(str(tmp_path), 1001) is None
    assert read_object(str(tmp_path), 1, t=1) is None
    assert read_object(str(tmp_path), 2**64 - 1) is None
    assert read_object(str(tmp_path / "elsewhere"), 1) is None
    assert read == [5]


def test_a_table_that_is_none_or_too_large_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "objects.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"objects\.parquet cannot be read"):
        read_object(str(tmp_path), 1)
    table(tmp_path / "objects.parquet")
    monkeypatch.setattr("chunkrestore.viewer.objects.MAX_GROUP_NBYTES", 1000)
    with pytest.raises(ValueError, match="lie together, more than 1000"):
        read_object(str(tmp_path), 1)


def test_objects_are_answered_as_json(store, server):
    table(store / "labels/cells/objects.parquet")
    assert json.loads(ask(server, "object/1/0/8").body)["volume_um3"] == 0.875
    assert json.loads(ask(server, "object/1/0/5000").body) is None
    assert json.loads(ask(server, "object/0/0/8").body) is None


# The raw store


def test_zarr_reads_the_raw_store_through_the_server(server, store):
    obstore = pytest.importorskip("obstore.store")
    from zarr.storage import FsspecStore, ObjectStore

    url = f"{server.url}store"
    for opened in (
        FsspecStore.from_url(url, read_only=True),
        ObjectStore(obstore.HTTPStore(url, client_options={"allow_http": True}), read_only=True),
    ):
        group = zarr.open_group(opened, mode="r", zarr_format=3)
        assert group.attrs["ome"]["version"] == "0.5"
        array = group["0"]
        assert array.shards == (16, 256, 256)
        np.testing.assert_array_equal(
            array[15:18, 250:260, 100:130], open_image(store).data[15:18, 250:260, 100:130].compute()
        )
        np.testing.assert_array_equal(
            group["labels/cells/0"][3], open_image(store).label("cells").data[3].compute()
        )
        with pytest.raises(KeyError):
            group["9"]


def test_an_image_is_opened_by_this_package_through_the_server(server, store):
    pytest.importorskip("obstore")
    image = open_image(f"{server.url}store")
    assert image.labels == ("cells",)
    np.testing.assert_array_equal(image.data[4].compute(), open_image(store).data[4].compute())


def test_zarr_v2_is_served_as_well(tmp_path):
    path = tmp_path / "image.zarr"
    data = numbers((8, 40, 40))
    write_image(data, path, axes="zyx", version="0.4")
    with serving(path) as server:
        assert ask(server, "store/.zattrs").status == 200
        assert ask(server, "store/0/.zarray").headers["Content-Type"] == "application/json"
        chunk = ask(server, "store/0/0/0/0")
        assert chunk.body == (path / "0/0/0/0").read_bytes()
        assert "|zarr2:" in unquote(server.links[0]["url"])


RANGES = {
    None: (200, slice(None)), "bytes=0-9": (206, slice(0, 10)), "bytes=5-5": (206, slice(5, 6)),
    "bytes=10-": (206, slice(10, None)), "bytes=-7": (206, slice(-7, None)), "bytes=0-99999999": (206, slice(None)),
    "bytes=-99999999": (206, slice(None)), "bytes=0-1,4-5": (200, slice(None)), "bytes=9-3": (200, slice(None)),
    "bytes=a-b": (200, slice(None)), "bytes=-": (200, slice(None)), "lines=0-1": (200, slice(None)),
    "bytes=99999999-": (416, slice(0)), "bytes=-0": (416, slice(0)), "bytes=" + "9" * 30 + "-": (200, slice(None)),
}  # fmt: skip


@pytest.mark.parametrize("wanted", RANGES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_parts_of_files_are_sent_as_the_standard_says(server, store, wanted, method):
    content = (store / "0/c/0/0/0").read_bytes()
    answer = ask(server, "store/0/c/0/0/0", method, **({"Range": wanted} if wanted else {}))
    status, part = RANGES[wanted]
    assert answer.status == status
    assert int(answer.headers["Content-Length"]) == len(content[part])
    assert answer.body == (content[part] if method == "GET" else b"")
    assert answer.headers["Accept-Ranges"] == "bytes"
    if status == 206:
        start = range(len(content))[part].start
        assert (
            answer.headers["Content-Range"]
            == f"bytes {start}-{start + len(content[part]) - 1}/{len(content)}"
        )
    elif status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{len(content)}"
    else:
        assert answer.headers["Content-Range"] is None


def test_a_conditional_range_gets_the_whole(server, store):
    answer = ask(server, "store/zarr.json", Range="bytes=0-1", If_Range='"x"')
    assert (answer.status, answer.body) == (200, (store / "zarr.json").read_bytes())


def test_ranges_of_empty_files():
    assert parse_range(None, 0) is None
    for wanted in ("bytes=0-", "bytes=-1"):
        with pytest.raises(UnsatisfiableRangeError):
            parse_range(wanted, 0)


@pytest.mark.parametrize(
    "key",
    [
        "", "0", "0/", "0/c/0/0", "0/c/9/9/9", "labels", "objects.parquet", "labels/cells/objects.parquet",
        "../image.zarr/zarr.json", "..%2fzarr.json", "%2e%2e/zarr.json", "0/../zarr.json", "./zarr.json",
        "//etc/passwd", "/etc/passwd", "%2fetc/passwd", "..%5czarr.json", "0/c/0/0/0%00", "zarr.json%0a",
        ".chunkrestore/zarr.json", "secret.txt",
        "link/zarr.json", "file/zarr.json", "0/c/0/0/7", "0/c/0/0/9", "0/c/0/0/8", "zarr.json/", "%ff", "C:/zarr.json",
    ],
)  # fmt: skip
def test_nothing_but_documents_and_chunks_of_the_store_is_served(tmp_path, key):
    path = tmp_path / "store" / "image.zarr"
    honest(path)
    (path / "secret.txt").write_text("secret")
    (path / "objects.parquet").write_text("secret")
    (path / ".chunkrestore").mkdir()
    (path / ".chunkrestore/zarr.json").write_text("secret")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "zarr.json").write_text("secret")
    (path / "link").symlink_to(outside)
    (path / "file").mkdir()
    (path / "file/zarr.json").symlink_to(outside / "zarr.json")
    os.mkfifo(path / "0/c/0/0/7")
    (path / "0/c/0/0/8").symlink_to("8")
    (path / "0/c/0/0/9").symlink_to(path / "secret.txt")
    with serving(path) as server:
        for method in ("GET", "HEAD"):
            answer = ask(server, f"store/{key}", method)
            assert answer.status == 404
            assert b"secret" not in answer.body
        assert ask(server, "store/zarr.json").status == 200


def test_a_link_inside_the_store_is_followed(tmp_path):
    path = honest(tmp_path / "image.zarr", labels=False)
    (path / "same").symlink_to("0")
    with open_raw(str(path), "same/zarr.json").file as file:
        assert json.load(file)["node_type"] == "array"


@pytest.mark.parametrize(
    "key", ["zarr.json", "0/c/1/2/3", "a b/0.0.1", "0/c.0.1", "labels/x/.zattrs", "c", "%30/zarr.json"]
)
def test_keys_of_zarr_are_recognised(key):
    assert key_of(key) == unquote(key)


# Who may ask


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:9", "127.0.0.1", "[::1]:8000"]
)
def test_loopback_under_any_port_is_answered(server, host):
    assert ask(server, "scene.json", Host=host.format(port=server.server_port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "0.0.0.0",
        "::1",
    ],
)
def test_other_hosts_are_refused(server, host):
    answer = ask(server, "scene.json", Host=host)
    assert answer.status == 421
    assert answer.headers["Connection"] == "close"


def test_no_host_or_two_are_refused(server):
    import socket

    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as plain:
            plain.sendall(
                f"GET /{server.secret}/scene.json HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode()
            )
            assert b" 421 " in plain.makefile("rb").readline()


@pytest.mark.parametrize(
    "path", ["/", "/scene.json", "/wrong/scene.json", "/store/zarr.json", "//scene.json", "*"]
)
def test_without_the_secret_nothing_is_found(server, path):
    answer = ask(server, path, secret=False)
    assert answer.status in (400, 404)
    assert answer.body == b"There is nothing here."


def test_the_server_listens_on_loopback_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
def test_nothing_can_be_changed(server, store, method):
    before = (store / "zarr.json").read_bytes()
    answer = ask(server, "store/zarr.json", method)
    assert answer.status in (405, 501)
    assert (store / "zarr.json").read_bytes() == before


def test_a_body_is_not_taken_for_the_next_request(server):
    import socket

    inner = f"GET /{server.secret}/scene.json HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as plain:
        head = f"GET /{server.secret}/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(inner)}\r\n\r\n"
        plain.sendall(head.encode() + inner)
        assert plain.makefile("rb").read().count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_that_links_lead_to_may_read_the_files_of_the_store(server, origin):
    for path in ("store/zarr.json", "store/nothing/zarr.json"):
        answer = ask(server, path, Origin=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Vary"] == "Origin"
        assert "Content-Range" in answer.headers["Access-Control-Expose-Headers"]
    asked = ask(
        server, "store/0/c/0/0/0", "OPTIONS", Origin=origin, Access_Control_Request_Method="GET",
        Access_Control_Request_Headers="range", Access_Control_Request_Private_Network="true",
    )  # fmt: skip
    assert asked.status == 204
    assert asked.headers["Access-Control-Allow-Headers"] == "Range"
    assert asked.headers["Access-Control-Allow-Private-Network"] == "true"
    for path in ("scene.json", "tile/0/0/xy/0/0/0/0/0", ""):
        assert ask(server, path, Origin=origin).headers["Access-Control-Allow-Origin"] is None
        assert ask(server, path, "OPTIONS", Origin=origin).status == 403


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost",
        "https://neuroglancer-demo.appspot.com.evil.example",
    ],
)
def test_other_pages_may_read_nothing(server, origin):
    for path in ("store/zarr.json", "scene.json"):
        assert ask(server, path, Origin=origin).headers["Access-Control-Allow-Origin"] is None
    assert ask(server, "store/zarr.json", "OPTIONS", Origin=origin).status == 403


def test_every_answer_forbids_foreign_code(server):
    for path in ("", "viewer.js", "scene.json", "nothing", "store/zarr.json", "tile/0/0/xy/0/0/0/0/0"):
        headers = ask(server, path).headers
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"


def test_errors_repeat_nothing_of_the_request(server):
    answer = ask(server, "<script>alert(1)</script>")
    assert (answer.status, answer.headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert b"script" not in answer.body


def test_many_ask_together(server, store):
    data, wrong = open_image(store).data.compute(), []

    def look(n):
        for i in range(10):
            body = ask(server, f"tile/0/0/xy/0/0/{(n + i) % 20}/0/0").body
            if not np.array_equal(
                np.frombuffer(body, "<u2").reshape(256, 256), data[(n + i) % 20, :256, :256]
            ):
                wrong.append((n, i))

    threads = [threading.Thread(target=look, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Links


def test_links_name_every_layer_where_it_is_served(server):
    links = {link["name"]: link["url"] for link in server.links}
    host, state = links["neuroglancer"].split("/#!")
    assert host == ORIGINS[0]
    layers = json.loads(unquote(state))["layers"]
    assert [(layer["type"], layer["name"]) for layer in layers] == [
        ("image", "image.zarr"),
        ("segmentation", "cells"),
    ]
    assert layers[0]["source"] == f"{server.url}store/|zarr3:"
    assert layers[1]["source"] == f"{server.url}store/labels/cells/|zarr3:"
    assert len(layers[0]["shaderControls"]["normalized"]["range"]) == 2
    assert links["vizarr"] == f"{ORIGINS[1]}/vizarr/?source={server.url}store"
    for layer in layers:
        path = urlsplit(layer["source"].split("|")[0]).path.removeprefix(f"/{server.secret}/")
        assert json.loads(ask(server, f"{path}zarr.json").body)["attributes"]["ome"]["multiscales"]


def test_channels_are_left_to_neuroglancer(tmp_path):
    write_image(numbers((2, 20, 30)), tmp_path / "image.zarr", axes="cyx")
    with serving(tmp_path / "image.zarr") as server:
        state = json.loads(unquote(server.links[0]["url"].split("#!")[1]))
    assert [layer["type"] for layer in state["layers"]] == ["auto"]
    assert state["layout"] == "xy"


def test_a_store_at_a_url_is_shown_but_not_handed_on(server):
    pytest.importorskip("obstore")
    with serving(f"{server.url}store") as second:
        assert second.links == []
        assert ask(second, "store/zarr.json").status == 404
        assert ask(second, "tile/0/0/xy/0/0/3/0/0").body == ask(server, "tile/0/0/xy/0/0/3/0/0").body


def test_an_archive_is_shown_but_not_handed_on(store, tmp_path):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "image.zarr"), "zip", store)
    with serving(archive) as server:
        assert server.links == []
        assert ask(server, "store/zarr.json").status == 404
        found = np.frombuffer(ask(server, "tile/1/0/xy/0/0/3/0/0").body, "<i4").reshape(256, 256)
        np.testing.assert_array_equal(found, open_image(store).label("cells").data[3, :256, :256].compute())
        assert json.loads(ask(server, "object/1/0/8").body) is None


# The function


def test_view_serves_until_it_is_interrupted(store):
    script = f"from chunkrestore.viewer import view; view({str(store)!r}, viewer='web', browser=False)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        told = "".join(iter(process.stdout.readline, "  Ctrl-C ends it.\n"))
        url = told.split(" is shown at ")[1].partition("\n")[0]
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("GET", urlsplit(url).path)
        assert b"<title>chunkrestore</title>" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "neuroglancer: https://neuroglancer-demo.appspot.com/#!" in told
    assert out == "ended\n"


def test_a_port_that_is_taken_is_named(server, store):
    with pytest.raises(
        OSError, match=f"`port` {server.server_port} of 127.0.0.1 cannot be used: .*; choose another"
    ):
        view(store, port=server.server_port, browser=False, viewer="web")


def test_wrong_arguments_are_named_before_anything_is_opened():
    with pytest.raises(ValueError, match="`viewer` 'fiji' is not known, only 'auto', 'napari', 'web'"):
        view("nothing.zarr", viewer="fiji")
    with pytest.raises(ValueError, match="`port` 70000 must lie between 0"):
        view("nothing.zarr", port=70000)


def test_looking_loads_nothing_heavy_before_it_is_asked_to():
    heavy = "('zarr', 'napari', 'pyarrow', 'PIL')"
    code = f"import sys, chunkrestore.viewer; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

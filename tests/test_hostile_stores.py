"""Stores that were made to harm: named errors, bounded memory and time, nothing outside the output touched."""

import bz2
import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs.runner import BlockError
from chunkrestore.ome_zarr import CorruptChunkError, info, limits, open_image, open_writer
from chunkrestore.ome_zarr.store import clean_partial

SHAPE = (4, 32, 32)
CHUNKS = (4, 16, 16)
CHUNK_NBYTES = 2 * 4 * 16 * 16
BOMB_NBYTES = 2**27
"""An eighth of a gigabyte, where a chunk has two kilobytes."""


def voxels():
    return (np.arange(np.prod(SHAPE)) % 251).astype("u2").reshape(SHAPE)


def honest(path, version="0.5", labels=True, **array):
    """Write a store of two levels and one label image by zarr and JSON alone."""
    fmt = 2 if version == "0.4" else 3
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": [1.0, 0.5 * 2**k, 0.5 * 2**k]}]}
        for k in range(2)
    ]
    multiscale = {"axes": axes, "datasets": datasets} | ({"version": version} if fmt == 2 else {})
    ome = {"multiscales": [multiscale]}
    zarr.create_group(path, zarr_format=fmt, attributes=ome if fmt == 2 else {"ome": {"version": version, **ome}})
    for k, data in enumerate((voxels(), voxels()[:, ::2, ::2])):
        options = {"chunks": CHUNKS} | ({} if fmt == 3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}})
        level = zarr.create_array(
            path / str(k), shape=data.shape, dtype="u2", zarr_format=fmt, fill_value=0, **options | array
        )
        level[...] = data
    if labels:
        own = {"labels": ["cells"]}
        zarr.create_group(
            path / "labels", zarr_format=fmt, attributes=own if fmt == 2 else {"ome": {"version": version, **own}}
        )
        honest(path / "labels/cells", version, labels=False)
    return path


def edit(file, *keys, to):
    """Set the value at `keys` of a JSON document."""
    document = inner = json.loads(file.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    file.write_text(json.dumps(document))


def use(path):
    """Do with a store what a job and its user do: describe it, read every level of it and of its labels."""
    image = open_image(path)
    info(image)
    for part in (image, *(image.label(name) for name in image.labels)):
        for k in range(len(part.levels)):
            reader = part.source(k)
            reader.read(0, 0, tuple(slice(0, n) for n in reader.spatial_shape))
    return image


def tree(folder):
    """Return what is in a folder; of files too large to have been written here, their time."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    small = {p: p.stat().st_size < 2**20 for p in files}
    return {p.relative_to(folder): p.read_bytes() if small[p] else p.stat().st_mtime_ns for p in files}


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Make honest stores once per kind, and return a copier of them."""
    root = tmp_path_factory.mktemp("templates")

    def copy(path, version="0.5", shards=None):
        made = root / f"{version} {shards}"
        if not made.exists():
            honest(made, version, **({"shards": shards} if shards else {}))
        return shutil.copytree(made, path)

    return copy


@pytest.fixture
def outside(tmp_path, templates):
    """A folder beside the store, which looks like a level and must never change."""
    folder = tmp_path / "outside"
    templates(folder / "image.zarr")
    shutil.copytree(folder / "image.zarr/0", folder / "0")
    (folder / "secret.txt").write_text("keep me")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


# Every case is made in a folder with `outside` beside it, and changes the honest store `s` in there.

OME = ("attributes", "ome", "multiscales", 0)
SCALE = (*OME, "datasets", 0, "coordinateTransformations", 0, "scale")
GRID = ("chunk_grid", "configuration", "chunk_shape")
INNER = ("codecs", 0, "configuration")


@dataclass(frozen=True)
class Case:
    """One hostile store."""

    name: str
    make: object
    """Changes the honest store at a path."""
    message: str
    error: type = ValueError
    version: str = "0.5"
    shards: tuple | None = None


def group(*keys, to):
    return lambda s: edit(s / "zarr.json", *keys, to=to)


def array(*keys, to):
    return lambda s: edit(s / "0/zarr.json", *keys, to=to)


def array2(*keys, to):
    return lambda s: edit(s / "0/.zarray", *keys, to=to)


def labelled(names):
    return lambda s: edit(s / "labels/zarr.json", "attributes", "ome", "labels", to=names)


def both(*steps):
    return lambda s: [step(s) for step in steps]


def write(name, content):
    return lambda s: (s / name).write_bytes(content)


def chunk(content):
    return write("0/c/0/0/0", content)


def compressed(codec, content):
    """Make level 0 one of another codec, with one chunk of given bytes."""

    def make(s):
        edit(s / "0/zarr.json", "codecs", to=[{"name": "bytes", "configuration": {"endian": "little"}}, codec])
        for file in (s / "0/c").rglob("*"):
            if file.is_file():
                file.unlink()
        chunk(content)(s)

    return make


def linked(name, target):
    """Replace a member by a link to something outside the store."""

    def make(s):
        place = s / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(s.parent / "outside" / target)

    return make


def sparse(name, nbytes):
    def make(s):
        with open(s / name, "r+b") as file:
            file.truncate(nbytes)

    return make


def pipe(name):
    def make(s):
        (s / name).unlink()
        os.mkfifo(s / name)

    return make


def zstd_frame(n_blocks, size):
    """A Zstandard frame without content size: blocks that repeat one byte."""
    block = ((size << 3) | 2).to_bytes(3, "little") + b"\x07"
    last = ((size << 3) | 3).to_bytes(3, "little") + b"\x07"
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * (n_blocks - 1) + last


def stream(compressor):
    """Compress zeros piece by piece, so that the test itself stays small."""
    zeros = bytes(2**20)
    return b"".join([*(compressor.compress(zeros) for _ in range(BOMB_NBYTES >> 20)), compressor.flush()])


def shard(*entries, n_bytes=0, crc=True):
    """A shard of four chunks with an index that says `entries`."""
    import google_crc32c

    full = [*entries, *[(2**64 - 1, 2**64 - 1)] * (4 - len(entries))]
    index = b"".join(struct.pack("<QQ", *e) for e in full)
    checksum = google_crc32c.value(index) if crc else 7
    return bytes(n_bytes) + index + struct.pack("<I", checksum)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(s):
    """A store of zarr v2 whose chunk is a pickle that leaves a mark."""
    for key, value in (("dtype", "|O"), ("filters", [{"id": "pickle", "protocol": 5}]), ("compressor", None)):
        edit(s / "0/.zarray", key, to=value)
    (s / "0/0/0/0").write_bytes(pickle.dumps(Trap(s.parent / "outside/unpickled")))


SHARDS = (4, 32, 32)
DEEP = b'{"zarr_format": 3, "node_type": "group", "attributes": ' + b'{"a":' * 100 + b"1" + b"}" * 101
PYTHON_DEEP = b'{"attributes":' + b"[" * 10**6

METADATA = [
    Case("parent path", group(*OME, "datasets", 0, "path", to="../outside/0"), "member path '../outside/0' leaves"),
    Case("inner parent path", group(*OME, "datasets", 0, "path", to="0/../../outside/0"), "member path .* leaves"),
    Case("absolute path", group(*OME, "datasets", 0, "path", to="/etc"), "member path '/etc' leaves"),
    Case("url", group(*OME, "datasets", 0, "path", to="http://127.0.0.1/0"), "member path 'http://.* leaves"),
    Case("backslashes", group(*OME, "datasets", 0, "path", to="..\\outside\\0"), "member path .* leaves"),
    Case("drive", group(*OME, "datasets", 0, "path", to="C:outside"), "member path 'C:outside' leaves"),
    Case("empty path", group(*OME, "datasets", 0, "path", to=""), "member path '' leaves"),
    Case("dot path", group(*OME, "datasets", 0, "path", to="."), r"member path '\.' leaves"),
    Case("null byte", group(*OME, "datasets", 0, "path", to="0\0"), "member path .* in printable characters"),
    Case("terminal", group(*OME, "datasets", 0, "path", to="\x1b[2J0"), "member path .* in printable characters"),
    Case("surrogate", group(*OME, "datasets", 0, "path", to="\ud800"), "member path .* in printable characters"),
    Case("long name", group(*OME, "datasets", 0, "path", to="a" * 10**6), "member path 'aaa.* leaves"),
    Case("path is a number", group(*OME, "datasets", 0, "path", to=0), "datasets.*path"),
    Case("missing level", group(*OME, "datasets", 0, "path", to="7"), "7.* is missing", FileNotFoundError),
    Case("label name", labelled(["../../outside"]),
         "attribute `labels`: member path '../../outside' leaves"),
    Case("label is a number", labelled([3]),
         "attribute `labels`: member path 3 leaves"),
    Case("plate", group("attributes", "ome", to={"version": "0.5", "plate": {"wells": [{"path": "../../x"}]}}),
         r"`plate.wells\[0\].path`: member path '../../x' leaves"),
    Case("well", group("attributes", "ome", to={"version": "0.5", "well": {"images": [{"path": "/x"}]}}),
         r"`well.images\[0\].path`: member path '/x' leaves"),
    Case("wells are text", group("attributes", "ome", to={"version": "0.5", "plate": {"wells": "abc"}}), "holds labels but no image"),
    Case("axes in another order", array("dimension_names", to=["x", "y", "z"]), "calls its axes 'xyz'.* but its group 'zyx'"),
    Case("names of axes", array("dimension_names", to=["z", "y"]), "image.zarr/0 cannot be opened"),
    Case("level is a link", linked("0", "0"), "image.zarr/0 leads out of its group"),
    Case("labels are a link", linked("labels", "image.zarr"), "image.zarr/labels leads out of its group"),
    Case("label is a link", linked("labels/cells", "image.zarr"), "labels/cells leads out of its group"),
    Case("folder on the way is a link", both(linked("deep", ""), group(*OME, "datasets", 0, "path", to="deep/0")),
         "image.zarr/deep/0 leads out of its group"),
    Case("huge shape", array("shape", to=[2**40, 2**40, 2**40]), r"`shape` \[1099511627776, .* from 0 to 2147483648"),
    Case("shape that overflows", array("shape", to=[2**31, 2**31, 4]), "`shape` .* beyond 5 axes or 9007199254740992 voxels"),
    Case("endless shape", array("shape", to=[10**4000, 1, 1]), "`shape` .* must be a list of integers"),
    Case("negative shape", array("shape", to=[-4, 32, 32]), r"`shape` \[-4, 32, 32\] must be a list of integers"),
    Case("shape of floats", array("shape", to=[4.0, 32, 32]), "`shape` .* must be a list of integers"),
    Case("shape of booleans", array("shape", to=[True, 32, 32]), r"`shape` \[True, 32, 32\] must be a list of integers"),
    Case("no shape", array("shape", to=None), "`shape` None must be a list of integers"),
    Case("empty shape", array("shape", to=[0, 32, 32]), "is empty"),
    Case("many axes", array("shape", to=[1] * 40), "`shape` .* beyond 5 axes"),
    Case("many channels", both(array("shape", to=[2**17, 64, 64]), array(*GRID, to=[1, 64, 64]), group(*OME, "axes", 0, to={"name": "c", "type": "channel"})),
         "is 131072 long on axis 'c', where at most 65536"),
    Case("zero chunks", array(*GRID, to=[0, 16, 16]), r"`chunk_shape` \[0, 16, 16\] must"),
    Case("negative chunks", array(*GRID, to=[4, -16, 16]), "`chunk_shape` .* must be a list"),
    Case("float chunks", array(*GRID, to=[4, 1.5, 16]), "`chunk_shape` .* must be a list"),
    Case("huge chunks", array(*GRID, to=[2**11] * 3), "a chunk of .* takes 17179869184 bytes"),
    Case("few chunk lengths", array(*GRID, to=[16, 16]), "`chunk_shape` .* has 2 lengths"),
    Case("tiny chunks", both(array("shape", to=[512] * 3), array(*GRID, to=[1, 1, 1])),
         "makes 134217728 chunks of 1 voxels, more than 65536"),
    Case("long axis of chunks", both(array("shape", to=[2**21, 64, 64]), array(*GRID, to=[1, 64, 64])),
         "makes 2097152 chunks on one axis"),
    Case("other grid", array("chunk_grid", "name", to="rectilinear"), "`chunk_grid` .* only 'regular'"),
    Case("structured dtype", array("data_type", to={"name": "structured", "configuration": {"fields": []}}), "`data_type` .* is not supported"),
    Case("text dtype", array("data_type", to="string"), "`data_type` 'string' is not supported"),
    Case("raw dtype", array("data_type", to="r8000000"), "`data_type` 'r8000000' is not supported"),
    Case("complex dtype", array("data_type", to="complex128"), "`data_type` 'complex128' is not supported"),
    Case("fill value is a list", array("fill_value", to=[1]), r"`fill_value` \[1\] is no number"),
    Case("fill value is text", array("fill_value", to="high"), "image.zarr/0 cannot be opened"),
    Case("fill value overflows", array("fill_value", to=10**30), "image.zarr/0 cannot be opened"),
    Case("unknown codec", array("codecs", 1, "name", to="homemade"), "`codecs` name 'homemade', which is not supported"),
    Case("unbounded codec", array("codecs", 1, "name", to="numcodecs.lzma"), "`codecs` name 'numcodecs.lzma', which is not"),
    Case("code as codec", array("codecs", 1, "name", to="os.system"), "`codecs` name 'os.system', which is not supported"),
    Case("compressed twice", array("codecs", to=["bytes", {"name": "zstd"}, {"name": "gzip"}]), "compress more than once"),
    Case("no codecs", array("codecs", to={}), "`codecs` {} is not a list"),
    Case("objects in a filter", array("codecs", 0, to={"name": "numcodecs.astype", "configuration": {"encode_dtype": "O", "decode_dtype": "<u2"}}),
         "`codecs.numcodecs.astype.encode_dtype` 'O' is not supported"),
    Case("storage transformers", array("storage_transformers", to=[{"name": "x"}]), "`storage_transformers` are not supported"),
    Case("strange chunk keys", array("chunk_key_encoding", to={"name": "../../outside"}), "image.zarr/0 cannot be opened"),
    Case("separator", array("chunk_key_encoding", to={"name": "default", "configuration": {"separator": "/../"}}), "image.zarr/0 cannot be opened"),
    Case("unknown format", array("zarr_format", to=4), "image.zarr/0 cannot be opened"),
    Case("pickle", pickled, "`dtype` .* is not supported", version="0.4"),
    Case("pickle as filter", array2("filters", to=[{"id": "pickle"}]), "`filters` name 'pickle', which is not", version="0.4"),
    Case("json2 as compressor", array2("compressor", to={"id": "json2"}), "`compressor` name 'json2', which is not", version="0.4"),
    Case("structured dtype of v2", array2("dtype", to=[["a", "<u2"], ["b", "|S1000000"]]), "`dtype` .* is not supported", version="0.4"),
    Case("filters are text", array2("filters", to="delta"), "`filters` 'delta' is not a list", version="0.4"),
    Case("huge shape of v2", array2("shape", to=[2**40, 32, 32]), "`shape` .* must be a list of integers", version="0.4"),
    Case("negative chunks of v2", array2("chunks", to=[-4, 16, 16]), "`chunks` .* must be a list of integers", version="0.4"),
    Case("order of v2", array2("order", to="A" * 100), "image.zarr/0 cannot be opened", version="0.4"),
    Case("separator of v2", array2("dimension_separator", to="/../"), "image.zarr/0 cannot be opened", version="0.4"),
    Case("shard inside a shard", array(*INNER, "codecs", to=[{"name": "sharding_indexed"}]),
         "`sharding_indexed.codecs` name 'sharding_indexed'", shards=SHARDS),
    Case("chunks of a shard", array(*INNER, "chunk_shape", to=[4, 0, 16]), "chunk_shape` .* must", shards=SHARDS),
    Case("chunks that do not fill a shard", array(*INNER, "chunk_shape", to=[4, 5, 16]), "cannot be opened", shards=SHARDS),
    Case("many chunks in a shard", both(array(*GRID, to=[2048] * 3), array(*INNER, "chunk_shape", to=[4] * 3)),
         "makes 134217728 chunks per shard", shards=SHARDS),
    Case("huge shard", array(*GRID, to=[4096] * 3), "a shard of .* takes 137438953472", shards=SHARDS),
    Case("compressed index", array(*INNER, "index_codecs", to=[{"name": "bytes"}, {"name": "zstd"}]),
         "`index_codecs` name 'zstd'", shards=SHARDS),
    Case("NaN in the scale", group(*SCALE, to=[float("nan"), 1, 1]), "scale .* must hold finite numbers"),
    Case("infinite scale", group(*SCALE, to=[float("inf"), 1, 1]), "scale .* must hold finite numbers"),
    Case("endless scale", group(*SCALE, to=[10**400, 1, 1]), "scale .* must hold finite numbers"),
    Case("scale that overflows", group(*SCALE, to=[1e308, 1, 1]), "scale .* none beyond 1e\\+100"),
    Case("scale of booleans", group(*SCALE, to=[True, 1, 1]), "scale .* must hold finite numbers"),
    Case("zero scale", group(*SCALE, to=[0, 1, 1]), "a scale above 0"),
    Case("many levels", group(*OME, "datasets", to=[{"path": "0"}] * 10**4), "more than 64 levels"),
    Case("multiscales are text", group("attributes", "ome", "multiscales", to="0"), "`multiscales` is empty or no list"),
    Case("multiscale is text", group("attributes", "ome", "multiscales", to=["0"]), "`multiscales` is empty or no list"),
    Case("attributes are text", group("attributes", to="ome"), "`attributes` are no object"),
    Case("document is a list", write("zarr.json", b"[]"), "holds no JSON object"),
    Case("document is binary", write("zarr.json", bytes(range(256))), "is not valid JSON"),
    Case("deep document", write("zarr.json", DEEP), "nested deeper than 64"),
    Case("deep beyond the stack", write("zarr.json", PYTHON_DEEP), "zarr.json is nested deeper than 64"),
    Case("huge document", sparse("zarr.json", 2**36), "zarr.json is larger than 67108864 bytes"),
    Case("document is a pipe", pipe("0/zarr.json"), "is a device, pipe or socket"),
    Case("document is a device", linked("zarr.json", "/dev/zero"),
         "is a device, pipe or socket"),
    Case("document is a link to itself", linked("zarr.json", "../image.zarr/zarr.json"),
         "cannot be read"),
]  # fmt: skip


def bomb(name):
    """Return compressed zeros, and the codec that they are for."""
    return {
        "blosc": lambda: bytes(numcodecs.Blosc("zstd").encode(np.zeros(BOMB_NBYTES, "u1"))),
        "zstd": lambda: bytes(numcodecs.Zstd().encode(np.zeros(BOMB_NBYTES, "u1"))),
        "gzip": lambda: stream(zlib.compressobj(1, wbits=31)),
        "numcodecs.zlib": lambda: stream(zlib.compressobj(1)),
        "numcodecs.bz2": lambda: stream(bz2.BZ2Compressor(9)),
        "numcodecs.lz4": lambda: bytes(numcodecs.LZ4().encode(np.zeros(BOMB_NBYTES, "u1"))),
    }[name]()


def corrupt(name, make, message, shards=None):
    return Case(name, make, message, CorruptChunkError, shards=shards)


ZSTD, GZIP = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}, {"name": "gzip", "configuration": {"level": 1}}
HONEST_ZSTD = bytes(numcodecs.Zstd().encode(np.zeros(CHUNK_NBYTES, "u1")))
FIRST = "0/c/0/0/0"
BLOCKS = [
    corrupt("frame that claims more", compressed(ZSTD, numcodecs.Zstd().encode(np.zeros(10**6, "u1"))), "claims to hold 1000000 bytes"),
    corrupt("frame that claims 2^62", compressed(ZSTD, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + bytes(9)), "claims to hold 4611686018427387904"),
    corrupt("frame that claims nothing", compressed(ZSTD, zstd_frame(2048, 2**17)), "Destination buffer is too small"),
    corrupt("frame that holds less", compressed(ZSTD, zstd_frame(1, 100)), "expected to decompress"),
    corrupt("frame that claims less than it holds", compressed(ZSTD, b"\x28\xb5\x2f\xfd\x40\x58" + struct.pack("<H", CHUNK_NBYTES - 256) + zstd_frame(2048, 2**17)[6:]),
            "cannot be decoded"),
    corrupt("no frame", compressed(ZSTD, b"not compressed at all"), "does not begin with a Zstandard frame"),
    corrupt("no header", compressed(ZSTD, b"\x28"), "does not begin with a Zstandard frame"),
    corrupt("gzip that is cut", compressed(GZIP, gzip.compress(bytes(CHUNK_NBYTES))[:-9]), "and then ends"),
    corrupt("gzip that is none", compressed(GZIP, bytes(100)), "compressed data is damaged"),
    corrupt("large chunk file", sparse(FIRST, 2**36), "is larger than"),
    corrupt("chunk is a pipe", pipe(FIRST), "is a device, pipe or socket"),
    corrupt("empty chunk file", chunk(b""), "cannot be decoded"),
    corrupt("chunk behind the shard", write(FIRST, shard((10**6, 100), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt("chunk of 2^63 bytes", write(FIRST, shard((0, 2**63), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt("chunk whose end overflows", write(FIRST, shard((2**64 - 10, 20), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt("chunk without bytes", write(FIRST, shard((0, 0), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt("index of a shard is damaged", write(FIRST, shard((0, 50), n_bytes=50, crc=False)), "cannot be decoded", SHARDS),
    corrupt("shard shorter than its index", write(FIRST, b"short"), "cannot be decoded", SHARDS),
    corrupt("large shard", sparse(FIRST, 2**36), "is larger than", SHARDS),
]  # fmt: skip


@pytest.fixture
def build(tmp_path, templates):
    def make(case):
        path = templates(tmp_path / "image.zarr", case.version, case.shards)
        case.make(path)
        return path

    return make


def names(case):
    return case.name


@pytest.mark.parametrize("case", [*METADATA, *BLOCKS], ids=names)
def test_hostile_store_is_refused_with_the_reason(case, build, outside, capsys):
    path = build(case)
    start = time.monotonic()
    with pytest.raises(case.error, match=case.message) as caught:
        use(path)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 1500
    with pytest.raises(SystemExit) as left:
        main(["info", str(path)])
    assert left.value.code == (2 if opens_not(path) else 0)
    assert "Traceback" not in capsys.readouterr().err


def opens_not(path):
    try:
        open_image(path)
    except (ValueError, FileNotFoundError):
        return True
    return False


def start_job(source, output, **options):
    return cr.run(cr.Threshold(1.0), source, output, cluster="serial", quiet=True, label_name="found", **options)


@pytest.mark.parametrize("case", [*METADATA, *BLOCKS], ids=names)
def test_job_on_a_hostile_input_ends_with_an_error_and_publishes_nothing(case, build, tmp_path, outside):
    path = build(case)
    before = tree(path)
    try:
        start_job(path, tmp_path / "out.zarr")
    except (ValueError, FileNotFoundError, BlockError):
        with pytest.raises((ValueError, FileNotFoundError)):
            open_image(tmp_path / "out.zarr/labels/found")
    else:
        # Only where the job needs not touch what is hostile
        assert "label" in case.name
    assert tree(path) == before


# Outputs: everything below replaces, or adds to, a store that somebody else made.


def replace(output, how):
    """Write a new image, or labels, into an output; returns whether it was refused."""
    try:
        if how == "image":
            cr.write_image(voxels(), output, axes="zyx", voxel_size=(1, 1, 1), levels=2, overwrite=True)
        else:
            cr.write_labels(voxels().astype("i4"), output, "cells", axes="zyx", voxel_size=(1, 1, 1), overwrite=True)
    except (ValueError, FileExistsError, FileNotFoundError):
        return True
    return False


@pytest.mark.parametrize("how", ["image", "labels"])
@pytest.mark.parametrize("case", METADATA, ids=names)
def test_replacing_a_hostile_output_is_refused_or_done_and_touches_nothing_else(case, how, build, outside):
    path = build(case)
    if not replace(path, how):
        written = open_image(path if how == "image" else path / "labels/cells")
        np.testing.assert_array_equal(written.data.compute(), voxels())


@pytest.mark.parametrize("how", ["image", "labels"])
def test_job_replaces_a_hostile_output_only_in_its_own_folder(how, templates, tmp_path, outside):
    output = templates(tmp_path / "image.zarr")
    linked("0", "0")(output)
    source = templates(tmp_path / "in.zarr")
    operator = cr.Threshold(1.0) if how == "labels" else cr.RichardsonLucy(np.ones((1, 3, 3)) / 9, iterations=1)
    options = {"cluster": "serial", "quiet": True, "overwrite": True}
    if how == "labels":
        with pytest.raises(ValueError, match="image.zarr/0 leads out of its group"):
            cr.run(operator, source, output, **options)
    else:
        shutil.rmtree(output / "labels")
        cr.run(operator, source, output, **options)
        assert not (output / "0").is_symlink()
        assert open_image(output).dtype == np.float32


WAYS = {
    "level": (linked("0", "0"), "image", None),
    "level below a link": (both(linked("deep", ""), group(*OME, "datasets", 0, "path", to="deep/0")), "image", "deep leads elsewhere"),
    "level that is not listed": (both(linked("0", "0"), group(*OME, "datasets", to=[{"path": "1"}])), "image", "0 leads elsewhere"),
    "labels as a level": (group(*OME, "datasets", 0, "path", to="labels/cells/0"), "image", "lists 'labels/cells/0' as a level"),
    "all labels as a level": (group(*OME, "datasets", 0, "path", to="labels"), "image", "lists 'labels' as a level"),
    "a group as a level": (both(linked("folder", "image.zarr"), group(*OME, "datasets", 0, "path", to="folder")), "image", "which is no array"),
    "labels": (linked("labels", "image.zarr"), "labels", "labels/cells leads elsewhere"),
    "labels of an image": (linked("labels", "image.zarr"), "image", "labels leads out of its group"),
    "one label": (linked("labels/cells", "image.zarr"), "labels", "labels/cells leads elsewhere"),
    "one label of an image": (linked("labels/cells", "image.zarr"), "image", "labels/cells leads out of its group"),
    "level of a label": (linked("labels/cells/0", "0"), "labels", None),
    "documents": (both(linked("zarr.json", "image.zarr/zarr.json"), linked("0/zarr.json", "0/zarr.json")), "image", None),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_or_removed_behind_a_link(way, templates, tmp_path, outside):
    make, how, message = WAYS[way]
    path = templates(tmp_path / "image.zarr")
    make(path)
    before = tree(path)
    if message is None:
        assert not replace(path, how)
        assert not any(p.is_symlink() for p in path.rglob("*"))
    else:
        with pytest.raises(ValueError, match=message):
            if how == "image":
                cr.write_image(voxels(), path, axes="zyx", voxel_size=(1, 1, 1), levels=2, overwrite=True)
            else:
                cr.write_labels(voxels(), path, "cells", axes="zyx", voxel_size=(1, 1, 1), overwrite=True)
        assert tree(path) == before


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_resumed_output_does_not_write_through_links_that_were_put_into_it(version, tmp_path, outside):
    path = tmp_path / "image.zarr"
    writer = cr.ome_zarr.create_image(path, shape=SHAPE, dtype="u2", axes="zyx", version=version, chunks=CHUNKS, levels=1)
    region = tuple(slice(0, n) for n in SHAPE)
    writer.target().write(0, 0, region, voxels())
    first = path / ("0/0" if version == "0.4" else "0/c")
    shutil.rmtree(first)
    first.symlink_to(tmp_path / "outside/0/c")
    # Another process: nothing is remembered of the folders that were written to before
    from chunkrestore.ome_zarr import arrays

    arrays._open.cache_clear()
    with pytest.raises(ValueError, match="leads elsewhere, and nothing is written"):
        open_writer(path).target().write(0, 0, region, voxels())


def test_links_to_files_are_read_through_and_replaced_when_written(templates, tmp_path, outside):
    path = templates(tmp_path / "image.zarr")
    annexed = shutil.copytree(path, tmp_path / "annexed.zarr", copy_function=lambda a, b: os.symlink(a, b))
    np.testing.assert_array_equal(use(annexed).data.compute(), voxels())
    before = tree(path)
    assert not replace(annexed, "image")
    assert tree(path) == before


def test_store_whose_own_path_is_a_link_is_read_and_written(templates, tmp_path):
    path = templates(tmp_path / "image.zarr")
    link = tmp_path / "link.zarr"
    link.symlink_to(path)
    np.testing.assert_array_equal(use(link).data.compute(), voxels())
    assert not replace(link, "labels")
    assert link.is_symlink()
    assert open_image(path).label("cells").dtype == np.int32


def test_cleaning_does_not_follow_links(templates, tmp_path, outside):
    path = templates(tmp_path / "image.zarr")
    hidden = tmp_path / "kept"
    hidden.mkdir()
    (hidden / "x.partial").write_text("of somebody else")
    (path / "inside").symlink_to(hidden)
    (path / "y.partial").write_text("ours")
    assert clean_partial(path) == 1
    assert (hidden / "x.partial").exists()


DAMAGED = {
    "levels leave the group": ("levels", ["../outside/0"]),
    "levels are a number": ("levels", 3),
    "level is a link": ("levels", ["linked"]),
    "factors are missing": ("factors", None),
    "version is unknown": ("version", "9"),
    "metadata is text": ("publish", "ome"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_record_of_unfinished_work_is_refused(what, tmp_path, outside):
    path = tmp_path / "image.zarr"
    cr.ome_zarr.create_image(path, shape=SHAPE, dtype="u2", axes="zyx", levels=1)
    (path / "linked").symlink_to(tmp_path / "outside/0")
    key, value = DAMAGED[what]
    edit(path / "zarr.json", "attributes", "chunkrestore", key, to=value)
    with pytest.raises(ValueError, match="leaves its group|leads elsewhere|was to become is damaged"):
        open_writer(path)


# Memory: in a process of its own, whose peak is known before the bombs are read.

SCRIPT = """
import resource, sys, threading
from chunkrestore.ome_zarr import open_image
honest, *hostile = sys.argv[1:]
def read(path):
    reader = open_image(path).source()
    return reader.read(0, 0, tuple(slice(0, n) for n in reader.spatial_shape))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read(honest)
for path in hostile:
    before = peak()
    try:
        read(path)
        print("read", 0)
    except Exception as error:
        print(type(error).__name__, peak() - before)
"""

BOMBS = {
    "blosc": "blosc", "zstd": "zstd", "gzip": "gzip", "zlib": "numcodecs.zlib", "bz2": "numcodecs.bz2",
    "lz4": "numcodecs.lz4",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_bombs_do_not_unfold(templates, tmp_path):
    stores = []
    for name, codec in BOMBS.items():
        content = bomb(codec)
        assert len(content) < BOMB_NBYTES / 50
        configuration = {"level": 1} if name != "blosc" else {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
        configuration = {} if name == "lz4" else configuration
        stored = {"name": codec, "configuration": configuration}
        for kind in ("plain", "sharded", "0.4"):
            path = templates(tmp_path / f"{name} {kind}.zarr", "0.4" if kind == "0.4" else "0.5", SHARDS if kind == "sharded" else None)
            if kind == "plain":
                compressed(stored, content)(path)
            elif kind == "sharded":
                edit(path / "0/zarr.json", *INNER, "codecs", to=[{"name": "bytes", "configuration": {"endian": "little"}}, stored])
                (path / FIRST).write_bytes(content + shard((0, len(content))))
            else:
                edit(path / "0/.zarray", "compressor", to={"id": codec.removeprefix("numcodecs.")})
                (path / "0/0/0/0").write_bytes(content)
            stores.append(path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, templates(tmp_path / "honest.zarr"), *stores],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = dict(zip([s.name for s in stores], (line.split() for line in done.stdout.splitlines()), strict=True))
    assert {name for name, (error, _) in outcomes.items() if error != "CorruptChunkError"} == set()
    # What the bombs are read from, at most 3 MB each, and a first use of every codec
    assert {name: int(kb) for name, (_, kb) in outcomes.items() if int(kb) > 16 * 1024} == {}


# Fuzzing: one value of a valid document is replaced by another.

ODD = st.one_of(
    st.none(), st.booleans(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**40, 2**63, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf"), "NaN", "../x", "/", "0", "\x00"]),
    st.sampled_from([[], {}, [[]], [None], [{}], ["x"] * 6, [1, 2, 3], [2**40] * 3, {"name": "zstd"}, {"name": []}, {"id": "zlib"}, {"type": ["a"]}]),
)  # fmt: skip


def places(value, path=()):
    """List the keys that lead to every value inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize(("version", "shards"), [("0.4", None), ("0.5", None), ("0.5", SHARDS)])
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_document_is_read_or_refused(data, version, shards, templates, tmp_path_factory):
    path = templates(tmp_path_factory.mktemp("fuzz") / "image.zarr", version, shards)
    files = ["zarr.json", "0/zarr.json", "labels/zarr.json"] if version == "0.5" else [".zattrs", "0/.zarray", ".zgroup", "labels/.zattrs"]
    file = path / data.draw(st.sampled_from(files))
    keys = data.draw(st.sampled_from([k for k in places(json.loads(file.read_text())) if k]))
    edit(file, *keys, to=data.draw(ODD))
    start = time.monotonic()
    try:
        use(path)
        open_image(path).data[:1].compute()
    except (ValueError, FileNotFoundError):
        pass
    assert replace(path, "image") in (True, False)
    assert time.monotonic() - start < 20
    shutil.rmtree(path)

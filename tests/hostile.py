"""Hostile stores: an honest one, what can be done to it, and how that must be answered."""

import bz2
import gzip
import json
import os
import pickle
import shutil
import struct
import zlib
from dataclasses import dataclass

import numcodecs
import numpy as np
import zarr

from chunkrestore.ome_zarr import CorruptChunkError

SHAPE = (4, 32, 32)
CHUNKS = (4, 16, 16)
CHUNK_NBYTES = 2 * 4 * 16 * 16


def voxels():
    return (np.arange(np.prod(SHAPE)) % 251).astype("u2").reshape(SHAPE)


def honest(path, version="0.5", labels=True, **array):
    """Write a store of two levels and one label image by zarr and JSON alone."""
    fmt = 2 if version == "0.4" else 3
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    datasets = [
        {
            "path": str(k),
            "coordinateTransformations": [{"type": "scale", "scale": [1.0, 0.5 * 2**k, 0.5 * 2**k]}],
        }
        for k in range(2)
    ]
    multiscale = {"axes": axes, "datasets": datasets} | ({"version": version} if fmt == 2 else {})
    ome = {"multiscales": [multiscale]}
    zarr.create_group(
        path, zarr_format=fmt, attributes=ome if fmt == 2 else {"ome": {"version": version, **ome}}
    )
    for k, data in enumerate((voxels(), voxels()[:, ::2, ::2])):
        options = {"chunks": CHUNKS} | (
            {} if fmt == 3 else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
        )
        level = zarr.create_array(
            path / str(k), shape=data.shape, dtype="u2", zarr_format=fmt, fill_value=0, **options | array
        )
        level[...] = data
    if labels:
        own = {"labels": ["cells"]}
        zarr.create_group(
            path / "labels",
            zarr_format=fmt,
            attributes=own if fmt == 2 else {"ome": {"version": version, **own}},
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


# Every case is made in a folder with `outside` beside it, and changes the honest store `s` in there.

OME = ("attributes", "ome", "multiscales", 0)
SCALE = (*OME, "datasets", 0, "coordinateTransformations", 0, "scale")
GRID = ("chunk_grid", "configuration", "chunk_shape")
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
FIRST = "0/c/0/0/0"
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


def member(path):
    """Call the first level something else."""
    return group(*OME, "datasets", 0, "path", to=path)


def shape(lengths):
    return array("shape", to=lengths)


def chunks(lengths):
    return array(*GRID, to=lengths)


def dtype(name):
    return array("data_type", to=name)


def codec(name):
    """Call the compressor of the first level something else."""
    return array("codecs", 1, "name", to=name)


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
        edit(s / "0/zarr.json", "codecs", to=[LITTLE, codec])
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


def stream(compressor, nbytes):
    """Compress zeros piece by piece, so that the test itself stays small."""
    zeros = bytes(2**20)
    return b"".join([*(compressor.compress(zeros) for _ in range(nbytes >> 20)), compressor.flush()])


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
    Case("parent path", member("../outside/0"), "member path '../outside/0' leaves"),
    Case("inner parent path", member("0/../../outside/0"), "member path .* leaves"),
    Case("absolute path", member("/etc"), "member path '/etc' leaves"),
    Case("url", member("http://127.0.0.1/0"), "member path 'http://.* leaves"),
    Case("backslashes", member("..\\outside\\0"), "member path .* leaves"),
    Case("drive", member("C:outside"), "member path 'C:outside' leaves"),
    Case("empty path", member(""), "member path '' leaves"),
    Case("dot path", member("."), r"member path '\.' leaves"),
    Case("null byte", member("0\0"), "member path .* in printable characters"),
    Case("terminal", member("\x1b[2J0"), "member path .* in printable characters"),
    Case("surrogate", member("\ud800"), "member path .* in printable characters"),
    Case("long name", member("a" * 10**6), "member path 'aaa.* leaves"),
    Case("path is a number", member(0), "datasets.*path"),
    Case("missing level", member("7"), "7.* is missing", FileNotFoundError),
    Case("label name", labelled(["../../outside"]), "attribute `labels`: member path '../../outside' leaves"),
    Case("label is a number", labelled([3]), "attribute `labels`: member path 3 leaves"),
    Case(
        "plate",
        group("attributes", "ome", to={"version": "0.5", "plate": {"wells": [{"path": "../../x"}]}}),
        r"`plate.wells\[0\].path`: member path '../../x' leaves",
    ),
    Case(
        "well",
        group("attributes", "ome", to={"version": "0.5", "well": {"images": [{"path": "/x"}]}}),
        r"`well.images\[0\].path`: member path '/x' leaves",
    ),
    Case(
        "wells are text",
        group("attributes", "ome", to={"version": "0.5", "plate": {"wells": "abc"}}),
        "holds labels but no image",
    ),
    Case(
        "axes in another order",
        array("dimension_names", to=["x", "y", "z"]),
        "calls its axes 'xyz'.* but its group 'zyx'",
    ),
    Case("names of axes", array("dimension_names", to=["z", "y"]), "image.zarr/0 cannot be opened"),
    Case("level is a link", linked("0", "0"), "image.zarr/0 leads out of its group"),
    Case("labels are a link", linked("labels", "image.zarr"), "image.zarr/labels leads out of its group"),
    Case("label is a link", linked("labels/cells", "image.zarr"), "labels/cells leads out of its group"),
    Case(
        "folder on the way is a link",
        both(linked("deep", ""), member("deep/0")),
        "image.zarr/deep/0 leads out of its group",
    ),
    Case("huge shape", shape([2**40, 2**40, 2**40]), r"`shape` \[1099511627776, .* from 0 to 2147483648"),
    Case(
        "shape that overflows",
        shape([2**31, 2**31, 4]),
        "`shape` .* beyond 5 axes or 9007199254740992 voxels",
    ),
    Case("endless shape", shape([10**4000, 1, 1]), "`shape` .* must be a list of integers"),
    Case("negative shape", shape([-4, 32, 32]), r"`shape` \[-4, 32, 32\] must be a list of integers"),
    Case("shape of floats", shape([4.0, 32, 32]), "`shape` .* must be a list of integers"),
    Case("shape of booleans", shape([True, 32, 32]), r"`shape` \[True, 32, 32\] must be a list of integers"),
    Case("no shape", shape(None), "`shape` None must be a list of integers"),
    Case("empty shape", shape([0, 32, 32]), "is empty"),
    Case("many axes", shape([1] * 40), "`shape` .* beyond 5 axes"),
    Case(
        "many channels",
        both(
            shape([2**17, 64, 64]),
            chunks([1, 64, 64]),
            group(*OME, "axes", 0, to={"name": "c", "type": "channel"}),
        ),
        "is 131072 long on axis 'c', where at most 65536",
    ),
    Case("zero chunks", chunks([0, 16, 16]), r"`chunk_shape` \[0, 16, 16\] must"),
    Case("negative chunks", chunks([4, -16, 16]), "`chunk_shape` .* must be a list"),
    Case("float chunks", chunks([4, 1.5, 16]), "`chunk_shape` .* must be a list"),
    Case("huge chunks", chunks([2**11] * 3), "a chunk of .* takes 17179869184 bytes"),
    Case("few chunk lengths", chunks([16, 16]), "`chunk_shape` .* has 2 lengths"),
    Case(
        "tiny chunks",
        both(shape([512] * 3), chunks([1, 1, 1])),
        "makes 134217728 chunks of 1 voxels, more than 65536",
    ),
    Case(
        "long axis of chunks",
        both(shape([2**21, 64, 64]), chunks([1, 64, 64])),
        "makes 2097152 chunks on one axis",
    ),
    Case("other grid", array("chunk_grid", "name", to="rectilinear"), "`chunk_grid` .* only 'regular'"),
    Case(
        "structured dtype",
        dtype({"name": "structured", "configuration": {"fields": []}}),
        "`data_type` .* is not supported",
    ),
    Case("text dtype", dtype("string"), "`data_type` 'string' is not supported"),
    Case("raw dtype", dtype("r8000000"), "`data_type` 'r8000000' is not supported"),
    Case("complex dtype", dtype("complex128"), "`data_type` 'complex128' is not supported"),
    Case("fill value is a list", array("fill_value", to=[1]), r"`fill_value` \[1\] is no number"),
    Case("fill value is text", array("fill_value", to="high"), "image.zarr/0 cannot be opened"),
    Case("fill value overflows", array("fill_value", to=10**30), "image.zarr/0 cannot be opened"),
    Case("unknown codec", codec("homemade"), "`codecs` name 'homemade', which is not supported"),
    Case("unbounded codec", codec("numcodecs.lzma"), "`codecs` name 'numcodecs.lzma', which is not"),
    Case("code as codec", codec("os.system"), "`codecs` name 'os.system', which is not supported"),
    Case(
        "compressed twice",
        array("codecs", to=["bytes", {"name": "zstd"}, {"name": "gzip"}]),
        "compress more than once",
    ),
    Case("no codecs", array("codecs", to={}), "`codecs` {} is not a list"),
    Case(
        "objects in a filter",
        array(
            "codecs",
            0,
            to={"name": "numcodecs.astype", "configuration": {"encode_dtype": "O", "decode_dtype": "<u2"}},
        ),
        "`codecs.numcodecs.astype.encode_dtype` 'O' is not supported",
    ),
    Case(
        "storage transformers",
        array("storage_transformers", to=[{"name": "x"}]),
        "`storage_transformers` are not supported",
    ),
    Case(
        "strange chunk keys",
        array("chunk_key_encoding", to={"name": "../../outside"}),
        "image.zarr/0 cannot be opened",
    ),
    Case(
        "separator",
        array("chunk_key_encoding", to={"name": "default", "configuration": {"separator": "/../"}}),
        "image.zarr/0 cannot be opened",
    ),
    Case("unknown format", array("zarr_format", to=4), "image.zarr/0 cannot be opened"),
    Case("pickle", pickled, "`dtype` .* is not supported", version="0.4"),
    Case(
        "pickle as filter",
        array2("filters", to=[{"id": "pickle"}]),
        "`filters` name 'pickle', which is not",
        version="0.4",
    ),
    Case(
        "json2 as compressor",
        array2("compressor", to={"id": "json2"}),
        "`compressor` name 'json2', which is not",
        version="0.4",
    ),
    Case(
        "structured dtype of v2",
        array2("dtype", to=[["a", "<u2"], ["b", "|S1000000"]]),
        "`dtype` .* is not supported",
        version="0.4",
    ),
    Case("filters are text", array2("filters", to="delta"), "`filters` 'delta' is not a list", version="0.4"),
    Case(
        "huge shape of v2",
        array2("shape", to=[2**40, 32, 32]),
        "`shape` .* must be a list of integers",
        version="0.4",
    ),
    Case(
        "negative chunks of v2",
        array2("chunks", to=[-4, 16, 16]),
        "`chunks` .* must be a list of integers",
        version="0.4",
    ),
    Case("order of v2", array2("order", to="A" * 100), "image.zarr/0 cannot be opened", version="0.4"),
    Case(
        "separator of v2",
        array2("dimension_separator", to="/../"),
        "image.zarr/0 cannot be opened",
        version="0.4",
    ),
    Case(
        "shard inside a shard",
        array(*INNER, "codecs", to=[{"name": "sharding_indexed"}]),
        "`sharding_indexed.codecs` name 'sharding_indexed'",
        shards=SHARDS,
    ),
    Case(
        "chunks of a shard",
        array(*INNER, "chunk_shape", to=[4, 0, 16]),
        "chunk_shape` .* must",
        shards=SHARDS,
    ),
    Case(
        "chunks that do not fill a shard",
        array(*INNER, "chunk_shape", to=[4, 5, 16]),
        "cannot be opened",
        shards=SHARDS,
    ),
    Case(
        "many chunks in a shard",
        both(chunks([2048] * 3), array(*INNER, "chunk_shape", to=[4] * 3)),
        "makes 134217728 chunks per shard",
        shards=SHARDS,
    ),
    Case("huge shard", chunks([4096] * 3), "a shard of .* takes 137438953472", shards=SHARDS),
    Case(
        "compressed index",
        array(*INNER, "index_codecs", to=[{"name": "bytes"}, {"name": "zstd"}]),
        "`index_codecs` name 'zstd'",
        shards=SHARDS,
    ),
    Case("NaN in the scale", group(*SCALE, to=[float("nan"), 1, 1]), "scale .* must hold finite numbers"),
    Case("infinite scale", group(*SCALE, to=[float("inf"), 1, 1]), "scale .* must hold finite numbers"),
    Case("endless scale", group(*SCALE, to=[10**400, 1, 1]), "scale .* must hold finite numbers"),
    Case("scale that overflows", group(*SCALE, to=[1e308, 1, 1]), "scale .* none beyond 1e\\+100"),
    Case("scale of booleans", group(*SCALE, to=[True, 1, 1]), "scale .* must hold finite numbers"),
    Case("zero scale", group(*SCALE, to=[0, 1, 1]), "a scale above 0"),
    Case("many levels", group(*OME, "datasets", to=[{"path": "0"}] * 10**4), "more than 64 levels"),
    Case(
        "multiscales are text",
        group("attributes", "ome", "multiscales", to="0"),
        "`multiscales` is empty or no list",
    ),
    Case(
        "multiscale is text",
        group("attributes", "ome", "multiscales", to=["0"]),
        "`multiscales` is empty or no list",
    ),
    Case("attributes are text", group("attributes", to="ome"), "`attributes` are no object"),
    Case("document is a list", write("zarr.json", b"[]"), "holds no JSON object"),
    Case("document is binary", write("zarr.json", bytes(range(256))), "is not valid JSON"),
    Case("deep document", write("zarr.json", DEEP), "nested deeper than 64"),
    Case("deep beyond the stack", write("zarr.json", PYTHON_DEEP), "zarr.json is nested deeper than 64"),
    Case("huge document", sparse("zarr.json", 2**36), "zarr.json is larger than 67108864 bytes"),
    Case("document is a pipe", pipe("0/zarr.json"), "is a device, pipe or socket"),
    Case("document is a device", linked("zarr.json", "/dev/zero"), "is a device, pipe or socket"),
    Case("document is a link to itself", linked("zarr.json", "../image.zarr/zarr.json"), "cannot be read"),
]


BOMBS = {
    "blosc": lambda: numcodecs.Blosc("zstd").encode(np.zeros(2**27, "u1")),
    "zstd": lambda: numcodecs.Zstd().encode(np.zeros(2**27, "u1")),
    "gzip": lambda: stream(zlib.compressobj(9, wbits=31), 2**26),
    "numcodecs.zlib": lambda: stream(zlib.compressobj(9), 2**26),
    "numcodecs.bz2": lambda: stream(bz2.BZ2Compressor(9), 2**26),
    "numcodecs.lz4": lambda: numcodecs.LZ4().encode(np.zeros(2**24, "u1")),
}
"""What makes 16 to 128 MiB of as many bytes as a chunk of 2 KiB may take on disk."""

SETTINGS = {"blosc": {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}}


def plant(name, path):
    """Make the first chunk of an honest store a bomb, and return the store."""
    content = bytes(BOMBS[name]())
    assert len(content) < CHUNK_NBYTES + 2**16
    stored = {"name": name, "configuration": SETTINGS.get(name, {} if "lz4" in name else {"level": 1})}
    if (path / "0/.zarray").exists():
        edit(path / "0/.zarray", "compressor", to={"id": name.removeprefix("numcodecs.")})
        (path / "0/0/0/0").write_bytes(content)
    elif "sharding" in (path / "0/zarr.json").read_text():
        edit(path / "0/zarr.json", *INNER, "codecs", to=[LITTLE, stored])
        (path / FIRST).write_bytes(content + shard((0, len(content))))
    else:
        compressed(stored, content)(path)
    return path


def corrupt(name, make, message, shards=None):
    return Case(name, make, message, CorruptChunkError, shards=shards)


ZSTD, GZIP = (
    {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
    {"name": "gzip", "configuration": {"level": 1}},
)
HONEST_ZSTD = bytes(numcodecs.Zstd().encode(np.zeros(CHUNK_NBYTES, "u1")))
BLOCKS = [
    corrupt(
        "frame that claims more",
        compressed(ZSTD, numcodecs.Zstd().encode(np.zeros(10**6, "u1"))),
        "claims to hold 1000000 bytes",
    ),
    corrupt(
        "frame that claims 2^62",
        compressed(ZSTD, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + bytes(9)),
        "claims to hold 4611686018427387904",
    ),
    corrupt(
        "frame that claims nothing",
        compressed(ZSTD, zstd_frame(2048, 2**17)),
        "Destination buffer is too small",
    ),
    corrupt("frame that holds less", compressed(ZSTD, zstd_frame(1, 100)), "expected to decompress"),
    corrupt(
        "frame that claims less than it holds",
        compressed(
            ZSTD,
            b"\x28\xb5\x2f\xfd\x40\x58" + struct.pack("<H", CHUNK_NBYTES - 256) + zstd_frame(2048, 2**17)[6:],
        ),
        "cannot be decoded",
    ),
    corrupt("no frame", compressed(ZSTD, b"not compressed at all"), "does not begin with a Zstandard frame"),
    corrupt("no header", compressed(ZSTD, b"\x28"), "does not begin with a Zstandard frame"),
    corrupt("gzip that is cut", compressed(GZIP, gzip.compress(bytes(CHUNK_NBYTES))[:-9]), "and then ends"),
    corrupt("gzip that is none", compressed(GZIP, bytes(100)), "compressed data is damaged"),
    corrupt("large chunk file", sparse(FIRST, 2**36), "is larger than"),
    corrupt("chunk is a pipe", pipe(FIRST), "is a device, pipe or socket"),
    corrupt("empty chunk file", chunk(b""), "cannot be decoded"),
    corrupt(
        "chunk behind the shard", write(FIRST, shard((10**6, 100), n_bytes=50)), "cannot be decoded", SHARDS
    ),
    corrupt("chunk of 2^63 bytes", write(FIRST, shard((0, 2**63), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt(
        "chunk whose end overflows",
        write(FIRST, shard((2**64 - 10, 20), n_bytes=50)),
        "cannot be decoded",
        SHARDS,
    ),
    corrupt("chunk without bytes", write(FIRST, shard((0, 0), n_bytes=50)), "cannot be decoded", SHARDS),
    corrupt(
        "index of a shard is damaged",
        write(FIRST, shard((0, 50), n_bytes=50, crc=False)),
        "cannot be decoded",
        SHARDS,
    ),
    corrupt("shard shorter than its index", write(FIRST, b"short"), "cannot be decoded", SHARDS),
    corrupt("large shard", sparse(FIRST, 2**36), "is larger than", SHARDS),
]


PEAK_SCRIPT = """
import sys
from chunkrestore.ome_zarr import open_image
honest, *hostile = sys.argv[1:]
def read(path):
    reader = open_image(path).source()
    return reader.read(0, 0, tuple(slice(0, n) for n in reader.spatial_shape))
def peak():
    # Not `ru_maxrss`, which a new process takes over from the one that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
read(honest)
for path in hostile:
    before = peak()
    try:
        read(path)
        print("read 0 all")
    except Exception as error:
        print(type(error).__name__, peak() - before, error)
"""
"""Reads an honest store and then hostile ones, and prints for each what came of it and how far memory grew, in kB."""

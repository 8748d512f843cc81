"""The direct way to chunks on disk: the voxels and the bytes of zarr, safe when killed, bounded, counted."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from chunkrestore.grid import BlockGrid, Halo
from chunkrestore.ome_zarr import CorruptChunkError, RegionReader, RegionWriter, create_image
from chunkrestore.ome_zarr.amplification import amplification, decoded_voxels
from chunkrestore.ome_zarr.encoding import encoding_of
from chunkrestore.ome_zarr.side_by_side import side_by_side

AXES = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}
BLOSCS = [
    BloscCodec(cname=cname, clevel=level, shuffle=shuffle)
    for cname, level, shuffle in (("lz4", 5, "bitshuffle"), ("zstd", 3, "shuffle"), ("lz4", 1, "noshuffle"))
]
PLAIN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def kinds(draw):
    """Draw how an array is stored: the arguments of `zarr.create_array`."""
    ndim = draw(st.integers(2, 4))
    chunks = tuple(draw(st.integers(1, 5)) for _ in range(ndim))
    shape = tuple(draw(st.integers(1, 13)) for _ in range(ndim))
    dtype = np.dtype(draw(st.sampled_from(["u1", "<u2", "<i2", "<f4", "<i4", ">u2", ">f4", "<f8"])))
    fills = [0, 7] + ([np.nan, -0.0] if dtype.kind == "f" else [])
    options = {"shape": shape, "chunks": chunks, "dtype": dtype, "fill_value": draw(st.sampled_from(fills))}
    if draw(st.booleans()):
        codecs = [None, numcodecs.Blosc("zstd", 3, 2), numcodecs.Zstd(1), numcodecs.LZ4(), numcodecs.BZ2(1)]
        return {**options, "zarr_format": 2, "compressors": draw(st.sampled_from(codecs))}
    compressors = [
        c for c in [draw(st.sampled_from([*BLOSCS, ZstdCodec(level=1), GzipCodec(level=1), None]))] if c
    ]
    if draw(st.booleans()):
        compressors.append(Crc32cCodec())
    if draw(st.booleans()):
        options["shards"] = tuple(c * draw(st.integers(1, 3)) for c in chunks)
    endian = "big" if dtype.byteorder == ">" else "little"
    options["dtype"] = dtype.newbyteorder("<")
    return {**options, "compressors": compressors or None, "serializer": BytesCodec(endian=endian)}


def values(rng, shape, dtype, fill):
    """Random voxels of which half are the fill value, in large pieces, with zeros of both signs."""
    data = rng.integers(0, 200, shape).astype(dtype)
    data[rng.random(shape) < 0.1] = -0.0 if data.dtype.kind == "f" else 0
    data[tuple(slice(0, (n + 1) // 2) for n in shape[:1])] = fill
    return data


def bits(array):
    return array.astype(array.dtype.newbyteorder("=")).tobytes()


def region(data, shape):
    return tuple(
        slice(a, data.draw(st.integers(a + 1, n))) for n in shape for a in [data.draw(st.integers(0, n - 1))]
    )


@PLAIN
@given(kind=kinds(), data=st.data())
def test_any_region_is_read_as_zarr_reads_it(kind, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("read") / "a.zarr"
    array = zarr.create_array(path, **kind)
    written = region(data, kind["shape"])
    rng = np.random.default_rng(1)
    array[written] = values(rng, array[written].shape, array.dtype, kind["fill_value"])
    reader = RegionReader.at(str(path), "", AXES[array.ndim])
    assert reader._opened().direct is not None
    wanted = region(data, kind["shape"])
    found = reader[wanted]
    assert found.dtype == array.dtype.newbyteorder("=")
    assert bits(found) == bits(np.asarray(array[wanted]))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@PLAIN
@given(kind=kinds(), data=st.data())
def test_whole_units_are_written_with_the_bytes_of_zarr(kind, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("write")
    theirs, _ = (zarr.create_array(folder / name, **kind) for name in ("theirs", "ours"))
    rng = np.random.default_rng(2)
    writer = RegionWriter.at(str(folder / "ours"), "", AXES[theirs.ndim])
    assert writer._opened().direct is not None
    borders = [
        (*range(0, n, u), n) for n, u in zip(theirs.shape, theirs.shards or theirs.chunks, strict=True)
    ]
    for _ in range(2):  # the second time over what is there
        edges = [sorted(data.draw(st.sets(st.sampled_from(b), min_size=2, max_size=2))) for b in borders]
        whole = tuple(slice(*e) for e in edges)
        new = values(rng, tuple(s.stop - s.start for s in whole), theirs.dtype, kind["fill_value"])
        theirs[whole] = new
        direct = writer._opened().direct
        direct.write(whole, new)
        assert bits(np.asarray(theirs[...])) == bits(writer[...])
    has_time = "gzip" in str(kind["compressors"]).lower()  # of its making, in its header
    if theirs.dtype.kind != "f" and not has_time:  # zarr's releases differ in whether minus zero is zero
        assert files(folder / "ours") == files(folder / "theirs")


LITTLE, CRC = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
ZSTD = {"name": "numcodecs.zstd", "configuration": {"level": 1}}


@pytest.mark.parametrize(
    ("codecs", "expected"),
    [
        ([LITTLE, ZSTD, CRC], ({"id": "zstd", "level": 1}, True)),
        ([LITTLE, "crc32c"], (None, True)),
        ([LITTLE, CRC, ZSTD], None),
        ([LITTLE, ZSTD, {"name": "numcodecs.crc32c"}], None),
        ([LITTLE, {"name": "numcodecs.delta", "configuration": {"dtype": "<u2"}}], None),
        ([{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE, ZSTD], None),
        ([LITTLE, {**ZSTD, "configuration": {"id": "pickle"}}], ({"id": "zstd"}, False)),
    ],
)
def test_only_what_is_understood_whole_is_decoded_here(codecs, expected):
    grid = {"name": "regular", "configuration": {"chunk_shape": [4, 4]}}
    encoding = encoding_of({"data_type": "uint16", "chunk_grid": grid, "codecs": codecs}, 3)
    assert (encoding and (encoding.compressor, encoding.has_checksum)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"filters": [TransposeCodec(order=(2, 1, 0))]},
        {"zarr_format": 2, "order": "F"},
        {"zarr_format": 2, "filters": [numcodecs.Delta("<u2")]},
        {
            "serializer": ShardingCodec(
                chunk_shape=(4, 4, 4), index_codecs=[BytesCodec(endian="big"), Crc32cCodec()]
            )
        },
        {"serializer": ShardingCodec(chunk_shape=(4, 4, 4), index_location="start"), "direct": True},
        {"serializer": ShardingCodec(chunk_shape=(4, 4, 4), index_codecs=[BytesCodec()]), "direct": True},
    ],
    ids=[
        "transposed",
        "Fortran order",
        "filter",
        "big-endian index",
        "index first",
        "index without checksum",
    ],
)
def test_unusual_arrays_are_left_to_zarr_and_right(options, tmp_path):
    options = {"compressors": None, **options}
    is_direct = options.pop("direct", False)
    array = zarr.create_array(tmp_path / "a", shape=(8, 8, 8), chunks=(8, 8, 8), dtype="<u2", **options)
    array[...] = np.arange(512).reshape(8, 8, 8)
    reader = RegionReader.at(str(tmp_path / "a"), "", "zyx")
    assert (reader._opened().direct is not None) == is_direct
    np.testing.assert_array_equal(reader[2:7, 1:, :5], array[2:7, 1:, :5])


def test_array_that_shuffles_other_units_is_read_here_and_written_by_zarr(tmp_path):
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=4)
    array = zarr.create_array(tmp_path / "a", shape=(8, 8), chunks=(8, 8), dtype="u2", compressors=codec)
    assert RegionReader.at(str(tmp_path / "a"), "", "yx")._opened().direct is not None
    writer = RegionWriter.at(str(tmp_path / "a"), "", "yx")
    assert writer._opened().direct is None
    writer.write(0, 0, (slice(0, 8), slice(0, 8)), np.arange(64, dtype="u2").reshape(8, 8))
    np.testing.assert_array_equal(array[...], np.arange(64).reshape(8, 8))


# Damage


@pytest.fixture(params=[None, (8, 32, 32)], ids=["chunks", "shards"])
def target(request, tmp_path):
    """A writer whose chunks carry checksums, full of numbers."""
    codecs = [BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2), Crc32cCodec()]
    zarr.create_array(
        tmp_path / "a",
        shape=(16, 32, 32),
        chunks=(8, 16, 16),
        shards=request.param,
        dtype="u2",
        compressors=codecs,
    )
    writer = RegionWriter.at(str(tmp_path / "a"), "", "zyx")
    writer.write(0, 0, tuple(slice(0, n) for n in writer.shape), numbers(1))
    return writer


def numbers(seed):
    return np.random.default_rng(seed).integers(0, 300, (16, 32, 32)).astype("u2")


def walk(folder):
    """List all files but the metadata."""
    found = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if not path.endswith("zarr.json"))


def test_every_flipped_bit_of_a_chunk_is_found_and_the_chunk_named(target):
    last = walk(target.store)[-1]
    good = Path(last).read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[position] ^= 16
        Path(last).write_bytes(bad)
        with pytest.raises(CorruptChunkError, match=r"chunk c/1/[01]/[01] of array .* cannot be decoded"):
            target[...]
    np.testing.assert_array_equal(target[:8], numbers(1)[:8])


def test_of_several_damaged_chunks_the_first_is_named(target):
    for name in walk(target.store):
        Path(name).write_bytes(b"")
    for _ in range(20):
        with pytest.raises(CorruptChunkError, match="chunk c/0/0/0 of array"):
            target[...]


def test_damage_outside_of_what_is_read_is_not_noticed(tmp_path):
    image = create_image(
        tmp_path / "a.zarr",
        shape=(64, 64),
        dtype="u2",
        axes="yx",
        voxel_size=(1, 1),
        chunks=(32, 32),
        levels=1,
    )
    target = image.target()
    target.write(0, 0, (slice(0, 64), slice(0, 64)), np.ones((64, 64), "u2"))
    (tmp_path / "a.zarr/0/c/1/1").write_bytes(b"damaged")
    assert target[:32].min() == 1
    with pytest.raises(CorruptChunkError, match="chunk c/1/1"):
        target[:33, 31:33]


WRITER = """
import sys, itertools
import numpy as np
from chunkrestore.ome_zarr import RegionWriter
writer = RegionWriter.at(sys.argv[1], "", "zyx")
everything = tuple(slice(0, n) for n in writer.shape)
for k in itertools.count(1):
    noise = np.random.default_rng(k % 2).integers(0, 300, writer.shape).astype("u2")
    writer.write(0, 0, everything, noise)
    print(k, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("shards", [None, (64, 64, 64)], ids=["chunks", "shards"])
def test_writers_that_are_killed_leave_no_torn_file(shards, tmp_path):
    path, shape = str(tmp_path / "a"), (64, 128, 128)
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)
    array = zarr.create_array(
        path, shape=shape, chunks=(32, 32, 32), shards=shards, dtype="u2", compressors=codec
    )
    kinds = [np.random.default_rng(k).integers(0, 300, shape).astype("u2") for k in (0, 1)]
    reader = RegionReader.at(path, "", "zyx")
    n_unfinished = 0
    for n_lines in (1, 2, 3, 4):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as process:
            for _ in range(n_lines):
                assert process.stdout.readline()
            stop_in_the_middle(process, tmp_path)
        n_unfinished += sum(name.endswith(".partial") for name in walk(path))
        for unit in BlockGrid.regular(shape, reader.write_unit):
            found = reader.read(0, 0, unit.core)
            assert any(np.array_equal(found, kind[unit.core]) for kind in kinds)
            np.testing.assert_array_equal(array[unit.core], found)
    assert n_unfinished  # otherwise none was killed while it wrote


def stop_in_the_middle(process, folder, patience=60.0):
    """Kill a writer that has begun a file and not finished it; it is held still to look, so it cannot finish then."""
    rng, deadline = np.random.default_rng(5), time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(rng.uniform(0, 0.005))
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if any(name.endswith(".partial") for name in walk(folder)):
            break
        process.send_signal(signal.SIGCONT)
    process.kill()


def test_a_shard_that_is_replaced_while_it_is_read_is_the_old_one_or_the_new_one(tmp_path):
    shape = (64, 64, 64)
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)
    zarr.create_array(
        tmp_path / "a", shape=shape, chunks=(16, 16, 16), shards=shape, dtype="u2", compressors=codec
    )
    writer = RegionWriter.at(str(tmp_path / "a"), "", "zyx")
    everything = tuple(slice(0, n) for n in shape)
    # Of other entropy each, so that chunks lie elsewhere in the file
    kinds = [np.random.default_rng(k).integers(0, 10 ** (k + 1), shape).astype("u2") for k in range(4)]
    writer.write(0, 0, everything, kinds[0])
    stop = threading.Event()

    def replace():
        for k in itertools.cycle(range(4)):
            if stop.is_set():
                return
            writer.write(0, 0, everything, kinds[k])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        found = [writer[...] for _ in range(60)]
    finally:
        stop.set()
        thread.join()
    which = [next((k for k in range(4) if np.array_equal(f, kinds[k])), None) for f in found]
    assert None not in which
    assert len(set(which)) > 1  # otherwise nothing was replaced meanwhile


# Threads


def test_after_an_error_nothing_runs_any_more_and_the_first_one_is_raised():
    running, seen, lock = set(), [], threading.Lock()

    def work(item):
        with lock:
            running.add(item)
            seen.append(item)
        time.sleep(0.001 * (10 - item))  # later items fail sooner
        with lock:
            running.remove(item)
        if item in (3, 4, 5):
            raise ValueError(str(item))

    for _ in range(10):
        seen.clear()
        with pytest.raises(ValueError, match=r"^3$"):
            side_by_side(work, range(1, 10), 4)
        assert not running
        n_seen = len(seen)
        assert n_seen <= 7
        time.sleep(0.002)
        assert len(seen) == n_seen


def test_callers_that_share_the_threads_do_not_wait_for_each_other_forever():
    done = []

    def outer(item):
        side_by_side(lambda inner: done.append((item, inner)), range(20), 4)

    side_by_side(outer, range(8), 4)
    assert sorted(done) == list(itertools.product(range(8), range(20)))


@pytest.mark.parametrize("shards", [None, (128, 128, 128)], ids=["chunks", "shards"])
def test_memory_is_the_result_and_a_few_chunks(shards, tmp_path):
    shape = (128, 128, 256)
    writer = create_image(
        tmp_path / "a", shape=shape, dtype="u2", axes="zyx", voxel_size=(1, 1, 1), chunks=(32,) * 3, shards=shards,
        levels=1,
    ).target()  # fmt: skip
    image = np.random.default_rng(5).integers(0, 2**16, shape).astype("u2")
    everything, chunk_nbytes = tuple(slice(0, n) for n in shape), 32**3 * 2
    writer.write(0, 0, everything, image)  # zarr is loaded, the threads exist
    # Random numbers do not compress: of a shard, all encoded chunks are held
    for work, allowed in (
        (lambda: writer.read(0, 0, everything), image.nbytes),
        (lambda: writer.write(0, 0, everything, image), 0 if shards is None else image.nbytes // 2),
    ):
        tracemalloc.start()
        result = work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < allowed + 8 * 4 * chunk_nbytes + 2**20
        del result


# Amplification


@pytest.mark.parametrize(("chunk", "expected"), [(32, 1.953125), (64, 3.375), (128, 8.0), (256, 27.0)])
def test_blocks_of_256_with_a_halo_of_16_decode_what_the_documentation_says(chunk, expected):
    along = decoded_voxels([tuple(range(0, 2561, 256))], [Halo((16,))], [chunk], [0])
    at_an_end = -(-(256 + 16) // chunk) * chunk
    assert ((along - 2 * at_an_end) / 8 / 256) ** 3 == expected


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoded_voxels_are_those_of_the_chunks_that_blocks_touch(data):
    ndim = data.draw(st.integers(1, 3))
    shape = [data.draw(st.integers(1, 30)) for _ in range(ndim)]
    chunks = [data.draw(st.integers(1, 12)) for _ in range(ndim)]
    first = [data.draw(st.integers(0, 9)) for _ in range(ndim)]
    halos = [
        Halo(tuple(data.draw(st.integers(0, 6)) for _ in range(ndim)))
        for _ in range(data.draw(st.integers(0, 2)))
    ]
    grid = BlockGrid.regular(shape, [data.draw(st.integers(1, n)) for n in shape])
    n_chunks = 0
    for block in grid:
        read = block.core
        for halo in halos:
            read = halo.read(read, shape)
        touched = [
            {(x + f) // c for x in range(s.start, s.stop)}
            for s, f, c in zip(read, first, chunks, strict=True)
        ]
        n_chunks += int(np.prod([len(t) for t in touched]))
    assert decoded_voxels(grid.edges, halos, chunks, first) == n_chunks * int(np.prod(chunks))


opened = []
is_counting = False


def note(event, arguments):
    # Without a mode: by `os.open`, of which `open` makes an event of its own
    if is_counting and event == "open" and arguments[1] is None:
        opened.append(str(arguments[0]))


sys.addaudithook(note)


def test_amplification_counts_the_chunk_files_that_are_opened(tmp_path, monkeypatch):
    shape, chunks = (2, 40, 50, 60), (2, 16, 16, 16)
    array = zarr.create_array(tmp_path / "a", shape=shape, chunks=chunks, dtype="u1", fill_value=0)
    array[...] = np.random.default_rng(0).integers(1, 9, shape)
    reader = RegionReader.at(str(tmp_path / "a"), "", "czyx")
    grid = BlockGrid.regular(shape[1:], (16, 25, 30), Halo((3, 3, 3)))
    reader.read(0, 0, tuple(slice(0, 1) for _ in chunks[1:]))
    monkeypatch.setitem(globals(), "is_counting", True)
    opened.clear()
    for block in grid:
        reader.read(0, 1, block.read)
    monkeypatch.setitem(globals(), "is_counting", False)
    n_opened = sum(name.startswith(str(tmp_path / "a/c")) for name in opened)
    assert n_opened
    assert amplification(reader, grid) == n_opened * int(np.prod(chunks)) / np.prod(shape[1:])

"""Stores in zip files: made by zarr and the standard library, read as the folders that they were."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from contextlib import closing

import numpy as np
import pytest
import zarr
from hostile import PEAK_SCRIPT, SHARDS, honest, voxels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.ome_zarr import (
    CorruptChunkError,
    create_image,
    open_collection,
    open_image,
    write_image,
    zip_index,
)
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.zip_index import Archive

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
KINDS = [("0.4", {}), ("0.5", {}), ("0.5", {"shards": SHARDS})]


def pack(folder, target, *, below="", method=STORED, change=None):
    """Zip what is in a folder; `change` maps names and contents to others."""
    with zipfile.ZipFile(target, "w", method, compresslevel=1) as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name, content = below + path.relative_to(folder).as_posix(), path.read_bytes()
            for entry, data in [(name, content)] if change is None else change(name, content):
                file.writestr(entry, data)
    return target


@pytest.fixture
def folder(tmp_path):
    return honest(tmp_path / "image.zarr")


@pytest.fixture
def packed(folder):
    return pack(folder, folder.with_name("image.ozx"))


def everything(path):
    image = open_image(path)
    return [
        part.source(k).read(0, 0, whole(part, k)) for part in (image, image.label("cells")) for k in (0, 1)
    ]


def whole(image, level=0):
    return tuple(slice(0, n) for n in image.source(level).spatial_shape)


def same(first, second):
    for a, b in zip(everything(first), everything(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", [STORED, DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize(("version", "array"), KINDS, ids=["0.4", "0.5", "0.5 sharded"])
@pytest.mark.parametrize(("name", "below"), [("a.ome.zarr.zip", ""), ("a.ozx", ""), ("A.ZIP", "image.zarr/")])
def test_zip_file_holds_what_its_folder_holds(name, below, version, array, method, tmp_path):
    folder = honest(tmp_path / "image.zarr", version, **array)
    packed = pack(folder, tmp_path / name, below=below, method=method)
    same(packed, folder)
    image, plain = open_image(packed), open_image(folder)
    assert (image.version, image.axes, image.labels) == (version, "zyx", ("cells",))
    assert image.path == str(packed / below.rstrip("/"))
    assert image.source().digest == plain.source().digest
    region = (slice(1, 3), slice(5, 29), slice(17, 18))
    np.testing.assert_array_equal(image.source().read(0, 0, region), voxels()[region])


def test_zip_file_of_zarr_is_read(tmp_path):
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        array = zarr.create_array(store, shape=(4, 32, 32), chunks=(4, 16, 16), dtype="u2", fill_value=0)
        array[...] = voxels()
    np.testing.assert_array_equal(open_image(tmp_path / "a.zip", axes="zyx").data.compute(), voxels())


def test_zip_file_of_the_zip_program_is_read(folder, tmp_path):
    if shutil.which("zip") is None:
        pytest.skip("the zip program is not installed")
    for name, options in (("a.zip", ["-0"]), ("b.zip", ["-9"])):
        subprocess.run(["zip", "-q", "-r", *options, tmp_path / name, "."], cwd=folder, check=True)
        same(tmp_path / name, folder)


def test_paths_go_on_inside_a_zip_file(tmp_path):
    for member in ("A/1/0", "A/1/1"):
        honest(tmp_path / "plate.zarr" / member)
    zarr.create_group(tmp_path / "plate.zarr", zarr_format=3)
    packed = pack(tmp_path / "plate.zarr", tmp_path / "plate.zip")
    same(packed / "A/1/1", tmp_path / "plate.zarr/A/1/1")
    plain = open_image(packed / "A/1/1/0", axes="zyx")
    np.testing.assert_array_equal(plain.data.compute(), voxels())
    with pytest.raises(ValueError, match="is a plain zarr group, not an OME-Zarr image"):
        open_image(packed)
    with pytest.raises(FileNotFoundError, match=r"plate.zip/A/7 does not exist"):
        open_image(packed / "A/7")


def test_top_of_a_zip_file_that_is_no_node_asks_for_the_folder(tmp_path):
    for name in ("a", "b"):
        honest(tmp_path / "all" / name)
    packed = pack(tmp_path / "all", tmp_path / "all.zip")
    with pytest.raises(
        ValueError, match=r"all.zip holds no zarr metadata; give the path .* as in image.zip/folder"
    ):
        open_image(packed)
    same(packed / "b", tmp_path / "all/b")


def test_folder_that_is_called_like_a_zip_file_is_a_folder(tmp_path):
    honest(tmp_path / "image.zip")
    np.testing.assert_array_equal(open_image(tmp_path / "image.zip").data.compute(), voxels())


def test_zip_file_behind_a_link_and_a_relative_path_is_read(packed, tmp_path, monkeypatch):
    (tmp_path / "link.ozx").symlink_to(packed)
    np.testing.assert_array_equal(open_image(tmp_path / "link.ozx").data.compute(), voxels())
    monkeypatch.chdir(tmp_path)
    assert open_image("image.ozx").path == str(packed)


@pytest.mark.parametrize("extra", ["zip64", "comment", "prefix", "stream"])
def test_all_layouts_of_a_zip_file_are_read(extra, folder, tmp_path):
    packed = tmp_path / "a.zip"
    target = Unseekable(packed) if extra == "stream" else open(packed, "wb")  # noqa: SIM115
    with closing(target), zipfile.ZipFile(target, "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            with file.open(zipfile.ZipInfo(name), "w", force_zip64=extra == "zip64") as member:
                member.write(path.read_bytes())
        file.writestr("labels/", "")
        file.comment = b'{"ome": {"version": "0.5"}}\0' if extra == "comment" else b""
    if extra == "zip64":
        wide_directory(packed)
    if extra == "prefix":
        packed.write_bytes(b"#!/bin/sh\n" * 50 + packed.read_bytes())
    same(packed, folder)
    with zipfile.ZipFile(packed) as known:
        archive = Archive(str(packed))
        assert set(archive.members) == {name for name in known.namelist() if not name.endswith("/")}
        for name in archive.members:
            assert archive.read(name, 0, 10**6) == known.read(name)


class Unseekable:
    """A target that cannot go back, so that sizes come after the contents."""

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115

    def write(self, data):
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def wide_directory(path):
    """Rewrite the directory of a zip file as one whose numbers all stand in zip64 fields."""
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    n, size, start = struct.unpack_from("<H2I", data, end + 10)
    old, entries, position = data[start : start + size], b"", 0
    for _ in range(n):
        fields = list(struct.unpack_from("<4s6H3I5H2I", old, position))
        name = old[position + 46 : position + 46 + fields[10]]
        position += 46 + sum(fields[10:13])
        field = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
        other = struct.pack("<2H3s", 0x7777, 3, b"abc")
        fields[8] = fields[9] = fields[16] = 2**32 - 1
        fields[11], fields[12] = len(other + field), 0
        entries += struct.pack("<4s6H3I5H2I", *fields) + name + other + field
    at = start + len(entries)
    end_64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(entries), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    end_32 = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(data[:start] + entries + end_64 + locator + end_32)


def test_parts_of_members_are_what_slices_are(packed):
    archive, content = Archive(str(packed)), (packed.parent / "image.zarr/0/c/0/0/0").read_bytes()
    n = len(content)
    for start, nbytes in [
        (0, n),
        (0, n + 5),
        (3, 10),
        (n - 4, 10),
        (n, 5),
        (n + 9, 5),
        (-4, 4),
        (-n - 9, 2 * n),
    ]:
        expected = content[start : start + nbytes] if start >= 0 else content[max(0, n + start) :][:nbytes]
        assert archive.read("0/c/0/0/0", start, nbytes) == expected
    assert archive.read("0/c/9/9/9", 0, 5) is None


def test_readers_are_small_and_work_in_threads_and_after_pickling(packed):
    reader = open_image(packed).source()
    stored = pickle.dumps(reader)
    assert len(stored) < 1500
    found = []
    reader = pickle.loads(stored)

    def read():
        found.extend(reader.read(0, 0, (slice(0, 4),) * 3) for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    for block in found:
        np.testing.assert_array_equal(block, voxels()[:4, :4, :4])


def test_file_that_was_replaced_is_parsed_again(packed, folder):
    before = open_image(packed)
    assert zip_index.open_archive(str(packed)) is zip_index.open_archive(str(packed))
    shutil.rmtree(folder)
    honest(folder, chunks=(4, 8, 8))
    pack(folder, packed)
    assert stores.stamp(str(packed / "0")) is not None
    assert open_image(packed).source().digest != before.source().digest
    np.testing.assert_array_equal(open_image(packed).data.compute(), voxels())


def test_store_functions_treat_a_zip_file_as_a_folder(packed, folder):
    path = str(packed)
    assert stores.is_zipped(path)
    found = [
        (p, stores.exists(p), stores.is_file(p)) for p in (path, f"{path}/labels/cells", f"{path}/label")
    ]
    assert [known[1:] for known in found] == [(True, True), (True, False), (False, False)]
    assert stores.contents(path) == sorted(p.name for p in folder.iterdir())
    assert stores.contents(f"{path}/labels") == ["cells", "zarr.json"]
    assert stores.contents(f"{path}/nothing") is None
    assert stores.stamp(f"{path}/0") != stores.stamp(str(folder / "0"))
    assert stores.stamp(f"{path}/7") is None
    assert stores.same(path, str(folder / "../image.ozx"))
    assert not stores.same(path, str(folder))
    assert stores.enclosing_groups(f"{path}/labels/cells") == [f"{path}/labels", path]
    assert not stores.is_consolidated(path)
    assert stores.clean_partial(path) == 0
    identity = open_image(packed).source().identity()
    assert identity["store"] == path
    assert json.loads(json.dumps(identity)) == identity


def test_info_describes_a_zip_file(packed, capsys):
    with pytest.raises(SystemExit) as left:
        main(["info", str(packed)])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert str(packed) in said
    assert "4 x 32 x 32 uint16" in said


def test_fields_of_a_plate_in_a_zip_file_are_listed(tmp_path):
    honest(tmp_path / "plate.zarr/A/1/0")
    well = {"well": {"images": [{"path": "0"}]}}
    plate = {"columns": [{"name": "1"}], "rows": [{"name": "A"}]}
    plate |= {"wells": [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}]}
    for member, ome in (("", {"plate": plate}), ("A/1", well)):
        zarr.create_group(tmp_path / "plate.zarr" / member, attributes={"ome": {"version": "0.5", **ome}})
    packed = pack(tmp_path / "plate.zarr", tmp_path / "plate.zip")
    (field,) = open_collection(packed).fields
    same(field.path, tmp_path / "plate.zarr/A/1/0")


def test_job_reads_from_a_zip_file(packed, folder, tmp_path):
    threshold = cr.Threshold(100.0)
    for source, output in ((packed, "out.zarr"), (folder, "plain.zarr")):
        cr.run(threshold, source, tmp_path / output, cluster="serial", quiet=True, label_name="found")
    found, expected = (open_image(tmp_path / o / "labels/found") for o in ("out.zarr", "plain.zarr"))
    np.testing.assert_array_equal(found.data.compute(), expected.data.compute())
    assert found.data.compute().max() > 0


def test_copy_of_an_image_in_a_zip_file(packed, tmp_path):
    copied = write_image(open_image(packed).data, tmp_path / "copy.zarr", like=packed)
    np.testing.assert_array_equal(copied.data.compute(), voxels())


# Nothing is written


def test_nothing_can_be_written_into_a_zip_file(packed, tmp_path):
    before = packed.read_bytes()
    message = "zip files are read only; write a folder"
    options = {"axes": "zyx", "voxel_size": (1, 1, 1)}
    for path in (packed, tmp_path / "new.zip", tmp_path / "new.ozx"):
        with pytest.raises(ValueError, match=message):
            write_image(voxels(), path, overwrite=True, **options)
        with pytest.raises(ValueError, match=message):
            create_image(path, shape=(4, 8, 8), dtype="u2", **options)
        with pytest.raises(ValueError, match=message):
            cr.write_labels(voxels().astype("u4"), path, "cells", overwrite=True, **options)
        with pytest.raises(ValueError, match=message):
            cr.run(
                cr.Threshold(1.0), packed, path, cluster="serial", quiet=True, label_name="x", overwrite=True
            )
    for call in (stores.write_json, stores.remove_keys):
        with pytest.raises(ValueError, match=message):
            call(str(packed), "zarr.json", {}) if call is stores.write_json else call(
                str(packed), ["zarr.json"]
            )
    with pytest.raises(ValueError, match=message):
        stores.remove_member(str(packed), "0")
    assert packed.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.ozx", "image.zarr"]


# Zip files that were made to harm, or are damaged


def named(name):
    return lambda entry, content: [(entry, content), *([(name, b"x")] if entry == "zarr.json" else [])]


def info(name, **fields):
    entry = zipfile.ZipInfo(name)
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry


def link(entry, content):
    if entry != "0/c/0/0/0":
        return [(entry, content)]
    return [(info(entry, create_system=3, external_attr=0o120777 << 16), b"/etc/passwd")]


MEMBERS = {
    "parent": (named("../outside"), r"member '../outside' has a name that leads out of it"),
    "inner parent": (named("0/../../outside"), r"member .* has a name that leads out of it"),
    "absolute": (named("/etc/x"), r"member '/etc/x' has a name that leads out of it"),
    "dot": (named("./zarr.json"), r"member './zarr.json' has a name that leads out of it, or is none"),
    "backslash": (named("..\\outside"), r"member .* has a name that leads out of it"),
    "terminal": (named("\x1b[2J"), r"member .* has a name that leads out of it, or is none"),
    "link": (link, r"member '0/c/0/0/0' is a link"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_zip_file_with_members_that_are_not_plain_files_is_refused(case, folder, tmp_path):
    change, message = MEMBERS[case]
    packed = pack(folder, tmp_path / "a.zip", change=change)
    with pytest.raises(ValueError, match=message) as caught:
        open_image(packed)
    assert str(packed) in str(caught.value)
    assert "zip the folder again" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_that_is_there_twice_must_be_the_same(folder, tmp_path):
    twice = pack(folder, tmp_path / "same.zip", change=lambda e, c: [(e, c), (e, c)])
    same(twice, folder)
    other = pack(
        folder,
        tmp_path / "other.zip",
        change=lambda e, c: [(e, c), *([(e, c + b" ")] if "zarr" in e else [])],
    )
    with pytest.raises(
        ValueError, match=r"other.zip holds '.*zarr.json' twice, and not the same; zip its folder again"
    ):
        open_image(other)


def entries(path):
    """Yield where the entries of the directory begin, by the name of the member."""
    data = path.read_bytes()
    position = data.find(b"PK\1\2")
    while data[position : position + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<3H", data, position + 28)
        yield data[position + 46 : position + 46 + lengths[0]].decode(), position
        position += 46 + sum(lengths)


def overwrite(path, position, content):
    data = bytearray(path.read_bytes())
    position += len(data) if position < 0 else 0
    data[position : position + len(content)] = content
    path.write_bytes(data)


def entry_field(member, offset, layout, *values):
    """Change a field of the directory's entry of a member."""
    return lambda path: overwrite(path, dict(entries(path))[member] + offset, struct.pack(layout, *values))


def header_of(path, member):
    """Return what the directory says of where a member lies."""
    return struct.unpack_from("<I", path.read_bytes(), dict(entries(path))[member] + 42)


CHUNK = "0/c/0/0/0"
DAMAGED = {
    "encrypted": (entry_field(CHUNK, 8, "<H", 1), "member '0/c/0/0/0' is encrypted"),
    "other method": (entry_field(CHUNK, 10, "<H", 12), "is compressed by method 12 of zip"),
    "two lengths": (entry_field(CHUNK, 24, "<I", 10**9), "gives '0/c/0/0/0' two lengths"),
    "no zip file": (lambda path: path.write_bytes(b"II*\0" * 100), "is no zip file that can be read: it has no"),
    "empty": (lambda path: path.write_bytes(b""), "it has no directory, as if it had been cut"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "it has no directory, as if it had been cut"),
    "part of several": (lambda path: overwrite(path, -18, b"\1\0"), "it is one part of several"),
    "directory elsewhere": (lambda path: overwrite(path, -6, struct.pack("<I", 2**31)), "its directory is damaged"),
    "large directory": (lambda path: overwrite(path, -10, struct.pack("<I", 2**31)), "directory of 2147483648 bytes"),
    "longer directory": (lambda path: overwrite(path, -10, struct.pack("<I", 2**20)), "its directory is damaged"),
    "shorter directory": (lambda path: overwrite(path, -10, struct.pack("<I", 99)), "directory is damaged"),
    "no entry": (lambda path: overwrite(path, path.read_bytes().find(b"PK\1\2"), b"QK"), "its directory is damaged"),
    "header elsewhere": (entry_field("zarr.json", 42, "<I", 7), "zarr.json in zip file .* is not where the directory"),
    "header of another": (
        lambda path: entry_field("zarr.json", 42, "<I", *header_of(path, "0/zarr.json"))(path),
        "zarr.json in zip file .* cannot be read: another member is where the directory says",
    ),
    "header beyond": (entry_field("zarr.json", 42, "<I", 2**31), "is not where the directory says"),
    "checksum": (entry_field("zarr.json", 16, "<I", 7), "its checksum or length is wrong"),
    "pipe": (None, "is a device, pipe or socket"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_zip_file_is_refused(case, packed):
    change, message = DAMAGED[case]
    if change is None:
        import os

        packed.unlink()
        os.mkfifo(packed)
    else:
        change(packed)
    with pytest.raises(ValueError, match=message) as caught:
        open_image(packed)
    assert str(packed) in str(caught.value)


def test_flipped_bit_in_a_chunk_is_an_error_and_no_voxel(tmp_path):
    folder = honest(tmp_path / "image.zarr", compressors=None)
    packed = pack(folder, tmp_path / "image.zip")
    at = packed.read_bytes().find(voxels()[:4, :16, :16].tobytes())
    overwrite(packed, at + 1000, b"\xff")
    image = open_image(packed)
    with pytest.raises(CorruptChunkError, match=r"chunk c/0/0/0 of array .* its checksum or length is wrong"):
        image.source().read(0, 0, whole(image))
    region = (slice(0, 4), slice(16, 32), slice(0, 32))
    np.testing.assert_array_equal(image.source().read(0, 0, region), voxels()[region])


@pytest.mark.parametrize("shards", [None, SHARDS], ids=["chunks", "shards"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_byte_gives_the_right_voxels_or_an_error(data, shards, flippable):
    packed, content = flippable(shards)
    position = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[position] ^= data.draw(st.integers(1, 255))
    packed.write_bytes(bytes(changed))
    try:
        image = open_image(packed)
        found = image.source().read(0, 0, whole(image))
    except (ValueError, FileNotFoundError):
        return
    # What only the directory tells: that there is a chunk, and what it is called
    hidden = set(Archive(str(packed)).members) != set(NAMES[shards])
    assert hidden or np.array_equal(found, voxels())


NAMES = {}


@pytest.fixture(scope="module")
def flippable(tmp_path_factory):
    """Zip files without compression, and what they hold."""
    root, made = tmp_path_factory.mktemp("flips"), {}

    def make(shards):
        if shards not in made:
            options = {"shards": shards} if shards else {}
            folder = honest(root / f"image {shards}.zarr", labels=False, **options)
            packed = pack(folder, root / f"{shards}.zip")
            made[shards] = packed, packed.read_bytes()
            NAMES[shards] = Archive(str(packed)).members
        return made[shards]

    return make


def test_many_members_are_refused(packed, monkeypatch):
    monkeypatch.setattr(zip_index, "MAX_ZIP_MEMBERS", 5)
    with pytest.raises(
        ValueError, match=r"and 17 members, where .* and 5 are supported; write the image in shards"
    ):
        Archive(str(packed))
    overwrite(packed, -12, b"\1\0")  # which the number at the end need not tell
    with pytest.raises(ValueError, match="has more than 5 members"):
        Archive(str(packed))


def test_bombs_do_not_unfold(folder, tmp_path):
    bombs = []
    for name, member, zeros in (
        ("chunk", CHUNK, bytes(2**25)),
        ("document", "0/zarr.json", bytes(2**26 + 9)),
    ):
        packed = tmp_path / f"{name}.zip"
        pack(
            folder, packed, method=DEFLATED, change=lambda e, c, m=member, z=zeros: [(e, z if e == m else c)]
        )
        lying = shutil.copy(packed, tmp_path / f"{name} that lies.zip")
        entry_field(member, 24, "<I", 100)(lying)
        bombs += [lying, packed]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK_SCRIPT, folder, *bombs],
        capture_output=True,
        text=True,
        check=True,
    )
    outcomes = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [error for error, *_ in outcomes] == ["CorruptChunkError"] * 2 + ["ValueError"] * 2, done.stdout
    growth = [int(kilobytes) for _, kilobytes, _ in outcomes]
    # A document may have 64 MiB, and is copied once; a chunk has 2 KiB
    assert max(growth[:3]) < 8 * 1024, done.stdout
    assert growth[3] < 150 * 1024, done.stdout


def test_compressed_members_beyond_the_limit_are_refused(folder, tmp_path, monkeypatch):
    packed = pack(folder, tmp_path / "a.zip", method=DEFLATED)
    monkeypatch.setattr(zip_index, "MAX_INFLATED_NBYTES", 1000)
    with pytest.raises(
        ValueError, match=r"bytes that the zip file compresses, more than 1000; .* \(zip -0\)"
    ):
        open_image(packed)


def test_zip_file_that_vanishes_is_named(packed):
    reader = open_image(packed).source()
    packed.unlink()
    with pytest.raises(FileNotFoundError, match=r"image.ozx"):
        reader.read(0, 0, (slice(0, 4),) * 3)

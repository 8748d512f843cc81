"""Stores that were made to harm: named errors, bounded memory and time, nothing outside the output touched."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from hostile import (
    BLOCKS,
    BOMBS,
    CHUNKS,
    METADATA,
    OME,
    PEAK_SCRIPT,
    SHAPE,
    SHARDS,
    both,
    edit,
    group,
    honest,
    linked,
    member,
    plant,
    voxels,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs.runner import BlockError
from chunkrestore.ome_zarr import arrays, create_image, info, open_image, open_writer
from chunkrestore.ome_zarr.store import clean_partial

SERIAL = {"cluster": "serial", "quiet": True}


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


def some(cases):
    """Every sixth case; the others when there is time."""
    return [c if k % 6 == 0 else pytest.param(c, marks=pytest.mark.slow) for k, c in enumerate(cases)]


def start_job(source, output, **options):
    return cr.run(
        cr.Threshold(1.0), source, output, cluster="serial", quiet=True, label_name="found", **options
    )


@pytest.mark.parametrize("case", [*some(METADATA), *BLOCKS], ids=names)
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


def overwrite(output, how):
    """Write a new image, or labels, into an output."""
    options = {"axes": "zyx", "voxel_size": (1, 1, 1), "overwrite": True}
    if how == "image":
        cr.write_image(voxels(), output, levels=2, **options)
    else:
        cr.write_labels(voxels().astype("i4"), output, "cells", **options)


def replace(output, how):
    """Return whether the output can be written."""
    try:
        overwrite(output, how)
    except (ValueError, FileExistsError, FileNotFoundError):
        return False
    return True


@pytest.mark.parametrize("how", ["image", "labels"])
@pytest.mark.parametrize("case", some(METADATA), ids=names)
def test_replacing_a_hostile_output_is_refused_or_done_and_touches_nothing_else(case, how, build, outside):
    path = build(case)
    if replace(path, how):
        written = open_image(path if how == "image" else path / "labels/cells")
        np.testing.assert_array_equal(written.data.compute(), voxels())


@pytest.mark.parametrize("how", ["image", "labels"])
def test_job_refuses_an_output_that_leads_elsewhere(how, templates, tmp_path, outside):
    output = templates(tmp_path / "image.zarr")
    linked("0", "0")(output)
    before = tree(output)
    lucy = cr.RichardsonLucy(np.ones((1, 3, 3)) / 9, iterations=1)
    operator = cr.Threshold(1.0) if how == "labels" else lucy
    source = templates(tmp_path / "in.zarr")
    with pytest.raises(ValueError, match=r"no OME-Zarr image|leads out of its group"):
        cr.run(operator, source, output, overwrite=True, **SERIAL)
    assert tree(output) == before


UNLISTED = both(linked("0", "0"), group(*OME, "datasets", to=[{"path": "1"}]))
DOCUMENTS = both(linked("zarr.json", "image.zarr/zarr.json"), linked("0/zarr.json", "0/zarr.json"))
WAYS = {
    "level": (linked("0", "0"), "image", None),
    "level below a link": (both(linked("deep", ""), member("deep/0")), "image", "deep leads elsewhere"),
    "level that is not listed": (UNLISTED, "image", "0 leads elsewhere"),
    "labels as a level": (member("labels/cells/0"), "image", "lists 'labels/cells/0' as a level"),
    "all labels as a level": (member("labels"), "image", "lists 'labels' as a level"),
    "group as a level": (both(linked("folder", "image.zarr"), member("folder")), "image", "is no array"),
    "labels": (linked("labels", "image.zarr"), "labels", "labels/cells leads elsewhere"),
    "labels of an image": (linked("labels", "image.zarr"), "image", "labels leads out of its group"),
    "label": (linked("labels/cells", "image.zarr"), "labels", "labels/cells leads elsewhere"),
    "label of an image": (linked("labels/cells", "image.zarr"), "image", "cells leads out of its group"),
    "level of a label": (linked("labels/cells/0", "0"), "labels", None),
    "documents": (DOCUMENTS, "image", None),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_written_or_removed_behind_a_link(way, templates, tmp_path, outside):
    make, how, message = WAYS[way]
    path = templates(tmp_path / "image.zarr")
    make(path)
    before = tree(path)
    if message is None:
        overwrite(path, how)
        assert not any(p.is_symlink() for p in path.rglob("*"))
    else:
        with pytest.raises(ValueError, match=message):
            overwrite(path, how)
        assert tree(path) == before


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_resumed_output_does_not_write_through_links_that_were_put_into_it(version, tmp_path, outside):
    path = tmp_path / "image.zarr"
    writer = create_image(path, shape=SHAPE, dtype="u2", axes="zyx", version=version, chunks=CHUNKS, levels=1)
    region = tuple(slice(0, n) for n in SHAPE)
    writer.target().write(0, 0, region, voxels())
    first = path / ("0/0" if version == "0.4" else "0/c")
    shutil.rmtree(first)
    first.symlink_to(tmp_path / "outside/0/c")
    # As in another process, which remembers nothing of the folders that were written to before
    arrays._open.cache_clear()
    with pytest.raises(ValueError, match="leads elsewhere, and nothing is written"):
        open_writer(path).target().write(0, 0, region, voxels())


def test_links_to_files_are_read_through_and_replaced_when_written(templates, tmp_path, outside):
    path = templates(tmp_path / "image.zarr")
    annexed = shutil.copytree(path, tmp_path / "annexed.zarr", copy_function=lambda a, b: os.symlink(a, b))
    np.testing.assert_array_equal(use(annexed).data.compute(), voxels())
    before = tree(path)
    overwrite(annexed, "image")
    assert tree(path) == before


def test_store_whose_own_path_is_a_link_is_read_and_written(templates, tmp_path):
    path = templates(tmp_path / "image.zarr")
    link = tmp_path / "link.zarr"
    link.symlink_to(path)
    np.testing.assert_array_equal(use(link).data.compute(), voxels())
    overwrite(link, "labels")
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
    create_image(path, shape=SHAPE, dtype="u2", axes="zyx", levels=1)
    (path / "linked").symlink_to(tmp_path / "outside/0")
    key, value = DAMAGED[what]
    edit(path / "zarr.json", "attributes", "chunkrestore", key, to=value)
    with pytest.raises(ValueError, match=r"leaves its group|leads elsewhere|was to become is damaged"):
        open_writer(path)


# Memory: in a process of its own, whose peak is known before the bombs are read.


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc for the peak of a process")
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_bombs_do_not_unfold(templates, tmp_path):
    stores = [
        plant(name, templates(tmp_path / f"{name} {version} {shards}.zarr", version, shards))
        for name in BOMBS
        for version, shards in (("0.4", None), ("0.5", None), ("0.5", SHARDS))
    ]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PEAK_SCRIPT,
        templates(tmp_path / "honest.zarr"),
        *stores,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert {error for error, *_ in outcomes} == {"CorruptChunkError"}
    assert [reason for *_, reason in outcomes if "a chunk has 2048" not in reason] == []
    # Loading a codec takes one or two megabytes; a state of bzip2 four, and the smallest bomb has 16
    assert max(int(kilobytes) for _, kilobytes, _ in outcomes) < 12 * 1024, done.stdout
    assert len(outcomes) == len(stores)


# Fuzzing: one value of a valid document is replaced by another.

NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**40, 2**63, -(2**70), 10**400, 0.5, 1e308, float("nan"), float("inf")]
TEXTS = ["NaN", "../x", "/", "0", "\x00", "\ud800", "bytes", "zstd", "v2", "|O"]
LISTS = [[], [[]], [None], [{}], ["x"] * 6, [1, 2, 3], [2**40] * 3]
OBJECTS = [{}, {"name": "zstd"}, {"name": []}, {"id": "zlib"}, {"type": ["a"]}]
ODD = st.none() | st.booleans() | st.text(max_size=8) | st.sampled_from([*NUMBERS, *TEXTS, *LISTS, *OBJECTS])
DOCUMENTS_OF = {
    "0.4": [".zattrs", "0/.zarray", ".zgroup", "labels/.zattrs"],
    "0.5": ["zarr.json", "0/zarr.json", "labels/zarr.json"],
}
KINDS = [("0.4", None), ("0.5", None), ("0.5", SHARDS)]


def places(value, path=()):
    """List the keys that lead to every value inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_and_use(data, path, version):
    """Replace one value of a store that is described, read and replaced then."""
    file = path / data.draw(st.sampled_from(DOCUMENTS_OF[version]))
    keys = data.draw(st.sampled_from([k for k in places(json.loads(file.read_text())) if k]))
    edit(file, *keys, to=data.draw(ODD))
    start = time.process_time()
    try:
        use(path)
        open_image(path).data[:1].compute()
    except (ValueError, FileNotFoundError):
        pass
    assert replace(path, "image") in (True, False)
    assert time.process_time() - start < 5
    shutil.rmtree(path)


@pytest.mark.parametrize(("version", "shards"), KINDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_document_is_read_or_refused(data, version, shards, templates, tmp_path_factory):
    change_and_use(data, templates(tmp_path_factory.mktemp("fuzz") / "image.zarr", version, shards), version)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "shards"), KINDS)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_thousand_changes_of_documents_are_read_or_refused(
    data, version, shards, templates, tmp_path_factory
):
    change_and_use(data, templates(tmp_path_factory.mktemp("fuzz") / "image.zarr", version, shards), version)

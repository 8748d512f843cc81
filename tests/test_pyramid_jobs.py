"""Pyramids written with the full resolution, and built in place for images that exist."""

import itertools
import json
from contextlib import suppress

import numpy as np
import pytest
import zarr
from dying import Disk, Killed, bury, kind
from observing import tree

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs.ledger import ManifestMismatchError
from chunkrestore.jobs.pyramids import build_pyramid
from chunkrestore.ome_zarr import RegionReader, open_image
from chunkrestore.ome_zarr.layout import CHUNK_LENGTH
from chunkrestore.ome_zarr.new_levels import NewLevels
from chunkrestore.psf import gaussian

SERIAL = {"cluster": "serial", "quiet": True}
PSF = gaussian((1.0, 1.0, 1.0), truncate=2)
FUSED = {"block_shape": (32, 32, 32), "shards": (16, 16, 16), **SERIAL}
"""Blocks of several shards: 16 voxels, so chunks of 16, and two levels above that blocks of 32 and 64 hold."""


@pytest.fixture(scope="module")
def disk():
    return Disk()


def volume(shape, seed=5, high=900):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16)


def averaged(array, factors):
    """Return means of windows, rounded half up: the definition, for any length."""
    counts = np.ones(array.shape)
    total = array.astype(np.float64)
    for axis, f in enumerate(factors):
        starts = np.arange(0, array.shape[axis], f)
        total, counts = np.add.reduceat(total, starts, axis), np.add.reduceat(counts, starts, axis)
    mean = total / counts
    return np.floor(mean + 0.5).astype(array.dtype) if array.dtype.kind in "iu" else mean.astype(array.dtype)


def levels_of(path):
    return [
        np.asarray(level.compute())
        for level in map(open_image(path).level, range(len(open_image(path).levels)))
    ]


def journal_of(output, job="image"):
    text = (output.with_name(f"{output.name}.chunkrestore") / job / "journal.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.zarr"
    data = volume((2, 64, 70, 96))
    return cr.write_image(data, path, axes="czyx", voxel_size=(1, 1, 1), levels=1)


def restored(image, output, **options):
    operators = [cr.RichardsonLucy(PSF, iterations=1, depth=4), cr.Threshold(450.0)]
    return cr.run(operators, image, output, **FUSED | options)


class TestFused:
    """Levels that blocks write with the full resolution."""

    def test_blocks_write_the_levels_that_they_hold(self, tmp_path, image, monkeypatch):
        monkeypatch.setitem(CHUNK_LENGTH, 3, 8)
        output = tmp_path / "out.zarr"
        restored(image, output, channel=0)
        entries = journal_of(output)
        decided = {e["value"]: e["payload"] for e in entries if "value" in e}
        assert decided["fused-blocks-0"] == decided["fused-paint"] == 2
        blocks = [e["payload"] for e in entries if e.get("stage") == "blocks-0" and "item" in e]
        assert len(blocks) == 2 * 3 * 3
        assert all(len(payload["crc32s"]) == 2 for payload in blocks)
        stages = [e["stage"] for e in entries if "stage" in e]
        assert {s for s in stages if "pyramid" in s} == {"pyramid-0-3to4", "labels_pyramid-3to4"}

    def test_levels_equal_those_of_a_pass_of_their_own(self, tmp_path, image, monkeypatch):
        monkeypatch.setitem(CHUNK_LENGTH, 3, 8)
        output = tmp_path / "out.zarr"
        restored(image, output)
        fused = levels_of(output)
        assert len(fused) == 5
        for below, level in itertools.pairwise(fused):
            np.testing.assert_allclose(level, averaged(below, (1, 2, 2, 2)), rtol=3e-7)
        again = cr.write_image(fused[0], tmp_path / "again.zarr", axes="czyx", voxel_size=(1, 1, 1))
        for level, expected in zip(fused, levels_of(again.path), strict=True):
            np.testing.assert_array_equal(level, expected)
        labels = levels_of(output / "labels" / "labels")
        assert [a.shape for a in labels] == [a.shape for a in fused]
        assert all(set(np.unique(a)) <= set(np.unique(labels[0])) for a in labels)
        assert labels[2].any()

    @pytest.mark.parametrize("victim", ["1", "2", "4", "labels/labels/1"])
    def test_a_changed_voxel_of_any_level_is_found(self, tmp_path, image, victim, monkeypatch):
        monkeypatch.setitem(CHUNK_LENGTH, 3, 8)
        output = tmp_path / "out.zarr"
        restored(image, output, channel=0)
        (found,) = cr.verify(output, **SERIAL)
        assert found.ok
        array = zarr.open_array(output / victim, mode="r+")
        array[(0, *(n - 1 for n in array.shape[1:]))] += 1
        (found,) = cr.verify(output, **SERIAL)
        assert len(found.problems) == 1
        assert f"the stored voxels of {output / victim} are not those" in found.problems[0]

    def test_a_job_of_an_older_version_goes_on_without_what_its_blocks_did_not_write(
        self, tmp_path, image, monkeypatch
    ):
        """What blocks write is decided once: blocks that are finished are not done again."""
        monkeypatch.setitem(CHUNK_LENGTH, 3, 8)
        output = tmp_path / "out.zarr"
        with monkeypatch.context() as patch:
            patch.setattr("chunkrestore.jobs.stages.fused_with", lambda writer, grid: 0)
            patch.setattr(
                "chunkrestore.jobs.stages.Stages.pyramid", lambda *_: (_ for _ in ()).throw(Killed())
            )
            with pytest.raises(Killed):
                restored(image, output, channel=0)
        bury(output)
        path = output.with_name("out.zarr.chunkrestore") / "image" / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "fused-" not in line))
        restored(image, output, channel=0)
        restored(image, tmp_path / "undisturbed.zarr", channel=0)
        assert tree(output) == tree(tmp_path / "undisturbed.zarr")
        assert all(v.ok for v in cr.verify(output, **SERIAL))


def small_job(folder):
    """Return a job that copies an image and labels it, its blocks writing two levels of each."""
    data = volume((16, 24, 20), seed=8)
    image = cr.write_image(data, folder / "in.zarr", axes="zyx", voxel_size=(1, 1, 1), levels=1)
    options = {"block_shape": (16, 16, 16), "shards": (16, 16, 16), **SERIAL}
    lucy = cr.RichardsonLucy(PSF, iterations=1, depth=4)
    return lambda output: cr.run([lucy, cr.Threshold(500.0)], image, output, **options)


def deaths(disk, output, work, moments, check=lambda: None):
    """Kill `work` before each of some changes to files, and let it come to its end after each."""
    for moment in moments:
        with disk.dies_after(moment, output.parent), suppress(Killed):
            work()
        bury(output)
        check()
        if not list(output.parent.glob(f"{output.name}.chunkrestore/*/report.json")):  # else it was done
            work()


def all_changes(disk, folder, work):
    with disk.dies_after(10**9, folder):
        work()
    return disk.changes


def moments_of(changes, every):
    """Return a moment before the first change of each kind, and every so many changes."""
    kinds = [kind(change) for change in changes]
    firsts = {kinds.index(k) for k in dict.fromkeys(kinds)}
    return sorted(firsts)[::every] if every > 1 else range(len(changes))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_job_with_fused_levels_ends_byte_for_byte_the_same(tmp_path, disk, monkeypatch, every):
    monkeypatch.setitem(CHUNK_LENGTH, 3, 4)
    job = small_job(tmp_path)
    (tmp_path / "a").mkdir()
    changes = all_changes(disk, tmp_path / "a", lambda: job(tmp_path / "a" / "out.zarr"))
    expected = tree(tmp_path / "a" / "out.zarr")
    assert any("out.zarr/2/c" in path for _, path in changes)
    for moment in moments_of(changes, every):
        folder = tmp_path / f"at-{moment}"
        folder.mkdir()
        output = folder / "out.zarr"
        deaths(disk, output, lambda output=output: job(output), [moment])
        assert tree(folder / "out.zarr") == expected
        assert all(v.ok for v in cr.verify(folder / "out.zarr", **SERIAL))


def write_foreign(path, data, axes, *, version="0.5", paths=("0",), **options):
    """Write an image as other tools do, by zarr alone: one level, or several of which the others hold nonsense."""
    zarr_format = 3 if version == "0.5" else 2
    types = {a: {"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"}
    types |= {"t": {"name": "t", "type": "time"}, "c": {"name": "c", "type": "channel"}}
    multiscale = {
        "name": "foreign",
        "axes": [types[a] for a in axes],
        "datasets": [],
    }
    group = zarr.create_group(path, zarr_format=zarr_format)
    for k, name in enumerate(paths):
        lengths = [n if a in "tc" else -(-n // 2**k) for n, a in zip(data.shape, axes, strict=True)]
        if zarr_format == 3:
            options["dimension_names"] = list(axes)
        else:
            options["attributes"] = {"_ARRAY_DIMENSIONS": list(axes), "statistics": {"max": 3}}
        array = group.create_array(name, shape=lengths, dtype=data.dtype, **options)
        array[...] = data if k == 0 else 7
        scale = [1.5 if a == "t" else 1.0 if a == "c" else 200.0 * 2**k for a in axes]
        steps = [{"type": "scale", "scale": scale}]
        if k == 0:
            steps.append({"type": "translation", "translation": [10.0 if a in "zyx" else 0.0 for a in axes]})
        multiscale["datasets"].append({"path": name, "coordinateTransformations": steps, "ours": k})
    ome = {"multiscales": [multiscale], "unheard": [1]}
    if version == "0.4":
        multiscale["version"] = "0.4"
        group.attrs.update({**ome, "facility": {"kept": None}})
    else:
        group.attrs.update({"ome": {"version": "0.5", **ome}, "facility": {"kept": None}})
    return path


DOTS, SLASHES = ({"chunk_key_encoding": {"name": "v2", "separator": separator}} for separator in "./")
FOREIGN = {
    "v2, dots": ("zyx", (40, 37, 50), "0.4", {"chunks": (16, 16, 16), **DOTS}),
    "v2, channels in one chunk": ("czyx", (3, 20, 37, 50), "0.4", {"chunks": (3, 8, 16, 16), **SLASHES}),
    "v3, shards, fill value": (
        *("tczyx", (2, 2, 24, 40, 50), "0.5"),
        {"chunks": (1, 1, 8, 8, 8), "shards": (1, 2, 16, 16, 32), "fill_value": 7},
    ),
    "v3, x first": ("xyz", (33, 40, 50), "0.5", {"chunks": (8, 16, 8)}),
    "v3, two axes, big-endian": ("yx", (300, 1100), "0.5", {"chunks": (64, 50)}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_store_by_others_gets_levels_stored_like_its_own(tmp_path, case, monkeypatch):
    monkeypatch.setitem(CHUNK_LENGTH, 2, 128)
    monkeypatch.setitem(CHUNK_LENGTH, 3, 16)
    axes, shape, version, options = FOREIGN[case]
    dtype = ">u2" if "big" in case else "uint16"
    path = tmp_path / "foreign.zarr"
    write_foreign(path, volume(shape).astype(dtype), axes, version=version, **options)
    before = zarr.open_group(path, mode="r")
    first, attributes = before["0"], before.attrs.asdict()
    report = build_pyramid(path, **SERIAL)
    assert report.outputs == [str(path)]
    after = zarr.open_group(path, mode="r")
    ome = after.attrs.asdict().get("ome", after.attrs.asdict())
    multiscale = ome["multiscales"][0]
    old = attributes.get("ome", attributes)["multiscales"][0]
    assert multiscale["datasets"][0] == old["datasets"][0]
    assert multiscale.pop("type") == "mean"
    assert set(multiscale.pop("metadata")) == {"method", "version", "description"}
    datasets, multiscale["datasets"] = multiscale["datasets"], old["datasets"]
    expected_attributes = dict(attributes)
    now = after.attrs.asdict()
    (now.get("ome", now))["multiscales"][0] = multiscale
    assert now == expected_attributes
    assert [d["path"] for d in datasets] == [str(k) for k in range(len(datasets))]
    assert len(datasets) == (5 if axes == "yx" else 3)
    expected, total = first[...], np.ones(len(axes))
    for entry in datasets[1:]:
        factors = [1 if a in "tc" else 2 for a in axes]
        expected, total = averaged(expected, factors), total * factors
        array = after[entry["path"]]
        assert array.shape == expected.shape
        assert (array.dtype, array.fill_value) == (first.dtype, first.fill_value)
        assert [c for c, a in zip(array.chunks, axes, strict=True) if a not in "tc"] == [
            c for c, a in zip(first.chunks, axes, strict=True) if a not in "tc"
        ]
        assert (array.compressors, array.filters, array.serializer if version == "0.5" else 0) == (
            first.compressors, first.filters, first.serializer if version == "0.5" else 0,
        )  # fmt: skip
        assert array.metadata.encode_chunk_key((0,) * array.ndim) == first.metadata.encode_chunk_key(
            (0,) * array.ndim
        )
        if version == "0.5":
            assert array.metadata.dimension_names == first.metadata.dimension_names
            assert array.attrs.asdict() == {}
        else:
            assert array.attrs.asdict() == {"_ARRAY_DIMENSIONS": list(axes)}
        np.testing.assert_array_equal(array[...], expected)
        scale, translation = entry["coordinateTransformations"]
        own = np.array(datasets[0]["coordinateTransformations"][0]["scale"])
        np.testing.assert_allclose(scale["scale"], own * total)
        moved = [10.0 if a in "zyx" else 0.0 for a in axes] + (total - 1) / 2 * own
        np.testing.assert_allclose(translation["translation"], moved)
    validate(path, version)
    assert all(v.ok for v in cr.verify(path, **SERIAL))


def validate(path, version):
    import ome_zarr_models
    import yaozarrs

    yaozarrs.validate_zarr_store(path)
    assert ome_zarr_models.open_ome_zarr(zarr.open_group(path, mode="r")).ome_zarr_version == version


def with_labels(folder, n_levels=1):
    """Write an image with two label groups, all of `n_levels`."""
    path = folder / "image.zarr"
    data = volume((20, 40, 36))
    cr.write_image(data, path, axes="zyx", voxel_size=(1, 1, 1), levels=n_levels, chunks=(8, 8, 8))
    for name in ("cells", "nuclei"):
        cr.write_labels((data // 100).astype(np.int32), path, name, chunks=(8, 8, 8))
    return path


def test_labels_get_as_many_levels_as_their_image(tmp_path):
    path = with_labels(tmp_path)
    build_pyramid(path, levels=4, method="mode", **SERIAL)
    image = open_image(path)
    for name in ("cells", "nuclei"):
        labels = image.label(name)
        assert [level.shape for level in labels.levels] == [level.shape for level in image.levels]
        assert [level.translation for level in labels.levels] == [level.translation for level in image.levels]
        assert labels.ome["multiscales"][0]["type"] == "mode"
        ids = set(np.unique(labels.level(0).compute()))
        assert all(set(np.unique(labels.level(k).compute())) <= ids for k in range(4))
    validate(path, "0.5")
    again = cr.write_image(image.data, tmp_path / "again.zarr", axes="zyx", voxel_size=(1, 1, 1), levels=4)
    for mine, expected in zip(levels_of(path), levels_of(again.path), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_every_level_is_read_once_at_most(tmp_path, monkeypatch):
    path = with_labels(tmp_path)
    n_read, original = {}, RegionReader.read

    def count(self, t, c, slices):
        array = original(self, t, c, slices)
        n_read[self.name] = n_read.get(self.name, 0) + array.size
        return array

    monkeypatch.setattr("chunkrestore.ome_zarr.levels.STEP_VOXELS", 1000)
    monkeypatch.setattr("chunkrestore.ome_zarr.pyramid.STEP_VOXELS", 1000)
    monkeypatch.setattr(RegionReader, "read", count)
    report = build_pyramid(path, levels=6, **SERIAL)
    sizes = {str(p): zarr.open_array(p, mode="r").size for p in [path / "0", path / "1", path / "2"]}
    assert n_read[str(path / "0")] == sizes[str(path / "0")]
    assert all(n_read.get(name, 0) in (0, n) for name, n in sizes.items())
    assert len([name for name in n_read if name.startswith(str(path / "labels" / "cells"))]) < 5
    item = {"image": 2, "labels": 4}
    read = sum(n * item["labels" if "labels" in name else "image"] for name, n in n_read.items())
    assert report.plan["read_nbytes"] == read


def test_missing_levels_are_added_to_those_that_exist(tmp_path):
    path = with_labels(tmp_path, n_levels=2)
    before = tree(path)
    build_pyramid(path, levels=4, **SERIAL)
    after = tree(path)
    assert all(after[name] == content for name, content in before.items() if not name.endswith("zarr.json"))
    assert [level.path for level in open_image(path).levels] == ["0", "1", "2", "3"]


def test_levels_are_replaced_and_the_old_ones_removed(tmp_path):
    path = write_foreign(
        tmp_path / "a.zarr", volume((40, 40, 40)), "zyx", paths=("s0", "s1", "s2"), chunks=(16,) * 3
    )
    build_pyramid(path, overwrite=True, levels=3, **SERIAL)
    assert sorted(p.name for p in path.iterdir()) == ["s0", "s3", "s4", "zarr.json"]
    np.testing.assert_array_equal(levels_of(path)[1], averaged(levels_of(path)[0], (2, 2, 2)))
    build_pyramid(path, overwrite=True, levels=2, **SERIAL)
    assert sorted(p.name for p in path.iterdir()) == ["s0", "s1", "zarr.json"]
    validate(path, "0.5")


def test_names_follow_those_of_level_0(tmp_path):
    for first, second in (("scale0/image", "scale1/image"), ("full", "full_1"), ("c3/0", "c3/1")):
        path = tmp_path / second.replace("/", "-")
        write_foreign(path, volume((32, 32, 32)), "zyx", paths=(first,), chunks=(16,) * 3)
        build_pyramid(path, levels=2, **SERIAL)
        assert [level.path for level in open_image(path).levels] == [first, second]
        assert zarr.open_group(path, mode="r")[second].shape == (16, 16, 16)


def test_a_label_group_alone_gets_the_levels_of_its_image(tmp_path):
    path = with_labels(tmp_path)
    build_pyramid(path, levels=3, **SERIAL)
    cells = path / "labels" / "cells"
    build_pyramid(cells, overwrite=True, method="mode", **SERIAL)
    assert len(open_image(cells).levels) == 3
    assert (tmp_path / "image.zarr.chunkrestore" / "pyramid-cells").is_dir()
    with pytest.raises(ValueError, match=r"`levels` 2 must be 3, as many as .* has"):
        build_pyramid(cells, levels=2, overwrite=True, **SERIAL)


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_image_is_whole_whenever_the_job_dies(tmp_path, disk, every):
    """Readers see the old levels or the new ones, and gone on with, the job ends byte for byte the same."""

    def prepare(folder):
        folder.mkdir()
        path = write_foreign(
            folder / "a.zarr", volume((20, 24, 20)), "zyx", paths=("0", "1"), chunks=(8,) * 3
        )
        cr.write_labels(volume((20, 24, 20), high=9).astype(np.int32), path, "cells", chunks=(8, 8, 8))
        return path, lambda: build_pyramid(path, overwrite=True, levels=3, method="mode", **SERIAL)

    path, work = prepare(tmp_path / "a")
    old = levels_of(path)
    changes = all_changes(disk, tmp_path / "a", work)
    expected, new = tree(path), levels_of(path)
    seen = set()
    for moment in moments_of(changes, every):
        path, work = prepare(tmp_path / f"at-{moment}")

        def check(path=path):
            levels = levels_of(path)
            seen.add(len(levels))
            for level, whole in zip(levels, old if len(levels) == 2 else new, strict=True):
                np.testing.assert_array_equal(level, whole)
            validate(path, "0.5") if len(levels) == len(open_image(path).label("cells").levels) else None

        deaths(disk, path, work, [moment], check)
        for name, content in tree(path).items():
            assert content == expected[name]
        assert all(v.ok for v in cr.verify(path, **SERIAL))
    assert seen == {2, 3}


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_consolidated_metadata_are_renewed(tmp_path, version):
    data = volume((32, 32, 32))
    path = tmp_path / "a.zarr"
    write_foreign(path, data, "zyx", version=version, paths=("0", "1"), chunks=(16,) * 3)
    zarr.consolidate_metadata(path)
    cr.write_labels(data.astype(np.int32), path, "cells", chunks=(16,) * 3)
    build_pyramid(path, levels=3, overwrite=True, **SERIAL)
    group = zarr.open_consolidated(path)
    assert {name for name, _ in group.members()} == {"0", "2", "3", "labels"}
    assert group["labels/cells/3"].shape == group["3"].shape == (8, 8, 8)
    assert all(v.ok for v in cr.verify(path, **SERIAL))


def test_nobody_writes_into_levels_that_are_listed(tmp_path):
    path = with_labels(tmp_path)
    image = open_image(path)
    plans = cr.ome_zarr.layout.default_pyramid(image.spatial_shape, (1, 1, 1), 2)
    group = NewLevels.of(image, 1, plans, "mean")
    group.create("token")
    target = group.writer("token").targets[1]
    region = tuple(slice(0, n) for n in target.shape)
    target.write(0, 0, region, np.ones(target.shape, np.uint16))
    with pytest.raises(ValueError, match="begun anew by another job"):
        group.writer("another").targets[1].write(0, 0, region, np.zeros(target.shape, np.uint16))
    group.publish()
    with pytest.raises(ValueError, match="begun anew by another job"):
        target.write(0, 0, region, np.zeros(target.shape, np.uint16))
    assert levels_of(path)[1].all()


def test_an_unfinished_job_with_other_arguments_is_refused_or_begun_anew(tmp_path, disk):
    path = with_labels(tmp_path)
    with disk.dies_after(12, tmp_path), suppress(Killed):
        build_pyramid(path, levels=3, **SERIAL)
    bury(path)
    with pytest.raises(ManifestMismatchError, match=r"request.levels was 3, is 4"):
        build_pyramid(path, levels=4, **SERIAL)
    build_pyramid(path, levels=4, overwrite=True, **SERIAL)
    assert [level.path for level in open_image(path).levels] == ["0", "1", "2", "3"]
    assert all(v.ok for v in cr.verify(path, **SERIAL))


def test_an_unfinished_job_is_resumed_without_its_arguments(tmp_path, disk):
    path, other = with_labels(tmp_path / "a"), with_labels(tmp_path / "b")
    build_pyramid(other, levels=3, method="mode", **SERIAL)
    with disk.dies_after(30, path.parent), suppress(Killed):
        build_pyramid(path, levels=3, method="mode", **SERIAL)
    bury(path)
    assert len(open_image(path).levels) == 1
    cr.resume(path, **SERIAL)
    assert tree(path) == tree(other)


def test_the_command_builds_tells_verifies_and_draws(tmp_path, capsys):
    path = with_labels(tmp_path)
    for arguments in (["pyramid", "--levels", "3"], ["verify"]):
        with pytest.raises(SystemExit, match="0"):
            main([arguments[0], str(path), *arguments[1:], "--cluster", "serial"])
    for verb in ("status", "report"):
        with pytest.raises(SystemExit, match="0"):
            main([verb, str(path)])
    said = capsys.readouterr().out
    assert f"wrote      {path}" in said
    assert "pyramid: 3 blocks read, 0 problems" in said
    assert "pyramid-2-1to2     1 of 1 blocks, done" in said
    assert (tmp_path / "image.zarr.chunkrestore" / "pyramid" / "report.html").is_file()


def test_what_is_wrong_is_said_before_anything_is_touched(tmp_path):
    path = with_labels(tmp_path, n_levels=3)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"has 3 levels, and labels as many; ask for more `levels`"):
        build_pyramid(path, levels=3, **SERIAL)
    with pytest.raises(ValueError, match=r"`levels` 2 is less than the 3 of"):
        build_pyramid(path, levels=2, **SERIAL)
    with pytest.raises(ValueError, match=r"`method` 'mean' must be 'nearest' or 'mode'"):
        build_pyramid(path, levels=4, method="mean", **SERIAL)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dtype", ["float16", "uint64", "bool"])
def test_a_dtype_that_cannot_be_averaged_is_refused(tmp_path, dtype):
    path = write_foreign(tmp_path / "a.zarr", np.ones((32, 32, 32), dtype), "zyx", chunks=(16,) * 3)
    with pytest.raises(ValueError, match=f"`dtype` {dtype} of .* cannot be averaged"):
        build_pyramid(path, levels=2, **SERIAL)


def test_a_level_that_is_not_the_images_alone_is_not_removed(tmp_path):
    path = write_foreign(tmp_path / "a.zarr", volume((32, 32, 32)), "zyx", paths=("0", "1"), chunks=(16,) * 3)
    zarr.create_array(path / "0" / "c", shape=(16, 16, 16), dtype="u2", dimension_names=list("zyx"))
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["ome"]["multiscales"][0]["datasets"][1]["path"] = "0/c"
    (path / "zarr.json").write_text(json.dumps(document))
    before = tree(path)
    with pytest.raises(ValueError, match=r"lists '0/c' as a level, which is not that alone"):
        build_pyramid(path, overwrite=True, levels=2, **SERIAL)
    assert tree(path) == before


def test_levels_of_another_multiscale_stay(tmp_path):
    path = write_foreign(tmp_path / "a.zarr", volume((32, 32, 32)), "zyx", paths=("0", "1"), chunks=(16,) * 3)
    document = json.loads((path / "zarr.json").read_text())
    several = document["attributes"]["ome"]["multiscales"]
    several.append(json.loads(json.dumps(several[0])) | {"name": "second"})
    (path / "zarr.json").write_text(json.dumps(document))
    build_pyramid(path, overwrite=True, levels=2, **SERIAL)
    assert sorted(p.name for p in path.iterdir()) == ["0", "1", "2", "zarr.json"]
    assert [level.path for level in open_image(path).levels] == ["0", "2"]


def test_a_pyramid_on_a_cluster_equals_one_in_this_process(tmp_path):
    from distributed import Client, LocalCluster

    path, other = with_labels(tmp_path), with_labels(tmp_path / "other")
    options = {
        "n_workers": 1,
        "threads_per_worker": 2,
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
    }
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        build_pyramid(path, levels=3, cluster=client, quiet=True)
    build_pyramid(other, levels=3, **SERIAL)
    assert tree(path) == tree(other)

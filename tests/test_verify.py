"""Going on without the script that began a job, trying failed blocks again, and reading everything back."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import zarr
from observing import tree

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs import label_tasks, tasks
from chunkrestore.jobs.lock import LockedError
from chunkrestore.jobs.run import retry_failed
from chunkrestore.jobs.runner import BlockError
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.0, 1.0), truncate=2)
BLOCKS = {"block_shape": (8, 32, 32), "cluster": "serial", "quiet": True}


def operators():
    return [cr.RichardsonLucy(PSF, iterations=1, depth=4), cr.Threshold(30.0)]


@pytest.fixture
def image(tmp_path):
    data = np.random.default_rng(3).integers(0, 200, (2, 16, 64, 96)).astype(np.uint16)
    return cr.write_image(
        data, tmp_path / "in.zarr", axes="czyx", voxel_size=(1, 1, 1), channels=["nuclei", "membrane"]
    )


@contextmanager
def failing(task, items, error):
    """Make a task fail for chosen items."""
    module = label_tasks if hasattr(label_tasks, task) else tasks
    original = getattr(module, task)

    def fail(item, *arguments):
        if item in items:
            raise error
        return original(item, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, task, fail)
        yield


def interrupted_job(image, output, **options):
    """Run a job of which two blocks fail; return what the same job makes undisturbed, elsewhere."""
    reference = output.parent / "reference" / "out.zarr"
    cr.run(operators(), image, reference, **BLOCKS, **options)
    with (
        failing("process", {(0, 0, 0, 1, 2), (0, 0, 1, 0, 0)}, ValueError("bad voxel")),
        pytest.raises(BlockError) as caught,
    ):
        cr.run(operators(), image, output, **BLOCKS, **options)
    assert len(caught.value.failures) == 2
    return tree(reference)


def test_blocks_that_fail_do_not_stop_the_others_and_nothing_is_published(tmp_path, image):
    output = tmp_path / "out.zarr"
    interrupted_job(image, output, channel=0)
    journal = (tmp_path / "out.zarr.chunkrestore/image/journal.jsonl").read_text()
    entries = [json.loads(line) for line in journal.splitlines()]
    assert sum("item" in e and e["stage"] == "blocks-0" for e in entries) == 12 - 2
    assert sorted(e["failed"] for e in entries if "failed" in e) == [[0, 0, 0, 1, 2], [0, 0, 1, 0, 0]]
    assert {e["stage"] for e in entries if "stage" in e} == {"blocks-0"}
    with pytest.raises(ValueError, match="is unfinished"):
        cr.open_image(output)


@pytest.mark.parametrize(
    "selection",
    [
        {"channel": "membrane"},
        {"channel": [1, 0]},
        {"region": ((0, 16), (0, 64), (8, 90)), "channel": 0},
        {"level": 1, "channel": 0},
    ],
    ids=str,
)
def test_a_job_is_resumed_without_its_script(tmp_path, image, selection, monkeypatch):
    data = np.random.default_rng(3).integers(0, 200, (2, 32, 128, 192)).astype(np.uint16)
    image = cr.write_image(
        data, tmp_path / "two.zarr", axes="czyx", voxel_size=(1, 1, 1), levels=2, channels=["a", "membrane"]
    )
    output = tmp_path / "out.zarr"
    cr.run(operators(), image, tmp_path / "reference/out.zarr", **BLOCKS, **selection)
    with failing("process", {(0, 0, 0, 0, 0)}, ValueError("bad voxel")), pytest.raises(BlockError):
        cr.run(operators(), image, output, **BLOCKS, **selection)
    monkeypatch.chdir("/")
    report = cr.resume(output, cluster="serial", quiet=True)
    assert report.n_resumed > 0
    assert tree(output) == tree(tmp_path / "reference/out.zarr")
    with pytest.raises(ValueError, match="holds no unfinished job"):
        cr.resume(output, cluster="serial")


def test_failed_blocks_are_tried_first(tmp_path, image):
    output = tmp_path / "out.zarr"
    expected = interrupted_job(image, output, channel=0)
    report = retry_failed(output, cluster="serial", quiet=True)
    assert report.n_resumed == 10
    assert tree(output) == expected
    entries = map(
        json.loads, (tmp_path / "out.zarr.chunkrestore/image/events.jsonl").read_text().splitlines()
    )
    blocks = [tuple(e["item"]) for e in entries if e["event"] == "block" and e["stage"] == "blocks-0"]
    assert set(blocks[10:]) == {(0, 0, 0, 1, 2), (0, 0, 1, 0, 0)}


def test_there_is_nothing_to_try_again_where_nothing_failed(tmp_path, image):
    every = {(0, 0, 0, y, x) for y in range(2) for x in range(3)}
    with failing("paint", every, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        cr.run(operators(), image, tmp_path / "out.zarr", channel=0, **BLOCKS)
    with pytest.raises(ValueError, match=r"no block of the job in .* has failed"):
        retry_failed(tmp_path / "out.zarr", cluster="serial")
    cr.resume(tmp_path / "out.zarr", cluster="serial", quiet=True)


def test_a_stage_whose_first_blocks_all_fail_is_not_tried_to_its_end(tmp_path):
    data = np.ones((8, 64, 320), np.uint16)
    image = cr.write_image(data, tmp_path / "wide.zarr", axes="zyx", voxel_size=(1, 1, 1))
    every = {(0, 0, 0, y, x) for y in range(4) for x in range(20)}
    with failing("process", every, ValueError("no model")), pytest.raises(BlockError) as caught:
        cr.run(operators()[0], image, tmp_path / "out.zarr", **BLOCKS | {"block_shape": (8, 16, 16)})
    assert len(caught.value.failures) == 10


def test_a_full_disk_stops_the_job_at_once_and_it_can_be_resumed(tmp_path, image):
    output = tmp_path / "out.zarr"
    cr.run(operators(), image, tmp_path / "reference/out.zarr", channel=0, **BLOCKS)
    with (
        failing("process", {(0, 0, 0, 1, 0)}, OSError(28, "No space left on device")),
        pytest.raises(BlockError, match="No space left on device"),
    ):
        cr.run(operators(), image, output, channel=0, **BLOCKS)
    entries = map(
        json.loads, (tmp_path / "out.zarr.chunkrestore/image/journal.jsonl").read_text().splitlines()
    )
    assert sum("item" in entry for entry in entries) == 3
    cr.resume(output, cluster="serial", quiet=True)
    assert tree(output) == tree(tmp_path / "reference/out.zarr")


def test_a_second_driver_is_refused_while_the_first_runs(tmp_path, image, monkeypatch):
    """The second one is started from within a block of the first."""
    output, original, seen = tmp_path / "out.zarr", tasks.process, []

    def second(item, *arguments):
        with pytest.raises(LockedError, match="another driver") as caught:
            cr.run(operators(), image, output, channel=0, **BLOCKS)
        seen.append(str(caught.value))
        with pytest.raises(LockedError):
            cr.run(operators()[:1], image, output, overwrite=True, **BLOCKS)
        return original(item, *arguments)

    monkeypatch.setattr(tasks, "process", second)
    cr.run(operators(), image, output, channel=0, **BLOCKS)
    assert len(seen) == 12
    monkeypatch.undo()
    cr.run(operators(), image, tmp_path / "reference/out.zarr", channel=0, **BLOCKS)
    assert tree(output) == tree(tmp_path / "reference/out.zarr")


def verified(output):
    """Return the exit status of the verb."""
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(output), "--cluster", "serial"])
    return caught.value.code


def test_what_was_written_is_verified(tmp_path, image, capsys):
    output = tmp_path / "out.zarr"
    cr.run(operators(), image, output, **BLOCKS)
    (found,) = cr.verify(output, cluster="serial", quiet=True)
    assert found.ok
    written = [output, output / "labels" / "labels"]
    n_levels = [len(cr.open_image(path).levels) for path in written]
    assert found.n_blocks == 2 * 12 * len(written) + 2 * sum(n - 1 for n in n_levels)
    before = tree(tmp_path)
    assert verified(output) == 0
    assert tree(tmp_path) == before
    assert "0 problems" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["0", "1", "labels/labels/0"])
def test_one_changed_voxel_is_found(tmp_path, image, victim, capsys):
    output = tmp_path / "out.zarr"
    cr.run(operators(), image, output, **BLOCKS)
    if not (output / victim).exists():
        pytest.skip("one level only")
    array = zarr.open_array(output / victim, mode="r+")
    array[1, 7, 9, 11] += 1
    assert verified(output) == 1
    said = capsys.readouterr().out
    assert "1 problems" in said
    assert "channel 1: the stored voxels of" in said


def test_a_damaged_or_missing_file_is_found(tmp_path, image, capsys):
    output = tmp_path / "out.zarr"
    cr.run(operators()[:1], image, output, **BLOCKS)
    chunks = sorted(p for p in (output / "0").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunks[0].write_bytes(chunks[0].read_bytes()[:50])
    chunks[-1].unlink()
    assert verified(output) == 1
    said = capsys.readouterr().out
    assert "cannot be decoded" in said
    assert "are not those that were written" in said


def test_finished_blocks_of_an_unfinished_job_are_verified(tmp_path, image):
    output = tmp_path / "out.zarr"
    interrupted_job(image, output, channel=0)
    (found,) = cr.verify(output, cluster="serial", quiet=True)
    assert found.ok
    assert found.n_blocks == 10


def test_a_store_that_no_job_wrote_cannot_be_verified(tmp_path, image, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", image.path, "--cluster", "serial"])
    assert "holds no job" in capsys.readouterr().err


class Own(cr.Threshold):
    """An operator that this package does not know."""


def test_a_job_that_cannot_be_kept_is_resumed_by_its_script_only(tmp_path, image):
    output = tmp_path / "out.zarr"
    with failing("detect", {(0, 0, 0, 0, 0)}, ValueError("bad voxel")), pytest.raises(BlockError):
        cr.run(Own(30.0), image, output, channel=0, **BLOCKS)
    with pytest.raises(ValueError, match=r"Own.*repeat the command or script that began the job"):
        cr.resume(output, cluster="serial")
    report = cr.run(Own(30.0), image, output, channel=0, **BLOCKS)
    assert report.n_resumed == 11

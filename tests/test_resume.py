"""Jobs that are killed at any moment go on where they stopped, and end byte for byte as if nothing had happened."""

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest
import yaml
from dying import Disk, Killed, bury, kind
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import DEADLINE, tree, wait_for

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs import label_tasks, tasks
from chunkrestore.jobs.ledger import ManifestMismatchError
from chunkrestore.jobs.runner import BlockError
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.0, 1.0), truncate=2)
SERIAL = {"cluster": "serial", "quiet": True}
KEPT = [
    *("events.jsonl", "journal.jsonl", "manifest.json", "operators.json", "operators.npz", "options.json"),
    "report.json",
]
"""What a finished job leaves in its folder."""

STARDIST = "stardist3d-demo"


def journal_of(output, job="image"):
    return output.with_name(f"{output.name}.chunkrestore") / job / "journal.jsonl"


def finished_items(journal):
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(entry["stage"], *entry["item"]) for entry in entries if "item" in entry]


def write_input(folder, shape=(16, 24, 24)):
    data = np.random.default_rng(8).integers(0, 200, shape).astype(np.uint16)
    return cr.write_image(data, folder / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))


@pytest.fixture(scope="module")
def disk():
    return Disk()


BLOCKS = {"block_shape": (8, 12, 24), **SERIAL}


def chain():
    """An image by way of a scratch image, then labels: every kind of stage."""
    lucy = cr.RichardsonLucy(PSF, iterations=1, depth=4)
    return [lucy, lucy, cr.Threshold()]


@dataclass(frozen=True)
class Undisturbed:
    """An input, the result of an uninterrupted run of the chain, and the changes to files that it made."""

    image: object
    expected: dict[str, bytes] = field(repr=False)
    changes: list[tuple[str, str]] = field(repr=False)

    def __iter__(self):
        yield from (self.image, self.expected, self.changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, disk):
    """The input, the result of an uninterrupted run of the chain, and the changes to files that it makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    image = write_input(folder)
    with disk.dies_after(10**9, folder):
        cr.run(chain(), image, folder / "out.zarr", **BLOCKS)
    return Undisturbed(image, tree(folder / "out.zarr"), disk.changes)


def run_and_die(disk, image, output, n_changes, **options):
    """Run the chain until it dies; return whether it came to its end before."""
    with disk.dies_after(n_changes, output.parent), suppress(Killed):
        cr.run(chain(), image, output, **BLOCKS, **options)
    bury(output)
    return (journal_of(output).parent / "report.json").exists()


def check_resumed(undisturbed, disk, folder, moments):
    """Kill a job after so many changes to files, once or several times, then let it end."""
    image, expected, _ = undisturbed
    output = folder / "out.zarr"
    folder.mkdir()
    if not any(run_and_die(disk, image, output, n_changes) for n_changes in moments):
        report = cr.run(chain(), image, output, **BLOCKS)
        assert report.outputs == [str(output), str(output / "labels" / "labels")]
        assert len(report.seams) == 4
    assert tree(output) == expected
    items = finished_items(journal_of(output))
    assert len(items) == len(set(items))
    with pytest.raises(FileExistsError, match="exists; give another store or pass overwrite=True"):
        cr.run(chain(), image, output, **BLOCKS)
    kept = sorted(p.name for p in journal_of(output).parent.iterdir())
    assert kept == KEPT


def test_killed_before_changes_of_many_kinds(tmp_path, disk, undisturbed):
    kinds = [kind(change) for change in undisturbed.changes]
    moments = [kinds.index(k) for k in dict.fromkeys(kinds)]
    assert len(moments) > 40
    for moment in moments[::6]:
        check_resumed(undisturbed, disk, tmp_path / str(moment), [moment])


@settings(max_examples=5)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=3))
def test_killed_several_times(tmp_path_factory, disk, undisturbed, moments):
    n_changes = [int(moment * len(undisturbed.changes)) for moment in moments]
    check_resumed(undisturbed, disk, tmp_path_factory.mktemp("killed") / "job", n_changes)


@pytest.mark.slow
def test_killed_before_every_change(tmp_path, disk, undisturbed):
    for moment in range(len(undisturbed.changes)):
        check_resumed(undisturbed, disk, tmp_path / str(moment), [moment])


@pytest.mark.slow
def test_killed_while_an_output_is_replaced(tmp_path, disk, undisturbed):
    """Started anew with `overwrite`, killed, resumed without: the new result, or a refusal and the old one."""
    image, expected, _ = undisturbed
    n_resumed = 0
    for moment in range(0, len(undisturbed.changes), 3):
        output = tmp_path / str(moment) / "out.zarr"
        output.parent.mkdir()
        cr.run([cr.RichardsonLucy(PSF, iterations=2, depth=3), cr.Threshold(3.0)], image, output, **BLOCKS)
        old = tree(output)
        run_and_die(disk, image, output, moment, overwrite=True)
        try:
            cr.run(chain(), image, output, **BLOCKS)
        except FileExistsError:
            assert tree(output) == old
        else:
            assert tree(output) == expected
            n_resumed += 1
    assert n_resumed > 20


@contextmanager
def command(*arguments):
    """Run a command line in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "chunkrestore", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def n_recorded(journal, stage):
    return journal.read_bytes().count(b'"stage": "%s", "item"' % stage.encode()) if journal.exists() else 0


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory):
    """A pipeline of 48 blocks in a file, and its undisturbed result."""
    folder = tmp_path_factory.mktemp("many")
    write_input(folder, (24, 48, 48))
    np.save(folder / "psf.npy", PSF)
    steps = [
        {"operator": "richardson-lucy", "psf": str(folder / "psf.npy"), "depth": 6},
        {"operator": "threshold"},
    ]
    content = {"input": str(folder / "in.zarr"), "output": "out.zarr", "steps": steps, "block": [8, 12, 12]}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(path), "--cluster", "serial", "-q"])
    return path, tree(folder / "out.zarr")


@pytest.mark.parametrize(("cluster", "stage"), [("serial", "blocks-0"), ("local", "paint")])
def test_the_driver_is_killed_and_the_command_repeated(many_blocks, tmp_path, cluster, stage):
    original, expected = many_blocks
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(original.read_text())
    journal = journal_of(tmp_path / "out.zarr")
    with command("run", pipeline, "--cluster", cluster, "--workers", 2) as process:
        wait_for(lambda: n_recorded(journal, stage) >= 5 or process.poll() is not None, "five blocks")
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        before = finished_items(journal)
        # Workers do not outlive their driver.
        assert psutil.wait_procs(workers, timeout=DEADLINE)[1] == []
    assert 5 <= sum(item[0] == stage for item in before) < 48
    with journal.open("ab") as file:
        file.write(b'{"stage": "blo')
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(pipeline), "--cluster", "serial", "-q"])
    after = finished_items(journal)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))
    assert tree(tmp_path / "out.zarr") == expected


@pytest.mark.parametrize(
    ("cluster", "number"),
    [
        ("serial", signal.SIGTERM),
        ("local", signal.SIGINT),
        pytest.param("local", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_command_exits_with_75_and_can_be_repeated(many_blocks, tmp_path, cluster, number):
    original, expected = many_blocks
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(original.read_text())
    journal = journal_of(tmp_path / "out.zarr")
    with command("run", pipeline, "--cluster", cluster, "--workers", 2, "-q") as process:
        wait_for(lambda: n_recorded(journal, "blocks-0") >= 5 or process.poll() is not None, "five blocks")
        # A terminal sends Ctrl-C to all processes, a batch system its signal to the driver or to all.
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75
    told = "chunkrestore: interrupted; the same command, without --overwrite, goes on where it stopped"
    assert told in errors.splitlines()
    assert "Traceback" not in errors
    n_before = n_recorded(journal, "blocks-0")
    assert 5 <= n_before < 48
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(pipeline), "--cluster", "serial", "-q"])
    assert tree(tmp_path / "out.zarr") == expected
    assert n_recorded(journal, "blocks-0") == 48


@pytest.fixture
def leave_unfinished(monkeypatch):
    """Run a job of which a task fails after so many blocks."""

    def run(task, n_blocks, *arguments, **options):
        module = label_tasks if hasattr(label_tasks, task) else tasks
        original, counter = getattr(module, task), itertools.count()

        def failing(*task_arguments):
            if next(counter) >= n_blocks:
                raise OSError("disk is full")
            return original(*task_arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, task, failing)
            with pytest.raises(BlockError, match="OSError: disk is full"):
                cr.run(*arguments, **options)

    return run


def test_a_failed_block_keeps_what_is_finished(tmp_path, leave_unfinished, undisturbed):
    image, expected, _ = undisturbed
    leave_unfinished("process", 3, chain(), image, tmp_path / "out.zarr", **BLOCKS)
    report = cr.run(chain(), image, tmp_path / "out.zarr", **BLOCKS)
    assert report.n_resumed == 3
    assert tree(tmp_path / "out.zarr") == expected


def test_a_job_killed_before_its_report_is_only_reported(tmp_path, monkeypatch, undisturbed):
    image, expected, _ = undisturbed
    first = cr.run(chain(), image, tmp_path / "out.zarr", **BLOCKS)
    (journal_of(tmp_path / "out.zarr").parent / "report.json").unlink()
    for module, names in {
        tasks: ("process", "probe_seam", "downsample", "summarize"),
        label_tasks: ("detect", "links", "join_blocks", "find_roots", "number", "paint"),
    }.items():
        for name in names:
            monkeypatch.delattr(module, name)
        monkeypatch.setattr(module, "__getattr__", lambda name: None, raising=False)
    again = cr.run(chain(), image, tmp_path / "out.zarr", **BLOCKS)
    assert tree(tmp_path / "out.zarr") == expected
    assert again.n_done == 0
    told = ("operators", "outputs", "n_objects", "n_rounds", "seams", "plan")
    assert {key: again.content()[key] for key in told} == {key: first.content()[key] for key in told}


def test_labels_that_were_published_but_not_listed_are_listed(tmp_path):
    image = write_input(tmp_path)
    for name in ("first", "second"):
        cr.run(cr.Threshold(3.0), image, image.path, label_name=name, **BLOCKS)
    expected = tree(tmp_path / "in.zarr")
    group = tmp_path / "in.zarr/labels/zarr.json"
    document = json.loads(group.read_text())
    document["attributes"]["ome"]["labels"].remove("second")
    group.write_text(json.dumps(document))
    (journal_of(tmp_path / "in.zarr", "labels-second").parent / "report.json").unlink()
    cr.run(cr.Threshold(3.0), image, image.path, label_name="second", **BLOCKS)
    assert cr.open_image(image.path).labels == ("first", "second")
    assert tree(tmp_path / "in.zarr") == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"operators": [cr.Threshold(4.0)]}, r"passes\[0\].operators\[0\].value was 3.0, is 4.0"),
        ({"block_shape": (8, 12, 12)}, r"passes\[0\].block_shape\[2\] was 24, is 12"),
        ({"region": ((0, 8), (0, 24), (0, 24))}, r"input.picks\[0\]\[1\] was 16, is 8"),
        ({"version": "0.4"}, r"output.version was '0\.5', is '0\.4'"),
    ],
)
def test_an_unfinished_job_with_other_parameters_is_refused(tmp_path, leave_unfinished, changed, message):
    image = write_input(tmp_path)
    original = {"operators": [cr.Threshold(3.0)], "source": image, "output": tmp_path / "out.zarr", **BLOCKS}
    leave_unfinished("detect", 3, **original)
    before = tree(tmp_path)
    with pytest.raises(ManifestMismatchError, match=message):
        cr.run(**(original | changed))
    assert tree(tmp_path) == before
    report = cr.run(**(original | changed), overwrite=True)
    assert report.n_resumed == 0


def test_an_input_that_was_rewritten_is_another_input(tmp_path, leave_unfinished):
    source, middle = write_input(tmp_path), tmp_path / "middle.zarr"
    first, other = (cr.RichardsonLucy(PSF, iterations=n, depth=2) for n in (1, 2))
    cr.run(first, source, middle, **BLOCKS)
    leave_unfinished("process", 3, first, middle, tmp_path / "out.zarr", **BLOCKS)
    cr.run(other, source, middle, overwrite=True, **BLOCKS)
    with pytest.raises(ManifestMismatchError, match=r"input\.attributes_sha256 was"):
        cr.run(first, middle, tmp_path / "out.zarr", **BLOCKS)


def test_starting_anew_forgets_the_unfinished_job(tmp_path, leave_unfinished, undisturbed):
    image, expected, _ = undisturbed
    leave_unfinished("paint", 3, chain(), image, tmp_path / "out.zarr", **BLOCKS)
    report = cr.run(chain(), image, tmp_path / "out.zarr", overwrite=True, **BLOCKS)
    assert report.n_resumed == 0
    assert tree(tmp_path / "out.zarr") == expected


def test_another_job_at_the_same_output_is_not_resumed_into_it(tmp_path, leave_unfinished):
    """An image job that was left unfinished must not take another job's image for its own."""
    image, output = write_input(tmp_path), tmp_path / "out.zarr"
    lucy = cr.RichardsonLucy(PSF, iterations=1, depth=2)
    leave_unfinished("process", 3, lucy, image, output, **BLOCKS)
    cr.run([lucy, cr.Threshold(3.0)], image, output, overwrite=True, **BLOCKS)
    with pytest.raises(FileExistsError, match="exists; give another store or pass overwrite=True"):
        cr.run(lucy, image, output, **BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["detect", "settle-0.0-1", "paint"])
def test_a_stardist_job_is_killed_and_the_command_repeated(tmp_path, stage):
    pytest.importorskip("stardist", reason="needs the deep-learning extra")
    from chunkrestore.simulate import embryo

    data = embryo((32, 64, 64), seed=5, arrangement="tissue").image
    cr.write_image(data, tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    options = ["--model", STARDIST, "--block", "16,16,16", "--name", "nuclei", "--cluster", "serial", "-q"]
    arguments = ["segment", str(tmp_path / "in.zarr")]
    (tmp_path / "reference").mkdir()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, str(tmp_path / "reference/out.zarr"), *options])
    output = tmp_path / "out.zarr"
    journal = journal_of(output, "labels-nuclei")
    with command(*arguments, output, *options) as process:
        wait_for(lambda: n_recorded(journal, stage) >= 2 or process.poll() is not None, "two blocks")
        process.kill()
    before = finished_items(journal)
    assert 2 <= sum(item[0] == stage for item in before) < 32
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, str(output), *options])
    after = finished_items(journal)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))
    assert tree(output) == tree(tmp_path / "reference/out.zarr")

"""Jobs that are killed at any moment go on where they stopped, and end byte for byte as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.jobs.ledger import ManifestMismatchError
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.0, 1.0), truncate=2)
SERIAL = {"cluster": "serial", "quiet": True}
DEADLINE = 60.0
STARDIST = "stardist3d-demo"


def tree(path):
    """Return the content of every file below `path`."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def journal_of(output, job="image"):
    return output.with_name(f"{output.name}.chunkrestore") / job / "journal.jsonl"


def finished_items(journal):
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    return [(entry["stage"], *entry["item"]) for entry in entries if "stage" in entry]


def write_input(folder, shape=(16, 24, 24)):
    data = np.random.default_rng(8).integers(0, 200, shape).astype(np.uint16)
    return cr.write_image(data, folder / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class _Disk:
    """Counts the changes that this process makes to files, and ends its life at one of them."""

    def __init__(self):
        self.folder = None
        self.left = 0
        self.n_changes = 0
        sys.addaudithook(self._hook)

    @contextmanager
    def dies_after(self, n_changes, folder):
        self.folder, self.left, self.n_changes = str(folder), n_changes, 0
        try:
            yield
        finally:
            self.folder = None

    def _hook(self, event, arguments):
        if self.folder is None or not self._changes(event, arguments):
            return
        self.n_changes += 1
        if self.n_changes > self.left:
            raise Killed

    def _changes(self, event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
            return writes and str(path).startswith(self.folder)
        return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate") and str(
            arguments[0]
        ).startswith(self.folder)


@pytest.fixture(scope="module")
def disk():
    return _Disk()


def chain():
    """An image by way of a scratch image, then labels: every kind of stage."""
    lucy = cr.RichardsonLucy(PSF, iterations=1, depth=4)
    return [lucy, lucy, cr.Threshold()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, disk):
    """The input, an uninterrupted run of the chain, and how many changes to files it makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    image = write_input(folder)
    with disk.dies_after(10**9, folder):
        cr.run(chain(), image, folder / "out.zarr", block_shape=(8, 12, 24), **SERIAL)
        n_changes = disk.n_changes
    return image, tree(folder / "out.zarr"), n_changes


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_killed_at_any_change_of_a_file_and_resumed(tmp_path_factory, disk, undisturbed, moments):
    image, expected, n_changes = undisturbed
    folder = tmp_path_factory.mktemp("killed")
    output = folder / "out.zarr"
    options = {"block_shape": (8, 12, 24), **SERIAL}
    for moment in moments:
        with disk.dies_after(int(moment * n_changes), folder):
            try:
                cr.run(chain(), image, output, **options)
                break
            except Killed:
                pass
    else:
        report = cr.run(chain(), image, output, **options)
        assert report.outputs == [str(output), str(output / "labels" / "labels")]
    assert tree(output) == expected
    done = Counter(finished_items(journal_of(output)))
    assert max(done.values()) == 1
    kept = sorted(p.name for p in journal_of(output).parent.iterdir())
    assert kept == ["journal.jsonl", "manifest.json", "report.json"]

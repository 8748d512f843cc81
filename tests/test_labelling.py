"""Jobs that make labels: the same ids and voxels for every grid and every interruption; nothing is left behind."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from dying import Disk, Killed, bury, kind
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree
from settling import Crystals
from skimage.measure import regionprops

import chunkrestore as cr
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import label_tasks
from chunkrestore.jobs.runner import BlockError
from chunkrestore.jobs.tables import load_table, save_table
from chunkrestore.operators.base import JoiningOperator, SettlingOperator
from chunkrestore.stitch.objects import number_objects

SERIAL = {"cluster": "serial", "quiet": True}
SHAPE = (18, 26, 22)


def scene(seed=3, shape=SHAPE):
    """Noise of few grey values: candidates everywhere, many of equal score."""
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def store_of(data, folder, axes="zyx"):
    return cr.write_image(data, folder / "in.zarr", axes=axes, voxel_size=(2.0, 0.5, 0.25))


def labels_of(path, name="labels"):
    return cr.open_image(path).label(name).data.compute()


@pytest.fixture(scope="module")
def whole():
    labels = Crystals()(scene())
    assert labels.max() > 100
    return labels


def test_operators_are_of_one_kind():
    assert isinstance(Crystals(), SettlingOperator)
    assert not isinstance(Crystals(), JoiningOperator)
    assert isinstance(cr.Threshold(), JoiningOperator)
    assert not isinstance(cr.Threshold(), SettlingOperator)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_objects_are_those_of_the_whole_for_every_grid_and_order_of_blocks(whole, data):
    edges = [(0, *sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4))), n) for n in SHAPE]
    operator, image = Crystals(), scene()
    grid = BlockGrid(tuple(edges), operator.halo(SHAPE))
    blocks = list(grid)
    random.Random(data.draw(st.integers(0, 99))).shuffle(blocks)
    objects = number_objects(operator, grid, {b.index: operator.detect(image[b.read], b) for b in blocks})
    labels = np.full(SHAPE, -1)
    for block in blocks:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    np.testing.assert_array_equal(labels, whole)
    assert objects.n_objects == whole.max()


@pytest.mark.parametrize("block_shape", [(8, 26, 22), (8, 8, 8), (18, 26, 22)])
def test_a_job_gives_the_labels_of_the_whole(tmp_path, whole, block_shape):
    image = store_of(scene(), tmp_path)
    report = cr.run(Crystals(), image, image.path, block_shape=block_shape, **SERIAL)
    np.testing.assert_array_equal(labels_of(image.path), whole)
    assert report.n_objects == whole.max()
    assert (report.n_rounds > 1) == (block_shape != SHAPE)


def test_time_points_and_channels_are_numbered_each_for_itself(tmp_path):
    data = np.stack([np.stack([scene(10 * t + c) for c in range(2)]) for t in range(2)])
    data[1, 0] = 0
    image = store_of(data, tmp_path, "tczyx")
    report = cr.run(Crystals(), image, image.path, block_shape=(18, 13, 11), objects=None, **SERIAL)
    labels = labels_of(image.path)
    n_objects = 0
    for t, c in np.ndindex(2, 2):
        expected = Crystals()(data[t, c])
        np.testing.assert_array_equal(labels[t, c], expected)
        n_objects += int(expected.max())
    assert report.n_objects == n_objects


def test_an_empty_volume_has_no_objects(tmp_path):
    image = store_of(np.zeros(SHAPE, np.uint8), tmp_path)
    report = cr.run(Crystals(), image, image.path, block_shape=(8, 8, 8), **SERIAL)
    assert (report.n_objects, report.n_rounds) == (0, 0)
    assert not labels_of(image.path).any()


def test_candidates_and_survivors_are_dropped_as_soon_as_they_are_settled(tmp_path, monkeypatch):
    image = store_of(scene(), tmp_path)
    folder = tmp_path / "in.zarr.chunkrestore" / "labels-labels" / "tables"
    seen = []

    def paint(*arguments):
        seen.append(sorted(path.name for path in folder.iterdir()))
        return original(*arguments)

    original = label_tasks.paint
    monkeypatch.setattr(label_tasks, "paint", paint)
    cr.run(Crystals(), image, image.path, block_shape=(8, 8, 8), **SERIAL)
    assert seen[0] == ["ids", "objects"]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("operator", "task"),
    [
        *((Crystals(), task) for task in ("detect", "settle", "measure", "number", "paint")),
        *((cr.Threshold(100.0), task) for task in ("links", "join_blocks", "find_roots", "number", "paint")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_job_stopped_in_any_stage_goes_on_to_the_same_result(tmp_path, monkeypatch, operator, task):
    options = {"block_shape": (8, 8, 8), **SERIAL}
    image = store_of(scene(), tmp_path)
    cr.run(operator, image, image.path, **options)
    expected = tree(tmp_path / "in.zarr")
    shutil.rmtree(tmp_path / "in.zarr")
    shutil.rmtree(tmp_path / "in.zarr.chunkrestore")
    image = store_of(scene(), tmp_path)
    original, n_done = getattr(label_tasks, task), 0

    def stops(*arguments):
        nonlocal n_done
        n_done += 1
        if n_done > 1:
            raise ValueError("stop here")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(label_tasks, task, stops)
        with pytest.raises(BlockError, match="stop here"):
            cr.run(operator, image, image.path, **options)
    report = cr.run(operator, image, image.path, **options)
    assert report.n_resumed > 0
    assert tree(tmp_path / "in.zarr") == expected


@pytest.fixture(scope="module")
def disk():
    return Disk()


def deaths(disk, folder):
    """Return the labels of an undisturbed job, and a moment in it before a change to files of every kind."""
    image = store_of(scene(), folder)
    with disk.dies_after(10**9, folder):
        cr.run(Crystals(), image, image.path, block_shape=(9, 13, 22), objects=None, **SERIAL)
    kinds = [kind(change) for change in disk.changes]
    return tree(folder / "in.zarr"), [kinds.index(k) for k in dict.fromkeys(kinds)]


def check_killed(disk, folder, moment, expected):
    for name in ("in.zarr", "in.zarr.chunkrestore"):
        shutil.rmtree(folder / name)
    image = store_of(scene(), folder)
    with disk.dies_after(moment, folder), suppress(Killed):
        cr.run(Crystals(), image, image.path, block_shape=(9, 13, 22), **SERIAL)
    bury(folder / "in.zarr")
    if not (folder / "in.zarr.chunkrestore" / "labels-labels" / "report.json").exists():
        cr.run(Crystals(), image, image.path, block_shape=(9, 13, 22), **SERIAL)
    assert tree(folder / "in.zarr") == expected


def test_killed_before_changes_of_many_kinds(tmp_path, disk):
    expected, moments = deaths(disk, tmp_path)
    assert len(moments) > 30
    for moment in moments[::5]:
        check_killed(disk, tmp_path, moment, expected)


@pytest.mark.slow
def test_killed_before_every_kind_of_change(tmp_path, disk):
    expected, moments = deaths(disk, tmp_path)
    for moment in moments:
        check_killed(disk, tmp_path, moment, expected)


def test_the_table_of_the_objects_tells_what_the_labels_show(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("chunkrestore.jobs.job.StarDist", Crystals)
    image = store_of(scene(), tmp_path)
    report = cr.run(Crystals(), image, image.path, block_shape=(8, 8, 8), objects="shapes", **SERIAL)
    assert report.outputs[1:] == [str(tmp_path / "in.zarr" / "labels" / "labels" / "objects.parquet")]
    rows = parquet.read_table(report.outputs[1]).to_pydict()
    found = regionprops(labels_of(image.path), spacing=(2.0, 0.5, 0.25))
    assert rows["label"] == [region.label for region in found] == list(range(1, report.n_objects + 1))
    assert rows["n_voxels"] == [region.num_pixels for region in found]
    np.testing.assert_allclose(rows["volume_um3"], [region.area for region in found])
    np.testing.assert_allclose(rows["centroid_y_um"], [region.centroid[1] for region in found])
    assert rows["bbox_x_stop"] == [region.bbox[5] for region in found]
    assert len(rows["distances"][0]) == 6


@pytest.mark.parametrize(
    ("operator", "objects", "message"),
    [
        (
            cr.Threshold(10.0),
            "table",
            "`objects` 'table' is for labels of objects that StarDist finds; threshold makes none",
        ),
        (Crystals(), "all", "`objects` must be 'table', 'shapes' or None, got 'all'"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(tmp_path, operator, objects, message):
    image = store_of(scene(), tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        cr.run(operator, image, image.path, objects=objects, **SERIAL)
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_labels_are_the_same_for_every_number_of_workers(tmp_path, whole):
    for n_workers in (1, 3):
        (tmp_path / str(n_workers)).mkdir()
        image = store_of(scene(), tmp_path / str(n_workers))
        options = {"cluster": "local", "n_workers": n_workers, "quiet": True}
        cr.run(Crystals(), image, image.path, block_shape=(8, 8, 8), **options)
        np.testing.assert_array_equal(labels_of(image.path), whole)


def test_what_detection_tells_the_driver_is_a_few_numbers(tmp_path):
    image = store_of(scene(), tmp_path)
    cr.run(Crystals(), image, image.path, block_shape=(8, 8, 8), **SERIAL)
    journal = tmp_path / "in.zarr.chunkrestore" / "labels-labels" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert max(len(json.dumps(line)) for line in lines if line.get("stage") == "detect") < 300


def test_tables_can_be_read_by_threads_at_once(tmp_path):
    """NumPy reads headers by `ast`, which CPython 3.11 cannot do in two threads if a collection lets them switch."""
    save_table(tmp_path, "kind", (0, 0), {"x": np.arange(3), "y": np.zeros((2, 3))})
    thresholds, switch = gc.get_threshold(), lambda *_: time.sleep(0)
    gc.callbacks.append(switch)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            tables = list(pool.map(lambda _: load_table(tmp_path, "kind", (0, 0)), range(1200)))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(switch)
    assert all(table["x"].tolist() == [0, 1, 2] for table in tables)

"""Any labelling function, block by block: the labels of the whole, in memory, lazily, as a job, interrupted or not."""

import functools
import json
import os
import shutil
import sys
import tracemalloc
from functools import lru_cache
from pathlib import Path

import dask
import dask.array as da
import labelling_functions as functions
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.api import _apply
from chunkrestore.cli import main
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import label_tasks
from chunkrestore.jobs.runner import BlockError
from chunkrestore.lazy import apply_labels
from chunkrestore.metrics import match_instances
from chunkrestore.operators.base import JoiningOperator, SettlingOperator
from chunkrestore.operators.saved import NotSavableError, load_operators, save_operators
from chunkrestore.stitch.objects import number_objects

SERIAL = {"cluster": "serial", "quiet": True}
SHAPE = (24, 34, 38)
DEPTH = 11
"""The longest ball is 9 voxels long, and the peaks of others are looked for 2 voxels around."""


@lru_cache
def balls(shape=SHAPE, seed=4):
    """Paint balls, brightest in the middle, that do not touch; uint8."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    image, centres = np.zeros(shape), np.empty((0, len(shape)))
    for centre in rng.uniform(0, shape, (400, len(shape))):
        radius = rng.uniform(2.5, 4.4)
        if len(centres) == 0 or np.linalg.norm(centres - centre, axis=1).min() > 10:
            centres = np.concatenate([centres, [centre]])
            image = np.maximum(image, 250 * (1 - np.linalg.norm(grid - centre, axis=-1) / (1.3 * radius)))
    return image.astype(np.uint8)


def in_blocks(operator, image, grid):
    objects = number_objects(operator, grid, {b.index: operator.detect(image[b.read], b) for b in grid})
    labels = np.full(grid.shape, -1)
    for block in grid:
        labels[block.core] = operator.paint(block, objects.at(block.index))
    return labels


def store_of(data, folder, axes="zyx", **options):
    return cr.write_image(data, folder / "in.zarr", axes=axes, voxel_size=(1, 1, 1), **options)


def labels_of(path, name="labels"):
    return cr.open_image(path).label(name).data.compute()


@pytest.fixture(scope="module")
def whole():
    labels = cr.Labeller(functions.cells, depth=DEPTH)(balls())
    assert labels.dtype == np.int32
    assert labels.max() == len(np.unique(functions.cells(balls()))) - 1 > 15
    return labels


def test_it_is_a_joining_operator():
    operator = cr.Labeller(functions.bright, by="touching")
    assert isinstance(operator, JoiningOperator)
    assert not isinstance(operator, SettlingOperator)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**31), st.integers(1, 3), st.data())
def test_touching_components_are_those_of_scipy_and_of_threshold_ids_included(seed, connectivity, data):
    shape = data.draw(st.sampled_from([(9, 8, 7), (1, 12, 11)]))
    image = np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)
    block_shape = [data.draw(st.integers(1, n)) for n in shape]
    structure = ndimage.generate_binary_structure(3, connectivity)
    operator = cr.Labeller(
        lambda part: ndimage.label(part > 100, structure)[0],
        by="touching",
        connectivity=connectivity,
        depth=data.draw(st.integers(0, 3)),
    )
    labels = in_blocks(operator, image, BlockGrid.regular(shape, block_shape, operator.halo(shape)))
    np.testing.assert_array_equal(labels, ndimage.label(image > 100, structure)[0])
    np.testing.assert_array_equal(labels, cr.Threshold(100, connectivity)(image))


@st.composite
def cuts(draw, n):
    """Draw where an axis is cut: up to three times anywhere, or into slices of single voxels in one place."""
    if draw(st.booleans()):
        return sorted(draw(st.sets(st.integers(1, n - 1), max_size=3)))
    first = draw(st.integers(1, n - 5))
    return list(range(first, first + 4))


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(["iou", "centroid"]), st.data())
def test_objects_no_longer_than_the_depth_are_those_of_the_whole_for_every_grid(by, data):
    """Cores far thinner than the depth too: what a block reads then covers several others."""
    shape, depth = data.draw(st.sampled_from([((14, 17, 15), 6), ((40, 33), 6)]))
    # Objects of any form, 6 voxels long at most, that touch: no rule about foreground could tell them apart.
    centres = np.random.default_rng(data.draw(st.integers(0, 2**31))).uniform(0, shape, (60, len(shape)))
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.abs(places[..., np.newaxis, :] - centres).max(axis=-1)
    truth = np.where(distance.min(axis=-1) < 2.9, distance.argmin(axis=-1) + 1, 0).astype(np.uint8)
    edges = tuple((0, *data.draw(cuts(n)), n) for n in shape)
    operator = cr.Labeller(functions.told, depth=depth, by=by)
    labels = in_blocks(operator, truth, BlockGrid(edges, operator.halo(shape)))
    expected = operator(truth)
    assert match_instances(truth.astype(np.int32), expected).f1 == 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("by", ["iou", "centroid"])
def test_an_object_in_parts_is_one_although_blocks_between_them_show_none_of_it(by):
    truth = np.array([[0, 0, 7, 0, 0, 0, 7, 0, 0, 0, 0, 3]], np.uint8)
    operator = cr.Labeller(functions.told, depth=6, by=by)
    grid = BlockGrid.regular(truth.shape, (1, 1), operator.halo(truth.shape))
    np.testing.assert_array_equal(in_blocks(operator, truth, grid), [[0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 2]])


def test_parts_of_an_object_in_cores_on_both_sides_of_its_owner_are_one(tmp_path):
    # The second block owns 3 to 8, but in its own core an object of the first one covers all of it.
    labels = {
        (0, 8): [5, 5, 5, 0, 5, 5, 5, 5],
        (0, 12): [0, 0, 0, 6, 6, 6, 6, 6, 6, 0, 0, 0],
        (4, 8): [0] * 8,
    }
    data = np.arange(12, dtype=np.uint8).reshape(1, 1, 12)

    def function(image):
        return np.array(labels[int(image.flat[0]), image.size]).reshape(image.shape)

    operator = cr.Labeller(function, depth=4, by="centroid")
    image = store_of(data, tmp_path)
    cr.run(operator, image, image.path, block_shape=(1, 1, 4), **SERIAL)
    np.testing.assert_array_equal(labels_of(image.path), [[[1, 1, 1, 2, 1, 1, 1, 1, 2, 0, 0, 0]]])


@pytest.mark.parametrize("by", ["iou", "centroid"])
@pytest.mark.parametrize("block_shape", [(24, 34, 16), (8, 16, 16), SHAPE])
def test_a_job_gives_the_labels_of_the_whole(tmp_path, whole, by, block_shape):
    image = store_of(balls(), tmp_path)
    functions.CALLS.clear()
    operator = cr.Labeller(functions.counted, depth=DEPTH, by=by)
    report = cr.run(operator, image, image.path, block_shape=block_shape, **SERIAL)
    np.testing.assert_array_equal(labels_of(image.path), whole)
    assert report.n_objects == whole.max()
    grid = BlockGrid.regular(SHAPE, block_shape, operator.halo(SHAPE))
    assert sorted(functions.CALLS) == sorted(block.read_shape for block in grid)
    assert not (tmp_path / "in.zarr.chunkrestore" / "labels-labels" / "tables").exists()


@pytest.mark.parametrize("by", ["iou", "centroid"])
@pytest.mark.parametrize("chunks", [(24, 20, 38), ((3, 12, 9), (34,), (5, 20, 13))])
def test_lazy_labels_are_those_of_the_whole(whole, by, chunks):
    lazy = apply_labels(
        cr.Labeller(functions.cells, depth=DEPTH, by=by), da.from_array(balls(), chunks), "zyx"
    )
    assert lazy.chunks == da.empty(SHAPE, chunks=chunks).chunks
    with dask.config.set(scheduler="threads", num_workers=2):
        np.testing.assert_array_equal(lazy.compute(), whole)


def test_percentiles_are_those_of_the_whole_volume(tmp_path):
    image = (balls() * np.linspace(0.5, 1, SHAPE[2])).astype(np.float32)
    low, high = np.percentile(image, (2, 99.5)).astype(np.float32)
    seen = []

    def function(part):
        seen.append(part)
        return ndimage.label(part > 0.4)[0]

    operator = cr.Labeller(function, by="touching", percentiles=(2, 99.5))
    assert operator.needs == {2.0, 99.5}
    expected = ndimage.label((image - low) / (high - low) > 0.4)[0]
    assert expected.max() > 10
    np.testing.assert_array_equal(operator(image), expected)
    store = store_of(image, tmp_path)
    cr.run(operator, store, store.path, block_shape=(16, 16, 16), **SERIAL)
    np.testing.assert_array_equal(labels_of(store.path), expected)
    assert {part.dtype for part in seen} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="`normalization` is not decided"):
        operator.detect(image[:4], next(iter(BlockGrid.regular(SHAPE, (4, 34, 38)))))


def test_channels_are_taken_together_each_with_its_own_percentiles(tmp_path):
    data = np.stack([balls(), balls(seed=9) // 3 + 40])
    operator = cr.Labeller(
        functions.first_channel_within_second, by="touching", percentiles=(0, 99), n_channels=2
    )
    eager = _apply(operator, data, "czyx")
    assert eager.shape == SHAPE
    assert eager.max() > 3
    lazy = apply_labels(operator, da.from_array(data, chunks=(1, 16, 16, 16)), "czyx")
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), eager)
    image = store_of(data, tmp_path, "czyx")
    cr.run(operator, image, image.path, block_shape=(16, 16, 16), **SERIAL)
    np.testing.assert_array_equal(labels_of(image.path).reshape(SHAPE), eager)


def test_a_function_that_works_in_place_changes_nobody_elses_image():
    image = balls().copy()
    lazy = apply_labels(
        cr.Labeller(functions.in_place, by="touching"), da.from_array(image, chunks=(24, 17, 38)), "zyx"
    )
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), ndimage.label(balls() >= 100)[0])
    np.testing.assert_array_equal(image, balls())


@pytest.mark.parametrize("by", ["iou", "centroid", "touching"])
def test_an_image_without_objects_has_no_labels(tmp_path, by):
    image = store_of(np.zeros(SHAPE, np.uint8), tmp_path)
    operator = cr.Labeller(functions.cells, depth=4, by=by)
    report = cr.run(operator, image, image.path, block_shape=(16, 16, 16), **SERIAL)
    assert report.n_objects == 0
    assert not labels_of(image.path).any()
    assert operator(np.zeros(SHAPE, np.uint8)).dtype == np.int32


@pytest.mark.parametrize(
    ("by", "task"),
    [("centroid", task) for task in ("detect", "show", "links", "find_roots", "paint")] + [("iou", "links")],
)
def test_a_job_stopped_in_any_stage_is_resumed_without_its_script(tmp_path, monkeypatch, by, task):
    operator = cr.Labeller(functions.cells, depth=DEPTH, by=by)
    options = {"block_shape": (16, 16, 16), **SERIAL}
    image = store_of(balls(), tmp_path)
    cr.run(operator, image, image.path, **options)
    expected = tree(tmp_path / "in.zarr")
    shutil.rmtree(tmp_path / "in.zarr")
    shutil.rmtree(tmp_path / "in.zarr.chunkrestore")
    image = store_of(balls(), tmp_path)
    original, n_done = getattr(label_tasks, task), 0

    def stops(*arguments):
        nonlocal n_done
        n_done += 1
        if n_done > 2:
            raise ValueError("stop here")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(label_tasks, task, stops)
        with pytest.raises(BlockError, match="stop here"):
            cr.run(operator, image, image.path, **options)
    report = cr.resume(image.path, **SERIAL)
    assert report.n_resumed >= 2
    assert tree(tmp_path / "in.zarr") == expected


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cropped", r"returned shape \(15, 16, 16\); it must be the image's, \(16, 16, 16\)"),
        ("floats", r"returned float32; labels must be integers, .*scipy\.ndimage\.label"),
        ("mask", r"returned bool; labels must be integers"),
        ("negative", r"returned -\d+; labels must be at least 0"),
        ("with_details", r"returned tuple; it must return an array of labels alone"),
        ("broken", "no such luck"),
    ],
)
def test_what_is_no_labelling_function_is_refused_with_its_block_and_nothing_is_published(
    tmp_path, function, message
):
    image = store_of(balls(), tmp_path)
    before = tree(tmp_path / "in.zarr")
    operator = cr.Labeller(f"labelling_functions:{function}", by="touching")
    with pytest.raises(
        BlockError, match=rf"block \(0, 0, 0\) of time point 0, channel 0 failed: .*{message}"
    ) as caught:
        cr.run(operator, image, image.path, block_shape=(16, 16, 16), **SERIAL)
    cause = caught.value.__cause__
    said = " ".join([str(cause), *getattr(cause, "__notes__", [])])
    assert f"labelling_functions:{function}" in said
    assert "block (0, 0, 0) (core 0:16, 0:16, 0:16)" in said
    assert tree(tmp_path / "in.zarr") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": 3}, "`function` must be callable or 'package.module:name', got 3"),
        ({"function": "labelling_functions"}, "must be of the form 'package.module:name'"),
        ({"function": "os.path: join"}, "must be of the form"),
        ({"function": "labelling_functions:none"}, "module labelling_functions has no 'none'"),
        ({"function": "labelling_functions:broken_by_type"}, "is of int and cannot be called"),
        ({"depth": 0}, "`depth` must be a number of voxels of at least 1, or one per axis for by='iou'"),
        ({"depth": (4, 0, 4), "by": "centroid"}, r"for by='centroid', .*; got \(4, 0, 4\)"),
        ({"depth": 1.5}, "`depth` must be a number of voxels"),
        ({"depth": -1, "by": "touching"}, "`depth` must be a number of voxels of at least 0"),
        ({"by": "face"}, "`by` must be one of 'touching', 'iou', 'centroid', got 'face'"),
        ({"threshold": 1.0}, "`threshold` must be at least 0 and below 1"),
        ({"connectivity": 4}, "`connectivity` must be 1, 2 or 3"),
        ({"normalization": (5, 5)}, "`normalization` must be two finite numbers low < high"),
        ({"percentiles": (99, 1)}, "`percentiles` must rise within 0 to 100"),
        ({"n_channels": 0}, "`n_channels` must be a whole number of at least 1, got 0"),
        ({"voxel_nbytes": -1}, "`voxel_nbytes` must be a whole number of at least 0"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cr.Labeller(**{"function": functions.bright, "depth": 4} | arguments)


def test_a_module_that_is_missing_is_told():
    with pytest.raises(ImportError, match=r"'no_such_module:label' cannot be imported: .*add the folder"):
        cr.Labeller("no_such_module:label", by="touching")


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (
            cr.Labeller(functions.bright, depth=(2, 2)),
            (5, 5, 5),
            r"`depth` \(2, 2\) must have one number per axis",
        ),
        (
            cr.Labeller(functions.bright, by="touching", connectivity=3),
            (5, 5),
            "`connectivity` 3 is more than",
        ),
        (cr.Labeller(functions.bright, depth=2), (5,), "has 1 spatial axes"),
    ],
)
def test_images_that_do_not_suit_are_refused(operator, shape, message):
    with pytest.raises(ValueError, match=message):
        operator(np.zeros(shape, np.uint8))


def test_voxels_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        cr.Labeller(functions.bright, by="touching")(np.full((4, 4), np.nan, np.float32))


@pytest.mark.parametrize(
    "parameters",
    [
        {"by": "touching", "connectivity": 2},
        {"depth": (3, 4, 5), "threshold": 0.25, "percentiles": (1, 99)},
        {"depth": 7, "by": "centroid", "normalization": (0, 255.5), "voxel_nbytes": 200},
        {"depth": 1, "n_channels": 2, "normalization": [(0, 5), (1, 2)]},
    ],
)
@pytest.mark.parametrize("function", [functions.cells, "labelling_functions:cells"])
def test_saved_operators_name_their_function(tmp_path, function, parameters):
    operator = cr.Labeller(function, **parameters)
    assert operator.function == "labelling_functions:cells"
    save_operators([operator], tmp_path)
    (loaded,) = load_operators(tmp_path)
    assert loaded == operator
    assert json.dumps(dict(loaded.describe())) == json.dumps(dict(operator.describe()))


@pytest.mark.parametrize(
    "function",
    [lambda image: functions.bright(image), functools.partial(functions.bright), functions.CALLS.append],
    ids=["lambda", "partial", "method"],
)
def test_functions_without_a_name_cannot_be_saved_but_the_script_goes_on(tmp_path, monkeypatch, function):
    with pytest.raises(
        NotSavableError, match=r"`function` of operator 'labeller' holds .* no other process can import"
    ):
        save_operators([cr.Labeller(function, by="touching")], tmp_path)
    if function == functions.CALLS.append:
        return
    image, operator = store_of(balls(), tmp_path), cr.Labeller(function, by="touching")
    with monkeypatch.context() as patch:
        patch.setattr(label_tasks, "links", None)
        with pytest.raises(BlockError):
            cr.run(operator, image, image.path, block_shape=(16, 16, 16), **SERIAL)
    with pytest.raises(ValueError, match=r"no other process can import.*repeat the command or script"):
        cr.resume(image.path, **SERIAL)
    assert cr.run(operator, image, image.path, block_shape=(16, 16, 16), **SERIAL).n_resumed > 0
    np.testing.assert_array_equal(labels_of(image.path), ndimage.label(balls() > 100)[0])


def test_a_function_that_was_edited_since_is_noticed(tmp_path, monkeypatch):
    module = tmp_path / "edited_labels.py"
    module.write_text("def label(image):\n    return image // 100\n")
    monkeypatch.syspath_prepend(tmp_path)
    save_operators([cr.Labeller("edited_labels:label", by="touching")], tmp_path)
    assert load_operators(tmp_path)
    module.write_text("def label(image):\n    return image // 50 + 0\n")
    del sys.modules["edited_labels"]
    with pytest.raises(ValueError, match="describes itself differently"):
        load_operators(tmp_path)
    del sys.modules["edited_labels"]


def test_a_function_named_by_another_users_file_is_not_even_imported(tmp_path, monkeypatch):
    save_operators([cr.Labeller(functions.bright, by="touching")], tmp_path)
    path = tmp_path / "operators.json"
    path.write_text(path.read_text().replace("labelling_functions:bright", "no_such_module:label"))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ValueError, match="names a function to run, and the file belongs to another user"):
        load_operators(tmp_path)


def run_command(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_the_command_does_what_the_operator_does(tmp_path, capsys, whole):
    image = store_of(balls(), tmp_path)
    command = [
        "segment",
        image.path,
        "--method",
        "function",
        "--cluster",
        "serial",
        "-q",
        "--block",
        "16,16,16",
    ]
    assert run_command(*command) == 2
    assert "`--function` is missing" in capsys.readouterr().err
    command += ["--function", "labelling_functions:cells", "--merge", "centroid"]
    assert run_command(*command) == 2
    assert "`depth` must be a number of voxels of at least 1" in capsys.readouterr().err
    assert run_command(*command, "--depth", "11,11,12", "--merge-threshold", 0.3) == 0
    np.testing.assert_array_equal(labels_of(image.path), whole)


def test_a_pipeline_file_does_what_the_operator_does(tmp_path, whole):
    store_of(balls(), tmp_path)
    step = {
        "operator": "labeller",
        "function": "labelling_functions:cells",
        "depth": [11, 11, 11],
        "by": "iou",
    }
    pipeline = {"input": "in.zarr", "output": "in.zarr", "steps": [step], "block": [16, 16, 16]}
    Path(tmp_path, "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    assert run_command("run", tmp_path / "pipeline.yaml", "--cluster", "serial", "-q") == 0
    np.testing.assert_array_equal(labels_of(tmp_path / "in.zarr"), whole)


@pytest.mark.parametrize("by", ["iou", "centroid", "touching"])
def test_memory_is_within_the_formula_if_every_voxel_is_another_object(by):
    image = np.random.default_rng(0).integers(1, 60_000, (40, 64, 64)).astype(np.uint16)
    operator = cr.Labeller(lambda part: part.astype(np.int64), depth=6, by=by, voxel_nbytes=8)
    block = BlockGrid.regular((80, 64, 64), (34, 64, 64), operator.halo((80, 64, 64))).block((0, 0, 0))
    operator.detect(image, block)
    tracemalloc.start()
    operator.detect(image, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.7 * operator.memory_nbytes(block.read_shape) < peak < operator.memory_nbytes(block.read_shape)


def test_blocks_are_sized_by_what_the_function_takes():
    operator = cr.Labeller(functions.bright, by="touching", voxel_nbytes=1000, n_channels=2)
    assert operator.memory_nbytes((10, 10)) == 1008 * 100


@pytest.mark.parametrize("by", ["iou", "centroid"])
def test_a_job_can_be_estimated(tmp_path, by):
    image = store_of(balls(), tmp_path)
    operator = cr.Labeller(functions.cells, depth=DEPTH, by=by)
    found = cr.estimate(operator, image, n_probes=2, cluster="serial", block_shape=(16, 16, 16))
    assert "labeller" in str(cr.plan(operator, image, block_shape=(16, 16, 16)))
    assert [stage.name for stage in found.stages if stage.name in ("detect", "paint")] == ["detect", "paint"]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["iou", "centroid"])
def test_labels_are_the_same_on_workers(tmp_path, whole, by):
    image = store_of(balls(), tmp_path)
    operator = cr.Labeller("labelling_functions:cells", depth=DEPTH, by=by)
    options = {"cluster": "local", "n_workers": 2, "quiet": True}
    cr.run(operator, image, image.path, block_shape=(16, 16, 16), **options)
    np.testing.assert_array_equal(labels_of(image.path), whole)


def stardist_alone(image):
    """Segment as a user of StarDist does who knows nothing of blocks."""
    from chunkrestore import models

    return models.load("stardist3d-demo").predict_instances(image)[0]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["iou", "centroid"])
def test_a_real_engine_finds_the_objects_of_the_whole(tmp_path, by):
    from chunkrestore.simulate import embryo

    volume = embryo((48, 96, 96), seed=2)
    operator = cr.Labeller(stardist_alone, depth=32, by=by, percentiles=(1, 99.8))
    whole = operator(volume.image)
    assert whole.max() > 20
    image = store_of(volume.image, tmp_path)
    cr.run(operator, image, image.path, block_shape=(48, 48, 48), **SERIAL)
    found = match_instances(whole, labels_of(image.path))
    assert found.f1 == 1
    assert found.mean_matched_iou > 0.999

"""The benchmarks of labels: what they count, and small runs of each."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("stardist", reason="needs the deep-learning extra")
pytest.importorskip("psutil", reason="needs the bench extra")

from pathlib import Path

from chunkrestore import models
from chunkrestore.grid import Block, BlockGrid
from chunkrestore.simulate import embryo
from chunkrestore.stitch.objects import number_objects

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def stitching(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import stardist_stitching

    return stardist_stitching


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import object_tables

    return object_tables


# What is counted

REFERENCE = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2], [1, 1, 1, 1, 0, 2, 2, 2, 2]])
ZEROS = dict.fromkeys(("split", "merged", "missing", "extra", "voxels_that_differ"), 0)


def edited(**at):
    """Return the reference with other ids in some columns."""
    labels = REFERENCE.copy()
    for columns, label_id in at.items():
        first, last = map(int, columns[1:].split("_"))
        labels[:, first : last + 1] = label_id
    return labels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (REFERENCE * 7, ZEROS | {"objects": 2, "identical": 2}),
        (
            edited(c3_3=3),
            ZEROS | {"objects": 3, "identical": 1, "split": 1, "extra": 1, "voxels_that_differ": 2},
        ),
        (
            edited(c0_8=5),
            {
                "objects": 1,
                "identical": 0,
                "split": 0,
                "merged": 1,
                "missing": 2,
                "extra": 1,
                "voxels_that_differ": 18,
            },
        ),
        (edited(c5_8=0), ZEROS | {"objects": 1, "identical": 1, "missing": 1, "voxels_that_differ": 8}),
        (edited(c4_4=3), ZEROS | {"objects": 3, "identical": 2, "extra": 1, "voxels_that_differ": 2}),
    ],
)
def test_what_became_of_objects_is_counted(stitching, labels, expected):
    assert stitching.judge(labels, REFERENCE) == expected


def test_objects_on_faces_edges_and_corners_are_counted(stitching):
    labels = np.zeros((8, 8, 8), np.int32)
    labels[0, 0, 0] = 1
    labels[3:5, 0:2, 0] = 2
    labels[3:5, 3:5, 0] = 3
    labels[3:5, 3:5, 3:5] = 5
    grid = BlockGrid.regular((8, 8, 8), (4, 4, 4))
    assert stitching.crossings(labels, grid) == {"faces": 1, "edges": 1, "corners": 1}


def test_thinning_leaves_so_many_voxels_per_nucleus(stitching):
    volume = embryo((32, 64, 64), seed=3, arrangement="tissue")
    thin = stitching.thinned(volume, 10_000, 0)
    assert thin.n_nuclei == len(np.unique(thin.labels)) - 1 == 13
    kept = thin.labels > 0
    np.testing.assert_array_equal(thin.truth[kept], volume.truth[kept])
    assert thin.truth[~kept].max() == 0
    assert thin.image.mean() < volume.image.mean()


def test_candidates_of_a_trained_network_say_where_their_nucleus_ends(stitching, monkeypatch):
    monkeypatch.setattr(stitching, "TARGET_NOISE", (0.0, 0.0))
    z, y, x = np.mgrid[:40, :40, :40]
    labels = ((z - 20) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 <= 12**2).astype(np.int32)
    volume = embryo((40, 40, 40), seed=1)
    ball = type(volume)(labels, volume.truth, volume.image, volume.psf)
    table = stitching.trained_for(ball, models.folder("stardist3d-demo"), 0)
    centre = (table["points"] == 20).all(axis=1)
    assert centre.sum() == 1
    # A ray ends in the first voxel, seen from the centre, that is not the ball's.
    assert (table["dist"][centre] > 12).all()
    assert (table["dist"][centre] < 12 + 3**0.5).all()
    assert (np.linalg.norm(table["points"] - 20, axis=1) < 6).all()


# Candidates that are made up


def sorted_by_key(parts, shape):
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    key = np.ravel_multi_index(tuple(rows["points"].T), shape)
    assert len(np.unique(key)) == len(key)
    return {name: column[np.argsort(key)] for name, column in rows.items()}


def test_made_up_candidates_do_not_depend_on_the_blocks(tables):
    shape = (60, 50, 70)
    whole = sorted_by_key([tables.made_up(Block.whole(shape).core, shape, 3)], shape)
    grid = BlockGrid.regular(shape, (17, 50, 23))
    parts = sorted_by_key([tables.made_up(block.core, shape, 3) for block in grid], shape)
    for name, column in whole.items():
        np.testing.assert_array_equal(parts[name], column)
    n_cells = np.prod([-(-n // tables.PITCH) for n in shape])
    assert 2 * n_cells * 0.7 < len(whole["prob"]) < 4 * n_cells
    assert not np.array_equal(whole["prob"], tables.made_up(Block.whole(shape).core, shape, 4)["prob"])


def test_gaps_and_wrong_orders_of_ids_are_seen(tables, tmp_path):
    from chunkrestore.jobs.tables import save_table

    counts = {(0, 0, 0, 0, 0): 2, (0, 0, 0, 0, 1): 1, (0, 0, 1, 0, 0): 1}

    def stored(*ids):
        rows = zip(counts, ([5, 9], [7], [20]), ids, strict=True)
        for item, keys, own in rows:
            save_table(tmp_path, "objects", item, {"key": np.array(keys)})
            save_table(tmp_path, "ids", item, {"ids": np.array(own)})
        return tables.ids_are_in_order(tmp_path, counts)

    assert stored([1, 3], [2], [4])
    assert not stored([1, 3], [2], [5])
    assert not stored([1, 2], [3], [4])
    assert not stored([2, 4], [3], [1])


def test_a_thousand_made_up_objects_are_numbered_as_on_another_grid(tables):
    result = json.loads(json.dumps(tables.measure(1_000, 0, block=61), default=float))
    assert result["n_blocks"] == 8
    assert result["n_rounds"] >= 2
    assert 700 < result["n_objects"] < 1_300
    assert result["ids_are_gap_free_and_by_position"]
    (sample,) = result["samples"]
    assert sample["n_objects"] > 30
    assert sample["same_objects"]
    assert sample["same_volumes"]
    assert sample["n_painted_whole"] > 100
    assert {"detect", "settle-1", "measure", "number"} <= set(result["stages"])
    operator = tables.MadeUp(tables.MODEL, normalization=(0, 1))
    grid = BlockGrid.regular(result["shape"], (200, 33, 47))
    other = number_objects(operator, grid, {b.index: operator.detect(None, b) for b in grid})
    assert other.n_objects == result["n_objects"]


def test_extrapolation_is_per_object_and_per_block(tables):
    small = {"n_objects": 100, "n_blocks": 10, "peaks": {"driver_mb": 100.0}}
    large = {
        "n_objects": 1_000,
        "n_blocks": 110,
        "wall_s": 36.0,
        "cpu_s": 72.0,
        "peaks": {"driver_mb": 150.0, "disk_gb": 2.0, "largest_worker_mb": 300.0},
    }
    found = tables.scaled(small, large, 10_000)
    assert found["wall_h"] == pytest.approx(0.1)
    assert found["cpu_h"] == pytest.approx(0.2)
    assert found["disk_gb"] == pytest.approx(20)
    assert found["driver_mb"] == pytest.approx(150 + 0.5 * 110 * 9)
    assert found["largest_worker_mb"] == 300


# Small runs


@pytest.mark.slow
def test_every_contender_segments_a_small_volume(stitching):
    image = embryo((32, 64, 96), seed=2, arrangement="tissue").image
    scene = stitching.Scene.of(image, (32, 64, 48))
    reference = stitching.whole(scene)
    assert reference.max() > 20
    for name, contender in stitching.CONTENDERS.items():
        found = stitching.judge(contender(scene), reference)
        assert 0.6 * reference.max() < found["objects"] < 1.4 * reference.max(), name
        if name in ("predict_instances", "chunkrestore, exact"):
            assert found == ZEROS | {"objects": reference.max(), "identical": reference.max()}, name


@pytest.mark.slow
def test_script_compares_contenders_in_processes_of_their_own(stitching):
    result = stitching.stitching((32, 48, 96), (32, 48, 48), 2, ["chunkrestore, fast"])
    assert result["n_blocks"] == 2
    assert result["objects_cut_by_borders"]["faces"] > 3
    ours = result["contenders"]["chunkrestore, fast"]
    assert ours["peak_mb"] >= ours["before_mb"] > 100
    assert ours["missing"] + ours["extra"] <= 2


@pytest.mark.slow
def test_shares_of_both_networks_are_measured(stitching):
    result = json.loads(
        json.dumps(stitching.shares((48, 64, 64), (48, 32, 64), 4, (16, 32, 32)), default=float)
    )
    assert set(result["densities"]) == {"ordinary", "crowded"}
    for density in result["densities"].values():
        for name in ("shipped, exact", "shipped, fast", "default size, exact", "default size, fast"):
            assert set(density[name]["steps_cpu_s"]) == {"suppress", "settle", "measure", "paint"}
            assert density[name]["share"] > density[name]["share_with_halo"] > 0
    crowded = result["densities"]["crowded"]
    assert crowded["default size, exact"]["objects"] == pytest.approx(48 * 64 * 64 / 3_000, rel=0.3)

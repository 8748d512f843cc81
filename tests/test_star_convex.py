"""Star-convex candidates, their suppression across blocks, and painting, against StarDist's own routines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.grid import BlockGrid, Halo
from chunkrestore.kernels.star_convex import Rays, canonical_order, ranks

pytest.importorskip("stardist", reason="needs the deep-learning extra")

import stardist

from chunkrestore.kernels import star_settling
from chunkrestore.kernels.star_settling import SLACK, settle
from chunkrestore.kernels.star_suppression import suppress

COLUMNS = ("prob", "dist", "points")


def config(n_dim, n_rays, anisotropy=None):
    json = {"name": "Rays_GoldenSpiral", "kwargs": {"n": n_rays, "anisotropy": anisotropy}}
    return SimpleNamespace(n_dim=n_dim, n_rays=n_rays, rays_json=json)


def rays_of(n_dim, n_rays, anisotropy=None):
    return Rays.of(config(n_dim, n_rays, anisotropy))


def nuclei(seed, shape, n_objects, rays, *, grid=2, radius=(4, 7), n_per_object=25, noise=0.1):
    """Candidates as a network gives them: noisy distances to ellipsoids, from points well inside them.

    Scores are rounded to 1/64, so that many are equal.
    """
    rng = np.random.default_rng(seed)
    directions = rays.vertices / np.linalg.norm(rays.vertices, axis=-1, keepdims=True)
    rows = {}
    for _ in range(n_objects):
        centre, axes = rng.uniform(0, shape), rng.uniform(*radius, len(shape))
        for _ in range(n_per_object):
            point = np.round((centre + rng.normal(0, 0.3, len(shape)) * axes) / grid).astype(int) * grid
            offset = (point - centre) / axes
            inner = (offset**2).sum()
            if inner < 0.8 and (point >= 0).all() and (point < shape).all():
                a, b = ((directions / axes) ** 2).sum(axis=-1), (directions / axes) @ offset
                dist = (np.sqrt(b**2 - a * (inner - 1)) - b) / a * np.exp(rng.normal(0, noise, len(rays)))
                score = np.round(np.clip(1 - inner + rng.normal(0, 0.1), 0.1, 0.99) * 64) / 64
                rows[tuple(point)] = (score, dist)
    return {
        "prob": np.array([score for score, _ in rows.values()], np.float32),
        "dist": np.array([dist for _, dist in rows.values()], np.float32),
        "points": np.array(list(rows), np.int64),
    }


def inside(points, core):
    return np.logical_and.reduce([(p >= c.start) & (p < c.stop) for p, c in zip(points.T, core, strict=True)])


def settled_over(table, edges, rays, thresh):
    """Return which rows survive after rounds over blocks, and how many rounds changed something."""
    grid = BlockGrid(edges, Halo((0,) * len(edges)))
    where = {block.index: np.flatnonzero(inside(table["points"], block.core)) for block in grid}
    own = {index: {key: table[key][rows] for key in COLUMNS} for index, rows in where.items()}
    own = {index: part | {"kept0": suppress(part, rays, thresh)} for index, part in own.items()}
    kept = {index: part["kept0"] for index, part in own.items()}
    reach = int(np.ceil(2 * rays.radii(table["dist"]).max())) + SLACK
    near = {}
    for block in grid:
        region = tuple(slice(c.start - reach, c.stop + reach) for c in block.core)
        near[block.index] = [i for i in grid.indices_meeting(region) if i != block.index]
    n_rounds = 0
    while True:
        new = {}
        for index, part in own.items():
            others = [{key: own[i][key][kept[i]] for key in COLUMNS} for i in near[index]]
            joined = {key: np.concatenate([o[key] for o in others]) for key in COLUMNS} if others else {}
            new[index] = settle(part, joined, rays, thresh)
        changed = any((new[index] != kept[index]).any() for index in kept)
        kept = new
        if not changed:
            break
        n_rounds += 1
    result = np.zeros(len(table["prob"]), bool)
    for index, rows in where.items():
        result[rows] = kept[index]
    return result, n_rounds


def partitions(length, n_max):
    cuts = st.lists(st.integers(1, length - 1), max_size=n_max, unique=True)
    return cuts.map(lambda inner: (0, *sorted(inner), length))


# Rays


def test_rays_are_those_of_stardist():
    expected = stardist.Rays_GoldenSpiral(33, anisotropy=(2.0, 1.0, 1.0))
    rays = rays_of(3, 33, (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(rays.vertices, expected.vertices)
    np.testing.assert_array_equal(rays.faces, expected.faces)
    dist = np.linspace(1, 3, 32, dtype=np.float32)[np.newaxis]
    points = np.array([[700, 3]])
    outline = rays_of(2, 32).outlines(dist, points)
    np.testing.assert_array_equal(np.moveaxis(outline, 1, 2), stardist.dist_to_coord(dist, points))


def test_rays_of_an_unknown_name_are_refused():
    bad = SimpleNamespace(n_dim=3, n_rays=32, rays_json={"name": "Path", "kwargs": {}})
    with pytest.raises(ValueError, match="`rays_json` names 'Path'"):
        Rays.of(bad)


def test_radii_enclose_shapes_whatever_the_length_of_the_rays():
    rays = Rays(np.array([[0, 2], [1, 0], [0, -1], [-1, 0]], np.float64), np.empty((0, 3), np.int32))
    assert rays.radii(np.array([[3, 5, 1, 1]], np.float32)).tolist() == [6]


# Order and suppression


def test_the_canonical_order_is_by_score_then_by_position():
    points = np.array([[5, 1], [2, 9], [2, 3], [0, 0]])
    rows = {"prob": np.array([0.5, 0.5, 0.5, 0.9], np.float32), "points": points}
    assert canonical_order(rows).tolist() == [3, 2, 1, 0]
    assert ranks(rows).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(("n_dim", "thresh"), [(2, 0.3), (3, 0.4)])
def test_suppression_is_that_of_stardist(n_dim, thresh):
    rays = rays_of(n_dim, 32)
    table = nuclei(5, (40,) * n_dim, 30, rays)
    rng = np.random.default_rng(0)
    # StarDist decides between equal scores at random: make them differ.
    table["prob"] = (rng.permutation(len(table["prob"])) / len(table["prob"])).astype(np.float32)
    inputs = (table["dist"], table["prob"], table["points"])
    if n_dim == 2:
        expected = stardist.nms.non_maximum_suppression_sparse(*inputs, nms_thresh=thresh)[3]
    else:
        rays_object = stardist.Rays_GoldenSpiral(32)
        expected = stardist.non_maximum_suppression_3d_sparse(*inputs, rays_object, nms_thresh=thresh)[3]
    kept = np.flatnonzero(suppress(table, rays, thresh))
    np.testing.assert_array_equal(kept, np.sort(expected))
    assert 10 < len(kept) < len(table["prob"]) / 4


def test_suppression_does_not_depend_on_the_order_of_rows():
    rays = rays_of(2, 32)
    table = nuclei(6, (60, 60), 25, rays)
    assert len(np.unique(table["prob"])) < len(table["prob"]) / 2  # many ties
    kept = suppress(table, rays, 0.3)
    order = np.random.default_rng(1).permutation(len(kept))
    shuffled = {key: rows[order] for key, rows in table.items()}
    np.testing.assert_array_equal(suppress(shuffled, rays, 0.3), kept[order])


@pytest.mark.parametrize("n", [0, 1])
def test_suppression_of_one_candidate_or_none(n):
    rays = rays_of(3, 32)
    rows = {
        "prob": np.ones(n, np.float32),
        "dist": np.ones((n, 32), np.float32),
        "points": np.zeros((n, 3), int),
    }
    assert suppress(rows, rays, 0.4).tolist() == [True] * n


# Settling across blocks


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    thresh=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8]),
    edges=st.tuples(partitions(64, 6), partitions(80, 6)),
    radius=st.sampled_from([(4, 7), (1, 3), (3, 25)]),
)
def test_rounds_over_any_blocks_give_greedy_suppression_of_the_whole_in_2d(seed, thresh, edges, radius):
    rays = rays_of(2, 16)
    table = nuclei(seed, (64, 80), 40, rays, radius=radius, noise=0.2, grid=1)
    kept, _ = settled_over(table, edges, rays, thresh)
    np.testing.assert_array_equal(kept, suppress(table, rays, thresh))


@pytest.mark.parametrize(
    ("edges", "thresh", "anisotropy"),
    [
        (((0, 20, 40), (0, 20, 40), (0, 20, 40)), 0.3, None),
        (((0, 40), (0, 5, 11, 40), (0, 1, 33, 40)), 0.5, None),
        (((0, 8, 16, 24, 32, 40), (0, 40), (0, 16, 40)), 0.1, (2.0, 1.0, 1.0)),
    ],
)
def test_rounds_over_blocks_give_greedy_suppression_of_the_whole_in_3d(edges, thresh, anisotropy):
    rays = rays_of(3, 32, anisotropy)
    table = nuclei(int(10 * thresh), (40, 40, 40), 45, rays, n_per_object=15)
    kept, n_rounds = settled_over(table, edges, rays, thresh)
    np.testing.assert_array_equal(kept, suppress(table, rays, thresh))
    assert n_rounds >= 1


def test_a_chain_of_decisions_travels_through_several_blocks():
    """Discs in a row, each suppressed by the one before: every second one survives, one block per round."""
    rays = rays_of(2, 32)
    n = 9
    points = np.stack([np.full(n, 20), 12 + 8 * np.arange(n)], axis=-1)
    dist = np.full((n, 32), 9, np.float32)
    table = {"prob": np.linspace(0.9, 0.1, n, dtype=np.float32), "dist": dist, "points": points}
    edges = ((0, 40), (0, *range(16, 16 + 8 * n, 8)))
    kept, n_rounds = settled_over(table, edges, rays, 0.3)
    assert kept.tolist() == [True, False] * (n // 2) + [True]
    assert n_rounds > 2


def test_settling_against_the_final_survivors_gives_the_final_decision():
    rays = rays_of(2, 32)
    table = nuclei(8, (90, 90), 70, rays)
    kept = suppress(table, rays, 0.3)
    own = inside(table["points"], (slice(0, 90), slice(40, 56)))
    part = {key: rows[own] for key, rows in table.items()}
    part["kept0"] = suppress(part, rays, 0.3)
    assert (part["kept0"] != kept[own]).any()
    others = {key: rows[kept & ~own] for key, rows in table.items()}
    np.testing.assert_array_equal(settle(part, others, rays, 0.3), kept[own])


def test_settling_decides_only_what_a_change_can_reach(monkeypatch):
    rays = rays_of(2, 32)
    table = nuclei(9, (200, 200), 300, rays)
    own = inside(table["points"], (slice(0, 200), slice(0, 180)))
    part, rest = ({key: rows[side] for key, rows in table.items()} for side in (own, ~own))
    part["kept0"] = suppress(part, rays, 0.3)
    others = {key: rows[suppress(rest, rays, 0.3)] for key, rows in rest.items()}
    decided = []

    def counting(rows, *args):
        decided.append(len(rows["prob"]))
        return suppress(rows, *args)

    monkeypatch.setattr(star_settling, "suppress", counting)
    result = settle(part, others, rays, 0.3)
    assert (result != part["kept0"]).any()
    # One face in four, objects of 7 pixels at a length of 180: far less than the block's own candidates.
    assert 0 < sum(decided) < own.sum() / 8

    decided.clear()
    far = others | {"points": others["points"] + [0, 100]}
    np.testing.assert_array_equal(settle(part, far, rays, 0.3), part["kept0"])
    assert not decided


def test_settling_without_candidates_or_neighbours():
    rays = rays_of(2, 32)
    table = nuclei(10, (30, 30), 5, rays)
    own = table | {"kept0": suppress(table, rays, 0.3)}
    none = {key: rows[:0] for key, rows in table.items()}
    np.testing.assert_array_equal(settle(own, {}, rays, 0.3), own["kept0"])
    np.testing.assert_array_equal(settle(own, none, rays, 0.3), own["kept0"])
    assert settle(none | {"kept0": np.empty(0, bool)}, table, rays, 0.3).shape == (0,)

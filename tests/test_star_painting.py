"""Painting and measuring of star-convex objects, against StarDist, scikit-image, SciPy and plain NumPy."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import star_reference
from scipy import ndimage

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.star_convex import Rays, canonical_order

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
stardist = pytest.importorskip("stardist", reason="needs the deep-learning extra")

from chunkrestore.kernels import star_inside, star_marking  # noqa: E402
from chunkrestore.kernels.star_measuring import measure  # noqa: E402
from chunkrestore.kernels.star_painting import paint  # noqa: E402


def rays_of(n_dim, n_rays, anisotropy=None):
    json = {"name": "Rays_GoldenSpiral", "kwargs": {"n": n_rays, "anisotropy": anisotropy}}
    return Rays.of(SimpleNamespace(n_dim=n_dim, n_rays=n_rays, rays_json=json))


def scene(seed, n, shape, n_rays, *, radius=(2, 8), noise=0.1):
    """Survivors at random points: far more overlap than real ones have."""
    rng = np.random.default_rng(seed)
    dist = rng.uniform(*radius, (n, 1)) * np.exp(rng.normal(0, noise, (n, n_rays)))
    return {
        "prob": (rng.permutation(n) / n).astype(np.float32),
        "dist": dist.astype(np.float32),
        "points": np.stack([rng.integers(0, length, n) for length in shape], axis=-1),
        "ids": rng.permutation(n).astype(np.int32) + 1,
    }


def whole(shape):
    return Block.whole(shape).core


def by_stardist(rows, shape, n_rays, *, anisotropy=None, rescale=None):
    """The labels of StarDist, computed from distances and points as its `predict_instances` does."""
    scale = rescale or (1,) * len(shape)
    points = rows["points"] if rescale is None else rows["points"] * np.array(rescale).reshape(1, -1)
    if len(shape) == 2:
        places = stardist.polygons_to_label(rows["dist"], points, shape, prob=rows["prob"], scale_dist=scale)
        return np.concatenate([[0], rows["ids"]])[places]
    rays = stardist.Rays_GoldenSpiral(n_rays, anisotropy=anisotropy).copy(scale=scale)
    return stardist.polyhedron_to_label(
        rows["dist"], points, rays, shape, prob=rows["prob"], labels=rows["ids"], verbose=False
    )


def measured_on(labels, ids):
    """Measures of a label image, object by object, as `measure` names them."""
    boxes = ndimage.find_objects(labels, ids.max())
    result = {"volume": [], "sum": [], "first": [], "last": []}
    for label in ids:
        box = boxes[label - 1]
        found = np.zeros((0, labels.ndim), np.int64)
        if box is not None:
            found = np.argwhere(labels[box] == label) + [b.start for b in box]
        result["volume"].append(len(found))
        result["sum"].append(found.sum(axis=0))
        result["first"].append(found.min(axis=0) if len(found) else [0] * labels.ndim)
        result["last"].append(found.max(axis=0) if len(found) else [-1] * labels.ndim)
    return {key: np.array(column) for key, column in result.items()}


def assert_measures(measures, expected):
    for key, column in expected.items():
        assert measures[key].dtype == np.int64
        np.testing.assert_array_equal(measures[key], column, err_msg=key)


# Painting


@pytest.mark.parametrize(
    ("n_rays", "shape", "noise", "anisotropy"),
    [
        (32, (60, 60, 60), 0.1, None),
        (32, (30, 40, 300), 0.25, (2.0, 1.0, 1.0)),
        # At coordinates near 50000, StarDist's planes err by so much that voxels beside the surface count.
        (32, (20, 20, 50_000), 0.05, None),
        (96, (2000, 40, 40), 0.05, None),
        (96, (40, 50, 60), 0.5, (1.0, 2.0, 3.0)),
    ],
)
def test_polyhedra_are_painted_voxel_by_voxel_as_by_stardist(n_rays, shape, noise, anisotropy):
    rows = scene(n_rays + shape[0], 80, shape, n_rays, noise=noise)
    expected = by_stardist(rows, shape, n_rays, anisotropy=anisotropy)
    assert np.count_nonzero(expected) > 15_000
    labels = paint(whole(shape), rows, rays_of(3, n_rays, anisotropy))
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.int32


@pytest.mark.parametrize(
    ("n_rays", "shape", "noise", "radius"),
    [
        (32, (40, 40, 200), 0.3, (1, 6)),
        (64, (50, 50, 50), 0.1, (3, 12)),
        (32, (12, 12, 2**18), 0.1, (2, 6)),
        (32, (30, 30, 3000), 1.0, (0.05, 2)),
    ],
)
def test_polyhedra_are_painted_as_by_plain_numpy(n_rays, shape, noise, radius):
    rows, rays = scene(n_rays, 30, shape, n_rays, noise=noise, radius=radius), rays_of(3, n_rays)
    expected = star_reference.paint(whole(shape), rows, rays)
    np.testing.assert_array_equal(paint(whole(shape), rows, rays), expected)


@pytest.mark.parametrize("shape", [(120, 130), (30, 5000), (2**18, 12)])
def test_polygons_are_painted_pixel_by_pixel_as_by_stardist(shape):
    rows = scene(shape[0], 200, shape, 32, radius=(2, 9), noise=0.2)
    expected = by_stardist(rows, shape, 32)
    np.testing.assert_array_equal(paint(whole(shape), rows, rays_of(2, 32)), expected)


def test_polygons_with_corners_and_edges_on_pixels_are_painted_as_by_scikit_image():
    """Four or eight rays and whole or half distances: pixels lie on corners and edges, and edges on rows."""
    rng = np.random.default_rng(4)
    for n_rays in (4, 8):
        angles = np.round(np.arange(n_rays) * 2 * np.pi / n_rays, 12)
        directions = np.round(np.stack([np.sin(angles), np.cos(angles)], axis=-1))
        rays = Rays(directions, np.empty((0, 3), np.int32))
        for _ in range(60):
            rows = scene(0, 1, (1, 1), n_rays) | {"points": np.array([[9, 8]])}
            rows["dist"] = rng.integers(1, 12, (1, n_rays)).astype(np.float32) / 2
            expected = star_reference.paint(whole((18, 17)), rows, rays)
            np.testing.assert_array_equal(paint(whole((18, 17)), rows, rays), expected)


def test_polyhedra_with_voxels_on_faces_are_painted_as_by_stardist(monkeypatch):
    """Whole distances along the axes: octahedra, all of whose surface lies on voxels, and Qhull decides."""
    asked = []
    monkeypatch.setattr(
        star_marking, "_hull", lambda *a, hull=star_marking._hull: asked.append(a) or hull(*a)
    )
    octahedron = stardist.rays3d.Rays_Octo()
    rays = Rays(octahedron.vertices, octahedron.faces.astype(np.int32))
    rng = np.random.default_rng(5)
    n, shape = 30, (30, 31, 32)
    rows = scene(5, n, shape, len(rays)) | {"dist": rng.integers(2, 7, (n, len(rays))).astype(np.float32)}
    expected = stardist.polyhedron_to_label(
        rows["dist"], rows["points"], octahedron, shape, prob=rows["prob"], labels=rows["ids"], verbose=False
    )
    np.testing.assert_array_equal(paint(whole(shape), rows, rays), expected)
    measures = measure(rows, np.ones(n, bool), rays, shape)
    assert_measures(measures, measured_on(expected, rows["ids"]))
    assert asked


@pytest.mark.parametrize("n_dim", [2, 3])
@pytest.mark.parametrize("scale", [(0.5, 0.75, 0.6), (2.0, 1.3, 3.0)])
def test_rescaled_shapes_are_painted_and_measured_as_by_stardist(n_dim, scale):
    """StarDist's option ``scale``: points in a scaled lattice, shapes stretched back."""
    rescale = tuple(1 / s for s in scale[:n_dim])
    shape = (41, 50, 60)[:n_dim]
    rows = scene(n_dim, 60, [int(n / r) for n, r in zip(shape, rescale, strict=True)], 32, radius=(2, 6))
    rays = rays_of(n_dim, 32)
    expected = by_stardist(rows, shape, 32, rescale=rescale)
    assert np.count_nonzero(expected) > 800
    np.testing.assert_array_equal(paint(whole(shape), rows, rays, rescale), expected)
    measures = measure(rows, np.ones(60, bool), rays, shape, rescale)
    assert_measures(measures, measured_on(expected, rows["ids"]))


@pytest.mark.parametrize("n_dim", [2, 3])
def test_cores_show_exactly_what_the_whole_shows_there(n_dim):
    """Objects span many cores, reach beyond the volume, and lie wholly before a core's origin."""
    shape = (37, 41, 43)[:n_dim]
    rows, rays = scene(n_dim, 40, shape, 32, radius=(3, 15), noise=0.2), rays_of(n_dim, 32)
    expected = paint(whole(shape), rows, rays)
    edges = ((0, 5, 6, 29, 37), (0, 11, 22, 33, 41), (0, 20, 43))[:n_dim]
    for block in BlockGrid(edges, Halo((0,) * n_dim)):
        np.testing.assert_array_equal(paint(block.core, rows, rays), expected[block.core])


@pytest.mark.parametrize("n_dim", [2, 3])
def test_the_size_of_pieces_does_not_matter(n_dim):
    shape = (30, 33, 35)[:n_dim]
    rows, rays = scene(n_dim, 30, shape, 32, radius=(3, 15)), rays_of(n_dim, 32)
    shapes = star_inside.shapes_of(rows, rays)
    star = star_inside.work_space(shapes)
    none = star_marking.Hulls(np.empty(0, np.int64), np.zeros(1, np.int64), np.empty((0, 4)))
    window = np.array([[0] * 3, [1] * (3 - n_dim) + list(shape)])
    n_rows = window[1, 0] * window[1, 1]
    for row in range(len(rows["ids"])):
        masks = []
        for room in (2**20, 100):
            star_inside.take(shapes, row, star)
            first, parts, complete = 0, [], True
            while first < n_rows:
                piece = star_marking.piece_of(window, first, np.ones(room, np.uint8))
                complete &= star_marking.mark(shapes, row, star, piece, none)
                parts.append(piece.mask)
                first += len(piece.mask)
            assert (len(parts) > 1) == (room == 100)
            masks.append(np.concatenate(parts) if complete else None)
        np.testing.assert_array_equal(*masks)


def test_a_ball_is_painted_as_a_ball():
    """Analytic: 600 rays of equal length; only voxels within the depth of a face of the sphere may differ."""
    radius = 9.3
    rows = scene(0, 1, (1, 1, 1), 600) | {
        "dist": np.full((1, 600), radius, np.float32),
        "points": np.array([[12, 12, 12]]),
    }
    labels = paint(whole((25, 25, 25)), rows, rays_of(3, 600))
    distance = np.sqrt(sum((axis - 12) ** 2 for axis in np.ogrid[:25, :25, :25]))
    # Faces have edges of about sqrt(4 pi / 600 * 2 / sqrt(3)) = 0.156 radii: sagitta edge**2 / 6 = 0.4 %; twice that.
    assert (labels[distance < radius * 0.99] == 1).all()
    assert (labels[distance > radius] == 0).all()


def test_the_better_score_shows_and_position_decides_between_equal_ones():
    rays = rays_of(2, 32)
    rows = {
        "dist": np.full((3, 32), 5, np.float32),
        "points": np.array([[10, 16], [10, 13], [10, 10]]),
        "prob": np.array([0.5, 0.9, 0.5], np.float32),
        "ids": np.array([3, 4, 2**33]),
    }
    labels = paint(whole((21, 28)), rows, rays)
    assert labels.dtype == np.int64
    assert (labels[10, 13], labels[10, 6], labels[10, 20], labels[0, 0]) == (4, 2**33, 3, 0)
    rows["prob"][1] = 0.1
    assert paint(whole((21, 28)), rows, rays)[10, 13] == 2**33


@pytest.mark.parametrize("n_dim", [2, 3])
def test_shapes_without_rows_outside_giant_or_tiny(n_dim):
    rays, shape = rays_of(n_dim, 32), (20, 21, 22)[:n_dim]
    rows = scene(1, 5, shape, 32)
    none = {key: column[:0] for key, column in rows.items()}
    assert not paint(whole(shape), none, rays).any()
    assert measure(none, np.zeros(0, bool), rays, shape)["sum"].shape == (0, n_dim)
    rows["points"] = np.array([[-500, 3, 3], [3, 10**5, 3], [4, 4, 4], [10, 10, 10], [10, 10, 10]])[:, :n_dim]
    rows["dist"][2] = 1e-3
    rows["dist"][3] = 1e6
    rows["prob"] = np.array([0.9, 0.8, 0.7, 0.5, 0.1], np.float32)
    labels = paint(whole(shape), rows, rays)
    expected = np.full(shape, rows["ids"][3])
    expected[(4,) * n_dim] = rows["ids"][2]
    np.testing.assert_array_equal(labels, expected)
    assert_measures(measure(rows, np.ones(5, bool), rays, shape), measured_on(labels, rows["ids"]))


def test_shapes_that_rounding_collapses_are_painted_at_most_at_their_point():
    rays, shape = rays_of(3, 32), (9, 9, 2**18)
    rows = scene(1, 1, shape, 32) | {"points": np.array([[4, 4, 2**18 - 5]])}
    rows["dist"][:] = 1e-3
    labels = paint((slice(0, 9), slice(0, 9), slice(2**18 - 20, 2**18)), rows, rays)
    labels[4, 4, 15] = 0
    assert not labels.any()


def test_painting_and_measuring_hold_no_interpreter_lock():
    """A thread counts while another paints one giant for long; with the lock held it could not begin."""
    rays, shape = rays_of(3, 96), (150, 150, 150)
    rows = scene(2, 1, shape, 96) | {"points": np.array([[75, 75, 75]])}
    rows["dist"][:] = 74
    paint(whole((2, 2, 2)), rows, rays)
    counted, done = [], threading.Event()

    def count():
        while not done.is_set():
            counted.append(None)
            done.wait(1e-4)

    switch, counter = 1e-6, threading.Thread(target=count)

    before = sys.getswitchinterval()
    sys.setswitchinterval(switch)
    try:
        counter.start()
        start = len(counted)
        paint(whole(shape), rows, rays)
        n = len(counted) - start
    finally:
        done.set()
        counter.join()
        sys.setswitchinterval(before)
    assert n >= 5


# Measuring


@pytest.mark.parametrize(
    ("n_dim", "n_rays", "shape", "n", "radius"),
    [
        (3, 32, (40, 41, 42), 150, (2, 9)),
        (3, 96, (30, 60, 30), 60, (3, 20)),
        (2, 32, (90, 80), 200, (2, 9)),
        (2, 16, (40, 300), 60, (1, 40)),
    ],
)
def test_measures_are_those_of_the_labels_of_the_whole_volume(n_dim, n_rays, shape, n, radius):
    """Dense overlaps, objects cut by the border, and objects that are wholly covered."""
    rows, rays = scene(n, n, shape, n_rays, radius=radius, noise=0.2), rays_of(n_dim, n_rays)
    own = np.random.default_rng(n).random(n) < 0.6
    labels = paint(whole(shape), rows, rays)
    measures = measure(rows, own, rays, shape)
    assert_measures(measures, measured_on(labels, rows["ids"][own]))
    assert (measures["volume"] == 0).any()
    assert (measures["first"] == 0).any()


def test_measures_of_neighbouring_blocks_are_together_those_of_the_whole():
    shape = (30, 30, 120)
    rows, rays = scene(7, 200, shape, 32, radius=(2, 6)), rays_of(3, 32)
    everything = measure(rows, np.ones(200, bool), rays, shape)
    reach = int(rays.radii(rows["dist"]).max()) + 2
    for first in range(0, 120, 40):
        x = rows["points"][:, 2]
        near = (x >= first - 2 * reach) & (x < first + 40 + 2 * reach)
        own = (x >= first) & (x < first + 40)
        part = measure({key: column[near] for key, column in rows.items()}, own[near], rays, shape)
        assert_measures(part, {key: column[own] for key, column in everything.items()})


def test_order_of_rows_does_not_matter():
    shape = (30, 31, 32)
    rows, rays = scene(8, 60, shape, 32), rays_of(3, 32)
    rows["prob"] = np.round(rows["prob"], 1)
    order = np.random.default_rng(0).permutation(60)
    shuffled = {key: column[order] for key, column in rows.items()}
    np.testing.assert_array_equal(paint(whole(shape), shuffled, rays), paint(whole(shape), rows, rays))
    measures = measure(rows, np.ones(60, bool), rays, shape)
    assert_measures(
        measure(shuffled, np.ones(60, bool), rays, shape), {key: m[order] for key, m in measures.items()}
    )
    assert len(np.unique(rows["prob"])) < len(canonical_order(rows))

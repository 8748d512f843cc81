"""Voxels, hulls, kernels and areas of star-convex shapes, against brute force, SciPy's Qhull and scikit-image."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial import ConvexHull, HalfspaceIntersection

from chunkrestore.kernels.star_convex import Rays

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
pytest.importorskip("stardist", reason="needs the deep-learning extra")
pytest.importorskip("numba", reason="needs the deep-learning extra")

from chunkrestore.kernels.star_hulls import convex_hull, room, volume_of_intersection
from chunkrestore.kernels.star_neighbours import meeting, neighbourhood
from chunkrestore.kernels.star_overlap import (
    Surface,
    boxes_and_volumes,
    empty_body,
    place,
    scan,
)
from chunkrestore.kernels.star_polygons import common_area, polygons

ENDLESS = (-1.0, np.inf)


def rays_of(n_rays, anisotropy=None, n_dim=3):
    json = {"name": "Rays_GoldenSpiral", "kwargs": {"n": n_rays, "anisotropy": anisotropy}}
    return Rays.of(SimpleNamespace(n_dim=n_dim, n_rays=n_rays, rays_json=json))


def brute_force_voxels(box, point, dist, rays):
    """Return which voxels of a box lie in a tetrahedron of the point and any face, in float32, one by one."""
    outline = (dist[:, np.newaxis] * rays.vertices + point.astype(np.float32)).astype(np.float32)
    axes = [np.arange(a, b + 1, dtype=np.float32) for a, b in box.T]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    r = point.astype(np.float32)

    def beneath(a, b, c):
        (p0, p1, p2), (q0, q1, q2), (v0, v1, v2) = b - a, c - a, (voxels - a).T
        return p0 * (q1 * v2 - v1 * q2) - p1 * (q0 * v2 - q2 * v0) + p2 * (q0 * v1 - q1 * v0) >= 0

    inside = np.zeros(len(voxels), bool)
    for face in rays.faces:
        a, b, c = outline[face]
        inside |= beneath(a, b, c) & beneath(r, b, a) & beneath(r, c, b) & beneath(r, a, c)
    return inside


@pytest.mark.parametrize("anisotropy", [None, (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("at", [0, 1000, 250_000])
def test_voxels_are_those_of_all_tetrahedra_in_float32(anisotropy, at):
    rng = np.random.default_rng(at)
    rays = rays_of(32, anisotropy)
    surface = Surface.of(rays)
    body = empty_body(surface)
    for noise in (0, 0.1, 0.5):
        for shortest in (0.001, 0.5):
            dist = rng.uniform(2, 8) * np.exp(rng.normal(0, noise, (1, 32)))
            dist[0, :2] = shortest
            dist = dist.astype(np.float32)
            point = at + rng.integers(0, 9, (1, 3))
            boxes, volumes = np.empty((1, 2, 3), np.int64), np.empty(1, np.float32)
            boxes_and_volumes(point, dist, surface, boxes, volumes)
            expected = brute_force_voxels(boxes[0], point[0], dist[0], rays)
            place(body, surface, point[0], dist[0])
            mask = np.ones(expected.size, bool)
            assert scan(mask, boxes[0], boxes[0], body, surface, ENDLESS) == expected.sum()
            # One by one: as many of those inside as there are, none of those outside.
            assert scan(expected, boxes[0], boxes[0], body, surface, ENDLESS) == expected.sum()


def test_boxes_and_volumes_are_those_of_the_polyhedra():
    rng = np.random.default_rng(1)
    rays = rays_of(32)
    dist = (rng.uniform(3, 9, (20, 1)) * np.exp(rng.normal(0, 0.2, (20, 32)))).astype(np.float32)
    points = rng.integers(0, 500, (20, 3))
    boxes, volumes = np.empty((20, 2, 3), np.int64), np.empty(20, np.float32)
    boxes_and_volumes(points, dist, Surface.of(rays), boxes, volumes)
    outlines = rays.outlines(dist, points)
    np.testing.assert_array_equal(boxes[:, 0], np.rint(outlines.min(axis=1)))
    np.testing.assert_array_equal(boxes[:, 1], np.rint(outlines.max(axis=1)))
    corners = (dist[..., np.newaxis] * rays.vertices)[:, rays.faces].astype(np.float64)
    np.testing.assert_allclose(volumes, np.abs(np.linalg.det(corners).sum(axis=1)) / 6, rtol=1e-5)


@pytest.mark.parametrize("n_rays", [12, 32, 96])
def test_hulls_and_intersections_have_the_volume_of_qhull(n_rays):
    rng = np.random.default_rng(n_rays)
    rays = rays_of(n_rays)
    compared = 0
    for _ in range(60):
        noise = rng.choice([0, 0.02, 0.1, 0.3])
        shapes = [
            rng.uniform(4, 10) * np.exp(rng.normal(0, noise, (n_rays, 1))) * rays.vertices + shift
            for shift in (np.zeros(3), rng.integers(-4, 5, 3))
        ]
        planes = []
        for shape in shapes:
            hull, expected = room(n_rays), ConvexHull(shape)
            n = convex_hull(shape, n_rays, hull)
            assert n == len(expected.simplices)
            inner = shape.mean(axis=0)
            volume = np.linalg.det(shape[hull.facets[:n]] - inner).sum() / 6
            assert abs(volume) == pytest.approx(expected.volume, rel=1e-9)
            planes.append(hull.planes[:n] + 0)
        both = np.concatenate(planes)
        middle = (shapes[0].mean(axis=0) + shapes[1].mean(axis=0)) / 2
        both[:, 3] -= both[:, :3] @ middle
        if both[:, 3].min() > 0.01:
            expected = HalfspaceIntersection(both * [1, 1, 1, -1], np.zeros(3))
            volume = volume_of_intersection(both, len(both), room(len(both)), np.empty((len(both), 3)))
            assert volume == pytest.approx(ConvexHull(expected.intersections).volume, rel=1e-8)
            compared += 1
    assert compared > 20


def test_a_cube_of_half_spaces_has_its_volume_and_flat_points_have_no_hull():
    planes = np.concatenate([np.c_[np.eye(3), [1, 2, 3]], np.c_[-2 * np.eye(3), [2, 4, 6]]])
    volume = volume_of_intersection(planes, 6, room(6), np.empty((6, 3)))
    assert volume == pytest.approx(2 * 4 * 6)
    flat = np.random.default_rng(0).normal(size=(20, 3)) * [1, 1, 0]
    assert convex_hull(flat, 20, room(20)) == 0
    assert convex_hull(np.ones((5, 3)), 5, room(5)) == 0


@pytest.mark.parametrize("n_dim", [2, 3])
def test_neighbours_are_all_boxes_that_meet(n_dim):
    rng = np.random.default_rng(n_dim)
    n = 300
    points = rng.integers(0, 120, (n, n_dim))
    reach = np.maximum(1, rng.lognormal(1.5, 1, (n, n_dim))).astype(int)
    reach[0], reach[1] = 100, 1
    boxes = np.stack([points - reach, points + reach], axis=1)
    wanted = rng.integers(0, 2, n)
    where, found = neighbourhood(points, boxes), np.empty(n, np.int64)
    for row in range(n):
        n_found = meeting(row, where, wanted, found)
        meet = (boxes[:, 0] <= boxes[row, 1]).all(axis=-1) & (boxes[row, 0] <= boxes[:, 1]).all(axis=-1)
        assert sorted(found[:n_found]) == np.flatnonzero(meet & (wanted > 0)).tolist()


def test_common_areas_of_polygons_are_those_of_finely_drawn_ones():
    from skimage.draw import polygon2mask

    rng = np.random.default_rng(4)
    rays = rays_of(32, n_dim=2)
    for noise in (0, 0.1, 0.4):
        dist = (rng.uniform(5, 9, (2, 1)) * np.exp(rng.normal(0, noise, (2, 32)))).astype(np.float32)
        table = polygons(np.array([[20, 20], [23, 17]]), dist, rays)
        fine = 20
        masks = [polygon2mask((50 * fine,) * 2, vertices * fine + 0.01) for vertices in table.vertices]
        expected = (masks[0] & masks[1]).sum() / fine**2
        outline = table.outlines[:, 0].min()
        assert common_area(0, 1, table, 0, 50) == pytest.approx(expected, abs=0.02 * outline)
        assert common_area(0, 0, table, 0, 50) == pytest.approx(table.areas[0], abs=0.02 * outline)

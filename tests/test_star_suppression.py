"""Suppression of star-convex candidates, against StarDist's C++ routine on pairs and on whole tables."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import star_reference

from chunkrestore.kernels import star_convex
from chunkrestore.kernels.star_convex import Rays

pytest.importorskip("stardist", reason="needs the deep-learning extra")
pytest.importorskip("numba", reason="needs the deep-learning extra")

from chunkrestore.kernels import star_suppression
from chunkrestore.kernels.star_settling import settle
from chunkrestore.kernels.star_suppression import suppress

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)


def rays_of(kind, **parameters):
    if kind == "polygon":
        return Rays.of(SimpleNamespace(n_dim=2, n_rays=parameters["n"]))
    json = {"name": f"Rays_{kind}", "kwargs": parameters}
    return Rays.of(SimpleNamespace(n_dim=3, n_rays=parameters.get("n"), rays_json=json))


KINDS = {
    "32": ("GoldenSpiral", {"n": 32, "anisotropy": None}),
    "96": ("GoldenSpiral", {"n": 96, "anisotropy": None}),
    "32, anisotropic": ("GoldenSpiral", {"n": 32, "anisotropy": (2.0, 1.0, 1.0)}),
    "96, anisotropic": ("GoldenSpiral", {"n": 96, "anisotropy": (3.0, 1.0, 1.2)}),
    "octahedron": ("Octo", {"n_level": 3}),
    "tetrahedron": ("Tetra", {"n_level": 3}),
    "Cartesian": ("Cartesian", {"n_rays_x": 7, "n_rays_z": 5}),
    "polygon": ("polygon", {"n": 32}),
    "polygon of 8": ("polygon", {"n": 8}),
}


def random_pair(rng, rays, at=0):
    """Two candidates that overlap or nearly do: smooth or spiky, alike, scaled or different, a few of them flat."""
    n, n_dim = len(rays), rays.vertices.shape[1]
    radius, noise = rng.uniform(1.5, 9), rng.choice([0, 0.02, 0.05, 0.1, 0.3, 0.6])
    first = radius * np.exp(rng.normal(0, noise, n))
    second = (
        first * np.exp(rng.normal(0, 0.05, n)),
        radius * rng.uniform(0.3, 1) * np.exp(rng.normal(0, noise, n)),
        first * rng.uniform(0.5, 1),
    )[rng.integers(3)]
    if rng.random() < 0.1:
        first[rng.integers(0, n, max(n // 8, 1))] = 0
    offset = np.round(rng.normal(0, radius / 2, n_dim)).astype(int)
    offset[0] += not offset.any()
    point = at + rng.integers(0, 60, n_dim)
    return {
        "prob": np.array([0.9, 0.8], np.float32),
        "dist": np.maximum(star_convex.SMALLEST_DIST, np.stack([first, second]).astype(np.float32)),
        "points": np.stack([point, point + offset]),
    }


def objects(seed, n_objects, rays, *, size=60, radius=(4, 8), n_per_object=25, noise=0.05):
    """Candidates as a network gives them: many nearly equal shapes around each of some touching objects."""
    rng = np.random.default_rng(seed)
    n_dim = rays.vertices.shape[1]
    directions = rays.vertices / np.linalg.norm(rays.vertices, axis=-1, keepdims=True)
    lengths = np.linalg.norm(rays.vertices, axis=-1)
    rows = {}
    for _ in range(n_objects):
        centre, axes = rng.uniform(0, size, n_dim), rng.uniform(*radius, n_dim)
        for _ in range(n_per_object):
            point = np.round((centre + rng.normal(0, 0.3, n_dim) * axes) / 2).astype(int) * 2
            offset = (point - centre) / axes
            inner = (offset**2).sum()
            if inner < 0.8:
                a, b = ((directions / axes) ** 2).sum(axis=-1), (directions / axes) @ offset
                dist = (np.sqrt(b**2 - a * (inner - 1)) - b) / a / lengths
                score = np.round(np.clip(1 - inner + rng.normal(0, 0.1), 0.1, 0.99) * 64) / 64
                rows[tuple(point)] = (score, dist * np.exp(rng.normal(0, noise, len(rays))))
    return {
        "prob": np.array([score for score, _ in rows.values()], np.float32),
        "dist": np.array([dist for _, dist in rows.values()], np.float32),
        "points": np.array(list(rows), np.int64),
    }


@pytest.fixture
def asked(monkeypatch):
    """Numbers of candidates that are put to StarDist's routine together."""
    numbers, drop = [], star_suppression._dropped

    def counting(rows, *args):
        numbers.append(len(rows))
        return drop(rows, *args)

    monkeypatch.setattr(star_suppression, "_dropped", counting)
    return numbers


@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_says_of_each_pair_what_stardist_says(kind, asked):
    rng = np.random.default_rng(len(kind))
    name, parameters = KINDS[kind]
    rays, suppressed = rays_of(name, **parameters), 0
    n = 4000 // len(rays)
    for k in range(n):
        pair = random_pair(rng, rays, at=(0, 3000, 100_000, 262_000)[k % 4])
        thresh = float(rng.choice(THRESHOLDS))
        expected = star_reference.suppress(pair, rays, thresh)
        suppressed += not expected[1]
        np.testing.assert_array_equal(suppress(pair, rays, thresh), expected, f"{pair} {thresh}")
    assert n / 4 < suppressed < n * 3 / 4
    if "o" not in kind and kind != "Cartesian":
        # Own arithmetic decides: spheres in the same place, flat shapes and a threshold of 0 are left to StarDist.
        assert len(asked) < n / 8


@pytest.mark.parametrize("kind", ["32", "96", "32, anisotropic", "polygon"])
def test_pairs_at_the_threshold_are_decided_as_by_stardist(kind):
    """The second shape is scaled until the decision changes, then taken in small steps around that."""
    rng = np.random.default_rng(3)
    rays = rays_of(KINDS[kind][0], **KINDS[kind][1])
    changed = 0
    for _ in range(40):
        pair, thresh = random_pair(rng, rays), float(rng.choice([0.2, 0.4, 0.6]))
        table = [pair["dist"][0], pair["dist"][1]]

        def scaled(factor, pair=pair, table=table):
            return pair | {"dist": np.stack([table[0], (factor * table[1]).astype(np.float32)])}

        low, high = 0.3, 2.0
        at_low = suppress(scaled(low), rays, thresh)[1]
        if suppress(scaled(high), rays, thresh)[1] == at_low:
            continue
        changed += 1
        for _ in range(20):
            middle = (low + high) / 2
            same = suppress(scaled(middle), rays, thresh)[1] == at_low
            low, high = (middle, high) if same else (low, middle)
        for step in (-1e-2, -1e-3, -1e-4, -1e-6, 0, 1e-6, 1e-4, 1e-3, 1e-2):
            near = scaled(low * (1 + step))
            np.testing.assert_array_equal(
                suppress(near, rays, thresh), star_reference.suppress(near, rays, thresh)
            )
    assert changed >= 4


@pytest.mark.parametrize("kind", ["32", "96, anisotropic", "polygon"])
@pytest.mark.parametrize("thresh", [0.1, 0.4])
def test_tables_are_thinned_as_by_stardist_and_nearly_so_in_fast_mode(kind, thresh, asked):
    rays = rays_of(KINDS[kind][0], **KINDS[kind][1])
    n_dim = rays.vertices.shape[1]
    table = objects(int(10 * thresh), 30 if n_dim == 3 else 80, rays, size=40 if n_dim == 3 else 100)
    expected = star_reference.suppress(table, rays, thresh)
    np.testing.assert_array_equal(suppress(table, rays, thresh), expected)
    assert 10 < expected.sum() < len(expected) / 4
    if n_dim == 3:
        assert len(asked) < len(expected) / 50
    fast = suppress(table, rays, thresh, mode="fast")
    assert (fast != expected).sum() <= 0.1 * expected.sum()


@pytest.mark.parametrize("kind", ["32", "polygon"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_suppression_depends_neither_on_the_order_of_rows_nor_on_where_the_table_lies(kind, mode):
    rays = rays_of(KINDS[kind][0], **KINDS[kind][1])
    table = objects(5, 25, rays, size=50)
    kept = suppress(table, rays, 0.3, mode)
    order = np.random.default_rng(1).permutation(len(kept))
    shuffled = {key: rows[order] for key, rows in table.items()}
    np.testing.assert_array_equal(suppress(shuffled, rays, 0.3, mode), kept[order])
    moved = table | {"points": table["points"] + [400, 200, 300][: rays.vertices.shape[1]]}
    np.testing.assert_array_equal(suppress(moved, rays, 0.3, mode), kept)


@pytest.mark.parametrize("kind", ["32", "polygon"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_one_giant_among_small_shapes_is_compared_with_all_of_them(kind, mode):
    rays = rays_of(KINDS[kind][0], **KINDS[kind][1])
    table = objects(6, 20, rays, size=60, n_per_object=10)
    table["prob"][0], table["dist"][0], table["points"][0] = 2, 90, 30
    assert suppress(table, rays, 0.3, mode).tolist() == [True] + [False] * (len(table["prob"]) - 1)


@pytest.mark.parametrize("n", [0, 1])
def test_one_candidate_or_none_survives(n):
    rays = rays_of("GoldenSpiral", n=32, anisotropy=None)
    rows = {
        "prob": np.ones(n, np.float32),
        "dist": np.ones((n, 32), np.float32),
        "points": np.zeros((n, 3), int),
    }
    assert suppress(rows, rays, 0.4).tolist() == [True] * n


def test_flat_shapes_do_not_break_suppression():
    rays = rays_of("GoldenSpiral", n=32, anisotropy=None)
    points = np.stack(np.meshgrid(*[np.arange(0, 6, 2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    n = len(points)
    rows = {
        "prob": np.linspace(1, 0.5, n, dtype=np.float32),
        "dist": np.full((n, 32), 1e-3, np.float32),
        "points": points,
    }
    for mode in ("exact", "fast"):
        assert suppress(rows, rays, 0.3, mode).all()


def test_an_unknown_mode_is_refused():
    rows = {"prob": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="`mode` is 'quick'"):
        suppress(rows, rays_of("polygon", n=8), 0.3, "quick")


def test_loops_hold_no_interpreter_lock():
    """While one thread decides, this one goes on counting."""
    rays = rays_of("GoldenSpiral", n=96, anisotropy=None)
    table = objects(7, 60, rays, size=70, n_per_object=60, noise=0.02)
    suppress({key: rows[:50] for key, rows in table.items()}, rays, 0.3, "fast")
    done, gaps = threading.Event(), 0

    def decide():
        suppress(table, rays, 0.3, "fast")
        done.set()

    thread = threading.Thread(target=decide)
    thread.start()
    while not done.is_set():
        gaps += 1
    thread.join()
    assert gaps > 1000
    from numba.core.registry import CPUDispatcher

    loops = [value for value in vars(star_suppression).values() if isinstance(value, CPUDispatcher)]
    assert loops
    assert all(loop.targetoptions["nogil"] for loop in loops)


@pytest.mark.parametrize("kind", ["32", "polygon"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rounds_over_any_partition_give_the_suppression_of_the_whole(kind, mode):
    rays = rays_of(KINDS[kind][0], **KINDS[kind][1])
    table = objects(8, 25, rays, size=45)
    rng = np.random.default_rng(2)
    for n_parts in (2, 5):
        part_of = rng.integers(0, n_parts, len(table["prob"]))
        # Compact parts and scattered ones.
        part_of = np.where(rng.random(len(part_of)) < 0.7, table["points"][:, -1] * n_parts // 60, part_of)
        parts = [{key: rows[part_of == k] for key, rows in table.items()} for k in range(n_parts)]
        parts = [part | {"kept0": suppress(part, rays, 0.3, mode)} for part in parts]
        kept = [part["kept0"] for part in parts]
        for _ in range(50):
            new = []
            for k, part in enumerate(parts):
                others = {
                    key: np.concatenate([parts[m][key][kept[m]] for m in range(n_parts) if m != k])
                    for key in table
                }
                new.append(settle(part, others, rays, 0.3, mode))
            done = all((a == b).all() for a, b in zip(new, kept, strict=True))
            kept = new
            if done:
                break
        assert done
        result = np.empty(len(part_of), bool)
        for k in range(n_parts):
            result[part_of == k] = kept[k]
        np.testing.assert_array_equal(result, suppress(table, rays, 0.3, mode))

"""Candidates of blocks are together those that StarDist finds in the volume."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.star_convex import at_points, candidate_table, own_points

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
stardist = pytest.importorskip("stardist", reason="needs the deep-learning extra")

ALIGN = 8
"""Pooling grid of the network: volumes are padded to its multiples, reads begin and end on them."""


def partitions(length, n_max):
    cuts = st.lists(st.integers(1, length - 1), max_size=n_max, unique=True)
    return cuts.map(lambda inner: (0, *sorted(inner), length))


def padded(shape):
    return tuple(-(-n // ALIGN) * ALIGN for n in shape)


def outputs_of(shape, grid, n_rays=5, n_classes=2):
    """Scores, distances and classes of a volume, as a network returns them: on its grid, with the padding."""
    rng = np.random.default_rng(3)
    on_grid = tuple(n // g for n, g in zip(padded(shape), grid, strict=True))
    prob = rng.random(on_grid, np.float32)
    dist = rng.uniform(-1, 9, (*on_grid, n_rays)).astype(np.float32)
    return prob, dist, rng.random((*on_grid, n_classes + 1), np.float32)


def table_of(block, outputs, grid, prob_thresh):
    """Return the block's table, from no more than what a network returns for its read region."""
    window = tuple(
        slice(r.start // g, padded([r.stop])[0] // g) for r, g in zip(block.read, grid, strict=True)
    )
    points = own_points(block, grid, padded(block.volume_shape))
    origin = [r.start for r in block.read]
    prob, dist, classes = (at_points(output[window], points, origin) for output in outputs)
    return candidate_table(prob > prob_thresh, points, prob, dist, classes)


@settings(max_examples=60)
@given(data=st.data())
def test_candidates_of_any_cores_are_together_those_that_stardist_finds(data):
    grid = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 4)]), "grid")
    shape = tuple(data.draw(st.integers(3, 40), "shape") for _ in grid)
    edges = tuple(data.draw(partitions(n, 3), "edges") for n in shape)
    outputs = prob, dist, classes = outputs_of(shape, grid)

    mask = stardist.nms._ind_prob_thresh(prob, 0.6, b=2)
    points = np.stack(np.nonzero(mask), axis=-1) * np.array(grid)
    in_image = (points < shape).all(axis=-1)
    expected = {"prob": prob[mask], "dist": np.maximum(1e-3, dist[mask]), "points": points}
    expected = {key: rows[in_image] for key, rows in (expected | {"class_prob": classes[mask]}).items()}

    parts = []
    for block in BlockGrid(edges, Halo((8, 8), (ALIGN, ALIGN))):
        parts.append(table_of(block, outputs, grid, 0.6))
        first, stop = np.array([(c.start, c.stop) for c in block.core]).T
        assert ((first <= parts[-1]["points"]) & (parts[-1]["points"] < stop)).all()
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order, wanted = np.lexsort(found["points"].T), np.lexsort(expected["points"].T)
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        np.testing.assert_array_equal(found[key][order], rows[wanted])
        assert found[key].dtype == (np.int64 if key == "points" else np.float32)


def test_a_table_of_a_network_without_classes_has_none():
    prob, dist, _ = outputs_of((16, 16), (2, 2))
    points = own_points(Block.whole((16, 16)), (2, 2), (16, 16))
    prob, dist = at_points(prob, points, (0, 0)), at_points(dist, points, (0, 0))
    assert candidate_table(prob > 0.5, points, prob, dist).keys() == {"prob", "dist", "points"}


def test_a_core_without_points_has_an_empty_table():
    """One voxel between two points of the grid."""
    grid = (4, 4)
    block = Block((slice(9, 10), slice(0, 32)), (slice(0, 24), slice(0, 32)), (32, 32))
    table = table_of(block, outputs_of((32, 32), grid), grid, 0.0)
    assert {key: rows.shape for key, rows in table.items()} == {
        "prob": (0,),
        "dist": (0, 5),
        "points": (0, 2),
        "class_prob": (0, 3),
    }

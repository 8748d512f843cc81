"""From pairs of labels that are one object to the objects of a volume: a tree of unions over blocks.

Every block labels its own core. A label is known to others by its *key*, the raster index in the whole volume of
its first voxel in its core: no two labels share one, and the grid tells which block a key belongs to. Two labels of
different blocks that are one object are a *link*, and every link is found from both sides. Rows
``(own key, other key, root)`` climb a tree whose nodes cover two nodes of the level below per axis:

- level 0 is one block; the root of a label is its own key;
- `join` settles the rows whose other key lies in the node: roots that they tie together become one, the smallest;
  only rows that leave the node climb on;
- `hand_down` tells every node, from the top, what its roots became in the end;
- `final_roots` gives a block the root of each of its labels.

A node holds links across its inner borders and links that leave it: surfaces, and never all pairs of the volume. The
root of an object is its smallest key, hence the first voxel of the object, whatever the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import BlockGrid, Slices

Index = tuple[int, ...]
Keys = npt.NDArray[np.int64]


def n_levels(grid: BlockGrid) -> int:
    """Return how many levels of nodes stand above the blocks; the last one is a single node."""
    return (max(grid.n_blocks) - 1).bit_length()


def nodes(grid: BlockGrid, level: int) -> Iterator[Index]:
    """Yield the indices of the nodes of a level; those of level 0 are the blocks."""
    yield from itertools.product(*(range(n) for n in _n_nodes(grid, level)))


def children(grid: BlockGrid, level: int, index: Index) -> list[Index]:
    """Return which nodes of the level below a node covers: two per axis, fewer at the volume's end."""
    below = _n_nodes(grid, level - 1)
    return list(
        itertools.product(*(range(2 * i, min(2 * i + 2, n)) for i, n in zip(index, below, strict=True)))
    )


def region(grid: BlockGrid, level: int, index: Index) -> Slices:
    """Return the part of the volume that is made up of the cores of a node's blocks."""
    return tuple(
        slice(edges[i << level], edges[min((i + 1) << level, len(edges) - 1)])
        for edges, i in zip(grid.edges, index, strict=True)
    )


def leaf(links: Keys) -> Keys:
    """Return the rows of level 0 for the links of a block: every label is its own root.

    Parameters
    ----------
    links
        int64 (m, 2): own key, key of the other block's label; every pair once.
    """
    return np.column_stack([links, links[:, 0]])


def join(rows: Sequence[Keys], region: Slices, shape: Sequence[int]) -> tuple[Keys, Keys]:
    """Settle the links that lie within a node.

    Parameters
    ----------
    rows
        The rows that left the node's children, int64 (m, 3) each: own key, other key, root of the own label.
    region
        What the node covers, see `region`.
    shape
        Shape of the volume.

    Returns
    -------
    assigned : numpy.ndarray
        int64 (k, 2): roots of the children that are roots no longer, ascending, and the root that took each in.
    open_rows : numpy.ndarray
        int64 (m, 3): rows whose other key lies outside, with their present roots.

    Raises
    ------
    ValueError
        If a link within the node was found from one side only.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    own, other, root = np.concatenate([np.empty((0, 3), np.int64), *rows]).T
    inside = lies_in(other, region, shape)
    tied = np.stack([root[inside], _roots_of(other[inside], own[inside], root[inside])])
    roots, pairs = np.unique(tied, return_inverse=True)
    a, b = pairs.reshape(2, -1)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(roots), len(roots)))
    # Roots ascend, so the first root of each component is its smallest.
    _, component = connected_components(graph, directed=False) if len(roots) else (0, np.empty(0, np.int64))
    _, first = np.unique(component, return_index=True)
    joined = roots[first][component]
    assigned = np.column_stack([roots, joined])[roots != joined]
    leaving = ~inside
    open_roots = final_roots(root[leaving], [assigned])
    return assigned, np.column_stack([own[leaving], other[leaving], open_roots])


def hand_down(assigned: Keys, above: Keys, region: Slices, shape: Sequence[int]) -> Keys:
    """Tell what the roots of a node's children became in the end.

    Parameters
    ----------
    assigned
        Of the node, from `join`.
    above
        What `hand_down` returned for the node's parent; for the node at the top, an array without rows.
    region, shape
        As in `join`.

    Returns
    -------
    numpy.ndarray
        int64 (k, 2): roots of the children that are not final, ascending, and the final root of each. No more rows
        than roots with links across the node's inner and outer borders.
    """
    own = np.column_stack([assigned[:, 0], final_roots(assigned[:, 1], [above])])
    # A root that the node itself left alone may still have been taken in further up.
    passed_on = above[lies_in(above[:, 0], region, shape)]
    both = np.concatenate([own, passed_on])
    return both[np.argsort(both[:, 0])]


def final_roots(keys: Keys, assigned: Sequence[Keys]) -> Keys:
    """Follow keys to their roots.

    Parameters
    ----------
    keys
        int64 (n,), keys or roots.
    assigned
        What happened to them: one table of `hand_down` (of the lowest node above the block), or the tables of `join`
        of all nodes above it, lowest level first.

    Returns
    -------
    numpy.ndarray
        int64 (n,). A label whose root is its own key is where its object begins.
    """
    roots = keys
    for table in assigned:
        if len(table) and len(roots):
            place = np.minimum(np.searchsorted(table[:, 0], roots), len(table) - 1)
            roots = np.where(table[place, 0] == roots, table[place, 1], roots)
    return roots


def lies_in(keys: Keys, region: Slices, shape: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which keys are raster indices of voxels in `region` of a volume of `shape`; bool (n,)."""
    inside = np.ones(len(keys), bool)
    for position, part in zip(np.unravel_index(keys, tuple(shape)), region, strict=True):
        inside &= (position >= part.start) & (position < part.stop)
    return inside


def _n_nodes(grid: BlockGrid, level: int) -> list[int]:
    return [(n - 1 >> level) + 1 for n in grid.n_blocks]


def _roots_of(wanted: Keys, own: Keys, root: Keys) -> Keys:
    """Return the roots of the labels `wanted`, each of which must be among `own`."""
    order = np.argsort(own, kind="stable")
    place = np.searchsorted(own[order], wanted)
    found = order[np.minimum(place, len(order) - 1)]
    if not np.array_equal(own[found], wanted):
        missing = wanted[own[found] != wanted]
        raise ValueError(f"`links` must hold every pair from both sides; none begins with key {missing[0]}")
    return root[found]

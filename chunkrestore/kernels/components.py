"""Connected components of a mask that is only ever seen block by block.

Each block labels its own core. What crosses block borders is decided from the foreground voxels on the
cores' surfaces alone: two of them that are neighbours belong to one component, whatever the shape of the
grid or the connectivity. Components are then numbered by their first voxel in raster order, which is how
`scipy.ndimage.label` numbers them on the whole volume.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from chunkrestore.grid import Slices

Labels = npt.NDArray[np.signedinteger]


def label_mask(mask: npt.NDArray[np.bool_], connectivity: int) -> tuple[Labels, int]:
    """Label the connected components of `mask`; neighbours differ in at most `connectivity` axes."""
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
    labels, n_objects = ndimage.label(mask, structure=structure)
    return labels, int(n_objects)


def component_table(
    labels: Labels, n_objects: int, core: Slices, shape: Sequence[int]
) -> dict[str, np.ndarray]:
    """Describe the components of one core, as far as other blocks must know.

    Parameters
    ----------
    labels
        Local labels of the core, 0 to `n_objects`.
    n_objects
        Number of local components.
    core
        The core in the coordinates of the volume.
    shape
        Shape of the volume.

    Returns
    -------
    dict
        ``first``: raster index in the volume of each component's first voxel (int64, by local label);
        ``surface``: raster indices of the foreground voxels on the core's surface (int64), ascending;
        ``surface_label``: their local labels (int32).
    """
    strides = _strides(shape)
    first = np.empty(n_objects + 1, np.int64)
    flat = labels.ravel()
    # Assigned backwards, so that the first voxel of each label is what remains.
    first[flat[::-1]] = np.arange(flat.size - 1, -1, -1)
    first_voxels = np.stack(np.unravel_index(first[1:], labels.shape), axis=-1)
    origin = np.array([s.start for s in core])
    on_surface = np.ones(labels.shape, bool)
    on_surface[tuple(slice(1, -1) for _ in labels.shape)] = False
    voxels = np.argwhere(on_surface & (labels > 0))
    return {
        "first": (first_voxels + origin) @ strides,
        "surface": (voxels + origin) @ strides,
        "surface_label": labels[tuple(voxels.T)].astype(np.int32),
    }


def number_components(
    tables: Mapping[tuple[int, ...], Mapping[str, np.ndarray]], shape: Sequence[int], connectivity: int
) -> dict[tuple[int, ...], npt.NDArray[np.int64]]:
    """Join the components of all cores and number them.

    Parameters
    ----------
    tables
        Result of `component_table` for every core of a partition of the volume.
    shape
        Shape of the volume.
    connectivity
        As in `label_mask`.

    Returns
    -------
    dict
        For every core, the global id of each local label (``ids[local - 1]``): 1 to the number of
        components, in raster order of their first voxels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts = [len(t["first"]) for t in tables.values()]
    n_nodes = sum(counts)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if n_nodes == 0:
        return {index: np.empty(0, np.int64) for index in tables}
    voxel = np.concatenate([t["surface"] for t in tables.values()])
    node = np.concatenate(
        [t["surface_label"] - 1 + start for t, start in zip(tables.values(), starts[:-1], strict=True)]
    )
    a, b = _touching(voxel, node, shape, connectivity)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(n_nodes, n_nodes))
    n_components, component = connected_components(graph, directed=False)
    first = np.full(n_components, np.iinfo(np.int64).max)
    np.minimum.at(first, component, np.concatenate([t["first"] for t in tables.values()]))
    ids = np.empty(n_components, np.int64)
    ids[np.argsort(first)] = np.arange(1, n_components + 1)
    per_node = ids[component]
    return {
        index: per_node[start : start + count]
        for index, start, count in zip(tables, starts[:-1], counts, strict=True)
    }


def _touching(
    voxel: npt.NDArray[np.int64], node: npt.NDArray[np.int64], shape: Sequence[int], connectivity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the pairs of nodes that own neighbouring voxels."""
    order = np.argsort(voxel)
    voxel, node = voxel[order], node[order]
    position = np.stack(np.unravel_index(voxel, tuple(shape)), axis=-1)
    strides = _strides(shape)
    pairs_a, pairs_b = [], []
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        # One of each pair of opposite steps is enough: pairs have no direction.
        if step <= (0,) * len(shape) or np.count_nonzero(step) > connectivity:
            continue
        inside = np.all((position + step >= 0) & (position + step < shape), axis=1)
        wanted = voxel[inside] + int(strides @ np.array(step))
        found = np.minimum(np.searchsorted(voxel, wanted), len(voxel) - 1)
        hit = voxel[found] == wanted
        pairs_a.append(node[inside][hit])
        pairs_b.append(node[found[hit]])
    return np.concatenate(pairs_a), np.concatenate(pairs_b)


def _strides(shape: Sequence[int]) -> npt.NDArray[np.int64]:
    """Raster strides in voxels."""
    return np.array([int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))], np.int64)

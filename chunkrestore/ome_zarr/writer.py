"""Arrays of an image under construction: created first, filled block by block, published last.

A group that is being written has arrays but no OME metadata: no reader takes it for an image. What it will
become stands in its ``chunkrestore`` attribute, so that a writer can be opened again after a crash.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.channels import fill_windows
from chunkrestore.ome_zarr.conform import without_warnings
from chunkrestore.ome_zarr.layout import LevelPlan
from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES, short
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.ome_zarr.storage import Storage
from chunkrestore.ome_zarr.store import Json
from chunkrestore.ome_zarr.target import RegionWriter


@dataclass(frozen=True)
class Document:
    """The attributes of an image under construction."""

    ome: Json
    """``multiscales``, ``omero`` and the like, with all levels."""
    others: Json
    """Other attributes of the group."""
    arrays: tuple[Json, ...] = ()
    """Attributes of the levels' arrays, as many as have any."""


@dataclass(frozen=True)
class ImageWriter:
    """An image under construction; small and picklable, so tasks can take it along."""

    path: str
    """Path of the group."""
    version: str
    """OME-Zarr version."""
    targets: tuple[RegionWriter, ...]
    """Handle on every level, finest first."""
    factors: tuple[tuple[int, ...], ...]
    """Per level and spatial axis: voxels of the level below per voxel; all 1 at level 0."""
    method: str
    """How levels derive from each other: ``"mean"``, ``"nearest"`` or ``"mode"``."""
    document: Json = field(repr=False, compare=False)
    """The attributes that `publish` writes, but for display windows and provenance."""

    @property
    def axes(self) -> str:
        """Letters of ``tczyx``, one per axis."""
        return self.targets[0].axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Length per axis of level 0."""
        return self.targets[0].shape

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return len(self.targets)

    def target(self, level: int = 0) -> RegionWriter:
        """Return the handle that writes (and reads) regions of a level.

        Raises
        ------
        ValueError
            If there is no such level.
        """
        if not 0 <= level < self.n_levels:
            raise ValueError(f"level {level} does not exist in {self.path}; it has {self.n_levels}")
        return self.targets[level]

    def publish(self, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the OME metadata: from now on the store is an image. Call it when all levels are complete.

        Parameters
        ----------
        provenance
            JSON-compatible values that say how the voxels came about; stored under the ``chunkrestore``
            attribute, with that of the image it was made `like` as its ``source``.
        """
        zarr_format = metadata.VERSIONS[self.version]
        _, ome, others = metadata.split(stores.Node(zarr_format, "group", self.document, {}), self.path)
        if "omero" in ome:
            ome["omero"] = fill_windows(ome["omero"], self.targets[-1])
        others[OWN_KEY] = {"provenance": dict(provenance or {}), **others.get(OWN_KEY, {})}
        stores.write_group(self.path, zarr_format, metadata.unite(ome, others, self.version))
        refresh_consolidated(self.path)

    @classmethod
    def create(
        cls,
        path: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        plans: Sequence[LevelPlan],
        document: Document,
        storage: Storage,
    ) -> Self:
        """Create the arrays of a new group and mark it as unfinished.

        Parameters
        ----------
        path
            Of the group; nothing of it may exist, but for its ``labels``.
        shape, dtype
            Of level 0, all axes.
        plans
            Spatial shape of every level.
        document
            What the image will say of itself.
        storage
            How arrays are stored.
        """
        multiscale = document.ome["multiscales"][0]
        paths = [entry["path"] for entry in multiscale["datasets"]]
        for member in paths:
            stores.check_place(path, member, own=True)
        mark_unfinished(path, storage.zarr_format, {"state": "creating", "levels": paths})
        lead = tuple(shape[: len(shape) - len(plans[0].shape)])
        names = [axis["name"] for axis in multiscale["axes"]]
        for level, (member, plan) in enumerate(zip(paths, plans, strict=True)):
            attributes = document.arrays[level] if level < len(document.arrays) else {}
            storage = storage.above(plan.factors)
            storage.create_array(stores.join(path, member), lead, plan.shape, dtype, names, attributes)
        state = {
            "state": "writing",
            "token": uuid.uuid4().hex,
            "version": storage.version,
            "method": multiscale["type"],
            "levels": paths,
            "factors": [list(plan.factors) for plan in plans],
            "publish": metadata.unite(document.ome, document.others, storage.version),
        }
        mark_unfinished(path, storage.zarr_format, state)
        return cls._from_state(path, state)

    @classmethod
    def _from_state(cls, path: str, state: Json) -> Self:
        zarr_format = metadata.VERSIONS[state["version"]]
        _, ome, _ = metadata.split(stores.Node(zarr_format, "group", state["publish"], {}), path)
        letters = metadata.axis_letters(ome["multiscales"][0], path)
        return cls(
            path=path,
            version=state["version"],
            targets=tuple(
                replace(RegionWriter.at(path, member, letters), token=str(state.get("token", "")))
                for member in state["levels"]
            ),
            factors=tuple(tuple(f) for f in state["factors"]),
            method=state["method"],
            document=state["publish"],
        )

    @classmethod
    def reopen(cls, path: str) -> Self:
        """Return the writer of the unfinished group at `path`.

        Raises
        ------
        FileNotFoundError
            If there is no group.
        ValueError
            If it is finished, its creation was interrupted, or its record is damaged.
        """
        state = unfinished_state(path)
        if state is None and stores.read_node(path) is None:
            raise FileNotFoundError(f"{path} does not exist; nothing can be resumed there")
        if state is None:
            raise ValueError(f"{path} is not unfinished; there is nothing to resume")
        if state["state"] != "writing":
            raise ValueError(f"{path} was interrupted while it was created; create it again with overwrite")
        try:
            return cls._from_state(path, state)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path}: what it was to become is damaged ({type(error).__name__}: {short(str(error))}); create it "
                "again with overwrite"
            ) from None


def unfinished_state(path: str) -> Json | None:
    """Return what the group at `path` will become, or None if it is not unfinished."""
    node = stores.read_node(path)
    state = node.attributes.get(OWN_KEY) if node is not None else None
    return state if isinstance(state, dict) and "state" in state else None


def mark_unfinished(path: str, zarr_format: int, state: Json) -> None:
    """Make the group at `path` one that no reader takes for an image, remembering `state`."""
    stores.write_group(path, zarr_format, {OWN_KEY: state})
    refresh_consolidated(path)


def refresh_consolidated(path: str) -> None:
    """Bring consolidated metadata of the groups around `path` up to date, where they carry any."""
    for group in stores.enclosing_groups(path):
        if stores.is_consolidated(group):
            consolidate(group)


def consolidate(group: str) -> None:
    """Write a copy of the metadata of all members into the group, as it was there before.

    Raises
    ------
    ValueError
        If a member's metadata cannot be read.
    """
    import zarr

    from chunkrestore.ome_zarr.bounded import BoundedStore

    # Consolidation is not yet part of zarr v3; it was there before us. One thread at a time: the last sees all members
    with without_warnings():
        try:
            # Reads the documents of all members, whoever wrote them
            zarr.consolidate_metadata(BoundedStore(stores.array_store(group), *[MAX_DOCUMENT_NBYTES] * 2))
        except RecursionError:
            raise ValueError(
                f"{group}: consolidated metadata cannot be renewed, a member's is nested too deep; remove it"
            ) from None

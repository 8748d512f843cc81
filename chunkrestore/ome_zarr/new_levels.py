"""New levels for an image that exists already, whoever wrote it: made beside the old ones, listed when complete.

Until then readers see the image as it was. Arrays are created from the document of level 0's array, so they are stored
alike; the attributes of the group are edited as they are, so that nothing in them is lost.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.arrays import RegionReader
from chunkrestore.ome_zarr.carry import described
from chunkrestore.ome_zarr.image import OmeZarrImage
from chunkrestore.ome_zarr.layout import LevelPlan, Shape, shards_above
from chunkrestore.ome_zarr.levels import Step, pyramid_steps
from chunkrestore.ome_zarr.limits import MAX_LEVELS
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.ome_zarr.store import Json, Node
from chunkrestore.ome_zarr.target import RegionWriter
from chunkrestore.ome_zarr.writer import ImageWriter, consolidate, refresh_consolidated


@dataclass(frozen=True)
class LevelWriter(RegionWriter):
    """An array beside those of a published image: its token is in attributes of its own, since the group's are read."""

    def _check_token(self) -> None:
        if _token(self.store, self.array_path) != self.token:
            raise ValueError(
                f"{self.name} was finished or begun anew by another job; nothing was written to it"
            )


@dataclass(frozen=True)
class NewLevels:
    """Levels that an image or label group gets, as JSON-compatible values."""

    path: str
    """Of the group."""
    letters: str
    """Letter of each axis in the order of the stored arrays."""
    kept: tuple[str, ...]
    """Paths of the arrays that stay, finest first."""
    names: tuple[str, ...]
    """Paths of the arrays that are made."""
    shapes: tuple[Shape, ...]
    """Spatial shape of every level, kept and new."""
    factors: tuple[Shape, ...]
    """Per level and spatial axis: voxels of the level below per voxel; all 1 at level 0."""
    method: str
    """How levels derive from each other."""
    replaced: tuple[str, ...] = ()
    """Paths of the arrays that are removed when the new ones are listed."""
    consolidated: bool = False
    """Whether the group holds a copy of its members' metadata, which then is renewed."""

    @classmethod
    def of(cls, image: OmeZarrImage, n_kept: int, plans: Sequence[LevelPlan], method: str) -> Self:
        """Return the levels that make `image` have those of `plans`, of which the first `n_kept` exist.

        Raises
        ------
        ValueError
            If the image cannot be written to, or what is to be removed is not the image's alone.
        """
        readers = [level.reader for level in image.levels]
        kept, old = ([reader.array_path for reader in part] for part in (readers[:n_kept], readers[n_kept:]))
        listed = _listed(image.path)
        _check_own([*kept, *old], old, image.path)
        letters = "".join(a for _, a in sorted(zip(readers[0].order, readers[0].axes, strict=True)))
        return cls(
            path=image.path,
            letters=letters,
            kept=tuple(kept),
            names=_free_names(image.path, kept[0], listed, len(plans) - n_kept),
            shapes=tuple(plan.shape for plan in plans),
            factors=tuple(plan.factors for plan in plans),
            method=method,
            # What another multiscale of the group lists stays.
            replaced=tuple(name for name in old if listed.count(name) == 1),
            consolidated=stores.is_consolidated(image.path),
        )

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Return what `describe` has described."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        shapes = {name: tuple(map(tuple, values[name])) for name in ("shapes", "factors")}
        return cls(**(values | shapes))

    def describe(self) -> Json:
        """Return all fields."""
        return asdict(self)

    @property
    def n_done(self) -> int:
        """Coarsest level that exists."""
        return len(self.kept) - 1

    @property
    def is_listed(self) -> bool:
        """Whether the image lists the new levels by now."""
        return stores.read_node(self.path) is not None and set(self.names) <= set(_listed(self.path))

    def readers(self) -> list[RegionReader]:
        """Return handles on all levels, kept and new.

        Raises
        ------
        FileNotFoundError
            If one is missing.
        """
        return [RegionReader.at(self.path, name, self.letters) for name in (*self.kept, *self.names)]

    def steps(self) -> list[Step]:
        """Return the passes that make the new levels."""
        units = [self._stored(level)[1] for level in range(len(self.shapes))]
        return pyramid_steps(self.shapes, units, self.factors, self.n_done)

    def create(self, token: str) -> None:
        """Create the new arrays, empty, with a token for those who write them; what is left of a killed try goes."""
        node = stores.read_node(stores.join(self.path, self.kept[0]))
        assert node is not None
        for level, name in enumerate(self.names, len(self.kept)):
            stores.check_place(self.path, name, own=True)
            stores.remove_member(self.path, name)
            _write_groups_around(self.path, name, node.zarr_format)
            _write_array(
                stores.join(self.path, name), node, self._document(node, level), {OWN_KEY: {"token": token}}
            )

    def writer(self, token: str) -> ImageWriter:
        """Return the handles that write the new levels; what they follow from is read through it as well."""
        kinds = [RegionWriter] * len(self.kept) + [LevelWriter] * len(self.names)
        targets = tuple(
            kind(**{f.name: getattr(reader, f.name) for f in fields(reader)}, token=token)
            for kind, reader in zip(kinds, self.readers(), strict=True)
        )
        return ImageWriter(self.path, "", targets, self.factors, self.method, {})

    def publish(self) -> None:
        """List the new levels, then remove those that they replace; again after a crash, when all are complete."""
        for name in self.names:
            path = stores.join(self.path, name)
            node = stores.read_node(path)
            assert node is not None
            attributes = {key: value for key, value in node.attributes.items() if key != OWN_KEY}
            _write_array(path, node, node.metadata, attributes)
        group = stores.read_node(self.path)
        assert group is not None
        # Of a try that was killed here; whatever lies deeper in the store is not ours to clean up.
        torn = [n for n in stores.contents(self.path) or () if n.endswith(".partial")]
        stores.remove_keys(self.path, [n for n in torn if n.startswith(("zarr.json.", ".zattrs."))])
        stores.write_group(self.path, group.zarr_format, self._attributes(group))
        for name in self.replaced:
            stores.remove_member(self.path, name)
        if self.consolidated:
            consolidate(self.path)
        refresh_consolidated(self.path)

    def _attributes(self, group: Node) -> Json:
        """Return the attributes of the group with the new levels listed."""
        attributes = copy.deepcopy(group.attributes)
        ome = attributes["ome"] if group.zarr_format == 3 else attributes
        multiscale = ome["multiscales"][0]
        entries = [e for e in multiscale["datasets"] if e["path"] in self.kept][: len(self.kept)]
        scale, translation = metadata.transform({**multiscale, "datasets": entries}, self.n_done, whole=False)
        total = [1] * len(scale)
        spatial = [self.letters.index(letter) for letter in metadata.spatial(self.letters)]
        for name, of_level in zip(self.names, self.factors[len(self.kept) :], strict=True):
            for axis, factor in zip(spatial, of_level, strict=True):
                total[axis] *= factor
            scaled = [s * f for s, f in zip(scale, total, strict=True)]
            moved = [t + (f - 1) / 2 * s for t, f, s in zip(translation, total, scale, strict=True)]
            entries.append(metadata.dataset(name, scaled, moved))
        multiscale["datasets"] = entries
        if self.n_done == 0:
            # Of further levels nobody says how those below them were made.
            multiscale |= described(self.method)
        return attributes

    def _stored(self, level: int) -> tuple[Shape, Shape]:
        """Return the chunks of a new level, those of level 0, and what it stores as one file."""
        reader = RegionReader.at(self.path, self.kept[0], self.letters)
        chunks, unit = reader.spatial_chunks, reader.spatial_write_unit
        for of_level in self.factors[1 : level + 1]:
            unit = shards_above(unit, chunks, of_level)
        whole = (-(-n // c) * c for n, c in zip(self.shapes[level], chunks, strict=True))
        return chunks, tuple(map(min, unit, whole))

    def _document(self, node: Node, level: int) -> Json:
        """Return the document of a new array: that of level 0 with another shape, and shards that follow it."""
        document = copy.deepcopy(node.metadata)
        chunks, shards = self._stored(level)

        def stored(lead: Sequence[int] | None, lengths: Sequence[int]) -> list[int]:
            spatial = dict(zip(metadata.spatial(self.letters), lengths, strict=True))
            return [spatial.get(a, 1 if lead is None else lead[i]) for i, a in enumerate(self.letters)]

        document["shape"] = stored(document["shape"], self.shapes[level])
        if node.zarr_format == 2:
            document["chunks"] = stored(None, chunks)
            return document
        codecs = document["codecs"]
        is_sharded = len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed"
        if is_sharded:
            codecs[0]["configuration"]["chunk_shape"] = stored(None, chunks)
        document["chunk_grid"]["configuration"]["chunk_shape"] = stored(
            None, shards if is_sharded else chunks
        )
        return document


def _token(path: str, name: str) -> str | None:
    """Return the token of an array that was not listed yet."""
    node = stores.read_node(stores.join(path, name))
    own = node.attributes.get(OWN_KEY) if node is not None and node.kind == "array" else None
    return str(own["token"]) if isinstance(own, dict) and "token" in own else None


def _listed(path: str) -> list[str]:
    """Return the paths that the multiscales of a group list."""
    node = stores.read_node(path)
    assert node is not None
    ome = node.attributes.get("ome", {}) if node.zarr_format == 3 else node.attributes
    multiscales = metadata.as_dicts(ome.get("multiscales"))
    return [str(d.get("path")) for m in multiscales for d in metadata.as_dicts(m.get("datasets"))]


def _check_own(every: Sequence[str], old: Sequence[str], path: str) -> None:
    """Raise unless the arrays `old` among `every` can be removed without anything else."""
    for name in old:
        stores.check_removable(name, path)
        parts = name.split("/")
        others = [other.split("/") for other in every]
        others.remove(parts)
        shared = [o for o in others if o[: len(parts)] == parts or parts[: len(o)] == o]
        if shared or parts[0] in ("labels", stores.PRIVATE_FOLDER):
            raise ValueError(f"{path} lists {name!r} as a level, which is not that alone; it is not removed")


def _free_names(path: str, first: str, listed: Sequence[str], n: int) -> tuple[str, ...]:
    """Return `n` paths for new arrays, called like level 0, where nothing lies but what a killed job has left."""
    if len(listed) > MAX_LEVELS:
        raise ValueError(f"{path} lists {len(listed)} levels; no pyramid has so many")
    digits = [*re.finditer(r"\d+", first)]
    begin, end = digits[-1].span() if digits else (len(first), len(first))
    names: list[str] = []
    number = 0
    while len(names) < n:
        number += 1
        name = f"{first[:begin]}{'' if digits else '_'}{number}{first[end:]}"
        if name not in listed and name != first and _is_free(path, name):
            names.append(name)
    return tuple(names)


def _is_free(path: str, name: str) -> bool:
    """Return whether nothing lies at a place, or what a job has left that was killed while it created an array."""
    place = stores.join(path, name)
    if not stores.exists(place) or _token(path, name) is not None:
        return True
    return not stores.is_file(place) and all(n.endswith(".partial") for n in stores.contents(place) or ())


def _write_groups_around(path: str, name: str, zarr_format: int) -> None:
    """Create the groups between `path` and its member `name`."""
    *around, _ = name.split("/")
    for depth in range(len(around)):
        group = stores.join(path, *around[: depth + 1])
        if stores.read_node(group) is None:
            stores.write_group(group, zarr_format, {})


def _write_array(path: str, node: Node, document: Json, attributes: Json) -> None:
    """Write the documents of an array; names of its axes that level 0 has for xarray are kept."""
    if "_ARRAY_DIMENSIONS" in node.attributes:
        attributes = {"_ARRAY_DIMENSIONS": node.attributes["_ARRAY_DIMENSIONS"], **attributes}
    if node.zarr_format == 3:
        stores.write_json(path, "zarr.json", {**document, "attributes": attributes})
        return
    stores.write_json(path, ".zattrs", attributes)
    stores.write_json(path, ".zarray", document)

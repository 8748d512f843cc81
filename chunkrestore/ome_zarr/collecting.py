"""Write a collection of images like another one: fields are listed as they are finished, the collection last.

While fields are made, the group is no collection to any reader, and a well lists no field that is not published. So
what a reader finds is always true: a plate holds all that was asked for, a well what is there by now.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.collection import Collection, collection_of
from chunkrestore.ome_zarr.members import LAYOUT_KEY, UNFINISHED, XML_KEY, Field, read_xml
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.ome_zarr.store import Json


@dataclass(frozen=True)
class CollectionWriter:
    """A collection under construction; its images are written by others."""

    path: str
    """Path or URL of the group."""
    version: str
    """OME-Zarr version, ``"0.5"`` or ``"0.4"``."""
    source: Collection
    """What it is made like: layout, names, acquisitions, and attributes that are not understood."""

    def existing(self) -> Collection | None:
        """Return the collection that is published here, or None if there is none yet.

        Raises
        ------
        FileExistsError
            If something else is here.
        ValueError
            If it has another version, or another kind than `source`.
        """
        node = stores.read_node(self.path)
        if node is None:
            if not stores.is_free(self.path):
                raise FileExistsError(f"`output` {self.path} exists and is no collection; give another store")
            return None
        own = node.attributes.get(OWN_KEY)
        if isinstance(own, dict) and UNFINISHED in own:
            published, version = None, str(own[UNFINISHED])
        else:
            published = collection_of(self.path, node)
            if published is None or published.kind != self.source.kind:
                raise FileExistsError(
                    f"`output` {self.path} exists and is no {self.source.kind}; give another store"
                )
            version = published.version
        if version != self.version:
            raise ValueError(
                f"`output` {self.path} is OME-Zarr {version}, so `version` {self.version!r} does not fit; give another "
                "store"
            )
        return published

    def begin(self) -> None:
        """Create the group, unless it is there."""
        if stores.read_node(self.path) is None:
            self._mark_unfinished()

    def add(self, field: Field) -> None:
        """List a finished field in its well; collections without wells list all their fields at the end."""
        if not field.well:
            return
        listed = self._listed(field.well)
        if field.name not in listed:
            self._write_well(field.well, [*listed, field.name])

    def withdraw(self, fields: Sequence[Field]) -> None:
        """List fields no longer, before they are written anew."""
        published, gone = self.existing(), {f.member for f in fields}
        left = [] if published is None else [f for f in published.fields if f.member not in gone]
        if published is not None and not left:
            self._mark_unfinished()
        for well in dict.fromkeys(f.well for f in fields if f.well):
            kept = [name for name in self._listed(well) if f"{well}/{name}" not in gone]
            if len(kept) < len(self._listed(well)):
                self._write_well(well, kept)
        if published is not None and left:
            self._write_root([f.member for f in left], published.others)

    def publish(self, fields: Sequence[Field], provenance: Mapping[str, Any]) -> None:
        """Make the group a collection of `fields`, which are finished, and of what it listed before.

        Parameters
        ----------
        fields
            Of `source`.
        provenance
            JSON-compatible values that say how the images came about, kept under the ``chunkrestore`` attribute.
        """
        published = self.existing()
        before = [] if published is None else [f.member for f in published.fields]
        others = copy.deepcopy(self.source.others)
        previous = others.pop(OWN_KEY, None)
        others[OWN_KEY] = {"provenance": dict(provenance)} | ({"source": previous} if previous else {})
        self._write_root([*before, *(f.member for f in fields)], others)

    def _write_root(self, members: Iterable[str], others: Json) -> None:
        ome, listed = copy.deepcopy(self.source.ome), set(members)
        if self.source.kind == "plate":
            ome["plate"] = self._plate(ome["plate"], {m.rpartition("/")[0] for m in listed})
        elif self.source.kind == "well":
            ome["well"] = _with_images(ome["well"], listed)
        if LAYOUT_KEY in ome:
            self._write_series(listed)
        self._write(self.path, ome, others)

    def _plate(self, plate: Json, wells: set[str]) -> Json:
        """Return the attributes of the plate with `wells` alone; rows and columns are those of the real plate."""
        rows, columns = self.source.rows, self.source.columns
        kept = []
        for entry in plate["wells"]:
            row, _, column = entry["path"].partition("/")
            if entry["path"] in wells:
                places = {"rowIndex": rows.index(row), "columnIndex": columns.index(column)}
                kept.append(entry | places)
        counted = (
            {"field_count": max(len(self._listed(well)) for well in wells)} if "field_count" in plate else {}
        )
        return {**plate, "wells": kept, **counted}

    def _write_series(self, listed: set[str]) -> None:
        """Write the ``OME`` group; the acquisition metadata only if it describes just what is here."""
        everything = [f.member for f in self.source.fields]
        place = stores.check_place(self.source.path, "OME")
        node = stores.read_node(stores.join(self.source.path, place))
        ome, others = ({}, {}) if node is None else metadata.split(node, self.source.path)[1:]
        here = stores.join(self.path, stores.check_place(self.path, "OME", own=True))
        self._write(here, {**ome, "series": [m for m in everything if m in listed]}, others)
        if listed < set(everything):
            stores.remove_keys(here, [XML_KEY])
            return
        try:
            content = read_xml(self.source.path)
        except ValueError as error:
            warnings.warn(f"acquisition metadata is left behind: {error}", stacklevel=2)
            return
        if content is not None:
            stores.write_document(here, XML_KEY, content)

    def _listed(self, well: str) -> list[str]:
        """Return the names of the fields that a well lists by now."""
        node = stores.read_node(stores.join(self.path, stores.check_place(self.path, well)))
        if node is None:
            return []
        content = metadata.split(node, self.path)[1].get("well")
        images = metadata.as_dicts(content.get("images")) if isinstance(content, dict) else []
        return [str(image.get("path")) for image in images]

    def _write_well(self, well: str, names: Sequence[str]) -> None:
        """List `names` in a well; one without any field is a plain group."""
        here = stores.join(self.path, stores.check_place(self.path, well, own=True))
        ome, others = self.source.well_attributes(well)
        others.pop(OWN_KEY, None)
        row = stores.parent(here)
        if stores.read_node(row) is None:
            node = stores.read_node(stores.parent(stores.join(self.source.path, well)))
            self._write(row, {}, {} if node is None else metadata.split(node, self.source.path)[2])
        ome["well"] = _with_images(ome["well"], set(names))
        self._write(here, ome if names else {}, others)

    def _mark_unfinished(self) -> None:
        stores.write_group(self.path, metadata.VERSIONS[self.version], {OWN_KEY: {UNFINISHED: self.version}})

    def _write(self, path: str, ome: Json, others: Json) -> None:
        ome = copy.deepcopy(ome)
        for key in ("plate", "well"):
            # Since 0.5 the version stands beside them, where it is written in any case.
            if key in ome and (self.version == "0.4" or "version" in ome[key]):
                ome[key]["version"] = self.version
        attributes = metadata.unite(ome, others, self.version) if ome else others
        stores.write_group(path, metadata.VERSIONS[self.version], attributes)


def _with_images(well: Json, names: set[str]) -> Json:
    """Return the attributes of a well with some of its images."""
    return {**well, "images": [image for image in well["images"] if image["path"] in names]}

"""Collections of images: plates of high-content screens, their wells, and the layout of bioformats2raw.

A *field* is one image of a collection. Plates are opened from one document; the wells, each of which lists its
fields in a document of its own, are read when they are asked for, so a large plate behind a URL opens at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.members import (
    LAYOUT_KEY,
    UNFINISHED,
    Acquisition,
    Field,
    acquisitions_of,
    fields_of,
    names_of,
    series_of,
    wells_of,
)
from chunkrestore.ome_zarr.store import Json, Node

Kind: TypeAlias = Literal["plate", "well", "series"]

_AT_A_TIME = 32  # wells that are asked for together behind a URL, where most of the time goes into waiting
_MOST_NAMED = 24


@dataclass(frozen=True, repr=False)
class Collection:
    """Images that belong together, opened from the metadata of the group around them."""

    path: str
    """Path or URL of the group."""
    kind: Kind
    """``"plate"``, ``"well"``, or ``"series"``: images in the layout of bioformats2raw."""
    version: str
    """OME-Zarr version of the group."""
    name: str
    """Of the plate; empty if it has none."""
    rows: tuple[str, ...]
    """Names of the rows of a plate, all of them."""
    columns: tuple[str, ...]
    """Names of the columns of a plate, all of them."""
    acquisitions: tuple[Acquisition, ...]
    """Of a plate."""
    wells: tuple[str, ...]
    """Paths inside the plate, such as ``"B/03"``, in the order of the plate; those selected."""
    field_count: int | None
    """Most fields of a well, as the plate says; None if it does not. Of a well or series, the number of fields."""
    ome: Json = field(repr=False, compare=False)
    """The OME attributes as on disk."""
    others: Json = field(repr=False, compare=False)
    """The other attributes of the group."""
    listed: tuple[Field, ...] | None = field(default=None, repr=False)
    """The fields, where they are known without reading wells."""

    def __repr__(self) -> str:
        size = f"{len(self.wells)} wells" if self.kind == "plate" else f"{len(self.fields)} fields"
        return f"<Collection {self.path} {self.kind}, {size}>"

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """All fields, by well; of a plate, every selected well is read.

        Raises
        ------
        FileNotFoundError
            If wells that the plate lists do not exist.
        ValueError
            If a well does not conform.
        """
        if self.listed is not None:
            return self.listed
        return tuple(f for fields in self._fields_of(self.wells) for f in fields)

    @property
    def first(self) -> Field:
        """The first field; of a plate, one well is read."""
        return self.fields[0] if self.listed is not None else self._fields_of(self.wells[:1])[0][0]

    def select(
        self, wells: str | Sequence[str] | None = None, fields: int | str | Sequence[int | str] | None = None
    ) -> Collection:
        """Return the collection with some of its wells and fields.

        Parameters
        ----------
        wells
            Of a plate, such as ``"B/03"``, ``"B03"`` or ``"B3"``; all by default.
        fields
            By name (text) or by position (an integer, or its digits where no field is called so), in every selected
            well that has them; all by default.

        Raises
        ------
        ValueError
            If one of them does not exist; the message lists what does.
        """
        chosen = self
        if wells is not None:
            if self.kind != "plate":
                raise ValueError(f"`wells` were given, but {self.path} is a {self.kind}, which has none")
            names = [wells] if isinstance(wells, str) else list(wells)
            found = {self._well(name) for name in _some(names, "wells")}
            listed = None if self.listed is None else tuple(f for f in self.listed if f.well in found)
            chosen = replace(self, wells=tuple(w for w in self.wells if w in found), listed=listed)
        if fields is None:
            return chosen
        wanted = [fields] if isinstance(fields, int | str) else list(fields)
        picked = {f for name in _some(wanted, "fields") for f in chosen._called(name)}
        kept = tuple(f for f in chosen.fields if f in picked)
        present = {f.well for f in kept}
        return replace(chosen, listed=kept, wells=tuple(w for w in chosen.wells if w in present))

    def well_attributes(self, well: str) -> tuple[Json, Json]:
        """Return the OME attributes and the other attributes of a well of a plate, as on disk.

        Raises
        ------
        FileNotFoundError, ValueError
            As for `fields`.
        """
        where = stores.join(self.path, stores.check_place(self.path, well))
        node = stores.read_node(where)
        if node is None or node.kind != "group":
            raise FileNotFoundError(where)
        version, ome, others = metadata.split(node, where)
        # Before 0.5 the version stood in every document, and plates with several are about.
        if version != self.version and max(version, self.version) >= "0.5":
            raise ValueError(
                f"{where} is OME-Zarr {version}, but its plate {self.path} is {self.version}; convert the plate with "
                "the tool that wrote it"
            )
        return ome, others

    def _fields_of(self, wells: Sequence[str]) -> list[tuple[Field, ...]]:
        """Read wells, and return the fields of each."""

        def read(well: str) -> tuple[Field, ...] | None:
            try:
                ome, _ = self.well_attributes(well)
            except FileNotFoundError:
                return None
            return fields_of(self.path, well, ome.get("well"), (a.id for a in self.acquisitions))

        if len(wells) > 1 and stores.is_url(self.path):
            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                found = list(pool.map(read, wells))
        else:
            found = [read(well) for well in wells]
        absent = [well for well, fields in zip(wells, found, strict=True) if fields is None]
        if absent:
            raise FileNotFoundError(
                f"{self.path} lists wells that do not exist: {_named(absent)}; copy the plate again, or choose others "
                "with `wells`"
            )
        return [fields for fields in found if fields is not None]

    def _well(self, name: str) -> str:
        """Return the path of the well called `name`."""
        matches = [well for well in self.wells if name == well]
        if not matches:
            # A zero in front of a column's number may be left out, or stand there too much.
            text = re.sub(r"(?<!\d)0+(?=\d)", "", name)
            matches = [w for w in self.wells if {name, text} & _spellings(w)]
        if len(matches) != 1:
            what = (
                f"may be any of {_named(matches)}"
                if matches
                else f"does not exist; there are {_named(self.wells)}"
            )
            raise ValueError(f"`wells`: {short(name)} in {self.path} {what}")
        return matches[0]

    def _called(self, name: int | str) -> list[Field]:
        """Return the fields of that name, or at that position of their wells."""
        found = [f for f in self.fields if f.name == name]
        if not found and (isinstance(name, int) or name.isdecimal()):
            found = [f for f in self.fields if f.index == int(name)]
        if not found:
            known = list(dict.fromkeys(f.name for f in self.fields))
            raise ValueError(
                f"`fields`: {short(name)} does not exist in {self.path}; there are {_named(known)}"
            )
        return found


def open_collection(store: str | os.PathLike[str] | Collection) -> Collection:
    """Open a plate, a well, or a bioformats2raw layout from its metadata alone.

    Parameters
    ----------
    store
        Path of the group, or its URL. A collection that is open already is returned as it is.

    Raises
    ------
    FileNotFoundError
        If `store` does not exist.
    ValueError
        If it is no collection, or does not conform to its version; the message names the key.
    """
    if isinstance(store, Collection):
        return store
    path = stores.location(store)
    node = stores.read_node(path)
    if node is None:
        raise FileNotFoundError(f"{path} holds no zarr group; check the path of the store")
    found = collection_of(path, node)
    own = node.attributes.get(metadata.OWN_KEY)
    if found is None and isinstance(own, dict) and UNFINISHED in own:
        raise ValueError(
            f"{path} is unfinished: its fields are published, but not all of them are done; finish it with "
            "`chunkrestore resume`"
        )
    if found is None:
        raise ValueError(
            f"{path} is no collection of images (plate, well or bioformats2raw layout); `open_image` opens images"
        )
    return found


def collection_of(path: str, node: Node) -> Collection | None:
    """Return the collection that the group at `path` is, or None if it is none; `node` are its documents.

    Raises
    ------
    ValueError
        If it is one that does not conform.
    """
    if node.kind != "group":
        return None
    version, ome, others = metadata.split(node, path)
    if "plate" in ome:
        return _plate(path, version, ome, others)
    if "well" in ome:
        kind: Kind = "well"
        fields = fields_of(path, "", ome["well"], ())
    elif LAYOUT_KEY in ome and "multiscales" not in ome:
        kind = "series"
        fields = series_of(path, version, ome)
    else:
        return None
    return Collection(path, kind, version, "", (), (), (), (), len(fields), ome, others, fields)


def _plate(path: str, version: str, ome: Json, others: Json) -> Collection:
    """Return the plate that `ome` describes, all its wells checked but none read."""
    plate = ome["plate"]
    if not isinstance(plate, dict):
        raise ValueError(f"{path}: `plate` is no object; the store is damaged")
    rows, columns = names_of(plate, "rows", path), names_of(plate, "columns", path)
    count, name = plate.get("field_count"), plate.get("name")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"{path}: `plate.field_count` {short(count)} must be an integer above 0")
    return Collection(
        path=path,
        kind="plate",
        version=version,
        name=name if isinstance(name, str) else "",
        rows=rows,
        columns=columns,
        acquisitions=acquisitions_of(plate, path),
        wells=wells_of(plate, rows, columns, path, indexed=version not in ("0.1", "0.2", "0.3")),
        field_count=count,
        ome=ome,
        others=others,
    )


def _some(names: list[Any], what: str) -> list[Any]:
    if not names:
        raise ValueError(f"`{what}` is empty; leave it out for all")
    return names


def _spellings(well: str) -> set[str]:
    row, _, column = well.partition("/")
    return {f"{row}{slash}{name}" for slash in ("", "/") for name in (column, column.lstrip("0") or column)}


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more

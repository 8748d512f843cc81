"""What plates, wells and bioformats2raw layouts say about their images, checked.

Everything here comes from documents that anybody may have written: names and counts are bounded, and no path leads
out of its collection.

References
----------
OME-Zarr specification, versions 0.4 and 0.5: "plate" metadata, "well" metadata, "bioformats2raw.layout".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkrestore.ome_zarr import metadata
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.ome_xml import image_names
from chunkrestore.ome_zarr.store import Json, Node

LAYOUT_KEY = "bioformats2raw.layout"
"""Attribute of a group whose images are numbered or listed in its ``OME`` group."""

XML_KEY = "METADATA.ome.xml"
"""Acquisition metadata in the ``OME`` group."""

UNFINISHED = "collection"
"""Key under ``chunkrestore`` in the attributes of a group that is going to be a collection."""

MAX_MEMBERS = 2**16
"""Wells of a plate, fields of a well, or images of a series. The largest plates have 9600 wells."""

_NAME = re.compile(r"[A-Za-z0-9]{1,200}")


@dataclass(frozen=True)
class Field:
    """One image of a collection."""

    path: str
    """Path or URL of the image, for `open_image`."""
    member: str
    """Path inside the collection, such as ``"B/03/0"``."""
    well: str
    """Path of its well inside the plate, such as ``"B/03"``; empty outside of plates."""
    index: int
    """Position in the list of its well or of the collection."""
    acquisition: int | None = None
    """Id of the acquisition that it belongs to, if the well names one."""

    @property
    def name(self) -> str:
        """Name inside its well or collection, such as ``"0"``."""
        return self.member.removeprefix(f"{self.well}/")


@dataclass(frozen=True)
class Acquisition:
    """One of the acquisitions of a plate."""

    id: int
    """What fields refer to."""
    name: str = ""
    """For people."""


def names_of(plate: Json, key: str, path: str) -> tuple[str, ...]:
    """Return the names of the ``"rows"`` or ``"columns"`` of the plate at `path`.

    Raises
    ------
    ValueError
        If there are none, or one is no name or listed twice.
    """
    names = [entry.get("name") for entry in _objects(plate.get(key), path, f"plate.{key}")]
    for i, name in enumerate(names):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{path}: `plate.{key}[{i}].name` {short(name)} must be letters and digits")
    return tuple(str(name) for name in _unique(names, path, f"plate.{key}"))


def wells_of(
    plate: Json, rows: Sequence[str], columns: Sequence[str], path: str, *, indexed: bool
) -> tuple[str, ...]:
    """Return the paths of the wells of the plate at `path`.

    Parameters
    ----------
    plate
        Its attributes.
    rows, columns
        Its names.
    path
        For messages.
    indexed
        Whether wells must give the positions of their row and column, as since version 0.4.

    Raises
    ------
    ValueError
        If a path is not made of a row and a column of the plate, a position is another one, or a well is listed twice.
    """
    wells = []
    for i, entry in enumerate(_objects(plate.get("wells"), path, "plate.wells")):
        key, well = f"plate.wells[{i}]", entry.get("path")
        row, _, column = well.partition("/") if isinstance(well, str) else ("", "", "")
        if row not in rows or column not in columns:
            raise ValueError(
                f"{path}: `{key}.path` {short(well)} must be ROW/COLUMN, both of them listed in the plate"
            )
        for name, names, part in (("rowIndex", rows, row), ("columnIndex", columns, column)):
            value, true = entry.get(name), names.index(part)
            if (indexed or value is not None) and (type(value) is not int or value != true):
                raise ValueError(
                    f"{path}: `{key}.{name}` {short(value)} must be {true}, the position of {part!r} in the plate"
                )
        wells.append(f"{row}/{column}")
    return tuple(_unique(wells, path, "plate.wells"))


def acquisitions_of(plate: Json, path: str) -> tuple[Acquisition, ...]:
    """Return the acquisitions of the plate at `path`, none if it names none.

    Raises
    ------
    ValueError
        If one has no id, or that of another one.
    """
    if plate.get("acquisitions") in (None, []):
        return ()
    found = []
    for i, entry in enumerate(_objects(plate["acquisitions"], path, "plate.acquisitions")):
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or number < 0:
            raise ValueError(
                f"{path}: `plate.acquisitions[{i}].id` {short(number)} must be an integer from 0"
            )
        found.append(Acquisition(number, name if isinstance(name, str) else ""))
    _unique([a.id for a in found], path, "plate.acquisitions")
    return tuple(found)


def fields_of(root: str, well: str, content: object, known: Iterable[int]) -> tuple[Field, ...]:
    """Return the fields of the well at `well` inside the collection at `root`.

    Parameters
    ----------
    root, well
        Path of the collection, and of the well inside it; empty if the well is the collection.
    content
        The ``well`` attribute.
    known
        Ids of the acquisitions of the plate; none if it names none.

    Raises
    ------
    ValueError
        If there is no field, a path is none of a group in the well, or an acquisition is unknown.
    """
    path, ids = stores.join(root, well), set(known)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: `well` is missing or no object; it is no well, or the store is damaged")
    fields = []
    for i, entry in enumerate(_objects(content.get("images"), path, "well.images")):
        name, acquisition = entry.get("path"), entry.get("acquisition")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{path}: `well.images[{i}].path` {short(name)} must be letters and digits")
        if acquisition is not None and (type(acquisition) is not int or (ids and acquisition not in ids)):
            raise ValueError(
                f"{path}: `well.images[{i}].acquisition` {short(acquisition)} is none of the plate's: {sorted(ids)}"
            )
        member = f"{well}/{name}" if well else name
        place = stores.join(root, stores.check_place(root, member))
        fields.append(Field(place, member, well, i, acquisition))
    _unique([f.name for f in fields], path, "well.images")
    return tuple(fields)


def series_of(path: str, version: str, ome: Json) -> tuple[Field, ...]:
    """Return the images of the bioformats2raw layout at `path`: those listed, else as many as XML or groups tell.

    Raises
    ------
    ValueError
        If the layout is unknown, the list leaves the collection or repeats itself, or there is no image.
    """
    layout = ome[LAYOUT_KEY]
    if layout != 3 or isinstance(layout, bool):
        raise ValueError(f"{path}: `{LAYOUT_KEY}` {short(layout)} is not supported, only 3")
    members = _listed(path, version)
    if members is None:
        members = [str(i) for i in range(_count(path))]
    if not members:
        raise ValueError(
            f"{path} has `{LAYOUT_KEY}` but no image; its first would be {stores.join(path, '0')}"
        )
    _unique(members, stores.join(path, "OME"), "series")
    return tuple(
        Field(stores.join(path, stores.check_place(path, member)), member, "", i)
        for i, member in enumerate(members)
    )


def read_xml(path: str) -> bytes | None:
    """Return the acquisition metadata of the collection at `path`, or None if there is none.

    Raises
    ------
    ValueError
        If it is larger than documents may be, or lies elsewhere.
    """
    return stores.read_document(stores.join(path, stores.check_place(path, "OME")), XML_KEY)


def _listed(path: str, version: str) -> list[str] | None:
    """Return what the ``OME`` group lists, or None if it does not list anything."""
    where = stores.join(path, stores.check_place(path, "OME"))
    node = _node(where)
    if node is None or node.kind != "group":
        return None
    own, ome, _ = metadata.split(node, where)
    series = ome.get("series")
    if series is None:
        return None
    if own != version:
        raise ValueError(
            f"{where} is OME-Zarr {own}, but the group around it {version}; copy the store again"
        )
    if not isinstance(series, list) or len(series) > MAX_MEMBERS:
        raise ValueError(f"{where}: `series` must be a list of at most {MAX_MEMBERS} paths")
    return [stores.check_member(member, f"{where}: `series[{i}]`") for i, member in enumerate(series)]


def _count(path: str) -> int:
    """Return how many images, called 0, 1, 2 ..., there are."""
    content = read_xml(path)
    if content:
        return len(image_names(content, stores.join(path, "OME", XML_KEY)))
    n = 0
    while n < MAX_MEMBERS and _node(stores.join(path, str(n))) is not None:
        n += 1
    return n


def _node(path: str) -> Node | None:
    """Return the documents at `path`; a bucket that must not be listed refuses what is absent."""
    try:
        return stores.read_node(path)
    except PermissionError:
        if stores.is_url(path):
            return None
        raise


def _objects(value: object, path: str, key: str) -> list[Json]:
    """Return `value` if it is a list of objects, and neither empty nor longer than one of a collection can be."""
    entries = metadata.as_dicts(value)
    if not isinstance(value, list) or len(entries) != len(value) or not 0 < len(value) <= MAX_MEMBERS:
        raise ValueError(f"{path}: `{key}` must be a list of 1 to {MAX_MEMBERS} objects, not {short(value)}")
    return entries


def _unique(values: list[Any], path: str, key: str) -> list[Any]:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{path}: `{key}` lists {short(value)} more than once; the store is damaged")
        seen.add(value)
    return values

"""Nodes and keys of a store on the local file system: the one module that touches paths.

A *node* is a zarr group or array. Its JSON documents are read and written here as they are, so that keys
this package does not know survive; only array data goes through zarr-python. A remote file system needs
another version of this module and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

Json = dict[str, Any]

PRIVATE_FOLDER = ".chunkrestore"
"""Folder inside a store that jobs may own; never read, written or removed here."""


@dataclass(frozen=True)
class Node:
    """The documents of one zarr group or array."""

    zarr_format: int
    """2 or 3."""
    kind: str
    """``"group"`` or ``"array"``."""
    attributes: Json
    """User attributes, as on disk."""
    metadata: Json
    """``zarr.json`` without its attributes, ``.zarray`` or ``.zgroup``."""

    @property
    def digest(self) -> str:
        """SHA-256 of the metadata without the attributes, independent of JSON formatting."""
        canonical = json.dumps(self.metadata, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def location(store: str | os.PathLike[str]) -> str:
    """Return the absolute path of `store` as a string.

    Raises
    ------
    ValueError
        If `store` is a URL.
    """
    text = os.fspath(store)
    if "://" in text:
        raise ValueError(f"`store` {text!r} is a URL; only local paths can be opened, mount or copy it first")
    return str(Path(text).expanduser().absolute())


def join(store: str, *parts: str) -> str:
    """Return the path of a node inside `store`."""
    return str(Path(store, *(p for p in parts if p)))


def check_member(path: object, where: str) -> str:
    """Return `path`, a member of the group `where`, if it stays inside that group.

    Raises
    ------
    ValueError
        If it is empty, absolute, or contains ``..``.
    """
    parts = PurePosixPath(str(path)).parts
    if not isinstance(path, str) or not parts or path.startswith("/") or ".." in parts or "\\" in path:
        raise ValueError(f"{where}: member path {path!r} leaves its group; it must be relative, without '..'")
    return path


def read_json(folder: str, key: str) -> Json | None:
    """Return a JSON document, or None if there is none.

    Raises
    ------
    ValueError
        If the file is not a JSON object.
    """
    path = Path(folder, key)
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy of the store") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object; restore it from a copy of the store")
    return document


def write_json(folder: str, key: str, document: Mapping[str, Any]) -> None:
    """Write a JSON document; a reader sees the old one or the new one, never a part."""
    text = json.dumps(document, indent=2)
    path = Path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_node(folder: str) -> Node | None:
    """Return the zarr group or array at `folder`, or None if there is none."""
    if (document := read_json(folder, "zarr.json")) is not None:
        attributes = document.pop("attributes", {})
        return Node(3, str(document.get("node_type")), attributes, document)
    for key, kind in ((".zarray", "array"), (".zgroup", "group")):
        if (document := read_json(folder, key)) is not None:
            return Node(2, kind, read_json(folder, ".zattrs") or {}, document)
    return None


def write_group(folder: str, zarr_format: int, attributes: Mapping[str, Any]) -> None:
    """Create the group at `folder`, or replace the attributes of the existing one, in one atomic step."""
    if zarr_format == 3:
        document = read_json(folder, "zarr.json") or {"zarr_format": 3, "node_type": "group"}
        document.pop("consolidated_metadata", None)
        write_json(folder, "zarr.json", {**document, "attributes": attributes})
        return
    Path(folder, ".zmetadata").unlink(missing_ok=True)
    if read_json(folder, ".zgroup") is None:
        write_json(folder, ".zgroup", {"zarr_format": 2})
    write_json(folder, ".zattrs", attributes)


def forget_group(folder: str) -> None:
    """Remove the documents of the group at `folder`, of either zarr format, but none of its members."""
    for key in ("zarr.json", ".zgroup", ".zattrs", ".zmetadata"):
        Path(folder, key).unlink(missing_ok=True)


def is_consolidated(folder: str) -> bool:
    """Return whether the group at `folder` carries a consolidated copy of its members' metadata."""
    document = read_json(folder, "zarr.json") or {}
    return bool(document.get("consolidated_metadata")) or Path(folder, ".zmetadata").is_file()


def enclosing_groups(folder: str) -> list[str]:
    """Return the zarr groups around `folder`, innermost first, without itself."""
    groups = []
    for parent in Path(folder).parents:
        node = read_node(str(parent))
        if node is None or node.kind != "group":
            break
        groups.append(str(parent))
    return groups


def contents(folder: str) -> list[str] | None:
    """Return the names in `folder` except the private one, or None if it does not exist.

    Raises
    ------
    FileExistsError
        If `folder` is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{folder} is a file; give the path of a new store")
    return sorted(p.name for p in path.iterdir() if p.name != PRIVATE_FOLDER) if path.exists() else None


def is_file(path: str) -> bool:
    """Return whether a plain file lies at `path`."""
    return Path(path).is_file()


def exists(path: str) -> bool:
    """Return whether anything lies at `path`."""
    return Path(path).exists()


def stamp(folder: str) -> int | None:
    """Return when the documents of the array at `folder` were written, in nanoseconds."""
    paths = (Path(folder, key) for key in ("zarr.json", ".zarray"))
    return next((p.stat().st_mtime_ns for p in paths if p.exists()), None)


def same(first: str, second: str) -> bool:
    """Return whether two locations are the same place."""
    return Path(first).resolve() == Path(second).resolve()


def remove_member(folder: str, member: str) -> None:
    """Remove an array or group inside the group at `folder`, with everything in it."""
    target = Path(folder, check_member(member, folder))
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)


def remove_keys(folder: str, keys: Sequence[str]) -> None:
    """Remove single files, such as chunks or shards; absent ones are fine."""
    for key in keys:
        Path(folder, key).unlink(missing_ok=True)


def clean_partial(store: str | os.PathLike[str]) -> int:
    """Remove what writers that were killed left behind (``*.partial``), and return how many files.

    Call it only while nobody writes to `store`.
    """
    n_removed = 0
    for path in Path(location(store)).rglob("*.partial"):
        if path.is_file():
            path.unlink(missing_ok=True)
            n_removed += 1
    return n_removed

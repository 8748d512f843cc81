"""Nodes and keys of a store, in folders, in a zip file or behind a URL: the one place that knows where things lie.

A *node* is a zarr group or array. Its JSON documents are read and written here as they are, so that keys
this package does not know survive; only array data goes through zarr-python. What differs is in
`chunkrestore.ome_zarr.local`, `chunkrestore.ome_zarr.zipped` and `chunkrestore.ome_zarr.remote`, which offer the
same functions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

from chunkrestore.ome_zarr import limits, local, remote, zipped
from chunkrestore.ome_zarr.untrusted import is_unlinked, stays_inside

if TYPE_CHECKING:
    from zarr.abc.store import Store

Json = dict[str, Any]

PRIVATE_FOLDER = ".chunkrestore"
"""Folder inside a store that jobs may own; never read, written or removed here."""


class _Files(Protocol):
    """What `local`, `zipped` and `remote` have in common."""

    def join(self, folder: str, *parts: str) -> str: ...
    def parents(self, path: str) -> list[str]: ...
    def same(self, first: str, second: str) -> bool: ...
    def read(self, path: str) -> bytes | None: ...
    def write(self, path: str, content: bytes) -> None: ...
    def remove(self, paths: Sequence[str]) -> None: ...
    def remove_tree(self, folder: str) -> None: ...
    def names(self, folder: str) -> list[str] | None: ...
    def is_free(self, path: str) -> bool: ...
    def is_file(self, path: str) -> bool: ...
    def exists(self, path: str) -> bool: ...
    def stamp(self, path: str) -> int | str | None: ...
    def free_nbytes(self, path: str) -> int | None: ...
    def clean_partial(self, folder: str) -> int: ...
    def array_store(self, folder: str) -> Store: ...


def _files(path: str) -> _Files:
    if is_url(path):
        return remote
    return zipped if is_zipped(path) else local


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


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a URL rather than a path of the file system."""
    return "://" in os.fspath(path)


def is_zipped(path: str) -> bool:
    """Return whether `path` is that of a zip file, or leads into one."""
    return zipped.split(path) is not None


def location(store: str | os.PathLike[str]) -> str:
    """Return the absolute path of `store`, or its URL without a final slash, as a string.

    Of a zip file that holds one zarr folder, that folder.

    Raises
    ------
    ValueError
        If `store` is a URL that cannot be opened, or that carries a password or a query, or a damaged zip file.
    """
    text = os.fspath(store)
    if is_url(text):
        return remote.location(text)
    path = str(Path(text).expanduser().absolute())
    return zipped.location(path) if is_zipped(path) else path


def writable(store: str) -> str:
    """Return `store` if its kind can be written; nothing is looked up.

    Raises
    ------
    ValueError
        If it is a URL that can only be read, or in a zip file.
    """
    if is_url(store):
        return remote.writable(store)
    return zipped.writable(store) if is_zipped(store) else store


def join(store: str, *parts: str) -> str:
    """Return the path or URL of a node inside `store`."""
    return _files(store).join(store, *parts)


def parent(path: str) -> str:
    """Return the folder around `path`; of a root, the root itself."""
    return next(iter(_files(path).parents(path)), path)


def name_of(path: str) -> str:
    """Return the last component of a path or URL."""
    return PurePosixPath(path).name


def check_member(path: object, where: str) -> str:
    """Return `path`, a member of the group `where`, if it names something inside that group.

    Raises
    ------
    ValueError
        If it is empty, absolute, a URL, longer than file systems allow, or contains ``..``, a backslash or
        characters that cannot be printed.
    """
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    is_plain = isinstance(path, str) and path.isprintable() and "\\" not in path and "://" not in path
    is_local = parts and not PurePosixPath(*parts).is_absolute() and not PureWindowsPath(*parts).drive
    if not (is_plain and is_local and ".." not in parts and max(len(p.encode()) for p in parts) < 256):
        raise ValueError(
            f"{where}: member path {limits.short(path)} leaves its group or is none; it must be relative, in "
            "printable characters, without '..'"
        )
    return str(path)


def check_place(folder: str, member: object, *, own: bool = False) -> str:
    """Return `member` if it lies inside the group at `folder` on disk as well as by its name.

    Parameters
    ----------
    folder
        Path or URL of the group, which may be a link itself.
    member
        Relative path.
    own
        Whether `member` is to be written or removed, so that no link may lie on the way to it.

    Raises
    ------
    ValueError
        If a link leads out of the group, or anywhere with `own`.
    """
    path = check_member(member, folder)
    if not is_url(folder) and not (is_unlinked if own else stays_inside)(folder, path):
        where = "elsewhere, and nothing is written or removed behind a link" if own else "out of its group"
        raise ValueError(f"{join(folder, path)} leads {where}; replace the link by what it stands for")
    return path


def check_removable(member: object, folder: str) -> str:
    """Return `member` of the group at `folder` if it may be removed: it may be a link, but not lie behind one.

    Raises
    ------
    ValueError
        If it leaves the group, or a link lies on the way to it.
    """
    path = check_member(member, folder)
    around = path.rpartition("/")[0]
    if around:
        check_place(folder, around, own=True)
    return path


def read_json(folder: str, key: str) -> Json | None:
    """Return a JSON document, or None if there is none.

    Raises
    ------
    ValueError
        If the file is not a JSON object, or larger or deeper than metadata can be.
    PermissionError, ConnectionError, TimeoutError
        If it cannot be read.
    """
    path = join(folder, key)
    text = _files(folder).read(path)
    if text is None:
        return None
    return limits.parse_document(text, path)


def read_document(folder: str, key: str) -> bytes | None:
    """Return a document of any kind as it is, or None if there is none.

    Raises
    ------
    ValueError
        If it is larger than documents may be.
    PermissionError, ConnectionError, TimeoutError
        If it cannot be read.
    """
    path = join(folder, key)
    content = _files(folder).read(path)
    if content is not None and len(content) > limits.MAX_DOCUMENT_NBYTES:
        raise ValueError(f"{path} is larger than {limits.MAX_DOCUMENT_NBYTES} bytes; it is not read")
    return content


def write_document(folder: str, key: str, content: bytes) -> None:
    """Write a document of any kind; a reader sees the old one or the new one, never a part."""
    _files(folder).write(join(folder, key), content)


def write_json(folder: str, key: str, document: Mapping[str, Any]) -> None:
    """Write a JSON document; a reader sees the old one or the new one, never a part."""
    _files(folder).write(join(folder, key), json.dumps(document, indent=2).encode())


def read_node(folder: str) -> Node | None:
    """Return the zarr group or array at `folder`, or None if there is none.

    Raises
    ------
    PermissionError
        If nothing may be read there. A bucket that must not be listed also answers so for what is absent,
        so a refused document counts as absent as long as another one of the node can be read.
    """
    refused: PermissionError | None = None
    for key, kind in (("zarr.json", ""), (".zarray", "array"), (".zgroup", "group")):
        try:
            document = read_json(folder, key)
        except PermissionError as error:
            refused = error
            continue
        if document is None:
            continue
        if kind:
            return Node(2, kind, read_json(folder, ".zattrs") or {}, document)
        attributes = document.pop("attributes", {})
        if not isinstance(attributes, dict):
            raise ValueError(f"{join(folder, key)}: `attributes` are no object; restore it from a copy")
        return Node(3, str(document.get("node_type")), attributes, document)
    if refused is not None:
        raise refused
    return None


def write_group(folder: str, zarr_format: int, attributes: Mapping[str, Any]) -> None:
    """Create the group at `folder`, or replace the attributes of the existing one, in one atomic step."""
    if zarr_format == 3:
        document = read_json(folder, "zarr.json") or {"zarr_format": 3, "node_type": "group"}
        document.pop("consolidated_metadata", None)
        write_json(folder, "zarr.json", {**document, "attributes": attributes})
        return
    remove_keys(folder, [".zmetadata"])
    if read_json(folder, ".zgroup") is None:
        write_json(folder, ".zgroup", {"zarr_format": 2})
    write_json(folder, ".zattrs", attributes)


def forget_group(folder: str) -> None:
    """Remove the documents of the group at `folder`, of either zarr format, but none of its members."""
    remove_keys(folder, ["zarr.json", ".zgroup", ".zattrs", ".zmetadata"])


def is_consolidated(folder: str) -> bool:
    """Return whether the group at `folder` carries a consolidated copy of its members' metadata."""
    document = read_json(folder, "zarr.json") or {}
    return bool(document.get("consolidated_metadata")) or is_file(join(folder, ".zmetadata"))


def enclosing_groups(folder: str) -> list[str]:
    """Return the zarr groups around `folder`, innermost first, without itself."""
    groups = []
    for around in _files(folder).parents(folder):
        try:
            node = read_node(around)
        except PermissionError:
            if is_url(folder):
                break  # credentials are often good for one prefix of a bucket alone
            raise
        if node is None or node.kind != "group":
            break
        groups.append(around)
    return groups


def contents(folder: str) -> list[str] | None:
    """Return the names in `folder` except the private one, or None if it does not exist.

    Raises
    ------
    FileExistsError
        If `folder` is a file.
    ValueError
        If it is an HTTP(S) URL: what is not to be written needs no listing.
    """
    names = _files(folder).names(folder)
    return names if names is None else [name for name in names if name != PRIVATE_FOLDER]


def is_free(path: str) -> bool:
    """Return whether nothing lies at `path`, or an empty folder.

    Raises
    ------
    ValueError
        If it is an HTTP(S) URL, where nothing can be written.
    """
    return _files(path).is_free(path)


def is_file(path: str) -> bool:
    """Return whether a plain file, or an object of a bucket, lies at `path`."""
    return _files(path).is_file(path)


def exists(path: str) -> bool:
    """Return whether anything lies at `path`."""
    return _files(path).exists(path)


def stamp(folder: str) -> int | str | None:
    """Return what changes whenever the documents of the array at `folder` are written."""
    stamps = (_files(folder).stamp(join(folder, key)) for key in ("zarr.json", ".zarray"))
    return next((s for s in stamps if s is not None), None)


def same(first: str, second: str) -> bool:
    """Return whether two locations are the same place."""
    return is_url(first) == is_url(second) and _files(first).same(first, second)


def free_nbytes(path: str) -> int | None:
    """Return the free bytes of the file system that holds, or will hold, `path`; None for a URL."""
    return _files(path).free_nbytes(path)


def remove_member(folder: str, member: str) -> None:
    """Remove an array or group inside the group at `folder`, with everything in it; of a link, the link alone.

    Raises
    ------
    ValueError
        If a link lies on the way to it.
    """
    _files(folder).remove_tree(join(folder, check_removable(member, folder)))


def remove_keys(folder: str, keys: Sequence[str]) -> None:
    """Remove single files; absent ones are fine."""
    _files(folder).remove([join(folder, key) for key in keys])


def clean_partial(store: str | os.PathLike[str]) -> int:
    """Remove what writers that were killed left behind (``*.partial``), and return how many files.

    Call it only while nobody writes to `store`. Object storage never shows a part of an object.
    """
    path = location(store)
    return _files(path).clean_partial(path)


def array_store(folder: str) -> Store:
    """Return the zarr store whose root is the node at `folder`."""
    return _files(folder).array_store(folder)

"""The members of a zip file: where they lie, and reading a bounded part of one.

A store in a zip file is read by many threads and processes, at places all over it, and may have a million members
of somebody else's making. So the directory is parsed here, once per process, into a few numbers per member (250 bytes
each, 4 seconds for a million): `zipfile` would read a directory of any size, and members through one open file and one
lock. Members that are stored as they are, which is what RFC-9 recommends, are read by ranges.

References
----------
.ZIP File Format Specification 6.3, sections 4.3 to 4.5 (signatures and fields), 4.5.3 (zip64).
OME-NGFF RFC-9, single-file OME-Zarr.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from chunkrestore.ome_zarr.limits import (
    MAX_INFLATED_NBYTES,
    MAX_ZIP_DIRECTORY_NBYTES,
    MAX_ZIP_MEMBERS,
    short,
)
from chunkrestore.ome_zarr.untrusted import read_part

DOCUMENTS = ("zarr.json", ".zgroup", ".zarray")
"""What makes a folder a zarr node."""

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_HEADER = struct.Struct("<4s5H3I2H")

_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x2041  # the member, by a certificate, or the directory
_UTF8 = 0x0800
_LINK = 0o120000
_STEP = 2**18

_NO_PLACE = re.compile(r"(^|/)\.{0,2}(/|$)|\\")
_IN_64 = 2**32 - 1


class Member(NamedTuple):
    """One file in a zip file."""

    header: int
    """Where its own header begins."""
    n_stored: int
    """Bytes in the zip file."""
    n_bytes: int
    """Bytes of its content."""
    crc: int
    """CRC-32 of its content."""
    is_deflated: bool
    """Whether it is compressed by the zip file."""


class Archive:
    """A zip file and its members; nothing is kept open."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.members: dict[str, Member] = {}
        for name, member in _members(path):
            known = self.members.get(name)
            if known is not None and known[1:] != member[1:]:
                raise ValueError(
                    f"zip file {path} holds {short(name)} twice, and not the same; zip its folder again"
                )
            self.members[name] = member
        self._starts: dict[str, int] = {}

    def read(self, name: str, start: int, nbytes: int) -> bytes | None:
        """Return up to `nbytes` of a member, or None if there is none.

        Parameters
        ----------
        name
            Path inside the zip file.
        start
            First byte; a negative number counts from the end, and stops at the beginning.
        nbytes
            A smaller member is read to its end.

        Raises
        ------
        ValueError
            If it is damaged, or expands to more than it says.
        """
        member = self.members.get(name)
        if member is None:
            return None
        first = max(0, start + member.n_bytes) if start < 0 else min(start, member.n_bytes)
        last = min(first + nbytes, member.n_bytes)
        if member.is_deflated:
            part = self._inflated(name, member, last)
            part = part[first:] if first else part
        else:
            part = self._part(self._start(name, member) + first, last - first)
        is_whole = first == 0 and last == member.n_bytes
        if len(part) < last - first or (is_whole and zlib.crc32(part) != member.crc):
            raise self._damage(name, "its checksum or length is wrong")
        return part

    def _start(self, name: str, member: Member) -> int:
        """Return where the content of a member begins."""
        if name not in self._starts:
            header = self._part(member.header, _HEADER.size + 4 * len(name))
            if len(header) < _HEADER.size or header[:4] != b"PK\3\4":
                raise self._damage(name, "it is not where the directory says")
            _, _, flags, *_, n_name, n_extra = _HEADER.unpack_from(header)
            if _text(header[_HEADER.size : _HEADER.size + n_name], flags) != name:
                raise self._damage(name, "another member is where the directory says")
            self._starts[name] = member.header + _HEADER.size + n_name + n_extra
        return self._starts[name]

    def _inflated(self, name: str, member: Member, last: int) -> bytes:
        """Return the content of a compressed member up to byte `last`."""
        if member.n_bytes > MAX_INFLATED_NBYTES:
            raise ValueError(
                f"{name} in zip file {self.path} holds {member.n_bytes} bytes that the zip file compresses, more than "
                f"{MAX_INFLATED_NBYTES}; zip its folder again without compression (zip -0)"
            )
        content = bytearray()
        try:
            for piece in self._pieces(self._start(name, member), member.n_stored):
                content += piece
                if len(content) > min(last, member.n_bytes):
                    break
        except zlib.error as error:
            raise self._damage(name, str(error)) from None
        if last == member.n_bytes < len(content):
            raise self._damage(name, f"it expands to more than the {member.n_bytes} bytes it should have")
        del content[last:]
        return bytes(content)

    def _pieces(self, start: int, n_stored: int) -> Iterator[bytes]:
        """Yield compressed content in pieces of a bounded size."""
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        for position in range(0, n_stored, _STEP):
            rest = self._part(start + position, min(_STEP, n_stored - position))
            while True:
                piece = decompressor.decompress(rest, _STEP)
                yield piece
                rest = decompressor.unconsumed_tail
                if not rest and len(piece) < _STEP:
                    break

    def _part(self, start: int, nbytes: int) -> bytes:
        part = read_part(self.path, start, nbytes)
        if part is None:
            raise FileNotFoundError(f"zip file {self.path} is gone")
        return part

    def _damage(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"{name} in zip file {self.path} cannot be read: {reason}; restore the file from a copy"
        )


def open_archive(path: str) -> Archive | None:
    """Return the zip file at `path`, parsed once per process and state of the file; None if there is no file.

    Raises
    ------
    ValueError
        If it is no zip file, or one that cannot be trusted to be what it seems.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _open(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=4)
def _open(path: str, *_state: int) -> Archive:
    return Archive(path)


def _members(path: str) -> Iterator[tuple[str, Member]]:
    """Yield names and places of the members.

    Raises
    ------
    ValueError
        If one has a name that would leave the folder where it is unpacked, is encrypted, a link, or compressed in
        another way than by deflate; or if the directory is damaged or too large.
    """
    directory, shift = _directory(path)
    position = n_members = 0
    while position + _ENTRY.size <= len(directory):
        fields = _ENTRY.unpack_from(directory, position)
        if fields[0] != b"PK\1\2":
            break
        (
            _,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            n_stored,
            n_bytes,
            n_name,
            n_extra,
            n_comment,
            _,
            _,
            kind,
            header,
        ) = fields
        begin = position + _ENTRY.size
        name = _text(directory[begin : begin + n_name], flags)
        extra = directory[begin + n_name : begin + n_name + n_extra]
        position = begin + n_name + n_extra + n_comment
        n_members += 1
        if n_members > MAX_ZIP_MEMBERS:
            raise ValueError(
                f"zip file {path} has more than {MAX_ZIP_MEMBERS} members; write the image in shards and zip that"
            )
        if _IN_64 in (n_bytes, n_stored, header):
            n_bytes, n_stored, header = _wide(extra, (n_bytes, n_stored, header))
        _check_member(path, name, flags, method, kind >> 16)
        if method == _STORED and n_stored != n_bytes:
            raise _no_zip(path, f"its directory gives {short(name)} two lengths")
        if not name.endswith("/"):
            yield name, Member(header + shift, n_stored, n_bytes, crc, method == _DEFLATED)
    if position != len(directory):
        raise _no_zip(path, "its directory is damaged")


def _text(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & _UTF8 else "cp437", "replace")


def _check_member(path: str, name: str, flags: int, method: int, mode: int) -> None:
    """Raise unless a member is a plain file inside the zip file."""
    if _NO_PLACE.search(name.removesuffix("/")) or not name.isprintable():
        wrong = "has a name that leads out of it, or is none"
    elif flags & _ENCRYPTED:
        wrong = "is encrypted"
    elif method not in (_STORED, _DEFLATED):
        wrong = f"is compressed by method {method} of zip"
    elif mode & 0o170000 == _LINK:
        wrong = "is a link"
    else:
        return
    raise ValueError(
        f"zip file {path} cannot be used: member {short(name)} {wrong}; zip the folder again (zip -0 -r)"
    )


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return sizes and place of a member, from the zip64 field where 32 bits did not suffice."""
    field = b""
    while len(extra) >= 4:
        kind, n = struct.unpack_from("<2H", extra)
        if kind == 1:
            field = extra[4 : 4 + n]
        extra = extra[4 + n :]
    wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
    whole, stored, header = (next(wide, n) if n == _IN_64 else n for n in numbers)
    return whole, stored, header


def _directory(path: str) -> tuple[bytes, int]:
    """Return the central directory, and how much further back members lie than it says."""
    tail = read_part(path, -(_END.size + 2**16 + _LOCATOR_64.size + _END_64.size), 2**17) or b""
    end = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    if end < 0:
        raise _no_zip(path, "it has no directory, as if it had been cut")
    _, disk, _, _, n_total, n_bytes, start, _ = _END.unpack_from(tail, end)
    behind = len(tail) - end
    before = end - _LOCATOR_64.size
    if before >= _END_64.size and tail[before : before + 4] == b"PK\6\7":
        before -= _END_64.size
        signature, _, _, _, disk, _, _, n_total, n_bytes, start = _END_64.unpack_from(tail, before)
        if signature != b"PK\6\6":
            raise _no_zip(path, "its zip64 directory is damaged")
        behind = len(tail) - before
    if disk:
        raise _no_zip(path, "it is one part of several")
    if n_bytes > MAX_ZIP_DIRECTORY_NBYTES or n_total > MAX_ZIP_MEMBERS:
        raise ValueError(
            f"zip file {path} has a directory of {n_bytes} bytes and {n_total} members, where "
            f"{MAX_ZIP_DIRECTORY_NBYTES} and {MAX_ZIP_MEMBERS} are supported; write the image in shards and zip that"
        )
    place = os.stat(path).st_size - behind - n_bytes
    directory = (read_part(path, place, n_bytes) or b"") if place >= 0 else b""
    if len(directory) < n_bytes or place < start:
        raise _no_zip(path, "its directory is damaged")
    return directory, place - start


def _no_zip(path: str, reason: str) -> ValueError:
    return ValueError(f"{path} is no zip file that can be read: {reason}; restore it from a copy")

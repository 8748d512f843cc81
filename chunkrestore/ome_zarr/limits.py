"""What a store may say about itself: checked in plain Python before zarr or dask act on it.

Every limit is far above any image known, and low enough that nothing which is derived from metadata alone
(a grid, an index, a buffer) can exhaust a machine. Lengths are Python integers throughout: those of NumPy
overflow to something that looks harmless.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]

MAX_DOCUMENT_NBYTES = 2**26
"""Of one JSON document. The consolidated metadata of a plate of 384 wells is of the order of 10 MB."""

MAX_DEPTH = 64
"""Objects and lists inside each other in a document. OME-Zarr needs about 10; Python's stack ends at 1000 calls."""

MAX_LEVELS = 64
"""Of a pyramid: halving ends at one voxel before that."""

MAX_NDIM = 5
"""``tczyx``."""

MAX_LENGTH = 2**31
"""Of an axis, a chunk or a shard, in voxels: 215 metres at 100 nm."""

MAX_LENGTHS = {"t": 2**24, "c": 2**16}
"""Where less is plausible; every channel gets a name."""

MAX_VOXELS = 2**53
"""Of an array: counts of voxels stay exact in double precision. The largest images known have 2^51."""

MAX_CHUNK_NBYTES = 2**31
"""Of a decoded chunk, which a worker holds whole. The codecs end at 2 GiB themselves."""

MAX_SHARD_NBYTES = 2**34
"""Of a decoded shard: 2048^3 voxels of 16 bits. Only who reads all of a shard holds it whole."""

MAX_CHUNKS_PER_SHARD = 2**20
"""The index of a shard is held whole, at 16 bytes per chunk."""

MAX_CHUNKS_PER_AXIS = 2**20
"""A lazy array lists the chunks of every axis."""

MAX_FILES = 2**32
"""Chunks or shards of an array: as many as ext4 and NTFS have room for in all."""

MANY_CHUNKS, MIN_CHUNK_VOXELS = 2**16, 2**12
"""An array of more chunks than the first must have chunks of at least the second (16 x 16 x 16 voxels). zarr takes
about 2 kB and 0.15 ms for a chunk however small it is, so a region costs no more than its voxels suggest."""

MAX_ZIP_MEMBERS, MAX_ZIP_DIRECTORY_NBYTES = 2**20, 2**28
"""Of a zip file: its directory is held by every process, at about 250 bytes per member."""

MAX_INFLATED_NBYTES = 2**28
"""Of a member that a zip file compresses: it is read from its beginning, and held up to what is wanted of it."""

COMPRESSORS = ("blosc", "zstd", "lz4", "gzip", "zlib", "bz2")
"""Codecs whose result can be bounded before or while it is made (`chunkrestore.ome_zarr.bounded`)."""

CHECKSUMS = ("crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3")
"""Codecs that append 4 bytes."""

FILTERS = ("shuffle", "delta", "bitround", "quantize", "fixedscaleoffset", "astype")
"""Codecs that make as many numbers out of numbers."""

V3_CODECS = (
    *("bytes", "endian", "transpose", "crc32c", "blosc", "zstd", "gzip"),
    *(f"numcodecs.{name}" for name in (*COMPRESSORS, *CHECKSUMS, *FILTERS)),
)
"""Names in zarr v3."""

_V3_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
_V2_DTYPES = re.compile(rf"[<>|=]?[biuf][1248]|{_V3_DTYPES.pattern}")
_DTYPE_OPTIONS = ("dtype", "astype", "encode_dtype", "decode_dtype")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def short(value: object) -> str:
    """Return `value` for a message, at the length of a line however long it is."""
    return _REPR.repr(value)


def parse_document(text: bytes, where: str) -> Json:
    """Return the JSON object that `text` holds.

    Raises
    ------
    ValueError
        If it holds none, or one that is larger or deeper than metadata can be.
    """
    if len(text) > MAX_DOCUMENT_NBYTES:
        raise ValueError(f"{where} is larger than {MAX_DOCUMENT_NBYTES} bytes; it is no metadata")
    try:
        document = json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise ValueError(
            f"{where} is not valid JSON ({error}); restore it from a copy of the store"
        ) from None
    if not isinstance(document, dict):
        raise ValueError(f"{where} holds no JSON object; restore it from a copy of the store")
    layer: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        layer = [v for c in layer for v in _values(c) if isinstance(v, dict | list)]
    if layer:
        raise _too_deep(where)
    return document


def check_array(document: Json, zarr_format: int, where: str) -> None:
    """Raise unless an array can be read in bounded memory, by codecs that do nothing but decode numbers.

    Parameters
    ----------
    document
        ``zarr.json`` or ``.zarray`` as on disk.
    zarr_format
        2 or 3.
    where
        Path of the array, for messages.

    Raises
    ------
    ValueError
        With the key that is wrong, its value and the limit.
    """
    try:
        _check_array(document, zarr_format)
    except ValueError as error:
        raise ValueError(f"array {where} cannot be opened: {error}") from None


def check_names(document: Json, names: Sequence[str], where: str) -> None:
    """Raise if the array and its group contradict each other in what an axis is called.

    Names that say something else altogether (``dim_0``), or nothing, contradict nobody.

    Parameters
    ----------
    document
        ``zarr.json`` of the array.
    names
        Of the axes in lower case, in the order of the array; none to ask for nothing.
    where
        Path of the array, for messages.

    Raises
    ------
    ValueError
        If an axis has the name of another one, or the letters of ``tczyx`` differ.
    """
    listed = document.get("dimension_names")
    own = [n.lower() if isinstance(n, str) else None for n in listed] if isinstance(listed, list) else []
    names, letters = list(names), {"t", "c", "z", "y", "x"}
    if any(n != name and (n in names or {n, name} <= letters) for n, name in zip(own, names, strict=False)):
        raise ValueError(
            f"array {where} calls its axes {_listed(own)} (`dimension_names`) but its group {_listed(names)}; pass "
            "`axes` in the order that is true"
        )


def check_lengths(shape: Iterable[int], letters: str, where: str) -> None:
    """Raise if an axis is longer than an image can be on an axis of that letter."""
    for letter, n in zip(letters, shape, strict=True):
        if n > MAX_LENGTHS.get(letter, MAX_LENGTH):
            raise ValueError(
                f"array {where} is {n} long on axis {letter!r}, where at most {MAX_LENGTHS[letter]} are "
                "supported; check the order of its axes"
            )


def _check_array(document: Json, zarr_format: int) -> None:
    shape = _lengths(document.get("shape"), "shape", least=0)
    if len(shape) > MAX_NDIM or math.prod(shape) > MAX_VOXELS:
        raise ValueError(
            f"`shape` {list(shape)} is beyond {MAX_NDIM} axes or {MAX_VOXELS} voxels; no image is"
        )
    if zarr_format == 2:
        itemsize = _itemsize(document.get("dtype"), "dtype", _V2_DTYPES)
        unit = chunk = _like(shape, document.get("chunks"), "chunks")
        _check_v2_codecs(document)
    else:
        itemsize = _itemsize(document.get("data_type"), "data_type", _V3_DTYPES)
        unit = _like(shape, _chunk_shape(document), "chunk_shape")
        chunk = _check_v3_codecs(document.get("codecs"), unit)
        if document.get("storage_transformers"):
            raise ValueError("`storage_transformers` are not supported; write the array without")
    if not isinstance(value := document.get("fill_value"), str | int | float | None):
        raise ValueError(f"`fill_value` {short(value)} is no number; restore the metadata from a copy")
    _check_sizes(chunk, unit, itemsize)
    _check_counts(shape, chunk, unit)


def _check_sizes(chunk: tuple[int, ...], unit: tuple[int, ...], itemsize: int) -> None:
    """Raise if a chunk or shard is too large to be held."""
    for what, lengths, limit in (("chunk", chunk, MAX_CHUNK_NBYTES), ("shard", unit, MAX_SHARD_NBYTES)):
        nbytes = math.prod(lengths) * itemsize
        if nbytes > limit:
            raise ValueError(
                f"a {what} of {list(lengths)} voxels takes {nbytes} bytes, more than {limit}; write the array "
                f"in smaller {what}s"
            )


def _check_counts(shape: tuple[int, ...], chunk: tuple[int, ...], unit: tuple[int, ...]) -> None:
    """Raise if there are too many chunks or shards."""
    per_axis = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    n_chunks, chunk_voxels = math.prod(per_axis), math.prod(chunk)
    counts = (
        ("chunks per shard", math.prod(unit) // chunk_voxels, MAX_CHUNKS_PER_SHARD),
        ("chunks on one axis", max(per_axis, default=0), MAX_CHUNKS_PER_AXIS),
        ("files", math.prod(-(-n // u) for n, u in zip(shape, unit, strict=True)), MAX_FILES),
        (f"chunks of {chunk_voxels} voxels", n_chunks * (chunk_voxels < MIN_CHUNK_VOXELS), MANY_CHUNKS),
    )
    for what, n, limit in counts:
        if n > limit:
            raise ValueError(
                f"`shape` {list(shape)} in chunks of {list(chunk)} and files of {list(unit)} makes {n} {what}, more "
                f"than {limit}; write the array in larger chunks or shards"
            )


def _lengths(value: object, key: str, *, least: int = 1) -> tuple[int, ...]:
    """Return a list of integers; a boolean is none."""
    if not isinstance(value, list) or not all(type(n) is int and least <= n <= MAX_LENGTH for n in value):
        raise ValueError(f"`{key}` {short(value)} must be a list of integers from {least} to {MAX_LENGTH}")
    return tuple(value)


def _like(shape: tuple[int, ...], value: object, key: str) -> tuple[int, ...]:
    lengths = _lengths(value, key)
    if len(lengths) != len(shape):
        raise ValueError(f"`{key}` {list(lengths)} has {len(lengths)} lengths, but `shape` {list(shape)}")
    return lengths


def _itemsize(value: object, key: str, known: re.Pattern[str] = _V2_DTYPES) -> int:
    """Return the bytes of one number."""
    if not isinstance(value, str) or not known.fullmatch(value):
        raise ValueError(
            f"`{key}` {short(value)} is not supported, only integers and floats of up to 64 bits"
        )
    digits = int(value.lstrip("<>|=abfilnotu") or 8)
    return digits if len(value.lstrip("<>|=")) == 2 else digits // 8


def _chunk_shape(document: Json) -> object:
    grid = document.get("chunk_grid")
    settings = grid.get("configuration") if isinstance(grid, dict) else None
    if not isinstance(grid, dict) or grid.get("name") != "regular" or not isinstance(settings, dict):
        raise ValueError(f"`chunk_grid` {short(grid)} is not supported, only 'regular'")
    return settings.get("chunk_shape")


def _check_v2_codecs(document: Json) -> None:
    filters, compressor = document.get("filters"), document.get("compressor")
    for codec in _list(filters, "filters") if filters is not None else ():
        _check_codec(codec, "id", codec, "filters", (*FILTERS, *CHECKSUMS))
    if compressor is not None:
        _check_codec(compressor, "id", compressor, "compressor", COMPRESSORS)


def _check_v3_codecs(value: object, unit: tuple[int, ...], key: str = "codecs") -> tuple[int, ...]:
    """Return the shape that is decoded at once."""
    codecs = _list(value, key)
    if key == "codecs" and len(codecs) == 1 and _name(codecs[0], "name") == "sharding_indexed":
        return _check_sharding(_settings(codecs[0]), unit)
    for codec in codecs:
        _check_codec(codec, "name", _settings(codec), key, V3_CODECS)
    names = [_name(codec, "name").removeprefix("numcodecs.") for codec in codecs]
    if sum(name in COMPRESSORS for name in names) > 1:
        raise ValueError(
            f"`{key}` compress more than once ({', '.join(names)}); write the array with one codec"
        )
    return unit


def _check_sharding(settings: Json, unit: tuple[int, ...]) -> tuple[int, ...]:
    chunk = _like(unit, settings.get("chunk_shape"), "sharding_indexed.chunk_shape")
    for codec in _list(settings.get("index_codecs", []), "index_codecs"):
        _check_codec(codec, "name", _settings(codec), "index_codecs", ("bytes", "crc32c"))
    return _check_v3_codecs(settings.get("codecs"), chunk, "sharding_indexed.codecs")


def _check_codec(codec: object, name_key: str, settings: object, key: str, known: Iterable[str]) -> None:
    """Raise unless a codec does nothing but decode numbers: no objects, no code, no types of its own."""
    name = _name(codec, name_key)
    if name not in known:
        raise ValueError(
            f"`{key}` name {short(name)}, which is not supported, only {', '.join(known)}; convert the array with "
            "the tool that wrote it"
        )
    for option in _DTYPE_OPTIONS:
        if isinstance(settings, dict) and settings.get(option) is not None:
            _itemsize(settings[option], f"{key}.{name}.{option}")


def _name(codec: object, key: str) -> str:
    return str(codec.get(key) if isinstance(codec, dict) else codec)


def _settings(codec: object) -> Json:
    settings = codec.get("configuration") if isinstance(codec, dict) else None
    return settings if isinstance(settings, dict) else {}


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"`{key}` {short(value)} is not a list; restore the metadata from a copy")
    return value


def _listed(names: Sequence[object]) -> str:
    """Return letters as one word, and names as a list."""
    return short("".join(map(str, names)) if all(len(str(n)) == 1 for n in names) else list(names))


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _too_deep(where: str) -> ValueError:
    return ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels; it is no metadata")

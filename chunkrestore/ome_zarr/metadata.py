"""OME-Zarr attributes as plain dictionaries: what they mean, and how they change.

Attributes are edited as raw dictionaries, never dumped from a model, so every key that this package does
not own survives. Versions 0.4 and 0.5 hold the same objects; they differ in where the version is written
and in the ``ome`` key around them. Here *ome* is always the dictionary with ``multiscales`` in it. Other versions
are read (`chunkrestore.ome_zarr.older`, `chunkrestore.ome_zarr.newer`) as what 0.4 or 0.5 would have in their place.

A point with index ``i`` of level ``k`` lies at ``scale * i + translation``, where the transformations of
the level apply first and those of the multiscale second.

References
----------
OME-Zarr specification, versions 0.4 and 0.5, https://ngff.openmicroscopy.org.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from chunkrestore.ome_zarr.limits import short
from chunkrestore.ome_zarr.store import Json, Node

Vector = tuple[float, ...]

VERSIONS = {"0.4": 2, "0.5": 3}
"""OME-Zarr versions that are written, and the zarr format of each."""

OLDER = ("0.1", "0.2", "0.3")
"""Versions that are only read, in zarr v2."""

NEWER = ("0.6", "0.6rc0", "0.6.dev4", "0.6.dev3", "0.9.dev1")
"""Versions with coordinate systems (RFC-5), which are only read, in zarr v3."""

READABLE = {**dict.fromkeys(OLDER, 2), **VERSIONS, **dict.fromkeys(NEWER, 3)}
"""OME-Zarr versions that can be opened, and the zarr format of each."""

COORDINATES_KEY = "rfc5"
"""Of a multiscale that was read from 0.6: its coordinate systems, and the transformations between them."""

AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
"""Axis letters in their order, with the specification's axis types."""

_SAYING = {"depth": "z", "height": "y", "width": "x"}

OWN_KEY = "chunkrestore"
"""Top-level attribute that holds this package's provenance, or the state of an unfinished store."""

OME_KEYS = (
    "multiscales", "omero", "image-label", "labels", "plate", "well", "bioformats2raw.layout", "series",
)  # fmt: skip
"""Keys of the specification: at the top level of 0.4 attributes, inside ``ome`` in 0.5."""

# Length units of the specification (UDUNITS-2 names) and common abbreviations, in micrometres.
_MICROMETRES = {
    "yoctometer": 1e-18, "zeptometer": 1e-15, "attometer": 1e-12, "femtometer": 1e-9, "picometer": 1e-6,
    "angstrom": 1e-4, "nanometer": 1e-3, "nm": 1e-3, "micrometer": 1.0, "micron": 1.0, "um": 1.0,
    "\N{MICRO SIGN}m": 1.0, "\N{GREEK SMALL LETTER MU}m": 1.0, "millimeter": 1e3, "mm": 1e3,
    "centimeter": 1e4, "cm": 1e4, "inch": 25_400.0, "decimeter": 1e5, "foot": 304_800.0, "yard": 914_400.0,
    "meter": 1e6, "m": 1e6, "hectometer": 1e8, "kilometer": 1e9, "mile": 1_609_344_000.0,
    "megameter": 1e12, "gigameter": 1e15, "terameter": 1e18, "petameter": 1e21, "exameter": 1e24,
    "zettameter": 1e27, "yottameter": 1e30, "parsec": 3.0856775814913673e22,
}  # fmt: skip


def in_micrometres(unit: object, where: str) -> float:
    """Return the length of one `unit` in micrometres; no unit counts as a micrometre.

    Raises
    ------
    ValueError
        If it is not a unit of length.
    """
    if unit is None:
        return 1.0
    factor = _MICROMETRES.get(str(unit)) or _MICROMETRES.get(str(unit).lower().replace("metre", "meter"))
    if factor is None:
        raise ValueError(
            f"{where}: unit {unit!r} of a spatial axis is no length; pass `voxel_size` in micrometres"
        )
    return factor


def split(node: Node, where: str) -> tuple[str, Json, Json]:
    """Return the version, the OME dictionary and the remaining attributes of a group.

    Raises
    ------
    ValueError
        If the version is not supported.
    """
    attributes = copy.deepcopy(node.attributes)
    if node.zarr_format == 3:
        ome = attributes.pop("ome", {})
        version = ome.pop("version", None) if isinstance(ome, dict) else None
        if version is None and isinstance(ome, dict) and set(ome) == {"labels"}:
            version = "0.5"  # ome-zarr-py lists labels without one
    else:
        ome = {key: attributes.pop(key) for key in OME_KEYS if key in attributes}
        parts = as_dicts(
            [*as_dicts(ome.get("multiscales")), *(ome.get(k) for k in ("plate", "well", "image-label"))]
        )
        version = next((p["version"] for p in parts if "version" in p), _unstated_version(ome))
    if not isinstance(ome, dict):
        raise ValueError(f"{where}: attribute `ome` is not an object; the store is damaged or no OME-Zarr")
    if ome and READABLE.get(str(version)) != node.zarr_format:
        raise ValueError(
            f"{where}: OME-Zarr `version` {short(version)} (zarr v{node.zarr_format}) is not supported, only 0.1 to "
            "0.4 (zarr v2), 0.5 and 0.6 (zarr v3); convert the store with the tool that wrote it"
        )
    return str(version), ome, attributes


def _unstated_version(ome: Json) -> str:
    """Return the version of attributes in zarr v2 that name none, which all of 0.1 to 0.4 allow, by their shape."""
    multiscale = next(iter(as_dicts(ome.get("multiscales"))), None)
    if multiscale is None or any(
        "coordinateTransformations" in d for d in as_dicts(multiscale.get("datasets"))
    ):
        return "0.4"
    axes = multiscale.get("axes")
    if axes is None:
        return "0.2"
    return "0.3" if isinstance(axes, list) and all(isinstance(a, str) for a in axes) else "0.4"


def unite(ome: Json, others: Json, version: str) -> Json:
    """Return the group attributes of `version` that hold `ome` and `others`; inverse of `split`.

    A version that is only read comes as 0.4 or 0.5, whichever has its zarr format.
    """
    ome = copy.deepcopy(ome)
    version = version if version in VERSIONS else "0.5" if READABLE[version] == 3 else "0.4"
    own_versions = [
        part
        for part in (*as_dicts(ome.get("multiscales")), ome.get("omero"), ome.get("image-label"))
        if isinstance(part, dict)
    ]
    for part in own_versions:
        part.pop("version", None)
    if version == "0.5":
        return {**others, "ome": {"version": version, **ome}}
    for part in own_versions:
        part["version"] = version
    return {**others, **ome}


def as_dicts(value: object) -> list[Json]:
    """Return the objects in a list, and none if `value` is no list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def axis_letters(multiscale: Json, where: str) -> str:
    """Return one letter of ``tczyx`` per array axis, in the order of the array.

    The specification gives meaning to the types of axes, not to their names or the order of those in space. An axis
    of a custom or no type stands in place of the channels, unless it is called ``t``. An axis in space keeps the
    letter that its name tells (``Z``, ``depth``); the letters that are left go to the others in the order z, y, x, as
    the specification recommends to order them.

    Raises
    ------
    ValueError
        If they are not at most one in time, one of channels, and two or three in space.
    """
    axes = multiscale["axes"]
    told = [_letter_told(a.get("name")) for a in axes]
    letters = [_letter_outside_space(a.get("type"), letter) for a, letter in zip(axes, told, strict=True)]
    space = [i for i, a in enumerate(axes) if a.get("type") == "space"]
    free = list("zyx"[-len(space) :])
    for i in sorted(space, key=lambda i: told[i] not in free):
        letters[i] = told[i] if told[i] in free else next(iter(free), "?")
        free = [letter for letter in free if letter != letters[i]]
    named = ", ".join(f"{short(a.get('name'))} ({short(a.get('type'))})" for a in axes)
    return check_letters("".join(letters), f"{where}: axes {named}")


def _letter_outside_space(kind: object, told: str) -> str:
    if kind == "array":  # of 0.6: an axis without meaning, but for its name
        return told or "?"
    by_type = {"time": "t", "channel": "c"}
    return by_type.get(str(kind), "t" if told == "t" else "c")


def _letter_told(name: object) -> str:
    """Return the letter of ``tczyx`` that the name of an axis tells, empty if it tells none."""
    lower = str(name).lower()
    return lower if lower in AXIS_TYPES else _SAYING.get(lower, "")


def check_letters(letters: str, where: str, *, ndim: int | None = None) -> str:
    """Return `letters` if each is one of ``tczyx``, at most once, with both ``y`` and ``x``.

    Raises
    ------
    ValueError
        Otherwise, or if there are not `ndim` of them.
    """
    if set(letters) - set(AXIS_TYPES) or len(set(letters)) < len(letters) or not {"y", "x"} <= set(letters):
        raise ValueError(
            f"{where} are not time, channel, z, y and x; needed are y and x, with z, t and c if present. "
            "Pass `axes` with one letter of 'tczyx' per array axis (--axes)"
        )
    if ndim is not None and len(letters) != ndim:
        raise ValueError(f"{where} name {len(letters)} axes but the array has {ndim}")
    return letters


def transform(multiscale: Json, level: int, *, whole: bool = True) -> tuple[list[float], list[float]]:
    """Return scale and translation of a level per array axis, in the units of the axes.

    With `whole`, the transformations of the multiscale are applied after those of the level.
    """
    holders = [multiscale["datasets"][level], *([multiscale] if whole else [])]
    scale, translation = [1.0] * len(multiscale["axes"]), [0.0] * len(multiscale["axes"])
    for step in (s for h in holders for s in h.get("coordinateTransformations") or ()):
        if step["type"] == "scale":
            scale = [a * b for a, b in zip(scale, step["scale"], strict=True)]
            translation = [a * b for a, b in zip(translation, step["scale"], strict=True)]
        elif step["type"] == "translation":
            translation = [a + b for a, b in zip(translation, step["translation"], strict=True)]
    return scale, translation


def geometry(multiscale: Json, letters: str, level: int, where: str) -> tuple[Vector, Vector]:
    """Return voxel size and translation of a level in micrometres, per spatial axis (z, y, x).

    Raises
    ------
    ValueError
        If a unit is no length.
    """
    positions = [letters.index(axis) for axis in spatial(letters)]
    factors = [in_micrometres(multiscale["axes"][i].get("unit"), where) for i in positions]
    scale, translation = (
        tuple(vector[i] * f for i, f in zip(positions, factors, strict=True))
        for vector in transform(multiscale, level)
    )
    return scale, translation


def dataset(
    path: str, scale: Sequence[float], translation: Sequence[float], base: Json | None = None
) -> Json:
    """Return the entry of one level; unknown keys of `base` are kept."""
    steps: list[Json] = [{"type": "scale", "scale": [float(s) for s in scale]}]
    if any(translation):
        steps.append({"type": "translation", "translation": [float(v) for v in translation]})
    return {**(base or {}), "path": path, "coordinateTransformations": steps}


def new_multiscale(letters: str, voxel_size: Sequence[float] | None, name: str, path: str = "0") -> Json:
    """Return a multiscale of one level for axes `letters`; spatial units only if a voxel size is known."""
    axes: list[Json] = [{"name": letter, "type": AXIS_TYPES[letter]} for letter in letters]
    if voxel_size is not None:
        for axis in axes:
            if axis["type"] == "space":
                axis["unit"] = "micrometer"
    scale = [1.0] * (len(letters) - len(spatial(letters))) + list(voxel_size or [1.0] * len(spatial(letters)))
    return {"name": name, "axes": axes, "datasets": [dataset(path, scale, [0.0] * len(letters))]}


def spatial(letters: str) -> str:
    """Return the spatial axes among `letters`, as ``zyx`` or ``yx`` whatever their order."""
    return "".join(letter for letter in "zyx" if letter in letters)


def canonical_order(letters: str) -> tuple[int, ...]:
    """Return the positions in `letters` of its axes in the order ``tczyx``."""
    return tuple(letters.index(letter) for letter in AXIS_TYPES if letter in letters)


def take_axes(multiscale: Json, indices: Sequence[int]) -> Json:
    """Return the multiscale with only the array axes `indices`, in that order."""
    result = copy.deepcopy(multiscale)
    result["axes"] = [result["axes"][i] for i in indices]
    for holder in (result, *result["datasets"]):
        for step in holder.get("coordinateTransformations") or ():
            if isinstance(step.get(step["type"]), list):
                step[step["type"]] = [step[step["type"]][i] for i in indices]
    return result


def with_voxel_size(multiscale: Json, letters: str, voxel_size: Sequence[float]) -> Json:
    """Return the multiscale with level 0 at `voxel_size` micrometres and other levels in proportion."""
    result = copy.deepcopy(multiscale)
    factors = [1.0] * len(letters)
    scale, _ = transform(multiscale, 0)
    for letter, length in zip(spatial(letters), voxel_size, strict=True):
        i = letters.index(letter)
        factors[i] = length / scale[i]
        result["axes"][i]["unit"] = "micrometer"
    result.pop("coordinateTransformations", None)
    result.pop(COORDINATES_KEY, None)
    for k, entry in enumerate(multiscale["datasets"]):
        scale, translation = (
            [v * f for v, f in zip(vector, factors, strict=True)] for vector in transform(multiscale, k)
        )
        result["datasets"][k] = dataset(entry["path"], scale, translation, entry)
    return result


def moved(multiscale: Json, origin: Sequence[int]) -> Json:
    """Return the multiscale of a region that begins at index `origin` (array axes) of its only level."""
    result = copy.deepcopy(multiscale)
    scale, translation = transform(multiscale, 0, whole=False)
    translation = [t + s * o for t, s, o in zip(translation, scale, origin, strict=True)]
    base = result["datasets"][0]
    result["datasets"] = [dataset(base["path"], scale, translation, base)]
    return result

"""OME-Zarr attributes as plain dictionaries: what they mean, and how they change.

Attributes are edited as raw dictionaries, never dumped from a model, so every key that this package does
not own survives. Versions 0.4 and 0.5 hold the same objects; they differ in where the version is written
and in the ``ome`` key around them. Here *ome* is always the dictionary with ``multiscales`` in it.

A point with index ``i`` of level ``k`` lies at ``scale * i + translation``, where the transformations of
the level apply first and those of the multiscale second.

References
----------
OME-Zarr specification, versions 0.4 and 0.5, https://ngff.openmicroscopy.org.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

from chunkrestore.ome_zarr.limits import MAX_LEVELS, short
from chunkrestore.ome_zarr.store import Json, Node, check_member

Vector = tuple[float, ...]

VERSIONS = {"0.4": 2, "0.5": 3}
"""Supported OME-Zarr versions and the zarr format of each."""

AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
"""Axis letters in their order, with the specification's axis types."""

OWN_KEY = "chunkrestore"
"""Top-level attribute that holds this package's provenance, or the state of an unfinished store."""

OME_KEYS = (
    "multiscales", "omero", "image-label", "labels", "plate", "well", "bioformats2raw.layout", "series",
)  # fmt: skip
"""Keys of the specification: at the top level of 0.4 attributes, inside ``ome`` in 0.5."""

# Of scales and translations in any unit: two of them and a unit multiply to a number, never to 0 or infinity.
_LONGEST = 1e100

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
    else:
        ome = {key: attributes.pop(key) for key in OME_KEYS if key in attributes}
        parts = as_dicts(
            [*as_dicts(ome.get("multiscales")), *(ome.get(k) for k in ("plate", "well", "image-label"))]
        )
        version = next((p["version"] for p in parts if "version" in p), "0.4")
    if not isinstance(ome, dict):
        raise ValueError(f"{where}: attribute `ome` is not an object; the store is damaged or no OME-Zarr")
    if ome and VERSIONS.get(str(version)) != node.zarr_format:
        known = " and ".join(f"{v} (zarr v{f})" for v, f in VERSIONS.items())
        raise ValueError(
            f"{where}: OME-Zarr version {version} (zarr v{node.zarr_format}) is not supported, only {known}; "
            "convert the store with the tool that wrote it"
        )
    return str(version), ome, attributes


def unite(ome: Json, others: Json, version: str) -> Json:
    """Return the group attributes of `version` that hold `ome` and `others`; inverse of `split`."""
    ome = copy.deepcopy(ome)
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


def validate(ome: Json, version: str, where: str) -> Json:
    """Return the first multiscale of `ome` if it conforms to the specification.

    Raises
    ------
    ValueError
        With the first key that does not conform.
    """
    multiscales = ome.get("multiscales")
    if not isinstance(multiscales, list) or not multiscales or not isinstance(multiscales[0], dict):
        raise ValueError(f"{where}: `multiscales` is empty or no list of objects; the store is damaged")
    multiscale: Json = multiscales[0]
    if len(as_dicts(multiscale.get("datasets"))) > MAX_LEVELS:
        raise ValueError(
            f"{where}: `multiscales[0].datasets` lists more than {MAX_LEVELS} levels; no pyramid has"
        )
    _check_lengths(multiscale, where)
    _check_model(multiscale, version, where)
    for dataset in multiscale["datasets"]:
        check_member(dataset["path"], where)
    return multiscale


def _check_lengths(multiscale: Json, where: str) -> None:
    """Check what models report in a roundabout way or not at all: vectors fit the axes and are finite."""
    axes = multiscale.get("axes")
    if not isinstance(axes, list):
        return  # the model names the key
    owners = [(f"level {d.get('path')!r}", d) for d in as_dicts(multiscale.get("datasets"))]
    for owner, holder in [*owners, ("the multiscale", multiscale)]:
        for transform in as_dicts(holder.get("coordinateTransformations")):
            kind = transform.get("type")
            if kind not in ("scale", "translation"):
                continue
            vector = transform.get(kind)
            if vector is None and "path" in transform:
                raise ValueError(f"{where}: {owner} stores its {kind} in a file, which is not supported")
            if not isinstance(vector, list) or len(vector) != len(axes):
                n = len(vector) if isinstance(vector, list) else "no"
                raise ValueError(f"{where}: {kind} of {owner} has {n} numbers but there are {len(axes)} axes")
            least = 1 / _LONGEST if kind == "scale" else -_LONGEST
            if not all(type(v) in (int, float) and least <= v <= _LONGEST for v in vector):
                raise ValueError(
                    f"{where}: {kind} {short(vector)} of {owner} must hold finite numbers, a scale above 0, none "
                    f"beyond {_LONGEST:g}"
                )


def _check_model(multiscale: Json, version: str, where: str) -> None:
    from pydantic import ValidationError

    if version == "0.4":
        from ome_zarr_models.v04.multiscales import Multiscale
    else:
        from ome_zarr_models.v05.multiscales import Multiscale
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # order of scale and translation: `transform` composes any order
            Multiscale.model_validate(multiscale)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # pydantic names the models of a union between the keys; keys of the specification begin in lower case
        steps = [p for p in first["loc"] if isinstance(p, int) or (p[:1].islower() and "[" not in p)]
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in steps)
        message = " ".join(str(first["msg"]).split()).removeprefix("Value error, ")
        raise ValueError(
            f"{where}: `multiscales[0]{key}` does not conform to OME-Zarr {version}: {message}"
        ) from None


def axis_letters(multiscale: Json, where: str) -> str:
    """Return one letter of ``tczyx`` per array axis, in the order of the array.

    Raises
    ------
    ValueError
        If an axis is none of these, or ``y`` or ``x`` is missing.
    """
    by_type = {"time": "t", "channel": "c"}
    letters = [by_type.get(a.get("type"), str(a.get("name")).lower()) for a in multiscale["axes"]]
    named = ", ".join(f"{a.get('name')!r} ({a.get('type')})" for a in multiscale["axes"])
    known = "".join(n if len(n) == 1 else "?" for n in letters)
    return check_letters(known, f"{where}: axes {named}")


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
            "Pass `axes` with one letter of 'tczyx' per array axis"
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

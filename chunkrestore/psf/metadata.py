"""What an image's metadata says about the microscope."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_MICROMETRES = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "pm": 1e-6,
    "Å": 1e-4,
}
IMMERSION_INDEX = {"oil": 1.515, "water": 1.333, "waterdipping": 1.333, "air": 1.0, "glycerol": 1.47}
"""Index of OME's immersion media, where the file gives none (23 degrees Celsius, visible light)."""
_WAVELENGTH_KEYS = {
    "emission_um": ("emission_wavelength", "emissionWavelength", "emission_wavelength_nm"),
    "excitation_um": ("excitation_wavelength", "excitationWavelength", "excitation_wavelength_nm"),
}


def acquisition(
    source: str | os.PathLike[str] | Mapping[str, Any], *, channel: int = 0, image: int = 0
) -> dict[str, Any]:
    """Read what is known about the microscope from an image's metadata.

    Parameters
    ----------
    source
        OME-XML (a string that begins with ``<``), the path of an OME-TIFF or of an OME-XML file, or the
        attributes of an OME-Zarr group, whose ``omero`` channels some writers add wavelengths to.
    channel
        Which channel's wavelengths and pinhole to take.
    image
        Which image of an OME-XML with several.

    Returns
    -------
    dict
        Those of ``numerical_aperture``, ``immersion_index`` (stated, or that of the immersion medium's name),
        ``emission_um``, ``excitation_um``, ``working_distance_um``, ``pinhole_um`` and ``voxel_size`` (z, y, x in
        micrometres, only if all three are stated) that are present.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the XML cannot be read, the file is no TIFF and no XML, or there is no such channel or image.
    """
    if isinstance(source, Mapping):
        return _from_attributes(source, channel)
    text = (
        source
        if isinstance(source, str) and source.lstrip("\ufeff \t\r\n").startswith("<")
        else _text(Path(source))
    )
    if text is None:
        return {}
    try:
        root = ElementTree.fromstring(text.lstrip("\ufeff \t\r\n").encode())
    except ElementTree.ParseError as error:
        raise ValueError(f"the OME-XML metadata cannot be read: {error}") from error
    return _from_xml(root, channel, image)


def _text(file: Path) -> str | None:
    """Return the OME-XML of a file, or None of a TIFF that has none."""
    if not file.is_file():
        raise FileNotFoundError(f'"{file}" does not exist or is no file')
    if file.suffix.lower() in (".xml", ".ome"):
        return file.read_text(encoding="utf-8")
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('TIFF files need tifffile; run: pip install "chunkrestore"') from error
    try:
        with tifffile.TiffFile(file) as tiff:
            text = tiff.ome_metadata
    except tifffile.TiffFileError as error:
        raise ValueError(f'"{file}" is neither a TIFF nor an OME-XML file: {error}') from error
    return None if text is None else str(text)


def _from_attributes(attributes: Mapping[str, Any], channel: int) -> dict[str, Any]:
    inner = attributes.get("ome", attributes)
    channels = inner.get("omero", {}).get("channels", [])
    if not channels:
        return {}
    chosen = _pick(channels, channel, "channel")
    found = {}
    for name, keys in _WAVELENGTH_KEYS.items():
        value = next((chosen[key] for key in keys if key in chosen), None)
        if isinstance(value, int | float) and value > 0:
            # No key carries a unit: tens and above are nanometres, no light is that long in micrometres.
            found[name] = value / 1000 if value >= 10 else float(value)
    return found


def _from_xml(root: ElementTree.Element, channel: int, image: int) -> dict[str, Any]:
    images = list(_children(root, "Image"))
    if not images:
        raise ValueError("the OME-XML metadata holds no image")
    chosen = _pick(images, image, "image")
    pixels = next(_children(chosen, "Pixels"), None)
    found = _from_objective(root, chosen)
    if pixels is None:
        return found
    channels = list(_children(pixels, "Channel"))
    if channels:
        light = _pick(channels, channel, "channel")
        found["emission_um"] = _length(light, "EmissionWavelength", "nm")
        found["excitation_um"] = _length(light, "ExcitationWavelength", "nm")
        found["pinhole_um"] = _length(light, "PinholeSize", "µm")
    size = tuple(_length(pixels, f"PhysicalSize{axis}", "µm") for axis in "ZYX")
    found["voxel_size"] = size if None not in size else None
    return {name: value for name, value in found.items() if value is not None}


def _from_objective(root: ElementTree.Element, image: ElementTree.Element) -> dict[str, Any]:
    """Return what the image's objective says; an only objective needs no reference."""
    objectives = [o for i in _children(root, "Instrument") for o in _children(i, "Objective")]
    settings = next(_children(image, "ObjectiveSettings"), None)
    wanted = None if settings is None else settings.get("ID")
    named = [o for o in objectives if o.get("ID") == wanted]
    objective = named[0] if named else objectives[0] if len(objectives) == 1 else None
    index = None if settings is None else _number(settings, "RefractiveIndex")
    if objective is None:
        return {"immersion_index": index} if index is not None else {}
    if index is None:
        index = IMMERSION_INDEX.get(objective.get("Immersion", "").lower())
    found = {
        "numerical_aperture": _number(objective, "LensNA"),
        "immersion_index": index,
        "working_distance_um": _length(objective, "WorkingDistance", "µm"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _children(element: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Return children by name, whatever the version of the schema."""
    return (child for child in element if child.tag.rpartition("}")[2] == name)


def _number(element: ElementTree.Element, name: str) -> float | None:
    """Return a positive number; writers put 0 where they know nothing."""
    try:
        value = float(element.get(name, ""))
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _length(element: ElementTree.Element, name: str, unit: str) -> float | None:
    """Return micrometres, or None without a number or with a unit that is no length."""
    value, factor = _number(element, name), _MICROMETRES.get(element.get(f"{name}Unit", unit))
    return None if value is None or factor is None else value * factor


def _pick(items: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(items):
        raise ValueError(f"`{what}` {index} does not exist; the metadata describes {len(items)} (from 0)")
    return items[index]

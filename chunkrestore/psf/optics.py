"""What a microscope must be described by before its point spread function can be computed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

_NANOMETRES = 10.0
"""No optical wavelength is 10 um: such a number is meant in nanometres."""


@dataclass(frozen=True, kw_only=True)
class Optics:
    """A microscope with a circular aperture, and where in the sample its focus lies.

    Lengths are micrometres. The defaults are those of an objective used as it was designed, in a sample of
    the immersion medium's index, which means no spherical aberration.

    Raises
    ------
    ValueError
        If a value is not positive and finite, the aperture reaches the refractive index of the immersion or
        of the coverslip, a wavelength seems to be given in nanometres, the excitation is of longer wavelength
        than the emission, or the pinhole is given twice or without a magnification.
    """

    numerical_aperture: float
    """Of the detection objective; below the index of the immersion medium."""
    emission_um: float
    """Wavelength of the detected light in vacuum."""
    immersion_index: float
    """Refractive index of the immersion medium as used (air 1.0, water 1.333, glycerol 1.47, oil 1.515)."""
    sample_index: float = None  # type: ignore[assignment]
    """Refractive index around the object; the immersion medium's by default."""
    depth_um: float = 0.0
    """Depth of the object below the coverslip; matters if the sample's index differs from the immersion."""
    immersion_design_index: float | None = None
    """Index that the objective was designed for; as used by default."""
    coverslip_um: float = 170.0
    """Thickness of the coverslip; 0 without one."""
    coverslip_index: float = 1.515
    """Refractive index of the coverslip."""
    coverslip_design_um: float = None  # type: ignore[assignment]
    """Thickness that the objective was designed (or its collar set) for; `coverslip_um` by default."""
    coverslip_design_index: float = None  # type: ignore[assignment]
    """Index that the objective was designed for; `coverslip_index` by default."""
    working_distance_um: float = 150.0
    """Immersion layer of the design; matters only if `immersion_design_index` differs."""
    excitation_um: float | None = None
    """Wavelength of the excitation in vacuum (confocal, light sheet)."""
    pinhole_airy: float | None = None
    """Diameter of the confocal pinhole in Airy units, 1.22 `emission_um` / `numerical_aperture`."""
    pinhole_um: float | None = None
    """Diameter of the confocal pinhole itself; needs `magnification`."""
    magnification: float | None = None
    """From the sample to the pinhole."""

    def __post_init__(self) -> None:
        for name, source in _FALLBACKS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, source))
        for field in fields(self):
            _check_number(field.name, getattr(self, field.name))
        self._check_wavelengths()
        self._check_aperture()
        if self.pinhole_um is not None and self.pinhole_airy is not None:
            raise ValueError(
                f"`pinhole_um` ({self.pinhole_um}) and `pinhole_airy` ({self.pinhole_airy}) are both given; "
                "keep the one that you know"
            )
        if self.pinhole_um is not None and self.magnification is None:
            raise ValueError(
                f"`pinhole_um` ({self.pinhole_um}) needs `magnification`, from the sample to the pinhole; "
                "give it, or the pinhole as `pinhole_airy`"
            )

    def _check_wavelengths(self) -> None:
        for name in ("emission_um", "excitation_um"):
            value = getattr(self, name)
            if value is not None and value >= _NANOMETRES:
                raise ValueError(
                    f"`{name}` {value:g} looks like nanometres; give micrometres, here {value / 1000:g}"
                )
        if self.excitation_um is not None and self.excitation_um > self.emission_um:
            raise ValueError(
                f"`excitation_um` ({self.excitation_um:g}) must not be above `emission_um` "
                f"({self.emission_um:g}); exchange them (multi-photon excitation is not modelled)"
            )

    def _check_aperture(self) -> None:
        layers = {"immersion_index": self.immersion_index}
        for name in ("immersion_design_index", "coverslip_index", "coverslip_design_index"):
            thickness = self.coverslip_um if name == "coverslip_index" else self.coverslip_design_um
            value = getattr(self, name)
            if value is not None and (thickness > 0 or not name.startswith("coverslip")):
                layers[name] = value
        for name, index in layers.items():
            if self.numerical_aperture >= index:
                raise ValueError(
                    f"`numerical_aperture` ({self.numerical_aperture:g}) must be below `{name}` ({index:g}), "
                    "which no ray can exceed; check both (air 1.0, water 1.333, glycerol 1.47, oil 1.515)"
                )

    def __str__(self) -> str:
        """Return the values that matter, one aspect per line."""
        light = f"emission {self.emission_um:g} um"
        if self.excitation_um is not None:
            light += f", excitation {self.excitation_um:g} um"
        lines = [
            f"optics     NA {self.numerical_aperture:g}, {light}",
            f"media      immersion {self.immersion_index:g}, sample {self.sample_index:g}, "
            f"depth {self.depth_um:g} um",
        ]
        if (self.coverslip_um, self.coverslip_index) != (
            self.coverslip_design_um,
            self.coverslip_design_index,
        ):
            lines.append(
                f"coverslip  {self.coverslip_um:g} um of index {self.coverslip_index:g}, designed for "
                f"{self.coverslip_design_um:g} um of {self.coverslip_design_index:g}"
            )
        if self.pinhole_airy is not None or self.pinhole_um is not None:
            diameter = 2 * self.pinhole_radius_um
            lines.append(
                f"pinhole    {diameter / self.airy_unit_um:.3g} Airy units, {diameter:.3g} um in the sample"
            )
        return "\n".join(lines)

    @property
    def airy_unit_um(self) -> float:
        """Diameter of the first dark ring of the emission in the sample."""
        return 1.22 * self.emission_um / self.numerical_aperture

    @property
    def pinhole_radius_um(self) -> float:
        """Radius of the pinhole as it appears in the sample.

        Raises
        ------
        ValueError
            If no pinhole is given.
        """
        if self.pinhole_airy is not None:
            return self.pinhole_airy * self.airy_unit_um / 2
        if self.pinhole_um is not None and self.magnification is not None:
            return self.pinhole_um / self.magnification / 2
        raise ValueError(
            "a confocal point spread function needs the pinhole; give `pinhole_airy` (its diameter in Airy "
            "units, often 1), or `pinhole_um` with `magnification`"
        )

    def require_excitation(self, purpose: str) -> float:
        """Return `excitation_um`, or raise `ValueError` naming what needs it."""
        if self.excitation_um is None:
            raise ValueError(
                f"{purpose} needs `excitation_um`, the wavelength of the excitation, such as 0.488"
            )
        return self.excitation_um

    @classmethod
    def from_metadata(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], *, channel: int = 0, **given: Any
    ) -> Optics:
        """Read a microscope from an image's metadata.

        Parameters
        ----------
        source
            As in `chunkrestore.psf.acquisition`: an OME-XML string, the path of an OME-TIFF or an OME-XML
            file, or the attributes of an OME-Zarr group as a mapping.
        channel
            Which channel's wavelengths to take.
        **given
            Fields that are known otherwise; they take the place of what the metadata says. None counts as not
            given.

        Raises
        ------
        ValueError
            If the aperture, the emission or the immersion index is neither in the metadata nor given (all that
            miss are named), or a value is not possible.
        """
        from chunkrestore.psf.metadata import acquisition

        return cls.from_known(acquisition(source, channel=channel), **given)

    @classmethod
    def from_known(cls, known: Mapping[str, Any], **given: Any) -> Optics:
        """Build a microscope from what is `known` of it, say from metadata, and what is `given` besides.

        What is given takes the place of what is known; None counts as not given. A pinhole in micrometres is
        left out of what is known without the magnification from sample to pinhole, which no metadata states.

        Raises
        ------
        ValueError
            As in `from_metadata`.
        """
        names = {field.name for field in fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        values = {name: value for name, value in known.items() if name in names}
        if {"pinhole_um", "pinhole_airy"} & given.keys() or "magnification" not in given:
            values.pop("pinhole_um", None)
        values |= given
        missing = [f"`{name}`" for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} neither given nor stated by the "
                "image's metadata; give what is missing"
            )
        return cls(**values)


_REQUIRED = ("numerical_aperture", "emission_um", "immersion_index")
_FALLBACKS = {
    "sample_index": "immersion_index",
    "coverslip_design_um": "coverslip_um",
    "coverslip_design_index": "coverslip_index",
}
_MAY_BE_ZERO = ("depth_um", "coverslip_um", "coverslip_design_um")


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")
    value = float(value)
    if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise ValueError(
            f"`{name}` must be {'at least' if name in _MAY_BE_ZERO else 'above'} 0, got {value:g}"
        )
    if name.endswith("_index") and not 1 <= value <= 4:
        raise ValueError(f"`{name}` must be a refractive index, from 1 (air) to 4, got {value:g}")

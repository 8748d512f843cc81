"""Point spread functions: from a formula, from a file, checked and prepared."""

from chunkrestore.psf.average import BeadPsf, average_beads
from chunkrestore.psf.bead_report import draw_bead_report
from chunkrestore.psf.beads import Beads, find_beads
from chunkrestore.psf.check import Finding, diagnose
from chunkrestore.psf.distill import distill_psf
from chunkrestore.psf.files import read_psf, read_psf_voxel_size, write_psf
from chunkrestore.psf.light_sheet import LightSheet, light_sheet, light_sheet_field
from chunkrestore.psf.metadata import acquisition
from chunkrestore.psf.model import gaussian
from chunkrestore.psf.optics import Optics
from chunkrestore.psf.prepare import check_psf, effective_sigma, energy_radius, prepare
from chunkrestore.psf.sampling import centre, resample
from chunkrestore.psf.shape import (
    crop_to_energy,
    keep_largest_component,
    pad_or_crop,
    prepare_psf,
    subtract_background,
)
from chunkrestore.psf.theory import confocal, widefield

__all__ = [
    "BeadPsf",
    "Beads",
    "Finding",
    "LightSheet",
    "Optics",
    "acquisition",
    "average_beads",
    "centre",
    "check_psf",
    "confocal",
    "crop_to_energy",
    "diagnose",
    "distill_psf",
    "draw_bead_report",
    "effective_sigma",
    "energy_radius",
    "find_beads",
    "gaussian",
    "keep_largest_component",
    "light_sheet",
    "light_sheet_field",
    "pad_or_crop",
    "prepare",
    "prepare_psf",
    "read_psf",
    "read_psf_voxel_size",
    "resample",
    "subtract_background",
    "widefield",
    "write_psf",
]

"""Point spread functions: from a formula, from a file, checked and prepared."""

from chunkrestore.psf.model import gaussian
from chunkrestore.psf.prepare import check_psf, effective_sigma, energy_radius, prepare, read_psf

__all__ = ["check_psf", "effective_sigma", "energy_radius", "gaussian", "prepare", "read_psf"]

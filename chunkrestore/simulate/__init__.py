"""Simulated volumes with known truth: what is there (phantoms), and what a microscope records of it."""

from chunkrestore.simulate.attenuation import Attenuation, Ellipsoid
from chunkrestore.simulate.bodies import Embryo, Tissue
from chunkrestore.simulate.filaments import Filaments
from chunkrestore.simulate.from_labels import LabelledPhantom
from chunkrestore.simulate.microscope import Camera, Microscope, blur, forward, light_sheet_psf
from chunkrestore.simulate.nuclei import Nuclei
from chunkrestore.simulate.phantoms import VOXEL_SIZE, SimulatedVolume, embryo, from_description
from chunkrestore.simulate.protocol import Phantom
from chunkrestore.simulate.shapes import Beads, Spheres

__all__ = [
    "VOXEL_SIZE",
    "Attenuation",
    "Beads",
    "Camera",
    "Ellipsoid",
    "Embryo",
    "Filaments",
    "LabelledPhantom",
    "Microscope",
    "Nuclei",
    "Phantom",
    "SimulatedVolume",
    "Spheres",
    "Tissue",
    "blur",
    "embryo",
    "forward",
    "from_description",
    "light_sheet_psf",
]

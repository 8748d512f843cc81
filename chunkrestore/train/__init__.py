"""Training of CARE and StarDist networks, into ordinary CSBDeep and StarDist model folders."""

from chunkrestore.train.augment import augment_care, augment_stardist
from chunkrestore.train.axial import axial_patches
from chunkrestore.train.card import model_card, read_card
from chunkrestore.train.care import CareNetwork, train_care
from chunkrestore.train.complete import complete
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.fit import History, Moment, Trained
from chunkrestore.train.pairs import Pair
from chunkrestore.train.patches import Patches, normalize, patches_of
from chunkrestore.train.receptive_field import ReceptiveField, receptive_field
from chunkrestore.train.report import training_report
from chunkrestore.train.schedule import Schedule
from chunkrestore.train.stardist import StarDistNetwork, train_stardist
from chunkrestore.train.strategies import (
    Strategy,
    deconvolved,
    noise_only,
    simulated,
    two_exposures,
    two_noisy,
)
from chunkrestore.train.targets import measured_anisotropy
from chunkrestore.train.thresholds import optimize_thresholds
from chunkrestore.train.validation import Validation, validate

__all__ = [
    "CareNetwork",
    "History",
    "Moment",
    "Pair",
    "Patches",
    "ReceptiveField",
    "Schedule",
    "StarDistNetwork",
    "Strategy",
    "Trained",
    "Validation",
    "augment_care",
    "augment_stardist",
    "axial_patches",
    "complete",
    "deconvolved",
    "draw_patches",
    "measured_anisotropy",
    "model_card",
    "noise_only",
    "normalize",
    "optimize_thresholds",
    "patches_of",
    "read_card",
    "receptive_field",
    "simulated",
    "train_care",
    "train_stardist",
    "training_report",
    "two_exposures",
    "two_noisy",
    "validate",
]

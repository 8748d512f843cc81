"""The steps of a pipeline file: keys of each, and the operator that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chunkrestore.operators.base import Operator
from chunkrestore.operators.storing import AsType

Three = Annotated[tuple[int, ...], Field(min_length=2, max_length=3)]


class Section(BaseModel):
    """A section of the file in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _DeconvolutionStep(Section):
    """Deconvolve; keys that are not given take the method's default."""

    operator: str
    psf: Path
    background: float = 0.0
    depth: int | Three | None = None
    tolerance: float = 1e-3

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; paths are relative to `folder`, `voxel_size` is that of the image if known."""
        parameters = self.model_dump(exclude_unset=True, exclude={"operator", "psf"})
        return deconvolution_of(self.operator, folder / self.psf, voxel_size, parameters)


class _IterativeStep(_DeconvolutionStep):
    """Deconvolve by iterations."""

    iterations: int = 20
    saturation: float | None = None
    missing: float | None = None
    stop: Literal["i-divergence", "split-data"] | None = None
    gain: float = 1.0


class RichardsonLucyStep(_IterativeStep):
    """Richardson-Lucy."""

    operator: Literal["richardson-lucy"]
    acceleration: Literal["heavy-ball"] | None = "heavy-ball"
    total_variation: float = 0.0
    voxel_size: tuple[float, ...] | None = None


class UnmatchedStep(_IterativeStep):
    """Richardson-Lucy with another back projector than the transposed blur."""

    operator: Literal["wiener-butterworth", "masked-wiener"]
    regularization: float | None = None


class GradientConsensusStep(_IterativeStep):
    """Richardson-Lucy that two halves of the photons agree on."""

    operator: Literal["gradient-consensus"]
    acceleration: Literal["heavy-ball"] | None = "heavy-ball"
    offset: float | None = None
    seed: int = 0


class InverseStep(_DeconvolutionStep):
    """An inverse filter in one pass."""

    operator: Literal["wiener", "regularized-inverse"]
    regularization: float | None = None
    voxel_size: tuple[float, ...] | None = None
    non_negative: bool = False


class AsTypeStep(Section):
    """Choose the dtype that is stored."""

    operator: Literal["as-type"]
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    intensity_range: tuple[float, float] | None = None

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator."""
        return AsType(self.dtype, self.intensity_range)


class CareStep(Section):
    """Restore with a network."""

    operator: Literal["care"]
    model: str
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (2.0, 99.8)
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    output: Literal["mean", "scale"] = "mean"

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; paths are relative to `folder`, `voxel_size` is that of the image if known."""
        from chunkrestore.operators.care import Care

        return Care(_model(folder, self.model), **self.model_dump(exclude={"operator", "model"}))


class AxialCareStep(CareStep):
    """Make planes between those of a volume with a network."""

    operator: Literal["isotropic-care", "upsampling-care"]  # type: ignore[assignment]
    factor: float | Literal["auto"]

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; paths are relative to `folder`, and the factor ``auto`` follows from `voxel_size`."""
        from chunkrestore.operators.axial import care_of
        from chunkrestore.operators.sampling import factor_of

        parameters = self.model_dump(exclude={"operator", "model", "factor"})
        factor = factor_of(voxel_size) if self.factor == "auto" else self.factor
        kind = "isotropic" if self.operator == "isotropic-care" else "upsample"
        return care_of(_model(folder, self.model), **{kind: factor}, **parameters)


class StarDistStep(Section):
    """Segment with a network."""

    operator: Literal["stardist"]
    model: str
    prob_thresh: float | None = None
    nms_thresh: float | None = None
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    scale: float | tuple[float, ...] | None = None
    skip_below: float | None = None
    suppression: Literal["exact", "fast"] = "exact"
    class_names: tuple[str, ...] | None = None
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; paths are relative to `folder`."""
        from chunkrestore.operators.stardist import StarDist

        parameters = self.model_dump(exclude={"operator", "model"})
        return StarDist(_model(folder, self.model), **parameters)


class SemanticStep(Section):
    """Tell the class of every voxel with a network."""

    operator: Literal["semantic"]
    model: str
    by: Literal["objects", "voxels"] | None = None
    class_names: tuple[str, ...] | None = None
    threshold: float | None = None
    depth: int | Three | None = None
    align: int | Three | None = None
    prob_thresh: float | None = None
    nms_thresh: float | None = None
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] = (1.0, 99.8)
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; paths are relative to `folder`."""
        from chunkrestore.operators.semantic import classifier

        parameters = self.model_dump(exclude={"operator", "model"}, exclude_none=True)
        return classifier(_model(folder, self.model), **parameters)


class _LengthsStep(Section):
    """A filter or method whose lengths are in voxels, or in micrometres."""

    micrometres: bool = False

    def _parameters(self, voxel_size: tuple[float, ...] | None) -> dict[str, Any]:
        """Return the keys, with the image's voxel size if lengths are in micrometres."""
        if self.micrometres and voxel_size is None:
            raise ValueError("`micrometres` needs an image that tells its voxel size; give lengths in voxels")
        sampling = {"voxel_size": voxel_size} if self.micrometres else {}
        return self.model_dump(exclude={"operator", "micrometres"}) | sampling


class GaussianStep(_LengthsStep):
    """Smooth."""

    operator: Literal["gaussian"]
    sigma: float | tuple[float, ...]

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; `voxel_size` is that of the image if known."""
        from chunkrestore.operators.smoothing import Gaussian

        return Gaussian(**self._parameters(voxel_size))


class DifferenceOfGaussiansStep(_LengthsStep):
    """Remove background and noise."""

    operator: Literal["difference-of-gaussians"]
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; `voxel_size` is that of the image if known."""
        from chunkrestore.operators.smoothing import DifferenceOfGaussians

        return DifferenceOfGaussians(**self._parameters(voxel_size))


class WindowStep(Section):
    """Smooth or remove background by ranks."""

    operator: Literal["median", "top-hat"]
    window: int | Three

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator."""
        from chunkrestore.operators.smoothing import Median, TopHat

        return (Median if self.operator == "median" else TopHat)(self.window)


class LocalSection(Section):
    """A threshold of each voxel's surroundings."""

    method: Literal["gaussian", "mean", "niblack", "sauvola"] = "gaussian"
    window: int | Three = 31
    factor: float = 1.0
    offset: float = 0.0
    k: float = 0.2
    dynamic_range: float | None = None


class ThresholdStep(Section):
    """Segment by a threshold."""

    operator: Literal["threshold"]
    value: float | None = None
    connectivity: Literal[1, 2, 3] = 1
    percentile: float | None = None
    local: LocalSection | None = None

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator."""
        from chunkrestore.operators.threshold import Threshold

        return Threshold(**_with_local(self.model_dump(exclude={"operator"})))


class WatershedStep(_LengthsStep):
    """Segment by a threshold, and split what touches."""

    operator: Literal["watershed"]
    value: float | None = None
    percentile: float | None = None
    local: LocalSection | None = None
    min_distance: float = 4.0
    max_distance: float | None = None
    landscape: Literal["distance", "intensity"] = "distance"
    smoothing: float | None = None

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator; `voxel_size` is that of the image if known."""
        from chunkrestore.operators.watershed import Watershed

        return Watershed(**_with_local(self._parameters(voxel_size)))


class LabellerStep(Section):
    """Segment with any function."""

    operator: Literal["labeller"]
    function: str
    depth: int | Three = 0
    by: Literal["iou", "centroid", "touching"] = "iou"
    threshold: float = 0.5
    connectivity: Literal[1, 2, 3] = 1
    normalization: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    n_channels: int = 1
    voxel_nbytes: int = 64

    def build(self, folder: Path, voxel_size: tuple[float, ...] | None) -> Operator:
        """Return the operator."""
        from chunkrestore.operators.labeller import Labeller

        return Labeller(**self.model_dump(exclude={"operator"}))


Step = Annotated[
    RichardsonLucyStep
    | UnmatchedStep
    | GradientConsensusStep
    | InverseStep
    | CareStep
    | AxialCareStep
    | AsTypeStep
    | StarDistStep
    | SemanticStep
    | GaussianStep
    | DifferenceOfGaussiansStep
    | WindowStep
    | ThresholdStep
    | WatershedStep
    | LabellerStep,
    Field(discriminator="operator"),
]


def deconvolution_of(
    method: str, psf: str | Path, voxel_size: tuple[float, ...] | None, parameters: Mapping[str, Any]
) -> Operator:
    """Return the operator of a method for an image of `voxel_size`, with the point spread function of a file.

    The file's own voxel size is held against the image's, and derivatives are scaled by it.
    """
    from chunkrestore.operators.methods import deconvolution
    from chunkrestore.psf.fields import read_psf_or_field

    scales = parameters.get("total_variation") or method == "regularized-inverse"
    sampling = {"voxel_size": voxel_size} if scales else {}
    return deconvolution(method, read_psf_or_field(psf, voxel_size), **{**sampling, **parameters})


def _with_local(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with the local threshold that they describe, if any."""
    from chunkrestore.operators.threshold import LocalThreshold

    local = parameters["local"]
    return parameters | {"local": None if local is None else LocalThreshold(**local)}


def _model(folder: Path, model: str) -> str:
    """Return a model's folder beside the file, or the name of a shipped model as it is."""
    from chunkrestore.models import SHIPPED

    return model if model in SHIPPED else str(folder / model)

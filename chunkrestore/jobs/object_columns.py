"""What the table of a label image's objects tells, column by column.

Of all objects:

=============================================  =======  ====================================================
column                                         type     what it is
=============================================  =======  ====================================================
``t``, ``c``                                   int32    index on the label image's axes, 0 where it has none
``label``                                      int64    id in the label image; from 1 in every ``t`` and ``c``
``n_voxels``                                   int64    voxels (pixels) that show the object
``volume_um3``, 2-D ``area_um2``               float64  the same in micrometres
``centroid_z``, ``_y``, ``_x``                 float64  mean index of these voxels
``centroid_z_um`` ...                          float64  the same in micrometres
``bbox_z_start``, ``bbox_z_stop`` ...          int64    box around them, half-open as slices are
``touches_border``                             bool     whether one of them lies on the volume's border
``probability``                                float32  of predicted objects: the network's
``point_z`` ...                                int64    where the object was predicted from; float64 if the
                                                        network saw the image at another scale
``class_id``, ``class_probability_0`` ...      int32,   of models with classes: the most probable one;
                                               float32  0 is background
``distances``                                  float32  if shapes are kept: list of one distance per ray
=============================================  =======  ====================================================

Of labels that were measured (`chunkrestore.jobs.measure`), behind ``touches_border``; ``NAME`` stands for a channel:

=============================================  =======  ====================================================
column                                         type     what it is
=============================================  =======  ====================================================
``equivalent_diameter_um``                     float64  of the ball (2-D: disk) of the same volume
``axis_length_1_um``, ``_2_um``, ``_3_um``     float64  full axes of the ellipsoid (2-D: ellipse) with the same
                                                        second moments, longest first; 0 where an object is flat
``axis_1_z``, ``axis_1_y``, ``axis_1_x`` ...   float64  unit vector along each of them, in micrometres; its
                                                        largest component is above 0
``elongation``                                 float64  ``axis_length_1 / axis_length_2``
``flatness``                                   float64  3-D: ``axis_length_2 / axis_length_3``
``eccentricity``                               float64  2-D: ``sqrt(1 - (axis_length_2 / axis_length_1)**2)``
``NAME_mean``, ``NAME_std``                    float64  of the intensities of its voxels; ``std`` divides by n
``NAME_min``, ``NAME_max``                     image's  least and largest intensity, in the image's type
``NAME_sum``                                   int64,   all intensities together; float64 of float images
                                               float64
``NAME_weighted_centroid_z`` ...               float64  mean index, weighted by intensity; NaN if their sum is 0
``NAME_weighted_centroid_z_um`` ...            float64  the same in micrometres
=============================================  =======  ====================================================

A voxel's index is its centre, and OME-Zarr places index ``i`` at ``scale * i + translation``, so with the voxel
size as scale::

    centroid    = sum of indices / n_voxels
    centroid_um = voxel_size * centroid + translation

Columns without a unit are in voxels of the label image; an image without a voxel size has none in micrometres: its
diameters and axes are in voxels, and called ``equivalent_diameter``, ``axis_length_1``. ``elongation`` and ``flatness``
are infinite where only their denominator is 0, and NaN for a single voxel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from chunkrestore.kernels.object_measures import principal_axes
from chunkrestore.kernels.star_convex import Rays

Plane: TypeAlias = tuple[int, int]
"""Time point and channel."""
Part: TypeAlias = Mapping[str, np.ndarray]
"""Some objects of one plane (see `ObjectColumns.arrays`)."""

FORMAT = 1
"""Version of the columns and of their description."""


@dataclass(frozen=True)
class Channel:
    """Intensities that a table tells of."""

    name: str
    """What the names of their columns begin with."""
    dtype: np.dtype[Any]
    """Of the image."""


@dataclass(frozen=True, eq=False)
class ObjectColumns:
    """What a table tells of every object.

    Raises
    ------
    ValueError
        If lengths do not fit together, or shapes are wanted of objects that were not predicted.
    """

    shape: tuple[int, ...]
    """Of the label image's spatial axes."""
    voxel_size: tuple[float, ...] | None = None
    """Micrometres per spatial axis; None if unknown."""
    translation: tuple[float, ...] | None = None
    """Micrometres from the origin to the centre of the first voxel; None for 0."""
    predicted: bool = False
    """Whether objects have a probability and a point that they were predicted from."""
    n_classes: int = 0
    """Classes that the model tells apart, without background."""
    rays: Rays | None = None
    """Rays of the shapes, as the network knows them; None if shapes are not kept."""
    lattice: tuple[float, ...] | None = None
    """Voxels of the label image per voxel of the lattice that points and distances count in: 1 / ``scale`` of
    StarDist. None for 1."""
    measured: bool = False
    """Whether the labels were measured: objects have principal axes, and ids may leave gaps."""
    channels: tuple[Channel, ...] = ()
    """Intensities of measured objects."""

    def __post_init__(self) -> None:
        ndim = len(self.shape)
        if ndim not in (2, 3):
            raise ValueError(f"`shape` {self.shape} must have 2 (y, x) or 3 (z, y, x) lengths")
        for name in ("voxel_size", "translation", "lattice"):
            vector = getattr(self, name)
            if vector is not None and len(vector) != ndim:
                raise ValueError(f"`{name}` {vector} must have one number per axis of `shape` {self.shape}")
        if self.rays is not None and self.rays.vertices.shape[1] != ndim:
            raise ValueError(
                f"`rays` have {self.rays.vertices.shape[1]} axes, `shape` {self.shape} has {ndim}"
            )
        if not self.predicted and (self.n_classes or self.rays is not None):
            raise ValueError("`n_classes` and `rays` belong to predicted objects; set `predicted`")
        names = [channel.name for channel in self.channels]
        if len(set(names)) < len(names):
            raise ValueError(
                f"`channels` {names} must have different names: their columns are called by them"
            )

    @property
    def axes(self) -> str:
        """``zyx`` or ``yx``."""
        return "zyx"[-len(self.shape) :]

    def described(self) -> dict[str, Any]:
        """Return what the columns mean, as JSON-compatible values."""
        content: dict[str, Any] = {"format": FORMAT, "axes": self.axes, "shape": [int(n) for n in self.shape]}
        if self.voxel_size is not None:
            content |= {
                "voxel_size": [float(v) for v in self.voxel_size],
                "translation": [float(v) for v in self.translation or [0] * len(self.shape)],
                "unit": "micrometer",
            }
        if self.rays is not None:
            # Numbers survive: JSON has the shortest decimals that stand for a float64.
            content["rays"] = {
                "vertices": self.rays.vertices.tolist(),
                "dtype": str(self.rays.vertices.dtype),
                "faces": self.rays.faces.tolist(),
            }
        if self.lattice is not None:
            content["lattice"] = [float(v) for v in self.lattice]
        return content

    def empty(self) -> dict[str, np.ndarray]:
        """Return a part without objects, which has all arrays that a part must have.

        Returns
        -------
        dict
            ``ids`` and ``volume`` int64 (n,), ``sum``, ``first`` and ``last`` int64 (n, ndim): label, number, sum
            of indices and bounding box (last voxel inclusive) of the voxels that show an object. Of predicted
            objects ``prob`` float32 (n,) and ``points`` int64 (n, ndim). With classes ``class_prob`` float32
            (n, n_classes + 1), with rays ``dist`` float32 (n, n_rays). Of measured objects ``covariance`` float64
            (n, ndim * (ndim + 1) / 2), and of channel k what `merge_intensities` tells, as ``mean-k`` and so on.
        """
        ndim = len(self.shape)
        part: dict[str, np.ndarray] = {name: np.empty(0, np.int64) for name in ("ids", "volume")}
        part |= {name: np.empty((0, ndim), np.int64) for name in ("sum", "first", "last")}
        if self.predicted:
            part |= {"prob": np.empty(0, np.float32), "points": np.empty((0, ndim), np.int64)}
        if self.n_classes:
            part["class_prob"] = np.empty((0, self.n_classes + 1), np.float32)
        if self.rays is not None:
            part["dist"] = np.empty((0, len(self.rays)), np.float32)
        if self.measured:
            part["covariance"] = np.empty((0, ndim * (ndim + 1) // 2))
        for k, channel in enumerate(self.channels):
            part |= {f"{name}-{k}": np.empty(0) for name in ("mean", "std")}
            part |= {f"{name}-{k}": np.empty(0, channel.dtype) for name in ("min", "max")}
            part[f"sum-{k}"] = np.empty(0, np.float64 if channel.dtype.kind == "f" else np.int64)
            part[f"weighted_centroid-{k}"] = np.empty((0, ndim))
        return part

    def arrays(self, plane: Plane, part: Part) -> dict[str, np.ndarray]:
        """Return the columns of some objects.

        Parameters
        ----------
        plane
            Where they lie.
        part
            Arrays as those of `empty`, or of a type that fits into theirs; others are ignored.

        Raises
        ------
        ValueError
            If an array is missing, of another shape or type, or an object has no voxels.
        """
        part = self._checked(part)
        n, volume = len(part["ids"]), part["volume"]
        columns: dict[str, np.ndarray] = {
            "t": np.full(n, plane[0], np.int32),
            "c": np.full(n, plane[1], np.int32),
        }
        columns |= {"label": part["ids"], "n_voxels": volume}
        centroid = part["sum"] / volume[:, np.newaxis]
        if self.voxel_size is not None:
            name = "volume_um3" if len(self.shape) == 3 else "area_um2"
            columns[name] = volume * float(np.prod(self.voxel_size))
        columns |= self._places("centroid", centroid)
        for k, axis in enumerate(self.axes):
            columns[f"bbox_{axis}_start"] = part["first"][:, k]
            columns[f"bbox_{axis}_stop"] = part["last"][:, k] + 1
        on_border = (part["first"] == 0) | (part["last"] == np.subtract(self.shape, 1))
        columns["touches_border"] = on_border.any(axis=-1)
        if self.measured:
            columns |= self._form(part)
        for k, channel in enumerate(self.channels):
            for name in ("mean", "std", "min", "max", "sum"):
                columns[f"{channel.name}_{name}"] = part[f"{name}-{k}"]
            columns |= self._places(f"{channel.name}_weighted_centroid", part[f"weighted_centroid-{k}"])
        return columns | self._predictions(part)

    def _places(self, name: str, centroid: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns of a mean index per object."""
        columns = {f"{name}_{axis}": centroid[:, k] for k, axis in enumerate(self.axes)}
        if self.voxel_size is not None:
            placed = centroid * self.voxel_size + (self.translation or 0.0)
            columns |= {f"{name}_{axis}_um": placed[:, k] for k, axis in enumerate(self.axes)}
        return columns

    def _form(self, part: Part) -> dict[str, np.ndarray]:
        """Return diameters, axes and ratios of measured objects."""
        ndim = len(self.shape)
        unit = "" if self.voxel_size is None else "_um"
        size = self.voxel_size or (1.0,) * ndim
        lengths, directions = principal_axes(part["covariance"], size)
        content = part["volume"] * float(np.prod(size))
        diameter = np.cbrt(6 / np.pi * content) if ndim == 3 else np.sqrt(4 / np.pi * content)
        columns = {f"equivalent_diameter{unit}": diameter}
        columns |= {f"axis_length_{k + 1}{unit}": lengths[:, k] for k in range(ndim)}
        for k in range(ndim):
            columns |= {f"axis_{k + 1}_{axis}": directions[:, k, j] for j, axis in enumerate(self.axes)}
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = lengths[:, :-1] / lengths[:, 1:]
        columns["elongation"] = ratios[:, 0]
        if ndim == 3:
            return columns | {"flatness": ratios[:, 1]}
        longest = np.where(lengths[:, 0] > 0, lengths[:, 0], 1.0)
        # A single pixel is as round as can be.
        eccentricity = np.where(lengths[:, 0] > 0, np.sqrt(1 - (lengths[:, 1] / longest) ** 2), 0.0)
        return columns | {"eccentricity": eccentricity}

    def _predictions(self, part: Part) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {}
        if self.predicted:
            columns["probability"] = part["prob"]
            points = part["points"] if self.lattice is None else part["points"] * self.lattice
            columns |= {f"point_{axis}": points[:, k] for k, axis in enumerate(self.axes)}
        if self.n_classes:
            columns["class_id"] = part["class_prob"].argmax(axis=-1).astype(np.int32)
            columns |= {f"class_probability_{k}": of_one for k, of_one in enumerate(part["class_prob"].T)}
        if self.rays is not None:
            columns["distances"] = part["dist"]
        return columns

    def _checked(self, part: Part) -> dict[str, np.ndarray]:
        checked = {}
        for name, like in self.empty().items():
            if name not in part:
                raise ValueError(f"`parts` lack {name!r}, which the table's columns are made of")
            array, shape = np.asarray(part[name]), (len(part["ids"]), *like.shape[1:])
            if array.shape != shape or not np.can_cast(array.dtype, like.dtype):
                raise ValueError(
                    f"`parts` have {name!r} of {array.dtype} {array.shape}; needed is {like.dtype} {shape}"
                )
            checked[name] = array.astype(like.dtype, copy=False)
        hidden = checked["ids"][checked["volume"] < 1]
        if len(hidden):
            raise ValueError(f"`parts` have object {hidden[0]} without voxels, which no label shows")
        return checked

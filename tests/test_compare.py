"""Scores of stores, and the comparison of methods: on stored volumes, against scikit-image and StarDist."""

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from chunkrestore.cli import main
from chunkrestore.comparison import compare
from chunkrestore.jobs.runner import BlockError, Runner
from chunkrestore.jobs.score import described, score
from chunkrestore.metrics import score_image, score_labels
from chunkrestore.ome_zarr import open_image, write_image, write_labels
from chunkrestore.psf import write_psf
from chunkrestore.simulate import embryo

SHAPE = (24, 48, 56)
SERIAL = {"cluster": "serial", "quiet": True}


@pytest.fixture(scope="module")
def volume():
    return embryo(SHAPE, seed=3)


@pytest.fixture(scope="module")
def scene(volume, tmp_path_factory):
    """An image with true and moved labels, its truth, and its point spread function."""
    folder = tmp_path_factory.mktemp("scene")
    known = {"axes": "zyx", "voxel_size": volume.voxel_size}
    image = write_image(volume.image, folder / "image.ome.zarr", chunks=(16, 16, 16), **known)
    write_image(volume.reference, folder / "truth.ome.zarr", **known)
    write_labels(volume.labels, image.path, name="truth", like=image)
    write_labels(np.roll(volume.labels, 1, 2), image.path, name="moved", like=image)
    write_psf(folder / "psf.tif", volume.psf, volume.voxel_size)
    return folder


def arguments(scene):
    image = open_image(scene / "image.ome.zarr")
    return {
        "truth": scene / "truth.ome.zarr",
        "image": image,
        "true_labels": image.label("truth"),
        "labels": image.label("moved"),
        "background": 108,
        "truth_background": 108,
    }


@pytest.mark.parametrize("block_shape", [(16, 16, 16), (7, 100, 31), None])
def test_scores_of_stores_are_those_of_arrays(scene, volume, tmp_path, block_shape):
    [found] = score(**arguments(scene), block_shape=block_shape, work_folder=tmp_path, **SERIAL)
    known = {"voxel_size": volume.voxel_size, "background": 108, "truth_background": 108}
    expected = score_image(volume.reference, volume.image, **known)
    assert repr(found.image) == repr(expected)
    assert found.labels == score_labels(volume.labels, np.roll(volume.labels, 1, 2))
    ids = np.unique(volume.labels)[1:]
    truth, means = (
        ndimage.mean(array.astype(float) - 108, volume.labels, ids)
        for array in (volume.reference, volume.image)
    )
    assert found.intensities.n_objects == len(ids)
    assert found.intensities.error == pytest.approx(np.median(means / truth - 1), rel=1e-9)
    assert found.intensities.absolute_error == pytest.approx(np.median(np.abs(means / truth - 1)), rel=1e-9)
    assert repr(described(json.loads(json.dumps(found.describe())))) == repr(found)


def test_every_time_point_is_scored_by_itself(volume, tmp_path):
    images = np.stack([volume.image, np.roll(volume.image, 1, 2)])
    truths = np.stack([volume.reference] * 2)
    known = {"axes": "tzyx", "voxel_size": volume.voxel_size}
    write_image(images, tmp_path / "image.ome.zarr", **known)
    write_image(truths, tmp_path / "truth.ome.zarr", **known)
    found = score(tmp_path / "truth.ome.zarr", tmp_path / "image.ome.zarr", **SERIAL)
    expected = [score_image(t, i, voxel_size=volume.voxel_size) for t, i in zip(truths, images, strict=True)]
    assert [repr(one.image) for one in found] == [repr(one) for one in expected]
    assert [one.timepoint for one in found] == [0, 1]


def test_an_interrupted_score_goes_on_to_the_same_bits(scene, tmp_path, monkeypatch):
    options = {**arguments(scene), "block_shape": (16, 16, 16), **SERIAL}
    whole = score(**options, work_folder=tmp_path / "whole")
    run_all, counts = Runner.map, []

    def some(self, function, items, arguments):
        for k, happening in enumerate(run_all(self, function, items, arguments)):
            counts.append(function.__name__)
            yield happening
            if len(counts) == stop and k:
                raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "map", some)
    for stop in (5, 3 + 31, 10**9):
        counts.clear()
        if stop < 10**9:
            with pytest.raises(KeyboardInterrupt):
                score(**options, work_folder=tmp_path / "stopped")
        else:
            found = score(**options, work_folder=tmp_path / "stopped")
    assert repr(found) == repr(whole)
    assert "errors_block" not in counts


def test_scores_refuse_what_cannot_be_compared(scene, tmp_path):
    image, truth = scene / "image.ome.zarr", scene / "truth.ome.zarr"
    labels = open_image(image).label("truth")
    for given, message in (
        ({"truth": truth, "image": None}, "give both"),
        ({"truth": None, "image": None}, "nothing to compare"),
        ({"truth": truth, "image": image, "labels": labels}, "`true_labels`"),
        ({"truth": None, "image": None, "labels": image, "true_labels": truth}, "not integers"),
        ({"truth": open_image(truth).select(region=(slice(0, 8),) * 3), "image": image}, "must be the same"),
    ):
        with pytest.raises(ValueError, match=message):
            score(**given, work_folder=tmp_path, **SERIAL)
    assert not list(tmp_path.iterdir())


def test_voxels_that_are_no_numbers_fail_the_score(volume, tmp_path):
    image = volume.image.astype(np.float32)
    image[3, 4, 5] = np.nan
    write_image(image, tmp_path / "image.ome.zarr", axes="zyx")
    write_image(volume.reference, tmp_path / "truth.ome.zarr", axes="zyx")
    with pytest.raises(BlockError, match="NaN or infinite"):
        score(tmp_path / "truth.ome.zarr", tmp_path / "image.ome.zarr", **SERIAL)


# The comparison -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return compare_classical(scene, folder / "out"), folder


def compare_classical(scene, out, **options):
    known = {
        "truth": scene / "truth.ome.zarr",
        "psf": scene / "psf.tif",
        "background": 108,
        "iterations": (3, 6),
    }
    return compare(scene / "image.ome.zarr", out, **(known | {"min_distance": 1.6} | options), **SERIAL)


def test_numbers_of_a_comparison_are_those_of_its_stores(compared, volume):
    metrics, matching = (
        pytest.importorskip("skimage.metrics"),
        pytest.importorskip("stardist.matching").matching,
    )
    content = json.loads((compared[0].folder / "comparison.json").read_text())
    keys = [one["method"] for one in content["methods"]]
    assert keys == ["raw", "wiener", "richardson-lucy-3", "richardson-lucy-6", "richardson-lucy-tv"]
    truth = volume.reference - 108.0
    peak = np.ptp(truth)
    for one in content["methods"]:
        stored = volume.image - 108.0 if one["store"] is None else np.asarray(open_image(one["store"]).data)
        stored, found = stored.astype(float), one["score"]["image"]
        expected = metrics.peak_signal_noise_ratio(truth, stored, data_range=peak)
        assert found["psnr"] == pytest.approx(expected, abs=1e-6)
        expected = metrics.structural_similarity(truth, stored, data_range=peak)
        assert found["ssim"] == pytest.approx(expected, abs=1e-6)
        assert [cut["segmentation"] for cut in one["segmentations"]] == ["threshold", "watershed"]
        for cut in one["segmentations"]:
            labels = np.asarray(open_image(cut["labels"]).data)
            for at in cut["score"]["at"]:
                expected = matching(volume.labels, labels, thresh=at["iou"])
                assert (at["tp"], at["fp"], at["fn"]) == (expected.tp, expected.fp, expected.fn)


def test_files_of_a_comparison_tell_the_same(compared):
    folder = compared[0].folder
    for name in ("comparison.png", "f1.png", "fsc.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    with (folder / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2
    by_key = {(row["method"], row["segmentation"]): row for row in rows}
    wiener = compared[0]["wiener"]
    assert float(by_key["wiener", "watershed"]["psnr"]) == wiener.score.image.psnr
    assert float(by_key["wiener", "watershed"]["f1_at_0.3"]) == wiener.segmentations[1].score.at[2].f1
    page = (folder / "comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="/' not in page
    table = (folder / "comparison.md").read_text()
    assert f"| Wiener | {wiener.score.image.psnr:.2f} |" in table


def test_units_are_brought_together_by_the_known_background_alone(compared):
    """A pedestal of 108 counts that was left somewhere would show in the bias."""
    for one in compared[0].methods:
        assert abs(one.score.image.bias) < 5, one.key


def test_a_repeated_comparison_computes_nothing(compared, scene, monkeypatch):
    first, folder = compared

    def forbidden(*_):
        raise AssertionError("a block was computed again")

    monkeypatch.setattr(Runner, "map", forbidden)
    again = compare_classical(scene, folder / "out")
    assert again.describe() == first.describe()
    assert again["wiener"].seconds["processor"] > 0


def test_a_comparison_killed_before_its_record_goes_on(compared, scene, tmp_path):
    """The store is published, but the driver died before it noted so: the image is not made again."""
    first, _ = compared
    shutil.copytree(first.folder, tmp_path / "out")
    record = tmp_path / "out" / "records" / "image-wiener.json"
    record.write_text(json.dumps({"what": json.loads(record.read_text())["what"]}))
    (tmp_path / "out" / "records" / "labels-wiener-threshold.json").unlink()
    shutil.rmtree(tmp_path / "out" / "images" / "wiener.ome.zarr" / "labels" / "threshold")
    stored = sorted((tmp_path / "out" / "images" / "wiener.ome.zarr" / "0").rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in stored}
    again = compare_classical(scene, tmp_path / "out")
    assert again["wiener"].segmentations[0].score == first["wiener"].segmentations[0].score
    # Nobody has seen what the job took that ended unseen.
    assert math.isnan(again["wiener"].seconds["processor"])
    assert again["wiener"].seconds["wall"] == first["wiener"].seconds["wall"]
    assert {path: path.stat().st_mtime_ns for path in stored} == before


def test_a_folder_of_another_comparison_is_refused_and_overwritten_only_if_told(scene, tmp_path):
    few = {"methods": ["wiener"], "min_distance": None}
    first = compare_classical(scene, tmp_path / "out", **few)
    with pytest.raises(ValueError, match=r"'score-raw' .* background was 108\.0, is 100\.0"):
        compare_classical(scene, tmp_path / "out", background=100.0, truth_background=108.0, **few)
    again = compare_classical(
        scene, tmp_path / "out", background=100.0, truth_background=108.0, overwrite=True, **few
    )
    assert again["wiener"].score.image.bias == pytest.approx(first["wiener"].score.image.bias + 8, abs=0.1)


def test_methods_can_be_added_to_a_comparison(scene, tmp_path):
    few = {"methods": ["raw"], "min_distance": None}
    compare_classical(scene, tmp_path / "out", **few)
    stored = (tmp_path / "out" / "records" / "labels-raw-threshold.json").stat().st_mtime_ns
    more = compare_classical(scene, tmp_path / "out", **(few | {"methods": ["raw", "wiener"]}))
    assert [one.key for one in more.methods] == ["raw", "wiener"]
    assert (tmp_path / "out" / "records" / "labels-raw-threshold.json").stat().st_mtime_ns == stored


def test_smoothing_comes_before_the_threshold_and_not_before_the_scores(scene, volume, tmp_path):
    found = compare_classical(scene, tmp_path / "out", methods=["raw"], min_distance=None, smoothing=0.4)
    smooth = ndimage.gaussian_filter(volume.image.astype(np.float32), 1.0)
    labels = np.asarray(open_image(found["raw"].segmentations[0].labels).data)
    filters = pytest.importorskip("skimage.filters")
    expected = ndimage.label(smooth > filters.threshold_otsu(smooth))[0]
    assert found["raw"].segmentations[0].score.n_pred == pytest.approx(expected.max(), abs=1)
    assert ((labels > 0) == (expected > 0)).mean() > 0.999
    known = {"voxel_size": volume.voxel_size, "background": 108, "truth_background": 108}
    assert repr(found["raw"].score.image) == repr(score_image(volume.reference, volume.image, **known))


def test_a_region_is_compared_as_a_volume_of_its_own(scene, volume, tmp_path):
    region = [(4, 20), (8, 40), (16, 56)]
    found = compare_classical(scene, tmp_path / "out", methods=["raw"], min_distance=None, region=region)
    part = tuple(slice(*bounds) for bounds in region)
    known = {"voxel_size": volume.voxel_size, "background": 108, "truth_background": 108}
    expected = score_image(volume.reference[part], volume.image[part], **known)
    assert repr(found["raw"].score.image) == repr(expected)
    assert found["raw"].segmentations[0].score.n_true == len(np.unique(volume.labels[part])) - 1


def test_planes_are_compared_as_well(volume, tmp_path):
    known = {"axes": "yx", "voxel_size": volume.voxel_size[1:]}
    image = write_image(volume.image[12], tmp_path / "image.ome.zarr", **known)
    write_image(volume.reference[12], tmp_path / "truth.ome.zarr", **known)
    write_labels(volume.labels[12], image.path, name="truth", like=image)
    found = compare(
        image, tmp_path / "out", truth=tmp_path / "truth.ome.zarr", background=108, min_distance=1.6, **SERIAL
    )
    expected = score_image(
        volume.reference[12],
        volume.image[12],
        voxel_size=known["voxel_size"],
        background=108,
        truth_background=108,
    )
    assert repr(found["raw"].score.image) == repr(expected)
    assert (found.folder / "comparison.png").exists()


def test_images_or_labels_alone_can_be_compared(scene, volume, tmp_path):
    image = tmp_path / "image.ome.zarr"
    write_image(volume.image, image, axes="zyx", voxel_size=volume.voxel_size)
    only_images = compare(
        image, tmp_path / "images", truth=scene / "truth.ome.zarr", background=108, methods=["raw"], **SERIAL
    )
    assert only_images["raw"].segmentations == ()
    assert only_images["raw"].score.intensities is None
    only_labels = compare(scene / "image.ome.zarr", tmp_path / "labels", methods=["raw"], **SERIAL)
    assert only_labels["raw"].score is None
    assert "Images" not in str(only_labels)
    with pytest.raises(ValueError, match="no truth to compare with"):
        compare(image, tmp_path / "nothing", **SERIAL)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lucy"]}, "known are raw, wiener"),
        ({"methods": ["care"]}, "needs a CARE model"),
        ({"methods": ["wiener"], "psf": None}, "needs a `psf`"),
        ({"iterations": (5, 5)}, "different numbers"),
        ({"labels": "nuclei"}, "neither in"),
    ],
)
def test_comparisons_refuse_before_anything_is_computed(scene, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare_classical(scene, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_verb_compares(scene, tmp_path, capsys):
    arguments = [
        str(scene / "image.ome.zarr"),
        "--truth",
        str(scene / "truth.ome.zarr"),
        "--out",
        str(tmp_path),
    ]
    options = ["--psf", str(scene / "psf.tif"), "--background", "108", "--methods", "raw,wiener"]
    with pytest.raises(SystemExit) as done:
        main(["compare", *arguments, *options, "--cluster", "serial"])
    assert done.value.code == 0
    assert "| Wiener |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["compare", *arguments, "--methods", "care", "--cluster", "serial"])
    assert refused.value.code == 2


@pytest.mark.slow
def test_networks_are_compared(volume, scene, tmp_path):
    pytest.importorskip("stardist")
    known = {
        "truth": scene / "truth.ome.zarr",
        "psf": scene / "psf.tif",
        "background": 108,
        "iterations": (6,),
    }
    networks = {"care": "care3d-demo", "stardist": "stardist3d-demo"}
    methods = ["raw", "care", "richardson-lucy+care"]
    found = compare(
        scene / "image.ome.zarr", tmp_path / "out", methods=methods, **known, **networks, **SERIAL
    )
    assert [one.key for one in found.methods] == ["raw", "richardson-lucy-6", "care", "richardson-lucy+care"]
    for one, cut in itertools.product(found.methods, (0, 1)):
        labels = np.asarray(open_image(one.segmentations[cut].labels).data)
        assert repr(one.segmentations[cut].score) == repr(score_labels(volume.labels, labels))
        assert not math.isnan(one.score.image.psnr)
    assert found["care"].score.image.psnr_scaled > found["raw"].score.image.psnr_scaled
    both = found["richardson-lucy+care"]
    assert both.seconds["wall"] > both.told["seconds"]["wall"]
    assert Path(both.store).name == "richardson-lucy+care.ome.zarr"

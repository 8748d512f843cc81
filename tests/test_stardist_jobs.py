"""StarDist jobs with every option, against StarDist's own prediction of the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from star_networks import NORMALIZATION, image_of, normalized, save_network

import chunkrestore as cr
from chunkrestore import models

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
pytest.importorskip("stardist", reason="needs the deep-learning extra")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra tables")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SERIAL = {"cluster": "serial", "quiet": True}
LIMITS = (NORMALIZATION, (200.0, 2000.0))
CONFIGS = {
    "channels": (2, {"n_rays": 16, "grid": (2, 1), "unet_n_depth": 1, "n_channel_in": 2}, 6),
    "classes": (2, {"n_rays": 16, "grid": (1, 1), "unet_n_depth": 1, "n_classes": 2}, 6),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    basedir = tmp_path_factory.mktemp("networks")
    for name, config in CONFIGS.items():
        save_network(basedir, name, *config)
    return basedir


def assert_same_instances(labels, expected):
    """Every voxel agrees, up to one one-to-one map of ids."""
    pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
    assert pairs[:, 0].tolist() == [0, 0]
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1] > 5


def frames(n_timepoints, shape):
    """Time points of two channels, the second brighter and with other objects: tcyx."""
    return np.stack(
        [
            np.stack([image_of(shape, seed=2 * t), 2 * image_of(shape, seed=2 * t + 1)])
            for t in range(n_timepoints)
        ]
    )


def test_channels_are_segmented_together_in_every_time_point(tmp_path, folders):
    data = frames(2, (80, 72))
    image = cr.write_image(data, tmp_path / "in.zarr", axes="tcyx", voxel_size=(1, 1))
    operator = cr.StarDist(folders / "channels", prob_thresh=0.4, normalization=LIMITS)
    report = cr.run(operator, image, image.path, block_shape=(24, 20), **SERIAL)
    labels = cr.open_image(image.path).label("labels")
    assert labels.axes == "tyx"
    model, n_objects = models.load(folders / "channels"), 0
    for t, found in enumerate(labels.data.compute()):
        seen = np.stack([normalized(data[t, c], *LIMITS[c]) for c in range(2)], axis=-1)
        expected, _ = model.predict_instances(seen, prob_thresh=0.4, nms_thresh=0.3, n_tiles=None)
        assert_same_instances(found, expected)
        assert found.max() == len(np.unique(expected)) - 1
        n_objects += int(found.max())
    assert report.n_objects == n_objects


def test_every_channel_of_a_job_has_its_own_percentiles(tmp_path, folders):
    data = frames(1, (56, 48))[0]
    image = cr.write_image(data, tmp_path / "in.zarr", axes="cyx", voxel_size=(1, 1))
    operator = cr.StarDist(folders / "channels", prob_thresh=0.6)
    report = cr.run(operator, image, image.path, block_shape=(24, 20), **SERIAL)
    labels = cr.open_image(image.path).label("labels").data.compute()
    np.testing.assert_array_equal(labels, operator(np.moveaxis(data, 0, -1)))
    limits = [list(np.percentile(channel, (1, 99.8))) for channel in data]
    (described,) = report.operators
    np.testing.assert_allclose(described["normalization"], limits)


def test_an_image_of_other_channels_is_refused(tmp_path, folders):
    image = cr.write_image(frames(1, (40, 40))[0], tmp_path / "in.zarr", axes="cyx", voxel_size=(1, 1))
    operator = cr.StarDist(folders / "channels", normalization=LIMITS)
    with pytest.raises(ValueError, match="takes 2 channels together, but the image has 1; choose as many"):
        cr.run(operator, image, image.path, channel=0, **SERIAL)


def test_classes_and_shapes_are_told_at_another_scale(tmp_path, folders):
    data, scale = image_of((60, 51), seed=4), (0.8, 1.3)
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(0.5, 0.25))
    operator = cr.StarDist(folders / "classes", prob_thresh=0.6, normalization=NORMALIZATION, scale=scale)
    cr.run(operator, image, image.path, block_shape=(25, 16), objects="shapes", **SERIAL)
    labels = cr.open_image(image.path).label("labels").data.compute()
    expected, details = models.load(folders / "classes").predict_instances(
        normalized(data), prob_thresh=0.6, nms_thresh=0.3, scale=scale, n_tiles=None
    )
    assert_same_instances(labels, expected)
    path = tmp_path / "in.zarr" / "labels" / "labels" / "objects.parquet"
    rows = parquet.read_table(path).to_pydict()
    probability = dict(
        zip(map(tuple, np.round(details["points"], 9).tolist()), details["prob"].tolist(), strict=True)
    )
    classes = dict(
        zip(map(tuple, np.round(details["points"], 9).tolist()), details["class_id"].tolist(), strict=True)
    )
    assert len(set(details["class_id"])) > 1
    for y, x, prob, found in zip(
        rows["point_y"], rows["point_x"], rows["probability"], rows["class_id"], strict=True
    ):
        point = (round(y, 9), round(x, 9))
        assert prob == pytest.approx(probability[point])
        assert found == classes[point]
    from chunkrestore.jobs.object_table import read_shapes
    from chunkrestore.kernels.star_painting import paint

    shapes = read_shapes(path)
    again = paint(tuple(slice(0, n) for n in data.shape), shapes.rows, shapes.rays, shapes.lattice)
    np.testing.assert_array_equal(again, labels)


def test_dark_blocks_are_skipped_and_the_rest_is_the_same(tmp_path, folders):
    data = image_of((60, 60), seed=4)
    data[:, 30:] = 100
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(1, 1))
    operator = cr.StarDist(
        folders / "classes", prob_thresh=0.6, normalization=NORMALIZATION, skip_below=100.0
    )
    cr.run(operator, image, image.path, block_shape=(20, 15), **SERIAL)
    labels = cr.open_image(image.path).label("labels").data.compute()
    np.testing.assert_array_equal(labels, operator(data))
    assert labels.max() > 8

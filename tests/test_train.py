"""Training: what is refused before it starts, and a real one, as small as it can be."""

import json
import math

import numpy as np
import pytest

from chunkrestore import models, train
from chunkrestore.simulate import Nuclei, embryo

SMALL = train.Schedule(steps=4, learning_rate=1e-3, batch_size=2, patch_shape=(8, 16, 16))

# Keras 3.15 converts variables without NumPy 2's `copy` keyword when it saves them.
KERAS_SAVES = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")


@pytest.fixture(scope="module")
def volume():
    return embryo((16, 32, 32), seed=1, nuclei=Nuclei(radius=(3, 4)), arrangement="tissue")


def test_learning_rate_warms_up_and_falls_to_one_percent():
    schedule = train.Schedule(steps=100, learning_rate=0.01)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert rates[-1] == pytest.approx(0.0001, rel=0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert train.Schedule(steps=1, learning_rate=0.01).rate(0) == pytest.approx(0.01)


def test_normalize_maps_the_limits_to_zero_and_one():
    image = np.array([100, 150, 300], dtype=np.uint16)
    result = train.normalize(image, 100, 200)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.float32([0, 0.5, 2]))
    with pytest.raises(ValueError, match="`low` 5 must lie below `high` 5"):
        train.normalize(image, 5, 5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": math.nan}, "learning_rate"),
    ],
)
def test_impossible_schedules_are_refused(change, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        train.Schedule(**({"steps": 1, "learning_rate": 1e-3} | change))


@pytest.mark.parametrize("function", [train.train_care, train.train_stardist])
def test_bad_volumes_are_refused_and_nothing_is_written(function, tmp_path):
    good, labels = np.zeros((16, 32, 32), np.float32), np.zeros((16, 32, 32), np.int32)
    folder = tmp_path / "model"

    def refuses(message, images, seconds, schedule=SMALL):
        with pytest.raises(ValueError, match=message):
            function(images, seconds, folder, seed=1, schedule=schedule)
        assert not folder.exists()

    eight = train.Schedule(1, 1e-3, patch_shape=(8, 16, 16))
    refuses("at least one image", [], [], eight)
    refuses("as many", [good], [labels, labels], eight)
    refuses("pair 0: image .* must have one shape", [good], [labels[:8]], eight)
    refuses("pair 0: .* as many axes", [good[0]], [labels[0]], eight)
    refuses("pair 1: volume .* is smaller", [good, good[:4]], [labels, labels[:4]], eight)
    refuses("pair 0: volumes must be finite", [good + np.nan], [labels], eight)
    refuses(
        "`patch_shape` .* must be a multiple of", [good], [labels], train.Schedule(1, 1e-3, 1, (8, 16, 18))
    )


def test_an_existing_folder_is_refused(tmp_path):
    volumes = [np.zeros((16, 32, 32))]
    with pytest.raises(ValueError, match="exists; choose another name"):
        train.train_care(volumes, volumes, tmp_path, seed=1, schedule=SMALL)


def test_every_patch_lies_in_its_volume_and_is_turned_alike():
    """The target is a function of the input: turning both alike keeps it so, whatever the crop."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(10, 20, 24)).astype(np.float32)
    seen = set()
    for _ in range(40):
        a, b = train._care_patch(x, 2 * x, (8, 16, 16), rng)
        assert a.shape == b.shape == (8, 16, 16)
        slope, offset = np.polyfit(a.ravel(), b.ravel(), 1)
        assert slope == pytest.approx(2, abs=1e-3)
        assert abs(offset) <= 0.05 + 1e-3
        seen.add(float(a[0, 0, 0]))
    assert len(seen) > 30


def test_stardist_patches_favour_objects():
    rng = np.random.default_rng(2)
    labels = np.zeros((16, 64, 64), np.int32)
    labels[4:8, 40:44, 40:44] = 1
    foreground = np.argwhere(labels[::4, ::4, ::4]) * 4
    patches = [
        train._stardist_patch(labels.astype(np.float32), labels, foreground, (8, 16, 16), rng)
        for _ in range(60)
    ]
    hits = sum(bool(y.any()) for _, y in patches)
    assert hits > 40
    assert all(x.shape == y.shape == (8, 16, 16) and x.dtype == np.float32 for x, y in patches)


@pytest.mark.slow
@KERAS_SAVES
def test_care_learns_loads_and_repeats_itself(volume, tmp_path):
    pytest.importorskip("csbdeep")
    low, high = np.percentile(volume.image, (2, 99.8))
    pair = train.normalize(volume.image, low, high), train.normalize(volume.reference, low, high)
    schedule = train.Schedule(steps=150, learning_rate=3e-3, patch_shape=(16, 32, 32))
    runs = [
        train.train_care([pair[0]], [pair[1]], tmp_path / name, seed=3, schedule=schedule, n_first=4)
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(runs[0].loss[:10], runs[1].loss[:10], rtol=1e-3)
    assert models.kind(runs[0].folder) == "care"
    model = models.load(runs[0].folder)
    before = np.mean((pair[0] - pair[1]) ** 2)
    after = np.mean(
        (model.keras_model.predict(pair[0][None, ..., None], verbose=0)[0, ..., 0] - pair[1]) ** 2
    )
    assert after < 0.8 * before


@pytest.mark.slow
@KERAS_SAVES
def test_stardist_learns_loads_and_gets_thresholds(volume, tmp_path):
    pytest.importorskip("stardist")
    image = train.normalize(volume.reference, *np.percentile(volume.reference, (1, 99.8)))
    schedule = train.Schedule(steps=150, learning_rate=3e-3, patch_shape=(16, 32, 32))
    trained = train.train_stardist([image], [volume.labels], tmp_path / "model", seed=3, schedule=schedule)
    assert trained.loss[-20:].mean() < 0.7 * trained.loss[:20].mean()
    assert models.kind(trained.folder) == "stardist3d"
    chosen = train.optimize_thresholds(trained.folder, [image], [volume.labels], nms_threshs=[0.3])
    assert chosen["nms"] == 0.3
    assert json.loads((trained.folder / "thresholds.json").read_text()) == chosen
    assert models.thresholds(trained.folder) == (chosen["prob"], 0.3)

"""Training on patches in memory: what is refused, what is kept, what is learnt; with real CSBDeep and StarDist."""

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from chunkrestore import models, train
from chunkrestore.simulate import Nuclei, embryo
from chunkrestore.train.targets import measured_anisotropy, targets

SMALL = train.CareNetwork(n_first=4, depth=1)


def blobs(shape, seed, noise=0.0):
    """A smooth random image with values around 0 to 1, and the same with noise."""
    rng = np.random.default_rng(seed)
    image = gaussian_filter(rng.random(shape), 2.0)
    image = (image - image.min()) / (image.max() - image.min())
    return np.float32(image), np.float32(image + rng.normal(0, noise, shape))


def pairs_2d(seed=1, noise=0.2):
    truth, noisy = blobs((128, 128), seed, noise)
    return train.patches_of([noisy], [truth], (32, 32), validation=0.25, seed=seed)


def spots(seed, n=26, size=96):
    """Discs that do not touch: bright ones of class 1, dim ones of class 2, whatever augmentation makes of them."""
    rng = np.random.default_rng(seed)
    image, labels, classes = np.zeros((size, size)), np.zeros((size, size), int), np.zeros((size, size), int)
    y, x = np.indices(image.shape)
    while labels.max() < n:
        centre, radius = rng.uniform(5, size - 6, 2), rng.uniform(4, 6)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2
        if (labels[inside <= (radius + 2) ** 2] > 0).any():
            continue
        kind = 1 + labels.max() % 2
        labels[inside <= radius**2] = labels.max() + 1
        image[inside <= radius**2], classes[inside <= radius**2] = (1.0, 0.2)[kind - 1], kind
    return (
        np.float32(image + rng.normal(0, 0.03, image.shape)),
        labels.astype(np.int32),
        classes.astype(np.int32),
    )


def test_learning_rate_warms_up_and_falls_to_one_percent():
    schedule = train.Schedule(steps=100, learning_rate=0.01)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == pytest.approx(0.01, rel=0.03)
    assert rates[-1] == pytest.approx(0.0001, rel=0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert train.Schedule(steps=100, learning_rate=0.01, warm_up=0.02).rate(0) == pytest.approx(0.005)
    assert train.Schedule(steps=1, learning_rate=0.01).rate(0) == pytest.approx(0.01)


def test_with_a_time_limit_the_learning_rate_ends_with_the_time():
    schedule = train.Schedule(minutes=2, learning_rate=0.01)
    assert schedule.rate(5, 119.99) == pytest.approx(0.0001, rel=0.01)
    assert schedule.rate(5, 60) == pytest.approx(schedule.rate(50_000, 60))
    assert schedule.done(10**6, 60) == 0.5
    assert schedule.done(1, 121) == 1
    both = train.Schedule(steps=10, minutes=2)
    assert (both.done(9, 30), both.done(2, 90), both.done(10, 0)) == (0.9, 0.75, 1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"warm_up": 0}, "warm_up"),
        ({"steps": None}, "minutes"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"minutes": -1.0}, "minutes"),
        ({"patience": 0}, "patience"),
        ({"validate_every": 0}, "validate_every"),
    ],
)
def test_impossible_schedules_are_refused(change, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        train.Schedule(**({"steps": 1, "learning_rate": 1e-3} | change))


def test_impossible_networks_are_refused():
    for kind, change, name in (
        (train.CareNetwork, {"depth": 0}, "depth"),
        (train.CareNetwork, {"loss": "laplace"}, "loss"),
        (train.StarDistNetwork, {"n_rays": 2}, "n_rays"),
        (train.StarDistNetwork, {"grid": (3, 1, 1)}, "grid"),
        (train.StarDistNetwork, {"n_classes": 2, "class_weights": (1.0, 1.0)}, "class_weights"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            kind(**change)


def test_patches_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path):
    folder = tmp_path / "model"
    images, (image, labels, _) = pairs_2d(), spots(1)
    objects = train.patches_of([image], [labels], (32, 32), validation=0.2)

    def refuses(message, function, patches, network=None, **schedule):
        with pytest.raises(ValueError, match=message):
            function(
                patches, folder, seed=1, schedule=train.Schedule(**{"steps": 1} | schedule), network=network
            )
        assert list(tmp_path.iterdir()) == []

    refuses("`patch_shape` .* multiple of \\(64, 64\\)", train.train_care, images, train.CareNetwork(depth=6))
    refuses("does not fit into patches", train.train_care, images, patch_shape=(64, 64))
    refuses("multiple of", train.train_care, images, patch_shape=(30, 30))
    refuses("CARE learns images", train.train_care, objects)
    refuses("StarDist learns from labels", train.train_stardist, images)
    refuses(
        "`grid` .* must have 2 axes", train.train_stardist, objects, train.StarDistNetwork(grid=(2, 2, 2))
    )
    refuses("`n_classes` 2 needs", train.train_stardist, objects, train.StarDistNetwork(n_classes=2))
    none = dataclasses.replace(images, x_validation=images.x[:0], y_validation=images.y[:0])
    refuses("`patience` needs validation", train.train_care, none, patience=2)


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exists; choose another name"):
        train.train_care(pairs_2d(), tmp_path, seed=1, schedule=train.Schedule(steps=1))


def test_the_same_seed_gives_the_same_weights(tmp_path):
    pytest.importorskip("csbdeep")
    schedule = train.Schedule(
        steps=6, learning_rate=3e-3, batch_size=2, validate_every=3, patch_shape=(16, 16)
    )
    runs = [
        train.train_care(pairs_2d(), tmp_path / name, seed=seed, schedule=schedule, network=SMALL)
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    ]
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-5)
    one, two, other = (
        [np.ravel(w) for w in models.load(run.folder).keras_model.get_weights()] for run in runs
    )
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(two), rtol=1e-4, atol=1e-6)
    assert np.abs(np.concatenate(one) - np.concatenate(other)).max() > 0.1
    assert {path.name for path in runs[0].folder.iterdir()} == {
        "config.json",
        "weights_best.h5",
        "weights_last.h5",
    }


def test_early_stopping_keeps_the_weights_of_the_least_validation_loss(tmp_path):
    """The validation targets are the training's upside down: the more is learnt, the worse they are met."""
    pytest.importorskip("csbdeep")
    patches = pairs_2d(noise=0.02)
    patches = dataclasses.replace(patches, y_validation=1 - patches.y_validation)
    moments = []
    trained = train.train_care(
        patches,
        tmp_path / "model",
        seed=3,
        schedule=train.Schedule(steps=200, learning_rate=1e-2, batch_size=4, validate_every=2, patience=3),
        network=SMALL,
        progress=moments.append,
    )
    history = trained.history
    assert history.stopped == "patience"
    assert len(history.loss) < 200
    least = min(history.validation, key=lambda found: found[1])
    assert (history.best_step, len(history.loss)) == (least[0], least[0] + 6)
    assert [m.validation for m in moments if m.validation is not None] == [v for _, v in history.validation]
    made = models.load(trained.folder).keras_model.predict(patches.x_validation[..., None], verbose=0)
    assert np.mean((made[..., 0] - patches.y_validation) ** 2) == pytest.approx(least[1], rel=1e-4)


def test_a_training_that_diverges_leaves_nothing(tmp_path):
    pytest.importorskip("csbdeep")
    with pytest.raises(ValueError, match=r"diverged .* lower `learning_rate`"):
        train.train_care(
            pairs_2d(),
            tmp_path / "model",
            seed=1,
            schedule=train.Schedule(steps=40, learning_rate=1e12),
            network=SMALL,
        )
    assert list(tmp_path.iterdir()) == []


def test_noise_only_training_lowers_the_error_against_a_truth_it_never_saw(tmp_path):
    pytest.importorskip("csbdeep")
    truth, noisy = blobs((160, 160), 5, noise=0.2)
    patches = train.patches_of([noisy], None, (32, 32), validation=0.2)
    trained = train.train_care(
        patches,
        tmp_path / "model",
        seed=2,
        schedule=train.Schedule(steps=120, learning_rate=4e-3, batch_size=4),
        network=train.CareNetwork(n_first=8),
    )
    from csbdeep.models import CARE

    model = CARE(None, name="model", basedir=str(tmp_path))
    made = model.predict(noisy, "YX", normalizer=None)
    error = [np.sqrt(np.mean((image - truth) ** 2)) for image in (noisy, made)]
    assert error[1] < 0.5 * error[0]
    assert train.validate(trained.folder, patches).scores.keys() == {"n_patches"}


@pytest.mark.parametrize("anisotropy", [None, (2.0, 1.0, 1.0)])
def test_targets_are_those_of_stardist_in_three_dimensions(anisotropy):
    pytest.importorskip("stardist")
    from stardist import Rays_GoldenSpiral
    from stardist.models import Config3D
    from stardist.models.model3d import StarDistData3D

    labels = embryo((16, 32, 32), seed=1, nuclei=Nuclei(radius=(3, 4)), arrangement="tissue").labels
    rays = Rays_GoldenSpiral(16, anisotropy=anisotropy)
    config = Config3D(rays=rays, grid=(1, 2, 2), anisotropy=anisotropy)
    theirs = StarDistData3D(
        [labels.astype(np.float32)],
        [labels],
        batch_size=1,
        rays=rays,
        length=1,
        patch_size=labels.shape,
        grid=(1, 2, 2),
        anisotropy=anisotropy,
    )[0][1]
    for ours, expected in zip(targets(config, labels), theirs, strict=True):
        np.testing.assert_allclose(ours, expected[0], rtol=1e-6)
    for ours, expected in zip(targets(config, labels * 1_000_003), theirs, strict=True):
        np.testing.assert_allclose(ours, expected[0], rtol=1e-6)


def test_targets_are_those_of_stardist_in_the_plane_with_classes():
    pytest.importorskip("stardist")
    from stardist.models import Config2D
    from stardist.models.model2d import StarDistData2D

    image, labels, classes = spots(3)
    of_label = {int(i): int(classes[labels == i][0]) for i in np.unique(labels[labels > 0])}
    of_label[2] = None
    config = Config2D(n_rays=16, grid=(1, 1), n_classes=2)
    theirs = StarDistData2D(
        [image],
        [labels],
        batch_size=1,
        n_rays=16,
        length=1,
        patch_size=labels.shape,
        grid=(1, 1),
        n_classes=2,
        classes=[of_label],
        b=0,
    )[0][1]
    ours = targets(config, labels, np.where(labels == 2, -1, classes))
    assert len(ours) == len(theirs) == 3
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected[0], rtol=1e-6)


def test_anisotropy_is_that_of_whole_objects():
    labels = np.zeros((24, 40, 40), np.int32)
    labels[4:9, 5:15, 5:15] = 1
    labels[12:17, 20:30, 20:30] = 2
    labels[:2, 30:, 30:] = 3  # cut by the patch, so of no known proportions
    patches = train.patches_of([np.float32(labels)] * 2, [labels, labels.copy()], validation=0.5)
    assert measured_anisotropy(patches) == (2.0, 1.0, 1.0)


def test_stardist_learns_objects_and_classes_with_card_and_report(tmp_path):
    """Bright and dim discs, in the plane: found, told apart, and everything is said about the model."""
    pytest.importorskip("stardist")
    images, labels, classes = zip(*(spots(seed) for seed in range(8)), strict=True)
    patches = train.patches_of(images[:6], labels[:6], validation=(images[6:], labels[6:]))
    patches = dataclasses.replace(
        patches, classes=np.stack(classes[:6]), classes_validation=np.stack(classes[6:])
    )
    network = train.StarDistNetwork(
        n_rays=16, n_first=8, n_features=16, depth=1, class_weights=(0.5, 1.0, 1.0)
    )
    trained = train.train_stardist(
        patches,
        tmp_path / "discs",
        seed=1,
        schedule=train.Schedule(steps=160, learning_rate=5e-3, batch_size=2, patch_shape=(48, 48)),
        network=network,
    )
    card = train.complete(
        trained, patches, voxel_size=(0.5, 0.5), entries={"task": "discs", "scores": {"x": 1}}
    )
    scores = card["scores"]["validation"]
    assert (scores["n_true"], card["scores"]["x"], card["task"]) == (52, 1, "discs")
    assert scores["f1_iou_0.5"] > 0.9
    assert scores["class_accuracy"] > 0.9

    chosen = json.loads((trained.folder / "thresholds.json").read_text())
    assert (
        card["thresholds"]
        == chosen
        == dict(zip(("prob", "nms"), models.thresholds(trained.folder), strict=True))
    )
    assert train.read_card(trained.folder) == card
    assert card["digest"] == models.digest(trained.folder)
    for key in (
        "schema",
        "kind",
        "parameters",
        "data",
        "normalization",
        "training",
        "versions",
        "receptive_field",
    ):
        assert card[key], key
    assert (card["kind"], card["training"]["seed"], card["training"]["stopped_by"]) == (
        "stardist2d",
        1,
        "steps",
    )
    assert card["receptive_field"]["effective_radius_um"] is not None
    page = (trained.folder / "training.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"|url\(", page)

    from stardist.models import StarDist2D

    found, details = StarDist2D(None, "discs", str(tmp_path)).predict_instances(images[7])
    assert len(details["class_id"]) == found.max() > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "least_gain"),
    [(train.CareNetwork(n_first=4), 2), (train.CareNetwork(n_first=4, probabilistic=True), 1)],
)
def test_care_beats_the_input_on_a_volume_it_has_not_seen(network, least_gain, tmp_path):
    pytest.importorskip("csbdeep")
    volumes = [
        embryo((16, 48, 48), seed=seed, nuclei=Nuclei(radius=(3, 5)), arrangement="tissue")
        for seed in (1, 2, 3)
    ]
    numbers = [np.percentile(v.image, (2, 99.8)) for v in volumes]
    inputs = [train.normalize(v.image, *n) for v, n in zip(volumes, numbers, strict=True)]
    truths = [train.normalize(v.reference, *n) for v, n in zip(volumes, numbers, strict=True)]
    patches = train.patches_of(inputs[:2], truths[:2], validation=(inputs[2:], truths[2:]))
    trained = train.train_care(
        patches,
        tmp_path / "model",
        seed=3,
        schedule=train.Schedule(steps=250, learning_rate=3e-3, batch_size=2, patch_shape=(16, 32, 32)),
        network=network,
    )
    assert trained.loss[-30:].mean() < trained.loss[:30].mean()
    scores = train.validate(trained.folder, patches).scores
    assert scores["gain_db"] > least_gain
    assert scores["ssim"] > scores["ssim_input"]


@pytest.mark.slow
def test_stardist_learns_nuclei_and_gets_thresholds(tmp_path):
    pytest.importorskip("stardist")
    volume = embryo((16, 32, 32), seed=1, nuclei=Nuclei(radius=(3, 4)), arrangement="tissue")
    image = train.normalize(volume.reference, *np.percentile(volume.reference, (1, 99.8)))
    patches = train.patches_of([image], [volume.labels], validation=([image], [volume.labels]))
    trained = train.train_stardist(
        patches,
        tmp_path / "model",
        seed=3,
        schedule=train.Schedule(steps=150, learning_rate=3e-3),
        network=train.StarDistNetwork(n_first=4, n_features=16, anisotropy="extents"),
    )
    assert trained.loss[-20:].mean() < 0.8 * trained.loss[:20].mean()
    assert models.kind(trained.folder) == "stardist3d"
    chosen = train.optimize_thresholds(
        trained.folder, patches.x_validation, patches.y_validation, nms_threshs=[0.3]
    )
    assert chosen["nms"] == 0.3
    assert models.thresholds(trained.folder) == (chosen["prob"], 0.3)


def test_thresholds_need_objects(tmp_path):
    with pytest.raises(ValueError, match="as many `labels` as `images`"):
        train.optimize_thresholds(models.folder("stardist3d-demo"), [np.zeros((8, 8, 8))], [])
    with pytest.raises(ValueError, match="objects in them"), warnings.catch_warnings():
        train.optimize_thresholds(
            models.folder("stardist3d-demo"), [np.zeros((8, 8, 8))], [np.zeros((8, 8, 8), int)]
        )

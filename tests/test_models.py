"""Model folders: what they hold, how they are refused, and loading them once per process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

from chunkrestore import models

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CARE_CONFIG = {
    "n_dim": 3,
    "axes": "ZYXC",
    "n_channel_in": 1,
    "n_channel_out": 1,
    "probabilistic": False,
    "unet_residual": True,
    "unet_n_depth": 2,
    "unet_kern_size": 3,
    "unet_n_first": 4,
    "unet_last_activation": "linear",
    "unet_input_shape": [None, None, None, 1],
}
STARDIST_CONFIG = {"n_dim": 2, "axes": "YXC", "n_channel_in": 1, "n_rays": 32, "grid": [2, 2]}


def write_model(path, config, weights=b"not really weights", thresholds=None):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights is not None:
        (path / "weights_best.h5").write_bytes(weights)
    if thresholds is not None:
        (path / "thresholds.json").write_text(json.dumps(thresholds), encoding="utf-8")
    return path


def test_kind_and_config_come_from_config_json_alone(tmp_path):
    care = write_model(tmp_path / "care", CARE_CONFIG)
    flat = write_model(tmp_path / "flat", STARDIST_CONFIG)
    deep = write_model(tmp_path / "deep", STARDIST_CONFIG | {"n_dim": 3, "grid": [1, 2, 2]})
    assert [models.kind(path) for path in (care, flat, str(deep))] == ["care", "stardist2d", "stardist3d"]
    assert models.config(care).unet_n_first == 4
    assert models.config(flat).grid == [2, 2]
    # Keys that an old StarDist did not write have its defaults.
    assert models.config(flat).unet_n_depth == 3
    assert models.config(deep).unet_pool == (2, 2, 2)


def test_reading_a_folder_loads_no_tensorflow(tmp_path):
    path = write_model(tmp_path / "care", CARE_CONFIG)
    code = (
        "import sys; from chunkrestore import models; p = sys.argv[1]; "
        "models.kind(p); models.config(p); models.digest(p); models.thresholds(p); models.reference(p); "
        "assert not {'tensorflow', 'keras', 'csbdeep', 'stardist'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_missing_and_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model` .*nowhere' does not exist.*care3d-demo, stardist3d-demo"):
        models.folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`model` .*empty has no config\.json"):
        models.kind(tmp_path / "empty")
    write_model(tmp_path / "untrained", CARE_CONFIG, weights=None)
    with pytest.raises(ValueError, match=r"`model` .*untrained has no weights"):
        models.digest(tmp_path / "untrained")


def test_other_networks_and_other_kinds_are_refused(tmp_path):
    noise2void = write_model(tmp_path / "n2v", CARE_CONFIG | {"n2v_perc_pix": 1.5})
    with pytest.raises(ValueError, match="neither a CARE nor a StarDist model"):
        models.kind(noise2void)
    care = write_model(tmp_path / "care", CARE_CONFIG)
    with pytest.raises(ValueError, match="is a CARE model; a StarDist2D or StarDist3D model is needed here"):
        models.kind(care, "stardist2d", "stardist3d")
    with pytest.raises(ValueError, match="is a StarDist2D model; a CARE model is needed here"):
        models.kind(write_model(tmp_path / "stardist", STARDIST_CONFIG), "care")
    (care / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"`model` file .*config\.json is not valid JSON"):
        models.kind(care)


def test_digest_follows_every_file_and_nothing_else(tmp_path):
    path = write_model(tmp_path / "a", STARDIST_CONFIG, thresholds={"prob": 0.4, "nms": 0.3})
    same = write_model(tmp_path / "b", STARDIST_CONFIG, thresholds={"prob": 0.4, "nms": 0.3})
    (same / "notes.txt").write_text("not part of the model", encoding="utf-8")
    assert models.digest(path) == models.digest(same)
    assert len(models.digest(path)) == 64
    others = [
        write_model(tmp_path / "c", STARDIST_CONFIG, thresholds={"prob": 0.5, "nms": 0.3}),
        write_model(tmp_path / "d", STARDIST_CONFIG),
        write_model(tmp_path / "e", STARDIST_CONFIG, b"other weights", {"prob": 0.4, "nms": 0.3}),
        write_model(tmp_path / "f", STARDIST_CONFIG | {"grid": [1, 1]}, thresholds={"prob": 0.4, "nms": 0.3}),
    ]
    assert len({models.digest(p) for p in (path, *others)}) == 5
    (same / "weights_best.h5").write_bytes(b"retrained")
    assert models.digest(path) != models.digest(same)
    with pytest.raises(ValueError, match=r"`model` .*b is not the expected one: its digest begins with"):
        models.check_digest(same, models.digest(path))


def test_weights_are_those_that_csbdeep_prefers(tmp_path):
    path = write_model(tmp_path / "care", CARE_CONFIG)
    (path / "weights_last.h5").write_bytes(b"newer")
    os.utime(path / "weights_best.h5", (1, 1))
    assert models.weights_file(path).name == "weights_best.h5"
    (path / "weights_best.h5").unlink()
    assert models.weights_file(path).name == "weights_last.h5"


def test_thresholds_fall_back_as_stardist_does(tmp_path):
    given = write_model(tmp_path / "a", STARDIST_CONFIG, thresholds={"prob": 0.6, "nms": 1.5})
    assert models.thresholds(given) == (0.6, 0.4)
    assert models.thresholds(write_model(tmp_path / "b", STARDIST_CONFIG)) == (0.5, 0.4)


def test_reference_is_absolute_and_keeps_shipped_names(tmp_path, monkeypatch):
    path = write_model(tmp_path / "care", CARE_CONFIG)
    monkeypatch.chdir(tmp_path)
    assert models.reference("care") == str(path.resolve())
    monkeypatch.setattr(models, "files", lambda package: tmp_path / "package")
    write_model(tmp_path / "package" / "shipped_models" / "care3d-demo", CARE_CONFIG | {"unet_n_first": 8})
    write_model(tmp_path / "care3d-demo", CARE_CONFIG)
    assert models.reference("care3d-demo") == "care3d-demo"
    assert models.config("care3d-demo").unet_n_first == 8
    assert models.config("./care3d-demo").unet_n_first == 4


def test_missing_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    path = write_model(tmp_path / "care", CARE_CONFIG)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r'pip install "chunkrestore\[dl\]"'):
        models.load(path)


def require_libraries():
    for name in ("tensorflow", "csbdeep", "stardist"):
        pytest.importorskip(name, reason="needs the deep-learning extra")


def saved(model):
    model.keras_model.save_weights(str(model.logdir / "weights_best.h5"))
    return model


def weights_of(model):
    return model.keras_model.get_weights()


@pytest.fixture
def care(tmp_path):
    require_libraries()
    from csbdeep.models import CARE, Config

    return saved(CARE(Config("YX", unet_n_first=4, unet_n_depth=1), "care", basedir=str(tmp_path)))


@pytest.fixture
def stardist(tmp_path):
    require_libraries()
    from stardist.models import Config3D, StarDist3D

    config = Config3D(rays=8, unet_n_filter_base=4, unet_n_depth=1, net_conv_after_unet=8)
    return saved(StarDist3D(config, "stardist", basedir=str(tmp_path)))


def test_load_gives_the_saved_weights_silently(care, stardist, capsys):
    (stardist.logdir / "thresholds.json").write_text('{"prob": 0.7, "nms": 0.2}', encoding="utf-8")
    for model in (care, stardist):
        loaded = models.load(model.logdir)
        assert type(loaded) is type(model)
        assert loaded is not model
        for a, b in zip(weights_of(loaded), weights_of(model), strict=True):
            np.testing.assert_array_equal(a, b)
    assert tuple(models.load(stardist.logdir).thresholds) == (0.7, 0.2)
    assert capsys.readouterr().out == ""


def test_load_is_done_once_also_from_threads(care):
    start = threading.Barrier(4)

    def load(_):
        start.wait()
        return models.load(care.logdir)

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, range(4)))
    assert len({id(model) for model in loaded}) == 1
    care.keras_model.set_weights([w + 1 for w in weights_of(care)])
    care.keras_model.save_weights(str(care.logdir / "weights_best.h5"))
    assert models.load(care.logdir) is not loaded[0]


def test_load_returns_an_object_as_it_is(care):
    assert models.load(care) is care


def test_load_refuses_corrupt_and_unfitting_weights(care, stardist):
    weights = care.logdir / "weights_best.h5"
    whole = weights.read_bytes()
    for corrupt in (b"nothing", whole[: len(whole) // 2], (stardist.logdir / weights.name).read_bytes()):
        weights.write_bytes(corrupt)
        with pytest.raises(ValueError, match=r"weights_best\.h5 is corrupt or does not fit config\.json"):
            models.load(care.logdir)


def test_load_refuses_another_digest(care):
    expected = models.digest(care)
    assert models.load(care.logdir, expected_digest=expected) is models.load(care.logdir)
    with pytest.raises(ValueError, match="is not the expected one"):
        models.load(care.logdir, expected_digest="0" * 64)


def test_objects_stand_for_their_folder(care, stardist):
    assert models.reference(care) == str(care.logdir.resolve())
    assert models.kind(stardist) == "stardist3d"
    assert models.digest(stardist) == models.digest(stardist.logdir)


def test_objects_that_workers_could_not_load_are_refused(care, stardist):
    from csbdeep.models import CARE, Config, IsotropicCARE

    with pytest.raises(ValueError, match=r"`model` object 'loose' has no folder"):
        models.reference(CARE(Config("YX", unet_n_first=4), "loose", basedir=None))
    with pytest.raises(ValueError, match="`model` is of class IsotropicCARE; use the operator IsotropicCare"):
        models.check_class(IsotropicCARE(Config("YX", unet_n_first=4), "loose", basedir=None), "CARE")
    with pytest.raises(ValueError, match="`model` is of class int"):
        models.reference(3)
    stardist.thresholds = {"prob": 0.9, "nms": 0.1}
    with pytest.raises(ValueError, match="`model` object 'stardist' differs from what is saved"):
        models.reference(stardist)
    care.keras_model.set_weights([w + 1 for w in weights_of(care)])
    with pytest.raises(ValueError, match="`model` object 'care' differs from what is saved"):
        models.reference(care)

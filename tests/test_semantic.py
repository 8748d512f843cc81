"""Classes of voxels, tiled, against what Keras and StarDist predict for the whole volume."""

from __future__ import annotations

import itertools
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from conforming import assert_valid
from dying import Disk, Killed, bury
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras_networks import NETWORKS, keras_input, labels_of, padded, positive, unet
from star_networks import NORMALIZATION, image_of, normalized, save_network

import chunkrestore as cr
from chunkrestore import keras_files, models
from chunkrestore.api import classify
from chunkrestore.grid import Block
from chunkrestore.kernels.keras_geometry import keras_geometry
from chunkrestore.operators.semantic import ClassProbability, Semantic, StarDistClasses, classifier

keras = pytest.importorskip("keras", reason="needs the deep-learning extra")
pytest.importorskip("stardist", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SERIAL = {"cluster": "serial", "quiet": True}
SHAPES = {"unet": (47, 52), "unet3": (5, 21, 26), "dilated": (33, 40), "strided": (41, 46)}
N_CHANNELS = {"dilated": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file per network, and StarDist models with classes."""
    path = tmp_path_factory.mktemp("networks")
    for name, network in NETWORKS.items():
        network().save(path / f"{name}.keras")
    star = {"n_rays": 16, "unet_n_depth": 1, "n_classes": 2}
    save_network(path, "classes", 2, star | {"grid": (2, 4)}, 6)
    rebalance_classes(path / "classes")
    save_network(path, "nuclei", 2, star | {"grid": (2, 2), "n_classes": None}, 6)
    return path


def rebalance_classes(path):
    """Let a random StarDist network find all classes."""
    network = models.load(path).keras_model
    layer = network.get_layer("prob_class")
    features = keras.Model(network.inputs[0], layer.input)
    seen = features(normalized(image_of((48, 48)))[np.newaxis, ..., np.newaxis]).numpy()
    kernel, _ = layer.get_weights()
    scores = seen.reshape(-1, kernel.shape[-2]) @ kernel.reshape(kernel.shape[-2:])
    layer.set_weights([kernel / scores.std(axis=0), -scores.mean(axis=0) / scores.std(axis=0)])
    network.save_weights(str(path / "weights_best.h5"))


def volume(name, seed=0):
    """Return an image for a network, with channels last if there are several, from 0 to 1."""
    channels = (N_CHANNELS[name],) if name in N_CHANNELS else ()
    return np.random.default_rng(seed).random((*SHAPES[name], *channels), np.float32)


@pytest.fixture(scope="module")
def untiled(folder):
    """Keras' own prediction of the whole padded volume: classes, and where they are certain beyond rounding."""
    found = {}
    for name in NETWORKS:
        operator = Semantic(folder / f"{name}.keras", normalization=(0, 1))
        image = volume(name).reshape(*SHAPES[name], -1)
        seen = padded(image, operator._geometry.align)[np.newaxis]
        network = keras.saving.load_model(folder / f"{name}.keras", compile=False)
        scores = network.predict(seen, verbose=0)[0][tuple(slice(n) for n in SHAPES[name])]
        labels, margin = labels_of(scores)
        assert len(np.unique(labels)) == max(scores.shape[-1], 2)  # every class occurs
        found[name] = labels, margin > 1e-5
        assert found[name][1].mean() > 0.999
    return found


def assert_same(labels, expected):
    expected, certain = expected
    assert labels.dtype == np.uint8
    assert labels.shape == expected.shape
    np.testing.assert_array_equal(labels[certain], expected[certain])


@st.composite
def chunkings(draw, shape):
    """Chunks of any lengths, some of a single voxel."""
    chunks = []
    for n in shape:
        cuts = draw(st.sets(st.integers(1, n - 1), max_size=3)) if n > 1 else set()
        edges = [0, *sorted(cuts), n]
        chunks.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return tuple(chunks)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tiled_equals_what_keras_predicts_untiled(name, data, folder, untiled):
    chunks = data.draw(chunkings(SHAPES[name]))
    channels = ((1,) * N_CHANNELS[name],) if name in N_CHANNELS else ()
    image = da.from_array(volume(name), chunks=(*chunks, *channels))
    axes = "zyx"[3 - len(SHAPES[name]) :] + "c" * len(channels)
    lazy = classify(image, folder / f"{name}.keras", normalization=(0, 1), axes=axes)
    assert (lazy.chunks, lazy.dtype) == (chunks, np.uint8)
    assert_same(lazy.compute(scheduler="sync"), untiled[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_eager_is_what_keras_predicts(name, folder, untiled):
    operator = Semantic(folder / f"{name}.keras", normalization=(0, 1))
    assert_same(operator(volume(name)), untiled[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_receptive_field_ends_where_voxels_stop_to_matter(name, folder):
    network = positive(NETWORKS[name](final=None))
    config = keras_files.config(folder / f"{name}.keras")
    geometry = keras_geometry(config.description, config.n_dim, config.n_channel_in)
    align = geometry.needs.align
    # So long that the changed voxel and its surroundings are far from the borders.
    cells = [2 * d // a + 3 for d, a in zip(geometry.needs.depth, align, strict=True)]
    shape = tuple(n * a for n, a in zip(cells, align, strict=True))
    centre = [n // 2 // a * a for n, a in zip(shape, align, strict=True)]
    dark = np.random.default_rng(1).random((1, *shape, config.n_channel_in)).astype(np.float32)
    furthest = np.zeros((len(shape), 2), int)
    network = keras.Model(network.inputs[0], network.outputs[0])
    before = network(dark).numpy()
    for offset in range(max(align)):
        at = [c + offset % a for c, a in zip(centre, align, strict=True)]
        bright = dark.copy()
        bright[(0, *at)] += 1000
        changed = (network(bright).numpy() != before).any(axis=(0, -1))
        for axis, (first, last) in enumerate(geometry.spans):
            others = tuple(k for k in range(changed.ndim) if k != axis)
            seen = np.flatnonzero(changed.any(axis=others))
            cell, place = np.divmod(seen, align[axis])
            assert (first[place] + cell * align[axis] <= at[axis]).all()
            assert (at[axis] <= last[place] + cell * align[axis]).all()
            reach = seen - at[axis]
            furthest[axis] = (
                np.minimum(furthest[axis, 0], reach.min()),
                np.maximum(furthest[axis, 1], reach.max()),
            )
    for axis, (first, last) in enumerate(geometry.spans):
        place = np.arange(align[axis])
        # As far as is claimed, and not one voxel less.
        assert furthest[axis].tolist() == [(place - last).min(), (place - first).max()]


@pytest.mark.parametrize(("kernel", "n_depth"), [(3, 1), (5, 2), (3, 3)])
def test_a_unet_has_the_geometry_known_in_closed_form(kernel, n_depth, tmp_path):
    from types import SimpleNamespace

    from keras import layers as of

    from chunkrestore.kernels.network import care_geometry

    one = x = keras_input((None, None), 1)
    skips = []
    for _ in range(n_depth):
        for _ in range(2):
            x = of.Conv2D(2, kernel, padding="same")(x)
        skips.append(x)
        x = of.MaxPooling2D()(x)
    for _ in range(2):
        x = of.Conv2D(2, kernel, padding="same")(x)
    for skip in reversed(skips):
        x = of.Concatenate()([skip, of.UpSampling2D()(x)])
        for _ in range(2):
            x = of.Conv2D(2, kernel, padding="same")(x)
    keras.Model(one, of.Conv2D(2, 1)(x)).save(tmp_path / "care.keras")
    config = keras_files.config(tmp_path / "care.keras")
    known = care_geometry(SimpleNamespace(n_dim=2, unet_n_depth=n_depth, unet_kern_size=kernel))
    assert keras_geometry(config.description, 2, 1).needs == known


def test_descriptions_of_keras_2_are_understood():
    def layer(kind, name, *nodes, **config):
        return {
            "class_name": kind,
            "config": config | {"name": name},
            "name": name,
            "inbound_nodes": list(nodes),
        }

    description = {
        "class_name": "Functional",
        "config": {
            "layers": [
                layer("InputLayer", "in", batch_input_shape=[None, None, None, 1]),
                layer(
                    "Conv2D",
                    "c",
                    [["in", 0, 0, {}]],
                    filters=3,
                    kernel_size=[3, 3],
                    strides=[2, 2],
                    padding="same",
                ),
                layer("BatchNormalization", "b", [["c", 0, 0, {}]], axis=[3]),
                layer("UpSampling2D", "u", [["b", 0, 0, {}]], size=[2, 2], interpolation="nearest"),
                layer("Concatenate", "j", [["u", 0, 0, {}], ["in", 0, 0, {}]], axis=-1),
            ],
            "input_layers": [["in", 0, 0]],
            "output_layers": [["j", 0, 0]],
        },
    }
    geometry = keras_geometry(description, 2, 1)
    assert (geometry.needs.align, geometry.n_channels) == ((2, 2), 4)
    # "Same" with stride 2 puts its zero behind: an output sees its own two voxels and the next one.
    assert [bounds.tolist() for bounds in geometry.spans[0]] == [[0, 0], [2, 2]]


def test_hdf5_and_models_saved_for_one_size_give_the_same(tmp_path, folder, untiled):
    network = keras.saving.load_model(folder / "unet.keras", compile=False)
    network.save(tmp_path / "unet.h5")
    fixed = unet(size=48)
    fixed.set_weights(network.get_weights())
    fixed.save(tmp_path / "fixed.keras")
    for path in (tmp_path / "unet.h5", tmp_path / "fixed.keras"):
        assert_same(Semantic(path, normalization=(0, 1))(volume("unet")), untiled["unet"])


@pytest.mark.parametrize("by", ["objects", "voxels"])
def test_classes_of_stardist_are_those_of_its_own_prediction(by, folder):
    data = image_of((61, 68), seed=4)
    model = models.load(folder / "classes")
    if by == "objects":
        instances, details = model.predict_instances(
            normalized(data), prob_thresh=0.6, nms_thresh=0.3, n_tiles=None
        )
        expected = np.concatenate([[0], details["class_id"]])[instances]
    else:
        _, _, scores = model.predict(normalized(data))
        grid = scores.argmax(axis=-1)
        nearest = [
            # Of two points that are equally near, `argmin` takes the first.
            np.abs(np.arange(n)[:, np.newaxis] - np.arange(m) * g).argmin(axis=1)
            for n, m, g in zip(data.shape, grid.shape, (2, 4), strict=True)
        ]
        expected = grid[np.ix_(*nearest)]
    assert set(np.unique(expected)) == {0, 1, 2}
    parameters = {"by": by, "normalization": NORMALIZATION} | (
        {"prob_thresh": 0.6} if by == "objects" else {}
    )
    whole = classify(data, folder / "classes", **parameters)
    np.testing.assert_array_equal(whole, expected)
    for chunks in ((20, 23), ((7, 54), (1, 30, 37))):
        lazy = classify(da.from_array(data, chunks=chunks), folder / "classes", **parameters)
        np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)
        assert lazy.dtype == whole.dtype == np.uint8


def test_the_probability_of_a_class_is_an_image_in_a_job(tmp_path, folder):
    data = volume("unet")
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(1, 1))
    operator = ClassProbability(folder / "unet.keras", label=2, normalization=(0, 1))
    cr.run(operator, image, tmp_path / "out.zarr", block_shape=(12, 13), **SERIAL)
    found = cr.open_image(tmp_path / "out.zarr").data.compute()
    network = keras.saving.load_model(folder / "unet.keras", compile=False)
    seen = padded(data[..., np.newaxis], operator.halo(data.shape).align)
    expected = network.predict(seen[np.newaxis], verbose=0)[0][: data.shape[0], : data.shape[1], 2]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    with pytest.raises(ValueError, match="`label` 3 is no class"):
        ClassProbability(folder / "unet.keras", label=3)


def test_objects_are_the_default_of_a_model_that_finds_them(folder):
    assert isinstance(classifier(folder / "classes"), StarDistClasses)
    assert isinstance(classifier(folder / "classes", by="voxels"), Semantic)
    assert isinstance(classifier(folder / "unet.keras"), Semantic)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_job_writes_valid_labels_with_the_names_of_classes(version, tmp_path, folder, untiled):
    data = volume("dilated")
    image = cr.write_image(
        np.moveaxis(data, -1, 0), tmp_path / "in.zarr", axes="cyx", voxel_size=(1, 1), version=version
    )
    operator = Semantic(folder / "dilated.keras", normalization=(0, 1), class_names=["tissue"])
    report = cr.run(operator, image, image.path, label_name="classes", block_shape=(16, 20), **SERIAL)
    labels = cr.open_image(image.path).label("classes")
    assert_same(labels.data.compute(), untiled["dilated"])
    assert labels.axes == "yx"
    assert labels.ome["image-label"]["properties"] == [{"label-value": 1, "class": "tissue"}]
    assert_valid(Path(image.path))
    assert report.n_objects is None
    assert report.plan["passes"][0]["levels"][0] == [33, 40]


def test_percentiles_are_those_of_every_whole_channel(tmp_path, folder):
    data = np.moveaxis(volume("dilated"), -1, 0) * np.array([100, 3000], np.float32).reshape(2, 1, 1)
    image = cr.write_image(data, tmp_path / "in.zarr", axes="cyx", voxel_size=(1, 1))
    operator = Semantic(folder / "dilated.keras")
    (described,) = cr.run(operator, image, image.path, block_shape=(16, 20), **SERIAL).operators
    limits = [list(np.percentile(channel, (1, 99.8))) for channel in data]
    np.testing.assert_allclose(described["normalization"], limits)
    labels = cr.open_image(image.path).label("labels").data.compute()
    np.testing.assert_array_equal(labels, operator(np.moveaxis(data, 0, -1)))
    lazy = classify(da.from_array(data, chunks=(1, 30, 9)), folder / "dilated.keras", axes="cyx")
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), labels)


def test_instances_have_classes_in_their_properties_and_table(tmp_path, folder):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra tables")
    data = image_of((61, 66), seed=4)
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(1, 1))
    operator = cr.StarDist(
        folder / "classes", prob_thresh=0.6, normalization=NORMALIZATION, class_names=["round", "long"]
    )
    cr.run(operator, image, image.path, block_shape=(20, 24), objects="table", **SERIAL)
    labels = cr.open_image(image.path).label("labels")
    instances, details = models.load(folder / "classes").predict_instances(
        normalized(data), prob_thresh=0.6, nms_thresh=0.3, n_tiles=None
    )
    # Every object shows in the same voxels under another id.
    pairs = np.unique(np.stack([labels.data.compute().ravel(), instances.ravel()]), axis=1).T[1:].tolist()
    expected = {ours: int(details["class_id"][theirs - 1]) for ours, theirs in pairs}
    assert len(expected) == len(pairs) > 10
    told = {p["label-value"]: p["class_id"] for p in labels.ome["image-label"]["properties"]}
    assert told == expected
    names = {p["class_id"]: p["class"] for p in labels.ome["image-label"]["properties"]}
    assert names.items() <= {0: "background", 1: "round", 2: "long"}.items()
    table = parquet.read_table(tmp_path / "in.zarr" / "labels" / "labels" / "objects.parquet").to_pydict()
    assert dict(zip(table["label"], table["class_id"], strict=True)) == expected
    chances = np.stack([table[f"class_probability_{k}"] for k in range(3)], axis=-1)
    order = [theirs - 1 for _, theirs in sorted(pairs)]
    np.testing.assert_allclose(chances, details["class_prob"][order], atol=1e-6)
    assert_valid(Path(image.path))


def test_classes_of_objects_in_a_job(tmp_path, folder):
    data = image_of((61, 66), seed=4)
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(1, 1))
    operator = StarDistClasses(folder / "classes", prob_thresh=0.6, class_names=["round", "long"])
    cr.run(operator, image, image.path, block_shape=(20, 24), **SERIAL)
    labels = cr.open_image(image.path).label("labels")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels.data.compute(), operator(data))
    names = {p["label-value"]: p["class"] for p in labels.ome["image-label"]["properties"]}
    assert names == {1: "round", 2: "long"}
    with pytest.raises(ValueError, match="`objects` 'table' is for labels of objects"):
        cr.run(operator, image, image.path, label_name="b", objects="table", **SERIAL)


@pytest.fixture(scope="module")
def disk():
    return Disk()


def test_a_killed_job_goes_on_and_ends_the_same(tmp_path, folder, untiled, disk):
    name = "unet"
    source = cr.write_image(volume(name), tmp_path / "in.zarr", axes="yx", voxel_size=(1, 1))
    output = tmp_path / "o" / "out.zarr"
    output.parent.mkdir()
    operator = Semantic(folder / f"{name}.keras", normalization=(0, 1))
    run = {"label_name": "classes", "block_shape": (12, 13), **SERIAL}
    with disk.dies_after(60, tmp_path / "o"), suppress(Killed):
        cr.run(operator, source, output, **run)
    assert not (output / "labels" / "zarr.json").exists()
    bury(output)
    report = cr.resume(output, cluster="serial", quiet=True)
    assert 0 < report.n_resumed < 16
    labels = cr.open_image(output / "labels" / "classes")
    assert_same(labels.data.compute(), untiled[name])


def test_the_command_line_and_pipeline_files(tmp_path, folder, untiled):
    from chunkrestore.cli import cli
    from chunkrestore.pipeline import read_pipeline

    source = tmp_path / "in.zarr"
    cr.write_image(volume("unet"), source, axes="yx", voxel_size=(1, 1))
    network = folder / "unet.keras"
    words = [
        "--method",
        "semantic",
        "--name",
        "tissue",
        "--normalization",
        "0",
        "1",
        "--cluster",
        "serial",
        "-q",
    ]
    names = ["--class-name", "bone", "--class-name", "fat"]
    cli(["segment", str(source), "--model", str(network), *words, *names], standalone_mode=False)
    labels = cr.open_image(source).label("tissue")
    assert_same(labels.data.compute(), untiled["unet"])
    assert [p["class"] for p in labels.ome["image-label"]["properties"]] == ["bone", "fat"]
    step = {
        "operator": "semantic",
        "model": str(network),
        "normalization": [0, 1],
        "class_names": ["bone", "fat"],
    }
    document = {"input": "in.zarr", "output": "out.zarr", "steps": [step]}
    (tmp_path / "p.yaml").write_text(json.dumps(document))
    (operator,), *_ = read_pipeline(tmp_path / "p.yaml")
    assert operator == Semantic(network, normalization=(0, 1), class_names=("bone", "fat"))


def saved(path, *layers, n_in=1, **of):
    """Save a network of layers one after the other."""
    one = x = keras_input((None, None), n_in)
    for layer in layers:
        x = layer(x)
    keras.Model(one, x).save(path)
    return path


def test_layers_that_look_at_the_whole_volume_are_refused_by_name(tmp_path):
    from keras import layers as of

    refused = {
        "GlobalAveragePooling": of.GlobalAveragePooling2D(keepdims=True, name="squeeze"),
        "GroupNormalization": of.GroupNormalization(1, name="squeeze"),
        "LayerNormalization": of.LayerNormalization(axis=(1, 2), name="squeeze"),
    }
    for kind, layer in refused.items():
        path = tmp_path / f"{kind}.keras"
        one = keras_input((16, 16), 2)
        keras.Model(one, of.Conv2D(2, 1)(of.Multiply()([one, layer(one)]))).save(path)
        with pytest.raises(ValueError, match=rf"layer 'squeeze' \({kind}\)"):
            Semantic(path)
    own = Semantic(tmp_path / "GroupNormalization.keras", depth=8, align=4, class_names=["a"])
    assert own.halo((64, 64)).depth == (8, 8)


def test_what_has_not_one_output_per_voxel_is_refused(tmp_path):
    from keras import layers as of

    cases = {
        "one element per 2 voxels": [of.Conv2D(2, 3, strides=2, padding="same")],
        "and -2 more": [of.Conv2D(2, 3)],
        "one element per 1/2 voxels": [of.UpSampling2D(), of.Conv2D(2, 1)],
    }
    for number, (message, layers) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=message):
            Semantic(saved(tmp_path / f"{number}.keras", *layers))
    one = keras_input((None, None), 1)
    two = [of.Conv2D(2, 1)(one), of.Conv2D(2, 1)(one)]
    keras.Model(one, two).save(tmp_path / "two.keras")
    with pytest.raises(ValueError, match="2 outputs; save one that ends in the classes"):
        Semantic(tmp_path / "two.keras")


@keras.saving.register_keras_serializable("lab")
class Own(keras.layers.Layer):
    def call(self, x):
        return x


def test_code_in_files_is_never_run(tmp_path):
    from keras import layers as of

    lambdas = saved(tmp_path / "lambda.keras", of.Lambda(lambda x: x * 2), of.Conv2D(2, 1))
    with pytest.raises(
        ValueError, match=r"'Lambda' .*code from files is never run; replace it by layers of Keras"
    ):
        Semantic(lambdas, depth=1, align=1, class_names=["a"])
    with pytest.raises(ValueError, match=r"'lab>Own' of module .*which is not Keras' own"):
        Semantic(saved(tmp_path / "own.keras", Own(), of.Conv2D(2, 1)))
    # A module that would be imported, where a class is expected.
    path = saved(tmp_path / "module.keras", of.Conv2D(2, 1))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b'"keras.initializers"', b'"os.path"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"of module 'os\.path'"):
        Semantic(path)


def test_files_that_are_no_models_are_refused(tmp_path):
    for name, content in {"a.keras": b"PK", "b.h5": b"\x89HDF", "c.keras": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`model` .*{name} is no model that Keras has saved"):
            Semantic(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        Semantic(tmp_path / "none.keras")


@pytest.mark.parametrize(
    ("network", "parameters", "message"),
    [
        ("nuclei", {}, "knows no classes"),
        ("unet.keras", {"class_names": ["a"]}, "`class_names` .* must be 2 names"),
        ("unet.keras", {"class_names": "ab"}, "`class_names` 'ab' must be 2 names"),
        ("unet.keras", {"depth": 3}, "`depth` 3 is less than what the network looks at"),
        ("unet.keras", {"align": 4}, "`align` 4 needs `depth`"),
        ("unet.keras", {"threshold": np.nan}, "`threshold` must be finite"),
        ("unet.keras", {"by": "objects"}, "`by` must be 'voxels' or, with a StarDist model"),
        ("unet.keras", {"scale": 2.0}, "`scale` is no parameter of semantic"),
        ("classes", {"class_names": ["a"]}, "`class_names` .* must be 2 names"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(network, parameters, message, folder):
    with pytest.raises(ValueError, match=message):
        classifier(folder / network, **parameters)


def test_images_that_do_not_fit_are_refused(tmp_path, folder):
    operator = Semantic(folder / "dilated.keras", normalization=(0, 1))
    with pytest.raises(ValueError, match="works on axes yx but the image has 3 spatial axes"):
        operator.check((9, 9, 9), np.dtype("uint16"))
    with pytest.raises(ValueError, match="has shape"):
        operator(np.zeros((30, 30, 3), np.uint16))
    image = cr.write_image(
        np.zeros((3, 20, 20), np.uint8), tmp_path / "in.zarr", axes="cyx", voxel_size=(1, 1)
    )
    with pytest.raises(ValueError, match="semantic takes 2 channels together, but the image has 3"):
        cr.run(operator, image, image.path, **SERIAL)
    unresolved = Semantic(folder / "unet.keras")
    with pytest.raises(ValueError, match="`normalization` is not decided"):
        unresolved(np.zeros((40, 40), np.uint8), Block.whole((40, 40)))

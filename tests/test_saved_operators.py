"""Operators that are saved describe themselves as before, and nothing else can be made of their files."""

import inspect
import io
import json
import shutil
import sys
import zipfile
from dataclasses import dataclass, is_dataclass, replace
from importlib import import_module
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkrestore import models, operators
from chunkrestore.operators import saved as saved_module
from chunkrestore.operators.base import Operator
from chunkrestore.operators.care import Care
from chunkrestore.operators.gradient_consensus import GradientConsensus
from chunkrestore.operators.methods import METHODS, deconvolution
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.operators.saved import NotSavableError, load_operators, save_operators
from chunkrestore.operators.stardist import StarDist
from chunkrestore.operators.threshold import Threshold
from chunkrestore.operators.unmatched import UnmatchedRichardsonLucy
from chunkrestore.operators.wiener import Wiener
from chunkrestore.psf import gaussian
from chunkrestore.psf.varying import PsfField

PSF = gaussian((1.5, 1.0, 1.0))
MASK = np.random.default_rng(1).random((5, 7, 9)) < 0.8
DECISION = {
    "iterations": 7,
    "curve": [3.5, 2.0],
    "regularization": 0.25,
    "signal_to_noise": None,
    "stopped": "after 7 of 10",
    "regions": [[[0, 5], [0, 7], [0, 9]]],
}


def saved_and_loaded(folder, *operators):
    folder.mkdir(parents=True, exist_ok=True)
    save_operators(operators, folder)
    return load_operators(folder)


def check_same(folder, operator):
    """Save and load an operator; it is the same, from its description down to the bytes of its arrays."""
    (loaded,) = saved_and_loaded(folder, operator)
    assert type(loaded) is type(operator)
    assert isinstance(loaded, Operator)
    assert dict(loaded.describe()) == dict(operator.describe())
    assert json.dumps(dict(loaded.describe())) == json.dumps(dict(operator.describe()))
    assert loaded == operator
    assert loaded.needs == operator.needs
    return loaded


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "psf", [PSF, PSF.astype(">f8") * 7, np.asfortranarray(PSF), gaussian((2.0, 1.0))], ids=str
)
def test_every_deconvolution_method_survives(tmp_path, method, psf):
    loaded = check_same(tmp_path, deconvolution(method, psf))
    original = deconvolution(method, psf)
    assert loaded.psf.dtype == original.psf.dtype
    assert loaded.psf.tobytes() == original.psf.tobytes()


_OPTIONAL = st.one_of(st.none(), st.floats(0.5, 1e4))
_ITERATIVE = {
    "iterations": st.integers(1, 50),
    "background": st.floats(0, 0.25),
    "tolerance": st.floats(1e-6, 0.5),
    "depth": st.one_of(st.none(), st.integers(0, 40), st.tuples(*[st.integers(0, 40)] * 3)),
    "start": _OPTIONAL,
    "saturation": _OPTIONAL,
    "missing": st.one_of(st.none(), st.floats(-1e4, 1e4), st.integers(0, 255).map(np.uint8)),
    "stop": st.sampled_from([None, "i-divergence", "split-data"]),
    "gain": st.floats(0.01, 100).map(np.float32),
    "mask": st.sampled_from([None, MASK, MASK.astype(np.uint8), array_api_strict.asarray(MASK)]),
    "decision": st.sampled_from([None, DECISION]),
}
_CASES = st.one_of(
    st.tuples(
        st.just(RichardsonLucy),
        st.fixed_dictionaries(
            _ITERATIVE
            | {
                "acceleration": st.sampled_from(["heavy-ball", None]),
                "total_variation": st.floats(0, 0.1),
                "voxel_size": st.one_of(st.none(), st.tuples(*[st.floats(0.01, 10)] * 3), st.just([1, 2, 3])),
            }
        ),
    ),
    st.tuples(
        st.just(GradientConsensus),
        st.fixed_dictionaries(_ITERATIVE | {"seed": st.integers(0, 2**62)}),
    ),
    st.tuples(
        st.just(UnmatchedRichardsonLucy),
        st.fixed_dictionaries(
            _ITERATIVE
            | {
                "back_projector": st.sampled_from(["wiener-butterworth", "masked-wiener"]),
                "regularization": st.one_of(st.none(), st.floats(1e-5, 1)),
            }
        ),
    ),
    st.tuples(
        st.just(Wiener),
        st.fixed_dictionaries(
            {
                "regularization": st.one_of(st.none(), st.floats(1e-4, 0.5)),
                "prior": st.sampled_from(["constant", "laplacian"]),
                "non_negative": st.booleans(),
                "voxel_size": st.one_of(st.none(), st.tuples(*[st.floats(0.01, 10)] * 3)),
                "background": st.floats(0, 100).map(np.float64),
            }
        ),
    ),
)


@settings(max_examples=100)
@given(_CASES)
def test_parameters_survive(tmp_path_factory, case):
    cls, parameters = case
    loaded = check_same(tmp_path_factory.getbasetemp() / "parameters", cls(PSF, **parameters))
    if parameters.get("mask") is not None:
        np.testing.assert_array_equal(loaded.mask, MASK)
        assert loaded.mask.dtype == np.bool_


@given(value=st.one_of(st.none(), st.floats(-1e6, 1e6), st.integers(0, 999)), connectivity=st.integers(1, 3))
def test_thresholds_survive(tmp_path_factory, value, connectivity):
    check_same(tmp_path_factory.getbasetemp() / "threshold", Threshold(value, connectivity))


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    (loaded,) = saved_and_loaded(tmp_path, Threshold(np.float32(0.1), np.int64(2)))
    assert (loaded.value, loaded.connectivity) == (float(np.float32(0.1)), 2)


@pytest.mark.parametrize("name", ["care", "stardist"])
@pytest.mark.parametrize("place", ["shipped", "folder"])
def test_networks_survive_by_place_and_digest(tmp_path, name, place):
    shipped, cls = {"care": ("care3d-demo", Care), "stardist": ("stardist3d-demo", StarDist)}[name]
    model = shipped if place == "shipped" else shutil.copytree(models.folder(shipped), tmp_path / "model")
    for parameters in ({}, {"normalization": (1.5, 300), "percentiles": (1, 99)}, {"depth": 200}):
        loaded = check_same(tmp_path / "saved", cls(model, **parameters))
        assert loaded.digest == models.digest(model)
        assert loaded.model == models.reference(model)


def test_a_model_that_has_changed_or_gone_is_told(tmp_path):
    model = shutil.copytree(models.folder("care3d-demo"), tmp_path / "model")
    save_operators([Care(model)], tmp_path)
    with (model / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"`model` .* is not the expected one: its digest begins with"):
        load_operators(tmp_path)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=r"operator 0 cannot be made.*`model` .*model' does not exist"):
        load_operators(tmp_path)


@pytest.mark.parametrize("method", ["richardson-lucy", "gradient-consensus"])
@pytest.mark.parametrize("positions", [[(0, 0, 0), (30, 0, 0)], [(0.5, 1, 2), (3, 40.25, 1)]])
def test_point_spread_functions_that_change_with_position_survive(tmp_path, method, positions):
    field = PsfField([gaussian((1.5, 1.0, 1.0)), gaussian((2.5, 1.0, 1.2))], positions)
    loaded = check_same(tmp_path, deconvolution(method, field))
    assert loaded.psf.digest == field.digest
    assert loaded.psf.positions == field.positions
    assert all(a.tobytes() == b.tobytes() for a, b in zip(loaded.psf.psfs, field.psfs, strict=True))


def test_results_are_the_same(tmp_path):
    image = np.random.default_rng(2).poisson(30, MASK.shape).astype(np.uint16)
    for operator in (RichardsonLucy(PSF, 3, mask=MASK, background=2.0), Wiener(PSF), Threshold()):
        (loaded,) = saved_and_loaded(tmp_path, operator)
        np.testing.assert_array_equal(loaded(image), operator(image))


@pytest.mark.parametrize("inside", ["", "labels/observed"])
def test_a_stored_mask_is_kept_as_its_place(tmp_path, inside):
    import zarr

    root = tmp_path / "mask.zarr"
    where = {"name": inside} if inside else {}
    stored = zarr.create_array(root, shape=MASK.shape, chunks=(5, 4, 4), dtype=bool, **where)
    stored[...] = MASK
    mask = zarr.open_group(root, mode="r")[inside] if inside else stored
    loaded = check_same(tmp_path / "saved", RichardsonLucy(PSF, 2, mask=mask))
    np.testing.assert_array_equal(loaded.mask[...], MASK)
    with pytest.raises(Exception, match="read-only"):
        loaded.mask[...] = True
    # Its place is short, however large the mask.
    assert (tmp_path / "saved/operators.npz").stat().st_size < PSF.nbytes + 1000


def test_a_relative_path_to_a_stored_mask_becomes_absolute(tmp_path, monkeypatch):
    import zarr

    monkeypatch.chdir(tmp_path)
    zarr.create_array("mask.zarr", shape=MASK.shape, chunks=(5, 4, 4), dtype=bool)
    save_operators([RichardsonLucy(PSF, 2, mask=zarr.open_array(tmp_path / "mask.zarr"))], tmp_path)
    monkeypatch.chdir("/")
    assert load_operators(tmp_path)[0].mask.shape == MASK.shape


def test_every_operator_of_the_package_can_be_saved():
    found = set()
    for path in Path(operators.__file__).parent.glob("*.py"):
        module = import_module(f"chunkrestore.operators.{path.stem}")
        members = inspect.getmembers(module, inspect.isclass)
        found |= {name for name, cls in members if is_dataclass(cls) and hasattr(cls, "describe")}
    helpers = {"Calibration", "Deconvolution", "IterativeDeconvolution"}
    assert found - helpers == set(saved_module._MODULES)


def test_chains_keep_their_order_and_arrays(tmp_path):
    several = [
        RichardsonLucy(PSF, 4, mask=MASK),
        Wiener(gaussian((2.0, 1.0, 1.0))),
        RichardsonLucy(gaussian((1.0, 1.0, 1.0)), 5, mask=~MASK),
        Threshold(3.0),
    ]
    assert saved_and_loaded(tmp_path, *several) == several
    assert saved_and_loaded(tmp_path) == []


# --- what cannot be saved ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(Threshold):
    """An operator that some script defines, under the name of one of ours or another."""


def lazy_mask():
    import dask.array as da

    return da.from_array(MASK, chunks=4)


def mask_in_memory_store():
    import zarr

    return zarr.create_array({}, shape=MASK.shape, chunks=(5, 4, 4), dtype=bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mine(), "operator 'threshold' is of class Mine, which is not one of RichardsonLucy"),
        (lambda: RichardsonLucy(PSF, mask=lazy_mask()), "`mask` of operator 'richardson-lucy' holds dask"),
        (
            lambda: RichardsonLucy(PSF, mask=mask_in_memory_store()),
            "`mask` of operator 'richardson-lucy' holds <Array memory",
        ),
        (
            lambda: replace(Wiener(PSF), decision={"signal_to_noise": np.inf}),
            "`decision` of operator 'wiener' holds inf, which cannot be saved",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_and_named(tmp_path, make, message):
    with pytest.raises(NotSavableError, match=message) as caught:
        save_operators([Threshold(), make()], tmp_path)
    assert isinstance(caught.value, TypeError)
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_only_bears_the_name_is_refused(tmp_path):
    with pytest.raises(NotSavableError, match="is of class"):
        save_operators([type("Threshold", (Threshold,), {})()], tmp_path)


# --- files that were damaged or tampered with --------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with saved operators, and a function that changes their JSON."""
    shutil.copytree(models.folder("care3d-demo"), tmp_path / "model")
    save_operators([RichardsonLucy(PSF, 3, mask=MASK), Care(tmp_path / "model")], tmp_path)
    path = tmp_path / "operators.json"

    def change(edit):
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return tmp_path, change


def entry(position, key, value):
    return lambda document: document["operators"][position].__setitem__(key, value)


def field(position, name, value):
    return lambda document: document["operators"][position]["fields"].__setitem__(name, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (entry(0, "class", "Popen"), "class 'Popen' is not one of RichardsonLucy"),
        (entry(0, "class", "IterativeDeconvolution"), "class 'IterativeDeconvolution' is not one of"),
        (entry(0, "class", "os.system"), "class 'os.system' is not one of"),
        (entry(0, "class", ["Wiener"]), "operator 0 cannot be made"),
        (entry(0, "fields", None), "operator 0 cannot be made"),
        (field(0, "command", "true"), "RichardsonLucy has the fields"),
        (field(0, "__class__", "Wiener"), "RichardsonLucy has the fields"),
        (field(0, "psf", {"pickle": "gASVBQ=="}), "unknown kind of value 'pickle'"),
        (field(0, "psf", {"array": "../../other"}), "KeyError"),
        (field(0, "psf", {"array": "0", "tuple": []}), "ValueError"),
        (field(0, "psf", "psf.tif"), "must be an array of real numbers"),
        (field(0, "iterations", "many"), "`iterations` must be a whole number"),
        (field(0, "iterations", 4), "describes itself differently"),
        (field(0, "mask", None), "describes itself differently"),
        (field(0, "mask", {"bits": ["1", 2**40, 2**40]}), "array 1 is too short"),
        (field(0, "mask", {"bits": ["1", -5, -7]}), "operator 0 cannot be made"),
        (field(0, "mask", {"stored": ["http://127.0.0.1:1/mask.zarr", ""]}), "must be an absolute path"),
        (field(0, "mask", {"stored": ["mask.zarr", ""]}), "must be an absolute path"),
        (field(0, "mask", {"stored": ["/", "../etc"]}), "leaves its group"),
        (field(0, "decision", {"mapping": [1]}), "operator 0 cannot be made"),
        (field(1, "model", "model"), "`model` 'model' is neither an absolute folder nor a shipped"),
        (field(1, "model", "~/model"), "is neither an absolute folder"),
        (field(1, "model", "s3://bucket/model"), "is neither an absolute folder"),
        (field(1, "model", {"mapping": {}}), "is neither an absolute folder"),
        (field(1, "model", "care3d-demo"), "describes itself differently"),
        (field(1, "depth", 0), "`depth` 0 is less than"),
        (lambda document: document.pop("operators"), "cannot be read"),
        (lambda document: document.update(schema=2), "schema 2; this version reads 1"),
        (lambda document: document.update(operators=3), "cannot be read"),
    ],
)
def test_tampered_json_is_an_error_and_nothing_else(saved, edit, message):
    folder, change = saved
    change(edit)
    with pytest.raises(ValueError, match=message):
        load_operators(folder)


def test_a_digest_that_was_taken_out_lets_no_other_model_in(saved):
    folder, change = saved
    change(field(1, "digest", None))
    assert [operator.name for operator in load_operators(folder)] == ["richardson-lucy", "care"]
    with (folder / "model/config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="describes itself differently"):
        load_operators(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b"9" * 5000])
def test_what_is_no_json_of_ours_is_an_error(saved, text):
    folder, _ = saved
    (folder / "operators.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"cannot be read: .*; start the job from its script"):
        load_operators(folder)


class Bomb:
    """Exists only to show that it is never unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def npz_with(save, **arrays):
    content = io.BytesIO()
    save(content, **arrays)
    return content.getvalue()


def claiming(shape):
    """Return an npz whose array claims to be larger than it is."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("0.npy", header.getvalue())
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        npz_with(np.savez, **{"0": np.array([Bomb()], dtype=object), "1": np.packbits(MASK)}),
        npz_with(np.savez_compressed, **{"0": np.zeros((400, 400)), "1": np.packbits(MASK)}),
        claiming((2**40, 2**10)),
        claiming((2**24,)),
        b"no archive",
        b"",
    ],
    ids=["pickle", "compressed", "huge", "short", "text", "empty"],
)
def test_npz_files_that_are_not_ours_are_errors(saved, content):
    folder, _ = saved
    (folder / "operators.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"operators\.json cannot be read"):
        load_operators(folder)


def test_other_bytes_of_a_point_spread_function_are_noticed(saved):
    folder, _ = saved
    changed = npz_with(np.savez, **{"0": gaussian((1.5, 1.0, 1.001)), "1": np.packbits(MASK)})
    (folder / "operators.npz").write_bytes(changed)
    with pytest.raises(ValueError, match="describes itself differently"):
        load_operators(folder)


def test_without_either_file_there_is_no_way_to_go_on(saved):
    folder, _ = saved
    (folder / "operators.npz").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_operators(folder)
    (folder / "operators.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_operators(folder)


def test_an_interrupted_save_leaves_no_mixture(saved, monkeypatch):
    """Killed before any of its changes to files: the old pair, none, or the new pair."""
    folder, _ = saved
    old, new = load_operators(folder), [RichardsonLucy(gaussian((2.0, 1.0, 1.0)), 9)]
    counter = {"left": 0, "armed": False}

    class Killed(BaseException):
        pass

    def audit(event, arguments):
        if (
            counter["armed"]
            and event in ("open", "os.rename", "os.remove")
            and "operators." in str(arguments[0])
        ):
            if event == "open" and arguments[1] == "rb":
                return
            if counter["left"] == 0:
                raise Killed
            counter["left"] -= 1

    sys.addaudithook(audit)
    outcomes = []
    for left in range(6):
        save_operators(old, folder)
        counter.update(left=left, armed=True)
        try:
            save_operators(new, folder)
            outcomes.append("saved")
        except Killed:
            outcomes.append("killed")
        counter["armed"] = False
        if (folder / "operators.json").exists():
            assert load_operators(folder) in (old, new)
    assert outcomes == ["killed"] * 5 + ["saved"]

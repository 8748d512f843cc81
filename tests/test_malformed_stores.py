"""Stores that do not conform, or are damaged: an error that names file and key, or the right voxels. Never others.

What is made to harm is in ``test_hostile_stores.py``; what others versions ask for in ``test_ome_zarr_versions.py``.
"""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import zarr
from hostile import SHARDS, edit, honest, voxels

from chunkrestore.cli import main
from chunkrestore.ome_zarr import CorruptChunkError, info, open_image, write_image

KINDS = {"0.4": ("0.4", {}), "0.5": ("0.5", {}), "0.5 sharded": ("0.5", {"shards": SHARDS})}


@dataclass(frozen=True)
class Store:
    """An honest store of two levels and a label image, to be changed."""

    path: object
    version: str

    def ome(self, change):
        """Change the OME attributes of the group."""
        self.attributes(".", change)

    def attributes(self, member, change):
        file = self.path / member / (".zattrs" if self.version == "0.4" else "zarr.json")
        document = json.loads(file.read_text())
        change(document if self.version == "0.4" else document["attributes"]["ome"])
        file.write_text(json.dumps(document))

    def multiscale(self, change):
        self.ome(lambda ome: change(ome["multiscales"][0]))

    def array(self, member, **changes):
        """Change keys of an array's document."""
        for key, value in changes.items():
            edit(self.path / member / (".zarray" if self.version == "0.4" else "zarr.json"), key, to=value)

    def level(self, member, data):
        """Put another array in place of one."""
        shutil.rmtree(self.path / member)
        fmt = 2 if self.version == "0.4" else 3
        encoding = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} if fmt == 2 else {}
        zarr.create_array(self.path / member, data=np.ascontiguousarray(data), zarr_format=fmt, **encoding)

    @property
    def chunk(self):
        """The file of the first chunk or shard."""
        return self.path / ("0/0/0/0" if self.version == "0.4" else "0/c/0/0/0")


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    version, options = KINDS[request.param]
    return Store(honest(tmp_path / "image.zarr", version, **options), version)


def read(path):
    """Read every level of an image and of its labels."""
    image = open_image(path)
    info(image)
    for part in (image, *(image.label(name) for name in image.labels)):
        for k in range(len(part.levels)):
            reader = part.source(k)
            yield reader.read(0, 0, tuple(slice(0, n) for n in reader.spatial_shape))


def space(*names):
    return [{"name": name, "type": "space"} for name in names]


def axes(*described):
    return lambda s: s.multiscale(lambda m: m.update(axes=list(described)))


def steps(*transformations, level=1):
    return lambda s: s.multiscale(
        lambda m: m["datasets"][level].update(coordinateTransformations=list(transformations))
    )


def scale(*vector):
    return {"type": "scale", "scale": list(vector)}


def moved(*vector):
    return {"type": "translation", "translation": list(vector)}


def datasets(value):
    return lambda s: s.multiscale(lambda m: m.update(datasets=value))


def version(value):
    def change(s):
        holder = s.multiscale if s.version == "0.4" else s.ome
        holder(lambda document: document.update(version=value))

    return change


def coarse(change):
    """Replace level 1 by what `change` makes of all voxels."""
    return lambda s: s.level("1", change(voxels()))


def group_as_level(s):
    shutil.rmtree(s.path / "0")
    zarr.create_group(s.path / "0", zarr_format=2 if s.version == "0.4" else 3)


def without(name):
    return lambda s: shutil.rmtree(s.path / name)


CONFORM = r"image.zarr: `multiscales\[0\]{}` does not conform to OME-Zarr 0.[45]: "
REFUSED = {
    "level is missing": (without("1"), r"image.zarr/1, named by its group, is missing; copy"),
    "level is a group": (group_as_level, r"image.zarr/0, named by its group, is missing \(a group lies there\)"),
    "no axes": (lambda s: s.multiscale(lambda m: m.pop("axes")), CONFORM.format(".axes")),
    "axes are text": (lambda s: s.multiscale(lambda m: m.update(axes="zyx")), CONFORM.format(".axes")),
    "few axes": (axes(*space("y", "x")), "scale of level '0' has 3 numbers but there are 2 axes"),
    "one axis in space": (axes({"name": "t", "type": "time"}, {"name": "c", "type": "channel"}, *space("x")),
                          CONFORM.format(".axes")),
    "four axes in space": (axes(*space("w", "z", "y", "x")), "scale of level '0' has 3 numbers but there are 4"),
    "space first": (axes(*space("y", "x"), {"name": "c", "type": "channel"}),
                    CONFORM.format(".axes") + "All space axes"),
    "time second": (axes({"name": "c", "type": "channel"}, {"name": "t", "type": "time"}, *space("x")),
                    CONFORM.format(".axes")),
    "axes of one name": (axes(*space("z", "y", "y")), CONFORM.format(".axes") + "Axis names must be unique"),
    "axis without name": (axes({"type": "space"}, *space("y", "x")), CONFORM.format(r".axes\[0\].name")),
    "axis is a letter": (axes("z", *space("y", "x")), CONFORM.format(r".axes\[0\]")),
    "type is a number": (axes({"name": "z", "type": 3}, *space("y", "x")), CONFORM.format(r".axes\[0\].type")),
    "unit is no length": (axes({"name": "z", "type": "space", "unit": "second"}, *space("y", "x")),
                          "unit 'second' of a"),
    "no transformations": (lambda s: s.multiscale(lambda m: m["datasets"][1].pop("coordinateTransformations")),
                           CONFORM.format(r".datasets\[1\].coordinateTransformations")),
    "no scale": (steps(moved(1, 1, 1)), CONFORM.format(r".datasets\[1\].coordinateTransformations")),
    "two scales": (steps(scale(1, 1, 1), scale(1, 1, 1)), CONFORM.format(r".datasets\[1\].coordinateTransformations")),
    "rotation": (steps({"type": "rotation", "rotation": []}),
                 CONFORM.format(r".datasets\[1\].coordinateTransformations\[0\].type")),
    "translation first": (steps(moved(1, 1, 1), scale(1, 1, 1)),
                          "`coordinateTransformations` of level '1' list the translation before the scale"),
    "scale in a file": (steps({"type": "scale", "path": "s"}), "level '1' stores its scale in a file, which is not"),
    "long scale": (steps(scale(1, 1, 1, 1)), "scale of level '1' has 4 numbers but there are 3 axes"),
    "scale is a number": (steps({"type": "scale", "scale": 2}), "scale of level '1' has no numbers"),
    "zero scale": (steps(scale(1, 0, 1)), r"scale \[1, 0, 1\] of level '1' must hold finite numbers, a scale above 0"),
    "negative scale": (steps(scale(1, -1, 1)), r"scale \[1, -1, 1\] of level '1' must hold"),
    "NaN in a scale": (steps(scale(1, float("nan"), 1)), r"scale \[1, nan, 1\] of level '1' must hold"),
    "text in a scale": (steps(scale(1, "1", 1)), r"scale \[1, '1', 1\] of level '1' must hold"),
    "short translation": (steps(scale(1, 1, 1), moved(1)), "translation of level '1' has 1 numbers"),
    "NaN in a translation": (steps(scale(1, 1, 1), moved(0, 0, float("nan"))),
                             r"translation \[0, 0, nan\] of level '1'"),
    "scale of the multiscale": (lambda s: s.multiscale(lambda m: m.update(coordinateTransformations=[scale(1)])),
                                "scale of the multiscale has 1 numbers but there are 3 axes"),
    "no levels": (datasets([]), r"`multiscales\[0\].datasets` \[\] must be a list of at least one object"),
    "levels are text": (datasets("0"), r"`multiscales\[0\].datasets` '0' must be a list"),
    "levels are paths": (datasets(["0", "1"]), r"`multiscales\[0\].datasets` \['0', '1'\] must be a list"),
    "level without path": (datasets([{}]), r"`multiscales\[0\].datasets\[0\].path` None must be the path of an array"),
    "no multiscales": (lambda s: s.ome(lambda ome: ome.update(multiscales=[])), "`multiscales` is empty or no list"),
    "version of tomorrow": (version("0.7"), r"OME-Zarr `version` '0.7' \(zarr v[23]\) is not supported, only 0.1 to"),
    "version is no version": (version("x" * 10**6), "OME-Zarr `version` 'xxx.*' .* is not supported"),
    "version is a number": (version(0.7), r"OME-Zarr `version` 0.7 \(zarr v[23]\) is not supported"),
    "levels grow": (coarse(lambda v: np.repeat(v, 2, axis=1)),
                    r"`multiscales\[0\].datasets` grow on axis 'y': level '1' "
                    r"has 64, '0' before it 32; list the finest first"),
    "levels differ in dtype": (coarse(lambda v: v[:, ::2, ::2].astype("u1")),
                               r"levels differ in dtype \('0' uint16, '1' u"),
    "levels differ in axes": (coarse(lambda v: v[0]), "image.zarr/1 has 2 axes but its group names 3: 'zyx'"),
    "labels are floats": (lambda s: [s.level(f"labels/cells/{k}", voxels()[:, :: k + 1].astype("f4")) for k in (0, 1)]
                          + [s.attributes("labels/cells", lambda ome: ome.update({"image-label": {}}))],
                          r"labels/cells: labels are float32, but must be integers; write them again"),
    "labels are absent": (without("labels/cells"), r"image.zarr/labels/cells does not exist"),
    "array has no shape": (lambda s: s.array("0", shape=None), "image.zarr/0 cannot be opened: `shape` None"),
    "array has no codecs": (lambda s: s.array("0", **{"compressor" if s.version == "0.4" else "codecs": "none"}),
                            "image.zarr/0 cannot be opened: `(codecs|compressor)` .*'none'"),
    "array is cut": (lambda s: cut(s.path / "0" / (".zarray" if s.version == "0.4" else "zarr.json"), 20),
                     "is not valid JSON"),
    "group is cut": (lambda s: cut(s.path / (".zattrs" if s.version == "0.4" else "zarr.json"), 20),
                     "is not valid JSON"),
    "group is gone": (lambda s: (s.path / (".zgroup" if s.version == "0.4" else "zarr.json")).unlink(),
                      "image.zarr is a folder without zarr metadata"),
}  # fmt: skip


def cut(file, n):
    file.write_bytes(file.read_bytes()[:-n])


@pytest.mark.parametrize("case", REFUSED)
def test_store_that_does_not_conform_is_refused_with_file_and_key(case, store, capsys):
    change, message = REFUSED[case]
    change(store)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        list(read(store.path))
    said = str(caught.value)
    assert "image.zarr" in said
    assert "\n" not in said
    assert len(said) < 1000
    with pytest.raises(SystemExit):
        main(["info", str(store.path)])
    assert "Traceback" not in capsys.readouterr().err


CHANNELS = [{"label": name, "color": "FF0000"} for name in "abcd"]


def omero(value):
    return lambda s: s.ome(lambda ome: ome.update(omero=value))


def stale(s):
    """Consolidate, and then let the consolidated copy say something else."""
    zarr.consolidate_metadata(s.path, zarr_format=2 if s.version == "0.4" else 3)
    file = s.path / (".zmetadata" if s.version == "0.4" else "zarr.json")
    text = file.read_text()
    changed = text.replace("32", "16")
    assert changed != text
    file.write_text(changed)


ACCEPTED = {
    "consolidated metadata is stale": stale,
    "omero is null": omero(None),
    "omero is a list": omero([1]),
    "omero is empty": omero({}),
    "channels are null": omero({"channels": None}),
    "channels are text": omero({"channels": "abc"}),
    "channels are numbers": omero({"channels": [1, None]}),
    "more channels than the array has": omero({"channels": CHANNELS}),
    "fewer channels than the array has": omero({"channels": []}),
    "channels without color and window": omero({"channels": [{"label": "a"}]}),
    "window is text": omero({"channels": [{"label": "a", "window": "auto"}]}),
    "label is a number": omero({"channels": [{"label": 7}]}),
    "labels list nothing": lambda s: s.attributes("labels", lambda ome: ome.update(labels=[])),
    "labels are no list": lambda s: s.attributes("labels", lambda ome: ome.update(labels="cells")),
    "labels are not listed": without("labels"),
    "labels have fewer levels": lambda s: s.attributes(
        "labels/cells", lambda ome: ome["multiscales"][0]["datasets"].pop()
    ),
    "unit is missing": axes(*space("z", "y", "x")),
    "two multiscales": lambda s: s.ome(lambda ome: ome["multiscales"].append({"datasets": "?"})),
    "unknown keys": lambda s: s.multiscale(lambda m: m.update(unknown={"a": [1]})),
    "levels of one size": lambda s: s.multiscale(lambda m: m["datasets"].append(m["datasets"][1])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.parametrize("case", ACCEPTED)
def test_store_that_can_be_read_for_certain_is_read_and_copied(case, store, tmp_path):
    ACCEPTED[case](store)
    first, second, *rest = read(store.path)
    np.testing.assert_array_equal(first, voxels())
    for part in (second, *rest):
        np.testing.assert_array_equal(part, voxels() if part.shape == first.shape else voxels()[:, ::2, ::2])
    image = open_image(store.path)
    assert len(image.channels) == 1
    copied = write_image(image.data, tmp_path / "copy.zarr", like=image)
    np.testing.assert_array_equal(copied.data.compute(), voxels())


@pytest.mark.parametrize(
    ("names", "expected"),
    [("", "012"), ("a", "a12"), ("ab", "ab2"), ("abcd", "abc")],
)
def test_channels_without_entries_are_called_by_their_index(names, expected, store):
    for k in (0, 1):
        part = np.stack([voxels()[:, :: k + 1]] * 3)
        store.level(str(k), part)
    described = [{"name": "c", "type": "channel"}, *space("z", "y", "x")]
    store.multiscale(lambda m: m.update(axes=described))
    for k in (0, 1):
        steps(scale(1, 1, k + 1, 1), level=k)(store)
    omero({"channels": [{"label": n, "color": "FF0000"} for n in names]})(store)
    image = open_image(store.path)
    assert "".join(image.channels) == expected
    np.testing.assert_array_equal(image.select(c=2).data.compute()[0], voxels())


@pytest.mark.parametrize("axis", ["t", "c"])
def test_levels_with_other_time_points_or_channels_are_refused(axis, store):
    for k in (0, 1):
        store.level(str(k), np.stack([voxels()[:, :: k + 1]] * (3 - k)))
    kind = {"t": "time", "c": "channel"}[axis]
    store.multiscale(lambda m: m.update(axes=[{"name": axis, "type": kind}, *space("z", "y", "x")]))
    for k in (0, 1):
        steps(scale(1, 1, k + 1, 1), level=k)(store)
    with pytest.raises(
        ValueError, match=rf"datasets` differ on axis '{axis}': level '1' has 2, '0' before it 3"
    ):
        open_image(store.path)
    assert open_image(store.path / "1", axes=f"{axis}zyx").shape[0] == 2  # one level can be read alone


# Chunks and shards


def broken(change):
    return lambda file: file.write_bytes(bytes(change(bytearray(file.read_bytes()))))


def with_index(change):
    """Change the index at the end of a shard of four chunks, and leave its checksum."""

    def make(content):
        content[-68:-4] = change(content[-68:-4])
        return content

    return broken(make)


DAMAGE = {
    "cut by a byte": broken(lambda c: c[:-1]),
    "cut in half": broken(lambda c: c[: len(c) // 2]),
    "empty": broken(lambda c: b""),
    "one byte": broken(lambda c: b"\0"),
    "zeros": broken(lambda c: bytes(len(c))),
    "text": broken(lambda c: b"<html>404 not found</html>"),
    "longer": broken(lambda c: c + c[:100]),
}  # fmt: skip
SHARD_DAMAGE = {
    "index of zeros": with_index(lambda index: bytes(64)),
    "index shuffled": with_index(lambda index: index[16:] + index[:16]),
    "index says absent": with_index(lambda index: b"\xff" * 64),
    "checksum flipped": broken(lambda c: c[:-1] + bytes([c[-1] ^ 1])),
    "payload moved": broken(lambda c: c[3:]),
}  # fmt: skip


def check_damage(path, change, chunk):
    """Damage a chunk and read everything: an error that names it, or the voxels that were written."""
    change(chunk)
    image = open_image(path)
    whole = tuple(slice(0, n) for n in image.spatial_shape)
    with pytest.raises(
        CorruptChunkError, match=r"chunk (c/0/|0/|c\.|)0/0 of array .*image.zarr/0 \(region 0:4, 0:"
    ) as caught:
        image.source().read(0, 0, whole)
    assert "restore it from a copy" in str(caught.value)
    beyond = (slice(0, 4), slice(16, 32), slice(16, 32))
    try:
        part = image.source().read(0, 0, beyond)
    except CorruptChunkError:
        return
    np.testing.assert_array_equal(part, voxels()[beyond])


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage != "longer"])
def test_damaged_chunk_is_an_error_and_no_voxels(damage, store):
    check_damage(store.path, DAMAGE[damage], store.chunk)


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_shard_is_an_error_and_no_voxels(damage, tmp_path):
    path = honest(tmp_path / "image.zarr", shards=SHARDS)
    check_damage(path, SHARD_DAMAGE[damage], path / "0/c/0/0/0")


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage != "zeros"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_damaged_chunk_without_a_codec_is_an_error_and_no_voxels(damage, version, tmp_path):
    path = honest(tmp_path / "image.zarr", version, compressors=None)
    check_damage(path, DAMAGE[damage], path / ("0/0/0/0" if version == "0.4" else "0/c/0/0/0"))

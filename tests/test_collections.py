"""Plates, wells and bioformats2raw layouts: what is in them, what is refused, and what `info` tells."""

import json
import shutil
from functools import partial
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr
from plates import XML, edit, voxels, write_plate, write_series
from servers import Files, serving

from chunkrestore.ome_zarr import describe, facts_of, open_collection, open_image, write_image, write_labels
from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES
from chunkrestore.ome_zarr.ome_xml import image_names

VERSIONS = ("0.4", "0.5")


@pytest.fixture(scope="module", params=VERSIONS)
def plate(request, tmp_path_factory):
    """Do not change it."""
    path = tmp_path_factory.mktemp("plates") / "plate.zarr"
    acquisitions = [{"id": 0, "name": "day 1"}, {"id": 3}]
    return write_plate(path, request.param, {"A/01": 2, "A/02": 3, "B/02": 2}, acquisitions=acquisitions)


@pytest.fixture
def copied(plate, tmp_path):
    return shutil.copytree(plate, tmp_path / "copy.zarr")


def test_plate_tells_wells_and_fields_in_their_order(plate):
    found = open_collection(plate)
    assert (found.kind, found.name, found.wells) == ("plate", "screen", ("A/01", "A/02", "B/02"))
    assert (found.rows, found.columns) == (("A", "B", "C"), ("01", "02", "03"))
    assert [(a.id, a.name) for a in found.acquisitions] == [(0, "day 1"), (3, "")]
    assert [f.member for f in found.fields] == [
        *("A/01/0", "A/01/1", "A/02/0", "A/02/1", "A/02/2", "B/02/0", "B/02/1")
    ]
    assert {f.acquisition for f in found.fields} == {0}
    assert found.first == found.fields[0]


def test_every_field_opens_as_an_image_with_its_own_voxels(plate):
    for field in open_collection(plate).fields:
        np.testing.assert_array_equal(open_image(field.path).data.compute(), voxels(field.member))


@pytest.mark.parametrize("name", ["B/02", "B02", "B2", "B/2", "B002"])
def test_a_well_is_found_however_its_column_is_written(plate, name):
    assert open_collection(plate).select(name).wells == ("B/02",)


def test_selection_keeps_the_order_of_the_plate(plate):
    chosen = open_collection(plate).select(["B2", "A1"], [1, "0"])
    assert [f.member for f in chosen.fields] == ["A/01/0", "A/01/1", "B/02/0", "B/02/1"]
    assert [f.member for f in chosen.select(fields=1).fields] == ["A/01/1", "B/02/1"]


def test_a_field_that_only_some_wells_have_is_taken_from_those(plate):
    chosen = open_collection(plate).select(fields="2")
    assert ([f.member for f in chosen.fields], chosen.wells) == (["A/02/2"], ("A/02",))


def test_a_selection_that_does_not_exist_lists_what_does(plate):
    found = open_collection(plate)
    with pytest.raises(ValueError, match=r"`wells`: 'C1' .* there are A/01, A/02, B/02"):
        found.select("C1")
    with pytest.raises(ValueError, match=r"`fields`: 7 does not exist .* there are 0, 1, 2"):
        found.select(fields=7)
    with pytest.raises(ValueError, match=r"`fields`: 2 .* there are 0, 1$"):
        found.select("A1", 2)
    with pytest.raises(ValueError, match=r"`wells` is empty"):
        found.select([])


def test_a_name_that_fits_two_wells_is_refused(copied):
    def rename(ome):
        ome["plate"]["rows"] = [{"name": "1"}, {"name": "11"}]
        ome["plate"]["columns"] = [{"name": "11"}, {"name": "1"}]
        ome["plate"]["wells"] = [
            {"path": "1/11", "rowIndex": 0, "columnIndex": 0},
            {"path": "11/1", "rowIndex": 1, "columnIndex": 1},
        ]

    edit(copied, rename)
    found = open_collection(copied)
    with pytest.raises(ValueError, match=r"may be any of 1/11, 11/1"):
        found.select("111")
    assert found.select("11/1").wells == ("11/1",)


def test_a_well_is_a_collection_of_its_own(plate):
    found = open_collection(f"{plate}/A/02")
    assert (found.kind, [f.member for f in found.fields], found.field_count) == ("well", ["0", "1", "2"], 3)
    with pytest.raises(ValueError, match=r"`wells` were given, but .* is a well"):
        found.select(wells="A/02")


class Counted(Files):
    """Notes which documents are asked for."""

    def do_GET(self):  # noqa: N802
        self.asked.append(urlsplit(self.path).path)
        super().do_GET()


def test_a_plate_behind_a_url_opens_without_its_wells(plate):
    asked = []
    handler = type("Handler", (Counted,), {"asked": asked})
    with serving(partial(handler, directory=plate.parent)) as url:
        found = open_collection(f"{url}/plate.zarr")
        assert not [path for path in asked if "/A/" in path or "/B/" in path]
        assert found.select("B2").first.member == "B/02/0"
        assert not [path for path in asked if "/A/" in path]
        assert len(found.fields) == 7


def rows_are(value):
    return lambda ome: ome["plate"].update(rows=value)


def well_is(**changes):
    return lambda ome: ome["plate"]["wells"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rows_are([]), r"`plate.rows` must be a list of 1 to"),
        (rows_are("AB"), r"`plate.rows` must be a list of 1 to"),
        (rows_are([{"name": "A"}, {"name": "B"}, {"name": "A"}]), r"`plate.rows` lists 'A' more than once"),
        (
            rows_are([{"name": "A"}, {"name": "B"}, {"name": "../C"}]),
            r"`plate.rows\[2\].name` '../C' must be letters",
        ),
        (well_is(rowIndex=2), r"`plate.wells\[1\].rowIndex` 2 must be 0, the position of 'A'"),
        (well_is(columnIndex="1"), r"`plate.wells\[1\].columnIndex` '1' must be 1"),
        (well_is(rowIndex=False), r"`plate.wells\[1\].rowIndex` False must be 0"),
        (well_is(path="D/02"), r"`plate.wells\[1\].path` 'D/02' must be ROW/COLUMN"),
        (well_is(path="../A/02"), r"`plate.wells\[1\].path` '../A/02' must be ROW/COLUMN"),
        (well_is(path="/A/02"), r"must be ROW/COLUMN"),
        (well_is(path=["A", "02"]), r"must be ROW/COLUMN"),
        (well_is(path="A/01", columnIndex=0), r"`plate.wells` lists 'A/01' more than once"),
        (lambda ome: ome["plate"].update(wells=[]), r"`plate.wells` must be a list of 1 to"),
        (lambda ome: ome["plate"].update(field_count=0), r"`plate.field_count` 0 must be an integer above 0"),
        (lambda ome: ome["plate"].update(acquisitions=[{"id": 1}, {"id": 1}]), r"lists 1 more than once"),
        (
            lambda ome: ome["plate"].update(acquisitions=[{"id": "1"}]),
            r"acquisitions\[0\].id` '1' must be an integer",
        ),
        (lambda ome: ome.update(plate=[]), r"`plate` is no object"),
    ],
)
def test_a_plate_that_does_not_conform_is_refused_with_its_key(copied, change, message):
    edit(copied, change)
    with pytest.raises(ValueError, match=message):
        open_collection(copied)


def images_are(*images):
    return lambda ome: ome["well"].update(images=list(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (images_are(), r"`well.images` must be a list of 1 to"),
        (images_are({"path": ".."}), r"`well.images\[0\].path` '..' must be letters and digits"),
        (images_are({"path": "/etc"}), r"`well.images\[0\].path` '/etc' must be letters"),
        (images_are({"path": "0"}, {"path": "0"}), r"`well.images` lists '0' more than once"),
        (images_are({"path": "0", "acquisition": 1}), r"acquisition` 1 is none of the plate's: \[0, 3\]"),
        (images_are({"path": "0", "acquisition": True}), r"acquisition` True is none"),
        (lambda ome: ome.pop("well"), r"`well` is missing"),
    ],
)
def test_a_well_that_does_not_conform_is_refused_and_leaves_the_others_alone(copied, change, message):
    edit(copied / "A" / "02", change)
    found = open_collection(copied)
    with pytest.raises(ValueError, match=message):
        _ = found.fields
    assert len(found.select("B2").fields) == 2


def test_wells_that_are_listed_but_absent_are_named(copied):
    shutil.rmtree(copied / "A")
    with pytest.raises(FileNotFoundError, match=r"do not exist: A/01, A/02; .* choose others with `wells`"):
        _ = open_collection(copied).fields


def test_a_well_of_another_version_is_refused(plate, tmp_path):
    other = "0.5" if open_collection(plate).version == "0.4" else "0.4"
    mixed = shutil.copytree(plate, tmp_path / "mixed.zarr")
    shutil.rmtree(mixed / "A" / "02")
    shutil.copytree(write_plate(tmp_path / "other.zarr", other, ["A/02"], 1) / "A/02", mixed / "A/02")
    with pytest.raises(ValueError, match=f"A/02 is OME-Zarr {other}, but its plate"):
        _ = open_collection(mixed).select("A2").fields


def test_a_field_behind_a_link_out_of_the_plate_is_refused(copied, tmp_path):
    outside = shutil.copytree(copied / "A/01/0", tmp_path / "elsewhere")
    shutil.rmtree(copied / "A/01/0")
    (copied / "A/01/0").symlink_to(outside)
    with pytest.raises(ValueError, match=r"leads out of its group"):
        _ = open_collection(copied).fields


def test_plates_older_than_0_4_need_no_positions(tmp_path):
    path = write_plate(tmp_path / "old.zarr", "0.4", ["B/02"], 1)

    def age(ome):
        for key in ("plate", "well"):
            if key in ome:
                ome[key]["version"] = "0.2"
        for well in ome.get("plate", {}).get("wells", ()):
            del well["rowIndex"], well["columnIndex"]

    edit(path, age)
    edit(path / "B" / "02", age)
    assert [f.member for f in open_collection(path).fields] == ["B/02/0"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("listed", "xml"), [(True, True), (False, True), (False, False)])
def test_bioformats2raw_series_are_listed_or_counted(tmp_path, version, listed, xml):
    path = write_series(tmp_path / "series.zarr", version, listed=listed, xml=xml)
    found = open_collection(path)
    assert (found.kind, found.version, found.wells) == ("series", version, ())
    assert [(f.member, f.well, f.index) for f in found.fields] == [("0", "", 0), ("1", "", 1), ("2", "", 2)]
    assert [f.member for f in found.select(fields=["2", 0]).fields] == ["0", "2"]
    np.testing.assert_array_equal(open_image(found.fields[1].path).data.compute(), voxels("1"))


def test_series_may_have_any_names(tmp_path):
    path = write_series(tmp_path / "series.zarr", named="scan {}")
    assert [f.member for f in open_collection(path).fields] == ["scan 0", "scan 1", "scan 2"]


def test_an_image_that_xml_lists_and_that_is_gone_is_missed(tmp_path):
    path = write_series(tmp_path / "series.zarr", listed=False)
    shutil.rmtree(path / "1")
    found = open_collection(path)
    assert len(found.fields) == 3
    with pytest.raises(FileNotFoundError, match=r"series.zarr/1"):
        open_image(found.fields[1].path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["0", "../../secret"], r"member path '../../secret' leaves its group"),
        (["0", "0"], r"`series` lists '0' more than once"),
        ([0], r"member path 0 leaves its group or is none"),
        ("01", r"`series` must be a list"),
        ([], r"but no image"),
    ],
)
def test_a_list_of_series_that_does_not_conform_is_refused(tmp_path, change, message):
    path = write_series(tmp_path / "series.zarr")
    edit(path / "OME", lambda ome: ome.update(series=change))
    with pytest.raises(ValueError, match=message):
        open_collection(path)


def test_xml_that_is_too_large_is_not_read(tmp_path):
    path = write_series(tmp_path / "series.zarr", listed=False)
    with (path / "OME" / "METADATA.ome.xml").open("wb") as file:
        file.truncate(MAX_DOCUMENT_NBYTES + 1)
    with pytest.raises(ValueError, match=r"METADATA.ome.xml is larger than"):
        open_collection(path)


def test_lists_without_end_are_refused(copied):
    edit(copied / "A" / "02", images_are(*({"path": str(i)} for i in range(70_000))))
    with pytest.raises(ValueError, match=r"`well.images` must be a list of 1 to 65536 objects"):
        _ = open_collection(copied).fields
    edit(copied, lambda ome: ome["plate"].update(columns=[{"name": str(i)} for i in range(70_000)]))
    with pytest.raises(ValueError, match=r"`plate.columns` must be a list of 1 to 65536 objects"):
        open_collection(copied)


def test_another_layout_is_refused(tmp_path):
    path = write_series(tmp_path / "series.zarr")
    edit(path, lambda ome: ome.update({"bioformats2raw.layout": 2}))
    with pytest.raises(ValueError, match=r"`bioformats2raw.layout` 2 is not supported, only 3"):
        open_collection(path)


def test_a_plate_inside_bioformats2raw_is_a_plate(copied):
    edit(copied, lambda ome: ome.update({"bioformats2raw.layout": 3}))
    assert open_collection(copied).kind == "plate"


def test_names_of_images_come_from_xml_in_their_order():
    text = XML.format(images='  <Image ID="Image:0" Name="a"/>\n  <Image ID="Image:1"><Pixels/></Image>')
    assert image_names(text.encode(), "METADATA.ome.xml") == ["a", ""]
    assert image_names(text.replace("<OME", "<ome:OME").replace("OME>", "ome:OME>").encode(), "x") == [
        "a",
        "",
    ]


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><OME Name="&b;"/>'
INCLUDE = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><OME>&e;</OME>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "has a document type"),
        (INCLUDE, "has a document type"),
        ("<OME>" * 100, "nested deeper than"),
        ("<OME><Image/>", "is not valid XML"),
        ("<OME>" + "<Image/>" * 70_000 + "</OME>", "lists more than 65536 images"),
    ],
)
def test_hostile_xml_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        image_names(text.encode(), "METADATA.ome.xml")


def test_what_is_no_collection_says_what_it_is(plate, tmp_path):
    with pytest.raises(ValueError, match=r"is no collection of images"):
        open_collection(f"{plate}/A/01/0")
    with pytest.raises(FileNotFoundError, match=r"holds no zarr group"):
        open_collection(tmp_path / "nothing")


def test_info_tells_of_a_plate_and_its_first_field(plate):
    told, known = describe(plate), facts_of(plate)
    assert "3 of 3 x 3: A/01, A/02, B/02" in told
    assert "2 in each of 2 wells (0 1), 3 in A/02 (0 1 2)" in told
    assert "0 day 1, 3" in told
    assert "2 x 4 x 24 x 40 uint16" in told
    assert "0.5 x 0.25 x 0.25 um" in told
    assert "dye 0 (#00FF00, 90 to 500), dye 1 (#FF00FF, 90 to 500)" in told
    assert [f["path"] for f in known["fields"]] == [f.member for f in open_collection(plate).fields]
    assert known["first"]["levels"][0]["n_files"] == 2
    json.dumps(known)


def test_info_tells_of_the_selected_part_of_a_plate(plate):
    assert [f["path"] for f in facts_of(open_collection(plate).select("B2", 1))["fields"]] == ["B/02/1"]


def test_info_tells_what_is_wrong_with_a_plate_and_the_rest_all_the_same(copied):
    shutil.rmtree(copied / "B")
    told = describe(copied)
    assert "A/02" in told
    assert "do not exist: B/02" in told


def test_info_tells_of_wells_and_series(plate, tmp_path):
    assert "3 (0 1 2)" in describe(f"{plate}/A/02")
    told = describe(write_series(tmp_path / "series.zarr"))
    assert "layout of bioformats2raw" in told
    assert "3 (0 1 2)" in told


@pytest.mark.parametrize("version", VERSIONS)
def test_info_tells_of_images_labels_and_how_they_are_stored(tmp_path, version):
    path = tmp_path / "image.zarr"
    data = np.zeros((80, 90, 100), np.uint16)
    shards = {"shards": (64, 128, 128)} if version == "0.5" else {}
    image = write_image(
        data, path, axes="zyx", voxel_size=(2, 1, 1), version=version, levels=2, compression="lz4", **shards
    )
    write_labels(
        data.astype(np.int32), path, "nuclei", provenance={"operators": [{"operator": "mine", "n": 3}]}
    )
    (path / "labels" / "nuclei" / "objects.parquet").write_bytes(b"")
    known = facts_of(path)
    assert known["levels"][0]["n_files"] == (2 if version == "0.5" else 8)
    assert known["levels"][0]["nbytes"] == data.nbytes
    assert known["levels"][0]["codecs"] == ["blosc lz4 5 bitshuffle"]
    assert known["tables"] == {"nuclei": ["objects.parquet"]}
    assert "nuclei: objects.parquet" in describe(path)
    assert "made by     mine(n=3)" in describe(path / "labels" / "nuclei")
    group = facts_of(path / "labels")
    assert (group["kind"], group["labels"], group["members"][0]["dtype"]) == (
        "labels group",
        ["nuclei"],
        "int32",
    )
    array = facts_of(path / image.levels[0].path)
    assert (array["kind"], array["shape"], array["codecs"]) == (
        "array",
        [80, 90, 100],
        ["blosc lz4 5 bitshuffle"],
    )


def test_info_tells_of_tiff_files_and_zip_stores(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((4, 32, 40), np.uint16), imagej=True, metadata={"axes": "ZYX"}
    )
    assert "a.tif: TIFF, image" in describe(tmp_path / "a.tif")
    assert facts_of(tmp_path / "a.tif")["levels"][0]["codecs"] is None
    plate = write_plate(tmp_path / "plate.zarr", "0.5", ["A/01"], 1)
    zipped = shutil.make_archive(str(tmp_path / "plate.zarr"), "zip", plate)
    assert "1 of 3 x 3: A/01" in describe(zipped)
    np.testing.assert_array_equal(
        open_image(open_collection(zipped).first.path).data.compute(), voxels("A/01/0")
    )


def test_info_tells_of_what_is_unfinished_and_of_groups_without_images(tmp_path):
    from chunkrestore.ome_zarr import create_image

    create_image(tmp_path / "begun.zarr", shape=(4, 8, 8), dtype="uint16", axes="zyx")
    assert "an unfinished image" in describe(tmp_path / "begun.zarr")
    zarr.create_group(tmp_path / "plain.zarr", attributes={"mine": 1})
    assert "without any image" in describe(tmp_path / "plain.zarr")
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "nothing")


def test_info_of_channels_with_damaged_colours_and_windows_leaves_them_out(copied):
    def damage(ome):
        ome["omero"]["channels"][0].update(color="url(javascript:)", window={"start": "a"}, active="yes")
        ome["omero"]["channels"][1] = None

    edit(copied / "A/01/0", damage)
    assert facts_of(copied)["first"]["display"] == [
        {"label": "dye 0", "color": None, "window": None, "active": None},
        {"label": "1", "color": None, "window": None, "active": None},
    ]

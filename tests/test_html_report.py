"""The page that shows a job: true to its files, safe whatever they hold, and whole in itself in a real browser."""

import base64
import io
import json
import math
import re
import shutil
import time
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from browsing import chromium
from PIL import Image
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.jobs.events import Events
from chunkrestore.jobs.html import write_html, write_report
from chunkrestore.jobs.ledger import Ledger
from chunkrestore.jobs.report_page.histograms import Durations, Moments
from chunkrestore.jobs.report_page.markup import Markup, element, facts, table
from chunkrestore.jobs.report_page.slices import views
from chunkrestore.jobs.report_page.summary import Summary, kind_of
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.5, 1.5), truncate=2)
SERIAL = {"cluster": "serial", "quiet": True}
NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\"'&"


def blobs(shape, seed=4):
    """Bright blobs on a background."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [0] * (len(shape) - 2) + [3, 3])
    image = 100 + 400 * (smooth > 1.2 * smooth.std()) + rng.normal(0, 20, shape)
    return np.clip(image, 0, 4000).astype(np.uint16)


def folder_of(output, job="image"):
    return output.with_name(f"{output.name}.chunkrestore") / job


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real job: deconvolution and labels of a volume of several blocks and levels."""
    folder = tmp_path_factory.mktemp("finished")
    image = cr.write_image(blobs((6, 220, 400)), folder / "in.zarr", axes="zyx", voxel_size=(2, 0.5, 0.5))
    chain = [cr.RichardsonLucy(PSF, iterations=2), cr.Threshold(300.0)]
    report = cr.run(chain, image, folder / "out.zarr", block_shape=(6, 120, 200), **SERIAL)
    return folder_of(folder / "out.zarr"), folder / "out.zarr", report


@pytest.fixture(scope="module")
def page(finished):
    """The page of that job, parsed."""
    folder, output, _ = finished
    return Page(write_html(folder, str(output)))


class Page(HTMLParser):
    """What a page holds, as a parser sees it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.content = path, path.read_text(encoding="utf-8")
        self.tags, self.tables, self.text = [], {}, ""
        self._rows = None
        self.feed(self.content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self, alt):
        """Return the pixels of the images called `alt`."""
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))
            for image in self.named("img")
            if image["alt"] == alt
        ]


def begin(folder, manifest=None):
    """Begin a job by the files alone."""
    ledger = Ledger(folder)
    ledger.begin(manifest or {"schema": 1, "passes": []})
    return ledger


def write_events(folder, *events):
    with (folder / "events.jsonl").open("a") as file:
        for at, event, fields in events:
            file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")


def block(at, i, stage="blocks-0", **fields):
    seconds = {"read": 0.25, "compute": 1.5, "write": 0.5}
    content = {
        "stage": stage,
        "item": [0, 0, 0, 0, i],
        "worker": "node7:41",
        "seconds": seconds,
        "total": 2.5,
    }
    return at, "block", content | fields


def test_a_finished_job_is_told_in_its_own_figures(finished, page):
    folder, output, report = finished
    assert page.text.count("done") >= 2
    assert str(output) in page.text
    plan = page.tables["plan"][1:]
    assert [row[:3] for row in plan] == [
        ["richardson-lucy", "1 x 2 x 2", "6 x 120 x 200"],
        ["threshold", "1 x 2 x 2", "6 x 120 x 200"],
    ]
    assert plan[0][5] == f"{report.plan['passes'][0]['halo_overhead']:.2f}"
    assert [row[2] for row in page.tables["seams"][1:]] == [f"{seam.rms:.2e}" for seam in report.seams]
    stages = {row[0]: row[1] for row in page.tables["stages"][1:]}
    assert (stages["blocks-0"], stages["detect"], stages["paint"]) == ("4", "4", "4")
    assert f"{report.n_objects}objects" in page.text
    assert "iterations2" in page.text
    (run,) = page.tables["runs"][1:]
    n_blocks = (folder / "events.jsonl").read_text().count('"event": "block"')
    assert run[3:5] == ["no", str(n_blocks)]
    assert n_blocks >= report.n_done
    assert run[-1] == "done"


def test_the_slices_are_those_of_input_and_result(finished, page):
    _, output, _ = finished
    before, after = cr.open_image(output.with_name("in.zarr")).data[3], cr.open_image(output).data[3]
    low, high = (float(v) for v in re.search(r"intensities ([\d.]+) to ([\d.]+) in both", page.text).groups())
    for alt, plane in (("input", before), ("result", after)):
        expected = np.clip((np.asarray(plane, np.float64) - low) * 255 / (high - low), 0, 255)
        overview, detail = page.pictures(alt)
        assert overview.shape == (220, 400)
        # The caption rounds to four digits, pixels are cut off to whole numbers.
        assert np.abs(overview - expected).max() <= 2
        assert detail.shape == (220, 256)
        assert int(overview.max()) - int(overview.min()) > 150
    labels = np.asarray(cr.open_image(output / "labels" / "labels").data[3])
    overview, _ = page.pictures("labels")
    np.testing.assert_array_equal(overview > 0, labels > 0)
    assert len(np.unique(overview)) > 10


def test_the_page_asks_nothing_of_anybody(page):
    for tag in ("img", "script", "link", "iframe", "object", "a"):
        for attributes in page.named(tag):
            assert all(attributes.get(key, "data:").startswith("data:") for key in ("src", "href"))
    assert "url(" not in page.content
    assert "@import" not in page.content
    assert not re.findall(r"https?://", page.content)
    (policy,) = [m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_the_page_is_small(page):
    assert page.path.stat().st_size < 3_000_000


def test_writing_it_again_replaces_it_and_leaves_nothing_else(finished, page):
    folder, output = page.path.parent, finished[1]
    before = sorted(p.name for p in folder.iterdir())
    write_html(folder, str(output))
    assert sorted(p.name for p in folder.iterdir()) == before
    assert "report.html" in before


def test_all_text_of_a_job_stays_text(tmp_path):
    manifest = {
        "passes": [{"operators": [{"operator": NASTY, NASTY: NASTY}], "depth": [[1, 2, 3]]}],
        "input": {"store": f"/data/{NASTY}.zarr", "array": "0", "axes": "zyx", "picks": [[0, 8]] * 3},
        "output": {"labels": NASTY},
        "versions": {NASTY: NASTY},
    }
    folder = tmp_path / "image"
    begin(folder, manifest).close()
    (folder / "options.json").write_text(json.dumps({"options": {NASTY: NASTY}}))
    write_events(
        folder,
        (1.0, "begin", {"host": NASTY, "pid": 3}),
        (1.0, "stage", {"stage": NASTY, "n_items": 3, "n_done": 0}),
        block(2.0, 0, stage=NASTY, worker=NASTY),
        (
            2.0,
            "retry",
            {"stage": NASTY, "item": [0, 0, 1], "cause": NASTY, "message": NASTY, "attempt": NASTY},
        ),
        (3.0, "failed", {"stage": NASTY, "item": [0, 0, 1], "cause": NASTY, "message": NASTY}),
        (4.0, "end", {"state": NASTY, "message": NASTY}),
    )
    page = Page(write_html(folder, f"/results/{NASTY}.zarr"))
    assert len(page.named("script")) == 1
    assert not [a for a in page.named("img") if "onerror" in a]
    assert page.text.count("<script>") >= 14


@pytest.mark.parametrize("text", [NASTY, "</table>", 3, None, 0.5])
def test_what_is_not_markup_becomes_text(text):
    made = element("p", text, title=text)
    assert "<script" not in made
    assert "</table" not in made
    assert str(table([text], [[text]])).count("<table") == 1
    assert "<script" not in facts([(text, text)])
    assert element("p", Markup("<b>")) == "<p><b></p>"


def test_a_failed_job_lists_its_blocks_and_shows_no_result(tmp_path):
    image = cr.write_image(blobs((4, 40, 60)), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    folder = tmp_path / "out.zarr.chunkrestore" / "image"
    source = image.source(0).identity()
    ledger = begin(folder, {"passes": [{"operators": []}], "input": source, "output": {"labels": None}})
    ledger.close()
    # An older result, which the job would replace.
    cr.write_image(blobs((4, 40, 60)), tmp_path / "out.zarr", axes="zyx", voxel_size=(1, 1, 1))
    write_events(
        folder,
        (100.0, "begin", {"host": "node7", "pid": 41}),
        (100.0, "stage", {"stage": "blocks-0", "n_items": 3, "n_done": 0}),
        block(101.0, 0),
        (102.0, "retry", {"stage": "blocks-0", "item": [0, 0, 0, 0, 1], "cause": "transient", "message": "EIO",
                          "attempt": 1, "delay": 1.0}),
        (103.0, "failed", {"stage": "blocks-0", "item": [0, 0, 0, 0, 1], "cause": "data", "message": "corrupt"}),
        (104.0, "failed", {"stage": "blocks-0", "item": [2, 1, 0, 0, 2], "cause": "data", "message": "corrupt too"}),
        (105.0, "end", {"state": "failed", "message": "2 blocks failed"}),
    )  # fmt: skip
    page = Page(write_html(folder, str(tmp_path / "out.zarr")))
    assert page.tables["failed"][1:] == [
        ["blocks-0", "0, 0, 1", "data", "corrupt"],
        ["blocks-0", "0, 0, 2, time point 2, channel 1", "data", "corrupt too"],
    ]
    assert page.tables["retries"][1][1:] == ["blocks-0", "0, 0, 1", "transient", "1", "EIO"]
    assert page.tables["stages"][1][:3] == ["blocks-0", "1 of 3", "0:05"]
    assert page.tables["runs"][1][4:] == ["1", "0:05", "failed: 2 blocks failed"]
    assert page.tables["slowest"][1] == [
        "blocks-0", "0, 0, 0", "2.5 s", "250 ms", "1.5 s", "500 ms", "node7:41"
    ]  # fmt: skip
    assert (len(page.pictures("input")), page.pictures("result")) == (1, [])
    assert "Only the input: the result is not published yet." in page.text


def test_a_block_that_succeeds_later_is_not_listed_as_failed(tmp_path):
    begin(tmp_path / "image").close()
    write_events(
        tmp_path / "image",
        (
            1.0,
            "failed",
            {"stage": "blocks-0", "item": [0, 0, 0, 0, 1], "cause": "data", "message": "corrupt"},
        ),
        block(2.0, 1),
    )
    assert "failed" not in Page(write_html(tmp_path / "image", "out.zarr")).tables


def test_a_job_that_has_only_begun_has_a_page(tmp_path):
    begin(tmp_path / "image").close()
    page = Page(write_html(tmp_path / "image", "out.zarr"))
    assert "unfinished" in page.text
    assert "No slices" in page.text


def test_every_job_of_an_output_gets_its_page(tmp_path):
    output = tmp_path / "out.zarr"
    with pytest.raises(
        FileNotFoundError, match=r"there is no job in .*out\.zarr\.chunkrestore \(it holds none\)"
    ):
        write_report(output)
    for job in ("image", "labels-cells"):
        begin(folder_of(output, job)).close()
    pages = [folder_of(output, job) / "report.html" for job in ("image", "labels-cells")]
    assert write_report(output) == pages
    assert all(path.is_file() for path in pages)
    assert write_report(output, job="labels-cells") == pages[1:]
    with pytest.raises(FileNotFoundError, match=r"no `job` 'nuclei' .*holds image, labels-cells"):
        write_report(output, job="nuclei")
    assert write_report("s3://b/x.zarr", work_folder=folder_of(output).parent) == pages


def test_labels_alone_are_shown_over_the_input(tmp_path):
    image = cr.write_image(blobs((4, 40, 60)), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    cr.run(cr.Threshold(300.0), image, tmp_path / "in.zarr", label_name="cells", **SERIAL)
    page = Page(write_html(folder_of(tmp_path / "in.zarr", "labels-cells"), str(tmp_path / "in.zarr")))
    assert page.pictures("result") == []
    (labels,) = page.pictures("labels")
    expected = np.asarray(cr.open_image(tmp_path / "in.zarr/labels/cells").data[2])
    np.testing.assert_array_equal(labels > 0, expected > 0)
    assert "its labels on its right" in page.text


def test_an_input_that_is_gone_is_said_to_be_gone(tmp_path):
    image = cr.write_image(blobs((4, 40, 60)), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    cr.run(cr.Threshold(300.0), image, tmp_path / "out.zarr", **SERIAL)
    shutil.rmtree(tmp_path / "in.zarr")
    page = Page(write_html(folder_of(tmp_path / "out.zarr", "labels-labels"), str(tmp_path / "out.zarr")))
    assert re.search(r"No slices: .*in\.zarr", page.text)
    assert page.tables["stages"]


SELECTIONS = [
    ("yx", (90, 120), {}, lambda x: x),
    ("tczyx", (2, 2, 6, 50, 70), {"timepoint": 1, "channel": 1}, lambda x: x[1, 1, 3]),
    ("zyx", (9, 60, 80), {"region": ((2, 8), (10, 60), (0, 50))}, lambda x: x[5, 10:60, :50]),
    ("zyx", (6, 64, 80), {"level": 1}, None),
]


@pytest.mark.parametrize(("axes", "shape", "selection", "plane"), SELECTIONS)
def test_the_slices_are_those_of_the_selection(tmp_path, axes, shape, selection, plane):
    data = blobs(shape)
    sizes = (1.0,) * (2 + ("z" in axes))
    image = cr.write_image(data, tmp_path / "in.zarr", axes=axes, voxel_size=sizes, levels=2)
    cr.run(cr.Threshold(300.0), image, tmp_path / "out.zarr", **selection, **SERIAL)
    page = Page(write_html(folder_of(tmp_path / "out.zarr", "labels-labels"), str(tmp_path / "out.zarr")))
    coarse = image.levels[1].shape[0] // 2
    expected = np.asarray(image.level(1)[coarse] if plane is None else plane(data)).astype(float)
    low, high = (float(v) for v in re.search(r"intensities ([\d.]+) to ([\d.]+)", page.text).groups())
    (shown,) = page.pictures("input")
    assert np.abs(shown - np.clip((expected - low) * 255 / (high - low), 0, 255)).max() <= 2


def test_the_overview_is_the_coarsest_level_that_is_wide_enough(tmp_path):
    data = np.tile(blobs((2, 270, 260)), (1, 2, 4))
    data[1, 340:440, 780:880] *= 4
    image = cr.write_image(data, tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1), levels=4)
    overview, detail = views(image, None, None)
    assert overview.shape == (270, 520)
    assert "of level 1" in overview.caption
    assert detail.shape == (256, 256)
    y0, y1, x0, x1 = (
        int(n) for n in re.search(r"y (\d+) to (\d+), x (\d+) to (\d+)", detail.caption).groups()
    )
    # The detail lies where there is most structure.
    assert y0 < 390 < y1
    assert x0 < 830 < x1
    one_level = image.select(region=(slice(0, 2), slice(0, 540), slice(0, 1040)))
    overview, _ = views(one_level, None, None)
    # As much of the middle as fits on a page.
    assert overview.shape == (540, 1024)
    assert "y 0 to 540, x 8 to 1032" in overview.caption


def test_ranges_that_differ_too_much_are_shown_each_in_its_own_window(tmp_path):
    image = cr.write_image(blobs((2, 40, 60)), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    small = (blobs((2, 40, 60)) / 4000).astype(np.float32)
    small[0, :5] = np.nan
    small[1, :5] = np.nan
    result = cr.write_image(small, tmp_path / "out.zarr", axes="zyx", voxel_size=(1, 1, 1))
    (view,) = views(image, result, None)
    assert "a window for each" in view.caption
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(view.after.partition(",")[2]))))
    assert pixels[:5].max() == 0
    assert pixels.max() == 255


def test_time_between_two_runs_is_left_out(tmp_path):
    begin(tmp_path / "image").close()
    stage = {"stage": "blocks-0", "n_items": 10}
    write_events(
        tmp_path / "image",
        (100.0, "begin", {"host": "a", "pid": 1, "resumed": False}),
        (100.0, "stage", stage | {"n_done": 0}),
        *(block(102.0 + 2 * i, i) for i in range(4)),
        (90_000.0, "begin", {"host": "b", "pid": 2, "resumed": True}),
        (90_000.0, "stage", stage | {"n_done": 3}),
        *(block(90_002.0 + 2 * i, 3 + i) for i in range(7)),
        (90_014.0, "stage_end", {"stage": "blocks-0", "seconds": 14.0}),
        (90_014.0, "end", {"state": "done"}),
    )
    page = Page(write_html(tmp_path / "image", "out.zarr"))
    # The fourth block of the first run was not in the journal when its driver was killed.
    assert page.tables["stages"][1][:3] == ["blocks-0", "10", "0:22"]
    assert [row[3:6] for row in page.tables["runs"][1:]] == [["no", "4", "0:08"], ["yes", "7", "0:14"]]
    assert page.content.count('class="mark"') == 1


def test_a_stage_that_runs_for_every_pass_is_added_up_and_one_that_is_resumed_is_not():
    stage = {"stage": "statistics", "n_items": 2, "n_done": 0}
    once = [(1.0, "stage", stage), block(2.0, 0, "statistics"), block(3.0, 1, "statistics")]
    ended = [(4.0, "stage_end", {"stage": "statistics", "seconds": 3.0})]

    def done(*events):
        summary = Summary({"time": at, "event": kind, **fields} for at, kind, fields in events)
        found = summary.stages["statistics"]
        return found.n_done, found.n_items, found.seconds

    assert done(*once, *ended, *once, *ended) == (4, 4, 6.0)
    assert done(*once, (9.0, "begin", {}), *once, *ended) == (2, 2, 5.0)


def test_rounds_levels_and_planes_do_not_lengthen_the_page():
    names = ["blocks-0", "blocks-1", "seams-0", "settle-3.1-7", "pyramid-1-4", "labels_pyramid-2", "detect"]
    kinds = ["blocks-0", "blocks-1", "seams-0", "settle", "pyramid-1", "labels_pyramid", "detect"]
    assert [kind_of(name) for name in names] == kinds


def test_quantiles_are_good_to_five_percent():
    rng = np.random.default_rng(3)
    seconds = rng.lognormal(0, 2, 5000)
    durations = Durations()
    for one in seconds:
        durations.add(float(one))
    for share in (0.05, 0.5, 0.95):
        assert durations.quantile(share) == pytest.approx(np.quantile(seconds, share), rel=0.055)
    assert durations.longest == seconds.max()
    assert durations.total == pytest.approx(seconds.sum())
    assert Durations().quantile(0.5) == 0


def test_intervals_widen_without_losing_blocks():
    moments = Moments()
    for i in range(160):
        moments.add(i)
        moments.add(i)
    moments.widen()
    assert moments.counts == [4] * 80 + [0] * 80


def test_events_that_cannot_be_understood_are_counted_and_left_out():
    whole = {"stage": "x", "item": [0, 0, 0], "total": 1.0}
    odd = [{}, {"item": None}, {"seconds": [1]}, {"total": math.inf}, {"total": "long"}, {"n_parts": "two"}]
    summary = Summary(
        [
            *({"time": 1.0, "event": "block", **whole, **one} for one in odd),
            {"time": 2.0, "event": "failed"},
            {"time": 3.0, "event": "of the future"},
        ]
    )
    assert (summary.n_spoilt, summary.n_blocks) == (len(odd), 1)


def many_events(path, n):
    with Events(path) as events:
        events.emit("begin", host="a", pid=1)
        events.emit("stage", stage="blocks-0", n_items=n, n_done=0)
        seconds = {"read": 0.125, "compute": 1.5, "write": 0.25}
        for i in range(n):
            item = [0, 0, i // 10_000, i // 100 % 100, i % 100]
            if i % 100 == 7:
                events.emit("retry", stage="blocks-0", item=item, cause="transient", message="EIO", attempt=1)
            if i % 1000 == 8:
                events.emit(
                    "failed", stage="blocks-0", item=[*item, 1], cause="data", message="corrupt " * 50
                )
            events.emit(
                "block", stage="blocks-0", item=item, worker=f"node{i % 64}:7", seconds=seconds, total=i / n
            )


@pytest.mark.parametrize("n", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_and_page_stay_small_however_many_blocks(tmp_path, n):
    folder = tmp_path / "image"
    begin(folder).close()
    write_html(folder, "out.zarr")  # what is imported for the first time is not counted
    many_events(folder / "events.jsonl", n)
    tracemalloc.start()
    path = write_html(folder, "out.zarr")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000
    assert path.stat().st_size < 200_000
    page = Page(path)
    assert page.tables["stages"][1][1] == f"{n:,}"
    assert f"Retries: {n // 100:,}" in page.text
    assert f"Failed: {n // 1000:,}" in page.text
    assert float(page.tables["slowest"][1][2].split()[0]) == pytest.approx(1000 * (n - 1) / n, rel=1e-2)


# In a real browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium"), "1100,1000") as opened:
        yield opened


@pytest.fixture
def open_page(browser):
    def show(path, theme="light"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        browser.get_log("performance")
        browser.get(path.as_uri())
        return browser

    return show


def pixels_of(element_or_browser):
    taken = (
        getattr(element_or_browser, "screenshot_as_png", None) or element_or_browser.get_screenshot_as_png()
    )
    return np.asarray(Image.open(io.BytesIO(taken)).convert("RGB")).astype(int)


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_the_page_opens_from_a_disk_without_errors_or_requests(page, open_page):
    browser = open_page(page.path)
    assert browser.title == "out.zarr, image: done – chunkrestore"
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    shown = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert shown == [400, 400, 400, 256, 256, 256]


def test_the_browser_shows_the_numbers_of_the_tables(page, open_page):
    browser = open_page(page.path)
    for name, rows in page.tables.items():
        cells = browser.execute_script(
            "return [...document.getElementById(arguments[0]).rows].map(r => [...r.cells].map(c => c.textContent))",
            name,
        )
        assert cells == rows


def test_a_screenshot_shows_the_page_in_light_and_dark(page, open_page, tmp_path):
    brightness = {}
    for theme in ("light", "dark"):
        browser = open_page(page.path, theme)
        pixels = pixels_of(browser)
        assert len(np.unique(pixels @ (65536, 256, 1))) > 500
        assert pixels.std() > 20
        brightness[theme] = pixels[:, :15].mean()
    assert brightness["light"] > 220
    assert brightness["dark"] < 60


def test_the_slider_moves_the_line_between_before_and_after(page, open_page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = open_page(page.path)
    compare = browser.find_element("css selector", ".compare")
    slider = compare.find_element("css selector", "input")
    browser.execute_script("arguments[0].scrollIntoView()", compare)

    def split():
        return float(browser.execute_script("return getComputedStyle(arguments[0]).left", line)[:-2])

    line = compare.find_element("css selector", ".line")
    width = compare.size["width"]
    middle = pixels_of(compare)
    assert split() == pytest.approx(width / 2, abs=2)
    # Dragged by the mouse to three quarters.
    ActionChains(browser).drag_and_drop_by_offset(slider, width // 4, 0).perform()
    until(lambda: abs(split() - 0.75 * width) < 0.02 * width)
    slider.send_keys(Keys.HOME)
    until(lambda: split() == 0)
    after = pixels_of(compare)
    slider.send_keys(Keys.END)
    until(lambda: abs(split() - width) < 1)
    before = pixels_of(compare)
    assert np.abs(before - after).mean() > 5
    rows, half, margin = slice(20, 60), width // 2, 25
    left, right = slice(margin, half - margin), slice(half + margin, width - margin)
    for part, same, other in ((left, before, after), (right, after, before)):
        # A column may differ where the browser joins what it draws in pieces.
        assert (middle[rows, part] != same[rows, part]).mean() < 0.01
        assert (middle[rows, part] != other[rows, part]).mean() > 0.5


def test_labels_and_brightness_can_be_switched(page, open_page):
    from selenium.webdriver.common.keys import Keys

    browser = open_page(page.path)
    compare = browser.find_element("css selector", ".compare")
    compare.find_element("css selector", "input").send_keys(Keys.HOME)

    def colour():
        pixels = pixels_of(compare)[20:-20, 20:-20]
        return (pixels.max(axis=-1) - pixels.min(axis=-1)).max()

    until(lambda: colour() > 50)
    browser.find_element("id", "labels").click()
    until(lambda: colour() == 0)
    mean = pixels_of(compare).mean()
    browser.find_element("id", "brightness").send_keys(Keys.END)
    until(lambda: pixels_of(compare).mean() > 1.3 * mean)


def test_nothing_that_a_job_is_called_runs_in_the_browser(tmp_path, open_page):
    folder = tmp_path / "image"
    begin(folder, {"passes": [{"operators": [{"operator": NASTY}]}], "output": {"labels": None}}).close()
    write_events(
        folder, (1.0, "begin", {"host": NASTY, "pid": 3}), (2.0, "end", {"state": NASTY, "message": NASTY})
    )
    browser = open_page(write_html(folder, f"/results/{NASTY}.zarr"))
    assert browser.title.endswith(".zarr, image: unfinished – chunkrestore")
    assert "owned" in browser.title
    assert browser.title != "owned"
    assert browser.get_log("browser") == []
    assert NASTY in browser.find_element("css selector", ".path").text


def test_a_script_that_got_into_the_page_all_the_same_would_not_run(page, tmp_path, open_page):
    copy = tmp_path / "report.html"
    copy.write_text(page.content.replace("<main>", "<main><script>document.title='owned'</script>"))
    browser = open_page(copy)
    assert browser.title == "out.zarr, image: done – chunkrestore"
    assert "Content Security Policy" in " ".join(entry["message"] for entry in browser.get_log("browser"))

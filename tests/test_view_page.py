"""The page of `chunkrestore view` in a real browser: what the canvas shows is what NumPy says of the store."""

import base64
import io
import json
import shutil
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
from browsing import chromium, serving
from hostile import edit
from observing import wait_for
from PIL import Image

from chunkrestore.ome_zarr import open_image, write_image, write_labels

pytestmark = pytest.mark.timeout(120)

WINDOW = (40.0, 220.0)
VOXEL_SIZE = (2.0, 0.5, 0.5)
SHAPE = (12, 300, 280)
NASTY = "<img src=x onerror=document.title='owned'>"


def smooth(shape, dtype="u2", seed=0):
    """Numbers that differ from voxel to voxel but keep their order under averaging."""
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    waves = sum(np.sin((k + 1) * (0.11 + 0.07 * seed) * g + seed) for k, g in enumerate(grid))
    return (130 + 35 * waves + np.random.default_rng(seed).integers(0, 5, shape)).astype(dtype)


until = partial(wait_for, what="the page", seconds=15.0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium"), "900,640") as opened:
        yield opened


def settled(browser):
    """Wait until everything that was asked for is drawn."""
    ready = "const v = document.getElementById('view'); return v && v.getAttribute('aria-busy') === 'false' && !!scene"
    until(lambda: browser.execute_script(ready))


def decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


class Page:
    """The page of one server in the browser."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def open(self, **state):
        """Show a state of the page afresh, which its address alone decides."""
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        text = "&".join(f"{key}={value}" for key, value in state.items())
        self.browser.get(f"{self.server.url}#{text}")
        settled(self.browser)
        return self

    @property
    def errors(self):
        return self.browser.get_log("browser")

    @property
    def state(self):
        """What the page says it shows."""
        return self.browser.execute_script("return state")

    def run(self, script, *arguments):
        result = self.browser.execute_script(script, *arguments)
        settled(self.browser)
        return result

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def canvas(self):
        """Return the pixels that the canvas holds, int (height, width, 3)."""
        settled(self.browser)
        content = self.browser.execute_script("return document.getElementById('canvas').toDataURL()")
        return decoded(base64.b64decode(content.partition(",")[2]))

    def screen(self):
        return decoded(self.browser.get_screenshot_as_png())

    def readout(self):
        return self.find("#readout").text

    def move_to(self, x, y):
        """Put the cursor over a pixel of the canvas."""
        from selenium.webdriver import ActionChains

        canvas = self.find("#canvas")
        size = canvas.size
        ActionChains(self.browser).move_to_element_with_offset(
            canvas, x - size["width"] // 2, y - size["height"] // 2
        ).perform()


def grey(plane):
    """Return what a plane looks like in the window of these tests."""
    return np.clip(np.rint((plane.astype("f8") - WINDOW[0]) * 255 / (WINDOW[1] - WINDOW[0])), 0, 255)


def seen(plane, level, at, centre, um, size):
    """Return the values under the pixels of a canvas, -1 outside, and where that is, from first principles."""
    values = np.full(size, -1.0)
    index = []
    for n, middle, scale, start, length in zip(size, centre, level[0], level[1], plane.shape, strict=True):
        position = middle + (np.arange(n) + 0.5 - n / 2) * um
        i = np.floor((position - (start - scale / 2)) / scale).astype(int)
        index.append(np.where((i >= 0) & (i < length), i, -1))
    inside = (index[0] >= 0)[:, np.newaxis] & (index[1] >= 0)
    values[inside] = plane[np.ix_(index[0], index[1])][inside]
    return values, inside


def assert_shows(page, image, plane, at, centre, um, level=0, tolerance=1):
    """Assert that the canvas shows a plane of `image` (axes zyx) in the window of these tests."""
    across, down, right = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}[plane]
    own = image.levels[level]
    data = np.take(own.reader.read(0, 0, tuple(slice(0, n) for n in own.shape)), at[across], axis=across)
    geometry = [(own.voxel_size[a], own.voxel_size[a]) for a in (down, right)]
    scales, starts = [s for s, _ in geometry], [own.translation[a] for a in (down, right)]
    canvas = page.canvas()
    values, inside = seen(data, (scales, starts), at, (centre[down], centre[right]), um, canvas.shape[:2])
    assert inside.any()
    wanted = np.where(inside, grey(values), 0)
    np.testing.assert_allclose(canvas, np.repeat(wanted[..., np.newaxis], 3, axis=-1), atol=tolerance)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An image with two kinds of labels."""
    path = tmp_path_factory.mktemp("page") / "image.zarr"
    write_image(smooth(SHAPE), path, axes="zyx", voxel_size=VOXEL_SIZE, chunks=(8, 64, 64))
    labels = np.zeros(SHAPE, "i4")
    labels[3:9, 100:140, 100:160] = 7
    labels[3:9, 140:180, 100:160] = 300
    write_labels(labels, path, "cells")
    write_labels(labels.astype("i8") * 2**35 + (labels > 0), path, "wide")
    colors = [{"label-value": 7, "rgba": [255, 0, 0, 255]}]
    edit(path / "labels/cells/zarr.json", "attributes", "ome", "image-label", "colors", to=colors)
    return path


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    path = tmp_path_factory.mktemp("before") / "raw.zarr"
    write_image(smooth(SHAPE, seed=3), path, axes="zyx", voxel_size=VOXEL_SIZE)
    return path


@pytest.fixture(scope="module")
def server(store):
    with serving(store) as server:
        yield server


@pytest.fixture
def page(browser, server):
    return Page(browser, server)


CHANNEL = f"1,ffffff,{WINDOW[0]},{WINDOW[1]}"
PLAIN = {"c0.0": CHANNEL, "l1": 0, "l2": 0, "um": 0.5, "centre": "11,75,70", "at": "4,150,140"}


def test_the_page_opens_without_errors_or_requests_elsewhere(page):
    page.browser.get_log("performance")
    page.open()
    assert page.browser.title == "image.zarr – chunkrestore"
    assert page.errors == []
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert sum("/tile/" in url for url in asked) >= 4
    assert all(url.startswith((page.server.url, "data:", "about:")) for url in asked)
    assert page.canvas().std() > 10


def test_a_script_that_got_into_the_page_all_the_same_would_not_run(page):
    page.open()
    page.run(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s)"
    )
    assert page.browser.title == "image.zarr – chunkrestore"
    assert "Content Security Policy" in " ".join(entry["message"] for entry in page.errors)


@pytest.mark.parametrize("plane", ["xy", "xz", "yz"])
@pytest.mark.parametrize("um", [0.5, pytest.param(0.2, marks=pytest.mark.slow)])
def test_every_plane_shows_the_voxels_of_the_store(page, store, plane, um):
    page.open(**{**PLAIN, "plane": plane, "um": um})
    assert_shows(page, open_image(store), plane, (4, 150, 140), (11, 75, 70), um)
    assert page.errors == []


def test_the_slider_changes_the_plane(page, store):
    from selenium.webdriver.common.keys import Keys

    page.open(**PLAIN)
    image, slider = open_image(store), page.find("#plane")
    for key, at in ((Keys.ARROW_RIGHT, 5), (Keys.END, 11), (Keys.HOME, 0)):
        slider.send_keys(key)
        until(lambda at=at: page.state["at"][0] == at)
        assert_shows(page, image, "xy", (at, 150, 140), (11, 75, 70), 0.5)
    assert page.find("#plane-now").text.startswith("z 0 / 11")


def test_wheel_and_keys_change_the_plane_and_zoom(page):
    page.open(**PLAIN)
    wheel = (
        "document.getElementById('canvas').dispatchEvent("
        "new WheelEvent('wheel', {deltaY: 40, cancelable: true, ctrlKey: arguments[0]}))"
    )
    page.run(wheel, False)
    assert page.state["at"][0] == 5
    page.run(wheel, True)
    assert page.state["um"] > 0.5
    canvas = page.find("#canvas")
    for key, plane in (("2", "xz"), ("3", "yz"), ("1", "xy")):
        canvas.send_keys(key)
        until(lambda plane=plane: page.state["plane"] == plane)
    um = page.state["um"]
    canvas.send_keys("+")
    until(lambda: page.state["um"] == pytest.approx(0.8 * um))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_lie_where_their_metadata_says_to_half_a_voxel(page, store, level):
    image = open_image(store)
    assert len(image.levels) > level
    um = image.levels[level].voxel_size[-1] * 0.95
    page.open(**{**PLAIN, "um": um})
    position = 4 * VOXEL_SIZE[0]
    own = image.levels[level]
    at = int(np.floor((position - own.translation[0]) / own.voxel_size[0] + 0.5))
    assert_shows(page, image, "xy", (at, 0, 0), (11, 75, 70), um, level=level)


def test_zooming_out_moves_nothing(page):
    """The brightest spot of a smooth image stays where it is, to less than a voxel of the coarse level."""
    found = []
    for um in (0.5, 1.0, 2.0):
        page.open(**{**PLAIN, "um": um})
        canvas = page.canvas()[..., 0].astype(float)
        rows, columns = np.indices(canvas.shape)
        size = np.array(canvas.shape)
        # A box of 60 micrometres around the middle of the view.
        weight = (
            canvas
            * (np.abs(rows - size[0] / 2 + 0.5) * um < 30)
            * (np.abs(columns - size[1] / 2 + 0.5) * um < 30)
        )
        centre = [(axis * weight).sum() / weight.sum() for axis in (rows, columns)]
        found.append([(c + 0.5 - n / 2) * um for c, n in zip(centre, size, strict=True)])
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (3, 2)), atol=0.25)


def test_a_view_across_tiles_has_no_seams(page, store):
    """Tiles are 256 voxels long, the image is longer."""
    page.open(**{**PLAIN, "centre": "11,127.75,127.75", "um": 0.125})
    assert_shows(page, open_image(store), "xy", (4, 0, 0), (11, 127.75, 127.75), 0.125)


def test_labels_are_coloured_where_they_are(page, store):
    state = {**PLAIN, "um": 0.25, "centre": "11,70,65"}
    plain = page.open(**state).canvas()
    painted = page.open(**{**state, "l1": 1, "style": "fill", "opacity": 1}).canvas()
    labels = open_image(store).label("cells")
    plane = labels.source().read(0, 0, tuple(slice(0, n) for n in SHAPE))[4]
    values, _ = seen(plane, (VOXEL_SIZE[1:], (0, 0)), None, (70, 65), 0.25, plain.shape[:2])
    assert {7, 300} <= set(np.unique(values))
    np.testing.assert_array_equal((painted != plain).any(axis=-1) | (values <= 0), True)
    np.testing.assert_array_equal(painted[values <= 0], plain[values <= 0])
    assert (painted[values == 7] == (255, 0, 0)).all()
    assert len(np.unique(painted[values == 300], axis=0)) == 1
    outlined = page.open(**{**state, "l1": 1, "style": "line", "opacity": 1}).canvas()
    inner = np.zeros(values.shape, bool)
    inner[1:-1, 1:-1] = (
        (values[1:-1, 1:-1] == values[:-2, 1:-1]) & (values[1:-1, 1:-1] == values[2:, 1:-1])
        & (values[1:-1, 1:-1] == values[1:-1, :-2]) & (values[1:-1, 1:-1] == values[1:-1, 2:])
    )  # fmt: skip
    np.testing.assert_array_equal(outlined[inner], plain[inner])
    edge = ~inner & (values == 7)
    edge[[0, -1]] = edge[:, [0, -1]] = False
    assert (outlined[edge] == (255, 0, 0)).all()


@pytest.mark.slow
def test_labels_can_be_switched_and_mixed(page):
    from selenium.webdriver.common.keys import Keys

    page.open(**{**PLAIN, "style": "fill"})
    plain = page.canvas()
    page.find("input[aria-label='Show labels cells']").click()
    until(lambda: (page.canvas() != plain).any())
    half = page.find("#opacity")
    half.send_keys(Keys.HOME)
    until(lambda: page.state["opacity"] == 0)
    np.testing.assert_array_equal(page.canvas(), plain)


def test_the_cursor_tells_position_value_and_ids(page, store):
    page.open(**{**PLAIN, "um": 0.25, "centre": "8,75,65", "l1": 1, "l2": 1})
    image = open_image(store)
    size = page.find("#canvas").size
    for dx, dy in ((0, 0), (-37, 21), (60, -90), (3, 44)):
        x, y = size["width"] // 2 + dx, size["height"] // 2 + dy
        page.move_to(x, y)
        # What the browser takes for the place of the mouse is its business; what the page says of it must be true.
        text = until(page.readout)
        words = text.split()
        z, v, u = (int(words[words.index(axis) + 1]) for axis in "zyx")
        want_u = np.floor((65 + (x + 0.5 - size["width"] / 2) * 0.25) / 0.5 + 0.5)
        want_v = np.floor((75 + (y + 0.5 - size["height"] / 2) * 0.25) / 0.5 + 0.5)
        assert (z, abs(v - want_v) <= 1, abs(u - want_u) <= 1) == (4, True, True)
        parts = dict(part.rsplit(" ", 1) for part in text.split(" · ")[2:])
        voxel = tuple(slice(i, i + 1) for i in (z, v, u))
        assert int(parts["image.zarr"]) == image.source().read(0, 0, voxel)[0, 0, 0]
        assert int(parts["cells"]) == image.label("cells").source().read(0, 0, voxel)[0, 0, 0]
        assert int(parts["wide"]) == image.label("wide").source().read(0, 0, voxel)[0, 0, 0]


def test_a_click_tells_what_the_table_says_of_an_object(browser, store):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"t": [0, 0], "c": [0, 0], "label": [7, 300], "volume_um3": [1.5, 2.25], "class": [NASTY, None]}
    parquet.write_table(pyarrow.table(rows), store / "labels/cells/objects.parquet")
    with serving(store, labels="cells") as server:
        page = Page(browser, server).open(**{**PLAIN, "um": 0.25, "centre": "8,60,65", "l1": 1})
        page.find("#canvas").click()
        until(lambda: page.find("#object").is_displayed() and "volume_um3" in page.find("#object dl").text)
        assert page.find("#object h2").text == "cells 7"
        told = page.run("return [...document.querySelectorAll('#object dl > *')].map((e) => e.textContent)")
        assert dict(zip(told[::2], told[1::2], strict=True)) == {
            "volume_um3": "1.5", "class": NASTY,
        }  # fmt: skip
        assert page.errors == []


def test_the_divider_stands_between_before_and_after(browser, store, earlier):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    with serving(store, before=earlier, labels=()) as server:
        state = {**PLAIN, "c1.0": CHANNEL}
        page = Page(browser, server).open(**{**state, "split": 0})
        assert_shows(page, open_image(store), "xy", (4, 0, 0), (11, 75, 70), 0.5)
        after = page.canvas()
        page.open(**{**state, "split": 1})
        assert_shows(page, open_image(earlier), "xy", (4, 0, 0), (11, 75, 70), 0.5)
        before = page.canvas()
        page.open(**{**state, "split": 0.5})
        for share in (0.5, 0.75):
            mixed, cut = page.canvas(), round(page.state["split"] * before.shape[1])
            assert cut == pytest.approx(share * before.shape[1], abs=3)
            np.testing.assert_array_equal(mixed[:, :cut], before[:, :cut])
            np.testing.assert_array_equal(mixed[:, cut:], after[:, cut:])
            if share == 0.5:
                ActionChains(browser).drag_and_drop_by_offset(
                    page.find("#divider"), before.shape[1] // 4, 0
                ).perform()
                until(lambda: page.state["split"] > 0.7)
        assert [page.find(f"#{side}").text for side in ("left", "right")] == [
            "Before: raw.zarr",
            "After: image.zarr",
        ]
        page.find("#divider").send_keys(Keys.HOME)
        until(lambda: page.state["split"] == 0)
        np.testing.assert_array_equal(page.canvas(), after)


def test_labels_lie_over_the_result_and_if_wanted_over_both(browser, store, earlier):
    with serving(store, before=earlier, labels="cells") as server:
        state = {
            **PLAIN,
            "c1.0": CHANNEL,
            "um": 0.25,
            "centre": "8,70,65",
            "split": 0.5,
            "style": "fill",
            "opacity": 1,
        }
        page = Page(browser, server)
        plain, right, both = (
            page.open(**{**state, **more}).canvas() for more in ({"l2": 0}, {"l2": 1}, {"l2": 1, "across": 1})
        )
        cut = plain.shape[1] // 2
        np.testing.assert_array_equal(right[:, :cut], plain[:, :cut])
        assert (right[:, cut:] != plain[:, cut:]).any()
        assert (both[:, :cut] != plain[:, :cut]).any()
        np.testing.assert_array_equal(both[:, cut:], right[:, cut:])


@pytest.mark.slow
def test_fine_screens_show_the_same_places(page, store):
    metrics = {"width": 700, "height": 500, "deviceScaleFactor": 2, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(**PLAIN)
        assert page.find("#canvas").size["width"] * 2 == page.canvas().shape[1]
        assert_shows(page, open_image(store), "xy", (4, 150, 140), (11, 75, 70), 0.25)
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_contrast_follows_sliders_numbers_and_auto_without_asking_again(page, store):
    from selenium.webdriver.common.keys import Keys

    page.open(**PLAIN)
    page.browser.get_log("performance")
    low, high = page.browser.find_elements("css selector", "input[type=number]")
    for field, value in ((low, "100"), (high, "101")):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.ENTER)
    until(lambda: page.run("return sources[0].channels[0].window") == [100, 101])
    assert set(np.unique(page.canvas())) == {0, 255}
    page.find("button[title^='Contrast of']").click()
    until(lambda: page.run("return sources[0].channels[0].window") not in (None, [100, 101]))
    start, end = page.run("return sources[0].channels[0].window")
    data = open_image(store).data[4].compute()
    assert start == pytest.approx(np.percentile(data, 0.1), abs=3)
    assert end == pytest.approx(np.percentile(data, 99.9), abs=3)
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    assert not [m for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_the_address_keeps_what_is_shown(page):
    page.open(**{**PLAIN, "plane": "xz", "l1": 1, "style": "line", "opacity": 0.25, "um": 0.3})
    shown = page.canvas()
    page.run("step(1); step(-1)")
    address = until(lambda: "style=line" in page.browser.current_url and page.browser.current_url)
    page.browser.get("about:blank")
    page.browser.get(address)
    np.testing.assert_array_equal(page.canvas(), shown)


@pytest.mark.parametrize(
    "wrong",
    [
        "um=x&centre=1&at=a,b,c", "plane=__proto__&c0.0=1,zz,5,1", "um=1e400&t=-5&split=NaN",
        "%ff%fe&===&at=1e9,-1e9,0",
    ],
)  # fmt: skip
def test_a_wrong_address_is_no_harm(page, wrong):
    page.browser.get("about:blank")
    page.browser.get(f"{page.server.url}#{wrong}")
    settled(page.browser)
    assert page.errors == []
    assert page.canvas().std() > 5


def test_channels_have_colours_and_can_be_switched(browser, tmp_path):
    data = np.stack([smooth((40, 50)), smooth((40, 50), seed=2)])
    write_image(data, tmp_path / "image.zarr", axes="cyx", voxel_size=(0.5, 0.5), channels=["a", NASTY])
    with serving(tmp_path / "image.zarr") as server:
        state = {"um": 0.5, "centre": "0,9.75,12.25"}
        page = Page(browser, server).open(**state, **{"c0.0": "1,ff0000,40,220", "c0.1": "1,00ffff,40,220"})
        canvas = page.canvas()
        v, u = (canvas.shape[0] - 40) // 2, (canvas.shape[1] - 50) // 2
        wanted = np.stack([grey(data[0]), grey(data[1]), grey(data[1])], axis=-1)
        np.testing.assert_allclose(canvas[v : v + 40, u : u + 50], wanted, atol=1)
        page.find("input[aria-label='Show a']").click()
        until(lambda: page.canvas()[..., 0].max() == 0)
        assert not page.find("#plane-row").is_displayed()
        assert not page.find("#planes").is_displayed()
        assert NASTY in page.find("#sources").text
        assert page.browser.title == "image.zarr – chunkrestore"
        assert page.errors == []


@pytest.mark.parametrize(
    "dtype", ["f4", *(pytest.param(d, marks=pytest.mark.slow) for d in ("u1", "i2", "f8", "i4", "bool"))]
)
def test_every_dtype_and_time_is_shown(browser, tmp_path, dtype):
    import zarr

    data = (smooth((3, 30, 40)) > 130) if dtype == "bool" else smooth((3, 30, 40)).astype(dtype)
    if dtype == "f4":
        data[:, :5] = np.nan
    axes = [{"name": "t", "type": "time"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]}
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}
    zarr.create_group(tmp_path / "image.zarr", zarr_format=3, attributes={"ome": ome})
    zarr.create_array(tmp_path / "image.zarr/0", data=data, chunks=(1, 16, 16), zarr_format=3)
    with serving(tmp_path / "image.zarr") as server:
        low, high = (0, 1) if dtype == "bool" else WINDOW
        page = Page(browser, server).open(
            um=1, centre="0,14.5,19.5", t=2, **{"c0.0": f"1,ffffff,{low},{high}"}
        )
        canvas = page.canvas()[..., 0]
        v, u = (canvas.shape[0] - 30) // 2, (canvas.shape[1] - 40) // 2
        wanted = 255.0 * data[2] if dtype == "bool" else np.nan_to_num(grey(data[2]))
        np.testing.assert_allclose(canvas[v : v + 30, u : u + 40], wanted, atol=1)
        assert page.find("#time-now").text == "t 2 / 2"
        page.open()
        assert page.canvas().std() > 5
        assert page.errors == []


def test_labels_alone_are_shown(browser, tmp_path):
    labels = np.zeros((6, 40, 40), "i8")
    labels[2:4, 10:20, 10:30] = 2**40
    write_labels(labels, tmp_path / "labels.zarr", "cells", axes="zyx", voxel_size=VOXEL_SIZE)
    with serving(tmp_path / "labels.zarr") as server:
        page = Page(browser, server).open(um=0.5, centre="5,9.75,9.75", at="3,0,0", style="fill", opacity=1)
        canvas = page.canvas().max(axis=-1) > 0
        v, u = (canvas.shape[0] - 40) // 2, (canvas.shape[1] - 40) // 2
        np.testing.assert_array_equal(canvas[v : v + 40, u : u + 40], labels[3] > 0)
        assert page.errors == []


@pytest.mark.slow
def test_the_scale_bar_is_as_long_as_it_says(page):
    for um in (0.03, 0.5, 1.7):
        page.open(**{**PLAIN, "um": um})
        length, unit = page.find("#scale").text.split()
        micrometres = float(length) * {"nm": 1e-3, "µm": 1, "mm": 1e3}[unit]
        assert page.find("#scale i").size["width"] == pytest.approx(micrometres / um, abs=1)


def test_an_image_without_coarse_levels_is_not_read_whole(browser, tmp_path):
    import zarr

    axes = [
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    dataset = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0, 1.0]}]}
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [dataset]}]}
    path = tmp_path / "image.zarr"
    zarr.create_group(path, zarr_format=3, attributes={"ome": ome})
    zarr.create_array(
        path / "0", shape=(200_000, 200_000), dtype="u1", chunks=(256, 256), fill_value=9, zarr_format=3
    )
    with serving(path) as server:
        page = Page(browser, server).open(**{"c0.0": "1,ffffff,0,18"})
        assert (page.canvas() == 128).all()
        assert page.run("return tiles.size") <= 300
        assert page.find("#far").is_displayed()
        assert "chunkrestore pyramid" in page.find("#notes").text


@pytest.mark.slow
def test_what_cannot_be_read_is_said_and_the_rest_is_shown(browser, store, tmp_path):
    path = shutil.copytree(store, tmp_path / "image.zarr")
    (path / "0/c/0/0/0").write_bytes(b"damaged")
    with serving(path, labels=()) as server:
        page = Page(browser, server).open(**{**PLAIN, "centre": "11,127.75,127.75", "um": 0.05})
        assert "cannot be decoded" in page.find("#message").text
        canvas = page.canvas()
        v, u = (n // 2 for n in canvas.shape[:2])
        assert canvas[: v - 1, : u - 1].max() == 0
        assert canvas[v + 1 :, u + 1 : u + 200].min() > 0


def test_a_page_that_does_not_exist_is_not_found(browser, server):
    browser.get(f"{server.url}nothing")
    assert browser.find_element("css selector", "body").text == "There is nothing here."


def test_every_control_has_a_name(page):
    page.open(**{**PLAIN, "l1": 1})
    nameless = page.run(
        "return [...document.querySelectorAll('input, button, select, canvas, [role=slider]')].filter((e) =>"
        " !e.getAttribute('aria-label') && !e.labels?.length && !e.textContent.trim()).map((e) => e.outerHTML)"
    )
    assert nameless == []


@pytest.mark.slow
def test_the_page_follows_the_theme(page):
    brightness = {}
    for theme in ("light", "dark"):
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        page.open(**PLAIN)
        brightness[theme] = page.screen()[:40, :, :].mean()
    assert brightness["light"] > 200
    assert brightness["dark"] < 70


def test_the_page_is_small():
    page = files("chunkrestore.viewer").joinpath("page")
    assert sum(len(part.read_bytes()) for part in page.iterdir()) < 40_000

"""A real browser for pages, and a server for what the viewer shows."""

import shutil
import threading
from contextlib import contextmanager

import pytest

from chunkrestore.viewer.server import ViewServer
from chunkrestore.viewer.sources import open_sources


@contextmanager
def chromium(profile, size):
    """Lend Chromium without a window, with its logs; skip the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("there is no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"window-size={size}", "hide-scrollbars",
        f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


@contextmanager
def serving(store, **options):
    """Serve a store as `view` does; yield the server."""
    store = str(store)
    with ViewServer(open_sources(store, **options), store) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

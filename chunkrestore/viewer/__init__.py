"""Look at stores: a page on loopback, napari, or viewers on the web."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence

from chunkrestore.ome_zarr import store as stores

Store = str | os.PathLike[str]

VIEWERS = ("auto", "napari", "web")


def view(
    store: Store,
    *,
    before: Store | None = None,
    labels: str | Sequence[str] | None = None,
    port: int = 0,
    browser: bool = True,
    viewer: str = "auto",
) -> None:
    """Show an OME-Zarr with its labels, and beside it what it was made from, until the window is closed or Ctrl-C.

    Parameters
    ----------
    store
        OME-Zarr image, label image or group with labels; path or URL. Only what is shown is read.
    before
        Image to compare with; by default the input that the provenance of `store` names, if it is still there.
    labels
        Names of the label images to show; all by default.
    port
        Port of 127.0.0.1 for the page; a free one by default. A port given by hand means the page, not napari.
    browser
        Open the page in a browser, if there is a display.
    viewer
        ``"napari"``, ``"web"``, or ``"auto"``: napari where it is installed with Qt and has a display.

    Raises
    ------
    FileNotFoundError, ValueError
        If `store`, `before` or `labels` cannot be opened, or there is no such viewer.
    ImportError
        If napari is asked for and cannot be started.
    OSError
        If the port is taken.
    """
    if viewer not in VIEWERS:
        raise ValueError(f"`viewer` {viewer!r} is not known, only {', '.join(map(repr, VIEWERS))}")
    if not 0 <= port < 2**16:
        raise ValueError(f"`port` {port} must lie between 0 (any free one) and 65535")
    from chunkrestore.viewer.napari import can_show, open_in_napari

    if viewer == "napari" or (viewer == "auto" and not port and has_display() and can_show()):
        open_in_napari(store, before=before, labels=labels, block=True)
        return
    _serve(store, before, labels, port, browser=browser)


def has_display() -> bool:
    """Return whether windows can be opened here, as far as the environment tells."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"))


def _serve(
    store: Store, before: Store | None, labels: str | Sequence[str] | None, port: int, *, browser: bool
) -> None:
    from chunkrestore.viewer.server import ViewServer
    from chunkrestore.viewer.sources import open_sources

    path = stores.location(store)
    sources = open_sources(path, before=before, labels=labels)
    try:
        server = ViewServer(sources, path, port)
    except OSError as error:
        raise OSError(
            f"`port` {port} of 127.0.0.1 cannot be used: {error.strerror}; choose another"
        ) from None
    with server:
        print(f"{path} is shown at {server.url}", flush=True)
        for link in server.links:
            print(f"  {link['name']}: {link['url']}", flush=True)
        has_no_window = not has_display()
        if has_no_window:
            print(f"  from another machine: ssh -L {server.server_port}:127.0.0.1:{server.server_port} HOST")
        print("  Ctrl-C ends it.", flush=True)
        try:
            if browser and not has_no_window:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", flush=True)

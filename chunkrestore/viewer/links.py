"""Links to viewers on the web that read the store from this machine: neuroglancer and vizarr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from chunkrestore.viewer.scene import shown_channels
from chunkrestore.viewer.sources import Source

NEUROGLANCER = "https://neuroglancer-demo.appspot.com"
VIZARR = "https://hms-dbmi.github.io"

ORIGINS = (NEUROGLANCER, VIZARR)
"""Web pages that may read the store from a browser on this machine: those that links lead to, and no others."""


def viewer_links(sources: Sequence[Source], url: str, root: str) -> list[dict[str, str]]:
    """Return links by which other viewers open the store.

    Parameters
    ----------
    sources
        What is looked at.
    url
        Where the store is served, without a final slash.
    root
        Path of that store; sources that lie elsewhere are left out.
    """
    own = [source for source in sources if _inside(source.image.path, root) is not None]
    if not own:
        return []
    first = f"{url}{_inside(own[0].image.path, root)}"
    return [
        {"name": "neuroglancer", "url": neuroglancer_link(own, url, root)},
        # vizarr finds the labels of an image by itself.
        {"name": "vizarr", "url": f"{VIZARR}/vizarr/?source={quote(first, safe=':/')}"},
    ]


def neuroglancer_link(sources: Sequence[Source], url: str, root: str) -> str:
    """Return a link with one layer for the image, or per channel, and a segmentation layer for each label image.

    References
    ----------
    State of a viewer as JSON behind ``#!``; sources as ``URL/|zarr3:`` or ``URL/|zarr2:``
    (https://neuroglancer-docs.web.app).
    """
    layers = [_layer(source, f"{url}{_inside(source.image.path, root)}/") for source in sources]
    has_z = any("z" in source.image.axes for source in sources)
    state = {"layers": layers, "layout": "4panel-alt" if has_z else "xy"}
    return f"{NEUROGLANCER}/#!{quote(json.dumps(state, separators=(',', ':')), safe='')}"


def _layer(source: Source, url: str) -> dict[str, Any]:
    image = source.image
    place = f"{url}|{'zarr3' if image.levels[0].reader.zarr_format == 3 else 'zarr2'}:"
    if source.kind == "labels":
        return {"type": "segmentation", "name": source.name, "source": place}
    if image.n_c > 1:
        # An automatic layer turns into one layer per channel, with the colours of the metadata.
        return {"type": "auto", "name": source.name, "source": place}
    layer: dict[str, Any] = {"type": "image", "name": source.name, "source": place}
    window = shown_channels(image)[0]["window"]
    return {**layer, "shaderControls": {"normalized": {"range": window}}} if window else layer


def _inside(path: str, root: str) -> str | None:
    """Return the part of a URL that leads from `root` to `path`, None if it does not lie there."""
    if path == root:
        return ""
    return f"/{quote(path[len(root) + 1 :])}" if path.startswith(f"{root}/") else None

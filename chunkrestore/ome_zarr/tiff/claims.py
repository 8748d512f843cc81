"""What TIFF files claim, checked before tifffile believes it, and what tifffile only logs, as errors."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chunkrestore.ome_zarr.limits import short

_log = logging.getLogger(__name__)

MAX_PAGES = 2**24
"""Of an image, and of a plane's index in OME-XML: tifffile makes a list of them before it looks at the file."""

AGAIN = "restore it from a copy"
"""What to do about a file of which something is missing."""

_COUNTS = re.compile(r"\b(?:Size[ZCT]|First[ZCT]|IFD|PlaneCount|NumPlanes)\s*=\s*[\"']\s*(\d+)")
_STEPS = re.compile(r"<(?:\w+:)?ModuloAlong[ZCT]\b")


def check_ome(xml: str | None, path: str) -> None:
    """Raise if OME-XML claims what tifffile would make room for before it looks at the file.

    Raises
    ------
    ValueError
        If it counts more planes than any image has, has a document type, or divides an axis.
    """
    if not xml:
        return
    if "<!DOCTYPE" in xml:
        raise ValueError(f"{path}: its OME-XML has a document type, which OME-XML has not; it is not read")
    if largest := next((n for n in _COUNTS.findall(xml) if len(n) > 9 or int(n) > MAX_PAGES), None):
        raise ValueError(
            f"{path}: its OME-XML counts {short(largest)} planes, more than {MAX_PAGES}; no image has"
        )
    for pixels in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", xml):
        n_planes = math.prod(int(n) for n in re.findall(r"\bSize[ZCT]\s*=\s*[\"']\s*(\d+)", pixels))
        if n_planes > MAX_PAGES:
            raise ValueError(
                f"{path}: its OME-XML counts {n_planes} planes, more than {MAX_PAGES}; no image has"
            )
    if _STEPS.search(xml):
        raise ValueError(
            f"{path}: its OME-XML divides an axis (ModuloAlong), which OME-Zarr cannot say; convert the parts alone"
        )


@contextmanager
def no_errors(path: str) -> Iterator[None]:
    """Make an error of what tifffile logs as one in this thread: it would go on with a part of the file.

    Raises
    ------
    ValueError
        With the first of what was logged, at the end. Warnings are logged again, with the path.
    """
    logger, thread = logging.getLogger("tifffile"), threading.get_ident()
    found: list[str] = []

    class _Collected(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread != thread:
                return
            if record.levelno >= logging.ERROR:
                found.append(record.getMessage())
            else:
                _log.log(record.levelno, "%s: %s", path, record.getMessage())

    handler, level = _Collected(), logger.level
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.ERROR):  # whoever wants to see nothing must miss no page all the same
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    if found:
        raise ValueError(f"{path} is damaged: {short(found[0])}; {AGAIN}")

"""The images that OME-XML lists: all that this package needs of ``METADATA.ome.xml``.

The document comes from anybody, so it is read as a stream of tags: nothing of it is kept but a name per image,
and a document type, which could define entities that grow without end or name files and URLs, is refused.
"""

from __future__ import annotations

from xml.parsers.expat import ExpatError, ParserCreate

from chunkrestore.ome_zarr.limits import MAX_DEPTH

MAX_IMAGES = 2**16
"""Images of one document: a plate of 1536 wells with 42 fields each."""

_PART = 2**16


def image_names(content: bytes, where: str) -> list[str]:
    """Return the names of the ``Image`` elements of OME-XML, in their order; empty text where one has none.

    Parameters
    ----------
    content
        The document.
    where
        Its path, for messages.

    Raises
    ------
    ValueError
        If it is no XML, has a document type, is nested deeper than metadata can be, or lists too many images.
    """
    names: list[str] = []
    depth = 0

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels; it is no OME-XML")
        if depth == 2 and tag.rpartition(":")[2] == "Image":
            names.append(attributes.get("Name", "")[:256])
            if len(names) > MAX_IMAGES:
                raise ValueError(f"{where} lists more than {MAX_IMAGES} images; no collection has")

    def end(_tag: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_type: object) -> None:
        raise ValueError(f"{where} has a document type (DOCTYPE), which OME-XML has not; it is not read")

    parser = ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.StartDoctypeDeclHandler = refuse
    try:
        for start in range(0, len(content), _PART):
            parser.Parse(content[start : start + _PART], False)
        parser.Parse(b"", True)
    except ExpatError as error:
        raise ValueError(f"{where} is not valid XML ({error}); restore it from a copy") from None
    return names

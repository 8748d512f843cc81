"""How the documentation site is built: ``python -m sphinx -W -b html docs site``."""

from __future__ import annotations

import re

import chunkrestore

project = "chunkrestore"
author = "The chunkrestore developers"
release = version = chunkrestore.__version__
copyright = f"2026, {author}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_click",
]
# Footnotes become citations below, and a reference that stands for a whole docstring is not cited in it.
suppress_warnings = ["ref.citation"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings name things in single backticks: a link where there is something to link to, and plain code where not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"FloatArray": "FloatArray", "Array": "Array", "Store": "Store", "Cluster": "Cluster"}
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"chunkrestore {release}"
html_copy_source = False


def setup(app: object) -> None:
    """Give numbered references of every docstring names of their own: several share a page."""
    app.connect("autodoc-process-docstring", _own_references)  # type: ignore[attr-defined]


def _own_references(
    _app: object, _what: str, name: str, _object: object, _options: object, lines: list[str]
) -> None:
    prefix = name.rsplit(".", 1)[-1]
    for i, line in enumerate(lines):
        lines[i] = (
            re.sub(r"\[(\d+)\](?=_|\s)", rf"[{prefix}\1]", line) if ".. [" in line or "]_" in line else line
        )

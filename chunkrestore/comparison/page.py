"""The comparison as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
from html import escape

from chunkrestore.comparison.result import Cells, Comparison
from chunkrestore.jobs.ledger import write_atomically

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""
_CAPTIONS = {
    "comparison.png": "Middle planes, all in the same grey scale above the background; enlarged, with outlines: true "
    "objects magenta, found ones cyan (threshold), yellow (watershed) or green (StarDist); profiles along the line, "
    "that of the first row magenta.",
    "f1.png": "F1 over the overlap from which a found object counts as a true one.",
    "fsc.png": "Fourier shell correlation with the truth; the resolution is where it falls below 1/2.",
}


def write_page(comparison: Comparison) -> None:
    """Write ``comparison.html`` into the folder of a comparison."""
    parts = ["<h1>Comparison</h1>", f"<p>{escape(_subject(comparison))}</p>"]
    for title, head, rows in comparison.tables():
        parts.append(f"<h2>{escape(title)}</h2>{_table(head, rows)}")
    for name, caption in _CAPTIONS.items():
        path = comparison.folder / name
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}"><br>{escape(caption)}</p>')
    values = comparison.describe()
    facts = {name: value for name, value in values.items() if name != "methods"}
    parts.append(f"<h2>Inputs and versions</h2><pre>{escape(json.dumps(facts, indent=1))}</pre>")
    jobs = {one["method"]: one["job"] and one["job"]["operators"] for one in values["methods"]}
    parts.append(f"<h2>Parameters</h2><pre>{escape(json.dumps(jobs, indent=1))}</pre>")
    intro = f'<meta charset="utf-8"><title>Comparison</title><style>{_STYLE}</style>'
    text = f'<!doctype html><html lang="en"><head>{intro}</head><body>{"".join(parts)}</body></html>\n'
    write_atomically(comparison.folder / "comparison.html", text)


def _subject(comparison: Comparison) -> str:
    compared = comparison.compared
    shape = " x ".join(map(str, compared["shape"]))
    return (
        f"{shape} voxels of {compared['inputs']['image']['store']}; intensities above a background of "
        f"{compared['background']:g} (image) and {compared['truth_background']:g} (truth)."
    )


def _table(head: Cells, rows: list[Cells]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"

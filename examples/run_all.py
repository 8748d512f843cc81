"""Run all chapters and put what they draw and print where the documentation shows it.

    python examples/run_all.py [NUMBER ...]

About half an hour on two cores; with numbers, only those chapters.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
FIGURES = EXAMPLES.parent / "docs" / "figures" / "examples"


def run(script: Path) -> None:
    """Run one chapter; keep its pictures and what it prints."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, script, out],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        FIGURES.mkdir(parents=True, exist_ok=True)
        for picture in Path(out).glob("[0-9][0-9]_*.png"):
            shutil.copy(picture, FIGURES)
        # Paths of the temporary folder are of no use to a reader.
        (FIGURES / f"{script.stem}.txt").write_text(done.stdout.replace(f"{out}/", ""))
    print(f"{script.name}\n{done.stdout}", flush=True)


if __name__ == "__main__":
    for script in sorted(EXAMPLES.glob("[0-9][0-9]_*.py")):
        if not sys.argv[1:] or script.name[:2] in sys.argv[1:]:
            run(script)

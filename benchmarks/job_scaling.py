"""What does a second worker gain, and what does reading the next block while one is computed?

Two workers: the demo pipeline (Richardson-Lucy, then CARE and StarDist) on a simulated embryo, by one worker on one
core and by two workers on two; every contender is a process of its own, bound to its cores before anything is
imported, so that one worker cannot take the other core as well. Model loading is not timed: a small job goes first.

Overlap: Richardson-Lucy by one worker on an input that a web server on loopback answers with a delay, as object
storage does, with one task at a time and with two. The floor is the larger of reading and computing.

Prediction before the first measurement: blocks are independent, so 1.9 times for the stages that work on all blocks
alike; less in all, since numbering, publishing and three seam probes do not divide by two. Overlap hides the shorter of
reading and computing but for the first and last block: within 1.15 times the floor.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "job_scaling.json"


class _Slow(http.server.SimpleHTTPRequestHandler):
    """Serves files, each after a while."""

    delay = 0.0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(self.delay)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def pipeline(folder: Path, n_workers: int) -> dict[str, float]:
    """Run the demo pipeline; return seconds per stage and in all."""
    import chunkrestore as cr
    from chunkrestore.cluster import connect
    from chunkrestore.ome_zarr import open_image
    from chunkrestore.psf import read_psf

    lucy = cr.RichardsonLucy(read_psf(folder / "embryo.psf.tif"), iterations=20, background=110)
    chain = [lucy, cr.Care("care3d-demo"), cr.StarDist("stardist3d-demo")]
    image = open_image(folder / "embryo.ome.zarr")
    options: dict[str, Any] = {"block_shape": (32, 64, 64), "overwrite": True, "quiet": True}
    with connect("local", n_workers=n_workers) as client:
        small = ((0, 32), (0, 64 * n_workers), (0, 64))
        cr.run(chain, image, folder / f"warm-{n_workers}.ome.zarr", cluster=client, region=small, **options)
        started = time.perf_counter()
        report = cr.run(chain, image, folder / f"out-{n_workers}.ome.zarr", cluster=client, **options)
        return {"total": time.perf_counter() - started, **report.seconds}


def overlap(folder: Path, n_threads: int, delay: float) -> dict[str, float]:
    """Deconvolve a volume behind a slow web server on one worker; return seconds by phase and in all."""
    import chunkrestore as cr
    from chunkrestore.cluster import connect, local
    from chunkrestore.jobs.events import read_events
    from chunkrestore.psf import read_psf

    local.THREADS_PER_WORKER = n_threads
    _Slow.delay = delay
    handler = functools.partial(_Slow, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_address[1]}/embryo.ome.zarr"
        lucy = cr.RichardsonLucy(read_psf(folder / "embryo.psf.tif"), iterations=8, background=110, depth=8)
        output = folder / f"overlap-{n_threads}.ome.zarr"
        with connect("local", n_workers=1) as client:
            report = cr.run(
                lucy, source, output, cluster=client, block_shape=(32, 64, 64), overwrite=True, quiet=True
            )
        server.shutdown()
    events = read_events(f"{output}.chunkrestore/image/events.jsonl")
    blocks = [e["seconds"] for e in events if e["event"] == "block" and e["stage"] == "blocks-0"]
    phases = {name: sum(s.get(name, 0.0) for s in blocks) for name in ("read", "compute", "write")}
    return {"total": report.seconds["blocks"], **phases}


def _child(contender: str, folder: Path, argument: float) -> dict[str, float]:
    """Run one contender in a process that is bound to its cores."""
    n_cores = int(argument) if contender == "pipeline" else 1
    script = f"""
import json, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{n_cores}])
sys.path.insert(0, {str(Path(__file__).parent)!r})
if __name__ == "__main__":
    from pathlib import Path
    import job_scaling
    found = job_scaling.{contender}(Path({str(folder)!r}), *json.loads(sys.argv[1]))
    print(json.dumps(found))
"""
    path = folder / "child.py"
    path.write_text(script)
    arguments = [int(argument)] if contender == "pipeline" else [int(argument), _DELAY]
    done = subprocess.run(
        [sys.executable, str(path), json.dumps(arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


_DELAY = 0.15
"""Seconds until the web server answers: object storage far away."""


def main() -> None:
    """Run the benchmark and write its results."""
    from environment import describe

    from chunkrestore.demo import write_embryo

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 192, 192))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("pipeline", "overlap"))
    arguments = parser.parse_args()
    result: dict[str, Any] = describe() | {"shape": arguments.shape, "delay_s": _DELAY}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_embryo(folder / "embryo.ome.zarr", shape=arguments.shape, seed=2026)
        for contender in ("pipeline", "overlap"):
            if arguments.only in (None, contender):
                runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
                for _ in range(arguments.repeats):
                    for n, found in runs.items():
                        found.append(_child(contender, folder, n))
                result[contender] = _summary(runs)
                _tell(contender, result[contender])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _summary(runs: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    medians = {
        n: {key: median(run.get(key, 0.0) for run in found) for key in found[0]} for n, found in runs.items()
    }
    gain = {key: one / medians[2][key] for key, one in medians[1].items() if medians[2].get(key)}
    return {"seconds": {str(n): of_n for n, of_n in medians.items()}, "one_over_two": gain}


def _tell(contender: str, found: dict[str, Any]) -> None:
    print(contender)
    for key, gain in found["one_over_two"].items():
        one, two = (found["seconds"][n][key] for n in ("1", "2"))
        print(f"  {key:<16} {one:7.2f} s {two:7.2f} s   {gain:.2f}")


if __name__ == "__main__":
    main()

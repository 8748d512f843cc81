"""Chapter 11, a job on a cluster: planned, killed in the middle, resumed, verified.

    python examples/11_cluster_job.py OUT

The cluster here is Dask's local one; the address of any other scheduler in its place, and everything else
stays as it is. The driver is killed with SIGKILL while blocks are in flight, and the job goes on where it
stopped.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import chunkrestore as cr
from chunkrestore.jobs.report import Report
from chunkrestore.psf import read_psf, write_psf
from chunkrestore.simulate import embryo


def job(out: Path, block: tuple[int, ...], scheduler: str) -> Report:
    """Deconvolve `out`/11_embryo.ome.zarr on the cluster of a scheduler."""
    operator = cr.RichardsonLucy(read_psf(out / "11_psf.tif"), iterations=20, background=108)
    stores = out / "11_embryo.ome.zarr", out / "11_sharp.ome.zarr"
    return cr.run(operator, *stores, block_shape=block, cluster=scheduler, quiet=True)


def finished_blocks(out: Path) -> int:
    """Return how many blocks a job has noted, as any other machine would see it."""
    jobs = cr.status(out / "11_sharp.ome.zarr")
    return sum(stage.n_done for job in jobs for stage in job.stages if stage.name.startswith("blocks"))


def main(
    out: Path, *, shape: tuple[int, int, int] = (96, 192, 192), block: tuple[int, int, int] = (32, 64, 64)
) -> dict[str, float]:
    """Run the job and kill it; return what was done before, what after, and whether blocks made a difference."""
    from distributed import Client, LocalCluster

    volume = embryo(shape, seed=17)
    cr.write_image(
        volume.image, out / "11_embryo.ome.zarr", axes="zyx", voxel_size=volume.voxel_size, overwrite=True
    )
    write_psf(out / "11_psf.tif", volume.psf, volume.voxel_size)
    operator = cr.RichardsonLucy(volume.psf, iterations=20, background=108)
    print(cr.plan(operator, out / "11_embryo.ome.zarr", block_shape=block))

    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster):
        arguments = json.dumps([str(out), block, cluster.scheduler_address])
        driver = subprocess.Popen([sys.executable, __file__, "--driver", arguments])
        while finished_blocks(out) < 3 and driver.poll() is None:
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before = finished_blocks(out)
        report = job(out, block, cluster.scheduler_address)

    print(report)
    whole = cr.deconvolve(volume.image, volume.psf, iterations=20, background=108)
    result = np.asarray(cr.open_image(out / "11_sharp.ome.zarr").data)
    return {
        "blocks": len(cr.plan(operator, out / "11_embryo.ome.zarr", block_shape=block).passes[0].grid),
        "blocks noted before the driver was killed": before,
        "seam error, of the dynamic range": report.seam_rms,
        "largest difference from one piece, of the dynamic range": float(
            np.abs(result - whole).max() / np.ptp(whole)
        ),
        "problems found by verify": sum(
            len(found.problems) for found in cr.verify(out / "11_sharp.ome.zarr", quiet=True)
        ),
    }


if __name__ == "__main__":
    if sys.argv[1] == "--driver":
        folder, *rest = json.loads(sys.argv[2])
        job(Path(folder), *rest)
    else:
        for name, figure in main(Path(sys.argv[1])).items():
            print(f"{name}: {figure:.3g}")

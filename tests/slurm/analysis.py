"""Deconvolve nuclei and outline them: one script for this machine, for jobs of SLURM, and for an allocation.

python analysis.py IN OUT                                     workers on this machine
python analysis.py IN OUT --cluster slurm --profile SITE      every worker is a job of its own
srun --ntasks 4 python analysis.py IN OUT                     workers are tasks of one allocation
"""

import argparse

import chunkrestore as cr
from chunkrestore.psf import gaussian

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="OME-Zarr image of nuclei")
    parser.add_argument("output", help="OME-Zarr to write")
    parser.add_argument("--cluster", default="auto")
    parser.add_argument("--profile", help="what the site asks of its jobs, a YAML file")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--networks", action="store_true", help="CARE and StarDist instead of a threshold")
    arguments = parser.parse_args()

    lucy = cr.RichardsonLucy(gaussian((1.5, 1.0, 1.0)), iterations=arguments.iterations, background=100.0)
    networks = [cr.Care("care3d-demo"), cr.StarDist("stardist3d-demo")]
    report = cr.run(
        [lucy, *(networks if arguments.networks else [cr.Threshold()])],
        arguments.source,
        arguments.output,
        cluster=arguments.cluster,
        profile=arguments.profile,
        block_shape=(16, 32, 32),
        label_name="nuclei",
    )
    print(report)

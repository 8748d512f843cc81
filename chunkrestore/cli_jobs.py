"""The verbs for jobs that run, have stopped, or are done."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from chunkrestore.cli_text import say

_WORK_FOLDER = click.option("--work-folder", help="Where the journal is; default OUT.chunkrestore.")

CLUSTER_OPTIONS = (
    click.option(
        "--cluster",
        default="auto",
        show_default=True,
        help="auto, local, cuda, slurm, serial, a profile, or a scheduler's address or file.",
    ),
    click.option("--profile", help="YAML file that describes the cluster."),
    click.option(
        "--workers",
        "n_workers",
        type=click.IntRange(1),
        help="Worker processes; default one per core.",
    ),
)


def _on_cluster(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where work runs."""
    for option in reversed((_WORK_FOLDER, *CLUSTER_OPTIONS)):
        command = option(command)
    return command


@click.command()
@click.argument("output", metavar="OUT")
@_WORK_FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(output: str, work_folder: str | None, as_json: bool) -> None:
    """Tell how far the jobs of an output are, from their files alone."""
    from chunkrestore.jobs.status import status as of_output
    from chunkrestore.jobs.status import summary

    found = of_output(output, work_folder=work_folder)
    told = summary(found) or "no job has begun here"
    text = json.dumps([job.describe() for job in found], indent=1) if as_json else told
    say(text)


def _goes_on(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what all verbs take that go on with a job."""
    options = (
        click.argument("output", metavar="OUT"),
        click.option("--job", help="image or labels-NAME, if several jobs are unfinished."),
        _on_cluster,
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("-v", "--verbose", is_flag=True, help="Print the traceback of errors."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_goes_on
def resume(output: str, **options: Any) -> None:
    """Go on with an unfinished job, without the command that began it."""
    from chunkrestore.jobs.run import resume as go_on

    _go_on(go_on, output, **options)


@click.command("retry-failed")
@_goes_on
def retry_failed(output: str, **options: Any) -> None:
    """Try the blocks again that were given up, first of all, and go on if they succeed."""
    from chunkrestore.jobs.run import retry_failed as try_again

    _go_on(try_again, output, **options)


def _go_on(run: Callable[..., Any], output: str, *, quiet: bool, verbose: bool, **options: Any) -> None:
    from chunkrestore.jobs.fields_record import records
    from chunkrestore.jobs.ledger import work_folder_of

    if records(work_folder_of(output, options["work_folder"])):
        from chunkrestore.jobs.fields import resume_fields, summary

        told = summary(resume_fields(output, quiet=quiet, page=True, **options))
    else:
        told = str(run(output, quiet=quiet, page=True, **options))
    if not quiet:
        say(told)


@click.command()
@click.argument("output", metavar="OUT")
@_on_cluster
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def verify(output: str, quiet: bool, **options: Any) -> int:
    """Read all that jobs have written, and compare it with their checksums; exit 1 if anything differs."""
    from chunkrestore.jobs.verify import verify as check

    found = check(output, quiet=quiet, **options)
    if not quiet:
        say("\n".join(map(str, found)))
    return 0 if all(job.ok for job in found) else 1


@click.command()
@click.argument("output", metavar="OUT")
@_WORK_FOLDER
@click.option("--job", help="image or labels-NAME, if there are several.")
def report(output: str, work_folder: str | None, job: str | None) -> None:
    """Write a report of a job as one HTML page: what was done, how fast, what failed, how it looks."""
    from chunkrestore.jobs.html import write_report

    for path in write_report(output, job=job, work_folder=work_folder):
        say(f"wrote      {path}")


@click.command()
@click.argument("output", metavar="[OUT]", required=False)
@click.option("--quick", is_flag=True, help="Do not load TensorFlow and CuPy.")
def doctor(output: str | None, quick: bool) -> int:
    """Look this machine over and say what to install, with OUT its disk too; exit 1 if something is wrong."""
    from chunkrestore.doctor import examine, healthy, table

    findings = examine(output, quick=quick)
    say(table(findings))
    return 0 if healthy(findings) else 1


COMMANDS = (status, resume, retry_failed, verify, report, doctor)

"""Run a job on every field of a plate, or on every image of a collection, into a collection of the same layout.

Every field is a job of its own, with its files in ``OUTPUT.chunkrestore/B/03/0``, so it is planned, interrupted,
resumed and verified like any other. ``OUTPUT.chunkrestore/fields-JOB`` keeps what was asked for. A well lists a field
once it is published; the plate itself is published last, with all that was asked for: a plate that can be opened is
complete, however often its making was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.cluster.allocation import in_allocation
from chunkrestore.jobs.begin import locked
from chunkrestore.jobs.fields_job import FieldsJob, load_request
from chunkrestore.jobs.fields_record import is_done, keep_record, record_folder, records
from chunkrestore.jobs.ledger import ManifestMismatchError, work_folder_of
from chunkrestore.jobs.lock import LockedError, LockLostError
from chunkrestore.jobs.places import ClusterLostError, place_for
from chunkrestore.jobs.prepare import Store
from chunkrestore.jobs.progress import Progress
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.run import wants_devices
from chunkrestore.jobs.runner import draining, message_of
from chunkrestore.ome_zarr.collection import Collection, open_collection
from chunkrestore.ome_zarr.members import Field
from chunkrestore.ome_zarr.store import location
from chunkrestore.operators.base import Operator
from chunkrestore.operators.storing import completed

if TYPE_CHECKING:
    from distributed import Client

_NOT_OF_A_FIELD = (ManifestMismatchError, LockedError, LockLostError, ClusterLostError, ImportError)
"""What says nothing of a field that others would not say as well."""

_PATIENCE_SECONDS = 1.0

_FEW_BLOCKS = 64
"""Blocks up to which several fields are worth doing at a time."""

_MOST_AT_ONCE = 16
"""Fields under way in one driver, which takes about a tenth of a second of its processor for each."""
_MOST_FAILED_FIRST = 10
"""Fields that fail, without one that succeeds, until it is taken for something else than the fields."""

_MOST_NAMED = 5
_MOST_TOLD = 4


class FieldsError(RuntimeError):
    """Fields failed; the message names them. What is finished is kept.

    Parameters
    ----------
    failed
        What went wrong, by field.
    reports
        Of the fields that are finished.
    n_fields
        All that were asked for.
    """

    def __init__(self, failed: Mapping[str, str], reports: Sequence[Report], n_fields: int) -> None:
        self.failed, self.reports = dict(failed), list(reports)
        named = "; ".join(f"{member}: {message}" for member, message in list(failed.items())[:_MOST_NAMED])
        more = f"; and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
        n_left = n_fields - len(failed) - len(reports)
        left = f", {n_left} were not tried" if n_left else ""
        super().__init__(
            f"{len(failed)} of {n_fields} fields failed{left}: {named}{more}. What is finished is kept; the same "
            "command tries the others again, `wells` and `fields` leave some out"
        )


def run_fields(
    operators: Operator | Sequence[Operator],
    collection: Store | Collection,
    output: Store,
    *,
    wells: str | Sequence[str] | None = None,
    fields: int | str | Sequence[int | str] | None = None,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> list[Report]:
    """Apply operators to every field of a plate, or to every image of a collection, each as a job of its own.

    A call that was interrupted goes on where it stopped when it is repeated; fields that are finished are skipped. A
    field that fails does not stop the others. Further calls with other `wells` and `fields` add to the same output,
    as long as they ask for the same. On a cluster several fields are done at a time, if one of them has too few blocks
    for all workers.

    Parameters
    ----------
    operators
        As for `run`. With a label operator alone the labels go into the images of an existing collection.
    collection
        Plate, well or bioformats2raw layout.
    output
        Collection to write, of the same layout: metadata of plate and wells are carried over, rows and columns
        remain, and wells are those that were processed. With a label operator alone, `collection` itself or another
        one with the same fields.
    wells, fields
        Which of them, as for `chunkrestore.ome_zarr.collection.Collection.select`; all by default.
    cluster, n_workers, profile
        As for `run`; one cluster serves all fields.
    work_folder
        As for `run`; every field has a folder in it.
    overwrite
        Make the chosen fields anew.
    quiet
        Show no progress.
    **options
        Other arguments of `run`, the same for every field.

    Returns
    -------
    list of Report
        One per field, in the order of the collection; of a field that was finished before, the report of that time.

    Raises
    ------
    FieldsError
        If fields failed, when all others are done. The output is not published then.
    FileExistsError
        If `output` exists, and was not begun by this function.
    chunkrestore.jobs.ledger.ManifestMismatchError
        If fields of the output were made with something else.
    ValueError, TypeError
        As for `run`, and if there are no such wells or fields; nothing was written then.
    """
    given = open_collection(collection)
    chosen = given.select(wells, fields).fields
    several = completed(operators if isinstance(operators, Sequence) else [operators])
    job = FieldsJob.of(several, given.path, chosen, output, work_folder, n_workers, options)
    return _run(job, cluster, profile, overwrite=overwrite, quiet=quiet)


def summary(reports: Sequence[Report]) -> str:
    """Return reports for people; of many fields, what they add up to."""
    if len(reports) <= _MOST_TOLD:
        return "\n\n".join(map(str, reports))
    outputs = [output for report in reports for output in report.outputs]
    lines = [
        f"wrote      {outputs[0]}",
        f"to         {outputs[-1]}, {len(reports)} fields",
        f"blocks     {sum(report.n_done for report in reports)} done",
    ]
    if any(report.n_objects is not None for report in reports):
        lines.append(f"objects    {sum(report.n_objects or 0 for report in reports)}")
    seams = [report.seam_rms for report in reports if report.seam_rms is not None]
    if seams:
        lines.append(f"seams      rms {max(seams):.1e} of the dynamic range at worst")
    return "\n".join(lines)


def resume_fields(
    output: Store,
    *,
    job: str | None = None,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    work_folder: Store | None = None,
    page: bool = False,
    quiet: bool = False,
) -> list[Report]:
    """Go on with the unfinished fields of a collection, without the script that began them.

    Parameters
    ----------
    output
        Collection that is written.
    job
        ``"image"`` or ``"labels-NAME"``; needed if several are unfinished.
    cluster, n_workers, profile, work_folder, page, quiet
        As for `run`; they may differ from what the job was begun with.

    Raises
    ------
    ValueError
        If there is nothing unfinished, or several; or it cannot be begun again without its script.
    """
    work = work_folder_of(location(output), work_folder)
    unfinished = [name for name, record in records(work).items() if not is_done(work, name, record)]
    if job is None and len(unfinished) > 1:
        raise ValueError(
            f"{work} holds several unfinished jobs; choose one as `job`: {', '.join(unfinished)}"
        )
    if job not in (unfinished if job is not None else [*unfinished[:1], None]) or not unfinished:
        raise ValueError(f"{work} holds no unfinished job{'' if job is None else f' {job!r}'} on fields")
    operators, record = load_request(record_folder(work, job or unfinished[0]))
    asked = set(record.members)
    chosen = tuple(f for f in open_collection(record.input).fields if f.member in asked)
    options = record.options | {"page": page}
    again = FieldsJob.of(operators, record.input, chosen, output, work, n_workers, options)
    return _run(again, cluster, profile, overwrite=False, quiet=quiet)


def _run(
    job: FieldsJob, cluster: Cluster, profile: Store | None, *, overwrite: bool, quiet: bool
) -> list[Report]:
    """Do all fields of a job, and publish the collection."""
    # All ranks of an allocation come here and one goes on: the others must not stumble over what that one writes.
    if not (cluster == "auto" and in_allocation()):
        job.check(overwrite=overwrite)
    wants = wants_devices(job.operators, job.options["device"])
    with (
        connect(cluster, n_workers=job.n_workers, profile=profile, wants_devices=wants) as client,
        locked(job.work, job.folder.name, in_process=client is None) as lock,
    ):
        job.check(overwrite=overwrite)  # again: another driver may have had the lock in between
        asked = job.begin(overwrite=overwrite)
        reports: dict[Field, Report] = {}
        failed: dict[str, str] = {}
        with closing(_ended(job, client, asked.replacing, quiet=quiet)) as ended:
            for field, outcome in ended:
                lock.check()
                if isinstance(outcome, Exception):
                    failed[field.member] = message_of(outcome)
                    if len(failed) >= _MOST_FAILED_FIRST and not reports:
                        break
                    continue
                job.list(field)
                if field.member in asked.replacing:
                    asked = keep_record(job.folder, asked.without(field.member))
                reports[field] = outcome
        in_order = [reports[field] for field in job.fields if field in reports]
        if failed:
            raise FieldsError(failed, in_order, len(job.fields))
        job.publish()
    return in_order


def _ended(
    job: FieldsJob, client: Client | None, replacing: Sequence[str], *, quiet: bool
) -> Generator[tuple[Field, Report | Exception], None, None]:
    """Do the fields of a job; yield each with its report, or with what went wrong.

    Where a field has too few blocks for the workers, several are done at a time, each in a thread of the driver.
    """
    alone = client is None or len(job.fields) == 1 or job.n_blocks > _FEW_BLOCKS

    def do(field: Field) -> Report | Exception:
        try:
            done = job.finished(field)
            hidden = quiet or not alone
            return done or job.run(field, client, overwrite=field.member in replacing, quiet=hidden)
        except _NOT_OF_A_FIELD:
            raise
        except Exception as error:
            return error

    if alone:
        for i, field in enumerate(job.fields):
            if not quiet:
                print(f"{field.member}, {i + 1} of {len(job.fields)}", file=sys.stderr, flush=True)
            yield field, do(field)
        return
    with (
        ThreadPoolExecutor(_MOST_AT_ONCE) as pool,
        _drained(pool),
        Progress(quiet=quiet).stage("fields", len(job.fields), unit="fields") as advance,
    ):
        waiting, running = iter(job.fields), dict[Future[Report | Exception], Field]()
        place = place_for(client)
        while True:
            # Workers of a batch system come and go.
            n_at_once = min(_MOST_AT_ONCE, -(-place.window() // job.n_blocks))
            more = islice(waiting, max(0, n_at_once - len(running)))
            running |= {pool.submit(do, field): field for field in more}
            if not running:
                return
            done, _ = wait(running, timeout=_PATIENCE_SECONDS, return_when=FIRST_COMPLETED)
            advance.tick()
            for future in done:
                field, outcome = running.pop(future), future.result()
                if isinstance(outcome, Exception):
                    advance.note("failed")
                else:
                    advance()
                yield field, outcome


@contextmanager
def _drained(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Ask jobs in threads to stop where the driver has to, since nothing else can interrupt them."""
    try:
        yield
    except BaseException:
        asked_before = draining.requested
        draining.request()
        pool.shutdown(cancel_futures=True)
        if not asked_before:
            draining.forget()
        raise

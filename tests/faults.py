"""Faults at named points of a job, put into the driver and its workers from outside the product.

A `Session` is a folder: which faults there are, how often each point was reached so far, by any process, and a
log of what was done when. In the driver `Session.installed` wraps what is called at the points. Tasks take the
session along and wrap their worker's functions when they first run there, so workers need nothing but this
module on their path.
"""

import errno
import functools
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from chunkrestore.jobs.conductor import Conductor
from chunkrestore.jobs.ledger import Ledger
from chunkrestore.ome_zarr import ImageWriter, LabelsWriter, RegionReader, RegionWriter

TASK_POINTS = ("before-read", "before-write", "after-write")
"""Reached by the process that runs a block's task."""
DRIVER_POINTS = ("before-journal", "after-journal", "before-publish", "after-publish")
"""Reached by the driver."""
POINTS = (*TASK_POINTS, *DRIVER_POINTS)

ALWAYS = 10**9


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(make):
    def action():
        raise make()

    return action


ACTIONS = {
    "none": lambda: None,
    "kill": _kill,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "error": _raise(lambda: ValueError("injected")),
    "memory": _raise(lambda: MemoryError("injected")),
    "full": _raise(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")),
    "io": _raise(lambda: OSError(errno.EIO, os.strerror(errno.EIO), "injected")),
    "reset": _raise(lambda: ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))),
}
"""What can happen at a point."""


@dataclass(frozen=True)
class Fault:
    """Do something when a point is reached for the n-th time by any process, and maybe the next times too."""

    point: str
    action: str
    nth: int = 1
    """Counted from 1, of the arrivals that match `stage` and `item`."""
    times: int = 1
    """How many arrivals in a row are hit; `ALWAYS` for all of them."""
    stage: str = "*"
    """Pattern of stage names; ``publish`` for the last two points."""
    item: tuple[int, ...] | None = None
    """One item only."""

    def matches(self, point, stage, item):
        return (
            point == self.point
            and fnmatch(stage, self.stage)
            and (self.item is None or tuple(self.item) == item)
        )


class Session:
    """What goes wrong, and the record of what happened; a folder, so that all processes share it.

    Parameters
    ----------
    folder
        Of a session that `create` made.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        content = json.loads((self.folder / "faults.json").read_text())
        self.faults = [Fault(**entry) for entry in content["faults"]]
        self._spared = content["spared"]
        self._log = os.open(self.folder / "log.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __del__(self):
        with suppress(OSError, AttributeError):
            os.close(self._log)

    @classmethod
    def create(cls, folder, *faults):
        """Make a session; the process that does so is never killed by it."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        content = {"faults": [asdict(fault) for fault in faults], "spared": os.getpid()}
        (folder / "faults.json").write_text(json.dumps(content))
        return cls(folder)

    def reach(self, point, stage, item=None):
        """Let happen what is due at a point."""
        for number, fault in enumerate(self.faults):
            if not fault.matches(point, stage, item):
                continue
            count = self._count(number, fault)
            if fault.nth <= count < fault.nth + fault.times:
                if fault.action == "kill" and os.getpid() == self._spared:
                    raise RuntimeError("a test would kill itself; run the driver in a process of its own")
                self.log("fault", point=point, action=fault.action, stage=stage, item=item)
                ACTIONS[fault.action]()

    def _count(self, number, fault):
        """Return how often the point of a fault was reached, this time included; enough of it to decide."""
        for count in range(1, fault.nth + fault.times):
            try:
                os.close(os.open(self.folder / f"{number}.{count}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return count
        return fault.nth + fault.times

    def log(self, event, **fields):
        line = json.dumps({"time": time.time(), "event": event, "pid": os.getpid(), **fields})
        os.write(self._log, line.encode() + b"\n")

    def events(self, *kinds):
        """Return what was logged, in order; all kinds or some."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        found = map(json.loads, lines)
        return [event for event in found if not kinds or event["event"] in kinds]

    @contextmanager
    def installed(self):
        """Have the points of the calling process, and of the tasks that it starts, reached."""
        with _patched(
            (Conductor, "run", lambda run: _with_session(run, self)),
            (Conductor, "each", lambda each: _with_session(each, self)),
            (Ledger, "record", lambda record: _recording(record, self)),
            (ImageWriter, "publish", lambda publish: _publishing(publish, self)),
            (LabelsWriter, "publish", lambda publish: _publishing(publish, self)),
            *_TASK_PATCHES,
        ):
            yield self

    # --- what the log tells --------------------------------------------------------------------------------

    def n_executions(self):
        """Return how often the task of every (stage, item) was begun."""
        return Counter(map(_key, self.events("task")))

    def redone(self):
        """Return every (stage, item) whose task was begun after a driver had journalled it."""
        recorded, wrong = set(), []
        for event in self.events("task", "recorded"):
            if event["event"] == "recorded":
                recorded.add(_key(event))
            elif _key(event) in recorded:
                wrong.append(_key(event))
        return wrong

    def in_flight(self, moment):
        """Return every (stage, item) whose task was begun and not journalled at a time."""
        found = set()
        for event in self.events("task", "recorded"):
            if event["time"] > moment:
                break
            (found.add if event["event"] == "task" else found.discard)(_key(event))
        return found


def _key(event):
    return event["stage"], tuple(event["item"])


@contextmanager
def _patched(*patches):
    originals = []
    try:
        for owner, name, wrap in patches:
            original = owner.__dict__[name]
            originals.append((owner, name, original))
            setattr(owner, name, wrap(original))
        yield
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


# --- in the driver -----------------------------------------------------------------------------------------


def _with_session(original, session):
    @functools.wraps(original)
    def run(self, name, items, function, arguments):
        task = functools.partial(_task, str(session.folder), os.getpid(), name, function)
        return original(self, name, items, task, arguments)

    return run


def _recording(original, session):
    @functools.wraps(original)
    def record(self, stage, item, payload):
        session.reach("before-journal", stage, item)
        original(self, stage, item, payload)
        session.log("recorded", stage=stage, item=item)
        session.reach("after-journal", stage, item)

    return record


def _publishing(original, session):
    @functools.wraps(original)
    def publish(self, *arguments, **options):
        session.reach("before-publish", "publish")
        original(self, *arguments, **options)
        session.reach("after-publish", "publish")

    return publish


# --- in the process that runs a task -----------------------------------------------------------------------

_here = threading.local()
_installed = threading.Lock()


def _reading(original):
    @functools.wraps(original)
    def read(self, *arguments):
        _reach("before-read")
        return original(self, *arguments)

    return read


def _writing(original):
    @functools.wraps(original)
    def write(self, *arguments):
        _reach("before-write")
        original(self, *arguments)
        _reach("after-write")

    return write


_TASK_PATCHES = ((RegionReader, "read", _reading), (RegionWriter, "write", _writing))


def _reach(point):
    if (place := getattr(_here, "place", None)) is not None:
        session, stage, item = place
        session.reach(point, stage, item)


@functools.lru_cache(maxsize=8)
def _session(folder, pid):
    return Session(folder)


def _task(folder, driver, stage, function, item, *arguments):
    """Run a task with the points of its process in place."""
    with _installed:
        for owner, name, wrap in _TASK_PATCHES:
            if not hasattr(owner.__dict__[name], "__wrapped__"):
                setattr(owner, name, wrap(owner.__dict__[name]))
    session = _session(folder, os.getpid())
    session.log("task", stage=stage, item=item, driver=driver)
    _here.place = session, stage, tuple(item)
    try:
        return function(item, *arguments)
    finally:
        _here.place = None


# --- processes of their own --------------------------------------------------------------------------------


_PRELOADED = (
    *("faults", "chunkrestore.jobs.run", "zarr", "distributed", "distributed.scheduler"),
    *("scipy.fft", "scipy.ndimage", "scipy.sparse", "skimage.filters", "skimage.transform"),
    *("ome_zarr_models.v04", "ome_zarr_models.v05"),
)
"""What jobs import; importing it starts no thread, so that the process can be forked."""


@functools.cache
def processes():
    """Return a multiprocessing context whose processes start in milliseconds, imports done.

    They are forked from a process that has imported what they need and has no threads yet.
    """
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def start(function, *arguments, **options):
    """Start a function in a process of its own."""
    process = processes().Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def drive(session, operators, source, output, log=None, **options):
    """Run a job with a session's faults, to be called in a process of its own; its exit status says how it ended.

    0: done; 1: blocks were given up; 75: interrupted, or the cluster lost; 69: no cluster; 70: anything else.
    """
    import chunkrestore as cr

    if log is not None:
        redirect(log)
    session = Session(session)
    session.log("driver")
    try:
        with session.installed():
            cr.run(operators, source, output, quiet=True, **options)
    except BaseException as error:
        traceback.print_exc()
        raise SystemExit(_status_of(error)) from None


def _status_of(error):
    from chunkrestore.jobs.places import ClusterLostError
    from chunkrestore.jobs.runner import BlockError

    if isinstance(error, BlockError):
        return 1
    if isinstance(error, KeyboardInterrupt | ClusterLostError):
        return 75
    return 69 if isinstance(error, ConnectionError) else 70


def redirect(path):
    """Send what this process says to a file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)

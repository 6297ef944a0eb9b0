"""A run and its plan: made beside the start of the run, kept with what the run then took."""

import _thread
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from heliostat.data.expected import read_rows
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.hardware import Machine
from heliostat.plan import calibration
from heliostat.plan.calibration import Record, Taken, name_hardware
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.storage.documents import read_document
from heliostat.train import forecast
from heliostat.train.forecast import Forecast, Question
from heliostat.train.job import Ended, result_key
from heliostat.train.site import find_machine

PROGRAM = [sys.executable, "-m", forecast.__name__]


class Ahead:
    """The plan of a run that is about to start, as another process makes it."""

    def __init__(self, run: RunSpec, manifest: Manifest, store: Store, machine: Machine):
        self._store, self._hardware = store, name_hardware(machine)
        records = tuple(calibration.load(store, self._hardware))
        self._question = Question(run, read_rows(manifest), machine, records)
        self._process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A job's package and a user's network lie where this process found them.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._forecast: Forecast | None = None
        self._interrupts = False
        self._thread = threading.Thread(target=self._ask, name="plan", daemon=True)

    def start(self, beside: bool) -> None:
        """Tell the plan when it is there; `beside` a run that starts, in the time that it leaves.

        Raises:
            HeliostatError: the run cannot fit; beside the run its main thread is interrupted.
        """
        if beside and hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
        self._interrupts = beside
        self._thread.start()
        if not beside:
            self._thread.join()
            self.check()

    def check(self) -> None:
        """Raises HeliostatError: it is known that the run cannot fit."""
        if self._forecast and self._forecast.refusal:
            raise HeliostatError(self._forecast.refusal)

    def keep(self, run: str, read_bytes: int) -> None:
        """Store what was planned together with what the finished run took."""
        self._thread.join()
        ended = read_document(self._store, result_key(run), Ended)
        if not self._forecast or not self._forecast.planned or not ended.step_seconds:
            return
        entries = self._store.list(f"{ended.checkpoint}/") if ended.checkpoint else ()
        measured = Taken(
            ended.memory_bytes,
            ended.step_seconds,
            sum(entry.size for entry in entries),
            read_bytes / ended.step,
            ended.hours,
        )
        calibration.keep(
            self._store,
            Record(run, self._hardware, ended.step, self._forecast.planned, measured),
        )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self) -> None:
        answer, _ = self._process.communicate(pickle.dumps(self._question))
        if self._process.returncode:
            return  # it was ended, or says on standard error what it could not do
        self._forecast = forecast.read(answer)
        print(self._forecast.line, flush=True)
        if self._forecast.refusal and self._interrupts:
            _thread.interrupt_main()


@contextmanager
def look_ahead(run: RunSpec, manifest: Manifest, store: Store) -> Iterator[Ahead]:
    """Plan the run that is started within, before it where it takes GPUs.

    Raises:
        HeliostatError: the run cannot fit on the machines of the cluster.
    """
    ahead = Ahead(run, manifest, store, find_machine(run.train))
    try:
        ahead.start(beside=not run.train.gpus_per_worker)
        yield ahead
    except (KeyboardInterrupt, SystemExit):
        ahead.check()
        raise
    finally:
        ahead.end()

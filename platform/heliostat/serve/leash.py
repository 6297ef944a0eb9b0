"""Runs a program no longer than the process that started it, whatever ends that one.

python leash.py FOLDER PROGRAM ARGUMENT...

Its standard input is a pipe that the starter holds and never writes to. When that closes, or the
program ends, what is left of the program and its children is ended and FOLDER is removed. A second
process does so when this one is killed, as Ray kills the children of a worker that ends.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_SECONDS = 3.0


def main(folder: str, *command: str) -> int:
    """Returns the status of the program, 128 + N if signal N has ended it, as shells have it."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    _start_guard(program, folder)
    signal.signal(signal.SIGTERM, lambda *_: _signal(program, signal.SIGTERM))
    threading.Thread(target=_end_with_starter, args=(program,), daemon=True).start()
    status = program.wait()
    _signal(program, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _start_guard(program: "subprocess.Popen[bytes]", folder: str) -> None:
    ends, held = os.pipe()
    if os.fork():
        os.close(ends)
        return  # `held` closes when this process ends, however it does
    try:
        os.setsid()
        os.close(held)
        os.read(ends, 1)
        if os.path.exists(folder):
            _signal(program, signal.SIGTERM)
            time.sleep(GRACE_SECONDS)
            _signal(program, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _end_with_starter(program: "subprocess.Popen[bytes]") -> None:
    os.read(sys.stdin.fileno(), 1)
    _signal(program, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        program.wait(GRACE_SECONDS)
    _signal(program, signal.SIGKILL)


def _signal(program: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """To the program and all that it has started, which are one group."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, number)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

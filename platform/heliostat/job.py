"""How a program runs: positional arguments in, a sentence instead of a traceback out."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from heliostat.errors import HeliostatError, printable


def run(main: Callable[..., int | None]) -> None:
    """Call a job's `main` with the arguments of the command line, and exit as `conclude` says."""
    path, *overrides = sys.argv[1:] or [""]
    if path in ("", "-h", "--help"):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        sys.exit(0 if path else 2)
    sys.exit(conclude(lambda: main(path, *overrides)))


def conclude(act: Callable[[], int | None]) -> int:
    """The exit status of `act`: 2 after the sentence of a HeliostatError, 130 after Ctrl-C.

    SIGTERM, by which `ray job stop` ends a job, unwinds it like Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _unwind)
    try:
        return act() or 0
    except HeliostatError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # Who read what is printed has left, as `head` does; Python would say so when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr, flush=True)
        return 130


def _unwind(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)

"""How a job runs as a program: positional arguments in, a sentence instead of a traceback out."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from heliostat.errors import HeliostatError


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's arguments; a HeliostatError prints and exits 2.

    SIGTERM, by which `ray job stop` ends a job, unwinds it like Ctrl-C.
    """
    path, *overrides = sys.argv[1:] or [""]
    if path in ("", "-h", "--help"):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        sys.exit(0 if path else 2)
    signal.signal(signal.SIGTERM, _unwind)
    try:
        main(path, *overrides)
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _unwind(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)

"""How a job runs as a program: positional arguments in, a sentence instead of a traceback out."""

import sys
from collections.abc import Callable

from heliostat.errors import HeliostatError


def run(main: Callable[..., None]) -> None:
    """Call `main` with the command line's arguments; a HeliostatError prints and exits 2."""
    path, *overrides = sys.argv[1:] or [""]
    if path in ("", "-h", "--help"):
        print((sys.modules[main.__module__].__doc__ or "").strip())
        sys.exit(0 if path else 2)
    try:
        main(path, *overrides)
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)

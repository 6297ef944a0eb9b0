"""The one exception a user is meant to read."""


class HeliostatError(Exception):
    """Something the user can act on: what was given, what is needed, what to change.

    Jobs and the command line print the sentence and exit with status 2; any other exception is a
    bug in Heliostat and keeps its traceback.
    """

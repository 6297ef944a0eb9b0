"""The one exception a user is meant to read, and how what users wrote is shown to them."""


class HeliostatError(Exception):
    """Something the user can act on: what was given, what is needed, what to change.

    Jobs and the command line print the sentence and exit with status 2; any other exception is a
    bug in Heliostat and keeps its traceback.
    """


def printable(text: str) -> str:
    """`text` for a terminal or a log: what names in a user's data could do to it is written out."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text
    )

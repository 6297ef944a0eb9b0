"""The versions that are installed: none has a hole that is known and closed in a later one."""

import re
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
# The first versions without it: a path read from the Host header, weights that run code, a cluster
# without authentication, frames of HTTP/1 read as two requests.
FLOORS = {"starlette": "1.0.1", "torch": "2.10", "ray": "2.56", "h11": "0.16"}


def parse(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def test_no_version_is_below_its_floor() -> None:
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name for name, floor in FLOORS.items() if parse(pinned[name]) < parse(floor)} == set()

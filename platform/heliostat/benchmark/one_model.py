"""A server of one version without Ray, as a process: `python -m ... ROOT REF STREAMS PORT`."""

import sys
from functools import partial

import uvicorn

from heliostat import registry
from heliostat.serve.app import build_app
from heliostat.serve.door import Limits
from heliostat.serve.language import Room
from heliostat.serve.shelf import Shelf, load
from heliostat.storage import connect


def main(root: str, ref: str, streams: str, port: str) -> None:
    store = connect(root)
    version = registry.resolve(store, ref)
    room = Room(streams=int(streams))
    shelf = Shelf({version.name: [version]}, partial(load, store, room=room), 2**32)
    shelf.fill()
    app = build_app(shelf, Limits(2**20, 256, 600.0))
    uvicorn.run(app, port=int(port), log_level="warning", lifespan="off")


if __name__ == "__main__":
    main(*sys.argv[1:])

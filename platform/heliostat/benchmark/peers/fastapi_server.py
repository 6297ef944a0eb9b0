"""FastAPI under uvicorn: `python -m ... MODEL PORT [ROOT]`, with the gate where there is a ROOT.

Processes of one thread, orjson, no validation by pydantic, uvloop and httptools: the fastest that
its documentation leads to.
"""

import os
import sys

import numpy as np
import orjson
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

from heliostat.benchmark.servers import START_SECONDS

MODEL, ROOT = "BENCHMARK_MODEL", "BENCHMARK_ROOT"
PROCESSES = 2


def build() -> ASGIApp:
    torch.set_num_threads(1)
    model = torch.jit.load(os.environ[MODEL])
    app = FastAPI()

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/models/{name}:predict")
    async def predict(request: Request) -> Response:
        instances = orjson.loads(await request.body())["instances"]
        with torch.inference_mode():
            rows = model(torch.from_numpy(np.array(instances, np.float32)))
        content = orjson.dumps({"predictions": rows.numpy()}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    return guard(app, os.environ[ROOT]) if ROOT in os.environ else app


def guard(app: ASGIApp, root: str) -> ASGIApp:
    """The same gate: keys, limits, usage in the bucket. Each process has an office of its own."""
    from heliostat.keys import Keyring, follow
    from heliostat.serve.desk import Desk
    from heliostat.serve.gate import Gate
    from heliostat.serve.identity import Identity
    from heliostat.serve.office import Clerk
    from heliostat.storage import connect

    ring = Keyring(connect(root))
    ring.refresh()
    follow(ring)
    return Identity(Gate(app, ring.find, Desk(Clerk(root).answer)))


def main(model: str, port: str, root: str = "") -> None:
    os.environ[MODEL] = model
    if root:
        os.environ[ROOT] = root
    uvicorn.run(
        "heliostat.benchmark.peers.fastapi_server:build",
        factory=True,
        workers=PROCESSES,
        port=int(port),
        log_level="warning",
        access_log=False,
        timeout_worker_healthcheck=int(START_SECONDS),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Serve a version of a spec's model over HTTP; without `deploy.version` the newest one.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/deploy.py jobs/specs/digits.yaml deploy.version=3
"""

from heliostat import spec, storage
from heliostat.job import run
from heliostat.serve.deploy import deploy


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    store = storage.connect(wanted.root)
    storage.probe(store)
    print(deploy(store, wanted.name, wanted.deploy))


if __name__ == "__main__":
    run(main)

"""Train the model that a spec describes and register it as a new version.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/train.py jobs/specs/digits.yaml train.workers=2 train.epochs=20
"""

from heliostat import spec, storage
from heliostat.cluster.preflight.survey import require_healthy
from heliostat.data.manifest import check_shards
from heliostat.data.prepare import require_prepared
from heliostat.job import run
from heliostat.train.launch import train
from heliostat.train.outcome import publish


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    store = storage.connect(wanted.root)
    storage.probe(store)
    manifest = require_prepared(wanted)
    check_shards(store, manifest)
    require_healthy(wanted)
    result = train(wanted, manifest)
    version = publish(wanted, manifest, result)
    print("  ".join(f"{key} {value:,.4g}" for key, value in version.metrics.items()))
    print(version.ref)


if __name__ == "__main__":
    run(main)

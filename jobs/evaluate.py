"""Score a version on the test split; without `evaluate.version` the newest one.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \
    python jobs/evaluate.py jobs/specs/digits.yaml evaluate.version=1
"""

from heliostat import registry, spec, storage
from heliostat.data.manifest import check_shards, load_manifest
from heliostat.data.stream import read_split
from heliostat.evaluate import load_predictor, score
from heliostat.job import run


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    store = storage.connect(wanted.root)
    storage.probe(store)
    version = registry.resolve(store, spec.reference(wanted.name, wanted.evaluate.version))
    manifest = load_manifest(store, version.data_name, version.data_version)
    check_shards(store, manifest)
    batches = read_split(store, manifest, "test", wanted.evaluate.batch)
    scores = score(load_predictor(store, version), batches)
    registry.record_evaluation(store, version, manifest.version, "test", scores.to_json())
    print(f"{version.ref} on the test split of {manifest.name}@{manifest.version}\n")
    print(scores.render())


if __name__ == "__main__":
    run(main)

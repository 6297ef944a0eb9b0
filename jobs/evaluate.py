"""Score a version on the test split; without `evaluate.version` the newest one.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
    python jobs/evaluate.py jobs/specs/digits.yaml evaluate.version=1
"""

from itertools import chain

from heliostat import registry, spec, storage
from heliostat.data.manifest import check_shards, load_manifest
from heliostat.data.stream import read_split
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor, score
from heliostat.evaluate.ranking import explain_none, rank_items, render
from heliostat.job import run


def main(path: str, *overrides: str) -> None:
    wanted = spec.load(path, overrides)
    store = storage.connect(wanted.root)
    storage.probe(store)
    version = registry.resolve(store, spec.reference(wanted.name, wanted.evaluate.version))
    manifest = load_manifest(store, version.data_name, version.data_version)
    check_shards(store, manifest)
    if not manifest.rows["test"]:
        raise HeliostatError(
            f"{manifest.name}@{manifest.version} has no test rows: raise data.split.test or set "
            "data.split.test_files, then prepare and train again"
        )
    train, validation, test, again = (
        read_split(store, manifest, split, wanted.evaluate.batch)
        for split in ("train", "validation", "test", "test")
    )
    predictor = load_predictor(store, version)
    scores = score(predictor, test)
    ranked = rank_items(predictor, chain(train, validation), again)
    record = scores.to_json() | ranked
    registry.record_evaluation(store, version, manifest.version, "test", record)
    print(f"{version.ref} on the test split of {manifest.name}@{manifest.version}\n")
    print(scores.render())
    print(explain_none(predictor) or render(ranked))


if __name__ == "__main__":
    run(main)

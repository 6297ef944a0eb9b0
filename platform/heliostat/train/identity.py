"""What makes a run this run and no other, written down beside it and in each of its checkpoints."""

import json
from typing import Any

from heliostat import spec
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.spec import RunSpec
from heliostat.spec.difference import refuse_changes
from heliostat.storage import Missing, Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Corrupt
from heliostat.train.job import result_key

# What may change between two tries of the same run.
_NOT_IDENTITY = {
    "run",
    "force",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "micro_batch",
    "strategy",
    "recompute",
    "compile",
    "max_failures",
    "hang_seconds",
    "cache_share",
    "keep_checkpoints",
    "preflight",
    "avoid_nodes",
}


def describe(run: RunSpec, manifest: Manifest, weights: str | None) -> dict[str, Any]:
    """What tells the run from others; `weights` is the digest of those at `model.init`, if known.

    A run without such weights is told as runs were before there was a digest.
    """
    described = {
        "data": f"{manifest.name}@{manifest.version}",
        "model": run.model.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }
    return described | ({"weights": weights} if weights else {})


def identify(store: Store, run: RunSpec, described: dict[str, Any]) -> str:
    """The run's name: the same model, data, weights and training section resume the same run."""
    if run.train.run:
        return run.train.run
    name, older = _derive(run, described), _derive(run, _drop_weights(described))
    return older if older != name and _goes_on(store, older, described) else name


def register(store: Store, name: str, run: RunSpec, described: dict[str, Any]) -> None:
    """Write down what the run is, once; with `train.force` anew. Only who has its lease may.

    Raises:
        HeliostatError: a run of this name is another one; names the keys that differ.
    """
    key, known = f"runs/{name}/run.json", _read(store, name)
    before = known or described
    if not run.train.force:
        _refuse_another(name, run, before, described)
    if known and "weights" in described and "weights" not in known:
        print(
            f"run {name} does not say with which weights it began: those at model.init are taken "
            "for them",
            flush=True,
        )
    written = described if run.train.force else described | before
    store.write(key, json.dumps(written, indent=1).encode())


def to_extra(run: RunSpec, manifest: Manifest, weights: str | None) -> dict[str, Any]:
    """The resolved spec and what the run is, for its checkpoints."""
    return {"spec": spec.dump(run), "run": describe(run, manifest, weights)}


def _derive(run: RunSpec, described: dict[str, Any]) -> str:
    return f"{run.name}-{spec.digest(described)[:12]}"


def _drop_weights(described: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key != "weights"}


def _goes_on(store: Store, older: str, described: dict[str, Any]) -> bool:
    """Whether this is the run that got its name before weights were part of it.

    One that ended so may have begun with any: it is not taken for the answer.
    """
    known = _read(store, older)
    if known is None or "weights" in known:
        return known is not None and known["weights"] == described["weights"]
    return store.stat(result_key(older)) is None


def _refuse_another(
    name: str, run: RunSpec, before: dict[str, Any], described: dict[str, Any]
) -> None:
    refuse_changes(name, _drop_weights(before), _drop_weights(described))
    weights = described.get("weights")
    if weights and before.get("weights", weights) != weights:
        raise HeliostatError(
            f"run {name} was started with other weights than those that now lie at "
            f"model.init={run.model.init}: choose another train.run, or none to derive one, or set "
            "train.force=true"
        )


def _read(store: Store, name: str) -> dict[str, Any] | None:
    """What is written of the run; None if there is none."""
    try:
        return read_document(store, f"runs/{name}/run.json", dict[str, Any])
    except Missing:
        return _recall(store, name)
    except Damaged as error:
        print(f"{error}; what the newest checkpoint says is taken instead", flush=True)
        return _recall(store, name)


def _recall(store: Store, name: str) -> dict[str, Any] | None:
    """What the newest sound checkpoint of the run says of it; None if there is none."""
    for key in checkpoint.committed(store, name):
        try:
            found: dict[str, Any] = checkpoint.read_manifest(store, key).extra["run"]
        except (Corrupt, KeyError):
            continue
        return found
    return None

"""What makes a run this run and no other, written down beside it and in each of its checkpoints."""

import json
from typing import Any

from heliostat import spec
from heliostat.data.manifest import Manifest
from heliostat.spec import RunSpec
from heliostat.spec.difference import refuse_changes
from heliostat.storage import Missing, Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Corrupt

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


def identify(run: RunSpec, manifest: Manifest) -> str:
    """The run's name: the same model, data and training section resume the same run."""
    if run.train.run:
        return run.train.run
    return f"{run.name}-{spec.digest(_describe(run, manifest))[:12]}"


def register(store: Store, name: str, run: RunSpec, manifest: Manifest) -> None:
    """Write down what the run is, once; with `train.force` anew. Only who has its lease may.

    Raises:
        HeliostatError: a run of this name is another one; names the keys that differ.
    """
    key, described = f"runs/{name}/run.json", _describe(run, manifest)
    try:
        before = read_document(store, key, dict[str, Any])
    except (Missing, Damaged) as error:
        if isinstance(error, Damaged):
            print(f"{error}; what the newest checkpoint says is taken instead", flush=True)
        before = _recall(store, name) or described
        store.write(key, json.dumps(before, indent=1).encode())
    if run.train.force:
        store.write(key, json.dumps(described, indent=1).encode())
    else:
        refuse_changes(name, before, described)


def to_extra(run: RunSpec, manifest: Manifest) -> dict[str, Any]:
    """The resolved spec and the data, for the checkpoints of the run."""
    return {"spec": spec.dump(run), "run": _describe(run, manifest)}


def _recall(store: Store, name: str) -> dict[str, Any] | None:
    """What the newest sound checkpoint of the run says of it; None if there is none."""
    for key in checkpoint.committed(store, name):
        try:
            found: dict[str, Any] = checkpoint.read_manifest(store, key).extra["run"]
        except (Corrupt, KeyError):
            continue
        return found
    return None


def _describe(run: RunSpec, manifest: Manifest) -> dict[str, Any]:
    return {
        "data": f"{manifest.name}@{manifest.version}",
        "model": run.model.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json", exclude=_NOT_IDENTITY),
    }

"""What lies at `model.init`: which files have the weights, and a digest that tells them apart."""

import hashlib
import json
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.storage import LocalStore, Missing, Store, connect

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def find_weights(init: str) -> tuple[Store, list[str]]:
    """The store and the keys of the .safetensors files at `init`: itself, or those of a directory.

    Raises:
        Missing: there are none.
        HeliostatError: the index there is none.
    """
    place, _, name = init.rpartition("/")
    if name.endswith(".safetensors"):
        return connect(place or "."), [name]
    store = connect(init)
    if store.stat(WEIGHTS) is not None:  # transformers reads it before the index beside it
        return store, [WEIGHTS]
    if store.stat(INDEX) is not None:
        return store, _list_files(store)
    raise Missing(
        f"{store.uri} has neither {WEIGHTS} nor {INDEX}: model.init is a directory with one of "
        "them, or one .safetensors file"
    )


def digest_weights(init: str) -> str | None:
    """SHA-256 of the names and contents of the weights at `init`; None if there are none here.

    For a directory of each node's own, this machine's need not have them.
    """
    try:
        store, files = find_weights(init)
        contents = [(file, _tell_content(store, file)) for file in files]
    except Missing:
        return None
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def read_object(store: Store, key: str) -> dict[str, Any]:
    """Raises HeliostatError: it is no JSON object."""
    try:
        document = json.loads(store.read(key))
    except ValueError as error:
        raise HeliostatError(f"{store.uri}/{key} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise HeliostatError(f"{store.uri}/{key} is not a JSON object")
    return document


def _tell_content(store: Store, key: str) -> str:
    """A bucket's etag is of the bytes; a directory's is another on each machine."""
    if isinstance(store, LocalStore):
        with store.open(key) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    entry = store.stat(key)
    if entry is None:
        raise Missing(f"{store.uri}/{key}")
    return f"{entry.size}-{entry.etag}"


def _list_files(store: Store) -> list[str]:
    places = read_object(store, INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise HeliostatError(f"{store.uri}/{INDEX} has no weight_map of names to files")
    return sorted(set(places.values()))

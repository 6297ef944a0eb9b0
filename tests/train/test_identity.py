"""A run is its model, data, training section and the weights it began with, and no other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from datasets import store_images
from heliostat import spec
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.origin import digest_weights
from heliostat.spec import RunSpec
from heliostat.storage import LocalStore, Store, connect
from heliostat.train.identity import describe, identify, register
from heliostat.train.job import result_key

FILES = {
    "model-1.safetensors": b"one",
    "model-2.safetensors": b"two",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path / "bucket"))


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return store_images(store, {"train": 8})


@pytest.fixture
def init(tmp_path: Path) -> Path:
    folder = tmp_path / "init"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def make_run(store: Store, init: object = None, **train: Any) -> RunSpec:
    model = {"kind": "mlp", "init": str(init) if init else None}
    source = {"source": "unused"}
    return spec.parse(
        {"name": "tiny", "root": store.uri, "data": source, "model": model, "train": train}
    )


def describe_now(run: RunSpec, manifest: Manifest) -> dict[str, Any]:
    return describe(run, manifest, digest_weights(run.model.init) if run.model.init else None)


def start(store: Store, run: RunSpec, manifest: Manifest) -> str:
    """The name under which the run starts."""
    described = describe_now(run, manifest)
    name = identify(store, run, described)
    register(store, name, run, described)
    return name


def start_older(store: Store, run: RunSpec, manifest: Manifest) -> str:
    """As when nothing was known of the weights."""
    described = describe(run, manifest, None)
    name = identify(store, run, described)
    store.write(f"runs/{name}/run.json", json.dumps(described).encode())
    return name


def test_other_weights_at_the_same_place_are_another_run(
    store: Store, manifest: Manifest, init: Path
) -> None:
    run = make_run(store, init)
    name = start(store, run, manifest)
    assert start(store, run, manifest) == name
    (init / "model-2.safetensors").write_bytes(b"owt")
    assert start(store, run, manifest) != name
    (init / "model-2.safetensors").write_bytes(b"two")
    assert start(store, run, manifest) == name


def test_a_run_of_this_name_that_began_with_other_weights_is_refused(
    store: Store, manifest: Manifest, init: Path
) -> None:
    run = make_run(store, init, run="mine")
    assert start(store, run, manifest) == "mine"
    (init / "model-1.safetensors").write_bytes(b"eno")
    with pytest.raises(HeliostatError, match=r"run mine .* other weights .* model\.init=/.*force"):
        start(store, run, manifest)
    start(store, make_run(store, init, run="mine", force=True), manifest)
    start(store, run, manifest)


def test_a_run_goes_on_where_its_weights_cannot_be_seen(
    store: Store, manifest: Manifest, init: Path
) -> None:
    """It has its checkpoints, and its workers may see what the driver does not."""
    run = make_run(store, init, run="mine")
    start(store, run, manifest)
    os.rename(init, f"{init}-gone")
    assert digest_weights(str(init)) is None
    start(store, run, manifest)
    os.rename(f"{init}-gone", init)
    (init / "model-1.safetensors").write_bytes(b"eno")
    with pytest.raises(HeliostatError, match="other weights"):
        start(store, run, manifest)


def test_a_run_without_such_weights_has_the_name_that_it_always_had(
    store: Store, manifest: Manifest
) -> None:
    run = make_run(store)
    described = describe_now(run, manifest)
    assert described.keys() == {"data", "model", "train"}
    assert start(store, run, manifest) == f"tiny-{spec.digest(described)[:12]}"


@pytest.mark.parametrize("train", [{}, {"run": "mine"}], ids=["derived", "named"])
def test_a_run_that_began_before_weights_were_told_goes_on_and_tells_them(
    store: Store,
    manifest: Manifest,
    init: Path,
    train: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(store, init, **train)
    older = start_older(store, run, manifest)
    assert start(store, run, manifest) == older
    assert f"run {older} does not say with which weights" in capsys.readouterr().out
    assert start(store, run, manifest) == older
    store.write(result_key(older), b"{}")
    assert start(store, run, manifest) == older
    assert not capsys.readouterr().out
    (init / "model-1.safetensors").write_bytes(b"eno")
    if train:
        with pytest.raises(HeliostatError, match="other weights"):
            start(store, run, manifest)
    else:
        assert start(store, run, manifest) != older


def test_the_end_of_a_run_that_does_not_tell_its_weights_is_not_that_of_these(
    store: Store, manifest: Manifest, init: Path
) -> None:
    run = make_run(store, init)
    older = start_older(store, run, manifest)
    store.write(result_key(older), b"{}")
    assert start(store, run, manifest) != older


def test_a_digest_is_of_what_is_read_and_the_same_on_each_machine(
    tmp_path: Path, init: Path, bucket: str
) -> None:
    digest = digest_weights(str(init))
    assert digest
    (init / "optimizer.safetensors").write_bytes(b"beside")
    copy = LocalStore(str(tmp_path / "copy"))
    for name, data in FILES.items():
        copy.write(name, data)
    assert digest_weights(str(init)) == digest_weights(copy.uri) == digest
    one = digest_weights(f"{init}/model-1.safetensors")
    assert one not in (None, digest, digest_weights(f"{init}/model-2.safetensors"))
    assert digest_weights(f"{init}/model-3.safetensors") is None
    os.remove(init / "model-2.safetensors")
    assert digest_weights(str(init)) is None

    assert digest_weights(bucket) is None
    remote = connect(bucket)
    for name, data in FILES.items():
        remote.write(name, data)
    before = digest_weights(bucket)
    assert before
    remote.write("model-1.safetensors", b"eno")
    assert digest_weights(bucket) != before

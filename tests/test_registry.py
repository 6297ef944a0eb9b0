"""Laws of the registry: one winner per number, no lost alias, nothing but finite safetensors."""

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from heliostat import registry
from heliostat.errors import HeliostatError
from heliostat.registry import Draft, Version
from heliostat.spec import NAME_PATTERN
from heliostat.storage import Store, connect

WEIGHTS = save({"layer.weight": np.ones((4, 3), np.float32), "seen": np.arange(2)})
SHARDS = [
    {"key": f"data/digits/shards/{c * 64}.parquet", "split": "train", "rows": 10, "sha256": c * 64}
    for c in "ab"
]
MANIFEST = {"source": "s3://raw/digits", "rows": {"train": 20}, "shards": SHARDS}


def draft(**changes: Any) -> Draft:
    return replace(
        Draft(
            name="digits",
            output={"kind": "classes", "labels": ["zero", "one"]},
            features={"kind": "table"},
            spec={"name": "digits"},
            data_name="digits",
            data_version="0123456789abcdef",
            run="digits-1",
            step=100,
            code="",
            metrics={"loss": 0.25},
        ),
        **changes,
    )


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return connect(str(tmp_path / "bucket"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return connect(request.getfixturevalue("bucket"))
    return connect(str(tmp_path / "bucket"))


def race(num_threads: int, act: Callable[[int], Any]) -> list[Any]:
    """What each of `num_threads` simultaneous calls returned, or the HeliostatError it raised."""

    def attempt(index: int) -> Any:
        try:
            return act(index)
        except HeliostatError as error:
            return error

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(attempt, range(num_threads)))


def test_a_version_reads_back_as_published(store: Store) -> None:
    version = registry.publish(store, draft(), WEIGHTS)
    assert version.ref == "digits:1"
    assert registry.resolve(store, "digits:1") == version
    assert registry.load_weights(store, version) == WEIGHTS
    assert registry.list_versions(store, "digits") == [version]
    assert registry.list_names(store) == ["digits"]


def test_a_version_never_changes(local: Store) -> None:
    version = registry.publish(local, draft(), WEIGHTS)
    before = local.read(version.key)
    registry.publish(local, draft(run="digits-2"), WEIGHTS)
    registry.set_alias(local, "digits", "production", 1)
    registry.record_evaluation(local, version, version.data_version, "test", {"accuracy": 1.0})
    with pytest.raises(HeliostatError, match="digits:1 is taken"):
        registry.publish(local, draft(run="digits-3"), WEIGHTS, number=1)
    assert local.read(version.key) == before


@pytest.mark.parametrize("num_threads", [16, 50])
def test_racing_for_one_number_has_one_winner(store: Store, num_threads: int) -> None:
    outcomes = race(
        num_threads,
        lambda i: registry.publish(store, draft(run=f"run-{i}"), WEIGHTS, number=3),
    )
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Version)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, HeliostatError)]
    assert len(losers) == num_threads - 1
    assert all("digits:3 is taken" in str(loser) for loser in losers)
    assert registry.list_versions(store, "digits") == [winner]


def test_racing_for_the_next_number_gives_each_its_own(store: Store) -> None:
    versions = race(16, lambda i: registry.publish(store, draft(run=f"run-{i}"), WEIGHTS))
    assert sorted(version.number for version in versions) == list(range(1, 17))
    assert {v.ref: v for v in versions} == {
        v.ref: v for v in registry.list_versions(store, "digits")
    }


def test_publishing_again_returns_the_version_that_exists(store: Store) -> None:
    first = registry.publish(store, draft(), WEIGHTS)
    registry.publish(store, draft(run="another"), WEIGHTS)
    registry.publish(store, draft(step=200), WEIGHTS)
    again = race(8, lambda _: registry.publish(store, draft(metrics={"loss": 9.0}), WEIGHTS))
    assert again == [first] * 8
    assert len(registry.list_versions(store, "digits")) == 3


@pytest.mark.parametrize("number", [0, -1, 10**9])
def test_a_number_out_of_range_is_refused(local: Store, number: int) -> None:
    with pytest.raises(HeliostatError, match="numbers go from 1"):
        registry.publish(local, draft(), WEIGHTS, number=number)


def test_no_alias_update_is_lost(store: Store) -> None:
    num_threads = 12
    for i in range(num_threads + 1):
        registry.publish(store, draft(run=f"run-{i}"), WEIGHTS)
    registry.set_alias(store, "digits", "production", 1, expected=None)

    def advance(_: int) -> None:
        while True:
            current = registry.list_aliases(store, "digits")["production"]
            with suppress(HeliostatError):
                registry.set_alias(store, "digits", "production", current + 1, expected=current)
                return

    assert race(num_threads, advance) == [None] * num_threads
    assert registry.list_aliases(store, "digits") == {"production": num_threads + 1}


def test_fifty_movers_of_one_alias_have_one_winner(store: Store) -> None:
    for i in range(3):
        registry.publish(store, draft(run=f"run-{i}"), WEIGHTS)
    registry.set_alias(store, "digits", "production", 1)
    outcomes = race(
        50, lambda i: registry.set_alias(store, "digits", "production", 2 + i % 2, expected=1)
    )
    assert outcomes.count(None) == 1
    winner = 2 + outcomes.index(None) % 2
    assert registry.list_aliases(store, "digits") == {"production": winner}


def test_without_expectation_every_move_succeeds(store: Store) -> None:
    versions = [registry.publish(store, draft(run=f"run-{i}"), WEIGHTS) for i in range(8)]
    moved = race(8, lambda i: registry.set_alias(store, "digits", "canary", i + 1))
    assert moved == [None] * 8
    assert registry.resolve(store, "digits@canary") in versions


@pytest.mark.parametrize(
    ("expected", "said"), [(None, "at version 1, expected at no version"), (2, "expected at ver")]
)
def test_an_alias_elsewhere_than_expected_stays(local: Store, expected: Any, said: str) -> None:
    for i in range(2):
        registry.publish(local, draft(run=f"run-{i}"), WEIGHTS)
    registry.set_alias(local, "digits", "production", 1)
    with pytest.raises(HeliostatError, match=said):
        registry.set_alias(local, "digits", "production", 2, expected=expected)
    assert registry.resolve(local, "digits@production").number == 1


def test_an_alias_of_nothing_is_refused(local: Store) -> None:
    registry.publish(local, draft(), WEIGHTS)
    with pytest.raises(HeliostatError, match="no model version 'digits:2'"):
        registry.set_alias(local, "digits", "production", 2)
    assert registry.list_aliases(local, "digits") == {}


class Killed(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class DiesBeforeClaim:
    """A store whose process ends at the first conditional put."""

    store: Store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def create(self, key: str, data: bytes) -> str:
        raise Killed


def test_a_crash_before_the_claim_leaves_no_version(local: Store) -> None:
    with pytest.raises(Killed):
        registry.publish(DiesBeforeClaim(local), draft(), WEIGHTS)
    assert [entry.key.split("/")[0] for entry in local.list()] == ["blobs"]
    assert registry.list_names(local) == []
    with pytest.raises(HeliostatError, match="no model has been published"):
        registry.resolve(local, "digits")
    assert registry.publish(local, draft(), WEIGHTS).number == 1


@pytest.mark.parametrize(
    "changed",
    [WEIGHTS[:-1] + b"\x01", WEIGHTS[:-1], b"", WEIGHTS + b"\x00"],
    ids=["flipped", "truncated", "empty", "longer"],
)
def test_changed_weights_are_refused(store: Store, changed: bytes) -> None:
    version = registry.publish(store, draft(), WEIGHTS)
    store.write(version.weights_key, changed)
    with pytest.raises(HeliostatError, match=r"is not what digits:1 was published with"):
        registry.load_weights(store, version)


def test_publishing_again_restores_lost_weights(local: Store) -> None:
    version = registry.publish(local, draft(), WEIGHTS)
    local.delete(version.weights_key)
    with pytest.raises(HeliostatError, match=version.weights_sha256):
        registry.load_weights(local, version)
    assert registry.publish(local, draft(), WEIGHTS) == version
    assert registry.load_weights(local, version) == WEIGHTS


class Canary:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def torch_zip(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2), "canary": canary}, buffer)
    return buffer.getvalue()


def plain_zip(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("model.safetensors", WEIGHTS)
    return buffer.getvalue()


FOREIGN: dict[str, tuple[Callable[[Canary], bytes], str]] = {
    "torch zip": (torch_zip, "given a zip archive"),
    "plain zip": (plain_zip, "given a zip archive"),
    "pickle 2": (lambda canary: pickle.dumps(canary, protocol=2), "given a pickle"),
    "pickle 5": (lambda canary: pickle.dumps(canary, protocol=5), "given a pickle"),
    "pickle 0": (lambda canary: pickle.dumps(canary, protocol=0), "something else"),
    "hdf5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(100), "given an HDF5 file"),
    "random": (lambda _: np.random.default_rng(0).bytes(4096), "something else"),
    "empty": (lambda _: b"", "given 0 bytes"),
    "truncated": (lambda _: WEIGHTS[:-1], "something else"),
    "pickle behind": (lambda canary: WEIGHTS + pickle.dumps(canary), "something else"),
    "zip behind": (lambda canary: WEIGHTS + plain_zip(canary), "something else"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_safetensors_content_is_published(local: Store, tmp_path: Path, kind: str) -> None:
    make, said = FOREIGN[kind]
    with pytest.raises(HeliostatError, match=said):
        registry.publish(local, draft(), make(Canary(tmp_path / "canary")))
    assert list(local.list()) == []
    assert not (tmp_path / "canary").exists()


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_are_weights_or_refused_with_a_sentence(data: bytes) -> None:
    with pytest.raises(HeliostatError) as caught:
        registry.check_weights(data)
    assert len(str(caught.value)) < 400


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "complex64"]
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_weights_pass_and_non_finite_ones_are_named(local: Store, dtype: str) -> None:
    limits = torch.finfo(getattr(torch, dtype))
    values = torch.tensor([0.0, 1.5, limits.max, limits.min, limits.tiny], dtype=torch.float64)
    finite = values.to(getattr(torch, dtype))
    registry.check_weights(save_torch({"layer.bias": finite}))
    # float8_e4m3fn has no infinity
    for bad in [NAN] if dtype == "float8_e4m3fn" else [NAN, INFINITY, -INFINITY]:
        tensor = torch.tensor([1.0, bad, 2.0]).to(getattr(torch, dtype))
        with pytest.raises(HeliostatError, match=r"'layer.bias' holds NaN or infinity"):
            registry.publish(local, draft(), save_torch({"ok": finite, "layer.bias": tensor}))
    assert list(local.list()) == []


def test_a_metric_that_is_not_finite_is_named(local: Store) -> None:
    with pytest.raises(HeliostatError, match="metric 'loss' is nan"):
        registry.publish(local, draft(metrics={"loss": float("nan")}), WEIGHTS)


HOSTILE_NAMES = [
    "../x", "..", "a/b", "a..b", "/a", "a\0b", "a\n", "a" * 64, "a" * 300, "", " a", "A", "-a",
    ".a", "dıgits", "digıts", "\uff41", "\u0430", "a:1", "a@b", "a%2fb", "a\\b", "*", "~", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_refused_everywhere(local: Store, name: str) -> None:
    version = registry.publish(local, draft(), WEIGHTS)
    before = list(local.list())
    attempts: list[Callable[[], object]] = [
        lambda: registry.publish(local, draft(name=name), WEIGHTS),
        lambda: registry.publish(local, draft(name=name), WEIGHTS, number=1),
        lambda: registry.list_versions(local, name),
        lambda: registry.list_aliases(local, name),
        lambda: registry.set_alias(local, "digits", name, 1),
        lambda: registry.set_alias(local, name, "production", 1),
        lambda: registry.resolve(local, f"digits@{name}"),
        lambda: registry.resolve(local, f"{name}:1:"),
        lambda: registry.record_evaluation(local, version, name, "test", {}),
        lambda: registry.record_evaluation(local, version, "v1", name, {}),
    ]
    for attempt in attempts:
        with pytest.raises(HeliostatError) as caught:
            attempt()
        assert len(str(caught.value)) < 400
    assert list(local.list()) == before


@pytest.mark.parametrize("name", ["con", "nul", "a.b", "0", "x" * 63, "production"])
def test_plain_names_stay_below_their_folder(local: Store, name: str) -> None:
    version = registry.publish(local, draft(name=name), WEIGHTS)
    assert registry.resolve(local, name) == version
    assert {entry.key for entry in local.list("models/")} == {f"models/{name}/versions/1.json"}


@given(st.text(st.characters(), max_size=80) | st.from_regex(NAME_PATTERN, fullmatch=True))
def test_a_reference_is_a_name_or_refused(tmp_path_factory: Any, ref: str) -> None:
    empty = connect(str(tmp_path_factory.getbasetemp() / "empty"))
    with pytest.raises(HeliostatError) as caught:
        registry.resolve(empty, ref)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "tail", [":0", ":01", ":+1", ":١", ": 1", ":", "@", ":1@x", ":1e0", "@x@y"]
)
def test_a_reference_has_one_spelling(local: Store, tail: str) -> None:
    registry.publish(local, draft(), WEIGHTS)
    with pytest.raises(HeliostatError, match="is not a model version: write NAME:NUMBER"):
        registry.resolve(local, f"digits{tail}")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("digits:7", "the newest versions of digits are 2, 1, its aliases: production"),
        ("digits@canary", ".*, its aliases: production"),
        ("letters", "the models in .* are digits"),
    ],
)
def test_an_unknown_reference_is_told_what_exists(local: Store, ref: str, said: str) -> None:
    for i in range(2):
        registry.publish(local, draft(run=f"run-{i}"), WEIGHTS)
    registry.set_alias(local, "digits", "production", 1)
    with pytest.raises(HeliostatError, match=f"no model version '{ref}': {said}"):
        registry.resolve(local, ref)


def test_a_bare_name_is_the_newest_version(local: Store) -> None:
    for i in range(11):
        registry.publish(local, draft(run=f"run-{i}"), WEIGHTS)
    assert registry.resolve(local, "digits").number == 11
    assert [v.number for v in registry.list_versions(local, "digits")] == list(range(1, 12))


def test_foreign_objects_beside_versions_are_ignored(local: Store) -> None:
    registry.publish(local, draft(), WEIGHTS)
    for key in ("versions/x.json", "versions/2.json.tmp", "versions/03.json", "aliases/A B.json"):
        local.write(f"models/digits/{key}", b"{}")
    assert [version.number for version in registry.list_versions(local, "digits")] == [1]
    assert registry.list_aliases(local, "digits") == {}


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"name": "digits"}', b"\xff"])
def test_a_damaged_record_is_named(local: Store, record: bytes) -> None:
    version = registry.publish(local, draft(), WEIGHTS)
    local.write(version.key, record)
    with pytest.raises(HeliostatError, match=r"versions/1.json is not a version record"):
        registry.resolve(local, "digits:1")


def test_evaluations_stand_beside_their_version(store: Store) -> None:
    first = registry.publish(store, draft(), WEIGHTS)
    second = registry.publish(store, draft(run="digits-2"), WEIGHTS)
    registry.record_evaluation(store, first, "v1", "test", {"accuracy": 0.5})
    registry.record_evaluation(store, first, "v1", "test", {"accuracy": 0.9})
    registry.record_evaluation(store, first, "v1", "validation", {"matrix": [[1, 0], [0, 1]]})
    assert registry.list_evaluations(store, first) == [
        registry.Evaluation("v1", "test", {"accuracy": 0.9}),
        registry.Evaluation("v1", "validation", {"matrix": [[1, 0], [0, 1]]}),
    ]
    assert registry.list_evaluations(store, second) == []


def publish_traced(store: Store) -> Version:
    """A version with everything behind it in the store."""
    store.write("data/digits/0123456789abcdef/manifest.json", json.dumps(MANIFEST).encode())
    store.write("runs/digits-1/run.json", b"{}")
    store.write("code/c0de.zip", b"PK")
    for shard in SHARDS:
        store.write(str(shard["key"]), b"PAR1")
    return registry.publish(store, draft(code="c0de"), WEIGHTS)


def test_a_version_leads_back_to_its_shards(store: Store) -> None:
    version = publish_traced(store)
    lineage = registry.trace(store, "digits")
    assert (lineage.version, lineage.missing) == (version, ())
    assert (lineage.source, lineage.rows) == ("s3://raw/digits", {"train": 20})
    assert [vars(shard) for shard in lineage.shards] == SHARDS


@pytest.mark.parametrize("index", range(6))
def test_lineage_names_what_is_missing(local: Store, index: int) -> None:
    version = publish_traced(local)
    keys = sorted(entry.key for entry in local.list() if not entry.key.startswith("models/"))
    local.delete(keys[index])
    (missing,) = registry.trace(local, version.ref).missing
    assert missing.removesuffix(" (gone)") == keys[index]


DAMAGED_MANIFESTS = [
    b"",
    b"[]",
    b"{",
    b'{"source": "x", "rows": 3, "shards": []}',
    b'{"source": "x", "rows": {}, "shards": [{"key": 1}]}',
]


@pytest.mark.parametrize("manifest", DAMAGED_MANIFESTS)
def test_lineage_survives_a_damaged_manifest(local: Store, manifest: bytes) -> None:
    registry.publish(local, draft(), WEIGHTS)
    local.write("runs/digits-1/run.json", b"{}")
    local.write("data/digits/0123456789abcdef/manifest.json", manifest)
    lineage = registry.trace(local, "digits:1")
    assert lineage.missing == ("data/digits/0123456789abcdef/manifest.json (not a manifest)",)


def test_foreign_places_are_refused_before_any_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]
        for uri in (
            f"http://127.0.0.1:{port}/bucket",
            f"https://127.0.0.1:{port}/bucket",
            f"gs://127.0.0.1:{port}/bucket",
            f"file://127.0.0.1:{port}/bucket",
            "http://169.254.169.254/latest/meta-data",
            "file://169.254.169.254/latest",
        ):
            with pytest.raises(HeliostatError):
                connect(uri)
        with pytest.raises(BlockingIOError):
            listener.accept()

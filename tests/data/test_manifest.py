"""A manifest knows its shards: any that is not as it was written is refused before a run."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from datasets import store_images
from heliostat.data.manifest import Manifest, check_shards, content_version, data_key, load_manifest
from heliostat.errors import HeliostatError
from heliostat.storage import Store, connect

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped byte": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "zero bytes": lambda data: b"",
    "cut": lambda data: data[:-1],
}


@pytest.fixture
def store(bucket: str) -> Store:
    return connect(bucket)


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return store_images(store, {"train": 200, "test": 20})


def test_shards_as_written_pass_also_after_a_copy_to_another_bucket(
    store: Store, manifest: Manifest
) -> None:
    check_shards(store, manifest)
    moved = [replace(shard, etag="another store's") for shard in manifest.shards]
    check_shards(store, replace(manifest, shards=tuple(moved)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_refused_by_name(store: Store, manifest: Manifest, damage: str) -> None:
    key = manifest.shards[1].key
    store.write(key, DAMAGES[damage](store.read(key)))
    with pytest.raises(HeliostatError, match=f"1 of 5 shards .* prepare the data again: {key}"):
        check_shards(store, manifest)


@pytest.mark.parametrize("flipped", [b'"rows_baf"', b'"repors"'])
def test_a_damaged_report_is_refused_before_it_is_read(
    store: Store, manifest: Manifest, flipped: bytes
) -> None:
    key = data_key(manifest.name, manifest.version, "manifest.json")
    written = store.read(key)
    store.write(key, written.replace(b'"rows_bad"', flipped).replace(b'"report"', flipped))
    with pytest.raises(HeliostatError, match=f"{key} is damaged: prepare the data again"):
        load_manifest(store, manifest.name, manifest.version)
    store.write(key, written)
    assert load_manifest(store, manifest.name, manifest.version) == manifest


def test_a_missing_shard_is_refused_by_name(store: Store, manifest: Manifest) -> None:
    store.delete(manifest.shards[0].key)
    with pytest.raises(HeliostatError, match=f"{manifest.shards[0].key} is missing"):
        check_shards(store, manifest)


def test_the_version_is_of_the_content_and_not_of_where_it_is_stored(manifest: Manifest) -> None:
    moved = tuple(replace(shard, key="elsewhere", etag="other") for shard in manifest.shards)
    assert content_version(replace(manifest, shards=moved)) == manifest.version
    other = (replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:])
    assert content_version(replace(manifest, shards=other)) != manifest.version

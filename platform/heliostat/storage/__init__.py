"""One URI, one store: objects in a bucket or a local directory, written whole or not at all."""

import contextlib
import dataclasses
import os
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

from heliostat.errors import HeliostatError
from heliostat.storage.entry import Conflict, Entry, Missing, check_key, join
from heliostat.storage.local import LocalStore
from heliostat.storage.s3 import QUICK, Retry, S3Store

__all__ = [
    "QUICK",
    "Conflict",
    "Entry",
    "LocalStore",
    "Missing",
    "Retry",
    "S3Store",
    "Store",
    "connect",
    "join",
    "probe",
    "upload_folder",
]


class Store(Protocol):
    """Objects by key below one URI. A store can be pickled and never carries credentials.

    Every method raises HeliostatError when the store cannot be reached or refuses; no method
    returns fewer bytes than the object has, and no failed write leaves an object behind.
    """

    @property
    def uri(self) -> str:
        """Without a trailing slash: `s3://bucket/prefix` or an absolute path."""

    def read(self, key: str) -> bytes:
        """The whole object; Missing if there is none."""

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset` on."""

    def open(self, key: str) -> BinaryIO:
        """The object as a sequential stream of bounded memory."""

    def write(self, key: str, data: bytes) -> str:
        """Store or overwrite the object; returns its etag."""

    def upload(self, key: str, path: Path) -> str:
        """Store a file of any size in bounded memory; returns its etag."""

    def create(self, key: str, data: bytes) -> str:
        """Store a new object; Conflict if the key is taken. Of many racers exactly one wins."""

    def replace(self, key: str, data: bytes, etag: str) -> str:
        """Overwrite the object while it still is the one with `etag`; else Conflict."""

    def stat(self, key: str) -> Entry | None:
        """The object's entry, None if there is no object."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The entries of all keys that begin with the string `prefix`, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove the object; that it does not exist is fine."""


def connect(uri: str) -> S3Store | LocalStore:
    """The store at `s3://bucket[/prefix]`, `file:///path` or a local path; nothing is sent yet.

    Raises:
        HeliostatError: the URI has another scheme, no bucket, or a prefix that is no key.
    """
    scheme, colon, rest = uri.partition(":")
    if not uri or "\0" in uri:
        raise HeliostatError(f"{uri!r} is not a place: give s3://bucket/prefix or a directory")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return LocalStore(os.path.abspath(os.path.expanduser(uri)))
    if scheme.lower() == "file" and rest.startswith("///"):
        return LocalStore(os.path.abspath(rest[2:]))
    if scheme.lower() != "s3" or not rest.startswith("//"):
        raise HeliostatError(
            f"{scheme}: is not a supported place: give s3://bucket/prefix or a directory"
        )
    bucket, _, prefix = rest[2:].rstrip("/").partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", bucket):
        shown = "what follows s3://" if re.search("[@:]", bucket) else repr(bucket)
        raise HeliostatError(  # which may be a secret, even a part of one: a secret can hold a "/"
            f"{shown} is not a bucket name: give s3://bucket/prefix, and credentials only through "
            "the AWS variables or a profile"
        )
    return S3Store(f"s3://{join(bucket, check_key(prefix) if prefix else '')}")


def upload_folder(folder: Path, target: Store, report: Callable[[str], None]) -> tuple[int, int]:
    """Put every file below `folder` into `target`, its path the key; how many files and bytes.

    What is hidden (a name that starts with a dot) stays behind; `report` gets a line per thousand.

    Raises:
        HeliostatError: the folder has no files, a path that is not a key, or a file that cannot be
            read.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    keys = {path.relative_to(folder).as_posix(): path for path in paths}
    visible = {key: path for key, path in keys.items() if not re.search(r"(^|/)\.", key)}
    if not visible:
        raise HeliostatError(f"{folder} has no files to upload: give a folder with raw data")

    def put(key: str) -> int:
        path = visible[key]
        try:
            target.upload(key, path)
            return path.stat().st_size
        except OSError as error:
            raise HeliostatError(
                f"cannot read {path}: {error.strerror}: make it readable or remove it, and upload "
                "the folder again"
            ) from error

    total_bytes = 0
    with ThreadPoolExecutor(8) as threads:
        for done, size_bytes in enumerate(threads.map(put, visible), start=1):
            total_bytes += size_bytes
            if done % 1000 == 0:
                report(f"{done:,} of {len(visible):,} files")
    return len(visible), total_bytes


def probe(store: Store) -> None:
    """Write, read and delete one object, and check that a taken key cannot be created again.

    Raises:
        HeliostatError: within seconds, saying which of endpoint, credentials, clock, bucket,
            region and permission is wrong and what to change.
    """
    quick = dataclasses.replace(store, retry=QUICK) if isinstance(store, S3Store) else store
    key = f".heliostat-probe-{secrets.token_hex(8)}"
    next(quick.list(key), None)  # some servers would create a missing bucket on the first write
    quick.create(key, b"probe")
    try:
        if quick.read(key) != b"probe":
            raise HeliostatError(f"{store.uri} gives back other bytes than were written")
        with contextlib.suppress(Conflict):
            quick.create(key, b"probe")
            raise HeliostatError(
                f"{store.uri} ignores conditional writes (If-None-Match), so two writers could "
                "overwrite each other: use a server that supports them, such as AWS S3"
            )
    finally:
        quick.delete(key)

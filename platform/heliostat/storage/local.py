"""Objects in a local directory: files that get their names whole and under a lock."""

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from heliostat.errors import HeliostatError
from heliostat.storage.entry import HIDDEN, Conflict, Entry, Missing, check_key, join

GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class LocalStore:
    """A directory and all below it; the etag is a file's inode, time and size, not its bytes.

    Racing writers must share one file system whose locks work.
    """

    uri: str

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        with self.open(key) as file:
            file.seek(offset)
            count = file.readinto(data)  # type: ignore[attr-defined]  # a BinaryIO of open has it
        if count != length:
            raise HeliostatError(f"cannot read {self.uri}/{key}: it ends before {offset + length}")
        return data

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with _refusals_explained(path):
            try:
                return path.open("rb")
            except GONE as error:
                raise Missing(f"cannot read {path}: there is no such object") from error

    def write(self, key: str, data: bytes) -> str:
        return self._publish(key, io.BytesIO(data), os.replace)

    def upload(self, key: str, path: Path) -> str:
        with path.open("rb") as source:
            return self._publish(key, source, os.replace)

    def create(self, key: str, data: bytes) -> str:
        def claim(temporary: str, path: Path) -> None:
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise Conflict(f"{self.uri}/{key}") from error

        return self._publish(key, io.BytesIO(data), claim)

    def replace(self, key: str, data: bytes, etag: str) -> str:
        def swap(temporary: str, path: Path) -> None:
            entry = self.stat(key)
            if not entry or entry.etag != etag:
                raise Conflict(f"{self.uri}/{key}")
            os.replace(temporary, path)

        return self._publish(key, io.BytesIO(data), swap)

    def stat(self, key: str) -> Entry | None:
        try:
            with self.open(key) as file:
                return _describe(key, file.fileno())
        except Missing:
            return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Holds all keys below `prefix`; follows symbolic links."""
        with _refusals_explained(Path(self.uri)):
            keys = sorted(self._keys(prefix))
        return (entry for entry in map(self.stat, keys) if entry)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _refusals_explained(path), contextlib.suppress(*GONE), _locked(path.parent):
            path.unlink()

    def _path(self, key: str) -> Path:
        if ".." in key.split("/") or "\0" in key:
            raise Missing(f"cannot read {key[:100]!r}: there is no such object")
        return Path(f"{self.uri}/{key}")

    def _publish(self, key: str, source: BinaryIO, place: Callable[[str, Path], None]) -> str:
        """Copy `source` to a hidden file, then let `place` give it its name under the lock."""
        path = self._path(check_key(key))
        with _refusals_explained(path):
            _make_private(path.parent)
            handle, temporary = tempfile.mkstemp(prefix=HIDDEN, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    shutil.copyfileobj(source, file)
                    file.flush()
                    # The kernel's own time can be coarse, and a freed inode is soon used again.
                    os.utime(handle, ns=(time.time_ns(),) * 2)
                    os.fsync(handle)
                    etag = _describe(key, handle).etag
                with _locked(path.parent):
                    place(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        return etag

    def _keys(self, prefix: str) -> Iterator[str]:
        for directory, folders, files in os.walk(self.uri, onerror=_unless_gone, followlinks=True):
            base = directory.removeprefix(self.uri).lstrip("/")
            folders[:] = [name for name in folders if _meet(join(base, name) + "/", prefix)]
            for name in folders:
                _refuse_loop(Path(directory, name))
            for name in files:
                key, is_file = join(base, name), os.path.isfile(f"{directory}/{name}")
                if is_file and key.startswith(prefix) and not name.startswith(HIDDEN):
                    yield key


def _meet(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


def _refuse_loop(folder: Path) -> None:
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        raise HeliostatError(f"the symbolic link {folder} leads back to itself: remove it")


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, GONE):
        raise error


def _describe(key: str, handle: int) -> Entry:
    state = os.fstat(handle)
    etag = f"{state.st_ino:x}-{state.st_mtime_ns:x}-{state.st_size:x}"
    return Entry(key, state.st_size, etag)


def _make_private(directory: Path) -> None:
    if not directory.is_dir():
        _make_private(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory / f"{HIDDEN}-lock", os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(handle):
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _refusals_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HeliostatError(
            f"cannot use {path}: {error.strerror}: choose a directory that this user can read "
            "and write, with free space, and no file in place of a folder"
        ) from error

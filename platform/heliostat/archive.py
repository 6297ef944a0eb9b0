"""The installed package as one content-addressed archive, so that replicas outlive their job."""

import hashlib
import io
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import heliostat
from heliostat.storage import Conflict, Store

TOP = "code"
PACKAGE_SUFFIXES = {".py", ".typed"}
EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time that a zip can hold


def pack() -> bytes:
    """A zip of this package under `code/heliostat/`: the same files give the same bytes."""
    return zip_package(Path(str(files(heliostat))))


def zip_package(folder: Path) -> bytes:
    """A zip of the Python package in `folder` under `code/NAME/`, without caches and stray files.

    Nothing is compressed: deflate's bytes differ between zlib builds, and the hash with them.
    """
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as target:
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts):
            if path.suffix in PACKAGE_SUFFIXES and path.is_file():
                name = f"{TOP}/{folder.name}/{path.relative_to(folder).as_posix()}"
                entry = ZipInfo(name, EPOCH)
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                target.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def store_code(store: Store) -> str:
    """Keep the archive at `code/SHA256.zip` and return its SHA-256 (hex)."""
    data = pack()
    sha256 = hashlib.sha256(data).hexdigest()
    with suppress(Conflict):
        store.create(f"{TOP}/{sha256}.zip", data)
    return sha256

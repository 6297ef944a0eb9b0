"""What of a directory goes to the cluster with a job, what stays here, and how large that is."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.errors import HeliostatError

# In the patterns of .gitignore, as Ray takes them. `jobs/runtime_env.yaml` has the same, for those
# who submit without Heliostat; a test compares.
CACHES = (
    ".git/",
    ".venv/",
    "venv/",
    ".heliostat/",
    "**/__pycache__/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    "node_modules/",
)
SECRETS = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "credentials",
    "credentials.*",
    "service-account*.json",
    ".netrc",
    ".pypirc",
    ".npmrc",
    ".aws/",
    ".ssh/",
    ".kube/",
    "ray-token",
    "store-keys.json",
)
# Ray's dashboard takes no larger request; `ray` has it as DASHBOARD_CLIENT_MAX_SIZE.
LIMIT_BYTES = 100 * 2**20
# What a zip without compression, as Ray makes it, adds to each file and once.
ENTRY_BYTES, END_BYTES = 30 + 46, 22
NAMED = 5
KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class File:
    """A file below a directory: its path there and its size in bytes."""

    path: str
    size_bytes: int


@dataclass(frozen=True)
class Package:
    """What is uploaded of `folder` as one archive, and which files stay because of their names."""

    folder: str
    files: tuple[File, ...]
    withheld: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of the archive."""
        return END_BYTES + sum(
            file.size_bytes + ENTRY_BYTES + 2 * len(file.path.encode()) for file in self.files
        )

    def check(self, limit_bytes: int = LIMIT_BYTES) -> None:
        """Raises HeliostatError if it is too large; names what is the largest."""
        if self.size_bytes <= limit_bytes:
            return
        largest = ", ".join(
            f"{name} {size(bytes_)}" for name, bytes_ in sum_entries(self.files)[:NAMED]
        )
        raise HeliostatError(
            f"{self.folder} is {size(self.size_bytes)} to upload, and Ray takes at most "
            f"{size(limit_bytes)}: list what the job does not need in .rayignore or in the "
            f"excludes of its runtime environment, and keep data in the bucket; the largest are "
            f"{largest}"
        )

    def require(self, path: str) -> None:
        """Raises HeliostatError if the job would not find `path`."""
        if not any(file.path == path for file in self.files):
            raise HeliostatError(
                f"{path} would not be uploaded: take it out of .gitignore, .rayignore and the "
                "excludes of the runtime environment"
            )


def pack(folder: Path, excludes: Sequence[str]) -> Package:
    """What Ray uploads of `folder`, by its own walk: it reads .gitignore and .rayignore as well.

    Raises:
        HeliostatError: it is no directory, or one that cannot be read.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging
    from ray._private.thirdparty.pathspec import PathSpec

    if not folder.is_dir():
        raise HeliostatError(f"{folder} is to be uploaded, and there is no such directory")
    harmless = [pattern for pattern in excludes if pattern not in SECRETS]
    skipped = packaging._get_excludes(folder, [*get_runtime_env_default_excludes(), *harmless])
    found: list[File] = []

    def keep(path: Path) -> None:
        if path.is_file():
            found.append(File(path.relative_to(folder).as_posix(), path.stat().st_size))

    try:
        quiet = logging.Logger("upload", logging.ERROR)
        packaging._dir_travel(folder, [skipped], keep, include_gitignore=True, logger=quiet)
    except OSError as error:
        raise HeliostatError(
            f"cannot read {error.filename}: {error.strerror}: make it readable, or list it in "
            ".rayignore"
        ) from error
    secret = PathSpec.from_lines("gitwildmatch", [*(set(excludes) & set(SECRETS))]).match_file
    kept = sorted((file for file in found if not secret(file.path)), key=lambda file: file.path)
    withheld = sorted(file.path for file in found if secret(file.path))
    return Package(str(folder), tuple(kept), tuple(withheld))


def sum_entries(files: Iterable[File]) -> list[tuple[str, int]]:
    """The entries of the directory that `files` lie below, with all their bytes, largest first."""
    sums: dict[str, int] = {}
    for file in files:
        top, slash, _ = file.path.partition("/")
        sums[top + slash] = sums.get(top + slash, 0) + file.size_bytes
    return sorted(sums.items(), key=lambda item: (-item[1], item[0]))


def size(bytes_: int) -> str:
    """`1.5 MiB`, `12 KiB`."""
    return f"{bytes_ / MIB:.1f} MiB" if bytes_ >= MIB else f"{-(-bytes_ // KIB)} KiB"

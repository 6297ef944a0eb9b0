"""What of a directory is uploaded: what Ray makes of it byte for byte, no secrets, no caches."""

from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package

from heliostat.errors import HeliostatError
from heliostat.submission import upload
from heliostat.submission.upload import CACHES, SECRETS, pack

EXCLUDES = [*CACHES, *SECRETS]
KEPT = ["jobs/train.py", "notes é.md", "spec.yaml", "keys.py", "environment.yaml"]
CACHED = [".git/config", ".venv/lib/x.py", "a/__pycache__/x.pyc", ".mypy_cache/x", "node_modules/x"]
SECRET = [
    *(".env", "deep/.env.local", "tls/edge.pem", "id_rsa", "id_ed25519.pub", ".aws/credentials"),
    *("credentials.json", "service-account-1.json", "x.key", ".ssh/config", "home/ray-token"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*KEPT, *CACHED, *SECRET, "ignored/big.bin"):
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 10)
    (tmp_path / "work/.gitignore").write_text("ignored/\n")
    return tmp_path / "work"


def test_secrets_and_caches_stay_and_secrets_are_named(folder: Path) -> None:
    package = pack(folder, EXCLUDES)
    assert {file.path for file in package.files} == {*KEPT, ".gitignore"}
    assert {*package.withheld} == {*SECRET}


def test_it_is_what_ray_uploads_to_the_byte(folder: Path, tmp_path: Path) -> None:
    package = pack(folder, EXCLUDES)
    archive = tmp_path / "package.zip"
    create_package(str(folder), archive, include_gitignore=True, excludes=EXCLUDES)
    with ZipFile(archive) as found:
        assert {name for name in found.namelist() if not name.endswith("/")} == {
            file.path for file in package.files
        }
    empty = [name for name in ZipFile(archive).namelist() if name.endswith("/")]
    folders_bytes = sum(upload.ENTRY_BYTES + 2 * len(name) for name in empty)
    assert archive.stat().st_size == package.size_bytes + folders_bytes


def test_what_is_too_large_is_refused_by_its_largest_entries(folder: Path) -> None:
    (folder / "data").mkdir()
    for name in ("a", "b"):
        (folder / f"data/{name}").write_bytes(bytes(3 * 2**20))
    (folder / "model.bin").write_bytes(bytes(2 * 2**20))
    package = pack(folder, EXCLUDES)
    package.check()
    with pytest.raises(HeliostatError, match=r"8\.0 MiB to upload.*data/ 6\.0 MiB, model\.bin 2"):
        package.check(limit_bytes=5 * 2**20)


def test_a_job_that_would_not_be_uploaded_is_refused(folder: Path) -> None:
    package = pack(folder, EXCLUDES)
    package.require("jobs/train.py")
    with pytest.raises(HeliostatError, match=r"ignored/big\.bin would not be uploaded"):
        package.require("ignored/big.bin")


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeliostatError, match="there is no such directory"):
        pack(tmp_path / "none", EXCLUDES)

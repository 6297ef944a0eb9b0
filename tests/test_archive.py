"""Laws of the code archive: the same package gives the same bytes, and they run anywhere."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

import heliostat
from heliostat import archive
from heliostat.storage import connect

PACKAGE = Path(heliostat.__file__).parent
DIGEST = (
    "import hashlib; from heliostat import archive; "
    "print(hashlib.sha256(archive.pack()).hexdigest())"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package copied to another folder, as an installation or `py_modules` does."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "elsewhere" / "heliostat", ignore=ignore))


def run_python(program: str, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment, cwd=path, check=True, capture_output=True, text=True
    ).stdout.strip()


def touch_everything(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o755)


def add_strays(folder: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"cache")
    for name in ("notes.txt", ".spec.py.swp", "core", "key.pem", "spec.py~"):
        (folder / name).write_bytes(b"stray")


@pytest.mark.parametrize("disturb", [touch_everything, add_strays])
def test_only_the_source_decides_the_bytes(copy: Path, disturb: Callable[[Path], None]) -> None:
    before = archive.zip_package(copy)
    disturb(copy)
    assert archive.zip_package(copy) == before


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_changed_source_changes_the_bytes(copy: Path, change: str) -> None:
    before = archive.zip_package(copy)
    errors = copy / "errors.py"
    match change:
        case "edit":
            errors.write_bytes(errors.read_bytes() + b"\n")
        case "add":
            (copy / "new.py").touch()
        case "remove":
            errors.unlink()
        case "rename":
            errors.rename(copy / "faults.py")
    assert archive.zip_package(copy) != before


def test_the_archive_holds_the_package_below_one_folder() -> None:
    with zipfile.ZipFile(BytesIO(archive.pack())) as source:
        names = source.namelist()
        assert source.read("code/heliostat/archive.py") == (PACKAGE / "archive.py").read_bytes()
    assert len(names) == len(set(names))
    assert {"/".join(name.split("/")[:2]) for name in names} == {"code/heliostat"}
    assert {Path(name).suffix for name in names} <= {".py", ".typed"}
    assert {"code/heliostat/__init__.py", "code/heliostat/data/__init__.py"} <= set(names)


def test_a_copied_package_archives_itself(copy: Path) -> None:
    digest = run_python(DIGEST, copy.parent)
    assert digest == hashlib.sha256(archive.zip_package(copy)).hexdigest()
    (copy / "extra.py").write_text("")
    assert run_python(DIGEST, copy.parent) != digest


def test_ray_unpacks_what_it_can_import(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import unzip_package

    package, target = tmp_path / "package.zip", tmp_path / "unpacked"
    package.write_bytes(archive.pack())
    unzip_package(str(package), str(target), remove_top_level_directory=True, unlink_zip=False)
    where = run_python("import heliostat.registry; print(heliostat.registry.__file__)", target)
    assert where == str(target / "heliostat" / "registry.py")


def test_code_is_stored_once_under_its_hash(bucket: str) -> None:
    store = connect(bucket)
    sha256 = archive.store_code(store)
    assert archive.store_code(store) == sha256
    assert hashlib.sha256(store.read(f"code/{sha256}.zip")).hexdigest() == sha256
    assert [entry.key for entry in store.list()] == [f"code/{sha256}.zip"]

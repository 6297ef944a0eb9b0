"""What is asked of Ray for one job, and the `ray job submit` command that asks the same."""

import json
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from heliostat.errors import HeliostatError
from heliostat.submission.upload import CACHES, SECRETS

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
JOBS = "jobs"
RUNTIME_ENV = "runtime_env.yaml"
# Words of a key that names a credential; where two stand together, both in this order.
SWITCHES = ("true", "false")  # `deploy.auth=false` says whether, not what
CREDENTIAL_WORDS = re.compile(
    r"passw|secret|credential|passphrase"
    r"|(^|[^a-z])(token|auth)([^a-z]|$)"
    r"|(api|access|private|signing|account|encryption)[^a-z]?key"
)
# A key that ends like this says where a credential lies, not what it is.
REFERENCE = re.compile(r"(_path|_file|_name|_arn|_mode)$")
# What credentials look like, whatever they are called.
CREDENTIALS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhs_[0-9a-f]{16}_[0-9a-f]{64}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z0-9]{30,}\b|://[^/\s:@]+:[^/\s@]+@"
)


@dataclass(frozen=True)
class Order:
    """One job: `environment` is its runtime environment without the working directory.

    `environment_file` is the file that says exactly that, if one does.
    """

    id: str
    entrypoint: tuple[str, ...]
    environment: Mapping[str, Any]
    environment_file: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 0.0
    gpus: float = 0.0
    working_dir: str = "."

    def list_words(self) -> list[str]:
        """The command that submits the same job without Heliostat, as its words."""
        options = ["--submission-id", self.id, "--working-dir", self.working_dir]
        if self.environment_file:
            options += ["--runtime-env", self.environment_file]
        elif self.environment:
            options += ["--runtime-env-json", json.dumps(self.environment)]
        if self.metadata:
            options += ["--metadata-json", json.dumps(self.metadata)]
        resources = {"--entrypoint-num-cpus": self.cpus, "--entrypoint-num-gpus": self.gpus}
        for name, amount in resources.items():
            options += [name, f"{amount:g}"] if amount else []
        return ["ray", "job", "submit", *options, "--", *self.entrypoint]

    def render(self) -> str:
        return shlex.join(self.list_words())


def find_job(name: str, folder: Path) -> str:
    """The path below `folder` of the job `name`: a file, or the stem of one in `jobs`.

    Raises:
        HeliostatError: there is no such job; names those that there are.
    """
    for path in (folder / name, folder / JOBS / f"{name}.py"):
        if path.suffix == ".py" and path.is_file():
            return _place(path, folder)
    known = ", ".join(sorted(path.stem for path in (folder / JOBS).glob("*.py"))) or "no file"
    raise HeliostatError(
        f"there is no job {name!r:.80} in {folder}: give a Python file below this directory, or "
        f"one of {JOBS}/ by its name ({known})"
    )


def find_spec(name: str, folder: Path) -> str:
    """Raises HeliostatError: no such file, or one that is not below `folder`, which is uploaded."""
    if not (folder / name).is_file():
        raise HeliostatError(f"cannot read the spec {name}: there is no such file in {folder}")
    return _place(folder / name, folder)


def name_job(job: str, name: str) -> str:
    """`train-digits-1f2e3d4c`: what is done to what, and something that makes it new."""
    return f"{Path(job).stem}-{name}-{secrets.token_hex(4)}"


def check_id(name: str) -> str:
    """Raises HeliostatError if `name` cannot name a job in a shell, a file and a URL alike."""
    if not ID.fullmatch(name):
        raise HeliostatError(
            f"{name[:80]!r} cannot name a job: use up to 100 letters, digits, '_', '-' and '.', "
            "the first one a letter or digit"
        )
    return name


def read_environment(path: Path | None) -> tuple[dict[str, Any], bool]:
    """The runtime environment of a file without what must not be uploaded; whether the file says
    that itself.

    Raises:
        HeliostatError: it is no mapping of YAML, has a working directory of its own, or a key
            or a value that looks like a credential.
    """
    document = _parse(path) if path else {}
    if "working_dir" in document:
        raise HeliostatError(
            f"{path} has a working_dir, but a job runs in the directory that it is submitted "
            "from: take it out"
        )
    refuse_credentials(document, str(path))
    given = document.get("excludes") or []
    missing = [pattern for pattern in (*CACHES, *SECRETS) if pattern not in given]
    return (document | {"excludes": [*given, *missing]} if missing else document), not missing


def refuse_credentials(document: Any, origin: str) -> None:
    """Raises HeliostatError if a key or value below `document` looks like a credential."""
    for path, value in _walk(document):
        key = path.rpartition(".")[2].lower()
        named = CREDENTIAL_WORDS.search(key) and not REFERENCE.search(key)
        named = named and value.lower() not in SWITCHES
        if value and (named or CREDENTIALS.search(value)):
            raise HeliostatError(
                f"{origin}: {path} looks like a credential, and Ray shows a job's environment and "
                "command in its API, its logs and the list of processes: give the nodes a role, "
                "or name a file that only they have"
            )


def _walk(document: Any, path: str = "") -> Iterator[tuple[str, str]]:
    match document:
        case Mapping():
            for key, value in document.items():
                yield from _walk(value, f"{path}.{key}".lstrip("."))
        case list() | tuple():
            for value in document:
                yield from _walk(value, path)
        case None:
            return
        case _:
            yield path, str(document)


def _parse(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise HeliostatError(f"cannot read the runtime environment {path}: {reason}") from error
    if not isinstance(document, dict | None):
        raise HeliostatError(f"{path} must be a mapping, as {JOBS}/{RUNTIME_ENV} is")
    return document or {}


def _place(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError as error:
        raise HeliostatError(
            f"{path} is not below {folder}, which is what a job has of this machine: submit from "
            "a directory that holds it"
        ) from error

"""A home directory: the secrets, the state, the objects and the logs of one laptop cluster."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from heliostat.environment import MachineBounds, Ports
from heliostat.errors import HeliostatError
from heliostat.pools import ClusterSpec

MARKER_FILE = ".heliostat-home"


@dataclass(frozen=True)
class Home:
    """The directory at `path`, which need not exist yet."""

    path: Path

    @property
    def exists(self) -> bool:
        return (self.path / MARKER_FILE).is_file()

    @property
    def token(self) -> Path:
        return self.path / "ray-token"

    @property
    def store_keys(self) -> Path:
        return self.path / "store-keys.json"

    @property
    def store_config(self) -> Path:
        return self.path / "s3.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def capacity(self) -> Path:
        """How many machines there are for the autoscaler to take, if somebody wrote it down."""
        return self.path / "capacity.json"

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def store_log(self) -> Path:
        return self.logs / "store.log"

    @property
    def ray_log(self) -> Path:
        return self.logs / "ray-start.log"

    @property
    def serve_log(self) -> Path:
        return self.logs / "serve-start.log"

    @property
    def nodes_log(self) -> Path:
        """Which nodes the autoscaler asked for, when they joined and when they went."""
        return self.logs / "nodes.log"

    @property
    def edge_log(self) -> Path:
        return self.logs / "edge.log"

    @property
    def session_logs(self) -> Path:
        return self.logs / "ray"


@dataclass(frozen=True)
class Listen:
    """The address of the edge, the one part that others may reach, and its TLS certificate."""

    host: str = "127.0.0.1"
    certificate: str | None = None


@dataclass(frozen=True)
class State:
    """What `up` decided: the marker of its processes, their ports, bounds and scratch directory.

    With `pools` the head brings nodes and lets them go.
    """

    instance: str
    ports: Ports
    bounds: MachineBounds
    scratch: Path
    listen: Listen = Listen()
    pools: ClusterSpec | None = None

    def marker(self, part: str) -> str:
        """What the processes of a part carry and nobody else does."""
        return f"{self.instance}.{part}"

    @property
    def ray_directory(self) -> Path:
        """Where Ray keeps its sessions: it opens the directory to everybody, `scratch` is ours."""
        return self.scratch / "r"


@dataclass(frozen=True, repr=False)
class StoreKeys:
    """The credentials of the S3 store and the keys that guard its inner ports."""

    access_key: str
    secret_key: str
    jwt_write: str
    jwt_filer_write: str
    jwt_filer_read: str


def locate(path: str | Path | None = None) -> Home:
    """The home at `path`, else at HELIOSTAT_HOME, else at ~/.heliostat."""
    chosen = path or os.environ.get("HELIOSTAT_HOME") or "~/.heliostat"
    return Home(Path(chosen).expanduser().absolute())


def furnish(home: Home) -> None:
    """Make `home` with its secrets, all of it private to this user; what is there stays.

    Raises:
        HeliostatError: the directory holds something else, or others can read a secret.
    """
    if not home.exists and home.path.is_dir() and any(home.path.iterdir()):
        raise HeliostatError(
            f"{home.path} is neither empty nor a Heliostat home (it has no {MARKER_FILE} file): "
            f"choose another directory with --home"
        )
    try:
        for directory in (home.path, home.objects, home.logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
    except OSError as error:
        raise HeliostatError(
            f"cannot make the home {home.path}: {error.strerror}; choose another with --home"
        ) from error
    if not home.exists:
        write_private(home.path / MARKER_FILE, "A home of Heliostat.\n")
    if not home.token.exists():
        write_private(home.token, secrets.token_hex(32))
    if not home.store_keys.exists():
        write_private(home.store_keys, json.dumps(asdict(_make_store_keys())))
    for secret in (home.token, home.store_keys):
        _check_private(secret)


def read_store_keys(home: Home) -> StoreKeys:
    return StoreKeys(**json.loads(home.store_keys.read_text()))


def read_state(home: Home) -> State | None:
    """The state that `up` left, or None; a file that holds no state counts as none."""
    try:
        document = json.loads(home.state.read_text())
        return State(
            document["instance"],
            Ports(**document["ports"]),
            MachineBounds(**document["bounds"]),
            Path(document["scratch"]),
            Listen(**document["listen"]),
            ClusterSpec.model_validate(document["pools"]) if document.get("pools") else None,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def write_state(home: Home, state: State) -> None:
    pools = state.pools.model_dump(mode="json") if state.pools else None
    document = asdict(state) | {"pools": pools}
    write_private(home.state, json.dumps(document, indent=2, default=str))


def write_private(path: Path, text: str) -> None:
    """Write `path` whole or not at all, readable by this user only from its first byte."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


@contextmanager
def lock(home: Home) -> Iterator[None]:
    """Hold `home` alone: a second `up` or `down` waits until the first is done."""
    with (home.path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_store_keys() -> StoreKeys:
    return StoreKeys(**{field.name: secrets.token_hex(24) for field in fields(StoreKeys)})


def _check_private(path: Path) -> None:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise HeliostatError(
            f"{path} has mode {mode:04o}, so others can read the secret in it: "
            f"delete the file to get a new secret, or `chmod 600` it"
        )

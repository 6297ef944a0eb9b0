"""API keys: who may ask which models for what, and how much; of the secret only a hash is kept."""

import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from secrets import compare_digest
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from heliostat.errors import HeliostatError
from heliostat.spec import Positive, PositiveFloat, Section, check_name
from heliostat.storage import Conflict, Entry, Missing, Store

logger = logging.getLogger(__name__)

PREFIX = "keys/"
ID = "[0-9a-f]{16}"
RECORD_KEY = re.compile(rf"{PREFIX}({ID})\.json")
TOKEN = re.compile(rf"hs_({ID})_([0-9a-f]{{64}})")
NAMED = re.compile(rf"(?:hs_)?({ID})(?:_[0-9a-f]{{64}})?")
ANY = "*"
VERBS = ("predict", "generate", "explain", "read")
MAX_OWNER_CHARS = 200
MAX_DAYS = 36_500
REFRESH_SECONDS = 5.0  # how long a new or a revoked key may go unnoticed, and one request more

Unit = Literal["requests", "tokens", "rows"]
Owner = Annotated[str, Field(min_length=1, max_length=MAX_OWNER_CHARS)]


class Limits(Section):
    """What a key may use; what is None has no limit. A month is one of the calendar, in UTC."""

    requests_per_second: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    tokens_per_month: Positive | None = None
    rows_per_month: Positive | None = None


PERIODS: Mapping[str, tuple[Unit, float | None]] = {
    "requests_per_second": ("requests", 1.0),
    "tokens_per_minute": ("tokens", 60.0),
    "tokens_per_month": ("tokens", None),
    "rows_per_month": ("rows", None),
}


@dataclass(frozen=True)
class Allowance:
    """`units` of `unit` in every `seconds`, or in a calendar month where that is None."""

    key_id: str
    name: str
    unit: Unit
    units: float
    seconds: float | None

    @cached_property
    def account(self) -> str:
        return f"{self.key_id}/{self.name}"


class Key(Section):
    """The record of a key: `models` are names or `*`, `sha256` is the hash of its secret."""

    id: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    owner: Owner
    models: tuple[str, ...]
    verbs: tuple[str, ...]
    limits: Limits
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def may(self, verb: str, model: str | None = None) -> bool:
        """Whether it may do this, to this model if one is named."""
        return verb in self.verbs and (model is None or model in self.models or ANY in self.models)

    @cached_property
    def allowances(self) -> tuple[Allowance, ...]:
        return tuple(
            Allowance(self.id, name, unit, float(units), seconds)
            for name, (unit, seconds) in PERIODS.items()
            if (units := getattr(self.limits, name)) is not None
        )


def create(
    store: Store,
    owner: str,
    *,
    models: Sequence[str] = (ANY,),
    verbs: Sequence[str] = VERBS,
    days: float | None = None,
    limits: Limits | None = None,
) -> tuple[str, Key]:
    """Make a key: its token, which cannot be had a second time, and its record in the bucket.

    Raises:
        HeliostatError: the owner, a model, a verb or the number of days is not one.
    """
    check_owner(owner)
    for model in models:
        if model != ANY:
            check_name(model)
    for verb in verbs:
        if verb not in VERBS:
            raise HeliostatError(f"{verb[:80]!r} is not a verb: choose of {', '.join(VERBS)}")
    if days is not None and not 0 < days <= MAX_DAYS:
        raise HeliostatError(f"a key cannot live {days:g} days: give more than 0, to {MAX_DAYS:,}")
    now = datetime.now(UTC)
    secret = secrets.token_hex(32)
    key = Key(
        id=secrets.token_hex(8),
        sha256=hash_secret(secret).hex(),
        owner=owner,
        models=tuple(models),
        verbs=tuple(verbs),
        limits=limits or Limits(),
        created=now,
        expires=None if days is None else now + timedelta(days=days),
    )
    store.create(_record_key(key.id), _encode(key))
    return f"hs_{key.id}_{secret}", key


def check_owner(owner: str) -> None:
    """Raises HeliostatError if `owner` would not stay one line of a list or a log."""
    if not owner.strip() or len(owner) > MAX_OWNER_CHARS or not owner.isprintable():
        raise HeliostatError(
            f"{owner[:80]!r} is not an owner: give 1 to {MAX_OWNER_CHARS} printable characters, "
            "as a name or an address"
        )


def revoke(store: Store, name: str) -> Key:
    """End a key for good, named by its id (or the token itself); one that has ended stays so.

    Raises:
        HeliostatError: there is no such key.
    """
    match = NAMED.fullmatch(name)
    if not match:
        raise HeliostatError("that is not a key id: give the 16 digits after hs_")
    while True:
        entry = store.stat(_record_key(match[1]))
        key = _read(store, match[1]) if entry else None
        if entry is None or key is None:
            raise HeliostatError(
                f"there is no key {match[1]} in {store.uri}: `heliostat keys list` has those "
                "that there are"
            )
        if key.revoked:
            return key
        ended = key.model_copy(update={"revoked": datetime.now(UTC)})
        with suppress(Conflict):
            store.replace(entry.key, _encode(ended), entry.etag)
            return ended


def list_keys(store: Store) -> list[Key]:
    """All keys, the newest at the end."""
    ids = (match[1] for entry in store.list(PREFIX) if (match := RECORD_KEY.fullmatch(entry.key)))
    found = (_read(store, key_id) for key_id in ids)
    return sorted((key for key in found if key), key=lambda key: key.created)


def make_clock(
    wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
) -> Callable[[], float]:
    """Unix seconds that no one sets: the wall clock is read once, and time passes from there."""
    offset = wall() - monotonic()
    return lambda: monotonic() + offset


@dataclass(frozen=True)
class Held:
    """A key as it is looked up: `until` is in Unix seconds, 0 if it was revoked."""

    key: Key
    digest: bytes
    until: float


class Keyring:
    """The keys of a bucket as a replica knows them, looked up without asking the bucket.

    Who holds a key that is unknown waits as long for the answer as who guesses a secret.
    """

    def __init__(self, store: Store, clock: Callable[[], float] | None = None) -> None:
        self._store, self._clock = store, clock or make_clock()
        self._entries: dict[str, Entry] = {}
        self._held: dict[str, Held] = {}

    def find(self, token: str) -> Key | None:
        """The key of `token`, if it is one that is valid now."""
        match = TOKEN.fullmatch(token)
        key_id, secret = match.groups() if match else ("", "")
        held = self._held.get(key_id, NOBODY)
        same = compare_digest(hash_secret(secret), held.digest)
        return held.key if same and self._clock() < held.until else None

    def refresh(self) -> None:
        """Read what was written since the last time; a record that is damaged lets nobody in.

        Raises:
            HeliostatError: the bucket cannot be read; what is known stays as it is.
        """
        entries = {
            match[1]: entry
            for entry in self._store.list(PREFIX)
            if (match := RECORD_KEY.fullmatch(entry.key))
        }
        held = {key_id: self._held[key_id] for key_id in entries if key_id in self._held}
        for key_id, entry in entries.items():
            if self._entries.get(key_id) != entry:
                key = _read(self._store, key_id)
                held.pop(key_id, None)
                if key:
                    held[key_id] = _hold(key)
        self._held, self._entries = held, entries


def follow(ring: Keyring, seconds: float = REFRESH_SECONDS) -> Callable[[], None]:
    """Refresh `ring` for ever, beside what this process does; call what is returned to end it.

    While the bucket cannot be reached the known keys stay valid: nobody can revoke one either.
    """
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(seconds):
            try:
                ring.refresh()
            except HeliostatError as error:
                logger.warning("the keys are those of before: %s", error)

    threading.Thread(target=refresh, name="keys", daemon=True).start()
    return ended.set


def hash_secret(secret: str) -> bytes:
    """SHA-256: what is hashed has 256 random bits, so that a slow hash would protect nothing."""
    return hashlib.sha256(secret.encode()).digest()


def _hold(key: Key) -> Held:
    until = key.expires.timestamp() if key.expires else float("inf")
    return Held(key, bytes.fromhex(key.sha256), 0.0 if key.revoked else until)


def _read(store: Store, key_id: str) -> Key | None:
    """The record, None if it is gone or damaged."""
    try:
        key = Key.model_validate_json(store.read(_record_key(key_id)))
    except Missing:
        return None
    except ValidationError:
        logger.error("%s/%s is not the record of a key", store.uri, _record_key(key_id))
        return None
    return key if key.id == key_id else None


def _record_key(key_id: str) -> str:
    return f"{PREFIX}{key_id}.json"


def _encode(key: Key) -> bytes:
    return key.model_dump_json(indent=1).encode()


# Nobody's secret has the hash of zeros; whoever has no key is compared with it all the same.
NOBODY = Held(
    Key(
        id="",
        sha256="0" * 64,
        owner="nobody",
        models=(),
        verbs=(),
        limits=Limits(),
        created=datetime.fromtimestamp(0, UTC),
    ),
    bytes(32),
    0.0,
)

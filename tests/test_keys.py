"""Keys: shown once, looked up by id, over when they expire or are revoked, within a few seconds."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat import keys
from heliostat.errors import HeliostatError
from heliostat.keys import VERBS, Keyring, Limits, create, follow, list_keys, make_clock, revoke
from heliostat.spec import parse_options
from heliostat.storage import Store, connect


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock(datetime.now(UTC).timestamp())


@pytest.fixture
def ring(store: Store, clock: Clock) -> Keyring:
    return Keyring(store, clock)


def test_a_key_opens_from_the_refresh_after_it_was_made(store: Store, ring: Keyring) -> None:
    token, key = create(store, "ana")
    assert ring.find(token) is None
    ring.refresh()
    assert ring.find(token) == key


def test_the_secret_has_256_bits_and_is_nowhere_in_the_bucket(store: Store) -> None:
    token, key = create(store, "ana")
    secret = token.rpartition("_")[2]
    assert token == f"hs_{key.id}_{secret}"
    assert len(bytes.fromhex(secret)) == 32
    stored = b"".join(store.read(entry.key) for entry in store.list())
    assert secret.encode() not in stored
    assert key.sha256 not in repr(key)


def test_another_secret_id_or_shape_opens_nothing(store: Store, ring: Keyring) -> None:
    token, key = create(store, "ana")
    other, _ = create(store, "bob")
    ring.refresh()
    mixed = f"hs_{key.id}_{other.rpartition('_')[2]}"
    wrong = ["", "hs_", key.id, mixed, token + "0", token.upper(), f" {token}", token[:-1], "ä"]
    assert [ring.find(text) for text in wrong] == [None] * len(wrong)


@given(token=st.text(max_size=100))
def test_no_text_opens_an_empty_ring_or_breaks_it(token: str) -> None:
    assert Keyring(connect("/nonexistent"), Clock(0)).find(token) is None


def test_an_unknown_id_is_compared_as_a_known_one_is(
    store: Store, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = create(store, "ana")
    ring.refresh()
    compared: list[tuple[int, int]] = []

    def watch(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(keys, "compare_digest", watch)
    for token_id in (key.id, "0" * 16):
        assert ring.find(f"hs_{token_id}_{'0' * 64}") is None
    assert compared == [(32, 32)] * 2


def test_a_revoked_key_is_over_at_the_next_refresh_and_stays_so(
    store: Store, ring: Keyring
) -> None:
    token, key = create(store, "ana")
    ring.refresh()
    revoked = revoke(store, key.id)
    assert ring.find(token)
    ring.refresh()
    assert ring.find(token) is None
    assert revoke(store, token) == revoked == list_keys(store)[0]


def test_who_follows_the_bucket_hears_of_a_revocation_by_itself(
    store: Store, ring: Keyring, wait_until: Callable[..., None]
) -> None:
    assert keys.REFRESH_SECONDS <= 60
    token, key = create(store, "ana")
    stop = follow(ring, seconds=0.001)
    try:
        wait_until(lambda: ring.find(token))
        revoke(store, key.id)
        wait_until(lambda: ring.find(token) is None)
    finally:
        stop()


def test_a_key_that_is_deleted_is_over(store: Store, ring: Keyring) -> None:
    token, key = create(store, "ana")
    ring.refresh()
    store.delete(f"keys/{key.id}.json")
    ring.refresh()
    assert ring.find(token) is None


def test_a_key_expires(store: Store, ring: Keyring, clock: Clock) -> None:
    token, key = create(store, "ana", days=1)
    ring.refresh()
    assert key.expires
    clock.now = key.expires.timestamp() - 1
    assert ring.find(token)
    clock.now = key.expires.timestamp()
    assert ring.find(token) is None


@pytest.mark.parametrize("jump", [-3600.0, 3600.0, 10**9])
def test_a_wall_clock_that_jumps_expires_nothing(jump: float) -> None:
    wall, monotonic = Clock(1000.0), Clock(5.0)
    clock = make_clock(wall, monotonic)
    wall.now += jump
    monotonic.now += 2
    assert clock() == 1002


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: b"",
        lambda record: b"\xff",
        lambda record: json.dumps(record | {"sha256": "zz"}).encode(),
        lambda record: json.dumps(record | {"more": 1}).encode(),
        lambda record: json.dumps(record | {"id": "0" * 16}).encode(),
    ],
)
def test_a_damaged_record_lets_nobody_in_and_the_others_still(
    store: Store, ring: Keyring, damage: Callable[[dict[str, object]], bytes]
) -> None:
    token, key = create(store, "ana")
    other, _ = create(store, "bob")
    ring.refresh()
    name = f"keys/{key.id}.json"
    store.write(name, damage(json.loads(store.read(name))))
    ring.refresh()
    assert ring.find(token) is None
    assert ring.find(other)
    assert [found.owner for found in list_keys(store)] == ["bob"]


class Gone:
    """A bucket that cannot be reached."""

    uri = "s3://gone"

    def list(self, prefix: str = "") -> object:
        raise HeliostatError("unreachable")


def test_what_is_known_stays_while_the_bucket_is_away(
    store: Store, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, _ = create(store, "ana")
    ring.refresh()
    monkeypatch.setattr(ring, "_store", Gone())
    with pytest.raises(HeliostatError):
        ring.refresh()
    assert ring.find(token)


def test_a_key_may_what_its_scopes_name(store: Store) -> None:
    _, key = create(store, "ana", models=("digits",), verbs=("predict",))
    asked = {(verb, model): key.may(verb, model) for verb in VERBS for model in ("digits", "a")}
    assert [scope for scope, allowed in asked.items() if allowed] == [("predict", "digits")]
    _, key = create(store, "bob")
    assert all(key.may(verb, model) for verb in VERBS for model in ("digits", None))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"owner": ""}, "owner"),
        ({"owner": " "}, "owner"),
        ({"owner": "a\nb"}, "owner"),
        ({"owner": "\x1b[31m"}, "owner"),
        ({"owner": "x" * 300}, "owner"),
        ({"models": ("../x",)}, "name"),
        ({"models": ("",)}, "name"),
        ({"verbs": ("delete",)}, "verb"),
        ({"days": 0.0}, "days"),
        ({"days": -1.0}, "days"),
        ({"days": float("nan")}, "days"),
        ({"days": 1e9}, "days"),
    ],
)
def test_what_is_no_key_is_one_sentence(store: Store, change: dict[str, object], told: str) -> None:
    with pytest.raises(HeliostatError, match=told):
        create(store, **{"owner": "ana", **change})  # type: ignore[arg-type]
    assert list_keys(store) == []


@pytest.mark.parametrize("name", ["0" * 16, "", "../x", "0", "x" * 300])
def test_a_key_that_is_not_there_cannot_be_revoked(store: Store, name: str) -> None:
    with pytest.raises(HeliostatError, match="key"):
        revoke(store, name)


def test_only_limits_that_are_set_are_allowances(store: Store) -> None:
    _, key = create(store, "ana", limits=Limits(requests_per_second=2, rows_per_month=7))
    assert [(one.unit, one.units, one.seconds) for one in key.allowances] == [
        ("requests", 2.0, 1.0),
        ("rows", 7.0, None),
    ]


def test_a_limit_that_is_none_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(HeliostatError) as refused:
        parse_options(Limits, ("nope=3",))
    assert str(refused.value) == (
        "the command line: nope: unknown key, known are requests_per_second, tokens_per_minute, "
        "tokens_per_month, rows_per_month"
    )

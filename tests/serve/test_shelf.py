"""What a replica holds: never more than its bound, each version loaded once for all who wait."""

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploying import publish
from heliostat.errors import HeliostatError
from heliostat.registry import Version
from heliostat.serve.replica import Plan, fill_shelf, name_proof
from heliostat.serve.replies import Refusal
from heliostat.serve.shelf import Served, Shelf
from heliostat.storage import connect
from serving import TABLE, serve

NAMES = ("a", "b", "c", "d")
MODELS = {name: serve(name, TABLE, number) for number, name in enumerate(NAMES, start=1)}
SIZE = MODELS["a"].size


class Loader:
    """Counts what it loads; `broken` names are refused."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.broken: set[str] = set()

    def __call__(self, version: Version) -> Served:
        self.loads[version.name] += 1
        if version.name in self.broken:
            raise HeliostatError("the weights are damaged")
        return MODELS[version.name]


def make_shelf(loader: Loader, models: int) -> Shelf:
    versions = {name: [served.version] for name, served in MODELS.items()}
    return Shelf(versions, loader, models * SIZE)


@given(asked=st.lists(st.sampled_from(NAMES), max_size=20), room=st.integers(0, 4))
def test_those_asked_for_last_stay_within_the_bound(asked: list[str], room: int) -> None:
    async def run() -> None:
        kept: list[str] = []
        for name in asked:
            served = await shelf.get(name)
            assert served is MODELS[name]
            kept = [*(other for other in kept if other != name), name][-max(room, 1) :]
            assert shelf.loaded == [MODELS[other].version.ref for other in kept]

    shelf = make_shelf(Loader(), room)
    asyncio.run(run())


def test_all_who_ask_meanwhile_wait_for_one_load() -> None:
    loader = Loader()

    async def run() -> None:
        shelf = make_shelf(loader, 1)
        await asyncio.gather(*(shelf.get("a") for _ in range(10)))

    asyncio.run(run())
    assert loader.loads == {"a": 1}


def test_one_who_leaves_does_not_end_the_load_of_the_others() -> None:
    loading = threading.Event()

    def load(version: Version) -> Served:
        loading.wait()
        return MODELS[version.name]

    async def run() -> Served:
        shelf = Shelf({"a": [MODELS["a"].version]}, load, SIZE)
        leaving, staying = (asyncio.create_task(shelf.get("a")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        loading.set()
        return await staying

    assert asyncio.run(run()) is MODELS["a"]


def test_what_cannot_be_loaded_is_503_and_tried_again() -> None:
    loader = Loader()
    loader.broken.add("a")

    async def run() -> None:
        shelf = make_shelf(loader, 1)
        with pytest.raises(Refusal) as refused:
            await shelf.get("a")
        assert refused.value.status == 503
        assert "damaged" not in refused.value.message
        loader.broken.clear()
        assert await shelf.get("a") is MODELS["a"]

    asyncio.run(run())


@pytest.mark.parametrize(("name", "number"), [("x", None), ("a", 2), ("", 1)])
def test_what_is_not_served_is_404_with_one_text(name: str, number: int | None) -> None:
    with pytest.raises(Refusal, match=r"^there is no such model$") as refused:
        make_shelf(Loader(), 4).find(name, number)
    assert refused.value.status == 404


def test_filling_stops_where_the_room_ends() -> None:
    loader = Loader()
    shelf = make_shelf(loader, 2)
    shelf.fill()
    assert shelf.loaded == ["a:1", "b:2"]


def test_what_cannot_be_loaded_is_a_reason_not_to_begin_but_none_to_end() -> None:
    loader = Loader()
    loader.broken.add("a")
    shelf = make_shelf(loader, 2)
    with pytest.raises(HeliostatError, match="damaged"):
        shelf.fill()
    assert shelf.loaded == []
    shelf.fill(strict=False)
    assert shelf.loaded == ["b:2", "c:3"]


def test_a_replica_begins_again_without_what_was_damaged_since(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    versions = [publish(store, seed, name) for seed, name in enumerate(("letters", "digits"))]
    plan = Plan(
        root=store.uri,
        models={"letters": (1,), "digits": (1,)},
        max_latency_ms=None,
        max_model_bytes=2**30,
        max_body_bytes=2**20,
        max_requests=8,
        request_timeout_s=30,
        max_streams=4,
        max_context=None,
        vllm=None,
        gpus=0,
        auth=False,
        scales=False,
    )
    assert fill_shelf(plan).loaded == ["letters:1", "digits:1"]
    store.write(versions[0].weights_key, store.read(versions[0].weights_key)[:-1])
    with pytest.raises(HeliostatError, match="letters"):
        fill_shelf(plan)
    store.write(name_proof(plan.model_dump(mode="json")), b"")
    assert fill_shelf(plan).loaded == ["digits:1"]
    store.delete(versions[0].key)
    assert fill_shelf(plan).loaded == ["digits:1"]

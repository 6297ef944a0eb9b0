"""A published version becomes an engine, or is refused before it gets a request."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from heliostat import storage
from heliostat.data.tokens import store_tokenizer
from heliostat.errors import HeliostatError
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.language import Language, Room
from heliostat.serve.shelf import load
from heliostat.storage import Store
from writing import LENGTH, NETWORKS, SPECS, TOKENIZER, VOCABULARY, engine_of, make_engine, publish

POOL = ThreadPoolExecutor(1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = storage.connect(str(tmp_path))
    store_tokenizer(store, TOKENIZER)
    return store


def test_a_published_version_is_loaded_as_an_engine(store: Store) -> None:
    version = publish(store, NETWORKS["tied"].state_dict())
    loaded = load(store, version, Room(streams=2, context=32))
    assert isinstance(loaded, Language)
    ask = Ask((5, 6), 12, frozenset(), Sampling(0.0))
    assert engine_of(loaded).generate([ask]) == make_engine().generate([ask])
    assert loaded.context == 32
    assert load(store, version, Room()).size > loaded.size


def test_the_cache_is_part_of_the_size() -> None:
    sizes = [make_engine(slots=slots).decoder.size for slots in (1, 2, 3)]
    spec = SPECS["tied"]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == spec.layers * LENGTH * 2 * spec.width * 4


def test_a_version_that_computes_no_numbers_is_refused(store: Store) -> None:
    weights = NETWORKS["tied"].state_dict()
    loud = {name: torch.full_like(tensor, 3e38) for name, tensor in weights.items()}
    version = publish(store, loud)
    with pytest.raises(HeliostatError, match="rays:1 does not continue a text"):
        load(store, version, Room(streams=1))


def test_a_lost_tokenizer_is_refused(store: Store) -> None:
    version = publish(store, NETWORKS["tied"].state_dict())
    store.write(f"blobs/{VOCABULARY.sha256}", b"{}")
    with pytest.raises(HeliostatError, match="not the tokenizer that was stored"):
        load(store, version, Room(streams=1))

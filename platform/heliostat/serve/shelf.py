"""The versions that a replica answers for: loaded when asked for, within a bound of memory."""

import asyncio
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from heliostat import examples
from heliostat.data.features import BlockFeatures, features_from_json
from heliostat.errors import HeliostatError
from heliostat.evaluate import Predictor, embed, load_predictor, predict
from heliostat.registry import Version
from heliostat.serve.batcher import Batcher
from heliostat.serve.inputs import Interface
from heliostat.serve.language import Language, Room, load_language
from heliostat.serve.protocol import parse_body, render_predictions, zero_instance
from heliostat.serve.replies import JSON_TYPE, NO_MODEL, Refusal
from heliostat.storage import Store

logger = logging.getLogger(__name__)

# One thread computes at a time, so the event loop stays free and batches do not fight for cores.
# It wants the interpreter back after each operation: the event loop has it so long at most.
SWITCH_SECONDS = 0.0005
COMPUTE_POOL = ThreadPoolExecutor(
    1, "compute", initializer=partial(sys.setswitchinterval, SWITCH_SECONDS)
)
LOAD_POOL = ThreadPoolExecutor(1, "load")
MIB = 2**20


@dataclass(frozen=True)
class Served:
    """One version, loaded."""

    version: Version
    predictor: Predictor

    @cached_property
    def size(self) -> int:
        """Bytes of what the network keeps."""
        network = self.predictor.network
        tensors = (*network.parameters(), *network.buffers())
        return sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def batcher(self) -> Batcher:
        return Batcher(self.compute, COMPUTE_POOL)

    @cached_property
    def interface(self) -> Interface:
        return Interface(self.predictor.features, self.predictor.output)

    @cached_property
    def embedder(self) -> Batcher:
        return Batcher(partial(embed, self.predictor), COMPUTE_POOL)

    def compute(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return predict(self.predictor, columns)


Loaded = Served | Language
LoadText = Callable[[Store, Version, Room], Language]
OWN_ENGINE: LoadText = partial(load_language, pool=COMPUTE_POOL)


def load(
    store: Store,
    version: Version,
    room: Room,
    max_latency_ms: float | None = None,
    load_text: LoadText = OWN_ENGINE,
) -> Loaded:
    """Load a version and let it answer a row of zeros and its examples.

    `room` is for what continues texts, and `load_text` loads that.

    Raises:
        HeliostatError: its weights are missing or damaged, it does not answer, otherwise than it
            did when it was published, or takes longer for a row than `max_latency_ms`.
    """
    if isinstance(features_from_json(version.features), BlockFeatures):
        return load_text(store, version, room)
    served = Served(version, load_predictor(store, version))
    features, output = served.predictor.features, served.predictor.output
    body = to_json({"instances": [zero_instance(features)]})
    try:
        values = served.compute(parse_body(features, JSON_TYPE, body))
        render_predictions(version.name, version.number, output, values)
    except Refusal as refusal:
        raise HeliostatError(
            f"{version.ref} does not answer a row of zeros: {refusal}"
        ) from refusal
    seconds = examples.check(store, version, served.predictor)
    if seconds and max_latency_ms and 1000 * seconds > max_latency_ms:
        raise HeliostatError(
            f"{version.ref} takes {1000 * seconds:.1f} ms for a row, deploy.max_latency_ms allows "
            f"{max_latency_ms:g}: deploy a smaller model or raise it"
        )
    return served


class Shelf:
    """Of each name the versions that may be asked for, the first one if no number is given.

    What was asked for longest ago is dropped when the others exceed `max_bytes`; one always stays.
    """

    def __init__(
        self,
        models: Mapping[str, Sequence[Version]],
        load: Callable[[Version], Loaded],
        max_bytes: int,
        pool: Executor = LOAD_POOL,
    ) -> None:
        self.models = models
        self._load, self._max_bytes, self._pool = load, max_bytes, pool
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._loading: dict[str, asyncio.Future[Loaded]] = {}

    @property
    def loaded(self) -> list[str]:
        """The references of what is in memory, that used last at the end."""
        return list(self._loaded)

    def fill(self, strict: bool = True) -> None:
        """Load the first version of each name, as many as fit.

        Raises:
            HeliostatError: one of them cannot be loaded, if this is `strict`; else it is left to be
                tried again by who asks for it.
        """
        for first, *_ in self.models.values():
            try:
                served = self._read(first)
            except HeliostatError as error:
                if strict:
                    raise
                logger.error("%s cannot be loaded: %s", first.ref, error)
                continue
            if self._loaded and self.size + served.size > self._max_bytes:
                return
            self._keep(served)

    @property
    def size(self) -> int:
        return sum(served.size for served in self._loaded.values())

    def check(self) -> None:
        """Raises HeliostatError: what writes for a loaded version has ended."""
        for loaded in self._loaded.values():
            if isinstance(loaded, Language):
                loaded.runner.check()

    async def get(self, name: str, number: int | None = None) -> Served:
        """A version that answers rows, loaded now if it is not there.

        Raises:
            Refusal: 404, it is not among those that are served; 422, it continues texts; 503, it
                cannot be loaded.
        """
        loaded = await self._get(name, number)
        if isinstance(loaded, Served):
            return loaded
        message = f"{loaded.version.ref} continues texts: ask /v1/completions"
        raise Refusal(422, message, "model")

    async def get_language(self, name: str, number: int | None = None) -> Language:
        """A version that continues texts, else as `get`."""
        loaded = await self._get(name, number)
        if isinstance(loaded, Language):
            return loaded
        ref = loaded.version
        message = f"{ref.ref} does not continue texts: ask /v1/models/{ref.name}:predict"
        raise Refusal(422, message, "model")

    async def _get(self, name: str, number: int | None) -> Loaded:
        """All who ask while it is loaded wait for one load."""
        version = self.find(name, number)
        ref = version.ref
        if ref in self._loaded:
            self._loaded.move_to_end(ref)
            return self._loaded[ref]
        if ref not in self._loading:
            self._loading[ref] = asyncio.ensure_future(self._fetch(version))
        return await asyncio.shield(self._loading[ref])

    def find(self, name: str, number: int | None = None) -> Version:
        """Raises Refusal: 404, it is not among those that are served."""
        for version in self.models.get(name, ()):
            if number in (None, version.number):
                return version
        raise Refusal(404, NO_MODEL)

    async def _fetch(self, version: Version) -> Loaded:
        loop = asyncio.get_running_loop()
        try:
            served = await loop.run_in_executor(self._pool, self._read, version)
        except HeliostatError as error:
            logger.error("%s cannot be loaded: %s", version.ref, error)
            raise Refusal(503, f"{version.ref} cannot be loaded now, retry later") from error
        finally:
            del self._loading[version.ref]
        self._keep(served)
        return served

    def _read(self, version: Version) -> Loaded:
        began = time.perf_counter()
        served = self._load(version)
        seconds = time.perf_counter() - began
        logger.info("%s loaded: %.1f MiB in %.2f s", version.ref, served.size / MIB, seconds)
        return served

    def _keep(self, served: Loaded) -> None:
        self._loaded[served.version.ref] = served
        while self.size > self._max_bytes and len(self._loaded) > 1:
            ref, dropped = self._loaded.popitem(last=False)
            logger.info("%s dropped: %.1f MiB", ref, dropped.size / MIB)

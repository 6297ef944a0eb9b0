"""The processes that answer, as Ray Serve starts them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message

from heliostat import registry
from heliostat.errors import HeliostatError
from heliostat.serve.fork import Call, Fork, Side, replay
from heliostat.serve.load import Load
from heliostat.serve.table import Candidate
from heliostat.spec import Positive, Section, VllmSpec, digest
from heliostat.storage import connect

if TYPE_CHECKING:
    from heliostat.serve.door import Limits
    from heliostat.serve.shelf import Shelf


logger = logging.getLogger(__name__)


class Plan(Section):
    """What a replica needs to know; a change of it replaces the replicas."""

    root: str
    models: dict[str, tuple[Positive, ...]]
    max_latency_ms: float | None
    max_model_bytes: Positive
    max_body_bytes: Positive
    max_requests: Positive
    request_timeout_s: float
    max_streams: Positive
    max_context: Positive | None
    vllm: VllmSpec | None
    gpus: float
    auth: bool
    scales: bool


def name_proof(plan: Mapping[str, Any]) -> str:
    """The key of the object that a deploy writes once replicas of this plan, as JSON, run."""
    return f"serving/proven/{digest(plan)}"


def fill_shelf(plan: Plan) -> "Shelf":
    """The models of a plan, loaded as far as they fit.

    Where replicas of this plan have run before, what became of one model since then is no reason to
    be without the others: it answers 503, or 404 where nobody knows the version any more.

    Raises:
        HeliostatError: at the first time, a version is unknown or damaged, answers otherwise than
            its examples say, or too slowly.
    """
    from heliostat.serve.language import Room
    from heliostat.serve.shelf import OWN_ENGINE, Shelf, load
    from heliostat.serve.vllm import load_vllm

    store = connect(plan.root)
    strict = store.stat(name_proof(plan.model_dump(mode="json"))) is None
    models = {}
    for name, numbers in plan.models.items():
        try:
            models[name] = [registry.resolve(store, f"{name}:{number}") for number in numbers]
        except HeliostatError as error:
            if strict:
                raise
            logger.error("%s is not served: %s", name, error)
    room = Room(plan.max_streams, plan.max_context, plan.max_requests)
    load_text = OWN_ENGINE
    if plan.vllm:
        load_text = partial(load_vllm, settings=plan.vllm, gpus=int(plan.gpus))
    load_one = partial(
        load,
        store,
        room=room,
        max_latency_ms=plan.max_latency_ms if strict else None,
        load_text=load_text,
    )
    shelf = Shelf(models, load_one, plan.max_model_bytes)
    shelf.fill(strict)
    return shelf


def build_api(plan: Plan, shelf: "Shelf") -> ASGIApp:
    from heliostat.serve.app import build_app

    return build_app(shelf, find_limits(plan))


def find_limits(plan: Plan) -> "Limits":
    from heliostat.serve.door import Limits

    return Limits(plan.max_body_bytes, plan.max_requests, plan.request_timeout_s)


class Replica:
    """Answers for every model of a plan over HTTP, and lets candidates have their share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._candidates: dict[str, Candidate] = {}
        self._handles: dict[str, Any] = {}
        self._fork: Fork | None = None
        self._shelf: Shelf | None = None
        self._load: Load | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from heliostat.keys import Keyring, follow
        from heliostat.serve.desk import Desk
        from heliostat.serve.gate import Gate
        from heliostat.serve.identity import Identity
        from heliostat.serve.office import Line
        from heliostat.serve.presence import Presence
        from heliostat.serve.repeats import Repeats
        from heliostat.serve.scores import Reporter, find_board
        from heliostat.serve.wire import install

        plan, reporter = self.plan, Reporter()
        line = Line(plan.root)  # to an office that starts while the models are loaded

        def count(name: str, side: Side, tally: Any) -> None:
            if candidate := self._candidates.get(name):
                reporter.count(find_board(name, candidate.proposal), side, tally)

        patience_s = plan.request_timeout_s / 3
        self._shelf = fill_shelf(plan)
        api = build_api(plan, self._shelf)
        self._fork = Fork(api, self._ask, count, plan.max_body_bytes, patience_s)
        self._fork.candidates = self._candidates
        ring = Keyring(connect(plan.root))
        if plan.auth:
            ring.refresh()
            follow(ring)
        app = Repeats(self._fork, line, find_limits(plan))
        gate = Gate(app, ring.find if plan.auth else None, Desk(line.send))
        self._load = Load(gate) if plan.scales else None
        stop_serves_watch()
        install()
        return Presence(Identity(self._load or gate))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks a replica for that is one of a changing number."""
        return self._load.take() if self._load else {}

    def reconfigure(self, candidates: Mapping[str, Any]) -> None:
        """Which candidates there are now; Serve calls this with the deployment's user_config."""
        self._candidates = {
            name: Candidate.model_validate(candidate) for name, candidate in candidates.items()
        }
        if self._fork:
            self._fork.candidates = self._candidates

    def check_health(self) -> None:
        """Serve replaces a replica of which this raises."""
        if self._shelf:
            self._shelf.check()

    async def _ask(self, name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
        if name not in self._handles:
            handle = serve.get_app_handle(name_candidate(name))
            self._handles[name] = handle.options(stream=True)
        handle = self._handles[name]
        messages = handle.answer.remote(call)
        telling = asyncio.ensure_future(tell_left(handle, call, left))
        try:
            async for message in messages:
                yield message
        except BaseException:  # nobody wants the rest: Serve itself would not end it
            messages.cancel()
            raise
        finally:
            telling.cancel()


class Contender:
    """Answers for a candidate, to the replicas alone."""

    def __init__(self, plan: Plan) -> None:
        from heliostat.serve.presence import Presence

        self._shelf = fill_shelf(plan)
        self._api = Presence(build_api(plan, self._shelf))
        self._left: dict[str, asyncio.Event] = {}

    def check_health(self) -> None:
        self._shelf.check()

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        left = self._left[call.id] = asyncio.Event()
        try:
            async for message in replay(self._api, call, left):
                yield message
        finally:
            del self._left[call.id]

    async def leave(self, call_id: str) -> None:
        """End the call, of which the client has left: its answer says then what that took."""
        if call_id in self._left:
            self._left[call_id].set()


async def tell_left(handle: Any, call: Call, left: asyncio.Event) -> None:
    """Tell the candidate, once `left` is set; whichever process has the call ends it."""
    await left.wait()
    try:
        await handle.broadcast("leave", call.id).results_async(return_exceptions=True)
    except (RayError, RayServeException) as error:
        logger.warning("a candidate does not hear that a client left: %s", error)


def stop_serves_watch() -> None:
    """Serve watches in a task beside each request whether the client leaves, unless a header of the
    client says not to. `Presence` does that for less, and for everybody.
    """
    from ray.serve._private import replica

    assert replica.parse_disconnect_disabled_header
    replica.parse_disconnect_disabled_header = lambda headers: True


def name_candidate(name: str) -> str:
    """The Serve application of the candidate of a model."""
    return f"candidate-{name}"


def build_application(plan: Plan) -> serve.Application:
    """The Serve application of a plan; Serve calls this by its import path."""
    return _deployment(Replica.__name__, plan)(serve.ingress()(Replica)).bind(plan)


def build_candidate(plan: Plan) -> serve.Application:
    """The Serve application of a candidate, which has no route of its own."""
    return _deployment(Contender.__name__, plan)(Contender).bind(plan)


def _deployment(name: str, plan: Plan) -> Any:
    """The application's own door answers an overload before Serve's queue does. New replicas start
    beside the old ones, so replicas that cannot start are never an outage.
    """
    return serve.deployment(
        name=name,
        max_ongoing_requests=2 * plan.max_requests,
        max_queued_requests=plan.max_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=100,
        max_constructor_retry_count=2,
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=plan.request_timeout_s,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )

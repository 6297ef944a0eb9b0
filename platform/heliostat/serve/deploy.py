"""Puts versions on the cluster: one Serve application that serves what the bucket's table says."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from heliostat import registry
from heliostat.archive import store_code
from heliostat.data.features import BlockFeatures, features_from_json
from heliostat.errors import HeliostatError
from heliostat.spec import DeploySpec, Positive, RunSpec, Section, reference
from heliostat.storage import Conflict, Missing, Store, connect

APPLICATION = "heliostat"
TABLE_KEY = "serving/heliostat.json"
POLL_SECONDS = 0.5
REPORT_SECONDS = 5.0
MAX_REASON_CHARS = 600
HTTP_OPTIONS = {"host": "127.0.0.1", "port": 8000}
REASON = re.compile(r"^[\w.]+(?:Error|Exception|Missing): ", re.MULTILINE)


class Table(Section):
    """What is deployed: the version number of each model, and how all of them are served."""

    models: dict[str, Positive] = Field(default_factory=dict)
    deploy: DeploySpec = DeploySpec()
    code: str = ""


class Plan(Section):
    """What a replica needs to know; a change of it replaces the replicas."""

    root: str
    models: dict[str, Positive]
    max_model_bytes: Positive
    max_body_bytes: Positive
    max_requests: Positive
    request_timeout_s: float
    max_streams: Positive
    max_context: Positive | None


class Replica:
    """A process that loads every model of a plan and answers for them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __serve_build_asgi_app__(self) -> Starlette:
        from heliostat.serve.app import build_app
        from heliostat.serve.door import Limits
        from heliostat.serve.language import Room
        from heliostat.serve.shelf import Shelf, load

        plan, store = self.plan, connect(self.plan.root)
        models = {
            name: [registry.resolve(store, f"{name}:{number}")]
            for name, number in plan.models.items()
        }
        room = Room(plan.max_streams, plan.max_context, plan.max_requests)
        shelf = Shelf(models, partial(load, store, room=room), plan.max_model_bytes)
        shelf.fill()
        limits = Limits(plan.max_body_bytes, plan.max_requests, plan.request_timeout_s)
        return build_app(shelf, limits)


def build_application(plan: Plan) -> serve.Application:
    """The Serve application of a plan; Serve calls this by its import path.

    The application's own gate answers an overload before Serve's queue does. New replicas start
    beside the old ones, so replicas that cannot start are never an outage.
    """
    deployment = serve.deployment(
        name=Replica.__name__,
        max_ongoing_requests=2 * plan.max_requests,
        max_queued_requests=plan.max_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_surge_percent=100,
        max_constructor_retry_count=2,
        health_check_period_s=2,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=plan.request_timeout_s,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(serve.ingress()(Replica)).bind(plan)


class Serve:
    """The REST interface of Ray Serve; what goes wrong there is a sentence."""

    def __init__(self) -> None:
        with _told():
            self._client = ServeSubmissionClient(get_address_for_submission_client(None))

    def describe(self) -> dict[str, Any]:
        with _told():
            details: dict[str, Any] = self._client.get_serve_details()
        return details

    def apply(self, config: dict[str, Any]) -> None:
        with _told():
            self._client.deploy_applications(config)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, RayError) as error:  # not sent, not answered 200, not let in
        raise HeliostatError(
            f"Ray Serve cannot be reached or refuses ({error!s:.{MAX_REASON_CHARS}}): check that "
            "the cluster runs and that RAY_API_SERVER_ADDRESS is its dashboard"
        ) from error


def deploy(spec: RunSpec) -> str:
    """Serve the version that `spec` names in place of the one served so far; return its URL.

    Whatever ends this before the replicas run, Ctrl-C included, is taken back: what was served
    before is still served.

    Raises:
        HeliostatError: the version is unknown or damaged, or its replicas did not start.
    """
    store = connect(spec.root)
    name = spec.name
    version = registry.resolve(store, reference(name, spec.deploy.version))
    registry.load_weights(store, version)
    client = Serve()
    check_root(store, client.describe())
    place = partial(
        replace_model,
        name=name,
        number=version.number,
        deploy=spec.deploy.model_copy(update={"version": None}),
        code=store_code(store),
    )
    print(f"starting {spec.deploy.replicas} x {version.ref}", flush=True)
    before = change_table(store, place)
    try:
        roll_out(store, client)
    except BaseException as error:
        rest = undo(store, client, name, place(before), before)
        if isinstance(error, HeliostatError):
            raise HeliostatError(f"{version.ref} was not deployed, {rest}: {error}") from error
        print(f"{version.ref} was not deployed, {rest}", flush=True)
        raise
    continues = isinstance(features_from_json(version.features), BlockFeatures)
    return find_url(client) + ("/v1/completions" if continues else f"/v1/models/{name}:predict")


def undo(store: Store, client: Serve, name: str, written: Table, before: Table) -> str:
    """Take the change from `before` to `written` back; says what is served now."""
    try:
        change_table(store, partial(take_back, name=name, written=written, before=before))
        roll_out(store, client)
        number = read_table(store).models.get(name)
    except HeliostatError as error:
        return f"and the cluster did not go back to what was served before ({error})"
    return f"{name}:{number} is still served" if number else f"{name} is not served"


def check_root(store: Store, details: dict[str, Any]) -> None:
    """Refuse to replace the models of another bucket.

    Raises:
        HeliostatError: the cluster serves another root.
    """
    config = details["applications"].get(APPLICATION, {}).get("deployed_app_config")
    served = config["args"]["root"] if config else store.uri
    if served != store.uri:
        raise HeliostatError(
            f"the cluster serves the models of {served}, not of {store.uri}: set root to that, "
            "or end them first with `serve shutdown`"
        )


def replace_model(table: Table, name: str, number: int | None, **how: Any) -> Table:
    others = {other: kept for other, kept in table.models.items() if other != name}
    models = others | ({name: number} if number else {})
    return table.model_copy(update={"models": models, **how})


def take_back(table: Table, *, name: str, written: Table, before: Table) -> Table:
    """`table` as if the deploy of `name` from `before` to `written` had not been.

    Every deploy sets `deploy` and `code`: in a table that is no longer `written` they are those of
    somebody else, as the model is if its number is another one.
    """
    if table == written:
        return before
    if table.models.get(name) != written.models[name]:
        return table
    return replace_model(table, name, before.models.get(name))


def read_table(store: Store) -> Table:
    try:
        return Table.model_validate_json(store.read(TABLE_KEY))
    except Missing:
        return Table()
    except ValidationError as error:
        raise HeliostatError(
            f"{store.uri}/{TABLE_KEY}, the table of what is served, is damaged: delete the object "
            "and deploy every model again"
        ) from error


def change_table(store: Store, change: Callable[[Table], Table]) -> Table:
    """Move the table from what it is to `change` of that; return what it was."""
    while True:
        entry, before = store.stat(TABLE_KEY), read_table(store)
        data = change(before).model_dump_json(indent=1).encode()
        with suppress(Conflict):
            store.replace(TABLE_KEY, data, entry.etag) if entry else store.create(TABLE_KEY, data)
            return before


def roll_out(store: Store, client: Serve) -> None:
    """Make the cluster serve what the table says, until the table stays as it is.

    Raises:
        HeliostatError: the replicas did not start; the sentence has their reason.
    """
    while True:
        table = read_table(store)
        client.apply(render_config(store, table, client.describe()))
        reason = await_running(client, table.deploy.start_timeout_s)
        if read_table(store) == table:
            break
    if reason:
        raise HeliostatError(reason)


def render_config(store: Store, table: Table, details: dict[str, Any]) -> dict[str, Any]:
    """The Serve configuration of `table` beside the applications that others deployed."""
    others = [
        app["deployed_app_config"]
        for name, app in details["applications"].items()
        if name != APPLICATION and app["deployed_app_config"]
    ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": details.get("http_options", HTTP_OPTIONS),
        "applications": others + ([render_application(store, table)] if table.models else []),
    }


def render_application(store: Store, table: Table) -> dict[str, Any]:
    deploy = table.deploy
    plan = Plan(
        root=store.uri,
        models=table.models,
        max_model_bytes=math.ceil(deploy.max_model_mib * 2**20),
        max_body_bytes=math.ceil(deploy.max_body_mib * 2**20),
        max_requests=deploy.max_queued_requests,
        request_timeout_s=deploy.request_timeout_s,
        max_streams=deploy.max_streams,
        max_context=deploy.max_context,
    )
    root = store.uri if "://" in store.uri else Path(store.uri).as_uri()
    code = f"{root}/code/{table.code}.zip"
    return {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": f"{__name__}:{build_application.__name__}",
        # Both keys: one left out is inherited from the job that happened to start Serve.
        "runtime_env": {"working_dir": code, "py_modules": [code]},
        "args": plan.model_dump(),
        "deployments": [{"name": Replica.__name__, "num_replicas": deploy.replicas}],
    }


def await_running(client: Serve, timeout_s: float) -> str | None:
    """Wait until Serve has settled the application; return why it failed, if it did."""
    began = reported = time.monotonic()
    while True:
        app = client.describe()["applications"].get(APPLICATION)
        if app is None or app["status"] == "RUNNING":
            return None
        if app["status"] == "DEPLOY_FAILED":
            return explain(app)
        now = time.monotonic()
        if now - began > timeout_s:
            return f"the replicas did not start within {timeout_s:g} s: {explain(app)}"
        if now - reported >= REPORT_SECONDS:
            reported = now
            print(f"{now - began:4.0f} s: {describe_wait(app)}", flush=True)
        time.sleep(POLL_SECONDS)


def describe_wait(app: dict[str, Any]) -> str:
    """The states of the replicas, and what Serve says that they wait for."""
    replicas = (found for part in app["deployments"].values() for found in part["replicas"])
    states = Counter(replica["state"] for replica in replicas)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return " - ".join(filter(None, (f"replicas {counts or 'not there yet'}", explain(app))))


def explain(app: dict[str, Any]) -> str:
    """The last error in what Serve says about an application, as one line."""
    parts = [app["message"], *(part["message"] for part in app["deployments"].values())]
    text = "\n".join(parts)
    starts = [match.start() for match in REASON.finditer(text)]
    return " ".join(text[starts[-1] if starts else 0 :].split())[:MAX_REASON_CHARS]


def find_url(client: Serve) -> str:
    options = HTTP_OPTIONS | client.describe()["http_options"]
    host = "127.0.0.1" if options["host"] == "0.0.0.0" else options["host"]
    return f"http://{host}:{options['port']}"

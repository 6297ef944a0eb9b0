"""Puts versions on the cluster: Serve applications that serve what the bucket's table says."""

import math
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat import pools, registry
from heliostat.archive import store_code
from heliostat.data.features import BlockFeatures, features_from_json
from heliostat.edge import MIB, Limits
from heliostat.environment import EDGE_HOST
from heliostat.errors import HeliostatError
from heliostat.serve.control import HTTP_OPTIONS, Serve, await_running, find_url
from heliostat.serve.replica import (
    Contender,
    Plan,
    Replica,
    build_application,
    build_candidate,
    name_candidate,
    name_proof,
)
from heliostat.serve.scaling import Policy
from heliostat.serve.table import (
    Candidate,
    Placement,
    Table,
    change_table,
    place,
    propose,
    read_table,
    roll_back,
    succeed,
    take_back,
    withdraw,
)
from heliostat.spec import DeploySpec, reference
from heliostat.storage import Store

if TYPE_CHECKING:
    from heliostat.serve.scores import Scoreboard

APPLICATION = "heliostat"
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
# How often a replica tells what it is asked, and how much of that counts.
REPORT_SECONDS, LOOK_BACK_SECONDS = 2.0, 10.0

# What is said of a deploy and is not of the table.
PER_DEPLOY = {"version": None, "candidate": None}


def deploy(store: Store, name: str, how: DeploySpec) -> str:
    """Serve the version that `how` names in place of the one served so far; return its URL.

    With `how.candidate` it is first a candidate beside that one, and takes over if it is as good:
    that goes on even if this process is killed. An error or Ctrl-C is taken back: what was served
    before is still served. What is served that way already is left as it is.

    Raises:
        HeliostatError: the version is unknown or damaged, its replicas did not start, or as a
            candidate it was worse.
    """
    check_body(how)
    version = registry.resolve(store, reference(name, how.version))
    registry.load_weights(store, version)
    client = Serve()
    details = client.describe()
    check_root(store, details)
    check_auth(how, details)
    if how.candidate is None:
        _take_over(store, client, version, how)
        return _find_route(client, version)

    from heliostat.serve.steward import deliver

    tried = Candidate(number=version.number, proposal=secrets.token_hex(4), terms=how.candidate)
    deliver(store, name, how, tried, store_code(store))
    return _find_route(client, version)


def rollback(store: Store, name: str) -> str:
    """Serve the version of `name` that was served before; return its reference.

    Raises:
        HeliostatError: `name` is not served, no version before was kept, or its replicas did not
            start: then everything stays.
    """
    client = Serve()
    check_root(store, client.describe())
    placed = _find_placed(read_table(store), name)
    back = roll_back(placed, name)
    print(f"going back from {name}:{placed.number} to {name}:{back.number}", flush=True)
    _change(store, client, name, lambda table: place(table, name, back), f"{name}:{back.number}")
    return f"{name}:{back.number}"


def _take_over(store: Store, client: Serve, version: registry.Version, how: DeploySpec) -> None:
    name, number = version.name, version.number
    table, code = read_table(store), store_code(store)
    deploy = how.model_copy(update=PER_DEPLOY)
    placed = table.models.get(name)

    def put(table: Table) -> Table:
        placed = succeed(table.models.get(name), number, how.keep_previous)
        return place(table, name, placed, deploy=deploy, code=code)

    if placed == Placement(number=number, previous=placed.previous if placed else ()) and (
        (table.deploy, table.code) == (deploy, code) and _serves(store, client, table)
    ):
        print(f"{version.ref} is served already", flush=True)
        return
    print(f"starting {_say_replicas(how)} x {version.ref}", flush=True)
    _change(store, client, name, put, version.ref)


def try_out(
    store: Store,
    client: Serve,
    version: registry.Version,
    how: DeploySpec,
    candidate: Candidate,
    board: "Scoreboard",
    again: bool,
) -> None:
    """Serve `version` as `candidate` until it is known to be as good, or worse.

    `again` goes on with what was begun, as far as the table says that it came.

    Raises:
        HeliostatError: it did not start or was worse, and was taken back.
    """
    from heliostat.serve.follow import follow

    name, terms = version.name, candidate.terms

    def put(table: Table) -> Table:
        return place(table, name, propose(table.models.get(name), candidate))

    def leave(table: Table) -> Table:
        placed = table.models.get(name)
        return place(table, name, placed and withdraw(placed, candidate))

    def find_placed() -> Placement:
        return _find_placed(read_table(store), name)

    if again and find_placed().candidate != candidate:
        roll_out(store, client)
        if find_placed().number == version.number:
            return
        raise HeliostatError(f"{version.ref} was taken back: deploy it again")
    print(f"starting {version.ref} as a {terms.mode} for {terms.share:.0%} of {name}", flush=True)
    _change(store, client, name, put, version.ref)
    try:
        said = follow(name, candidate, board, find_placed, client.pause)
    except BaseException as error:
        _change(store, client, name, leave, version.ref)
        if not isinstance(error, HeliostatError):
            print(f"{version.ref} was taken back", flush=True)
            raise
        raise HeliostatError(
            f"{version.ref} was taken back, {name}:{find_placed().number} is still served: {error}"
        ) from error
    print(said, flush=True)
    if terms.mode == "shadow":
        _change(store, client, name, leave, version.ref)
    else:
        _take_over(store, client, version, how)


def _find_route(client: Serve, version: registry.Version) -> str:
    continues = isinstance(features_from_json(version.features), BlockFeatures)
    route = "/v1/completions" if continues else f"/v1/models/{version.name}:predict"
    return find_url(client) + route


def _change(
    store: Store, client: Serve, name: str, change: Callable[[Table], Table], ref: str
) -> None:
    """Change the table and make the cluster follow, or leave both as they were."""
    before = change_table(store, change)
    try:
        roll_out(store, client)
    except BaseException as error:
        rest = undo(store, client, name, change(before), before)
        if isinstance(error, HeliostatError):
            raise HeliostatError(f"{ref} was not deployed, {rest}: {error}") from error
        print(f"{ref} was not deployed, {rest}", flush=True)
        raise


def undo(store: Store, client: Serve, name: str, written: Table, before: Table) -> str:
    """Take the change from `before` to `written` back; says what is served now."""
    try:
        change_table(store, partial(take_back, name=name, written=written, before=before))
        roll_out(store, client)
        placed = read_table(store).models.get(name)
    except HeliostatError as error:
        return f"and the cluster did not go back to what was served before ({error})"
    return f"{name}:{placed.number} is still served" if placed else f"{name} is not served"


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


def check_auth(deploy: DeploySpec, details: dict[str, Any]) -> None:
    """Warn of a deploy without keys, refuse it where others can reach it.

    Raises:
        HeliostatError: Serve or the edge listens not only to this machine.
    """
    if deploy.auth:
        return
    serve = details.get("http_options", HTTP_OPTIONS).get("host", HTTP_OPTIONS["host"])
    edge = os.environ.get(EDGE_HOST, LOOPBACK_HOSTS[0])
    for what, host in (("Serve", serve), ("the edge", edge)):
        if host not in LOOPBACK_HOSTS:
            raise HeliostatError(
                f"deploy.auth is off and {what} listens on {host}: anybody could ask, so leave it "
                f"on and make keys with `heliostat keys create`, or let {what} listen on 127.0.0.1"
            )
    print("WARNING: deploy.auth is off: every program of this machine may ask", flush=True)


def check_body(deploy: DeploySpec) -> None:
    """Raises HeliostatError: replicas would take larger bodies than the edge lets pass."""
    most = Limits().max_body_bytes
    if deploy.max_body_mib * MIB > most:
        raise HeliostatError(
            f"deploy.max_body_mib is {deploy.max_body_mib:g}, the edge lets {most // MIB} MiB pass:"
            " give no more than that, and run `jobs/predict.py` over what is larger"
        )


def roll_out(store: Store, client: Serve) -> None:
    """Make the cluster serve what the table says, until the table stays as it is.

    A candidate is asked once it runs, and goes once nobody asks it.

    Raises:
        HeliostatError: the replicas did not start; the sentence has their reason.
    """
    while True:
        table = read_table(store)
        reason = None
        for config in plan_configs(store, table, client.describe()):
            client.apply(config)
            names = [app["name"] for app in config["applications"] if _is_ours(app["name"])]
            reason = reason or await_running(client, names, table.deploy.start_timeout_s)
        if read_table(store) == table:
            break
    if reason:
        raise HeliostatError(reason)
    for app in config["applications"]:
        if _is_ours(app["name"]):
            store.write(name_proof(app["args"]), b"")


def plan_configs(store: Store, table: Table, details: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The Serve configurations of `table`, one after another, beside what others deployed."""
    deployed = {
        name: app["deployed_app_config"]
        for name, app in details["applications"].items()
        if app["deployed_app_config"]
    }
    others = [config for name, config in deployed.items() if not _is_ours(name)]
    options = details.get("http_options", HTTP_OPTIONS)

    def config(applications: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "proxy_location": "HeadOnly",
            "http_options": options,
            "applications": others + applications,
        }

    contenders, now = _contend(store, table), _count_replicas(details)
    fresh = {
        name
        for name, app in contenders.items()
        if deployed.get(app["name"], {}).get("args") != app["args"]
    }
    names = {app["name"] for app in contenders.values()}
    leaving = [
        app
        for name, app in deployed.items()
        if name.startswith(name_candidate("")) and name not in names
    ]
    if fresh or leaving:
        main = _serve_all(store, table, contenders.keys() - fresh, now)
        yield config([*main, *contenders.values(), *leaving])
    yield config([*_serve_all(store, table, contenders.keys(), now), *contenders.values()])


def _serve_all(
    store: Store, table: Table, asked: Collection[str], now: int
) -> list[dict[str, Any]]:
    """The application of all models, none if there is none, which has `now` replicas; `asked` are
    the models whose candidates are asked."""
    if not table.models:
        return []
    models = {name: placed.numbers for name, placed in table.models.items()}
    user_config = {
        name: placed.candidate.model_dump(mode="json")
        for name, placed in table.models.items()
        if placed.candidate and name in asked
    }
    replicas = {"name": Replica.__name__, **_scale(table.deploy, now), "user_config": user_config}
    return [
        {
            **_application(store, table, build_application, models),
            "name": APPLICATION,
            "route_prefix": "/",
            "deployments": [replicas],
        }
    ]


def _contend(store: Store, table: Table) -> dict[str, dict[str, Any]]:
    """An application for the candidate of each model that has one; it has no route."""
    options = {"ray_actor_options": _reserve(table.deploy)}
    replicas = {"name": Contender.__name__, "num_replicas": 1, **options}
    return {
        name: {
            **_application(store, table, build_candidate, {name: (placed.candidate.number,)}),
            "name": name_candidate(name),
            "route_prefix": None,
            "deployments": [replicas],
        }
        for name, placed in table.models.items()
        if placed.candidate
    }


def _application(
    store: Store, table: Table, build: Callable[..., Any], models: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    deploy = table.deploy
    plan = Plan(
        root=store.uri,
        models=models,
        max_latency_ms=deploy.max_latency_ms,
        max_model_bytes=math.ceil(deploy.max_model_mib * 2**20),
        max_body_bytes=math.ceil(deploy.max_body_mib * 2**20),
        max_requests=deploy.max_queued_requests,
        request_timeout_s=deploy.request_timeout_s,
        max_streams=deploy.max_streams,
        max_context=deploy.max_context,
        vllm=deploy.vllm if deploy.engine == "vllm" else None,
        gpus=deploy.gpus_per_replica,
        auth=deploy.auth,
        scales=not isinstance(deploy.replicas, int),
    )
    return {
        "import_path": f"{build.__module__}:{build.__name__}",
        "runtime_env": find_code(store, table.code),
        "args": plan.model_dump(mode="json"),
    }


def find_code(store: Store, code: str) -> dict[str, Any]:
    """The runtime environment with the package as the bucket has it, which no job takes along.

    Both keys are set: one left out is inherited from the job that happens to start a process.
    """
    root = store.uri if "://" in store.uri else Path(store.uri).as_uri()
    archive = f"{root}/code/{code}.zip"
    return {"working_dir": archive, "py_modules": [archive]}


def _scale(deploy: DeploySpec, now: int) -> dict[str, Any]:
    """A fixed number of replicas, or as many as the requests that are inside ask for.

    Of a new version there are at first as many as there are `now` of the old one, at least the one
    that shows that it starts.
    """
    options = {"ray_actor_options": _reserve(deploy)}
    if isinstance(deploy.replicas, int):
        return {"num_replicas": deploy.replicas, **options}
    fewest, most = deploy.replicas
    goal = {"requests": deploy.target_requests, "latency_ms": deploy.latency_target_ms}
    scaling = {
        "min_replicas": fewest,
        "initial_replicas": min(most, max(fewest, now, 1)),
        "max_replicas": most,
        "target_ongoing_requests": deploy.target_requests,
        "upscale_delay_s": deploy.scale_up_s,
        "downscale_delay_s": deploy.scale_down_s,
        "metrics_interval_s": REPORT_SECONDS,
        "look_back_period_s": LOOK_BACK_SECONDS,
        "policy": {
            "policy_function": f"{Policy.__module__}:{Policy.__name__}",
            "policy_kwargs": goal,
        },
    }
    return {"num_replicas": "auto", "autoscaling_config": scaling, **options}


def _reserve(deploy: DeploySpec) -> dict[str, Any]:
    """What of a node a replica has to itself, and the node's pool."""
    asked = pools.ask("serving")
    share = {"num_cpus": deploy.cpus_per_replica, "num_gpus": deploy.gpus_per_replica}
    return {**share, "resources": asked} if asked else share


def _count_replicas(details: dict[str, Any]) -> int:
    """The replicas that Serve keeps for all models."""
    deployments = details["applications"].get(APPLICATION, {}).get("deployments", {})
    count: int = deployments.get(Replica.__name__, {}).get("target_num_replicas", 0)
    return count


def _say_replicas(deploy: DeploySpec) -> str:
    if isinstance(deploy.replicas, int):
        return str(deploy.replicas)
    return f"{deploy.replicas[0]} to {deploy.replicas[1]}"


def _find_placed(table: Table, name: str) -> Placement:
    placed = table.models.get(name)
    if placed is None:
        served = ", ".join(sorted(table.models))
        others = f", but {served}" if served else ""
        raise HeliostatError(f"{name} is not served{others}: deploy it first")
    return placed


def _is_ours(application: str) -> bool:
    return application == APPLICATION or application.startswith(name_candidate(""))


def _serves(store: Store, client: Serve, table: Table) -> bool:
    """Whether what runs is what the table says: who changed that may have died before the rest."""
    app = client.describe()["applications"].get(APPLICATION)
    if app is None or app["status"] != "RUNNING":
        return False
    deployed, (wanted,) = app["deployed_app_config"] or {}, _serve_all(store, table, (), 0)
    return all(deployed.get(key) == wanted[key] for key in ("args", "runtime_env"))

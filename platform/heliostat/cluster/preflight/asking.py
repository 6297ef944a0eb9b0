"""Asking every node of a cluster at once, each within its time, and leaving nothing behind."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.cluster.preflight.inspector import Inspector
from heliostat.cluster.preflight.report import Node
from heliostat.errors import HeliostatError

HEAD = "node:__internal_head__"
END_SECONDS = 10.0
MAX_REASON = 200

# Both by the id of a node: a handle of its inspector, and a reference to what it will answer.
Actors = Mapping[str, Any]
Questions = Mapping[str, Any]


def connect(**options: Any) -> None:
    """Join the cluster that the environment names, with `options` of `ray.init`, once.

    Raises:
        HeliostatError: there is none, or it does not let this process in.
    """
    if ray.is_initialized():
        return
    try:
        ray.init("auto", **options)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise HeliostatError(
            f"cannot reach a Ray cluster ({_reason(error)}): start one with `heliostat up`, or "
            "set RAY_ADDRESS, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to yours"
        ) from error


def list_nodes(skipped: Iterable[str]) -> list[Node]:
    """Those that are alive, but for the `skipped`; the head first.

    Raises:
        HeliostatError: none is left to ask.
    """
    without = set(skipped)
    found = [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in without
    ]
    if not found:
        raise HeliostatError("no node of the cluster is left to ask: shorten train.avoid_nodes")
    return sorted(found, key=lambda node: (HEAD not in node.resources, node.address, node.id))


@contextlib.contextmanager
def inspect(nodes: Iterable[Node]) -> Iterator[dict[str, Any]]:
    """An inspector on each node, by the node's id; they end with the context."""
    make = ray.remote(Inspector)
    actors = {
        node.id: make.options(
            num_cpus=0,
            max_restarts=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()
        for node in nodes
    }
    try:
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor)


def ask(questions: Questions, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers that came within `seconds`, and why the others did not."""
    ready, _ = _wait(questions, seconds)
    answers, failures = {}, {}
    for node, question in questions.items():
        if question not in ready:
            failures[node] = f"no answer in {seconds:g} s"
            continue
        try:
            answers[node] = ray.get(question)
        except RayTaskError as error:
            failures[node] = _reason(error.cause)
        except RayError as error:
            failures[node] = _reason(error)
    return answers, failures


def end_late(actors: Actors, questions: Questions) -> None:
    """End the inspectors that still work at a question: afterwards none of them does."""
    _, late = _wait(questions, 0)
    for node, question in questions.items():
        if question in late:
            ray.kill(actors[node])
    _wait(questions, END_SECONDS)


def _wait(questions: Questions, seconds: float) -> tuple[list[Any], list[Any]]:
    """The questions that are answered, and those that are not."""
    asked = list(questions.values())
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=seconds) if asked else ([], [])
    return ready, late


def _reason(error: BaseException) -> str:
    words = " ".join(str(error).split())[:MAX_REASON]
    return words if isinstance(error, HeliostatError) else f"{type(error).__name__}: {words}"

"""Why a job is where it is: from what Ray, the queue and its log say to sentences."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from heliostat.submission.fit import Kind, Resources, show

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SHOWN_HOLDERS = 5
MAX_WORDS = 400
# What a training says of its turn; the last one counts.
_QUEUE = re.compile(r"^(?:in the queue: (.*)|its turn: .*)$")


@dataclass(frozen=True)
class Request:
    """Something of a job that Ray has not placed yet, with what each of its parts needs."""

    what: str
    bundles: tuple[Resources, ...]

    def render(self) -> str:
        shapes: dict[str, int] = {}
        for bundle in self.bundles:
            shapes[show(bundle)] = shapes.get(show(bundle), 0) + 1
        return " and ".join(f"{count} x {shape}" for shape, count in shapes.items())


@dataclass(frozen=True)
class Holder:
    """Somebody who has resources of the cluster now."""

    name: str
    resources: Resources


@dataclass(frozen=True)
class Situation:
    """A job and the cluster around it at one moment.

    `supervisor` is the state of the actor that runs the job's program, `kinds` what nodes there can
    be (with `may_grow` there may be others that nobody told of), `launches` what the autoscaler
    says of nodes that are on their way or did not come, `lines` the last that the job printed.
    """

    status: str
    message: str = ""
    supervisor: str = ""
    requests: tuple[Request, ...] = ()
    kinds: tuple[Kind, ...] = ()
    holders: tuple[Holder, ...] = ()
    may_grow: bool = False
    launches: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


def explain(situation: Situation) -> list[str]:
    """What the job waits for or does, the most telling first; at least one sentence."""
    if situation.status in ENDED:
        return [_tell_end(situation)]
    if reason := find_queue_reason(situation.lines):
        return [f"it waits in the queue: {reason}"]
    if situation.requests:
        return [*_tell_requests(situation), *situation.launches]
    if situation.status == "PENDING":
        return [_tell_start(situation), *situation.launches]
    if situation.supervisor not in ("ALIVE", ""):
        return [
            f"Ray says {situation.status}, but what runs its program is {situation.supervisor}: "
            "submit it again, it goes on from what it has committed"
        ]
    return [_tell_progress(situation.lines)]


def is_waiting(situation: Situation) -> bool:
    """Whether the job is held up by something that has a name."""
    return situation.status not in ENDED and bool(
        situation.status == "PENDING" or situation.requests or find_queue_reason(situation.lines)
    )


def find_queue_reason(lines: Sequence[str]) -> str:
    """Why the job waits in the queue, as it said when that last changed; "" if it does not."""
    for line in reversed(lines):
        if found := _QUEUE.match(line):
            return found[1] or ""
    return ""


def free(kinds: Sequence[Kind], holders: Sequence[Holder]) -> Mapping[str, float]:
    """What nobody holds of the nodes that there are."""
    return {
        name: sum(kind.most * kind.resources.get(name, 0) for kind in kinds)
        - sum(holder.resources.get(name, 0) for holder in holders)
        for name in ("CPU", "GPU")
    }


def _tell_end(situation: Situation) -> str:
    told = " ".join(situation.message.split())
    if situation.status != "FAILED":
        return f"it has ended: {situation.status}"
    errors = [line for line in situation.lines if line.startswith("error: ")]
    return f"it has ended: FAILED ({(errors[-1] if errors else told)[:MAX_WORDS]})"


def _tell_start(situation: Situation) -> str:
    match situation.supervisor:
        case "":
            return "Ray has not begun to start it"
        case "PENDING_CREATION" | "DEPENDENCIES_UNREADY":
            return (
                "its environment is being set up on the head: the uploaded files are unpacked and "
                "a process is started"
            )
        case state:
            return f"what runs its program is {state}, and Ray has not said yet that it runs"


def _tell_requests(situation: Situation) -> Iterator[str]:
    for request in situation.requests:
        needs = f"{request.what} needs {request.render()}"
        missing = [one for one in request.bundles if not _can_hold(situation.kinds, one)]
        if missing and not situation.may_grow:
            yield (
                f"{needs}, and no node of this cluster can have {show(missing[0])}: it will never "
                "start; stop it and ask for less, or use a larger cluster"
            )
        elif missing or situation.launches:
            yield f"{needs}: it waits for a node that has that"
        else:
            yield f"{needs}: it waits until that is free; {_tell_holders(situation)}"


def _can_hold(kinds: Sequence[Kind], bundle: Resources) -> bool:
    return any(kind.count_places(bundle) for kind in kinds)


def _tell_holders(situation: Situation) -> str:
    left = free(situation.kinds, situation.holders)
    holders = [f"{one.name} has {show(one.resources)}" for one in situation.holders]
    told = ", ".join(holders[:SHOWN_HOLDERS]) or "nobody has any that Ray knows of"
    more = len(holders) - SHOWN_HOLDERS
    return f"{show(left)} left, {told}" + f" and {more} more" * (more > 0)


# What a line of a job's log says of where it is; the last line that says something counts.
_SIGNS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(r"^step ([\d,]+)/([\d,]+)(?:.*\bwait (\d+)%)?.*$"),
        lambda found: (
            f"it trains: step {found[1]} of {found[2]}"
            + f", and waits {found[3]}% of its time for data" * (int(found[3] or 0) >= 50)
        ),
    ),
    (re.compile(r"^(waiting for CPUs: .*)$"), lambda found: found[1]),
    (
        re.compile(r"^its turn: (\d+) workers$"),
        lambda found: f"its turn has come: {found[1]} workers start",
    ),
    (
        re.compile(r"^run (\S+): ([\d,]+) steps .*$"),
        lambda found: f"the workers of run {found[1]} start: no step of {found[2]} is done yet",
    ),
)


_COLOUR = re.compile(r"\x1b\[\d+m")
_PROCESS = re.compile(r"^\([\w.]+ pid=\d+(, ip=\S+)?\) ")  # whose line it is, as Ray marks it


def _tell_progress(marked: Sequence[str]) -> str:
    lines = [_PROCESS.sub("", _COLOUR.sub("", line)) for line in marked]
    for line in reversed(lines):
        for pattern, tell in _SIGNS:
            if found := pattern.match(line):
                return tell(found)
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"it runs; the last it said: {last[:MAX_WORDS]}" if last else "it runs, and said nothing"

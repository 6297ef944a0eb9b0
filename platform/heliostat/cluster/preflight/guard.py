"""What guards a node of Ray: its token, and the variables that switch a guard off or break us."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from heliostat.cluster.preflight.finding import Finding, Level
from heliostat.environment import REQUIRED, TUNED

MODE = "RAY_AUTH_MODE"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
UNSET = "unset it where this node's `ray start` runs, and start its Ray again"
SECRET = re.compile(r"(?i)secret|token|password|passwd|credential|private_key|api_?key|access_key")
ON = r"(?i)1|true|yes|on"


@dataclass(frozen=True)
class Risk:
    """A variable that is dangerous where the whole of its value matches `pattern`."""

    name: str
    pattern: str
    level: Level
    reason: str


RISKS = (
    Risk("RAY_DASHBOARD_REDACT_RUNTIME_ENV", r"(?i)0|false", "failed",
         "the dashboard shows what jobs were given as variables"),
    Risk("RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION", ON, "failed",
         "a data set may run code"),
    Risk("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ON, "failed", "a file of weights may run code"),
    Risk("SSLKEYLOGFILE", r".+", "failed", "the keys of TLS connections are written to a file"),
    Risk("RAY_testing_rpc_failure", r".+", "failed", "Ray drops requests on purpose"),
    Risk("RAY_testing_asio_delay_us", r".+", "failed", "Ray delays its work on purpose"),
    Risk("RAY_OVERRIDE_NODE_ID_FOR_TESTING", r".+", "warning", "two nodes may have one id"),
    Risk("RAY_TRAIN_V2_ENABLED", r"(?i)0|false", "failed", "runs need Ray Train V2"),
    Risk("RAY_SERVE_FORCE_LOCAL_TESTING_MODE", ON, "failed", "Serve starts no replicas"),
    Risk("RAY_IGNORE_VERSION_MISMATCH", ON, "failed",
         "nodes of other versions of Ray and Python may join"),
    Risk(TOKEN, r".+", "warning",
         "every process of a job can print the token: RAY_AUTH_TOKEN_PATH names a file"),
    Risk("RAY_DEBUG_POST_MORTEM", ON, "warning", "a task that fails waits for a debugger"),
    Risk("RAY_DEBUG", r"legacy", "warning", "a breakpoint opens a port that runs code"),
    Risk("RAY_DISABLE_MEMORY_MONITOR", ON, "warning",
         "one task that takes all memory ends the node"),
    Risk("RAY_DEBUG_DISABLE_MEMORY_MONITOR", ON, "warning",
         "one task that takes all memory ends the node"),
    Risk("RAY_memory_monitor_refresh_ms", r"0", "warning",
         "one task that takes all memory ends the node"),
    Risk("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", r".+", "warning", "objects may lie on a disk"),
    Risk("RAY_preload_python_modules", r".+", "warning", "runs start several times slower"),
    Risk("RAY_record_ref_creation_sites", ON, "warning", "every object takes longer to make"),
    Risk("OMP_NUM_THREADS", r"1", "warning", "a task computes with one thread, however many CPUs"),
    Risk("CUDA_LAUNCH_BLOCKING", ON, "warning", "the CPU waits for every step of the GPU"),
    Risk("NCCL_P2P_DISABLE", r"1", "warning", "the GPUs of a node do not talk to each other"),
    Risk("NCCL_IB_DISABLE", r"1", "warning", "GPUs talk over TCP, though there be InfiniBand"),
    Risk("NCCL_SOCKET_IFNAME", r"lo", "warning", "GPUs of two nodes cannot talk"),
)  # fmt: skip
EXPECTED = {setting.name: setting for setting in REQUIRED if setting.name.startswith("RAY_")}
COMPARED = [setting.name for setting in TUNED]
_READ = {risk.name for risk in RISKS} | {*EXPECTED, *COMPARED}


@dataclass(frozen=True)
class Guard:
    """`settings` are variables that Ray was started with on this node, no secret among them.

    `token_mode` is that of the file at `token_path`, None where none is to be read. `exposed` names
    the variables that look like secrets and were given to the job as its runtime environment.
    """

    settings: Mapping[str, str]
    token_path: str
    token_mode: int | None
    exposed: tuple[str, ...]


def read_guard(environment: Mapping[str, str], given: Mapping[str, str]) -> Guard:
    """From the variables of a node's Ray and those that a job was `given`."""
    settings = {name: text for name, text in environment.items() if name in _READ}
    if settings.get(TOKEN):
        settings[TOKEN] = "..."  # the value of a secret never leaves the node
    home = environment.get("HOME", "~")
    path = environment.get(TOKEN_PATH) or f"{home}/.ray/auth_token"
    exposed = tuple(name for name, text in given.items() if _is_secret(name, text))
    return Guard(settings, path, _read_mode(Path(path).expanduser()), exposed)


def judge_guard(guards: Mapping[str, Guard]) -> list[Finding]:
    """What endangers a node, and what it does otherwise than most."""
    usual = {name: _find_usual(name, guards) for name in COMPARED}
    findings = []
    for node, guard in guards.items():
        found = [
            *_judge_token(node, guard),
            *_judge_settings(node, guard, usual),
            *_judge_risks(node, guard),
        ]
        findings += found or [Finding(node, "guard", "ok", f"token mode, {guard.token_path} 0600")]
    return findings


def _judge_token(node: str, guard: Guard) -> Iterator[Finding]:
    mode = guard.settings.get(MODE, "not set")
    if mode != "token":
        yield Finding(
            node,
            "token",
            "failed",
            f"{MODE} is {mode}",
            f"start Ray on this node with {MODE}=token: else whoever reaches it runs code on it",
        )
    if guard.token_mode is None and TOKEN not in guard.settings:
        yield Finding(
            node,
            "token",
            "failed",
            f"there is no token in {guard.token_path}",
            f"bring the cluster's token there, mode 0600, or set {TOKEN_PATH} to where it is",
        )
    elif guard.token_mode is not None and guard.token_mode & 0o077:
        yield Finding(
            node,
            "token",
            "failed",
            f"{guard.token_path} has mode {guard.token_mode:04o}",
            f"`chmod 600 {guard.token_path}` on this node, and make a new token if others use it",
        )


def _judge_settings(node: str, guard: Guard, usual: Mapping[str, str]) -> Iterator[Finding]:
    for name, setting in EXPECTED.items():
        value = guard.settings.get(name, "not set")
        if name != MODE and value != setting.value:
            advice = f"start Ray on this node with {name}={setting.value}: {setting.reason}"
            yield Finding(node, "settings", "warning", f"{name} is {value}", advice)
    for name, most in usual.items():
        value = guard.settings.get(name, "not set")
        if value != most:
            measured = f"{name} is {value}, on most nodes {most}"
            advice = "start Ray on every node with the same settings, as cluster.yaml does"
            yield Finding(node, "settings", "warning", measured, advice)


def _judge_risks(node: str, guard: Guard) -> Iterator[Finding]:
    for risk in RISKS:
        value = guard.settings.get(risk.name, "")
        if value and re.fullmatch(risk.pattern, value):
            measured = f"{risk.name}={value}: {risk.reason}"
            yield Finding(node, "variables", risk.level, measured, UNSET)
    for name in guard.exposed:
        yield Finding(
            node,
            "variables",
            "failed",
            f"{name} is in the runtime environment of the job",
            "take it out: Ray writes env_vars to its logs in clear; give the machines a role, or "
            "the path of a file of mode 0600",
        )


def _find_usual(name: str, guards: Mapping[str, Guard]) -> str:
    values = Counter(guard.settings.get(name, "not set") for guard in guards.values())
    return max(values, key=lambda value: (values[value], value != "not set"), default="")


def _is_secret(name: str, text: str) -> bool:
    """What names a file is no secret itself."""
    return bool(text and SECRET.search(name)) and not name.endswith(("_PATH", "_FILE", "_MODE"))


def _read_mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None

"""The cluster in a cloud: what a config of Ray's launcher must keep to, checked before it runs."""

import ipaddress
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from heliostat.environment import REQUIRED, TUNED
from heliostat.errors import HeliostatError
from heliostat.pools import DECLARED, LABEL, POOLS

Config = dict[str, Any]
# Without them Ray has commands of its own, or none.
LISTS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "file_mounts")
SETTINGS = {s.name: s.value for s in (*REQUIRED, *TUNED) if s.name.startswith("RAY_")}
HOST = re.compile(r"--(?:[a-z.-]*host|[a-z.-]*listen-address|bind)[= ]+(\S+)|(0\.0\.0\.0)")
LISTENS_TO_ALL = re.compile(r"\bprometheus +(?!.*--web\.listen-address)--")
EDGE = re.compile(r"\bheliostat +edge\b")
EDGE_PORT = re.compile(r"--port[= ]+(\d+)")
SECRET = re.compile(
    r"AWS_(?:ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN)|RAY_AUTH_TOKEN=|\.aws\b"
)


def check(path: str | Path) -> Config:
    """Read a config for `ray up`; returns it with Ray's defaults filled in.

    Raises:
        HeliostatError: it cannot be read, Ray refuses it, or it breaks one of `RULES`; the sentence
            names the rule and what breaks it.
    """
    from jsonschema import ValidationError  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        config: Config = prepare_config(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        validate_config(config)
        if missing := [key for key in LISTS if key not in config]:
            raise HeliostatError(f"{path}: Ray cannot use it: {', '.join(missing)} must be given")
    except (OSError, yaml.YAMLError) as error:
        raise HeliostatError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    except ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "the top level"
        raise HeliostatError(f"{path}: Ray refuses {place}: {error.message[:300]}") from error
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise HeliostatError(f"{path}: Ray cannot use it: {error!r:.300}") from error
    for rule, find in RULES.items():
        for broken in find(config):
            raise HeliostatError(f"{path}: {rule}, but {broken}")
    return config


def exports(command: str) -> dict[str, str]:
    """The variables that `command` exports before its `ray start`."""
    words = shlex.shlex(command, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found: dict[str, str] = {}
    for _, group in groupby(words, lambda word: not set(word) <= set(";&|()")):
        match list(group):
            case ["ray", "start", *_]:
                return found
            case ["export", *assignments]:
                found |= {name: value for name, _, value in (a.partition("=") for a in assignments)}
    return found


def start_commands(config: Config) -> list[str]:
    """The commands of head and workers that start Ray."""
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    return [command for command in commands if re.search(r"\bray +start\b", command)]


def find_secured_edge(config: Config) -> str | None:
    """The command of an edge with a TLS certificate, the one thing that may be open."""
    commands = (c for c in config["head_start_ray_commands"] if EDGE.search(c))
    return next((command for command in commands if "--tls-cert" in command), None)


def _setups(config: Config) -> Iterator[list[str]]:
    """The setup commands of each kind of node."""
    yield config["head_setup_commands"]
    for node_type in config["available_node_types"].values():
        yield node_type.get("worker_setup_commands", config["worker_setup_commands"])


def _unset(config: Config) -> Iterator[str]:
    for command in start_commands(config):
        for name, value in (SETTINGS | {"RAY_AUTH_MODE": "token"}).items():
            if exports(command).get(name) != value:
                yield f"{name}={value} is not exported in `{command[-80:]}`"


def _exposed_token(config: Config) -> Iterator[str]:
    for command in start_commands(config):
        token = exports(command).get("RAY_AUTH_TOKEN_PATH", "not set").replace("$HOME", "~")
        if token not in config["file_mounts"]:
            yield f"RAY_AUTH_TOKEN_PATH is {token}, which no file mount brings"
        elif not all(f"chmod 600 {token}" in " ; ".join(setup) for setup in _setups(config)):
            yield f"not every node runs `chmod 600 {token}` in its setup"


def _open_hosts(config: Config) -> Iterator[str]:
    starts = {*config["head_start_ray_commands"], *config["worker_start_ray_commands"]}
    closed = [*(starts - {find_secured_edge(config)}), *(c for s in _setups(config) for c in s)]
    for command in closed:
        hosts = (option or literal for option, literal in HOST.findall(command))
        hosts = (re.sub(r":\d+$", "", host) for host in hosts)
        yield from (f"{host} stands in `{command[-80:]}`" for host in hosts if host != "127.0.0.1")
        if LISTENS_TO_ALL.search(command):
            yield f"--web.listen-address is missing in `{command[-80:]}`"


def _public_ports(config: Config) -> Iterator[str]:
    ports_of_edge = EDGE_PORT.findall(find_secured_edge(config) or "")
    allowed = [(port, port) for port in (22, *map(int, ports_of_edge))]
    for permission in config["provider"].get("security_group", {}).get("IpPermissions", []):
        ports = permission.get("FromPort", "all"), permission.get("ToPort", "all")
        for entry in [*permission.get("IpRanges", []), *permission.get("Ipv6Ranges", [])]:
            cidr = entry.get("CidrIp") or entry.get("CidrIpv6")
            if ports not in allowed and not ipaddress.ip_network(cidr, strict=False).is_private:
                yield f"ports {ports[0]} to {ports[1]} are open to {cidr}"


def _keys(config: Config) -> Iterator[str]:
    yield from (f"{found} stands in it" for found in SECRET.findall(yaml.safe_dump(config)))
    is_google = config["provider"]["type"] == "gcp"
    needed = "serviceAccounts" if is_google else "IamInstanceProfile"
    for name, node_type in config["available_node_types"].items():
        made_by_ray = is_google and name == config["head_node_type"]
        if needed not in node_type["node_config"] and not made_by_ray:
            yield f"node type {name} has no {needed}"


def _open_volumes(config: Config) -> Iterator[str]:
    if config["provider"]["type"] == "gcp":
        return  # Google encrypts every disk
    for name, node_type in config["available_node_types"].items():
        mappings = node_type["node_config"].get("BlockDeviceMappings", [{}])
        if not all(mapping.get("Ebs", {}).get("Encrypted") for mapping in mappings):
            yield f"node type {name} has a volume without Encrypted: true"


def _missing_pools(config: Config) -> Iterator[str]:
    types = config["available_node_types"].items()
    for command in start_commands(config):
        for purpose in (word.partition("=")[0] for word in exports(command).get(POOLS, "").split()):
            if not any(
                node.get("labels", {}).get(LABEL) == purpose
                and node["resources"].get(purpose, 0) >= DECLARED
                for _, node in types
            ):
                yield f"no node type has {purpose}: {DECLARED} and the label {LABEL}: {purpose}"


# Each function yields what breaks its rule.
RULES: dict[str, Callable[[Config], Iterator[str]]] = {
    "every ray start carries the settings of Heliostat": _unset,
    "the token arrives as a file of mode 0600": _exposed_token,
    "everything but an edge with TLS listens on 127.0.0.1": _open_hosts,
    "only ssh and an edge with TLS are open to the outside": _public_ports,
    "nodes get credentials from their cloud alone": _keys,
    "volumes are encrypted": _open_volumes,
    f"each pool of {POOLS} has nodes": _missing_pools,
}

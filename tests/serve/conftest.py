"""A model that is served on the session's cluster, for every module that wants one of its own."""

import uuid
from collections.abc import Iterator

import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from deploying import Wait, publish, remove, submit_deploy
from heliostat.local import Cluster
from heliostat.storage import Store, connect


@pytest.fixture(scope="module")
def serve_client(cluster: Cluster, wait_until: Wait) -> Iterator[ServeSubmissionClient]:
    """Serve's own interface; what was deployed is gone afterwards."""
    client = ServeSubmissionClient(cluster.dashboard_url)
    yield client
    remove(client, wait_until)


@pytest.fixture(scope="module")
def store(cluster: Cluster, serve_client: ServeSubmissionClient) -> Store:
    """A registry with digits:1 and digits:2."""
    store = connect(f"{cluster.root}/serve-{uuid.uuid4().hex}")
    publish(store, 1)
    publish(store, 2)
    return store


@pytest.fixture(scope="module")
def digits(
    cluster: Cluster,
    store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Wait,
) -> str:
    """Where digits answers, after a job like a user's has deployed its first version."""
    spec = tmp_path_factory.mktemp("specs") / "digits.yaml"
    return submit_deploy(cluster, store, spec, wait_until)

"""A description of a cluster, rendered for a cloud's launcher or for Kubernetes."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import yaml

from heliostat import __version__
from heliostat.cluster import kuberay
from heliostat.environment import REQUIRED, TUNED
from heliostat.errors import HeliostatError
from heliostat.pools import POOLS, ClusterSpec, list_node_types, tell
from heliostat.spec import lay_over, load_section

Provider = Literal["aws", "gcp", "kuberay"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
# What is not said is Amazon's; on Google it is what comes next to that.
GCP: dict[str, Any] = {
    "region": "us-central1",
    "head": "n2-standard-8",
    "data": {"machine": "n2-standard-8"},
    "training": {"machine": "g2-standard-4"},
    "serving": {"machine": "n2-standard-8"},
}
NEEDED: dict[Provider, tuple[str, ...]] = {"aws": (), "gcp": ("project",), "kuberay": ("image",)}
WIDTH = 96
KUBERAY_HEADER = """\
# Heliostat on Kubernetes, for the operator KubeRay 1.7 or newer. Rendered by
#   heliostat cluster render --provider kuberay image={cluster.image} --out DIR
#
# Set up once, in the namespace of the cluster:
#   1. The image, with the wheel of `make wheel`, for a registry that the nodes reach:
#        FROM rayproject/ray:{ray}-py311-gpu
#        COPY dist/{wheel} constraints.txt /tmp/
#        RUN pip install --no-cache-dir -c /tmp/constraints.txt /tmp/{wheel}
#        COPY jobs jobs
#   2. The token, the one secret of the cluster: whoever holds it runs code on it.
#        openssl rand -hex 32 | tr -d '\\n' | kubectl create secret generic {cluster.name}-token \\
#            --from-file=auth_token=/dev/stdin
#   3. `kubectl apply -f base.yaml`: the service account that pods run as, which your cloud binds to
#      a role that may read and write s3://{cluster.bucket}, and the network policy: dashboard and
#      metrics are for the cluster itself, port 8000 for pods labelled {cluster.name}/client=true.
#
# Use: raycluster.yaml is a cluster to submit jobs to and to deploy on, through
#   kubectl port-forward service/{cluster.name}-head-svc 8265
# rayjob.yaml a cluster for one job, rayservice.yaml one that serves one version of a model. Before
# Serve belongs an ingress that drops x-request-timeout-seconds and x-request-disconnect-disabled.
"""


def describe(
    provider: Provider, path: str | Path | None, overrides: tuple[str, ...]
) -> ClusterSpec:
    """What `path` and `overrides` say of a cluster, and the defaults of the provider.

    Raises:
        HeliostatError: a key is unknown, missing or out of range, or a machine is another cloud's.
    """
    defaults = ClusterSpec().model_dump(mode="json")
    if provider == "gcp":
        defaults = lay_over(defaults, GCP)
    cluster = load_section(ClusterSpec, path, overrides, defaults)
    for key in NEEDED[provider]:
        if getattr(cluster, key) is None:
            raise HeliostatError(f"{provider} needs {key}: add {key}=... or a line of the file")
    _check_machines(provider, cluster)
    return cluster


def render(provider: Provider, cluster: ClusterSpec) -> dict[str, str]:
    """The files, by name; the first is the one that a cluster is started from."""
    if provider == "kuberay":
        return _render_manifests(cluster)
    names = {"aws": ("cluster.yaml", "account.sh"), "gcp": ("cluster.yaml",)}[provider]
    templates = {"cluster.yaml": f"{provider}.yaml"}
    return {name: _fill(templates.get(name, name), cluster) for name in names}


def name_wheel() -> str:
    """The file that `make wheel` leaves in dist."""
    return f"heliostat-{__version__}-py3-none-any.whl"


def _fill(template: str, cluster: ClusterSpec) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML and shell, of values whose pattern is checked
    )
    return environment.get_template(template).render(
        cluster=cluster,
        head=cluster.machines[0],
        nodes=list_node_types(cluster),
        pools=f'{POOLS}="{tell(cluster)}"',
        settings=_wrap_settings(),
        wheel=name_wheel(),
        render_map=_render_map,
    )


def _wrap_settings() -> list[str]:
    """The assignments of an `export` in lines that are not too long."""
    settings = {s.name: s.value for s in (*REQUIRED, *TUNED) if s.name.startswith("RAY_")}
    del settings["RAY_AUTH_MODE"]  # stands first, beside the token
    # A non-breaking space keeps a quoted value on its line.
    words = [f'{name}="{value}"' if " " in value else f"{name}={value}"
             for name, value in settings.items()]  # fmt: skip
    lines = textwrap.wrap(
        " ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words),
        WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _render_map(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _render_manifests(cluster: ClusterSpec) -> dict[str, str]:
    header = KUBERAY_HEADER.format(cluster=cluster, ray=kuberay.RAY_VERSION, wheel=name_wheel())
    files = {
        f"{name}.yaml": "---\n".join(_dump(manifest) for manifest in manifests)
        for name, manifests in kuberay.list_manifests(cluster).items()
    }
    return {"raycluster.yaml": header + files.pop("raycluster.yaml"), **files}


def _dump(manifest: kuberay.Manifest) -> str:
    dumper = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text: str = yaml.dump(manifest, Dumper=dumper, sort_keys=False, width=100)
    return text


def _check_machines(provider: Provider, cluster: ClusterSpec) -> None:
    clouds = {machine.provider for machine in cluster.machines}
    for machine in cluster.machines:
        if (machine.accelerator or "").startswith("TPU"):
            raise HeliostatError(f"{machine.name} has TPUs: choose a machine with GPUs or without")
        if provider not in ("kuberay", machine.provider):
            raise HeliostatError(
                f"{machine.name} is a machine of {machine.provider}, this is for {provider}: name "
                "machines of that, or leave them out"
            )
    if len(clouds) > 1:
        raise HeliostatError(
            f"machines of {' and '.join(sorted(clouds))} make no cluster: name those of one"
        )

"""Laws of what is rendered: the repository's file is the code's, and what is asked for is in it."""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat import cli
from heliostat.cluster.config import Config, check, exports, start_commands
from heliostat.cluster.render import describe, name_wheel, render
from heliostat.pools import POOLS, find_pool

ROOT = Path(__file__).parents[2]
GOOGLE = ("project=my-project",)
LAUNCHED = {"aws": (), "gcp": GOOGLE}


def render_config(provider: Any, *said: str) -> Config:
    (text, *_) = render(provider, describe(provider, None, (*LAUNCHED[provider], *said))).values()
    return dict(yaml.safe_load(text))


def test_the_repository_has_what_the_code_renders(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "render"]) == 0
    assert capsys.readouterr().out == (ROOT / "cluster.yaml").read_text(), "run `make render`"


@pytest.mark.parametrize("provider", LAUNCHED)
def test_what_is_rendered_keeps_the_rules(provider: Any, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    for said in ((), ("training.spot=false", "training.max_workers=64", "name=other")):
        files = render(provider, describe(provider, None, (*LAUNCHED[provider], *said)))
        path.write_text(files["cluster.yaml"])
        check(path)


@pytest.mark.parametrize("provider", LAUNCHED)
@settings(max_examples=20)
@given(bounds=st.tuples(st.integers(0, 50), st.integers(1, 50)), spot=st.booleans())
def test_a_pool_is_rendered_as_it_is_described(
    provider: str, bounds: tuple[int, int], spot: bool
) -> None:
    fewest, most = min(bounds), max(bounds)
    said = (f"min_workers={fewest}", f"max_workers={most}", f"spot={spot}", "disk_gib=77")
    config = render_config(provider, *(f"training.{word}" for word in said), "name=other")
    node = config["available_node_types"]["training"]
    assert (node["min_workers"], node["max_workers"]) == (fewest, most)
    assert ("spot" in str(node["node_config"]).lower()) == spot
    assert "77" in str(node["node_config"])
    assert config["cluster_name"] == "other"
    assert config["max_workers"] == most + 8 + 4
    gpus = node["resources"]["GPU"]
    for command in start_commands(config):
        pool = find_pool("training", {POOLS: exports(command)[POOLS]})
        assert pool
        assert (pool.machines, pool.gpus) == (most, gpus)


def test_files_and_settings_describe_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: mine\ntraining: {machine: p5.48xlarge, max_workers: 2}\n")
    cluster = describe("aws", path, ("training.max_workers=3", "data.min_workers=1"))
    assert (cluster.name, cluster.training.machine, cluster.training.max_workers) == (
        "mine",
        "p5.48xlarge",
        3,
    )
    assert (cluster.data.min_workers, cluster.data.max_workers) == (1, 8)


@pytest.mark.parametrize(
    ("provider", "said", "sentence"),
    [
        ("gcp", (), "gcp needs project"),
        ("kuberay", (), "kuberay needs image"),
        ("aws", ("head=n2-standard-8",), "n2-standard-8 is a machine of gcp"),
        ("aws", ("training.machine=h100",), "there is no machine 'h100'"),
        ("gcp", (*GOOGLE, "training.machine=ct5p-hightpu-4t"), "has TPUs"),
        ("kuberay", ("image=i", "head=n2-standard-8"), "machines of aws and gcp make no cluster"),
        ("aws", ("training.min_workers=9",), "min_workers 9 exceeds max_workers"),
        ("aws", ("training.gpus=9",), "training.gpus: unknown key"),
        ("aws", ("name=a b",), "name: "),
        ("aws", ("name='x\\n'",), "name: "),
        ("aws", ("bucket='$(reboot)'",), "bucket: "),
        ("gcp", ("project='a: b'",), "project: "),
        ("kuberay", ("image='a b'",), "image: "),
        ("kuberay", ("image=i", "serves=digits"), "serves: "),
    ],
)
def test_what_makes_no_cluster_is_refused_in_a_sentence(
    provider: str, said: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cluster", "render", "--provider", provider, *said]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_changed_copy_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    assert cli.main(["cluster", "render", "--out", str(path)]) == 0
    assert cli.main(["cluster", "check", str(path)]) == 0
    path.write_text(path.read_text().replace("--dashboard-host=127.0.0.1", "--dashboard-host=::"))
    capsys.readouterr()
    assert cli.main(["cluster", "check", str(path)]) == 2
    told = capsys.readouterr().err
    assert "everything but an edge with TLS listens on 127.0.0.1, but ::" in told
    assert told.count("\n") == 1


def test_a_folder_gets_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "render", "--out", str(tmp_path / "new")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == ["cluster.yaml", "account.sh"]
    assert all(Path(path).exists() for path in written)
    assert cli.main(["cluster", "render", "--out", "/dev/null/x"]) == 2


def list_shell() -> dict[str, str]:
    files = {"account.sh": render("aws", describe("aws", None, ()))["account.sh"]}
    for provider in LAUNCHED:
        config = render_config(provider)
        commands = [c for key in config if key.endswith("_commands") for c in config[key]]
        files |= {f"{provider} {number}": text for number, text in enumerate(commands)}
    return files


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint() -> None:
    for name, text in list_shell().items():
        # SC2155: the exit status of a command within export; SC2016: $HOME for a later shell
        arguments = ["shellcheck", "--shell=bash", "--exclude=SC2155,SC2016", "-"]
        done = subprocess.run(arguments, input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout}"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_takes_its_config_and_listens_inside(tmp_path: Path) -> None:
    config = render_config("aws")
    (command,) = (c for c in config["head_setup_commands"] if "prometheus.yml" in c)
    subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True)
    written = tmp_path / "heliostat-prometheus.yml"
    # What the Rays of this machine left behind is not judged.
    written.write_text(written.read_text().replace("/tmp/ray/", f"{tmp_path}/"))
    subprocess.run(["promtool", "check", "config", str(written)], check=True)
    (start,) = (c for c in config["head_start_ray_commands"] if "setsid prometheus" in c)
    assert "--web.listen-address=127.0.0.1:9090" in shlex.split(start)
    assert str(written).removeprefix(str(tmp_path)) in start


def test_the_wheel_that_is_mounted_is_the_one_that_is_installed() -> None:
    config = render_config("aws")
    assert config["file_mounts"][f"~/heliostat/{name_wheel()}"] == f"dist/{name_wheel()}"
    assert any(f"-c constraints.txt {name_wheel()}" in c for c in config["setup_commands"])

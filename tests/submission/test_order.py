"""What is asked of Ray for a job: its command, its files, and no credential anywhere in it."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.errors import HeliostatError
from heliostat.submission import order
from heliostat.submission.order import Order
from heliostat.submission.upload import CACHES, SECRETS

CHECKOUT = Path(__file__).parents[2]


def test_the_printed_command_is_what_ray_is_asked() -> None:
    words = ("python", "jobs/train.py", "it's.yaml")
    asked = Order("train-a b", words, {"py_modules": ["p"]}, None, {"w": "x"}, cpus=1)
    assert shlex.split(asked.render()) == [
        *("ray", "job", "submit", "--submission-id", "train-a b", "--working-dir", "."),
        *("--runtime-env-json", '{"py_modules": ["p"]}', "--metadata-json", '{"w": "x"}'),
        *("--entrypoint-num-cpus", "1", "--", "python", "jobs/train.py", "it's.yaml"),
    ]


def test_the_runtime_environment_of_the_checkout_keeps_back_all_that_submit_does() -> None:
    path = CHECKOUT / "jobs/runtime_env.yaml"
    assert {*CACHES, *SECRETS} <= {*yaml.safe_load(path.read_text())["excludes"]}
    assert order.read_environment(path) == (yaml.safe_load(path.read_text()), True)


def test_what_another_runtime_environment_leaves_out_is_added(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("pip: [orjson]\nexcludes: [.env, data/]")
    environment, is_whole = order.read_environment(path)
    assert not is_whole
    assert environment["pip"] == ["orjson"]
    assert {*CACHES, *SECRETS, "data/"} == {*environment["excludes"]}
    assert environment["excludes"].count(".env") == 1


@pytest.mark.parametrize(
    "document",
    [
        {"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}},
        {"env_vars": {"AWS_ACCESS_KEY_ID": "x"}},
        {"env_vars": {"HF_TOKEN": "x"}},
        {"env_vars": {"PGPASSWORD": "x"}},
        {"env_vars": {"OPENAI_API_KEY": "x"}},
        {"env_vars": {"X": "AKIAIOSFODNN7EXAMPLE"}},
        {"env_vars": {"X": f"hs_{'0' * 16}_{'1' * 64}"}},
        {"pip": {"packages": ["--index-url https://me:pw@pypi.example.com/simple"]}},
    ],
)
def test_a_credential_is_refused_by_its_key_and_never_shown(document: dict[str, Any]) -> None:
    ((_, inner),) = document.items()
    ((key, value),) = inner.items()
    with pytest.raises(HeliostatError, match=key) as refused:
        order.refuse_credentials(document, "env.yaml")
    assert str(value) not in str(refused.value).replace("Ray shows", "") or value == "x"


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_TOKEN_PATH",
        "MONKEY",
        "AWS_PROFILE",
        "KEYBOARD",
        "TOKENS",
    ],
)
def test_what_only_sounds_like_a_credential_passes(name: str) -> None:
    order.refuse_credentials({"env_vars": {name: "1"}, "pip": ["torch==2.13.0"]}, "env.yaml")


def test_a_switch_is_no_credential() -> None:
    order.refuse_credentials({"deploy.auth": "false"}, "the command line")
    with pytest.raises(HeliostatError):
        order.refuse_credentials({"deploy.auth": "falsehood"}, "the command line")


def test_a_job_is_found_by_its_name_or_path_below_the_directory() -> None:
    assert order.find_job("train", CHECKOUT) == "jobs/train.py"
    assert order.find_job("jobs/train.py", CHECKOUT) == "jobs/train.py"
    with pytest.raises(HeliostatError, match=r"no job 'trian'.*prepare"):
        order.find_job("trian", CHECKOUT)
    with pytest.raises(HeliostatError, match="is not below"):
        order.find_job(str(CHECKOUT / "jobs/train.py"), CHECKOUT / "tests")


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "x" * 101, "$(id)"])
def test_a_job_has_a_name_that_a_shell_and_a_url_take(name: str) -> None:
    with pytest.raises(HeliostatError, match="cannot name a job"):
        order.check_id(name)

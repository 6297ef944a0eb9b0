"""`heliostat plan` as a user meets it: a table, JSON, and sentences where it cannot be."""

import json
from pathlib import Path

import pytest

from heliostat.cli import main

GPT = """
name: small
data: {source: s3://nowhere/texts, text: {vocab: 1000, block: 64}}
model: {kind: gpt, layers: 2, width: 64, heads: 4}
train: {workers: 2, global_batch: 16}
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(GPT)
    return str(path)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_all_machines_are_compared(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ask(capsys, spec, "--tokens", "1e6", "train.gpus_per_worker=1")
    assert status == 0
    assert out.startswith("small: gpt, 170,816 parameters, ")
    (cheapest,) = (line for line in out.splitlines() if "cheapest" in line)
    assert "$" not in cheapest
    assert len([line for line in out.splitlines() if " x " in line]) > 8
    assert "TPU" not in out


def test_one_machine_is_described_by_part(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ask(capsys, spec, "--tokens", "1e6", "--on", "m7i.4xlarge")
    assert status == 0
    for name in ("weights", "gradients", "optimizer", "activations", "framework", "total",
                 "compute", "update", "exchange", "network", "storage", "reading", "checkpoint",
                 "time", "money", "energy"):  # fmt: skip
        assert f"\n{name} " in out
    assert "fits with" in out
    assert "977 steps" in out  # 1e6 tokens, 16 rows of 64 a step


def test_json_says_the_same(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (spec, "--tokens", "1e6", "--on", "m7i.4xlarge", "--utilisation", "0.3", "--json")
    status, out, _ = ask(capsys, *words)
    (plan,) = json.loads(out)
    assert (status, plan["machine"], plan["machines"], plan["fits"]) == (0, "m7i.4xlarge", 1, True)
    assert plan["memory_bytes"] == sum(part["value"] for part in plan["memory"])
    assert all(part["reason"] and part["source"] for part in plan["memory"])
    assert plan["utilisation"]["value"] == 0.3
    assert plan["run"]["steps"] == 977


def test_a_setting_changes_the_plan(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = ask(
        capsys, spec, "--json", "--on", "m7i.4xlarge", "train.steps=5", "model.width=128"
    )
    (plan,) = json.loads(out)
    assert plan["run"]["steps"] == 5
    assert plan["parameters"] > 170_816


def test_what_fits_nowhere_is_told_with_a_remedy(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("model.width=16384", "model.layers=10", "model.heads=128", "train.steps=1")
    big = (*size, "train.gpus_per_worker=1", "train.global_batch=64", "train.workers=64")
    status, out, _ = ask(capsys, spec, *big)
    assert status == 2
    advice = out.partition("It does not fit. It would with:")[2].split()
    assert "train.strategy=fsdp" in advice
    machine = advice[advice.index("--on") + 1]
    settings = out.partition(f"--on {machine} ")[2].splitlines()[0].split()
    status, out, _ = ask(capsys, spec, *big, "--on", machine, *settings)
    assert status == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give --rows or --tokens, or set train.steps"),
        (["--tokens", "1e6", "--on", "p9"], "there is no machine 'p9' in the table"),
        (["--tokens", "1e6", "--on", "g4dn.xlarge"], "wants 0 GPUs, g4dn.xlarge has 1 x T4"),
        (["model.width=63"], "width 63 is not a multiple of heads"),
    ],
)
def test_what_is_missing_or_wrong_is_one_sentence(
    spec: str, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    status, out, err = ask(capsys, spec, *words)
    assert (status, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["--tokens", "many"], ["--tokens", "0.5"], ["--utilisation", "2"], ["--pue", "x"]]
)
def test_a_number_that_is_none_is_refused(
    spec: str, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit):
        ask(capsys, spec, *words)
    assert words[0] in capsys.readouterr().err


def test_what_depends_on_the_data_wants_it_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "home"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "table.yaml"
    path.write_text(
        f"name: t\nroot: {tmp_path}/root\ndata: {{source: {tmp_path}/raw, label: y}}\n"
        "model: {kind: mlp}\n"
    )
    status, _, err = ask(capsys, str(path))
    assert status == 2
    assert len(err.strip().splitlines()) == 1


def test_a_load_is_planned_in_replicas(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = (spec, "--requests-per-second", "50", "--prompt-tokens", "500", "--new-tokens", "100")
    status, out, _ = ask(capsys, *load, "deploy.max_context=600")
    assert status == 0
    head, *lines = out.splitlines()
    assert head.split()[:6] == ["machines", "each", "on", "replicas", "streams", "memory"]
    assert all(" vCPU " in line for line in lines)  # our own engine
    gpus = ("deploy.engine=vllm", "deploy.gpus_per_replica=1", "deploy.max_context=600")
    _, out, _ = ask(capsys, *load, *gpus)
    assert len(out.splitlines()) > 8
    assert " vCPU " not in out

    words = (*load, "--on", "m7i.4xlarge", "--json", "deploy.max_context=600")
    _, out, _ = ask(capsys, *words)
    (plan,) = json.loads(out)
    assert plan["replicas"]["most_requests"] >= 50
    # 2 layers of keys and values of 64 numbers, float32, 600 tokens each of 32 streams
    cache = 32 * 600 * 2 * 2 * 64 * 4
    assert plan["replicas"]["bytes"] == 170_816 * 4 + cache


def test_what_is_too_slow_everywhere_is_said(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ("--prompt-tokens", "32", "--new-tokens", "32")
    load = (spec, "--requests-per-second", "1", "--latency-ms", "0.001", *tokens)
    status, _, err = ask(capsys, *load)
    assert status == 2
    assert "no machine of the table can" in err
    status, _, err = ask(capsys, *load, "--on", "m7i.4xlarge")
    assert status == 2
    assert "for one stream alone" in err


def test_a_text_that_would_be_refused_is_not_planned(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = ask(capsys, spec, "--requests-per-second", "1", "--prompt-tokens", "64")
    assert status == 2
    assert "64 + 128 tokens exceeds the 64 that are served" in err


def test_a_latency_without_a_load_is_refused(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = ask(capsys, spec, "--latency-ms", "5")
    assert status == 2
    assert "give --requests-per-second" in err

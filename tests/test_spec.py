"""Laws of the spec: what is dumped reads back, and what is wrong is named by its path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from heliostat import spec
from heliostat.errors import HeliostatError

LONGEST_MESSAGE = 2000


def document(**changes: Any) -> dict[str, Any]:
    return {"name": "digits", "data": {"source": "s3://raw"}, "model": {"kind": "mlp"}} | changes


def nest(path: str, value: Any) -> dict[str, Any]:
    """A whole document in which `path` is `value`."""
    result = document()
    section = result
    *parents, last = path.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return result


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(HeliostatError) as caught:
        read()
    message = str(caught.value)
    assert len(message) < LONGEST_MESSAGE
    assert message.isprintable()
    return message


small = st.integers(1, 1000)
share = st.floats(0, 0.4)
split = st.fixed_dictionaries({}, optional={"validation": share, "test": share}) | st.just(
    {"test_files": "t10k-*", "validation": 0.2}
)
data = st.fixed_dictionaries(
    {"source": st.text()},
    optional={
        "format": st.sampled_from(["auto", "images", "idx", "csv", "parquet"]),
        "label": st.text() | st.none(),
        "columns": st.dictionaries(st.text(), st.sampled_from(["numeric", "category", "ignore"])),
        "image_size": st.tuples(small, small).map(list) | st.none(),
        "channels": st.sampled_from([1, 3, None]),
        "split": split,
        "seed": st.integers(0, 2**63 - 1),
    },
)
model = st.fixed_dictionaries(
    {"kind": st.just("mlp")},
    optional={
        "hidden": st.lists(small, min_size=1),
        "dropout": st.floats(0, 1, exclude_max=True),
    },
) | st.fixed_dictionaries(
    {"kind": st.just("cnn")},
    optional={"channels": st.lists(small, min_size=1), "hidden": st.lists(small)},
)
train = st.fixed_dictionaries(
    {},
    optional={
        "workers": st.integers(1, 64),
        "steps": small | st.none(),
        "optimizer": st.fixed_dictionaries(
            {"kind": st.sampled_from(["sgd", "adam", "adamw"])},
            optional={"lr": st.floats(1e-6, 10), "weight_decay": st.floats(0, 1)},
        ),
    },
)
names = st.from_regex(spec.NAME_PATTERN, fullmatch=True)
documents = st.fixed_dictionaries(
    {"name": names, "data": data, "model": model}, optional={"train": train, "root": st.text()}
)


@given(documents)
def test_a_dumped_spec_reads_back(document: dict[str, Any]) -> None:
    run = spec.parse(document)
    dumped = spec.dump(run)
    assert spec.parse(dumped) == run
    assert spec.parse(yaml.safe_load(yaml.safe_dump(dumped))) == run
    assert spec.digest(spec.dump(spec.parse(dumped))) == spec.digest(dumped)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec.parse(document()).name = "other"


SECTIONS = [
    "",
    "data.",
    "data.split.",
    "model.",
    "train.",
    "train.optimizer.",
    "evaluate.",
    "deploy.",
]


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_named_by_its_path_alone(section: str) -> None:
    message = refusal(lambda: spec.parse(nest(f"{section}secret_key", "hunter2")))
    told, _, known = message.partition(", known are ")
    assert told == f"the spec: {section}secret_key: unknown key"
    assert "hunter2" not in known


WRONG: dict[str, list[Any]] = {
    "name": [None, 5, "", "../x", ["digits"], {}],
    "root": [None, 5, ["s3://a"]],
    "data": [None, "s3://raw", []],
    "data.source": [None, 5, {}],
    "data.format": ["xml", 1, None],
    "data.label": [5, [], ["a", 5]],
    "data.columns": [["a"], "a", {"mlp": "number"}, {"a": None}],
    "data.image_size": [28, "28", [28], [28, 28, 3], [0, 28], [1.5, 2]],
    "data.channels": [2, "1", 4],
    "data.max_categories": [0, 10_001, True],
    "data.max_bad_rows": [-1, 0.5, "few", True],
    "data.split.test": [True, 1.5, -0.1, "half", None, float("nan")],
    "data.seed": ["x", 0.5, None, -1, 2**64],
    "model": [None, "mlp", [], 3],
    "model.kind": ["svm", None, 5, ["mlp"], {}],
    "model.hidden": [64, "64", [0], [1.5], None],
    "train": [None, [], "fast"],
    "train.run": ["a/b", 5, "A"],
    "train.workers": [0, -1, 1.5, "two", None, True, [2]],
    "train.optimizer.lr": [True, "1", 0, -1, "fast", None, float("inf"), float("nan")],
    "train.optimizer.kind": ["lion", None],
    "deploy.start_timeout_s": [0, float("inf"), True],
    "deploy.request_timeout_s": [0, float("inf"), False],
    "deploy.auth": [None, "off", 0, 1, {}],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in WRONG.items() for v in values])
def test_a_wrong_value_is_named_by_its_path(path: str, value: Any) -> None:
    message = refusal(lambda: spec.parse(nest(path, value)))
    assert message.startswith(f"the spec: {path}")
    for word in ("discriminator", "union", "instance of", "Spec"):
        assert word not in message


@pytest.mark.parametrize("missing", ["name", "data", "model", "data.source", "model.kind"])
def test_a_missing_key_is_named_by_its_path(missing: str) -> None:
    whole = document()
    section, _, key = missing.rpartition(".")
    del (whole[section] if section else whole)[key]
    assert refusal(lambda: spec.parse(whole)) == f"the spec: {missing}: required, but missing"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"source": "a", "split": {"test": 0.5, "validation": 0.5}}}, "no rows for train"),
        ({"data": {"source": "a", "split": {"test": 0.5, "test_files": "b"}}}, "not both"),
        ({"train": {"workers": 4, "global_batch": 3}}, "at least workers (4)"),
        ({"train": {"optimizer": {"momentum": 0.9}}}, "momentum belongs to sgd"),
    ],
)
def test_keys_that_contradict_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: spec.parse(document(**changes)))


@pytest.mark.parametrize(
    "hostile",
    [
        {"\x1b[31mred\nname": 1},
        {"k" * 100_000: 1},
        {f"key{i}": 1 for i in range(10_000)},
        {"name": "x" * 100_000},
        {"train": {"workers": "y" * 100_000}},
        {"train": {"workers": 10**400}},
        {"data": {"source": "a", "columns": {"\n" * 1000: "z" * 100_000}}},
        {5: 1},
    ],
)
def test_hostile_documents_get_a_short_printable_sentence(hostile: dict[Any, Any]) -> None:
    refusal(lambda: spec.parse(document() | hostile))


def test_sections_are_never_printed() -> None:
    secret = {"kind": "gpt", "aws_secret_access_key": "hunter2", "workers": ["hunter2"]}
    whole = document(data=secret, model=secret, train=secret)
    assert "hunter2" not in refusal(lambda: spec.parse(whole))


@given(st.text(max_size=100) | names)
def test_a_name_is_safe_or_refused(name: str) -> None:
    safe = (
        1 <= len(name) <= 63
        and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        and name[0].isalnum()
        and ".." not in name
    )
    if safe:
        assert spec.check_name(name) == name
    else:
        assert spec.NAME_RULE in refusal(lambda: spec.check_name(name))


@given(names)
def test_every_name_is_one_for_the_spec_too(name: str) -> None:
    assert spec.parse(document(name=name, train={"run": name})).name == spec.check_name(name)


@given(st.text(max_size=100))
def test_names_are_refused_alike_everywhere(name: str) -> None:
    def passes(read: Callable[[], object]) -> bool:
        try:
            read()
        except HeliostatError:
            return False
        return True

    assert passes(lambda: spec.parse(document(name=name))) == passes(lambda: spec.check_name(name))


def test_overrides_win_over_the_file(write: Callable[[str], Path]) -> None:
    path = write(yaml.safe_dump(document(train={"epochs": 3})) + "deploy:\n")
    overrides = (
        "train.epochs=5",
        "train.optimizer.lr=1e-4",
        "deploy.replicas=2",
        "data.image_size=[28, 28]",
        "data.columns.age=numeric",
        "train.run=night-1",
        "train.epochs=7",
    )
    run = spec.load(path, overrides)
    assert (run.train.epochs, run.train.optimizer.lr, run.deploy.replicas) == (7, 1e-4, 2)
    assert (run.data.image_size, run.data.columns) == ((28, 28), {"age": "numeric"})
    assert (run.train.run, run.name) == ("night-1", "digits")


@pytest.mark.parametrize("override", ["", "train", "train.=1", ".epochs=1", "=", "train..x=1"])
def test_what_is_no_override_is_told_the_form(write: Callable[[str], Path], override: str) -> None:
    path = write(yaml.safe_dump(document()))
    assert "write section.key=value" in refusal(lambda: spec.load(path, (override,)))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=1", "train.epoch: unknown key"),
        ("trains.epochs=1", "trains: unknown key"),
        ("train.epochs=many", "train.epochs: should be a valid integer"),
        ("name.first=a", "name is a value, not a section"),
        ("data.columns={", "is not YAML"),
        ("data.label=2024-13-45", "is not YAML"),
        ("data.seed=" + "9" * 5000, "is not YAML"),
        ("data.seed=0b_", "is not YAML"),
        ("data.columns=" + "[" * 5000, "is not YAML"),
    ],
)
def test_a_bad_override_is_named(write: Callable[[str], Path], override: str, said: str) -> None:
    path = write(yaml.safe_dump(document()))
    assert said in refusal(lambda: spec.load(path, (override,)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("name: [", "is not YAML"),
        ("name: 2024-13-45", "is not YAML"),
        ("name: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("name: a\0b", "is not YAML"),
        ("name: a\nname: b", "the key name is given twice"),
        ("train: {epochs: 1, seed: 2, epochs: 3}", "the key epochs is given twice"),
        ("name: &a digits\nroot: *a", "aliases are not read"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_spec_is_named(
    write: Callable[[str], Path], text: str, said: str
) -> None:
    path = write(text)
    message = refusal(lambda: spec.load(path))
    assert said in message
    assert str(path) in message


def test_a_yaml_bomb_is_refused_in_a_sentence(write: Callable[[str], Path]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path = write("\n".join([*lines, "name: a", "model: {kind: *a11}"]))
    assert "aliases are not read" in refusal(lambda: spec.load(path))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    assert f"cannot read the spec {path}" in refusal(lambda: spec.load(path))


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_a_digest_ignores_the_order_of_keys(values: dict[str, Any]) -> None:
    assert spec.digest(dict(reversed(values.items()))) == spec.digest(values)
    assert spec.digest({**values, "one more": 1.5}) != spec.digest(values)


def test_a_digest_takes_any_text() -> None:
    assert spec.digest("\ud800") != spec.digest("\ud801")


@pytest.mark.parametrize(
    ("override", "said"),
    [("seed=x", "seed: should be a valid"), ("sed=1", "sed: unknown key"), ("seed", "key=value")],
)
def test_options_alone_are_checked_like_a_section(override: str, said: str) -> None:
    assert spec.parse_options(spec.SplitSpec, ("validation=0.2",)).validation == 0.2
    message = refusal(lambda: spec.parse_options(spec.DataSpec, ("source=a", override)))
    assert said in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.checkpoint_steps=often", "should be a valid integer or 'auto', given 'often'"),
        ("train.micro_batch=0", "should be greater than 0 or 'auto', given 0"),
        ("train.workers=x", "should be a valid integer or a list, given 'x'"),
        ("train.workers={a: 1}", "should be a valid integer or a list"),
    ],
)
def test_a_value_of_two_kinds_is_refused_in_one_sentence(override: str, told: str) -> None:
    with pytest.raises(HeliostatError) as refused:
        spec.load("jobs/specs/digits.yaml", (override,))
    key = override.partition("=")[0]
    assert str(refused.value) == f"jobs/specs/digits.yaml: {key}: {told}"


def test_of_a_list_only_the_wrong_item_is_named() -> None:
    with pytest.raises(
        HeliostatError, match=r"yaml: train.workers.0: should be greater than 0, given 0$"
    ):
        spec.load("jobs/specs/digits.yaml", ("train.workers=[0,4]",))

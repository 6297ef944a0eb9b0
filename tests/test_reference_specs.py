"""The specs of the reference models say what they are meant to, down to the number of weights."""

from itertools import pairwise
from pathlib import Path

import pytest

from heliostat.models import build, count_parameters
from heliostat.signature import (
    Classes,
    Input,
    Interaction,
    Numbers,
    Output,
    Picture,
    Series,
    Signature,
    Vector,
)
from heliostat.spec import load

SPECS = Path(__file__).resolve().parent.parent / "jobs/specs"
TEN = tuple(f"y{number}" for number in range(10))
TEN_CLASSES = Classes(tuple("0123456789"))
STARS = Numbers(("rating:float",), (3.5,), (1.1,))


def count_dense(*widths: int) -> int:
    return sum((before + 1) * after for before, after in pairwise(widths))


@pytest.mark.parametrize(
    ("name", "takes", "gives", "parameters"),
    [
        (
            "regression_mlp",
            Vector(1000),
            Numbers(TEN, (0.0,) * 10, (1.0,) * 10),
            count_dense(1000, 500, 100, 10),
        ),
        ("binary_mlp", Vector(1000), Classes(("0", "1")), count_dense(1000, 500, 250, 100, 1)),
        ("digits_mlp", Picture(1, 28, 28), TEN_CLASSES, count_dense(784, 128, 64, 10)),
        (
            "lenet",
            Picture(3, 32, 32),
            TEN_CLASSES,
            (3 * 25 + 1) * 6 + (6 * 25 + 1) * 16 + count_dense(400, 120, 84, 10),
        ),
        ("movielens", Interaction((944, 1651), 0), STARS, None),
        ("vowels", Series(29, 12), Classes(tuple("123456789")), None),
    ],
)
def test_a_reference_spec_builds_the_network_it_names(
    name: str, takes: Input, gives: Output, parameters: int | None
) -> None:
    model = build(load(SPECS / f"{name}.yaml").model, Signature(takes, gives))
    assert parameters in (None, count_parameters(model))


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_spec_opens_with_its_data_and_is_complete(path: Path) -> None:
    spec = load(path)
    assert path.read_text().startswith("# ")
    assert spec.name == path.stem.replace("_", "-")
    assert spec.data.source.startswith("s3://heliostat/raw/")

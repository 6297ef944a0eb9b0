"""What differs between two specs: every key once, by its path."""

import pytest

from heliostat.errors import HeliostatError
from heliostat.spec.difference import diff, refuse_changes

BEFORE = {"data": "digits@1", "model": {"kind": "mlp", "hidden": [64, 32]}, "train": {"lr": 0.1}}


def test_every_key_that_differs_is_told_with_both_values() -> None:
    after = {"data": "digits@1", "model": {"kind": "mlp", "hidden": [64]}, "train": {"ema": 0.9}}
    assert diff(BEFORE, after) == [
        "model.hidden: [64, 32] -> [64]",
        "train.ema: absent -> 0.9",
        "train.lr: 0.1 -> absent",
    ]
    assert diff(after, after) == []


def test_a_changed_spec_is_refused_with_its_first_five_keys() -> None:
    refuse_changes("a", BEFORE, BEFORE)
    changed = {"train": {f"key{number}": number for number in range(7)}}
    with pytest.raises(HeliostatError) as caught:
        refuse_changes("a", {}, changed)
    assert "train.key4: absent -> 4; and 2 more" in str(caught.value)
    assert "key5" not in str(caught.value)

"""What goes over the wire: rows in, predictions and errors out."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heliostat.data.features import (
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
)
from heliostat.serve.protocol import (
    MAX_INSTANCES,
    parse_body,
    render_predictions,
    zero_instance,
)
from heliostat.serve.replies import JSON_TYPE, Refusal, render_error
from heliostat.signature import Classes

GREY = ImageFeatures(2, 3, 1, (0.5,), (0.25,))
COLOUR = ImageFeatures(2, 3, 3, (0.5,) * 3, (0.25,) * 3)
TABLE = TableFeatures((NumericColumn("age", 40.0, 10.0, False), CategoryColumn("job", ("a", "b"))))
PIXELS = [[0, 1, 2], [3, 4, 255]]


def encode_png(pixels: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parse(features: Features, instances: object) -> dict[str, list[object]]:
    body = json.dumps({"instances": instances}).encode()
    return {name: v.tolist() for name, v in parse_body(features, JSON_TYPE, body).items()}


def refuse(features: Features, content_type: str, body: bytes) -> Refusal:
    with pytest.raises(Refusal) as refusal:
        parse_body(features, content_type, body)
    return refusal.value


def test_an_image_is_the_same_as_numbers_as_base64_and_as_a_file() -> None:
    file = encode_png(PIXELS)
    numbers = parse(GREY, [PIXELS])
    assert parse(GREY, [{"b64": base64.b64encode(file).decode()}]) == numbers
    assert parse_body(GREY, "image/png", file)["image"].tolist() == numbers["image"]


@pytest.mark.parametrize("pixels", [PIXELS, [[0.5, 1, 2], [3, 4, 255.0]]])
@pytest.mark.parametrize("body", ['{"instances":%s}', ' {\n"instances" : %s }\n'])
def test_pixels_are_the_same_however_they_are_written(pixels: Any, body: str) -> None:
    text = (body % json.dumps([pixels])).encode()
    found = parse_body(GREY, JSON_TYPE, text)["image"]
    assert found.shape == (1, 2, 3, 1)
    assert found[0, :, :, 0].tolist() == pixels


@pytest.mark.parametrize(
    ("pixel", "status", "field"),
    [
        ("256", 422, "instances[1][0][0]"),
        ("-1", 422, "instances[1][0][0]"),
        ("255.00000001", 422, "instances[1][0][0]"),
        ("[1]", 422, "instances[1][0][0]"),
        ("null", 422, "instances[1][0][0]"),
        ("1,1", 422, "instances[1][0]"),
        ("1 1", 400, None),
        ("", 400, None),
    ],
)
def test_a_pixel_that_is_none_is_refused_by_its_path(
    pixel: str, status: int, field: str | None
) -> None:
    body = f'{{"instances": [[[0, 1, 2], [3, 4, 255]], [[{pixel}, 1, 2], [3, 4, 255]]]}}'
    refusal = refuse(GREY, JSON_TYPE, body.encode())
    assert (refusal.status, refusal.field) == (status, field)


def encode_blank(side: int) -> bytes:
    """A square of one bit per pixel: 8 KB for 64 million of them."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_that_takes_long_to_decode_is_refused_with_the_numbers() -> None:
    file = encode_blank(8000)
    body = json.dumps({"instances": [{"b64": base64.b64encode(file).decode()}]}).encode()
    for content_type, sent in (("image/png", file), (JSON_TYPE, body)):
        refusal = refuse(GREY, content_type, sent)
        assert (refusal.status, refusal.field) in [(422, "body"), (422, "instances[0].b64")]
        assert "8000x8000 is more than 25,000,000 pixels" in refusal.message


def test_images_that_take_long_together_are_refused_before_one_is_decoded() -> None:
    cut = base64.b64encode(encode_blank(4000)[:-100]).decode()
    for count, field in ((4, "instances[0].b64"), (5, "instances")):
        body = json.dumps({"instances": [{"b64": cut}] * count}).encode()
        refusal = refuse(GREY, JSON_TYPE, body)
        assert (refusal.status, refusal.field) == (422, field)
    assert "80,000,000 pixels, a request may have 64,000,000" in refusal.message


def test_rows_keep_their_order() -> None:
    rows = [{"age": age, "job": job} for age, job in ((1, "a"), (2.5, "b"), (3, None))]
    assert parse(TABLE, rows) == {
        "numbers": [[1.0], [2.5], [3.0]],
        "x.job": ["a", "b", None],
    }


@pytest.mark.parametrize("features", [GREY, COLOUR, TABLE], ids=["grey", "colour", "table"])
def test_an_instance_of_zeros_is_accepted(features: Features) -> None:
    assert len(next(iter(parse(features, [zero_instance(features)]).values()))) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b'{"instances": ["\xff"]}',
        b'{"instances": [NaN]}',
        b'{"instances": [-Infinity]}',
        b'{"instances": [' + b"9" * 5000 + b"]}",
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"instances": []} {}',
        '{"instances": []}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_400(body: bytes) -> None:
    assert refuse(GREY, JSON_TYPE, body).status == 400


@pytest.mark.parametrize(
    ("features", "document", "field"),
    [
        (GREY, [], "body"),
        (GREY, None, "body"),
        (GREY, {}, "instances"),
        (GREY, {"instances": None}, "instances"),
        (GREY, {"instances": []}, "instances"),
        (GREY, {"instances": {}}, "instances"),
        (GREY, {"instances": [0] * (MAX_INSTANCES + 1)}, "instances"),
        (GREY, {"instances": [PIXELS], "dtype": "uint8"}, "dtype"),
        (GREY, {"instances": [PIXELS, [[1, 2], [3, 4]]]}, "instances[1][0]"),
        (GREY, {"instances": [[[0, 1, "2"], [3, 4, 5]]]}, "instances[0][0][2]"),
        (GREY, {"instances": [[[0, 1, 256], [3, 4, 5]]]}, "instances[0][0][2]"),
        (GREY, {"instances": [{"b64": "@"}]}, "instances[0].b64"),
        (GREY, {"instances": [{"b64": "AAAA"}]}, "instances[0].b64"),
        (COLOUR, {"instances": [PIXELS]}, "instances[0][0][0]"),
        (TABLE, {"instances": [{"age": 1, "job": "a"}, {"job": "a"}]}, "instances[1].age"),
        (TABLE, {"instances": [{"age": None}]}, "instances[0].age"),
        (TABLE, {"instances": [{"age": True}]}, "instances[0].age"),
        (TABLE, {"instances": [{"age": "40"}]}, "instances[0].age"),
        (TABLE, {"instances": [{"age": 1, "job": 7}]}, "instances[0].job"),
        (TABLE, {"instances": [{"age": 1, "wage": 7}]}, "instances[0].wage"),
    ],
)
def test_what_the_model_cannot_take_is_422_and_names_the_field(
    features: Features, document: object, field: str
) -> None:
    refusal = refuse(features, JSON_TYPE, json.dumps(document).encode())
    assert (refusal.status, refusal.field) == (422, field)


@pytest.mark.parametrize("number", ["1e999", "9" * 4000])
def test_a_number_that_no_float_holds_is_422(number: str) -> None:
    body = f'{{"instances": [{{"age": {number}}}]}}'.encode()
    assert refuse(TABLE, JSON_TYPE, body).field == "instances[0].age"


@pytest.mark.parametrize(
    ("features", "content_type"),
    [(GREY, ""), (GREY, "text/plain"), (GREY, "image/gif"), (TABLE, "image/png"), (TABLE, "json")],
)
def test_another_content_type_is_415(features: Features, content_type: str) -> None:
    assert refuse(features, content_type, b"{}").status == 415


def test_a_charset_is_no_other_content_type() -> None:
    body = json.dumps({"instances": [PIXELS]}).encode()
    assert parse_body(GREY, "Application/JSON; charset=utf-8", body)["image"].shape == (1, 2, 3, 1)


def test_a_broken_image_file_is_422() -> None:
    assert refuse(GREY, "image/jpeg", b"GIF89a").field == "body"


def test_an_answer_gives_each_probability_exactly() -> None:
    probabilities = np.array([[0.1, 0.9], [0.7, 0.3]], dtype=np.float32)
    answer = json.loads(render_predictions("digits", 3, Classes(("no", "yes")), probabilities))
    assert (answer["model"], answer["version"]) == ("digits", 3)
    assert [p["class"] for p in answer["predictions"]] == ["yes", "no"]
    for row, prediction in zip(probabilities, answer["predictions"], strict=True):
        assert np.array_equal(
            np.array(list(prediction["probabilities"].values()), dtype=np.float32), row
        )
        assert prediction["probability"] == max(prediction["probabilities"].values())


def test_a_row_that_overflows_the_model_is_422() -> None:
    probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]], dtype=np.float32)
    with pytest.raises(Refusal) as refusal:
        render_predictions("digits", 3, Classes(("no", "yes")), probabilities)
    assert (refusal.value.status, refusal.value.field) == (422, "instances[1]")


def test_an_error_repeats_only_the_start_of_what_the_client_sent() -> None:
    content = render_error(422, "m" * 10_000, "id", "f" * 10_000)
    assert len(content) < 1000

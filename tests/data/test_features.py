"""One code turns rows into inputs: for training, for evaluation and for requests."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from heliostat.data.encoding import encode
from heliostat.data.features import (
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
    features_from_json,
    features_to_json,
    input_of,
)
from heliostat.data.instances import FieldError, parse_instances
from heliostat.data.pixels import STORED, STRIP_PIXELS, decode_image, fit_image
from heliostat.signature import Picture, Vector

GREY = ImageFeatures(2, 3, 1, (0.25,), (0.5,))
COLOUR = ImageFeatures(2, 2, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
TABLE = TableFeatures(
    (
        NumericColumn("age", 40.0, 10.0, has_missing=True),
        NumericColumn("hours", 8.0, 2.0, has_missing=False),
        CategoryColumn("town", ("Köln", "Ulm")),
    )
)
GREY_PIXELS = [[0, 51, 102], [153, 204, 255]]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def shape_of(features: Features) -> tuple[int, ...]:
    match input_of(features):
        case Picture(channels, height, width):
            return (channels, height, width)
        case Vector(width):
            return (width,)
    raise AssertionError


def as_file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("features", [GREY, COLOUR, TABLE])
def test_features_survive_json(features: Any) -> None:
    assert features_from_json(json.loads(json.dumps(features_to_json(features)))) == features


def test_pixels_are_scaled_shifted_and_put_channel_first() -> None:
    pixels = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    (inputs,) = encode(COLOUR, {"image": pixels})
    assert inputs.dtype == np.float32
    assert inputs.shape == (2, *shape_of(COLOUR))
    for channel, (mean, std) in enumerate(zip(COLOUR.mean, COLOUR.std, strict=True)):
        expected = (pixels[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(inputs[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_table_rows_become_numbers_indicators_and_slots() -> None:
    columns = {
        "numbers": np.array([[50.0, 8.0], [np.nan, 12.0]]),
        "x.town": np.array(["Ulm", None], dtype=object),
    }
    (inputs,) = encode(TABLE, columns)
    assert inputs.shape == (2, *shape_of(TABLE))
    assert inputs.tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 2, 0, 0, 1]]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_a_row_is_encoded_alike_in_every_batch(numbers: list[float]) -> None:
    column = TableFeatures((NumericColumn("x", 3.0, 7.0, has_missing=True),))
    (together,) = encode(column, {"numbers": np.array(numbers)[:, None]})
    alone = [encode(column, {"numbers": np.array([[number]])})[0][0] for number in numbers]
    assert (together == alone).all()


def test_requests_give_the_columns_of_the_shards() -> None:
    rows: list[object] = [{"age": 50, "hours": 8.0, "town": " Ulm "}, {"hours": 12, "town": "?"}]
    parsed = parse_instances(TABLE, rows)
    assert encode(TABLE, parsed)[0].tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 2, 0, 0, 1]]

    stored = np.array(GREY_PIXELS, np.uint8).reshape(1, 2, 3, 1)
    file = as_file(Image.fromarray(stored[0, :, :, 0]))
    instances: list[object] = [GREY_PIXELS, {"b64": base64.b64encode(file).decode()}]
    (inputs,) = encode(GREY, parse_instances(GREY, instances))
    (twice,) = encode(GREY, {"image": np.repeat(stored, 2, axis=0)})
    np.testing.assert_array_equal(inputs, twice)


@pytest.mark.parametrize(
    ("features", "instances", "field"),
    [
        (GREY, [], "instances"),
        (GREY, {"a": 1}, "instances"),
        (GREY, [GREY_PIXELS, 7], "instances[1]"),
        (GREY, [[[0, 1, 2]]], "instances[0]"),
        (GREY, [[[0, 1, 2], [0, 1]]], "instances[0][1]"),
        (GREY, [[[0, 1, 2], [0, 1, 256]]], "instances[0][1][2]"),
        (GREY, [[[0, 1, 2], [0, -1, 2]]], "instances[0][1][1]"),
        (GREY, [[[0, 1, 2], [0, float("nan"), 2]]], "instances[0][1][1]"),
        (GREY, [[[0, 1, 2], [True, 1, 2]]], "instances[0][1][0]"),
        (GREY, [[[0, 1, 2], ["1", 1, 2]]], "instances[0][1][0]"),
        (GREY, [[[0, 1, 2], [10**5000, 1, 2]]], "instances[0][1][0]"),
        (COLOUR, [[[[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2, 3]]]], "instances[0][0][1]"),
        (GREY, [{"b64": "not base64!"}], "instances[0].b64"),
        (GREY, [{"b64": "aGVsbG8="}], "instances[0].b64"),
        (GREY, [{"b64": 3}], "instances[0]"),
        (GREY, [{"b64": "", "url": "http://169.254.169.254"}], "instances[0]"),
        (TABLE, [[1, 2]], "instances[0]"),
        (TABLE, [{"age": 1}], "instances[0].hours"),
        (TABLE, [{"hours": None}], "instances[0].hours"),
        (TABLE, [{"hours": 1}, {"hours": "8"}], "instances[1].hours"),
        (TABLE, [{"hours": float("inf")}], "instances[0].hours"),
        (TABLE, [{"hours": 1e200}], "instances[0].hours"),
        (TABLE, [{"hours": True}], "instances[0].hours"),
        (TABLE, [{"hours": 10**5000}], "instances[0].hours"),
        (TABLE, [{"age": [], "hours": []}], "instances[0].age"),
        (TABLE, [{"age": [1], "hours": [2]}], "instances[0].age"),
        (TABLE, [{"hours": 1, "town": 5}], "instances[0].town"),
        (TABLE, [{"hours": 1, "city": "Ulm"}], "instances[0].city"),
    ],
)
def test_a_value_that_cannot_be_taken_is_named(features: Any, instances: Any, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_instances(features, instances)
    assert caught.value.field == field


@given(st.sampled_from([GREY, COLOUR, TABLE]), st.lists(JSON_VALUES, max_size=3))
def test_any_json_is_taken_or_refused_by_field(features: Any, instances: list[object]) -> None:
    try:
        (inputs,) = encode(features, parse_instances(features, instances))
    except FieldError:
        return
    assert inputs.shape == (len(instances), *shape_of(features))
    assert np.isfinite(inputs).all()


@given(st.floats(-1e100, 1e100), st.floats(-1e100, 1e100), st.floats(1e-300, 1e100))
def test_every_number_is_an_input_that_a_model_can_take(
    number: float, mean: float, std: float
) -> None:
    features = TableFeatures((NumericColumn("x", mean, std, has_missing=False),))
    (inputs,) = encode(features, parse_instances(features, [{"x": number}]))
    assert abs(inputs).max() <= 1e6


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (4, 4), 77), {}, 77),
        (Image.new("1", (4, 4), 1), {}, 255),
        (Image.new("LA", (4, 4), (10, 0)), {}, 255),
        (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), {}, 255),
        (Image.new("RGBA", (4, 4), (9, 9, 9, 255)), {}, 9),
        (Image.fromarray(np.full((4, 4), 0x8012, np.uint16)), {}, 0x80),
        (Image.new("RGB", (4, 4), (50, 50, 50)).convert("P"), {}, 50),
        (Image.new("P", (4, 4), 0), {"transparency": 0}, 255),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), {"form": "JPEG"}, 0),
        (Image.new("L", (40, 20), 77), {"form": "JPEG"}, 77),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_bytes(
    image: Image.Image, options: dict[str, Any], expected: int, channels: int
) -> None:
    pixels = decode_image(as_file(image, **options), 4, 4, channels)
    assert pixels.shape == (4, 4, channels)
    assert (abs(pixels.astype(int) - expected) <= 2).all()


@pytest.mark.parametrize("size", [(700, 900), (STRIP_PIXELS + 1, 2)])
def test_a_large_image_is_laid_on_white_as_a_small_one(size: tuple[int, int]) -> None:
    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    white = Image.new("RGBA", size, "white")
    at_once = Image.alpha_composite(white, image).convert("RGB")
    assert (fit_image(image, height, width, 3) == np.asarray(at_once)).all()


def test_images_are_upright_and_cropped_at_their_centre() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (decode_image(as_file(Image.fromarray(wide)), 10, 10, 1) == 200).all()

    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is the right side of the file
    half = Image.fromarray(np.repeat([[0, 255]], 2, axis=0).astype(np.uint8))
    upright = decode_image(as_file(half, exif=exif), 2, 2, 1)
    assert (
        upright[:, :, 0].tolist()
        == decode_image(as_file(half.transpose(Image.Transpose.ROTATE_270)), 2, 2, 1)[
            :, :, 0
        ].tolist()
    )
    assert upright[0, 0, 0] == upright[0, 1, 0] != upright[1, 0, 0]


@given(st.sampled_from(STORED), st.data())
def test_a_damaged_file_gives_pixels_or_a_value_error(form: str, data: st.DataObject) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    file = bytearray(as_file(Image.fromarray(noise), form))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    try:
        pixels = decode_image(bytes(file[:cut]), 8, 8, 1, formats=STORED)
    except ValueError:
        return
    assert pixels.shape == (8, 8, 1)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = as_file(Image.new("1", (8_100, 8_100)))
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="8100x8100 is more than"):
        decode_image(bomb, 8, 8, 1)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_request_has_png_and_jpeg_and_a_data_set_a_few_more(form: str) -> None:
    file = as_file(Image.new("L", (4, 4), 70), form)
    with pytest.raises(ValueError, match="not a readable PNG or JPEG file"):
        decode_image(file, 4, 4, 1)
    if form in STORED:
        assert (abs(decode_image(file, 4, 4, 1, formats=STORED).astype(int) - 70) <= 2).all()
        return
    with pytest.raises(ValueError, match="not a readable PNG, JPEG, WEBP, GIF or BMP file"):
        decode_image(file, 4, 4, 1, formats=STORED)


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP"])
def test_of_other_formats_too_a_bomb_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match="80x90 is more than 7,000 pixels"):
        decode_image(as_file(Image.new("L", (80, 90)), form), 8, 8, 1, 7_000, STORED)

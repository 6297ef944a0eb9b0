"""Image folders and IDX files: every row once, or a problem by name, or a sentence."""

import gzip
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heliostat.data.pixels import decode_image
from heliostat.data.raw import ImageLayout, find_source
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec

Read = Callable[..., Any]
TRAIN, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def test_a_folder_is_a_class_and_a_file_is_a_row(read: Read, png: Callable[..., bytes]) -> None:
    files = {
        "deep/er/Größe 5/ä b.PNG": png(),
        "deep/er/Größe 5/#2.jpeg": png(form="JPEG"),
        "猫/1.jpg": png(form="JPEG"),
        "猫/.DS_Store": b"x",
        "__MACOSX/猫/._1.jpg": b"x",
        "README.txt": b"x",
    }
    survey, rows = read(files)
    assert survey.labels == ("Größe 5", "猫")
    assert survey.layout == ImageLayout(8, 8, 1)
    assert sorted(zip(rows["id"].to_pylist(), rows["label"].to_pylist(), strict=True)) == [
        ("deep/er/Größe 5/#2.jpeg", "Größe 5"),
        ("deep/er/Größe 5/ä b.PNG", "Größe 5"),
        ("猫/1.jpg", "猫"),
    ]
    assert rows["problem"].null_count == 3
    assert rows["image"][0].as_py() == decode_image(files[rows["id"][0].as_py()], 8, 8, 1).tobytes()


@pytest.mark.parametrize(
    ("suffix", "form"),
    [("webp", "WEBP"), ("GIF", "GIF"), ("bmp", "BMP"), ("jfif", "JPEG"), ("jpe", "JPEG")],
)
def test_a_class_may_have_its_images_in_another_format(
    read: Read, png: Callable[..., bytes], suffix: str, form: str
) -> None:
    other = png(mode="RGB", colour=(200, 200, 200), form=form)
    files = {"a/1.png": png(mode="RGB", colour=(9, 9, 9)), f"b/1.{suffix}": other}
    survey, rows = read(files)
    assert survey.labels == ("a", "b")
    assert (survey.layout, survey.rows) == (ImageLayout(8, 8, 3), 2)
    assert rows["problem"].null_count == 2
    images = rows["image"].to_pylist()
    dark, light = (np.frombuffer(image, np.uint8).astype(int) for image in images)
    assert (dark == 9).all()
    assert (abs(light - 200) <= 2).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_several_frames_the_first_is_the_image(read: Read, form: str) -> None:
    file = io.BytesIO()
    first, *others = (Image.new("RGB", (8, 8), (grey, grey, grey)) for grey in (10, 100, 200))
    first.save(file, form, save_all=True, append_images=others)
    _, rows = read({f"{label}/1.{form}": file.getvalue() for label in "ab"}, channels=1)
    assert (abs(np.frombuffer(rows["image"][0].as_py(), np.uint8).astype(int) - 10) <= 2).all()


def test_what_is_left_out_is_told_by_kind_and_a_folder_that_loses_all_by_name(
    source: Callable[[dict[str, bytes]], Any],
) -> None:
    keys = [
        *("a/1.png", "a/notes.txt", "b/1.png", ".git/x.svg", "README"),
        *(f"{label}/{i}.tiff" for label in "cd" for i in range(3)),
    ]
    found = find_source(DataSpec(source=str(source(dict.fromkeys(keys, b"x")))))
    assert found.reason == (
        "by the names of 2 of 10 objects; left out: 6 *.tiff, 1 without a suffix, 1 *.txt, "
        "and with them all of the folders c, d"
    )
    whole = find_source(DataSpec(source=str(source({"a/1.png": b"x", "b/1.png": b"x"}))))
    assert whole.reason == "by the names of 2 of 2 objects"


def test_numbered_classes_are_in_the_order_of_their_numbers(
    read: Read, png: Callable[..., bytes]
) -> None:
    survey, _ = read({f"{number}/a.png": png() for number in (10, 9, 100)})
    assert survey.labels == ("9", "10", "100")


@pytest.mark.parametrize(
    ("sizes", "chosen", "reason"),
    [
        ([(20, 30), (20, 30)], (20, 30), "all images have it"),
        ([(20, 30), (30, 20)], (16, 16), "from 20x30 to 30x20"),
        ([(45, 90), (61, 50), (900, 600)], (48, 48), "3 images from 61x50 to 900x600"),
        ([(4, 4), (5, 5)], (16, 16), "set data.image_size"),
        ([(600, 400), (600, 400)], (64, 64), "in steps of 8 from 16 to 64"),
    ],
)
def test_the_size_follows_from_the_files_and_says_why(
    read: Read,
    png: Callable[..., bytes],
    sizes: list[tuple[int, int]],
    chosen: tuple[int, int],
    reason: str,
) -> None:
    survey, rows = read({f"{i % 2}/{i}.png": png(*size) for i, size in enumerate(sizes)})
    assert (survey.layout.height, survey.layout.width) == chosen
    assert reason in survey.notes[0]
    assert {len(image) for image in rows["image"].to_pylist()} == {chosen[0] * chosen[1]}


def test_the_size_of_a_turned_photo_is_that_of_the_scene(read: Read) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("L", (30, 20)).save(file, "JPEG", exif=exif)
    survey, _ = read({"a/1.jpg": file.getvalue(), "b/1.jpg": file.getvalue()})
    assert (survey.layout.height, survey.layout.width) == (30, 20)


def test_a_chosen_size_and_colour_are_kept(read: Read, png: Callable[..., bytes]) -> None:
    files = {"a/1.png": png(9, 9), "b/2.png": png(40, 20, "RGB", (255, 0, 0))}
    assert read(files)[0].layout == ImageLayout(16, 16, 3)
    assert read(files, image_size=(4, 6), channels=1)[0].layout == ImageLayout(4, 6, 1)


@pytest.mark.parametrize("section", [{}, {"image_size": (8, 8), "channels": 1}])
@pytest.mark.parametrize(("highest", "becomes"), [(4095, 15), (65535, 255), (150, 0)])
def test_what_is_kept_of_16_bits_is_told(
    read: Read, png: Callable[..., bytes], section: Any, highest: int, becomes: int
) -> None:
    file = io.BytesIO()
    pixels = np.linspace(0, highest, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(pixels).save(file, "PNG")
    survey, rows = read({"a/1.png": file.getvalue(), "b/1.png": png()}, **section)
    assert max(rows["image"][0].as_py()) == becomes
    (note,) = (note for note in survey.notes if "16 bits" in note)
    assert note.startswith("1 of 2 images looked at has 16 bits a pixel")
    assert f"{highest:,}, the largest value there, is {becomes} of 255" in note
    plain, _ = read({"a/1.png": png(), "b/1.png": png()}, **section)
    assert not any("16 bits" in note for note in plain.notes)


def test_what_cannot_be_read_is_a_row_with_a_problem(read: Read, png: Callable[..., bytes]) -> None:
    files = {
        "a/good.png": png(),
        "b/good.png": png(),
        "b/empty.png": b"",
        "b/cut.png": png()[:45],
        "b/text.jpg": b"not an image",
        "b/other.png": png(form="TIFF"),
        "loose.png": png(),
    }
    survey, rows = read(files)
    problems = dict(zip(rows["id"].to_pylist(), rows["problem"].to_pylist(), strict=True))
    assert {name for name, problem in problems.items() if not problem} == {
        "a/good.png",
        "b/good.png",
    }
    assert problems["loose.png"] == "not in a class folder"
    assert "not a readable PNG, JPEG, WEBP, GIF or BMP file" in problems["b/cut.png"]
    assert survey.layout == ImageLayout(8, 8, 1)


def test_a_header_behind_a_long_profile_is_found(read: Read) -> None:
    file = io.BytesIO()
    Image.new("RGB", (12, 10)).save(file, "JPEG", icc_profile=bytes(200_000))
    survey, _ = read({"a/1.jpg": file.getvalue(), "b/1.jpg": file.getvalue()})
    assert survey.layout == ImageLayout(10, 12, 3)


@pytest.mark.parametrize("unpack", [False, True])
def test_idx_pairs_give_their_images_in_order(
    read: Read, idx: Callable[[Any], bytes], unpack: bool
) -> None:
    pixels = np.arange(5 * 4 * 3).reshape(5, 4, 3)
    files = {TRAIN: idx(pixels), LABELS: idx([7, 1, 7, 1, 10])}
    if unpack:
        files = {key.removesuffix(".gz"): gzip.decompress(data) for key, data in files.items()}
    files |= {"t10k-images.idx3-ubyte": idx(pixels[:1]), "t10k-labels.idx1-ubyte": idx([1])}
    survey, rows = read(files)
    key = TRAIN.removesuffix(".gz") if unpack else TRAIN
    assert survey.labels == ("1", "7", "10")
    assert (survey.layout, survey.rows) == (ImageLayout(4, 3, 1), 6)
    assert rows["id"].to_pylist()[1:] == [f"{key}#{row}" for row in range(5)]
    assert rows["label"].to_pylist()[1:] == ["7", "1", "7", "1", "10"]
    assert b"".join(rows["image"].to_pylist()[1:]) == pixels.astype(np.uint8).tobytes()


def test_idx_images_can_be_given_another_size_and_have_colours(
    read: Read, idx: Callable[[Any], bytes]
) -> None:
    pixels = np.full((2, 4, 4, 3), 50)
    survey, rows = read({TRAIN: idx(pixels), LABELS: idx([0, 1])}, image_size=(2, 2))
    assert survey.layout == ImageLayout(2, 2, 3)
    assert rows["image"].to_pylist() == [bytes([50] * 12)] * 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, (2, 3)])
def test_idx_images_are_the_same_with_their_channels_first(
    read: Read, idx: Callable[[Any], bytes], channels: int, size: tuple[int, int] | None
) -> None:
    last = np.random.default_rng(1).integers(256, size=(4, 6, 5, channels))
    survey, rows = read({TRAIN: idx(last), LABELS: idx([0, 1, 0, 1])}, image_size=size)
    first = idx(last.transpose(0, 3, 1, 2))
    again, same = read({TRAIN: first, LABELS: idx([0, 1, 0, 1])}, image_size=size)
    assert survey.layout == again.layout == ImageLayout(*(size or (6, 5)), channels)
    assert rows["image"] == same["image"]
    if size is None:
        assert b"".join(rows["image"].to_pylist()) == last.astype(np.uint8).tobytes()


def test_images_that_cannot_be_a_data_set_are_refused(
    read: Read, png: Callable[..., bytes], idx: Callable[[Any], bytes]
) -> None:
    images, labels = idx(np.zeros((2, 4, 4))), idx([0, 1])
    cases: dict[str, dict[str, bytes]] = {
        "only the class 'a'": {"a/1.png": png(), "a/2.png": png()},
        "no image under .* can be read": {"a/1.png": b"x", "b/2.png": b"y"},
        "no labels": {"1.png": png(), "2.png": png()},
        "more than 1,000 different labels": {f"{i}/1.png": png() for i in range(1001)},
        "has no partner": {TRAIN: images},
        "x-idx1-ubyte has no partner": {"x-idx3-ubyte": images, "x-idx1-ubyte": labels},
        "extra-idx3-ubyte has no partner": {
            TRAIN: images,
            LABELS: labels,
            "extra-idx3-ubyte": images,
        },
        "2 images, .* 1 labels": {TRAIN: images, LABELS: idx([0])},
        "images of 4x4 and 5x5": {
            TRAIN: images,
            LABELS: labels,
            "t10k-images-idx3-ubyte": idx(np.zeros((2, 5, 5))),
            "t10k-labels-idx1-ubyte": labels,
        },
        "images of 4x4x2: give them one or three channels": {
            TRAIN: idx(np.zeros((2, 4, 4, 2))),
            LABELS: labels,
        },
        "is not an IDX file": {TRAIN: gzip.compress(b"hello"), LABELS: labels},
        "is not a whole gzip file": {TRAIN: images[:-9], LABELS: labels},
        "ends early": {TRAIN: gzip.compress(gzip.decompress(images)[:-1]), LABELS: labels},
        "fewer labels than it says": {
            TRAIN: images,
            LABELS: gzip.compress(gzip.decompress(labels)[:-1]),
        },
        "a damaged header": {TRAIN: bytes((0, 0, 8, 3, 0)), LABELS: labels},
        "only the class '0'": {TRAIN: images, LABELS: idx([0, 0])},
    }
    for sentence, files in cases.items():
        with pytest.raises(HeliostatError) as caught:
            read(files)
        assert re.search(sentence, str(caught.value)), (sentence, str(caught.value))

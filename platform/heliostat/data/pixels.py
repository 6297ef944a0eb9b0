"""Image files of a few formats as pixels, bounded in size."""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000  # of an image of a data set
SENT = ("PNG", "JPEG")  # in a request, by anyone: a decoder more is one more to attack
STORED = (*SENT, "WEBP", "GIF", "BMP")  # in a data set
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
STRIP_PIXELS = 262_144  # are laid on white at once, which keeps the interpreter's lock
MODES = {1: "L", 3: "RGB"}


def decode_image(
    data: bytes,
    height: int,
    width: int,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = SENT,
) -> NDArray[np.uint8]:
    """The pixels (height, width, channels) of an image file, upright, centre-cropped.

    Of several frames it is the first.

    Raises:
        ValueError: none of `formats`, a broken file, or one of more than `max_pixels`.
    """
    try:
        with open_image(data, max_pixels, formats) as image:
            return fit_image(ImageOps.exif_transpose(image), height, width, channels)
    except BROKEN_IMAGE as error:
        problem = f"not a readable {list_formats(formats)} file: {_first_line(error)}"
        raise ValueError(problem) from error


def open_image(
    data: bytes | bytearray, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = SENT
) -> Image.Image:
    """A file of a bounded size with only its header read; raises BROKEN_IMAGE."""
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} is more than {max_pixels:,} pixels")
    return image


def list_formats(formats: tuple[str, ...]) -> str:
    *others, last = formats
    return f"{', '.join(others)} or {last}"


def fit_image(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Pixels (height, width, channels): scaled until the shorter side fits, then centre-cropped."""
    flat = _flatten(image).convert(MODES[channels])
    if flat.size != (width, height):
        flat = ImageOps.fit(flat, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(flat, dtype=np.uint8).reshape(height, width, channels)


def _flatten(image: Image.Image) -> Image.Image:
    """Without transparency (on white, as a browser shows it) and with 8 bits per channel."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    layered, flat = image.convert("RGBA"), Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = 0, top, image.width, min(top + rows, image.height)
        strip = layered.crop(box)
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return flat


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(" <_io")[0]

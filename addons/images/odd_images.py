"""Images that are rarely met: wide integers, floats, long strips, and files that no allowed format claims."""
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from addons.images.other_formats import TIFF_STARTS, is_other_format

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

BAND_PIXELS = 4_000_000  # of an image of numbers, worked on at a time: as float64 the whole could take 400 MB


def grey_from_numbers(image: "PillowImage") -> "PillowImage":
    """Turn an image of wide integers or floats (modes I, I;16 and F) into 8-bit grey (mode L).

    16-bit grey is scaled by 1/257. Other numbers are scaled by the range that they fill: [0, 1] (floats only), [0, 255]
    and [0, 65535] are kept as scales, any other range is stretched to [0, 255]. Infinities take the range's ends, NaN is 0.
    """
    low, high = _range_of(image)
    offset, scale = _grey_scale(image.mode, low, high)
    grey = Image.new("L", image.size)
    for top, band in _bands(image):
        values = (np.nan_to_num(band, posinf=high, neginf=low) - offset) * scale
        grey.paste(Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)), (0, top))
    return grey


def _bands(image: "PillowImage") -> Iterator[tuple[int, np.ndarray]]:
    """The image from top to bottom in bands: (the first row's number, the band as float64 (rows, width))."""
    step = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, step):
        band = image.crop((0, top, image.width, min(image.height, top + step)))
        with np.errstate(invalid="ignore"):  # a signalling NaN
            numbers = np.asarray(band, dtype=np.float64)
        yield top, numbers


def _range_of(image: "PillowImage") -> tuple[float, float]:
    """The least and the largest finite number of the image, and at most and at least 0."""
    low = 0.0
    high = 0.0
    for _, band in _bands(image):
        finite = band[np.isfinite(band)]
        low = min(low, float(finite.min(initial=0.0)))
        high = max(high, float(finite.max(initial=0.0)))
    return low, high


def _grey_scale(mode: str, low: float, high: float) -> tuple[float, float]:
    """(offset, scale) such that (number - offset) * scale is grey in [0, 255]."""
    if mode == "F" and low >= 0 and high <= 1:
        return 0.0, 255.0
    if mode.startswith("I;16") or (low >= 0 and 255 < high <= 65535):
        return 0.0, 1 / 257
    if low < 0 or high > 255:
        return low, 255 / (high - low)
    return 0.0, 1.0


def trim_strip(image: "PillowImage", max_aspect: int) -> "PillowImage":
    """Cut an image longer than `max_aspect` times its short edge to its centre, which is all that the model's crop keeps."""
    width, height = image.size
    long_edge = max_aspect * min(width, height)
    long_edge += (max(width, height) - long_edge) % 2  # or the centre would move by half a pixel
    left = max(0, (width - long_edge) // 2)
    top = max(0, (height - long_edge) // 2)
    return image.crop((left, top, min(width, left + long_edge), min(height, top + long_edge)))


def shorten_strip(image: "PillowImage", max_edge: int) -> "PillowImage":
    """Shrink an image with an edge above `max_edge` to at most that, by averaging whole numbers of neighbours."""
    width, height = image.size
    return image.reduce((-(-width // max_edge), -(-height // max_edge)))


def why_unidentified(data: bytes) -> tuple[str, str]:
    """Status and detail for bytes that no allowed format claims: an image of another kind, or no image at all."""
    start = data[:512].lstrip().lower()
    if not data:
        return "not_image", "empty file"
    if is_other_format(data):
        return "unsupported", "format not allowed"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return "not_image", "text, not an image"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", *TIFF_STARTS)) or data[8:12] == b"WEBP":
        return "corrupt", "header cannot be read"
    return "not_image", "no image format known here"

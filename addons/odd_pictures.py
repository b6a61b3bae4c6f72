"""Pictures that are rarely met: wide integers, floats, long strips, and files that no allowed format claims."""
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


def grey_from_numbers(image: Any) -> Any:
    """A picture of wide integers or floats as 8-bit grey, a band at a time: as float64 the whole could be 400 MB."""
    step = max(1, 4_000_000 // image.width)

    def bands() -> Iterator[tuple[int, Any]]:
        for top in range(0, image.height, step):
            with np.errstate(invalid="ignore"):  # a signalling NaN
                yield top, np.asarray(image.crop((0, top, image.width, min(image.height, top + step))), dtype=np.float64)
    low = min(float(band[np.isfinite(band)].min(initial=0.0)) for _, band in bands())
    high = max(float(band[np.isfinite(band)].max(initial=0.0)) for _, band in bands())
    if image.mode == "F" and low >= 0 and high <= 1:
        offset, scale = 0.0, 255.0
    elif image.mode.startswith("I;16") or (low >= 0 and 255 < high <= 65535):
        offset, scale = 0.0, 1 / 257
    elif low < 0 or high > 255:
        offset, scale = low, 255 / (high - low) if high > low else 1.0
    else:
        offset, scale = 0.0, 1.0
    grey = Image.new("L", image.size)
    for top, band in bands():
        values = (np.nan_to_num(band, posinf=high, neginf=low) - offset) * scale
        grey.paste(Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)), (0, top))
    return grey


def trim_strip(image: Any, max_aspect: int) -> Any:
    """The centre of a picture longer than `max_aspect`, of which the model's crop would keep the centre only."""
    width, height = image.size
    long_edge = max_aspect * min(width, height)
    long_edge += (max(width, height) - long_edge) % 2  # or the centre would move by half a pixel
    left, top = max(0, (width - long_edge) // 2), max(0, (height - long_edge) // 2)
    return image.crop((left, top, min(width, left + long_edge), min(height, top + long_edge)))


def why_unidentified(data: bytes) -> tuple[str, str]:
    """Status and detail for bytes that no allowed format claims: an image of another kind, or no image at all."""
    start = data[:512].lstrip().lower()
    if not data:
        return "not_image", "empty file"
    if data[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1") or start.startswith((b"<svg", b"%pdf", b"8bps")):
        return "unsupported", "format not allowed"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return "not_image", "text, not a picture"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or data[8:12] == b"WEBP":
        return "corrupt", "header cannot be read"
    return "not_image", "no picture format known here"

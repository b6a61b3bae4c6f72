"""A second look at what Pillow has decoded: colours that it is known to misread are set right, half images are refused.

What is set right here was seen with Pillow 13.0: each of it decodes without a word, to other colours than the file has.
"""
import io
import sys
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from addons.images import exif, halves
from addons.images.odd_images import grey_from_numbers
from image_text_sim_clip import REMARK, Config, RowFailure

if TYPE_CHECKING:
    from PIL.GifImagePlugin import GifImageFile
    from PIL.Image import Image as PillowImage
    from PIL.TiffImagePlugin import TiffImageFile

# of a TIFF's tags
BITS = 258
COMPRESSION = 259
COLOURS = 262
PLANES = 284
PALETTE = 320
SAMPLE_FORMAT = 339
WHITE_IS_ZERO = 0  # of COLOURS
UNSIGNED = 1  # of SAMPLE_FORMAT
SIGNED = 2
SEPARATE = 2  # of PLANES
UNCOMPRESSED = 1  # of COMPRESSION


def look_again(image: "PillowImage", data: bytes, config: Config) -> "PillowImage":
    """The decoded image in the colours that its file `data` has, with its Remark in `info`; RowFailure for half an image."""
    halves.refuse_half(image, data)
    right = image
    if image.format == "PNG":
        right = _right_png(image, depth=data[24])
    elif image.format == "BMP":
        right = _right_bmp(image, data)
    elif image.format == "TIFF":
        right = _right_tiff(cast("TiffImageFile", image))
    elif image.format == "GIF":
        right = _right_gif(cast("GifImageFile", image))
    if right is not image:
        right.info = {key: value for key, value in image.info.items() if key != "transparency"}
        right.format = image.format  # by which `exif` knows that a TIFF has been turned already
    right.info[REMARK] = exif.remark_on(image, config)
    return right


# ── PNG ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _right_png(image: "PillowImage", depth: int) -> "PillowImage":
    """The colour that is transparent stands in the file's own depth, where Pillow takes it for one of 8 bits.

    RowFailure (`corrupt`) for an image that lacks its palette, of which Pillow makes a black one.
    """
    if image.mode == "P" and image.palette is None:
        raise RowFailure("corrupt", "no palette")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)  # as Pillow does with the pixels
    elif isinstance(key, int) and image.mode == "L" and depth < 8:
        highest = 2 ** depth - 1
        image.info["transparency"] = (key & highest) * 255 // highest
    elif isinstance(key, int) and image.mode == "I;16":
        alpha = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey_from_numbers(image), alpha))
    return image


# ── BMP ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _right_bmp(image: "PillowImage", data: bytes) -> "PillowImage":
    """Black and white in 4 or 8 bits are read as single bits; and where no pixel has any opacity, none is meant to be used.

    Browsers take such opacity for a byte that nobody has filled, too: many programs write the header that says otherwise.
    """
    bits = int.from_bytes(data[28:30], "little")
    has_count = int.from_bytes(data[14:18], "little") >= 40  # the size of the header, which tells how many colours there are
    if image.mode == "1" and has_count and bits > 1:
        with_more_colours = data[:46] + (2 ** bits).to_bytes(4, "little") + data[50:]
        with Image.open(io.BytesIO(with_more_colours), formats=("BMP",)) as again:
            again.load()
            return again
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image


# ── GIF ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _right_gif(image: "GifImageFile") -> "PillowImage":
    """What the first frame leaves free is transparent, as in browsers, and has not the first colour of the palette."""
    frame = image.dispose_extent
    if not frame or frame == (0, 0, *image.size) or "transparency" in image.info:
        return image
    right = Image.new("RGBA", image.size)
    right.paste(image.crop(frame).convert("RGBA"), frame)
    return right


# ── TIFF ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _right_tiff(image: "TiffImageFile") -> "PillowImage":
    """Grey in other numbers than bytes, and small palettes; RowFailure (`unsupported`) for planes that Pillow mixes up."""
    tags = image.tag_v2
    bits = max(tags.get(BITS, (1,)))
    is_compressed = tags.get(COMPRESSION, UNCOMPRESSED) != UNCOMPRESSED
    if tags.get(PLANES) == SEPARATE:
        is_mixed_up = image.mode == "LA" if is_compressed else bits > 8 and len(image.getbands()) > 1
        if is_mixed_up:
            raise RowFailure("unsupported", "a TIFF in separate planes of this kind")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _right_numbers(image, bits, is_swapped=is_compressed and tags.prefix == b"MM" and sys.byteorder == "little")
    if image.mode == "L" and bits == 8 and max(tags.get(SAMPLE_FORMAT, (UNSIGNED,))) == SIGNED:
        return image.point(lambda level: level ^ 128)
    if image.mode == "P" and max(tags.get(PALETTE, (0,))) in range(1, 256):  # of 8 bits, where the standard wants 16
        levels = np.array(tags[PALETTE]).reshape(3, -1)  # all reds, all greens, all blues
        right = image.copy()
        right.putpalette(levels.T.astype(np.uint8).tobytes())
        return right
    return image


def _right_numbers(image: "TiffImageFile", bits: int, is_swapped: bool) -> "PillowImage":
    """Grey of 16 or 32 bits; `is_swapped` where libtiff has given Pillow numbers in another order of bytes than it expects."""
    tags = image.tag_v2
    kind = max(tags.get(SAMPLE_FORMAT, (UNSIGNED,)))
    right: PillowImage = image
    if is_swapped and image.mode in ("I", "F"):
        numbers = np.asarray(image)
        if bits == 16:
            numbers = numbers.astype(np.int16)
        numbers = numbers.byteswap()
        right = Image.fromarray(numbers.astype(np.float32 if image.mode == "F" else np.int32))
    if image.mode == "I" and bits == 32 and kind == UNSIGNED and np.asarray(right).min() < 0:
        right = Image.fromarray(np.asarray(right).view(np.uint32).astype(np.float32))
    if tags.get(COLOURS) == WHITE_IS_ZERO:
        right = grey_from_numbers(right).point(lambda level: 255 - level)
    return right

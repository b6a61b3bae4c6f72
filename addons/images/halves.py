"""Half images that decoders take for whole ones: downloads that broke off and were given an end, or zeros, all the same.

libjpeg fills what a JPEG lacks with grey and goes on, Pillow leaves rows that a PNG lacks as zeros, and zeros decode as pixels
in a JPEG or WebP. Each of them shows at the end of the image or of the file, so that hardly any whole image is looked at twice.
"""
import io
import struct
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from addons.images import plain_pixels
from image_text_sim_clip import RowFailure

if TYPE_CHECKING:
    from PIL import Image

GREY = range(126, 131)  # what libjpeg fills with is 128, or 127 where it is turned round (CMYK)
ZEROS = bytes(16)  # at the end of a JPEG: no scan ends like this
WEBP_ZEROS = bytes(4096)  # at the end of a WebP's pixels: a page of a disk that was never written
NOISE = bytes(range(1, 255)) * 8  # without FF, which would begin a marker
JPEG_END = b"\xff\xd9"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each kind of colours
# the passes of an interlaced PNG: where each begins and how far its pixels lie apart, (x, y, dx, dy); PNG specification, 8.2
PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def refuse_half(image: "Image.Image", data: bytes) -> None:
    """Raise RowFailure (`corrupt`) for an image that lacks part of its pixels; `image` is what was decoded of `data`."""
    is_half = False
    if image.format in ("JPEG", "MPO"):
        last = image.getpixel((image.width - 1, image.height - 1))
        levels = last if isinstance(last, tuple) else (last,)
        is_half = (is_grey(levels) or data.endswith(ZEROS)) and _is_half_jpeg(data)
    elif image.format == "PNG" and data[12:16] == b"IHDR":
        is_half = (bool(data[28]) or _ends_in_zeros(image)) and _is_half_png(data)
    elif image.format == "WEBP":
        is_half = WEBP_ZEROS in data and _is_half_webp(data)
    if is_half:
        raise RowFailure("corrupt", "part of the pixels is missing")


def is_grey(levels: Iterable[float | None]) -> bool:
    """Whether the last pixel of a JPEG has the grey that stands for missing ones."""
    return all(level in GREY for level in levels)


def _is_half_jpeg(data: bytes) -> bool:
    """Whether noise behind the data of the image changes it: then the decoder had come to the end and wanted more."""
    plain = plain_pixels.without_segments(data)
    scan = plain.find(b"\xff\xda")
    end = plain.find(JPEG_END, scan)
    pixels = plain.rstrip(b"\0") if end < 0 else plain[:end]
    return _decode_small(pixels + JPEG_END) != _decode_small(pixels + NOISE + JPEG_END)


def _decode_small(data: bytes) -> bytes:
    """The brightness of each block of 8 x 8 pixels of a JPEG, or of larger ones that are smaller than that."""
    from PIL import Image
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        image.draft("L", (1, 1))
        return image.tobytes()


def _ends_in_zeros(image: "Image.Image") -> bool:
    return not any(image.crop((0, image.height - 1, image.width, image.height)).tobytes())


def _is_half_png(data: bytes) -> bool:
    """Whether the compressed data of a PNG end before its last row."""
    width, height, depth, colours = struct.unpack_from(">IIBB", data, 16)
    expected = 0
    for left, top, right, down in PNG_PASSES if data[28] else ((0, 0, 1, 1),):
        columns = -(-(width - left) // right)
        rows = -(-(height - top) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * depth * PNG_CHANNELS[colours] // 8))
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)  # without looking at the checksum, which would hide how many rows there are
    header = 2  # bytes before the data proper, RFC 1950
    try:
        for packed in plain_pixels.png_pixels(data):
            waiting = packed[header:]
            header = max(0, header - len(packed))
            while waiting and expected > 0:
                expected -= len(unpack.decompress(waiting, 2**20))
                waiting = unpack.unconsumed_tail
    except zlib.error:  # broken within, which Pillow has taken without a word
        return True
    return expected > 0


def _is_half_webp(data: bytes) -> bool:
    """Whether the data of the pixels end in zeros, a page of them or more."""
    for name, content in plain_pixels.webp_chunks(data):
        if name == b"ANMF":  # behind 16 bytes about the frame there are chunks again
            return _is_half_webp(bytes(12) + content[16:])
        if name in (b"VP8 ", b"VP8L"):
            return content.endswith(WEBP_ZEROS)
    return False

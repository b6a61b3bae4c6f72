"""Copies of an image file without what lies around its pixels: text, colour profiles, thumbnails, EXIF, further frames.

A decoder that stumbles over those has not looked at the pixels yet. So where an image is refused as corrupt, it is tried
again from such a copy. What decides the pixels stays: sizes, palettes, transparency, the kind of colours.
"""
import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from addons.images import exif
from addons.images.other_formats import is_sound_tiff
from image_text_sim_clip import REMARK, Config, Remark, RowFailure, decode_as_it_is, failing_its_row

if TYPE_CHECKING:
    from PIL import Image

    from addons.images.memory import Account

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXEL_CHUNKS = (b"tRNS",)  # besides those whose name begins with a capital letter
JPEG_START = b"\xff\xd8\xff"
JPEG_JFIF = 0xE0
JPEG_EXIF = 0xE1
JPEG_ADOBE = 0xEE
JPEG_COMMENT = 0xFE
JPEG_SCAN = 0xDA
JPEG_NO_LENGTH = (0x01, *range(0xD0, 0xD9))
JPEG_LEAST_BYTES = {JPEG_JFIF: 14, JPEG_ADOBE: 12}  # of what libjpeg heeds in them; shorter ones say nothing
WEBP_PIXEL_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_EXIF_FLAG = 0x08  # in the first byte of VP8X, which says what else the file holds
WEBP_METADATA_FLAGS = 0x20 | WEBP_EXIF_FLAG | 0x04  # colour profile, EXIF, XMP

# of texts about document, camera, page, software, date, artist and computer; XMP, copyright, IPTC, Photoshop, EXIF, ICC, GPS
TIFF_METADATA_TAGS = (269, 270, 271, 272, 285, 305, 306, 315, 316, 700, 33432, 33723, 34377, 34665, 34675, 34853, 37724, 40965)


def decode_without_metadata(data: bytes, config: Config, target: tuple[int, int] | None,
                            account: "Account | None") -> "Image.Image | None":
    """The image as the script decodes it, from the first copy of it that can be decoded; None where none can.

    RowFailure (`unsupported`) for a TIFF that is sound, as far as its directory tells, but of a kind that Pillow does not read.
    """
    for copy, lacks_exif in without_metadata(data):
        with contextlib.suppress(RowFailure):
            image = decode_as_it_is(copy, config, target, account)
            if lacks_exif and config.exif_orientation:
                image.info[REMARK] = Remark(detail=exif.CANNOT_READ)
            return image
    if is_sound_tiff(data) and not _is_opened(data):
        raise RowFailure("unsupported", "a TIFF of a kind that is not read here")
    return None


def _is_opened(data: bytes) -> bool:
    from PIL import Image, UnidentifiedImageError
    try:
        with failing_its_row("decode"), Image.open(io.BytesIO(data), formats=("TIFF",)):
            return True
    except UnidentifiedImageError:
        return False
    except RowFailure:  # it is a TIFF with another fault
        return True


class Copy(NamedTuple):
    """A file with the same pixels as another, and whether that one's EXIF is not in it."""

    data: bytes
    lacks_exif: bool


def without_metadata(data: bytes) -> Iterator[Copy]:
    """Copies of a PNG, JPEG, WebP or TIFF: one that keeps EXIF alone of what can go, then one without, if there was any.

    Nothing where nothing can be taken away, or for files of other formats.
    """
    strip: Callable[[bytes, bool], bytes]
    if data.startswith(PNG_START):
        strip = _strip_png
    elif data.startswith(JPEG_START):
        strip = _strip_jpeg
    elif data[:4] in (b"II*\0", b"MM\0*"):
        strip = _strip_tiff
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        strip = _strip_webp
    else:
        return
    with_exif = strip(data, True)
    bare = strip(data, False)
    if with_exif != data:
        yield Copy(with_exif, lacks_exif=False)
    if bare != with_exif:
        yield Copy(bare, lacks_exif=strip is not _strip_tiff)  # a TIFF's orientation is none of its EXIF


def without_segments(data: bytes) -> bytes:
    """A JPEG without what lies before its first scan and decides no pixels: a thumbnail, for example."""
    return _strip_jpeg(data, keep_exif=False)


def png_pixels(data: bytes) -> Iterator[bytes]:
    """The contents of a PNG's IDAT chunks."""
    place = len(PNG_START)
    while place + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        if data[place + 4:place + 8] == b"IDAT":
            yield data[place + 8:place + 8 + size]
        place += 12 + size


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk of a WebP; the last one may be cut off."""
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        yield data[place:place + 4], data[place + 8:place + 8 + size]
        place += 8 + size + size % 2


def _strip_png(data: bytes, keep_exif: bool) -> bytes:
    """The chunks that decide the pixels; what no longer looks like a chunk is left out if the pixels have ended, else kept."""
    kept = [PNG_START]
    place = len(PNG_START)
    has_pixels = False
    while place + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name = data[place + 4:place + 8]
        end = place + 12 + size
        is_critical = name[:1].isupper()
        if not name.isalpha() or (end > len(data) and is_critical):
            break
        if is_critical or name in PNG_PIXEL_CHUNKS or (keep_exif and name == b"eXIf"):
            kept.append(data[place:end])
        has_pixels = has_pixels or name == b"IDAT"
        place = end
        if name == b"IEND":
            return b"".join(kept)
    if place < len(data) or not has_pixels:
        kept.append(data[place:])
    else:
        kept.append(struct.pack(">I4sI", 0, b"IEND", 0xAE426082))  # the file is cut within what follows the pixels
    return b"".join(kept)


def _strip_jpeg(data: bytes, keep_exif: bool) -> bytes:
    """The segments that decide the pixels; from the first scan on everything stays."""
    kept = [data[:2]]
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill bytes
            place += 1
            continue
        if marker == JPEG_SCAN:
            break
        size = 0 if marker in JPEG_NO_LENGTH else struct.unpack_from(">H", data, place + 2)[0]
        if size == 1 or (size == 0 and marker not in JPEG_NO_LENGTH):
            break
        end = place + 2 + size
        if _decides_jpeg_pixels(marker, size, data[place + 4:place + 10], keep_exif):
            kept.append(data[place:end])
        place = end
    kept.append(data[place:])
    return b"".join(kept)


def _decides_jpeg_pixels(marker: int, size: int, start: bytes, keep_exif: bool) -> bool:
    """Whether a segment must stay; `size` counts its two bytes of length, `start` are the bytes behind those."""
    if marker == JPEG_EXIF:
        return keep_exif and start == b"Exif\0\0"
    if marker in JPEG_LEAST_BYTES:
        return size - 2 >= JPEG_LEAST_BYTES[marker]
    return marker != JPEG_COMMENT and not 0xE0 <= marker <= 0xEF


def _strip_webp(data: bytes, keep_exif: bool) -> bytes:
    """The chunks that decide the pixels, under a length that is right; the same file where one of those is cut off.

    See "Extended File Format" in the WebP Container Specification: chunks are padded to an even length.
    """
    kept = []
    place = 12
    while place + 8 <= len(data):
        name = data[place:place + 4]
        (size,) = struct.unpack_from("<I", data, place + 4)
        content = data[place + 8:place + 8 + size]
        decides_pixels = name in WEBP_PIXEL_CHUNKS
        if decides_pixels and len(content) < size:
            return data
        if name == b"VP8X" and content:
            gone = WEBP_METADATA_FLAGS & ~WEBP_EXIF_FLAG if keep_exif else WEBP_METADATA_FLAGS
            content = bytes([content[0] & ~gone]) + content[1:]
        if decides_pixels or (keep_exif and name == b"EXIF" and len(content) == size):
            kept.append(name + struct.pack("<I", size) + content + bytes(size % 2))
        place += 8 + size + size % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_tiff(data: bytes, keep_exif: bool) -> bytes:
    """The file with the tags of metadata taken out of its first directory; the same file where there are none."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8:
        return data
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from(order + "H", data, start)
    entries = [data[place:place + 12] for place in range(start + 2, start + 2 + 12 * count, 12)]
    next_directory = data[start + 2 + 12 * count:start + 6 + 12 * count]
    kept = [entry for entry in entries if entry[:2] not in {struct.pack(order + "H", tag) for tag in TIFF_METADATA_TAGS}]
    if keep_exif or len(kept) == len(entries):
        return data
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + next_directory
    return data[:start] + directory + data[start + len(directory):]

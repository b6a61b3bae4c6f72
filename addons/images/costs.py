"""What an image file will cost to decode, told from its structure before any of it is decoded.

A limit of pixels sees none of this: a scan of a progressive JPEG takes 100 bytes and walks the whole image, a TIFF of 32 x 32
pixels may have a tile of 26,000 x 26,000, and Pillow makes a Python object of each segment, chunk and strip. `look` refuses
what no honest file has, and finds the doubtful, which is decoded in a child process with limits (guard.py). It knows the
formats' outlines only; what is broken in them is for the decoder to say.
"""
import itertools
import re
import struct
from collections.abc import Iterator

from image_text_sim_clip import RowFailure

MOST_SCANS = 500  # of a JPEG; encoders write up to a dozen
MOST_SCANNED_PIXELS = 1_000_000_000  # scans x pixels: beyond, decoding may take more than a few seconds
MOST_SEGMENTS = 2000  # of a JPEG before its first scan: 64 kB each, 100 MB and more of metadata
MUCH_METADATA_BYTES = 4_000_000  # of a JPEG: Pillow joins the segments one by one
MUCH_JUNK_BYTES = 100_000  # of a JPEG between its segments, filling included: Pillow walks through it byte by byte
MOST_CHUNKS = 100_000  # of a PNG; 50 MB in the usual pieces of 8 kB are 6,000
MOST_COMPRESSED_CHUNKS = 100  # of a PNG, besides the pixels: each takes Pillow 2 ms, and 1 kB of the file
MOST_BLOCKS = 100_000  # of a GIF before its first image
MUCH_RLE_BYTES = 1_000_000  # of a run-length coded BMP, which Pillow decodes in Python
MUCH_RLE_PIXELS = 4_000_000
MOST_STRIPS = 100_000  # or tiles, of a TIFF
MOST_TAGS = 1000  # of a TIFF

_SCAN = re.compile(b"\xff\xda")
_MARKER = re.compile(b"\xff+")
_COMPRESSED_CHUNKS = (b"iCCP", b"zTXt", b"iTXt")
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_LISTS = (273, 279, 324, 325)  # the tags that hold a number for each strip or tile
_TIFF_JPEG = (6, 7)  # compressions


def look(data: bytes, max_pixels: int) -> bool:
    """Whether the file is doubtful. Raises RowFailure, `bomb` or `corrupt`, for what no honest file has."""
    if data.startswith(b"\xff\xd8"):
        return _look_at_jpeg(data)
    if data.startswith(b"\x89PNG"):
        return _look_at_png(data)
    if data.startswith(b"GIF8"):
        return _look_at_gif(data)
    if data.startswith(b"BM"):
        return _look_at_bmp(data)
    if data.startswith((b"II", b"MM")):
        return _look_at_tiff(data, max_pixels)
    return False


def _look_at_jpeg(data: bytes) -> bool:
    """Segments up to the first scan, then the scans: in what follows, FF DA can be nothing but the beginning of one."""
    pixels = 0
    place = 2
    junk_bytes = 0
    for number in itertools.count():
        if number > MOST_SEGMENTS:
            raise RowFailure("corrupt", f"more than {MOST_SEGMENTS} segments before the image")
        found = _MARKER.search(data, place)
        if not found:
            junk_bytes += max(0, len(data) - place)
            break
        junk_bytes += found.end() - 1 - place  # with the filling, which is any number of FF
        place = found.end() - 1
        marker = data[place + 1:place + 2]
        if len(data) < place + 10 or marker == b"\xda":
            break
        if 0xC0 <= marker[0] <= 0xCF and marker[0] not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = struct.unpack_from(">HH", data, place + 5)
            pixels = height * width
        if marker[0] in (0x00, 0x01) or 0xD0 <= marker[0] <= 0xD8:  # markers without a length
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2:place + 4], "big")
    if (number > 16 and place > MUCH_METADATA_BYTES) or junk_bytes > MUCH_JUNK_BYTES:
        return True
    scans = _count_scans(data, place)
    if scans > MOST_SCANS:
        raise RowFailure("bomb", f"more than {MOST_SCANS} scans")
    return scans * pixels > MOST_SCANNED_PIXELS


def _count_scans(data: bytes, place: int) -> int:
    """How many scans of a JPEG begin behind `place`; counts to one above MOST_SCANS. (A pattern is faster than bytes.count.)"""
    return sum(1 for _ in itertools.islice(_SCAN.finditer(data, place), MOST_SCANS + 1))


def _look_at_png(data: bytes) -> bool:
    place = 8
    compressed = 0
    for number in itertools.count():
        if number > MOST_CHUNKS:
            raise RowFailure("corrupt", f"more than {MOST_CHUNKS} chunks")
        if place + 12 > len(data):
            break
        compressed += data[place + 4:place + 8] in _COMPRESSED_CHUNKS
        place += 12 + int.from_bytes(data[place:place + 4], "big")
    return compressed > MOST_COMPRESSED_CHUNKS


def _look_at_gif(data: bytes) -> bool:
    """The blocks of the extensions before the first image."""
    place = 13
    if len(data) > 10 and data[10] & 0x80:
        place += 3 << (data[10] & 7) + 1  # the palette
    blocks = 0
    while data[place:place + 1] == b"!":
        place += 2
        while size := data[place:place + 1]:
            blocks += 1
            place += 1 + size[0]
            if size == b"\0":
                break
            if blocks > MOST_BLOCKS:
                raise RowFailure("corrupt", f"more than {MOST_BLOCKS} blocks before the image")
        blocks += 1
        if blocks > MOST_BLOCKS:
            raise RowFailure("corrupt", f"more than {MOST_BLOCKS} blocks before the image")
    return False


def _look_at_bmp(data: bytes) -> bool:
    if len(data) < 34 or int.from_bytes(data[14:18], "little") < 40:
        return False
    width, height, _, _, compression = struct.unpack_from("<llHHL", data, 18)
    is_run_length = compression in (1, 2)
    return is_run_length and (len(data) > MUCH_RLE_BYTES or abs(width * height) > MUCH_RLE_PIXELS)


# ── TIFF ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _look_at_tiff(data: bytes, max_pixels: int) -> bool:
    """The tags of the first image: how large tiles are, how many there are, and JPEGs in them."""
    tags: dict[int, tuple[int, int]] = {}
    list_bytes = 0
    for tag, kind, count, value in read_tags(data):
        tags.setdefault(tag, (count, value))
        list_bytes += count * _TIFF_TYPE_BYTES.get(kind, 0)
        if tag in _TIFF_LISTS and count > MOST_STRIPS:
            raise RowFailure("bomb", f"more than {MOST_STRIPS} strips or tiles")
    tile = _first(tags, 322) * _first(tags, 323)
    if tile > max_pixels:
        raise RowFailure("bomb", f"a tile of {_first(tags, 322)} x {_first(tags, 323)} pixels")
    pixels = _first(tags, 256) * _first(tags, 257)
    if tile > 4 * pixels + 1_000_000 or list_bytes > len(data):
        return True
    strips = max(tags.get(273, (0, 0))[0], tags.get(324, (0, 0))[0], 1)
    if _first(tags, 259) not in _TIFF_JPEG:
        return False
    return _count_scans(data, 0) > min(2 * strips + 16, MOST_SCANS)


def _first(tags: dict[int, tuple[int, int]], tag: int) -> int:
    """The number that a tag of one value holds; 0 without it."""
    return tags.get(tag, (0, 0))[1]


def read_tags(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and value (or, of several, their place) of each entry of a TIFF's first directory."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQQ" if is_big else "HHLL"))
    short = struct.Struct(order + "H")
    try:
        place = struct.unpack_from(order + ("Q" if is_big else "L"), data, 8 if is_big else 4)[0]
        count = struct.unpack_from(order + ("Q" if is_big else "H"), data, place)[0]
        if count > MOST_TAGS:
            raise RowFailure("corrupt", f"more than {MOST_TAGS} tags")
        place += 8 if is_big else 2
        for at in range(place, place + count * entry.size, entry.size):
            tag, kind, values, value = entry.unpack_from(data, at)
            if kind == 3 and values == 1:  # a short stands at the beginning of its four or eight bytes
                value = short.unpack_from(data, at + entry.size - (8 if is_big else 4))[0]
            yield tag, kind, values, value
    except (struct.error, OverflowError):  # cut off, which the decoder will say
        return

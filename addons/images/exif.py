"""Which way up an image is, as its EXIF (or XMP) says, and what is said of an image whose EXIF cannot be honoured.

Pillow's own reader copies each tag's value, so that a small block whose tags all point at one large value takes minutes; this
one looks for the orientation alone.
"""
import re
import struct
from typing import TYPE_CHECKING

from image_text_sim_clip import Config, Remark

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ORIENTATION_TAG = 0x0112
PREFIX = b"Exif\0\0"
UPRIGHT = 1
# what turns an image upright, by Pillow's names; from the EXIF 2.32 standard, 4.6.4 A
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}
CANNOT_READ = "EXIF orientation cannot be read; not turned"


def turn_upright(image: "PillowImage") -> "PillowImage":
    """The image turned as its EXIF says; as it is where there is no orientation, or a broken one."""
    from PIL import Image
    turn = TURNS.get(find_orientation(image) or UPRIGHT)
    return image.transpose(Image.Transpose[turn]) if turn else image


def remark_on(image: "PillowImage", config: Config) -> Remark:
    """What is to be said of a decoded image: that it has an orientation which the config ignores, or a broken one."""
    orientation = find_orientation(image)
    if not config.exif_orientation:
        return Remark(is_turned=orientation in TURNS)
    if orientation is None:
        return Remark(detail=CANNOT_READ)
    if orientation != UPRIGHT and orientation not in TURNS:
        return Remark(detail=f"EXIF orientation {orientation} is none of 1 to 8; not turned")
    return Remark()


def find_orientation(image: "PillowImage") -> int | None:
    """The orientation that the image's metadata gives, 1 where it gives none, None where it cannot be read.

    A TIFF has none: Pillow has turned it already.
    """
    if image.format == "TIFF":
        return UPRIGHT
    try:
        exif = _exif_bytes(image)
        found = read_orientation(exif) if exif else None
        if found is None:
            found = _find_in_xmp(image) if exif else image.getexif().get(ORIENTATION_TAG)
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, struct.error):
        return None
    if found is None:
        return UPRIGHT
    return found if isinstance(found, int) else None


def _exif_bytes(image: "PillowImage") -> bytes:
    """The EXIF block of an image file, b"" where there is none; ValueError where ImageMagick's hexadecimal is none."""
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:
        exif = bytes.fromhex("".join(str(image.info["Raw profile type exif"]).split("\n")[3:]))
    return exif or b""


def read_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block, None where it has no such tag; ValueError for a block, or a tag, that is broken."""
    while exif.startswith(PREFIX):
        exif = exif[len(PREFIX):]
    if not exif:
        return None
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        raise ValueError("no EXIF")
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        raise ValueError("EXIF that is cut off")
    (promised,) = struct.unpack_from(order + "H", exif, start)
    there = min(promised, (len(exif) - start - 2) // 12)
    entries = exif[start + 2:start + 2 + 12 * there]
    found = [value for tag, *value in struct.iter_unpack(order + "HHI4s", entries) if tag == ORIENTATION_TAG]
    if found:
        kind, count, value = found[-1]
        if count != 1 or kind not in (3, 4):  # SHORT, as the standard says, and LONG
            raise ValueError("an orientation that is no number")
        return int(struct.unpack_from(order + ("H" if kind == 3 else "I"), value)[0])
    if there < promised:
        raise ValueError("EXIF that is cut off")
    return None


def _find_in_xmp(image: "PillowImage") -> int | None:
    """The orientation that XMP gives where EXIF has none, as Pillow reads it; None for none."""
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    text = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    match = re.search(rb'tiff:Orientation(="|>)([0-9])', text)
    return int(match[2]) if match else None

"""Images of kinds that are not read here, told by how their files begin, so that a row is `unsupported`, not `not_image`."""
import re

from addons.images import costs

BOX_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2",
              b"msf1", b"crx ", b"jxl ")  # of ISO files, behind `ftyp`
STARTS = (
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51",  # JPEG 2000 and its codestream
    b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a",  # JPEG XL and its codestream
    b"II\xbc", b"BPG\xfb", b"FLIF", b"qoif",  # JPEG XR, BPG, FLIF, QOI
    b"DDS ", b"icns", b"8BPS", b"gimp xcf", b"\xabKTX ",  # DirectDraw, Apple's icons, Photoshop, GIMP, Khronos
    b"\x76\x2f\x31\x01", b"#?RADIANCE", b"#?RGBE", b"SIMPLE  =", b"\x01\xda\0", b"\x01\xda\1",  # OpenEXR, Radiance, FITS, SGI
    b"\xd7\xcd\xc6\x9a", b"\x59\xa6\x6a\x95", b"/* XPM */", b"%PDF", b"%!PS",  # Windows metafiles, Sun, XPM, PDF, PostScript
)
PATTERNS = (
    re.compile(rb"P[1-7]\s+(#[^\n]*\n\s*)*(\d|WIDTH)"),  # PBM, PGM, PPM, PAM
    re.compile(rb"\n[\x00\x02\x03\x04\x05][\x00\x01][\x01\x02\x04\x08]", re.S),  # PCX
    re.compile(rb"\x00\x00[\x01\x02]\x00[\x01-\xff]\x00.{3}\x00", re.S),  # ICO and CUR
)
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two: BigTIFF
WIDTH = 256  # of a TIFF's tags
HEIGHT = 257
PLACES = (273, 324)  # of strips, of tiles
TGA_END = b"TRUEVISION-XFILE.\0"
TGA_START = re.compile(rb".(?:\x00[\x02\x03\x0a\x0b]\x00{5}|\x01[\x01\x09].{5}).{4}(?!\x00\x00)..(?!\x00\x00).."
                       rb"[\x08\x0f\x10\x18\x20]", re.S)


def is_other_format(data: bytes) -> bool:
    """Whether the bytes begin as an image of a kind that is not read here does."""
    if data[4:8] == b"ftyp" and data[8:12] in BOX_BRANDS:
        return True
    if data.startswith(STARTS) or data[128:132] == b"DICM" or data[:512].lstrip().lower().startswith(b"<svg"):
        return True
    if any(pattern.match(data) for pattern in PATTERNS):
        return True
    return data.endswith(TGA_END) or TGA_START.match(data) is not None


def is_sound_tiff(data: bytes) -> bool:
    """Whether a TIFF tells the size and the place of its first image; if Pillow does not open it, it is of another kind."""
    if not data.startswith(TIFF_STARTS):
        return False
    tags = {tag for tag, _, _, _ in costs.read_tags(data)}
    return WIDTH in tags and HEIGHT in tags and not tags.isdisjoint(PLACES)

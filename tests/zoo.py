"""A zoo of odd and broken image files: name -> (bytes, expected statuses, expected RGB of the middle or None)."""
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

SIDE = 48
FLAT = (200, 60, 20)


def saved(image, format_, **options):
    """The image's bytes."""
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def photo(width=64, height=48, mode="RGB", seed=1):
    """An image with detail, so that a truncated file lacks something."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def png_chunk(kind, data):
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bare_png(width, height, depth=8, colour=0, rows=b""):
    """A PNG that claims any size, whatever its data holds."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")


def proper():
    """Every mode and format that is read, in flat colours whose RGB is known: (name, bytes, RGB)."""
    flat = Image.new("RGB", (SIDE, SIDE), FLAT)
    for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        yield f"rgb.{format_}", saved(flat, format_), FLAT
        yield f"grey.{format_}", saved(Image.new("L", (SIDE, SIDE), 90), format_), (90, 90, 90)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "raw"):
        yield f"{compression}.tiff", saved(flat, "TIFF", compression=compression), FLAT
    for quality in (1, 30, 100):
        yield f"quality{quality}.jpg", saved(flat, "JPEG", quality=quality), FLAT
    for subsampling in (0, 1, 2):
        yield f"subsampling{subsampling}.jpg", saved(flat, "JPEG", subsampling=subsampling, quality=95), FLAT
    yield "progressive.jpg", saved(flat, "JPEG", progressive=True, quality=95), FLAT
    yield "lossless.webp", saved(flat, "WEBP", lossless=True), FLAT
    yield "cmyk.jpg", saved(flat.convert("CMYK"), "JPEG", quality=95), FLAT
    yield "cmyk.tiff", saved(flat.convert("CMYK"), "TIFF"), FLAT
    yield "lab.tiff", saved(Image.new("LAB", (SIDE, SIDE), (128, 128, 128)), "TIFF"), None
    yield "ycbcr.tiff", saved(flat.convert("YCbCr"), "TIFF"), FLAT
    for bit in (0, 1):
        for format_ in ("PNG", "BMP", "TIFF", "GIF"):
            yield f"bit{bit}.{format_}", saved(Image.new("1", (SIDE, SIDE), bit), format_), (255 * bit,) * 3
    for format_ in ("PNG", "GIF", "BMP", "TIFF"):
        yield f"palette.{format_}", saved(flat.convert("P", palette=Image.Palette.ADAPTIVE), format_), FLAT
    for level in (0, 77, 255):
        wide = np.full((SIDE, SIDE), level * 257, np.uint16)
        yield f"grey16-{level}.png", saved(Image.fromarray(wide), "PNG"), (level,) * 3
        yield f"grey16-{level}.tiff", saved(Image.fromarray(wide), "TIFF"), (level,) * 3
        yield f"int32-{level}.tiff", saved(Image.fromarray(wide.astype(np.int32)), "TIFF"), (level,) * 3
        unit = np.full((SIDE, SIDE), level / 255, np.float32)
        yield f"unit-float-{level}.tiff", saved(Image.fromarray(unit), "TIFF"), (level,) * 3
    span = np.tile(np.linspace(-1000, 3000, SIDE, dtype=np.float32), (SIDE, 1))
    yield "wide-float.tiff", saved(Image.fromarray(span), "TIFF"), (127, 127, 127)
    span[0, :5] = (np.nan, np.inf, -np.inf, np.nan, np.inf)
    yield "nan-float.tiff", saved(Image.fromarray(span), "TIFF"), (127, 127, 127)
    yield "bytes-float.tiff", saved(Image.fromarray(np.full((SIDE, SIDE), 140, np.float32)), "TIFF"), (140,) * 3
    for alpha in (0, 128, 255):
        expected = tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in FLAT)
        glass = Image.new("RGBA", (SIDE, SIDE), (*FLAT, alpha))
        for format_ in ("PNG", "TIFF"):
            yield f"rgba-{alpha}.{format_}", saved(glass, format_), expected
        yield f"rgba-{alpha}.webp", saved(glass, "WEBP", lossless=True, exact=True), expected
        level = round((90 * alpha + 255 * (255 - alpha)) / 255)
        yield f"la-{alpha}.png", saved(Image.new("LA", (SIDE, SIDE), (90, alpha)), "PNG"), (level,) * 3
    see_through = flat.convert("P", palette=Image.Palette.ADAPTIVE)
    index = see_through.getpixel((9, 9))
    for format_ in ("PNG", "GIF"):
        yield f"palette-clear.{format_}", saved(see_through, format_, transparency=index), (255, 255, 255)
    yield "key-colour.png", saved(flat, "PNG", transparency=FLAT), (255, 255, 255)
    others = [Image.new("RGB", (SIDE, SIDE), c) for c in ("blue", "lime")]
    for format_ in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format_ == "WEBP" else {}
        yield f"animated.{format_}", saved(flat, format_, save_all=True, append_images=others, **options), FLAT
    for size in ((1, 1), (1, 48), (48, 1), (2, 3), (1, 3000), (3000, 1)):
        yield f"size-{size[0]}x{size[1]}.png", saved(Image.new("RGB", size, FLAT), "PNG"), FLAT
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif{orientation}.jpg", saved(flat, "JPEG", exif=exif, quality=95), FLAT
    yield "bad-exif.jpg", saved(flat, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95), FLAT
    yield "trailing-rubbish.jpg", saved(flat, "JPEG", quality=95) + b"<script>" * 100, FLAT


def broken():
    """What must get a status: (name, bytes, statuses that are right)."""
    whole = {f: saved(photo(), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    for format_, data in whole.items():
        for step in range(20):
            cut = len(data) * step // 20
            yield f"cut{step:02d}.{format_}", data[:cut], ("not_image", "corrupt", "ok") if cut else ("not_image",)
    yield "html.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", ("not_image",)
    yield "json.png", b'{"error": "not found"}', ("not_image",)
    yield "svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', ("unsupported",)
    yield "xml-svg.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', ("unsupported", "not_image")
    yield "pdf.jpg", b"%PDF-1.4\n1 0 obj\n", ("unsupported",)
    yield "psd.jpg", b"8BPS\0\1" + b"\0" * 60, ("unsupported",)
    yield "avif.jpg", saved(photo(), "AVIF"), ("unsupported",)
    yield "heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40, ("unsupported",)
    yield "jpeg2000.jpg", saved(photo(), "JPEG2000"), ("unsupported", "not_image")
    yield "ico.png", saved(photo(32, 32), "ICO"), ("unsupported", "not_image")
    yield "ppm.jpg", saved(photo(), "PPM"), ("unsupported", "not_image")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("a.txt", "a")
    yield "zip.jpg", archive.getvalue(), ("not_image",)
    yield "empty.jpg", b"", ("not_image",)
    yield "one-byte.jpg", b"\xff", ("not_image",)
    yield "zeros.jpg", b"\0" * 5000, ("not_image",)
    yield "text.jpg", b"just words " * 50, ("not_image",)
    yield "bomb.png", bare_png(12000, 12000, 1, 0, b"\0" * 100), ("bomb",)
    yield "bomb-real.png", bare_png(12000, 12000, 1, 0, b"\0" * (1501 * 12000)), ("bomb",)
    yield "bomb-huge.png", bare_png(2_000_000_000, 2_000_000_000, 1, 0, b""), ("bomb", "corrupt")
    frame = b"," + struct.pack("<HHHH", 0, 0, 65000, 65000) + b"\0\2\2D\1\0;"
    yield "bomb.gif", b"GIF89a" + struct.pack("<HH", 65000, 65000) + b"\0\0\0" + frame, ("bomb", "corrupt")
    yield "zero-size.png", bare_png(0, 0), ("corrupt",)
    yield "no-data.png", bare_png(20, 20), ("corrupt",)
    yield "bad-crc.png", whole["PNG"].replace(b"IHDR", b"IHDR\0", 1), ("corrupt", "not_image")
    for seed in range(30):
        rng = np.random.default_rng(seed)
        format_ = list(whole)[seed % len(whole)]
        data = bytearray(whole[format_])
        for at in rng.integers(0, len(data), 8):
            data[at] ^= 1 << int(rng.integers(0, 8))
        yield f"flips{seed}.{format_}", bytes(data), ("ok", "corrupt", "not_image", "bomb", "unsupported")


# ── Small files that cost much ────────────────────────────────────────────────────────────────────────────────────────

def segment(marker, data):
    """One segment of a JPEG file."""
    return struct.pack(">HH", marker, len(data) + 2) + data


def jpeg_with(segments):
    """A small JPEG with these bytes before its own segments."""
    body = saved(Image.new("RGB", (32, 32), FLAT), "JPEG")
    return body[:2] + segments + body[2:]


def progressive_jpeg(side, scans):
    """A grey JPEG of side x side pixels with `scans` scans that say "nothing here" of all blocks, 100 bytes each."""
    blocks = (side // 8) ** 2
    head = b"\xff\xd8" + segment(0xFFDB, b"\0" + b"\x10" * 64)
    head += segment(0xFFC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    head += segment(0xFFC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")  # one code for "no difference"
    head += segment(0xFFC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # one code for "16,384 empty blocks"
    first = segment(0xFFDA, b"\x01\x01\x00\x00\x00\x00") + b"\0" * -(-blocks // 8)
    empty = segment(0xFFDA, b"\x01\x01\x00\x01\x3f\x00") + b"\0" * -(-(-(-blocks // 16384) * 15) // 8)
    return head + first + empty * scans + b"\xff\xd9"


def tiff_file(entries, data=b""):
    """A little-endian TIFF with one directory of (tag, type, count, value or place); `data` lies behind it."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<L", 8) + directory + b"\0\0\0\0" + data


def tiled_tiff(side, tile_side):
    """A deflated grey TIFF of side x side pixels that lie in one tile of tile_side x tile_side."""
    packed = zlib.compress(b"\x30" * tile_side ** 2, 9)
    count = 11
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
               (284, 3, 1, 1), (322, 4, 1, tile_side), (323, 4, 1, tile_side), (324, 4, 1, 8 + 2 + 12 * count + 4),
               (325, 4, 1, len(packed))]
    return tiff_file(entries, packed)


def striped_tiff(strips):
    """A raw TIFF of 32 x 32 pixels that lists so many strips."""
    count = 8
    entries = [(256, 4, 1, 32), (257, 4, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, strips, 8 + 2 + 12 * count + 4), (278, 4, 1, 1), (279, 4, 1, 32)]
    return tiff_file(entries, struct.pack("<L", 8) * strips)


def run_length_bmp(side, data):
    """A BMP of 8 bits, its rows run-length coded."""
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    header = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, len(data), 2835, 2835, 256, 0)
    return b"BM" + struct.pack("<LHHL", 54 + len(palette) + len(data), 0, 0, 54 + len(palette)) + header + palette + data


def huge_canvas_webp(side):
    """A WebP of 100 bytes: a frame of 16 x 16 pixels on a canvas of side x side."""
    frame = saved(Image.new("RGB", (16, 16), FLAT), "WEBP", lossless=True)[12:]

    def three_bytes(value):
        return struct.pack("<L", value)[:3]

    def chunk(kind, data):
        return kind + struct.pack("<L", len(data)) + data + b"\0" * (len(data) % 2)
    size = three_bytes(side - 1) * 2
    body = b"WEBP" + chunk(b"VP8X", b"\x02\0\0\0" + size) + chunk(b"ANIM", b"\0" * 6)
    body += chunk(b"ANMF", b"\0" * 6 + three_bytes(15) * 2 + three_bytes(100) + b"\0" + frame)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def hostile():
    """Small files that cost a careless decoder minutes or gigabytes: (name, bytes, statuses that are right)."""
    yield "scans.jpg", progressive_jpeg(4000, 3000), ("bomb",)
    yield "slow-scans.jpg", progressive_jpeg(4096, 450), ("ok", "corrupt", "crashed")
    yield "exif-segments.jpg", jpeg_with(segment(0xFFE1, b"Exif\0\0" + b"x" * 30) * 30_000), ("corrupt",)
    yield "large-exif.jpg", jpeg_with(segment(0xFFE1, b"Exif\0\0" + b"x" * 60_000) * 100), ("ok", "corrupt")
    yield "comments.jpg", jpeg_with(b"\xff\xfe\0\2" * 500_000), ("corrupt",)
    pieces = png_chunk(b"teXt", b"a\0b")
    png = bare_png(32, 32, 8, 0, b"\0" * (33 * 32))
    yield "chunks.png", png[:33] + pieces * 150_000 + png[33:], ("corrupt",)
    yield "many-chunks.png", png[:33] + pieces * 3000 + png[33:], ("ok",)
    yield "profiles.png", png[:33] + png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(900_000), 9)) * 500 + png[33:], ("ok",)
    yield "filling.jpg", jpeg_with(b"\xff" * 1_000_000), ("ok",)
    yield "junk.jpg", jpeg_with(segment(0xFFE1, b"Exif\0\0") + b"x" * 1_000_000), ("ok",)
    frame = b"," + struct.pack("<HHHH", 0, 0, 32, 32) + b"\0\2\2D\1\0;"
    yield "blocks.gif", b"GIF89a" + struct.pack("<HH", 32, 32) + b"\0\0\0" + b"!\xfe\x01x\0" * 200_000 + frame, ("corrupt",)
    yield "run-lengths.bmp", run_length_bmp(3000, b"\1\7" * 4_000_000), ("ok", "corrupt", "crashed")
    yield "huge-tile.tiff", tiled_tiff(32, 20_000), ("bomb",)
    yield "large-tile.tiff", tiled_tiff(32, 6000), ("ok",)
    yield "strips.tiff", striped_tiff(300_000), ("bomb",)
    yield "tags.tiff", tiff_file([(30_000 + n, 4, 1, 0) for n in range(20_000)]), ("corrupt",)
    for number in range(8):
        yield f"canvas{number}.webp", huge_canvas_webp(6000 + number), ("ok",)
    yield "strip.png", saved(Image.new("L", (1, 40_000_000), 7), "PNG", compress_level=1), ("ok",)
    yield "rgba.png", saved(Image.new("RGBA", (7000, 7000), (9, 9, 9, 90)), "PNG", compress_level=1), ("ok",)

"""What Pillow misreads without a word is set right or refused, and half images are refused that decoders take for whole."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_inputs import encoded
from zoo import png_chunk

import image_text_sim_clip as script

CONFIG = script.Config(pretrained_model="none")
WHITE = 255
HEIGHT, WIDTH = 9, 13


def pixels_of(data, config=CONFIG):
    return np.asarray(script.decode_image(data, config)).astype(int)


def status_of(data):
    with pytest.raises(script.RowFailure) as failure:
        script.decode_image(data, CONFIG)
    return failure.value.status, failure.value.detail


def in_colours(grey):
    return np.repeat(np.rint(grey).astype(int)[..., None], 3, axis=2)


@pytest.fixture
def chances():
    return np.random.default_rng(5)


# ── PNG ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def packed_rows(samples, depth):
    """Rows of numbers as the bytes of a PNG or BMP; each row begins at a byte."""
    rows = []
    for row in samples:
        bits = "".join(format(int(number), f"0{depth}b") for number in row)
        bits += "0" * (-len(bits) % 8)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return rows


def png(samples, depth, colours, key=None, rows=None):
    """A PNG of these samples (height, width, channels); `key` is the transparent colour, `rows` how many rows are there."""
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colours, 0, 0, 0)
    packed = packed_rows(samples.reshape(samples.shape[0], -1), depth)[:rows]
    transparency = b"" if key is None else png_chunk(b"tRNS", b"".join(struct.pack(">H", level) for level in key))
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + transparency + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_any_depth(depth, chances):
    """The grey that a PNG calls transparent is given in the file's own depth, and the background shows there alone."""
    highest = 2 ** depth - 1
    samples = chances.integers(0, highest + 1, (HEIGHT, WIDTH, 1))
    key = samples[4, 4]
    expected = np.where(samples == key, WHITE, samples * 255 / highest)[..., 0]
    assert np.abs(pixels_of(png(samples, depth, 0, key)) - in_colours(expected)).max() <= 1


def test_transparent_colour_of_sixteen_bits(chances):
    """The transparent colour of a PNG of 48 bits is told by what Pillow keeps of its pixels, and no other colour is."""
    samples = chances.integers(0, 65536, (HEIGHT, WIDTH, 3))
    samples[2] = samples[0, 0]
    samples[5, 5] = samples[0, 0] & 255  # has in its high bytes nothing of it
    expected = np.where((samples == samples[0, 0]).all(axis=2, keepdims=True), WHITE, samples / 257)
    assert np.abs(pixels_of(png(samples, 16, 2, samples[0, 0])) - expected).max() <= 1.5


def test_png_without_its_palette(chances):
    """A PNG whose palette is missing is corrupt, and not black."""
    data = png(chances.integers(0, 16, (HEIGHT, WIDTH, 1)), 8, 3)
    assert status_of(data) == ("corrupt", "no palette")
    palette = chances.integers(0, 256, (16, 3)).astype(np.uint8).tobytes()
    assert pixels_of(data[:33] + png_chunk(b"PLTE", palette) + data[33:]).max() > 0


def test_orientation_of_a_transparent_png(chances):
    """A PNG whose transparent grey was set right is still turned as its EXIF says."""
    samples = chances.integers(0, 65536, (HEIGHT, WIDTH, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(samples, 16, 0, samples[4, 4])
    turned = data[:33] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[33:]
    upright = script.Config(pretrained_model="none", exif_orientation=True)
    assert (pixels_of(turned, upright) == np.rot90(pixels_of(data), -1)).all()


# ── BMP ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def bmp(pixels, bits, palette=b"", masks=b""):
    """A BMP of these bytes, its lowest row first."""
    header = struct.pack("<LllHHLLllLL", 40 + len(masks), WIDTH, HEIGHT, 1, bits, 3 if masks else 0, len(pixels), 0, 0,
                         len(palette) // 4, 0) + masks
    place = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<LHHL", place + len(pixels), 0, 0, place) + header + palette + pixels


def bmp_rows(samples, bits):
    return b"".join(row + bytes(-len(row) % 4) for row in packed_rows(samples[::-1], bits))


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("palette", [(0, 255), (255, 0)])
def test_black_and_white_bmp(bits, palette, chances):
    """A BMP of two colours, black and white, is read with as many bits a pixel as it has."""
    samples = chances.integers(0, 2, (HEIGHT, WIDTH))
    data = bmp(bmp_rows(samples, bits), bits, b"".join(bytes([level, level, level, 0]) for level in palette))
    assert (pixels_of(data) == in_colours(np.array(palette)[samples])).all()


def test_black_and_white_bmp_of_an_old_kind(chances):
    """A BMP with the short header of OS/2 stays what it is."""
    samples = chances.integers(0, 2, (HEIGHT, WIDTH))
    head = struct.pack("<LHHHH", 12, WIDTH, HEIGHT, 1, 1) + bytes(3) + b"\xff" * 3
    data = b"BM" + struct.pack("<LHHL", 14 + len(head), 0, 0, 14 + len(head)) + head + bmp_rows(samples, 1)
    assert (pixels_of(data) == in_colours(255 * samples)).all()


@pytest.mark.parametrize("header", [56, 108, 124])
def test_opacity_that_nobody_filled(header, chances):
    """A BMP whose opacity is zero everywhere is opaque, as in browsers; with some opacity it is transparent elsewhere."""
    colours = chances.integers(0, 256, (HEIGHT, WIDTH, 3))
    masks = struct.pack("<LLLL", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(header - 56)
    stored = np.concatenate([colours[::-1, :, ::-1], np.zeros((HEIGHT, WIDTH, 1))], axis=2).astype(np.uint8)
    assert (pixels_of(bmp(stored.tobytes(), 32, masks=masks)) == colours).all()
    stored[-1, 0, 3] = 255
    mixed = pixels_of(bmp(stored.tobytes(), 32, masks=masks))
    assert (mixed[0, 0] == colours[0, 0]).all() and (mixed[1:] == WHITE).all()


# ── TIFF ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def tiff(samples, kind, order="<", packed=False, separate=False, **tags):
    """A TIFF of one strip, or one for each plane; `kind` is numpy's name of a number's type, the others are tags by name."""
    samples = np.atleast_3d(samples).astype(np.dtype(kind).newbyteorder(order))
    channels = samples.shape[2]
    planes = [samples[..., channel] for channel in range(channels)] if separate else [samples]
    strips = [zlib.compress(plane.tobytes()) if packed else plane.tobytes() for plane in planes]
    numbers = {256: [WIDTH], 257: [HEIGHT], 258: [8 * samples.itemsize] * channels, 259: [8 if packed else 1],
               262: [tags.get("colours", 1 if channels < 3 else 2)], 277: [channels], 278: [HEIGHT],
               279: [len(strip) for strip in strips], 284: [2 if separate else 1],
               339: [{"u": 1, "i": 2, "f": 3}[np.dtype(kind).kind]] * channels}
    for name, tag in (("orientation", 274), ("palette", 320), ("opacity", 338)):
        if name in tags:
            numbers[tag] = tags[name]
    behind = 8 + 2 + 12 * (len(numbers) + 1) + 4
    values = b"".join(strips)
    place = behind
    numbers[273] = [(place := place + length) - length for length in numbers[279]]
    entries = []
    for tag, listed in sorted(numbers.items()):
        form, code = (("L", 4) if tag in (273, 279) else ("H", 3))
        raw = struct.pack(f"{order}{len(listed)}{form}", *listed)
        if len(raw) > 4:
            values += bytes(len(values) % 2)
            entries.append(struct.pack(order + "HHLL", tag, code, len(listed), behind + len(values)))
            values += raw
        else:
            entries.append(struct.pack(order + "HHL", tag, code, len(listed)) + raw + bytes(4 - len(raw)))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, len(entries))
    return start + b"".join(entries) + bytes(4) + values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "i4", "f4"])
def test_grey_of_any_numbers(kind, order, packed, chances):
    """Grey is what the numbers say, whatever their type, the order of their bytes, and with or without compression."""
    numbers = {"u1": (0, 255), "i1": (-128, 127), "u2": (0, 65535), "i2": (-3000, 3000), "i4": (-70_000, 70_000), "f4": (0, 1)}
    low, high = numbers[kind]
    samples = chances.random((HEIGHT, WIDTH)) * (high - low) + low
    samples[0, :2] = (low, high)
    samples = samples.astype(kind).astype(float)
    data = tiff(samples, kind, order, packed)
    assert np.abs(pixels_of(data) - in_colours((samples - low) / (high - low) * 255)).max() <= 1


@pytest.mark.parametrize("packed", [False, True])
def test_unsigned_numbers_of_32_bits(packed, chances):
    """Numbers above 2^31 are bright, not below all others."""
    samples = (chances.random((HEIGHT, WIDTH)) * (2**32 - 1)).astype(np.uint32)
    samples[0, :2] = (0, 2**32 - 1)
    assert np.abs(pixels_of(tiff(samples, "u4", packed=packed)) - in_colours(samples / (2**32 - 1) * 255)).max() <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "order"), [("u1", "<"), ("u1", ">"), ("u2", "<"), ("f4", "<"), ("f4", ">")])
def test_white_is_zero(kind, order, packed, chances):
    """A TIFF in which zero is white is no negative, in bytes, in 16 bits and in floats."""
    high = 1 if kind == "f4" else 256 ** np.dtype(kind).itemsize - 1
    samples = (chances.random((HEIGHT, WIDTH)) * high).astype(kind)
    data = tiff(samples, kind, order, packed, colours=0)
    assert np.abs(pixels_of(data) - in_colours(255 - samples.astype(float) / high * 255)).max() <= 1


@pytest.mark.parametrize("turn", [False, True])
def test_orientation_of_a_tiff_that_was_set_right(turn, chances):
    """A TIFF that Pillow has turned is not turned again because its colours were set right."""
    samples = chances.integers(0, 65536, (HEIGHT, WIDTH))
    data = tiff(samples, "u2", colours=0, orientation=[6])
    config = script.Config(pretrained_model="none", exif_orientation=turn)
    expected = in_colours(np.rot90(255 - samples / 257, -1))
    assert np.abs(pixels_of(data, config) - expected).max() <= 1


@pytest.mark.parametrize("scale", [1, 257])
def test_palette_of_small_numbers(scale, chances):
    """A palette whose numbers are of 8 bits, where the standard wants 16, is not black."""
    palette = chances.integers(0, 256, (256, 3))
    samples = chances.integers(0, 256, (HEIGHT, WIDTH))
    data = tiff(samples, "u1", colours=3, palette=(palette.T * scale).ravel().tolist())
    assert (pixels_of(data) == palette[samples]).all()


@pytest.mark.parametrize(("kind", "channels", "packed", "is_read"), [
    ("u1", 3, False, True), ("u1", 3, True, True), ("u2", 3, True, True), ("u1", 4, True, True), ("u1", 4, False, True),
    ("u2", 3, False, False), ("u2", 4, False, False), ("u1", 2, True, False)])
def test_separate_planes(kind, channels, packed, is_read, chances):
    """A TIFF whose colours lie in planes is read rightly, or refused where Pillow mixes the planes up."""
    samples = chances.integers(0, 256, (HEIGHT, WIDTH, channels))
    if channels in (2, 4):
        samples[..., -1] = 255
    scale = 257 if kind == "u2" else 1
    data = tiff(samples * scale, kind, packed=packed, separate=True, **({"opacity": [2]} if channels in (2, 4) else {}))
    if is_read:
        assert (pixels_of(data) == samples[..., :3]).all()
    else:
        assert status_of(data)[0] == "unsupported"


@pytest.mark.parametrize("kind", ["f8", "f2", "u8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_kinds_of_tiff_that_pillow_does_not_read(kind, order, chances):
    """A sound TIFF of a kind that Pillow does not open is unsupported; one whose directory is cut off is corrupt."""
    data = tiff(chances.random((HEIGHT, WIDTH)), kind if kind != "u8" else "i8", order)
    assert status_of(data) == ("unsupported", "a TIFF of a kind that is not read here")
    assert status_of(data[:40])[0] == "corrupt"


# ── GIF ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("transparency", [None, 5])
def test_first_frame_that_leaves_a_part_free(transparency, chances):
    """What the first frame of a GIF does not cover shows the background, whether or not a colour of it is transparent."""
    indices = chances.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    palette = chances.integers(0, 256, (256, 3))
    frame = Image.fromarray(indices, "P")
    frame.putpalette(palette.astype(np.uint8).tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    data = bytearray(encoded(frame, "GIF", optimize=False, **options))
    data[6:10] = struct.pack("<HH", WIDTH + 7, HEIGHT + 5)  # the canvas
    place = data.index(b"," + struct.pack("<HHHH", 0, 0, WIDTH, HEIGHT))
    data[place + 1:place + 5] = struct.pack("<HH", 4, 2)  # where the frame begins in it
    expected = np.full((HEIGHT + 5, WIDTH + 7, 3), WHITE)
    expected[2:2 + HEIGHT, 4:4 + WIDTH] = np.where((indices == transparency)[..., None], WHITE, palette[indices])
    assert (pixels_of(bytes(data)) == expected).all()


# ── Half images ───────────────────────────────────────────────────────────────────────────────────────────────────────

END = b"\xff\xd9"
MISSING = ("corrupt", "part of the pixels is missing")


@pytest.fixture
def photo(noise):
    """Noise on a slope: no row is like another, and none is grey or black."""
    slope = np.linspace(140, 230, 160)[:, None, None] * np.ones((160, 200, 3))
    return Image.fromarray((slope + np.asarray(noise(200, 160)) / 12).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 2}, {"quality": 95}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_jpeg_that_was_given_an_end(photo, mode, options, share):
    """A JPEG that breaks off, and ends properly all the same, is corrupt: libjpeg would fill the rest with grey."""
    whole = encoded(photo.convert(mode), "JPEG", **options)
    assert pixels_of(whole).shape == (160, 200, 3)
    assert status_of(whole[:int(len(whole) * share)] + END) == MISSING


@pytest.mark.parametrize("format_", ["JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_file_whose_end_was_never_written(noise, format_, mode):
    """A JPEG or WebP whose second half are zeros is corrupt: zeros decode as pixels."""
    whole = encoded(noise(300, 200).convert(mode), format_, quality=90)
    half = whole[:len(whole) // 2]
    assert status_of(half + bytes(len(half)))[0] == "corrupt"
    assert status_of(half + bytes(10 * len(half) if format_ == "JPEG" else len(whole) - len(half))) == MISSING


def test_whole_images_with_zeros_behind_them(photo):
    """Zeros behind a whole image, also in place of a JPEG's end, and a grey corner, make nothing of it missing."""
    grey_corner = photo.copy()
    grey_corner.paste((128, 128, 128), (120, 80, 200, 160))
    for image in (photo, grey_corner, Image.new("RGB", (50, 40), (128, 128, 128))):
        for options in ({}, {"progressive": True}, {"subsampling": 0}):
            jpeg = encoded(image, "JPEG", **options)
            exif = Image.Exif()
            exif[0x0112] = 1
            thumbnail = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 6 + 4 + 6000) + b"Exif\0\0" + bytes(4) + \
                encoded(image.resize((20, 16)), "JPEG").ljust(6000, b"\0") + jpeg[2:]
            files = [jpeg, jpeg + bytes(9000), thumbnail, thumbnail + bytes(20)]
            if "progressive" not in options:  # those are not read without an end
                files.append(jpeg[:-2] + bytes(9000))
            for data in files:
                assert (pixels_of(data) == pixels_of(jpeg)).all()
        webp = encoded(image, "WEBP", lossless=True)
        assert (pixels_of(webp + bytes(9000)) == np.asarray(image)).all()


@pytest.mark.parametrize(("depth", "colours", "channels"), [(1, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (8, 6, 4), (16, 6, 4)])
def test_png_that_lacks_rows(depth, colours, channels, chances):
    """A PNG whose data end properly before its last row is corrupt; one whose last rows are black is not."""
    samples = chances.integers(0, 2 ** depth, (HEIGHT, WIDTH, channels))
    samples[-3:] = 0
    assert pixels_of(png(samples, depth, colours)).shape == (HEIGHT, WIDTH, 3)
    for rows in (0, 1, HEIGHT - 1):
        assert status_of(png(samples, depth, colours, rows=rows)) in (MISSING, ("corrupt", "OSError"))


def test_png_whose_data_break_off_in_a_wrong_checksum(chances):
    """Where damage ends the compressed data before the last row, Pillow may leave the rest black: such an image is corrupt."""
    samples = chances.integers(0, 256, (HEIGHT, WIDTH, 1))
    samples[-3:] = 0
    for rows in range(HEIGHT):
        whole = png(samples, 8, 0, rows=rows)
        for place in range(40, len(whole) - 16):
            data = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:]
            assert status_of(data)[0] == "corrupt"


def test_interlaced_png_that_lacks_rows(chances):
    """The same of an interlaced PNG, of which every other row may be missing; whole ones of any size are read."""
    signature_and_header = 33
    for width, height in ((1, 1), (3, 2), (8, 8), (21, 17), (2, 9)):
        samples = chances.integers(0, 256, (height, width, 3)).astype(np.uint8)
        passes = [samples[top::down, left::right] for left, top, right, down in
                  ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))]
        rows = [b"\0" + row.tobytes() for part in passes if part.size for row in part]
        header = bytearray(png(samples, 8, 2)[8 + 8:8 + 8 + 13])
        header[12] = 1
        start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(header))
        assert len(start) == signature_and_header
        for there in (len(rows), len(rows) - 1, len(rows) // 2):
            data = start + png_chunk(b"IDAT", zlib.compress(b"".join(rows[:there]))) + png_chunk(b"IEND", b"")
            if there == len(rows):
                assert (pixels_of(data) == samples).all()
            else:
                assert status_of(data)[0] == "corrupt"


def test_whole_images_of_every_kind_are_not_half(photo):
    """Black, transparent, grey and tiny images, in every format that is read, are whole."""
    for mode, colour in (("RGB", 0), ("RGB", (128, 128, 128)), ("RGBA", 0), ("L", 0), ("L", 128), ("1", 0), ("P", 0)):
        for size in ((1, 1), (1, 40), (40, 1), (33, 17)):
            image = Image.new(mode, size, colour)
            for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
                if format_ == "JPEG" and mode in ("RGBA", "P"):
                    continue
                buffer = io.BytesIO()
                image.save(buffer, format_)
                assert pixels_of(buffer.getvalue()).shape == (size[1], size[0], 3)

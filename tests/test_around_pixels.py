"""What lies around an image's pixels decides nothing but what it is meant to: broken or huge metadata, MPO, orientations."""
import io
import json
import pathlib
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small_inputs import encoded

import image_text_sim_clip as script
from addons.curation import duplicates, export
from addons.images import exif, gpu_decode, isolate, plain_pixels
from addons.measures import images as images_measure

UPRIGHT = script.Config(pretrained_model="none", exif_orientation=True)
AS_STORED = script.Config(pretrained_model="none")
ROTATED = [None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]


def pixels_of(data, config=AS_STORED):
    return np.asarray(script.decode_image(data, config))


def remark_on(data, config=AS_STORED):
    return script.decode_image(data, config).info[script.REMARK]


def orientation_block(value, order="<", kind=3, count=1, tags=(0x0112,)):
    """An EXIF block with these tags, each of this value."""
    packed = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    entries = b"".join(struct.pack(order + "HHI", tag, kind, count) + packed for tag in tags)
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)


@pytest.fixture
def photo(noise):
    return noise(48, 32)


# ── Sound pixels, whatever lies around them ───────────────────────────────────────────────────────────────────────────

def png_chunk(name, content, crc=None):
    checksum = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def with_chunks(data, *chunks, behind=False):
    """The PNG with chunks put behind its header, or behind its pixels."""
    place = data.rindex(b"IEND") - 4 if behind else 33
    return data[:place] + b"".join(chunks) + data[place:]


BIG = zlib.compress(bytes(3_000_000))
PNG_CHUNKS = {
    "text of 3 MB": png_chunk(b"zTXt", b"k\0\0" + BIG), "international text": png_chunk(b"iTXt", b"k\0\1\0\0\0" + BIG),
    "plain text": png_chunk(b"tEXt", b"k\0" + b"x" * 2_000_000), "colour profile": png_chunk(b"iCCP", b"p\0\0" + BIG),
    "100 texts": b"".join(png_chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(990_000))) for n in range(100)),
    "broken text": png_chunk(b"zTXt", b"k\0\0junk"), "bad checksum": png_chunk(b"tEXt", b"k\0v", crc=1),
    "short gamma": png_chunk(b"gAMA", b"\0"), "short chromaticities": png_chunk(b"cHRM", b"\0\0"),
    "short density": png_chunk(b"pHYs", b""), "unknown method": png_chunk(b"zTXt", b"k\0\7" + BIG),
    "no keyword": png_chunk(b"iTXt", b""), "broken exif": png_chunk(b"eXIf", b"junk"),
    "short animation": png_chunk(b"acTL", b"\0\0"), "animation of no frame": png_chunk(b"acTL", bytes(8))}


@pytest.mark.parametrize("config", [AS_STORED, UPRIGHT], ids=["as stored", "upright"])
@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_png_metadata_refuses_nothing(photo, name, behind, config):
    """Chunks of text, colours or EXIF, however large or broken, leave a PNG's pixels what they are."""
    data = with_chunks(encoded(photo, "PNG"), PNG_CHUNKS[name], behind=behind)
    assert (pixels_of(data, config) == np.asarray(photo)).all()


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "I;16"])
def test_png_keeps_what_decides_its_pixels(photo, mode):
    """Palette, transparency and depth are read where a text is left out."""
    image = photo.convert("L") if mode == "I;16" else photo.convert("RGB").convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    options = {"transparency": 3} if mode == "P" else {}
    data = encoded(image, "PNG", **options)
    assert (pixels_of(with_chunks(data, PNG_CHUNKS["text of 3 MB"])) == pixels_of(data)).all()


def test_png_cut_behind_its_pixels(photo):
    """A file that ends within the text behind the pixels has all its pixels; one that ends within them is corrupt."""
    data = with_chunks(encoded(photo, "PNG"), PNG_CHUNKS["plain text"], behind=True)
    assert (pixels_of(data[:-1_000_000]) == np.asarray(photo)).all()
    whole = encoded(photo, "PNG")
    for cut in (40, len(whole) // 2, len(whole) - 40):
        with pytest.raises(script.RowFailure, match="corrupt"):
            script.decode_image(whole[:cut], AS_STORED)


def jpeg_segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


MPF = b"MPF\0II*\0\x08\0\0\0"
JPEG_SEGMENTS = {
    "exif that is none": jpeg_segment(0xE1, b"Exif\0\0junk"), "empty exif": jpeg_segment(0xE1, b"Exif\0\0"),
    "exif without end": jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), "broken mpf": jpeg_segment(0xE2, MPF + b"\1"),
    "mpf of nothing": jpeg_segment(0xE2, MPF + bytes(6)), "mpf of no header": jpeg_segment(0xE2, b"MPF\0junk"),
    "mpf with a count alone": jpeg_segment(0xE2, MPF + struct.pack("<HHHII", 1, 0xB001, 4, 1, 5) + bytes(4)),
    "mpf with short entries": jpeg_segment(
        0xE2, MPF + struct.pack("<HHHIIHHII", 2, 0xB001, 4, 1, 3, 0xB002, 7, 4, 0) + bytes(4)),
    "short jfif": jpeg_segment(0xE0, b"JFIF"), "profile of nothing": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "profile of one byte": jpeg_segment(0xE2, b"ICC_PROFILE\0\1"), "photoshop": jpeg_segment(0xED, b"Photoshop 3.0\08BIM\1"),
    "xmp": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"), "comment": jpeg_segment(0xFE, b"\xff" * 100),
    "short adobe": jpeg_segment(0xEE, b"Adobe")}


@pytest.mark.parametrize("config", [AS_STORED, UPRIGHT], ids=["as stored", "upright"])
@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_jpeg_metadata_refuses_nothing(photo, name, config):
    """Broken EXIF, MPO indices, profiles and comments leave a JPEG's pixels what they are."""
    data = encoded(photo, "JPEG")
    assert (pixels_of(data[:2] + JPEG_SEGMENTS[name] + data[2:], config) == pixels_of(data)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_keeps_what_decides_its_colours(photo, mode):
    """The segments that tell of the kind of colours stay, so that a file read again has the same colours."""
    data = encoded(photo.convert(mode), "JPEG")
    copies = list(plain_pixels.without_metadata(data[:2] + JPEG_SEGMENTS["comment"] + data[2:]))
    assert len(copies) == 1 and (pixels_of(copies[0].data) == pixels_of(data)).all()


def webp_chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def webp_file(flags, *chunks, size=(48, 32)):
    """An extended WebP of these chunks; `flags` say what else than pixels it holds."""
    canvas = bytes([flags, 0, 0, 0]) + b"".join(struct.pack("<I", side - 1)[:3] for side in size)
    body = b"WEBP" + webp_chunk(b"VP8X", canvas) + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


WEBP_FAULTS = {
    "longer by its header": lambda data, pixels: data[:4] + struct.pack("<I", len(data) + 1000) + data[8:],
    "shorter by its header": lambda data, pixels: data[:4] + struct.pack("<I", 20) + data[8:],
    "without a length": lambda data, pixels: data[:4] + bytes(4) + data[8:],
    "cut within exif": lambda data, pixels: webp_file(8, pixels, webp_chunk(b"EXIF", bytes(5000)))[:-3000],
    "cut within xmp": lambda data, pixels: webp_file(4, pixels, webp_chunk(b"XMP ", bytes(5000)))[:-1],
    "junk for metadata": lambda data, pixels: webp_file(
        0x2C, webp_chunk(b"ICCP", b"junk"), pixels, webp_chunk(b"EXIF", b"junk"), webp_chunk(b"XMP ", b"junk")),
    "metadata that is not there": lambda data, pixels: webp_file(0x2C, pixels),
    "an unknown chunk": lambda data, pixels: webp_file(0, webp_chunk(b"what", b"abc"), pixels)}


@pytest.mark.parametrize("config", [AS_STORED, UPRIGHT], ids=["as stored", "upright"])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("name", WEBP_FAULTS)
def test_webp_metadata_refuses_nothing(photo, name, lossless, config):
    """A wrong length in its header, and metadata that is broken or cut off, leave a WebP's pixels what they are."""
    data = encoded(photo, "WEBP", lossless=lossless)
    assert (pixels_of(WEBP_FAULTS[name](data, data[12:]), config) == pixels_of(data)).all()


def test_webp_keeps_transparency_and_orientation(photo):
    """Transparency and a sound orientation outlive the metadata that is left out; cut within its pixels a WebP is corrupt."""
    photo.putalpha(90)
    data = encoded(photo, "WEBP", exif=orientation_block(6), xmp=bytes(3000))
    assert (pixels_of(data[:-1000]) == pixels_of(data)).all()
    assert pixels_of(data[:-1000], UPRIGHT).shape == (48, 32, 3)
    with pytest.raises(script.RowFailure, match="corrupt"):
        script.decode_image(encoded(photo, "WEBP")[:-100], AS_STORED)


def test_copies_of_an_animation_show_its_first_frame(photo):
    """An animated PNG or WebP with broken metadata is the frame that it is with sound metadata."""
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    png = encoded(photo, "PNG", **frames)
    webp = encoded(photo, "WEBP", lossless=True, **frames)
    assert (pixels_of(with_chunks(png, PNG_CHUNKS["text of 3 MB"])) == np.asarray(photo)).all()
    assert (pixels_of(webp[:4] + struct.pack("<I", len(webp)) + webp[8:]) == np.asarray(photo)).all()


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_copies_of_anything_raise_nothing(photo, format_):
    """Whatever bytes an image file is made of, its copies are made, and are no longer than it."""
    rng = random.Random(7)
    whole = encoded(photo, format_, exif=orientation_block(6))
    for _ in range(300):
        data = bytearray(whole[:rng.randrange(len(whole))])
        for _ in range(rng.randint(0, 6)):
            if data:
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        for copy in plain_pixels.without_metadata(bytes(data)):
            assert len(copy.data) <= len(data) + 12
        try:
            script.decode_image(bytes(data), UPRIGHT)
        except script.RowFailure as failure:
            assert failure.status in script.STATUSES


@pytest.mark.parametrize("tag", [
    (34665, 4, 1, 10**6), (34665, 2, 4, 7), (34853, 4, 1, 3), (34675, 7, 10**6, 50), (700, 7, 10**7, 4), (270, 2, 5, 10**8),
    (305, 2, 10**6, 9), (33723, 99, 1, 1), (282, 5, 1, 10**7), (40965, 4, 1, 8), (274, 3, 1, 77)])
def test_tiff_metadata_refuses_nothing(photo, tag):
    """Tags of EXIF, GPS, profiles and texts that point nowhere leave a TIFF's pixels what they are."""
    data = encoded(photo, "TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = [data[start + 2 + 12 * n:start + 14 + 12 * n] for n in range(count)] + [struct.pack("<HHII", *tag)]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    assert (pixels_of(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory) == np.asarray(photo)).all()


def test_many_bytes_around_few_pixels_take_no_time(photo):
    """EXIF whose tags all point at one large value is read at once: only the orientation is looked for."""
    tags = b"".join(struct.pack("<HHII", 0x9000 + n % 1000, 7, 3_000_000, 100_000) for n in range(8000))
    block = b"II*\0" + struct.pack("<IH", 8, 8000) + tags + bytes(4) + bytes(4_000_000)
    data = with_chunks(encoded(photo, "PNG"), png_chunk(b"eXIf", block))
    started = time.process_time()
    assert (pixels_of(data) == np.asarray(photo)).all()
    assert (pixels_of(data, UPRIGHT) == np.asarray(photo)).all()
    assert time.process_time() - started < 2


def test_mpo_is_scored_and_exported(photo, tmp_path):
    """A phone's JPEG with a second image behind it is its first image, and is exported as a .jpg."""
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((16, 16))])
    assert (pixels_of(data) == pixels_of(encoded(photo, "JPEG"))).all()
    assert export.find_extension(data) == "jpg"


@pytest.mark.parametrize(("format_", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"),
                                                ("BMP", "bmp"), ("TIFF", "tiff"), ("AVIF", "avif"), ("MPO", "jpg")])
def test_endings_of_exported_files(photo, format_, ending):
    """Each format that can be scored has its ending, also where what lies around the pixels cannot be read; text has none."""
    data = encoded(photo, format_)
    assert export.find_extension(data) == ending
    if format_ == "PNG":
        assert export.find_extension(with_chunks(data, PNG_CHUNKS["text of 3 MB"])) == ending
    for other in (b"", b"<html>", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftypheic", b"%PDF-1.7"):
        assert export.find_extension(other) is None


def test_rules_on_size_see_what_was_scored(photo):
    """The rules on width and height read files with much text, and turn them where the config does."""
    text = with_chunks(encoded(photo, "PNG"), PNG_CHUNKS["text of 3 MB"])
    turned = encoded(photo, "JPEG", exif=orientation_block(6))
    for data, config, size in ((text, AS_STORED, (48, 32)), (turned, AS_STORED, (48, 32)), (turned, UPRIGHT, (32, 48))):
        facts = duplicates.measure_image(data, lambda data, config=config: script.decode_image(data, config), False,
                                         config.exif_orientation)
        assert (facts.width, facts.height) == size == script.decode_image(data, config).size


# ── Orientation ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientations(photo, format_, order, value):
    """All eight orientations are honoured where the config says so, in both byte orders, and counted where it does not."""
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encoded(photo, format_, exif=orientation_block(value, order), **options)
    stored = script.decode_image(data, AS_STORED)
    wanted = stored.transpose(Image.Transpose[ROTATED[value]]) if value > 1 else stored
    assert (pixels_of(data, UPRIGHT) == np.asarray(wanted)).all()
    assert remark_on(data) == script.Remark(is_turned=value > 1) and remark_on(data, UPRIGHT) == script.Remark()


@pytest.mark.parametrize(("block", "words"), [
    (orientation_block(0), "orientation 0"), (orientation_block(9), "orientation 9"),
    (orientation_block(6, count=2), "cannot be"),
    (orientation_block(6, kind=2), "cannot be"), (orientation_block(700, kind=4), "orientation 700"),
    (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", "cannot be"), (b"Exif\0\0JUNKJUNKJUNK", "cannot be"),
    (b"Exif\0\0II*\0\xff\xff\0\0\0\0", "cannot be")])
def test_broken_orientation_is_said(photo, block, words):
    """An orientation that cannot be honoured is said in `detail` of a row that is ok; without the key nobody asked for it."""
    data = encoded(photo, "PNG", exif=block)
    assert (pixels_of(data, UPRIGHT) == np.asarray(photo)).all()
    assert words in remark_on(data, UPRIGHT).detail and remark_on(data) == script.Remark()


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", orientation_block(3, tags=(0x0100,)), orientation_block(1),
                                   orientation_block(6, tags=(0x0100, 0x0112)), orientation_block(8, kind=4)])
def test_orientation_is_read_as_pillow_reads_it(photo, block):
    """Where Pillow finds an orientation, so does this reader, and the other way round."""
    with Image.open(io.BytesIO(encoded(photo, "JPEG", exif=block))) as image:
        assert exif.find_orientation(image) == image.getexif().get(0x0112, 1)


def test_orientation_in_text_and_xmp(photo):
    """ImageMagick's text in hexadecimal and XMP are heeded as Pillow heeds them."""
    info = PngImagePlugin.PngInfo()
    block = orientation_block(6)[6:]
    info.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    bad = PngImagePlugin.PngInfo()
    bad.add_text("Raw profile type exif", "\nexif\n 8\nnot hexadecimal")
    for metadata in (info, xmp):
        data = encoded(photo, "PNG", pnginfo=metadata)
        assert script.decode_image(data, UPRIGHT).size == (32, 48) and remark_on(data).is_turned
    assert remark_on(encoded(photo, "PNG", pnginfo=bad), UPRIGHT).detail == exif.CANNOT_READ


def test_no_image_brings_a_remark_of_its_own(photo):
    """A PNG whose text has the key of our remark says nothing thereby."""
    info = PngImagePlugin.PngInfo()
    info.add_text(script.REMARK, "scored by strangers")
    assert remark_on(encoded(photo, "PNG", pnginfo=info)) == script.Remark()


def test_orientation_outlives_other_metadata(photo):
    """Where a text is left out to read the pixels, a sound orientation still turns them, and a broken one is said."""
    data = with_chunks(encoded(photo, "PNG", exif=orientation_block(6)), PNG_CHUNKS["text of 3 MB"])
    assert script.decode_image(data, UPRIGHT).size == (32, 48) and remark_on(data).is_turned
    broken = with_chunks(encoded(photo, "PNG"), PNG_CHUNKS["text of 3 MB"], png_chunk(b"eXIf", b"II*\0junkjunk"))
    assert script.decode_image(broken, UPRIGHT).size == (48, 32) and remark_on(broken, UPRIGHT).detail == exif.CANNOT_READ


def test_remarks_come_from_every_decoder(photo):
    """The child process of a partition left behind, and the GPU's share, say the same."""
    data = encoded(photo, "JPEG", exif=orientation_block(6))
    decoder = isolate.IsolatedDecoder(AS_STORED, script.DRY_RUN_SETTINGS)
    try:
        assert decoder.decode(data).info[script.REMARK] == script.Remark(is_turned=True)
    finally:
        decoder.close()
    offered = gpu_decode.offer_to_gpu(data, b"\xff" * 16, 10**6)
    assert offered.remark == script.Remark(is_turned=True)


@pytest.fixture
def phone_photos(tmp_path, photo, write_table):
    """Five rows of four images: two on their side (one named twice), one upright, one with a broken orientation."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, block in (("a.jpg", orientation_block(6)), ("b.jpg", orientation_block(3)), ("c.jpg", orientation_block(1)),
                        ("d.jpg", orientation_block(0))):
        (folder / name).write_bytes(encoded(photo.resize((48 + ord(name[0]), 32)), "JPEG", exif=block))
    write_table([["url", "caption"], *([f"{name}.jpg", "x"] for name in "aabcd")])


@pytest.mark.parametrize("threads", [0, 2])
def test_images_that_would_be_turned_are_counted(phone_photos, write_config, run_main, tmp_path, read_table, threads):
    """The summary and profile.json count images with an orientation that is ignored, once each, over all partitions."""
    config = write_config(loader_threads=threads, partition_rows=2)
    outcome = run_main("--config", config)
    assert "2 have an EXIF orientation, which exif_orientation: false ignores and training libraries heed" in outcome.stderr
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert profile["images"] == {"rows_that_share_a_file": 0, "images_with_exif_orientation": 2}
    assert {(row["status"], row["detail"]) for row in read_table(tmp_path / "out/scores.csv")} == {("ok", "")}
    assert run_main("--config", config).stderr.count("EXIF orientation") == 1
    outcome = run_main("--config", config, "--set", "exif_orientation=true", "--fresh")
    assert "EXIF orientation" not in outcome.stderr
    rows = read_table(tmp_path / "out/scores.csv")
    assert [row["detail"] for row in rows] == [""] * 4 + ["EXIF orientation 0 is none of 1 to 8; not turned"]
    assert {row["status"] for row in rows} == {"ok"}


# ── URLs that end at one file ─────────────────────────────────────────────────────────────────────────────────────────

def test_urls_that_end_at_one_file_are_counted(tmp_path, write_config, write_table, run_main, picture_bytes):
    """Rows whose URL ends at another URL's file are counted in each partition; one URL in several rows is none."""
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    for name in ("1.png", "a/1.png", "2.png"):
        (folder / name).write_bytes(picture_bytes())
    urls = ["https://x.org/b/1.png", "https://y.org/1.png?x=1", "https://x.org/a/1.png", "https://x.org/2.png",
            "https://x.org/2.png", "1.png", "https://x.org/none.png", "https://y.org/none.png",
            "https://x.org/1.png", "https://x.org/c/%31.png"]
    write_table([["url", "caption"], *([url, "c"] for url in urls)])
    for rows, count in ((len(urls), 4), (8, 4), (1, 0)):
        outcome = run_main("--config", write_config(partition_rows=rows), "--fresh")
        assert json.loads((tmp_path / "out/profile.json").read_text())["images"]["rows_that_share_a_file"] == count
        assert (f"{count} rows share the file in image_path" in outcome.stderr) == bool(count)


@pytest.mark.parametrize(("urls", "count"), [
    (["http://x/a/1.png", "http://x/a/1.png"], 0), (["http://x/a/1.png", "http://x/a/1.png?v=2"], 2), (["1.png", "./1.png"], 0),
    (["HTTP://x/1.png", "http://x/q/1.png", "http://x/z.png"], 2), (["http://x/l.png", "http://y/l.png", "http://x/1.png"], 2)])
def test_which_urls_share(tmp_path, urls, count):
    """Different URLs of one file count, equal ones and paths do not."""
    (tmp_path / "1.png").touch()
    (tmp_path / "l.png").symlink_to("1.png")
    assert images_measure.count_rows_that_share(urls, str(tmp_path)) == count
    assert images_measure.count_rows_that_share(urls, "url") == 0


def test_bundled_scores_have_no_remark():
    """The bundled drawings and photos bear nothing that would be said of them."""
    for path in [*pathlib.Path(script.__file__).parent.glob("challenge_set/photos/*.jpg")][:5]:
        assert remark_on(path.read_bytes(), UPRIGHT) == script.Remark()

"""Images: found only where they may be, decoded to the right colours or to a status, resized as the processor does."""
import functools
import io
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from small_inputs import encoded, resized_by_pillow

import image_text_sim_clip as script
from addons.images import gpu_decode

ROOT = pathlib.Path(script.__file__).parent
CONFIG = script.Config(pretrained_model="none")


def configured(**keys):
    return script.Config(pretrained_model="none", **keys)


def failure_of(function, *arguments):
    """(status, detail) of the RowFailure that a call raises; both fit scores.csv."""
    with pytest.raises(script.RowFailure) as caught:
        function(*arguments)
    status, detail = caught.value.status, caught.value.detail
    assert status in script.STATUSES
    assert "/" not in detail and "0x" not in detail and detail.isprintable()  # no paths, no addresses
    return status, detail


def decoded(data, **keys):
    """Bytes to a (h, w, 3) array of int."""
    image = script.decode_image(data, configured(**keys))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def folder(tmp_path):
    """A folder of files whose content is their name, beside one that must not be read."""
    base = tmp_path / "pictures"
    (base / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "with space.png", "100%.png", "ü.png", "query?.png", "c.png#x"):
        (base / name).write_bytes(name.encode())
    (tmp_path / "secret.png").write_bytes(b"secret")
    return base.resolve()


@pytest.mark.parametrize(("source", "name"), [
    ("a.png", "a.png"), ("sub/b.png", "sub/b.png"), ("./a.png", "a.png"), ("sub/../a.png", "a.png"),
    ("https://example.org/x/y/a.png", "a.png"), ("http://example.org/a.png?size=3#top", "a.png"),
    ("HTTPS://example.org/deep/down/sub/b.png", "sub/b.png"), ("https://example.org/x/../sub/./b.png", "sub/b.png"),
    ("https://example.org//sub//b.png", "sub/b.png"), ("https://example.org/" + "y" * 300 + "/a.png", "a.png"),
    ("https://example.org/" + "y/" * 30_000 + "sub/b.png", "sub/b.png"), ("https://example.org/%73ub/b.png", "sub/b.png"),
    ("https://example.org/with%20space.png", "with space.png"), ("https://example.org/%C3%BC.png", "ü.png"),
    ("https://example.org/100%.png", "100%.png"), ("https://example.org/100%25.png", "100%.png"),
    ("with space.png", "with space.png"),
    ("query?.png", "query?.png"), ("c.png#x", "c.png#x"), ("https://example.org/query%3F.png", "query?.png"),
])
def test_file_is_found(folder, source, name):
    """A row's file is found by its relative path, or by the longest ending of its URL's path, percent-encoded or not."""
    assert script.read_file(folder, source, 1000) == name.encode()


@pytest.mark.parametrize(("source", "status"), [
    ("none.png", "missing"), ("https://example.org/none.png", "missing"), ("https://example.org/", "missing"),
    ("https://example.org", "missing"), ("sub/", "missing"), ("a.png/", "missing"), ("a.png/b.png", "missing"),
    ("https://example.org/sub/b%2Fb.png", "missing"), ("A.PNG", "missing"), ("\udc80", "missing"),
    ("elsewhere/a.png", "missing"), ("sub/a.png", "missing"), ("b.png", "missing"), ("s3://bucket/a.png", "missing"),
    ("s3://bucket/sub/b.png", "missing"), ("file://elsewhere/a.png", "missing"), ("ftp://example.org/a.png", "missing"),
    ("http", "missing"), ("https://example.org/a.png/", "missing"), ("https://[bad/a.png", "missing"),
    ("file:///sub/a.png", "forbidden"), ("file:///etc/passwd", "forbidden"), ("FILE:///nowhere/a.png", "forbidden"),
    ("/nowhere/at/all", "forbidden"),
    ("a\0.png", "missing"), ("https://example.org/a%00.png", "missing"), ("x" * 300, "missing"), ("x/" * 3000 + "a", "missing"),
    ("../secret.png", "forbidden"), ("../../../../../../etc/passwd", "forbidden"), ("/etc/passwd", "forbidden"),
    ("https://example.org/..%2Fsecret.png", "forbidden"), ("https://example.org/%2e%2e", "forbidden"), ("..", "forbidden"),
    ("https://example.org/%2Fetc%2Fpasswd", "forbidden"), ("sub/../../secret.png", "forbidden"),
])
def test_file_is_not_found(folder, source, status):
    """What is not there is missing; what lies outside the folder is forbidden, however it is spelt."""
    assert failure_of(script.read_file, folder, source, 1000)[0] == status


def test_file_uri_is_that_file(folder):
    """A file:// URI is read where it says, if that lies in image_path; a namesake elsewhere in it is not taken for it."""
    for uri in (f"file://{folder}/sub/b.png", f"file://localhost{folder}/sub/b.png", f"FILE://{folder}/sub/%62.png"):
        assert script.read_file(folder, uri, 1000) == b"sub/b.png"
    assert failure_of(script.read_file, folder, f"file://{folder}/sub/a.png", 1000)[0] == "missing"
    assert failure_of(script.read_file, folder, f"file://{folder}/../secret.png", 1000)[0] == "forbidden"


def test_longest_ending_of_a_url_comes_first(tmp_path):
    """Of several files that a URL's path could end at, the one with the longest ending in common is it."""
    for name in ("1.png", "b/1.png", "a/b/1.png", "c/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for url, name in (("https://x.org/a/b/1.png", "a/b/1.png"), ("https://x.org/z/b/1.png", "b/1.png"),
                      ("https://x.org/z/1.png?b/1.png", "1.png"), ("https://x.org/a/c/1.png#a/b/1.png", "c/1.png")):
        assert script.read_file(tmp_path.resolve(), url, 1000) == name.encode()


def test_links(folder, tmp_path):
    """A link inside the folder is followed, one that leads outside is forbidden, a loop or a dead one is missing."""
    (folder / "inside").symlink_to("a.png")
    (folder / "outside").symlink_to(tmp_path / "secret.png")
    (folder / "way_out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    (folder / "dead").symlink_to("nowhere")
    assert script.read_file(folder, "inside", 1000) == b"a.png"
    assert failure_of(script.read_file, folder, "outside", 1000)[0] == "forbidden"
    assert failure_of(script.read_file, folder, "way_out/secret.png", 1000)[0] == "forbidden"
    assert failure_of(script.read_file, folder, "loop", 1000)[0] == "missing"
    assert failure_of(script.read_file, folder, "dead", 1000)[0] == "missing"


def test_links_that_stay_inside_are_followed(folder, tmp_path):
    """Absolute links, links through a second name of the folder, and ways out and in again stay inside, and are followed."""
    (tmp_path / "alias").symlink_to(folder)
    (folder / "absolute").symlink_to(folder / "a.png")
    (folder / "by_alias").symlink_to(tmp_path / "alias" / "a.png")
    (folder / "out_and_in").symlink_to("../pictures/sub/../a.png")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "chain").symlink_to("absolute")
    for name in ("absolute", "by_alias", "out_and_in", "sub/up/a.png", "sub/up/chain", str(folder / "a.png"),
                 "../pictures/a.png"):
        assert script.read_file(folder, name, 1000) == b"a.png", name
    (folder / "dead_outside").symlink_to(tmp_path / "nowhere.png")
    assert failure_of(script.read_file, folder, "dead_outside", 1000)[0] == "forbidden"


@pytest.mark.parametrize("inner", ["a.png", "sub/b.png"])
def test_link_that_is_swapped_leads_nowhere(folder, tmp_path, inner, monkeypatch):
    """Whatever is swapped for a link to the outside between two steps, what is opened lies inside, or nothing is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("a.png", "b.png"):
        (outside / name).write_bytes(b"secret")
    target = folder / inner.split("/")[0]
    real_open = os.open
    for moment in range(4):
        calls = []

        def swap_then_open(path, flags, *arguments, calls=calls, moment=moment, **options):
            if len(calls) == moment:
                target.rename(tmp_path / "kept")
                target.symlink_to(outside / "a.png" if "/" not in inner else outside)
            calls.append(path)
            return real_open(path, flags, *arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", swap_then_open)
            try:
                found = script.read_file(folder, inner, 1000)
            except script.RowFailure as failure:
                found = failure.status
        assert found in (inner.encode(), "forbidden", "missing"), moment
        if target.is_symlink():
            target.unlink()
            (tmp_path / "kept").rename(target)


def test_linked_folder(folder, tmp_path, write_config, write_table, run_main):
    """image_path itself may be a link."""
    (tmp_path / "link").symlink_to(folder)
    (folder / "p.png").write_bytes(encoded(Image.new("RGB", (3, 3))))
    write_table("url,caption\np.png,x\n")
    assert run_main("--config", write_config(image_path=str(tmp_path / "link"))).result["scored"] == 1


def test_fifo_does_not_block(folder):
    """A FIFO is forbidden at once; nobody waits for its writer."""
    os.mkfifo(folder / "pipe.png")
    started = time.monotonic()
    assert failure_of(script.read_file, folder, "pipe.png", 1000) == ("forbidden", "not a regular file")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("source", ["sub", ".", "https://example.org/sub"])
def test_directory_is_forbidden(folder, source):
    """A folder is no image."""
    assert failure_of(script.read_file, folder, source, 1000) == ("forbidden", "not a regular file")


@pytest.mark.parametrize("source", ["http://[bad/a.png", "http://[::1/a.png", "http://ex\u2100mple.org/a.png"])
def test_url_that_cannot_be_split(folder, source):
    """A URL that Python cannot parse is missing, or found by its last segment; it is no reason to stop."""
    try:
        assert script.read_file(folder, source, 1000) == b"a.png"
    except script.RowFailure as failure:
        assert failure.status == "missing"


def test_disk_error_while_reading(folder, monkeypatch):
    """A file that the disk cannot read (EIO, a stale NFS handle) is one row's failure."""
    def fail(descriptor):
        raise OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        found = failure_of(script.read_file, folder, "a.png", 1000)
    assert found == ("corrupt", "the disk cannot read the file")


def test_file_in_a_folder_that_may_not_be_entered(folder, monkeypatch):
    """An image that cannot even be looked for, in a folder without permission, is forbidden and not missing."""
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "lstat", refuse)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(script.RowFailure) as failure:
        script.read_file(folder, "sub/a.png", 100)
    assert failure.value.status == "forbidden"


def test_unreadable_file(folder, monkeypatch):
    """A file that may not be read is forbidden."""
    (folder / "a.png").chmod(0)
    if os.geteuid() == 0:  # root may read it all the same
        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(os, "open", refuse)
    assert failure_of(script.read_file, folder, "a.png", 1000) == ("forbidden", "no permission to read the file")


def test_too_large_file(folder):
    """A file of max_image_bytes is read, one byte more is too_large, with its size."""
    (folder / "a.png").write_bytes(b"x" * 100)
    assert len(script.read_file(folder, "a.png", 100)) == 100
    assert failure_of(script.read_file, folder, "a.png", 99) == ("too_large", "100 bytes")


def test_too_large_file_is_not_read(folder):
    """The size is asked for first: a sparse file of a terabyte is refused at once."""
    with (folder / "a.png").open("wb") as file:
        file.truncate(2**40)
    assert failure_of(script.read_file, folder, "a.png", 50_000_000) == ("too_large", f"{2**40} bytes")


def test_descriptors_are_closed(folder):
    """Neither reading nor refusing a file leaves a descriptor open."""
    os.mkfifo(folder / "pipe")
    before = len(list(pathlib.Path("/dev/fd").iterdir()))
    for _ in range(20):
        script.read_file(folder, "a.png", 1000)
        failure_of(script.read_file, folder, "pipe", 1000)
        failure_of(script.read_file, folder, "a.png", 1)
    assert len(list(pathlib.Path("/dev/fd").iterdir())) == before


# ── Modes and formats ─────────────────────────────────────────────────────────────────────────────────────────────────

def from_array(values, dtype, mode=None):
    image = Image.fromarray(np.asarray(values, dtype=dtype))
    return image.convert(mode) if mode else image


def palette_image(index=1, size=(4, 3)):
    """A P image in one index of the palette black, orange, blue."""
    image = Image.new("P", size, index)
    image.putpalette([0, 0, 0, 255, 128, 0, 0, 0, 255])
    return image


ORANGE, WHITE, GREY = (255, 128, 0), (255, 255, 255), (100, 100, 100)
COLOURS = {
    "L": (Image.new("L", (4, 3), 100), "PNG", {}, GREY),
    "RGB": (Image.new("RGB", (4, 3), ORANGE), "PNG", {}, ORANGE),
    "RGBA opaque": (Image.new("RGBA", (4, 3), (*ORANGE, 255)), "PNG", {}, ORANGE),
    "RGBA half": (Image.new("RGBA", (4, 3), (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
    "RGBA clear": (Image.new("RGBA", (4, 3), (0, 0, 0, 0)), "PNG", {}, WHITE),
    "LA half": (Image.new("LA", (4, 3), (0, 64)), "PNG", {}, (191, 191, 191)),
    "LA clear": (Image.new("LA", (4, 3), (0, 0)), "PNG", {}, WHITE),
    "P": (palette_image(), "PNG", {}, ORANGE),
    "P clear": (palette_image(), "PNG", {"transparency": 1}, WHITE),
    "P with another colour clear": (palette_image(), "PNG", {"transparency": 0}, ORANGE),
    "P with an alpha table": (palette_image(), "PNG", {"transparency": b"\xff\x00\xff"}, WHITE),
    "RGB with a clear colour": (Image.new("RGB", (4, 3), ORANGE), "PNG", {"transparency": ORANGE}, WHITE),
    "L with a clear grey": (Image.new("L", (4, 3), 7), "PNG", {"transparency": 7}, WHITE),
    "1 white": (Image.new("1", (4, 3), 1), "PNG", {}, WHITE),
    "1 black": (Image.new("1", (4, 3), 0), "PNG", {}, (0, 0, 0)),
    "CMYK": (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "TIFF", {}, (255, 0, 0)),
    "CMYK JPEG": (Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", {"quality": 95}, (0, 255, 255)),
    "YCbCr JPEG": (Image.new("RGB", (16, 16), ORANGE), "JPEG", {"quality": 95}, ORANGE),
    "L JPEG": (Image.new("L", (16, 16), 100), "JPEG", {}, GREY),
    "progressive JPEG": (Image.new("RGB", (16, 16), ORANGE), "JPEG", {"quality": 95, "progressive": True}, ORANGE),
    "WebP": (Image.new("RGB", (16, 16), ORANGE), "WEBP", {"lossless": True}, ORANGE),
    "WebP with alpha": (Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "WEBP", {"lossless": True, "exact": True}, WHITE),
    "BMP": (Image.new("RGB", (4, 3), ORANGE), "BMP", {}, ORANGE),
    "BMP P": (palette_image(), "BMP", {}, ORANGE),
    "TIFF": (Image.new("RGB", (4, 3), ORANGE), "TIFF", {}, ORANGE),
    "TIFF LZW": (Image.new("RGB", (4, 3), ORANGE), "TIFF", {"compression": "tiff_lzw"}, ORANGE),
    "TIFF fax": (Image.new("1", (32, 32), 1), "TIFF", {"compression": "group4"}, WHITE),
    "GIF": (palette_image(), "GIF", {}, ORANGE),
    "GIF clear": (palette_image(), "GIF", {"transparency": 1}, WHITE),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name):
    """Every mode and format comes out in the colour that a viewer on a white page shows."""
    image, format_, options, colour = COLOURS[name]
    pixels = decoded(encoded(image, format_, **options))
    assert pixels.shape == (image.height, image.width, 3)
    assert np.abs(pixels - colour).max() <= (4 if format_ == "JPEG" else 1)


@pytest.mark.parametrize(("over", "colour"), [("black", (128, 0, 0)), ("#0000ff", (128, 0, 127)),
                                                ("rgb(0, 200, 100)", (128, 100, 50))])
def test_transparent_over(over, colour):
    """Transparent images are laid over the colour that transparent_over names."""
    pixels = decoded(encoded(Image.new("RGBA", (4, 3), (255, 0, 0, 128))), transparent_over=over)
    assert np.abs(pixels - colour).max() <= 1


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bit_grey(format_):
    """16-bit grey is scaled, where a bare convert gives white."""
    pixels = decoded(encoded(from_array([[0, 257, 25700, 32768, 45000, 65535]], np.uint16), format_))
    assert pixels[0, :, 0].tolist() == [0, 1, 100, 128, 175, 255]
    assert (pixels == pixels[..., :1]).all()


def test_dark_sixteen_bit_grey():
    """16-bit grey is scaled by its type, not by its content: a dark image stays dark."""
    assert decoded(encoded(from_array([[0, 200, 255]], np.uint16), "PNG")).max() == 1


@pytest.mark.parametrize(("values", "expected"), [
    ([0, 100, 255], [0, 100, 255]),                    # bytes in wide integers
    ([0, 25700, 65535], [0, 100, 255]),                # 16 bits in 32
    ([0, 500_000, 1_000_000], [0, 128, 255]),          # stretched
    ([-100, 0, 100], [0, 128, 255]),
    ([7, 7, 7], [7, 7, 7]),
])
def test_wide_integers(values, expected):
    """32-bit integer TIFFs are scaled by the range they fill."""
    assert np.abs(decoded(encoded(from_array([values], np.int32), "TIFF"))[0, :, 1] - expected).max() <= 1


@pytest.mark.parametrize(("values", "expected"), [
    ([0, 0.5, 1], [0, 128, 255]), ([0.25, 0.25, 0.25], [64, 64, 64]), ([0, 100, 255], [0, 100, 255]),
    ([0, 25700, 65535], [0, 100, 255]), ([-1, 0, 1], [0, 128, 255]), ([0, 5e5, 1e6], [0, 128, 255]),
    ([0, np.nan, 1], [0, 0, 255]), ([0, np.inf, 1], [0, 255, 255]), ([np.nan] * 3, [0, 0, 0])])
def test_floats(values, expected):
    """Float TIFFs are scaled by the range they fill, where a bare convert turns 0..1 black; NaN is black."""
    assert np.abs(decoded(encoded(from_array([values], np.float32), "TIFF"))[0, :, 2] - expected).max() <= 1


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame(format_):
    """Of an animation, a multi-page TIFF or a stereo JPEG, the first frame counts."""
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = encoded(first, format_, save_all=True, append_images=[second, second], **options)
    assert np.abs(decoded(data) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(("orientation", "corner", "turned"), [
    (1, (0, 0), False), (2, (0, -1), False), (3, (-1, -1), False), (4, (-1, 0), False),
    (5, (0, 0), True), (6, (0, -1), True), (7, (-1, -1), True), (8, (-1, 0), True)])
@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation(orientation, corner, turned, format_):
    """exif_orientation turns all eight ways; without the key the pixels stay as they are stored."""
    image = Image.new("RGB", (48, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # white where it is stored top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format_, exif=exif)
    plain, upright = decoded(data), decoded(data, exif_orientation=True)
    assert plain.shape == (32, 48, 3) and plain[0, 0].min() > 240 and plain[-1, -1].max() < 15
    assert upright.shape == ((48, 32, 3) if turned else (32, 48, 3))
    corners = {(y, x): upright[y, x].min() for y in (0, -1) for x in (0, -1)}
    assert [c for c, value in corners.items() if value > 240] == [corner]


@pytest.mark.parametrize("orientation", [3, 6])
def test_tiff_orientation(orientation):
    """Pillow itself turns TIFFs, as it does for reference pipelines; the key does not turn them a second time."""
    image = Image.new("RGB", (48, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "TIFF", exif=exif)
    for turn in (False, True):
        pixels = decoded(data, exif_orientation=turn)
        assert pixels.shape == ((48, 32, 3) if orientation == 6 else (32, 48, 3))
        assert pixels[(0, -1) if orientation == 6 else (-1, -1)].min() == 255


# ── What is no image ──────────────────────────────────────────────────────────────────────────────────────────────────

def zip_bytes():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "hello")
    return data.getvalue()


@pytest.mark.parametrize(("data", "status"), [
    (b"", "not_image"), (b"\0", "not_image"), (b"not found\n", "not_image"), (b"\0" * 1000, "not_image"),
    (b"<!DOCTYPE html><html>not found</html>", "not_image"), (b"\n\n <html><body>", "not_image"),
    (b'{"error": 404}', "not_image"),
    (zip_bytes(), "not_image"), (b"\x1f\x8b\x08" + bytes(50), "not_image"), (b"\x7fELF" + bytes(50), "not_image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"), (b"%PDF-1.7\n", "unsupported"), (b"8BPS\0\1", "unsupported"),
    (b"\0\0\0\x1cftypavif" + bytes(50), "unsupported"), (b"\0\0\0\x18ftypheic" + bytes(50), "unsupported"),
    (b"\xff\xd8\xff\xe0", "corrupt"), (b"\x89PNG\r\n\x1a\n", "corrupt"), (b"GIF89a", "corrupt"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "corrupt"),
    (b"BM" + bytes(60), "corrupt"), (b"II*\0" + bytes(60), "corrupt"),
])
def test_no_image(data, status):
    """Bytes that are no image, or one of a kind that is not read, say so; a broken header is corrupt."""
    assert failure_of(script.decode_image, data, CONFIG)[0] == status


@pytest.mark.parametrize("format_", ["ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "ICNS", "DDS", "EPS"])
def test_other_formats_are_not_opened(format_):
    """Formats that Pillow reads but the web has no need of stay closed: each is a parser for strangers to attack."""
    data = encoded(Image.new("RGB", (32, 32), ORANGE), format_)
    assert failure_of(script.decode_image, data, CONFIG)[0] in ("not_image", "unsupported")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_truncated(format_, part, noise):
    """An image cut off anywhere gets no score: half an image would get a plausible wrong one."""
    data = encoded(noise(64, 48), format_)
    status, _ = failure_of(script.decode_image, data[:int(len(data) * part)], CONFIG)
    assert status in ("corrupt", "not_image")


def test_truncated_images_stay_forbidden():
    """Nothing turns Pillow's tolerance for truncated files on."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def flipped(data, chances):
    """Data with one to twenty bytes changed, more often than not near its start, or cut off."""
    changed = bytearray(data)
    if chances.random() < 0.2:
        return bytes(changed[:chances.randrange(len(changed))])
    for _ in range(chances.choice((1, 1, 3, 20))):
        place = chances.randrange(min(len(changed), chances.choice((64, len(changed)))))
        changed[place] = chances.choice((0, 255, changed[place] ^ 1 << chances.randrange(8), chances.randrange(256)))
    return bytes(changed)


SAMPLES = [("JPEG", "RGB", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {}),
           ("PNG", "LA", {}),
           ("PNG", "P", {"transparency": 3}), ("PNG", "I;16", {}), ("WEBP", "RGB", {}), ("GIF", "P", {}), ("BMP", "RGB", {}),
           ("BMP", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
           ("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "1", {"compression": "group4"})]


@pytest.mark.parametrize(("format_", "mode", "options"), SAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_never_raise_anything_else(format_, mode, options, noise):
    """An image with flipped bytes decodes and resizes, or fails with a status; nothing else ever leaves the loader."""
    image = noise(40, 30).convert("L" if mode in ("I;16", "F") else mode)
    if mode == "I;16":
        image = from_array(np.asarray(image).astype(np.uint16) * 257, np.uint16)
    elif mode == "F":
        image = from_array(np.asarray(image) / 255, np.float32)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, format_, **options, **({"exif": exif} if format_ in ("JPEG", "PNG") else {}))
    settings = script.ImageSettings(32, None, (32, 32), 3)
    decode = script.ImageDecoder(configured(exif_orientation=True, max_image_pixels=1_000_000), settings)
    resize = functools.partial(resized_by_pillow, settings=settings)
    chances, failures = random.Random(f"{format_}{mode}{options}"), 0
    for _ in range(150):
        broken = flipped(data, chances)
        loaded = script.ImageLoader(lambda source, broken=broken: broken, decode, resize)("x")
        if loaded.failure:
            failures += 1
            assert loaded.failure.status in ("corrupt", "not_image", "bomb", "unsupported")
        else:
            assert loaded.pixels.shape == (3, 32, 32) and loaded.pixels.dtype == np.uint8
    assert failures > 10  # the flips were felt


# ── Bombs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

def bomb_png(width=12000, height=12000):
    """A PNG of 1 bit a pixel that is true to its header and 1000 times smaller than what it unpacks to."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore")
def test_bomb_is_refused_before_decoding(monkeypatch):
    """17 kB that unpack to 144 megapixels are a bomb, by the header alone."""
    def load(self):
        raise AssertionError("decoded")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    data = bomb_png()
    assert len(data) < 20_000
    assert failure_of(script.decode_image, data, CONFIG) == ("bomb", "12000 x 12000 pixels")


@pytest.mark.filterwarnings("ignore")
def test_pillows_own_limit_is_a_bomb_too():
    """Above 179 megapixels Pillow refuses by itself, with the same status."""
    assert failure_of(script.decode_image, bomb_png(14000, 14000), CONFIG)[0] == "bomb"


def test_max_image_pixels():
    """An image of max_image_pixels is decoded, one pixel more is a bomb."""
    data = encoded(Image.new("RGB", (30, 10)))
    assert decoded(data, max_image_pixels=300).shape == (10, 30, 3)
    assert failure_of(script.decode_image, data, configured(max_image_pixels=299)) == ("bomb", "30 x 10 pixels")


def test_too_little_memory(monkeypatch):
    """An image that memory does not suffice for is one row's failure."""
    def load(self):
        raise MemoryError
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert failure_of(script.decode_image, encoded(Image.new("RGB", (30, 10))), CONFIG)[0] == "bomb"


@pytest.mark.filterwarnings("ignore")
def test_max_image_pixels_above_pillows_limit(monkeypatch):
    """max_image_pixels is the limit, also where it allows more than Pillow would."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # instead of an image of 180 megapixels
    script._prepare_pillow.cache_clear()
    assert decoded(encoded(Image.new("RGB", (30, 10))), max_image_pixels=300).shape == (10, 30, 3)


MEASURE = textwrap.dedent("""
    import resource, sys
    import image_text_sim_clip as script
    from PIL import Image, PngImagePlugin
    data, config = sys.stdin.buffer.read(), script.Config(pretrained_model="none")
    def peak_mib():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = peak_mib()
    try:
        script.decode_image(data, config)
    except script.RowFailure as failure:
        print(failure.status, peak_mib() - before)
    """)


@pytest.fixture
def measured_bomb():
    """The finished process that met the bomb: its status and growth in MiB on stdout."""
    return subprocess.run([sys.executable, "-c", MEASURE], input=bomb_png(), cwd=ROOT, capture_output=True, timeout=60)


def test_bomb_takes_no_memory(measured_bomb):
    """Refusing the bomb takes a few MiB, not the 144 or 432 that its pixels would."""
    status, grown_mib = measured_bomb.stdout.decode().split()
    assert status == "bomb"
    assert float(grown_mib) < 20


def test_bomb_is_quiet(measured_bomb):
    """An image's oddities are told in its row, not on stderr."""
    assert measured_bomb.stderr == b""


# ── decode: scaled ────────────────────────────────────────────────────────────────────────────────────────────────────

def photo(name, *size):
    """A photo of the challenge set, enlarged to what a camera gives, as JPEG bytes."""
    with Image.open(ROOT / "challenge_set/photos" / name) as image:
        return encoded(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90)


@pytest.mark.parametrize(("name", "size"), [("rocket.jpg", (1600, 1067)), ("astronaut.png", (900, 900)),
                                            ("coffee.png", (1800, 1200)),
                                            ("cell.png", (1500, 1800)), ("retina.jpg", (1411, 1411))])
def test_scaled_is_close_to_exact(name, size):
    """Shrinking a JPEG while it is decoded changes a photo's resized pixels by at most one level of 255 in the mean."""
    data, settings = photo(name, *size), script.DRY_RUN_SETTINGS
    exact = script.decode_image(data, configured(), (224, 224))
    scaled = script.decode_image(data, configured(decode="scaled"), (224, 224))
    assert exact.size == size
    assert 448 <= min(scaled.size) < min(exact.size)
    one, other = (resized_by_pillow(image, settings).astype(int) for image in (exact, scaled))
    assert 0 < np.abs(one - other).mean() <= 1


@pytest.mark.parametrize("size", [(2000, 700), (700, 2000), (895, 895), (896, 895)])
def test_scaled_stays_above_twice_the_target(noise, size):
    """Where half the size would fall below twice the target on either side, nothing is shrunk."""
    assert script.decode_image(encoded(noise(*size), "JPEG"), configured(decode="scaled"), (224, 224)).size == size


@pytest.mark.parametrize(("format_", "size"), [("JPEG", (640, 480)), ("PNG", (1600, 1200)), ("WEBP", (1600, 1200))])
def test_scaled_leaves_small_and_other_images(noise, format_, size):
    """A JPEG below twice twice the target, and every other format, is decoded as ever."""
    data = encoded(noise(*size), format_)
    one, other = (script.decode_image(data, configured(decode=d), (224, 224)) for d in ("exact", "scaled"))
    assert one.size == other.size == size
    assert one.tobytes() == other.tobytes()


# ── Resize ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def processors():
    """transformers' own processors on Pillow, by kind and keys."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    def make(kind, **keys):
        return {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind](**keys)
    return make


def clip_keys(edge, crop_height, crop_width, resample=3):
    return {"size": {"shortest_edge": edge}, "crop_size": {"height": crop_height, "width": crop_width}, "resample": resample}


def processed(processor, image):
    """(3, H, W) uint8 as the processor resizes and crops."""
    return np.asarray(processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0])


@pytest.mark.slow
def test_resize_equals_the_processor(processors):
    """Resize and centre crop give the processor's very pixels, for 150 sizes, crops inside and beyond the image."""
    chances, rng = random.Random(3), np.random.default_rng(3)
    for _ in range(150):
        top = chances.choice((9, 60, 400))
        width, height, edge = chances.randint(1, top), chances.randint(1, top), chances.choice((224, 64, 33, 32))
        crop = chances.choice(((edge, edge), (edge - 3, edge), (edge + 5, edge + 8), (edge + 1, edge - 1), (edge + 7,) * 2))
        processor = processors("clip", **clip_keys(edge, *crop, chances.choice((2, 3))))
        settings = script.ImageSettings.of(processor)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = processed(processor, image)
        assert settings.resized(height, width)[0 if height < width else 1] == edge
        assert np.array_equal(resized_by_pillow(image, settings), expected), (width, height, edge, crop)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (384, 256), (17, 31)])
def test_resize_to_a_fixed_size_equals_the_processor(processors, noise, size):
    """SigLIP's resize to a fixed size, without a crop, gives the processor's very pixels."""
    for resample in (2, 3):
        processor = processors("siglip", size={"height": size[0], "width": size[1]}, resample=resample)
        settings = script.ImageSettings.of(processor)
        for width, height in ((300, 200), (10, 300), (size[1], size[0])):
            image = noise(width, height)
            expected = processed(processor, image)
            assert np.array_equal(resized_by_pillow(image, settings), expected)
            assert np.abs(script.resize_fast(image, settings).astype(int) - expected).max() <= (4 if height > 2 * width else 2)


@pytest.mark.slow
def test_fast_is_within_one_level(processors, noise):
    """The fast resize is at most one level of 255 from the processor's, on average far less."""
    processor = processors("clip", **clip_keys(224, 224, 224))
    settings = script.ImageSettings.of(processor)
    for width, height in ((640, 480), (480, 640), (224, 224), (1000, 700), (300, 225), (500, 990), (900, 300), (225, 224)):
        image = noise(width, height)
        difference = np.abs(script.resize_fast(image, settings).astype(int) - processed(processor, image))
        assert difference.max() <= 1, (width, height)
        assert difference.mean() < 0.02


@pytest.mark.slow
def test_fast_on_tall_images(processors, noise):
    """Pillow resizes images taller than twice their width in the other order, which rounds a few pixels otherwise."""
    processor = processors("clip", **clip_keys(64, 64, 64))
    settings = script.ImageSettings.of(processor)
    for width, height in ((115, 339), (200, 600), (300, 1000)):
        image = noise(width, height)
        difference = np.abs(script.resize_fast(image, settings).astype(int) - processed(processor, image))
        assert difference.max() <= 4 and difference.mean() < 0.4


@pytest.mark.slow
def test_photos_within_two_levels(processors):
    """On the photos of the challenge set the fast resize is at most two levels from the processor's, 0.01 in the mean."""
    processor = processors("clip", **clip_keys(224, 224, 224))
    settings = script.ImageSettings.of(processor)
    for path in sorted((ROOT / "challenge_set/photos").iterdir()):
        image = script.decode_image(path.read_bytes(), CONFIG)
        difference = np.abs(script.resize_fast(image, settings).astype(int) - processed(processor, image))
        assert difference.max() <= 2 and difference.mean() < 0.01, path.name


@pytest.fixture(scope="module")
def scorers():
    """The bundled model in fast and exact mode."""
    pytest.importorskip("torch")
    keys = {"pretrained_model": str(ROOT / "challenge_set/shapes_clip"), "use_cuda": False}
    return {mode: script.Scorer(script.Config(preprocess=mode, **keys)) for mode in ("fast", "exact")}


@pytest.mark.slow
def test_exact_equals_the_processor(scorers, noise):
    """preprocess: exact is the model's processor bit for bit, normalised floats included, for RGB and grey images."""
    scorer = scorers["exact"]
    for width, height in ((64, 64), (100, 40), (33, 70), (5, 9), (640, 480)):
        for mode in ("RGB", "L"):
            image = script.decode_image(encoded(noise(width, height, mode=mode)), scorer.config)
            pixels = scorer.resize(image)
            assert pixels.dtype == np.uint8
            expected = np.asarray(scorer.family.processor(noise(width, height, mode=mode).convert("RGB"))["pixel_values"][0])
            levels = scorer.pixel_levels.numpy()
            assert np.array_equal(np.stack([levels[c][pixels[c]] for c in range(3)]), expected.astype(np.float32))


@pytest.mark.slow
def test_fast_is_close_to_exact(scorers, noise):
    """preprocess: fast hands the model the same shape, at most one level away."""
    for width, height in ((64, 64), (100, 60), (60, 100), (640, 480)):
        fast, exact = (scorers[mode].resize(noise(width, height)) for mode in ("fast", "exact"))
        assert fast.shape == exact.shape and fast.dtype == exact.dtype == np.uint8
        assert np.abs(fast.astype(int) - exact).max() <= 1


def cropped(pixels, crop):
    """The centre crop of a (3, h, w) array: by Pillow, by torch's bytes and by torch's floats, which must agree."""
    torch = pytest.importorskip("torch")
    settings = script.ImageSettings(None, pixels.shape[1:], crop, 3)
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    out = resized_by_pillow(image, settings)
    fast = script.resize_fast(image, settings)
    assert out.flags["C_CONTIGUOUS"] and fast.flags["C_CONTIGUOUS"]
    assert np.array_equal(out, fast)
    assert np.array_equal(gpu_decode.resize_in_floats(torch.from_numpy(pixels)[None], settings)[0], out)
    assert np.array_equal(script.crop_centre(torch.from_numpy(pixels / 255)[None], settings)[0], out / 255)
    return out


@pytest.mark.parametrize(("height", "width", "crop"), [(10, 10, (4, 4)), (11, 10, (4, 5)), (10, 11, (5, 4)), (4, 4, (4, 4))])
def test_center_crop_takes_the_middle(height, width, crop):
    """The crop is the middle; an odd rest falls below and to the right."""
    pixels = np.arange(3 * height * width, dtype=np.uint16).astype(np.uint8).reshape(3, height, width)
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    assert np.array_equal(cropped(pixels, crop), pixels[:, top:top + crop[0], left:left + crop[1]])


def test_center_crop_pads_with_black():
    """An image smaller than the crop gets a black border, the wider half of an odd one above and to the left."""
    out = cropped(np.full((3, 2, 3), 9, np.uint8), (5, 6))
    assert out.shape == (3, 5, 6) and out.sum() == 9 * 3 * 2 * 3
    assert (out[:, 2:4, 2:5] == 9).all()


@pytest.mark.parametrize(("height", "width"), [(2, 9), (9, 2), (3, 8), (8, 3)])
def test_center_crop_pads_one_side_and_cuts_the_other(height, width):
    """An image shorter than the crop and wider, or the other way round, gets both."""
    pixels = np.arange(1, 3 * height * width + 1, dtype=np.uint8).reshape(3, height, width)
    missing = [(math.ceil(max(0, 5 - side) / 2), max(0, 5 - side) // 2) for side in (height, width)]
    top, left = max(0, (height - 5) // 2), max(0, (width - 5) // 2)
    assert np.array_equal(cropped(pixels, (5, 5)), np.pad(pixels, [(0, 0), *missing])[:, top:top + 5, left:left + 5])


@pytest.mark.slow
@pytest.mark.parametrize("keys", [
    {"size": {"longest_edge": 224}}, {"size": {"shortest_edge": 224, "longest_edge": 400}}, {"do_resize": False}])
def test_unknown_resize_is_refused(processors, keys):
    """A processor that resizes in a way unknown here is refused, instead of being half followed."""
    with pytest.raises(script.Trouble) as trouble:
        script.ImageSettings.of(processors("clip", **{**clip_keys(224, 224, 224), **keys}))
    assert trouble.value.exit_code == script.EXIT_MODEL


# ── Strips ────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (20_000, 1), (3, 30_001), (1, 1_000_000)])
def test_strip_is_cut_to_its_centre(width, height):
    """A strip keeps its centre, which is all that the crop would keep, instead of growing to gigabytes."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    short, long = min(width, height), max(width, height)
    middle = (long - 300 * short) // 2, (long + 300 * short) // 2
    image.paste((255, 0, 0), (0, middle[0], width, middle[1]) if height > width else (middle[0], 0, middle[1], height))
    started = time.process_time()
    trimmed = script.trim_strip(image, script.DRY_RUN_SETTINGS)
    pixels = resized_by_pillow(trimmed, script.DRY_RUN_SETTINGS)
    assert time.process_time() - started < 1
    assert min(trimmed.size) == short and max(trimmed.size) <= (script.MAX_ASPECT + 1) * short
    assert pixels.shape == (3, 224, 224)
    assert (pixels[0] == 255).all() and (pixels[1:] == 0).all()


@pytest.mark.parametrize("size", [(20, 400), (400, 20), (640, 480), (1, 1), (1, 20), (1, script.MAX_ASPECT)])
def test_other_images_are_not_cut(size):
    """An image up to MAX_ASPECT times as long as wide is left alone."""
    image = Image.new("RGB", size)
    assert script.trim_strip(image, script.DRY_RUN_SETTINGS) is image


def test_strip_is_not_cut_for_a_model_without_crop():
    """A model that reads the whole image, squeezed, gets the whole strip."""
    image = Image.new("RGB", (1, 2000))
    assert script.trim_strip(image, script.ImageSettings(None, (224, 224), None, 3)) is image


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 500), (3, 701), (4, 1001)])
def test_cut_strip_equals_the_processor(processors, noise, size):
    """What is left of a strip comes out as if the processor had resized it whole."""
    processor = processors("clip", **clip_keys(224, 224, 224))
    settings = script.ImageSettings.of(processor)
    image = noise(*size)
    trimmed = script.trim_strip(image, settings)
    assert trimmed is not image
    difference = np.abs(resized_by_pillow(trimmed, settings).astype(int) - processed(processor, image))
    assert difference.max() <= 1


def test_warnings_are_not_needed(noise):
    """Ordinary images of every format decode without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image, format_, options, _ in COLOURS.values():
            decoded(encoded(image, format_, **options))


def test_loader_keeps_order_and_bounds():
    """Sources come back in the order given, and only a bounded number is loaded ahead."""
    begun = []

    def load(source):
        begun.append(source)
        time.sleep(0.001 * (len(source) % 3))
        return script.Loaded(digest=source.encode())
    pool = script.LoaderPool(3)
    sources = ["x" * n for n in range(200)]
    pool.add(load, sources[:120])
    pool.add(load, sources[120:])
    time.sleep(0.1)
    assert len(begun) <= 4 * 3 + 8
    assert [pool.take().digest for _ in sources] == [s.encode() for s in sources]
    pool.close()


def test_loader_without_threads():
    """With 0 threads each source is loaded when it is taken, in this thread."""
    begun = []
    pool = script.LoaderPool(0)
    pool.add(lambda source: begun.append(source) or script.Loaded(), ["a", "b"])
    assert begun == []
    pool.take()
    assert begun == ["a"]
    pool.close()


def test_loader_that_times_out(monkeypatch):
    """A TimeoutError out of a loader, such as a network disk's, ends the wait for it."""
    waited = []

    def check():
        waited.append(1)
        assert len(waited) < 5, "still waiting"
    monkeypatch.setattr(script.INTERRUPTION, "check", check)

    def load(source):
        raise TimeoutError(110, "Connection timed out")
    pool = script.LoaderPool(1)
    pool.add(load, ["x"])
    try:
        with pytest.raises(TimeoutError):
            pool.take()
    finally:
        pool.close()

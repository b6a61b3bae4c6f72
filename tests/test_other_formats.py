"""Images of kinds that are not read here are `unsupported`; what is no image at all is not."""
import os
import random

import pytest
from PIL import Image

import image_text_sim_clip as script
from addons.images import other_formats

FORMATS = {"jp2": "JPEG2000", "ico": "ICO", "ppm": "PPM", "tga": "TGA", "pcx": "PCX", "dds": "DDS", "icns": "ICNS",
           "sgi": "SGI", "qoi": "QOI", "eps": "EPS", "pdf": "PDF"}
STARTS = [b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), b"\xff\x0a" + bytes(200), b" \n<svg xmlns='x'/>",
          b"8BPS\0\1" + bytes(50), *(b"\0\0\0\x18ftyp" + brand + bytes(300) for brand in other_formats.BOX_BRANDS)]


def status_of(data):
    with pytest.raises(script.RowFailure) as failure:
        script.decode_image(data, script.Config(pretrained_model="none"))
    return failure.value.status


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("ending", FORMATS)
def test_what_pillow_writes(tmp_path, ending, mode):
    """Formats that Pillow could read, and that are not allowed, are unsupported."""
    path = tmp_path / f"x.{ending}"
    try:
        Image.effect_noise((64, 48), 50).convert(mode).save(path, format=FORMATS[ending])
    except (OSError, ValueError, KeyError):
        pytest.skip("this Pillow cannot write it so")
    assert status_of(path.read_bytes()) == "unsupported"


@pytest.mark.parametrize("start", STARTS)
def test_starts(start):
    """Each way in which such a file begins is known."""
    assert status_of(start) == "unsupported"


def test_what_is_no_image():
    """Texts, pages, archives and bytes of chance are not called images."""
    texts = (b"hello", b"<!DOCTYPE html><html>", b"P5 is my favourite", b"\n\n\n\n", b"{}")
    for data in (*texts, b"PK\x03\x04" + bytes(60), bytes(100)):
        assert status_of(data) == "not_image", data
    rng = random.Random(4)
    wrong = sum(other_formats.is_other_format(rng.randbytes(300)) for _ in range(20_000))
    assert wrong < 20
    assert not other_formats.is_other_format(os.urandom(0))

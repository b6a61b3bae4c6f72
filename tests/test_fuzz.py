"""Mutated images and tables: nothing but the documented failures comes out. Longer with FUZZ_S=60 (`make fuzz`)."""
import io
import os
import random
import time

import pytest
import zoo

import image_text_sim_clip as script

FUZZ_S = float(os.environ.get("FUZZ_S", "10"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


def mutated(data, rng):
    """The bytes with a few flips, cuts, doublings or pieces of chance in them."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 64))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:at + size]
        elif kind == 2:
            data[at:at] = data[at:at + size]
        elif kind == 3:
            data[at:at + size] = rng.randbytes(size)
        else:
            data[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
    return bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_S + 60)
def test_mutated_images():
    """decode_image gives an RGB image or a RowFailure with a known status, whatever the bytes."""
    rng, animals, tried = random.Random(SEED), [data for _, data, _ in [*zoo.proper()] if len(data) < 50_000], 0
    config = script.Config(max_image_pixels=2_000_000, avif=True, exif_orientation=True)
    end = time.monotonic() + FUZZ_S
    while time.monotonic() < end:
        data = mutated(rng.choice(animals), rng)
        try:
            assert script.decode_image(data, config).mode == "RGB"
        except script.RowFailure as failure:
            assert failure.status in script.STATUSES
        tried += 1
    assert tried > 1000


TABLES = [
    b'url,caption\na.jpg,"a, cat"\nb.jpg,"two\nlines"\nc.jpg,"he said ""hi"""\n',
    b'caption,url,note\r\nx,a.jpg,1\r\n"",b.jpg,\r\n',
    "url,caption\nä.jpg,ünï ☃ 😀\n".encode(),
    b"url,caption\n" + b"a.jpg,=1+1\n" * 40,
]


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_S + 60)
def test_mutated_tables():
    """csv_records gives every physical line to exactly one record and raises nothing, whatever the text."""
    rng, tried, end = random.Random(SEED), 0, time.monotonic() + FUZZ_S
    while time.monotonic() < end:
        data = mutated(mutated(rng.choice(TABLES), rng), rng)
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8", "surrogateescape", "")
        lines = list(io.TextIOWrapper(io.BytesIO(data), "utf-8", "surrogateescape", ""))
        seen = []
        for number, fields, raw, _ in script.csv_records(iter(text), ","):
            assert fields is None or all(isinstance(field, str) for field in fields)
            assert "".join(lines[number - 1:]).startswith(raw)
            seen.append(raw)
        blank = [line for line in lines if not line.strip("\r\n")]
        assert len("".join(seen)) >= sum(map(len, lines)) - sum(map(len, blank))
        tried += 1
    assert tried > 1000

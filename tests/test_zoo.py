"""The zoo of odd and broken images, through the decoder one by one and through a whole run."""
import contextlib
import csv
import time

import numpy as np
import psutil
import pytest
import zoo
from PIL import Image

import image_text_sim_clip as script

PROPER, BROKEN = list(zoo.proper()), list(zoo.broken())


def test_zoo_is_large():
    """At least 150 animals, no two of one name."""
    names = [name for name, *_ in PROPER + BROKEN]
    assert len(names) == len(set(names)) >= 150


@pytest.mark.parametrize(("data", "rgb", "tolerance"), [
    pytest.param(data, rgb, 25 if name == "quality1.jpg" else 4, id=name) for name, data, rgb in PROPER])
def test_converted_modes_have_their_known_pixels(data, rgb, tolerance):
    """Each mode and format becomes the RGB it shows, never silent white or black."""
    image = script.decode_image(data, script.Config())
    assert image.mode == "RGB"
    middle = image.getpixel((image.width // 2, image.height // 2))
    if rgb:
        assert np.abs(np.subtract(middle, rgb)).max() <= tolerance, middle


def test_every_image_of_the_zoo_gets_what_it_should(tmp_path, write_config, write_table, run_main):
    """A run over the whole zoo ends well: every proper image is ok, every broken one has a right status."""
    expected = {name: ("ok",) for name, *_ in PROPER} | {name: statuses for name, _, statuses in BROKEN}
    config = write_config(loader_threads=2, max_failure_rate=1.0)
    for name, data, _ in PROPER + BROKEN:
        (tmp_path / "pictures" / name).write_bytes(data)
    write_table([("url", "caption"), *((name, f"a caption of {name}") for name in expected)])
    outcome = run_main("--config", config)
    assert outcome.code == 0, outcome.stderr
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["url"] for row in rows] == list(expected)
    wrong = {row["url"]: (row["status"], row["detail"]) for row in rows if row["status"] not in expected[row["url"]]}
    assert not wrong


def large_animals():
    """Images near the pixel cap whose careless conversion takes a gigabyte: (name, bytes)."""
    side = 7000  # 49 megapixels
    yield "rgba.png", zoo.saved(Image.new("RGBA", (side, side), (9, 9, 9, 90)), "PNG", compress_level=1)
    yield "grey16.png", zoo.saved(Image.fromarray(np.full((side, side), 9000, np.uint16)), "PNG", compress_level=1)
    yield "float.tiff", zoo.saved(Image.fromarray(np.full((side, side), 0.5, np.float32)), "TIFF", compression="packbits")
    yield "rgb.jpg", zoo.saved(Image.new("RGB", (side, side), "teal"), "JPEG")
    yield "again.jpg", zoo.saved(Image.new("RGB", (side, side), "plum"), "JPEG")


@pytest.mark.slow
def test_zoo_stays_within_memory_and_time(tmp_path, write_config, write_table, start_cli):
    """Images of 49 megapixels and bombs together: under 500 MB above the start, no image above 5 s."""
    config = write_config(max_failure_rate=1.0)
    animals = [*large_animals()] + [(name, data) for name, data, _ in BROKEN if "bomb" in name]
    for name, data in animals:
        (tmp_path / "pictures" / name).write_bytes(data)
        started = time.perf_counter()
        with contextlib.suppress(script.RowFailure):
            script.decode_image(data, script.Config())
        assert time.perf_counter() - started < 5, name
    write_table([("url", "caption"), *((name, f"a caption of {name}") for name, _ in animals)])
    process, baseline, peak = start_cli("--config", config), 0, 0
    while process.poll() is None:
        try:
            rss = psutil.Process(process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            break
        if not (tmp_path / "out" / "parts" / "part-00000.trying").exists():
            baseline = max(baseline, rss) if peak == 0 else baseline
        else:
            peak = max(peak, rss)
        time.sleep(0.005)
    assert process.returncode in (0, None) and process.wait() == 0
    assert 0 < peak - baseline < 500e6, (peak, baseline)

"""`decode: gpu` with a stand-in for the GPU's decoder, on the CPU: who decodes what, and what happens where it fails."""
import functools
import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import image_text_sim_clip as script
from addons.images import gpu_decode


class StandIn:
    """Decodes as the GPU's decoder is documented to: a list of JPEGs to tensors, all or a RuntimeError."""

    def __init__(self):
        self.calls = []

    def __call__(self, batch):
        self.calls.append(len(batch))
        out = []
        for data in batch:
            if b"poison" in data:
                raise RuntimeError("Error while decoding JPEG images")
            out.append(torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1))
        return out


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with a stand-in decoder that is given every JPEG it may decode; the stand-in."""
    decode = StandIn()
    monkeypatch.setattr(gpu_decode, "find_decoder", lambda device: decode)
    monkeypatch.setattr(gpu_decode, "LOADERS_SHARE", 0.0)
    return decode


def digest_of(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def test_only_whole_plain_jpegs_go_to_the_gpu(picture_bytes, noise, monkeypatch):
    """Grey and YCbCr JPEGs that are complete and not too large; no CMYK, no half image, no other format."""
    monkeypatch.setattr(gpu_decode, "LOADERS_SHARE", 0.0)
    plain = picture_bytes("JPEG", image=noise(64, 48))

    def takes(data, most=10_000):
        return gpu_decode.offer_to_gpu(data, digest_of(data), most)
    assert (takes(plain).height, takes(plain).width, takes(plain).data) == (48, 64, plain)
    assert takes(picture_bytes("JPEG", image=noise(64, 48), progressive=True))
    assert takes(picture_bytes("JPEG", mode="L"))
    assert not takes(plain, most=3000)
    assert not takes(plain[:-40])
    assert not takes(picture_bytes("JPEG", mode="CMYK"))
    assert not takes(picture_bytes("PNG"))
    assert not takes(b"\xff\xd8\xff\xd9")


def test_share_is_settled_by_the_image_alone(picture_bytes):
    """About LOADERS_SHARE of the images stay with the loader threads, always the same ones."""
    images = [picture_bytes("JPEG", colour=(i, 255 - i, 7)) for i in range(250)]
    taken = [bool(gpu_decode.offer_to_gpu(data, digest_of(data), 10_000)) for data in images]
    assert taken == [bool(gpu_decode.offer_to_gpu(data, digest_of(data), 10_000)) for data in images]
    assert 0.45 < np.mean(taken) < 0.75


@pytest.mark.parametrize("size", [(640, 480), (300, 901), (224, 224), (60, 40)])
@pytest.mark.parametrize("settings", [script.ImageSettings(224, None, (224, 224), 3),
                                      script.ImageSettings(None, (96, 96), None, 2),
                                      script.ImageSettings(64, None, (80, 80), 3)])
def test_resize_on_the_gpu_is_the_loaders(size, settings, noise):
    """Resize and crop in floats give the loader's pixels within two levels and in the same places."""
    image = noise(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    ours = gpu_decode.resize_in_floats(pixels, settings)[0].numpy()
    theirs = script.resize_fast(image, settings)
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def test_broken_image_costs_its_row_and_no_other(noise, picture_bytes):
    """A JPEG that the GPU refuses is found and given to Pillow; what Pillow refuses too becomes a failure."""
    settings, decode = script.ImageSettings(32, None, (32, 32), 3), StandIn()
    loader = script.ImageLoader(lambda source: b"", script.ImageDecoder(script.Config(), settings),
                                functools.partial(script.resize_fast, settings=settings))
    decoder = gpu_decode.GpuDecoder(decode, "cpu", settings, loader)
    good = picture_bytes("JPEG", image=noise(64, 48))
    batch = [np.full((3, 32, 32), 9, np.uint8), gpu_decode.OnGpu(good, 48, 64),
             gpu_decode.OnGpu(good + b"poison", 48, 64), gpu_decode.OnGpu(b"poison", 48, 64)]
    pixels = decoder.start(batch).result().numpy()
    assert decode.calls == [3, 1, 1, 1]
    assert decoder.fell_back == 2
    assert (pixels[0] == 9).all()
    assert np.abs(pixels[1].astype(int) - pixels[2]).max() <= 1
    assert pixels[1].std() > 5
    assert not pixels[3].any()
    assert batch[3].failure.status == "not_image"
    assert [image.failure for image in batch[1:3]] == [None, None]
    assert all(image.data is None for image in batch[1:])


def test_half_image_that_was_given_an_end(noise, picture_bytes):
    """A JPEG that breaks off and was given an end is corrupt on the GPU's side as on the loaders'."""
    settings = script.ImageSettings(32, None, (32, 32), 3)
    config = script.Config(pretrained_model="none")
    loader = script.ImageLoader(lambda source: b"", script.ImageDecoder(config, settings),
                                functools.partial(script.resize_fast, settings=settings))
    whole = picture_bytes("JPEG", image=noise(64, 48))
    images = [gpu_decode.OnGpu(data, 48, 64) for data in (whole, whole[:len(whole) // 2] + b"\xff\xd9")]
    pixels = gpu_decode.GpuDecoder(StandIn(), "cpu", settings, loader).start(images).result()
    assert pixels[0].any() and images[0].failure is None
    assert not pixels[1].any() and images[1].failure.status == "corrupt"


def test_calls_are_bounded_by_decoded_bytes():
    """Images are decoded in runs that fit the allowance; one beyond it goes alone."""
    images = {place: gpu_decode.OnGpu(b"", 10, 10) for place in range(5)} | {5: gpu_decode.OnGpu(b"", 100, 100)}
    assert gpu_decode.split_by_bytes(images, 600) == [[0, 1], [2, 3], [4], [5]]


def test_run_with_a_gpu(gpu, bundled_model, write_table, write_config, run_main, read_table, noise, picture_bytes, tmp_path):
    """A run in which the GPU decodes has the scores of one without (in its bits) and the same failures; passport included."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        (tmp_path / f"pictures/{i}.jpg").write_bytes(picture_bytes("JPEG", image=noise(90 + i, 70, seed=i), quality=90))
    (tmp_path / "pictures/12.jpg").write_bytes(b"\xff\xd8\xff" + b"poison" * 9 + b"\xff\xd9")
    (tmp_path / "pictures/13.png").write_bytes(picture_bytes("PNG", image=noise(80, 80)))
    names = [*(f"{i}.jpg" for i in range(13)), "13.png", "gone.jpg"]
    write_table([("url", "caption"), *((name, f"a red circle {name}") for name in names)])
    tables = []
    for decode in ("exact", "gpu"):
        out = tmp_path / decode
        assert run_main("--config", write_config(pretrained_model=bundled_model, decode=decode, output_path=str(out),
                                                 batch_size=5)).code == 0
        tables.append(read_table(out / "scores.csv"))
        assert json.loads((out / "profile.json").read_text())["passport"]["max_difference"] <= 5e-3
    assert sum(gpu.calls) == 12
    assert [row["status"] for row in tables[1]] == [row["status"] for row in tables[0]]
    assert {row["status"] for row in tables[1][:12]} == {"ok"} != {tables[1][12]["status"]}
    for mine, theirs in zip(tables[1], tables[0], strict=True):
        if mine["status"] == "ok":
            assert float(mine["similarity"]) == pytest.approx(float(theirs["similarity"]), abs=5e-3)


def test_without_a_gpu_pillow_decodes_and_says_so(shapes, bundled_model, run_main):
    """decode: gpu where there is none: one clear line, and the run goes on."""
    outcome = run_main("--config", shapes(rows=20, pretrained_model=bundled_model, decode="gpu"))
    assert outcome.result["scored"] == 20
    assert outcome.stderr.count("decode: gpu cannot be used here, Pillow decodes: there is no CUDA device") == 1

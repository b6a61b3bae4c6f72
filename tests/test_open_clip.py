"""open_clip's format: what open_clip 3.3.0 said of tiny models with its published switches is what comes out here.

The reference lies in open_clip_reference/, with the script that asked open_clip itself; neither it nor timm, nor torchvision
is needed here.
"""
import json
import math
import pathlib

import numpy as np
import open_clip_models as tiny
import pytest
import torch

import image_text_sim_clip as script
from addons.models import open_clip_text
from addons.models.open_clip_config import PreprocessConfig, TokenizerConfig
from addons.models.open_clip_images import OpenClipImages, image_settings

EMBEDDINGS = np.load(tiny.REFERENCE / "embeddings.npz")
ODD = tiny.read_reference("captions")
COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a tiny model -> its folder, written once."""
    root = tmp_path_factory.mktemp("open-clip")

    def get(name):
        folder = root / name
        return folder if folder.exists() else tiny.write_model(folder, name)
    return get


@pytest.fixture(scope="module")
def scorers(folders):
    """Name of a tiny model and config keys -> a Scorer, loaded once."""
    made = {}

    def get(name, **keys):
        key = (name, *sorted(keys.items()))
        if key not in made:
            made[key] = script.Scorer(script.Config(pretrained_model=str(folders(name)), use_cuda=False, **keys))
        return made[key]
    return get


# ── Equal to open_clip ────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.MODELS)
def test_embeddings_are_those_of_open_clip(name, scorers):
    """Images and captions prepared and embedded here are open_clip's: token ids equal, pixels equal, embeddings within 1e-5."""
    scorer = scorers(name, preprocess="exact", dtype="float32")
    wanted = {key: EMBEDDINGS[f"{name}/{key}"] for key in ("images", "texts", "logits", "ids", "pixels")}
    images = [tiny.picture(*size, seed) for seed, size in enumerate(tiny.SIZES)]
    pixels = torch.cat([scorer.family.processor(image, return_tensors="pt")["pixel_values"] for image in images])
    assert np.array_equal(pixels[:, :, ::16, ::16].numpy(), wanted["pixels"])
    ids, _ = scorer.tokenize(tiny.CAPTIONS)
    pad = scorer.family.tokenizer.pad_token_id
    assert [row + [pad] * (scorer.family.context_length - len(row)) for row in ids] == wanted["ids"].tolist()
    image_units = scorer.encode_images(torch.from_numpy(np.stack([scorer.resize(image) for image in images])))
    text_units = scorer.encode_texts(ids)
    assert np.abs(image_units.numpy() - wanted["images"]).max() <= 1e-5
    assert np.abs(text_units.numpy() - wanted["texts"]).max() <= 1e-5
    logits = image_units @ text_units.T * scorer.family.scale + scorer.family.bias
    assert np.abs(logits.numpy() - wanted["logits"]).max() <= 2e-4
    assert wanted["logits"].std() > 0.05, "a reference that says the same of every pair proves nothing"
    chance = scorer.family.probabilities(np.float32([0.1]))
    has_bias = "init_logit_bias" in tiny.MODELS[name][0]["model_cfg"]
    assert (chance is not None) is has_bias
    if has_bias:
        assert chance[0] == pytest.approx(1 / (1 + math.exp(7.5 - 0.1 * math.exp(2.5))), rel=1e-5)


@pytest.mark.parametrize("variant", ODD["ids"])
def test_odd_captions_become_the_same_tokens(variant, tmp_path):
    """200 odd captions, cleaned and cut, have open_clip's token ids, for its own tokenizer and for those of Hugging Face."""
    length, clean = {"own-lower": (77, "lower"), "own-whitespace": (77, "whitespace"), "own-canonicalize": (32, "canonicalize"),
                     "siglip": (64, "canonicalize"), "siglip2": (64, "canonicalize"), "bert": (32, "whitespace"),
                     "worldwide": (77, "whitespace")}[variant]
    config = TokenizerConfig(length, 49408, "", clean, variant == "bert")
    cleaned = [open_clip_text.find_cleaning(clean, "it")(caption) for caption in ODD["captions"]]
    if variant.startswith("own"):
        tiny.write_bpe(tmp_path)
        tokenizer, _ = open_clip_text.load_byte_tokenizer(tmp_path, "it")
        separator = None
    else:
        tokenizer = open_clip_text.load_hugging_face_tokenizer(tiny.REFERENCE / variant, "it")
        separator = open_clip_text.separator_of(tokenizer, config, "it")
    rows = tokenizer(cleaned, truncation=True, max_length=length)["input_ids"]
    for caption, row, wanted in zip(ODD["captions"], rows, ODD["ids"][variant], strict=True):
        got = [0 if token == separator else token for token in row]
        assert got + [tokenizer.pad_token_id] * (length - len(got)) == wanted, caption
    assert len({tuple(row) for row in rows}) > 150


@pytest.mark.parametrize("steps", tiny.STEPS)
def test_pixels_are_those_of_open_clip(steps, monkeypatch):
    """60 sizes of images, resized, cropped, filled up and normalised as open_clip's transforms do it, to the last bit."""
    frame, keys = tiny.STEPS[steps]
    config = PreprocessConfig(frame, keys["resize_mode"], "bilinear" if keys["interpolation"] == "bilinear" else "bicubic",
                              *COLOURS, keys.get("fill_color", 0))
    processor = OpenClipImages(config)
    compared = 0
    for seed, (size, wanted) in enumerate(zip(tiny.sizes_of_images(), tiny.read_reference("pixels")[steps], strict=True)):
        image = tiny.picture(*size, seed)
        exact = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0].numpy()
        assert exact.shape == (3, *frame)
        if wanted != "fails":  # open_clip fails where a side becomes 0
            assert tiny.digest(exact) == wanted, size
            compared += 1
        fast = script.resize_fast(image, image_settings(config))
        difference = np.abs(fast.astype(int) - exact)
        assert difference.mean() < 0.5 and (difference <= 2).mean() > 0.98, size
    assert compared >= 59
    whole = np.load(tiny.REFERENCE / "pixels.npz")[steps]
    assert np.array_equal(processor(tiny.picture(*tiny.sizes_of_images()[13], 13))["pixel_values"][0].numpy(), whole)


def test_the_reference_has_every_switch():
    """The tiny models have each word of open_clip's configs that is read here, so that none goes without a proof."""
    from addons.models import open_clip_config as words
    used = {"vision": set(), "text": set()}
    for config, _ in tiny.MODELS.values():
        used["vision"] |= set(config["model_cfg"]["vision_cfg"])
        used["text"] |= set(config["model_cfg"]["text_cfg"])
    beyond = {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "block_type", "timm_drop", "timm_drop_path",
              "output_tokens", *words.OTHER_BLOCKS, "embed_cls", "pad_id", "tokenizer_mode"}
    assert {word for word in words.VISION_WORDS - used["vision"] - beyond if "hf_" not in word} == set()
    assert {word for word in words.TEXT_WORDS - used["text"] - beyond if not word.startswith("hf_")} == {"final_ln_after_pool"}
    assert len(tiny.MODELS) >= 12

"""Model folders in open_clip's format for the tests: published switches, tiny sizes, weights that follow from their names.

What open_clip 3.3.0 itself says of them lies in open_clip_reference/, with the script that asked it.
"""
import gzip
import hashlib
import json
import lzma
import pathlib
import shutil
import zlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from addons.models.open_clip_text import byte_symbols

REFERENCE = pathlib.Path(__file__).resolve().parent / "open_clip_reference"
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"

OPENAI_COLOURS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
SIGLIP_STEPS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
CLIPA_STEPS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear",
               "resize_mode": "squash"}
VIT = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
SIGLIP_TEXT = {"context_length": 64, "width": 64, "heads": 2, "layers": 2, "no_causal_mask": True, "proj_bias": True,
               "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "tokenizer_kwargs": {"clean": "canonicalize"}}
TANH = {"act_kwargs": {"approximate": "tanh"}}


def _siglip(tower, size, tokenizer, vocabulary, embed_dim, text=None, **vision):
    """A config of timm's SigLIP."""
    return {"model_cfg": {
        "embed_dim": embed_dim, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": size, "timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "map",
                       "timm_proj": "none", **vision},
        "text_cfg": {**SIGLIP_TEXT, "vocab_size": vocabulary, "hf_tokenizer_name": f"timm/{tokenizer}", **(text or {})}},
        "preprocess_cfg": SIGLIP_STEPS}


def _plain(vision=None, text=None, preprocess=None, embed_dim=48, **more):
    """A config of a plain ViT."""
    return {"model_cfg": {"embed_dim": embed_dim, **more, "vision_cfg": {**VIT, **(vision or {})},
                          "text_cfg": {**TEXT, **(text or {})}},
            "preprocess_cfg": {**OPENAI_COLOURS, **(preprocess or {})}}


# Name -> open_clip_config.json, and the folder of open_clip_reference/ with its Hugging Face tokenizer ("": open_clip's own).
MODELS = {
    "quickgelu": (_plain(quick_gelu=True, preprocess={"interpolation": "bicubic", "resize_mode": "squash"}), ""),
    "gelu": (_plain({"patch_size": 14, "image_size": 56}, preprocess={"interpolation": "bicubic", "resize_mode": "shortest"}),
             ""),
    "heads-of-80": (_plain({"width": 160, "head_width": 80, "patch_size": 14, "image_size": 42}), ""),
    "heads-of-104": (_plain({"width": 208, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14, "image_size": 42}), ""),
    "heads-of-88": (_plain({"width": 176, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14, "image_size": 42}), ""),
    "heads-of-112": (_plain({"width": 112, "head_width": 112, "mlp_ratio": 8.5715, "patch_size": 14, "image_size": 42}), ""),
    "layer-scale": (_plain({"ls_init_value": 1e-4}, {"ls_init_value": 1e-4}), ""),
    "custom-text": (_plain({"patch_dropout": 0.5}, {"context_length": 256, "proj_bias": True}, custom_text=True), ""),
    "bias": (_plain({"norm_kwargs": {"eps": 1e-3}, **TANH}, {"norm_kwargs": {"eps": 1e-3}, **TANH}, init_logit_bias=-10,
                    nonscalar_logit_scale=True), ""),
    "norm-after-pool": (_plain({"final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}, {"mlp_ratio": 2.0}), ""),
    "average": (_plain({"pool_type": "avg"}, {"pool_type": "last", "tokenizer_kwargs": {"clean": "whitespace"}}), ""),
    "oblong": (_plain({"image_size": [48, 64], "patch_size": 16}, {"pool_type": "first", "no_causal_mask": True,
                                                                   "tokenizer_kwargs": {"clean": "canonicalize"}},
                      {"interpolation": "bilinear"}), ""),
    "longest": (_plain(preprocess={"resize_mode": "longest", "fill_color": 127, "interpolation": "bilinear"}), ""),
    "worldwide": (_plain(text={"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2,
                               "vocab_size": 64}), "worldwide"),
    "clipa": (_plain({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "patch_size": 14, "image_size": 42},
                     {"context_length": 32, "vocab_size": 180, "hf_tokenizer_name": "bert-base-uncased", "pool_type": "last",
                      "tokenizer_kwargs": {"strip_sep_token": True}, "no_causal_mask": True}, CLIPA_STEPS), "bert"),
    "siglip": (_siglip("vit_base_patch16_siglip_224", 224, "ViT-B-16-SigLIP", 60, 128), "siglip"),
    "siglip2": (_siglip("vit_base_patch32_siglip_256", 256, "ViT-B-32-SigLIP2-256", 600, 128, TANH), "siglip2"),
    "so400m": (_siglip("vit_so400m_patch14_siglip_384", 384, "ViT-B-16-SigLIP", 60, 144,
                       {"context_length": 16, "mlp_ratio": 3.7362}), "siglip"),
    "so400m-i18n": (_siglip("vit_so400m_patch16_siglip_256", 256, "ViT-B-16-SigLIP-i18n-256", 60, 144,
                            {"proj_type": "none", "width": 144}), "siglip"),
    "giantopt": (_siglip("vit_giantopt_patch16_siglip_256", 256, "ViT-gopt-16-SigLIP2-256", 600, 192, TANH), "siglip2"),
    "siglip-projected": (_siglip("vit_large_patch16_siglip_256", 256, "ViT-B-16-SigLIP", 60, 64, timm_proj="linear",
                                 timm_proj_bias=True), "siglip"),
}

CAPTIONS = ["two cats on a sofa", "A Photo of TWO dogs &amp; one café!", "the old red bicycle in front of a house, at night",
            "portrait of a woman with a hat", "a bowl"]
SIZES = [(301, 170), (97, 200), (64, 64), (61, 33), (224, 225)]  # width, height of the images that are scored


def picture(width, height, seed):
    """An image with coarse blocks and fine noise, the same everywhere."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    blocks = np.kron(coarse, np.ones((8, 8, 1), int))[:height, :width]
    noisy = blocks + random.randint(-40, 41, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_weight(model, name, shape):
    """The weight of that name: large enough that every token and patch shows in the score."""
    random = np.random.RandomState(zlib.crc32(f"{model}:{name}".encode()))
    if name in ("logit_scale", "logit_bias"):
        return np.full(shape, {"logit_scale": 2.5, "logit_bias": -7.5}[name], np.float32)
    noise = random.standard_normal(shape).astype(np.float32)
    if name.endswith("gamma"):
        return np.float32(0.3) + np.float32(0.1) * noise
    if len(shape) == 1 and "class_embedding" not in name:
        return np.float32(0.1) * noise + np.float32(("ln_" in name or "norm" in name) and name.endswith("weight"))
    if "embed" in name and "patch" not in name:
        return noise
    return noise / np.float32(np.sqrt(noise[0].size))


def write_model(folder, name, shapes=None, tokenizer=True):
    """Write the model called `name` into `folder`; `shapes` of its weights, read from the reference unless they are given."""
    config, hugging_face = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = shapes or read_reference("weights")[name]
    weights = {weight: torch.from_numpy(make_weight(name, weight, tuple(shape))) for weight, shape in shapes.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if tokenizer and hugging_face:
        shutil.copytree(REFERENCE / hugging_face, folder, dirs_exist_ok=True)
    elif tokenizer:
        write_bpe(folder)
    return folder


def write_bpe(folder):
    """OpenAI's merges in the file that open_clip's package brings."""
    merges = lzma.decompress((REFERENCE / "merges.txt.xz").read_bytes())
    (folder / BPE_FILE).write_bytes(gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n' + merges, 1, mtime=0))


def write_tokenizer_json(folder):
    """The same words as Hub repositories bring them: CLIP's tokenizer.json."""
    pairs = [line.split() for line in lzma.decompress((REFERENCE / "merges.txt.xz").read_bytes()).decode().split("\n")]
    letters = list(byte_symbols().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    bpe = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {word: i for i, word in enumerate(words)}, "merges": pairs}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": bpe}), encoding="utf-8")


def read_reference(name):
    """A JSON file of open_clip_reference/."""
    return json.loads(lzma.decompress((REFERENCE / f"{name}.json.xz").read_bytes()))


def digest(pixels):
    """A short hash of an array of bytes and its shape."""
    array = np.ascontiguousarray(pixels)
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:24]


# Preprocessing: name -> (frame, preprocess_cfg)
STEPS = {
    "shortest": ((64, 64), {"resize_mode": "shortest", "interpolation": "bicubic"}),
    "shortest-bilinear": ((50, 50), {"resize_mode": "shortest", "interpolation": "bilinear"}),
    "shortest-oblong": ((48, 64), {"resize_mode": "shortest", "interpolation": "bilinear"}),
    "longest": ((64, 64), {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 0}),
    "longest-filled": ((51, 51), {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 127}),
    "longest-oblong": ((48, 64), {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 255}),
    "squash": ((64, 64), {"resize_mode": "squash", "interpolation": "bicubic"}),
    "squash-bilinear": ((48, 64), {"resize_mode": "squash", "interpolation": "bilinear"}),
    "random": ((64, 64), {"resize_mode": "shortest", "interpolation": "random"}),
}


def sizes_of_images():
    """60 sizes (width, height): near the frame, odd and even, wide, high, tiny and long."""
    random = np.random.RandomState(60)
    fixed = [(64, 64), (65, 64), (64, 65), (66, 64), (64, 67), (63, 64), (1, 1), (2, 1), (1, 3), (48, 64), (64, 48), (50, 51),
             (128, 128), (640, 480), (481, 640), (1000, 7), (5, 400), (333, 100), (100, 333), (127, 129)]
    drawn = [tuple(int(side) for side in random.randint(8, 400, 2)) for _ in range(60 - len(fixed))]
    return fixed + drawn

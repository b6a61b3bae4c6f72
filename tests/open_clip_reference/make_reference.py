"""Asks open_clip itself, and writes what it says next to this file: embeddings, scores, token ids and pixels.

    python3 -m venv /tmp/reference && /tmp/reference/bin/pip install -r requirements.txt
    /tmp/reference/bin/pip install --no-deps open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0 ftfy==6.3.1 regex wcwidth
    /tmp/reference/bin/python tests/open_clip_reference/make_reference.py

In an environment that is thrown away afterwards: torchvision's operators do not fit a CPU build of torch. Its transforms on
Pillow images are Python alone, so they are torchvision's own here; of its operators not one is called.
"""
import gzip
import importlib.util
import json
import lzma
import pathlib
import sys
import tempfile
import types

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

sys.modules["torchvision._meta_registrations"] = types.ModuleType("none")  # it asks for operators that are not there
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import odd_captions  # noqa: E402
import open_clip  # noqa: E402
import open_clip_models as tiny  # noqa: E402
from models import CORPUS, write_siglip2_tokenizer  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

HEADS = {"vit_base": 64, "vit_large": 64, "vit_so400m": 72, "vit_giantopt": 96}


def small_timm():
    """timm as open_clip sees it, with SigLIP's towers of two layers and two heads of the published width."""
    import timm

    def create_model(name, **options):
        heads = HEADS[name.partition("_patch")[0]]
        return timm.create_model(name, embed_dim=2 * heads, depth=2, num_heads=2, **options)
    return types.SimpleNamespace(create_model=create_model)


def write_tokenizers():
    """Small tokenizers of the kinds that the configs name."""
    for name in ("siglip", "siglip2", "bert", "worldwide"):
        (HERE / name).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=f"{folder}/spiece", model_type="unigram", vocab_size=200,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
        (pathlib.Path(folder) / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "T5Tokenizer", "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}))
        t5 = transformers.T5TokenizerFast.from_pretrained(folder, extra_ids=0, legacy=False)
        t5.pad_token_id = 1
        t5.save_pretrained(HERE / "siglip")
    write_siglip2_tokenizer(HERE / "siglip2")
    bert = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    bert.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bert, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]").save_pretrained(HERE / "bert")
    world = Tokenizer(models.Unigram())
    world.normalizer = normalizers.NFKC()
    world.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    world.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>",
                                                              show_progress=False))
    world.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=world, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>").save_pretrained(HERE / "worldwide")


def pack(name, content):
    """Write a JSON file, compressed."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (HERE / f"{name}.json.xz").write_bytes(lzma.compress(text.encode("utf-8")))


def write_merges():
    """The merges of OpenAI's vocabulary that CLIP uses (MIT licence, Copyright (c) 2021 OpenAI)."""
    lines = gzip.decompress(pathlib.Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = "\n".join(lines[1:49152 - 256 - 2 + 1])
    (HERE / "merges.txt.xz").write_bytes(lzma.compress(merges.encode("utf-8")))


def score_models():
    """Weights' shapes, embeddings of fixed images and captions, logits; each model as open_clip loads a folder."""
    open_clip.timm_model.timm = small_timm()
    shapes = {}
    arrays = {}
    for name, (config, _) in tiny.MODELS.items():
        content = json.loads(json.dumps(config))["model_cfg"]
        kind = open_clip.model.CustomTextCLIP if content.pop("custom_text", False) else open_clip.model.CLIP
        shapes[name] = {key: list(value.shape) for key, value in kind(**content).state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            path = tiny.write_model(pathlib.Path(folder) / name, name, shapes[name])
            (path / tiny.BPE_FILE).unlink(missing_ok=True)  # open_clip takes its own
            model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
            tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
        model.eval()
        pixels = torch.stack([transform(tiny.picture(*size, seed)) for seed, size in enumerate(tiny.SIZES)])
        with torch.inference_mode():
            ids = tokenizer(tiny.CAPTIONS)
            arrays[f"{name}/images"] = model.encode_image(pixels, normalize=True).numpy()
            arrays[f"{name}/texts"] = model.encode_text(ids, normalize=True).numpy()
            arrays[f"{name}/logits"] = model.get_logits(pixels, ids)[0].numpy()
        arrays[f"{name}/ids"] = ids.numpy().astype(np.int32)
        arrays[f"{name}/pixels"] = pixels[:, :, ::16, ::16].numpy()  # enough to see a shift or another colour
    pack("weights", shapes)
    np.savez_compressed(HERE / "embeddings.npz", **arrays)


def tokenize_captions():
    """Token ids of odd captions, as open_clip's tokenizers give them, without what fills up the row."""
    captions = odd_captions.CAPTIONS
    own = {f"own-{clean}": open_clip.tokenizer.SimpleTokenizer(clean=clean, context_length=length)
           for clean, length in (("lower", 77), ("whitespace", 77), ("canonicalize", 32))}
    theirs = {
        "siglip": open_clip.tokenizer.HFTokenizer(str(HERE / "siglip"), 64, clean="canonicalize"),
        "siglip2": open_clip.tokenizer.HFTokenizer(str(HERE / "siglip2"), 64, clean="canonicalize"),
        "bert": open_clip.tokenizer.HFTokenizer(str(HERE / "bert"), 32, strip_sep_token=True),
        "worldwide": open_clip.tokenizer.HFTokenizer(str(HERE / "worldwide"), 77)}
    rows = {name: tokenizer(captions).tolist() for name, tokenizer in (own | theirs).items()}
    pack("captions", {"captions": captions, "ids": rows})


def prepare_images():
    """A hash of the bytes of each image after open_clip's transforms, before they are normalised; and a few whole ones."""
    hashes = {}
    arrays = {}
    for name, (frame, keys) in tiny.STEPS.items():
        transform = image_transform_v2(PreprocessCfg(size=frame, **keys), is_train=False)
        hashes[name] = []
        for seed, size in enumerate(tiny.sizes_of_images()):
            image = tiny.picture(*size, seed)
            try:
                for step in transform.transforms[:-3]:
                    image = step(image)
            except ValueError:  # a side became 0
                hashes[name].append("fails")
                continue
            hashes[name].append(tiny.digest(np.asarray(image.convert("RGB")).transpose(2, 0, 1)))
            if seed == 13:
                arrays[name] = transform(tiny.picture(*size, seed)).numpy()
    pack("pixels", hashes)
    np.savez_compressed(HERE / "pixels.npz", **arrays)


if __name__ == "__main__":
    assert importlib.util.find_spec("torchvision") and open_clip.__version__ == "3.3.0"
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    write_tokenizers()
    write_merges()
    score_models()
    tokenize_captions()
    prepare_images()

"""What the benchmarks score: model folders in published shapes with random weights, and photo-like JPEGs with captions.

Speed does not depend on the weights. Everything is made on the spot, from the bundled photographs; nothing is downloaded.
"""
import csv
import json
import pathlib
import random

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = """a photo of the large small red blue old two people standing on near with dog cat horse street table food pizza
train bus beach man woman child riding holding kitchen window park water snow grass tennis ball""".split()  # noqa: SIM905
SIZES = [(640, 480)] * 5 + [(500, 375)] * 2 + [(1024, 768)] * 2 + [(2000, 1500)]
SMALL_SIZES = [(512, 384), (384, 256), (512, 512), (448, 336), (341, 256)]  # 256 to 512 px, as training sets are kept
VOCABULARY, CONTEXT = 49408, 77

CLIP_SHAPES = {  # vision: width, MLP, layers, heads, patch, side; text: width, MLP, layers, heads; projection
    "clip-b32": (768, 3072, 12, 12, 32, 224, 512, 2048, 12, 8, 512),
    "clip-l14": (1024, 4096, 24, 16, 14, 224, 768, 3072, 12, 12, 768),
    "clip-l14-336": (1024, 4096, 24, 16, 14, 336, 768, 3072, 12, 12, 768),
}


def bpe_parts():
    """Merges that make each of WORDS one token, as pairs; trained on the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def write_clip(folder, shape):
    """A CLIP model folder of the published shape: random weights, tokenizer, image settings."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    width, mlp, layers, heads, patch, side, t_width, t_mlp, t_layers, t_heads, projection = CLIP_SHAPES[shape]
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(
        projection_dim=projection,
        vision_config={"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
                       "num_attention_heads": heads, "patch_size": patch, "image_size": side},
        text_config={"hidden_size": t_width, "intermediate_size": t_mlp, "num_hidden_layers": t_layers,
                     "num_attention_heads": t_heads, "eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 2,
                     "pad_token_id": VOCABULARY - 1})).save_pretrained(folder)
    letters, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), bpe_parts()
    symbols = letters + [f"{letter}</w>" for letter in letters]
    symbols += [word for word in dict.fromkeys("".join(pair) for pair in merges) if word not in symbols]
    symbols += [f"<unused{i}>" for i in range(VOCABULARY - 2 - len(symbols))] + ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "do_convert_rgb": True}))


def write_siglip(folder):
    """SigLIP base 224 in its published shape, with a byte-fallback BPE tokenizer (as SigLIP 2's; needs no sentencepiece)."""
    import torch
    from transformers import GemmaTokenizer, SiglipConfig, SiglipModel
    torch.manual_seed(0)
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    SiglipModel(SiglipConfig(text_config=tower | {"vocab_size": 32000, "max_position_embeddings": 64},
                             vision_config=tower | {"patch_size": 16, "image_size": 224})).save_pretrained(folder)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    symbols = specials + [f"<0x{b:02X}>" for b in range(256)] + sorted({c for word in WORDS for c in word} | {"▁"})
    symbols += [f"<unused{i}>" for i in range(32000 - len(symbols))]
    GemmaTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=64).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3}))


def write_pairs(folder, count, sizes=SIZES, distinct=2000):
    """pairs.csv and images/: crops of the bundled photographs, resized and saved as JPEG.

    Beyond `distinct` images, files repeat earlier ones with other bytes behind the image's end: no two are equal.
    """
    from PIL import Image
    rng, names = random.Random(1), ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
    photos = [Image.open(ROOT / "challenge_set" / "photos" / name).convert("RGB") for name in names]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("url", "caption"))
        for i in range(count):
            words = rng.choices(WORDS, k=rng.choice([6, 8, 10, 10, 12, 12, 15, 20, 40]))
            table.writerow((f"{i:06d}.jpg", " ".join(words)))
            path = folder / "images" / f"{i:06d}.jpg"
            if i >= distinct:
                path.write_bytes((folder / "images" / f"{i % distinct:06d}.jpg").read_bytes() + i.to_bytes(8, "big"))
                continue
            photo, (wide, high) = rng.choice(photos), sizes[i % len(sizes)]
            box_w, box_h = int(photo.width * rng.uniform(0.6, 1)), int(photo.height * rng.uniform(0.6, 1))
            x, y = rng.randint(0, photo.width - box_w), rng.randint(0, photo.height - box_h)
            size = (high, wide) if rng.random() < 0.3 else (wide, high)
            photo.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + box_w, y + box_h)).save(
                path, quality=rng.choice([75, 85, 92]))


def write_model(folder):
    """The model that the folder's name stands for, unless it is there already."""
    if not (folder / "config.json").exists():
        write_siglip(folder) if folder.name == "siglip" else write_clip(folder, folder.name)

"""How fast is the script? The same pairs through three ways of scoring them, in turns, as medians and ratios.

    python tests/bench.py --out scores/bench                  # `make bench`: CPU, ViT-B/32
    python tests/bench.py --out scores/bench --gpu            # `make bench-gpu`: more models, on CUDA

(a) one pair at a time, processor then model, as model cards show it; (b) batches of 32 through the processor, as most
people write it; (c) this script with its defaults and with its fastest settings. Models have their published shapes
and random weights (speed does not depend on them), the pictures are cut from the bundled photographs: 70 % 0.3 MP,
20 % 0.8 MP, 10 % 3 MP JPEGs, with captions of 6 to 40 words. Needs nothing from the network. A rate counts from the
first pair to the last, without imports and model loading.
"""
import argparse
import csv
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = """a photo of the large small red blue old two people standing on near with dog cat horse street table food pizza
train bus beach man woman child riding holding kitchen window park water snow grass tennis ball""".split()  # noqa: SIM905
SIZES = [(640, 480)] * 5 + [(500, 375)] * 2 + [(1024, 768)] * 2 + [(2000, 1500)]
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


def write_pairs(folder, count):
    """pairs.csv and images/: crops of the bundled photographs, resized and saved as JPEG."""
    from PIL import Image
    rng, names = random.Random(1), ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")
    photos = [Image.open(ROOT / "challenge_set" / "photos" / name).convert("RGB") for name in names]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("url", "caption"))
        for i in range(count):
            photo, (wide, high) = rng.choice(photos), SIZES[i % len(SIZES)]
            box_w, box_h = int(photo.width * rng.uniform(0.6, 1)), int(photo.height * rng.uniform(0.6, 1))
            x, y = rng.randint(0, photo.width - box_w), rng.randint(0, photo.height - box_h)
            size = (high, wide) if rng.random() < 0.3 else (wide, high)
            photo.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + box_w, y + box_h)).save(
                folder / "images" / f"{i:06d}.jpg", quality=rng.choice([75, 85, 92]))
            words = rng.choices(WORDS, k=rng.choice([6, 8, 10, 10, 12, 12, 15, 20, 40]))
            table.writerow((f"{i:06d}.jpg", " ".join(words)))


def loop(work, model_name, batch, device):
    """Contenders (a) and (b): processor and model called directly, `batch` pairs at a time. Prints pairs/s."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel
    siglip = model_name.startswith("siglip")
    model = (SiglipModel if siglip else CLIPModel).from_pretrained(work / model_name).eval().to(device)
    images = AutoImageProcessor.from_pretrained(work / model_name)
    tokenizer = AutoTokenizer.from_pretrained(work / model_name)
    rows = list(csv.DictReader((work / "pairs.csv").open()))
    padding = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    started = time.perf_counter()
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch]
        pixels = images([Image.open(work / "images" / row["url"]).convert("RGB") for row in part], return_tensors="pt")
        tokens = tokenizer([row["caption"] for row in part], truncation=True, return_tensors="pt", **padding)
        with torch.no_grad():
            out = model(pixel_values=pixels["pixel_values"].to(device), input_ids=tokens["input_ids"].to(device))
            out.logits_per_image.cpu()
    print(json.dumps({"pairs_per_s": len(rows) / (time.perf_counter() - started)}))


def contender_command(work, name, model_name, device):
    """The command line of one contender; its last line on stdout is JSON with pairs_per_s."""
    if name in ("one by one", "plain batches"):
        batch = "1" if name == "one by one" else "32"
        return [sys.executable, __file__, "--loop", batch, "--out", str(work), "--model", model_name, "--device", device]
    fastest = ["--set", "decode=scaled"] if name.endswith("fastest") else []
    return [sys.executable, str(ROOT / "image_text_sim_clip.py"), "--config", str(ROOT / "config.yaml"), "--fresh",
            "--set", f"csv_path={work / 'pairs.csv'}", "--set", f"image_path={work / 'images'}",
            "--set", f"pretrained_model={work / model_name}", "--set", f"output_path={work / 'out'}",
            "--set", f"use_cuda={str(device == 'cuda').lower()}", *fastest]


def measure(work, model_name, rounds, device):
    """Contenders in turns, `rounds` times: name -> pairs/s of each round; and the profile of the script's last run."""
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in ("one by one", "plain batches", "this script", "this script, fastest"):
            done = subprocess.run(contender_command(work, name, model_name, device), check=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            rates.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1])["pairs_per_s"])
            print(f"{model_name:14} {name:22} {rates[name][-1]:9.1f} pairs/s", flush=True)
    return rates, json.loads((work / "out" / "profile.json").read_text())


def draw(results, path):
    """Bars of the medians, one group a model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(9, 1.2 + 1.4 * len(results)), layout="constrained")
    labels, values = [], []
    for model_name, result in results.items():
        for name, rates in result["pairs_per_s"].items():
            labels.append(f"{model_name}: {name}")
            values.append(statistics.median(rates))
    bars = axes.barh(labels, values, color=["tab:gray", "tab:gray", "tab:blue", "tab:blue"] * len(results))
    axes.bar_label(bars, fmt="{:,.1f}", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("pairs/s, median")
    figure.savefig(path, dpi=110)


def main():
    """Make the work, measure, print ratios, write bench.json and throughput.png into --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--loop", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        return loop(options.out, options.model, options.loop, options.device)
    names = ["clip-b32", "clip-l14", "clip-l14-336", "siglip"] if options.gpu else ["clip-b32"]
    names = [options.model] if options.model else names
    write_pairs(options.out, options.pairs)
    results = {}
    for name in names:
        if not (options.out / name / "config.json").exists():
            write_siglip(options.out / name) if name == "siglip" else write_clip(options.out / name, name)
        rates, profile = measure(options.out, name, options.rounds, "cuda" if options.gpu else "cpu")
        base = statistics.median(rates["one by one"])
        results[name] = {"pairs_per_s": rates, "profile": profile,
                         "ratio_to_one_by_one": {k: round(statistics.median(v) / base, 2) for k, v in rates.items()}}
        print(json.dumps(results[name]["ratio_to_one_by_one"]))
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    summary = {"machine": machine, "pairs": options.pairs, "models": results}
    (options.out / "bench.json").write_text(json.dumps(summary, indent=1))
    draw(results, options.out / "throughput.png")
    return None


if __name__ == "__main__":
    main()

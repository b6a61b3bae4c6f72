"""Train the bundled `shapes_clip`: a real CLIPModel of about a million parameters that knows coloured shapes.

    python challenge_set/train_shapes_clip.py                        # makes shapes_clip again: half an hour on two cores
    python challenge_set/train_shapes_clip.py --seed 1 --out judge   # a second opinion, trained from another seed

The loss is CLIP's symmetric cross-entropy over the batch (Radford et al. 2021, figure 3), with equal captions of
one batch not counted as each other's negatives.
"""
import argparse
import json
import math
import pathlib
import random
import time

import numpy as np
import torch
from draw_shapes import Scene, caption, draw, held_out_scenes, random_scene
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, CONTEXT = 64, 32
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "": ""}


def mirrored(scene: Scene) -> Scene:
    """The same image told from its other shape: 'a left of b' becomes 'b right of a'."""
    return scene._replace(things=scene.things[::-1], relation=OPPOSITE[scene.relation])


def sentence(scene: Scene, rng: random.Random) -> str:
    """A caption for training: mostly the full one, told from either shape, now and then with a detail left out."""
    text, chance = caption(mirrored(scene) if rng.random() < 0.5 else scene), rng.random()
    if chance < 0.1:
        return text.split(" on a ")[0]
    if chance < 0.2:
        return text.replace("small ", "").replace("large ", "")
    return text


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE as CLIP's: all 256 byte symbols with and without '</w>', merges for the captions' words, EOS last."""
    rng = random.Random(0)
    corpus = [caption(random_scene(rng, 1 + i % 2)) for i in range(4000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = letters + [f"{letter}</w>" for letter in letters]
    symbols += [word for word in dict.fromkeys("".join(pair) for pair in merges) if word not in symbols]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=CONTEXT)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Width 128, four vision and three text layers, patch 8 of 64 pixels, 64-dimensional embeddings."""
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    text = tower | {"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
                    "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id}
    vision = tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def batch_of(rng: random.Random, size: int, forbidden: set[str]) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pixels (size, 3, SIDE, SIDE) uint8, the captions to train with, and the full ones; held-out scenes never appear."""
    pixels, captions, full = np.empty((size, SIDE, SIDE, 3), np.uint8), [], []
    while len(full) < size:
        scene = random_scene(rng, 1 if rng.random() < 0.35 else 2)
        if caption(scene) in forbidden or caption(mirrored(scene)) in forbidden:
            continue
        pixels[len(full)] = np.asarray(draw(scene, SIDE, rng))
        full.append(caption(scene))
        captions.append(sentence(scene, rng))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), captions, full


def contrastive_loss(logits: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies of logits (n, n); equal captions are not negatives."""
    codes = torch.tensor([hash(c) for c in captions])
    twins = (codes[:, None] == codes[None, :]) & ~torch.eye(len(codes), dtype=torch.bool)
    logits = logits.masked_fill(twins, -1e4)
    target = torch.arange(len(codes))
    return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def held_out_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, normalise, seed: int = 7) -> float:
    """Share of the held-out scenes, drawn anew, whose own caption is the most similar of all 200."""
    rng, scenes = random.Random(seed), held_out_scenes()
    pixels = torch.from_numpy(np.stack([np.asarray(draw(s, SIDE, rng)) for s in scenes])).permute(0, 3, 1, 2)
    tokens = tokenizer([caption(s) for s in scenes], padding=True, return_tensors="pt")
    with torch.inference_mode():
        best = model(pixel_values=normalise(pixels), **tokens).logits_per_image.argmax(1)
    return (best == torch.arange(len(scenes))).float().mean().item()


def train(seed: int, steps: int, batch: int, peak_rate: float, out: pathlib.Path) -> None:
    """Train from `seed` and write model, tokenizer and image settings to `out` in the Hugging Face layout."""
    torch.manual_seed(seed)
    rng, forbidden = random.Random(seed), {caption(s) for s in held_out_scenes()}
    tokenizer = build_tokenizer()
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))

    def normalise(pixels: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        return (pixels / 255 + noise * torch.randn(len(pixels), 1, 1, 1) * torch.randn(pixels.shape) - mean) / std

    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps)))
    started = time.monotonic()
    for step in range(steps):
        pixels, captions, full = batch_of(rng, batch, forbidden)
        output = model(pixel_values=normalise(pixels, 0.03), **tokenizer(captions, padding=True, return_tensors="pt"))
        loss = contrastive_loss(output.logits_per_image, full)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP's training does
        if step % 100 == 99:
            accuracy = held_out_accuracy(model, tokenizer, normalise)
            print(f"step {step + 1}  loss {loss.item():.3f}  held-out top-1 {accuracy:.1%}  "
                  f"{time.monotonic() - started:.0f} s", flush=True)
    model.save_pretrained(out)
    CLIPProcessor(images, tokenizer).save_pretrained(out)


if __name__ == "__main__":
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--out", type=pathlib.Path, default=here / "shapes_clip")
    options = parser.parse_args()
    train(options.seed, options.steps, options.batch, options.rate, options.out)

"""Show, on one core and within an hour, that dissimilarity teaches: images before and after, two scorers, three seeds.

    python examples/demonstrate_finetuning.py            # everything into scores/training/, the image into readme_imgs/

What it does, each step in a folder of its own; what is there already is not made again:

    judge/       a second shapes model, trained like the bundled one but from another seed: it watches and never trains
    pipeline/    a tiny text-to-image pipeline, trained on drawings (train_shapes_pipeline.py)
    seed-N/      that pipeline fine-tuned with the bundled shapes_clip as teacher (finetune_text_to_image.py)
    plain/       seed 0 again, with the teacher looking at the images as they are: no random windows, no grain
    results.json, and readme_imgs/finetuned.png: the same prompts from the same noise, before and after

The prompts that are scored are the captions of the bundled drawings of one large shape; nothing here trains on them, nor
did teacher or judge.
"""
import argparse
import csv
import json
import os
import pathlib
import random
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "challenge_set")]
import torch  # noqa: E402
from draw_shapes import (  # noqa: E402 - lies in challenge_set
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw,
    held_out_scenes,
)
from finetune_text_to_image import read_prompts, vary  # noqa: E402 - lies beside this file
from PIL import Image, ImageDraw  # noqa: E402

from addons.loss import DissimilarityLoss  # noqa: E402
from image_text_sim_clip import Config, Scorer, say  # noqa: E402

SEEDS = (0, 1, 2)
TEACHER = "challenge_set/shapes_clip"
FREE_CAPTION = "a large red circle on a grey background"
FINETUNING = ["--steps", "320", "--batch", "8", "--denoising-steps", "10", "--gradient-steps", "2", "--guidance", "2",
              "--learning-rate", "1e-3", "--images-per-prompt", "2", "--evaluate-every", "80", "--save-every", "20",
              "--lora-targets",  # attention alone is too little of so small a UNet
              "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"]
VARIED = ["--crop", "0.8", "--noise", "0.1"]
UNVARIED = ["--crop", "1", "--noise", "0"]


def run(*command: object) -> None:
    """Run one of the other programs with this Python, in the repository's root; its failure ends this one too.

    On one thread: sums are then taken in the same order on any number of cores, and the README's numbers come out again.
    """
    say("$ python " + " ".join(map(str, command)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if code := subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment).returncode:  # noqa: S603 - ours
        sys.exit(code)


def large_shapes() -> list[Scene]:
    """Every scene of one large shape."""
    return [Scene((Thing("large", colour, shape),), "", ground) for colour in sorted(COLOURS) for shape in SHAPES
            for ground in sorted(BACKGROUNDS)]


def write_inputs(out: pathlib.Path) -> None:
    """prompts.csv and held_out.csv, and the two scorers' configs."""
    known = {caption(scene) for scene in held_out_scenes()}
    captions = [caption(scene) for scene in large_shapes()]
    tables = {"prompts": [c for c in captions if c not in known], "held_out": [c for c in captions if c in known]}
    for name, chosen in tables.items():
        with open(out / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["caption"], *([c] for c in chosen)])
    for name, model in (("teacher", TEACHER), ("judge", out / "judge")):
        (out / f"{name}.yaml").write_text(f"pretrained_model: {model}\nuse_cuda: false\n", encoding="utf-8")


def real_drawings(scorers: dict[str, Scorer], side: int) -> dict[str, float]:
    """Each scorer's mean dissimilarity of real drawings of the held-out scenes at this size: what there is to reach."""
    rng, known = random.Random(0), {caption(scene) for scene in held_out_scenes()}  # noqa: S311 - repeatable numbers
    scenes = [scene for scene in large_shapes() if caption(scene) in known] * 4
    images = [draw(scene, side, rng, 4) for scene in scenes]
    return {name: round(float(1 - scorer.similarity(images, map(caption, scenes)).mean()), 4)
            for name, scorer in scorers.items()}


def optimise_free_image(loss: DissimilarityLoss, crop: float, noise: float, steps: int = 200) -> list[Image.Image]:
    """The first and the last of 64 x 64 free pixels that start as faint noise on grey and follow the loss alone."""
    generator = torch.Generator().manual_seed(0)
    pixels = (0.5 + 0.05 * torch.randn(1, 3, 64, 64, generator=generator)).requires_grad_()
    optimiser, images = torch.optim.Adam([pixels], lr=0.03), []
    for step in range(steps + 1):
        if step in (0, steps):
            levels = (pixels.detach().clamp(0, 1)[0] * 255).round().byte()
            images.append(Image.fromarray(levels.permute(1, 2, 0).numpy()))
        views = vary(pixels.clamp(0, 1).expand(8, -1, -1, -1), crop, noise, generator)
        optimiser.zero_grad()
        loss(views, [FREE_CAPTION] * 8).backward()
        optimiser.step()
    return images


def measure_free_images(scorers: dict[str, Scorer]) -> tuple[dict[str, dict], list[Image.Image]]:
    """Both scorers' similarity of free images and of real drawings with the caption, and the images."""
    rng = random.Random(0)  # noqa: S311
    scene = Scene((Thing("large", "red", "circle"),), "", "grey")
    real = [draw(scene, 64, rng, 4) for _ in range(20)]
    loss = DissimilarityLoss(Config(pretrained_model=TEACHER, use_cuda=False))
    start, varied = optimise_free_image(loss, 0.6, 0.1)
    _, unvaried = optimise_free_image(loss, 1, 0)
    kinds = {"start": [start], "unvaried": [unvaried], "varied": [varied], "real": real}
    return {kind: {name: round(float(scorer.similarity(images, [FREE_CAPTION] * len(images)).mean()), 4)
                   for name, scorer in scorers.items()} for kind, images in kinds.items()}, [start, unvaried, varied, real[0]]


def cut_cell(grid: Image.Image, number: int, side: int, columns: int = 8) -> Image.Image:
    """Image `number` of one of the fine-tuning's grids."""
    left, top = number % columns * (side + 2), number // columns * (side + 2)
    return grid.crop((left, top, left + side, top + side))


def draw_comparison(out: pathlib.Path, target: pathlib.Path, side: int, zoom: int = 3) -> None:
    """Every third held-out prompt, a column each; a pair of rows for each seed, before and after."""
    rows = [(f"seed {seed}, {when}", out / f"seed-{seed}" / f"{when}.png") for seed in SEEDS for when in ("before", "after")]
    prompts, cells = read_prompts(out / "held_out.csv", "caption"), range(0, 24, 3)
    step, margin, head = side * zoom + 6, 110, 36
    sheet = Image.new("RGB", (margin + len(cells) * step, head + len(rows) * step + 8 * len(SEEDS)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, cell in enumerate(cells):
        thing, ground = prompts[cell].removeprefix("a large ").removesuffix(" background").split(" on a ")
        pen.text((margin + column * step, 4), f"{thing}\non {ground}", fill="black")
    for number, (name, path) in enumerate(rows):
        top, grid = head + number * step + 8 * (number // 2), Image.open(path).convert("RGB")
        pen.text((4, top + step // 2 - 8), name, fill="black")
        for column, cell in enumerate(cells):
            image = cut_cell(grid, cell, side).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * step, top))
    sheet.save(target, optimize=True)


def main() -> None:
    """Make what is missing, measure, and write results.json and the image."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores/training"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "judge/model.safetensors").exists():
        run("challenge_set/train_shapes_clip.py", "--seed", 1, "--steps", 800, "--batch", 192, "--out", out / "judge")
    if not (out / "pipeline/model_index.json").exists():
        run("examples/train_shapes_pipeline.py", "--out", out / "pipeline")
    write_inputs(out)
    common = ["--model", out / "pipeline", "--prompts", out / "prompts.csv", "--held-out", out / "held_out.csv",
              "--teacher", out / "teacher.yaml", "--judge", out / "judge.yaml", "--cpu", *FINETUNING]
    for seed in SEEDS:
        run("examples/finetune_text_to_image.py", *common, *VARIED, "--seed", seed, "--output", out / f"seed-{seed}")
    run("examples/finetune_text_to_image.py", *common, *UNVARIED, "--seed", 0, "--output", out / "plain")
    scorers = {name: Scorer(Config(pretrained_model=str(path), use_cuda=False))
               for name, path in (("teacher", TEACHER), ("judge", out / "judge"))}
    side = json.loads((out / "pipeline/unet/config.json").read_text())["sample_size"]
    free, images = measure_free_images(scorers)
    results = {"real drawings": real_drawings(scorers, side), "free image": free}
    for name in (*(f"seed-{seed}" for seed in SEEDS), "plain"):
        looks = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines() if "teacher" in line]
        results[name] = {str(row["step"]): {k: round(sum(row[k]) / len(row[k]), 4) for k in scorers} for row in looks}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for image, name in zip(images, ("start", "unvaried", "varied", "real"), strict=True):
        image.save(out / f"free-{name}.png")
    draw_comparison(out, ROOT / "readme_imgs/finetuned.png", side)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

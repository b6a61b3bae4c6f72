"""Show, on one core and within an hour, that dissimilarity teaches: images before and after, two scorers, three seeds.

    python examples/demonstrate_finetuning.py                # everything into scores/training/, the image into readme_imgs/
    python examples/demonstrate_finetuning.py --kind flow    # the same for a pipeline of flow matching, and two teachers

What it does, each step in a folder of its own; what is there already is not made again:

    judge/       a second shapes model, trained like the bundled one but from another seed: it watches and never trains
    pipeline/    a tiny text-to-image pipeline, trained on drawings (train_shapes_pipeline.py)
    seed-N/      that pipeline fine-tuned with the bundled shapes_clip as teacher (finetune_text_to_image.py)
    plain/       seed 0 again, with the teacher looking at the images as they are: no random windows, no grain
    results.json, and readme_imgs/finetuned.png: the same prompts from the same noise, before and after

With --kind flow, in flow/: pipeline/ (StableDiffusion3Pipeline), seed-N/, second/ (a third shapes model), two-N/ (fine-tuned
with both it and the bundled one as teachers), results.json, and readme_imgs/finetuned-flow.png. Of both sets of runs it reports
the judge's value where the first teacher's is the same: what the second teacher is good for.

The prompts that are scored are the captions of the bundled drawings of one large shape; nothing here trains on them, nor
did teacher or judge.
"""
import argparse
import csv
import itertools
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
FLOW_FINETUNING = [*FINETUNING[:FINETUNING.index("--lora-targets")], "--text-tokens", "1", "--lora-targets",
                   "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_v_proj",
                   "ff.net.0.proj", "ff.net.2", "norm1.linear"]
VARIED = ["--crop", "0.8", "--noise", "0.1"]
UNVARIED = ["--crop", "1", "--noise", "0"]
# flow matching learns these drawings so fast that after 900 steps the teacher finds 0.17, and in real drawings 0.13: few
# steps leave it something to teach
PIPELINE_STEPS = {"noise": 3000, "flow": 200}


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
    kinds = itertools.product(sorted(COLOURS), SHAPES, sorted(BACKGROUNDS))
    return [Scene((Thing("large", colour, shape),), "", ground) for colour, shape, ground in kinds]


def write_inputs(out: pathlib.Path) -> None:
    """prompts.csv and held_out.csv, and the two scorers' configs."""
    known = {caption(scene) for scene in held_out_scenes()}
    captions = [caption(scene) for scene in large_shapes()]
    tables = {"prompts": [c for c in captions if c not in known], "held_out": [c for c in captions if c in known]}
    for name, chosen in tables.items():
        with open(out / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["caption"], *([c] for c in chosen)])
    for name, model in (("teacher", TEACHER), ("judge", out / "judge"), ("second", out / "flow/second")):
        (out / f"{name}.yaml").write_text(f"pretrained_model: {model}\nuse_cuda: false\n", encoding="utf-8")


def real_drawings(scorers: dict[str, Scorer], side: int) -> dict[str, float]:
    """Each scorer's mean dissimilarity of real drawings of the held-out scenes at this size: what there is to reach."""
    rng = random.Random(0)  # noqa: S311 - repeatable numbers
    known = {caption(scene) for scene in held_out_scenes()}
    scenes = [scene for scene in large_shapes() if caption(scene) in known] * 4
    images = [draw(scene, side, rng, 4) for scene in scenes]
    return {name: round(float(1 - scorer.similarity(images, map(caption, scenes)).mean()), 4)
            for name, scorer in scorers.items()}


def optimise_free_image(loss: DissimilarityLoss, crop: float, noise: float, steps: int = 200) -> list[Image.Image]:
    """The first and the last of 64 x 64 free pixels that start as faint noise on grey and follow the loss alone."""
    generator = torch.Generator().manual_seed(0)
    pixels = (0.5 + 0.05 * torch.randn(1, 3, 64, 64, generator=generator)).requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=0.03)
    images = []
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
    left = number % columns * (side + 2)
    top = number // columns * (side + 2)
    return grid.crop((left, top, left + side, top + side))


def draw_comparison(out: pathlib.Path, held_out: pathlib.Path, target: pathlib.Path, side: int, zoom: int = 3) -> None:
    """Every third held-out prompt, a column each; a pair of rows for each seed, before and after."""
    rows = [(f"seed {seed}, {when}", out / f"seed-{seed}" / f"{when}.png")
            for seed, when in itertools.product(SEEDS, ("before", "after"))]
    prompts = read_prompts(held_out, "caption")
    cells = range(0, 24, 3)
    step = side * zoom + 6
    margin = 110
    head = 36
    sheet = Image.new("RGB", (margin + len(cells) * step, head + len(rows) * step + 8 * len(SEEDS)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, cell in enumerate(cells):
        thing, ground = prompts[cell].removeprefix("a large ").removesuffix(" background").split(" on a ")
        pen.text((margin + column * step, 4), f"{thing}\non {ground}", fill="black")
    for number, (name, path) in enumerate(rows):
        top = head + number * step + 8 * (number // 2)
        grid = Image.open(path).convert("RGB")
        pen.text((4, top + step // 2 - 8), name, fill="black")
        for column, cell in enumerate(cells):
            image = cut_cell(grid, cell, side).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * step, top))
    sheet.save(target, optimize=True)


def train_scorer(folder: pathlib.Path, seed: int) -> None:
    """A shapes model like the bundled one, from another seed; unless it is there."""
    if not (folder / "model.safetensors").exists():
        run("challenge_set/train_shapes_clip.py", "--seed", seed, "--steps", 800, "--batch", 192, "--out", folder)


def mean_looks(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Each scorer's mean at each look of a run, by the step."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("teacher", "teacher_1", "teacher_2", "judge")
    return {str(row["step"]): {name: round(sum(row[name]) / len(row[name]), 4) for name in names if name in row}
            for row in rows if "teacher" in row}


def judge_at(level: float, looks: dict[str, dict[str, float]]) -> float:
    """The judge's mean where the first teacher's first falls to `level`, on the line between two looks."""
    previous: dict[str, float] | None = None
    for look in looks.values():
        teacher = look.get("teacher_1", look["teacher"])
        if teacher <= level:
            if previous is None:
                return look["judge"]
            before = previous.get("teacher_1", previous["teacher"])
            share = (before - level) / (before - teacher) if before > teacher else 1.0
            return round(previous["judge"] + share * (look["judge"] - previous["judge"]), 4)
        previous = look
    raise ValueError(f"the teacher never reaches {level}")


def compare_at_same_teacher(one: dict[str, dict[str, float]], two: dict[str, dict[str, float]]) -> dict[str, float]:
    """The judge with one teacher and with two, at the lowest value of the first teacher that both runs reach."""
    level = max(min(look.get("teacher_1", look["teacher"]) for look in looks.values()) for looks in (one, two))
    return {"first teacher": level, "judge, one teacher": judge_at(level, one), "judge, two teachers": judge_at(level, two)}


def demonstrate_noise(out: pathlib.Path, common: list[object], side: int) -> None:
    """Today's pipeline: one teacher, three seeds, and one run whose teacher sees images as they are."""
    for seed in SEEDS:
        run("examples/finetune_text_to_image.py", *common, *VARIED, "--seed", seed, "--output", out / f"seed-{seed}")
    run("examples/finetune_text_to_image.py", *common, *UNVARIED, "--seed", 0, "--output", out / "plain")
    scorers = {name: Scorer(Config(pretrained_model=str(path), use_cuda=False))
               for name, path in (("teacher", TEACHER), ("judge", out / "judge"))}
    free, images = measure_free_images(scorers)
    results = {"real drawings": real_drawings(scorers, side), "free image": free}
    for name in (*(f"seed-{seed}" for seed in SEEDS), "plain"):
        results[name] = mean_looks(out / name)
    for image, name in zip(images, ("start", "unvaried", "varied", "real"), strict=True):
        image.save(out / f"free-{name}.png")
    finish(out, out / "held_out.csv", results, "finetuned.png", side)


def demonstrate_flow(out: pathlib.Path, common: list[object], side: int) -> None:
    """A pipeline of flow matching: one teacher and two, three seeds each, and the judge at the same teacher's value."""
    train_scorer(out / "flow/second", 2)
    results: dict[str, dict] = {}
    both = ["--teacher", out / "teacher.yaml", out / "second.yaml"]  # argparse takes the last of two
    for seed in SEEDS:
        for name, teachers in ((f"seed-{seed}", []), (f"two-{seed}", both)):
            run("examples/finetune_text_to_image.py", *common, *VARIED, *teachers, "--seed", seed,
                "--output", out / "flow" / name)
            results[name] = mean_looks(out / "flow" / name)
        results[f"same-teacher-{seed}"] = compare_at_same_teacher(results[f"seed-{seed}"], results[f"two-{seed}"])
    finish(out / "flow", out / "held_out.csv", results, "finetuned-flow.png", side)


def finish(folder: pathlib.Path, held_out: pathlib.Path, results: dict[str, dict], image_name: str, side: int) -> None:
    """Write results.json and the comparison, and print the results."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw_comparison(folder, held_out, ROOT / "readme_imgs" / image_name, side)
    print(json.dumps(results))


def main() -> None:
    """Make what is missing, measure, and write results.json and the image."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores/training"))
    parser.add_argument("--kind", choices=("noise", "flow"), default="noise")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    train_scorer(out / "judge", 1)
    folder = out if options.kind == "noise" else out / "flow"
    if not (folder / "pipeline/model_index.json").exists():
        run("examples/train_shapes_pipeline.py", "--kind", options.kind, "--steps", PIPELINE_STEPS[options.kind],
            "--out", folder / "pipeline")
    write_inputs(out)
    part = "unet" if options.kind == "noise" else "transformer"
    side = json.loads((folder / "pipeline" / part / "config.json").read_text())["sample_size"]
    common: list[object] = ["--model", folder / "pipeline", "--prompts", out / "prompts.csv",
                            "--held-out", out / "held_out.csv", "--teacher", out / "teacher.yaml",
                            "--judge", out / "judge.yaml", "--cpu"]
    if options.kind == "noise":
        demonstrate_noise(out, [*common, *FINETUNING], side)
    else:
        demonstrate_flow(out, [*common, *FLOW_FINETUNING], side)


if __name__ == "__main__":
    main()

"""Show, on two cores and within an hour, that dissimilarity teaches: images before and after, two scorers, three seeds.

    python examples/demonstrate_finetuning.py                # everything into scores/training/, the image into readme_imgs/
    python examples/demonstrate_finetuning.py --kind flow    # the same for a pipeline of flow matching, and two teachers
    python examples/demonstrate_finetuning.py --list         # what it consists of, and what is done
    python examples/demonstrate_finetuning.py --only judge   # one step, or several, by name

What it does, each step in a folder of its own; what is there already is not made again, and a fine-tuning that was stopped
goes on where it was:

    judge        a second shapes model, trained like the bundled one but from another seed: it watches and never trains
    pipeline     a tiny text-to-image pipeline, trained on drawings (train_shapes_pipeline.py)
    seed-N       that pipeline fine-tuned with the bundled shapes_clip as teacher (finetune_text_to_image.py)
    plain        seed 0 again, with the teacher looking at the images as they are: no random windows, no grain
    results.json, and readme_imgs/finetuned.png: the same prompts from the same noise, before and after

With --kind flow, in flow/: pipeline (StableDiffusion3Pipeline), seed-N, second (a third shapes model), two-N (fine-tuned
with both it and the bundled one as teachers), near-N and norm-N (held near the base model), results.json, and
readme_imgs/finetuned-flow.png. It reports the judge's value where the first teacher's is the same as with that teacher alone:
what the second teacher, and staying near, are good for.

The prompts that are scored are the captions of the bundled drawings of one large shape; nothing here trains on them, nor
did teacher or judge.
"""
import argparse
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "challenge_set")]
import numpy as np  # noqa: E402
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
from PIL import Image, ImageDraw  # noqa: E402

from addons.loss import DissimilarityLoss  # noqa: E402
from examples.painter import vary  # noqa: E402
from examples.training_data import read_prompts  # noqa: E402
from image_text_sim_clip import EXIT_CONFIG, EXIT_FAILURES, Config, Scorer, Trouble, say  # noqa: E402

SEEDS = (0, 1, 2)
TEACHER = "challenge_set/shapes_clip"
SCORERS = ("teacher", "teacher_1", "teacher_2", "judge")  # as a run's log calls them
FREE_CAPTION = "a large red circle on a grey background"
COMMON = ["--cpu", "--batch", "8", "--gradient-steps", "2", "--guidance", "2", "--learning-rate", "1e-3",
          "--images-per-prompt", "2", "--save-every", "20"]
OF_NOISE = ["--steps", "320", "--denoising-steps", "10", "--evaluate-every", "80",
            "--lora-targets",  # attention alone is too little of so small a UNet
            "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"]
OF_FLOW = ["--steps", "160", "--denoising-steps", "6", "--evaluate-every", "20", "--text-tokens", "1",
           "--lora-targets", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_v_proj",
           "ff.net.0.proj", "ff.net.2", "norm1.linear"]
VARIED = ["--crop", "0.8", "--noise", "0.1"]
UNVARIED = ["--crop", "1", "--noise", "0"]
# flow matching learns these drawings fast: after 300 steps the teacher finds 0.93, after 1,000 it finds 0.29
SHOWN = {"noise": range(0, 24, 3), "flow": (0, 4, 8, 12, 14, 17, 18, 22)}  # of the held-out prompts, in the README's images
PIPELINE_STEPS = {"noise": 3000, "flow": 500}

Results = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One program to run. Its `result` is written last, so where it is there, the step is done."""

    name: str
    command: Sequence[object]
    result: pathlib.Path
    needs: tuple[str, ...] = ()

    def run(self) -> None:
        """Run it with this Python, in the repository's root; raises Trouble (exit 4) where it fails.

        On one thread: sums are then taken in the same order on any number of cores, and the README's numbers come out again.
        """
        if self.result.exists():
            return
        say("$ python " + " ".join(map(str, self.command)))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *map(str, self.command)], cwd=ROOT, env=environment)  # noqa: S603 - ours
        if done.returncode:
            raise Trouble(EXIT_FAILURES, f"the step {self.name} failed with exit code {done.returncode}")


def scorer_step(name: str, folder: pathlib.Path, seed: int, steps: int) -> Step:
    """A shapes model like the bundled one, from another seed, and trained for less long."""
    command = ["challenge_set/train_shapes_clip.py", "--seed", seed, "--steps", steps, "--batch", 192, "--out", folder]
    return Step(name, command, folder / "processor_config.json")


def list_steps(out: pathlib.Path, kind: str) -> list[Step]:
    """All steps of a kind, in an order in which they can be done."""
    folder = folder_of(out, kind)
    pipeline = Step("pipeline", ["examples/train_shapes_pipeline.py", "--kind", kind, "--steps", PIPELINE_STEPS[kind],
                                 "--out", folder / "pipeline"], folder / "pipeline/trained.json")
    common = ["examples/finetune_text_to_image.py", "--model", folder / "pipeline", "--prompts", out / "prompts.csv",
              "--held-out", out / "held_out.csv", "--judge", out / "judge.yaml", *COMMON,
              *(OF_NOISE if kind == "noise" else OF_FLOW)]

    def tuning(name: str, seed: int, views: list[str], others: tuple[str, ...] = ()) -> Step:
        teachers = [out / f"{teacher}.yaml" for teacher in ("teacher", *others)]
        target = folder / name
        return Step(name, [*common, *views, "--teacher", *teachers, "--seed", seed, "--output", target],
                    target / "report.html", ("judge", "pipeline", *others))
    steps = [scorer_step("judge", out / "judge", 1, 800), pipeline]
    if kind == "noise":
        return [*steps, *(tuning(f"seed-{seed}", seed, VARIED) for seed in SEEDS), tuning("plain", 0, UNVARIED)]
    steps.append(scorer_step("second", folder / "second", 2, 400))
    for seed in SEEDS:
        steps += [tuning(f"seed-{seed}", seed, VARIED), tuning(f"two-{seed}", seed, VARIED, ("second",)),
                  tuning(f"near-{seed}", seed, [*VARIED, "--stay-near", "0.3"]),
                  tuning(f"norm-{seed}", seed, [*VARIED, "--hold-norm", "10"])]
    return steps


def folder_of(out: pathlib.Path, kind: str) -> pathlib.Path:
    """Where a kind's steps lie; the judge lies in `out` itself."""
    return out if kind == "noise" else out / "flow"


def carry_out(steps: list[Step], chosen: list[str], jobs: int) -> None:
    """Do the steps that are chosen, or all without a choice, `jobs` at a time; raises Trouble (exit 2) for an unknown name
    and for one that needs what is not there."""
    by_name = {step.name: step for step in steps}
    for name in chosen:
        if name not in by_name:
            raise Trouble(EXIT_CONFIG, f"there is no step {name!r}: --only takes {', '.join(by_name)}")
    wanted = [step for step in steps if not chosen or step.name in chosen]
    names = {step.name for step in wanted}
    for step in wanted:
        for need in step.needs:
            if need not in names and not by_name[need].result.exists():
                raise Trouble(EXIT_CONFIG, f"the step {step.name} needs {need}, which is not there: choose it as well")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Step.run, [step for step in wanted if not step.needs]))
        list(pool.map(Step.run, [step for step in wanted if step.needs]))


# ── What is asked, and of whom ────────────────────────────────────────────────────────────────────────────────────────

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


def measure_free_images(scorers: dict[str, Scorer]) -> tuple[Results, list[Image.Image]]:
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


def grids_of(folder: pathlib.Path, kind: str) -> list[list[tuple[str, pathlib.Path]]]:
    """For each seed what is shown of it: names of rows, and the grids that they are cut from."""
    groups = []
    for seed in SEEDS:
        one = folder / f"seed-{seed}"
        rows = [(f"seed {seed}, before", one / "before.png")]
        if kind == "noise":
            rows.append((f"seed {seed}, after", one / "after.png"))
        else:
            rows += [("one teacher", one / "after.png"), ("two teachers", folder / f"two-{seed}" / "after.png"),
                     ("one, norm held", folder / f"norm-{seed}" / "after.png")]
        groups.append(rows)
    return groups


def draw_comparison(groups: list[list[tuple[str, pathlib.Path]]], held_out: pathlib.Path, cells: Sequence[int],
                    target: pathlib.Path, side: int, zoom: int = 3) -> None:
    """Some of the held-out prompts, a column each; a group of rows for each seed."""
    rows = list(itertools.chain.from_iterable(groups))
    prompts = read_prompts(held_out, "caption")
    step = side * zoom + 6
    margin = 110
    head = 36
    sheet = Image.new("RGB", (margin + len(cells) * step, head + len(rows) * step + 8 * len(groups)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, cell in enumerate(cells):
        thing, ground = prompts[cell].removeprefix("a large ").removesuffix(" background").split(" on a ")
        pen.text((margin + column * step, 4), f"{thing}\non {ground}", fill="black")
    for number, (name, path) in enumerate(rows):
        top = head + number * step + 8 * (number // len(groups[0]))
        grid = Image.open(path).convert("RGB")
        pen.text((4, top + step // 2 - 8), name, fill="black")
        for column, cell in enumerate(cells):
            image = cut_cell(grid, cell, side).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * step, top))
    sheet.save(target, optimize=True)


# ── What came of it ───────────────────────────────────────────────────────────────────────────────────────────────────

def read_looks(folder: pathlib.Path) -> list[dict[str, list[float]]]:
    """The looks of a run at the held-out prompts, oldest first: each scorer's numbers, and the step."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "teacher" in row]


def shares_of_better(folder: pathlib.Path) -> dict[str, float]:
    """The share of a run's images that each scorer finds better after than before."""
    looks = read_looks(folder)
    first = looks[0]
    last = looks[-1]
    return {name: round(sum(new < old for old, new in zip(first[name], last[name], strict=True)) / len(last[name]), 4)
            for name in SCORERS if name in last}


def mean_looks(folder: pathlib.Path) -> Results:
    """Each scorer's mean at each look of a run, by the step."""
    return {str(row["step"]): {name: round(sum(row[name]) / len(row[name]), 4) for name in SCORERS if name in row}
            for row in read_looks(folder)}


def judge_at(level: float, looks: Results) -> float:
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


def compare_at_same_teacher(one: Results, other: Results) -> dict[str, float]:
    """The judge after one run and after another, at the lowest value of the first teacher that both reach."""
    level = max(min(look.get("teacher_1", look["teacher"]) for look in looks.values()) for looks in (one, other))
    return {"first teacher": level, "judge": judge_at(level, one), "judge of the other": judge_at(level, other)}


def colour_of_grounds(grid: pathlib.Path, prompts: list[str], ground: str, side: int) -> list[int]:
    """The mean colour, levels of 255, of the margins (a fifth of the side) of the images that were asked for on a ground."""
    margin = side // 5
    outside = np.ones((side, side), bool)
    outside[margin:-margin, margin:-margin] = False
    with Image.open(grid) as opened:
        sheet = opened.convert("RGB")
    pixels = [np.asarray(cut_cell(sheet, number, side))[outside] for number, prompt in enumerate(prompts)
              if prompt.endswith(f"on a {ground} background")]
    return [round(float(level)) for level in np.concatenate(pixels).mean(axis=0)]


def load_scorers(paths: dict[str, str | pathlib.Path]) -> dict[str, Scorer]:
    """The scorers, by name."""
    return {name: Scorer(Config(pretrained_model=str(path), use_cuda=False)) for name, path in paths.items()}


def sum_up_noise(out: pathlib.Path, side: int) -> dict[str, object]:
    """Today's pipeline: one teacher, three seeds, one run whose teacher sees images as they are, and free pixels."""
    scorers = load_scorers({"teacher": TEACHER, "judge": out / "judge"})
    free, images = measure_free_images(scorers)
    for image, name in zip(images, ("start", "unvaried", "varied", "real"), strict=True):
        image.save(out / f"free-{name}.png")
    runs = [*(f"seed-{seed}" for seed in SEEDS), "plain"]
    return {"real drawings": real_drawings(scorers, side), "free image": free,
            "better": {name: shares_of_better(out / name) for name in runs}, **{name: mean_looks(out / name) for name in runs}}


def sum_up_flow(out: pathlib.Path, side: int) -> dict[str, object]:
    """A pipeline of flow matching: one teacher and two, three seeds each, and the judge at the same teacher's value."""
    folder = folder_of(out, "flow")
    scorers = load_scorers({"teacher": TEACHER, "second": folder / "second", "judge": out / "judge"})
    results: dict[str, object] = {"real drawings": real_drawings(scorers, side)}
    prompts = read_prompts(out / "held_out.csv", "caption") * 2  # two images of each
    for seed in SEEDS:
        one = mean_looks(folder / f"seed-{seed}")
        results[f"seed-{seed}"] = one
        for name in ("two", "near", "norm"):
            other = mean_looks(folder / f"{name}-{seed}")
            results[f"{name}-{seed}"] = other
            results[f"seed-{seed} and {name}-{seed} at the same teacher"] = compare_at_same_teacher(one, other)
    runs = [f"{name}-{seed}" for name, seed in itertools.product(("seed", "two", "near", "norm"), SEEDS)]
    greys = {"before": colour_of_grounds(folder / "seed-0/before.png", prompts, "grey", side)}
    greys |= {name: colour_of_grounds(folder / name / "after.png", prompts, "grey", side) for name in runs}
    return results | {"better": {name: shares_of_better(folder / name) for name in runs}, "grey grounds": greys}


def sum_up(out: pathlib.Path, kind: str) -> dict[str, object]:
    """Measure what was made; write results.json and the image of the README."""
    folder = folder_of(out, kind)
    part = "unet" if kind == "noise" else "transformer"
    side = json.loads((folder / "pipeline" / part / "config.json").read_text(encoding="utf-8"))["sample_size"]
    results = sum_up_noise(out, side) if kind == "noise" else sum_up_flow(out, side)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    image = "finetuned.png" if kind == "noise" else "finetuned-flow.png"
    draw_comparison(grids_of(folder, kind), out / "held_out.csv", SHOWN[kind], ROOT / "readme_imgs" / image, side)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing; then, unless only some steps were asked for, write results.json and the image."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scores/training"))
    parser.add_argument("--kind", choices=("noise", "flow"), default="noise", help="how the pipeline was trained")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="do these steps alone")
    parser.add_argument("--jobs", type=int, default=2, help="steps at a time; each takes one core")
    parser.add_argument("--list", action="store_true", help="list the steps, and whether they are done")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    steps = list_steps(out, options.kind)
    if options.list:
        for step in steps:
            print(f"{step.name}\t{'done' if step.result.exists() else 'to do'}")
        return 0
    folder_of(out, options.kind).mkdir(parents=True, exist_ok=True)
    write_inputs(out)
    carry_out(steps, options.only, max(1, options.jobs))
    if options.only:
        return 0
    print(json.dumps(sum_up(out, options.kind)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Trouble as trouble:
        say(f"error: {trouble}")
        sys.exit(trouble.exit_code)

"""Looks at the held-out prompts: painted from the same noise each time, scored as saved files would be, and kept in a log."""
import dataclasses
import json
import math
import pathlib

import torch
from PIL import Image

from examples.painter import Painter
from examples.teachers import Teachers
from image_text_sim_clip import EXIT_FAILURES, Json, Scorer, Trouble, atomic_file, output_disk

GRID_COLUMNS = 8
GRID_IMAGES = 64  # as many as held-out prompts are chosen
GRID_CELL_PX = 384


class Diverged(Trouble):
    """The training has led to numbers that are not finite (exit 4); what was saved before is better than what there is now."""


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise Diverged unless all `values` are finite: as bytes they would be black, and get a score."""
    if not torch.isfinite(values.detach()).all():
        raise Diverged(EXIT_FAILURES, f"{what} is not finite; try a lower --learning-rate (what was saved before stays)")


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at the held-out prompts found: the images, each scorer's dissimilarities, how diverse they are."""

    images: list[Image.Image]
    scores: dict[str, list[float]]
    diversity: float | None  # None where there is but one image of each prompt

    def for_log(self) -> Json:
        """As log.jsonl has it."""
        return {**self.scores} | ({} if self.diversity is None else {"diversity": round(self.diversity, 6)})


class Watch:
    """Paints the held-out prompts, always from the same noise, and asks teachers and judge.

    Scores are called teacher (with several teachers their mean by weight, and teacher_1, teacher_2, ... each) and judge.
    """

    def __init__(self, painter: Painter, teachers: Teachers, judge: Scorer | None, prompts: list[str], repeats: int,
                 batch: int, seed: int) -> None:
        self.painter = painter
        self.teachers = teachers
        self.judge = judge
        self.prompts = prompts * repeats
        self.repeats = repeats
        self.batch = batch
        self.seed = seed
        self.names = ["teacher", *(["judge"] if judge else [])]

    def look(self) -> Look:
        """Paint and score."""
        noise = self.painter.noise(len(self.prompts), torch.Generator().manual_seed(self.seed))
        images: list[Image.Image] = []
        for start in range(0, len(self.prompts), self.batch):
            part = slice(start, start + self.batch)
            painted = self.painter.paint(self.prompts[part], noise[part]).images
            check_finite(painted, "an image of a held-out prompt")
            levels = (painted * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            images += [Image.fromarray(one) for one in levels]
        values = [self._dissimilarities(scorer, images) for scorer in self.teachers.scorers]
        scores = {"teacher": self.teachers.mean(values)}
        if len(values) > 1:
            scores |= {f"teacher_{number}": value for number, value in enumerate(values, 1)}
        if self.judge:
            scores["judge"] = self._dissimilarities(self.judge, images)
        return Look(images, scores, self._diversity(images))

    def _dissimilarities(self, scorer: Scorer, images: list[Image.Image]) -> list[float]:
        return [round(1 - float(cosine), 6) for cosine in scorer.similarity(images, self.prompts)]

    def _diversity(self, images: list[Image.Image]) -> float | None:
        """The mean of 1 - cosine over all pairs of images of one prompt, by the judge's embeddings (or the first teacher's)."""
        if self.repeats < 2:
            return None
        unit = embed_images(self.judge or self.teachers.scorers[0], images)  # (repeats x prompts, d)
        by_prompt = unit.view(self.repeats, -1, unit.shape[-1]).transpose(0, 1)  # (prompts, repeats, d)
        cosines = by_prompt @ by_prompt.transpose(1, 2)
        first, second = torch.triu_indices(self.repeats, self.repeats, 1)
        return float((1 - cosines[:, first, second]).mean())


def embed_images(scorer: Scorer, images: list[Image.Image]) -> torch.Tensor:
    """Unit embeddings (n, d) float32 of 8-bit RGB images, as the scorer makes them."""
    arrays = [scorer.resize(image) for image in images]
    return torch.cat([scorer.encode_images(scorer.stack(arrays[start:start + scorer.batch_size]))
                      for start in range(0, len(arrays), scorer.batch_size)])


def make_grid(images: list[Image.Image]) -> Image.Image:
    """The first images, all of one size, in rows with a white line of two pixels between them; large ones are made smaller."""
    shown = images[:GRID_IMAGES]
    side = min(shown[0].width, GRID_CELL_PX)
    step = side + 2
    columns = min(GRID_COLUMNS, len(shown))
    grid = Image.new("RGB", (columns * step - 2, math.ceil(len(shown) / GRID_COLUMNS) * step - 2), "white")
    for i, image in enumerate(shown):
        cell = image if image.width == side else image.resize((side, side), Image.Resampling.LANCZOS)
        grid.paste(cell, (i % GRID_COLUMNS * step, i // GRID_COLUMNS * step))
    return grid


def cell_side(grid_width: int, count: int) -> int:
    """The side of each image in a grid of so many."""
    return (grid_width + 2) // min(GRID_COLUMNS, count) - 2


# ── The log ───────────────────────────────────────────────────────────────────────────────────────────────────────────

class Journal:
    """log.jsonl: one object a line, either of a step or of a look at the held-out prompts."""

    def __init__(self, path: pathlib.Path, up_to: int) -> None:
        self.path = path
        self.rows = read_log(path, up_to)  # what was logged after the saved step will happen again
        with output_disk(path), atomic_file(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def write(self, row: Json) -> None:
        """Append one row."""
        self.rows.append(row)
        with output_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def looks(self) -> list[Json]:
        """The rows that hold a look at the held-out prompts, oldest first."""
        return [row for row in self.rows if "teacher" in row]


def read_log(path: pathlib.Path, up_to: int) -> list[Json]:
    """The rows of steps up to `up_to`; a line that a killed run left unfinished is none."""
    rows: list[Json] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= up_to:
            rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Patience:
    """Stopping early: after how many looks in a row that are no better, by at least `margin`, than the best one before."""

    looks: int  # 0: never
    margin: float

    def best(self, looks: list[Json], name: str) -> int:
        """The place of the best look: the first that no later one beats by the margin."""
        best = 0
        for place, row in enumerate(looks):
            if mean(row[name]) < mean(looks[best][name]) - self.margin:
                best = place
        return best

    def reason_to_stop(self, looks: list[Json], name: str) -> str | None:
        """Why training ends after these looks, or None where it goes on."""
        if not self.looks or not looks:
            return None
        best = self.best(looks, name)
        waited = len(looks) - 1 - best
        if waited < self.looks:
            return None
        told = f"the {name}'s dissimilarity of held-out prompts was best at step {looks[best]['step']} " \
               f"({mean(looks[best][name]):.4f}) and not better in {waited} looks since (now {mean(looks[-1][name]):.4f})"
        if name == "judge":
            change = mean(looks[-1]["teacher"]) - mean(looks[best]["teacher"])
            told += f", while the teacher's changed by {change:+.4f}"
        return told

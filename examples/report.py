"""report.html: what a run has learnt, in one file that opens from the disk, runs nothing and asks for nothing.

It is made of the looks at the held-out prompts, before.png and after.png, at the end of a run, also of one that was stopped.

Prompts come from strangers: they reach the page as escaped text, each in an element of its own direction, and the page's
Content-Security-Policy lets no script run and nothing be fetched. Images are data: URLs.
"""
import base64
import dataclasses
import hashlib
import html
import io
import itertools
import math
import pathlib
from collections.abc import Sequence

from PIL import Image

from examples.watching import GRID_COLUMNS, GRID_IMAGES, cell_side, mean
from image_text_sim_clip import Json, atomic_file, output_disk

PROMPT_CHARS = 500  # shown of each
MOST_MOVED = 5  # prompts that gained most, and as many that lost most
SURE = 2.0  # standard errors that a change must exceed to be called one
CHART = (720, 260)
MARGINS = (56, 12, 12, 34)  # left, top, right, bottom
STYLE = """
:root { --page: #f5f6f8; --plate: #fff; --ink: #1d2733; --quiet: #5a6877; --line: #d9dfe5; --a: #2563b8; --b: #a85a00;
  --c: #1b7a43; --d: #7a3fd1; --e: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --plate: #1b2128; --ink: #e7ecf1; --quiet: #a3b0bd;
  --line: #343d48; --a: #6ea8f5; --b: #eda24c; --c: #5fc98a; --d: #b794f6; --e: #f08b80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.1rem; padding: .75rem 1rem; background: var(--plate); border-left: 4px solid var(--a); }
.quiet { color: var(--quiet); font-size: .875rem; }
table { border-collapse: collapse; background: var(--plate); } .wide { overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.moved td:first-child { min-width: 9rem; }
th + th, td + td { white-space: nowrap; } .settings td + td, .settings th + th { text-align: left; white-space: normal; }
td { font-variant-numeric: tabular-nums; }
svg { width: 100%; max-width: 46rem; height: auto; background: var(--plate); }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.axis { stroke: var(--line); fill: none; } .best { stroke: var(--quiet); stroke-dasharray: 4 4; }
.s0 { --s: var(--a); } .s1 { --s: var(--b); } .s2 { --s: var(--c); } .s3 { --s: var(--d); } .s4 { --s: var(--e); }
.curve { stroke: var(--s); fill: none; stroke-width: 2; }
.dot { fill: var(--s); } svg .name { fill: var(--s); font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; padding: 0; }
figure { margin: 0; padding: .5rem; background: var(--plate); }
figure div { display: flex; gap: .25rem; } figure img { width: 50%; min-width: 0; height: auto; image-rendering: auto; }
.small img { image-rendering: pixelated; }
@media (max-width: 30rem) { th, td { padding: .25rem .4rem; } .moved td:first-child { min-width: 7rem; } }
"""


@dataclasses.dataclass(frozen=True)
class Change:
    """How a scorer's dissimilarity of the same images changed between two looks: the mean, and its standard error."""

    mean: float
    error: float

    @classmethod
    def between(cls, before: Sequence[float], after: Sequence[float]) -> "Change":
        """Of n images with the same prompts and noise."""
        differences = [new - old for old, new in zip(before, after, strict=True)]
        average = mean(differences)
        count = len(differences)
        variance = sum((value - average) ** 2 for value in differences) / max(1, count - 1)
        return cls(average, math.sqrt(variance / count) if count > 1 else 0.0)

    @property
    def direction(self) -> int:
        """-1 where it surely fell (better), 1 where it surely rose, 0 where it may be chance."""
        if abs(self.mean) <= max(SURE * self.error, 1e-6):
            return 0
        return -1 if self.mean < 0 else 1

    def __str__(self) -> str:
        return {-1: f"fell by {-self.mean:.4f}", 0: f"hardly changed ({self.mean:+.4f}, within chance)",
                1: f"rose by {self.mean:.4f}"}[self.direction]


# ── What the numbers say ──────────────────────────────────────────────────────────────────────────────────────────────

def tell_verdict(looks: list[Json]) -> str:
    """One or two sentences: what was learnt, and where teacher and judge part. A lower dissimilarity is better."""
    if len(looks) < 2:
        return "There was only one look at the held-out prompts, so nothing can be said yet."
    first = looks[0]
    last = looks[-1]
    teacher = Change.between(first["teacher"], last["teacher"])
    if "judge" not in last:
        return (f"The teacher's dissimilarity of held-out prompts {teacher}. No judge watched: whether anybody else sees that "
                "is unknown.")
    judge = Change.between(first["judge"], last["judge"])
    numbers = (f"from step {first['step']} to {last['step']} the teacher's dissimilarity of held-out prompts {teacher}, the "
               f"judge's {judge}")
    best = min(looks, key=lambda row: mean(row["judge"]))
    since_judge = Change.between(best["judge"], last["judge"])
    since_teacher = Change.between(best["teacher"], last["teacher"])
    if since_judge.direction > 0 and since_teacher.direction >= 0:
        return (f"What was learnt after step {best['step']} pleases neither: since then the teacher's dissimilarity "
                f"{since_teacher}, the judge's {since_judge}. Over all, {numbers}.")
    if since_judge.direction > 0:
        return (f"Teacher and judge part at step {best['step']}: since then the teacher's dissimilarity {since_teacher}, while "
                f"the judge's {since_judge}. What was learnt after that step pleases the teacher alone. Over all, {numbers}.")
    if teacher.direction < 0 and judge.direction < 0:
        return f"Teacher and judge agree: {numbers}."
    if teacher.direction < 0:
        return (f"Teacher and judge part from the start: {numbers}. The pipeline has learnt to please its teacher and nobody "
                "else.")
    return f"The teacher was not pleased: {numbers}."


def moved_most(prompts: list[str], before: Sequence[float], after: Sequence[float]) -> tuple[list[Json], list[Json]]:
    """The prompts that gained most and those that lost most, by the mean change of their images' dissimilarity."""
    changes: dict[str, list[tuple[float, float]]] = {}
    for prompt, old, new in zip(prompts, before, after, strict=True):
        changes.setdefault(prompt, []).append((old, new))
    rows: list[Json] = []
    for prompt, values in changes.items():
        old = mean([value[0] for value in values])
        new = mean([value[1] for value in values])
        rows.append({"prompt": prompt, "before": old, "after": new, "change": new - old})
    rows.sort(key=lambda row: row["change"])
    gained = [row for row in rows if row["change"] < 0][:MOST_MOVED]
    lost = [row for row in reversed(rows) if row["change"] > 0][:MOST_MOVED]
    return gained, lost


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def escape(text: object) -> str:
    """Text for an element or an attribute, cut to what is shown."""
    plain = str(text).encode("utf-8", "replace").decode()
    return html.escape(plain if len(plain) <= PROMPT_CHARS else plain[:PROMPT_CHARS] + " …")


def draw_chart(looks: list[Json], names: list[str]) -> str:
    """An SVG of each scorer's mean dissimilarity over the steps; a dashed line where the last name's is best."""
    width, height = CHART
    left, top, right, bottom = MARGINS
    values = [mean(row[name]) for row, name in itertools.product(looks, names)]
    low = min(values)
    span = (max(values) - low) or 1.0
    most_steps = looks[-1]["step"] or 1

    def place(step: float, value: float) -> tuple[float, float]:
        return (left + (width - left - right) * step / most_steps, top + (height - top - bottom) * (1 - (value - low) / span))
    parts = [f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>']
    for share in (0.0, 0.5, 1.0):
        _, y = place(0, low + share * span)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{low + share * span:.3f}</text>')
        x, _ = place(share * most_steps, low)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{share * most_steps:.0f}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">steps</text>')
    best = min(looks, key=lambda row: mean(row[names[-1]]))
    x, _ = place(best["step"], low)
    parts.append(f'<path class="best" d="M{x:.1f} {top}V{height - bottom}"/>')
    for number, name in enumerate(names):
        points = [place(row["step"], mean(row[name])) for row in looks]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
        label = f'<text class="name" x="{left + 12 + 90 * number}" y="{height - 4}">{escape(name)}</text>'
        parts.append(f'<g class="s{number % 5}"><polyline class="curve" points="{line}"/>{dots}{label}</g>')
    told = f"Mean dissimilarity of held-out prompts over the steps: {', '.join(names)}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'


def tabulate(head: list[str], rows: list[list[str]], kind: str = "scores") -> str:
    """A table of cells that are markup already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide {kind}"><table>' + "".join(lines) + "</table></div>"


def cut_cells(path: pathlib.Path, count: int) -> list[Image.Image]:
    """The first `count` images of a grid that a run has saved; none where there is no such file."""
    if not path.is_file():
        return []
    with Image.open(path) as opened:
        grid = opened.convert("RGB")
    side = cell_side(grid.width, count)
    cells = []
    for number in range(count):
        left = number % GRID_COLUMNS * (side + 2)
        top = number // GRID_COLUMNS * (side + 2)
        cells.append(grid.crop((left, top, left + side, top + side)))
    return cells


def as_data_url(image: Image.Image) -> str:
    """The image as PNG, or as JPEG where it is large."""
    buffer = io.BytesIO()
    kind = "PNG" if image.width <= 96 else "JPEG"
    image.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def show_pairs(folder: pathlib.Path, prompts: list[str], looks: list[Json], name: str) -> str:
    """Each held-out prompt with what is painted before and after, from the same noise."""
    count = min(len(prompts), GRID_IMAGES)
    before = cut_cells(folder / "before.png", count)
    after = cut_cells(folder / "after.png", count)
    if not before or not after:
        return "<p>No images were kept.</p>"
    figures = []
    for number in range(count):
        images = "".join(f'<img src="{as_data_url(cells[number])}" alt="{when}" width="{cells[number].width}">'
                         for cells, when in ((before, "before"), (after, "after")))
        change = f"{name} {looks[0][name][number]:.3f} → {looks[-1][name][number]:.3f}"
        figures.append(f'<figure><div>{images}</div><figcaption><bdi>{escape(prompts[number])}</bdi>'
                       f'<br><span class="quiet">{change}</span></figcaption></figure>')
    small = " small" if before[0].width <= 96 else ""
    left_out = f'<p class="quiet">The first {count} of {len(prompts)} images.</p>' if count < len(prompts) else ""
    return f'<div class="pairs{small}">{"".join(figures)}</div>{left_out}'


def tell_diversity(looks: list[Json]) -> str:
    """How far images of one prompt lie apart, before and after."""
    before = looks[0].get("diversity")
    after = looks[-1].get("diversity")
    if before is None or after is None:
        return "With one image of each prompt there is nothing to compare (<code>--images-per-prompt 2</code> or more)."
    told = "less diverse" if after < before else "no less diverse"
    by = "judge" if "judge" in looks[-1] else "teacher"
    return (f"Images of one prompt lie {before:.4f} apart before and {after:.4f} after (mean of 1 - cosine over all pairs, by "
            f"the {by}'s embeddings): they have become {told}.")


def show_moved(prompts: list[str], looks: list[Json], name: str) -> str:
    """The prompts that gained and lost most."""
    sections = []
    gained, lost = moved_most(prompts, looks[0][name], looks[-1][name])
    for title, rows in (("Gained most", gained), ("Lost most", lost)):
        cells = [[f"<bdi>{escape(row['prompt'])}</bdi>", f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['change']:+.4f}"]
                 for row in rows]
        table = tabulate(["prompt", "before", "after", "change"], cells, "moved") if rows else "<p>None.</p>"
        sections.append(f"<h2>{title}</h2>{table}")
    return "".join(sections)


def make_page(folder: pathlib.Path, prompts: list[str], looks: list[Json], settings: dict[str, str],
              stopped: str | None) -> str:
    """The whole page. `prompts` are those of the looks, one for each image."""
    names = [name for name in looks[-1] if name not in ("step", "diversity")]
    judged = "judge" if "judge" in names else "teacher"
    names.sort(key=lambda name: name == judged)  # the one that counts last
    rows = [[str(row["step"]), *(f"{mean(row[name]):.4f}" for name in names),
             f"{row['diversity']:.4f}" if "diversity" in row else ""] for row in looks]
    end = f"<p>Training was stopped: {escape(stopped)}.</p>" if stopped else ""
    policy = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    chosen = [[escape(name), f"<bdi>{escape(value)}</bdi>"] for name, value in sorted(settings.items())]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{policy}'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>What the pipeline has learnt</title><style>{STYLE}</style></head><body>
<h1>What the pipeline has learnt</h1>
<p class="verdict">{escape(tell_verdict(looks))}</p>{end}
<h2>Scores over time</h2>{draw_chart(looks, names)}
<p class="quiet">Mean dissimilarity of {len(prompts)} images of held-out prompts, from the same noise at each look; lower is
better. The dashed line is where the {judged}'s is lowest.</p>
{tabulate(["step", *names, "diversity"], rows)}
<h2>Diversity</h2><p>{tell_diversity(looks)}</p>
{show_moved(prompts, looks, judged)}
<h2>Before and after</h2>
<p class="quiet">Left before, right after, from the same noise.</p>
{show_pairs(folder, prompts, looks, judged)}
<h2>Settings</h2>{tabulate(["setting", "value"], chosen, "settings")}
</body></html>
"""


def write_report(folder: pathlib.Path, prompts: list[str], looks: list[Json], settings: dict[str, str],
                 stopped: str | None = None) -> None:
    """Write `folder`/report.html, whole or not at all."""
    page = make_page(folder, prompts, looks, settings, stopped)
    path = folder / "report.html"
    with output_disk(path), atomic_file(path) as file:
        file.write(page.encode())

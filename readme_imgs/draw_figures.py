"""Draw the figures of the README.

    python readme_imgs/draw_figures.py             # all of them: `make figures`
    python readme_imgs/draw_figures.py clip2 q3    # the two diagrams only

Each figure is written next to this script; memory, memory-time, scores, review and labels come from real runs on the
bundled drawings, the last two as a headless Chromium shows it (with tests/requirements.txt, and `apt-get install chromium`).
Diagrams are laid out in pixels, with the origin at the lower left.
"""
import argparse
import csv
import io
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
PHOTO = HERE.parent / "challenge_set" / "photos" / "chelsea.png"
WIDTH, DPI = 1400, 100
INK, QUIET, LOSS = "#263238", "#607d8b", "#c0392b"
FILLS = {  # kind of box: (inside, border)
    "data": ("#ffffff", "#90a4ae"), "image": ("#e3f0fb", "#4a86c5"), "text": ("#fdf0dc", "#d08a2a"),
    "score": ("#e6f4e6", "#4c9a52"), "loss": ("#fbe6e3", LOSS), "panel": ("#f6f8f9", "#cfd8dc"),
}
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                  "--disable-component-update", "--disable-sync"]
Point = tuple[float, float]


def canvas(height: int) -> Axes:
    """A white sheet, `WIDTH` pixels by `height`, on which one unit is one pixel."""
    figure = plt.figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    return axes


def save(axes: Axes, out: pathlib.Path, colours: int | None = None) -> None:
    """Write the sheet as a PNG of exactly its own size; a palette of a few colours keeps it small."""
    sheet = axes.figure.canvas
    sheet.draw()
    image = Image.frombuffer("RGBA", sheet.get_width_height(), sheet.buffer_rgba()).convert("RGB")
    (image.quantize(colours) if colours else image).save(out, optimize=True)
    plt.close(axes.figure)


def write(axes: Axes, at: Point, text: str, size: float = 14, colour: str = INK, **style) -> None:
    """Put one line of text about a point, centred unless told otherwise, with `$` taken as a plain letter."""
    style = {"ha": "center", "va": "baseline", "parse_math": False} | style
    x_height = size * DPI / 72 * 0.547  # of the font DejaVu; one baseline for all lines, whatever letters they have
    axes.text(at[0], at[1] - x_height / 2, text, fontsize=size, color=colour, **style)


def box(axes: Axes, middle: Point, size: Point, text: str, kind: str = "data", small: str = "") -> None:
    """A rounded box with its text in the middle and, beneath it, a smaller explanation."""
    (x, y), (wide, high), (inside, border) = middle, size, FILLS[kind]
    axes.add_patch(FancyBboxPatch((x - wide / 2, y - high / 2), wide, high, boxstyle="round,pad=0,rounding_size=10",
                                  facecolor=inside, edgecolor=border, linewidth=1.6))
    rows = [(line, 26, {}) for line in text.splitlines()]
    rows += [(line, 21, {"size": 11, "colour": QUIET}) for line in small.splitlines()]
    y += sum(pitch for _, pitch, _ in rows) / 2
    for line, pitch, style in rows:
        write(axes, (x, y - pitch / 2), line, **style)
        y -= pitch


def panel(axes: Axes, corner: Point, size: Point, title: str) -> None:
    """A pale area that holds several boxes, with its title in the upper left corner."""
    inside, border = FILLS["panel"]
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=14", facecolor=inside,
                                  edgecolor=border, linewidth=1.2, zorder=0))
    write(axes, (corner[0] + 16, corner[1] + size[1] - 24), title, size=13, colour=QUIET, ha="left", weight="bold")


def arrow(axes: Axes, *points: Point, colour: str = INK, dashed: bool = False) -> None:
    """A line through the points with a head at its end."""
    dashes = (0, (5, 3)) if dashed else "solid"
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=colour, linewidth=1.8, linestyle=dashes, solid_capstyle="butt")
    axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=16, shrinkA=0, shrinkB=0,
                                   color=colour, linewidth=1.8, linestyle=dashes))


def embedding(axes: Axes, middle: Point, kind: str, label: str) -> None:
    """A row of cells in shades of one colour, standing for a vector, with its label beneath."""
    shades, side = (0.9, 0.35, 0.6, 0.15, 0.75, 0.45, 0.25), 20
    left = middle[0] - side * len(shades) / 2
    for number, shade in enumerate(shades if kind == "image" else shades[::-1]):
        axes.add_patch(Rectangle((left + number * side, middle[1] - side / 2), side, side, facecolor=FILLS[kind][1],
                                 alpha=shade, edgecolor="none"))
    axes.add_patch(Rectangle((left, middle[1] - side / 2), side * len(shades), side, fill=False,
                             edgecolor=FILLS[kind][1], linewidth=1.4))
    write(axes, (middle[0], middle[1] - 28), label, size=12)


def draw_clip2(out: pathlib.Path) -> None:
    """How CLIP scores one pair of an image and a caption."""
    axes, top, bottom, middle = canvas(560), 430, 170, 300
    photo = plt.imread(PHOTO)
    high = 200 * photo.shape[0] / photo.shape[1]
    axes.imshow(photo, extent=(30, 230, top - high / 2, top + high / 2), aspect="auto", interpolation="lanczos")
    axes.set(xlim=(0, WIDTH), ylim=(0, 560))
    caption = "\u201ca close-up of the face of a tabby cat with green eyes\u201d"
    box(axes, (130, bottom), (200, 130), textwrap.fill(caption, 16))
    write(axes, (130, top + high / 2 + 22), "image", size=12, colour=QUIET)
    write(axes, (130, bottom - 87), "caption", size=12, colour=QUIET)
    for y, kind, first, small in ((top, "image", "image\nprocessor", "resize, scale"),
                                  (bottom, "text", "tokenizer", "text to ids")):
        box(axes, (350, y), (150, 100), first, kind, small)
        box(axes, (550, y), (150, 100), f"{kind}\nencoder", kind)
        embedding(axes, (750, y), kind, f"{kind} embedding")
        box(axes, (950, y), (150, 100), "normalise", kind, "to length 1")
        for start, end in ((232, 275), (425, 475), (625, 678), (822, 875)):
            arrow(axes, (start, y), (end, y))
    for y, edge in ((top, middle + 55), (bottom, middle - 55)):
        arrow(axes, (1025, y), (1140, y), (1140, edge))
    box(axes, (1230, middle), (280, 110), "dot product =\ncosine similarity", "score", "between \u22121 and 1")
    arrow(axes, (1275, middle - 55), (1275, bottom + 30))
    box(axes, (1275, bottom - 10), (190, 80), "dissimilarity", "loss", "1 \u2212 similarity")
    write(axes, (WIDTH / 2, 36), "SigLIP:  probability = sigmoid(scale \u00d7 cos + bias)", size=13, colour=QUIET)
    save(axes, out)


def draw_q3(out: pathlib.Path) -> None:
    """How the similarity trains a text-to-image model, and where its prompts come from."""
    axes, top, middle, bottom = canvas(620), 370, 250, 130
    panel(axes, (20, 30), (270, 560), "choosing the pairs")
    panel(axes, (320, 30), (1060, 560), "training")
    panel(axes, (770, 58), (230, 412), "CLIP, frozen")
    column = (("image URLs\n+ captions", "data", ""), ("similarity\nof each pair", "score", "image_text_sim_clip"),
              ("kept.csv", "score", "scored and curated pairs"), ("training set", "data", ""))
    for number, (text, kind, small) in enumerate(column):
        y = bottom + 120 * (3 - number)
        box(axes, (155, y), (220, 84), text, kind, small)
        if number:
            arrow(axes, (155, y + 78), (155, y + 42))
    box(axes, (430, bottom), (160, 84), "prompts", "text")
    box(axes, (430, top), (160, 100), "text-to-image\nmodel", "loss", "being trained")
    box(axes, (650, top), (150, 100), "generated\nimage", "image")
    box(axes, (885, top), (170, 100), "image\nencoder", "image")
    box(axes, (885, bottom), (170, 100), "text\nencoder", "text")
    box(axes, (1120, middle), (140, 84), "similarity", "score", "of both\nembeddings")
    box(axes, (1290, middle), (140, 84), "error", "loss", "dissimilarity =\n1 \u2212 similarity")
    for points in (((265, bottom), (350, bottom)), ((430, bottom + 42), (430, top - 50)),
                   ((510, bottom), (800, bottom)), ((510, top), (575, top)), ((725, top), (800, top)),
                   ((970, top), (1120, top), (1120, middle + 42)), ((1190, middle), (1220, middle)),
                   ((970, bottom), (1120, bottom), (1120, middle - 42))):
        arrow(axes, *points)
    arrow(axes, (1290, middle + 42), (1290, 505), (430, 505), (430, top + 50), colour=LOSS, dashed=True)
    write(axes, (860, 525), "gradient, through the frozen CLIP, back to the text-to-image model", size=13, colour=LOSS)
    save(axes, out, colours=128)


def largest_increments(lines: list[str], count: int = 3) -> set[int]:
    """Which lines of the table grew the memory most.

    A function's first line is passed over: its 'Increment' is all that was in use before, equal to 'Mem usage'.
    """
    grown = []
    for number, line in enumerate(lines):
        found = re.match(r"\s*\d+\s+(-?[\d.]+) MiB\s+(-?[\d.]+) MiB\s", line)
        if found and found[1] != found[2] and float(found[2]) > 0:
            grown.append((float(found[2]), number))
    return {number for _, number in sorted(grown, reverse=True)[:count]}


def draw_memory_table(text: str, out: pathlib.Path) -> None:
    """The plain text as a figure in monospace; the lines that grew the memory most are tinted."""
    lines, margin = textwrap.dedent(text.expandtabs(4)).strip("\n").splitlines(), 30
    tinted = largest_increments(lines)
    letter = (WIDTH - 2 * margin) // max(100, *map(len, lines))  # whole pixels, as hinted letters are set
    font = letter / 0.602  # pixels; 0.602 is the width of a letter of DejaVu Sans Mono
    pitch = round(font * 1.32)
    height = 2 * margin + pitch * len(lines)
    axes = canvas(height)
    for number, line in enumerate(lines):
        y = height - margin - pitch * (number + 0.5)
        if number in tinted:
            axes.add_patch(Rectangle((margin / 2, y - pitch / 2), WIDTH - margin, pitch, facecolor="#fde3c4"))
        colour = INK if re.match(r"\s*\d", line) else QUIET
        write(axes, (margin, y), line, size=font * 72 / DPI, colour=colour, ha="left", family="monospace")
    save(axes, out, colours=32)


def run_script(*arguments: str, under_profiler: bool = False) -> str:
    """Run the script on the bundled drawings and return what it printed on stdout."""
    profiler = ["-m", "memory_profiler"] if under_profiler else []
    command = [sys.executable, *profiler, "image_text_sim_clip.py", "--config", "challenge_set/demo.yaml", *arguments]
    return subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def tables_of(text: str, functions: tuple[str, ...]) -> str:
    """Of the tables that memory_profiler printed, those of the named functions, in that order; ValueError without one."""
    tables = re.split(r"Filename: .*\n\n", text)[1:]
    found = []
    for name in functions:
        of_function = [table.rstrip() + "\n" for table in tables if f" def {name}(" in table]
        if not of_function:
            raise ValueError(f"memory_profiler printed no table of {name}")
        found += of_function
    return "\n".join(found)


def draw_memory(out: pathlib.Path) -> None:
    """memory.png: the line-by-line table of a real run."""
    printed = run_script("--set", "output_path=scores/memory", "--fresh", under_profiler=True)
    draw_memory_table(tables_of(printed, ("make_plan", "__init__", "finalize")), out)


def draw_memory_time(out: pathlib.Path) -> None:
    """memory-time.png: the curve that a real run writes."""
    run_script("--set", "output_path=scores/memory-time", "--fresh")
    shutil.copyfile(HERE.parent / "scores" / "memory-time" / "memory-time.png", out)


def curate_demo(*settings: str) -> pathlib.Path:
    """Score the bundled drawings, curate them with the settings given, and return the folder of what that wrote."""
    run_script("--set", "output_path=scores/curated-demo", "--fresh")
    overrides = [f"--set={setting}" for setting in ("output_path=scores/curated-demo", *settings)]
    subprocess.run([sys.executable, "curate.py", "--config", "challenge_set/demo.yaml", *overrides],  # noqa: S603
                   cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    return HERE.parent / "scores" / "curated-demo" / "curated"


def draw_scores(out: pathlib.Path) -> None:
    """scores.png: both distributions and the cut of the rule that the README recommends."""
    shutil.copyfile(curate_demo("curate.max_random_rate=0.01") / "scores.png", out)


def draw_review(out: pathlib.Path) -> None:
    """review.png: the review page of the same run on a desktop in light, and on a phone in dark colours."""
    from playwright.sync_api import sync_playwright
    page = curate_demo("curate.max_random_rate=0.01", "curate.review=true") / "review.html"
    shots = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        for width, colours in ((1180, "light"), (400, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 1120}, color_scheme=colours)
            view.goto(page.as_uri())
            view.wait_for_function("document.documentElement.dataset.readyMs")
            shots.append(Image.open(io.BytesIO(view.screenshot())).convert("RGB"))
        browser.close()
    save_side_by_side(shots, out)


def draw_labels(out: pathlib.Path) -> None:
    """labels.png: the same page with 150 pairs marked by the drawings' truth, and the file that it saves."""
    from playwright.sync_api import sync_playwright
    page = curate_demo("curate.review=true") / "review.html"
    with open(HERE.parent / "challenge_set" / "shapes.csv", encoding="utf-8", newline="") as file:
        fits = [row["match"] == "good" for row in csv.DictReader(file)]
    shots = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        for width, colours in ((1180, "light"), (400, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 1100}, color_scheme=colours)
            view.goto(page.as_uri())
            view.wait_for_function("document.documentElement.dataset.readyMs")
            view.evaluate("""(fits) => {
              document.getElementById("share").value = 80;
              for (let i = 0; i < 150; i++) setMark(next, fits[next.row] ? "fits" : "does_not_fit");
              setBin(binOf(cells[proveCut(getGoal()) - 1].from));
              for (const panel of document.querySelectorAll("header, section")) panel.hidden = true;
              for (const id of ["marking", "curves"]) document.getElementById(id).closest("section").hidden = false;
            }""", fits)
            if not shots:
                with view.expect_download() as download:
                    view.click("#save")
                download.value.save_as(HERE.parent / "challenge_set" / "shapes-labels.csv")
            shots.append(Image.open(io.BytesIO(view.locator("main").screenshot())).convert("RGB"))
            view.evaluate("localStorage.clear()")
        browser.close()
    save_side_by_side(shots, out)


def save_side_by_side(shots: list[Image.Image], out: pathlib.Path) -> None:
    """Write two screenshots as one image, as high as the first."""
    sheet = Image.new("RGB", (sum(shot.width for shot in shots) + 20, shots[0].height), "#90a4ae")
    sheet.paste(shots[0], (0, 0))
    sheet.paste(shots[1], (shots[0].width + 20, 0))
    sheet.save(out, optimize=True)


def main() -> None:
    """Draw what the command line names, or everything."""
    figures = {"clip2": draw_clip2, "q3": draw_q3, "memory": draw_memory, "memory-time": draw_memory_time,
               "scores": draw_scores, "review": draw_review, "labels": draw_labels}
    parser = argparse.ArgumentParser(description="Draw the figures of the README.")
    parser.add_argument("what", nargs="*", help=f"any of {', '.join(figures)}; nothing means all")
    what = parser.parse_args().what or list(figures)
    if unknown := [name for name in what if name not in figures]:
        parser.error(f"no such figure: {', '.join(unknown)}")
    for name in what:
        figures[name](HERE / f"{name}.png")


if __name__ == "__main__":
    main()

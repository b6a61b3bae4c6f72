"""Draw coloured shapes and say what was drawn.

A scene is one or two shapes (size, colour, shape) on a background; `caption` puts it into words and `draw` into pixels.
The 200 drawings in `shapes/` and `shapes.csv` are written by `python challenge_set/draw_shapes.py`; the training of
`shapes_clip` draws its own scenes and never one whose caption is among the 200 (`HELD_OUT_SEED` makes them again).
"""
import csv
import math
import pathlib
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZES = {"small": (0.10, 0.13), "large": (0.19, 0.23)}  # radius as a share of the image's side
COLOURS = {
    "red": (215, 35, 35), "orange": (245, 135, 25), "yellow": (240, 220, 40), "green": (40, 150, 60),
    "cyan": (50, 205, 215), "blue": (35, 70, 205), "purple": (130, 45, 165), "pink": (245, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (12, 12, 12)}
RELATIONS = ("left of", "right of", "above", "below")  # where the first shape lies, seen from the second
HELD_OUT_SEED = 2026
COLOUR_JITTER = 14  # levels of 255, either way


class Thing(NamedTuple):
    """One shape of a scene, in the words of its caption."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """What is drawn: one thing, or two with the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str
    background: str


def random_scene(rng: random.Random, count: int) -> Scene:
    """A scene of `count` (1 or 2) things; two differ in colour and in shape."""
    colours, shapes = rng.sample(sorted(COLOURS), count), rng.sample(SHAPES, count)
    things = tuple(Thing(rng.choice(sorted(SIZES)), c, s) for c, s in zip(colours, shapes, strict=True))
    return Scene(things, rng.choice(RELATIONS) if count == 2 else "", rng.choice(sorted(BACKGROUNDS)))


def caption(scene: Scene) -> str:
    """The full sentence, for example 'a large red circle left of a small blue star on a grey background'."""
    middle = f" {scene.relation} ".join(f"a {t.size} {t.colour} {t.shape}" for t in scene.things)
    return f"{middle} on a {scene.background} background"


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Where the things lie, as shares of the side, jittered so that no two drawings are alike."""
    def near(at: float, by: float) -> float:
        return at + rng.uniform(-by, by)
    if len(scene.things) == 1:
        return [(near(0.5, 0.2), near(0.5, 0.2))]
    first, second = near(0.26, 0.03), near(0.74, 0.03)
    if scene.relation in ("right of", "below"):
        first, second = second, first
    if scene.relation in ("left of", "right of"):
        return [(first, near(0.5, 0.15)), (second, near(0.5, 0.15))]
    return [(near(0.5, 0.15), first), (near(0.5, 0.15), second)]


def _polygon(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of the shapes that have corners, in pixels."""
    if shape == "cross":
        arm = radius * 0.36
        corners = [(-arm, -radius), (arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm),
                   (arm, radius), (-arm, radius), (-arm, arm), (-radius, arm), (-radius, -arm), (-arm, -arm)]
        return [(x + dx * math.cos(turn) - dy * math.sin(turn), y + dx * math.sin(turn) + dy * math.cos(turn))
                for dx, dy in corners]
    count, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    return [(x + r * math.cos(a), y + r * math.sin(a))
            for i in range(count)
            for a in [start + turn + 2 * math.pi * i / count]
            for r in [radius * (inner if i % 2 and shape == "star" else 1.0)]]


def draw(scene: Scene, side: int, rng: random.Random, supersample: int = 2) -> Image.Image:
    """The scene as a square RGB image of `side` pixels."""
    def tint(colour: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(min(255, max(0, level + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for level in colour)
    canvas = side * supersample
    image = Image.new("RGB", (canvas, canvas), tint(BACKGROUNDS[scene.background]))
    pen = ImageDraw.Draw(image)
    for thing, (cx, cy) in zip(scene.things, _centres(scene, rng), strict=True):
        radius, x, y = rng.uniform(*SIZES[thing.size]) * canvas, cx * canvas, cy * canvas
        fill, box = tint(COLOURS[thing.colour]), (x - radius, y - radius, x + radius, y + radius)
        if thing.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif thing.shape == "ring":
            pen.ellipse(box, outline=fill, width=max(2, round(radius * 0.36)))
        else:
            pen.polygon(_polygon(thing.shape, x, y, radius, rng.uniform(-0.15, 0.15)), fill=fill)
    return image.reduce(supersample)


def held_out_scenes(singles: int = 60, doubles: int = 140) -> list[Scene]:
    """The scenes of the bundled drawings, all captions different; the training leaves every one of them out."""
    rng = random.Random(HELD_OUT_SEED)
    scenes: dict[str, Scene] = {}
    while len(scenes) < singles + doubles:
        scene = random_scene(rng, 1 if len(scenes) < singles else 2)
        scenes.setdefault(caption(scene), scene)
    return list(scenes.values())


def _words(scene: Scene) -> set[str]:
    return {word for thing in scene.things for word in (thing.colour, thing.shape)}


def near_caption(scene: Scene, rng: random.Random) -> str:
    """The caption with one word (size, colour, shape, relation or background) changed, so that it is no longer true."""
    place = rng.randrange(len(scene.things))
    thing = scene.things[place]
    words = {"size": sorted(SIZES), "colour": sorted(COLOURS), "shape": SHAPES, "background": sorted(BACKGROUNDS)}
    if scene.relation:
        words["relation"] = RELATIONS
    field, choices = rng.choice(list(words.items()))
    if field in ("background", "relation"):
        changed = rng.choice([c for c in choices if c != getattr(scene, field)])
        return caption(scene._replace(background=changed) if field == "background" else scene._replace(relation=changed))
    changed = rng.choice([c for c in choices if c != getattr(thing, field) and c not in _words(scene)])
    things = [t._replace(**{field: changed}) if i == place else t for i, t in enumerate(scene.things)]
    return caption(scene._replace(things=tuple(things)))


def write_set(folder: pathlib.Path) -> None:
    """Write `shapes/*.png` and `shapes.csv`: for each drawing its own caption, a wrong one and one nearly right."""
    rng, scenes = random.Random(HELD_OUT_SEED + 1), held_out_scenes()
    (folder / "shapes").mkdir(exist_ok=True)
    with open(folder / "shapes.csv", "w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(("url", "caption", "match"))
        for number, scene in enumerate(scenes):
            name = f"shape-{number:03d}.png"
            draw(scene, rng.choice((96, 128, 160, 192)), rng, supersample=4).save(folder / "shapes" / name, optimize=True)
            others = [s for s in scenes if not _words(s) & _words(scene)]
            table.writerow((name, caption(scene), "good"))
            table.writerow((name, caption(rng.choice(others)), "wrong"))
            table.writerow((name, near_caption(scene, rng), "near"))


if __name__ == "__main__":
    write_set(pathlib.Path(__file__).parent)

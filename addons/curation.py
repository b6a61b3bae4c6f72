"""Which scored rows to keep: the section `curate:`, known recipes, and the rules that look at one row at a time.

Used by curate.py. Every row gets one verdict, KEPT or the first of RULES that it fails; what one row does to another
(duplicates, one caption per image) is judged afterwards, in addons/duplicates.py, among the rows that are still there.
Similarities are compared as the float32 that they are: a row whose cell says 0.3 passes `min_similarity: 0.3`.
"""
import dataclasses
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, Literal

import numpy as np

# Verdicts are the numbers of these names; a dropped row shows the first rule it fails.
RULES = ("kept", "not_scored", "caption_length", "min_similarity", "keep_fraction", "max_random_rate", "unreadable_image",
         "image_size", "aspect", "one_caption_per_image", "duplicate_image", "duplicate_caption")
VERDICTS = {name: number for number, name in enumerate(RULES)}
KEPT = VERDICTS["kept"]

RULE_TEXTS = {
    "not_scored": "has no similarity: see its status",
    "caption_length": "the caption is shorter or longer than allowed",
    "min_similarity": "scores below min_similarity",
    "keep_fraction": "is not among the best keep_fraction of the scored rows",
    "max_random_rate": "more than max_random_rate of random pairs score as high",
    "unreadable_image": "the picture could not be read again",
    "image_size": "the picture is smaller than min_width x min_height",
    "aspect": "the picture is longer than max_aspect allows",
    "one_caption_per_image": "another caption of the same image scores higher",
    "duplicate_image": "another image with the same picture scores higher",
    "duplicate_caption": "another row with the same caption scores higher",
}


def _setting(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A key with its default and the range that numbers must lie in, in the form that Config's own keys have."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Curation:
    """Every key of config.yaml's section `curate`, which says in a comment what each is for."""

    recipe: Literal["laion-400m", "laion-2b", "datacomp-l14-top30"] | None = None
    recipe_for_any_model: bool = False
    min_similarity: float | None = _setting(None, -1, 1)
    keep_fraction: float | None = _setting(None, 0, 1)
    max_random_rate: float | None = _setting(None, 0, 1)
    min_caption_chars: int = _setting(0, 0)
    max_caption_chars: int | None = _setting(None, 1)
    min_width: int = _setting(0, 0)
    min_height: int = _setting(0, 0)
    max_aspect: float | None = _setting(None, 1)
    one_caption_per_image: bool = False
    duplicate_images: Literal["keep", "exact", "perceptual"] = "keep"
    perceptual_distance: int = _setting(4, 0, 16)
    duplicate_captions: Literal["keep", "exact"] = "keep"
    export: Literal["csv", "parquet", "imagefolder", "webdataset"] = "csv"
    shard_rows: int = _setting(10_000, 1)
    review: bool = False
    review_rows: int = _setting(2000, 1, 20_000)

    @property
    def needs_pictures(self) -> bool:
        """Whether a rule looks at the pictures themselves, so that they are read again."""
        return bool(self.min_width or self.min_height or self.max_aspect is not None or self.duplicate_images != "keep")

    @property
    def needs_neighbours(self) -> bool:
        """Whether a rule compares rows with each other."""
        return bool(self.one_caption_per_image or self.duplicate_images != "keep" or self.duplicate_captions != "keep")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published way of choosing: the keys that it sets, the model whose cosines it speaks of, and who used it."""

    keys: dict[str, float]
    model: str
    source: str


RECIPES = {
    "laion-400m": Recipe({"min_similarity": 0.30}, "openai/clip-vit-base-patch32", "LAION-400M (Schuhmann et al. 2021)"),
    "laion-2b": Recipe({"min_similarity": 0.28}, "openai/clip-vit-base-patch32", "LAION-5B, its English part (2022)"),
    "datacomp-l14-top30": Recipe({"keep_fraction": 0.3}, "openai/clip-vit-large-patch14",
                                 "DataComp, CLIP score (L/14 30 %) (Gadre et al. 2023)"),
}


def apply_recipe(curation: Curation, model: str) -> Curation:
    """The curation with its recipe's keys filled in.

    `model` is the one that gave the scores, a Hub id or a folder whose last segment counts. ValueError, with a message
    for the user, when the recipe was made for another (unless `recipe_for_any_model`) or a key says something else.
    """
    if curation.recipe is None:
        return curation
    recipe, name = RECIPES[curation.recipe], model.rstrip("/").rsplit("/", 1)[-1]
    if name != recipe.model.rsplit("/", 1)[-1] and not curation.recipe_for_any_model:
        raise ValueError(f"recipe {curation.recipe} was made for {recipe.model}, and these scores are from {model}: cosines of "
                         "two models do not compare (max_random_rate does; recipe_for_any_model: true insists)")
    for key, value in recipe.keys.items():
        if getattr(curation, key) not in (None, value):
            raise ValueError(f"recipe {curation.recipe} sets {key} to {value}; leave {key} out, or the recipe")
    return dataclasses.replace(curation, **recipe.keys)  # type: ignore[arg-type]


# ── The best fraction, exactly and in constant memory ─────────────────────────────────────────────────────────────────

def order_keys(similarities: Any) -> Any:
    """float32 (n,) without NaN -> uint32 (n,) in the same order: their bits, turned so that they count upwards."""
    bits = (np.asarray(similarities, np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def similarity_of_key(key: int) -> float:
    """The float32 whose order key this is."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


@dataclasses.dataclass(frozen=True)
class FractionCut:
    """The best rows by similarity: all above `key`, and those at `key` up to and including row `last_row`."""

    key: int
    last_row: int

    def keeps(self, similarities: Any, rows: Any) -> Any:
        """Which of the scored rows, given by similarity (n,) and row number (n,), are among the best: bool (n,)."""
        keys = order_keys(similarities)
        return (keys > self.key) | ((keys == self.key) & (rows <= self.last_row))

    @property
    def similarity(self) -> float:
        """The lowest similarity that is kept."""
        return similarity_of_key(self.key)


Chunks = Callable[[], Iterable[Any]]


def find_fraction_cut(chunks: Chunks, fraction: float) -> FractionCut:
    """The cut that keeps exactly floor(fraction x scored rows) of them: the highest, and of equal ones the first rows.

    `chunks()` gives the similarities of all rows, in input order, as float32 arrays of any length with NaN for a row
    without a score; it is called three times. One pass counts the upper half of each order key, one the lower half within
    the decisive upper half, one finds the row at which the ties run out: 1 MB of counts for any number of rows.
    """
    upper = np.zeros(1 << 16, np.int64)
    for similarities in chunks():
        upper += np.bincount(order_keys(similarities[~np.isnan(similarities)]) >> 16, minlength=1 << 16)
    # the fraction as it is written: 0.7 of 10 is 7, though the nearest float lies a little below 0.7
    wanted = math.floor(Fraction(str(fraction)) * int(upper.sum()))
    if not wanted:
        return FractionCut(0xFFFFFFFF, -1)
    half, above = _find_decisive(upper, wanted)
    lower = np.zeros(1 << 16, np.int64)
    for similarities in chunks():
        keys = order_keys(similarities[~np.isnan(similarities)])
        lower += np.bincount(keys[keys >> 16 == half] & 0xFFFF, minlength=1 << 16)
    rest, above_too = _find_decisive(lower, wanted - above)
    key, ties = half << 16 | rest, wanted - above - above_too
    first_row = 0
    for similarities in chunks():
        at_key = np.flatnonzero(~np.isnan(similarities) & (order_keys(similarities) == key))
        if len(at_key) >= ties:
            return FractionCut(key, first_row + int(at_key[ties - 1]))
        ties, first_row = ties - len(at_key), first_row + len(similarities)
    raise AssertionError("the chunks were not the same in each pass")


def _find_decisive(counts: Any, wanted: int) -> tuple[int, int]:
    """The highest bin such that it and those above hold at least `wanted`, and how many lie above it."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, wanted))
    return len(counts) - 1 - place, int(reached[place] - counts[len(counts) - 1 - place])


# ── Rules for one row ─────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where the three rules on similarity cut; None for a rule that is not asked for."""

    min_similarity: float | None = None
    fraction: FractionCut | None = None
    random_rate: float | None = None  # the similarity that at most max_random_rate of random pairs reach

    @property
    def similarity(self) -> float | None:
        """The strictest of them, as a similarity."""
        given = [self.min_similarity, self.fraction.similarity if self.fraction else None, self.random_rate]
        return max((cut for cut in given if cut is not None), default=None)


def judge_rows(curation: Curation, cuts: Cuts, first_row: int, similarities: Any, is_ok: Any, captions: list[str]) -> Any:
    """Verdicts, uint8 (n,), of the rules that need no picture, for n rows from row number `first_row` on.

    `similarities` float32 (n,) with NaN for none, `is_ok` bool (n,) whether the status is ok, `captions` n texts.
    """
    verdicts = np.zeros(len(similarities), np.uint8)

    def drop(which: Any, rule: str) -> None:
        verdicts[which & (verdicts == KEPT)] = VERDICTS[rule]
    drop(~is_ok | np.isnan(similarities), "not_scored")
    if curation.min_caption_chars or curation.max_caption_chars is not None:
        lengths = np.fromiter((len(caption.strip()) for caption in captions), np.int64, len(captions))
        longest = math.inf if curation.max_caption_chars is None else curation.max_caption_chars
        drop((lengths < curation.min_caption_chars) | (lengths > longest), "caption_length")
    if cuts.min_similarity is not None:
        drop(similarities < np.float32(cuts.min_similarity), "min_similarity")
    if cuts.fraction is not None:
        drop(~cuts.fraction.keeps(similarities, first_row + np.arange(len(similarities))), "keep_fraction")
    if cuts.random_rate is not None:
        drop(similarities < np.float32(cuts.random_rate), "max_random_rate")
    return verdicts


def judge_picture(curation: Curation, width: int, height: int) -> int:
    """The verdict of the rules on a picture's size in pixels."""
    if width < curation.min_width or height < curation.min_height:
        return VERDICTS["image_size"]
    if curation.max_aspect is not None and max(width, height) > curation.max_aspect * min(width, height):
        return VERDICTS["aspect"]
    return KEPT

"""Which scored rows to keep: the section `curate:`, known recipes, and the rules that look at one row at a time.

Every row gets one verdict, KEPT or the first of RULES that it fails. What one row does to another (duplicates, one
caption per image) is judged afterwards, in addons/curation/duplicates.py, among the rows that are still there.
Similarities are compared as the float32 that they are: a row whose cell says 0.3 passes `min_similarity: 0.3`.
"""
import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from addons.curation import ImageRule, RowRule
from addons.curation.duplicates import ImageFacts
from image_text_sim_clip import EXIT_CONFIG, Column, Json, Trouble, setting

# Verdicts are the numbers of these names; a dropped row shows the first rule it fails.
RULES = ("kept", "not_scored", "caption_length", "min_similarity", "min_contrast", "min_label", "max_label", "min_head",
         "max_head", "keep_fraction", "max_random_rate", "min_precision", "min_recall", "unreadable_image", "image_size",
         "aspect", "one_caption_per_image", "duplicate_image", "duplicate_caption")
VERDICTS = {name: number for number, name in enumerate(RULES)}
KEPT = VERDICTS["kept"]

RULE_TEXTS = {
    "not_scored": "has no similarity: see its status (in a dry run no row has one)",
    "caption_length": "the caption is shorter or longer than allowed",
    "min_similarity": "scores below min_similarity",
    "min_contrast": "has a contrast below min_contrast, or none",
    "min_label": "is less probable to have a label than min_label asks",
    "max_label": "is more probable to have a label than max_label allows",
    "min_head": "gets less from a head than min_head asks",
    "max_head": "gets more from a head than max_head allows",
    "keep_fraction": "is not among the best keep_fraction of the scored rows",
    "max_random_rate": "more than max_random_rate of random pairs score as high",
    "min_precision": "scores below the cut that the marked pairs prove for min_precision",
    "min_recall": "scores below the cut that the marked pairs prove for min_recall",
    "unreadable_image": "the image could not be read again, or is another one than was scored",
    "image_size": "the image is smaller than min_width x min_height",
    "aspect": "the image is longer than max_aspect allows",
    "one_caption_per_image": "another caption of the same image scores higher",
    "duplicate_image": "another row with an equal image scores higher",
    "duplicate_caption": "another row with the same caption scores higher",
}


@dataclasses.dataclass(frozen=True)
class Curation:
    """Every key of config.yaml's section `curate`, which says in a comment what each is for."""

    recipe: Literal["laion-400m", "laion-2b", "datacomp-l14-top30", "dfn-top15", "s-cliploss-l14-top30",
                    "stable-diffusion-v1-2"] | None = None
    recipe_for_any_model: bool = False
    min_similarity: float | None = setting(None, -1, 1)
    min_contrast: float | None = setting(None)
    min_label: dict[str, float] | None = None
    max_label: dict[str, float] | None = None
    min_head: dict[str, float] | None = None
    max_head: dict[str, float] | None = None
    keep_fraction: float | None = setting(None, 0, 1)
    by: str = "similarity"
    max_random_rate: float | None = setting(None, 0, 1)
    labels: str | None = None
    labels_drawn: Literal["by_page", "at_random"] = "by_page"
    min_precision: float | None = setting(None, 0, 1)
    min_recall: float | None = setting(None, 0, 1)
    min_caption_chars: int = setting(0, 0)
    max_caption_chars: int | None = setting(None, 1)
    min_width: int = setting(0, 0)
    min_height: int = setting(0, 0)
    max_aspect: float | None = setting(None, 1)
    one_caption_per_image: bool = False
    duplicate_images: Literal["keep", "exact", "perceptual", "semantic"] = "keep"
    perceptual_distance: int = setting(4, 0, 16)
    semantic_distance: float = setting(0.035, 0, 1)
    duplicate_captions: Literal["keep", "exact"] = "keep"
    export: Literal["csv", "parquet", "imagefolder", "webdataset", "clip-retrieval"] = "csv"
    shard_rows: int = setting(10_000, 1)
    review: bool = False
    review_rows: int = setting(2000, 1, 20_000)

    @property
    def needs_columns(self) -> dict[str, str]:
        """The columns of measures that the rules look at, and for each the key that asks for it."""
        needed = {}
        if self.min_contrast is not None:
            needed["contrast"] = "min_contrast"
        for key in ("min_label", "max_label", "min_head", "max_head"):
            needed |= dict.fromkeys(getattr(self, key) or {}, key)
        if self.keep_fraction is not None and self.by != "similarity":
            needed[self.by] = "by"
        return needed


def looks_at_images(curation: Curation, holds_images: bool) -> bool:
    """Whether a rule looks at the images themselves, so that they are read again.

    Where the table `holds_images`, their names may be no more than those of files in many folders, so their bytes tell
    which rows are of one image.
    """
    if curation.duplicate_images in ("exact", "perceptual") or make_image_rules(curation):
        return True
    return holds_images and asks_for_sources(curation)


def asks_for_sources(curation: Curation) -> bool:
    """Whether a rule asks which rows are of one image."""
    return curation.one_caption_per_image or curation.duplicate_images != "keep"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published way of choosing: the keys that it sets, the model whose cosines it speaks of, and who used it."""

    keys: dict[str, float | str | dict[str, float]]
    model: str
    source: str


RECIPES = {
    "laion-400m": Recipe({"min_similarity": 0.30}, "openai/clip-vit-base-patch32",
                         "LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114)"),
    "laion-2b": Recipe({"min_similarity": 0.28}, "openai/clip-vit-base-patch32",
                       "LAION-5B, its English part (Schuhmann et al. 2022, arXiv 2210.08402)"),
    "datacomp-l14-top30": Recipe({"keep_fraction": 0.3}, "openai/clip-vit-large-patch14",
                                 "DataComp, CLIP score L/14 (Gadre et al. 2023, arXiv 2304.14108)"),
    # the share of each of DataComp's pools that its published lists hold; its filter is a ViT-B/32 of its own
    "dfn-top15": Recipe({"keep_fraction": 0.15}, "apple/DFN-public",
                        "Data Filtering Networks, DFN-2B (Fang et al. 2023, arXiv 2309.17425)"),
    "s-cliploss-l14-top30": Recipe({"keep_fraction": 0.3, "by": "contrast"}, "openai/clip-vit-large-patch14",
                                   "s-CLIPLoss on the scores of OpenAI's L/14 (Wang et al. 2024, arXiv 2405.19547)"),
    # its third condition, a watermark probability below 0.5, came with LAION-5B's own table: max_label, or a column there
    "stable-diffusion-v1-2": Recipe({"min_head": {"aesthetic": 5.0}, "min_width": 512, "min_height": 512},
                                    "openai/clip-vit-large-patch14",
                                    "laion-improved-aesthetics, model card of Stable Diffusion v1-2 (2022)"),
}


def apply_recipe(curation: Curation, model: str) -> Curation:
    """Fill in the keys of the curation's recipe.

    `model` is the one that gave the scores, a Hub id or a folder whose last segment counts. ValueError, with a message
    for the user, when the recipe was made for another (unless `recipe_for_any_model`) or a key says something else.
    """
    if curation.recipe is None:
        return curation
    recipe = RECIPES[curation.recipe]
    if not is_made_for(recipe, model) and not curation.recipe_for_any_model:
        raise ValueError(f"recipe {curation.recipe} was made for {recipe.model}, and these scores are from {model}: cosines of "
                         "two models do not compare (max_random_rate does; recipe_for_any_model: true insists)")
    defaults = Curation()
    for key, value in recipe.keys.items():
        if getattr(curation, key) not in (getattr(defaults, key), value):
            raise ValueError(f"recipe {curation.recipe} sets {key} to {value}; leave {key} out, or the recipe")
    return dataclasses.replace(curation, **recipe.keys)  # type: ignore[arg-type]  # values of these very keys


def is_made_for(recipe: Recipe, model: str) -> bool:
    """Whether the recipe speaks of this model's cosines."""
    return _last_segment(model) == _last_segment(recipe.model)


def _last_segment(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def check_columns(curation: Curation, measures: Json, columns: Sequence[Column]) -> None:
    """Trouble (exit 2) for a rule on a column that the scores do not have, and for a limit that is no number.

    `measures` is the section of that name that the rows were scored with, `columns` are those that it gave them.
    """
    for key, measure in (("min_label", "labels"), ("max_label", "labels"), ("min_head", "heads"), ("max_head", "heads")):
        for name, limit in (getattr(curation, key) or {}).items():
            if name not in (measures.get(measure) or {}):
                raise Trouble(EXIT_CONFIG, f"curate.{key}: {name!r} is none of these scores' {measure}: "
                                           f"{', '.join(measures.get(measure) or {}) or 'they have none'}")
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not math.isfinite(limit):
                raise Trouble(EXIT_CONFIG, f"curate.{key}.{name} must be a number, got {limit!r}")
    if curation.by != "similarity" and curation.keep_fraction is None:
        raise Trouble(EXIT_CONFIG, f"curate.by: {curation.by} needs keep_fraction, the share to keep")
    known = [column.name for column in columns if column.type == "float"]
    for name, key in curation.needs_columns.items():
        if name not in known:
            raise Trouble(EXIT_CONFIG, f"curate.{key}: these scores have no column {name!r} of a measure, only "
                                       f"{', '.join(['similarity', *known])}; the key `measures` adds some while rows are "
                                       "scored")


def find_limits(curation: Curation, column: str) -> list[float]:
    """Where rules cut a measure's column, the least and the most; none where no rule looks at it."""
    if column == "contrast":
        return [] if curation.min_contrast is None else [curation.min_contrast]
    sections = (curation.min_label, curation.max_label, curation.min_head, curation.max_head)
    return [limits[column] for limits in sections if limits and column in limits]


# ── The best fraction, exactly and in constant memory ─────────────────────────────────────────────────────────────────

def order_keys(similarities: np.ndarray) -> np.ndarray:
    """float32 (n,) without NaN -> uint32 (n,) in the same order: their bits, turned so that they count upwards."""
    bits = (np.asarray(similarities, np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def similarity_of_key(key: int) -> float:
    """The float32 whose order key this is."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


@dataclasses.dataclass(frozen=True)
class FractionCut:
    """The best rows by a column: all above `key`, and those at `key` up to and including row `last_row`."""

    key: int
    last_row: int
    column: str = "similarity"

    def keeps(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Tell which rows, given by their values (n,), NaN for none, and row numbers (n,), are among the best: bool (n,)."""
        keys = order_keys(values)
        return ~np.isnan(values) & ((keys > self.key) | ((keys == self.key) & (rows <= self.last_row)))

    @property
    def lowest(self) -> float | None:
        """The lowest value that is kept; None where the fraction is of less than a row, and nothing is."""
        return similarity_of_key(self.key) if self.last_row >= 0 else None


Chunks = Callable[[], Iterable[np.ndarray]]


def find_fraction_cut(chunks: Chunks, fraction: float, column: str = "similarity") -> FractionCut:
    """Find the cut that keeps exactly floor(fraction x rows with a value): the highest, and of equal ones the first rows.

    `chunks()` gives the values of all rows in `column`, in input order, as float32 arrays of any length with NaN for a row
    without one; it is called three times. One pass counts the upper half of each order key, one the lower half within
    the decisive upper half, one finds the row at which the ties run out: 1 MB of counts for any number of rows.
    """
    upper = np.zeros(1 << 16, np.int64)
    for similarities in chunks():
        upper += np.bincount(order_keys(_scored(similarities)) >> 16, minlength=1 << 16)
    # the fraction as it is written: 0.7 of 10 is 7, though the nearest float lies a little below 0.7
    wanted = math.floor(Fraction(str(fraction)) * int(upper.sum()))
    if not wanted:
        return FractionCut(0xFFFFFFFF, -1, column)
    half, above_half = _find_decisive(upper, wanted)
    lower = np.zeros(1 << 16, np.int64)
    for similarities in chunks():
        keys = order_keys(_scored(similarities))
        lower += np.bincount(keys[keys >> 16 == half] & 0xFFFF, minlength=1 << 16)
    rest, above_rest = _find_decisive(lower, wanted - above_half)
    key = half << 16 | rest
    return FractionCut(key, _find_last_tie(chunks, key, wanted - above_half - above_rest), column)


def _scored(similarities: np.ndarray) -> np.ndarray:
    return similarities[~np.isnan(similarities)]


def _find_decisive(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Find the highest bin such that it and those above hold at least `wanted`; also return how many lie above it."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, wanted))
    decisive = len(counts) - 1 - place
    return decisive, int(reached[place] - counts[decisive])


def _find_last_tie(chunks: Chunks, key: int, ties: int) -> int:
    """Find the row number of the `ties`-th row whose similarity has this order key."""
    first_row = 0
    for similarities in chunks():
        at_key = np.flatnonzero(~np.isnan(similarities) & (order_keys(similarities) == key))
        if len(at_key) >= ties:
            return first_row + int(at_key[ties - 1])
        ties -= len(at_key)
        first_row += len(similarities)
    raise AssertionError("the chunks were not the same in each pass")


# ── Rules for one row ─────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where the rules on similarity cut; None for a rule that is not asked for."""

    min_similarity: float | None = None
    fraction: FractionCut | None = None
    random_rate: float | None = None  # the similarity that at most max_random_rate of random pairs reach
    min_precision: float | None = None  # the similarity for which marked pairs prove it
    min_recall: float | None = None  # likewise

    @property
    def similarity(self) -> float | None:
        """The strictest of them, as a similarity; a fraction by another column is none."""
        fraction = None
        if self.fraction and self.fraction.column == "similarity":
            fraction = self.fraction.lowest
        given = [self.min_similarity, fraction, self.random_rate, self.min_precision, self.min_recall]
        return max((cut for cut in given if cut is not None), default=None)


class ScoredRows(NamedTuple):
    """What a `RowRule` sees of n rows that follow each other."""

    first_row: int  # its number in the input
    similarities: np.ndarray  # float32 (n,), NaN for none
    is_ok: np.ndarray  # bool (n,): whether the status is ok
    captions: Callable[[], list[str]]  # gives n, to the rules that read them
    further: Mapping[str, np.ndarray] = types.MappingProxyType({})  # columns of measures: float32 (n,), NaN for none

    def values(self, column: str) -> np.ndarray:
        """The similarities, or a measure's column: float32 (n,)."""
        return self.similarities if column == "similarity" else self.further[column]


@dataclasses.dataclass(frozen=True)
class NotScored:
    """Drops a row without a similarity."""

    name: ClassVar[str] = "not_scored"

    def fails(self, rows: ScoredRows) -> np.ndarray:
        """Tell which rows have no score: bool (n,)."""
        return ~rows.is_ok | np.isnan(rows.similarities)


@dataclasses.dataclass(frozen=True)
class CaptionLength:
    """Drops a caption of fewer or more characters than allowed, white space around it aside."""

    fewest: int
    most: int | None
    name: ClassVar[str] = "caption_length"

    def fails(self, rows: ScoredRows) -> np.ndarray:
        """Tell which captions are too short or too long: bool (n,)."""
        lengths = np.fromiter((len(caption.strip()) for caption in rows.captions()), np.int64, len(rows.is_ok))
        most = math.inf if self.most is None else self.most
        return (lengths < self.fewest) | (lengths > most)


@dataclasses.dataclass(frozen=True)
class SimilarityBelow:
    """Drops what scores below a cut, by the name of the rule that set the cut."""

    name: str
    cut: float

    def fails(self, rows: ScoredRows) -> np.ndarray:
        """Tell which rows score lower, compared as float32: bool (n,)."""
        return rows.similarities < np.float32(self.cut)


@dataclasses.dataclass(frozen=True)
class ColumnOutside:
    """Drops what a measure's column places outside [least, most], and rows without a value there."""

    name: str
    column: str
    least: float = -math.inf
    most: float = math.inf

    def fails(self, rows: ScoredRows) -> np.ndarray:
        """Tell which rows have a lower, a higher or no value, compared as float32: bool (n,)."""
        values = rows.values(self.column)
        return ~((values >= np.float32(self.least)) & (values <= np.float32(self.most)))


@dataclasses.dataclass(frozen=True)
class OutsideFraction:
    """Drops what is not among the best rows."""

    cut: FractionCut
    name: ClassVar[str] = "keep_fraction"

    def fails(self, rows: ScoredRows) -> np.ndarray:
        """Tell which rows are not among the best: bool (n,)."""
        numbers = rows.first_row + np.arange(len(rows.similarities))
        return ~self.cut.keeps(rows.values(self.cut.column), numbers)


def make_row_rules(curation: Curation, cuts: Cuts) -> list[RowRule]:
    """The rules for one row that the keys ask for, in the order in which they are applied."""
    made: list[RowRule] = [NotScored()]
    if curation.min_caption_chars or curation.max_caption_chars is not None:
        made.append(CaptionLength(curation.min_caption_chars, curation.max_caption_chars))
    if cuts.min_similarity is not None:
        made.append(SimilarityBelow("min_similarity", cuts.min_similarity))
    if curation.min_contrast is not None:
        made.append(ColumnOutside("min_contrast", "contrast", least=curation.min_contrast))
    for name, limits in (("min_label", curation.min_label), ("min_head", curation.min_head)):
        made += [ColumnOutside(name, column, least=limit) for column, limit in (limits or {}).items()]
    for name, limits in (("max_label", curation.max_label), ("max_head", curation.max_head)):
        made += [ColumnOutside(name, column, most=limit) for column, limit in (limits or {}).items()]
    if cuts.fraction is not None:
        made.append(OutsideFraction(cuts.fraction))
    if cuts.random_rate is not None:
        made.append(SimilarityBelow("max_random_rate", cuts.random_rate))
    if cuts.min_precision is not None:
        made.append(SimilarityBelow("min_precision", cuts.min_precision))
    if cuts.min_recall is not None:
        made.append(SimilarityBelow("min_recall", cuts.min_recall))
    return made


def find_failures(row_rules: Sequence[RowRule], rows: ScoredRows) -> dict[str, np.ndarray]:
    """For each rule's name, in the order in which they are applied, which rows fail it: bool (n,)."""
    failures: dict[str, np.ndarray] = {}
    for rule in row_rules:
        fails = rule.fails(rows)
        failures[rule.name] = failures[rule.name] | fails if rule.name in failures else fails
    return failures


def judge_failures(failures: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Verdicts, uint8 (count,): for each row the first rule that it fails, or KEPT."""
    verdicts = np.full(count, KEPT, np.uint8)
    for name, fails in failures.items():
        verdicts[fails & (verdicts == KEPT)] = VERDICTS[name]
    return verdicts


# ── Rules for one image ───────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class SmallImage:
    """Drops an image that is narrower or lower than asked, in pixels."""

    min_width: int
    min_height: int
    name: ClassVar[str] = "image_size"

    def fails(self, facts: ImageFacts) -> bool:
        """Tell whether the image is too small."""
        return facts.width < self.min_width or facts.height < self.min_height


@dataclasses.dataclass(frozen=True)
class LongImage:
    """Drops an image whose longer side is more than `max_aspect` times the shorter one."""

    max_aspect: float
    name: ClassVar[str] = "aspect"

    def fails(self, facts: ImageFacts) -> bool:
        """Tell whether the image is too long."""
        return max(facts.width, facts.height) > self.max_aspect * min(facts.width, facts.height)


def make_image_rules(curation: Curation) -> list[ImageRule]:
    """The rules for one image that the keys ask for, in the order in which they are applied."""
    made: list[ImageRule] = []
    if curation.min_width or curation.min_height:
        made.append(SmallImage(curation.min_width, curation.min_height))
    if curation.max_aspect is not None:
        made.append(LongImage(curation.max_aspect))
    return made


def judge_image(image_rules: Sequence[ImageRule], facts: ImageFacts | None) -> int:
    """The verdict on a row by its image: the first rule that it fails, or KEPT. None: the image could not be read."""
    if facts is None:
        return VERDICTS["unreadable_image"]
    for rule in image_rules:
        if rule.fails(facts):
            return VERDICTS[rule.name]
    return KEPT


# ── What was chosen ───────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class Choice:
    """What the rules did to the table, as curated.json holds it."""

    rows: int
    scored: int
    kept: int
    dropped: dict[str, int]  # by rule, those that dropped any
    cut_similarity: float | None  # the strictest cut
    random_pairs_at_cut: float | None  # the share of random pairs that reach it, in [0, 1]
    random_pairs: Json | None  # their entry in profile.json
    model: str
    curate: Json  # the section, with the recipe's keys
    alone: dict[str, int]  # by rule on one row: the scored rows that it would drop if it were the only one
    overlap: dict[str, dict[str, int]]  # by two such rules: the scored rows that fail both
    together: int  # the scored rows that fail any of these rules
    exported: int = 0
    not_exported: int = 0  # kept rows whose image is gone
    labels: Json | None = None  # the cut that marked pairs prove: a marks.ProvedCut

    def tell(self) -> str:
        """One line for people: how many rows stay, and what the cut means."""
        text = f"{self.kept:,} of {self.scored:,} scored rows kept"
        if self.scored:
            text += f" ({100 * self.kept / self.scored:.1f} %)"
        if self.cut_similarity is not None:
            text += f", cut at similarity {self.cut_similarity:.4f}"
        if self.random_pairs_at_cut is not None:
            text += f", which {100 * self.random_pairs_at_cut:.2f} % of random pairs reach"
        return text

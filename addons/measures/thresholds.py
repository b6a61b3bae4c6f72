"""Published thresholds: where others have cut the scores of this very model, and how many rows of this run pass there.

A cosine means something for one model only, so each entry names its model; the scores of any other model have none. The
entries are the recipes of `curate.py` that look at nothing but similarity: a cosine (LAION) or a share of the rows (DataComp,
DFN). A share is turned into the similarity of this run that it keeps, within a bin of the histogram (0.0005).
"""
import dataclasses
from collections.abc import Iterable

import numpy as np

from addons.curation.rules import RECIPES, Recipe, is_made_for
from addons.measures import Measure, Measured, kept_by
from addons.measures.random_pairs import Histogram, RandomPairs, merge_histograms, quantile
from image_text_sim_clip import Config, Json, PartitionRun, Scored


def find_recipes(model: str) -> dict[str, Recipe]:
    """The recipes by similarity alone that were made for `model`, a Hub id or a folder whose last segment counts."""
    return {name: recipe for name, recipe in RECIPES.items()
            if recipe.keys.keys() in ({"min_similarity"}, {"keep_fraction"}) and is_made_for(recipe, model)}


@dataclasses.dataclass
class Passing:
    """The rows of the whole run: how many pass each recipe's cosine, of how many, and the histogram of their scores."""

    model: str
    rows_of: dict[str, int] = dataclasses.field(default_factory=dict)
    scored: int = 0
    matched: Histogram = dataclasses.field(default_factory=Histogram)


class PublishedThresholds(Measure):
    """`published_thresholds` in profile.json and the summary; no column."""

    name = "published_thresholds"
    stage = "score"

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """For the models that a threshold was published for."""
        return bool(find_recipes(config.pretrained_model))

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Count the rows at or above each cosine, compared as float32."""
        earlier = kept_by(PublishedThresholds, run.earlier) or {"rows": {}}
        counts = {}
        for name, recipe in find_recipes(self.config.pretrained_model).items():
            if "min_similarity" in recipe.keys:
                passes = scored.cosines >= np.float32(recipe.keys["min_similarity"])  # type: ignore[arg-type]  # a number
                counts[name] = int(passes.sum()) + earlier["rows"].get(name, 0)
        return Measured({}, {"model": self.config.pretrained_model, "rows": counts})

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> Passing | None:
        """The counts of all parts; None where no part has any."""
        total: Passing | None = None
        for part in parts:
            kept = kept_by(cls, part)
            if not kept:
                continue
            total = total or Passing(kept["model"])
            total.scored += part["similarity_count"]
            for name, rows in kept["rows"].items():
                total.rows_of[name] = total.rows_of.get(name, 0) + rows
            pairs = kept_by(RandomPairs, part)
            if pairs:
                total.matched = merge_histograms((total.matched, Histogram.from_json(pairs["matched"])))
        return total

    @classmethod
    def describe(cls, total: Passing | None) -> Json | None:
        """By a recipe's name: what it cuts by, the share of the scored rows that it keeps here, where it cuts, its source."""
        if total is None or not total.scored:
            return None
        entry: Json = {}
        for name, recipe in find_recipes(total.model).items():
            entry[name] = {**recipe.keys, "source": recipe.source}
            if name in total.rows_of:
                entry[name] |= {"rows": total.rows_of[name], "share": total.rows_of[name] / total.scored}
            elif total.matched.count:
                fraction = float(recipe.keys["keep_fraction"])  # type: ignore[arg-type]  # a number
                entry[name] |= {"share": fraction, "similarity": quantile(total.matched, 1 - fraction)}
        return entry

    @classmethod
    def tell(cls, entry: Json) -> str:
        """The line of the summary."""
        return "; ".join(_tell_one(name, of_one) for name, of_one in entry.items())


def _tell_one(name: str, entry: Json) -> str:
    if "min_similarity" in entry:
        return f"{name} keeps {entry['share']:.1%}, at or above {entry['min_similarity']:.2f} ({entry['source']})"
    where = f", here from {entry['similarity']:.4f} on" if "similarity" in entry else ""
    return f"{name} keeps the best {entry['keep_fraction']:.0%}{where} ({entry['source']})"


MEASURE = PublishedThresholds

"""Drift: by how much scores differ from those of a more exact way of computing them. Used by passport.py and embeddings.py."""
import math
from collections.abc import Iterable, Sequence

import numpy as np

from addons.measures import Measure, kept_by
from image_text_sim_clip import Json


class DriftMeasure(Measure):
    """A measure that scores some rows in two ways and tells the difference over all parts; it has no columns."""

    @classmethod
    def pairs_of(cls, kept: Json) -> list[list[float]]:
        """[score, reference score] of the rows of a part that were scored both ways, from what the measure keeps in it."""
        raise NotImplementedError

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> list[list[float]] | None:
        """[score, reference score] of all rows that were scored both ways; None where no part kept any."""
        entries = [kept for kept in (kept_by(cls, part) for part in parts) if kept]
        if not entries:
            return None
        pairs = []
        for kept in entries:
            pairs += cls.pairs_of(kept)
        return pairs

    @classmethod
    def describe(cls, total: list[list[float]] | None) -> Json | None:
        """The drift over all these rows; None where no part kept any."""
        return None if total is None else compare_pairs(total)

    @classmethod
    def tell(cls, entry: Json) -> str:
        """The line of the summary."""
        return describe_drift(entry)


def compare_scores(scores: Sequence[float], references: Sequence[float]) -> Json:
    """What a change of score comes to, of n rows scored both ways.

    `max_difference` and `p99_difference` are the largest and the 99th percentile of |score - reference|;
    `rank_correlation` is Spearman's, in which ties get their mean rank, and None where either side is constant;
    `top_30_percent_changed` is the share of the top 30 % by reference that is not in the top 30 % by score.
    Of no rows, all but `rows` are None.
    """
    ours = np.asarray(scores, np.float64)
    theirs = np.asarray(references, np.float64)
    if not len(ours):
        return {"rows": 0, "max_difference": None, "p99_difference": None, "rank_correlation": None,
                "top_30_percent_changed": None}
    difference = np.abs(ours - theirs)
    top = math.ceil(0.3 * len(ours))
    lost = _find_best(theirs, top) - _find_best(ours, top)
    return {"rows": len(ours), "max_difference": float(difference.max()),
            "p99_difference": float(np.percentile(difference, 99)),
            "rank_correlation": _correlate_ranks(ours, theirs),
            "top_30_percent_changed": len(lost) / top}


def compare_pairs(pairs: Sequence[Sequence[float]]) -> Json:
    """`compare_scores` of [score, reference] pairs."""
    return compare_scores([score for score, _ in pairs], [reference for _, reference in pairs])


def _find_best(values: np.ndarray, count: int) -> set[int]:
    """The places of the `count` highest values; of equal ones the first."""
    return set(np.argsort(-values, kind="stable")[:count].tolist())


def _correlate_ranks(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where either side is constant."""
    import pandas as pd
    first_ranks = pd.Series(first).rank()
    second_ranks = pd.Series(second).rank()
    if first_ranks.nunique() == 1 or second_ranks.nunique() == 1:
        return None
    return float(first_ranks.corr(second_ranks))


def describe_drift(drift: Json) -> str:
    """One line of what `compare_scores` returns."""
    if not drift["rows"]:
        return "no row was scored twice"
    correlation = "undefined" if drift["rank_correlation"] is None else f"{drift['rank_correlation']:.4f}"
    return (f"{drift['rows']} rows, |difference| {drift['max_difference']:.1e} at most, 99 % below "
            f"{drift['p99_difference']:.1e}, rank correlation {correlation}, top 30 %: "
            f"{drift['top_30_percent_changed']:.1%} changed")

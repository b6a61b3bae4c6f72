"""Count, mean and standard deviation of a measure's column, kept in each part and added up over the parts."""
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from image_text_sim_clip import Json


@dataclasses.dataclass(frozen=True)
class Moments:
    """What n values come to: their sum and sum of squares in float64, and how many scored rows have no value."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    without: int = 0

    @classmethod
    def of(cls, values: np.ndarray, is_scored: np.ndarray) -> "Moments":
        """The moments of the column `values` (n,) float32, NaN for none; `is_scored` (n,) says which rows have a similarity."""
        present = np.asarray(values, np.float64)[np.isfinite(values)]
        return cls(len(present), float(present.sum()), float((present * present).sum()), int(is_scored.sum()) - len(present))

    @classmethod
    def from_json(cls, content: Json) -> "Moments":
        """Read what `to_json` wrote."""
        return cls(content["count"], content["sum"], content["sum_of_squares"], content["without"])

    def to_json(self) -> Json:
        """An object for a part's metadata."""
        return {"count": self.count, "sum": self.total, "sum_of_squares": self.squares, "without": self.without}

    def describe(self) -> Json:
        """The entry of profile.json: how many rows have a value, the values' mean and standard deviation (None of none)."""
        if not self.count:
            return {"rows": 0, "without": self.without, "mean": None, "sd": None}
        mean = self.total / self.count
        sd = math.sqrt(max(0.0, self.squares / self.count - mean ** 2))
        return {"rows": self.count, "without": self.without, "mean": mean, "sd": sd}


def add_moments(entries: Iterable[Moments]) -> Moments:
    """The moments of all values together."""
    total = Moments()
    for entry in entries:
        total = Moments(total.count + entry.count, total.total + entry.total, total.squares + entry.squares,
                        total.without + entry.without)
    return total


def tell_moments(entry: Json) -> str:
    """A few words on what `Moments.describe` says: "mean 0.1234, sd 0.0567"."""
    if not entry["rows"]:
        return "no row has a value"
    return f"mean {entry['mean']:.4f}, sd {entry['sd']:.4f}"

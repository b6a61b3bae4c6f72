"""The null: how high do captions score that have nothing to do with the image?

A similarity means little by itself: 0.25 is high for one model and low for another. So, while a partition is scored, each
of its images is also scored against captions of other rows, with the embeddings that are there already. What comes out
is a histogram of random pairs to hold the matched ones against: `random_percentile` is the share of random pairs that
score below, and "at most 1 % of random pairs would pass" is a threshold that means the same for every model.

A random pair is a distinct image with a distinct caption of the same partition. Pairs that stand together anywhere in the
partition are left out, and equal images or captions count once, so that a caption used a thousand times is one caption.
Which pairs are drawn depends on the partition's rows alone, not on batches, threads or the device.

Histograms have BINS bins over [-1, 1], each RESOLUTION = 1/2048 wide (a power of two, so that a float32 falls into its
bin exactly). Partitions are merged by a plain sum, in the same memory for any number of rows; quantiles and shares read
from the sum are within one bin, 0.0005, of the true ones.
"""
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

BINS = 4096
RESOLUTION = 2.0 / BINS  # cosine units
EDGES = np.linspace(-1.0, 1.0, BINS + 1)  # exact in float32 too
CAPTIONS_PER_IMAGE = 256  # of other rows, at most: 10,000 images give 2.5 million random pairs
IMAGES_PER_CHUNK = 256  # of one matrix product

QUANTILES = {"q95": 0.95, "q99": 0.99, "q99.9": 0.999}


@dataclasses.dataclass
class Histogram:
    """Cosines counted in BINS bins over [-1, 1]: `counts` (BINS,) int64, and their sum and sum of squares in float64."""

    counts: Any = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    squares: float = 0.0

    def add(self, cosines: Any) -> None:
        """Count the finite ones of `cosines`, an array of any shape with values in [-1, 1]."""
        values = np.asarray(cosines, np.float64).ravel()
        values = values[np.isfinite(values)]
        bins = np.clip(np.floor(values * (BINS / 2)) + BINS // 2, 0, BINS - 1).astype(np.int64)
        self.counts += np.bincount(bins, minlength=BINS)
        self.total += float(values.sum())
        self.squares += float((values * values).sum())

    @property
    def count(self) -> int:
        """How many cosines were counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """The mean cosine; NaN of none."""
        return self.total / self.count if self.count else math.nan

    @property
    def sd(self) -> float:
        """The standard deviation (divided by n); NaN of none."""
        return math.sqrt(max(0.0, self.squares / self.count - self.mean ** 2)) if self.count else math.nan

    def share_at_or_above(self, cosine: float) -> float:
        """The share of the counted ones in the bin of `cosine` and above (all of them, where it is a bin's lower edge)."""
        first = max(0, int(np.searchsorted(EDGES, cosine, "right")) - 1)
        return int(self.counts[first:].sum()) / self.count if self.count else math.nan

    def to_json(self) -> dict:
        """A compact object for the part's JSON: the counts from the first occupied bin to the last, as one line of text."""
        occupied = np.flatnonzero(self.counts)
        first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
        return {"bins": BINS, "first": first, "counts": " ".join(map(str, self.counts[first:last].tolist())),
                "sum": self.total, "sum_of_squares": self.squares}

    @classmethod
    def from_json(cls, content: dict) -> "Histogram":
        """Read what `to_json` wrote; ValueError for another number of bins."""
        if content["bins"] != BINS:
            raise ValueError(f"a histogram of {content['bins']} bins, not {BINS}")
        histogram, counts = cls(total=content["sum"], squares=content["sum_of_squares"]), content["counts"].split()
        histogram.counts[content["first"]:content["first"] + len(counts)] = np.array(counts, np.int64)
        return histogram


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """One histogram of all that the given ones counted."""
    merged = Histogram()
    for histogram in histograms:
        merged.counts += histogram.counts
        merged.total += histogram.total
        merged.squares += histogram.squares
    return merged


def quantile(histogram: Histogram, share: float) -> float:
    """The cosine below which `share` in [0, 1] of the counted ones lie, within RESOLUTION; NaN of none."""
    if not histogram.count:
        return math.nan
    below = np.concatenate([[0], np.cumsum(histogram.counts)])  # (BINS + 1,) how many lie below each edge
    wanted = share * histogram.count
    lowest = int(np.flatnonzero(histogram.counts)[0])
    bin_ = max(lowest, int(np.searchsorted(below, wanted, "left")) - 1)
    inside = histogram.counts[bin_]
    return float(EDGES[bin_] + RESOLUTION * (wanted - below[bin_]) / inside) if inside else float(EDGES[bin_])


def share_below(histogram: Histogram, cosines: Any) -> Any:
    """For each of `cosines` (n,), the share of the counted ones that lie below it: float32 (n,) in [0, 1].

    Within its bin a cosine is taken to lie as far up as the bin's values are evenly spread. NaN gives NaN, and so does
    an empty histogram.
    """
    values = np.asarray(cosines, np.float64)
    if not histogram.count:
        return np.full(values.shape, np.nan, np.float32)
    below = np.concatenate([[0], np.cumsum(histogram.counts)])
    return np.interp(values, EDGES, below / histogram.count).astype(np.float32)


def threshold_for_rate(histogram: Histogram, rate: float) -> float:
    """The lowest bin edge that at most the share `rate` of the counted ones reach: exact, never more; NaN of none.

    Where even the highest bin holds more than that, it is the float32 after 1, which nothing reaches.
    """
    if not histogram.count:
        return math.nan
    at_or_above = np.concatenate([np.cumsum(histogram.counts[::-1])[::-1], [0]])  # (BINS + 1,) how many reach each edge
    first = int(np.argmax(at_or_above <= rate * histogram.count))
    return float(EDGES[first]) if first < BINS else float(np.nextafter(np.float32(1), np.float32(2)))


def count_random_pairs(image_embeddings: Any, text_embeddings: Any, image_rows: Any, text_rows: Any) -> Histogram:
    """Cosines of the partition's images with captions of other rows.

    `image_embeddings` (m, d) and `text_embeddings` (k, d) are unit vectors, float32; `image_rows` and `text_rows` (n,) say
    which image and which caption make each scored row, equal ones having the same number. Images are taken in chunks of
    IMAGES_PER_CHUNK; each chunk meets CAPTIONS_PER_IMAGE captions spread evenly over the k, starting one further per chunk.
    So at most m x 256 dot products are made, in matrix products of 256 x 256.
    """
    histogram, captions = Histogram(), len(text_embeddings)
    if not captions:
        return histogram
    matched = np.unique(np.asarray(image_rows, np.int64) * captions + np.asarray(text_rows, np.int64))
    drawn = min(captions, CAPTIONS_PER_IMAGE)
    spread = np.arange(drawn) * captions // drawn  # (drawn,) distinct, from 0 to k - 1
    for number, start in enumerate(range(0, len(image_embeddings), IMAGES_PER_CHUNK)):
        images = np.arange(start, min(start + IMAGES_PER_CHUNK, len(image_embeddings)))
        texts = (spread + number) % captions
        cosines = image_embeddings[images] @ text_embeddings[texts].T  # (chunk, drawn)
        pairs = images[:, None] * captions + texts
        places = np.minimum(np.searchsorted(matched, pairs), len(matched) - 1)
        is_random = matched[places] != pairs if len(matched) else np.ones(pairs.shape, bool)
        histogram.add(np.clip(cosines[is_random], -1, 1))
    return histogram


def describe_partition(image_embeddings: Any, text_embeddings: Any, image_rows: Any, text_rows: Any, cosines: Any,
                       before: dict | None = None) -> dict:
    """What a part's JSON holds under "null": the histograms of its random and of its matched pairs (`cosines`, (n,)).

    `before` is that of rows of the same partition that were scored in an earlier run; it is added.
    """
    matched = Histogram()
    matched.add(cosines)
    random = count_random_pairs(image_embeddings, text_embeddings, image_rows, text_rows)
    if before:
        random, matched = (merge((one, Histogram.from_json(before[name]))) for name, one in (("random", random),
                                                                                          ("matched", matched)))
    return {"random": random.to_json(), "matched": matched.to_json()}


@dataclasses.dataclass(frozen=True)
class Null:
    """The whole run's two histograms, merged from its parts."""

    random: Histogram
    matched: Histogram

    @classmethod
    def merge_parts(cls, parts: Iterable[dict | None]) -> "Null | None":
        """Add up what the parts' JSON objects hold under "null"; None for a dry run, and where not every score is counted.

        The latter happens to a run that was begun without this file beside the script.
        """
        random, matched, scored = Histogram(), Histogram(), 0
        for part in parts:
            if not part or not part["similarity_count"]:
                continue
            if not part.get("null"):
                return None
            random = merge((random, Histogram.from_json(part["null"]["random"])))
            matched = merge((matched, Histogram.from_json(part["null"]["matched"])))
            scored += part["similarity_count"]
        return cls(random, matched) if scored and matched.count == scored else None

    def describe(self) -> dict | None:
        """Mean, sd, QUANTILES and number of the random pairs, for profile.json; None without any."""
        if not self.random.count:
            return None
        return {"pairs": self.random.count, "mean": self.random.mean, "sd": self.random.sd, "resolution": RESOLUTION,
                **{name: quantile(self.random, share) for name, share in QUANTILES.items()}}

    def percentiles(self, cosines: Any) -> tuple[Any, Any]:
        """For each cosine the share of the run's scored rows, and of random pairs, that lie below it: float32 (n,) each."""
        return share_below(self.matched, cosines), share_below(self.random, cosines)

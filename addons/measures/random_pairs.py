"""Random pairs: how high do captions score that have nothing to do with the image?

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
from typing import TYPE_CHECKING

import numpy as np

from addons.measures import Measure, Measured, kept_by
from image_text_sim_clip import Config, Json, PartitionRun, Scored

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

BINS = 4096
RESOLUTION = 2.0 / BINS  # cosine units
EDGES = np.linspace(-1.0, 1.0, BINS + 1)  # exact in float32 too
CAPTIONS_PER_IMAGE = 256  # of other rows, at most: 10,000 images give 2.5 million random pairs
IMAGES_PER_CHUNK = 256  # of one matrix product

QUANTILES = {"q95": 0.95, "q99": 0.99, "q99.9": 0.999}


# ── Histograms ────────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass
class Histogram:
    """Cosines counted in BINS bins over [-1, 1]: `counts` (BINS,) int64, and their sum and sum of squares in float64."""

    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))
    total: float = 0.0
    squares: float = 0.0

    def add(self, cosines: "npt.ArrayLike") -> None:
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
        if not self.count:
            return math.nan
        return math.sqrt(max(0.0, self.squares / self.count - self.mean ** 2))

    def share_at_or_above(self, cosine: float) -> float:
        """The share of the counted ones in the bin of `cosine` and above (all of them, where it is a bin's lower edge)."""
        if not self.count:
            return math.nan
        first = max(0, int(np.searchsorted(EDGES, cosine, "right")) - 1)
        return int(self.counts[first:].sum()) / self.count

    def to_json(self) -> Json:
        """A compact object for a part's metadata: the counts from the first occupied bin to the last, as one line of text."""
        occupied = np.flatnonzero(self.counts)
        first = int(occupied[0]) if len(occupied) else 0
        stop = int(occupied[-1]) + 1 if len(occupied) else 0
        return {"bins": BINS, "first": first, "counts": " ".join(map(str, self.counts[first:stop].tolist())),
                "sum": self.total, "sum_of_squares": self.squares}

    @classmethod
    def from_json(cls, content: Json) -> "Histogram":
        """Read what `to_json` wrote; ValueError for another number of bins."""
        if content["bins"] != BINS:
            raise ValueError(f"a histogram of {content['bins']} bins, not {BINS}")
        histogram = cls(total=content["sum"], squares=content["sum_of_squares"])
        counts = content["counts"].split()
        first = content["first"]
        histogram.counts[first:first + len(counts)] = np.array(counts, np.int64)
        return histogram


def merge_histograms(histograms: Iterable[Histogram]) -> Histogram:
    """One histogram of all that the given ones counted."""
    merged = Histogram()
    for histogram in histograms:
        merged.counts += histogram.counts
        merged.total += histogram.total
        merged.squares += histogram.squares
    return merged


def _count_below_edges(histogram: Histogram) -> np.ndarray:
    """(BINS + 1,): how many of the counted ones lie below each of EDGES."""
    return np.concatenate([[0], np.cumsum(histogram.counts)])


def quantile(histogram: Histogram, share: float) -> float:
    """The cosine below which `share` in [0, 1] of the counted ones lie, within RESOLUTION; NaN of none."""
    if not histogram.count:
        return math.nan
    below = _count_below_edges(histogram)
    wanted = share * histogram.count
    lowest = int(np.flatnonzero(histogram.counts)[0])
    bin_ = max(lowest, int(np.searchsorted(below, wanted, "left")) - 1)
    in_bin = histogram.counts[bin_]
    if not in_bin:
        return float(EDGES[bin_])
    return float(EDGES[bin_] + RESOLUTION * (wanted - below[bin_]) / in_bin)


def share_below(histogram: Histogram, cosines: "npt.ArrayLike") -> np.ndarray:
    """For each of `cosines` (n,), the share of the counted ones that lie below it: float32 (n,) in [0, 1].

    Within its bin a cosine is taken to lie as far up as the bin's values are evenly spread. NaN gives NaN, and so does
    an empty histogram.
    """
    values = np.asarray(cosines, np.float64)
    if not histogram.count:
        return np.full(values.shape, np.nan, np.float32)
    return np.interp(values, EDGES, _count_below_edges(histogram) / histogram.count).astype(np.float32)


def threshold_for_rate(histogram: Histogram, rate: float) -> float:
    """The lowest bin edge that at most the share `rate` of the counted ones reach: exact, never more; NaN of none.

    Where even the highest bin holds more than that, it is the float32 after 1, which nothing reaches.
    """
    if not histogram.count:
        return math.nan
    at_or_above = np.concatenate([np.cumsum(histogram.counts[::-1])[::-1], [0]])  # (BINS + 1,) how many reach each edge
    first = int(np.argmax(at_or_above <= rate * histogram.count))
    if first == BINS:
        return float(np.nextafter(np.float32(1), np.float32(2)))
    return float(EDGES[first])


# ── Drawing random pairs ──────────────────────────────────────────────────────────────────────────────────────────────

def count_random_pairs(image_embeddings: np.ndarray, text_embeddings: np.ndarray, image_rows: "npt.ArrayLike",
                       text_rows: "npt.ArrayLike") -> Histogram:
    """Cosines of the partition's images with captions of other rows.

    `image_embeddings` (m, d) and `text_embeddings` (k, d) are unit vectors, float32; `image_rows` and `text_rows` (n,) say
    which image and which caption make each scored row, equal ones having the same number. Images are taken in chunks of
    IMAGES_PER_CHUNK; each chunk meets CAPTIONS_PER_IMAGE captions spread evenly over the k, starting one further per chunk.
    So at most m x 256 dot products are made, in matrix products of 256 x 256.
    """
    histogram = Histogram()
    captions = len(text_embeddings)
    if not captions:
        return histogram
    # a pair is one number: its image's times k, plus its caption's
    matched = np.unique(np.asarray(image_rows, np.int64) * captions + np.asarray(text_rows, np.int64))
    drawn = min(captions, CAPTIONS_PER_IMAGE)
    spread = np.arange(drawn) * captions // drawn  # (drawn,) distinct, from 0 to k - 1
    for number, start in enumerate(range(0, len(image_embeddings), IMAGES_PER_CHUNK)):
        images = np.arange(start, min(start + IMAGES_PER_CHUNK, len(image_embeddings)))
        texts = (spread + number) % captions
        cosines = image_embeddings[images] @ text_embeddings[texts].T  # (chunk, drawn)
        pairs = images[:, None] * captions + texts
        histogram.add(np.clip(cosines[~_contains(matched, pairs)], -1, 1))
    return histogram


def _contains(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of `values` (any shape) are among `ordered` (n,), ascending: bool of that shape."""
    if not len(ordered):
        return np.zeros(values.shape, bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class PairCounts:
    """The whole run's two histograms, merged from its parts."""

    random: Histogram
    matched: Histogram


class RandomPairs(Measure):
    """The columns `percentile` and `random_percentile`, and `random_pairs` in profile.json."""

    name = "random_pairs"

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """In every run with a model."""
        return config.pretrained_model != "none"

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Count the partition's random and matched pairs; those of rows scored in an earlier run are added."""
        matched = Histogram()
        matched.add(scored.cosines)
        random = Histogram()
        if scored.image_embeddings is not None and scored.text_embeddings is not None:
            has_pair = (scored.image_of_row >= 0) & (scored.text_of_row >= 0)
            random = count_random_pairs(np.asarray(scored.image_embeddings), np.asarray(scored.text_embeddings),
                                        scored.image_of_row[has_pair], scored.text_of_row[has_pair])
        earlier = kept_by(RandomPairs, run.earlier)
        if earlier:
            matched = merge_histograms((matched, Histogram.from_json(earlier["matched"])))
            random = merge_histograms((random, Histogram.from_json(earlier["random"])))
        return Measured({}, {"random": random.to_json(), "matched": matched.to_json()})

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> PairCounts | None:
        """Both histograms of the whole run; None for a dry run, and where not every score is counted.

        The latter happens to a run that was begun without this file.
        """
        random = Histogram()
        matched = Histogram()
        scored = 0
        for part in parts:
            if not part["similarity_count"]:
                continue
            kept = kept_by(cls, part)
            if not kept:
                return None
            random = merge_histograms((random, Histogram.from_json(kept["random"])))
            matched = merge_histograms((matched, Histogram.from_json(kept["matched"])))
            scored += part["similarity_count"]
        if not scored or matched.count != scored:
            return None
        return PairCounts(random, matched)

    @classmethod
    def describe(cls, total: PairCounts | None) -> Json | None:
        """Number, mean, sd and QUANTILES of the random pairs; None without any."""
        if total is None or not total.random.count:
            return None
        random = total.random
        return {"pairs": random.count, "mean": random.mean, "sd": random.sd, "resolution": RESOLUTION,
                **{name: quantile(random, share) for name, share in QUANTILES.items()}}

    @classmethod
    def complete(cls, table: "pa.Table", total: PairCounts | None) -> "pa.Table":
        """Fill `percentile` and `random_percentile`: for each score the share of the run's scored rows, and of random pairs,
        that lie below it. A row without a score has neither; without a total both stay empty."""
        if total is None:
            return table
        import pyarrow as pa
        cosines = table["similarity"].to_numpy().astype(np.float32)  # (n,), NaN for no score
        for name, histogram in (("percentile", total.matched), ("random_percentile", total.random)):
            shares = share_below(histogram, cosines)
            cells = pa.array(shares, pa.float32(), mask=~np.isfinite(shares))
            table = table.set_column(table.schema.get_field_index(name), name, cells)
        return table

    @classmethod
    def tell(cls, entry: Json) -> str:
        """The line of the summary."""
        return (f"mean {entry['mean']:.4f}, sd {entry['sd']:.4f}; 95 % lie below {entry['q95']:.4f}, 99 % below "
                f"{entry['q99']:.4f}, 99.9 % below {entry['q99.9']:.4f}")


MEASURE = RandomPairs

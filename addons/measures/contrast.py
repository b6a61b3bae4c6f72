"""The column `contrast`: the similarity, less what image and caption score with everything else in their partition.

A caption such as "image" and a logo on white go with everything, and their similarity is high for no good reason. CLIP was
trained to tell a pair from the others of its batch, and its loss says how well it does; the contrast of a pair is that loss,
turned round and in the units of the similarity. For a row i of an image and a caption:

    contrast_i = s_ii - T/2 * (R_image + R_text)                        T = 1 / the model's logit scale
    R_image    = log(exp(s_ii / T) + (N - 1) / (n - 1) * sum over j != i of exp(s_ij / T))

s_ij is the cosine of the row's image with caption j, one of the n distinct captions of the partition; R_text is the same for
the row's caption and the partition's distinct images. N, the setting `batch`, is how many captions the image is thought to
stand among: the mean over the other captions counts N - 1 times, so that partitions of 60 and of 10,000 rows give values that
can be compared. Where all captions but its own are far away, the contrast is near 0; otherwise it is negative.

Source: s-CLIPLoss (first called negCLIPLoss) of Wang et al. 2024, "CLIPLoss and Norm-Based Data Selection Methods for
Multimodal Contrastive Learning", arXiv 2405.19547, with their batch of 32,768; they draw such batches from the
whole table, here the partition stands for them.

Equal images and equal captions count once, and only the row's own pair is left out of the sum: where an image has several true
captions in the partition, they compete with each other. A partition of one image or one caption has nothing to compare with:
empty cells. Sums are in float64, in tiles of TILE x TILE, so the same rows give the same values on any number of threads and
memory does not grow with the partition; time grows with its square.
"""
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from addons.measures import Measure, Measured, kept_by
from addons.measures.embeddings import pack, read_embeddings, unpack
from addons.measures.moments import Moments, add_moments, tell_moments
from image_text_sim_clip import Column, Config, ImageLoader, Json, PartitionRun, Plan, Scored, Scorer, column_name, setting

if TYPE_CHECKING:
    import pyarrow as pa

TILE = 1024  # images and captions of one matrix product; its exponentials take 8 MiB each


# ── The formula ───────────────────────────────────────────────────────────────────────────────────────────────────────

class LogSums:
    """log(sum(exp(x))) for each of `count` rows whose x arrive in blocks; no exponential overflows."""

    def __init__(self, count: int) -> None:
        self._highest = np.full(count, -np.inf)
        self._sums = np.zeros(count)  # of exp(x - highest)

    def add(self, rows: slice, values: np.ndarray) -> None:
        """Take in more x of some rows: float64 (rows, any number)."""
        before = self._highest[rows]
        highest = np.maximum(before, values.max(axis=1))
        self._sums[rows] *= np.exp(before - highest)
        self._sums[rows] += np.exp(values - highest[:, None]).sum(axis=1)
        self._highest[rows] = highest

    def logs(self) -> np.ndarray:
        """The logarithms, float64 (count,)."""
        return self._highest + np.log(self._sums)


def _cut(count: int) -> list[slice]:
    """`count` places in slices of up to TILE."""
    return [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]


def sum_logits(images: np.ndarray, texts: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """For each of `images` (m, d) the log of the sum of exp(scale * cosine) over all `texts` (k, d), float64 (m,); and for
    each of `texts` that over all images, (k,)."""
    of_images = LogSums(len(images))
    of_texts = LogSums(len(texts))
    for image_rows in _cut(len(images)):
        block = images[image_rows].astype(np.float64) * scale
        for text_rows in _cut(len(texts)):
            logits = block @ texts[text_rows].astype(np.float64).T  # (tile, tile)
            of_images.add(image_rows, logits)
            of_texts.add(text_rows, np.ascontiguousarray(logits.T))
    return of_images.logs(), of_texts.logs()


def _penalise(own: np.ndarray, log_sums: np.ndarray, others: int, batch: int) -> np.ndarray:
    """R of the formula, (n,): from the rows' own logits, the logs of the sums over all, and how many `others` are in these."""
    with np.errstate(divide="ignore"):  # log(0) where there is nothing next to the own pair
        log_others = log_sums + np.log(-np.expm1(np.minimum(0.0, own - log_sums)))
        weight = np.log(batch - 1) - np.log(others)  # -inf for a batch of one
    return np.logaddexp(own, weight + log_others)


def compute_contrast(images: np.ndarray, texts: np.ndarray, image_of_row: np.ndarray, text_of_row: np.ndarray,
                     scale: float, batch: int) -> np.ndarray:
    """The contrast of n rows, float32 (n,), by the formula at the top of this file.

    `images` (m, d) and `texts` (k, d) are the distinct ones' unit vectors; `image_of_row` and `text_of_row` (n,) place each
    row among them, -1 for a row without a score, which has no contrast (NaN) either. Those that no row refers to do not count.
    """
    contrasts = np.full(len(image_of_row), np.nan, np.float32)
    rows = np.flatnonzero((image_of_row >= 0) & (text_of_row >= 0))
    used_images, image_places = np.unique(image_of_row[rows], return_inverse=True)
    used_texts, text_places = np.unique(text_of_row[rows], return_inverse=True)
    if len(used_images) < 2 or len(used_texts) < 2:
        return contrasts
    images = images[used_images]
    texts = texts[used_texts]
    of_images, of_texts = sum_logits(images, texts, scale)
    for part in _cut(len(rows)):
        image = image_places[part]
        text = text_places[part]
        own = scale * np.einsum("nd,nd->n", images[image].astype(np.float64), texts[text].astype(np.float64))
        penalties = _penalise(own, of_images[image], len(texts) - 1, batch)
        penalties += _penalise(own, of_texts[text], len(images) - 1, batch)
        contrasts[rows[part]] = (own - penalties / 2) / scale
    return contrasts


# ── A whole part, when some of its rows are scored later ──────────────────────────────────────────────────────────────

class PartVectors(NamedTuple):
    """The distinct images and captions of a part's rows: unit vectors, and the place of each row among them, -1 for none."""

    images: np.ndarray  # (m, d) float32
    texts: np.ndarray  # (k, d) float32
    image_of_row: np.ndarray  # (rows,)
    text_of_row: np.ndarray  # (rows,)


def _number_alike(keys: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """For n keys: which of them are the first of their kind, and for each the number of its kind, (n,)."""
    number_of: dict[Hashable, int] = {}
    first: list[int] = []
    for place, key in enumerate(keys):
        if key not in number_of:
            number_of[key] = len(first)
            first.append(place)
    return np.array(first, np.int64), np.array([number_of[key] for key in keys], np.int64)


def join_saved(run: PartitionRun, scored: Scored, kind: str, captions: list[str]) -> PartVectors:
    """The vectors of the whole part: those at hand as `kind` would save them, the other rows' from the saved file.

    `captions` (rows,) are the part's. Equal captions count once, and so do images whose saved vectors are equal.
    """
    saved = read_embeddings(run.partition.embeddings)
    image_of = _vectors_by_row(saved["images"], saved["image_of_row"])
    text_of = _vectors_by_row(saved["texts"], saved["text_of_row"])
    added_images = unpack(*pack(np.asarray(scored.image_embeddings), kind))
    added_texts = unpack(*pack(np.asarray(scored.text_embeddings), kind))
    for place, row in enumerate(run.rows.index.tolist()):
        if scored.image_of_row[place] >= 0:
            image_of[row] = added_images[scored.image_of_row[place]]
            text_of[row] = added_texts[scored.text_of_row[place]]
    rows = sorted(image_of)
    first_images, image_numbers = _number_alike([image_of[row].tobytes() for row in rows])
    first_texts, text_numbers = _number_alike([captions[row] for row in rows])
    image_of_row = np.full(len(captions), -1)
    image_of_row[rows] = image_numbers
    text_of_row = np.full(len(captions), -1)
    text_of_row[rows] = text_numbers
    return PartVectors(np.array([image_of[rows[place]] for place in first_images], np.float32),
                       np.array([text_of[rows[place]] for place in first_texts], np.float32), image_of_row, text_of_row)


def _vectors_by_row(vectors: np.ndarray, of_row: np.ndarray) -> dict[int, np.ndarray]:
    """The saved vector of each row that has one."""
    return {row: vectors[place] for row, place in enumerate(of_row.tolist()) if place >= 0}


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class ContrastSettings:
    """The keys under measures.contrast."""

    batch: int = setting(32_768, 2, 1_000_000_000)  # N of the formula


class Contrast(Measure):
    """The column `contrast`."""

    name = "contrast"
    columns = (Column("contrast", "float", "the similarity less what image and caption score with all else (s-CLIPLoss)"),)
    settings = ContrastSettings

    def __init__(self, config: Config, plan: Plan, scorer: Scorer, loader: ImageLoader) -> None:
        super().__init__(config, plan, scorer, loader)
        self._of_part: np.ndarray | None = None  # of a retry: the contrasts of all rows of the part, not only those at hand

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """The contrast of each row at hand; of a retry's, those of the whole part are computed anew where they can be."""
        self._of_part = None
        is_scored = np.isfinite(scored.cosines)
        values = np.full(len(scored.cosines), np.nan, np.float32)
        if not run.replaced:
            if scored.image_embeddings is not None and scored.text_embeddings is not None:
                values = self._compute(PartVectors(np.asarray(scored.image_embeddings), np.asarray(scored.text_embeddings),
                                                   scored.image_of_row, scored.text_of_row))
            return Measured({"contrast": values}, Moments.of(values, is_scored).to_json())
        if self.config.save_embeddings != "none" and is_scored.any():
            vectors = join_saved(run, scored, self.config.save_embeddings, self._captions_of_part(run))
            self._of_part = self._compute(vectors)
            moments = Moments.of(self._of_part, vectors.image_of_row >= 0)
        else:
            earlier = kept_by(Contrast, run.earlier)
            moments = add_moments([Moments.from_json(earlier)] if earlier else [])
            moments = add_moments([moments, Moments.of(values, is_scored)])
        return Measured({"contrast": values}, moments.to_json())

    def revise(self, run: PartitionRun, table: "pa.Table") -> "pa.Table":
        """Put the contrasts of a retried part in the place of those that it had."""
        if self._of_part is None:
            return table
        import pyarrow as pa
        cells = pa.array(self._of_part, pa.float32(), mask=~np.isfinite(self._of_part))
        return table.set_column(table.schema.get_field_index("contrast"), "contrast", cells)

    def _compute(self, vectors: PartVectors) -> np.ndarray:
        settings: ContrastSettings = self.read_settings(self.config)
        return compute_contrast(*vectors, self.scorer.family.scale, settings.batch)

    def _captions_of_part(self, run: PartitionRun) -> list[str]:
        """The captions of all rows of the part, as the table has them."""
        partition = run.partition
        rows = self.plan.table.read(partition.start, partition.stop)
        captions: list[str] = rows[column_name(self.config.caption_column)].tolist()
        return captions

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> Moments | None:
        """The moments of all contrasts; None where no part has any."""
        entries = [kept for kept in (kept_by(cls, part) for part in parts) if kept]
        return add_moments(map(Moments.from_json, entries)) if entries else None

    @classmethod
    def describe(cls, total: Moments | None) -> Json | None:
        """How many rows have a contrast and how many scored ones have none, with mean and standard deviation."""
        return None if total is None else total.describe()

    @classmethod
    def tell(cls, entry: Json) -> str:
        """The line of the summary."""
        text = tell_moments(entry)
        if entry["without"]:
            text += (f"; {entry['without']:,} scored rows have none: tried again without save_embeddings, or in a partition of "
                     "one image or one caption")
        return text


MEASURE = Contrast

"""The score passport: a few rows of each run are scored again the slow reference way, and the difference is told.

The reference is the model's own processor on Pillow and the model in float32, pair by pair: no batch, no trimmed
caption, no shared embedding, no fewer bits, no shortcut in decoding. It works on the bytes that the run itself fetched.
Rows are spread evenly over the input, one out of each of `parity_rows` stretches of rows; where a chosen row gets no score,
the next ones of its stretch stand in for it. Their scores and reference scores are kept in the part's metadata, so that they
survive an interruption and add up over all workers.
"""
import contextlib
import dataclasses
import hashlib
import io
import math
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from addons.images.memory import Account, image_memory
from addons.measures import Measured, kept_by
from addons.measures.drift import DriftMeasure
from image_text_sim_clip import (
    EXIT_VERIFY,
    Config,
    Family,
    ImageLoader,
    Json,
    PartitionRun,
    Plan,
    RowFailure,
    Scored,
    Scorer,
    Trouble,
    decode_image,
    read_part_metadata,
    trim_strip,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MOST_ROWS = 10_000  # each costs a slow scoring, and the summary sorts them in memory
STAND_INS = 4  # rows of a stretch that may be tried in all
KEPT_BYTES = 256 * 2**20  # fetched bytes held at a time; images beyond are not kept, and the passport has fewer rows
IN_MEMORY_BYTES = 8 * 2**20  # beyond, they are spooled to a temporary file


# ── Which rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

def count_rows(rows: int, wanted: int | str) -> int:
    """How many of `rows` to score twice: min(64, max(8, 1 %)) for `auto`."""
    if wanted == "auto":
        return min(rows, 64, max(8, math.ceil(rows / 100)))
    return min(rows, int(wanted), MOST_ROWS)


def choose_rows(rows: int, count: int, start: int, stop: int) -> list[list[int]]:
    """The chosen rows that lie in [start, stop), each followed by its stand-ins there; the same for the same input size.

    `count` stretches of equal length cover all `rows`; a hash of the stretch's number picks the row in it, so that a table
    in which every third row is alike is not met in step.
    """
    groups: list[list[int]] = []
    if not count:
        return groups
    for number in range(start * count // rows, min(count, stop * count // rows + 1)):
        low = number * rows // count
        high = (number + 1) * rows // count
        chosen = low + int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") % (high - low)
        if start <= chosen < stop:
            groups.append(list(range(chosen, min(chosen + STAND_INS, high, stop))))
    return groups


def count_rows_of_run(config: Config, plan: Plan) -> int:
    """How many rows of this run to score twice: what its finished parts were made with, or else what the config asks for.

    A resumption with another `parity_rows` would otherwise choose other rows than the parts that are there did.
    """
    for partition in plan.partitions:
        if partition.parquet.exists():
            kept = kept_by(Passport, read_part_metadata(plan, partition) or {})
            if kept:
                return int(kept["chosen"])
    return count_rows(plan.row_count, config.parity_rows)


# ── The bytes of these rows ───────────────────────────────────────────────────────────────────────────────────────────

class KeptImages:
    """Keeps the bytes of the sources that are waited for, from when a loader reads them until nobody waits for them any more.

    Loader threads call what `keep_from` returns; one thread calls the rest.
    """

    def __init__(self) -> None:
        self._files: dict[str, tempfile.SpooledTemporaryFile[bytes]] = {}  # source -> its bytes
        self._waiting: dict[str, int] = {}  # source -> chosen rows that wait for it, in all partitions under way
        self._bytes = 0
        self._lock = threading.Lock()

    def keep_from(self, read: Callable[[str], bytes]) -> Callable[[str], bytes]:
        """`read`, a loader's, that also keeps what it returns for the sources waited for."""
        def read_and_keep(source: str) -> bytes:
            data = read(source)
            if source in self._waiting:
                self._keep(source, data)
            return data
        return read_and_keep

    def _keep(self, source: str, data: bytes) -> None:
        with self._lock:
            if source not in self._waiting or source in self._files or self._bytes + len(data) > KEPT_BYTES:
                return
            file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - closed by `forget`
            try:
                file.write(data)
            except OSError:  # no room for temporary files: the passport has fewer rows
                file.close()
                return
            self._files[source] = file
            self._bytes += len(data)

    def wait_for(self, sources: Iterable[str]) -> None:
        """From now on keep the bytes of these, once more for each time that a source is named."""
        with self._lock:
            for source in sources:
                self._waiting[source] = self._waiting.get(source, 0) + 1

    def take(self, source: str) -> bytes | None:
        """The bytes kept for `source`, or None."""
        file = self._files.get(source)
        if file is None:
            return None
        file.seek(0)
        return bytes(file.read())

    def forget(self, sources: Iterable[str]) -> None:
        """Wait for these no longer, and drop the bytes that nobody else waits for."""
        with self._lock:
            for source in sources:
                self._waiting[source] -= 1
                if not self._waiting[source]:
                    del self._waiting[source]
                    self._drop(source)

    def _drop(self, source: str) -> None:
        file = self._files.pop(source, None)
        if file is not None:
            self._bytes -= file.seek(0, io.SEEK_END)
            file.close()

    def close(self) -> None:
        """Drop all bytes, and wait for none."""
        with self._lock:
            self._waiting.clear()
            for source in list(self._files):
                self._drop(source)


# ── The reference ─────────────────────────────────────────────────────────────────────────────────────────────────────

class Reference:
    """The slow, plain way from an image's bytes and a caption to their cosine.

    The scorer lends its processor, and its model where that is float32 and unchanged. Otherwise a second model is loaded when
    the first row comes, on the GPU if it fits there, and given back by `close`. The tokenizer is one of its own, called as
    transformers has it called, so that a fault in how the scorer takes captions apart shows.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._model: torch.nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def score(self, data: bytes, caption: str) -> float:
        """The cosine of one pair; `caption` is what the model reads. Raises RowFailure for bytes that are no image."""
        import torch
        if self._model is None:
            self._model = self.scorer.family.model if self.scorer.is_plain_float32() else self._load_model()
        family = self.scorer.family
        device = next(self._model.parameters()).device
        pixels = self._prepare_image(data).to(device)
        ids = torch.tensor([self._prepare_caption(caption)], device=device)  # (1, context length)
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            image = family.image_features(self._model, pixels).double()
            text = family.text_features(self._model, ids).double()
            return float(torch.nn.functional.cosine_similarity(image, text).item())

    def _prepare_image(self, data: bytes) -> "torch.Tensor":
        """(1, 3, H, W) float32, by the model's own processor from the image at its full size."""
        with Account(image_memory(self.scorer.config.memory_budget_mib)) as account:
            # without a target size, so that nothing is scaled down while it is decoded, whatever `decode` says
            image = decode_image(data, self.scorer.config, None, account)
            image = trim_strip(image, self.scorer.settings)
            pixels: torch.Tensor = self.scorer.family.processor(image, return_tensors="pt")["pixel_values"]
            return pixels

    def _prepare_caption(self, caption: str) -> list[int]:
        """Token ids, padded to the most that the model reads.

        Raises RowFailure for a caption with both a control token, which is text here, and a trained word, which is none:
        transformers can only take both as they are, or take both apart.
        """
        family = self.scorer.family
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(family)
        text = family.prepare(caption)
        has_control = self._names_token(text, family.control_tokens())
        words = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}.difference(family.control_tokens())
        if has_control and self._names_token(text, words):
            raise RowFailure("unsupported", "a control token and an added word in one caption")
        ids: list[int] = self._tokenizer(text, split_special_tokens=has_control, truncation=True, verbose=False,
                                         max_length=family.context_length)["input_ids"]
        return ids + [self._tokenizer.pad_token_id] * (family.context_length - len(ids))

    @staticmethod
    def _names_token(text: str, tokens: Iterable[str]) -> bool:
        """Whether one of the tokens stands in the text, in capitals or not."""
        return any(token.lower() in text.lower() for token in tokens)

    def _load_model(self) -> "torch.nn.Module":
        import torch
        model = self.scorer.load_plain()
        try:
            return model.to(self.scorer.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return model.to("cpu")

    def close(self) -> None:
        """Let go of the second model and of the second tokenizer."""
        self._model = None
        self._tokenizer = None


# ── The measure ───────────────────────────────────────────────────────────────────────────────────────────────────────

@dataclasses.dataclass(frozen=True)
class ChosenRows:
    """The rows of one partition under way that are to be scored twice."""

    groups: list[list[int]]  # each a chosen row and its stand-ins, as positions among the rows at hand
    sources: list[str]  # of all of these, in order; one that several rows share stands there several times


class Passport(DriftMeasure):
    """`passport` in profile.json: what `drift.compare_scores` says of the rows that were scored twice."""

    name = "passport"
    counts_in_rate: ClassVar[bool] = False

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """In every run with a model, unless `parity_rows` is 0."""
        return config.pretrained_model != "none" and config.parity_rows != 0

    def __init__(self, config: Config, plan: Plan, scorer: Scorer, loader: ImageLoader) -> None:
        super().__init__(config, plan, scorer, loader)
        self.count = count_rows_of_run(config, plan)
        self.reference = Reference(scorer)
        self.kept_images = KeptImages()
        self._chosen: dict[int, ChosenRows] = {}  # by the index of the partition, for those under way

    def wrap(self, loader: ImageLoader) -> ImageLoader:
        """A copy of the loader that keeps the bytes of chosen rows until their partition is scored."""
        return dataclasses.replace(loader, read=self.kept_images.keep_from(loader.read))

    def begin(self, run: PartitionRun) -> None:
        """Choose the partition's rows, except in stretches that an earlier run has scored twice already."""
        partition = run.partition
        position = {partition.start + int(place): i for i, place in enumerate(run.rows.index)}
        done = {int(row) for row, _, _ in _earlier_pairs(run)}
        groups = []
        sources = []
        for group in choose_rows(self.plan.row_count, self.count, partition.start, partition.stop):
            if done.isdisjoint(group):
                at_hand = [position[row] for row in group if row in position]
                groups.append(at_hand)
                sources += [run.sources[i] for i in at_hand]
        self.kept_images.wait_for(sources)
        self._chosen[partition.index] = ChosenRows(groups, sources)

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Score one row of each group again, the first that has a score and whose bytes are kept."""
        chosen = self._chosen.pop(run.partition.index)
        pairs = _earlier_pairs(run)
        for group in chosen.groups:
            pair = self._score_one_again(group, run, scored)
            if pair:
                pairs.append(pair)
        self.kept_images.forget(chosen.sources)
        return Measured({}, {"pairs": pairs, "chosen": self.count})

    def _score_one_again(self, group: list[int], run: PartitionRun, scored: Scored) -> list[float] | None:
        """[row of the input, score, reference score] of the first of the group that can be scored again; None without any."""
        for i in group:
            score = float(scored.cosines[i])
            data = self.kept_images.take(run.sources[i])
            if not math.isfinite(score) or data is None:
                continue
            with contextlib.suppress(RowFailure):  # of an image that only a smaller or a GPU's decoding can read
                row = run.partition.start + int(run.rows.index[i])
                return [row, score, self.reference.score(data, run.captions[i])]
        return None

    def close(self) -> None:
        """Let go of all bytes and of the second model."""
        self._chosen.clear()
        self.kept_images.close()
        self.reference.close()

    @classmethod
    def pairs_of(cls, kept: Json) -> list[list[float]]:
        """[score, reference score] of the rows that were scored twice."""
        return [pair[1:] for pair in kept["pairs"]]


def _earlier_pairs(run: PartitionRun) -> list[list[float]]:
    """What an earlier run found in the part that --retry-failed replaces: [row, score, reference score] each."""
    kept = kept_by(Passport, run.earlier)
    return list(kept["pairs"]) if kept else []


def load_tokenizer(family: Family) -> "PreTrainedTokenizerBase":
    """The tokenizer as it lies in its folder, which nobody has touched since."""
    import transformers
    tokenizer: PreTrainedTokenizerBase = family.tokenizer
    if family.folders:  # not of a family that is loaded in a way of its own
        tokenizer = transformers.AutoTokenizer.from_pretrained(family.folders.tokenizer, trust_remote_code=False)
    return tokenizer


def refuse_excess(profile: Json, most: float) -> None:
    """Raise Trouble (exit 7) where a run drifted by more than `most`, or nothing was scored twice.

    `profile` is profile.json; of several models the first that drifts is told.
    """
    for entry in (profile, *(profile.get("further_models") or {}).values()):
        drift = entry.get("passport")
        if not drift or not drift["rows"]:
            raise Trouble(EXIT_VERIFY, "max_score_drift is set, but no row was scored twice")
        if drift["max_difference"] > most:
            raise Trouble(EXIT_VERIFY, f"scores differ from the reference by up to {drift['max_difference']:.2e}, more than "
                                       f"max_score_drift ({most:g}) allows")


MEASURE = Passport

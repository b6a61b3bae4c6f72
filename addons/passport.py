"""The score passport: a few rows of each run are scored again the slow reference way, and the difference is told.

The reference is the model's own processor on Pillow and the model in float32, pair by pair: no batch, no trimmed
caption, no shared embedding, no fewer bits, no shortcut in decoding. It works on the bytes that the run itself fetched.
Rows are chosen when the run is planned, spread evenly over the input, one out of each of `parity_rows` stretches of rows;
where a chosen row gets no score, the next ones of its stretch stand in for it. Their scores and reference scores are kept
in the part's JSON, so that they survive an interruption and add up over all workers.
"""
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MOST_ROWS = 10_000  # each costs a slow scoring, and the summary sorts them in memory
STAND_INS = 4  # rows of a stretch that may be tried in all
KEPT_BYTES = 256 * 2**20  # fetched bytes held at a time; pictures beyond are not kept, and the passport has fewer rows
IN_MEMORY_BYTES = 8 * 2**20  # beyond, they are spooled to a temporary file


def count_rows(rows: int, wanted: int | str) -> int:
    """How many of `rows` to score twice: min(64, max(8, 1 %)) for `auto`."""
    chosen = min(64, max(8, math.ceil(rows / 100))) if wanted == "auto" else min(int(wanted), MOST_ROWS)
    return min(rows, chosen)


def choose_rows(rows: int, count: int, start: int, stop: int) -> list[list[int]]:
    """The chosen rows that lie in [start, stop), each followed by its stand-ins there; the same for the same input size.

    `count` stretches of equal length cover all `rows`; a hash of the stretch's number picks the row in it, so that a table
    in which every third row is alike is not met in step.
    """
    groups = []
    if count:
        for number in range(start * count // rows, min(count, stop * count // rows + 1)):
            low, high = number * rows // count, (number + 1) * rows // count
            chosen = low + int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") % (high - low)
            if start <= chosen < stop:
                groups.append(list(range(chosen, min(chosen + STAND_INS, high, stop))))
    return groups


def compare(scores: Sequence[float], references: Sequence[float]) -> dict[str, Any]:
    """What a change of score comes to: largest and 99th percentile of |difference|, Spearman's rank correlation (ties get
    their mean rank; None where either side is constant), and the share of the top 30 % by reference that is not in the
    top 30 % by score."""
    import numpy as np
    import pandas as pd
    mine, theirs = np.asarray(scores, np.float64), np.asarray(references, np.float64)
    if not len(mine):
        return {"rows": 0, "max_difference": None, "p99_difference": None, "rank_correlation": None,
                "top_30_percent_changed": None}
    difference, top = np.abs(mine - theirs), math.ceil(0.3 * len(mine))
    ranks = pd.Series(mine).rank(), pd.Series(theirs).rank()
    constant = any(rank.nunique() == 1 for rank in ranks)
    best = [set(np.argsort(-values, kind="stable")[:top].tolist()) for values in (mine, theirs)]
    return {"rows": len(mine), "max_difference": float(difference.max()),
            "p99_difference": float(np.percentile(difference, 99)),
            "rank_correlation": None if constant else float(ranks[0].corr(ranks[1])),
            "top_30_percent_changed": len(best[1] - best[0]) / top}


def describe(drift: dict[str, Any]) -> str:
    """One line of what `compare` returns."""
    if not drift["rows"]:
        return "no row was scored"
    correlation = "undefined" if drift["rank_correlation"] is None else f"{drift['rank_correlation']:.4f}"
    return (f"{drift['rows']} rows, |difference| {drift['max_difference']:.1e} at most, 99 % below "
            f"{drift['p99_difference']:.1e}, rank correlation {correlation}, top 30 %: "
            f"{drift['top_30_percent_changed']:.1%} changed")


class Reference:
    """The slow, plain way from a picture's bytes and a caption to their cosine.

    `decode(data)` gives an RGB picture at full size, `load()` a float32 model on the CPU; `scorer` lends its processor and
    its tokenizer, and its model where that is float32 and unchanged. Otherwise a second model is loaded when the first row
    comes, on the GPU if it fits there, and given back by `close`.
    """

    def __init__(self, scorer: Any, decode: Callable[[bytes], Any], load: Callable[[], Any]) -> None:
        self.scorer, self.decode, self.load = scorer, decode, load
        self._model: Any = None

    def __call__(self, data: bytes, caption: str) -> float:
        """The cosine of one pair; `caption` is what the model reads."""
        import torch
        if self._model is None:
            self._model = self.scorer.model if self.scorer.is_plain_float32() else self._load()
        device = self._model.logit_scale.device
        pixels = self.scorer.processor(self.decode(data), return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
        ids = self.scorer.tokenize([caption])[0][0]
        ids += [self.scorer.tokenizer.pad_token_id] * (self.scorer.context_length - len(ids))
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            image = self._model.get_image_features(pixel_values=pixels.to(device)).pooler_output
            text = self._model.get_text_features(input_ids=torch.tensor([ids], device=device)).pooler_output
            return float(torch.nn.functional.cosine_similarity(image.double(), text.double()).item())

    def _load(self) -> Any:
        import torch
        model = self.load()
        try:
            return model.to(self.scorer.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return model.to("cpu")

    def close(self) -> None:
        """Let go of the second model."""
        self._model = None


@dataclasses.dataclass
class Watch:
    """One partition's chosen rows on their way through the loaders; see `Passport.watch`."""

    passport: "Passport"
    first: int  # the partition's first row
    at: list[int]  # places of the rows at hand in the partition: all of them, or with --retry-failed some
    groups: list[list[int]]  # each a chosen row and its stand-ins, as positions in `at`
    sources: list[str]
    captions: list[str]  # as the model reads them
    known: list[list[float]]  # what an earlier run wrote

    def check(self, similarity: Sequence[float | None]) -> list[list[float]]:
        """Score one row of each group again: [row, score, reference] of those that have a score and whose bytes are kept.

        `similarity` is that of each row at hand, None without a score.
        """
        pairs = list(self.known)
        for group in self.groups:
            for i in group:
                score = similarity[i]
                if score is not None and (data := self.passport.take(self.sources[i])) is not None:
                    pairs.append([self.first + self.at[i], score, self.passport.score_slowly(data, self.captions[i])])
                    break
        self.passport.forget(self.sources[i] for group in self.groups for i in group)
        return pairs


class Passport:
    """Keeps the bytes of chosen rows while they are loaded, until their partition is done and they are scored again.

    `rows` and `count` are the whole run's; `score_slowly(data, caption)` is a Reference. Loader threads call what `wrap`
    returns, one thread calls the rest.
    """

    def __init__(self, rows: int, count: int, score_slowly: Any) -> None:
        self.rows, self.count, self.score_slowly = rows, count, score_slowly
        self._kept: dict[str, Any] = {}  # source -> file with its bytes
        self._users: dict[str, int] = {}  # source -> chosen rows that wait for it, in all partitions under way
        self._bytes, self._lock = 0, threading.Lock()

    def wrap(self, read: Callable[[str], bytes]) -> Callable[[str], bytes]:
        """`read`, the loader's, that also keeps what it returns for the sources chosen."""
        def read_and_keep(source: str) -> bytes:
            data = read(source)
            if source in self._users:
                self._keep(source, data)
            return data
        return read_and_keep

    def watch(self, partition: Any, at: Iterable[int], sources: Sequence[str], captions: Sequence[str],
              known: list[list[float]]) -> Watch:
        """Before a partition is loaded: note which sources to keep for it (`at` and the rest: see Watch)."""
        at = [int(place) for place in at]
        position, had = {partition.start + place: i for i, place in enumerate(at)}, {int(pair[0]) for pair in known}
        chosen = choose_rows(self.rows, self.count, partition.start, partition.stop)
        groups = [[position[row] for row in group if row in position] for group in chosen if not had.intersection(group)]
        stripped = [source.strip() for source in sources]
        with self._lock:
            for i in (i for group in groups for i in group):
                self._users[stripped[i]] = self._users.get(stripped[i], 0) + 1
        return Watch(self, partition.start, at, groups, stripped, list(captions), known)

    def take(self, source: str) -> bytes | None:
        """The bytes kept for `source`, or None."""
        file = self._kept.get(source)
        if file is None:
            return None
        file.seek(0)
        return bytes(file.read())

    def forget(self, sources: Iterable[str]) -> None:
        """Drop the bytes that no other chosen row waits for."""
        with self._lock:
            for source in sources:
                self._users[source] -= 1
                if not self._users[source]:
                    del self._users[source]
                    if (file := self._kept.pop(source, None)) is not None:
                        self._bytes -= file.seek(0, io.SEEK_END)
                        file.close()

    def close(self) -> None:
        """Let go of all bytes and of the second model."""
        for file in self._kept.values():
            file.close()
        self._kept.clear()
        self._users.clear()
        self._bytes = 0
        self.score_slowly.close()

    def _keep(self, source: str, data: bytes) -> None:
        with self._lock:
            if source in self._users and source not in self._kept and self._bytes + len(data) <= KEPT_BYTES:
                self._kept[source] = file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - see `forget`
                file.write(data)
                self._bytes += len(data)


def issue(scorer: Any, loader: Any, decode: Callable[[bytes], Any], rows: int, count: int) -> Passport:
    """A Passport for `count` of `rows` rows, which from now on keeps what `loader` reads of them; `decode`: see Reference."""
    passport = Passport(rows, count, Reference(scorer, decode, scorer.load_plain))
    loader.read = passport.wrap(loader.read)
    return passport


def tell_drifts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`compare` over the pairs that all parts' JSON holds: rows scored twice, and rows scored from saved embeddings."""
    parts = list(parts)
    told = {}
    if any("passport" in part for part in parts):
        pairs = [pair[1:] for part in parts for pair in part.get("passport", ())]
        told["passport"] = compare([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    if any(part.get("embeddings") for part in parts):
        pairs = [pair for part in parts for pair in part.get("embeddings", {}).get("drift", ())]
        told["saved_embeddings"] = compare([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return told


def find_excess(output: pathlib.Path, most: float) -> str | None:
    """What to say where the run in `output` drifted by more than `most`, or nothing was scored twice; None if all is well."""
    drift = json.loads((output / "profile.json").read_text()).get("passport")
    if not drift or not drift["rows"]:
        return "max_score_drift is set, but no row was scored twice"
    if drift["max_difference"] <= most:
        return None
    return (f"scores differ from the reference by up to {drift['max_difference']:.2e}, more than max_score_drift "
            f"({most:g}) allows")

"""Captions that are not read as they were meant: with HTML entities in them, or with tokens that the tokenizer does not know.

Both kinds are scored; `captions` in profile.json has their numbers, and the summary tells them. A caption of which the
tokenizer knows nothing at all is not among them: its row is `empty_caption`.
"""
import html
from collections.abc import Iterable
from typing import ClassVar

from addons.measures import Measure, Measured, kept_by
from image_text_sim_clip import Config, Json, PartitionRun, Scored, column_name


class Captions(Measure):
    """How many captions are partly unknown to the tokenizer, and how many have HTML entities that are read as they stand."""

    name = "captions"
    counts_in_rate: ClassVar[bool] = False

    @classmethod
    def wanted(cls, config: Config) -> bool:
        """In every run with a model."""
        return config.pretrained_model != "none"

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Count among the rows at hand; rows that --retry-failed left alone were counted before."""
        earlier = kept_by(Captions, run.earlier)
        unknown = sum(is_unknown and status == "ok" for is_unknown, status in
                      zip(scored.partly_unknown, scored.status, strict=True))
        if earlier:  # it saw all the partition's captions
            return Measured({}, {**earlier, "partly_unknown": earlier["partly_unknown"] + unknown})
        captions = run.rows[column_name(self.config.caption_column)]
        with_entities = 0
        if self.config.caption_clean == "none":
            with_entities = sum("&" in caption and html.unescape(caption) != caption for caption in captions)
        return Measured({}, {"partly_unknown": unknown, "with_html_entities": with_entities})

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> Json | None:
        """The sums over all parts; None where no part has them."""
        entries = [kept for kept in (kept_by(cls, part) for part in parts) if kept]
        if not entries:
            return None
        return {key: sum(kept[key] for kept in entries) for key in ("partly_unknown", "with_html_entities")}

    @classmethod
    def describe(cls, total: Json | None) -> Json | None:
        """The sums themselves."""
        return total

    @classmethod
    def tell(cls, entry: Json) -> str:
        """One line, where there is anything to tell."""
        told = []
        if entry["partly_unknown"]:
            told.append(f"{entry['partly_unknown']:,} partly unknown to the tokenizer")
        if entry["with_html_entities"]:
            told.append(f"{entry['with_html_entities']:,} with HTML entities, read as they stand (caption_clean: unescape)")
        return "; ".join(told)


MEASURE = Captions

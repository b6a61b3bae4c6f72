"""Measures that say something of each image by its embedding alone: what labels.py, heads.py and target_embeddings.py share.

A value is computed once for each distinct image of a partition and stands in every row of that image. What the values depend
on besides the config, such as the sha256 of a file, is kept in each part, so that a run cannot go on with another file.
"""
import functools
from collections.abc import Iterable

import numpy as np

from addons.measures import Measure, Measured, kept_by
from addons.measures.moments import Moments, add_moments, tell_moments
from image_text_sim_clip import (
    EXIT_CONFIG,
    Config,
    ImageLoader,
    Json,
    PartitionRun,
    Plan,
    Scored,
    Scorer,
    Trouble,
    column_names,
    read_part_metadata,
)

MomentsByColumn = dict[str, Moments]


class ImageColumns(Measure):
    """A measure whose columns depend on the image's embedding alone."""

    def __init__(self, config: Config, plan: Plan, scorer: Scorer, loader: ImageLoader) -> None:
        super().__init__(config, plan, scorer, loader)
        self._refuse_other_files()

    @functools.cached_property
    def width(self) -> int:
        """The length of the model's embeddings."""
        return int(self.scorer.encode_texts(self.scorer.tokenize(["a"])[0]).shape[1])

    @functools.cached_property
    def files(self) -> Json:
        """What the values depend on besides the config: a JSON object that a run must go on with."""
        return {}

    def values_of_images(self, images: np.ndarray, norms: np.ndarray | None) -> dict[str, np.ndarray]:
        """For each column the values of m images, (m,).

        `images` (m, d) float32 are unit vectors, `norms` (m,) their lengths before, where the scorer kept them.
        """
        raise NotImplementedError

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Every row's values, and their moments; those of rows scored in an earlier run are added."""
        names = column_names(self.columns_for(self.config))
        values = {name: np.full(len(scored.cosines), np.nan, np.float32) for name in names}
        rows = np.flatnonzero(scored.image_of_row >= 0)
        if len(rows):
            used, places = np.unique(scored.image_of_row[rows], return_inverse=True)
            norms = None if scored.images.norms is None else np.asarray(scored.images.norms)[used]
            with np.errstate(over="ignore"):  # beyond float32: no value
                for name, found in self.values_of_images(np.asarray(scored.image_embeddings)[used], norms).items():
                    values[name][rows] = found[places]
        is_scored = np.isfinite(scored.cosines)
        moments = {name: Moments.of(values[name], is_scored) for name in names}
        earlier = kept_by(type(self), run.earlier)
        if earlier:
            moments = {name: add_moments([Moments.from_json(earlier["columns"][name]), moments[name]]) for name in names}
        return Measured(values, {"columns": {name: moments[name].to_json() for name in names}, "files": self.files})

    def _refuse_other_files(self) -> None:
        """Trouble (exit 2) where a part of this run was made with other files than there are now."""
        for partition in self.plan.partitions:
            kept = kept_by(type(self), read_part_metadata(self.plan, partition) or {})
            if kept is None:
                continue
            if kept["files"] != self.files:
                raise Trouble(EXIT_CONFIG, f"measures.{self.name}: {self.plan.output} was begun with other files "
                                           f"({_name_changes(kept['files'], self.files)}): discard it with --fresh, or write "
                                           "elsewhere with --set output_path=...")
            return

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> MomentsByColumn | None:
        """The moments of each column over all parts; None where no part has any."""
        total: MomentsByColumn = {}
        for part in parts:
            for name, moments in (kept_by(cls, part) or {"columns": {}})["columns"].items():
                total[name] = add_moments([total.get(name, Moments()), Moments.from_json(moments)])
        return total or None

    @classmethod
    def describe(cls, total: MomentsByColumn | None) -> Json | None:
        """For each column how many rows have a value, with mean and standard deviation."""
        return None if total is None else {name: moments.describe() for name, moments in total.items()}

    @classmethod
    def tell(cls, entry: Json) -> str:
        """The line of the summary."""
        return "; ".join(f"{name}: {tell_moments(column)}" for name, column in entry.items())


def _name_changes(before: Json, now: Json) -> str:
    """Which entries differ, by their names."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(changed) + " changed"


def is_same_model(name: str, other: str) -> bool:
    """Whether two Hub ids or folders name one model: their last segments are equal, as for recipes."""
    return name.rstrip("/").rsplit("/", 1)[-1] == other.rstrip("/").rsplit("/", 1)[-1]


def check_column_name(name: object, section: str) -> None:
    """Trouble (exit 2) for a name in `section` that no column of the results can have."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise Trouble(EXIT_CONFIG, f"{section}: {name!r} cannot name a column: a name is printable text")

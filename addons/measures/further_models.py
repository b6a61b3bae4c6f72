"""`pretrained_model: {b32: ..., dfn: ...}`: the scores of the models after the first, in columns named after them.

The loader resizes each image for every model, and the scorer encodes it for all (addons/models/several.py). Here each further
model reads the captions of the partition and scores its rows exactly as a run of its own would. Its columns are those of any
run with `_<name>` behind them; random pairs, score passport, saved embeddings (`parts/part-00012.<name>.npz`) and published
thresholds are computed for it by the measures that do so for the first model.
"""
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from addons.measures import Measure, Measured, kept_by
from addons.measures.embeddings import SavedEmbeddings
from addons.measures.passport import Passport
from addons.measures.random_pairs import PairCounts, RandomPairs
from addons.measures.thresholds import PublishedThresholds
from addons.models.several import MEASURE_NAME, SeveralScorer, all_models, check_models, further_models
from image_text_sim_clip import (
    EXIT_CONFIG,
    RESULT_COLUMNS,
    Clock,
    Column,
    Config,
    EmbeddedImages,
    ImageLoader,
    Json,
    Part,
    Partition,
    PartitionRun,
    Plan,
    Scored,
    Scorer,
    Trouble,
    column_names,
    result_table,
    score_partition,
)

if TYPE_CHECKING:
    import pyarrow as pa

INNER: tuple[type[Measure], ...] = (RandomPairs, Passport, SavedEmbeddings, PublishedThresholds)


@dataclasses.dataclass(frozen=True)
class PartitionOfModel(Partition):
    """A partition whose saved embeddings are a further model's."""

    model: str = ""

    @property
    def embeddings(self) -> pathlib.Path:
        """With save_embeddings: the further model's."""
        return self.folder / f"part-{self.index:05d}.{self.model}.npz"


class FurtherModel:
    """One further model at work on a worker's partitions, with the measures that are computed for it."""

    def __init__(self, name: str, scorer: Scorer, plan: Plan, loader: ImageLoader) -> None:
        self.name = name
        self.scorer = scorer
        self.plan = dataclasses.replace(plan, config=scorer.config)  # for its columns, which are those of a run of its own
        self.loader = loader
        self.inner: list[Measure] = []
        for measure in INNER:
            if measure.wanted(scorer.config):
                self.inner.append(measure(scorer.config, plan, scorer, self.loader))
                self.loader = self.inner[-1].wrap(self.loader)
        self.tables: dict[int, pa.Table] = {}  # by partition: the result columns of the rows at hand, until `revise`

    def run_of(self, run: PartitionRun) -> PartitionRun:
        """The partition as this model's measures see it."""
        partition = run.partition
        own = PartitionOfModel(partition.index, partition.start, partition.stop, partition.folder, self.name)
        replaced = Part(run.replaced.table, self.metadata_of(run.earlier)) if run.replaced else None
        return dataclasses.replace(run, partition=own, replaced=replaced)

    def metadata_of(self, part: Json) -> Json:
        """What a part's metadata would be if it were this model's alone, as far as its measures look."""
        return metadata_of(part, self.name)

    def measure(self, run: PartitionRun, images: EmbeddedImages) -> Measured:
        """Score the partition's rows, and have the measures add theirs."""
        own = self.run_of(run)
        scored = score_partition(self.scorer, own, images, Clock())
        self.tables[run.partition.index] = result_table(self.plan, run.rows[[]], scored, self.scorer)
        earlier = own.earlier
        cosines = np.asarray(scored.cosines, np.float64)
        finite = cosines[np.isfinite(cosines)]
        kept: Json = {"model": self.scorer.config.pretrained_model,
                      "similarity_count": len(finite) + earlier.get("similarity_count", 0),
                      "similarity_sum": math.fsum(finite) + earlier.get("similarity_sum", 0.0), "measures": {}}
        files: dict[pathlib.Path, bytes] = {}
        uncounted_s = 0.0
        for measure in self.inner:
            since = time.perf_counter()
            measured = measure.measure(own, scored)
            if not measure.counts_in_rate:
                uncounted_s += time.perf_counter() - since
            kept["measures"][measure.name] = measured.kept
            files |= measured.files
        return Measured({}, kept, files, uncounted_s)


class FurtherModels(Measure):
    """All columns of a run once more for each further model, and `further_models` in profile.json."""

    name = MEASURE_NAME

    @classmethod
    def read_settings(cls, config: Config) -> Json:
        """All models by name, the first one's too. Trouble (exit 2) for what is none, or cannot be done for several."""
        try:
            models = all_models(config)
        except (TypeError, ValueError):
            models = {}
        is_taken_apart = isinstance((config.measures or {}).get(cls.name), list) and len(models) > 1
        if not is_taken_apart or config.pretrained_model not in list(models.values())[:1]:
            raise Trouble(EXIT_CONFIG, f"measures.{cls.name} is not written by hand: name the models under pretrained_model")
        check_models(models)
        if config.decode == "gpu":
            raise Trouble(EXIT_CONFIG, "decode: gpu makes images for one model; with several take exact or scaled")
        return models

    @classmethod
    def columns_for(cls, config: Config) -> tuple[Column, ...]:
        """The columns of every run for each further model."""
        columns: list[Column] = []
        for name, model in further_models(config).items():
            columns += [Column(f"{column.name}_{name}", column.type, f"{column.meaning}; by {model}")
                        for column in RESULT_COLUMNS]
        return tuple(columns)

    def __init__(self, config: Config, plan: Plan, scorer: "Scorer | None", loader: ImageLoader) -> None:
        super().__init__(config, plan, scorer, loader)
        assert isinstance(scorer, SeveralScorer)
        self.several = scorer
        self._loader = dataclasses.replace(loader, resize=scorer.resize_for_all)
        self._models: list[FurtherModel] = []
        for name, further in scorer.further.items():
            further.batch_size = scorer.batch_size  # as it was settled
            self._models.append(FurtherModel(name, further, plan, self._loader))
            self._loader = self._models[-1].loader

    def wrap(self, loader: ImageLoader) -> ImageLoader:
        """A loader that resizes for all models and keeps what their score passports need."""
        return self._loader

    def begin(self, run: PartitionRun) -> None:
        """Pass it on to each model's measures."""
        for model in self._models:
            own = model.run_of(run)
            for measure in model.inner:
                measure.begin(own)

    def measure(self, run: PartitionRun, scored: Scored) -> Measured:
        """Score the rows with each further model."""
        kept: Json = {}
        files: dict[pathlib.Path, bytes] = {}
        uncounted_s = 0.0
        for model in self._models:
            measured = model.measure(run, self.several.images_of(model.name, scored.images))
            kept[model.name] = measured.kept
            files |= measured.files
            uncounted_s += measured.uncounted_s
        return Measured({}, kept, files, uncounted_s)

    def revise(self, run: PartitionRun, table: "pa.Table") -> "pa.Table":
        """Put each model's columns into the part's table, in the rows at hand; others keep what they had."""
        for model in self._models:
            own = model.tables.pop(run.partition.index)
            for column in column_names(RESULT_COLUMNS):
                table = put_cells(table, f"{column}_{model.name}", own[column], np.asarray(run.rows.index))
        return table

    def close(self) -> None:
        """Let go of what was held."""
        for model in self._models:
            model.tables.clear()
            for measure in model.inner:
                measure.close()

    @classmethod
    def add_up(cls, parts: Iterable[Json]) -> "dict[str, Json]":
        """For each model its id, its rows with a score, the sum of these, and what its measures make of all parts."""
        of_models: dict[str, list[Json]] = {}
        for part in parts:
            for name in kept_by(cls, part) or {}:
                of_models.setdefault(name, []).append(metadata_of(part, name))
        return {name: add_up_parts(of_parts) for name, of_parts in of_models.items()}

    @classmethod
    def describe(cls, total: "dict[str, Json]") -> Json | None:
        """By name: the model, its rows with a score, their mean, and the entries of its measures."""
        entry: Json = {}
        for name, of_one in total.items():
            mean = of_one["sum"] / of_one["scored"] if of_one["scored"] else None
            entry[name] = {"model": of_one["model"], "scored": of_one["scored"], "mean_similarity": mean}
            for measure in INNER:
                described = measure.describe(of_one["measures"][measure.name])
                if described:
                    entry[name][measure.name] = described
        return entry or None

    @classmethod
    def complete(cls, table: "pa.Table", total: "dict[str, Json]") -> "pa.Table":
        """Fill each model's percentiles, and the status of rows that nobody tried."""
        import pyarrow as pa
        import pyarrow.compute as pc
        for name, of_one in total.items():
            pairs: PairCounts | None = of_one["measures"][RandomPairs.name]
            own = pa.table({column: table[f"{column}_{name}"] for column in ("similarity", "percentile", "random_percentile")})
            own = RandomPairs.complete(own, pairs)
            for column in own.column_names:
                table = set_column(table, f"{column}_{name}", own[column])
            status = f"status_{name}"
            table = set_column(table, status, pc.coalesce(table[status], table["status"]))
        return table

    @classmethod
    def tell(cls, entry: Json) -> str:
        """A line for each model and each of its measures."""
        lines = []
        for name, of_one in entry.items():
            mean = f", mean similarity {of_one['mean_similarity']:.4f}" if of_one["scored"] else ""
            lines.append(f"{name}: {of_one['model']}, {of_one['scored']:,} scored{mean}")
            lines += [f"{name}: {measure.name.replace('_', ' ')}: {measure.tell(of_one[measure.name])}"
                      for measure in INNER if measure.name in of_one]
        return f"\n{'':>16}  ".join(lines)


def add_up_parts(parts: list[Json]) -> Json:
    """What `FurtherModels.add_up` says of one model, from what each part's metadata would be if it were that model's alone."""
    return {"model": parts[0]["model"],
            "scored": sum(part["similarity_count"] for part in parts),
            "sum": math.fsum(part["similarity_sum"] for part in parts),
            "measures": {measure.name: measure.add_up(parts) for measure in INNER}}


def metadata_of(part: Json, name: str) -> Json:
    """What a part's metadata would be if it were the further model's alone, as far as its measures look; {} without any."""
    return dict((kept_by(FurtherModels, part) or {}).get(name) or {})


def set_column(table: "pa.Table", name: str, cells: "pa.ChunkedArray") -> "pa.Table":
    """The table with other cells in a column that it has."""
    return table.set_column(table.schema.get_field_index(name), name, cells)


def put_cells(table: "pa.Table", name: str, cells: "pa.ChunkedArray", places: np.ndarray) -> "pa.Table":
    """The table with `cells` (n,) in a column that it has, at the rows `places` (n,)."""
    import pyarrow as pa
    if len(places) == table.num_rows:
        return set_column(table, name, cells)
    merged = table[name].to_pylist()
    for place, cell in zip(places.tolist(), cells.to_pylist(), strict=True):
        merged[place] = cell
    return set_column(table, name, pa.chunked_array([pa.array(merged, table.schema.field(name).type)]))


MEASURE = FurtherModels

"""The finished scores as curation reads them: parts in input order, chunk by chunk, and what is known of the whole."""
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from addons.measures import random_pairs
from addons.measures.further_models import FurtherModels
from addons.results.earlier_run import refuse_other_format
from image_text_sim_clip import (
    EXIT_INPUT,
    EXIT_VERIFY,
    RESULT_COLUMNS,
    Column,
    Config,
    FlawedPart,
    Json,
    Plan,
    Snapshot,
    StagedRows,
    Trouble,
    arrow_type,
    as_path,
    column_name,
    column_names,
    cut_rows,
    file_sha256,
    output_names,
    read_manifest,
    read_sealed,
    result_tables,
)

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 1 << 14  # rows in memory at a time

JudgedChunk = tuple[int, "pa.Table", np.ndarray]  # number of its first row, rows as in scores.csv, verdicts uint8 (n,)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the scoring script left in `output_path`."""

    plan: Plan  # with the settings that the rows were scored with
    snapshot: Snapshot  # its parts; PartsChanged where another process has replaced one since
    parts: list[Json]  # each part's metadata, without what its measures kept
    profile: Json  # profile.json
    random_pairs: random_pairs.PairCounts | None  # histograms of random and matched pairs; None after a dry run
    names: list[str]  # the input's columns, as scores.csv names them
    source_name: str
    caption_name: str
    judged_by: str = ""  # the name of the model whose similarities are judged, where it is not the first one

    @property
    def types(self) -> dict[str, str]:
        """The type of each column of the input that had another than text: int, float or bool."""
        of_input: dict[str, str] = self.plan.manifest.get("types", {})
        shown_as = dict(zip(self.plan.manifest["columns"], self.names, strict=True))
        return {shown_as[name]: kind for name, kind in of_input.items() if name in shown_as}

    @property
    def holds_images(self) -> bool:
        """Whether images lie in the table itself, as bytes."""
        return "holds_images" in self.plan.manifest and "staged" not in self.plan.manifest

    @property
    def holds_uris(self) -> bool:
        """Whether images lie as data: URIs in a table of text, whose rows show their numbers instead."""
        return "holds_images" in self.plan.manifest and "staged" in self.plan.manifest

    @property
    def output(self) -> pathlib.Path:
        """The folder of the scores."""
        return self.plan.output

    @property
    def model(self) -> str:
        """What gave the scores that are judged: a Hub id or a folder."""
        return str(self.models[self.judged_by]) if self.judged_by else self.plan.config.pretrained_model

    @property
    def models(self) -> Json:
        """All models by name, the first one first; none for a run with one model."""
        return dict((self.plan.config.measures or {}).get(FurtherModels.name) or ())

    @property
    def similarity_column(self) -> str:
        """The column of scores.csv that is judged."""
        return self._own("similarity")

    def _own(self, column: str) -> str:
        """The name in scores.csv of what is `column` for the model that is judged by."""
        return f"{column}_{self.judged_by}" if self.judged_by and column in ("similarity", "status") else column

    def judged_by_model(self, name: str) -> "FinishedRun":
        """This run as the model of that name scored it; itself for the first model, and for a name that is no model's."""
        if name not in list(self.models)[1:]:
            return self
        totals = FurtherModels.add_up(metadata for _, metadata in self.snapshot.metadata())
        pairs = totals[name]["measures"][random_pairs.RandomPairs.name]
        profile = self.profile | {"random_pairs": None} | self.profile[FurtherModels.name][name]
        return dataclasses.replace(self, judged_by=name, random_pairs=pairs, profile=profile)

    @property
    def row_count(self) -> int:
        """How many rows there are, scored or not."""
        return sum(part["rows"] for part in self.parts)

    @property
    def scored_count(self) -> int:
        """How many rows have a similarity."""
        if self.judged_by:
            return int(self.profile["scored"])
        return sum(part["similarity_count"] for part in self.parts)

    @property
    def result_columns(self) -> tuple[Column, ...]:
        """The columns of scores.csv after the input's."""
        return self.plan.config.result_columns

    @property
    def further_columns(self) -> list[Column]:
        """The columns of further measures among them."""
        return [column for column in self.result_columns if column not in RESULT_COLUMNS]

    @property
    def schema(self) -> "pa.Schema":
        """The columns of scores.csv with their types."""
        import pyarrow as pa
        fields = [pa.field(name, pa.string()) for name in self.names]
        fields += [pa.field(column.name, arrow_type(column)) for column in self.result_columns]
        return pa.schema(fields)

    def chunks(self, columns: list[str]) -> Iterator[tuple[int, "pa.Table"]]:
        """Yield (number of the first row, table of these columns of the parts) for up to CHUNK_ROWS rows at a time.

        `similarity` and `status` are those of the model that is judged by.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq
        first_row = 0
        for partition, _ in self.snapshot.metadata():
            with partition.parquet.open("rb") as file, pq.ParquetFile(file) as part:  # by name Arrow would look for a URI
                for batch in part.iter_batches(CHUNK_ROWS, columns=[self._own(name) for name in columns]):
                    table = pa.Table.from_batches([batch])
                    shown = {self._own(name): name for name in columns}
                    yield first_row, table.rename_columns([shown[name] for name in table.column_names])
                    first_row += batch.num_rows

    def similarities(self) -> Iterator[np.ndarray]:
        """Yield all rows' similarities, in input order: float32 arrays with NaN for none."""
        return self.values("similarity")

    def values(self, column: str) -> Iterator[np.ndarray]:
        """Yield all rows' values in `column`, a number's, in input order: float32 arrays with NaN for none."""
        for _, table in self.chunks([column]):
            yield read_values(table, column)

    def judged_chunks(self, verdicts: np.ndarray) -> Iterator[JudgedChunk]:
        """Yield all rows with their verdicts, uint8 (rows,), up to CHUNK_ROWS at a time."""
        first_row = 0
        if not self.plan.partitions:  # no rows
            return
        for table in result_tables(self.snapshot):
            for start in range(0, table.num_rows, CHUNK_ROWS):
                chunk = table.slice(start, CHUNK_ROWS)
                yield first_row, chunk, np.asarray(verdicts[first_row:first_row + chunk.num_rows])
                first_row += chunk.num_rows

    def random_counts(self) -> np.ndarray | None:
        """How many random pairs score in each bin, (BINS,) int64; None where there are no random pairs."""
        if self.random_pairs is None or not self.random_pairs.random.count:
            return None
        return self.random_pairs.random.counts

    def matched_counts(self) -> np.ndarray:
        """How many rows score in each bin, (BINS,) int64."""
        if self.random_pairs is not None:
            return self.random_pairs.matched.counts
        histogram = random_pairs.Histogram()
        for similarities in self.similarities():
            histogram.add(similarities)
        return histogram.counts


def read_similarities(table: "pa.Table") -> np.ndarray:
    """The table's similarities: float32 (n,), NaN for none."""
    return read_values(table, "similarity")


def read_values(table: "pa.Table", column: str) -> np.ndarray:
    """The table's values in `column`, a number's: float32 (n,), NaN for none."""
    return table[column].to_numpy().astype(np.float32)


def open_run(config: Config) -> FinishedRun:
    """Find the finished run in `output_path` and verify its parts.

    Trouble: exit 2 for the results of another version, 3 for none or unfinished ones, 7 for a damaged part.
    """
    output = as_path(config.output_path)
    manifest = read_manifest(output)
    if manifest:
        refuse_other_format(manifest, output)
    profile = read_sealed(output / "profile.json")
    if not manifest or not profile:
        raise Trouble(EXIT_INPUT, f"{output} holds no finished scores: run image_text_sim_clip.py with this config first")
    scored_with = dataclasses.replace(config, **manifest["settings"])
    # all rows are in the parts, so the table that they came from is not opened: it may be gone by now
    plan = Plan(scored_with, output, manifest, cut_rows(manifest, output), StagedRows(output / "pairs.parquet"))
    snapshot = Snapshot(plan)
    parts = _verify_parts(snapshot)
    totals = random_pairs.RandomPairs.add_up(metadata for _, metadata in snapshot.metadata())
    names = output_names(manifest["columns"], column_names(scored_with.result_columns))
    shown_as = dict(zip(manifest["columns"], names, strict=True))
    return FinishedRun(plan, snapshot, parts, profile, totals, names, shown_as[column_name(scored_with.url_column)],
                       shown_as[column_name(scored_with.caption_column)])


def _verify_parts(snapshot: Snapshot) -> list[Json]:
    """Read every part in full, which finds any damage; returns their metadata without what their measures kept."""
    parts = []
    try:
        for partition, part in snapshot.parts():
            if part is None:
                raise Trouble(EXIT_INPUT, f"{snapshot.plan.output} is not finished ({partition.parquet.name} is missing): run "
                                          "image_text_sim_clip.py with this config again")
            # histograms are some kB a part, and there may be ten thousand parts
            parts.append({key: value for key, value in part.metadata.items() if key != "measures"})
    except FlawedPart as flaw:
        raise _tell_flaw(snapshot.plan.output, flaw.name) from None
    return parts


def check_embeddings(run: FinishedRun) -> None:
    """Read the embeddings that the run saved of its first model. Trouble (exit 7) for a file that is not what was written."""
    for partition, metadata in run.snapshot.metadata():
        written = metadata["files"].get(partition.embeddings.name)
        found = ""
        with contextlib.suppress(FileNotFoundError):
            found = file_sha256(partition.embeddings)
        if written and written["sha256"] != found:
            raise _tell_flaw(run.output, partition.embeddings.name)


def _tell_flaw(output: pathlib.Path, name: str) -> Trouble:
    return Trouble(EXIT_VERIFY, f"{output / 'parts' / name} is not what had been written: run image_text_sim_clip.py with this "
                                "config and --verify, which removes it, and then without")

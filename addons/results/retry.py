"""`--retry-failed`: score again the rows whose failure may have passed, and only those."""
import contextlib
import pathlib
import typing
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from image_text_sim_clip import (
    COMMIT_LOCK,
    FlawedPart,
    Json,
    Part,
    Partition,
    Plan,
    file_sha256,
    locked,
    metadata_in,
    output_disk,
    read_footer,
    read_part,
    read_part_metadata,
    remove_flawed_part,
    remove_path,
    say,
    write_bytes,
)

if typing.TYPE_CHECKING:
    import pandas as pd

# Failures that may be gone at another time; of http_4xx that are few, by the code with which the column `detail` begins.
PASSING = ("timeout", "connect", "dns", "http_5xx")
PASSING_4XX = ("408", "425", "429")


def may_pass(table: "pa.Table") -> "np.ndarray":
    """Which rows of a part failed for a reason that may be gone by now: bool (n,), from the columns status and detail."""
    status = table["status"].to_numpy(zero_copy_only=False).astype(str)
    detail = table["detail"].to_numpy(zero_copy_only=False).astype(str)
    busy = (status == "http_4xx") & np.isin(detail.astype("U3"), PASSING_4XX)
    return np.isin(status, PASSING) | busy


def may_pass_in(plan: Plan, partition: Partition) -> bool:
    """Whether the partition's part has such rows, or cannot be read: whoever then opens it finds the flaw.

    Reads two columns only, and checks no sha256. The statuses are read from the rows, although the part's metadata counts
    them: a part whose rows are damaged is to be found even where the metadata says that none of them may pass.
    """
    if read_part_metadata(plan, partition) is None:
        return True
    try:
        with partition.parquet.open("rb") as file:  # by name Arrow would look for a URI
            table = pq.read_table(file, columns=["status", "detail"], use_threads=False, pre_buffer=False)
        return bool(may_pass(table).any())
    except (OSError, ValueError, pa.ArrowException):
        return True


Merge = Callable[["pa.Table"], "pa.Table"]


def choose_rows(plan: Plan, partition: Partition, rows: "pd.DataFrame",
                keep: Merge) -> "tuple[pd.DataFrame, Merge, Part | None]":
    """The rows to score again (the index still tells their places), `merge`, which puts their results into the part, and that.

    `rows` are all the rows of the partition, (n, columns). `merge` takes the table that the rows were scored to, in their
    order, and returns a table of all n rows. Where there is no part, or a damaged one (it is removed): all rows, `keep`, None.
    """
    part = _read_sound_part(plan, partition)
    if part is None:
        return rows, keep, None
    with output_disk(plan.output):
        remove_path(plan.output / "curated/curated.json")  # what curate.py made of the scores as they were is finished no more
    part_table = part.table.select([field.name for field in part.table.schema if field.type != "uint32"])  # image_digests.py
    again = may_pass(part_table)  # (n,)
    # where each row's results stand once the new ones follow the old: the k-th row scored again is at n + k
    places = np.where(again, len(part_table) - 1 + np.cumsum(again), np.arange(len(part_table)))

    def merge(table: "pa.Table") -> "pa.Table":
        return pa.concat_tables([part_table, table]).take(places).combine_chunks()
    return rows[again], merge, part


def _read_sound_part(plan: Plan, partition: Partition) -> Part | None:
    """The part whose failed rows are tried again; one that is damaged is removed, and the partition is done anew."""
    try:
        return read_part(plan, partition, thorough=True)
    except FlawedPart as flaw:
        say(str(flaw))
        remove_flawed_part(plan, partition, thorough=True)
        return None


# ── Replacing a part and its files ────────────────────────────────────────────────────────────────────────────────────
# A retry replaces a part and its files, which cannot both be renamed at once. Until the part is, the old files are what it
# needs; so the new ones wait under another name, from which `finish_commits` takes them where a process died in between.

def replace_part(partition: Partition, data: bytes, metadata: Json, files: Mapping[pathlib.Path, bytes]) -> None:
    """Write a part's `data`, which has this `metadata`, and the `files` next to it, over those that are there."""
    for path, content in files.items():
        write_bytes(_name_of_next(path), content)
    write_bytes(partition.parquet, data)
    _finish_commit(partition.parquet, metadata)


def _name_of_next(path: pathlib.Path) -> pathlib.Path:
    """Where a file waits for the part that it belongs to."""
    return path.with_name(path.name + ".next")


def _finish_commit(part: pathlib.Path, metadata: Json) -> None:
    """Give the files that waited for `part` their names."""
    for name, written in metadata["files"].items():
        path = part.with_name(name)
        with output_disk(path), contextlib.suppress(FileNotFoundError):
            if file_sha256(_name_of_next(path)) == written["sha256"]:
                _name_of_next(path).replace(path)


def finish_commits(output: pathlib.Path) -> None:
    """End what processes that died while they replaced a part had begun: its new files get their names, or go."""
    waiting = list((output / "parts").glob("part-*.next"))
    if not waiting:
        return
    with locked(output, COMMIT_LOCK):
        for path in waiting:
            part = path.with_name(path.name.split(".")[0] + ".parquet")
            footer = read_footer(part)
            _finish_commit(part, (metadata_in(footer) if footer else None) or {"files": {}})
            with output_disk(path):
                path.unlink(missing_ok=True)

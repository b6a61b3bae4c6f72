"""`--retry-failed`: score again the rows whose failure may have passed, and only those."""
import typing
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from image_text_sim_clip import Partition, Plan, read_part_metadata

if typing.TYPE_CHECKING:
    import pandas as pd

# Failures that may be gone at another time; of http_4xx that is 429 alone, which the column `detail` tells.
PASSING = ("timeout", "connect", "dns", "http_5xx")


def may_pass(table: "pa.Table") -> "np.ndarray":
    """Which rows of a part failed for a reason that may be gone by now: bool (n,), from the columns status and detail."""
    status = table["status"].to_numpy(zero_copy_only=False).astype(str)
    detail = table["detail"].to_numpy(zero_copy_only=False).astype(str)
    busy = (status == "http_4xx") & np.char.startswith(detail, "429")
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


def failed_rows(rows: "pd.DataFrame", part_table: "pa.Table") -> "tuple[pd.DataFrame, Callable[[pa.Table], pa.Table]]":
    """The rows to score again (the index still tells their places), and `merge`, which puts their results into the part.

    `rows` are all the rows of the partition, (n, columns), `part_table` is its part. `merge` takes the table that the rows
    were scored to, in their order, and returns a table of all n rows.
    """
    again = may_pass(part_table)  # (n,)
    # where each row's results stand once the new ones follow the old: the k-th row scored again is at n + k
    places = np.where(again, len(part_table) - 1 + np.cumsum(again), np.arange(len(part_table)))

    def merge(table: "pa.Table") -> "pa.Table":
        return pa.concat_tables([part_table, table]).take(places).combine_chunks()
    return rows[again], merge

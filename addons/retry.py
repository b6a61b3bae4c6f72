"""Score again the rows whose failure may have passed, and only those: `--retry-failed`."""
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Failures that may be gone at another time; of http_4xx that is 429 alone, which the column `detail` tells.
PASSING = ("timeout", "connect", "dns", "http_5xx")


def may_pass(part: Any) -> Any:
    """Which rows of a part (a pyarrow table) failed for a reason that may be gone by now: bool (n,)."""
    status, detail = (part[name].to_numpy(zero_copy_only=False).astype(str) for name in ("status", "detail"))
    return np.isin(status, PASSING) | ((status == "http_4xx") & np.char.startswith(detail, "429"))


def may_pass_in(parquet: pathlib.Path) -> bool:
    """Whether the part in the file `parquet` has such rows, or cannot be read: whoever then opens it finds the flaw."""
    try:
        return bool(may_pass(pq.read_table(parquet, columns=["status", "detail"], use_threads=False, pre_buffer=False)).any())
    except (OSError, ValueError, pa.ArrowException):
        return True


def failed_rows(rows: Any, part: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The rows (a DataFrame, its index their places) to score again; and what puts their results (a table) into the part."""
    again = may_pass(part)
    places = np.where(again, len(part) - 1 + np.cumsum(again), np.arange(len(part)))

    def merge(table: Any) -> Any:
        return pa.concat_tables([part, table]).take(places).combine_chunks()
    return rows[again], merge

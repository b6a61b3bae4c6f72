"""Other shapes of the results: cells that a spreadsheet will not run, and Parquet."""
import itertools
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

import pyarrow.parquet as pq


def escape_formula(cell: str) -> str:
    """A cell that a spreadsheet would run as a formula, made plain text by a leading '.

    To undo it, take one ' away from each cell that matches ^'+[=+\\-@\\t\\r].
    """
    return "'" + cell if re.match(r"'*[=+\-@\t\r]", cell) else cell


def write_parquet(tables: Iterable[Any], file: BinaryIO) -> None:
    """Stream tables of one schema, at least one, into one Parquet file, a row group each."""
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)

"""Other shapes of the results: cells that a spreadsheet will not run, and Parquet."""
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
    """Stream tables of one schema into one Parquet file, a row group each."""
    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()

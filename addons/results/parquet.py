"""`output_format: parquet`: scores.parquet, the columns of scores.csv with their types, a row group for each partition."""
import typing
from collections.abc import Iterable

import pyarrow.parquet as pq

if typing.TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "parquet"


def write(tables: "Iterable[pa.Table]", file: typing.BinaryIO) -> None:
    """Stream tables of one schema, at least one, into one Parquet file."""
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)

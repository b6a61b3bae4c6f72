"""Parquet files, planned from their footers alone and read where they lie, a row group at a time."""
import pyarrow as pa
import pyarrow.parquet as pq

from addons.inputs.columnar import BlockFile, BlockReader
from addons.inputs.files import InputFile


class ParquetFile(BlockFile):
    """An open Parquet file; its blocks are its row groups."""

    def __init__(self, file: InputFile) -> None:
        self._file = pq.ParquetFile(file.open_native())
        metadata = self._file.metadata
        self.schema = self._file.schema_arrow  # read here, so that a footer with flaws is found here
        self.block_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if sum(self.block_rows) != metadata.num_rows:
            raise ValueError(f"its footer counts {metadata.num_rows} rows and {sum(self.block_rows)}")

    def read_block(self, number: int, columns: list[str]) -> pa.Table:
        """The row group of that number, with these columns."""
        return self._file.read_row_group(number, columns=columns)

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)


class ParquetReader(BlockReader):
    """Parquet files, any number of them."""

    kind = "parquet"
    suffixes = (".parquet",)

    def open_file(self, file: InputFile) -> ParquetFile:
        """Open a file and read its footer."""
        return ParquetFile(file)


READER = ParquetReader()

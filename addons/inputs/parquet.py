"""Parquet files, planned from their footers alone and read where they lie, a row group at a time."""
import pyarrow as pa
import pyarrow.parquet as pq

from addons.inputs.columnar import BlockFile, BlockReader
from addons.inputs.files import InputFile

MOST_BLOCK_BYTES = 4_000_000_000  # of one row group, unpacked, in the columns that are read


class ParquetFile(BlockFile):
    """An open Parquet file; its blocks are its row groups."""

    def __init__(self, file: InputFile) -> None:
        self._input = file
        self._file = pq.ParquetFile(file.open_native())
        self._with_dictionaries: pq.ParquetFile | None = None
        self._metadata = self._file.metadata
        self.schema = self._file.schema_arrow  # read here, so that a footer with flaws is found here
        self.schema.names  # noqa: B018 - and a name that is no text
        self.block_rows = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        if sum(self.block_rows) != self._metadata.num_rows:
            raise ValueError(f"its footer counts {self._metadata.num_rows} rows and {sum(self.block_rows)}")

    def read_block(self, number: int, columns: list[str]) -> pa.Table:
        """The row group of that number, with these columns, whose text comes as dictionaries.

        A value that the file holds once and repeats is held once here, too: as plain text it could be thousands of times as
        large as the file. Raises ValueError for a row group that is too large for all that.
        """
        group = self._metadata.row_group(number)
        size = 8 * group.num_rows * len(columns)
        for place in range(group.num_columns):
            if group.column(place).path_in_schema in columns:
                size += group.column(place).total_uncompressed_size
        if size > MOST_BLOCK_BYTES:
            raise ValueError(f"a row group takes {size >> 20} MiB, too many to be read at a time")
        if self._with_dictionaries is None:
            is_text = (pa.types.is_string, pa.types.is_large_string)
            text = [field.name for field in self.schema if any(test(field.type) for test in is_text)]
            self._with_dictionaries = pq.ParquetFile(self._input.open_native(), metadata=self._metadata, read_dictionary=text)
        return self._with_dictionaries.read_row_group(number, columns=columns)

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)
        if self._with_dictionaries is not None:
            self._with_dictionaries.close(force=True)


class ParquetReader(BlockReader):
    """Parquet files, any number of them."""

    kind = "parquet"
    suffixes = (".parquet",)

    def open_file(self, file: InputFile) -> ParquetFile:
        """Open a file and read its footer."""
        return ParquetFile(file)


READER = ParquetReader()

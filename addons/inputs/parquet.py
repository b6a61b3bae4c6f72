"""Parquet files, planned from their footers and read where they lie, a few pages of a row group at a time."""
import hashlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from addons.inputs.columnar import BlockFile, BlockReader
from addons.inputs.compression import MAGIC_BYTES, name_compression
from addons.inputs.files import InputFile

PIECE_ROWS = 8192  # read at a time, at most …
PIECE_BYTES = 16_000_000  # … and fewer where they are long
IMAGE_BYTES = 8_000_000  # the same of images
MOST_REPEATED_BYTES = 512_000_000  # that a dictionary of images may stand for in a piece: reading row by row is slow
PARQUET_START = b"PAR1"  # begins a file that is one, if perhaps not a whole one
READ_BYTES = 1 << 18  # of a column's pages at a time
PREFIXES = "DELTA_BYTE_ARRAY"  # the encoding in which a value begins as the one before it, of which it repeats any length
MOST_PREFIXED_BYTES = 64_000_000  # of a piece, where it is also MOST_PREFIXED times as long as what the file holds for it
MOST_PREFIXED = 32  # sorted URLs are a tenth in this encoding
NEVER_DICTIONARIES = {PREFIXES, "DELTA_LENGTH_BYTE_ARRAY"}  # encodings that Arrow reads as plain values alone


class ParquetFile(BlockFile):
    """An open Parquet file; its blocks are its row groups."""

    def __init__(self, file: InputFile) -> None:
        self._input = file
        self._info = file.info()
        try:
            self._file = pq.ParquetFile(file.open_native())
        except pa.ArrowInvalid:
            start = file.read_range(0, MAGIC_BYTES)
            if not start.startswith(PARQUET_START):
                name_compression(start, file.name)  # raises Trouble for what is known
            raise
        self._check_same()
        self._metadata = self._file.metadata
        self.schema = self._file.schema_arrow  # read here, so that a footer with flaws is found here
        self.schema.names  # noqa: B018 - and a name that is no text
        self.block_rows = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        if sum(self.block_rows) != self._metadata.num_rows:
            raise ValueError(f"its footer counts {self._metadata.num_rows} rows and {sum(self.block_rows)}")

    def read_block(self, number: int, columns: list[str]) -> pa.Table:
        """The row group of that number, with these columns."""
        pieces = list(self.read_pieces(number, columns))
        return pa.concat_tables(pieces) if pieces else self.schema.empty_table().select(columns)

    def read_pieces(self, number: int, columns: list[str]) -> Iterator[pa.Table]:
        """The row group of that number, with these columns, a few of its pages at a time; text and bytes come as dictionaries.

        A value that the file holds once and repeats is held once here, too: as plain text it could be thousands of times as
        large as the file.
        """
        piece_bytes = IMAGE_BYTES if any(name.endswith(".bytes") for name in columns) else PIECE_BYTES
        rows = int(min(PIECE_ROWS, max(1.0, piece_bytes / max(1.0, self.row_bytes(number, columns)))))
        rows = min(rows, self._most_rows(number, columns))
        with self._open_again(number) as file:
            for batch in file.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                table = pa.Table.from_batches([batch])
                if table.nbytes > MOST_PREFIXED_BYTES:
                    self._refuse_prefixes(number, columns, table)
                yield table

    def _refuse_prefixes(self, number: int, columns: list[str], table: pa.Table) -> None:
        """Raise ValueError for a piece of long values of which the file holds little, because each begins as the one before."""
        group = self._metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        has_prefixes = any(PREFIXES in chunk.encodings and self._is_among(chunk, columns) for chunk in chunks)
        if has_prefixes and table.nbytes > MOST_PREFIXED * self.row_bytes(number, columns) * len(table):
            raise ValueError(f"{len(table)} rows are {table.nbytes >> 20} MiB, over {MOST_PREFIXED} times what the file holds")

    def _open_again(self, number: int) -> pq.ParquetFile:
        """The file once more, for one reader of a row group: what it takes for that is given back when it is closed."""
        leaves = []
        for place in range(self._metadata.num_columns):
            leaf = self._metadata.schema.column(place)
            is_text = leaf.physical_type == "BYTE_ARRAY" and leaf.max_repetition_level <= 1
            if is_text and not self._is_read_plain(number, place):
                leaves.append(leaf.path)
        opened = pq.ParquetFile(self._input.open_native(), metadata=self._metadata, read_dictionary=leaves, pre_buffer=False,
                                buffer_size=READ_BYTES)
        self._check_same()
        return opened

    def _check_same(self) -> None:
        """Raise OSError where another object has taken the place of the one whose footer was read."""
        if self._input.info() != self._info:
            raise OSError("it was replaced while it was read")

    def _dictionary_bytes(self, number: int, place: int) -> int:
        """How many bytes the dictionary of a column's row group takes in the file, 0 for none."""
        column = self._metadata.row_group(number).column(place)
        if not column.has_dictionary_page or column.dictionary_page_offset is None:
            return 0
        return max(0, column.data_page_offset - column.dictionary_page_offset)

    def _is_read_plain(self, number: int, place: int) -> bool:
        """Whether a column is read without a dictionary: where Arrow can do no other, and where it holds bytes, which is faster
        so, unless they may be far larger unpacked."""
        column = self._metadata.row_group(number).column(place)
        if not NEVER_DICTIONARIES.isdisjoint(column.encodings):
            return True
        is_bytes = self._metadata.schema.column(place).logical_type.type == "NONE"
        return bool(is_bytes and column.total_uncompressed_size <= 4 * column.total_compressed_size)

    def _most_rows(self, number: int, columns: list[str]) -> int:
        """How many rows may be read at a time: each may be as long as all that a column that is read plain can repeat."""
        most = PIECE_ROWS
        group = self._metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            if self._is_among(column, columns) and self._is_read_plain(number, place):
                longest = self._dictionary_bytes(number, place)
                if PREFIXES in column.encodings:
                    longest = max(longest, column.total_uncompressed_size)
                most = min(most, MOST_REPEATED_BYTES // max(1, longest))
        return max(1, most)

    @staticmethod
    def _is_among(column: pq.ColumnChunkMetaData, columns: list[str]) -> bool:
        """Whether a row group's column is one of `columns`, or a field of one."""
        path: str = column.path_in_schema
        return path in columns or path.partition(".")[0] in columns

    def row_bytes(self, number: int, columns: list[str]) -> float:
        """How many bytes a row of the row group has in these columns, on average, as the footer says."""
        group = self._metadata.row_group(number)
        size = 8 * group.num_rows * len(columns)
        for place in range(group.num_columns):
            if self._is_among(group.column(place), columns):
                size += group.column(place).total_uncompressed_size
        return size / max(1, group.num_rows)

    def may_hold(self, number: int, column: str, low: str, high: str) -> bool:
        """False where the footer's smallest and largest value of the column leave nothing between `low` and `high`."""
        group = self._metadata.row_group(number)
        for place in range(group.num_columns):
            if group.column(place).path_in_schema == column:
                statistics = group.column(place).statistics
                if statistics is None or not statistics.has_min_max or not isinstance(statistics.max, str):
                    return True
                return bool(statistics.min <= high and statistics.max >= low)
        return True

    def footer(self) -> bytes:
        """The file's end as it lies there: its schema, and where everything is."""
        with self._input.open() as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            return file.read(length + 8)

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

    def hash_index(self, file: InputFile) -> str:
        """The sha256 of the footer, which tells how large each column of each row group is, and often its extremes."""
        with ParquetFile(file) as opened:
            return hashlib.sha256(opened.footer()).hexdigest()


READER = ParquetReader()

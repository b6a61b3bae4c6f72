"""Tables in files that have a schema and hold their rows in blocks, which are read one at a time: Parquet, and its like."""
import bisect
import collections
import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

import pyarrow as pa
import pyarrow.compute as pc

from addons.inputs import Manifest, needed_columns
from addons.inputs.files import FileRows, InPlaceReader, InputFile
from image_text_sim_clip import EXIT_INPUT, MAX_COLUMNS, Config, Trouble, say

if TYPE_CHECKING:
    import pandas as pd

MOST_TEXT_BYTES = 500_000_000  # that a file's own repetitions (its dictionaries) may stand for in a stretch of rows
PLANNING_THREADS = 8  # schemas are read side by side: on a network disk each costs a round trip


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """While in this context, what Arrow or the disk raise becomes Trouble (exit 3) that names the file."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # ArrowInvalid is a ValueError, ArrowNotImplemented is none
        raise Trouble(EXIT_INPUT, f"cannot read {name}: {error}") from None


class BlockFile:
    """An open file. A subclass sets both attributes when it is made, and reads a block."""

    schema: pa.Schema
    block_rows: list[int]  # how many rows each block has

    def read_block(self, number: int, columns: list[str]) -> pa.Table:
        """The block of that number, with these columns of the schema."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class BlockReader(InPlaceReader):
    """A Reader of such files. A subclass says `kind`, `suffixes` and how to open a file."""

    def open_file(self, file: InputFile) -> BlockFile:
        """Open a file; OSError, ValueError or ArrowException where that cannot be done."""
        raise NotImplementedError

    def describe_files(self, found: list[InputFile], config: Config) -> Manifest:
        """All columns that are text or can be told as text, from the schemas alone; the names of the others are `left_out`."""
        needed = needed_columns(config)
        columns: dict[str, None] = {}
        left_out: set[str] = set()
        described = []
        with ThreadPoolExecutor(PLANNING_THREADS) as pool:
            for schema, entry in pool.map(self._look_at, found):
                check_schema(schema, needed, entry["name"])
                for field in schema:
                    if is_textual(field.type):
                        columns[field.name] = None
                    else:
                        left_out.add(field.name)
                described.append(entry)
        if left_out:
            say(f"columns that are neither text nor numbers are left out: {', '.join(sorted(left_out))[:300]}")
        return {"kind": self.kind, "columns": list(columns), "rows": sum(entry["rows"] for entry in described), "malformed": 0,
                "files": described, "left_out": sorted(left_out)}

    def _look_at(self, file: InputFile) -> tuple[pa.Schema, Manifest]:
        with reading(file.name), self.open_file(file) as opened:
            return opened.schema, {"name": file.name, "rows": sum(opened.block_rows), **self.identify(file)}

    def open_files(self, manifest: Manifest, found: list[InputFile], config: Config) -> "BlockRows":
        """The rows of the files."""
        return BlockRows(self, manifest, found)


def check_schema(schema: pa.Schema, needed: list[str], file_name: str) -> None:
    """Raise Trouble (exit 3) unless the columns that are needed are there as text, and no two have one name."""
    names = schema.names
    if len(names) > MAX_COLUMNS:
        raise Trouble(EXIT_INPUT, f"{file_name} has {len(names)} columns, more than {MAX_COLUMNS}: no table of pairs")
    twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    if twice:
        raise Trouble(EXIT_INPUT, f"{file_name} has more than one column {twice[0]!r}")
    for name in needed:
        if name not in names:
            raise Trouble(EXIT_INPUT, f"{name!r} is not among the columns of {file_name}: {', '.join(names)[:300]}")
        kind = schema.field(name).type
        if pa.types.is_nested(kind):
            raise Trouble(EXIT_INPUT, f"{name!r} is not text in {file_name} but {kind}: lists and objects are not read yet, so "
                                      "write a table with one row for each text (pandas: explode)")
        if not is_textual(kind):
            raise Trouble(EXIT_INPUT, f"{name!r} is not text in {file_name}: {', '.join(names)[:300]}")


def is_textual(kind: pa.DataType) -> bool:
    """Whether cells of this type have one plain text: strings, numbers, truth values, dates and times."""
    types = pa.types
    if types.is_dictionary(kind):
        return is_textual(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating,
             types.is_boolean, types.is_decimal, types.is_date, types.is_time, types.is_timestamp, types.is_null)
    return any(test(kind) for test in tests)


def to_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any textual column as strings, "" for NULL; bytes that are no UTF-8, which Parquet lets pass, become U+FFFD.

    Raises ValueError for a dictionary that stands for more text than MOST_TEXT_BYTES.
    """
    if pa.types.is_dictionary(column.type):
        column = _spell_out(column)
    if pa.types.is_null(column.type):
        return empty_cells(len(column))
    try:
        text = column.cast(pa.string()).fill_null("")
    except pa.ArrowException:  # a date of no calendar, in a column that may not even count
        return pa.chunked_array([pa.array([_tell_cell(cell) for cell in column], pa.string())])
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        cells = [cell.as_py().decode("utf-8", "replace") for cell in text.cast(pa.binary())]
        return pa.chunked_array([pa.array(cells, pa.string())])
    return text


def _spell_out(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of dictionaries and places in them as one of values, unless that would be far larger than the file."""
    values = column.type.value_type
    if pa.types.is_string(values) or pa.types.is_large_string(values):
        size = 0
        for chunk in column.chunks:
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            size += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        if size > MOST_TEXT_BYTES:
            raise ValueError(f"{len(column)} rows of a column hold {size >> 20} MiB of text, more than are read at a time: "
                             "set partition_rows lower")
    return column.cast(values)


def _tell_cell(cell: pa.Scalar) -> str:
    """One cell as text, the number that stands for it where it has no other; "" for NULL."""
    if not cell.is_valid:
        return ""
    try:
        return str(cell.cast(pa.string()).as_py())
    except pa.ArrowException:
        return str(getattr(cell, "value", ""))


def empty_cells(count: int) -> pa.ChunkedArray:
    """A column of so many empty strings."""
    return pa.chunked_array([pa.array([""] * count, pa.string())])


class BlockRows(FileRows):
    """Rows of such files by number. One decoded block is kept, so that consecutive partitions decode it once."""

    def __init__(self, reader: BlockReader, manifest: Manifest, found: list[InputFile]) -> None:
        super().__init__(manifest, found)
        self.reader = reader
        self.schema = pa.schema([(name, pa.string()) for name in self.columns])
        self._forget()

    def _forget(self) -> None:
        self._opened: BlockFile | None = None
        self._opened_number = -1  # its place in `files`
        self._edges: list[int] = []  # the first row of each of its blocks, and the end
        self._block: pa.Table | None = None  # of the opened file, as it has it: its dictionaries may stand for far more
        self._block_number = -1

    def __getstate__(self) -> dict[str, object]:
        """Without an open file: an engine may send the rows to another process."""
        kept = ("columns", "files", "counts", "starts", "reader", "schema")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text; a column that a file lacks is "" there."""
        pieces = [self.schema.empty_table(), *self._pieces(start, stop)]
        return pa.concat_tables(pieces).to_pandas()

    def _pieces(self, start: int, stop: int) -> Iterator[pa.Table]:
        for number, row, stretch_end in self.stretches(start, stop):
            opened = self._open(number)
            while row < stretch_end:
                block = bisect.bisect_right(self._edges, row) - 1
                end = min(self._edges[block + 1], stretch_end)
                rows = self._read(opened, block).slice(row - self._edges[block], end - row)
                with reading(self.files[number].name):
                    yield self._to_text(opened, rows)
                row = end

    def _open(self, number: int) -> BlockFile:
        if self._opened is None or self._opened_number != number:
            if self._opened is not None:
                self._opened.close()
            self._forget()
            file = self.files[number]
            with reading(file.name):
                opened = self.reader.open_file(file)
            if sum(opened.block_rows) != self.counts[number]:
                raise Trouble(EXIT_INPUT, f"{file.name} has changed since the run was planned")
            self._opened = opened
            self._opened_number = number
            self._edges = list(itertools.accumulate(opened.block_rows, initial=0))
        return self._opened

    def _read(self, opened: BlockFile, block: int) -> pa.Table:
        """The block as the file has it, or as it is kept from the last time."""
        if self._block is None or self._block_number != block:
            self._block = None  # the old one goes before the new one comes
            textual = self._textual(opened)
            with reading(self.files[self._opened_number].name):
                table = opened.read_block(block, [name for name in self.columns if name in textual])
                if len(table) != opened.block_rows[block]:
                    raise ValueError("a block has not the rows that the file counts for it")
            self._block = table
            self._block_number = block
        return self._block

    def _textual(self, opened: BlockFile) -> set[str]:
        return {field.name for field in opened.schema if is_textual(field.type)}

    def _to_text(self, opened: BlockFile, table: pa.Table) -> pa.Table:
        """Rows of a block with all columns as text."""
        textual = self._textual(opened)
        cells = [to_text(table[name]) if name in textual else empty_cells(len(table)) for name in self.columns]
        return pa.Table.from_arrays(cells, schema=self.schema)

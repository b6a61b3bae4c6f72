"""Tables in files that have a schema and hold their rows in blocks, which are read a piece at a time: Parquet, and its like.

A row may hold its image: bytes, the struct {bytes, path} that Hugging Face's `datasets` writes, or a data: URI in a column of
text. Its shown source is then the path or, where there is none, the number of the input's row; see table_images.py. A column
of lists of captions makes a row of each; see caption_lists.py.
"""
import bisect
import collections
import contextlib
import itertools
import pathlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from addons.inputs import Manifest, needed_columns
from addons.inputs.caption_lists import CAPTION_INDEX, OWN_INDEX, Captions, find_blank, is_list, take_captions
from addons.inputs.files import FileRows, InPlaceReader, InputFile, is_other
from image_text_sim_clip import EXIT_INPUT, MAX_COLUMNS, Config, Trouble, column_name, say

if TYPE_CHECKING:
    import pandas as pd

MOST_TEXT_BYTES = 500_000_000  # that a file's own repetitions (its dictionaries) may stand for in a stretch of rows
PARTITION_BYTES = 64_000_000  # of rows: where rows are longer than usual, a partition has fewer of them
MOST_PARTITION_ROWS = 10_000  # that `partition_rows: auto` gives
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

    def read_pieces(self, number: int, columns: list[str]) -> Iterator[pa.Table]:
        """The block in pieces, each small enough for the memory. A column `image.path` is that field of a struct `image`.

        A kind whose blocks are large reads them so; this one reads the whole of a block.
        """
        known = set(self.schema.names)
        names = [name if name in known else name.rpartition(".")[0] for name in columns]
        yield self.read_block(number, list(dict.fromkeys(names)))

    def row_bytes(self, number: int, columns: list[str]) -> float:
        """How many bytes a row of the block has in these columns, on average; 0 where that is not known."""
        return 0.0

    def may_hold(self, number: int, column: str, low: str, high: str) -> bool:
        """Whether a block may have a cell of text between `low` and `high` in the column, as far as that is quickly known."""
        return True

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

    def describe(self, config: Config, output: pathlib.Path) -> Manifest:
        """See Reader. Columns that are left out are named."""
        described = super().describe(config, output)
        if remark := remark_on_left_out(described):
            say(remark)
        return described

    def describe_files(self, found: list[InputFile], config: Config) -> Manifest:
        """All columns that are text or can be told as text; the names of the others are `left_out`.

        From the schemas alone, but for lists of captions, which are counted, and columns that may hold data: URIs.
        """
        needed = needed_columns(config)
        columns: dict[str, None] = {}
        left_out: set[str] = set()
        looked_at: list[LookedAt] = []
        with ThreadPoolExecutor(PLANNING_THREADS) as pool:
            for looked in pool.map(lambda file: self._look_at(file, needed), found):
                for field in looked.schema:
                    if is_textual(field.type) or field.name in needed:
                        columns[field.name] = None
                    else:
                        left_out.add(field.name)
                columns.update(dict.fromkeys(dict(looked.file.folder_columns)))
                looked_at.append(looked)
        left_out -= columns.keys()
        has_lists = any(is_list(looked.schema.field(needed[-1]).type) for looked in looked_at)
        if has_lists:
            columns = {OWN_INDEX if name == CAPTION_INDEX else name: None for name in columns} | {CAPTION_INDEX: None}
            self._count_captions(looked_at, needed[-1], config.limit)
        described = {"kind": self.kind, "columns": list(columns), "rows": sum(looked.entry["rows"] for looked in looked_at),
                     "malformed": 0, "files": [looked.entry for looked in looked_at], "left_out": sorted(left_out)}
        if has_lists:
            described["input_rows"] = _count_input_rows([looked.entry for looked in looked_at], config.limit)
            for looked in looked_at:
                looked.entry.pop("first_rows", None)
        types = _find_types(looked_at, list(columns))
        if types:
            described["types"] = types
        if any(looked.has_images for looked in looked_at):
            described["holds_images"] = True
        cuts = _cut_long_rows(looked_at)
        return described | {"cuts": cuts} if cuts else described

    def _look_at(self, file: InputFile, needed: list[str]) -> "LookedAt":
        with reading(file.name), self.open_file(file) as opened:
            check_schema(opened.schema, needed, file.name)
            entry = {"name": file.name, "rows": sum(opened.block_rows), **self.identify(file)}
            index_sha256 = self.hash_index(file)
            if index_sha256:
                entry["index_sha256"] = index_sha256
            columns = [name for name in opened.schema.names if is_textual(opened.schema.field(name).type)]
            if is_list(opened.schema.field(needed[-1]).type):
                columns.append(needed[-1])
            row_bytes = [opened.row_bytes(number, columns) for number in range(len(opened.block_rows))]
            has_images = is_image(opened.schema.field(needed[0]).type) or _holds_data_uris(opened, needed[0])
            return LookedAt(file, opened.schema, entry, opened.block_rows, row_bytes, has_images)

    def _count_captions(self, looked_at: "list[LookedAt]", caption_column: str, limit: int | None) -> None:
        """Put into the entries of files with lists how many captions each block has; those behind `limit` are not counted."""
        rows = 0
        for looked in looked_at:
            entry = looked.entry
            if is_list(looked.schema.field(caption_column).type) and (limit is None or rows < limit):
                entry["input_rows"] = entry["rows"]
                entry["block_rows"] = []
                entry["first_rows"] = []
                with reading(looked.file.name), self.open_file(looked.file) as opened:
                    for number in range(len(opened.block_rows)):
                        indices = [split_captions(piece[caption_column]).numbers
                                   for piece in opened.read_pieces(number, [caption_column])]
                        found = np.concatenate(indices) if indices else np.zeros(0, np.int64)
                        if np.count_nonzero(found == 0) != opened.block_rows[number]:
                            raise ValueError("a block has not the rows that the file counts for it")
                        entry["block_rows"].append(len(found))
                        entry["first_rows"].append(np.flatnonzero(found == 0).astype(np.int32))
                entry["rows"] = sum(entry["block_rows"])
            rows += entry["rows"]

    def open_files(self, manifest: Manifest, found: list[InputFile], config: Config) -> "BlockRows":
        """The rows of the files."""
        if manifest.get("holds_images"):
            from addons.inputs.table_images import BlockRowsWithImages
            return BlockRowsWithImages(self, manifest, found, config)
        return BlockRows(self, manifest, found, config)


def remark_on_left_out(described: Manifest) -> str:
    """What to say of the columns that are neither text nor numbers; "" where there are none."""
    names = ", ".join(described["left_out"])
    return f"columns that are neither text nor numbers are left out: {names[:300]}" if names else ""


class LookedAt(NamedTuple):
    """What planning has seen of a file."""

    file: InputFile
    schema: pa.Schema
    entry: Manifest  # for manifest.json
    block_rows: list[int]
    row_bytes: list[float]  # of a row of each block, on average
    has_images: bool


def _find_types(looked_at: list[LookedAt], columns: list[str]) -> dict[str, str]:
    """The columns that are numbers or truth values in all files that have them, for those who write the table anew."""
    found: dict[str, str] = {}
    for name in columns:
        stored = CAPTION_INDEX if name == OWN_INDEX else name
        kinds = {name_type(looked.schema.field(stored).type) for looked in looked_at if stored in looked.schema.names}
        kinds |= {"" for looked in looked_at if name in dict(looked.file.folder_columns)}
        if kinds and "" not in kinds:
            found[name] = kinds.pop() if len(kinds) == 1 else ""
    has_lists = [any(map(is_list, looked.schema.types)) for looked in looked_at]
    if any(has_lists) and CAPTION_INDEX in columns:
        found[CAPTION_INDEX] = "int"
    return {name: kind for name, kind in found.items() if kind}


def name_type(kind: pa.DataType) -> str:
    """What a column's type is called in manifest.json; "" for what is text there."""
    types = pa.types
    if types.is_integer(kind):
        return "int"
    if types.is_floating(kind):
        return "float"
    return "bool" if types.is_boolean(kind) else ""


def _count_input_rows(entries: list[Manifest], limit: int | None) -> int:
    """How many rows of the files the first `limit` rows come from, which are one for each caption."""
    count = 0
    left = sys.maxsize if limit is None else limit
    for entry in entries:
        rows: int = entry["rows"]
        if left >= rows:
            count += int(entry.get("input_rows", rows))
        elif "block_rows" not in entry:
            count += left
        else:
            starts = itertools.accumulate(entry["block_rows"], initial=0)
            for start, first_rows in zip(starts, entry["first_rows"], strict=False):
                count += int(np.count_nonzero(first_rows + start < left))
        left = max(0, left - rows)
    return count


def _cut_long_rows(looked_at: list[LookedAt]) -> list[int]:
    """The rows at which a partition has to begin, so that it holds no more than PARTITION_BYTES; [] where rows are short."""
    cuts: list[int] = []
    start = 0
    for looked in looked_at:
        block_rows = looked.entry.get("block_rows", looked.block_rows)
        for rows, row_bytes in zip(block_rows, looked.row_bytes, strict=True):
            most = int(PARTITION_BYTES // max(1.0, row_bytes)) or 1
            if most < MOST_PARTITION_ROWS and rows > most:
                cuts += range(start, start + rows, most)
            start += rows
    return cuts


def is_image(kind: pa.DataType) -> bool:
    """Whether cells of this type hold images: bytes, or a struct with a field `bytes`."""
    types = pa.types
    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and is_image(kind.field(place).type) and not types.is_struct(kind.field(place).type)
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view))


DATA_URI = "data:"  # what begins so is no name of an image, but the image itself


def _holds_data_uris(opened: BlockFile, url_column: str) -> bool:
    """Whether a column of text holds data: URIs, told from what the file says of each block or, in doubt, from the cells."""
    for number in range(len(opened.block_rows)):
        if opened.may_hold(number, url_column, DATA_URI.upper(), "data;"):
            for piece in opened.read_pieces(number, [url_column]):
                if find_data_uris(to_text(piece[url_column])).any():
                    return True
    return False


def find_data_uris(urls: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Which cells of a column of text are data: URIs, (n,)."""
    starts = pc.utf8_lower(pc.utf8_slice_codeunits(pc.utf8_ltrim_whitespace(urls), 0, len(DATA_URI)))
    found: npt.NDArray[np.bool_] = pc.equal(starts, DATA_URI).combine_chunks().to_numpy(zero_copy_only=False)
    return found


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
        if name == needed[-1] and is_list(kind) and is_textual(kind.value_type):
            continue
        if name == needed[0] and name != needed[-1] and is_image(kind):
            continue
        if pa.types.is_nested(kind):
            wanted = "text or a list of texts" if name == needed[-1] else "text, bytes or a struct of bytes and path"
            raise Trouble(EXIT_INPUT, f"{name!r} is {str(kind)[:100]} in {file_name}, where {wanted} can be read")
        if not is_textual(kind):
            raise Trouble(EXIT_INPUT, f"{name!r} is not text in {file_name}, but of the type {kind}: write it as strings")


def is_textual(kind: pa.DataType) -> bool:
    """Whether cells of this type have one plain text: strings, numbers, truth values, dates, times and UUIDs."""
    types = pa.types
    if types.is_dictionary(kind):
        return is_textual(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating,
             types.is_boolean, types.is_decimal, types.is_date, types.is_time, types.is_timestamp, types.is_null)
    return isinstance(kind, pa.UuidType) or any(test(kind) for test in tests)


def to_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any textual column as strings, "" for NULL; bytes that are no UTF-8, which Parquet lets pass, become U+FFFD.

    Raises ValueError for a dictionary that stands for more text than MOST_TEXT_BYTES.
    """
    if pa.types.is_dictionary(column.type):
        column = _spell_out(column)
    if pa.types.is_null(column.type):
        return constant_cells("", len(column))
    if isinstance(column.type, pa.UuidType):
        return pa.chunked_array([pa.array([str(cell or "") for cell in column.to_pylist()], pa.string())])
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


def split_captions(lists: pa.ChunkedArray) -> Captions:
    """The captions of a column of lists of textual cells."""
    values = pc.list_flatten(lists)
    values = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])
    if pa.types.is_dictionary(values.type):
        values = values.combine_chunks()
        words = find_blank(to_text(pa.chunked_array([values.dictionary])))
        blank = np.append(words, True)[values.indices.fill_null(len(words)).to_numpy(zero_copy_only=False).astype(np.int64)]
        return take_captions(lists, pa.chunked_array([values]), blank)
    return take_captions(lists, values, find_blank(to_text(values)))


def constant_cells(text: str, count: int) -> pa.ChunkedArray:
    """A column of the same text, so many times."""
    return pa.chunked_array([pa.repeat(pa.scalar(text, pa.string()), count)])


class Piece(NamedTuple):
    """Some rows of a block that follow each other, one for each caption."""

    table: pa.Table
    first: int  # which of the block's rows is the first, captions counted
    places: npt.NDArray[np.int64]  # (n,) which row of the file's block each one comes from

    @property
    def stop(self) -> int:
        """Which of the block's rows comes next."""
        return self.first + len(self.table)

    def cut(self, start: int, stop: int) -> "Piece":
        """Those that are among the block's rows [start, stop)."""
        first = max(start, self.first)
        last = min(stop, self.stop)
        inside = slice(first - self.first, last - self.first)
        return Piece(self.table.slice(inside.start, last - first), first, self.places[inside])


class BlockStream:
    """The rows of a block from its first one on, a piece at a time; the last piece is kept."""

    def __init__(self, pieces: Iterator[pa.Table], list_column: str) -> None:
        self._pieces = pieces
        self._list_column = list_column  # of captions; "" for none
        self._file_rows = 0
        self.piece = Piece(pa.table({}), 0, np.zeros(0, np.int64))

    def find(self, row: int) -> Piece:
        """The piece with the block's row of that number, which is not before the piece at hand.

        Raises ValueError where the block has fewer rows.
        """
        while row >= self.piece.stop:
            first = self.piece.stop
            self.piece = self.piece._replace(table=self.piece.table.slice(0, 0), first=first)  # it goes before the next comes
            table = next(self._pieces, None)
            if table is None:
                raise ValueError("a block has not the rows that the file counts for it")
            self.piece = self._make_piece(table, first)
            self._file_rows += len(table)
        return self.piece

    def _make_piece(self, table: pa.Table, first: int) -> Piece:
        if not self._list_column:
            return Piece(table, first, self._file_rows + np.arange(len(table)))
        captions = split_captions(table[self._list_column])
        places = pa.array(captions.rows)
        columns: dict[str, pa.ChunkedArray | pa.Array] = {}
        for name in table.column_names:
            own = OWN_INDEX if name == CAPTION_INDEX else name
            columns[own] = captions.texts if name == self._list_column else table[name].take(places)
        columns[CAPTION_INDEX] = pa.array(captions.numbers)
        return Piece(pa.table(columns), first, self._file_rows + captions.rows)


class BlockRows(FileRows):
    """Rows of such files by number. The last piece is kept, so that consecutive partitions decode a block once."""

    def __init__(self, reader: BlockReader, manifest: Manifest, found: list[InputFile], config: Config) -> None:
        super().__init__(manifest, found)
        self.reader = reader
        self.schema = pa.schema([(name, pa.string()) for name in self.columns])
        self.url_column = column_name(config.url_column)
        self.caption_column = column_name(config.caption_column)
        self.has_lists = "input_rows" in manifest
        self.entries: list[Manifest] = manifest["files"]
        file_rows = [entry.get("input_rows", entry["rows"]) for entry in self.entries]
        self.first_input_rows = list(itertools.accumulate(file_rows, initial=0))  # of each file, captions not counted
        self._forget()

    def _forget(self) -> None:
        """Be as new: what is not sent to another process."""
        self._leave_file()

    def _leave_file(self) -> None:
        self._opened: BlockFile | None = None
        self._opened_number = -1  # its place in `files`
        self._edges: list[int] = []  # the first row of each of its blocks, captions counted, and the end
        self._stream: BlockStream | None = None
        self._stream_block = -1

    def __getstate__(self) -> dict[str, object]:
        """Without an open file: an engine may send the rows to another process."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, start: int, stop: int) -> "pd.DataFrame":
        """Rows [start, stop) as columns of text; a column that a file lacks is "" there."""
        pieces = [self.schema.empty_table(), *self.read_pieces(start, stop)]
        return pa.concat_tables(pieces).to_pandas()

    def read_pieces(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows [start, stop) in pieces, all columns as text."""
        for number, row, end in self.stretches(start, stop):
            opened = self._open(number)
            with reading(self.files[number].name):
                for block, piece in self._find_pieces(opened, row, end):
                    yield self.to_rows(opened, number, block, piece)

    def _find_pieces(self, opened: BlockFile, row: int, stop: int) -> Iterator[tuple[int, Piece]]:
        """The rows [row, stop) of a file in pieces, and the number of the block of each."""
        while row < stop:
            block = bisect.bisect_right(self._edges, row) - 1
            first = self._edges[block]
            end = min(self._edges[block + 1], stop)
            if self._stream is None or self._stream_block != block or row - first < self._stream.piece.first:
                self._stream = self._begin(opened, block)
                self._stream_block = block
            while row < end:
                piece = self._stream.find(row - first).cut(row - first, end - first)
                yield block, piece
                row += len(piece.table)

    def _begin(self, opened: BlockFile, block: int) -> BlockStream:
        names = opened.schema.names
        has_list = self.caption_column in names and is_list(opened.schema.field(self.caption_column).type)
        list_column = self.caption_column if has_list else ""
        return BlockStream(opened.read_pieces(block, self.stored_columns(opened)), list_column)

    def stored_columns(self, opened: BlockFile) -> list[str]:
        """The columns that are read of a file."""
        wanted = set(self.columns) | ({CAPTION_INDEX} if OWN_INDEX in self.columns else set())
        return [field.name for field in opened.schema if field.name in wanted and
                (is_textual(field.type) or (field.name == self.caption_column and is_list(field.type)))]

    def _open(self, number: int) -> BlockFile:
        if self._opened is None or self._opened_number != number:
            if self._opened is not None:
                self._opened.close()
            self._leave_file()
            opened = self.open_file(number)
            self._opened = opened
            self._opened_number = number
            self._edges = list(itertools.accumulate(self.entries[number].get("block_rows", opened.block_rows), initial=0))
        return self._opened

    def open_file(self, number: int) -> BlockFile:
        """The file at that place in `files`, opened once more. Raises Trouble (exit 3) where it has other rows than planned."""
        file = self.files[number]
        with reading(file.name):
            opened = self.reader.open_file(file)
            info = file.info() if file.in_store else None
        is_new = is_other(info, self.entries[number]) if info else self.reader.has_changed(file, self.entries[number])
        if is_new or sum(opened.block_rows) != self.first_input_rows[number + 1] - self.first_input_rows[number]:
            raise Trouble(EXIT_INPUT, f"{file.name} has changed since the run was planned")
        return opened

    def to_rows(self, opened: BlockFile, number: int, block: int, piece: Piece) -> pa.Table:
        """The rows of a piece with all columns as text."""
        table = piece.table
        folder_columns = dict(self.files[number].folder_columns)
        has_own_name = self.has_lists and not self._is_list_file(opened)  # of a column caption_index of its own
        cells = []
        for name in self.columns:
            stored = CAPTION_INDEX if has_own_name and name == OWN_INDEX and name not in table.column_names else name
            if name == CAPTION_INDEX and has_own_name:
                cells.append(constant_cells("0", len(table)))
            elif stored in table.column_names:
                cells.append(to_text(table[stored]))
            else:
                cells.append(constant_cells(folder_columns.get(name, ""), len(table)))
        return pa.Table.from_arrays(cells, schema=self.schema)

    def _is_list_file(self, opened: BlockFile) -> bool:
        return is_list(opened.schema.field(self.caption_column).type)

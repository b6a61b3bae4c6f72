"""JSON Lines as a table of text: one object a line, its keys the columns, in the order in which they first appear.

Cells are text as the file has it: strings without their quotes, numbers in their own digits, true and false as words,
null, NaN and a key that is not there as an empty cell, nested values as JSON. A caption that is a list makes a row of each of
its captions (caption_lists.py). A line that is no object, that lacks the URL's or the caption's key, or has an object for a
caption, is malformed: the JSON of an object is nobody's caption. Used for .jsonl, .ndjson and .json, which may also be one
array of objects (json_arrays.py), compressed or not.
"""
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from addons.inputs import needed_columns
from addons.inputs.caption_lists import CAPTION_INDEX, OWN_INDEX, split_list
from addons.inputs.files import InputFile
from addons.inputs.json_arrays import is_array, read_records
from addons.inputs.text import LONGEST_LINE_BYTES, Text, TextReader, TextTable, is_utf8
from image_text_sim_clip import (
    BATCH_ROWS,
    EXIT_INPUT,
    MAX_COLUMNS,
    Batch,
    Config,
    Malformed,
    Trouble,
    is_text,
    to_table,
)

BLOCK_BYTES = 4_000_000  # of text that Arrow parses at a time
FIRST_BYTES = 1_000_000  # of text in which the columns are looked for before the first row is written
MOST_REPEATED_CHARS = 64_000_000  # of a line's other cells, which each caption of its list repeats
LINE_ENDS = ("\n", "\r\n", "\r", "")

JsonObject = dict[str, str | bool | list[object] | dict[str, object] | None]


def _read_constant(word: str) -> str | None:
    """NaN, which is how Python and pandas write that there is no value, as null; Infinity as it stands."""
    return None if word == "NaN" else word


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_read_constant)  # numbers keep their digits


class JsonLinesReader(TextReader):
    """One JSON object a line."""

    kind = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".json")

    def open_table(self, config: Config, known: list[str]) -> TextTable:
        """Open the table at `config.csv_path`; without `known`, its columns are looked for in the first FIRST_BYTES."""
        needed = needed_columns(config)
        limit = config.limit or sys.maxsize
        text = Text(config.csv_path, config.encoding)
        if is_array(text):
            return self._open_array(config, known, text)
        columns = known or find_columns(text, needed, limit)
        if not columns:
            raise refuse_start(text, needed)
        return TextTable(columns, LineParser(text, needed, columns, limit).read_batches(), text.sha256)

    def guess_types(self, file: InputFile, config: Config) -> dict[str, str]:
        """The types of the values in the first FIRST_BYTES."""
        text = Text(file.path, config.encoding)
        records: Iterator[str] = (record for _, record in read_records(text)) if is_array(text) else text.lines()
        types: dict[str, set[type]] = {}
        for record in itertools.takewhile(lambda _: text.taken_bytes <= FIRST_BYTES, records):
            with contextlib.suppress(ValueError, RecursionError):
                values = json.loads(record)
                for key, value in values.items() if isinstance(values, dict) else ():
                    types.setdefault(OWN_INDEX if key == CAPTION_INDEX else key, set()).add(type(value))
        found = {key: _name_types(kinds - {type(None)}) for key, kinds in types.items()}
        return {key: name for key, name in found.items() if name}

    def _open_array(self, config: Config, known: list[str], text: Text) -> TextTable:
        needed = needed_columns(config)
        limit = config.limit or sys.maxsize
        columns = known
        if not known:
            head = Text(config.csv_path, config.encoding)
            first = (record for _, record in itertools.takewhile(lambda _: head.taken_bytes <= FIRST_BYTES, read_records(head)))
            columns = _join_keys(first, needed, [], limit)
        if not columns:
            raise Trouble(EXIT_INPUT, f"{text.path} is a list without an object that has {' and '.join(map(repr, needed))} as "
                                      "text")
        return TextTable(columns, ArrayParser(text, needed, columns, limit).read_batches(), text.sha256)


READER = JsonLinesReader()


def _name_types(kinds: set[type]) -> str:
    """What values of these types are together: int, float or bool; "" for none of them, or no values at all."""
    if kinds == {int}:
        return "int"
    if kinds and kinds <= {int, float}:
        return "float"
    return "bool" if kinds == {bool} else ""


# ── A line ────────────────────────────────────────────────────────────────────────────────────────────────────────────

Cells = dict[str, str]  # of a row, by key


def parse_line(line: str, needed: list[str]) -> tuple[list[Cells], str]:
    """One line to (its rows, ""), one for each caption, or to ([], why it is no row)."""
    if not is_text(line):
        return [], "bytes that are not text"
    try:
        rows = parse_rows(line, caption_key=needed[-1])
    except ValueError as error:
        return [], str(error)
    absent = [key for key in needed if key not in rows[0]]
    return ([], f"no key {absent[0]!r}") if absent else (rows, "")


class NestedCaption(ValueError):
    """An object where a caption is needed, or a list that is none of captions."""


def parse_rows(text: str, caption_key: str | None = None) -> list[Cells]:
    """The cells of one JSON object, once for each caption where these are a list.

    ValueError says why it is none, NestedCaption that its caption is no text.
    """
    try:
        values = _DECODER.decode(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if len(values) > MAX_COLUMNS:
            raise ValueError(f"more than {MAX_COLUMNS} keys")
        captions = _take_captions(values, caption_key)
        if CAPTION_INDEX in values:
            values = {OWN_INDEX if key == CAPTION_INDEX else key: value for key, value in values.items()}
        cells = _to_cells(values, text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if "\\u" in text and not is_text("".join((*cells, *cells.values(), *captions))):
        raise ValueError("half a surrogate pair")
    if caption_key is None or not captions:
        return [cells]
    return [{**cells, caption_key: caption, CAPTION_INDEX: str(place)} for place, caption in enumerate(captions)]


def parse_object(text: str) -> Cells:
    """The cells of one JSON object, whatever they are; ValueError says why it is none."""
    return parse_rows(text)[0]


def _take_captions(values: JsonObject, caption_key: str | None) -> list[str]:
    """The captions of an object that has a list of them, whose place an empty text takes; [] for one that has none."""
    if caption_key is None:
        return []
    caption = values.get(caption_key)
    if isinstance(caption, dict):
        raise NestedCaption(f"{caption_key!r} is an object, not text")
    if not isinstance(caption, list):
        return []
    try:
        captions = split_list(caption)
    except ValueError as error:
        raise NestedCaption(f"{caption_key!r} is {error}, not captions") from None
    others = sum(len(value) for value in values.values() if isinstance(value, str))
    if others * len(captions) > MOST_REPEATED_CHARS:
        raise NestedCaption(f"{caption_key!r} is a list of {len(captions)} captions, too many for so long a line")
    values[caption_key] = ""
    return captions


def _to_cells(values: JsonObject, text: str) -> Cells:
    """The cells for the values of the object that `text` holds; its numbers have come as strings."""
    cells: Cells = {}
    nested: dict[str, object] | None = None
    for key, value in values.items():
        if isinstance(value, str):
            cells[key] = value
        elif value is None:
            cells[key] = ""
        elif isinstance(value, bool):
            cells[key] = str(value).lower()
        else:
            if nested is None:
                nested = json.loads(text)  # decoded again, once for all, so that numbers in lists are numbers
            assert nested is not None
            own_key = CAPTION_INDEX if key == OWN_INDEX and CAPTION_INDEX in nested else key
            cells[key] = json.dumps(nested[own_key], ensure_ascii=False)
    return cells


def find_columns(text: Text, needed: list[str], limit: int) -> list[str]:
    """The keys of the rows, `limit` at most, in the first FIRST_BYTES of `text`, or as many as its first line has; they are not
    taken. [] without a row."""
    size = FIRST_BYTES
    head = text.peek(size)
    while len(head) == size and b"\n" not in head and size < LONGEST_LINE_BYTES:  # the first line alone is longer
        size *= 2
        head = text.peek(size)
    lines = head.splitlines()
    if len(head) == size:
        del lines[-1]  # it may go on
    decoded = (line.decode("utf-8", text.errors) for line in lines)
    return _join_keys(decoded, needed, [], limit)


def refuse_start(text: Text, needed: list[str]) -> Trouble:
    """Trouble (exit 3) for a text whose first lines hold no row: it says what is wrong with the first one that is not blank."""
    first = next((line for line in text.lines() if line.strip()), "")
    reason = parse_line(first, needed)[1] if first else "it is empty"
    return Trouble(EXIT_INPUT, f"{text.path} begins with no JSON object that has {' and '.join(map(repr, needed))} as text "
                               f"(its first line: {reason})")


def _join_keys(lines: Iterator[str], needed: list[str], columns: list[str], limit: int) -> list[str]:
    """`columns`, and behind them the keys that the next rows, `limit` at most, have more."""
    found = dict.fromkeys(columns)
    rows = 0
    for line in lines:
        if rows >= limit:
            break
        parsed, _ = parse_line(line, needed)
        if parsed:
            found.update(dict.fromkeys(parsed[0]))
            rows += len(parsed)
            check_width(len(found))
    return list(found)


def check_width(columns: int) -> None:
    """Raise Trouble (exit 3) for rows that have more keys together than a table of pairs may have columns."""
    if columns > MAX_COLUMNS:
        raise Trouble(EXIT_INPUT, f"the rows have more than {MAX_COLUMNS} different keys together: no table of pairs")


# ── Lines to batches ──────────────────────────────────────────────────────────────────────────────────────────────────

class LineParser:
    """Reads a text of JSON lines into batches of rows with `columns`, until `limit` rows are there."""

    def __init__(self, text: Text, needed: list[str], columns: list[str], limit: int) -> None:
        self.text = text
        self.needed = needed
        self.columns = columns
        self.rows_left = limit
        self.has_lists = CAPTION_INDEX in columns  # each line is then read by itself

    def read_batches(self) -> Iterator[Batch]:
        """Batches of rows and malformed lines, the last of which may go beyond the limit.

        Where a line has a key that is no column, the batches end with an empty table of all columns that there are.
        """
        strings: set[str] = set()
        while self.rows_left > 0 and (block := self.text.peek(BLOCK_BYTES)):
            whole_lines = block[:block.rfind(b"\n") + 1]
            table = None
            if not self.has_lists:
                table = parse_plain(whole_lines, self.columns, self.needed, strings)
            if table is None:
                yield from self._read_lines(len(whole_lines))
            else:
                self.text.take(len(whole_lines), lines=len(table))
                self.rows_left -= len(table)
                yield table, []

    def _read_lines(self, size: int) -> Iterator[Batch]:
        """Batches of the next `size` bytes, line by line; of one batch of lines at least."""
        end = self.text.taken_bytes + max(size, 1)
        lines = self.text.lines()
        while self.text.taken_bytes < end and self.rows_left > 0:
            first_line = self.text.line
            batch = list(_take_lines(lines))
            if not batch:
                return
            malformed: list[Malformed] = []
            new_keys: list[str] = []
            try:
                table = to_table([scan_line(line, self.columns) for line in batch], self.columns)
            except (StopIteration, ValueError, TypeError, AttributeError, RecursionError):  # some line is not plain
                table, malformed, new_keys = self.parse_carefully(enumerate(batch, first_line))
            self.rows_left -= len(table)
            if new_keys:
                columns = _join_keys(lines, self.needed, [*self.columns, *new_keys], self.rows_left)
                self.rows_left = 0  # the table is read again from its start, with these columns
                yield to_table([], columns), []
                return
            yield table, malformed

    def parse_carefully(self, batch: Iterable[tuple[int, str]]) -> tuple[pa.Table, list[Malformed], list[str]]:
        """Of some lines, each with its number: the rows that are left to be read, the malformed ones, and the new keys."""
        rows: list[list[str]] = []
        malformed: list[Malformed] = []
        new_keys: dict[str, None] = {}
        known = set(self.columns)
        for number, line in batch:
            if len(rows) >= self.rows_left:
                break
            if not line.strip(" \t\r\n"):
                continue
            parsed, reason = parse_line(line, self.needed)
            if not parsed:
                malformed.append((len(rows), number, reason, line.rstrip("\r\n")))
                continue
            new_keys.update((key, None) for key in parsed[0] if key not in known)
            check_width(len(known) + len(new_keys))
            for cells in parsed:
                cells.setdefault(CAPTION_INDEX, "0")
                rows.append([cells.get(column, "") for column in self.columns])
        return to_table(rows, self.columns), malformed, list(new_keys)


class ArrayParser(LineParser):
    """The same of a text that is a JSON array."""

    def read_batches(self) -> Iterator[Batch]:
        """See LineParser."""
        records = read_records(self.text)
        while self.rows_left > 0:
            batch = list(_take_records(records))
            if not batch:
                return
            table, malformed, new_keys = self.parse_carefully(batch)
            self.rows_left -= len(table)
            if new_keys:
                others = (record for _, record in records)
                yield to_table([], _join_keys(others, self.needed, [*self.columns, *new_keys], self.rows_left)), []
                return
            yield table, malformed


def _take_records(records: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The next records: BATCH_ROWS of them, or fewer where they are long."""
    chars = 0
    for number, record in itertools.islice(records, BATCH_ROWS):
        yield number, record
        chars += len(record)
        if chars > BLOCK_BYTES:
            return


def _take_lines(lines: Iterator[str]) -> Iterator[str]:
    """The next lines: BATCH_ROWS of them, or fewer where they are long."""
    chars = 0
    for line in itertools.islice(lines, BATCH_ROWS):
        yield line
        chars += len(line)
        if chars > BLOCK_BYTES:
            return


def scan_line(line: str, columns: list[str]) -> list[str]:
    """The cells of a plain line: an object with these very keys in this order, and nothing around it; else an exception."""
    values, end = _DECODER.scan_once(line, 0)  # type: ignore[attr-defined]
    if line[end:] not in LINE_ENDS or list(values) != columns or CAPTION_INDEX in columns:
        raise ValueError
    return list(values.values())  # of which to_table refuses what is no string


# ── The fast way ──────────────────────────────────────────────────────────────────────────────────────────────────────

def parse_plain(block: bytes, columns: list[str], needed: list[str], strings: set[str]) -> pa.Table | None:
    """The rows of whole lines that hold nothing odd, by Arrow; None where it could see them otherwise than `parse_line`.

    Arrow keeps no number's digits: those of fractions are looked up in the text, and must give Arrow's values in its order.
    `strings` are the columns that Arrow may not take for times, learned from call to call.
    """
    lines = block.count(b"\n")
    if not _looks_plain(block, lines):
        return None
    try:
        table = _read_with_arrow(block, strings)
        taken_for_times = {field.name for field in table.schema if pa.types.is_timestamp(field.type)}
        strings.update(field.name for field in table.schema if pa.types.is_string(field.type))
        if taken_for_times:
            strings.update(taken_for_times)
            table = _read_with_arrow(block, strings)
        if len(table) != lines or not set(columns).issuperset(table.column_names):
            return None
        if any(name not in table.column_names or table[name].null_count for name in needed):
            return None
        cells = [_to_text(table[name], name, block) if name in table.column_names else pa.array([""] * lines)
                 for name in columns]
        return pa.Table.from_arrays(cells, columns)
    except (pa.ArrowException, ValueError):  # ArrowInvalid is a ValueError; so is what this module raises
        strings.clear()
        return None


def _looks_plain(block: bytes, lines: int) -> bool:
    """Whether the text is UTF-8 with one object a line, and nothing in it that Arrow is known to see otherwise."""
    if not lines or block.count(b"}\n{") != lines - 1 or block[:1] != b"{" or block[-2:] != b"}\n":
        return False  # objects that do not stand one on a line
    if re.search(rb"\\u[dD]", block) or re.search(rb"-0+\s*[,}]", block):
        return False  # half a character, perhaps; a whole number that is a negative zero, perhaps
    return b"\r" not in block and is_utf8(block, len(block))


def _read_with_arrow(block: bytes, strings: set[str]) -> pa.Table:
    read_options = arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    schema = pa.schema([(name, pa.string()) for name in strings])
    return arrow_json.read_json(pa.BufferReader(block), read_options, arrow_json.ParseOptions(explicit_schema=schema))


def _to_text(column: pa.ChunkedArray, name: str, block: bytes) -> pa.ChunkedArray:
    """A column of Arrow's as the text that the block has; ValueError where that is not sure."""
    if pa.types.is_nested(column.type):
        raise ValueError("nested")
    if not pa.types.is_floating(column.type):
        return column.cast(pa.string()).fill_null("")
    key = re.escape(json.dumps(name, ensure_ascii=False).encode())
    digits = re.findall(key + rb"\s*:\s*(-?[0-9][0-9.eE+-]*)", block)  # within a string the quotes would have backslashes
    has_value = column.is_valid().to_numpy()
    if len(digits) != np.count_nonzero(has_value):
        raise ValueError("digits that cannot be told")
    if not np.array_equal(np.array(digits, "S").astype(np.float64), column.drop_null().to_numpy()):
        raise ValueError("digits that cannot be told")
    cells = np.full(len(column), "", object)
    cells[has_value] = [word.decode() for word in digits]
    return pa.chunked_array([pa.array(cells, pa.string())])

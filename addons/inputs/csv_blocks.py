"""CSV at speed: blocks that keep to the strict grammar go through Arrow, the rest record by record as the script reads them.

Rows, malformed records and line numbers are those that the script's
careful reader alone would find; the block sizes below decide how long it takes and nothing else.
"""
import codecs
import csv
import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv as arrow_csv

from addons.inputs.escapes import ESCAPE, EscapedQuotes, find_escape
from addons.inputs.literal_quotes import LiteralQuotes
from addons.inputs.text import Text, TextTable, is_utf8
from image_text_sim_clip import (
    MAX_RECORD_CHARS,
    Batch,
    Config,
    Malformed,
    careful_batches,
    csv_records,
    is_text,
    name_columns,
    separator_of,
)

pa.enable_signal_handlers(False)  # Arrow's own would take a Ctrl-C that comes while it parses, and lose it

BLOCK_BYTES = 1_000_000  # of text that is parsed at a time; larger ones are no faster and take more memory
CAREFUL_BYTES = 128_000  # a block of this size that does not keep to the grammar is read record by record
SEPARATOR_LINE = re.compile(rb'"?sep=([^\w"\r\n\x80-\xff])"?(?:\r\n|\n|\r)', re.IGNORECASE)
SEPARATOR_LINE_BYTES = 10
MOST_LINES_BACK = 1000  # how far from the end of a block the end of its last record is looked for

QUOTE = ord('"')
LINE_FEED = ord("\n")
CARRIAGE_RETURN = ord("\r")

Codes = npt.NDArray[np.uint8]  # the bytes of a block, (n,)
Places = npt.NDArray[np.int64]  # where in a block something is, (m,), ascending
Flags = npt.NDArray[np.bool_]


def open_table(config: Config, known: list[str]) -> TextTable:
    """Open the CSV at `config.csv_path`; `known` does not matter, because its first record names all columns.

    Raises Trouble (exit 3) for a table that cannot be read, or lacks the columns.
    """
    text = Text(config.csv_path, config.encoding)
    config = take_separator_line(text, config)
    separator = separator_of(config)
    escape = "" if config.escape in ("auto", "none") else config.escape
    escaped = EscapedQuotes(separator, config.escape == "auto" and config.quoting == "auto" and separator != ESCAPE)
    grammar = Grammar(separator, config.quoting == "auto", LiteralQuotes(config), escape, escaped)
    has_header = not isinstance(config.url_column, int)
    columns = name_columns(read_first(text, grammar, put_back=not has_header), config)
    if grammar.escaped.is_possible:
        grammar = grammar._replace(escape=find_escape(text, separator, len(columns)))
    return TextTable(columns, read_batches(text, grammar, columns), text.sha256, lambda: grammar.literal.lines,
                     lambda: tell_escapes(text.path, grammar))


def take_separator_line(text: Text, config: Config) -> Config:
    """Take a first line such as `sep=;`, by which programs tell Excel what separates fields; the config that heeds it."""
    found = SEPARATOR_LINE.match(text.peek(SEPARATOR_LINE_BYTES))
    if not found:
        return config
    text.take(found.end(), lines=1)
    return dataclasses.replace(config, separator=found[1].decode()) if config.separator == "auto" else config


def tell_escapes(path: str, grammar: "Grammar") -> list[str]:
    """What is to be said of a table that was read with escaped quotes although `escape: auto`."""
    lines = grammar.escaped.lines
    if not grammar.escaped.is_possible or not (grammar.escape or lines):
        return []
    if grammar.escape:
        return [f'in {path} a backslash escapes quotes, so it was read with escape: "\\\\"; if not, set escape: none']
    return [f"{lines} lines of {path} are rows only if a backslash escapes quotes, and were read so; if that is so of all "
            'its quotes, set escape: "\\\\"']


class Grammar(NamedTuple):
    """How a table is to be read: what separates two fields, whether quotes can quote, and where they do not all the same."""

    separator: str
    has_quotes: bool
    literal: LiteralQuotes
    escape: str  # "" for none
    escaped: EscapedQuotes

    @property
    def quoting(self) -> str:
        """The config's key."""
        return "auto" if self.has_quotes else "none"


def read_first(text: Text, grammar: Grammar, put_back: bool) -> list[str]:
    """The first record, blank lines before it left out; [] if there is none or it cannot be read. Taken unless `put_back`."""
    csv.field_size_limit(MAX_RECORD_CHARS)
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text.lines():
            taken.append(line)
            yield line
    first: list[str] = []
    try:
        for record in csv.reader(lines(), delimiter=grammar.separator, strict=True,
                                 escapechar=grammar.escape or None,
                                 quoting=csv.QUOTE_MINIMAL if grammar.has_quotes else csv.QUOTE_NONE):
            if record:
                first = record
                break
    except csv.Error:
        return []
    if not is_text("".join(first)):
        return []
    if put_back:
        text.put_back(taken)
    return first


def read_batches(text: Text, grammar: Grammar, columns: list[str]) -> Iterator[Batch]:
    """Batches of rows and malformed records, a block at a time, carefully where it must be."""
    size = BLOCK_BYTES
    while block := text.peek(size):
        end, quotes = find_clean_end(block, grammar, is_last=len(block) < size)
        clean = block[:end]
        batch = parse_clean(clean, quotes, grammar.separator, columns, text.line, grammar.has_quotes) if end else None
        if batch and not may_hold_literal_quotes(batch, grammar):
            size = min(2 * size, BLOCK_BYTES)
            yield batch
            text.take(end, count_lines(clean))
        elif size > CAREFUL_BYTES:
            size = max(size // 8, CAREFUL_BYTES)
        else:
            yield from read_stretch(text, grammar, columns, size)


def may_hold_literal_quotes(batch: Batch, grammar: Grammar) -> bool:
    """Whether a malformed record may be a row with its quotes as text, or escaped, which the careful reader would find."""
    _, malformed = batch
    if any(grammar.escaped.may_repair(raw) for *_, raw in malformed):
        return True
    return grammar.literal.is_possible and any('"' in raw for *_, raw in malformed)


def read_stretch(text: Text, grammar: Grammar, columns: list[str], size: int) -> Iterator[Batch]:
    """Batches read record by record, until `size` bytes have passed and a record ends for sure."""
    end = text.taken_bytes + size
    records = csv_records(text.lines(), grammar.separator, text.line, grammar.quoting, grammar.escape)
    records = grammar.escaped.reread(grammar.literal.reread(records, len(columns)), len(columns))
    return careful_batches(records, columns, lambda: text.taken_bytes >= end)


def count_lines(block: bytes) -> int:
    """How many physical lines end in the block: \\n, \\r\\n and \\r each end one."""
    line_feeds = np.count_nonzero(np.frombuffer(block, np.uint8) == LINE_FEED)  # faster than bytes.count where there are many
    return int(line_feeds) + block.count(b"\r") - block.count(b"\r\n")


# ── Which part of a block is clean ────────────────────────────────────────────────────────────────────────────────────

def find_clean_end(block: bytes, grammar: Grammar, is_last: bool) -> tuple[int, Places]:
    """Length of the whole records that `block` begins with, 0 unless they are UTF-8 and every parser agrees on them.

    Also where their quotes are, (m,), those left out that are text for sure, such as the one of `5" pipe`.
    """
    separator = grammar.separator
    codes = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(codes == QUOTE) if grammar.has_quotes else np.zeros(0, np.int64)
    if grammar.escape and grammar.escape.encode() in block:
        return 0, quotes
    if not separator.isascii() or block.startswith(codecs.BOM_UTF8):  # Arrow knows no such separator, and drops a BOM
        return 0, quotes
    borders = np.isin(np.arange(256), [ord(separator), CARRIAGE_RETURN, LINE_FEED])
    end = _find_strict_end(block, quotes, borders, is_last)
    if not end:
        quotes = drop_literal_quotes(codes, quotes, borders)
        end = _find_strict_end(block, quotes, borders, is_last)
    quotes = quotes[:np.searchsorted(quotes, end)]
    if not is_utf8(block, end) or (grammar.literal.is_possible and quote_line_ends(codes[:end], quotes)):
        return 0, quotes
    return end, quotes


def quote_line_ends(codes: Codes, quotes: Places) -> bool:
    """Whether a line ends inside a quoted field of the clean records `codes` (n,), whose quotes are at `quotes` (m,)."""
    if not len(quotes):
        return False
    ends = np.flatnonzero((codes == LINE_FEED) | (codes == CARRIAGE_RETURN))
    return bool((np.searchsorted(quotes, ends) % 2).any())


def _find_strict_end(block: bytes, quotes: Places, borders: Flags, is_last: bool) -> int:
    """Length of the whole records that `block` begins with, 0 unless their quotes keep to the grammar."""
    end = len(block) if is_last else _find_last_end(block, quotes)
    quotes = quotes[:np.searchsorted(quotes, end)]
    codes = np.frombuffer(block, np.uint8)[:end]
    return end if end and keeps_to_grammar(codes, quotes, borders) else 0


def _find_last_end(block: bytes, quotes: Places) -> int:
    """Where the last record of `block` ends that does so within it; 0 if that is not quickly found."""
    end = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1  # a \r at the very end may have a \n to come
    for _ in range(MOST_LINES_BACK):
        quotes_before = int(np.searchsorted(quotes, end))
        if quotes_before % 2 == 0:
            return end
        quote = int(quotes[quotes_before - 1])  # the line ends inside quotes; the record began before them
        end = max(block.rfind(b"\n", 0, quote), block.rfind(b"\r", 0, quote)) + 1
    return 0


def keeps_to_grammar(codes: Codes, quotes: Places, borders: Flags) -> bool:
    """Whether each quote opens a field at its start, closes it at its end, or is one of two that stand for one.

    `codes` are the bytes (n,) of whole records, `quotes` the places (m,) of the quotes, `borders` says of each of the 256
    bytes whether it ends a field.
    """
    if len(quotes) % 2:
        return False
    opening = quotes[0::2]
    closing = quotes[1::2]
    starts_field = borders[codes[opening - 1]] | (opening == 0)
    ends_field = borders[codes[np.minimum(closing + 1, len(codes) - 1)]] | (closing == len(codes) - 1)
    doubled = closing[:-1] + 1 == opening[1:]  # two quotes that stand for one, inside a field
    starts_field[1:] |= doubled
    ends_field[:-1] |= doubled
    return bool(starts_field.all() and ends_field.all())


def drop_literal_quotes(codes: Codes, quotes: Places, borders: Flags) -> Places:
    """The quotes less those on physical lines that begin outside quotes and have none where a field starts.

    No reader takes such a quote for more than text. Whether a line begins outside follows from the lines before it.
    """
    line_of_quote = np.searchsorted(np.flatnonzero((codes == LINE_FEED) | (codes == CARRIAGE_RETURN)), quotes)
    _, line, counts = np.unique(line_of_quote, return_inverse=True, return_counts=True)  # of lines that have quotes
    starts_field = borders[codes[quotes - 1]] | (quotes == 0)
    has_opening = np.bincount(line, starts_field, len(counts)) > 0
    keep_line = np.zeros(len(counts), bool)
    inside = False  # whether the line begins inside a quoted field
    for number, count in enumerate(counts.tolist()):
        if inside or has_opening[number]:
            keep_line[number] = True
            ends_elsewhere = count % 2 == 1  # an odd number of quotes opens or closes a field
            inside = inside != ends_elsewhere
    return quotes[keep_line[line]]


# ── Clean records to rows ─────────────────────────────────────────────────────────────────────────────────────────────

def parse_clean(block: bytes, quotes: Places, separator: str, columns: list[str], line: int,
                has_quotes: bool = True) -> Batch:
    """Clean records, their quotes at `quotes`, to rows and malformed records; `line` is the number of the first line."""
    odd: list[arrow_csv.InvalidRow] = []

    def set_aside(row: arrow_csv.InvalidRow) -> str:
        odd.append(row)
        return "skip"
    names = [str(number) for number in range(len(columns))]  # because `columns` may hold one name twice
    rows = arrow_csv.read_csv(
        pa.BufferReader(block), arrow_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
        arrow_csv.ParseOptions(delimiter=separator, quote_char='"' if has_quotes else False,
                               newlines_in_values=has_quotes, invalid_row_handler=set_aside),
        arrow_csv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False))
    malformed: list[Malformed] = []
    if odd:
        lines_before = _count_lines_before_records(block, quotes)
        for number, row in enumerate(odd):
            record = row.number - 1  # its place among all records of the block
            reason = f"{row.actual_columns} fields instead of {len(columns)}"
            malformed.append((record - number, line + int(lines_before[record]), reason, row.text))
    return rows.rename_columns(columns), malformed


def _count_lines_before_records(block: bytes, quotes: Places) -> Places:
    """For each record, (n,), how many physical lines of the block come before it; blank lines are no records."""
    codes = np.frombuffer(block, np.uint8)
    following = np.append(codes[1:], 0)
    ends = np.flatnonzero((codes == LINE_FEED) | ((codes == CARRIAGE_RETURN) & (following != LINE_FEED)))
    starts = np.append(0, ends[ends < len(codes) - 1] + 1)  # of physical lines
    is_outside = np.searchsorted(quotes, starts) % 2 == 0
    is_blank = (codes[starts] == LINE_FEED) | (codes[starts] == CARRIAGE_RETURN)
    return np.flatnonzero(is_outside & ~is_blank)

"""Text tables at speed: blocks that keep to the strict grammar go through Arrow, the rest record by record (tables.py).

Used by the script's `stage` for CSV and JSON Lines, gzipped or not. Rows, malformed records and line numbers are those
that the careful reader alone would find; the block sizes below decide how long it takes and nothing else.
"""
import codecs
import csv
import gzip
import hashlib
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from addons import tables
from addons.tables import Batch

pa.enable_signal_handlers(False)  # Arrow's own would take a Ctrl-C that comes while it parses, and lose it

BLOCK_BYTES = 1_000_000  # of text that is parsed at a time; larger ones are no faster and take more memory
CAREFUL_BYTES = 128_000  # a block of this size that does not keep to the grammar is read record by record
LINE_PIECE_BYTES = 65_536  # of text that is cut into physical lines at a time
LONGEST_LINE_BYTES = 64_000_000  # a file with a longer line is no table; nothing is held beyond this


class Text:
    """A table's text as UTF-8 bytes in one pass: hashed, unzipped (.gz) and transcoded on the way, little of it held.

    What a codec cannot read becomes lone surrogates, which no UTF-8 holds: such lines are told from good ones later.
    """

    def __init__(self, path: pathlib.Path, encoding: str, trouble: Callable[[str], Exception]) -> None:
        self.trouble = trouble
        self.path, self.encoding, self.held, self.at, self.line, self.ended = path, encoding, b"", 0, 1, False
        self.digest, self.codec = hashlib.sha256(), codecs.lookup(encoding).name
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise self.trouble(f"cannot read csv_path {path}: {error.strerror}") from None
        packed: Any = self  # has the one method that gzip calls
        self._bytes: Any = gzip.GzipFile(fileobj=packed, mode="rb") if path.suffix.lower() == ".gz" else self
        self._decode = None if self.codec == "utf-8" else codecs.getincrementaldecoder(encoding)("surrogateescape").decode
        self.errors = "surrogatepass" if self._decode else "surrogateescape"  # how `text` is decoded again
        start = self.peek(4)
        if self.codec == "utf-8" and start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise self.trouble(f"{path} is UTF-16; set encoding: utf-16, or save it as UTF-8")
        self.at = 3 if self.codec == "utf-8" and start.startswith(codecs.BOM_UTF8) else 0

    def read(self, size: int) -> bytes:
        """The next bytes of the file as it lies on the disk."""
        data = self._file.read(size)
        self.digest.update(data)
        return data

    def peek(self, size: int) -> bytes:
        """The next `size` bytes of text, fewer only at its end; they are taken by moving `at`."""
        try:
            while len(self.held) - self.at < size and not self.ended:
                data = self._bytes.read(max(size, 1 << 20))
                self.ended = not data
                if self._decode:
                    data = self._decode(data, self.ended).encode("utf-8", "surrogatepass")
                self.held, self.at = self.held[self.at:] + data, 0
        except (EOFError, OSError, zlib.error) as error:
            raise self.trouble(f"cannot read csv_path {self.path} to its end: {error}") from None
        except UnicodeError as error:  # a codec without surrogateescape, such as utf-16
            raise self.trouble(f"{self.path} is not {self.encoding}: {error}") from None
        return self.held[self.at:self.at + size]

    def lines(self) -> Iterator[str]:
        """Take physical lines one by one, their ends kept; what no codec could read is in them as lone surrogates."""
        size = LINE_PIECE_BYTES
        while piece := self.peek(size):
            lines = piece.splitlines(keepends=True)
            if not (self.ended and self.at + len(piece) == len(self.held)):
                del lines[-1]  # it may go on, or end in \r with a \n to come
            size = LINE_PIECE_BYTES if lines else 2 * size
            if size > LONGEST_LINE_BYTES:
                raise self.trouble(f"{self.path} is no table: line {self.line} is longer than {size // 2} bytes")
            for line in lines:
                self.at += len(line)
                self.line += 1
                yield line.decode("utf-8", self.errors)

    def sha256(self) -> str:
        """Of the file as it lies on the disk; reads what is left of it."""
        while self.read(1 << 20):
            pass
        self._file.close()
        return self.digest.hexdigest()


def open_table(config: Any, kind: str, known: Iterable[str], separator: str, name_columns: Callable[[list[str]], list[str]],
               trouble: Callable[[str], Exception]) -> tuple[Callable[[], str], list[str], Iterator[Batch]]:
    """Open the table at `config.csv_path`: (its sha256 when all is read, its columns, batches of rows and malformed records).

    `kind` is csv or jsonl; `known` are columns that an earlier try found (see json_lines); `name_columns` checks and names
    the columns that the first record gives; `trouble` makes the exception for a table that cannot be read.
    """
    text = Text(pathlib.Path(config.csv_path), config.encoding, trouble)
    if kind == "jsonl":
        from addons import json_lines
        columns, batches = json_lines.open_batches(text, config, list(known))
        if not columns:
            needed = f"{config.url_column!r} and {config.caption_column!r}"
            raise trouble(f"{text.path} begins with no JSON object that has {needed}")
        return text.sha256, name_columns(columns), batches
    columns = name_columns(read_first(text, separator, put_back=isinstance(config.url_column, int)))
    return text.sha256, columns, csv_batches(text, separator, columns)


def read_first(text: Text, separator: str, put_back: bool) -> list[str]:
    """The first record, blank lines before it left out; [] if there is none or it cannot be read. Taken unless `put_back`."""
    csv.field_size_limit(tables.MAX_RECORD_CHARS)
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text.lines():
            taken.append(line)
            yield line
    try:
        first = next(filter(None, csv.reader(lines(), delimiter=separator, strict=True)), [])
    except csv.Error:
        return []
    if not tables.is_text("".join(first)):
        return []
    if put_back:  # nothing that was taken holds a flaw, so this gives the same bytes
        text.held, text.at, text.line = "".join(taken).encode() + text.held[text.at:], 0, text.line - len(taken)
    return first


def find_clean_end(block: bytes, separator: str, is_last: bool) -> tuple[int, np.ndarray]:
    """Length of the whole records that `block` begins with, 0 unless they are UTF-8 and every parser agrees on them.

    Also where their quotes are, those left out that are text for sure, such as the one of `5" pipe`.
    """
    codes = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(codes == ord('"'))
    if not separator.isascii() or block.startswith(codecs.BOM_UTF8):  # Arrow knows no such separator, and drops a BOM
        return 0, quotes
    borders = np.isin(np.arange(256), [ord(separator), ord("\r"), ord("\n")])
    for choose in (lambda: quotes, lambda: drop_literal_quotes(codes, quotes, borders)):
        chosen = choose()
        end = len(block) if is_last else _find_last_end(block, chosen)
        chosen = chosen[:np.searchsorted(chosen, end)]
        if end and keep_to_grammar(codes[:end], chosen, borders):
            return (end if tables.is_utf8(block, end) else 0), chosen
    return 0, quotes


def _find_last_end(block: bytes, quotes: np.ndarray) -> int:
    """Where the last record of `block` ends that does so within it; 0 if that is not quickly found."""
    end = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1  # a \r at the very end may have a \n to come
    for _ in range(1000):
        before = int(np.searchsorted(quotes, end))
        if before % 2 == 0:
            return end
        quote = int(quotes[before - 1])  # the line ends inside quotes; the record began before them
        end = max(block.rfind(b"\n", 0, quote), block.rfind(b"\r", 0, quote)) + 1
    return 0


def keep_to_grammar(codes: np.ndarray, quotes: np.ndarray, borders: np.ndarray) -> bool:
    """Whether each quote opens a field at its start, closes it at its end, or is one of two that stand for one.

    `codes` are the bytes (n,) of whole records, `quotes` the places (m,) of the quotes, `borders` says of each of the 256
    bytes whether it ends a field.
    """
    if len(quotes) % 2:
        return False
    opening, closing = quotes[0::2], quotes[1::2]
    starts, ends = borders[codes[opening - 1]], borders[codes[np.minimum(closing + 1, len(codes) - 1)]]
    escaped = closing[:-1] + 1 == opening[1:]
    starts[1:] |= escaped
    ends[:-1] |= escaped
    return bool((starts | (opening == 0)).all() and (ends | (closing == len(codes) - 1)).all())


def drop_literal_quotes(codes: np.ndarray, quotes: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """The quotes less those on physical lines that begin outside quotes and have none where a field starts.

    No reader takes such a quote for more than text. Whether a line begins outside follows from the lines before it.
    """
    line_of_quote = np.searchsorted(np.flatnonzero((codes == ord("\n")) | (codes == ord("\r"))), quotes)
    _, line, counts = np.unique(line_of_quote, return_inverse=True, return_counts=True)
    opens = np.bincount(line, borders[codes[quotes - 1]] | (quotes == 0), len(counts)) > 0
    inside, kept = False, []
    for has_opening, is_odd in zip(opens.tolist(), (counts % 2 == 1).tolist(), strict=True):
        kept.append(inside or has_opening)
        inside ^= kept[-1] and is_odd
    return quotes[np.array(kept, bool)[line]]


def parse_clean(block: bytes, quotes: np.ndarray, separator: str, columns: list[str], line: int) -> Batch:
    """Clean records, their quotes at `quotes`, to rows and malformed records; `line` is the number of the first line."""
    odd: list[Any] = []

    def set_aside(row: Any) -> str:
        odd.append(row)
        return "skip"
    names = [str(n) for n in range(len(columns))]
    rows = arrow_csv.read_csv(
        pa.BufferReader(block), arrow_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
        arrow_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=set_aside),
        arrow_csv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False))
    if not odd:
        return rows.rename_columns(columns), []
    codes = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((codes == 10) | ((codes == 13) & (np.append(codes[1:], 0) != 10)))
    starts = np.append(0, ends[ends < len(codes) - 1] + 1)
    inside = np.searchsorted(quotes, starts) % 2
    lines = np.flatnonzero((inside == 0) & (codes[starts] != 10) & (codes[starts] != 13))  # where records begin
    return rows.rename_columns(columns), [
        (row.number - 1 - n, line + int(lines[row.number - 1]),
         f"{row.actual_columns} fields instead of {len(columns)}", row.text) for n, row in enumerate(odd)]


def csv_batches(text: Text, separator: str, columns: list[str]) -> Iterator[Batch]:
    """Yield (rows as a table, malformed records as `parse_clean` gives them), a block at a time, carefully where it must be."""
    size = BLOCK_BYTES
    while block := text.peek(size):
        end, quotes = find_clean_end(block, separator, len(block) < size)
        if end:
            block, size = block[:end], min(2 * size, BLOCK_BYTES)
            yield parse_clean(block, quotes, separator, columns, text.line)
            text.at += end
            text.line += int(np.count_nonzero(np.frombuffer(block, np.uint8) == 10)) + block.count(b"\r") - block.count(b"\r\n")
        elif size > CAREFUL_BYTES:
            size = max(size // 8, CAREFUL_BYTES)
        else:
            yield from tables.careful_batches(text, separator, columns, size)
